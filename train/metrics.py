"""Speed, memory and scalars: every TensorBoard tag, and the two writers.

`MetricsWriter` sends each scalar to TensorBoard (`tb/`) and to `metrics.jsonl`; x is the global
step. `Progress` is the bar on a terminal and plain lines elsewhere. Both are silent on all ranks
but the first.

Event files are written here and at once. TensorBoard's own writer has a thread for it: a full disk
would show as that thread's traceback, and in the run only at the next flush, up to two minutes
later.
"""

from __future__ import annotations

import io
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from preprocess.errors import writing
from preprocess.store import append_bytes, atomic_write_bytes

TRAIN_LOSS = "train/loss"  # nats a masked token (pre-training) or an example
LEARNING_RATE = "train/learning_rate"
GRAD_NORM = "train/grad_norm"  # global norm before clipping
LOSS_SCALE = "train/loss_scale"
SKIPPED_STEPS = "train/skipped_steps"  # so far, by fp16 overflow
MASKED_FRACTION = "train/masked_fraction"  # masked tokens / real tokens
MASKED_ACCURACY = "train/masked_accuracy"  # masked tokens whose best guess is right
EPOCH = "train/epoch"
TOKENS_PER_SECOND = "throughput/tokens_per_sec"  # real tokens, all ranks
MASKED_TOKENS_PER_SECOND = "throughput/masked_tokens_per_sec"
DATA_WAIT_FRACTION = "throughput/data_wait_fraction"  # share of time waiting for the loader
MEMORY = "memory/max_allocated_gib"  # device memory; peak resident memory without a GPU
EVAL_LOSS = "eval/loss"
EVAL_PERPLEXITY = "eval/perplexity"
EVAL_ACCURACY = "eval/accuracy"
EVAL_MACRO_F1 = "eval/macro_f1"
EVAL_F1 = "eval/f1"  # of the class "important", token scorer

TAGS = (
    TRAIN_LOSS, LEARNING_RATE, GRAD_NORM, LOSS_SCALE, SKIPPED_STEPS, MASKED_FRACTION,
    MASKED_ACCURACY, EPOCH, TOKENS_PER_SECOND, MASKED_TOKENS_PER_SECOND, DATA_WAIT_FRACTION,
    MEMORY, EVAL_LOSS, EVAL_PERPLEXITY, EVAL_ACCURACY, EVAL_MACRO_F1, EVAL_F1,
)


def peak_memory_gib() -> float:
    """Peak memory of this process: allocated on its GPU, or resident without one."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print one line on rank 0."""
    if _is_first_rank():
        print(text, flush=True)


class _EventFile:
    """One file that TensorBoard reads; each call appends whole records or fails.

    Args:
        folder: where TensorBoard looks; made if absent.
        purge_step: what files before this one say about this step and later ones counts no more.
    """

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        # Files are read in the order of their names.
        seconds, rest = divmod(time.time_ns(), 10**9)
        place = f"{socket.gethostname()}.{os.getpid()}"
        self._path = folder / f"events.out.tfevents.{seconds}.{rest:09d}.{place}"
        self._add(file_version="brain.Event:2")
        if purge_step is not None:
            from tensorboard.compat.proto.event_pb2 import SessionLog

            start = SessionLog(status=SessionLog.START)
            self._add(step=purge_step, session_log=start)

    def _add(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        buffer = io.BytesIO()
        RecordWriter(buffer).write(Event(wall_time=time.time(), **fields).SerializeToString())
        append_bytes(self._path, buffer.getvalue())

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write the point of each tag at `step`."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._add(step=step, summary=Summary(value=points))

    def hyperparameters(self, options: dict[str, Any], results: dict[str, float]) -> None:
        """Write a line of the HParams page."""
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(options, results):
            self._add(summary=summary)
        self.scalars(0, results)


class MetricsWriter:
    """Scalars of one run, to TensorBoard and `metrics.jsonl`.

    Args:
        run_dir: the run directory; `tb/` and `metrics.jsonl` are made in it.
        start_step: step from which this process goes on. What an earlier process logged after
            it (steps that were lost and will be made again) is dropped from both.
    Raises:
        DiskFullError: from any method; what was logged before stays readable.
    """

    def __init__(self, run_dir: str | Path, start_step: int = 0) -> None:
        self._events: _EventFile | None = None
        self._path = Path(run_dir) / "metrics.jsonl"
        if not _is_first_rank():
            return
        self._drop_after(start_step)
        self._events = _EventFile(Path(run_dir) / "tb", start_step + 1 if start_step else None)

    def _drop_after(self, step: int) -> None:
        if not self._path.exists():
            return
        content = self._path.read_bytes()
        kept = []
        for line in content.splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + b"\n")
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a process that was killed while writing
        if b"".join(kept) != content:
            atomic_write_bytes(self._path, b"".join(kept))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log `values` (tag -> number) at `step`."""
        if self._events is None:
            return
        self._events.scalars(step, values)
        line = json.dumps({"step": step, "time": time.time(), **values}) + "\n"
        append_bytes(self._path, line.encode())

    def hyperparameters(self, options: dict[str, Any], results: dict[str, float]) -> None:
        """Log the options with the final results for TensorBoard's HParams page."""
        if self._events is None:
            return
        plain = {
            key: value if isinstance(value, (int, float, str, bool)) else str(value)
            for key, value in options.items()
        }
        # The prefix keeps the results, which have no step, out of the curves.
        self._events.hyperparameters(
            plain, {f"hparams/{tag}": value for tag, value in results.items()}
        )

    def close(self) -> None:
        """End the log: later scalars are dropped."""
        self._events = None


class Progress:
    """A bar with rate and time left on a terminal, plain lines elsewhere.

    Args:
        total: number of units of the whole work.
        unit: what is counted, as "step".
        every: print a plain line after so many units, and at least every 10 seconds.
        initial: units done by an earlier process.
        label: what is being done.
    """

    def __init__(
        self, total: int, unit: str = "step", every: int = 1, initial: int = 0, label: str = ""
    ) -> None:
        self._total, self._unit, self._every, self._label = total, unit, every, label
        self._done = self._printed = initial
        self._initial = initial
        self._start = self._printed_at = time.monotonic()
        self._bar: Any = None
        self._quiet = not _is_first_rank()
        if not self._quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, unit=unit, initial=initial, desc=label or None, dynamic_ncols=True
            )

    def update(self, amount: int = 1, text: str = "") -> None:
        """Count `amount` more units; `text` is what to show beside the count."""
        self._done += amount
        if self._quiet:
            return
        if self._bar is not None:
            if text:
                self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(amount)
            return
        now = time.monotonic()
        due = self._done // self._every > self._printed // self._every
        if due or now - self._printed_at >= 10 or self._done == self._total:
            rate = (self._done - self._initial) / max(now - self._start, 1e-9)
            left = (self._total - self._done) / rate if rate > 0 else 0.0
            label = f"{self._label}: " if self._label else ""
            print(
                f"{label}{self._unit} {self._done}/{self._total}  {text}"
                f"{'  ' if text else ''}{rate:.3g} {self._unit}/s  {left:.0f} s left",
                flush=True,
            )
            self._printed, self._printed_at = self._done, now

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
