"""The DeepSpeed JSON: read it, fill "auto", settle batch size, precision and schedule.

It is filled and checked before DeepSpeed sees it, which does not know the word "auto".
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from preprocess.errors import ConfigError
from preprocess.files import read_json
from train.config import TrainingConfig
from train.engine import schema as ds_schema
from train.engine.schedules import settle_schedule
from train.shipped import DS_CONFIGS, find_shipped

DEFAULT_LEARNING_RATE = 1e-4
DEFAULT_BATCH = 32


@dataclass(frozen=True)
class Resolved:
    """A DeepSpeed configuration without "auto", and its batch arithmetic.

    `train_batch_size == micro_batch_size * accumulation_steps * world_size` (rows per step).
    `notes` are lines to report to the user; `precision` is fp32, fp16 or bf16.
    """

    config: dict[str, Any]
    micro_batch_size: int
    accumulation_steps: int
    train_batch_size: int
    precision: str
    notes: tuple[str, ...]

    @property
    def zero_stage(self) -> int:
        return self.config.get("zero_optimization", {}).get("stage", 0)


def read_ds_config(path: str | None) -> dict[str, Any]:
    """Read a DeepSpeed JSON; the default depends on whether there is a GPU.

    Args:
        path: its path, or the name of one of ours.
    Raises:
        ConfigError: no such file, not JSON, not an object, or an unknown key or a bad value.
    """
    default = "zero1_fp16" if torch.cuda.is_available() else "cpu"
    file = find_shipped(default if path is None else path, DS_CONFIGS, "--deepspeed_config")
    config = read_json(file, "correct it", error=ConfigError, name=f"--deepspeed_config {file}")
    try:
        ds_schema.check(config)
    except ConfigError as error:
        raise ConfigError(f"--deepspeed_config {file}: {error}") from None
    return config


def _settle(config: dict[str, Any], key: str, flag: str, given: Any, default: Any) -> Any:
    """Fill config[key] if absent or "auto"; refuse a flag that contradicts a written value."""
    written = config.get(key, "auto")
    if written == "auto":
        config[key] = default if given is None else given
    elif given is not None and given != written:
        raise ConfigError(
            f"--{flag} {given} contradicts {key} {written} in the DeepSpeed JSON; drop the flag, "
            f'or write "auto" there'
        )
    return config[key]


def rows_per_rank(raw: dict[str, Any], options: TrainingConfig, world_size: int) -> int:
    """Return the rows of one rank per step, for a micro batch that is still to be found.

    Raises:
        ConfigError: the JSON or a flag says more about the batch than `train_batch_size`, or that
            is no multiple of the number of ranks.
    """
    config = dict(raw)
    flag = "per_device_train_batch_size"
    _settle(config, "train_micro_batch_size_per_gpu", flag, "auto", None)
    steps = _settle(config, "gradient_accumulation_steps", "gradient_accumulation_steps",
                    options.gradient_accumulation_steps, None)
    if steps:
        raise ConfigError(f"--{flag} auto with gradient_accumulation_steps {steps}: it follows "
                          "from the micro batch; give --train_batch_size instead")
    train = _settle(config, "train_batch_size", "train_batch_size", options.train_batch_size,
                    DEFAULT_BATCH)
    if train % world_size:
        raise ConfigError(f"train_batch_size {train}: must be a multiple of the {world_size} ranks")
    return train // world_size


def _settle_batch(config: dict[str, Any], options: TrainingConfig, world_size: int,
                  default_batch: int) -> tuple[int, int, int]:
    """Solve train = micro * accumulation * world for the sizes that are not given."""
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    flags = ("per_device_train_batch_size", "gradient_accumulation_steps", "train_batch_size")
    micro, accumulation, train = (
        _settle(config, name, flag, getattr(options, flag), None)
        for name, flag in zip(names, flags, strict=True)
    )
    given = (micro, accumulation, train)
    if train is None:
        accumulation = accumulation or 1
        micro = micro or max(1, default_batch // (accumulation * world_size))
        train = micro * accumulation * world_size
    elif micro is None and accumulation is None:
        accumulation = 1
        micro = train // world_size
    elif micro is None:
        micro = train // (accumulation * world_size)
    elif accumulation is None:
        accumulation = train // (micro * world_size)
    if micro * accumulation * world_size != train:
        raise ConfigError(
            f"batch sizes do not fit: micro {given[0]} x accumulation {given[1]} x {world_size} "
            f"ranks must equal train_batch_size {given[2]}; change one of them"
        )
    config.update(zip(names, (micro, accumulation, train), strict=True))
    return micro, accumulation, train


def _settle_precision(config: dict[str, Any], options: TrainingConfig) -> tuple[str, list[str]]:
    """Return the precision of the run, and a note where the device lacks the one asked for."""
    wanted = [name for name in ("fp16", "bf16") if config.get(name, {}).get("enabled")]
    if len(wanted) == 2:
        raise ConfigError("the DeepSpeed JSON enables fp16 and bf16; keep one")
    if not wanted:
        return "fp32", []
    if torch.cuda.is_available():
        if wanted == ["bf16"] and not torch.cuda.is_bf16_supported():
            raise ConfigError("the DeepSpeed JSON asks for bf16, which this GPU lacks; use fp16")
        return wanted[0], []
    if wanted == ["bf16"] and (options.precision == "config" or has_fast_bf16()):
        return "bf16", []  # correct on every CPU, if slow on most
    if options.precision == "config":
        raise ConfigError(
            "the DeepSpeed JSON asks for fp16, which this CPU lacks; "
            "type --precision auto to run in fp32"
        )
    del config[wanted[0]]
    lack = f"no {wanted[0]}" if wanted == ["fp16"] else "no fast bf16"
    return "fp32", [f"{lack} on this CPU: running in fp32 (--precision auto)"]


def has_fast_bf16() -> bool:
    """Return whether this CPU multiplies in bf16: there training takes about half of fp32's time.

    On others bf16 is emulated, and slower than fp32.
    """
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def resolve_ds_config(
    raw: dict[str, Any],
    options: TrainingConfig,
    *,
    total_steps: int | Callable[[int], int],
    world_size: int,
    warmup_of: int | None = None,
    default_learning_rate: float = DEFAULT_LEARNING_RATE,
    default_warmup_ratio: float = 0.1,
    default_batch: int = DEFAULT_BATCH,
) -> Resolved:
    """Fill every "auto" from the flags and check the result, before any process group starts.

    Args:
        raw: the JSON as read; not changed.
        options: flags; None where the user gave none.
        total_steps: optimizer steps of the run, for the schedule; or a function of
            `train_batch_size` that returns them.
        world_size: number of ranks.
        warmup_of: steps that `warmup_ratio` is a share of, if not all.
        default_learning_rate, default_warmup_ratio, default_batch: of this command, where neither
            the JSON nor a flag gives a value.
    Raises:
        ConfigError: a contradiction, a bad value, or an "auto" that nothing fills.
    """
    config = json.loads(json.dumps(raw))
    ds_schema.check(config)
    micro, accumulation, train = _settle_batch(config, options, world_size, default_batch)
    num_steps = total_steps(train) if callable(total_steps) else total_steps
    _settle(config, "gradient_clipping", "max_grad_norm", options.max_grad_norm, 1.0)
    optimizer = config.setdefault("optimizer", {"type": "AdamW", "params": {}})
    parameters = optimizer.setdefault("params", {})
    _settle(parameters, "lr", "learning_rate", options.learning_rate, default_learning_rate)
    _settle(parameters, "weight_decay", "weight_decay", options.weight_decay, 0.01)
    offload = config.get("zero_optimization", {}).get("offload_optimizer", {})
    if parameters.get("torch_adam") == "auto":
        # DeepSpeed's own Adam is compiled at first use (minutes); torch's is as exact. Only for
        # offloaded states on a machine with a GPU is DeepSpeed's the faster one by far.
        parameters["torch_adam"] = not (offload and torch.cuda.is_available())
        if parameters["torch_adam"] and not parameters.get("foreach"):
            parameters.setdefault("fused", True)  # one pass over the weights instead of seven
        if parameters["torch_adam"] and offload:
            config.setdefault("zero_force_ds_cpu_optimizer", False)
    if not torch.cuda.is_available() and offload.get("pin_memory"):
        offload["pin_memory"] = False  # pinning needs a GPU
    precision, notes = _settle_precision(config, options)
    settle_schedule(
        config, options, total_steps=num_steps, warmup_of=warmup_of or num_steps,
        default_warmup_ratio=default_warmup_ratio, learning_rate=parameters["lr"],
    )
    ds_schema.check_together(config, precision, torch.cuda.is_available())
    return Resolved(config, micro, accumulation, train, precision, tuple(notes))
