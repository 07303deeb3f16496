"""After how many steps of stage 2 does an arm reach what random masks reach at their end?

For each measured length of an arm, the difference between its accuracy there and that of random
masks at their longest stage 2 is estimated with its interval, in paired cells. Between the lengths
the difference and both ends of the interval are taken as straight lines. The estimate is the first
length at which the difference is 0 or more; its interval goes from where the upper end first
reaches 0 (before that, the arm is below the target) to where the lower end does (from there on, it
is not). This inverts the test at each length for itself; a straight line between two ends is never
narrower than the interval of the mean of two lengths, since errors add at most.

The curve of every arm begins with the arm without stage 2, at 0 steps, where there is one. A length
below the last is an export from the middle of the schedule, whose learning rate is still high: a
run that is planned for that length may do better, so the steps found are an upper bound for the
arm, measured against random masks that have ended their schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from preprocess.masking import BASELINE
from train.reports.compare import NO_STAGE_2, paired, shown
from train.reports.intervals import paired_difference
from train.reports.results import Arm, number

STEPS_TO_COLUMNS = ("arm", "labels", "target_steps", "steps", "low", "high", "share", "seconds",
                    "target_seconds")
FROM_THE_START = "from the start"
NOT_REACHED = "not reached"


@dataclass(frozen=True)
class Reached:
    """Steps until an arm reaches the target: the estimate and its interval.

    0 stands for before the first step; None for not within the longest run.
    """

    steps: float | None
    low: float | None
    high: float | None


def first_crossing(lengths: Sequence[float], values: Sequence[float]) -> float | None:
    """Return where a piecewise linear curve first is 0 or more; None if nowhere.

    Args:
        lengths: ascending; values: of the curve there.
    """
    if values[0] >= 0:
        return lengths[0]
    for place in range(1, len(lengths)):
        if values[place] >= 0:
            before, after = values[place - 1], values[place]
            share = before / (before - after)
            return lengths[place - 1] + share * (lengths[place] - lengths[place - 1])
    return None


def steps_to(points: Sequence[tuple[float, float, float, float]]) -> Reached:
    """Return the steps to a target.

    Args:
        points: (length, difference to the target, its low and its high end), ascending.
    """
    lengths, means, lows, highs = zip(*sorted(points), strict=True)
    return Reached(*(first_crossing(lengths, curve) for curve in (means, highs, lows)))


def steps_to_rows(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Return a row for each arm that has more than one length of stage 2, by `STEPS_TO_COLUMNS`."""
    families: dict[tuple, list[Arm]] = {}
    for arm in arms:
        if arm.stage2_steps is not None:
            family = (arm.task, arm.stage1_steps, arm.labels, arm.line.rpartition("/")[0])
            families.setdefault(family, []).append(arm)
    rows = []
    for members in families.values():
        targets = [arm for arm in members if arm.strategy == BASELINE]
        if not targets:
            continue
        target = max(targets, key=lambda arm: arm.stage2_steps or 0)
        starts = [arm for arm in members if arm.strategy == NO_STAGE_2][:1]
        lines = dict.fromkeys(arm.line for arm in members if arm.strategy != NO_STAGE_2)
        for line in lines:
            own = [arm for arm in members if arm.line == line]
            if len(own) > 1 or starts:
                rows += _row(own, starts, target)
    return rows if any(len({arm.stage2_steps for arm in own if arm.stage2_steps}) > 1
                       for own in families.values()) else []


def _row(own: Sequence[Arm], starts: Sequence[Arm], target: Arm) -> list[dict[str, Any]]:
    points = []
    for arm in [*starts, *own]:
        values = paired(arm, target)
        if not isinstance(values, str):
            found = paired_difference(*values)
            points.append((float(arm.stage2_steps or 0), found.mean, found.low, found.high))
    if not points:
        return []
    reached, start = steps_to(points), min(points)[0]
    end = max(own, key=lambda arm: arm.stage2_steps or 0)
    per_step, theirs = _seconds_per_step(end), _seconds_per_step(target)
    spent = None
    if per_step is not None and reached.steps is not None and end.masking_seconds is not None:
        spent = end.masking_seconds + per_step * reached.steps
    goal = target.stage2_steps or 0
    share = "" if reached.steps is None or not goal else f"{reached.steps / goal:.2f}"

    def told(steps: float | None) -> str:
        if steps is None:
            return f"{NOT_REACHED} in {end.stage2_steps}"
        if steps == start:
            return FROM_THE_START if start == 0 else f"{start:.0f} or fewer"
        return f"{steps:.0f}"

    return [{"arm": end.shown, "labels": shown(end.labels), "target_steps": goal,
             "steps": told(reached.steps), "low": told(reached.low), "high": told(reached.high),
             "share": share, "seconds": "" if spent is None else f"{spent:.0f}",
             "target_seconds": "" if theirs is None else f"{theirs * goal:.0f}"}]


def _seconds_per_step(arm: Arm) -> float | None:
    """Return the mean seconds of a step of stage 2; None if unknown."""
    found = []
    for run in arm.runs:
        seconds = number(run.stages[-1].get("seconds")) if run.stages else None
        if seconds is None or not arm.stage2_steps:
            return None
        found.append(seconds / arm.stage2_steps)
    return sum(found) / len(found)
