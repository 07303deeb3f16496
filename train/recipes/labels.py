"""Label budgets of a study: how many labelled examples each of its runs may read, and which.

A budget limits everything that reads labels: classifier, annotation, scorer, fine-tuning. The
examples of a budget are drawn by the pre-training seed, the same for every arm, so the classifier
and what follows from it exist once per budget and seed. With the budget `all` nothing is drawn, and
they exist once. Scores that read no labels, and the arms that use them, are the same for all
budgets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from preprocess.corpus import Task, limit_labels, load_task
from preprocess.errors import ConfigError
from train.recipes.arms import NamedScores, PlannedArm, default_policy
from train.recipes.values import shown_value

ALL = "all"
# Each would take fewer examples than the budget says.
LIMITED_OTHERWISE = ("classifier", "annotate", "finetune")


@dataclass(frozen=True)
class Labels:
    """The labelled training examples that a step may read.

    Attributes:
        budget: their number, or `ALL`; None where the recipe has no budgets, or the step reads no
            labels.
        seed: what draws them; None where nothing is drawn.
    """

    budget: int | str | None = None
    seed: int | None = None

    @property
    def word(self) -> str:
        """What they add to the name of a folder that has the seed in its name already."""
        return "" if self.budget is None else f"-labels{self.budget}"

    @property
    def ending(self) -> str:
        """What they add to any other name."""
        return self.word if self.seed is None else f"{self.word}-seed{self.seed}"

    @property
    def flags(self) -> dict[str, Any]:
        """How the commands that read labels are told."""
        return {} if self.seed is None else {"label_budget": self.budget, "label_seed": self.seed}


def read_budgets(value: Any, recipe: str) -> list[int | str]:
    """Check the list `label_budgets`.

    Raises:
        ConfigError: not a list, an entry that is neither a whole number above 0 nor `all`, or one
            that repeats.
    """
    allowed = f"{recipe}: label_budgets must be a list of whole numbers and all, as [100, 500, all]"
    if not isinstance(value, list):
        raise ConfigError(f"{allowed}; got {shown_value(value)}")
    for entry in value:
        if entry != ALL and (type(entry) is not int or entry < 1):
            raise ConfigError(f"{allowed}; {shown_value(entry)} is neither 1 or more nor all")
    if len(set(value)) < len(value):
        raise ConfigError(f"{allowed}, without repeats; got {shown_value(value)}")
    return value


def check_budgets(recipe: dict[str, Any]) -> None:
    """Read the task, and refuse budgets that it cannot fill: before hours of other work.

    Raises:
        ConfigError: fewer labelled examples than a budget, more classes, or a budget that is all.
        DataError: as of `load_task`.
    """
    budgets = [budget for budget in recipe["label_budgets"] if budget != ALL]
    if budgets:
        task = read_task(recipe["task"])
        for budget in budgets:
            try:
                limit_labels(task, budget)
            except ConfigError as error:
                raise ConfigError(f"label_budgets: {error}") from None
            if ALL in recipe["label_budgets"] and budget == len(task.splits["train"]):
                raise ConfigError(f"label_budgets: {budget} and all are the same examples of task "
                                  f"{task.name}; leave one of them out")


def read_task(flags: dict[str, Any]) -> Task:
    """Read the labelled task that the section `task` describes."""
    return load_task(flags["task"], **{key: flags[key] for key in flags if key != "task"})


def draws(budgets: Sequence[int | str], seed: int | None) -> list[Labels]:
    """Return what runs of a pre-training seed may read: one entry per budget.

    Without a seed, only what all seeds share.
    """
    if not budgets:
        return [Labels()]
    return [Labels(budget, None if budget == ALL else seed) for budget in budgets
            if budget == ALL or seed is not None]


def reads_labels(
    arm: PlannedArm, arms: Sequence[PlannedArm], scores: Mapping[str, NamedScores]
) -> bool:
    """Return whether an arm's masks follow from labels: by its scores, its units or its match."""
    if any(scores[name].reads_labels for name in (arm.scores, arm.units) if name):
        return True
    if not arm.match:
        return False
    named = (one for one in arms if one.name == arm.match)
    return reads_labels(next(named, None) or default_policy(arm.match), arms, scores)
