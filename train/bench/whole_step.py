"""What the MLM head and the last-layer subset are worth: forward and backward of one batch.

Without optimizer, loader and DeepSpeed, in four ways: `transformers` (logits of every slot),
`gather` (the head on masked rows, in plain PyTorch), `head` (ours) and `head + subset`. They
compute the same loss, `transformers` up to attention across documents: it has no packed attention.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from train import data, model
from train.bench.throughput import spread, synchronize, turns

TRANSFORMERS = "transformers"
WAYS = (TRANSFORMERS, "gather", "head", "head + subset")


def make_passes(
    module: model.PackedMaskedLM, batch: data.PackedBatch, device: torch.device
) -> dict[str, Callable[[], torch.Tensor]]:
    """Ways to compute the mean loss of a batch, the baseline first."""
    inputs = batch.inputs(device)
    labels = torch.full_like(batch.input_ids, -100).flatten()
    labels[batch.masked_positions] = batch.masked_labels
    labels = labels.view_as(batch.input_ids).to(device)
    filled = (batch.document_ids >= 0).long().to(device)

    def ours(subset: bool, implementation: str | None) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            module.last_layer_subset, module.head_implementation = subset, implementation
            return module(**inputs)[0] / max(batch.num_masked, 1)

        return call

    def transformers() -> torch.Tensor:
        return module.hf(
            input_ids=inputs["input_ids"], attention_mask=filled, labels=labels
        ).loss

    implementation = module.head_implementation
    calls = (transformers, ours(False, "reference"), ours(False, implementation),
             ours(True, implementation))
    return dict(zip(WAYS, calls, strict=True))


def measure(
    passes: dict[str, Callable[[], torch.Tensor]], module: torch.nn.Module, *, warmup_steps: int,
    rounds: int, timed_steps: int,
) -> dict[str, list[list[float]]]:
    """Seconds of forward and backward, by way and round."""

    def seconds(call: Callable[[], torch.Tensor]) -> float:
        module.zero_grad()
        synchronize()
        start = time.perf_counter()
        call().backward()
        synchronize()
        return time.perf_counter() - start

    for call in passes.values():
        for _ in range(warmup_steps):
            seconds(call)
    times: dict[str, list[list[float]]] = {name: [] for name in passes}
    for name in turns(list(passes), rounds):
        times[name].append([seconds(passes[name]) for _ in range(timed_steps)])
    return times


def summarise(times: dict[str, list[list[float]]]) -> list[dict[str, Any]]:
    """One row a variant; the speed-up is that of each round's medians."""
    medians = {name: np.median(rounds, axis=1) for name, rounds in times.items()}
    return [
        {
            "variant": name,
            "step_ms": spread(1000 * np.array(rounds)),
            "speedup": spread(medians[TRANSFORMERS] / medians[name]),
            "counted_steps": int(np.size(rounds)),
        }
        for name, rounds in times.items()
    ]


def format_table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'forward + backward':<20}{'ms (p20-p80)':>26}{'times faster (p20-p80)':>28}"]
    for row in rows:
        step, speedup = row["step_ms"], row["speedup"]
        timing = f"{step['median']:.1f} ({step['p20']:.1f}-{step['p80']:.1f})"
        ratio = f"{speedup['median']:.2f} ({speedup['p20']:.2f}-{speedup['p80']:.2f})"
        lines.append(f"{row['variant']:<20}{timing:>26}{ratio:>28}")
    return "\n".join(lines)
