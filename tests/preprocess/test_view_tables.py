"""The one table: alignment, CSV, bars, and HTML that is escaped and loads nothing."""

from __future__ import annotations

import csv
import io
from html.parser import HTMLParser

from preprocess.view.tables import Share, Table, html_page

EVIL = '<script>alert("x")</script> | `a` *b* [c](javascript:d) & \'"'
TABLE = Table.of("A title", [
    {"arm": "none", "mean": "0.5", "part": "-"}, {"arm": "selective", "mean": 12.25, "part": "3 %"},
], "A note.", "t")


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_text_aligns_numbers_to_the_right():
    assert TABLE.as_text().split("\n") == [
        "A title",
        "  arm         mean  part",
        "  none         0.5     -",
        "  selective  12.25   3 %",
        "  A note.",
    ]
    assert Table("", ("x",), []).as_text() == "x"


def test_bars_only_where_there_is_room():
    table = Table("T", ("kind", "share"), [("\u65e5\u672c", Share(1, 2)), ("b", Share(3, 2))])
    wide = table.as_text(width=80).splitlines()
    assert wide[2].split() == ["\u65e5\u672c", "50.0", "%", "######"] and "#" * 12 in wide[3]
    assert "#" not in table.as_text(width=20)
    assert '<i style="width:50.0%"></i>' in table.as_html()
    assert (str(Share(0, 0)), Share(0, 0).length) == ("-", 0)


def test_csv_is_read_back():
    (row,) = csv.DictReader(io.StringIO(Table("t", ("arm", "mean"), [(EVIL, "+1")]).as_csv()))
    assert row == {"arm": EVIL, "mean": "+1"}


def test_html_escapes_and_loads_nothing():
    hostile = Table(EVIL, (EVIL, "mean"), [(EVIL, "+1")], EVIL)
    page = Page(html_page(EVIL, "", [hostile.as_html(), TABLE.as_html()]))
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags and "link" not in tags and tags.count("table") == 2
    assert page.text.count(EVIL) == 6  # twice the page's title, then title, note, column and cell
    assert not any(name in ("src", "href") or name.startswith("on")
                   for _, attributes in page.tags for name in attributes)
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'") and "script" not in policy
    cells = [a.get("class") for tag, a in Page(TABLE.as_html()).tags if tag in ("th", "td")]
    assert cells == [None, "number", "number"] * 3
    # Notes name columns, and columns name indices: both as they are.
    assert "masked in random_matched" in Table("T", ("masked in random_matched",), []).as_html()
