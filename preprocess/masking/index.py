"""Choose the masked positions of a whole shard block by block: the content of a mask index.

Memory does not grow with the shard. Every draw depends only on a token's place in the store, so
neither blocks nor shards change the result: blocks end where documents do, or where very long ones
are cut. Only a strategy that keeps a histogram belongs to blocks, of a fixed size, and so to its
shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from preprocess.errors import ConfigError, DataError
from preprocess.identity import compare
from preprocess.masking.candidates import Sequences, find_candidates
from preprocess.masking.controls import frequency_bins
from preprocess.masking.strategies import ARRAY_NEEDS, STRATEGIES
from preprocess.store import (
    BLOCK_TOKENS,
    Shard,
    TokenStore,
    array_path,
    array_records,
    list_arrays,
    open_array,
)
from preprocess.text.continuations import (
    WordTable,
    continuation_table,
    find_continuations,
    word_table,
)

# A window holds the sequences of a document that begin within so many tokens, the last one up to
# twice as many; a document longer than a segment is cut into segments in the same way.
WINDOW_TOKENS = 256
SEGMENT_TOKENS = 1 << 19
NUM_BINS = 128  # of `frequency_bins`: a store has fewer than 2^64 tokens
_LARGEST = float(np.finfo(np.float16).max)


def open_arrays(
    store: TokenStore, shards: list[Shard], flag: str, name: str, kind: str
) -> list[tuple[np.ndarray, dict[str, Any]]]:
    """Open array `name` of some shards, as named by `--flag`, each with its JSON.

    Raises:
        DataError: no such array, and the message lists those that every shard has; or scores or
            masks of which the shards, also others than these, do not have one origin.
    """
    try:
        opened = [open_array(shard, name, kind) for shard in shards]
    except DataError as error:
        known = ", ".join(list_arrays(store, kind)) or "none yet"
        raise DataError(f"--{flag} {name}: {error} (known: {known})") from None
    if kind in ("scores", "mask"):
        check_one_origin(store, name, kind, f"--{flag} {name}")
    return opened


def check_one_origin(
    store: TokenStore, name: str, kind: str, where: str, *,
    made_by: dict[str, Any] | None = None, shards: Sequence[Shard] = (),
) -> None:
    """Refuse an array that one shard has of another measure, rule or option than the next.

    Args:
        made_by: what the JSON of this run's arrays will have; shards: whose old ones do not count.
    Raises:
        DataError: names two shards and what differs.
        ConfigError: names a shard, and what differs from this run.
    """
    replaced = {array_path(shard, name, kind) for shard in shards}
    records = [(str(path), array_origin(info)) for path, info in array_records(store, name, kind)
               if path not in replaced]
    remedy = "make both again with the same options and --overwrite"
    if made_by is not None:
        records.insert(0, ("this run", array_origin(made_by)))
        remedy = "give another --name, or the same options, or --overwrite for every shard"
    for path, origin in records[1:]:
        try:
            compare(origin, records[0][1], f"{where}: {path}", remedy, records[0][0])
        except ConfigError as error:
            if made_by is not None:
                raise
            raise DataError(str(error)) from None


def array_origin(info: dict[str, Any]) -> dict[str, Any]:
    """Return the identity in an array's JSON without the digests that each shard has of its own."""
    identity = info.get("identity", {})
    inputs = {key: value for key, value in identity.get("inputs", {}).items()
              if key not in ("store", "scores", "mask_index")}
    # Of what a mask index was made from, the name: `NAME (sha256 0123456789abcdef)`.
    options = info.get("options") or {}
    names = {key: str(options[key]).partition(" (sha256 ")[0]
             for key in (*ARRAY_NEEDS, "units") if key in options}
    return {**identity, "inputs": inputs,
            "choice": {**identity.get("choice", {}), "units": names.pop("units", None)},
            "options": {**identity.get("options", {}), **names}}


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


# ------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True)
class StrategyInputs:
    """Inputs of a strategy for one shard besides the tokens, for its needs and for units.

    scores: one per token of the shard. match: ascending positions, uint32.
    words: where words begin; units: 1 where a token continues a unit, one per token, in their
        place. With neither, a strategy of scores masks single tokens.
    octaves: of each type, `(V,)` uint8, from `type_octaves`. means: score of each type, `(V,)`
        float16, from `type_means`, in place of `scores`.
    policy: the strategy by which `match` was chosen.
    """

    scores: np.ndarray | None = None
    match: np.ndarray | None = None
    words: WordTable | None = None
    units: np.ndarray | None = None
    octaves: np.ndarray | None = None
    means: np.ndarray | None = None
    policy: str | None = None


def store_facts(
    store: TokenStore, strategy: str, scores: Callable[[], list[np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return what a strategy needs to know of the whole store, as fields of `StrategyInputs`.

    Args:
        scores: opens the scores of all shards, if they are needed.
    """
    needs, facts = STRATEGIES[strategy].needs, {}
    if "frequency" in needs:
        facts["octaves"] = type_octaves(store)
    if "means" in needs:
        facts["means"] = type_means(store, scores())
    return facts


def find_words(strategy: str, whole_words: bool, tokenizer: Any) -> WordTable | None:
    """Return where words begin, if a strategy that masks whole words or compares frequencies asks.

    Without word boundaries frequencies are compared all the same.
    """
    if whole_words:
        return continuation_table(tokenizer)
    return word_table(tokenizer) if "frequency" in STRATEGIES[strategy].needs else None


def type_octaves(store: TokenStore) -> np.ndarray:
    """Return floor(log2) of how often each id occurs in the store, `(V,)` uint8."""
    counts = np.zeros(store.vocab_size, dtype=np.int64)
    for shard in store.shards:
        for first in range(0, shard.num_tokens, BLOCK_TOKENS):
            tokens = shard.tokens[first : first + BLOCK_TOKENS]
            counts += np.bincount(tokens, minlength=store.vocab_size)
    return (np.frexp(np.maximum(counts, 1).astype(np.float64))[1] - 1).astype(np.uint8)


def type_means(store: TokenStore, scores: list[np.ndarray]) -> np.ndarray:
    """Return the mean score of each id over the store, without minus infinity: `(V,)` float16.

    An id that has no other score, or does not occur, gets minus infinity.
    """
    size = store.vocab_size
    total, counts = np.zeros(size), np.zeros(size, dtype=np.int64)
    for shard, values in zip(store.shards, scores, strict=True):
        for first in range(0, shard.num_tokens, BLOCK_TOKENS):
            part = slice(first, first + BLOCK_TOKENS)
            tokens, own = shard.tokens[part], np.asarray(values[part]).astype(np.float32)
            kept = own > -np.inf
            if not kept.all():
                if np.isnan(own).any():
                    raise DataError(f"{shard.prefix}: a score is not a number (NaN); make that "
                                    "array again")
                tokens, own = tokens[kept], own[kept]
            total += np.bincount(tokens, np.minimum(own, _LARGEST), size)
            counts += np.bincount(tokens, minlength=size)
    means = np.full(size, -np.inf, dtype=np.float16)
    means[counts > 0] = total[counts > 0] / counts[counts > 0]
    return means


# ------------------------------------------------------------------------------------- blocks


def _documents(shard: Shard, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the segment and the window of the sequences `first` to `end` - 1, ascending int64."""
    offsets = shard.document_offsets
    low = int(np.searchsorted(offsets, first, side="right")) - 1
    high = int(np.searchsorted(offsets, end, side="left"))
    edges = offsets[low : high + 1]
    sequences = np.arange(first, end)
    own = np.searchsorted(edges, sequences, side="right") - 1
    bounds = shard.sequence_offsets[edges]
    start = shard.sequence_offsets[first : end + 1][:-1] - bounds[own]
    length = (bounds[1:] - bounds[:-1])[own]
    number = (low + own).astype(np.int64) << 32
    return tuple(  # type: ignore[return-value]
        number + np.minimum(start // size, np.maximum(length // size, 1) - 1)
        for size in (SEGMENT_TOKENS, WINDOW_TOKENS)
    )


def iterate_segments(shard: Shard, max_tokens: int = BLOCK_TOKENS) -> Iterator[slice]:
    """Cut a shard into runs of whole documents, or segments of very long ones.

    Yields:
        Slices of sequences, of at most `max_tokens` tokens or of one segment.
    """
    offsets, first = shard.sequence_offsets, 0
    while first < shard.num_sequences:
        end = int(np.searchsorted(offsets, offsets[first] + max_tokens, side="right")) - 1
        end = max(end, first + 1)
        if end < shard.num_sequences:
            segments, _ = _documents(shard, first, end + 1)
            begins = first + int(np.searchsorted(segments, segments[-1]))
            end = begins if begins > first else _end_of_segment(shard, first, int(segments[0]))
        yield slice(first, end)
        first = end


def _end_of_segment(shard: Shard, first: int, segment: int) -> int:
    """Return the end of the segment that begins with the sequence `first`."""
    document = int(np.searchsorted(shard.document_offsets, first, side="right")) - 1
    low, high = shard.document_offsets[document], shard.document_offsets[document + 1]
    start, stop = shard.sequence_offsets[low], shard.sequence_offsets[high]
    part, parts = segment & 0xFFFFFFFF, max(int(stop - start) // SEGMENT_TOKENS, 1)
    if part == parts - 1:
        return int(high)
    return int(np.searchsorted(shard.sequence_offsets, start + (part + 1) * SEGMENT_TOKENS))


def choose_positions(
    shard: Shard,
    strategy: str,
    inputs: StrategyInputs,
    *,
    rate: float,
    seed: int,
    all_special_ids: tuple[int, ...],
    block_tokens: int = BLOCK_TOKENS,
    epoch: int = 0,
    options: dict[str, float] | None = None,
    bins: np.ndarray | None = None,
    done: Callable[[int], Any] | None = None,
) -> Iterator[np.ndarray]:
    """Yield the masked positions of a shard block by block: ascending, `(M,)` uint32.

    Args:
        options: fields of `Sequences` that the strategy, or the policy it is matched to, reads.
        bins: filled with the histograms over `frequency_bins` of the matched index and of the
            result, `(2, NUM_BINS)` int64, for a strategy that needs frequencies.
        done: told the number of tokens of each block.
    Raises:
        DataError: an array that the strategy cannot use.
    """
    record = STRATEGIES[strategy]
    for block in iterate_segments(shard, BLOCK_TOKENS if record.blocks else block_tokens):
        offsets = shard.sequence_offsets[block.start : block.stop + 1]
        start, end = int(offsets[0]), int(offsets[-1])
        tokens = shard.tokens[start:end]
        local = offsets - start
        documents, windows = _documents(shard, block.start, block.stop)
        scores = continues = matched = counts = None
        if inputs.means is not None:
            scores = inputs.means[tokens]
        elif inputs.scores is not None:
            scores = inputs.scores[start:end]
        if inputs.units is not None:
            continues = inputs.units[start:end] != 0
        elif inputs.words is not None:
            continues = find_continuations(tokens, local, inputs.words)
        if inputs.match is not None:
            bounds = index_bounds(inputs.match, offsets)
            counts = np.diff(bounds)
            matched = np.asarray(inputs.match[bounds[0] : bounds[-1]]).astype(np.int64) - start
        sequences = Sequences(
            offsets=local,
            positions=np.arange(shard.token_start + start, shard.token_start + end),
            candidates=find_candidates(tokens, all_special_ids),
            rate=rate,
            seed=seed,
            epoch=epoch,
            scores=scores,
            continues_word=continues,
            matched_counts=counts,
            windows=windows,
            documents=documents,
            matched=matched,
            octaves=None if inputs.octaves is None else inputs.octaves[tokens],
            policy=None if inputs.policy is None else STRATEGIES[inputs.policy].choose,
            **(options or {}),
        )
        try:
            chosen = record.choose(sequences)
        except ValueError as error:
            raise DataError(f"{shard.prefix}: {error}; make that array again") from None
        if bins is not None:
            own = frequency_bins(sequences)
            for row, positions in zip(bins, (matched, chosen), strict=True):
                row += np.bincount(own[positions], minlength=len(row))
        if done is not None:
            done(end - start)
        yield (chosen + start).astype(np.uint32)
