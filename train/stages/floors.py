"""Trivial baselines of a task: naive Bayes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from preprocess.corpus import Example, Task
from preprocess.files import write_json_lines
from train.stages.answers import make_answers, score_answers

WORD = r"\w+(?:'\w+)?"


def naive_bayes_probabilities(
    train_texts: Sequence[str],
    train_labels: Sequence[int],
    test_texts: Sequence[str],
    *,
    num_labels: int,
) -> np.ndarray:
    """Return class probabilities of a multinomial naive Bayes on counts of lower-case words.

    Args:
        train_texts, train_labels: the training split; labels in `[0, num_labels)`.
        test_texts: texts to classify; words not seen in training count for nothing, and a class
            without training texts is impossible.
    Returns:
        `(N, num_labels)` float64, rows sum to 1.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB

    counter = CountVectorizer(token_pattern=WORD)
    model = MultinomialNB()  # one is added to every count
    with np.errstate(divide="ignore"):  # log 0, the prior of a class without texts
        model.partial_fit(counter.fit_transform(train_texts), train_labels, range(num_labels))
    return model.predict_proba(counter.transform(test_texts))


def write_naive_bayes(task: Task, run_dir: Path | str) -> None:
    """Train and test naive Bayes on the task's sentences, in the layout of a fine-tuning run.

    An aspect counts as one more word of its text. There is nothing random in it: one row, with
    seed 0.
    """
    def text_of(example: Example) -> str:
        aspect = re.findall(WORD, (example.aspect or "").lower())
        return example.text + (f" aspect_{'_'.join(aspect)}" if aspect else "")

    texts = {split: [text_of(e) for e in task.splits[split]] for split in ("train", "test")}
    test = task.splits["test"]
    probabilities = naive_bayes_probabilities(
        texts["train"], [e.label for e in task.splits["train"]], texts["test"],
        num_labels=len(task.labels),
    )
    labels = np.array([e.label for e in test])
    predictions = probabilities.argmax(axis=1)
    row = {"seed": 0, "task": task.name, "labels": list(task.labels),
           **score_answers(task, labels, predictions)}
    answers = make_answers(test, task.labels, probabilities)
    run_dir = Path(run_dir)
    (run_dir / "seed_0").mkdir(parents=True, exist_ok=True)
    write_json_lines(run_dir / "seed_0" / "predictions.jsonl", answers)
    write_json_lines(run_dir / "results.jsonl", [row])
