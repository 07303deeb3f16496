"""Which labelled examples a label budget takes, and which are cut off for validation.

They are chosen by hashes of their content, so that every command and every run sees the same ones.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence


def choose_budget(
    items: Sequence[str], labels: Sequence[int], budget: int, seed: int
) -> list[int]:
    """Choose `budget` examples, stratified by label, at random by a hash of seed and content.

    Every class gets one example. The others are given out one by one, each to the class with the
    largest n / (2 k + 1), where n is its size and k the examples that it has (Sainte-Lague). So a
    small budget is a part of every larger one of its seed. Largest remainders would not give that:
    with three classes and more, a larger budget can mean fewer examples of a class.

    Args:
        items: content hash of each example. Copies are examples like any other.
        labels: class of each example.
        budget: at least the number of classes, at most that of examples.
    Returns:
        Indices, ascending. Which contents they are does not depend on the order of the examples.
    """
    copies: Counter[tuple[str, int]] = Counter()
    keys = []
    for item, label in zip(items, labels, strict=True):
        number = copies[item, label]
        copies[item, label] += 1
        keys.append(hashlib.sha256(f"{seed} {item} {number}".encode()).digest())
    sizes = Counter(labels)
    taken: Counter[int] = Counter()
    turns = []
    for i in sorted(range(len(keys)), key=lambda i: (keys[i], labels[i])):
        before = taken[labels[i]]
        taken[labels[i]] += 1
        turn = (2 * before + 1) / sizes[labels[i]] if before else 0.0
        turns.append((turn, keys[i], labels[i], i))
    return sorted(i for *_, i in sorted(turns)[:budget])


def content_fraction(text: str) -> float:
    """Return a number in [0, 1) that depends only on the text; equal texts stay together."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2.0**48


def choose_validation(texts: Sequence[str], labels: Sequence[int]) -> list[int]:
    """Choose a tenth of each class for validation, by content; no text is on both sides.

    A text counts to the class of its first example, and those with the smallest `content_fraction`
    are taken. A class of two texts and more has one on each side.

    Returns:
        Indices, ascending.
    """
    copies: Counter[str] = Counter(texts)
    of_class: dict[int, list[str]] = {}
    seen: set[str] = set()
    for text, label in zip(texts, labels, strict=True):
        if text not in seen:
            seen.add(text)
            of_class.setdefault(label, []).append(text)
    chosen: set[str] = set()
    for mine in of_class.values():
        wanted, taken = sum(copies[text] for text in mine) / 10, 0
        for text in sorted(mine, key=content_fraction)[:-1]:
            if taken and taken + copies[text] / 2 > wanted:
                break
            chosen.add(text)
            taken += copies[text]
    return [i for i, text in enumerate(texts) if text in chosen]
