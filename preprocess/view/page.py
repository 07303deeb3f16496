"""Write masks as one HTML page without scripts, other files or network.

Masked tokens are boxed (dashed in a second index, double in both), those of one unit in one box.
The higher the score of a token, the darker its background and the thicker its underline, so that
neither a print without colours nor a colour-blind reader loses anything. All text of the corpus
passes through `html.escape`.
"""

from __future__ import annotations

import html

from preprocess.view.pieces import Document, Piece, boxes
from preprocess.view.scale import LEVEL_QUANTILES, Scale
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
mark { color: inherit; background: none; -webkit-box-decoration-break: clone;
  box-decoration-break: clone; }
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


# Of the lines on how an array was made, those that a page shows at once.
_FIRST = ("rule: ", "masked: ", "measure: ", "match: ", "drawn ")


def format_box(box: list[Piece], names: list[str], scale: Scale) -> str:
    """Write the pieces of a box, escaped, with their spaces; `names` are those of the indices."""
    held = (box[0].masked, box[0].compared)
    holders = [name for name, on in zip(names, held, strict=False) if on]
    mark = {(True, False): "m", (False, True): "c", (True, True): "b"}.get(held, "")
    holder = f"masked in {' and '.join(holders)}" if mark else ""
    lead = " " * box[0].space
    if len(box) == 1:
        return lead + _tagged(box[0], scale, mark, holder)
    inner = "".join(" " * (piece.space and i > 0) + _tagged(piece, scale)
                    for i, piece in enumerate(box))
    return f'{lead}<mark class="{mark}" title="{html.escape(holder)}">{inner}</mark>'


def _tagged(piece: Piece, scale: Scale, mark: str = "", holder: str = "") -> str:
    classes = [name for name in (mark, f"l{piece.level}" if piece.level else "") if name]
    text = html.escape(piece.text)
    if not classes:
        return text
    score = "" if piece.score is None else scale.describe(piece.score)
    title = html.escape(", ".join(filter(None, (holder, score))))
    about = f'class="{" ".join(classes)}" title="{title}"'
    return f"<mark {about}>{text}</mark>" if mark else f"<span {about}>{text}</span>"


def _format_document(document: Document, names: list[str], scale: Scale) -> str:
    head = (f"{document.num_tokens:,} tokens, {document.num_masked:,} masked "
            f"({percent(document.num_masked, document.num_tokens)})")
    if len(names) > 1:
        head += f"; {document.num_compared:,} in {names[1]}, {document.num_shared:,} in both"
    lines = [f'<h3 id="d{document.number}">Document {document.number}</h3>',
             f'<p class="note">{html.escape(head)}.</p>']
    for sequence in document.sequences:
        text = "".join(format_box(box, names, scale) for box in boxes(sequence.pieces)).strip()
        count = f"{sequence.num_masked} of {sequence.num_tokens}"
        if sequence.num_important is not None:
            count += f", {sequence.num_important} important"
        # The browser finds the writing direction by the first letter.
        lines.append(f'<p dir="auto" lang="">{text} <small dir="ltr" lang="en">{count}</small></p>')
    if document.num_left_out:
        lines.append(f'<p class="note">... {document.num_left_out:,} more sequences</p>')
    return "\n".join(lines)


def _format_legend(names: list[str], scores: str | None, scale: Scale) -> str:
    lines = [f'<mark class="m">masked in {html.escape(names[0])}</mark>']
    if len(names) > 1:
        lines[0] += (f' <mark class="c">in {html.escape(names[1])}</mark> '
                     '<mark class="b">in both</mark>')
    if scores:
        keys = " ".join(f'<span class="l{level}">{text}</span>' for level, text in scale.ranges())
        what = "probability of being important" if scale.in_log_odds else scale.unit
        lines.append(f"{html.escape(what)}, by {html.escape(scores)}: {keys}")
        if not scale.boundary:
            shares = [f"{100 * share:.0f}" for share in LEVEL_QUANTILES]
            lines[-1] += f" (the shades begin at {', '.join(shares)} % of the tokens)"
    inner = "\n".join(f'<span class="k">{key}</span>' for key in lines)
    after = "After each sequence: the number of its tokens that are masked"
    important = scores and scale.boundary
    after += f", and of those that are important (above {scale.bound(0)})." if important else "."
    return f'<div class="legend">{inner}<div class="note">{after}</div></div>'


def _format_origin(name: str, lines: list[str]) -> str:
    """Write how an array was made: what people ask for, and the rest folded until it is opened."""
    shown = [line for line in lines if line.startswith(_FIRST)]
    first, rest = ("<br>".join(map(html.escape, part)) for part in (
        shown, [line for line in lines if line not in shown]))
    more = f'<details class="note"><summary>its options and digests</summary>{rest}</details>'
    return f"<p><b>{html.escape(name)}</b><br>{first}</p>{more if rest else ''}"


def format_page(
    title: str,
    origins: dict[str, list[str]],
    documents: list[Document],
    tables: list[Table],
    names: list[str],
    scores: str | None,
    scale: Scale,
) -> str:
    """Write the whole page.

    Args:
        origins: lines on how each array was made, by its name.
        tables: those of one subject are placed side by side.
        names: of the shown index, and of the compared one if there is one.
        scale: of the scores.
    """
    link = ' | <a href="#statistics">statistics</a>' if tables else ""
    parts = [f'<nav><a href="#documents">documents</a>{link}</nav>',
             "<h2>How the tokens were chosen</h2>"]
    parts += [_format_origin(name, lines) for name, lines in origins.items()]
    parts += ['<h2 id="documents">Documents</h2>', _format_legend(names, scores, scale)]
    parts += [_format_document(document, names, scale) for document in documents]
    if tables:
        parts.append('<h2 id="statistics">Statistics</h2>')
    for subject in dict.fromkeys(table.subject for table in tables):
        inside = "\n".join(f"<div>{table.as_html(3)}</div>"
                           for table in tables if table.subject == subject)
        parts.append(f'<div class="{"types" if subject else "wide"}">\n{inside}\n</div>')
    return html_page(title, _STYLE, parts)


def format_texts(
    title: str, notes: list[str], texts: list[tuple[str, list[tuple[list[Piece], str]]]]
) -> str:
    """Write a page of texts in which some tokens are boxed, without scores.

    Args:
        notes: sentences that explain the page.
        texts: of each the heading, and its sequences with a remark each, which may be empty.
    """
    told = "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)
    parts = [f'<div class="legend"><mark class="m">important</mark>{told}</div>']
    for heading, sequences in texts:
        parts.append(f"<h3>{html.escape(heading)}</h3>")
        for pieces, remark in sequences:
            text = "".join(
                " " * piece.space + (f'<mark class="m">{html.escape(piece.text)}</mark>'
                                     if piece.masked else html.escape(piece.text))
                for piece in pieces).strip()
            parts.append(f'<p dir="auto" lang="">{text} <small dir="ltr" lang="en">'
                         f"{html.escape(remark)}</small></p>")
    return html_page(title, _STYLE, parts)
