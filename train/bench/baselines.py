"""Baselines of speed: masked-LM training as Hugging Face's `run_mlm.py` does it, and its parts.

The same model in transformers' own classes, the same texts, as many rows per step. `run_mlm.py`
makes rows of them in two ways; each is trained unchanged and with a patch of ten lines:

    transformers-grouped  texts as `[CLS] ... [SEP]`, one after the other, cut every S tokens; the
                          remainder of every 1,000 texts is dropped; attention across texts
    transformers-lines    `--line_by_line`: one text per row, truncated at S, padded to the longest
                          of its batch
    gather-...            the same, with logits of the masked slots only (`gather_loss`)

Masks and padding are `DataCollatorForLanguageModeling`'s. The loop is `Trainer`'s, without the
package that it depends on: `DataLoader` in the training process, fused AdamW, gradients
clipped, linear schedule, in 16 bit autocast with fp32 weights. As in `Trainer`, the loss is
checked after every micro batch.

Beside them stand `BareLoop`, forward, backward and AdamW of one prepared batch in plain PyTorch
(what DeepSpeed and the loader cost), and `make_passes`, forward and backward alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

import csrc
from csrc import reference
from preprocess.masking import STANDARD, Corruption
from preprocess.store import TokenStore
from train import engine as ds
from train.bench.throughput import Laps, no_laps
from train.data import PackedBatch, StepBatch
from train.model import DTYPES, PackedMaskedLM, uncompiled

BASELINES = ("transformers-grouped", "transformers-lines", "gather-grouped", "gather-lines")
TEXTS_A_MAP = 1000  # texts that `datasets` hands to `group_texts` at once
# A micro batch: `input_ids`, `attention_mask`, `labels`, `(B, L)`; labels are -100 where unmasked.
Batch = dict[str, torch.Tensor]
LossFunction = Callable[[PackedMaskedLM, Batch], torch.Tensor]


# --------------------------------------------------------------------------------------- rows


def draw_texts(store: TokenStore, seed: int) -> Iterator[np.ndarray]:
    """Yield the documents of a store once, in random order: `(n,)` uint16 each."""
    bounds = [shard.sequence_offsets[shard.document_offsets] for shard in store.shards]
    first = np.cumsum([0, *(len(ends) - 1 for ends in bounds)])
    for number in np.random.default_rng(seed).permutation(first[-1]):
        s = int(np.searchsorted(first, number, side="right")) - 1
        start, end = bounds[s][number - first[s]:][:2]
        if end > start:
            yield store.shards[s].tokens[start:end]


def _wrap(store: TokenStore, text: np.ndarray) -> list[int]:
    return [store.special_ids["cls"], *text.tolist(), store.special_ids["sep"]]


def grouped_rows(
    store: TokenStore, max_seq_length: int, num_rows: int, seed: int
) -> list[list[int]]:
    """Return ids of rows as `run_mlm.py` makes them by default, each of `max_seq_length` tokens."""
    rows: list[list[int]] = []
    joined: list[int] = []
    for number, text in enumerate(draw_texts(store, seed), 1):
        joined += _wrap(store, text)
        whole = len(joined) - len(joined) % max_seq_length
        rows += [joined[at:at + max_seq_length] for at in range(0, whole, max_seq_length)]
        joined = [] if number % TEXTS_A_MAP == 0 else joined[whole:]
        if len(rows) >= num_rows:
            break
    return rows[:num_rows] or [joined]


def line_rows(store: TokenStore, max_seq_length: int, num_rows: int, seed: int) -> list[list[int]]:
    """Return ids of rows as `run_mlm.py --line_by_line` makes them: one truncated text each."""
    texts = itertools.islice(draw_texts(store, seed), num_rows)
    return [_wrap(store, text[:max_seq_length - 2]) for text in texts]


def make_batches(
    store: TokenStore, rows: list[list[int]], *, micro_batch_size: int, accumulation_steps: int,
    mlm_probability: float, seed: int, corruption: Corruption = STANDARD, pin_memory: bool = False,
) -> Iterator[list[Batch]]:
    """Yield the micro batches of each step, made in the training process as by `Trainer`; endless.

    Args:
        rows: ids of each, from `grouped_rows` or `line_rows`.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling

    rows = rows * -(-micro_batch_size // len(rows))  # at least one micro batch
    masked, drawn, _ = corruption.shares()
    tokenizer = AutoTokenizer.from_pretrained(store.tokenizer_dir)
    special = set(store.all_special_ids)
    dataset = Dataset.from_dict({
        "input_ids": rows,
        "attention_mask": [[1] * len(row) for row in rows],
        "special_tokens_mask": [[int(token in special) for token in row] for row in rows],
    })
    loader: Any = torch.utils.data.DataLoader(
        dataset, batch_size=micro_batch_size, shuffle=True, pin_memory=pin_memory,  # type: ignore
        collate_fn=DataCollatorForLanguageModeling(
            tokenizer=tokenizer, mlm_probability=mlm_probability, mask_replace_prob=masked,
            random_replace_prob=drawn,
        ),
        generator=torch.Generator().manual_seed(seed), drop_last=True,
    )
    endless = itertools.chain.from_iterable(itertools.repeat(loader))
    while True:
        yield [{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
               for batch in itertools.islice(endless, accumulation_steps)]


# --------------------------------------------------------------------------------------- loss


def encode(module: PackedMaskedLM, batch: Batch) -> torch.Tensor:
    """Return the output of the encoder, `(B * L, D)`."""
    return module.family.encoder(module.hf)(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).last_hidden_state.flatten(0, 1)


def head_loss(module: PackedMaskedLM, rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of encoded rows, `(R, D)`; labels of -100 do not count."""
    return functional.cross_entropy(reference.logits(rows, module.head()), labels)


def gather_loss(module: PackedMaskedLM, batch: Batch) -> torch.Tensor:
    """Return the loss of transformers, with logits of the masked slots only."""
    labels = batch["labels"].flatten()
    masked = labels != -100
    return head_loss(module, encode(module, batch)[masked], labels[masked])


LOSSES: dict[str, LossFunction] = {
    "transformers": lambda module, batch: module.hf(**batch).loss, "gather": gather_loss,
}


def head_parameters(module: PackedMaskedLM) -> list[torch.Tensor]:
    """Return the trainable weights of the MLM head, the shared embedding included."""
    return [tensor for tensor in module.head().tensors().values() if tensor.requires_grad]


# --------------------------------------------------------------------------------------- loop


@dataclass
class TrainerLoop:
    """The step of `Trainer` on one rank.

    Attributes:
        module: trained in fp32, or under autocast in 16 bit.
        resolved: gives learning rate, weight decay, clipping and precision.
        total_steps: when the learning rate reaches 0.
    """

    module: PackedMaskedLM
    resolved: ds.Resolved
    device: torch.device
    total_steps: int

    def __post_init__(self) -> None:
        from transformers import get_linear_schedule_with_warmup

        self.module.to(self.device).train()
        given = self.resolved.config["optimizer"]["params"]
        groups = ds.parameter_groups(self.module, given["weight_decay"])
        self.optimizer = torch.optim.AdamW(
            groups, lr=given["lr"], betas=(0.9, 0.999), eps=1e-8, fused=True
        )
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, 0, self.total_steps)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.resolved.precision == "fp16"
        )
        self.loss_sum = torch.zeros((), device=self.device)

    def autocast(self) -> torch.autocast:
        """Return the context of forward passes."""
        precision = self.resolved.precision
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=precision != "fp32")

    def on_device(self, batch: Batch) -> Batch:
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}

    def step(
        self, batch: list[Batch], loss_of: LossFunction, lap: Callable[[str], None] = no_laps
    ) -> None:
        """Take one optimizer step.

        Args:
            lap: called after each part: "forward", "backward", "optimizer".
        """
        for micro_batch in batch:
            with self.autocast():
                loss = loss_of(self.module, self.on_device(micro_batch))
            lap("forward")
            loss = loss / len(batch)
            self.scaler.scale(loss).backward()
            loss = loss.detach()
            # Trainer's `logging_nan_inf_filter`, on by default.
            if not (torch.isnan(loss) or torch.isinf(loss)):
                self.loss_sum += loss
            lap("backward")
        self.scaler.unscale_(self.optimizer)
        clip = self.resolved.config["gradient_clipping"]
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.module.zero_grad()
        lap("optimizer")

    def head_seconds(self, batch: list[Batch], loss_name: str) -> float:
        """Measure the MLM head and the loss alone, forward and backward, on a batch; seconds."""
        laps = Laps()
        for micro_batch in map(self.on_device, batch):
            labels = micro_batch["labels"].flatten()
            with torch.no_grad(), self.autocast():
                hidden = encode(self.module, micro_batch)
            hidden.requires_grad_()
            laps("encoder")
            kept = labels != -100 if loss_name == "gather" else slice(None)
            with self.autocast():
                loss = head_loss(self.module, hidden[kept], labels[kept])
            torch.autograd.grad(loss, [hidden, *head_parameters(self.module)])
            laps("head")
        return laps.seconds["head"]


# --------------------------------------------------------------------------------------- bare


class BareLoop:
    """Forward, backward and AdamW of prepared batches in plain PyTorch: the loop's lower bound.

    In 16 bit the optimizer works on fp32 masters, as DeepSpeed's does. The loss is read once per
    step, as in the loop, so that both synchronize a GPU equally often.
    """

    def __init__(
        self, module: PackedMaskedLM, resolved: ds.Resolved, device: torch.device
    ) -> None:
        given = resolved.config["optimizer"]["params"]
        groups = ds.parameter_groups(module, given["weight_decay"], module.head_prefixes)
        self.module, self.device = module.to(device).train(), device
        self._weights = [weight for group in groups for weight in group["params"]]
        self._masters: list[torch.Tensor] = []  # none in fp32
        if resolved.precision != "fp32":
            for group in groups:
                group["params"] = [w.detach().clone().requires_grad_() for w in group["params"]]
                self._masters += group["params"]
            self._gradients = [torch.zeros_like(master) for master in self._masters]
            for master, gradient in zip(self._masters, self._gradients, strict=True):
                master.grad = gradient
            module.to(DTYPES[resolved.precision])
        self._optimizer = torch.optim.AdamW(
            groups, lr=given["lr"], betas=tuple(given.get("betas", (0.9, 0.999))),
            eps=given.get("eps", 1e-8), fused=True,
        )

    def prepare(self, batch: StepBatch) -> tuple[list[dict[str, Any]], float]:
        """Return the inputs of a batch's micro batches on the device, and the scale of the loss."""
        inputs = [micro_batch.inputs(self.device) for micro_batch in batch.micro_batches]
        return inputs, ds.ranks().world_size / max(batch.step_masked_tokens, 1)

    def step(
        self, prepared: tuple[list[dict[str, Any]], float],
        lap: Callable[[str], None] = no_laps,
    ) -> None:
        """Take one step on a prepared batch."""
        micro_batches, scale = prepared
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for micro_batch in micro_batches:
            loss, _ = self.module(**micro_batch)
            lap("forward")
            (loss * scale).backward()
            loss_sum += loss.detach()
            lap("backward")
        loss_sum.item()
        with torch.no_grad():
            if self._masters:
                given: Any = [weight.grad for weight in self._weights]
                torch._foreach_copy_(self._gradients, given)
            self._optimizer.step()
            if self._masters:
                torch._foreach_copy_(self._weights, self._masters)
        self.module.zero_grad()
        lap("optimizer")

    def run_passes(
        self, passes: list[Callable[[], torch.Tensor]], lap: Callable[[str], None]
    ) -> None:
        """Run forward passes of `make_passes`, each with its backward pass, without a step."""
        with uncompiled():
            for forward in passes:
                loss = forward()
                lap("forward")
                loss.backward()
                lap("backward")
        self.module.zero_grad()

    def head_seconds(self, batch: StepBatch) -> float:
        """Measure `csrc.masked_lm_loss` alone, forward and backward, on a batch; seconds.

        Both, because some implementations form the gradients in the forward pass.
        """
        laps = Laps()
        learning = head_parameters(self.module)
        for micro_batch in batch.micro_batches:
            inputs = micro_batch.inputs(self.device)
            labels = inputs["masked_labels"]
            with torch.no_grad(), uncompiled():
                hidden, positions = self.module.encode_masked(**inputs)
            hidden.requires_grad_()
            laps("encoder")
            loss, _ = csrc.masked_lm_loss(
                hidden, positions, labels, self.module.head(), self.module.head_implementation)
            torch.autograd.grad(loss, [hidden, *learning], allow_unused=True)
            laps("head")
        return laps.seconds["head"]


# ------------------------------------------------------------------------------------- passes

PASSES = ("pass-transformers", "pass-gather", "pass-head", "pass-subset")


def make_passes(
    module: PackedMaskedLM, batch: PackedBatch, device: torch.device
) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the forward passes to one loss of a batch, by the names in `PASSES`.

    They show what the MLM head and the last-layer subset are worth, without optimizer, loader and
    DeepSpeed: logits of every slot; the head on masked rows in plain PyTorch; `csrc`'s head; that
    and the last encoder layer on masked rows. The first attends across documents: transformers has
    no packed attention.
    """
    inputs = batch.inputs(device)
    labels = torch.full_like(batch.input_ids, -100).flatten()
    labels[batch.masked_positions] = batch.masked_labels
    labels = labels.view_as(batch.input_ids).to(device)
    filled = (batch.document_ids >= 0).long().to(device)

    def packed(subset: bool, implementation: str | None) -> torch.Tensor:
        usual = module.last_layer_subset, module.head_implementation
        module.last_layer_subset, module.head_implementation = subset, implementation
        loss = module(**inputs)[0] / max(batch.num_masked, 1)
        module.last_layer_subset, module.head_implementation = usual
        return loss

    usual = module.head_implementation
    return dict(zip(PASSES, (
        lambda: module.hf(
            input_ids=inputs["input_ids"], attention_mask=filled, labels=labels).loss,
        lambda: packed(False, "reference"),
        lambda: packed(False, usual),
        lambda: packed(True, usual),
    ), strict=True))
