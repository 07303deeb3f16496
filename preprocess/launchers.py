"""The processes that started this one: without them nobody stops this one, or reads its output.

A launcher that is killed cannot tell its ranks. `deepspeed` leaves them training, under its own
child `deepspeed.launcher.launch`, which is their parent and lives on; the kernel's death signal
(PR_SET_PDEATHSIG) would not reach them, and comes too early where the thread that started a child
ends before the child. So every command finds all launchers above it when it starts, waits for the
end of each in a thread, and then asks itself to stop by SIGTERM, as the launcher would have done.

Shells and the like are no launchers: they may end before what they have started.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from preprocess.errors import StopRequested

STARTED_BY = "SELMASK_STARTED_BY"  # environment variable: `describe` of the pipeline above
PATIENCE_SECONDS = 120.0  # a process that is stuck, say in a collective, ends after this time
# Programs, and modules run by `python -m`.
_PROGRAMS = {"deepspeed", "deepspeed.pt", "ds", "torchrun", "accelerate"}
_LAUNCH = "deepspeed.launcher.launch"
_MODULES = ("deepspeed.launcher.", "torch.distributed.")


class _Process(NamedTuple):
    """A living process; pid and start together name it for ever."""

    pid: int
    parent: int
    session: int
    started: str
    words: tuple[str, ...]

    @property
    def module(self) -> str:
        """Return what `python -m` runs; empty for anything else."""
        words = self.words[1:4]
        return words[words.index("-m") + 1] if "-m" in words[:-1] else ""

    @property
    def is_launcher(self) -> bool:
        programs = {os.path.basename(word) for word in self.words[:2]}
        return bool(programs & _PROGRAMS) or self.module.startswith(_MODULES)

    @property
    def name(self) -> str:
        found = self.module or next(
            (os.path.basename(word) for word in self.words[1:2]), str(self.pid))
        return f"{found} (process {self.pid})"


def _look(pid: int) -> _Process | None:
    """Return what runs as `pid`; None if it has ended, or this system does not tell."""
    try:
        # After the name in parentheses, which may hold blanks.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        if fields[0] in "ZX":
            return None
        return _Process(pid, int(fields[1]), int(fields[3]), fields[19], tuple(words))
    except (OSError, ValueError, IndexError):
        return None


def describe(pid: int) -> str:
    """Return what names a process of this host for ever: pid, time of its start, host."""
    process = _look(pid)
    return f"{pid} {process.started if process else '-'} {socket.gethostname()}"


def environment() -> dict[str, str]:
    """Return the variables by which a command, and all it starts, ends with this process."""
    return {STARTED_BY: describe(os.getpid())}


def _above() -> list[_Process]:
    """Return the launchers above this process.

    Raises:
        StopRequested: one of them is gone already, while this process was importing.
    """
    found = []
    pid, started, host = (os.environ.get(STARTED_BY, "").split() + 3 * ["-"])[:3]
    if host == socket.gethostname() and started != "-":
        process = _look(int(pid))
        if process is None or process.started != started:
            raise StopRequested(f"process {pid}, which started this one, is gone")
        found.append(process)
    below = _look(os.getpid())
    while below is not None:
        process = _look(below.parent)
        # DeepSpeed's launcher sets this variable, and only `deepspeed` or a shell starts it. A
        # session is inherited, so a parent of another session is not the one that started it.
        is_started = below.module == _LAUNCH or (
            below.pid == os.getpid() and "CROSS_RANK" in os.environ)
        if is_started and process is not None and below.session not in (
                below.pid, process.session):
            raise StopRequested(f"the launcher above process {below.pid} is gone")
        if process is not None and process.is_launcher:
            found.append(process)
        below = process
    return found


def watch() -> None:
    """Ask this process to stop, by SIGTERM, as soon as a launcher above it is gone.

    Raises:
        StopRequested: one is gone already.
    """
    above = _above()
    if above:
        threading.Thread(target=_end_with, args=(above,), daemon=True).start()


def _end_with(processes: list[_Process]) -> None:
    poll, milliseconds = select.poll(), None
    for process in processes:
        try:
            poll.register(os.pidfd_open(process.pid), select.POLLIN)
        except (OSError, AttributeError):  # it has just ended, or an old system
            milliseconds = 1000
    while True:
        gone = next((p for p in processes
                     if (now := _look(p.pid)) is None or now.started != p.started), None)
        if gone is not None:
            break
        poll.poll(milliseconds)
    silence_unread()
    with suppress(OSError):
        print(f"{gone.name} is gone, which started this: stopping", file=sys.stderr, flush=True)
    # To the main thread, whose waiting it interrupts.
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
    time.sleep(PATIENCE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def end_with_parent() -> None:
    """End this worker of a pool when its parent is killed, which can no longer end its workers."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        while parent is not None and os.getppid() == parent.pid:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def silence_unread() -> None:
    """Drop what is written to an output that nobody can read any more: writing would fail."""
    for number in (1, 2):
        output = select.poll()
        output.register(number, 0)
        if output.poll(0):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)
            os.close(null)
