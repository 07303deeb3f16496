"""Open the masks of a run: drawn anew each epoch, or a prebuilt index."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from preprocess.errors import ConfigError, DataError
from preprocess.files import fingerprint_text
from preprocess.masking import STRATEGIES
from preprocess.progress import say
from preprocess.store import TokenStore, open_array
from preprocess.text.continuations import (
    CHARACTERS_ONLY,
    WordTable,
    check_words,
    continuation_table,
    open_tokenizer,
)


@dataclass(frozen=True)
class Masking:
    """How positions are chosen: a strategy drawn on the fly, or a prebuilt mask index.

    Attributes:
        name: the strategy's name, or the index's.
        index: masked positions of each shard, `(m,)` uint32 ascending, or None to draw.
        rate: mask rate of a drawn strategy, in (0, 1].
        words: word boundaries, for a drawn strategy that needs them.
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
    """Return a strategy that is drawn anew each epoch.

    Raises:
        ConfigError: not a strategy, or one that needs a prebuilt index.
    """
    strategy = STRATEGIES.get(name)
    if strategy is None or not strategy.drawn:
        drawn = ", ".join(key for key, one in STRATEGIES.items() if one.drawn)
        hint = ("build an index with preprocess/build_masks.py and give --mask_index" if strategy
                else f"known: {drawn}")
        raise ConfigError(f"--masking {name}: not drawn anew each epoch; {hint}")
    words = None
    if "words" in strategy.needs:
        tokenizer = open_tokenizer(store.tokenizer_dir)
        words = continuation_table(tokenizer)
        how = check_words(tokenizer)
        if CHARACTERS_ONLY in how:
            say(f"warning: --masking {name}: {how}")
    return Masking(name, rate=rate, words=words)


def prebuilt_masking(store: TokenStore, name: str) -> Masking:
    """Open a mask index beside the store.

    Raises:
        DataError: absent, made for another store, with other options from shard to shard, or empty.
    """
    opened = [open_array(shard, name, "mask") for shard in store.shards]
    index, infos = [positions for positions, _ in opened], [info for _, info in opened]
    if not any(len(positions) for positions in index):
        raise DataError(f"{store.prefix}: mask index {name} masks no token; build another")
    choices = [info["identity"]["choice"] for info in infos if "identity" in info]
    if any(choice != choices[0] for choice in choices):
        raise DataError(f"{store.prefix}: mask index {name} was made with different options from "
                        "shard to shard; build it again with --overwrite")
    return Masking(
        name, index=index, options=infos[0].get("options") or {},
        fingerprint=fingerprint_text(*(info["sha256"] for info in infos)),
    )
