"""Compare several mask indices: which tokens each pair shares, and what each masks most.

Chance is counted per sequence: two masks that know nothing of each other, of a and b tokens of a
sequence of n candidates, share ab/n of them. Over a whole store |A||B|/N would be too little, since
sequences that one policy masks often are long, and so the other's too.

Letters: `N` indices, `B` sequences, `M` masked positions, `V` vocabulary.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np

from preprocess.view.tables import Table, percent

SEPARATOR = " \u00b7 "  # between tokens of a list
DOTS_PER_INCH = 150


@dataclass
class Overlaps:
    """Tokens that pairs of indices share.

    shared: number of them, `(N, N)` int64; an index with itself: its masked tokens.
    expected, variance: of that number, if the second held as many per sequence, drawn at random,
        `(N, N)` float64.
    """

    shared: np.ndarray
    expected: np.ndarray
    variance: np.ndarray

    @classmethod
    def empty(cls, num_indices: int) -> Overlaps:
        shape = (num_indices, num_indices)
        return cls(np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape))

    @property
    def masked(self) -> np.ndarray:
        """Masked tokens of each index, `(N,)` int64."""
        return self.shared.diagonal()

    @property
    def ratio(self) -> np.ndarray:
        """What each pair shares over what chance would give; NaN where chance gives nothing."""
        with np.errstate(invalid="ignore"):
            return self.shared / np.where(self.expected > 0, self.expected, np.nan)

    def add(
        self, chosen: list[np.ndarray], counts: list[np.ndarray], possible: np.ndarray,
        num_tokens: int,
    ) -> None:
        """Count a block of sequences.

        Args:
            chosen: masked positions of each index in the block, `(M,)` int64.
            counts: masked tokens of each sequence, by index, `(B,)` int64.
            possible: candidates of each sequence, `(B,)` int64.
            num_tokens: of the block.
        """
        for i, mine in enumerate(chosen):
            marks = np.zeros(num_tokens, dtype=bool)
            marks[mine] = True
            for j in range(i, len(chosen)):
                both = int(np.count_nonzero(marks[chosen[j]]))
                self.shared[i, j] += both
                if j > i:
                    self.shared[j, i] += both
        # Hypergeometric, for each sequence: of n tokens, a and b drawn without regard to each
        # other share ab/n, with variance ab(n-a)(n-b)/(n^2 (n-1)).
        k, n = np.array(counts, dtype=np.float64), np.maximum(possible, 1).astype(np.float64)
        spread = k * (n - k)
        self.expected += (k / n) @ k.T
        self.variance += (spread / (n * n * np.maximum(n - 1, 1))) @ spread.T


def overlap_tables(overlaps: Overlaps, names: list[str], width: int | None = None) -> list[Table]:
    """Table the ratio and the share of each pair.

    Args:
        width: where names at the top of the columns would exceed it, they become numbers.
    """
    ratio, shared = overlaps.ratio, overlaps.shared
    wide = len(names) * (max(map(len, names)) + 2) + max(map(len, names))
    numbered = width is not None and wide > width
    heads = [str(i + 1) for i in range(len(names))] if numbered else names
    sides = [f"{i + 1} {name}" for i, name in enumerate(names)] if numbered else names
    noise = 2 * np.sqrt(overlaps.variance) / np.where(overlaps.expected > 0, overlaps.expected, 1)
    largest = float(np.max(noise[~np.eye(len(names), dtype=bool)], initial=0))
    return [
        Table("Overlap over chance", ("", *heads), [
            [side, *("-" if np.isnan(x) else f"{x:.2f}" for x in row)]
            for side, row in zip(sides, ratio.tolist(), strict=True)],
            "Tokens that two indices share, over the number that two random choices of as many per "
            "sequence would share; 1 is chance, and unrelated masks stay within "
            f"{largest:.2g} of it in 95 % of draws. On the diagonal: the largest ratio that an "
            "index can have with one of the same size per sequence."),
        Table("Share in common", ("", *heads), [
            [side, *(percent(both, shared[i, i]) for both in shared[i].tolist())]
            for i, side in enumerate(sides)],
            "Of the tokens that the index at the left masks, the share that the one at the top "
            "masks too."),
    ]


def overlap_rows(overlaps: Overlaps, names: list[str]) -> Table:
    """Make a row per ordered pair, for a CSV: counts, shares, and the ratio that chance allows."""
    rows = []
    for i, one in enumerate(names):
        for j, other in enumerate(names):
            shared, expected = int(overlaps.shared[i, j]), float(overlaps.expected[i, j])
            masked, spread = int(overlaps.masked[i]), 2 * float(overlaps.variance[i, j]) ** 0.5
            rows.append([
                one, other, masked, int(overlaps.masked[j]), shared, f"{expected:.2f}",
                *(f"{x / masked:.6f}" if masked else "" for x in (shared, expected)),
                *(f"{x / expected:.4f}" if expected else ""
                  for x in (shared, max(expected - spread, 0), expected + spread)),
            ])
    return Table("", ("index", "other", "masked", "other_masked", "shared", "expected", "share",
                      "share_by_chance", "ratio", "ratio_by_chance_from", "ratio_by_chance_to"),
                 rows)


def types_table(
    type_masked: list[np.ndarray], type_names: list[str], names: list[str], size: int
) -> Table:
    """List the tokens that each index masks most often, a row per index.

    Args:
        type_masked: masked tokens of each id, by index, `(V,)` int64.
        type_names: of each id, `V` strings.
    """
    rows = []
    for name, masked in zip(names, type_masked, strict=True):
        often = np.argsort(-masked, kind="stable")[:size]
        often = often[masked[often] > 0]
        share = percent(int(masked[often].sum()), int(masked.sum()))
        rows.append([name, share, SEPARATOR.join(type_names[i] for i in often.tolist())])
    return Table(f"The {size} tokens masked most often", ("index", "their share", "tokens"), rows,
                 "Most often first; their share: of all tokens that the index masks.")


def draw_overlaps(overlaps: Overlaps, names: list[str]) -> bytes:
    """Draw the matrix as a PNG: ratio and share in each cell, the ratio as its colour.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # In octaves, so that twice and half of chance are equally far from white. Colours stop at 8.
    ratio = overlaps.ratio
    octaves = np.log2(np.clip(np.nan_to_num(ratio, nan=1.0), 1 / 8, 8))
    count = len(names)
    side = 1.8 + 0.085 * max(map(len, names)) + 0.72 * count
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9}):  # names are no formulas
        figure, panel = plt.subplots(figsize=(side + 0.8, side), layout="constrained")
        image = panel.imshow(octaves, cmap="RdBu_r", vmin=-3, vmax=3)
        for i in range(count):
            for j in range(count):
                text = "-" if np.isnan(ratio[i, j]) else f"{ratio[i, j]:.2f}"
                share = percent(int(overlaps.shared[i, j]), int(overlaps.masked[i]))
                colour = "white" if abs(octaves[i, j]) > 1.9 else "black"
                panel.text(j, i - 0.13, text, ha="center", va="center", color=colour,
                           fontweight="bold")
                panel.text(j, i + 0.24, share, ha="center", va="center", color=colour,
                           fontsize=7)
        panel.set_xticks(range(count), names, rotation=40, ha="left", rotation_mode="anchor")
        panel.set_yticks(range(count), names)
        panel.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
        panel.set_xticks(np.arange(count + 1) - 0.5, minor=True)
        panel.set_yticks(np.arange(count + 1) - 0.5, minor=True)
        panel.grid(which="minor", color="white", linewidth=1.5)
        panel.tick_params(which="minor", length=0)
        panel.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=panel, ticks=range(-3, 4), shrink=0.8)
        bar.ax.set_yticklabels(["1/8", "1/4", "1/2", "1", "2", "4", "8"])
        bar.set_label("shared tokens over chance (bold)")
        panel.set_xlabel("small: share of the masks at the left that are masked at the top")
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=DOTS_PER_INCH)
        plt.close(figure)
    return out.getvalue()
