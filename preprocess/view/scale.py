"""How the scores of a measure are read: their unit, and which of them count as high.

Log-odds stand for probabilities. Of other scores only the order is known, and for some of them that
0 parts important tokens from others; what is high among them is told by their quantiles.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from preprocess.store import TokenStore, open_array

IMPORTANT = 2  # level of a token that is important rather than not, where the measure can tell
LOG_ODDS = "log-odds"
LEVEL_QUANTILES = (0.5, 0.75, 0.9)  # lower ends of the levels of scores without a boundary
EDGE_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)  # upper ends of bins but the last
SAMPLED = 1 << 24  # scores that the quantiles are taken of
_CHUNK = 1 << 16
# The value of each of the 65,536 float16 numbers, by its bits.
_VALUES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)


def share_of(log_odds: float) -> str:
    """Write log-odds as the probability that they stand for."""
    # 1 / (1 + exp(-x)) would overflow where the scores are far below 0.
    return f"{50 * (1 + math.tanh(log_odds / 2)):.0f} %"


@dataclass(frozen=True)
class Scale:
    """How scores are shown; by default those of a scorer, in log-odds.

    unit: what a score is measured in. boundary: whether tokens above 0 are important.
    levels: lower ends of the levels above the lowest, three ascending numbers: 12 %, 50 % and 88 %
        of log-odds. Two may be equal; then no score has the level between them.
    edges: upper ends of the bins of a table but the last, ascending: 2 %, 12 %, 27 %, 50 %, ...
    """

    unit: str = LOG_ODDS
    boundary: bool = True
    levels: tuple[float, ...] = (-2.0, 0.0, 2.0)
    edges: tuple[float, ...] = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)

    @property
    def in_log_odds(self) -> bool:
        return self.unit == LOG_ODDS

    def level(self, score: float | None) -> int:
        """Return the level of a score, from 0 to 3; 0 without one."""
        return 0 if score is None else sum(score > edge for edge in self.levels)

    def bins(self) -> np.ndarray:
        """Return the bin of each float16 number by its bits: ten times as fast as a search."""
        return np.searchsorted(self.edges, _VALUES).astype(np.uint8)

    def describe(self, score: float) -> str:
        """Write a score with its unit, and as a probability if it stands for one."""
        if self.in_log_odds:
            return f"{LOG_ODDS} {score:.2f} ({share_of(score)})"
        return f"{score:.4g} {self.unit}"

    def bound(self, edge: float) -> str:
        """Write an edge between two levels or bins."""
        return share_of(edge) if self.in_log_odds else f"{edge:.4g}"

    def ranges(self) -> list[tuple[int, str]]:
        """Return each level that a score can have, with the range of its scores."""
        edges = [self.bound(edge) for edge in self.levels]
        texts = [f"below {edges[0]}", *(f"{a} to {b}" for a, b in itertools.pairwise(edges)),
                 f"above {edges[-1]}"]
        empty = {i for i, (a, b) in enumerate(itertools.pairwise(self.levels), 1) if a == b}
        return [(level, text) for level, text in enumerate(texts) if level not in empty]


def read_scale(store: TokenStore, name: str) -> Scale:
    """Return the scale of the scores `name`; those without a record of their measure are log-odds.

    Quantiles are of at most `SAMPLED` scores, in chunks spaced evenly over the store.
    """
    measure = open_array(store.shards[0], name, "scores")[1].get("measure") or {}
    unit, boundary = str(measure.get("unit", LOG_ODDS)), bool(measure.get("boundary", True))
    if unit == LOG_ODDS and boundary:
        return Scale()
    counts = np.zeros(1 << 16, dtype=np.int64)
    stride = max(-(-store.num_tokens // SAMPLED), 1) * _CHUNK
    for shard in store.shards:
        scores = open_array(shard, name, "scores")[0]
        for start in range(0, len(scores), stride):
            part = scores[start : start + _CHUNK].view(np.uint16)
            counts += np.bincount(part, minlength=len(counts))
    edges = set(quantiles(counts, EDGE_QUANTILES))
    if boundary:
        median = quantiles(np.where(_VALUES > 0, counts, 0), (0.5,))
        return Scale(unit, True, (0.0, 0.0, *(median or (0.0,))), tuple(sorted(edges | {0.0})))
    levels = quantiles(counts, LEVEL_QUANTILES) or (0.0,) * len(LEVEL_QUANTILES)
    return Scale(unit, False, levels, tuple(sorted(edges)) or (0.0,))


def quantiles(counts: np.ndarray, shares: tuple[float, ...]) -> tuple[float, ...]:
    """Return the least finite score that at least each share of them reaches or stays below.

    Args:
        counts: how often each float16 number occurs, by its bits, `(65536,)` int64.
    Returns:
        One number per share; none if there is no finite score.
    """
    finite = np.flatnonzero((counts > 0) & np.isfinite(_VALUES))
    finite = finite[np.argsort(_VALUES[finite], kind="stable")]
    below = np.cumsum(counts[finite])
    if not len(below):
        return ()
    places = np.searchsorted(below, np.array(shares) * below[-1])
    return tuple(_VALUES[finite[places]].tolist())
