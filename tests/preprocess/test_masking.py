"""Masks: budgets, choices against plain twins, 80/10/10, words, and who depends on what."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess import masking as masks
from preprocess.errors import ConfigError
from preprocess.masking import (
    STRATEGIES,
    Sequences,
    controls,
    corrupt,
    counter_uniform,
    draw_counts,
    drawn,
    draws,
    find_candidates,
    selective_limit,
)
from preprocess.text.continuations import continuation_table, find_continuations

ALL = sorted(STRATEGIES)
DRAWN = [name for name in ALL if STRATEGIES[name].drawn]
SPECIAL = (0, 3, 4)


def make_batch(num_tokens: int = 100_000, seed: int = 1, epoch: int = 0, **changes) -> Sequences:
    """Sequences of 0 to 60 tokens, 2 % special, scores with many ties, words of 1.3 tokens.

    Windows of 6 sequences, documents of 18; the index to match holds about a tenth.
    """
    rng = np.random.default_rng(7)
    ends = np.cumsum(rng.integers(0, 61, size=num_tokens // 20))
    offsets = np.concatenate([[0], ends[ends < num_tokens], [num_tokens]])
    candidates = rng.random(num_tokens) > 0.02
    number = np.arange(len(offsets) - 1)
    batch = Sequences(
        offsets=offsets,
        positions=np.arange(num_tokens) + 5_000_000_000,
        candidates=candidates,
        rate=0.15,
        seed=seed,
        epoch=epoch,
        scores=(rng.normal(-1, 1, num_tokens).round(1)).astype(np.float16),
        continues_word=rng.random(num_tokens) < 0.23,
        windows=number // 6,
        documents=number // 18,
        octaves=rng.binomial(14, 0.6, num_tokens).astype(np.uint8),
        policy=STRATEGIES[masks.MATCHED].choose,
        **matches(offsets, candidates & (rng.random(num_tokens) < 0.1)),
    )
    return dataclasses.replace(batch, **changes)


def matches(offsets, masked) -> dict:
    """The fields of an index to match, from its masks as `(T,)` bool."""
    before = np.concatenate([[0], np.cumsum(masked)])
    return {"matched": np.flatnonzero(masked),
            "matched_counts": before[offsets[1:]] - before[offsets[:-1]]}


def cut_batch(batch: Sequences, first: int, end: int) -> Sequences:
    """The sequences `first` to `end` - 1 of a batch."""
    offsets = batch.offsets[first : end + 1]
    tokens = slice(offsets[0], offsets[-1])
    inside = (batch.matched >= offsets[0]) & (batch.matched < offsets[-1])
    return dataclasses.replace(
        batch, offsets=offsets - offsets[0], matched=batch.matched[inside] - offsets[0],
        **{name: getattr(batch, name)[tokens] for name in
           ("positions", "candidates", "scores", "continues_word", "octaves")},
        **{name: getattr(batch, name)[first:end] for name in
           ("matched_counts", "windows", "documents")},
    )


def test_every_record_is_filled_in():
    for name, strategy in STRATEGIES.items():
        assert strategy.needs <= {"scores", "match", "words", "documents", "frequency", "boundary",
                                  "policy", "means"}
        assert strategy.budget in ("rate", "at_most", "match", "policy")
        # What reads an array is built beside it; a count is matched from an index.
        assert not (strategy.drawn and strategy.needs & masks.ARRAY_NEEDS.keys()), name
        assert (strategy.budget in ("match", "policy")) == ("match" in strategy.needs)
        assert strategy.control == ("match" in strategy.needs)
        assert strategy.rule.endswith(".") and strategy.rule[0].isupper()
        assert set(strategy.options) <= {"centre", "temperature"}
    assert STRATEGIES[masks.BASELINE].drawn
    assert not STRATEGIES[masks.MATCHED].drawn and "match" not in STRATEGIES[masks.MATCHED].needs


# ------------------------------------------------------------------------------ every strategy


@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_positions_ascend_are_unique_and_never_special(name, units):
    batch = with_units(name, make_batch(20_000), units)
    chosen = STRATEGIES[name].choose(batch)
    assert chosen.dtype == np.int64 and len(chosen) > 500
    assert (np.diff(chosen) > 0).all()
    assert batch.candidates[chosen].all()


def with_units(name: str, batch: Sequences, units: bool) -> Sequences:
    """The batch, without units unless a rule needs them or `units`."""
    return batch if units or "words" in STRATEGIES[name].needs else dataclasses.replace(
        batch, continues_word=None)


@pytest.mark.parametrize("name", ALL)
def test_same_seed_same_positions_other_seed_or_epoch_others(name):
    def choose(**changes):
        return STRATEGIES[name].choose(make_batch(20_000, **changes)).tolist()

    assert choose() == choose()
    assert choose() != choose(seed=2)
    assert choose() != choose(epoch=1)


@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("name", [name for name in ALL if not STRATEGIES[name].blocks])
@pytest.mark.parametrize(("cut", "rate"), [(18, 0.15), (36, 1.0)])
def test_positions_do_not_depend_on_how_documents_are_cut_into_batches(name, cut, rate, units):
    whole = with_units(name, make_batch(3_000, rate=rate), True)
    parts, shown = [], []
    for first in range(0, len(whole.offsets) - 1, cut):
        part = cut_batch(whole, first, min(first + cut, len(whole.offsets) - 1))
        parts.append(STRATEGIES[name].choose(with_units(name, part, units))
                     + whole.offsets[first])
        shown.append(len(part.windows))
    whole = with_units(name, whole, units)
    assert len(shown) > 1
    assert np.concatenate(parts).tolist() == twin(name, whole)
    assert STRATEGIES[name].choose(whole).tolist() == twin(name, whole)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("offsets", [[0], [0, 0], [0, 0, 2, 2, 2]])
def test_empty_batches_sequences_and_candidates(name, offsets):
    num_tokens, num_sequences = offsets[-1], len(offsets) - 1
    batch = Sequences(
        offsets=np.array(offsets),
        positions=np.arange(num_tokens),
        candidates=np.zeros(num_tokens, dtype=bool),
        rate=1.0,
        seed=0,
        epoch=0,
        scores=np.ones(num_tokens, dtype=np.float16),
        continues_word=np.ones(num_tokens, dtype=bool),
        documents=np.arange(num_sequences),
        octaves=np.zeros(num_tokens, dtype=np.uint8),
        policy=STRATEGIES[masks.MATCHED].choose,
        **matches(np.array(offsets), np.zeros(num_tokens, dtype=bool)),
    )
    assert STRATEGIES[name].choose(batch).tolist() == []


UNIFORM = [n for n in ALL if STRATEGIES[n].budget in ("rate", "match")]


@pytest.mark.parametrize("name", UNIFORM)
def test_every_candidate_is_equally_likely_where_scores_do_not_decide(name):
    hits, candidates = np.zeros(20), np.arange(20) != 4
    # A batch of many copies; each copy has draws of its own.
    copies = 3_000
    offsets = np.arange(copies + 1) * 20
    batch = Sequences(
        offsets=offsets,
        positions=np.arange(20 * copies),
        candidates=np.tile(candidates, copies),
        rate=0.2,
        seed=5,
        epoch=0,
        scores=np.full(20 * copies, -1, dtype=np.float16),
        continues_word=np.zeros(20 * copies, dtype=bool),
        documents=np.arange(copies),
        octaves=np.zeros(20 * copies, dtype=np.uint8),
        **matches(offsets, np.tile(np.arange(20) < 4, copies)),
    )
    hits = np.bincount(STRATEGIES[name].choose(batch) % 20, minlength=20)
    share = hits / copies
    expected = 4 / 19 if STRATEGIES[name].budget == "match" else 0.2
    assert share[4] == 0
    # one standard deviation is 0.0073
    assert np.abs(np.delete(share, 4) - expected).max() < 0.03


# ------------------------------------------------------------------------------------- budgets


RATED = [name for name in ALL if STRATEGIES[name].budget == "rate"]


@pytest.mark.parametrize("name", RATED)
def test_budget_is_met_over_100_000_tokens(name):
    rows = np.append(np.arange(0, 100_000, 128), 100_000)  # as long as the loader's
    everything = np.ones(100_000, dtype=bool)
    for seed in range(10):
        batch = make_batch(seed=seed, offsets=rows, matched_counts=None, candidates=everything,
                           windows=None, documents=None)
        batch = with_units(name, batch, False)
        assert abs(len(STRATEGIES[name].choose(batch)) - 15_000) <= 0.001 * 15_000


@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("name", RATED)
def test_budget_is_met_in_expectation_by_short_sequences_and_units_too(name, units):
    masked, budget = 0, 0.0
    for epoch in range(16):
        batch = make_batch(epoch=epoch, windows=None)
        masked += len(STRATEGIES[name].choose(with_units(name, batch, units)))
        budget += 0.15 * batch.candidates.sum()
    assert abs(masked - budget) <= 0.004 * budget  # one sd is 0.02 to 0.1 %


def sizes_batch(num_tokens: int, sizes: list[int], shares: list[float], **changes) -> Sequences:
    """Sequences of 20 tokens, words of some sizes; the first token of each starts a word."""
    rng = np.random.default_rng(11)
    drawn = rng.choice(sizes, p=shares, size=num_tokens)
    starts = np.zeros(num_tokens, dtype=bool)
    starts[(ends := np.cumsum(drawn))[ends < num_tokens]] = True
    starts[::20] = True
    offsets = np.arange(0, num_tokens + 1, 20)
    return make_batch(
        num_tokens, offsets=offsets, candidates=np.ones(num_tokens, dtype=bool),
        continues_word=~starts, matched_counts=None, documents=None,
        **{"windows": np.arange(len(offsets) - 1) // 7, **changes})


@pytest.mark.parametrize("sizes", [
    ([1, 2, 3, 4, 5], [0.74, 0.15, 0.06, 0.03, 0.02]),  # of text
    ([1, 2, 3, 4, 5, 12], [0.2, 0.2, 0.2, 0.2, 0.15, 0.05]),  # of a poor tokenizer
])
@pytest.mark.parametrize("windows", ["of 140 tokens", "of one sequence"])
@pytest.mark.parametrize("name", DRAWN)
def test_words_of_every_size_and_place_are_equally_likely(name, sizes, windows):
    """The published rule masks words of four pieces never in sentences of 20 tokens."""
    own = {} if windows == "of 140 tokens" else {"windows": None}
    batch = sizes_batch(84_000, *sizes, **own)
    starts = np.flatnonzero(~batch.continues_word)
    size = np.diff(np.append(starts, 84_000))
    size_of = np.repeat(size, size)
    hits = np.zeros(84_000)
    epochs = 60
    for epoch in range(epochs):
        hits[STRATEGIES[name].choose(dataclasses.replace(batch, epoch=epoch))] += 1
    for groups in (size_of, np.arange(84_000) % 20):
        for value in np.unique(groups):
            group = groups == value
            # Words are masked as a whole, so draws are fewer than tokens by the size of a word.
            draws = epochs * (group / size_of).sum() if name != "random" else epochs * group.sum()
            sd = math.sqrt(0.15 * 0.85 / draws)
            assert abs(hits[group].mean() / epochs - 0.15) < max(0.02 * 0.15, 4 * sd), value


def test_whole_words_hold_every_length_to_its_rate_in_each_window():
    batch = sizes_batch(84_000, [1, 2, 3], [0.7, 0.2, 0.1])
    starts = np.flatnonzero(~batch.continues_word)
    size = np.diff(np.append(starts, 84_000))
    chosen = np.zeros(84_000, dtype=bool)
    chosen[STRATEGIES["whole_word"].choose(batch)] = True
    for window in range(600):
        inside = starts // 140 == window
        for length in (2, 3):
            words = inside & (size == length)
            assert abs(chosen[starts[words]].sum() - 0.15 * words.sum()) < 1.0001
        # Within one token of the rate, in every window: the short words fill it up.
        assert abs(chosen[window * 140 : window * 140 + 140].sum() - 21) <= 7


def test_a_rate_for_each_sequence():
    """A schedule of the rate: rows differ, as their numbers do."""
    half = make_batch(40_000)
    number = half.windows  # rates are equal within a window
    rates = np.where(number % 2 == 0, 0.1, 0.3)
    for name in DRAWN:
        batch = dataclasses.replace(half, rate=rates)
        chosen = STRATEGIES[name].choose(batch)
        owner = np.searchsorted(half.offsets, chosen, side="right") - 1
        tokens = np.bincount(
            np.repeat(number % 2, np.diff(half.offsets)), weights=half.candidates, minlength=2)
        found = np.bincount(number[owner] % 2, minlength=2) / tokens
        assert np.abs(found - [0.1, 0.3]).max() < 0.005, name
        same = STRATEGIES[name].choose(dataclasses.replace(half, rate=np.full(len(rates), 0.15)))
        assert same.tolist() == STRATEGIES[name].choose(half).tolist()


def test_random_meets_its_budget_in_every_draw():
    # 5,000 sequences of about 20 tokens: independent rounding would miss by 0.2 % (one sd).
    ends = np.cumsum(np.random.default_rng(0).integers(1, 40, size=5_100))
    offsets = np.concatenate([[0], ends[ends < 100_000], [100_000]])
    for epoch in range(50):
        batch = Sequences(
            offsets=offsets, positions=np.arange(100_000) + 123_456_789_012,
            candidates=np.ones(100_000, dtype=bool), rate=0.15, seed=epoch // 7, epoch=epoch,
        )
        assert abs(int(draw_counts(batch).sum()) - 15_000) <= 15


@pytest.mark.parametrize("name", ["whole_word", "span"])
def test_words_are_whole_and_meet_the_budget_in_expectation_in_one_sequence(name):
    # Words of 3, 2, 2 and 1 tokens; the budget is 0.4 * 8 = 3.2 tokens.
    batch = Sequences(
        offsets=np.array([0, 8]),
        positions=np.arange(8),
        candidates=np.ones(8, dtype=bool),
        rate=0.4,
        seed=3,
        epoch=0,
        continues_word=np.array([0, 1, 1, 0, 1, 0, 1, 0], dtype=bool),
    )
    hits = np.zeros(8)
    for epoch in range(4_000):
        chosen = STRATEGIES[name].choose(dataclasses.replace(batch, epoch=epoch)).tolist()
        for word in ([0, 1, 2], [3, 4], [5, 6], [7]):
            assert len(set(word) & set(chosen)) in (0, len(word))
        hits[chosen] += 1
    assert np.abs(hits / 4_000 - 0.4).max() < 0.03  # one sd is 0.008


def test_selective_limit_by_hand():
    counts = np.array([0, 1, 5, 6, 7, 13, 14, 20, 100])
    assert selective_limit(counts, 0.15).tolist() == [0, 1, 1, 1, 1, 1, 2, 3, 15]
    assert selective_limit(counts, 1.0).tolist() == counts.tolist()
    assert selective_limit(np.array([20, 20]), np.array([0.1, 0.5])).tolist() == [2, 10]


# ------------------------------------------------------------------------------- by hand


def test_selective_by_hand():
    inf = np.inf
    #          0    1    2     3     4   | 5     6    | 7   8    9    10    11    12   13   14   15
    scores = [0.5, 2.0, 3.0, -1.0, -0.0, 0.0, -4.0, 9.0, 1, inf, 0.1, 6e-8, -inf, 0.2, 0.3, 0.4]
    batch = Sequences(
        offsets=np.array([0, 5, 7, 7, 16]),
        positions=np.arange(16),
        candidates=np.arange(16) != 7,  # the special token has the best score but one
        rate=0.5,
        seed=0,
        epoch=0,
        scores=np.array(scores, dtype=np.float16),
    )
    # 5 candidates allow 2: the best are 2 and 1. Nothing above 0 in the second. 8 allow 4.
    assert STRATEGIES["selective"].choose(batch).tolist() == [1, 2, 8, 9, 14, 15]
    # A subnormal score is above 0; 0 itself is not, of either sign.
    everything = dataclasses.replace(batch, rate=1.0)
    assert 11 in STRATEGIES["selective"].choose(everything)
    assert not {4, 5} & set(STRATEGIES["selective"].choose(everything).tolist())
    # Minus infinity is never masked; the others all are.
    for name in ("selective_fill", "top", "sampled", "band"):
        chosen = STRATEGIES[name].choose(everything).tolist()
        assert chosen == [i for i in range(16) if i not in (7, 12)]


def one_sequence(scores, rate: float, **options) -> Sequences:
    size = len(scores)
    options = {"seed": 0, "epoch": 0, "positions": np.arange(size), **options}
    return Sequences(
        offsets=np.array([0, size]), candidates=np.ones(size, dtype=bool),
        scores=np.array(scores, dtype=np.float16), rate=rate, **options)


def test_top_takes_the_largest_whatever_their_sign():
    assert STRATEGIES["top"].choose(one_sequence([-3, -1, -2, -9], 0.5)).tolist() == [1, 2]


def test_band_by_hand():
    batch = one_sequence(range(1, 11), 0.2, centre=0.6)
    assert STRATEGIES["band"].choose(batch).tolist() == [5, 6]  # ranks 6 and 7
    low = dataclasses.replace(batch, centre=0.0)
    assert STRATEGIES["band"].choose(low).tolist() == [0, 1]
    assert STRATEGIES["band"].choose(dataclasses.replace(batch, centre=1.0)).tolist() == [8, 9]


def many(scores, rate: float, copies: int = 20_000, **options) -> Sequences:
    """Copies of one sequence, each with draws of its own."""
    size = len(scores)
    return Sequences(
        offsets=np.arange(copies + 1) * size, positions=np.arange(size * copies),
        candidates=np.ones(size * copies, dtype=bool), rate=rate, seed=0, epoch=0,
        scores=np.tile(np.array(scores, dtype=np.float16), copies), **options)


def test_sampled_is_successive_sampling_by_weight():
    batch = many([math.log(4), 0, 0], 2 / 3)
    chosen = STRATEGIES["sampled"].choose(batch)
    hits = np.zeros((20_000, 3), dtype=bool)
    hits.reshape(-1)[chosen] = True
    two = hits[hits.sum(axis=1) == 2]
    pairs = [(two[:, a] & two[:, b]).mean() for a, b in ((0, 1), (0, 2), (1, 2))]
    assert np.abs(np.array(pairs) - [0.4667, 0.4667, 0.0667]).max() < 0.015  # one sd is 0.0035
    assert np.abs(two.mean(axis=0) - [0.9333, 0.5333, 0.5333]).max() < 0.015


def test_temperature_goes_from_the_largest_to_a_draw():
    batch = many([2, 1, 0, -1], 0.25, copies=4_000)
    cold = STRATEGIES["sampled"].choose(dataclasses.replace(batch, temperature=1e-3))
    assert cold.tolist() == STRATEGIES["top"].choose(batch).tolist()
    hot = STRATEGIES["sampled"].choose(dataclasses.replace(batch, temperature=1e4))
    share = np.bincount(hot % 4, minlength=4) / 4_000
    assert np.abs(share - 0.25).max() < 0.03
    tiny = dataclasses.replace(batch, temperature=1e-320)
    assert len(STRATEGIES["sampled"].choose(tiny)) == 4_000
    colder = dataclasses.replace(many([3.0] * 8, 0.5, copies=4_000), temperature=1e-12)
    places = np.bincount(STRATEGIES["sampled"].choose(colder) % 8, minlength=8)
    assert np.abs(places - 2_000).max() < 160  # of equal scores the draw still decides
    first = STRATEGIES["sampled"].choose(many([np.inf, np.inf, 5, 4], 0.25, copies=4_000))
    share = np.bincount(first % 4, minlength=4) / 4_000
    assert np.abs(share - [0.5, 0.5, 0, 0]).max() < 0.03


@pytest.mark.parametrize("name", ["top", "selective", "selective_fill"])
def test_the_unit_that_crosses_the_budget_is_kept_in_proportion(name):
    # 10 tokens at 30 %: 3 to mask. The best unit has 2 tokens, the next one 3, so it is kept with
    # probability 1 / 3; its score is that of its best token.
    scores = [9, 1, 0.5, 8, 0.5, -1, -1, -1, -1, -1]
    continues = [0, 1, 0, 1, 1, 0, 0, 0, 0, 0]
    batch = many(scores, 0.3, continues_word=np.tile(np.array(continues, dtype=bool), 20_000))
    chosen = STRATEGIES[name].choose(batch) % 10
    share = np.bincount(chosen, minlength=10) / 20_000
    assert share[:2].tolist() == [1, 1]
    assert np.abs(share[2:5] - 1 / 3).max() < 0.015 and share[5:].sum() == 0


def test_scores_that_are_no_numbers_are_refused():
    for name in ALL:
        batch = make_batch(100)
        if not STRATEGIES[name].needs.isdisjoint({"scores", "policy"}):
            scores = batch.scores.copy()
            scores[np.flatnonzero(batch.candidates)[3]] = np.nan
            with pytest.raises(ValueError, match="not a number"):
                STRATEGIES[name].choose(dataclasses.replace(batch, scores=scores))
            # That of a special token is never read.
            scores = np.where(batch.candidates, batch.scores, np.float16(np.nan))
            STRATEGIES[name].choose(dataclasses.replace(batch, scores=scores))


def test_spans_on_a_ring_by_hand():
    # 10 words, spans of 2 and 1 in the places 1 and 4 of the order: words 1, 2 and 5.
    length = np.array([1, 2, 1, 1, 1, 1, 1, 1, 1])
    masked = np.isin(np.arange(9), [1, 4])
    start, counts = np.array([0]), np.array([10])

    def turned(offset):
        laid = drawn.lay_out(length, masked, start, counts, np.array([offset]))
        return np.flatnonzero(laid).tolist()

    assert turned(0) == [1, 2, 5]
    assert turned(1) == [0, 1, 4]
    assert turned(2) == [0, 3, 9]  # the first span is split at the seam


def test_lengths_of_spans():
    assert drawn.SPAN_SHARES.round(4).tolist() == [
        0.2241, 0.1792, 0.1434, 0.1147, 0.0918, 0.0734, 0.0587, 0.0470, 0.0376, 0.0301]
    # In one long document of single-token words spans are nearly never shortened.
    size = 200_000
    batch = Sequences(
        offsets=np.array([0, size]), positions=np.arange(size), rate=0.05, seed=1, epoch=0,
        candidates=np.ones(size, dtype=bool), continues_word=np.zeros(size, dtype=bool))
    chosen = STRATEGIES["span"].choose(batch)
    runs = np.split(chosen, np.flatnonzero(np.diff(chosen) > 1) + 1)
    # Of the spans 5 % touch another one: 1 - 0.95 x ..., so runs are a little longer than 3.80.
    spans_per_word = 0.05 / 3.797 / 0.95
    assert abs(len(chosen) / len(runs) - 3.797 * (1 + spans_per_word)) < 0.12


def test_random_matched_refuses_more_than_the_candidates():
    batch = make_batch(100)
    wrong = batch.matched_counts.copy()
    wrong[1] = 1_000
    with pytest.raises(ValueError, match="sequence 1: 1000 tokens to match"):
        STRATEGIES["random_matched"].choose(dataclasses.replace(batch, matched_counts=wrong))


def test_shuffled_keeps_the_count_of_a_document_by_hand():
    # Two sentences of 7 tokens; the policy masks 1 token of the first, none of the second. Shuffled
    # scores under a limit of 1 per sentence would mask 2 in 81 % of draws.
    batch = many([3, 2, 1, -1, -1, -1, -1] + 7 * [-1], 0.15, copies=2_000)
    offsets = np.arange(4_001) * 7
    masked = np.arange(28_000) % 14 == 0
    batch = dataclasses.replace(
        batch, offsets=offsets, documents=np.arange(4_000) // 2, **matches(offsets, masked))
    assert STRATEGIES["selective"].choose(batch).tolist() == np.flatnonzero(masked).tolist()
    chosen = STRATEGIES["shuffled"].choose(batch)
    assert (chosen // 14).tolist() == list(range(2_000))
    assert abs((chosen % 14 < 7).mean() - 0.5) < 0.05  # in either sentence


def test_typemean_is_the_policy_on_other_scores():
    batch = make_batch(2_000)
    assert STRATEGIES["typemean"].choose(batch).tolist() == STRATEGIES["selective"].choose(
        batch).tolist()
    with pytest.raises(ValueError, match="policy"):
        STRATEGIES["typemean"].choose(dataclasses.replace(batch, policy=None))


# --------------------------------------------------------------------------- frequency_matched


def test_frequency_matched_by_hand():
    """Allowed are {superb, plot} and {film, dire}, nothing else."""
    #          the film superb the | a dire plot the
    octaves = [5, 3, 1, 5, 5, 1, 3, 5]
    found = set()
    for seed in range(200):
        batch = Sequences(
            offsets=np.array([0, 4, 8]), positions=np.arange(8), rate=0.15, seed=seed, epoch=0,
            candidates=np.ones(8, dtype=bool), octaves=np.array(octaves, dtype=np.uint8),
            **matches(np.array([0, 4, 8]), np.isin(np.arange(8), [2, 6])))
        found.add(tuple(STRATEGIES["frequency_matched"].choose(batch).tolist()))
    assert found == {(2, 6), (1, 5)}


def zipf_batch(num_tokens: int, length: int, seed: int) -> Sequences:
    """Text with Zipf's frequencies, and a policy that prefers rare types."""
    rng = np.random.default_rng(seed)
    types = np.minimum(rng.zipf(1.2, num_tokens), 30_000)
    counts = np.bincount(types)
    octaves = np.floor(np.log2(counts[types])).astype(np.uint8)
    offsets = np.arange(0, num_tokens + 1, length)
    batch = Sequences(
        offsets=offsets, positions=np.arange(num_tokens), rate=0.15, seed=seed, epoch=0,
        candidates=rng.random(num_tokens) > 0.02, octaves=octaves,
        continues_word=(types % 5 == 0),
        scores=(rng.normal(0, 1.5, num_tokens) + (8 - octaves)).astype(np.float16))
    policy = STRATEGIES["selective"].choose(dataclasses.replace(batch, continues_word=None))
    masked = np.zeros(num_tokens, dtype=bool)
    masked[policy] = True
    return dataclasses.replace(batch, **matches(offsets, masked))


@pytest.mark.parametrize(("num_tokens", "length"), [(200_000, 20), (198_000, 180), (4_000, 20)])
def test_frequency_matched_keeps_the_histogram_and_the_counts(num_tokens, length):
    batch = zipf_batch(num_tokens, length, seed=length)
    chosen = STRATEGIES["frequency_matched"].choose(batch)
    masked = np.zeros(num_tokens, dtype=bool)
    masked[chosen] = True
    own = matches(batch.offsets, masked)
    assert own["matched_counts"].tolist() == batch.matched_counts.tolist()
    bins = controls.frequency_bins(batch)
    aim, got = (np.bincount(bins[one], minlength=64) for one in (batch.matched, chosen))
    assert got.tolist() == aim.tolist()  # promised: within 1 %, and within 1 below 100
    # Counts alone keep nothing of it.
    random = STRATEGIES["random_matched"].choose(batch)
    off = np.abs(np.bincount(bins[random], minlength=64) - aim)[aim >= 100] / aim[aim >= 100]
    assert off.max() > 0.5
    # Within a bin it is a draw, though this policy hardly leaves another choice.
    assert len(np.intersect1d(chosen, batch.matched)) < 0.75 * len(chosen)


FIELDS = {"scores": "scores", "words": "continues_word", "match": "matched_counts",
          "documents": "documents", "frequency": "octaves", "policy": "scores"}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("missing", sorted(set(FIELDS.values())))
def test_a_strategy_needs_exactly_what_its_record_names(name, missing):
    needed = {FIELDS[need] for need in STRATEGIES[name].needs & FIELDS.keys()}
    if "policy" in STRATEGIES[name].needs and STRATEGIES[name].budget == "policy":
        needed.discard("matched_counts")  # the rule of the policy reads no counts
    if missing not in needed:
        STRATEGIES[name].choose(make_batch(100, **{missing: None}))
        return
    with pytest.raises(ValueError, match=missing):
        STRATEGIES[name].choose(make_batch(100, **{missing: None}))


@pytest.mark.parametrize(
    "changes",
    [
        {"rate": 0.0},
        {"rate": 1.01},
        {"rate": math.nan},
        {"rate": np.full(2, 0.2)},
        {"rate": np.array([0.1, 0.2, 0.0])},
        {"offsets": np.array([0, 50])},
        {"offsets": np.array([1, 100])},
        {"offsets": np.array([0, 60, 40, 100])},
        {"offsets": np.array([], dtype=np.int64)},
        {"positions": np.arange(99)},
        {"scores": np.zeros(101, dtype=np.float16)},
        {"continues_word": np.zeros((100, 2), dtype=bool)},
        {"octaves": np.zeros(99, dtype=np.uint8)},
        {"matched_counts": np.zeros(1, dtype=np.int64)},
        {"windows": np.zeros(1, dtype=np.int64)},
        {"documents": np.zeros(1, dtype=np.int64)},
        {"centre": 1.1},
        {"temperature": 0.0},
        {"temperature": math.inf},
    ],
)
def test_a_batch_that_does_not_fit_together_is_refused(changes):
    with pytest.raises(ValueError):
        make_batch(100, **changes)


# -------------------------------------------------------------------------------- plain twins


def twin(name: str, batch: Sequences) -> list[int]:
    """Every strategy as loops over windows, sequences and words, and Python's sorted."""
    return sorted(int(i) for i in TWINS[name](Plain(batch)))


class Plain:
    """A batch as lists: the candidates of each sequence, its units, and draws one by one."""

    def __init__(self, batch: Sequences) -> None:
        self.batch = batch
        bounds = list(zip(batch.offsets, batch.offsets[1:], strict=False))
        self.places = [[i for i in range(a, b) if batch.candidates[i]] for a, b in bounds]
        self.units = [self.split(places) for places in self.places]
        self.rates = [float(rate) for rate in batch.rates]

    def draw(self, stream, i, shift=0):
        at = self.batch.positions[i : i + 1]
        bits = round(float(counter_uniform(self.batch.seed, self.batch.epoch, at, stream)[0])
                     * 2**24)
        return (bits >> shift) * 2.0 ** (shift - 24)

    def split(self, places):
        words = []
        for i in places:
            joined = self.batch.continues_word is not None and self.batch.continues_word[i]
            if words and joined and words[-1][-1] == i - 1:
                words[-1].append(i)
            else:
                words.append([i])
        return words

    def count(self, b):
        places = self.places[b]
        if not places:
            return 0
        first = int(self.batch.positions[places[0]])
        window = np.array([first // masks.ROUNDING_WINDOW])
        shift = float(counter_uniform(
            self.batch.seed, self.batch.epoch, window, masks.STREAM_BUDGET)[0])
        before = self.rates[b] * first + shift
        return math.floor(before + self.rates[b] * len(places)) - math.floor(before)

    def score(self, unit):
        return max(float(self.batch.scores[i]) for i in unit)

    def windows(self):
        """The words, budget, least and most budget, and rate of each window with a word."""
        found = {}
        for b, units in enumerate(self.units):
            key = b if self.batch.windows is None else int(self.batch.windows[b])
            if units:
                expected = self.rates[b] * len(self.places[b])
                one = found.setdefault(key, [[], 0, 0, 0, self.rates[b]])
                one[0] += units
                one[1] += self.count(b)
                one[2] += math.floor(expected)
                one[3] += math.ceil(expected)
        return list(found.values())

    def lowest(self, places, stream, count=None):
        return sorted(places, key=lambda i: (self.draw(stream, i), i))[:count]

    def take(self, ordered, budget, cut=False):
        """Tokens of units in order, up to a budget; the crossing one by a draw."""
        found = []
        for unit in ordered:
            left = budget - len(found)
            if len(unit) <= left:
                found += unit
                continue
            if cut:
                found += unit[:left]
            elif left > 0 and self.draw(masks.STREAM_WORD, unit[0]) * len(unit) < left:
                found += unit
            break
        return found


def plain_whole_words(plain):
    for words, budget, low, high, rate in plain.windows():
        shift = plain.draw(masks.STREAM_WINDOW, words[0][0])

        def masked(j, rate=rate, shift=shift):
            return math.floor(rate * (j + 1) + shift) > math.floor(rate * j + shift)

        longer = sorted((word for word in words if len(word) > 1), key=lambda word: (
            -len(word), plain.draw(masks.STREAM_ORDER, word[0]), word[0]))
        chosen = [word for j, word in enumerate(longer) if masked(j)]
        yield from (i for word in chosen for i in word)
        singles = [word[0] for word in words if len(word) == 1]
        least = most = 0
        for j, word in enumerate(longer):
            step = len(word) - (len(longer[j + 1]) if j + 1 < len(longer) else 0)
            least += step * math.floor(rate * (j + 1))
            most += step * math.ceil(rate * (j + 1))
        if most <= low and high - least <= len(singles):
            count = budget - sum(map(len, chosen))
        else:
            count = sum(masked(len(longer) + j) for j in range(len(singles)))
        yield from plain.lowest(singles, masks.STREAM_CHOICE, count)


def plain_spans(plain):
    edges = np.cumsum(drawn.SPAN_SHARES)
    for words, budget, _, _, rate in plain.windows():
        first = words[0][0]
        left = in_words = math.floor(rate * len(words) + plain.draw(masks.STREAM_WINDOW, first))
        items = []
        for word in words:
            if left > 0:
                drawn_at = plain.draw(masks.STREAM_LENGTH, word[0])
                length = 1 + sum(drawn_at >= edge for edge in edges[:-1])
                items.append((min(length, left), True))
                left -= items[-1][0]
            elif len(items) < len(words):
                items.append((1, False))
        spans = sum(masked for _, masked in items)
        items = items[: spans + len(words) - in_words]
        order = sorted(range(len(items)), key=lambda k: (
            plain.draw(masks.STREAM_ORDER, words[k][0]), words[k][0]))
        ring = [items[k][1] for k in order for _ in range(items[k][0])]
        assert len(ring) == len(words)
        offset = int(plain.draw(masks.STREAM_OFFSET, first) * len(words))
        masked = [ring[(k + offset) % len(words)] for k in range(len(words))]
        spread = rate * (1 - rate) * sum(len(word) ** 2 for word in words if len(word) > 1)
        enough = min(rate, 1 - rate) * sum(len(word) == 1 for word in words)
        if sum(map(len, words)) >= 64 and enough * enough >= 1.5**2 * spread:
            excess = sum(len(word) for word, m in zip(words, masked, strict=True) if m) - budget
            pool = {word[0]: k for k, word in enumerate(words)
                    if len(word) == 1 and masked[k] == (excess > 0)}
            for i in plain.lowest(pool, masks.STREAM_CHOICE, abs(excess)):
                masked[pool[i]] = not masked[pool[i]]
        yield from (i for word, m in zip(words, masked, strict=True) if m for i in word)


def plain_scored(key, allowed=lambda score: score > -math.inf, budget=Plain.count):
    """The twin of a rule of scores.

    key: of a unit in its sequence, lowest first; allowed: of a score; budget: of a sequence.
    """
    def choose(plain):
        for b, units in enumerate(plain.units):
            units = [unit for unit in units if allowed(plain.score(unit))]
            by_score = sorted(units, key=lambda unit: (
                plain.score(unit), plain.draw(masks.STREAM_TIES, unit[0]), unit[0]))
            keys = {unit[0]: key(plain, unit, by_score) for unit in units}
            yield from plain.take(sorted(units, key=lambda u: (*keys[u[0]], u[0])),
                                  budget(plain, b))
    return choose


def best_first(plain, unit, _):
    return -plain.score(unit), plain.draw(masks.STREAM_TIES, unit[0])


def above_0_first(plain, unit, _):
    return -max(plain.score(unit), 0), plain.draw(masks.STREAM_TIES, unit[0])


def drawn_by_score(plain, unit, _):
    u = plain.draw(masks.STREAM_SAMPLED, unit[0]) + 2.0**-25
    value = plain.score(unit) / plain.batch.temperature - np.log(-np.log(u))
    return (-value,) if value < math.inf else (-1e300 * (1 + u),)


def nearest(plain, unit, by_score):
    distance = abs(by_score.index(unit) + 0.5 - plain.batch.centre * len(by_score))
    return round(256 * distance), plain.draw(masks.STREAM_TIES, unit[0], shift=8)


def limit(plain, b):
    places = len(plain.places[b])
    return min(places, max(1, math.floor(plain.rates[b] * places)))


def plain_inverse(plain):
    for b, units in enumerate(plain.units):
        ordered = sorted(units, key=lambda unit: (
            plain.score(unit) if plain.score(unit) > -math.inf else math.inf,
            plain.score(unit) == -math.inf, plain.draw(masks.STREAM_INVERSE, unit[0]), unit[0]))
        yield from plain.take(ordered, int(plain.batch.matched_counts[b]), cut=True)


def plain_shuffled(plain):
    for document in np.unique(plain.batch.documents):
        own = np.flatnonzero(plain.batch.documents == document)
        places = [i for b in own for i in plain.places[b]]
        yield from plain.lowest(places, masks.STREAM_SHUFFLED,
                                plain.batch.matched_counts[own].sum())


def plain_frequency_matched(plain):
    """For batches of one part: the draw by weight, then exchanges one by one."""
    batch, bins = plain.batch, controls.frequency_bins(plain.batch)
    policy = set(batch.matched.tolist())
    mine = {b: places for b, places in enumerate(plain.places) if batch.matched_counts[b]}
    every = [i for places in mine.values() for i in places]
    aim, there = Counter(int(bins[i]) for i in policy), Counter(int(bins[i]) for i in every)

    def waits(i):
        u = plain.draw(masks.STREAM_FREQUENCY, i) + 2.0**-25
        return np.float32(-np.log(u) / ((aim[bins[i]] + 0.5) / (there[bins[i]] + 1)))

    chosen = {b: set(sorted(places, key=lambda i: (waits(i), i))[: batch.matched_counts[b]])
              for b, places in mine.items()}
    surplus = Counter(int(bins[i]) for own in chosen.values() for i in own)
    surplus.subtract(aim)

    def exchange(b, out, new):
        for i in out:
            chosen[b].remove(i)
            surplus[bins[i]] -= 1
        for i in new:
            chosen[b].add(i)
            surplus[bins[i]] += 1

    def pools(b):
        return ([i for i in mine[b] if i in chosen[b] and surplus[bins[i]] > 0],
                [i for i in mine[b] if i not in chosen[b] and surplus[bins[i]] < 0])

    def by_draw(some):
        return sorted(some, key=lambda b: (plain.draw(masks.STREAM_EXCHANGE, mine[b][0]), b))

    while able := [b for b in mine if all(pools(b))]:
        for b in by_draw(able):
            if all(both := pools(b)):
                exchange(b, *(plain.lowest(pool, masks.STREAM_EXCHANGE, 1) for pool in both))
    while any(surplus.values()):
        step = {(bins[i], bins[j]): b for b in reversed(by_draw(mine))
                for i in chosen[b] for j in mine[b] if j not in chosen[b]}
        ways = [[k] for k in sorted(surplus) if surplus[k] > 0]
        seen = {way[0] for way in ways}
        for way in ways:  # breadth first
            if surplus[way[-1]] < 0:
                break
            for there in sorted({c for b, c in step if b == way[-1]} - seen):
                seen.add(there)
                ways.append([*way, there])
        for out, new in zip(way, way[1:], strict=False):
            # A step may have opened another one to an earlier sequence.
            b = next(b for b in by_draw(mine) if any(bins[i] == out for i in chosen[b])
                     and any(bins[j] == new for j in mine[b] if j not in chosen[b]))
            exchange(b, *(plain.lowest([i for i in mine[b] if bins[i] == k
                                        and (i in chosen[b]) == (k == out)],
                                       masks.STREAM_EXCHANGE, 1) for k in (out, new)))
    return [i for own in chosen.values() for i in own]


TWINS = {
    "random": lambda plain: [i for b, places in enumerate(plain.places) for i in plain.lowest(
        places, masks.STREAM_CHOICE, plain.count(b))],
    "whole_word": plain_whole_words,
    "span": plain_spans,
    "selective": plain_scored(best_first, lambda score: score > 0, limit),
    "selective_fill": plain_scored(above_0_first),
    "top": plain_scored(best_first),
    "sampled": plain_scored(drawn_by_score),
    "band": plain_scored(nearest),
    "random_matched": lambda plain: [i for b, places in enumerate(plain.places)
                                     for i in plain.lowest(places, masks.STREAM_MATCHED,
                                                           plain.batch.matched_counts[b])],
    "frequency_matched": plain_frequency_matched,
    "inverse": plain_inverse,
    "shuffled": plain_shuffled,
}
TWINS["typemean"] = TWINS["selective"]  # the policy of the batches here


@st.composite
def batches(draw):
    longest = draw(st.sampled_from([12, 12, 150]))
    lengths = draw(st.lists(st.integers(0, longest), max_size=6))
    num_tokens = sum(lengths)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    candidates = rng.random(num_tokens) < draw(st.sampled_from([0.3, 0.9, 1.0]))
    offsets = np.cumsum([0, *lengths])
    numbers = np.cumsum(rng.random(len(lengths)) < 0.5)
    units = draw(st.sampled_from([0.0, 0.3, 0.7]))
    return Sequences(
        offsets=offsets,
        positions=np.arange(num_tokens) + draw(st.integers(0, 10**12)),
        candidates=candidates,
        rate=draw(st.sampled_from([0.05, 0.15, 0.3, 0.5, 0.99, 1.0])),
        seed=draw(st.integers(-5, 2**64 - 1)),
        epoch=draw(st.integers(0, 100)),
        scores=rng.choice([-math.inf, -2.0, -0.0, 0.0, 0.5, 1.0, 1.0, 3.0, math.inf],
                          num_tokens).astype(np.float16),
        continues_word=rng.random(num_tokens) < units,
        windows=draw(st.sampled_from([None, numbers])),
        documents=numbers,
        octaves=rng.integers(0, 4, num_tokens).astype(np.uint8),
        centre=draw(st.sampled_from([0.0, 0.25, 0.5, 0.6, 1.0])),
        temperature=draw(st.sampled_from([0.1, 1.0, 5.0])),
        policy=STRATEGIES[masks.MATCHED].choose,
        **matches(offsets, candidates & (rng.random(num_tokens) < 0.2)),
    )


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=60, deadline=None)
@given(batch=batches(), units=st.booleans())
def test_strategy_equals_its_plain_twin(name, batch, units):
    batch = with_units(name, batch, units)
    assert STRATEGIES[name].choose(batch).tolist() == twin(name, batch)


# ---------------------------------------------------------------------------------- randomness


def test_counter_uniform_equals_splitmix64_by_hand():
    assert draws._mix(0) == 0xE220A8397B1DCDAF  # the published first number of seed 0
    start = draws._mix(draws._mix(draws._mix(11) ^ 2) ^ 3)
    positions = np.array([[0, 1], [7, 2**40]])
    expected = [
        # `_mix` adds the increment itself: number p of the generator that starts at `start`
        (draws._mix((start + p * 0x9E3779B97F4A7C15) % 2**64) >> 40) / 2**24
        for p in positions.ravel().tolist()
    ]
    drawn = counter_uniform(11, 2, positions, 3)
    assert drawn.dtype == np.float32 and drawn.shape == (2, 2)
    assert drawn.ravel().tolist() == expected


def test_counter_uniform_is_uniform_below_one():
    drawn = counter_uniform(0, 0, np.arange(400_000), 0)
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = np.histogram(drawn, bins=100, range=(0, 1))[0]
    chi_square = ((counts - 4_000) ** 2 / 4_000).sum()
    assert 50 < chi_square < 160  # 99 degrees of freedom: mean 99, sd 14
    assert np.float32(0xFFFFFF) * np.float32(2.0**-24) < 1  # the largest there is


def test_streams_seeds_epochs_and_neighbours_are_independent():
    positions = np.arange(100_000)
    base = counter_uniform(0, 0, positions, 0)
    others = [
        counter_uniform(0, 0, positions, 1),
        counter_uniform(0, 1, positions, 0),
        counter_uniform(1, 0, positions, 0),
        counter_uniform(1, 1, positions, 0),
        counter_uniform(0, 0, positions + 1, 0),
    ]
    for other in others:
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.015  # one sd is 0.003
    assert (others[1] != others[2]).any()


def test_streams_have_different_numbers():
    streams = [value for key, value in vars(masks).items() if key.startswith("STREAM_")]
    assert len(streams) == len(set(streams)) >= 7


# ------------------------------------------------------------------- candidates and corruption


def test_find_candidates_by_hand():
    tokens = np.array([0, 1, 2, 3, 65535, 4], dtype=np.uint16)
    assert find_candidates(tokens, SPECIAL).tolist() == [False, True, True, False, True, False]
    assert find_candidates(tokens[:0], SPECIAL).shape == (0,)


def corrupt_here(original, positions=None, **changes):
    options = {"seed": 1, "epoch": 0, "mask_id": 4, "vocab_size": 500, "all_special_ids": SPECIAL}
    if positions is None:
        positions = np.arange(len(original))
    return corrupt(original, positions, **{**options, **changes})


def test_corruption_is_80_10_10():
    original = np.full(100_000, 9, dtype=np.uint16)
    new = corrupt_here(original)
    assert new.dtype == np.uint16
    shares = [(new == 4).mean(), ((new != 4) & (new != 9)).mean(), (new == 9).mean()]
    # one sd is 0.0013 and 0.0009; a random id is the original once in 497 times
    assert np.abs(np.array(shares) - [0.8, 0.1, 0.1]).max() < 0.005
    assert (original == 9).all()


def test_random_replacement_is_uniform_and_never_special():
    original = np.full(500_000, 9, dtype=np.int64)
    new = corrupt_here(original, vocab_size=12)
    randomised = new[(new != 4) & (new != 9)]
    counts = np.bincount(randomised, minlength=12)
    assert counts[list(SPECIAL)].tolist() == [0, 0, 0]
    ordinary = counts[[1, 2, 5, 6, 7, 8, 10, 11]]
    expected = 500_000 * 0.1 / 9  # 9 ordinary ids, one of them the original
    assert np.abs(ordinary - expected).max() < 0.06 * expected  # one sd is 1.3 %
    assert len(counts) == 12


def test_every_ordinary_id_can_come_however_the_special_ones_lie():
    for special in [(), (0,), (4,), (3, 4), (0, 1, 2), (2, 4, 2), (0, 2, 4, 9)]:
        new = corrupt_here(
            np.full(2_000, 77), all_special_ids=special, vocab_size=5, mask_id=88
        )
        assert set(new.tolist()) == ({0, 1, 2, 3, 4} - set(special)) | {77, 88}


def test_corruption_is_redrawn_each_epoch_and_belongs_to_the_position():
    original = np.arange(5, 405)
    positions = np.arange(400) * 3
    whole = corrupt_here(original, positions)
    parts = [corrupt_here(original[s], positions[s]) for s in (slice(0, 7), slice(7, 400))]
    assert np.concatenate(parts).tolist() == whole.tolist()
    assert corrupt_here(original, positions, epoch=1).tolist() != whole.tolist()
    assert corrupt_here(original, positions, seed=2).tolist() != whole.tolist()
    assert corrupt_here(original[:0]).shape == (0,)


# --------------------------------------------------------------------------------------- words

TEXTS = [
    "Don't you think they've said it's hers? We'll see; I'm sure he'd know.",
    "In 1999, 3,000.50 dollars (or $5.00) bought 12ab of abc123 at 100%!",
    "a well-known, state-of-the-art film... wasn't it? \"Yes!!\" x_y http://a.b/c?d=1",
    "caf\u00e9 na\u00efve \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u2014 \u201cquoted\u201d "
    "\u00a35 \U0001f600",
    "unbelievable antidisestablishmentarianism internationalisation",
    "two  spaces and\ta tab",
]


def train_tokenizer(kind: str):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    names |= {"sep_token": "[SEP]", "mask_token": "[MASK]"}
    if kind == "wordpiece":
        inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        inner.normalizer = normalizers.BertNormalizer()
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=170, special_tokens=special, show_progress=False
        )
    else:
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    inner.train_from_iterator(TEXTS[:3] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def compare_words(tokenizer, texts):
    """Tokens on which `find_continuations` and the tokenizer's own word ids disagree; tokens."""
    flat, truth, offsets = [], [], [0]
    for text in texts:
        encoded = tokenizer(text, add_special_tokens=False)
        words = encoded.word_ids()
        flat += encoded["input_ids"]
        truth += [i > 0 and words[i] == words[i - 1] for i in range(len(words))]
        offsets.append(len(flat))
    table = continuation_table(tokenizer)
    found = find_continuations(np.array(flat, dtype=np.uint16), np.array(offsets), table)
    assert not found[[o for o in offsets[:-1] if o < len(found)]].any()
    assert any(truth) and not all(truth)
    return int((found != np.array(truth)).sum()), len(flat)


@pytest.mark.parametrize(("kind", "texts", "wrong_share"), [
    ("wordpiece", [*TEXTS, "", *TEXTS], 0),
    ("bpe", [*TEXTS[:3], "", TEXTS[4]], 0),
    # This vocabulary spells every character outside ASCII in bytes: the hardest case.
    ("bpe", TEXTS, 0.03),
])
def test_words_are_those_of_the_tokenizer(kind, texts, wrong_share):
    wrong, num_tokens = compare_words(train_tokenizer(kind), texts)
    assert wrong <= wrong_share * num_tokens and num_tokens > 120


def test_an_added_token_is_a_word_of_its_own():
    for kind in ("bpe", "wordpiece"):
        tokenizer = train_tokenizer(kind)
        tokenizer.add_tokens(["film"])
        wrong, _ = compare_words(tokenizer, ["afilmb unfilmable films film!"])
        assert wrong == 0


def test_words_of_other_tokenizers_are_refused():
    from tokenizers import Tokenizer, models

    with pytest.raises(ConfigError, match="Unigram"):
        continuation_table(Tokenizer(models.Unigram()))


def test_importing_masks_is_light():
    code = "import preprocess.masking, sys; sys.exit(int('torch' in sys.modules))"
    root = Path(masks.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
