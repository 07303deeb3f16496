"""Tables beside a store, kept under a fingerprint: the row table of `train/data/rows.py`."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.errors import DataError, writing
from preprocess.files import (
    json_bytes,
    remove_leftovers,
    seal,
    sync,
    temporary_path,
    write_all,
    write_whole,
)
from preprocess.store.layout import (
    FORMAT_VERSION,
    NPY_HEADER_BYTES,
    check_content,
    map_file,
    npy_header,
    read_sealed,
)
from preprocess.store.reader import TokenStore


class TableWriter:
    """Write several columns that are made block by block: `P.COLUMN.npy`, and `P.json` last.

    A cache of what follows from a store: `open_table` gives None for anything odd. As a context
    manager it closes, or leaves nothing behind after an exception.

    Args:
        prefix: of the table; the caller holds its lock.
        columns: dtype of each column.
        key: all that the table follows from.
    """

    def __init__(self, prefix: str, columns: dict[str, np.dtype], key: str) -> None:
        self._json, self._key, self._columns = Path(prefix + ".json"), key, columns
        self._paths = {name: Path(f"{prefix}.{name}.npy") for name in columns}
        self._counts = dict.fromkeys(columns, 0)
        self._hashes = {name: hashlib.sha256() for name in columns}
        self._streams: dict[str, Any] = {}
        try:
            remove_leftovers(self._json, *self._paths.values())
            for name, path in self._paths.items():
                with writing(path):
                    self._streams[name] = open(temporary_path(path), "wb", buffering=0)
                self._streams[name].seek(NPY_HEADER_BYTES)
        except BaseException:
            self._abort()
            raise

    def add(self, name: str, block: np.ndarray) -> None:
        """Append to a column."""
        data = np.ascontiguousarray(block, self._columns[name]).tobytes()
        with writing(self._paths[name], len(data)):
            write_all(self._streams[name], data)
        self._hashes[name].update(data)
        self._counts[name] += len(block)

    def _close(self) -> None:
        for name, path in self._paths.items():
            with writing(path, NPY_HEADER_BYTES), self._streams[name] as stream:
                stream.seek(0)
                write_all(stream, npy_header(self._columns[name], self._counts[name]))
                os.fsync(stream.fileno())
        columns = {
            name: {"count": self._counts[name], "sha256": self._hashes[name].hexdigest()}
            for name in self._columns
        }
        entry = {"format_version": FORMAT_VERSION, "key": self._key, "columns": columns}
        write_whole(temporary_path(self._json), json_bytes(seal(entry)), self._json)
        self._json.unlink(missing_ok=True)
        for path in (*self._paths.values(), self._json):
            os.replace(temporary_path(path), path)
        sync(self._json.parent)

    def _abort(self) -> None:
        for stream in self._streams.values():
            stream.close()
        for path in (*self._paths.values(), self._json):
            temporary_path(path).unlink(missing_ok=True)

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, kind: type | None, *rest: object) -> None:
        try:
            if kind is None:
                self._close()
        finally:
            self._abort()


def open_table(
    store: TokenStore, prefix: str, columns: dict[str, np.dtype], key: str
) -> dict[str, np.ndarray] | None:
    """Map the columns that a `TableWriter` wrote, or give None if they are not as it wrote them."""
    try:
        info = read_sealed(prefix + ".json", "")
        if info["key"] != key:
            return None
        found = {}
        for name, dtype in columns.items():
            path, count = Path(f"{prefix}.{name}.npy"), info["columns"][name]["count"]
            with open(path, "rb") as stream:
                header, size = stream.read(NPY_HEADER_BYTES), os.fstat(stream.fileno()).st_size
            if header != npy_header(dtype, count) or (
                size != NPY_HEADER_BYTES + count * dtype.itemsize
            ):
                return None
            sha256 = info["columns"][name]["sha256"]
            check_content(store.prefix, path, NPY_HEADER_BYTES, sha256, verify=False)
            found[name] = np.asarray(map_file(str(path), dtype, count, NPY_HEADER_BYTES))
        return found
    except (OSError, DataError, KeyError, TypeError):
        return None
