"""How much each token of a domain's text matters to the task, by the scorer: log-odds, one a token.

Each sentence is scored alone, as the scorer was fitted; one that is longer than the limit is cut
into windows of about equal length, which do not see each other. The store is streamed in blocks
of whole sentences, so memory does not grow with it. Log-odds are kept in float16, because
probabilities would tie the best tokens at 1.

    deepspeed train/score_tokens.py --model_name_or_path RS/hf --tokens P2 --name mr

writes `P2.mr.scores.npy`, shard by shard; shards that are whole already are skipped.

Letters: `T` tokens, `N` sequences.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np

from preprocess.errors import ConfigError, DataError, run_command
from preprocess.progress import Progress, say
from preprocess.store import (
    Shard,
    TokenStore,
    array_path,
    lock_array,
    open_array,
    write_array,
)
from train import engine
from train.config import ScoreConfig, parse
from train.inference import Runner, check_trained, special_template
from train.model import (
    check_row_length,
    check_same_vocabulary,
    load_config,
    load_scorer,
    load_tokenizer,
    local_checkpoint,
    weights_fingerprint,
)

BLOCK_TOKENS = 1 << 20
"""Tokens scored between two writes: enough to find sentences of like length."""


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


def cut_blocks(offsets: np.ndarray, block_tokens: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of sequences that hold about `block_tokens` tokens, at least one sequence."""
    start = 0
    while start < len(offsets) - 1:
        end = int(np.searchsorted(offsets, offsets[start] + block_tokens, side="right")) - 1
        end = max(end, start + 1)
        yield start, end
        start = end


def to_log_odds(logits: np.ndarray) -> np.ndarray:
    """Log-odds of class 1 from logits `(..., 2)`, as float16, clipped to finite values."""
    odds = logits[..., 1].astype(np.float32) - logits[..., 0]
    limit = np.finfo(np.float16).max
    return np.clip(odds, -limit, limit).astype(np.float16)


def score_block(
    tokens: np.ndarray, offsets: np.ndarray, runner: Runner, limit: int, progress: Progress
) -> np.ndarray:
    """Score whole sequences; the ranks share the work, and every rank gets all of it.

    Args:
        tokens: ids of the block, `(T,)` uint16.
        offsets: of its sequences, from 0 to T, `(N+1,)` int64.
    Returns:
        Log-odds, `(T,)` float16.
    Raises:
        DataError: the scorer's logits are not numbers.
    """
    starts, ends = cut_windows(offsets, limit)
    windows = [tokens[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
    where = engine.ranks()
    positions: list[np.ndarray] = [np.empty(0, np.int64)]
    scores: list[np.ndarray] = [np.empty(0, np.float16)]
    shown = 0
    for batch, logits, first_slots in runner.run(windows, share=(where.rank, where.world_size)):
        odds = to_log_odds(logits)
        for i, row, slot in zip(batch.tolist(), odds, first_slots.tolist(), strict=True):
            positions.append(np.arange(starts[i], ends[i]))
            scores.append(row[slot : slot + ends[i] - starts[i]])
        amount = int((ends - starts)[batch].sum()) * where.world_size  # the others are as far
        amount = min(amount, len(tokens) - shown)
        shown += amount
        progress.update(amount)
    found = np.zeros(len(tokens), np.float16)
    mine = (np.concatenate(positions), np.concatenate(scores))
    for place, values in engine.gather_objects(mine):
        found[place] = values
    if shown < len(tokens):
        progress.update(len(tokens) - shown)
    if np.isnan(found).any():
        raise DataError("the scorer's logits are not numbers; fit it again")
    return found


def score_shard(
    shard: Shard, runner: Runner, limit: int, progress: Progress, block_tokens: int = BLOCK_TOKENS
) -> Iterator[np.ndarray]:
    """Yield the log-odds of a shard block by block, float16, on every rank."""
    for first, last in cut_blocks(shard.sequence_offsets, block_tokens):
        start, end = shard.sequence_offsets[first], shard.sequence_offsets[last]
        offsets = shard.sequence_offsets[first : last + 1] - start
        yield score_block(shard.tokens[start:end], offsets, runner, limit, progress)


def is_made(shard: Shard, name: str, made_by: dict[str, Any], overwrite: bool) -> bool:
    """Whether a shard's scores are whole and made as asked; others are refused or made again.

    Raises:
        ConfigError: whole, but made otherwise, without `overwrite`.
        DataError: damaged or of another store, without `overwrite`.
    """
    path = array_path(shard, name, "scores")
    if not path.with_suffix(".json").exists():
        return False
    try:
        _, info = open_array(shard, name, "scores")
    except DataError:
        if overwrite:
            return False
        raise
    different = [key for key, value in made_by.items() if info.get(key) != value]
    if different and not overwrite:
        key = different[0]
        raise ConfigError(
            f"{path} was made with {key} {info.get(key)!r}, not {made_by[key]!r}; "
            "give another --name, or --overwrite"
        )
    return not different


def main(argv: list[str] | None = None) -> None:
    """Score every token of a store."""
    config = parse(ScoreConfig, argv)
    store = TokenStore.open(config.tokens)
    hf_config = load_config(config.model_name_or_path, config.trust_remote_code)
    check_trained(hf_config, "ForTokenClassification", config.model_name_or_path,
                  "give the hf/ folder of train/fit_scorer.py")
    check_row_length(hf_config, config.max_seq_length)
    tokenizer = load_tokenizer(config.model_name_or_path, config.trust_remote_code)
    check_same_vocabulary(
        store, tokenizer, config.model_name_or_path,
        f"tokenize the text again with --tokenizer {config.model_name_or_path}",
    )
    folder = local_checkpoint(config.model_name_or_path)
    made_by = {
        "command": "score_tokens",
        "model_fingerprint": weights_fingerprint(folder, hf_config),
        "max_seq_length": config.max_seq_length,
    }
    writes = engine.is_main() and not config.dry_run
    with lock_array(store, config.name, "scores") if writes else nullcontext():
        todo = [s for s in store.shards if not is_made(s, config.name, made_by, config.overwrite)]
        say(f"{config.tokens}: {len(store.shards) - len(todo)} of {len(store.shards)} shards are "
            f"scored already, {sum(shard.num_tokens for shard in todo):,} tokens to score")
        if todo and not config.dry_run:
            score(config, todo, tokenizer, made_by)


def score(
    config: ScoreConfig, todo: list[Shard], tokenizer: Any, made_by: dict[str, Any]
) -> None:
    """Score shards one after the other and write what comes out; collective."""
    num_tokens = sum(shard.num_tokens for shard in todo)
    device = engine.start()
    template = special_template(tokenizer, pair=False)
    model = load_scorer(config.model_name_or_path, 0, config.trust_remote_code)
    runner = Runner(model, template, tokenizer, device, config.batch_tokens, half=True)
    limit = config.max_seq_length - template.num_special
    started = time.monotonic()
    num_important = 0
    progress = Progress(
        num_tokens, "token", config.logging_steps * config.batch_tokens, label="score"
    )
    made_by = {**made_by, "model": config.model_name_or_path}

    def count(blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        nonlocal num_important
        for block in blocks:
            num_important += int((block > 0).sum())
            yield block

    with progress:
        for shard in todo:
            blocks = count(score_shard(shard, runner, limit, progress))
            if engine.is_main():
                write_array(shard, config.name, "scores", blocks, made_by)
            else:
                for _ in blocks:
                    pass
    passes, tokens, slots = engine.all_reduce_sum(
        runner.counts.passes, runner.counts.tokens, runner.counts.slots
    )
    seconds = time.monotonic() - started
    say(f"scored {num_tokens:,} tokens in {seconds:.1f} s ({num_tokens / seconds:,.0f} tokens/s, "
        f"{engine.ranks().world_size} ranks, {device.type}): {passes:,.0f} forward passes, "
        f"{1 - tokens / max(slots, 1):.1%} padding; log-odds above 0 for "
        f"{num_important / max(num_tokens, 1):.1%} of the tokens")
    engine.finish()


if __name__ == "__main__":
    run_command(main)
