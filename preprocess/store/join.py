"""The JSON that makes complete shards one store."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from preprocess.errors import DataError
from preprocess.files import (
    WriterLock,
    atomic_write_json,
    fingerprint_text,
    remove_leftovers,
    seal,
)
from preprocess.store.layout import FORMAT_VERSION, shard_prefix
from preprocess.store.reader import read_store_json

# To wait for others that join the same shards. Each takes milliseconds, but they may be thousands.
JOIN_SECONDS = 60.0


def join_shards(prefix: str, count: int, made: tuple[str, str] | None = None) -> str:
    """Write `P.json` if all `count` shards are complete and alike; else return what is missing.

    Only the JSONs of the shards are read. Any number of processes may call this at once: each does
    so after its own shard is complete, so the last one finds them all. While a store is replaced
    shard by shard, old and new shards stand side by side for a while; that is no error here.

    Args:
        made: prefix and fingerprint of the shard that the caller has just made; it is enough that
            another process has listed it.
    Raises:
        ConfigError: another process was writing a store of one piece here all the while.
    """
    waiting, joined = _describe_shards(prefix, count)
    if waiting or _listed(prefix) == joined:
        return waiting  # most processes only look, and lock nothing
    with WriterLock(prefix, JOIN_SECONDS):
        if made is not None:
            entry = {"name": Path(made[0]).name, "fingerprint": made[1]}
            if entry in _listed(prefix).get("shards", []):
                return ""
        remove_leftovers(prefix + ".json")
        waiting, joined = _describe_shards(prefix, count)
        if not waiting:
            atomic_write_json(prefix + ".json", joined)
        return waiting


def _listed(prefix: str) -> dict[str, Any]:
    """Return the content of `P.json`, or nothing."""
    with suppress(DataError, FileNotFoundError):
        return read_store_json(prefix)
    return {}


def _describe_shards(prefix: str, count: int) -> tuple[str, dict[str, Any]]:
    """Return what a store of shards waits for, or "" and the content of its `P.json`."""
    prefixes = [shard_prefix(prefix, i, count) for i in range(count)]
    missing = [p for p in prefixes if not os.path.exists(p + ".json")]
    infos = []
    for path in prefixes if not missing else ():
        try:
            infos.append(read_store_json(path))
        except (DataError, FileNotFoundError):
            if os.path.exists(path + ".json"):
                raise
            missing = [path]  # another process has just begun to replace it
            break
    if missing:
        return f"{len(missing)} of {count} shards are missing, the first is {missing[0]}", {}
    for path, info in zip(prefixes, infos, strict=True):
        for key in ("tokenizer", "options"):
            if info.get(key) != infos[0].get(key):
                return f"{path} was made with other {key} than {prefixes[0]}", {}
    counts: Counter[str] = Counter()
    for info in infos:
        counts.update(info["counts"])
    prints = [info["fingerprint"] for info in infos]
    return "", seal({
        "format_version": FORMAT_VERSION,
        "tokenizer": infos[0]["tokenizer"],
        "options": infos[0]["options"],
        "counts": counts,
        "shards": [
            {"name": Path(p).name, "fingerprint": f} for p, f in zip(prefixes, prints, strict=True)
        ],
        "fingerprint": fingerprint_text(*prints),
    })
