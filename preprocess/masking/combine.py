"""Several scores of one store in one: the rules of several tasks in one mask.

- max, mean: of scores on one scale: the same unit, and 0 a boundary in all or in none.
- rank: the mean of the percentiles in the store.
- union: the largest percentile in the sequence. Where a part has a boundary at 0, tokens that are
  not above it have percentile 0 there.

Ties share the mean of their percentiles. A percentile p, in (0, 1), is kept as -log2(1 - p): 1 for
the better half, 2 for the best quarter, 10 for the best thousandth, where percentiles themselves
would tie in float16.

Others rank a union in the whole store. Within each sequence, as here, each part's best token of a
sequence is on a par with the others', however many tokens a part finds important elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from preprocess.errors import ConfigError, DataError
from preprocess.masking.words import to_half
from preprocess.store import BLOCK_TOKENS, Shard, TokenStore, iterate_blocks

_SIGN = np.uint16(0x8000)


@dataclass(frozen=True)
class Parts:
    """The scores to combine.

    names: of the scores, two or more.
    arrays: by part and shard, `(T,)` float16.
    measures: record of each part's measure: what its JSON has under "measure".
    """

    store: TokenStore
    names: list[str]
    arrays: list[list[np.ndarray]]
    measures: list[dict[str, Any]]
    block_tokens: int = BLOCK_TOKENS

    def blocks(self, shard: Shard) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
        """Yield the scores of each part, and the offsets of the block's sequences from 0.

        Raises:
            DataError: scores that are not finite.
        """
        number = [one.prefix for one in self.store.shards].index(shard.prefix)
        for block in iterate_blocks(shard.sequence_offsets, self.block_tokens):
            offsets = shard.sequence_offsets[block.start : block.stop + 1]
            values = [shards[number][offsets[0] : offsets[-1]] for shards in self.arrays]
            for name, part in zip(self.names, values, strict=True):
                if not np.isfinite(part).all():
                    raise DataError(f"{shard.prefix}: the scores {name} are not all finite numbers;"
                                    " make them again")
            yield values, offsets - offsets[0]


Combined = Callable[[Shard], Iterator[np.ndarray]]


RANKED = "log2 of rarity"  # unit of what is made of ranks


class Combination(NamedTuple):
    """A way to combine scores.

    combine: make of the parts a function that yields a shard's scores block by block, float16.
    same_scale: whether the parts must be on one scale; the result is then on it too.
    boundary: whether 0 is a boundary of the result if it is one of all parts.
    rule: the sentence that explains it in `--help`.
    """

    combine: Callable[[Parts], Combined]
    same_scale: bool
    boundary: bool
    rule: str

    def record(self, parts: Parts) -> dict[str, Any]:
        """Return what the JSON of the scores keeps under "measure": see `Measure.record`."""
        unit = parts.measures[0]["unit"] if self.same_scale else RANKED
        return {
            "name": "combine",
            "boundary": self.boundary and all(part["boundary"] for part in parts.measures),
            "unit": unit,
            "reads_labels": any(part["reads_labels"] for part in parts.measures),
        }


def check_scale(names: Sequence[str], measures: Sequence[dict[str, Any]], how: str) -> None:
    """Refuse parts that a combination cannot compare.

    Args:
        names, measures: see `Parts`.
    Raises:
        ConfigError: names two parts on different scales.
    """
    def scale(measure: dict[str, Any]) -> str:
        return f"{measure['unit']}, {'' if measure['boundary'] else 'not '}parted at 0"

    if COMBINED[how].same_scale:
        first = scale(measures[0])
        for name, measure in zip(names[1:], measures[1:], strict=True):
            if scale(measure) != first:
                raise ConfigError(
                    f"--combine {how}: {names[0]} ({first}) and {name} ({scale(measure)}) "
                    f"are on different scales; take --combine rank or union"
                )


def _each(join: Callable[[np.ndarray], np.ndarray]) -> Callable[[Parts], Combined]:
    """Return a combination of each token's scores, `(parts, T)` float64, by itself."""
    def combine(parts: Parts) -> Combined:
        return lambda shard: (to_half(join(np.array(values, np.float64)))
                              for values, _ in parts.blocks(shard))

    return combine


def ordered(scores: np.ndarray) -> np.ndarray:
    """Return numbers that are ordered as float16 scores are, uint16; -0 equals 0."""
    bits = (scores + np.float16(0)).view(np.uint16)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def store_percentiles(parts: Parts, part: int) -> np.ndarray:
    """Return the percentile in the store of each value of `ordered`, `(65536,)` float64."""
    times = np.zeros(1 << 16, np.int64)
    for shard in parts.store.shards:
        for values, _ in parts.blocks(shard):
            times += np.bincount(ordered(values[part]), minlength=len(times))
    return (np.cumsum(times) - times / 2) / max(1, int(times.sum()))


def sequence_percentiles(scores: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return the percentile of each score in its sequence, `(T,)` float64.

    (rank - 1/2) / length, with ranks from 1, and the mean of the ranks for equal scores.

    Args:
        offsets: of the sequences, `(B+1,)` int64, from 0 to T.
    """
    lengths = np.diff(offsets)
    number = np.repeat(np.arange(len(lengths)), lengths)
    keys = number << 16 | ordered(scores)
    order = np.argsort(keys)
    keys = keys[order]
    edges = np.flatnonzero(np.diff(keys, prepend=-1))
    times = np.diff(edges, append=len(keys))
    found = np.empty(len(keys))
    found[order] = np.repeat(edges + times / 2, times)
    return (found - offsets[:-1][number]) / lengths[number]


def _keep(percentiles: np.ndarray) -> np.ndarray:
    return to_half(-np.log2(1 - percentiles))


def _rank(parts: Parts) -> Combined:
    tables = [store_percentiles(parts, part) for part in range(len(parts.names))]
    return lambda shard: (
        _keep(np.mean([table[ordered(part)] for table, part in zip(tables, values, strict=True)],
                      axis=0))
        for values, _ in parts.blocks(shard))


def _union(parts: Parts) -> Combined:
    def of_part(scores: np.ndarray, offsets: np.ndarray, measure: dict[str, Any]) -> np.ndarray:
        found = sequence_percentiles(scores, offsets)
        return np.where(scores > 0, found, 0.0) if measure["boundary"] else found

    return lambda shard: (
        _keep(np.max([of_part(part, offsets, measure)
                      for part, measure in zip(values, parts.measures, strict=True)], axis=0))
        for values, offsets in parts.blocks(shard))


COMBINED: dict[str, Combination] = {
    "max": Combination(_each(lambda values: values.max(axis=0)), same_scale=True, boundary=True,
                       rule="the largest score; for scores on one scale"),
    "mean": Combination(_each(lambda values: values.mean(axis=0)), same_scale=True, boundary=True,
                        rule="the mean of the scores; for scores on one scale"),
    "rank": Combination(_rank, same_scale=False, boundary=False,
                        rule="the mean of the percentiles in the store"),
    "union": Combination(
        _union, same_scale=False, boundary=True,
        rule="the largest percentile in the sequence, of the scores that find a token important"),
}
