"""Metrics of predictions, by scikit-learn: accuracy, F1, average precision; 0 where undefined."""

from __future__ import annotations

import numpy as np


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return the share of equal entries of two `(N,)` integer arrays."""
    return float(np.mean(labels == predictions))


def least_share(count: int, total: int, confidence: float = 0.95) -> float:
    """Return the lower end of the exact one-sided interval of a share (Clopper and Pearson)."""
    from scipy.stats import beta

    return float(beta.ppf(1 - confidence, count, total - count + 1)) if count else 0.0


def precision_recall_f1(labels: np.ndarray, predictions: np.ndarray) -> tuple[float, float, float]:
    """Return precision, recall and F1 of the true entries of two `(N,)` bool arrays."""
    from sklearn.metrics import precision_recall_fscore_support

    found = precision_recall_fscore_support(
        labels, predictions, average="binary", zero_division=0.0
    )
    return float(found[0]), float(found[1]), float(found[2])


def macro_f1(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> float:
    """Return the mean F1 over all classes of the task; a class that does not occur counts as 0."""
    from sklearn.metrics import f1_score

    return float(f1_score(
        labels, predictions, labels=range(num_classes), average="macro", zero_division=0.0
    ))


def per_class(
    labels: np.ndarray, predictions: np.ndarray, num_classes: int
) -> list[dict[str, float]]:
    """Return precision, recall, F1 and support (the examples) of each class, 0 where undefined."""
    from sklearn.metrics import precision_recall_fscore_support

    columns = precision_recall_fscore_support(
        labels, predictions, labels=range(num_classes), zero_division=0.0)
    return [{"precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
            for p, r, f, n in zip(*columns, strict=True)]


def confusion_matrix(
    labels: np.ndarray, predictions: np.ndarray, num_classes: int
) -> list[list[int]]:
    """Count the examples of each class (rows) by the prediction (columns)."""
    from sklearn.metrics import confusion_matrix as count

    table: np.ndarray = count(labels, predictions, labels=range(num_classes))
    return table.tolist()


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Return the area under the precision-recall steps, ties taken together.

    Args:
        labels: `(N,)` bool.
        scores: `(N,)` float, larger is more likely true.
    """
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(labels, scores)) if np.any(labels) else 0.0


def best_threshold(labels: np.ndarray, scores: np.ndarray) -> float:
    """Return the score from which on calling an entry true gives the best F1.

    Of several, the highest; without a true entry, the highest score.
    """
    from sklearn.metrics import precision_recall_curve

    if not np.any(labels):
        return float(np.max(scores))
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return float(thresholds[::-1][np.argmax(f1[-2::-1])])  # the last point has no threshold


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities along the last axis, float64."""
    from scipy.special import softmax as along

    return along(logits.astype(float), axis=-1)
