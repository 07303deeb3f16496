"""Write masks for a terminal: marked text, in two columns where there is room.

Masked tokens are in [brackets], those of a second index in {braces}; `+` and `++` follow important
and very important tokens. Colours only repeat these marks.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from itertools import zip_longest

from preprocess.view.pieces import IMPORTANT, Document, Piece, marked_by
from preprocess.view.tables import percent, text_width

COLUMNS_FROM = 100  # characters; below, two columns are too narrow to read
WIDEST_TEXT = 100
# Of 256 colours, black on pale yellow to orange: distinct on any background.
_COLOURS = ("", "38;5;16;48;5;230", "38;5;16;48;5;222", "38;5;16;48;5;208")


@dataclass(frozen=True)
class Look:
    """colour: whether to colour. width: characters per line, or None without a limit (a pipe)."""

    colour: bool
    width: int | None

    @property
    def side_by_side(self) -> bool:
        return self.width is not None and self.width >= COLUMNS_FROM


def mark_piece(piece: Piece) -> str:
    """Write a piece with its marks, without colour or space."""
    text = piece.text + "+" * max(piece.level - IMPORTANT + 1, 0)
    if piece.compared:
        text = "{" + text + "}"
    return "[" + text + "]" if piece.masked else text


def _wrap(pieces: list[Piece], look: Look, width: int | None) -> list[tuple[str, int]]:
    """Wrap pieces into lines, each (text with colours, its width); later lines are indented."""
    lines: list[tuple[str, int]] = []
    line, used = "", 0
    for word in _words(pieces):
        plain = [mark_piece(piece) for piece in word]
        cells = sum(map(text_width, plain))
        if width is not None and used and used + 1 + cells > width:
            lines.append((line, used))
            line, used = "  ", 2
        elif used:
            line, used = line + " ", used + 1
        for piece, text in zip(word, plain, strict=True):
            codes = [_COLOURS[piece.level]] if piece.level else []
            codes += ["1;4"] if piece.masked or piece.compared else []
            line += f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if codes and look.colour else text
        used += cells
    return [*lines, (line, used)]


def _words(pieces: list[Piece]) -> list[list[Piece]]:
    words: list[list[Piece]] = []
    for piece in pieces:
        if piece.space or not words:
            words.append([])
        words[-1].append(piece)
    return words


def format_document(document: Document, names: list[str], look: Look) -> str:
    """Write a line of counts, then each sequence on lines of its own."""
    head = (
        f"document {document.number}: {document.num_tokens} tokens, "
        f"[{document.num_masked}] masked ({percent(document.num_masked, document.num_tokens)})"
    )
    if len(names) > 1:
        head += f", {{{document.num_compared}}} in {names[1]}, {document.num_shared} in both"
    lines = [format_paragraph(head, look)]
    if len(names) > 1 and look.side_by_side:
        assert look.width is not None
        column = (look.width - 3) // 2
        lines.append(f"{names[0]:<{column}} | {names[1]}")
        for sequence in document.sequences:
            left = _wrap(marked_by(sequence.pieces, compared=False), look, column)
            right = _wrap(marked_by(sequence.pieces, compared=True), look, column)
            for (a, used), (b, _) in zip_longest(left, right, fillvalue=("", 0)):
                lines.append(f"{a}{' ' * (column - used)} | {b}")
    else:
        for sequence in document.sequences:
            lines += [text for text, _ in _wrap(sequence.pieces, look, look.width)]
    if document.num_left_out:
        lines.append(f"... {document.num_left_out:,} more sequences")
    return "\n".join(lines) + "\n"


def format_paragraph(text: str, look: Look) -> str:
    if look.width is None:
        return text
    return textwrap.fill(text, max(min(look.width, WIDEST_TEXT), 20), break_on_hyphens=False)


def format_legend(names: list[str], scores: str | None) -> str:
    parts = [f"[masked] in {names[0]}"]
    if len(names) > 1:
        parts.append(f"{{masked}} in {names[1]}")
    if scores:
        parts.append(f"by {scores}: important+ (above 50 %), very++ (above 88 %)")
    return "; ".join(parts)
