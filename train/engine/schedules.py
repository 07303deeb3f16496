"""Learning-rate schedules: their names, the DeepSpeed JSON's block of each, and its step counts.

Every schedule begins with a warm-up of W steps, step n at n/W of the peak. In a run of N steps,
step n > W has this share of the peak:

    linear    (N+1-n) / (N+1-W)                              WarmupDecayLR
    cosine    (1 + cos(pi (n-W+1) / (N+2-W))) / 2            WarmupCosineLR, never below 1e-4
    constant  1                                              WarmupLR
    wsd       min(1, (N+1-n) / (D+1)), D steps of decay      WarmupStableDecayLR, ours

Where warm-up and decay of wsd overlap, as in a run of few steps, a step has the product of both. No
step has the rate 0. In fp16 a step that is skipped does not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from preprocess.errors import ConfigError
from train.config import TrainingConfig
from train.engine.schema import SCHEDULERS

STABLE_DECAY = "WarmupStableDecayLR"
# --lr_scheduler_type -> scheduler.type
TYPES = {"linear": "WarmupDecayLR", "cosine": "WarmupCosineLR", "constant": "WarmupLR",
         "wsd": STABLE_DECAY}
_WARMUP = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type")
_DECAY_RATIO = 0.1


def settle_schedule(
    config: dict[str, Any], options: TrainingConfig, *, total_steps: int, warmup_of: int,
    default_warmup_ratio: float, learning_rate: float,
) -> None:
    """Fill the scheduler block of a DeepSpeed JSON from the flags.

    Args:
        total_steps: of the schedule, N.
        warmup_of: steps that the ratio of the warm-up is a share of.
        learning_rate: the peak.
    Raises:
        ConfigError: a flag contradicts a written value, or has no use in this schedule.
    """
    scheduler = config.setdefault("scheduler", {})
    kind = scheduler["type"] = _settle_type(scheduler.get("type", "auto"), options)
    # What "auto" stands for depends on the type: one file serves all of them.
    schedule = scheduler["params"] = {
        key: value for key, value in scheduler.get("params", {}).items()
        if value != "auto" or key in SCHEDULERS[kind]
    }
    for key in schedule.keys() - SCHEDULERS[kind]:
        raise ConfigError(f"scheduler.params.{key} in the DeepSpeed JSON has no use in {kind}; "
                          "remove it, or give another --lr_scheduler_type")
    warmup = default_warmup_ratio if options.warmup_ratio is None else options.warmup_ratio
    # DeepSpeed refuses warm-ups below 2 steps: it divides by log(warmup_num_steps).
    _settle_steps(schedule, "warmup_num_steps", "warmup_ratio", options.warmup_ratio,
                  max(2, round(warmup * warmup_of)))
    schedule.setdefault("warmup_type", "linear")  # DeepSpeed's own default is logarithmic
    if kind != TYPES["cosine"]:  # that one takes its peak from the optimizer
        schedule.setdefault("warmup_min_lr", 0)
        peak = schedule.get("warmup_max_lr", "auto")
        if peak != "auto" and options.learning_rate not in (None, peak):
            raise ConfigError(
                f"--learning_rate {options.learning_rate} contradicts warmup_max_lr {peak} in the "
                'DeepSpeed JSON; drop the flag, or write "auto" there')
        # The schedule sets the rate; the optimizer's lr only repeats its peak.
        schedule["warmup_max_lr"] = learning_rate if peak == "auto" else peak
    if kind == STABLE_DECAY:
        decay = _DECAY_RATIO if options.decay_ratio is None else options.decay_ratio
        _settle_steps(schedule, "decay_num_steps", "decay_ratio", options.decay_ratio,
                      max(1, round(decay * total_steps)))
        typed = options.warmup_ratio, options.decay_ratio
        if typed != (None, None) and options.warmup_ratio != 0 and warmup + decay > 1:
            default = " (the default)"
            raise ConfigError(
                f"--warmup_ratio {warmup}{default * (typed[0] is None)} and --decay_ratio {decay}"
                f"{default * (typed[1] is None)} are more than all steps; lower one of them")
    elif options.decay_ratio is not None:
        raise ConfigError(
            f"--decay_ratio {options.decay_ratio}: has no use in the schedule {kind}; leave it out,"
            " or give --lr_scheduler_type wsd")
    if kind == TYPES["constant"]:
        return
    if schedule.get("total_num_steps", "auto") == "auto":
        # More than the run has, so that its last step has a rate above 0. DeepSpeed's cosine is
        # one step ahead of its linear decay.
        more = 2 if kind == TYPES["cosine"] else 1
        schedule["total_num_steps"] = max(total_steps, schedule["warmup_num_steps"]) + more
    elif schedule["total_num_steps"] < total_steps:
        raise ConfigError(
            f"total_num_steps {schedule['total_num_steps']} in the DeepSpeed JSON ends the "
            f'schedule before the {total_steps} steps of this run; write "auto" there'
        )


def _settle_type(written: str, options: TrainingConfig) -> str:
    """Return the type of the schedule; linear where nothing is said."""
    given = options.lr_scheduler_type
    if written == "auto":
        return TYPES[given or "linear"]
    if given and TYPES[given] != written:
        raise ConfigError(
            f"--lr_scheduler_type {given} contradicts scheduler.type {written} in the DeepSpeed "
            'JSON; drop the flag, or write "auto" there')
    return written


def _settle_steps(schedule: dict[str, Any], key: str, flag: str, ratio: float | None,
                  steps: int) -> None:
    """Fill a number of steps that a flag gives as a share of the run."""
    written = schedule.get(key, "auto")
    if written == "auto":
        schedule[key] = steps
    elif ratio is not None:
        raise ConfigError(f"--{flag} {ratio} contradicts {key} {written} in the DeepSpeed JSON; "
                          'drop the flag, or write "auto"')


def stable_steps(schedule: dict[str, Any]) -> float:
    """Return the last step before a settled schedule decays; 0 where the warm-up is followed by it.

    Args:
        schedule: its type and its parameters, as one dictionary.
    """
    if schedule["type"] == TYPES["constant"]:
        return math.inf
    if schedule["type"] != STABLE_DECAY:
        return 0
    return max(0, schedule["total_num_steps"] - 1 - schedule["decay_num_steps"])


def same_steps(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return how many of the first steps have the same rates under two schedules."""
    if one == other:
        return math.inf
    if any(one.get(key) != other.get(key) for key in _WARMUP):
        return 0
    return min(stable_steps(one), stable_steps(other))


def build_stable_decay(params: dict[str, Any]) -> Callable[[Any], Any]:
    """Return what makes the scheduler of an optimizer, for `deepspeed.initialize`.

    Args:
        params: of the scheduler block; `warmup_max_lr` may be one rate per parameter group.
    """
    from deepspeed.runtime.lr_schedules import WarmupLR

    total, decay = params["total_num_steps"], params["decay_num_steps"]

    class WarmupStableDecayLR(WarmupLR):  # type: ignore[misc]
        """DeepSpeed's warm-up and constant rate, and at the end a linear decay."""

        def get_lr(self) -> list[float]:
            left = min(1.0, max(0, total - self.last_batch_iteration) / (decay + 1))
            return [rate * left for rate in super().get_lr()]

    return lambda optimizer: WarmupStableDecayLR(
        optimizer, **{key: value for key, value in params.items() if key in _WARMUP})
