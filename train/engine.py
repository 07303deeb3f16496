"""The thin layer over DeepSpeed: its JSON, its process group, its engine.

The only importer of deepspeed, and that inside functions (the import takes seconds), so that
`--help` and every check of a user's input come first. The JSON is filled and checked here
before DeepSpeed sees it: it does not know the word "auto" and ignores a misspelt block.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from preprocess.errors import ConfigError, NonFiniteError
from train import ds_schema
from train.config import TrainingConfig

DS_CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"
DEFAULT_LEARNING_RATE = 1e-4
DEFAULT_BATCH = 32
# fp16 steps skipped in a row before a run stops; from a scale of 2^32 to 1 it takes 33.
MAX_SKIPPED_IN_A_ROW = 50
WARMUP_SCHEDULERS = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")


@dataclass(frozen=True)
class Ranks:
    """This process among all: `rank` of `world_size`, `local_rank` on its machine."""

    rank: int
    world_size: int
    local_rank: int


@dataclass(frozen=True)
class Resolved:
    """A DeepSpeed configuration without "auto", and its batch arithmetic.

    `train_batch_size == micro_batch_size * accumulation_steps * world_size` (rows a step).
    `notes` are lines to say to the user; `precision` is fp32, fp16 or bf16.
    """

    config: dict[str, Any]
    micro_batch_size: int
    accumulation_steps: int
    train_batch_size: int
    precision: str
    notes: tuple[str, ...]


def ranks() -> Ranks:
    """Read rank and world size from the launcher's environment; one process without it."""
    return Ranks(
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
    )


def is_main() -> bool:
    """Whether this is the first rank."""
    return ranks().rank == 0


def read_ds_config(path: str | None) -> dict[str, Any]:
    """Read a DeepSpeed JSON; the default depends on whether there is a GPU.

    Raises:
        ConfigError: no such file, not JSON, not an object, or a key or value that is not known.
    """
    default = "zero1_fp16.json" if torch.cuda.is_available() else "cpu.json"
    file = Path(DS_CONFIGS / default if path is None else path)
    if not file.is_file():
        known = ", ".join(sorted(f.name for f in DS_CONFIGS.glob("*.json")))
        raise ConfigError(f"--deepspeed_config {file}: no such file; ds_configs/ has {known}")
    try:
        config = json.loads(
            file.read_text(), object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise ConfigError(f"--deepspeed_config {file}: not valid JSON: too deep") from None
    except ValueError as error:
        raise ConfigError(f"--deepspeed_config {file}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"--deepspeed_config {file}: must hold one JSON object")
    try:
        ds_schema.check(config)
    except ConfigError as error:
        raise ConfigError(f"--deepspeed_config {file}: {error}") from None
    return config


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} appears twice")
        result[key] = value
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON; write a finite one")


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


def _settle_batch(config: dict[str, Any], options: TrainingConfig, world_size: int,
                  default_batch: int) -> tuple[int, int, int]:
    """Solve train = micro * accumulation * world for what is not said."""
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    flags = ("per_device_train_batch_size", "gradient_accumulation_steps", "train_batch_size")
    micro, accumulation, train = (
        _settle(config, name, flag, getattr(options, flag), None)
        for name, flag in zip(names, flags, strict=True)
    )
    for name, value in zip(names, (micro, accumulation, train), strict=True):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)
                                  or value < 1):
            raise ConfigError(f"{name} {value!r}: must be a whole number of 1 or more")
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
    """Which precision the JSON asks for, and what this device has instead."""
    wanted = [name for name in ("fp16", "bf16") if config.get(name, {}).get("enabled")]
    if len(wanted) == 2:
        raise ConfigError("the DeepSpeed JSON enables fp16 and bf16; keep one")
    if not wanted:
        return "fp32", []
    if torch.cuda.is_available():
        if wanted == ["bf16"] and not torch.cuda.is_bf16_supported():
            raise ConfigError("the DeepSpeed JSON asks for bf16, which this GPU lacks; use fp16")
        return wanted[0], []
    if options.precision == "config":
        if wanted == ["bf16"]:
            return "bf16", []  # correct on every CPU, if slow
        raise ConfigError(
            "the DeepSpeed JSON asks for fp16, which this CPU lacks; "
            "type --precision auto to run in fp32"
        )
    del config[wanted[0]]
    return "fp32", [f"no {wanted[0]} on this CPU: running in fp32 (--precision auto)"]


def resolve_ds_config(
    raw: dict[str, Any],
    options: TrainingConfig,
    *,
    total_steps: int,
    world_size: int,
    default_learning_rate: float = DEFAULT_LEARNING_RATE,
    default_warmup_ratio: float = 0.1,
    default_batch: int = DEFAULT_BATCH,
) -> Resolved:
    """Fill every "auto" from the flags and check the result, before any process group starts.

    Args:
        raw: the JSON as read; not changed.
        options: flags; None where the user said nothing.
        total_steps: optimizer steps of the run, for the schedule.
        world_size: number of ranks.
        default_learning_rate, default_warmup_ratio, default_batch: what this command takes where
            neither the JSON nor a flag says anything.
    Raises:
        ConfigError: a contradiction, a bad value, or an "auto" that nothing fills.
    """
    config = json.loads(json.dumps(raw))
    ds_schema.check(config)
    micro, accumulation, train = _settle_batch(config, options, world_size, default_batch)
    _settle(config, "gradient_clipping", "max_grad_norm", options.max_grad_norm, 1.0)
    optimizer = config.setdefault("optimizer", {"type": "AdamW", "params": {}})
    parameters = optimizer.setdefault("params", {})
    _settle(parameters, "lr", "learning_rate", options.learning_rate, default_learning_rate)
    _settle(parameters, "weight_decay", "weight_decay", options.weight_decay, 0.01)
    offload = config.get("zero_optimization", {}).get("offload_optimizer", {})
    if parameters.get("torch_adam") == "auto":
        # DeepSpeed's own CPU Adam is compiled at first use (minutes); torch's is as exact.
        parameters["torch_adam"] = not torch.cuda.is_available()
        if parameters["torch_adam"] and offload:
            config.setdefault("zero_force_ds_cpu_optimizer", False)
    if not torch.cuda.is_available() and offload.get("pin_memory"):
        offload["pin_memory"] = False  # pinning needs a GPU
    precision, notes = _settle_precision(config, options)
    _settle_schedule(config, options, total_steps, default_warmup_ratio, parameters["lr"])
    ds_schema.check_together(config, precision, torch.cuda.is_available())
    return Resolved(config, micro, accumulation, train, precision, tuple(notes))


def _settle_schedule(config: dict[str, Any], options: TrainingConfig, total_steps: int,
                     default_warmup_ratio: float, learning_rate: float) -> None:
    scheduler = config.get("scheduler")
    if scheduler is None:
        scheduler = config["scheduler"] = {"type": "WarmupDecayLR", "params": {}}
    schedule = scheduler.setdefault("params", {})
    if scheduler["type"] not in WARMUP_SCHEDULERS:
        return
    ratio = default_warmup_ratio if options.warmup_ratio is None else options.warmup_ratio
    if schedule.get("warmup_num_steps", "auto") == "auto":
        # DeepSpeed refuses warm-ups below 2 steps: it divides by log(warmup_num_steps).
        schedule["warmup_num_steps"] = max(2, round(ratio * total_steps))
    elif options.warmup_ratio is not None:
        raise ConfigError(
            f"--warmup_ratio {options.warmup_ratio} contradicts warmup_num_steps "
            f'{schedule["warmup_num_steps"]} in the DeepSpeed JSON; drop the flag, or write "auto"'
        )
    schedule.setdefault("warmup_type", "linear")  # DeepSpeed's own default is logarithmic
    if scheduler["type"] != "WarmupCosineLR":
        schedule.setdefault("warmup_min_lr", 0)
        # The schedule's peak is what trains; the optimizer's lr only says it once more.
        _settle(schedule, "warmup_max_lr", "learning_rate", options.learning_rate, learning_rate)
    if scheduler["type"] != "WarmupLR" and schedule.get("total_num_steps", "auto") == "auto":
        # One more than there are, so that the last step still has a rate above 0.
        schedule["total_num_steps"] = max(total_steps, schedule["warmup_num_steps"]) + 1


def supported_precisions() -> dict[str, bool]:
    """Whether DeepSpeed takes fp16 and bf16 on this machine."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    return {"fp16": bool(device.is_fp16_supported()), "bf16": bool(device.is_bf16_supported())}


def start() -> torch.device:
    """Join the process group (idempotent) and pick this rank's device."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    deepspeed.logger.setLevel("ERROR")
    if "RANK" not in os.environ:  # plain `python`: a group of one
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    if not torch.cuda.is_available():
        # On a CPU DeepSpeed would compile a shared-memory all-reduce here (a minute, and a
        # compiler) that only its inference engine uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    if torch.cuda.is_available():
        device = torch.device("cuda", ranks().local_rank)
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def finish() -> None:
    """Leave the process group, so that the process ends without a warning."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def all_reduce_sum(*values: float) -> list[float]:
    """Sum each number over all ranks (float64)."""
    if ranks().world_size == 1:
        return list(map(float, values))
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor)
    return tensor.tolist()


def gather_objects(value: Any) -> list[Any]:
    """Every rank's `value`, in the order of ranks, on every rank."""
    if ranks().world_size == 1:
        return [value]
    gathered: list[Any] = [None] * ranks().world_size
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def barrier() -> None:
    """Wait for all ranks."""
    if ranks().world_size > 1:
        torch.distributed.barrier()


class StopSignal:
    """Notes the first SIGTERM or Ctrl-C, so that the loop can leave a checkpoint first.

    A second one ends the process as usual.
    """

    def __init__(self) -> None:
        self._asked = False
        self._previous = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }

    def _note(self, number: int, frame: Any) -> None:
        self._asked = True
        self.forget()

    def asked_anywhere(self) -> bool:
        """Whether any rank was asked to stop: the same answer on every rank."""
        return all_reduce_sum(float(self._asked))[0] > 0

    def forget(self) -> None:
        """Give the signals back to their former handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def parameter_groups(
    module: torch.nn.Module,
    weight_decay: float,
    head_prefixes: tuple[str, ...] = (),
    head_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Split parameters for the optimizer: biases and norms (one dimension) are not decayed.

    Args:
        head_prefixes: parameters whose names start so go to the groups named "head".
        head_scale: learning rate of the head over that of the encoder.
    Returns:
        Non-empty groups, each with `params`, `weight_decay`, `name` and `lr_scale`.
    """
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            key = (name.startswith(head_prefixes) if head_prefixes else False, parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decayed else 0.0,
            "name": ("head" if in_head else "encoder") + ("" if decayed else "_no_decay"),
            "lr_scale": head_scale if in_head else 1.0,
        }
        for (in_head, decayed), parameters in sorted(groups.items())
    ]


def build_engine(module: torch.nn.Module, groups: list[dict[str, Any]], resolved: Resolved) -> Any:
    """Wrap `module` in a DeepSpeed engine; call `start` before."""
    import deepspeed

    config = json.loads(json.dumps(resolved.config))
    schedule = config["scheduler"].get("params", {})
    if "warmup_max_lr" in schedule:
        schedule["warmup_max_lr"] = [
            schedule["warmup_max_lr"] * group.get("lr_scale", 1.0) for group in groups
        ]
    engine, _, _, _ = deepspeed.initialize(
        model=module,
        model_parameters=groups,
        config=config,
        dist_init_required=False,
    )
    if engine.zero_optimization_stage() == 3:
        for borrower, parameter in getattr(module, "borrowed_parameters", list)():
            deepspeed.zero.register_external_parameter(borrower, parameter)
    if config["scheduler"]["type"] in WARMUP_SCHEDULERS:
        # DeepSpeed would take its first two steps at rate 0: before the schedule has begun, and
        # at its step 0. From here, step n of the run has the rate of the schedule's step n.
        engine.lr_scheduler.step(1)
    return engine


class _LossScaleHistory:
    """The last changes of an engine's loss scale, and the steps it has skipped since the last."""

    def __init__(self) -> None:
        self._changes: deque[tuple[int, float]] = deque(maxlen=8)
        self.skipped_in_a_row = 0

    def note(self, step: int, scale: float) -> None:
        """Step `step` is taken at `scale`."""
        if not self._changes or self._changes[-1][1] != scale:
            self._changes.append((step, scale))

    def __str__(self) -> str:
        return ", ".join(f"{scale:g} from step {step}" for step, scale in self._changes)


_loss_scales: WeakKeyDictionary[Any, _LossScaleHistory] = WeakKeyDictionary()


def take_step(engine: Any) -> Any:
    """`engine.step()`, which never trains on a gradient that is not a number.

    Gradients are reduced over all ranks before this, so every rank finds the same. In fp32 and
    bf16 the run stops. In fp16 an overflow is how the loss scale is found: the step is skipped,
    as long as a lower scale can help.

    Returns:
        Global norm of the gradients before clipping, a number or a tensor `()`; None between
        optimizer steps and for a skipped one.
    Raises:
        NonFiniteError: on every rank; nothing has been updated.
    """
    if not engine.is_gradient_accumulation_boundary():
        return engine.step()
    if engine.fp16_enabled():
        return _take_fp16_step(engine)
    step = engine.global_steps + 1
    norm = None
    if not (engine.zero_optimization_stage() or engine.bfloat16_enabled()):
        # Plain fp32 is the one set-up in which DeepSpeed looks at no gradient.
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
    if norm is None or math.isfinite(norm):
        engine.step()
        if engine.was_step_applied():
            return engine.get_global_grad_norm() if norm is None else norm
    raise NonFiniteError(
        f"the gradient is not a finite number at step {step}; nothing was updated; lower "
        "--learning_rate, lengthen --warmup_ratio, or look at the data of this step"
    )


def _take_fp16_step(engine: Any) -> Any:
    """The fp16 part of `take_step`; a skipped step is bounded, and said with its history."""
    step, scale = engine.global_steps + 1, float(engine.optimizer.loss_scale)
    history = _loss_scales.setdefault(engine, _LossScaleHistory())
    history.note(step, scale)
    dynamic = engine.dynamic_loss_scale()
    floor = engine.dynamic_loss_scale_args()["min_scale"]
    try:
        engine.step()
    except Exception as error:
        if "loss scale already at minimum" not in str(error):
            raise
    else:
        if engine.was_step_applied():
            history.skipped_in_a_row = 0
            return engine.get_global_grad_norm()
    history.skipped_in_a_row += 1
    at_floor = dynamic and scale <= floor
    if not at_floor and history.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
        return None
    where = f"the smallest loss scale, {scale:g}" if at_floor else f"a loss scale of {scale:g}"
    if not dynamic:
        remedy = "set loss_scale in the DeepSpeed JSON to 0, so that it adapts"
    elif floor > 1:
        remedy = f"lower min_loss_scale (now {floor:g}) in the DeepSpeed JSON"
    else:
        remedy = "leave fp16 out of the DeepSpeed JSON (fp32)"
    raise NonFiniteError(
        f"step {step}: the gradients overflow in fp16 at {where} (skipped in a row: "
        f"{history.skipped_in_a_row}); loss scale: {history}; use bf16; or lower --learning_rate "
        f"or lengthen --warmup_ratio; or {remedy}"
    )


def full_state_dict(engine: Any) -> dict[str, torch.Tensor] | None:
    """All parameters and buffers in fp32 on the CPU, from ZeRO 0 to 3; collective.

    The optimizer's fp32 masters are preferred to 16-bit copies. Tied parameters appear once,
    under their first name. None on ranks other than the first.
    """
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    state: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        has_master = hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
        value = safe_get_full_fp32_param(parameter) if has_master else None
        if value is None:
            with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                value = parameter.detach()
        if is_main():
            state[name] = value.detach().to("cpu", torch.float32, copy=True)
    persistent = engine.module.state_dict().keys()
    for name, buffer in engine.module.named_buffers():
        if is_main() and name in persistent:
            state[name] = buffer.detach().to("cpu", copy=True)
    return state if is_main() else None


def save_state(engine: Any, folder: str | Path, client_state: dict[str, Any]) -> None:
    """Write what `load_state` needs to go on bit for bit; collective.

    DeepSpeed's own `latest` file is not written: it may name a checkpoint that is not whole.
    """
    state = {**client_state, "universal_checkpoint_info": {}}
    engine.save_checkpoint(str(folder), tag="state", client_state=state, save_latest=False)
    generators = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators["cuda"] = torch.cuda.get_rng_state()
    torch.save(generators, Path(folder) / f"generators_rank{ranks().rank}.pt")


def load_state(engine: Any, folder: str | Path) -> dict[str, Any]:
    """Load what `save_state` wrote, without running anything that is pickled in it; collective.

    Returns:
        The `client_state`.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    allowed = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]

    class WeightsOnlyEngine(TorchCheckpointEngine):
        """DeepSpeed's file reader, which would otherwise unpickle anything."""

        def load(self, path: str, map_location: Any = None) -> Any:
            with torch.serialization.safe_globals(allowed):
                return torch.load(path, map_location=map_location, weights_only=True)

    engine.checkpoint_engine = WeightsOnlyEngine()
    loaded, client_state = engine.load_checkpoint(str(folder), tag="state")
    assert loaded is not None, f"{folder}: DeepSpeed loaded nothing"
    path = Path(folder) / f"generators_rank{ranks().rank}.pt"
    generators = torch.load(path, weights_only=True)
    torch.set_rng_state(generators["cpu"])
    if torch.cuda.is_available() and "cuda" in generators:
        torch.cuda.set_rng_state(generators["cuda"])
    return client_state
