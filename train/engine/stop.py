"""Requests to stop: signals, told apart from the death of another rank."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

from preprocess.errors import NonFiniteError
from train.engine.group import all_reduce_sum, gather_objects, ranks

# DeepSpeed's launcher looks once a second whether a rank has ended.
LAUNCHER_POLL_SECONDS = 3


class StopSignal:
    """Notes that somebody asked this run to stop, so that the loop can leave a checkpoint first.

        with StopSignal() as stop:
            for step in ...:
                ...
                if stop.asked_anywhere(): save, and raise StopRequested

    SIGTERM and SIGUSR1, to any rank and however often, and the first Ctrl-C are requests; a second
    Ctrl-C interrupts as usual. All ranks take the decision together, at a step boundary.

    What launchers do with signals, since a request has to reach a rank to be one:
    - Slurm (`scancel`, the end of the time limit, `--signal=TERM@60`) signals every process of a
      job step, ranks included. SIGUSR1 has the drawback of ending the launchers below.
    - `deepspeed`, the runner, has no handler on one node: SIGTERM ends it and leaves the ranks
      running. Ctrl-C in a terminal reaches the ranks themselves as well.
    - `deepspeed.launcher.launch`, its child and the parent of the ranks, answers SIGTERM and
      Ctrl-C by SIGTERM to its ranks one after the other, gives each 30 seconds before SIGKILL, and
      ends with code 1 whatever theirs are. It answers SIGUSR1 by its own end.
    - When a rank has ended with an error, `launch` (within a second) and `torchrun` send the others
      the same SIGTERM. That is no request: a step without that rank cannot be finished, and a rank
      that waits for it on a GPU would wait for ever. So a thread of each rank looks, on SIGTERM,
      whether a process beside it under the same launcher is gone, and ends this one if so.

    Entering is collective.
    """

    def __init__(self) -> None:
        self._asked = self._interrupted = False
        self._neighbours: list[tuple[int, str]] = []
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        me = _process_identity(os.getpid())
        everyone = gather_objects((os.getpid(), me, _whereabouts()))
        self._neighbours = [
            (pid, identity) for pid, identity, place in everyone
            if place == _whereabouts() and pid != os.getpid()
        ]
        # The byte of a signal is written at once, even while the main thread waits in C.
        self._alarm, self._bell = os.pipe()
        os.set_blocking(self._bell, False)
        self._old_bell = signal.set_wakeup_fd(self._bell, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(self._alarm,), daemon=True).start()
        self._previous = {
            number: signal.signal(number, self._note)
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        }
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, NonFiniteError):
            self._wait_for_the_launcher()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_bell)
        os.close(self._bell)  # `_watch` reads the end of the pipe and returns

    def _wait_for_the_launcher(self) -> None:
        """If a collective failed because another rank has ended, wait for SIGTERM and `_watch`.

        The launcher reports the first error that it finds: leave that to the rank that had one.
        """
        for _ in range(20 if self._neighbours else 0):
            if self._someone_is_gone():
                time.sleep(LAUNCHER_POLL_SECONDS)
                return
            time.sleep(0.05)  # a process closes its sockets a moment before it counts as ended

    def asked_anywhere(self) -> bool:
        """Whether any rank was asked to stop: the same answer on every rank."""
        return all_reduce_sum(float(self._asked))[0] > 0

    def _note(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = self._interrupted or number == signal.SIGINT
        self._asked = True

    def _watch(self, alarm: int) -> None:
        with os.fdopen(alarm, "rb", buffering=0) as stream:
            while numbers := stream.read(64):
                if signal.SIGTERM in numbers and self._someone_is_gone():
                    text = (f"rank {ranks().rank}: another rank has ended; this one ends too, "
                            "without a checkpoint; the same command goes on from the last one\n")
                    os.write(2, text.encode())
                    os._exit(1)

    def _someone_is_gone(self) -> bool:
        return any(_process_identity(pid) != identity for pid, identity in self._neighbours)


def _whereabouts() -> tuple[str, str, int]:
    """Machine, process namespace and launcher of this process: those alike see each other."""
    namespace = Path("/proc/self/ns/pid")
    return (
        socket.gethostname(), os.readlink(namespace) if namespace.exists() else "", os.getppid()
    )


def _process_identity(pid: int) -> str:
    """When a process started, in kernel ticks; "" if it has ended or cannot be told."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
