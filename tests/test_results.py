"""Means, paired intervals and the naive Bayes floor of `train/results.py`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from preprocess.errors import DataError
from train import results


def write_run(
    path: Path, correct: np.ndarray, *, seeds=None, items=None, cost: dict | None = None
) -> Path:
    """A fine-tuning directory whose answers are right where `correct` (S, N) says so."""
    seeds = seeds or list(range(13, 13 + len(correct)))
    items = items or [f"item{n}" for n in range(correct.shape[1])]
    path.mkdir(parents=True)
    with open(path / "results.jsonl", "w") as file:
        for seed, right in zip(seeds, correct, strict=True):
            row = {"seed": seed, "task": "mr", "test_accuracy": float(right.mean()),
                   "test_macro_f1": 0.5, "pretraining": cost or {}}
            file.write(json.dumps(row) + "\n")
            (path / f"seed_{seed}").mkdir()
            with open(path / f"seed_{seed}" / "predictions.jsonl", "w") as predictions:
                for item, ok in zip(items, right, strict=True):
                    answer = {"item": item, "label": 1, "prediction": int(ok)}
                    predictions.write(json.dumps(answer) + "\n")
    return path


def bootstrap_sd(delta: np.ndarray) -> float:
    """Standard deviation that the interval of a difference stands for."""
    _, low, high = results.paired_interval(
        delta, np.zeros_like(delta), confidence=0.6827, num_resamples=4000
    )
    return (high - low) / 2


def test_interval_of_items_alone_is_the_standard_error_of_a_mean():
    delta = np.random.default_rng(1).normal(0.3, 2.0, size=(1, 1, 400))
    expected = delta.std(ddof=1) / math.sqrt(400)
    assert bootstrap_sd(delta) == pytest.approx(expected, rel=0.06)


def test_interval_of_seeds_alone_is_unbiased_for_few_seeds():
    # Every item of a seed differs by the same amount: only seeds vary. Three draws of three
    # would give an sd sqrt(2/3) times too small.
    by_seed = np.random.default_rng(2).normal(size=5)
    delta = np.broadcast_to(by_seed[None, :, None], (1, 5, 50))
    assert bootstrap_sd(delta) == pytest.approx(by_seed.std(ddof=1) / math.sqrt(5), rel=0.1)


def test_interval_of_pretraining_seeds_alone():
    by_pretraining = np.random.default_rng(3).normal(size=8)
    delta = np.broadcast_to(by_pretraining[:, None, None], (8, 3, 20))
    expected = by_pretraining.std(ddof=1) / math.sqrt(8)
    assert bootstrap_sd(delta) == pytest.approx(expected, rel=0.08)


def test_interval_is_paired():
    # Two arms that are right about nearly the same hard half of the items: the pairing must
    # remove the large variance that items have in common.
    generator = np.random.default_rng(4)
    first = np.broadcast_to(generator.random((1, 1, 500)) < 0.5, (1, 3, 500))
    second = first.copy()
    second[0, :, :5] = ~second[0, :, :5]
    _, low, high = results.paired_interval(first, second)
    assert high - low < 0.04
    assert results.paired_interval(first, first) == (0.0, 0.0, 0.0)


def test_interval_covers_the_difference_at_its_rate():
    # Independent items, one seed: the plain case, where a 95 % interval must cover 95 %.
    generator = np.random.default_rng(5)
    hits = 0
    for trial in range(200):
        first = generator.random((1, 1, 150)) < 0.8
        second = generator.random((1, 1, 150)) < 0.7
        _, low, high = results.paired_interval(first, second, num_resamples=400, seed=trial)
        hits += low <= 0.1 <= high
    assert 0.90 <= hits / 200 <= 0.99


def test_interval_sign_seed_and_refusals():
    first, second = np.ones((1, 2, 9)), np.zeros((1, 2, 9))
    assert results.paired_interval(first, second) == (1.0, 1.0, 1.0)
    delta = np.random.default_rng(6).normal(size=(2, 3, 30))
    zero = np.zeros_like(delta)
    assert results.paired_interval(delta, zero) == results.paired_interval(delta, zero)
    forward, low, high = results.paired_interval(delta, zero)
    back, back_low, back_high = results.paired_interval(zero, delta)
    assert (back, back_low, back_high) == pytest.approx((-forward, -high, -low))
    with pytest.raises(ValueError, match="one shape"):
        results.paired_interval(first, second[:, :, :8])


def test_mean_and_sd():
    assert results.mean_and_sd([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, 1.5275252))
    mean, sd = results.mean_and_sd([0.5])
    assert mean == 0.5 and math.isnan(sd)


def test_naive_bayes_equals_scikit_learn():
    text = pytest.importorskip("sklearn.feature_extraction.text")
    bayes = pytest.importorskip("sklearn.naive_bayes")
    generator = np.random.default_rng(7)
    words = ["good", "bad", "film", "It's", "don't", "plot", "x"]

    def draw(count: int) -> list[str]:
        return [" ".join(generator.choice(words, size=generator.integers(0, 9))) for _ in
                range(count)]

    train, test = draw(60), [*draw(40), "unseen words only", ""]
    labels = generator.integers(0, 3, size=60).tolist()
    vectoriser = text.CountVectorizer(analyzer=results.split_words)
    model = bayes.MultinomialNB(alpha=0.7).fit(vectoriser.fit_transform(train), labels)
    ours = results.naive_bayes_probabilities(train, labels, test, num_labels=3, smoothing=0.7)
    np.testing.assert_allclose(
        ours, model.predict_proba(vectoriser.transform(test)), rtol=1e-9, atol=1e-12
    )


def test_naive_bayes_floor_is_read_like_any_run(tmp_path):
    corpus = pytest.importorskip("preprocess.corpus")
    pairs = [("good film", 1), ("bad film", 0), ("good good", 1), ("bad", 0)]
    examples = [
        corpus.Example(text=text, label=label, item=f"{number}")
        for number, (text, label) in enumerate(pairs)
    ]
    task = corpus.Task(
        name="custom", labels=("no", "yes"),
        splits={"train": examples, "validation": examples, "test": examples[:3]},
    )
    results.write_naive_bayes(task, tmp_path / "naive_bayes")
    run = results.read_finetune_run(tmp_path / "naive_bayes")
    assert run.seeds == [0] and run.items == ("0", "1", "2") and run.task == "custom"
    assert run.correct.all() and run.rows[0]["test_accuracy"] == 1.0


def test_run_with_its_cost_is_read(tmp_path):
    correct = np.array([[1, 0, 1], [1, 1, 1]], dtype=bool)
    cost = {"masked_tokens": 5300, "steps": 120, "seconds": 3.5}
    run = results.read_finetune_run(write_run(tmp_path / "run", correct, cost=cost))
    assert run.seeds == [13, 14] and run.items == ("item0", "item1", "item2")
    np.testing.assert_array_equal(run.correct, correct)
    first, second = results.table_rows([results.Arm("selective", [run])])
    assert first == {
        "arm": "selective", "task": "mr", "metric": "accuracy", "mean": "0.8333", "sd": "0.2357",
        "seeds": 2, "masked_tokens": 5300, "steps": 120, "seconds": 4,
    }
    assert second["metric"] == "macro_f1" and tuple(second) == results.TABLE_COLUMNS


def test_differences_with_several_pretraining_seeds(tmp_path):
    generator = np.random.default_rng(8)
    none = results.Arm("none", [results.read_finetune_run(
        write_run(tmp_path / "none", generator.random((3, 40)) < 0.6))])
    selective = results.Arm("selective", [
        results.read_finetune_run(write_run(tmp_path / f"s{p}", generator.random((3, 40)) < 0.8))
        for p in range(2)
    ])
    ((row,), notes) = results.difference_rows([(selective, none)])
    assert notes == [] and tuple(row) == results.DIFFERENCE_COLUMNS
    expected = selective.correct().mean() - none.correct().mean()
    assert row["difference"] == f"{expected:+.4f}"
    assert row["seeds"] == 6 and row["items"] == 40
    assert float(row["low"]) < expected < float(row["high"])


def test_arms_that_cannot_be_compared_are_named(tmp_path):
    correct = np.ones((2, 4), dtype=bool)

    def arm(name: str, correct=correct, **options) -> results.Arm:
        run = results.read_finetune_run(write_run(tmp_path / name, correct, **options))
        return results.Arm(name, [run])

    base = arm("base")
    other_items = arm("other_items", items=["a", "b", "c", "d"])
    other_seeds = arm("other_seeds", seeds=[1, 2])
    without = arm("without")
    (tmp_path / "without" / "seed_13" / "predictions.jsonl").unlink()
    without = results.Arm("without", [results.read_finetune_run(tmp_path / "without")])
    rows, notes = results.difference_rows(
        [(base, other_items), (base, other_seeds), (base, without), (base, base)]
    )
    assert len(rows) == 1
    assert [note.split(" are not compared: ")[1] for note in notes] == [
        "they were tested on different items.",
        "they have different fine-tuning seeds.",
        "predictions.jsonl of some seed is missing, or their runs have different seeds.",
    ]


def test_broken_runs_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no finished seed"):
        results.read_finetune_run(tmp_path / "empty")
    run = write_run(tmp_path / "run", np.ones((2, 2), dtype=bool))
    (run / "seed_14" / "predictions.jsonl").write_text(
        '{"item": "other", "label": 0, "prediction": 0}\n')
    with pytest.raises(DataError, match="other test items"):
        results.read_finetune_run(run)
    (run / "results.jsonl").write_text('{"seed": 13}\n{"seed"')
    with pytest.raises(DataError, match="line 2"):
        results.read_finetune_run(run)


def test_format_table_aligns_numbers_to_the_right():
    rows = [{"arm": "none", "mean": "0.5"}, {"arm": "selective", "mean": "12.25"}]
    assert results.format_table(rows, ("arm", "mean")).split("\n") == [
        "arm         mean",
        "---------  -----",
        "none         0.5",
        "selective  12.25",
    ]
