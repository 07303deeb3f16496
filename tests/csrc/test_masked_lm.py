"""`masked_lm_loss` against the plain expression that it equals: values, gradients, refusals.

The truth is float64. An implementation's error may be three times that of plain PyTorch in the
same dtype. Without a GPU, Triton's kernels run in its interpreter; `test_masked_lm_triton.py` has
more tests of them.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

import csrc
from csrc import masked_lm_chunked
from tests.support.heads import (
    cast,
    check,
    draw_case,
    make_batch,
    make_head,
    outcome,
    poisoned_memory,
)

# With a GPU, Triton's interpreter is off.
ON_CPU = [name for name in sorted(csrc.IMPLEMENTATIONS)
          if name != "triton" or not torch.cuda.is_available()]
CASES = [*((name, "cpu") for name in ON_CPU), ("reference", "cuda"), ("triton", "cuda")]
EVERY_CASE = pytest.mark.parametrize("implementation, device", [
    pytest.param(name, device, marks=[pytest.mark.gpu] if device == "cuda" else [])
    for name, device in CASES
])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# --------------------------------------------------------------------------- values, gradients


def test_reference_is_full_logits_with_the_unmasked_ignored():
    head, (hidden, positions, labels) = make_head(16, 37), make_batch((3, 8, 16), [0, 5, 23], 37, 2)
    loss, hits, gradients = outcome("reference", hidden, positions, labels, head,
                                    dtype=torch.float64)
    hidden.requires_grad_()
    dense = functional.linear(hidden, head.dense_weight, head.dense_bias)
    rows = functional.layer_norm(
        functional.gelu(dense), (16,), head.norm_weight, head.norm_bias, head.norm_eps
    )
    logits = functional.linear(rows, head.decoder_weight, head.decoder_bias).flatten(0, 1)
    wanted = torch.full((24,), -100)
    wanted[positions[:3]] = labels[:3]
    expected = functional.cross_entropy(logits, wanted, reduction="sum")
    torch.testing.assert_close(loss, expected.detach())
    assert hits == int((logits.argmax(-1) == wanted).sum())
    torch.testing.assert_close(gradients["hidden"], torch.autograd.grad(expected, hidden)[0])


SHAPES = {
    "padded": ((3, 8, 16), [0, 5, 7, 8, 23], 4, 37),
    "no padding": ((3, 8, 16), [0, 5, 7, 8, 23], 0, 37),
    "flat": ((24, 16), [2, 3, 23], 2, 37),
    "every position": ((5, 7, 16), list(range(35)), 0, 41),
    "one of one": ((1, 1, 8), [0], 0, 3),
    "more than one tile": ((4, 64, 48), list(range(0, 256, 2)), 5, 300),
}


@EVERY_CASE
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_truth(shape, implementation, device):
    size, masked, padding, vocab = SHAPES[shape]
    check(implementation, make_batch(size, masked, vocab, padding), make_head(size[-1], vocab),
          device=device, grad_output=-0.37)


@EVERY_CASE
@pytest.mark.parametrize(
    "options",
    [{"activation": "gelu_tanh"}, {"biases": False}, {"transform": False},
     {"transform": False, "biases": False}, "dense_bias", "norm_bias", "decoder_bias"],
    ids=["tanh", "no biases", "no transform", "decoder alone", "no dense bias", "no norm bias",
         "no decoder bias"],
)
def test_heads_of_every_family(options, implementation, device):
    given, absent = ({}, {options: None}) if isinstance(options, str) else (options, {})
    head = dataclasses.replace(make_head(24, 50, **given), **absent)
    check(implementation, make_batch((2, 16, 24), [0, 9, 17, 31], 50, 1), head, device=device)


@pytest.mark.parametrize("rows", [0, 1, 127, 128, 129])
@pytest.mark.parametrize("vocab", [1000, pytest.param(30522, marks=pytest.mark.slow),
                                   pytest.param(50368, marks=pytest.mark.slow)])
def test_chunked_at_the_edges_of_tiles(rows, vocab):
    check("chunked", make_batch((2, 80, 32), list(range(rows)), vocab, 3), make_head(32, vocab))


@pytest.mark.parametrize("rows, vocab", [
    (4915, 1000), pytest.param(4915, 30522, marks=pytest.mark.slow),
])
def test_chunked_over_several_chunks(rows, vocab, monkeypatch):
    # Chunks of 2,048 rows: three, the last one smaller.
    monkeypatch.setattr(masked_lm_chunked, "CHUNK_BYTES", 2048 * 4 * vocab)
    check("chunked", make_batch((5000, 16), list(range(rows)), vocab), make_head(16, vocab))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_chunked_with_any_shape(data):
    head, batch = draw_case(data, min_width=2, vocab=1200, rows=4, slots=40)
    with pytest.MonkeyPatch.context() as patch:
        chunk = 8 * len(head.decoder_weight) * data.draw(st.integers(1, 9))
        patch.setattr(masked_lm_chunked, "CHUNK_BYTES", chunk)
        patch.setattr(masked_lm_chunked, "GROUP_ROWS", data.draw(st.integers(1, 5)))
        found, truth = (outcome(name, *batch, head, dtype=torch.float64, grad_output=0.3)
                        for name in ("chunked", "reference"))
    torch.testing.assert_close(found, truth, rtol=1e-8, atol=1e-8)


def test_reference_gradients_against_finite_differences():
    hidden, positions, labels = make_batch((2, 3, 4), [1, 2, 5], 9, 2)
    head = cast(make_head(4, 9), torch.float64, "cpu")
    names = list(head.tensors())

    def loss(hidden, *tensors):
        varied = dataclasses.replace(head, **dict(zip(names, tensors, strict=True)))
        return csrc.masked_lm_loss(hidden, positions, labels, varied, "reference")[0]

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), *head.tensors().values()))


@EVERY_CASE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype, implementation, device):
    on_cpu = (("chunked", torch.float16), ("chunked", torch.bfloat16), ("triton", torch.bfloat16))
    if device == "cpu" and (implementation, dtype) in on_cpu:
        pytest.skip("float32 and float64 only, or products that the interpreter gets wrong")
    batch = make_batch((4, 9, 32), [0, 3, 9, 17, 35], 50, 3)
    for grad_output in (1.0, 2.0**16 / 600):  # a mean over 600 under a loss scale of 2^16
        check(implementation, batch, make_head(32, 50), dtype, device, grad_output)


@EVERY_CASE
def test_large_logits(implementation, device):
    """Shifted by 1e4, the logits lose digits; nothing overflows, and no more is lost."""
    head = make_head(16, 37, offset=1e4)
    check(implementation, make_batch((3, 8, 16), [0, 5, 7], 37), head, device=device)
    far = dataclasses.replace(head, decoder_bias=torch.linspace(-1e4, 1e4, 37).double())
    check(implementation, make_batch((3, 8, 16), [0, 5, 7], 37), far, device=device)


@EVERY_CASE
def test_uninitialised_memory_is_never_read(implementation, device):
    batch, head = make_batch((3, 8, 16), [0, 5, 7], 37, 6), make_head(16, 37)
    with poisoned_memory():
        check(implementation, batch, head, device=device)


# ------------------------------------------------------------------------------ padding, nothing


@EVERY_CASE
@pytest.mark.parametrize("capacity", [0, 6])
def test_no_masked_position(capacity, implementation, device):
    batch = make_batch((3, 8, 16), [], 37, capacity)
    loss, hits, gradients = outcome(implementation, *batch, make_head(16, 37), device=device)
    assert loss == 0 and hits == 0
    # Every rank's backward pass must touch the same parameters.
    for gradient in gradients.values():
        assert not gradient.any() and torch.isfinite(gradient).all()


@EVERY_CASE
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_padding_has_no_weight(index, implementation, device):
    head, (hidden, positions, labels) = make_head(16, 37), make_batch((3, 8, 16), [0, 5, 7], 37)
    # The row that a clamped -1 would point at is the best guess of all.
    head.decoder_bias[labels[0]] += 20
    padded = [functional.pad(each, (0, 6), value=-1).to(index) for each in (positions, labels)]
    bare, *others = (
        outcome(implementation, hidden, *given, head, device=device, gathered=gathered)
        for given in ((positions, labels), padded) for gathered in (False, True)
    )
    for other in others:
        torch.testing.assert_close(bare, other, atol=1e-6, rtol=1e-6)


# --------------------------------------------------------------------------- what surrounds it


@EVERY_CASE
def test_hits(implementation, device):
    """Position p says p; of two largest logits the first one counts, as in argmax."""
    hidden = torch.eye(16)[None]
    weight = 30 * torch.eye(16)
    weight[5] = weight[4]
    head = cast(csrc.MaskedLMHead(weight), torch.float32, device)
    positions = torch.tensor([0, 1, 3, 4, -1])
    for at_four, expected in ((4, 3), (5, 2)):
        labels = torch.tensor([0, 2, 3, at_four, -1])
        loss, hits = csrc.masked_lm_loss(
            hidden.to(device), positions.to(device), labels.to(device), head, implementation
        )
        assert int(hits) == expected
        assert loss.item() == pytest.approx(30 + torch.tensor(2.0).log().item(), abs=1e-3)


@EVERY_CASE
def test_tied_weight_gets_both_gradients_and_accumulates(implementation, device):
    """The decoder is the embedding; two micro batches of half the rows are one of all."""
    made = make_head(16, 37)
    hidden, positions, labels = make_batch((4, 6, 16), [1, 5, 6, 11, 13, 22, 23], 37)
    ids = torch.randint(37, (4, 6))
    gradients = {}
    for name in ("reference", implementation):
        for parts in (1, 2):
            head = cast(made, torch.float32, device)
            table = head.decoder_weight
            for start in range(0, 4, 4 // parts):
                rows = slice(start, start + 4 // parts)
                embedded = functional.embedding(ids[rows].to(device), table)
                states = hidden[rows].float().to(device) + embedded
                here = (positions // 6 >= rows.start) & (positions // 6 < rows.stop)
                loss, _ = csrc.masked_lm_loss(
                    states, (positions[here] - 6 * rows.start).to(device),
                    labels[here].to(device), head, name,
                )
                (loss / 7).backward()
            gradients[name, parts] = {key: t.grad for key, t in head.tensors().items()}
    expected = gradients["reference", 1]
    for found in gradients.values():
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ON_CPU)
def test_only_what_is_wanted_is_computed(implementation):
    made, (hidden, positions, labels) = make_head(16, 37), make_batch((3, 8, 16), [0, 5, 7], 37, 2)
    whole = outcome(implementation, hidden, positions, labels, made)
    head = cast(made, torch.float32, "cpu")
    with torch.no_grad():
        loss, hits = csrc.masked_lm_loss(hidden.float(), positions, labels, head, implementation)
    assert not loss.requires_grad
    torch.testing.assert_close((loss.double(), int(hits)), whole[:2])
    for name in ("hidden", *head.tensors()):
        head = cast(head, torch.float32, "cpu")
        states = hidden.float().requires_grad_(name == "hidden")
        for other, tensor in head.tensors().items():
            tensor.requires_grad_(other == name)
        loss, _ = csrc.masked_lm_loss(states, positions, labels, head, implementation)
        wanted = states if name == "hidden" else head.tensors()[name]
        loss.backward()
        torch.testing.assert_close(wanted.grad.double(), whole[2][name])


def test_an_evaluation_forms_no_gradients():
    from torch.utils.flop_counter import FlopCounterMode

    batch, flops = make_batch((3, 8, 16), [0, 5, 7], 37), {}
    head = cast(make_head(16, 37), torch.float32, "cpu")
    for name in ("reference", "chunked"):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            csrc.masked_lm_loss(batch[0].float(), *batch[1:], head, name)
        flops[name] = counter.get_total_flops()
    assert 0 < flops["chunked"] <= flops["reference"]


@pytest.mark.parametrize("implementation", [name for name in ON_CPU if name != "reference"])
def test_a_second_backward_pass_is_refused(implementation):
    hidden, positions, labels = make_batch((3, 8, 16), [0, 5], 37)
    head = cast(make_head(16, 37), torch.float32, "cpu")
    loss, _ = csrc.masked_lm_loss(hidden.float(), positions, labels, head, implementation)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward runs once"):
        loss.backward()


def test_the_implementation_that_is_taken():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert csrc.default_implementation(cpu, torch.float32) == "chunked"
    assert csrc.default_implementation(cpu, torch.float64) == "chunked"
    assert csrc.default_implementation(cpu, torch.bfloat16) == "reference"
    assert csrc.default_implementation(gpu, torch.float16) in ("triton", "reference")
    hidden, positions, labels = make_batch((3, 8, 16), [0, 5], 37)
    head = cast(make_head(16, 37), torch.float32, "cpu")
    loss, _ = csrc.masked_lm_loss(hidden.float(), positions, labels, head)
    assert "DecoderLoss" in type(loss.grad_fn).__name__
    assert csrc.masked_lm_loss(
        hidden.bfloat16(), positions, labels, cast(head, torch.bfloat16, "cpu"))[0] > 0


# -------------------------------------------------------------------------------------- refusals


def int64(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


HEAD = cast(make_head(16, 37), torch.float32, "cpu")


@pytest.mark.parametrize("change, fragment", [
    ({"hidden": torch.zeros(4)}, r"hidden has shape \(4,\): must be \(B, S, D\) or \(T, D\)"),
    ({"hidden": torch.zeros(1, 2, 3, 4)}, "hidden has shape"),
    ({"hidden": torch.zeros(3, 8, 16).half()}, "head.decoder_weight has dtype torch.float32: must "
                                               "be torch.float16, as hidden"),
    ({"hidden": torch.zeros(3, 8, 12)}, r"head.decoder_weight has shape \(37, 16\): must be"),
    ({"positions": torch.zeros(2, 2, dtype=torch.int64)}, r"must be \(M,\)"),
    ({"positions": int64(1, 2)}, r"labels \(3,\) and masked_positions \(2,\): must be"),
    ({"positions": None}, r"\(3, 8, 16\): without masked_positions it must be \(3, D\)"),
    ({"positions": None, "hidden": torch.zeros(2, 16)}, "hidden has shape .* one row per label"),
    ({"positions": torch.zeros(3)}, "masked_positions has dtype torch.float32"),
    ({"labels": torch.zeros(3, dtype=torch.bool)}, "masked_labels has dtype torch.bool"),
    ({"labels": torch.zeros(3, dtype=torch.int16)}, "must be int32 or int64"),
    ({"labels": torch.zeros(3, dtype=torch.int64, device="meta")}, "is on meta, hidden on cpu"),
    ({"positions": int64(1, 5, 24)}, r"masked_positions\[2\] is 24: must be in \[0, 23\], or -1"),
    ({"positions": int64(-2, 5, 7)}, r"masked_positions\[0\] is -2"),
    ({"positions": int64(1, -1, 7)}, r"masked_positions\[1\] is -1, before another value"),
    ({"positions": int64(1, 5, -1)}, "masked_positions has 2 positions, masked_labels 3 labels"),
    ({"positions": int64(1, 7, 5)}, r"masked_positions\[2\] is 5 after 7: must be ascending"),
    ({"positions": int64(1, 7, 7)}, r"masked_positions\[2\] is 7 after 7: .* each position once"),
    ({"labels": int64(3, 37, 0)}, r"masked_labels\[1\] is 37: must be in \[0, 36\]"),
    ({"labels": int64(3, 4, -100)}, r"masked_labels\[2\] is -100: must be in"),
    ({"implementation": "triton9"}, r"'triton9': known are \['chunked', 'reference', 'triton'\]"),
    ({"head": dataclasses.replace(HEAD, norm_weight=None)}, "give both, or none of its tensors"),
    ({"head": dataclasses.replace(HEAD, dense_weight=None, norm_weight=None)}, "give both, or"),
    ({"head": dataclasses.replace(HEAD, activation="relu")}, "'relu': must be one of gelu, gelu_t"),
    ({"head": dataclasses.replace(HEAD, decoder_bias=torch.zeros(36))}, r"must be \(37,\)"),
    ({"head": dataclasses.replace(HEAD, dense_bias=torch.zeros(16, device="meta"))},
     "head.dense_bias is on meta, hidden on cpu"),
])
def test_refusals(change, fragment):
    given = {"hidden": torch.zeros(3, 8, 16), "positions": int64(1, 5, 7),
             "labels": int64(0, 36, 3), "head": HEAD, "implementation": None, **change}
    with pytest.raises(ValueError, match=fragment):
        csrc.masked_lm_loss(*given.values())


def test_chunked_says_what_it_does_not_do():
    batch = make_batch((3, 8, 16), [0, 5], 37)
    with pytest.raises(ValueError, match="float16 on cpu, must be float32 or float64 on a CPU; "
                                         "take 'reference'"):
        outcome("chunked", *batch, make_head(16, 37), dtype=torch.float16)


@pytest.mark.gpu
def test_values_on_a_gpu_are_looked_at_in_debug_mode_only(monkeypatch):
    hidden, _, labels = make_batch((3, 8, 16), [0, 5], 37)
    head = cast(make_head(16, 37), torch.float32, "cuda")
    given = (hidden.float().cuda(), int64(5, 2).cuda(), labels.cuda(), head)
    csrc.masked_lm_loss(*given, "reference")
    monkeypatch.setenv("SELMASK_DEBUG", "1")
    with pytest.raises(ValueError, match="must be ascending"):
        csrc.masked_lm_loss(*given, "reference")
