"""Which tokens of the task's training texts matter to the task classifier: stage 2 begins here.

A sequence (a sentence; for aspect tasks a whole text with its aspect) is read from left to right.
A *buffer* holds the tokens seen so far that were not found important. The token that brings the
classifier's confidence in the right label to within `delta` of its confidence in the whole
sequence is important, and leaves the buffer again. Only sequences that the classifier gets right
say anything; the tokens of the others are marked 255, "not annotated", and so are tokens beyond
the length limit.

One forward pass a token would be slow one sequence at a time, so all sequences advance together:
step t asks for the confidence of every buffer that holds its t-th token, sorted by length.

    deepspeed train/annotate.py --task mr --data_dir D --model_name_or_path RC/seed_13/hf \
        --delta 0.01 --criterion signed --output A

writes the token store `A` (one document a text) and `A.importance.npy`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

NOT_IMPORTANT, IMPORTANT, NOT_ANNOTATED = 0, 1, 255

Confidence = Callable[[list[list[int]], list[int]], np.ndarray]


class Criterion(NamedTuple):
    """When a buffer counts as close to its whole sequence.

    `close(full, part, delta)` compares confidences, `(B,)` float64 each, and returns `(B,)` bool.
    With `test_empty`, a sequence whose empty buffer is close already has no important token: the
    label is explained by nothing at all, as it happens with a majority class.
    """

    close: Callable[[np.ndarray, np.ndarray, float], np.ndarray]
    test_empty: bool


def _close_signed(full: np.ndarray, part: np.ndarray, delta: float) -> np.ndarray:
    """Also close where the part is more confident than the whole."""
    return full - part < delta


def _close_absolute(full: np.ndarray, part: np.ndarray, delta: float) -> np.ndarray:
    return np.abs(full - part) < delta


CRITERIA: dict[str, Criterion] = {
    "signed": Criterion(_close_signed, test_empty=False),
    "absolute": Criterion(_close_absolute, test_empty=False),
    "strict": Criterion(_close_signed, test_empty=True),
}


def find_important(
    confidence: Confidence,
    sequences: Sequence[Sequence[int]],
    full_confidence: Sequence[float] | np.ndarray,
    delta: float,
    criterion: str = "signed",
) -> list[np.ndarray]:
    """Find the important tokens of each sequence by the buffer heuristic.

    At token t the buffer holds the unimportant tokens before t. If the buffer with token t is
    close to the whole sequence, token t is important and is taken out again; else it stays.
    Worked example, delta 0.01, full confidence 0.9, P of a buffer by its contents:
    `[a]` 0.5, stays; `[a b]` 0.9, so b is important; `[a c]` 0.6, stays. Result: `[F, T, F]`.

    Args:
        confidence: `confidence(buffers, owners)` returns P(right label) of each buffer, one float
            each; `owners[i]` is the index in `sequences` that buffer i came from. Called once a
            step with the buffers of all unfinished sequences. Under `strict` the first call asks
            for the empty buffers.
        sequences: token ids; may be empty, then the result is empty.
        full_confidence: P(right label) of the whole sequences, one float each.
        delta: largest difference in probability, exclusive.
        criterion: a name in `CRITERIA`.
    Returns:
        One array a sequence, as long as it, bool: True where the token is important.
    Raises:
        ValueError: unknown criterion, or not one full confidence a sequence.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion {criterion!r}: must be one of {', '.join(CRITERIA)}")
    full = np.asarray(full_confidence, dtype=np.float64).reshape(-1)
    if len(full) != len(sequences):
        raise ValueError(f"{len(full)} full confidences for {len(sequences)} sequences")
    close, test_empty = CRITERIA[criterion]
    important = [np.zeros(len(sequence), dtype=bool) for sequence in sequences]
    kept: list[list[int]] = [[] for _ in sequences]

    def ask(buffers: list[list[int]], owners: list[int]) -> np.ndarray:
        part = np.asarray(confidence(buffers, owners), dtype=np.float64).reshape(-1)
        assert len(part) == len(buffers), "one confidence a buffer"
        return close(full[owners], part, delta)

    active = [i for i, sequence in enumerate(sequences) if len(sequence)]
    if test_empty and active:
        empty_is_close = ask([[] for _ in active], list(active))
        active = [i for i, is_close in zip(active, empty_is_close, strict=True) if not is_close]
    step = 0
    while active:
        buffers = [[*kept[i], int(sequences[i][step])] for i in active]
        for i, is_close in zip(active, ask(buffers, list(active)), strict=True):
            if is_close:
                important[i][step] = True
            else:
                kept[i].append(int(sequences[i][step]))
        step += 1
        active = [i for i in active if len(sequences[i]) > step]
    return important


MEASURES: dict[str, Callable[..., list[np.ndarray]]] = {"buffer": find_important}
