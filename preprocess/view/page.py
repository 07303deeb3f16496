"""Masks as one HTML page that needs nothing else: no script, no other file, no network.

What is masked stands in a box; the more important a token, the darker its background and the
thicker the line below it. So a print without colours, and a reader who sees none, lose nothing.
Text of the corpus reaches the page through `html.escape` alone.
"""

from __future__ import annotations

import html

from preprocess.view.pieces import LEVELS, Document, Piece, Sequence, marked_by
from preprocess.view.tables import Table, percent, share_of

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
.note { margin: .3em 0; max-width: 50em; line-height: 1.45; }
.legend { border: 1px solid #888; padding: .4em .8em; margin: 1em 0; background: #fff; }
.legend .k { display: inline-block; margin-right: 1.5em; }
.legend .k > * { margin-right: .5em; display: inline-block; line-height: 1.3; }
mark { color: inherit; background: none; }
.l1, .l2, .l3 { text-decoration: underline; text-underline-offset: 3px; }
.l1 { background: #fdf3dc; text-decoration-style: dotted; text-decoration-thickness: 1px; }
.l2 { background: #fbd9a0; text-decoration-thickness: 1px; }
.l3 { background: #f2ab4b; text-decoration-thickness: 3px; }
.m { border: 2px solid #000; border-radius: 3px; padding: 0 1px 2px; }
.b { border: 4px double #000; }
.pair { display: grid; grid-template-columns: 1fr 1fr; column-gap: 1.5em; }
.pair > * { min-width: 0; border-top: 1px solid #ddd; padding: .3em 0; margin: 0; }
.pair > .name { border: 0; font: bold .8em system-ui, sans-serif; }
.pair p::before { content: none; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: .3em 0;
  font: .8em/1.5 system-ui, sans-serif; }
th, td { border-bottom: 1px solid #bbb; padding: .1em .6em; text-align: right; white-space: nowrap;
  vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
i { display: inline-block; height: .7em; background: #555; border: 1px solid #000;
  box-sizing: border-box; }
.bar { display: inline-block; width: 4em; text-align: left; margin-left: .5em; }
.types, .wide { display: flex; flex-wrap: wrap; gap: 0 2.5em; align-items: flex-start; }
.types > div, .wide > div { width: min-content; min-width: min(18em, 100%); max-width: 100%; }
.types .bar { display: none; }
@media (max-width: 40em) {
  body { font-size: 16px; padding: 0 .6em; } .pair { grid-template-columns: 1fr; }
  .pair > .name { display: none; } .pair p + p { border-top: 1px dashed #ddd; }
  .pair p::before { content: attr(data-name) " "; font: bold .7em system-ui, sans-serif; }
  .pair .bar, .bar { width: 3em; } th, td { padding: .1em .35em; }
}
@media print { body { font-size: 11pt; max-width: none; } h2, h3, .legend { break-after: avoid; }
  tr, .pair p { break-inside: avoid; } nav { display: none; } }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def format_piece(piece: Piece, names: list[str]) -> str:
    """Write a piece, escaped, its space included; `names` are those of the two indices."""
    classes, title = [], []
    holders = [name for name, on in zip(names, (piece.masked, piece.compared), strict=False) if on]
    if holders:
        classes.append("m b" if len(holders) > 1 else "m")
        title.append(f"masked in {' and '.join(holders)}")
    if piece.level:
        classes.append(f"l{piece.level}")
    if piece.score is not None and classes:
        title.append(f"log-odds {piece.score:.2f} ({share_of(piece.score)})")
    text = html.escape(piece.text)
    if classes:
        tag = "mark" if holders else "span"
        text = (f'<{tag} class="{" ".join(classes)}" title="{html.escape(", ".join(title))}">'
                f"{text}</{tag}>")
    return (" " if piece.space else "") + text


def _format_sequence(sequence: Sequence, names: list[str], shown: int | None) -> str:
    """Write a sequence as a paragraph with the marks of index `shown`."""
    pieces, masked = sequence.pieces, sequence.num_masked
    if shown is not None:
        pieces = marked_by(pieces, compared=bool(shown))
        masked = (sequence.num_masked, sequence.num_compared)[shown]
    text = "".join(format_piece(piece, names) for piece in pieces).strip()
    count = f"{masked} of {sequence.num_tokens}"
    if sequence.num_important is not None and not shown:
        count += f", {sequence.num_important} important"
    label = f' data-name="{html.escape(names[shown])}"' if shown is not None else ""
    # The browser finds the direction of writing by the first letter.
    return f'<p dir="auto" lang=""{label}>{text} <small dir="ltr" lang="en">{count}</small></p>'


def _format_document(document: Document, names: list[str]) -> str:
    head = (f"{document.num_tokens:,} tokens, {document.num_masked:,} masked "
            f"({percent(document.num_masked, document.num_tokens)})")
    lines = [f'<h3 id="d{document.number}">Document {document.number}</h3>']
    if len(names) > 1:
        head += (f"; {document.num_compared:,} in {html.escape(names[1])}, "
                 f"{document.num_shared:,} in both")
        lines += [f'<p class="note">{head}.</p>', '<div class="pair">']
        lines += [f'<div class="name">{html.escape(name)}</div>' for name in names]
        for sequence in document.sequences:
            lines += [_format_sequence(sequence, names, shown) for shown in (0, 1)]
        lines.append("</div>")
    else:
        lines.append(f'<p class="note">{head}.</p>')
        lines += [_format_sequence(sequence, names, None) for sequence in document.sequences]
    if document.num_left_out:
        lines.append(f'<p class="note">... {document.num_left_out:,} more sequences</p>')
    return "\n".join(lines)


def _format_legend(names: list[str], scores: str | None) -> str:
    lines = ['<mark class="m">masked</mark>']
    if len(names) > 1:
        lines[0] += ' <mark class="m b">masked in both</mark>'
    if scores:
        edges = [share_of(edge) for edge in LEVELS]
        ranges = [f"below {edges[0]}", *(f"{a} to {b}" for a, b in
                  zip(edges[:-1], edges[1:], strict=True)), f"above {edges[-1]}"]
        keys = (f'<span class="l{level}">{text}</span>' for level, text in enumerate(ranges))
        lines.append(f"how probably important, by {html.escape(scores)}: {' '.join(keys)}")
    inner = "\n".join(f'<span class="k">{key}</span>' for key in lines)
    after = "Behind each sequence: how many of its tokens are masked"
    after += ", and how many are important (above 50 %)." if scores else "."
    return f'<div class="legend">{inner}<div class="note">{after}</div></div>'


def _format_table(table: Table) -> str:
    lines = [f"<div><h3>{html.escape(table.title)}</h3>"]
    if table.note:
        lines.append(f'<p class="note">{html.escape(table.note)}</p>')
    lines.append('<div class="scroll"><table>')
    lines.append("<tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in table.head) + "</tr>")
    for row in table.rows:
        lines.append("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>")
    return "\n".join([*lines, "</table></div></div>"])


def _cell(cell: str | tuple[str, float]) -> str:
    if isinstance(cell, str):
        return f"<bdi>{html.escape(cell)}</bdi>"
    text, share = cell
    bar = f'<i style="width:{100 * min(share, 1.0):.1f}%"></i>' if share else ""
    return f'{html.escape(text)}<span class="bar">{bar}</span>'


def format_page(
    title: str,
    origins: dict[str, str],
    documents: list[Document],
    tables: list[Table],
    names: list[str],
    scores: str | None,
) -> str:
    """Write the whole page.

    Args:
        origins: of each index and scores, by name, how it was made.
        tables: those of one subject stand beside each other.
        names: of the shown index, and of the compared one if there is one.
    """
    links = ['<a href="#documents">documents</a>']
    links += ['<a href="#statistics">statistics</a>'] if tables else []
    parts = [f"<h1>{html.escape(title)}</h1>", f"<nav>{' | '.join(links)}</nav>",
             "<h2>How the tokens were chosen</h2>"]
    parts += [f"<p><b>{html.escape(subject)}</b>: {html.escape(text)}</p>"
              for subject, text in origins.items()]
    parts += ['<h2 id="documents">Documents</h2>', _format_legend(names, scores)]
    parts += [_format_document(document, names) for document in documents]
    if tables:
        parts.append('<h2 id="statistics">Statistics</h2>')
        for subject in dict.fromkeys(table.subject for table in tables):
            parts.append(f'<div class="{"types" if subject else "wide"}">')
            parts += [_format_table(table) for table in tables if table.subject == subject]
            parts.append("</div>")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
