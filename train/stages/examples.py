"""Labelled examples as batches: encoding, order, collation, and the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from preprocess.text.encode import prepare_backend

IGNORED = -100
"""Target of a token that is left out of the loss and of the metrics."""

PADDED_LENGTH = 8  # of examples on a GPU, in tokens


@dataclass(frozen=True)
class Examples:
    """Labelled examples of one split.

    input_ids: N arrays `(L_i,)` int64, special tokens included.
    token_type_ids: N arrays `(L_i,)` int64, or None for a model without segments.
    targets: N arrays int64: `()`, the class of the text, or `(L_i,)`, the class of each token,
        with `IGNORED` where there is none.
    mass: share of an example in the denominator of the mean loss, `(N,)` float64.
    """

    input_ids: list[np.ndarray]
    token_type_ids: list[np.ndarray] | None
    targets: list[np.ndarray]
    mass: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def lengths(self) -> np.ndarray:
        """Count the tokens of each example, `(N,)` int64."""
        return np.array([len(ids) for ids in self.input_ids], dtype=np.int64)


def encode_inputs(
    tokenizer: Any, texts: Sequence[str], aspects: Sequence[str] | None, max_seq_length: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Return ids and segments of `[CLS] text [SEP]`, or `[CLS] aspect [SEP] text [SEP]`.

    An input is cut to `max_seq_length`, always from its longer part, so that an aspect never
    exceeds the limit. A special token written in a text is text (`prepare_backend`).
    """
    backend = prepare_backend(tokenizer)
    backend.enable_truncation(max_seq_length, strategy="longest_first")
    inputs = texts if aspects is None else list(zip(aspects, texts, strict=True))
    encoded = backend.encode_batch(list(inputs))
    return [one.ids for one in encoded], [one.type_ids for one in encoded]


def make_examples(
    input_ids: Sequence[Any],
    token_type_ids: Sequence[Any] | None,
    targets: Sequence[Any],
    class_weights: Sequence[float],
) -> Examples:
    """Build a split; the mass of an example is the sum of its targets' class weights."""
    table = np.asarray(class_weights, dtype=np.float64)
    arrays = [np.asarray(target, dtype=np.int64) for target in targets]
    mass = [table[target[target != IGNORED]].sum() for target in arrays]
    return Examples(
        [np.asarray(ids, dtype=np.int64) for ids in input_ids],
        None if token_type_ids is None else [np.asarray(t, np.int64) for t in token_type_ids],
        arrays,
        np.array(mass, dtype=np.float64),
    )


def balanced_weights(labels: Sequence[int], num_classes: int) -> np.ndarray:
    """Return weights `(C,)` float64 with which all classes that occur weigh equally in sum.

    A class of n of the N examples has N / (number of classes that occur * n): the mean weight of an
    example is 1. One that does not occur has 1.
    """
    counts = np.bincount(labels, minlength=num_classes)
    there = counts > 0
    return np.where(there, len(labels) / (there.sum() * np.maximum(counts, 1)), 1.0)


def reweighted(examples: Examples, class_weights: np.ndarray) -> Examples:
    """Return examples of one target each whose mass is the weight of their class."""
    return replace(examples, mass=class_weights[np.stack(examples.targets)])


def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of an epoch, `(N,)` int64: a function of seed and epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def rank_share(
    batch: np.ndarray, micro_batch_size: int, accumulation_steps: int, rank: int, world_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cut a global batch into the micro batches of one rank.

    Neighbours in `batch` land in one micro batch, and consecutive micro batches go to consecutive
    ranks, so a batch sorted by length wastes little padding and keeps the ranks even. A batch too
    small for its slots is filled with repeated indices of weight 0: every rank always runs every
    micro batch, so no gradient is left over when an epoch ends.

    Worked example: batch [7, 8, 9], micro batches of 2, one step, two ranks: rank 0 gets [[7, 8]]
    with weights [[1, 1]], rank 1 gets [[9, 7]] with weights [[1, 0]].

    Args:
        batch: indices of a global batch, `(n,)` int64, 1 <= n <= slots.
    Returns:
        Indices, `(accumulation_steps, micro_batch_size)` int64, and weights 0 or 1 of the same
        shape, float32.
    """
    slots = micro_batch_size * accumulation_steps * world_size
    assert 0 < len(batch) <= slots, (len(batch), slots)
    shape = (accumulation_steps, world_size, micro_batch_size)
    indices = np.resize(batch, slots).reshape(shape)
    weights = (np.arange(slots) < len(batch)).astype(np.float32).reshape(shape)
    return indices[:, rank], weights[:, rank]


def collate(
    examples: Examples, indices: np.ndarray, pad_id: int, device: torch.device | str = "cpu",
    weights: np.ndarray | None = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Pad the chosen examples to the longest of them, and move them to `device` in one copy.

    On a GPU the length is a multiple of `PADDED_LENGTH`: its kernels see few different shapes.

    Args:
        weights: 0 or 1 for each example, `(B,)`; None for all 1.
    Returns:
        The model's inputs, `(B, L)` int64 each; the targets, `(B,)` or `(B, L)` int64; and the
        weights, `(B,)` int64.
    """
    device = torch.device(device)
    rows = [examples.input_ids[i] for i in indices]
    step = 1 if device.type == "cpu" else PADDED_LENGTH
    length = step * -(-max(len(row) for row in rows) // step)

    def pad(arrays: list[np.ndarray], fill: int) -> np.ndarray:
        out = np.full((len(arrays), length), fill, dtype=np.int64)
        for row, array in zip(out, arrays, strict=True):
            row[: len(array)] = array
        return out

    parts = {
        "input_ids": pad(rows, pad_id),
        "attention_mask": pad([np.ones_like(row) for row in rows], 0),
    }
    if examples.token_type_ids is not None:
        parts["token_type_ids"] = pad([examples.token_type_ids[i] for i in indices], 0)
    targets = [examples.targets[i] for i in indices]
    parts["targets"] = pad(targets, IGNORED) if targets[0].ndim else np.stack(targets)
    parts["weights"] = np.ones(len(rows)) if weights is None else weights
    flat = torch.from_numpy(np.concatenate([part.ravel() for part in parts.values()])
                            .astype(np.int64, copy=False))
    if device.type == "cuda":
        flat = flat.pin_memory()  # so that the copy does not wait for the GPU
    pieces = flat.to(device, non_blocking=True).split([part.size for part in parts.values()])
    inputs = {name: piece.view(part.shape)
              for (name, part), piece in zip(parts.items(), pieces, strict=True)}
    return inputs, inputs.pop("targets"), inputs.pop("weights")


def weighted_loss(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, class_weights: torch.Tensor
) -> torch.Tensor:
    """Sum the cross-entropy of a micro batch; the caller divides by the batch's mass.

    Args:
        logits: `(B, C)` or `(B, L, C)`, any float type; computed in float32.
        targets: `(B,)` or `(B, L)` int64; `IGNORED` adds nothing.
        weights: 0 or 1 for each example, `(B,)`; 0 marks a repeated one.
        class_weights: `(C,)` float32.
    Returns:
        A scalar float32.
    """
    losses = F.cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]),
        targets.reshape(-1),
        weight=class_weights,
        ignore_index=IGNORED,
        reduction="none",
    )
    # torch.where, not a product: a repeated example must add nothing even if its loss is inf.
    per_example = losses.reshape(len(targets), -1).sum(1)
    return torch.where(weights > 0, per_example, torch.zeros_like(per_example)).sum()


def global_batches(
    examples: Examples, batch_size: int, seed: int, start_step: int, total_steps: int
) -> Iterator[np.ndarray]:
    """Yield the global batch of each step from `start_step`: `(n,)` int64, shortest first.

    The last batch of an epoch holds the remainder. Lengths are sorted within a batch only,
    so that its micro batches hold similar ones; which examples it holds is random.
    """
    per_epoch = -(-len(examples) // batch_size)
    lengths = examples.lengths
    order = None
    for step in range(start_step, total_steps):
        epoch, number = divmod(step, per_epoch)
        if order is None or number == 0:
            order = epoch_order(len(examples), seed, epoch)
        batch = order[number * batch_size : (number + 1) * batch_size]
        yield batch[np.argsort(lengths[batch], kind="stable")]
