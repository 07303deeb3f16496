"""The difference of two arms, each one or more fine-tuning directories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from preprocess.errors import DataError
from train.reports.compare import compare
from train.reports.results import Arm, read_finetune_run


class RunsCompared(NamedTuple):
    """The difference in test accuracy of two arms, first minus second.

    mean: a share, such as 0.012. low, high: its 95 % interval. detectable: the smallest true
    difference that so many seeds and items reveal. notes: a sentence for each thing that limits the
    comparison, such as chance that the interval cannot count.
    """

    mean: float
    low: float
    high: float
    detectable: float
    notes: list[str]


Folders = str | Path | Sequence[str | Path]


def compare_runs(first: Folders, second: Folders) -> RunsCompared:
    """Compare two fine-tuning directories, or two lists of them, one per pre-training seed.

    Both sides need the same fine-tuning seeds and test items; see `paired_difference` for the
    method.

    Raises:
        DataError: a directory without results, or two that cannot be compared, and why.
    """
    arms = []
    for given in (first, second):
        paths = [given] if isinstance(given, (str, Path)) else list(given)
        if not paths:
            raise DataError("compare_runs: a side without a folder; give at least one of "
                            "train/finetune.py")
        runs = [read_finetune_run(path) for path in paths]
        arms.append(Arm(", ".join(map(str, paths)), runs))
    comparisons, notes = compare([(arms[0], arms[1])])
    if not comparisons:
        raise DataError(notes[0])
    found = comparisons[0].found
    read = [note for arm in arms for run in arm.runs for note in run.notes]
    return RunsCompared(found.mean, found.low, found.high, found.detectable, read + notes)
