"""TensorBoard shows each step of a run once, and one row on the HParams page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from train.run_dir import metrics
from train.run_dir.metrics import EVAL_LOSS, EXAMPLE, TRAIN_LOSS, MetricsWriter


def read_events(run_dir: Path):
    """Read all events of a run as TensorBoard's server does."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    return EventAccumulator(str(run_dir / "tb"), tensor_size_guidance={"": 0, "scalars": 0,
                                                                       "text": 0}).Reload()


def points_of(events, tag: str) -> list[tuple[int, Any]]:
    """Return steps and values of a tag, in the order of the files."""
    from tensorboard.util.tensor_util import make_ndarray

    return [(event.step, make_ndarray(event.tensor_proto).item()) for event in events.Tensors(tag)]


def log(run_dir: Path, start: int, end: int, loss: float) -> MetricsWriter:
    """Log as a process does that resumes at `start` and ends, or is killed, after `end`."""
    writer = MetricsWriter(run_dir, start)
    writer.hyperparameters({"command": "pretrain", "seed": 1, "learning_rate": loss})
    if start == 0:
        writer.scalars(0, {EVAL_LOSS: loss})
        writer.text(0, EXAMPLE, f"text {loss}")
    for step in range(start + 1, end + 1):
        writer.scalars(step, {TRAIN_LOSS: loss})
        if step % 3 == 0:
            writer.text(step, EXAMPLE, f"text {loss}")
    return writer


@pytest.mark.parametrize("start", [0, 4])
def test_no_step_appears_twice(tmp_path, start):
    log(tmp_path, 0, 7, loss=1.0)
    log(tmp_path, start, 9, loss=2.0)
    events = read_events(tmp_path)
    points = points_of(events, TRAIN_LOSS)
    assert points == [(step, 1.0 if step <= start else 2.0) for step in range(1, 10)]
    texts = [(step, text.decode()) for step, text in points_of(events, f"{EXAMPLE}/text_summary")]
    assert texts == [(step, f"text {1.0 if step <= start and start else 2.0}")
                     for step in (0, 3, 6, 9)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line[TRAIN_LOSS]) for line in lines if TRAIN_LOSS in line] == points
    assert [(line["step"], line[EXAMPLE]) for line in lines if EXAMPLE in line] == texts
    assert len(list((tmp_path / "tb").iterdir())) == 2  # one file a start


def test_a_run_is_one_row_of_the_hparams_page_whatever_it_is(tmp_path):
    from tensorboard.plugins.hparams import metadata

    log(tmp_path / "run", 0, 7, loss=1.0)
    log(tmp_path / "run", 4, 9, loss=1.0).close(finished=True)
    other = MetricsWriter(tmp_path / "other")
    other.hyperparameters({"command": "finetune", "masking": "selective", "weight_decay": None})
    columns = []
    for name in ("run", "other"):
        events = read_events(tmp_path / name)
        content = events.PluginTagToContent("hparams")
        columns.append(metadata.parse_experiment_plugin_data(content[metadata.EXPERIMENT_TAG]))
        started = content[metadata.SESSION_START_INFO_TAG]
        row = metadata.parse_session_start_info_plugin_data(started)
        if name == "run":
            assert row.hparams["command"].string_value == "pretrain"
            assert row.hparams["seed"].number_value == 1
            assert metadata.SESSION_END_INFO_TAG in content
            # Its metrics are the curves themselves, no copies under other names.
            assert set(events.PluginTagToContent("scalars")) == {EVAL_LOSS, TRAIN_LOSS}
        else:
            assert set(row.hparams) == {"command", "masking"}
            assert metadata.SESSION_END_INFO_TAG not in content
    # TensorBoard shows the columns of the first run that it reads: they fit every command.
    assert columns[0].hparam_infos == columns[1].hparam_infos
    assert [column.name for column in columns[0].hparam_infos] == list(metrics.HYPERPARAMETERS)
    assert {info.name.tag for info in columns[0].metric_infos} <= set(metrics.TAGS)


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    log(tmp_path, 0, 3, loss=1.0).close(finished=True)
    assert not list(tmp_path.iterdir())
