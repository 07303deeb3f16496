"""Questions to a classifier about texts: what is asked, and how surely.

A *query* is one sequence with its label. The last digits of a probability depend on what else is in
its batch (about 1e-7 in fp32), and could turn a close decision. So inputs within an edge of turning
are repeated, each alone in its pass, and decided by that: the answers are those of one query at a
time, whatever the batches and the number of ranks. (Rounding would only move the edge to where a
rounded number turns.) In fp16 the same is done once more: what is within `half_edge` of turning is
asked again in fp32, and decided there.

Letters: `N` queries, `B` inputs, `C` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from preprocess.corpus import Example, Task
from preprocess.errors import ConfigError, DataError
from preprocess.progress import Progress
from preprocess.text.encode import encode_batch, prepare_backend
from train.stages.inference import IdLists, Runner, one_by_one
from train.stages.scores import softmax

EDGE = 1e-5
"""Of a probability. A batch changed one in fp32 by at most 2e-7 (4 and 6 layers)."""


# --------------------------------------------------------------------------- from texts to queries


@dataclass(frozen=True)
class Query:
    """One sequence to be explained.

    document, sequence: where it stands in the store. label: the classifier's class.
    aspect, tokens: ids as the classifier sees them, cut to the length limit.
    """

    document: int
    sequence: int
    label: int
    aspect: list[int]
    tokens: list[int]


def match_labels(task: Task, hf_config: Any, model_name: str) -> list[int]:
    """Return the classifier's class for each label of the task, by name.

    Raises:
        ConfigError: the classifier knows other labels.
    """
    classes = {str(name): int(number) for number, name in hf_config.id2label.items()}
    if set(classes) != set(task.labels) or sorted(classes.values()) != list(
            range(hf_config.num_labels)):
        raise ConfigError(
            f"--model_name_or_path {model_name} tells {', '.join(classes)} apart, but task "
            f"{task.name} has {', '.join(task.labels)}; give a classifier fine-tuned on this task"
        )
    return [classes[label] for label in task.labels]


def group_by_text(examples: Iterable[Example]) -> dict[str, list[Example]]:
    """Group the distinct (aspect, label) examples by text, in order of first appearance."""
    groups: dict[str, dict[Example, None]] = {}
    for example in examples:
        groups.setdefault(example.text, {})[example] = None
    return {text: list(group) for text, group in groups.items()}


def encode_texts(tokenizer: Any, texts: list[str], language: str | None) -> list[list[np.ndarray]]:
    """Return the ids of each text's sentences, uint16, cut as `tokenize_corpus.py` cuts them.

    Args:
        language: of the sentences; None keeps a text in one sequence.
    Returns:
        A list of sequences for each text, empty for a text without a token.
    """
    backend = prepare_backend(tokenizer)
    documents = []
    for text in texts:
        ids, lengths, _, _ = encode_batch(backend, [text], language)
        documents.append(np.split(ids, np.cumsum(lengths)[:-1]) if len(ids) else [])
    return documents


def cut_to_fit(aspect: list[int], tokens: list[int], limit: int) -> tuple[list[int], list[int]]:
    """Cut aspect and text so that both fit into `limit` tokens; the text keeps at least half."""
    aspect = aspect[: max(limit - len(tokens), limit // 2)]
    return aspect, tokens[: limit - len(aspect)]


def plan_queries(
    groups: list[list[Example]],
    documents: list[list[np.ndarray]],
    classes: list[int],
    tokenizer: Any,
    limit: int,
) -> list[Query]:
    """List the questions to the classifier: every sequence of every text, once per aspect.

    Args:
        groups: the examples of each document's text.
        documents: ids of its sequences.
        classes: the classifier's class of each label.
        limit: tokens that an input holds beside its special tokens.
    """
    backend = prepare_backend(tokenizer)
    queries = []
    for number, (group, sequences) in enumerate(zip(groups, documents, strict=True)):
        for example in group:
            aspect = []
            if example.aspect:
                aspect = encode_batch(backend, [example.aspect], None)[0].tolist()
            for position, sequence in enumerate(sequences):
                if len(sequence):
                    parts = cut_to_fit(aspect, sequence.tolist(), limit)
                    queries.append(Query(number, position, classes[example.label], *parts))
    return queries


# --------------------------------------------------------------------------- asking


def half_edge(one: np.ndarray, other: np.ndarray, most: float) -> np.ndarray:
    """Return by how much fp16 may change the difference of two probabilities, `(B,)` float64.

    A logit that is off by e changes P by at most e P (1 - P); 0.03 is half as much again as the
    2e-2 that log-odds may be off.
    """
    return np.minimum(0.03 * (one * (1 - one) + other * (1 - other)) + EDGE, most)


class Way(NamedTuple):
    """One way to ask, and within what of turning its answers are asked again in a surer one.

    name: of the count of inputs that were asked again in this way.
    edge: two probabilities, `(B,)` each, and the largest edge -> edge, a number or `(B,)`.
    """

    name: str
    runner: Runner
    edge: Callable[[np.ndarray, np.ndarray, float], Any]


class Classifier:
    """Logits of the classes for inputs in place of the text of some queries.

    ways: from the quickest to the surest: in fp16 if the runner is, in fp32, and each input alone.
        The runner's counts have the inputs that were asked again, "fp32" and "alone".
    texts, aspects: ids of the queries. labels: their classes, `(N,)` int64.
    """

    def __init__(self, runner: Runner, queries: list[Query], edge: float) -> None:
        exact = replace(runner, half=None)  # with the same counts
        alone = replace(exact, cut=one_by_one, min_width=0)
        self.ways = [Way("fp32", exact, lambda *_: edge), Way("alone", alone, lambda *_: 0.0)]
        if runner.half:
            self.ways.insert(0, Way("fp16", runner, half_edge))
        self.texts = IdLists.of([query.tokens for query in queries])
        self.aspects = IdLists.of([query.aspect for query in queries])
        self.labels = np.array([query.label for query in queries], dtype=np.int64)
        shape = len(self.ways), len(queries), runner.model.config.num_labels
        self._whole = np.full(shape, np.nan)

    def logits(
        self, which: np.ndarray, texts: IdLists, level: int, progress: Progress | None = None
    ) -> np.ndarray:
        """Return the logit of every class, `(B, C)` float64.

        Args:
            which: the query of each text, `(B,)` int64.
            level: number of the way to ask.
        """
        name, runner, _ = self.ways[level]
        if level:
            runner.counts[name] += len(which)
        aspects = self.aspects.take(which) if runner.template.between else None
        found = np.zeros((len(which), self._whole.shape[2]))
        for batch, logits, _ in runner.run(texts, aspects):
            found[batch] = logits
            if progress:
                progress.update(len(batch))
        return found

    def whole(self, which: np.ndarray, level: int) -> np.ndarray:
        """Return the logits of complete sequences, `(B, C)` float64; asked only once."""
        known = self._whole[level]
        new = np.unique(which[np.isnan(known[which, 0])])
        if len(new):
            known[new] = self.logits(new, self.texts.take(new), level)
        return known[which]

    def confidence(self, which: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """Return P of the right classes of queries, `(B,)` float64."""
        return softmax(logits)[np.arange(len(which)), self.labels[which]]

    def log_odds(self, which: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """Return the log-odds of the right classes of queries, `(B,)` float64."""
        from scipy.special import logsumexp

        right = np.zeros(logits.shape, bool)
        right[np.arange(len(which)), self.labels[which]] = True
        return logits[right] - logsumexp(np.where(right, -np.inf, logits), axis=1)

    def find_right(self, progress: Progress) -> np.ndarray:
        """Return the queries whose complete sequences are classified correctly, `(M,)` int64.

        Raises:
            DataError: the classifier's answers are not numbers.
        """
        is_right = np.zeros(len(self.texts), bool)
        todo = np.arange(len(self.texts))
        for level, way in enumerate(self.ways):
            if not len(todo):
                break
            logits = self.logits(
                todo, self.texts.take(todo), level, None if level else progress)
            if np.isnan(logits).any():
                raise DataError("the classifier's logits are not numbers; fine-tune it again")
            self._whole[level, todo] = logits
            is_right[todo] = logits.argmax(1) == self.labels[todo]
            ascending = np.sort(softmax(logits), axis=1)
            first, second = ascending[:, -1], ascending[:, :-1].max(1, initial=0)
            todo = todo[first - second < way.edge(first, second, 1.0)]
        return np.flatnonzero(is_right)
