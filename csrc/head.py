"""The MLM head as tensors, and the constants that all implementations share."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

ACTIVATIONS = {"gelu": "none", "gelu_tanh": "tanh"}  # name -> `approximate` of torch's gelu
PADDING = -1  # at the end of positions and labels
ONE_CHUNK_BYTES = 2**30  # logits up to this size are computed in one piece on a GPU


@dataclass(frozen=True)
class MaskedLMHead:
    """Hold the tensors of `norm(activation(dense(rows))) @ decoder_weight.T + decoder_bias`.

    Letters: `D` hidden size, `V` vocabulary. All tensors have one dtype and one device. Without
    `dense_weight` there is no transform: the rows go to the decoder as they are.

    Attributes:
        decoder_weight: `(V, D)`, in most models the word embedding itself.
        decoder_bias: `(V,)` or None.
        dense_weight, dense_bias: of the transform, `(D, D)` and `(D,)`, or None.
        norm_weight, norm_bias: of its layer norm, `(D,)`; a transform has the weight, the bias
            may be None.
        norm_eps: added to the variance.
        activation: GELU, exact or by its tanh approximation (Hendrycks and Gimpel 2016).
    """

    decoder_weight: torch.Tensor
    decoder_bias: torch.Tensor | None = None
    dense_weight: torch.Tensor | None = None
    dense_bias: torch.Tensor | None = None
    norm_weight: torch.Tensor | None = None
    norm_bias: torch.Tensor | None = None
    norm_eps: float = 1e-12
    activation: Literal["gelu", "gelu_tanh"] = "gelu"

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that this head has, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: v for name, v in values.items() if isinstance(v, torch.Tensor)}

    def check(self, hidden: torch.Tensor) -> None:
        """Refuse a head whose tensors fit neither each other nor `hidden`.

        Raises:
            ValueError: names the tensor, what it is, and what it must be.
        """
        vocab, width = len(self.decoder_weight), hidden.shape[-1]
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"head.activation {self.activation!r}: must be one of {', '.join(ACTIVATIONS)}"
            )
        transform = (self.dense_weight, self.norm_weight)
        parts = (*transform, self.dense_bias, self.norm_bias)
        if any(t is None for t in transform) and any(t is not None for t in parts):
            raise ValueError("head: a transform needs dense_weight and norm_weight; give both, "
                             "or none of its tensors")
        shapes = {"decoder_weight": (vocab, width), "decoder_bias": (vocab,),
                  "dense_weight": (width, width)}
        for name, tensor in self.tensors().items():
            shape = shapes.get(name, (width,))
            if tensor.shape != shape:
                raise ValueError(f"head.{name} has shape {tuple(tensor.shape)}: must be {shape}")
            if tensor.dtype != hidden.dtype:
                raise ValueError(
                    f"head.{name} has dtype {tensor.dtype}: must be {hidden.dtype}, as hidden"
                )
            if tensor.device != hidden.device:
                raise ValueError(f"head.{name} is on {tensor.device}, hidden on {hidden.device}")


def take_gradients(ctx: Any) -> Any:
    """Return the gradients that the forward pass computed; the backward pass scales them in place.

    Raises:
        RuntimeError: they have been taken already.
    """
    if ctx.gradients is None:
        raise RuntimeError("masked_lm_loss: backward runs once; compute the loss again")
    gradients, ctx.gradients = ctx.gradients, None
    return gradients
