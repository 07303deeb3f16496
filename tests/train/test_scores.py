"""Metrics by scikit-learn: right on examples by hand, and 0 where it would warn."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from train.stages import scores


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_accuracy_and_macro_f1_of_three_classes_one_of_which_does_not_occur():
    labels, predictions = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    assert scores.accuracy(labels, predictions) == 0.75
    assert scores.macro_f1(labels, predictions, 3) == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)


def test_precision_recall_f1_by_hand_and_where_undefined():
    labels, none = np.array([True, True, False]), np.zeros(3, bool)
    found = scores.precision_recall_f1(labels, np.array([True, False, True]))
    assert found == (0.5, 0.5, 0.5)
    assert scores.precision_recall_f1(labels, none) == (0, 0, 0)
    assert scores.precision_recall_f1(none, labels) == (0, 0, 0)


def test_numbers_per_class_are_those_of_counting():
    generator = np.random.default_rng(0)
    labels, predictions = generator.integers(0, 3, (2, 50))
    predictions[predictions == 1] = 2  # class 1 is never called, and class 3 does not occur
    table = scores.confusion_matrix(labels, predictions, 4)
    assert table == [[int(((labels == i) & (predictions == j)).sum()) for j in range(4)]
                     for i in range(4)]
    found = scores.per_class(labels, predictions, 4)
    for i, one in enumerate(found):
        hits, there, called = (
            int(mask.sum()) for mask in ((labels == i) & (predictions == i), labels == i,
                                         predictions == i))
        assert one["support"] == there
        assert one["precision"] == pytest.approx(hits / called if called else 0)
        assert one["recall"] == pytest.approx(hits / there if there else 0)
        assert one["f1"] == pytest.approx(2 * hits / (there + called) if there + called else 0)
    assert np.mean([one["f1"] for one in found]) == pytest.approx(
        scores.macro_f1(labels, predictions, 4))


def test_average_precision_takes_ties_together():
    labels = np.array([True, False, True, False])
    # At 0.9: one of one. At 0.5: two of three, which both entries of the tie share.
    assert scores.average_precision(labels, np.array([0.9, 0.5, 0.5, 0.1])) == pytest.approx(
        0.5 * 1 + 0.5 * 2 / 3)
    assert scores.average_precision(np.zeros(4, bool), np.arange(4.0)) == 0


def test_best_threshold_is_the_highest_of_the_best():
    labels = np.array([True, False, True, False])
    assert scores.best_threshold(labels, np.array([0.9, 0.2, 0.8, 0.1])) == 0.8
    # F1 is 2/3 from 0.9 on (1 of 1, 1 of 2 found) and from 0.1 on (2 of 4, 2 of 2).
    assert scores.best_threshold(labels, np.array([0.9, 0.8, 0.1, 0.1])) == 0.9
    assert scores.best_threshold(np.zeros(4, bool), np.arange(4.0)) == 3
    assert scores.best_threshold(labels, np.full(4, 0.3)) == 0.3


def test_softmax_of_large_logits():
    found = scores.softmax(np.array([[1000.0, 1000.0], [0.0, np.log(3)]], np.float32))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, [[0.5, 0.5], [0.25, 0.75]], rtol=1e-6)
