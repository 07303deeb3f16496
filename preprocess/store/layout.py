"""The formats of a token store: headers, limits, sealed JSON, and what is remembered of a file."""

from __future__ import annotations

import os
import re
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.errors import DataError
from preprocess.files import (
    file_sha256,
    json_bytes,
    read_json,
    seal,
    temporary_path,
)

FORMAT_VERSION = 2
MAX_VOCAB = 1 << 16  # ids are uint16
MAX_SHARD_TOKENS = (1 << 32) - 1  # mask indices are uint32
SETTLED_NS = 60 * 10**9  # age from which a file's times tell whether it has changed since
SPECIAL_NAMES = ("cls", "sep", "pad", "mask", "unk")

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document indices
DTYPES: dict[int, np.dtype[Any]] = {8: np.dtype("<u2"), 4: np.dtype("<i4"), 5: np.dtype("<i8")}
OUR_DTYPE = 8
SHA256 = re.compile(r"[0-9a-f]{64}")
_NPY_MAGIC = b"\x93NUMPY\x01\x00"
BLOCK_ENTRIES = 1 << 18  # of an index, at a time
NPY_HEADER_BYTES = 128  # what numpy itself takes for one axis


def read_sealed(path: str | Path, again: str) -> dict[str, Any]:
    """Read a JSON that `seal` made; one that was changed since is a `DataError`."""
    info = read_json(path)
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
    """Keep in `P.memo.json` what took time to work out.

    A cache: a disk that may only be read, or another process that writes at the same moment, loses
    it. Nothing is brought to the disk by force, or opening many shards would wait for it.
    """
    path = Path(f"{prefix}.memo.json")
    temporary = temporary_path(path)
    try:
        known = read_sealed(path, "") if path.exists() else {}
    except DataError:
        known = {}
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
    """Hash a file from byte `start` on, unless that was done since it changed last.

    Args:
        prefix: of the store or shard that remembers it.
        verify: hash it in any case.
        check: what else is to be looked at before the content may be trusted.
    Raises:
        DataError: the content is not what was written.
    """
    status = os.stat(path)
    identity = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, sha256]
    if not verify and recall(prefix, path.name) == identity:
        return
    if file_sha256(path, start) != sha256:
        raise DataError(f"{path}: its content is not what {path.stem}.json says (sha256); {again}")
    check()
    # What was written just now may change once more without a later time stamp; and the clock of
    # a file server may be another one.
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED_NS:
        remember(prefix, path.name, identity)


def shard_prefix(prefix: str, index: int, count: int) -> str:
    """Return the prefix of shard `index` of `count`."""
    return f"{prefix}-{index:05d}-of-{count:05d}"


def map_file(path: str, dtype: np.dtype, count: int, offset: int = 0, kind: Any = np.memmap) -> Any:
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


def is_name(name: Any) -> bool:
    """Whether a name stays in its folder."""
    return isinstance(name, str) and "\0" not in name and name not in ("", ".", "..") and (
        os.path.basename(name) == name
    )


def npy_header(dtype: np.dtype, count: int) -> bytes:
    """Return the header of a `.npy` file, version 1.0: the only bytes that are accepted.

    numpy writes the same ones. Since they follow from dtype and count, nothing of a file is ever
    parsed, and no pickle can hide in one.
    """
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({count},), }}"
    size = NPY_HEADER_BYTES - len(_NPY_MAGIC) - 2
    return _NPY_MAGIC + struct.pack("<H", size) + text.ljust(size - 1).encode() + b"\n"


def same_files(folder: Path, files: Any) -> bool:
    try:
        return {p.name: file_sha256(p) for p in folder.iterdir() if p.is_file()} == files
    except OSError:
        return False
