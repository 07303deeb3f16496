"""Order tokens or units within their sequences, and take the first ones up to a budget.

No function here loops over sequences: choosing the best k of each is one sort of packed 64-bit keys
(`take_first`, `take_units`). A key is the sequence (24 bits), then what decides (16 to 40 bits),
then a hash of the position, so that ties never go by place.

Letters: `B` sequences, `C` candidates, `U` units, `K` keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from preprocess.masking.candidates import Candidates, Sequences, require
from preprocess.masking.draws import STREAM_WORD, counter_bits, counter_uniform

_OWNER_SHIFT = np.uint64(40)
_DRAW_BITS = np.uint64(24)
# The place of each of the 65,536 float16 numbers among them, ascending, by its bits: whole numbers
# compare ten times as fast. Both zeros are one number; those that are none come last.
_HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
_RANKS = np.searchsorted(np.unique(_HALVES[~np.isnan(_HALVES)]), _HALVES).astype(np.uint16)
_RANKS[np.isnan(_HALVES)] = 0xFFFF
_VALUES = np.unique(_HALVES[~np.isnan(_HALVES)])
NEVER = 0  # the rank of minus infinity
ZERO = int(_RANKS[0])  # the rank of 0


@dataclass(frozen=True)
class Units:
    """What is masked as a whole: words, n-grams, or each candidate by itself.

    index: flat index of the first token of each unit, `(U,)` int64, ascending.
    sequence: sequence of each, `(U,)` int64.
    size: tokens of each, `(U,)` int64.
    first: number of its first candidate, `(U,)` int64.
    """

    index: np.ndarray
    sequence: np.ndarray
    size: np.ndarray
    first: np.ndarray

    def expand(self, chosen: np.ndarray) -> np.ndarray:
        """Return which candidates belong to the units where `chosen` `(U,)`: `(C,)` bool."""
        return np.repeat(chosen, self.size)


def list_units(sequences: Sequences, found: Candidates) -> Units:
    """Return the units of a batch by `continues_word`; without it each candidate is one.

    A unit starts at a token that continues none, at a sequence's first candidate, and after a token
    that is no candidate.
    """
    if sequences.continues_word is None:
        first = np.arange(len(found.index))
        return Units(found.index, found.sequence, np.ones_like(first), first)
    starts = ~sequences.continues_word.astype(bool)[found.index]
    starts[found.starts[found.counts > 0]] = True
    starts[1:] |= np.diff(found.index) > 1
    first = np.flatnonzero(starts)
    size = np.diff(np.append(first, len(found.index)))
    return Units(found.index[first], found.sequence[first], size, first)


def rank_scores(sequences: Sequences, found: Candidates, units: Units) -> np.ndarray:
    """Return the place of each unit's best score among all float16 numbers, `(U,)` uint16.

    Raises:
        ValueError: the batch has no scores, or a candidate's is not a number.
    """
    scores = np.asarray(require(sequences, "scores"), dtype=np.float16)
    ranks = _RANKS[scores.view(np.uint16)[found.index]]
    if len(ranks) and ranks.max() == 0xFFFF:
        raise ValueError("a score is not a number (NaN)")
    if len(units.first) == len(ranks):
        return ranks
    return np.maximum.reduceat(ranks, units.first)


def values_of(ranks: np.ndarray) -> np.ndarray:
    """Return the numbers behind `rank_scores`, float64."""
    return _VALUES[ranks]


def draw_keys(
    sequences: Sequences,
    index: np.ndarray,
    owner: np.ndarray,
    stream: int,
    importance: np.ndarray | None = None,
    bits: int = 16,
) -> np.ndarray:
    """Return sort keys of the tokens at flat `index` `(K,)`, lowest first: uint64 `(K,)`.

    Args:
        owner: sequence or window of each, `(K,)`, below 2^24.
        importance: what decides before the draw, lowest first, below 2^`bits`.
        bits: 0 to 40; the draw has 24 bits, or what is left of 40.
    """
    keys = counter_bits(sequences.seed, sequences.epoch, sequences.positions[index], stream)
    if importance is not None:
        keys >>= np.uint64(max(bits - 16, 0))
        keys |= importance.astype(np.uint64) << np.uint64(40 - bits)
    keys |= owner.astype(np.uint64) << _OWNER_SHIFT
    return keys


def take_first(keys: np.ndarray, owner: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Take the `counts[b]` lowest keys of each owner b.

    `owner` `(K,)` ascends and leads the keys, so sorting moves tokens only inside their sequence:
    with owner 0 0 0 1 1 and draws 5 2 9 7 1, the order is 1 0 2 4 3 and the rank inside the
    sequence 0 1 2 0 1; counts 2 1 take 1 0 4. The sort is stable: equal draws (one in 16 million)
    go by position, however the batch was cut.

    Returns:
        Indices into `keys`, in the order taken, `(sum of counts,)` int64.
    """
    order = np.argsort(keys, kind="stable")
    rank = rank_within(owner, len(counts))
    return order[rank < counts[owner]]


def rank_within(owner: np.ndarray, num_owners: int) -> np.ndarray:
    """Return the number of each item among those of its owner, from 0; `owner` ascends."""
    starts = np.searchsorted(owner, np.arange(num_owners))
    return np.arange(len(owner)) - starts[owner]


def take_units(
    sequences: Sequences,
    found: Candidates,
    units: Units,
    keys: np.ndarray,
    eligible: np.ndarray | None,
    budgets: np.ndarray,
    cut: bool = False,
) -> np.ndarray:
    """Take units in the order of their keys until the budget of their sequence is spent.

    The unit that crosses the budget is kept with probability left / size, so that the expected
    number of tokens is the budget and long units stay possible: 1 token left and a unit of 3 give
    1/3.

    Args:
        keys: from `draw_keys`, of the eligible units, `(K,)`.
        eligible: numbers of the units that may be taken, ascending `(K,)`; None for all.
        budgets: tokens to take of each sequence, `(B,)` int64.
        cut: take the first tokens of the unit that crosses instead, so that budgets are exact.
    Returns:
        Flat indices of the chosen tokens, ascending, `(M,)` int64.
    """
    number = np.arange(len(units.first)) if eligible is None else eligible
    owner = units.sequence[number]
    if len(units.first) == len(found.index):
        return np.sort(units.index[number[take_first(keys, owner, budgets)]])
    order = np.argsort(keys, kind="stable")
    number = number[order]
    size = units.size[number]
    left = budgets[owner] - _sum_within(size, owner)  # before each unit; owners keep their places
    taken = np.where(left >= size, size, 0)
    crossing = np.flatnonzero((left > 0) & (left < size))
    if cut:
        taken[crossing] = left[crossing]
    else:
        at = sequences.positions[units.index[number[crossing]]]
        draw = counter_uniform(sequences.seed, sequences.epoch, at, STREAM_WORD)
        kept = crossing[draw * size[crossing] < left[crossing]]
        taken[kept] = size[kept]
    of_unit = np.zeros(len(units.first), dtype=np.int64)
    of_unit[number] = taken
    within = np.arange(len(found.index)) - np.repeat(units.first, units.size)
    return found.index[within < np.repeat(of_unit, units.size)]


def _sum_within(size: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Return the sum of the sizes before each item among those of its owner; `owner` ascends."""
    before = np.cumsum(size) - size
    begins = np.diff(owner, prepend=-1) != 0
    return before - np.maximum.accumulate(np.where(begins, before, 0))
