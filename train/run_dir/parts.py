"""Runs that were extended: the parts of their identity, and what they take over from a shorter run.

`length.parts` of an identity lists the earlier parts, oldest first; a run that was never extended
has none:

    {"max_steps": N}                                    the schedule went on
    {"max_steps": N, "to_step": s, "schedule": {...}}   it ended at step s; another one began
"""

from __future__ import annotations

from typing import Any, Literal

from preprocess.identity import compare
from train.engine import same_steps

Identity = dict[str, Any]
Parts = list[dict[str, Any]]
ANOTHER = "give another --output_dir"


def of(identity: Identity) -> Parts:
    """Return the earlier parts of a run."""
    return (identity.get("length") or {}).get("parts", [])


def extend(identity: Identity, parts: Parts, schedule: dict[str, Any]) -> Identity:
    """Return the identity of a run with these earlier parts, and the schedule that it then has."""
    if not parts:
        return identity
    return {**identity, "length": {**identity["length"], "parts": parts},
            "train": {**identity["train"], "schedule": schedule}}


def schedule_span(parts: Parts, max_steps: int) -> tuple[int, int]:
    """Return the step after which the newest schedule begins, and where its first part was to end.

    The warm-up is a share of that first part, however often it has been extended since.
    """
    own = [number for number, part in enumerate(parts) if "to_step" in part]
    later = parts[own[-1] + 1:] if own else parts
    return parts[own[-1]]["to_step"] if own else 0, later[0]["max_steps"] if later else max_steps


def _later(old: Identity, new: Identity) -> Parts | None:
    """Return the parts from the one that `old` is on; None if it is no earlier part of `new`."""
    before, parts = of(old), of(new)
    rest = parts[len(before):]
    if parts[:len(before)] == before and rest:
        return rest if (old.get("length") or {}).get("max_steps") == rest[0]["max_steps"] else None
    return None


def _as_of(old: Identity, new: Identity) -> Identity:
    """Return `new` with the length and the schedule of `old`."""
    schedule = (old.get("train") or {}).get("schedule")
    return {**new, "length": old.get("length"), "train": {**new["train"], "schedule": schedule}}


def can_extend(old: Identity, new: Identity) -> bool:
    """Return whether the two differ in nothing but a larger number of steps and their rates.

    A mask rate that changes over a run is spread over its steps, so that such a run has an end.
    """
    steps = (old.get("length") or {}).get("max_steps")
    return (new["command"] == "pretrain" and isinstance(steps, int)
            and steps < new["length"]["max_steps"] and _as_of(old, new) == old
            and not isinstance(new["choice"]["rate"], str))


def check(old: Identity, new: Identity, where: str) -> None:
    """Refuse to go on from a run that is neither this one nor an earlier part of it.

    Raises:
        ConfigError: says what differs; as `compare`.
    """
    remedy = ANOTHER
    if _later(old, new) is not None:
        new = _as_of(old, new)
    elif can_extend(old, new):
        remedy += (", or add --extend: the new steps then have a warm-up and a schedule of their "
                   "own")
    compare(old, new, where, remedy)


def how_to_go_on(
    old: Identity, step: int, new: Identity
) -> Literal["same", "continue", "restart"] | None:
    """Return how a run goes on from a checkpoint.

    Args:
        old, step: of the checkpoint.
    Returns:
        same: it is of this run. continue: of an earlier part, and the schedule goes on. restart:
        the schedule begins there. None: its steps had other rates than this run has.
    """
    if old == new:
        return "same"
    later = _later(old, new)
    if later is None:
        return None
    schedule, own = old["train"]["schedule"], [part for part in later if "to_step" in part]
    if own:
        ends = own == later[:1] and (own[0]["to_step"], own[0]["schedule"]) == (step, schedule)
        return "restart" if ends else None
    begin, _ = schedule_span(of(new), new["length"]["max_steps"])
    same = same_steps(schedule, new["train"]["schedule"])
    return "continue" if step - begin <= same else None
