"""Each operation in plain PyTorch: what "correct" means."""

from __future__ import annotations

import torch
from torch.nn import functional

from csrc.head import ACTIVATIONS, MaskedLMHead


def transform(rows: torch.Tensor, head: MaskedLMHead) -> torch.Tensor:
    """Dense, GELU and layer norm of `rows`, `(M, D)`; the rows themselves without a transform."""
    if head.dense_weight is None:
        return rows
    dense = functional.linear(rows, head.dense_weight, head.dense_bias)
    active = functional.gelu(dense, approximate=ACTIVATIONS[head.activation])
    return functional.layer_norm(
        active, active.shape[-1:], head.norm_weight, head.norm_bias, head.norm_eps
    )


def logits(rows: torch.Tensor, head: MaskedLMHead) -> torch.Tensor:
    """The whole head: rows `(M, D)` to logits `(M, V)`."""
    return functional.linear(transform(rows, head), head.decoder_weight, head.decoder_bias)


def drop_padding(
    masked_positions: torch.Tensor, masked_labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut the padding (-1) off the end of CPU tensors, where counting costs nothing."""
    count = int((masked_positions >= 0).sum())
    return masked_positions[:count], masked_labels[:count]


def masked_lm_loss(
    hidden: torch.Tensor,
    masked_positions: torch.Tensor,
    masked_labels: torch.Tensor,
    head: MaskedLMHead,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather the masked rows, apply the head, sum the cross entropies; see `csrc`.

    On a GPU, padding is kept, at row 0 with weight 0: dropping it there would make the host wait
    for the count.
    """
    if not hidden.is_cuda:
        masked_positions, masked_labels = drop_padding(masked_positions, masked_labels)
    valid = masked_positions >= 0
    rows = hidden.flatten(0, -2).index_select(0, masked_positions.clamp(min=0))
    # An empty gather still runs the head, so that every rank's backward pass touches the same
    # parameters whatever its share of the masks.
    scores = logits(rows, head)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    labels = torch.where(valid, masked_labels.long(), -100)
    loss_sum = functional.cross_entropy(scores, labels, reduction="sum", ignore_index=-100)
    hits = (scores.argmax(-1) == labels).sum() if len(labels) else labels.new_zeros(())
    return loss_sum, hits
