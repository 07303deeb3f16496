"""Ids back to text, for comparing texts: fast, and as lossy as the tokenizer.

Texts come back as the tokenizer left them: lower-cased where it lower-cases, words joined by
spaces, `[UNK]` where a word is unknown. Two texts are comparable if both went through the same
tokenizer.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from preprocess.text.continuations import byte_level_alphabet


class Decoder:
    """Turn runs of ids into text by looking up each id; other tokenizers decode by themselves.

    The library's decoders of WordPiece and byte-level BPE do the same, 50 times slower; WordPiece's
    also removes spaces before punctuation marks, which changes no word.

    Args:
        backend: a `tokenizers.Tokenizer`.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._text: list[str] = []
        self._bytes: list[bytes] = []
        parts = json.loads(backend.to_str())
        kinds = (parts["model"]["type"], (parts["decoder"] or {}).get("type"))
        vocabulary = backend.get_vocab(with_added_tokens=True)
        added = {token["content"] for token in parts["added_tokens"]}
        size = 1 + max(vocabulary.values(), default=-1)
        if kinds == ("WordPiece", "WordPiece"):
            prefix = parts["model"]["continuing_subword_prefix"]
            self._text = [" ?"] * size
            for name, i in vocabulary.items():
                continues = name.startswith(prefix) and name not in added
                self._text[i] = name[len(prefix) :] if continues else f" {name}"
        elif kinds == ("BPE", "ByteLevel"):
            to_byte = byte_level_alphabet()
            self._bytes = [b" ? "] * size
            for name, i in vocabulary.items():
                plain = name in added or any(c not in to_byte for c in name)
                self._bytes[i] = name.encode() if plain else bytes(to_byte[c] for c in name)

    def decode(self, ids: np.ndarray, starts: np.ndarray) -> list[str]:
        """Return the text of each run.

        Args:
            ids: `(T,)` integers of the vocabulary.
            starts: first id of each run, and the end, `(D+1,)` int64.
        """
        plain, ends = ids.tolist(), starts.tolist()
        runs = [plain[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
        if self._text:
            return ["".join(map(self._text.__getitem__, run)).strip() for run in runs]
        if self._bytes:
            return [b"".join(map(self._bytes.__getitem__, run)).decode(errors="replace")
                    for run in runs]
        return self._backend.decode_batch(runs, skip_special_tokens=False)
