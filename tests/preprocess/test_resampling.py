"""Importance resampling: the worked example, plain twins, shares, duplicates."""

from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess.corpus import resampling
from preprocess.corpus.resampling import (
    BUCKETS,
    CANDIDATE,
    Best,
    count_buckets,
    digest_ids,
    gumbel,
    hash_grams,
    log_ratios,
    octaves_of,
    share_out,
    weigh,
)


def test_the_worked_example():
    """Unigrams in 3 buckets: target a a b, corpus a b b c."""
    target, raw = np.array([2, 1, 0]), np.array([1, 2, 1])
    ratios = log_ratios(target, raw, 0.0)
    assert ratios == pytest.approx([0.981, -0.405, -17.03], abs=5e-3)
    assert ratios[[0, 1]].sum() == pytest.approx(0.575, abs=1e-3)
    assert ratios[[0, 2]].sum() == pytest.approx(-16.05, abs=5e-3)
    smooth = log_ratios(target, raw, 1.0)
    assert smooth == pytest.approx([0.693, -0.405, -0.405], abs=1e-3)
    assert smooth[[0, 1]].sum() == pytest.approx(smooth[[0, 2]].sum()) == pytest.approx(
        0.288, abs=1e-3)


TEXTS = ["The film, a film!", "", "one", "The FILM: a film", "  caf\u00e9 _x_ 3.5 ", "a a a a"]


def test_words_and_pairs_are_counted_as_in_plain_python(monkeypatch):
    monkeypatch.setattr(resampling, "MAX_REMEMBERED", 3)
    buckets, owners, lengths = hash_grams(TEXTS)
    one = {}  # bucket of each n-gram, by the n-gram
    for number, text in enumerate(TEXTS):
        words = re.findall(r"\w+|[^\w\s]+", text.lower())
        assert lengths[number] == len(words)
        here = buckets[owners == number].tolist()
        grams = [*words, *zip(words[:-1], words[1:], strict=True)]
        assert len(here) == len(grams)
        for gram, bucket in zip(grams, here, strict=True):
            assert one.setdefault(gram, bucket) == bucket
    assert len(set(one.values())) >= len(one) - 1  # collisions are rare
    assert count_buckets(buckets).sum() == len(buckets) and buckets.max() < BUCKETS
    alone = [hash_grams([text])[0].tolist() for text in TEXTS]
    assert alone == [buckets[owners == i].tolist() for i in range(len(TEXTS))]


def test_the_weight_of_a_document_is_the_sum_over_its_bag():
    ratios = np.random.default_rng(0).normal(size=BUCKETS)
    digests = np.array([digest_ids(np.array([i], np.uint16), 1) for i in range(6)], np.uint64)
    keys, means, octaves = weigh(TEXTS, digests, ratios)
    for number, text in enumerate(TEXTS):
        buckets, _, lengths = hash_grams([text])
        total = math.fsum(ratios[b] for b in buckets)
        uniform = max(int(digests[number]) >> 11, 0.5) / 2**53
        assert keys[number] - total == pytest.approx(-math.log(-math.log(uniform)))
        assert means[number] == pytest.approx(total / max(1, len(buckets)))
        assert octaves[number] == int(math.log2(max(1, lengths[0])))


def test_noise_is_finite_and_has_the_deviation_of_gumbel():
    ends = np.array([0, 2**64 - 1], np.uint64)
    assert np.isfinite(gumbel(ends)).all()
    some = np.array([digest_ids(np.array([i], np.uint16), 7) for i in range(20000)], np.uint64)
    assert gumbel(some).std() == pytest.approx(math.pi / math.sqrt(6), rel=0.03)
    assert len(set(some.tolist())) == 20000
    assert digest_ids(np.array([1], np.uint16), 7) != digest_ids(np.array([1], np.uint16), 8)
    assert 0 <= digest_ids(np.array([1], np.uint16), 1 << 200) < 1 << 64


def test_octaves():
    assert octaves_of(np.array([0, 1, 2, 3, 4, 7, 8, 127, 128])).tolist() == [
        0, 0, 1, 1, 2, 2, 3, 6, 7]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 60), st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12)), min_size=1))
def test_shares_add_up_and_respect_the_limits(number, groups):
    weights, limits = map(np.array, zip(*groups, strict=True))
    given_to = share_out(number, weights, limits)
    assert given_to.sum() == min(number, limits.sum())
    assert (given_to >= 0).all() and (given_to <= limits).all()


def test_shares_are_proportional():
    assert share_out(10, np.array([60, 30, 10]), np.array([60, 30, 10])).tolist() == [6, 3, 1]
    assert share_out(10, np.array([8, 1, 1]), np.array([2, 50, 50])).tolist() == [2, 4, 4]


@pytest.mark.parametrize("number", [0, 1, 5, 40, 1000])
def test_the_best_are_those_of_a_sort_without_duplicates(number):
    random = np.random.default_rng(number)
    made = np.zeros(3000, CANDIDATE)
    made["document"] = np.arange(3000)
    made["digest"] = random.integers(0, 500, 3000)
    made["key"] = np.round(random.normal(size=500), 1)[made["digest"]]
    best = Best(number)
    for first in range(0, 3000, 70):
        best.add(made[first : first + 70])
    plain: dict[int, tuple] = {}
    for row in made.tolist():
        plain.setdefault(row[1], row)  # the first of equal ones
    want = sorted(plain.values(), key=lambda row: (-row[0], row[1]))[:number]
    assert best.take().tolist() == want == best.take().tolist()
    assert Counter(row[1] for row in want).most_common(1)[0][1] == 1 if want else True
