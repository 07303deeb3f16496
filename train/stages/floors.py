"""Trivial baselines of a task: naive Bayes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from preprocess.corpus import Task


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
    from preprocess.files import atomic_write_bytes
    from train.stages.scores import accuracy, macro_f1

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
