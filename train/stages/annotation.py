"""What an annotation is: the marks of each token of a text, and those that are dropped again."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from preprocess.text.continuations import continuation_table, find_continuations
from preprocess.text.stop_words import is_punctuation, is_stop_word
from train.stages.importance import Values
from train.stages.queries import Query

NOT_IMPORTANT, IMPORTANT, NOT_ANNOTATED = 0, 1, 255


def find_stop_words(sequences: Sequence[np.ndarray], tokenizer: Any) -> list[np.ndarray]:
    """Mark the tokens of words that are stop words: one bool array per sequence."""
    lengths = [len(sequence) for sequence in sequences]
    offsets = np.cumsum([0, *lengths])
    tokens = np.concatenate([np.empty(0, np.int64), *sequences]).astype(np.int64)
    continues = find_continuations(tokens, offsets, continuation_table(tokenizer))
    starts = np.append(np.flatnonzero(~continues), len(tokens))
    is_stop = functools.cache(lambda word: is_stop_word(tokenizer.decode(list(word))))
    marks = np.zeros(len(tokens), dtype=bool)
    for start, end in itertools.pairwise(starts.tolist()):
        marks[start:end] = is_stop(tuple(tokens[start:end].tolist()))
    return np.split(marks, offsets[1:-1]) if lengths else []


def find_punctuation(sequences: Sequence[np.ndarray], tokenizer: Any) -> list[np.ndarray]:
    """Mark the tokens that are punctuation: one bool array per sequence."""
    is_sign = functools.cache(lambda token: is_punctuation(tokenizer.decode([token]).strip()))
    return [np.array([is_sign(token) for token in sequence.tolist()], dtype=bool)
            for sequence in sequences]


def drop(importance: list[list[np.ndarray]], marks: list[np.ndarray]) -> int:
    """Turn important tokens where `marks` (one array per sequence) into others; count them."""
    count = 0
    flat = [array for sequences in importance for array in sequences]
    for array, mark in zip(flat, marks, strict=True):
        hits = mark & (array == IMPORTANT)
        array[hits] = NOT_IMPORTANT
        count += int(hits.sum())
    return count


def unite(
    documents: list[list[np.ndarray]], queries: list[Query], found: Values
) -> list[list[np.ndarray]]:
    """Merge the answers of each text: a token is important if it is for any aspect.

    Returns:
        For each sequence of each document, `(n,)` uint8: `IMPORTANT`, `NOT_IMPORTANT`, or
        `NOT_ANNOTATED` where no right answer reaches.
    """
    importance = [
        [np.full(len(sequence), NOT_ANNOTATED, np.uint8) for sequence in sequences]
        for sequences in documents
    ]
    for query, marks in zip(queries, found, strict=True):
        if marks is not None:
            seen = importance[query.document][query.sequence][: len(marks)]
            seen[seen == NOT_ANNOTATED] = NOT_IMPORTANT
            seen[marks] = IMPORTANT
    return importance
