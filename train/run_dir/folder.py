"""The run directory: what may be written into it, its configuration and environment."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from preprocess import machine
from preprocess.errors import ConfigError, DataError
from preprocess.files import (
    WriterLock,
    atomic_write_bytes,
    atomic_write_json,
    read_json,
    wait_for_writer,
)
from train import engine as ds
from train.config import TrainingConfig, as_dict, command_line
from train.run_dir.identity import PACKAGES

# What a killed process may leave in a run directory, beside `checkpoints/*.tmp`: files and an
# export under their temporary names.
_LEFTOVER = re.compile(r"\.(.+\.tmp-\d+|hf(_step_\d+)?\..+)")
_LOCK = ".lock"
# Of two commands that begin at once, one waits so long for the other: it may have been asked to
# stop and be about to say so.
_WAIT_SECONDS = 5.0


# Choices that a run made by itself, of its first start: micro batch, compiling, sizes of padding.
EXECUTION = "execution.json"


@contextmanager
def sole_writer(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run directory; collective, and joins the process group.

    The first rank holds it for all. What was read there before may have changed since.

    Raises:
        ConfigError: another process writes there; on every rank.
    """
    ds.start()
    ds.barrier()  # else a rank that has yet to look takes the lock of rank 0 for another run's
    lock, refused = None, ""
    if ds.is_main():
        try:
            lock = WriterLock(f"{run_dir}/", _WAIT_SECONDS, "another --output_dir")
        except ConfigError as error:
            refused = str(error)
    try:
        refused = ds.gather_objects(refused)[0]
        if refused:
            raise ConfigError(refused)
        yield
    finally:
        if lock is not None:
            lock.release()


def prepare_run_dir(
    config: TrainingConfig, resolved: ds.Resolved | None, identity: dict[str, Any] | None = None,
    execution: dict[str, Any] | None = None,
) -> Path:
    """Check that the run directory may be written, and record options and environment in it.

    Args:
        execution: what this run found out about its machine, for `read_execution`.

    Collective, by a `sole_writer`: rank 0 writes once every rank has looked, or a slow rank would
    take the files of rank 0 for another run.

    Raises:
        ConfigError: it is not a run directory of ours, or holds a run under `--resume never`, or
            is not the same folder on all nodes.
    """
    run_dir = _check(config)
    ds.barrier()
    if ds.is_main():
        run_dir.mkdir(parents=True, exist_ok=True)
        for path in (*run_dir.glob(".*"), *run_dir.glob("seed_*/.*")):
            if _LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        text = yaml.safe_dump(as_dict(config), sort_keys=False)
        atomic_write_bytes(run_dir / "config.resolved.yaml", text.encode())
        if resolved is not None:
            atomic_write_json(run_dir / "ds_config.resolved.json", resolved.config)
        if execution is not None:
            atomic_write_json(run_dir / EXECUTION, execution)
        atomic_write_json(run_dir / "env.json", {**environment(), "identity": identity})
    # Checkpoints are written by all ranks into one folder: better said now than at the first save.
    blind = ds.nodes_without(run_dir)
    if blind:
        raise ConfigError(
            f"--output_dir {run_dir}: {', '.join(blind)} cannot see what the first node wrote "
            f"there; give a folder on a disk that all nodes share"
        )
    return run_dir


def read_execution(run_dir: Path) -> dict[str, Any]:
    """Return what the run in this directory had found out about its machine; {} for a new run."""
    path = run_dir / EXECUTION
    if not path.is_file():
        return {}
    found = read_json(path, "delete it")
    size, sizes = found.get("micro_batch_size", 1), found.get("sizes") or {}
    counts = [size, *sizes.values()] if isinstance(sizes, dict) else [0]
    if not all(type(n) is int and n > 0 for n in counts) or not isinstance(
            found.get("torch_compile"), bool | None):
        raise DataError(f"{path}: not as it was written; delete it")
    return found


def check_run_dir(config: TrainingConfig) -> Path:
    """Do the checks of `prepare_run_dir` without writing anything.

    Raises:
        ConfigError: as there; or another process writes there, and this is no `--dry_run`.
    """
    run_dir = Path(config.output_dir)
    if not config.dry_run:
        # Before the process group starts, whose port a run that is stopping may still have.
        wait_for_writer(f"{run_dir}/", _WAIT_SECONDS, "another --output_dir")
    return _check(config)


def _check(config: TrainingConfig) -> Path:
    run_dir = Path(config.output_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"--output_dir {run_dir}: is a file; give a folder")
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" not in os.environ and tasks != "1":
        # `srun -n 8 python train/...`: eight runs, each of one rank, in one run directory.
        raise ConfigError(
            f"srun has started {tasks} tasks that have no RANK, and each would train alone; let "
            "srun start one launcher per node (deepspeed --no_ssh or torchrun), as train/README.md "
            "shows"
        )
    names = os.listdir(run_dir) if run_dir.is_dir() else []
    entries = {name for name in names if name != _LOCK and not _LEFTOVER.fullmatch(name)}
    if entries and "config.resolved.yaml" not in entries:
        raise ConfigError(
            f"--output_dir {run_dir}: not empty and not a run of ours; give another folder"
        )
    if entries and config.resume == "never":
        raise ConfigError(
            f"--output_dir {run_dir}: holds a run already, and --resume is never; give another "
            "folder, or --resume auto to go on"
        )
    return run_dir


def environment() -> dict[str, Any]:
    """Return machine, versions, command and time, for `env.json`."""
    import torch

    return {
        **machine.environment(PACKAGES),
        "command": command_line(),
        "world_size": ds.ranks().world_size,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
