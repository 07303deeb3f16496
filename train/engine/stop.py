"""Requests to stop: signals that let the training loop leave a checkpoint first."""

from __future__ import annotations

import signal
import time
from typing import Any

from preprocess.errors import NonFiniteError
from preprocess.files import tell_stopping
from train.engine.group import ranks

# DeepSpeed's launcher looks once per second whether a rank has ended.
LAUNCHER_POLL_SECONDS = 3


class StopSignal:
    """Note requests to stop this run, so that the loop can leave a checkpoint first.

        with StopSignal() as stop:
            for step in ...:
                ... all_reduce_sum(loss, stop.asked()) ...
                if any rank was asked: save, and raise StopRequested

    SIGTERM, SIGUSR1 and SIGHUP, to any rank and however often, and the first Ctrl-C are requests; a
    second Ctrl-C interrupts as usual, and SIGHUP stays ignored where it was (`nohup`). The ranks
    decide together, at a step boundary: their flags travel with the loss. The locks that this
    process holds say that it is stopping, so that the same command waits for it.

    How launchers treat signals, since a request has to reach a rank to count:
    - Slurm (`scancel`, the end of the time limit, `--signal=TERM@60`) signals every process of a
      job step, ranks included. SIGUSR1 has the drawback of ending the launchers below.
    - `deepspeed`, the runner, has no handler on one node: any signal ends it, and the ranks notice
      that it is gone (`preprocess/launchers.py`). Ctrl-C in a terminal, and the end of a terminal,
      reach the ranks themselves as well.
    - `deepspeed.launcher.launch`, its child and the parent of the ranks, answers SIGTERM and
      Ctrl-C by SIGTERM to its ranks one after the other, gives each 30 seconds before SIGKILL, and
      ends with code 1 whatever theirs are. It answers SIGUSR1 and SIGHUP by its own end, which
      they notice.
    - When a rank has died, `launch` (within a second) and `torchrun` send the others the same
      SIGTERM, and SIGKILL after 30 seconds. The survivors take it for a request, which does no
      harm: neither a step nor a checkpoint can be finished without all ranks.
    """

    def __init__(self) -> None:
        self._asked = self._interrupted = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        failed = isinstance(error, RuntimeError) and not isinstance(error, NonFiniteError)
        if failed and ranks().world_size > 1:
            # Probably a collective with a rank that has died. The launcher reports the first error
            # that it finds, and then ends this rank by SIGTERM: leave the report to the dead one.
            time.sleep(LAUNCHER_POLL_SECONDS)

    def asked(self) -> bool:
        """Return whether this rank was asked to stop."""
        return self._asked

    def _note(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = self._interrupted or number == signal.SIGINT
        self._asked = True
        tell_stopping()
