"""Read what fine-tuning left behind: means, and differences between arms.

It owns the shape of `results.jsonl` and `predictions.jsonl` as seen by a reader, and what may be
compared with what. It runs no network and draws no figure; `train/report.py` and
`train/pipeline.py` share it.

Letters: `P` pre-training seeds, `S` fine-tuning seeds, `N` test items.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from preprocess.errors import DataError, visible
from preprocess.files import parse_json
from preprocess.identity import flatten
from train.reports.intervals import paired_difference
from train.run_dir.hf_folder import read_stages, weights_problem

ARCHIVE = "archive.json"  # in a folder that `train/pipeline.py --archive` packed without weights
METRICS = {"accuracy": "test_accuracy", "macro_f1": "test_macro_f1"}
TABLE_COLUMNS = ("arm", "strategy", "scores", "units", "task", "metric", "mean", "sd", "seeds",
                 "masked_tokens", "steps", "seconds")
DIFFERENCE_COLUMNS = ("arm", "against", "difference", "low", "high", "detectable", "seeds", "items")


@dataclass(frozen=True)
class FinetuneRun:
    """One finished fine-tuning directory: one model per seed, all tested on the same items.

    Attributes:
        path: the directory.
        rows: `results.jsonl`, one dictionary per seed, in the order of the file.
        items: ids of the test items, in the order of the test split; empty without predictions.
        correct: whether seed s is right about item n, `(S, N)` bool; None without predictions.
        cost: masked_tokens, steps and seconds of all pre-training behind the run.
        stages: the pre-training stages behind it as `read_summaries` gives them; empty
            where nothing tells.
        notes: a sentence for everything that could not be read.
    """

    path: Path
    rows: list[dict[str, Any]]
    items: tuple[str, ...]
    correct: np.ndarray | None
    cost: dict[str, float]
    stages: list[dict[str, Any]]
    notes: list[str]

    @property
    def task(self) -> str:
        return visible(self.rows[0].get("task", ""))

    @property
    def seeds(self) -> list[int]:
        return [int(row["seed"]) for row in self.rows]

    @property
    def weights(self) -> str | None:
        """Digest of the weights that were fine-tuned, where the rows tell it."""
        try:
            return str(self.rows[0]["identity"]["inputs"]["weights"] or "") or None
        except (KeyError, TypeError):
            return None

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
        line: the arms of one line of a figure: the same masking after other lengths of stage 1.
        masking_steps: seconds of each step of a pipeline that chose its masks; None where nothing
            tells.
        strategy, scores, units: of its masks; empty where nothing tells, or there are none.
        match: of a control, the line that it is the control of.
    """

    name: str
    runs: list[FinetuneRun]
    line: str = ""
    masking_steps: dict[str, float] | None = None
    strategy: str = ""
    scores: str = ""
    units: str = ""
    match: str = ""

    @property
    def task(self) -> str:
        return self.runs[0].task

    @property
    def masking_seconds(self) -> float | None:
        """What choosing its masks would have cost without other arms; None if unknown."""
        return None if self.masking_steps is None else sum(self.masking_steps.values())

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
    totals = ("steps", "tokens", "masked_tokens", "seconds")
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
    rows = list(by_seed.values())
    if not rows:
        reason = "; ".join(notes) or "results.jsonl is absent or empty"
        raise DataError(
            f"{run_dir}: holds no finished seed ({reason}); run train/finetune.py there first"
        )
    answers = [read_predictions(run_dir / f"seed_{row['seed']}" / "predictions.jsonl", notes)
               for row in rows]
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
    cost = rows[0].get("pretraining")
    lineages = [read_summaries(run_dir / f"seed_{row['seed']}" / "hf", notes) for row in rows]
    return FinetuneRun(
        path=run_dir,
        rows=rows,
        items=known[0].items if whole else (),
        correct=np.array([answer.right for answer in known], dtype=bool) if whole else None,
        cost={key: value for key, given in (cost if isinstance(cost, dict) else {}).items()
              if (value := number(given)) is not None},
        stages=[stage for stage in lineages[0] if stage["stage"] == "pretrain"],
        notes=notes,
    )


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


def read_predictions(path: Path, notes: list[str]) -> Answers | None:
    """Read the items of one seed's test split, and the answers.

    Args:
        notes: where to put a sentence about what is missing.
    Returns:
        None if not all are there.
    """
    if not path.is_file():
        notes.append(f"{path}: absent, so this run is not compared")
        return None
    broken: list[str] = []
    answers = read_json_lines(path, broken)
    if broken or not all(isinstance(a.get("item"), str) and type(a.get("label")) is int
                         and type(a.get("prediction")) is int for a in answers):
        notes.append(f"{path}: cut off or broken, so this run is not compared")
        return None
    labels, predictions = ([a[key] for a in answers] for key in ("label", "prediction"))
    return Answers(tuple(str(a["item"]) for a in answers),
                   [a == b for a, b in zip(labels, predictions, strict=True)], labels, predictions)


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation; the latter is nan for a single value."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else math.nan


def table_rows(arms: Iterable[Arm]) -> list[dict[str, Any]]:
    """Make one row per arm and metric, with the keys of `TABLE_COLUMNS`.

    The cost columns are means over the arm's pre-training seeds, empty where the rows do not tell.
    """
    rows = []
    for arm in arms:
        cost = {}
        for key in ("masked_tokens", "steps", "seconds"):
            known = [run.cost[key] for run in arm.runs if key in run.cost]
            cost[key] = round(sum(known) / len(known)) if known else ""
        for metric in METRICS:
            values = arm.values(metric)
            if not values:
                continue
            mean, sd = mean_and_sd(values)
            rows.append({
                "arm": arm.name, "strategy": arm.strategy, "scores": arm.scores,
                "units": arm.units, "task": arm.runs[0].task, "metric": metric,
                "mean": f"{mean:.4f}", "sd": "" if math.isnan(sd) else f"{sd:.4f}",
                "seeds": len(values), **cost,
            })
    return rows


def difference_rows(pairs: Iterable[tuple[Arm, Arm]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Compute differences in accuracy with their 95 % intervals, keys as in `DIFFERENCE_COLUMNS`.

    An arm without stage 2 has one run, the others one for each pre-training seed: the single
    run is then compared with each of them.

    Returns:
        `(rows, notes)`; a note is a sentence about a pair that cannot be compared, and why, or
        about chance that an interval cannot count.
    """
    rows, notes, compared, alike = [], [], [], []
    for first, second in pairs:
        one, two = first.correct(), second.correct()
        reason = _not_comparable(first, second)
        if reason or one is None or two is None:
            notes.append(f"{first.name} and {second.name} are not compared: {reason}.")
            continue
        one, two = np.broadcast_arrays(one, two)
        found = paired_difference(one, two)
        if found.standard_error == 0:
            alike.append(f"{first.name} and {second.name}")
        rows.append({
            "arm": first.name, "against": second.name,
            "difference": f"{found.mean:+.4f}", "low": f"{found.low:+.4f}",
            "high": f"{found.high:+.4f}",
            "detectable": f"{found.detectable:.4f}" if found.standard_error else "",
            "seeds": f"{one.shape[0]}x{one.shape[1]}", "items": one.shape[2],
        })
        compared.append((first, second))
    if alike:
        notes.append(f"An interval without width says nothing: {', '.join(alike)} differ by the "
                     "same at every seed and item.")
    return rows, notes + uncounted_chance(compared)


def uncounted_chance(pairs: Sequence[tuple[Arm, Arm]]) -> list[str]:
    """Describe the sources of chance that the intervals of these pairs leave out."""
    arms = list({arm.name: arm for pair in pairs for arm in pair}.values())

    def named(chosen: Iterable[Arm]) -> str:
        return ", ".join(dict.fromkeys(arm.name for arm in chosen))

    notes = []
    single = [arm for arm in arms if len(arm.runs) == 1]
    if single:
        notes.append(
            f"One pre-training seed lies behind {named(single)}: the intervals of their "
            "differences cannot count the chance of that pre-training, and are too narrow. Seeds "
            "of fine-tuning that share one checkpoint are no independent evidence."
        )
    if any(arm.correct().shape[1] == 1 for arm in arms):  # type: ignore[union-attr]
        few = [arm for arm in arms if len(arm.runs[0].seeds) == 1]
        notes.append(f"One fine-tuning seed lies behind {named(few)}: the chance of fine-tuning "
                     "is not counted there.")
    shared = [arm for arm in arms if len(arm.runs) > 1 and _shares_stage_1(arm)]
    if shared:
        notes.append(
            f"The pre-training seeds of {named(shared)} are of stage 2 and start from one stage-1 "
            "checkpoint: the chance of stage 1 is not counted."
        )
    for arm in arms:
        prints = [run.weights for run in arm.runs if run.weights]
        if len(set(prints)) < len(prints):
            notes.append(f"{arm.name}: some of its runs were fine-tuned from one and the same "
                         "checkpoint, so they are no separate pre-training seeds.")
    return notes


def _shares_stage_1(arm: Arm) -> bool:
    stages = arm.runs[0].stages[:-1]
    return bool(stages) and all(run.stages[:-1] == stages for run in arm.runs)


def _not_comparable(first: Arm, second: Arm) -> str | None:
    one, two = first.correct(), second.correct()
    if first.task != second.task:
        return f"they are of different tasks ({first.task} and {second.task})"
    if one is None or two is None:
        return "predictions.jsonl of some seed is missing, or their runs have different seeds"
    runs = [*first.runs, *second.runs]
    if len({run.items for run in runs}) != 1:
        return "they were tested on different items"
    single_seeds = one.shape[1] == 1 or two.shape[1] == 1
    if not single_seeds and len({tuple(run.seeds) for run in runs}) != 1:
        return "they have different fine-tuning seeds"
    if one.shape[0] != two.shape[0] and 1 not in (one.shape[0], two.shape[0]):
        return "they have different numbers of pre-training seeds"
    return None
