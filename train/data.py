"""A token store and masks become packed batches: packing, order, sharding over ranks.

A *piece* is a run of consecutive sequences of one document, at most `max_seq_length - 2` tokens;
a *row* holds several pieces, each as `[CLS] ... [SEP]`. The row table is built once for a store
and a length, without randomness, and kept beside the store. An epoch is a permutation of the
rows, and the global batch b of a run is the same set of rows with the same masks at any number
of ranks: every rank draws the masks of the whole global batch (so that the count of its masked
tokens is known before the first micro batch, without communication) and keeps its own rows.

Letters: `R` rows, `P` pieces, `B` rows of a micro batch, `S` slots of a row, `M` masked positions.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preprocess import masks
from preprocess.errors import ConfigError, DataError
from preprocess.store import TokenStore, atomic_write_bytes, fingerprint_text, open_array

ROW_TABLE_VERSION = 1
OPEN_ROWS = 32  # rows that are being filled at once; more of them waste less and cost more time
SHORTEST_PIECE = 1 / 8  # of a row; shorter pieces are made only of what is left of a document
LONGEST_WORD = 16  # tokens; only sizes the arrays of `whole_word`, which may grow
EVAL_SEED = 20201116  # masks of the held-out rows: the same for every run and every arm
EVAL_RATE = 0.15


@dataclass(frozen=True)
class RowTable:
    """Which tokens make up which row.

    Attributes:
        piece_starts: first token of each piece in the whole store, `(P,)` int64.
        piece_lengths: tokens of each piece, `(P,)` int32.
        row_offsets: first piece of each row, and the end, `(R+1,)` int64.
        max_seq_length: slots of a row, two of them taken by each piece's special tokens.
    """

    piece_starts: np.ndarray
    piece_lengths: np.ndarray
    row_offsets: np.ndarray
    max_seq_length: int

    @property
    def num_rows(self) -> int:
        return len(self.row_offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens of the store that are in a row, without special ones."""
        return int(self.piece_lengths.sum(dtype=np.int64))

    @property
    def efficiency(self) -> float:
        """Filled slots over all slots, special tokens counted as filled."""
        slots = self.num_rows * self.max_seq_length
        return (self.num_tokens + 2 * len(self.piece_starts)) / slots if slots else 1.0


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

    `rows` are the rows of the global batch in order, `(G,)` int64.
    """

    micro_batches: list[PackedBatch]
    rows: np.ndarray
    epoch: int
    step_tokens: int
    step_masked_tokens: int


@dataclass(frozen=True)
class Masking:
    """How positions are chosen: a strategy drawn on the fly, or a prebuilt mask index.

    Attributes:
        name: the strategy's name, or the index's.
        index: mask positions of each shard, `(m,)` uint32 ascending, or None to draw.
        rate: mask rate of a drawn strategy.
        words: table for `whole_word`.
        options: how the index was built: its strategy, rate and seed.
        fingerprint: of the index, over all shards.
    """

    name: str
    index: list[np.ndarray] | None = None
    rate: float = 0.0
    words: masks.WordTable | None = None
    options: dict[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None


def drawn_masking(store: TokenStore, name: str, rate: float) -> Masking:
    """A strategy that is drawn anew in each epoch.

    Raises:
        ConfigError: not a strategy, or one that needs a prebuilt index.
    """
    if name not in masks.DRAWN:
        hint = (
            "build it with preprocess/build_masks.py and give --mask_index"
            if name in masks.PREBUILT else f"known: {', '.join(masks.DRAWN)}"
        )
        raise ConfigError(f"--masking {name}: not drawn on the fly; {hint}")
    words = None
    if name == "whole_word":
        from transformers import AutoTokenizer

        words = masks.continuation_table(AutoTokenizer.from_pretrained(store.tokenizer_dir))
    return Masking(name, rate=rate, words=words)


def prebuilt_masking(store: TokenStore, name: str) -> Masking:
    """A mask index beside the store.

    Raises:
        DataError: absent, made for another store, or without a single position.
    """
    opened = [open_array(shard, name, "mask") for shard in store.shards]
    index, infos = [positions for positions, _ in opened], [info for _, info in opened]
    if not any(len(positions) for positions in index):
        raise DataError(f"{store.prefix}: mask index {name} masks nothing; build another")
    return Masking(
        name, index=index, options=infos[0].get("options") or {},
        fingerprint=fingerprint_text(*(info["sha256"] for info in infos)),
    )


# ------------------------------------------------------------------------------- the row table


def _held_out(store: TokenStore, fraction: float) -> list[np.ndarray]:
    """Which documents of each shard are held out, by a hash of their ids, `(D,)` bool each."""
    held = []
    limit = int(fraction * 2**64)
    for shard in store.shards:
        tokens = shard.sequence_offsets[shard.document_offsets]
        flags = np.zeros(shard.num_documents, dtype=bool)
        if limit:
            for d in range(shard.num_documents):
                content = shard.tokens[tokens[d]:tokens[d + 1]].tobytes()
                digest = hashlib.blake2b(content, digest_size=8).digest()
                flags[d] = int.from_bytes(digest, "little") < limit
        held.append(flags)
    return held


def _cut_points(offsets: np.ndarray, longest: int) -> np.ndarray:
    """Ends of sequences, and cuts inside those longer than `longest`, ascending.

    # offsets 0 3 10, longest 4 -> 0 3 7 10
    """
    lengths = np.diff(offsets)
    if len(lengths) == 0 or lengths.max() <= longest:
        return offsets
    parts = [
        np.arange(start, end, longest) if end - start > longest else np.array([start])
        for start, end in zip(offsets[:-1], offsets[1:], strict=True)
    ]
    return np.concatenate([*parts, offsets[-1:]])


class _Packer:
    """Fill rows with pieces, keeping `OPEN_ROWS` open and wasting as little as possible."""

    def __init__(self, max_seq_length: int) -> None:
        self._slots = max_seq_length
        self._shortest = max(1, int(SHORTEST_PIECE * max_seq_length))
        self._room = np.full(OPEN_ROWS, max_seq_length - 2)  # tokens that one more piece may have
        self._open: list[list[tuple[int, int]]] = [[] for _ in range(OPEN_ROWS)]
        self.rows: list[list[tuple[int, int]]] = []

    def add_document(self, cuts: np.ndarray) -> None:
        """Place a document given by the tokens at which it may be cut, ascending."""
        cuts = cuts[np.concatenate([[True], np.diff(cuts) > 0])]  # empty sequences hold nothing
        at, last = 0, len(cuts) - 1
        while at < last:
            ends = np.searchsorted(cuts, cuts[at] + self._room, side="right") - 1
            lengths = cuts[np.maximum(ends, at)] - cuts[at]
            usable = (lengths >= self._shortest) | (ends >= last)
            waste = np.where(usable, self._room - lengths, self._slots)
            row = int(waste.argmin())
            if not usable[row]:
                # No open row fits: empty the fullest and take all that an empty row holds.
                row = int(self._room.argmin())
                self._close(row)
                ends[row] = np.searchsorted(cuts, cuts[at] + self._room[row], side="right") - 1
            end = int(min(ends[row], last))
            self._open[row].append((int(cuts[at]), int(cuts[end] - cuts[at])))
            self._room[row] -= cuts[end] - cuts[at] + 2
            if self._room[row] < 2:
                self._close(row)
            at = end

    def _close(self, row: int) -> None:
        if self._open[row]:
            self.rows.append(self._open[row])
        self._open[row] = []
        self._room[row] = self._slots - 2

    def finish(self) -> None:
        """Close every open row."""
        for row in range(OPEN_ROWS):
            self._close(row)


def pack_rows(store: TokenStore, documents: list[np.ndarray], max_seq_length: int) -> RowTable:
    """Pack documents into rows; a row never crosses shards.

    Args:
        documents: which documents of each shard to pack, `(D,)` bool each.
    """
    rows: list[list[tuple[int, int]]] = []
    for shard, chosen in zip(store.shards, documents, strict=True):
        packer = _Packer(max_seq_length)
        for d in np.flatnonzero(chosen):
            first, end = shard.document_offsets[d], shard.document_offsets[d + 1]
            cuts = _cut_points(shard.sequence_offsets[first:end + 1], max_seq_length - 2)
            packer.add_document(np.asarray(cuts, dtype=np.int64) + shard.token_start)
        packer.finish()
        rows += packer.rows
    pieces = np.array([piece for row in rows for piece in row], dtype=np.int64).reshape(-1, 2)
    counts = np.array([len(row) for row in rows], dtype=np.int64)
    return RowTable(
        piece_starts=pieces[:, 0].copy(),
        piece_lengths=pieces[:, 1].astype(np.int32),
        row_offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        max_seq_length=max_seq_length,
    )


def row_tables(
    store: TokenStore, max_seq_length: int, eval_fraction: float
) -> tuple[RowTable, RowTable]:
    """The rows to train on and the rows held out, read from beside the store or built and kept.

    Raises:
        DataError: nothing is left to train on.
    """
    key = json.dumps(
        [ROW_TABLE_VERSION, store.fingerprint, max_seq_length, eval_fraction], sort_keys=True
    )
    path = Path(f"{store.prefix}.rows-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz")
    tables = _read_tables(path, key, max_seq_length)
    if tables is None:
        held = _held_out(store, eval_fraction)
        tables = (
            pack_rows(store, [~flags for flags in held], max_seq_length),
            pack_rows(store, held, max_seq_length),
        )
        buffer = io.BytesIO()
        arrays = {
            f"{side}_{name}": getattr(table, name)
            for side, table in zip(("train", "eval"), tables, strict=True)
            for name in ("piece_starts", "piece_lengths", "row_offsets")
        }
        np.savez(buffer, key=np.array(key), **arrays)
        try:
            atomic_write_bytes(path, buffer.getvalue())
        except OSError as error:
            # A read-only store: the table is built again next time.
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
    if tables[0].num_rows == 0:
        raise DataError(f"{store.prefix}: no tokens to train on; tokenize a larger corpus")
    return tables


def _read_tables(
    path: Path, key: str, max_seq_length: int
) -> tuple[RowTable, RowTable] | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["key"]) != key:
                return None
            train, held = (
                RowTable(
                    file[f"{side}_piece_starts"], file[f"{side}_piece_lengths"],
                    file[f"{side}_row_offsets"], max_seq_length,
                )
                for side in ("train", "eval")
            )
            return train, held
    except Exception:  # a damaged archive raises almost anything
        return None  # a cache: anything odd about it means building it again


# ------------------------------------------------------------------------------------- batches


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate `arange(start, start + length)`.

    # starts 5 0, lengths 2 3 -> 5 6 0 1 2
    """
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


@dataclass(frozen=True)
class _Pieces:
    """The pieces of some rows and their masked tokens, flat.

    row: row of each piece in the batch, `(p,)`; slot: its [CLS] in that row, `(p,)`; start,
    length: its tokens, `(p,)`. masked: masked tokens in the whole store, ascending within a
    piece, `(m,)`; masked_counts: how many of them each piece has, `(p,)`.
    """

    row: np.ndarray
    slot: np.ndarray
    start: np.ndarray
    length: np.ndarray
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
        self._order = lru_cache(maxsize=2)(self._make_order)
        self.capacity = max(1, micro_batch_size * self._largest_row())

    def _largest_row(self) -> int:
        """An upper bound on the masked positions of a row."""
        if self.table.num_rows == 0:
            return 0
        if self.masking.index is not None:
            counts = self._index_bounds(self.table.piece_starts, self.table.piece_lengths)
            per_piece = counts[1] - counts[0]
        else:
            per_piece = np.ceil(self.masking.rate * self.table.piece_lengths).astype(np.int64)
            if self.masking.name == "whole_word":
                per_piece = np.minimum(per_piece + LONGEST_WORD, self.table.piece_lengths)
        return int(np.add.reduceat(per_piece, self.table.row_offsets[:-1]).max())

    def _make_order(self, epoch: int) -> np.ndarray:
        """The rows of an epoch: a function of seed, epoch and store."""
        fingerprint = int.from_bytes(
            hashlib.sha256(self.store.fingerprint.encode()).digest()[:8], "little"
        )
        generator = np.random.Generator(
            np.random.Philox(np.random.SeedSequence([self.seed, epoch, fingerprint]))
        )
        return generator.permutation(self.table.num_rows)

    def _index_bounds(
        self, starts: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where each piece's positions begin and end in its shard's mask index, and the shard."""
        assert self.masking.index is not None
        shard_of = np.searchsorted(self._shard_starts, starts, side="right") - 1
        low, high = np.zeros((2, len(starts)), dtype=np.int64)
        for s in np.unique(shard_of):
            mine = shard_of == s
            local = starts[mine] - self._shard_starts[s]
            index = self.masking.index[s]
            # Keys of another dtype would make searchsorted copy the whole index.
            low[mine] = np.searchsorted(index, local.astype(index.dtype))
            high[mine] = np.searchsorted(index, (local + lengths[mine]).astype(index.dtype))
        return low, high, shard_of

    def _tokens(self, positions: np.ndarray) -> np.ndarray:
        """Ids at positions of the whole store, `(n,)` uint16."""
        if len(self.store.shards) == 1:
            return self.store.shards[0].tokens[positions]
        shard_of = np.searchsorted(self._shard_starts, positions, side="right") - 1
        ids = np.empty(len(positions), dtype=np.uint16)
        for s in np.unique(shard_of):
            mine = shard_of == s
            ids[mine] = self.store.shards[s].tokens[positions[mine] - self._shard_starts[s]]
        return ids

    def _pieces(self, rows: np.ndarray, epoch: int) -> _Pieces:
        """Pieces of `rows` (-1: an empty row) and their masks in `epoch`."""
        table = self.table
        real = np.maximum(rows, 0)
        counts = np.where(rows >= 0, table.row_offsets[real + 1] - table.row_offsets[real], 0)
        pieces = _ranges(table.row_offsets[real], counts)
        row = np.repeat(np.arange(len(rows)), counts)
        start = table.piece_starts[pieces]
        length = table.piece_lengths[pieces].astype(np.int64)
        # slot of a piece = slots of the pieces before it in its row
        # lengths 3 5 | 4 (two rows) -> taken 5 7 6, before 0 5 12, row starts 0 12 -> 0 5 0
        before = np.cumsum(length + 2) - (length + 2)
        first_of_row = np.cumsum(counts) - counts
        slot = before - np.repeat(before[first_of_row[counts > 0]], counts[counts > 0])
        masked, masked_counts = self._choose(start, length, epoch)
        return _Pieces(row, slot, start, length, masked, masked_counts)

    def _choose(
        self, start: np.ndarray, length: np.ndarray, epoch: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Masked tokens (in the whole store) of pieces, and how many each piece has."""
        if self.masking.index is not None:
            low, high, shard_of = self._index_bounds(start, length)
            parts = [
                self.masking.index[s][a:b].astype(np.int64) + self._shard_starts[s]
                for s, a, b in zip(shard_of, low, high, strict=True)
            ]
            return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64), high - low
        positions = _ranges(start, length)
        tokens = self._tokens(positions)
        offsets = np.concatenate([[0], np.cumsum(length)])
        words = self.masking.words
        chosen = masks.STRATEGIES[self.masking.name](
            masks.Sequences(
                offsets=offsets,
                positions=positions,
                candidates=masks.find_candidates(tokens, self.store.all_special_ids),
                rate=self.masking.rate,
                seed=self.seed,
                epoch=epoch,
                continues_word=(
                    None if words is None else masks.find_continuations(tokens, offsets, words)
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
        filled = _ranges(cls, length + 2)
        input_ids = np.full(num_rows * slots, special["pad"], dtype=np.int64)
        position_ids = np.zeros(num_rows * slots, dtype=np.int64)
        document_ids = np.full(num_rows * slots, -1, dtype=np.int64)
        input_ids[_ranges(cls + 1, length)] = self._tokens(_ranges(pieces.start[mine], length))
        input_ids[cls], input_ids[cls + length + 1] = special["cls"], special["sep"]
        position_ids[filled] = _ranges(np.zeros_like(length), length + 2)
        document_ids[filled] = np.repeat(np.arange(len(length)), length + 2)

        bounds = np.concatenate([[0], np.cumsum(pieces.masked_counts)])
        counts = pieces.masked_counts[mine]
        masked = pieces.masked[bounds[mine.start]:bounds[mine.stop]]
        positions = masked + np.repeat(cls + 1 - pieces.start[mine], counts)
        labels = input_ids[positions]
        input_ids[positions] = masks.corrupt(
            labels, masked, seed=self.seed, epoch=epoch, mask_id=special["mask"],
            vocab_size=self.store.vocab_size, all_special_ids=self.store.all_special_ids,
        )
        # Only `whole_word` can outgrow the capacity, by a word of more than LONGEST_WORD tokens.
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

    def step(self, step: int) -> StepBatch:
        """This rank's micro batches of optimizer step `step`, counted from 0.

        Rows come from the endless sequence of epochs, so a batch may hold the end of one epoch
        and the beginning of the next; nothing is dropped. Micro batch m of rank r holds rows
        `(m * world_size + r) * micro_batch_size ...` of the global batch.
        """
        numbers = np.arange(step * self.global_batch, (step + 1) * self.global_batch)
        epochs = numbers // self.table.num_rows
        rows = np.concatenate([
            self._order(int(epoch))[numbers[epochs == epoch] % self.table.num_rows]
            for epoch in np.unique(epochs)
        ])
        micro_batches, tokens, masked = [], 0, 0
        # Epochs differ in their masks, so pieces are drawn for one epoch at a time; a micro
        # batch that straddles two is joined from both.
        parts = [
            (int(epoch), np.flatnonzero(epochs == epoch)) for epoch in np.unique(epochs)
        ]
        drawn = [(epoch, where, self._pieces(rows[where], epoch)) for epoch, where in parts]
        for _, _, pieces in drawn:
            tokens += int(pieces.length.sum() + 2 * len(pieces.length))
            masked += int(pieces.masked_counts.sum())
        for m in range(self.accumulation_steps):
            first = (m * self.world_size + self.rank) * self.micro_batch_size
            last = first + self.micro_batch_size
            layout = []
            for epoch, where, pieces in drawn:
                low, high = np.clip([first, last], where[0], where[-1] + 1) - where[0]
                if high > low:
                    layout.append(self._assemble(pieces, slice(int(low), int(high)), epoch))
            micro_batches.append(layout[0] if len(layout) == 1 else _join(layout))
        return StepBatch(micro_batches, rows, int(epochs[0]), tokens, masked)

    def steps(self, first: int, end: int) -> Iterator[StepBatch]:
        """Steps `first` to `end - 1`, the next one made while the last is used."""
        if first >= end:
            return
        with ThreadPoolExecutor(1) as pool:
            following = pool.submit(self.step, first)
            for step in range(first, end):
                batch = following.result()
                if step + 1 < end:
                    following = pool.submit(self.step, step + 1)
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
