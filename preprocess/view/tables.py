"""Hold rows under columns, and write them as text, CSV, Markdown or HTML: the table of the house.

An HTML page is one file that needs no network and runs no script: its content security policy lets
it load nothing but inlined pictures. All text is escaped here, for each of the four: cells hold
labels, names and tokens of files that strangers wrote.
"""

from __future__ import annotations

import csv
import html
import io
import re
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from preprocess.errors import visible

_BAR = 12  # characters of the longest bar
_NUMBER = re.compile(r"|-|[+-]?\d.*")
# What a spreadsheet would run as a formula, unless it is a number, a share, or "-" for nothing.
_FORMULA = re.compile(r"\s*[=+\-@].*", re.DOTALL)
_HARMLESS = re.compile(r"-|[+-]?(\d[\d,]*\.?\d*|\.\d+)([eE][+-]?\d+)?( ?%)?|[+-](inf|nan)")
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# A table that is wider than the page scrolls under its first column, which says what a row is
# about; a shadow at the right edge, which the last column covers, says that there is more.
_STYLE = """
.scroll { overflow-x: auto; background:
  linear-gradient(to left, #fff 40%, #fff0) right / 3em 100% no-repeat local,
  linear-gradient(to left, #0004, #0000) right / .8em 100% no-repeat; }
table { border-collapse: separate; border-spacing: 0; margin: .3em 0;
  font: .85em/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #bbb; padding: .1em .6em; text-align: left; white-space: nowrap;
  vertical-align: top; }
th { border-bottom: 2px solid #555; } .number { text-align: right; }
th:first-child, td:first-child { padding-left: 0; position: sticky; left: 0; background: #fff; }
.note { color: #444; font-size: .85em; max-width: 50em; line-height: 1.45; margin: .3em 0; }
i { display: inline-block; height: .7em; background: #555; border: 1px solid #000;
  box-sizing: border-box; }
.bar { display: inline-block; width: 4em; text-align: left; margin-left: .5em; }
@media (max-width: 45em) {
  tr > :first-child bdi { display: inline-block; width: max-content; max-width: 9em;
    white-space: normal; overflow-wrap: anywhere; }
}
@media print { .scroll { overflow: visible; background: none; } tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; } }
"""


@dataclass(frozen=True)
class Share:
    """A cell that may have a bar behind it, as long as `part` is of `whole`."""

    part: float
    whole: float

    @property
    def length(self) -> float:
        """Length of the bar, from 0 to 1."""
        return min(self.part / self.whole, 1.0) if self.whole else 0.0

    def __str__(self) -> str:
        return percent(self.part, self.whole)


@dataclass(frozen=True)
class Table:
    """Rows of cells under a title.

    Attributes:
        title: a few words.
        columns: their names, in order; a first column without a name is "".
        rows: one cell per column: a text, a number, or a `Share`.
        note: the meaning of the numbers, in sentences.
        file: name of its CSV without ending, if it has one.
        subject: name of the mask index that it is about, if it is about one.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""
    file: str = ""
    subject: str | None = None

    @classmethod
    def of(cls, title: str, rows: Sequence[dict[str, Any]], note: str = "", file: str = "",
           columns: Sequence[str] | None = None) -> Table:
        """Make a table of dictionaries; `columns` are their keys, those of the first by default."""
        keys = list(rows[0]) if columns is None else columns
        return cls(title, keys, [[row[key] for key in keys] for row in rows], note, file)

    @property
    def numeric(self) -> list[bool]:
        """Whether each column holds numbers, with or without a unit behind them."""
        return [all(_NUMBER.fullmatch(str(row[i])) for row in self.rows)
                for i in range(len(self.columns))]

    def as_text(self, width: int = 100) -> str:
        """Align the cells, words left and numbers right.

        Bars, long notes and a last column of words respect `width`.
        """
        lines = self._lines(bars=True)
        if max(map(text_width, lines)) > width:
            lines = self._lines(bars=False, width=width - 2)
        title = visible(self.title)
        lines = [title, *(f"  {line}" for line in lines)] if title else lines
        note = textwrap.wrap(visible(self.note), max(width - 2, 20), break_on_hyphens=False)
        return "\n".join([*lines, *(f"  {line}" for line in note)])

    def _lines(self, bars: bool, width: int | None = None) -> list[str]:
        def write(cell: Any) -> str:
            if not bars or not isinstance(cell, Share):
                return visible(cell)
            return f"{cell!s:>7} {'#' * round(cell.length * _BAR):<{_BAR}}"

        cells = [[write(cell) for cell in row] for row in [self.columns, *self.rows]]
        if width is not None and not self.numeric[-1]:
            before = sum(max(text_width(row[i]) for row in cells) + 2
                         for i in range(len(self.columns) - 1))
            cells = [line for row in cells for line in _wrapped(row, max(width - before, 20))]
        widths = [max(map(text_width, column)) for column in zip(*cells, strict=True)]
        columns = list(zip(widths, self.numeric, strict=True))

        def pad(cell: str, width: int, number: bool) -> str:
            gap = " " * (width - text_width(cell))
            return gap + cell if number else cell + gap

        return ["  ".join(pad(cell, *column) for cell, column in zip(row, columns, strict=True))
                .rstrip() for row in cells]

    def as_csv(self) -> str:
        """Write a line of column names and one line per row.

        What a spreadsheet would take for a formula gets an apostrophe before it, which it hides.
        """
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows(
            [_csv_cell(cell) for cell in row] for row in [self.columns, *self.rows])
        return out.getvalue()

    def as_markdown(self) -> str:
        """Write the title in bold, the table, and the note."""
        def line(cells: Iterable[Any]) -> str:
            return f"| {' | '.join(map(_markdown_cell, cells))} |"

        rule = (("---:" if number else "---") for number in self.numeric)
        parts = [f"**{_markdown_cell(self.title)}**" if self.title else "",
                 "\n".join([line(self.columns), f"|{'|'.join(rule)}|", *map(line, self.rows)]),
                 _markdown_cell(self.note)]
        return "\n\n".join(filter(None, parts)) + "\n"

    def as_html(self, level: int = 2) -> str:
        """Write a heading of that level, the note, and the table."""
        kinds = [' class="number"' if number else "" for number in self.numeric]

        def line(tag: str, cells: Iterable[Any]) -> str:
            inside = (f"<{tag}{kind}>{_html_cell(cell)}</{tag}>"
                      for cell, kind in zip(cells, kinds, strict=True))
            return f"<tr>{''.join(inside)}</tr>"

        head = line("th", self.columns)
        body = "\n".join(line("td", row) for row in self.rows)
        note = f'<p class="note">{_escaped(self.note)}</p>\n' if self.note else ""
        return (f"<h{level}>{_escaped(self.title)}</h{level}>\n{note}"
                f'<div class="scroll"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n'
                "</table></div>")


def _wrapped(row: list[str], width: int) -> list[list[str]]:
    """Cut the last cell of a row into lines, each a row of its own."""
    lines = textwrap.wrap(row[-1], width, break_on_hyphens=False) or [""]
    blank = [""] * (len(row) - 1)
    return [[*(blank if i else row[:-1]), line] for i, line in enumerate(lines)]


def _csv_cell(cell: Any) -> str:
    text = visible("" if cell is None else cell)
    return f"'{text}" if _FORMULA.fullmatch(text) and not _HARMLESS.fullmatch(text) else text


def _markdown_cell(cell: Any) -> str:
    return re.sub(r"([\\`*_\[\]<>#|~&$])", r"\\\1", visible("" if cell is None else cell))


def _escaped(text: Any) -> str:
    return html.escape(visible(text))


def _html_cell(cell: Any) -> str:
    if not isinstance(cell, Share):
        return f"<bdi>{_escaped(cell)}</bdi>"
    bar = f'<i style="width:{100 * cell.length:.1f}%"></i>' if cell.length else ""
    return f'{cell}<span class="bar">{bar}</span>'


def percent(part: float, whole: float) -> str:
    """Write a share, such as 12.5 %; "-" of nothing."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def text_width(text: str) -> int:
    """Count the terminal cells that a text takes."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me", "Cf") for c in text)


def html_page(title: str, style: str, parts: Iterable[str]) -> str:
    """Write a page with the title as its heading; `style` comes after that of tables."""
    head, body = _escaped(title), "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{head}</title>\n<style>{_STYLE}{style}</style></head>\n"
        f"<body>\n<h1>{head}</h1>\n{body}\n</body></html>\n"
    )
