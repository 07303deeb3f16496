"""Units by pointwise mutual information: word n-grams that occur together (Levine et al. 2021).

PMI_n(g) = min over all cuts of g into two or more contiguous parts of ln(p(g) / product of
p(part)), where p(g) = c(g) / number of n-grams of that length: how much more often g occurs than
by its best competing segmentation. For two words it is plain PMI.

1. n-grams of 1 to 5 words are counted twice: all of them in hashed counters of fixed number, then
   exactly those whose counters, and whose parts' counters, say that they may occur often enough.
   Collisions only add, so none is missed. No n-gram crosses the end of a sequence, or a special
   token.
2. Those of two words and more with a PMI above 0 are ranked per length. A list of N entries has
   the best N/2, N/4, N/8 and N/8 of 2, 3, 4 and 5 words; N is the smallest that covers half of the
   tokens, and at most `MAX_ENTRIES`.
3. Where a text has an entry, it is a unit: a longer entry beats one that it contains, and of
   overlapping ones some are chosen by a hash of their position. Every other word is a unit itself.

Letters: `W` words of a block, `F` n-grams of a length, `E` entries found in a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from preprocess.errors import DataError
from preprocess.masking.counts import Counting, Scored
from preprocess.masking.draws import counter_bits
from preprocess.masking.words import Block, spread, watched, word_blocks
from preprocess.store import Shard
from preprocess.text.continuations import find_continuations

LONGEST = 5  # words
MIN_COUNT = 11
PARTS = {2: 2, 3: 4, 4: 8, 5: 8}  # an entry in so many has this length
COVERED = 0.5  # share of the tokens in entries
MAX_ENTRIES = 800_000
MAX_COUNTED = 10**8  # tokens; of a larger store, a sample of its sequences is counted
COUNTER_BITS = 26  # of the number of counters per length
_LIST_BITS = 22
STREAM_OVERLAPS = 65  # of `draws.py`: which of overlapping entries is a unit

_BASE = np.uint64(0x9FB21C651E98DF25)  # odd: of the polynomial over the words of an n-gram
_SPREAD = np.uint64(0x9E3779B97F4A7C15)


def _slots(keys: np.ndarray, bits: int) -> np.ndarray:
    """Return the counter of each n-gram among 2^bits, uint32."""
    return ((keys * _SPREAD) >> np.uint64(64 - bits)).astype(np.uint32)


def words_left(block: Block) -> np.ndarray:
    """Return how many words follow each without a border, itself included, `(W,)` int64.

    A border is the end of a sequence; a word with a special token has 0 and is a border too.
    """
    words = block.words
    borders = np.zeros(len(words.starts) + 1, bool)
    borders[np.searchsorted(words.starts, block.offsets)] = True
    borders[:-1][~words.known] = True
    borders[1:][~words.known] = True
    edges = np.flatnonzero(borders)
    left = np.repeat(edges[1:], np.diff(edges)) - np.arange(len(words.starts))
    return np.where(words.known, left, 0)


def list_ngrams(block: Block) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield, for each length of 1 to `LONGEST` words, the n-grams that begin at each word.

    Yields:
        Length; hash of the n-gram at each word, `(W-n+1,)` uint64; whether there is one, bool.
    """
    keys, left = block.words.keys, words_left(block)
    found = keys
    for n in range(1, LONGEST + 1):
        if n > 1:
            found = found[:-1] * _BASE + keys[n - 1 :]
        yield n, found, left[: len(found)] >= n


def _part_key(rows: np.ndarray, first: int, length: int) -> np.ndarray:
    """Return the hash of some words of each n-gram, as `list_ngrams` has it."""
    key = rows[:, first]
    for i in range(first + 1, first + length):
        key = key * _BASE + rows[:, i]
    return key


# ---------------------------------------------------------------------------------- counting


def _groups(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the order that sorts keys, and where in it a group of equal ones begins."""
    order = np.argsort(keys)  # np.unique sorts three times as slowly, since it keeps ties in order
    ascending = keys[order]
    return order, np.flatnonzero(np.diff(ascending, prepend=~ascending[:1]))


class ExactCounts:
    """Counts of n-grams of one length, added block by block.

    keys: hashes, ascending, `(F,)` uint64.
    counts: `(F,)` int64.
    rows: hashes of their words, `(F, n)` uint64.
    """

    def __init__(self, length: int) -> None:
        self._parts = [(np.empty(0, np.uint64), np.empty(0, np.int64),
                        np.empty((0, length), np.uint64))]
        self._waiting = 0

    def add(self, keys: np.ndarray, words: np.ndarray, places: np.ndarray) -> None:
        """Add n-grams by the place of their first word among the words of a block."""
        order, edges = _groups(keys)
        some = order[edges]  # any n-gram of a group has its words
        length = self._parts[0][2].shape[1]
        rows = words[places[some][:, None] + np.arange(length)]
        self._parts.append((keys[some], np.diff(edges, append=len(keys)), rows))
        self._waiting += len(some)
        # Merging when as much waits as is merged takes time in proportion to what was added.
        if self._waiting > max(1 << 20, len(self._parts[0][0])):
            self._merge()

    def _merge(self) -> None:
        keys, counts, rows = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        order, edges = _groups(keys)
        some = order[edges]
        total = np.add.reduceat(counts[order], edges) if len(keys) else counts
        self._parts, self._waiting = [(keys[some], total, rows[some])], 0

    def result(self, least: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return keys, counts and rows of all n-grams that occur `least` times and more."""
        self._merge()
        keys, counts, rows = self._parts[0]
        kept = counts >= least
        return keys[kept], counts[kept], rows[kept]


@dataclass(frozen=True)
class Frequent:
    """The frequent n-grams of one length: see `ExactCounts`; total: n-grams of that length."""

    keys: np.ndarray
    counts: np.ndarray
    rows: np.ndarray
    total: int

    def log_share(self, keys: np.ndarray) -> np.ndarray:
        """Return ln p of n-grams that are among these."""
        return np.log(self.counts[np.searchsorted(self.keys, keys)] / max(1, self.total))


def count_ngrams(
    counting: Counting, share: float, least: int = MIN_COUNT, bits: int = COUNTER_BITS
) -> dict[int, Frequent]:
    """Count n-grams of 1 to `LONGEST` words; return those that occur `least` times and more.

    Args:
        share: of the sequences to count.
        least: below 256, where the counters stop.
        bits: of the number of counters per length; it changes no result.
    """
    store = counting.store
    read = partial(word_blocks, finder=counting.finder, share=share,
                   block_tokens=counting.block_tokens)
    lengths = range(1, LONGEST + 1)
    counters = {n: np.zeros(1 << bits, np.uint8) for n in lengths}
    totals = dict.fromkeys(lengths, 0)
    for block in watched(store.shards, read, "count", store.num_tokens):
        for n, keys, there in list_ngrams(block):
            totals[n] += int(there.sum())
            slots = np.sort(_slots(keys[there], bits))
            edges = np.flatnonzero(np.diff(slots, prepend=~slots[:1]))
            slots, times = slots[edges], np.diff(edges, append=len(slots))
            times += counters[n][slots]
            counters[n][slots] = np.minimum(times, 255)
    exact = {n: ExactCounts(n) for n in lengths}
    for block in watched(store.shards, read, "count again", store.num_tokens):
        often = np.ones(len(block.words.starts) + 1, bool)
        for n, keys, there in list_ngrams(block):
            # Both n-grams that are one word shorter must be frequent too.
            often = there & often[:-1] & often[1:]
            places = np.flatnonzero(often)
            places = places[counters[n][_slots(keys[places], bits)] >= least]
            often = np.zeros(len(keys), bool)
            often[places] = True
            exact[n].add(keys[places], block.words.keys, places)
    return {n: Frequent(*exact[n].result(least), totals[n]) for n in lengths}


def pmi(frequent: dict[int, Frequent], length: int) -> np.ndarray:
    """Return the PMI of all frequent n-grams of a length of 2 or more words, `(F,)` float64.

    All parts of a frequent n-gram are frequent. `best[i]` is the largest sum of ln p over the cuts
    of the words from i on, which the first part precedes.
    """
    rows = frequent[length].rows

    def part(first: int, words: int) -> np.ndarray:
        return frequent[words].log_share(_part_key(rows, first, words))

    best = {length: np.zeros(len(rows))}
    for i in range(length - 1, 0, -1):
        best[i] = np.max([part(i, k) + best[i + k] for k in range(1, length - i + 1)], axis=0)
    cut = np.max([part(0, k) + best[k] for k in range(1, length)], axis=0)
    return part(0, length) - cut


# ---------------------------------------------------------------------------------- the list


class NgramList:
    """Entries of one length and their values, found by their hash."""

    def __init__(self, keys: np.ndarray, values: np.ndarray) -> None:
        hashed = keys * _SPREAD
        order = np.argsort(hashed)
        self._hashed, self._values = hashed[order], values[order]
        # Entries whose hashes begin with the same bits follow each other, from `_firsts` on.
        lengths = np.bincount(self._slots(hashed), minlength=1 << _LIST_BITS)
        self._firsts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        self._longest = int(lengths.max())

    @staticmethod
    def _slots(hashed: np.ndarray) -> np.ndarray:
        return (hashed >> np.uint64(64 - _LIST_BITS)).astype(np.int64)

    def __len__(self) -> int:
        return len(self._values)

    def find(self, keys: np.ndarray, there: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where in `keys` an entry is, int64, and its value.

        Args:
            there: where to look, bool.
        """
        hashed = keys * _SPREAD
        slots = self._slots(hashed)
        first = self._firsts[slots]
        places = np.flatnonzero(there & (first < self._firsts[slots + 1]))
        first, hashed = first[places], hashed[places]
        found = np.full(len(places), -1)
        for i in range(self._longest):
            at = np.minimum(first + i, len(self) - 1)
            fits = self._hashed[at] == hashed
            found[fits] = at[fits]
        fits = found >= 0
        return places[fits], self._values[found[fits]]


def rank_ngrams(values: np.ndarray, keys: np.ndarray, length: int) -> np.ndarray:
    """Return the size of the smallest list that has each n-gram, `(F,)` int64.

    The n-gram of rank r in its length, from 1, is in a list of PARTS[length] x r entries. Of equal
    PMI the smaller hash comes first.
    """
    sizes = np.empty(len(keys), np.int64)
    sizes[np.lexsort((keys, -values))] = PARTS[length] * np.arange(1, len(keys) + 1)
    return sizes


def choose_size(counting: Counting, share: float, sizes: dict[int, NgramList]) -> tuple[int, float]:
    """Return the smallest size of a list that covers `COVERED` of the tokens, and what it covers.

    Args:
        sizes: the n-grams that may be entries, with the results of `rank_ngrams`.
    """
    store, none = counting.store, MAX_ENTRIES + 1
    read = partial(word_blocks, finder=counting.finder, share=share,
                   block_tokens=counting.block_tokens)
    tokens_at = np.zeros(none + 1, np.int64)  # tokens that a list of this size covers first
    for block in watched(store.shards, read, "cover", store.num_tokens):
        smallest = np.full(len(block.words.starts), none)
        for n, keys, there in list_ngrams(block):
            if n in sizes:
                places, size = sizes[n].find(keys, there)  # perhaps above MAX_ENTRIES
                for i in range(n):  # places are unique
                    smallest[places + i] = np.minimum(smallest[places + i], size)
        np.add.at(tokens_at, smallest, block.words.lengths)
    covered = np.cumsum(tokens_at[:none]) / max(1, int(tokens_at.sum()))
    chosen = int(np.searchsorted(covered, min(COVERED, covered[-1])))
    return chosen, float(covered[chosen])


# ---------------------------------------------------------------------------------- the units


def choose_entries(longest: np.ndarray, priorities: np.ndarray) -> np.ndarray:
    """Return the first words of the entries that are units, ascending.

    An entry that lies in a longer one is dropped. Then the entries are taken in the order of their
    priorities, each unless it overlaps one that was taken: here all at once that come before
    all they overlap, until none is left.

    Args:
        longest: words of the longest entry that begins at each word, or 0, `(W,)` int64.
        priorities: unique number of each word, the smallest first, `(W,)` int64.
    """
    ends = np.where(longest > 0, np.arange(len(longest)) + longest, 0)
    reach = np.maximum.accumulate(ends)
    kept = longest > 0
    kept[1:] &= ends[1:] > reach[:-1]
    left = np.flatnonzero(kept)  # their ends ascend too, so only LONGEST - 1 neighbours overlap
    chosen = []
    while len(left):
        first = np.ones(len(left), bool)
        overlaps = []
        for i in range(1, min(LONGEST, len(left))):
            overlap = left[i:] < ends[left[:-i]]
            overlaps.append((i, overlap))
            before = priorities[left[:-i]] < priorities[left[i:]]
            first[i:] &= ~(overlap & before)
            first[:-i] &= ~(overlap & ~before)
        gone = first.copy()
        for i, overlap in overlaps:
            gone[i:] |= overlap & first[:-i]
            gone[:-i] |= overlap & first[i:]
        chosen.append(left[first])
        left = left[~gone]
    return np.sort(np.concatenate([np.empty(0, np.int64), *chosen]))


def cut_units(
    block: Block, entries: dict[int, NgramList], continues: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Cut a block into units.

    Args:
        entries: the listed n-grams of each length with their PMI.
        continues: which tokens continue a word, `(T,)` bool.
    Returns:
        PMI of each token's unit, 0 for single words, float16; which tokens continue a unit, uint8.
    """
    words = block.words
    longest = np.zeros(len(words.starts), np.int64)
    values = np.zeros(len(words.starts))
    for n, keys, there in list_ngrams(block):  # longer ones later
        if n in entries:
            places, found = entries[n].find(keys, there)
            longest[places], values[places] = n, found
    positions = block.start + words.starts
    bits = counter_bits(0, 0, positions, STREAM_OVERLAPS).astype(np.int64)
    firsts = choose_entries(longest, bits << 39 | positions)
    lengths = longest[firsts]
    number = np.repeat(firsts, lengths)
    inside = number + np.arange(len(number)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    by_word = np.zeros(len(words.starts))
    by_word[inside] = values[number]
    units = continues.astype(np.uint8)
    units[words.starts[inside[inside != number]]] = 1
    return spread(by_word, words), units


def score_pmi(
    counting: Counting, least: int = MIN_COUNT, bits: int = COUNTER_BITS
) -> Scored:
    """The PMI of the n-gram that a token is in, and the n-grams as units."""
    store = counting.store
    share = min(1.0, MAX_COUNTED / max(1, store.num_tokens))
    frequent = count_ngrams(counting, share, least, bits)
    ranked = {}
    for n in PARTS:
        keys, values = frequent[n].keys, pmi(frequent, n)
        keys, values = keys[values > 0], values[values > 0]
        ranked[n] = keys, values, rank_ngrams(values, keys, n)
    if not any(len(keys) for keys, _, _ in ranked.values()):
        raise DataError(
            f"{store.prefix}: none of its n-grams occurs {least} times and more often than its "
            f"words would together; this measure needs a store of more text"
        )
    size, covered = choose_size(
        counting, share, {n: NgramList(keys, sizes) for n, (keys, _, sizes) in ranked.items()})
    entries = {n: NgramList(keys[sizes <= size], values[sizes <= size])
               for n, (keys, values, sizes) in ranked.items()}

    def cut(shard: Shard) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for block in counting.blocks(shard):
            continues = find_continuations(block.tokens, block.offsets, counting.finder.table)
            yield cut_units(block, entries, continues)

    numbers = {str(n): len(found) for n, found in entries.items()}
    shown = ", ".join(f"{number:,} of {n} words" for n, number in numbers.items())
    sampled = "" if share == 1 else (
        f"; counted in {share:.1%} of the sequences, since the store has more than "
        f"{MAX_COUNTED:,} tokens")
    return Scored(
        lambda shard: (scores for scores, _ in cut(shard)),
        {"entries": numbers, "covered": covered, "counted_share": share},
        f"{sum(numbers.values()):,} n-grams ({shown}) cover {covered:.1%} of the tokens{sampled}",
        lambda shard: (units for _, units in cut(shard)),
    )
