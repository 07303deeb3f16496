"""Useful arithmetic of a masked-LM step, and what the device could do: the two halves of MFU.

One count for every way of computing the same step: linear layers of the encoder for each real
token, attention of a token over a whole row, the MLM head for masked tokens alone. Logits of other
slots, padding, and work done twice are not useful and count nothing; what the last-layer subset
leaves out is counted as if it had been done. A multiply-add is two operations, and the backward
pass costs twice the forward pass (Kaplan et al. 2020, section 2.1).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from train.model.packed import PackedMaskedLM

# Dense 16-bit tensor-core rates of the makers' data sheets, operations a second; a name is looked
# for in that of the device, the longest first.
GPU_PEAKS = {
    "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12,
    "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "A10": 125e12, "V100": 125e12,
    "T4": 65e12,
}


@dataclass(frozen=True)
class StepFlops:
    """Operations of forward and backward: for each real token, and each masked one on top."""

    per_token: float
    per_masked_token: float

    def of(self, tokens: float, masked_tokens: float) -> float:
        """Operations for so many tokens, of which so many are masked."""
        return tokens * self.per_token + masked_tokens * self.per_masked_token


@dataclass(frozen=True)
class Peak:
    """What one device could do, operations a second, and where that number comes from."""

    flops_per_second: float
    source: str


def count_flops(module: PackedMaskedLM, max_seq_length: int) -> StepFlops:
    """Useful operations of a token, and of the MLM head for a masked one.

    A linear layer of `D x K` costs 2DK forward and twice that backward. Attention costs 4SD forward
    in each layer (scores and their weighted sum, over `S = max_seq_length` slots).

    Args:
        module: the model; its weights may be shared out by ZeRO-3 already.
    """
    family, config = module.family, module.hf.config
    layers = family.layers(family.encoder(module.hf))
    linear = sum(_weights(m) for m in layers.modules() if isinstance(m, nn.Linear))
    attention = 2 * len(layers) * max_seq_length * config.hidden_size
    head = _weights(family.transform(module.hf)[0]) + config.vocab_size * config.hidden_size
    return StepFlops(per_token=6.0 * (linear + attention), per_masked_token=6.0 * head)


def _weights(linear: nn.Linear) -> int:
    return linear.in_features * linear.out_features


def peak_flops(device: torch.device, precision: str) -> Peak:
    """The data sheet's rate of a known GPU in 16 bit; of anything else, that of a matrix product.

    Args:
        precision: fp32, fp16 or bf16, in which the run computes.
    """
    if device.type == "cuda" and precision != "fp32":
        name = torch.cuda.get_device_name(device)
        for known in sorted(GPU_PEAKS, key=len, reverse=True):
            if known in name:
                return Peak(GPU_PEAKS[known], f"data sheet of {known}, 16 bit, dense")
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    size = 8192 if device.type == "cuda" else 1024
    rate = _measure_matmul(size, device, dtype)
    return Peak(rate, f"measured: {precision} product of two {size} x {size} matrices")


def _measure_matmul(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the fastest of a few square products."""
    first = torch.randn(size, size, device=device, dtype=dtype)
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
