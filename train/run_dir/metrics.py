"""Scalars and text of a run: every tag, and the writer.

`MetricsWriter` logs to `metrics.jsonl`, and beside it to TensorBoard (event files in the run
directory, so that a run has its folder's name there) or to Weights & Biases; x is the global step.
It does nothing on all ranks but the first. `metrics.jsonl` comes first, so that it reports a full
disk.

TensorBoard puts tags of one group into one section, whatever the runs are: so there a tag begins
with its command (`event_tag`), and losses of different kinds are never in one chart.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from preprocess.errors import ConfigError, writing
from preprocess.files import append_bytes, atomic_write_bytes
from preprocess.progress import is_first_rank, say

TRAIN_LOSS = "train/loss"  # nats per masked token (pre-training) or per example
LEARNING_RATE = "train/learning_rate"
GRAD_NORM = "train/grad_norm"  # global norm before clipping
LOSS_SCALE = "train/loss_scale"
SKIPPED_STEPS = "train/skipped_steps"  # so far, by fp16 overflow
MASKED_FRACTION = "train/masked_fraction"  # masked tokens / real tokens
MASKED_ACCURACY = "train/masked_accuracy"  # share of masked tokens predicted right
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
EVAL_BEST = "eval/best"  # best so far of the metric that picks the epoch
TEST_ACCURACY = "test/accuracy"  # of the epoch that was picked, logged once
TEST_MACRO_F1 = "test/macro_f1"
EXAMPLE = "eval/example"  # text

TAGS = (
    TRAIN_LOSS, LEARNING_RATE, GRAD_NORM, LOSS_SCALE, SKIPPED_STEPS, MASKED_FRACTION,
    MASKED_ACCURACY, EPOCH, TOKENS_PER_SECOND, MASKED_TOKENS_PER_SECOND, MFU, DATA_WAIT_FRACTION,
    MEMORY, EVAL_LOSS, EVAL_PERPLEXITY, EVAL_ACCURACY, EVAL_MACRO_F1, EVAL_F1, EVAL_BEST,
    TEST_ACCURACY, TEST_MACRO_F1, EXAMPLE,
)

# Columns of the HParams page, the same in every run: TensorBoard takes those of the first run that
# it reads, and shows five of them and five metrics until others are ticked. A run leaves empty the
# ones that it does not have.
HYPERPARAMETERS: dict[str, type] = {
    "command": str, "data": str, "learning_rate": float, "masking": str, "max_seq_length": float,
    "max_steps": float, "mlm_probability": float, "model": str, "num_train_epochs": float,
    "optimizer": str, "precision": str, "ranks": float, "seed": float, "train_batch_size": float,
    "warmup_num_steps": float, "weight_decay": float, "zero_stage": float,
}
# The five that are shown at first: in these the runs of a pipeline differ.
FIRST_HYPERPARAMETERS = ("command", "data", "learning_rate", "masking", "seed")
# Its metrics, by command: a loss of pre-training and one of a classifier share no column.
FINAL_METRICS = {
    "pretrain": (EVAL_LOSS, EVAL_PERPLEXITY, EVAL_ACCURACY, TOKENS_PER_SECOND, MFU),
    "finetune": (TEST_ACCURACY, TEST_MACRO_F1, EVAL_BEST, EVAL_LOSS),
    "fit_scorer": (EVAL_BEST, EVAL_LOSS),
}
# The five that are shown at first: those of each command that people compare, by command and tag.
FIRST_METRICS = (("finetune", TEST_ACCURACY), ("finetune", TEST_MACRO_F1), ("pretrain", EVAL_LOSS),
                 ("pretrain", TOKENS_PER_SECOND), ("fit_scorer", EVAL_BEST))
OLD_FOLDER = "tb"  # with the event files of runs of an older version
WANDB_ID = "wandb.id"


def event_tag(command: str, tag: str) -> str:
    """Return a tag as TensorBoard has it: `pretrain_train/loss`, `finetune_eval/accuracy`."""
    return f"{command}_{tag}"


def spellings(tag: str) -> list[str]:
    """Return all tags that event files may have for a tag; the last is that of older versions."""
    return [*(event_tag(command, tag) for command in FINAL_METRICS), tag]


def peak_memory_gib() -> float:
    """Return the peak memory of this process: allocated on its GPU, or resident without one."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def engine_scalars(engine: Any) -> dict[str, float]:
    """Return memory, skipped steps and loss scale of a DeepSpeed engine, by tag."""
    scalars = {MEMORY: peak_memory_gib(), SKIPPED_STEPS: float(engine.skipped_steps)}
    scale = getattr(engine.optimizer, "cur_scale", None)
    return scalars if scale is None else {**scalars, LOSS_SCALE: float(scale)}


def short_path(path: str) -> str:
    """Return the last two parts of a path, for the HParams page: many stores share a name."""
    return "/".join(Path(path).parts[-2:])


class _Wandb:
    """A run of Weights & Biases, through its own package; it is one run, however often resumed.

    Nothing that goes wrong there after the start ends the training.
    """

    def __init__(self, run_dir: Path, start_step: int) -> None:
        import wandb

        note = run_dir / WANDB_ID
        name = note.read_text().strip() if start_step and note.is_file() else ""
        with writing(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "selmask"), dir=str(run_dir),
                name=short_path(str(run_dir.absolute())), id=name or None, resume="allow")
        except Exception as error:  # its own kinds: no login, no network
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"--report_to wandb: cannot start ({first}); type `wandb login`, or set "
                "WANDB_MODE=offline, or leave --report_to out") from None
        atomic_write_bytes(note, f"{self._run.id}\n".encode())

    def call(self, name: str, *args: Any, **options: Any) -> None:
        """Call a method of the run, `config.update` or `log`; a warning if that fails."""
        if self._run is None:
            return
        method: Any = self._run
        for part in name.split("."):
            method = getattr(method, part)
        try:
            method(*args, **options)
        except Exception as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            say(f"warning: wandb: {first}; it gets nothing more of this run, metrics.jsonl does")
            self._run = None


class MetricsWriter:
    """Log scalars and text of one run to `metrics.jsonl`, and to TensorBoard or wandb.

    Args:
        run_dir: the run directory.
        start_step: step from which this process continues; 0: it begins. Whatever an earlier
            process logged beyond it (steps that were lost and are made again) is dropped.
        command: a key of `FINAL_METRICS`.
        report_to: tensorboard, wandb or none.
    Raises:
        ConfigError: wandb cannot start.
        DiskFullError: from any method; what was logged before stays readable.
    """

    def __init__(self, run_dir: str | Path, start_step: int = 0, command: str = "pretrain",
                 report_to: str = "tensorboard") -> None:
        self._command, self._open = command, is_first_rank()
        self._events: Any = None
        self._wandb: _Wandb | None = None
        self._path = Path(run_dir) / "metrics.jsonl"
        if not self._open:
            return
        first = start_step + 1 if start_step else 0  # step 0 is before the first step
        self._drop_from(first)
        if report_to == "wandb":
            self._wandb = _Wandb(self._path.parent, start_step)
        elif report_to == "tensorboard":
            self._open_events(first)

    def _open_events(self, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = self._path.parent
        if any((folder / OLD_FOLDER).glob("events.out.tfevents.*")):
            folder = folder / OLD_FOLDER  # or one run would be two
        # Readers take the files in the order of their names, which begin with the second: those of
        # one second would follow the numbers of their processes.
        while any(folder.glob(f"events.out.tfevents.{int(time.time())}.*")):
            time.sleep(0.05)
        with writing(folder):
            self._events = SummaryWriter(str(folder), purge_step=first)

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
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"step": step, "time": time.time(), **values}) + "\n"
        append_bytes(self._path, line.encode())
        if self._wandb:
            named = {event_tag(self._command, tag): value for tag, value in values.items()}
            self._wandb.call("log", named, step=step)

    def _flush(self) -> None:
        with writing(self._path.parent):
            self._events.flush()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log `values` (tag -> number) at `step`."""
        if not self._open or not values:
            return
        self._append(step, values)
        if self._events is not None:
            for tag, value in values.items():
                self._events.add_scalar(event_tag(self._command, tag), value, step)
            self._flush()

    def text(self, step: int, tag: str, markdown: str) -> None:
        """Log a text in Markdown at `step`; TensorBoard shows it as `TAG/text_summary`."""
        if not self._open:
            return
        self._append(step, {tag: markdown})
        if self._events is not None:
            self._events.add_text(event_tag(self._command, tag), markdown, step)
            self._flush()

    def hyperparameters(self, options: dict[str, Any]) -> None:
        """Give the run its row on TensorBoard's HParams page, from the start on.

        The page shows the last value of each of `FINAL_METRICS` beside it. A resumed run keeps its
        row. `SummaryWriter.add_hparams` would make a second run for it, in a folder below. A run of
        no step has no row: it has no result of its own.

        Args:
            options: by names in `HYPERPARAMETERS`; None values are left out.
        """
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
        from torch.utils.tensorboard.summary import hparams

        unknown = options.keys() - HYPERPARAMETERS
        assert not unknown, f"no column for {unknown}"
        given = {name: value for name, value in options.items() if value is not None}
        if self._wandb:
            self._wandb.call("config.update", given, allow_val_change=True)
        if self._events is not None and options.get("max_steps") != 0:
            types = {name: kind() for name, kind in HYPERPARAMETERS.items()}
            metrics = dict.fromkeys([*FIRST_METRICS, *(
                (command, tag) for command, tags in FINAL_METRICS.items() for tag in tags)])
            columns, _, _ = hparams(types, {event_tag(*metric): 0.0 for metric in metrics})
            _, row, _ = hparams(given, {})
            # TensorBoard puts those that differ between runs first.
            data = columns.value[0].metadata.plugin_data
            told = HParamsPluginData.FromString(data.content)
            for info in told.experiment.hparam_infos:
                info.differs = info.name in FIRST_HYPERPARAMETERS
            data.content = told.SerializeToString()
            for summary in (columns, row):
                self._events.file_writer.add_summary(summary)
            self._flush()

    def close(self, finished: bool = False) -> None:
        """End the log; anything logged later is dropped.

        Args:
            finished: whether the run has come to its end, for the HParams page.
        """
        from torch.utils.tensorboard.summary import hparams

        if self._events is not None:
            if finished:
                self._events.file_writer.add_summary(hparams({}, {})[2])
            with writing(self._path.parent):
                self._events.close()
        if self._wandb:
            self._wandb.call("finish", exit_code=0 if finished else 1)
        self._open, self._events, self._wandb = False, None, None
