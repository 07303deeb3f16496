"""Pack the tokens of a store into rows, and keep the table of rows beside the store.

A *piece* is a run of consecutive sequences of one document, at most `max_seq_length - 2` tokens;
a *row* holds several pieces, each as `[CLS] ... [SEP]`. The table is built once per store and
length, without randomness, and mapped from its files: no rank keeps it in memory.

Letters: `R` rows, `P` pieces, `D` documents.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import multiprocessing
from array import array as compact_list
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from preprocess.errors import ConfigError, DataError
from preprocess.files import WriterLock
from preprocess.launchers import end_with_parent
from preprocess.machine import num_cores
from preprocess.progress import Progress, say
from preprocess.store import Shard, TokenStore, open_table, write_table

ROW_TABLE_VERSION = 2
OPEN_ROWS = 32  # rows filled at the same time; more of them waste fewer slots and more time
SHORTEST_PIECE = 1 / 8  # of a row; only the rest of a document may become a shorter piece
BLOCK_TOKENS = 1 << 20  # read and packed at once; or one document, if longer
SIDES = ("train", "held")
COLUMNS = {
    f"{side}_{name}": np.dtype(kind)
    for side in SIDES
    for name, kind in (("starts", "<i8"), ("lengths", "<i4"), ("rows", "<i8"))
}


@dataclass(frozen=True)
class RowTable:
    """The tokens of each row; mapped from files, or in memory.

    Attributes:
        piece_starts: first token of each piece in the whole store, `(P,)` int64.
        piece_lengths: tokens of each piece, `(P,)` int32.
        row_offsets: first piece of each row, and the end, `(R+1,)` int64.
        max_seq_length: slots per row; the special tokens of each piece take two of them.
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
        """Tokens of the store in all rows, without special ones."""
        return int(self.piece_lengths.sum(dtype=np.int64))

    @property
    def efficiency(self) -> float:
        """Filled slots over all slots, special tokens counted as filled."""
        slots = self.num_rows * self.max_seq_length
        return (self.num_tokens + 2 * len(self.piece_starts)) / slots if slots else 1.0


@dataclass
class _Rows:
    """Finished rows: starts and lengths of their pieces, and the number of pieces per row."""

    starts: compact_list = field(default_factory=lambda: compact_list("q"))
    lengths: compact_list = field(default_factory=lambda: compact_list("i"))
    counts: compact_list = field(default_factory=lambda: compact_list("i"))


class _Packer:
    """Fill rows with pieces, keeping `OPEN_ROWS` open and wasting as few slots as possible.

    The room left in a row is the number of tokens that one more piece may have. The bits of one
    integer say which rooms exist, so the smallest room that holds a piece is found at once: in
    plain Python this is several times faster than numpy on 32 rows.
    """

    def __init__(self, max_seq_length: int) -> None:
        self._longest = max_seq_length - 2
        self._shortest = max(1, int(SHORTEST_PIECE * max_seq_length))
        # Open rows by room; a row is start, length, start, ...
        self._by_room: list[list[list[int]]] = [[] for _ in range(self._longest + 1)]
        self._by_room[self._longest] = [[] for _ in range(OPEN_ROWS)]
        self._rooms = 1 << self._longest  # bit r is set if a row has room r
        self.full = _Rows()

    def add_document(self, cuts: list[int]) -> None:
        """Place a document, given the tokens at which it may be cut, strictly ascending."""
        at, last = 0, len(cuts) - 1
        while at < last:
            start = cuts[at]
            reach = bisect_right(cuts, start + self._longest, at + 1, last + 1) - 1
            end, room = self._best_fit(cuts, at, reach, last)
            if room < 0:
                # No open row fits: finish the fullest, and fill an empty row as far as possible.
                self._close((self._rooms & -self._rooms).bit_length() - 1)
                end, room = reach, self._longest
            row = self._take(room)
            row += (start, cuts[end] - start)
            room -= cuts[end] - start + 2
            if room < 2:
                self._end_row(row)
                row, room = [], self._longest
            self._by_room[room].append(row)
            self._rooms |= 1 << room
            at = end

    def _best_fit(self, cuts: list[int], at: int, reach: int, last: int) -> tuple[int, int]:
        """Return the cut and the room that waste least; room -1 if no piece fits any row."""
        start, least, best, best_room = cuts[at], self._longest + 1, reach, -1
        for end in range(reach, at, -1):
            length = cuts[end] - start
            if length < self._shortest and end < last:
                break
            fitting = self._rooms >> length
            waste = (fitting & -fitting).bit_length() - 1
            if fitting and waste < least:
                least, best, best_room = waste, end, length + waste
                if not waste:
                    break
        return best, best_room

    def _take(self, room: int) -> list[int]:
        rows = self._by_room[room]
        row = rows.pop()
        if not rows:
            self._rooms &= ~(1 << room)
        return row

    def _end_row(self, row: list[int]) -> None:
        self.full.starts.extend(row[0::2])
        self.full.lengths.extend(row[1::2])
        self.full.counts.append(len(row) // 2)

    def _close(self, room: int) -> None:
        row = self._take(room)
        if row:
            self._end_row(row)
        self._by_room[self._longest].append([])
        self._rooms |= 1 << self._longest

    def finish(self) -> None:
        """Finish every open row."""
        for rows in self._by_room:
            for row in filter(None, rows):
                self._end_row(row)

    def take_full(self) -> _Rows:
        """Return the finished rows, and forget them."""
        full, self.full = self.full, _Rows()
        return full


# ---------------------------------------------------------------------------- a complete store


def hold_out(shard: Shard, documents: slice, bounds: np.ndarray, fraction: float) -> np.ndarray:
    """Choose the held-out documents, by a hash of their ids.

    Args:
        bounds: first token of each of the documents, and the end, `(D+1,)` int64.
    Returns:
        `(D,)` bool.
    """
    limit = int(fraction * 2**64)
    if not limit:
        return np.zeros(len(bounds) - 1, dtype=bool)
    content = memoryview(shard.tokens[bounds[0]:bounds[-1]].tobytes())
    edges = (2 * (bounds - bounds[0])).tolist()
    return np.array([
        int.from_bytes(hashlib.blake2b(content[a:b], digest_size=8).digest(), "little") < limit
        for a, b in zip(edges[:-1], edges[1:], strict=True)
    ], dtype=bool)


def _document_blocks(shard: Shard) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Split a shard into runs of documents of about `BLOCK_TOKENS`, or one document.

    Yields:
        The documents; the first sequence of each in the block, and the end, `(D+1,)` int64; the
        offset of each sequence, and the end, `(N+1,)` int64.
    """
    first, count = 0, shard.num_documents
    while first < count:
        start = shard.sequence_offsets[shard.document_offsets[first]]
        # The last sequence, then the last document, that ends within BLOCK_TOKENS.
        sequence = np.searchsorted(shard.sequence_offsets, start + BLOCK_TOKENS, side="right") - 1
        last = int(np.searchsorted(shard.document_offsets, sequence, side="right")) - 1
        last = min(max(last, first + 1), count)
        documents = shard.document_offsets[first:last + 1]
        offsets = shard.sequence_offsets[documents[0]:documents[-1] + 1]
        yield slice(first, last), documents - documents[0], offsets
        first = last


def _cut_points(offsets: np.ndarray, longest: int) -> list[int]:
    """List the ends of sequences, and cuts inside those longer than `longest`.

    # offsets 0 3 3 10, longest 4 -> 0 3 7 10
    """
    cuts = [
        cut for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
        for cut in range(start, end, longest)
    ]
    return [*cuts, int(offsets[-1])]


HeldOut = Callable[[Shard, slice, np.ndarray], np.ndarray]
_Packed = tuple[str, _Rows, int]  # a side, its rows, and the number of tokens read for them


def pack_rows(
    store: TokenStore, max_seq_length: int, held_out: HeldOut, num_workers: int = 1
) -> Iterator[tuple[str, _Rows]]:
    """Pack documents into rows; a row never crosses shards.

    Args:
        held_out: chooses the documents of the side "held", as `hold_out` does.
        num_workers: shards packed at once, one process each; the rows stay the same.
    Yields:
        A side and its next rows, in order.
    """
    total = sum(len(shard.tokens) for shard in store.shards)
    num_workers = min(num_workers, len(store.shards))
    with Progress(total, "token", label="pack", part=True) as progress:
        if num_workers > 1:
            packed = _pack_at_once(store, max_seq_length, held_out, num_workers)
        else:
            packed = itertools.chain.from_iterable(
                _pack_shard(shard, max_seq_length, held_out) for shard in store.shards
            )
        for side, rows, num_read in packed:
            progress.update(num_read)
            yield side, rows


def _pack_shard(shard: Shard, max_seq_length: int, held_out: HeldOut) -> Iterator[_Packed]:
    longest = max_seq_length - 2
    packers = [_Packer(max_seq_length) for _ in SIDES]
    for documents, sequences, offsets in _document_blocks(shard):
        held = held_out(shard, documents, offsets[sequences])
        lengths = np.diff(offsets)
        odd = np.append(0, np.cumsum((lengths == 0) | (lengths > longest)))[sequences]
        cuts = (offsets + shard.token_start).tolist()
        edges, odd, sides = sequences.tolist(), np.diff(odd).tolist(), held.tolist()
        for d, side in enumerate(sides):
            first, end = edges[d], edges[d + 1]
            if odd[d]:
                places = offsets[first:end + 1] + shard.token_start
                packers[side].add_document(_cut_points(places, longest))
            else:
                packers[side].add_document(cuts[first:end + 1])
        num_read = int(offsets[-1] - offsets[0])
        for side, packer in zip(SIDES, packers, strict=True):
            yield side, packer.take_full(), num_read if side == SIDES[0] else 0
    for side, packer in zip(SIDES, packers, strict=True):
        packer.finish()
        yield side, packer.take_full(), 0


_forked: dict[str, Any] = {}  # inherited by the workers below


def _pack_at_once(
    store: TokenStore, max_seq_length: int, held_out: HeldOut, num_workers: int
) -> Iterator[_Packed]:
    """Pack with one worker per shard, in order, at most `num_workers` shards ahead."""
    _forked.update(shards=store.shards, length=max_seq_length, held_out=held_out)
    numbers = iter(range(len(store.shards)))
    context = multiprocessing.get_context("fork")
    # The workers inherit the lock of the table, and would hold it for ever once we are killed.
    with ProcessPoolExecutor(num_workers, context, end_with_parent) as pool:
        waiting = deque(
            pool.submit(_pack_numbered, i) for i in itertools.islice(numbers, num_workers)
        )
        while waiting:
            try:
                yield from waiting.popleft().result()
            except BrokenProcessPool:
                raise DataError(
                    f"{store.prefix}: a process that packs rows was killed, perhaps for lack of "
                    "memory; give the same command fewer cores (taskset)"
                ) from None
            waiting.extend(pool.submit(_pack_numbered, i) for i in itertools.islice(numbers, 1))


def _pack_numbered(number: int) -> list[_Packed]:
    return list(_pack_shard(_forked["shards"][number], _forked["length"], _forked["held_out"]))


def _columns(packed: Iterator[tuple[str, _Rows]]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield blocks of the columns of a table, by name."""
    ends = dict.fromkeys(SIDES, 0)
    for side in SIDES:
        yield f"{side}_rows", np.zeros(1, np.int64)
    for side, rows in packed:
        offsets = ends[side] + np.cumsum(np.array(rows.counts, dtype=np.int64))
        ends[side] += len(rows.starts)
        yield f"{side}_starts", np.array(rows.starts, dtype=np.int64)
        yield f"{side}_lengths", np.array(rows.lengths, dtype=np.int32)
        yield f"{side}_rows", offsets


def make_tables(
    packed: Iterator[tuple[str, _Rows]], max_seq_length: int
) -> tuple[RowTable, RowTable]:
    """Make the tables of training and held-out rows in memory."""
    blocks: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
    for name, block in _columns(packed):
        blocks[name].append(block)
    found = {
        name: np.concatenate([np.empty(0, COLUMNS[name]), *parts])
        for name, parts in blocks.items()
    }
    return _as_tables(found, max_seq_length)


def _as_tables(columns: dict[str, np.ndarray], max_seq_length: int) -> tuple[RowTable, RowTable]:
    train, held = (
        RowTable(columns[f"{side}_starts"], columns[f"{side}_lengths"], columns[f"{side}_rows"],
                 max_seq_length)
        for side in SIDES
    )
    return train, held


def row_tables(
    store: TokenStore, max_seq_length: int, eval_fraction: float
) -> tuple[RowTable, RowTable]:
    """Open the tables of training and held-out rows beside the store; build them if absent.

    Of several ranks that find no table, one builds it and the others wait. Where nothing can be
    written, every rank builds it in memory, every time.

    Raises:
        ConfigError: rows without room for a token between two special ones, or a fraction outside
            [0, 1).
        DataError: there are no tokens to train on.
    """
    if max_seq_length < 3:
        raise ConfigError(f"max_seq_length {max_seq_length}: must be 3 or more")
    if not 0 <= eval_fraction < 1:
        raise ConfigError(f"eval_fraction {eval_fraction}: must be in [0, 1)")
    key = json.dumps(
        [ROW_TABLE_VERSION, store.fingerprint, max_seq_length, eval_fraction], sort_keys=True
    )
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    prefix = f"{store.prefix}.rows-{name}"

    def packed(num_workers: int) -> Iterator[tuple[str, _Rows]]:
        return pack_rows(
            store, max_seq_length,
            lambda shard, documents, bounds: hold_out(shard, documents, bounds, eval_fraction),
            num_workers,
        )

    # Only forked processes inherit the mapped store.
    num_workers = num_cores() if "fork" in multiprocessing.get_all_start_methods() else 1
    columns = open_table(store, prefix, COLUMNS, key)
    if columns is None:
        try:
            with WriterLock(prefix, wait_seconds=math.inf):
                columns = open_table(store, prefix, COLUMNS, key)
                if columns is None:
                    with write_table(prefix, COLUMNS, key) as writers:
                        for column, block in _columns(packed(num_workers)):
                            writers[column].add(block)
            columns = columns or open_table(store, prefix, COLUMNS, key)
        except ConfigError as error:  # of another host, which locks of this disk do not reach
            say(f"{error}; until then every rank packs the rows in its own memory")
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
    tables = (
        make_tables(packed(1), max_seq_length) if columns is None
        else _as_tables(columns, max_seq_length)
    )
    if tables[0].num_rows == 0:
        raise DataError(f"{store.prefix}: no tokens to train on; tokenize a larger corpus")
    return tables
