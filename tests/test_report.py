"""`train/report.py` on small made-up runs: tables, figures, and what it says is missing."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from preprocess.errors import DataError
from train import report
from train.metrics import EVAL_LOSS, MASKED_FRACTION, TRAIN_LOSS, MetricsWriter


def write_finetune(path: Path, accuracy: float, *, steps: int = 0, seeds=(13, 43, 83),
                   items: int = 60) -> None:
    """A fine-tuning directory with about that accuracy."""
    generator = np.random.default_rng([*path.name.encode(), steps])
    path.mkdir(parents=True)
    rows = []
    for seed in seeds:
        right = generator.random(items) < accuracy
        (path / f"seed_{seed}").mkdir()
        answers = [{"item": str(n), "label": 1, "prediction": int(ok)}
                   for n, ok in enumerate(right)]
        (path / f"seed_{seed}" / "predictions.jsonl").write_text(
            "".join(json.dumps(answer) + "\n" for answer in answers))
        rows.append({"seed": seed, "task": "mr", "test_accuracy": float(right.mean()),
                     "test_macro_f1": float(right.mean()),
                     "pretraining": {"steps": steps, "masked_tokens": 19 * steps, "seconds": 1}})
    (path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_curve(path: Path, start: float, steps: int = 50, pretraining: bool = True) -> None:
    """A training run with a falling loss."""
    path.mkdir(parents=True, exist_ok=True)
    writer = MetricsWriter(path)
    for step in range(10, steps + 1, 10):
        values = {TRAIN_LOSS: start / (1 + step / 50)}
        if pretraining:
            values[MASKED_FRACTION] = 0.15
        writer.scalars(step, values)
    if pretraining:
        writer.scalars(steps, {EVAL_LOSS: start / 2})
        writer.hyperparameters({"seed": 1})
    writer.close()


def write_pipeline(root: Path, lengths=(None,), pretrain_seeds=(1, 2)) -> Path:
    """An output folder of train/pipeline.py."""
    arms = []
    for length in lengths:
        folder, tag = (f"step_{length}/", f"@{length}") if length else ("", "")
        base = length or 100
        for number, arm in enumerate(("none", "random_matched", "selective")):
            seeds = pretrain_seeds if number else (None,)
            runs = [f"{folder}finetune/{arm}" + (f"-seed{s}" if s else "") for s in seeds]
            for run in runs:
                accuracy = 0.5 + 0.15 * number + 0.0003 * base
                write_finetune(root / run, accuracy, steps=base + (50 if number else 0))
            arms.append({"name": arm + tag, "runs": runs, "floor": False})
    write_finetune(root / "floors" / "naive_bayes", 0.7, seeds=(0,))
    arms.append({"name": "naive_bayes", "runs": ["floors/naive_bayes"], "floor": True})
    (root / "arms.json").write_text(json.dumps(arms))
    write_curve(root / "stage1", 9.0, 100)
    for arm in ("random_matched", "selective"):
        write_curve(root / "task_guided" / f"{arm}-seed1", 5.0)
    write_curve(root / "scorer", 0.7, pretraining=False)
    return root


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_pipeline_folder_gives_table_differences_and_figures(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    root, output = write_pipeline(tmp_path / "R"), tmp_path / "out"
    report.main([str(root), "--output_dir", str(output)])
    rows = read_csv(output / "table.csv")
    assert list(rows[0]) == ["arm", "task", "metric", "mean", "sd", "seeds", "masked_tokens",
                             "steps", "seconds"]
    accuracy = {row["arm"]: row for row in rows if row["metric"] == "accuracy"}
    assert list(accuracy) == ["none", "random_matched", "selective", "naive_bayes"]
    assert accuracy["selective"]["seeds"] == "6" and accuracy["none"]["seeds"] == "3"
    assert accuracy["selective"]["steps"] == "150"
    assert accuracy["naive_bayes"]["sd"] == ""
    differences = read_csv(output / "differences.csv")
    assert [(row["arm"], row["against"]) for row in differences] == [
        ("random_matched", "none"), ("selective", "none"), ("selective", "random_matched")]
    assert is_png(output / "loss.png") and is_png(output / "accuracy.png")
    assert not (output / "steps.png").exists()
    out = capsys.readouterr().out
    assert f"none ({accuracy['none']['mean']}) is not above the floor naive_bayes" in out
    assert "95 % intervals" in out


def test_several_stage_1_lengths_are_compared_each_for_itself(tmp_path):
    pytest.importorskip("matplotlib")
    root, output = write_pipeline(tmp_path / "R", lengths=(100, 200, 300)), tmp_path / "out"
    report.main([str(root), "--output_dir", str(output)])
    differences = read_csv(output / "differences.csv")
    assert len(differences) == 9
    assert all(row["arm"].split("@")[1] == row["against"].split("@")[1] for row in differences)
    assert is_png(output / "steps.png")
    assert len([r for r in read_csv(output / "table.csv") if r["arm"] == "naive_bayes"]) == 2


def test_any_runs_without_a_pipeline(tmp_path, capsys):
    write_finetune(tmp_path / "a", 0.7)
    write_finetune(tmp_path / "b", 0.9)
    write_curve(tmp_path / "pretraining", 6.0)
    (tmp_path / "empty" / "tb").mkdir(parents=True)
    output = tmp_path / "out"
    names = ["a", "b", "pretraining", "empty"]
    report.main([*(str(tmp_path / name) for name in names), "--output_dir", str(output)])
    assert {row["arm"].rsplit("/")[-1] for row in read_csv(output / "table.csv")} == {"a", "b"}
    assert f"{tmp_path}/empty: no run in it" in capsys.readouterr().out
    assert not any(path.name == "steps.png" for path in output.iterdir())


def test_unfinished_arms_are_named_and_the_rest_is_shown(tmp_path, capsys):
    root, output = write_pipeline(tmp_path / "R"), tmp_path / "out"
    (root / "finetune" / "selective-seed2" / "results.jsonl").unlink()
    (root / "finetune" / "none" / "results.jsonl").unlink()
    report.main([str(root), "--output_dir", str(output)])
    out = capsys.readouterr().out
    assert "Note: none: " in out and "finetune/none: holds no finished seed" in out
    rows = {row["arm"]: row["seeds"] for row in read_csv(output / "table.csv")}
    assert rows == {"random_matched": "6", "selective": "3", "naive_bayes": "1"}


def test_runs_that_still_train_give_curves_and_no_table(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write_curve(tmp_path / "run", 6.0)
    output = tmp_path / "out"
    report.main([str(tmp_path / "run"), "--output_dir", str(output)])
    assert "No fine-tuning results yet" in capsys.readouterr().out
    assert [path.name for path in output.iterdir()] == ["loss.png"]


def test_no_run_at_all_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        report.main([str(tmp_path / "absent")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no run in"):
        report.main([str(tmp_path / "empty"), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_there_is_a_table_and_a_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    write_finetune(tmp_path / "a", 0.7)
    output = tmp_path / "out"
    report.main([str(tmp_path / "a"), "--output_dir", str(output)])
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert {path.name for path in output.iterdir()} == {"table.csv", "differences.csv"}


def test_curves_are_those_that_were_logged(tmp_path):
    write_curve(tmp_path / "run", 6.0)
    (curves,), notes = report.read_curves([tmp_path / "run"])
    steps, values = curves.scalars[TRAIN_LOSS]
    assert notes == [] and curves.name == "run" and curves.is_pretraining
    assert steps == [10, 20, 30, 40, 50]
    assert curves.scalars[EVAL_LOSS] == ([50], [3.0])
    assert values == pytest.approx([6 / (1 + step / 50) for step in steps])
