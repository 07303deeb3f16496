"""Draw the figures of a report, each as a PNG.

Colours are those of Okabe and Ito, distinct under the common colour-vision deficiencies; line
styles and markers distinguish lines of one colour, so that a grey print is readable too. Legends
are outside the axes.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.reports.curves import Curves
from train.reports.results import Arm, mean_and_sd, number
from train.run_dir.metrics import EVAL_LOSS, TRAIN_LOSS

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
LINES = ("-", "--", ":", "-.")
MAX_NAMES = 16  # lines named one by one in a legend; more share a name per kind
DOTS_PER_INCH = 150


def _as_png(figure: Any) -> bytes:
    import matplotlib.pyplot as plt

    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DOTS_PER_INCH)
    plt.close(figure)
    return out.getvalue()


def _kind(run: Curves) -> str:
    """Return the name of a run without its seeds; runs of one kind share a colour."""
    return re.sub(r"[-_/]seed_?\d+", "", run.name)


def _styles(curves: Sequence[Curves]) -> list[dict[str, Any]]:
    """Return a style per run: a colour per kind, a line style per run of it.

    More than `MAX_NAMES` runs are named by kind alone.
    """
    totals = Counter(map(_kind, curves))
    kinds = list(totals)
    enough = len(kinds) <= len(COLOURS) and max(totals.values(), default=0) <= len(LINES)
    styles, used = [], Counter[str]()
    for place, run in enumerate(curves):
        kind = _kind(run)
        masking = "" if run.masking in run.name else f" ({run.masking})"
        name: str | None = run.name + masking
        colour, line = kinds.index(kind), used[kind]
        if len(curves) > MAX_NAMES:
            runs = f"{totals[kind]} run{'s' if totals[kind] > 1 else ''}"
            name = None if used[kind] else f"{kind}{masking}: {runs}"
            line = colour // len(COLOURS)
        elif not enough:
            colour, line = place, place // len(COLOURS)
        used[kind] += 1
        styles.append({"color": COLOURS[colour % len(COLOURS)], "label": name,
                       "linestyle": LINES[line % len(LINES)], "linewidth": 1.3})
    return styles


def loss_figure(curves: Sequence[Curves]) -> bytes | None:
    """Draw training and held-out loss of pre-training against steps, masked tokens, seconds."""
    runs = [run for run in curves if run.is_pretraining and run.last_step]
    return _losses(runs, ("training loss", "held-out loss, same masks"),
                   ("step", "masked tokens", "seconds of training"))


def supervised_figure(curves: Sequence[Curves]) -> bytes | None:
    """Draw training and validation loss of classifiers and scorers against steps."""
    runs = [run for run in curves if not run.is_pretraining]
    return _losses(runs, ("training loss", "validation loss"), ("step",))


def _losses(runs: Sequence[Curves], titles: Sequence[str], axes: Sequence[str]) -> bytes | None:
    """Draw one row of panels per kind of loss, one column per horizontal axis."""
    import matplotlib.pyplot as plt

    rows = [(title, tag) for title, tag in zip(titles, (TRAIN_LOSS, EVAL_LOSS), strict=True)
            if any(tag in run.scalars for run in runs)]
    if not rows:
        return None
    styles = _styles(runs)
    names = [style["label"] for style in styles if style["label"]]
    lines = -(-len(names) // 2)
    size = (4.2 * max(len(axes), 2), 3.0 * len(rows) + 0.4 + 0.2 * lines)
    figure, panels = plt.subplots(len(rows), len(axes), figsize=size, layout="constrained",
                                  squeeze=False, sharey="row", sharex="col")
    drawn: dict[str, Any] = {}
    for (title, tag), row in zip(rows, panels, strict=True):
        for column, panel in enumerate(row):
            for run, style in zip(runs, styles, strict=True):
                place = _places(run, tag, column)
                if place is None:
                    continue
                few = len(place) < 8
                (line,) = panel.plot(place, run.scalars[tag][1], marker="o" if few else None,
                                     markersize=3.5, **style)
                if style["label"]:
                    drawn.setdefault(style["label"], line)
            panel.grid(alpha=0.3)
            if column == 0:
                panel.set_ylabel(f"{title}\n(nats)")
    for axis, panel in zip(axes, panels[-1], strict=True):
        panel.set_xlabel(axis)
        panel.xaxis.set_major_locator(plt.MaxNLocator(6))
        panel.xaxis.set_major_formatter(plt.matplotlib.ticker.EngFormatter(sep=""))
    if drawn:
        figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=2,
                      fontsize=8, frameon=False, handlelength=3)
    return _as_png(figure)


def _places(run: Curves, tag: str, column: int) -> np.ndarray | None:
    """Return the places of a tag's points on axis 0 (steps), 1 (masked tokens) or 2 (seconds)."""
    if tag not in run.scalars:
        return None
    steps = run.scalars[tag][0]
    if column == 0:
        return np.array(steps)
    spent = run.spent(steps)
    return None if spent is None else spent[column - 1]


def _by_task(arms: Sequence[Arm]) -> dict[str, list[Arm]]:
    tasks: dict[str, list[Arm]] = {}
    for arm in arms:
        tasks.setdefault(arm.task, []).append(arm)
    return tasks


def accuracy_figure(arms: Sequence[Arm], floors: Sequence[Arm]) -> bytes | None:
    """Draw test accuracy per arm, one panel per task: seeds, mean and standard deviation."""
    import matplotlib.pyplot as plt

    tasks = _by_task([*arms, *floors])
    if not tasks:
        return None
    heights = [0.9 + 0.42 * len(members) for members in tasks.values()]
    figure, panels = plt.subplots(
        len(tasks), 1, figsize=(8, 0.5 + sum(heights)), layout="constrained", squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )
    for panel, (task, members) in zip(panels[:, 0], tasks.items(), strict=True):
        for row, arm in enumerate(members):
            values = [100 * value for value in arm.values("accuracy")]
            mean, sd = mean_and_sd(values)
            colour = "#666666" if any(arm is floor for floor in floors) else COLOURS[0]
            panel.plot(values, [row] * len(values), "o", color=colour, alpha=0.35, markersize=5)
            panel.errorbar(mean, row, xerr=None if math.isnan(sd) else sd, fmt="D",
                           color=colour, capsize=4, markersize=6)
            panel.annotate(f"{mean:.1f}", (1, row), xycoords=("axes fraction", "data"),
                           xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
        panel.set_yticks(range(len(members)), [arm.name for arm in members])
        panel.set_ylim(len(members) - 0.5, -0.5)
        panel.set_title(f"task {task}", loc="left", fontsize=10)
        panel.grid(axis="x", alpha=0.3)
    panels[-1, 0].set_xlabel("test accuracy, % (dots: seeds; diamond, bar and number: mean and "
                             "standard deviation)")
    return _as_png(figure)


def steps_figure(arms: Sequence[Arm]) -> bytes | None:
    """Draw accuracy against all steps of pre-training: a line per masking, a panel per task.

    Returns None if no task has arms of more than two lengths; `accuracy_figure` shows those.
    """
    import matplotlib.pyplot as plt

    tasks = {task: _lines(members) for task, members in _by_task(arms).items()}
    tasks = {task: lines for task, lines in tasks.items()
             if len({steps for points in lines.values() for steps, *_ in points}) > 2}
    if not tasks:
        return None
    figure, panels = plt.subplots(len(tasks), 1, figsize=(8, 4.0 * len(tasks)),
                                  layout="constrained", squeeze=False)
    for panel, (task, lines) in zip(panels[:, 0], tasks.items(), strict=True):
        lengths = {name: {steps for steps, *_ in points} for name, points in lines.items()}
        width = max(map(max, lengths.values())) - min(map(min, lengths.values()))
        for place, (name, points) in enumerate(lines.items()):
            steps, means, sds = (np.array(column) for column in zip(*sorted(points), strict=True))
            # Arms of one length are drawn side by side, so that their bars do not overlap.
            beside = [other for other in lines if lengths[other] & lengths[name]]
            shift = 0.008 * width * (beside.index(name) - (len(beside) - 1) / 2)
            panel.errorbar(
                steps + shift, means, yerr=sds, label=name, color=COLOURS[place % len(COLOURS)],
                marker=MARKERS[place % len(MARKERS)], linestyle=LINES[place % len(LINES)],
                capsize=3, linewidth=1.3,
            )
        panel.set_title(f"task {task}", loc="left", fontsize=10)
        panel.set_ylabel("test accuracy, %\n(mean and standard deviation)")
        panel.margins(x=0.08)
        panel.xaxis.set_major_formatter(plt.matplotlib.ticker.EngFormatter(sep=""))
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    panels[-1, 0].set_xlabel("pre-training steps in all (stage 1 and stage 2)")
    return _as_png(figure)


def _lines(arms: Sequence[Arm]) -> dict[str, list[tuple[float, float, float]]]:
    """Return the points (steps, mean, standard deviation) of each line, accuracy in per cent."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for arm in arms:
        steps = [s for run in arm.runs if (s := number(run.cost.get("steps"))) is not None]
        if steps:
            mean, sd = mean_and_sd([100 * value for value in arm.values("accuracy")])
            point = (sum(steps) / len(steps), mean, 0.0 if math.isnan(sd) else sd)
            lines.setdefault(arm.line or arm.name, []).append(point)
    return lines
