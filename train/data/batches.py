"""A token store and masks become packed batches: order, sharding over ranks, masks, layout.

An epoch is a permutation of the rows of `train/rows.py`, and the global batch b of a run is the
same set of rows with the same masks at any number of ranks. A rank works out its own rows alone;
the counts of the global batch, of which the number of masked tokens must be known before the first
micro batch, are summed over the ranks once a step.

Letters: `P` pieces, `B` rows of a micro batch, `S` slots of a row, `M` masked positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from preprocess import masking as masks
from preprocess.errors import DataError
from preprocess.store import TokenStore, ranges, recall, remember
from preprocess.text.continuations import find_continuations
from train.data.masking import Masking
from train.data.order import permute
from train.data.rows import RowTable

LONGEST_WORD = 16  # tokens; only sizes the arrays of `whole_word`, which may grow
EVAL_SEED = 20201116  # masks of the held-out rows: the same for every run and every arm
EVAL_RATE = 0.15
ORDER_VERSION = 2  # of rows and their order: a run does not go on under another one
_BLOCK_ROWS = 1 << 16
_MOST_BLOCKS = 16  # that are looked at for the capacity: about a million rows


@dataclass(frozen=True)
class PackedBatch:
    """One micro batch of one rank.

    Attributes:
        input_ids: corrupted ids, padded, `(B, S)` int64.
        position_ids: position in the piece, from 0, `(B, S)` int64.
        document_ids: piece of each slot, -1 at padding, `(B, S)` int64.
        masked_positions: flat slots, ascending, padded with -1 to the capacity, `(M,)` int64.
        masked_labels: original ids there, `(M,)` int64, 0 at padding.
        masked_cu_seqlens: masked positions before each row, and the end, `(B+1,)` int32.
        num_tokens: filled slots, special tokens included.
        num_masked: masked positions without padding.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    document_ids: torch.Tensor
    masked_positions: torch.Tensor
    masked_labels: torch.Tensor
    masked_cu_seqlens: torch.Tensor
    num_tokens: int
    num_masked: int

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """What `PackedMaskedLM.forward` takes, tensors on `device`."""
        names = ("input_ids", "position_ids", "document_ids", "masked_positions", "masked_labels")
        tensors = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        # In eights, so that kernels see few different shapes.
        most = 8 * math.ceil(int(self.masked_cu_seqlens.diff().max()) / 8)
        return {**tensors, "most_masked": most}


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step of one rank: its micro batches, and counts over the global batch.

    Attributes:
        rows: this rank's rows in order, `(micro batches x B,)` int64.
        epoch: of the first row of the global batch.
        step_rows, step_pieces, step_tokens, step_masked_tokens: of all ranks as `PackedData.steps`
            gives them, of this rank as `PackedData.step` does. Tokens count special ones too.
    """

    micro_batches: list[PackedBatch]
    rows: np.ndarray
    epoch: int
    step_rows: int
    step_pieces: int
    step_tokens: int
    step_masked_tokens: int


# ------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class _Pieces:
    """The pieces of some rows and their masked tokens, flat.

    row: row of each piece in the batch, `(p,)`; slot: its [CLS] in that row, `(p,)`; start,
    length: its tokens, `(p,)`; tokens: their ids, one piece after the other, uint16. masked: masked
    tokens in the whole store, ascending within a piece, `(m,)`; masked_counts: how many of them
    each piece has, `(p,)`.
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
        store, table, masking: what to read, which rows, which positions.
        seed: of order, masks and corruption.
        micro_batch_size, accumulation_steps, world_size, rank: the batch arithmetic.
    """

    def __init__(
        self, store: TokenStore, table: RowTable, masking: Masking, *, seed: int,
        micro_batch_size: int, accumulation_steps: int = 1, world_size: int = 1, rank: int = 0,
    ) -> None:
        missing = [name for name in ("cls", "sep", "pad", "mask") if name not in store.special_ids]
        if missing:
            raise DataError(f"{store.tokenizer_dir}: the tokenizer has no {missing[0]} token")
        self.store, self.table, self.masking, self.seed = store, table, masking, seed
        self.micro_batch_size, self.accumulation_steps = micro_batch_size, accumulation_steps
        self.world_size, self.rank = world_size, rank
        self.global_batch = micro_batch_size * accumulation_steps * world_size
        self._shard_starts = np.array([shard.token_start for shard in store.shards])
        # As plain arrays: numpy's class for mapped files makes each slice several times slower.
        self._index = masking.index and [np.asarray(positions) for positions in masking.index]
        self.capacity = max(1, micro_batch_size * self._largest_row())

    def _largest_row(self) -> int:
        """The most masked positions that a row may have, over rows from all parts of the table.

        One beyond them is no harm: its batch has larger arrays.
        """
        key = (
            f"largest row, {self.table.fingerprint}, {self.masking.name}, {self.masking.rate}, "
            f"{self.masking.fingerprint}"
        )
        kept = bool(self.table.fingerprint) and (
            self._index is None or self.masking.fingerprint is not None
        )
        largest = recall(self.store.prefix, key) if kept else None
        if type(largest) is not int:
            firsts = range(0, self.table.num_rows, _BLOCK_ROWS)
            firsts = firsts[::max(1, -(-len(firsts) // _MOST_BLOCKS))]
            largest = max((self._largest_of(first) for first in firsts), default=0)
            if kept:
                remember(self.store.prefix, key, largest)
        return largest

    def _largest_of(self, first: int) -> int:
        """The same for the rows of one block."""
        offsets = np.array(self.table.row_offsets[first:first + _BLOCK_ROWS + 1])
        lengths = self.table.piece_lengths[offsets[0]:offsets[-1]]
        if self._index is not None:
            starts = self.table.piece_starts[offsets[0]:offsets[-1]]
            low, high, _ = self._index_bounds(starts, lengths)
            per_piece = high - low
        else:
            per_piece = np.ceil(self.masking.rate * lengths).astype(np.int64)
            if self.masking.words is not None:
                per_piece = np.minimum(per_piece + LONGEST_WORD, lengths)
        return int(np.add.reduceat(per_piece, offsets[:-1] - offsets[0]).max())

    def _index_bounds(
        self, starts: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where each piece's positions begin and end in its shard's mask index, and the shard."""
        assert self._index is not None
        shard_of = np.searchsorted(self._shard_starts, starts, side="right") - 1
        bounds = np.stack([starts, starts + lengths]) - self._shard_starts[shard_of]
        order = np.argsort(shard_of, kind="stable")
        shards, firsts = np.unique(shard_of[order], return_index=True)
        for s, mine in zip(shards, np.split(order, firsts)[1:], strict=True):
            index = self._index[s]
            # Keys of another dtype would make searchsorted copy the whole index.
            bounds[:, mine] = np.searchsorted(index, bounds[:, mine].astype(index.dtype))
        return bounds[0], bounds[1], shard_of

    def _pieces(self, rows: np.ndarray, epoch: int) -> _Pieces:
        """Pieces of `rows` (-1: an empty row) and their masks in `epoch`."""
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
        masked, masked_counts = self._choose(start, length, tokens, epoch)
        return _Pieces(row, slot, start, length, tokens, masked, masked_counts)

    def _choose(
        self, start: np.ndarray, length: np.ndarray, tokens: np.ndarray, epoch: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Masked tokens (in the whole store) of pieces, and how many each piece has."""
        if self._index is not None:
            low, high, shard_of = self._index_bounds(start, length)
            spans = zip(shard_of.tolist(), low.tolist(), high.tolist(), strict=True)
            parts = [self._index[s][a:b] for s, a, b in spans]
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
                rate=self.masking.rate,
                seed=self.seed,
                epoch=epoch,
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
        )
        # A row that the capacity was not worked out from may outgrow it, and so may `whole_word`
        # by a word of more than LONGEST_WORD tokens.
        capacity = self.capacity * max(1, -(-len(positions) // self.capacity))
        padding = (0, capacity - len(positions))
        return PackedBatch(
            input_ids=torch.from_numpy(input_ids.reshape(shape)),
            position_ids=torch.from_numpy(position_ids.reshape(shape)),
            document_ids=torch.from_numpy(document_ids.reshape(shape)),
            masked_positions=torch.from_numpy(np.pad(positions, padding, constant_values=-1)),
            masked_labels=torch.from_numpy(np.pad(labels, padding)),
            masked_cu_seqlens=torch.from_numpy(
                np.searchsorted(positions, np.arange(num_rows + 1) * slots).astype(np.int32)
            ),
            num_tokens=len(filled),
            num_masked=len(positions),
        )

    def _order(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """The rows at some places of an epoch: a function of seed, epoch and store."""
        return permute(places, self.table.num_rows, self.seed, epoch, self.store.fingerprint)

    def step(self, step: int) -> StepBatch:
        """This rank's micro batches of optimizer step `step`, counted from 0.

        Rows come from the endless sequence of epochs, so a batch may hold the end of one epoch
        and the beginning of the next; nothing is dropped. Micro batch m of rank r holds rows
        `(m * world_size + r) * micro_batch_size ...` of the global batch.
        """
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
            drawn.append((epoch, low, high, self._pieces(rows[low:high], epoch)))
        micro_batches = []
        for start in range(0, len(numbers), size):
            layout = []
            for epoch, low, high, pieces in drawn:
                here = slice(max(start, low) - low, min(start + size, high) - low)
                if here.stop > here.start:
                    layout.append(self._assemble(pieces, here, epoch))
            micro_batches.append(layout[0] if len(layout) == 1 else _join(layout))
        return StepBatch(
            micro_batches, rows, epoch=first // self.table.num_rows, step_rows=len(rows),
            step_pieces=sum(len(pieces.row) for *_, pieces in drawn),
            step_tokens=sum(batch.num_tokens for batch in micro_batches),
            step_masked_tokens=sum(batch.num_masked for batch in micro_batches),
        )

    def steps(
        self, first: int, end: int, sum_over_ranks: Callable[..., list[float]] | None = None
    ) -> Iterator[StepBatch]:
        """Steps `first` to `end - 1`, the next one made while the last is used.

        Args:
            sum_over_ranks: sums each of its numbers over all ranks; collective, and called when a
                step is asked for. Without one, counts are those of this rank.
        """
        if first >= end:
            return
        with ThreadPoolExecutor(1) as pool:
            following = pool.submit(self.step, first)
            for step in range(first, end):
                batch = following.result()
                if step + 1 < end:
                    following = pool.submit(self.step, step + 1)
                if sum_over_ranks is not None:
                    rows, pieces, tokens, masked = map(int, sum_over_ranks(
                        batch.step_rows, batch.step_pieces, batch.step_tokens,
                        batch.step_masked_tokens,
                    ))
                    batch = replace(
                        batch, step_rows=rows, step_pieces=pieces, step_tokens=tokens,
                        step_masked_tokens=masked,
                    )
                yield batch

    def in_order(self, max_rows: int) -> Iterator[PackedBatch]:
        """The first rows of the table once, with the masks of epoch 0, for evaluation.

        Every rank yields equally many micro batches (ZeRO-3 needs that); rows that are missing
        at the end are empty.
        """
        num_rows = min(max_rows, self.table.num_rows)
        stride = self.micro_batch_size * self.world_size
        for first in range(0, num_rows, stride):
            rows = first + self.rank * self.micro_batch_size + np.arange(self.micro_batch_size)
            pieces = self._pieces(np.where(rows < num_rows, rows, -1), epoch=0)
            yield self._assemble(pieces, slice(0, self.micro_batch_size), epoch=0)


def _join(parts: list[PackedBatch]) -> PackedBatch:
    """One micro batch from parts with consecutive rows."""
    slots = parts[0].input_ids.shape[1]
    positions, labels, counts, row = [], [], [torch.zeros(1, dtype=torch.int32)], 0
    for part in parts:
        positions.append(part.masked_positions[:part.num_masked] + row * slots)
        labels.append(part.masked_labels[:part.num_masked])
        counts.append(part.masked_cu_seqlens[1:] + counts[-1][-1])
        row += len(part.input_ids)
    used = sum(part.num_masked for part in parts)
    capacity = max(len(part.masked_positions) for part in parts)
    while capacity < used:
        capacity += len(parts[0].masked_positions)
    padding = capacity - used
    fields = ("input_ids", "position_ids", "document_ids")
    return PackedBatch(
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in fields},
        masked_positions=torch.cat([*positions, torch.full((padding,), -1)]),
        masked_labels=torch.cat([*labels, torch.zeros(padding, dtype=torch.int64)]),
        masked_cu_seqlens=torch.cat(counts),
        num_tokens=sum(part.num_tokens for part in parts),
        num_masked=used,
    )
