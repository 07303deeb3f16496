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
    STRATEGIES,
    StrategyInputs,
    choose_positions,
    find_words,
    store_facts,
)
from preprocess.store import BLOCK_TOKENS, Shard, TokenStore, array_path, open_array
from preprocess.text.continuations import open_tokenizer
from train import data

DRAWN_BLOCKS = 16  # of each shard: the sample on which drawing is timed


class MasksNothing(DataError):
    """A strategy chooses no token: with means of types, say, none of which is above 0."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of a store.

    Attributes:
        name: of the array.
        arrays: of each shard, one float16 per token.
        boundary: whether 0 parts important tokens from others.
        seconds: what making them took, over all shards; None where their JSON does not tell.
    """

    name: str
    arrays: list[np.ndarray]
    boundary: bool
    seconds: float | None

    @property
    def policy(self) -> str:
        """The strategy that controls are matched to: the first that can use these scores."""
        return next(name for name, one in STRATEGIES.items()
                    if "scores" in one.needs and not one.control and self.suit(name))

    def suit(self, strategy: str) -> bool:
        """Return whether a strategy can use these scores."""
        return self.boundary or "boundary" not in STRATEGIES[strategy].needs


def open_scores(store: TokenStore, name: str) -> Scores | None:
    """Open the scores `name` of each shard; None without a name.

    Raises:
        DataError: absent, damaged, made for another store, or by an older version.
    """
    if not name:
        return None
    opened = [open_array(shard, name, "scores") for shard in store.shards]
    infos = [info for _, info in opened]
    if any("measure" not in info for info in infos):
        raise DataError(f"--scores {name}: their JSON names no measure, so an older version made "
                        "them; make them again with --overwrite")
    told = all("seconds" in info for info in infos)
    return Scores(
        name, [scores for scores, _ in opened], bool(infos[0]["measure"]["boundary"]),
        sum(float(info["seconds"]) for info in infos) if told else None,
    )


def choose_strategies(names: list[str], scores: Scores | None) -> list[str]:
    """Return the strategies to measure, the baseline first; by default all that can be built.

    Raises:
        ConfigError: an unknown strategy, a repeated one, or one that needs scores, or others.
    """
    chosen = names or [name for name in STRATEGIES
                       if not reads_scores(name) or scores and scores.suit(name)]
    for name in chosen:
        if name not in STRATEGIES:
            raise ConfigError(f"--strategies {name}: known are {', '.join(STRATEGIES)}")
        if reads_scores(name) and not scores:
            raise ConfigError(
                f"--strategies {name}: needs scores; give --scores NAME, as score_tokens.py wrote "
                "them, or build an index and name it with --mask_indices"
            )
        if scores and not scores.suit(name):
            raise ConfigError(
                f"--strategies {name}: needs scores whose 0 parts important tokens from others, "
                f"and --scores {scores.name} are of another measure; take {scores.policy}"
            )
        if chosen.count(name) > 1:
            raise ConfigError(f"--strategies {name}: named twice; name it once")
    return [BASELINE, *(name for name in chosen if name != BASELINE)]


def reads_scores(name: str) -> bool:
    """Return whether a strategy reads scores, its own or those of the index it is matched to."""
    return not STRATEGIES[name].needs.isdisjoint(ARRAY_NEEDS)


def strategy_inputs(
    store: TokenStore, strategy: str, scores: list[np.ndarray], match: list[np.ndarray], policy: str
) -> list[StrategyInputs]:
    """Return what a strategy reads besides the tokens, for each shard.

    Args:
        scores, match: of each shard; may be empty where no need asks for them.
        policy: the strategy that chose `match`.
    """
    needs = STRATEGIES[strategy].needs
    facts = store_facts(store, strategy, lambda: scores)
    words = find_words(strategy, "words" in needs, open_tokenizer(store.tokenizer_dir))
    own_scores = scores if not needs.isdisjoint({"scores", "policy"}) else []
    own_match = match if "match" in needs else []
    return [
        StrategyInputs(scores=one, match=index, words=words,
                       policy=policy if "policy" in needs else None, **facts)
        for one, index, _ in itertools.zip_longest(own_scores, own_match, store.shards)
    ]


@dataclasses.dataclass
class Builder:
    """Builds maskings of a store.

    Attributes:
        rate: share of a sequence to mask, in (0, 1].
    """

    store: TokenStore
    scores: Scores | None
    rate: float
    seed: int
    _policy_index: list[np.ndarray] | None = None

    def index(self, strategy: str) -> list[np.ndarray]:
        """Choose the masked positions of each shard, ascending, `(m,)` uint32 each."""
        match = self._match() if "match" in STRATEGIES[strategy].needs else []
        arrays, policy = (self.scores.arrays, self.scores.policy) if self.scores else ([], "")
        inputs = strategy_inputs(self.store, strategy, arrays, match, policy)
        return [self._choose(strategy, shard, one)
                for shard, one in zip(self.store.shards, inputs, strict=True)]

    def _match(self) -> list[np.ndarray]:
        """Return the index of the policy, which controls are matched to."""
        assert self.scores is not None
        if self._policy_index is None:
            self._policy_index = self.index(self.scores.policy)
        return self._policy_index

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
            MasksNothing: the index masks no token.
        """
        if STRATEGIES[strategy].drawn:
            masking = data.drawn_masking(self.store, strategy, self.rate)
            return masking, self._cost_of_drawing(masking)
        if "match" in STRATEGIES[strategy].needs:
            self._match()  # before the clock starts
        start = time.perf_counter()
        index = self.index(strategy)
        seconds = time.perf_counter() - start
        if not any(len(positions) for positions in index):
            raise MasksNothing(f"{self.store.prefix}: {strategy} masks no token with these "
                               "scores; give others")
        # An .npy file is its data and a header.
        return data.Masking(strategy, index=index), cost(
            strategy, "once", seconds, self.store.num_tokens, sum(map(len, index)),
            sum(part.nbytes + 128 for part in index),
            self.scores.seconds if self.scores and reads_scores(strategy) else None,
        )

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
         num_bytes: int, score_seconds: float | None = None) -> dict[str, Any]:
    """Return one row of the table of costs.

    Args:
        score_seconds: of making the scores before it; None where there are none, or none tells.
    """
    def per_million(value: float | None) -> float | None:
        return None if value is None else value / num_tokens * 1e6

    return {
        "name": name, "when": when, "seconds": seconds,
        "seconds_per_million_tokens": per_million(seconds),
        "score_seconds_per_million_tokens": per_million(score_seconds),
        "masked_tokens": num_masked, "bytes_on_disk": num_bytes,
    }


def read_index(store: TokenStore, name: str) -> tuple[data.Masking, dict[str, Any]]:
    """Open a mask index beside the store; of its cost only the size is known.

    Of an index for several epochs, that of the first is measured.
    """
    masking = dataclasses.replace(data.prebuilt_masking(store, name), later=())
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
