"""Model families, packed attention, and what goes in and out of `hf/` folders.

The only file that names transformers' model classes. A family is a row of `FAMILIES`: where
its encoder, its MLM head and its first position are, and how it takes a block-diagonal
attention mask. Letters: `B` rows, `S` slots of a row, `M` masked positions, `D` hidden size.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional

import csrc
from csrc import reference
from preprocess.corpus import resolve_path
from preprocess.errors import ConfigError, DataError, writing
from preprocess.files import file_sha256, fingerprint_text, sync
from preprocess.progress import say
from preprocess.store import TokenStore

# Layers, hidden size and heads of the published BERT sizes (Turc et al. 2019; Devlin et al. 2019).
BERT_SIZES = {
    "bert-tiny": (2, 128, 2),
    "bert-mini": (4, 256, 4),
    "bert-small": (4, 512, 8),
    "bert-medium": (8, 512, 8),
    "bert-base": (12, 768, 12),
    "bert-large": (24, 1024, 16),
}
# What transformers raises for weights that are absent, cut short, or of another shape.
LOAD_ERRORS = (OSError, ValueError, RuntimeError, SafetensorError)


class Queries(NamedTuple):
    """The slots of a batch that the last layer computes: `C` of them, at most `K` in a row.

    Attributes:
        slots: flat slots, `(C,)` int64; padding points at slot 0.
        table: number of the query that row b has at place k, `(B, K)` int64; places that a row
            does not fill hold any number.
        places: flat place `b * K + k` of each query, `(C,)` int64.
    """

    slots: torch.Tensor
    table: torch.Tensor
    places: torch.Tensor

    def of(self, states: torch.Tensor) -> torch.Tensor:
        """The states of the queries, `(B, S, D)` to `(C, D)`."""
        return states.flatten(0, 1).index_select(0, self.slots)


def find_queries(
    masked_positions: torch.Tensor, num_rows: int, num_slots: int, most: int | None = None
) -> Queries:
    """Arrange masked positions by row.

    Args:
        masked_positions: flat slots, ascending, padded at the end with -1, `(C,)`.
        num_rows, num_slots: `B` and `S` of the batch.
        most: positions of the fullest row, or more; counted (the host waits for a GPU) if None.
    """
    valid = masked_positions >= 0
    slots = masked_positions.clamp(min=0)
    row = torch.where(valid, slots // num_slots, num_rows)  # ascending, padding after the last
    device = slots.device
    bounds = torch.searchsorted(row, torch.arange(num_rows + 1, device=device))
    if most is None:
        most = int(bounds.diff().max())
    most = max(1, most)
    place = torch.arange(len(slots), device=device) - bounds[row.clamp(max=num_rows - 1)]
    places = torch.where(valid, row * most + place, 0)
    table = bounds[:-1, None] + torch.arange(most, device=device)
    return Queries(slots, table.clamp(max=len(slots) - 1), places)


def _attend(
    queries: Queries, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    mask: torch.Tensor, num_heads: int, dropout: float,
) -> torch.Tensor:
    """Attention of the queries to all slots of their rows.

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
    """Rotary position embedding (Su et al. 2021) of `(..., heads, d)` by `(..., d)`, in fp32."""
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
        logits: (`...ForMaskedLM`, hidden `(..., D)`) -> `(..., V)`, its whole MLM head.
        transform: `...ForMaskedLM` -> dense layer, layer norm and activation of its MLM head; the
            activation by transformers' name.
        head_prefixes: names under which the MLM head's own parameters are stored.
        first_position: configuration -> position id of the first token of a piece.
        local_window: configuration -> half width of local attention, None where all is global.
        num_positions: configuration -> slots that a row may have.
        layers: encoder -> its layers.
        last_layer: (layer, hidden `(B, S, D)`, mask, queries, what else the encoder hands to a
            layer) -> `(C, D)`, what the layer computes for the slots of the queries alone.
        split_linear: last layer -> the linear layers whose weights `last_layer` takes apart.
    """

    encoder: Callable[[Any], nn.Module]
    logits: Callable[[Any, torch.Tensor], torch.Tensor]
    transform: Callable[[Any], tuple[nn.Linear, nn.LayerNorm, str]]
    head_prefixes: tuple[str, ...]
    first_position: Callable[[Any], int]
    local_window: Callable[[Any], int | None]
    num_positions: Callable[[Any], int]
    layers: Callable[[Any], nn.ModuleList]
    last_layer: Callable[..., torch.Tensor]
    split_linear: Callable[[Any], tuple[nn.Linear, ...]] = lambda layer: ()


def _bert_transform(model: Any) -> tuple[nn.Linear, nn.LayerNorm, str]:
    transform = model.cls.predictions.transform
    return transform.dense, transform.LayerNorm, model.config.hidden_act


FAMILIES: dict[str, Family] = {
    "bert": Family(
        encoder=lambda model: model.bert,
        logits=lambda model, hidden: model.cls(hidden),
        transform=_bert_transform,
        head_prefixes=("cls.",),
        first_position=lambda config: 0,
        local_window=lambda config: None,
        num_positions=lambda config: config.max_position_embeddings,
        layers=lambda encoder: encoder.encoder.layer,
        last_layer=_bert_last_layer,
    ),
    "roberta": Family(
        encoder=lambda model: model.roberta,
        logits=lambda model, hidden: model.lm_head(hidden),
        # Its head has the exact GELU, whatever `hidden_act` says.
        transform=lambda model: (model.lm_head.dense, model.lm_head.layer_norm, "gelu"),
        head_prefixes=("lm_head.",),
        # Positions up to the padding id are never used: <pad> is 1, so the first token is at 2.
        first_position=lambda config: config.pad_token_id + 1,
        local_window=lambda config: None,
        num_positions=lambda config: config.max_position_embeddings - config.pad_token_id - 1,
        layers=lambda encoder: encoder.encoder.layer,
        last_layer=_bert_last_layer,
    ),
    "distilbert": Family(
        encoder=lambda model: model.distilbert,
        logits=lambda model, hidden: model.vocab_projector(
            model.vocab_layer_norm(model.activation(model.vocab_transform(hidden)))
        ),
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
        logits=lambda model, hidden: model.decoder(model.head(hidden)),
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
    ),
}

# transformers' names of the activations that an MLM head may have -> those of `csrc`.
HEAD_ACTIVATIONS: dict[str, Literal["gelu", "gelu_tanh"]] = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
}


def attention_mask(
    family: Family, config: Any, document_ids: torch.Tensor, position_ids: torch.Tensor,
    dtype: torch.dtype,
) -> Any:
    """Let each slot attend to the slots of its own piece only.

    Args:
        document_ids: piece of each slot, `(B, S)`; padding slots share one id of their own, so
            that no softmax row is empty.
        position_ids: position of each slot in its piece, from 0, `(B, S)`.
        dtype: of the activations; the mask is additive, 0 or the lowest number.
    Returns:
        `(B, 1, S, S)`, or for families with local attention a dictionary of two such masks.
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


class PackedMaskedLM(nn.Module):
    """An encoder with its MLM head, over packed rows, scoring masked positions only.

    Attributes:
        hf: the transformers `...ForMaskedLM` model; its parameters are the only ones here.
        carried: tensors of the source checkpoint that MLM does not use but that go out again
            with `hf/` (a pooler), by their full names.
        fresh_head: whether the checkpoint had no MLM head.
        last_layer_subset: whether the last layer computes queries, attention output, feed-forward
            and norms for masked positions only; loss and gradients are the same.
        head_implementation: a name in `csrc.IMPLEMENTATIONS`; None takes the device's.
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
        activation = self.family.transform(hf)[2]
        if activation not in HEAD_ACTIVATIONS:
            raise ConfigError(
                f"the MLM head of {hf.config.name_or_path or hf.config.model_type} has the "
                f"activation {activation!r}; known are {', '.join(HEAD_ACTIVATIONS)}"
            )
        self._let_last_layer_take_queries()

    def _let_last_layer_take_queries(self) -> None:
        """Give the last layer an argument `queries`; without it, it does what it did."""
        family = self.family
        layer: Any = family.layers(family.encoder(self.hf))[-1]
        whole = layer.forward

        def forward(hidden: torch.Tensor, attention_mask: Any = None, *args: Any,
                    queries: Queries | None = None, **options: Any) -> Any:
            if queries is None:
                return whole(hidden, attention_mask, *args, **options)
            return family.last_layer(layer, hidden, attention_mask, queries, **options)

        layer.forward = forward

    def head(self) -> csrc.MaskedLMHead:
        """The tensors of the MLM head."""
        dense, norm, activation = self.family.transform(self.hf)
        decoder = self.hf.get_output_embeddings()
        return csrc.MaskedLMHead(
            decoder.weight, decoder.bias, dense.weight, dense.bias, norm.weight, norm.bias,
            norm.eps, HEAD_ACTIVATIONS[activation],
        )

    def borrowed_parameters(self) -> list[tuple[nn.Module, nn.Parameter]]:
        """Parameters that a module's forward pass uses though they belong to another module.

        ZeRO-3 must be told: it makes parameters whole only while their own module runs.
        """
        layer = self.family.layers(self.family.encoder(self.hf))[-1]
        split = [p for linear in self.family.split_linear(layer) for p in linear.parameters()]
        head = [p for p in self.head().tensors().values() if isinstance(p, nn.Parameter)]
        return [(self, p) for p in head] + [(layer, p) for p in split]

    def set_output_bias(self, log_frequency: np.ndarray) -> None:
        """Start the head's output bias, where it has one, at log-frequencies, `(V,)` float64."""
        bias = self.hf.get_output_embeddings().bias
        if bias is not None:
            with torch.no_grad():
                # Ids that the tokenizer lacks: at 0 they would be the likeliest.
                bias.fill_(float(log_frequency.min()))
                bias[:len(log_frequency)] = torch.from_numpy(log_frequency).to(bias.dtype)

    def encode(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, document_ids: torch.Tensor,
        queries: Queries | None = None,
    ) -> torch.Tensor:
        """Hidden states of packed rows: `(B, S, D)`, or `(C, D)` of the queries alone.

        See `attention_mask` for the other arguments.
        """
        dtype = self.hf.get_input_embeddings().weight.dtype
        mask = attention_mask(self.family, self.hf.config, document_ids, position_ids, dtype)
        first = self.family.first_position(self.hf.config)
        encoder = self.family.encoder(self.hf)
        only = {} if queries is None else {"queries": queries}
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
        """Sum of the cross entropies over masked positions, and how many were guessed right.

        Args:
            input_ids: corrupted ids, `(B, S)` int64.
            position_ids, document_ids: see `attention_mask`.
            masked_positions, masked_labels: see `csrc.masked_lm_loss`, `(M,)`.
            most_masked: masked positions of the fullest row, or more; without it they are
                counted, for which the host waits for a GPU.
            predict: return the likeliest id at each masked position instead, `(M,)` int64;
                positions of the padding may be missing.
        """
        hidden, positions, labels = self.encode_masked(
            input_ids, position_ids, document_ids, masked_positions, masked_labels, most_masked
        )
        if predict:
            rows = hidden.flatten(0, -2).index_select(0, positions.clamp(min=0))
            return reference.logits(rows, self.head()).argmax(-1)
        return csrc.masked_lm_loss(
            hidden, positions, labels, self.head(), self.head_implementation
        )

    def encode_masked(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, document_ids: torch.Tensor,
        masked_positions: torch.Tensor, masked_labels: torch.Tensor, most_masked: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What `csrc.masked_lm_loss` takes: hidden states, masked positions in them, labels.

        The arguments are those of `forward`.
        """
        if not (self.last_layer_subset and len(masked_positions)):
            hidden = self.encode(input_ids, position_ids, document_ids)
            return hidden, masked_positions, masked_labels
        if not masked_positions.is_cuda:  # padding is rows to compute; here it can be cut
            used = max(1, int((masked_positions >= 0).sum()))
            masked_positions, masked_labels = masked_positions[:used], masked_labels[:used]
        num_rows, num_slots = input_ids.shape
        queries = find_queries(masked_positions, num_rows, num_slots, most_masked)
        hidden = self.encode(input_ids, position_ids, document_ids, queries)
        number = torch.arange(len(masked_positions), device=masked_positions.device)
        return hidden, torch.where(masked_positions >= 0, number, -1), masked_labels


def _quiet_transformers() -> None:
    """Keep transformers' loading reports and bars off the terminal; we say what matters."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _hub_error(name: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"--model_name_or_path {name}: cannot be loaded ({str(error).splitlines()[0]}); give a "
        "folder with config.json and model.safetensors, or a hub name that this machine reaches"
    )


def local_checkpoint(name: str) -> str:
    """Turn a pypi: spec into the folder it names; leave folders and hub names alone."""
    if name.startswith("pypi:"):
        return str(resolve_path(name))
    if os.path.sep in name and not os.path.isdir(name) and (
        name.startswith((".", os.path.sep)) or name.count("/") > 1
    ):
        raise ConfigError(f"--model_name_or_path {name}: no such folder")
    return name


def _load_with(auto_class: Any, name: str, trust_remote_code: bool) -> Any:
    """What `auto_class` makes of a checkpoint folder, hub name or pypi: spec."""
    _quiet_transformers()
    path = local_checkpoint(name)
    try:
        return auto_class.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise _hub_error(name, error) from None


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """Load the fast tokenizer of a checkpoint folder, hub name or pypi: spec."""
    from transformers import AutoTokenizer

    tokenizer = _load_with(AutoTokenizer, name, trust_remote_code)
    if not tokenizer.is_fast:
        raise ConfigError(f"{name}: needs a fast tokenizer (tokenizer.json)")
    return tokenizer


def load_config(name: str, trust_remote_code: bool = False) -> Any:
    """Load a checkpoint's configuration and check that its family is known."""
    from transformers import AutoConfig

    config = _load_with(AutoConfig, name, trust_remote_code)
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"{name}: model type {config.model_type!r} is not supported; known: "
            f"{', '.join(FAMILIES)}"
        )
    return config


def named_config(name: str, vocab_size: int, pad_token_id: int) -> Any:
    """The configuration of a published BERT size, or of a folder with a config.json."""
    from transformers import BertConfig

    if name in BERT_SIZES:
        layers, hidden, heads = BERT_SIZES[name]
        return BertConfig(
            vocab_size=vocab_size, hidden_size=hidden, num_hidden_layers=layers,
            num_attention_heads=heads, intermediate_size=4 * hidden, pad_token_id=pad_token_id,
        )
    if os.path.isdir(name):
        config = load_config(name)
        config.vocab_size, config.pad_token_id = vocab_size, pad_token_id
        return config
    raise ConfigError(
        f"--model_config {name}: not a folder with config.json, and the names are "
        f"{', '.join(BERT_SIZES)}"
    )


def check_row_length(config: Any, max_seq_length: int) -> None:
    """Refuse rows longer than the model has positions for."""
    limit = FAMILIES[config.model_type].num_positions(config)
    if max_seq_length > limit:
        raise ConfigError(
            f"--max_seq_length {max_seq_length}: this model has {limit} positions; give at most "
            f"{limit}"
        )


def build_masked_lm(config: Any, seed: int) -> PackedMaskedLM:
    """A model with fresh weights drawn from `seed`."""
    from transformers import AutoModelForMaskedLM

    _quiet_transformers()
    torch.manual_seed(seed)
    return PackedMaskedLM(AutoModelForMaskedLM.from_config(config), {}, fresh_head=True)


def load_masked_lm(name: str, seed: int, trust_remote_code: bool = False) -> PackedMaskedLM:
    """Load an encoder with its MLM head; draw the head from `seed` where there is none.

    Raises:
        ConfigError: not a checkpoint of a known family, or one without its encoder's weights.
    """
    from transformers import AutoModel, AutoModelForMaskedLM

    load_config(name, trust_remote_code)
    path = local_checkpoint(name)
    torch.manual_seed(seed)
    try:
        hf, info = AutoModelForMaskedLM.from_pretrained(
            path, output_loading_info=True, trust_remote_code=trust_remote_code,
            dtype=torch.float32,
        )
    except LOAD_ERRORS as error:
        raise _hub_error(name, error) from None
    family = FAMILIES[hf.config.model_type]
    missing = set(info["missing_keys"])
    missing_head = {key for key in missing if key.startswith(family.head_prefixes)}
    if missing - missing_head:
        raise ConfigError(
            f"--model_name_or_path {name}: {len(missing - missing_head)} encoder weights are "
            f"missing, as {sorted(missing - missing_head)[0]}; it is not such a checkpoint"
        )
    if missing_head:
        say(
            f"{name} has no MLM head: a fresh one is drawn from seed {seed}, its bias set to the "
            "log-frequencies of the tokens"
        )
    # A pooler that came in goes out; MLM models have none, so it is read through the base model.
    base, base_info = AutoModel.from_pretrained(
        path, output_loading_info=True, trust_remote_code=trust_remote_code, dtype=torch.float32
    )
    prefix = hf.base_model_prefix
    carried = {
        f"{prefix}.{key}": value.detach().clone()
        for key, value in base.state_dict().items()
        if key.startswith("pooler.") and key not in base_info["missing_keys"]
    }
    return PackedMaskedLM(hf, carried, fresh_head=bool(missing_head))


def _load_with_fresh_top(
    auto_class: Any, name: str, seed: int, top: tuple[str, ...], trust_remote_code: bool,
    **options: Any,
) -> Any:
    """Load a checkpoint into a model whose top may be absent from it; draw that from `seed`."""
    load_config(name, trust_remote_code)
    torch.manual_seed(seed)
    try:
        model, info = auto_class.from_pretrained(
            local_checkpoint(name), output_loading_info=True, dtype=torch.float32,
            trust_remote_code=trust_remote_code, **options,
        )
    except LOAD_ERRORS as error:
        raise _hub_error(name, error) from None
    lost = [key for key in info["missing_keys"] if not any(part in key for part in top)]
    if lost:
        raise ConfigError(
            f"--model_name_or_path {name}: {len(lost)} encoder weights are missing, as "
            f"{sorted(lost)[0]}; it is not such a checkpoint"
        )
    return model


def load_classifier(
    name: str, label_names: tuple[str, ...], seed: int, trust_remote_code: bool = False
) -> Any:
    """A sequence classifier on a checkpoint's encoder; its top is drawn from `seed` if absent."""
    from transformers import AutoModelForSequenceClassification

    return _load_with_fresh_top(
        AutoModelForSequenceClassification, name, seed,
        ("pooler.", "classifier.", "pre_classifier.", "head."), trust_remote_code,
        num_labels=len(label_names),
        id2label=dict(enumerate(label_names)),
        label2id={label: index for index, label in enumerate(label_names)},
    )


def first_slot_only(classifier: Any) -> None:
    """Let the last layer of a sequence classifier compute the first slot alone, for inference.

    Nothing else is read by its top, so the logits stay the same. One that reads more (mean
    pooling), or of a family not known here, is left as it is.
    """
    family = FAMILIES.get(classifier.config.model_type)
    if family is None or getattr(classifier.config, "classifier_pooling", "cls") != "cls":
        return
    layer: Any = family.layers(family.encoder(classifier))[-1]

    def forward(hidden: torch.Tensor, attention_mask: Any = None, *_: Any, **options: Any) -> Any:
        num_rows, num_slots = hidden.shape[:2]
        row = torch.arange(num_rows, device=hidden.device)
        if attention_mask is None:
            attention_mask = hidden.new_zeros(()).expand(num_rows, 1, num_slots, num_slots)
        queries = Queries(row * num_slots, row[:, None], row)
        return family.last_layer(layer, hidden, attention_mask, queries, **options)[:, None]

    layer.forward = forward


def load_scorer(name: str, seed: int, trust_remote_code: bool = False) -> Any:
    """A token classifier (0 not important, 1 important); its top is drawn from `seed` if absent."""
    from transformers import AutoModelForTokenClassification

    return _load_with_fresh_top(
        AutoModelForTokenClassification, name, seed, ("classifier.", "head."), trust_remote_code,
        num_labels=2, id2label={0: "other", 1: "important"}, label2id={"other": 0, "important": 1},
    )


def checkpoint_activations(hf_model: Any) -> None:
    """Recompute the activations of each layer in the backward pass instead of keeping them."""
    # transformers renamed it in 5.x; both names take the same argument.
    enable = getattr(hf_model, "activation_checkpointing_enable", None)
    (enable or hf_model.gradient_checkpointing_enable)({"use_reentrant": False})


def check_same_vocabulary(store: TokenStore, tokenizer: Any, name: str, remedy: str) -> None:
    """Refuse a model whose ids mean other pieces than the store's.

    Args:
        tokenizer: of the model `name`.
        remedy: what to type, as the end of the sentence.
    """
    theirs = load_tokenizer(store.tokenizer_dir)
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise DataError(
            f"--model_name_or_path {name}: its tokenizer ({len(tokenizer)} ids) is not the one "
            f"of {store.prefix} ({len(theirs)} ids, {store.info['tokenizer']['name']}); {remedy}"
        )


def weights_fingerprint(folder: str | Path, config: Any) -> str:
    """Name the weights of a checkpoint: the sha256 of its files, or the hub's commit.

    Raises:
        DataError: a folder without weights.
    """
    if not Path(folder).is_dir():
        return f"{folder}@{getattr(config, '_commit_hash', None)}"
    files = sorted(Path(folder).glob("*.safetensors")) or sorted(
        Path(folder).glob("pytorch_model*.bin"))
    if not files:
        raise DataError(f"{folder}: no .safetensors and no pytorch_model.bin; give the hf/ folder "
                        "of a finished run, or another checkpoint with weights")
    prints = [file_sha256(file) for file in files]
    return prints[0] if len(prints) == 1 else fingerprint_text(*prints)


def read_lineage(name: str) -> list[dict[str, Any]]:
    """The stages behind an `hf/` folder, oldest first; empty for a checkpoint that is not ours."""
    file = Path(local_checkpoint(name)) / "lineage.json"
    if not file.is_file():
        return []
    try:
        stages = json.loads(file.read_text())["stages"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not a lineage ({error}); export the model again") from None
    return stages


def _model_card(stages: list[dict[str, Any]], out_name: str) -> str:
    """A README for an `hf/` folder."""
    lines = ["---", "library_name: transformers", "tags:", "- selmask", "---", "", f"# {out_name}"]
    lines += ["", "Trained with selmask. Stages, oldest first:", ""]
    lines += ["| stage | masking | steps | masked tokens | seconds |", "|---|---|---|---|---|"]
    for stage in stages:
        cells = (stage.get(key, "") for key in
                 ("stage", "masking", "steps", "masked_tokens", "seconds"))
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def save_hf(
    hf_model: Any,
    state: dict[str, torch.Tensor],
    tokenizer: Any,
    out_dir: str | Path,
    stages: list[dict[str, Any]],
    carried: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a folder that `AutoModelFor...from_pretrained` loads; all of it or nothing.

    Args:
        hf_model: the transformers model, for its class and configuration; its weights are not
            read.
        state: its parameters by name, fp32 on the CPU; tied ones once.
        stages: the whole lineage, this stage last.
        carried: tensors added to the weights.
    """
    out = Path(out_dir)
    weights = {**state, **(carried or {})}
    with writing(out, sum(tensor.nbytes for tensor in weights.values())):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            hf_model.save_pretrained(temporary, state_dict=weights)
            tokenizer.save_pretrained(temporary)
            (temporary / "README.md").write_text(_model_card(stages, out.name))
            lineage = json.dumps({"stages": stages}, indent=2) + "\n"
            (temporary / "lineage.json").write_text(lineage)
            for path in (*temporary.iterdir(), temporary):
                sync(path)
            temporary.chmod(0o755)
            if out.exists():
                shutil.rmtree(out)
            os.rename(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync(out.parent)
