"""Packing, order, sharding over ranks: hand-written batches, and slow twins of the fast ones."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from preprocess import masking as masks
from preprocess.errors import ConfigError, DataError
from preprocess.store import Shard, TokenStore, layout, write_array
from preprocess.text.continuations import find_continuations
from tests.support.stores import write
from train import data
from train.data import Masking, PackedData, RowTable, make_tables, permute, row_tables
from train.data import rows as packing
from train.data.transfer import fixed_sizes, pack_transfer

PAD, UNK, CLS, SEP, MASK = range(5)  # of `tiny_tokenizer`
FIRST_WORD = 5


def write_store(prefix, tokenizer, shards: list[list[list[list[int]]]]) -> TokenStore:
    """Write a store from shards of documents of sentences of ids."""
    for i, documents in enumerate(shards):
        write(prefix, documents, (i, len(shards)) if len(shards) > 1 else None, tokenizer)
    return TokenStore.open(prefix)


def random_documents(generator, count: int, low: int, high: int, sentences=6, words=12):
    """Draw documents of sentences of ids in [low, high)."""
    return [
        [
            list(generator.integers(low, high, size=int(generator.integers(1, words + 1))))
            for _ in range(int(generator.integers(1, sentences + 1)))
        ]
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def plain_store(tmp_path_factory, tiny_tokenizer) -> TokenStore:
    """Forty documents in one piece, the last one with unknown tokens."""
    documents = random_documents(np.random.default_rng(0), 39, FIRST_WORD, len(tiny_tokenizer))
    documents.append([[UNK, 9, UNK, 9]] * 20)
    return write_store(tmp_path_factory.mktemp("plain") / "p", tiny_tokenizer, [documents])


@pytest.fixture
def fresh_store(tmp_path, tiny_tokenizer) -> TokenStore:
    """Thirty documents whose rows nobody has packed."""
    documents = random_documents(np.random.default_rng(2), 30, FIRST_WORD, 40)
    return write_store(tmp_path / "p", tiny_tokenizer, [documents])


@pytest.fixture(scope="module")
def sharded_store(tmp_path_factory, tiny_tokenizer) -> TokenStore:
    """Five shards, two of them empty; shard i has ids of its own."""
    generator = np.random.default_rng(1)
    shards = [
        [],
        random_documents(generator, 12, 10, 20),
        random_documents(generator, 9, 20, 35) + [[]],
        [],
        random_documents(generator, 11, 35, 50),
    ]
    return write_store(tmp_path_factory.mktemp("sharded") / "p", tiny_tokenizer, shards)


def all_tokens(store: TokenStore) -> np.ndarray:
    return np.concatenate([shard.tokens for shard in store.shards]).astype(np.int64)


def pack_rows(store: TokenStore, documents: list[np.ndarray], slots: int) -> RowTable:
    """Pack the chosen documents of each shard, `(D,)` bool each."""
    chosen = {id(shard): flags for shard, flags in zip(store.shards, documents, strict=True)}
    packed = packing.pack_rows(
        store, slots, lambda shard, block, bounds: ~chosen[id(shard)][block]
    )
    return make_tables(packed, slots)[0]


def table_of(store: TokenStore, slots: int = 32) -> RowTable:
    return pack_rows(store, [np.ones(s.num_documents, bool) for s in store.shards], slots)


def some_index(store: TokenStore, generator, share: float = 0.2) -> Masking:
    """Draw a mask index of arbitrary positions."""
    index = [
        np.flatnonzero(generator.random(shard.num_tokens) < share).astype(np.uint32)
        for shard in store.shards
    ]
    return Masking("some", index=index)


WHICH = [*(name for name, strategy in masks.STRATEGIES.items() if strategy.drawn), "index"]


def maskings(store: TokenStore) -> dict[str, Masking]:
    drawn = {name: data.drawn_masking(store, name, 0.15)
             for name, strategy in masks.STRATEGIES.items() if strategy.drawn}
    return {**drawn, "index": some_index(store, np.random.default_rng(5))}


# ------------------------------------------------------------------------------------ packing


def make_shards(lengths: list[list[list[int]]]) -> SimpleNamespace:
    """Make what `pack_rows` reads of a store whose sentences have these lengths."""
    shards, start = [], 0
    for documents in lengths:
        sentences = np.array([n for document in documents for n in document], dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(sentences)]).astype(np.int64)
        document_offsets = np.cumsum([0, *map(len, documents)]).astype(np.int64)
        tokens = np.zeros(offsets[-1], np.uint16)
        shards.append(Shard("p", tokens, offsets, document_offsets, start, "f"))
        start += len(tokens)
    return SimpleNamespace(shards=shards, prefix="p")


EVERY = 2**32 - 1
sentence_lengths = st.one_of(st.integers(0, 6), st.integers(0, 60))
stores_of_lengths = st.lists(
    st.lists(st.lists(sentence_lengths, max_size=8), max_size=8), min_size=1, max_size=3
)


@settings(max_examples=150, deadline=None)
@given(
    lengths=stores_of_lengths, slots=st.integers(8, 40), picks=st.integers(0, EVERY),
    open_rows=st.sampled_from([1, 2, 5, 32]), block=st.sampled_from([1, 30, 10**6]),
)
# A first version never ended on these.
@example(lengths=[[[1, 14]]], slots=16, picks=EVERY, open_rows=1, block=1)
@example(lengths=[[[1, 14]] * 40], slots=16, picks=EVERY, open_rows=32, block=1)
@example(lengths=[[[8]] * 40 + [[9], [1, 14]]], slots=16, picks=EVERY, open_rows=32, block=1)
@example(lengths=[[[1, 6, 1, 6]] * 40], slots=8, picks=EVERY, open_rows=32, block=1)
@example(lengths=[[[0], [], [0, 0, 3, 0]], [], [[]]], slots=8, picks=EVERY, open_rows=32, block=1)
@example(lengths=[[[100, 1, 100]]], slots=8, picks=EVERY, open_rows=2, block=1)
def test_packer_places_every_token_once(lengths, slots, picks, open_rows, block):
    """Pack document d if bit d (modulo 32) of `picks` is set, and check the rows."""
    store = make_shards(lengths)
    chosen, number = [], 0
    for documents in lengths:
        chosen.append(np.array(
            [bool(picks >> (number + d) % 32 & 1) for d in range(len(documents))], dtype=bool
        ))
        number += len(documents)
    with mock.patch.multiple(packing, OPEN_ROWS=open_rows, BLOCK_TOKENS=block):
        table = pack_rows(store, chosen, slots)

    # Spans of the chosen documents, cut points inside them, and shards, in the whole store.
    wanted, document_of, shard_of, cuts = set(), {}, {}, set()
    for s, (shard, flags) in enumerate(zip(store.shards, chosen, strict=True)):
        for d in range(shard.num_documents):
            bounds = shard.sequence_offsets[shard.document_offsets[d]:shard.document_offsets[d + 1]
                                            + 1] + shard.token_start
            for token in range(int(bounds[0]), int(bounds[-1])):
                document_of[token], shard_of[token] = (s, d), s
                if flags[d]:
                    wanted.add(token)
            for first, end in zip(bounds[:-1], bounds[1:], strict=True):
                cuts |= {int(first), int(end)}
                if end - first > slots - 2:  # too long for a row: cut inside
                    cuts |= set(range(int(first), int(end)))

    placed = []
    for row in range(table.num_rows):
        pieces = slice(table.row_offsets[row], table.row_offsets[row + 1])
        starts, sizes = table.piece_starts[pieces], table.piece_lengths[pieces].astype(int)
        assert len(starts) >= 1 and (sizes >= 1).all()
        assert (sizes + 2).sum() <= slots
        assert len({shard_of[int(start)] for start in starts}) == 1
        for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
            placed += range(start, start + size)
            assert document_of[start] == document_of[start + size - 1]
            assert start in cuts and start + size in cuts
    assert len(placed) == len(set(placed)) == table.num_tokens
    assert set(placed) == wanted


@pytest.mark.parametrize("longest", [30, 8])
def test_little_padding(longest):
    generator = np.random.default_rng(3)
    lengths = [
        list(generator.integers(4 if longest == 8 else 10, longest + 1, size=n))
        for n in generator.integers(1, 30, size=400)
    ]
    table = pack_rows(make_shards([lengths]), [np.ones(400, bool)], 128)
    assert 0.95 <= table.efficiency <= 1
    slots = sum(table.piece_lengths + 2)
    assert table.efficiency == pytest.approx(slots / (128 * table.num_rows))


def test_sentences_longer_than_a_row_are_cut_evenly():
    table = pack_rows(make_shards([[[3, 14, 2]]]), [np.array([True])], 8)
    pieces = list(zip(table.piece_starts.tolist(), table.piece_lengths.tolist(), strict=True))
    # 3 | 6 6 2 | 2: the last cut of the long sentence goes with the sentence after it.
    assert sorted(pieces) == [(0, 3), (3, 6), (9, 6), (15, 4)]


# ------------------------------------------------------------------- held-out rows, and the cache


def document_ids_of(store: TokenStore, table: RowTable) -> set[bytes]:
    """Return the contents of the documents that a table's pieces come from."""
    bounds, contents = [], []
    for shard in store.shards:
        tokens = shard.sequence_offsets[shard.document_offsets]
        for first, end in zip(tokens[:-1], tokens[1:], strict=True):
            bounds.append(shard.token_start + int(first))
            contents.append(shard.tokens[first:end].tobytes())
    return {
        contents[np.searchsorted(bounds, start, side="right") - 1] for start in table.piece_starts
    }


def test_held_out_documents_are_disjoint_by_content(tmp_path, tiny_tokenizer):
    documents = random_documents(np.random.default_rng(2), 200, FIRST_WORD, 40)
    # The same text in another shard, and cut into other sentences, falls on the same side.
    copies = [[[i for sentence in document for i in sentence]] for document in documents[59::-1]]
    store = write_store(tmp_path / "p", tiny_tokenizer, [documents, copies])
    train, held = row_tables(store, 32, 0.2)
    assert not document_ids_of(store, train) & document_ids_of(store, held)
    assert train.num_tokens + held.num_tokens == store.num_tokens
    assert 0.1 < held.num_tokens / store.num_tokens < 0.3
    again, nothing = row_tables(store, 32, 0.0)
    assert nothing.num_rows == 0 and again.num_tokens == store.num_tokens
    packed = PackedData(store, nothing, Masking("random", rate=0.15), seed=0, micro_batch_size=2)
    assert list(packed.in_order(10)) == [] and nothing.efficiency == 1.0


def same_tables(left, right) -> bool:
    return all(
        np.array_equal(getattr(a, name), getattr(b, name))
        and getattr(a, name).dtype == getattr(b, name).dtype
        for a, b in zip(left, right, strict=True)
        for name in ("piece_starts", "piece_lengths", "row_offsets")
    ) and all(a.max_seq_length == b.max_seq_length for a, b in zip(left, right, strict=True))


def test_row_tables_are_kept(tmp_path, fresh_store, monkeypatch):
    store = fresh_store
    mapped = row_tables(store, 32, 0.2)
    assert all(isinstance(table.row_offsets.base, np.memmap) for table in mapped)
    # The files are changed below, so only a copy keeps what was in them.
    built = [
        RowTable(*map(np.array, (t.piece_starts, t.piece_lengths, t.row_offsets)), 32)
        for t in mapped
    ]
    del mapped
    in_memory = packing.pack_rows(store, 32, partial(packing.hold_out, fraction=0.2))
    assert same_tables(make_tables(in_memory, 32), built)
    files = {path: path.read_bytes() for path in tmp_path.glob("p.rows-*")}
    assert len(files) == 7 and not list(tmp_path.glob(".*")) and not list(tmp_path.glob("*.lock"))

    with monkeypatch.context() as patch:
        patch.setattr(packing, "pack_rows", None)
        assert same_tables(row_tables(store, 32, 0.2), built)

    # Anything odd about a file means building it again, and leaves it whole.
    generator = np.random.default_rng(0)
    for path, whole in files.items():
        broken = [b"", whole[:-1], whole + b"x"]
        for _ in range(3):
            flipped = bytearray(whole)
            flipped[int(generator.integers(len(whole)))] ^= 1 << int(generator.integers(8))
            broken.append(bytes(flipped))
        for content in broken:
            path.write_bytes(content)
            assert same_tables(row_tables(store, 32, 0.2), built)
        path.unlink()
        assert same_tables(row_tables(store, 32, 0.2), built) and path.read_bytes() == whole

    # Another length, another fraction: other tables under other names.
    row_tables(store, 16, 0.2)
    row_tables(store, 32, 0.1)
    assert len(list(tmp_path.glob("p.rows-*.json"))) == 3

    # The name is a short hash; the key inside decides.
    (path,) = (path for path in files if path.suffix == ".json")
    other = next(p for p in tmp_path.glob("p.rows-*.json") if p != path)
    path.write_bytes(other.read_bytes())
    assert same_tables(row_tables(store, 32, 0.2), built)


@pytest.mark.parametrize("num_workers", [2, 3])
def test_shards_packed_at_once_give_the_same_rows(sharded_store, num_workers):
    assert len(sharded_store.shards) > num_workers  # some must wait for their turn
    held_out = partial(packing.hold_out, fraction=0.3)
    alone, at_once = (
        make_tables(packing.pack_rows(sharded_store, 32, held_out, n), 32)
        for n in (1, num_workers)
    )
    assert same_tables(alone, at_once) and alone[1].num_rows


def test_a_killed_packer_is_reported(sharded_store):
    parent = os.getpid()

    def held_out(*block):
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return packing.hold_out(*block, fraction=0.3)

    with pytest.raises(DataError, match="killed, perhaps for lack of memory"):
        list(packing.pack_rows(sharded_store, 32, held_out, 2))


def test_of_several_ranks_one_builds_the_table(fresh_store, monkeypatch):
    made, plain = [], packing.pack_rows

    def counted(*arguments):
        made.append(arguments)
        time.sleep(0.2)  # the others come to the lock meanwhile, or find the table
        return plain(*arguments)

    monkeypatch.setattr(packing, "pack_rows", counted)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: row_tables(fresh_store, 32, 0.2), range(4)))
    assert len(made) == 1 and len(found) == 4
    assert all(same_tables(tables, found[0]) for tables in found)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_read_only_store_can_be_read_and_a_full_disk_is_reported(
    tmp_path, fresh_store, monkeypatch, number
):
    def refuse(*given, **options):
        raise OSError(number, "no", "p")

    if number == errno.ENOSPC:
        monkeypatch.setattr(layout.ColumnWriter, "add", refuse)
        with pytest.raises(OSError, match="no"):
            row_tables(fresh_store, 32, 0.0)
    else:
        monkeypatch.setattr(packing, "WriterLock", refuse)
        assert row_tables(fresh_store, 32, 0.0)[0].num_tokens == fresh_store.num_tokens
    assert not list(tmp_path.glob("*rows-*"))


@pytest.mark.parametrize("documents", [[], [[]], [[[], []]]])
def test_a_store_without_tokens_is_refused(tmp_path, tiny_tokenizer, documents):
    store = write_store(tmp_path / "p", tiny_tokenizer, [documents])
    with pytest.raises(DataError, match="no tokens to train on"):
        row_tables(store, 32, 0.1)


# -------------------------------------------------------------------------- one batch, by hand


def test_batch_layout(tmp_path, tiny_tokenizer, monkeypatch):
    store = write_store(
        tmp_path / "p", tiny_tokenizer, [[[[10, 11, 12], [13, 14]], [[20, 21]], [[30]]]]
    )
    # Row 0: document 1 and the second sentence of document 0; row 1: the rest of it; row 2: 30.
    table = RowTable(
        piece_starts=np.array([5, 3, 0, 7]), piece_lengths=np.array([2, 2, 3, 1], np.int32),
        row_offsets=np.array([0, 2, 3, 4]), max_seq_length=9,
    )
    masking = Masking("by-hand", index=[np.array([1, 2, 3, 6], np.uint32)])
    monkeypatch.setattr(
        masks, "corrupt", lambda original, positions, *, mask_id, **_: original * 0 + mask_id
    )
    packed = PackedData(store, table, masking, seed=0, micro_batch_size=3)
    monkeypatch.setattr(packed, "_order", lambda epoch, places: places)
    step = packed.step(0)
    (batch,) = step.micro_batches

    c, s, p, m = CLS, SEP, PAD, MASK
    assert batch.input_ids.tolist() == [
        [c, 20, m, s, c, m, 14, s, p],
        [c, 10, m, m, s, p, p, p, p],
        [c, 30, s, p, p, p, p, p, p],
    ]
    assert batch.position_ids.tolist() == [
        [0, 1, 2, 3, 0, 1, 2, 3, 0],
        [0, 1, 2, 3, 4, 0, 0, 0, 0],
        [0, 1, 2, 0, 0, 0, 0, 0, 0],
    ]
    assert batch.document_ids.tolist() == [
        [0, 0, 0, 0, 1, 1, 1, 1, -1],
        [2, 2, 2, 2, 2, -1, -1, -1, -1],
        [3, 3, 3, -1, -1, -1, -1, -1, -1],
    ]
    assert batch.masked_positions.tolist() == [2, 5, 11, 12]
    assert batch.masked_labels.tolist() == [21, 13, 11, 12]
    for name in ("input_ids", "position_ids", "document_ids", "masked_positions", "masked_labels"):
        assert getattr(batch, name).dtype == torch.int64
        assert torch.equal(batch.inputs(torch.device("cpu"))[name], getattr(batch, name))
    assert (batch.num_tokens, batch.num_masked, batch.most_masked) == (16, 4, 2)
    assert step.rows.tolist() == [0, 1, 2] and step.epoch == 0
    assert (step.step_tokens, step.step_masked_tokens) == (16, 4)


# ------------------------------------------------------------------------------ the slow twin


@dataclass
class PlainRow:
    """One row in plain lists; `masked` maps a slot to its label."""

    input_ids: list[int]
    position_ids: list[int]
    pieces: list[int]
    masked: dict[int, int]


def plain_row(
    store: TokenStore, table: RowTable, masking: Masking, row: int, *, epoch: int, seed: int
) -> PlainRow:
    """Assemble one row token by token, masked by itself."""
    tokens = all_tokens(store)
    pieces = range(table.row_offsets[row], table.row_offsets[row + 1])
    spans = [(int(table.piece_starts[piece]), int(table.piece_lengths[piece])) for piece in pieces]
    if masking.index is not None:
        index = {
            shard.token_start + int(position)
            for shard, positions in zip(store.shards, masking.index, strict=True)
            for position in positions
        }
    else:
        positions = np.concatenate([np.arange(start, start + length) for start, length in spans])
        ids, words = tokens[positions].astype(np.uint16), masking.words
        offsets = np.cumsum([0, *(length for _, length in spans)])
        chosen = masks.STRATEGIES[masking.name].choose(masks.Sequences(
            offsets=offsets, positions=positions, rate=masking.rate, seed=seed, epoch=epoch,
            candidates=ids >= FIRST_WORD, windows=np.zeros(len(spans), np.int64),
            continues_word=words and find_continuations(ids, offsets, words),
        ))
        index = set(positions[chosen].tolist())
    result = PlainRow([], [], [], {})
    for piece, (start, length) in zip(pieces, spans, strict=True):
        positions = np.arange(start, start + length)
        masked = index & set(positions.tolist())
        result.input_ids.append(CLS)
        for position in positions.tolist():
            token = int(tokens[position])
            if position in masked:
                result.masked[len(result.input_ids)] = token
                token = int(masks.corrupt(
                    np.array([token]), np.array([position]), seed=seed, epoch=epoch, mask_id=MASK,
                    vocab_size=store.vocab_size, all_special_ids=store.all_special_ids,
                )[0])
            result.input_ids.append(token)
        result.input_ids.append(SEP)
        result.position_ids += range(length + 2)
        result.pieces += [piece] * (length + 2)
    padding = table.max_seq_length - len(result.input_ids)
    result.input_ids += [PAD] * padding
    result.position_ids += [0] * padding
    result.pieces += [-1] * padding
    return result


def unpack(batch: data.PackedBatch) -> list[PlainRow]:
    """Split a packed batch into rows, and check what must hold of any batch."""
    slots, positions = batch.input_ids.shape[1], batch.masked_positions
    assert (positions[1:] > positions[:-1]).all() and (positions >= 0).all()
    assert len(batch.masked_labels) == len(positions) == batch.num_masked
    assert int((batch.document_ids >= 0).sum()) == batch.num_tokens
    bounds = np.searchsorted(positions, np.arange(len(batch.input_ids) + 1) * slots).tolist()
    assert bounds[-1] == batch.num_masked and batch.most_masked == np.diff(bounds).max()
    rows = []
    for r in range(len(batch.input_ids)):
        mine = slice(bounds[r], bounds[r + 1])
        where = (batch.masked_positions[mine] - r * slots).tolist()
        rows.append(PlainRow(
            batch.input_ids[r].tolist(), batch.position_ids[r].tolist(),
            batch.document_ids[r].tolist(),
            dict(zip(where, batch.masked_labels[mine].tolist(), strict=True)),
        ))
    return rows


def assert_same_row(fast: PlainRow, plain: PlainRow) -> None:
    assert fast.input_ids == plain.input_ids
    assert fast.position_ids == plain.position_ids
    assert fast.masked == plain.masked
    # Numbers of pieces differ, but not which slots belong together.
    numbers = {fast_piece: piece for fast_piece, piece in
               zip(fast.pieces, plain.pieces, strict=True)}
    assert [numbers[piece] for piece in fast.pieces] == plain.pieces
    assert len(set(numbers.values())) == len(numbers) and numbers.get(-1, -1) == -1


@pytest.mark.parametrize("fifths, steps", [(2, 5), (17, 1)])
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("kind", ["plain", "sharded"])
def test_batches_equal_their_plain_twin(which, kind, fifths, steps, plain_store, sharded_store):
    """Each epoch draws its masks anew, or only the corruption of a mask index.

    Steps 2 and 4 hold the end of an epoch and a beginning; the large batch joins four parts.
    """
    store = plain_store if kind == "plain" else sharded_store
    masking, table = maskings(store)[which], table_of(store)
    size = table.num_rows * fifths // 5
    packed = PackedData(store, table, masking, seed=7, micro_batch_size=size)
    assert table.num_rows % size
    for number in range(steps):
        step = packed.step(number)
        (batch,) = step.micro_batches
        masked = 0
        for slot, (row, fast) in enumerate(zip(step.rows, unpack(batch), strict=True)):
            epoch = (number * size + slot) // table.num_rows
            plain = plain_row(store, table, masking, int(row), epoch=epoch, seed=7)
            assert_same_row(fast, plain)
            masked += len(plain.masked)
        assert masked == batch.num_masked == step.step_masked_tokens
        assert step.step_tokens == batch.num_tokens
        assert step.epoch == number * size // table.num_rows


# ----------------------------------------------------------------------------- ranks and order


def global_rows(store, table, masking, number, *, world, accumulation, micro, seed=11):
    """Return the rows of global batch `number` in order, their numbers, and sums over ranks."""
    steps = [
        PackedData(
            store, table, masking, seed=seed, micro_batch_size=micro,
            accumulation_steps=accumulation, world_size=world, rank=rank,
        ).step(number)
        for rank in range(world)
    ]
    rows = [
        row
        for m in range(accumulation)
        for rank in range(world)
        for row in unpack(steps[rank].micro_batches[m])
    ]
    assert all(len(step.micro_batches) == accumulation for step in steps)
    assert len({step.epoch for step in steps}) == 1
    numbers = np.concatenate([
        step.rows.reshape(accumulation, micro)[m] for m in range(accumulation) for step in steps
    ])
    names = ("step_rows", "step_pieces", "step_tokens", "step_masked_tokens")
    sums = [sum(getattr(step, name) for step in steps) for name in names]
    assert sums == [
        len(rows), sum(len(set(row.pieces) - {-1}) for row in rows),
        sum(piece >= 0 for row in rows for piece in row.pieces),
        sum(len(row.masked) for row in rows),
    ]
    return rows, numbers.tolist(), (*sums, steps[0].epoch)


@pytest.mark.parametrize("which", WHICH)
def test_global_batch_does_not_depend_on_the_split(which, sharded_store):
    masking, table = maskings(sharded_store)[which], table_of(sharded_store)
    straddling = table.num_rows // 8  # this batch of 8 holds the end of the first epoch
    assert table.num_rows % 8
    for number in (0, straddling):
        reference = global_rows(
            sharded_store, table, masking, number, world=1, accumulation=1, micro=8
        )
        for world, accumulation, micro in (
            (1, 4, 2), (1, 8, 1), (2, 2, 2), (2, 1, 4), (4, 1, 2), (4, 2, 1), (8, 1, 1)
        ):
            rows, numbers, sums = global_rows(
                sharded_store, table, masking, number, world=world, accumulation=accumulation,
                micro=micro,
            )
            assert (numbers, sums) == reference[1:]
            for fast, expected in zip(rows, reference[0], strict=True):
                assert_same_row(fast, expected)


SCHEDULE = data.Schedule(0.6, 0.1, 12)


def test_a_scheduled_rate_is_that_of_the_step_whatever_the_split(larger_store):
    """Two epochs and more; the rate of each step is the plain line between the two."""
    table = table_of(larger_store, 128)
    masking = data.drawn_masking(larger_store, "random", SCHEDULE)
    assert masking.rate == 0.6 and masking.rate_text() == "0.6:0.1"
    for number in (0, 5, 11):
        rate = 0.6 - 0.5 * number / 11
        one = PackedData(larger_store, table, masking, seed=3, micro_batch_size=256).step(number)
        parts = [
            PackedData(larger_store, table, masking, seed=3, micro_batch_size=32,
                       accumulation_steps=4, world_size=2, rank=rank).step(number)
            for rank in range(2)
        ]
        split = [row for m in range(4) for part in parts
                 for row in unpack(part.micro_batches[m])]
        for fast, other in zip(unpack(one.micro_batches[0]), split, strict=True):
            assert_same_row(fast, other)
        text = one.step_tokens - 2 * one.step_pieces
        assert one.step_masked_tokens / text == pytest.approx(rate, rel=0.01)
        constant = data.drawn_masking(larger_store, "random", rate)
        same = PackedData(larger_store, table, constant, seed=3, micro_batch_size=256).step(number)
        for fast, other in zip(unpack(one.micro_batches[0]), unpack(same.micro_batches[0]),
                               strict=True):
            assert_same_row(fast, other)


def test_a_schedule_of_one_rate_or_one_step_is_that_rate(plain_store):
    assert [data.Schedule(0.3, 0.1, 5).at(step) for step in (0, 4)] == [0.3, pytest.approx(0.1)]
    assert data.Schedule(0.3, 0.1, 1).at(0) == data.Schedule(0.3, 0.1, 0).at(0) == 0.3
    level = data.drawn_masking(plain_store, "random", data.Schedule(0.15, 0.15, 7))
    assert level.rate_text() == 0.15 and {level.rate_at(step) for step in range(7)} == {0.15}


@pytest.mark.parametrize("rates", [(0.6, 0.1), (0.1, 0.6)])
def test_sizes_hold_the_batches_of_the_largest_rate(rates, larger_store):
    table = table_of(larger_store, 128)
    masking = data.drawn_masking(larger_store, "random", data.Schedule(*rates, num_steps=300))
    packed = PackedData(larger_store, table, masking, seed=0, micro_batch_size=64)
    sizes = packed.measure_sizes(300)
    counts = [packed.step(number).micro_batches[0].num_masked for number in range(0, 300, 3)]
    assert max(counts) <= sizes.masked < 1.15 * max(counts)
    level = data.drawn_masking(larger_store, "random", 0.6)
    assert sizes == PackedData(larger_store, table, level, seed=0,
                               micro_batch_size=64).measure_sizes(300)


@pytest.mark.parametrize("percent", [(100, 0, 0), (0, 100, 0), (20, 30, 50), (0, 0, 100)])
def test_masked_tokens_become_what_was_asked(percent, larger_store):
    table, masking = table_of(larger_store, 128), maskings(larger_store)["random"]
    packed = PackedData(larger_store, table, masking, seed=1, micro_batch_size=table.num_rows,
                        corruption=masks.Corruption(*percent))
    (batch,) = packed.step(0).micro_batches
    seen, labels = batch.input_ids.flatten()[batch.masked_positions], batch.masked_labels
    found = [(seen == MASK).float().mean(), ((seen != MASK) & (seen != labels)).float().mean()]
    ordinary = larger_store.vocab_size - FIRST_WORD
    # A random id is the original once in as many draws as there are ordinary ids.
    expected = [percent[0] / 100, percent[1] / 100 * (1 - 1 / ordinary)]
    assert batch.num_masked > 10_000  # one standard deviation is at most 0.005
    np.testing.assert_allclose(found, expected, atol=0.02)
    if percent[1] == 0:
        assert ((seen == MASK) | (seen == labels)).all()
    if percent[0] in (0, 100):
        assert (seen == MASK).float().mean() == percent[0] / 100


@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_every_row_once_an_epoch(size, plain_store):
    table = table_of(plain_store)
    masking = maskings(plain_store)["random"]
    packed = PackedData(plain_store, table, masking, seed=1, micro_batch_size=size)
    epochs, rows = 3, []
    while len(rows) < epochs * table.num_rows:
        rows += packed.step(len(rows) // size).rows.tolist()
    orders = [rows[e * table.num_rows:(e + 1) * table.num_rows] for e in range(epochs)]
    for order in orders:
        assert sorted(order) == list(range(table.num_rows))
    assert len({tuple(order) for order in orders}) == epochs
    other = PackedData(plain_store, table, masking, seed=2, micro_batch_size=size)
    assert other.step(0).rows.tolist() != rows[:size] or size == 1


def test_steps_are_the_steps_and_their_counts_are_summed_when_asked_for(plain_store):
    table, masking = table_of(plain_store), maskings(plain_store)["random"]
    packed = PackedData(plain_store, table, masking, seed=0, micro_batch_size=2,
                        accumulation_steps=2, world_size=3)
    asked = []

    def sum_over_ranks(*values):
        asked.append(values)
        return [float(10 * value) for value in values]

    assert not list(packed.steps(3, 3, sum_over_ranks))
    for number, step in enumerate(packed.steps(3, 6, sum_over_ranks), start=3):  # as resumed
        alone = packed.step(number)
        assert len(asked) == number - 2
        assert asked[-1] == (4, alone.step_pieces, alone.step_tokens, alone.step_masked_tokens)
        assert (step.step_rows, step.step_masked_tokens) == (40, 10 * alone.step_masked_tokens)
        assert np.array_equal(step.rows, alone.rows)
        for left, right in zip(step.micro_batches, alone.micro_batches, strict=True):
            assert torch.equal(left.input_ids, right.input_ids)
            assert torch.equal(left.masked_positions, right.masked_positions)
    assert len(asked) == 3


def test_the_counts_of_the_next_step_can_come_with_this_one(plain_store):
    table, masking = table_of(plain_store), maskings(plain_store)["random"]
    packed = PackedData(plain_store, table, masking, seed=0, micro_batch_size=2, world_size=2)
    asked = []

    def sum_over_ranks(*values):
        asked.append(values)
        return [100.0 * value for value in values]

    steps = packed.steps(0, 4, sum_over_ranks)
    for number in range(4):
        step = next(steps)
        alone = packed.step(number)
        factor = 100 if number in (0, 3) else 10
        assert step.counts == tuple(factor * count for count in alone.counts)
        following = packed.step(number + 1).counts if number < 3 else (0, 0, 0, 0)
        assert step.following.mine() == following
        if number < 2:  # the third step's were not summed: they are asked for
            step.following.total = [10.0 * count for count in following]
    assert len(asked) == 2


# ----------------------------------------------------------------------------------- order


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 64, 65, 257, 1009, 65537, 100_003])
def test_an_order_holds_every_row_once(size):
    orders = [permute(np.arange(size), size, 1, epoch, "store") for epoch in range(3)]
    for order in orders:
        assert (np.bincount(order, minlength=size) == 1).all()
    if size > 5:
        assert len({order.tobytes() for order in orders}) == 3
    for key in ((2, 0, "store"), (1, 0, "other")):
        assert size < 6 or not np.array_equal(permute(np.arange(size), size, *key), orders[0])
    # Any places in any order: the number at a place is a function of the place.
    places = np.random.default_rng(0).integers(size, size=(7, 5))
    assert np.array_equal(permute(places, size, 1, 0, "store"), orders[0][places])


def test_large_orders_need_no_array():
    places = np.array([0, 1, 2, 10**15 // 2, 10**15 - 1])
    found = permute(places, 10**15, 1, 0, "store")
    assert len(set(found.tolist())) == 5 and (found >= 0).all() and (found < 10**15).all()


@pytest.mark.parametrize("size", [1000, 4096, 50_021])
def test_an_order_is_as_good_as_drawn(size):
    """Over 30 epochs: blocks of places against blocks of rows, and neighbours."""
    blocks, excess, correlations, successors = 10, [], [], 0
    place = np.arange(size)
    for epoch in range(30):
        order = permute(place, size, 5, epoch, "store")
        found = np.histogram2d(place, order, bins=blocks)[0]
        expected = np.histogram(place, bins=blocks)[0]
        expected = np.outer(expected, expected) / size
        freedom = (blocks - 1) ** 2
        excess.append((((found - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)
        correlations.append(np.corrcoef(order[:-1], order[1:])[0, 1] * size**0.5)
        successors += int((np.diff(order) == 1).sum())
    # Of numbers with mean 0 and variance 1, and a count with mean and variance 30.
    assert abs(np.mean(excess)) < 1 and max(excess) < 5
    assert abs(np.mean(correlations)) < 1 and np.max(np.abs(correlations)) < 5
    assert abs(successors - 30) < 5 * 30**0.5


@pytest.mark.parametrize("size", [3, 4])
def test_all_orders_of_few_rows_are_as_frequent(size):
    orders = [tuple(permute(np.arange(size), size, seed, 0, "s").tolist()) for seed in range(1200)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == {3: 6, 4: 24}[size]
    assert min(counts) > 0.5 * 1200 / len(counts) and max(counts) < 1.6 * 1200 / len(counts)


# ---------------------------------------------------------------------------------- shards


def test_rows_of_a_shard_come_from_that_shard_and_none_is_empty(sharded_store):
    """The published pipeline repeated row i of shard i, and left rows of zeros."""
    table = table_of(sharded_store)
    masking = Masking("none", index=[np.zeros(0, np.uint32)] * 5)
    packed = PackedData(sharded_store, table, masking, seed=0, micro_batch_size=table.num_rows)
    seen, shards = [], set()
    rows = unpack(packed.step(0).micro_batches[0])
    for row in rows:
        ids = [token for token in row.input_ids if token >= FIRST_WORD]
        (shard,) = {(token >= 20) + (token >= 35) for token in ids}
        shards.add(shard)
        seen += ids
    assert shards == {0, 1, 2}
    assert sorted(seen) == sorted(all_tokens(sharded_store).tolist())
    assert len({tuple(row.input_ids) for row in rows}) == len(rows)


def write_epochs(store: TokenStore, name: str, epochs: int, seed: int = 0) -> list[list]:
    """Write an index for each epoch as build_masks.py does; return them by epoch and shard."""
    indices = []
    for epoch in range(epochs):
        index = some_index(store, np.random.default_rng(seed + epoch)).index
        for shard, positions in zip(store.shards, index, strict=True):
            write_array(shard, name + f"-epoch{epoch}" * (epoch > 0), "mask", positions,
                        {"options": {"strategy": "by hand"}, "epochs": epochs, "epoch": epoch})
        indices.append(index)
    return indices


def test_an_index_of_two_epochs_takes_turns(sharded_store):
    """Whole steps against one index at a time; the third epoch has the masks of the first."""
    indices, table = write_epochs(sharded_store, "turns", 2), table_of(sharded_store)
    masking = data.prebuilt_masking(sharded_store, "turns")
    assert [list(map(len, index)) for index in masking.indices] == [
        list(map(len, index)) for index in indices]
    size = table.num_rows // 2 + 1  # steps 1 and 3 hold the end of an epoch and a beginning
    packed = PackedData(sharded_store, table, masking, seed=5, micro_batch_size=size)
    for number in range(6):
        step = packed.step(number)
        for slot, (row, fast) in enumerate(
            zip(step.rows, unpack(step.micro_batches[0]), strict=True)
        ):
            epoch = (number * size + slot) // table.num_rows
            alone = Masking("turns", index=indices[epoch % 2])
            plain = plain_row(sharded_store, table, alone, int(row), epoch=epoch, seed=5)
            assert_same_row(fast, plain)
    assert step.epoch >= 2
    # The first epoch is what is evaluated; a later one named by itself is that of every epoch.
    (batch,) = PackedData(sharded_store, table, masking, seed=5,
                          micro_batch_size=table.num_rows).in_order(table.num_rows)
    assert batch.num_masked == sum(map(len, indices[0]))
    alone = data.prebuilt_masking(sharded_store, "turns-epoch1")
    assert not alone.later and all(map(np.array_equal, alone.index, indices[1]))


def test_every_epoch_of_an_index_counts_and_must_be_there(sharded_store):
    fingerprints = set()
    for seed in (0, 1):
        write_epochs(sharded_store, "many", 3, 10 * seed)
        fingerprints.add(data.prebuilt_masking(sharded_store, "many").fingerprint)
    shard = sharded_store.shards[2]
    write_array(shard, "many-epoch2", "mask", np.arange(4, dtype=np.uint32),
                {"options": {}, "epochs": 3, "epoch": 2})
    fingerprints.add(data.prebuilt_masking(sharded_store, "many").fingerprint)
    assert len(fingerprints) == 3
    write_array(shard, "many-epoch2", "mask", np.arange(4, dtype=np.uint32),
                {"options": {}, "epochs": 4, "epoch": 2})
    with pytest.raises(DataError, match="from epoch to epoch or shard to shard; build it again"):
        data.prebuilt_masking(sharded_store, "many")
    os.unlink(f"{shard.prefix}.many-epoch2.mask.npy")
    with pytest.raises(DataError, match="many has 3 epochs, and number 2 cannot be read: .*many-"
                       "epoch2.*build_masks.py --name many --epochs 3"):
        data.prebuilt_masking(sharded_store, "many")


def test_an_index_is_another_one_if_any_shard_differs(sharded_store):
    index = some_index(sharded_store, np.random.default_rng(9)).index
    fingerprints = set()
    for changed in (None, *range(len(index))):
        expected = [part[1:] if n == changed else part for n, part in enumerate(index)]
        for shard, positions in zip(sharded_store.shards, expected, strict=True):
            write_array(shard, "changed", "mask", positions, {"options": {"strategy": "by hand"}})
        opened = data.prebuilt_masking(sharded_store, "changed")
        assert opened.options == {"strategy": "by hand"}
        assert all(map(np.array_equal, opened.index, expected))
        fingerprints.add(opened.fingerprint)
    assert len(fingerprints) == 1 + sum(len(positions) > 0 for positions in index)


# ----------------------------------------------------------------- fixed sizes, and the transfer

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize("count, padded", [(0, 128), (1, 128), (128, 128), (129, 256)])
def test_masks_are_padded_by_the_batchs_own_count(count, padded, plain_store):
    index = np.arange(count, dtype=np.uint32)
    table = table_of(plain_store)
    packed = PackedData(plain_store, table, Masking("first", index=[index]), seed=0,
                        micro_batch_size=table.num_rows)
    (batch,) = packed.step(0).micro_batches
    assert batch.num_masked == len(batch.masked_labels) == count
    on_gpu, on_cpu = batch.inputs(META), batch.inputs(CPU)
    for name in ("masked_positions", "masked_labels"):
        assert on_gpu[name].shape == (padded,)
        # One padded position at least, so that every rank runs the same modules.
        assert on_cpu[name].tolist() == (getattr(batch, name).tolist() or [-1])
    assert on_cpu["most_masked"] == on_gpu["most_masked"]
    assert on_cpu["most_masked"] % 8 == 0 <= on_cpu["most_masked"] - batch.most_masked < 8
    packed.pack_for(CPU, data.BatchSizes(masked=384, per_row=40))
    fixed = packed.step(0).micro_batches[0].inputs(CPU)
    assert fixed["masked_positions"].shape == (384,) and fixed["most_masked"] == 40
    assert fixed["masked_labels"].shape == (padded,)  # of which the head computes a loss


def by_hand(ids: list[list[int]]) -> data.PackedBatch:
    """A batch of rows of one piece and one slot of padding, its first and last piece masked."""
    input_ids = torch.tensor(ids)
    positions = torch.arange(input_ids.shape[1] - 1).expand(len(ids), -1)
    padded = functional.pad(positions, (0, 1))
    pieces = torch.arange(len(ids))[:, None].expand(positions.shape)
    return data.PackedBatch(
        input_ids, padded, functional.pad(pieces, (0, 1), value=-1),
        masked_positions=torch.tensor([1, input_ids.numel() - 2]),
        masked_labels=torch.tensor([65_535, 32_768]), most_masked=1, num_tokens=positions.numel(),
    )


def assert_same_inputs(packed: dict, batch: data.PackedBatch) -> None:
    """Compare what the model is given with the tensors of the batch."""
    for name in ("input_ids", "position_ids"):
        assert packed[name].dtype == torch.int64 and torch.equal(packed[name], getattr(batch, name))
    for name in ("masked_positions", "masked_labels"):
        values, count = packed[name], batch.num_masked
        assert values.dtype == torch.int64 and torch.equal(values[:count], getattr(batch, name))
        assert (values[count:] == -1).all()
    assert packed["most_masked"] >= batch.most_masked
    for mine, plain in zip(packed["document_ids"], batch.document_ids, strict=True):
        same, expected = (ids[:, None] == ids[None] for ids in (mine, plain))
        filled = plain >= 0
        assert torch.equal(same[filled], expected[filled])
        # A slot of padding attends to itself, so that no softmax is empty.
        assert torch.equal(same[~filled], torch.eye(len(plain), dtype=torch.bool)[~filled])


@pytest.mark.parametrize("ids", [[[1, 65_535, 0]], [[3, 32_767, 2, 0], [32_768, 7, 65_534, 5]]])
def test_large_ids_survive_16_bits(ids):
    batch = by_hand(ids)
    packed = replace(batch, transfer=pack_transfer(batch, data.BatchSizes(256, 8), False))
    assert_same_inputs(packed.inputs(CPU), batch)


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("kind", ["plain", "sharded"])
def test_packed_batches_equal_the_plain_ones(which, kind, plain_store, sharded_store):
    store = plain_store if kind == "plain" else sharded_store
    masking, table = maskings(store)[which], table_of(store)
    size = table.num_rows * 2 // 5
    plain, packed = (
        PackedData(store, table, masking, seed=7, micro_batch_size=size, accumulation_steps=2)
        for _ in range(2)
    )
    packed.pack_for(CPU, packed.measure_sizes(3))
    for number, step in enumerate(packed.steps(0, 3)):
        for mine, theirs in zip(step.micro_batches, plain.step(number).micro_batches, strict=True):
            assert theirs.transfer is None and mine.transfer is not None
            assert_same_inputs(mine.inputs(CPU), theirs)
            # Where nothing is packed ahead, as in evaluation, it is packed on the way.
            alone = theirs.inputs(META)
            for name, value in pack_transfer(
                theirs, data.BatchSizes(0, 0), False
            ).inputs(CPU).items():
                same = value == alone[name] if name == "most_masked" else (
                    (value.shape, value.dtype) == (alone[name].shape, alone[name].dtype))
                assert same, name


class CopiesBetweenDevices(TorchDispatchMode):
    """Count the operations that read a tensor of one device and return one on another."""

    def __init__(self):
        super().__init__()
        self.bytes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = [value for value in args if isinstance(value, torch.Tensor)]
        if isinstance(result, torch.Tensor) and {t.device for t in given} - {result.device}:
            self.bytes += [value.nbytes for value in given]
        return result


def test_a_micro_batch_is_one_copy(plain_store):
    table, masking = table_of(plain_store, 128), maskings(plain_store)["random"]
    packed = PackedData(plain_store, table, masking, seed=0, micro_batch_size=32)
    (plain,) = packed.step(0).micro_batches
    packed.pack_for(CPU, packed.measure_sizes(1))
    for batch in (*packed.step(0).micro_batches, plain):
        with CopiesBetweenDevices() as copies:
            inputs = batch.inputs(META)
        (num_bytes,) = copies.bytes
        assert num_bytes < 5.5 * plain.input_ids.numel()  # 26 as five tensors of int64
        assert inputs["input_ids"].device == META and inputs["input_ids"].dtype == torch.int64


def test_batches_for_a_gpu_are_pinned_by_a_thread_that_has_entered_it(plain_store, monkeypatch):
    entered, pinned, empty = [], [], torch.empty

    def note(*shape, pin_memory=False, **options):
        pinned.append((pin_memory, threading.get_ident() in entered))
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", note)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: entered.append(
        threading.get_ident()) if device.index == 3 else None)
    table, masking = table_of(plain_store), maskings(plain_store)["random"]
    packed = PackedData(plain_store, table, masking, seed=0, micro_batch_size=2)
    list(packed.steps(0, 2))
    assert not entered and not pinned
    packed.pack_for(torch.device("cuda", 3), data.BatchSizes(128, 8))
    list(packed.steps(0, 2))
    assert pinned == [(True, True)] * 2 and threading.get_ident() not in entered


@pytest.fixture(scope="module")
def larger_store(tmp_path_factory, tiny_tokenizer) -> TokenStore:
    """A hundred thousand tokens in documents of many lengths."""
    documents = random_documents(
        np.random.default_rng(4), 500, FIRST_WORD, len(tiny_tokenizer), sentences=40, words=20
    )
    return write_store(tmp_path_factory.mktemp("larger") / "p", tiny_tokenizer, [documents])


@pytest.mark.parametrize("which", WHICH)
def test_sizes_of_a_run_are_near_the_counts_of_its_batches(which, larger_store):
    """Batches of 256 rows of 128 slots; the sizes are found from 64 of the 300."""
    table, masking = table_of(larger_store, 128), maskings(larger_store)[which]
    packed = PackedData(larger_store, table, masking, seed=0, micro_batch_size=256)
    sizes = packed.measure_sizes(300)
    batches = [packed.step(number).micro_batches[0] for number in range(0, 300, 3)]
    counts = [batch.num_masked for batch in batches]
    assert sizes.masked % 128 == 0 and sizes.per_row % 8 == 0
    assert np.mean(counts) < sizes.masked < 1.07 * np.mean(counts)
    fitting = [batch for batch in batches if batch.num_masked <= sizes.masked
               and batch.most_masked <= sizes.per_row]
    assert len(fitting) >= len(batches) - 1
    assert max(batch.most_masked for batch in batches) + 12 > sizes.per_row


@pytest.mark.parametrize("which", WHICH)
def test_sizes_do_not_depend_on_ranks_or_where_a_run_stands(which, sharded_store):
    table, masking = table_of(sharded_store), maskings(sharded_store)[which]

    def make(world: int, accumulation: int, rank: int = 0) -> PackedData:
        return PackedData(sharded_store, table, masking, seed=3, micro_batch_size=4,
                          accumulation_steps=accumulation, world_size=world, rank=rank)

    sizes = make(1, 6).measure_sizes(50)
    resumed = make(2, 3, 1)
    list(resumed.steps(17, 20))
    assert sizes == resumed.measure_sizes(50) == make(6, 1, 4).measure_sizes(50)
    # Every batch of a short run is looked at.
    short = make(1, 6)
    counts = [batch for step in short.steps(0, 5) for batch in step.micro_batches]
    assert short.measure_sizes(5) == fixed_sizes(
        [batch.num_masked for batch in counts], [batch.most_masked for batch in counts]
    )


def test_sizes_by_hand():
    assert fixed_sizes([4645, 4677, 4650], [19, 20, 18]) == data.BatchSizes(4864, 24)
    assert fixed_sizes([0], [0]) == data.BatchSizes(128, 8)
    sizes = data.BatchSizes(256, 16)
    assert sizes.holding(256, 16) == sizes == sizes.holding(0, 0)
    assert sizes.holding(257, 3) == data.BatchSizes(384, 16)
    assert sizes.holding(3, 17) == data.BatchSizes(256, 24)


def test_a_batch_beyond_the_sizes_loses_no_mask(plain_store):
    table, masking = table_of(plain_store, 128), maskings(plain_store)["random"]
    packed = PackedData(plain_store, table, masking, seed=0, micro_batch_size=16)
    (plain,) = packed.step(0).micro_batches
    packed.pack_for(CPU, data.BatchSizes(128, 8))
    (batch,) = packed.step(0).micro_batches
    assert plain.num_masked > 128 and plain.most_masked > 8
    assert_same_inputs(batch.inputs(CPU), plain)


# -------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("max_rows", [1, 5, 10**6])
def test_evaluation_covers_each_held_out_row_once(which, max_rows, sharded_store):
    """The published pipeline evaluated on the last training batch, again and again."""
    _, held = row_tables(sharded_store, 32, 0.4)
    masking = maskings(sharded_store)[which]
    wanted = [
        plain_row(sharded_store, held, masking, row, epoch=0, seed=data.EVAL_SEED)
        for row in range(min(max_rows, held.num_rows))
    ]
    for world, micro in ((1, 1), (1, 4), (2, 3), (4, 2)):
        ranks = [
            list(PackedData(
                sharded_store, held, masking, seed=data.EVAL_SEED, micro_batch_size=micro,
                world_size=world, rank=rank,
            ).in_order(max_rows))
            for rank in range(world)
        ]
        assert len({len(batches) for batches in ranks}) == 1  # ZeRO-3 waits for every rank
        rows = [
            row for batches in zip(*ranks, strict=True) for batch in batches
            for row in unpack(batch)
        ]
        assert all(len(b.input_ids) == micro for batches in ranks for b in batches)
        for fast, plain in zip(rows, wanted, strict=False):
            assert_same_row(fast, plain)
        for row in rows[len(wanted):]:
            assert set(row.input_ids) == {PAD} and set(row.pieces) == {-1} and not row.masked
        assert len(rows) >= len(wanted)


# --------------------------------------------------------------------------------- refusals


def test_refusals(plain_store):
    write_array(plain_store.shards[0], "nothing", "mask", np.zeros(0, np.uint32), {})
    special = {name: i for name, i in plain_store.special_ids.items() if name != "mask"}
    maskless = SimpleNamespace(special_ids=special, tokenizer_dir="T")
    for error, fragment, call in (
        (ConfigError, "an index with preprocess/build_masks.py",
         lambda: data.drawn_masking(plain_store, "selective", 0.15)),
        (ConfigError, "known: random", lambda: data.drawn_masking(plain_store, "randon", 0.15)),
        (DataError, "masks no token", lambda: data.prebuilt_masking(plain_store, "nothing")),
        (DataError, "build_masks.py", lambda: data.prebuilt_masking(plain_store, "absent")),
        (DataError, "T: the tokenizer has no mask token", lambda: PackedData(
            maskless, None, Masking("random", rate=0.15), seed=0, micro_batch_size=1)),
    ):
        with pytest.raises(error, match=fragment):
            call()
