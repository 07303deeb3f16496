"""The benchmark of tokenizing: fair to its baseline, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from preprocess import benchmark
from preprocess.benchmark import Method, Run, format_table, make_rows, repeat, run, summarize
from preprocess.errors import ConfigError, DataError
from tests.support.launch import ROOT


def test_the_baseline_groups_all_tokens_into_blocks(
    tmp_path, reviews_file, tiny_encoder, monkeypatch
):
    """In this process, so that what it makes can be read."""
    import datasets
    from transformers import AutoTokenizer

    monkeypatch.setattr(benchmark, "BLOCK_SIZE", 16)
    made = []
    real = datasets.DatasetDict.map

    def keep(self, *arguments, **options):
        assert options["batched"] and options["num_proc"] == 2
        made.append(real(self, *arguments, **{**options, "num_proc": None}))
        return made[-1]

    monkeypatch.setattr(datasets.DatasetDict, "map", keep)
    benchmark.run_mlm_way(reviews_file, tiny_encoder, str(tmp_path / "hf"), 2)
    datasets.enable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    ids = [i for line in open(reviews_file) for i in tokenizer(line.rstrip("\n"))["input_ids"]]
    grouped = [i for row in made[-1]["train"]["input_ids"] for i in row]
    assert len(ids) - len(grouped) < 16 and grouped == ids[: len(grouped)]
    assert {len(row) for row in made[-1]["train"]["input_ids"]} == {16}
    assert "text" not in made[0]["train"].column_names


def test_the_largest_process_counts(tmp_path):
    """Seen from a small process: a child counts what its parent had when it was forked."""
    large = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'bytearray(200 << 20)'])"
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from preprocess.benchmark import run\n"
        f"print(run([sys.executable, '-c', {large!r}], Path(sys.argv[1])).peak_bytes)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "output")], cwd=ROOT, check=True,
        capture_output=True, text=True,
    )
    assert 200 << 20 < int(done.stdout) < 260 << 20


def test_what_a_command_leaves_and_says(tmp_path):
    program = "import sys; open(sys.argv[1] + '/x', 'wb').write(bytes(1000))"
    output = tmp_path / "output"
    assert run([sys.executable, "-c", program, str(output)], output).disk_bytes == 1000
    with pytest.raises(DataError, match="ended with 7: sorry"):
        failing = "import sys; print('sorry', file=sys.stderr); sys.exit(7)"
        run([sys.executable, "-c", failing], tmp_path / "again")


def test_numbers_of_the_table():
    rows = make_rows(2)
    for name, seconds in zip(rows, ([11, 13], [6, 7], [3, 4], [3, 3]), strict=True):
        rows[name].starts = [1.0, 1.0]
        rows[name].runs = [Run(float(s), 5 << 20, 250) for s in seconds]
    found = {row["row"]: row for row in summarize(rows, 100)}
    assert found["2 workers"]["over_baseline"] == pytest.approx((10 / 2 + 12 / 3) / 2)
    assert found["2 workers"]["over_one_worker"] == pytest.approx((5 / 2 + 6 / 3) / 2)
    assert found["datasets.map"]["tokens_per_second"] == pytest.approx(100 / 11)
    assert found["1 worker"]["bytes_per_token"] == 2.5
    table = format_table(list(found.values()), 100).splitlines()
    (line,) = (line for line in table if line.startswith("  2 workers "))
    assert line.split()[2:] == ["2.5", "(2.0-3.0)", "40", "4.50", "2.25", "5", "2.50"]


@pytest.mark.parametrize("text", ["one\ntwo", "one\ntwo\n"])
def test_repetition_keeps_lines_whole(tmp_path, text):
    (tmp_path / "a").write_text(text)
    repeat(tmp_path / "a", tmp_path / "b", 30)
    assert (tmp_path / "b").read_text() == "one\ntwo\n" * 4


@pytest.mark.parametrize(
    ("flags", "error", "match"),
    [
        (["--repeat_to", "much"], ConfigError, "repeat_to much: write a size such as 300MB"),
        (["--num_workers", "1"], ConfigError, "num_workers 1"),
        (["--rounds", "0"], ConfigError, "repeat_to"),
        (["--input", "a.csv"], ConfigError, "give a .txt file"),
        (["--input", "absent.txt"], DataError, "absent.txt: no such file"),
        (["--rounds", "0", "--repeat_to", "900000GB"], DataError, "are free.*--scratch"),
    ],
)
def test_wrong_options(tmp_path, reviews_file, tiny_encoder, monkeypatch, flags, error, match):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(error, match=match):
        benchmark.main([
            "--input", reviews_file, "--tokenizer", tiny_encoder, "--scratch", str(tmp_path), *flags
        ])
    assert not list(tmp_path.iterdir())


def test_an_interrupt_removes_the_large_file(tmp_path, reviews_file, tiny_encoder):
    process = subprocess.Popen(
        [sys.executable, "preprocess/benchmark.py", "--input", reviews_file, "--tokenizer",
         tiny_encoder, "--rounds", "0", "--repeat_to", "30MB", "--scratch", str(tmp_path)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/*/output")) and time.monotonic() < deadline:
        assert process.poll() is None
        os.sched_yield()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_whole_benchmark(tmp_path, reviews_file, tiny_encoder, monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(Method, "seconds", lambda row: [made.seconds for made in row.runs])
    benchmark.main([
        "--input", reviews_file, "--tokenizer", tiny_encoder, "--rounds", "1", "--repeat_to",
        "1MB", "--scratch", str(tmp_path),
    ])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = ["datasets.map", "1 worker", "2 workers", "2 workers, documents"]
    assert [row["row"] for row in result["compared"]["rows"]] == names
    assert all(row["peak_bytes"] > 50 << 20 for row in result["compared"]["rows"])
    assert result["large"]["bytes"] >= 10**6 and result["large"]["tokens"] > 10**5
    assert not list(tmp_path.iterdir())
