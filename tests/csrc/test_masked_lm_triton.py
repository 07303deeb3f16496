"""`csrc/masked_lm_triton.py`: several tiles in every dimension, dtypes, memory, ahead of time.

Without a GPU the kernels run in Triton's interpreter (`conftest.py`), in float32 and float16: its
bfloat16 products are wrong. The truth is float64 on the same rounded values, and plain PyTorch's
error in the same dtype is the measure. `test_masked_lm.py` tests what all implementations share.

As a command, `python tests/csrc/test_masked_lm_triton.py 90` compiles for that capability; a test
runs it.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import csrc
from tests.support.heads import (
    cast,
    check,
    draw_case,
    make_batch,
    make_head,
    outcome,
    poisoned_memory,
)
from tests.support.launch import ROOT

triton = pytest.importorskip("triton")
from csrc import masked_lm_triton  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of discarded values

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BFLOAT16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)
DTYPES = [torch.float32, torch.float16, BFLOAT16]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def small_tiles(monkeypatch):
    """Make tiles so small that small tensors span several in every dimension."""
    set_small_tiles(monkeypatch)


def set_small_tiles(monkeypatch) -> None:
    tile = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(masked_lm_triton, "DENSE_TILES", {2: tile, 4: tile})
    monkeypatch.setattr(masked_lm_triton, "LOSS_TILE", {"BLOCK_V": 32, "num_warps": 4})
    monkeypatch.setattr(masked_lm_triton, "NORM_TILE", 128)


def compare(batch, head, dtype=torch.float32, grad_output=1.0) -> dict[str, torch.Tensor]:
    return check("triton", batch, head, dtype, DEVICE, grad_output)


# ------------------------------------------------------------------------------ values, gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 127, 128, 129])
def test_edges_of_tiles(rows, dtype):
    """Use the real tiles: 129 rows, 136 columns and 2,100 ids are more than one of each."""
    compare(make_batch((2, 80, 136), list(range(3, 3 + rows)), 2100), make_head(136, 2100), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 21])
@pytest.mark.parametrize("vocab", [7, 128, 314, 1000, 1003, 1024])
def test_any_vocabulary(vocab, width, dtype):
    """A multiple of 8 is taken as it is, any other one padded to a multiple of 128."""
    with poisoned_memory():
        compare(make_batch((2, 8, width), [0, 3, 9], vocab, 3), make_head(width, vocab), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "no transform"])
def test_every_family_over_many_tiles(kind, biases, dtype, small_tiles):
    head = make_head(40, 150, transform=kind != "no transform", biases=biases,
                     activation="gelu_tanh" if kind == "gelu_tanh" else "gelu")
    compare(make_batch((3, 16, 40), list(range(0, 48, 2)), 150, 5), head, dtype)


ROW_BYTES = 256 * 4  # of 130 ids, padded to 256 columns, in float32


@pytest.mark.parametrize("chunk_rows", [0, 3])
@pytest.mark.parametrize("limit, parts", [
    (0, 20), (7 * ROW_BYTES, 3), (20 * ROW_BYTES - 1, 2), (20 * ROW_BYTES, 1),
])
def test_one_part_up_to_the_limit(limit, parts, chunk_rows, monkeypatch):
    """The gradients of the decoder take two products a part, however many its chunks are."""
    monkeypatch.setattr(masked_lm_triton, "ONE_CHUNK_BYTES", limit)
    monkeypatch.setattr(masked_lm_triton, "CHUNK_ROWS", chunk_rows)
    products, product = [], masked_lm_triton._product
    monkeypatch.setattr(masked_lm_triton, "_product",
                        lambda *given, **named: products.append(1) or product(*given, **named))
    compare(make_batch((1, 20, 16), list(range(20)), 130), make_head(16, 130, transform=False))
    assert len(products) == 2 * 2 * parts  # with positions and with gathered rows


def test_the_loss_is_shifted(small_tiles):
    """Whole logits near 1e4 are exact, so no digit of the loss may be lost."""
    weight = torch.randint(-1, 2, (150, 16)).double()
    head = csrc.MaskedLMHead(weight, torch.full((150,), 1e4, dtype=torch.float64))
    hidden, positions, labels = make_batch((3, 16, 16), list(range(0, 48, 2)), 150, 5)
    compare((hidden.round(), positions, labels), head)


@pytest.mark.slow
def test_far_apart_logits(small_tiles):
    """The first tiles' sums vanish beside the last tile's, and the other way round."""
    for bias in (torch.linspace(-1e3, 1e3, 150), torch.linspace(1e3, -1e3, 150)):
        torch.manual_seed(0)
        head = dataclasses.replace(make_head(40, 150), decoder_bias=bias.double())
        compare(make_batch((3, 16, 40), list(range(0, 48, 2)), 150, 5), head)


def test_excluded_ids(small_tiles):
    """A bias of -inf excludes ids, even all of the first tiles."""
    head = make_head(40, 150)
    head.decoder_bias[:70] = -torch.inf
    head.decoder_bias[149] = -torch.inf
    hidden, positions, _ = make_batch((3, 16, 40), list(range(0, 48, 2)), 150, 5)
    labels = torch.where(positions < 0, -1, torch.randint(70, 149, positions.shape))
    gradients = compare((hidden, positions, labels), head)
    assert not gradients["decoder_weight"][:70].any() and not gradients["decoder_bias"][149]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_reach_loss_and_gradients(dtype):
    """A row of NaN makes the loss NaN and the gradients too: loss scaling looks for them."""
    hidden, positions, labels = make_batch((3, 8, 16), [0, 5, 7], 37, 2)
    for value, gathered in itertools.product((torch.nan, torch.inf), (False, True)):
        hidden[0, 5] = value
        loss, _, gradients = outcome("triton", hidden, positions, labels, make_head(16, 37),
                                     dtype=dtype, device=DEVICE, gathered=gathered)
        assert loss.isnan()
        for name, gradient in gradients.items():
            assert not gradient.isfinite().all(), name
        assert gradients["hidden"][0, 0].isfinite().all()


def test_small_probabilities_survive_fp16():
    """1e-5 / 4,915 is 0 in fp16, so the count may not meet dz before the loss scale does."""
    head = make_head(16, 200)
    head.decoder_weight.mul_(0.01)
    head.decoder_bias.zero_()[1:199] = -11.0  # p of about 1e-5
    batch = make_batch((2, 40, 16), list(range(64)), 200)
    gradients = compare(batch, head, torch.float16, grad_output=2.0**16 / 4915)
    rare = torch.ones(200, dtype=torch.bool).index_fill(0, batch[2], False)
    rare[[0, 199]] = False
    assert rare.sum() > 50
    assert (gradients["decoder_bias"][rare] > 0).all()
    assert (gradients["decoder_weight"][rare].abs().amax(1) > 0).all()


def test_hits_with_ties_are_argmax(small_tiles):
    """Whole numbers tie often, within a tile and across tiles; the first column wins."""
    hidden = torch.randint(-1, 2, (1, 64, 16)).double()
    weight = torch.randint(-1, 2, (150, 16)).double()
    weight[75:] = weight[:75]
    scores = hidden[0] @ weight.T
    first, top = scores.argmax(1), scores.amax(1, keepdim=True)
    last = 149 - (scores == top).flip(1).long().argmax(1)
    assert (last > first).all()
    expected = torch.arange(64) % 3 != 0
    labels = torch.where(expected, first, last)
    for dtype in (torch.float32, torch.float16):
        _, hits, _ = outcome("triton", hidden, torch.arange(64), labels,
                             csrc.MaskedLMHead(weight), dtype=dtype, device=DEVICE)
        assert hits == expected.sum()


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_shape(data):
    head, batch = draw_case(data, min_width=1, vocab=200, rows=3, slots=20)
    # Narrow rows may have next to no variance, which the usual 1e-12 would blow up.
    head = dataclasses.replace(head, norm_eps=1e-5)
    index = data.draw(st.sampled_from([torch.int32, torch.int64]))
    batch = (batch[0], *(each.to(index) for each in batch[1:]))
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()):
            set_small_tiles(patch)
        limit = data.draw(st.sampled_from([0, 4000, 2**30]))
        patch.setattr(masked_lm_triton, "ONE_CHUNK_BYTES", limit)
        patch.setattr(masked_lm_triton, "CHUNK_ROWS", data.draw(st.integers(0, 9)))
        gathered = data.draw(st.booleans())
        truth, found = (
            outcome(name, *batch, head, dtype=dtype, device=DEVICE, grad_output=0.3,
                    gathered=gathered)
            for name, dtype in (("reference", torch.float64), ("triton", torch.float32))
        )
    assert found[1] == truth[1]
    torch.testing.assert_close(found[0], truth[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[2], truth[2], rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------- memory, repetition


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transform", [True, False])
@pytest.mark.parametrize("masked, part_rows, chunk_rows", [
    (range(0, 48, 2), 10, 0), ([], 10, 0), (range(65), 35, 0), (range(65), 35, 10),
], ids=["some", "none", "parts", "chunks"])
def test_several_parts_never_read_new_memory(
    masked, part_rows, chunk_rows, transform, dtype, small_tiles, monkeypatch
):
    monkeypatch.setattr(masked_lm_triton, "ONE_CHUNK_BYTES", part_rows * 256 * dtype.itemsize)
    monkeypatch.setattr(masked_lm_triton, "CHUNK_ROWS", chunk_rows)
    batch = make_batch((3, 48, 40), list(masked), 150, 5)
    head = make_head(40, 150, transform=transform)
    with poisoned_memory():
        compare(batch, head, dtype)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_padding_and_unmasked_rows(index, small_tiles):
    """Hidden states at other positions change no bit of anything."""
    head = make_head(40, 150)
    hidden, positions, labels = make_batch((3, 16, 40), [1, 5, 22, 46], 150, 7)
    masked = torch.zeros(48, dtype=torch.bool).index_fill(0, positions[:4], True).view(3, 16)
    results = []
    for elsewhere in (0.0, torch.nan, torch.inf):
        states = torch.where(masked[..., None], hidden, elsewhere)
        results.append(outcome("triton", states, positions.to(index), labels.to(index), head,
                               device=DEVICE))
        assert not results[-1][2]["hidden"][~masked].any()
        assert results[-1][2]["hidden"][masked].all()
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transform", [True, False])
def test_padding_rows_may_hold_any_finite_numbers(transform, dtype, small_tiles):
    """Large ones would be inf after the first product, and 0 x inf is NaN."""
    made = make_head(40, 150, transform=transform)
    hidden, _, labels = make_batch((12, 40), [0, 1, 2, 3, 4], 150, 7)
    results = []
    for padding in (0.0, 6e4, 6e4):
        hidden[5:] = padding
        hidden[9:] = -padding
        states, head = hidden.to(DEVICE, dtype).requires_grad_(), cast(made, dtype, DEVICE)
        loss, hits = csrc.masked_lm_loss(states, None, labels.to(DEVICE), head, "triton")
        leaves = {"hidden": states, **head.tensors()}
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        results.append((loss, hits, *gradients))
        assert gradients[0][:5].all() and not gradients[0][5:].any()
        assert all(gradient.isfinite().all() for gradient in gradients)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


def test_any_memory_layout():
    """Every other column of wider hidden states, transposed weights, a weight at any address."""
    head = cast(make_head(16, 37), torch.float32, DEVICE)
    hidden, positions, labels = make_batch((3, 8, 16), [0, 5, 7], 37, 2)
    straight = outcome("triton", hidden, positions, labels, head, device=DEVICE)
    leaves = {name: t.detach().t().contiguous().t().requires_grad_() if t.dim() == 2 else t
              for name, t in head.tensors().items()}
    states = hidden.float().flatten(0, 1).repeat_interleave(2, 1).to(DEVICE)[:, ::2]
    states.requires_grad_()
    assert not states.is_contiguous() and not leaves["dense_weight"].is_contiguous()
    weight = head.decoder_weight.detach()
    flat = torch.cat([weight.new_zeros(3), weight.flatten()])
    shifted = flat[3:].view_as(weight).requires_grad_()
    assert shifted.data_ptr() % 16
    for decoder_weight in (leaves["decoder_weight"], shifted):
        leaves["decoder_weight"] = decoder_weight
        loss, _ = csrc.masked_lm_loss(states, positions.to(DEVICE), labels.to(DEVICE),
                                      dataclasses.replace(head, **leaves), "triton")
        given = {**leaves, "hidden": states}
        found = torch.autograd.grad(loss, list(given.values()))
        for name, gradient in zip(given, found, strict=True):
            expected = straight[2][name].view(gradient.shape)
            torch.testing.assert_close(gradient.cpu().double(), expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------ what is left out


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize(
    "trained, products",
    [((), 0), (("hidden",), 2), (("norm_bias",), 1), (("dense_weight",), 2),
     (("decoder_weight",), 1), (("decoder_bias",), 1), (("decoder_weight", "decoder_bias"), 1),
     (("hidden", "decoder_weight"), 3)],
)
def test_unneeded_products_are_not_computed(trained, products, grad_mode, monkeypatch):
    """Count the four products that only gradients need."""
    made, product = [], masked_lm_triton._product
    monkeypatch.setattr(masked_lm_triton, "_product",
                        lambda *given, **named: made.append(1) or product(*given, **named))
    head = cast(make_head(16, 37), torch.float32, DEVICE)
    hidden, positions, labels = (
        each.to(DEVICE) for each in make_batch((3, 8, 16), [0, 5, 7], 37, 2)
    )
    hidden = hidden.float().requires_grad_("hidden" in trained)
    for name, tensor in head.tensors().items():
        tensor.requires_grad_(name in trained)
    with torch.set_grad_enabled(grad_mode):
        loss, _ = csrc.masked_lm_loss(hidden, positions, labels, head, "triton")
    assert loss.requires_grad == (bool(trained) and grad_mode)
    if loss.requires_grad:
        loss.backward()
    assert len(made) == products * grad_mode
    for name, tensor in {"hidden": hidden, **head.tensors()}.items():
        assert (tensor.grad is not None) == (name in trained and grad_mode)


def test_autocast_changes_nothing():
    head, batch = make_head(16, 37), make_batch((3, 8, 16), [0, 5, 7], 37, 2)
    plain = outcome("triton", *batch, head, device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        torch.testing.assert_close(outcome("triton", *batch, head, device=DEVICE), plain,
                                   rtol=0, atol=0)


def test_refusals(monkeypatch):
    batch = make_batch((3, 8, 16), [0, 5], 37)
    with pytest.raises(ValueError, match="hidden is torch.float64, must be float32, float16 or"):
        outcome("triton", *batch, make_head(16, 37), dtype=torch.float64, device=DEVICE)
    wide = torch.zeros(6, 4097)
    with pytest.raises(ValueError, match="4097 columns, must have at most 4096; take 'reference'"):
        outcome("triton", wide, *batch[1:], csrc.MaskedLMHead(torch.zeros(37, 4097)),
                device=DEVICE)
    monkeypatch.setattr(masked_lm_triton, "INTERPRETED", False)
    with pytest.raises(ValueError, match="is on cpu, must be on a GPU; take 'chunked' or 'refere"):
        outcome("triton", *batch, make_head(16, 37))


# --------------------------------------------------------------------------------- on a GPU only


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab", [30522, 50368])
def test_full_size(vocab, dtype):
    batch = make_batch((256, 128, 768), list(range(5, 5 + 6 * 4915, 6)), vocab, 61)
    head = make_head(768, vocab)
    compare(batch, head, dtype, grad_output=2.0**16 / 4915)
    first, second = (outcome("triton", *batch, head, dtype=dtype, device=DEVICE) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("gathered", [True, False])
def test_the_host_never_waits(gathered):
    head = cast(make_head(768, 30522), torch.float16, DEVICE)
    hidden, positions, labels = (
        each.to(DEVICE) for each in make_batch((64, 128, 768), list(range(1200)), 30522, 80)
    )
    if gathered:
        hidden, positions = hidden.flatten(0, 1)[:1280], None
    hidden = hidden.half().requires_grad_()
    for mode in ("default", "error"):  # the first time, kernels are compiled and loaded
        torch.cuda.set_sync_debug_mode(mode)
        try:
            loss, _ = csrc.masked_lm_loss(hidden, positions, labels, head, "triton")
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_more_logits_than_32_bits_count(monkeypatch):
    """70,400 x 30,592 is more than 2^31: offsets are 64 bit."""
    batch, head = make_batch((1, 70400, 64), list(range(70400)), 30522), make_head(64, 30522)
    chunked = outcome("triton", *batch, head, dtype=torch.float16, device=DEVICE)
    monkeypatch.setattr(masked_lm_triton, "ONE_CHUNK_BYTES", 2**40)
    whole = outcome("triton", *batch, head, dtype=torch.float16, device=DEVICE)
    torch.testing.assert_close(whole[:2], chunked[:2], rtol=1e-3, atol=0)
    for name, gradient in whole[2].items():  # each is rounded to fp16 once
        size = gradient.abs().max().item()
        torch.testing.assert_close(chunked[2][name], gradient, rtol=1e-3, atol=1e-3 * size)


# --------------------------------------------------------------------------------- ahead of time


KERNELS = {name for name, value in vars(masked_lm_triton).items() if name.endswith("_kernel")}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_ahead_of_time(capability, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.csrc.test_masked_lm_triton", str(capability)], cwd=ROOT,
        text=True, capture_output=True, timeout=300,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    table = [line.split() for line in done.stdout.splitlines()[1:]]
    for dtype in ("fp16", "bf16", "fp32"):
        assert {row[0] for row in table if row[1] == dtype} == KERNELS
    assert all(row[3] == "0" for row in table), "spilled registers"


def launches(dtype: torch.dtype, variants: bool) -> list[tuple]:
    """Every launch, `(kernel, arguments, options)`, of the operation at BERT-base's size.

    With `variants` of other heads, too, and without gradients.
    """
    found = []

    class Recorder:
        def __init__(self, kernel) -> None:
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *given, **options: found.append((self.kernel, given, options))

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

    width, vocab = 768, 30522
    decoder = (empty(vocab, width), empty(vocab))
    transform = (empty(width, width), empty(width), empty(width), empty(width))
    index = torch.empty(4915, dtype=torch.int32, device="meta")
    with pytest.MonkeyPatch.context() as patch:
        for name in KERNELS:
            patch.setattr(masked_lm_triton, name, Recorder(getattr(masked_lm_triton, name)))
        patch.setattr(masked_lm_triton, "INTERPRETED", True)  # lets tensors without data pass
        heads = [csrc.MaskedLMHead(*decoder, *transform)]
        if variants:
            heads.append(dataclasses.replace(heads[0], activation="gelu_tanh"))
            heads.append(csrc.MaskedLMHead(decoder[0]))
            with torch.no_grad():
                masked_lm_triton.masked_lm_loss(empty(32768, width), index, index, heads[0])
        for head in heads:
            for given in ((empty(32768, width), index), (empty(4915, width), None)):
                loss, _ = masked_lm_triton.masked_lm_loss(*given, index, head)
                loss.backward()
    return found


def compile_ahead(capability: int) -> None:
    """Print registers, spilled bytes and shared memory of every kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
             torch.int32: "i32"}
    print(f"sm_{capability}: kernel, dtype, registers, spilled bytes, shared bytes, warps")
    lines = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for kernel, arguments, options in launches(dtype, capability == 90):
            values = dict(zip(kernel.arg_names, arguments, strict=False)) | options
            signature, constants, attributes = {}, {}, {}
            for number, parameter in enumerate(kernel.params):
                value = values.pop(parameter.name)
                if parameter.is_constexpr or value is None:
                    signature[parameter.name], constants[parameter.name] = "constexpr", value
                elif isinstance(value, torch.Tensor):
                    signature[parameter.name] = "*" + types[value.dtype]
                    attributes[number,] = [["tt.divisibility", 16]]  # as PyTorch's are
                else:
                    signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
            source = ASTSource(kernel, signature, constants, attributes)
            if source.hash() in lines:
                continue
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                                      options=values)
            used = resource_usage(compiled.asm["cubin"])
            lines[source.hash()] = (
                f"{kernel.__name__} {types[dtype]} {used['REG']} {used['STACK'] + used['LOCAL']} "
                f"{compiled.metadata.shared} {compiled.metadata.num_warps}"
            )
    print("\n".join(lines.values()))


def resource_usage(cubin: bytes) -> dict[str, int]:
    """What cuobjdump says of a kernel. Spilled registers lie in its stack frame."""
    path = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    path.write_bytes(cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    done = subprocess.run([tool, "--dump-resource-usage", path], text=True, check=True,
                          capture_output=True)
    return {name: int(number) for name, number in re.findall(r"([A-Z]+):(\d+)", done.stdout)}


if __name__ == "__main__":
    compile_ahead(int(sys.argv[1]))
