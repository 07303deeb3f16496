"""Where the masks of a run come from: drawn each epoch, or a prebuilt index."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from preprocess import masking as masks
from preprocess.errors import ConfigError, DataError
from preprocess.files import fingerprint_text
from preprocess.store import TokenStore, open_array
from preprocess.text.continuations import WordTable, continuation_table


@dataclass(frozen=True)
class Masking:
    """How positions are chosen: a strategy drawn on the fly, or a prebuilt mask index.

    Attributes:
        name: the strategy's name, or the index's.
        index: mask positions of each shard, `(m,)` uint32 ascending, or None to draw.
        rate: mask rate of a drawn strategy.
        words: table for `whole_word`.
        options: how the index was built: its strategy, rate and seed.
        fingerprint: of the index, over all shards.
    """

    name: str
    index: list[np.ndarray] | None = None
    rate: float = 0.0
    words: WordTable | None = None
    options: dict[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None


def drawn_masking(store: TokenStore, name: str, rate: float) -> Masking:
    """A strategy that is drawn anew in each epoch.

    Raises:
        ConfigError: not a strategy, or one that needs a prebuilt index.
    """
    if name not in masks.DRAWN:
        hint = (
            "build it with preprocess/build_masks.py and give --mask_index"
            if name in masks.PREBUILT else f"known: {', '.join(masks.DRAWN)}"
        )
        raise ConfigError(f"--masking {name}: not drawn on the fly; {hint}")
    words = None
    if name == "whole_word":
        from transformers import AutoTokenizer

        words = continuation_table(AutoTokenizer.from_pretrained(store.tokenizer_dir))
    return Masking(name, rate=rate, words=words)


def prebuilt_masking(store: TokenStore, name: str) -> Masking:
    """A mask index beside the store.

    Raises:
        DataError: absent, made for another store, or without a single position.
    """
    opened = [open_array(shard, name, "mask") for shard in store.shards]
    index, infos = [positions for positions, _ in opened], [info for _, info in opened]
    if not any(len(positions) for positions in index):
        raise DataError(f"{store.prefix}: mask index {name} masks nothing; build another")
    return Masking(
        name, index=index, options=infos[0].get("options") or {},
        fingerprint=fingerprint_text(*(info["sha256"] for info in infos)),
    )
