"""Fast operations and their plain twins. Imports torch, triton and the standard library only.

`masked_lm_loss` is the one public operation; `IMPLEMENTATIONS` names what can stand behind it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from csrc import reference

IMPLEMENTATIONS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "reference": reference.masked_lm_loss,
}


def masked_lm_loss(
    hidden: torch.Tensor,
    masked_positions: torch.Tensor,
    masked_labels: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    implementation: str = "reference",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the cross entropies of the masked positions, computing the head on those rows only.

    Equals `cross_entropy(head(hidden.flatten(0, -2))[p], labels, reduction="sum")` over the
    valid `p`, without the logits of any other position.

    Args:
        hidden: output of the encoder, `(B, S, D)` or `(T, D)`.
        masked_positions: indices into the flattened rows of `hidden`, ascending, padded at the
            end with -1 to a fixed capacity, `(M,)` int32 or int64.
        masked_labels: original ids at these positions, `(M,)` int32 or int64; anything at padding.
        head: maps rows `(m, D)` to logits `(m, V)`.
        implementation: a name in `IMPLEMENTATIONS`.
    Returns:
        The sum of the cross entropies in nats, float32 scalar, differentiable; and the number of
        positions whose largest logit is the label, int64 scalar. The caller divides by its count.
    Raises:
        ValueError: shapes or dtypes do not fit, or the implementation is unknown.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r}: known are {sorted(IMPLEMENTATIONS)}")
    if hidden.dim() not in (2, 3):
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}: must be (B, S, D) or (T, D)")
    if masked_positions.dim() != 1 or masked_positions.shape != masked_labels.shape:
        raise ValueError(
            f"masked_positions {tuple(masked_positions.shape)} and masked_labels "
            f"{tuple(masked_labels.shape)}: must be (M,) both"
        )
    for name, index in (("masked_positions", masked_positions), ("masked_labels", masked_labels)):
        if index.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} has dtype {index.dtype}: must be int32 or int64")
        if index.device != hidden.device:
            raise ValueError(f"{name} is on {index.device}, hidden on {hidden.device}")
    return IMPLEMENTATIONS[implementation](hidden, masked_positions, masked_labels, head)
