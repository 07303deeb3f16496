"""Score a store's tokens: windows, blocks, and how ranks share them.

Each sentence is scored alone; one that is longer than the limit is cut into windows of about equal
length, which do not see each other. The store is streamed in blocks of whole sentences, so memory
does not grow with it.

Sentences are batched by length, not packed into rows: a block holds enough of them that those of
one length fill their batches. Padding, measured on Yelp and Amazon reviews: 0.2 % of the slots in
blocks of 2^20 tokens, 1 % in 200,000, 5 % in 20,000. Rows of several sentences under a
block-diagonal mask compute attention between sentences only to drop it; on a CPU they took 1.1 to
1.4 times as long even on 20,000 tokens (BERT-mini, rows of 128, 256 and 512 slots).

What is computed of a window is the measure's (`train/stages/measures.py`), and is computed on the
device. Log-odds in fp16 are within 2e-2 of those in fp32 (relative, above 1), which bf16 would
miss; a store holds scores of one precision.

Letters: `T` tokens, `N` sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from preprocess.errors import DataError
from preprocess.progress import Progress
from preprocess.store import Shard, iterate_blocks, ranges
from train import engine
from train.stages.inference import IdLists, Runner

BLOCK_TOKENS = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Tokens scored between two writes: enough to find sentences of similar length for its passes."""

LARGEST = np.finfo(np.float16).max

Answers = Iterator[tuple[np.ndarray, np.ndarray]]
WindowScore = Callable[[Runner, IdLists, tuple[int, int]], Answers]
"""(runner, windows, `(rank, world_size)`) -> the answers of this rank's passes: places in
`windows.flat`, int64, and their scores; the ranks together yield every token of a window once."""


def cut_windows(offsets: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut sequences longer than `limit` into windows of about equal length.

    Worked example: offsets [0, 10, 10, 13], limit 4: the first has 3 windows, the second none.
    starts [0, 3, 6, 10], ends [3, 6, 10, 13].

    Args:
        offsets: first token of each sequence, and the end, `(N+1,)` int64.
    Returns:
        First and past-the-last token of each window, int64 each; together they cover all tokens.
    """
    lengths = np.diff(offsets)
    counts = -(-lengths // limit)
    owner = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    first, length, count = offsets[:-1][owner], lengths[owner], counts[owner]
    return first + number * length // count, first + (number + 1) * length // count


def to_log_odds(logits: torch.Tensor) -> torch.Tensor:
    """Return log-odds of class 1 from logits `(..., 2)`, float16; infinite if beyond its range."""
    return (logits[..., 1].float() - logits[..., 0].float()).half()


def each_token(runner: Runner, windows: IdLists, share: tuple[int, int]) -> Answers:
    """Yield log-odds of all tokens, or what the runner computes instead; see `WindowScore`."""
    for batch, found, slots in runner.run(windows, share=share, answer=to_log_odds):
        starts, lengths = windows.starts[batch], windows.lengths[batch]
        row = np.arange(len(batch)) * found.shape[1]
        yield ranges(starts, lengths), found.reshape(-1)[ranges(row + slots, lengths)]


def score_block(
    tokens: np.ndarray, offsets: np.ndarray, runner: Runner, limit: int, progress: Progress,
    score: WindowScore = each_token,
) -> np.ndarray:
    """Score complete sequences; the ranks share the work, and every rank gets all scores.

    Args:
        tokens: ids of the block, `(T,)` uint16.
        offsets: of its sequences, from 0 to T, `(N+1,)` int64.
    Returns:
        Scores, `(T,)` float16, clipped to finite values.
    Raises:
        DataError: the network's answers are not numbers.
    """
    starts, ends = cut_windows(offsets, limit)
    where = engine.ranks()
    found = np.zeros(len(tokens), np.float16)
    done = np.zeros(len(tokens), bool)
    shown = 0
    windows = IdLists(tokens, starts, ends - starts)
    for places, values in score(runner, windows, (where.rank, where.world_size)):
        found[places] = np.clip(values, -LARGEST, LARGEST)
        done[places] = True
        amount = min(len(places) * where.world_size, len(tokens) - shown)  # other ranks are as far
        shown += amount
        progress.update(amount)
    if where.world_size > 1:
        for bits, values in engine.gather_objects((np.packbits(done), found[done])):
            found[np.unpackbits(bits, count=len(tokens)).astype(bool)] = values
    if shown < len(tokens):
        progress.update(len(tokens) - shown)
    if np.isnan(found).any():
        raise DataError("the network's answers are not numbers; train it again")
    return found


def score_shard(
    shard: Shard, runner: Runner, limit: int, progress: Progress, block_tokens: int,
    score: WindowScore = each_token,
) -> Iterator[np.ndarray]:
    """Yield the scores of a shard block by block, float16, on every rank."""
    for block in iterate_blocks(shard.sequence_offsets, block_tokens):
        offsets = shard.sequence_offsets[block.start : block.stop + 1]
        tokens = shard.tokens[offsets[0] : offsets[-1]]
        yield score_block(tokens, offsets - offsets[0], runner, limit, progress, score)
