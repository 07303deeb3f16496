"""Where the seconds of a start go, from typing a command to its first step."""

from __future__ import annotations

import os
import time
from pathlib import Path


class Startup:
    """A clock that started with this process; `lap` names what has been done since the last one.

    `str` of it is one line: "start 9.8 s: imports 5.2, inputs 0.9, process group 0.4, ...".
    """

    def __init__(self) -> None:
        self._last = time.monotonic() - _age()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._laps.items())
        return f"start {sum(self._laps.values()):.1f} s: {parts}"


def _age() -> float:
    """Return the seconds since this process was started; 0 where the system does not say."""
    try:
        # After the name in parentheses, which may hold blanks: field 22 is the start since boot.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
