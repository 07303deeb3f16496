"""What a training loop costs at least: the yardstick of the benchmark's row `bare`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import csrc
from train import data, model
from train import engine as ds
from train.bench import baselines
from train.bench import throughput as speed

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class BareLoop:
    """Forward, backward and AdamW of prepared batches, in plain PyTorch and nothing else.

    In 16 bit the optimizer works on fp32 masters, as DeepSpeed's does. The loss is read once a
    step, as in the loop, so that a GPU's clock means the same in both.
    """

    def __init__(
        self, module: model.PackedMaskedLM, resolved: ds.Resolved, device: torch.device
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
            module.to(DTYPES[resolved.precision])
        self._optimizer = torch.optim.AdamW(
            groups, lr=given["lr"], betas=tuple(given.get("betas", (0.9, 0.999))),
            eps=given.get("eps", 1e-8), fused=True,
        )

    def prepare(self, batch: data.StepBatch) -> tuple[list[dict[str, Any]], float]:
        """The inputs of a batch's micro batches on the device, and what to scale the loss by."""
        inputs = [micro_batch.inputs(self.device) for micro_batch in batch.micro_batches]
        return inputs, ds.ranks().world_size / max(batch.step_masked_tokens, 1)

    def step(
        self, prepared: tuple[list[dict[str, Any]], float],
        lap: Callable[[str], None] = speed.no_laps,
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
        if self._masters:
            for master, weight in zip(self._masters, self._weights, strict=True):
                master.grad = weight.grad.float()
        self._optimizer.step()
        if self._masters:
            with torch.no_grad():
                torch._foreach_copy_(self._weights, self._masters)
        self._optimizer.zero_grad()
        self.module.zero_grad()
        lap("optimizer")

    def head_seconds(self, batch: data.StepBatch) -> float:
        """Seconds of `csrc.masked_lm_loss` alone, forward and backward, on a batch.

        Both, because some implementations form the gradients in the forward pass.
        """
        laps = speed.Laps()
        learning = baselines.head_parameters(self.module)
        for micro_batch in batch.micro_batches:
            inputs = micro_batch.inputs(self.device)
            labels = inputs.pop("masked_labels")
            with torch.no_grad():
                hidden, positions = self.module.encode_masked(**inputs)
            hidden.requires_grad_()
            laps("encoder")
            loss, _ = csrc.masked_lm_loss(
                hidden, positions, labels, self.module.head(), self.module.head_implementation)
            torch.autograd.grad(loss, [hidden, *learning], allow_unused=True)
            laps("head")
        return laps.seconds["head"]
