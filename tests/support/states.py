"""The files of a checkpoint, value by value."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every plain value and tensor of nested containers and objects, by its path."""
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{where}.{key}")
    elif isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        for i, inner in enumerate(value):
            yield from leaves(inner, f"{where}[{i}]")
    elif hasattr(value, "__dict__") and not isinstance(value, torch.Tensor):
        yield from leaves(vars(value), where)
    else:
        yield where, value


def states(checkpoint: Path) -> dict[str, Any]:
    """Return every value in the files of a checkpoint, except for durations."""
    found = {}
    for file in sorted(checkpoint.rglob("*.pt")):
        content = torch.load(file, map_location="cpu", weights_only=False)
        found |= {f"{file.name}{path}": value for path, value in leaves(content)}
    return {key: value for key, value in found.items() if not key.endswith("seconds")}


def assert_same_bits(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[key]), key
        else:
            assert value == other[key], key


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.canary,)
