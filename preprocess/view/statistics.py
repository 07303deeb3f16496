"""Count the contents of mask indices over a store, in blocks of bounded memory, and table them.

Every count is a sum over blocks of whole sequences; nothing loops over tokens or sequences, and
neither shards nor blocks change a result. Letters: `T` tokens, `B` sequences, `M` masked
positions, `V` vocabulary.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from preprocess.errors import ConfigError
from preprocess.masking import find_candidates, index_bounds
from preprocess.store import BLOCK_TOKENS, Shard, TokenStore, iterate_blocks, open_array
from preprocess.text.continuations import WordTable, continuation_table, find_continuations
from preprocess.text.stop_words import is_punctuation, is_stop_word
from preprocess.view.pieces import printable
from preprocess.view.tables import Share, Table, percent

OTHER, STOP_WORD, PUNCTUATION = range(3)
KINDS = ("other words", "stop words", "punctuation")
NUM_TYPES = 15
# Upper ends of the bins of a sequence's mask rate, in per cent; before them, one for no mask.
RATE_EDGES = (5, 10, 15, 20, 25, 30, 50, 100)
# Upper ends of the bins of scores (log-odds) but the last: 2 %, 12 %, 27 %, 50 %, ...
SCORE_EDGES = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)
# The bin of each of the 65,536 float16 numbers, by its bits: ten times as fast as a search.
_SCORE_BINS = np.searchsorted(
    SCORE_EDGES, np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
).astype(np.uint8)


# --------------------------------------------------------------------------- kinds of tokens


def word_table(tokenizer: Any) -> WordTable | None:
    """Return `continuation_table`, or None for a tokenizer without word boundaries."""
    try:
        return continuation_table(tokenizer)
    except ConfigError:
        return None


def type_names(tokenizer: Any, vocab_size: int) -> list[str]:
    """Return a readable name of every id, `V` strings.

    WordPiece names are kept (`##ing`); byte-level ones become their text, with an open box (U+2423)
    for a leading space, which tells the beginning of a word from a continuation.
    """
    names = [printable(tokenizer.id_to_token(i) or f"#{i}") for i in range(vocab_size)]
    if type(tokenizer.model).__name__ != "WordPiece":
        texts = tokenizer.decode_batch([[i] for i in range(vocab_size)], skip_special_tokens=False)
        for i, text in enumerate(texts):
            if text.strip() and "\ufffd" not in text:
                names[i] = printable(text.replace(" ", "\u2423"))
    return names


def type_kinds(names: list[str]) -> np.ndarray:
    """Return the kind of every id, as far as the id alone tells: `(V,)` uint8.

    Args:
        names: from `type_names`.
    """
    plain = [name.replace("\u2423", "") for name in names]
    kinds = np.full(len(names), OTHER, dtype=np.uint8)
    kinds[[i for i, name in enumerate(plain) if is_stop_word(name)]] = STOP_WORD
    kinds[[i for i, name in enumerate(plain) if is_punctuation(name)]] = PUNCTUATION
    return kinds


def find_kinds(
    tokens: np.ndarray, offsets: np.ndarray, kinds: np.ndarray, table: WordTable | None
) -> np.ndarray:
    """Return the kind of each token: a stop word only where it is a word by itself.

    In `the ##sis the`, the first `the` is part of another word. A stop word of several tokens
    counts as another word; practical vocabularies have next to none.

    Args:
        tokens: token ids, `(T,)` uint16.
        offsets: start of each sequence in `tokens`, and the end, `(B+1,)` int64.
        kinds: from `type_kinds`, `(V,)` uint8.
        table: from `word_table`; without one every such token counts.
    Returns:
        `(T,)` uint8.
    """
    found = kinds[tokens]
    if table is not None and len(tokens):
        continues = find_continuations(tokens, offsets, table)
        part = continues.copy()
        part[:-1] |= continues[1:]
        found[part & (found == STOP_WORD)] = OTHER
    return found


@dataclass(frozen=True)
class Vocabulary:
    """The name of each id (`V` strings), its kind (`(V,)` uint8), and how words join."""

    names: list[str]
    kinds: np.ndarray
    table: WordTable | None

    @classmethod
    def read(cls, tokenizer: Any, vocab_size: int) -> Vocabulary:
        """Read it off a `tokenizers.Tokenizer`."""
        names = type_names(tokenizer, vocab_size)
        return cls(names, type_kinds(names), word_table(tokenizer))


# -------------------------------------------------------------------------------- the counts


@dataclass
class IndexCounts:
    """Counts of one mask index.

    type_masked: masked tokens of each id, `(V,)` int64.
    kind_masked: masked tokens of each of `KINDS`, `(3,)` int64.
    score_masked: masked tokens in each bin of scores, `(len(SCORE_EDGES) + 1,)` int64.
    rates: sequences without a mask, then those in each bin of `RATE_EDGES`, int64.
    by_chance: number of the masked tokens that a random choice of as many per sequence is
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
    indices: one `IndexCounts` per index. type_tokens: occurrences of each id, `(V,)` int64.
    kind_tokens, score_tokens: tokens of each kind and bin of scores, as in `IndexCounts`.
    shared: tokens that both of the first two indices hold; expected and variance: of that number,
        if the second held as many per sequence, drawn at random.
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
    """Count the contents of mask indices, and how the first two overlap.

    Args:
        names: of the indices.
        vocabulary: to count stop words and punctuation, which takes as long again.
        scores: name of scores to sort the tokens by.
        max_tokens: count at most about this many, in blocks spaced evenly over the store.
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
    """Find the ids that an index masks most often, and at the highest and the lowest rate.

    Args:
        type_tokens: occurrences of each id, `(V,)` int64.
        size: the most ids to return in each list.
    Returns:
        Three arrays of ids, `(<= size,)` int64, and the least number of occurrences for the second
        and third: that of which 5 would be masked at the overall rate.
    """
    masked, share = counts.type_masked, counts.masked / max(int(type_tokens.sum()), 1)
    often = np.argsort(-masked, kind="stable")[:size]
    least = int(np.ceil(5 / share)) if share else 0
    ids = np.flatnonzero(type_tokens >= max(least, 1)) if share else np.empty(0, np.int64)
    rate = masked[ids] / type_tokens[ids]
    above, below = ids[rate > share], ids[rate < share]
    # Of equal rates, the more frequent id is the better evidence.
    most = above[np.lexsort((-type_tokens[above], -rate[rate > share]))][:size]
    fewest = below[np.lexsort((-type_tokens[below], rate[rate < share]))][:size]
    return often[masked[often] > 0], most, fewest, least


# -------------------------------------------------------------------------------- the tables


def share_of(log_odds: float) -> str:
    """Write log-odds as the probability that they stand for."""
    # 1 / (1 + exp(-x)) would overflow where the scores are far below 0.
    return f"{50 * (1 + math.tanh(log_odds / 2)):.0f} %"


def make_tables(
    statistics: Statistics, names: list[str], vocabulary: Vocabulary, with_scores: bool
) -> list[Table]:
    """Make all tables; `names` are those of the indices, the shown one first."""
    tables = [overall_table(statistics, names), kinds_table(statistics, names)]
    if with_scores:
        tables.append(scores_table(statistics, names))
    tables.append(rates_table(statistics, names))
    for name, index in zip(names, statistics.indices, strict=True):
        tables += type_tables(statistics, name, index, vocabulary.names)
    return tables


def overall_table(statistics: Statistics, names: list[str]) -> Table:
    """Show how much is masked, and how much two indices share."""
    indices = statistics.indices
    without = [int(index.rates[0]) for index in indices]
    rows = [
        ["masked tokens", *(f"{index.masked:,}" for index in indices)],
        ["of the candidates", *(percent(i.masked, statistics.candidates) for i in indices)],
        ["sequences without a mask", *(f"{count:,}" for count in without)],
        ["of all sequences", *(percent(count, statistics.sequences) for count in without)],
        ["hit by chance", *(percent(index.by_chance, index.masked) for index in indices)],
    ]
    note = (
        f"{statistics.tokens:,} tokens in {statistics.sequences:,} sequences, "
        f"{statistics.candidates:,} of them candidates (not special)"
    )
    if statistics.tokens < statistics.store_tokens:
        part = percent(statistics.tokens, statistics.store_tokens)
        note += f"; counted were {part} of the store, in blocks spaced evenly"
    note += (
        ". Hit by chance: expected share of the masked tokens that a random choice of as many per "
        "sequence would hit."
    )
    if len(names) > 1:
        shared = statistics.shared
        rows.insert(4, ["in the other index too", *(percent(shared, i.masked) for i in indices)])
        low, high = (statistics.expected + sign * 2 * math.sqrt(statistics.variance)
                     for sign in (-1, 1))
        note += (
            f" The two indices share {shared:,} tokens. Had one of them drawn as many per sequence "
            f"at random, they would share {statistics.expected:,.0f} ({max(low, 0):,.0f} to "
            f"{high:,.0f} in 95 % of draws)."
        )
    return Table("Overall", ("", *names), rows, note)


def kinds_table(statistics: Statistics, names: list[str]) -> Table:
    """Show the share of stop words and punctuation in the text and among masked tokens."""
    columns = [statistics.kind_tokens, *(index.kind_masked for index in statistics.indices)]
    rows = [[title, *(Share(int(column[kind]), int(column.sum())) for column in columns)]
            for kind, title in enumerate(KINDS)]
    return Table(
        "Kinds of words", ("share of", "all tokens", *(f"masked in {n}" for n in names)), rows,
        "Stop words are English words that carry no opinion by themselves; negations are not "
        "included.",
    )


def scores_table(statistics: Statistics, names: list[str]) -> Table:
    """Show how the share of masked tokens grows with the score."""
    lowest, highest = SCORE_EDGES[0], SCORE_EDGES[-1]
    bounds = [
        (f"to {lowest:g}", f"to {share_of(lowest)}"),
        *((f"above {low:g} to {high:g}", f"{share_of(low)} to {share_of(high)}")
          for low, high in itertools.pairwise(SCORE_EDGES)),
        (f"above {highest:g}", f"above {share_of(highest)}"),
    ]
    rows = [
        [*bounds[i], f"{tokens:,}",
         *(Share(int(index.score_masked[i]), tokens) for index in statistics.indices)]
        for i, tokens in enumerate(statistics.score_tokens.tolist())
    ]
    return Table(
        "Masked by importance",
        ("log-odds", "important with", "tokens", *(f"masked in {n}" for n in names)), rows,
        "Log-odds that a token is important, the probability they stand for, and the share of "
        "such tokens that is masked.",
    )


def rates_table(statistics: Statistics, names: list[str]) -> Table:
    """Show the distribution of mask rates over sequences."""
    titles = ["no mask", *(f"above {low} to {high} %"
                           for low, high in itertools.pairwise((0, *RATE_EDGES)))]
    rows = [[title, *(Share(int(one.rates[i]), statistics.sequences) for one in statistics.indices)]
            for i, title in enumerate(titles)]
    return Table(
        "Mask rate of each sequence",
        ("mask rate", *(f"sequences, {name}" for name in names)), rows,
        "Share of all sequences with that mask rate.",
    )


def type_tables(
    statistics: Statistics, name: str, index: IndexCounts, type_names: list[str]
) -> list[Table]:
    """Show which tokens an index masks most often, above their share, and below it."""
    often, most, fewest, least = rank_types(index, statistics.type_tokens, NUM_TYPES)
    overall = index.masked / max(statistics.tokens, 1)

    def table(title: str, ids: np.ndarray, note: str) -> Table:
        rows = [
            [type_names[i], f"{occurs:,}", f"{masked:,}", Share(masked, occurs),
             f"{masked / occurs / overall:.1f} x"]
            for i, masked, occurs in zip(
                ids.tolist(), index.type_masked[ids].tolist(),
                statistics.type_tokens[ids].tolist(), strict=True)
        ]
        head = ("token", "occurs", "masked", "rate", "lift")
        return Table(f"{name}: {title}", head, rows, note, subject=name)

    lift = f"Lift: a token's rate over that of all tokens, {percent(overall, 1)}."
    at_least = f"Of tokens that occur {least:,} times or more."
    by_chance = ""
    if least:
        # Four standard deviations of the number of masks of the rarest token listed: among
        # thousands of tokens, few exceed it.
        chance = 1 + 4 * math.sqrt((1 - overall) / (least * overall))
        by_chance = f" The rarest of them may reach a lift of {chance:.1f} by chance."
    return [
        table("masked most often", often, lift),
        table("masked above their share", most, at_least + by_chance),
        table("passed over", fewest, at_least),
    ]
