"""Leakage: test texts in a corpus, by the rules as written, and the record beside a store."""

from __future__ import annotations

import numpy as np
import pytest

from preprocess.corpus import (
    LeakIndex,
    describe_leakage,
    read_leakage,
    split_words,
    write_leakage,
)
from preprocess.corpus.leakage import GRAM, MIN_CONTAINED
from preprocess.errors import DataError


def runs(words: list[str], size: int = GRAM) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def plain(texts: list[list[str]], documents: list[list[str]]) -> tuple[list, list, list, list]:
    """The same as `LeakIndex`, as the page defines it."""
    contained, half, shared = ([False] * len(texts) for _ in range(3))
    leaked = [False] * len(documents)
    for d, document in enumerate(documents):
        grams = runs(document)
        for t, text in enumerate(texts):
            if not text:
                continue
            inside = tuple(text) in runs(document, len(text)) and len(text) >= MIN_CONTAINED
            if inside or text == document:
                contained[t] = leaked[d] = True
            covered = set()
            for i in range(len(text) - GRAM + 1):
                if tuple(text[i : i + GRAM]) in grams:
                    shared[t] = True
                    covered.update(range(i, i + GRAM))
            if covered and 2 * len(covered) >= len(text):
                half[t] = leaked[d] = True
    return contained, half, shared, leaked


@pytest.mark.parametrize("seed", range(12))
def test_the_index_finds_what_the_definition_says(seed, monkeypatch):
    monkeypatch.setattr("preprocess.corpus.leakage.MAX_PAIRS", 7)
    random = np.random.default_rng(seed)
    words = list("abc" if seed % 2 else "abcdefghij")

    def draw(most: int) -> list[str]:
        return list(random.choice(words, random.integers(0, most)))

    documents = [draw(60) for _ in range(40)]
    texts = [draw(30) for _ in range(30)]
    for _ in range(30):  # parts of documents, some of them changed in the middle
        source = documents[random.integers(len(documents))]
        begin = int(random.integers(0, 1 + len(source)))
        text = source[begin : begin + int(random.integers(0, 30))]
        if len(text) > 3 and random.random() < 0.5:
            text[len(text) // 2] = "never"
        texts.append(text)
    index = LeakIndex(texts)
    leaked = np.concatenate([index.scan(documents[:15]), index.scan(documents[15:])])
    contained, half, shared, dropped = plain(texts, documents)
    assert index.contained.tolist() == contained and index.half.tolist() == half
    assert index.any.tolist() == shared and leaked.tolist() == dropped
    assert any(contained) and any(shared) and not all(dropped)
    index.forget()
    assert index.counts() == {
        "test_texts": 60, "equal_or_contained": 0, "half_covered": 0, "any_8gram": 0}


def test_the_worked_examples():
    assert split_words("It's great, truly!") == split_words("it 's great truly")
    assert split_words("\uff26ilm_\u2460 STRA\u00dfE") == ["film", "1", "strasse"]
    seven = split_words("One of the most moving films ever.")
    index = LeakIndex([seven])
    assert index.scan([split_words("I say: one of THE most moving films ever made"), ["ever"]]
                      ).tolist() == [True, False]
    assert index.counts()["equal_or_contained"] == 1 and index.counts()["any_8gram"] == 0
    phrase = "one of the best films of the year"  # eight words
    index = LeakIndex([split_words(f"{phrase} and I mean it , really , with all of my heart")])
    assert not index.scan([split_words(f"hardly {phrase}")]).any()
    assert index.counts() == {
        "test_texts": 1, "equal_or_contained": 0, "half_covered": 0, "any_8gram": 1}


def test_very_short_texts_are_found_only_alone():
    index = LeakIndex([["good"], ["a", "good", "film"], []])
    assert index.scan([["a", "good", "film", "too"], ["good"], []]).tolist() == [
        False, True, False]
    assert index.contained.tolist() == [True, False, False]


def test_unknown_words_alone_show_nothing():
    unknown, known = ["unk"], "one two three four five six seven".split()
    texts = [unknown * 2, unknown * 5, unknown * 20, [*known[:4], "unk"], [*known, *unknown * 9]]
    index = LeakIndex(texts, "unk")
    documents = [unknown * 2, unknown * 30, [*known[:4], "unk"], [*known, "unk", "unk"]]
    assert index.scan(documents).tolist() == [False, False, True, True]
    assert index.counts() == {
        "test_texts": 5, "equal_or_contained": 1, "half_covered": 1, "any_8gram": 1}


def test_half_of_the_words_must_come_from_one_document():
    text = [f"w{i}" for i in range(32)]
    index = LeakIndex([text])
    assert index.scan([text[:8], text[8:16], text[16:24]]).tolist() == [False] * 3
    assert index.any.all() and not index.half.any()
    assert index.scan([[*text[:8], "x", *text[24:]]]).tolist() == [True]
    assert index.half.all() and not index.contained.any()


def test_the_record_is_one_line_and_knows_its_store(tmp_path):
    prefix = str(tmp_path / "p")
    assert describe_leakage(prefix) == "" and read_leakage(prefix) is None
    index = LeakIndex([["a"] * 9])
    index.scan([["a"] * 9])
    record = {**index.counts(), "task": "mr", "test_digest": "0", "store": "aa",
              "documents_leaked": 1, "documents_dropped": 0}
    write_leakage(prefix, record)
    assert describe_leakage(prefix) == (
        "leakage: of 1 test texts of mr, the text holds 1 complete, 1 half covered by one "
        "document, 1 with any 8 words in order")
    (tmp_path / "p.json").write_text('{"fingerprint": "bb"}')
    with pytest.raises(DataError, match="made for the store aa.*--tokens .*p --overwrite"):
        describe_leakage(prefix)
    (tmp_path / "p.json").unlink()
    path = tmp_path / "p.leakage.json"
    path.write_text(path.read_text().replace('"test_texts": 1', '"test_texts": 2'))
    with pytest.raises(DataError, match="not what was written"):
        read_leakage(prefix)
