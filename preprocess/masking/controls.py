"""Controls: rules that keep one property of another index and draw the rest.

A policy is shown to work by the difference to its control: as many masks per sequence, the same
frequencies, scores without context, the least important tokens, the same documents.

Letters: `B` sequences, `C` candidates, `K` histogram bins.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from preprocess.masking.candidates import Candidates, Sequences, list_candidates, require
from preprocess.masking.drawn import choose_uniformly
from preprocess.masking.draws import (
    STREAM_EXCHANGE,
    STREAM_FREQUENCY,
    STREAM_INVERSE,
    STREAM_MATCHED,
    STREAM_SHUFFLED,
    counter_bits,
)
from preprocess.masking.order import (
    draw_keys,
    list_units,
    rank_scores,
    take_first,
    take_units,
)

_FEEDBACK_TOKENS = 1 << 16  # weights are corrected after about so many tokens
_DAMPING = 50  # tokens added to both counts of a bin before they are compared


def choose_random_matched(sequences: Sequences) -> np.ndarray:
    """Choose `matched_counts` tokens of each sequence uniformly.

    Raises:
        ValueError: the batch has no `matched_counts`, or one exceeds the candidates.
    """
    found = list_candidates(sequences)
    return choose_uniformly(sequences, found, _matched_counts(sequences, found), STREAM_MATCHED)


def _matched_counts(sequences: Sequences, found: Candidates) -> np.ndarray:
    counts = require(sequences, "matched_counts")
    if np.any(counts > found.counts):
        worst = int(np.argmax(counts - found.counts))
        raise ValueError(
            f"sequence {worst}: {counts[worst]} tokens to match, {found.counts[worst]} candidates"
        )
    return counts


def choose_inverse(sequences: Sequences) -> np.ndarray:
    """Choose `matched_counts` tokens of each sequence, those with the smallest scores.

    Tokens that are never masked (minus infinity) come last. Of a word that crosses the count its
    first tokens are taken, so that the counts are equal.
    """
    found = list_candidates(sequences)
    counts = _matched_counts(sequences, found)
    units = list_units(sequences, found)
    ranks = rank_scores(sequences, found, units)
    # The rank of minus infinity, 0, becomes the last one.
    keys = draw_keys(sequences, units.index, units.sequence, STREAM_INVERSE, ranks - np.uint16(1))
    return take_units(sequences, found, units, keys, None, counts, cut=True)


def choose_shuffled(sequences: Sequences) -> np.ndarray:
    """Choose as many tokens of each document as the matched index masks there.

    The best of scores that were permuted over the candidates of a document are a uniform draw of as
    many candidates, so that is what is done. Sequences do not keep their counts.

    Raises:
        ValueError: the batch has no `matched_counts` or no `documents`.
    """
    found = list_candidates(sequences)
    counts, documents = _matched_counts(sequences, found), require(sequences, "documents")
    number = np.cumsum(np.diff(documents, prepend=-1) != 0) - 1
    per_document = np.bincount(number, counts).astype(np.int64)
    owner = number[found.sequence]
    keys = draw_keys(sequences, found.index, owner, STREAM_SHUFFLED)
    return np.sort(found.index[take_first(keys, owner, per_document)])


def choose_by_policy(sequences: Sequences) -> np.ndarray:
    """Choose as the matched index was chosen, on the scores of this batch (means of types).

    Raises:
        ValueError: the batch has no `policy`.
    """
    policy = sequences.policy
    if policy is None:
        raise ValueError("this masking strategy needs Sequences.policy")
    return policy(replace(sequences, policy=None))


# ------------------------------------------------------------------------- frequency_matched


def frequency_bins(sequences: Sequences) -> np.ndarray:
    """Return the bin of each token: twice the octave of its type's count, plus 1 inside a word.

    Raises:
        ValueError: the batch has no `octaves`.
    """
    bins = require(sequences, "octaves").astype(np.int64) * 2
    if sequences.continues_word is not None:
        bins += sequences.continues_word.astype(bool)
    return bins


def choose_frequency_matched(sequences: Sequences) -> np.ndarray:
    """Choose `matched_counts` tokens of each sequence with the histogram of the matched index.

    The histogram is over `frequency_bins`, of the whole batch. A token's chance depends on its bin
    alone: sequences are gone through in parts, the tokens of each with the smallest -ln(u) / weight
    are taken, and a bin's weight grows while it is behind. The few tokens that are left over in the
    end are exchanged within their sequences, these in an order by hash, until all bins are equal.

    Raises:
        ValueError: the batch has no `matched`, `matched_counts` or `octaves`.
    """
    matched = require(sequences, "matched")
    found = list_candidates(sequences)
    counts = _matched_counts(sequences, found)
    if not sequences.candidates[matched].all():
        raise ValueError("the index to match masks a special token")
    bins = frequency_bins(sequences)
    num_bins = int(bins.max(initial=0)) + 1
    used = counts[found.sequence] > 0  # candidates of sequences that get a mask
    index, sequence = found.index[used], found.sequence[used]
    own_bins = bins[index]
    of_policy = np.zeros(len(sequences.candidates), dtype=bool)
    of_policy[matched] = True
    hits = of_policy[index]
    aim = np.bincount(bins[matched], minlength=num_bins)
    weight = (aim + 0.5) / (np.bincount(own_bins, minlength=num_bins) + 1)
    bits = counter_bits(sequences.seed, sequences.epoch, sequences.positions[index],
                        STREAM_FREQUENCY)
    waiting = -np.log((bits.astype(np.float64) + 0.5) * 2.0**-24)

    chosen = np.zeros(len(index), dtype=bool)
    done, masked = np.zeros(num_bins), np.zeros(num_bins)  # by the policy, by this control
    for part in _parts(sequence, len(counts)):
        own = own_bins[part]
        behind = (done + _DAMPING) / (masked + _DAMPING)
        factor = weight * np.clip(behind, 0.25, 4.0) ** 3
        owner = sequence[part]
        first = owner[0]
        # Positive float32 numbers are ordered as their bits are.
        key = (waiting[part] / factor[own]).astype(np.float32).view(np.uint32).astype(np.uint64)
        key |= (owner - first).astype(np.uint64) << np.uint64(32)
        taken = take_first(key, owner - first, counts[first : owner[-1] + 1])
        chosen[part.start + taken] = True
        done += np.bincount(own[hits[part]], minlength=num_bins)
        masked += np.bincount(own[taken], minlength=num_bins)
        behind = (done + _DAMPING) / (masked + _DAMPING)
        weight *= np.sqrt(np.clip(behind, 0.5, 2.0))
    _repair(sequences, index, sequence, own_bins, chosen, masked.astype(np.int64) - aim)
    return index[chosen]


def _parts(sequence: np.ndarray, num_sequences: int) -> list[slice]:
    """Cut candidates into parts of about `_FEEDBACK_TOKENS`, at ends of sequences."""
    if not len(sequence):
        return []
    ends = np.searchsorted(sequence, np.arange(num_sequences), side="right")
    wanted = np.arange(_FEEDBACK_TOKENS, len(sequence) + _FEEDBACK_TOKENS, _FEEDBACK_TOKENS)
    cuts = np.unique(ends[np.minimum(np.searchsorted(ends, wanted), num_sequences - 1)])
    return [slice(a, b) for a, b in zip([0, *cuts.tolist()], cuts.tolist(), strict=False) if b > a]


def _repair(
    sequences: Sequences, index: np.ndarray, sequence: np.ndarray, bins: np.ndarray,
    chosen: np.ndarray, surplus: np.ndarray,
) -> None:
    """Exchange tokens within sequences until no bin has a surplus; changes `chosen`.

    In an order by hash, a sequence gives a masked token of a bin with too many for an unmasked one
    of a bin with too few; where no sequence can, several do so by way of other bins.
    """
    draw = counter_bits(
        sequences.seed, sequences.epoch, sequences.positions[index], STREAM_EXCHANGE)
    while surplus.any():
        gives = np.flatnonzero(chosen & (surplus[bins] > 0))
        takes = np.flatnonzero(~chosen & (surplus[bins] < 0))
        both = np.intersect1d(sequence[gives], sequence[takes])
        if not len(both):
            break
        pools = [(gives, sequence[gives], 1), (takes, sequence[takes], -1)]
        first = np.searchsorted(sequence, both)
        for one in both[np.argsort(draw[first], kind="stable")].tolist():
            pair = []
            for pool, owner, sign in pools:
                low, high = np.searchsorted(owner, [one, one + 1])
                mine = pool[low:high]
                mine = mine[sign * surplus[bins[mine]] > 0]
                if len(mine):
                    pair.append(int(mine[np.argmin(draw[mine])]))
            if len(pair) == 2:
                out, new = pair
                chosen[out], chosen[new] = False, True
                surplus[bins[out]] -= 1
                surplus[bins[new]] += 1
                if not surplus.any():
                    return
    if surplus.any():
        _exchange_by_way(sequence, bins, draw, chosen, surplus)


def _exchange_by_way(
    sequence: np.ndarray, bins: np.ndarray, draw: np.ndarray, chosen: np.ndarray,
    surplus: np.ndarray,
) -> None:
    """Exchange along shortest ways from bins with too many masks to bins with too few.

    A step from bin b to bin c is a sequence with a masked token of b and an unmasked one of c. As
    the matched index is itself a choice without surplus, there is such a way while there is one
    (it is an augmenting path of a flow from sequences to bins).
    """
    starts = np.flatnonzero(np.diff(sequence, prepend=-1))
    ends = np.append(starts[1:], len(sequence))
    number = np.repeat(np.arange(len(starts)), ends - starts)
    masked, free = (np.zeros((len(starts), len(surplus)), dtype=bool) for _ in range(2))
    masked[number[chosen], bins[chosen]] = True
    free[number[~chosen], bins[~chosen]] = True
    steps = np.rint(masked.T.astype(np.float32) @ free.astype(np.float32)).astype(np.int64)
    while surplus.any():
        way = _shortest_way(steps > 0, surplus)
        if not way:
            return
        for bin_out, bin_new in zip(way, way[1:], strict=False):
            able = np.flatnonzero(masked[:, bin_out] & free[:, bin_new])
            one = able[np.argmin(draw[starts[able]])]
            mine = slice(starts[one], ends[one])
            own, own_draw, taken = bins[mine], draw[mine], chosen[mine]
            out, new = (places[np.argmin(own_draw[places])] for places in (
                np.flatnonzero(taken & (own == bin_out)), np.flatnonzero(~taken & (own == bin_new))
            ))
            taken[out], taken[new] = False, True  # a view of `chosen`
            steps -= np.outer(masked[one], free[one])
            masked[one], free[one] = False, False
            masked[one, own[taken]], free[one, own[~taken]] = True, True
            steps += np.outer(masked[one], free[one])
        surplus[way[0]] -= 1
        surplus[way[-1]] += 1


def _shortest_way(steps: np.ndarray, surplus: np.ndarray) -> list[int]:
    """Return bins from one with a surplus to one with a lack, or nothing; lowest numbers first."""
    before = dict.fromkeys(np.flatnonzero(surplus > 0).tolist(), -1)
    waiting = list(before)
    for here in waiting:
        for there in np.flatnonzero(steps[here]).tolist():
            if there not in before:
                before[there] = here
                waiting.append(there)
                if surplus[there] < 0:
                    way = [there]
                    while before[way[-1]] >= 0:
                        way.append(before[way[-1]])
                    return way[::-1]
    return []
