"""Steps 1 and 2 of masking: the candidates of a batch and the budget of each sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    rate: share of a sequence's candidates to mask, in (0, 1]; one number, or one for each sequence,
        `(B,)`, equal within a window.
    seed, epoch: integers; the epoch is 0 for masks that are stored once.
    scores: importance of each token, larger is more important, minus infinity is never masked,
        `(T,)` float16.
    continues_word: True where a token continues the unit of the token before, `(T,)` bool. A unit
        is a word (`find_continuations`), or what the user named instead.
    matched_counts: how many tokens of each sequence the matched index masks, `(B,)` int64.
    windows: number of the window of each sequence, `(B,)` ascending: its row, or neighbours in one
        document. Rules that choose words keep the rate in each window; by default a window is one
        sequence.
    documents: number of the document of each sequence, `(B,)` ascending.
    matched: flat indices that the matched index masks, `(M,)` int64, ascending.
    octaves: floor of the binary logarithm of how often each token's type occurs in the store,
        `(T,)` uint8.
    centre: the share of lower scores in the middle of a band, in [0, 1].
    temperature: what scores are divided by before they are drawn by, above 0.
    policy: how the matched index was chosen.
    """

    offsets: np.ndarray
    positions: np.ndarray
    candidates: np.ndarray
    rate: float | np.ndarray
    seed: int
    epoch: int
    scores: np.ndarray | None = None
    continues_word: np.ndarray | None = None
    matched_counts: np.ndarray | None = None
    windows: np.ndarray | None = None
    documents: np.ndarray | None = None
    matched: np.ndarray | None = None
    octaves: np.ndarray | None = None
    centre: float = 0.5
    temperature: float = 1.0
    policy: Callable[[Sequences], np.ndarray] | None = None

    def __post_init__(self) -> None:
        rate = np.asarray(self.rate)
        if not np.all((rate > 0) & (rate <= 1)):
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
            ("octaves", num_tokens),
            ("matched_counts", num_sequences),
            ("windows", num_sequences),
            ("documents", num_sequences),
            ("rate", num_sequences),
        ):
            array = getattr(self, name)
            if isinstance(array, np.ndarray) and array.shape != (length,):
                raise ValueError(f"{name} has shape {array.shape}; ({length},) is needed")
        if not 0 <= self.centre <= 1:
            raise ValueError(f"the centre of a band is {self.centre}; it must be in [0, 1]")
        if not 0 < self.temperature < np.inf:
            raise ValueError(f"the temperature is {self.temperature}; it must be above 0")

    @property
    def rates(self) -> np.ndarray:
        """The rate of each sequence, `(B,)` float64."""
        return np.broadcast_to(np.asarray(self.rate, np.float64), len(self.offsets) - 1)


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
    rate = sequences.rates[filled]
    before = rate * first + shift.astype(np.float64)
    after = before + rate * found.counts[filled]
    counts[filled] = np.floor(after) - np.floor(before)
    return np.minimum(counts, found.counts)


def selective_limit(num_candidates: np.ndarray, rate: float | np.ndarray) -> np.ndarray:
    """Return the largest number of tokens to mask: floor(rate x candidates), at least one.

    Args:
        num_candidates: candidates of each sequence, `(B,)` int64.
        rate: share to mask, in (0, 1], one number or `(B,)`.
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
