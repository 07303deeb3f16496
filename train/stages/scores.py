"""Metrics of predictions: accuracy, F1, average precision."""

from __future__ import annotations

import numpy as np


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Share of equal entries of two `(N,)` integer arrays."""
    return float(np.mean(labels == predictions))


def precision_recall_f1(labels: np.ndarray, predictions: np.ndarray) -> tuple[float, float, float]:
    """Precision, recall and F1 of the true entries of two `(N,)` bool arrays; 0 where undefined."""
    hits = int(np.sum(labels & predictions))
    num_predicted, num_true = int(np.sum(predictions)), int(np.sum(labels))
    precision = hits / num_predicted if num_predicted else 0.0
    recall = hits / num_true if num_true else 0.0
    total = num_predicted + num_true
    return precision, recall, 2 * hits / total if total else 0.0


def macro_f1(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> float:
    """Mean F1 over all classes of the task, those that do not occur included (as 0)."""
    scores = [precision_recall_f1(labels == c, predictions == c)[2] for c in range(num_classes)]
    return float(np.mean(scores))


def _cuts(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each distinct score, best first: the score, the hits and the count at or above it."""
    order = np.argsort(-scores, kind="stable")
    sorted_scores = scores[order]
    last_of_tie = np.append(np.flatnonzero(np.diff(sorted_scores)), len(scores) - 1)
    hits = np.cumsum(labels[order])[last_of_tie]
    return sorted_scores[last_of_tie], hits, last_of_tie + 1


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the precision-recall steps, ties taken together; 0 without a true entry.

    Args:
        labels: `(N,)` bool.
        scores: `(N,)` float, larger is more likely true.
    """
    num_true = int(np.sum(labels))
    if not num_true:
        return 0.0
    _, hits, counts = _cuts(labels, scores)
    gained = np.diff(hits, prepend=0) / num_true
    return float(np.sum(gained * hits / counts))


def best_threshold(labels: np.ndarray, scores: np.ndarray) -> float:
    """The score from which on calling an entry true gives the best F1; the highest of equals."""
    thresholds, hits, counts = _cuts(labels, scores)
    return float(thresholds[np.argmax(2 * hits / (counts + np.sum(labels)))])


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis, float64."""
    powers = np.exp(logits.astype(float) - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)
