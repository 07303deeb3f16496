"""How long the steps of a plan will take, and how much disk: estimates of `--dry_run`.

Disk follows from sizes: a store has 2 bytes per token, scores 2, a mask index 4 per masked token; a
model has 4 bytes per parameter, a checkpoint 12. Seconds follow from one measurement on this
machine (unless `--no_measure`): a few steps of the stage-2 model at its row length. Work is counted
in tokens times the parameters that a token passes through, three times as much in training as
without a backward pass; all other steps take it at the measured rate, each update of the weights
what it takes whatever the batch (on a CPU, from steps with two sizes of batch), and each process
the measured time of a start. Reading text, building masks and the like are not measured: constants
stand for them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from preprocess.corpus import load_task, num_bytes
from preprocess.errors import ConfigError
from preprocess.files import read_json
from train.recipes.checks import (
    SAMPLE,
    Checked,
    Checker,
    documents_of,
    flags_of,
    is_here,
    outcome,
    replaced,
    without,
)

BYTES_PER_TOKEN = 4.5  # of English, where there is no tokenizer to ask
LOOK_SECONDS = 2.0  # how long a text is read to learn its size
MEASURED_STEPS = 6  # at least; the first is not counted
MEASURE_SECONDS = 60.0  # after which the measurement is stopped
STEP_WORK = 4e9  # parameters x tokens of a measured step on a CPU: about a second of two cores
# Not measured.
SLOWER_IN_FP32 = 2.0  # annotating and tests of a CPU that trains in bf16: as on a Zen 5
READ_BYTES_PER_SECOND = 1e6  # of text, tokenized by one process
ARRAY_TOKENS_PER_SECOND = 2e6  # scored by counting, or masked
LIGHT_SECONDS = 3.0  # a process that runs no network
NODE_STARTS = 2  # processes that the deepspeed launcher starts before a training command


class EncoderSize(NamedTuple):
    """Sizes of an encoder: layers, widths, words."""

    layers: int
    hidden: int
    inner: int
    vocabulary: int
    positions: int

    @property
    def encoder(self) -> int:
        """Parameters that every token passes through."""
        return self.layers * (4 * self.hidden ** 2 + 2 * self.hidden * self.inner)

    @property
    def head(self) -> int:
        """Parameters of the MLM head, the output words among them."""
        return self.hidden * (self.hidden + self.vocabulary)

    @property
    def parameters(self) -> int:
        """All of them, the words once."""
        return self.encoder + self.head + self.hidden * self.positions


class TextSize(NamedTuple):
    """Documents and bytes of text; None where that is unknown before it is read."""

    documents: float
    size: float


class Measurement(NamedTuple):
    """rate: parameters x tokens per second, forward alone. update: seconds of an optimizer step,
    whatever the batch. start: seconds of a training process without its steps. imports: seconds of
    its imports. steps: that were measured. rows: of their batches. slots: of a row."""

    rate: float
    update: float
    start: float
    imports: float
    steps: int
    rows: tuple[int, ...]
    slots: int


class Work(NamedTuple):
    """What a step of the plan has to do.

    passes: parameters x tokens, forward alone, with the weight of what runs in fp32 while training
    does not; None where a size is unknown. kept: bytes. updates: optimizer steps. models: that are
    trained."""

    passes: float | None
    kept: float
    updates: float = 0.0
    models: int = 1


@dataclass
class StepEstimate:
    """Of one step: bytes that stay, and seconds; None where they are unknown."""

    kept: float = 0.0
    seconds: float | None = None


# ----------------------------------------------------------------------------- what is known


def network_of(recipe: dict[str, Any]) -> EncoderSize | None:
    """Return the sizes of the recipe's encoder; None where it is not here."""
    from train.model import load_config, named_config

    encoder = recipe["encoder"]
    try:
        if encoder:
            config = load_config(encoder) if is_here(encoder) else None
        else:
            words = (recipe["vocabulary"] or {}).get("vocab_size") or 30522
            config = named_config(recipe["general"]["model_config"], words, 0)
    except (ConfigError, OSError, ValueError):
        return None
    if config is None:
        return None
    inner = int(getattr(config, "intermediate_size", 0) or config.hidden_dim)  # of DistilBERT
    return EncoderSize(config.num_hidden_layers, config.hidden_size, inner, config.vocab_size,
                   config.max_position_embeddings)


def size_of_text(flags: dict[str, list[str]]) -> TextSize | None:
    """Estimate how much text tokenizing will read, from `LOOK_SECONDS` of it."""
    specs = flags["input"]
    if any(spec.startswith("hub:") for spec in specs):
        return None
    most = int(flags["max_documents"][0]) if "max_documents" in flags else None
    passed = [0]

    def count(size: int) -> None:
        passed[0] += size

    documents = size = 0
    begin = time.monotonic()
    for text in documents_of(flags, most, count):
        documents += 1
        size += len(text.encode())
        if time.monotonic() - begin > LOOK_SECONDS and passed[0]:
            total = num_bytes(specs, "blank_line_documents" in flags, (0, 1)) or passed[0]
            share = max(1.0, total / passed[0])
            return TextSize(min(documents * share, most or float("inf")), size * share)
    return TextSize(documents, size)


def bytes_per_token(checker: Checker, name: str) -> float:
    """Return how many bytes of text make a token, by the sample of a store."""
    step = next((step for step in checker.steps if step.name == name), None)
    if step is None or name not in checker.sampled:
        return BYTES_PER_TOKEN
    flags = flags_of(step.command[1:])
    most = min(int(flags.get("max_documents", [SAMPLE])[0]), SAMPLE)
    size = sum(len(text.encode()) for text in documents_of(flags, most))
    store = read_json(Path(checker.moved(flags["output"][0]) + ".json"))
    return size / max(1, int(store.get("num_tokens") or store["counts"]["tokens"]))


# ---------------------------------------------------------------------------- the measurement


def measure(checker: Checker, found: Sequence[Checked], network: EncoderSize | None,
            imports: float) -> Measurement | str:
    """Train the stage-2 model for a few steps on the sample; return why not where it cannot."""
    trained = [one for one in found if Path(one.step.command[0]).stem == "pretrain"
               and one.config is not None and one.config.max_steps]
    trained.sort(key=lambda one: not one.step.name.startswith("task_guided"))
    chosen = next((one for one in trained if checker.stand_ins(one.step)), None)
    if not trained:
        return "no step pre-trains, and only such steps are measured"
    if chosen is None or network is None:
        return "no step can be measured: its encoder or its text is not here"
    import torch

    slots, config = chosen.config.max_seq_length, chosen.config
    rows = config.per_device_train_batch_size or config.train_batch_size or 32
    sizes = [32 if rows == "auto" else rows]
    if not torch.cuda.is_available():
        most = 8 if rows == "auto" else rows
        few = max(1, min(most // 4, int(STEP_WORK / network.encoder / slots)))
        sizes = [few, *{min(most, 4 * few)} - {few}]
    timed: list[_Timed] = []
    for size in sizes:
        one = _time_steps(checker, chosen, size)
        if isinstance(one, str):
            if timed:  # the larger batch takes too long
                break
            return one
        timed.append(one)
    masked = float(config.mask_rates()[0]) if not config.mask_index else 0.15
    per_row = 3 * (network.encoder + masked * network.head) * slots
    per_second, update = fit_line([per_row * size for size in sizes[:len(timed)]],
                                  [one.seconds for one in timed])
    return Measurement(per_second, update, timed[0].start, imports, sum(one.steps for one in timed),
                       tuple(sizes[:len(timed)]), slots)


def fit_line(work: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Return the work per second, and the seconds that steps take besides; 0 if not to be told."""
    if len(work) == 2 and seconds[1] > seconds[0]:
        rate = (work[1] - work[0]) / (seconds[1] - seconds[0])
        if (besides := seconds[0] - work[0] / rate) > 0:
            return rate, besides
    return work[-1] / seconds[-1], 0.0


class _Timed(NamedTuple):
    """seconds: of a step, the median. start: of the process, without steps. steps: how many."""

    seconds: float
    start: float
    steps: int


def _time_steps(checker: Checker, chosen: Checked, rows: int) -> _Timed | str:
    """Take a few steps with batches of `rows` rows, or say why none can be timed.

    The command is killed after its steps, before it writes a checkpoint into the scratch folder.
    """
    from train.run_dir.metrics import TOKENS_PER_SECOND

    folder = checker.scratch / f"measured{rows}"
    words = without(checker.stand_ins(chosen.step), "export_steps", "gradient_accumulation_steps",
                    "head_only_steps", "eval_steps", "eval_mask_index", "mlm_probability")
    for flag, value in (("max_steps", 2 * MEASURED_STEPS), ("logging_steps", 1),
                        ("train_batch_size", rows), ("per_device_train_batch_size", rows),
                        ("eval_fraction", 0), ("save_steps", 0), ("output_dir", folder)):
        words = replaced(words, flag, str(value))
    path = folder / "metrics.jsonl"

    def logged() -> list[dict[str, Any]]:
        text = path.read_text() if path.is_file() else ""
        found = map(json.loads, text.rpartition("\n")[0].splitlines())
        return [row for row in found if row.get(TOKENS_PER_SECOND)]

    begin = time.monotonic()
    lines, code = outcome([chosen.step.command[0], *words], MEASURE_SECONDS,
                          lambda: len(logged()) >= MEASURED_STEPS)
    seconds = time.monotonic() - begin
    each = [rows * chosen.config.max_seq_length / row[TOKENS_PER_SECOND] for row in logged()
            if row["step"] > 1]
    if not each and seconds > MEASURE_SECONDS:
        return f"unknown, since {chosen.step.name} has not taken 2 steps in {MEASURE_SECONDS:.0f} s"
    if not each:
        return f"unknown, since {chosen.step.name} has failed after its start: " + (
            next((line for line in reversed(lines) if line.strip()), f"exit code {code}"))
    return _Timed(median(each), max(0.0, seconds - sum(each)), len(each))


# ------------------------------------------------------------------------------- the estimates


class Estimator:
    """Estimates each step from the sizes of its inputs."""

    def __init__(self, checker: Checker, found: Sequence[Checked], network: EncoderSize | None,
                 measured: Measurement | None) -> None:
        import torch

        self.checker, self.options, self.network = checker, checker.options, network
        self.measured = measured
        is_fast = any(one.precision == "bf16" for one in found) and not torch.cuda.is_available()
        self.exact = SLOWER_IN_FP32 if is_fast else 1.0  # weight of a pass in fp32
        self.tokens: dict[str, float] = {}  # of a store, by its prefix
        self.texts: dict[str, TextSize] = {}
        self._sizes(found)
        self._tasks: dict[str, tuple[int, int, int, float]] = {}
        self._annotates = {one.config.output: one.config for one in found
                           if Path(one.step.command[0]).stem == "annotate" and one.config}

    def _sizes(self, found: Sequence[Checked]) -> None:
        for one in found:
            if Path(one.step.command[0]).stem == "tokenize_corpus" and not one.problem:
                flags = flags_of(one.step.command[1:])
                text = size_of_text(flags)
                if text is not None:
                    prefix = flags["output"][0]
                    self.texts[prefix] = text
                    self.tokens[prefix] = text.size / bytes_per_token(
                        self.checker, one.step.name)
        root = self.checker.root
        domain = self.tokens.get(f"{root}/domain/text")
        if domain is not None:
            self.tokens[f"{root}/domain_kept/text"] = domain

    def of(self, one: Checked) -> StepEstimate:
        """Return the estimate of a step."""
        step, script = one.step, Path(one.step.command[0]).stem
        flags = flags_of(step.command[1:])
        if one.what == "finished":
            return StepEstimate(0.0, 0.0)
        if step.compute is not None:
            return StepEstimate(0.0, LIGHT_SECONDS)
        if script in ("pretrain", "finetune", "fit_scorer", "annotate", "score_tokens"):
            return self._network(one, script)
        tokens = self.tokens.get(flags.get("tokens", flags.get("output", [""]))[0])
        if script == "tokenize_corpus":
            text = self.texts.get(flags["output"][0])
            if tokens is None or text is None:
                return StepEstimate()
            workers = min(int(flags.get("num_workers", [os.cpu_count() or 1])[0]),
                          os.cpu_count() or 1)
            return StepEstimate(2.4 * tokens, self._light() + text.size
                            / READ_BYTES_PER_SECOND / workers)
        if script == "train_tokenizer":
            return StepEstimate(1e6, self._light() + 20)
        if script == "report":
            return StepEstimate(1e6, self._light() + LIGHT_SECONDS)
        if tokens is None:
            return StepEstimate()
        kept = 2.0 * tokens  # scores
        if script == "build_masks":
            rate = float(flags.get("mlm_probability", ["0.15"])[0])
            kept = 4 * rate * tokens * int(flags.get("epochs", ["1"])[0])
        if script == "select_documents":
            kept = 2.4 * tokens if "drop_leaked" in flags else 0.0
        return StepEstimate(kept, self._light() + tokens / ARRAY_TOKENS_PER_SECOND)

    def _light(self) -> float:
        """Seconds of a process that runs no network."""
        if self.options.launcher == "python":
            return 0.5
        return LIGHT_SECONDS if self.measured is None else 0.5 * self.measured.imports

    def _start(self) -> float:
        """Seconds of a training command without its work."""
        assert self.measured is not None
        if self.options.launcher == "python":
            return self.measured.start
        return self.measured.start + (1 + NODE_STARTS) * self.measured.imports

    def _network(self, one: Checked, script: str) -> StepEstimate:
        config, network = one.config, self.network
        if config is None or network is None:
            return StepEstimate()
        work, measured = self._work(config, script, network), self.measured
        if measured is None or work.passes is None:
            return StepEstimate(work.kept, None)
        return StepEstimate(
            work.kept, self._start() + (work.models - 1) * measured.start
            + work.passes / measured.rate + work.updates * measured.update)

    def _work(self, config: Any, script: str, network: EncoderSize) -> Work:
        model, checkpoint = 4.0 * network.parameters, 12.0 * network.parameters
        kept = 0.0 if self.options.clean == "checkpoints" else checkpoint
        if script == "pretrain":
            rows = config.train_batch_size or 32
            masked = 0.15 if config.mask_index else config.mask_rates()[0]
            per_token = network.encoder + masked * network.head
            slots = config.max_steps * rows * config.max_seq_length
            held = config.eval_max_rows * config.max_seq_length * (
                1 + (config.max_steps // config.eval_steps if config.eval_steps else 1))
            many = min(config.save_total_limit, 1 + (
                config.max_steps // config.save_steps if config.save_steps else 0))
            return Work((3 * slots + held) * per_token,
                        model * (1 + len(config.export_steps)) + many * kept, config.max_steps)
        if script == "score_tokens":
            from train.stages.inference import scoring_dtype

            tokens = self.tokens.get(config.tokens)
            times = {"scorer": 1, "gradient": 3, "surprise": config.num_passes or 7,
                     "excess": 2 * (config.num_passes or 7)}[config.measure]
            is_low = scoring_dtype(config.measure, config.dtype) == "bf16"
            weight = 1.0 if is_low else self.exact
            return Work(None if tokens is None else weight * times * tokens * network.encoder,
                        2 * (tokens or 0.0))
        if script == "fit_scorer":
            train, length = self._annotated(config.annotations)
            seen = config.num_train_epochs * train
            return Work(3.2 * seen * length * network.encoder, model,
                        seen / (config.train_batch_size or 32))
        if script == "annotate":
            texts, length = self._annotated(config.output)
            inputs = texts * (length + 4) / 2
            return Work(self.exact * inputs * length * network.encoder, 3 * texts * length)
        train, validation, test, length = self._task(config)
        runs = config.runs() if getattr(config, "also", None) else [config]
        passes, updates, models = 0.0, 0.0, 0
        for each in runs:
            seen = each.num_train_epochs * min(
                train, each.max_train_samples or train, each.label_budget or train)
            held, tested = (min(many, each.max_eval_samples or many)
                            for many in (validation, test))
            seeds, padded = len(each.seed_list()), 1.2 * min(length, each.max_seq_length)
            passes += seeds * padded * network.encoder * (
                3 * seen + held * (
                    1 if each.settled_epoch() == "last" else each.num_train_epochs)
                + self.exact * tested)
            updates += seeds * seen / (each.train_batch_size or 32)
            models += seeds
        return Work(passes, models * model, updates, models)

    def _task(self, config: Any) -> tuple[int, int, int, float]:
        """Return the examples of each split, and their mean length in tokens."""
        files = {name: value for name, value in config.task_files().items()
                 if name not in ("label_budget", "label_seed")}
        key = repr([config.task, files])
        if key not in self._tasks:
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                splits = load_task(config.task, **files).splits
            train = splits["train"]
            size = sum(len(f"{example.aspect or ''} {example.text}".encode()) for example in train)
            ratio = next((self.texts[name].size / tokens for name, tokens in self.tokens.items()
                          if name in self.texts and tokens), BYTES_PER_TOKEN)
            self._tasks[key] = (len(train), len(splits["validation"]), len(splits["test"]),
                                2 + size / max(1, len(train)) / ratio)
        return self._tasks[key]

    def _annotated(self, prefix: str) -> tuple[float, float]:
        """Return the texts that are annotated into a store, and their mean length in tokens."""
        config = self._annotates.get(prefix)
        if config is None:
            return 0.0, 0.0
        train, _, _, length = self._task(config)
        return min(train, config.max_train_samples or train, config.label_budget or train), length
