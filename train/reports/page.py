"""Write the page of a report, as one HTML file and as Markdown.

Figures are inlined in HTML as `data:` PNGs; Markdown names their files. All text is escaped.
"""

from __future__ import annotations

import base64
import html
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from preprocess.errors import visible
from preprocess.view.tables import Table, html_page
from train.reports.figures import DOTS_PER_INCH

CSS_DOTS_PER_INCH = 96


@dataclass(frozen=True)
class Picture:
    """A figure: name of its PNG without ending, a text that describes it, and its bytes."""

    file: str
    text: str
    png: bytes


@dataclass(frozen=True)
class Section:
    """A part of the page: a heading, the notes that limit what follows, and what follows.

    Attributes:
        method: a paragraph under the heading.
        small: whether it is folded in HTML until it is opened.
    """

    title: str
    blocks: Sequence[Table | Picture] = ()
    notes: Sequence[str] = ()
    method: str = ""
    small: bool = False

    @property
    def tables(self) -> list[Table]:
        return [block for block in self.blocks if isinstance(block, Table)]


@dataclass
class ReportPage:
    """A report: a title and its sections in order."""

    title: str
    sections: list[Section] = field(default_factory=list)

    def add(self, section: Section) -> None:
        """Add a section unless it is empty."""
        if section.blocks or section.notes:
            self.sections.append(section)

    @property
    def tables(self) -> list[Table]:
        return [table for section in self.sections for table in section.tables]

    @property
    def pictures(self) -> list[Picture]:
        return [block for section in self.sections for block in section.blocks
                if isinstance(block, Picture)]


_STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto;
       max-width: 75rem; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.25rem; margin: 2.2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; } summary { cursor: pointer; margin: 1rem 0; }
summary h2 { display: inline; }
p, li { max-width: 48rem; overflow-wrap: anywhere; }
td:last-child:not(.number) { white-space: normal; min-width: 16rem; overflow-wrap: anywhere; }
.notes { border-left: 3px solid #d55e00; padding-left: .6rem; }
.notes ul { margin: .3rem 0; padding-left: 1.2rem; }
figure { margin: 1.5rem 0; } img { display: block; max-width: 100%; height: auto; }
@media (max-width: 45em) {
  td:last-child:not(.number) { min-width: 13rem; } img { max-width: none; }
}
@media print {
  nav { display: none; } body { max-width: none; font-size: 10pt; padding: 0; }
  table { font-size: 7.5pt; }
  th, td { padding-right: .4rem; white-space: normal; } figure { break-inside: avoid; }
  img { max-width: 100%; }
}
"""


def as_html(page: ReportPage) -> str:
    """Write a complete report as one page, with links to its sections."""
    links = " | ".join(f'<a href="#part{number}">{_text(section.title)}</a>'
                       for number, section in enumerate(page.sections, 1))
    parts = [f"<nav>{links}</nav>"]
    for number, section in enumerate(page.sections, 1):
        title = f'<h2 id="part{number}">{_text(section.title)}</h2>'
        inside = [f"<p>{_text(section.method)}</p>"] if section.method else []
        if section.notes:
            items = "\n".join(f"<li>{_text(note)}</li>" for note in section.notes)
            inside.append(f'<div class="notes">\n<ul>\n{items}\n</ul></div>')
        inside += [block.as_html(3) if isinstance(block, Table) else _figure(block)
                   for block in section.blocks]
        if section.small:
            title = f"<details><summary>{title}</summary>"
            inside.append("</details>")
        parts += [title, *inside]
    return html_page(page.title, _STYLE, parts)


def _text(text: str) -> str:
    return html.escape(visible(text))


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode("ascii")
    text = _text(picture.text)
    # As large as it was drawn, so that the letters of all figures have one size.
    width, height = (round(side * CSS_DOTS_PER_INCH / DOTS_PER_INCH)
                     for side in struct.unpack(">II", picture.png[16:24]))
    return (f'<figure><div class="scroll"><img alt="{text}" width="{width}" height="{height}" '
            f'src="data:image/png;base64,{data}"></div>'
            f'<figcaption class="note">{text}</figcaption></figure>')


def as_markdown(page: ReportPage) -> str:
    """Write the same page as Markdown beside the files of its figures."""
    parts = [f"# {_plain(page.title)}"]
    for section in page.sections:
        parts.append(f"## {_plain(section.title)}")
        if section.method:
            parts.append(_plain(section.method))
        if section.notes:
            parts.append("\n".join(f"- Note: {_plain(note)}" for note in section.notes))
        parts += [block.as_markdown().rstrip() if isinstance(block, Table)
                  else f"![{_plain(block.text)}]({block.file}.png)" for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>#|~&$])", r"\\\1", visible(text))
