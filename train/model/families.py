"""Model families and packed attention.

The only file that names the parts of transformers' models. A family is an entry of `FAMILIES`:
where its encoder, its MLM head and its first position are, and what its last layer computes.

One method of transformers is replaced, on the instance: the `forward` of an encoder's last layer,
because transformers cannot compute a layer for some slots only.

- `PackedMaskedLM` (packed.py): with an argument `masked`, the layer computes masked slots only.
- `first_slot_only`: the layer computes [CLS] only, for inference with a classifier.

Letters: `B` rows, `S` slots of a row, `C` queries, `D` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional


class Queries(NamedTuple):
    """The slots of a batch that the last layer computes: `C` of them, at most `K` per row.

    Attributes:
        slots: flat slots, `(C,)` int64; padding repeats the last one.
        table: number of the query that row b has at place k, `(B, K)` int64; places that a row
            does not fill hold any number.
        places: flat place `b * K + k` of each query, `(C,)` int64.
    """

    slots: torch.Tensor
    table: torch.Tensor
    places: torch.Tensor

    def of(self, states: torch.Tensor) -> torch.Tensor:
        """Select the states of the queries, `(B, S, D)` to `(C, D)`."""
        return states.flatten(0, 1).index_select(0, self.slots)


def find_queries(
    masked_positions: torch.Tensor, num_rows: int, num_slots: int, most: int | None = None
) -> Queries:
    """Arrange masked positions by row.

    Args:
        masked_positions: flat slots, ascending, padded at the end with -1, `(C,)`, at least one.
        num_rows, num_slots: `B` and `S` of the batch.
        most: positions of the fullest row, or more; counted (the host waits for a GPU) if None.
    """
    size, device = len(masked_positions), masked_positions.device
    count = (masked_positions >= 0).sum()
    # Padding repeats the last position: numbers of another slot could be inf or NaN, and 0 x inf
    # would put NaN into the gradients.
    number = torch.minimum(torch.arange(size, device=device), (count - 1).clamp(min=0))
    slots = masked_positions[number].clamp(min=0)
    row = slots // num_slots
    bounds = torch.searchsorted(row, torch.arange(num_rows + 1, device=device)).clamp(max=count)
    if most is None:
        most = int(bounds.diff().max())
    most = max(1, most)
    table = bounds[:-1, None] + torch.arange(most, device=device)
    return Queries(slots, table.clamp(max=size - 1), row * most + number - bounds[row])


def _attend(
    queries: Queries, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    mask: torch.Tensor, num_heads: int, dropout: float,
) -> torch.Tensor:
    """Let the queries attend to all slots of their rows.

    Args:
        query: `(C, D)`.
        key, value: `(B, S, D)`.
        mask: additive, `(B, 1, S, S)`.
    Returns:
        `(C, D)`.
    """
    (num_rows, most), slots = queries.table.shape, key.shape[1]

    def by_head(states: torch.Tensor) -> torch.Tensor:
        return states.view(num_rows, -1, num_heads, states.shape[-1] // num_heads).transpose(1, 2)

    table = queries.table.flatten()
    slot = (queries.slots[table] % slots).view(num_rows, 1, most, 1)
    context = functional.scaled_dot_product_attention(
        by_head(query.index_select(0, table)), by_head(key), by_head(value),
        attn_mask=mask.gather(2, slot.expand(-1, -1, -1, slots)), dropout_p=dropout,
    )
    return context.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, queries.places)


def _bert_last_layer(
    layer: Any, hidden: torch.Tensor, mask: torch.Tensor, queries: Queries, **_: Any
) -> torch.Tensor:
    attention = layer.attention.self
    rows = queries.of(hidden)
    context = _attend(
        queries, attention.query(rows), attention.key(hidden), attention.value(hidden), mask,
        attention.num_attention_heads, attention.dropout.p if layer.training else 0.0,
    )
    rows = layer.attention.output(context, rows)
    return layer.output(layer.intermediate(rows), rows)


def _distilbert_last_layer(
    layer: Any, hidden: torch.Tensor, mask: torch.Tensor, queries: Queries, **_: Any
) -> torch.Tensor:
    attention = layer.attention
    rows = queries.of(hidden)
    context = _attend(
        queries, attention.q_lin(rows), attention.k_lin(hidden), attention.v_lin(hidden), mask,
        attention.n_heads, attention.dropout.p if layer.training else 0.0,
    )
    rows = layer.sa_layer_norm(attention.out_lin(context) + rows)
    return layer.output_layer_norm(layer.ffn(rows) + rows)


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary position embedding (Su et al. 2021) to `(..., heads, d)`, in fp32."""
    # Step by step as in transformers, in float64 too: full and subset must agree.
    first, second = states.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (states.float() * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)).to(states.dtype)


def _modernbert_last_layer(
    layer: Any, hidden: torch.Tensor, mask: torch.Tensor, queries: Queries,
    position_embeddings: tuple[torch.Tensor, torch.Tensor], **_: Any,
) -> torch.Tensor:
    attention, width = layer.attn, hidden.shape[-1]
    weight, bias = attention.Wqkv.weight, attention.Wqkv.bias
    bias_q, bias_kv = (None, None) if bias is None else (bias[:width], bias[width:])
    normed = layer.attn_norm(hidden)
    query = functional.linear(queries.of(normed), weight[:width], bias_q)
    key, value = functional.linear(normed, weight[width:], bias_kv).chunk(2, dim=-1)
    cos, sin = position_embeddings
    at = [queries.of(part.expand(*hidden.shape[:2], -1)) for part in (cos, sin)]

    def rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        by_head = states.unflatten(-1, (-1, attention.head_dim))
        return _rotate(by_head, cos, sin).flatten(-2)

    context = _attend(
        queries, rotated(query, *at), rotated(key, cos, sin), value, mask,
        width // attention.head_dim, attention.attention_dropout if layer.training else 0.0,
    )
    rows = queries.of(hidden)
    rows = rows + attention.out_drop(attention.Wo(context))
    return rows + layer.mlp(layer.mlp_norm(rows))


@dataclass(frozen=True)
class Family:
    """What differs from one model family to another.

    Attributes:
        encoder: `...ForMaskedLM` -> its encoder module.
        transform: `...ForMaskedLM` -> dense layer, layer norm and activation of its MLM head; the
            activation by transformers' name.
        head_prefixes: names under which the MLM head's own parameters are stored.
        first_position: configuration -> position id of the first token of a piece.
        local_window: configuration -> half width of local attention, None where all is global.
        num_positions: configuration -> largest number of slots per row.
        positions_from_padding: whether positions are counted from the padding id on.
        layers: encoder -> its layers.
        last_layer: (layer, hidden `(B, S, D)`, mask, queries, the encoder's other arguments) ->
            `(C, D)`, the layer's output at the slots of the queries.
        split_linear: last layer -> the linear layers whose weights `last_layer` splits.
        token_rows: encoder -> the norm that stands directly behind its word table; None elsewhere.
    """

    encoder: Callable[[Any], nn.Module]
    transform: Callable[[Any], tuple[nn.Linear, nn.LayerNorm, str]]
    head_prefixes: tuple[str, ...]
    first_position: Callable[[Any], int]
    local_window: Callable[[Any], int | None]
    num_positions: Callable[[Any], int]
    layers: Callable[[Any], nn.ModuleList]
    last_layer: Callable[..., torch.Tensor]
    split_linear: Callable[[Any], tuple[nn.Linear, ...]] = lambda layer: ()
    positions_from_padding: bool = False
    token_rows: Callable[[Any], nn.Module] | None = None


FAMILIES: dict[str, Family] = {
    "bert": Family(
        encoder=lambda model: model.bert,
        transform=lambda model: (
            model.cls.predictions.transform.dense, model.cls.predictions.transform.LayerNorm,
            model.config.hidden_act,
        ),
        head_prefixes=("cls.",),
        first_position=lambda config: 0,
        local_window=lambda config: None,
        num_positions=lambda config: config.max_position_embeddings,
        layers=lambda encoder: encoder.encoder.layer,
        last_layer=_bert_last_layer,
    ),
    "roberta": Family(
        encoder=lambda model: model.roberta,
        # Its head has the exact GELU, whatever `hidden_act` says.
        transform=lambda model: (model.lm_head.dense, model.lm_head.layer_norm, "gelu"),
        head_prefixes=("lm_head.",),
        # Positions up to the padding id are never used: <pad> is 1, so the first token is at 2.
        first_position=lambda config: config.pad_token_id + 1,
        local_window=lambda config: None,
        num_positions=lambda config: config.max_position_embeddings - config.pad_token_id - 1,
        layers=lambda encoder: encoder.encoder.layer,
        last_layer=_bert_last_layer,
        positions_from_padding=True,
    ),
    "distilbert": Family(
        encoder=lambda model: model.distilbert,
        transform=lambda model: (
            model.vocab_transform, model.vocab_layer_norm, model.config.activation
        ),
        head_prefixes=("vocab_transform.", "vocab_layer_norm.", "vocab_projector."),
        first_position=lambda config: 0,
        local_window=lambda config: None,
        num_positions=lambda config: config.max_position_embeddings,
        layers=lambda encoder: encoder.transformer.layer,
        last_layer=_distilbert_last_layer,
    ),
    "modernbert": Family(
        encoder=lambda model: model.model,
        transform=lambda model: (
            model.head.dense, model.head.norm, model.config.classifier_activation
        ),
        head_prefixes=("head.", "decoder."),
        first_position=lambda config: 0,
        local_window=lambda config: config.sliding_window,
        num_positions=lambda config: config.max_position_embeddings,
        layers=lambda encoder: encoder.layers,
        last_layer=_modernbert_last_layer,
        split_linear=lambda layer: (layer.attn.Wqkv,),
        token_rows=lambda encoder: encoder.embeddings.norm,
    ),
}


def attention_mask(
    family: Family, config: Any, document_ids: torch.Tensor, position_ids: torch.Tensor,
    dtype: torch.dtype,
) -> Any:
    """Build the mask that lets each slot attend to the slots of its own piece only.

    Args:
        document_ids: piece of each slot, `(B, S)` int64; padding slots share an id of their own,
            so that no softmax row is empty.
        position_ids: position of each slot in its piece, from 0, `(B, S)` int64.
        dtype: of the activations; the mask is additive, 0 or the lowest number.
    Returns:
        `(B, 1, S, S)`, or a dictionary of two such masks for families with local attention.
        # pieces [0 0 1] -> rows [1 1 0], [1 1 0], [0 0 1]
    """
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]

    def additive(allowed: torch.Tensor) -> torch.Tensor:
        blocked = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=allowed.device)
        return torch.where(allowed, torch.zeros((), dtype=dtype, device=allowed.device), blocked)

    window = family.local_window(config)
    if window is None:
        return additive(same)
    distance = (position_ids[:, None, :, None] - position_ids[:, None, None, :]).abs()
    return {
        "full_attention": additive(same),
        "sliding_attention": additive(same & (distance <= window)),
    }


def first_slot_only(classifier: Any) -> None:
    """Let the last layer of a sequence classifier compute the first slot only, for inference.

    Its top reads nothing else, so the logits stay the same. A classifier that reads more (mean
    pooling) or belongs to an unknown family is left unchanged.
    """
    family = FAMILIES.get(classifier.config.model_type)
    if family is None or getattr(classifier.config, "classifier_pooling", "cls") != "cls":
        return
    layer: Any = family.layers(family.encoder(classifier))[-1]

    def forward(layer: Any, hidden: torch.Tensor, attention_mask: Any = None, *_: Any,
                **options: Any) -> Any:
        num_rows, num_slots = hidden.shape[:2]
        row = torch.arange(num_rows, device=hidden.device)
        if attention_mask is None:
            attention_mask = hidden.new_zeros(()).expand(num_rows, 1, num_slots, num_slots)
        queries = Queries(row * num_slots, row[:, None], row)
        return family.last_layer(layer, hidden, attention_mask, queries, **options)[:, None]

    layer.forward = MethodType(forward, layer)  # of a copy's own layer where a model is copied


def token_rows(model: Any) -> nn.Module:
    """Return the module whose output is the row of each token, before anything is added to it.

    The word table; where a norm follows it directly, that norm: a step along a row that is
    normalized alone changes nothing, so that gradient times embedding would be 0 everywhere.
    """
    family = FAMILIES.get(getattr(model.config, "model_type", ""))
    if family is None or family.token_rows is None:
        return model.get_input_embeddings()
    return family.token_rows(family.encoder(model))


def checkpoint_activations(hf_model: Any) -> None:
    """Recompute the activations of each layer in the backward pass instead of storing them."""
    # transformers 5 renamed the method; both names take the same argument.
    enable = getattr(hf_model, "activation_checkpointing_enable", None)
    (enable or hf_model.gradient_checkpointing_enable)({"use_reentrant": False})
