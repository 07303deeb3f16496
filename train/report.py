"""A table and figures of finished and running runs.

    python train/report.py runs/demo [MORE...] [--output_dir report]

It reads TensorBoard event files, `results.jsonl` and predictions of any number of run directories
or output folders of `train/pipeline.py`, and nothing else: no printed text is parsed. What is
missing is said in a sentence; what can be shown is shown. Figures need matplotlib (`pip install
selmask[plot]`); the table does not.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preprocess.errors import DataError, run_command
from train.metrics import EVAL_LOSS, EVAL_PERPLEXITY, MASKED_FRACTION, TRAIN_LOSS
from train.results import (
    DIFFERENCE_COLUMNS,
    TABLE_COLUMNS,
    Arm,
    difference_rows,
    format_table,
    mean_and_sd,
    read_finetune_run,
    table_rows,
)

MAX_LINES = 12  # curves in one panel; more cannot be told apart
# Distinct under the common colour-vision deficiencies (Okabe and Ito), and in grey by marker.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


@dataclass(frozen=True)
class Curves:
    """The scalars of one training run: tag -> (steps, values)."""

    name: str
    scalars: dict[str, tuple[list[int], list[float]]]

    @property
    def is_pretraining(self) -> bool:
        return MASKED_FRACTION in self.scalars or EVAL_PERPLEXITY in self.scalars


@dataclass(frozen=True)
class Group:
    """Arms that are compared with each other: of one pipeline folder and stage-1 length."""

    name: str
    arms: list[Arm]
    floors: list[Arm]


# --------------------------------------------------------------------------- reading


def read_groups(folders: Sequence[Path]) -> tuple[list[Group], list[str]]:
    """All fine-tuning results below the folders, and a sentence for what cannot be read."""
    groups: list[Group] = []
    loose: list[Arm] = []
    notes: list[str] = []
    for folder in folders:
        if (folder / "arms.json").is_file():
            groups += _pipeline_groups(folder, len(folders) > 1, notes)
            continue
        found = _finetune_folders(folder)
        for path in found:
            arm = _read_arm(_short_name(path, folders), [path], notes)
            if arm is not None:
                loose.append(arm)
        if not found and not _event_folders(folder):
            notes.append(f"{folder}: no run in it (no results.jsonl and no tb/).")
    if loose:
        groups.append(Group("", loose, []))
    return groups, notes


def _pipeline_groups(folder: Path, several: bool, notes: list[str]) -> list[Group]:
    try:
        listed = json.loads((folder / "arms.json").read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        raise DataError(f"{folder}/arms.json: not JSON; run train/pipeline.py again") from None
    prefix = f"{folder.name}/" if several else ""
    groups: dict[str, Group] = {}
    floors = []
    for entry in listed:
        runs = [folder / run for run in entry["runs"]]
        arm = _read_arm(prefix + entry["name"], runs, notes)
        if arm is None:
            continue
        if entry["floor"]:
            floors.append(arm)
            continue
        _, _, length = entry["name"].partition("@")
        groups.setdefault(length, Group(prefix + length, [], floors)).arms.append(arm)
    return list(groups.values()) or ([Group(prefix, [], floors)] if floors else [])


def _read_arm(name: str, paths: list[Path], notes: list[str]) -> Arm | None:
    runs = []
    for path in paths:
        try:
            runs.append(read_finetune_run(path))
        except DataError as error:
            notes.append(f"{name}: {error}.")
    return Arm(name, runs) if runs else None


def _finetune_folders(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.rglob("results.jsonl"))


def _event_folders(folder: Path) -> list[Path]:
    return sorted({path.parent for path in folder.rglob("events.out.tfevents.*")})


def _short_name(path: Path, folders: Sequence[Path]) -> str:
    """The part of a path that tells it from the others."""
    common = os.path.commonpath([str(f.resolve().parent) for f in folders])
    return os.path.relpath(path.resolve(), common)


def read_curves(folders: Sequence[Path]) -> tuple[list[Curves], list[str]]:
    """Training curves of all runs below the folders; empty event files are named."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves, notes = [], []
    for folder in folders:
        for path in _event_folders(folder):
            events = EventAccumulator(str(path), size_guidance={"scalars": 0})
            events.Reload()
            scalars = {}
            for tag in (TRAIN_LOSS, EVAL_LOSS, EVAL_PERPLEXITY, MASKED_FRACTION):
                if tag in events.Tags()["scalars"]:
                    scalars[tag] = _ascending(events.Scalars(tag))
            run = path.parent if path.name == "tb" else path
            name = str(run.relative_to(folder)) if len(folders) == 1 else _short_name(run, folders)
            if scalars:
                curves.append(Curves(folder.name if name == "." else name, scalars))
            else:
                notes.append(f"{path}: no loss has been logged yet.")
    return curves, notes


def _ascending(points: Sequence[Any]) -> tuple[list[int], list[float]]:
    """Steps and values, without what the HParams page adds at step 0 when a run ends."""
    steps: list[int] = []
    values: list[float] = []
    for point in points:
        if not steps or point.step > steps[-1]:
            steps.append(point.step)
            values.append(point.value)
    return steps, values


# --------------------------------------------------------------------------- tables


def pairs_of(groups: Sequence[Group]) -> Iterator[tuple[Arm, Arm]]:
    """Every two arms of a group, the later one minus the earlier one."""
    for group in groups:
        for later, first in enumerate(group.arms):
            for second in group.arms[:later]:
                yield first, second


def all_arms(groups: Sequence[Group]) -> list[Arm]:
    """Arms of all groups, floors last and once."""
    arms = [arm for group in groups for arm in group.arms]
    floors: list[Arm] = []
    for group in groups:
        floors += [floor for floor in group.floors if all(floor is not f for f in floors)]
    return arms + floors


def write_csv(path: Path, rows: list[dict[str, Any]], columns: Sequence[str]) -> None:
    """Write rows with a header line."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)


def below_floors(groups: Sequence[Group]) -> list[str]:
    """A sentence for every arm whose mean accuracy does not exceed every floor's."""
    sentences = []
    for group in groups:
        for arm in group.arms:
            for floor in group.floors:
                ours, theirs = (mean_and_sd(a.values("accuracy"))[0] for a in (arm, floor))
                if ours <= theirs:
                    sentences.append(f"{arm.name} ({ours:.4f}) is not above the floor "
                                     f"{floor.name} ({theirs:.4f}).")
    return sentences


# --------------------------------------------------------------------------- figures


def plot_loss(curves: Sequence[Curves], path: Path) -> str | None:
    """Loss against steps, a panel for each kind of loss; returns a note if some are left out."""
    import matplotlib.pyplot as plt

    panels = [
        ("Pre-training: training loss", TRAIN_LOSS, [c for c in curves if c.is_pretraining]),
        ("Pre-training: held-out loss, same masks", EVAL_LOSS,
         [c for c in curves if c.is_pretraining]),
        ("Classifiers and scorer: training loss", TRAIN_LOSS,
         [c for c in curves if not c.is_pretraining]),
    ]
    panels = [
        (title, tag, runs) for title, tag, lines in panels
        if (runs := [c for c in lines if tag in c.scalars])
    ]
    if not panels:
        return None
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(8, 3.4 * len(panels)), layout="constrained", squeeze=False
    )
    omitted = 0
    for axis, (title, tag, runs) in zip(axes[:, 0], panels, strict=True):
        omitted = max(omitted, len(runs) - MAX_LINES)
        for number, run in enumerate(runs[:MAX_LINES]):
            steps, values = run.scalars[tag]
            axis.plot(
                steps, values, color=COLOURS[number % len(COLOURS)], linewidth=1.2,
                linestyle=("-", "--", ":")[number // len(COLOURS) % 3],
                marker=MARKERS[number % len(MARKERS)] if len(steps) < 8 else None,
                markersize=4, label=run.name,
            )
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_ylabel("nats")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    axes[-1, 0].set_xlabel("step")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return f"{path.name} leaves out {omitted} runs." if omitted > 0 else None


def plot_accuracy(groups: Sequence[Group], path: Path) -> None:
    """Test accuracy of each arm: every seed a dot, the mean with its standard deviation."""
    import matplotlib.pyplot as plt

    arms = all_arms(groups)
    figure, axis = plt.subplots(figsize=(7, 1.2 + 0.45 * len(arms)), layout="constrained")
    floors = {id(floor) for group in groups for floor in group.floors}
    for row, arm in enumerate(arms):
        values = [100 * value for value in arm.values("accuracy")]
        mean, sd = mean_and_sd(values)
        colour = "#777777" if id(arm) in floors else COLOURS[0]
        axis.plot(values, [row] * len(values), "o", color=colour, alpha=0.35, markersize=5)
        axis.errorbar(mean, row, xerr=None if math.isnan(sd) else sd, fmt="D", color=colour,
                      capsize=4, markersize=6)
        axis.annotate(f"{mean:.2f}", (mean, row), textcoords="offset points", xytext=(0, 9),
                      ha="center", fontsize=8)
    axis.set_yticks(range(len(arms)), [arm.name for arm in arms])
    axis.set_ylim(len(arms) - 0.5, -0.7)
    axis.set_xlabel("test accuracy, % (dots: seeds; bar: standard deviation)")
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_steps(groups: Sequence[Group], path: Path) -> None:
    """Accuracy against all pre-training steps of an arm, one line for each kind of arm."""
    import matplotlib.pyplot as plt

    kinds: dict[str, list[tuple[float, float, float]]] = {}
    for arm in (arm for group in groups for arm in group.arms):
        steps = [run.cost["steps"] for run in arm.runs if "steps" in run.cost]
        if not steps:
            continue
        mean, sd = mean_and_sd([100 * value for value in arm.values("accuracy")])
        point = (sum(steps) / len(steps), mean, 0.0 if math.isnan(sd) else sd)
        kinds.setdefault(re.sub(r"@\d+$", "", arm.name), []).append(point)
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for number, (kind, points) in enumerate(kinds.items()):
        places, means, sds = zip(*sorted(points), strict=True)
        axis.errorbar(places, means, yerr=sds, label=kind, color=COLOURS[number % len(COLOURS)],
                      marker=MARKERS[number % len(MARKERS)], capsize=3, linewidth=1.2)
    axis.set_xlabel("pre-training steps in all (stage 1 and stage 2)")
    axis.set_ylabel("test accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw(groups: Sequence[Group], curves: Sequence[Curves], output: Path) -> list[str]:
    """Write the figures that the data allow; return sentences about what is missing."""
    try:
        import matplotlib
    except ImportError:
        return ["No figures: matplotlib is not installed (pip install 'selmask[plot]')."]
    matplotlib.use("Agg")
    notes = []
    if curves:
        notes.append(plot_loss(curves, output / "loss.png"))
    if groups:
        plot_accuracy(groups, output / "accuracy.png")
    if len({arm.runs[0].cost.get("steps") for group in groups for arm in group.arms}) > 2:
        plot_steps(groups, output / "steps.png")
    return [note for note in notes if note]


# --------------------------------------------------------------------------- the command


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="R",
                        help="run directories, or output folders of train/pipeline.py")
    parser.add_argument("--output_dir", default="report",
                        help="folder for table.csv, differences.csv and the figures")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command."""
    options = parse_arguments(argv)
    folders = [Path(run) for run in options.runs]
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; name run directories")
    groups, notes = read_groups(folders)
    curves, curve_notes = read_curves(folders)
    if not groups and not curves:
        raise DataError(
            f"no run in {', '.join(options.runs)}: expected results.jsonl of train/finetune.py or "
            "tb/ of a training command; name their folders"
        )
    output = Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    if groups:
        rows = table_rows(all_arms(groups))
        differences, pair_notes = difference_rows(pairs_of(groups))
        write_csv(output / "table.csv", rows, TABLE_COLUMNS)
        write_csv(output / "differences.csv", differences, DIFFERENCE_COLUMNS)
        print(format_table(rows, TABLE_COLUMNS))
        if differences:
            print("\nDifferences, with 95 % intervals over seeds and test sentences "
                  "(paired bootstrap)")
            print(format_table(differences, DIFFERENCE_COLUMNS))
        notes += pair_notes + below_floors(groups)
    else:
        notes.append("No fine-tuning results yet, so no table.")
    notes += curve_notes + draw(groups, curves, output)
    print()
    for note in notes:
        print(f"Note: {note}")
    print(f"Written to {output}: {', '.join(sorted(p.name for p in output.iterdir()))}")


if __name__ == "__main__":
    run_command(main)
