"""What each arm cost: seconds and floating-point operations of its parts.

Seconds of pre-training and of fine-tuning are those of training steps; those of choosing masks are
of complete processes with their start, since most of it is no training. Operations are those that
each command counted: of linear layers and attention, for real tokens, three times the forward pass
in training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from preprocess.errors import DataError
from preprocess.files import read_json
from train.reports.compare import NO_STAGE_2, shown
from train.reports.groups import cost_at
from train.reports.results import Arm, FinetuneRun, number

# What chooses the masks: how the names of its steps begin; the first that fits counts.
MASK_PARTS = {"classifier": "classifier", "annotate": "annotate", "scorer": "scorer",
              "masks": "masks-", "scores": ""}
COST_COLUMNS = ("arm", "labels", "general", *MASK_PARTS, "masking", "task_guided", "total",
                "masking_share", "share_of_full", "finetune")
MASKING_COLUMNS = ("step", "seconds", "arms")
STAGE_2_COLUMNS = ("arm", "labels", "steps", "tokens", "masked_tokens", "masked_share", "epochs",
                   "seconds", "flops", "mask_seconds", "finetune_seconds")
FLOPS_COLUMNS = ("arm", "labels", "general", "classifier", "annotate", "scorer", "scores",
                 "masking", "task_guided", "total", "finetune")


def longest(arms: Sequence[Arm]) -> list[Arm]:
    """Return the arms with the longest stage 2 of each line, stage 1 and number of labels."""
    found: dict[tuple, Arm] = {}
    for arm in arms:
        key = (arm.task, arm.shown, arm.labels) if arm.stage2_steps is not None else (arm.name,)
        best = found.setdefault(key, arm)
        if (arm.stage2_steps or 0) > (best.stage2_steps or 0):
            found[key] = arm
    return list(found.values())


def cost_rows(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Return the seconds of each arm by `COST_COLUMNS`; unknown: empty."""
    parts = {arm.name: _parts(arm) for arm in arms}
    full: dict[str, set[float]] = {}  # seconds of general pre-training, by family of arms
    for arm in arms:
        general = parts[arm.name]["general"]
        if general is not None:
            full.setdefault(_family(arm), set()).add(general)
    rows = []
    for arm in arms:
        part = parts[arm.name]
        lengths = full.get(_family(arm), set())
        known = [value for value in part.values() if value is not None]
        total = sum(known) if len(known) == 3 else None
        rows.append({
            "arm": arm.shown, "labels": shown(arm.labels),
            **{key: _whole(seconds) for key, seconds in _mask_parts(arm).items()},
            **{key: _whole(value) for key, value in part.items()},
            "total": _whole(total),
            "masking_share": f"{(part['masking'] or 0.0) / total:.3f}" if total else "",
            "share_of_full": f"{total / max(lengths):.3f}" if total and len(lengths) > 1 else "",
            "finetune": _whole(_finetune_cost(arm, "seconds")),
        })
    return rows


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _family(arm: Arm) -> str:
    """Name the arms whose costs are comparable: of one folder and task."""
    return f"{arm.task} {arm.name.rpartition('/')[0]}"


def _parts(arm: Arm) -> dict[str, float | None]:
    """Return the seconds of each part of an arm, averaged over its pre-training seeds."""
    return {
        "general": _mean(before, arm, "seconds"),
        "masking": arm.masking_seconds,
        "task_guided": _mean(_guided, arm, "seconds"),
    }


def _mean(of: Callable[[Arm, FinetuneRun, str], float | None], arm: Arm, key: str
          ) -> float | None:
    """Return the mean over the runs that know a value; None if none does."""
    known = [value for run in arm.runs if (value := of(arm, run, key)) is not None]
    return sum(known) / len(known) if known else None


def before(arm: Arm, run: FinetuneRun, key: str) -> float | None:
    """Return what all pre-training before stage 2 took: 0 where a foreign encoder was taken."""
    if not run.stages:
        return 0.0 if run.cost.get("steps") == 0 else None
    stages = run.stages if arm.strategy == NO_STAGE_2 else run.stages[:-1]
    known = [value for stage in stages if (value := number(stage.get(key))) is not None]
    return sum(known) if len(known) == len(stages) else None


def _guided(arm: Arm, run: FinetuneRun, key: str) -> float | None:
    """Return what stage 2 took."""
    if arm.strategy == NO_STAGE_2:
        return 0.0
    return number(run.stages[-1].get(key)) if run.stages else None


def _mask_parts(arm: Arm) -> dict[str, float | None]:
    """Return the seconds of each of `MASK_PARTS`, as if no other arm had shared them."""
    if arm.masking_steps is None:
        return dict.fromkeys(MASK_PARTS)
    return {part: cost_at({step: arm.masking_steps[step] for step in steps}, None)
            for part, steps in _steps_of_parts(arm).items()}


def _steps_of_parts(arm: Arm) -> dict[str, list[str]]:
    """Return the names of the steps of each of `MASK_PARTS`."""
    steps: dict[str, list[str]] = {part: [] for part in MASK_PARTS}
    for name in arm.masking_steps or ():
        steps[next(part for part, begin in MASK_PARTS.items()
                   if name.rpartition("/")[2].startswith(begin))].append(name)
    return steps


def _finetune_cost(arm: Arm, key: str) -> float | None:
    """Return the seconds or flops of fine-tuning one model, the mean over all of an arm."""
    known = [cost for run in arm.runs for row in run.rows
             if (cost := number(row.get(key))) is not None]
    return sum(known) / len(known) if known else None


def masking_rows(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Return the seconds of each step that chose masks, once, and the arms that share it."""
    seconds: dict[str, float] = {}
    users: dict[str, dict[str, None]] = {}
    for arm in arms:
        for step, spent in (arm.masking_steps or {}).items():
            seconds[step] = spent
            users.setdefault(step, {})[arm.shown] = None
    rows = [{"step": step, "seconds": f"{spent:.0f}", "arms": ", ".join(users[step])}
            for step, spent in seconds.items()]
    if rows:
        rows.append({"step": "all of them", "seconds": f"{sum(seconds.values()):.0f}", "arms": ""})
    return rows


def stage_2_rows(arms: Sequence[Arm], store_tokens: int | None) -> list[dict[str, Any]]:
    """Return what stage 2 of each arm was, by `STAGE_2_COLUMNS`.

    Args:
        store_tokens: tokens of the in-domain text; None if unknown, and then so are epochs.
    """
    rows = []
    for arm in arms:
        if arm.strategy == NO_STAGE_2:
            continue
        tokens, masked, seconds, flops = (
            _mean(_guided, arm, key) for key in ("tokens", "masked_tokens", "seconds", "flops"))
        if tokens is None and masked is None and seconds is None:
            continue
        rows.append({
            "arm": arm.shown, "labels": shown(arm.labels), "steps": shown(arm.stage2_steps),
            "tokens": _whole(tokens), "masked_tokens": _whole(masked),
            "masked_share": f"{masked / tokens:.4f}" if tokens and masked is not None else "",
            "epochs": f"{tokens / store_tokens:.2f}" if tokens and store_tokens else "",
            "seconds": "" if seconds is None else f"{seconds:.1f}",
            "flops": _operations(flops), "mask_seconds": _whole(arm.masking_seconds),
            "finetune_seconds": "" if (spent := _finetune_cost(arm, "seconds")) is None
            else f"{spent:.1f}",
        })
    return rows


def flops_rows(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Return the operations of each arm by `FLOPS_COLUMNS`; unknown: empty."""
    rows = []
    for arm in arms:
        parts = {
            "general": _mean(before, arm, "flops"),
            "masking": arm.masking_operations,
            "task_guided": _mean(_guided, arm, "flops"),
        }
        told = [value for value in parts.values() if value is not None]
        if any(told):
            rows.append({
                "arm": arm.shown, "labels": shown(arm.labels),
                **{part: _operations(cost_at({step: arm.masking_flops[step] for step in steps},
                                             None))
                   for part, steps in _steps_of_parts(arm).items()
                   if arm.masking_steps is not None and all(
                       step in arm.masking_flops for step in steps)},
                **{key: _operations(value) for key, value in parts.items()},
                "total": _operations(sum(told) if len(told) == len(parts) else None),
                "finetune": _operations(_finetune_cost(arm, "flops"))})
    return [{column: row.get(column, "") for column in FLOPS_COLUMNS} for row in rows]


def _operations(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def domain_prefix(pipeline: Path) -> Path:
    """Return the prefix of the store that stage 2 read."""
    kept = pipeline / "domain_kept" / "text"
    return kept if kept.with_name("text.json").is_file() else pipeline / "domain" / "text"


def store_counts(prefix: Path) -> dict[str, Any]:
    """Return the counts of a token store; nothing if they cannot be read."""
    try:
        told = read_json(prefix.with_name(f"{prefix.name}.json"))
    except (OSError, DataError):
        return {}
    counts = told.get("counts")
    return counts if isinstance(counts, dict) else told
