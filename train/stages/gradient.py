"""The gradient of a classifier's decision, at every token.

Letters: `B` inputs, `L` padded length, `D` width, `C` classes.
"""

from __future__ import annotations

from typing import Any

import torch

from train.model import token_rows
from train.stages.inference import Runner


def margin_gradient(runner: Runner, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Return gradient times embedding of each slot, with its sign: a `Compute` of a `Runner`.

    The margin is the logit of the predicted class minus that of the next one, not the loss: a
    loss scales every gradient by how wrong the classifier is, so that sure texts would vanish.
    The embedding is the row of the word table, before positions and norm (ModernBERT's: behind its
    norm, see `token_rows`). One forward and one backward pass; the sum over the batch leaves each
    input its own gradient.

    Worked example (mean of the embeddings, logits 0 and the mean times (1, .5)): not (-1, 0), good
    (2, 1), film (0, 1) give -.3333, .8333, .1667, which sum to the margin, as in no deeper model.

    Args:
        model: a classifier of two or more classes in evaluation mode.
    Returns:
        `(B, L)` float32; the slots of special tokens and padding have values of no use.
    """
    rows: list[torch.Tensor] = []

    def hold(_: Any, __: Any, found: torch.Tensor) -> torch.Tensor:
        rows.append(found.detach().requires_grad_())
        return rows[-1]

    hook = token_rows(model).register_forward_hook(hold)
    try:
        with torch.enable_grad():
            best = runner.logits(model, inputs).float().topk(2, dim=-1).values
            (gradient,) = torch.autograd.grad((best[..., 0] - best[..., 1]).sum(), rows)
    finally:
        hook.remove()
    return (gradient.float() * rows[0].detach().float()).sum(-1)
