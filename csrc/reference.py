"""Each operation in plain PyTorch: the definition of a correct result."""

from __future__ import annotations

import torch
from torch.nn import functional

from csrc.head import ACTIVATIONS, PADDING, MaskedLMHead


def transform(rows: torch.Tensor, head: MaskedLMHead) -> torch.Tensor:
    """Apply dense layer, GELU and layer norm to rows `(M, D)`; a head may have none of them."""
    if head.dense_weight is None:
        return rows
    dense = functional.linear(rows, head.dense_weight, head.dense_bias)
    active = functional.gelu(dense, approximate=ACTIVATIONS[head.activation])
    return functional.layer_norm(
        active, active.shape[-1:], head.norm_weight, head.norm_bias, head.norm_eps
    )


def logits(rows: torch.Tensor, head: MaskedLMHead) -> torch.Tensor:
    """Apply the complete head: rows `(..., D)` to logits `(..., V)`."""
    return functional.linear(transform(rows, head), head.decoder_weight, head.decoder_bias)


def gather(hidden: torch.Tensor, masked_positions: torch.Tensor | None) -> torch.Tensor:
    """Return the masked rows of `hidden`, `(M, D)`; row 0 at padding (-1).

    Without positions, `hidden` holds the masked rows already.
    """
    if masked_positions is None:
        return hidden
    return hidden.flatten(0, -2).index_select(0, masked_positions.clamp(min=0))


def masked_lm_loss(
    hidden: torch.Tensor,
    masked_positions: torch.Tensor | None,
    masked_labels: torch.Tensor,
    head: MaskedLMHead,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather the masked rows, apply the head, sum the cross entropies; see `csrc`."""
    # An empty gather still runs the head, so that every rank's backward pass touches the same
    # parameters whatever its share of the masks.
    scores = logits(gather(hidden, masked_positions), head)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    labels = masked_labels.long()
    loss_sum = functional.cross_entropy(scores, labels, reduction="sum", ignore_index=PADDING)
    return loss_sum, (scores.argmax(-1) == labels).sum()
