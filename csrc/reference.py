"""Each operation in plain PyTorch: what "correct" means."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional


def masked_lm_loss(
    hidden: torch.Tensor,
    masked_positions: torch.Tensor,
    masked_labels: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather the masked rows, apply the head, sum the cross entropies; see `csrc`.

    Padding (-1) is kept, at row 0 with weight 0, when the tensors are on a GPU: dropping it
    there would make the host wait for the count. On a CPU it is dropped, which costs nothing.
    """
    rows = hidden.flatten(0, -2)
    valid = masked_positions >= 0
    if not hidden.is_cuda:
        masked_positions, masked_labels = masked_positions[valid], masked_labels[valid]
        valid = valid[valid]
    gathered = rows.index_select(0, masked_positions.clamp(min=0))
    # An empty gather still runs the head, so that every rank's backward pass touches the same
    # parameters whatever its share of the masks.
    logits = head(gathered).float()
    labels = torch.where(valid, masked_labels.long(), -100)
    loss_sum = functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
    hits = (logits.argmax(-1) == labels).sum() if len(labels) else labels.new_zeros(())
    return loss_sum, hits
