"""The order of the rows in an epoch, computed for each place on its own.

A permutation of `n` rows as an array takes 8 bytes per row and must be drawn anew in each epoch, by
every rank. Here the row at a place is a function of the place. A Feistel network is a bijection of
all numbers with a given number of bits; results that are not below `n` are mapped again until they
are.
"""

from __future__ import annotations

import hashlib

import numpy as np

ROUNDS = 8
_FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)


def permute(places: np.ndarray, size: int, *key: object) -> np.ndarray:
    """Return the number at each place of a permutation of `size` numbers.

    Args:
        places: from 0 to `size - 1`, any shape, any integer dtype.
        key: names the permutation; any values with a `repr` of their own.
    Returns:
        Numbers from 0 to `size - 1`, the shape of `places`, int64.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest()
    keys = np.frombuffer(digest, "<u8")
    bits = max(1, (size - 1).bit_length())
    found = _shuffle_bits(np.asarray(places, dtype=np.uint64).ravel(), bits, keys)
    outside = np.flatnonzero(found >= size)
    while len(outside):  # fewer than half of them each time, on average
        walked = _shuffle_bits(found[outside], bits, keys)
        found[outside] = walked
        outside = outside[walked >= size]
    return found.astype(np.int64).reshape(np.shape(places))


def _shuffle_bits(numbers: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """Apply a bijection of the numbers below 2^bits; `(n,)` uint64.

    Each half of the bits in turn is changed by a hash of the other half. Each change can be undone,
    so no two numbers become the same.
    """
    width = bits // 2
    high, low = numbers >> np.uint64(width), numbers & np.uint64((1 << width) - 1)
    widths = (bits - width, width)
    for i, key in enumerate(keys):
        half = widths[i % 2]
        if half == 0:  # a half of no bits stays 0
            continue
        mixed = (low if i % 2 == 0 else high) + key
        mixed *= _FIRST
        mixed ^= mixed >> np.uint64(32)
        mixed *= _SECOND
        mixed >>= np.uint64(64 - half)
        if i % 2 == 0:
            high ^= mixed
        else:
            low ^= mixed
    return high << np.uint64(width) | low
