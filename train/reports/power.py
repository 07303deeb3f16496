"""What larger studies would reveal: the parts of a difference's variance, and sizes to plan by.

A difference varies with the pre-training seed, with the fine-tuning seed, with each fine-tuning for
itself and with the test item. `spread_of` finds the standard deviation of each for one seed or one
item, by the analysis of variance behind the intervals (train/reports/intervals.py). A study of `P`
pre-training seeds, `S` fine-tuning seeds and `N` items then has the variance

    seed^2 / P + finetuning^2 / S + each^2 / (P S) + item^2 / N

and the detectable difference follows as in an interval. Only the spread of the differences goes in,
never the difference itself, so a study may be planned by it without choosing what one likes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from train.reports.compare import Comparison, paired, shown
from train.reports.intervals import around, item_component, seed_components

PLANNED_SEEDS = (3, 5, 10, 20)  # of pre-training
TARGET = 0.015  # difference in accuracy that a study of this kind aims at
MOST_SEEDS = 1000
POWER_COLUMNS = ("arm", "against", "labels", "steps", "seed", "finetuning", "each", "item",
                 *(f"detectable_{count}" for count in PLANNED_SEEDS), "needed")


class Spread(NamedTuple):
    """Standard deviations of a difference: of one pre-training seed, one fine-tuning seed, one
    fine-tuning for itself, and one test item."""

    seed: float
    finetuning: float
    each: float
    item: float


def spread_of(values: np.ndarray) -> Spread | None:
    """Return the parts of the spread; None without two seeds of pre-training.

    With one fine-tuning seed, what each fine-tuning adds by itself is in the pre-training seed's.

    Args:
        values: differences of answers, `(P, S, N)` float64.
    """
    num_seeds, num_finetunings, num_items = values.shape
    if num_seeds < 2:
        return None
    parts = [variance for variance, _ in seed_components(values.mean(axis=2))]
    sizes = (num_seeds, num_finetunings, num_seeds * num_finetunings)
    if num_finetunings == 1:
        parts = [*parts, 0.0, 0.0]
    seed, finetuning, each = (math.sqrt(variance * size) for variance, size
                              in zip(parts or [0.0] * 3, sizes, strict=True))
    return Spread(seed, finetuning, each, math.sqrt(item_component(values)[0] * num_items))


def detectable(spread: Spread, seeds: int, finetunings: int, items: int) -> float:
    """Return the difference that a study of such a size would reveal in 80 % of repetitions.

    Args:
        seeds, finetunings: of pre-training, two or more, and of fine-tuning.
        items: of the test split.
    """
    cells = seeds * finetunings
    return around(0.0, [
        (spread.seed**2 / seeds, seeds - 1),
        (spread.finetuning**2 / finetunings, max(finetunings - 1, 1)),
        (spread.each**2 / cells, cells - 1), (spread.item**2 / items, items - 1)]).detectable


def seeds_for(spread: Spread, target: float, finetunings: int, items: int) -> int | None:
    """Return how many pre-training seeds reveal a difference; None if `MOST_SEEDS` do not."""
    low, high = 1, MOST_SEEDS
    if detectable(spread, high, finetunings, items) > target:
        return None
    while high - low > 1:  # more seeds reveal smaller differences
        middle = (low + high) // 2
        if detectable(spread, middle, finetunings, items) > target:
            low = middle
        else:
            high = middle
    return high


def power_rows(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return what larger studies would reveal, by `POWER_COLUMNS`; percentage points.

    Of each pair of arms and number of labels the longest stage 2 counts.
    """
    longest: dict[tuple, Comparison] = {}
    for one in comparisons:
        key = (one.first.line, one.second.line, one.first.labels, one.first.stage1_steps)
        if key not in longest or (one.steps or 0) > (longest[key].steps or 0):
            longest[key] = one
    rows = []
    for one in longest.values():
        values = paired(one.first, one.second)
        spread = None if isinstance(values, str) else spread_of(values[0] - values[1])
        if spread is None or not any(spread):
            continue
        _, finetunings, items = one.shape
        rows.append({
            "arm": one.first.shown, "against": one.second.shown, "labels": shown(one.first.labels),
            "steps": shown(one.steps),
            **{name: f"{100 * value:.2f}" for name, value in spread._asdict().items()},
            **{f"detectable_{count}": f"{100 * detectable(spread, count, finetunings, items):.2f}"
               for count in PLANNED_SEEDS},
            "needed": shown(seeds_for(spread, TARGET, finetunings, items))})
    return rows
