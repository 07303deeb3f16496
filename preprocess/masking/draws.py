"""Random numbers by a counter-based hash of (seed, epoch, position), never by a generator."""

from __future__ import annotations

import numpy as np

# One stream per decision, so that no two decisions about a token share a number.
STREAM_BUDGET = 0
STREAM_CHOICE = 1
STREAM_TIES = 2
STREAM_SHUFFLED = 3
STREAM_MATCHED = 4
STREAM_CORRUPTION = 5
STREAM_REPLACEMENT = 6
STREAM_WORD = 7
STREAM_SHOWN = 8  # documents that show_masks.py picks
STREAM_WINDOW = 9
STREAM_LENGTH = 10
STREAM_ORDER = 11
STREAM_OFFSET = 12
STREAM_SAMPLED = 13
STREAM_EXCHANGE = 14
STREAM_FREQUENCY = 15
STREAM_INVERSE = 16


def counter_uniform(seed: int, epoch: int, positions: np.ndarray, stream: int) -> np.ndarray:
    """Draw one uniform number per global token position.

    It is number `position` of a SplitMix64 generator seeded by a hash of the other arguments.

    Args:
        seed: any integer; the run's seed.
        epoch: any integer; 0 for masks that are built once.
        positions: token positions in the whole store, any shape, int64 or uint64.
        stream: one of the `STREAM_` constants.
    Returns:
        Numbers in [0, 1) with 24 bits, the shape of `positions`, float32.
    """
    return counter_bits(seed, epoch, positions, stream).astype(np.float32) * np.float32(2.0**-24)


_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_WORD = (1 << 64) - 1


def _mix(word: int) -> int:
    word = (word + _GAMMA) & _WORD
    word = ((word ^ (word >> 30)) * _MIX_1) & _WORD
    word = ((word ^ (word >> 27)) * _MIX_2) & _WORD
    return word ^ (word >> 31)


def counter_bits(seed: int, epoch: int, positions: np.ndarray, stream: int) -> np.ndarray:
    """Return the 24 random bits behind `counter_uniform`, uint64."""
    start = _mix(_mix(_mix(seed & _WORD) ^ (epoch & _WORD)) ^ stream)
    # A one-element array, not a scalar: numpy warns when a scalar overflows, and here it must.
    word = np.array(positions, dtype=np.uint64, ndmin=1)
    word += np.uint64(1)
    word *= np.uint64(_GAMMA)
    word += np.uint64(start)
    word ^= word >> np.uint64(30)
    word *= np.uint64(_MIX_1)
    word ^= word >> np.uint64(27)
    word *= np.uint64(_MIX_2)
    word ^= word >> np.uint64(31)
    word >>= np.uint64(40)
    return word.reshape(np.shape(positions))
