"""Lists of words with weights: reading one, and finding its words through a tokenizer."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from preprocess.corpus import Span, read_text, resolve_path
from preprocess.errors import ConfigError, DataError
from preprocess.text.continuations import continuation_table, find_continuations

FORMATS = {".csv": ",", ".tsv": "\t", ".txt": " "}
_SHOWN = 3  # words of a kind in a message


@dataclass(frozen=True)
class Lexicon:
    """The words of a list that a tokenizer keeps as one word.

    path: as the user gave it.
    names: the listed words.
    forms: piece ids of each form of a word: as listed and with a capital, after a space and at
        the start of a text, where a tokenizer tells these apart.
    weights: of each form, above or equal to 0.
    words: number of its word in `names`.
    counts: words that are `listed`, become `[UNK]` (`unknown`), or are `several_words`.
    lost: the words of the last two kinds.
    """

    path: str
    names: list[str]
    forms: list[tuple[int, ...]]
    weights: list[float]
    words: list[int]
    counts: dict[str, int]
    lost: tuple[list[str], list[str]]

    def describe(self, num_present: int, share: float, absent: list[str]) -> str:
        """Return one line on what became of the listed words.

        Args:
            num_present: words that occur in a store; share: of its tokens that they are.
            absent: words that the tokenizer knows and the store does not have.
        """
        return (f"{self.path}: of {len(self.names):,} words {num_present:,} occur ({share:.2%} of "
                f"the tokens), {_some(absent, 'never do')}, {self._describe_lost()}")

    def _describe_lost(self) -> str:
        unknown, several = self.lost
        return (f"{_some(unknown, 'become [UNK]')}, "
                f"{_some(several, 'are several words to the tokenizer')}")


def _some(words: list[str], what: str) -> str:
    shown = ", ".join(words[:_SHOWN]) + (", ..." if len(words) > _SHOWN else "")
    return f"{len(words):,} {what}" + (f" ({shown})" if words else "")


def read_lexicon(path: str) -> dict[str, float]:
    """Read the words and weights of a list: the first two columns of each line.

    A word and its weight are parted by a comma (`.csv`), a tab (`.tsv`) or white space (`.txt`). A
    first line whose second column is no number is a header. Of a word listed twice the larger
    weight counts.

    Raises:
        ConfigError: another kind of file.
        DataError: a line with one column; a weight that is no number, negative or not finite; an
            empty list.
    """
    file = resolve_path(path)
    if file.suffix not in FORMATS:
        raise ConfigError(f"--lexicon {path}: must end in {', '.join(FORMATS)}")
    found: dict[str, float] = {}
    for number, row in read_text(file, ["text"], ["text"], Span()):
        line = row["text"].strip()
        if not line:
            continue
        place = f"--lexicon {path}, line {number}"
        cells = _cut(line, file.suffix, place)
        if len(cells) < 2 or not cells[0]:
            raise DataError(
                f"{place}: {line[:40]!r} is one column, and a list needs a word and its weight on "
                f"each line, such as good{FORMATS[file.suffix]}1"
            )
        try:
            weight = float(cells[1])
        except ValueError:
            if number == 1:
                continue
            raise DataError(f"{place}: the weight {cells[1][:40]!r} is not a number") from None
        if not math.isfinite(weight) or weight < 0:
            raise DataError(
                f"{place}: the weight of {cells[0]!r} is {weight}; words that are not listed have "
                f"0, so weights are at least 0 (where the sign is an opinion, leave it out)"
            )
        found[cells[0]] = max(weight, found.get(cells[0], 0.0))
    if not any(found.values()):
        raise DataError(f"--lexicon {path}: lists no word with a weight above 0")
    return found


def _cut(line: str, suffix: str, place: str) -> list[str]:
    if suffix == ".csv":
        try:
            return [cell.strip() for cell in next(csv.reader([line], strict=True))]
        except csv.Error as error:
            raise DataError(f"{place}: cannot be read ({error})") from None
    return [cell.strip() for cell in (line.split("\t") if suffix == ".tsv" else line.split())]


def open_lexicon(path: str, tokenizer: Any, special_ids: tuple[int, ...]) -> Lexicon:
    """Read a list of words and find the ids of each.

    Args:
        tokenizer: a `tokenizers.Tokenizer` from `open_tokenizer`; it is set up for text.
        special_ids: of all its special tokens, `[UNK]` among them.
    Raises:
        ConfigError, DataError: see `read_lexicon`; or the tokenizer knows none of the words.
    """
    listed = read_lexicon(path)
    names = list(listed)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    spelt = [[space + form for space in (" ", "") for form in (name, name[:1].upper() + name[1:])]
             for name in names]
    ids = [encoding.ids for encoding in tokenizer.encode_batch(
        [form for forms in spelt for form in forms], add_special_tokens=False)]
    offsets = np.concatenate([[0], np.cumsum([len(form) for form in ids])])
    flat = np.array([i for form in ids for i in form], np.uint16)
    begins = ~find_continuations(flat, offsets, continuation_table(tokenizer))
    before = np.concatenate([[0], np.cumsum(begins)])
    num_words = np.diff(before[offsets])
    owner = np.repeat(np.arange(len(names)), [len(forms) for forms in spelt])
    best: dict[tuple[int, ...], int] = {}
    unknown, several, fits = set(), set(), set()
    for word, count, form in zip(owner.tolist(), num_words.tolist(), ids, strict=True):
        if not set(form).isdisjoint(special_ids) or not form:
            unknown.add(word)
        elif count > 1:
            several.add(word)
        else:
            fits.add(word)
            key = tuple(form)
            if key not in best or listed[names[word]] > listed[names[best[key]]]:
                best[key] = word
    unknown -= fits
    several -= fits | unknown
    lost = tuple([names[word] for word in sorted(words)] for words in (unknown, several))
    lexicon = Lexicon(
        path, names, list(best), [listed[names[word]] for word in best.values()],
        list(best.values()),
        {"listed": len(names), "unknown": len(unknown), "several_words": len(several)},
        (lost[0], lost[1]),
    )
    if not best:
        raise DataError(
            f"--lexicon {path}: the tokenizer knows none of its {len(names):,} words as one word: "
            f"{lexicon._describe_lost()}"
        )
    return lexicon
