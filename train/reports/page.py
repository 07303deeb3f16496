"""Write the page of a report: tables, notes and figures in one HTML file.

Figures are inlined as `data:` PNGs. All text is escaped.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

from preprocess.errors import visible
from preprocess.view.tables import Table, html_page


@dataclass(frozen=True)
class Picture:
    """A figure: name of its PNG without ending, a text that describes it, and its bytes."""

    file: str
    text: str
    png: bytes


_STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto;
       max-width: 70rem; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, li { max-width: 48rem; overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
@media (max-width: 45rem) { figure { overflow-x: auto; } img { max-width: none; width: 45rem; } }
@media print {
  body { max-width: none; font-size: 10pt; padding: 0; } table { font-size: 7.5pt; }
  th, td { padding-right: .4rem; white-space: normal; } figure { break-inside: avoid; }
  img { max-width: 100%; width: auto; }
}
"""


def as_html(title: str, tables: Sequence[Table], pictures: Sequence[Picture],
            notes: Sequence[str]) -> str:
    """Write a complete report as one page."""
    parts = [table.as_html() for table in tables]
    if notes:
        items = "\n".join(f"<li>{html.escape(visible(note))}</li>" for note in notes)
        parts.append(f"<h2>Notes</h2>\n<ul>\n{items}\n</ul>")
    for picture in pictures:
        data = base64.b64encode(picture.png).decode("ascii")
        text = html.escape(visible(picture.text))
        parts.append(f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
                     f'<figcaption class="note">{text}</figcaption></figure>')
    return html_page(title, _STYLE, parts)
