"""Read the training curves of run directories, against steps, masked tokens and seconds.

Only this file reads event files; where there are none, as in an archive of `train/pipeline.py`, it
reads the same numbers from `metrics.jsonl`. Axes other than steps are derived from the logged
scalars, per window between two points of the training loss: tokens are the steps of the window
times the tokens per step (constant to a per cent or two, since rows are packed); masked tokens are
the tokens times `train/masked_fraction`; seconds are the tokens over `throughput/tokens_per_sec`.
Seconds therefore cover training steps only, without evaluation, saving or pauses, and steps
repeated after a kill count once. The tokens per step are the mean of the run by its `lineage.json`;
without one, rows count as full, which is a few per cent too many.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from preprocess.errors import visible
from preprocess.files import read_yaml
from train.reports.results import number, read_json_lines, read_summaries
from train.run_dir.metrics import (
    EVAL_LOSS,
    EVAL_PERPLEXITY,
    MASKED_FRACTION,
    OLD_FOLDER,
    TOKENS_PER_SECOND,
    TRAIN_LOSS,
    spellings,
)

TAGS = (TRAIN_LOSS, EVAL_LOSS, EVAL_PERPLEXITY, MASKED_FRACTION, TOKENS_PER_SECOND)
RUN_COLUMNS = ("run", "masking", "state", "steps", "masked_tokens", "seconds", "train_loss",
               "held_out_loss")
PATTERN = "events.out.tfevents.*"
METRICS_FILE = "metrics.jsonl"


class Point(NamedTuple):
    """A logged value, as TensorBoard's reader gives it."""

    step: int
    value: float


@dataclass(frozen=True)
class Curves:
    """The scalars of one training run.

    Attributes:
        name: unique in a report.
        scalars: tag -> (steps, values), steps ascending; empty without event files.
        masking: strategy of a pre-training run; empty if unknown.
        stage: the run's own stage in its lineage; empty until it is finished.
        tokens_per_step: tokens per step, without padding; None if unknown.
        max_steps: planned steps; None if unknown.
    """

    name: str
    scalars: dict[str, tuple[list[int], list[float]]]
    masking: str = ""
    stage: dict[str, Any] = field(default_factory=dict)
    tokens_per_step: float | None = None
    max_steps: float | None = None

    @property
    def is_pretraining(self) -> bool:
        logged = MASKED_FRACTION in self.scalars or EVAL_PERPLEXITY in self.scalars
        return logged or self.stage.get("stage") == "pretrain"

    @property
    def last_step(self) -> int:
        return max((steps[-1] for steps, _ in self.scalars.values()), default=0)

    def spent(self, steps: Sequence[int]) -> tuple[np.ndarray, np.ndarray] | None:
        """Return masked tokens and seconds of training up to each step; None if unknown.

        Returns:
            Two arrays, `(len(steps),)` float64.
        """
        needed = (MASKED_FRACTION, TOKENS_PER_SECOND)
        if self.tokens_per_step is None or any(tag not in self.scalars for tag in needed):
            return None
        logged, fractions = (np.array(column) for column in self.scalars[MASKED_FRACTION])
        rates = np.interp(logged, *self.scalars[TOKENS_PER_SECOND])
        tokens = np.diff(logged, prepend=0) * self.tokens_per_step
        places = np.append(0, logged)
        masked = np.append(0, np.cumsum(tokens * fractions))
        seconds = np.append(0, np.cumsum(tokens / np.maximum(rates, 1e-9)))
        return np.interp(steps, places, masked), np.interp(steps, places, seconds)


def read_curves(folders: Sequence[Path]) -> tuple[list[Curves], list[str]]:
    """Return the curves of all runs below the folders, and a sentence per unreadable part."""
    curves: list[Curves] = []
    notes: list[str] = []
    logged = {path.resolve(): path for folder in folders for path in event_folders(folder)}
    for path in logged.values():
        run = path.parent if path.name == OLD_FOLDER else path
        scalars = _read_events(path, notes)
        if scalars:
            curves.append(_with_lineage(short_name(run, folders), scalars, run, notes))
            notes += _state_notes(curves[-1], run)
        else:
            notes.append(f"{path}: no loss has been logged yet.")
    kept = {run.resolve(): run for folder in folders for run in _only_metrics(folder)}
    for run in kept.values():
        scalars = _read_metrics(run / METRICS_FILE)
        if scalars:
            curves.append(_with_lineage(short_name(run, folders), scalars, run, notes))
            notes += _state_notes(curves[-1], run)
    silent = {run.resolve(): run for folder in folders for run in without_events(folder)}
    for path, run in silent.items():
        if any(other == path or path in other.parents for other in kept):
            continue
        notes.append(f"{run}: no event files in it, so no curves.")
        found = _with_lineage(short_name(run, folders), {}, run, notes)
        if found.is_pretraining:
            curves.append(found)
    return curves, notes


def without_events(folder: Path) -> list[Path]:
    """Return run directories, this one or below it, that trained and have no event file."""
    runs = [path.parent for path in sorted(folder.rglob("config.resolved.yaml"))]
    return [run for run in runs if not any(run.rglob(PATTERN))
            and _read(run / "config.resolved.yaml").get("max_steps") != 0]


def _only_metrics(folder: Path) -> list[Path]:
    """Return the runs, this one or below it, with scalars in `metrics.jsonl` alone."""
    runs = [path.parent for path in sorted(folder.rglob(METRICS_FILE))]
    return [run for run in runs if not any(
        path for place in (run, run / OLD_FOLDER) for path in place.glob(PATTERN))]


def event_folders(folder: Path) -> list[Path]:
    """Return the folders with event files, this one or below it."""
    return sorted({path.parent for path in folder.rglob(PATTERN)})


def short_name(path: Path, folders: Sequence[Path]) -> str:
    """Return a path relative to the one folder of a report, or to the parent of several.

    It is for people: control characters in it are escaped.
    """
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) == 1:
        name = os.path.relpath(path.resolve(), resolved[0])
        return visible(resolved[0].name if name == "." else name)
    parent = os.path.commonpath([f.parent for f in resolved])
    return visible(os.path.relpath(path.resolve(), parent))


def _read_events(folder: Path, notes: list[str]) -> dict[str, tuple[list[int], list[float]]]:
    """Return the scalars of all event files of a folder; repeated steps count once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    for path in sorted(folder.glob(PATTERN)):
        size = path.stat().st_size
        # The loader stops silently at a record that is truncated or does not match its checksum.
        # Each record has 16 bytes of framing.
        whole = sum(len(record) + 16 for record in RawEventFileLoader(str(path)).Load())
        if whole < size:
            notes.append(
                f"{path}: truncated, damaged or still being written: {whole:,} of {size:,} bytes "
                "can be read; their content is shown."
            )
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 1})
    try:
        events.Reload()
    except Exception as error:  # complete records that are no events: any type of error
        notes.append(f"{folder}: holds records that are no events ({type(error).__name__}).")
    found = set(events.Tags()["scalars"])
    made = {}
    for tag in TAGS:
        # An older version may have begun the run, under other tags.
        points = [point for name in spellings(tag) if name in found
                  for point in events.Scalars(name)]
        if points:
            made[tag] = _ascending(sorted(points, key=lambda point: point.step))
    return made


def _read_metrics(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Return the scalars of a `metrics.jsonl`, rounded as event files keep them."""
    points: dict[str, list[Any]] = {}
    for row in read_json_lines(path, []):
        for tag in TAGS:
            value = next((row[name] for name in spellings(tag) if name in row), None)
            value = number(value)
            if value is not None and type(row.get("step")) is int:
                points.setdefault(tag, []).append(Point(row["step"], float(np.float32(value))))
    return {tag: _ascending(points[tag]) for tag in TAGS if tag in points}


def _ascending(points: Sequence[Any]) -> tuple[list[int], list[float]]:
    """Return steps and values; of several points at one step, the first."""
    steps: list[int] = []
    values: list[float] = []
    for point in points:
        if not steps or point.step > steps[-1]:
            steps.append(point.step)
            values.append(point.value)
    return steps, values


def _with_lineage(
    name: str, scalars: dict[str, tuple[list[int], list[float]]], run: Path, notes: list[str]
) -> Curves:
    """Add what the run directory tells beside the event files."""
    stages = read_summaries(run / "hf", notes)
    stage = stages[-1] if stages else {}
    config = _read(run / "config.resolved.yaml")
    masking = str(stage.get("masking") or "") or _planned_masking(run)
    tokens, steps = number(stage.get("tokens")), number(stage.get("steps"))
    per_step = tokens / steps if tokens and steps else _full_rows(run, config)
    return Curves(name, scalars, masking, stage, per_step,
                  number(config.get("max_steps")))


def _planned_masking(run: Path) -> str:
    """Return the masking of a run that is not finished, by the identity in its env.json."""
    try:
        return str(_read(run / "env.json")["identity"]["choice"]["masking"] or "")
    except (KeyError, TypeError):
        return ""


def _read(path: Path) -> dict[str, Any]:
    """Return what a JSON or YAML file holds; nothing if it cannot be read."""
    try:
        return read_yaml(path, "start the run again")
    except (OSError, ValueError):
        return {}


def _full_rows(run: Path, config: dict[str, Any]) -> float | None:
    """Return the tokens per step if all rows were full."""
    rows = number(_read(run / "ds_config.resolved.json").get("train_batch_size"))
    slots = number(config.get("max_seq_length"))
    return rows * slots if rows and slots else None


def _state_notes(run: Curves, path: Path) -> list[str]:
    if not run.is_pretraining or run.stage:
        return []
    planned = f" of {run.max_steps:.0f}" if run.max_steps else ""
    notes = [f"{path}: not finished (no hf/ in it), shown up to step {run.last_step}{planned}."]
    if run.tokens_per_step is None:
        notes.append(f"{path}: without ds_config.resolved.json its masked tokens and seconds are "
                     "unknown.")
    return notes


def run_rows(curves: Sequence[Curves]) -> list[dict[str, Any]]:
    """Return one table row per pre-training run, with the keys of `RUN_COLUMNS`."""
    rows = []
    for run in curves:
        if not run.is_pretraining:
            continue
        totals = {"steps": float(run.last_step), "masked_tokens": None, "seconds": None}
        spent = run.spent([run.last_step])
        if spent is not None:
            totals.update(masked_tokens=spent[0][0], seconds=spent[1][0])
        for key in totals:
            totals[key] = number(run.stage.get(key, totals[key]))
        rows.append({
            "run": run.name, "masking": run.masking,
            "state": "finished" if run.stage else "unfinished",
            **{key: "" if value is None else round(value) for key, value in totals.items()},
            "train_loss": _last(run, TRAIN_LOSS), "held_out_loss": _last(run, EVAL_LOSS),
        })
    return rows


def _last(run: Curves, tag: str) -> str:
    return f"{run.scalars[tag][1][-1]:.4f}" if tag in run.scalars else ""
