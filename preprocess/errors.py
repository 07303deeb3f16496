"""How a user's mistake is said, and the exit code that goes with it.

Every command of the three rooms ends through `run_command`: one sentence on stderr that says
what was given, what is allowed and what to type, then the exit code. A traceback means a bug.
Whoever writes a file of some size does so under `writing`, so that a full disk is said as well.
"""

from __future__ import annotations

import errno
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn


class ConfigError(ValueError):
    """A wrong option or DeepSpeed configuration."""

    exit_code = 2


class DataError(ValueError):
    """A file that is absent, broken, or made for something else."""

    exit_code = 3


class DiskFullError(OSError):
    """A file that cannot be written for want of room; `strerror` is the whole sentence."""

    exit_code = 3

    def __str__(self) -> str:
        return str(self.strerror)


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not a number, or a loss scale at its floor."""

    exit_code = 4


class StopRequested(Exception):
    """A stop that was asked for; the run has left a checkpoint to resume from."""

    exit_code = 75


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Libraries in Rust (tokenizers, safetensors) keep the number in their text; torch's writer in C++
# keeps nothing, but has no other reason to fail at writing.
_NO_ROOM_TEXTS = (
    *(f"(os error {number})" for number in _NO_ROOM),
    "PytorchStreamWriter failed writing", "file write failed", "unexpected pos",
)


def _is_for_want_of_room(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _NO_ROOM
    return any(text in str(error) for text in _NO_ROOM_TEXTS)


@contextmanager
def writing(path: str | Path, wanted_bytes: int | None = None) -> Iterator[None]:
    """Say a full disk in one sentence, and name the file in any other failure to write it.

    Args:
        path: what is written, under the name that the user knows; a file or a folder.
        wanted_bytes: how many bytes the block below writes, where that is known.
    Raises:
        DiskFullError: the disk, the quota or the largest file allowed is full.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if _is_for_want_of_room(error):
            raise _disk_full(path, wanted_bytes, error) from error
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def _disk_full(path: str | Path, wanted_bytes: int | None, error: Exception) -> DiskFullError:
    folder = Path(path).absolute()
    while not folder.is_dir():
        folder = folder.parent
    wanted = "more room was" if wanted_bytes is None else f"{wanted_bytes:,} more bytes were"
    number = getattr(error, "errno", None) or errno.ENOSPC
    return DiskFullError(
        number,
        f"{path}: cannot be written ({os.strerror(number)}): {wanted} wanted, "
        f"{shutil.disk_usage(folder).free:,} bytes are free there; make room and give the same "
        f"command again",
        str(path),
    )


# The imports of one rank may take so much longer than those of another on a busy machine.
_GRACE_SECONDS = 15


def _is_alone() -> bool:
    """Whether this process may be the only one of a job to have met an error.

    Before the process group starts every rank reads the same files and takes the same decision.
    """
    torch = sys.modules.get("torch")
    distributed = getattr(torch, "distributed", None)
    return bool(distributed and distributed.is_available() and distributed.is_initialized())


def _end_where_nobody_reads(error: Exception) -> None:
    """Exit in silence after `| head` and the like: whoever read has what they wanted."""
    if isinstance(error, BrokenPipeError):
        stdout = select.poll()
        stdout.register(sys.stdout, 0)
        if stdout.poll(0):  # it is this pipe that has no reader, and not one to a worker
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + signal.SIGPIPE)


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run `main`, turn our errors into one line and an exit code, and exit.

    Under a launcher the ranks of a node take the same decision; the first of them says it, and the
    others let it go first: a launcher kills all ranks when it sees one end. An error of data or
    disk that one rank has met after the start is said by that rank.
    """
    code, message, shared = 0, "", True
    try:
        main()
    except (ConfigError, NonFiniteError, StopRequested) as error:
        code, message = error.exit_code, str(error)
    except DataError as error:
        code, message, shared = error.exit_code, str(error), not _is_alone()
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except Exception as error:
        _end_where_nobody_reads(error)
        if not isinstance(error, OSError) and not _is_for_want_of_room(error):
            raise
        code, message, shared = DataError.exit_code, str(error), not _is_alone()
        if isinstance(error, OSError) and not isinstance(error, DiskFullError):
            where = f"{error.filename}: " if error.filename else ""
            message = f"{where}{error.strerror or error}"
    rank = os.environ.get("RANK", "0")
    first_here = os.environ.get("LOCAL_RANK", rank) == "0"
    if code and (first_here or not shared):
        name = os.path.basename(sys.argv[0]) + ("" if rank == "0" else f", rank {rank}")
        print(f"{name}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    elif code and not _is_alone():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_GRACE_SECONDS)
    sys.exit(code)
