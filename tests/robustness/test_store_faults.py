"""Damage to stores and arrays, writers that are killed, and two writers at once.

Every byte of every small file is changed; every length is cut to; a writer is killed before each
of its file operations. What is opened afterwards is what was written, or a sentence. A run that
goes on notices that its data were exchanged.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import ForkProcess
from pathlib import Path

import numpy as np
import pytest

from preprocess import build_masks, files, store, tokenize_corpus
from preprocess.errors import ConfigError, DataError
from preprocess.files import WriterLock, seal
from preprocess.store import (
    StoreWriter,
    TokenStore,
    arrays,
    layout,
    lock_array,
    open_array,
    reader,
    write_array,
)
from tests.support.kills import count_operations
from tests.support.runs import pretrained
from tests.support.stores import FakeTokenizer, tree, write
from train import data

SPARE_BYTES = 512 << 20  # of address space
ALLOCATED_BYTES = 4 << 20  # by Python and numpy; files are hashed in blocks of 1 MiB
DOCUMENTS = [[[1, 2], [3]], [], [[4, 50, 99], []], [[7] * 20]]


SmallTokenizer = partial(FakeTokenizer, 100)
"""100 ids, so that most of what 16 bits can say is wrong."""

ARRAYS = (("n", "mask"), ("n", "scores"), ("", "importance"))


@dataclass(frozen=True)
class Sample:
    """A file whose every byte is checked; `look` is everything that a reader can see through it."""

    path: Path
    data: bytes
    look: Callable[[], list]
    expected: list


def write_everything(folder: Path) -> list[Sample]:
    """A store of one piece with an array of each kind, and one of two shards."""
    write(folder / "s", DOCUMENTS, tokenizer=SmallTokenizer(), made="here")
    for i in range(2):
        write(folder / "t", DOCUMENTS[i:], (i, 2), SmallTokenizer())
    (shard,) = TokenStore.open(folder / "s").shards
    values = {
        "mask": np.arange(0, shard.num_tokens, 3, dtype=np.uint32),
        "scores": np.linspace(-1, 1, shard.num_tokens).astype(np.float16),
        "importance": np.ones(shard.num_tokens, np.uint8),
    }
    samples = []

    def add(look: Callable[[], list], *names: str) -> None:
        for name in names:
            samples.append(Sample(folder / name, (folder / name).read_bytes(), look, look()))

    def look_at_store(prefix: str) -> list:
        opened = TokenStore.open(folder / prefix)
        seen: list = [opened.fingerprint, opened.vocab_size, opened.special_ids, opened.info]
        for part in opened.shards:
            seen += [part.tokens[:].tolist(), part.sequence_offsets[:].tolist(),
                     part.document_offsets[:].tolist(), part.token_start]
        return seen

    def look_at_array(name: str, kind: str) -> list:
        array, info = open_array(shard, name, kind)
        return [array.tolist(), info]

    add(partial(look_at_store, "s"), "s.idx", "s.json", "s.tokenizer/tokenizer.json")
    add(partial(look_at_store, "t"), "t.json", "t-00001-of-00002.idx", "t-00001-of-00002.json")
    for name, kind in ARRAYS:
        path = write_array(shard, name, kind, values[kind], {"made": "here"})
        add(partial(look_at_array, name, kind), path.name, path.with_suffix(".json").name)
    return samples


def check(sample: Sample, data: bytes) -> bool:
    """Put `data` in the file's place: an error of ours that names it, or the content as it was.

    Returns:
        Whether it was an error.
    """
    sample.path.write_bytes(data)
    try:
        seen = sample.look()
    except DataError as error:
        name = "tokenizer" if "tokenizer" in str(sample.path) else sample.path.name
        assert name in str(error) and "\n" not in str(error)
        return True
    assert seen == sample.expected
    return False


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return write_everything(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def little_memory():
    """Let an allocation of more than `SPARE_BYTES` fail, which is no error of ours."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_BYTES, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def test_every_byte_matters_or_is_white_space(samples, little_memory):
    """One bit of each byte, and one byte more: what is accepted has white space between tokens."""
    tried = refused = 0
    for sample in samples:
        for place, byte in enumerate(sample.data):
            before, after = sample.data[:place], sample.data[place + 1 :]
            for changed in ([byte ^ 1 << place % 8], [1, byte]):
                refused += check(sample, before + bytes(changed) + after)
                tried += 1
        sample.path.write_bytes(sample.data)
    assert tried > 6000 and refused > 0.99 * tried


def test_cut_at_any_length_is_refused_before_mapping(samples, monkeypatch):
    for sample in samples:
        for length in range(0, len(sample.data) - 1, 1 if len(sample.data) < 300 else 13):
            assert check(sample, sample.data[:length])
        # Only the line end after a JSON may be missing.
        assert check(sample, sample.data[:-1]) != sample.data.endswith(b"}\n")
        sample.path.write_bytes(sample.data)
    binary = samples[0].path.with_suffix(".bin")
    data = binary.read_bytes()
    sample = Sample(binary, data, samples[0].look, [])
    monkeypatch.setattr(reader, "map_file", None)
    for length in [*range(len(data)), len(data) + 1, len(data) + 2]:
        assert check(sample, (data + b"\0\0")[:length])
    binary.write_bytes(data)


COUNTS = (-1, 0, 1, 2, 2**31, 2**40, 2**60, 2**62, 2**63 - 1, -(2**63))


def test_lies_that_agree_with_their_hashes(tmp_path):
    """Whoever can write a store can write its hashes: still no crash and no large allocation."""
    write(tmp_path / "s", DOCUMENTS)
    paths = {ending: tmp_path / f"s.{ending}" for ending in ("idx", "bin", "json")}
    index, ids = paths["idx"].read_bytes(), paths["bin"].read_bytes()
    info = json.loads(paths["json"].read_text())
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    # The header's fields begin at bytes 9, 17, 18 and 26, the arrays at byte 34.
    for place in (9, 17, 18, 26, *range(34, len(index) - 4, 4)):
        for value in COUNTS:
            lie = struct.pack("<q", value)
            changed = (index[:place] + lie + index[place + 8 :])[: len(index)]
            paths["idx"].write_bytes(changed)
            info["idx_sha256"] = hashlib.sha256(changed).hexdigest()
            paths["json"].write_text(json.dumps(seal(info)))
            try:
                (shard,) = TokenStore.open(tmp_path / "s").shards
            except DataError as error:
                assert "s.idx" in str(error) or "s.bin" in str(error)
            else:  # other bounds of documents, of the same ids
                assert shard.tokens[:].tobytes() == ids
                assert shard.document_offsets[-1] == shard.num_sequences
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert peak < ALLOCATED_BYTES


def test_an_id_beyond_the_vocabulary_is_never_handed_out(tmp_path):
    """`.bin` is too large to hash at each start, so its ids are checked as they are read."""
    from train.data import row_tables
    from train.stages import scoring

    write(tmp_path / "s", [[[7] * 30]] * 4, tokenizer=SmallTokenizer())
    ids = bytearray((tmp_path / "s.bin").read_bytes())
    ids[100:102] = struct.pack("<H", 100)
    (tmp_path / "s.bin").write_bytes(ids)
    opened = TokenStore.open(tmp_path / "s")
    (shard,) = opened.shards
    assert shard.tokens[:50].tolist() == [7] * 50
    for read in (
        lambda: shard.tokens[40:60],
        lambda: shard.tokens[np.array([1, 50])],
        lambda: shard.tokens[50],
        lambda: row_tables(opened, 16, 0.2),
        lambda: list(scoring.score_shard(shard, None, 8, None, 1 << 20)),
    ):
        with pytest.raises(DataError, match=r"s\.bin: token id 100 is not in the vocabulary"):
            read()
    table, _ = row_tables(opened, 16, 0.0)
    batches = data.PackedData(
        opened, table, data.drawn_masking(opened, "random", 0.15), seed=1,
        micro_batch_size=table.num_rows,
    )
    with pytest.raises(DataError, match="token id 100"):
        batches.step(0)
    with pytest.raises(DataError, match=r"s\.bin.*sha256"):
        TokenStore.open(tmp_path / "s", verify=True)


def test_verify_hashes_the_store_and_its_arrays(tmp_path, capsys):
    write_everything(tmp_path)
    tokenize_corpus.main(["--verify", "--output", str(tmp_path / "s")])
    assert "s: complete; 26 tokens, 3 arrays" in capsys.readouterr().out
    for path in (tmp_path / "s.bin", tmp_path / "s.n.scores.npy"):
        data = path.read_bytes()
        path.write_bytes(data[:-2] + b"\x05" + data[-1:])
        with pytest.raises(DataError, match=rf"{re.escape(path.name)}.*sha256"):
            tokenize_corpus.main(["--verify", "--output", str(tmp_path / "s")])
        path.write_bytes(data)


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the files that are hashed, on a clock far ahead of what the tests write."""
    # The time of the last change of an inode cannot be set, so the clock is put forward.
    now, names, plain = time.time_ns, [], layout.file_sha256

    def counted(path, start=0):
        names.append(Path(path).name)
        return plain(path, start)

    monkeypatch.setattr(time, "time_ns", lambda: now() + 2 * store.SETTLED_NS)
    monkeypatch.setattr(layout, "file_sha256", counted)
    return names


def test_a_settled_array_is_hashed_once_and_a_changed_one_again(tmp_path, hashed):
    write(tmp_path / "s", DOCUMENTS)
    (shard,) = TokenStore.open(tmp_path / "s").shards
    path = write_array(shard, "n", "mask", np.array([1, 5], np.uint32), {})
    hashed.clear()
    for _ in range(3):
        open_array(shard, "n", "mask")
    assert hashed == ["s.n.mask.npy"]
    open_array(shard, "n", "mask", verify=True)
    assert len(hashed) == 2
    times = path.stat()
    path.write_bytes(path.read_bytes()[:-4] + struct.pack("<I", 6))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # the inode still tells
    with pytest.raises(DataError, match="sha256"):
        open_array(shard, "n", "mask")
    path.write_bytes(path.read_bytes()[:-4] + struct.pack("<I", 5))
    open_array(shard, "n", "mask")
    assert len(hashed) == 4


def test_a_settled_index_is_hashed_once_and_a_changed_one_again(tmp_path, hashed):
    for i in range(2):
        write(tmp_path / "t", DOCUMENTS[i:], (i, 2))
    hashed.clear()

    def indices(**options) -> list[str]:
        hashed.clear()
        TokenStore.open(tmp_path / "t", **options)
        return [name[:7] for name in hashed if name.endswith(".idx")]

    first, second = "t-00000", "t-00001"
    assert indices() == [first, second]
    assert indices() == []
    assert indices(verify=True) == [first, second]
    # A memo that is broken, absent or of another shard is one that knows nothing.
    memos = [tmp_path / f"{name}-of-00002.memo.json" for name in (first, second)]
    for content in (b"", b"junk", memos[0].read_bytes().replace(b"1", b"2"), memos[1].read_bytes()):
        memos[0].write_bytes(content)
        assert indices() == [first]
        assert indices() == []
    memos[1].unlink()
    assert indices() == [second]
    path = tmp_path / "t-00001-of-00002.idx"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DataError, match=r"t-00001-of-00002\.idx.*sha256"):
        TokenStore.open(tmp_path / "t")


def test_what_was_written_just_now_is_hashed_each_time(tmp_path):
    write(tmp_path / "s", DOCUMENTS)
    TokenStore.open(tmp_path / "s")
    assert not (tmp_path / "s.memo.json").exists()


def test_nothing_is_remembered_where_nothing_may_be_written(tmp_path, hashed, monkeypatch):
    write(tmp_path / "s", DOCUMENTS)

    def refuse(*arguments):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    for _ in range(2):
        hashed.clear()
        TokenStore.open(tmp_path / "s")
        assert "s.idx" in hashed
    assert not list(tmp_path.glob("*memo*")) and not list(tmp_path.glob(".*"))


# --------------------------------------------------------------------------- two writers


FORK = multiprocessing.get_context("fork")


def in_child(action: Callable[[], None]) -> ForkProcess:
    """Start `action` in a forked process."""
    child = FORK.Process(target=action)
    child.start()
    return child


def exit_code(child: ForkProcess) -> int | None:
    child.join()
    return child.exitcode


def test_of_many_writers_one_writes(tmp_path):
    """One holds the prefix until all have tried; the others end with exit code 2."""
    all_tried = FORK.Barrier(6)

    def one_writer() -> None:
        try:
            with StoreWriter(str(tmp_path / "s"), FakeTokenizer(), {}) as writer:
                all_tried.wait()
                writer.add_document([[os.getpid() % 65536] * 5])
        except ConfigError as error:
            all_tried.wait()
            sys.exit(error.exit_code)

    children = [in_child(one_writer) for _ in range(6)]
    codes = [exit_code(child) for child in children]
    assert sorted(codes) == [0, 2, 2, 2, 2, 2]
    winner = children[codes.index(0)].pid
    assert TokenStore.open(tmp_path / "s", verify=True).shards[0].tokens[0] == winner % 65536
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"s.bin", "s.idx", "s.json", "s.tokenizer"}


def test_the_lock_of_a_dead_writer_is_taken_over(tmp_path, capsys):
    ready, told = os.pipe()

    def hold() -> None:
        with WriterLock(tmp_path / "s"):
            os.write(told, b"x")
            signal.pause()

    child = in_child(hold)
    os.read(ready, 1)
    try:
        with pytest.raises(ConfigError, match=f"{child.pid}@.*wait"):
            WriterLock(tmp_path / "s")
    finally:
        child.kill()
        exit_code(child)
    with WriterLock(tmp_path / "s") as lock:
        assert lock.interrupted
    assert f"s.lock: taken over from {child.pid}@" in capsys.readouterr().err
    with WriterLock(tmp_path / "s") as lock:
        assert not lock.interrupted
    (tmp_path / "s.lock").touch()  # killed between making the file and signing it
    WriterLock(tmp_path / "s").release()
    assert list(tmp_path.iterdir()) == []


def test_a_writer_of_another_host_is_respected_while_its_heart_beats(tmp_path, capsys):
    lock = tmp_path / "s.lock"
    lock.write_text("1@elsewhere")
    for age in (0, 290):
        os.utime(lock, (time.time() - age,) * 2)
        with pytest.raises(ConfigError, match="1@elsewhere.*taken over after 5 minutes"):
            StoreWriter(str(tmp_path / "s"), FakeTokenizer(), {})
        assert lock.read_text() == "1@elsewhere"
    os.utime(lock, (time.time() - 310,) * 2)
    held = WriterLock(tmp_path / "s")
    assert held.interrupted and "taken over from 1@elsewhere" in capsys.readouterr().err
    lock.write_text("2@elsewhere")  # in its turn taken over, and not removed
    held.release()
    assert lock.read_text() == "2@elsewhere"


def test_a_writer_that_is_stopping_is_waited_for(tmp_path, capsys):
    """Others are refused at once; nobody is waited for without end."""
    ready, told = os.pipe()

    def hold() -> None:
        asked = []
        with WriterLock(tmp_path / "s"):
            signal.signal(signal.SIGTERM,
                          lambda *_: (files.tell_stopping(), asked.append(True)))
            os.write(told, b"x")
            while not asked:  # `signal.pause` would miss a signal that has come already
                time.sleep(0.01)
            os.write(told, b"x")
            time.sleep(0.5)

    child = in_child(hold)
    os.read(ready, 1)
    for look in (WriterLock, files.wait_for_writer):
        with pytest.raises(ConfigError, match=rf"{child.pid}@\S+\); wait for it, or give another"):
            look(tmp_path / "s", remedy="another thing")
    child.terminate()
    os.read(ready, 1)
    files.wait_for_writer(tmp_path / "s")
    with WriterLock(tmp_path / "s") as lock:
        assert not lock.interrupted
    assert exit_code(child) == 0
    assert f"waiting for {child.pid}@" in capsys.readouterr().err


def test_a_writer_that_does_not_stop_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "STOPPING_SECONDS", 0.1)
    with WriterLock(tmp_path / "s"):
        files.tell_stopping()
        with pytest.raises(ConfigError, match="was asked to stop, and has not ended in 0 s"):
            WriterLock(tmp_path / "s")
    files.tell_stopping()  # nothing is held any more
    assert not list(tmp_path.iterdir())


def test_whoever_looks_at_a_lock_leaves_nothing_and_keeps_nobody_out(tmp_path):
    files.wait_for_writer(tmp_path / "none" / "s")
    (tmp_path / "s.lock").write_text("1@elsewhere")
    with pytest.raises(ConfigError, match="1@elsewhere.*taken over after 5 minutes"):
        files.wait_for_writer(tmp_path / "s")
    os.utime(tmp_path / "s.lock", (0, 0))
    files.wait_for_writer(tmp_path / "s")
    # A container that was killed comes back under another name.
    (tmp_path / "s.lock").write_text(f"1@elsewhere {files._machine()}")
    files.wait_for_writer(tmp_path / "s")
    WriterLock(tmp_path / "s").release()
    assert list(tmp_path.iterdir()) == []


def test_the_heart_of_a_writer_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "HEARTBEAT_SECONDS", 0.001)

    def hold() -> None:
        with WriterLock(tmp_path / "s") as lock:
            os.utime(lock.path, (0, 0))
            end = time.monotonic() + 60
            while lock.path.stat().st_mtime < 1 and time.monotonic() < end:
                os.sched_yield()
            assert lock.path.stat().st_mtime > time.time() - 60

    assert exit_code(in_child(hold)) == 0


def test_no_command_writes_where_another_one_does(tmp_path, reviews_store, tiny_encoder,
                                                  reviews_file, monkeypatch):
    """tokenize_corpus and build_masks here; annotate and score_tokens in their own tests."""
    prefix = str(tmp_path / "s")
    command = ["--input", reviews_file, "--tokenizer", tiny_encoder, "--output", prefix]
    with WriterLock(prefix):
        for more in ([], ["--num_shards", "2"], ["--num_shards", "2", "--num_workers", "1"]):
            with pytest.raises(ConfigError, match=r"s\.lock: another process writes here"):
                tokenize_corpus.main([*command, *more])
    shutil.copytree(Path(reviews_store).parent, tmp_path / "store")
    opened = TokenStore.open(tmp_path / "store" / "reviews")
    with lock_array(opened, "r", "mask"):
        with pytest.raises(ConfigError, match=r"reviews\.r\.mask\.lock: another process"):
            build_masks.main(["--tokens", opened.prefix, "--strategy", "random", "--name", "r"])
        with lock_array(opened, "other", "mask"):
            pass
    assert not list(tmp_path.rglob("*.lock"))


def test_each_shard_of_an_array_has_its_own_lock(tmp_path, monkeypatch):
    for i in range(2):
        write(tmp_path / "t", DOCUMENTS[i:], (i, 2), SmallTokenizer())
    opened = TokenStore.open(tmp_path / "t")
    other = r"t-00001-of-00002\.n\.mask\.lock: another process writes here"
    with lock_array(opened, "n", "mask", 1):
        with lock_array(opened, "n", "mask", 0):
            pass
        for index in (1, None):
            with pytest.raises(ConfigError, match=other):
                lock_array(opened, "n", "mask", index)
        with lock_array(opened, "n", "mask", 0):  # the one that failed holds nothing
            pass
    with lock_array(opened, "n", "mask"), pytest.raises(ConfigError, match=other):
        lock_array(opened, "n", "mask", 1)
    assert not list(tmp_path.rglob("*.lock"))
    # More shards than a process may have files open.
    monkeypatch.setattr(arrays, "WriterLock", refuse_to_open)
    with pytest.raises(ConfigError, match="2 shards are too many.*give --shard_index"):
        lock_array(opened, "n", "mask")


def refuse_to_open(prefix: Path) -> None:
    raise OSError(errno.EMFILE, "Too many open files", f"{prefix}.lock")


# --------------------------------------------------------------------------- killed writers

def killed_at(action: Callable[[], None], folder: Path, point: int) -> bool:
    """Run `action` in a process that is killed before its file operation number `point`, from 1.

    Returns:
        Whether it came that far.
    """
    def watched() -> None:
        count_operations(str(folder), point)
        action()

    code = exit_code(in_child(watched))
    assert code in (0, -signal.SIGKILL)
    return code != 0


def check_tree(folder: Path, expected: dict[str, bytes]) -> None:
    """The same files as in an unbroken run, and nothing beside them."""
    assert tree(folder) == expected
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]


def survive_kills(tmp_path: Path, prepare: Callable[[Path], None], action: Callable[[Path], None],
                  look: Callable[[Path], None], step: int = 1) -> int:
    """Kill `action` at each point in turn and run it again: the bytes of an unbroken run.

    Args:
        prepare: what is there before, in a new folder.
        look: opens what is there after the kill; may raise a `DataError`.
        step: try every `step`-th point.
    Returns:
        How many times it was killed.
    """
    whole = tmp_path / "whole"
    whole.mkdir()
    prepare(whole)
    action(whole)
    expected, kills, point = tree(whole), 0, 1
    while True:
        folder = tmp_path / "killed"
        folder.mkdir()
        prepare(folder)
        if not killed_at(lambda: action(folder), folder, point):  # noqa: B023
            break
        with contextlib.suppress(DataError):
            look(folder)
        action(folder)
        check_tree(folder, expected)
        look(folder)
        shutil.rmtree(folder)
        kills, point = kills + 1, point + step
    return kills


OLD, NEW = [[[1, 2]], [[3]]], [[[9, 8, 7]]]


@pytest.mark.parametrize("case", ["new", "overwrite", "annotation"])
def test_a_killed_store_writer_leaves_nothing_wrong(tmp_path, case):
    """Killed before each file operation: old, new or incomplete; then the same bytes again.

    Shards and their list: `test_a_killed_tokenizer_run_leaves_nothing_wrong`.
    """
    def make(folder: Path, documents: list, tokenizer: FakeTokenizer) -> None:
        with StoreWriter(str(folder / "s"), tokenizer, {}, overwrite=True) as writer:
            for document in documents:
                writer.add_document(document)
            if case == "annotation":
                importance = np.arange(writer.num_tokens, dtype=np.uint8)
                writer.add_array("", "importance", importance, {})

    def prepare(folder: Path) -> None:
        if case != "new":
            make(folder, OLD, SmallTokenizer())

    def look(folder: Path) -> None:
        (shard,) = TokenStore.open(folder / "s", verify=True).shards
        assert shard.tokens.tolist() in ([1, 2, 3], [9, 8, 7])
        if case == "annotation":
            open_array(shard, "", "importance")

    action = partial(make, documents=NEW, tokenizer=FakeTokenizer(200))
    assert survive_kills(tmp_path, prepare, action, look) >= 15


def test_a_killed_mask_builder_leaves_nothing_wrong(tmp_path, reviews_store):
    def action(folder: Path) -> None:
        command = ["--tokens", str(folder / "store" / "reviews"), "--strategy", "random"]
        build_masks.main([*command, "--name", "r"])

    def look(folder: Path) -> None:
        opened = TokenStore.open(folder / "store" / "reviews")
        assert len(open_array(opened.shards[0], "r", "mask")[0])

    def prepare(folder: Path) -> None:
        shutil.copytree(Path(reviews_store).parent, folder / "store")

    assert survive_kills(tmp_path, prepare, action, look) >= 5


def tokenize_again(reviews_file: str, tiny_encoder: str, *more: str) -> Callable[[Path], None]:
    command = ["--input", reviews_file, "--tokenizer", tiny_encoder, *more]
    return lambda folder: tokenize_corpus.main([*command, "--output", str(folder / "s")])


@pytest.mark.slow
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.faults)])
@pytest.mark.parametrize("shards", ["1", "3"])
def test_a_killed_tokenizer_run_leaves_nothing_wrong(
    tmp_path, reviews_file, tiny_encoder, shards, every
):
    action = tokenize_again(
        reviews_file, tiny_encoder, "--num_workers", "1", "--num_shards", shards
    )
    step = 1 if every else random.Random(int(shards)).randrange(3, 6)
    kills = survive_kills(
        tmp_path, lambda folder: None, action, lambda folder: TokenStore.open(folder / "s"),
        step,
    )
    assert kills >= 4


@pytest.fixture(scope="module")
def long_file(tmp_path_factory, reviews_file) -> str:
    """Enough text for a run of some tenths of a second."""
    path = tmp_path_factory.mktemp("long") / "reviews.txt"
    path.write_text(Path(reviews_file).read_text() * 30)
    return str(path)


def num_bytes(folder: Path) -> int:
    """Bytes below a folder in which another process is at work."""
    total = 0
    for place, _, names in os.walk(folder):  # `rglob` fails where a folder goes meanwhile
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.path.getsize(os.path.join(place, name))
    return total


@pytest.mark.parametrize(("workers", "shards", "kills", "all_at_once"), [
    ("2", "4", 1, False),
    *(pytest.param(*case, 3, True, marks=pytest.mark.slow) for case in (("2", "1"), ("4", "3"))),
    *(pytest.param(*case, 25, True, marks=[pytest.mark.slow, pytest.mark.faults])
      for case in (("1", "1"), ("2", "1"), ("2", "4"), ("4", "3"))),
])
def test_runs_killed_at_random_leave_nothing_wrong(
    tmp_path, long_file, tiny_encoder, workers, shards, kills, all_at_once
):
    """Kill a run at a random size of its output: its workers end, and a rerun makes the same bytes.

    All processes at once, as a loss of power does, or the parent alone.
    """
    action = tokenize_again(
        long_file, tiny_encoder, "--num_workers", workers, "--num_shards", shards
    )
    whole = tmp_path / "whole"
    whole.mkdir()
    action(whole)
    generator, expected = random.Random(7), tree(whole)
    for number in range(kills):
        folder = tmp_path / f"killed{number}"
        folder.mkdir()

        def alone() -> None:
            os.setsid()
            action(folder)  # noqa: B023

        child, wanted = in_child(alone), generator.random() * num_bytes(whole)
        while num_bytes(folder) < wanted and child.is_alive():
            os.sched_yield()
        with contextlib.suppress(ProcessLookupError):  # it may have ended
            (os.killpg if all_at_once else os.kill)(child.pid, signal.SIGKILL)
        exit_code(child)
        end = time.monotonic() + 60
        with contextlib.suppress(ProcessLookupError):  # until its last worker has ended
            while time.monotonic() < end:
                os.killpg(child.pid, 0)
                os.sched_yield()
        assert time.monotonic() < end
        with contextlib.suppress(DataError):
            TokenStore.open(folder / "s", verify=True)
        action(folder)
        check_tree(folder, expected)
        shutil.rmtree(folder)


# --------------------------------------------------------------------------- between two runs


def test_a_run_goes_on_only_with_the_data_it_began_with(
    tmp_path, reviews_store, reviews_file, still_encoder, tiny_tokenizer, monkeypatch
):
    """Each input is exchanged behind the back of a run that has a checkpoint."""
    shutil.copytree(Path(reviews_store).parent, tmp_path / "store")
    shutil.copytree(still_encoder, tmp_path / "encoder")
    prefix, encoder = str(tmp_path / "store" / "reviews"), str(tmp_path / "encoder")
    masks = ["--tokens", prefix, "--strategy", "random", "--name", "m", "--overwrite"]
    build_masks.main(masks)

    def go_on(**options) -> None:
        pretrained(prefix, encoder, tmp_path / "-".join(["run", *options]), max_steps=1,
                   eval_fraction=0.0, **options)
        shutil.rmtree(tmp_path / "-".join(["run", *options]) / "hf", ignore_errors=True)

    for options in ({}, {"mask_index": "m"}):
        go_on(**options)
        go_on(**options)  # from its checkpoint
    shutil.copytree(tmp_path / "store", tmp_path / "kept")

    def put_back() -> None:
        shutil.rmtree(tmp_path / "store")
        shutil.copytree(tmp_path / "kept", tmp_path / "store", copy_function=shutil.copyfile)

    with monkeypatch.context() as patch:  # rows in the order of another version
        patch.setattr("train.data.ORDER_VERSION", 1)
        with pytest.raises(ConfigError, match=r"order of rows \(version\) 2, and this run has 1; "):
            go_on()

    build_masks.main([*masks, "--seed", "7"])
    go_on()
    with pytest.raises(ConfigError, match="made with --mask_index"):
        go_on(mask_index="m")

    path = tmp_path / "store" / "reviews.m.mask.npy"
    put_back()
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(DataError, match=r"reviews\.m\.mask\.npy.*sha256"):
        go_on(mask_index="m")

    put_back()
    command = ["--tokenizer", encoder, "--output", prefix, "--overwrite", "--num_workers", "1"]
    tokenize_corpus.main(["--input", reviews_file, *command, "--max_documents", "119"])
    with pytest.raises(ConfigError, match="made with --tokens"):
        go_on()
    with pytest.raises(DataError, match="made for the store"):
        go_on(mask_index="m")

    # The same ids by a tokenizer of the same vocabulary that cuts texts otherwise.
    put_back()
    other = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    other["normalizer"]["strip_accents"] = False
    (tmp_path / "encoder" / "tokenizer.json").write_text(json.dumps(other))
    tokenize_corpus.main(["--input", reviews_file, *command])
    with pytest.raises(ConfigError, match="made with --tokens"):
        go_on()

    put_back()
    path = tmp_path / "store" / "reviews.tokenizer" / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(DataError, match=r"reviews\.tokenizer: not the tokenizer"):
        go_on()
