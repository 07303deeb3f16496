"""Choose the masked positions of a whole shard block by block: the content of a mask index.

Memory does not grow with the shard. Every draw depends only on a token's place in the store, so
neither blocks nor shards change the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from preprocess.errors import ConfigError, DataError
from preprocess.identity import compare
from preprocess.masking.candidates import Sequences, find_candidates
from preprocess.masking.strategies import STRATEGIES
from preprocess.store import (
    BLOCK_TOKENS,
    Shard,
    TokenStore,
    array_records,
    iterate_blocks,
    list_arrays,
    open_array,
)
from preprocess.text.continuations import WordTable, find_continuations


def open_arrays(
    store: TokenStore, shards: list[Shard], flag: str, name: str, kind: str
) -> list[tuple[np.ndarray, dict[str, Any]]]:
    """Open array `name` of some shards, as named by `--flag`, each with its JSON.

    Raises:
        DataError: no such array, and the message lists those that every shard has; or scores of
            which the shards, also others than these, do not have one origin.
    """
    try:
        opened = [open_array(shard, name, kind) for shard in shards]
    except DataError as error:
        known = ", ".join(list_arrays(store, kind)) or "none yet"
        raise DataError(f"--{flag} {name}: {error} (known: {known})") from None
    if kind == "scores":
        check_one_origin(store, name, f"--{flag} {name}")
    return opened


def check_one_origin(store: TokenStore, name: str, where: str) -> None:
    """Refuse scores that one shard has of another measure, model or option than the next.

    Raises:
        DataError: names two shards, and what differs.
    """
    records = [(path, _origin(info)) for path, info in array_records(store, name, "scores")]
    for path, origin in records[1:]:
        try:
            compare(origin, records[0][1], f"{where}: {path}",
                    "make both again with the same options and --overwrite", str(records[0][0]))
        except ConfigError as error:
            raise DataError(str(error)) from None


def _origin(info: dict[str, Any]) -> dict[str, Any]:
    """Return an identity without what each shard has of its own: its digests of data."""
    identity = info.get("identity", {})
    inputs = {key: value for key, value in identity.get("inputs", {}).items()
              if key not in ("store", "scores")}
    return {**identity, "inputs": inputs}


def index_bounds(index: np.ndarray, token_offsets: np.ndarray) -> np.ndarray:
    """Return where each sequence's part of a mask index begins, and where the last one ends.

    Args:
        index: ascending positions in the shard, `(M,)` uint32.
        token_offsets: `(B+1,)` int64; a shard has fewer than 2^32 tokens.
    Returns:
        Offsets into `index`, `(B+1,)` int64.
    """
    # uint32 keys: an int64 key would copy the whole index as int64.
    return np.searchsorted(index, token_offsets.astype(np.uint32))


@dataclass(frozen=True)
class StrategyInputs:
    """Inputs of a strategy for one shard besides the tokens: one field for each of its needs."""

    scores: np.ndarray | None = None
    match: np.ndarray | None = None
    words: WordTable | None = None


def choose_positions(
    shard: Shard,
    strategy: str,
    inputs: StrategyInputs,
    *,
    rate: float,
    seed: int,
    all_special_ids: tuple[int, ...],
    block_tokens: int = BLOCK_TOKENS,
) -> Iterator[np.ndarray]:
    """Yield the masked positions of a shard block by block: ascending, `(M,)` uint32."""
    for block in iterate_blocks(shard.sequence_offsets, block_tokens):
        offsets = shard.sequence_offsets[block.start : block.stop + 1]
        start, end = int(offsets[0]), int(offsets[-1])
        tokens = shard.tokens[start:end]
        local = offsets - start
        sequences = Sequences(
            offsets=local,
            positions=np.arange(shard.token_start + start, shard.token_start + end),
            candidates=find_candidates(tokens, all_special_ids),
            rate=rate,
            seed=seed,
            epoch=0,
            scores=None if inputs.scores is None else inputs.scores[start:end],
            continues_word=(
                None if inputs.words is None else find_continuations(tokens, local, inputs.words)
            ),
            matched_counts=(
                None if inputs.match is None else np.diff(index_bounds(inputs.match, offsets))
            ),
        )
        try:
            chosen = STRATEGIES[strategy].choose(sequences)
        except ValueError as error:
            raise DataError(f"{shard.prefix}: {error}; make that array again") from None
        yield (chosen + start).astype(np.uint32)
