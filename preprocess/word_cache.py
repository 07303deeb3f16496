"""Text to ids with each distinct word going through the tokenizer once: several times as fast.

Words of a text repeat, and the tokenizer's work on one does not depend on its neighbours, if

- WordPiece comes after BERT's own splitting: then any space, line end or ASCII punctuation mark
  parts a text into pieces whose ids are those of the text;
- or byte-level BPE comes after GPT-2's pattern: then every single space does that has no other
  white space beside it; it belongs to the word after it.

Texts and tokenizers of other kinds go to `encode_batch` of `preprocess/encode.py`, which is also
the slow twin: ids and boundaries are the same. Only what the library says is remembered.
"""

from __future__ import annotations

import itertools
import json
import re
import string
from typing import Any

import numpy as np

from preprocess.encode import (
    BLOCK_CHARACTERS,
    BORDER,
    Encoded,
    encode_batch,
    join_encoded,
    valid_unicode,
)

MAX_CACHE_BYTES = 1 << 27  # of remembered words, about; then all are forgotten
ENTRY_BYTES = 200  # a word and its ids in a dictionary of Python, beside their content

# Either side of a sentence boundary: what BERT's splitting parts from any neighbour.
_ASCII_MARKS = string.punctuation
_WIDE_MARKS = "\u3002\uff01\uff1f\u2026\u2018\u2019\u201c\u201d"
_BERT_BORDERS = frozenset(" \n\r\t" + _ASCII_MARKS + _WIDE_MARKS)
_PARTS = re.compile(f"[{re.escape(_ASCII_MARKS)}]|[^{re.escape(_ASCII_MARKS)}]+")


class WordCache:
    """Encode texts, remembering the ids of words.

    Args:
        backend: a `tokenizers.Tokenizer` from `prepare_backend`.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self._kind = _kind_of(backend)
        self._ids: dict[str, bytes] = {}
        self._num_bytes = MAX_CACHE_BYTES + 1

    def encode(self, texts: list[str], language: str | None) -> Encoded:
        """Return what `encode_batch` returns for the same texts."""
        if not self._kind:
            return encode_batch(self.backend, texts, language)
        if self._num_bytes > MAX_CACHE_BYTES:
            self._ids, self._num_bytes = {"": b""}, 0
        texts = [valid_unicode(text) for text in texts]
        split = [self._split(text, language) for text in texts]
        self._learn(set(itertools.chain.from_iterable(itertools.chain(*filter(None, split)))))
        made = []
        for plain, run in itertools.groupby(zip(texts, split, strict=True), lambda p: p[1] is None):
            if plain:
                made.append(encode_batch(self.backend, [text for text, _ in run], language))
            else:
                made.append(self._look_up([words for _, words in run if words is not None]))
        return join_encoded(made)

    def _split(self, text: str, language: str | None) -> list[list[str]] | None:
        """Return the words of each sentence, or None where the text must be taken as a whole."""
        if len(text) > BLOCK_CHARACTERS or text.isspace():
            return None
        pieces = [text]
        if language is not None:
            import sentencex

            pieces = [piece for piece in sentencex.segment(language, text) if piece]
        if self._kind == "bert":
            for left, right in itertools.pairwise(pieces):
                if left[-1] not in _BERT_BORDERS and right[0] not in _BERT_BORDERS:
                    return None
            return [piece.replace("\n", " ").split(" ") for piece in pieces]
        for i, piece in enumerate(pieces[:-1]):
            if piece[-1] == " ":  # it belongs to the word after it
                pieces[i], pieces[i + 1] = piece[:-1], " " + pieces[i + 1]
        if not all(BORDER.match(a[-1:] + b[:2], 1) for a, b in itertools.pairwise(pieces)):
            return None
        if text.split() == text.split(" "):  # no other white space: the quicker way
            return [piece.replace(" ", "\n ").split("\n") for piece in pieces]
        return [BORDER.split(piece) for piece in pieces]

    def _learn(self, keys: set[str]) -> None:
        """Take the ids of words that are not known yet."""
        missing = list(keys.difference(self._ids))
        parts = [_PARTS.findall(key) if self._kind == "bert" else [key] for key in missing]
        new = list(set(itertools.chain.from_iterable(parts)).difference(self._ids))
        # One call for all of them; `word_ids` tells whose a token is.
        encoding = self.backend.encode(new, is_pretokenized=True, add_special_tokens=False)
        ids = np.array(encoding.ids, "<u2").tobytes()
        counts = np.bincount(np.array(encoding.word_ids, np.int64), minlength=len(new))
        ends = 2 * np.cumsum(counts)
        for key, count, end in zip(new, (2 * counts).tolist(), ends.tolist(), strict=True):
            self._ids[key] = ids[end - count : end]
        for key, words in zip(missing, parts, strict=True):
            if len(words) > 1:
                self._ids[key] = b"".join(map(self._ids.__getitem__, words))
        sizes = (ENTRY_BYTES + len(key) + len(self._ids[key]) for key in {*missing, *new})
        self._num_bytes += sum(sizes)

    def _look_up(self, texts: list[list[list[str]]]) -> Encoded:
        """Join the ids of known words; what has none is no sentence, and no document."""
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
        return ""  # such a token may hold spaces, or take those around it; special ones are text
    model, splitter, normalizer = (
        parts[name] or {} for name in ("model", "pre_tokenizer", "normalizer")
    )
    kinds = tuple(part.get("type") for part in (model, splitter, normalizer))
    # What Python calls a space then has no ids, so no sentence is made of it.
    if kinds == ("WordPiece", "BertPreTokenizer", "BertNormalizer") and normalizer["clean_text"]:
        return "bert"
    by_pattern = splitter.get("use_regex", True) and not model.get("dropout")
    if kinds in (("BPE", "ByteLevel", None), ("BPE", "ByteLevel", "NFC")) and by_pattern:
        return "bytes"
    return ""
