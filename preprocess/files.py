"""Files that are complete or absent: atomic writes, JSON and YAML readers, one writer at a time.

Nothing here knows what a file contains. Stores, checkpoints and results are all written through
these functions; `preprocess/errors.py` reports the errors of the disk. Every JSON and YAML file
is read by `read_json` and `read_yaml`, which turn whatever is wrong with it into one sentence.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from preprocess.errors import ConfigError, DataError, visible, writing

MAX_YAML_ENTRIES = 10_000
HEARTBEAT_SECONDS = 30.0
STALE_SECONDS = 300.0  # without a heartbeat, after which a writer of another host counts as gone
STOPPING = "stopping"  # mark of a lock
STOPPING_SECONDS = 60.0  # how long a writer that is stopping is waited for
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)

# --------------------------------------------------------------------------- writing


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_path(path: Path) -> Path:
    """Return the name under which this process writes `path` until it is complete."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def remove_leftovers(*paths: str | Path, mark: str = "tmp") -> None:
    """Remove the temporary files of killed writers of `paths`; the caller holds their lock."""
    for path in map(Path, paths):
        for entry in path.parent.iterdir() if path.parent.is_dir() else ():
            if entry.name.startswith(f".{path.name}.{mark}-"):
                if entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)


def create_temporary(path: Path, buffering: int = 0) -> Any:
    """Open the temporary file of `path` for writing and reading."""
    with writing(path):
        return open(temporary_path(path), "w+b", buffering)


def write_all(stream: Any, data: bytes, path: Path) -> None:
    """Write all of `data` to a stream of `path`; unbuffered ones may take only part at a time."""
    with writing(path, len(data)):
        rest = memoryview(data)
        while rest:
            rest = rest[stream.write(rest) :]


def finish(stream: Any, path: Path) -> None:
    """Flush, sync and close a stream of `path`."""
    with writing(path), stream:
        stream.flush()
        os.fsync(stream.fileno())


def write_temporary(path: Path, data: bytes) -> None:
    """Write and sync the temporary file of `path`."""
    with create_temporary(path) as stream:
        write_all(stream, data, path)
        finish(stream, path)


@contextmanager
def _replacing(path: Path, wanted_bytes: int | None = None) -> Iterator[None]:
    """Give the temporary file that the block writes the name `path`; remove it at any error."""
    with writing(path, wanted_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
        os.replace(temporary_path(path), path)
    except BaseException:
        temporary_path(path).unlink(missing_ok=True)
        raise
    sync(path.parent)


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` such that readers see the old file or the new one, never a part.

    Raises:
        DiskFullError: the disk is full; the old file stays.
    """
    path = Path(path)
    with _replacing(path, len(data)):
        write_temporary(path, data)


@contextmanager
def atomic_stream(path: str | Path) -> Iterator[Callable[[bytes], None]]:
    """Yield a function that adds to a file, which has its name only once the block has ended.

    Raises:
        DiskFullError: the disk is full; an older file of that name stays, as at any other error.
    """
    path = Path(path)
    with _replacing(path), create_temporary(path, -1) as stream:
        yield lambda data: write_all(stream, data, path)
        finish(stream, path)


def append_bytes(path: str | Path, data: bytes) -> None:
    """Append all of `data` to `path`, or leave it as it was.

    Raises:
        DiskFullError: the disk is full.
    """
    with writing(path, len(data)), open(path, "ab", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        try:
            write_all(stream, data, Path(path))
        except BaseException:
            stream.truncate(size)
            raise


def json_bytes(obj: Any) -> bytes:
    return json.dumps(obj, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def atomic_write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as JSON with sorted keys, atomically."""
    atomic_write_bytes(path, json_bytes(obj))


def write_json_lines(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line, atomically."""
    atomic_write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


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


def seal(obj: dict[str, Any]) -> dict[str, Any]:
    """Return `obj` with the sha256 of its content under `json_sha256`, as our JSONs carry it."""
    plain = json.loads(json.dumps(obj))  # as it will be read: keys are strings, tuples are lists
    plain.pop("json_sha256", None)
    content = json.dumps(plain, sort_keys=True).encode()
    return {**plain, "json_sha256": hashlib.sha256(content).hexdigest()}


# --------------------------------------------------------------------------- reading


class DuplicateKeyError(ValueError):
    """A key, kept in `key`, that appears twice in one JSON object."""

    def __init__(self, key: str) -> None:
        super().__init__(f"key {key!r} appears twice")
        self.key = key


def parse_json(text: str | bytes, strict: bool = False, unique_keys: bool = False) -> Any:
    """Return the value of a JSON text; raise a `ValueError` for anything wrong with it.

    Args:
        strict: also refuse keys that appear twice and numbers that are not finite.
        unique_keys: only refuse keys that appear twice, by a `DuplicateKeyError`.
    """
    checks: Any = {}
    if strict or unique_keys:
        checks["object_pairs_hook"] = _refuse_duplicates
    if strict:
        checks["parse_constant"] = _refuse_constant
    try:
        return json.loads(text, **checks)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateKeyError(key)
            seen.add(key)
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number; write a finite one")


def read_json(
    path: str | Path, remedy: str = "make it again", *, expected: Any = dict,
    keys: Collection[str] = (), error: type[ValueError] = DataError, name: str = "",
    strict: bool = True,
) -> Any:
    """Read a JSON file.

    Args:
        remedy: what the user can do about a broken file.
        expected: dict for an object, list for an array.
        keys: entries that an object must have.
        error: class of the error: `ConfigError` where the user named the file in an option.
        name: of the file in the message; by default its path.
        strict: as in `parse_json`; False for files that other programs write.
    Raises:
        DataError or ConfigError: not UTF-8, not JSON, nested too deeply, or of another shape.
    """
    name = name or str(path)
    try:
        value = parse_json(Path(path).read_bytes(), strict)
    except ValueError as problem:
        raise error(f"{name}: not valid JSON ({problem}); {remedy}") from None
    if not isinstance(value, expected):
        kind = "array" if expected is list else "object"
        raise error(f"{name}: must hold one JSON {kind}, not {type(value).__name__}; {remedy}")
    for key in keys:
        if key not in value:
            raise error(f"{name}: no {key!r} in it; {remedy}")
    return value


def parse_yaml(text: str | bytes) -> Any:
    """Return the value of a YAML text; raise a `ValueError` for anything wrong with it.

    Only plain values are made, never objects. Each use of an alias counts as a copy of what it
    names, and more than `MAX_YAML_ENTRIES` entries are refused: few bytes can name a list in a
    list in a list.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node)
        return loader.construct_document(node)
    except (yaml.YAMLError, RecursionError) as problem:
        raise ValueError(str(problem)) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError):
        # What the library raises for a tag that its value does not fit, such as `!!bool x`.
        raise ValueError("a value that its tag does not fit") from None


def _check_nodes(root: Any) -> None:
    """Refuse too many entries, and keys that appear twice."""
    left, count = [root], 0
    while left:
        node, count = left.pop(), count + 1
        if count > MAX_YAML_ENTRIES:
            raise ValueError(f"more than {MAX_YAML_ENTRIES:,} entries; write fewer, without "
                             "aliases (*name)")
        if node.id == "sequence":
            left += node.value
        elif node.id == "mapping":
            keys = Counter((key.value, key.tag) for key, _ in node.value if key.id == "scalar")
            for (key, _), times in keys.items():
                if times > 1:
                    raise ValueError(f"key {key!r} appears twice")
            left += [child for pair in node.value for child in pair]


def read_yaml(
    path: str | Path, remedy: str, *, error: type[ValueError] = ConfigError, name: str = "",
) -> dict[str, Any]:
    """Read a YAML file of keys and values; an empty one gives no keys. Arguments as `read_json`."""
    name = name or str(path)
    try:
        value = parse_yaml(Path(path).read_bytes())
    except ValueError as problem:
        raise error(f"{name}: not valid YAML ({problem}); {remedy}") from None
    if not isinstance(value, dict | None):
        raise error(f"{name}: must hold keys and values, not {type(value).__name__}; {remedy}")
    return value or {}


# --------------------------------------------------------------------------- one writer a prefix


class WriterLock(AbstractContextManager["WriterLock"]):
    """The sole right to write files that begin with a prefix: `PREFIX.lock`, until `release`.

    For a folder the prefix ends with a slash. `filelock` keeps out the processes of this host, and
    the kernel frees the lock of a dead one. Where the hosts of a shared disk do not see each
    other's locks, the file does: it names its writer as `pid@host` and is touched every 30 s. A
    writer of another host that has not touched it for 5 minutes counts as gone.

    Attributes:
        interrupted: whether the lock was taken over from a writer that is gone.

    Args:
        prefix: of the files to write.
        wait_seconds: how long to wait for another writer before giving up; for one that says that
            it is stopping, `STOPPING_SECONDS` at least.
        remedy: what to give instead.
    Raises:
        ConfigError: another process is writing.
    """

    def __init__(
        self, prefix: str | Path, wait_seconds: float = 0.0, remedy: str = "another name"
    ) -> None:
        from filelock import FileLock

        self.path = Path(f"{prefix}.lock")
        self.interrupted = self._is_held = False
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path, timeout=0, fallback_to_soft=False)
            _wait(self.path, self._take, wait_seconds, remedy)
        _keep_alive(self.path)

    def _take(self) -> bool:
        """Take the lock if it is free, and sign the file."""
        from filelock import Timeout

        try:
            self._lock.acquire()
        except Timeout:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(f"{self.path}: this disk has no locks; let nothing else write there",
                  file=sys.stderr)
        owner = _owner(self.path)
        if _is_far_and_alive(self.path, owner):
            self._lock.release()
            return False
        try:
            _sign(self.path)
        except OSError:
            if not owner:
                self.path.unlink()
            self._lock.release()
            raise
        self._is_held, self.interrupted = True, bool(owner)
        if owner:
            print(f"{self.path}: taken over from {visible(owner.split()[0])}, which is gone",
                  file=sys.stderr)
        return True

    def release(self) -> None:
        """Give up the lock; calling it again is harmless."""
        if self._is_held:
            self._is_held = False
            _held.discard(self.path)
            # Another host may have taken it over; and a forked process does not hold it.
            if _is_ours(self.path):
                self.path.unlink(missing_ok=True)
            self._lock.release()

    def __exit__(self, *rest: object) -> None:
        self.release()


def wait_for_writer(
    prefix: str | Path, wait_seconds: float = 0.0, remedy: str = "another name"
) -> None:
    """Return as soon as nobody holds the `WriterLock` of a prefix, without taking it.

    Raises:
        ConfigError: another process is writing.
    """
    path = Path(f"{prefix}.lock")
    _wait(path, lambda: not _is_taken(path), wait_seconds, remedy)


def tell_stopping() -> None:
    """Write into the locks that this process holds that it is stopping: others wait for that."""
    for path in list(_held):
        with suppress(OSError):
            if _is_ours(path):
                _sign(path, STOPPING)


def _wait(path: Path, is_free: Callable[[], bool], seconds: float, remedy: str) -> None:
    begin, told = time.monotonic(), False
    while not is_free():
        owner, *marks = _owner(path).split() or [""]
        stops, waited = STOPPING in marks, time.monotonic() - begin
        if waited >= max(seconds, STOPPING_SECONDS if stops else 0.0):
            if owner and not _is_of_this_host(" ".join([owner, *marks])):
                remedy += "; if it was killed, it is taken over after 5 minutes"
            elif stops:
                remedy += f"; it was asked to stop, and has not ended in {waited:.0f} s"
            raise ConfigError(
                f"{path}: another process writes here ({owner or 'just started'}); wait for it, "
                f"or give {remedy}"
            )
        if stops and not told and os.environ.get("RANK", "0") == "0":
            told = True
            print(f"{path}: waiting for {owner}, which is stopping", file=sys.stderr, flush=True)
        time.sleep(0.02)


def _is_taken(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # several may look at once
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    finally:
        os.close(descriptor)
    return _is_far_and_alive(path, _owner(path))


def _owner(path: Path) -> str:
    """Return what a lock says of its writer: `pid@host`, the machine, and perhaps `STOPPING`."""
    with suppress(OSError):
        return path.read_bytes()[:200].decode(errors="replace").strip()
    return ""


def _sign(path: Path, *marks: str) -> None:
    signature = " ".join([_name(), _machine(), *marks])
    with open(path, "r+b", buffering=0) as stream:  # never empty once it is signed
        write_all(stream, signature.encode(), path)
        stream.truncate()


def _name() -> str:
    return f"{os.getpid()}@{socket.gethostname()}"


def _machine() -> str:
    """Return what names this machine until it is booted, in all its containers."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return "-"


def _is_ours(path: Path) -> bool:
    return _owner(path).split()[:1] == [_name()]


def _is_of_this_host(owner: str) -> bool:
    name, *marks = owner.split()
    return name.rpartition("@")[2] == socket.gethostname() or _machine() in marks[:1]


def _is_far_and_alive(path: Path, owner: str) -> bool:
    """Return whether a lock belongs to a writer of another host that has touched it of late."""
    if not owner or _is_of_this_host(owner):
        return False
    with suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime < STALE_SECONDS
    return False


_held: set[Path] = set()
_heart: threading.Thread | None = None


def _keep_alive(path: Path) -> None:
    """Touch the lock `path` every `HEARTBEAT_SECONDS`; one thread does so for all locks."""
    global _heart
    _held.add(path)
    if _heart is None or not _heart.is_alive():  # a forked process begins without it
        _heart = threading.Thread(target=_touch_all, daemon=True)
        _heart.start()


def _touch_all() -> None:
    never = threading.Event()
    while not never.wait(HEARTBEAT_SECONDS):
        for path in list(_held):
            with suppress(OSError):
                os.utime(path)
