"""Count the contents of mask indices over a store, in blocks of bounded memory, and table them.

Every count is a sum over blocks of whole sequences; nothing loops over tokens or sequences, and
neither shards nor blocks change a result. Letters: `T` tokens, `B` sequences, `M` masked
positions, `V` vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from preprocess.masking import find_candidates, index_bounds
from preprocess.store import BLOCK_TOKENS, Shard, TokenStore, iterate_blocks, open_array
from preprocess.text.continuations import WordTable, find_continuations, word_table
from preprocess.text.kinds import KINDS, find_kinds, type_kinds
from preprocess.view.overlaps import Overlaps
from preprocess.view.pieces import printable
from preprocess.view.scale import Scale, share_of
from preprocess.view.tables import Share, Table, percent

NUM_TYPES = 15
# Upper ends of the bins of a sequence's mask rate, in per cent; before them, one for no mask.
RATE_EDGES = (5, 10, 15, 20, 25, 30, 50, 100)
SIZES = ("1", "2", "3", "4", "5 and more")  # of a word, in tokens
FIRST, LAST, INSIDE = range(3)
PLACES = ("first", "last", "others")  # of a sequence; the only token of one is its first


# --------------------------------------------------------------------------- kinds of tokens


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


def find_sizes(continues: np.ndarray) -> np.ndarray:
    """Return the length of each token's word, as its place in `SIZES`: `(T,)` uint8.

    Args:
        continues: from `find_continuations`, `(T,)` bool.
    """
    starts = np.flatnonzero(~continues)  # the first token of all is one
    size = np.diff(np.append(starts, len(continues)))
    return np.repeat(np.minimum(size, len(SIZES)).astype(np.uint8) - 1, size)


def find_places(offsets: np.ndarray) -> np.ndarray:
    """Return the place of each token in its sequence, one of `PLACES`: `(T,)` uint8.

    Args:
        offsets: start of each sequence, and the end, `(B+1,)` int64, from 0.
    """
    places = np.full(offsets[-1], INSIDE, dtype=np.uint8)
    filled = np.diff(offsets) > 0
    places[offsets[1:][filled] - 1] = LAST
    places[offsets[:-1][filled]] = FIRST
    return places


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
    """Counts of one mask index, all int64.

    type_masked: masked tokens of each id, `(V,)`.
    score_masked: masked tokens in each bin of scores, `(bins,)`.
    kind_masked, size_masked, place_masked: of each of `KINDS`, `SIZES` and `PLACES`.
    rates: sequences without a mask, then those in each bin of `RATE_EDGES`.
    runs: of neighbouring masked tokens of one sequence.
    """

    type_masked: np.ndarray
    score_masked: np.ndarray
    kind_masked: np.ndarray = field(default_factory=lambda: _zeros(len(KINDS)))
    size_masked: np.ndarray = field(default_factory=lambda: _zeros(len(SIZES)))
    place_masked: np.ndarray = field(default_factory=lambda: _zeros(len(PLACES)))
    rates: np.ndarray = field(default_factory=lambda: _zeros(len(RATE_EDGES) + 1))
    runs: int = 0

    @property
    def masked(self) -> int:
        return int(self.type_masked.sum())


@dataclass
class Statistics:
    """Counts over a store, or over evenly spaced blocks of it.

    store_tokens: tokens of the store, of which `tokens` were counted.
    special_ids: ids that are never masked.
    indices: one `IndexCounts` per index. type_tokens: occurrences of each id, `(V,)` int64.
    overlaps: of each pair of indices.
    scale: of the scores that tokens were sorted by.
    score_tokens, kind_tokens: tokens of each bin of scores and kind, as in `IndexCounts`.
    size_tokens, place_tokens: candidates of each word length and place, likewise.
    """

    store_tokens: int
    special_ids: tuple[int, ...]
    indices: list[IndexCounts]
    type_tokens: np.ndarray
    overlaps: Overlaps
    scale: Scale
    score_tokens: np.ndarray
    kind_tokens: np.ndarray = field(default_factory=lambda: _zeros(len(KINDS)))
    size_tokens: np.ndarray = field(default_factory=lambda: _zeros(len(SIZES)))
    place_tokens: np.ndarray = field(default_factory=lambda: _zeros(len(PLACES)))
    candidates: int = 0
    sequences: int = 0

    @property
    def tokens(self) -> int:
        return int(self.type_tokens.sum())


def _zeros(size: int) -> np.ndarray:
    return np.zeros(size, dtype=np.int64)


def count_masks(
    store: TokenStore,
    names: Sequence[str],
    vocabulary: Vocabulary | None = None,
    scores: str | None = None,
    max_tokens: int | None = None,
    scale: Scale | None = None,
    drawn: Mapping[str, list[np.ndarray]] | None = None,
) -> Statistics:
    """Count the contents of mask indices, and how each pair of them overlaps.

    Args:
        names: of the indices.
        vocabulary: to count stop words, punctuation and words, which takes as long again.
        scores: name of scores to sort the tokens by, and scale: how to.
        max_tokens: count at most about this many, in blocks spaced evenly over the store.
        drawn: masked positions of each shard, of those indices that are not beside the store.
    """
    scale = scale or Scale()
    num_bins = len(scale.edges) + 1
    result = Statistics(
        store.num_tokens,
        tuple(store.all_special_ids),
        [IndexCounts(_zeros(store.vocab_size), _zeros(num_bins)) for _ in names],
        _zeros(store.vocab_size),
        Overlaps.empty(len(names)),
        scale,
        _zeros(num_bins),
    )
    block_tokens = min(BLOCK_TOKENS, max_tokens or BLOCK_TOKENS)
    stride = -(-store.num_tokens // max_tokens) if max_tokens else 1
    number, bin_of = 0, scale.bins()
    for i, shard in enumerate(store.shards):
        arrays = [drawn[name][i] if drawn and name in drawn else open_array(shard, name, "mask")[0]
                  for name in names]
        binned = (open_array(shard, scores, "scores")[0], bin_of) if scores else None
        for block in iterate_blocks(shard.sequence_offsets, block_tokens):
            if number % stride == 0:
                _count_block(result, store, shard, block, arrays, binned, vocabulary)
            number += 1
    return result


def _count_block(
    result: Statistics,
    store: TokenStore,
    shard: Shard,
    block: slice,
    arrays: list[np.ndarray],
    binned: tuple[np.ndarray, np.ndarray] | None,
    vocabulary: Vocabulary | None,
) -> None:
    offsets = shard.sequence_offsets[block.start : block.stop + 1]
    start, end = int(offsets[0]), int(offsets[-1])
    tokens, local = shard.tokens[start:end], offsets - start
    allowed = find_candidates(tokens, store.all_special_ids)
    # Of each sequence, how many tokens may be masked: (B,) int64.
    possible = np.diff(np.append(0, np.cumsum(allowed))[local])
    places, kinds, sizes, bins = find_places(local), None, None, None
    result.place_tokens += np.bincount(places[allowed], minlength=len(PLACES))
    if vocabulary is not None:
        table = vocabulary.table
        continues = None if table is None else find_continuations(tokens, local, table)
        kinds = find_kinds(tokens, vocabulary.kinds, continues)
        result.kind_tokens += np.bincount(kinds, minlength=len(KINDS))
        if continues is not None:
            sizes = find_sizes(continues)
            result.size_tokens += np.bincount(sizes[allowed], minlength=len(SIZES))
    if binned is not None:
        bins = binned[1][binned[0][start:end].view(np.uint16)]
        result.score_tokens += np.bincount(bins, minlength=len(result.score_tokens))
    result.type_tokens += np.bincount(tokens, minlength=store.vocab_size)
    result.candidates += int(possible.sum())
    result.sequences += len(possible)

    chosen, counts = [], []  # of each index: positions in the block (M,); of each sequence (B,)
    for array, index in zip(arrays, result.indices, strict=True):
        bounds = index_bounds(array, offsets)
        mine = array[bounds[0] : bounds[-1]].astype(np.int64) - start
        chosen.append(mine)
        counts.append(np.diff(bounds))
        index.type_masked += np.bincount(tokens[mine], minlength=store.vocab_size)
        index.rates += _bin_rates(counts[-1], possible)
        place = places[mine]
        index.place_masked += np.bincount(place, minlength=len(PLACES))
        index.runs += int(np.count_nonzero((np.diff(mine, prepend=-2) != 1) | (place == FIRST)))
        if kinds is not None:
            index.kind_masked += np.bincount(kinds[mine], minlength=len(KINDS))
        if sizes is not None:
            index.size_masked += np.bincount(sizes[mine], minlength=len(SIZES))
        if bins is not None:
            index.score_masked += np.bincount(bins[mine], minlength=len(index.score_masked))
    result.overlaps.add(chosen, counts, possible, end - start)


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


def make_tables(
    statistics: Statistics, names: list[str], vocabulary: Vocabulary, with_scores: bool
) -> list[Table]:
    """Make all tables; `names` are those of the indices, the shown one first."""
    tables = [overall_table(statistics, names), kinds_table(statistics, names)]
    if with_scores:
        tables.append(scores_table(statistics, names))
    if vocabulary.table is not None:
        tables.append(sizes_table(statistics, names))
    tables += [places_table(statistics, names), octaves_table(statistics, names),
               rates_table(statistics, names)]
    for name, index in zip(names, statistics.indices, strict=True):
        tables += type_tables(statistics, name, index, vocabulary.names)
    return tables


def overall_table(statistics: Statistics, names: list[str]) -> Table:
    """Show how much is masked, and how much two indices share."""
    indices, overlaps = statistics.indices, statistics.overlaps
    without = [int(index.rates[0]) for index in indices]
    rows = [
        ["masked tokens", *(f"{index.masked:,}" for index in indices)],
        ["of the candidates", *(percent(i.masked, statistics.candidates) for i in indices)],
        ["sequences without a mask", *(f"{count:,}" for count in without)],
        ["of all sequences", *(percent(count, statistics.sequences) for count in without)],
        ["hit by chance", *(percent(float(overlaps.expected[i, i]), index.masked)
                            for i, index in enumerate(indices))],
        ["tokens in a run", *(f"{index.masked / index.runs:.2f}" if index.runs else "-"
                              for index in indices)],
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
        "sequence would hit. Tokens in a run: mean length of a run of masked neighbours; random "
        "masks at a rate r have runs of about 1 / (1 - r)."
    )
    if len(names) > 1:
        shared, expected = int(overlaps.shared[0, 1]), float(overlaps.expected[0, 1])
        rows.insert(4, ["in the other index too", *(percent(shared, i.masked) for i in indices)])
        spread = 2 * math.sqrt(overlaps.variance[0, 1])
        note += (
            f" The two indices share {shared:,} tokens. Had one of them drawn as many per sequence "
            f"at random, they would share {expected:,.0f} ({max(expected - spread, 0):,.0f} to "
            f"{expected + spread:,.0f} in 95 % of draws)."
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
    scale = statistics.scale
    lowest, highest = scale.edges[0], scale.edges[-1]
    pairs = list(itertools.pairwise(scale.edges))
    titles = [f"to {lowest:.4g}", *(f"above {low:.4g} to {high:.4g}" for low, high in pairs),
              f"above {highest:.4g}"]
    rows = [
        [title, f"{tokens:,}",
         *(Share(int(index.score_masked[i]), tokens) for index in statistics.indices)]
        for i, (title, tokens) in enumerate(
            zip(titles, statistics.score_tokens.tolist(), strict=True))
    ]
    columns = [scale.unit, "tokens", *(f"masked in {n}" for n in names)]
    if not scale.in_log_odds:
        note = ("Score, and the share of such tokens that is masked; ends of the ranges are "
                "quantiles of the scores.")
        if scale.boundary:
            note += " Tokens above 0 are important."
        return Table("Masked by score", columns, rows, note)
    columns.insert(1, "important with")
    shares = [f"to {share_of(lowest)}", *(f"{share_of(low)} to {share_of(high)}"
                                          for low, high in pairs), f"above {share_of(highest)}"]
    for row, share in zip(rows, shares, strict=True):
        row.insert(1, share)
    return Table("Masked by importance", columns, rows,
                 "Log-odds that a token is important, the probability they stand for, and the "
                 "share of such tokens that is masked.")


def _groups_table(
    title: str, names: list[str], heads: Sequence[str], groups: Sequence[str], tokens: np.ndarray,
    masked: Sequence[np.ndarray], note: str,
) -> Table:
    """Show the share of masked tokens in each group of candidates.

    Args:
        heads: of the column of groups.
        tokens: candidates of each group; masked: those that are masked, by index.
    """
    rows = [[group, f"{int(tokens[i]):,}", *(Share(int(one[i]), int(tokens[i])) for one in masked)]
            for i, group in enumerate(groups)]
    return Table(title, (*heads, "tokens", *(f"masked in {n}" for n in names)), rows, note)


def sizes_table(statistics: Statistics, names: list[str]) -> Table:
    """Show the share of masked tokens by the length of their word."""
    return _groups_table(
        "Masked by length of the word", names, ["tokens in the word"], SIZES,
        statistics.size_tokens, [index.size_masked for index in statistics.indices],
        "Share of the tokens of such words that is masked, special tokens aside.")


def places_table(statistics: Statistics, names: list[str]) -> Table:
    """Show the share of masked tokens at the ends of a sequence and inside it."""
    return _groups_table(
        "Masked by place in the sequence", names, ["tokens of a sequence"], PLACES,
        statistics.place_tokens, [index.place_masked for index in statistics.indices],
        "A sequence is a sentence, or a document in a store without sentences.")


def octaves_table(statistics: Statistics, names: list[str]) -> Table:
    """Show the share of masked tokens by how often their type occurs, in octaves."""
    counted = statistics.type_tokens.copy()
    counted[list(statistics.special_ids)] = 0
    ids = np.flatnonzero(counted)
    octave = np.frexp(counted[ids])[1] - 1  # of 1: 0, of 2 and 3: 1, ...
    found = np.unique(octave).tolist()

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(octave, values[ids], minlength=1)[found].astype(np.int64)

    titles = [f"{1 << n:,} to {(2 << n) - 1:,}" if n else "1" for n in found]
    return _groups_table(
        "Masked by frequency", names, ["occurrences of the token"], titles, total(counted),
        [total(index.type_masked) for index in statistics.indices],
        "Tokens by how often they occur in what was counted, special tokens aside.")


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
