"""Sort tokens into kinds: stop words, punctuation, other words."""

from __future__ import annotations

from typing import Any

import numpy as np

from preprocess.errors import ConfigError
from preprocess.text.continuations import WordTable, continuation_table, find_continuations
from preprocess.text.stop_words import is_stop_word
from preprocess.view.pieces import printable

OTHER, STOP_WORD, PUNCTUATION = range(3)
KINDS = ("other words", "stop words", "punctuation")


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
    signs = [not any(c.isalnum() or c == "\ufffd" for c in name) for name in plain]
    kinds[np.flatnonzero(signs)] = PUNCTUATION
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
