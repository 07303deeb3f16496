"""Batches of many short inputs: what is in them, and that nothing but time depends on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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

from preprocess.store import ranges
from train.model import first_slot_only
from train.stages.importance import EDGE, Query, explain
from train.stages.inference import IdLists, Runner, Template, budget_batches, one_by_one


def test_worked_examples():
    lists = [batch.tolist() for batch in budget_batches([5, 2, 6, 2, 2], 9, pass_slots=0)]
    assert lists == [[2], [0], [1, 3, 4]]
    lists = [batch.tolist() for batch in budget_batches([5, 2, 6, 2, 2], 15, pass_slots=2)]
    assert lists == [[2, 0], [1, 3, 4]]
    assert ranges(np.array([5, 0, 9]), np.array([2, 3, 0])).tolist() == [5, 6, 0, 1, 2]
    assert ranges(np.empty(0, int), np.empty(0, int)).tolist() == []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=40), st.integers(1, 100), st.integers(0, 40))
def test_padding_stays_below_the_price_of_a_pass(lengths, batch_tokens, pass_slots):
    batches = budget_batches(lengths, batch_tokens, pass_slots)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    longest_first = [lengths[batch[0]] for batch in batches]
    assert longest_first == sorted(longest_first, reverse=True)
    for batch in batches:
        inside = np.array(lengths)[batch]
        longest = max(1, inside[0])
        assert len(batch) == 1 or len(batch) * longest <= batch_tokens
        assert len(batch) == 1 or (inside[0] - inside).sum() <= pass_slots
    for batch, after in zip(batches[:-1], batches[1:], strict=True):
        last, first, longest = lengths[batch[-1]], lengths[after[0]], max(1, lengths[batch[0]])
        full = (len(batch) + 1) * longest > batch_tokens
        assert full or last > first, "inputs of one length are parted only by the budget"


@given(st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=6), st.data())
def test_id_lists_are_lists_of_ids(lists, data):
    ids = IdLists.of(lists)
    assert list(ids) == lists
    which = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=8)) if lists else []
    taken = ids.take(np.array(which, dtype=np.int64))
    assert list(taken) == list(taken.packed()) == [lists[i] for i in which]
    assert taken.tokens().tolist() == sum((lists[i] for i in which), [])


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 32, "vocab_size": 40, "pad_token_id": 0}
CLASSIFIERS = {
    "bert": (BertForSequenceClassification, BertConfig(**SMALL)),
    "roberta": (RobertaForSequenceClassification, RobertaConfig(**{**SMALL, "pad_token_id": 1})),
    "distilbert": (DistilBertForSequenceClassification, DistilBertConfig(
        dim=16, n_layers=2, n_heads=2, hidden_dim=32, vocab_size=40, pad_token_id=0)),
    "modernbert": (ModernBertForSequenceClassification, ModernBertConfig(
        **SMALL, local_attention=4, global_attn_every_n_layers=2, classifier_pooling="cls",
        cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3)),
    "modernbert-mean": (ModernBertForSequenceClassification, ModernBertConfig(
        **SMALL, local_attention=4, global_attn_every_n_layers=2, classifier_pooling="mean",
        cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3)),
}


class Pad:
    def __init__(self, pad_token_id):
        self.pad_token_id = pad_token_id


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_first_slot_alone_gives_the_same_logits(name):
    """In batches with padding and without, against the whole model with one input a pass."""
    make, config = CLASSIFIERS[name]
    torch.manual_seed(0)
    model = make(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    rng = np.random.default_rng(0)
    texts = [rng.integers(5, 40, n).tolist() for n in (1, 3, 3, 9, 2, 9, 14, 0)]
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([[2, *ids, 3]])).logits[0].numpy() for ids in texts]
    first_slot_only(model)
    spread = np.ptp(np.array(alone), axis=0).min()
    assert spread > 0.05, "logits that are alike test nothing"
    for batch_tokens in (1, 24, 1000):
        template = Template((2,), (), (3,), 0)
        runner = Runner(model, template, Pad(config.pad_token_id), torch.device("cpu"),
                        batch_tokens)
        seen = np.full((len(texts), 2), np.nan)
        for batch, logits, _ in runner.run(texts):
            seen[batch] = logits
        np.testing.assert_allclose(seen, alone, atol=2e-5)


class Noisy(torch.nn.Module):
    """Says 0.55 or 0.8 by the ids alone, and a last digit by how many inputs are in the pass."""

    config = type("Config", (), {"num_labels": 2})

    def forward(self, input_ids, **_):
        known = 0.55 + 0.25 * (input_ids.sum(1).double() % 3 == 0)
        noise = 1e-7 * ((len(input_ids) - 1) % 5 - 2) * (len(input_ids) > 1)
        odds = torch.logit(known + noise)
        return type("Output", (), {"logits": torch.stack([torch.zeros_like(odds), odds], 1)})


def test_decisions_at_the_edge_do_not_depend_on_the_batch():
    """The difference of two confidences is delta itself: only the noise decides."""
    rng = np.random.default_rng(0)
    queries = [Query(i, 0, 1, [], rng.integers(5, 9, n).tolist())
               for i, n in enumerate(rng.integers(1, 9, 60))]

    def found(edge, **options):
        runner = Runner(Noisy(), Template((2,), (), (3,), 0), Pad(0), torch.device("cpu"),
                        **options)
        marks, num_alone = explain(runner, queries, 0.25, edge=edge)
        assert all(len(m) == len(q.tokens) for m, q in zip(marks, queries, strict=True))
        return np.concatenate(marks).tolist(), num_alone

    alone, _ = found(0.0, batch_tokens=1, cut=one_by_one)
    assert found(0.0, batch_tokens=100)[0] != alone, "the noise is felt"
    for batch_tokens in (20, 100, 5000):
        marks, num_alone = found(EDGE, batch_tokens=batch_tokens)
        assert marks == alone and num_alone
