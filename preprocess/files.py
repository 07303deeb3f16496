"""Files that are whole or not there: atomic writes, sealed JSON, and one writer at a time.

Nothing here knows what is in a file. Whoever writes a store, a checkpoint or a result does it
through these; errors of the disk end as `preprocess/errors.py` says them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

from preprocess.errors import ConfigError, DataError, writing

# --------------------------------------------------------------------------- writing


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_path(path: Path) -> Path:
    """The name under which this process writes `path` before it is whole."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def remove_leftovers(*paths: str | Path, mark: str = "tmp") -> None:
    """Remove what killed writers of `paths` left behind; for the holder of their lock."""
    for path in map(Path, paths):
        for entry in path.parent.iterdir() if path.parent.is_dir() else ():
            if entry.name.startswith(f".{path.name}.{mark}-"):
                if entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)


def write_all(stream: Any, data: bytes) -> None:
    """Write all of `data` to an unbuffered stream, which may take only a part at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[stream.write(rest) :]


def write_whole(path: Path, data: bytes, said: Path) -> None:
    """Write and sync a file; a full disk is said of the name `said`."""
    with writing(said, len(data)), open(path, "wb", buffering=0) as stream:
        write_all(stream, data)
        os.fsync(stream.fileno())


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the new one, never a part.

    Raises:
        DiskFullError: there is no room; the old file stays.
    """
    path = Path(path)
    temporary = temporary_path(path)
    with writing(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_whole(temporary, data, path)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def append_bytes(path: str | Path, data: bytes) -> None:
    """Append all of `data` to `path`, or leave it as it was.

    Raises:
        DiskFullError: there is no room.
    """
    with writing(path, len(data)), open(path, "ab", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        try:
            write_all(stream, data)
        except BaseException:
            stream.truncate(size)
            raise


def json_bytes(obj: Any) -> bytes:
    return json.dumps(obj, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def atomic_write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as JSON with sorted keys, atomically."""
    atomic_write_bytes(path, json_bytes(obj))


def file_sha256(path: str | Path, start: int = 0) -> str:
    """Return the sha256 of a file, from byte `start` on, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        stream.seek(start)
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint_text(*parts: object) -> str:
    """Return 16 hexadecimal digits that change when any part changes."""
    return hashlib.sha256(json.dumps([str(p) for p in parts]).encode()).hexdigest()[:16]


def read_json(path: str | Path) -> dict[str, Any]:
    """Read one of our JSON files; a broken one is a `DataError` that names it."""
    try:
        obj = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); make it again") from None
    if not isinstance(obj, dict):
        raise DataError(f"{path}: holds a {type(obj).__name__}, not an object; make it again")
    return obj


def seal(obj: dict[str, Any]) -> dict[str, Any]:
    """Return `obj` with the sha256 of its content under `json_sha256`, as our JSONs carry it."""
    plain = json.loads(json.dumps(obj))  # as it will be read: keys are strings, tuples are lists
    plain.pop("json_sha256", None)
    content = json.dumps(plain, sort_keys=True).encode()
    return {**plain, "json_sha256": hashlib.sha256(content).hexdigest()}


# --------------------------------------------------------------------------- one writer a prefix


class WriterLock:
    """The sole right to write what begins with a prefix: the file `PREFIX.lock`, until `release`.

    The kernel gives the lock of a dead process free; the file that it leaves behind tells the next
    holder that a writer was `interrupted`. It names process and host: where the hosts of a shared
    disk do not see each other's locks, a writer of another host is respected until the file is
    gone, which it removes itself unless it was killed.

    Args:
        prefix: of what is written.
        wait_seconds: how long to wait for another writer before giving up.
    Raises:
        ConfigError: another writer is at work.
    """

    def __init__(self, prefix: str | Path, wait_seconds: float = 0.0) -> None:
        self.path = Path(f"{prefix}.lock")
        self.interrupted = False
        self._descriptor = -1
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        end = time.monotonic() + wait_seconds
        while not self._try():
            if time.monotonic() >= end:
                remedy = (
                    "remove this file if that process is gone" if self._is_of_another_host()
                    else "give another name"
                )
                raise ConfigError(
                    f"{self.path}: another process writes here ({self._owner or 'just started'}); "
                    f"wait for it, or {remedy}"
                )
            time.sleep(0.02)

    def _try(self) -> bool:
        """Take the lock if it is free; `_owner` is who holds it, or held it last."""
        while True:
            with writing(self.path):
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                free = _flock(descriptor, self.path)
                self._owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                if not free:
                    return False
                if _is_file(descriptor, self.path):
                    if self._is_of_another_host():
                        return False
                    self._sign(descriptor)
                    self._descriptor = descriptor
                    return True
            finally:
                if self._descriptor != descriptor:
                    os.close(descriptor)
            # Its holder has removed it since it was opened: make a new one.

    def _is_of_another_host(self) -> bool:
        return bool(self._owner) and not self._owner.endswith(f" on {socket.gethostname()}")

    def _sign(self, descriptor: int) -> None:
        self.interrupted = bool(self._owner)
        mine = f"pid {os.getpid()} on {socket.gethostname()}\n".encode()
        try:
            with writing(self.path, len(mine)):
                os.pwrite(descriptor, mine, 0)
        except OSError:
            if not self.interrupted:
                self.path.unlink()
            raise
        os.ftruncate(descriptor, len(mine))

    def release(self) -> None:
        """Give up the lock; a second time is harmless."""
        if self._descriptor >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> WriterLock:
        return self

    def __exit__(self, *rest: object) -> None:
        self.release()


def _flock(descriptor: int, path: Path) -> bool:
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        print(f"{path}: this disk has no locks; let nothing else write there", file=sys.stderr)
    return True


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
