"""The benchmark of `csrc`: every row is measured, and a wrong one is refused."""

from __future__ import annotations

import json

import pytest

import csrc
from csrc import benchmark

SMALL = "--rows 2 --slots 16 --hidden 16 --vocab 50 --rounds 2 --calls 2 --warmup 1 --device cpu"


def test_measures_every_implementation(capsys):
    benchmark.main([*SMALL.split(), "--dtype", "fp32"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["implementation"]: row for row in result["rows"]}
    assert list(rows) == ["all_positions", *csrc.IMPLEMENTATIONS]
    assert rows["all_positions"]["speedup"] == 1
    for row in rows.values():
        assert row["calls"] == 4
        assert row["ms"]["p20"] <= row["ms"]["median"] <= row["ms"]["p80"]
    assert {"torch", "platform", "cpus", "gpu", "command", "options"} <= result.keys()


def test_refuses_a_wrong_implementation(monkeypatch):
    def doubled(*arguments):
        loss, hits = csrc.reference.masked_lm_loss(*arguments)
        return 2 * loss, hits

    monkeypatch.setitem(csrc.IMPLEMENTATIONS, "doubled", doubled)
    with pytest.raises(RuntimeError, match="doubled"):
        benchmark.main([*SMALL.split(), "--dtype", "fp32"])


@pytest.mark.parametrize("line", ["--rows 0", "--rate 0", "--rate 1.5", "--dtype fp64", "--row 2"])
def test_exits_with_2(line, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(line.split())
    assert stopped.value.code == 2
    assert capsys.readouterr().err
