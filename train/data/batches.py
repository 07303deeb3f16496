"""Packed batches from a token store and its masks: order, sharding over ranks, masks, layout.

An epoch is a permutation of the rows of `train/data/rows.py`, and the global batch b of a run is
the same set of rows with the same masks at any number of ranks. Each rank computes only its own
rows. The counts of the global batch are summed over the ranks once per step: the number of masked
tokens must be known before the first micro batch.

Letters: `P` pieces, `B` rows of a micro batch, `S` slots of a row, `M` masked positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from preprocess import masking as masks
from preprocess.errors import ConfigError, DataError
from preprocess.store import TokenStore, ranges
from preprocess.text.continuations import find_continuations
from train.data.masking import Masking
from train.data.order import permute
from train.data.rows import RowTable
from train.data.transfer import (
    PADDED_QUERIES,
    BatchSizes,
    Transfer,
    fixed_sizes,
    pack_transfer,
    round_up,
)

EVAL_SEED = 20201116  # masks of the held-out rows: the same for every run and every arm
EVAL_RATE = 0.15
ORDER_VERSION = 2  # of rows and their order: a run is not resumed under another one
SAMPLED_BATCHES = 64  # of a run, to fix its sizes


@dataclass(frozen=True)
class PackedBatch:
    """One micro batch of one rank.

    Attributes:
        input_ids: corrupted ids, padded, `(B, S)` int64.
        position_ids: position in the piece, from 0, `(B, S)` int64.
        document_ids: piece of each slot, -1 at padding, `(B, S)` int64.
        masked_positions: flat slots, ascending, `(M,)` int64.
        masked_labels: original ids there, `(M,)` int64.
        most_masked: masked positions of the fullest row.
        num_tokens: filled slots, special tokens included.
        transfer: the tensors again, packed for a GPU; None where nobody asked for it.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    document_ids: torch.Tensor
    masked_positions: torch.Tensor
    masked_labels: torch.Tensor
    most_masked: int
    num_tokens: int
    transfer: Transfer | None = None

    @property
    def num_masked(self) -> int:
        return len(self.masked_positions)

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """Return the arguments of `PackedMaskedLM.forward`, tensors on `device`.

        On a CPU they are the tensors of the batch, unless it was packed. Otherwise the masked
        positions are padded with -1 to the sizes of the transfer, and the labels to the next
        multiple of `PADDED_ROWS`; `document_ids` tell the pieces of a row apart, and number each
        padding slot, too. A batch without masks has padding, so that every rank runs the same
        modules.
        """
        if self.transfer is not None:
            return self.transfer.inputs(device)
        if device.type != "cpu":
            pinned = device.type == "cuda"
            return pack_transfer(self, BatchSizes(0, 0), pinned).inputs(device)
        padding = torch.full((int(not self.num_masked),), -1)
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "document_ids": self.document_ids,
            "masked_positions": torch.cat([self.masked_positions, padding]),
            "masked_labels": torch.cat([self.masked_labels, padding]),
            "most_masked": round_up(self.most_masked, PADDED_QUERIES),
        }


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step of one rank: its micro batches, and counts over the global batch.

    Attributes:
        rows: this rank's rows in order, `(micro batches x B,)` int64.
        epoch: of the first row of the global batch.
        step_rows, step_pieces, step_tokens, step_masked_tokens: counts over all ranks from
            `PackedData.steps`, of this rank from `PackedData.step`; tokens include special ones.
        following: counts of the step after this one.
    """

    micro_batches: list[PackedBatch]
    rows: np.ndarray
    epoch: int
    step_rows: int
    step_pieces: int
    step_tokens: int
    step_masked_tokens: int
    following: Following = field(default_factory=lambda: Following())

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """The four counts, in the order of their names above."""
        return self.step_rows, self.step_pieces, self.step_tokens, self.step_masked_tokens


@dataclass
class Following:
    """The counts of the next step, which travel to the other ranks with the numbers of this one.

    They must be known before the first micro batch of that step; a reduction of their own would
    make the host wait for the device once more.

    Attributes:
        batch: of this rank, being prepared; None after the last step.
        total: sums of `mine` over all ranks, set by whoever has summed them.
    """

    batch: Future[StepBatch] | None = None
    total: list[float] | None = None

    def mine(self) -> tuple[int, int, int, int]:
        """Return the counts of this rank's share; waits until the batch is prepared."""
        return self.batch.result().counts if self.batch else (0, 0, 0, 0)


# ------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class _Pieces:
    """The pieces of some rows and their masked tokens, flat.

    Attributes:
        row: row of each piece in the batch, `(P,)`.
        slot: slot of its [CLS] in that row, `(P,)`.
        start, length: its tokens in the store, `(P,)`.
        tokens: ids of all pieces, one after the other, uint16.
        masked: masked tokens as positions in the store, ascending within a piece, `(M,)`.
        masked_counts: number of masked tokens of each piece, `(P,)`.
    """

    row: np.ndarray
    slot: np.ndarray
    start: np.ndarray
    length: np.ndarray
    tokens: np.ndarray
    masked: np.ndarray
    masked_counts: np.ndarray


class PackedData:
    """Packed batches of a store under one masking.

    Args:
        store, table, masking: the tokens, the rows, the masked positions.
        seed: of order, masks and corruption.
        corruption: what the masked tokens become.
        micro_batch_size, accumulation_steps, world_size, rank: the batch arithmetic.
    Raises:
        ConfigError: a size below 1. DataError: the store's tokenizer lacks a special token.
    """

    def __init__(
        self, store: TokenStore, table: RowTable, masking: Masking, *, seed: int,
        micro_batch_size: int, accumulation_steps: int = 1, world_size: int = 1, rank: int = 0,
        corruption: masks.Corruption = masks.STANDARD,
    ) -> None:
        sizes = {"micro_batch_size": micro_batch_size, "accumulation_steps": accumulation_steps,
                 "world_size": world_size}
        for name, size in sizes.items():
            if size < 1:
                raise ConfigError(f"{name} {size}: must be 1 or more")
        missing = [name for name in ("cls", "sep", "pad", "mask") if name not in store.special_ids]
        if missing:
            raise DataError(f"{store.tokenizer_dir}: the tokenizer has no {missing[0]} token")
        self.store, self.table, self.masking, self.seed = store, table, masking, seed
        self.micro_batch_size, self.accumulation_steps = micro_batch_size, accumulation_steps
        self.world_size, self.rank, self.corruption = world_size, rank, corruption
        self.global_batch = micro_batch_size * accumulation_steps * world_size
        self._sizes: BatchSizes | None = None
        self._device = torch.device("cpu")
        self._shard_starts = np.array([shard.token_start for shard in store.shards])
        # As plain arrays: numpy's class for mapped files makes each slice several times slower.
        self._indices = [[np.asarray(part) for part in index] for index in masking.indices]

    def _index_bounds(
        self, indices: list[np.ndarray], starts: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Find where each piece begins and ends in its shard's mask index, and the shard."""
        shard_of = np.searchsorted(self._shard_starts, starts, side="right") - 1
        bounds = np.stack([starts, starts + lengths]) - self._shard_starts[shard_of]
        order = np.argsort(shard_of, kind="stable")
        shards, firsts = np.unique(shard_of[order], return_index=True)
        for s, mine in zip(shards, np.split(order, firsts)[1:], strict=True):
            bounds[:, mine] = masks.index_bounds(indices[s], bounds[:, mine])
        return bounds[0], bounds[1], shard_of

    def _pieces(self, rows: np.ndarray, epoch: int, rate: float) -> _Pieces:
        """Read the pieces of `rows` (-1: an empty row) and choose their masks in `epoch`.

        Args:
            rate: mask rate, where masks are drawn.
        """
        table = self.table
        real = np.maximum(rows, 0)
        first = np.asarray(table.row_offsets[real])
        counts = np.where(rows >= 0, table.row_offsets[real + 1] - first, 0)
        pieces = ranges(first, counts)
        row = np.repeat(np.arange(len(rows)), counts)
        start = np.asarray(table.piece_starts[pieces])
        length = table.piece_lengths[pieces].astype(np.int64)
        # slot of a piece = slots of the pieces before it in its row
        # lengths 3 5 | 4 (two rows) -> taken 5 7 6, before 0 5 12, row starts 0 12 -> 0 5 0
        before = np.cumsum(length + 2) - (length + 2)
        first_of_row = np.cumsum(counts) - counts
        slot = before - np.repeat(before[first_of_row[counts > 0]], counts[counts > 0])
        tokens = self.store.read_pieces(start, length)
        masked, masked_counts = self._choose(row, start, length, tokens, epoch, rate)
        return _Pieces(row, slot, start, length, tokens, masked, masked_counts)

    def _choose(
        self, row: np.ndarray, start: np.ndarray, length: np.ndarray, tokens: np.ndarray,
        epoch: int, rate: float,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Choose the masked tokens of pieces; returns positions in the store, and their counts."""
        if self._indices:
            index = self._indices[epoch % len(self._indices)]
            low, high, shard_of = self._index_bounds(index, start, length)
            spans = zip(shard_of.tolist(), low.tolist(), high.tolist(), strict=True)
            parts = [index[s][a:b] for s, a, b in spans]
            flat = np.concatenate(parts) if parts else np.zeros(0)
            counts = high - low
            return flat.astype(np.int64) + np.repeat(self._shard_starts[shard_of], counts), counts
        positions = ranges(start, length)
        offsets = np.concatenate([[0], np.cumsum(length)])
        words = self.masking.words
        chosen = masks.STRATEGIES[self.masking.name].choose(
            masks.Sequences(
                offsets=offsets,
                positions=positions,
                candidates=masks.find_candidates(tokens, self.store.all_special_ids),
                rate=rate,
                seed=self.seed,
                epoch=epoch,
                windows=row,
                continues_word=(
                    None if words is None else find_continuations(tokens, offsets, words)
                ),
            )
        )
        counts = np.diff(np.searchsorted(chosen, offsets))
        return positions[chosen], counts

    def _assemble(self, pieces: _Pieces, rows: slice, epoch: int) -> PackedBatch:
        """Lay out the rows `rows` of `pieces` as a micro batch."""
        slots, special = self.table.max_seq_length, self.store.special_ids
        num_rows = rows.stop - rows.start
        shape = (num_rows, slots)
        mine = slice(*np.searchsorted(pieces.row, [rows.start, rows.stop]))
        row, length = pieces.row[mine] - rows.start, pieces.length[mine]
        cls = row * slots + pieces.slot[mine]  # flat slot of each piece's [CLS]
        filled = ranges(cls, length + 2)
        input_ids = np.full(num_rows * slots, special["pad"], dtype=np.int64)
        position_ids = np.zeros(num_rows * slots, dtype=np.int64)
        document_ids = np.full(num_rows * slots, -1, dtype=np.int64)
        before = pieces.length[:mine.start].sum()
        input_ids[ranges(cls + 1, length)] = pieces.tokens[before:before + length.sum()]
        input_ids[cls], input_ids[cls + length + 1] = special["cls"], special["sep"]
        position_ids[filled] = filled - np.repeat(cls, length + 2)
        document_ids[filled] = np.repeat(np.arange(len(length)), length + 2)

        counts = pieces.masked_counts[mine]
        before = pieces.masked_counts[:mine.start].sum()
        masked = pieces.masked[before:before + counts.sum()]
        positions = masked + np.repeat(cls + 1 - pieces.start[mine], counts)
        labels = input_ids[positions]
        input_ids[positions] = masks.corrupt(
            labels, masked, seed=self.seed, epoch=epoch, mask_id=special["mask"],
            vocab_size=self.store.vocab_size, all_special_ids=self.store.all_special_ids,
            corruption=self.corruption,
        )
        return PackedBatch(
            input_ids=torch.from_numpy(input_ids.reshape(shape)),
            position_ids=torch.from_numpy(position_ids.reshape(shape)),
            document_ids=torch.from_numpy(document_ids.reshape(shape)),
            masked_positions=torch.from_numpy(positions),
            masked_labels=torch.from_numpy(labels),
            most_masked=int(np.bincount(positions // slots, minlength=1).max()),
            num_tokens=len(filled),
        )

    def measure_sizes(self, num_steps: int) -> BatchSizes:
        """Find the sizes that hold nearly all micro batches of the steps of a run.

        Some of its micro batches are drawn, evenly spaced over the whole run: the same ones
        wherever it resumes, and at any number of ranks and micro batches of this size. Under a
        schedule all are drawn at its largest rate: few of a run's batches are near it.
        """
        count = num_steps * self.accumulation_steps * self.world_size
        alone = PackedData(self.store, self.table, replace(self.masking, schedule=None),
                           seed=self.seed, micro_batch_size=self.micro_batch_size)
        numbers = sorted({n * count // SAMPLED_BATCHES for n in range(SAMPLED_BATCHES)})
        drawn = [alone.step(number).micro_batches[0] for number in numbers]
        return fixed_sizes([batch.num_masked for batch in drawn],
                           [batch.most_masked for batch in drawn])

    def pack_for(self, device: torch.device, sizes: BatchSizes) -> None:
        """Let the batches of `step` and `steps` be packed for `device`, padded to `sizes`."""
        self._device, self._sizes = device, sizes

    def _enter_thread(self) -> None:
        """Let a thread that prepares batches pin memory by its own GPU, not by the first one."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def _order(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Return the rows at some places of an epoch: a function of seed, epoch and store."""
        return permute(places, self.table.num_rows, self.seed, epoch, self.store.fingerprint)

    def step(self, step: int) -> StepBatch:
        """Make this rank's micro batches of optimizer step `step`, counted from 0.

        Rows come from an endless sequence of epochs, so a batch may hold the end of one epoch and
        the beginning of the next; nothing is dropped. Micro batch m of rank r holds rows
        `(m * world_size + r) * micro_batch_size ...` of the global batch. All of them have the mask
        rate of the step.
        """
        rate = self.masking.rate_at(step)
        size, first = self.micro_batch_size, step * self.global_batch
        turns = np.arange(self.accumulation_steps) * self.world_size + self.rank
        numbers = (first + turns[:, None] * size + np.arange(size)).ravel()
        epochs, places = numbers // self.table.num_rows, numbers % self.table.num_rows
        rows = np.empty_like(numbers)
        # Epochs differ in their masks, so pieces are drawn for one epoch at a time; a micro
        # batch that straddles two is joined from both.
        drawn = []
        for epoch in np.unique(epochs).tolist():
            low, high = np.searchsorted(epochs, [epoch, epoch + 1]).tolist()
            rows[low:high] = self._order(epoch, places[low:high])
            drawn.append((epoch, low, high, self._pieces(rows[low:high], epoch, rate)))
        micro_batches = []
        for start in range(0, len(numbers), size):
            layout = []
            for epoch, low, high, pieces in drawn:
                here = slice(max(start, low) - low, min(start + size, high) - low)
                if here.stop > here.start:
                    layout.append(self._assemble(pieces, here, epoch))
            batch = layout[0] if len(layout) == 1 else _join(layout)
            if self._sizes is not None:
                pinned = self._device.type == "cuda"
                batch = replace(batch, transfer=pack_transfer(batch, self._sizes, pinned))
            micro_batches.append(batch)
        return StepBatch(
            micro_batches, rows, epoch=first // self.table.num_rows, step_rows=len(rows),
            step_pieces=sum(len(pieces.row) for *_, pieces in drawn),
            step_tokens=sum(batch.num_tokens for batch in micro_batches),
            step_masked_tokens=sum(batch.num_masked for batch in micro_batches),
        )

    def steps(
        self, first: int, end: int, sum_over_ranks: Callable[..., list[float]] | None = None
    ) -> Iterator[StepBatch]:
        """Yield steps `first` to `end - 1`, each prepared while the one before it is used.

        Args:
            sum_over_ranks: sums each of its numbers over all ranks; collective, called when a
                step is asked for whose `following` of the step before was not summed. Without it,
                counts are those of this rank.
        """
        if first >= end:
            return
        with ThreadPoolExecutor(1, initializer=self._enter_thread) as pool:
            coming = pool.submit(self.step, first)
            total: list[float] | None = None
            for step in range(first, end):
                batch = coming.result()
                following = Following()
                if step + 1 < end:
                    following.batch = coming = pool.submit(self.step, step + 1)
                if sum_over_ranks is not None:
                    rows, pieces, tokens, masked = map(int, total or sum_over_ranks(*batch.counts))
                    batch = replace(
                        batch, step_rows=rows, step_pieces=pieces, step_tokens=tokens,
                        step_masked_tokens=masked,
                    )
                yield replace(batch, following=following)
                total = following.total

    def in_order(self, max_rows: int) -> Iterator[PackedBatch]:
        """Yield the first rows of the table once, with the masks of epoch 0, for evaluation.

        Every rank yields the same number of micro batches, as ZeRO-3 requires; the last ones are
        filled up with empty rows.
        """
        num_rows = min(max_rows, self.table.num_rows)
        stride = self.micro_batch_size * self.world_size
        for first in range(0, num_rows, stride):
            rows = first + self.rank * self.micro_batch_size + np.arange(self.micro_batch_size)
            rows = np.where(rows < num_rows, rows, -1)
            pieces = self._pieces(rows, epoch=0, rate=self.masking.rate)
            yield self._assemble(pieces, slice(0, self.micro_batch_size), epoch=0)


def _join(parts: list[PackedBatch]) -> PackedBatch:
    """Join parts with consecutive rows to one micro batch."""
    starts = np.cumsum([0, *(part.input_ids.numel() for part in parts)]).tolist()

    def joined(name: str) -> torch.Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    return PackedBatch(
        joined("input_ids"), joined("position_ids"), joined("document_ids"),
        masked_positions=torch.cat(
            [part.masked_positions + start for part, start in zip(parts, starts, strict=False)]
        ),
        masked_labels=joined("masked_labels"),
        most_masked=max(part.most_masked for part in parts),
        num_tokens=sum(part.num_tokens for part in parts),
    )
