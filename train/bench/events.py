"""TensorBoard of a benchmark: one run per row, one point per counted step.

`tensorboard --logdir OUTPUT_DIR/tb` then compares strategies and baselines: the spread over steps,
and a drift of the machine, which the medians of the tables do not show.
"""

from __future__ import annotations

from pathlib import Path

from preprocess.errors import writing
from train.bench.throughput import Measured
from train.model import StepFlops
from train.run_dir.metrics import MASKED_TOKENS_PER_SECOND, MFU, TOKENS_PER_SECOND

STEP_SECONDS = "throughput/step_seconds"


def folder_of(output_dir: str | Path, max_seq_length: int, name: str) -> Path:
    """Return the folder of a row: `tb/128/random`, or `tb/128/random-equal` in the second table."""
    return Path(output_dir) / "tb" / str(max_seq_length) / name.replace(" =", "-equal")


def write_events(folder: Path, measured: Measured, flops: StepFlops, peak: float) -> None:
    """Write the counted steps of a row; those of an earlier benchmark are replaced.

    Args:
        peak: FLOP/s of all devices together.
    Raises:
        DiskFullError: the disk is full.
    """
    from torch.utils.tensorboard import SummaryWriter

    for path in folder.glob("events.out.tfevents.*"):
        path.unlink()
    with writing(folder), SummaryWriter(str(folder)) as events:
        steps = zip(measured.seconds, measured.counts, strict=True)
        for step, (seconds, counts) in enumerate(steps, start=1):
            for tag, value in (
                (TOKENS_PER_SECOND, counts.tokens / seconds),
                (MASKED_TOKENS_PER_SECOND, counts.masked / seconds),
                (MFU, flops.of(counts.tokens, counts.masked) / seconds / peak),
                (STEP_SECONDS, seconds),
            ):
                events.add_scalar(tag, value, step)
