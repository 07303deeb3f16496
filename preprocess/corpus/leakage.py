"""How many test texts of a task occur in a corpus, and in which of its documents.

Three numbers, each a count of test texts:

- equal or contained: all words of the text, in order, in one document;
- half covered: the 8-grams that one document shares with the text cover half of its words;
- any 8-gram: a document shares eight words in order. One phrase, "one of the best films of the
  year", is enough for that, so it is no leakage by itself.

Words are compared after NFKC and case folding, and every character that is neither a letter nor a
digit is a space: "It's great, truly!" and "it 's great truly" are equal. Texts of fewer than eight
words count for the first number only; of fewer than four ("a good film") only if they are a
document by themselves. What is kept in memory grows with the test texts, not with the corpus, and
hashes only propose: every hit is compared word by word.
"""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from preprocess.errors import DataError
from preprocess.files import atomic_write_json, read_json, seal

GRAM = 8  # words
MIN_CONTAINED = 4  # words, below which a text inside a longer one is common language
LEAKAGE_VERSION = 1  # of the rules; part of the identity of a count
MAX_PAIRS = 1 << 20  # of a window of the corpus and one of a test text, compared at a time
_WORD = re.compile(r"[^\W_]+")


def split_words(text: str) -> list[str]:
    """Return the words of a text as they are compared: letters and digits, NFKC, case folded."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


class _Grams(NamedTuple):
    """All runs of `size` words of some test texts, by hash.

    hashes: ascending, `(G,)` uint64.
    known: whether a hash with these first bits is among them, `(2^20,)` bool.
    texts, starts: text of each run, and its first word in that text, `(G,)` int64.
    """

    size: int
    hashes: np.ndarray
    known: np.ndarray
    texts: np.ndarray
    starts: np.ndarray


_FACTORS = np.array(
    [pow(0x9E3779B97F4A7C15, k + 1, 1 << 64) for k in range(GRAM)], np.uint64)
_KNOWN_BITS = 20


def _hash_runs(stream: np.ndarray, at: np.ndarray, size: int) -> np.ndarray:
    """Return the hash of the run of `size` words at each of the places `at`, uint64."""
    total = np.zeros(len(at), np.uint64)
    for k in range(size):
        total += (stream[at + k].astype(np.uint64) + np.uint64(1)) * _FACTORS[k]
    total ^= total >> np.uint64(29)
    return total * np.uint64(0xBF58476D1CE4E5B9)


class LeakIndex:
    """The test texts of a task, and which of them have been met so far.

    Args:
        texts: words of each distinct test text, from `split_words`.
        unknown: the word that stands for what the tokenizer does not know; nothing but it, again
            and again, shows nothing.

    Attributes:
        contained, half, any: of each text, whether a document has shown it so, `(N,)` bool.
    """

    def __init__(self, texts: list[list[str]], unknown: str = "") -> None:
        self._vocabulary: dict[str, int] = {}
        ids = [[self._vocabulary.setdefault(word, len(self._vocabulary) + 1) for word in text]
               for text in texts]
        nothing = self._vocabulary.get(unknown)
        self._lengths = np.array([len(text) for text in texts], np.int64)
        self._begins = np.cumsum(self._lengths) - self._lengths
        self._stream = np.fromiter(itertools.chain.from_iterable(ids), np.int32)
        self._told = np.concatenate([[0], np.cumsum(self._stream != (nothing or 0))])
        self._tiny: dict[tuple[int, ...], list[int]] = {}
        for number, text in enumerate(ids):
            if 0 < len(text) < MIN_CONTAINED and set(text) != {nothing}:
                self._tiny.setdefault(tuple(text), []).append(number)
        self._grams = [grams for size in range(MIN_CONTAINED, GRAM + 1)
                       if (grams := self._collect(size)) is not None]
        self.forget()

    def forget(self) -> None:
        """Begin the count again, for another corpus."""
        self.contained, self.half, self.any = np.zeros((3, len(self._lengths)), bool)

    def counts(self) -> dict[str, int]:
        """Return the three numbers, and of how many texts."""
        return {
            "test_texts": len(self._lengths),
            "equal_or_contained": int(self.contained.sum()),
            "half_covered": int(self.half.sum()),
            "any_8gram": int(self.any.sum()),
        }

    def _collect(self, size: int) -> _Grams | None:
        """Return the runs to look for: of whole texts below `GRAM` words, of parts above."""
        chosen = self._lengths == size if size < GRAM else self._lengths >= size
        texts = np.flatnonzero(chosen)
        counts = self._lengths[texts] - size + 1
        if not len(texts):
            return None
        owners = np.repeat(texts, counts)
        starts = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
        places = self._begins[owners] + starts
        told = self._told[places + size] > self._told[places]
        owners, starts = owners[told], starts[told]
        hashes = _hash_runs(self._stream, places[told], size)
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        known = np.zeros(1 << _KNOWN_BITS, bool)
        known[hashes >> np.uint64(64 - _KNOWN_BITS)] = True
        return _Grams(size, hashes, known, owners[order], starts[order])

    def scan(self, documents: list[list[str]]) -> np.ndarray:
        """Look for the test texts in some documents.

        Args:
            documents: words of each, from `split_words`.
        Returns:
            Which documents hold a test text by one of the first two rules, `(D,)` bool.
        """
        leaked = np.zeros(len(documents), bool)
        lengths = np.array([len(words) for words in documents], np.int64)
        # One 0 behind each document and for each word that no test text has: no run crosses it.
        begins = np.cumsum(lengths + 1) - (lengths + 1)
        stream = np.zeros(int(lengths.sum()) + len(documents), np.int32)
        ids = map(self._vocabulary.get, itertools.chain.from_iterable(documents),
                  itertools.repeat(0))
        at = np.arange(int(lengths.sum())) + np.repeat(np.arange(len(documents)), lengths)
        stream[at] = np.fromiter(ids, np.int32, len(at))
        for number in np.flatnonzero((lengths > 0) & (lengths < MIN_CONTAINED)).tolist():
            words = tuple(stream[begins[number] : begins[number] + lengths[number]].tolist())
            for text in self._tiny.get(words, ()):
                self.contained[text] = leaked[number] = True
        breaks = np.concatenate([[0], np.cumsum(stream == 0)])
        for grams in self._grams:
            hits = list(self._hits(stream, breaks, grams))
            if not hits:
                continue
            places, entries = map(np.concatenate, zip(*hits, strict=True))
            owners = np.searchsorted(begins, places, side="right") - 1
            texts, starts = grams.texts[entries], grams.starts[entries]
            if grams.size < GRAM:
                self.contained[texts] = leaked[owners] = True
                continue
            self.any[texts] = True
            covering = self._cover(owners, texts, starts)
            leaked[covering[0]] = self.half[covering[1]] = True
            first = starts == 0
            for place, text, owner in zip(
                places[first].tolist(), texts[first].tolist(), owners[first].tolist(), strict=True
            ):
                begin, length = self._begins[text], self._lengths[text]
                if np.array_equal(
                    stream[place : place + length], self._stream[begin : begin + length]
                ):
                    self.contained[text] = leaked[owner] = True
        return leaked

    def _hits(
        self, stream: np.ndarray, breaks: np.ndarray, grams: _Grams
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield places in the documents and the entries of `grams` with the same words there."""
        size = grams.size
        places = np.flatnonzero(breaks[size:] == breaks[:-size])
        hashes = _hash_runs(stream, places, size)
        near = grams.known[hashes >> np.uint64(64 - _KNOWN_BITS)]
        places, hashes = places[near], hashes[near]
        low = np.searchsorted(grams.hashes, hashes)
        counts = np.searchsorted(grams.hashes, hashes, side="right") - low
        ends = np.cumsum(counts)
        first = 0
        while first < len(places):
            done = int(ends[first] - counts[first])
            last = max(first + 1, int(np.searchsorted(ends, done + MAX_PAIRS, side="right")))
            some = counts[first:last]
            at = np.repeat(places[first:last], some)
            entries = np.arange(len(at)) + np.repeat(
                low[first:last] - (np.cumsum(some) - some), some)
            begins = self._begins[grams.texts[entries]] + grams.starts[entries]
            same = np.ones(len(at), bool)
            for k in range(size):
                same &= stream[at + k] == self._stream[begins + k]
            if same.any():
                yield at[same], entries[same]
            first = last

    def _cover(
        self, owners: np.ndarray, texts: np.ndarray, starts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return documents and texts of which the document's 8-grams cover half.

        Args:
            owners, texts, starts: of each hit, its document, its text and its first word there.
        """
        order = np.lexsort((starts, texts, owners))
        owners, texts, starts = owners[order], texts[order], starts[order]
        begins = np.ones(len(order), bool)
        begins[1:] = (owners[1:] != owners[:-1]) | (texts[1:] != texts[:-1])
        covered = np.full(len(order), GRAM, np.int64)
        gaps = np.diff(starts)
        covered[:-1] = np.where(begins[1:], GRAM, np.minimum(gaps, GRAM))
        groups = np.flatnonzero(begins)
        enough = 2 * np.add.reduceat(covered, groups) >= self._lengths[texts[groups]]
        return owners[groups[enough]], texts[groups[enough]]


# --------------------------------------------------------------------------- the record


def leakage_path(prefix: str) -> str:
    """Return the file with the counts of the store `prefix`."""
    return f"{prefix}.leakage.json"


def write_leakage(prefix: str, record: dict[str, Any]) -> None:
    """Keep the counts of a store in `P.leakage.json`.

    Args:
        record: `LeakIndex.counts()`, `task`, `test_digest`, `store` (its fingerprint),
            `documents_leaked` and `documents_dropped`.
    """
    atomic_write_json(leakage_path(prefix), seal({**record, "version": LEAKAGE_VERSION}))


def read_leakage(prefix: str) -> dict[str, Any] | None:
    """Return the counts kept beside the store `prefix`; None if there are none.

    Raises:
        DataError: a damaged file, or one that was made for another store.
    """
    path = leakage_path(prefix)
    if not os.path.exists(path):
        return None
    again = f"count again with select_documents.py --tokens {prefix} --overwrite and the task"
    record = read_json(path, again, keys=(
        "task", "store", "test_digest", "test_texts", "documents_dropped", "version"))
    if seal(record) != record:
        raise DataError(f"{path}: its content is not what was written (json_sha256); {again}")
    if os.path.exists(f"{prefix}.json"):
        store = read_json(f"{prefix}.json").get("fingerprint")
        if store != record["store"]:
            raise DataError(
                f"{path}: made for the store {record['store']}, and {prefix} is {store}; {again}")
    return record


def describe_leakage(prefix: str) -> str:
    """Return one line with the counts of the store `prefix`, or "" if nobody has counted.

    Raises:
        DataError: as `read_leakage`.
    """
    record = read_leakage(prefix)
    if record is None:
        return ""
    line = (
        f"leakage: of {record['test_texts']:,} test texts of {record['task']}, the text holds "
        f"{record['equal_or_contained']:,} complete, {record['half_covered']:,} half covered by "
        f"one document, {record['any_8gram']:,} with any 8 words in order"
    )
    dropped = record["documents_dropped"]
    return f"{line}; {dropped:,} documents were dropped" if dropped else line
