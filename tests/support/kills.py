"""Kill a process before a chosen change of its files."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def count_operations(folder: str, fatal: int) -> list[str]:
    """Count what changes the files below a folder; die before number `fatal`, from 1.

    After every such operation a kill finds the disk in another state.
    """
    counted: list[str] = []
    changes = {"os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 2, "os.truncate": None}

    def note(name: str, path: str) -> None:
        if path.startswith(folder):
            counted.append(f"{name} {path.removeprefix(folder)}")
            if len(counted) == fatal:
                die()

    def hook(event: str, words: tuple[Any, ...]) -> None:
        if event in changes:
            where = changes[event]
            parent = -1 if where is None else words[where]
            parts = [os.readlink(f"/proc/self/fd/{parent}")] if parent >= 0 else []
            note(event, "/".join([*parts, str(words[0])]))
        elif event == "open" and isinstance(words[2], int) and words[2] & WRITES:
            note(event, str(words[0]))

    plain = os.fsync

    def sync(descriptor: int) -> None:
        note("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        plain(descriptor)

    os.fsync = sync
    sys.addaudithook(hook)
    return counted
