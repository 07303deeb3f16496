"""The benchmark of the data side: its tables, on stores so small that they take no time."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from preprocess.errors import ConfigError
from preprocess.masking import MATCHED, STRATEGIES
from preprocess.store import TokenStore
from train import benchmark_data


def test_every_table_is_filled_and_every_store_removed(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    # A process for each store would take most of its time to import.
    monkeypatch.setattr(
        benchmark_data, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(workers)
    )
    monkeypatch.setattr(benchmark_data.stores, "SETTLED_NS", benchmark_data.stores.SETTLED_NS)
    monkeypatch.setattr(benchmark_data.signal, "signal", lambda *_: None)
    benchmark_data.main([
        "--speed_tokens", "100000", "--num_tokens", "100000", "--order_rows", "5000",
        "--rounds", "1", "--steps", "1", "--output_dir", str(out),
    ])
    assert [path.name for path in out.iterdir()] == ["benchmark_data.json"]
    result = json.loads((out / "benchmark_data.json").read_text())
    assert [row["strategy"] for row in result["masks"]] == list(STRATEGIES)
    assert {(row["S"], row["masking"], row["ranks"]) for row in result["loader"]} == {
        (length, name, ranks) for length in (128, 512)
        for name in (MATCHED, *(key for key, one in STRATEGIES.items() if one.drawn))
        for ranks in (1, 64)
    }
    speeds = [float(row["million_tokens_per_second"])
              for row in result["masks"] + result["loader"]]
    assert min(speeds) > 0
    assert result["order"][0]["rows"] == "5,000"
    assert [row["tokens"] for row in result["scale"]] == ["100", "10,000", "100,000"]
    rows = [int(row["rows"].replace(",", "")) for row in result["scale"]]
    assert rows == sorted(rows) and rows[2] > 50 * rows[0]
    printed = capsys.readouterr().out
    for title in ("Building masks", "The loader", "The order of one epoch",
                  "Growth with the corpus"):
        assert title in printed


def test_the_store_is_like_text(tmp_path):
    benchmark_data.make_store(str(tmp_path / "s"), 300_000)
    store = TokenStore.open(tmp_path / "s", verify=True)
    assert store.num_tokens == 300_000
    assert np.diff(store.shards[0].sequence_offsets).mean() == pytest.approx(22, rel=0.1)
    assert store.num_sequences / store.num_documents == pytest.approx(8, rel=0.01)
    counts = np.sort(np.bincount(store.shards[0].tokens))[::-1]
    assert counts[0] > 1.5 * counts[1] > 3 * counts[8]
    assert not np.isin(store.shards[0].tokens, store.all_special_ids).any()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--num_tokens", "-1"], "--num_tokens -1: must be at least 0"),
        (["--num_tokens", "5000"], "--num_tokens 5000: 0, or from 100,000"),
        (["--speed_tokens", str(2**32)], "--speed_tokens 4294967296: 0, or from 100,000"),
    ],
)
def test_numbers_out_of_range(more, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        benchmark_data.main(["--output_dir", str(tmp_path / "out"), *more])
    assert not list(tmp_path.iterdir())
