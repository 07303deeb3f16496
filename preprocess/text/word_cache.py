"""Text to ids with one tokenizer call per distinct word: several times as fast.

Words repeat, and the tokenizer treats a word independently of its neighbours in two cases:

- WordPiece after BERT's own splitting: any space, line end or ASCII punctuation mark splits a text
  into pieces whose ids are those of the text.
- Byte-level BPE after GPT-2's pattern: every single space without other white space beside it does
  so, and belongs to the word after it.

Where a sentence ends inside such a word, the offsets of the word's tokens decide. Other tokenizers
go to `encode_batch` of `preprocess/text/encode.py`, which is also the slow twin: ids and boundaries
are the same. The cache keeps only what the library returned.
"""

from __future__ import annotations

import itertools
import json
import re
import string
from typing import Any

import numpy as np

from preprocess.text.encode import (
    BORDER,
    Encoded,
    encode_batch,
    encode_in_blocks,
    sentence_of,
    split_sentences,
)

MAX_CACHE_BYTES = 1 << 27  # about; then all words are forgotten
ENTRY_BYTES = 200  # overhead of a word and its ids in a Python dictionary

# Characters that BERT's splitting separates from any neighbour.
_ASCII_MARKS = string.punctuation
_WIDE_MARKS = "\u3002\uff01\uff1f\u2026\u2018\u2019\u201c\u201d"
_BERT_BORDERS = frozenset(" \n\r\t" + _ASCII_MARKS + _WIDE_MARKS)
_PARTS = re.compile(f"[{re.escape(_ASCII_MARKS)}]|[^{re.escape(_ASCII_MARKS)}]+")


# A word; or the parts of a word that sentence ends cut it into, and the number of one part.
Key = str | tuple[tuple[str, ...], int]


class WordCache:
    """Encode texts, and remember the ids of words.

    Args:
        backend: a `tokenizers.Tokenizer` from `prepare_backend`.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self._kind = _kind_of(backend)
        self._ids: dict[Key, bytes] = {}
        self._num_bytes = MAX_CACHE_BYTES + 1

    def encode(self, texts: list[str], language: str | None) -> Encoded:
        """Return what `encode_batch` returns for the same texts."""
        if not self._kind:
            return encode_batch(self.backend, texts, language)
        if self._num_bytes > MAX_CACHE_BYTES:
            self._ids, self._num_bytes = {"": b""}, 0
        return encode_in_blocks(texts, language, self._encode_short)

    def _encode_short(self, texts: list[str], language: str | None) -> Encoded:
        split = [self._split(text, language) for text in texts]
        self._learn(set(itertools.chain.from_iterable(itertools.chain.from_iterable(split))))
        return self._look_up(split)

    def _split(self, text: str, language: str | None) -> list[list[Key]]:
        """Return the words of each sentence; none for a text that is dropped."""
        if not text or text.isspace():
            return []
        pieces = [text] if language is None else split_sentences(text, language)
        if self._kind == "bert":
            words: list[list[Any]] = [piece.replace("\n", " ").split(" ") for piece in pieces]
        else:
            for i in range(len(pieces) - 1):
                if BORDER.match(pieces[i][-2:] + pieces[i + 1][:1], 1):
                    pieces[i], pieces[i + 1] = pieces[i][:-1], " " + pieces[i + 1]
            if text.split() == text.split(" "):  # no other white space: faster
                words = [piece.replace(" ", "\n ").split("\n") for piece in pieces]
            else:
                words = [BORDER.split(piece) for piece in pieces]
        for i, (left, right) in enumerate(itertools.pairwise(pieces)):
            if not self._is_border(left, right):
                head, tail = words[i][-1], words[i + 1][0]
                parts = (head, tail) if isinstance(head, str) else (*head[0], tail)
                for number in range(len(parts)):
                    sentence = words[i + 2 - len(parts) + number]
                    sentence[0 if number else -1] = (parts, number)
        return words

    def _is_border(self, left: str, right: str) -> bool:
        if self._kind == "bert":
            return left[-1] in _BERT_BORDERS or right[0] in _BERT_BORDERS
        return BORDER.match(left[-1:] + right[:2], 1) is not None

    def _remember(self, key: Key, ids: bytes) -> None:
        if key not in self._ids:
            self._ids[key] = ids
            self._num_bytes += ENTRY_BYTES + len(ids) + len(str(key))

    def _learn(self, keys: set[Key]) -> None:
        """Get the ids of the words that are not known yet."""
        unknown = keys.difference(self._ids)
        for key in unknown:
            if not isinstance(key, str):
                self._learn_parts(key[0])
        missing = [key for key in unknown if isinstance(key, str)]
        parts = [_PARTS.findall(key) if self._kind == "bert" else [key] for key in missing]
        new = list(set(itertools.chain.from_iterable(parts)).difference(self._ids))
        # One call for all of them; `word_ids` gives the word of each token.
        encoding = self.backend.encode(new, is_pretokenized=True, add_special_tokens=False)
        ids = np.array(encoding.ids, "<u2").tobytes()
        counts = np.bincount(np.array(encoding.word_ids, np.int64), minlength=len(new))
        ends = 2 * np.cumsum(counts)
        for key, count, end in zip(new, (2 * counts).tolist(), ends.tolist(), strict=True):
            self._remember(key, ids[end - count : end])
        for key, words in zip(missing, parts, strict=True):
            if len(words) > 1:
                self._remember(key, b"".join(map(self._ids.__getitem__, words)))

    def _learn_parts(self, parts: tuple[str, ...]) -> None:
        encoding = self.backend.encode("".join(parts), add_special_tokens=False)
        owners = sentence_of(encoding.offsets, np.cumsum([len(part) for part in parts]))
        cuts = np.searchsorted(owners, np.arange(len(parts) + 1))
        for number, (first, last) in enumerate(itertools.pairwise(cuts.tolist())):
            self._remember((parts, number), np.array(encoding.ids[first:last], "<u2").tobytes())

    def _look_up(self, texts: list[list[list[Key]]]) -> Encoded:
        """Join the ids of known words; drop sentences and documents without any."""
        known = self._ids.__getitem__
        sentences: list[bytes] = []
        documents: list[int] = []
        for text in texts:
            made = [ids for words in text if (ids := b"".join(map(known, words)))]
            if made:
                sentences += made
                documents.append(len(made))
        return (
            np.frombuffer(b"".join(sentences), "<u2"),
            np.array([len(ids) // 2 for ids in sentences], np.int64),
            np.array(documents, np.int64),
            len(texts) - len(documents),
        )


def _kind_of(backend: Any) -> str:
    """Return "bert" or "bytes" if words may be looked up one by one, else ""."""
    parts = json.loads(backend.to_str())
    if not all(token["special"] for token in parts["added_tokens"]):
        return ""  # they may contain spaces or absorb those around them; special ones are text
    model, splitter, normalizer = (
        parts[name] or {} for name in ("model", "pre_tokenizer", "normalizer")
    )
    kinds = tuple(part.get("type") for part in (model, splitter, normalizer))
    # Every character that Python calls a space then has no ids, so it never makes a sentence.
    if kinds == ("WordPiece", "BertPreTokenizer", "BertNormalizer") and normalizer["clean_text"]:
        return "bert"
    by_pattern = splitter.get("use_regex", True) and not model.get("dropout")
    if kinds in (("BPE", "ByteLevel", None), ("BPE", "ByteLevel", "NFC")) and by_pattern:
        return "bytes"
    return ""
