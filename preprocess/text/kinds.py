"""Kinds of tokens: stop words, punctuation, and other words."""

from __future__ import annotations

import numpy as np

from preprocess.text.stop_words import is_punctuation, is_stop_word

OTHER, STOP_WORD, PUNCTUATION = range(3)
KINDS = ("other words", "stop words", "punctuation")


def type_kinds(names: list[str], language: str = "en") -> np.ndarray:
    """Return the kind of every id, as far as the id alone tells: `(V,)` uint8.

    Args:
        names: readable name of each id; an open box (U+2423) stands for a leading space.
        language: of the stop words, one of `LANGUAGES`.
    """
    plain = [name.replace("\u2423", "") for name in names]
    kinds = np.full(len(names), OTHER, dtype=np.uint8)
    kinds[[i for i, name in enumerate(plain) if is_stop_word(name, language)]] = STOP_WORD
    kinds[[i for i, name in enumerate(plain) if is_punctuation(name)]] = PUNCTUATION
    return kinds


def find_kinds(
    tokens: np.ndarray, kinds: np.ndarray, continues: np.ndarray | None
) -> np.ndarray:
    """Return the kind of each token: a stop word only where it is a word by itself.

    In `the ##sis the`, the first `the` is part of another word. A stop word of several tokens
    counts as another word; practical vocabularies have next to none.

    Args:
        tokens: token ids, `(T,)` uint16.
        kinds: from `type_kinds`, `(V,)` uint8.
        continues: from `find_continuations`, `(T,)` bool; without it every such token counts.
    Returns:
        `(T,)` uint8.
    """
    found = kinds[tokens]
    if continues is not None and len(tokens):
        part = continues.copy()
        part[:-1] |= continues[1:]
        found[part & (found == STOP_WORD)] = OTHER
    return found
