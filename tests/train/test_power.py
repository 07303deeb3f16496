"""Sizes to plan a study by: parts of the spread that are put in come out, and predict intervals."""

from __future__ import annotations

import numpy as np
import pytest

from train.reports.intervals import estimate
from train.reports.power import MOST_SEEDS, Spread, detectable, seeds_for, spread_of

TRUE = Spread(seed=0.02, finetuning=0.01, each=0.015, item=0.3)


def study(generator, seeds: int, finetunings: int, items: int, spread: Spread = TRUE):
    """Draw differences whose parts have the given standard deviations."""
    return (generator.normal(0, spread.seed, (seeds, 1, 1))
            + generator.normal(0, spread.finetuning, (1, finetunings, 1))
            + generator.normal(0, spread.each, (seeds, finetunings, 1))
            + generator.normal(0, spread.item, (1, 1, items)))


def test_the_parts_that_were_put_in_come_out():
    """The mean of the variances over many studies; each study alone is far off."""
    generator = np.random.default_rng(1)
    found = [spread_of(study(generator, 12, 12, 300)) for _ in range(150)]
    variances = np.mean([np.square(one) for one in found], axis=0)
    assert np.sqrt(variances) == pytest.approx(TRUE, rel=0.06)


def test_one_size_gives_what_its_own_interval_says():
    values = study(np.random.default_rng(2), 4, 3, 200)
    assert detectable(spread_of(values), 4, 3, 200) == pytest.approx(estimate(values).detectable)
    once = values[:, :1]
    assert detectable(spread_of(once), 4, 1, 200) == pytest.approx(estimate(once).detectable)


def test_a_difference_of_that_size_is_seen_in_four_studies_of_five():
    """At the sizes planned for, not those that the spread was found with."""
    generator = np.random.default_rng(3)
    truth = detectable(TRUE, 6, 3, 500)
    seen = [estimate(truth + study(generator, 6, 3, 500)).low > 0 for _ in range(600)]
    assert 0.75 < np.mean(seen) < 0.9


def test_by_hand():
    # Items alone: (1.965 + 0.842) x 0.3 / sqrt(500); t of 499 degrees of freedom.
    assert detectable(Spread(0, 0, 0, 0.3), 3, 2, 500) == pytest.approx(0.03766, rel=1e-3)
    # Seeds alone: (4.303 + 1.061) x 0.02 / sqrt(3); t of 2 degrees of freedom.
    assert detectable(Spread(0.02, 0, 0, 0), 3, 2, 500) == pytest.approx(0.06194, rel=1e-3)


def test_seeds_for_a_target():
    needed = seeds_for(TRUE, 0.05, 3, 500)
    assert detectable(TRUE, needed, 3, 500) <= 0.05 < detectable(TRUE, needed - 1, 3, 500)
    assert seeds_for(TRUE, 0.015, 3, 500) is None, "items alone hide it, with any number of seeds"
    assert seeds_for(Spread(0, 0, 0, 0.01), 0.015, 3, 500) == 2
    assert detectable(TRUE, MOST_SEEDS, 3, 500) > 0.015


def test_one_pretraining_seed_says_nothing_of_more():
    assert spread_of(np.zeros((1, 3, 5))) is None
    assert not any(spread_of(np.ones((3, 2, 5)))), "no spread at all"
