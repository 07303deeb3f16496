"""Tables beside a store, kept under a fingerprint: the row table of `train/data/rows.py`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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


@contextmanager
def write_table(
    prefix: str, columns: dict[str, np.dtype], key: str
) -> Iterator[dict[str, ColumnWriter]]:
    """Write several columns block by block: `P.COLUMN.npy`, and `P.json` last.

    Tables are a cache of what follows from a store: `open_table` returns None for anything odd.
    After an exception in its block nothing is left behind.

    Args:
        prefix: of the table; the caller holds its lock.
        columns: dtype of each column.
        key: all that the table follows from.
    Yields:
        The writer of each column.
    """
    json_path = Path(prefix + ".json")
    paths = {name: Path(f"{prefix}.{name}.npy") for name in columns}
    remove_leftovers(json_path, *paths.values())
    with ExitStack() as at_end:
        at_end.callback(temporary_path(json_path).unlink, missing_ok=True)
        writers = {}
        for name, path in paths.items():
            writers[name] = ColumnWriter(path, columns[name])
            at_end.callback(writers[name].abort)
        yield writers
        written = {name: writer.close() for name, writer in writers.items()}
        entry = {"format_version": FORMAT_VERSION, "key": key, "columns": written}
        write_temporary(json_path, json_bytes(seal(entry)))
        json_path.unlink(missing_ok=True)
        for path in (*paths.values(), json_path):
            os.replace(temporary_path(path), path)
        sync(json_path.parent)


def open_table(
    store: TokenStore, prefix: str, columns: dict[str, np.dtype], key: str
) -> dict[str, np.ndarray] | None:
    """Map the columns that `write_table` wrote; return None if they are not as written."""
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
