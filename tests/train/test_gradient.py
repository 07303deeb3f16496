"""Gradient times embedding of every token: the worked example, and one input at a time."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.support.models import MeanClassifier, small_classifiers
from train.model import first_slot_only, token_rows
from train.stages.gradient import margin_gradient
from train.stages.inference import Runner, Template, one_by_one

CLASSIFIERS = small_classifiers(num_labels=3)
del CLASSIFIERS["modernbert-mean"]  # it reads more than the first slot


def test_worked_example():
    """not (-1, 0), good (2, 1), film (0, 1); the values sum to the margin of a linear model."""
    model = MeanClassifier([[-1.0, 0.0], [2.0, 1.0], [0.0, 1.0]], [1.0, 0.5])
    ids = torch.tensor([[0, 1, 2]])
    runner = SimpleNamespace(logits=lambda model, inputs: model(**inputs).logits)
    found = margin_gradient(runner, model, {"input_ids": ids})[0]
    assert found.tolist() == pytest.approx([-1 / 3, 5 / 6, 1 / 6])
    logits = model(input_ids=ids).logits[0]
    assert found.sum().item() == pytest.approx((logits[1] - logits[0]).item())
    # Of a sure text it is as large: the loss would make it vanish.
    model.weights.data *= 100
    assert margin_gradient(runner, model, {"input_ids": ids})[0].tolist() == pytest.approx(
        [-100 / 3, 500 / 6, 100 / 6])


def one_at_a_time(model, ids):
    """The twin: each slot's row moved a little along itself, in float64: no gradient at all."""
    model = deepcopy(model).double()
    step, found = 1e-3, []  # rotary embeddings round to float32
    for slot in range(len(ids)):
        margins = []
        for factor in (1 + step, 1 - step):
            scale = torch.ones(1, len(ids), 1, dtype=torch.float64)
            scale[0, slot] = factor
            hook = token_rows(model).register_forward_hook(
                lambda *words, scale=scale: words[-1] * scale)
            with torch.no_grad():
                first, second = model(input_ids=torch.tensor([ids])).logits[0].topk(2).values
            hook.remove()
            margins.append(float(first - second))
        found.append((margins[0] - margins[1]) / (2 * step))
    return found


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_batches_give_the_gradients_of_single_inputs(name):
    """With padding and without, where the last layer computes the first slot only."""
    make, config = CLASSIFIERS[name]
    torch.manual_seed(0)
    model = make(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    rng = np.random.default_rng(0)
    texts = [rng.integers(5, 40, n).tolist() for n in (1, 3, 9, 2, 9, 14)]
    alone = [one_at_a_time(model, [2, *ids, 3]) for ids in texts]
    assert min(np.ptp(one) for one in alone) > 1e-3, "gradients that are alike test nothing"
    first_slot_only(model)
    for cut in (one_by_one, lambda lengths, most: [np.argsort(-lengths)]):
        runner = Runner(model, Template((2,), (), (3,), 0),
                        SimpleNamespace(pad_token_id=config.pad_token_id), torch.device("cpu"),
                        1000, cut=cut, compute=margin_gradient)
        seen = 0
        for batch, found, slots in runner.run(texts):
            assert found.dtype == np.float32 and (slots == 1).all()
            for i, row in zip(batch.tolist(), found, strict=True):
                whole = alone[i]
                np.testing.assert_allclose(row[: len(whole)], whole, rtol=2e-3, atol=2e-4)
                seen += 1
        assert seen == len(texts)
    assert not token_rows(model)._forward_hooks
