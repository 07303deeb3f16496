"""Turn ids into text for a reader: pieces of words with their marks and scores.

Letters: `T` tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from preprocess.masking import index_bounds

# Lower ends of the levels of importance above the lowest, in log-odds: 12 %, 50 %, 88 %.
LEVELS = (-2.0, 0.0, 2.0)
IMPORTANT = 2  # level of a token that is important rather than not

INVISIBLE = "\u2423"  # stands for a masked token without a visible character
_KEPT = {"\u200c", "\u200d"}  # shape letters and emoji; other invisible characters mislead


@dataclass(frozen=True)
class Piece:
    """Text with one mark: usually one token.

    space: whether a space precedes the text. masked, compared: whether the shown index and the
    compared one hold it. score: log-odds, or None.
    """

    text: str
    space: bool
    masked: bool = False
    compared: bool = False
    score: float | None = None

    @property
    def level(self) -> int:
        """Importance from 0 to 3; 0 without a score."""
        if self.score is None:
            return 0
        return sum(self.score > edge for edge in LEVELS)


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
) -> list[Piece]:
    """Make the pieces of one sequence; tokens of a word with the same marks become one piece.

    Args:
        ids: `(T,)` uint16. masked, compared: `(T,)` bool. scores: `(T,)` float16 or None.
    """
    pieces: list[Piece] = []
    start, blank = 0, False
    for num_tokens, text, space in split_text(ids.tolist(), tokenizer):
        part = slice(start, start + num_tokens)
        start += num_tokens
        space, blank = space or blank, False
        if text == INVISIBLE and not (masked[part] | compared[part]).any():
            blank = space
            continue
        score = None if scores is None else float(scores[part].max())
        piece = Piece(text, space, bool(masked[part].any()), bool(compared[part].any()), score)
        if pieces and not space and _joins(pieces[-1], piece):
            last = pieces.pop()
            if score is not None and last.score is not None:
                score = max(score, last.score)
            piece = Piece(last.text + text, last.space, piece.masked, piece.compared, score)
        pieces.append(piece)
    return pieces


def _joins(left: Piece, right: Piece) -> bool:
    same = (left.masked, left.compared, left.level) == (right.masked, right.compared, right.level)
    return same and left.text[-1:].isalnum() and right.text[:1].isalnum()


# ------------------------------------------------------------------------------ the documents


@dataclass(frozen=True)
class Sequence:
    """A sequence to show, with counts of tokens; num_important is None without scores."""

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
class Opened:
    """An opened shard: tokens, offsets and arrays as in `Shard` and `store.ARRAYS`."""

    tokens: np.ndarray
    sequence_offsets: np.ndarray
    document_offsets: np.ndarray
    mask: np.ndarray
    compare: np.ndarray | None
    scores: np.ndarray | None


def read_documents(
    shards: list[Opened], numbers: list[int], tokenizer: Any, max_tokens: int
) -> Iterator[Document]:
    """Yield documents with their marks; long ones with sequences up to `max_tokens`."""
    starts = np.append(0, np.cumsum([len(shard.document_offsets) - 1 for shard in shards]))
    for number in numbers:
        # Empty shards share their start with the next one; the last of them holds the document.
        i = int(np.searchsorted(starts, number, side="right")) - 1
        yield _read_document(shards[i], number, number - int(starts[i]), tokenizer, max_tokens)


def _read_document(
    shard: Opened, number: int, local: int, tokenizer: Any, max_tokens: int
) -> Document:
    first, last = shard.document_offsets[local : local + 2]
    offsets = shard.sequence_offsets[first : last + 1]
    start, end = int(offsets[0]), int(offsets[-1])
    masked, compared = _positions(shard.mask, start, end), _positions(shard.compare, start, end)
    # At least one sequence, and as many as fit.
    shown = max(int(np.searchsorted(offsets, start + max_tokens, side="right")) - 1, 1)
    sequences = []
    for a, b in zip(offsets[:shown].tolist(), offsets[1 : shown + 1].tolist(), strict=False):
        in_mask, in_compare = _marks(shard.mask, a, b), _marks(shard.compare, a, b)
        scores = None if shard.scores is None else shard.scores[a:b]
        sequences.append(
            Sequence(
                read_sequence(shard.tokens[a:b], tokenizer, in_mask, in_compare, scores),
                num_tokens=b - a,
                num_masked=int(in_mask.sum()),
                num_important=None if scores is None else int((scores > 0).sum()),
            )
        )
    return Document(
        number=number,
        num_tokens=end - start,
        num_masked=len(masked),
        num_compared=len(compared),
        num_shared=len(np.intersect1d(masked, compared, assume_unique=True)),
        sequences=sequences,
        num_left_out=len(offsets) - 1 - len(sequences),
    )


def _positions(index: np.ndarray | None, start: int, end: int) -> np.ndarray:
    """Return the positions of an index from token `start` to `end` of the shard: `(M,)` int64."""
    if index is None:
        return np.empty(0, dtype=np.int64)
    low, high = index_bounds(index, np.array([start, end]))
    return index[low:high].astype(np.int64)


def _marks(index: np.ndarray | None, start: int, end: int) -> np.ndarray:
    """Return which of the shard's tokens `start` to `end` an index holds: bool."""
    marks = np.zeros(end - start, dtype=bool)
    marks[_positions(index, start, end) - start] = True
    return marks
