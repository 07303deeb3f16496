"""Draw the arms: accuracy, differences, lengths, labels; and what all figures share.

Colours are those of Okabe and Ito, distinct under the common colour-vision deficiencies; markers
and line styles distinguish the same lines, so that a grey print is readable too. An arm has one
style in all figures. Legends are outside the axes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

from train.reports.compare import NO_STAGE_2, Comparison, arm_estimate, mean_and_sd
from train.reports.results import Arm, number

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
LINES = ("-", "--", ":", "-.")
GREY = "#666666"
DOTS_PER_INCH = 150
MAX_ROWS = 60  # of a picture of differences; then only the longest stage 2
Styles = dict[str, dict[str, Any]]


def arm_styles(arms: Sequence[Arm]) -> Styles:
    """Return a colour, a marker and a line style for each line of arms, in their order."""
    found: Styles = {}
    for place, line in enumerate(dict.fromkeys(arm.line or arm.name for arm in arms)):
        found[line] = {"color": COLOURS[place % len(COLOURS)],
                       "marker": MARKERS[place % len(MARKERS)],
                       "linestyle": LINES[place // len(COLOURS) % len(LINES)]}
    return found


def style_of(styles: Styles, arm: Arm) -> dict[str, Any]:
    """Return the style of an arm; grey for one that has none."""
    plain = {"color": GREY, "marker": "o", "linestyle": "-"}
    return styles.get(arm.line or arm.name, plain)


def as_png(figure: Any) -> bytes:
    """Draw a figure and close it."""
    import matplotlib.pyplot as plt

    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DOTS_PER_INCH)
    plt.close(figure)
    return out.getvalue()


def plain_number(value: float, largest: float | None = None) -> str:
    """Write a tick: 400, 12k, 1.5M; never a prefix below one.

    Args:
        largest: of the axis, whose ticks share one unit: 8k, 16k, 24k.
    """
    reach = abs(value if largest is None else largest)
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value and (reach >= 10 * size or reach >= size and unit != "k"):
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def format_axis(axis: Any) -> None:
    """Give an axis a few ticks with plain numbers."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(6))
    axis.set_major_formatter(FuncFormatter(
        lambda value, _: plain_number(value, max(map(abs, axis.get_view_interval())))))


def _by(arms: Sequence[Arm], key: Callable[[Arm], Any]) -> dict[Any, list[Arm]]:
    found: dict[Any, list[Arm]] = {}
    for arm in arms:
        found.setdefault(key(arm), []).append(arm)
    return found


def _panel_title(arm: Arm, several_tasks: bool, labels: bool = True) -> str:
    parts = [f"task {arm.task}"] if several_tasks else []
    parts += [f"{arm.labels:,} labels"] if labels and arm.labels is not None else []
    return ", ".join(parts)


# --------------------------------------------------------------------------------- accuracy


def accuracy_figure(arms: Sequence[Arm], floors: Sequence[Arm], styles: Styles) -> bytes | None:
    """Draw test accuracy per arm, a panel per task and number of labels: models, mean, interval."""
    import matplotlib.pyplot as plt

    groups = _by(arms, lambda arm: (arm.task, arm.labels))
    for floor in floors:
        fitting = [key for key in groups if key[0] == floor.task
                   and floor.labels in (None, key[1])]
        for key in fitting or [(floor.task, floor.labels)]:
            groups.setdefault(key, []).append(floor)
    if not groups:
        return None
    several = len({task for task, _ in groups}) > 1
    heights = [0.9 + 0.36 * len(members) for members in groups.values()]
    figure, panels = plt.subplots(
        len(groups), 1, figsize=(8, 0.6 + sum(heights)), layout="constrained", squeeze=False,
        gridspec_kw={"height_ratios": heights}, sharex=not several,
    )
    for panel, members in zip(panels[:, 0], groups.values(), strict=True):
        for row, arm in enumerate(members):
            values = [100 * value for value in arm.values("accuracy")]
            mean, _ = mean_and_sd(values)
            style = style_of(styles if not arm.floor else {}, arm)
            panel.plot(values, [row] * len(values), "o", color=style["color"], alpha=0.3,
                       markersize=4)
            found = arm_estimate(arm)
            width = None
            if found is not None and found.standard_error:
                # A file may contradict its predictions, which give the interval; a note says so.
                width = [[max(mean - 100 * found.low, 0)], [max(100 * found.high - mean, 0)]]
            panel.errorbar(mean, row, xerr=width, fmt=style["marker"], color=style["color"],
                           capsize=4, markersize=6)
            panel.annotate(f"{mean:.1f}", (1, row), xycoords=("axes fraction", "data"),
                           xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
        panel.set_yticks(range(len(members)), [arm.shown for arm in members])
        panel.set_ylim(len(members) - 0.5, -0.5)
        panel.set_title(_panel_title(members[0], several), loc="left", fontsize=10)
        panel.grid(axis="x", alpha=0.3)
    panels[-1, 0].set_xlabel("test accuracy, % (dots: models; bar: 95 % interval of the mean)")
    return as_png(figure)


# ------------------------------------------------------------------------------ differences


def difference_figure(comparisons: Sequence[Comparison], styles: Styles) -> bytes | None:
    """Draw every difference with its interval, a row each, and a line at 0."""
    import matplotlib.pyplot as plt

    shown = [one for one in comparisons if one.found.standard_error]
    if len(shown) > MAX_ROWS:
        longest = max((one.steps or 0 for one in shown), default=0)
        shown = [one for one in shown if (one.steps or 0) == longest][:MAX_ROWS]
    if not shown:
        return None
    panels_of: dict[Any, list[Comparison]] = {}
    for one in shown:
        panels_of.setdefault((one.first.task, one.first.labels), []).append(one)
    several = len({task for task, _ in panels_of}) > 1
    lengths = len({one.steps for one in shown}) > 1
    keys = list(dict.fromkeys(_row_key(one) for one in shown))
    if lengths:
        keys.sort(key=lambda key: (key[2] or 0))
    figure, panels = plt.subplots(
        1, len(panels_of), figsize=(3.2 + 3.4 * len(panels_of), 1.4 + 0.27 * len(keys)),
        layout="constrained", squeeze=False, sharey=True, sharex=not several,
    )
    for panel, members in zip(panels[0], panels_of.values(), strict=True):
        panel.axvline(0, color="black", linewidth=1)
        for one in members:
            row, style = keys.index(_row_key(one)), style_of(styles, one.first)
            mean, low, high = (100 * value for value in
                               (one.found.mean, one.found.low, one.found.high))
            panel.errorbar(mean, row, xerr=[[mean - low], [high - mean]], fmt=style["marker"],
                           color=style["color"], capsize=3, markersize=5, linewidth=1.4)
        for row in range(1, len(keys)):
            if keys[row][2] != keys[row - 1][2]:
                panel.axhline(row - 0.5, color=GREY, linewidth=0.8, linestyle=":")
        panel.set_title(_panel_title(members[0].first, several), loc="left", fontsize=10)
        panel.grid(axis="x", alpha=0.3)
    names = [f"{first} - {second}" + (f", {steps} steps" if lengths and steps else "")
             for first, second, steps in keys]
    panels[0, 0].set_yticks(range(len(keys)), names, fontsize=9)
    panels[0, 0].set_ylim(len(keys) - 0.5, -0.5)
    figure.supxlabel("difference in test accuracy, points (bar: 95 % interval)", fontsize=10)
    return as_png(figure)


def _row_key(one: Comparison) -> tuple[str, str, int | None]:
    return one.first.shown, one.second.shown, one.steps


# ----------------------------------------------------------------------------------- curves


def stage_2_figure(arms: Sequence[Arm], styles: Styles) -> bytes | None:
    """Draw accuracy against steps of stage 2: a line per arm with its interval as a band.

    Returns None where no arm has two lengths. The arm without stage 2 is where all lines begin.
    """
    groups = _by(arms, lambda arm: (arm.task, arm.labels, arm.stage1_steps))
    drawn = {}
    for members in groups.values():
        known = [arm for arm in members if arm.stage2_steps is not None]
        starts = [arm for arm in known if arm.strategy == NO_STAGE_2][:1]
        lines = _by([arm for arm in known if arm.strategy != NO_STAGE_2], lambda arm: arm.line)
        if any(len(own) > 1 for own in lines.values()):
            drawn[_panel_title(members[0], len({task for task, *_ in groups}) > 1)
                  + _stage_1(members[0], groups)] = [
                (line, [(arm.stage2_steps or 0, arm) for arm in [*starts, *own]])
                for line, own in lines.items()]
    return _bands(drawn, styles, "steps of stage 2", False)


def _stage_1(arm: Arm, groups: dict[Any, list[Arm]]) -> str:
    several = len({stage1 for *_, stage1 in groups}) > 1
    return f", stage 1 of {arm.stage1_steps:,} steps" if several and arm.stage1_steps else ""


def label_figure(arms: Sequence[Arm], styles: Styles) -> bytes | None:
    """Draw accuracy against labelled examples: a line per arm with its interval as a band.

    A panel per length of stage 2; None where no arm has two numbers of labels.
    """
    groups: dict[Any, list[Arm]] = {}
    none = [arm for arm in arms if arm.strategy == NO_STAGE_2]
    lengths: list[int | None] = [*sorted({arm.stage2_steps for arm in arms if arm.stage2_steps})]
    for task in dict.fromkeys(arm.task for arm in arms):
        for steps in lengths or [None]:
            groups[task, steps] = [arm for arm in arms if arm.task == task and (
                arm in none or arm.stage2_steps == steps)]
    several = len({task for task, _ in groups}) > 1
    drawn = {}
    for (task, steps), members in groups.items():
        lines = _by([arm for arm in members if arm.labels], lambda arm: arm.shown)
        if any(len(own) > 1 for own in lines.values()):
            title = ", ".join([f"task {task}"] * several
                              + [f"{steps:,} steps of stage 2"] * bool(steps))
            drawn[title] = [(own[0].line, [(arm.labels or 0, arm) for arm in own])
                            for own in lines.values()]
    return _bands(drawn, styles, "labelled examples", True)


def _bands(drawn: dict[str, list[tuple[str, list[tuple[int, Arm]]]]], styles: Styles,
           label: str, logarithmic: bool) -> bytes | None:
    """Draw lines with bands, a panel per entry."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    if not drawn:
        return None
    columns = min(len(drawn), 3)
    rows = -(-len(drawn) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(max(3.6 * columns, 6), 0.9 + 3.1 * rows), layout="constrained",
        squeeze=False, sharey=True)
    handles: dict[str, Any] = {}
    for panel, (title, lines) in zip(panels.flat, drawn.items(), strict=False):
        places = sorted({place for _, points in lines for place, _ in points})
        for line, points in lines:
            points = sorted(points, key=lambda point: point[0])
            style = style_of(styles, points[-1][1])
            means = [100 * mean_and_sd(arm.values("accuracy"))[0] for _, arm in points]
            x = [place for place, _ in points]
            (handles[line],) = panel.plot(x, means, markersize=5, linewidth=1.5, **style)
            found = [arm_estimate(arm) for _, arm in points]
            ends = [(place, 100 * one.low, 100 * one.high)
                    for place, one in zip(x, found, strict=True) if one is not None]
            if ends:
                panel.fill_between(*zip(*ends, strict=True), color=style["color"], alpha=0.08,
                                   linewidth=0)
                for end in list(zip(*ends, strict=True))[1:]:
                    panel.plot([place for place, *_ in ends], end, color=style["color"],
                               linewidth=0.7, alpha=0.5)
        if logarithmic:
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(FixedLocator(places))
            panel.xaxis.set_minor_locator(NullLocator())
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(value)))
            panel.tick_params(axis="x", labelrotation=30 if len(places) > 4 else 0)
        else:
            format_axis(panel.xaxis)
        panel.set_title(title, loc="left", fontsize=10)
        panel.grid(alpha=0.3)
    for panel in list(panels.flat)[len(drawn):]:
        panel.set_visible(False)
    figure.supylabel("test accuracy, %", fontsize=10)
    figure.supxlabel(f"{label} (band: 95 % interval of each mean)", fontsize=10)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False,
                  fontsize=9)
    return as_png(figure)


def steps_figure(arms: Sequence[Arm], styles: Styles) -> bytes | None:
    """Draw accuracy against all steps of pre-training: a line per policy, a panel per task.

    Returns None if no task has arms of more than two lengths of stage 1; others are shown by
    `accuracy_figure`.
    """
    drawn = {}
    tasks = _by([arm for arm in arms if _all_steps(arm) is not None],
                lambda arm: (arm.task, arm.labels))
    for members in tasks.values():
        lines = _by(members, lambda arm: arm.line or arm.name)
        if len({arm.stage1_steps for arm in members}) > 2 or (
                not members[0].seeds and len(set(map(_all_steps, members))) > 2):
            drawn[_panel_title(members[0], len(tasks) > 1)] = [
                (line, [(_all_steps(arm) or 0, arm) for arm in own])
                for line, own in lines.items()]
    return _bands(drawn, styles, "pre-training steps in all (stage 1 and stage 2)", False)


def _all_steps(arm: Arm) -> int | None:
    steps = [s for run in arm.runs if (s := number(run.cost.get("steps"))) is not None]
    return round(sum(steps) / len(steps)) if steps and not math.isnan(sum(steps)) else None
