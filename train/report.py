"""Report on runs, finished or running: tables, figures and a page.

    python train/report.py runs/demo [MORE...] [--output_dir report] [--export results/demo.csv]
    python train/report.py --from results/demo.csv [--output_dir report]

Read the TensorBoard event files, `results.jsonl` and predictions of any number of run directories
or output folders of `train/pipeline.py`; or files that `--export` wrote, which hold a row per
fine-tuned model. `report.html`, a single file without scripts or network, holds everything,
including a note on each missing part; `report.md` is the same in Markdown. Tables are also written
as CSV and figures as PNG. Figures need matplotlib (`pip install selmask[plot]`); tables do not.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from preprocess.errors import ConfigError, DataError, DiskFullError, run_command, visible
from preprocess.files import WriterLock, atomic_write_bytes
from preprocess.flags import USUAL, Parser
from preprocess.view.tables import Table
from train.reports.compare import (
    DIFFERENCE_COLUMNS,
    TABLE_COLUMNS,
    Comparison,
    Group,
    arms_of,
    below_floors,
    compare,
    difference_rows,
    floors_of,
    majority_notes,
    pairs_of,
    table_rows,
)
from train.reports.costs import (
    COST_COLUMNS,
    FLOPS_COLUMNS,
    MASKING_COLUMNS,
    STAGE_2_COLUMNS,
    cost_rows,
    domain_prefix,
    flops_rows,
    longest,
    masking_rows,
    stage_2_rows,
    store_counts,
)
from train.reports.curves import RUN_COLUMNS, Curves, read_curves, run_rows
from train.reports.groups import pipelines_in, read_groups
from train.reports.intervals import METHOD
from train.reports.masked import (
    MASKED_COLUMNS,
    MaskedWords,
    class_rows,
    count_masked,
    masked_rows,
    scorer_rows,
)
from train.reports.page import Picture, ReportPage, Section, as_html, as_markdown
from train.reports.power import MOST_SEEDS, POWER_COLUMNS, TARGET, power_rows
from train.reports.provenance import command_table, provenance
from train.reports.steps_to import STEPS_TO_COLUMNS, steps_to_rows
from train.reports.study import read_studies, study_csv

RESULTS = ("table", "differences")  # printed last: the most important tables
PAGE_ONLY = ("provenance", "arms", "commands")  # tables that the terminal does not repeat
WAIT_SECONDS = 30.0  # for another report that is being written into the same folder


# --------------------------------------------------------------------------------- the page


def make_page(
    title: str, folders: Sequence[Path], groups: Sequence[Group], curves: Sequence[Curves],
    notes: Sequence[str],
) -> ReportPage:
    """Make the page: provenance first, notes before what they limit, then results and the rest."""
    comparisons, limits = compare(pairs_of(groups))
    pipelines = pipelines_in(folders)
    masked, uncounted = (count_masked(pipelines[0], arms_of(groups)) if len(pipelines) == 1
                         else (None, []))
    pictures, missing = draw(groups, curves, comparisons, masked)
    if not groups:
        notes = [*notes, "No table of results: no fine-tuning has finished yet."]
    page = ReportPage(title)
    page.add(Section("Where this comes from", provenance(folders, groups)))
    page.add(Section("Notes on what was read", notes=_collapsed([*notes, *missing])))
    page.add(_results(groups, pictures))
    page.add(_differences(comparisons, limits, pictures))
    page.add(_lengths(groups, pictures))
    page.add(_costs(pipelines, groups))
    page.add(_masks(pipelines, masked, uncounted, pictures))
    page.add(_training(curves, pictures))
    commands = command_table(folders)
    if commands:
        page.add(Section("Commands", [commands], small=True))
    return page


def _blocks(*blocks: Table | Picture | None) -> list[Table | Picture]:
    """Return what there is: tables with rows, and pictures that were drawn."""
    return [block for block in blocks if block is not None
            and (isinstance(block, Picture) or block.rows)]


def _results(groups: Sequence[Group], pictures: dict[str, Picture]) -> Section:
    arms = arms_of(groups)
    results = Table.of(
        "Results: accuracy and macro F1", table_rows([*arms, *floors_of(groups)]),
        "Mean over all models of an arm, on the test split, with its 95 % interval over "
        "pre-training seeds, fine-tuning seeds and test items; sd: standard deviation of the "
        "models; seeds: how many; labels: labelled examples; steps: of stage 2.",
        "table", TABLE_COLUMNS)
    classes = Table.of(
        "Each class", found, "All models of an arm together; examples: of the test split.",
        "classes") if (found := class_rows(longest(arms))) else None
    return Section("Results", _blocks(results, pictures.get("accuracy"), classes),
                   majority_notes(groups) + below_floors(groups))


def _differences(comparisons: Sequence[Comparison], notes: Sequence[str],
                 pictures: dict[str, Picture]) -> Section:
    table = Table.of(
        "Differences in accuracy, with 95 % intervals over seeds and test items",
        difference_rows(comparisons),
        "seeds: pre-training x fine-tuning. detectable: the smallest true difference that this "
        "many seeds and items show in 80 % of repetitions.",
        "differences", DIFFERENCE_COLUMNS)
    power = Table.of(
        "What larger studies would show", power_rows(comparisons),
        "Percentage points. Standard deviations of the difference: between pre-training seeds, "
        "between fine-tuning seeds, of each fine-tuning for itself, and between test items (each "
        "of them 1, 0 or -1). detectable_P: with P pre-training seeds, and as many fine-tuning "
        "seeds and items as here. needed: pre-training seeds for a detectable difference "
        f"of {100 * TARGET:g} points; empty if more than {MOST_SEEDS:,}. The spread of few seeds "
        "is itself uncertain.",
        "power", POWER_COLUMNS)
    return Section("Differences", _blocks(table, pictures.get("differences"), power), notes,
                   method=METHOD if comparisons else "")


def _lengths(groups: Sequence[Group], pictures: dict[str, Picture]) -> Section:
    arms = arms_of(groups)
    rows = steps_to_rows(arms)
    table = Table.of(
        "Steps of stage 2 to the accuracy that random masks have at their end", rows,
        "The first length at which the arm's accuracy, in a straight line between the measured "
        "lengths, is that of random masks after target_steps; low and high invert the 95 % "
        "interval of the paired difference. share: steps over target_steps. seconds: choosing the "
        "masks and training so far; target_seconds: training with random masks to the end.",
        "steps_to", STEPS_TO_COLUMNS) if rows else None
    notes = []
    if any(arm.mid_schedule for arm in arms):
        notes.append(
            "Lengths of stage 2 below the longest are exports from the middle of its schedule, "
            "where the learning rate is still high: a run planned for that length may do better. "
            "The steps to a target are upper bounds in this respect.")
    return Section(
        "Lengths and labels",
        _blocks(table, *(pictures.get(name) for name in ("stage2", "labels", "steps"))), notes)


def _costs(pipelines: Sequence[Path], groups: Sequence[Group]) -> Section:
    arms = arms_of(groups)
    alone = pipelines[0] if len(pipelines) == 1 else None
    store = store_counts(domain_prefix(alone)) if alone else {}
    tokens = store.get("tokens")
    costs = cost_rows(longest(arms))
    notes = []
    if not any(row[key] not in ("", "0") for row in costs for key in ("general", "task_guided")):
        costs = []
    if any(row["masking"] == "" for row in costs) and pipelines:
        notes.append("The cost of masking is known only for arms of train/pipeline.py, which "
                     "writes the seconds of its steps to steps.json.")
    return Section("Cost", _blocks(
        Table.of(
            "Seconds of each part", costs,
            "For the longest stage 2. general: stage 1; masking: its five parts; task_guided: "
            "stage 2, mean over its seeds. Both stages and finetune (one model) count only "
            "training steps, masking complete processes with their start; steps that several arms "
            "share count in each of them, and of steps that each seed has the mean. "
            "total: before fine-tuning; masking_share: of it; share_of_full: total over the "
            "longest stage 1.",
            "costs", COST_COLUMNS),
        Table.of(
            "Stage 2 of each arm",
            stage_2_rows(arms, tokens if isinstance(tokens, int) else None),
            "Means over the seeds of stage 2. epochs: tokens over those of the in-domain text.",
            "stage2_runs", STAGE_2_COLUMNS),
        Table.of(
            "Floating-point operations",
            flops_rows(longest(arms)),
            "As each command counted its own: linear layers and attention of real tokens, "
            "training three times the forward pass. For the longest stage 2; means over seeds; "
            "masking: its four parts, as if no other arm had shared them; total: before "
            "fine-tuning, of which finetune has one model.",
            "flops", FLOPS_COLUMNS),
        Table.of(
            "Seconds of choosing masks, each step once", masking_rows(arms),
            "Complete processes with their start. Scores are made once and shared by all arms that "
            "read them.", "masking", MASKING_COLUMNS),
    ), notes)


def _masks(pipelines: Sequence[Path], masked: MaskedWords | None, notes: Sequence[str],
           pictures: dict[str, Picture]) -> Section:
    scorers = scorer_rows(pipelines[0]) if len(pipelines) == 1 else []
    return Section("What was masked", _blocks(
        Table.of("Masked tokens", masked_rows(masked),
                 "Tokens masked most often, and those masked most above their share; masked: share "
                 "of all tokens. One index of each arm and number of labels.",
                 "masked", MASKED_COLUMNS) if masked else None,
        pictures.get("words"),
        Table.of("The token scorer beside its baselines", scorers,
                 "On annotated sentences that it was not fitted on. F1 of important tokens; "
                 "important: their share.", "scorers") if scorers else None,
    ), notes)


def _training(curves: Sequence[Curves], pictures: dict[str, Picture]) -> Section:
    table = Table.of(
        "Pre-training runs", run_rows(curves),
        "Losses in nats per masked token, the last ones logged; held-out losses use the same "
        "fixed random masks in every run. Seconds count only training steps.",
        "pretraining", RUN_COLUMNS)
    return Section("Training", _blocks(pictures.get("loss"), pictures.get("supervised"), table))


def _collapsed(notes: Sequence[str]) -> list[str]:
    """Return each note once; of many that differ only in a path, the first and their number."""
    alike: dict[str, list[str]] = {}
    for note in dict.fromkeys(note.rstrip(".") + "." for note in notes):
        alike.setdefault(re.sub(r"\S*/\S*", "/", note), []).append(note)
    found = []
    for members in alike.values():
        if len(members) > 3:
            members = [f"{members[0].rstrip('.')} (and {len(members) - 1} more like this)."]
        found += members
    return found


def draw(groups: Sequence[Group], curves: Sequence[Curves], comparisons: Sequence[Comparison],
         masked: MaskedWords | None = None) -> tuple[dict[str, Picture], list[str]]:
    """Draw the figures that the data allow; return a note if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return {}, ["No figures: matplotlib is not installed (pip install 'selmask[plot]')."]
    from train.reports import figures, losses, words

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # names are no formulas
    arms = arms_of(groups)
    styles = figures.arm_styles(arms)
    drawn = [
        ("accuracy", "Test accuracy after the longest stage 2: one dot per model, the mean and its "
         "95 % interval.", figures.accuracy_figure(longest(arms), floors_of(groups), styles)),
        ("differences", "Differences in test accuracy with their 95 % intervals; the colour is "
         "that of the first arm.", figures.difference_figure(comparisons, styles)),
        ("stage2", "Test accuracy against steps of stage 2, with 95 % intervals. All lines begin "
         "with the arm without stage 2.", figures.stage_2_figure(arms, styles)),
        ("labels", "Test accuracy against labelled examples, with 95 % intervals.",
         figures.label_figure(arms, styles)),
        ("steps", "Test accuracy against all steps of pre-training, with 95 % intervals, one line "
         "per policy.", figures.steps_figure(arms, styles)),
        ("words", "Words with most masks beyond their share, and in grey those with fewest; most "
         "beyond first.", words.words_figure(masked, styles) if masked else None),
        ("loss", "Pre-training: loss against steps.", losses.loss_figure(curves, styles)),
        ("supervised", "Classifiers and scorers: loss against steps.",
         losses.supervised_figure(curves, styles)),
    ]
    return {name: Picture(name, text, png) for name, text, png in drawn if png is not None}, []


# ------------------------------------------------------------------------------ the command


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument_group(USUAL).add_argument
    add("runs", nargs="*", metavar="R",
        help="run directories, or output folders of train/pipeline.py")
    add("--from", nargs="+", metavar="F.csv", dest="files", default=[],
        help="instead of run directories: files that --export wrote")
    add("--output_dir", default="report", metavar="DIR",
        help="folder for report.html, report.md, the CSV files and the figures")
    add("--export", metavar="F.csv",
        help="also write a row per fine-tuned model to this file, for --from")
    options = parser.parse_args(argv)
    if bool(options.runs) == bool(options.files):
        raise ConfigError("give either run directories R... or --from F.csv...")
    if options.files and options.export:
        raise ConfigError(f"--export {options.export} copies what --from reads; leave it out")
    return options


def write_report(output: Path, page: ReportPage) -> list[str]:
    """Write all files of a report and return their names.

    Raises:
        ConfigError: the folder cannot be written, or another process writes there.
    """
    files = {
        "report.html": as_html(page).encode(),
        "report.md": as_markdown(page).encode(),
        **{f"{table.file}.csv": table.as_csv().encode() for table in page.tables},
        **{f"{picture.file}.png": picture.png for picture in page.pictures},
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


def export(path: Path, groups: Sequence[Group]) -> None:
    """Write the file of a study.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        atomic_write_bytes(path, study_csv(groups, path.stem).encode())
    except DiskFullError:
        raise
    except OSError as error:
        raise ConfigError(f"--export {path}: cannot be written ({error.strerror}); give another "
                          "file") from None


def read_runs(runs: Sequence[str]) -> tuple[list[Path], list[Group], list[Curves], list[str]]:
    """Read run directories; return them, their groups and curves, and notes.

    Raises:
        DataError: a folder that is absent, or no run at all.
    """
    folders = [Path(run) for run in runs]
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; give run directories")
    groups, notes = read_groups(folders)
    curves, curve_notes = read_curves(folders)
    if not groups and not curves:
        raise DataError(
            f"no run in {', '.join(runs)}: expected results.jsonl of train/finetune.py or "
            "event files of a training command; give their folders"
        )
    return folders, groups, curves, [*notes, *curve_notes]


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    options = parse_arguments(argv)
    folders: list[Path] = []
    curves: list[Curves] = []
    notes: list[str] = []
    if options.files:
        groups = read_studies([Path(file) for file in options.files])
        names = ", ".join(Path(file).stem for file in options.files)
    else:
        folders, groups, curves, notes = read_runs(options.runs)
        names = ", ".join(dict.fromkeys(folder.resolve().name for folder in folders))
    page = make_page(f"selmask: {names}", folders, groups, curves, notes)
    output = Path(options.output_dir)
    written = write_report(output, page)
    tables = [table for table in page.tables if table.file not in PAGE_ONLY]
    for table in sorted(tables, key=lambda table: table.file in RESULTS):
        print(f"{table.as_text()}\n")
    for note in (note for section in page.sections for note in section.notes):
        print(f"Note: {visible(note)}")
    if options.export:
        export(Path(options.export), groups)
        print(f"Written: {visible(options.export)}")
    print(f"Written to {visible(output)}: {', '.join(written)}")


if __name__ == "__main__":
    run_command(main)
