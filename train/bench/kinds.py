"""Where the milliseconds of a step go, by kind of work, from a profile of a few steps.

On a GPU the kinds are those of its kernels, by their names, and `gaps` is the time in which it had
none: the host was late. On a CPU they are those of torch's operations.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import torch

from train.bench.throughput import synchronize

# The first that is found in the name of a kernel or an operation; Inductor's kernels name all that
# they have fused, so what decides stands first.
KINDS = {
    "head": r"MaskedLM|DecoderLoss|cross_entropy|gather_dense|activate_normalise|log_softmax|nll",
    "optimizer": r"adam|lpnorm|foreach|multi_tensor|_amp_",
    "attention": r"attention|flash|fmha|sdpa",
    "products": r"gemm|addmm|\bmm\b|bmm|matmul|linear|cutlass|cublas|nvjet|xmma|splitk|_dot_",
    "norms": r"layer_?norm|rms_?norm",
    "copies": r"mem(cpy|set)|copy|::to\b|clone|fill|zero",
    "elementwise": r"",
}


def kind_of(name: str) -> str:
    """Return the kind of a kernel or an operation by its name."""
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))


def profile(step: Callable[[], Any], num_steps: int) -> dict[str, float]:
    """Return milliseconds per step by kind, with `gaps` and `step`; `step` is warmed up."""
    from torch.profiler import ProfilerActivity

    on_gpu = torch.cuda.is_available()
    synchronize()
    start = time.perf_counter()
    for _ in range(num_steps):
        step()
    synchronize()
    wall = time.perf_counter() - start  # not under the profiler, which slows the host
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as found:
        for _ in range(num_steps):
            step()
        synchronize()
    return sum_up(
        {event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
         for event in found.key_averages()},
        wall, num_steps,
    )


def sum_up(seconds: dict[str, float], wall: float, num_steps: int) -> dict[str, float]:
    """Return milliseconds per step by kind.

    Args:
        seconds: of each kernel or operation, by name, over all steps.
        wall: seconds of all steps.
    """
    found = dict.fromkeys(KINDS, 0.0)
    for name, took in seconds.items():
        found[kind_of(name)] += 1e3 * took / num_steps
    whole = 1e3 * wall / num_steps
    return {**found, "gaps": max(0.0, whole - sum(found.values())), "step": whole}
