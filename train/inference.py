"""Forward passes over many short sequences of ids: batches, special tokens, logits.

What annotation and scoring share. Sequences are sorted by length and cut into batches by a budget
of token slots, so padding is little and the order of the answers is the order of the questions.

Letters: `B` sequences of a batch, `L` padded length, `C` classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from preprocess.errors import ConfigError


class Template(NamedTuple):
    """The special tokens of an input: `before [first between] second after`.

    `second_type` is the segment of everything after `between`; the rest is segment 0.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    second_type: int

    @property
    def num_special(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)


def special_template(tokenizer: Any, pair: bool) -> Template:
    """Learn from the tokenizer itself where it puts special tokens around a text or a pair."""
    texts = ("a", "a") if pair else ("a",)
    encoded = tokenizer(*texts, return_special_tokens_mask=True, return_token_type_ids=True)
    runs: list[list[int]] = [[]]
    for token, is_special in zip(
        encoded["input_ids"], encoded["special_tokens_mask"], strict=True
    ):
        if is_special:
            runs[-1].append(token)
        elif runs[-1] or len(runs) == 1:
            runs.append([])
    before, *between, after = map(tuple, runs)
    assert len(between) == (1 if pair else 0), "an input is one text or two"
    return Template(before, between[0] if pair else (), after, encoded["token_type_ids"][-1])


def check_trained(config: Any, suffix: str, name: str, remedy: str) -> None:
    """Refuse a checkpoint without the trained top that is needed: a fresh one knows nothing."""
    found = config.architectures or []
    if not any(architecture.endswith(suffix) for architecture in found):
        raise ConfigError(
            f"--model_name_or_path {name}: holds {', '.join(found) or 'no architecture'}, not "
            f"one for {suffix[len('For'):]}; {remedy}"
        )


def budget_batches(lengths: Sequence[int] | np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Group inputs of like length so that `B * L <= batch_tokens`, at least one to a batch.

    Worked example: lengths [5, 2, 6, 2], budget 8: [[2], [0], [1, 3]].

    Returns:
        Arrays of indices, int64, longest inputs first: the first batch needs the most memory.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, batch_tokens // max(1, int(lengths[order[start]])))
        batches.append(order[start : start + size])
        start += size
    return batches


@dataclass
class Counts:
    """What the forward passes cost: passes, inputs, real tokens, and slots with padding."""

    passes: int = 0
    inputs: int = 0
    tokens: int = 0
    slots: int = 0


@dataclass
class Runner:
    """A model without dropout and gradients, and how its inputs are made.

    model: a transformers model; called with `input_ids`, `attention_mask` and, if it knows
        segments, `token_type_ids`, `(B, L)` int64 each; returns an object with `logits`.
    half: compute in fp16 where it pays (a GPU).
    """

    model: Any
    template: Template
    tokenizer: Any
    device: torch.device
    batch_tokens: int
    half: bool = False

    def __post_init__(self) -> None:
        self.model.to(self.device).eval()
        self._pad_id = self.tokenizer.pad_token_id
        self._segments = getattr(self.model.config, "type_vocab_size", 0) > 1
        self.counts = Counts()

    def run(
        self,
        sequences: Sequence[Sequence[int] | np.ndarray],
        firsts: Sequence[Sequence[int] | np.ndarray] | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield the logits of each batch.

        Args:
            sequences: ids without special tokens; may be empty.
            firsts: what stands before each, in a segment of its own; needs a pair template.
            share: `(rank, world_size)`: run only every world_size-th batch. What a batch holds
                does not depend on the number of ranks, and so neither do the logits.
        Yields:
            Indices in `sequences`, `(B,)` int64; logits, `(B, C)` or `(B, L, C)` float32; slot of
            each sequence's first token, `(B,)` int64.
        """
        template, num_special = self.template, self.template.num_special
        lengths = np.array([len(s) for s in sequences], dtype=np.int64) + num_special
        starts = np.full(len(sequences), num_special - len(template.after), dtype=np.int64)
        if firsts is not None:
            first_lengths = np.array([len(f) for f in firsts], dtype=np.int64)
            lengths, starts = lengths + first_lengths, starts + first_lengths
        for batch in budget_batches(lengths, self.batch_tokens)[share[0] :: share[1]]:
            shape = (len(batch), int(lengths[batch[0]]))
            ids = np.full(shape, self._pad_id, dtype=np.int64)
            types = np.zeros(shape, dtype=np.int64)
            for row, i in enumerate(batch):
                first = () if firsts is None else (*firsts[i], *template.between)
                ids[row, : starts[i]] = (*template.before, *first)
                end = starts[i] + len(sequences[i])
                ids[row, starts[i] : end] = sequences[i]
                ids[row, end : lengths[i]] = template.after
                types[row, starts[i] : lengths[i]] = template.second_type
            mask = (np.arange(shape[1]) < lengths[batch, None]).astype(np.int64)
            self.counts.passes += 1
            self.counts.inputs += len(batch)
            self.counts.tokens += int(lengths[batch].sum())
            self.counts.slots += ids.size
            yield batch, self._logits(ids, mask, types), starts[batch]

    def _logits(self, ids: np.ndarray, mask: np.ndarray, types: np.ndarray) -> np.ndarray:
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._segments:
            inputs["token_type_ids"] = types
        tensors = {k: torch.from_numpy(v).to(self.device) for k, v in inputs.items()}
        half = self.half and self.device.type == "cuda"
        with torch.inference_mode(), torch.autocast(self.device.type, torch.float16, enabled=half):
            return self.model(**tensors).logits.float().cpu().numpy()
