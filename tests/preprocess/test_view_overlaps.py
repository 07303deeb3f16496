"""Overlaps of mask indices: the matrix against a slow one, its tables and files."""

from __future__ import annotations

import csv
import re

import numpy as np
import pytest

from preprocess import build_masks
from preprocess.errors import DataError
from preprocess.show_masks import main
from preprocess.store import TokenStore, open_array, write_array
from preprocess.view import statistics as mask_statistics
from preprocess.view.overlaps import (
    Overlaps,
    draw_overlaps,
    overlap_rows,
    overlap_tables,
    types_table,
)
from preprocess.view.statistics import count_masks
from tests.support.stores import write

UNKNOWN = 1


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_tokenizer):
    """Two shards whose sequences differ much in length, and indices beside them."""
    generator = np.random.default_rng(3)
    prefix = str(tmp_path_factory.mktemp("overlaps") / "s")
    for i in range(2):
        documents = [
            [generator.choice([UNKNOWN, *range(5, len(tiny_tokenizer))], size=n).astype(np.uint16)
             for n in generator.choice([0, 1, 5, 60], size=4)]
            for _ in range(60)]
        write(prefix, documents, (i, 2), tiny_tokenizer)
    for shard in TokenStore.open(prefix).shards:
        allowed = np.flatnonzero(shard.tokens[:] != UNKNOWN)
        for name, share in (("a", 0.1), ("b", 0.3), ("none", 0)):
            chosen = allowed[generator.random(len(allowed)) < share].astype(np.uint32)
            write_array(shard, name, "mask", chosen, {})
        # Half of `a`, and what follows it: far from chance.
        half = open_array(shard, "a", "mask")[0][::2]
        near = np.union1d(half, half + 1)
        write_array(shard, "near", "mask", np.intersect1d(near, allowed).astype(np.uint32), {})
    return TokenStore.open(prefix)


def slow_overlaps(store, names):
    """The shared tokens and their expectation, one sequence at a time."""
    shared = {(a, b): 0 for a in names for b in names}
    expected = {pair: 0.0 for pair in shared}
    for shard in store.shards:
        held = {name: set(open_array(shard, name, "mask")[0].tolist()) for name in names}
        offsets, tokens = shard.sequence_offsets[:].tolist(), shard.tokens[:].tolist()
        for start, end in zip(offsets[:-1], offsets[1:], strict=True):
            here = {name: {p for p in held[name] if start <= p < end} for name in names}
            n = sum(token != UNKNOWN for token in tokens[start:end])
            for a, b in shared:
                shared[a, b] += len(here[a] & here[b])
                expected[a, b] += len(here[a]) * len(here[b]) / n if n else 0
    return shared, expected


@pytest.mark.parametrize("block_tokens", [1 << 20, 50])
def test_the_matrix_is_that_of_a_loop(block_tokens, store, monkeypatch):
    monkeypatch.setattr(mask_statistics, "BLOCK_TOKENS", block_tokens)
    names = ["a", "b", "near", "none"]
    overlaps = count_masks(store, names).overlaps
    shared, expected = slow_overlaps(store, names)
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            assert overlaps.shared[i, j] == shared[a, b]
            assert overlaps.expected[i, j] == pytest.approx(expected[a, b])
            if expected[a, b]:
                assert overlaps.ratio[i, j] == pytest.approx(shared[a, b] / expected[a, b])
            else:
                assert np.isnan(overlaps.ratio[i, j])
    assert overlaps.masked.tolist() == [shared[name, name] for name in names]
    assert overlaps.ratio[0, 2] > 2


def test_two_controls_of_one_policy_share_what_chance_gives(store):
    """By |A||B|/N they would seem related, since the policy masks some sequences more."""
    for shard in store.shards:
        lengths = np.diff(shard.sequence_offsets[:])
        long = np.repeat(lengths > 20, lengths) & (shard.tokens[:] != UNKNOWN)
        write_array(shard, "policy", "mask", np.flatnonzero(long)[::3].astype(np.uint32), {})
    for name, seed in (("one", "1"), ("two", "2")):
        build_masks.main(["--tokens", store.prefix, "--strategy", "random_matched", "--match",
                          "policy", "--name", name, "--seed", seed, "--overwrite"])
    overlaps = count_masks(store, ["one", "two", "policy"]).overlaps
    for i, j in ((0, 1), (0, 2), (1, 2)):
        off = abs(overlaps.shared[i, j] - overlaps.expected[i, j])
        assert off < 4 * overlaps.variance[i, j] ** 0.5
        assert overlaps.ratio[i, j] == pytest.approx(1, abs=0.1)


def by_hand() -> Overlaps:
    """One sequence of 10 candidates, masks {0, 1}, {1, 2, 3, 4} and none."""
    overlaps = Overlaps.empty(3)
    chosen = [np.array([0, 1]), np.array([1, 2, 3, 4]), np.array([], dtype=np.int64)]
    counts = [np.array([len(one)]) for one in chosen]
    overlaps.add(chosen, counts, np.array([10]), 10)
    return overlaps


def test_tables_and_rows_by_hand():
    ratio, share = overlap_tables(by_hand(), ["a", "bb", "none"])
    assert ratio.columns == ("", "a", "bb", "none")
    assert ratio.rows == [["a", "5.00", "1.25", "-"], ["bb", "1.25", "2.50", "-"],
                          ["none", "-", "-", "-"]]
    assert share.rows[0] == ["a", "100.0 %", "50.0 %", "0.0 %"]
    assert share.rows[1] == ["bb", "25.0 %", "100.0 %", "0.0 %"]
    rows = list(csv.DictReader(overlap_rows(by_hand(), ["a", "bb", "none"]).as_csv().splitlines()))
    assert [(row["index"], row["other"]) for row in rows[:3]] == [
        ("a", "a"), ("a", "bb"), ("a", "none")]
    pair = rows[1]
    assert [pair[key] for key in ("masked", "other_masked", "shared", "expected", "share",
                                  "share_by_chance", "ratio")] == [
        "2", "4", "1", "0.80", "0.500000", "0.400000", "1.2500"]
    # Variance 2 * 4 * 8 * 6 / (100 * 9): two standard deviations of 0.653 around 0.8.
    assert [pair["ratio_by_chance_from"], pair["ratio_by_chance_to"]] == ["0.0000", "2.6330"]
    assert rows[-1]["ratio"] == rows[-1]["share"] == ""


def test_many_names_become_numbers_where_they_are_too_wide():
    names = ["a policy with a long name", "another one", "third"]
    for table in overlap_tables(by_hand(), names, width=60):
        assert list(table.columns) == ["", "1", "2", "3"]
        assert [row[0] for row in table.rows] == [f"{i} {name}" for i, name in enumerate(names, 1)]


def test_types_are_listed_by_number_of_masks():
    masked = [np.array([0, 5, 2, 3]), np.array([1, 0, 0, 0]), np.zeros(4, dtype=np.int64)]
    table = types_table(masked, ["the", "a|b", "`c`", "film"], ["x", "y", "z"], 2)
    dot = " \u00b7 "
    assert table.rows == [["x", "80.0 %", f"a|b{dot}film"], ["y", "100.0 %", "the"],
                          ["z", "-", ""]]
    lines = table.as_markdown().splitlines()
    assert lines[2:5] == ["| index | their share | tokens |", "|---|---:|---|",
                          f"| x | 80.0 % | a\\|b{dot}film |"]
    assert "| y | 100.0 % | the |" in lines


def test_a_long_list_of_types_is_wrapped_in_its_column():
    table = types_table([np.arange(40, 0, -1)], [f"token{i}" for i in range(40)], ["x"], 40)
    lines = table.as_text(80).splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) > 6
    assert re.findall(r"token\d+", " ".join(lines)) == [f"token{i}" for i in range(40)]


def test_overlaps_are_printed_and_written(store, tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    main(["--tokens", store.prefix, "--overlaps", "a", "near", "--masking", "random",
          "--types", "3", "--output", str(folder)])
    out = capsys.readouterr().out
    names = {path.name for path in folder.iterdir()}
    assert names >= {"overlaps.csv", "tables.md"} and "counted " in out
    with (folder / "overlaps.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 9 and rows[2]["other"] == "random (drawn)"
    overlaps = count_masks(store, ["a", "near"]).overlaps
    assert int(rows[1]["shared"]) == overlaps.shared[0, 1]
    assert f"{overlaps.ratio[0, 1]:.2f}" in out
    assert "The 3 tokens masked most often" in out
    assert "| near |" in (folder / "tables.md").read_text()
    with pytest.raises(DataError, match=r"--overlaps nope: .*\(known: a, b, "):
        main(["--tokens", store.prefix, "--overlaps", "a", "nope"])


def test_the_picture_is_a_png(store):
    pytest.importorskip("matplotlib")
    overlaps = count_masks(store, ["a", "near", "none"]).overlaps
    png = draw_overlaps(overlaps, ["a", "$x_1$", "none"])
    assert png.startswith(b"\x89PNG") and len(png) > 5000
