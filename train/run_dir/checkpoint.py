"""Checkpoints: how one is committed, which ones are valid, and which one a run resumes from.

The commit protocol. A kill at any moment leaves the earlier checkpoints complete:

1. every rank writes its files to `checkpoints/step_N.tmp`;
2. it brings them to the disk (fsync) and takes their sha256;
3. rank 0 gathers the digests, writes them as `manifest.json` and syncs the folder;
4. it renames the folder to `step_N`: from here on the checkpoint counts;
5. it replaces `latest`, for people to read (loading looks at the folders), and only then removes
   older checkpoints, by renaming them to `.tmp` first.

A rank sends its digests once its files are on the disk, so nothing is committed without every
rank. A folder whose name ends in `.tmp` never counts; the next save removes it.

Loading takes the newest checkpoint whose files all agree with its manifest, the same on all
ranks, and reports the ones it passed over and why. For another number of ranks it is converted.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from preprocess.errors import ConfigError, DataError, writing
from preprocess.files import (
    atomic_write_bytes,
    atomic_write_json,
    file_sha256,
    parse_json,
    seal,
    sync,
)
from preprocess.progress import say
from train import engine as ds
from train.run_dir import parts

MANIFEST = "manifest.json"
MANIFEST_VERSION = 2


# ------------------------------------------------------------------------------------- saving


def save_checkpoint(
    engine: Any,
    run_dir: str | Path,
    step: int,
    client_state: dict[str, Any],
    limit: int,
    extras: dict[str, bytes] | None = None,
    spared: int | None = None,
) -> Path:
    """Commit a checkpoint of `step`, then remove the oldest beyond `limit`; collective.

    Args:
        client_state: plain values that `load_checkpoint` returns; its `identity`, if any, must not
            change when the run is resumed.
        extras: further files of the checkpoint, name -> content; only rank 0 writes them.
        spared: a step whose checkpoint is kept beyond the limit.
    Raises:
        DiskFullError: nothing has been committed or removed.
    """
    folder = Path(run_dir) / "checkpoints"
    final, temporary = folder / f"step_{step}", folder / f"step_{step}.tmp"
    try:
        with writing(final):
            if ds.is_main():
                _remove_debris(folder)
                temporary.mkdir(parents=True)
            ds.barrier()
            mine = ds.save_state(engine, temporary, {**client_state, "step": step})
            shares = ds.gather_objects(_seal_files(temporary, mine))
            if ds.is_main():
                for name, content in (extras or {}).items():
                    (temporary / name).write_bytes(content)
                files = {name: entry for share in shares for name, entry in share.items()}
                # DeepSpeed also writes its conversion script.
                others = [f for f in _files(temporary) if _name(temporary, f) not in files]
                manifest = {
                    "version": MANIFEST_VERSION, "step": step,
                    "world_size": ds.ranks().world_size, "engine": ds.describe(engine),
                    "identity": client_state.get("identity", {}),
                    "files": files | _seal_files(temporary, others),
                }
                _commit(temporary, final, manifest)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if ds.is_main():
        _prune(folder, step, limit, spared)
    ds.barrier()
    return final


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _name(folder: Path, file: Path) -> str:
    return file.relative_to(folder).as_posix()


def _seal_files(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Bring files and their folders to the disk; return size and sha256 of each, by name."""
    entries = {}
    for file in files:
        sync(file)
        entries[_name(folder, file)] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    for parent in {(folder / name).parent for name in entries}:
        sync(parent)
    return entries


def _commit(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, rename the folder, replace `latest`."""
    atomic_write_json(temporary / MANIFEST, seal(manifest))
    if final.exists():
        # Damaged: a run resumes from its newest complete checkpoint, so it returns to the step of
        # another one only if that one was passed over.
        os.rename(final, final.with_name(f"{final.name}.old.tmp"))
    os.rename(temporary, final)
    sync(final.parent)
    atomic_write_bytes(final.parent.parent / "latest", f"{final.name}\n".encode())


def _steps(folder: Path) -> list[int]:
    """Return the steps of the committed checkpoints, newest first."""
    names = (p.name for p in folder.glob("step_*") if p.name[5:].isdecimal())
    return sorted((int(name[5:]) for name in names), reverse=True)


def _prune(folder: Path, step: int, limit: int, spared: int | None) -> None:
    """Keep the newest `limit` checkpoints up to that of `step`, which has just been committed.

    Later ones are damaged, or of a decay that was given up. They do not count, or they would push
    out the good ones. Nothing is removed unless the new one has all its files.
    """
    problem = check_checkpoint(folder / f"step_{step}", digests=False)
    if problem:
        say(f"warning: {problem}; older checkpoints are kept")
        return
    steps = _steps(folder)
    for old in {*steps[:steps.index(step)], *steps[steps.index(step) + limit:]} - {spared}:
        path = folder / f"step_{old}"
        os.rename(path, path.with_name(f"{path.name}.tmp"))
    _remove_debris(folder)


def _remove_debris(folder: Path) -> None:
    """Remove what an interrupted save, conversion or removal left."""
    for path in folder.glob("step_*.tmp"):
        shutil.rmtree(path)


# ------------------------------------------------------------------------------------- loading


def check_checkpoint(
    path: Path, *, digests: bool = True, share: tuple[int, int] = (0, 1)
) -> str | None:
    """Return what is wrong with a checkpoint, or None.

    Args:
        digests: compare the sha256 of the files too, not only names and sizes.
        share: `(i, n)`: check every n-th digest from the i-th on; n ranks check all of them.
    """
    manifest_file = path / MANIFEST
    if not manifest_file.is_file():
        return f"{manifest_file} is missing"
    try:
        manifest = _read_manifest(path)
        entries = manifest["files"]
        for name, entry in entries.items():
            file = path / name
            if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
                return f"{manifest_file} names {name!r}, outside the checkpoint"
            if not file.is_file():
                return f"{file} is missing"
            if file.resolve() != path.resolve() / name:
                return f"{file} is a link"
            if file.stat().st_size != entry["bytes"]:
                return f"{file} has {file.stat().st_size} bytes, not {entry['bytes']}"
        for file in _files(path):
            if file.suffix == ".pt" and _name(path, file) not in entries:
                return f"{file} is not in {manifest_file}"
        if digests:
            # The largest first, so that the shares are even.
            names = sorted(entries, key=lambda name: (-entries[name]["bytes"], name))
            for name in names[share[0]::share[1]]:
                if file_sha256(path / name) != entries[name]["sha256"]:
                    return f"{path / name} differs from its sha256"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{manifest_file} is damaged ({error})"
    except OSError as error:
        return f"{error.filename or path} cannot be read ({error.strerror})"
    return None


def _read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of the checkpoint `path`.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is damaged.
    """
    manifest = parse_json((path / MANIFEST).read_bytes())
    if seal(manifest) != manifest:
        raise ValueError("its content is not what was written")
    if manifest["version"] != MANIFEST_VERSION:
        raise ValueError(f"version {manifest['version']}, not {MANIFEST_VERSION}")
    if path.name != f"step_{manifest['step']}":
        raise ValueError(f"of step {manifest['step']}")
    if manifest["world_size"] < 1:
        raise ValueError(f"of {manifest['world_size']} ranks")
    for rank in range(manifest["world_size"]):
        if ds.GENERATORS.format(rank=rank) not in manifest["files"]:
            raise ValueError(f"without the files of rank {rank}")
    for key in ("engine", "identity"):
        manifest[key].keys()
    return manifest


def identity_of(path: Path) -> dict[str, Any]:
    """Return the identity of a complete checkpoint."""
    return _read_manifest(path)["identity"]


def identities(run_dir: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield step and identity of each checkpoint whose manifest can be read, newest first."""
    folder = Path(run_dir) / "checkpoints"
    for step in _steps(folder):
        try:
            yield step, identity_of(folder / f"step_{step}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # `find_checkpoint` says what is wrong with it


def check_identity(run_dir: str | Path, identity: dict[str, Any]) -> None:
    """Refuse to go on from a run of another identity, before anything is written or started.

    Raises:
        ConfigError: the newest checkpoint has another identity; says what differs.
    """
    for step, found in identities(run_dir):
        parts.check(found, identity, f"--output_dir {run_dir}, stopped at step {step}")
        return


def find_checkpoint(
    run_dir: str | Path, mode: str, wanted: Callable[[int, dict[str, Any]], bool] | None = None
) -> Path | None:
    """Return the newest complete checkpoint of a run, or None.

    In a process group this is collective: the ranks share the work and get the same answer.

    Args:
        mode: auto, must or never, as `--resume`.
        wanted: takes step and identity of a checkpoint; others are passed over without a word.
    Raises:
        DataError: `must`, and there is none.
    """
    if mode == "never":
        return None
    together = ds.is_started()
    where = ds.ranks()
    share = (where.rank, where.world_size) if together else (0, 1)
    folder = Path(run_dir) / "checkpoints"
    steps = _steps(folder) if folder.is_dir() else []
    if wanted is not None:
        steps = [step for step, found in identities(run_dir) if wanted(step, found)]
    for step in ds.gather_objects(steps)[0] if together else steps:
        path = folder / f"step_{step}"
        problem = check_checkpoint(path, share=share)
        found = ds.gather_objects(problem) if together else [problem]
        problem = next((one for one in found if one), None)
        if problem is None:
            return path
        say(f"warning: checkpoint {path} passed over: {problem}")
    if mode == "must":
        raise DataError(
            f"{folder}: no complete checkpoint, and --resume is must; type --resume auto to start "
            "anew"
        )
    return None


def load_checkpoint(
    engine: Any, path: Path, identity: dict[str, Any], allow_world_size_change: bool = False
) -> dict[str, Any]:
    """Load a checkpoint that `find_checkpoint` found; collective.

    Args:
        identity: values that must not change between the parts of a run (fingerprints, seed, ...).
        allow_world_size_change: accept a checkpoint of another number of ranks; `engine.load_state`
            says what that changes.
    Returns:
        The `client_state`.
    Raises:
        ConfigError: it does not belong to this run; the message says what differs.
        DataError: one of its files holds objects that are never loaded.
    """
    manifest = _read_manifest(path)
    parts.check(manifest["identity"], identity, str(path))
    for key, value in ds.describe(engine).items():
        made = manifest["engine"].get(key)
        if made != value:
            hint = ' (with "torch_adam": false)' if "FusedAdam" in (made, value) else ""
            raise ConfigError(
                f"{path}: made with {key} {made}, and this run has {value}; "
                f"give the DeepSpeed JSON of then{hint}, or another --output_dir"
            )
    world_size = manifest["world_size"]
    if world_size != ds.ranks().world_size:
        if not allow_world_size_change:
            raise ConfigError(
                f"{path}: written by {world_size} ranks, and there are {ds.ranks().world_size}; "
                "start as many, or add --allow_world_size_change"
            )
        say(f"{path}: written by {world_size} ranks, converted for {ds.ranks().world_size}")
    client_state = ds.load_state(engine, path, world_size)
    if ds.is_main():
        _remove_debris(path.parent)
    return client_state
