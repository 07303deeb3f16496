"""One command for a machine with a GPU that nobody has set up: `make gpu-check WHEELS=FOLDER`.

Without network, and within seven minutes: installs from a folder of wheels, runs the GPU tests,
the benchmarks of the head and of the loop, fine-tuning and scoring, on text that it makes up. Each
part is a process group of its own with its own limit of time, and is killed with all its children
at the limit. A part that fails or takes too long is a row of the table that says so; the others run
all the same. `gpu_check.json` and `gpu_check.txt` are written anew after each part, so an
interrupted check leaves what it has found. `--tiny` runs every part in a small size, on a CPU too.

Only the standard library is imported before the wheels are installed.
"""

from __future__ import annotations

import argparse
import configparser
import json
import os
import platform
import re
import shutil
import signal
import site
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TOTAL_SECONDS = 410  # of the seven minutes, for all parts; what is over belongs to the first kills
GRACE_SECONDS = 3.0  # between SIGTERM and SIGKILL
TESTING = ("pytest", "hypothesis")
RIVALS = ("liger-kernel", "cut-cross-entropy", "quack-kernels")  # heads to compare with, if there
# Of a launcher around us, which the parts must not take for theirs.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SEED = 42
SCORES = "random_scores"


@dataclass(frozen=True)
class Size:
    """How large the parts are.

    Attributes:
        vocab: ids of the tokenizer. tokens: of the corpus. sentences: of the labelled task.
        model: name of `--model_config`. lengths: rows of the loop, each with its rows per micro
            batch and per step. steps: warm-up, counted and rounds of a row of the table.
        head: flags of `csrc/benchmark.py`.
    """

    vocab: int
    tokens: int
    sentences: int
    model: str
    lengths: dict[int, tuple[int, int]]
    steps: tuple[int, int, int]
    head: tuple[str, ...]


FULL = Size(30522, 3_000_000, 8000, "bert-base", {128: (256, 2048), 512: (64, 512)}, (2, 2, 2),
            ("--cases", "gpu-128-15", "--dtype", "fp16"))
TINY = Size(400, 20_000, 64, "bert-tiny", {128: (2, 4), 512: (1, 1)}, (1, 1, 1),
            ("--rows", "2", "--slots", "32", "--hidden", "32", "--vocab", "97", "--rounds", "1",
             "--calls", "1", "--warmup", "1"))


@dataclass(frozen=True)
class Part:
    """One row of the table.

    Attributes:
        command: words. seconds: its limit.
        read: returns the figures of a part that has ended well, from its output.
    """

    name: str
    command: list[str]
    seconds: float
    read: Callable[[str], dict[str, Any]] = lambda output: {}


# ----------------------------------------------------------------------------------------- parts


def plan(options: argparse.Namespace) -> list[Part]:
    """Return the parts, in their order.

    Their limits add up to more than `TOTAL_SECONDS`; the time that is left bounds each, so slow
    parts are paid by the last ones.
    """
    out, size = Path(options.output_dir).resolve(), TINY if options.tiny else FULL
    venv = out / "venv"
    python = str(venv / "bin" / "python") if options.wheels else sys.executable
    data = out / "data"
    mine = [python, str(Path(__file__).resolve())]
    parts = []
    if options.wheels:
        parts.append(Part("install", [sys.executable, str(Path(__file__).resolve()), "--install",
                                      str(venv), "--wheels", options.wheels], 60))

    def loop(length: int) -> Part:
        micro, rows = size.lengths[length]
        return Part(f"loop {length}", [
            python, "train/benchmark.py", "--tokens", str(data / "text"), "--model_config",
            size.model, "--scores", SCORES, "--strategies", "random", "whole_word", "selective",
            "random_matched", "--baselines", "transformers-grouped", "gather-grouped",
            "--no_equal_masks", "--max_seq_lengths", str(length), "--per_device_train_batch_size",
            str(micro), "--train_batch_size", str(rows), "--warmup_steps", str(size.steps[0]),
            "--timed_steps", str(size.steps[1]), "--rounds", str(size.steps[2]), "--output_dir",
            str(out / f"loop-{length}")], 95, lambda _: read_loop(out / f"loop-{length}"))

    return [
        *parts,
        Part("data", [*mine, "--make_data", str(data), *["--tiny"] * options.tiny], 40, last_json),
        Part("GPU tests", [python, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider",
                           *["tests/robustness/test_gpu.py"] * options.tiny], 110, read_tests),
        loop(128),
        Part("head", [python, "csrc/benchmark.py", *size.head], 45, read_head),
        loop(512),
        Part("scoring", [
            python, "train/score_tokens.py", "--tokens", str(data / "text"), "--name", "again",
            "--model_name_or_path", str(data / "scorer"), "--max_seq_length", "128"],
            35, read_scoring),
        Part("fine-tuning", [
            python, "train/finetune.py", "--task", "custom", "--train_file",
            str(data / "train.csv"), "--test_file", str(data / "test.csv"), "--model_name_or_path",
            str(data / "encoder"), "--seeds", "13", "--num_train_epochs", "1",
            "--train_batch_size", "32", "--per_device_train_batch_size", "32", "--max_seq_length",
            "64", "--output_dir", str(out / "finetune")], 40,
            lambda output: read_finetuning(out / "finetune")),
    ]


def last_json(output: str) -> dict[str, Any]:
    """Return the last line of an output, which is JSON."""
    return json.loads(output.strip().splitlines()[-1])


def read_loop(folder: Path) -> dict[str, Any]:
    """Return tokens/s, MFU, speed over transformers and the step of every row."""
    (length,) = json.loads((folder / "benchmark.json").read_text())["lengths"]
    return {row["name"]: {
        "tokens/s": round(row["tokens_per_second"]), "MFU %": round(row["mfu_percent"], 1),
        "x grouped": round(row["over_grouped"]["median"], 2), "ms": round(
            row["step_ms"]["median"], 1)} for row in length["rows"]}


def read_head(output: str) -> dict[str, Any]:
    """Return the median of every implementation."""
    (case,) = last_json(output)["cases"]
    return {row["implementation"]: {"ms": round(row["ms"]["median"], 3)} for row in case["rows"]}


def read_scoring(output: str) -> dict[str, Any]:
    """Return the tokens/s that the command reports."""
    found = re.findall(r"scored [\d,]+ tokens in [\d.]+ s \(([\d,]+) tokens/s", output)
    return {"tokens/s": int(found[-1].replace(",", ""))}


def read_finetuning(run: Path) -> dict[str, Any]:
    """Return steps/s over the whole training, evaluation included, and the accuracy."""
    row = json.loads((run / "results.jsonl").read_text().splitlines()[0])
    return {"steps/s": round(row["steps"] / row["seconds"], 1),
            "accuracy": round(row["test_accuracy"], 3)}


def read_tests(output: str) -> dict[str, Any]:
    """Return pytest's summary, and the line that the tests print for the README."""
    lines = output.strip().splitlines()
    said = [line for line in lines if line.startswith(("All stages in fp16", "ZeRO "))]
    return {"summary": lines[-1].strip("= "), **({"stages": said} if said else {})}


# ------------------------------------------------------------------------------------- running


def run_part(part: Part, log: Path, seconds: float) -> dict[str, Any]:
    """Run one part, kill it at its limit, and return its row."""
    environment = {
        **{name: value for name, value in os.environ.items() if name not in RANK_VARIABLES},
        "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # those of the machine are none of ours
        "PATH": f"{Path(part.command[0]).parent}{os.pathsep}{os.environ['PATH']}",
    }
    started = time.monotonic()
    row: dict[str, Any] = {"part": part.name, "limit": round(seconds)}
    with open(log, "wb") as output:
        try:
            process = subprocess.Popen(part.command, cwd=ROOT, env=environment, stdout=output,
                                       stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                       start_new_session=True)
        except OSError as error:
            return row | {"status": "failed", "seconds": 0.0, "error": str(error)}
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # the children of a part that has ended are none of the next one's business
            end_group(process)
    row["seconds"] = round(time.monotonic() - started, 1)
    text = log.read_text(errors="replace")
    if code is None:
        return row | {"status": "out of time", "error": tail(text)}
    figures: dict[str, Any] = {}
    try:
        figures = part.read(text)
    except Exception as error:  # whatever is missing, the other parts count
        if not code:
            return row | {"status": "no figures", "error": f"{type(error).__name__}: {error}"}
    if code:
        return row | {"status": f"failed ({code})", "error": tail(text), "figures": figures}
    return row | {"status": "ok", "figures": figures}


def end_group(process: subprocess.Popen) -> None:
    """End a process and all its children, however they take it."""
    end = time.monotonic() + GRACE_SECONDS
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        while number == signal.SIGTERM and time.monotonic() < end and _alive(process):
            time.sleep(0.05)
    process.wait()


def _alive(process: subprocess.Popen) -> bool:
    """Return whether anything of a process group still runs."""
    process.poll()  # a leader that has ended would count until it is waited for
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def tail(text: str) -> str:
    """Return the last lines of an output, in one line."""
    return " | ".join(line.strip() for line in text.strip().splitlines()[-4:])[-600:]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text: part, status, seconds, and the figures one below the other."""
    lines = [f"{'part':12}  {'status':12}  {'seconds':>7}  figures"]
    for row in rows:
        figures = [
            f"{name}: " + (", ".join(f"{value:,} {unit}" for unit, value in entry.items())
                           if isinstance(entry, dict) else str(entry))
            for name, entry in row.get("figures", {}).items() if not isinstance(entry, list)
        ] + [line for entry in row.get("figures", {}).values() if isinstance(entry, list)
             for line in entry]
        shown = figures or [row.get("error", "")[-200:]]
        lines.append(f"{row['part']:12}  {row['status']:12}  {row['seconds']:7.1f}  {shown[0]}")
        lines += [f"{'':37}{more}" for more in shown[1:]]
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Return the machine without any package: GPU, driver, Python, commit, time."""
    def first_line(*command: str) -> str | None:
        try:
            done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=20)
            return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None
        except (OSError, subprocess.TimeoutExpired):
            return None

    return {
        "gpu": first_line("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
        "commit": first_line("git", "describe", "--always", "--dirty=+"),
        "python": platform.python_version(), "cpus": os.cpu_count(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def check(options: argparse.Namespace, parts: list[Part]) -> list[dict[str, Any]]:
    """Run all parts; return their rows."""
    out = Path(options.output_dir)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    for name in ("venv", "finetune", "data"):  # a second check begins anew
        shutil.rmtree(out / name, ignore_errors=True)
    found: dict[str, Any] = {"machine": machine(), "tiny": options.tiny, "parts": []}
    end = time.monotonic() + options.seconds
    for part in parts:
        left = end - time.monotonic()
        if left < 1:
            row: dict[str, Any] = {"part": part.name, "status": "no time left", "seconds": 0.0}
        else:
            log = out / "logs" / f"{part.name.replace(' ', '-')}.log"
            row = run_part(part, log, min(part.seconds, left))
        found["parts"].append(row)
        text = table(found["parts"])
        for name, content in (("gpu_check.json", json.dumps(found, indent=1)),
                              ("gpu_check.txt", text)):
            partial = out / f".{name}.tmp"
            partial.write_text(content + "\n")
            partial.replace(out / name)
        print(f"{part.name}: {row['status']}, {row['seconds']} s", flush=True)
    print(f"\n{text}\n\nwrote {out}/gpu_check.json", flush=True)
    return found["parts"]


# ------------------------------------------------------------------------- what the parts call


def install(venv: Path, wheels: str) -> None:
    """Make an environment over the machine's own packages, from wheels alone."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    needed = [*setup["options"]["install_requires"].split("\n"), *TESTING]
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", "--without-pip",
                    str(venv)], check=True)
    (site_packages,) = venv.glob("lib/python*/site-packages")
    # Also where this Python is that of another environment, whose packages venv would not show.
    (site_packages / "machine.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-index",
           "--find-links", wheels, "--disable-pip-version-check"]
    subprocess.run([*pip, *filter(None, needed)], check=True)
    for name in RIVALS:
        if any(Path(wheels).glob(f"{name.replace('-', '_')}-*.whl")):
            subprocess.run([*pip, "--no-deps", name], check=False)


def make_data(folder: Path, size: Size) -> None:
    """Write a token store with random scores, labelled sentences, an encoder and a scorer."""
    import csv

    import numpy as np
    import torch
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordPiece
    from transformers import (
        BertForMaskedLM,
        BertForTokenClassification,
        PreTrainedTokenizerFast,
    )

    from preprocess.machine import environment
    from preprocess.store import StoreWriter, TokenStore, write_array
    from train.model import named_config

    def letters(number: int, length: int) -> str:
        return "".join(chr(97 + number // 26**place % 26) for place in range(length))

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    num_words = (size.vocab - len(special)) * 2 // 3
    words = [letters(number, 4) for number in range(num_words)]
    pieces = [f"##{letters(n, 3)}" for n in range(size.vocab - len(special) - num_words)]
    names = [*special, *words, *pieces]
    backend = Tokenizer(WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]")

    generator = np.random.default_rng(SEED)
    # Words by Zipf's law, every fourth of two pieces; texts of 60 tokens on average, at most 120.
    def draw(count: int) -> np.ndarray:
        ids = len(special) + (generator.zipf(1.2, count) - 1) % num_words
        inside = np.arange(count) > 0
        inside &= generator.random(count) < 0.2
        extra = len(special) + num_words + generator.integers(0, len(pieces), count)
        return np.where(inside, extra, ids).astype(np.int64)

    folder.mkdir(parents=True)
    with StoreWriter(str(folder / "text"), tokenizer, {}) as writer:
        left = size.tokens
        while left > 0:
            length = int(np.clip(generator.lognormal(4.0, 0.5), 8, 120))
            writer.add_document([draw(length)])
            left -= length
    (shard,) = TokenStore.open(str(folder / "text")).shards
    scores = generator.normal(-1, 1, shard.num_tokens).astype(np.float16)
    measure = {"name": "drawn", "boundary": True, "unit": "log-odds", "reads_labels": False}
    write_array(shard, SCORES, "scores", scores, {"measure": measure})

    moods = words[:20]
    for name, count in (("train", size.sentences), ("test", size.sentences // 4)):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "label"])
            for label in np.arange(count) % 2:
                text = [words[i] for i in generator.integers(20, num_words, 25)]
                text[int(generator.integers(25))] = moods[label * 10 + int(generator.integers(10))]
                rows.writerow([" ".join(text), ("bad", "good")[label]])

    torch.manual_seed(SEED)
    config = named_config(size.model, size.vocab, pad_token_id=0)
    BertForMaskedLM(config).save_pretrained(folder / "encoder")
    config.num_labels = 2
    BertForTokenClassification(config).save_pretrained(folder / "scorer")
    for name in ("encoder", "scorer"):
        tokenizer.save_pretrained(folder / name)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    versions = environment(("torch", "triton", "deepspeed", "transformers", *RIVALS))["versions"]
    print(json.dumps({"gpu": gpu, "tokens": shard.num_tokens,
                      "versions": " ".join(f"{k} {v}" for k, v in versions.items())}))


def main(argv: list[str] | None = None) -> int:
    """The command; returns 0 if all parts went well, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--wheels", default="", help="folder of wheels to install from; without it "
                        "the packages of this Python are used")
    parser.add_argument("--output_dir", default="runs/gpu_check", help="folder for everything")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="limit of all parts")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU too")
    parser.add_argument("--install", help=argparse.SUPPRESS)
    parser.add_argument("--make_data", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.wheels:
        options.wheels = str(Path(options.wheels).resolve())
    if options.install:
        install(Path(options.install), options.wheels)
    elif options.make_data:
        make_data(Path(options.make_data), TINY if options.tiny else FULL)
    else:
        return int(any(row["status"] != "ok" for row in check(options, plan(options))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
