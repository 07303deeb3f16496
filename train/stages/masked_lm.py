"""Masked language modelling, shared by `pretrain.py` and `benchmark.py`: the model and the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from preprocess.store import TokenStore
from train import data, model
from train import engine as ds
from train.config import BenchmarkConfig, PretrainConfig

UNIGRAM_TOKENS = 10_000_000  # tokens that are counted, of all shards together


def check_agreement(
    store: TokenStore, hf_config: Any, config: PretrainConfig | BenchmarkConfig
) -> None:
    """Refuse a store, a tokenizer, a configuration and weights that do not belong together."""
    name = config.model_name_or_path
    if not name:
        model.check_room(hf_config, f"--model_config {config.model_config}")
        tokenizer = model.load_tokenizer(store.tokenizer_dir)
        model.check_agreement(hf_config, tokenizer, store.tokenizer_dir, weights=False)
        return
    # Also where its weights are not used: a configuration that does not fit them is damaged.
    model.check_agreement(
        hf_config, model.load_tokenizer(name, config.trust_remote_code), name, store=store,
        remedy=f"run tokenize_corpus.py with --tokenizer {name}",
    )
    if getattr(config, "from_scratch", False):
        model.check_room(hf_config, f"--from_scratch --model_name_or_path {name}")


def token_frequencies(store: TokenStore) -> np.ndarray:
    """Log-probability of each id by how often the shards' beginnings hold it, `(V,)` float64."""
    counts = np.ones(store.vocab_size)
    share = -(-UNIGRAM_TOKENS // len(store.shards))
    for shard in store.shards:
        counts += np.bincount(shard.tokens[:share], minlength=store.vocab_size)
    return np.log(counts / counts.sum())


def model_config(config: PretrainConfig | BenchmarkConfig, store: TokenStore) -> Any:
    """Return the configuration of the model to train."""
    if config.model_config:
        # A tokenizer without padding is refused by `check_agreement`, in words.
        pad = store.special_ids.get("pad", 0)
        return model.named_config(config.model_config, store.vocab_size, pad)
    return model.load_config(config.model_name_or_path, config.trust_remote_code)


def build_model(
    config: PretrainConfig | BenchmarkConfig, store: TokenStore, from_scratch: bool = False
) -> model.PackedMaskedLM:
    """The model to train, with fresh or loaded weights; two calls give the same.

    Args:
        from_scratch: keep the configuration of the checkpoint, draw the weights.
    """
    if config.model_config or from_scratch:
        module = model.build_masked_lm(model_config(config, store), config.seed)
    else:
        module = model.load_masked_lm(
            config.model_name_or_path, config.seed, config.trust_remote_code
        )
        if module.fresh_head:
            # From here the loss starts at the unigram entropy instead of ln V, and the encoder
            # is spared the gradients that would only teach the bias.
            module.set_output_bias(token_frequencies(store))
    module.last_layer_subset = config.last_layer_subset
    if config.head_implementation != "auto":
        module.head_implementation = config.head_implementation
    if config.gradient_checkpointing:
        model.checkpoint_activations(module.hf)
    return module


def train_step(
    engine: Any, batch: data.StepBatch, device: torch.device, want_norm: bool,
    lap: Callable[[str], None] = lambda part: None, asked: Callable[[], bool] = lambda: False,
) -> tuple[float, float, float | None, bool]:
    """Take one optimizer step.

    Args:
        lap: called after each part of a micro step: "forward", "backward", "optimizer".
        asked: whether this rank was asked to stop.
    Returns:
        The same on every rank: mean loss and accuracy over the masked tokens of the global batch;
        the norm of the gradient, None if it is not wanted or fp16 skipped the step; and whether
        some rank was asked to stop before the step was taken.
    Raises:
        NonFiniteError: the loss or the gradient is not a number, on any rank; nothing has been
            updated.
    """
    scale = ds.ranks().world_size * len(batch.micro_batches) / max(batch.step_masked_tokens, 1)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    hits = torch.zeros((), dtype=torch.float64, device=device)
    for micro_batch in batch.micro_batches:
        loss, right = engine(**micro_batch.inputs(device))
        lap("forward")
        # DeepSpeed averages over micro batches and ranks; the scale turns that into the sum over
        # the global batch divided by its number of masked tokens.
        engine.backward(loss * scale)
        loss_sum += loss.detach()
        hits += right
        lap("backward")
        if not engine.is_gradient_accumulation_boundary():
            engine.step()
    sums, norm = ds.take_step(engine, loss_sum, hits, asked(), *batch.following.mine())
    lap("optimizer")
    total, right_total, num_asked, *counts = sums
    batch.following.total = counts
    count = max(batch.step_masked_tokens, 1)
    norm = float(norm) if want_norm and norm is not None else None
    return total / count, right_total / count, norm, num_asked > 0
