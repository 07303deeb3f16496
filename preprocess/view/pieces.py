"""From ids to text as a reader reads it: pieces of words, with what is known of each.

Letters: `T` tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

# Lower ends of the levels of importance above the lowest, in log-odds: 12 %, 50 %, 88 %. From the
# second on, `selective` may choose a token.
LEVELS = (-2.0, 0.0, 2.0)
IMPORTANT = 2  # level of a token that is important rather than not

_CLOSING = set(".,;:!?)]}%") | {"\u201d", "\u2026"}
_OPENING = set("([{$") | {"\u201c", "\u2018"}
_APOSTROPHES = {"'", "\u2019"}
_ENDINGS = {"s", "t", "re", "ve", "ll", "d", "m"}
_JOINERS = {"-", "/"}
INVISIBLE = "\u2423"  # stands for a token of nothing that can be seen, where it is masked
_KEPT = {"\u200c", "\u200d"}  # shape letters and emoji; other invisible characters mislead


@dataclass(frozen=True)
class Piece:
    """Some text that is marked as one: usually one token.

    text: what to print. space: whether a space stands before it. masked, compared: whether the
    shown index, and the compared one, hold it. score: log-odds, or None.
    """

    text: str
    space: bool
    masked: bool = False
    compared: bool = False
    score: float | None = None

    @property
    def level(self) -> int:
        """How important, from 0 to 3; 0 without a score."""
        if self.score is None:
            return 0
        return sum(self.score > edge for edge in LEVELS)


# ------------------------------------------------------------------------------ ids to text


def split_text(ids: list[int], tokenizer: Any) -> list[tuple[int, str, bool]]:
    """Turn ids into text as a reader sees it.

    Args:
        ids: of one sequence.
        tokenizer: a `tokenizers.Tokenizer`, WordPiece or byte-level BPE.
    Returns:
        One (number of tokens, text, whether a space stands before it) a piece. A piece has more
        than one token where a character was cut into bytes.
    """
    if type(tokenizer.model).__name__ == "WordPiece":
        return _split_wordpieces([tokenizer.id_to_token(i) or "?" for i in ids], tokenizer.model)
    pieces, start = [], 0
    while start < len(ids):
        end = start + 1
        text = tokenizer.decode(ids[start:end], skip_special_tokens=False)
        # U+FFFD is half a character; no character has more than 4 bytes.
        while "\ufffd" in text and end < min(start + 4, len(ids)):
            end += 1
            text = tokenizer.decode(ids[start:end], skip_special_tokens=False)
        pieces.append((end - start, printable(text.strip(" ") or " "), text[:1] == " "))
        start = end
    return pieces


def _split_wordpieces(names: list[str], model: Any) -> list[tuple[int, str, bool]]:
    prefix = model.continuing_subword_prefix
    pieces: list[tuple[int, str, bool]] = []
    quoting = False
    for i, name in enumerate(names):
        if name.startswith(prefix) and i:
            pieces.append((1, printable(name[len(prefix) :]), False))
            continue
        space = bool(i) and not _closes_up(names, i)
        if name == '"':
            space = space and not quoting
            quoting = not quoting
        elif i and names[i - 1] == '"' and quoting:
            space = False
        pieces.append((1, printable(name), space))
    return pieces


def _closes_up(names: list[str], i: int) -> bool:
    """Whether no space stands before word i; a BERT vocabulary does not keep it.

    By the habits of English: "don ' t" is don't, "( very )" (very), "well - made" well-made.
    """
    before, name, after = names[i - 1], names[i], (*names, "")[i + 1]
    earlier = names[i - 2] if i > 1 else ""
    if name in _CLOSING or before in _OPENING:
        return True
    if name in _APOSTROPHES and after in _ENDINGS:
        return True
    if before in _APOSTROPHES and name in _ENDINGS and earlier:
        return True
    if before == name == "-":
        return True
    if name in _JOINERS:
        return before[-1].isalnum() and after[:1].isalnum()
    if before in _JOINERS:
        return earlier[-1:].isalnum() and name[0].isalnum()
    return before in {".", ":"} and earlier[-1:].isdigit() and name[0].isdigit()


def printable(text: str) -> str:
    """Make control characters visible, and harmless to a terminal; drop other invisible ones.

    An escape character becomes its picture (U+241B), a line end an arrow, nothing visible at all
    `INVISIBLE`. Marks that turn the direction of writing would turn all that follows too.
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
    """Make the pieces of one sequence; tokens of a word that are marked alike become one piece.

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


def marked_by(pieces: list[Piece], compared: bool) -> list[Piece]:
    """The same pieces with the marks of one index alone; those that both hold keep both."""
    keep = "compared" if compared else "masked"
    return [
        piece if getattr(piece, keep) else Piece(piece.text, piece.space, score=piece.score)
        for piece in pieces
    ]


# ------------------------------------------------------------------------------ the documents


@dataclass(frozen=True)
class Sequence:
    """A sequence to show, with counts of tokens; num_important is None without scores."""

    pieces: list[Piece]
    num_tokens: int
    num_masked: int
    num_compared: int
    num_important: int | None


@dataclass(frozen=True)
class Document:
    """A document to show: its number in the store, counts of its tokens, its first sequences.

    num_left_out: sequences that are too far down to be shown.
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
    """What is shown of a shard: tokens, offsets and arrays as in `Shard` and `store.ARRAYS`."""

    tokens: np.ndarray
    sequence_offsets: np.ndarray
    document_offsets: np.ndarray
    mask: np.ndarray
    compare: np.ndarray | None
    scores: np.ndarray | None


def read_documents(
    shards: list[Opened], numbers: list[int], tokenizer: Any, max_tokens: int
) -> Iterator[Document]:
    """Read documents with their marks; of long ones, sequences up to `max_tokens`."""
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
                num_compared=int(in_compare.sum()),
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
    """The part of an index that lies in the shard's tokens `start` to `end`: `(M,)` int64."""
    if index is None:
        return np.empty(0, dtype=np.int64)
    bounds = np.searchsorted(index, np.array([start, end], dtype=np.uint32))
    return index[bounds[0] : bounds[1]].astype(np.int64)


def _marks(index: np.ndarray | None, start: int, end: int) -> np.ndarray:
    """True where the index holds a token of the shard's tokens `start` to `end`: bool."""
    marks = np.zeros(end - start, dtype=bool)
    marks[_positions(index, start, end) - start] = True
    return marks
