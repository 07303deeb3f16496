"""Reads what fine-tuning left behind: means, paired intervals and floors.

It owns the shape of `results.jsonl` and `predictions.jsonl` as seen by a reader, the interval
of a difference between two arms, and the naive Bayes floor. It runs no network and draws no
figure; `train/report.py` and `train/pipeline.py` share it.

Letters: `P` pre-training seeds, `S` fine-tuning seeds, `N` test items.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from preprocess.errors import DataError

if TYPE_CHECKING:
    from preprocess.corpus import Task

METRICS = {"accuracy": "test_accuracy", "macro_f1": "test_macro_f1"}
TABLE_COLUMNS = ("arm", "task", "metric", "mean", "sd", "seeds", "masked_tokens", "steps",
                 "seconds")
DIFFERENCE_COLUMNS = ("arm", "against", "metric", "difference", "low", "high", "seeds", "items")
RESAMPLES = 10_000


@dataclass(frozen=True)
class FinetuneRun:
    """One finished fine-tuning directory: one model a seed, all tested on the same items.

    Attributes:
        path: the directory.
        rows: `results.jsonl`, one dictionary a seed, in the order of the file.
        items: ids of the test items, in the order of the test split; empty without predictions.
        correct: whether seed s is right about item n, `(S, N)` bool; None without predictions.
        cost: masked_tokens, steps and seconds of all pre-training behind the run.
    """

    path: Path
    rows: list[dict[str, Any]]
    items: tuple[str, ...]
    correct: np.ndarray | None
    cost: dict[str, float]

    @property
    def task(self) -> str:
        return str(self.rows[0].get("task", ""))

    @property
    def seeds(self) -> list[int]:
        return [int(row["seed"]) for row in self.rows]


@dataclass(frozen=True)
class Arm:
    """What is compared: one arm, with one fine-tuning run for each pre-training seed."""

    name: str
    runs: list[FinetuneRun]

    def values(self, metric: str) -> list[float]:
        """All values of a metric, pre-training seeds one after the other."""
        key = METRICS[metric]
        return [float(row[key]) for run in self.runs for row in run.rows if key in row]

    def correct(self) -> np.ndarray | None:
        """`(P, S, N)` bool, or None if predictions or seeds are missing somewhere."""
        arrays = [run.correct for run in self.runs if run.correct is not None]
        if len(arrays) < len(self.runs) or len({array.shape for array in arrays}) != 1:
            return None
        return np.stack(arrays)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object a line.

    Raises:
        DataError: a line is not a JSON object.
    """
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            # A seed names a folder, so it is a number and nothing else.
            if not isinstance(row, dict) or type(row.get("seed", 0)) is not int:
                raise DataError(
                    f"{path}, line {number}: not a JSON object of ours; the file is broken, delete "
                    "it and run the command that wrote it again"
                )
            rows.append(row)
    return rows


def finished_seeds(run_dir: Path) -> list[int]:
    """Seeds that have a row in `run_dir/results.jsonl` and their predictions."""
    path = Path(run_dir) / "results.jsonl"
    if not path.is_file():
        return []
    seeds = [int(row["seed"]) for row in read_json_lines(path) if "seed" in row]
    return [seed for seed in seeds if (path.parent / f"seed_{seed}/predictions.jsonl").is_file()]


def read_finetune_run(run_dir: Path | str) -> FinetuneRun:
    """Read results and predictions of a fine-tuning directory.

    Raises:
        DataError: no result in it, or its seeds were tested on different items.
    """
    run_dir = Path(run_dir)
    path = run_dir / "results.jsonl"
    rows = [row for row in read_json_lines(path) if "seed" in row] if path.is_file() else []
    if not rows:
        raise DataError(
            f"{run_dir}: holds no finished seed (results.jsonl is absent or empty); run "
            "train/finetune.py there first"
        )
    items: tuple[str, ...] | None = None
    correct: list[list[bool]] = []
    for row in rows:
        predictions_path = run_dir / f"seed_{row['seed']}" / "predictions.jsonl"
        if not predictions_path.is_file():
            items, correct = (), []
            break
        predictions = read_json_lines(predictions_path)
        these = tuple(str(p["item"]) for p in predictions)
        if items is not None and these != items:
            raise DataError(
                f"{predictions_path}: other test items than the seeds before it; the seeds of "
                "one directory must share one test split: delete it and run train/finetune.py again"
            )
        items = these
        correct.append([p["prediction"] == p["label"] for p in predictions])
    return FinetuneRun(
        path=run_dir,
        rows=rows,
        items=items or (),
        correct=np.array(correct, dtype=bool) if correct else None,
        cost=dict(rows[0].get("pretraining") or {}),
    )


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the latter is nan for a single value."""
    if not values:
        raise ValueError("mean_and_sd needs at least one value")
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else math.nan


def paired_interval(
    first: np.ndarray,
    second: np.ndarray,
    *,
    confidence: float = 0.95,
    num_resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Difference of two arms' accuracies, with a paired bootstrap interval.

    Pre-training seeds, fine-tuning seeds and test items are each resampled with replacement; the
    two arms stay paired throughout (seed s with seed s, item n with item n). Of `k` units `k-1`
    are drawn: with `k` draws the bootstrap's variance of a mean is `(k-1)/k` times too small, a
    third for three seeds. What varies with seed and item together is counted once for each of
    them, so the interval errs on the wide side: in simulations with three seeds and 500 items it
    was 1.2 to 1.7 times as wide as the exact one, and covered 93 to 100 %.

    Args:
        first, second: whether each answer is right, `(P, S, N)` bool or float.
        confidence: coverage of the interval, in (0, 1).
        num_resamples: bootstrap samples.
        seed: of the resampling; equal arguments give equal intervals.
    Returns:
        `(difference, low, high)`, first minus second.
    Raises:
        ValueError: the arms differ in shape, or there is nothing to compare.
    """
    if first.shape != second.shape or first.ndim != 3 or 0 in first.shape:
        raise ValueError(
            f"paired arms need one shape (P, S, N) without empty axes: got {first.shape} and "
            f"{second.shape}"
        )
    delta = first.astype(np.float64) - second.astype(np.float64)
    num_pretrain, num_seeds, num_items = delta.shape
    by_run = delta.reshape(num_pretrain * num_seeds, num_items)
    generator = np.random.default_rng(seed)
    samples = np.empty(num_resamples)
    block = max(1, 2_000_000 // num_items)
    for start in range(0, num_resamples, block):
        size = min(block, num_resamples - start)
        pretrain_weights = _resampled(generator, size, num_pretrain)
        seed_weights = _resampled(generator, size, num_seeds)
        run_weights = (pretrain_weights[:, :, None] * seed_weights[:, None, :]).reshape(size, -1)
        item_weights = _resampled(generator, size, num_items)
        samples[start : start + size] = ((run_weights @ by_run) * item_weights).sum(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return float(delta.mean()), float(low), float(high)


def _resampled(generator: np.random.Generator, size: int, count: int) -> np.ndarray:
    """Weights of `count` units in each of `size` samples of `count - 1` draws; rows sum to 1."""
    draws = max(count - 1, 1)
    return generator.multinomial(draws, np.full(count, 1 / count), size=size) / draws


def table_rows(arms: Iterable[Arm]) -> list[dict[str, Any]]:
    """One row for each arm and metric, with the keys of `TABLE_COLUMNS`.

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
                "arm": arm.name, "task": arm.runs[0].task, "metric": metric,
                "mean": f"{mean:.4f}", "sd": "" if math.isnan(sd) else f"{sd:.4f}",
                "seeds": len(values), **cost,
            })
    return rows


def difference_rows(pairs: Iterable[tuple[Arm, Arm]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Differences in accuracy with their 95 % intervals, keys as in `DIFFERENCE_COLUMNS`.

    An arm without stage 2 has one run, the others one for each pre-training seed: the single
    run is then compared with each of them.

    Returns:
        `(rows, notes)`; a note is a sentence about a pair that cannot be compared, and why.
    """
    rows, notes = [], []
    for first, second in pairs:
        one, two = first.correct(), second.correct()
        reason = _not_comparable(first, second)
        if reason or one is None or two is None:
            notes.append(f"{first.name} and {second.name} are not compared: {reason}.")
            continue
        one, two = np.broadcast_arrays(one, two)
        difference, low, high = paired_interval(one, two)
        rows.append({
            "arm": first.name, "against": second.name, "metric": "accuracy",
            "difference": f"{difference:+.4f}", "low": f"{low:+.4f}", "high": f"{high:+.4f}",
            "seeds": one.shape[0] * one.shape[1], "items": one.shape[2],
        })
    return rows, notes


def _not_comparable(first: Arm, second: Arm) -> str | None:
    one, two = first.correct(), second.correct()
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


def format_table(rows: list[dict[str, Any]], columns: Sequence[str]) -> str:
    """Rows as aligned text: words to the left, numbers to the right."""
    cells = [[str(row[column]) for column in columns] for row in rows]
    widths = [max([len(c), *(len(row[i]) for row in cells)]) for i, c in enumerate(columns)]
    numeric = [
        all(re.fullmatch(r"[+-]?[\d.]*", row[i]) for row in cells) for i in range(len(columns))
    ]
    lines = []
    for row in [list(columns), *cells]:
        parts = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def split_words(text: str) -> list[str]:
    """Lower-case words of a text, the features of the naive Bayes floor."""
    return re.findall(r"\w+(?:'\w+)?", text.lower())


def naive_bayes_probabilities(
    train_texts: Sequence[str],
    train_labels: Sequence[int],
    test_texts: Sequence[str],
    *,
    num_labels: int,
    smoothing: float = 1.0,
) -> np.ndarray:
    """Class probabilities of a multinomial naive Bayes on word counts.

    Args:
        train_texts, train_labels: the training split; labels in `[0, num_labels)`.
        test_texts: texts to classify; words not seen in training count for nothing.
        smoothing: added to every word's count.
    Returns:
        `(N, num_labels)` float64, rows sum to 1.
    Raises:
        ValueError: there is no training text.
    """
    if not train_texts:
        raise ValueError("naive Bayes needs at least one training text")
    vocabulary: dict[str, int] = {}
    words, labels = [], []
    for text, label in zip(train_texts, train_labels, strict=True):
        for word in split_words(text):
            words.append(vocabulary.setdefault(word, len(vocabulary)))
            labels.append(label)
    counts = np.full((num_labels, len(vocabulary)), smoothing)
    np.add.at(counts, (np.array(labels, np.int64), np.array(words, np.int64)), 1)
    log_words = np.log(counts / counts.sum(axis=1, keepdims=True))
    with np.errstate(divide="ignore"):  # a class without training texts is impossible: log 0
        log_prior = np.log(np.bincount(train_labels, minlength=num_labels) / len(train_labels))
    scores = np.empty((len(test_texts), num_labels))
    for row, text in enumerate(test_texts):
        known = [vocabulary[word] for word in split_words(text) if word in vocabulary]
        scores[row] = log_prior + log_words[:, known].sum(axis=1)
    scores -= scores.max(axis=1, keepdims=True)
    probabilities = np.exp(scores)
    return probabilities / probabilities.sum(axis=1, keepdims=True)


def write_naive_bayes(task: Task, run_dir: Path | str) -> None:
    """Train and test naive Bayes on the task's sentences, in the layout of a fine-tuning run.

    An aspect counts as one more word of its text. There is nothing random in it: one row, with
    seed 0.
    """
    from preprocess.store import atomic_write_bytes
    from train.supervised import accuracy, macro_f1

    texts = {
        split: [
            f"{e.text} aspect_{'_'.join(split_words(e.aspect))}" if e.aspect else e.text
            for e in task.splits[split]
        ]
        for split in ("train", "test")
    }
    test = task.splits["test"]
    probabilities = naive_bayes_probabilities(
        texts["train"], [e.label for e in task.splits["train"]], texts["test"],
        num_labels=len(task.labels),
    )
    labels = np.array([e.label for e in test])
    predictions = probabilities.argmax(axis=1)
    row = {
        "seed": 0, "task": task.name,
        "test_accuracy": accuracy(labels, predictions),
        "test_macro_f1": macro_f1(labels, predictions, len(task.labels)),
    }
    answers = [
        {"item": e.item, "label": e.label, "prediction": int(guess), "probabilities": p.tolist()}
        for e, guess, p in zip(test, predictions, probabilities, strict=True)
    ]
    run_dir = Path(run_dir)
    (run_dir / "seed_0").mkdir(parents=True, exist_ok=True)
    for path, rows in (
        (run_dir / "seed_0" / "predictions.jsonl", answers),
        (run_dir / "results.jsonl", [row]),
    ):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        atomic_write_bytes(path, lines.encode("utf-8"))
