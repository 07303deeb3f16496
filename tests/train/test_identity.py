"""One identity per run: every option decides the result and is refused, or does not and is not.

Published bug B14: caches were named by a folder, so another delta silently got the old ones.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from preprocess import identity
from preprocess.errors import ConfigError, DataError
from preprocess.store import TokenStore, write_array
from tests.support.runs import words
from tests.support.stores import write
from train import config as options
from train import engine as ds

SMALL = {"max_seq_length": 16, "train_batch_size": 8, "learning_rate": 1e-3}
# Where a result lies, and what is done about one that is there.
PLACES = {"output_dir", "output", "name", "resume", "overwrite", "dry_run", "local_rank",
          "log_level", "license", "fit_positions"}  # the last says what becomes of another one


@dataclass
class Case:
    """A command: what it is typed with, and what typing it otherwise comes to.

    decides: option -> flags to change, and the end of the sentence that refuses them.
    free: options that may be changed: not one of them changes the result.
    places: further options that say where, as `PLACES`.
    """

    script: str
    config: Any
    flags: dict[str, Any]
    finished: str
    decides: dict[str, tuple[dict[str, Any], str]]
    free: dict[str, Any]
    places: set[str] = field(default_factory=set)

    def run(self, run_here, **changes: Any) -> None:
        typed = words({**self.flags, **changes})
        if self.config is None:  # argparse's own way
            typed = [word.replace("--no_", "--no-") for word in typed]
        run_here(self.script, *typed)


def training(other_json: str) -> dict[str, tuple[dict[str, Any], str]]:
    """Options of every training command, after `SMALL`."""
    return {
        "deepspeed_config": ({"deepspeed_config": other_json},
                             r"\(optimizer.betas\) 0.9 0.999, and this run has 0.5 0.6"),
        "learning_rate": ({"learning_rate": 1e-5}, "--learning_rate 0.001, .* has 1e-05"),
        "weight_decay": ({"weight_decay": 0.3}, "--weight_decay 0.01, .* has 0.3"),
        "warmup_ratio": ({"warmup_ratio": 1.0}, r"--warmup_ratio \(steps\) 2, .* has [34]"),
        **{name: ({"lr_scheduler_type": "wsd", "decay_ratio": 0.5},
                  r"--lr_scheduler_type \(class\) WarmupDecayLR, .* has WarmupStableDecayLR")
           for name in ("lr_scheduler_type", "decay_ratio")},
        "max_grad_norm": ({"max_grad_norm": 0.5}, "--max_grad_norm 1.0, .* has 0.5"),
        "train_batch_size": ({"train_batch_size": 4}, "8, .* has"),
        "per_device_train_batch_size": (
            {"train_batch_size": None, "per_device_train_batch_size": 4}, "8, .* has"),
        "gradient_accumulation_steps": (
            {"train_batch_size": None, "gradient_accumulation_steps": 4}, "8, .* has"),
        "max_seq_length": ({"max_seq_length": 12}, "--(max_seq_length 16, .* has 12|task .*)"),
    }


FREE = {"precision": "config", "allow_world_size_change": True, "logging_steps": 3,
        "save_steps": 2, "save_total_limit": 3,
        "gradient_checkpointing": True, "trust_remote_code": True, "report_to": "none"}
# Of the commands that read labels; they are typed with a budget of 30.
BUDGET = {"label_budget": ({"label_budget": 28}, "--label_budget 30, .* has 28"),
          "label_seed": ({"label_seed": 7}, "--label_seed 42, .* has 7")}
OF_MR = {"test_fraction"}  # tests/train/test_finetune.py
WEIGHTS = r"--model_name_or_path \(weights\) [0-9a-f]{16}, and this run has "


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("identity")


@pytest.fixture(scope="module")
def other_json(folder) -> str:
    """The CPU's JSON with other betas."""
    config = json.loads((ds.DS_CONFIGS / "cpu.json").read_text())
    config["optimizer"]["params"]["betas"] = [0.5, 0.6]
    (folder / "betas.json").write_text(json.dumps(config))
    return str(folder / "betas.json")


@pytest.fixture(scope="module")
def other_encoder(folder, still_encoder) -> str:
    """The same network with other weights."""
    from transformers import BertForPreTraining

    shutil.copytree(still_encoder, folder / "other")
    model = BertForPreTraining.from_pretrained(still_encoder)
    model.cls.predictions.bias.data += 1
    model.save_pretrained(folder / "other")
    return str(folder / "other")


@pytest.fixture(scope="module")
def store(folder, reviews_store, still_encoder, reviews_file, run_here) -> str:
    """A store with two mask indices, and a smaller one beside it."""
    for path in Path(reviews_store).parent.iterdir():
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, folder / path.name)
    prefix = str(folder / Path(reviews_store).name)
    for name, seed in (("random", 1), ("another", 2)):
        run_here("preprocess/build_masks.py", "--tokens", prefix, "--strategy", "random",
                 "--seed", seed, "--name", name)
    run_here("preprocess/tokenize_corpus.py", "--input", reviews_file, "--tokenizer",
             still_encoder, "--output", folder / "small", "--max_documents", 100)
    return prefix


@pytest.fixture(scope="module")
def task(folder, labelled_files) -> tuple[dict[str, Any], dict[str, tuple[dict[str, Any], str]]]:
    """Flags of a labelled task, and other ones."""
    with open(labelled_files["train"], newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row.update(other="A film.", turned={"pos": "neg", "neg": "pos"}[row["label"]])
    with open(folder / "train.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for name, count in (("train", 50), ("dev", 8)):
        lines = [f"{row['text']}\t{i % 2}" for i, row in enumerate(rows[:count])]
        (folder / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    train, test = str(folder / "train.csv"), labelled_files["test"]
    flags = {"task": "custom", "train_file": train, "validation_file": train, "test_file": train}
    public = {"task": "sst2", "data_dir": str(folder)}
    return flags, {
        **{name: (public, r"--(max_train_samples|task)") for name in ("task", "data_dir")},
        "train_file": ({"train_file": test}, "--(max_train_samples|task)"),
        "validation_file": ({"validation_file": test}, r"--task \(content\)"),
        "test_file": ({"test_file": test}, r"--task \(test items\)"),
        "text_column": ({"text_column": "other"}, "--task"),
        "label_column": ({"label_column": "turned"}, r"--task \(content\)"),
        "pair_column": ({"pair_column": "other"}, "--(language|task)"),
    }


@pytest.fixture(scope="module")
def pretrain(folder, store, still_encoder, other_encoder, other_json) -> Case:
    flags = {**SMALL, "tokens": store, "model_name_or_path": still_encoder, "max_steps": 4,
             "eval_fraction": 0.2, "save_steps": 4, "output_dir": folder / "pretrain"}
    decides = {
        **training(other_json),
        "tokens": ({"tokens": folder / "small"}, r"--tokens \(fingerprint\)"),
        "model_name_or_path": ({"model_name_or_path": other_encoder}, WEIGHTS),
        "from_scratch": ({"from_scratch": True}, WEIGHTS + "fresh"),
        "model_config": ({"model_name_or_path": None, "model_config": "bert-tiny"},
                         "--model_config [0-9a-f]{16}, .* has bert-tiny"),
        "seed": ({"seed": 7}, "--seed 42, .* has 7"),
        "masking": ({"masking": "whole_word"}, "--masking .* random, .* has whole_word"),
        "mask_index": ({"mask_index": "random"}, r"--mask_index \(content\) none, .* has "),
        "mlm_probability": ({"mlm_probability": "0.30:0.15"},
                            "--mlm_probability 0.15, .* has 0.3:0.15"),
        "corruption": ({"corruption": "100,0,0"}, "--corruption 0.8 0.1 0.1, .* has 1.0 0.0 0.0"),
        "max_steps": ({"max_steps": 5}, "--max_steps 4, .* has 5"),
        "head_only_steps": ({"head_only_steps": 1}, "--head_only_steps 0, .* has 1"),
        "head_learning_rate": ({"head_learning_rate": 0.1}, "--head_learning_rate none, .* 0.1"),
        "eval_fraction": ({"eval_fraction": 0.3}, "--eval_fraction 0.2, .* has 0.3"),
        "eval_max_rows": ({"eval_max_rows": 8}, "--eval_max_rows 512, .* has 8"),
        "eval_mask_index": ({"eval_mask_index": ["random"]}, "--eval_mask_index none, .* has "),
        "export_steps": ({"export_steps": [2, 3]}, "--export_steps none, .* has 2 3"),
    }
    free = {**FREE, "eval_steps": 2, "extend": True, "last_layer_subset": False,
            "head_implementation": "reference", "torch_compile": True}
    return Case("train/pretrain.py", options.PretrainConfig, flags, "finished already", decides,
                free, {"push_to_hub", "hub_private"})


@pytest.fixture(scope="module")
def finetune(folder, task, still_encoder, other_encoder, other_json) -> Case:
    flags = {**SMALL, **task[0], "model_name_or_path": still_encoder, "num_train_epochs": 1,
             "label_budget": 30, "max_train_samples": 24, "max_eval_samples": 20, "save_steps": 1,
             "output_dir": folder / "finetune"}
    decides = {
        **training(other_json), **task[1],
        "model_name_or_path": ({"model_name_or_path": other_encoder}, WEIGHTS),
        "num_train_epochs": ({"num_train_epochs": 2}, "--num_train_epochs 1, .* has 2"),
        "max_train_samples": ({"max_train_samples": 20}, r"--max_train_samples .* 24, .* has 20"),
        "max_eval_samples": ({"max_eval_samples": 10}, "--max_eval_samples 20, .* has 10"),
        "epoch": ({"epoch": "best"}, "--epoch last, .* has best"),
        **{name: ({"epoch": "best", name: value}, "--epoch last, .* has best")
           for name, value in (("metric", "loss"), ("early_stopping", 2))},
        "class_weights": ({"class_weights": "balanced"}, "--class_weights none, .* has balanced"),
        **BUDGET,
    }
    # A seed is a run of its own: others may be added to those that are there.
    free = {**FREE, "seed": 7, "per_device_eval_batch_size": 5, "task_name": "reviews"}
    return Case("train/finetune.py", options.FinetuneConfig, flags, "seed 13: finished already",
                decides, free, {"seeds", "also", "push_to_hub", "hub_private", *OF_MR})


@pytest.fixture(scope="module")
def fit_scorer(folder, still_encoder, other_encoder, other_json, tiny_tokenizer) -> Case:
    generator = np.random.default_rng(0)
    for name, important in (("annotated", 3), ("otherwise", 4)):
        write(folder / name, generator.integers(5, 40, (24, 1, 6)).tolist(),
              tokenizer=tiny_tokenizer)
        (shard,) = TokenStore.open(folder / name).shards
        marks = (np.arange(shard.num_tokens) % important == 0).astype(np.uint8)
        write_array(shard, "", "importance", marks, {})
    flags = {**SMALL, "annotations": folder / "annotated", "model_name_or_path": still_encoder,
             "num_train_epochs": 1, "save_steps": 1, "output_dir": folder / "scorer"}
    decides = {
        **training(other_json),
        "annotations": ({"annotations": folder / "otherwise"}, r"--annotations \(content\)"),
        "model_name_or_path": ({"model_name_or_path": other_encoder}, WEIGHTS),
        "seed": ({"seed": 7}, "--seed 42, .* has 7"),
        "num_train_epochs": ({"num_train_epochs": 2}, "--num_train_epochs 1, .* has 2"),
        "positive_weight": ({"positive_weight": 2.0}, "--positive_weight 3.0, .* has 2.0"),
        "dev_fraction": ({"dev_fraction": 0.3}, "--dev_fraction 0.1, .* has 0.3"),
    }
    return Case("train/fit_scorer.py", options.FitScorerConfig, flags, "finished already", decides,
                {**FREE, "per_device_eval_batch_size": 5})


def write_untrained(folder: Path, encoder: str, kind: str, seed: int) -> str:
    """A classifier or scorer with a drawn top."""
    from train import model

    torch.manual_seed(seed)
    top = (model.load_classifier(encoder, ("neg", "pos"), seed) if kind == "classifier"
           else model.load_scorer(encoder, seed))
    path = folder / f"{kind}{seed}"
    top.save_pretrained(path)
    model.load_tokenizer(encoder).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def annotate(folder, task, still_encoder) -> Case:
    first, second = (write_untrained(folder, still_encoder, "classifier", n) for n in (1, 2))
    flags = {**task[0], "model_name_or_path": first, "max_seq_length": 16,
             "label_budget": 30, "max_train_samples": 12, "output": folder / "A"}
    reads = {name: change for name, change in task[1].items()
             if name not in ("validation_file", "test_file")}  # it reads the training split alone
    del reads["task"], reads["data_dir"]  # that task has other labels than the classifier
    decides = {
        **reads,
        "model_name_or_path": ({"model_name_or_path": second}, WEIGHTS),
        "delta": ({"delta": 0.2}, "--delta 0.01, .* has 0.2"),
        "criterion": ({"criterion": "strict"}, "--criterion signed, .* has strict"),
        **{name: ({name: True}, f"--{name} False, .* has True")
           for name in ("drop_stop_words", "keep_punctuation", "keep_last")},
        "measure": ({"measure": "gradient"}, "--measure buffer, .* has gradient"),
        "share": ({"measure": "gradient", "share": 0.3}, "--measure buffer, .* has gradient"),
        "parity": ({"parity": True}, "--(criterion|drop_stop_words) .*, .* has "),
        "language": ({"language": "de"}, "--language en, .* has de"),
        "max_seq_length": ({"max_seq_length": 12}, "--max_seq_length 16, .* has 12"),
        "max_train_samples": ({"max_train_samples": 8}, r"--max_train_samples .* 12, .* has 8"),
        **BUDGET,
    }
    free = {"batch_tokens": 64, "logging_steps": 3, "trust_remote_code": True, "dtype": "fp16",
            "validation_file": task[0]["train_file"], "test_file": task[0]["train_file"],
            "task_name": "reviews"}
    return Case("train/annotate.py", options.AnnotateConfig, flags, "finished already", decides,
                free, {"task", "data_dir", *OF_MR})


@pytest.fixture(scope="module")
def score_tokens(folder, store, still_encoder) -> Case:
    first, second = (write_untrained(folder, still_encoder, "scorer", n) for n in (1, 2))
    classifier = write_untrained(folder, still_encoder, "classifier", 3)
    flags = {"tokens": store, "model_name_or_path": first, "name": "s", "max_seq_length": 16,
             "dtype": "fp32"}
    decides = {
        "model_name_or_path": ({"model_name_or_path": second}, WEIGHTS),
        "max_seq_length": ({"max_seq_length": 12}, "--max_seq_length 16, .* has 12"),
        "dtype": ({"dtype": "fp16"}, "--dtype fp32, .* has fp16"),
        "measure": ({"measure": "gradient", "model_name_or_path": classifier},
                    "--measure scorer, .* has gradient"),
    }
    free = {"batch_tokens": 64, "logging_steps": 3, "trust_remote_code": True, "shard_index": 0,
            "num_shards": 1}
    # The options of one measure are in its own tests.
    return Case("train/score_tokens.py", options.ScoreConfig, flags,
                "1 of 1 shards are scored already", decides, free,
                {"tokens", "reference", "num_passes", "whole_words"})


@pytest.fixture(scope="module")
def build_masks(score_tokens, store, run_here) -> Case:
    score_tokens.run(run_here, name="first")
    score_tokens.run(run_here, name="second", max_seq_length=8)
    flags = {"tokens": store, "strategy": "selective", "scores": "first", "name": "m"}
    control = {"strategy": "random_matched", "scores": None}
    run_here("preprocess/build_masks.py", *words({**flags, **control, "match": "random",
                                                  "name": "control"}))
    band, sampled = {"strategy": "band"}, {"strategy": "sampled"}
    for one in (band, sampled):
        run_here("preprocess/build_masks.py", *words({**flags, **one, "name": one["strategy"]}))
    decides = {
        "strategy": ({"strategy": "selective_fill"}, "--strategy selective, .* has selective_fill"),
        "scores": ({"scores": "second"}, r"--scores \(content\) [0-9a-f]{16}, .* has "),
        "match": ({**control, "match": "another", "name": "control"},
                  r"--match \(content\) [0-9a-f]{16}, .* has "),
        "mlm_probability": ({"mlm_probability": 0.3}, "--mlm_probability 0.15, .* has 0.3"),
        "units": ({"units": "words"}, "--units none, .* has words"),
        "centre": ({**band, "centre": 0.9, "name": "band"}, "--centre 0.5, .* has 0.9"),
        "temperature": ({**sampled, "temperature": 2, "name": "sampled"},
                        "--temperature 1.0, .* has 2.0"),
        "epochs": ({"epochs": 2}, "--epochs 1, .* has 2"),
        "seed": ({"seed": 7}, "--seed 42, .* has 7"),
    }
    return Case("preprocess/build_masks.py", None, flags, "complete, made with the same", decides,
                {"shard_index": 0, "num_shards": 1}, {"tokens"})


@pytest.fixture(scope="module")
def tokenize_corpus(folder, reviews_file, still_encoder, task) -> Case:
    shutil.copy(reviews_file, folder / "text.txt")
    (folder / "more.txt").write_text("good film .\n")
    otherwise = folder / "tokenizer"
    shutil.copytree(still_encoder, otherwise)
    tokenizer = json.loads((otherwise / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["good"], vocabulary["bad"] = vocabulary["bad"], vocabulary["good"]
    (otherwise / "tokenizer.json").write_text(json.dumps(tokenizer))
    flags = {"input": folder / "text.txt", "tokenizer": still_encoder, "output": folder / "T"}
    decides = {
        "input": ({"input": [folder / "text.txt", folder / "more.txt"]}, "input was .*is "),
        "tokenizer": ({"tokenizer": otherwise}, "the tokenizer was "),
        **{name: ({name: value}, rf"{name} was .*is .*{value}") for name, value in (
            ("text_column", "other"), ("split", "test"), ("language", "de"),
            ("max_documents", 9), ("num_shards", 2))},
        "where": ({"where": "a=b"}, "where was {}, is {'a': 'b'}"),
        **{name: ({name: value}, f"{name} was {not value}, is {value}") for name, value in (
            ("split_sentences", False), ("blank_line_documents", True),
            ("unescape_newlines", True), ("strip_html", True))},
    }
    return Case("preprocess/tokenize_corpus.py", None, flags, "complete already, skipped", decides,
                {"num_workers": 1}, {"adopt", "verify", "shard_index"})


COMMANDS = ("tokenize_corpus", "pretrain", "finetune", "fit_scorer", "annotate", "score_tokens",
            "build_masks")


@pytest.fixture(scope="module")
def finished(request, run_here):
    """Run a command once to its end; return its case."""
    done: dict[str, Case] = {}

    def finish(command: str) -> Case:
        if command not in done:
            done[command] = request.getfixturevalue(command)
            done[command].run(run_here)
        return done[command]

    with pytest.MonkeyPatch.context() as patch:
        # Checkpoints stay, so that an unfinished run can be made of a finished one.
        for owner in ("finetune", "fit_scorer"):
            patch.setattr(f"train.{owner}.remove_resume_state", lambda run_dir: None)
        yield finish


def options_of(case: Case, monkeypatch) -> set[str]:
    """Names of all options of a command."""
    if case.config:
        return {entry.name for entry in dataclasses.fields(case.config)}
    names: set[str] = set()

    def note(self, *words, **options):
        names.update(action.dest for action in self._actions)
        raise InterruptedError

    module = importlib.import_module(case.script.removesuffix(".py").replace("/", "."))
    monkeypatch.setattr(module.Parser, "parse_args", note)
    with pytest.raises(InterruptedError):
        module.main([])
    return names - {"help"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_decides_the_result_or_not(command, request, monkeypatch):
    """A new option must be sorted into one or the other."""
    case = request.getfixturevalue(command)
    sorted_so_far = [*case.decides, *case.free, *case.places]
    assert sorted(sorted_so_far) == sorted(options_of(case, monkeypatch) - PLACES)


def tree(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_does_not_change_the_result_is_finished_already(
    command, finished, run_here, folder, capsys
):
    case = finished(command)
    before = {path: path.read_text() for path in folder.rglob("metrics.jsonl")}
    capsys.readouterr()
    for changes in ({}, case.free):
        case.run(run_here, **changes)
        assert case.finished in capsys.readouterr().out
    assert all(path.read_text() == text for path, text in before.items())


@pytest.mark.parametrize("command", COMMANDS)
def test_what_changes_the_result_is_refused(command, finished, run_here, folder):
    case = finished(command)
    before = tree(folder)
    for option, (changes, sentence) in case.decides.items():
        with pytest.raises(ConfigError, match=f"made with .*{sentence}.*; give another") as refused:
            case.run(run_here, **changes)
        assert "\n" not in str(refused.value), option
    after = tree(folder)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert not {name for name in changed if ".rows-" not in name and ".memo" not in name}


@pytest.mark.parametrize("command", ["pretrain", "finetune", "fit_scorer"])
def test_an_unfinished_run_does_not_go_on_as_another(command, finished, run_here, tmp_path):
    case = finished(command)
    run_dir = tmp_path / "run"
    shutil.copytree(case.flags["output_dir"], run_dir)
    for path in ("hf", "results.jsonl", "results.json"):
        shutil.rmtree(run_dir / path, ignore_errors=True)
        (run_dir / path).unlink(missing_ok=True)
    before = tree(run_dir)
    for changes, sentence in case.decides.values():
        with pytest.raises(ConfigError, match=f"stopped at step .*made with .*{sentence}"):
            case.run(run_here, output_dir=run_dir, **changes)
    assert tree(run_dir) == before


def test_a_store_that_was_stopped_does_not_go_on_as_another(finished, run_here, tmp_path):
    case = finished("tokenize_corpus")
    here = {"output": tmp_path / "T", "num_shards": 2}
    case.run(run_here, **here, shard_index=0)  # as if stopped before the second
    before = tree(tmp_path)
    for option, (changes, sentence) in case.decides.items():
        if option == "num_shards":
            continue  # other shards have other names
        with pytest.raises(ConfigError, match=f"made with .*{sentence}.*; give another"):
            case.run(run_here, **{**here, **changes})
    assert tree(tmp_path) == before


def test_shards_of_one_mask_index_are_made_alike(finished, run_here, tmp_path):
    from train.data import prebuilt_masking

    case = finished("tokenize_corpus")
    prefix = str(tmp_path / "T")
    case.run(run_here, output=prefix, num_shards=2)
    for index, seed in enumerate((1, 2)):
        run_here("preprocess/build_masks.py", "--tokens", prefix, "--strategy", "random", "--name",
                 "m", "--num_shards", 2, "--shard_index", index, "--seed", seed, "--overwrite")
    with pytest.raises(DataError, match="index m was made with different options.*--overwrite"):
        prebuilt_masking(TokenStore.open(prefix), "m")


def test_other_numerics_are_reported(capsys):
    from train.run_dir.identity import report_changes

    old = {"micro_batch": 8, "zero": 1, "versions": {"torch": "2.11"}}
    report_changes(old, old)
    assert capsys.readouterr().out == ""
    report_changes(old, {**old, "micro_batch": 4, "zero": 2})
    assert "numerics than before: micro_batch 8, now 4; zero 1, now 2\n" in capsys.readouterr().out


def test_a_record_of_an_older_version_is_refused_with_the_key():
    new = identity.build("pretrain", choice={"seed": 1}, options={"order": 2})
    old = json.loads(json.dumps(new))
    identity.compare(old, new, "--output_dir a", "give another --output_dir")
    for section, key in (("choice", "seed"), ("options", "order")):
        damaged = {**old, section: {k: v for k, v in old[section].items() if k != key}}
        with pytest.raises(ConfigError, match=f"no {section}.{key}, so an older version made it"):
            identity.compare(damaged, new, "--output_dir a", "give another --output_dir")
    with pytest.raises(ConfigError, match="no version"):
        identity.compare({"store": "x", "seed": 1}, new, "a", "b")


def test_the_digest_is_that_of_compact_json():
    import hashlib

    record = identity.build("pretrain", choice={"corruption": (0.8, 0.1, 0.1)})
    assert record["choice"]["corruption"] == [0.8, 0.1, 0.1] and record["inputs"]["store"] is None
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    assert identity.digest(record) == hashlib.sha256(text.encode()).hexdigest()
    assert identity.sealed(record)["identity_digest"] == identity.digest(record)


def test_a_model_that_was_changed_is_not_started_from(finished, run_here, tmp_path):
    """And a finished run with such weights exports them again from its checkpoint."""
    case = finished("pretrain")
    run_dir = tmp_path / "run"
    shutil.copytree(case.flags["output_dir"], run_dir)
    weights = run_dir / "hf" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"\1")
    with pytest.raises(DataError, match="delete lineage.json if you changed the model yourself"):
        case.run(run_here, model_name_or_path=run_dir / "hf", output_dir=tmp_path / "next")
    case.run(run_here, output_dir=run_dir)
    assert weights.read_bytes() == content
    weights.write_bytes(content[:-1] + b"\1")
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(DataError, match="written for other weights"):
        case.run(run_here, output_dir=run_dir)


def test_weights_of_the_hub_are_named_by_their_content(still_encoder, monkeypatch):
    from transformers.utils import hub

    from train.run_dir import hf_folder

    def cached_file(name: str, file: str, **options: Any) -> str | None:
        assert name == "somebody/tiny"
        return f"{still_encoder}/{file}" if file == "model.safetensors" else None

    monkeypatch.setattr(hub, "cached_file", cached_file)
    found = hf_folder.open_weights("somebody/tiny")
    assert found == hf_folder.open_weights(still_encoder) and found.stages == []
    monkeypatch.setattr(hub, "cached_file", lambda *words, **options: None)
    with pytest.raises(DataError, match="somebody/tiny: the hub has no weights"):
        hf_folder.open_weights("somebody/tiny")
