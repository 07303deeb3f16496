"""Find the tokens that continue a word, for WordPiece and byte-level BPE tokenizers."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.errors import ConfigError, DataError

# Kinds of beginnings (first line) and ends (both lines) of a token; each has a sample to try on the
# tokenizer's own pre-tokenizer. `_ENDING` is a token that makes a suffix behind an apostrophe ("s"
# of "'s"), `_SUFFIX` one that includes the apostrophe ("'s").
_LETTER, _NUMBER, _OTHER, _ENDING = range(4)
_WHITE, _SPACE, _APOSTROPHE, _SUFFIX = range(4, 8)
_SAMPLES = ("a", "1", "!", "s", "\n", " ", "'", "'s")
# Three more: a token that continues nothing (as an end: that nothing continues); one that begins
# inside a character, and so continues whatever precedes it; one that holds only the tail of a
# character, and so ends as the token with its head does.
_STARTS, _CONTINUES, _INHERITS = range(8, 11)
_TAIL_BYTES = bytes(range(0x80, 0xC0))  # of a character in UTF-8, all but its first


@dataclass(frozen=True)
class WordTable:
    """How each id begins and ends, and which ends and beginnings join into a word.

    first, last: kind of each id's beginning and end, `(V,)` uint8.
    joins: True where a token that begins with kind j continues one that ends with kind i,
        `(kinds, kinds)` bool, indexed `[i, j]`.
    """

    first: np.ndarray
    last: np.ndarray
    joins: np.ndarray


def find_continuations(
    tokens: np.ndarray, offsets: np.ndarray, table: WordTable
) -> np.ndarray:
    """Return which tokens continue the word of the token before; a sequence's first never does.

    Args:
        tokens: token ids, `(T,)` uint16.
        offsets: start of each sequence in `tokens`, and the end, `(B+1,)` int64.
        table: from `continuation_table`.
    Returns:
        `(T,)` bool.
    """
    continues = np.zeros(len(tokens), dtype=bool)
    last = table.last[tokens]
    # A token that holds only the tail bytes of a character ends as the token with its head does.
    owner = np.where(last == _INHERITS, 0, np.arange(len(tokens)))
    last = last[np.maximum.accumulate(owner)]
    continues[1:] = table.joins[last[:-1], table.first[tokens[1:]]]
    starts = offsets[:-1]
    continues[starts[starts < len(tokens)]] = False
    return continues


def open_tokenizer(folder: str | Path) -> Any:
    """Open a saved tokenizer as a `tokenizers.Tokenizer`, which loads fast.

    Raises:
        DataError: no `tokenizer.json` in the folder, or a broken one.
    """
    from tokenizers import Tokenizer

    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"{path}: no such file; make the token store again")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more precise
        raise DataError(f"{path}: not a tokenizer ({error}); make the store again") from None


def check_words(tokenizer: Any) -> str:
    """Return how words are told apart with a tokenizer, in words.

    Args:
        tokenizer: a fast tokenizer of transformers, or the `tokenizers.Tokenizer` inside one.
    Raises:
        ConfigError: they cannot be: another kind of tokenizer, one that does not split at spaces,
            or one without a token that continues a word.
    """
    tokenizer, backend, kind = _open(tokenizer)
    if kind == "bytes":
        return "by kind of character; a Chinese character is a word"
    prefix = backend["model"]["continuing_subword_prefix"]
    names = tokenizer.get_vocab(with_added_tokens=False)
    by_character = (backend["normalizer"] or {}).get("handle_chinese_chars") and any(
        len(name) == 1 and is_chinese(name) for name in names
    )
    if any(name.startswith(prefix) for name in names):
        return f"by {prefix}" + ("; a Chinese character is a word" if by_character else "")
    if by_character:
        return f"{CHARACTERS_ONLY}, so words are single tokens"
    raise ConfigError(
        f"no token of this tokenizer continues a word (none begins with {prefix}), so words cannot "
        "be told from tokens; use a masking strategy without words"
    )


CHARACTERS_ONLY = "each Chinese character is a word"


def _open(tokenizer: Any) -> tuple[Any, dict[str, Any], str]:
    """Return a tokenizer's inner one, its JSON and its kind; refuse one that has no words."""
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    backend = json.loads(tokenizer.to_str())
    kind = _kind_of(backend)
    if not kind:
        raise ConfigError(
            f"word boundaries are known for WordPiece and byte-level BPE tokenizers, and this one "
            f"is {backend['model']['type']}; use a masking strategy without words"
        )
    splitter = tokenizer.pre_tokenizer
    if splitter is None or len(splitter.pre_tokenize_str("a a")) < 2:
        raise ConfigError(
            "this tokenizer does not split a text at its spaces, so words cannot be told apart; "
            "use a masking strategy without words"
        )
    return tokenizer, backend, kind


def _kind_of(backend: dict[str, Any]) -> str:
    """Return "pieces" for WordPiece, "bytes" for byte-level BPE, "" for other tokenizers."""
    if backend["model"]["type"] == "WordPiece":
        return "pieces"
    by_bytes = "ByteLevel" in json.dumps(backend["pre_tokenizer"])
    return "bytes" if backend["model"]["type"] == "BPE" and by_bytes else ""


def is_chinese(character: str) -> bool:
    """Return whether BERT takes a character for a word: CJK ideographs, no kana, no Hangul."""
    return any(first <= ord(character) <= last for first, last in _IDEOGRAPHS)


_IDEOGRAPHS = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F),
               (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))


def continuation_table(tokenizer: Any) -> WordTable:
    """Derive from a tokenizer which of its ids continue a word.

    WordPiece: the ids written with its prefix (`##`); exact. Byte-level BPE (RoBERTa, ModernBERT):
    a token continues a word when the tokenizer's own pre-tokenizer keeps the end of the previous
    token and the beginning of this one together, by kind of character: letters with letters, digits
    with digits, others with others, never across a leading space. Inexact for runs of white space
    and for characters whose first byte ends a token, which two ids alone cannot decide. A Chinese
    character is a word, as with BERT's own splitting.

    Args:
        tokenizer: a fast tokenizer of transformers, or the `tokenizers.Tokenizer` inside one.
    Raises:
        ConfigError: another kind of tokenizer, or one that does not split at spaces.
    """
    tokenizer, backend, kind = _open(tokenizer)
    model = backend["model"]
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    added = np.array([token["id"] for token in backend["added_tokens"]], dtype=np.int64)
    size = max(vocabulary.values()) + 1
    first = np.full(size, _STARTS, dtype=np.uint8)
    last = np.full(size, _OTHER, dtype=np.uint8)
    joins = np.zeros((_INHERITS + 1, _INHERITS + 1), dtype=bool)
    joins[:, _CONTINUES] = True
    if kind == "pieces":
        prefix = model["continuing_subword_prefix"]
        first[[i for name, i in vocabulary.items() if name.startswith(prefix)]] = _CONTINUES
    else:
        split = tokenizer.pre_tokenizer.pre_tokenize_str
        to_byte = byte_level_alphabet()
        for name, i in vocabulary.items():
            if name and all(character in to_byte for character in name):
                first[i], last[i] = _token_kinds(bytes(to_byte[c] for c in name), split)
        for end, end_sample in enumerate(_SAMPLES):
            for begin in (_LETTER, _NUMBER, _OTHER, _ENDING):
                joins[end, begin] = len(split(end_sample + _SAMPLES[begin])) == 1
    # Added tokens are cut out of the text before words are looked for.
    first[added], last[added] = _STARTS, _STARTS
    return WordTable(first, last, joins)


def word_table(tokenizer: Any) -> WordTable | None:
    """Return `continuation_table`, or None for a tokenizer without word boundaries."""
    try:
        return continuation_table(tokenizer)
    except ConfigError:
        return None


def _token_kinds(raw: bytes, split: Callable[[str], list]) -> tuple[int, int]:
    """Return how a byte-level token begins and ends; `split` is the pre-tokenizer."""
    tail = len(raw) - len(raw.lstrip(_TAIL_BYTES))
    if tail == len(raw):
        return _CONTINUES, _INHERITS
    text = raw[tail:].decode("utf-8", errors="ignore")
    head = raw[tail + len(text.encode()) :]
    if head:  # a character cut off: the kind of the one with A1 for each missing byte
        missing = (head[0] >= 0xC0) + (head[0] >= 0xE0) + (head[0] >= 0xF0) + 1 - len(head)
        text += (head + b"\xa1" * missing).decode("utf-8", errors="replace")
    if tail:
        first = _CONTINUES
    elif text[0].isspace():
        first = _STARTS
    elif text.isalpha() and len(split("'" + text)) == 1:
        first = _ENDING
    else:
        first = _character_kind(text[0])
    if text[-1] == " ":
        return first, _SPACE
    if text == "'":
        return first, _APOSTROPHE
    if text[0] == "'" and text[1:].isalpha() and len(split(text + "a")) > 1:
        return first, _SUFFIX  # nothing continues it: "'sa" is "'s" and "a"
    return first, _character_kind(text[-1])


def _character_kind(character: str) -> int:
    if character.isspace():
        return _WHITE
    if is_chinese(character):
        return _STARTS
    category = unicodedata.category(character)[0]
    return {"L": _LETTER, "N": _NUMBER}.get(category, _OTHER)


def byte_level_alphabet() -> dict[str, int]:
    """Return the byte behind each character of a byte-level vocabulary.

    Printable Latin-1 bytes stand for themselves, the other 68 for the characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(hidden)})
    return alphabet
