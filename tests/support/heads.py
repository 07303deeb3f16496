"""Heads and batches for `masked_lm_loss`, and its outcome in float64."""

from __future__ import annotations

import dataclasses

import torch

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
