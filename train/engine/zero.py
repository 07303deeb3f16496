"""ZeRO 1 and 2 with one pass over the gradients and one wait of the host per optimizer step.

DeepSpeed walks over the parameters in Python: per parameter it looks for infinities, takes a norm
and, on one rank, copies the gradient twice through hooks of the backward pass. On a GPU these
thousands of small kernels take the host longer than the model takes the device. `bind` replaces
them on the instance `engine.optimizer`:

- `step`: one norm over all gradients says whether they overflow, too. It travels to the other
  ranks, and to the host, with the numbers of the step (the loss, requests to stop, ...), in one
  reduction. An Adam that takes a flag on the device (torch's fused one) starts before the host has
  read it, and returns at once where the step is to be skipped.
- on one rank also `reduce_gradients`, `overlapping_partition_gradients_reduce_epilogue` and the
  hooks: micro batches add up in `.grad`, and one copy fills the optimizer's fp32 gradients.

ZeRO 0 and 3 and offloaded optimizers keep DeepSpeed's own step. Unlike that one, a gradient is
divided by the loss scale that it was made with: DeepSpeed updates the scale first, so its gradients
are half too small in each step after which the scale grows.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from preprocess.errors import NonFiniteError
from preprocess.progress import say
from train.engine.group import ranks

# What is replaced, and how it is called; with another DeepSpeed its own loops stay.
SIGNATURES = {
    "step": "(self, closure=None)",
    "reduce_gradients": "(self, pipeline_parallel=False)",
    "overlapping_partition_gradients_reduce_epilogue": "(self)",
}

Value = float | torch.Tensor


def bind(engine: Any) -> OnePassStep | None:
    """Replace the loops of `engine.optimizer`; None where DeepSpeed's own ones stay."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    zero = engine.optimizer
    if type(zero) is not DeepSpeedZeroOptimizer or zero.cpu_offload:
        return None
    if zero.use_grad_accum_attribute or zero.gradient_accumulation_dtype != zero.dtype:
        return None  # gradients that add up in another precision than the model's
    found = {name: str(inspect.signature(getattr(DeepSpeedZeroOptimizer, name)))
             for name in SIGNATURES}
    if found != SIGNATURES:
        say("this DeepSpeed takes its steps in another way: its own loops over the parameters stay")
        return None
    return OnePassStep(engine)


class OnePassStep:
    """The step of a `DeepSpeedZeroOptimizer`.

    Attributes:
        sums: over the ranks, of the `values` given to `prepare` for the last step.
    """

    def __init__(self, engine: Any) -> None:
        self._zero = zero = engine.optimizer
        self._adam = zero.optimizer
        self._masters: list[torch.Tensor] = zero.single_partition_of_fp32_groups
        # The optimizer's gradients, `(partition,)` fp32 per parameter group, and their parts.
        self._flat: list[torch.Tensor] = []
        self._parts: list[list[torch.Tensor]] = []
        # Whether Adam takes the scale and the flag as tensors: torch's, with fused=True.
        self._skips_on_device = getattr(self._adam, "_step_supports_amp_scaling", False)
        self._number = 0
        self._values: Sequence[Value] = ()
        self.sums: list[float] = []
        zero.step, zero.one_pass = self._step, self
        if ranks().world_size == 1:
            for hook in zero._grad_acc_hooks:
                hook.remove()
            zero._grad_acc_hooks = []
            zero.reduce_gradients = zero.overlapping_partition_gradients_reduce_epilogue = (
                self._collect_alone)

    def prepare(self, number: int, values: Sequence[Value]) -> None:
        """Say what the next step takes along.

        Args:
            number: of the step, for the report of an error.
            values: numbers of this rank, `()` tensors or Python's, to be summed over the ranks; the
                first is the loss, and a step whose loss is not finite updates nothing.
        """
        self._number, self._values = number, values

    # ------------------------------------------------------------------ gradients into one place

    def _allocate(self, places: list[list[tuple[int, int]]]) -> None:
        """Make the fp32 gradients and their parts, each at an offset and of a size."""
        self._flat = [torch.zeros_like(master) for master in self._masters]
        self._parts = [
            [flat[offset:offset + size] for offset, size in group]
            for flat, group in zip(self._flat, places, strict=True)
        ]

    def _collect_alone(self, pipeline_parallel: bool = False) -> None:
        """Copy all gradients at once; an only rank holds every parameter."""
        zero = self._zero
        if not zero.is_gradient_accumulation_boundary():
            return
        groups = zero.round_robin_bit16_groups
        if not self._flat:
            self._allocate([
                [(offset, p.numel()) for p, offset in zip(group, offsets, strict=True)]
                for group, offsets in zip(groups, zero.round_robin_bit16_offsets, strict=True)
            ])
        targets, gradients = [], []
        for parts, group in zip(self._parts, groups, strict=True):
            for part, parameter in zip(parts, group, strict=True):
                if parameter.grad is None:
                    part.zero_()
                else:
                    targets.append(part)
                    gradients.append(parameter.grad.view(-1))
                    parameter.grad = None
        torch._foreach_copy_(targets, gradients)

    def _collect_averaged(self) -> None:
        """Copy what DeepSpeed has reduced: the gradients of this rank's partition."""
        groups = [[gradient.view(-1) for gradient in self._zero.averaged_gradients[i]]
                  for i in range(len(self._masters))]
        if not self._flat:
            sizes = [[gradient.numel() for gradient in group] for group in groups]
            self._allocate([list(zip([0, *accumulate(group)], group, strict=False))
                            for group in sizes])
        torch._foreach_copy_([part for parts in self._parts for part in parts],
                             [gradient for group in groups for gradient in group])
        for group in (self._zero.averaged_gradients, self._zero.all_grad_tensors):
            for key in group:
                group[key] = None

    # ---------------------------------------------------------------------------------- the step

    @torch.no_grad()
    def _step(self, closure: None = None) -> None:
        """Take the place of `DeepSpeedZeroOptimizer.step`."""
        zero, scale = self._zero, self._zero.loss_scale
        zero.micro_step_id = -1
        if ranks().world_size > 1:
            self._collect_averaged()
        square = _sum_of_squares(self._flat, self._parts)
        numbers = _sum_over_ranks([square, *self._values], square.device)
        for master, flat in zip(self._masters, self._flat, strict=True):
            master.grad = flat
        read = _Read(numbers)
        if self._skips_on_device:
            bad = ~torch.isfinite(numbers[:2]).all()  # of the norm and the loss
            self._adam.grad_scale = (scale * self._clip(numbers[0].sqrt() / scale)).float()
            self._adam.found_inf = bad.float()
            self._adam.step()
            self._adam.grad_scale = self._adam.found_inf = None
        squared, *self.sums = read.wait()
        applied = math.isfinite(squared) and math.isfinite(self.sums[0])
        if applied and not self._skips_on_device:
            factor = scale * float(self._clip(torch.tensor(math.sqrt(squared) / scale)))
            if factor != 1.0:
                torch._foreach_mul_(self._flat, 1.0 / factor)
            self._adam.step()
        for master in self._masters:
            master.grad = None
        if applied or self._skips_on_device:
            self._publish()
        zero.overflow = not applied
        zero._global_grad_norm = math.sqrt(squared) / scale if applied else math.inf
        check_loss(self.sums, self._number)
        zero._update_scale(zero.overflow)  # last: it raises where the scale is at its minimum

    def _clip(self, norm: torch.Tensor) -> torch.Tensor:
        """Return what a gradient of this norm, `()`, is divided by."""
        limit = self._zero.clip_grad
        return ((norm + 1e-6) / limit).clamp(min=1.0) if limit > 0 else torch.ones_like(norm)

    def _publish(self) -> None:
        """Copy the fp32 weights of this rank to the model's, and fetch those of other ranks."""
        from deepspeed.runtime.utils import all_gather_dp_groups

        zero = self._zero
        zero._lazy_init_hp_params_optimizer_state()
        partitions, rank = zero.parallel_partitioned_bit16_groups, ranks().rank
        torch._foreach_copy_([group[rank].detach() for group in partitions],
                             [master.detach() for master in self._masters])
        if ranks().world_size > 1:
            all_gather_dp_groups(
                groups_flat=zero.bit16_groups_flat, partitioned_param_groups=partitions,
                dp_process_group=zero.real_dp_process_group,
                start_alignment_factor=zero.nccl_start_alignment_factor,
                allgather_bucket_size=zero.allgather_bucket_size,
            )


def _sum_of_squares(flat: list[torch.Tensor], parts: list[list[torch.Tensor]]) -> torch.Tensor:
    """Return the sum of all squares, `()` fp64.

    Args:
        flat: fp32, each `(partition,)`, zero outside its parts.
    """
    if flat[0].device.type == "cpu":
        # There torch writes out all of an fp32 tensor in fp64 to take its norm in fp64.
        square = torch.stack([_square_in_blocks(group) for group in flat]).sum()
        if torch.isfinite(square):
            return square
    return _square_in_fp64(parts)


def _square_in_fp64(parts: list[list[torch.Tensor]]) -> torch.Tensor:
    """In fp64 throughout, as DeepSpeed: the squares of fp32 above 1.8e19 are infinite."""
    norms = torch._foreach_norm([part for group in parts for part in group], 2,
                                dtype=torch.float64)
    return torch.stack(norms).square().sum()


def _square_in_blocks(values: torch.Tensor, block: int = 4096) -> torch.Tensor:
    """In fp32 within blocks, which are too short to lose digits, and in fp64 over them."""
    whole = values.numel() // block * block
    norms = [torch.linalg.vector_norm(values[:whole].view(-1, block), dim=1),
             torch.linalg.vector_norm(values[whole:]).view(1)]
    return torch.cat(norms).double().square().sum()


def check_loss(sums: list[float], step: int) -> None:
    """Refuse a step whose first number, the loss, is not finite."""
    if not math.isfinite(sums[0]):
        raise NonFiniteError(
            f"the loss became {sums[0]} at step {step}; nothing was updated; lower "
            "--learning_rate, lengthen --warmup_ratio, or use bf16 or fp32"
        )


def _sum_over_ranks(values: list[Value], device: torch.device) -> torch.Tensor:
    """Sum numbers over all ranks, on the device, without waiting for it."""
    on_gpu = device.type == "cuda"
    given = [0.0 if isinstance(value, torch.Tensor) else float(value) for value in values]
    vector = torch.tensor(given, dtype=torch.float64, pin_memory=on_gpu).to(
        device, non_blocking=True)
    for place, value in zip(vector, values, strict=True):
        if isinstance(value, torch.Tensor):
            place.copy_(value)
    if ranks().world_size > 1:
        torch.distributed.all_reduce(vector)
    return vector


class _Read:
    """A copy to the host that is under way while the device goes on."""

    def __init__(self, vector: torch.Tensor) -> None:
        self._event = None
        self._host = vector
        if vector.device.type == "cuda":
            self._host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
            self._host.copy_(vector, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[float]:
        """Return the numbers; the one place where the host waits."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()
