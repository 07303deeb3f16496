"""How many rows fit the memory of a GPU: `--per_device_train_batch_size auto`.

Letters: `n` rows of a micro batch.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from preprocess.errors import ConfigError
from preprocess.progress import say
from train import engine as ds

# Of the free memory; the rest is for what a first step does not show: longer rows, other streams.
USABLE = 0.9


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


def find(rows: int, states: float, run: Callable[[int], None], device: torch.device) -> int:
    """Find the micro batch that fits on every rank; collective.

    Args:
        rows: of a rank per step.
        states: bytes of weights, gradients and optimizer states of a rank while it trains.
        run: runs the model forward and backward on n rows of this run.
        device: a GPU with nothing of this run in its memory but the model.
    Raises:
        ConfigError: not even one row fits.
    """
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
