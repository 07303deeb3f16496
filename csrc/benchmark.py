"""Compare `masked_lm_loss` with its alternatives, forward and backward.

    python csrc/benchmark.py [--cases bert-mini-15 bert-base-15]

The rows of the table, all with the same inputs, transform (dense, GELU, layer norm) and decoder:

- `full_logits`: logits of every position, and cross entropy that ignores the unmasked ones, as in
  transformers' `BertForMaskedLM`. The baseline.
- `gather_eager`: gather the masked rows, then plain PyTorch. Only the implementations of `csrc`
  also count hits.
- `gather_compiled`: the same, decoder and cross entropy under `torch.compile`.
- `linear_cross_entropy`: the same, with PyTorch's function of that name.
- `liger`, `cut_cross_entropy`, `quack`: the same, with these libraries' functions, where installed.
- the entries of `csrc.IMPLEMENTATIONS` for the device.
- `triton_gathered`, on a GPU: gather, then `triton` without positions, as in training, where the
  last encoder layer has computed the masked rows only. With `--chunk_rows 384 640` also
  `triton_chunks_384` and so on: the same with so many rows of logits at a time.

A row that cannot run here is left out, and the reason is printed. Before anything is timed, the
mean loss and the gradients of `hidden` and of every tensor of the head must agree with those of the
first row. The rows are then interleaved over several rounds, each round in another order. Not
counted: the first two calls of each row (one is compared, one measures memory) and `--warmup` more.

Memory is the peak of PyTorch's allocator during a call: "extra" without the gradients that the call
returns, "peak" with them. Buffers inside the matrix library are not included.

`gather_compiled`, `cut_cross_entropy` and `quack` report their first call separately, because it
compiles; PyTorch keeps compiled code on disk, so set `TORCHINDUCTOR_CACHE_DIR` to an empty folder
to time it.

Every row is given gradients as in training: in fp16 the loss is scaled, and rows of plain PyTorch
add up their losses in fp32. A case in which every slot is masked (`gpu-gathered`) measures the head
without a gather, for every row but `triton`.

Letters: `B` rows, `S` slots of a row, `M` masked positions, `D` hidden size, `V` vocabulary.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

import csrc
from csrc import MaskedLMHead, reference

BASELINE = "full_logits"
GATHER = "gather_eager"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Largest difference from the first row, relative to the norm. In 16 bit it is mostly rounding of
# the logits, which changes a probability by as much.
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 2e-2}
# Without DeepSpeed's loss scale the gradients of single logits vanish in fp16: p / M is 7e-9. 2^16
# would itself be inf there, where a row returns its loss in fp16.
LOSS_SCALES = {"fp32": 1.0, "bf16": 1.0, "fp16": 2.0**15}
DECODER_STD = 0.02  # when BERT's training begins: logits of 0.3 to 0.6
FLUSH_BYTES = 512 * 2**20  # larger than any cache of a GPU
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """The shape of a batch: `rows` x `slots`, of which a share `rate` is masked."""

    rows: int
    slots: int
    hidden: int
    vocab: int
    rate: float


CASES = {
    "bert-mini-15": Case(32, 128, 256, 30522, 0.15),
    "bert-mini-8": Case(32, 128, 256, 30522, 0.08),
    "bert-base-15": Case(8, 128, 768, 30522, 0.15),
    "bert-base-8": Case(8, 128, 768, 30522, 0.08),
    "gpu-128-15": Case(256, 128, 768, 30522, 0.15),
    "gpu-128-8": Case(256, 128, 768, 30522, 0.08),
    "gpu-512-15": Case(256, 512, 768, 30522, 0.15),
    "gpu-512-8": Case(256, 512, 768, 30522, 0.08),
    "gpu-gathered": Case(4915, 1, 768, 30522, 1.0),
}
DEFAULT_CASES = {"cpu": [name for name in CASES if name.startswith("bert-")],
                 "cuda": [name for name in CASES if name.startswith("gpu-")]}


@dataclass(frozen=True)
class HeadBatch:
    """One batch.

    Attributes:
        hidden: output of the encoder, `(B, S, D)`.
        positions: masked positions, flat and ascending, `(M,)` int64.
        labels: original ids there, `(M,)` int64.
        all_labels: the same as `(B * S,)` int64, -100 elsewhere.
        head: with all tensors that it can have.
    """

    hidden: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    all_labels: torch.Tensor
    head: MaskedLMHead

    def leaves(self) -> dict[str, torch.Tensor]:
        """Return the tensors that gradients are computed for."""
        return {"hidden": self.hidden, **self.head.tensors()}

    def clear_gradients(self) -> None:
        """Drop the gradients, so that the next call allocates its own."""
        for tensor in self.leaves().values():
            tensor.grad = None


def make_inputs(case: Case, device: str, dtype: torch.dtype) -> HeadBatch:
    """Draw a batch and a head."""
    generator = torch.Generator().manual_seed(0)
    options: Any = {"device": device, "dtype": dtype}
    width, slots = case.hidden, case.rows * case.slots

    def normal(*shape: int, std: float) -> torch.Tensor:
        return (std * torch.randn(*shape, generator=generator)).to(**options)

    head = MaskedLMHead(
        decoder_weight=normal(case.vocab, width, std=DECODER_STD),
        decoder_bias=normal(case.vocab, std=0.1),
        dense_weight=normal(width, width, std=width**-0.5), dense_bias=normal(width, std=0.1),
        norm_weight=1 + normal(width, std=0.1), norm_bias=normal(width, std=0.1),
    )
    hidden = normal(case.rows, case.slots, width, std=1.0)
    num_masked = max(1, round(case.rate * slots))
    positions = torch.randperm(slots, generator=generator)[:num_masked].sort().values.to(device)
    labels = torch.randint(case.vocab, (num_masked,), generator=generator).to(device)
    all_labels = torch.full((slots,), -100, device=device)
    all_labels[positions] = labels
    inputs = HeadBatch(hidden, positions, labels, all_labels, head)
    for tensor in inputs.leaves().values():
        tensor.requires_grad_()
    return inputs


# ----------------------------------------------------------------------------------------- rows

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Operation = Callable[[HeadBatch], torch.Tensor]


class LeftOut(Exception):
    """The reason why a row cannot run here."""


@dataclass(frozen=True)
class Entry:
    """A row of the table; `operation` returns the mean loss over the masked positions, a scalar."""

    operation: Operation
    note: str
    compiles: bool = False


def gather(inputs: HeadBatch) -> torch.Tensor:
    """Return the masked rows, `(M, D)`; if every slot is masked they are all rows as they are."""
    rows = inputs.hidden.flatten(0, 1)
    every = len(inputs.positions) == len(rows)
    return rows if every else rows.index_select(0, inputs.positions)


def after_gather(loss: Loss) -> Operation:
    """Make an operation: gather, transform, and call `loss(rows, weight, bias, labels)`."""
    def operation(inputs: HeadBatch) -> torch.Tensor:
        head = inputs.head
        assert head.decoder_bias is not None
        return loss(reference.transform(gather(inputs), head), head.decoder_weight,
                    head.decoder_bias, inputs.labels)

    return operation


def mean_loss(scores: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor:
    """Return the mean cross entropy of `count` rows, fp32: in fp16 the sum may be inf."""
    losses = functional.cross_entropy(scores, labels, ignore_index=-100, reduction="none")
    return losses.float().sum() / count


def plain_loss(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor
               ) -> torch.Tensor:
    """Apply decoder and cross entropy, `(M, D)` to a scalar."""
    return mean_loss(functional.linear(rows, weight, bias), labels, len(labels))


# Each of the following functions makes the row of its name for a device.


def full_logits(device: str) -> Entry:
    return Entry(
        lambda inputs: mean_loss(
            reference.logits(inputs.hidden.flatten(0, 1), inputs.head), inputs.all_labels,
            len(inputs.labels)),
        "takes the bias and an ignore index")


def gather_eager(device: str) -> Entry:
    return Entry(after_gather(plain_loss), "takes the bias and an ignore index")


def gather_compiled(device: str) -> Entry:
    compiled = torch.compile(plain_loss, dynamic=False)
    return Entry(after_gather(compiled), "takes the bias and an ignore index", compiles=True)


def linear_cross_entropy(device: str) -> Entry:
    function = getattr(functional, "linear_cross_entropy", None)
    if function is None:
        raise LeftOut(f"torch {torch.__version__} lacks it; 2.13 has it")
    # The default, `LinearCrossEntropyOptions()`, uses chunks of 1 to 4 rows at these sizes and is
    # ten times slower (2 cores of an AMD EPYC, torch 2.13, fp32).
    options = torch.nn.LinearCrossEntropyOptions(chunking_method=None)

    operation = after_gather(lambda rows, weight, bias, labels: function(
        rows, weight, labels, linear_bias=bias, options=options))
    return Entry(operation, "takes the bias and an ignore index; one chunk")


def liger(device: str) -> Entry:
    if device != "cuda":
        raise LeftOut("runs on GPUs only")
    library = importlib.import_module("liger_kernel.transformers.functional")
    # Not "mean": it would divide by M before it stores gradients of logits in 16 bit.
    operation = after_gather(lambda rows, weight, bias, labels: (
        library.liger_fused_linear_cross_entropy(rows, weight, labels, bias=bias, reduction="sum")
        / len(labels)))
    return Entry(operation, "takes the bias and an ignore index")


def cut_cross_entropy(device: str) -> Entry:
    library = importlib.import_module("cut_cross_entropy")
    # Its filter drops the gradients of small probabilities: most of them, when training begins.
    options = {"filter_eps": None} if device == "cuda" else {"impl": "torch_compile"}
    operation = after_gather(lambda rows, weight, bias, labels: library.linear_cross_entropy(
        rows, weight, labels, bias=bias, **options))
    how = "no filter" if device == "cuda" else "impl torch_compile"
    return Entry(operation, f"takes the bias and an ignore index; {how}", compiles=True)


def quack(device: str) -> Entry:
    if device != "cuda":
        raise LeftOut("runs on GPUs only")
    library = importlib.import_module("quack.linear_cross_entropy")

    def loss(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor
             ) -> torch.Tensor:
        # It takes no bias, and sizes in eights only. So the bias is one more column of the weight,
        # beside ones; added ids have a probability of 0, and added rows a label that is ignored.
        extra_rows, extra_ids = -len(rows) % 8, -len(weight) % 128
        ones = functional.pad(rows.new_ones(len(rows), 1), (0, 7))
        column = functional.pad(bias, (0, extra_ids), value=-1e4)
        weight = torch.cat([functional.pad(weight, (0, 0, 0, extra_ids)),
                            functional.pad(column[:, None], (0, 7))], 1)
        rows = functional.pad(torch.cat([rows, ones], 1), (0, 0, 0, extra_rows))
        ids = functional.pad(labels, (0, extra_rows), value=-100)
        total = library.chunked_linear_cross_entropy(rows, weight, ids, reduction="sum")
        return total / len(labels)

    return Entry(after_gather(loss), "the bias as a column of the weight; no ids but in eights",
                 compiles=True)


def implementation(name: str) -> Entry:
    """Make the row of an entry of `csrc.IMPLEMENTATIONS`."""
    if name == "triton":
        importlib.import_module("triton")

    def operation(inputs: HeadBatch) -> torch.Tensor:
        arguments = (inputs.hidden, inputs.positions, inputs.labels, inputs.head)
        return csrc.masked_lm_loss(*arguments, implementation=name)[0] / len(inputs.labels)

    return Entry(operation, "takes the bias; gathers and counts hits too")


def triton_gathered(chunk_rows: int = 0) -> Entry:
    """Make the row of `triton` on gathered rows, with `CHUNK_ROWS` of its file."""
    file: Any = importlib.import_module("csrc.masked_lm_triton")

    def operation(inputs: HeadBatch) -> torch.Tensor:
        usual, file.CHUNK_ROWS = file.CHUNK_ROWS, chunk_rows
        try:
            loss, _ = csrc.masked_lm_loss(
                gather(inputs), None, inputs.labels, inputs.head, implementation="triton")
        finally:
            file.CHUNK_ROWS = usual
        return loss / len(inputs.labels)

    return Entry(operation, "takes the bias; counts hits too")


def own_rows(device: str, chunk_rows: list[int]) -> dict[str, Callable[[], Entry]]:
    """Return what makes the rows of `csrc` for a device, by name."""
    rows: dict[str, Callable[[], Entry]] = {
        name: functools.partial(implementation, name) for name in csrc.IMPLEMENTATIONS
        if name not in NOT_MEASURED[device]}
    if device == "cuda":
        rows["triton_gathered"] = triton_gathered
        rows |= {f"triton_chunks_{number}": functools.partial(triton_gathered, number)
                 for number in chunk_rows}
    return rows


OTHERS: dict[str, Callable[[str], Entry]] = {make.__name__: make for make in (
    full_logits, gather_eager, gather_compiled, linear_cross_entropy, liger, cut_cross_entropy,
    quack)}
# Of `csrc`: those for other devices, and the one that `gather_eager` represents.
NOT_MEASURED = {"cpu": {"reference", "triton"}, "cuda": {"reference", "chunked"}}


# ------------------------------------------------------------------------------------ measuring


@dataclass
class Timings:
    """Measurements of one row.

    Attributes:
        row: what ran.
        first_call_seconds: including compilation, if any.
        difference: largest difference from the first row, relative to the norm.
        extra_bytes: peak memory beyond inputs and returned gradients.
        peak_bytes: the same including these gradients.
        rounds: milliseconds of each counted call, by round.
    """

    row: Entry
    first_call_seconds: float
    difference: float
    extra_bytes: int = 0
    peak_bytes: int = 0
    rounds: list[list[float]] = dataclasses.field(default_factory=list)


def run(operation: Operation, inputs: HeadBatch, scale: float) -> torch.Tensor:
    """Run forward and backward; return the mean loss. The gradients are scaled by `scale`."""
    loss = operation(inputs)
    (scale * loss.float()).backward()
    return loss.detach()


def time_call(operation: Operation, inputs: HeadBatch, scale: float,
              flush: torch.Tensor | None) -> float:
    """Time one forward and backward, in ms; on a GPU with caches emptied by `flush`."""
    inputs.clear_gradients()
    if flush is None:
        start = time.perf_counter()
        run(operation, inputs, scale)
        return 1000 * (time.perf_counter() - start)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    # This fills the caches with other data, and keeps the GPU busy while the host gets ahead of it,
    # as the encoder does in training.
    flush.zero_()
    events[0].record()
    run(operation, inputs, scale)
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1])


def allocations(call: Callable[[], Any], device: str) -> list[tuple[int, int]]:
    """List address and size of every block that PyTorch allocates during `call`, in order.

    Sizes are in bytes, negative when a block is freed. PyTorch's profiler sees all of them, also in
    autograd functions and compiled code. Blocks from before `call` are not among them.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler greets on stderr
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        call()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    device_type = {"cpu": 0, "cuda": 1}[device]  # c10::DeviceType
    found = [event for event in events
             if event["name"] == "[memory]" and event["args"]["Device Type"] == device_type]
    found.sort(key=lambda event: event["ts"])
    return [(event["args"]["Addr"], event["args"]["Bytes"]) for event in found]


def measure_memory(operation: Operation, inputs: HeadBatch, scale: float) -> tuple[int, int]:
    """Measure the peak memory of one call, in bytes, without and with the returned gradients."""
    inputs.clear_gradients()
    events = allocations(lambda: run(operation, inputs, scale), inputs.hidden.device.type)
    gradients = [t.grad.untyped_storage() for t in inputs.leaves().values() if t.grad is not None]
    # Addresses are reused; the gradient is the last block at its address.
    last = {address: number for number, (address, size) in enumerate(events) if size > 0}
    returned = {last[storage.data_ptr()] for storage in gradients}
    extra = total = extra_peak = total_peak = 0
    for number, (_, size) in enumerate(events):
        total += size
        extra += 0 if number in returned else size
        extra_peak, total_peak = max(extra_peak, extra), max(total_peak, total)
    return extra_peak, total_peak


def first_call(
    row: Entry, inputs: HeadBatch, scale: float
) -> tuple[float, dict[str, torch.Tensor]]:
    """Run a row for the first time; return seconds, and mean loss and gradients by name."""
    inputs.clear_gradients()
    start = time.perf_counter()
    results = {"loss": run(row.operation, inputs, scale)}
    results["loss"].item()  # waits for the GPU
    seconds = time.perf_counter() - start
    for name, tensor in inputs.leaves().items():
        results[name] = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
    return seconds, results


def check_agreement(
    got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float
) -> float:
    """Return the largest difference, relative to the norm of the expected values.

    Raises:
        RuntimeError: it is larger than `tolerance`.
    """
    shares = {
        name: float((got[name].float() - value.float()).norm() / value.float().norm())
        for name, value in want.items()
    }
    wrong = [f"{name} by {share:.1e}" for name, share in shares.items() if not share <= tolerance]
    if wrong:
        raise RuntimeError(f"differs from the first row, relative to the norm, in "
                           f"{', '.join(wrong)}; allowed is {tolerance:g}")
    return max(shares.values())


def compare(
    inputs: HeadBatch, dtype: str, own: dict[str, Callable[[], Entry]]
) -> tuple[dict[str, Timings], dict[str, str]]:
    """Call every row once and compare it with the first one that runs.

    Args:
        inputs: the batch.
        dtype: a name in `DTYPES`.
        own: the rows of `csrc`; see `own_rows`.
    Returns:
        The rows that run and agree, and the reason for each that does not.
    Raises:
        RuntimeError: an implementation of `csrc` fails or disagrees.
    """
    device = inputs.hidden.device.type
    measured: dict[str, Timings] = {}
    left_out: dict[str, str] = {}
    want: dict[str, torch.Tensor] = {}
    for name in (*OTHERS, *own):
        try:
            row = OTHERS[name](device) if name in OTHERS else own[name]()
            seconds, got = first_call(row, inputs, LOSS_SCALES[dtype])
            difference = check_agreement(got, want or got, TOLERANCES[dtype])
        except LeftOut as reason:
            left_out[name] = str(reason)
        except ImportError as error:
            left_out[name] = f"not installed ({error})"
        except Exception as error:
            if name not in OTHERS:
                raise RuntimeError(f"{name}: {error}") from error
            # Others fail in many ways: no compiler, no memory, no kernel for this GPU.
            left_out[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        else:
            want = want or got
            measured[name] = Timings(row, seconds, difference)
    inputs.clear_gradients()
    return measured, left_out


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Compare the rows on one case, measure their memory, then time them, interleaved."""
    device, scale = options.device, LOSS_SCALES[options.dtype]
    torch.compiler.reset()  # else `dynamic=False` counts the other cases as recompilations
    inputs = make_inputs(case, device, DTYPES[options.dtype])
    measured, left_out = compare(inputs, options.dtype, own_rows(device, options.chunk_rows))
    on_gpu = device == "cuda"
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if on_gpu else None
    for one in measured.values():
        one.extra_bytes, one.peak_bytes = measure_memory(one.row.operation, inputs, scale)
        for _ in range(options.warmup):
            time_call(one.row.operation, inputs, scale, flush)
    names = list(measured)
    for number in range(options.rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            one = measured[name]
            calls = 1 if name == BASELINE else options.calls
            one.rounds.append([
                time_call(one.row.operation, inputs, scale, flush) for _ in range(calls)
            ])
    return {
        "shape": dataclasses.asdict(case), "masked": len(inputs.labels),
        "rows": [summarise(name, measured, len(inputs.labels)) for name in names],
        "left_out": left_out,
    }


# ------------------------------------------------------------------------------------ reporting


def spread(values: torch.Tensor) -> dict[str, float]:
    """Return the median and the 20th and 80th percentile."""
    levels = {"p20": 0.2, "median": 0.5, "p80": 0.8}
    return {name: values.quantile(level).item() for name, level in levels.items()}


def summarise(name: str, measured: dict[str, Timings], num_masked: int) -> dict[str, Any]:
    """Return a row of the table; ratios are those of round medians, None without the other row."""
    one = measured[name]
    times = torch.tensor(one.rounds)
    ms = spread(times.flatten())
    row: dict[str, Any] = {
        "implementation": name,
        "ms": ms,
        "calls": times.numel(),
        "masked_tokens_per_second": 1000 * num_masked / ms["median"],
        "extra_mib": one.extra_bytes / MIB,
        "peak_mib": one.peak_bytes / MIB,
        "first_call_seconds": one.first_call_seconds,
        "difference": one.difference,
        "compiles": one.row.compiles,
        "note": one.row.note,
    }
    for other in (BASELINE, GATHER):
        there = measured.get(other)
        row[f"speed_over_{other}"] = spread(
            torch.tensor(there.rounds).quantile(0.5, 1) / times.quantile(0.5, 1)
        ) if there else None
        row[f"memory_over_{other}"] = one.extra_bytes / there.extra_bytes if there else None
    return row


def format_spread(values: dict[str, float] | None, digits: int) -> str:
    return "{median:.{n}f} ({p20:.{n}f}-{p80:.{n}f})".format(n=digits, **values) if values else "-"


def format_case(case: dict[str, Any]) -> str:
    """Format one case as text."""
    shape = case["shape"]
    lines = [
        f"{case['name']}: {shape['rows']} rows x {shape['slots']} slots, {case['masked']} masked, "
        f"D {shape['hidden']}, V {shape['vocab']}",
        f"{'implementation':<21}{'ms':>24}{'x full':>8}{'x gather':>18}{'masked/s':>10}"
        f"{'extra MiB':>11}{'of full':>9}{'peak MiB':>10}",
    ]
    for row in case["rows"]:
        speed, share = row[f"speed_over_{BASELINE}"], row[f"memory_over_{BASELINE}"]
        times = f"{speed['median']:.2f}" if speed else "-"
        lines.append(
            f"{row['implementation']:<21}{format_spread(row['ms'], 1):>24}"
            f"{times:>8}{format_spread(row[f'speed_over_{GATHER}'], 2):>18}"
            f"{row['masked_tokens_per_second']:>10,.0f}{row['extra_mib']:>11.1f}"
            f"{f'{share:.3f}' if share else '-':>9}{row['peak_mib']:>10.1f}"
        )
    compiled = [f"{row['implementation']} {row['first_call_seconds']:.1f} s"
                for row in case["rows"] if row["compiles"]]
    if compiled:
        lines.append(f"first call, with compilation: {', '.join(compiled)}")
    lines += [f"left out: {name}: {reason}" for name, reason in case["left_out"].items()]
    return "\n".join(lines)


def environment(device: str) -> dict[str, Any]:
    """Return machine, versions and the commit of these sources, with "+" if they differ from it."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "triton", "liger_kernel", "cut_cross_entropy", "quack-kernels"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    git = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    commit, root = None, Path(__file__).parents[1]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        if (root / ".git").exists():  # installed: git would name whatever is around us
            commit = subprocess.check_output(
                git, cwd=root, stderr=subprocess.DEVNULL, text=True).strip()
    return {
        "platform": platform.platform(),
        "processor": model[1] if model else platform.processor(), "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "versions": versions, "commit": commit, "command": " ".join(sys.argv),
    }


# ------------------------------------------------------------------------------------ the command


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, Case]]:
    """Read the command line; wrong values end in argparse's exit 2.

    Returns:
        The options, and the cases to measure by name.
    """
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0],
                                     allow_abbrev=False)
    parser.add_argument("--device", choices=tuple(DEFAULT_CASES), default="cuda" if gpu else "cpu")
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), metavar="CASE",
                        help=f"of {', '.join(CASES)} (on a CPU those of bert-, else of gpu-)")
    one = parser.add_argument_group("one case instead: the first of the device, changed by")
    for field in dataclasses.fields(Case):
        one.add_argument(f"--{field.name}", type=float if field.name == "rate" else int)
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="(fp32 on a CPU, bf16 on a GPU)")
    numbers = (("rounds", 10, 30, "rounds; each runs every row of the table"),
               ("calls", 2, 5, f"counted calls per row and round (1 of {BASELINE})"),
               ("warmup", 1, 10, "calls per row that are dropped, beyond the first two"))
    for name, on_cpu, on_gpu, text in numbers:
        parser.add_argument(f"--{name}", type=int,
                            help=f"{text} ({on_cpu} on a CPU, {on_gpu} on a GPU)")
    parser.add_argument("--chunk_rows", type=int, nargs="+", default=[], metavar="ROWS",
                        help="also measure triton with so many rows of logits at a time; "
                             "on a GPU (none)")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not gpu:
        parser.error("--device cuda: there is no CUDA device; give --device cpu")
    if options.chunk_rows and options.device == "cpu":
        parser.error(f"--chunk_rows {options.chunk_rows[0]}: measured on a GPU only; leave it out")
    for value in options.chunk_rows:
        if value < 1:
            parser.error(f"--chunk_rows {value}: must be 1 or more")
    on_cpu = options.device == "cpu"
    options.dtype = options.dtype or ("fp32" if on_cpu else "bf16")
    if on_cpu and options.dtype != "fp32":
        parser.error(f"--dtype {options.dtype}: on a CPU it must be fp32")
    for name, small, large, _ in numbers:
        if getattr(options, name) is None:
            setattr(options, name, small if on_cpu else large)
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(Case)
             if getattr(options, field.name) is not None}
    if given and options.cases:
        parser.error(f"--cases and --{next(iter(given))}: give one or the other")
    for name in ("rounds", "calls", "warmup", "rows", "slots", "hidden", "vocab"):
        value = given.get(name, getattr(options, name))
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: must be 1 or more")
    if not 0 < given.get("rate", 1) <= 1:
        parser.error(f"--rate {given['rate']}: must be in (0, 1]")
    names = options.cases or DEFAULT_CASES[options.device]
    if given:
        return options, {"given": dataclasses.replace(CASES[names[0]], **given)}
    return options, {name: CASES[name] for name in names}


def main(argv: list[str] | None = None) -> None:
    """The command."""
    options, cases = parse(argv)
    print(f"masked_lm_loss, forward and backward, {options.dtype}\n"
          f"counted: {options.rounds} rounds of {options.calls} calls ({BASELINE}: of 1); dropped: "
          f"the first {2 + options.warmup} calls of each row\n"
          "in brackets: 20th to 80th percentile; x full, x gather: speedup over that row; "
          "MiB: peak beyond\nthe inputs, without (extra) and with (peak) the returned gradients")
    results: list[dict[str, Any]] = []
    notes: dict[str, str] = {}
    for name, case in cases.items():
        results.append({"name": name, **measure(case, options)})
        print(f"\n{format_case(results[-1])}", flush=True)
        notes |= {row["implementation"]: row["note"] for row in results[-1]["rows"]}
    print("\n" + "\n".join(f"{name}: {note}" for name, note in notes.items()))
    kept = ("device", "dtype", "rounds", "calls", "warmup", "chunk_rows")
    print(json.dumps({
        "benchmark": "masked_lm_loss", **environment(options.device),
        "options": {name: getattr(options, name) for name in kept}, "cases": results,
    }))


if __name__ == "__main__":
    main()
