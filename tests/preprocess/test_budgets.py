"""Label budgets: which training examples are taken, and the test part of a task without one."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess.corpus import load_task
from preprocess.corpus.budgets import choose_budget, choose_validation
from preprocess.errors import ConfigError

CLASSES = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 3)), min_size=1,
                   max_size=40)


def one_by_one(items, labels, budget, seed):
    """The plain twin: each class has a queue, and the examples are given out one at a time."""
    queues = {}
    for label in set(labels):
        mine = [i for i in range(len(items)) if labels[i] == label]
        hashes = [hashlib.sha256(
            f"{seed} {items[i]} {sum(items[j] == items[i] for j in mine if j < i)}".encode()
        ).digest() for i in mine]
        queues[label] = sorted(zip(hashes, mine, strict=True))
    given = {label: [queue[0]] for label, queue in queues.items()}
    while sum(map(len, given.values())) < budget:
        waiting = {label: queue[len(given[label])] for label, queue in queues.items()
                   if len(given[label]) < len(queue)}
        claim = {label: Fraction(len(queues[label]), 2 * len(given[label]) + 1)
                 for label in waiting}
        best = [label for label in claim if claim[label] == max(claim.values())]
        label = min(best, key=lambda label: (waiting[label][0], label))
        given[label].append(waiting[label])
    return sorted(i for taken in given.values() for _, i in taken)


@given(CLASSES, st.integers(0, 5), st.data())
@settings(max_examples=150, deadline=None)
def test_the_choice_is_that_of_its_plain_twin(examples, seed, data):
    items, labels = zip(*examples, strict=True)
    budget = data.draw(st.integers(len(set(labels)), len(items)))
    assert choose_budget(items, labels, budget, seed) == one_by_one(items, labels, budget, seed)


@given(CLASSES, st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_a_budget_holds_every_class_and_every_smaller_budget(examples, seed):
    items, labels = zip(*examples, strict=True)
    before: set[int] = set()
    for budget in range(len(set(labels)), len(items) + 1):
        chosen = choose_budget(items, labels, budget, seed)
        assert len(chosen) == len(set(chosen)) == budget and before <= set(chosen)
        assert {labels[i] for i in chosen} == set(labels)
        before = set(chosen)


@pytest.mark.parametrize(("sizes", "budget", "expected"), [
    ((600, 400), 100, [60, 40]),
    ((600, 400), 11, [7, 4]),  # 6.6 and 4.4
    ((990, 10), 20, [19, 1]),  # 19.8 and 0.2
    ((6, 6, 2), 9, [4, 4, 1]),  # 3.86, 3.86, 1.29
    ((6, 6, 2), 12, [5, 5, 2]),  # 5.14, 5.14, 1.71
])
def test_a_budget_has_the_shares_of_all_examples(sizes, budget, expected):
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    items = [f"item {i}" for i in range(len(labels))]
    found = Counter(labels[i] for i in choose_budget(items, labels, budget, 1))
    assert [found[label] for label in range(len(sizes))] == expected


def test_the_choice_depends_on_the_seed_and_not_on_the_order():
    rng = random.Random(0)
    examples = [(f"{rng.randrange(30)}", rng.randrange(2)) for _ in range(60)]  # with copies
    choices = []
    for seed in range(300):
        items, labels = zip(*examples, strict=True)
        choices.append(choose_budget(items, labels, 15, seed))
        shuffled = rng.sample(examples, len(examples))
        items, labels = zip(*shuffled, strict=True)
        again = choose_budget(items, labels, 15, seed)
        assert Counter(shuffled[i] for i in again) == Counter(examples[i] for i in choices[-1])
    taken = Counter(i for choice in choices for i in choice)
    # 300 draws with probability 1/4: mean 75, standard deviation 7.5.
    assert min(taken[i] for i in range(60)) > 75 - 5 * 7.5
    assert max(taken.values()) < 75 + 5 * 7.5


@given(CLASSES)
@settings(max_examples=100, deadline=None)
def test_no_text_is_for_training_and_for_validation(examples):
    texts, labels = zip(*examples, strict=True)
    held = choose_validation(texts, labels)
    assert held == sorted(set(held))
    sides = {text: {i in held for i in range(len(texts)) if texts[i] == text} for text in texts}
    assert all(len(side) == 1 for side in sides.values())
    owners = {text: labels[texts.index(text)] for text in texts}
    for label in set(owners.values()):
        mine = [text for text in owners if owners[text] == label]
        assert {side for text in mine for side in sides[text]} == (
            {True, False} if len(mine) > 1 else {False})


def test_a_tenth_of_each_class_is_for_validation():
    sizes = (500, 94, 12, 2, 1)
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    texts = [f"text {i}" for i in range(len(labels))]
    held = Counter(labels[i] for i in choose_validation(texts, labels))
    assert held == {0: 50, 1: 9, 2: 1, 3: 1}
    order = random.Random(0).sample(range(len(labels)), len(labels))
    again = choose_validation([texts[i] for i in order], [labels[i] for i in order])
    assert {order[i] for i in again} == set(choose_validation(texts, labels))


@pytest.fixture()
def files(tmp_path) -> dict[str, str]:
    rows = [f"a text of number {i},{('good', 'bad', 'bad', 'none')[i % 4]}" for i in range(80)]
    (tmp_path / "train.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    (tmp_path / "test.csv").write_text("\n".join(["text,label", *rows[:8]]) + "\n")
    return {"train_file": str(tmp_path / "train.csv"), "test_file": str(tmp_path / "test.csv"),
            "validation_file": str(tmp_path / "test.csv")}


def test_a_budget_limits_the_training_split_alone(files):
    whole = load_task("custom", **files)
    task = load_task("custom", **files, label_budget=20)
    assert task.labels == whole.labels and len(task.splits["train"]) == 20
    assert Counter(example.label for example in task.splits["train"]) == {0: 10, 1: 5, 2: 5}
    assert [e for e in whole.splits["train"] if e in task.splits["train"]] == task.splits["train"]
    assert all(task.splits[name] == whole.splits[name] for name in ("validation", "test"))
    assert task == load_task("custom", **files, label_budget=20, label_seed=42)
    assert task != load_task("custom", **files, label_budget=20, label_seed=7)
    assert load_task("custom", **files, label_budget=80) == whole


def test_what_is_cut_for_validation_is_said(files, capsys):
    del files["validation_file"]
    task = load_task("custom", **files)
    assert Counter(e.label for e in task.splits["validation"]) == {0: 4, 1: 2, 2: 2}
    said = capsys.readouterr().out
    assert f"no --validation_file: 8 of the 80 examples of {files['train_file']} are for" in said
    load_task("custom", **files, validation_file=files["test_file"])
    assert "no --validation_file" not in capsys.readouterr().out


def test_a_class_without_a_validation_example_is_warned_of(files, tmp_path, capsys):
    (tmp_path / "few.csv").write_text("text,label\na text,good\nanother,bad\n")
    load_task("custom", **{**files, "validation_file": str(tmp_path / "few.csv")})
    assert "1 of 3 classes have no validation example: none" in capsys.readouterr().out


@pytest.mark.parametrize(("budget", "message"), [
    (81, "--label_budget 81: .* there are 80 training examples; give 3 to 80, or leave it out"),
    (2, "--label_budget 2: .* there are 3 classes, and each needs an example; give 3 to 80"),
])
def test_a_budget_that_cannot_be_had_is_refused_with_the_counts(files, budget, message):
    with pytest.raises(ConfigError, match=message) as refused:
        load_task("custom", **files, label_budget=budget)
    assert "\n" not in str(refused.value)


def test_the_share_of_the_test_part_is_that_of_a_task_without_one(tmp_path, files):
    rows = "".join(f"text {i},{i % 2},rotten_tomatoes\n" for i in range(2000))
    (tmp_path / "all.csv").write_text("text,label,source\n" + rows)
    where = str(tmp_path / "all.csv")
    default = load_task("mr", data_dir=where)
    assert default == load_task("mr", data_dir=where, test_fraction=0.1)
    fractions = {text: int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
                 for text in (f"text {i}" for i in range(2000))}
    for share in (0.1, 0.4):
        task = load_task("mr", data_dir=where, test_fraction=share)
        for text, fraction in fractions.items():
            part = ("test" if fraction >= 1 - share else
                    "validation" if fraction >= 1 - share - 0.1 else "train")
            assert any(e.text == text for e in task.splits[part]), text
        assert sum(map(len, task.splits.values())) == 2000
    for share in (0, 0.81, -1):
        with pytest.raises(ConfigError, match=f"--test_fraction {share}: must be above 0"):
            load_task("mr", data_dir=where, test_fraction=share)
    with pytest.raises(ConfigError, match="--test_fraction 0.2 is for --task mr, and"):
        load_task("custom", **files, test_fraction=0.2)
