"""The benchmark of `csrc`: its rows, what it refuses, and the figures that it derives."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import types

import pytest
import torch
from torch.nn import functional

import csrc
from csrc import benchmark
from csrc.benchmark import Case, Entry, Timings

SMALL = ("--rows 2 --slots 16 --hidden 16 --vocab 50 --rounds 3 --calls 2 --warmup 1 "
         "--device cpu").split()
HAS_LINEAR_CROSS_ENTROPY = hasattr(functional, "linear_cross_entropy")  # since torch 2.13
ROWS = ["full_logits", "gather_eager", "gather_compiled",
        *["linear_cross_entropy"] * HAS_LINEAR_CROSS_ENTROPY, "chunked"]
BOUND = 1e-4  # as for fp32


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing is compiled, and the optional libraries are not there."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for name in ("liger_kernel", "cut_cross_entropy", "quack"):
        monkeypatch.setitem(sys.modules, name, None)


def small_inputs(device: str = "cpu", **changes: int) -> benchmark.HeadBatch:
    case = dataclasses.replace(Case(2, 16, 16, 50, 0.5), **changes)
    return benchmark.make_inputs(case, device, torch.float32)


def results(row: Entry, inputs: benchmark.HeadBatch) -> dict[str, torch.Tensor]:
    return benchmark.first_call(row, inputs, 1.0)[1]


# ---------------------------------------------------------------------------------- the command


def test_every_row_is_measured(capsys):
    benchmark.main(SMALL)
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert {"platform", "processor", "cpus", "threads", "gpu", "versions", "commit", "command",
            "options", "cases"} <= result.keys()
    assert result["options"]["dtype"] == "fp32" and "torch" in result["versions"]
    (case,) = result["cases"]
    assert case["shape"] == {"rows": 2, "slots": 16, "hidden": 16, "vocab": 50, "rate": 0.15}
    assert case["masked"] == 5
    rows = {row["implementation"]: row for row in case["rows"]}
    assert list(rows) == ROWS
    for name, row in rows.items():
        assert row["calls"] == (3 if name == "full_logits" else 6)
        assert 0 < row["ms"]["p20"] <= row["ms"]["median"] <= row["ms"]["p80"]
        assert row["masked_tokens_per_second"] == pytest.approx(5000 / row["ms"]["median"])
        assert 0 < row["extra_mib"] <= row["peak_mib"]
        assert row["difference"] < BOUND and row["first_call_seconds"] > 0
    for name in ("full_logits", "gather_eager"):
        assert set(rows[name][f"speed_over_{name}"].values()) == {1.0}
        assert rows[name][f"memory_over_{name}"] == 1
    assert rows["chunked"]["memory_over_full_logits"] < rows["gather_eager"][
        "memory_over_full_logits"] < 0.5
    assert set(case["left_out"]) == {*benchmark.OTHERS} - {*ROWS}
    assert "left out: cut_cross_entropy: not installed" in out
    assert "first call, with compilation: gather_compiled" in out


def test_several_cases_in_one_run(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "CASES", {
        "one": Case(2, 8, 8, 20, 0.5), "two": Case(3, 8, 8, 20, 0.25), "three": Case(1, 8, 8, 9, 1)
    })
    line = "--cases two one --rounds 1 --calls 1 --warmup 1 --device cpu"
    benchmark.main(line.split())
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(case["name"], case["masked"]) for case in result["cases"]] == [("two", 6), ("one", 8)]


@pytest.mark.parametrize(("line", "word"), [
    ("--rows 0", "--rows 0"), ("--calls 0", "--calls 0"), ("--rate 0", "--rate 0"),
    ("--rate 1.5", "--rate 1.5"), ("--dtype fp64", "fp64"), ("--device cpu --dtype bf16", "fp32"),
    ("--row 2", "--row"), ("--cases huge", "bert-mini-15"),
    ("--cases bert-mini-15 --rows 2", "--rows"), ("--device cpu --chunk_rows 384", "--chunk_rows"),
])
def test_bad_flags_exit_with_2(line, word, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(line.split())
    assert stopped.value.code == 2
    assert word in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_row_compiles(monkeypatch):
    import torch._inductor.config as inductor

    monkeypatch.undo()
    inputs = small_inputs()
    row = benchmark.gather_compiled("cpu")
    with inductor.patch(compile_threads=1):  # no processes left behind
        got, want = results(row, inputs), results(benchmark.full_logits("cpu"), inputs)
    assert benchmark.check_agreement(got, want, BOUND) < BOUND
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]


# -------------------------------------------------------------------------- what is not measured


def scaled(factor: float):
    def operation(*arguments):
        loss, hits = csrc.reference.masked_lm_loss(*arguments)
        return factor * loss, hits
    return operation


def without_bias_gradient(hidden, positions, labels, head):
    head = dataclasses.replace(head, decoder_bias=head.decoder_bias.detach())
    return csrc.reference.masked_lm_loss(hidden, positions, labels, head)


@pytest.mark.parametrize(("wrong", "words"), [
    (scaled(2.0), "loss by 1.0e"), (without_bias_gradient, "in decoder_bias by 1.0e"),
    (scaled(float("nan")), "loss by nan"),
])
def test_a_wrong_implementation_is_refused(monkeypatch, wrong, words):
    monkeypatch.setitem(csrc.IMPLEMENTATIONS, "wrong", wrong)
    with pytest.raises(RuntimeError, match=f"wrong: differs .*{words}"):
        benchmark.main(SMALL)


def test_others_that_fail_are_left_out(monkeypatch, capsys):
    def no_compiler(function, **_):
        raise OSError("no C++ compiler\nand more")

    def wrong(device):
        return Entry(benchmark.after_gather(lambda rows, *_: rows.sum()), "")

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setitem(benchmark.OTHERS, "linear_cross_entropy", wrong)
    benchmark.main(SMALL)
    out = capsys.readouterr().out
    assert "left out: gather_compiled: OSError: no C++ compiler\n" in out
    assert "left out: linear_cross_entropy: RuntimeError: differs from the first row" in out
    rows = json.loads(out.splitlines()[-1])["cases"][0]["rows"]
    assert [row["implementation"] for row in rows] == ["full_logits", "gather_eager", "chunked"]


def test_without_its_baseline_a_row_has_no_ratio(monkeypatch, capsys):
    def no_memory(device):
        raise MemoryError("full")

    monkeypatch.setitem(benchmark.OTHERS, "full_logits", no_memory)
    benchmark.main(SMALL)
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["cases"][0]["rows"]
    assert [row["implementation"] for row in rows] == ROWS[1:]
    assert all(row["speed_over_full_logits"] is None for row in rows)


# ---------------------------------------------------------------------- libraries, by their shape


def check_row(row: Entry) -> None:
    inputs = small_inputs()
    want = results(benchmark.full_logits("cpu"), inputs)
    benchmark.check_agreement(results(row, inputs), want, BOUND)


def linear_loss(rows, weight, labels, bias=None, impl=None, reduction="mean"):
    logits = functional.linear(rows, weight, bias)
    return functional.cross_entropy(logits, labels, reduction=reduction)


def test_cut_cross_entropy(monkeypatch):
    module = types.SimpleNamespace(linear_cross_entropy=linear_loss)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", module)
    check_row(benchmark.cut_cross_entropy("cpu"))


def test_liger_on_a_gpu_only(monkeypatch):
    with pytest.raises(benchmark.LeftOut, match="GPU"):
        benchmark.liger("cpu")
    with pytest.raises(ImportError, match="liger_kernel"):
        benchmark.liger("cuda")
    module = types.SimpleNamespace(liger_fused_linear_cross_entropy=linear_loss)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", module)
    check_row(benchmark.liger("cuda"))


def test_quack_gets_a_bias_and_sizes_that_it_takes(monkeypatch):
    def chunked_linear_cross_entropy(x, weight, target, ignore_index=-100, reduction="mean"):
        assert not x.shape[0] % 8 and not x.shape[1] % 8 and not weight.shape[0] % 128
        return functional.cross_entropy(x @ weight.T, target, ignore_index=ignore_index,
                                        reduction=reduction)

    with pytest.raises(benchmark.LeftOut, match="GPU"):
        benchmark.quack("cpu")
    monkeypatch.setitem(sys.modules, "quack", types.ModuleType("quack"))
    module = types.SimpleNamespace(chunked_linear_cross_entropy=chunked_linear_cross_entropy)
    monkeypatch.setitem(sys.modules, "quack.linear_cross_entropy", module)
    check_row(benchmark.quack("cuda"))


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_rows_of_a_gpu(rate, monkeypatch):
    """On a CPU in Triton's interpreter; 10 or 32 rows of logits in chunks of 4."""
    pytest.importorskip("triton")
    from csrc import masked_lm_triton

    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = benchmark.make_inputs(Case(2, 16, 16, 50, rate), device, torch.float32)
    want = results(benchmark.full_logits(device), inputs)
    sizes, plain = [], masked_lm_triton._cross_entropy_kernel
    rows = benchmark.own_rows("cuda", [4])
    assert list(rows) == ["triton", "triton_gathered", "triton_chunks_4"]

    class Counted:
        def __getitem__(self, grid):
            sizes.append(grid[0])
            return plain[grid]

    monkeypatch.setattr(masked_lm_triton, "_cross_entropy_kernel", Counted())
    for name, make in rows.items():
        sizes.clear()
        benchmark.check_agreement(results(make(), inputs), want, BOUND)
        assert (max(sizes) == 4) == (name == "triton_chunks_4")
        assert sum(sizes) == len(inputs.labels)
    assert masked_lm_triton.CHUNK_ROWS == 0


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_plain_pytorch_in_16_bit(dtype):
    """The sum of 19,661 losses is more than fp16 holds; so is the scaled mean."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = benchmark.make_inputs(
        Case(128, 256, 16, 50, 0.6), device, benchmark.DTYPES[dtype])
    measured, left_out = benchmark.compare(inputs, dtype, {})
    assert {"full_logits", "gather_eager", "gather_compiled"} <= measured.keys(), left_out


# ---------------------------------------------------------------------------------- the figures


class KnownMemory(torch.autograd.Function):
    """1,000,000 bytes during the forward pass, 3,000,000 beside the gradient in the backward."""

    @staticmethod
    def forward(ctx, hidden):
        ctx.shape = hidden.shape
        torch.empty(250_000)
        return hidden.sum()

    @staticmethod
    def backward(ctx, grad):
        gradient = torch.zeros(ctx.shape)
        torch.empty(750_000)
        return gradient


def test_memory_of_a_known_function():
    inputs = small_inputs(rows=100, slots=100, hidden=50)
    gradient = 100 * 100 * 50 * 4
    for _ in range(2):  # not more the second time
        extra, peak = benchmark.measure_memory(lambda i: KnownMemory.apply(i.hidden), inputs, 1.0)
        assert extra == pytest.approx(3_000_000, abs=100)  # and a few scalars
        assert peak == pytest.approx(3_000_000 + gradient, abs=100)


@pytest.mark.gpu
def test_memory_on_a_gpu_is_the_allocators():
    inputs = small_inputs(device="cuda", vocab=30522, slots=512)
    operation = benchmark.gather_eager("cuda").operation
    benchmark.run(operation, inputs, 1.0)
    extra, peak = benchmark.measure_memory(operation, inputs, 1.0)
    inputs.clear_gradients()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    benchmark.run(operation, inputs, 1.0)
    assert peak == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.01)
    assert 0 < extra < peak


def test_figures_follow_from_the_rounds():
    row = Entry(lambda inputs: inputs.hidden, "")
    full = Timings(row, 0, 0, 800, 900, [[20.0], [20.0], [40.0]])
    fast = Timings(row, 0, 0, 100, 300, [[1.0, 3.0], [4.0, 4.0], [4.0, 4.0]])
    measured = {"full_logits": full, "gather_eager": fast}
    got = benchmark.summarise("gather_eager", measured, num_masked=8)
    # Rounds of 10, 5 and 10 times; the ratio of the medians would be 5.
    assert got["speed_over_full_logits"]["median"] == 10
    assert got["speed_over_full_logits"]["p20"] == pytest.approx(7)
    assert got["ms"]["median"] == 4 and got["calls"] == 6
    assert got["masked_tokens_per_second"] == 2000
    assert got["memory_over_full_logits"] == 0.125


def test_rows_take_turns_in_another_order_each_round(monkeypatch):
    turns = []

    def note(operation, *_):
        turns.append(operation)
        return 1.0

    monkeypatch.setattr(benchmark, "time_call", note)
    options, cases = benchmark.parse([*SMALL, "--rounds", "5"])
    measured = benchmark.measure(cases["given"], options)["rows"]
    assert [row["implementation"] for row in measured] == ROWS
    count = len(ROWS)
    warm = turns[:count]  # one each
    names = [ROWS[warm.index(operation)] for operation in turns[count:]]
    each = 1 + 2 * (count - 1)
    assert len(names) == 5 * each
    rounds = [names[start:start + each] for start in range(0, len(names), each)]
    assert [turn[0] for turn in rounds] == [*ROWS, *ROWS][:5]
    for turn in rounds:
        assert sorted(turn) == sorted(["full_logits", *(name for name in ROWS[1:] for _ in "ab")])


def test_labels_lie_at_the_masked_positions():
    inputs = small_inputs(hidden=64, vocab=5000, slots=100)
    assert (inputs.all_labels >= 0).sum() == len(inputs.labels) == 100
    assert torch.equal(inputs.all_labels[inputs.positions], inputs.labels)
