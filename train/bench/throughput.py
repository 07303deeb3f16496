"""Measure interleaved training loops: counts per step, where the time goes, and the figures.

A `Row` of the benchmark's table is a loop: its batches and its step. Rows are interleaved over
rounds, and each round starts with another row, so that a drift of the machine's speed favours none.
A turn is one uncounted step (its batch was made during another row's turn), the counted steps, and
one profiled step, which waits for the device after each part and would slow the counted steps.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from preprocess.progress import Progress
from train import engine as ds
from train.model import StepFlops
from train.run_dir import metrics

PARTS = ("forward", "backward", "optimizer")


class Counts(NamedTuple):
    """Counts of one step, over all ranks.

    Attributes:
        tokens: slots without padding; masked: masked tokens; text_tokens: tokens without special
            tokens; slots: with padding; rows: rows that the model sees.
    """

    tokens: int
    masked: int
    text_tokens: int
    slots: int
    rows: int


@dataclass(frozen=True)
class Row:
    """One loop of the table.

    Attributes:
        name: of the row. kind: "strategy", "equal", "bare", "baseline" or "pass".
        batches: one per step, endless; the wait for the next one is the loader's time.
        step: takes an optimizer step; calls its second argument after each of `PARTS`.
        count: returns the counts of a batch.
        head_seconds: returns the time of the MLM head and loss alone, forward and backward.
        standing: name of the model that this row trains; rows may share one.
    """

    name: str
    kind: str
    batches: Iterator[Any]
    step: Callable[[Any, Callable[[str], None]], Any]
    count: Callable[[Any], Counts]
    head_seconds: Callable[[Any], float]
    standing: str


@dataclass
class Measured:
    """Measurements of one row.

    Attributes:
        seconds, waited: seconds per counted step, and of them the wait for the loader.
        counts: of each counted step.
        apart: seconds of `PARTS`, "loader" and "head" of each profiled step.
        peak_gib: largest memory of one rank, without the models of other rows.
    """

    seconds: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    counts: list[Counts] = field(default_factory=list)
    apart: list[dict[str, float]] = field(default_factory=list)
    peak_gib: float = 0.0


def synchronize() -> None:
    """Wait for this rank's GPU, if it has one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Laps:
    """Add up the time between calls, by the name that each call gives."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        synchronize()
        self._last = time.perf_counter()

    def __call__(self, part: str) -> None:
        synchronize()
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now


def no_laps(part: str) -> None:
    """Measure nothing, in counted steps."""


# ------------------------------------------------------------------------------------- memory


def resident_gib() -> float:
    """Return the memory in use, GiB: of the GPU, or of the process without one."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**30
    return status_gib("VmRSS")


def reset_peak() -> bool:
    """Reset `peak_gib`; return False where the kernel of a machine without GPU refuses."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_gib() -> float:
    """Return the peak memory since `reset_peak`, GiB: of the GPU, or of the process."""
    return metrics.peak_memory_gib() if torch.cuda.is_available() else status_gib("VmHWM")


def status_gib(name: str) -> float:
    """Return one of the memory figures in the kernel's status of this process, GiB."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) / 2**20 if found else 0.0


# -------------------------------------------------------------------------------------- turns


def turns(names: list[str], rounds: int) -> Iterator[str]:
    """Yield every name once per round; each round starts with another name."""
    progress = Progress(rounds * len(names), "turn", len(names), label="benchmark")
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            yield name
            progress.update(1, name)
    progress.close()


def warm_up(row: Row, steps: int) -> float:
    """Take uncounted steps; return the growth of memory in GiB."""
    before = resident_gib()
    for _ in range(steps):
        batch = next(row.batches)
        row.step(batch, no_laps)
    grown = max(0.0, resident_gib() - before)
    row.head_seconds(batch)  # a GPU compiles its kernels at the first call
    return grown


def take_turn(row: Row, measured: Measured, timed_steps: int, foreign_gib: float) -> None:
    """Take the steps of one turn.

    Args:
        foreign_gib: memory of other rows' models and optimizer states.
    """
    row.step(next(row.batches), no_laps)
    ds.barrier()
    reset_peak()
    for _ in range(timed_steps):
        start = time.perf_counter()
        batch = next(row.batches)
        waited = time.perf_counter() - start
        row.step(batch, no_laps)
        measured.seconds.append(time.perf_counter() - start)
        measured.waited.append(waited)
        measured.counts.append(row.count(batch))
    measured.peak_gib = max(measured.peak_gib, peak_gib() - foreign_gib)
    laps = Laps()
    batch = next(row.batches)
    laps("loader")
    row.step(batch, laps)
    measured.apart.append({**laps.seconds, "head": row.head_seconds(batch)})


def measure(
    rows: list[Row], rounds: int, timed_steps: int, standing_gib: dict[str, float]
) -> dict[str, Measured]:
    """Measure interleaved rows; collective. Return the result over all ranks.

    Args:
        rows: warmed up.
        standing_gib: memory of each model in training.
    """
    by_name = {row.name: row for row in rows}
    measured = {name: Measured() for name in by_name}
    for name in turns(list(by_name), rounds):
        row = by_name[name]
        foreign = sum(gib for model, gib in standing_gib.items() if model != row.standing)
        take_turn(row, measured[name], timed_steps, foreign)
    for one in measured.values():
        everyone = ds.gather_objects(one)
        # A step ends when the slowest rank ends it.
        one.seconds = np.max([rank.seconds for rank in everyone], axis=0).tolist()
        one.waited = np.mean([rank.waited for rank in everyone], axis=0).tolist()
        one.peak_gib = max(rank.peak_gib for rank in everyone)
    return measured


# ------------------------------------------------------------------------------------ figures


def spread(values: Any) -> dict[str, float]:
    """Return the median and the 20th and 80th percentiles."""
    p20, median, p80 = np.percentile(values, [20, 50, 80])
    return {"median": float(median), "p20": float(p20), "p80": float(p80)}


def round_rates(measured: Measured, rounds: int) -> np.ndarray:
    """Return tokens per second in each round, `(rounds,)` float64."""
    tokens = np.reshape([counts.tokens for counts in measured.counts], (rounds, -1))
    return tokens.sum(axis=1) / np.reshape(measured.seconds, (rounds, -1)).sum(axis=1)


def shares(measured: Measured) -> dict[str, float | None]:
    """Return the loader's, head's, optimizer's and remaining share of a step's time, percent.

    The loader's share is that of the counted steps. The others are medians over the profiled steps:
    the optimizer with clipping and reduction; the head, measured again on the same rows, forward
    and backward; the rest is the encoder and the loop itself. A head that took longer alone than
    the passes that contain it was not measured: None, and the rest contains it.
    """
    apart = {name: np.array([one.get(name, 0.0) for one in measured.apart])
             for name in (*PARTS, "head")}
    whole = np.maximum(sum(apart[part] for part in PARTS), 1e-12)
    loader = sum(measured.waited) / sum(measured.seconds)
    optimizer, alone = (float((1 - loader) * np.median(apart[name] / whole))
                        for name in ("optimizer", "head"))
    passes = 1 - loader - optimizer
    head = alone if alone < passes else None
    found = {"loader": loader, "head": head, "optimizer": optimizer, "rest": passes - (head or 0)}
    return {name: None if share is None else 100 * share for name, share in found.items()}


def summarise(row: Row, measured: Measured, flops: StepFlops, peak: float) -> dict[str, Any]:
    """Return the figures of one row; a rate is the mean count per step over the median step.

    Args:
        peak: FLOP/s of all devices together.
    """
    step, steps = spread(measured.seconds), len(measured.seconds)
    tokens, masked, text_tokens, slots, rows = np.mean(measured.counts, axis=0).tolist()
    return {
        "name": row.name,
        "kind": row.kind,
        "masked_rate": masked / max(text_tokens, 1),
        "masked_per_step": masked,
        "tokens_per_second": tokens / step["median"],
        "tokens_per_second_p20": tokens / step["p80"],
        "tokens_per_second_p80": tokens / step["p20"],
        "rows_per_second": rows / step["median"],
        "masked_tokens_per_second": masked / step["median"],
        "step_ms": {name: 1000 * value for name, value in step.items()},
        "filled_percent": 100 * tokens / slots,
        "mfu_percent": 100 * flops.of(tokens, masked) / step["median"] / peak,
        "share_percent": shares(measured),
        "peak_memory_gib": measured.peak_gib,
        "counted_steps": steps,
    }


def speed_over(one: Measured, other: Measured, rounds: int) -> dict[str, float]:
    """Return the ratio of tokens per second to another row's, round by round."""
    return spread(round_rates(one, rounds) / round_rates(other, rounds))
