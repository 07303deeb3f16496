"""Useful arithmetic of a masked-LM step, the device's peak (together: MFU), and memory.

The count is the same for every way of computing a step: linear layers of the encoder for each real
token, attention of each token over a complete row, the MLM head for masked tokens only. Logits of
other slots, padding and recomputation do not count; work that the last-layer subset avoids does
count. A multiply-add is two operations, and the backward pass costs twice the forward pass (Kaplan
et al. 2020, section 2.1).
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import csrc
from train.model.families import FAMILIES, Family
from train.model.packed import PackedMaskedLM

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""What each precision of a run computes in."""

# Dense 16-bit tensor-core rates of the makers' data sheets, operations per second. The longest name
# that is part of the device's name counts.
GPU_PEAKS = {
    "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12,
    "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "A10": 125e12, "V100": 125e12,
    "T4": 65e12,
}


@dataclass(frozen=True)
class StepFlops:
    """Forward and backward operations per real token, and in addition per masked token."""

    per_token: float
    per_masked_token: float

    def of(self, tokens: float, masked_tokens: float) -> float:
        """Count the operations for `tokens` tokens, `masked_tokens` of them masked."""
        return tokens * self.per_token + masked_tokens * self.per_masked_token


@dataclass(frozen=True)
class Peak:
    """Peak rate of one device, in operations per second, and the source of that number."""

    flops_per_second: float
    source: str


def count_flops(module: PackedMaskedLM, max_seq_length: int) -> StepFlops:
    """Count the useful operations per token, and of the MLM head per masked token.

    A linear layer of `D x K` costs 2DK forward and twice that backward. Attention costs 4SD forward
    per layer (scores and their weighted sum, over `S = max_seq_length` slots).

    Args:
        module: the model; its weights may already be partitioned by ZeRO-3.
    """
    family, config = module.family, module.hf.config
    linear, width = _encoder_sizes(family, module.hf)
    attention = 2 * max_seq_length * width
    head = _weights(family.transform(module.hf)[0]) + config.vocab_size * config.hidden_size
    return StepFlops(per_token=6.0 * (linear + attention), per_masked_token=6.0 * head)


def forward_flops(model: Any, tokens: float, squares: float) -> float | None:
    """Count the operations of reading texts once, without padding and without the head.

    A linear layer of `D x K` costs 2DK per token, attention 4DL per layer and token of a text of
    `L` tokens. Training costs three times as much, a gradient by the embeddings twice.

    Args:
        model: of transformers or a `PackedMaskedLM`; several cost their sum.
        tokens, squares: sums of the lengths of the texts and of their squares, special tokens
            among them.
    Returns:
        None where the model's family is unknown.
    """
    if isinstance(model, nn.ModuleList):
        counts = [forward_flops(each, tokens, squares) for each in model]
        return None if None in counts else sum(count for count in counts if count is not None)
    hf = model.hf if isinstance(model, PackedMaskedLM) else model
    family = FAMILIES.get(getattr(getattr(hf, "config", None), "model_type", ""))
    if family is None:
        return None
    try:
        linear, width = _encoder_sizes(family, hf)
    except AttributeError:  # another's model of that name, built in another way
        return None
    return 2.0 * linear * tokens + 4.0 * width * squares


def _encoder_sizes(family: Family, hf: Any) -> tuple[int, int]:
    """Return the weights of an encoder's linear layers, and its layers times its hidden size."""
    layers = family.layers(family.encoder(hf))
    linear = sum(_weights(m) for m in layers.modules() if isinstance(m, nn.Linear))
    return linear, len(layers) * hf.config.hidden_size


def _weights(linear: nn.Linear) -> int:
    return linear.in_features * linear.out_features


def peak_flops(device: torch.device, precision: str) -> Peak:
    """Look up the rate of a known GPU in 16 bit, or measure that of a matrix product.

    Args:
        precision: fp32, fp16 or bf16, in which the run computes.
    """
    if device.type == "cuda" and precision != "fp32":
        name = torch.cuda.get_device_name(device)
        for known in sorted(GPU_PEAKS, key=len, reverse=True):
            if known in name:
                return Peak(GPU_PEAKS[known], f"data sheet of {known}, 16 bit, dense")
    size = 8192 if device.type == "cuda" else 1024
    rate = _measure_matmul(size, device, DTYPES[precision])
    return Peak(rate, f"measured: {precision} product of two {size} x {size} matrices")


@functools.cache
def _measure_matmul(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Measure operations per second of the fastest of a few square products."""
    first = torch.ones(size, size, device=device, dtype=dtype)  # draws from no generator
    out = torch.empty_like(first)
    best = float("inf")
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.mm(first, first, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def state_bytes(
    module: nn.Module, *, stage: int, world_size: int, precision: str
) -> float:
    """Estimate the bytes of weights, gradients and optimizer states of one rank.

    Args:
        stage: of ZeRO.
    """
    # Bytes per parameter: two fp32 moments 8; beside 16-bit weights, and with ZeRO, also fp32
    # weights and gradients, 4 + 4. Gradients and weights of the model 2 + 2 or 4 + 4.
    size = 4 if precision == "fp32" else 2
    kinds = [16 if stage or precision != "fp32" else 8, size, size]  # states, gradients, weights
    per_parameter = sum(kinds[stage:]) + sum(kinds[:stage]) / world_size
    return per_parameter * sum(parameter.numel() for parameter in module.parameters())


def memory_line(
    module: PackedMaskedLM, *, stage: int, world_size: int, precision: str, micro_batch_slots: int,
    mask_rate: float, gradient_checkpointing: bool,
) -> str:
    """Estimate what one rank needs: states, and the largest activations.

    Args:
        stage: of ZeRO.
        micro_batch_slots: rows times slots of a micro batch.
        mask_rate: masked share of the slots.
    """
    states = state_bytes(module, stage=stage, world_size=world_size, precision=precision)
    size = 4 if precision == "fp32" else 2
    config = module.hf.config
    # About 18 hidden widths per layer are kept for the backward pass.
    layers = 1 if gradient_checkpointing else config.num_hidden_layers
    activations = micro_batch_slots * config.hidden_size * 18 * size * layers
    logits = min(mask_rate * micro_batch_slots * config.vocab_size * size, csrc.ONE_CHUNK_BYTES)
    parts = zip(("states", "activations", "logits"), (states, activations, logits), strict=True)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return (f"model: {parameters:,} parameters; estimated memory per rank: "
            + ", ".join(f"{name} {value / 2**30:.2f} GiB" for name, value in parts))
