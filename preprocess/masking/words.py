"""The words of a store as numbers: a hash of each word's piece ids, counted in fixed memory.

Every score by counting is one of words, since pieces of a word would only tell which words are
split. A word with a special token in it (`[UNK]`) is no word: it is not counted and scores 0.

Letters: `T` tokens, `W` words, `B` sequences, `D` documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from preprocess.errors import ConfigError
from preprocess.masking.draws import counter_uniform
from preprocess.progress import Progress
from preprocess.store import BLOCK_TOKENS, MAX_VOCAB, Shard, TokenStore, iterate_blocks, ranges
from preprocess.text.continuations import (
    WordTable,
    continuation_table,
    find_continuations,
    open_tokenizer,
)

SLOTS = 1 << 24
"""Counters of a table of words. Those of one piece have a counter each, by their id; the others
share the rest by their hash: of 100,000 such words 600 share one, of a million 6 in 100."""

LARGEST = np.finfo(np.float16).max
_LEAST = np.finfo(np.float16).smallest_subnormal
STREAM_COUNTED = 64  # of `draws.py`: sequences that are counted where a store is too large

_GAMMA, _MIX_1, _MIX_2 = (
    np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_BASE = np.uint64(0xD1342543DE82EF95)  # odd: of the polynomial over the pieces of a word


def mix(values: np.ndarray) -> np.ndarray:
    """Return 64 well-mixed bits of each value, uint64: SplitMix64's last step."""
    found = values.astype(np.uint64) * _GAMMA
    found ^= found >> np.uint64(30)
    found *= _MIX_1
    found ^= found >> np.uint64(27)
    found *= _MIX_2
    found ^= found >> np.uint64(31)
    return found


_CODES = mix(np.arange(1, MAX_VOCAB + 1))


class Words(NamedTuple):
    """The words of a block.

    starts: first token of each, `(W,)` int64.
    lengths: number of tokens of each, `(W,)` int64.
    keys: hash of its piece ids, `(W,)` uint64; the same wherever the word occurs.
    known: False where a piece is a special token, `(W,)` bool.
    slots: counter of each word, below `SLOTS`, `(W,)` int64.
    """

    starts: np.ndarray
    lengths: np.ndarray
    keys: np.ndarray
    known: np.ndarray
    slots: np.ndarray


class Block(NamedTuple):
    """A run of whole sequences: ids `(T,)`, offsets of its sequences `(B+1,)` from 0, its words.

    start: its first token's position in the whole store; of a sample, meaningless.
    """

    start: int
    tokens: np.ndarray
    offsets: np.ndarray
    words: Words


def hash_words(pieces: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Hash words given as runs of piece ids that follow each other, `(W,)` uint64.

    The sum over a word's pieces of code(id) x base^place, modulo 2^64, mixed: two different words
    have the same hash once in 2^64.
    """
    if not len(starts):
        return np.zeros(0, np.uint64)
    powers = np.multiply.accumulate(np.full(int(lengths.max()), _BASE))
    place = np.arange(len(pieces)) - np.repeat(starts, lengths)
    return mix(np.add.reduceat(_CODES[pieces] * powers[place], starts))


@dataclass(frozen=True)
class WordFinder:
    """Finds the words among a store's ids.

    table: how ids join into words.
    special: True for the ids of special tokens, `(MAX_VOCAB,)` bool.
    """

    table: WordTable
    special: np.ndarray

    @classmethod
    def of(cls, store: TokenStore, what: str) -> WordFinder:
        """Read it off the tokenizer beside a store.

        Raises:
            ConfigError: a tokenizer whose words cannot be told apart; `what` needs them.
        """
        try:
            table = continuation_table(open_tokenizer(store.tokenizer_dir))
        except ConfigError as error:
            reason = str(error).split(";")[0]
            raise ConfigError(
                f"{what} counts words, and {store.prefix} has none: {reason}; score it by a "
                f"network (train/score_tokens.py)"
            ) from None
        special = np.zeros(MAX_VOCAB, bool)
        special[list(store.all_special_ids)] = True
        return cls(table, special)

    def find(self, tokens: np.ndarray, offsets: np.ndarray) -> Words:
        """Return the words of complete sequences.

        Args:
            tokens: ids, `(T,)` uint16.
            offsets: of the sequences, `(B+1,)` int64, from 0 to T.
        """
        starts = np.flatnonzero(~find_continuations(tokens, offsets, self.table))
        lengths = np.diff(starts, append=len(tokens))
        keys = hash_words(tokens, starts, lengths)
        special = self.special[tokens]
        known = np.ones(len(starts), bool)
        if special.any():
            known = ~np.logical_or.reduceat(special, starts)
        hashed = ((keys >> np.uint64(32)) * np.uint64(SLOTS - MAX_VOCAB)) >> np.uint64(32)
        slots = np.where(lengths == 1, tokens[starts], hashed.astype(np.int64) + MAX_VOCAB)
        return Words(starts, lengths, keys, known, slots)


def word_blocks(
    shard: Shard, finder: WordFinder, share: float = 1.0, block_tokens: int = BLOCK_TOKENS
) -> Iterator[Block]:
    """Yield a shard block by block.

    Args:
        share: of the sequences to keep, chosen by a hash of their position.
    """
    for block in iterate_blocks(shard.sequence_offsets, block_tokens):
        offsets = shard.sequence_offsets[block.start : block.stop + 1]
        start = int(offsets[0])
        tokens = shard.tokens[start : offsets[-1]]
        offsets = offsets - start
        if share < 1:
            first = shard.token_start + start + offsets[:-1]
            kept = counter_uniform(0, 0, first, STREAM_COUNTED) < share
            lengths = np.diff(offsets)[kept]
            tokens = tokens[ranges(offsets[:-1][kept], lengths)]
            offsets = np.concatenate([[0], np.cumsum(lengths)])
        yield Block(shard.token_start + start, tokens, offsets, finder.find(tokens, offsets))


def document_blocks(
    shard: Shard, finder: WordFinder, block_tokens: int = BLOCK_TOKENS
) -> Iterator[tuple[Block, np.ndarray]]:
    """Yield a shard in blocks of whole documents, each with the document of every word.

    A block has at most `block_tokens` tokens, or one document. The documents, `(W,)` int64, are
    numbered from 0 in each block.
    """
    documents, sequences = shard.document_offsets, shard.sequence_offsets
    first = 0
    while first < shard.num_documents:
        start = int(sequences[documents[first]])
        # The last sequence that begins within reach, then the last document that begins by then.
        last = int(np.searchsorted(sequences, start + block_tokens, side="right")) - 1
        last = int(np.searchsorted(documents, last, side="right")) - 1
        last = max(last, first + 1)
        borders = documents[first : last + 1]
        offsets = sequences[borders[0] : borders[-1] + 1] - start
        tokens = shard.tokens[start : start + offsets[-1]]
        words = finder.find(tokens, offsets)
        edges = np.searchsorted(words.starts, offsets[borders - borders[0]])
        number = np.repeat(np.arange(last - first), np.diff(edges))
        yield Block(shard.token_start + start, tokens, offsets, words), number
        first = last


def watched(
    shards: Iterable[Shard], read: Any, label: str, num_tokens: int
) -> Iterator[Any]:
    """Yield `read(shard)`'s blocks of all shards, and show how far they are.

    Args:
        num_tokens: of all shards.
    """
    with Progress(num_tokens, "token", label=label) as progress:
        for shard in shards:
            done = 0
            for block in read(shard):
                yield block
                here = block[0] if isinstance(block[0], Block) else block
                progress.update(len(here.tokens))
                done += len(here.tokens)
            progress.update(shard.num_tokens - done)  # what a sample has left out


def count_words(
    store: TokenStore, finder: WordFinder, label: str, block_tokens: int = BLOCK_TOKENS
) -> np.ndarray:
    """Count the words of a store by slot, `(SLOTS,)` int64."""
    counts = np.zeros(SLOTS, np.int64)
    blocks = watched(
        store.shards, lambda shard: word_blocks(shard, finder, 1.0, block_tokens), label,
        store.num_tokens)
    for block in blocks:
        np.add.at(counts, block.words.slots[block.words.known], 1)
    return counts


def to_half(values: np.ndarray) -> np.ndarray:
    """Return float16 numbers, finite and of the same sign: "above 0" must stay true.

    Values beyond float16 become its largest, those too small for it its smallest.
    """
    half = np.clip(values, -LARGEST, LARGEST).astype(np.float16)
    lost = (half == 0) & (values != 0)
    half[lost] = np.copysign(_LEAST, values[lost]).astype(np.float16)
    return half


def spread(values: np.ndarray, words: Words) -> np.ndarray:
    """Give each token the value of its word, `(T,)` float16; words with `[UNK]` have 0."""
    half = to_half(values)
    half[~words.known] = 0
    return np.repeat(half, words.lengths)
