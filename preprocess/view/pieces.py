"""Turn ids into text for a reader: pieces of words with their marks and scores.

Letters: `T` tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from preprocess.masking import index_bounds
from preprocess.store import Shard
from preprocess.text.continuations import WordTable, find_continuations
from preprocess.view.scale import Scale

INVISIBLE = "\u2423"  # stands for a masked token without a visible character
_KEPT = {"\u200c", "\u200d"}  # shape letters and emoji; other invisible characters mislead


@dataclass(frozen=True)
class Piece:
    """Text with one mark: usually one token.

    space: whether a space precedes the text. masked, compared: whether the shown index and the
    compared one hold it. score: or None; level: of it, from 0 to 3. joined: whether it is masked in
    one unit with the piece before it, so that both share a box.
    """

    text: str
    space: bool
    masked: bool = False
    compared: bool = False
    score: float | None = None
    level: int = 0
    joined: bool = False


def boxes(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Yield the pieces that share a box; one that is not masked is alone."""
    box: list[Piece] = []
    for piece in pieces:
        if box and not piece.joined:
            yield box
            box = []
        box.append(piece)
    if box:
        yield box


# ------------------------------------------------------------------------------ ids to text


def split_text(ids: list[int], tokenizer: Any) -> list[tuple[int, str, bool]]:
    """Turn ids into text with the spacing of the tokenizer's own decoder.

    Args:
        ids: of one sequence.
        tokenizer: a `tokenizers.Tokenizer`.
    Returns:
        (number of tokens, text, whether a space precedes it) per piece. A piece has more than one
        token where a character was cut into bytes.
    """
    decode = tokenizer.decoder.decode if tokenizer.decoder else " ".join
    names = [tokenizer.id_to_token(i) or "?" for i in ids]
    pieces, start = [], 0
    while start < len(ids):
        end = start + 1
        # Behind an empty token: decoders treat the first token of a text differently.
        text = decode(["", names[start]])
        # U+FFFD is half a character; no character has more than 4 bytes.
        while "\ufffd" in text and end < min(start + 4, len(ids)):
            end += 1
            text = decode(["", *names[start:end]])
        pieces.append((end - start, printable(text.strip(" ") or " "), text[:1] == " "))
        start = end
    return pieces


def printable(text: str) -> str:
    """Make control characters visible and harmless to a terminal; drop other invisible ones.

    An escape character becomes its picture (U+241B), a line end an arrow, and an invisible text
    `INVISIBLE`. Marks that change the writing direction would affect all text after them.
    """
    shown = []
    for c in text:
        if c.isprintable() or c in _KEPT:
            shown.append(c)
        elif c == "\n":
            shown.append("\u21b5")
        elif ord(c) < 32:
            shown.append(chr(0x2400 + ord(c)))
        elif c.isspace():
            shown.append(" ")
    return "".join(shown).strip(" ") or INVISIBLE


def read_sequence(
    ids: np.ndarray,
    tokenizer: Any,
    masked: np.ndarray,
    compared: np.ndarray,
    scores: np.ndarray | None,
    scale: Scale | None = None,
    continues: np.ndarray | None = None,
) -> list[Piece]:
    """Make the pieces of one sequence; tokens of a word with the same marks become one piece.

    Args:
        ids: `(T,)` uint16. masked, compared: `(T,)` bool. scores: `(T,)` float16 or None.
        scale: of the scores.
        continues: whether a token belongs to the unit of the token before it, `(T,)` bool; masked
            neighbours of one unit share a box.
    """
    scale = scale or Scale()
    pieces: list[Piece] = []
    start, blank, gap = 0, False, False  # a space to come; a token left out before
    for num_tokens, text, space in split_text(ids.tolist(), tokenizer):
        part = slice(start, start + num_tokens)
        in_unit = continues is not None and bool(continues[start])
        start += num_tokens
        space, blank = space or blank, False
        if text == INVISIBLE and not (masked[part] | compared[part]).any():
            blank, gap = space, True
            continue
        score = None if scores is None else float(scores[part].max())
        marks = bool(masked[part].any()), bool(compared[part].any())
        last = pieces[-1] if pieces else Piece("", True)
        alike = marks == (last.masked, last.compared)
        piece = Piece(text, space, *marks, score, scale.level(score),
                      joined=alike and any(marks) and in_unit and not gap and bool(pieces))
        gap = False
        if (alike and last.level == piece.level and not space
                and last.text[-1:].isalnum() and text[:1].isalnum()):
            if score is not None and last.score is not None:
                score = max(score, last.score)
            piece = replace(last, text=last.text + text, score=score)
            pieces.pop()
        pieces.append(piece)
    return pieces


# ------------------------------------------------------------------------------ the documents


@dataclass(frozen=True)
class Sequence:
    """A sequence to show, with counts of tokens; num_important is None if no score tells."""

    pieces: list[Piece]
    num_tokens: int
    num_masked: int
    num_important: int | None


@dataclass(frozen=True)
class Document:
    """A document to show: its number in the store, counts of its tokens, its first sequences.

    num_left_out: number of further sequences that are not shown.
    """

    number: int
    num_tokens: int
    num_masked: int
    num_compared: int
    num_shared: int
    sequences: list[Sequence]
    num_left_out: int


@dataclass(frozen=True)
class Marks:
    """What is shown of a shard's tokens.

    masked, compared: positions that the shown index and the compared one hold, `(M,)` uint32.
    scores: `(T,)` float16. units: 1 where a token belongs to the unit of the token before it,
    `(T,)` uint8, or how words join; None if units are tokens.
    runs: whether all neighbours are one unit.
    """

    masked: np.ndarray
    compared: np.ndarray | None = None
    scores: np.ndarray | None = None
    units: np.ndarray | WordTable | None = None
    runs: bool = False

    def continues(self, tokens: np.ndarray, start: int) -> np.ndarray | None:
        """Return which of the tokens of a sequence continue a unit: `(T,)` bool."""
        if self.runs:
            return np.ones(len(tokens), dtype=bool)
        if isinstance(self.units, WordTable):
            return find_continuations(tokens, np.array([0, len(tokens)]), self.units)
        return None if self.units is None else self.units[start : start + len(tokens)].astype(bool)


def read_documents(
    shards: list[Shard], marks: list[Marks], numbers: list[int], tokenizer: Any, max_tokens: int,
    scale: Scale | None = None,
) -> Iterator[Document]:
    """Yield documents with their marks; long ones with sequences up to `max_tokens`."""
    starts = np.append(0, np.cumsum([shard.num_documents for shard in shards]))
    scale = scale or Scale()
    for number in numbers:
        # Empty shards share their start with the next one; the last of them holds the document.
        i = int(np.searchsorted(starts, number, side="right")) - 1
        local = number - int(starts[i])
        yield _read_document(shards[i], marks[i], number, local, tokenizer, max_tokens, scale)


def _read_document(
    shard: Shard, marks: Marks, number: int, local: int, tokenizer: Any, max_tokens: int,
    scale: Scale,
) -> Document:
    first, last = shard.document_offsets[local : local + 2]
    offsets = shard.sequence_offsets[first : last + 1]
    start, end = int(offsets[0]), int(offsets[-1])
    masked, compared = (_held(index, start, end) for index in (marks.masked, marks.compared))
    # At least one sequence, and as many as fit.
    shown = max(int(np.searchsorted(offsets, start + max_tokens, side="right")) - 1, 1)
    sequences = []
    for a, b in zip(offsets[:shown].tolist(), offsets[1 : shown + 1].tolist(), strict=False):
        here, tokens = slice(a - start, b - start), shard.tokens[a:b]
        scores = None if marks.scores is None else marks.scores[a:b]
        pieces = read_sequence(tokens, tokenizer, masked[here], compared[here], scores, scale,
                               marks.continues(tokens, a))
        important = int((scores > 0).sum()) if scores is not None and scale.boundary else None
        sequences.append(Sequence(pieces, b - a, int(masked[here].sum()), important))
    return Document(
        number=number,
        num_tokens=end - start,
        num_masked=int(masked.sum()),
        num_compared=int(compared.sum()),
        num_shared=int((masked & compared).sum()),
        sequences=sequences,
        num_left_out=len(offsets) - 1 - len(sequences),
    )


def _held(index: np.ndarray | None, start: int, end: int) -> np.ndarray:
    """Return which of the shard's tokens `start` to `end` an index holds: bool."""
    marks = np.zeros(end - start, dtype=bool)
    if index is not None:
        low, high = index_bounds(index, np.array([start, end]))
        marks[index[low:high].astype(np.int64) - start] = True
    return marks
