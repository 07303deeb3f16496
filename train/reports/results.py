"""Read what fine-tuning left behind.

It owns the shape of `results.jsonl` and `predictions.jsonl` as seen by a reader. It runs no network
and draws no figure.

Letters: `P` pre-training seeds, `S` fine-tuning seeds, `N` test items.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from preprocess.errors import DataError, visible
from preprocess.files import parse_json, read_json
from preprocess.identity import by_path, digest, flatten
from train.reports.intervals import macro_f1_values
from train.run_dir.hf_folder import read_stages, weights_problem

ARCHIVE = "archive.json"  # in a folder that `train/pipeline.py --archive` packed without weights
METRICS = {"accuracy": "test_accuracy", "macro_f1": "test_macro_f1"}


@dataclass(frozen=True)
class FinetuneRun:
    """One finished fine-tuning directory: one model per seed, all tested on the same items.

    Attributes:
        path: the directory, or the file that tells of it.
        rows: `results.jsonl`, one dictionary per seed, in the order of the seeds.
        items_digest: names the test items, whatever their order; empty without predictions.
        correct: whether seed s is right about item n, `(S, N)` bool, items in the order of their
            ids; None without predictions.
        cost: masked_tokens, steps and seconds of all pre-training behind the run.
        stages: the pre-training stages behind it as `read_summaries` gives them; empty
            where nothing tells.
        notes: a sentence for everything that could not be read.
        truth, predictions: the classes of the items, `(N,)` int, and those that each seed gave,
            `(S, N)` int; None without predictions.
        classes: how many the task has; None where nothing tells.
        mask_seconds, mask_flops: what choosing the masks behind it cost; None if unknown.
        commit, device: what it was trained with and on; empty where nothing tells.
    """

    path: Path
    rows: list[dict[str, Any]]
    items_digest: str
    correct: np.ndarray | None
    cost: dict[str, float]
    stages: list[dict[str, Any]]
    notes: list[str]
    truth: np.ndarray | None = None
    predictions: np.ndarray | None = None
    classes: int | None = None
    mask_seconds: float | None = None
    mask_flops: float | None = None
    commit: str = ""
    device: str = ""

    @property
    def task(self) -> str:
        return visible(self.rows[0].get("task", ""))

    @property
    def seeds(self) -> list[int]:
        return [int(row["seed"]) for row in self.rows]

    @property
    def num_labels(self) -> int | None:
        """Labelled examples that its models were trained on, where the rows tell it."""
        count = number(self.rows[0].get("num_train"))
        return None if count is None else int(count)

    @property
    def weights(self) -> str | None:
        """Digest of the weights that were fine-tuned, where the rows tell it."""
        try:
            return str(self.rows[0]["identity"]["inputs"]["weights"] or "") or None
        except (KeyError, TypeError):
            return None

    def settings(self) -> Iterator[dict[str, Any]]:
        """Yield how each model was fine-tuned: flat, without what follows from its labels."""
        for row in self.rows:
            identity = row.get("identity")
            told = identity.get("train") if isinstance(identity, dict) else None
            if isinstance(told, dict):
                yield {key: value for key, value in by_path(told).items()
                       if not key.endswith("num_steps")}

    @property
    def strategy(self) -> str:
        """Masking of the last pre-training; `none` where only stage 1 from scratch lies behind."""
        scratch = len(self.stages) == 1 and self.stages[0].get("weights") == "fresh"
        return "none" if scratch or not self.stages else str(self.stages[-1].get("masking") or "")


@dataclass(frozen=True)
class Arm:
    """What is compared: one arm, with one fine-tuning run for each pre-training seed.

    Attributes:
        name: unique in a report.
        runs: the fine-tuning runs, all of one task.
        title: as tables show it, beside columns for labels and steps; the name by default.
        line: the arms of one line of a figure: the same policy after other lengths and on other
            numbers of labels.
        masking_steps: seconds of each step of a pipeline that chose its masks; None where nothing
            tells.
        masking_flops: operations of the same steps, those that are unknown left out.
        strategy, scores, units: of its masks; empty where nothing tells, or there are none.
        match: of a control, the line that it is the control of.
        labels: labelled examples behind it; None where nothing tells.
        stage1_steps, stage2_steps: lengths of the two stages, 0 without stage 2; None likewise.
        mid_schedule: whether stage 2 was still in the middle of its schedule.
        seeds: of pre-training, one per run, None where nothing tells; empty outside a pipeline.
        floor: whether it is a trivial baseline.
        options: further words about its policy, for a reader.
    """

    name: str
    runs: list[FinetuneRun]
    title: str = ""
    line: str = ""
    masking_steps: dict[str, float] | None = None
    masking_flops: dict[str, float] = field(default_factory=dict)
    strategy: str = ""
    scores: str = ""
    units: str = ""
    match: str = ""
    labels: int | None = None
    stage1_steps: int | None = None
    stage2_steps: int | None = None
    mid_schedule: bool = False
    seeds: tuple[int | None, ...] = ()
    floor: bool = False
    options: dict[str, str] = field(default_factory=dict)

    @property
    def task(self) -> str:
        return self.runs[0].task

    @property
    def shown(self) -> str:
        """Its name in a table that has columns for labels and steps."""
        return self.title or self.name

    @property
    def masking_seconds(self) -> float | None:
        """What choosing its masks would have cost without other arms; None if unknown."""
        return _mean_of_all([run.mask_seconds for run in self.runs])

    @property
    def masking_operations(self) -> float | None:
        """The operations of choosing its masks, likewise."""
        return _mean_of_all([run.mask_flops for run in self.runs])

    def values(self, metric: str) -> list[float]:
        """Return all values of a metric, pre-training seeds one after the other."""
        found = [number(row.get(METRICS[metric])) for run in self.runs for row in run.rows]
        return [value for value in found if value is not None]

    def correct(self) -> np.ndarray | None:
        """Return `(P, S, N)` bool, or None if predictions or seeds are missing somewhere."""
        arrays = [run.correct for run in self.runs if run.correct is not None]
        if len(arrays) < len(self.runs) or len({array.shape for array in arrays}) != 1:
            return None
        return np.stack(arrays)

    def item_values(self, metric: str) -> np.ndarray | None:
        """Return `(P, S, N)` float64 whose mean over the items is the metric of each model.

        None where predictions are missing, or belong to other results.
        """
        correct = self.correct()
        if correct is None or len({run.items_digest for run in self.runs}) != 1:
            return None
        if metric == "accuracy":
            return correct.astype(np.float64)
        run = self.runs[0]
        if run.classes is None or any(one.predictions is None for one in self.runs):
            return None
        assert run.truth is not None
        found = macro_f1_values(
            run.truth, np.stack([np.asarray(one.predictions) for one in self.runs]), run.classes)
        told = np.array(self.values(metric))
        same = len(told) == found.shape[0] * found.shape[1] and np.allclose(
            found.mean(axis=2).ravel(), told, atol=1e-6)
        return found if same else None


def _mean_of_all(values: list[float | None]) -> float | None:
    """Return the mean; None if a value is unknown."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def read_json_lines(path: Path, broken: list[str] | None = None) -> list[dict[str, Any]]:
    """Read a file with one JSON object per line.

    Args:
        broken: where to put a sentence for every bad line, instead of an error.
    Raises:
        DataError: a line is not a JSON object.
    """
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError:
                row = None
            # A seed names a folder, so it is a number and nothing else.
            if not isinstance(row, dict) or type(row.get("seed", 0)) is not int:
                where = f"{path}, line {number}: not a JSON object of ours"
                if broken is None:
                    raise DataError(f"{where}; the file is broken, delete it and run the command "
                                    "that wrote it again")
                broken.append(f"{where}, left out")
                continue
            rows.append(row)
    return rows


def read_summaries(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Read the stages behind an `hf/` folder, oldest first; none if its lineage is of no use.

    Args:
        notes: where to put a sentence about a lineage that cannot be read, or weights that are
            not those that it tells of.
    Returns:
        Of each stage what decided it, and its totals, in one dictionary.
    """
    try:
        stages = read_stages(folder)
        problem = None if _is_archived(folder) else weights_problem(folder)
    except (DataError, OSError) as error:
        notes.append(str(error))
        return []
    notes += [problem] if problem else []
    totals = ("steps", "tokens", "masked_tokens", "seconds", "flops")
    return [{"stage": stage["stage"], **flatten(stage["identity"]),
             **{key: stage["totals"].get(key) for key in totals}} for stage in stages]


def _is_archived(folder: Path) -> bool:
    """Return whether the weights of an `hf/` folder were left out when its pipeline was packed."""
    packed = any((above / ARCHIVE).is_file() for above in folder.resolve().parents)
    return packed and not any(folder.glob("*.safetensors"))


def number(value: Any) -> float | None:
    """Return a finite number from a file, or None."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if plain and math.isfinite(value) else None


def read_finetune_run(run_dir: Path | str) -> FinetuneRun:
    """Read results and predictions of a fine-tuning directory; what is broken becomes a note.

    Raises:
        DataError: no result in it, or its seeds were tested on different items.
    """
    run_dir = Path(run_dir)
    path = run_dir / "results.jsonl"
    notes: list[str] = []
    by_seed = {}
    for row in read_json_lines(path, notes) if path.is_file() else []:
        if "seed" in row and number(row.get(METRICS["accuracy"])) is not None:
            by_seed[row["seed"]] = row
    # A seed that was trained again stands last in the file; runs are paired by place.
    rows = [row for _, row in sorted(by_seed.items())]
    if not rows:
        reason = "; ".join(notes) or "results.jsonl is absent or empty"
        raise DataError(
            f"{run_dir}: holds no finished seed ({reason}); run train/finetune.py there first"
        )
    classes = rows[0].get("labels")
    num_classes = len(classes) if isinstance(classes, list) and classes else None
    answers = [read_predictions(run_dir / f"seed_{row['seed']}" / "predictions.jsonl", notes,
                                num_classes) for row in rows]
    for row, answer in zip(rows, answers, strict=True):
        notes += _disagreements(run_dir, row, answer)
    known = [answer for answer in answers if answer is not None]
    for answer in known[1:]:
        if answer.items != known[0].items:
            raise DataError(
                f"{run_dir}: its seeds have other test items than each other; the seeds of one "
                "directory must share one test split: delete it and run train/finetune.py again"
            )
    whole = len(known) == len(rows)
    # In the order of their ids; equal ones stay as they are.
    order = np.argsort(np.array(known[0].items), kind="stable") if whole else np.array([], int)

    def ordered(values: list[list[Any]]) -> np.ndarray | None:
        return np.array(values)[:, order] if whole else None

    truth = ordered([answer.labels for answer in known])
    cost = rows[0].get("pretraining")
    lineages = [read_summaries(run_dir / f"seed_{row['seed']}" / "hf", notes) for row in rows]
    made = _read_environment(run_dir)
    return FinetuneRun(
        path=run_dir,
        rows=rows,
        items_digest=digest(sorted(known[0].items)) if whole else "",
        correct=ordered([answer.right for answer in known]),
        cost={key: value for key, given in (cost if isinstance(cost, dict) else {}).items()
              if (value := number(given)) is not None},
        stages=[stage for stage in lineages[0] if stage["stage"] == "pretrain"],
        notes=notes,
        truth=None if truth is None else truth[0],
        predictions=ordered([answer.predictions for answer in known]),
        classes=num_classes,
        commit=visible(made.get("commit") or ""),
        device=visible(made.get("gpu") or made.get("processor") or ""),
    )


def _read_environment(run_dir: Path) -> dict[str, Any]:
    """Return what a run wrote about its machine; nothing if it did not, or cannot be read."""
    try:
        return read_json(run_dir / "env.json")
    except (OSError, ValueError):
        return {}


class Answers(NamedTuple):
    """The test items of one seed, in their order, and the label and the prediction of each."""

    items: tuple[str, ...]
    right: list[bool]
    labels: list[int]
    predictions: list[int]

    def macro_f1(self, num_classes: int) -> float:
        """Return the mean F1 over all classes of the task; one that does not occur counts as 0."""
        there, said = Counter(self.labels), Counter(self.predictions)
        hits = Counter(label for label, ok in zip(self.labels, self.right, strict=True) if ok)
        return sum(2 * hits[i] / max(there[i] + said[i], 1) for i in range(num_classes)
                   ) / num_classes


def _disagreements(run_dir: Path, row: dict[str, Any], answers: Answers | None) -> list[str]:
    """Say where a row of `results.jsonl` and the predictions beside it tell different things."""
    if answers is None:
        return []
    right, classes = answers.right, row.get("labels")
    where, notes = f"{run_dir}, seed {row['seed']}", []
    again = "type the finetune.py command again, it tests that seed again"
    expected = number(row.get("num_test"))
    if expected is not None and expected != len(right):
        notes.append(f"{where}: {len(right)} predictions for {expected:.0f} test items; {again}")
    counted = sum(right) / len(right) if right else math.nan
    if not math.isclose(counted, row[METRICS["accuracy"]], abs_tol=1e-6):
        notes.append(f"{where}: results.jsonl says accuracy {row[METRICS['accuracy']]:.4f}, and "
                     f"the predictions give {counted:.4f}; the means are of the former, the "
                     f"differences of the latter; {again}")
    listed = number(row.get(METRICS["macro_f1"]))
    if listed is not None and isinstance(classes, list) and classes and right:
        counted = answers.macro_f1(len(classes))
        if not math.isclose(counted, listed, abs_tol=1e-6):
            notes.append(f"{where}: results.jsonl says macro F1 {listed:.4f}, and the predictions "
                         f"give {counted:.4f}; {again}")
    return notes


def read_predictions(
    path: Path, notes: list[str], num_classes: int | None = None
) -> Answers | None:
    """Read the items of one seed's test split, and the answers.

    Args:
        notes: where to put a sentence about what is missing.
        num_classes: of the task; None if unknown.
    Returns:
        None if not all are there.
    """
    if not path.is_file():
        notes.append(f"{path}: absent, so this run is not compared")
        return None
    broken: list[str] = []
    answers = read_json_lines(path, broken)
    if broken or not answers or not all(
            isinstance(a.get("item"), str) and type(a.get("label")) is int
            and type(a.get("prediction")) is int for a in answers):
        notes.append(f"{path}: cut off or broken, so this run is not compared")
        return None
    labels, predictions = ([a[key] for a in answers] for key in ("label", "prediction"))
    given = {*labels, *predictions}
    if given and (min(given) < 0 or num_classes is not None and max(given) >= num_classes):
        notes.append(f"{path}: a class that the task has not, so this run is not compared")
        return None
    return Answers(tuple(str(a["item"]) for a in answers),
                   [a == b for a, b in zip(labels, predictions, strict=True)], labels, predictions)
