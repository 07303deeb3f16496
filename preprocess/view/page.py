"""Write masks as one HTML page without scripts, other files or network.

Masked tokens are boxed (dashed in a second index, double in both); the more important a token, the
darker its background and the thicker its underline, so that neither a print without colours nor a
colour-blind reader loses anything. All text of the corpus passes through `html.escape`.
"""

from __future__ import annotations

import html
import itertools

from preprocess.view.pieces import LEVELS, Document, Piece
from preprocess.view.statistics import share_of
from preprocess.view.tables import Table, html_page, percent

# Backgrounds of one hue whose lightness falls evenly (97, 88, 76 %, black text on all of them).
_STYLE = """
:root { color-scheme: light; }
body { font: 17px/1.75 Georgia, "Times New Roman", serif; max-width: 62em; margin: 1.5em auto;
  padding: 0 1em; color: #000; background: #fff; print-color-adjust: exact;
  -webkit-print-color-adjust: exact; overflow-wrap: anywhere; }
h1, h2, h3, th, nav, small, .note, .legend { font-family: system-ui, sans-serif; }
h1 { font-size: 1.5em; line-height: 1.25; } h2 { font-size: 1.2em; margin: 2em 0 .5em; }
h3 { font-size: 1em; margin: 1.5em 0 .25em; }
p { margin: .4em 0; } small, .note { color: #444; font-size: .8em; } small { white-space: nowrap; }
.legend { border: 1px solid #888; padding: .4em .8em; margin: 1em 0; background: #fff; }
.legend .k { display: inline-block; margin-right: 1.5em; }
.legend .k > * { margin-right: .5em; display: inline-block; line-height: 1.3; }
mark { color: inherit; background: none; }
.l1, .l2, .l3 { text-decoration: underline; text-underline-offset: 3px; }
.l1 { background: #fdf3dc; text-decoration-style: dotted; text-decoration-thickness: 1px; }
.l2 { background: #fbd9a0; text-decoration-thickness: 1px; }
.l3 { background: #f2ab4b; text-decoration-thickness: 3px; }
.m { border: 2px solid #000; border-radius: 3px; padding: 0 1px 2px; }
.c { border: 2px dashed #000; border-radius: 3px; padding: 0 1px 2px; }
.b { border: 4px double #000; border-radius: 3px; padding: 0 1px 2px; }
.types, .wide { display: flex; flex-wrap: wrap; gap: 0 2.5em; align-items: flex-start; }
.types > div, .wide > div { width: min-content; min-width: min(18em, 100%); max-width: 100%; }
.types .bar { display: none; }
@media (max-width: 40em) {
  body { font-size: 16px; padding: 0 .6em; } .bar { width: 3em; }
  th, td { padding: .1em .35em; }
}
@media print { body { font-size: 11pt; max-width: none; }
  .legend { break-after: avoid; } nav { display: none; } }
"""


def format_piece(piece: Piece, names: list[str]) -> str:
    """Write a piece, escaped, with its space; `names` are those of the two indices."""
    held = (piece.masked, piece.compared)
    holders = [name for name, on in zip(names, held, strict=False) if on]
    mark = {(True, False): "m", (False, True): "c", (True, True): "b"}.get(held)
    title = [f"masked in {' and '.join(holders)}"] if mark else []
    classes = [name for name in (mark, f"l{piece.level}" if piece.level else None) if name]
    if piece.score is not None and classes:
        title.append(f"log-odds {piece.score:.2f} ({share_of(piece.score)})")
    text = html.escape(piece.text)
    if classes:
        tag = "mark" if mark else "span"
        text = (f'<{tag} class="{" ".join(classes)}" title="{html.escape(", ".join(title))}">'
                f"{text}</{tag}>")
    return (" " if piece.space else "") + text


def _format_document(document: Document, names: list[str]) -> str:
    head = (f"{document.num_tokens:,} tokens, {document.num_masked:,} masked "
            f"({percent(document.num_masked, document.num_tokens)})")
    if len(names) > 1:
        head += f"; {document.num_compared:,} in {names[1]}, {document.num_shared:,} in both"
    lines = [f'<h3 id="d{document.number}">Document {document.number}</h3>',
             f'<p class="note">{html.escape(head)}.</p>']
    for sequence in document.sequences:
        text = "".join(format_piece(piece, names) for piece in sequence.pieces).strip()
        count = f"{sequence.num_masked} of {sequence.num_tokens}"
        if sequence.num_important is not None:
            count += f", {sequence.num_important} important"
        # The browser finds the writing direction by the first letter.
        lines.append(f'<p dir="auto" lang="">{text} <small dir="ltr" lang="en">{count}</small></p>')
    if document.num_left_out:
        lines.append(f'<p class="note">... {document.num_left_out:,} more sequences</p>')
    return "\n".join(lines)


def _format_legend(names: list[str], scores: str | None) -> str:
    lines = [f'<mark class="m">masked in {html.escape(names[0])}</mark>']
    if len(names) > 1:
        lines[0] += (f' <mark class="c">in {html.escape(names[1])}</mark> '
                     '<mark class="b">in both</mark>')
    if scores:
        edges = [share_of(edge) for edge in LEVELS]
        ranges = [f"below {edges[0]}", *(f"{a} to {b}" for a, b in itertools.pairwise(edges)),
                  f"above {edges[-1]}"]
        keys = (f'<span class="l{level}">{text}</span>' for level, text in enumerate(ranges))
        lines.append(f"probability of being important, by {html.escape(scores)}: {' '.join(keys)}")
    inner = "\n".join(f'<span class="k">{key}</span>' for key in lines)
    after = "After each sequence: the number of its tokens that are masked"
    after += ", and of those that are important (above 50 %)." if scores else "."
    return f'<div class="legend">{inner}<div class="note">{after}</div></div>'


def format_page(
    title: str,
    origins: dict[str, list[str]],
    documents: list[Document],
    tables: list[Table],
    names: list[str],
    scores: str | None,
) -> str:
    """Write the whole page.

    Args:
        origins: lines on how each array was made, by its name.
        tables: those of one subject are placed side by side.
        names: of the shown index, and of the compared one if there is one.
    """
    link = ' | <a href="#statistics">statistics</a>' if tables else ""
    parts = [f'<nav><a href="#documents">documents</a>{link}</nav>',
             "<h2>How the tokens were chosen</h2>"]
    for name, lines in origins.items():
        text = "<br>".join(map(html.escape, lines))
        parts.append(f"<p><b>{html.escape(name)}</b><br>{text}</p>")
    parts += ['<h2 id="documents">Documents</h2>', _format_legend(names, scores)]
    parts += [_format_document(document, names) for document in documents]
    if tables:
        parts.append('<h2 id="statistics">Statistics</h2>')
    for subject in dict.fromkeys(table.subject for table in tables):
        inside = "\n".join(f"<div>{table.as_html(3)}</div>"
                           for table in tables if table.subject == subject)
        parts.append(f'<div class="{"types" if subject else "wide"}">\n{inside}\n</div>')
    return html_page(title, _STYLE, parts)
