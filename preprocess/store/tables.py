"""Tables beside a store, kept under a fingerprint: the row table of `train/data/rows.py`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from preprocess.errors import DataError
from preprocess.files import (
    json_bytes,
    remove_leftovers,
    seal,
    sync,
    temporary_path,
    write_temporary,
)
from preprocess.store.layout import FORMAT_VERSION, ColumnWriter, open_column, read_sealed
from preprocess.store.reader import TokenStore


class TableWriter:
    """Write several columns block by block: `P.COLUMN.npy`, and `P.json` last.

    Tables are a cache of what follows from a store: `open_table` returns None for anything odd.
    As a context manager the writer closes itself, or leaves nothing behind after an exception.

    Args:
        prefix: of the table; the caller holds its lock.
        columns: dtype of each column.
        key: all that the table follows from.
    """

    def __init__(self, prefix: str, columns: dict[str, np.dtype], key: str) -> None:
        self._json, self._key = Path(prefix + ".json"), key
        paths = {name: Path(f"{prefix}.{name}.npy") for name in columns}
        self._columns: dict[str, ColumnWriter] = {}
        remove_leftovers(self._json, *paths.values())
        try:
            for name, path in paths.items():
                self._columns[name] = ColumnWriter(path, columns[name])
        except BaseException:
            self._abort()
            raise

    def add(self, name: str, block: np.ndarray) -> None:
        """Append `(n,)` values to a column."""
        self._columns[name].add(block)

    def _close(self) -> None:
        columns = {name: column.close() for name, column in self._columns.items()}
        entry = {"format_version": FORMAT_VERSION, "key": self._key, "columns": columns}
        write_temporary(self._json, json_bytes(seal(entry)))
        self._json.unlink(missing_ok=True)
        for path in (*(column.path for column in self._columns.values()), self._json):
            os.replace(temporary_path(path), path)
        sync(self._json.parent)

    def _abort(self) -> None:
        for column in self._columns.values():
            column.abort()
        temporary_path(self._json).unlink(missing_ok=True)

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
    """Map the columns that a `TableWriter` wrote; return None if they are not as written."""
    try:
        info = read_sealed(prefix + ".json", "")
        if info["key"] != key:
            return None
        return {
            name: np.asarray(open_column(
                store.prefix, Path(f"{prefix}.{name}.npy"), dtype, info["columns"][name], False, ""
            ))
            for name, dtype in columns.items()
        }
    except (OSError, DataError, KeyError, TypeError):
        return None
