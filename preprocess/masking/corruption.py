"""Step 4 of masking: replace the ids at masked positions, 80/10/10."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from preprocess.masking.draws import STREAM_CORRUPTION, STREAM_REPLACEMENT, counter_uniform

MASKED_SHARE = 0.8
RANDOM_SHARE = 0.1


def corrupt(
    original: np.ndarray,
    positions: np.ndarray,
    *,
    seed: int,
    epoch: int,
    mask_id: int,
    vocab_size: int,
    all_special_ids: Sequence[int],
) -> np.ndarray:
    """Return the ids to put at masked positions: 80 % [MASK], 10 % random, 10 % unchanged.

    Redrawn in each epoch, even for masks that are built once. A random id comes uniformly from the
    vocabulary without special tokens; it may equal the original.

    Args:
        original: ids of the masked tokens, `(M,)` any integer dtype.
        positions: their positions in the whole store, `(M,)` int64.
    Returns:
        New ids, `(M,)`, the dtype of `original`.
    """
    draw = counter_uniform(seed, epoch, positions, STREAM_CORRUPTION)
    corrupted = np.where(draw < MASKED_SHARE, original.dtype.type(mask_id), original)
    randomised = (draw >= MASKED_SHARE) & (draw < MASKED_SHARE + RANDOM_SHARE)
    # Number r of the ids that are left when the special ones are taken out. Special 0 3 of 6: left
    # are 1 2 4 5; special id number i has (id - i) = 0 2 ordinary ids before it, so r = 0 1 2 3
    # have 1 1 2 2 special ids at or before them and become 1 2 4 5.
    special = np.unique([i for i in all_special_ids if 0 <= i < vocab_size]).astype(np.int64)
    draw = counter_uniform(seed, epoch, positions[randomised], STREAM_REPLACEMENT)
    replacement = (draw.astype(np.float64) * (vocab_size - len(special))).astype(np.int64)
    replacement += np.searchsorted(special - np.arange(len(special)), replacement, side="right")
    corrupted[randomised] = replacement
    return corrupted
