"""Fast operations and their plain twins. Imports torch, triton and the standard library only.

`masked_lm_loss` is the one public operation; `IMPLEMENTATIONS` names what can stand behind it:

- `reference`: plain PyTorch; any device and dtype, and what the others are tested against.
- `chunked`: CPU, float32 and float64; see `csrc/masked_lm_chunked.py`.
- `triton`: GPU; see `csrc/masked_lm_triton.py`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import torch

from csrc import masked_lm_chunked, reference
from csrc.head import MaskedLMHead

__all__ = ["IMPLEMENTATIONS", "MaskedLMHead", "default_implementation", "masked_lm_loss"]

Operation = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def _triton(
    hidden: torch.Tensor, masked_positions: torch.Tensor, masked_labels: torch.Tensor,
    head: MaskedLMHead,
) -> tuple[torch.Tensor, torch.Tensor]:
    from csrc import masked_lm_triton  # needs triton, which not every machine has

    return masked_lm_triton.masked_lm_loss(hidden, masked_positions, masked_labels, head)


IMPLEMENTATIONS: dict[str, Operation] = {
    "reference": reference.masked_lm_loss,
    "chunked": masked_lm_chunked.masked_lm_loss,
    "triton": _triton,
}


def default_implementation(device: torch.device, dtype: torch.dtype) -> str:
    """The implementation that `masked_lm_loss` takes unless it is told which."""
    if device.type == "cuda":
        return "triton" if importlib.util.find_spec("triton") else "reference"
    return "chunked" if dtype in (torch.float32, torch.float64) else "reference"


def masked_lm_loss(
    hidden: torch.Tensor,
    masked_positions: torch.Tensor,
    masked_labels: torch.Tensor,
    head: MaskedLMHead,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the cross entropies of the masked positions, computing the head on those rows only.

    Equals `cross_entropy(logits(hidden.flatten(0, -2)[p]), labels, reduction="sum")` over the
    valid `p`, without the logits of any other position.

    Args:
        hidden: output of the encoder, `(B, S, D)` or `(T, D)`.
        masked_positions: indices into the flattened rows of `hidden`, each once, ascending,
            padded at the end with -1 to a fixed capacity, `(M,)` int32 or int64.
        masked_labels: original ids at these positions, `(M,)` int32 or int64; anything at padding.
        head: the head's tensors, of the dtype and on the device of `hidden`.
        implementation: a name in `IMPLEMENTATIONS`; None takes `default_implementation`.
    Returns:
        The sum of the cross entropies in nats, float32 (float64 for float64) scalar,
        differentiable with respect to `hidden` and the tensors of `head`; and the number of
        positions whose largest logit is the label, int64 scalar. The caller divides by its count.
    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the implementation is unknown. Values
            out of range too, where looking at them is free: on a CPU, and on a GPU with
            `SELMASK_DEBUG=1` in the environment (it makes the host wait for the device).
    """
    name = implementation or default_implementation(hidden.device, hidden.dtype)
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {name!r}: known are {sorted(IMPLEMENTATIONS)}")
    if hidden.dim() not in (2, 3):
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}: must be (B, S, D) or (T, D)")
    if masked_positions.dim() != 1 or masked_positions.shape != masked_labels.shape:
        raise ValueError(
            f"masked_positions {tuple(masked_positions.shape)} and masked_labels "
            f"{tuple(masked_labels.shape)}: must be (M,) both"
        )
    for what, index in (("masked_positions", masked_positions), ("masked_labels", masked_labels)):
        if index.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{what} has dtype {index.dtype}: must be int32 or int64")
        if index.device != hidden.device:
            raise ValueError(f"{what} is on {index.device}, hidden on {hidden.device}")
    head.check(hidden)
    if hidden.device.type == "cpu" or os.environ.get("SELMASK_DEBUG") == "1":
        num_slots = hidden.shape[:-1].numel()
        _check_values(masked_positions, masked_labels, num_slots, len(head.decoder_weight))
    return IMPLEMENTATIONS[name](hidden, masked_positions, masked_labels, head)


def _check_values(
    positions: torch.Tensor, labels: torch.Tensor, num_slots: int, vocab: int
) -> None:
    """Refuse positions that are not ascending within the slots, and labels that are no ids."""
    valid = positions >= 0
    count = int(valid.sum())

    def first(wrong: torch.Tensor, values: torch.Tensor) -> tuple[int, int]:
        index = int(wrong.nonzero()[0])
        return index, int(values[index])

    out = (positions < -1) | (positions >= num_slots)
    if out.any():
        index, value = first(out, positions)
        raise ValueError(f"masked_positions[{index}] is {value}: must be in [0, {num_slots - 1}], "
                         "or -1 for padding")
    if count and not valid[:count].all():
        index, _ = first(~valid[:count], positions)
        raise ValueError(f"masked_positions[{index}] is -1, before a position: padding must be at "
                         "the end")
    falls = positions[1:count] <= positions[:max(count - 1, 0)]
    if falls.any():
        index, _ = first(falls, positions)
        raise ValueError(
            f"masked_positions[{index + 1}] is {int(positions[index + 1])} after "
            f"{int(positions[index])}: must be ascending, each position once"
        )
    out = (labels[:count] < 0) | (labels[:count] >= vocab)
    if out.any():
        index, value = first(out, labels)
        raise ValueError(f"masked_labels[{index}] is {value}: must be in [0, {vocab - 1}]")
