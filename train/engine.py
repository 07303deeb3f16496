"""The thin layer over DeepSpeed: its JSON, its process group, its engine.

The only importer of deepspeed, and that inside functions (the import takes seconds), so that
`--help` and every check of a user's input come first. The JSON is filled and checked here
before DeepSpeed sees it: it does not know the word "auto" and ignores a misspelt block.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import pickle
import shutil
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from preprocess.errors import ConfigError, DataError, NonFiniteError, writing
from train import ds_schema
from train.config import TrainingConfig

DS_CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"
DEFAULT_LEARNING_RATE = 1e-4
DEFAULT_BATCH = 32
# fp16 steps skipped in a row before a run stops; from a scale of 2^32 to 1 it takes 33.
MAX_SKIPPED_IN_A_ROW = 50
# DeepSpeed's launcher looks once a second whether a rank has ended.
LAUNCHER_POLL_SECONDS = 3
# Within it a node sees what another one wrote: NFS keeps what it knows of a folder for up to 60 s.
SHARED_DISK_SECONDS = 90.0
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
        if parameters["torch_adam"] and not parameters.get("foreach"):
            parameters.setdefault("fused", True)  # one pass over the weights instead of seven
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
    if scheduler["type"] == "WarmupLR":
        return
    if schedule.get("total_num_steps", "auto") == "auto":
        # One more than there are, so that the last step still has a rate above 0.
        schedule["total_num_steps"] = max(total_steps, schedule["warmup_num_steps"]) + 1
    elif schedule["total_num_steps"] < total_steps:
        raise ConfigError(
            f"total_num_steps {schedule['total_num_steps']} in the DeepSpeed JSON ends the "
            f'schedule before the {total_steps} steps of this run; write "auto" there'
        )


def supported_precisions() -> dict[str, bool]:
    """Whether DeepSpeed takes fp16 and bf16 on this machine."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    return {"fp16": bool(device.is_fp16_supported()), "bf16": bool(device.is_bf16_supported())}


def start() -> torch.device:
    """Join the process group (idempotent) and pick this rank's device.

    Raises:
        ConfigError: the others did not come within DeepSpeed's 10 minutes, or the port is taken.
    """
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
    try:
        deepspeed.init_distributed(verbose=False)
    except torch.distributed.DistError as error:
        here, first = ranks(), (str(error).splitlines() or [type(error).__name__])[0]
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConfigError(
            f"rank {here.rank} of {here.world_size} found no process group at {where} ({first}); "
            f"look at what the other nodes said, and give a --master_addr that they reach and a "
            f"free --master_port"
        ) from None
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


def nodes_without(folder: Path) -> list[str]:
    """Return the hosts that do not see what rank 0 writes to `folder`; collective.

    A network disk may show a new file late, so a host that misses it looks for a while.
    """
    if ranks().world_size == 1:
        return []
    # A new name: a network disk also remembers for a while that there was no such file.
    name = gather_objects(f".seen-{time.time_ns()}.tmp-{os.getpid()}")[0]
    path = folder / name
    if is_main():
        with writing(folder):
            path.touch()
    barrier()
    end = time.monotonic() + SHARED_DISK_SECONDS
    first_here = ranks().local_rank == 0
    while first_here and not path.exists() and time.monotonic() < end:
        time.sleep(0.5)
    found = gather_objects((socket.gethostname(), path.exists() or not first_here))
    if is_main():
        path.unlink()
    return sorted({host for host, seen in found if not seen})


def is_started() -> bool:
    """Whether this process has joined the process group."""
    return torch.distributed.is_initialized()


def barrier() -> None:
    """Wait for all ranks."""
    if ranks().world_size > 1:
        torch.distributed.barrier()


class StopSignal:
    """Notes that somebody asked this run to stop, so that the loop can leave a checkpoint first.

        with StopSignal() as stop:
            for step in ...:
                ...
                if stop.asked_anywhere(): save, and raise StopRequested

    SIGTERM and SIGUSR1, to any rank and however often, and the first Ctrl-C are requests; a second
    Ctrl-C interrupts as usual. All ranks take the decision together, at a step boundary.

    What launchers do with signals, since a request has to reach a rank to be one:
    - Slurm (`scancel`, the end of the time limit, `--signal=TERM@60`) signals every process of a
      job step, ranks included. SIGUSR1 has the drawback of ending the launchers below.
    - `deepspeed`, the runner, has no handler on one node: SIGTERM ends it and leaves the ranks
      running. Ctrl-C in a terminal reaches the ranks themselves as well.
    - `deepspeed.launcher.launch`, its child and the parent of the ranks, answers SIGTERM and
      Ctrl-C by SIGTERM to its ranks one after the other, gives each 30 seconds before SIGKILL, and
      ends with code 1 whatever theirs are. It answers SIGUSR1 by its own end.
    - When a rank has ended with an error, `launch` (within a second) and `torchrun` send the others
      the same SIGTERM. That is no request: a step without that rank cannot be finished, and a rank
      that waits for it on a GPU would wait for ever. So a thread of each rank looks, on SIGTERM,
      whether a process beside it under the same launcher is gone, and ends this one if so.

    Entering is collective.
    """

    def __init__(self) -> None:
        self._asked = self._interrupted = False
        self._neighbours: list[tuple[int, str]] = []
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        me = _process_identity(os.getpid())
        everyone = gather_objects((os.getpid(), me, _whereabouts()))
        self._neighbours = [
            (pid, identity) for pid, identity, place in everyone
            if place == _whereabouts() and pid != os.getpid()
        ]
        # The byte of a signal is written at once, even while the main thread waits in C.
        self._alarm, self._bell = os.pipe()
        os.set_blocking(self._bell, False)
        self._old_bell = signal.set_wakeup_fd(self._bell, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(self._alarm,), daemon=True).start()
        self._previous = {
            number: signal.signal(number, self._note)
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        }
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, NonFiniteError):
            self._wait_for_the_launcher()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_bell)
        os.close(self._bell)  # `_watch` reads the end of the pipe and returns

    def _wait_for_the_launcher(self) -> None:
        """If a collective failed because another rank has ended, wait for SIGTERM and `_watch`.

        The launcher reports the first error that it finds: leave that to the rank that had one.
        """
        for _ in range(20 if self._neighbours else 0):
            if self._someone_is_gone():
                time.sleep(LAUNCHER_POLL_SECONDS)
                return
            time.sleep(0.05)  # a process closes its sockets a moment before it counts as ended

    def asked_anywhere(self) -> bool:
        """Whether any rank was asked to stop: the same answer on every rank."""
        return all_reduce_sum(float(self._asked))[0] > 0

    def _note(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = self._interrupted or number == signal.SIGINT
        self._asked = True

    def _watch(self, alarm: int) -> None:
        with os.fdopen(alarm, "rb", buffering=0) as stream:
            while numbers := stream.read(64):
                if signal.SIGTERM in numbers and self._someone_is_gone():
                    text = (f"rank {ranks().rank}: another rank has ended; this one ends too, "
                            "without a checkpoint; the same command goes on from the last one\n")
                    os.write(2, text.encode())
                    os._exit(1)

    def _someone_is_gone(self) -> bool:
        return any(_process_identity(pid) != identity for pid, identity in self._neighbours)


def _whereabouts() -> tuple[str, str, int]:
    """Machine, process namespace and launcher of this process: those alike see each other."""
    namespace = Path("/proc/self/ns/pid")
    return (
        socket.gethostname(), os.readlink(namespace) if namespace.exists() else "", os.getppid()
    )


def _process_identity(pid: int) -> str:
    """When a process started, in kernel ticks; "" if it has ended or cannot be told."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


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
    if ranks().world_size == 1 and resolved.precision == "fp32" and not engine.zero_optimization():
        # One rank has nothing to reduce, and DeepSpeed would copy all gradients there and back.
        engine.enable_backward_allreduce = False
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


GENERATORS = "generators_rank{rank}.pt"
# Optimizers whose state is a first and a second moment, which is what DeepSpeed can convert.
CONVERTIBLE = ("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam", "FusedLamb")


def describe(engine: Any) -> dict[str, Any]:
    """What of the DeepSpeed JSON decides which states there are."""
    precision = "fp16" if engine.fp16_enabled() else "bf16" if engine.bfloat16_enabled() else "fp32"
    return {
        "ZeRO stage": int(engine.zero_optimization_stage()), "precision": precision,
        "optimizer": type(engine.basic_optimizer).__name__,
    }


def save_state(
    engine: Any, folder: str | Path, client_state: dict[str, Any],
    seal: Callable[[Path], AbstractContextManager[None]],
) -> None:
    """Write what `load_state` needs to go on bit for bit; collective.

    DeepSpeed's own `latest` file is not written: it may name a checkpoint that is not whole.

    Args:
        seal: entered around the writing of each file of this rank, from its first byte to its
            last. What DeepSpeed writes besides (scripts, offloaded tensors) does not pass it.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    class SealingEngine(TorchCheckpointEngine):
        """DeepSpeed's file writer; synchronous, whatever the JSON asks for."""

        def save(self, state_dict: Any, path: str) -> None:
            with writing(path, _num_bytes(state_dict)), seal(Path(path)):
                torch.save(state_dict, path)

    engine.checkpoint_engine = SealingEngine()
    # The converter to other numbers of ranks asks for this entry.
    state = {**client_state, "universal_checkpoint_info": {}}
    engine.save_checkpoint(str(folder), tag="state", client_state=state, save_latest=False)
    generators = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators["cuda"] = torch.cuda.get_rng_state()
    path = Path(folder) / GENERATORS.format(rank=ranks().rank)
    with writing(path), seal(path):
        torch.save(generators, path)


def _num_bytes(state: Any) -> int:
    """Bytes of the tensors in nested dictionaries and lists; shared memory counts once."""
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for inner in value.values():
                visit(inner)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                visit(inner)

    visit(state)
    return sum(storages.values())


def load_state(engine: Any, folder: str | Path, world_size: int) -> dict[str, Any]:
    """Load what `save_state` wrote, without running anything that is pickled in it; collective.

    At the same number of ranks everything goes on bit for bit. At another one parameters, moments,
    schedule and loss scaler are those that were saved, shared out anew; so are the batches, which
    do not depend on the ranks. Dropout differs: rank r draws from a generator seeded by the saved
    state of rank 0, the number of ranks and r, the same each time.

    Args:
        world_size: number of ranks that wrote it.
    Returns:
        The `client_state`.
    Raises:
        ConfigError: an optimizer that cannot be converted to another number of ranks.
        DataError: a file holds something other than tensors and plain values.
    """
    here = ranks()
    folder = Path(folder)
    same = world_size == here.world_size
    with _safe_torch_load(engine):
        if same or not engine.zero_optimization():
            # Without ZeRO every rank has every state.
            loaded, client_state = engine.load_checkpoint(str(folder), tag="state")
            assert loaded is not None, f"{folder}: DeepSpeed loaded nothing"
        else:
            client_state = _load_converted(engine, folder)
        generators = torch.load(
            folder / GENERATORS.format(rank=here.rank if same else 0), weights_only=True
        )
    torch.set_rng_state(generators["cpu"])
    if torch.cuda.is_available() and "cuda" in generators:
        torch.cuda.set_rng_state(generators["cuda"])
    if not same:
        drawn = int(torch.randint(2**62, ()))
        seed = np.random.SeedSequence([drawn, here.world_size, here.rank]).generate_state(1)
        torch.manual_seed(int(seed[0]))
    return client_state


@contextmanager
def _safe_torch_load(engine: Any) -> Iterator[None]:
    """Let nothing in this process unpickle more than tensors, plain values and a few of DeepSpeed.

    DeepSpeed reads its own files, and those that its converter makes of them, with
    `weights_only=False`; a pickle can run any code. The names of parameters become paths there, so
    names that are not of this model are refused as well.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    allowed = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    known = {name for name, _ in engine.module.named_parameters()}
    known.update(name for name, _ in engine.module.named_buffers())
    known.update(engine.module.state_dict())
    plain = torch.load

    def safe(file: Any, *words: Any, **names: Any) -> Any:
        names["weights_only"] = True
        try:
            with torch.serialization.safe_globals(allowed):
                state = plain(file, *words, **names)
        except pickle.UnpicklingError:
            raise DataError(
                f"{file}: holds something other than tensors and plain values, which could run "
                "code and is never loaded; delete this checkpoint"
            ) from None
        strange = _parameter_names(state) - known
        if strange:
            raise DataError(f"{file}: names {min(strange)!r}, which is no parameter of this model")
        return state

    torch_module: Any = torch
    torch_module.load = safe
    try:
        yield
    finally:
        torch_module.load = plain


def _parameter_names(state: Any) -> set[str]:
    """Every name of a parameter or buffer in a file of DeepSpeed's."""
    if not isinstance(state, dict):
        return set()
    optimizer = state.get("optimizer_state_dict") or {}
    groups = [state.get("module") or {}, *(state.get("param_shapes") or []),
              *(optimizer.get("param_slice_mappings") or [])]
    return {name for group in groups for name in group}


def _load_converted(engine: Any, folder: Path) -> dict[str, Any]:
    """Load the ZeRO states of another number of ranks by way of DeepSpeed's universal format.

    Rank 0 makes it beside the checkpoint (12 bytes a parameter, for a while twice that) and
    removes it when all ranks have read it.
    """
    kind = type(engine.basic_optimizer).__name__
    amsgrad = any(group.get("amsgrad") for group in engine.basic_optimizer.param_groups)
    if kind not in CONVERTIBLE or amsgrad:
        raise ConfigError(
            f"{folder}: the states of the optimizer {kind} cannot be shared out anew (those of "
            f"{', '.join(CONVERTIBLE)} without amsgrad can); start as many ranks as wrote it"
        )
    universal = folder.with_name(f"{folder.name}.universal.tmp")
    if is_main():
        shutil.rmtree(universal, ignore_errors=True)
        _convert(folder / "state", universal / "state")
    barrier()
    engine._config.load_universal_checkpoint = True
    try:
        loaded, client_state = engine.load_checkpoint(str(universal), tag="state")
        assert loaded is not None, f"{universal}: DeepSpeed loaded nothing"
        if engine.zero_optimization_stage() == 3:
            # DeepSpeed gives every group the settings of the first: no decay, the encoder's rate.
            saved = torch.load(universal / "state" / "zero" / "optimizer_state.pt",
                               map_location="cpu", weights_only=True)
            for group, values in zip(engine.optimizer.param_groups, saved["param_groups"],
                                     strict=True):
                group.update({key: value for key, value in values.items() if key != "params"})
            # And all of them one tensor to count their steps, which each then adds to.
            for state in engine.basic_optimizer.state.values():
                if isinstance(state.get("step"), torch.Tensor):
                    state["step"] = state["step"].clone()
    finally:
        engine._config.load_universal_checkpoint = False
    barrier()
    if is_main():
        shutil.rmtree(universal)
    return client_state


def _convert(source: Path, target: Path) -> None:
    """Run DeepSpeed's converter in this process, where `_safe_torch_load` holds."""
    from deepspeed.checkpoint import ds_to_universal

    options = argparse.Namespace(
        input_folder=str(source), output_folder=str(target), num_extract_workers=1,
        num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=False,
    )
    chatter = io.StringIO()
    with writing(target), redirect_stdout(chatter), redirect_stderr(chatter):
        target.mkdir(parents=True)
        try:
            ds_to_universal.main(options)
        except KeyError as error:
            raise DataError(
                f"{source}: the optimizer has no state {error} yet, so it cannot be converted; "
                "start as many ranks as wrote it"
            ) from None
