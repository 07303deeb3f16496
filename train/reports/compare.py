"""Compare arms: what may be subtracted from what, and the tables of results and differences.

Letters: `P` pre-training seeds, `S` fine-tuning seeds, `N` test items.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from preprocess.errors import visible
from preprocess.masking import BASELINE
from train.reports.intervals import Estimate, estimate, paired_difference
from train.reports.results import METRICS, Arm

TABLE_COLUMNS = ("arm", "strategy", "scores", "task", "labels", "steps", "metric", "mean", "low",
                 "high", "sd", "seeds")
DIFFERENCE_COLUMNS = ("arm", "against", "labels", "steps", "difference", "low", "high", "verdict",
                      "detectable", "seeds", "items")
NO_STAGE_2 = "none"  # strategy of an arm without task-guided pre-training


@dataclass(frozen=True)
class Group:
    """Arms to compare with each other: of one task, label budget and length of each stage.

    An arm without stage 2 is in the groups of all lengths of stage 2.
    """

    name: str
    arms: list[Arm]
    floors: list[Arm]

    @property
    def steps(self) -> int | None:
        """Length of stage 2; None where nothing tells."""
        return _longest_stage2(self.arms)

    @property
    def labels(self) -> int | None:
        return self.arms[0].labels if self.arms else None


@dataclass(frozen=True)
class Comparison:
    """A difference in accuracy, first minus second; the shape of what it was computed from."""

    first: Arm
    second: Arm
    found: Estimate
    shape: tuple[int, int, int]

    @property
    def steps(self) -> int | None:
        """Length of stage 2 of the longer one."""
        return _longest_stage2((self.first, self.second))

    @property
    def verdict(self) -> str:
        """What the interval says, in words."""
        if self.found.standard_error == 0:
            return ""
        return ("better" if self.found.low > 0 else "worse" if self.found.high < 0
                else "no difference seen")


def _longest_stage2(arms: Iterable[Arm]) -> int | None:
    return max((arm.stage2_steps for arm in arms if arm.stage2_steps is not None), default=None)


def arms_of(groups: Sequence[Group]) -> list[Arm]:
    """Return the arms of all groups, each once, without baselines."""
    return list({id(arm): arm for group in groups for arm in group.arms}.values())


def floors_of(groups: Sequence[Group]) -> list[Arm]:
    """Return the baselines of all groups, each once."""
    return list({id(floor): floor for group in groups for floor in group.floors}.values())


def pairs_of(groups: Sequence[Group]) -> Iterator[tuple[Arm, Arm]]:
    """Yield pairs of arms of each group, to subtract the second from the first.

    They are those that tell what a policy is worth: each arm against the one without task-guided
    pre-training, against random masks and against its own control. In a report of one group all
    other pairs follow.
    """
    for group in groups:
        plain = [arm for strategy in (NO_STAGE_2, BASELINE) for arm in group.arms
                 if arm.strategy == strategy]
        told: dict[frozenset[str], tuple[Arm, Arm]] = {}
        for arm in group.arms:
            controls = [other for other in group.arms if other.match and other.match == arm.line]
            for other in [*plain, *controls]:
                if other is not arm and not (arm in plain and other not in plain[:1]):
                    told.setdefault(frozenset((arm.name, other.name)), (arm, other))
        if len(groups) == 1 or not told:
            for later, first in enumerate(group.arms):
                for second in group.arms[:later]:
                    told.setdefault(frozenset((first.name, second.name)), (first, second))
        yield from told.values()


# --------------------------------------------------------------------------------- one arm


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation; the latter is nan for a single value."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else math.nan


def arm_estimate(arm: Arm, metric: str = "accuracy") -> Estimate | None:
    """Return the mean of an arm with its interval; None where predictions do not allow it."""
    values = arm.item_values(metric)
    return None if values is None else estimate(values)


def shown(value: Any) -> Any:
    """Return the cell of a count that may be unknown."""
    return "" if value is None else value


def table_rows(arms: Iterable[Arm]) -> list[dict[str, Any]]:
    """Make one row per metric and arm, with the keys of `TABLE_COLUMNS`."""
    members, rows = list(arms), []
    for metric in METRICS:
        for arm in members:
            values = arm.values(metric)
            if not values:
                continue
            mean, sd = mean_and_sd(values)
            found = arm_estimate(arm, metric)
            ends = ("", "") if found is None or not found.standard_error else (
                f"{max(found.low, 0.0):.4f}", f"{min(found.high, 1.0):.4f}")
            rows.append({
                "arm": arm.shown, "strategy": arm.strategy, "scores": arm.scores,
                "task": arm.task, "labels": shown(arm.labels),
                "steps": shown(arm.stage2_steps), "metric": metric, "mean": f"{mean:.4f}",
                "low": ends[0], "high": ends[1], "sd": "" if math.isnan(sd) else f"{sd:.4f}",
                "seeds": len(values),
            })
    return rows


def below_floors(groups: Sequence[Group]) -> list[str]:
    """Write a note for every arm whose mean accuracy does not exceed that of every baseline."""
    sentences = {}
    for group in groups:
        for arm in group.arms:
            for floor in group.floors:
                ours, theirs = (mean_and_sd(a.values("accuracy"))[0] for a in (arm, floor))
                if ours <= theirs:
                    sentences[arm.name, floor.name] = (
                        f"{arm.name} ({ours:.4f}) is not above the baseline {floor.name} "
                        f"({theirs:.4f}).")
    return list(sentences.values())


def majority_notes(groups: Sequence[Group]) -> list[str]:
    """Say of each task how often its most frequent label is right: what needs no model at all."""
    sentences = {}
    for arm in [*arms_of(groups), *floors_of(groups)]:
        truth = arm.runs[0].truth
        if truth is not None and len(truth):
            most, items = int(np.bincount(truth).max()), len(truth)
            sentences[arm.task, most, items] = (
                f"Always giving the most frequent label of the {items:,} test items of {arm.task} "
                f"would be right for {most / items:.4f} of them.")
    return list(sentences.values())


# -------------------------------------------------------------------------------- differences


def paired(first: Arm, second: Arm, metric: str = "accuracy"
           ) -> tuple[np.ndarray, np.ndarray] | str:
    """Return the values of two arms in one shape `(P, S, N)`, or why they cannot be compared.

    Where both name their pre-training seeds, those are paired that both have. An arm without
    stage 2 may have one run, which is then paired with each run of the other.
    """
    one, two = first.item_values(metric), second.item_values(metric)
    if first.task != second.task:
        return f"they are of different tasks ({first.task} and {second.task})"
    if one is None or two is None:
        return "predictions.jsonl of some seed is missing, or their runs have different seeds"
    runs = [*first.runs, *second.runs]
    if len({run.items_digest for run in runs}) != 1:
        return "they were tested on different items"
    single_seeds = one.shape[1] == 1 or two.shape[1] == 1
    if not single_seeds and len({tuple(run.seeds) for run in runs}) != 1:
        return "they have different fine-tuning seeds"
    if _named(first) and _named(second):
        common = [seed for seed in first.seeds if seed in second.seeds]
        if not common:
            return "they have no pre-training seed in common"
        one = one[[first.seeds.index(seed) for seed in common]]
        two = two[[second.seeds.index(seed) for seed in common]]
    elif one.shape[0] != two.shape[0] and 1 not in (one.shape[0], two.shape[0]):
        return "they have different numbers of pre-training seeds"
    one, two = np.broadcast_arrays(one, two)
    return one, two


def _named(arm: Arm) -> bool:
    """Tell whether an arm names the pre-training seed of each run."""
    return len(arm.seeds) == len(arm.runs) and None not in arm.seeds


def compare(pairs: Iterable[tuple[Arm, Arm]]) -> tuple[list[Comparison], list[str]]:
    """Compute differences in accuracy with their 95 % intervals.

    Returns:
        `(comparisons, notes)`; a note is a sentence about a pair that cannot be compared, and why,
        or about chance that an interval cannot count.
    """
    found, notes, alike, few = [], [], [], []
    unlike: dict[str, list[str]] = {}
    for first, second in pairs:
        values = paired(first, second)
        if isinstance(values, str):
            notes.append(f"{first.name} and {second.name} are not compared: {values}.")
            continue
        if settings := unlike_settings(first, second):
            unlike.setdefault(settings, []).append(f"{first.name} and {second.name}")
        difference = paired_difference(*values)
        if difference.standard_error == 0:
            alike.append(f"{first.name} and {second.name}")
        if values[0].shape[0] < max(len(first.runs), len(second.runs)):
            few.append(f"{first.name} and {second.name}")
        found.append(Comparison(first, second, difference, values[0].shape))
    if alike:
        notes.append(f"An interval without width says nothing: {', '.join(alike)} differ by the "
                     "same at every seed and item.")
    for settings, names in unlike.items():
        notes.append(f"Fine-tuned differently ({settings}): {', '.join(names)}; their differences "
                     "are not those of the masks alone.")
    if few:
        notes.append(f"Compared on the pre-training seeds that both have: {', '.join(few)}.")
    return found, notes + uncounted_chance([(one.first, one.second) for one in found])


def unlike_settings(first: Arm, second: Arm) -> str:
    """Return the settings of fine-tuning in which the models of two arms differ, with the values.

    On a CPU the precision follows from the machine, so that a study that went on elsewhere may
    have two.
    """
    values: dict[str, set[str]] = {}
    for run in [*first.runs, *second.runs]:
        for told in run.settings():
            for key, value in told.items():
                values.setdefault(key, set()).add(visible(value))
    return "; ".join(f"{visible(key)}: {', '.join(sorted(seen))}" for key, seen in values.items()
                     if len(seen) > 1)


def difference_rows(comparisons: Iterable[Comparison]) -> list[dict[str, Any]]:
    """Make one row per comparison, with the keys of `DIFFERENCE_COLUMNS`."""
    return [{
        "arm": one.first.shown, "against": one.second.shown,
        "labels": shown(one.first.labels), "steps": shown(one.steps),
        "difference": f"{one.found.mean:+.4f}", "low": f"{one.found.low:+.4f}",
        "high": f"{one.found.high:+.4f}", "verdict": one.verdict,
        "detectable": f"{one.found.detectable:.4f}" if one.found.standard_error else "",
        "seeds": f"{one.shape[0]}x{one.shape[1]}", "items": one.shape[2],
    } for one in comparisons]


def uncounted_chance(pairs: Sequence[tuple[Arm, Arm]]) -> list[str]:
    """Describe the sources of chance that the intervals of these pairs leave out."""
    arms = list({arm.name: arm for pair in pairs for arm in pair}.values())

    def named(chosen: Iterable[Arm]) -> str:
        return ", ".join(dict.fromkeys(arm.shown for arm in chosen))

    notes = []
    single = [arm for arm in arms if len(arm.runs) == 1]
    if single:
        more = ("" if all(arm.strategy == NO_STAGE_2 for arm in single) else
                "; give pretrain_seeds: [41, 42, 43] in the recipe")
        notes.append(
            f"One pre-training seed lies behind {named(single)}: the intervals of their "
            "differences cannot count the chance of that pre-training, and are too narrow. Seeds "
            f"of fine-tuning that share one checkpoint are no independent evidence{more}."
        )
    if any(len(run.seeds) == 1 for arm in arms for run in arm.runs):
        few = [arm for arm in arms if len(arm.runs[0].seeds) == 1]
        notes.append(f"One fine-tuning seed lies behind {named(few)}: the chance of fine-tuning "
                     "is not counted there.")
    shared = [arm for arm in arms if len(arm.runs) > 1 and _shares_stage_1(arm)]
    if shared:
        notes.append(
            f"The pre-training seeds of {named(shared)} are of stage 2 and start from one stage-1 "
            "checkpoint: the chance of stage 1 is not counted."
        )
    copies = []
    for arm in arms:
        # Without stage 2 the runs start from one model, and their examples may differ.
        prints = [run.weights for run in arm.runs if run.weights]
        if len(set(prints)) < len(prints) and arm.strategy != NO_STAGE_2:
            copies.append(arm)
    alike = [arm for arm in arms if arm.strategy == NO_STAGE_2 and len(arm.runs) > 1
             and len({run.weights for run in arm.runs}) == 1]
    if alike:
        notes.append(f"The runs of {named(alike)} start from one model, and differ in the "
                     "examples and in fine-tuning alone.")
    if copies:
        notes.append(f"{named(copies)}: some of its runs were fine-tuned from one and the same "
                     "checkpoint, so they are no separate pre-training seeds.")
    return notes


def _shares_stage_1(arm: Arm) -> bool:
    stages = arm.runs[0].stages[:-1]
    return bool(stages) and all(run.stages[:-1] == stages for run in arm.runs)
