"""The formats of a token store: limits, headers, sealed JSON, columns, and the memo of checks."""

from __future__ import annotations

import hashlib
import os
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.errors import DataError
from preprocess.files import (
    create_temporary,
    file_sha256,
    finish,
    json_bytes,
    read_json,
    seal,
    temporary_path,
    write_all,
)

FORMAT_VERSION = 2
MAX_VOCAB = 1 << 16  # ids are uint16
MAX_SHARD_TOKENS = (1 << 32) - 1  # mask indices are uint32
SETTLED_NS = 60 * 10**9  # age from which the times of a file show whether it has changed
SPECIAL_NAMES = ("cls", "sep", "pad", "mask", "unk")

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document indices
DTYPES: dict[int, np.dtype[Any]] = {8: np.dtype("<u2"), 4: np.dtype("<i4"), 5: np.dtype("<i8")}
OUR_DTYPE = 8
_NPY_MAGIC = b"\x93NUMPY\x01\x00"
BLOCK_ENTRIES = 1 << 18  # of an index, at a time
NPY_HEADER_BYTES = 128  # what numpy itself takes for one axis


def read_sealed(path: str | Path, again: str) -> dict[str, Any]:
    """Read a JSON that `seal` made; one that has changed since is a `DataError`."""
    info = read_json(path, again)
    if info.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{path}: format version {info.get('format_version')!r}; this program reads "
            f"{FORMAT_VERSION}; {again}"
        )
    if seal(info) != info:
        raise DataError(f"{path}: its content is not what was written (json_sha256); {again}")
    return info


def recall(prefix: str, key: str) -> Any:
    """Return what `remember` kept under `key`, or None."""
    try:
        return read_sealed(f"{prefix}.memo.json", "").get(key)
    except (OSError, DataError):
        return None


def remember(prefix: str, key: str, value: Any) -> None:
    """Keep a value that took time to compute in `P.memo.json`.

    This is a cache: a read-only disk, or another process that writes at the same moment, loses the
    value. Nothing is synced, or opening many shards would wait for the disk.
    """
    path = Path(f"{prefix}.memo.json")
    temporary = temporary_path(path)
    known: dict[str, Any] = {}
    with suppress(OSError, DataError):
        known = read_sealed(path, "")
    try:
        entry = {**known, key: value, "format_version": FORMAT_VERSION}
        temporary.write_bytes(json_bytes(seal(entry)))
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_content(
    prefix: str, path: Path, start: int, sha256: str, verify: bool,
    check: Callable[[], None] = lambda: None, again: str = "make it again",
) -> None:
    """Hash a file from byte `start` on, unless it has been hashed since its last change.

    Args:
        prefix: of the store or shard that remembers the result.
        verify: hash the file in any case.
        check: further checks before the content may be trusted.
    Raises:
        DataError: the content is not the one that was written.
    """
    status = os.stat(path)
    identity = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, sha256]
    if not verify and recall(prefix, path.name) == identity:
        return
    if file_sha256(path, start) != sha256:
        raise DataError(f"{path}: its content is not what {path.stem}.json says (sha256); {again}")
    check()
    # A file written just now may change once more within the same time stamp, and the clock of a
    # file server may differ from ours.
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED_NS:
        remember(prefix, path.name, identity)


def shard_prefix(prefix: str, index: int, count: int) -> str:
    """Return the prefix of shard `index` of `count`."""
    return f"{prefix}-{index:05d}-of-{count:05d}"


def map_file(path: str, dtype: np.dtype, count: int, offset: int = 0, kind: Any = np.memmap) -> Any:
    """Map `count` values of a file, read-only, `(count,)` of `dtype`."""
    if count == 0:  # an empty file cannot be mapped
        empty = np.empty(0, dtype)
        empty.flags.writeable = False
        return empty
    return kind(path, dtype=dtype, mode="r", offset=offset, shape=(count,))


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate `arange(start, start + length)`.

    # starts 5 0, lengths 2 3 -> 5 6 0 1 2
    """
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


def npy_header(dtype: np.dtype, count: int) -> bytes:
    """Return the header of a `.npy` file, version 1.0: the only bytes that are accepted.

    numpy writes the same ones. Since they follow from dtype and count, no header is ever parsed,
    and no pickle can hide in a file.
    """
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({count},), }}"
    size = NPY_HEADER_BYTES - len(_NPY_MAGIC) - 2
    return _NPY_MAGIC + struct.pack("<H", size) + text.ljust(size - 1).encode() + b"\n"


class ColumnWriter:
    """Write a `.npy` file of one axis under its temporary name, block by block."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.path, self._dtype = path, dtype
        self.count, self._hash = 0, hashlib.sha256()
        self.stream = create_temporary(path)
        self.stream.seek(NPY_HEADER_BYTES)

    def add(self, block: np.ndarray) -> None:
        """Append `(n,)` values."""
        data = np.ascontiguousarray(block, self._dtype).tobytes()
        write_all(self.stream, data, self.path)
        self._hash.update(data)
        self.count += len(block)

    def close(self) -> dict[str, Any]:
        """Complete and sync the file; return its count and the sha256 of its values."""
        self.stream.seek(0)
        write_all(self.stream, npy_header(self._dtype, self.count), self.path)
        finish(self.stream, self.path)
        return {"count": self.count, "sha256": self._hash.hexdigest()}

    def abort(self) -> None:
        """Remove the temporary file, if it is still there."""
        self.stream.close()
        temporary_path(self.path).unlink(missing_ok=True)


def open_column(
    prefix: str, path: Path, dtype: np.dtype, entry: dict[str, Any], verify: bool, again: str
) -> np.ndarray:
    """Map a `.npy` file of one axis, read-only, after a check of its size and content.

    Args:
        prefix: of the store or shard that remembers the result.
        entry: the JSON entry of the file, with `count` and `sha256`.
        verify, again: as for `check_content`.
    """
    count = entry["count"]
    with open(path, "rb") as stream:
        header, size = stream.read(NPY_HEADER_BYTES), os.fstat(stream.fileno()).st_size
    if header != npy_header(dtype, count) or size != NPY_HEADER_BYTES + count * dtype.itemsize:
        raise DataError(
            f"{path}: its {size:,} bytes, or its header, do not match the {count:,} values of "
            f"{dtype} in {path.stem}.json; {again}"
        )
    check_content(prefix, path, NPY_HEADER_BYTES, entry["sha256"], verify, again=again)
    return map_file(str(path), dtype, count, NPY_HEADER_BYTES)


def same_files(folder: Path, files: Any) -> bool:
    """Return whether the files of a folder have these sha256, `{name: sha256}`."""
    try:
        return {p.name: file_sha256(p) for p in folder.iterdir() if p.is_file()} == files
    except OSError:
        return False
