"""Forward passes over many short sequences of ids: batches, special tokens, logits.

Shared by annotation and scoring. Sequences lie one after the other in one array; they are sorted
by length and cut into batches of nearly equal lengths, by a budget of token slots. So there is
little padding, most batches need no attention mask, no Python code runs per sequence, and answers
come with the indices of their questions.

On a GPU the host only starts passes: inputs and answers are copied from and to pinned memory, and
the answers of a pass are read while the next two are computed. Shapes vary with the lengths, so
attention runs on kernels that need no plan per shape, and nothing is compiled.

Letters: `N` sequences, `T` tokens of all, `B` sequences of a batch, `L` padded length, `C` classes.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from preprocess.errors import ConfigError
from preprocess.progress import say
from preprocess.store import ranges
from train.engine import has_fast_bf16
from train.model import DTYPES, FAMILIES, attention_mask, forward_flops, other_outputs


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
    """Find out from the tokenizer where it puts special tokens around a text or a pair."""
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


def check_trained(config: Any, suffix: str | tuple[str, ...], name: str, remedy: str) -> None:
    """Refuse a checkpoint without the trained top that is needed; the first suffix names it.

    A classifier whose outputs are not the probabilities of classes is refused too.
    """
    found = config.architectures or []
    if not any(architecture.endswith(suffix) for architecture in found):
        first = suffix if isinstance(suffix, str) else suffix[0]
        raise ConfigError(
            f"--model_name_or_path {name}: holds {', '.join(found) or 'no architecture'}, not "
            f"one for {first[len('For'):]}; {remedy}"
        )
    if other_outputs(config):
        raise ConfigError(
            f"--model_name_or_path {name}: gives {other_outputs(config)}, and one class of two or "
            f"more is needed; {remedy}"
        )


def warn_of_pairs(stages: Sequence[dict[str, Any]], pair: bool) -> None:
    """Say that a classifier of texts with aspects gets single texts, or the reverse.

    Args:
        stages: its lineage, whose fine-tuning says what it was trained on.
        pair: whether it now gets an aspect with each text.
    """
    tuned = [stage for stage in stages if stage["stage"] == "finetune"][-1:]
    for stage in tuned:
        about = stage.get("about")
        trained = about.get("pair") if isinstance(about, dict) else None
        if trained is True and not pair:
            say("warning: this model was fine-tuned on texts with an aspect each, and gets texts "
                "alone; --pair_column NAME gives their aspects")
        if trained is False and pair:
            say("warning: this model was fine-tuned on single texts, and gets an aspect before "
                "each; leave --pair_column out")


# --------------------------------------------------------------------------- many sequences


@dataclass(frozen=True, eq=False)
class IdLists(Sequence[list[int]]):
    """Sequences of ids in one array; item i is the list of the ids of sequence i.

    Attributes:
        flat: ids, any integer type; entries between the sequences are not read.
        starts, lengths: of each sequence in `flat`, `(N,)` int64.
    """

    flat: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, lists: Iterable[Sequence[int] | np.ndarray]) -> IdLists:
        """Copy sequences of any kind, one after the other."""
        if isinstance(lists, IdLists):
            return lists
        arrays = [np.asarray(ids, dtype=np.int64) for ids in lists]
        lengths = np.array([len(ids) for ids in arrays], dtype=np.int64)
        flat = np.concatenate([np.empty(0, np.int64), *arrays])
        return cls(flat, np.cumsum(lengths) - lengths, lengths)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: Any) -> Any:
        return self.flat[self.starts[i] : self.starts[i] + self.lengths[i]].tolist()

    def take(self, which: np.ndarray) -> IdLists:
        """Select sequences by number, `(M,)` int64; their ids are not copied."""
        return IdLists(self.flat, self.starts[which], self.lengths[which])

    def tokens(self) -> np.ndarray:
        """Return the ids of all sequences without gaps, `(T,)`."""
        return self.flat[ranges(self.starts, self.lengths)]

    def packed(self) -> IdLists:
        """Return a copy without gaps."""
        return IdLists(self.tokens(), np.cumsum(self.lengths) - self.lengths, self.lengths)


PASS_SLOTS = {"cpu": 128, "cuda": 8192}
"""Token slots that cost as much time as one more pass, which a GPU's host starts in 5 ms or so."""

BATCH_TOKENS = {"cpu": 8192, "cuda": 65_536}
"""Token slots of a pass. On a GPU so many that the host starts a pass while one is computed; their
states take 2 GB at most (BERT-large in fp32)."""


def budget_batches(
    lengths: Sequence[int] | np.ndarray, batch_tokens: int, pass_slots: int = PASS_SLOTS["cpu"]
) -> list[np.ndarray]:
    """Group inputs of similar length so that `B * L <= batch_tokens`, at least one per batch.

    A batch ends where the length changes, unless it and the padding of what comes next stay
    within `pass_slots`: then padding costs less than one more pass.
    Worked example: lengths [5, 2, 6, 2, 2], budget 9: [[2], [0], [1, 3, 4]]; with room for two
    slots of padding, budget 15: [[2, 0], [1, 3, 4]].

    Returns:
        Arrays of indices, int64, longest inputs first: the first batch needs the most memory.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    descending = lengths[order]
    batches, start = [], 0
    while start < len(order):
        longest = max(1, int(descending[start]))
        most = descending[start : start + max(1, batch_tokens // longest)]
        padding = np.cumsum(most[0] - most)
        size = int(np.searchsorted(padding, pass_slots, side="right"))
        if size < len(most):  # leave those of one length together
            size -= int(np.count_nonzero(most[:size] == most[size]))
        batches.append(order[start : start + size])
        start += size
    return batches


def one_by_one(lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Return one batch per input."""
    return list(np.arange(len(lengths))[:, None])


# --------------------------------------------------------------------------- the passes


Cut = Callable[[np.ndarray, int], list[np.ndarray]]
Compute = Callable[["Runner", Any, dict[str, Any]], torch.Tensor]

PASSES_AHEAD = 2
"""Passes that are started before the answers of one are read."""

# cuDNN's attention makes a plan for each new shape, which takes it about 0.2 s.
_PLANLESS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


HALF: dict[str, torch.dtype | None] = {**DTYPES, "fp32": None}
"""`Runner.half` for each precision."""


def choose_dtype(dtype: str, may_be_bf16: bool = False) -> str:
    """Return the key of `HALF` for the value of `--dtype`.

    Args:
        dtype: auto is fp16 on a GPU, and on a CPU the quickest of fp32 and, if it will do, bf16.
    """
    if dtype != "auto":
        return dtype
    if torch.cuda.is_available():
        return "fp16"
    return "bf16" if may_be_bf16 and has_fast_bf16() else "fp32"


def scoring_dtype(measure: str, dtype: str) -> str:
    """Return the key of `HALF` that `score_tokens.py --measure ... --dtype ...` computes in."""
    if measure == "gradient":
        return "fp32"
    return choose_dtype(dtype, may_be_bf16=measure == "scorer")


def in_half(model: Any, dtype: torch.dtype) -> Any:
    """Return a copy of a model in fp16 or bf16, whose last linear layer makes fp32 logits."""
    twin = deepcopy(model)
    *_, top = (module for module in twin.modules() if isinstance(module, nn.Linear))
    exact = {id(parameter) for parameter in top.parameters()}
    for parameter in twin.parameters():  # buffers stay: frequencies of positions need fp32
        if id(parameter) not in exact:
            parameter.data = parameter.data.to(dtype)
    top.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    return twin


class _Pass(NamedTuple):
    """A pass that was started.

    answer: on the host, complete when `done` has happened. inputs: to repeat it.
    """

    batch: np.ndarray
    starts: np.ndarray
    inputs: dict[str, Any]
    answer: torch.Tensor
    done: torch.cuda.Event | None


@dataclass
class Runner:
    """A model without dropout and gradients, and the way its inputs are made.

    model: a transformers model in fp32; called with `input_ids`, if it knows segments
        `token_type_ids`, and where there is padding `attention_mask`, `(B, L)` int64 each, or a
        complete mask, which spares transformers a look at it; returns an object with `logits`.
    half: compute in this precision (`in_half`), and repeat in fp32 a pass whose answers are not
        finite; None is fp32.
    cut: lengths `(N,)` and budget of slots -> indices of the inputs of each batch; None is
        `budget_batches`.
    min_width: slots to which every input is padded at least; implies a mask.
    compute: (runner, model, inputs of a batch) -> answer, instead of one of the logits. The inputs
        have the plain mask of the padding, and those of the targets of `run`. It says itself
        whether it needs gradients; its answer has none.
    to_half: makes the copy of the model in that precision.
    work: forward passes that one pass costs: 2 where `compute` asks for gradients of its inputs.
    counts: the cost so far: "passes", "inputs", real "tokens", "slots" with padding, passes
        "repeated" in fp32, and "flops", 0 for an unknown family of models.
    """

    model: Any
    template: Template
    tokenizer: Any
    device: torch.device
    batch_tokens: int
    half: torch.dtype | None = None
    cut: Cut | None = None
    min_width: int = 0
    compute: Compute | None = None
    work: float = 1
    to_half: Callable[[Any, torch.dtype], Any] = in_half
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.model.to(self.device).eval()
        self._quick: Any = self.to_half(self.model, self.half) if self.half else self.model
        self._pad_id = self.tokenizer.pad_token_id
        config = getattr(self.model, "config", None)
        self._segments = getattr(config, "type_vocab_size", 0) > 1
        # A top that takes the mean reads the mask as well.
        means = getattr(config, "classifier_pooling", "cls") != "cls"
        self._family = None if means else FAMILIES.get(getattr(config, "model_type", ""))
        per_token, per_square = (forward_flops(self.model, *sums) for sums in ((1, 0), (0, 1)))
        self._flops = np.array([per_token or 0.0, per_square or 0.0]) * self.work

    def run(
        self,
        sequences: Iterable[Sequence[int] | np.ndarray],
        firsts: Iterable[Sequence[int] | np.ndarray] | None = None,
        share: tuple[int, int] = (0, 1),
        answer: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.float,
        targets: np.ndarray | None = None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield the logits of each batch, or what `compute` makes instead.

        Args:
            sequences: ids without special tokens; may be empty.
            firsts: ids before each, in a segment of their own; needs a pair template.
            share: `(rank, world_size)`: run only every world_size-th batch. Batches, and so
                logits, do not depend on the number of ranks.
            answer: what is computed on the device from the logits, and yielded instead.
            targets: beside the ids of `sequences`, which are `IdLists`: what each is to be, or -1
                where nothing is asked, `(T,)` int64. `compute` gets, of a batch, the flat slots
                (`masked_positions`, ascending), the values (`masked_labels`), and how many the
                fullest row has (`most_masked`).
        Yields:
            Indices in `sequences`, `(B,)` int64; logits, `(B, C)` or `(B, L, C)` float32; slot of
            each sequence's first token, `(B,)` int64.
        """
        seconds = IdLists.of(sequences)
        heads = None if firsts is None else IdLists.of(firsts)
        lengths = seconds.lengths + self.template.num_special
        if heads is not None:
            lengths = lengths + heads.lengths
        cut = self.cut or partial(budget_batches, pass_slots=PASS_SLOTS[self.device.type])
        waiting: deque[_Pass] = deque()
        for batch in cut(lengths, self.batch_tokens)[share[0] :: share[1]]:
            inputs, starts = self._assemble(
                seconds.take(batch), None if heads is None else heads.take(batch), targets)
            sums = int(lengths[batch].sum()), int((lengths[batch] ** 2).sum())
            self.counts.update(passes=1, inputs=len(batch), tokens=sums[0],
                               slots=inputs["input_ids"].size, flops=int(self._flops @ sums))
            started = self._start(inputs, answer, bool(self.half))
            waiting.append(_Pass(batch, starts, inputs, *started))
            if len(waiting) > PASSES_AHEAD:
                yield self._finish(waiting.popleft(), answer)
        while waiting:
            yield self._finish(waiting.popleft(), answer)

    def _assemble(
        self, seconds: IdLists, firsts: IdLists | None, targets: np.ndarray | None
    ) -> tuple[dict[str, Any], np.ndarray]:
        """Return the inputs of one batch, and the slot of each sequence's first token."""
        before, between, after, second_type = self.template
        num_rows = len(seconds)
        starts = np.full(num_rows, len(before) + len(between))
        if firsts is not None:
            starts += firsts.lengths
        ends = starts + seconds.lengths
        lengths = ends + len(after)
        width = max(self.min_width, int(lengths.max()))
        row, slot = np.arange(num_rows), np.arange(width)
        ids = np.full((num_rows, width), self._pad_id, dtype=np.int64)
        ids[:, : len(before)] = before
        if firsts is not None:
            ids.reshape(-1)[ranges(row * width + len(before), firsts.lengths)] = firsts.tokens()
        for i, token in enumerate(between):
            ids[row, starts - len(between) + i] = token
        ids.reshape(-1)[ranges(row * width + starts, seconds.lengths)] = seconds.tokens()
        for i, token in enumerate(after):
            ids[row, ends + i] = token
        inputs: dict[str, Any] = {"input_ids": ids}
        filled = slot < lengths[:, None]
        if self.min_width or not filled.all():
            inputs["attention_mask"] = filled.astype(np.int64)
        if self._segments:
            inputs["token_type_ids"] = np.where(filled & (slot >= starts[:, None]), second_type, 0)
        if targets is not None:
            labels = targets[ranges(seconds.starts, seconds.lengths)]
            slots = ranges(row * width + starts, seconds.lengths)[labels >= 0]
            inputs["masked_positions"], inputs["masked_labels"] = slots, labels[labels >= 0]
            inputs["most_masked"] = int(np.bincount(slots // width, minlength=1).max())
        return inputs, starts

    def _start(
        self, inputs: dict[str, Any], answer: Callable[[torch.Tensor], torch.Tensor],
        half: bool,
    ) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Start a pass; return what becomes its answer on the host, and when it is complete."""
        on_gpu = self.device.type == "cuda"
        kernels: AbstractContextManager[Any] = sdpa_kernel(_PLANLESS) if on_gpu else nullcontext()
        tensors: dict[str, Any] = {
            name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            for name, value in inputs.items()}
        if on_gpu:
            tensors = {name: value.pin_memory().to(self.device, non_blocking=True)
                       if isinstance(value, torch.Tensor) else value
                       for name, value in tensors.items()}
        model = self._quick if half else self.model
        try:
            with kernels:
                if self.compute:
                    found = self.compute(self, model, tensors)
                else:
                    with torch.inference_mode():
                        found = answer(self.logits(model, tensors))
                found = found.to("cpu", non_blocking=True)  # pinned
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"--batch_tokens {self.batch_tokens}: such a pass does not fit the memory of the "
                f"GPU; give --batch_tokens {max(16, self.batch_tokens // 2)}"
            ) from None
        if not on_gpu:
            return found, None
        done = torch.cuda.Event()
        done.record()
        return found, done

    def logits(self, model: Any, tensors: dict[str, Any]) -> torch.Tensor:
        """Return the logits of one batch; its mask becomes the complete one of the family."""
        filled = tensors.get("attention_mask")
        if filled is not None and self._family:
            slot = torch.arange(filled.shape[1], device=self.device)[None]
            dtype = model.get_input_embeddings().weight.dtype
            mask = attention_mask(self._family, model.config, filled, slot, dtype)
            tensors = {**tensors, "attention_mask": mask}
        return model(**tensors).logits

    def _finish(
        self, started: _Pass, answer: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Wait for a pass; return its indices, answers and first slots."""
        if started.done:
            started.done.synchronize()
        found = started.answer.numpy()
        if self.half and not np.isfinite(found).all():
            self.counts["repeated"] += 1
            again, done = self._start(started.inputs, answer, half=False)
            if done:
                done.synchronize()
            found = again.numpy()
        return started.batch, found, started.starts
