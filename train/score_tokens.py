"""Score the tokens of a store with a network.

Each sentence is scored alone (`train/stages/scoring.py`), by one of the measures of
`train/stages/measures.py`: the token scorer's log-odds, a classifier's gradient, or a
masked-language model's surprise, as it is or beside a reference. Scores are kept in float16;
log-odds rather than probabilities, which would tie the best tokens at 1. On a GPU the network runs
in fp16, but for gradients.

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

from preprocess.errors import ConfigError, DataError, run_command
from preprocess.identity import build, sealed
from preprocess.progress import Progress, say
from preprocess.store import (
    Shard,
    TokenStore,
    check_other_shards,
    has_array,
    lock_array,
    missing_arrays,
    write_array,
)
from preprocess.text.continuations import continuation_table
from train import engine
from train.config import ScoreConfig, parse
from train.model import (
    check_agreement,
    check_row_length,
    fit_row_length,
    load_config,
    load_tokenizer,
)
from train.run_dir.hf_folder import open_weights
from train.run_dir.identity import architecture, numerics
from train.stages import scoring
from train.stages.inference import HALF, check_trained, scoring_dtype, special_template
from train.stages.measures import (
    MEASURES,
    NETWORKS,
    NUM_PASSES,
    WordPasses,
    bind,
    open_runner,
)


def main(argv: list[str] | None = None) -> None:
    """Score every token of a store."""
    config = parse(ScoreConfig, argv)
    measure = MEASURES[config.measure]
    store = TokenStore.open(config.tokens)
    name = config.model_name_or_path
    hf_config, tokenizer = check_model(
        config, store, name, f"tokenize the text again with --tokenizer {name}")
    config = fit_row_length(hf_config, config)
    passes = word_passes(config, tokenizer) if "mlm" in measure.needs else None
    weights = open_weights(name).hf_digest
    dtype = scoring_dtype(config.measure, config.dtype)
    identity = build(
        "score_tokens",
        inputs={"store": store.fingerprint, "weights": weights},
        train={"max_seq_length": config.max_seq_length},
        options={
            "measure": config.measure,
            "num_passes": passes and passes.num_passes,
            "whole_words": passes and passes.whole_words,
            **check_reference(config, store, weights),
            "model_config": architecture(hf_config), "dtype": dtype,
        },
    )
    shards = store.choose_shards(config.shard_index, config.num_shards)
    if not config.overwrite:
        check_other_shards(store, shards, config.name, "scores", identity)
    writes = engine.is_main() and not config.dry_run
    with (lock_array(store, config.name, "scores", config.shard_index) if writes
          else nullcontext()):
        todo = [shard for shard in shards
                if not has_array(shard, config.name, "scores", identity, config.overwrite)]
        say(f"{config.tokens}: {len(shards) - len(todo)} of {len(shards)} shards are "
            f"scored already, {sum(shard.num_tokens for shard in todo):,} tokens to score")
        if todo and not config.dry_run:
            score(config, todo, tokenizer, identity, passes)
    missing = missing_arrays(store, config.name, "scores")
    if missing and writes:
        say(f"{len(missing)} of {len(store.shards)} shards are to be scored, the first: "
            f"{missing[0]}")


def check_model(config: ScoreConfig, store: TokenStore, name: str, remedy: str) -> tuple[Any, Any]:
    """Return configuration and tokenizer of a checkpoint that the measure can score a store with.

    Raises:
        ConfigError, DataError: it is of another kind, or another vocabulary.
    """
    network = NETWORKS[MEASURES[config.measure].needs[0]]
    hf_config = load_config(name, config.trust_remote_code)
    check_trained(hf_config, network.suffixes, name, network.remedy)
    tokenizer = load_tokenizer(name, config.trust_remote_code)
    check_agreement(hf_config, tokenizer, name, store=store, remedy=remedy)
    return hf_config, tokenizer


def check_reference(config: ScoreConfig, store: TokenStore, weights: str) -> dict[str, Any]:
    """Return the part of the identity that the reference decides.

    Args:
        weights: digest of the model's.
    """
    name = config.reference
    if not name:
        return {"reference": None, "reference_config": None}
    try:
        hf_config, _ = check_model(config, store, name, "give a reference of the same vocabulary")
        check_row_length(hf_config, config.max_seq_length)
        digest = open_weights(name).hf_digest
    except (ConfigError, DataError) as error:  # the model's own checks
        message = str(error).replace("--model_name_or_path", "--reference", 1)
        if "--reference" not in message:  # a length, say: of this model, not of the other one
            message = f"--reference {name}: {message}"
        raise type(error)(message) from None
    if digest == weights:
        raise ConfigError(
            f"--reference {name}: has the weights of --model_name_or_path, so that no token is in "
            "excess of another; give another checkpoint, or --measure surprise"
        )
    return {"reference": digest, "reference_config": architecture(hf_config)}


def word_passes(config: ScoreConfig, tokenizer: Any) -> WordPasses:
    """Return how words are masked."""
    try:
        words = continuation_table(tokenizer)
    except ConfigError as error:
        raise ConfigError(
            f"--measure {config.measure}: {str(error).split(';')[0]}; give --measure scorer or "
            "gradient, which read no words"
        ) from None
    return WordPasses(config.num_passes or NUM_PASSES, config.whole_words, words)


def score(
    config: ScoreConfig, todo: list[Shard], tokenizer: Any, identity: dict[str, Any],
    passes: WordPasses | None,
) -> None:
    """Score shards one after the other and write their arrays; collective."""
    measure = MEASURES[config.measure]
    num_tokens = sum(shard.num_tokens for shard in todo)
    device = engine.start()
    template = special_template(tokenizer, pair=False)
    dtype = identity["options"]["dtype"]
    names = [config.model_name_or_path, *filter(None, [config.reference])]
    runner = open_runner(config.measure, names, template, tokenizer, device, config.batch_tokens,
                         HALF[dtype], config.trust_remote_code)
    limit = config.max_seq_length - template.num_special
    block_tokens = int(
        scoring.BLOCK_TOKENS[device.type] * NETWORKS[measure.needs[0]].block) or 1
    started = time.monotonic()
    num_above, total = 0, 0.0
    progress = Progress(
        num_tokens, "token", config.logging_steps * runner.batch_tokens, label="score"
    )
    made_by = {
        **sealed(identity), "measure": measure.record(config.measure),
        "numerics": numerics(config), "model": config.model_name_or_path,
    }

    def count(blocks: Iterator[np.ndarray], info: dict[str, Any]) -> Iterator[np.ndarray]:
        """Pass on the blocks of a shard; its cost is in `info` after the last one; collective."""
        nonlocal num_above, total
        begin, before = time.monotonic(), runner.counts["flops"]
        for block in blocks:
            num_above += int((block > 0).sum())
            total += float(block.sum(dtype=np.float64))
            yield block
        info["seconds"] = round(time.monotonic() - begin, 3)
        info["flops"] = engine.all_reduce_sum(runner.counts["flops"] - before)[0] or None

    with progress:
        for shard in todo:
            info = dict(made_by)
            blocks = count(scoring.score_shard(
                shard, runner, limit, progress, block_tokens, bind(config.measure, passes)), info)
            if engine.is_main():
                write_array(shard, config.name, "scores", blocks, info)
            else:
                for _ in blocks:
                    pass
    num_passes, tokens, slots, repeated = engine.all_reduce_sum(
        *(runner.counts[name] for name in ("passes", "tokens", "slots", "repeated"))
    )
    again = f", {repeated:,.0f} repeated in fp32" if repeated else ""
    seconds = time.monotonic() - started
    many = max(num_tokens, 1)
    result = (f"{measure.unit} above 0 for {num_above / many:.1%} of the tokens"
              if measure.boundary else f"mean {total / many:.3f} {measure.unit}")
    say(f"scored {num_tokens:,} tokens in {seconds:.1f} s ({num_tokens / seconds:,.0f} tokens/s, "
        f"{engine.ranks().world_size} ranks, {device.type}, {dtype}): {num_passes:,.0f} forward "
        f"passes{again}, {1 - tokens / max(slots, 1):.1%} padding; {result}")
    engine.finish()


if __name__ == "__main__":
    run_command(main)
