"""What a classifier answers on the test split: one row per text, and numbers per class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from preprocess.corpus import Example, Task
from train.stages.scores import accuracy, confusion_matrix, least_share, macro_f1, per_class


def make_answers(
    examples: Sequence[Example], labels: Sequence[str], probabilities: np.ndarray
) -> list[dict[str, Any]]:
    """Return the rows of `predictions.jsonl`.

    `label` and `prediction` are indices into the task's labels, with the names beside them, and
    `probabilities` has one number per label, in their order.

    Args:
        labels: names of the task's labels.
        probabilities: `(N, C)` float, of the examples.
    """
    rows = []
    for example, row in zip(examples, probabilities, strict=True):
        prediction = int(row.argmax())
        aspect = {} if example.aspect is None else {"aspect": example.aspect}
        rows.append({
            "item": example.item, "text": example.text, **aspect,
            "label": example.label, "label_name": labels[example.label],
            "prediction": prediction, "prediction_name": labels[prediction],
            "probabilities": [round(float(p), 6) for p in row],
        })
    return rows


def score_answers(task: Task, labels: np.ndarray, predictions: np.ndarray) -> dict[str, Any]:
    """Return what a row of `results.jsonl` says of the test split, `(N,)` int64 each.

    `per_class` has precision, recall, F1 and support of each label, by its name; the row i and
    column j of `confusion_matrix` is the number of texts of label i that were called j.
    """
    return {
        "test_accuracy": accuracy(labels, predictions),
        "test_macro_f1": macro_f1(labels, predictions, len(task.labels)),
        "per_class": dict(zip(task.labels, per_class(labels, predictions, len(task.labels)),
                              strict=True)),
        "confusion_matrix": confusion_matrix(labels, predictions, len(task.labels)),
    }


def find_weak(labels: np.ndarray, predictions: np.ndarray) -> list[str]:
    """Say whether a classifier is not clearly above the majority class of the test split."""
    total, right = len(labels), int((labels == predictions).sum())
    majority = float(np.bincount(labels).max() / total)
    least = least_share(right, total)
    if least > majority:
        return []
    return [f"test accuracy {right / total:.4f} on {total:,} examples is not clearly above "
            f"{majority:.4f}, that of always giving the most frequent label (with 95 % confidence "
            f"it is {least:.4f} or more); train longer, with another --learning_rate or on more "
            "labels"]
