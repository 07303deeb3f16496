"""Tables and pages: alignment, escaping, and a page that needs nothing else."""

from __future__ import annotations

import csv
import io
import re
from html.parser import HTMLParser

from train.reports.page import Picture, Table, as_csv, as_html, as_markdown, as_text

EVIL = '<script>alert("x")</script> | `a` *b* [c](javascript:d) & \'"'
TABLE = Table("t", "A title", "A caption.", ("arm", "mean"), [
    {"arm": "none", "mean": "0.5"}, {"arm": "selective", "mean": "12.25"}])
HOSTILE = Table("t", EVIL, EVIL, ("arm", "mean"), [{"arm": EVIL, "mean": "+1"}])
PICTURE = Picture("loss", EVIL, b"\x89PNG bytes")


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
    assert as_text(TABLE).split("\n") == [
        "arm         mean",
        "---------  -----",
        "none         0.5",
        "selective  12.25",
    ]


def test_csv_is_read_back():
    (row,) = csv.DictReader(io.StringIO(as_csv(HOSTILE)))
    assert row == {"arm": EVIL, "mean": "+1"}


def test_html_escapes_and_loads_nothing():
    page = Page(as_html(EVIL, [HOSTILE, TABLE], [PICTURE], [EVIL]))
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags and "link" not in tags
    # The page's title twice, the table's, its caption and cell, a note, the figure's caption.
    assert page.text.count(EVIL) == 7
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href"):
                assert value.startswith("data:image/png;base64,")
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'") and "script" not in policy
    assert tags.count("table") == 2 and tags.count("img") == 1


def test_html_numbers_stand_to_the_right():
    page = Page(as_html("t", [TABLE], [], []))
    cells = [attributes.get("class") for tag, attributes in page.tags if tag in ("th", "td")]
    assert cells == [None, "number"] * 3


def test_markdown_keeps_its_columns():
    text = as_markdown("t", [HOSTILE], [PICTURE], [EVIL])
    (row,) = [line for line in text.splitlines() if line.endswith("| +1 |")]
    assert len(re.findall(r"(?<!\\)\|", row)) == 3
    assert "<script>" not in text and not re.search(r"(?<!\\)\]\(javascript", text)
    assert "](loss.png)" in text
    plain = as_markdown("t", [TABLE], [], [])
    assert "| arm | mean |\n| --- | ---: |\n| none | 0.5 |" in plain and "Notes" not in plain
