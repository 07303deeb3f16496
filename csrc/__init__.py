"""Fast operations and their plain twins. Imports torch, triton and the standard library only.

`masked_lm_loss` is the one public operation, with three implementations:

- `reference`: plain PyTorch; any device and dtype; the others are tested against it.
- `chunked`: CPU, float32 and float64; see `csrc/masked_lm_chunked.py`.
- `triton`: GPU; see `csrc/masked_lm_triton.py`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from csrc import masked_lm_chunked, reference
from csrc.head import ONE_CHUNK_BYTES, PADDING, MaskedLMHead

__all__ = ["IMPLEMENTATIONS", "MaskedLMHead", "ONE_CHUNK_BYTES", "PADDING",
           "default_implementation", "masked_lm_loss"]

Operation = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def _triton(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from csrc import masked_lm_triton  # needs triton, which not every machine has

    return masked_lm_triton.masked_lm_loss(*arguments)


IMPLEMENTATIONS: dict[str, Operation] = {
    "reference": reference.masked_lm_loss,
    "chunked": masked_lm_chunked.masked_lm_loss,
    "triton": _triton,
}


def default_implementation(device: torch.device, dtype: torch.dtype) -> str:
    """Return the name of the implementation that `masked_lm_loss` uses by default."""
    if device.type == "cuda":
        return "triton" if importlib.util.find_spec("triton") else "reference"
    return "chunked" if dtype in (torch.float32, torch.float64) else "reference"


def masked_lm_loss(
    hidden: torch.Tensor,
    masked_positions: torch.Tensor | None,
    masked_labels: torch.Tensor,
    head: MaskedLMHead,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the cross entropies of the masked positions, computing the head on those rows only.

    Equals `cross_entropy(logits(hidden.flatten(0, -2)[p]), labels, reduction="sum")` over the
    masked positions `p`, without the logits of any other position.

    Args:
        hidden: output of the encoder, `(B, S, D)` or `(T, D)`; without positions, the masked rows
            themselves, `(M, D)`.
        masked_positions: indices into the flattened rows of `hidden`, ascending, each once,
            padded at the end with -1, `(M,)` int32 or int64; None if `hidden` is gathered already.
        masked_labels: original ids of the masked rows, padded at the end with -1, `(M,)` int32 or
            int64. Padding rows of a gathered `hidden` may hold any finite numbers.
        head: the head's tensors, with the dtype and device of `hidden`.
        implementation: a name in `IMPLEMENTATIONS`; None takes `default_implementation`.
    Returns:
        The sum of the cross entropies in nats, float32 (float64 for float64) scalar,
        differentiable with respect to `hidden` and the tensors of `head`; and the number of
        positions whose largest logit is the label, int64 scalar. The caller divides by its count.
    Raises:
        ValueError: shapes, dtypes or devices do not match, or the implementation is unknown. Also
            values out of range, where checking them is free: on a CPU, and on a GPU with
            `SELMASK_DEBUG=1` in the environment (it makes the host wait for the device).
    """
    name = implementation or default_implementation(hidden.device, hidden.dtype)
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {name!r}: known are {sorted(IMPLEMENTATIONS)}")
    if hidden.dim() not in (2, 3):
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}: must be (B, S, D) or (T, D)")
    given = {"masked_labels": masked_labels}
    if masked_positions is not None:
        given["masked_positions"] = masked_positions
    elif hidden.dim() != 2 or len(hidden) != len(masked_labels):
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}: without masked_positions it "
                         f"must be ({len(masked_labels)}, D), one row per label")
    for what, index in given.items():
        if index.dim() != 1 or index.shape != masked_labels.shape:
            shapes = " and ".join(f"{name} {tuple(t.shape)}" for name, t in given.items())
            raise ValueError(f"{shapes}: must be (M,)")
        if index.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{what} has dtype {index.dtype}: must be int32 or int64")
        if index.device != hidden.device:
            raise ValueError(f"{what} is on {index.device}, hidden on {hidden.device}")
    head.check(hidden)
    if hidden.device.type == "cpu" or os.environ.get("SELMASK_DEBUG") == "1":
        _check_values("masked_labels", masked_labels, len(head.decoder_weight))
        if masked_positions is not None:
            _check_values("masked_positions", masked_positions, hidden.shape[:-1].numel())
            _check_positions(masked_positions, masked_labels)
    return IMPLEMENTATIONS[name](hidden, masked_positions, masked_labels, head)


def _check_values(what: str, values: torch.Tensor, size: int) -> None:
    """Refuse values outside [0, size) other than -1, and -1 before the end."""
    padding = values == PADDING
    out = (values < PADDING) | (values >= size)
    early = padding[:-1] & ~padding[1:]
    if out.any():
        index = int(out.nonzero()[0])
        raise ValueError(f"{what}[{index}] is {int(values[index])}: must be in [0, {size - 1}], or "
                         "-1 for padding")
    if early.any():
        raise ValueError(f"{what}[{int(early.nonzero()[0])}] is -1, before another value: padding "
                         "must be at the end")


def _check_positions(positions: torch.Tensor, labels: torch.Tensor) -> None:
    """Refuse positions that are not ascending, or padded unlike the labels."""
    falls = (positions[1:] <= positions[:-1]) & (positions[1:] != PADDING)
    if falls.any():
        index = int(falls.nonzero()[0]) + 1
        raise ValueError(
            f"masked_positions[{index}] is {int(positions[index])} after "
            f"{int(positions[index - 1])}: must be ascending, each position once"
        )
    counts = [int((values != PADDING).sum()) for values in (positions, labels)]
    if counts[0] != counts[1]:
        raise ValueError(f"masked_positions has {counts[0]} positions, masked_labels {counts[1]} "
                         "labels: must be equally many before the padding (-1)")
