"""Score how much each token of a store matters to the task.

Each sentence is scored alone, as the scorer was fitted (`train/stages/scoring.py`). Log-odds are
kept in float16; probabilities would tie the best tokens at 1. On a GPU the scorer runs in fp16.

    deepspeed train/score_tokens.py --model_name_or_path RS/hf --tokens P2 --name mr

writes `P2.mr.scores.npy`, shard by shard; complete shards are skipped. With `--shard_index i
--num_shards N` it scores one shard, so that N processes on any machines share a store
independently.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np

from preprocess.errors import run_command
from preprocess.identity import build, sealed
from preprocess.progress import Progress, say
from preprocess.store import (
    Shard,
    TokenStore,
    has_array,
    lock_array,
    missing_arrays,
    write_array,
)
from train import engine
from train.config import ScoreConfig, parse
from train.model import (
    check_agreement,
    check_row_length,
    load_config,
    load_scorer,
    load_tokenizer,
)
from train.run_dir.hf_folder import open_weights
from train.run_dir.identity import architecture, numerics
from train.stages import scoring
from train.stages.inference import (
    BATCH_TOKENS,
    Runner,
    check_trained,
    choose_dtype,
    special_template,
)


def main(argv: list[str] | None = None) -> None:
    """Score every token of a store."""
    config = parse(ScoreConfig, argv)
    store = TokenStore.open(config.tokens)
    hf_config = load_config(config.model_name_or_path, config.trust_remote_code)
    check_trained(hf_config, "ForTokenClassification", config.model_name_or_path,
                  "give the hf/ folder of train/fit_scorer.py")
    tokenizer = load_tokenizer(config.model_name_or_path, config.trust_remote_code)
    check_agreement(
        hf_config, tokenizer, config.model_name_or_path, store=store,
        remedy=f"tokenize the text again with --tokenizer {config.model_name_or_path}",
    )
    check_row_length(hf_config, config.max_seq_length)
    dtype = choose_dtype(config.dtype)
    identity = build(
        "score_tokens",
        inputs={"store": store.fingerprint,
                "weights": open_weights(config.model_name_or_path).hf_digest},
        train={"max_seq_length": config.max_seq_length},
        options={"model_config": architecture(hf_config), "dtype": dtype},
    )
    shards = store.choose_shards(config.shard_index, config.num_shards)
    writes = engine.is_main() and not config.dry_run
    with (lock_array(store, config.name, "scores", config.shard_index) if writes
          else nullcontext()):
        todo = [shard for shard in shards
                if not has_array(shard, config.name, "scores", identity, config.overwrite)]
        say(f"{config.tokens}: {len(shards) - len(todo)} of {len(shards)} shards are "
            f"scored already, {sum(shard.num_tokens for shard in todo):,} tokens to score")
        if todo and not config.dry_run:
            score(config, todo, tokenizer, identity)
    missing = missing_arrays(store, config.name, "scores")
    if missing and writes:
        say(f"{len(missing)} of {len(store.shards)} shards are to be scored, the first: "
            f"{missing[0]}")


def score(
    config: ScoreConfig, todo: list[Shard], tokenizer: Any, identity: dict[str, Any]
) -> None:
    """Score shards one after the other and write their arrays; collective."""
    num_tokens = sum(shard.num_tokens for shard in todo)
    device = engine.start()
    template = special_template(tokenizer, pair=False)
    model = load_scorer(config.model_name_or_path, 0, config.trust_remote_code, trained=True)
    dtype = identity["options"]["dtype"]
    runner = Runner(model, template, tokenizer, device,
                    config.batch_tokens or BATCH_TOKENS[device.type], half=dtype == "fp16")
    limit = config.max_seq_length - template.num_special
    started = time.monotonic()
    num_important = 0
    progress = Progress(
        num_tokens, "token", config.logging_steps * runner.batch_tokens, label="score"
    )
    made_by = {
        **sealed(identity), "numerics": numerics(config), "model": config.model_name_or_path,
    }

    def count(blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        nonlocal num_important
        for block in blocks:
            num_important += int((block > 0).sum())
            yield block

    with progress:
        for shard in todo:
            blocks = count(scoring.score_shard(
                shard, runner, limit, progress, scoring.BLOCK_TOKENS[device.type]))
            if engine.is_main():
                write_array(shard, config.name, "scores", blocks, made_by)
            else:
                for _ in blocks:
                    pass
    passes, tokens, slots, repeated = engine.all_reduce_sum(
        *(runner.counts[name] for name in ("passes", "tokens", "slots", "repeated"))
    )
    again = f", {repeated:,.0f} repeated in fp32" if repeated else ""
    seconds = time.monotonic() - started
    say(f"scored {num_tokens:,} tokens in {seconds:.1f} s ({num_tokens / seconds:,.0f} tokens/s, "
        f"{engine.ranks().world_size} ranks, {device.type}, {dtype}): {passes:,.0f} forward "
        f"passes{again}, {1 - tokens / max(slots, 1):.1%} padding; log-odds above 0 for "
        f"{num_important / max(num_tokens, 1):.1%} of the tokens")
    engine.finish()


if __name__ == "__main__":
    run_command(main)
