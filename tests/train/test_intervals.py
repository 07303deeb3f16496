"""Intervals of differences: against scipy, and in simulated studies."""

from __future__ import annotations

import math

import numpy as np
import pytest

from train.reports.intervals import estimate, macro_f1_values, paired_difference


def simulated(generator, shape, pretrain=0.0, finetune=0.0, item=1.0, mean=0.0, shared=0.0
              ) -> np.ndarray:
    """Differences `(P, S, N)` with standard deviations of pre-training, fine-tuning and items.

    finetune: of each fine-tuning by itself; shared: of a fine-tuning seed, in all rows alike.
    """
    num_pretrain, num_seeds, num_items = shape
    return (
        mean
        + generator.normal(0, pretrain, (num_pretrain, 1, 1))
        + generator.normal(0, finetune, (num_pretrain, num_seeds, 1))
        + generator.normal(0, shared, (1, num_seeds, 1))
        + generator.normal(0, item, (1, 1, num_items))
        + generator.normal(0, item / 2, shape)
    )


def difference(delta: np.ndarray, **options):
    return paired_difference(delta, np.zeros_like(delta), **options)


@pytest.mark.parametrize("spread", [
    {"pretrain": 0.1}, {"finetune": 0.2}, {"shared": 0.2}, {"pretrain": 0.05, "item": 2.0},
])
def test_the_standard_error_is_right_on_average(spread):
    # Squared, it estimates the variance of the mean over repetitions of the study; nothing is
    # counted twice. It is too large by a little, as no component can be below 0.
    generator = np.random.default_rng(1)
    found = [difference(simulated(generator, (4, 3, 60), **spread)) for _ in range(3000)]
    true = np.var([d.mean for d in found])
    assert 0.93 < np.mean([d.standard_error**2 for d in found]) / true < 1.25


def test_cells_that_cancel_in_rows_and_columns_still_differ():
    cells = np.array([[0.0, 0.083], [0.077, 0.0]])
    found = difference(np.broadcast_to(cells[:, :, None], (2, 2, 600)))
    own = cells.std(ddof=1) / 2 * 3.1824  # t(0.975) with three degrees of freedom
    assert found.mean == pytest.approx(0.04)
    assert found.high - found.mean >= 0.999 * own > 0.07


def test_no_interval_is_narrower_than_the_spread_of_its_cells():
    generator = np.random.default_rng(2)
    t = {3: 3.18245, 5: 2.57058, 8: 2.30600}
    for shape in ((2, 2), (2, 3), (3, 3)) * 100:
        delta = simulated(generator, (*shape, 50), *generator.uniform(0, 0.4, 2), item=0.3)
        cells = delta.mean(axis=2)
        own = cells.std(ddof=1) / math.sqrt(cells.size) * t[cells.size - 1]
        found = difference(delta)
        assert found.high - found.mean >= 0.999 * own


@pytest.mark.parametrize("shape, axis", [((1, 1, 400), 2), ((1, 5, 50), 1), ((8, 3, 20), 0)])
def test_one_source_alone_gives_the_textbook_interval(shape, axis):
    units = np.random.default_rng(3).normal(0.3, 2.0, size=shape[axis])
    delta = np.broadcast_to(np.expand_dims(units, [i for i in range(3) if i != axis]), shape)
    found = difference(delta)
    assert found.standard_error == pytest.approx(units.std(ddof=1) / math.sqrt(len(units)))
    stats = pytest.importorskip("scipy.stats")
    expected = stats.ttest_1samp(units, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-4)


def test_arms_are_paired():
    # Two arms that are right about nearly the same half of the items: the pairing removes the
    # large variance that items have in common.
    generator = np.random.default_rng(4)
    first = np.broadcast_to(generator.random((1, 1, 500)) < 0.5, (1, 3, 500))
    second = first.copy()
    second[0, :, :5] = ~second[0, :, :5]
    found = paired_difference(first, second)
    assert found.high - found.low < 0.04
    same = paired_difference(first, first)
    assert (same.mean, same.low, same.high, same.detectable) == (0, 0, 0, 0)


@pytest.mark.parametrize("spread", [
    {}, {"pretrain": 0.1, "finetune": 0.1}, {"pretrain": 0.3, "finetune": 0.1},
    {"finetune": 0.3}, {"pretrain": 0.1, "shared": 0.1}, {"pretrain": 0.3, "item": 0.3},
], ids=str)
@pytest.mark.parametrize("units", [(2, 2), (2, 5), (3, 3), (5, 5), (5, 8)], ids=str)
def test_a_95_percent_interval_covers_the_truth(units, spread):
    """1,000 studies: at least 93 % with two units of each source, at most 97 % from five on.

    The bounds leave room for two standard errors of the count, 1.6 and 1.1 points.
    """
    generator = np.random.default_rng(5)
    found = [difference(simulated(generator, (*units, 100), mean=0.1, **spread))
             for _ in range(1000)]
    covered = np.mean([d.low <= 0.1 <= d.high for d in found])
    assert covered > 0.93 - 0.016
    if min(units) >= 5:
        assert covered < 0.97 + 0.011


@pytest.mark.parametrize("shape, spread", [
    ((1, 1, 200), (0, 0, 1)), ((5, 1, 200), (0.3, 0, 1)), ((1, 3, 200), (0, 0.3, 1)),
])
def test_a_source_with_one_unit_that_does_not_vary_is_no_harm(shape, spread):
    generator = np.random.default_rng(5)
    found = [difference(simulated(generator, shape, *spread, mean=0.1)) for _ in range(1000)]
    assert 0.93 < np.mean([d.low <= 0.1 <= d.high for d in found]) < 0.98


def test_one_pretraining_seed_cannot_count_its_chance():
    # Why a table must say it: the truth lies far outside in most repetitions.
    generator = np.random.default_rng(6)
    hits = 0
    for _ in range(200):
        found = difference(simulated(generator, (1, 3, 200), pretrain=0.5))
        hits += found.low <= 0 <= found.high
    assert hits / 200 < 0.6


@pytest.mark.parametrize("shape, spread", [
    ((1, 1, 200), (0, 0, 1)), ((8, 1, 200), (0.3, 0, 0.1)), ((1, 6, 100), (0, 0.3, 0.1)),
])
def test_a_detectable_difference_is_detected_at_its_rate(shape, spread):
    generator = np.random.default_rng(7)
    guesses = [difference(simulated(generator, shape, *spread)).detectable for _ in range(200)]
    truth = math.sqrt(np.mean(np.square(guesses)))  # the mean variance is the true one
    found = [difference(simulated(generator, shape, *spread, mean=truth)) for _ in range(600)]
    assert np.mean([d.low > 0 for d in found]) == pytest.approx(0.8, abs=0.06)


def test_more_power_and_confidence_need_larger_differences():
    delta = simulated(np.random.default_rng(8), (2, 3, 100), 0.1)
    usual = difference(delta)
    assert difference(delta, power=0.9).detectable > usual.detectable
    stricter = difference(delta, confidence=0.99)
    assert stricter.detectable > usual.detectable and stricter.low < usual.low


def guesses_of(generator, truth, seeds=(3, 3), pretrain=0.4, finetune=0.3) -> np.ndarray:
    """Answers `(P, S, N)` to three classes, the rare one hard; items and seeds vary in ease."""
    ease = (np.array([1.5, 1.0, 0.2])[truth] + generator.normal(0, 0.7, len(truth))
            + generator.normal(0, pretrain, (seeds[0], 1, 1))
            + generator.normal(0, finetune, (*seeds, 1)))
    right = generator.random(ease.shape) < 1 / (1 + np.exp(-ease))
    other = (truth + 1 + (generator.random(ease.shape) < 0.3)) % 3
    return np.where(right, truth, other)


def test_values_of_macro_f1_by_hand():
    # Classes 0 and 1: hits 1 and 1, items that have or were given them 3 and 3; class 2 nowhere.
    truth, guesses = np.array([0, 0, 1]), np.array([[[0, 1, 1]]])
    values = macro_f1_values(truth, guesses, 3)
    assert values.mean() == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    # The derivative by an item's weight: F1 with that item counted 1 + h times.
    hits, total = np.array([1.0, 1.0]), np.array([3.0, 3.0])
    for item, (a, b) in enumerate(zip(truth, guesses[0, 0], strict=True)):
        step = 1e-6
        more, all_of = hits.copy(), total.copy()
        more[a] += step * (a == b)
        all_of[a] += step
        all_of[b] += step
        slope = ((2 * more / all_of).sum() - (2 * hits / total).sum()) / 3 / step
        assert values[0, 0, item] - values.mean() == pytest.approx(3 * slope, abs=1e-4)


def test_each_mean_of_the_values_is_the_macro_f1_of_its_cell():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(10)
    truth = generator.choice(3, 200, p=(0.5, 0.35, 0.15))
    guesses = guesses_of(generator, truth, (2, 3))
    found = macro_f1_values(truth, guesses, 3).mean(axis=2)
    for p, s in np.ndindex(2, 3):
        assert found[p, s] == pytest.approx(
            metrics.f1_score(truth, guesses[p, s], average="macro"))


@pytest.mark.parametrize("metric", ["macro_f1", "accuracy"])
def test_an_interval_of_one_arm_covers_the_truth(metric):
    """500 studies of answers, right or wrong: at least 93 % (two standard errors: 2.2 points)."""
    generator = np.random.default_rng(11)

    def study(items: int, seeds=(3, 3)) -> np.ndarray:
        truth = generator.choice(3, items, p=(0.5, 0.35, 0.15))
        guesses = guesses_of(generator, truth, seeds)
        return macro_f1_values(truth, guesses, 3) if metric == "macro_f1" else guesses == truth

    true = np.mean([study(2000, (20, 1)).mean() for _ in range(200)])
    found = [estimate(np.asarray(study(250), dtype=np.float64)) for _ in range(500)]
    assert np.mean([e.low <= true <= e.high for e in found]) > 0.93 - 0.022


def test_sign_and_refusals():
    delta = np.random.default_rng(9).normal(size=(2, 3, 30))
    zero = np.zeros_like(delta)
    forward, back = paired_difference(delta, zero), paired_difference(zero, delta)
    assert (back.mean, back.low, back.high) == pytest.approx(
        (-forward.mean, -forward.high, -forward.low))
    with pytest.raises(ValueError, match="one shape"):
        paired_difference(delta, zero[:, :, :8])
    with pytest.raises(ValueError, match="one shape"):
        paired_difference(delta[:, :, :0], zero[:, :, :0])
