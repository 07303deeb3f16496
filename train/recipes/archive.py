"""Pack the results of a pipeline into one file (`--archive`): all of its folder but what is large.

Left out are weights, checkpoints, token stores with their arrays, locks, and the event files of
TensorBoard where they take more than `EVENT_BYTES` together: `metrics.jsonl` has the same numbers.
Files with the same content, such as the tokenizer beside each model, are packed once; the others
are hard links to the first. `archive.json` in the packed folder says what was left out, so that
`train/report.py` does not miss it: it draws the same tables from the unpacked folder.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from preprocess.errors import ConfigError, writing
from preprocess.files import json_bytes, sync, temporary_path

ARCHIVE = "archive.json"  # as in train/reports/results.py, which imports torch
ENDING = ".tar.gz"
LARGE_BYTES = 16 << 20  # of an archive, above which its size is explained
EVENT_BYTES = 4 << 20
LINKED_BYTES = 1024  # smaller files are not worth a look for a copy
MIB = 1 << 20
# What is left out, by kind; each a pattern of the path below the output folder.
LEFT_OUT = {
    "checkpoints": re.compile(r"(^|/)checkpoints/|(^|/)latest$"),
    "weights": re.compile(r"\.safetensors$|(^|/)pytorch_model.*\.bin$"),
    "stores and arrays": re.compile(r"\.(bin|idx|npy)$"),
    "locks and half-written files": re.compile(r"\.lock$|(^|/)\.[^/]+\.tmp-\d+"),
}
_EVENTS = re.compile(r"(^|/)events\.out\.tfevents\.[^/]*$")


def check_archive(file: str) -> None:
    """Raise ConfigError where no archive can be written, before anything runs."""
    path = Path(file)
    if not path.name.endswith(ENDING) or path.name == ENDING:
        raise ConfigError(f"--archive {file}: must end in {ENDING}, as runs/study{ENDING}")
    if path.is_dir():
        raise ConfigError(f"--archive {file}: is a folder; give the name of a file")
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ConfigError(f"--archive {file}: nothing can be written into {there}; give another "
                          "folder")


def pack(root: Path, file: Path) -> str:
    """Write the archive of an output folder, complete or not at all; return what to say of it.

    Args:
        root: the output folder; its own name is the folder in the archive.
        file: the archive; it may lie in `root`.
    Raises:
        DiskFullError: no room for it; an earlier archive stays.
    """
    top = root.resolve().name or "run"
    packed, left_out = _sort_out(root, {file.resolve(), temporary_path(file).resolve()})
    packed.pop(ARCHIVE, None)  # of the archive that this folder was unpacked from
    told = json_bytes({"left_out": {kind: {"files": files, "bytes": size}
                                    for kind, (files, size) in left_out.items()}})
    taken: dict[str, list[int]] = defaultdict(lambda: [0, 0])  # name -> files, packed bytes
    first: dict[str, str] = {}  # digest of a content -> the member that holds it
    temporary = temporary_path(file)
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as raw:
                with tarfile.open(fileobj=raw, mode="w:gz") as archive:
                    archive.addfile(_member(root, f"{top}/{ARCHIVE}", len(told)),
                                    io.BytesIO(told))
                    for name, path in packed.items():
                        before = raw.tell()
                        _add(archive, path, f"{top}/{name}", first)
                        entry = taken[_EVENTS.sub("TensorBoard events", os.path.basename(name))]
                        entry[0] += 1
                        entry[1] += raw.tell() - before
            sync(temporary)
            os.replace(temporary, file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(file.parent)
    size = file.stat().st_size
    said = f"{file}: {len(packed)} files, {size / MIB:.1f} MiB"
    if size > LARGE_BYTES:
        largest = sorted(taken.items(), key=lambda item: -item[1][1])[:3]
        said += f", above {LARGE_BYTES // MIB} MiB; the largest: " + ", ".join(
            f"{count} x {name} {used / MIB:.1f} MiB" for name, (count, used) in largest)
    return said


def _sort_out(
    root: Path, ours: set[Path]
) -> tuple[dict[str, Path], dict[str, tuple[int, int]]]:
    """Return the files to pack by their names below `root`, and what is left out by kind."""
    packed: dict[str, Path] = {}
    left: dict[str, tuple[int, int]] = {}

    def leave(kind: str, path: Path) -> None:
        files, size = left.get(kind, (0, 0))
        left[kind] = (files + 1, size + path.stat().st_size)

    for path in _files(root):
        name = path.relative_to(root).as_posix()
        kind = next((kind for kind, found in LEFT_OUT.items() if found.search(name)), "")
        if kind:
            leave(kind, path)
        elif path.resolve() not in ours:
            packed[name] = path
    events = {name: path for name, path in packed.items() if _EVENTS.search(name)}
    if sum(path.stat().st_size for path in events.values()) > EVENT_BYTES:
        for name, path in events.items():
            leave("TensorBoard events", path)
            del packed[name]
    return packed, left


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders.sort()
        yield from (path for name in sorted(names) if (path := Path(folder, name)).is_file())


def _add(archive: tarfile.TarFile, path: Path, name: str, first: dict[str, str]) -> None:
    """Add a file, or a link to the first file of the same content."""
    content = path.read_bytes()
    member = _member(path, name, len(content))
    if len(content) >= LINKED_BYTES:
        digest = hashlib.sha256(content).hexdigest()
        if digest in first:
            member.type, member.linkname, member.size = tarfile.LNKTYPE, first[digest], 0
            archive.addfile(member)
            return
        first[digest] = name
    archive.addfile(member, io.BytesIO(content))


def _member(path: Path, name: str, size: int) -> tarfile.TarInfo:
    """Return the entry of a plain file, without the names of who wrote it."""
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = size, int(path.stat().st_mtime), 0o644
    return member
