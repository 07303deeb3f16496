"""Measures of how much each token of a text matters to a classifier: the records `IMPORTANCE`.

`buffer`, the paper's: a sequence is read from left to right. A *buffer* holds the tokens seen so
far that were not found important. The token that brings the classifier's confidence in the right
label to within `delta` of its confidence in the whole sequence is important, and leaves the buffer
again. One forward pass per token would be slow one sequence at a time, so all sequences advance
together: step t asks for the confidence of every buffer that holds its t-th token. A buffer is
never a list: the kept tokens of a sequence stand at the front of its own room in one array.

`gradient` and `leave_one_out` give every token a number, which `decide` turns into 0 and 1.

Letters: `N` sequences, `B` inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from preprocess.errors import ConfigError
from preprocess.progress import Progress
from preprocess.text.continuations import continuation_table, find_continuations
from train.stages.gradient import margin_gradient
from train.stages.inference import IdLists, Runner, one_by_one
from train.stages.queries import EDGE, Classifier, Query

Confidence = Callable[[IdLists, list[int]], "np.ndarray | Sequence[float]"]
Values = list[np.ndarray | None]
"""One array per query, as long as its tokens; None where the classifier is wrong."""

HALF_DELTA = 5e-3
"""Smallest `delta` for fp16: below it the error of fp16 may be as large as `delta`."""

ODDS_EDGE = 1e-4
"""Of log-odds, as `EDGE` of a probability."""


# --------------------------------------------------------------------------- buffer


CRITERIA = ("signed", "absolute", "strict")
"""When a buffer counts as close to its complete sequence.

A buffer that is more confident than the sequence is close as well, but for `absolute`. Under
`strict`, a sequence whose empty buffer is close already has no important token: the label is
explained by nothing, as happens with a majority class.
"""


def is_close(gap: np.ndarray, delta: float, criterion: str) -> np.ndarray:
    """Return whether confidences that lie `gap` below the complete ones count as close, `(B,)`."""
    return (np.abs(gap) if criterion == "absolute" else gap) < delta


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
        return is_close(full[active] - part, delta, criterion)

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


def drop_unremoved(important: np.ndarray) -> np.ndarray:
    """Return the marks of a sequence without the one that follows from nothing being removed.

    Where no earlier token is important, the buffer with the last token *is* the sequence: its
    confidence is the same, and the token important, whatever it says. Any other mark compares a
    shorter text with the sequence.
    Worked example: `[F, F, T]` becomes `[F, F, F]`; `[F, T, T]` stays.

    Args:
        important: from `find_important`, `(n,)` bool.
    """
    if len(important) and important[-1] and not important[:-1].any():
        return np.zeros_like(important)
    return important


def check_half(delta: float) -> None:
    """Refuse fp16 for a `delta` below `HALF_DELTA`."""
    if delta < HALF_DELTA:
        raise ConfigError(
            f"fp16 with --delta {delta}: it cannot tell differences below {HALF_DELTA}; give fp32, "
            "or a larger --delta"
        )


def explain(
    runner: Runner,
    queries: list[Query],
    delta: float,
    criterion: str = "signed",
    *,
    edge: float = EDGE,
    who: str = "",
    every: int = 1 << 14,
) -> Values:
    """Find the important tokens of this process's queries by the buffer heuristic.

    Args:
        edge: inputs that are within it of turning in fp32 are repeated alone; 0 for none.
        who: which process this is, for the lines of progress.
        every: inputs between two of them.
    Returns:
        Bool arrays. The runner's counts have the inputs that were asked again, "fp32" and "alone",
        and the decisions that were "turned" by that.
    Raises:
        DataError: the classifier's answers are not numbers.
    """
    ask = Classifier(runner, queries, edge)
    with Progress(len(queries), "sequence", every, label=f"classify{who}") as progress:
        right = ask.find_right(progress)
    full = ask.confidence(right, ask.whole(right, 0))
    num_buffers = int(ask.texts.lengths[right].sum()) + len(right) * (criterion == "strict")

    def confidence(buffers: IdLists, owners: list[int]) -> np.ndarray:
        part, first = np.zeros(len(buffers)), None
        todo, owner = np.arange(len(buffers)), np.array(owners, dtype=np.int64)
        for level, way in enumerate(ask.ways):
            which = right[owner[todo]]
            whole = ask.confidence(which, ask.whole(which, level))
            found = ask.confidence(which, ask.logits(
                which, buffers.take(todo), level, None if level else progress))
            part[todo] = found + (full[owner[todo]] - whole)  # `full` minus it is what this says
            first = part.copy() if first is None else first
            # Most buffers differ by 0 from their sequence: an edge of delta would repeat them all.
            near = way.edge(whole, found, 0.9 * delta)
            todo = todo[np.abs(np.abs(whole - found) - delta) < near]
            if not len(todo):
                break
        close = (is_close(full[owner] - said, delta, criterion) for said in (first, part))
        runner.counts["turned"] += int(np.sum(np.not_equal(*close)))
        return part

    with Progress(num_buffers, "buffer", every, label=f"annotate{who}") as progress:
        marks = find_important(confidence, ask.texts.take(right), full, delta, criterion)
    return _spread(marks, right, len(queries))


def _spread(found: list[np.ndarray], right: np.ndarray, num_queries: int) -> Values:
    """Put the arrays of the right queries among None for the others."""
    values: Values = [None] * num_queries
    for i, one in zip(right.tolist(), found, strict=True):
        values[i] = one
    return values


# --------------------------------------------------------------------------- gradient


def measure_gradient(
    runner: Runner, queries: list[Query], *, who: str = "", every: int = 1 << 14, **_: Any
) -> Values:
    """Return the size of gradient times embedding of the margin at each token, float32.

    One forward and one backward pass per sequence, each alone: the numbers then depend on nothing
    else. The margin of a right answer is that of the right class. See `margin_gradient`.
    """
    ask = Classifier(runner, queries, EDGE)
    with Progress(len(queries), "sequence", every, label=f"classify{who}") as progress:
        right = ask.find_right(progress)
    alone = replace(runner, half=None, cut=one_by_one, min_width=0, compute=margin_gradient,
                    work=2)
    texts = ask.texts.take(right)
    aspects = ask.aspects.take(right) if runner.template.between else None
    found: list[np.ndarray] = [np.empty(0)] * len(right)
    with Progress(len(right), "sequence", every, label=f"annotate{who}") as progress:
        for (i,), (row,), (start,) in alone.run(texts, aspects):
            found[i] = np.abs(row[start : start + texts.lengths[i]])
            progress.update()
    return _spread(found, right, len(queries))


def take_share(values: Values, share: float, **_: Any) -> Values:
    """Call the share of all tokens with the largest values important, and what ties with them.

    A magnitude has no value that parts important from not, so the user gives the share; at least
    one token is taken. It is a share of the corpus: a sentence may have none.
    """
    flat = np.concatenate([np.empty(0), *(one for one in values if one is not None)])
    if not len(flat):
        return values
    count = max(1, round(share * len(flat)))
    least = np.partition(flat, len(flat) - count)[len(flat) - count]
    return [None if one is None else one >= least for one in values]


# --------------------------------------------------------------------------- leave one out


LEFT_OUT_QUERIES = 1024
"""Sequences whose shortened texts are in memory at a time: their number grows with the square."""


def measure_left_out(
    runner: Runner,
    queries: list[Query],
    delta: float,
    *,
    edge: float = ODDS_EDGE,
    who: str = "",
    every: int = 1 << 14,
) -> Values:
    """Return by how much the log-odds of the right class drop without each word, float64.

    A word is deleted with all its pieces, and what follows moves up: the input stays one that the
    classifier could have seen, as with no mask in its place. All pieces have their word's value;
    a text of one word is compared with the empty text.

    Args:
        delta: drops within `edge` of it are asked again, each text alone.
    Raises:
        ConfigError: the tokenizer does not tell words apart.
    """
    table = continuation_table(runner.tokenizer)
    ask = Classifier(runner, queries, edge)
    with Progress(len(queries), "sequence", every, label=f"classify{who}") as progress:
        right = ask.find_right(progress)
    texts = ask.texts.take(right).packed()
    continues = find_continuations(texts.flat, np.append(texts.starts, len(texts.flat)), table)
    starts = np.flatnonzero(~continues)  # of each word; a sequence's first token continues nothing
    sizes = np.diff(np.append(starts, len(texts.flat)))
    owner = np.searchsorted(texts.starts, starts, side="right") - 1
    drops = np.zeros(len(starts))
    with Progress(len(starts), "word", every, label=f"annotate{who}") as progress:
        for first in range(0, len(right), LEFT_OUT_QUERIES):
            here = np.flatnonzero((owner >= first) & (owner < first + LEFT_OUT_QUERIES))
            todo, once = here, None
            for level in range(len(ask.ways)):
                which = right[owner[todo]]
                without = IdLists.of([
                    ids[:a] + ids[a + n :] for ids, a, n in zip(
                        ask.texts.take(which), starts[todo] - texts.starts[owner[todo]],
                        sizes[todo], strict=True)
                ])
                part = ask.logits(which, without, level, None if level else progress)
                drops[todo] = (ask.log_odds(which, ask.whole(which, level))
                               - ask.log_odds(which, part))
                once = drops[here] > delta if once is None else once
                todo = todo[np.abs(drops[todo] - delta) < edge]
                if not len(todo):
                    break
            runner.counts["turned"] += int(np.sum(once != (drops[here] > delta)))
    return _spread(np.split(np.repeat(drops, sizes), texts.starts[1:]) if len(right) else [],
                   right, len(queries))


def take_above(values: Values, delta: float, **_: Any) -> Values:
    """Call a token important whose value is above `delta`."""
    return [None if one is None else one > delta for one in values]


# --------------------------------------------------------------------------- the records


class Importance(NamedTuple):
    """A way to measure importance.

    measure: (runner, this process's queries, the options by name, `who`, `every`) -> values.
    decide: (the values of all queries, the options) -> bool arrays.
    options: the options of annotate.py that it takes, and their defaults.
    half: whether it may ask in fp16.
    filtered: marks of a sequence -> those that do not hold by construction; None where none do.
    fewer, more: what to type to find fewer or more important tokens.
    rule: the sentence that explains it.
    """

    measure: Callable[..., Values]
    decide: Callable[..., Values]
    options: dict[str, Any]
    half: bool
    filtered: Callable[[np.ndarray], np.ndarray] | None
    fewer: str
    more: str
    rule: str


BUFFER = "buffer"
"""The measure of the paper, and the default."""

IMPORTANCE: dict[str, Importance] = {
    BUFFER: Importance(
        measure=explain, decide=lambda values, **_: values,
        options={"delta": 0.01, "criterion": "signed"}, half=True,
        filtered=drop_unremoved,
        fewer="give a smaller --delta, or --criterion strict", more="give a larger --delta",
        rule="Important is the token that brings the confidence in the tokens kept so far to "
        "within delta of that in the sentence.",
    ),
    "gradient": Importance(
        measure=measure_gradient, decide=take_share, options={"share": 0.15},
        half=False, filtered=None, fewer="give a smaller --share", more="give a larger --share",
        rule="Important is the given share of all tokens: those where gradient times embedding of "
        "the classifier's margin is largest.",
    ),
    "leave_one_out": Importance(
        measure=measure_left_out, decide=take_above, options={"delta": 0.25},
        half=False, filtered=None, fewer="give a larger --delta", more="give a smaller --delta",
        rule="Important is a word without which the log-odds of the right class drop by more than "
        "delta.",
    ),
}


def choose_options(name: str, typed: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a measure: as typed, or their defaults.

    Args:
        typed: options of all measures, None where the user gave none.
    Raises:
        ConfigError: one that this measure does not take, or a value that it does not allow.
    """
    options = IMPORTANCE[name].options
    for flag, value in typed.items():
        if value is not None and flag not in options:
            known = " and ".join(f"--{one}" for one in options)
            raise ConfigError(f"--{flag} {value}: --measure {name} takes {known}; leave --{flag} "
                              "out, or give another --measure")
    chosen = {flag: default if typed.get(flag) is None else typed[flag]
              for flag, default in options.items()}
    if name == BUFFER and chosen["delta"] >= 1:
        raise ConfigError(f"--delta {chosen['delta']}: with --measure {name} it is a difference of "
                          "probabilities and must be in (0, 1); give another value")
    return chosen
