"""Arrays beside a shard, one value per token or position: names, dtypes, writing, reading."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.errors import ConfigError, DataError, writing
from preprocess.files import (
    WriterLock,
    json_bytes,
    remove_leftovers,
    seal,
    sync,
    temporary_path,
    write_temporary,
)
from preprocess.identity import compare
from preprocess.store.layout import (
    FORMAT_VERSION,
    NPY_HEADER_BYTES,
    ColumnWriter,
    open_column,
    read_sealed,
)
from preprocess.store.reader import Shard, TokenStore

ARRAYS: dict[str, np.dtype[Any]] = {
    "scores": np.dtype("<f2"),
    "units": np.dtype("u1"),
    "importance": np.dtype("u1"),
    "mask": np.dtype("<u4"),
}
ARRAY_MAKERS = {
    "scores": "train/score_tokens.py or preprocess/score_words.py",
    "units": "preprocess/score_words.py",
    "importance": "train/annotate.py",
    "mask": "preprocess/build_masks.py",
}
_NAME = re.compile(r"[A-Za-z0-9_-]+")


def array_path(shard: Shard, name: str, kind: str) -> Path:
    """Return the path of an array: `P.NAME.KIND.npy`, or `P.importance.npy` (name "")."""
    return prefix_array_path(shard.prefix, name, kind)


def prefix_array_path(prefix: str, name: str, kind: str) -> Path:
    """Return the path of an array beside the shard `prefix`."""
    if kind not in ARRAYS:
        raise DataError(f"array kind {kind!r}: known are {', '.join(ARRAYS)}")
    if kind == "importance" and not name:  # a store of annotated texts has one annotation
        return Path(f"{prefix}.{kind}.npy")
    if not _NAME.fullmatch(name):
        raise DataError(f"array name {name!r}: letters, digits, - and _ are allowed")
    return Path(f"{prefix}.{name}.{kind}.npy")


def json_of(path: Path) -> Path:
    """Return the path of the JSON of an array."""
    return path.with_suffix(".json")


def lock_array(
    store: TokenStore, name: str, kind: str, shard_index: int | None = None
) -> ExitStack:
    """Take the sole right to write an array beside one shard of a store, and remove leftovers.

    Args:
        shard_index: from 0, so that processes may work on several shards at once; None takes all.
    Returns:
        The locks, as a context manager.
    Raises:
        ConfigError: another process writes it, or there are more shards than open files allowed.
    """
    shards = store.shards if shard_index is None else [store.shards[shard_index]]
    with ExitStack() as locks:
        for path in (array_path(shard, name, kind) for shard in shards):
            try:
                locks.enter_context(WriterLock(path.with_suffix("")))
            except OSError as error:
                if error.errno != errno.EMFILE:
                    raise
                raise ConfigError(
                    f"{store.prefix}: {len(shards):,} shards are too many to lock at once "
                    f"({error.strerror}); give --shard_index, or raise `ulimit -n`"
                ) from None
            remove_leftovers(path, json_of(path))
        return locks.pop_all()


def write_array(
    shard: Shard,
    name: str,
    kind: str,
    array: np.ndarray | Iterable[np.ndarray],
    info: dict[str, Any],
) -> Path:
    """Write an array beside a shard, atomically; its JSON comes last. See `lock_array`.

    Args:
        array: `(M,)` for mask, `(T,)` for all others, of the dtype in `ARRAYS`; or blocks of it in
            order, so that a large one never sits in memory.
        info: what made it; kept in the JSON with the store's fingerprint and the count.
    Raises:
        DataError: wrong dtype or length; mask positions that do not ascend or leave the shard.
        DiskFullError: the disk is full; an old array stays.
    """
    path = array_path(shard, name, kind)
    try:
        stage_array(path, shard.num_tokens, shard.fingerprint, name, kind, array, info)
        publish_array(path)
    except BaseException:
        for staged in (path, json_of(path)):
            temporary_path(staged).unlink(missing_ok=True)
        raise
    sync(path.parent)
    return path


def stage_array(
    path: Path,
    num_tokens: int,
    fingerprint: str,
    name: str,
    kind: str,
    array: np.ndarray | Iterable[np.ndarray],
    info: dict[str, Any],
) -> None:
    """Write and sync an array and its JSON under temporary names."""
    last, dtype = -1, ARRAYS[kind]
    column = ColumnWriter(path, dtype)
    with column.stream:
        if kind != "mask":  # its size is known: report a full disk before the work is done
            _reserve(column.stream, NPY_HEADER_BYTES + num_tokens * dtype.itemsize, path)
        for block in [array] if isinstance(array, np.ndarray) else array:
            last = _check_block(path, num_tokens, kind, block, last)
            column.add(block)
        if kind != "mask" and column.count != num_tokens:
            raise DataError(
                f"{path}: {column.count:,} values for the {num_tokens:,} tokens of its store; one "
                f"per token is needed"
            )
        written = column.close()
    entry = {
        **info,
        **written,
        "format_version": FORMAT_VERSION,
        "name": name,
        "kind": kind,
        "store_fingerprint": fingerprint,
    }
    write_temporary(json_of(path), json_bytes(seal(entry)))


def _reserve(stream: Any, num_bytes: int, path: Path) -> None:
    """Reserve the room for a file, where the system can."""
    if hasattr(os, "posix_fallocate"):
        try:
            with writing(path, num_bytes):
                os.posix_fallocate(stream.fileno(), 0, num_bytes)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise


def publish_array(path: Path) -> None:
    """Give a staged array and its JSON their names."""
    json_of(path).unlink(missing_ok=True)
    os.replace(temporary_path(path), path)
    os.replace(temporary_path(json_of(path)), json_of(path))


def _check_block(path: Path, num_tokens: int, kind: str, block: np.ndarray, last: int) -> int:
    if block.ndim != 1 or block.dtype != ARRAYS[kind]:
        raise DataError(f"{path}: {block.dtype} {block.shape}; one row of {ARRAYS[kind]} is needed")
    if kind != "mask" or not len(block):
        return last
    wide = block.astype(np.int64)
    if wide[0] <= last or (np.diff(wide) <= 0).any():
        raise DataError(f"{path}: mask positions must ascend strictly")
    if wide[-1] >= num_tokens:
        raise DataError(f"{path}: position {wide[-1]} of {num_tokens} tokens")
    return int(wide[-1])


def open_array(
    shard: Shard, name: str, kind: str, verify: bool = False
) -> tuple[np.ndarray, dict[str, Any]]:
    """Map an array beside a shard, read-only, and return it with its JSON.

    Its content is hashed when it is first opened, and again only if the file has changed; with
    `verify` it always is.

    Raises:
        DataError: absent (says which command makes it), made for another store, or damaged.
    """
    path = array_path(shard, name, kind)
    json_path = json_of(path)
    if not json_path.is_file() or not path.is_file():
        missing = path if json_path.is_file() else json_path
        raise DataError(f"{missing}: no complete array here; {ARRAY_MAKERS[kind]} makes it")
    again = f"make it again with {ARRAY_MAKERS[kind]}"
    info = read_sealed(json_path, again)
    if info.get("store_fingerprint") != shard.fingerprint:
        raise DataError(
            f"{path}: made for the store {info.get('store_fingerprint')}, but {shard.prefix} is "
            f"{shard.fingerprint}; {again}"
        )
    count = info["count"]
    if count != shard.num_tokens and (kind != "mask" or count > shard.num_tokens):
        raise DataError(f"{path}: {count} values for {shard.num_tokens} tokens; {again}")
    return open_column(shard.prefix, path, ARRAYS[kind], info, verify, again), info


def has_array(
    shard: Shard, name: str, kind: str, identity: dict[str, Any], overwrite: bool
) -> bool:
    """Return whether a shard has the array `name`, complete and made with this identity.

    Args:
        overwrite: whether another one may be replaced; then it counts as absent.
    Raises:
        ConfigError: it has one of another identity; says what differs.
        DataError: it has a damaged one, or one of another store.
    """
    path = array_path(shard, name, kind)
    if not json_of(path).is_file():
        return False
    try:
        _, info = open_array(shard, name, kind)
    except DataError as error:
        if overwrite:
            return False
        raise DataError(f"{error}; --overwrite replaces it") from None
    found = info.get("identity", {})
    if not overwrite:
        compare(found, identity, str(path), "give another --name, or --overwrite")
    return bool(found == identity)


def _array_names(shard: Shard, kind: str) -> set[str]:
    prefix = Path(shard.prefix)
    form = re.compile(rf"{re.escape(prefix.name)}\.({_NAME.pattern})\.{kind}\.json")
    names = [found[1] for found in map(form.fullmatch, os.listdir(prefix.parent)) if found]
    return {name for name in names if array_path(shard, name, kind).is_file()}


def list_arrays(store: TokenStore, kind: str) -> list[str]:
    """Return the sorted names of the arrays of a kind that all shards have."""
    names = [_array_names(shard, kind) for shard in store.shards]
    return sorted(set.intersection(*names))


def missing_arrays(store: TokenStore, name: str, kind: str) -> list[Path]:
    """Return the paths of array `name` at the shards that do not have it yet."""
    paths = [array_path(shard, name, kind) for shard in store.shards]
    return [path for path in paths if not json_of(path).is_file()]


def array_records(store: TokenStore, name: str, kind: str) -> list[tuple[Path, dict[str, Any]]]:
    """Return path and JSON of array `name` at the shards that have it, without opening it.

    A JSON that cannot be read is left out: another process may be writing it, and whoever opens
    the array says what is wrong.
    """
    found = []
    for path in (array_path(shard, name, kind) for shard in store.shards):
        try:
            found.append((path, read_sealed(json_of(path), "")))
        except (OSError, DataError):
            continue
    return found


def check_other_shards(
    store: TokenStore, shards: list[Shard], name: str, kind: str, identity: dict[str, Any]
) -> None:
    """Refuse to make an array of some shards otherwise than that of the others was made.

    Raises:
        ConfigError: says what differs.
    """
    mine = {array_path(shard, name, kind) for shard in shards}
    for path, info in array_records(store, name, kind):
        if path not in mine:
            compare(info.get("identity", {}), identity, str(path),
                    "give another --name, or the same options, or --overwrite for every shard")


def verify_store(prefix: str) -> tuple[TokenStore, int]:
    """Hash every byte of a store and of the arrays beside it.

    Returns:
        The store, and how many arrays it has.
    Raises:
        DataError: names the first file that is not as written.
    """
    store, num_arrays = TokenStore.open(prefix, verify=True), 0
    for shard in store.shards:
        arrays = [(name, kind) for kind in ARRAYS for name in sorted(_array_names(shard, kind))]
        if json_of(array_path(shard, "", "importance")).is_file():
            arrays.append(("", "importance"))
        for name, kind in arrays:
            open_array(shard, name, kind, verify=True)
        num_arrays += len(arrays)
    return store, num_arrays
