"""Measure tokenizing, beside `datasets.map` as `run_mlm.py` uses it.

    python preprocess/benchmark.py --input reviews.txt --tokenizer bert-base-uncased
    python preprocess/benchmark.py --input reviews.txt --tokenizer bert-base-uncased \\
        --repeat_to 5GB

The rows of the table, each in processes of its own, interleaved over several rounds:

- `datasets.map`: `load_dataset("text")`, tokenizing with `batched=True`, then grouping into blocks:
  the baseline, with `--num_workers` processes and an empty cache folder each time.
- `1 worker`, `N workers`: `tokenize_corpus.py`, sentences as sequences.
- `N workers, documents`: the same with `--no-split_sentences`, which is closer to the baseline.

All rows use the same tokenizer, without threads, and read the input from the page cache. Seconds
are those of the complete command, less the start (imports and tokenizer): the median over rounds of
the same command on one line of text. All rows count the tokens of the text; the baseline adds two
per line and drops the remainder of each thousand lines. Peak memory is that of the largest process.

`--repeat_to` makes a file of that size by repetition, tokenizes it once, reports the memory, and
always removes the file. Repeated text is tokenized faster than other text, since no word is new.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preprocess.corpus import check_file, resolve_path, source_kind
from preprocess.errors import ConfigError, DataError, run_command
from preprocess.files import file_sha256, read_json
from preprocess.flags import USUAL, Parser
from preprocess.machine import environment
from preprocess.view.tables import Table

BASELINE = "datasets.map"
MIB = 1 << 20
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
BLOCK_SIZE = 1024  # `run_mlm.py` takes the tokenizer's longest, up to this
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Run:
    """One command: seconds from start to end, peak of its largest process, bytes it left.

    The peak of a process includes its parent's memory at the fork, so this program stays small.
    """

    seconds: float
    peak_bytes: int
    disk_bytes: int


@dataclass
class Method:
    """A row of the table: one way to tokenize.

    Attributes:
        num_workers: processes.
        flags: of `tokenize_corpus.py`, beside input, tokenizer and output; None: the baseline.
        starts: seconds of the command on one line of text, in each round.
        runs: on the input, in each round.
    """

    num_workers: int
    flags: list[str] | None
    starts: list[float] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)

    def seconds(self) -> list[float]:
        """Return the seconds of each round without the start; 0 or less: the input is too small."""
        return [run.seconds - statistics.median(self.starts) for run in self.runs]


def make_rows(num_workers: int) -> dict[str, Method]:
    """Return the rows of the table, the baseline first."""
    return {
        BASELINE: Method(num_workers, None), "1 worker": Method(1, []),
        f"{num_workers} workers": Method(num_workers, []),
        f"{num_workers} workers, documents": Method(num_workers, ["--no-split_sentences"]),
    }


# ------------------------------------------------------------------------------------ the baseline


def run_mlm_way(file: str, tokenizer_path: str, cache: str, num_proc: int) -> None:
    """Tokenize lines of text and group them into blocks, as `run_mlm.py` does."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    size = min(tokenizer.model_max_length, BLOCK_SIZE)

    def tokenize(rows: dict[str, list[str]]) -> Any:
        return tokenizer(rows["text"], return_special_tokens_mask=True)

    def group(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        flat = {name: [value for row in column for value in row] for name, column in rows.items()}
        total = len(flat["input_ids"]) // size * size
        return {
            name: [values[start : start + size] for start in range(0, total, size)]
            for name, values in flat.items()
        }

    lines = datasets.load_dataset("text", data_files={"train": file}, cache_dir=cache)
    ids = lines.map(tokenize, batched=True, num_proc=num_proc, remove_columns=["text"])
    ids.map(group, batched=True, num_proc=num_proc)


# ------------------------------------------------------------------------------------ measuring


def run(command: list[str], output: Path) -> Run:
    """Run a command that writes into the new folder `output`."""
    output.mkdir()
    environment = {
        **os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_CACHE": str(output / "hf"),
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryFile() as said:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=said, cwd=HERE.parent,
            start_new_session=True,
        )
        try:
            # The largest of the process and those that it has waited for.
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        seconds = time.perf_counter() - started
        if process.returncode:
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().split("\n")
            last = lines[-1] or "no message"
            raise DataError(f"{' '.join(command[:3])} ... ended with {process.returncode}: {last}")
    # The tokenizer's folder is of fixed size.
    disk = sum(path.stat().st_size for path in output.rglob("*")
               if path.is_file() and path.parent.name != "s.tokenizer")
    return Run(seconds, usage.ru_maxrss * 1024, disk)


def turn(row: Method, file: Path, tokenizer: Path, scratch: Path) -> tuple[Run, dict[str, Any]]:
    """Run a row once; return the measurement, and the `P.json` it made, if any."""
    with tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as folder:
        output = Path(folder) / "output"
        if row.flags is None:
            call = (str(file), str(tokenizer), str(output / "hf"), row.num_workers)
            program = f"from preprocess.benchmark import run_mlm_way; run_mlm_way(*{call!r})"
            return run([sys.executable, "-c", program], output), {}
        made = run([
            sys.executable, str(HERE / "tokenize_corpus.py"), "--input", str(file), "--tokenizer",
            str(tokenizer), "--output", str(output / "s"), "--num_workers", str(row.num_workers),
            *row.flags,
        ], output)
        return made, read_json(output / "s.json")


def compare(args: argparse.Namespace, file: Path, tokenizer: Path, scratch: Path) -> dict[str, Any]:
    """Run the rows interleaved, and print their table."""
    rows = make_rows(args.num_workers)
    line = scratch / "line.txt"
    line.write_text("A line of text.\n")
    file_sha256(file)  # into the page cache
    # Of the rows with one and several workers, whose bytes must be the same.
    stores: set[tuple[str, int]] = set()
    names = list(rows)
    for number in range(args.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = turn(rows[name], line, tokenizer, scratch)[0].seconds
            made, info = turn(rows[name], file, tokenizer, scratch)
            rows[name].starts.append(start)
            rows[name].runs.append(made)
            print(
                f"round {number + 1}, {name}: {made.seconds:.1f} s, with {start:.1f} s of start",
                flush=True,
            )
            if rows[name].flags == []:
                stores.add((info["fingerprint"], info["counts"]["tokens"]))
    ((_, num_tokens),) = stores
    if any(min(row.seconds()) <= 0 for row in rows.values()):
        raise DataError(f"{file}: too small, a command takes longer to start than to read it")
    found = summarize(rows, num_tokens)
    print(f"\n{format_table(found, num_tokens)}", flush=True)
    return {"tokens": num_tokens, "rounds": args.rounds, "rows": found}


def summarize(rows: dict[str, Method], num_tokens: int) -> list[dict[str, Any]]:
    """Return the numbers of each row; ratios are medians over rounds of runs of one round."""
    base, one = rows[BASELINE].seconds(), rows["1 worker"].seconds()

    def ratio(others: list[float], seconds: list[float]) -> float:
        return statistics.median(b / s for b, s in zip(others, seconds, strict=True))

    return [
        {
            "row": name, "seconds": (seconds := row.seconds()), "start_seconds": row.starts,
            "whole_seconds": [made.seconds for made in row.runs],
            "tokens_per_second": num_tokens / statistics.median(seconds),
            "over_baseline": ratio(base, seconds), "over_one_worker": ratio(one, seconds),
            "peak_bytes": max(made.peak_bytes for made in row.runs),
            "bytes_per_token": row.runs[0].disk_bytes / num_tokens,
        }
        for name, row in rows.items()
    ]


def format_table(rows: list[dict[str, Any]], num_tokens: int) -> str:
    """Return the table as text."""
    cells = [{
        "": row["row"],
        "seconds": f"{statistics.median(row['seconds']):.1f} "
                   f"({min(row['seconds']):.1f}-{max(row['seconds']):.1f})",
        "tokens/s": f"{row['tokens_per_second']:,.0f}", "x map": f"{row['over_baseline']:.2f}",
        "x 1": f"{row['over_one_worker']:.2f}", "peak MiB": f"{row['peak_bytes'] / MIB:,.0f}",
        "bytes/token": f"{row['bytes_per_token']:.2f}",
    } for row in rows]
    note = "seconds: without the start, in brackets the fastest and the slowest round"
    return Table.of(f"{num_tokens:,} tokens", cells, note).as_text()


def repeat(source: Path, target: Path, num_bytes: int) -> None:
    """Write copies of `source` until the file has at least `num_bytes`."""
    with open(source, "rb") as stream, open(target, "wb") as sink:
        stream.seek(max(0, source.stat().st_size - 1))
        ending = b"" if stream.read() == b"\n" else b"\n"
        while sink.tell() < num_bytes:
            stream.seek(0)
            shutil.copyfileobj(stream, sink)
            sink.write(ending)


def measure_large(
    args: argparse.Namespace, file: Path, tokenizer: Path, scratch: Path
) -> dict[str, Any]:
    """Tokenize a file made by repetition, and print its memory."""
    free, wanted = shutil.disk_usage(scratch).free, 2 * args.repeat_to
    if free < wanted:
        raise DataError(
            f"{scratch}: {free:,} bytes are free, {wanted:,} are needed; give a smaller "
            f"--repeat_to or another --scratch"
        )
    large = scratch / "large.txt"
    repeat(file, large, args.repeat_to)
    num_bytes = large.stat().st_size
    print(f"\n{num_bytes:,} bytes made by repetition", flush=True)
    made, info = turn(Method(args.num_workers, []), large, tokenizer, scratch)
    counts = info["counts"]
    rate = counts["tokens"] / made.seconds
    print(
        f"{args.num_workers} workers: {counts['tokens']:,} tokens, {counts['sequences']:,} "
        f"sequences, {made.seconds:.0f} s with the start, {rate:,.0f} tokens/s; the largest "
        f"process took {made.peak_bytes / MIB:,.0f} MiB", flush=True,
    )
    return {
        "bytes": num_bytes, **counts, "seconds": made.seconds, "tokens_per_second": rate,
        "peak_bytes": made.peak_bytes, "bytes_per_token": made.disk_bytes / counts["tokens"],
    }


# ------------------------------------------------------------------------------------ the command


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument_group(USUAL).add_argument
    add("--input", required=True, metavar="F", help="plain text file, one document per line")
    add("--tokenizer", required=True, metavar="T", help="folder, hub name or pypi:... folder")
    add("--num_workers", type=int, default=2, help="processes")
    add("--rounds", type=int, default=3,
        help="rounds, over which all rows are interleaved; 0: none")
    add("--repeat_to", metavar="SIZE", help="also tokenize a file of this size, such as 5GB")
    add("--scratch", metavar="DIR", help="folder for temporary files (default: /tmp)")
    args = parser.parse_args(argv, num_workers=2, rounds=0)
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?B|)", args.repeat_to or "0")
    if not size or args.repeat_to is None and not args.rounds:
        raise ConfigError(f"--repeat_to {args.repeat_to}: write a size such as 300MB or 5GB")
    args.repeat_to = int(float(size[1]) * UNITS["" if size[2] == "B" else size[2]])
    if source_kind(args.input) != "text":
        raise ConfigError(f"--input {args.input}: give a .txt file, which the baseline reads too")
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    args = parse(argv)
    file, tokenizer = resolve_path(args.input).resolve(), resolve_path(args.tokenizer)
    check_file(file)
    tokenizer = tokenizer.resolve() if tokenizer.exists() else tokenizer
    # Interrupt, so that temporary files are removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    result: dict[str, Any] = {
        "benchmark": "tokenize_corpus", "command": " ".join(sys.argv),
        **environment(("tokenizers", "transformers", "datasets", "numpy")),
    }
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        if args.rounds:
            result["compared"] = compare(args, file, tokenizer, Path(scratch))
        if args.repeat_to:
            result["large"] = measure_large(args, file, tokenizer, Path(scratch))
    print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
