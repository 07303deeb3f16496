"""Batches of many short inputs: what is in them, and that nothing but time depends on them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification

from preprocess.errors import ConfigError
from preprocess.store import ranges
from preprocess.text.continuations import WordTable
from tests.support.language import BAD, GOOD, review
from tests.support.models import small_classifiers
from train.model import first_slot_only
from train.stages.importance import (
    CRITERIA,
    ODDS_EDGE,
    explain,
    measure_left_out,
    take_above,
)
from train.stages.inference import (
    IdLists,
    Runner,
    Template,
    budget_batches,
    choose_dtype,
    in_half,
    one_by_one,
)
from train.stages.queries import EDGE, Query


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


CLASSIFIERS = small_classifiers()


class Pad:
    def __init__(self, pad_token_id):
        self.pad_token_id = pad_token_id


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_first_slot_alone_gives_the_same_logits(name):
    """In batches with padding and without, against the whole model with one input a pass; and
    nearly the same in fp16 and bf16."""
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
        for half, largest in ((torch.float16, 2e-2), (torch.bfloat16, 2e-1)):
            runner = replace(runner, half=half)
            for batch, logits, _ in runner.run(texts):
                seen[batch] = logits
            error = np.abs(np.diff(seen) - np.diff(alone)) / np.maximum(1, np.abs(np.diff(alone)))
            assert 0 < error.max() < largest and runner.counts["repeated"] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_copy_in_half_precision_keeps_what_needs_fp32(dtype):
    model = CLASSIFIERS["modernbert"][0](CLASSIFIERS["modernbert"][1])
    twin = in_half(model, dtype)
    assert twin.model.embeddings.tok_embeddings.weight.dtype == dtype
    exact = {name for name, p in twin.named_parameters() if p.dtype == torch.float32}
    assert exact == {"classifier.weight", "classifier.bias"}
    assert {b.dtype for b in twin.buffers() if b.is_floating_point()} == {torch.float32}
    assert torch.equal(twin.classifier.weight, model.classifier.weight)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_pass_that_overflows_in_fp16_is_repeated_in_fp32():
    make, config = CLASSIFIERS["bert"]
    model = make(config).eval()
    middle = model.bert.encoder.layer[0]
    middle.intermediate.dense.weight.data *= 1e6
    middle.output.dense.weight.data *= 1e-6
    texts = [[5, 6, 7], [8], [9, 9]]

    def run(half):
        runner = Runner(model, Template((2,), (), (3,), 0), Pad(0), torch.device("cpu"), 8, half)
        return [logits.tolist() for _, logits, _ in runner.run(texts)], runner.counts

    (exact, _), (found, counts) = run(None), run(torch.float16)
    assert found == exact and np.isfinite(np.concatenate(found)).all()
    assert counts["repeated"] == counts["passes"] > 1


def test_a_pass_that_does_not_fit_says_what_to_give():
    class Full(torch.nn.Module):
        config = type("Config", (), {})

        def forward(self, **_):
            raise torch.OutOfMemoryError

    runner = Runner(Full(), Template((2,), (), (3,), 0), Pad(0), torch.device("cpu"), 1000)
    with pytest.raises(ConfigError, match="--batch_tokens 1000: .*; give --batch_tokens 500$"):
        list(runner.run([[5]]))


class NoWaits(TorchDispatchMode):
    """Fail where a GPU's host would read a number of a tensor, or the size of a result."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).split(".")[1]
        assert name not in ("is_nonzero", "item", "_local_scalar_dense", "nonzero"), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("half", [None, torch.float16])
@pytest.mark.parametrize("name", sorted(CLASSIFIERS.keys() - {"modernbert-mean"}))
def test_no_pass_reads_a_number_on_the_host(name, half):
    """transformers would look into a mask of padding, whether it hides anything."""
    make, config = CLASSIFIERS[name]
    model = make(config).eval()
    first_slot_only(model)
    runner = Runner(model, Template((2,), (), (3,), 0), Pad(config.pad_token_id),
                    torch.device("cpu"), 1000, half)
    with NoWaits():
        list(runner.run([[5, 6, 7], [8], [9, 9]]))
        list(runner.run([[5, 6, 7]]))
    assert runner.counts["slots"] > runner.counts["tokens"], "some pass is padded"


@pytest.mark.gpu
def test_the_host_does_not_wait_for_a_pass():
    """torch raises where the host waits, but for the event of a pass before the last two."""
    make, config = CLASSIFIERS["bert"]
    model = make(config).eval()
    rng = np.random.default_rng(0)
    texts = [rng.integers(5, 40, n).tolist() for n in rng.integers(1, 30, 200)]
    seen = {}
    for device, half in (("cpu", None), ("cuda", None), ("cuda", torch.float16)):
        runner = Runner(model, Template((2,), (), (3,), 0), Pad(0), torch.device(device), 64, half,
                        cut=budget_batches)
        list(runner.run(texts[:9]))
        logits = np.zeros((len(texts), 2), np.float32)
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            for batch, found, _ in runner.run(texts):
                logits[batch] = found
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        seen[device, half] = logits
    np.testing.assert_allclose(seen["cuda", None], seen["cpu", None], atol=1e-4)
    np.testing.assert_allclose(seen["cuda", torch.float16], seen["cpu", None], atol=2e-2)


@pytest.mark.parametrize(("has_gpu", "is_fast", "exact", "coarse"), [
    (True, False, "fp16", "fp16"), (False, False, "fp32", "fp32"), (False, True, "fp32", "bf16"),
])
def test_auto_is_what_the_device_computes_quickly(monkeypatch, has_gpu, is_fast, exact, coarse):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr("train.stages.inference.has_fast_bf16", lambda: is_fast)
    assert choose_dtype("auto") == exact
    assert choose_dtype("auto", may_be_bf16=True) == coarse
    assert [choose_dtype(name, True) for name in ("fp16", "fp32")] == ["fp16", "fp32"]


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
        marks = explain(runner, queries, 0.25, edge=edge)
        assert all(len(m) == len(q.tokens) for m, q in zip(marks, queries, strict=True))
        return np.concatenate(marks).tolist(), runner.counts

    alone, counts = found(0.0, batch_tokens=1, cut=one_by_one)
    assert counts["turned"] == 0
    assert found(0.0, batch_tokens=100)[0] != alone, "the noise is felt"
    for batch_tokens in (20, 100, 5000):
        marks, counts = found(EDGE, batch_tokens=batch_tokens)
        assert marks == alone and 0 < counts["turned"] < counts["alone"]


def test_words_left_out_at_the_edge_do_not_depend_on_the_batch(monkeypatch):
    """A drop is delta itself: only the noise decides, unless it is asked again."""
    words = WordTable(np.zeros(10, np.uint8), np.zeros(10, np.uint8), np.zeros((1, 1), bool))
    monkeypatch.setattr("train.stages.importance.continuation_table", lambda _: words)
    rng = np.random.default_rng(0)
    queries = [Query(i, 0, 1, [], rng.integers(5, 9, n).tolist())
               for i, n in enumerate(rng.integers(1, 9, 60))]
    delta = float(np.log(0.8 / 0.2) - np.log(0.55 / 0.45))

    def found(edge, **options):
        runner = Runner(Noisy(), Template((2,), (), (3,), 0), Pad(0), torch.device("cpu"),
                        **options)
        values = measure_left_out(runner, queries, delta, edge=edge)
        assert all(len(v) == len(q.tokens) for v, q in zip(values, queries, strict=True))
        return np.concatenate(take_above(values, delta)).tolist(), runner.counts

    alone, _ = found(0.0, batch_tokens=1, cut=one_by_one)
    assert found(0.0, batch_tokens=100)[0] != alone, "the noise is felt"
    for batch_tokens in (20, 100, 5000):
        marks, counts = found(ODDS_EDGE, batch_tokens=batch_tokens)
        assert marks == alone and 0 < counts["turned"] <= counts["alone"]


class Coarse(torch.nn.Module):
    """Says 0.55 or about 0.8 by the ids; a copy in fp16 is off by up to 1 % of P (1 - P)."""

    config = type("Config", (), {"num_labels": 2})

    def __init__(self):
        super().__init__()
        self.rough = torch.nn.Linear(1, 1)
        self.top = torch.nn.Linear(1, 1)

    def forward(self, input_ids, **_):
        total = input_ids.sum(1)
        known = 0.55 + (0.2 + 0.001 * (total % 7)) * (total % 3 == 0)
        odds = torch.logit(known.double())
        if self.rough.weight.dtype == torch.float16:
            odds += 0.01 * torch.sin(total.double() * 7)
        return type("Output", (), {"logits": torch.stack([torch.zeros_like(odds), odds], 1)})


@pytest.mark.parametrize("criterion", CRITERIA)
def test_close_decisions_in_fp16_are_those_of_fp32(criterion, monkeypatch):
    rng = np.random.default_rng(0)
    queries = [Query(i, 0, 1, [], rng.integers(5, 9, n).tolist())
               for i, n in enumerate(rng.integers(1, 9, 200))]

    def found(half):
        runner = Runner(Coarse(), Template((2,), (), (3,), 0), Pad(0), torch.device("cpu"), 100,
                        half)
        return np.concatenate(explain(runner, queries, 0.203, criterion)), runner.counts

    exact, counts = found(half=None)
    assert counts["fp32"] == 0
    first, counts = found(half=torch.float16)
    assert np.array_equal(first, exact)
    assert 0 < counts["fp32"] < counts["inputs"] / 2
    monkeypatch.setattr("train.stages.queries.half_edge", lambda *_: 0.0)
    assert not np.array_equal(found(half=torch.float16)[0], exact), "the error of fp16 is felt"


@pytest.fixture(scope="module")
def trained(tiny_tokenizer):
    """A trained classifier of moods, and queries that it was not trained on."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = BertForSequenceClassification(BertConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, pad_token_id=0, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        labels = torch.arange(32) % 2
        texts = [review(rng, (BAD, GOOD)[label]) for label in labels]
        labels[:4] = 1 - labels[:4]  # so that it is not sure of everything
        inputs = tiny_tokenizer(texts, padding=True, return_tensors="pt")
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    queries = []
    for i in range(200):
        text = review(rng, (BAD, GOOD)[i % 2])
        ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
        queries.append(Query(i, 0, i % 2, [], ids))
    return model, queries, tiny_tokenizer


@pytest.mark.parametrize("delta", [0.005, 0.01])
def test_a_trained_classifier_decides_in_fp16_as_in_fp32(trained, delta):
    model, queries, tokenizer = trained

    def found(half):
        runner = Runner(model, Template((2,), (), (3,), 0), tokenizer, torch.device("cpu"), 4096,
                        half)
        marks = explain(runner, queries, delta)
        return [None if m is None else m.tolist() for m in marks], runner.counts

    exact, _ = found(half=None)
    first, counts = found(half=torch.float16)
    assert first == exact
    assert 0 < counts["fp32"] < counts["inputs"] / 2
    flat = [mark for marks in exact if marks for mark in marks]
    assert len(flat) > 500 and 0.02 < np.mean(flat) < 0.98
