"""Draw which words the arms of a pipeline masked."""

from __future__ import annotations

import numpy as np

from preprocess.view.statistics import IndexCounts
from train.reports.figures import GREY, Styles, as_png, style_of
from train.reports.masked import MaskedWords
from train.reports.results import Arm

MOST_MASKED, LEAST_MASKED = 14, 6
MAX_PANELS = 3


def most_and_fewest(masked: np.ndarray, occurrences: np.ndarray
                    ) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids with most masks beyond their share, and those with fewest; most beyond first.

    Args:
        masked, occurrences: of each id, `(V,)` int64; something is masked.
    """
    beyond = masked - masked.sum() / occurrences.sum() * occurrences
    order = np.argsort(-beyond, kind="stable")
    most, fewest = order[:MOST_MASKED], order[-LEAST_MASKED:]
    return most[beyond[most] > 0], fewest[beyond[fewest] < 0]


def words_figure(found: MaskedWords, styles: Styles) -> bytes | None:
    """Draw the words with most and with fewest masks beyond their share, a panel per arm.

    A word's share is what it would get if all its text were masked at one rate: its occurrences
    times that rate. The bar is how many of its occurrences are masked. Of several numbers of labels
    the largest is drawn.
    """
    import matplotlib.pyplot as plt

    of_arms: dict[str, tuple[Arm, IndexCounts]] = {}
    for arm, _, counts in found.indices:
        if counts.masked and (arm.line not in of_arms or (arm.labels or 0) > (
                of_arms[arm.line][0].labels or 0)):
            of_arms[arm.line] = arm, counts
    drawn = list(of_arms.values())[:MAX_PANELS]
    if not drawn:
        return None
    total = int(found.occurrences.sum())
    figure, panels = plt.subplots(
        1, len(drawn), figsize=(1.2 + 2.8 * len(drawn), 5.2), layout="constrained", squeeze=False)
    for panel, (arm, counts) in zip(panels[0], drawn, strict=True):
        rate = counts.masked / total
        most, fewest = most_and_fewest(counts.type_masked, found.occurrences)
        ids = np.concatenate([most, fewest])
        shares = 100 * counts.type_masked[ids] / found.occurrences[ids]
        colours = [style_of(styles, arm)["color"]] * len(most) + [GREY] * len(fewest)
        panel.barh(range(len(ids)), shares, color=colours)
        panel.axvline(100 * rate, color="black", linewidth=1, linestyle=":")
        panel.set_yticks(range(len(ids)), [found.types[i] for i in ids], fontsize=9)
        panel.set_ylim(len(ids) - 0.4, -0.6)
        panel.set_xlim(0, 100)
        title = arm.shown + (f", {arm.labels:,} labels" if arm.labels is not None else "")
        panel.set_title(title, loc="left", fontsize=10)
    figure.supxlabel("masked, % of a word's occurrences (dotted: of all tokens)", fontsize=10)
    return as_png(figure)
