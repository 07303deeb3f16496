"""Write masks for a terminal: marked text, one line per sequence.

Masked tokens are in [brackets], those of a second index in {braces}; those of one unit share them.
`+` and `++` follow important and very important tokens. Colours only repeat these marks.
"""

from __future__ import annotations

import os
import sys

from preprocess.view.pieces import Document, Piece, boxes
from preprocess.view.scale import IMPORTANT, Scale
from preprocess.view.tables import percent

# Of 256 colours, black on pale yellow to orange: distinct on any background.
_COLOURS = ("", "38;5;16;48;5;230", "38;5;16;48;5;222", "38;5;16;48;5;208")


def wants_colour() -> bool:
    """Return whether stdout is a terminal that shows colours, and its user wants them."""
    return (sys.stdout.isatty() and not os.environ.get("NO_COLOR")
            and os.environ.get("TERM") != "dumb")


def mark_piece(
    piece: Piece, colour: bool = False, opens: bool = True, closes: bool = True
) -> str:
    """Write a piece with its marks, without its space; `opens` and `closes` tell of its box."""
    text = piece.text + "+" * max(piece.level - IMPORTANT + 1, 0)
    if piece.compared:
        text = "{" * opens + text + "}" * closes
    if piece.masked:
        text = "[" * opens + text + "]" * closes
    codes = [_COLOURS[piece.level]] if piece.level else []
    codes += ["1;4"] if piece.masked or piece.compared else []
    return f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if codes and colour else text


def mark_sequence(pieces: list[Piece], colour: bool = False) -> str:
    """Write the pieces of a sequence with their spaces."""
    return "".join(
        " " * piece.space + mark_piece(piece, colour, piece is box[0], piece is box[-1])
        for box in boxes(pieces) for piece in box
    ).lstrip(" ")


def format_document(document: Document, names: list[str], colour: bool) -> str:
    """Write a line of counts, then each sequence on a line of its own."""
    head = (
        f"document {document.number}: {document.num_tokens} tokens, "
        f"[{document.num_masked}] masked ({percent(document.num_masked, document.num_tokens)})"
    )
    if len(names) > 1:
        head += f", {{{document.num_compared}}} in {names[1]}, {document.num_shared} in both"
    lines = [head]
    lines += [mark_sequence(sequence.pieces, colour) for sequence in document.sequences]
    if document.num_left_out:
        lines.append(f"... {document.num_left_out:,} more sequences")
    return "\n".join(lines) + "\n"


def format_legend(names: list[str], scores: str | None, scale: Scale) -> str:
    """Explain the marks."""
    parts = [f"[masked] in {names[0]}"]
    if len(names) > 1:
        parts.append(f"{{masked}} in {names[1]}")
    if scores:
        word = "important" if scale.boundary else "high"
        unit = "" if scale.in_log_odds else f", in {scale.unit}"
        edges = [scale.bound(edge) for edge in scale.levels[1:]]
        parts.append(f"by {scores}{unit}: {word}+ (above {edges[0]}), very++ (above {edges[1]})")
    return "; ".join(parts)
