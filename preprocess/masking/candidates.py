"""Steps 1 and 2 of masking: the candidates of a batch and the budget of each sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from preprocess.masking.draws import STREAM_BUDGET, counter_uniform

MAX_SEQUENCES = 1 << 24  # of a batch: their numbers take 24 bits of a sort key
ROUNDING_WINDOW = 4096  # tokens; with a single draw, rows of equal length could all round one way


@dataclass(frozen=True)
class Sequences:
    """A ragged batch: all that a strategy sees.

    offsets: start of each sequence in the flat arrays, and the end, `(B+1,)` int64, ascending.
    positions: token positions in the whole store, the key of every draw, `(T,)` int64; those of
        the candidates are unique.
    candidates: True where a token may be masked, `(T,)` bool.
    rate: share of a sequence's candidates to mask, in (0, 1].
    seed, epoch: integers; the epoch is 0 for masks that are stored once.
    scores: importance of each token, above 0 if important rather than not, `(T,)` float16.
    continues_word: True where a token continues the word of the token before, `(T,)` bool; from
        `find_continuations`.
    matched_counts: how many tokens of each sequence the matched index masks, `(B,)` int64.
    """

    offsets: np.ndarray
    positions: np.ndarray
    candidates: np.ndarray
    rate: float
    seed: int
    epoch: int
    scores: np.ndarray | None = None
    continues_word: np.ndarray | None = None
    matched_counts: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"the mask rate is {self.rate}; it must be in (0, 1]")
        num_tokens, num_sequences = len(self.candidates), len(self.offsets) - 1
        if num_sequences < 0 or self.offsets[0] != 0 or self.offsets[-1] != num_tokens:
            raise ValueError(f"offsets must run from 0 to the {num_tokens} tokens of the batch")
        if np.any(np.diff(self.offsets) < 0):
            raise ValueError("offsets must ascend")
        if num_sequences > MAX_SEQUENCES:
            raise ValueError(f"a batch holds at most {MAX_SEQUENCES} sequences; cut it")
        for name, length in (
            ("positions", num_tokens),
            ("scores", num_tokens),
            ("continues_word", num_tokens),
            ("matched_counts", num_sequences),
        ):
            array = getattr(self, name)
            if array is not None and array.shape != (length,):
                raise ValueError(f"{name} has shape {array.shape}; ({length},) is needed")


def find_candidates(tokens: np.ndarray, all_special_ids: Sequence[int]) -> np.ndarray:
    """Return which tokens may be masked: all but special ones ([UNK] is special).

    Args:
        tokens: token ids, `(T,)` uint16.
        all_special_ids: special ids of the tokenizer.
    Returns:
        True for candidates, `(T,)` bool.
    """
    return np.isin(tokens, np.asarray(all_special_ids, dtype=tokens.dtype), invert=True)


@dataclass(frozen=True)
class Candidates:
    """Candidates of a batch: flat index and sequence of each `(C,)`; count and first one `(B,)`."""

    index: np.ndarray
    sequence: np.ndarray
    counts: np.ndarray
    starts: np.ndarray


def list_candidates(sequences: Sequences) -> Candidates:
    # candidates 1 0 1 | 1 1 (offsets 0 3 5): index 0 2 3 4, before 0 1 1 2 3 4,
    # counts before[3]-before[0], before[5]-before[3] = 2 2, starts 0 2, sequence 0 0 1 1.
    before = np.zeros(len(sequences.candidates) + 1, dtype=np.int64)
    np.cumsum(sequences.candidates, out=before[1:])
    counts = before[sequences.offsets[1:]] - before[sequences.offsets[:-1]]
    return Candidates(
        index=np.flatnonzero(sequences.candidates),
        sequence=np.repeat(np.arange(len(counts)), counts),
        counts=counts,
        starts=before[sequences.offsets[:-1]],
    )


def draw_counts(sequences: Sequences, found: Candidates | None = None) -> np.ndarray:
    """Draw the number of tokens to mask in each sequence.

    Stochastic rounding: 22 candidates at 15 % are 3.3, so 3 with probability 0.7 and 4 with 0.3.
    Every sequence, however short, meets the rate in expectation. One number u is drawn per
    `ROUNDING_WINDOW` tokens of the store, and a sequence of n candidates at position p gets
    floor(rate (p + n) + u) - floor(rate p + u). Where one sequence is rounded up its neighbour is
    rounded down, so a run of neighbours is within a token or two of its rate, yet the count of a
    sequence depends only on its position and its candidates.

    Args:
        found: the result of `list_candidates`, if the caller has it.
    Returns:
        Counts, `(B,)` int64, at most the candidates of each sequence.
    """
    found = found or list_candidates(sequences)
    # The first candidate's position is the sequence's key: an inserted [CLS] has none of its own.
    filled = found.counts > 0
    first = sequences.positions[found.index[found.starts[filled]]]
    counts = np.zeros(len(found.counts), dtype=np.int64)
    windows = first // ROUNDING_WINDOW
    shift = counter_uniform(sequences.seed, sequences.epoch, windows, STREAM_BUDGET)
    before = sequences.rate * first + shift.astype(np.float64)
    after = before + sequences.rate * found.counts[filled]
    counts[filled] = np.floor(after) - np.floor(before)
    return np.minimum(counts, found.counts)


def selective_limit(num_candidates: np.ndarray, rate: float) -> np.ndarray:
    """Return the largest number of tokens to mask: floor(rate x candidates), at least one.

    Args:
        num_candidates: candidates of each sequence, `(B,)` int64.
        rate: share to mask, in (0, 1].
    Returns:
        Limits, `(B,)` int64, at most the candidates.
    """
    limit = np.floor(rate * num_candidates).astype(np.int64)
    return np.minimum(np.maximum(limit, 1), num_candidates)


def require(sequences: Sequences, name: str) -> np.ndarray:
    array = getattr(sequences, name)
    if array is None:
        raise ValueError(f"this masking strategy needs Sequences.{name}")
    return array
