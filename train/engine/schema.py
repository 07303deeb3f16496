"""What the DeepSpeed JSON may hold: the keys of each block, and the values of each key.

DeepSpeed itself takes an unknown top-level key in silence, turns text into numbers, and finds
most other mistakes only when its engine is built: on every rank, after the process group has
started, in many lines. Here they are found first and said in one sentence. Only what an encoder
can use is listed; what DeepSpeed would ignore or has removed is refused, with the reason.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any, NamedTuple

from preprocess.errors import ConfigError


class Rule(NamedTuple):
    """Which values a key may have, and that in words: "must be ..."."""

    allowed: str
    accepts: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(low: float, high: float = 1e18) -> Rule:
    bounds = f"of {low:g} or more" if high == 1e18 else f"in [{low:g}, {high:g}]"
    return Rule(f"a number {bounds}", lambda value: _is_number(value) and low <= value <= high)


def _whole(low: int, high: float = 1e18) -> Rule:
    """A whole number; 5e8 is one too."""
    bounds = f"of {low} or more" if high == 1e18 else f"in [{low}, {high:g}]"
    return Rule(
        f"a whole number {bounds}",
        lambda value: _is_number(value) and low <= value <= high and value == int(value),
    )


def _one_of(*values: Any) -> Rule:
    *first, last = (str(value).lower() if value is True else str(value) for value in values)
    text = f"{', '.join(first)} or {last}" if first else last
    return Rule(text, lambda given: any(given == v and type(given) is type(v) for v in values))


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_betas(value: Any) -> bool:
    return (isinstance(value, list) and len(value) == 2
            and all(_is_number(beta) and 0 <= beta < 1 for beta in value))


SWITCH = Rule("true or false", lambda value: isinstance(value, bool))
TEXT = Rule("text in quotes", lambda value: isinstance(value, str))
ANYTHING = Rule("anything", lambda value: True)
NAMES = Rule("a list of names in quotes", _is_names)
COUNT = _whole(1)
SIZE = _whole(0)
DTYPE = _one_of("fp32", "fp16", "bf16")
SCHEDULERS: dict[str, dict[str, Rule]] = {
    "WarmupLR": {
        "warmup_min_lr": _number(0, 1e3), "warmup_max_lr": _number(0, 1e3),
        "warmup_num_steps": SIZE, "warmup_type": _one_of("linear", "log"),
    },
    "WarmupCosineLR": {
        "total_num_steps": COUNT, "warmup_min_ratio": _number(0, 1), "warmup_num_steps": SIZE,
        "cos_min_ratio": _number(0, 1), "warmup_type": _one_of("linear", "log"),
    },
    "OneCycle": {
        "cycle_min_lr": _number(0, 1e3), "cycle_max_lr": _number(0, 1e3),
        "decay_lr_rate": _number(0), "cycle_first_step_size": COUNT,
        "cycle_second_step_size": COUNT, "cycle_first_stair_count": SIZE,
        "cycle_second_stair_count": SIZE, "decay_step_size": SIZE, "cycle_momentum": SWITCH,
        "cycle_min_mom": _number(0, 1), "cycle_max_mom": _number(0, 1),
        "decay_mom_rate": _number(0),
    },
    "LRRangeTest": {
        "lr_range_test_min_lr": _number(0, 1e3), "lr_range_test_step_size": COUNT,
        "lr_range_test_step_rate": _number(0), "lr_range_test_staircase": SWITCH,
    },
}
SCHEDULERS["WarmupDecayLR"] = {"total_num_steps": COUNT, **SCHEDULERS["WarmupLR"]}

# DeepSpeed's own optimizers, in lower case; any other type is looked up in torch.optim.
OPTIMIZERS = ("adam", "adamw", "adagrad", "lamb", "lion")
_RATES: dict[str, Rule] = {"lr": _number(0, 1e3), "weight_decay": _number(0, 1)}
_ADAM = {
    **_RATES, "betas": Rule("two numbers in [0, 1)", _is_betas), "eps": _number(0, 1),
    "torch_adam": SWITCH, "adam_w_mode": SWITCH, "fp32_optimizer_states": SWITCH,
}
_TORCH_ADAM = {"amsgrad": SWITCH, "foreach": SWITCH, "fused": SWITCH}
_OWN_ADAM = {"bias_correction": SWITCH}
OPTIMIZER_PARAMS: dict[str, dict[str, Rule]] = {
    "adagrad": {**_RATES, "eps": _ADAM["eps"], "lr_decay": _number(0),
                "initial_accumulator_value": _number(0)},
    "lamb": {**_RATES, "betas": _ADAM["betas"], "eps": _ADAM["eps"], "bias_correction": SWITCH,
             "eps_inside_sqrt": SWITCH, "max_coeff": _number(0), "min_coeff": _number(0)},
    "lion": {**_RATES, "betas": _ADAM["betas"], "fp32_optimizer_states": SWITCH},
}

OFFLOAD: dict[str, Rule] = {
    "device": _one_of("none", "cpu", "nvme"), "nvme_path": TEXT, "buffer_count": SIZE,
    "pin_memory": SWITCH,
}
STAGE_3: dict[str, Rule] = {  # with "stage3_" before them, or without
    "prefetch_bucket_size": SIZE, "param_persistence_threshold": SIZE,
    "model_persistence_threshold": SIZE, "max_live_parameters": SIZE, "max_reuse_distance": SIZE,
    "gather_16bit_weights_on_model_save": SWITCH, "module_granularity_threshold": SIZE,
    "use_all_reduce_for_fetch_params": SWITCH, "allgather_sequential": SWITCH,
}
MONITOR = {"enabled": SWITCH, "output_path": TEXT, "job_name": TEXT}

# A block is a dictionary. "optimizer.params" and "scheduler.params" depend on the type.
SCHEMA: dict[str, Any] = {
    "train_batch_size": COUNT,
    "train_micro_batch_size_per_gpu": COUNT,
    "gradient_accumulation_steps": COUNT,
    "gradient_clipping": _number(0, 1e6),
    "prescale_gradients": SWITCH,
    "gradient_predivide_factor": _number(1e-6, 1e6),
    "communication_data_type": DTYPE,
    "disable_allgather": SWITCH,
    "optimizer": {"type": TEXT, "params": {}},
    "scheduler": {"type": TEXT, "params": {}},
    "fp16": {
        "enabled": SWITCH, "auto_cast": SWITCH, "loss_scale": _number(0, 2**32),
        "initial_scale_power": _whole(0, 32), "loss_scale_window": COUNT, "hysteresis": COUNT,
        "consecutive_hysteresis": SWITCH, "min_loss_scale": _whole(1, 2**32),
    },
    "bf16": {
        "enabled": SWITCH, "immediate_grad_update": SWITCH,
        # Else a gradient that is not a number would be trained on.
        "check_grad_overflow": _one_of(True),
    },
    # float16 here would skip steps without counting them.
    "torch_autocast": {
        "enabled": SWITCH, "dtype": _one_of("bfloat16", "bf16"),
        "lower_precision_safe_modules": NAMES,
    },
    "data_types": {
        "grad_accum_dtype": DTYPE, "param_dtype": DTYPE, "buffer_dtype": DTYPE,
        "keep_in_fp32_modules": NAMES,
    },
    "zero_optimization": {
        "stage": _one_of(0, 1, 2, 3), "contiguous_gradients": SWITCH, "reduce_scatter": SWITCH,
        "reduce_bucket_size": COUNT, "use_multi_rank_bucket_allreduce": SWITCH,
        "allgather_partitions": SWITCH, "allgather_bucket_size": SIZE, "overlap_comm": SWITCH,
        # The norm shows a gradient that is not a number.
        "compute_grad_norm": _one_of(True),
        "load_from_fp32_weights": SWITCH,
        "offload_param": {**OFFLOAD, "buffer_size": SIZE, "max_in_cpu": SIZE},
        "offload_optimizer": {
            **OFFLOAD, "pipeline_read": SWITCH, "pipeline_write": SWITCH, "fast_init": SWITCH,
            "ratio": _number(0, 1),
        },
        "sub_group_size": SIZE, **STAGE_3, **{f"stage3_{key}": STAGE_3[key] for key in STAGE_3},
        "ignore_unused_parameters": SWITCH, "round_robin_gradients": SWITCH,
        "parameter_alignment": SWITCH, "zero_hpz_partition_size": COUNT,
        "zero_quantized_weights": SWITCH, "zero_quantized_nontrainable_weights": SWITCH,
        "zero_quantized_gradients": SWITCH, "memory_efficient_linear": SWITCH,
        "override_module_apply": SWITCH, "log_trace_cache_warnings": SWITCH,
        "enable_sanity_checks": SWITCH,
        "leaf_module": {"classes": NAMES, "names": NAMES, "name_suffixes": NAMES},
    },
    "zero_allow_untested_optimizer": SWITCH,
    "zero_force_ds_cpu_optimizer": SWITCH,
    "aio": {
        "block_size": COUNT, "queue_depth": COUNT, "intra_op_parallelism": COUNT,
        "single_submit": SWITCH, "overlap_events": SWITCH, "use_gds": SWITCH,
    },
    "checkpoint": {"tag_validation": _one_of("Ignore", "Warn", "Fail")},
    "steps_per_print": COUNT,
    "wall_clock_breakdown": SWITCH,
    "memory_breakdown": SWITCH,
    "dump_state": SWITCH,
    "timers": {"throughput": {"enabled": SWITCH, "synchronized": SWITCH}},
    "comms_logger": {
        "enabled": SWITCH, "prof_all": SWITCH, "prof_ops": NAMES, "verbose": SWITCH,
        "debug": SWITCH,
    },
    "flops_profiler": {
        "enabled": SWITCH, "recompute_fwd_factor": _number(0), "profile_step": COUNT,
        "module_depth": _whole(-1), "top_modules": COUNT, "detailed": SWITCH, "output_file": TEXT,
    },
    "tensorboard": MONITOR,
    "csv_monitor": MONITOR,
    "wandb": {"enabled": SWITCH, "group": TEXT, "team": TEXT, "project": TEXT},
    "comet": {
        "enabled": SWITCH, "samples_log_interval": COUNT, "project": TEXT, "workspace": TEXT,
        "api_key": TEXT, "experiment_name": TEXT, "experiment_key": TEXT, "online": SWITCH,
        "mode": TEXT,
    },
}

# Where "auto" may stand: `engine.resolve_ds_config` fills it.
FILLED = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "optimizer.params.lr", "optimizer.params.weight_decay",
    "optimizer.params.torch_adam", "scheduler.params.warmup_max_lr",
    "scheduler.params.warmup_num_steps", "scheduler.params.total_num_steps",
}

_REMOVED = "DeepSpeed has removed this; leave it out"
_OWN_LOADER = "our loader reads the data, so this would do nothing; leave it out"
REFUSED = {
    **dict.fromkeys(
        ("compression_training", "curriculum_learning", "eigenvalue", "elasticity",
         "graph_harvesting", "nebula", "progressive_layer_drop", "quantize_training",
         "sparse_attention", "sparse_gradients", "zero_optimization.mics_shard_size",
         "zero_optimization.mics_hierarchical_params_gather", "zero_optimization.legacy_stage1",
         "zero_optimization.zeropp_loco_param", "zero_optimization.elastic_checkpoint"),
        _REMOVED,
    ),
    **dict.fromkeys(("dataloader_drop_last", "data_efficiency"), _OWN_LOADER),
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
    "zero_optimization.cpu_offload": 'write "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'write "offload_param": {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": "write pin_memory in the offload block",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save":
        "write stage3_gather_16bit_weights_on_model_save",
    **dict.fromkeys(
        ("autotuning", "expert_parallel", "hybrid_engine", "pipeline", "tensor_parallel",
         "weight_quantization", "zenflow", "zero_optimization.zenflow",
         "zero_optimization.pipeline_loading_checkpoint",
         "zero_optimization.save_muon_momentum_buffer_in_memory",
         "zero_optimization.offload_optimizer.super_offload",
         "zero_optimization.offload_optimizer.cpuadam_cores_perc",
         "fp16.fp16_master_weights_and_grads", "bf16.bf16_master_weights_and_grads",
         "bf16.bf16_optimizer_states"),
        "not supported here; leave it out",
    ),
}


def check(config: dict[str, Any]) -> None:
    """Check every key and value of a DeepSpeed JSON; "auto" may stand where we fill it.

    Raises:
        ConfigError: with the path of the first mistake, what is allowed, and what to write.
    """
    schema = dict(SCHEMA)
    for name in ("optimizer", "scheduler"):
        block = config.get(name)
        if isinstance(block, dict):
            params = _params(name, block.get("type"))
            schema[name] = {"type": TEXT, "params": params}
    _check_block(config, schema, "")


def _check_block(block: dict[str, Any], schema: dict[str, Any], where: str) -> None:
    for key, value in block.items():
        path = f"{where}.{key}" if where else key
        if path in REFUSED:
            raise ConfigError(f"{path}: {REFUSED[path]}")
        if key not in schema:
            raise ConfigError(f"unknown key {path!r}; {_hint(key, schema)}")
        if _holds_auto(value) and path not in FILLED:
            raise ConfigError(
                f'the DeepSpeed JSON has "auto" at {path}, which we cannot fill; write a value '
                "there"
            )
        rule = schema[key]
        if isinstance(rule, dict):
            if not isinstance(value, dict):
                raise ConfigError(f"{path} {_shown(value)}: must be an object in braces")
            _check_block(value, rule, path)
        elif value != "auto" and not rule.accepts(value):
            quotes = isinstance(value, str) and rule is not TEXT and any(
                rule.accepts(plain) for plain in _without_quotes(value)
            )
            hint = "; write it without quotes" if quotes else ""
            raise ConfigError(f"{path} {_shown(value)}: must be {rule.allowed}{hint}")


def _holds_auto(value: Any) -> bool:
    return value == "auto" or (isinstance(value, list) and "auto" in value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _without_quotes(text: str) -> list[Any]:
    """What a text in quotes may have been meant as."""
    if text.lower() in ("true", "false"):
        return [text.lower() == "true"]
    try:
        return [float(text), int(float(text))]
    except (ValueError, OverflowError):
        return []


def _hint(key: str, schema: dict[str, Any]) -> str:
    near = difflib.get_close_matches(key.lower(), schema, n=1)
    # A key of another block, as "stage" at the top level.
    near = near or [path for path in _paths(SCHEMA) if path.split(".")[-1] == key][:1]
    return f"did you mean {near[0]!r}?" if near else "remove it"


def _paths(schema: dict[str, Any], where: str = "") -> Iterable[str]:
    for key, rule in schema.items():
        yield where + key
        if isinstance(rule, dict):
            yield from _paths(rule, f"{where}{key}.")


def _params(block: str, kind: Any) -> dict[str, Any]:
    """The parameters that a type of optimizer or scheduler takes.

    Raises:
        ConfigError: there is no such type.
    """
    import torch

    module: Any = torch.optim if block == "optimizer" else torch.optim.lr_scheduler
    known: tuple[str, ...] = OPTIMIZERS if block == "optimizer" else tuple(SCHEDULERS)
    name = kind.lower() if block == "optimizer" and isinstance(kind, str) else kind
    if name in ("adam", "adamw"):
        return {**_ADAM, **_TORCH_ADAM, **_OWN_ADAM}
    if name in known:
        return OPTIMIZER_PARAMS[name] if block == "optimizer" else SCHEDULERS[name]
    found = getattr(module, str(kind), None)
    base = torch.optim.Optimizer if block == "optimizer" else module.LRScheduler
    keys: dict[str, Any] = {}
    if isinstance(found, type) and issubclass(found, base) and name != "muon":
        _, *keys_of = inspect.signature(found).parameters
        keys = dict.fromkeys(keys_of, ANYTHING)
    if not keys or (block == "optimizer" and not keys.keys() >= _RATES.keys()):
        near = difflib.get_close_matches(str(kind).lower(), map(str.lower, known), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        with_rates = " with lr and weight_decay" if block == "optimizer" else ""
        raise ConfigError(
            f"{block}.type {_shown(kind)}: must be {', '.join(known)}, or a class of "
            f"{module.__name__}{with_rates}{hint}"
        )
    return {**keys, **_RATES} if block == "optimizer" else keys


def check_together(config: dict[str, Any], precision: str, has_gpu: bool) -> None:
    """Refuse what is right by itself but not together; after every "auto" has been filled.

    Args:
        precision: fp32, fp16 or bf16: what the run will use.
    Raises:
        ConfigError: with both values.
    """
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if precision == "fp16" and stage == 0:
        raise ConfigError(
            "fp16 with zero_optimization.stage 0: DeepSpeed 0.19 divides the gradients by the loss "
            "scale without having multiplied the loss; write stage 1"
        )
    autocast = config.get("torch_autocast", {})
    if autocast.get("enabled") and precision != "fp32":
        raise ConfigError(f"the DeepSpeed JSON enables torch_autocast and {precision}; keep one")
    if autocast.get("enabled") and "dtype" not in autocast:
        raise ConfigError('torch_autocast.dtype is missing: write "bfloat16"')
    if config.get("tensorboard", {}).get("enabled"):
        raise ConfigError(
            "tensorboard.enabled true: the run writes its own tb/ already, and DeepSpeed would add "
            "a second set with other tags and steps; leave the tensorboard block out"
        )
    for name, package in (("wandb", "wandb"), ("comet", "comet_ml")):
        if config.get(name, {}).get("enabled") and find_spec(package) is None:
            raise ConfigError(f"{name} is enabled, and {package} is not installed; install it")
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights",
                "zero_quantized_gradients"):
        if zero.get(key) and not (stage == 3 and has_gpu):
            raise ConfigError(f"zero_optimization.{key}: needs stage 3 and a GPU")
    for name, needed in (("offload_optimizer", 1), ("offload_param", 3)):
        offload = zero.get(name, {})
        device = offload.get("device", "none")
        if device != "none" and stage < needed:
            raise ConfigError(
                f"zero_optimization.{name} with stage {stage}: needs stage {needed} or more"
            )
        if device == "nvme" and (stage < 3 or "nvme_path" not in offload):
            raise ConfigError(f"zero_optimization.{name} on nvme: needs stage 3 and nvme_path")
        if offload.get("ratio", 1) < 1 and stage < 3:
            raise ConfigError(f"zero_optimization.{name}.ratio below 1: needs stage 3")
    _check_data_types(config.get("data_types", {}), precision, stage)
    _check_optimizer(config, stage, has_gpu)
    _check_schedule(config["scheduler"])


def _check_data_types(types: dict[str, Any], precision: str, stage: int) -> None:
    if types.get("param_dtype", precision) != precision:
        raise ConfigError(
            f"data_types.param_dtype {types['param_dtype']!r}: the run is in {precision}; leave it "
            "out"
        )
    wanted = types.get("grad_accum_dtype", precision)
    if wanted != precision and (stage == 0 or precision == "fp32"):
        raise ConfigError(
            f"data_types.grad_accum_dtype {wanted!r}: with precision {precision} and "
            f"zero_optimization.stage {stage} it must be {precision!r}; leave it out"
        )


def _check_optimizer(config: dict[str, Any], stage: int, has_gpu: bool) -> None:
    kind, params = config["optimizer"]["type"], config["optimizer"].get("params", {})
    name = kind.lower()
    if name in ("adam", "adamw"):
        torchs = bool(params.get("torch_adam"))
        for key in _OWN_ADAM if torchs else _TORCH_ADAM:
            if key in params:
                raise ConfigError(
                    f"optimizer.params.{key} with torch_adam {str(torchs).lower()}: only the Adam "
                    f"of {'DeepSpeed' if torchs else 'torch'} has it; leave it out"
                )
    if name in ("lamb", "lion") and not has_gpu:
        raise ConfigError(f"optimizer.type {kind!r}: needs a GPU; write AdamW")
    if name == "adagrad" and stage:
        raise ConfigError(
            f"optimizer.type {kind!r} with zero_optimization.stage {stage}: DeepSpeed would drop "
            "its parameter groups; write stage 0, or AdamW"
        )
    tested = name in ("adam", "adamw", "lion")
    if stage and not tested and not config.get("zero_allow_untested_optimizer"):
        raise ConfigError(
            f"optimizer.type {kind!r} with zero_optimization.stage {stage}: DeepSpeed has not "
            'tested them together; write AdamW, or "zero_allow_untested_optimizer": true'
        )
    if name not in OPTIMIZERS:
        import torch

        weights = torch.zeros(1, requires_grad=True)
        _try(lambda: getattr(torch.optim, kind)([weights], **params), "optimizer")


def _check_schedule(scheduler: dict[str, Any]) -> None:
    kind, params = scheduler["type"], scheduler.get("params", {})
    for low, high in (("warmup_num_steps", "total_num_steps"), ("warmup_min_lr", "warmup_max_lr"),
                      ("cycle_min_lr", "cycle_max_lr")):
        if low in params and high in params and params[low] > params[high]:
            raise ConfigError(
                f"scheduler.params: {low} {params[low]} is more than {high} {params[high]}; "
                "change one of them"
            )
    for key in ("cycle_min_lr", "cycle_max_lr"):
        if kind == "OneCycle" and key not in params:
            raise ConfigError(f"scheduler.params.{key} is missing: OneCycle needs it")
    if kind not in SCHEDULERS:
        import torch

        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
        _try(lambda: getattr(torch.optim.lr_scheduler, kind)(optimizer, **params), "scheduler")


def _try(make: Callable[[], Any], block: str) -> None:
    """Let a class of torch judge its own parameters."""
    try:
        make()
    except Exception as error:
        raise ConfigError(f"{block}.params: {error}; change it") from None
