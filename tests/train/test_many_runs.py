"""Several fine-tuning runs in one process (`--also`): each is what it would be alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from preprocess.errors import ConfigError, DataError, StopRequested, run_command
from tests.support.runs import words
from train import finetune
from train.config import FinetuneConfig, parse
from train.stages import finetuning


@pytest.fixture(scope="module")
def flags(labelled_files, still_encoder) -> dict[str, object]:
    return {"task": "custom", "train_file": labelled_files["train"],
            "test_file": labelled_files["test"], "model_name_or_path": still_encoder,
            "max_seq_length": 32, "num_train_epochs": 2, "train_batch_size": 8,
            "learning_rate": 1e-2, "seeds": "13,43", "label_budget": 12}


@pytest.fixture(scope="module")
def other_encoder(tmp_path_factory, still_encoder) -> str:
    """The same tokenizer and network with other weights."""
    from transformers import BertForPreTraining

    folder = tmp_path_factory.mktemp("encoder") / "other"
    shutil.copytree(still_encoder, folder)
    model = BertForPreTraining.from_pretrained(still_encoder)
    model.bert.embeddings.word_embeddings.weight.data *= 2
    model.save_pretrained(folder)
    return str(folder)


def further(folder: Path, other_encoder: str) -> dict[str, dict[str, object]]:
    """Runs by name: what each of them has of its own."""
    return {
        "few": {},
        "seven": {"label_seed": 7},
        "more": {"label_budget": 20},
        "other": {"model_name_or_path": other_encoder},
        "whole": {"model_name_or_path": other_encoder, "label_budget": "all"},
    }


def also(runs: dict[str, dict[str, object]], folder: Path) -> list[str]:
    """Words for all runs but the first."""
    _, *others = runs.items()
    return ["--also", *(
        " ".join(f"{key}={value}" for key, value in {**one, "output_dir": folder / name}.items())
        for name, one in others)]


def results(run_dir: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run_dir / "results.jsonl").read_text().splitlines()]
    return [{**row, "seconds": 0} for row in rows]


def test_each_run_is_to_the_bit_what_it_is_alone(
    flags, other_encoder, tmp_path, run_here, monkeypatch
):
    runs = further(tmp_path, other_encoder)
    read = []
    for name in ("load_task", "encode"):
        plain = getattr(finetuning, name)
        monkeypatch.setattr(finetuning, name, lambda *words, name=name, plain=plain, **more: (
            read.append(name), plain(*words, **more))[1])
    together = tmp_path / "together"
    run_here("train/finetune.py", *words({**flags, "output_dir": together / "few"}),
             *also(runs, together))
    # Validation, test, and the training examples of 12, 12 of another seed, 20 and all labels.
    assert sorted(read) == ["encode"] * 6 + ["load_task"]
    for name, own in runs.items():
        run_here("train/finetune.py", *words({
            **flags, **own, "output_dir": tmp_path / "alone" / name}))
        one, other = together / name, tmp_path / "alone" / name
        assert results(one) == results(other)
        for seed in (13, 43):
            for file in ("hf/model.safetensors", "hf/config.json", "hf/tokenizer.json",
                         "predictions.jsonl"):
                path = f"seed_{seed}/{file}"
                assert (one / path).read_bytes() == (other / path).read_bytes(), (name, path)
        options = [yaml.safe_load((run / "config.resolved.yaml").read_text())
                   for run in (one, other)]
        assert {**options[0], "output_dir": ""} == {**options[1], "output_dir": ""}
    models = {(together / name / "seed_13/hf/model.safetensors").read_bytes() for name in runs}
    assert len(models) == len(runs), "the runs differ"


def test_typed_again_after_a_kill_it_goes_on_with_what_is_missing(
    flags, other_encoder, tmp_path, run_here, monkeypatch, capsys
):
    runs = further(tmp_path, other_encoder)
    typed = [*words({**flags, "output_dir": tmp_path / "few"}), *also(runs, tmp_path)]
    with pytest.raises(DataError, match="no finished seed and no complete checkpoint"):
        run_here("train/finetune.py", *typed, "--resume", "must")
    plain, begun = finetune.run_seed, []

    def until_the_fourth(inputs, seed, device):
        begun.append((Path(inputs.config.output_dir).name, seed))
        if len(begun) == 4:
            raise StopRequested("as if killed")
        return plain(inputs, seed, device)

    monkeypatch.setattr(finetune, "run_seed", until_the_fourth)
    with pytest.raises(StopRequested):
        run_here("train/finetune.py", *typed)
    assert begun == [("few", 13), ("few", 43), ("seven", 13), ("seven", 43)]
    assert not (tmp_path / "more").exists()
    run_here("train/finetune.py", *typed, "--resume", "must")
    assert begun[4:] == [("seven", 43), *((name, seed) for name in ("more", "other", "whole")
                                          for seed in (13, 43))]
    assert all([row["seed"] for row in results(tmp_path / name)] == [13, 43] for name in runs)
    # One of the folders is that of another run: nothing at all is trained.
    begun.clear()
    shutil.rmtree(tmp_path / "few")
    for flags_more in (["--dry_run"], []):
        with pytest.raises(ConfigError, match=f"{tmp_path / 'more'}, seed 13: made with "
                                              "--label_budget 20, and this run has 21"):
            run_here("train/finetune.py", *(word.replace("=20", "=21") for word in typed),
                     *flags_more)
    assert not begun and not (tmp_path / "few").exists()


def test_a_dry_run_shows_every_run(flags, other_encoder, tmp_path, run_here, capsys):
    runs = further(tmp_path, other_encoder)
    run_here("train/finetune.py", *words({**flags, "output_dir": tmp_path / "few"}),
             *also(runs, tmp_path), "--dry_run")
    told = capsys.readouterr().out
    for number, (name, train) in enumerate(zip(runs, (12, 12, 20, 12, 54), strict=True), 1):
        start = told.index(f"run {number} of 5: {tmp_path / name}, from ")
        assert f"; {train} train, " in told[start:].splitlines()[1]
    assert not any((tmp_path / name).exists() for name in runs)


@pytest.mark.parametrize(("value", "message"), [
    ("seeds=1 output_dir=b", "'seeds' is none of model_name_or_path, output_dir, label_budget, l"),
    ("output_dir", "'output_dir' has no ="),
    ("output_dir=b output_dir=c", "'output_dir' is there twice"),
    ("output_dir='b", "No closing quotation"),
    ("label_budget=20", "output_dir a is that of two runs; give each a folder of its own"),
    ("output_dir=./x/../a", "output_dir ./x/../a is that of two runs"),
    ("output_dir=b label_budget=few", "label_budget 'few' is no whole number"),
    ("output_dir=b label_budget=1", "--label_budget 1: must be 2 or more"),
    ("output_dir=b label_seed=all", "label_seed 'all' is no whole number"),
    ("output_dir=b label_budget=all label_seed=3", "--label_seed 3 chooses the examples of"),
    ("output_dir=b model_name_or_path=", "--model_name_or_path is missing"),
])
def test_a_run_that_is_none_is_refused_in_one_sentence(flags, value, message, capsys):
    typed = words({**flags, "output_dir": "a", "also": [value]})
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: finetune.main(typed))
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and message in error and "\n" not in error


def test_a_run_without_a_budget_has_no_seed_of_one(flags):
    typed = words({**flags, "output_dir": "a", "label_seed": 7,
                   "also": ["output_dir=b", "output_dir=c label_budget=all"]})
    runs = parse(FinetuneConfig, typed).runs()
    assert [(run.label_budget, run.label_seed) for run in runs] == [(12, 7), (12, 7), (None, None)]
    assert all(run.also == [] for run in runs)


@pytest.mark.slow
def test_two_ranks_take_the_folders_in_turn(flags, other_encoder, tmp_path, run_command_line):
    runs = further(tmp_path, other_encoder)
    typed = [*words({**flags, "output_dir": tmp_path / "few", "num_train_epochs": 1}),
             *also(runs, tmp_path)]
    for again in (False, True):
        done = run_command_line("train/finetune.py", *typed, ranks=2)
        for number, name in enumerate(runs, 1):
            assert f"run {number} of 5: {tmp_path / name}\n" in done.stdout
            assert [row["seed"] for row in results(tmp_path / name)] == [13, 43]
        assert ("seed 43: finished already" in done.stdout) == again
