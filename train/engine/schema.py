"""Which keys and values the DeepSpeed JSON may hold.

DeepSpeed ignores an unknown top-level key, turns text into numbers, and finds most other mistakes
only while it builds its engine: on every rank, after the process group has started, in many lines.
Here they are found first and reported in one sentence. DeepSpeed's own models judge the blocks
that have one; `RULES` holds the rest, and the few values that DeepSpeed accepts but that would
train wrongly. Only what an encoder can use is supported; `REFUSED` gives the reasons.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Iterator
from typing import Any, get_args

import torch

from preprocess.errors import ConfigError
from train.config import Bounds
from train.engine.group import load_deepspeed


def _is_number(value: Any, low: float = 0, high: float = 1e18) -> bool:
    return isinstance(value, (int, float)) and value is not True and value is not False and (
        low <= value <= high)


def _number(low: float, high: float = 1e18, kind: str = "number") -> Bounds:
    bounds = f"of {low:g} or more" if high == 1e18 else f"in [{low:g}, {high:g}]"
    return Bounds(lambda value: _is_number(value, low, high), f"a {kind} {bounds}")


def _whole(low: int, high: float = 1e18) -> Bounds:
    """Build the rule of a whole number; 5e8 is one too."""
    rule = _number(low, high, "whole number")
    return Bounds(lambda value: rule.holds(value) and value == int(value), rule.words)


def _one_of(*values: Any) -> Bounds:
    *first, last = (str(value).lower() if value is True else str(value) for value in values)
    text = f"{', '.join(first)} or {last}" if first else last
    return Bounds(lambda given: any(given == v and type(given) is type(v) for v in values), text)


# DeepSpeed imports the module of such a name.
MODULES = Bounds(lambda value: isinstance(value, list) and all(
    isinstance(name, str) and hasattr(torch.nn, name.removeprefix("torch.nn."))
    and name.startswith("torch.nn.") for name in value),
    "a list of classes of torch.nn, as torch.nn.Linear")
SWITCH = Bounds(lambda value: isinstance(value, bool), "true or false")
NAMES = Bounds(lambda value: isinstance(value, list)
               and all(isinstance(name, str) for name in value), "a list of names in quotes")
COUNT = _whole(1)
BATCH = Bounds(lambda value: type(value) is int and value > 0, COUNT.words)  # 8.0 is none
DTYPE = _one_of("fp32", "fp16", "bf16")
RATE = _number(0, 1e3)
SHARE = _number(0, 1)

SCHEDULERS = {
    "WarmupLR": {"warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type"},
    "WarmupDecayLR": {"warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type",
                      "total_num_steps"},
    "WarmupCosineLR": {"warmup_min_ratio", "cos_min_ratio", "warmup_num_steps", "warmup_type",
                       "total_num_steps"},
    # Ours; see schedules.py.
    "WarmupStableDecayLR": {"warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type",
                            "total_num_steps", "decay_num_steps"},
}

# Full paths. Where a model of DeepSpeed knows the key too, both must accept the value.
RULES = {
    "train_batch_size": BATCH,
    "train_micro_batch_size_per_gpu": BATCH,
    "gradient_accumulation_steps": BATCH,
    "gradient_clipping": _number(0, 1e6),
    "prescale_gradients": SWITCH,
    "gradient_predivide_factor": _number(1e-6, 1e6),
    "communication_data_type": DTYPE,
    "disable_allgather": SWITCH,
    "optimizer.type": Bounds(lambda value: str(value).lower() in ("adam", "adamw"),
                             "Adam or AdamW; no other optimizer is supported here"),
    "optimizer.params.lr": RATE,
    "optimizer.params.weight_decay": SHARE,
    "optimizer.params.betas": Bounds(
        lambda value: isinstance(value, list) and len(value) == 2
        and all(_is_number(beta) and beta < 1 for beta in value), "two numbers in [0, 1)"),
    "optimizer.params.eps": SHARE,
    **dict.fromkeys(
        (f"optimizer.params.{name}" for name in (
            "torch_adam", "adam_w_mode", "fp32_optimizer_states", "bias_correction", "amsgrad",
            "foreach", "fused")), SWITCH),
    "scheduler.type": Bounds(
        lambda value: isinstance(value, str) and value in SCHEDULERS,
        "WarmupLR, WarmupDecayLR, WarmupCosineLR or WarmupStableDecayLR; no other schedule is "
        "supported here"),
    "scheduler.params.warmup_min_lr": RATE,
    "scheduler.params.warmup_max_lr": RATE,
    "scheduler.params.warmup_min_ratio": SHARE,
    "scheduler.params.cos_min_ratio": SHARE,
    "scheduler.params.warmup_num_steps": _whole(0),
    "scheduler.params.total_num_steps": COUNT,
    "scheduler.params.decay_num_steps": COUNT,
    "scheduler.params.warmup_type": _one_of("linear", "log"),
    "fp16.initial_scale_power": _whole(0, 32),
    "fp16.hysteresis": COUNT,  # with 0 the scale never falls
    "fp16.loss_scale_window": COUNT,
    "fp16.min_loss_scale": _whole(1, 2**32),
    # Without these a gradient that is not a number would be trained on.
    "bf16.check_grad_overflow": _one_of(True),
    "zero_optimization.compute_grad_norm": _one_of(True),
    "zero_optimization.stage": _one_of(0, 1, 2, 3),
    "torch_autocast.enabled": SWITCH,
    # float16 would skip steps without counting them.
    "torch_autocast.dtype": _one_of("bfloat16", "bf16"),
    "torch_autocast.lower_precision_safe_modules": MODULES,
    "data_types.grad_accum_dtype": DTYPE,
    "data_types.param_dtype": DTYPE,
    "data_types.buffer_dtype": DTYPE,
    "data_types.keep_in_fp32_modules": NAMES,
    "zero_allow_untested_optimizer": SWITCH,
    "zero_force_ds_cpu_optimizer": SWITCH,
    "checkpoint.tag_validation": _one_of("Ignore", "Warn", "Fail"),
    "steps_per_print": COUNT,
    "wall_clock_breakdown": SWITCH,
    "memory_breakdown": SWITCH,
    "dump_state": SWITCH,
}

# Where "auto" may stand: `resolve_ds_config` fills it.
FILLED = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "optimizer.params.lr", "optimizer.params.weight_decay",
    "optimizer.params.torch_adam", "scheduler.type", "scheduler.params.warmup_max_lr",
    "scheduler.params.warmup_num_steps", "scheduler.params.total_num_steps",
    "scheduler.params.decay_num_steps",
}

REFUSED = {
    **dict.fromkeys(
        ("compression_training", "curriculum_learning", "eigenvalue", "elasticity",
         "graph_harvesting", "nebula", "progressive_layer_drop", "quantize_training",
         "sparse_attention", "sparse_gradients", "zero_optimization.mics_shard_size",
         "zero_optimization.mics_hierarchical_params_gather", "zero_optimization.legacy_stage1",
         "zero_optimization.zeropp_loco_param", "zero_optimization.elastic_checkpoint"),
        "DeepSpeed has removed this; leave it out",
    ),
    **dict.fromkeys(("dataloader_drop_last", "data_efficiency"),
                    "our loader reads the data, so this would do nothing; leave it out"),
    "amp": "DeepSpeed has removed Apex AMP; write fp16 or bf16",
    "bfloat16": "write bf16",
    "activation_checkpointing": "this would do nothing here; give --gradient_checkpointing",
    "compile": "this would do nothing here; give --torch_compile",
    "gradient_allreduce_op": "gradients are always averaged; leave it out",
    "managed_gradient_accumulation": "DeepSpeed must count the micro batches; leave it out",
    "checkpoint.load_universal": "set by us on resuming; leave it out",
    "checkpoint.use_node_local_storage": "a checkpoint is one folder; leave it out",
    "use_node_local_storage": "a checkpoint is one folder; leave it out",
    "optimizer.params.max_grad_norm": "write gradient_clipping at the top level",
    "tensorboard": "the run writes its own event files already; leave it out",
    **dict.fromkeys(
        (f"zero_optimization.offload_{what}.nvme_path" for what in ("optimizer", "param")),
        "offloading to a disk is not supported here; leave it out",
    ),
    "zero_optimization.cpu_offload": 'write "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'write "offload_param": {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": "write pin_memory in the offload block",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save":
        "write stage3_gather_16bit_weights_on_model_save",
    **dict.fromkeys(
        ("aio", "autotuning", "comet", "csv_monitor", "expert_parallel", "flops_profiler",
         "hybrid_engine", "pipeline", "tensor_parallel", "wandb", "weight_quantization", "zenflow",
         "zero_optimization.zenflow", "zero_optimization.pipeline_loading_checkpoint",
         "zero_optimization.save_muon_momentum_buffer_in_memory",
         "zero_optimization.offload_optimizer.super_offload",
         "zero_optimization.offload_optimizer.cpuadam_cores_perc",
         "fp16.fp16_master_weights_and_grads", "bf16.bf16_master_weights_and_grads",
         "bf16.bf16_optimizer_states"),
        "not supported here; leave it out",
    ),
}


def _models() -> dict[str, Any]:
    """Return DeepSpeed's pydantic models, by the path of the block that each validates."""
    load_deepspeed()
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    return {
        "zero_optimization": DeepSpeedZeroConfig, "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config, "comms_logger": CommsLoggerConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
    }


@functools.cache
def known_paths() -> dict[str, dict[str, None]]:
    """Return the keys of every block by the block's path; "" is the top level."""
    blocks: dict[str, dict[str, None]] = {}

    def add(path: str) -> None:
        where, _, key = path.rpartition(".")
        blocks.setdefault(where, {})[key] = None
        if where:
            add(where)

    def add_model(where: str, model: Any) -> None:
        for name, field in model.model_fields.items():
            for key in {name, field.alias or name}:
                if f"{where}.{key}" not in REFUSED:
                    add(f"{where}.{key}")
                    for inner in (field.annotation, *get_args(field.annotation)):
                        if hasattr(inner, "model_fields"):
                            add_model(f"{where}.{key}", inner)

    for path in RULES:
        add(path)
    for where, model in _models().items():
        add_model(where, model)
    return blocks


def check(config: dict[str, Any]) -> None:
    """Check every key and value of a DeepSpeed JSON; "auto" may stand where we fill it.

    Raises:
        ConfigError: the path of the first mistake, the value given and what is allowed.
    """
    _check_block(config, "")
    for name in ("optimizer", "scheduler"):
        if "type" not in config.get(name, {"type": ""}):
            raise ConfigError(f"{name}.type is missing: must be {RULES[f'{name}.type'].words}")
    scheduler = config.get("scheduler", {})
    known = SCHEDULERS.get(scheduler.get("type"), set().union(*SCHEDULERS.values()))  # "auto": any
    for key in scheduler.get("params", {}):
        if key not in known:
            raise ConfigError(
                f"unknown key 'scheduler.params.{key}' of {scheduler['type']}; remove it")
    for path, model in _models().items():
        block: Any = config
        for part in path.split("."):
            block = block.get(part, {})
        _ask_deepspeed(model, block, path)


def _check_block(block: dict[str, Any], where: str) -> None:
    known = known_paths()
    for key, value in block.items():
        path = f"{where}.{key}" if where else key
        if path in REFUSED:
            raise ConfigError(f"{path}: {REFUSED[path]}")
        if key not in known[where]:
            raise ConfigError(f"unknown key {path!r}; {_hint(key, where)}")
        if value == "auto" or (isinstance(value, list) and "auto" in value):
            if path not in FILLED:
                raise ConfigError(f'the DeepSpeed JSON has "auto" at {path}, which we cannot fill; '
                                  "write a value there")
        elif path in known:
            if not isinstance(value, dict):
                raise ConfigError(f"{path} {_shown(value)}: must be an object in braces")
            _check_block(value, path)
        elif path in RULES and not RULES[path].holds(value):
            hint = "; write it without quotes" if _is_quoted(value, RULES[path]) else ""
            raise ConfigError(f"{path} {_shown(value)}: must be {RULES[path].words}{hint}")


def _ask_deepspeed(model: Any, block: dict[str, Any], where: str) -> None:
    """Let DeepSpeed's own model judge a block, and refuse what it would convert."""
    try:
        read = model(**block)
    except ValueError as error:
        first: dict[str, Any] = error.errors()[0]  # type: ignore[attr-defined]
        path = ".".join([where, *map(str, first["loc"])])
        value = f" {_shown(first['input'])}" if first["loc"] else ""
        said = first["msg"].replace("Input should be", "must be").removeprefix("Value error, ")
        raise ConfigError(f"{path}{value}: {said.removeprefix('Assertion failed, ')}") from None
    for path, given, taken in _taken(block, read, where):
        raise ConfigError(f"{path} {_shown(given)}: DeepSpeed would take it as "
                          f"{json.dumps(taken, default=str)}; write that")


def _taken(block: dict[str, Any], read: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield what DeepSpeed reads as another kind of value: text as a number, 1 as true."""
    names = {field.alias or name: name for name, field in type(read).model_fields.items()}
    for key, given in block.items():
        taken = getattr(read, names.get(key, key))
        if isinstance(given, dict):
            yield from _taken(given, taken, f"{where}.{key}")
        elif _kind(given) != _kind(taken):
            yield f"{where}.{key}", given, taken


def _kind(value: Any) -> type:
    return float if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value)


def _is_quoted(value: Any, rule: Bounds) -> bool:
    """Whether the text would be right without its quotes."""
    try:
        return isinstance(value, str) and rule.holds(json.loads(value))
    except ValueError:
        return False


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _hint(key: str, where: str) -> str:
    known = known_paths()
    near = difflib.get_close_matches(key.lower(), known[where], n=1)
    # A key of another block, as "stage" at the top level.
    near = near or [f"{block}.{key}" for block, keys in known.items() if key in keys][:1]
    return f"did you mean {near[0]!r}?" if near else "remove it"


def check_together(config: dict[str, Any], precision: str, has_gpu: bool) -> None:
    """Refuse values that are right alone but not together; after every "auto" has been filled.

    Args:
        precision: fp32, fp16 or bf16: the precision of the run.
    Raises:
        ConfigError: with both values.
    """
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    autocast, types = config.get("torch_autocast", {}), config.get("data_types", {})
    parameters = types.get("param_dtype", precision)
    gradients = types.get("grad_accum_dtype", precision)
    for wrong, message in (
        (precision == "fp16" and stage == 0,
         "fp16 with zero_optimization.stage 0: DeepSpeed 0.19 divides the gradients by the loss "
         "scale without having multiplied the loss; write stage 1"),
        (autocast.get("enabled") and precision != "fp32",
         f"the DeepSpeed JSON enables torch_autocast and {precision}; keep one"),
        (autocast.get("enabled") and "dtype" not in autocast,
         'torch_autocast.dtype is missing: write "bfloat16"'),
        (parameters != precision,
         f"data_types.param_dtype {parameters!r}: the run is in {precision}; leave it out"),
        (gradients != precision and (stage == 0 or precision == "fp32"),
         f"data_types.grad_accum_dtype {gradients!r}: with precision {precision} and "
         f"zero_optimization.stage {stage} it must be {precision!r}; leave it out"),
    ):
        if wrong:
            raise ConfigError(message)
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights",
                "zero_quantized_gradients"):
        if zero.get(key) and not (stage == 3 and has_gpu):
            raise ConfigError(f"zero_optimization.{key}: needs stage 3 and a GPU")
    for name, needed in (("offload_optimizer", 1), ("offload_param", 3)):
        device = zero.get(name, {}).get("device", "none")
        if device == "nvme":
            raise ConfigError(f"zero_optimization.{name}.device 'nvme': not supported here; write "
                              "cpu")
        if device != "none" and stage < needed:
            raise ConfigError(
                f"zero_optimization.{name} with stage {stage}: needs stage {needed} or more"
            )
    adam = config["optimizer"].get("params", {})
    torchs = bool(adam.get("torch_adam"))
    for key in ("bias_correction",) if torchs else ("amsgrad", "foreach", "fused"):
        if key in adam:
            raise ConfigError(
                f"optimizer.params.{key} with torch_adam {str(torchs).lower()}: only the Adam "
                f"of {'DeepSpeed' if torchs else 'torch'} has it; leave it out"
            )
    schedule = config["scheduler"].get("params", {})
    for low, high in (("warmup_num_steps", "total_num_steps"),
                      ("decay_num_steps", "total_num_steps"), ("warmup_min_lr", "warmup_max_lr")):
        if low in schedule and high in schedule and schedule[low] > schedule[high]:
            raise ConfigError(
                f"scheduler.params: {low} {schedule[low]} is more than {high} {schedule[high]}; "
                "change one of them"
            )
