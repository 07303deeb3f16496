"""Scalars and text of a run: every TensorBoard tag, and the two writers.

`MetricsWriter` sends what is logged to TensorBoard (`tb/`) and to `metrics.jsonl`; x is the global
step. It is silent on all ranks but the first.

Event files are written here and at once. TensorBoard's own writer has a thread for it: a full disk
would show as that thread's traceback, and in the run only at the next flush, up to two minutes
later.
"""

from __future__ import annotations

import io
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from preprocess.errors import writing
from preprocess.files import append_bytes, atomic_write_bytes
from preprocess.progress import is_first_rank

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
MFU = "throughput/mfu"  # achieved useful operations / peak of the devices of all ranks
DATA_WAIT_FRACTION = "throughput/data_wait_fraction"  # share of time waiting for the loader
MEMORY = "memory/max_allocated_gib"  # device memory; peak resident memory without a GPU
EVAL_LOSS = "eval/loss"
EVAL_PERPLEXITY = "eval/perplexity"
EVAL_ACCURACY = "eval/accuracy"
EVAL_MACRO_F1 = "eval/macro_f1"
EVAL_F1 = "eval/f1"  # of the class "important", token scorer
EVAL_BEST = "eval/best"  # of the epochs so far, of the metric that picks one
TEST_ACCURACY = "test/accuracy"  # of the epoch that was picked, once
TEST_MACRO_F1 = "test/macro_f1"
EXAMPLE = "eval/example"  # text

TAGS = (
    TRAIN_LOSS, LEARNING_RATE, GRAD_NORM, LOSS_SCALE, SKIPPED_STEPS, MASKED_FRACTION,
    MASKED_ACCURACY, EPOCH, TOKENS_PER_SECOND, MASKED_TOKENS_PER_SECOND, MFU, DATA_WAIT_FRACTION,
    MEMORY, EVAL_LOSS, EVAL_PERPLEXITY, EVAL_ACCURACY, EVAL_MACRO_F1, EVAL_F1, EVAL_BEST,
    TEST_ACCURACY, TEST_MACRO_F1, EXAMPLE,
)

# Columns of the HParams page, the same in every run: TensorBoard takes those of the run that it
# happens to read first, sorts them by name and shows five until others are ticked. A run leaves
# empty what it does not have.
HYPERPARAMETERS: dict[str, type] = {
    "command": str, "data": str, "learning_rate": float, "masking": str, "max_seq_length": float,
    "max_steps": float, "mlm_probability": float, "model": str, "num_train_epochs": float,
    "optimizer": str, "precision": str, "ranks": float, "seed": float, "train_batch_size": float,
    "warmup_num_steps": float, "weight_decay": float, "zero_stage": float,
}
FINAL_METRICS = (
    EVAL_LOSS, EVAL_PERPLEXITY, EVAL_ACCURACY, EVAL_BEST, TEST_ACCURACY, TEST_MACRO_F1,
    TOKENS_PER_SECOND, MFU,
)


def peak_memory_gib() -> float:
    """Peak memory of this process: allocated on its GPU, or resident without one."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def engine_scalars(engine: Any) -> dict[str, float]:
    """What a DeepSpeed engine and its device say of themselves, by tag."""
    scalars = {MEMORY: peak_memory_gib(), SKIPPED_STEPS: float(engine.skipped_steps)}
    scale = getattr(engine.optimizer, "cur_scale", None)
    return scalars if scale is None else {**scalars, LOSS_SCALE: float(scale)}


def short_path(path: str) -> str:
    """A name for the HParams page: the last two parts, since many stores are called alike."""
    return "/".join(Path(path).parts[-2:])


class _EventFile:
    """One file that TensorBoard reads; each call appends whole records or fails.

    Args:
        folder: where TensorBoard looks; made if absent.
        purge_step: what files before this one say about this step and later ones counts no more.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        # Files are read in the order of their names.
        seconds, rest = divmod(time.time_ns(), 10**9)
        place = f"{socket.gethostname()}.{os.getpid()}"
        self._path = folder / f"events.out.tfevents.{seconds}.{rest:09d}.{place}"
        self._start(purge_step)

    def _start(self, purge_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self._add(file_version="brain.Event:2")
        # The first file says so too: TensorBoard takes no notice of the first of these.
        self._add(step=purge_step, session_log=SessionLog(status=SessionLog.START))

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

    def text(self, step: int, tag: str, markdown: str) -> None:
        """Write a text in Markdown."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING
        from tensorboard.plugins.text.metadata import create_summary_metadata

        value = Summary.Value(
            tag=tag, metadata=create_summary_metadata(display_name=tag, description=""),
            tensor=TensorProto(dtype=DT_STRING, string_val=[markdown.encode()]),
        )
        self._add(step=step, summary=Summary(value=[value]))

    def hyperparameters(self, options: dict[str, Any]) -> None:
        """Write a row of the HParams page, and its columns."""
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

        types = {str: "DATA_TYPE_STRING", float: "DATA_TYPE_FLOAT64"}
        columns = api_pb2.Experiment(
            time_created_secs=time.time(),
            hparam_infos=[api_pb2.HParamInfo(name=name, type=types[kind])
                          for name, kind in HYPERPARAMETERS.items()],
            metric_infos=[api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag))
                          for tag in FINAL_METRICS],
        )
        self._add_hparams(metadata.EXPERIMENT_TAG, experiment=columns)
        row = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
        for name, value in options.items():
            if isinstance(value, str):
                row.hparams[name].string_value = value
            else:
                row.hparams[name].number_value = value
        self._add_hparams(metadata.SESSION_START_INFO_TAG, session_start_info=row)

    def end_session(self) -> None:
        """Call the run finished on the HParams page."""
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

        end = plugin_data_pb2.SessionEndInfo(
            status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time()
        )
        self._add_hparams(metadata.SESSION_END_INFO_TAG, session_end_info=end)

    def _add_hparams(self, tag: str, **content: Any) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import metadata, plugin_data_pb2

        data = plugin_data_pb2.HParamsPluginData(**content)
        value = Summary.Value(
            tag=tag, metadata=metadata.create_summary_metadata(data), tensor=metadata.NULL_TENSOR
        )
        self._add(summary=Summary(value=[value]))


class MetricsWriter:
    """Scalars and text of one run, to TensorBoard and `metrics.jsonl`.

    Args:
        run_dir: the run directory; `tb/` and `metrics.jsonl` are made in it.
        start_step: step from which this process goes on; 0: it begins. What an earlier process
            logged beyond it (steps that were lost and are made again) is dropped from both.
    Raises:
        DiskFullError: from any method; what was logged before stays readable.
    """

    def __init__(self, run_dir: str | Path, start_step: int = 0) -> None:
        self._events: _EventFile | None = None
        self._path = Path(run_dir) / "metrics.jsonl"
        if not is_first_rank():
            return
        first = start_step + 1 if start_step else 0  # step 0 is what comes before the first
        self._drop_from(first)
        self._events = _EventFile(Path(run_dir) / "tb", first)

    def _drop_from(self, step: int) -> None:
        if not self._path.exists():
            return
        content = self._path.read_bytes()
        kept = []
        for line in content.splitlines():
            try:
                if json.loads(line)["step"] < step:
                    kept.append(line + b"\n")
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a process that was killed while writing
        if b"".join(kept) != content:
            atomic_write_bytes(self._path, b"".join(kept))

    def _append(self, step: int, values: dict[str, Any]) -> None:
        line = json.dumps({"step": step, "time": time.time(), **values}) + "\n"
        append_bytes(self._path, line.encode())

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log `values` (tag -> number) at `step`."""
        if self._events is not None and values:
            self._events.scalars(step, values)
            self._append(step, values)

    def text(self, step: int, tag: str, markdown: str) -> None:
        """Log a text in Markdown at `step`."""
        if self._events is not None:
            self._events.text(step, tag, markdown)
            self._append(step, {tag: markdown})

    def hyperparameters(self, options: dict[str, Any]) -> None:
        """Give the run its row on TensorBoard's HParams page, from the start on.

        The page shows the last value of each of `FINAL_METRICS` beside it. A run that goes on
        keeps the row that it has.

        Args:
            options: by names in `HYPERPARAMETERS`; what is None is left out.
        """
        unknown = options.keys() - HYPERPARAMETERS
        assert not unknown, f"no column for {unknown}"
        if self._events is not None:
            self._events.hyperparameters({k: v for k, v in options.items() if v is not None})

    def close(self, finished: bool = False) -> None:
        """End the log: what is logged later is dropped. `finished`: the run has come to its end."""
        if self._events is not None and finished:
            self._events.end_session()
        self._events = None
