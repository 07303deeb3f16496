"""Which tokens are masked, and what stands in their place: the only owner of both rules.

Masking is four visible steps over a ragged batch (`Sequences`: flat arrays and offsets):

1. candidates   `find_candidates`: every token that is not special
2. budget       `draw_counts`, `selective_limit`: how many of a sequence's candidates
3. choice       `STRATEGIES`: which ones; strategies differ in nothing else
4. corruption   `corrupt`: 80 % [MASK], 10 % a random id, 10 % unchanged

Every draw is a hash of (seed, epoch, global token position, stream), so a mask does not depend on
how the tokens were cut into batches, nor on the rank or worker that drew it. No function here loops
over sequences: choosing the best k of each is one sort of packed 64-bit keys (`_take_first`).

Letters: `B` sequences, `T` tokens in the batch, `C` candidates, `M` masked positions,
`V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from preprocess.masking.candidates import (
    Candidates,
    Sequences,
    list_candidates,
    require,
    selective_limit,
    share_budget,
)
from preprocess.masking.draws import (
    STREAM_CHOICE,
    STREAM_FILL,
    STREAM_MATCHED,
    STREAM_TIES,
    STREAM_WORD,
    counter_bits,
    counter_uniform,
)

# --------------------------------------------------------------------------------- 3. choice

# A sort key is: sequence (24 bits), then importance (16 bits), then a draw (24 bits).
_SEQUENCE_SHIFT = np.uint64(40)
_IMPORTANCE_SHIFT = np.uint64(24)
_INFINITY = 0x7C00  # as float16; above it are the numbers that are none


def _draw_keys(
    sequences: Sequences,
    index: np.ndarray,
    sequence: np.ndarray,
    stream: int,
    importance: np.ndarray | None = None,
) -> np.ndarray:
    """Sort keys, lowest first, of tokens at flat `index` `(K,)`: uint64 `(K,)`."""
    positions = sequences.positions[index]
    keys = counter_bits(sequences.seed, sequences.epoch, positions, stream)
    keys |= sequence.astype(np.uint64) << _SEQUENCE_SHIFT
    if importance is not None:
        keys |= importance.astype(np.uint64) << _IMPORTANCE_SHIFT
    return keys


def _take_first(keys: np.ndarray, sequence: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Take the `counts[b]` lowest keys of each sequence b.

    `sequence` `(K,)` ascends and leads the keys, so sorting moves tokens only inside their
    sequence: with sequence 0 0 0 1 1 and draws 5 2 9 7 1, the order is 1 0 2 4 3 and the rank
    inside the sequence 0 1 2 0 1; counts 2 1 take 1 0 4. The sort is stable: equal draws (one in
    16 million) go by position, however the batch was cut.

    Returns:
        Indices into `keys`, in the order taken, `(sum of counts,)` int64.
    """
    order = np.argsort(keys, kind="stable")
    ends = np.searchsorted(sequence, np.arange(len(counts) + 1))
    rank = np.arange(len(keys)) - ends[sequence]
    return order[rank < counts[sequence]]


def choose_random(sequences: Sequences) -> np.ndarray:
    """Choose uniformly among the candidates; the rate is met in expectation by each sequence.

    Returns:
        Ascending unique indices into the batch's flat arrays, `(M,)` int64 (every strategy).
    """
    found = list_candidates(sequences)
    counts = share_budget(sequences, found)
    return _choose_uniformly(sequences, found, counts, STREAM_CHOICE)


def _choose_uniformly(
    sequences: Sequences, found: Candidates, counts: np.ndarray, stream: int
) -> np.ndarray:
    keys = _draw_keys(sequences, found.index, found.sequence, stream)
    return np.sort(found.index[_take_first(keys, found.sequence, counts)])


def choose_whole_words(sequences: Sequences) -> np.ndarray:
    """Choose whole words in random order, passing over those that no longer fit into the budget.

    The budget is that of `random`. Where every word left is too long for what is left of it, the
    next one is kept with the probability that makes the expected number of tokens the budget:
    1 token left, a word of 3: 1/3.

    Raises:
        ValueError: if the batch has no `continues_word`.
    """
    continues = require(sequences, "continues_word")
    found = list_candidates(sequences)
    # A word starts at a token that does not continue one, at a sequence's first candidate, and
    # after a token that is no candidate.
    starts = ~continues[found.index]
    starts[found.starts[found.counts > 0]] = True
    starts[1:] |= np.diff(found.index) > 1
    word = np.cumsum(starts) - 1
    first = np.flatnonzero(starts)
    keys = _draw_keys(sequences, found.index[first], found.sequence[first], STREAM_CHOICE)
    order = np.argsort(keys, kind="stable")
    size = np.diff(np.append(first, len(found.index)))[order]
    sequence = found.sequence[first][order]

    kept, left = _take_what_fits(size, sequence, share_budget(sequences, found))
    rest = np.flatnonzero(~kept & (left[sequence] > 0))
    _, next_one = np.unique(sequence[rest], return_index=True)
    rest = rest[next_one]
    positions = sequences.positions[found.index[first][order[rest]]]
    draw = counter_uniform(sequences.seed, sequences.epoch, positions, STREAM_WORD)
    kept[rest] = draw * size[rest] < left[sequence[rest]]
    chosen = np.zeros(len(first), dtype=bool)
    chosen[order] = kept
    return found.index[chosen[word]]


def _take_what_fits(
    size: np.ndarray, sequence: np.ndarray, limits: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Take words in the order given while they fit, passing over those that do not.

    Sizes 2 3 1 1 and a limit of 4: takes 2, passes over 3, takes 1 and 1. Each turn of the loop
    takes words up to the first that does not fit; what does not fit now never will.

    Args:
        size, sequence: of each word, `(W,)` int64; the words of a sequence are neighbours.
        limits: tokens that each sequence may spend, `(B,)` int64.
    Returns:
        Which words were taken, `(W,)` bool, and what is left of each limit, `(B,)` int64.
    """
    kept, left = np.zeros(len(size), dtype=bool), limits.copy()
    open_words = np.arange(len(size))
    while True:
        open_words = open_words[size[open_words] <= left[sequence[open_words]]]
        if not len(open_words):
            return kept, left
        sizes, owners = size[open_words], sequence[open_words]
        spent = np.cumsum(sizes)
        begins = np.diff(owners, prepend=-1) != 0
        spent -= np.maximum.accumulate(np.where(begins, spent - sizes, 0))
        fits = spent <= left[owners]
        kept[open_words[fits]] = True
        left -= np.bincount(owners[fits], sizes[fits], minlength=len(left)).astype(np.int64)
        open_words = open_words[~fits]


def choose_selective(sequences: Sequences) -> np.ndarray:
    """Choose the most important tokens: log-odds above 0, best first, within `selective_limit`.

    A sequence without such a token gets no mask at all. Equal scores go by a draw.

    Raises:
        ValueError: if the batch has no `scores`.
    """
    return np.sort(_choose_selective(sequences, list_candidates(sequences)))


def _choose_selective(sequences: Sequences, found: Candidates) -> np.ndarray:
    scores = np.asarray(require(sequences, "scores"), dtype=np.float16)[found.index].view(np.uint16)
    # Positive float16 numbers are ordered as their bits are, from 1 to those of infinity; numpy
    # compares whole numbers ten times as fast.
    important = (scores > 0) & (scores <= _INFINITY)
    index = found.index[important]
    sequence = found.sequence[important]
    worst_first = scores[important]
    keys = _draw_keys(sequences, index, sequence, STREAM_TIES, 0x7FFF - worst_first)
    limits = selective_limit(found.counts, sequences.rate)
    return index[_take_first(keys, sequence, limits)]


def choose_selective_fill(sequences: Sequences) -> np.ndarray:
    """Choose as `selective`, then top up at random to the number that `random` would mask.

    A sequence gets max(what `selective` chose, `draw_counts`) tokens; only sequences shorter than
    1 / rate can have more than their draw.
    """
    found = list_candidates(sequences)
    chosen = _choose_selective(sequences, found)
    taken = np.zeros(len(sequences.candidates), dtype=bool)
    taken[chosen] = True
    taken_candidates = taken[found.index]
    num_taken = np.bincount(found.sequence[taken_candidates], minlength=len(found.counts))
    rest = found.index[~taken_candidates]
    rest_sequence = found.sequence[~taken_candidates]
    missing = np.maximum(share_budget(sequences, found) - num_taken, 0)
    keys = _draw_keys(sequences, rest, rest_sequence, STREAM_FILL)
    taken[rest[_take_first(keys, rest_sequence, missing)]] = True
    return np.flatnonzero(taken)


def choose_random_matched(sequences: Sequences) -> np.ndarray:
    """Choose uniformly as many tokens of each sequence as `matched_counts` says: the control.

    Raises:
        ValueError: if the batch has no `matched_counts`, or one exceeds the candidates.
    """
    counts = require(sequences, "matched_counts")
    found = list_candidates(sequences)
    if np.any(counts > found.counts):
        worst = int(np.argmax(counts - found.counts))
        raise ValueError(
            f"sequence {worst}: {counts[worst]} tokens to match, {found.counts[worst]} candidates"
        )
    return _choose_uniformly(sequences, found, counts, STREAM_MATCHED)


STRATEGIES: dict[str, Callable[[Sequences], np.ndarray]] = {
    "random": choose_random,
    "whole_word": choose_whole_words,
    "selective": choose_selective,
    "selective_fill": choose_selective_fill,
    "random_matched": choose_random_matched,
}
# Drawn anew in each epoch while training / stored once by build_masks.py.
DRAWN = ("random", "whole_word")
PREBUILT = ("selective", "selective_fill", "random_matched")
