"""`train/pipeline.py --dry_run`: each step checked in the words of a recipe; estimates."""

from __future__ import annotations

import multiprocessing.util
import re
import shutil
import signal
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from preprocess.errors import ConfigError, DataError
from train import model, pipeline
from train.recipes.checks import Checked, Checker, flags_of, outcome, replaced, without
from train.recipes.estimate import (
    Measurement,
    StepEstimate,
    fit_line,
    network_of,
    size_of_text,
)
from train.recipes.recipe import REPOSITORY, origin_of
from train.recipes.rehearsal import check_memory, total_seconds

RECIPE = str(REPOSITORY / "train" / "recipes" / "custom.yaml")
SHORT = [f"{stage}.max_seq_length=32" for stage in (
    "classifier", "annotate", "scorer", "score", "finetune", "task_guided")]


@pytest.fixture
def dry_run(tmp_path, monkeypatch, tiny_encoder, reviews_file, labelled_files):
    """Dry-run the recipe for one's own data with further settings; nothing is written."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    multiprocessing.util.get_temp_dir()  # of the fork server, which outlives this test
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))

    def run(*settings: str, flags: tuple[str, ...] = ("--no_measure",)) -> None:
        try:
            pipeline.main([
                "--recipe", RECIPE, "--output_dir", str(tmp_path / "R"), "--dry_run", *flags,
                "--set", f"train_file={labelled_files['train']}",
                f"test_file={labelled_files['test']}", f"text={reviews_file}",
                f"encoder={tiny_encoder}", "deepspeed_config=ds_configs/cpu.json",
                "domain_text.num_workers=1", *SHORT, *settings,
            ])
        finally:
            assert not (tmp_path / "R").exists() and not list(scratch.glob("selmask*"))

    return run


def rows_of(out: str) -> dict[str, str]:
    """Return the lines of the table by their steps."""
    lines = out[out.index("\nstep "):].strip().splitlines()
    return {line.split()[0]: line for line in lines[1:]}


def test_every_step_is_checked_as_far_as_its_inputs_allow(dry_run, capsys, tmp_path):
    dry_run("general={max_steps: 2, max_seq_length: 32}", "general_text.input="
            + str(Path(RECIPE)), "general_text.num_workers=1",
            "scores={words: {measure: tfidf}}",
            "arms=[none, random, {name: best, strategy: top, scores: words}]")
    out = capsys.readouterr().out
    rows = rows_of(out)
    for step in ("tokenize-general", "tokenize-domain", "leakage", "score-words", "masks-best"):
        assert "on the first 200 documents" in rows[step], step
    assert "for its model)" not in rows["stage1"] and "DeepSpeed JSON" in rows["stage1"]
    for step in ("task_guided-random-seed42", "task_guided-best-seed42", "finetune-none"):
        assert "for its model)" in rows[step], step
    assert re.search(r"about .* MiB of disk, .* are free\nabout .* of memory for ", out)
    assert "time: not estimated (--no_measure)" in out


@pytest.mark.parametrize(("settings", "message"), [
    (["text_column=stars"], r"step leakage: .*no column 'stars'.*--set text_column, label_"),
    (["label_column=stars"], "no column 'stars'.*--set label_column"),
    (["domain_column=body"], "step tokenize-domain: .*no column 'body'"),
    (["text=absent.txt"], "step tokenize-domain: absent.txt: no such file"),
    (["finetune.max_seq_length=200"], r"step finetune-none: --set finetune.max_seq_length=200: "
     "this model has 64 positions; give at most 64"),
    (["finetune={max_seq_length: 32, train_batch_size: 30, per_device_train_batch_size: 8}"],
     "step finetune-none: batch sizes do not fit"),
    (["label_budgets=[500]"], r"label_budgets: .* training examples; give 2 to \d+"),
])
def test_a_mistake_is_told_in_the_words_of_the_recipe(dry_run, capsys, settings, message):
    with pytest.raises((ConfigError, DataError), match=message) as error:
        dry_run(*settings, "arms=[none, random]")
    assert "\n" not in str(error.value)
    assert ("FAILS: " in capsys.readouterr().out) == ("label_budgets=[500]" not in settings)


def test_batches_must_suit_all_ranks(dry_run):
    with pytest.raises(ConfigError, match="batch sizes do not fit: .* x 3 ranks"):
        dry_run("task_guided.train_batch_size=8", "arms=[random]", flags=("--num_gpus", "3"))


def test_only_a_length_of_the_user_is_refused(dry_run, monkeypatch, tmp_path, capsys):
    """custom.yaml has 256 for stage 2, nobody has typed it, and the encoder has 64 positions."""
    monkeypatch.setitem(globals(), "SHORT", [one for one in SHORT if "task_guided" not in one])
    mine = tmp_path / "mine.yaml"
    monkeypatch.setitem(globals(), "RECIPE", str(mine))
    mine.write_text("extends: custom.yaml\ntask_guided: {max_steps: 2}\n")
    dry_run("arms=[random]")
    out = capsys.readouterr().out
    assert ("max_seq_length: 64, all positions of this model (instead of 256): "
            "task_guided-random-seed42\n") in out
    assert "--max_seq_length 256 --save_steps 1000 --fit_positions" in out
    mine.write_text("extends: custom.yaml\ntask_guided: {max_seq_length: 200}\n")
    with pytest.raises(ConfigError, match="step task_guided-random-seed42: "
                       "task_guided.max_seq_length=200: this model has 64 positions"):
        dry_run("arms=[random]")


def test_a_disk_that_is_too_small_is_refused(dry_run, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(ConfigError, match=r"/R: about .* MiB will be needed, and 0.0 MiB are free "
                       "there; make room.*or add --clean checkpoints"):
        dry_run("arms=[none]")


def test_memory_that_is_too_small_for_all_jobs_is_refused():
    step = SimpleNamespace(name="stage1")
    found = [Checked(step, memory="model: 7 parameters; estimated memory per rank: states "
                     "900000.00 GiB, activations 0.50 GiB, logits 0.00 GiB")]
    options = SimpleNamespace(jobs=2)
    with pytest.raises(ConfigError, match="step stage1: about 900000.5 GiB of memory will be needed"
                       ".*smaller per_device_train_batch_size"):
        check_memory(found, options)
    assert check_memory([Checked(step)], options) == ""


def test_an_encoder_that_is_not_here_leaves_the_rest_checked(dry_run, capsys):
    dry_run("encoder=some/hub-model", "arms=[none, random]")
    rows = rows_of(capsys.readouterr().out)
    assert rows["tokenize-domain"].endswith("files, columns")
    assert "options, task, labels" in rows["finetune-none"]
    with pytest.raises(DataError, match="step tokenize-domain: .*no column 'body'"):
        dry_run("encoder=some/hub-model", "arms=[none, random]", "domain_column=body")


def test_fresh_weights_are_checked_with_a_vocabulary_of_the_sample(dry_run, capsys, reviews_file):
    dry_run("encoder=null", f"vocabulary={{vocab_size: 90, input: [{reviews_file}]}}",
            "general={model_config: bert-tiny, max_steps: 2, max_seq_length: 32}",
            f"general_text.input={reviews_file}", "general_text.num_workers=1",
            "arms=[none, random]")
    rows = rows_of(capsys.readouterr().out)
    for step in ("vocabulary", "tokenize-general", "tokenize-domain", "leakage"):
        assert "on the first 200 documents" in rows[step], step
    assert rows["stage1"].endswith("memory")
    assert rows["task_guided-random-seed42"].endswith("(on fresh weights for its model)")
    assert rows["finetune-none"].endswith("options, task, labels")


def test_measured_steps_give_a_time(dry_run, capsys, monkeypatch):
    monkeypatch.setattr("train.recipes.estimate.MEASURE_SECONDS", 600.0)  # of a busy machine
    dry_run("arms=[none, random]", "task_guided.max_steps=3", flags=("--launcher", "python"))
    out = capsys.readouterr().out
    found = re.search(r"about ([\d.]+) minutes with --jobs 1, from (\d+) measured steps of (\d+) "
                      r"and (\d+) x 32 slots: .*, [\d.]+ s per update", out)
    assert found and 0 < float(found[1]) < 10 and int(found[2]) >= 3
    assert int(found[3]) < int(found[4])
    assert all(re.search(r"\s\d+\s", line) for step, line in rows_of(out).items()
               if step.startswith(("task_guided", "finetune")))


def test_a_measurement_that_fails_is_a_line(dry_run, capsys, monkeypatch):
    """Its time is over before its first step; then what it writes cannot be read."""
    monkeypatch.setattr("train.recipes.estimate.MEASURE_SECONDS", 0.5)
    dry_run("arms=[random]", flags=())
    *_, disk, memory, time = capsys.readouterr().out.splitlines()
    assert time == "time: unknown, since task_guided-random-seed42 has not taken 2 steps in 0 s"
    assert "of disk" in disk and "of memory" in memory

    def broken(*rest: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr("train.recipes.rehearsal.measure", broken)
    dry_run("arms=[random]", flags=())
    assert capsys.readouterr().out.splitlines()[-1] == (
        "time: unknown, since the measurement has failed: no room")


def test_a_command_that_does_not_stop_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("train.recipes.checks.STOP_SECONDS", 0.2)
    deaf = tmp_path / "deaf.py"
    deaf.write_text("import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
                    "print('on', flush=True)\ntime.sleep(60)\n")
    begin = time.monotonic()
    lines, code = outcome([str(deaf)], 1.0)
    assert (lines, code) == (["on"], 128 + signal.SIGKILL) and time.monotonic() - begin < 30
    begin = time.monotonic()
    outcome([str(deaf)], enough=lambda: True)
    assert time.monotonic() - begin < 30


# ------------------------------------------------------------------------------- the estimates


def test_the_parameters_of_the_encoder_are_those_of_its_linear_layers(tiny_encoder):
    network = network_of({"encoder": tiny_encoder})
    module = model.load_masked_lm(tiny_encoder, 0)
    linear = sum(each.in_features * each.out_features
                 for each in module.layers().modules() if isinstance(each, nn.Linear))
    assert network.encoder == linear
    assert network.parameters == pytest.approx(
        sum(each.numel() for each in module.parameters()), rel=0.05)


def test_the_schedule_is_that_of_the_jobs():
    """a 4 s, b 3 s and c 2 s are independent; d, 5 s, needs a; the report, 1 s, comes last."""
    needs = {"a": [], "b": [], "c": [], "d": ["a"], "report": []}
    seconds = {"a": 4.0, "b": 3.0, "c": 2.0, "d": 5.0, "report": 1.0}
    found = [SimpleNamespace(step=SimpleNamespace(
        name=name, needs=needed, records=[] if name == "report" else ["x"]))
        for name, needed in needs.items()]
    estimates = [StepEstimate(0.0, seconds[name]) for name in needs]
    assert total_seconds(found, estimates, 1) == 15
    assert total_seconds(found, estimates, 2) == 10  # a|b then d|c, then the report
    assert total_seconds(found, estimates, 3) == 10


def test_seconds_follow_the_labels_and_the_precision(dry_run, capsys, monkeypatch):
    slow = Measurement(rate=1e3, update=0.0, start=0.0, imports=0.0, steps=3, rows=(8,), slots=32)
    monkeypatch.setattr("train.recipes.rehearsal.measure", lambda *_: slow)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True},
                        raising=False)

    def seconds(*settings: str) -> dict[str, float]:
        dry_run("label_budgets=[10, 40]", "arms=[selective]", *settings,
                flags=("--launcher", "python"))
        return {name: float(line.split()[1].replace(",", ""))
                for name, line in rows_of(capsys.readouterr().out).items() if name != "about"
                and name != "report" and not name.endswith(":")}

    plain, fast = seconds(), seconds("deepspeed_config=ds_configs/zero1_bf16.json")
    for name, factor in (("annotate", 4), ("scorer", 4), ("classifier", 1), ("score", 1)):
        few, many = (plain[f"{name}-labels{budget}-seed42"] for budget in (10, 40))
        assert few < many if name == "classifier" else many == pytest.approx(factor * few, rel=0.01)
    for name, factor in (("annotate", 2), ("scorer", 1), ("score", 1)):  # annotates in fp32
        name += "-labels10-seed42"
        assert fast[name] == pytest.approx(factor * plain[name], rel=0.01)


@pytest.mark.parametrize(("work", "seconds", "expected"), [
    ([2.0, 8.0], [0.5, 1.1], (10.0, 0.3)),
    ([2.0], [0.5], (4.0, 0.0)),
    ([2.0, 8.0], [0.5, 2.5], (3.2, 0.0)),  # a larger batch is slower per row
    ([2.0, 8.0], [0.5, 0.4], (20.0, 0.0)),  # noise
])
def test_what_steps_take_whatever_their_batch(work, seconds, expected):
    assert fit_line(work, seconds) == pytest.approx(expected)


def test_updates_count_where_batches_are_small(dry_run, capsys, monkeypatch):
    """4 epochs of 40 examples in batches of 8 are 20 updates, of 10 seconds each."""
    found = {}
    for update in (0.0, 10.0):
        measured = Measurement(rate=1e9, update=update, start=0.0, imports=0.0, steps=3, rows=(8,),
                               slots=32)
        monkeypatch.setattr("train.recipes.rehearsal.measure", lambda *_, one=measured: one)
        dry_run("arms=[random]", "label_budgets=[40]", "finetune.num_train_epochs=4",
                "finetune.train_batch_size=8", "finetune.seeds=13", "task_guided.max_steps=3",
                flags=("--launcher", "python"))
        found[update] = rows_of(capsys.readouterr().out)
    for name, updates in (("task_guided-random-seed42", 3), ("finetune-random-seed42", 20)):
        plain, more = (float(found[update][name].split()[1]) for update in (0.0, 10.0))
        assert more - plain == pytest.approx(10 * updates, abs=2)


def test_the_size_of_a_text_is_counted(reviews_file):
    content = Path(reviews_file).read_text()
    text = size_of_text({"input": [reviews_file]})
    assert text.documents == len(content.splitlines())
    assert text.size == len(content.replace("\n", ""))
    assert size_of_text({"input": [reviews_file], "max_documents": ["7"]}).documents == 7
    assert size_of_text({"input": ["hub:somebody/reviews"]}) is None


def test_a_long_text_is_not_read_to_its_end(tmp_path, monkeypatch):
    path = tmp_path / "long.txt"
    path.write_text("a line of text here\n" * 200_000)
    monkeypatch.setattr("train.recipes.estimate.LOOK_SECONDS", 0.0)
    text = size_of_text({"input": [str(path)]})
    assert text.documents == pytest.approx(200_000, rel=0.02)
    assert text.size == pytest.approx(19 * 200_000, rel=0.02)


def test_a_study_is_checked_in_a_folder_with_a_blank(dry_run, capsys, tmp_path):
    dry_run("label_budgets=[10, 20]", "task_guided={max_steps: 2, export_steps: [1]}",
            "arms=[random]", "task_guided.max_seq_length=32",
            flags=("--no_measure", "--output_dir", str(tmp_path / "a b")))
    rows = rows_of(capsys.readouterr().out)
    assert "for its model)" in rows["finetune-random-seed42"]


def test_no_encoder_stands_in_where_there_is_none(tmp_path):
    """Weights are fresh, and of two models of a fine-tuning step one has been made."""
    journal = SimpleNamespace(root=tmp_path, is_finished=lambda step: False)
    checker = Checker({"encoder": None, "general": {"model_config": "bert-tiny"}}, None, [],
                      journal, tmp_path / "scratch")
    (tmp_path / "one").mkdir()

    def step(made: str) -> SimpleNamespace:
        return SimpleNamespace(needs=[], command=[
            "train/finetune.py", "--model_name_or_path", f"{tmp_path}/one",
            "--also", f"model_name_or_path={tmp_path}/{made} output_dir=R"])

    assert checker.stand_ins(step("one")) == step("one").command[1:]
    assert checker.stand_ins(step("two")) == []


def test_words_of_a_command_can_be_changed():
    words = ["--a", "1", "2", "--b", "--c", "x y"]
    assert flags_of(words) == {"a": ["1", "2"], "b": [], "c": ["x y"]}
    assert without(words, "a") == ["--b", "--c", "x y"]
    assert replaced(words, "c", "z") == ["--a", "1", "2", "--b", "--c", "z"]


def test_a_setting_is_traced_to_its_variable():
    assert origin_of(RECIPE, "task.text_column") == "text_column"
    assert origin_of(RECIPE, "domain_text.text_column") == "domain_column"
    assert origin_of(RECIPE, "task_guided.max_seq_length") == "task_guided.max_seq_length"
    assert origin_of(RECIPE, "general.max_steps") == "general.max_steps"
