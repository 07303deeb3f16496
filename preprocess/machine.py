"""Facts about this machine and this checkout, recorded beside results."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def commit() -> str | None:
    """Return the commit of these sources, with "+" if they differ from it; None outside a clone."""
    if not (Path(__file__).parents[1] / ".git").exists():  # git would name whatever is around us
        return None
    git = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(
            git, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True).strip()
    return None


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of distributions, by name; those not installed are left out."""
    found = {}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def environment(packages: Iterable[str] = ()) -> dict[str, Any]:
    """Return processor, cores, memory in bytes, versions, commit and time, as plain values.

    Args:
        packages: as of `versions`.
    """
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return {
        "processor": model[1] if model else platform.processor(),
        "cpus": num_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(packages),
        "commit": commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
