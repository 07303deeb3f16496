"""Tables and pages: the same rows as text, CSV, Markdown and HTML.

The HTML page is one file that needs no network and runs no script: figures are `data:` PNGs, and
its content security policy lets it load nothing else. Everything from outside is escaped.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """Rows under a title.

    Attributes:
        file: name of its CSV, without ending.
        title: a few words.
        caption: what the numbers mean, in sentences.
        columns: keys of the rows, in order.
        rows: one dictionary a row.
    """

    file: str
    title: str
    caption: str
    columns: Sequence[str]
    rows: list[dict[str, Any]]

    def is_number(self) -> list[bool]:
        """Whether each column holds nothing but numbers."""
        return [all(re.fullmatch(r"[+-]?[\d.]*", str(row[column])) for row in self.rows)
                for column in self.columns]


@dataclass(frozen=True)
class Picture:
    """A figure; `file` is the name of its PNG without ending, `text` says what it shows."""

    file: str
    text: str
    png: bytes


def as_text(table: Table) -> str:
    """Rows as aligned text: words to the left, numbers to the right."""
    cells = [[str(row[column]) for column in table.columns] for row in table.rows]
    widths = [max([len(c), *(len(row[i]) for row in cells)]) for i, c in enumerate(table.columns)]
    numeric = table.is_number()
    lines = []
    for row in [list(table.columns), *cells]:
        parts = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def as_csv(table: Table) -> str:
    """Rows with a header line."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=table.columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.rows)
    return out.getvalue()


def as_markdown(title: str, tables: Sequence[Table], pictures: Sequence[Picture],
                notes: Sequence[str]) -> str:
    """All of a report; pictures are files beside it."""

    def cell(text: object) -> str:
        escaped = html.escape(str(text), quote=False)
        return re.sub(r"([\\`*_\[\]|])", r"\\\1", " ".join(escaped.split()))

    parts = [f"# {cell(title)}"]
    for table in tables:
        rule = ["---:" if right else "---" for right in table.is_number()]
        body = [[cell(row[column]) for column in table.columns] for row in table.rows]
        lines = [table.columns, rule, *body]
        parts += [f"## {cell(table.title)}",
                  "\n".join("| " + " | ".join(line) + " |" for line in lines), cell(table.caption)]
    if notes:
        parts += ["## Notes", "\n".join(f"- {cell(note)}" for note in notes)]
    parts += [f"![{cell(picture.text)}]({picture.file}.png)" for picture in pictures]
    return "\n\n".join(parts) + "\n"


STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto;
       max-width: 70rem; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem .25rem 0; text-align: left; white-space: nowrap;
         border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #555; } .number { text-align: right; }
p, li { max-width: 48rem; overflow-wrap: anywhere; } .caption { color: #444; font-size: .875rem; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
@media (max-width: 45rem) { figure { overflow-x: auto; } img { max-width: none; width: 45rem; } }
@media print {
  body { max-width: none; font-size: 10pt; padding: 0; } .wide { overflow: visible; }
  table { font-size: 7.5pt; } th, td { padding-right: .4rem; white-space: normal; }
  figure, tr { break-inside: avoid; } h2 { break-after: avoid; }
  img { max-width: 100%; width: auto; }
}
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def as_html(title: str, tables: Sequence[Table], pictures: Sequence[Picture],
            notes: Sequence[str]) -> str:
    """All of a report in one page."""
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
        f"<h1>{html.escape(title)}</h1>",
        *(_html_table(table) for table in tables),
    ]
    if notes:
        items = "\n".join(f"<li>{html.escape(note)}</li>" for note in notes)
        parts.append(f"<h2>Notes</h2>\n<ul>\n{items}\n</ul>")
    parts += [_html_picture(picture) for picture in pictures]
    return "\n".join([*parts, "</body>\n</html>\n"])


def _html_table(table: Table) -> str:
    classes = [' class="number"' if right else "" for right in table.is_number()]

    def line(tag: str, cells: Sequence[object]) -> str:
        inside = "".join(f"<{tag}{kind}>{html.escape(str(cell))}</{tag.split()[0]}>"
                         for cell, kind in zip(cells, classes, strict=True))
        return f"<tr>{inside}</tr>"

    head = line('th scope="col"', [column.replace("_", " ") for column in table.columns])
    body = "\n".join(line("td", [row[column] for column in table.columns]) for row in table.rows)
    return (
        f"<h2>{html.escape(table.title)}</h2>\n<div class=\"wide\"><table>\n<thead>{head}</thead>\n"
        f"<tbody>\n{body}\n</tbody>\n</table></div>\n"
        f'<p class="caption">{html.escape(table.caption)}</p>'
    )


def _html_picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode("ascii")
    text = html.escape(picture.text)
    return (f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
            f'<figcaption class="caption">{text}</figcaption></figure>')
