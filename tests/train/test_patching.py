"""`patch`: the loss of transformers on masked rows only, and the divisor of its Trainer."""

from __future__ import annotations

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
from torch.nn import functional

import csrc
from preprocess.errors import ConfigError
from tests.support.models import SMALL, VOCAB, tiny_config
from train.model import FAMILIES, checkpoint_activations, patch, unpatch

NAMES = sorted(FAMILIES)
NONE = -100


def masked_lm(family: str, **changes):
    """A model without dropout; two calls give the same."""
    from transformers import AutoModelForMaskedLM

    config = tiny_config(family)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout",
                 "attention_dropout"):
        setattr(config, name, 0.0)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return AutoModelForMaskedLM.from_config(config)


def batch(counts=(5, 0, 2, 1), slots: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows with so many labels each; the last row is half padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCAB, (len(counts), slots), generator=generator)
    filled = torch.ones_like(ids)
    filled[-1, slots // 2:] = 0
    labels = torch.full_like(ids, NONE)
    for row, count in enumerate(counts):
        labels[row, 1:1 + count] = ids[row, 1:1 + count]
        ids[row, 1:1 + count] = 4
    return {"input_ids": ids, "attention_mask": filled, "labels": labels}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", NAMES)
def test_loss_and_gradients_are_those_of_the_plain_model(family, attention):
    plain, patched = masked_lm(family), patch(masked_lm(family))
    for model in (plain, patched):
        model.set_attn_implementation(attention)
        model.train()
    inputs = batch()
    plain_loss, loss = plain(**inputs).loss, patched(**inputs).loss
    torch.testing.assert_close(loss, plain_loss, rtol=1e-6, atol=1e-6)
    plain_loss.backward()
    loss.backward()
    assert set(gradients(plain)) == set(gradients(patched))
    for name, gradient in gradients(plain).items():
        if gradient is None:
            assert gradients(patched)[name] is None
        else:
            torch.testing.assert_close(gradients(patched)[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", NAMES)
def test_the_head_sees_masked_rows_alone(family, monkeypatch):
    """Eight of 48 positions have a label: the decoder's product is never larger."""
    model, seen = patch(masked_lm(family)).train(), []
    whole = csrc.masked_lm_loss
    monkeypatch.setattr(csrc, "masked_lm_loss", lambda hidden, positions, *rest: (
        seen.append(len(positions)), whole(hidden, positions, *rest))[1])
    model.get_output_embeddings().register_forward_hook(lambda *_: seen.append("decoder"))
    assert model(**batch()).logits is None
    assert seen == [8]


@pytest.mark.parametrize("family", NAMES)
def test_logits_are_those_of_the_plain_model(family):
    plain, model = masked_lm(family).eval(), patch(masked_lm(family)).eval()
    inputs = batch()
    with torch.no_grad():
        expected = plain(**inputs)
        for given in (inputs, {**inputs, "labels": None}):
            found = model(**given)
            torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(**inputs).loss, expected.loss, rtol=1e-6, atol=1e-6)
        assert model(**inputs, skip_logits=True).logits is None
        assert model.train()(**inputs, skip_logits=False).logits.shape == expected.logits.shape
        given = model(inputs["input_ids"], inputs["attention_mask"]).logits  # by position
        torch.testing.assert_close(given, expected.logits, rtol=1e-5, atol=1e-5)


def test_the_other_outputs_are_those_of_the_plain_model():
    plain, model = masked_lm("bert"), patch(masked_lm("bert"))
    inputs = batch()
    ask = {"output_hidden_states": True, "output_attentions": True}
    for one in (plain, model):
        one.set_attn_implementation("eager")
    expected, found = plain(**inputs, **ask), model(**inputs, **ask)
    for name in ("hidden_states", "attentions"):
        assert len(found[name]) == len(expected[name])
        torch.testing.assert_close(found[name][-1], expected[name][-1])
    loss, *rest = model(**inputs, return_dict=False)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-6, atol=1e-6)
    assert not rest  # no logits while it trains


def test_the_divisor_is_what_is_given():
    plain, model = masked_lm("bert"), patch(masked_lm("bert")).train()
    inputs = batch()
    rows = plain(**inputs).logits[inputs["labels"] != NONE]
    targets = inputs["labels"][inputs["labels"] != NONE]
    total = functional.cross_entropy(rows, targets, reduction="sum")
    for divisor in (32, torch.tensor(32), torch.tensor(32.0)):
        found = model(**inputs, num_items_in_batch=divisor).loss
        torch.testing.assert_close(found, total / 32, rtol=1e-6, atol=1e-6)
        in_evaluation = model.eval()(**inputs, num_items_in_batch=divisor).loss
        torch.testing.assert_close(in_evaluation, total / 32, rtol=1e-6, atol=1e-6)
        model.train()


@pytest.mark.parametrize("divisor", [None, 0])
def test_a_batch_without_labels_has_the_loss_0_and_reaches_every_parameter(divisor):
    plain, model = masked_lm("bert"), patch(masked_lm("bert")).train()
    plain(**batch()).loss.backward()
    loss = model(**batch(counts=(0, 0)), num_items_in_batch=divisor).loss
    loss.backward()
    assert loss.item() == 0
    for name, gradient in gradients(model).items():
        assert (gradient is None) == (gradients(plain)[name] is None), name
        assert gradient is None or not gradient.any()
    assert model.eval()(**batch(counts=(0, 0))).loss.item() == 0


@pytest.mark.parametrize("training", [True, False])
def test_under_autocast_the_loss_is_that_of_the_plain_model(training):
    plain, model = masked_lm("bert").train(training), patch(masked_lm("bert")).train(training)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = plain(**batch()).loss, model(**batch()).loss
        exact = masked_lm("bert").float()
    exact = exact(**batch()).loss
    found.backward()
    assert found.dtype == torch.float32
    assert abs(found - exact) < max(2 * abs(expected - exact), 2e-2)
    assert abs(found - exact) > 0  # bfloat16 was used
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("how", ["compiled", "checkpointed"])
def test_compiling_and_checkpointing_change_nothing(how):
    plain, model = masked_lm("bert").train(), patch(masked_lm("bert")).train()
    if how == "compiled":
        found = torch.compile(model, backend="eager")(**batch()).loss
        torch.compiler.reset()
    else:
        checkpoint_activations(model)
        found = model(**batch()).loss
    expected = plain(**batch()).loss
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for loss in (found, expected):
        loss.backward()
    for name, gradient in gradients(plain).items():
        if gradient is not None:
            torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float32, 1e-4), (torch.bfloat16, 3e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize("family", NAMES)
def test_on_a_gpu_loss_and_gradients_are_those_of_the_plain_model(family, dtype, tolerance):
    """Triton's kernels, in the dtype of autocast."""
    plain, model = masked_lm(family).cuda().train(), patch(masked_lm(family)).cuda().train()
    inputs = {name: value.cuda() for name, value in batch().items()}
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        expected, found = plain(**inputs).loss, model(**inputs).loss
    torch.testing.assert_close(found, expected.float(), rtol=tolerance, atol=tolerance)
    for one in (expected, found):
        one.backward()
    for name, gradient in gradients(plain).items():
        if gradient is not None:
            close = (gradients(model)[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-4
            assert close, name
    empty = {name: value.cuda() for name, value in batch(counts=(0, 0)).items()}
    assert model(**empty).loss.item() == 0
    inputs["labels"][0, 0] = VOCAB
    with pytest.raises(ValueError, match=f"labels hold {VOCAB}"):
        model(**inputs)


def test_labels_that_fit_no_logit_are_refused():
    model = patch(masked_lm("bert"))
    for wrong in (-1, VOCAB, VOCAB + 7):
        inputs = batch()
        inputs["labels"][0, 0] = wrong
        with pytest.raises(ValueError, match=rf"labels hold {wrong}: must be in \[0, 59\]"):
            model(**inputs)
    inputs = batch()
    inputs["labels"] = inputs["labels"][:, :-1]
    with pytest.raises(ValueError, match=r"labels have shape \(4, 11\): must be \(4, 12\)"):
        model(**inputs)


# ------------------------------------------------------------------------- what is patched


@pytest.mark.parametrize("family", NAMES)
def test_copies_pickles_and_replicas_are_patched(family):
    model = patch(masked_lm(family)).train()
    inputs, expected = batch(), masked_lm(family)(**batch()).loss
    replica = model._replicate_for_data_parallel()  # shares nothing but its dictionary
    replica._parameters = replica._parameters.copy()
    assert type(replica).forward is type(model).forward
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other, type(masked_lm(family)))
        found = other(**inputs)
        assert found.logits is None
        torch.testing.assert_close(found.loss, expected, rtol=1e-6, atol=1e-6)
        found.loss.backward()
        assert all(parameter.grad is None for parameter in model.parameters())


def test_patching_twice_and_undoing_it():
    model = masked_lm("bert")
    plain = type(model)
    assert patch(patch(model)) is model and type(model) is not plain
    assert patch(masked_lm("bert")).__class__ is type(model)
    assert unpatch(model) is model and type(model) is plain
    assert unpatch(model) is model and type(model) is plain
    assert model(**batch()).logits is not None
    own, expected = inspect.signature(patch(model).forward), inspect.signature(plain.forward)
    assert list(own.parameters) == list(expected.parameters)[1:]  # Trainer reads their names


def test_a_saved_model_is_one_of_the_plain_class(tmp_path):
    from transformers import AutoModelForMaskedLM, BertForMaskedLM

    model = patch(masked_lm("bert"))
    model.save_pretrained(tmp_path)
    assert model.config.architectures == ["BertForMaskedLM"]
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(loaded) is BertForMaskedLM
    for name, value in unpatch(model).state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def refused():
    from transformers import (
        BertForMaskedLM,
        BertForPreTraining,
        BertForSequenceClassification,
        BertModel,
        XLMRobertaConfig,
        XLMRobertaForMaskedLM,
    )

    class Own(BertForMaskedLM):
        pass

    wrapped = masked_lm("bert")
    wrapped.forward = wrapped.forward
    adapted = masked_lm("bert")
    adapted.cls.predictions.transform.dense = torch.nn.Sequential(torch.nn.Linear(32, 32))
    config, other = tiny_config("bert"), XLMRobertaConfig(**SMALL)
    return {
        "family": (XLMRobertaForMaskedLM(other), "XLMRobertaForMaskedLM is not"),
        "encoder": (BertModel(config), "BertModel is not a ...ForMaskedLM"),
        "classifier": (BertForSequenceClassification(config), "is not a ...ForMaskedLM"),
        "two heads": (BertForPreTraining(config), "is not a ...ForMaskedLM"),
        "subclass": (Own(config), r"Own is not a ...ForMaskedLM of transformers"),
        "no model": (torch.nn.Linear(2, 2), "Linear is not"),
        "wrapped": (wrapped, "has been replaced already; patch the model before"),
        "adapter": (adapted, "Sequential where Linear is needed"),
        "activation": (masked_lm("bert", hidden_act="relu"), "the activation 'relu'; known are"),
    }


@pytest.mark.parametrize("kind", ["family", "encoder", "classifier", "two heads", "subclass",
                                  "no model", "wrapped", "adapter", "activation"])
def test_other_models_are_refused_and_left_alone(kind):
    model, message = refused()[kind]
    plain = type(model)
    with pytest.raises(ConfigError, match=message):
        patch(model)
    assert type(model) is plain


# ------------------------------------------------------------------------- Trainer


def features(count: int) -> list[dict[str, torch.Tensor]]:
    """Rows with 0 to 6 labels each, so that the mean of means is another number."""
    counts = np.random.default_rng(3).integers(0, 7, count).tolist()
    rows = batch(counts)
    rows["attention_mask"][:] = 1
    return [{name: values[i] for name, values in rows.items()} for i in range(count)]


def trained(model, folder, accumulation: int, steps: int = 3, **options):
    """Losses of so many steps of 16 rows, and the model."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=16 // accumulation, max_steps=steps,
        gradient_accumulation_steps=accumulation, learning_rate=0.3, logging_steps=1,
        optim="sgd",  # Adam makes steps of equal size of gradients that are rounding alone
        lr_scheduler_type="constant", report_to="none", save_strategy="no", disable_tqdm=True,
        use_cpu=True, **options,
    )
    trainer = Trainer(model, arguments, train_dataset=features(16 * steps))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


def test_trainer_divides_by_the_labels_of_the_global_batch(tmp_path):
    """Equal losses and weights at every accumulation; the first loss is the mean by hand."""
    pytest.importorskip("accelerate")
    losses, weights, seen = {}, {}, []
    for accumulation in (1, 2, 4, 16):
        model = patch(masked_lm("bert"))
        model.register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True)
        losses[accumulation], _ = trained(model, tmp_path, accumulation)
        weights[accumulation] = model.state_dict()
    first = {name: seen[0][name] for name in ("input_ids", "attention_mask", "labels")}
    assert len(first["labels"]) == 16
    assert losses[1][0] == pytest.approx(masked_lm("bert")(**first).loss.item(), rel=1e-4)
    for accumulation in (2, 4, 16):
        assert losses[accumulation] == pytest.approx(losses[1], rel=1e-4)
        for name, value in weights[accumulation].items():
            torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=1e-5)


def test_evaluation_and_checkpoints_of_trainer(tmp_path):
    """Loss and logits of the evaluation are the plain model's; a checkpoint is a plain one."""
    pytest.importorskip("accelerate")
    from transformers import AutoModelForMaskedLM, Trainer, TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path), per_device_eval_batch_size=4,
                                  report_to="none", disable_tqdm=True, use_cpu=True)
    seen = []

    def accuracy(found):
        seen.append(found.predictions)
        asked = found.label_ids != NONE
        right = found.predictions.argmax(-1)[asked] == found.label_ids[asked]
        return {"accuracy": float(right.mean())}

    rows = [row for row in features(20) if (row["labels"] != NONE).any()]
    found, expected = (
        Trainer(model, arguments, eval_dataset=rows, compute_metrics=accuracy).evaluate()
        for model in (patch(masked_lm("bert")), masked_lm("bert"))
    )
    np.testing.assert_allclose(seen[0], seen[1], rtol=1e-4, atol=1e-5)
    for name in ("eval_loss", "eval_accuracy"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
    without = Trainer(patch(masked_lm("bert")), arguments, eval_dataset=rows).evaluate()
    assert without["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    model = patch(masked_lm("bert"))
    _, trainer = trained(model, tmp_path, 2, steps=1, bf16=True)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "saved")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
