"""The engine and its steps: parameter groups, one safe optimizer step, the full state."""

from __future__ import annotations

import json
import math
from collections import deque
from typing import Any
from weakref import WeakKeyDictionary

import torch

from preprocess.errors import NonFiniteError
from train.engine import zero
from train.engine.ds_json import Resolved
from train.engine.group import all_reduce_sum, is_main, ranks
from train.engine.schedules import STABLE_DECAY, build_stable_decay

# fp16 steps skipped in a row before a run stops; a scale of 2^32 reaches 1 after 33.
MAX_SKIPPED_IN_A_ROW = 50


def parameter_groups(
    module: torch.nn.Module,
    weight_decay: float,
    head_prefixes: tuple[str, ...] = (),
    head_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Split parameters for the optimizer: biases and norms (one dimension) are not decayed.

    Args:
        head_prefixes: parameters whose names start with one of these go to the "head" groups.
        head_scale: learning rate of the head divided by that of the encoder.
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


def build_engine(
    module: torch.nn.Module, groups: list[dict[str, Any]], resolved: Resolved,
    upstream: bool = False,
) -> Any:
    """Wrap `module` in a DeepSpeed engine; call `start` first.

    Args:
        upstream: keep DeepSpeed's own step; see zero.py.
    """
    import deepspeed

    config = json.loads(json.dumps(resolved.config))
    # DeepSpeed's clock makes the host wait for the device twice per micro batch.
    config.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)
    if ranks().world_size == 1 and "overlap_comm" in config.get("zero_optimization", {}):
        config["zero_optimization"]["overlap_comm"] = False  # nothing to overlap, but a wait
    schedule = config["scheduler"].get("params", {})
    scales = [group.get("lr_scale", 1.0) for group in groups]
    if "warmup_max_lr" in schedule:
        schedule["warmup_max_lr"] = [schedule["warmup_max_lr"] * scale for scale in scales]
    else:  # DeepSpeed's cosine takes its peaks from the groups
        peak = config["optimizer"]["params"]["lr"]
        groups = [{**group, "lr": peak * scale} for group, scale in
                  zip(groups, scales, strict=True)]
    scheduler = None
    if config["scheduler"]["type"] == STABLE_DECAY:
        scheduler = build_stable_decay(config.pop("scheduler")["params"])
    engine, _, _, _ = deepspeed.initialize(
        model=module,
        model_parameters=groups,
        config=config,
        lr_scheduler=scheduler,
        dist_init_required=False,
    )
    if engine.zero_optimization_stage() == 3:
        for borrower, parameter in getattr(module, "borrowed_parameters", list)():
            deepspeed.zero.register_external_parameter(borrower, parameter)
    if ranks().world_size == 1 and resolved.precision == "fp32" and not engine.zero_optimization():
        engine.enable_backward_allreduce = False
    if not upstream:
        zero.bind(engine)
    restart_schedule(engine)
    return engine


def restart_schedule(engine: Any) -> None:
    """Give the next step the rate of the schedule's step 1, the one after that of step 2, ...

    DeepSpeed would take its first two steps at rate 0: before the schedule has begun, and at its
    step 0.
    """
    engine.lr_scheduler.step(1)


class _LossScaleHistory:
    """The last changes of an engine's loss scale, and the steps it has skipped in a row."""

    def __init__(self) -> None:
        self._changes: deque[tuple[int, float]] = deque(maxlen=8)
        self.skipped_in_a_row = 0

    def note(self, step: int, scale: float) -> None:
        """Note that step `step` is taken at `scale`."""
        if not self._changes or self._changes[-1][1] != scale:
            self._changes.append((step, scale))

    def __str__(self) -> str:
        return ", ".join(f"{scale:g} from step {step}" for step, scale in self._changes)


_loss_scales: WeakKeyDictionary[Any, _LossScaleHistory] = WeakKeyDictionary()


def take_step(engine: Any, loss: zero.Value, *others: zero.Value) -> tuple[list[float], Any]:
    """Call `engine.step()` after the last micro batch, but never train on a bad number.

    Gradients and numbers are reduced over all ranks, so every rank finds the same. In fp32 and
    bf16 the run stops. In fp16 the loss scale is found by overflows: the step is skipped, as long
    as a lower scale can help.

    Args:
        loss, others: numbers of this rank, Python's or tensors `()`.
    Returns:
        The sums of `loss` and `others` over all ranks; and the global norm of the gradients before
        clipping, a number or a tensor `()`, None for a skipped step.
    Raises:
        NonFiniteError: on every rank; nothing has been updated.
    """
    step, sums = engine.global_steps + 1, []
    one_pass = getattr(engine.optimizer, "one_pass", None)
    if one_pass is None:
        sums = all_reduce_sum(loss, *others)
        zero.check_loss(sums, step)
    else:
        one_pass.prepare(step, (loss, *others))
    norm = _take_fp16_step(engine) if engine.fp16_enabled() else _take_plain_step(engine)
    return sums if one_pass is None else one_pass.sums, norm


def _take_plain_step(engine: Any) -> Any:
    """Take a step in fp32 or bf16, where every gradient must be finite; return the norm."""
    step = engine.global_steps + 1
    norm = None
    if not (engine.zero_optimization_stage() or engine.bfloat16_enabled()):
        # Only in plain fp32 does DeepSpeed check no gradient.
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
    """Take an fp16 step; bound the skipped steps, and report the history of the loss scale."""
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
    """Return all parameters and buffers in fp32 on the CPU, for ZeRO 0 to 3; collective.

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
