"""Importance resampling: which documents look most like some target texts (after Xie 2023, DSIR).

A document is the bag of its words and pairs of neighbouring words, hashed into `BUCKETS`. The log
weight of a document is the sum, over that bag, of ln p_target - ln p_corpus of each bucket, and the
documents with the largest sum of weight and Gumbel noise are taken.

Three things differ from the publication. Weights are sums and grow with length, so documents
compete only with those of their own octave of length (64 to 127 words, ...), and the same share of
each octave is taken, so that its tokens have the lengths of the corpus. A small target is smoothed
by one n-gram per bucket; otherwise each bucket that it lacks would cost 9 nats. The noise is a hash
of the document's content, so that equal documents have equal keys: one of them is taken.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

BUCKETS = 10_000
SMALL_TARGET = 10**6  # n-grams, below which the target is smoothed
FLOOR = 1e-8  # probability added to each bucket, against the logarithm of 0
OCTAVES = 32
MAX_REMEMBERED = 1 << 19  # hashes of words in memory
_WORD = re.compile(r"\w+|[^\w\s]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)

# A document that may be taken. `key` is weight plus noise, `mean` the weight per n-gram.
CANDIDATE = np.dtype([("key", "f8"), ("digest", "u8"), ("document", "i8"), ("tokens", "i8"),
                      ("mean", "f8")])


class _Hashes(dict[str, int]):
    """64-bit hashes of words; the words met last are remembered."""

    def __missing__(self, word: str) -> int:
        if len(self) >= MAX_REMEMBERED:
            self.clear()
        made = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        self[word] = made
        return made


_hashes = _Hashes()


def hash_grams(texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the hashed n-grams of some texts.

    Returns:
        Bucket of each n-gram and the text that it is in, `(G,)` int64, and the number of words of
        each text, `(D,)` int64.
    """
    words = [_WORD.findall(text.lower()) for text in texts]
    lengths = np.array([len(text) for text in words], np.int64)
    hashes = np.fromiter(
        map(_hashes.__getitem__, itertools.chain.from_iterable(words)), np.uint64)
    owners = np.repeat(np.arange(len(texts)), lengths)
    pairs = np.flatnonzero(owners[1:] == owners[:-1])
    both = (hashes[pairs] * _FACTOR) ^ hashes[pairs + 1]
    both = (both ^ (both >> np.uint64(31))) * _FACTOR
    buckets = np.concatenate([hashes, both >> np.uint64(1)]) % np.uint64(BUCKETS)
    return buckets.astype(np.int64), np.concatenate([owners, owners[pairs]]), lengths


def count_buckets(buckets: np.ndarray) -> np.ndarray:
    """Return how many n-grams are in each bucket, `(BUCKETS,)` int64."""
    return np.bincount(buckets, minlength=BUCKETS)


def log_ratios(target: np.ndarray, raw: np.ndarray, smoothing: float) -> np.ndarray:
    """Return ln p_target - ln p_corpus of each bucket, `(B,)`.

    Args:
        target, raw: n-grams of the target and of the corpus in each bucket, `(B,)`.
        smoothing: n-grams added to each bucket of the target.
    """
    wanted = (target + smoothing) / (target.sum() + smoothing * len(target))
    return np.log(wanted + FLOOR) - np.log(raw / raw.sum() + FLOOR)


def octaves_of(lengths: np.ndarray) -> np.ndarray:
    """Return the octave of each length: 0 for 0 and 1 words, 1 for 2 and 3, 2 for 4 to 7, ..."""
    return np.frexp(np.maximum(lengths, 1).astype(np.float64))[1].astype(np.int64) - 1


def gumbel(digests: np.ndarray) -> np.ndarray:
    """Return the Gumbel noise of each digest, from 53 of its bits."""
    uniform = np.maximum((digests >> np.uint64(11)).astype(np.float64), 0.5) * 2.0**-53  # never 0
    return -np.log(-np.log(uniform))


def digest_ids(ids: np.ndarray, seed: int) -> int:
    """Return 64 bits that depend on the ids of a document, uint16, and on the seed."""
    salt = (seed % (1 << 128)).to_bytes(16, "little")
    return int.from_bytes(
        hashlib.blake2b(ids.astype("<u2").tobytes(), digest_size=8, salt=salt).digest(), "little")


def share_out(number: int, weights: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Share a number among groups in proportion to `weights`, none above its limit.

    What a group cannot take goes to the others, and what rounding down leaves to the largest ones.

    Returns:
        `(K,)` int64; the sum is `number`, or all of `limits` if that is less.
    """
    given = np.zeros(len(limits), np.int64)
    left = min(number, int(limits.sum()))
    while left:
        free = limits - given
        # A group without weight takes what is left when the others are full.
        scale = np.where(free > 0, weights, 0.0)
        if not scale.sum():
            scale = (free > 0).astype(np.float64)
        ideal = left * scale / scale.sum()
        more = np.minimum(np.floor(ideal).astype(np.int64), free)
        if not more.any():
            order = np.argsort(-np.where(free > 0, ideal, -1.0), kind="stable")
            more[order[: min(left, int((free > 0).sum()))]] = 1
        given += more
        left -= int(more.sum())
    return given


class Best:
    """The `number` candidates with the largest keys, of each content one, in bounded memory.

    Equal contents have equal keys, so one that has once been dropped never comes back.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._kept = np.empty(0, CANDIDATE)
        self._new: list[np.ndarray] = []
        self._num_new = 0

    def add(self, candidates: np.ndarray) -> None:
        """Offer some more, `(n,)` of `CANDIDATE`, in the order of the corpus."""
        self._new.append(candidates)
        self._num_new += len(candidates)
        if self._num_new > max(self._number, 1024):
            self.take()

    def take(self) -> np.ndarray:
        """Return the best so far, best first."""
        every = np.concatenate([self._kept, *self._new])
        every = every[np.lexsort((every["document"], every["digest"], -every["key"]))]
        first = np.ones(len(every), bool)
        first[1:] = every["digest"][1:] != every["digest"][:-1]
        self._kept, self._new, self._num_new = every[first][: self._number], [], 0
        return self._kept


def weigh(
    texts: list[str], digests: np.ndarray, ratios: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the key, the weight per n-gram and the octave of each document, `(D,)`.

    Args:
        digests: from `digest_ids`, `(D,)` uint64.
        ratios: from `log_ratios`.
    """
    buckets, owners, lengths = hash_grams(texts)
    weights = np.bincount(owners, ratios[buckets], minlength=len(texts))
    grams = np.bincount(owners, minlength=len(texts))
    return weights + gumbel(digests), weights / np.maximum(grams, 1), octaves_of(lengths)


def choose(best: Iterable[Best], number: int, documents: np.ndarray) -> list[np.ndarray]:
    """Return the candidates to take of each octave.

    Args:
        documents: of the corpus in each octave, `(OCTAVES,)`.
    """
    taken: list[Any] = [some.take() for some in best]
    quotas = share_out(number, documents, np.array([len(some) for some in taken]))
    return [some[:quota] for some, quota in zip(taken, quotas.tolist(), strict=True)]
