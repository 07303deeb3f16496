"""Start commands of ours: in this process, as a process, or under the launcher."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fresh_environment() -> dict[str, str]:
    """Return the environment without the rank and port that a test in this process has left."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    return {key: value for key, value in os.environ.items() if key not in ours}


def launch_environment() -> dict[str, str]:
    """What a command started by a test sees."""
    return fresh_environment() | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def run(*command: str, ranks: int = 0, check: bool = True) -> subprocess.CompletedProcess:
    """Run a command of ours: with `python`, or under `deepspeed` on `ranks` ranks."""
    launcher = [sys.executable]
    if ranks:
        launcher = [
            sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks),
            "--master_port", str(free_port()),
        ]
    done = subprocess.run(
        [*launcher, *map(str, command)], cwd=ROOT, env=launch_environment(), text=True,
        capture_output=True, timeout=600,
    )
    if check and done.returncode:
        raise AssertionError(f"{command} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def run_in_this_process(script: str | Path, *flags: str) -> None:
    """Run the `main` of a command of ours here: as typed, without the seconds of its imports."""
    import importlib

    name = ".".join(Path(script).resolve().relative_to(ROOT).with_suffix("").parts)
    module = importlib.import_module(name)
    with pytest.MonkeyPatch.context() as patch:
        # A second process group in one process is beyond DeepSpeed: keep the first.
        for user in ("engine", "finetune", "fit_scorer"):
            patch.setattr(f"train.{user}.finish", lambda: None)
        module.main([str(flag) for flag in flags])
