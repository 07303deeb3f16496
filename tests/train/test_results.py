"""Means, differences and the naive Bayes floor, as a reader sees them."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from preprocess.errors import DataError
from preprocess.identity import digest
from tests.support.runs import made_up_stage, write_lineage
from train.reports import compare, results
from train.stages import floors


def write_run(
    path: Path, correct: np.ndarray, *, seeds=None, items=None, cost: dict | None = None,
    task: str = "mr", weights: str = "", stages: list[dict] | None = None,
) -> Path:
    """A fine-tuning directory whose answers are right where `correct` (S, N) says so."""
    seeds = seeds or list(range(13, 13 + len(correct)))
    items = items or [f"item{n}" for n in range(correct.shape[1])]
    path.mkdir(parents=True)
    with open(path / "results.jsonl", "w") as file:
        for seed, right in zip(seeds, correct, strict=True):
            row = {"seed": seed, "task": task, "test_accuracy": float(right.mean()),
                   "test_macro_f1": 0.5, "pretraining": cost or {},
                   "identity": {"inputs": {"weights": weights}}}
            file.write(json.dumps(row) + "\n")
            write_lineage(path / f"seed_{seed}" / "hf", *(stages or []),
                          made_up_stage("finetune", seed=seed))
            with open(path / f"seed_{seed}" / "predictions.jsonl", "w") as predictions:
                for item, ok in zip(items, right, strict=True):
                    answer = {"item": item, "label": 1, "prediction": int(ok)}
                    predictions.write(json.dumps(answer) + "\n")
    return path


def made_up_arm(folder: Path, name: str, *answers: np.ndarray, **options) -> results.Arm:
    """An arm with a run for each of `answers`; see `write_run`."""
    return results.Arm(name, [
        results.read_finetune_run(write_run(folder / f"{name}{number}", correct, **options))
        for number, correct in enumerate(answers)])


def difference_rows(pairs) -> tuple[list[dict], list[str]]:
    """The rows of the table of differences, and the notes on them."""
    comparisons, notes = compare.compare(pairs)
    return compare.difference_rows(comparisons), notes


def test_mean_and_sd():
    assert compare.mean_and_sd([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, 1.5275252))
    mean, sd = compare.mean_and_sd([0.5])
    assert mean == 0.5 and math.isnan(sd)


def test_naive_bayes_by_hand():
    texts, labels = ["Good good film", "bad film", "isn't bad"], [0, 1, 1]
    found = floors.naive_bayes_probabilities(
        texts, labels, ["good", "unseen words", ""], num_labels=3)
    # Of the words good, film, bad and isn't: 2, 1, 0, 0 in class 0, and 0, 1, 2, 1 in class 1.
    odds = np.array([1 / 3 * (2 + 1) / (3 + 4), 2 / 3 * (0 + 1) / (4 + 4), 0])
    np.testing.assert_allclose(found[0], odds / odds.sum())
    np.testing.assert_allclose(found[1:], [[1 / 3, 2 / 3, 0]] * 2)


def test_naive_bayes_floor_is_read_like_any_run(tmp_path):
    corpus = pytest.importorskip("preprocess.corpus")
    pairs = [("good film", 1), ("bad film", 0), ("good good", 1), ("bad", 0)]
    examples = [
        corpus.Example(text=text, label=label, item=f"{number}")
        for number, (text, label) in enumerate(pairs)
    ]
    task = corpus.Task(
        name="custom", labels=("no", "yes"),
        splits={"train": examples, "validation": examples, "test": examples[:3]},
    )
    floors.write_naive_bayes(task, tmp_path / "naive_bayes")
    run = results.read_finetune_run(tmp_path / "naive_bayes")
    assert run.seeds == [0] and run.task == "custom"
    assert run.items_digest == digest(["0", "1", "2"])
    assert run.correct.all() and run.rows[0]["test_accuracy"] == 1.0


def test_run_with_its_cost_is_read(tmp_path):
    correct = np.array([[1, 0, 1], [1, 1, 1]], dtype=bool)
    cost = {"masked_tokens": 5300, "steps": 120, "seconds": 3.5}
    run = results.read_finetune_run(write_run(tmp_path / "run", correct, cost=cost))
    assert run.seeds == [13, 14] and run.items_digest == digest(["item0", "item1", "item2"])
    assert run.cost == cost
    np.testing.assert_array_equal(run.correct, correct)
    first, second = compare.table_rows([results.Arm("selective", [run])])
    assert first == {
        "arm": "selective", "strategy": "", "scores": "", "task": "mr", "labels": "", "steps": "",
        "metric": "accuracy", "mean": "0.8333", "low": "0.0000", "high": "1.0000", "sd": "0.2357",
        "seeds": 2,
    }
    assert second["metric"] == "macro_f1" and tuple(second) == compare.TABLE_COLUMNS


def test_differences_with_several_pretraining_seeds(tmp_path):
    generator = np.random.default_rng(8)
    none = made_up_arm(tmp_path, "none", generator.random((3, 40)) < 0.6)
    selective = made_up_arm(tmp_path, "selective", *(generator.random((2, 3, 40)) < 0.8))
    ((row,), notes) = difference_rows([(selective, none)])
    assert tuple(row) == compare.DIFFERENCE_COLUMNS
    assert len(notes) == 1 and "One pre-training seed lies behind none:" in notes[0]
    expected = selective.correct().mean() - none.correct().mean()
    assert row["difference"] == f"{expected:+.4f}"
    assert (row["seeds"], row["items"]) == ("2x3", 40)
    assert float(row["low"]) < expected < float(row["high"])
    assert float(row["detectable"]) > float(row["high"]) - expected  # 80 % power takes more


def test_arms_that_cannot_be_compared_are_named(tmp_path):
    base, *others = (
        made_up_arm(tmp_path, name, np.ones((2, 4), dtype=bool), **options)
        for name, options in (
            ("base", {}), ("other_items", {"items": ["a", "b", "c", "d"]}),
            ("other_seeds", {"seeds": [1, 2]}), ("without", {}), ("other_task", {"task": "sst2"})))
    (tmp_path / "without0" / "seed_13" / "predictions.jsonl").unlink()
    others[2] = results.Arm("without", [results.read_finetune_run(tmp_path / "without0")])
    rows, notes = difference_rows([(base, other) for other in others])
    assert rows == []
    assert [note.split(" are not compared: ")[1] for note in notes] == [
        "they were tested on different items.",
        "they have different fine-tuning seeds.",
        "predictions.jsonl of some seed is missing, or their runs have different seeds.",
        "they are of different tasks (mr and sst2).",
    ]


def test_chance_that_is_not_counted_is_said(tmp_path):
    generator = np.random.default_rng(9)
    general = made_up_stage(masking="random", steps=100)

    def arm(name: str, weights: list[str], shape=(3, 30)) -> results.Arm:
        runs = []
        for seed, given in enumerate(weights):
            guided = made_up_stage(masking=name, seed=seed, steps=20)
            path = write_run(tmp_path / f"{name}{seed}", generator.random(shape) < 0.7,
                             weights=given, stages=[general, guided])
            runs.append(results.read_finetune_run(path))
        return results.Arm(name, runs)

    sound, copied = arm("sound", ["a", "b"]), arm("copied", ["c", "c"])
    (_,), notes = difference_rows([(copied, sound)])
    assert sound.runs[0].strategy == "sound"
    assert [note.split(":")[0] for note in notes] == [
        "The pre-training seeds of copied, sound are of stage 2 and start from one stage-1 "
        "checkpoint", "copied"]
    assert "one and the same checkpoint" in notes[1]
    one_seed = arm("one_seed", ["d", "e"], (1, 30))
    _, notes = difference_rows([(one_seed, sound)])
    assert any("One fine-tuning seed lies behind one_seed" in note for note in notes)


def test_equal_answers_have_no_detectable_difference(tmp_path):
    constant = np.array([[True, False] * 10] * 2)
    a, b = (made_up_arm(tmp_path, name, constant) for name in ("a", "b"))
    ((row,), notes) = difference_rows([(a, b)])
    assert row["detectable"] == "" and row["difference"] == "+0.0000"
    assert "An interval without width says nothing: a and b" in notes[0]


def test_a_broken_run_shows_what_is_left(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no finished seed"):
        results.read_finetune_run(tmp_path / "empty")
    path = write_run(tmp_path / "run", np.ones((2, 5), dtype=bool))
    predictions = path / "seed_14" / "predictions.jsonl"
    whole = predictions.read_text()
    predictions.write_text(whole[:-20])
    run = results.read_finetune_run(path)
    assert run.seeds == [13, 14] and run.correct is None
    assert run.notes == [f"{predictions}: cut off or broken, so this run is not compared"]
    predictions.write_text(whole.replace("item3", "other"))
    with pytest.raises(DataError, match="other test items"):
        results.read_finetune_run(path)
    predictions.write_text(whole)
    lines = (path / "results.jsonl").read_text().splitlines(keepends=True)
    (path / "results.jsonl").write_text(lines[0] + lines[1][:30])
    run = results.read_finetune_run(path)
    assert run.seeds == [13] and run.correct.shape == (1, 5)
    assert "results.jsonl, line 2: not a JSON object of ours" in run.notes[0]
    with pytest.raises(DataError, match="line 2"):  # the pipeline does not build on it
        results.read_json_lines(path / "results.jsonl")
    (path / "results.jsonl").write_text('{"seed": 13, "test_accuracy": "high"}\n[1]\n')
    with pytest.raises(DataError, match="no finished seed"):
        results.read_finetune_run(path)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"stages": 3}', '{"version": 2, "files": {}, "stages": ["x"]}',
                '{"stages": [{"stage": "pretrain"}]}'],
)
def test_a_lineage_of_no_use_is_named_and_left_alone(tmp_path, content):
    path = write_run(tmp_path / "run", np.ones((1, 2), dtype=bool))
    (path / "seed_13" / "hf" / "lineage.json").write_text(content)
    run = results.read_finetune_run(path)
    assert run.stages == [] and run.strategy == "none" and "lineage.json" in run.notes[0]


def test_stage_1_from_fresh_weights_alone_is_no_masking(tmp_path):
    for name, weights, strategy in (("fresh", "fresh", "none"), ("on", "0123", "whole_word")):
        stage = made_up_stage(masking="whole_word", weights=weights)
        path = write_run(tmp_path / name, np.ones((1, 2), dtype=bool), stages=[stage])
        assert results.read_finetune_run(path).strategy == strategy


def test_a_row_that_its_predictions_contradict_is_named(tmp_path):
    path = write_run(tmp_path / "run", np.array([[1, 0, 1, 1], [1, 1, 1, 0]], dtype=bool))
    assert results.read_finetune_run(path).notes == []
    rows = [json.loads(line) for line in (path / "results.jsonl").read_text().splitlines()]
    rows[0]["num_test"], rows[1]["test_accuracy"] = 5, 0.9
    (path / "results.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second = results.read_finetune_run(path).notes
    assert "run, seed 13: 4 predictions for 5 test items" in first
    assert "seed 14: results.jsonl says accuracy 0.9000, and the predictions give 0.7500" in second


def test_weights_that_the_lineage_does_not_tell_of_are_named(tmp_path):
    path = write_run(tmp_path / "run", np.ones((2, 4), dtype=bool))
    for seed, content in ((13, b"whole"), (14, b"other")):
        hf = path / f"seed_{seed}" / "hf"
        (hf / "model.safetensors").write_bytes(content)
        lineage = json.loads((hf / "lineage.json").read_text())
        lineage["files"] = {"model.safetensors": {
            "bytes": 5, "sha256": hashlib.sha256(b"whole").hexdigest()}}
        (hf / "lineage.json").write_text(json.dumps(lineage))
    (note,) = results.read_finetune_run(path).notes
    assert "seed_14/hf/model.safetensors: the lineage.json beside it was written for other" in note
    (path / "seed_13" / "hf" / "model.safetensors").unlink()
    notes = results.read_finetune_run(path).notes
    assert len(notes) == 2 and "seed_13/hf/model.safetensors: missing; type the command" in notes[0]
