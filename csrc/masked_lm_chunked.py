"""`masked_lm_loss` for CPUs: the three matrix products, in pieces that fit the caches.

With `x` the transformed rows `(M, D)`, `W` and `b` the decoder, `y` the labels:

    z = x W^T + b      m = max z      e = exp(z - m)      s = sum e      loss = log s - (z_y - m)
    d loss / dz = (e - s onehot(y)) / s =: u / s
    dx = (u W) / s      dW = u^T (x / s)      db = u^T (1 / s)

`z`, `e` and `u` share one buffer, and the division by `s` is applied to the small factors. So the
buffer is written by one product, changed in place, and read by two products. The gradients are
computed in the forward pass; the backward pass multiplies them by the incoming scalar.

Three sizes were measured (2 cores of an AMD EPYC, AVX2, V = 30,522, fp32):

- Products for the logits in tiles of 512 columns run at 150 GFLOP/s; in one call, where `W^T` does
  not fit the caches, at 100.
- Chunks of rows are large, because each chunk reads and writes all of `dW`.
- Row operations work on groups of 32 rows (4 MB), small enough to stay in the last-level cache.
"""

from __future__ import annotations

from typing import Any

import torch

from csrc import reference
from csrc.head import MaskedLMHead, take_gradients

CHUNK_BYTES = 256 * 2**20  # of the buffer of logits
TILE_COLUMNS = 512
GROUP_ROWS = 32


def _score(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Write the logits of `rows`, `(m, D)`, to `out`, `(m, V)`."""
    for start in range(0, len(weight), TILE_COLUMNS):
        tile = out[:, start:start + TILE_COLUMNS]
        torch.mm(rows, weight[start:start + TILE_COLUMNS].t(), out=tile)
        if bias is not None:
            tile += bias[start:start + TILE_COLUMNS]


def _cross_entropy_in_place(
    scores: torch.Tensor, labels: torch.Tensor, losses: torch.Tensor, totals: torch.Tensor,
    grad_bias: torch.Tensor | None,
) -> torch.Tensor:
    """Turn logits `(m, V)` into `u`; return the number of hits, int64 scalar.

    Also fills `losses` and `totals`, `(m, 1)`, and adds to `grad_bias`, `(V,)`, if it is given.
    """
    hits = labels.new_zeros(())
    for start in range(0, len(scores), GROUP_ROWS):
        group = slice(start, start + GROUP_ROWS)
        z, label = scores[group], labels[group]
        target, top = z.gather(1, label), z.amax(1, keepdim=True)
        # A row whose label is at the top is a hit if no smaller id is there too, as in argmax.
        # Only these few rows need argmax, which is three times slower than amax.
        at_top = (target == top).squeeze(1).nonzero().squeeze(1)
        if len(at_top):
            hits += (z[at_top].argmax(1) == label[at_top, 0]).sum()
        z.sub_(top).exp_()
        total = torch.sum(z, 1, keepdim=True, out=totals[group])
        losses[group] = total.log() - (target - top)
        z.scatter_add_(1, label, -total)
        if grad_bias is not None:  # in groups, the sum over rows also loses fewer digits
            grad_bias += torch.mv(z.t(), total.squeeze(1).reciprocal())
    return hits


class _DecoderLoss(torch.autograd.Function):
    """Apply decoder and cross entropy to transformed rows."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
        labels: torch.Tensor, with_gradients: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_rows, vocab = len(rows), len(weight)
        chunk_rows = max(1, min(num_rows, CHUNK_BYTES // (vocab * rows.element_size())))
        buffer = rows.new_empty(chunk_rows, vocab)
        losses, totals = rows.new_empty(num_rows, 1), rows.new_empty(num_rows, 1)
        hits = labels.new_zeros(())
        # `needs_input_grad` is also true for a parameter under `no_grad`.
        want_rows, want_weight, want_bias = (
            need and with_gradients for need in ctx.needs_input_grad[:3]
        )
        grad_rows = torch.empty_like(rows) if want_rows else None
        grad_weight = torch.empty_like(weight) if want_weight else None
        grad_bias = torch.zeros_like(bias) if bias is not None and want_bias else None
        if grad_weight is not None and num_rows == 0:
            grad_weight.zero_()
        for start in range(0, num_rows, chunk_rows):
            chunk = slice(start, start + chunk_rows)
            x, total = rows[chunk], totals[chunk]
            u = buffer[:len(x)]
            _score(x, weight, bias, out=u)
            hits += _cross_entropy_in_place(
                u, labels[chunk, None], losses[chunk], total, grad_bias
            )
            if grad_rows is not None:
                torch.mm(u, weight, out=grad_rows[chunk]).div_(total)
            if grad_weight is not None:
                if start == 0:
                    torch.mm(u.t(), x / total, out=grad_weight)
                else:
                    grad_weight.addmm_(u.t(), x / total)
        ctx.gradients = (grad_rows, grad_weight, grad_bias)
        ctx.mark_non_differentiable(hits)
        return losses.sum(), hits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        # In place: allocating a second V x D tensor would take longer than the product.
        scaled = (None if g is None else g.mul_(grad_loss) for g in take_gradients(ctx))
        return *scaled, None, None


def masked_lm_loss(
    hidden: torch.Tensor,
    masked_positions: torch.Tensor | None,
    masked_labels: torch.Tensor,
    head: MaskedLMHead,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `csrc.masked_lm_loss` on a CPU in float32 or float64; one backward pass per call.

    Raises:
        ValueError: another dtype or device.
    """
    if hidden.is_cuda or hidden.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"implementation 'chunked': hidden is {hidden.dtype} on {hidden.device}, must be "
            "float32 or float64 on a CPU; take 'reference'"
        )
    count = int((masked_labels >= 0).sum())  # padding is at the end
    rows = reference.transform(reference.gather(hidden, masked_positions)[:count], head)
    loss_sum, hits = _DecoderLoss.apply(
        rows.contiguous(), head.decoder_weight, head.decoder_bias, masked_labels[:count].long(),
        torch.is_grad_enabled(),
    )
    return loss_sum, hits
