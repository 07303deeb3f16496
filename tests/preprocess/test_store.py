"""The token store: round trips, refusals, and nothing half-written that looks whole."""

from __future__ import annotations

import json
import os
import re
import struct
import tempfile

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from preprocess.errors import ConfigError, DataError
from preprocess.files import atomic_write_json, seal
from preprocess.store import (
    StoreWriter,
    TokenStore,
    list_arrays,
    open_array,
    read_foreign,
    write_array,
)
from tests.support.stores import FakeTokenizer, read, write

IDS = st.one_of(st.sampled_from([0, 65535]), st.integers(0, 65535))
DOCUMENTS = st.lists(st.lists(st.lists(IDS, max_size=6), max_size=4), max_size=5)


@settings(max_examples=40, deadline=None)
@given(DOCUMENTS)
@example([])
@example([[]])
@example([[[]]])
@example([[list(range(65536))], [[0], [65535] * 70_000]])
def test_what_is_written_is_read(documents):
    with tempfile.TemporaryDirectory() as folder:
        prefix = f"{folder}/store"
        write(prefix, documents)
        store = TokenStore.open(prefix, verify=True)
        (shard,) = store.shards
        assert read(shard) == documents
        assert shard.tokens.dtype == np.uint16 and not shard.tokens.flags.writeable
        assert store.num_documents == len(documents)
        assert store.num_sequences == sum(map(len, documents))
        assert store.num_tokens == sum(len(s) for d in documents for s in d)
        assert [[s.tolist() for s in d] for d in read_foreign(prefix)] == documents


@settings(max_examples=20, deadline=None)
@given(st.lists(DOCUMENTS, min_size=2, max_size=4))
def test_shards_lie_end_to_end(parts):
    with tempfile.TemporaryDirectory() as folder:
        prefix = f"{folder}/store"
        for i in reversed(range(len(parts))):
            assert not os.path.exists(prefix + ".json")
            write(prefix, parts[i], (i, len(parts)))
        store = TokenStore.open(prefix, verify=True)
        assert [read(shard) for shard in store.shards] == parts
        counts = [shard.num_tokens for shard in store.shards]
        assert [shard.token_start for shard in store.shards] == [
            sum(counts[:i]) for i in range(len(parts))
        ]
        one = TokenStore.open(f"{prefix}-00001-of-{len(parts):05d}")
        assert read(one.shards[0]) == parts[1]


def test_index_bytes_by_hand(tmp_path):
    write(tmp_path / "s", [[[5, 6], [7]], [], [[8]]])
    expected = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 4)
    expected += struct.pack("<3i", 2, 1, 1) + struct.pack("<3q", 0, 4, 6)
    expected += struct.pack("<4q", 0, 2, 2, 3)
    assert (tmp_path / "s.idx").read_bytes() == expected
    assert (tmp_path / "s.bin").read_bytes() == struct.pack("<4H", 5, 6, 7, 8)


WIDE = ("<u4", "<i8", "<u8", ">i4", ">u8")


@pytest.mark.parametrize("wrong", [[65536], [-1], *(np.array([5, 70_000], d) for d in WIDE)])
def test_ids_never_wrap(tmp_path, wrong):
    """numpy's own `astype` would silently make 4464 of 70000."""
    with pytest.raises(DataError, match=f"token id {wrong[-1]} is not in the vocabulary"):
        write(tmp_path / "s", [[[1]], [wrong]])
    assert list(tmp_path.iterdir()) == []


def test_too_large_a_vocabulary_writes_nothing(tmp_path):
    with pytest.raises(DataError, match="65,537 ids.*at most 65,536"):
        StoreWriter(str(tmp_path / "deep" / "s"), FakeTokenizer(65537), {})
    assert list(tmp_path.iterdir()) == []


def test_fingerprint_follows_content_not_name_or_options(tmp_path):
    write(tmp_path / "a", [[[1, 2]]], made="here")
    write(tmp_path / "b", [[[1, 2]]], made="there")
    write(tmp_path / "c", [[[1], [2]]])
    prints = [TokenStore.open(tmp_path / name).fingerprint for name in "abc"]
    assert prints[0] == prints[1] != prints[2]


# --------------------------------------------------------------------------- damage


def test_an_older_version_and_another_kind_of_json_are_refused(tmp_path):
    write(tmp_path / "s", [[[1, 2]]])
    (shard,) = TokenStore.open(tmp_path / "s").shards
    write_array(shard, "n", "mask", np.array([0], np.uint32), {})
    with pytest.raises(DataError, match=r"s\.n\.mask\.json: not the JSON of a token store"):
        TokenStore.open(tmp_path / "s.n.mask")
    info = json.loads((tmp_path / "s.json").read_text())
    atomic_write_json(tmp_path / "s.json", seal({**info, "format_version": 1}))
    with pytest.raises(DataError, match=r"s\.json: format version 1; this program reads 2"):
        TokenStore.open(tmp_path / "s")


def test_shard_made_again_is_not_mixed_with_the_old_list(tmp_path):
    for i in range(2):
        write(tmp_path / "s", [[[i]]], (i, 2))
    old = (tmp_path / "s.json").read_bytes()
    with StoreWriter(str(tmp_path / "s"), FakeTokenizer(), {}, (1, 2), overwrite=True) as writer:
        writer.add_document([[9]])
    assert TokenStore.open(tmp_path / "s").shards[1].tokens.tolist() == [9]
    (tmp_path / "s.json").write_bytes(old)
    with pytest.raises(DataError, match="fingerprint"):
        TokenStore.open(tmp_path / "s")


def test_shards_of_other_options_do_not_join(tmp_path):
    write(tmp_path / "s", [[[1]]], (0, 2), text_column="a")
    write(tmp_path / "s", [[[1]]], (1, 2), text_column="b")
    assert not (tmp_path / "s.json").exists()


# --------------------------------------------------------------------------- writers


@pytest.mark.parametrize("old", [False, True])
def test_a_failed_writer_leaves_what_was_there(tmp_path, old):
    if old:
        write(tmp_path / "s", [[[1]]])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyError):
        with StoreWriter(str(tmp_path / "s"), FakeTokenizer(), {}, overwrite=old) as writer:
            writer.add_document([[2]])
            raise KeyError
    assert sorted(tmp_path.iterdir()) == before
    if old:
        assert TokenStore.open(tmp_path / "s", verify=True).shards[0].tokens.tolist() == [1]


def test_existing_store_is_not_replaced_unasked(tmp_path):
    write(tmp_path / "s", [[[1]]])
    with pytest.raises(DataError, match="--overwrite"):
        write(tmp_path / "s", [[[2]]])
    (tmp_path / "s.json").unlink()
    with pytest.raises(DataError, match="--adopt"):
        write(tmp_path / "s", [[[2]]])


def test_a_store_and_its_shards_have_one_writer(tmp_path):
    with StoreWriter(str(tmp_path / "s"), FakeTokenizer(), {}):
        for shard in (None, (0, 2)):
            with pytest.raises(ConfigError, match=rf"{os.getpid()}@.*wait for it"):
                StoreWriter(str(tmp_path / "s"), FakeTokenizer(), {}, shard)


# --------------------------------------------------------------------------- arrays


@pytest.fixture
def shard(tmp_path):
    write(tmp_path / "s", [[[1, 2, 3], [4]], [[5]]])
    return TokenStore.open(tmp_path / "s").shards[0]


@pytest.mark.parametrize(
    ("kind", "array"),
    [
        ("scores", np.array([-1.5, 0, 2, 3, np.inf], np.float16)),
        ("importance", np.array([0, 1, 255, 0, 0], np.uint8)),
        ("mask", np.array([0, 2, 4], np.uint32)),
        ("mask", np.array([], np.uint32)),
    ],
)
def test_array_round_trip_whole_and_in_blocks(shard, kind, array):
    for name, given_array in (("whole", array), ("blocks", (array[i : i + 2] for i in (0, 2, 4)))):
        path = write_array(shard, name, kind, given_array, {"strategy": "x"})
        found, info = open_array(shard, name, kind)
        np.testing.assert_array_equal(found, array)
        assert found.dtype == array.dtype and not found.flags.writeable
        assert info["strategy"] == "x" and info["count"] == len(array)
        np.testing.assert_array_equal(np.load(path, allow_pickle=False), array)


@pytest.mark.parametrize(
    ("kind", "array", "match"),
    [
        ("scores", np.zeros(4, np.float16), "one per token"),
        ("scores", np.zeros(5, np.float32), "float32"),
        ("mask", np.array([2, 1], np.uint32), "ascend"),
        ("mask", np.array([1, 1], np.uint32), "ascend"),
        ("mask", np.array([5], np.uint32), "position 5 of 5"),
        ("mask", np.array([0, 1], np.int64), "int64"),
        ("mask", iter([np.array([3], np.uint32), np.array([2], np.uint32)]), "ascend"),
    ],
)
def test_wrong_array_is_not_written(shard, tmp_path, kind, array, match):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=match):
        write_array(shard, "n", kind, array, {})
    assert sorted(tmp_path.iterdir()) == before


def test_array_of_another_store_is_refused_with_both_fingerprints(shard, tmp_path):
    path = write_array(shard, "n", "mask", np.array([0], np.uint32), {})
    write(tmp_path / "other", [[[1]]])
    other = TokenStore.open(tmp_path / "other").shards[0]
    for ending in (".npy", ".json"):
        os.rename(path.with_suffix(ending), tmp_path / f"other.n.mask{ending}")
    with pytest.raises(DataError) as caught:
        open_array(other, "n", "mask")
    assert shard.fingerprint in str(caught.value) and other.fingerprint in str(caught.value)


@pytest.mark.parametrize("name", ["s.bin", "s.idx", "s.json", "s.n.scores.npy", "s.n.scores.json"])
def test_an_absent_file_is_named(shard, tmp_path, name):
    write_array(shard, "n", "scores", np.zeros(5, np.float16), {})
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=re.escape(name)):
        open_array(TokenStore.open(tmp_path / "s").shards[0], "n", "scores")


def test_absent_array_says_which_command_makes_it(shard):
    with pytest.raises(DataError, match="build_masks.py"):
        open_array(shard, "n", "mask")
    with pytest.raises(DataError, match="letters, digits"):
        open_array(shard, "../n", "mask")


def test_list_arrays_wants_every_shard(tmp_path):
    for i in range(2):
        write(tmp_path / "s", [[[i]]], (i, 2))
    store = TokenStore.open(tmp_path / "s")
    none = np.array([], np.uint32)
    for name, shards in (("both", store.shards), ("one", store.shards[:1])):
        for part in shards:
            write_array(part, name, "mask", none, {})
    assert list_arrays(store, "mask") == ["both"]
    assert list_arrays(store, "scores") == []
