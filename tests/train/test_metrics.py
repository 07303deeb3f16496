"""TensorBoard shows each step of a run once, and one row on the HParams page."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from preprocess.errors import ConfigError
from train.config import FinetuneConfig, parse
from train.reports.curves import read_curves
from train.run_dir import metrics
from train.run_dir.metrics import EVAL_LOSS, EXAMPLE, TRAIN_LOSS, MetricsWriter


def read_events(run_dir: Path):
    """Read all events of a run as TensorBoard's server does."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    return EventAccumulator(str(run_dir), tensor_size_guidance={
        "": 0, "scalars": 0, "text": 0}).Reload()


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
    points = points_of(events, "pretrain_train/loss")
    assert points == [(step, 1.0 if step <= start else 2.0) for step in range(1, 10)]
    texts = [(step, text.decode()) for step, text in points_of(
        events, "pretrain_eval/example/text_summary")]
    assert texts == [(step, f"text {1.0 if step <= start and start else 2.0}")
                     for step in (0, 3, 6, 9)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line[TRAIN_LOSS]) for line in lines if TRAIN_LOSS in line] == points
    assert [(line["step"], line[EXAMPLE]) for line in lines if EXAMPLE in line] == texts
    assert len(list(tmp_path.glob("events.*"))) == 2  # one file a start


def test_a_run_is_one_row_of_the_hparams_page_whatever_it_is(tmp_path):
    from tensorboard.plugins.hparams import metadata

    log(tmp_path / "run", 0, 7, loss=1.0)
    log(tmp_path / "run", 4, 9, loss=1.0).close(finished=True)
    other = MetricsWriter(tmp_path / "other", command="finetune")
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
            assert set(events.PluginTagToContent("scalars")) == {
                "pretrain_eval/loss", "pretrain_train/loss"}
        else:
            assert set(row.hparams) == {"command", "masking"}
            assert metadata.SESSION_END_INFO_TAG not in content
    # TensorBoard shows the columns of the first run that it reads: they fit every command.
    assert columns[0].hparam_infos == columns[1].hparam_infos
    assert [column.name for column in columns[0].hparam_infos] == list(metrics.HYPERPARAMETERS)
    # Five of each are shown at first: those that TensorBoard sorts to the front tell runs apart.
    assert [info.name for info in columns[0].hparam_infos if info.differs] == [
        "command", "data", "learning_rate", "masking", "seed"]
    assert [info.name.tag for info in columns[0].metric_infos][:5] == [
        "finetune_test/accuracy", "finetune_test/macro_f1", "pretrain_eval/loss",
        "pretrain_throughput/tokens_per_sec", "fit_scorer_eval/best"]
    shown = {info.name.tag for info in columns[0].metric_infos}
    assert {"pretrain_eval/loss", "finetune_test/accuracy", "fit_scorer_eval/best"} < shown
    assert shown <= {name for tag in metrics.TAGS for name in metrics.spellings(tag)[:-1]}


def test_a_run_of_no_step_has_no_row(tmp_path):
    """Only the model that it started from is in its folder."""
    from tensorboard.plugins.hparams import metadata

    for steps in (0, 1):
        writer = MetricsWriter(tmp_path / str(steps))
        writer.hyperparameters({"command": "pretrain", "max_steps": steps})
        writer.scalars(0, {EVAL_LOSS: 1.0})
        content = read_events(tmp_path / str(steps)).summary_metadata
        assert any(one.plugin_data.plugin_name == metadata.PLUGIN_NAME
                   for one in content.values()) == bool(steps)


@pytest.mark.parametrize("command", metrics.FINAL_METRICS)
def test_commands_have_sections_of_their_own(tmp_path, command):
    """TensorBoard's sections are the first parts of the tags; metrics.jsonl names them plainly."""
    writer = MetricsWriter(tmp_path, command=command)
    writer.scalars(1, dict.fromkeys((TRAIN_LOSS, EVAL_LOSS, metrics.MEMORY), 1.0))
    sections = {tag.split("/")[0] for tag in read_events(tmp_path).PluginTagToContent("scalars")}
    assert sections == {f"{command}_{part}" for part in ("train", "eval", "memory")}
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line.keys() == {"step", "time", TRAIN_LOSS, EVAL_LOSS, metrics.MEMORY}


def test_a_run_of_an_older_version_stays_one_run(tmp_path):
    """Its event files lie in tb/, and its tags have no command."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "run" / "tb")) as older:
        for step in range(1, 7):
            older.add_scalar(TRAIN_LOSS, 1.0, step)
    log(tmp_path / "run", 4, 9, loss=2.0).close()
    assert not list((tmp_path / "run").glob("events.*"))
    (run,), _ = read_curves([tmp_path])
    assert run.name == "run"
    assert run.scalars[TRAIN_LOSS] == (list(range(1, 10)), [1.0] * 4 + [2.0] * 5)


# ------------------------------------------------------------------------------- other places


class FakeWandb(types.ModuleType):
    """As much of the package as a run needs: it remembers what it is told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started, self.lines, self.settings, self.ended = [], [], {}, []
        self.broken = self.offline = False

    def init(self, **options):
        if self.broken:
            raise RuntimeError("api_key not configured (no-tty)\nand more")
        self.started.append(options)
        return types.SimpleNamespace(
            id=options["id"] or f"id{len(self.started)}", log=self.log,
            config=types.SimpleNamespace(update=lambda new, **_: self.settings.update(new)),
            finish=lambda exit_code: self.ended.append(exit_code))

    def log(self, values, step):
        if self.offline:
            raise OSError("no network")
        self.lines.append((step, values))


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_what_metrics_jsonl_has(tmp_path, wandb, capsys):
    for start in (0, 2):
        writer = MetricsWriter(tmp_path / "a" / "run", start, "finetune", "wandb")
        writer.hyperparameters({"command": "finetune", "seed": 1, "masking": None})
        writer.scalars(start + 1, {TRAIN_LOSS: 0.5})
        writer.text(start + 2, EXAMPLE, "text")
        writer.close(finished=bool(start))
    first, second = wandb.started
    assert (first["id"], second["id"], first["resume"]) == (None, "id1", "allow")  # one run
    assert first["name"] == "a/run" and first["dir"] == str(tmp_path / "a" / "run")
    loss, text = {"finetune_train/loss": 0.5}, {"finetune_eval/example": "text"}
    assert wandb.lines == [(1, loss), (2, text), (3, loss), (4, text)]
    assert wandb.settings == {"command": "finetune", "seed": 1} and wandb.ended == [1, 0]
    assert not list(tmp_path.rglob("events.*"))
    wandb.offline = True
    writer = MetricsWriter(tmp_path / "b", 0, "finetune", "wandb")
    for step in (1, 2):
        writer.scalars(step, {TRAIN_LOSS: 0.5})  # the training goes on
    writer.close(finished=True)
    assert len((tmp_path / "b" / "metrics.jsonl").read_text().splitlines()) == 2
    assert capsys.readouterr().out.count("warning: wandb: no network") == 1
    assert wandb.started[-1]["id"] is None


def test_a_wandb_that_cannot_start_is_said_at_once(tmp_path, wandb, monkeypatch):
    wandb.broken = True
    with pytest.raises(ConfigError, match="--report_to wandb: cannot start .api_key not configu"):
        MetricsWriter(tmp_path, report_to="wandb")
    flags = ["--output_dir", "r", "--task", "mr", "--model_name_or_path", "m", "--report_to"]
    assert parse(FinetuneConfig, [*flags, "wandb"]).report_to == "wandb"
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    with pytest.raises(ConfigError, match="--report_to wandb: the package is not installed; type"):
        parse(FinetuneConfig, [*flags, "wandb"])


def test_none_leaves_metrics_jsonl(tmp_path):
    writer = MetricsWriter(tmp_path, report_to="none")
    writer.hyperparameters({"command": "pretrain"})
    writer.scalars(1, {TRAIN_LOSS: 0.5})
    writer.close(finished=True)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    (run,), _ = read_curves([tmp_path])  # a report has its curves from there
    assert run.scalars[TRAIN_LOSS] == ([1], [0.5])


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    log(tmp_path, 0, 3, loss=1.0).close(finished=True)
    assert not list(tmp_path.iterdir())
