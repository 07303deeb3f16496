"""Operations against the plain expression that they equal: values, gradients, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import csrc

VOCAB = 37
IMPLEMENTATIONS = sorted(csrc.IMPLEMENTATIONS)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Head(nn.Module):
    """Dense, norm, projection with bias, as the heads of the model families."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, VOCAB)
        self.rows_seen = 0

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.rows_seen = len(rows)
        return self.out(self.norm(functional.gelu(self.dense(rows))))


def make(shape=(3, 8, 16), masked=(0, 5, 7, 8, 23), capacity=None, device="cpu",
         dtype=torch.float32, index=torch.int64):
    """Hidden states, masked positions and labels with padding, and a head."""
    torch.manual_seed(0)
    head = Head(shape[-1]).to(device, dtype)
    hidden = torch.randn(shape).to(device, dtype).requires_grad_()
    positions = torch.full((capacity or len(masked),), -1)
    positions[:len(masked)] = torch.tensor(masked, dtype=torch.int64)
    labels = torch.randint(VOCAB, (len(positions),))
    return hidden, positions.to(device, index), labels.to(device, index), head


def plain(hidden, positions, labels, head):
    """Logits of every position, unmasked ones ignored: loss and hits."""
    logits = head(hidden).float().flatten(0, -2)
    wanted = torch.full((len(logits),), -100, device=logits.device)
    for position, label in zip(positions.tolist(), labels.tolist(), strict=True):
        if position >= 0:
            wanted[position] = label
    loss = functional.cross_entropy(logits, wanted, reduction="sum")
    return loss, int((logits.argmax(-1) == wanted).sum())


def gradients(loss, hidden, head) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [hidden, *head.parameters()]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "shape, masked, capacity",
    [
        ((3, 8, 16), (0, 5, 7, 8, 23), None),
        ((3, 8, 16), (0, 5, 7, 8, 23), 9),  # padding at the end
        ((3, 8, 16), (1,), 24),
        ((24, 16), (2, 3, 23), 5),  # already flat
        ((1, 1, 16), (0,), None),
        ((5, 7, 16), tuple(range(35)), None),  # every position
    ],
)
def test_equals_full_logits(shape, masked, capacity, index, implementation, device):
    hidden, positions, labels, head = make(shape, masked, capacity, device, index=index)
    expected, expected_hits = plain(hidden, positions, labels, head)
    loss, hits = csrc.masked_lm_loss(hidden, positions, labels, head, implementation)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert hits.dtype == torch.int64 and hits.shape == () and int(hits) == expected_hits
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    for found, wanted in zip(
        gradients(loss, hidden, head), gradients(expected, hidden, head), strict=True
    ):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_against_finite_differences(implementation):
    hidden, positions, labels, head = make((2, 3, 4), (1, 2, 5), 5, dtype=torch.float64)

    def loss(hidden, *parameters):
        state = dict(zip(dict(head.named_parameters()), parameters, strict=True))

        def call(rows):
            return torch.func.functional_call(head, state, (rows,))

        return csrc.masked_lm_loss(hidden, positions, labels, call, implementation)[0].double()

    # The loss is float32 by contract, so the differences are taken with wide steps.
    assert torch.autograd.gradcheck(
        loss, (hidden, *head.parameters()), eps=2e-3, atol=2e-3, rtol=1e-3
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_the_truth_as_full_logits(dtype, implementation, device):
    hidden, positions, labels, head = make((4, 9, 32), (0, 3, 9, 17, 35), 8, device, dtype)
    single = Head(32).to(device)
    single.load_state_dict({name: value.float() for name, value in head.state_dict().items()})
    hidden_single = hidden.detach().float().requires_grad_()
    truth, _ = plain(hidden_single, positions, labels, single)
    usual, _ = plain(hidden, positions, labels, head)
    loss, _ = csrc.masked_lm_loss(hidden, positions, labels, head, implementation)
    assert loss.dtype == torch.float32
    assert (loss - truth).abs() <= (usual - truth).abs() + 1e-3
    true_gradients = gradients(truth, hidden_single, single)
    for found, usual_one, true in zip(
        gradients(loss, hidden, head), gradients(usual, hidden, head), true_gradients, strict=True
    ):
        error, usual_error = ((g.float() - true).abs().max() for g in (found, usual_one))
        assert error <= usual_error + 2e-2 * true.abs().max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("capacity", [0, 6])
def test_no_masked_position(capacity, implementation, device):
    hidden, _, _, head = make(device=device)
    positions = torch.full((capacity,), -1, device=device)
    loss, hits = csrc.masked_lm_loss(
        hidden, positions, torch.zeros_like(positions), head, implementation
    )
    assert loss.item() == 0 and loss.dtype == torch.float32 and hits.item() == 0
    # Every rank's backward pass must touch the same parameters.
    for gradient in gradients(loss, hidden, head):
        assert not gradient.any() and torch.isfinite(gradient).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_weighs_nothing(implementation, device):
    results = []
    for capacity, garbage in ((5, 0), (11, 0), (11, -100), (11, VOCAB + 1000)):
        hidden, positions, labels, head = make(capacity=capacity, device=device)
        torch.manual_seed(1)
        labels[:5] = torch.randint(VOCAB, (5,))
        labels[5:] = garbage
        with torch.no_grad():  # the row that a clamped -1 would point at is the best guess of all
            head.out.bias[labels[0]] += 20
        loss, hits = csrc.masked_lm_loss(hidden, positions, labels, head, implementation)
        results.append((loss, hits, *gradients(loss, hidden, head)))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_head_sees_masked_rows_only(implementation):
    hidden, positions, labels, head = make(capacity=9)
    csrc.masked_lm_loss(hidden, positions, labels, head, implementation)
    assert head.rows_seen <= 9 < 24


def test_hits():
    hidden = torch.eye(4)[None]  # position p says p
    positions, labels = torch.tensor([0, 1, 3, -1]), torch.tensor([0, 2, 3, 0])
    loss, hits = csrc.masked_lm_loss(hidden, positions, labels, lambda rows: 30 * rows)
    assert int(hits) == 2 and loss.item() == pytest.approx(30, abs=1e-4)


@pytest.mark.parametrize(
    "change, fragment",
    [
        ({"hidden": torch.zeros(4)}, r"hidden has shape \(4,\): must be \(B, S, D\) or \(T, D\)"),
        ({"hidden": torch.zeros(1, 2, 3, 4)}, "hidden has shape"),
        ({"positions": torch.zeros(2, 2, dtype=torch.int64)}, r"must be \(M,\) both"),
        ({"positions": torch.zeros(3, dtype=torch.int64)}, r"positions \(3,\) and masked_labels"),
        ({"positions": torch.zeros(5)}, "masked_positions has dtype torch.float32"),
        ({"labels": torch.zeros(5, dtype=torch.bool)}, "masked_labels has dtype torch.bool"),
        ({"labels": torch.zeros(5, dtype=torch.int16)}, "must be int32 or int64"),
        ({"labels": torch.zeros(5, dtype=torch.int64, device="meta")}, "is on meta, hidden on cpu"),
        ({"implementation": "triton9"}, r"'triton9': known are \['reference'"),
    ],
)
def test_refusals(change, fragment):
    hidden, positions, labels, head = make()
    given = {"hidden": hidden, "positions": positions, "labels": labels,
             "implementation": "reference", **change}
    with pytest.raises(ValueError, match=fragment):
        csrc.masked_lm_loss(
            given["hidden"], given["positions"], given["labels"], head, given["implementation"]
        )
