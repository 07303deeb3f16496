"""Fine-tuning and what it shares with the scorer: batches, loss, the epoch loop."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess.corpus import Example
from preprocess.errors import ConfigError, DataError, NonFiniteError, StopRequested
from tests.support.runs import logged, made_up_stage
from train import finetune
from train.config import FinetuneConfig
from train.engine import Ranks, Resolved
from train.model import load_classifier, load_tokenizer
from train.run_dir import metrics
from train.stages import answers, examples, finetuning, supervised
from train.stages.examples import IGNORED, Examples, make_examples, rank_share, weighted_loss

RAGGED = [[2, 9, 3], [2, 8, 7, 6, 3], [2, 3], [2, 5, 5, 3], [2, 4, 3]]


def text_examples(labels: list[int]) -> Examples:
    ids = [RAGGED[i % len(RAGGED)] for i in range(len(labels))]
    return make_examples(ids, None, labels, [1.0] * (1 + max(labels)))

# --------------------------------------------------------------------------- batches


@given(st.integers(1, 24), st.sampled_from([(1, 24, 1), (2, 6, 2), (4, 3, 2), (3, 2, 4)]))
@settings(max_examples=60, deadline=None)
def test_every_example_of_a_global_batch_lands_once_at_any_world_size(size, layout):
    world_size, micro, accumulation = layout
    batch = np.arange(100, 100 + size)
    kept = []
    for rank in range(world_size):
        indices, weights = rank_share(batch, micro, accumulation, rank, world_size)
        assert indices.shape == weights.shape == (accumulation, micro)
        kept += indices[weights == 1].tolist()
    assert sorted(kept) == batch.tolist()


def test_epoch_order_depends_on_seed_and_epoch_only():
    orders = [examples.epoch_order(50, seed, epoch) for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert (orders[0] == examples.epoch_order(50, 1, 0)).all()
    assert (orders[0] != orders[1]).any() and (orders[0] != orders[2]).any()


@given(st.integers(1, 23), st.integers(1, 8), st.integers(0, 10))
@settings(max_examples=60, deadline=None)
def test_an_epoch_is_whole_steps_and_resume_continues_with_the_next(n, batch_size, start):
    """Published bug B26: gradients of a last, partial accumulation leaked into the next epoch."""
    examples = text_examples([0] * n)
    total = supervised.num_steps(n, batch_size, 2)
    batches = list(supervised.global_batches(examples, batch_size, 5, 0, total))
    per_epoch = total // 2
    for epoch in range(2):
        seen = np.concatenate(batches[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert sorted(seen) == list(range(n))
    assert len(batches) == total and all(0 < len(batch) <= batch_size for batch in batches)
    resumed = list(supervised.global_batches(examples, batch_size, 5, min(start, total), total))
    for one, other in zip(batches[min(start, total):], resumed, strict=True):
        assert (one == other).all()


def test_collate_pads_ids_and_token_targets():
    examples = make_examples(
        [[2, 9, 3], [2, 3]], [[0, 0, 1], [0, 1]], [[IGNORED, 1, IGNORED], [IGNORED, 0]], [1.0, 3.0]
    )
    inputs, targets, weights = supervised.collate(examples, np.array([1, 0]), pad_id=7)
    assert weights.tolist() == [1, 1]
    assert inputs["input_ids"].tolist() == [[2, 3, 7], [2, 9, 3]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert inputs["token_type_ids"].tolist() == [[0, 1, 0], [0, 0, 1]]
    assert targets.tolist() == [[IGNORED, 0, IGNORED], [IGNORED, 1, IGNORED]]
    assert examples.mass.tolist() == [3.0, 1.0]


@pytest.mark.parametrize("by_token", [False, True])
def test_on_a_gpu_a_batch_is_one_copy_of_few_lengths(by_token, monkeypatch):
    lengths = [3, 9, 16, 17]
    examples = make_examples(
        [[5] * n for n in lengths], None, [[1] * n if by_token else 1 for n in lengths], [1.0, 1.0]
    )
    copies, to = [], torch.Tensor.to

    def noted(tensor, device, **options):
        copies.append(device)
        return to(tensor, device, **options)

    monkeypatch.setattr(torch.Tensor, "to", noted)
    for last, length in ((0, 8), (1, 16), (2, 16), (3, 24)):
        copies.clear()
        inputs, targets, weights = supervised.collate(
            examples, np.array([0, last]), 7, "meta", np.array([1, 0], np.float32))
        assert copies == [torch.device("meta")]
        assert {name: one.shape for name, one in inputs.items()} == {
            "input_ids": (2, length), "attention_mask": (2, length)}
        assert targets.shape == ((2, length) if by_token else (2,)) and weights.shape == (2,)


def test_longer_padding_changes_no_logit(still_encoder):
    model = load_classifier(still_encoder, ("no", "yes"), 0).eval()
    examples = make_examples([[2, 9, 3], [2, 9, 8, 7, 3]], None, [0, 1], [1.0, 1.0])
    logits = []
    for step in (1, 8):
        inputs, *_ = supervised.collate(examples, np.array([0, 1]), 0)
        padded = {name: F.pad(one, (0, -one.shape[1] % step)) for name, one in inputs.items()}
        logits.append(model(**padded).logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------- the loss


def test_padded_micro_batches_give_the_loss_of_the_plain_batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, generator=generator)
    targets = torch.tensor([0, 2, 1, 1, 0])
    whole = F.cross_entropy(logits, targets)
    total = 0.0
    for rank in range(2):
        indices, weights = rank_share(np.arange(5), 2, 2, rank, 2)
        for index, weight in zip(indices, weights, strict=True):
            total += weighted_loss(
                logits[index], targets[index], torch.from_numpy(weight), torch.ones(3)
            )
    assert float(total) / 5 == pytest.approx(float(whole), rel=1e-6)


def test_token_loss_is_torch_mean_with_class_weights():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 4, 2, generator=generator)
    targets = torch.tensor([[IGNORED, 1, 0, IGNORED], [IGNORED, 0, 0, 1]])
    class_weights = torch.tensor([1.0, 3.0])
    expected = F.cross_entropy(
        logits.reshape(-1, 2), targets.reshape(-1), weight=class_weights, ignore_index=IGNORED
    )
    examples = make_examples([[1] * 4, [1] * 4], None, targets.numpy(), [1.0, 3.0])
    found = weighted_loss(logits, targets, torch.ones(2), class_weights) / examples.mass.sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    dev = supervised.mean_loss(list(logits.numpy()), examples, class_weights.numpy())
    assert dev == pytest.approx(float(expected), rel=1e-6)


def test_a_repeated_example_adds_nothing_even_if_its_loss_is_infinite():
    logits = torch.tensor([[0.0, 0.0], [0.0, -torch.inf]])
    loss = weighted_loss(logits, torch.tensor([0, 1]), torch.tensor([1.0, 0.0]), torch.ones(2))
    assert float(loss) == pytest.approx(np.log(2))


# --------------------------------------------------------------------------- the loop


class FakeEngine:
    """An engine of one linear model over a bag of ids, with plain gradient descent."""

    def __init__(self, accumulation_steps: int = 1) -> None:
        self.module = torch.nn.Embedding(10, 2)
        torch.nn.init.zeros_(self.module.weight)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.5)
        self._accumulation_steps, self._micro_steps = accumulation_steps, 0
        self.global_steps = self.skipped_steps = 0
        self.seen: list[list[list[int]]] = []
        self.evaluated: list[int] = []
        self.train, self.eval = self.module.train, self.module.eval

    def __call__(self, input_ids, attention_mask):
        if self.module.training:
            self.seen.append(input_ids.tolist())
        else:
            self.evaluated += input_ids[:, 1].tolist()
        hidden = self.module(input_ids) * attention_mask[..., None]
        return SimpleNamespace(logits=hidden.sum(1))

    def backward(self, loss):
        (loss / self._accumulation_steps).backward()

    def is_gradient_accumulation_boundary(self):
        return (self._micro_steps + 1) % self._accumulation_steps == 0

    def step(self):
        self._micro_steps += 1
        if self._micro_steps % self._accumulation_steps == 0:
            self.global_steps += 1
            self.optimizer.step()
            self.optimizer.zero_grad()

    def fp16_enabled(self):
        return False

    bfloat16_enabled = zero_optimization_stage = fp16_enabled

    def was_step_applied(self):
        return True

    def get_lr(self):
        return [0.5]


def loop(monkeypatch, tmp_path, engine, train, dev, *, micro, accumulation, assess,
         stop=lambda: False, logging_steps=1, epoch="best", select="accuracy", patience=None,
         num_epochs=3):
    monkeypatch.setattr(
        supervised, "full_state_dict",
        lambda e: {k: v.clone() for k, v in e.module.state_dict().items()},
    )
    config = FinetuneConfig(
        output_dir=str(tmp_path), model_name_or_path="m", task="custom",
        num_train_epochs=num_epochs, logging_steps=logging_steps,
    )
    resolved = Resolved({}, micro, accumulation, micro * accumulation, "fp32", ())
    return supervised.train_and_select(
        engine, resolved, train, dev, assess, config=config, seed=3, select=select, epoch=epoch,
        patience=patience, tags={}, class_weights=np.ones(2), pad_id=0, run_dir=tmp_path,
        device=torch.device("cpu"),
        records={"identity": {"command": "finetune"}, "numerics": {}}, hyperparameters={},
        stop=stop,
    )


def test_the_step_is_the_same_with_and_without_accumulation(monkeypatch, tmp_path):
    """Five examples in batches of 4: the second batch of each epoch is padded."""
    train = text_examples([0, 1, 0, 1, 1])
    weights = []
    for micro, accumulation in ((4, 1), (2, 2), (1, 4)):
        engine = FakeEngine(accumulation)
        found = loop(
            monkeypatch, tmp_path / f"{micro}", engine, train, train, micro=micro,
            accumulation=accumulation, assess=lambda logits: {"accuracy": 0.0},
        )
        assert found.steps == 6 and engine._micro_steps % accumulation == 0
        weights.append(engine.module.weight.detach())
    assert torch.allclose(weights[0], weights[1], atol=1e-6)
    assert torch.allclose(weights[0], weights[2], atol=1e-6)
    assert weights[0].abs().max() > 0.01


def test_the_logged_loss_is_the_mean_over_the_examples(monkeypatch, tmp_path):
    """Five examples in batches of 4: the last one of an epoch counts as one, not as four."""
    train = text_examples([0, 1, 0, 1, 1])
    engine = FakeEngine()
    torch.nn.init.normal_(engine.module.weight, generator=torch.Generator().manual_seed(2))
    engine.optimizer = torch.optim.SGD(engine.module.parameters(), lr=0.0)  # one loss throughout
    loop(monkeypatch, tmp_path, engine, train, train, micro=4, accumulation=1, logging_steps=99,
         assess=lambda logits: {"accuracy": 0.0})
    with torch.no_grad():
        each = [F.cross_entropy(engine.module(torch.tensor(ids)).sum(0)[None],
                                torch.tensor(target)[None]).item()
                for ids, target in zip(train.input_ids, train.targets, strict=True)]
    assert np.ptp(each) > 0.1  # else any mean would do
    assert logged(tmp_path, metrics.TRAIN_LOSS) == pytest.approx([np.mean(each)] * 3, rel=1e-5)
    assert logged(tmp_path, metrics.EPOCH) == [1, 2, 3]
    assert [supervised.epochs_seen(step, 5, 4) for step in range(4)] == [0, 0.8, 1, 1.8]


def test_the_epoch_is_chosen_on_dev_examples_and_its_weights_are_kept(monkeypatch, tmp_path):
    """Published bugs B3, B13: the "dev loss" was the loss of the last training batch, and the
    best weights were loaded back into a wrapper, or not at all."""
    train = make_examples([[2, 5, 3]] * 4, None, [0, 0, 0, 1], [1.0, 1.0])
    dev = make_examples([[2, 8, 3], [2, 9, 3], [2, 7, 3]], None, [1, 0, 1], [1.0, 1.0])
    engine = FakeEngine()
    seen, snapshots = [], []

    def assess(logits):
        seen.append(len(logits))
        snapshots.append(engine.module.weight.detach().clone())
        return {"accuracy": [0.3, 0.8, 0.8][len(seen) - 1]}

    found = loop(
        monkeypatch, tmp_path, engine, train, dev, micro=2, accumulation=1, assess=assess
    )
    assert seen == [3, 3, 3]
    assert {id_ for id_ in engine.evaluated} == {7, 8, 9}  # 5 is in the training split only
    assert all(row[1] == 5 for batch in engine.seen for row in batch)
    assert found.best_epoch == 2  # the first of equals
    assert [row["accuracy"] for row in found.history] == [0.3, 0.8, 0.8]
    assert torch.equal(found.best_state["weight"], snapshots[1])
    assert not torch.equal(snapshots[1], engine.module.weight)


def test_the_last_epoch_is_kept_and_it_alone_is_measured(monkeypatch, tmp_path):
    engine, accuracies = FakeEngine(), iter([0.2])
    found = loop(
        monkeypatch, tmp_path, engine, text_examples([0, 0, 0, 1]), text_examples([1]), micro=2,
        accumulation=1, assess=lambda logits: {"accuracy": next(accuracies)}, epoch="last",
    )
    assert found.best_epoch == 3 and found.best["accuracy"] == 0.2 and len(found.history) == 1
    assert torch.equal(found.best_state["weight"], engine.module.weight)


def test_the_metric_that_is_asked_for_chooses_the_epoch(monkeypatch, tmp_path):
    """Of the loss the smallest counts; of the others the largest, and the first of equals."""
    shown = [(0.5, 0.1), (0.8, 0.6), (0.8, 0.7), (0.7, 0.7)]
    chosen = {}
    for select in ("accuracy", "macro_f1", "loss"):
        values, losses = iter(shown), iter([0.9, 0.8, 0.95, 0.3])
        monkeypatch.setattr(supervised, "mean_loss", lambda *words, losses=losses: next(losses))
        chosen[select] = loop(
            monkeypatch, tmp_path / select, FakeEngine(), text_examples([0, 1]),
            text_examples([1]), micro=2, accumulation=1, select=select, num_epochs=4,
            assess=lambda logits, values=values: dict(
                zip(("accuracy", "macro_f1"), next(values), strict=True)),
        ).best_epoch
    assert chosen == {"accuracy": 2, "macro_f1": 3, "loss": 4}


@pytest.mark.parametrize(("patience", "epochs", "best"), [
    (1, 2, 1), (2, 5, 3), (3, 6, 3), (4, 8, 7), (None, 8, 7)])
def test_early_stopping_ends_after_epochs_that_are_not_better(
    monkeypatch, tmp_path, patience, epochs, best
):
    accuracies = iter([0.5, 0.4, 0.6, 0.6, 0.3, 0.5, 0.7, 0.7])
    engine = FakeEngine()
    found = loop(
        monkeypatch, tmp_path, engine, text_examples([0, 1, 0, 1, 1]), text_examples([1]), micro=2,
        accumulation=1, assess=lambda logits: {"accuracy": next(accuracies)}, patience=patience,
        num_epochs=8,
    )
    assert (found.epochs, found.best_epoch, len(found.history)) == (epochs, best, epochs)
    assert found.steps == engine.global_steps == 3 * epochs


def test_balanced_classes_weigh_equally_in_the_loss():
    from sklearn.utils.class_weight import compute_class_weight

    labels = [0] * 6 + [2] * 3 + [3]
    weights = examples.balanced_weights(labels, 5)
    assert weights[[0, 2, 3]] == pytest.approx(compute_class_weight(
        "balanced", classes=np.array([0, 2, 3]), y=np.array(labels)))
    assert weights[1] == weights[4] == 1  # a class that does not occur
    plain = text_examples(labels)
    balanced = examples.reweighted(plain, weights)
    assert balanced.mass.sum() == pytest.approx(len(labels))
    # The validation loss is torch's own weighted mean.
    logits = torch.randn(len(labels), 5, generator=torch.Generator().manual_seed(0))
    expected = F.cross_entropy(logits, torch.tensor(labels), weight=torch.tensor(weights).float())
    found = supervised.mean_loss(list(logits.numpy()), balanced, weights)
    assert found == pytest.approx(float(expected), rel=1e-6)


def test_a_loss_that_is_not_a_number_stops_the_run(monkeypatch, tmp_path):
    engine = FakeEngine()
    engine.module.weight.data[9] = torch.nan
    with pytest.raises(NonFiniteError, match="learning_rate"):
        loop(
            monkeypatch, tmp_path, engine, text_examples([0, 1, 0, 1]), text_examples([0]),
            micro=4, accumulation=1, assess=lambda logits: {"accuracy": 0.0},
        )


@pytest.mark.parametrize("epoch", ["best", "last"])
@pytest.mark.parametrize("stop_at", range(1, 7))
def test_a_stopped_run_goes_on_where_it_was(monkeypatch, tmp_path, stop_at, epoch):
    """Six steps in three epochs, stopped after step `stop_at`, equal an unbroken run."""
    train, dev = text_examples([0, 1, 0, 1, 1]), text_examples([1, 0])
    kept = {}

    def save(engine, run_dir, step, client_state, limit, extras):
        for name, content in extras.items():
            (run_dir / name).write_bytes(content)
        weights = engine.module.weight.detach().clone()
        kept.update(state=json.loads(json.dumps(client_state)), weights=weights, step=step)

    def load(engine, path, identity, allow_world_size_change):
        engine.module.weight.data.copy_(kept["weights"])
        return kept["state"]

    monkeypatch.setattr(supervised, "save_checkpoint", save)
    monkeypatch.setattr(supervised, "load_checkpoint", load)
    monkeypatch.setattr(
        supervised, "find_checkpoint",
        lambda run_dir, mode: run_dir if kept and "parts" in str(run_dir) else None,
    )
    options = {"micro": 3, "accumulation": 1, "logging_steps": 4, "epoch": epoch}

    def assess(logits):
        return {"accuracy": float(np.stack(logits)[0, 1])}  # grows or falls with the weights

    engine = FakeEngine()
    unbroken = loop(
        monkeypatch, tmp_path / "whole", engine, train, dev, assess=assess, **options
    )
    asked = iter([False] * (stop_at - 1) + [True])
    with pytest.raises(StopRequested, match=f"step {stop_at} of 6"):
        loop(
            monkeypatch, tmp_path / "parts", FakeEngine(), train, dev, assess=assess,
            stop=lambda: next(asked), **options,
        )
    assert kept["step"] == stop_at
    second = FakeEngine()
    resumed = loop(monkeypatch, tmp_path / "parts", second, train, dev, assess=assess, **options)
    assert torch.equal(engine.module.weight, second.module.weight)
    assert resumed.history == unbroken.history and resumed.best_epoch == unbroken.best_epoch
    assert torch.equal(resumed.best_state["weight"], unbroken.best_state["weight"])
    parts, whole = (logged(tmp_path / name, metrics.TRAIN_LOSS) for name in ("parts", "whole"))
    assert parts == whole  # a stop within a window takes nothing out of its mean


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_predict_visits_each_example_once_at_any_world_size(monkeypatch, world_size):
    ids = [[2, i + 10] + [1] * (i % 4) for i in range(11)]
    examples = make_examples(ids, None, [0] * 11, [1.0])

    def forward(input_ids, attention_mask):
        calls.append(input_ids.shape)
        return SimpleNamespace(logits=input_ids[:, 1:2].float())

    shares, num_calls = [], []
    for rank in range(world_size):
        calls = []
        monkeypatch.setattr(supervised, "ranks", lambda r=rank: Ranks(r, world_size, r))
        monkeypatch.setattr(supervised, "gather_objects", lambda mine: shares.append(mine) or [])
        with pytest.raises(AssertionError):  # one rank alone does not have all of them
            supervised.predict(forward, examples, 0, 2, "cpu")
        num_calls.append(len(calls))
    assert len(set(num_calls)) == 1  # ZeRO 3 gathers weights: all ranks must call as often
    monkeypatch.setattr(supervised, "gather_objects", lambda mine: shares)
    logits = supervised.predict(forward, examples, 0, 2, "cpu")
    assert [int(row[0]) for row in logits] == list(range(10, 21))
    assert sum(map(len, shares[:world_size])) == 11


# --------------------------------------------------------------------------- the command's parts


def test_a_long_text_is_cut_so_that_the_aspect_fits(tiny_tokenizer):
    """Published bug B21: the aspect came on top of a text cut to the limit."""
    examples = [
        Example("good " * 50, 1, "the food", "a"), Example("bad .", 0, "music script", "b"),
    ]
    encoded = finetuning.encode(tiny_tokenizer, examples, 16, segments=True)
    cls, sep = tiny_tokenizer.cls_token_id, tiny_tokenizer.sep_token_id
    assert encoded.lengths.tolist() == [16, 7]
    for ids, types in zip(encoded.input_ids, encoded.token_type_ids, strict=True):
        assert ids[0] == cls and ids[3] == sep and ids[-1] == sep and (ids == sep).sum() == 2
        assert types.tolist() == [0] * 4 + [1] * (len(ids) - 4)
    assert [int(target) for target in encoded.targets] == [1, 0]


def test_a_cut_split_without_an_aspect_is_one_of_pairs_still(tiny_tokenizer):
    """`--max_eval_samples` may leave only examples whose aspect is empty."""
    cls, sep = tiny_tokenizer.cls_token_id, tiny_tokenizer.sep_token_id
    for aspect, start in (("", [cls, sep]), (None, [cls])):
        encoded = finetuning.encode(tiny_tokenizer, [Example("good .", 0, aspect, "a")], 16, True)
        ids, separators = encoded.input_ids[0], 1 if aspect is None else 2
        assert ids[:len(start)].tolist() == start and (ids == sep).sum() == separators


def test_a_special_token_written_in_a_text_is_text(tiny_tokenizer):
    (ids,) = finetuning.encode(
        tiny_tokenizer, [Example("good [SEP] film", 0, None, "a")], 16, segments=False
    ).input_ids
    assert np.flatnonzero(ids == tiny_tokenizer.sep_token_id).tolist() == [len(ids) - 1]


def binomial_tail(count, total, share):
    """The probability of `count` or more hits, summed up."""
    return sum(math.comb(total, k) * share**k * (1 - share) ** (total - k)
               for k in range(count, total + 1))


@pytest.mark.parametrize(("right", "total", "is_weak"), [
    (58, 100, True), (59, 100, False), (538, 1000, False), (526, 1000, True), (0, 10, True),
    (10, 10, False),
])
def test_a_classifier_near_the_majority_class_is_named(right, total, is_weak):
    """The exact one-sided test at 5 % against half of the labels."""
    labels = np.arange(total) % 2
    predictions = np.where(np.arange(total) < right, labels, 1 - labels)
    assert (binomial_tail(right, total, 0.5) >= 0.05) == is_weak
    weak = answers.find_weak(labels, predictions)
    assert len(weak) == is_weak
    if is_weak and right:
        assert f"{right / total:.4f} on {total:,} examples is not clearly above 0.5000" in weak[0]
        least = float(weak[0].split("it is ")[1].split()[0])
        assert binomial_tail(right, total, least) == pytest.approx(0.05, abs=2e-3)


def test_the_head_depends_on_the_seed_only(tiny_encoder, tmp_path):
    """Two checkpoints with other weights get the same head from one seed."""
    from transformers import AutoModel, AutoTokenizer

    other = AutoModel.from_pretrained(tiny_encoder)
    for parameter in other.parameters():
        parameter.data += 0.1
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(tmp_path / "other")
    heads = [
        load_classifier(name, ("a", "b"), seed).classifier.weight
        for name, seed in ((tiny_encoder, 1), (str(tmp_path / "other"), 1), (tiny_encoder, 2))
    ]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_a_run_of_seeds_keeps_its_texts_and_its_tokenizer(
    tmp_path, labelled_files, tiny_encoder, tiny_tokenizer
):
    shutil.copytree(tiny_encoder, tmp_path / "encoder")
    for name, file in labelled_files.items():
        shutil.copy(file, tmp_path / f"{name}.csv")

    def task() -> str:
        (inputs,) = finetuning.read_inputs([FinetuneConfig(
            task="custom", train_file=str(tmp_path / "train.csv"),
            test_file=str(tmp_path / "test.csv"), max_seq_length=32,
            model_name_or_path=str(tmp_path / "encoder"), output_dir=str(tmp_path / "run"),
        )])
        (identity,) = inputs.identities.values()
        return identity["inputs"]["task"]

    before = task()
    assert task() == before
    # The same items, labels and weights; one word of one text is another.
    content = (tmp_path / "test.csv").read_text()
    (tmp_path / "test.csv").write_text(content.replace(" the ", " a ", 1))
    texts = task()
    tokenizer = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["good"], vocabulary["bad"] = vocabulary["bad"], vocabulary["good"]
    (tmp_path / "encoder" / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert len({before, texts, task()}) == 3


def whole_seed(folder, tiny_encoder) -> tuple[dict, str]:
    """A row, and the folder of its seed with everything that belongs to it."""
    from train.run_dir import hf_folder

    module = load_classifier(tiny_encoder, ("a", "b"), 1)
    hf_folder.save_hf(module, dict(module.named_parameters()),
                      load_tokenizer(tiny_encoder), folder / "seed_1" / "hf",
                      [made_up_stage("finetune")])
    answers = [{"item": str(n), "label": 1, "prediction": int(n > 0)} for n in range(4)]
    (folder / "seed_1" / "predictions.jsonl").write_text("\n".join(map(json.dumps, answers)))
    return {"seed": 1, "num_test": 4, "test_accuracy": 0.75}, folder / "seed_1"


def test_a_seed_counts_as_finished_only_with_row_model_and_predictions(
    tmp_path, tiny_encoder, capsys
):
    """Published bug B5: every seed was written to a misspelt path and then not found."""
    row, seed_dir = whole_seed(tmp_path, tiny_encoder)
    assert finetune.find_finished(tmp_path, [1, 2], {1: row}) == {1}
    assert finetune.find_finished(tmp_path, [1], {}) == set()
    assert finetune.has_predictions(seed_dir, row)
    assert not finetune.has_predictions(seed_dir, {**row, "test_accuracy": 0.5})
    assert not finetune.has_predictions(seed_dir, {**row, "num_test": 5})
    for file in sorted(path for path in (seed_dir / "hf").iterdir() if path.name != "README.md"):
        content = file.read_bytes()
        for damage in (None, b"", content[:-9]):
            file.write_bytes(damage) if damage is not None else file.unlink()
            with pytest.raises(DataError, match=rf"{file.name}.*no checkpoint.*delete .*seed_1"):
                finetune.find_finished(tmp_path, [1], {1: row})
        file.write_bytes(content)
    assert finetune.find_finished(tmp_path, [1], {1: row}) == {1}
    shutil.rmtree(seed_dir)
    assert finetune.find_finished(tmp_path, [1], {1: row}) == set()
    assert "seed 1: has a row and no" in capsys.readouterr().out


# --------------------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_command_trains_tests_and_skips_finished_seeds(
    tmp_path, tiny_encoder, labelled_files, run_command_line
):
    folder = tmp_path / "reviews"
    folder.mkdir()
    run_dir = folder / "run"
    shutil.copy(labelled_files["train"], folder / "train.csv")
    test = folder / "test.csv"  # with two rows that are no example
    shutil.copy(labelled_files["test"], test)
    with open(test, "a") as file:
        file.write(",pos\na film,\n")
    command = [
        "train/finetune.py", "--task", "custom", "--train_file", str(folder / "train.csv"),
        "--test_file", str(test), "--max_train_samples", "40",
        "--model_name_or_path", tiny_encoder, "--output_dir", str(run_dir),
        "--num_train_epochs", "2", "--max_seq_length", "32", "--train_batch_size", "16",
        "--learning_rate", "1e-3",
    ]
    done = run_command_line(*command, "--seeds", "13,43")
    assert "steps: 3 per epoch x 2 epochs = 6, 2 times" in done.stdout
    rows = [json.loads(line) for line in (run_dir / "results.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == [13, 43]
    assert "2 rows of test left out" in done.stdout and "(2 of 32 rows left out)" in done.stdout
    for row in rows:
        assert row["left_out"] == {"test": {"text": 1, "label": 1}}
        check_seed(run_dir / f"seed_{row['seed']}", row)
    assert (run_dir / "config.resolved.yaml").exists() and (run_dir / "env.json").exists()

    before = (run_dir / "seed_13/predictions.jsonl").stat().st_mtime_ns
    (run_dir / "seed_43/predictions.jsonl").unlink()  # as if it had been cut off
    log = run_dir / "seed_43/metrics.jsonl"  # and killed between its row and its last point
    *earlier, last = log.read_text().splitlines(keepends=True)
    assert "test/accuracy" in last
    log.write_text("".join(earlier))
    done = run_command_line(*command, "--seeds", "13,43", "--resume", "must")
    kept, added = json.loads(last), json.loads(log.read_text().splitlines()[-1])
    assert {**kept, "time": 0} == {**added, "time": 0}
    assert "seed 13: finished already" in done.stdout
    assert "seed 43: its predictions are not those of its row; tested again" in done.stdout
    assert "step 1" not in done.stdout
    assert (run_dir / "seed_13/predictions.jsonl").stat().st_mtime_ns == before
    again = [json.loads(line) for line in (run_dir / "results.jsonl").read_text().splitlines()]
    for one, other in zip(rows, again, strict=True):  # the seed decides everything
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


@pytest.mark.slow
def test_a_row_that_another_process_wrote_is_kept(
    tmp_path, tiny_encoder, labelled_files, run_here, monkeypatch
):
    """Between the first look at a folder and its lock; one with other options is refused."""
    def command(name: str, seeds: str, epochs: int = 1) -> list[str]:
        return ["train/finetune.py", "--task", "custom", "--train_file", labelled_files["train"],
                "--test_file", labelled_files["test"], "--model_name_or_path", tiny_encoder,
                "--num_train_epochs", str(epochs), "--max_seq_length", "32", "--train_batch_size",
                "16", "--seeds", seeds, "--output_dir", str(tmp_path / name)]

    plain = finetune.sole_writer

    @contextmanager
    def late(run_dir):
        with plain(run_dir):
            shutil.copytree(tmp_path / "other", run_dir, dirs_exist_ok=True)
            yield

    run_here(*command("other", "43"))
    monkeypatch.setattr(finetune, "sole_writer", late)
    run_here(*command("run", "13"))
    rows = (tmp_path / "run" / "results.jsonl").read_text().splitlines()
    assert [json.loads(row)["seed"] for row in rows] == [43, 13]
    with pytest.raises(ConfigError, match="num_train_epochs"):
        run_here(*command("longer", "13", epochs=2))


def check_seed(seed_dir, row):
    """A row, its predictions and its model agree."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    answers = [json.loads(x) for x in (seed_dir / "predictions.jsonl").read_text().splitlines()]
    assert len(answers) == row["num_test"] == 30 and row["num_train"] == 40
    right = np.mean([answer["prediction"] == answer["label"] for answer in answers])
    assert right == pytest.approx(row["test_accuracy"])
    names = ("neg", "pos")
    for answer in answers:
        assert sum(answer["probabilities"]) == pytest.approx(1, abs=1e-5)
        assert answer["prediction"] == int(np.argmax(answer["probabilities"]))
        assert answer["prediction_name"] == names[answer["prediction"]]
    with open(seed_dir.parent.parent / "test.csv", newline="") as file:
        given = [(row["text"], row["label"]) for row in csv.DictReader(file)]
    told = [(answer["text"], answer["label_name"]) for answer in answers]
    assert told == [pair for pair in given if all(map(str.strip, pair))]
    counted = Counter((answer["label"], answer["prediction"]) for answer in answers)
    assert row["confusion_matrix"] == [[counted[i, j] for j in range(2)] for i in range(2)]
    assert [row["per_class"][name]["recall"] for name in names] == pytest.approx(
        [counted[i, i] / (counted[i, 0] + counted[i, 1]) for i in range(2)])
    assert row["task"] == seed_dir.parents[1].name == "reviews"
    model = AutoModelForSequenceClassification.from_pretrained(seed_dir / "hf")
    assert model.config.id2label == {0: "neg", 1: "pos"} == dict(enumerate(row["labels"]))
    assert AutoTokenizer.from_pretrained(seed_dir / "hf").mask_token == "[MASK]"
    events = EventAccumulator(str(seed_dir)).Reload()
    tags = {"train/loss", "train/learning_rate", "train/grad_norm", "throughput/tokens_per_sec",
            "memory/max_allocated_gib", "eval/loss", "eval/accuracy", "eval/best"}
    assert {f"finetune_{tag}" for tag in tags} <= set(events.Tags()["scalars"])
    (tested,) = events.Scalars("finetune_test/accuracy")
    assert tested.step == 6 and tested.value == pytest.approx(row["test_accuracy"])
    assert [event.step for event in events.Scalars("finetune_eval/accuracy")] == [3, 6]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--task", "mrr"], 2, "'mrr': known are"),
        (["--task", "custom"], 2, "--train_file"),
        (["--seeds", "1,x"], 2, "--seeds '1,x'"),
        (["--max_seq_length", "100"], 2, "64 positions"),
        (["--learning_rate", "-1"], 2, "--learning_rate -1.0"),
        (["--resume", "must"], 3, "no finished seed"),
    ],
)
def test_a_users_mistake_ends_in_one_sentence(
    tmp_path, tiny_encoder, labelled_files, capsys, flags, code, message
):
    from preprocess.errors import run_command

    options = {
        "--task": "custom", "--train_file": labelled_files["train"],
        "--test_file": labelled_files["test"], "--model_name_or_path": tiny_encoder,
        "--output_dir": str(tmp_path / "run"), "--max_seq_length": "32",
    }
    if flags == ["--task", "custom"]:
        del options["--train_file"]
    options.update(zip(flags[::2], flags[1::2], strict=True))
    argv = [part for pair in options.items() for part in pair]
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: finetune.main(argv))
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == code and message in error and "\n" not in error
    assert not (tmp_path / "run").exists()
