"""Importance: the buffer heuristic against a one-at-a-time twin, and annotation of real texts."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train import annotate
from train.annotate import CRITERIA, MEASURES, find_important


def brute_force(confidence_of, sequence, full, delta, criterion):
    """METHOD in its plainest form: one sequence, one buffer, one token at a time."""

    def close(buffer):
        part = confidence_of(tuple(buffer))
        return abs(full - part) < delta if criterion == "absolute" else full - part < delta

    marks = [False] * len(sequence)
    if criterion == "strict" and len(sequence) and close([]):
        return marks
    buffer = []
    for position, token in enumerate(sequence):
        buffer.append(token)
        if close(buffer):
            marks[position] = True
            buffer.pop()
    return marks


def hashed(salt, owner, buffer, levels):
    """A table-driven confidence: any buffer has its own, drawn from few values to make ties."""
    key = repr((salt, owner, tuple(buffer))).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big") % levels / levels


@settings(max_examples=300, deadline=None)
@given(
    sequences=st.lists(st.lists(st.integers(0, 5), max_size=9), max_size=6),
    salt=st.integers(0, 2**32),
    levels=st.sampled_from([2, 3, 7, 50, 1000]),
    delta=st.sampled_from([0.01, 0.1, 0.25, 0.5]),
    criterion=st.sampled_from(sorted(CRITERIA)),
)
def test_equals_brute_force(sequences, salt, levels, delta, criterion):
    full = [hashed(salt, i, ("full", *s), levels) for i, s in enumerate(sequences)]
    calls = []

    def confidence(buffers, owners):
        calls.append(len(buffers))
        return [hashed(salt, o, b, levels) for b, o in zip(buffers, owners, strict=True)]

    found = find_important(confidence, sequences, full, delta, criterion)
    assert [marks.tolist() for marks in found] == [
        brute_force(lambda b, i=i: hashed(salt, i, b, levels), s, full[i], delta, criterion)
        for i, s in enumerate(sequences)
    ]
    longest = max(map(len, sequences), default=0)
    assert len(calls) <= longest + (criterion == "strict"), "one call a step"
    assert all(calls), "never asks about nothing"


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_equals_brute_force_on_thousands(criterion):
    rng = np.random.default_rng(7)
    sequences = [rng.integers(0, 4, rng.integers(0, 12)).tolist() for _ in range(3000)]
    full = rng.random(3000)

    def confidence(buffers, owners):
        return np.array([hashed(3, o, b, 20) for b, o in zip(buffers, owners, strict=True)])

    found = find_important(confidence, sequences, full, 0.1, criterion)
    for i, sequence in enumerate(sequences):
        def confidence_of(buffer, i=i):
            return hashed(3, i, buffer, 20)

        expected = brute_force(confidence_of, sequence, full[i], 0.1, criterion)
        assert found[i].tolist() == expected


def from_table(table):
    return lambda buffers, owners: [table[tuple(buffer)] for buffer in buffers]


def marks(table, sequence, full, delta, criterion):
    (found,) = find_important(from_table(table), [sequence], [full], delta, criterion)
    assert found.dtype == bool and found.shape == (len(sequence),)
    return found.tolist()


def test_important_token_leaves_the_buffer():
    # c is judged beside a alone: b was important and is gone.
    table = {(1,): 0.5, (1, 2): 0.9, (1, 3): 0.6}
    assert marks(table, [1, 2, 3], 0.9, 0.01, "signed") == [False, True, False]


def test_first_token_important_leaves_an_empty_buffer():
    table = {(1,): 0.9, (2,): 0.2, (2, 3): 0.895}
    assert marks(table, [1, 2, 3], 0.9, 0.01, "signed") == [True, False, True]


def test_criteria_differ_above_the_full_confidence():
    table = {(): 0.5, (1,): 0.99}
    assert marks(table, [1], 0.9, 0.01, "signed") == [True]
    assert marks(table, [1], 0.9, 0.01, "strict") == [True]
    assert marks(table, [1], 0.9, 0.01, "absolute") == [False]


def test_strict_gives_nothing_where_the_empty_buffer_is_close():
    table = {(): 0.95, (1,): 0.95, (2,): 0.95}
    assert marks(table, [1, 2], 0.95, 0.01, "signed") == [True, True]
    assert marks(table, [1, 2], 0.95, 0.01, "strict") == [False, False]


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_delta_is_exclusive(criterion):
    # Quarters are exact in binary: the difference is delta itself, or just less.
    assert marks({(): 0.0, (1,): 0.5}, [1], 0.75, 0.25, criterion) == [False]
    assert marks({(): 0.0, (1,): np.nextafter(0.5, 1)}, [1], 0.75, 0.25, criterion) == [True]


def test_b20_sequence_without_tokens():
    def never(buffers, owners):
        raise AssertionError("nothing to ask about")

    for criterion in CRITERIA:
        assert find_important(never, [], [], 0.01, criterion) == []
        (found,) = find_important(never, [[]], [0.9], 0.01, criterion)
        assert found.shape == (0,)
    found = find_important(from_table({(): 0.1, (4,): 0.9}), [[], [4], []], [0.5] * 3, 0.01)
    assert [f.tolist() for f in found] == [[], [True], []]


def test_owners_name_the_sequence():
    seen = []

    def confidence(buffers, owners):
        seen.append((buffers, owners))
        return [0.0] * len(buffers)

    find_important(confidence, [[1], [], [5, 6]], [0.9, 0.9, 0.9], 0.01)
    assert seen == [([[1], [5]], [0, 2]), ([[5, 6]], [2])]


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="signed, absolute, strict"):
        find_important(from_table({}), [[1]], [0.5], 0.01, "abs")
    with pytest.raises(ValueError, match="2 full confidences for 1 sequences"):
        find_important(from_table({}), [[1]], [0.5, 0.5], 0.01)


def test_buffer_heuristic_is_registered():
    assert MEASURES["buffer"] is find_important
    assert annotate.NOT_ANNOTATED == 255
