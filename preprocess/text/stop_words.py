"""List the English words that carry no opinion by themselves, and know punctuation."""

from __future__ import annotations

import unicodedata

STOP_WORDS = frozenset(
    """
    a an the this that these those
    i me my mine myself we us our ours ourselves you your yours yourself yourselves
    he him his himself she her hers herself it its itself they them their theirs themselves
    who whom whose which what
    am is are was were be been being have has had having do does did doing
    will would shall should can could may might must
    and or as if while because so than then
    of at by for with about between into through during before after to from in on over under
    here there when where how both each other some any such same
    s ll re ve d m
    """.split()
)
"""Negators and contrasts (no, not, never, nor, t of don't, without, but, against, few, only, too,
very, ...) are excluded on purpose: they reverse an opinion, and must be able to be important."""


LANGUAGES = {"en": STOP_WORDS}


def is_stop_word(word: str, language: str = "en") -> bool:
    """Return whether a word is a stop word; byte-level vocabularies write 's with its mark."""
    return word.strip().strip("'\u2019").lower() in LANGUAGES[language]


def is_punctuation(text: str) -> bool:
    """Return whether a text holds punctuation alone, as BERT's tokenizer defines it.

    That is ASCII signs such as `$` and `+` too, but no emoji and no other symbol.
    """
    return bool(text) and all(
        "!" <= c <= "~" and not c.isalnum() or unicodedata.category(c)[0] == "P" for c in text
    )
