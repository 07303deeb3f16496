"""Draw the training curves: losses against steps, masked tokens and seconds.

A few runs share their axes; of many, each arm and each other kind of run has a panel of its own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.reports.curves import Curves
from train.reports.figures import COLOURS, GREY, LINES, Styles, as_png, format_axis
from train.run_dir.metrics import EVAL_LOSS, TRAIN_LOSS

MAX_IN_ONE = 5  # runs that share axes
MIN_POINTS = 3  # of a curve of held-out loss
COLUMNS = 4


def _kind(run: Curves) -> str:
    """Return the name of a run without its seeds and labels; runs of one kind share a colour."""
    return re.sub(r"[-_/](seed_?\d+|labels(\d+|all))", "", run.name)


def _style(kind: str, styles: Styles, kinds: Sequence[str]) -> dict[str, Any]:
    """Return the style of a kind of run: that of its arm, or a colour that no arm has."""
    name = kind.rpartition("/")[2]
    for line in sorted(styles, key=len, reverse=True):
        plain = line.rpartition("/")[2]
        if name == plain or name.startswith(f"{plain}-"):
            return {"color": styles[line]["color"], "linestyle": styles[line]["linestyle"]}
    if styles:
        return {"color": GREY, "linestyle": "-"}
    place = kinds.index(kind)
    return {"color": COLOURS[place % len(COLOURS)],
            "linestyle": LINES[place // len(COLOURS) % len(LINES)]}


def loss_figure(curves: Sequence[Curves], styles: Styles) -> bytes | None:
    """Draw training and held-out loss of pre-training against steps, masked tokens, seconds."""
    runs = [run for run in curves if run.is_pretraining and run.last_step]
    if len(runs) > MAX_IN_ONE:
        return _multiples(runs, styles, "held-out loss, same masks")
    return _losses(runs, styles, ("training loss", "held-out loss, same masks"),
                   ("step", "masked tokens", "seconds of training"))


def supervised_figure(curves: Sequence[Curves], styles: Styles) -> bytes | None:
    """Draw training and validation loss of classifiers and scorers against steps."""
    runs = [run for run in curves if not run.is_pretraining]
    if len(runs) > MAX_IN_ONE:
        return _multiples(runs, styles, "validation loss")
    return _losses(runs, styles, ("training loss", "validation loss"), ("step",))


def _points(run: Curves, tag: str) -> tuple[list[int], list[float]] | None:
    """Return the steps and values of a curve; None for a held-out one of a point or two."""
    found = run.scalars.get(tag)
    if found is None or tag == EVAL_LOSS and len(found[0]) < MIN_POINTS:
        return None
    return found


def _losses(runs: Sequence[Curves], arms: Styles, titles: Sequence[str],
            axes: Sequence[str]) -> bytes | None:
    """Draw one row of panels per kind of loss, one column per horizontal axis."""
    import matplotlib.pyplot as plt

    rows = [(title, tag) for title, tag in zip(titles, (TRAIN_LOSS, EVAL_LOSS), strict=True)
            if any(_points(run, tag) for run in runs)]
    if not rows:
        return None
    kinds = list(dict.fromkeys(map(_kind, runs)))
    used = Counter[tuple]()
    styles = []
    for run in runs:
        style = _style(_kind(run), arms, kinds)
        # Runs of one colour differ in their lines.
        place = LINES.index(style["linestyle"]) + used[style["color"]]
        used[style["color"]] += 1
        masking = f" ({run.masking})" if run.masking and run.masking not in run.name else ""
        styles.append({**style, "linestyle": LINES[place % len(LINES)], "linewidth": 1.3,
                       "label": run.name + masking})
    size = (4.2 * max(len(axes), 2), 3.0 * len(rows) + 0.4 + 0.2 * -(-len(runs) // 2))
    figure, panels = plt.subplots(len(rows), len(axes), figsize=size, layout="constrained",
                                  squeeze=False, sharey="row", sharex="col")
    drawn: dict[str, Any] = {}
    for (title, tag), row in zip(rows, panels, strict=True):
        for column, panel in enumerate(row):
            for run, style in zip(runs, styles, strict=True):
                at = _places(run, tag, column)
                if at is None:
                    continue
                few = len(at) < 8
                (line,) = panel.plot(at, run.scalars[tag][1], marker="o" if few else None,
                                     markersize=3.5, **style)
                drawn.setdefault(style["label"], line)
            panel.grid(alpha=0.3)
            if column == 0:
                panel.set_ylabel(f"{title}\n(nats)")
    for axis, panel in zip(axes, panels[-1], strict=True):
        panel.set_xlabel(axis)
        format_axis(panel.xaxis)
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=2,
                  fontsize=8, frameon=False, handlelength=3)
    return as_png(figure)


def _multiples(runs: Sequence[Curves], styles: Styles, held_out: str) -> bytes | None:
    """Draw a panel per kind of run with all its runs: training loss thin, held-out loss dashed."""
    import matplotlib.pyplot as plt

    kinds: dict[str, list[Curves]] = {}
    for run in runs:
        kinds.setdefault(_kind(run), []).append(run)
    columns = min(len(kinds), COLUMNS)
    rows = -(-len(kinds) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(max(3.0 * columns, 6), 0.6 + 2.3 * rows), layout="constrained",
        squeeze=False, sharey=True)
    dashed = False
    for panel, (kind, members) in zip(panels.flat, kinds.items(), strict=False):
        colour = _style(kind, styles, list(kinds))["color"]
        for run in members:
            for tag, style in ((TRAIN_LOSS, "-"), (EVAL_LOSS, "--")):
                points = _points(run, tag)
                if points:
                    dashed = dashed or tag == EVAL_LOSS
                    panel.plot(*points, color=colour, linestyle=style, alpha=0.7,
                               linewidth=1 if tag == TRAIN_LOSS else 1.3)
        runs_said = f" ({len(members)} runs)" if len(members) > 1 else ""
        panel.set_title(f"{kind}{runs_said}", loc="left", fontsize=8)
        panel.grid(alpha=0.3)
        format_axis(panel.xaxis)
        panel.tick_params(labelsize=8)
    for panel in list(panels.flat)[len(kinds):]:
        panel.set_visible(False)
    lines = f" (solid: training loss; dashed: {held_out})" if dashed else ""
    figure.supxlabel(f"step{lines}", fontsize=9)
    figure.supylabel("loss, nats" if dashed else "training loss, nats", fontsize=9)
    return as_png(figure)


def _places(run: Curves, tag: str, column: int) -> np.ndarray | None:
    """Return the places of a tag's points on axis 0 (steps), 1 (masked tokens) or 2 (seconds)."""
    found = _points(run, tag)
    if found is None:
        return None
    if column == 0:
        return np.array(found[0])
    spent = run.spent(found[0])
    return None if spent is None else spent[column - 1]
