"""RESULTS.md: its tables are what the files beside it give, and it shows all that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from train import report
from train.reports.study import read_studies

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "RESULTS.md").read_text()
FILES = sorted((ROOT / "results").glob("*.csv"))
# A table that the page shows, whole: the line before it names its file and itself.
SHOWN = re.findall(r"<!-- results/(\w+)\.csv: (\w+) -->\n```\n(.*?)\n```", PAGE, re.DOTALL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_tables_are_those_of_the_file(path, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda *_: ({}, []))
    page = report.make_page(path.stem, [], read_studies([path]), [], [])
    made = {table.file: table.as_text() for table in page.tables}
    shown = {name: text for stem, name, text in SHOWN if stem == path.stem}
    assert {"table", "differences"} <= shown.keys()
    for name, text in shown.items():
        assert made[name].rstrip() == text.rstrip(), name


def test_every_picture_and_file_is_shown():
    for path in (ROOT / "results").iterdir():
        assert f"results/{path.name}" in PAGE, path.name
    assert {stem for stem, *_ in SHOWN} == {path.stem for path in FILES}
    assert ("study_cpu", "power") in [shown[:2] for shown in SHOWN], "the page chooses seeds by it"
