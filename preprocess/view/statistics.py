"""Count what mask indices hold, over a whole store, in blocks of bounded memory.

Every count is a sum over blocks of whole sequences; nothing loops over tokens or sequences, and
neither shards nor blocks change a result. Letters: `T` tokens, `B` sequences, `M` masked
positions, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from preprocess.masking import find_candidates, index_bounds
from preprocess.store import BLOCK_TOKENS, Shard, TokenStore, iterate_blocks, open_array
from preprocess.text.continuations import WordTable
from preprocess.view.kinds import KINDS, find_kinds, type_kinds, type_names, word_table

# Upper ends of the bins of a sequence's mask rate, in per cent; before them, one for no mask.
RATE_EDGES = (5, 10, 15, 20, 25, 30, 50, 100)
# Upper ends of the bins of scores (log-odds) but the last: 2 %, 12 %, 27 %, 50 %, ...
SCORE_EDGES = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)
# The bin of each of the 65,536 float16 numbers, by its bits: ten times as fast as a search.
_SCORE_BINS = np.searchsorted(
    SCORE_EDGES, np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
).astype(np.uint8)


# -------------------------------------------------------------------------------- the counts


@dataclass(frozen=True)
class Vocabulary:
    """What is known of each id: `names` (`V` strings), `kinds` (`(V,)` uint8), how words join."""

    names: list[str]
    kinds: np.ndarray
    table: WordTable | None

    @classmethod
    def read(cls, tokenizer: Any, vocab_size: int) -> Vocabulary:
        """Read it off a `tokenizers.Tokenizer`."""
        names = type_names(tokenizer, vocab_size)
        return cls(names, type_kinds(names), word_table(tokenizer))


@dataclass
class IndexCounts:
    """Counts of one mask index.

    type_masked: masked tokens of each id, `(V,)` int64.
    kind_masked: masked tokens of each of `KINDS`, `(3,)` int64.
    score_masked: masked tokens in each bin of scores, `(len(SCORE_EDGES) + 1,)` int64.
    rates: sequences without a mask, then those in each bin of `RATE_EDGES`, int64.
    by_chance: how many of the masked tokens a random choice of as many in each sequence would be
        expected to hit.
    """

    type_masked: np.ndarray
    kind_masked: np.ndarray = field(default_factory=lambda: _zeros(len(KINDS)))
    score_masked: np.ndarray = field(default_factory=lambda: _zeros(len(SCORE_EDGES) + 1))
    rates: np.ndarray = field(default_factory=lambda: _zeros(len(RATE_EDGES) + 1))
    by_chance: float = 0.0

    @property
    def masked(self) -> int:
        return int(self.type_masked.sum())


@dataclass
class Statistics:
    """Counts over a store, or over evenly spaced blocks of it.

    store_tokens: tokens of the store, of which `tokens` were counted.
    indices: one `IndexCounts` an index. type_tokens: occurrences of each id, `(V,)` int64.
    kind_tokens, score_tokens: tokens of each kind and bin of scores, as in `IndexCounts`.
    shared: tokens that the first two indices hold both; expected and variance: of that number, if
        the second held as many of each sequence, drawn at random.
    """

    store_tokens: int
    indices: list[IndexCounts]
    type_tokens: np.ndarray
    kind_tokens: np.ndarray = field(default_factory=lambda: _zeros(len(KINDS)))
    score_tokens: np.ndarray = field(default_factory=lambda: _zeros(len(SCORE_EDGES) + 1))
    candidates: int = 0
    sequences: int = 0
    shared: int = 0
    expected: float = 0.0
    variance: float = 0.0

    @property
    def tokens(self) -> int:
        return int(self.type_tokens.sum())


def _zeros(size: int) -> np.ndarray:
    return np.zeros(size, dtype=np.int64)


def count_masks(
    store: TokenStore,
    names: list[str],
    vocabulary: Vocabulary | None = None,
    scores: str | None = None,
    max_tokens: int | None = None,
) -> Statistics:
    """Count what mask indices hold, and how the first two overlap.

    Args:
        names: of the indices.
        vocabulary: to count stop words and punctuation, which takes as long again.
        scores: name of scores to sort the tokens by.
        max_tokens: count about as many at most, in blocks spaced evenly over the store.
    """
    result = Statistics(
        store.num_tokens,
        [IndexCounts(_zeros(store.vocab_size)) for _ in names],
        _zeros(store.vocab_size),
    )
    block_tokens = min(BLOCK_TOKENS, max_tokens or BLOCK_TOKENS)
    stride = -(-store.num_tokens // max_tokens) if max_tokens else 1
    number = 0
    for shard in store.shards:
        arrays = [open_array(shard, name, "mask")[0] for name in names]
        odds = open_array(shard, scores, "scores")[0] if scores else None
        for block in iterate_blocks(shard.sequence_offsets, block_tokens):
            if number % stride == 0:
                _count_block(result, store, shard, block, arrays, odds, vocabulary)
            number += 1
    return result


def _count_block(
    result: Statistics,
    store: TokenStore,
    shard: Shard,
    block: slice,
    arrays: list[np.ndarray],
    scores: np.ndarray | None,
    vocabulary: Vocabulary | None,
) -> None:
    offsets = shard.sequence_offsets[block.start : block.stop + 1]
    start, end = int(offsets[0]), int(offsets[-1])
    tokens = shard.tokens[start:end]
    # Of each sequence, how many tokens may be masked: (B,) int64.
    before = np.append(0, np.cumsum(find_candidates(tokens, store.all_special_ids)))
    possible = np.diff(before[offsets - start])
    kinds = bins = None
    if vocabulary is not None:
        kinds = find_kinds(tokens, offsets - start, vocabulary.kinds, vocabulary.table)
        result.kind_tokens += np.bincount(kinds, minlength=len(KINDS))
    if scores is not None:
        bins = _SCORE_BINS[scores[start:end].view(np.uint16)]
        result.score_tokens += np.bincount(bins, minlength=len(SCORE_EDGES) + 1)
    result.type_tokens += np.bincount(tokens, minlength=store.vocab_size)
    result.candidates += int(before[-1])
    result.sequences += len(possible)

    chosen, counts = [], []  # of each index: positions in the block (M,); of each sequence (B,)
    for array, index in zip(arrays, result.indices, strict=True):
        bounds = index_bounds(array, offsets)
        chosen.append(array[bounds[0] : bounds[-1]].astype(np.int64) - start)
        counts.append(np.diff(bounds))
        index.type_masked += np.bincount(tokens[chosen[-1]], minlength=store.vocab_size)
        index.rates += _bin_rates(counts[-1], possible)
        index.by_chance += float(np.sum(counts[-1] ** 2 / np.maximum(possible, 1)))
        if kinds is not None:
            index.kind_masked += np.bincount(kinds[chosen[-1]], minlength=len(KINDS))
        if bins is not None:
            index.score_masked += np.bincount(bins[chosen[-1]], minlength=len(SCORE_EDGES) + 1)
    if len(arrays) > 1:
        result.shared += len(np.intersect1d(chosen[0], chosen[1], assume_unique=True))
        # Hypergeometric, for each sequence: of n tokens, a and b drawn without regard to each
        # other share ab/n, with variance ab(n-a)(n-b)/(n^2 (n-1)).
        a, b, n = counts[0], counts[1], np.maximum(possible, 1).astype(np.float64)
        result.expected += float(np.sum(a * b / n))
        spread = a * b * (n - a) * (n - b) / (n * n * np.maximum(n - 1, 1))
        result.variance += float(np.sum(spread))


def _bin_rates(counts: np.ndarray, possible: np.ndarray) -> np.ndarray:
    """Count sequences by the share of their candidates that is masked, as in `IndexCounts.rates`.

    In whole numbers: 3 of 20 are 15 %, and belong to the bin that ends there.
    """
    above = sum((100 * counts > edge * possible).astype(np.int64) for edge in (0, *RATE_EDGES[:-1]))
    return np.bincount(above, minlength=len(RATE_EDGES) + 1)


def rank_types(
    counts: IndexCounts, type_tokens: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Find the ids that an index masks most often, most and least for how often they occur.

    Args:
        type_tokens: occurrences of each id, `(V,)` int64.
        size: how many to give at most.
    Returns:
        Three arrays of ids, `(<= size,)` int64; and the occurrences from which on an id takes part
        in the second and third, chosen so that 5 of them would be masked at the overall rate.
    """
    masked, share = counts.type_masked, counts.masked / max(int(type_tokens.sum()), 1)
    often = np.argsort(-masked, kind="stable")[:size]
    least = int(np.ceil(5 / share)) if share else 0
    ids = np.flatnonzero(type_tokens >= max(least, 1)) if share else np.empty(0, np.int64)
    rate = masked[ids] / type_tokens[ids]
    above, below = ids[rate > share], ids[rate < share]
    # Of equal rates, the one that occurs more often says more.
    most = above[np.lexsort((-type_tokens[above], -rate[rate > share]))][:size]
    fewest = below[np.lexsort((-type_tokens[below], rate[rate < share]))][:size]
    return often[masked[often] > 0], most, fewest, least
