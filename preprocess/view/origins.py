"""Read what the JSON beside an array records: how it was made, and from which others."""

from __future__ import annotations

from typing import Any

from preprocess.errors import DataError
from preprocess.identity import shorten_digests
from preprocess.masking import ARRAY_NEEDS, STRATEGIES
from preprocess.store import TokenStore, open_array
from preprocess.text.continuations import WordTable
from preprocess.view.pieces import printable

# Of an array's JSON, what tells nothing about how it was made.
FORMAT_KEYS = {"format_version", "name", "kind", "count", "sha256", "store_fingerprint",
               "json_sha256"}


def describe(store: TokenStore, name: str, kind: str) -> list[str]:
    """Write what the JSON beside an array records, one line per key."""
    infos = [open_array(shard, name, kind)[1] for shard in store.shards]
    described = isinstance(infos[0].get("measure"), dict)  # an option of its name says less
    lines: list[str] = []

    def add(entries: dict[str, Any]) -> None:
        for key, value in entries.items():
            if key == "measure" and isinstance(value, dict):
                what = "above 0 is important" if value.get("boundary") else "no boundary at 0"
                lines.append(printable(
                    f"measure: {value.get('name')}, in {value.get('unit')}; {what}"))
            elif isinstance(value, dict):
                add(value)
            elif key not in FORMAT_KEYS and value is not None and not (
                    key == "measure" and described):
                lines.append(printable(f"{key}: {_brief(value)}"))

    add(infos[0])  # shards differ only in the content of their sources
    strategy = _options(infos[0]).get("strategy")
    if strategy in STRATEGIES:
        lines.append(f"rule: {STRATEGIES[strategy].rule}")
    if kind == "mask":
        count = sum(info["count"] for info in infos)
        lines.append(f"masked: {count:,} of {store.num_tokens:,} tokens")
    return list(dict.fromkeys(lines))  # options and identity have some in common


def _brief(value: Any) -> str:
    """Write a number of operations without a fraction, and of a digest as much as tells it apart.
    """
    if isinstance(value, float) and value.is_integer():
        return f"{value:,.0f}"
    return shorten_digests(str(value))


def _options(info: dict[str, Any]) -> dict[str, Any]:
    """Return the options that an index was made with, as far as its JSON records them."""
    options = info.get("options")
    return options if isinstance(options, dict) else {}


def _recorded(store: TokenStore, index: str, key: str, kind: str) -> str | None:
    """Return the name of the array that an index was made from, recorded in its options as `key`.

    None if there is none, or if it was removed or replaced since.
    """
    options = [_options(open_array(shard, index, "mask")[1]) for shard in store.shards]
    # build_masks.py records `NAME (sha256 0123456789abcdef)`.
    name, _, digest = str(options[0].get(key) or "").partition(" ")
    if not name:
        return None
    try:
        found = [open_array(shard, name, kind)[1] for shard in store.shards]
    except DataError:
        return None
    unchanged = all(f"sha256 {info['sha256'][:16]}" in str(option.get(key))
                    for info, option in zip(found, options, strict=True))
    return name if unchanged or not digest else None


def source_scores(store: TokenStore, index: str) -> str | None:
    """Return the name of the scores that an index was chosen by, also through a matched index.

    None if there are none, or if an array on the way was removed or replaced since.
    """
    seen: set[str] = set()
    while index not in seen:
        seen.add(index)
        options = _options(open_array(store.shards[0], index, "mask")[1])
        if options.get("scores"):
            return _recorded(store, index, "scores", "scores")
        matched = _recorded(store, index, "match", ARRAY_NEEDS["match"])
        if matched is None:
            return None
        index = matched
    return None


def open_units(
    store: TokenStore, index: str | None, strategy: str | None, words: WordTable | None
) -> list[dict[str, Any]]:
    """Return, of each shard, what is one unit to an index, as `Marks` takes it.

    Args:
        index: or None for drawn masks. strategy: that chose the positions, if it is known.
        words: how words join; None where they cannot be told apart.
    """
    units = None
    if index is not None:
        options = _options(open_array(store.shards[0], index, "mask")[1])
        strategy = options.get("strategy")
        units = _recorded(store, index, "units", "units")
    if units is not None:
        return [{"units": open_array(shard, units, "units")[0]} for shard in store.shards]
    record = STRATEGIES.get(str(strategy))
    runs = record is not None and record.spans
    return [{"units": words, "runs": runs} for _ in store.shards]
