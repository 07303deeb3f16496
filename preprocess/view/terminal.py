"""Masks in a terminal: marked text, in two columns where there is room, and tables.

Masked tokens stand in [brackets], those of a second index in {braces}; `+` and `++` follow a token
that is important rather than not, and very much so. Colours only repeat that.
"""

from __future__ import annotations

import textwrap
import unicodedata
from dataclasses import dataclass
from itertools import zip_longest

from preprocess.view.pieces import IMPORTANT, Document, Piece, marked_by
from preprocess.view.tables import Table, percent

COLUMNS_FROM = 100  # characters; below, two columns are too narrow to read
_WIDEST_TEXT = 100
_BAR = 12
# Of 256 colours, black on pale yellow to orange: told from each other on any background.
_COLOURS = ("", "38;5;16;48;5;230", "38;5;16;48;5;222", "38;5;16;48;5;208")


@dataclass(frozen=True)
class Look:
    """colour: whether to colour. width: characters of a line, or None for no end (a pipe)."""

    colour: bool
    width: int | None

    @property
    def side_by_side(self) -> bool:
        return self.width is not None and self.width >= COLUMNS_FROM


def text_width(text: str) -> int:
    """How many cells of a terminal a text takes."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me", "Cf") for c in text)


def mark_piece(piece: Piece) -> str:
    """Write a piece with its marks, without colour and space."""
    text = piece.text + "+" * max(piece.level - IMPORTANT + 1, 0)
    if piece.compared:
        text = "{" + text + "}"
    return "[" + text + "]" if piece.masked else text


def _wrap(pieces: list[Piece], look: Look, width: int | None) -> list[tuple[str, int]]:
    """Lay pieces out in lines, (text with colours, cells) each; the first one hangs out by two."""
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
    """Write a document: a line of counts, then its sequences, each on lines of its own."""
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
    return textwrap.fill(text, max(min(look.width, _WIDEST_TEXT), 20), break_on_hyphens=False)


def format_legend(names: list[str], scores: str | None) -> str:
    parts = [f"[masked] in {names[0]}"]
    if len(names) > 1:
        parts.append(f"{{masked}} in {names[1]}")
    if scores:
        parts.append(f"by {scores}: important+ (above 50 %), very++ (above 88 %)")
    return "; ".join(parts)


def format_table(table: Table, look: Look) -> str:
    """Write a table, with bars of # where there is room."""
    width = min(look.width or _WIDEST_TEXT, _WIDEST_TEXT)
    text = _lay_out(table, _BAR)
    if max(map(text_width, text)) > width:
        text = _lay_out(table, 0)
    lines = [table.title, *(f"  {line}" for line in text)]
    if table.note:
        note = textwrap.wrap(table.note, max(width - 2, 20), break_on_hyphens=False)
        lines += [f"  {line}" for line in note]
    return "\n".join(lines) + "\n"


def _lay_out(table: Table, bar: int) -> list[str]:
    rows = [[_cell(cell, bar) for cell in row] for row in [table.head, *table.rows]]
    widths = [max(text_width(row[i]) for row in rows) for i in range(len(table.head))]
    lines = []
    for row in rows:
        cells = [row[0] + " " * (widths[0] - text_width(row[0]))]
        for cell, width in zip(row[1:], widths[1:], strict=True):
            cells.append(" " * (width - text_width(cell)) + cell)
        lines.append("  ".join(cells).rstrip())
    return lines


def _cell(cell: str | tuple[str, float], bar: int) -> str:
    if isinstance(cell, str):
        return cell
    text, share = cell
    if not bar:
        return text
    return f"{text:>7} {'#' * round(min(share, 1.0) * bar):<{bar}}"
