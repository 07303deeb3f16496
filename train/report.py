"""Report on runs, finished or running: tables, figures and a page.

    python train/report.py runs/demo [MORE...] [--output_dir report]

Read the TensorBoard event files, `results.jsonl` and predictions of any number of run directories
or output folders of `train/pipeline.py`. `report.html`, a single file without scripts or network,
holds everything, including a note on each missing part; tables are also written as CSV and figures
as PNG. Figures need matplotlib (`pip install selmask[plot]`); tables do not.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preprocess.corpus import describe_leakage
from preprocess.errors import ConfigError, DataError, DiskFullError, run_command, visible
from preprocess.files import WriterLock, atomic_write_bytes, read_json
from preprocess.flags import USUAL, Parser
from preprocess.masking import BASELINE, MATCHED, STRATEGIES
from preprocess.view.tables import Table
from train.reports.curves import (
    RUN_COLUMNS,
    Curves,
    event_folders,
    read_curves,
    run_rows,
    short_name,
    without_events,
)
from train.reports.page import Picture, as_html
from train.reports.results import (
    DIFFERENCE_COLUMNS,
    TABLE_COLUMNS,
    Arm,
    FinetuneRun,
    difference_rows,
    mean_and_sd,
    number,
    read_finetune_run,
    table_rows,
)

RESULTS = ("table", "differences")  # printed last: the most important tables
COST_COLUMNS = ("arm", "general", "masking", "task_guided", "total", "masking_share",
                "share_of_full")
MASKING_COLUMNS = ("step", "seconds", "arms")
WAIT_SECONDS = 30.0  # for another report that is being written into the same folder


@dataclass(frozen=True)
class Group:
    """Arms to compare with each other: of one task, pipeline folder and stage-1 length."""

    name: str
    arms: list[Arm]
    floors: list[Arm]


# --------------------------------------------------------------------------- reading


def read_groups(folders: Sequence[Path]) -> tuple[list[Group], list[str]]:
    """Read all fine-tuning results below the folders; return a note on each unreadable one."""
    groups: list[Group] = []
    notes: list[str] = []
    pipelines = {path.parent.resolve(): path.parent
                 for folder in folders for path in sorted(folder.rglob("arms.json"))}
    loose: dict[Path, Path] = {}
    for folder in folders:
        found = sorted(path.parent for path in folder.rglob("results.jsonl"))
        for path in found:
            if not any(path.resolve().is_relative_to(root) for root in pipelines):
                loose.setdefault(path.resolve(), path)
        trained = event_folders(folder) or without_events(folder)
        if not found and not trained and folder.resolve() not in pipelines:
            notes.append(f"{folder}: no run in it (no results.jsonl and no event files).")
    alone = len(pipelines) == 1 and not loose
    for path in pipelines.values():
        groups += _pipeline_groups(path, "" if alone else f"{short_name(path, folders)}/", notes)
    arms = _loose_arms([(short_name(path, folders), path) for path in loose.values()], notes)
    for task in dict.fromkeys(arm.task for arm in arms):
        groups.append(Group(task, [arm for arm in arms if arm.task == task], []))
    return groups, notes


def _pipeline_groups(folder: Path, prefix: str, notes: list[str]) -> list[Group]:
    try:
        listed = read_json(folder / "arms.json", expected=list)
        entries = [(visible(entry["name"]), [_inside(folder, run) for run in entry["runs"]],
                    bool(entry["floor"]), entry.get("masking"), _policy(entry)) for entry in listed]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DataError(
            f"{folder}/arms.json: not a list of arms; run train/pipeline.py again"
        ) from None
    seconds = _step_seconds(folder)
    groups: dict[str, Group] = {}
    floors = []
    try:
        leaked = describe_leakage(str(folder / "domain" / "text"))
        notes += [f"{prefix.rstrip('/')}: {leaked}" if prefix else leaked] if leaked else []
    except (DataError, OSError) as error:
        notes.append(f"{error}.")
    for name, paths, is_floor, steps, policy in entries:
        runs = list(_read_runs(prefix + name, paths, notes))
        if not runs:
            continue
        line, _, length = name.partition("@")
        used = None
        if isinstance(steps, list) and all(str(step) in seconds for step in steps):
            used = {f"{prefix}{visible(step)}": seconds[str(step)] for step in steps}
        match = policy.pop("match", "")
        arm = Arm(prefix + name, runs, prefix + line, used,
                  match=prefix + match if match else "", **policy)
        if is_floor:
            floors.append(arm)
        else:
            groups.setdefault(length, Group(prefix + length, [], floors)).arms.append(arm)
    return list(groups.values()) or ([Group(prefix, [], floors)] if floors else [])


def _policy(entry: dict[str, Any]) -> dict[str, str]:
    """Return how an arm chose its masks; an older list tells only its name, a strategy's."""
    keys = ("strategy", "scores", "units", "match")
    if "strategy" in entry:
        return {key: visible(entry.get(key) or "") for key in keys}
    line = str(entry["name"]).partition("@")[0]
    record = STRATEGIES.get(line)
    if record is None:
        return {"strategy": line if line == "none" else ""}
    return {"strategy": line, "match": MATCHED if "match" in record.needs else ""}


def _inside(folder: Path, run: Any) -> Path:
    if not isinstance(run, str) or Path(run).is_absolute() or ".." in Path(run).parts:
        raise ValueError
    return folder / run


def _step_seconds(folder: Path) -> dict[str, float]:
    """Return the recorded seconds of the pipeline's finished steps."""
    try:
        steps = read_json(folder / "steps.json")
        return {name: seconds for name, step in steps.items()
                if step["finished"] and (seconds := number(step.get("seconds"))) is not None}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _read_runs(name: str, paths: Iterable[Path], notes: list[str]) -> Iterator[FinetuneRun]:
    """Yield the readable runs of an arm that have the task of the first one."""
    task = None
    for path in paths:
        try:
            run = read_finetune_run(path)
        except (DataError, OSError) as error:
            notes.append(f"{name}: {error}.")
            continue
        notes += [f"{note}." for note in run.notes]
        if task not in (None, run.task):
            notes.append(f"{name}: {path} has task {run.task}, the runs before it {task}; it is "
                         "left out.")
            continue
        task = run.task
        yield run


def _loose_arms(found: Sequence[tuple[str, Path]], notes: list[str]) -> list[Arm]:
    """Make arms of fine-tuning folders; join those that differ only in the pre-training seed."""
    alike: dict[str, list[tuple[str, FinetuneRun]]] = {}
    for name, path in found:
        for run in _read_runs(name, [path], notes):
            alike.setdefault(_without_seeds(run), []).append((name, run))
    arms = []
    for members in alike.values():
        seeds = [tuple(str(stage.get("seed")) for stage in run.stages) for _, run in members]
        if len(set(seeds)) == len(seeds) > 1:
            names = [name for name, _ in members]
            arm = re.sub(r"[-_.]?seed[-_]?\d+$", "", names[0])
            notes.append(f"{', '.join(names)} are treated as pre-training seeds of one arm, "
                         f"{arm}: their lineages differ in nothing else.")
            runs = [run for _, run in members]
            members = [(arm, runs[0])]
        else:
            runs = []
        arms += [Arm(name, runs or [run], run.strategy, _drawn_steps(run),
                     strategy=visible(run.strategy)) for name, run in members]
    return arms


def _without_seeds(run: FinetuneRun) -> str:
    """Serialize everything that the runs of one arm have in common."""
    varying = {"seed", "seconds", "tokens", "masked_tokens", "weights", "started_from"}
    stages = [{key: value for key, value in stage.items() if key not in varying}
              for stage in run.stages]
    return json.dumps([run.task, run.seeds, stages], sort_keys=True)


def _drawn_steps(run: FinetuneRun) -> dict[str, float] | None:
    """Return no step for masks that cost nothing beforehand, None where the cost is unknown."""
    strategy = STRATEGIES.get(run.strategy)
    return {} if run.strategy == "none" or strategy and strategy.drawn else None


# --------------------------------------------------------------------------- tables


def pairs_of(groups: Sequence[Group]) -> Iterator[tuple[Arm, Arm]]:
    """Yield every two arms of each group, to subtract the second from the first.

    First come those that tell what a policy is worth: each arm against the one without task-guided
    pre-training, against random masks and against its own control.
    """
    for group in groups:
        plain = [arm for strategy in ("none", BASELINE) for arm in group.arms
                 if arm.strategy == strategy]
        told: dict[frozenset[str], tuple[Arm, Arm]] = {}
        for arm in group.arms:
            controls = [other for other in group.arms if other.match and other.match == arm.line]
            for other in [*plain, *controls]:
                if other is not arm and not (arm in plain and other not in plain[:1]):
                    told.setdefault(frozenset((arm.name, other.name)), (arm, other))
        for later, first in enumerate(group.arms):
            for second in group.arms[:later]:
                told.setdefault(frozenset((first.name, second.name)), (first, second))
        yield from told.values()


def floors_of(groups: Sequence[Group]) -> list[Arm]:
    """Return the baselines of all groups, each once."""
    return list({id(floor): floor for group in groups for floor in group.floors}.values())


def arms_of(groups: Sequence[Group]) -> list[Arm]:
    """Return the arms of all groups, without baselines."""
    return [arm for group in groups for arm in group.arms]


def below_floors(groups: Sequence[Group]) -> list[str]:
    """Write a note for every arm whose mean accuracy does not exceed that of every baseline."""
    sentences = []
    for group in groups:
        for arm in group.arms:
            for floor in group.floors:
                ours, theirs = (mean_and_sd(a.values("accuracy"))[0] for a in (arm, floor))
                if ours <= theirs:
                    sentences.append(f"{arm.name} ({ours:.4f}) is not above the baseline "
                                     f"{floor.name} ({theirs:.4f}).")
    return sentences


def cost_rows(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Return the seconds of each arm before fine-tuning by `COST_COLUMNS`; unknown: empty."""
    parts = {arm.name: _parts(arm) for arm in arms}
    full: dict[str, set[float]] = {}  # seconds of general pre-training, by family of arms
    for arm in arms:
        if parts[arm.name]["general"] is not None:
            full.setdefault(_family(arm), set()).add(parts[arm.name]["general"])
    rows = []
    for arm in arms:
        part = parts[arm.name]
        lengths = full.get(_family(arm), set())
        known = [value for value in part.values() if value is not None]
        total = sum(known) if len(known) == 3 else None
        rows.append({
            "arm": arm.name,
            **{key: "" if value is None else f"{value:.0f}" for key, value in part.items()},
            "total": "" if total is None else f"{total:.0f}",
            "masking_share": f"{part['masking'] / total:.3f}" if total else "",
            "share_of_full": f"{total / max(lengths):.3f}" if total and len(lengths) > 1 else "",
        })
    return rows


def _family(arm: Arm) -> str:
    """Name the arms whose costs are comparable: of one folder and task."""
    return f"{arm.task} {arm.name.rpartition('/')[0]}"


def _parts(arm: Arm) -> dict[str, Any]:
    """Return the seconds of each part of an arm, averaged over its pre-training seeds."""
    stages = arm.runs[0].stages
    if not stages:
        return {"general": None, "masking": None, "task_guided": None}
    only_general = arm.line.rpartition("/")[2] == "none"
    guided = [number(run.stages[-1].get("seconds")) for run in arm.runs if run.stages]
    known = [value for value in guided if value is not None]
    before = [number(stage.get("seconds")) or 0.0 for stage in stages]
    return {
        "general": sum(before) if only_general else sum(before[:-1]),
        "masking": arm.masking_seconds,
        "task_guided": 0.0 if only_general else sum(known) / len(known) if known else None,
    }


def masking_rows(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Return the seconds of each step that chose masks, once, and the arms that share it."""
    seconds: dict[str, float] = {}
    users: dict[str, list[str]] = {}
    for arm in arms:
        for step, spent in (arm.masking_steps or {}).items():
            seconds[step] = spent
            users.setdefault(step, []).append(arm.name)
    rows = [{"step": step, "seconds": f"{spent:.0f}", "arms": ", ".join(users[step])}
            for step, spent in seconds.items()]
    if rows:
        rows.append({"step": "all of them", "seconds": f"{sum(seconds.values()):.0f}", "arms": ""})
    return rows


def make_tables(groups: Sequence[Group], curves: Sequence[Curves]) -> tuple[list[Table], list[str]]:
    """Make the tables that the data allow, the most important first, and notes on them."""
    arms, notes = arms_of(groups), []
    differences, more = difference_rows(pairs_of(groups))
    costs = cost_rows(arms)
    if not any(row["general"] for row in costs):
        costs = []
    tables = [
        Table.of(
            "Results", table_rows([*arms, *floors_of(groups)]),
            "Mean and standard deviation over all seeds, on the test split. Masked tokens, steps "
            "and seconds count all pre-training of an arm.",
            "table", TABLE_COLUMNS,
        ),
        Table.of(
            "Differences in accuracy, with 95 % intervals over seeds and test items", differences,
            "seeds: pre-training x fine-tuning. Intervals: variance components of the paired "
            "design (seeds and test items), with Cochran's mean of the quantiles of Student's t. "
            "detectable: the smallest true difference that this many seeds and items show in "
            "80 % of repetitions.",
            "differences", DIFFERENCE_COLUMNS,
        ),
        Table.of(
            "Seconds before fine-tuning", costs,
            "General pre-training (stage 1), masking (classifier, annotation, scorer, scores and "
            "mask indices) and task-guided pre-training (stage 2, mean over its seeds). Both "
            "stages count only training steps, masking complete processes with their start; steps "
            "that several arms share count in each of them. "
            "masking_share: share of the total; share_of_full: total over the longest stage 1.",
            "costs", COST_COLUMNS,
        ),
        Table.of(
            "Seconds of choosing masks, each step once", masking_rows(arms),
            "Complete processes with their start. Scores are made once and shared by all arms that "
            "read them.", "masking", MASKING_COLUMNS,
        ),
        Table.of(
            "Pre-training runs", run_rows(curves),
            "Losses in nats per masked token, the last ones logged; held-out losses use the same "
            "fixed random masks in every run. Seconds count only training steps.",
            "pretraining", RUN_COLUMNS,
        ),
    ]
    if not groups:
        notes.append("No table of results: no fine-tuning has finished yet.")
    if any(row["masking"] == "" for row in costs):
        notes.append("The cost of masking is known only for arms of train/pipeline.py, which "
                     "writes the seconds of its steps to steps.json.")
    return [table for table in tables if table.rows], notes + more + below_floors(groups)


def draw(groups: Sequence[Group], curves: Sequence[Curves]) -> tuple[list[Picture], list[str]]:
    """Draw the figures that the data allow; return a note if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return [], ["No figures: matplotlib is not installed (pip install 'selmask[plot]')."]
    from train.reports import figures

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # names are no formulas
    drawn = [
        ("accuracy", "Test accuracy: one dot per seed, the mean with its standard deviation.",
         figures.accuracy_figure(arms_of(groups), floors_of(groups))),
        ("steps", "Test accuracy against all steps of pre-training: mean and standard deviation "
         "over seeds, one line per masking.", figures.steps_figure(arms_of(groups))),
        ("loss", "Pre-training: loss against steps, masked tokens and seconds of training.",
         figures.loss_figure(curves)),
        ("supervised", "Classifiers and scorers: loss against steps.",
         figures.supervised_figure(curves)),
    ]
    return [Picture(name, text, png) for name, text, png in drawn if png is not None], []


# --------------------------------------------------------------------------- the command


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument_group(USUAL).add_argument
    add("runs", nargs="+", metavar="R",
        help="run directories, or output folders of train/pipeline.py")
    add("--output_dir", default="report", metavar="DIR",
        help="folder for report.html, the CSV files and the figures")
    return parser.parse_args(argv)


def write_report(output: Path, title: str, tables: Sequence[Table], pictures: Sequence[Picture],
                 notes: Sequence[str]) -> list[str]:
    """Write all files of a report and return their names.

    Raises:
        ConfigError: the folder cannot be written, or another process writes there.
    """
    files = {
        "report.html": as_html(title, tables, pictures, notes).encode(),
        **{f"{table.file}.csv": table.as_csv().encode() for table in tables},
        **{f"{picture.file}.png": picture.png for picture in pictures},
    }
    try:
        with WriterLock(f"{output}/", WAIT_SECONDS, "another --output_dir"):
            for name, content in files.items():
                atomic_write_bytes(output / name, content)
    except DiskFullError:
        raise
    except OSError as error:
        raise ConfigError(f"--output_dir {output}: cannot be written ({error.strerror}); give "
                          "another folder") from None
    return sorted(files)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    options = parse_arguments(argv)
    folders = [Path(run) for run in options.runs]
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; give run directories")
    groups, notes = read_groups(folders)
    curves, curve_notes = read_curves(folders)
    if not groups and not curves:
        raise DataError(
            f"no run in {', '.join(options.runs)}: expected results.jsonl of train/finetune.py or "
            "event files of a training command; give their folders"
        )
    tables, table_notes = make_tables(groups, curves)
    pictures, figure_notes = draw(groups, curves)
    every = [*notes, *curve_notes, *table_notes, *figure_notes]
    notes = list({note.rstrip("."): note for note in every}.values())  # a folder may be read twice
    names = ", ".join(dict.fromkeys(folder.resolve().name for folder in folders))
    output = Path(options.output_dir)
    written = write_report(output, f"selmask: {names}", tables, pictures, notes)
    for table in sorted(tables, key=lambda table: table.file in RESULTS):
        print(f"{table.as_text()}\n")
    for note in notes:
        print(f"Note: {visible(note)}")
    print(f"Written to {visible(output)}: {', '.join(written)}")


if __name__ == "__main__":
    run_command(main)
