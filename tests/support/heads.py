"""Heads and batches for `masked_lm_loss`, its outcome in float64, and what it may be off by."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest
import torch
from hypothesis import strategies as st
from torch.nn import functional

import csrc


def make_head(
    width: int, vocab: int, *, transform: bool = True, biases: bool = True,
    activation: str = "gelu", offset: float = 0.0,
) -> csrc.MaskedLMHead:
    """Make a head with weights like those of a trained one, in float64."""
    options = {"dtype": torch.float64}
    bias = {"decoder_bias": offset + torch.randn(vocab, **options)} if biases else {}
    if transform:
        bias |= {
            "dense_weight": torch.randn(width, width, **options) / width**0.5,
            "norm_weight": 1 + 0.1 * torch.randn(width, **options),
        }
        if biases:
            bias |= {name: 0.1 * torch.randn(width, **options)
                     for name in ("dense_bias", "norm_bias")}
    weight = torch.randn(vocab, width, **options) * (2 / width**0.5)
    return csrc.MaskedLMHead(weight, **bias, activation=activation)


def make_batch(
    shape: tuple[int, ...], masked: list[int], vocab: int, padding: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw hidden states, positions and labels; the first label is 0, the last V - 1."""
    positions = torch.tensor([*masked, *[-1] * padding], dtype=torch.int64)
    labels = torch.where(positions < 0, -1, torch.randint(vocab, positions.shape))
    if masked:
        labels[0], labels[len(masked) - 1] = 0, vocab - 1
    return torch.randn(shape, dtype=torch.float64), positions, labels


def draw_case(data: st.DataObject, min_width: int, vocab: int, rows: int, slots: int):
    """Draw a head and a batch of any shape up to these sizes."""
    width, vocab = data.draw(st.integers(min_width, 40)), data.draw(st.integers(2, vocab))
    rows, slots = data.draw(st.integers(1, rows)), data.draw(st.integers(1, slots))
    masked = sorted(data.draw(st.sets(st.integers(0, rows * slots - 1))))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    head = make_head(
        width, vocab, transform=data.draw(st.booleans()), biases=data.draw(st.booleans()),
        activation=data.draw(st.sampled_from(["gelu", "gelu_tanh"])),
    )
    return head, make_batch((rows, slots, width), masked, vocab, data.draw(st.integers(0, 5)))


def cast(head: csrc.MaskedLMHead, dtype: torch.dtype, device: str) -> csrc.MaskedLMHead:
    """Copy the head to leaves of a dtype on a device."""
    return dataclasses.replace(head, **{
        name: tensor.detach().to(device, dtype).requires_grad_()
        for name, tensor in head.tensors().items()
    })


def outcome(
    implementation: str | None, hidden, positions, labels, head, dtype=torch.float32,
    device="cpu", grad_output=1.0, gathered=False,
) -> tuple[torch.Tensor, int, dict[str, torch.Tensor]]:
    """Return loss, hits and gradients, computed in `dtype` on `device`, as float64 on the CPU.

    With `gathered`, the operation gets the masked rows and no positions.
    """
    hidden = hidden.detach().to(device, dtype).requires_grad_()
    head, positions, labels = cast(head, dtype, device), positions.to(device), labels.to(device)
    given = (hidden, positions)
    if gathered:
        given = (hidden.flatten(0, -2)[positions.clamp(min=0).long()], None)
    loss, hits = csrc.masked_lm_loss(*given, labels, head, implementation)
    assert loss.shape == () and loss.dtype == torch.promote_types(dtype, torch.float32)
    assert hits.shape == () and hits.dtype == torch.int64
    inputs = {"hidden": hidden, **head.tensors()}
    found = torch.autograd.grad(loss, list(inputs.values()), torch.full_like(loss, grad_output))
    gradients = dict(zip(inputs, found, strict=True))
    assert all(gradients[name].dtype == dtype for name in inputs)
    return (loss.detach().cpu().double(), int(hits),
            {name: g.cpu().double() for name, g in gradients.items()})


def row_losses(hidden, positions, labels, head, dtype, device) -> torch.Tensor:
    """Compute the loss of each masked row in plain PyTorch, from logits in `dtype`, float64."""
    valid = positions >= 0
    rows = hidden.flatten(0, -2)[positions[valid].long()].to(device, dtype)
    with torch.no_grad():
        scores = csrc.reference.logits(rows, cast(head, dtype, device)).double()
    return functional.cross_entropy(scores, labels[valid].long().to(device), reduction="none")


def check(
    implementation: str, batch, head, dtype=torch.float32, device="cpu", grad_output=1.0,
) -> dict[str, torch.Tensor]:
    """Hold loss and gradients to 3 times (root mean square: twice) plain PyTorch's error.

    Both with positions and with gathered rows; the truth is float64 on the same rounded values.
    Returns the gradients.
    """
    head = dataclasses.replace(
        head, **{name: t.detach().to(dtype).double() for name, t in head.tensors().items()}
    )
    batch = (batch[0].detach().to(dtype).double(), *batch[1:])
    kind = {"device": device, "grad_output": grad_output}
    truth = outcome("reference", *batch, head, dtype=torch.float64, **kind)
    plain = outcome("reference", *batch, head, dtype=dtype, **kind)
    ulp = torch.finfo(torch.float32).eps  # what a sum of a few terms may be off by
    # A sum may be right by luck; so its error is measured by those of its terms, too.
    rows, true_rows = (row_losses(*batch, head, kind, device) for kind in (dtype, torch.float64))
    usual_loss = max((plain[0] - truth[0]).abs(), (rows - true_rows).norm())
    allowed = 3 * usual_loss + 2 * ulp * truth[0].abs()
    for gathered in (True, False):
        ours = outcome(implementation, *batch, head, dtype=dtype, gathered=gathered, **kind)
        if dtype == torch.float32:  # 16 bits have ties that 64 have not
            assert ours[1] == truth[1]
        assert (ours[0] - truth[0]).abs() <= allowed, f"{ours[0]}, true {truth[0]}, +-{allowed}"
        for name, true in truth[2].items():
            found, usual = ours[2][name] - true, plain[2][name] - true
            size = true.abs().max() if true.numel() else 0.0
            # Of a few rows plain PyTorch may be right by luck, and `chunked` adds in another order:
            # of one row over the vocabulary term by term, where a processor's library does.
            # Rounding to the dtype alone may be off by half of what separates two numbers.
            half = max(ulp, torch.finfo(dtype).eps / 2)
            steps = max(8, 2 * len(head.decoder_weight) ** 0.5)
            floor = steps * ulp * max(size, 1.0) if implementation == "chunked" else half * size
            assert found.abs().max() <= 3 * usual.abs().max() + floor, name
            if implementation != "chunked":
                assert found.norm() <= 2 * usual.norm() + ulp * true.norm(), name
    return ours[2]


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Let PyTorch fill new memory with NaN, and integers with the largest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic mode asks for it
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.empty(5).isnan().all() and torch.zeros(1).new_empty(5).isnan().all()
            yield
        finally:
            torch.use_deterministic_algorithms(False)
