"""Build the maskings that the benchmark compares, thin them to equal numbers, and cost them.

A mask index is built as `build_masks.py` builds it, but kept in memory, so that a benchmark leaves
no file beside the store.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from typing import Any

import numpy as np

from preprocess.errors import ConfigError, DataError
from preprocess.masking import (
    ARRAY_NEEDS,
    BASELINE,
    MATCHED,
    STRATEGIES,
    StrategyInputs,
    choose_positions,
    store_facts,
)
from preprocess.store import BLOCK_TOKENS, Shard, TokenStore, array_path, open_array
from preprocess.text.continuations import continuation_table, open_tokenizer
from train import data

DRAWN_BLOCKS = 16  # of each shard: the sample on which drawing is timed


def choose_strategies(names: list[str], scores: str) -> list[str]:
    """Return the strategies to measure, the baseline first; by default all that can be built.

    Raises:
        ConfigError: an unknown strategy, a repeated one, or one that needs scores without any.
    """
    chosen = names or [name for name in STRATEGIES if scores or not _reads_scores(name)]
    for name in chosen:
        if name not in STRATEGIES:
            raise ConfigError(f"--strategies {name}: known are {', '.join(STRATEGIES)}")
        if _reads_scores(name) and not scores:
            raise ConfigError(
                f"--strategies {name}: needs scores; give --scores NAME, as score_tokens.py wrote "
                "them, or build an index and name it with --mask_indices"
            )
        if chosen.count(name) > 1:
            raise ConfigError(f"--strategies {name}: named twice; name it once")
    return [BASELINE, *(name for name in chosen if name != BASELINE)]


def _reads_scores(name: str) -> bool:
    """Return whether a strategy reads scores, its own or those of the index it is matched to."""
    return not STRATEGIES[name].needs.isdisjoint(ARRAY_NEEDS)


def open_scores(store: TokenStore, name: str) -> list[np.ndarray | None]:
    """Open the scores of each shard, one float16 per token; without a name, None each."""
    return [open_array(shard, name, "scores")[0] if name else None for shard in store.shards]


@dataclasses.dataclass(frozen=True)
class Builder:
    """Builds maskings of a store.

    Attributes:
        scores: of each shard, or None each.
        rate: share of a sequence to mask, in (0, 1].
    """

    store: TokenStore
    scores: list[np.ndarray | None]
    rate: float
    seed: int

    def index(self, strategy: str, match: list[np.ndarray] | None = None) -> list[np.ndarray]:
        """Choose the masked positions of each shard, ascending, `(m,)` uint32 each.

        Args:
            match: the index whose counts are taken, for a strategy that needs one.
        """
        counts: Any = [None] * len(self.store.shards) if match is None else match
        needs = STRATEGIES[strategy].needs
        words = (continuation_table(open_tokenizer(self.store.tokenizer_dir))
                 if "words" in needs else None)
        own: dict[str, Any] = dict(store_facts(
            self.store, strategy, lambda: [scores for scores in self.scores if scores is not None]))
        if "policy" in needs:
            own["policy"] = MATCHED
        return [
            self._choose(strategy, shard, StrategyInputs(scores, matched, words, **own))
            for shard, scores, matched in zip(self.store.shards, self.scores, counts, strict=True)
        ]

    def _choose(
        self, strategy: str, shard: Shard, inputs: StrategyInputs, max_blocks: int | None = None
    ) -> np.ndarray:
        blocks = choose_positions(
            shard, strategy, inputs, rate=self.rate, seed=self.seed,
            all_special_ids=self.store.all_special_ids,
        )
        found = list(itertools.islice(blocks, max_blocks))
        return np.concatenate([np.zeros(0, dtype=np.uint32), *found])

    def build(self, strategy: str) -> tuple[data.Masking, dict[str, Any]]:
        """Build a masking, and measure its cost.

        Raises:
            DataError: the index masks no token.
        """
        if STRATEGIES[strategy].drawn:
            masking = data.drawn_masking(self.store, strategy, self.rate)
            return masking, self._cost_of_drawing(masking)
        match = self.index(MATCHED) if "match" in STRATEGIES[strategy].needs else None
        start = time.perf_counter()
        index = self.index(strategy, match)
        seconds = time.perf_counter() - start
        if not any(len(positions) for positions in index):
            raise DataError(f"{self.store.prefix}: {strategy} masks no token with these scores; "
                            "give others")
        # An .npy file is its data and a header.
        return data.Masking(strategy, index=index), cost(
            strategy, "once", seconds, self.store.num_tokens,
                             sum(map(len, index)), sum(part.nbytes + 128 for part in index))

    def _cost_of_drawing(self, masking: data.Masking) -> dict[str, Any]:
        """Time one draw over the beginning of each shard, and scale it up to the store."""
        num_tokens = sum(min(shard.num_tokens, DRAWN_BLOCKS * BLOCK_TOKENS)
                         for shard in self.store.shards)
        start = time.perf_counter()
        num_masked = sum(
            len(self._choose(masking.name, shard, StrategyInputs(words=masking.words),
                             DRAWN_BLOCKS))
            for shard in self.store.shards
        )
        scale = self.store.num_tokens / max(num_tokens, 1)
        seconds = (time.perf_counter() - start) * scale
        return cost(masking.name, "each epoch", seconds, self.store.num_tokens,
                    round(num_masked * scale), 0)


def cost(name: str, when: str, seconds: float | None, num_tokens: int, num_masked: int,
         num_bytes: int) -> dict[str, Any]:
    """Return one row of the table of costs."""
    return {
        "name": name, "when": when, "seconds": seconds,
        "seconds_per_million_tokens": None if seconds is None else seconds / num_tokens * 1e6,
        "masked_tokens": num_masked, "bytes_on_disk": num_bytes,
    }


def read_index(store: TokenStore, name: str) -> tuple[data.Masking, dict[str, Any]]:
    """Open a mask index beside the store; of its cost only the size is known."""
    masking = data.prebuilt_masking(store, name)
    size = sum(array_path(shard, name, "mask").stat().st_size for shard in store.shards)
    assert masking.index is not None
    return masking, cost(name, "before", None, store.num_tokens, sum(map(len, masking.index)), size)


def equal_maskings(
    maskings: dict[str, data.Masking], costs: list[dict[str, Any]], seed: int
) -> tuple[dict[str, data.Masking], int]:
    """Thin all maskings to the number of masked tokens of the one with the fewest.

    An index loses positions at random, to exactly that number; a drawn strategy gets a lower rate
    and meets the number in expectation.

    Returns:
        The maskings by the same names, and the number.
    """
    counts = {one["name"]: one["masked_tokens"] for one in costs}
    fewest = min(counts[name] for name in maskings)
    thinned = {}
    for name, masking in maskings.items():
        if masking.index is None:
            rate = masking.rate * fewest / max(counts[name], 1)
            thinned[name] = dataclasses.replace(masking, rate=rate)
        else:
            thinned[name] = dataclasses.replace(masking, index=_thin(masking.index, fewest, seed))
    return thinned, fewest


def _thin(index: list[np.ndarray], count: int, seed: int) -> list[np.ndarray]:
    """Keep `count` random positions over all shards, ascending in each."""
    ends = np.cumsum([0, *map(len, index)])
    kept = np.sort(np.random.default_rng(seed).choice(ends[-1], count, replace=False))
    bounds = np.searchsorted(kept, ends)
    return [
        np.asarray(positions)[kept[low:high] - start]
        for positions, start, low, high in zip(index, ends, bounds, bounds[1:], strict=False)
    ]
