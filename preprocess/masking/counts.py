"""Scores by counting words: tf-idf, the difference to another store, lists, content words.

Each function takes a `Counting`, counts over all shards of its store where it must, and returns
a `Scored`, which scores one shard at a time. Nothing grows with the store: tables of words have a
fixed size, and a block is about a million tokens, or one document where documents count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from preprocess.errors import ConfigError, DataError
from preprocess.masking.words import (
    SLOTS,
    Block,
    WordFinder,
    count_words,
    document_blocks,
    hash_words,
    spread,
    watched,
    word_blocks,
)
from preprocess.store import BLOCK_TOKENS, Shard, TokenStore
from preprocess.text.continuations import find_continuations
from preprocess.text.kinds import OTHER, find_kinds
from preprocess.text.lexicon import Lexicon

PRIOR = 500.0  # words that the prior of `difference` weighs
Z_LIMIT = 1e4
_SLOT_BITS = SLOTS.bit_length() - 1


@dataclass(frozen=True)
class Counting:
    """What a measure by counting reads.

    store: the store to score.
    finder: finds its words.
    against: another store of the same tokenizer.
    lexicon: words with weights.
    kinds: of each id (`preprocess/text/kinds.py`), `(V,)` uint8.
    block_tokens: size of a block; it changes no score.
    """

    store: TokenStore
    finder: WordFinder
    against: TokenStore | None = None
    lexicon: Lexicon | None = None
    kinds: np.ndarray | None = None
    block_tokens: int = BLOCK_TOKENS

    def blocks(self, shard: Shard) -> Iterator[Block]:
        return word_blocks(shard, self.finder, 1.0, self.block_tokens)


class Scored(NamedTuple):
    """A store that has been counted.

    scores: yield a shard's scores block by block, one per token, float16.
    counts: what was counted; kept in the JSON of the scores.
    note: the line to print about it.
    units: yield which tokens continue a unit, uint8; None for a measure without units.
    """

    scores: Callable[[Shard], Iterator[np.ndarray]]
    counts: dict[str, Any]
    note: str
    units: Callable[[Shard], Iterator[np.ndarray]] | None = None


# ------------------------------------------------------------------------------------ tf-idf


def inverse_frequency(documents: np.ndarray, num_documents: int) -> np.ndarray:
    """Return scikit-learn's smooth idf, ln((1 + N) / (1 + df)) + 1, float64.

    Args:
        documents: how many of the N documents hold each word.
    """
    return np.log((1 + num_documents) / (1 + documents.astype(np.float64))) + 1


def score_tfidf(counting: Counting) -> Scored:
    """tf x idf of each word in its document, without normalisation (it changes no ranking there).

    As `TfidfVectorizer(norm=None)` of scikit-learn on the store's words, but for words that share
    a slot.
    """
    store, size = counting.store, counting.block_tokens

    def read(shard: Shard) -> Iterator[tuple[Block, np.ndarray]]:
        return document_blocks(shard, counting.finder, size)

    def keys_of(block: Block, number: np.ndarray) -> np.ndarray:
        known = block.words.known
        return number[known] << _SLOT_BITS | block.words.slots[known]

    holding = np.zeros(SLOTS, np.int64)
    for block, number in watched(store.shards, read, "count", store.num_tokens):
        keys = np.sort(keys_of(block, number))  # np.unique hashes, ten times as slowly
        np.add.at(holding, keys[np.diff(keys, prepend=-1) != 0] & (SLOTS - 1), 1)

    def scores(shard: Shard) -> Iterator[np.ndarray]:
        for block, number in read(shard):
            found, place, times = np.unique(
                keys_of(block, number), return_inverse=True, return_counts=True)
            values = times * inverse_frequency(holding[found & (SLOTS - 1)], store.num_documents)
            by_word = np.zeros(len(block.words.starts))
            by_word[block.words.known] = values[place]
            yield spread(by_word, block.words)

    used = int((holding > 0).sum())
    return Scored(scores, {"documents": store.num_documents, "words": used},
                  f"{used:,} different words in {store.num_documents:,} documents")


# -------------------------------------------------------------------------------- difference


def difference_z(
    here: np.ndarray, there: np.ndarray, num_here: int, num_there: int, prior: float = PRIOR
) -> np.ndarray:
    """Return the z of the log-odds ratio with an informative Dirichlet prior (Monroe et al. 2008).

    a = prior x pooled share of the word; d = ln((y1 + a) / (n1 + prior - y1 - a)) - the same of
    the other store; z = d / sqrt(1 / (y1 + a) + 1 / (y2 + a)), within +-`Z_LIMIT`.

    Args:
        here, there: counts of each word in the store and in the other one.
        num_here, num_there: words of each.
    """
    y1, y2 = here.astype(np.float64), there.astype(np.float64)
    a = prior * (y1 + y2) / (num_here + num_there)
    with np.errstate(divide="ignore", invalid="ignore"):
        odds1 = np.log(y1 + a) - np.log(num_here + prior - y1 - a)
        odds2 = np.log(y2 + a) - np.log(num_there + prior - y2 - a)
        z = (odds1 - odds2) / np.sqrt(1 / (y1 + a) + 1 / (y2 + a))
    # A word that is every word of both stores has no odds, and a word of neither no z.
    return np.clip(np.nan_to_num(z, nan=0.0), -Z_LIMIT, Z_LIMIT)


def score_difference(counting: Counting) -> Scored:
    """How much more often a word occurs in the store than in another one: see `difference_z`."""
    store, other = counting.store, counting.against
    assert other is not None
    if store.info["tokenizer"]["files"] != other.info["tokenizer"]["files"]:
        raise ConfigError(
            f"--against {other.prefix}: made with another tokenizer than {store.prefix}, so their "
            f"words cannot be compared; tokenize its text with --tokenizer {store.tokenizer_dir}"
        )
    if store.fingerprint == other.fingerprint:
        raise ConfigError(
            f"--against {other.prefix}: has the text of {store.prefix}, so nothing differs; give "
            f"a store of general text"
        )
    here = count_words(store, counting.finder, "count", counting.block_tokens)
    there = count_words(other, counting.finder, "count the other", counting.block_tokens)
    num_here, num_there = int(here.sum()), int(there.sum())
    for prefix, count in ((store.prefix, num_here), (other.prefix, num_there)):
        if not count:
            raise DataError(f"{prefix}: has no words to count; give a store with text")
    z = np.zeros(SLOTS, np.float32)
    used = np.flatnonzero(here)
    z[used] = difference_z(here[used], there[used], num_here, num_there)

    def scores(shard: Shard) -> Iterator[np.ndarray]:
        for block in counting.blocks(shard):
            yield spread(z[block.words.slots], block.words)

    more = int((z > 1.96).sum())
    return Scored(
        scores, {"words": num_here, "words_against": num_there, "different_words": len(used)},
        f"{more:,} of {len(used):,} different words are clearly more frequent (z above 1.96) than "
        f"in {other.prefix}")


# ----------------------------------------------------------------------------------- lexicon


def score_lexicon(counting: Counting) -> Scored:
    """The weight of a word in a list; 0 for a word that is not listed."""
    lexicon = counting.lexicon
    assert lexicon is not None
    lengths = np.array([len(pieces) for pieces in lexicon.forms], np.int64)
    pieces = np.concatenate([np.array(pieces) for pieces in lexicon.forms])
    keys = hash_words(pieces, np.cumsum(lengths) - lengths, lengths)
    order = np.argsort(keys)
    keys, weights = keys[order], np.array(lexicon.weights)[order]
    words = np.array(lexicon.words)[order]

    def find(block: Block) -> np.ndarray:
        """Return the number of each word among the listed ones, or -1."""
        place = np.minimum(np.searchsorted(keys, block.words.keys), len(keys) - 1)
        return np.where(keys[place] == block.words.keys, place, -1)

    times, num_tokens = np.zeros(len(keys), np.int64), 0
    for block in watched(
        counting.store.shards, counting.blocks, "count", counting.store.num_tokens
    ):
        place = find(block)
        times += np.bincount(place[place >= 0], minlength=len(keys))
        num_tokens += int(block.words.lengths[place >= 0].sum())
    present = set(words[times > 0].tolist())
    absent = sorted(set(lexicon.words) - present)
    share = num_tokens / max(1, counting.store.num_tokens)
    counts = {**lexicon.counts, "occur": len(present), "never_occur": len(absent)}
    note = lexicon.describe(len(present), share, [lexicon.names[i] for i in absent])
    if not present:
        raise DataError(f"{note}; every score would be 0, so give words of this text")

    def scores(shard: Shard) -> Iterator[np.ndarray]:
        for block in counting.blocks(shard):
            place = find(block)
            yield spread(np.where(place >= 0, weights[place], 0.0), block.words)

    return Scored(scores, {**counts, "share_of_tokens": share}, note)


# ----------------------------------------------------------------------------------- content


def score_content(counting: Counting) -> Scored:
    """1 for words that are neither stop words nor punctuation, 0 for all others."""
    kinds, table = counting.kinds, counting.finder.table
    assert kinds is not None

    def scores(shard: Shard) -> Iterator[np.ndarray]:
        for block in counting.blocks(shard):
            tokens, words = block.tokens, block.words
            found = find_kinds(
                tokens, kinds, find_continuations(tokens, block.offsets, table)) == OTHER
            yield (found & np.repeat(words.known, words.lengths)).astype(np.float16)

    return Scored(scores, {}, "")
