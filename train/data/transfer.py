"""Micro batches on their way to a GPU: fixed sizes, and one copy of the smallest dtypes.

A copy from pinned memory does not wait for the GPU, and each copy costs the host a launch. So all
tensors of a micro batch travel in one pinned buffer, in the smallest dtypes that hold them, and are
widened on the device.

Letters: `B` rows of a micro batch, `S` slots of a row, `M` masked positions, `C` of them with
padding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

PADDED_ROWS = 128  # the masked rows of a batch are padded to a multiple of this
PADDED_QUERIES = 8  # so that kernels see few different numbers of masked positions per row
ALIGNMENT = 16  # bytes; of each tensor in the buffer


def round_up(number: int, step: int) -> int:
    """Return the smallest multiple of `step` that is not below `number`."""
    return -(-number // step) * step


@dataclass(frozen=True)
class BatchSizes:
    """Sizes to which micro batches are padded; fixed for a run, its steps have the same shapes.

    Attributes:
        masked: masked positions of a micro batch, `C`.
        per_row: masked positions of one row.
    """

    masked: int
    per_row: int

    def holding(self, num_masked: int, most_masked: int) -> BatchSizes:
        """Return these sizes, larger where a micro batch with these counts does not fit."""
        return BatchSizes(
            # A batch without masks has padding, too, so that every rank runs the same modules.
            max(self.masked, round_up(max(1, num_masked), PADDED_ROWS)),
            max(self.per_row, round_up(most_masked, PADDED_QUERIES)),
        )


def fixed_sizes(num_masked: list[int], most_masked: list[int]) -> BatchSizes:
    """Return sizes for a run, given the counts of some of its micro batches, at least one."""
    return BatchSizes(
        round_up(max(1, int(1.02 * max(num_masked))), PADDED_ROWS),
        round_up(max(most_masked) + 4, PADDED_QUERIES),
    )


@dataclass(frozen=True)
class Transfer:
    """The tensors of a micro batch in one buffer.

    Attributes:
        buffer: `input_ids` and `position_ids`, `(B, S)` int16; `masked_positions`, `(C,)` int32,
            padded with -1; `masked_labels`, `(C,)` int16; each at a multiple of `ALIGNMENT`. int16
            holds uint16 numbers, of which torch knows little. uint8, pinned if so asked.
        shape: `(B, S)`.
        sizes: of the padding.
        num_labels: `M` rounded up to `PADDED_ROWS`: rows of which the head computes a loss.
    """

    buffer: torch.Tensor
    shape: tuple[int, int]
    sizes: BatchSizes
    num_labels: int

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """Copy the buffer to `device`; return what `PackedBatch.inputs` does."""
        ids, position_ids, positions, labels = _parts(
            self.buffer.to(device, non_blocking=True), self.shape, self.sizes.masked
        )
        position_ids, positions = _unsigned(position_ids), positions.long()
        return {
            "input_ids": _unsigned(ids),
            "position_ids": position_ids,
            # Every piece and every slot of padding begins at 0, so it has a number of its own.
            "document_ids": (position_ids == 0).cumsum(1),
            "masked_positions": positions,
            "masked_labels": torch.where(
                positions < 0, positions, _unsigned(labels)
            )[:self.num_labels],
            "most_masked": self.sizes.per_row,
        }


def _unsigned(ids: torch.Tensor) -> torch.Tensor:
    """Widen uint16 numbers that are held as int16, to int64."""
    return ids.long().bitwise_and_(0xFFFF)


def _parts(
    buffer: torch.Tensor, shape: tuple[int, int], num_masked: int
) -> list[torch.Tensor]:
    """Return the tensors in a buffer, in order, as views; a longer buffer than needed will do."""
    parts, start = [], 0
    for size, dtype in ((shape, torch.int16), (shape, torch.int16), ((num_masked,), torch.int32),
                        ((num_masked,), torch.int16)):
        end = start + math.prod(size) * dtype.itemsize
        parts.append(buffer[start:end].view(dtype).view(size))
        start = round_up(end, ALIGNMENT)
    return parts


def pack_transfer(batch: Any, sizes: BatchSizes, pin_memory: bool) -> Transfer:
    """Copy the tensors of a `PackedBatch` into a buffer.

    Args:
        sizes: of the padding; larger ones are taken where the batch does not fit.
        pin_memory: of the buffer; torch gives it to another batch once its copy has ended.
    """
    sizes = sizes.holding(batch.num_masked, batch.most_masked)
    shape = (len(batch.input_ids), batch.input_ids.shape[1])
    num_bytes = 2 * 2 * math.prod(shape) + (4 + 2) * sizes.masked + 3 * ALIGNMENT
    buffer = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pin_memory)
    ids, position_ids, positions, labels = _parts(buffer, shape, sizes.masked)
    ids.copy_(batch.input_ids)  # what is above 32,767 wraps around to negative numbers
    position_ids.copy_(batch.position_ids)
    positions[:batch.num_masked] = batch.masked_positions
    positions[batch.num_masked:] = -1
    labels[:batch.num_masked] = batch.masked_labels
    labels[batch.num_masked:] = 0
    return Transfer(buffer, shape, sizes, round_up(max(1, batch.num_masked), PADDED_ROWS))
