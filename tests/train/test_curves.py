"""Training curves: what was logged, and the tokens and seconds worked out from it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from preprocess.identity import build
from tests.support.runs import made_up_stage, write_lineage
from train.reports.curves import read_curves, run_rows
from train.run_dir.metrics import (
    EVAL_LOSS,
    MASKED_FRACTION,
    TOKENS_PER_SECOND,
    TRAIN_LOSS,
    MetricsWriter,
)

RATE = 500.0  # tokens a second
FRACTION = 0.1
PER_STEP = 100.0


def log(run: Path, start: int, stop: int, every: int = 5, rate: float = RATE) -> None:
    """A process that trains from step `start` to step `stop`."""
    writer = MetricsWriter(run, start)
    for step in range(start + every, stop + 1, every):
        writer.scalars(step, {TRAIN_LOSS: 9 - step / 10, MASKED_FRACTION: FRACTION,
                              TOKENS_PER_SECOND: rate})
    writer.scalars(stop, {EVAL_LOSS: 4.0})
    writer.close()


def finish(run: Path, steps: int, tokens: float) -> None:
    write_lineage(run / "hf", made_up_stage(steps=9), made_up_stage(
        masking="selective", steps=steps, tokens=tokens, masked_tokens=777, seconds=12.3))


def configure(run: Path, rows: int = 4, slots: int = 32, masking: str = "random") -> None:
    run.mkdir(exist_ok=True)
    (run / "ds_config.resolved.json").write_text(json.dumps({"train_batch_size": rows}))
    (run / "config.resolved.yaml").write_text(f"max_seq_length: {slots}\nmax_steps: 60\n")
    identity = build("pretrain", choice={"masking": masking})
    (run / "env.json").write_text(json.dumps({"identity": identity}))


def test_tokens_and_seconds_follow_from_the_rates(tmp_path):
    log(tmp_path / "run", 0, 40)
    finish(tmp_path / "run", 40, 40 * PER_STEP)
    (run,), notes = read_curves([tmp_path])
    masked, seconds = run.spent([0, 5, 40, 17])
    np.testing.assert_allclose(masked, np.array([0, 5, 40, 17]) * PER_STEP * FRACTION, rtol=1e-6)
    np.testing.assert_allclose(seconds, np.array([0, 5, 40, 17]) * PER_STEP / RATE, rtol=1e-6)
    assert notes == [] and run.name == "run" and run.masking == "selective"
    ((row),) = run_rows([run])  # totals are those of the lineage
    assert (row["steps"], row["masked_tokens"], row["seconds"]) == (40, 777, 12)
    assert row["state"] == "finished" and row["held_out_loss"] == "4.0000"


def test_a_resumed_run_counts_each_step_once_and_no_pause(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("time.time", lambda: clock[0])
    monkeypatch.setattr("time.time_ns", lambda: int(clock[0] * 1e9))
    log(tmp_path / "run", 0, 30)
    clock[0] += 86_400  # a day later, from the checkpoint of step 20, on a machine twice as fast
    log(tmp_path / "run", 20, 40, rate=2 * RATE)
    finish(tmp_path / "run", 40, 40 * PER_STEP)
    (run,), _ = read_curves([tmp_path])
    assert run.scalars[TRAIN_LOSS][0] == [5, 10, 15, 20, 25, 30, 35, 40]
    _, seconds = run.spent([40])
    assert seconds[0] == pytest.approx((20 + 20 / 2) * PER_STEP / RATE)


def test_a_run_still_going_is_placed_by_its_full_rows(tmp_path):
    configure(tmp_path / "run", rows=4, slots=32, masking="whole_word")
    log(tmp_path / "run", 0, 40)
    (run,), notes = read_curves([tmp_path])
    masked, _ = run.spent([10])
    assert masked[0] == pytest.approx(10 * 4 * 32 * FRACTION)
    assert notes == [f"{tmp_path}/run: not finished (no hf/ in it), shown up to step 40 of 60."]
    (row,) = run_rows([run])
    assert row["state"] == "unfinished" and row["masking"] == "whole_word" and row["steps"] == 40


def test_without_batch_size_there_are_steps_alone(tmp_path):
    log(tmp_path / "run", 0, 20)
    (run,), notes = read_curves([tmp_path])
    assert run.spent([10]) is None and "masked tokens and seconds are unknown" in notes[1]
    (row,) = run_rows([run])
    assert (row["steps"], row["masked_tokens"], row["seconds"]) == (20, "", "")


@pytest.mark.parametrize("damage", ["cut", "flipped", "garbage", "empty"])
def test_a_broken_event_file_is_named_and_its_beginning_shown(tmp_path, damage):
    run = tmp_path / "run"
    log(run, 0, 100)
    (path,) = run.glob("events.*")
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[-10:]
    elif damage == "flipped":
        content[len(content) // 2] ^= 255
    elif damage == "garbage":
        content = bytearray(b"no events at all" * 9)
    else:
        content.clear()
    path.write_bytes(content)
    curves, notes = read_curves([tmp_path])
    if damage != "empty":
        assert notes[0].startswith(f"{path}: truncated, damaged or still being written: ")
    if damage in ("garbage", "empty"):
        assert curves == [] and notes[-1] == f"{run}: no loss has been logged yet."
    else:
        steps = curves[0].scalars[TRAIN_LOSS][0]
        assert steps == list(range(5, steps[-1] + 1, 5))
        assert steps[-1] == 100 if damage == "cut" else 20 < steps[-1] < 90


def test_a_later_file_is_read_after_a_broken_one(tmp_path):
    log(tmp_path / "run", 0, 30)
    (path,) = (tmp_path / "run").glob("events.*")
    path.write_bytes(path.read_bytes()[:-5])  # killed while writing
    log(tmp_path / "run", 20, 40)
    (run,), notes = read_curves([tmp_path])
    assert run.scalars[TRAIN_LOSS][0] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert str(path) in notes[0]


def test_a_run_without_events_is_named_and_its_totals_shown(tmp_path):
    for name in ("finished", "begun", "untrained"):
        configure(tmp_path / name)
    finish(tmp_path / "finished", 40, 40 * PER_STEP)
    config = tmp_path / "untrained" / "config.resolved.yaml"
    config.write_text(config.read_text().replace("max_steps: 60", "max_steps: 0"))
    curves, notes = read_curves([tmp_path, tmp_path / "begun"])
    assert notes == [f"{tmp_path}/{name}: no event files in it, so no curves."
                     for name in ("begun", "finished")]
    (row,) = run_rows(curves)
    assert (row["steps"], row["masked_tokens"], row["held_out_loss"]) == (40, 777, "")


def test_names_tell_runs_apart(tmp_path):
    for name in ("a/run", "b/run"):
        log(tmp_path / name, 0, 10)
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "a" / "run"]
    curves, _ = read_curves(folders)
    assert [run.name for run in curves] == ["a/run", "b/run"]  # the third is the first again
    (alone,), _ = read_curves(folders[:1])
    assert alone.name == "run"
