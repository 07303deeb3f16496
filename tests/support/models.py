"""Tiny models of every family, and packed rows of random pieces."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

VOCAB = 60
SIZE = {"vocab_size": VOCAB, "initializer_range": 0.2}
WIDE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
}


def tiny_config(family: str):
    """Make a configuration of two layers (four for ModernBERT: both kinds of attention)."""
    from transformers import BertConfig, DistilBertConfig, ModernBertConfig, RobertaConfig

    if family == "bert":
        return BertConfig(**SIZE, **WIDE, max_position_embeddings=64, pad_token_id=0)
    if family == "roberta":
        return RobertaConfig(
            **SIZE, **WIDE, max_position_embeddings=66, pad_token_id=1, type_vocab_size=1
        )
    if family == "distilbert":
        return DistilBertConfig(
            **SIZE, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=64,
            pad_token_id=0,
        )
    assert family == "modernbert"
    return ModernBertConfig(
        **SIZE, **{**WIDE, "num_hidden_layers": 4}, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3, local_attention=8,
        global_attn_every_n_layers=3,
    )


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 32, "vocab_size": 40}


def small_classifiers(num_labels: int = 2) -> dict[str, tuple[Any, Any]]:
    """Return class and configuration of a classifier of each family, and of both its poolings."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        DistilBertConfig,
        DistilBertForSequenceClassification,
        ModernBertConfig,
        ModernBertForSequenceClassification,
        RobertaConfig,
        RobertaForSequenceClassification,
    )

    def modernbert(pooling: str) -> Any:
        return ModernBertForSequenceClassification, ModernBertConfig(
            **SMALL, num_labels=num_labels, pad_token_id=0, local_attention=4,
            global_attn_every_n_layers=2, classifier_pooling=pooling, cls_token_id=2,
            sep_token_id=3, bos_token_id=2, eos_token_id=3)

    return {
        "bert": (BertForSequenceClassification,
                 BertConfig(**SMALL, num_labels=num_labels, pad_token_id=0)),
        "roberta": (RobertaForSequenceClassification,
                    RobertaConfig(**SMALL, num_labels=num_labels, pad_token_id=1)),
        "distilbert": (DistilBertForSequenceClassification, DistilBertConfig(
            dim=16, n_layers=2, n_heads=2, hidden_dim=32, vocab_size=40, pad_token_id=0,
            num_labels=num_labels)),
        "modernbert": modernbert("cls"),
        "modernbert-mean": modernbert("mean"),
    }


def packed_rows(lengths: list[list[int]], slots: int = 64, seed: int = 0):
    """Make rows of random pieces of these lengths, special tokens included."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), slots, dtype=torch.int64)
    positions, pieces, number = torch.zeros_like(ids), torch.full_like(ids, -1), 0
    for r, row in enumerate(lengths):
        at = 0
        for length in row:
            here = slice(at, at + length)
            ids[r, here] = torch.randint(5, VOCAB, (length,), generator=generator)
            positions[r, here] = torch.arange(length)
            pieces[r, here] = number
            at, number = at + length, number + 1
    return ids, positions, pieces


LENGTHS = [[20, 3, 17, 9], [64], [4, 40, 5], []]  # windows of ModernBERT reach 4 to each side


class MeanClassifier(torch.nn.Module):
    """A linear classifier of the mean of a text's embeddings; its logits are 0 and that.

    Simple enough to compute by hand: the worked examples of importance are of it. An id that the
    table lacks, of padding, stands for nothing; an empty text has the logit 0.
    """

    def __init__(self, table: list[list[float]], weights: list[float]) -> None:
        super().__init__()
        self.rows = torch.nn.Embedding.from_pretrained(torch.tensor(table), freeze=False)
        self.weights = torch.nn.Parameter(torch.tensor(weights))
        self.config = SimpleNamespace(num_labels=2)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.rows

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        real = input_ids < self.rows.num_embeddings
        rows = self.rows(input_ids * real) * real[..., None]
        logit = rows.sum(1) @ self.weights / real.sum(1).clamp(min=1)
        return SimpleNamespace(logits=torch.stack([torch.zeros_like(logit), logit], dim=1))
