"""The house's errors, their exit codes, and how a command reports them.

Every command of the three wings ends through `run_command`: one sentence on stderr that says what
was given, what is allowed and what to type, then the exit code. A traceback means a bug.
"""

from __future__ import annotations

import errno
import os
import re
import select
import shutil
import signal
import sys
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

LOG_LEVEL = "SELMASK_LOG_LEVEL"  # environment variable, which `--log_level` sets


class ConfigError(ValueError):
    """A wrong option or DeepSpeed configuration."""

    exit_code = 2


def check_shard(index: int | None, count: int | None) -> None:
    """Check `--shard_index` and `--num_shards` of a command that works on one shard of a store.

    Raises:
        ConfigError: one of the two alone, or an index out of range.
    """
    if (index is None) != (count is None):
        raise ConfigError("--shard_index and --num_shards go together: give both or neither")
    if index is not None and count is not None and not 0 <= index < count:
        raise ConfigError(
            f"--shard_index {index} --num_shards {count}: the index counts from 0 to {count - 1}"
        )


_SHAPING = "\u200c\u200d"  # shape letters and emoji; every other invisible character misleads


def visible(text: object, kept: str = "") -> str:
    """Return text for a terminal or a page: control characters as `\\x1b`, on one line.

    Labels and names come from files, and a terminal obeys what is in them. Line ends, halves of
    surrogates and marks that change the writing direction are spelled out too.

    Args:
        kept: characters that stay as they are.
    """
    shown = str(text)
    if shown.isascii() and shown.isprintable():
        return shown
    return "".join(
        c.encode("unicode_escape").decode()
        if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in _SHAPING + kept
        else c for c in shown
    )


class DataError(ValueError):
    """A file that is absent, broken, or made for something else."""

    exit_code = 3


class DiskFullError(OSError):
    """A file that does not fit on the disk; `strerror` is the complete sentence."""

    exit_code = 3

    def __str__(self) -> str:
        return str(self.strerror)


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not finite, or a loss scale at its minimum."""

    exit_code = 4


class StopRequested(Exception):
    """A requested stop; the run has left a checkpoint to resume from."""

    exit_code = 75


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Libraries in Rust (tokenizers, safetensors) keep the number in their text; torch's writer in C++
# keeps nothing, but has no other reason to fail at writing.
_NO_ROOM_TEXTS = (
    *(f"(os error {number})" for number in _NO_ROOM),
    "PytorchStreamWriter failed writing", "file write failed", "unexpected pos",
)


def _is_full(error: BaseException) -> bool:
    """Return whether an error means that the disk, the quota or the largest file is full."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _NO_ROOM
    return any(text in str(error) for text in _NO_ROOM_TEXTS)


@contextmanager
def writing(path: str | Path, wanted_bytes: int | None = None) -> Iterator[None]:
    """Report a full disk in one sentence, and name the file in any other failure to write it.

    For the primitives of `preprocess/files.py` and for libraries that write files of their own;
    other code leaves its errors to `run_command`.

    Args:
        path: the file or folder that is written.
        wanted_bytes: number of bytes that the block writes, if known.
    Raises:
        DiskFullError: the disk, the quota or the largest file allowed is full.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if _is_full(error):
            raise _disk_full(path, wanted_bytes, error) from error
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def _disk_full(
    path: str | Path | None, wanted_bytes: int | None, error: Exception
) -> DiskFullError:
    """Return the error for a full disk; a temporary name is reported as the final one."""
    number = getattr(error, "errno", None) or errno.ENOSPC
    remedy = "make room and give the same command again"
    if path is None:
        return DiskFullError(number, f"{os.strerror(number)}; {remedy}")
    path = Path(path)
    path = path.with_name(re.sub(r"^\.(.+)\.tmp-\d+.*$", r"\1", path.name))
    folder = next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())
    wanted = "more room was" if wanted_bytes is None else f"{wanted_bytes:,} more bytes were"
    return DiskFullError(
        number,
        f"{path}: cannot be written ({os.strerror(number)}): {wanted} wanted, "
        f"{shutil.disk_usage(folder).free:,} bytes are free there; {remedy}",
        str(path),
    )


# Codes with which all ranks end at the same point, once the process group has started.
_TOGETHER = (0, ConfigError.exit_code, NonFiniteError.exit_code, StopRequested.exit_code)
# On a busy machine the imports of one rank may take this much longer than those of another.
_GRACE_SECONDS = 15


def _process_group() -> Any:
    """Return `torch.distributed` if this process has joined a group, else None."""
    torch = sys.modules.get("torch")
    distributed = getattr(torch, "distributed", None)
    joined = distributed and distributed.is_available() and distributed.is_initialized()
    return distributed if joined else None


def _is_alone() -> bool:
    """Return whether this process may be the only one of its job that met the error.

    Before the process group starts, every rank reads the same files and takes the same decision.
    """
    return _process_group() is not None


def _leave_group(together: bool) -> None:
    """Leave the process group, so that neither torch nor NCCL complains at the exit.

    Args:
        together: whether all ranks end here. Otherwise the others may be in a collective, for which
            NCCL would wait, so its communicators are given up.
    """
    distributed = _process_group()
    if distributed is None:
        return
    if together or distributed.get_world_size() == 1:
        distributed.destroy_process_group()
    elif "nccl" in distributed.get_backend():
        give_up = getattr(distributed.distributed_c10d, "_abort_process_group", None)
        if give_up is not None:
            give_up()


def _end_where_nobody_reads(error: Exception) -> None:
    """Exit silently after `| head` and the like, when the reader has seen enough."""
    if isinstance(error, BrokenPipeError):
        stdout = select.poll()
        stdout.register(sys.stdout, 0)
        if stdout.poll(0):  # this pipe has lost its reader, not one to a worker
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + signal.SIGPIPE)


def _trace_if_debugging() -> None:
    if os.environ.get(LOG_LEVEL) == "debug":
        traceback.print_exc()


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run `main`, turn our errors into one line and an exit code, and exit.

    Under a launcher, the ranks of a node take the same decision: the first one reports it, and the
    others end later, since a launcher kills all ranks when one of them ends. An error of data or
    disk after the start is reported by the rank that met it. A process whose launcher is gone is
    asked to stop.
    """
    from preprocess import launchers

    code, message, shared = 0, "", True
    try:
        launchers.watch()
        main()
    except (ConfigError, NonFiniteError, StopRequested) as error:
        code, message = error.exit_code, str(error)
        _trace_if_debugging()
    except DataError as error:
        code, message, shared = error.exit_code, str(error), not _is_alone()
        _trace_if_debugging()
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except Exception as error:
        _end_where_nobody_reads(error)
        if _is_full(error) and not isinstance(error, DiskFullError):
            error = _disk_full(getattr(error, "filename", None), None, error)
        if not isinstance(error, OSError):
            _leave_group(together=False)
            raise
        code, shared = DataError.exit_code, not _is_alone()
        _trace_if_debugging()
        named = error.filename and not isinstance(error, DiskFullError)
        message = (f"{error.filename}: " if named else "") + (error.strerror or str(error))
    rank = os.environ.get("RANK", "0")
    first_here = os.environ.get("LOCAL_RANK", rank) == "0"
    if code and (first_here or not shared):
        name = os.path.basename(sys.argv[0]) + ("" if rank == "0" else f", rank {rank}")
        with suppress(OSError):  # of an output that nobody reads
            print(f"{visible(name)}: {visible(' '.join(message.split()))}", file=sys.stderr,
                  flush=True)
    elif code and not _is_alone():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_GRACE_SECONDS)
    _leave_group(together=code in _TOGETHER)
    launchers.silence_unread()
    sys.exit(code)
