"""Each implementation of an operation against its baselines, forward and backward.

    python csrc/benchmark.py [--rows 256 --hidden 768]

`masked_lm_loss`: every entry of `csrc.IMPLEMENTATIONS` against `all_positions`, the head on every
position with the unmasked ones ignored in the loss, which is what transformers' `...ForMaskedLM`
computes. The head is BERT's: dense, GELU, layer norm, vocabulary projection with bias. They take
turns over several rounds, each round in another order; the warm-up is dropped. Before anything is
timed, each loss must agree with that of `all_positions`.

Letters: `B` rows, `S` slots of a row, `M` masked positions, `D` hidden size, `V` vocabulary.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import csrc

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BASELINE = "all_positions"
Operation = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def all_positions(
    hidden: torch.Tensor, masked_positions: torch.Tensor, masked_labels: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss with logits of every position; arguments as in `csrc.masked_lm_loss`."""
    labels = torch.full((hidden.shape[0] * hidden.shape[1],), -100, device=hidden.device)
    labels[masked_positions] = masked_labels
    logits = head(hidden.flatten(0, -2)).float()
    loss = functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
    return loss, labels.new_zeros(())  # transformers counts no hits


def operations() -> dict[str, Operation]:
    """The baseline, then every implementation through the public function."""
    def through(name: str) -> Operation:
        return functools.partial(csrc.masked_lm_loss, implementation=name)

    return {BASELINE: all_positions, **{name: through(name) for name in csrc.IMPLEMENTATIONS}}


def make_inputs(arguments: argparse.Namespace) -> tuple[tuple[torch.Tensor, ...], nn.Module]:
    """Hidden states `(B, S, D)`, masked positions and labels `(M,)`, and the head."""
    torch.manual_seed(0)
    width, slots = arguments.hidden, arguments.rows * arguments.slots
    options = {"device": arguments.device, "dtype": DTYPES[arguments.dtype]}
    head = nn.Sequential(
        nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, arguments.vocab)
    ).to(**options)
    hidden = torch.randn(arguments.rows, arguments.slots, width, **options).requires_grad_()
    num_masked = max(1, round(arguments.rate * slots))
    positions = torch.randperm(slots)[:num_masked].sort().values.to(arguments.device)
    labels = torch.randint(arguments.vocab, (num_masked,)).to(arguments.device)
    return (hidden, positions, labels), head


def run_once(operation: Operation, tensors: tuple[torch.Tensor, ...], head: nn.Module) -> float:
    """Forward and backward; returns milliseconds, the device's work included."""
    tensors[0].grad = None
    head.zero_grad()
    wait = torch.cuda.synchronize if tensors[0].is_cuda else (lambda: None)
    wait()
    start = time.perf_counter()
    loss, _ = operation(*tensors, head)
    loss.backward()
    wait()
    return 1000 * (time.perf_counter() - start)


def peak_memory_gib(operation: Operation, tensors: tuple[torch.Tensor, ...], head: nn.Module,
                    ) -> float | None:
    """GPU memory that one call needs beyond its arguments; None without a GPU."""
    if not tensors[0].is_cuda:
        return None
    tensors[0].grad = None
    head.zero_grad()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run_once(operation, tensors, head)
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def check_agreement(candidates: dict[str, Operation], tensors: tuple[torch.Tensor, ...],
                    head: nn.Module) -> None:
    """Raise RuntimeError if a loss differs from the baseline's by more than rounding."""
    tolerance = 1e-4 if tensors[0].dtype == torch.float32 else 1e-2
    with torch.no_grad():
        losses = {name: call(*tensors, head)[0].item() for name, call in candidates.items()}
    for name, loss in losses.items():
        if not abs(loss - losses[BASELINE]) <= tolerance * abs(losses[BASELINE]):
            raise RuntimeError(f"{name} gives loss {loss}, {BASELINE} {losses[BASELINE]}")


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row an operation: milliseconds of forward and backward, and memory."""
    tensors, head = make_inputs(arguments)
    candidates = operations()
    check_agreement(candidates, tensors, head)
    memory = {name: peak_memory_gib(call, tensors, head) for name, call in candidates.items()}
    for call in candidates.values():
        for _ in range(arguments.warmup):
            run_once(call, tensors, head)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for number in range(arguments.rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            for _ in range(arguments.calls):
                times[name].append(run_once(candidates[name], tensors, head))
    levels = torch.tensor([0.2, 0.5, 0.8])
    quantiles = {name: torch.tensor(t).quantile(levels).tolist() for name, t in times.items()}
    return [
        {
            "implementation": name,
            "ms": dict(zip(("p20", "median", "p80"), quantiles[name], strict=True)),
            "speedup": quantiles[BASELINE][1] / quantiles[name][1],
            "masked_tokens_per_second": 1000 * len(tensors[1]) / quantiles[name][1],
            "peak_memory_gib": memory[name],
            "calls": len(times[name]),
        }
        for name in names
    ]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; wrong values end in argparse's exit 2."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0],
                                     allow_abbrev=False)
    numbers = (
        ("rows", 256 if on_gpu else 8, "rows of the batch"),
        ("slots", 128, "token slots of a row"),
        ("hidden", 768 if on_gpu else 256, "hidden size"),
        ("vocab", 30522, "size of the vocabulary"),
        ("rounds", 5, "rounds; implementations take turns in each"),
        ("calls", 10 if on_gpu else 2, "counted calls of a turn"),
        ("warmup", 3, "calls of each implementation that are dropped"),
    )
    for name, default, text in numbers:
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    parser.add_argument("--rate", type=float, default=0.15, help="masked share of the slots (0.15)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if on_gpu else "fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if on_gpu else "cpu")
    arguments = parser.parse_args(argv)
    for name, _, _ in numbers:
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)}: must be 1 or more")
    if not 0 < arguments.rate <= 1:
        parser.error(f"--rate {arguments.rate}: must be in (0, 1]")
    if arguments.device == "cuda" and not on_gpu:
        parser.error("--device cuda: there is no CUDA device; give --device cpu")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """The command."""
    arguments = parse(argv)
    rows = measure(arguments)
    print(f"masked_lm_loss, forward and backward: {arguments.rows} rows x {arguments.slots} slots, "
          f"{100 * arguments.rate:g} % masked, D {arguments.hidden}, V {arguments.vocab}, "
          f"{arguments.dtype}; dropped: {arguments.warmup} warm-up calls each")
    print(f"{'implementation':<20}{'ms (p20-p80)':>28}{'speedup':>9}{'masked/s':>12}{'GiB':>8}")
    for row in rows:
        ms, memory = row["ms"], row["peak_memory_gib"]
        timing = f"{ms['median']:.2f} ({ms['p20']:.2f}-{ms['p80']:.2f})"
        print(f"{row['implementation']:<20}{timing:>28}{row['speedup']:>9.2f}"
              f"{row['masked_tokens_per_second']:>12,.0f}"
              f"{'-' if memory is None else f'{memory:.2f}':>8}")
    gpu = torch.cuda.get_device_name() if arguments.device == "cuda" else None
    print(json.dumps({
        "benchmark": "masked_lm_loss", "options": vars(arguments), "gpu": gpu,
        "platform": platform.platform(), "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(), "python": platform.python_version(),
        "torch": torch.__version__, "command": " ".join(sys.argv), "rows": rows,
    }))


if __name__ == "__main__":
    main()
