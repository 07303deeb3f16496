"""`make gpu-check`: whatever part fails or hangs, there is a report, in time."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path

import pytest

from tests.support import gpu_check
from tests.support.gpu_check import Part
from tests.support.launch import ROOT

# A child that ignores SIGTERM, and its own child.
STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.fork()
print(os.getpid(), flush=True)
time.sleep(60)
"""


def options(folder: Path, seconds: float = 60, wheels: str = "") -> argparse.Namespace:
    return argparse.Namespace(output_dir=str(folder), seconds=seconds, tiny=True, wheels=wheels)


def test_parts_that_fail_or_hang_are_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE_SECONDS", 0.5)
    python = [sys.executable, "-c"]
    began = time.monotonic()
    rows = gpu_check.check(options(tmp_path, seconds=6), [
        Part("good", [*python, 'print(\'talk\\n{"speed": 3}\')'], 20, gpu_check.last_json),
        Part("fails", [*python, "print('half a result'); raise SystemExit('no such thing')"], 20),
        Part("hangs", [*python, STUBBORN], 1.5),
        Part("silent", [*python, ""], 20, gpu_check.last_json),
        Part("absent", ["/no/such/program"], 20),
        Part("slow", [*python, "import time; time.sleep(60)"], 20),
        Part("late", [*python, ""], 20),
    ])
    assert time.monotonic() - began < 20
    assert [row["status"] for row in rows] == [
        "ok", "failed (1)", "out of time", "no figures", "failed", "out of time", "no time left"]
    assert rows[0]["figures"] == {"speed": 3}
    assert "half a result | no such thing" in rows[1]["error"]
    pids = (tmp_path / "logs" / "hangs.log").read_text().split()
    assert len(pids) == 2 and not any(_runs(int(pid)) for pid in pids)
    saved = json.loads((tmp_path / "gpu_check.json").read_text())
    assert saved["parts"] == rows and saved["machine"]["python"]
    shown = (tmp_path / "gpu_check.txt").read_text().splitlines()
    assert [line.split()[0] for line in shown[1:]] == [row["part"] for row in rows]
    assert "no such thing" in shown[2]


def _runs(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_limits_leave_seven_minutes(tmp_path):
    """The limits of single parts may add up to more: what is left bounds each."""
    parts = gpu_check.plan(options(tmp_path, wheels=str(tmp_path)))
    assert gpu_check.TOTAL_SECONDS + 2 * gpu_check.GRACE_SECONDS < 420
    assert [part.name for part in parts] == [
        "install", "data", "GPU tests", "loop 128", "head", "loop 512", "scoring", "fine-tuning"]
    assert all(part.seconds <= 150 for part in parts)
    flags = " ".join(word for part in parts for word in part.command)
    assert "random whole_word selective random_matched" in flags
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^gpu-check:\n\t.*tests/support/gpu_check.py --wheels", makefile, re.M)


@pytest.mark.slow
def test_every_part_runs_in_a_small_size(tmp_path):
    """On the CPU: each part with its figures, in one report; the GPU tests are skipped.

    The folder of wheels is empty: this Python has all packages.
    """
    given = options(tmp_path / "out", seconds=600, wheels=str(tmp_path))
    rows = gpu_check.check(given, gpu_check.plan(given))
    report = (tmp_path / "out" / "gpu_check.txt").read_text()
    assert [row["status"] for row in rows] == ["ok"] * len(rows), report
    found = {row["part"]: row["figures"] for row in rows}
    assert found["data"]["tokens"] > 10_000
    for length in (128, 512):
        loop = found[f"loop {length}"]
        assert list(loop) == ["random", "whole_word", "selective", "random_matched", "bare",
                              "transformers-grouped", "gather-grouped"]
        assert all(row["tokens/s"] > 0 for row in loop.values())
    assert found["head"]["full_logits"]["ms"] > 0 and found["scoring"]["tokens/s"] > 0
    assert found["fine-tuning"]["steps/s"] > 0 and "skipped" in found["GPU tests"]["summary"]
