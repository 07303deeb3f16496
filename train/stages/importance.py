"""Find the tokens of a text that matter to a classifier: the buffer heuristic and its queries.

A sequence is read from left to right. A *buffer* holds the tokens seen so far that were not found
important. The token that brings the classifier's confidence in the right label to within `delta`
of its confidence in the whole sequence is important, and leaves the buffer again.

One forward pass per token would be slow one sequence at a time, so all sequences advance together:
step t asks for the confidence of every buffer that holds its t-th token. A buffer is never a list:
the kept tokens of a sequence stand at the front of its own room in one array.

The last digits of a confidence depend on what else is in its batch (about 1e-7 in fp32), and could
turn a close decision. So inputs within `EDGE` of turning are repeated, each alone in its pass, and
decided by that: the answers are those of one query at a time, whatever the batches and the number
of ranks. (Rounding would only move the edge to where a rounded number turns.) In fp16 the same is
done once more: what is within `half_edge` of turning is asked again in fp32, and decided there.

Letters: `N` sequences, `B` inputs, `C` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from preprocess.corpus import Example, Task
from preprocess.errors import ConfigError, DataError
from preprocess.progress import Progress
from preprocess.text.encode import encode_batch, prepare_backend
from train.stages.inference import IdLists, Runner, one_by_one
from train.stages.scores import softmax

Confidence = Callable[[IdLists, list[int]], "np.ndarray | Sequence[float]"]

EDGE = 1e-5
"""Of a probability. A batch changed one in fp32 by at most 2e-7 (4 and 6 layers)."""

HALF_DELTA = 5e-3
"""Smallest `delta` for fp16: below it the error of fp16 may be as large as `delta`."""


CRITERIA = ("signed", "absolute", "strict")
"""When a buffer counts as close to its complete sequence.

A buffer that is more confident than the sequence is close as well, but for `absolute`. Under
`strict`, a sequence whose empty buffer is close already has no important token: the label is
explained by nothing, as happens with a majority class.
"""


def find_important(
    confidence: Confidence,
    sequences: Sequence[Sequence[int]],
    full_confidence: Sequence[float] | np.ndarray,
    delta: float,
    criterion: str = "signed",
) -> list[np.ndarray]:
    """Find the important tokens of each sequence by the buffer heuristic.

    At token t the buffer holds the unimportant tokens before t. If the buffer with token t is
    close to the whole sequence, token t is important and is taken out again; else it stays.
    Worked example, delta 0.01, full confidence 0.9, P of a buffer by its contents:
    `[a]` 0.5, stays; `[a b]` 0.9, so b is important; `[a c]` 0.6, stays. Result: `[F, T, F]`.

    Args:
        confidence: `confidence(buffers, owners)` returns P(right label) of each buffer, one float
            per buffer; `owners[i]` is the index in `sequences` that buffer i came from. Called
            once per step with the buffers of all unfinished sequences, which are `IdLists`: they
            can be read one by one as lists of ids. Under `strict` the first call asks for the
            empty buffers.
        sequences: token ids; may be empty, then the result is empty.
        full_confidence: P(right label) of the whole sequences, one float each.
        delta: largest difference in probability, exclusive.
        criterion: a name in `CRITERIA`.
    Returns:
        One bool array per sequence, as long as it: True where the token is important.
    Raises:
        ValueError: an unknown criterion, or not one full confidence per sequence.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion {criterion}: must be one of {', '.join(CRITERIA)}")
    whole = IdLists.of(sequences).packed()
    full = np.asarray(full_confidence, dtype=np.float64).reshape(-1)
    if len(full) != len(whole):
        raise ValueError(f"{len(full)} full confidences for {len(whole)} sequences")
    kept = whole.flat.copy()  # from starts[i] on, the kept tokens of sequence i
    num_kept = np.zeros(len(whole), dtype=np.int64)
    important = np.zeros(len(kept), dtype=bool)

    def ask(active: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        buffers = IdLists(kept, whole.starts[active], lengths)
        part = np.asarray(confidence(buffers, active.tolist()), dtype=np.float64).reshape(-1)
        assert len(part) == len(buffers), "one confidence per buffer"
        gap = full[active] - part
        return (np.abs(gap) if criterion == "absolute" else gap) < delta

    active = np.flatnonzero(whole.lengths)
    if criterion == "strict" and len(active):
        active = active[~ask(active, num_kept[active])]
    step = 0
    while len(active):
        token = whole.starts[active] + step
        kept[whole.starts[active] + num_kept[active]] = whole.flat[token]
        important[token] = ask(active, num_kept[active] + 1)
        num_kept[active] += ~important[token]
        step += 1
        active = active[whole.lengths[active] > step]
    return [important[a : a + n] for a, n in zip(whole.starts, whole.lengths, strict=True)]


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
            f"--model_name_or_path {model_name} tells {', '.join(classes)} apart, but --task "
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


def check_half(delta: float) -> None:
    """Refuse fp16 for a `delta` below `HALF_DELTA`."""
    if delta < HALF_DELTA:
        raise ConfigError(
            f"fp16 with --delta {delta}: it cannot tell differences below {HALF_DELTA}; give fp32, "
            "or a larger --delta"
        )


class Way(NamedTuple):
    """One way to ask, and within what of turning its answers are asked again in a surer one.

    name: of the count of inputs that were asked again in this way.
    edge: two probabilities, `(B,)` each, and the largest edge -> edge, a number or `(B,)`.
    """

    name: str
    runner: Runner
    edge: Callable[[np.ndarray, np.ndarray, float], Any]


class Classifier:
    """Probabilities of the classes for inputs in place of the text of some queries.

    ways: from the quickest to the surest: in fp16 if the runner is, in fp32, and each input alone.
        The runner's counts have the inputs that were asked again, "fp32" and "alone".
    """

    def __init__(self, runner: Runner, queries: list[Query], edge: float) -> None:
        exact = replace(runner, half=False)  # with the same counts
        alone = replace(exact, cut=one_by_one, min_width=0)
        self.ways = [Way("fp32", exact, lambda *_: edge), Way("alone", alone, lambda *_: 0.0)]
        if runner.half:
            self.ways.insert(0, Way("fp16", runner, half_edge))
        self.texts = IdLists.of([query.tokens for query in queries])
        self.labels = np.array([query.label for query in queries], dtype=np.int64)
        self._aspects = IdLists.of([query.aspect for query in queries])
        self._whole = np.full((len(self.ways), len(queries)), np.nan)

    def classes(
        self, which: np.ndarray, texts: IdLists, level: int, progress: Progress | None = None
    ) -> np.ndarray:
        """Return P of every class, `(B, C)` float64.

        Args:
            which: the query of each text, `(B,)` int64.
            level: number of the way to ask.
        """
        name, runner, _ = self.ways[level]
        if level:
            runner.counts[name] += len(which)
        aspects = self._aspects.take(which) if runner.template.between else None
        found = np.zeros((len(which), runner.model.config.num_labels))
        for batch, logits, _ in runner.run(texts, aspects):
            found[batch] = softmax(logits)
            if progress:
                progress.update(len(batch))
        return found

    def confidence(
        self, which: np.ndarray, texts: IdLists, level: int, progress: Progress | None = None
    ) -> np.ndarray:
        """Return P of the right class, `(B,)` float64; see `classes`."""
        found = self.classes(which, texts, level, progress)
        return found[np.arange(len(which)), self.labels[which]]

    def whole(self, which: np.ndarray, level: int) -> np.ndarray:
        """Return P of the right class for complete sequences, `(B,)` float64; asked only once."""
        known = self._whole[level]
        new = np.unique(which[np.isnan(known[which])])
        if len(new):
            known[new] = self.confidence(new, self.texts.take(new), level)
        return known[which]

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
            found = self.classes(
                todo, self.texts.take(todo), level, None if level else progress)
            if np.isnan(found).any():
                raise DataError("the classifier's logits are not numbers; fine-tune it again")
            self._whole[level, todo] = found[np.arange(len(todo)), self.labels[todo]]
            is_right[todo] = found.argmax(1) == self.labels[todo]
            ascending = np.sort(found, axis=1)
            first, second = ascending[:, -1], ascending[:, :-1].max(1, initial=0)
            todo = todo[first - second < way.edge(first, second, 1.0)]
        return np.flatnonzero(is_right)


def explain(
    runner: Runner,
    queries: list[Query],
    delta: float,
    criterion: str = "signed",
    *,
    edge: float = EDGE,
    who: str = "",
    every: int = 1 << 14,
) -> list[np.ndarray | None]:
    """Find the important tokens of this process's queries.

    Args:
        edge: inputs that are within it of turning in fp32 are repeated alone; 0 for none.
        who: which process this is, for the lines of progress.
        every: inputs between two of them.
    Returns:
        One bool array per query, as long as its tokens, None where the classifier is wrong. The
        runner's counts have the inputs that were asked again, "fp32" and "alone".
    Raises:
        DataError: the classifier's answers are not numbers.
    """
    ask = Classifier(runner, queries, edge)
    with Progress(len(queries), "sequence", every, label=f"classify{who}") as progress:
        right = ask.find_right(progress)
    full = ask.whole(right, 0)
    num_buffers = int(ask.texts.lengths[right].sum()) + len(right) * (criterion == "strict")

    def confidence(buffers: IdLists, owners: list[int]) -> np.ndarray:
        part = np.zeros(len(buffers))
        todo, owner = np.arange(len(buffers)), np.array(owners, dtype=np.int64)
        for level, way in enumerate(ask.ways):
            which = right[owner[todo]]
            whole = ask.whole(which, level)
            found = ask.confidence(
                which, buffers.take(todo), level, None if level else progress)
            part[todo] = found + (full[owner[todo]] - whole)  # `full` minus it is what this says
            # Most buffers differ by 0 from their sequence: an edge of delta would repeat them all.
            near = way.edge(whole, found, 0.9 * delta)
            todo = todo[np.abs(np.abs(whole - found) - delta) < near]
            if not len(todo):
                break
        return part

    with Progress(num_buffers, "buffer", every, label=f"annotate{who}") as progress:
        marks = find_important(confidence, ask.texts.take(right), full, delta, criterion)
    important: list[np.ndarray | None] = [None] * len(queries)
    for i, found in zip(right.tolist(), marks, strict=True):
        important[i] = found
    return important
