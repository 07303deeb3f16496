"""Estimate a difference between two arms: its interval, and the detectable difference.

The interval adds up the variance components of a paired design: pre-training seeds, fine-tuning
seeds and test items, with the two arms paired (seed s with seed s, item n with item n). Each
component is the variance of the mean over its `k` units, `s**2 / k` with their sample variance
`s**2`. A bootstrap that resamples `k-1` of the `k` units has the same variance in expectation;
`tests/train/test_intervals.py` draws one to compare.

Percentiles of such draws are too narrow for few seeds: with two seeds the interval cannot leave
their values, and missed the true difference in a quarter of the simulations where seeds vary most.
So the interval is `difference +- t * standard error`, with the quantile of Student's t at
Satterthwaite's degrees of freedom: near the normal one if items dominate, 12.7 if two seeds do.

Variance of seed and item together is in both components, which makes the interval wider than
necessary; Satterthwaite's degrees of freedom make it narrower for two or three units. Simulated
(1,500 repetitions, 200 items), a 95 % interval covered 92 to 98 % with three or more units of every
component that varies, and 88 % with two pre-training seeds that vary ten times as much as the mean
of the items. A component with one unit cannot be estimated: with one pre-training seed that varies
as much as the mean of the items, the interval covered 78 %, and less if it varies more. Show such
an interval only with a note that says so.

Letters: `P` pre-training seeds, `S` fine-tuning seeds, `N` test items.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
POWER = 0.8


@dataclass(frozen=True)
class Difference:
    """A difference of two arms, first minus second.

    Attributes:
        mean: the difference.
        low, high: the interval.
        detectable: the smallest true difference that so many seeds and items reveal.
        standard_error: of the mean.
        freedom: Satterthwaite's degrees of freedom; infinite without any variance.
    """

    mean: float
    low: float
    high: float
    detectable: float
    standard_error: float
    freedom: float


def paired_difference(
    first: np.ndarray,
    second: np.ndarray,
    *,
    confidence: float = CONFIDENCE,
    power: float = POWER,
) -> Difference:
    """Compare two arms that answered the same items with the same seeds.

    The detectable difference is `(t(1 - (1 - confidence) / 2) + t(power)) * standard error`: a
    true difference of that size gives an interval without 0 in a share `power` of repetitions.

    Args:
        first, second: whether each answer is right, `(P, S, N)` bool or float.
        confidence: coverage of the interval, in (0, 1).
        power: probability of revealing the detectable difference, in (0, 1).
    Raises:
        ValueError: the arms differ in shape, or there is nothing to compare.
    """
    if first.shape != second.shape or first.ndim != 3 or 0 in first.shape:
        raise ValueError(
            f"paired arms need one shape (P, S, N) without empty axes: got {first.shape} and "
            f"{second.shape}"
        )
    from scipy import stats

    delta = first.astype(np.float64) - second.astype(np.float64)
    mean = float(delta.mean())
    variances = np.array([_variance_of_mean(delta, axis) for axis in range(3)])
    error = math.sqrt(variances.sum())
    if error == 0:
        return Difference(mean, mean, mean, 0.0, 0.0, math.inf)
    others = np.maximum(np.array(delta.shape) - 1, 1)
    freedom = float(variances.sum() ** 2 / (variances**2 / others).sum())
    reach, more = stats.t.ppf([1 - (1 - confidence) / 2, power], freedom).tolist()
    return Difference(
        mean, mean - reach * error, mean + reach * error, (reach + more) * error, error, freedom
    )


def _variance_of_mean(delta: np.ndarray, axis: int) -> float:
    """Return the variance of the mean over the units of one axis of `(P, S, N)`."""
    units = delta.mean(axis=tuple(other for other in range(3) if other != axis))
    return float(units.var(ddof=1) / len(units)) if len(units) > 1 else 0.0
