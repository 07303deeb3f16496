"""What a run settles at its first start, by its machine: rows that fit, compiling, sizes.

Letters: `n` rows of a micro batch.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from preprocess.errors import ConfigError, DataError
from preprocess.progress import say
from train import data, model
from train import engine as ds
from train.config import AUTO, PretrainConfig
from train.run_dir.folder import read_execution

# Of the free memory; the rest is for what a first step does not show: longer rows, other streams.
USABLE = 0.9


@dataclass(frozen=True)
class Execution:
    """What a run settles at its first start, by its machine, and keeps when it is resumed.

    Dropout depends on it: other shapes, or compiled layers, draw other numbers.

    Attributes:
        micro_batch_size: rows per micro batch.
        torch_compile: whether layers are compiled.
        sizes: to which micro batches are padded; None where they need no fixed shapes.
        why: one line about `torch_compile`.
    """

    micro_batch_size: int
    torch_compile: bool
    sizes: data.BatchSizes | None
    why: str

    def record(self) -> dict[str, Any]:
        """Return what `folder.read_execution` gives back."""
        return {"micro_batch_size": self.micro_batch_size, "torch_compile": self.torch_compile,
                "sizes": self.sizes and asdict(self.sizes)}


def settle(
    config: PretrainConfig, resolved: ds.Resolved, batches: data.PackedData
) -> Execution:
    """Decide, or keep what was decided at the run's first start."""
    recorded = read_execution(Path(config.output_dir))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = recorded.get("torch_compile")
    if config.torch_compile == AUTO and before is not None:
        compiles, why = before, f"layers are {'' if before else 'not '}compiled, as before"
    else:
        slots = config.max_steps * resolved.train_batch_size * config.max_seq_length
        compiles, why = model.choose_compiling(
            config.torch_compile, device, resolved.zero_stage, slots // ds.ranks().world_size
        )
    sizes = recorded.get("sizes")
    if sizes and recorded.get("micro_batch_size") == resolved.micro_batch_size:
        try:
            sizes = data.BatchSizes(**sizes)
        except TypeError as error:
            raise DataError(f"execution.json in --output_dir {config.output_dir}: {error}; delete "
                            "it") from None
    elif device.type == "cuda" or compiles:
        sizes = batches.measure_sizes(max(1, config.max_steps))
    return Execution(resolved.micro_batch_size, compiles, sizes, why)


class Trial(NamedTuple):
    """What a search for the micro batch runs.

    run: runs the model forward and backward on n rows of the run. device: a GPU with nothing of
    this run in its memory but the model. state_bytes: of weights, gradients and optimizer states of
    a rank while it trains.
    """

    run: Callable[[int], None]
    device: torch.device
    state_bytes: float


def settle_micro_batch(
    config: PretrainConfig, run_dir: Path, trial: Callable[[PretrainConfig], Trial]
) -> PretrainConfig:
    """Replace `--per_device_train_batch_size auto` by a number; collective where it is measured.

    A run that goes on takes the number that it had.

    Raises:
        ConfigError: there is no GPU, or the batch sizes do not go together.
    """
    if config.per_device_train_batch_size != AUTO:
        return config
    rows = ds.rows_per_rank(
        ds.read_ds_config(config.deepspeed_config), config, ds.ranks().world_size
    )
    size = read_execution(run_dir).get("micro_batch_size")
    if not size or rows % size:
        if not torch.cuda.is_available():
            raise ConfigError("--per_device_train_batch_size auto: measures the memory of a GPU, "
                              "and there is none here; give a number")
        size = find_micro_batch(rows, trial(config.replaced(per_device_train_batch_size=1)))
    return config.replaced(per_device_train_batch_size=size)  # type: ignore[no-any-return]


def candidates(rows: int) -> list[int]:
    """Return the micro batches that divide `rows`, from the worst to the best if all fit.

    # 12 -> 1 3 6 12 2 4: powers of two above 1 before other divisors
    """
    divisors = [n for n in range(1, rows + 1) if rows % n == 0]
    return sorted(divisors, key=lambda n: (n > 1 and n & (n - 1) == 0, n))


def largest_fitting(rows: int, fits: Callable[[int], bool]) -> int:
    """Return the largest power of two that divides `rows` and fits, else the largest divisor.

    Args:
        rows: of a rank per step.
        fits: whether so many rows fit; asked in ascending order, and no more after the first that
            do not.
    Returns:
        0 where not even one row fits.
    """
    best = 0
    for n in sorted(candidates(rows)):
        if not fits(n):
            break
        best = n
    return next((n for n in reversed(candidates(rows)) if n <= best), 0)


def find_micro_batch(rows: int, trial: Trial) -> int:
    """Find the micro batch that fits on every rank; collective.

    Args:
        rows: of a rank per step.
    Raises:
        ConfigError: not even one row fits.
    """
    run, device, states = trial
    held = torch.cuda.memory_allocated(device)
    room = USABLE * (torch.cuda.mem_get_info(device)[0] + held) - states

    def fits(n: int) -> bool:
        torch.cuda.reset_peak_memory_stats(device)
        try:
            run(n)
            needed = torch.cuda.max_memory_allocated(device) - held
        except torch.OutOfMemoryError:
            return False
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        return needed <= room

    found = min(ds.gather_objects(largest_fitting(rows, fits)))
    if not found:
        raise ConfigError(
            f"--per_device_train_batch_size auto: not one row fits the memory of this GPU "
            f"({states / 2**30:.1f} GiB of it for weights and states); use more ranks, a smaller "
            "model or a shorter --max_seq_length"
        )
    say(f"--per_device_train_batch_size auto: {found} rows fit")
    return found


@contextmanager
def memory_is_enough(micro_batch_size: int, device: torch.device) -> Iterator[None]:
    """Report memory that runs out on a GPU in one sentence."""
    try:
        yield
    except torch.OutOfMemoryError:
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        smaller = next((n for n in reversed(candidates(micro_batch_size)) if n < micro_batch_size),
                       0)
        remedy = (f"try --per_device_train_batch_size {smaller}, or auto" if smaller else
                  "use more ranks, --gradient_checkpointing or a shorter --max_seq_length")
        raise ConfigError(
            f"{micro_batch_size} rows per micro batch do not fit the {memory:.1f} GiB of this "
            f"GPU; {remedy}"
        ) from None


@contextmanager
def garbage_frozen() -> Iterator[None]:
    """Let the garbage collector pass over all that exists now: it stays, and is much to walk."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
