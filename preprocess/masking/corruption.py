"""Step 4 of masking: replace the ids at masked positions, by default 80/10/10."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from preprocess.masking.draws import STREAM_CORRUPTION, STREAM_REPLACEMENT, counter_uniform


class Corruption(NamedTuple):
    """Percent of the masked tokens that become [MASK], become a random id, and stay; sum 100."""

    mask: float
    random: float
    keep: float

    def shares(self) -> list[float]:
        """Return the three as shares of 1, as an identity holds them."""
        return [percent / 100 for percent in self]


STANDARD = Corruption(80, 10, 10)  # of BERT, and of every evaluation


def read_corruption(text: str) -> Corruption:
    """Read percentages as they are typed.

    # "80,10,10" -> Corruption(80, 10, 10)

    Raises:
        ValueError: not three numbers of 0 or more with the sum 100.
    """
    mask, random, keep = map(float, text.split(","))
    if min(mask, random, keep) < 0 or not abs(mask + random + keep - 100) < 1e-6:
        raise ValueError(f"{text}: not three percentages with the sum 100")
    return Corruption(mask, random, keep)


def corrupt(
    original: np.ndarray,
    positions: np.ndarray,
    *,
    seed: int,
    epoch: int,
    mask_id: int,
    vocab_size: int,
    all_special_ids: Sequence[int],
    corruption: Corruption = STANDARD,
) -> np.ndarray:
    """Return the ids to put at masked positions: [MASK], a random one, or the original.

    Each token draws by itself, also where whole words are masked. Redrawn in each epoch, even for
    masks that are built once. A random id comes uniformly from the vocabulary without special
    tokens; it may equal the original.

    Args:
        original: ids of the masked tokens, `(M,)` any integer dtype.
        positions: their positions in the whole store, `(M,)` int64.
    Returns:
        New ids, `(M,)`, the dtype of `original`.
    """
    masked, changed = corruption.mask / 100, (corruption.mask + corruption.random) / 100
    draw = counter_uniform(seed, epoch, positions, STREAM_CORRUPTION)
    corrupted = np.where(draw < masked, original.dtype.type(mask_id), original)
    randomised = (draw >= masked) & (draw < changed)
    # Number r of the ids that are left when the special ones are taken out. Special 0 3 of 6: left
    # are 1 2 4 5; special id number i has (id - i) = 0 2 ordinary ids before it, so r = 0 1 2 3
    # have 1 1 2 2 special ids at or before them and become 1 2 4 5.
    special = np.unique([i for i in all_special_ids if 0 <= i < vocab_size]).astype(np.int64)
    draw = counter_uniform(seed, epoch, positions[randomised], STREAM_REPLACEMENT)
    replacement = (draw.astype(np.float64) * (vocab_size - len(special))).astype(np.int64)
    replacement += np.searchsorted(special - np.arange(len(special)), replacement, side="right")
    corrupted[randomised] = replacement
    return corrupted
