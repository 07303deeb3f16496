"""A masked-language model over packed batches that computes the head on masked rows only."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import csrc
from csrc import reference
from preprocess.errors import ConfigError
from train.model.families import FAMILIES, attention_mask, find_queries

# transformers' names of the activations that an MLM head may have -> those of `csrc`.
HEAD_ACTIVATIONS: dict[str, Literal["gelu", "gelu_tanh"]] = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
}

# Logits of `cross_entropies` at a time, in fp32: those of a GPU's pass, or what fits a CPU's cache.
LOGIT_BYTES = {"cpu": 2**22, "cuda": 2**30}


class Masked(NamedTuple):
    """The slots that the last layer computes: arguments of `find_queries`, and of a `LastLayer`."""

    positions: torch.Tensor
    most: int | None


# (hidden, attention mask, `Masked`'s two, the encoder's other arguments) -> rows, `(C, D)`
LastLayer = Callable[..., torch.Tensor]


def masked_lm_head(hf: Any) -> csrc.MaskedLMHead:
    """Return the tensors of the MLM head of a transformers `...ForMaskedLM` model.

    Raises:
        ConfigError: an activation that `csrc` does not know, or layers that are not plain ones
            (adapters), whose tensors are not all of them.
    """
    dense, norm, activation = FAMILIES[hf.config.model_type].transform(hf)
    decoder = hf.get_output_embeddings()
    name = hf.config.name_or_path or hf.config.model_type
    if activation not in HEAD_ACTIVATIONS:
        raise ConfigError(f"the MLM head of {name} has the activation {activation!r}; known are "
                          f"{', '.join(HEAD_ACTIVATIONS)}")
    for layer, kind in ((dense, nn.Linear), (norm, nn.LayerNorm), (decoder, nn.Linear)):
        if not isinstance(layer, kind):
            raise ConfigError(f"the MLM head of {name} has a {type(layer).__name__} where "
                              f"{kind.__name__} is needed; leave adapters out of the head")
    return csrc.MaskedLMHead(
        decoder.weight, decoder.bias, dense.weight, dense.bias, norm.weight, norm.bias,
        norm.eps, HEAD_ACTIVATIONS[activation],
    )


class PackedMaskedLM(nn.Module):
    """An encoder with its MLM head, over packed rows, scoring masked positions only.

    Attributes:
        hf: the transformers `...ForMaskedLM` model; its parameters are the only ones here.
        carried: tensors of the source checkpoint that MLM does not use but that are exported
            again with `hf/` (a pooler), by their full names.
        fresh_head: whether the checkpoint had no MLM head.
        last_layer_subset: whether the last layer computes queries, attention output, feed-forward
            and norms for masked positions only; loss and gradients are the same.
        head_implementation: a name in `csrc.IMPLEMENTATIONS`; None takes the device's default.
        last_layers: faster twins of `last_layer` by number of masked positions, padding included,
            and of those of the fullest row; see `compile_layers`.
    """

    def __init__(self, hf: Any, carried: dict[str, torch.Tensor], fresh_head: bool) -> None:
        super().__init__()
        self.hf = hf
        self.family = FAMILIES[hf.config.model_type]
        self.carried = carried
        self.fresh_head = fresh_head
        self.head_prefixes = tuple(f"hf.{prefix}" for prefix in self.family.head_prefixes)
        self.last_layer_subset = True
        self.head_implementation: str | None = None
        self.last_layers: dict[tuple[int, int | None], LastLayer] = {}
        masked_lm_head(hf)
        self._let_last_layer_take_masked()

    def _let_last_layer_take_masked(self) -> None:
        """Give the last layer an argument `masked`; without it, nothing changes."""
        layer = self.layers()[-1]
        whole = layer.forward

        def forward(hidden: torch.Tensor, attention_mask: Any = None, *args: Any,
                    masked: Masked | None = None, **options: Any) -> Any:
            if masked is None:
                return whole(hidden, attention_mask, *args, **options)
            sizes = len(masked.positions), masked.most
            compute = self.last_layers.get(sizes, self.last_layer)
            return compute(hidden, attention_mask, *masked, **options)

        layer.forward = forward

    def layers(self) -> Any:
        """Return the layers of the encoder."""
        return self.family.layers(self.family.encoder(self.hf))

    def last_layer(
        self, hidden: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor,
        most: int | None, **options: Any,
    ) -> torch.Tensor:
        """Compute the last layer at masked slots, `(B, S, D)` to `(C, D)`; see `find_queries`."""
        num_rows, num_slots = hidden.shape[:2]
        queries = find_queries(positions, num_rows, num_slots, most)
        return self.family.last_layer(self.layers()[-1], hidden, mask, queries, **options)

    def head(self) -> csrc.MaskedLMHead:
        """Return the tensors of the MLM head."""
        return masked_lm_head(self.hf)

    def borrowed_parameters(self) -> list[tuple[nn.Module, nn.Parameter]]:
        """List parameters that a module's forward pass uses but that belong to another module.

        ZeRO-3 needs the list: it gathers parameters only while their own module runs.
        """
        layer = self.layers()[-1]
        split = [p for linear in self.family.split_linear(layer) for p in linear.parameters()]
        head = [p for p in self.head().tensors().values() if isinstance(p, nn.Parameter)]
        return [(self, p) for p in head] + [(layer, p) for p in split]

    def set_output_bias(self, log_frequency: np.ndarray) -> None:
        """Set the head's output bias, where it has one, to log-frequencies, `(V,)` float64."""
        bias = self.hf.get_output_embeddings().bias
        if bias is not None:
            with torch.no_grad():
                # Ids that the tokenizer lacks would be the likeliest at 0.
                bias.fill_(float(log_frequency.min()))
                bias[:len(log_frequency)] = torch.from_numpy(log_frequency).to(bias.dtype)

    def encode(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, document_ids: torch.Tensor,
        masked: Masked | None = None,
    ) -> torch.Tensor:
        """Return the hidden states of packed rows, `(B, S, D)`, or `(C, D)` of masked slots only.

        See `attention_mask` for the other arguments.
        """
        dtype = self.hf.get_input_embeddings().weight.dtype
        mask = attention_mask(self.family, self.hf.config, document_ids, position_ids, dtype)
        first = self.family.first_position(self.hf.config)
        encoder = self.family.encoder(self.hf)
        only = {} if masked is None else {"masked": masked}
        return encoder(
            input_ids=input_ids, attention_mask=mask, position_ids=position_ids + first, **only
        ).last_hidden_state

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        document_ids: torch.Tensor,
        masked_positions: torch.Tensor,
        masked_labels: torch.Tensor,
        most_masked: int | None = None,
        predict: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
        """Sum the cross entropies over masked positions, and count the correct guesses.

        Args:
            input_ids: corrupted ids, `(B, S)` int64.
            position_ids, document_ids: see `attention_mask`.
            masked_positions: see `csrc.masked_lm_loss`, `(C,)` int64.
            masked_labels: of the first `M` of them, `(M,)` int64; the others are padding.
            most_masked: masked positions of the fullest row, or more; counted if None, for which
                the host waits for a GPU.
            predict: return the likeliest id at each of those positions instead, `(M,)` int64,
                anything at padding.
        """
        hidden, positions = self.encode_masked(
            input_ids, position_ids, document_ids, masked_positions, masked_labels, most_masked
        )
        if predict:
            return reference.logits(reference.gather(hidden, positions), self.head()).argmax(-1)
        return csrc.masked_lm_loss(
            hidden, positions, masked_labels, self.head(), self.head_implementation
        )

    def encode_masked(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, document_ids: torch.Tensor,
        masked_positions: torch.Tensor, masked_labels: torch.Tensor,
        most_masked: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the first two arguments of `csrc.masked_lm_loss`; see `forward` for the others.

        With the last-layer subset these are the masked rows, `(M, D)`, and None; otherwise all
        hidden states, `(B, S, D)`, and the masked positions, `(M,)`.
        """
        count = len(masked_labels)
        if not (self.last_layer_subset and count):
            hidden = self.encode(input_ids, position_ids, document_ids)
            return hidden, masked_positions[:count]
        masked = Masked(masked_positions, most_masked)
        return self.encode(input_ids, position_ids, document_ids, masked)[:count], None

    def cross_entropies(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, document_ids: torch.Tensor,
        masked_positions: torch.Tensor, masked_labels: torch.Tensor,
        most_masked: int | None = None,
    ) -> torch.Tensor:
        """Return -ln P(label) at each masked position in nats, `(M,)` float32; see `forward`."""
        hidden, positions = self.encode_masked(
            input_ids, position_ids, document_ids, masked_positions, masked_labels, most_masked
        )
        rows, head = reference.gather(hidden, positions), self.head()
        size = max(1, LOGIT_BYTES[rows.device.type] // (4 * len(head.decoder_weight)))
        return torch.cat([
            functional.cross_entropy(reference.logits(part, head).float(), labels.long(),
                                     reduction="none")
            for part, labels in zip(rows.split(size), masked_labels.split(size), strict=True)
        ])

    def in_half(self, dtype: torch.dtype) -> PackedMaskedLM:
        """Return a copy in fp16 or bf16, for inference."""
        hf = deepcopy(self.hf)
        # A copied function is still the one of this model's layer.
        del self.family.layers(self.family.encoder(hf))[-1].forward
        twin = PackedMaskedLM(hf, {}, self.fresh_head)
        for parameter in twin.parameters():  # buffers stay: frequencies of positions need fp32
            parameter.data = parameter.data.to(dtype)
        return twin.train(self.training)
