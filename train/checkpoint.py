"""What makes a checkpoint valid, and what a run directory holds.

A checkpoint is written to `checkpoints/step_N.tmp`; a manifest with the size and sha256 of each
file follows, then the folder is renamed and `latest` is replaced. Loading takes the newest
checkpoint whose files all agree with its manifest and says which ones it passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from preprocess.errors import ConfigError, DataError
from preprocess.store import atomic_write_bytes, atomic_write_json, file_sha256
from train import engine as ds
from train.config import TrainingConfig, as_dict, command_line
from train.metrics import say

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1


# --------------------------------------------------------------------------------- run directory


def prepare_run_dir(config: TrainingConfig, resolved: ds.Resolved | None) -> Path:
    """Check that the run directory may be written, and record options and environment in it.

    Rank 0 writes; call before the process group starts.

    Raises:
        ConfigError: it is not a run directory of ours, or holds a run under `--resume never`.
    """
    run_dir = check_run_dir(config)
    if not ds.is_main():
        return run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(as_dict(config), sort_keys=False)
    atomic_write_bytes(run_dir / "config.resolved.yaml", text.encode())
    if resolved is not None:
        atomic_write_json(run_dir / "ds_config.resolved.json", resolved.config)
    atomic_write_json(run_dir / "env.json", environment())
    return run_dir


def check_run_dir(config: TrainingConfig) -> Path:
    """The checks of `prepare_run_dir`, without writing anything."""
    run_dir = Path(config.output_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"--output_dir {run_dir}: is a file; give a folder")
    entries = set(os.listdir(run_dir)) if run_dir.is_dir() else set()
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
    """Machine, versions, command and time, for `env.json`."""
    import torch

    names = ("torch", "deepspeed", "transformers", "numpy", "selmask")
    installed = {dist.metadata["Name"]: dist.version for dist in metadata.distributions()}
    return {
        "command": command_line(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "world_size": ds.ranks().world_size,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: installed[name] for name in names if name in installed},
    }


# ----------------------------------------------------------------------------------- checkpoints


def save_checkpoint(
    engine: Any, run_dir: str | Path, step: int, client_state: dict[str, Any], limit: int
) -> Path:
    """Commit a checkpoint of `step`, then remove the oldest beyond `limit`; collective."""
    folder = Path(run_dir) / "checkpoints"
    final, temporary = folder / f"step_{step}", folder / f"step_{step}.tmp"
    if ds.is_main():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    ds.barrier()
    ds.save_state(engine, temporary, {**client_state, "step": step})
    ds.barrier()
    if ds.is_main():
        _commit(temporary, final, step)
        _prune(folder, limit)
    ds.barrier()
    return final


def _commit(temporary: Path, final: Path, step: int) -> None:
    """Write the manifest, rename the folder, replace `latest`."""
    files = {}
    for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        name = path.relative_to(temporary).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    manifest = {
        "version": MANIFEST_VERSION, "step": step, "world_size": ds.ranks().world_size,
        "files": files,
    }
    atomic_write_json(temporary / MANIFEST, manifest)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(temporary, final)
    atomic_write_bytes(final.parent.parent / "latest", f"{final.name}\n".encode())


def _steps(folder: Path) -> list[int]:
    """Steps of the committed checkpoints, newest first."""
    names = (p.name for p in folder.glob("step_*") if p.name[5:].isdigit())
    return sorted((int(name[5:]) for name in names), reverse=True)


def _prune(folder: Path, limit: int) -> None:
    """Remove the oldest checkpoints beyond `limit`; the newest was verified by writing it."""
    for step in _steps(folder)[limit:]:
        shutil.rmtree(folder / f"step_{step}")


def check_checkpoint(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    manifest_file = path / MANIFEST
    if not manifest_file.is_file():
        return f"{manifest_file} is missing"
    try:
        files = json.loads(manifest_file.read_text())["files"]
        for name, entry in files.items():
            file = path / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                return f"{manifest_file} names {name}, outside the checkpoint"
            if not file.is_file():
                return f"{file} is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{file} has {file.stat().st_size} bytes, not {entry['bytes']}"
            if file_sha256(file) != entry["sha256"]:
                return f"{file} differs from its sha256"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{manifest_file} is damaged"
    return None


def find_checkpoint(run_dir: str | Path, mode: str) -> Path | None:
    """The newest whole checkpoint of a run, or None.

    Args:
        mode: auto, must or never, as `--resume`.
    Raises:
        DataError: `must`, and there is none.
    """
    if mode == "never":
        return None
    folder = Path(run_dir) / "checkpoints"
    for step in _steps(folder) if folder.is_dir() else []:
        path = folder / f"step_{step}"
        problem = check_checkpoint(path)
        if problem is None:
            return path
        say(f"warning: checkpoint {path} passed over: {problem}")
    if mode == "must":
        raise DataError(
            f"{folder}: no whole checkpoint, and --resume is must; type --resume auto to start anew"
        )
    return None


def load_checkpoint(
    engine: Any, path: Path, identity: dict[str, Any]
) -> dict[str, Any]:
    """Load a checkpoint and check that it belongs to this run; collective.

    Args:
        identity: what must not change between the parts of a run (fingerprints, seed, ...).
    Raises:
        ConfigError: something of it did, or the number of ranks.
    """
    manifest = json.loads((path / MANIFEST).read_text())
    if manifest["world_size"] != ds.ranks().world_size:
        raise ConfigError(
            f"{path}: written by {manifest['world_size']} ranks, and there are "
            f"{ds.ranks().world_size}; start as many"
        )
    client_state = ds.load_state(engine, path)
    saved = client_state.get("identity", {})
    for key, value in identity.items():
        if saved.get(key) != value:
            raise ConfigError(
                f"{path}: made with {key} {saved.get(key)}, and this run has {value}; give the "
                "same, or another --output_dir"
            )
    return client_state


def identity_digest(values: Any) -> str:
    """A short name for plain values, for `identity`."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
