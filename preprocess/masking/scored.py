"""Rules that turn scores into masks: the best, a draw by score, a band.

All of them work on units: each candidate by itself, or words or n-grams, whose score is that of
their best token. Minus infinity is never masked; ties go by the hash of the position.
"""

from __future__ import annotations

import numpy as np

from preprocess.masking.candidates import (
    Candidates,
    Sequences,
    draw_counts,
    list_candidates,
    selective_limit,
)
from preprocess.masking.draws import STREAM_SAMPLED, STREAM_TIES, counter_bits
from preprocess.masking.order import (
    NEVER,
    ZERO,
    Units,
    draw_keys,
    list_units,
    rank_scores,
    rank_within,
    take_units,
    values_of,
)

_BEST = 0xFFFF  # above all ranks, so that _BEST - rank ascends from the best
_FIRST = 1e300  # above all that finite scores give
_COLD = 2.0**-8  # temperatures below leave too few of 40 bits to the draw
_DISTANCE_BITS = 24
_DISTANCE_STEPS = 256  # of a band: steps per rank, far finer than any difference between ranks


def _ranked(sequences: Sequences) -> tuple[Candidates, Units, np.ndarray]:
    found = list_candidates(sequences)
    units = list_units(sequences, found)
    return found, units, rank_scores(sequences, found, units)


def choose_selective(sequences: Sequences) -> np.ndarray:
    """Choose the most important tokens: scores above 0, best first, within `selective_limit`.

    A sequence without such a token gets no mask.

    Raises:
        ValueError: the batch has no scores, or one is not a number (all rules here).
    """
    found, units, ranks = _ranked(sequences)
    limits = selective_limit(found.counts, sequences.rates)
    return _take_best(sequences, found, units, ranks, ranks > ZERO, limits)


def choose_selective_fill(sequences: Sequences) -> np.ndarray:
    """Choose tokens with scores above 0, best first, then others at random, to `draw_counts`."""
    found, units, ranks = _ranked(sequences)
    raised = np.where((ranks > NEVER) & (ranks < ZERO), ZERO, ranks)
    return _take_best(sequences, found, units, raised, ranks > NEVER, draw_counts(sequences, found))


def choose_top(sequences: Sequences) -> np.ndarray:
    """Choose the tokens with the largest scores, whatever their sign, to `draw_counts`."""
    found, units, ranks = _ranked(sequences)
    return _take_best(sequences, found, units, ranks, ranks > NEVER, draw_counts(sequences, found))


def _take_best(
    sequences: Sequences, found: Candidates, units: Units, ranks: np.ndarray, allowed: np.ndarray,
    budgets: np.ndarray,
) -> np.ndarray:
    eligible = np.flatnonzero(allowed)
    keys = draw_keys(sequences, units.index[eligible], units.sequence[eligible], STREAM_TIES,
                     _BEST - ranks[eligible])
    return take_units(sequences, found, units, keys, eligible, budgets)


def choose_sampled(sequences: Sequences) -> np.ndarray:
    """Draw tokens without replacement, each time in proportion to exp(score / temperature).

    That is the same as taking the largest of score / temperature - ln(-ln u) with a uniform number
    u for each token.
    """
    found, units, ranks = _ranked(sequences)
    eligible = np.flatnonzero(ranks > NEVER)
    index, sequence = units.index[eligible], units.sequence[eligible]
    bits = counter_bits(
        sequences.seed, sequences.epoch, sequences.positions[index], STREAM_SAMPLED)
    drawn = (bits.astype(np.float64) + 0.5) * 2.0**-24  # never 0 nor 1
    with np.errstate(over="ignore"):
        value = values_of(ranks[eligible]) / sequences.temperature - np.log(-np.log(drawn))
    if sequences.temperature < _COLD:
        # Beside such numbers the draw is rounded off: of equal ones the score decides, then it.
        places = np.empty(len(value), np.uint64)
        order = np.lexsort((-drawn, -ranks[eligible].astype(np.int64), -value))
        places[order] = np.arange(len(value), dtype=np.uint64)
    else:
        value = np.where(value == np.inf, _FIRST * (1 + drawn), value)  # those too are drawn
        places = _descending(value)
    keys = places | sequence.astype(np.uint64) << np.uint64(40)
    return take_units(sequences, found, units, keys, eligible, draw_counts(sequences, found))


def _descending(value: np.ndarray) -> np.ndarray:
    """Return 40 bits that order float64 numbers from the largest to the smallest, uint64."""
    bits = (value + 0.0).view(np.uint64)
    negative = bits >> np.uint64(63) != 0
    # Positive numbers are ordered as their bits are, negative ones the other way round.
    ascending = np.where(negative, ~bits, bits | np.uint64(1 << 63))
    return ~ascending >> np.uint64(24)


def choose_band(sequences: Sequences) -> np.ndarray:
    """Choose the tokens whose share of lower scores in the sequence is nearest to `centre`.

    With rank 1 to n from the lowest score on, that share is (rank - 0.5) / n.
    """
    found, units, ranks = _ranked(sequences)
    eligible = np.flatnonzero(ranks > NEVER)
    index, sequence = units.index[eligible], units.sequence[eligible]
    order = np.argsort(
        draw_keys(sequences, index, sequence, STREAM_TIES, ranks[eligible]), kind="stable")
    num_sequences = len(found.counts)
    rank = np.empty(len(eligible))
    rank[order] = rank_within(sequence, num_sequences) + 0.5
    middle = sequences.centre * np.bincount(sequence, minlength=num_sequences)[sequence]
    distance = np.rint(np.abs(rank - middle) * _DISTANCE_STEPS)
    keys = draw_keys(sequences, index, sequence, STREAM_TIES,
                     np.minimum(distance, 2**_DISTANCE_BITS - 1), bits=_DISTANCE_BITS)
    return take_units(sequences, found, units, keys, eligible, draw_counts(sequences, found))
