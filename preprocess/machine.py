"""Facts about this machine and this checkout, recorded beside results."""

from __future__ import annotations

import os
import platform
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
    command = ["git", "-C", str(Path(__file__).resolve().parent.parent), "describe", "--always",
               "--exclude=*", "--abbrev=40", "--dirty=+"]
    try:
        named = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return named.stdout.strip() if named.returncode == 0 else None


def environment(packages: Iterable[str] = ()) -> dict[str, Any]:
    """Return processor, cores, memory in bytes, versions, commit and time, as plain values.

    Args:
        packages: names of distributions whose versions count; those not installed are left out.
    """
    processor, versions = platform.processor(), {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.split(":", 1)[1].strip()
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "processor": processor,
        "cpus": num_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
