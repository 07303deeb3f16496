"""Rules that draw anew each epoch: tokens, whole words, spans of words.

Words and spans keep their rate in a *window*: the pieces of a row, or neighbouring sequences of one
document. In single sentences of 20 tokens a budget of 3 could not hold the long words.

Letters: `B` sequences, `W` windows, `C` candidates, `U` words.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from preprocess.masking.candidates import (
    Candidates,
    Sequences,
    draw_counts,
    list_candidates,
    require,
)
from preprocess.masking.draws import (
    STREAM_CHOICE,
    STREAM_LENGTH,
    STREAM_OFFSET,
    STREAM_ORDER,
    STREAM_WINDOW,
    counter_uniform,
)
from preprocess.masking.order import Units, draw_keys, list_units, rank_within, take_first

# Words of one token make up for longer ones in windows of so many tokens, if they are expected to
# be masked so many standard deviations of the longer ones' tokens.
_FILLED_TOKENS, _SAFE = 64, 1.5
# Lengths of spans in words: P(l) in proportion to 0.2 x 0.8^(l-1) for 1 to 10, mean 3.80.
_SPAN_WEIGHTS = 0.8 ** np.arange(10)
SPAN_SHARES = _SPAN_WEIGHTS / _SPAN_WEIGHTS.sum()
_SPAN_EDGES = np.cumsum(SPAN_SHARES)[:-1]


def choose_random(sequences: Sequences) -> np.ndarray:
    """Choose uniformly among the candidates; each sequence meets the rate in expectation.

    Returns:
        Ascending unique indices into the batch's flat arrays, `(M,)` int64 (every strategy).
    """
    found = list_candidates(sequences)
    return choose_uniformly(sequences, found, draw_counts(sequences, found), STREAM_CHOICE)


def choose_uniformly(
    sequences: Sequences, found: Candidates, counts: np.ndarray, stream: int
) -> np.ndarray:
    """Choose `counts` `(B,)` candidates of each sequence."""
    keys = draw_keys(sequences, found.index, found.sequence, stream)
    return np.sort(found.index[take_first(keys, found.sequence, counts)])


@dataclass(frozen=True)
class _Windows:
    """The windows of a batch: window of each unit `(U,)`; units, budget, rate, draw of each `(W,)`.

    start: number of the first unit of each, `(W,)`; position: its position in the store, `(W,)`.
    """

    of_unit: np.ndarray
    start: np.ndarray
    counts: np.ndarray
    tokens: np.ndarray
    position: np.ndarray
    budget: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray
    rate: np.ndarray
    shift: np.ndarray


def _windows(sequences: Sequences, found: Candidates, units: Units) -> _Windows:
    """Return the windows that hold a candidate, numbered from 0."""
    num_sequences = len(found.counts)
    names = np.arange(num_sequences) if sequences.windows is None else sequences.windows
    begins = np.diff(names, prepend=-1) != 0
    of_unit = (np.cumsum(begins) - 1)[units.sequence]
    filled, start, of_unit, counts = np.unique(
        of_unit, return_index=True, return_inverse=True, return_counts=True)
    of_sequence = np.searchsorted(filled, np.cumsum(begins) - 1)  # of sequences with candidates
    own = found.counts > 0

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(of_sequence[own], values[own], len(filled)).astype(np.int64)

    position = sequences.positions[units.index[start]]
    expected = sequences.rates * found.counts
    return _Windows(
        of_unit, start, counts, total(found.counts), position,
        budget=total(draw_counts(sequences, found)),
        lowest=total(np.floor(expected)), highest=total(np.ceil(expected)),
        rate=sequences.rates[units.sequence[start]],
        shift=counter_uniform(
            sequences.seed, sequences.epoch, position, STREAM_WINDOW).astype(np.float64),
    )


def choose_whole_words(sequences: Sequences) -> np.ndarray:
    """Choose whole words, each with probability `rate`, whatever its length.

    In each window the words of two tokens and more are put in order, the longest first, those of a
    length by hash. One number u is drawn for the window, and word j is masked where floor(rate (j +
    1) + u) exceeds floor(rate j + u): of each length within one word of its rate. Words of one
    token, by hash, fill the window up to the budget of `draw_counts`. Where the longer words could
    take more than that, or leave more than the short ones hold, the short ones go on with j, and
    the budget is met in expectation: words passed over would be those of one length.

    Raises:
        ValueError: the batch has no `continues_word`.
    """
    require(sequences, "continues_word")
    found = list_candidates(sequences)
    units = list_units(sequences, found)
    at = _windows(sequences, found, units)
    chosen = np.zeros(len(units.first), dtype=bool)

    longer = np.flatnonzero(units.size > 1)
    keys = draw_keys(sequences, units.index[longer], at.of_unit[longer], STREAM_ORDER,
                     0xFFFF - np.minimum(units.size[longer], 0xFFFF))
    order = longer[np.argsort(keys, kind="stable")]
    owner, size = at.of_unit[order], units.size[order]
    rank = rank_within(owner, len(at.start))
    before = at.rate[owner] * rank + at.shift[owner]
    after = at.rate[owner] * (rank + 1) + at.shift[owner]
    chosen[order] = np.floor(after) > np.floor(before)

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(owner, values, len(at.start)).astype(np.int64)

    spent, num_longer = total(size * chosen[order]), total(np.ones(len(order)))
    num_single = at.counts - num_longer
    # With k words as long as a word or longer, floor(rate k) or ceil(rate k) of them are masked.
    # Sizes 3 3 2: at the last 3 k = 2, and 1 token more than the next size; at the 2 k = 3, and 2.
    next_size = np.zeros_like(size)
    next_size[:-1] = np.where(owner[1:] == owner[:-1], size[1:], 0)
    step = size - next_size
    expected = at.rate[owner] * (rank + 1)
    least, most = total(step * np.floor(expected)), total(step * np.ceil(expected))
    exact = (most <= at.lowest) & (at.highest - least <= num_single)
    going_on = (np.floor(at.rate * at.counts + at.shift)
                - np.floor(at.rate * num_longer + at.shift)).astype(np.int64)
    singles = np.flatnonzero(units.size == 1)
    keys = draw_keys(sequences, units.index[singles], at.of_unit[singles], STREAM_CHOICE)
    taken = take_first(keys, at.of_unit[singles], np.where(exact, at.budget - spent, going_on))
    chosen[singles[taken]] = True
    return found.index[units.expand(chosen)]


def choose_spans(sequences: Sequences) -> np.ndarray:
    """Choose spans of 1 to 10 words, so that each word is masked with probability `rate`.

    In each window of n words, lengths are drawn until they hold floor(rate n + u) words; the last
    one is shortened. The spans and the other words, one by one, are put in an order by hash, laid
    out on a ring and turned by a drawn offset, so that no place is preferred. Then words of one
    token are added or dropped by hash until the tokens are those of `draw_counts`, in windows that
    are expected to have enough of them, masked and not: where they ran out, they would be masked
    more often than long words.

    Raises:
        ValueError: the batch has no `continues_word`.
    """
    require(sequences, "continues_word")
    found = list_candidates(sequences)
    units = list_units(sequences, found)
    at = _windows(sequences, found, units)
    positions = sequences.positions[units.index]

    def draw(where: np.ndarray, stream: int) -> np.ndarray:
        return counter_uniform(sequences.seed, sequences.epoch, where, stream).astype(np.float64)

    budget = np.floor(at.rate * at.counts + at.shift).astype(np.int64)
    # Word j of a window stands for span number j while the budget lasts, then for one word that
    # is not masked, until the lengths sum up to the words of the window.
    length = np.searchsorted(_SPAN_EDGES, draw(positions, STREAM_LENGTH), side="right") + 1
    before = np.cumsum(length) - length
    before -= np.repeat(before[at.start], at.counts)
    left = np.repeat(budget, at.counts) - before
    in_span = left > 0
    length = np.where(in_span, np.minimum(length, left), 1)
    num_spans = np.bincount(at.of_unit[in_span], minlength=len(at.start))
    num_items = num_spans + at.counts - budget
    rank = np.arange(len(units.first)) - np.repeat(at.start, at.counts)
    items = np.flatnonzero(rank < np.repeat(num_items, at.counts))
    keys = draw_keys(sequences, units.index[items], at.of_unit[items], STREAM_ORDER)
    order = items[np.argsort(keys, kind="stable")]
    offset = (draw(at.position, STREAM_OFFSET) * at.counts).astype(np.int64)
    chosen = lay_out(length[order], in_span[order], at.start, at.counts, offset)

    # Budgets count tokens, spans words.
    masked = np.bincount(at.of_unit[chosen], units.size[chosen], len(at.start)).astype(np.int64)
    longer = units.size > 1
    num_longer, squares = (np.bincount(at.of_unit[longer], values, len(at.start))
                           for values in (np.ones(longer.sum()), units.size[longer] ** 2))
    spread = at.rate * (1 - at.rate) * squares  # the variance, were words drawn one by one
    enough = np.minimum(at.rate, 1 - at.rate) * (at.counts - num_longer)
    excess = np.where(
        (at.tokens >= _FILLED_TOKENS) & (enough * enough >= _SAFE**2 * spread),
        masked - at.budget, 0)
    pool = np.flatnonzero((units.size == 1) & (excess != 0)[at.of_unit]
                          & (chosen == (excess > 0)[at.of_unit]))
    keys = draw_keys(sequences, units.index[pool], at.of_unit[pool], STREAM_CHOICE)
    chosen[pool[take_first(keys, at.of_unit[pool], np.abs(excess))]] ^= True
    return found.index[units.expand(chosen)]


def lay_out(
    length: np.ndarray, masked: np.ndarray, start: np.ndarray, counts: np.ndarray,
    offset: np.ndarray,
) -> np.ndarray:
    """Lay out items on the ring of each window and turn it: which words are masked.

    Lengths 1 2 1 1 1 1 1 1 1 of which numbers 1 and 4 are masked, in a window of 10 words, mask the
    words 1 2 5; turned by an offset of 1, the words 0 1 4.

    Args:
        length, masked: of each item, in order, window by window; the lengths of a window sum up to
            its words.
        start, counts, offset: first word, words, and offset of each window, `(W,)` int64.
    Returns:
        `(U,)` bool.
    """
    laid = np.repeat(masked, length)
    first = np.repeat(start, counts)
    place = np.arange(len(laid)) - first + np.repeat(offset, counts)
    return laid[first + place % np.repeat(np.maximum(counts, 1), counts)]
