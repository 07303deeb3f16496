"""Measure mask building, the loader, and their growth with the corpus.

    python train/benchmark_data.py --output_dir runs/benchmark_data
    python train/benchmark_data.py --num_tokens 1000000000 --output_dir runs/benchmark_data

Works on stores of random ids in a temporary folder: sentences of 22 tokens on average, documents of
8 sentences, ids as frequent as words. The first tables measure one store of `--speed_tokens`:
building a mask index is the work of `build_masks.py` (choose, hash, write, count), and a round of
the loader is `--steps` steps of `PackedData.step` in one thread. With `--num_tokens` a third table
measures stores of a thousandth, a tenth and all of that many tokens, each in its own process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from preprocess import store as stores
from preprocess.errors import ConfigError, run_command
from preprocess.files import atomic_write_json
from preprocess.flags import USUAL, Parser
from preprocess.masking import MATCHED, STRATEGIES, choose_positions
from preprocess.progress import show
from preprocess.store import StoreWriter, TokenStore, array_path, open_array, write_array
from preprocess.view.statistics import count_masks
from preprocess.view.tables import Table
from train import data
from train.bench.maskings import strategy_inputs
from train.bench.throughput import peak_gib, reset_peak, spread, status_gib
from train.data import permute, row_tables
from train.run_dir.folder import environment

BLOCK = 1 << 20  # tokens made at once
VOCAB_SIZE = 30_000
SENTENCE, DOCUMENT = 22, 8  # mean tokens of a sentence; sentences of a document
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
RATE, SEED = 0.15, 42
EVAL_FRACTION = 0.01
ORDER_ROWS = 100_000_000
SCALE_LENGTH = 128
STEP_SLOTS = 1 << 15  # of a micro batch: 256 rows of 128


# ------------------------------------------------------------------------------------ a store


def make_tokenizer() -> Any:
    """Return a WordPiece tokenizer of `VOCAB_SIZE` ids; every fifth continues a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f"##x{i}" if i % 5 == 0 else f"w{i}" for i in range(VOCAB_SIZE - len(SPECIAL))]
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = {f"{token[1:-1].lower()}_token": token for token in SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def make_store(prefix: str, num_tokens: int) -> None:
    """Write a store of random ids, and a mask index of every seventh token."""
    generator = np.random.default_rng(SEED)
    with StoreWriter(prefix, make_tokenizer(), {"made_by": "benchmark_data"}) as writer:
        for start in range(0, num_tokens, BLOCK):
            size = min(BLOCK, num_tokens - start)
            # Log-uniform ranks: the share of the id at rank r is about 1 / r, as of words.
            ranks = np.exp(generator.random(size, dtype=np.float32) * np.log(VOCAB_SIZE - 5))
            cuts = np.flatnonzero(generator.random(size, dtype=np.float32) < 1 / SENTENCE)
            lengths = np.diff(np.concatenate([[0], cuts[cuts > 0], [size]]))
            documents = np.full(-(-len(lengths) // DOCUMENT), DOCUMENT)
            documents[-1] = len(lengths) - DOCUMENT * (len(documents) - 1)
            writer.add_flat((ranks + len(SPECIAL) - 1).astype(np.uint16), lengths, documents)
    (shard,) = TokenStore.open(prefix).shards
    blocks = (np.arange(start, min(start + 7 * BLOCK, num_tokens), 7, dtype=np.uint32)
              for start in range(0, num_tokens, 7 * BLOCK))
    write_array(shard, "seventh", "mask", blocks, {"options": {}})


def add_scores(store: TokenStore) -> None:
    """Write random scores beside a store; 7 % are above 0."""
    generator = np.random.default_rng(SEED)
    (shard,) = store.shards
    sizes = (min(BLOCK, shard.num_tokens - start) for start in range(0, shard.num_tokens, BLOCK))
    blocks = ((generator.standard_normal(size, np.float32) * 2 - 3).astype(np.float16)
              for size in sizes)
    write_array(shard, "scores", "scores", blocks, {})


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of a call, and its result."""
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def rates(counts: list[tuple[int, float]]) -> dict[str, Any]:
    """Return millions per second over rounds of (count, seconds): median, p20 and p80."""
    found = spread([count / seconds / 1e6 for count, seconds in counts])
    return {name.replace("median", "million_tokens_per_second"): f"{value:.2f}"
            for name, value in found.items()}


# -------------------------------------------------------------------------------------- speed


def build_index(store: TokenStore, strategy: str) -> None:
    """Do the work of `build_masks.py` on a store of one shard, without its output."""
    (shard,) = store.shards
    scores = [open_array(shard, "scores", "scores")[0]]
    matches = "match" in STRATEGIES[strategy].needs
    match = [open_array(shard, MATCHED, "mask")[0]] if matches else []
    (inputs,) = strategy_inputs(store, strategy, scores, match, MATCHED)
    positions = choose_positions(
        shard, strategy, inputs, rate=RATE, seed=SEED, all_special_ids=store.all_special_ids
    )
    write_array(shard, strategy, "mask", positions, {"options": {"strategy": strategy}})
    count_masks(store, [strategy, *([MATCHED] if matches else [])])


def measure_masks(store: TokenStore, rounds: int) -> list[dict[str, Any]]:
    """Measure tokens per second of each strategy, interleaved."""
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in STRATEGIES}
    build_index(store, MATCHED)  # whose counts a control takes
    for name in rounds * list(STRATEGIES):
        seconds, _ = timed(partial(build_index, store, name))
        found[name].append((store.num_tokens, seconds))
    (shard,) = store.shards
    return [
        {"strategy": name, **rates(counts),
         "file_MB": f"{array_path(shard, name, 'mask').stat().st_size / 1e6:.1f}"}
        for name, counts in found.items()
    ]


def load(loader: data.PackedData, numbers: range) -> int:
    """Make the batches of some steps; return their number of tokens."""
    return sum(loader.step(number).step_tokens for number in numbers)


def measure_loader(store: TokenStore, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Measure tokens per second of one rank of 1 and of 64, interleaved."""
    found = []
    maskings = [data.prebuilt_masking(store, MATCHED)]
    maskings += [data.drawn_masking(store, name, RATE)
                 for name, strategy in STRATEGIES.items() if strategy.drawn]
    for length in (128, 512):
        table, _ = row_tables(store, length, EVAL_FRACTION)
        loaders = {
            (masking.name, ranks): data.PackedData(
                store, table, masking, seed=SEED, micro_batch_size=STEP_SLOTS // length,
                world_size=ranks, rank=ranks - 1,
            )
            for masking in maskings for ranks in (1, 64)
        }
        counts: dict[Any, list[tuple[int, float]]] = {key: [] for key in loaders}
        for turn in range(rounds + 1):
            for key, loader in loaders.items():
                numbers = range(turn * steps, (turn + 1) * steps)
                seconds, tokens = timed(partial(load, loader, numbers))
                if turn:  # the first turn is the warm-up
                    counts[key].append((tokens, seconds))
        found += [
            {"S": length, "masking": name, "ranks": ranks, **rates(counts[name, ranks]),
             "filled_percent": f"{100 * table.efficiency:.1f}"}
            for name, ranks in loaders
        ]
    return found


# -------------------------------------------------------------------------------------- scale


def resident_mib() -> dict[str, float]:
    """Return the memory of this process, MiB: its own, and mapped files (reclaimable)."""
    return {name: 1024 * status_gib(key)
            for name, key in (("own", "RssAnon"), ("mapped", "RssFile"))}


def own_peak_mib(action: Callable[[], Any]) -> tuple[float, Any]:
    """Return the peak of anonymous memory that a call adds, MiB, sampled at 10 Hz, and its result.

    The kernel's own peak counts mapped files as well.
    """
    levels = [resident_mib()["own"]]
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(action)
        while not future.done():
            wait([future], timeout=0.1)
            levels.append(resident_mib()["own"])
    return max(levels) - levels[0], future.result()


def open_store(prefix: str) -> tuple[TokenStore, data.Masking]:
    """Open the store and its mask index."""
    store = TokenStore.open(prefix)
    return store, data.prebuilt_masking(store, "seventh")


def open_loader(store: TokenStore, masking: data.Masking) -> data.PackedData:
    """Open the row table and the loader."""
    table, _ = row_tables(store, SCALE_LENGTH, EVAL_FRACTION)
    return data.PackedData(
        store, table, masking, seed=SEED, micro_batch_size=STEP_SLOTS // SCALE_LENGTH)


def measure_first(prefix: str, num_tokens: int) -> dict[str, Any]:
    """Measure the work of the first run on a store; in its own process."""
    make_store(prefix, num_tokens)
    # What was written just now is hashed again each time; of older files this is remembered.
    stores.SETTLED_NS = 0
    first_open, (store, masking) = timed(partial(open_store, prefix))
    seconds, (peak, (table, _)) = timed(
        lambda: own_peak_mib(lambda: row_tables(store, SCALE_LENGTH, EVAL_FRACTION)))
    first_loader, _ = timed(partial(open_loader, store, masking))
    return {"tokens": f"{num_tokens:,}", "rows": f"{table.num_rows:,}", "first_open_s": first_open,
            "row_table_s": seconds, "row_table_MiB": peak, "first_loader_s": first_loader}


def measure_later(prefix: str, steps: int) -> dict[str, Any]:
    """Measure the work and memory of every later process; in its own process."""
    before = resident_mib()
    opening, (store, masking) = timed(partial(open_store, prefix))
    making, loader = timed(partial(open_loader, store, masking))
    seconds, tokens = timed(partial(load, loader, range(steps)))
    return {"open_s": opening, "loader_s": making, "Mtokens_per_s": tokens / seconds / 1e6,
            **{f"{name}_MiB": value - before[name] for name, value in resident_mib().items()}}


def measure_order(num_rows: int) -> dict[str, Any]:
    """Measure the order of an epoch, computed block by block: seconds and peak memory."""
    reset_peak()
    before, start = peak_gib(), time.perf_counter()
    for first in range(0, num_rows, BLOCK):
        permute(np.arange(first, min(first + BLOCK, num_rows)), num_rows, SEED, 0, "store")
    return {"rows": f"{num_rows:,}", "seconds": f"{time.perf_counter() - start:.1f}",
            "peak_MiB": f"{1024 * (peak_gib() - before):.0f}"}


# ------------------------------------------------------------------------------------ command


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument_group(USUAL).add_argument
    add("--output_dir", required=True, metavar="DIR", help="folder for benchmark_data.json")
    numbers = (
        ("speed_tokens", 20_000_000, "tokens of the store for the speed tables; 0: none"),
        ("num_tokens", 0, "tokens of the largest store of the growth table; 0: none"),
        ("order_rows", ORDER_ROWS, "rows of the epoch whose order is computed; 0: none"),
        ("rounds", 5, "counted rounds of each row"),
        ("steps", 20, "steps of the loader per round; ten times as many in the growth table"),
    )
    for name, default, text in numbers:
        add(f"--{name}", type=int, default=default, help=text)
    args = parser.parse_args(
        argv, speed_tokens=0, num_tokens=0, order_rows=0, rounds=1, steps=1)
    for name in ("speed_tokens", "num_tokens"):
        if 0 < getattr(args, name) < 100_000 or getattr(args, name) > stores.MAX_SHARD_TOKENS:
            raise ConfigError(f"--{name} {getattr(args, name)}: 0, or from 100,000 to 2^32 - 1")
    return args


def in_process(task: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Return the result of a call in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(task, *arguments).result()


def report(title: str, caption: str, rows: list[dict[str, Any]]) -> None:
    """Print one table."""
    show("\n" + Table.of(title, rows, caption).as_text())


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure every requested table, and print each at once."""
    result: dict[str, Any] = {}
    if args.speed_tokens:
        prefix = str(folder / "speed")
        make_store(prefix, args.speed_tokens)
        store = TokenStore.open(prefix)
        add_scores(store)
        result["masks"] = measure_masks(store, args.rounds)
        report("Building masks", f"{store.num_tokens:,} tokens, {args.rounds} rounds, one process: "
               "choosing, hashing, writing and counting.", result["masks"])
        result["loader"] = measure_loader(store, args.rounds, args.steps)
        report("The loader", f"One thread; {args.rounds} rounds of {args.steps} steps of "
               f"{STEP_SLOTS:,} slots per rank; tokens of this rank, [CLS] and [SEP] included.",
               result["loader"])
    if args.order_rows:
        result["order"] = [in_process(measure_order, args.order_rows)]
        report("The order of one epoch", "Computed in blocks; a run computes its own rows only.",
               result["order"])
    if args.num_tokens:
        result["scale"] = []
        for size in (args.num_tokens // 1000, args.num_tokens // 10, args.num_tokens):
            with tempfile.TemporaryDirectory(dir=folder) as part:
                row = in_process(measure_first, f"{part}/s", size)
                row |= in_process(measure_later, f"{part}/s", 10 * args.steps)
                result["scale"].append({
                    key: value if isinstance(value, str) else f"{value:.3g}"
                    for key, value in row.items()
                })
        report("Growth with the corpus", "first_open: of store and mask index, hashed; "
               "row_table: built, and its peak of memory; first_loader: row table and loader. "
               "Then, in another process: opening both again, and the memory that this and "
               f"{10 * args.steps} steps add: its own, and files, which the kernel takes back.",
               result["scale"])
    return result


def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse_arguments(argv)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    # A request to stop interrupts, so that the stores are removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(dir=output, prefix=".stores-") as folder:
        result = {"benchmark": "data", **environment(), "options": vars(args),
                  **measure(args, Path(folder))}
    file = output / "benchmark_data.json"
    atomic_write_json(file, result)
    show(json.dumps({"benchmark": "data", "file": str(file)}))


if __name__ == "__main__":
    run_command(main)
