"""Choose the tokens to mask: the only file that names a strategy.

Masking is four visible steps over a ragged batch (`Sequences`: flat arrays and offsets):

1. candidates   `find_candidates`: every token that is not special
2. budget       `draw_counts`, `selective_limit`: how many candidates of each sequence
3. choice       `STRATEGIES`: which ones; strategies differ in this step alone
4. corruption   `corrupt`: 80 % [MASK], 10 % a random id, 10 % unchanged

Every draw is a hash of (seed, epoch, global token position, stream), so a mask does not depend on
how the tokens were cut into batches, nor on the rank or worker that drew it. No function here loops
over sequences: choosing the best k of each is one sort of packed 64-bit keys (`_take_first`).

Letters: `B` sequences, `T` tokens in the batch, `C` candidates, `M` masked positions,
`V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from preprocess.masking.candidates import (
    Candidates,
    Sequences,
    draw_counts,
    list_candidates,
    require,
    selective_limit,
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
    """Return sort keys of the tokens at flat `index` `(K,)`, lowest first: uint64 `(K,)`."""
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
    """Choose uniformly among the candidates; each sequence meets the rate in expectation.

    Returns:
        Ascending unique indices into the batch's flat arrays, `(M,)` int64 (every strategy).
    """
    found = list_candidates(sequences)
    counts = draw_counts(sequences, found)
    return _choose_uniformly(sequences, found, counts, STREAM_CHOICE)


def _choose_uniformly(
    sequences: Sequences, found: Candidates, counts: np.ndarray, stream: int
) -> np.ndarray:
    keys = _draw_keys(sequences, found.index, found.sequence, stream)
    return np.sort(found.index[_take_first(keys, found.sequence, counts)])


def choose_whole_words(sequences: Sequences) -> np.ndarray:
    """Choose whole words in random order, passing over those that no longer fit into the budget.

    The budget is that of `draw_counts`. When every remaining word is longer than the remaining
    budget, the next word is kept with probability budget / length, so that the expected number of
    tokens equals the budget: 1 token left and a word of 3 tokens give 1/3.

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

    kept, left = _take_what_fits(size, sequence, draw_counts(sequences, found))
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

    Sizes 2 3 1 1 and a limit of 4: takes 2, passes over 3, takes 1 and 1. Each iteration takes
    words up to the first that does not fit; a word that does not fit now never will.

    Args:
        size, sequence: of each word, `(W,)` int64; the words of a sequence are neighbours.
        limits: tokens that each sequence may spend, `(B,)` int64.
    Returns:
        True for the words taken, `(W,)` bool; the rest of each limit, `(B,)` int64.
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
    """Choose the most important tokens: scores above 0, best first, within `selective_limit`.

    A sequence without such a token gets no mask. Ties are broken by a draw.

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
    """Choose as `choose_selective` does, then fill up at random to `draw_counts`.

    Only sequences shorter than 1 / rate can have more important tokens than their draw.
    """
    found = list_candidates(sequences)
    chosen = _choose_selective(sequences, found)
    taken = np.zeros(len(sequences.candidates), dtype=bool)
    taken[chosen] = True
    taken_candidates = taken[found.index]
    num_taken = np.bincount(found.sequence[taken_candidates], minlength=len(found.counts))
    rest = found.index[~taken_candidates]
    rest_sequence = found.sequence[~taken_candidates]
    missing = np.maximum(draw_counts(sequences, found) - num_taken, 0)
    keys = _draw_keys(sequences, rest, rest_sequence, STREAM_FILL)
    taken[rest[_take_first(keys, rest_sequence, missing)]] = True
    return np.flatnonzero(taken)


def choose_random_matched(sequences: Sequences) -> np.ndarray:
    """Choose `matched_counts` tokens of each sequence uniformly.

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


# ------------------------------------------------------------------------------- the records


class Strategy(NamedTuple):
    """A rule and everything that the rest of the house needs to know about it.

    choose: return the ascending unique flat indices of the masked tokens, `(M,)` int64.
    needs: its inputs besides the tokens, of "scores" and "match" (`ARRAY_NEEDS`) and "words" (where
        words begin, read off the tokenizer).
    drawn: True if masks are drawn anew each epoch (`pretrain.py --masking`); False if they are
        built once (`build_masks.py`).
    budget: "rate": rate x candidates in expectation; "at_most": `selective_limit`; "match": in
        each sequence as many as the index that `--match` names.
    control: True if it exists to be compared with another strategy.
    rule: the sentence that explains it in `--help` and beside an index.
    """

    choose: Callable[[Sequences], np.ndarray]
    needs: frozenset[str]
    drawn: bool
    budget: str
    control: bool
    rule: str


# The needs that are arrays beside the store, and their kind there.
ARRAY_NEEDS = {"scores": "scores", "match": "mask"}

STRATEGIES: dict[str, Strategy] = {
    "random": Strategy(
        choose_random, frozenset(), drawn=True, budget="rate", control=False,
        rule="Draw tokens at random, up to the mask rate in every sequence.",
    ),
    "whole_word": Strategy(
        choose_whole_words, frozenset({"words"}), drawn=True, budget="rate", control=False,
        rule="Draw whole words at random, up to the mask rate.",
    ),
    "selective": Strategy(
        choose_selective, frozenset({"scores"}), drawn=False, budget="at_most", control=False,
        rule="Take the tokens with a score above 0, best first, up to the mask rate of each "
        "sequence, rounded down but at least one; a sequence without such a token has no mask.",
    ),
    "selective_fill": Strategy(
        choose_selective_fill, frozenset({"scores"}), drawn=False, budget="rate", control=False,
        rule="Take the tokens with a score above 0, best first, then others at random, up to the "
        "mask rate.",
    ),
    "random_matched": Strategy(
        choose_random_matched, frozenset({"match"}), drawn=False, budget="match", control=True,
        rule="Draw at random as many tokens of each sequence as another index masks: the control "
        "that knows nothing of importance.",
    ),
}
BASELINE = "random"  # the default of training, the masks of evaluation, a benchmark's first row
MATCHED = "selective"  # whose counts a control takes unless told otherwise
