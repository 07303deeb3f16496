"""Which step of a plan may start next: bookkeeping alone, without processes, files or a clock."""

from __future__ import annotations

import math
from collections.abc import Collection


class StepSchedule:
    """Steps on their way from waiting over ready and running to done or failed.

    A step is ready once all that it needs is done. A failed one stops what needs it, directly or
    through others, and nothing else. Steps that are to be last become ready when nothing else can
    run any more, whatever has failed and however late it is.

    Args:
        needs: step -> the steps that it needs, in plan order.
        jobs: how many steps may run at a time.
        until: the time from which nothing new starts, in seconds of the caller's clock.
        last: the steps that run last.
    Raises:
        ValueError: a step needs one that does not come before it.

    Attributes:
        failed: step -> its exit code, in the order in which they failed.
    """

    def __init__(self, needs: dict[str, list[str]], jobs: int, until: float = math.inf,
                 last: Collection[str] = ()) -> None:
        names: set[str] = set()
        for name, needed in needs.items():
            if not names.issuperset(needed):
                raise ValueError(f"step {name} needs {needed}, not all of which come before it")
            names.add(name)
        self.failed: dict[str, int] = {}
        self._needs, self._jobs, self._until, self._last = needs, jobs, until, last
        self._waiting = list(needs)
        self._ready: list[str] = []
        self._running: set[str] = set()
        self._done: set[str] = set()

    def arrivals(self, now: float) -> list[str]:
        """Return the steps that have become ready, in plan order, each of them once.

        One that is finished already can be ended at once, which may make others ready.
        """
        found = self._arriving(now)
        self._waiting = [name for name in self._waiting if name not in found]
        self._ready = [name for name in self._needs if name in {*self._ready, *found}]
        return found

    def _arriving(self, now: float) -> list[str]:
        found = [name for name in self._waiting
                 if name not in self._last and self._done.issuperset(self._needs[name])]
        if found or self._running or self._startable(now):
            return found
        return [name for name in self._waiting if name in self._last][:1]

    def _startable(self, now: float) -> list[str]:
        return [name for name in self._ready if name in self._last or now < self._until]

    def start(self, now: float) -> str | None:
        """Take the next ready step in plan order; None if there is none that may start now."""
        startable = self._startable(now)
        if not startable or len(self._running) >= self._jobs:
            return None
        self._ready.remove(startable[0])
        self._running.add(startable[0])
        return startable[0]

    def end(self, name: str, code: int = 0) -> None:
        """Note that a step has ended; or that it is ready and finished already, or cannot start."""
        if name in self._running:
            self._running.remove(name)
        else:
            self._ready.remove(name)
        if code:
            self.failed[name] = code
        else:
            self._done.add(name)

    def is_over(self, now: float) -> bool:
        """Return whether nothing runs, and nothing can start any more."""
        return not (self._running or self._startable(now) or self._arriving(now))

    def blocked(self) -> list[str]:
        """Return the steps that do not run because of a failure."""
        stopped = set(self.failed)
        for name, needed in self._needs.items():
            if stopped.intersection(needed):
                stopped.add(name)
        return [name for name in self._needs if name in stopped and name not in self.failed]

    def left(self) -> list[str]:
        """Return the steps that have not run, but for want of time."""
        blocked = self.blocked()
        return [name for name in self._needs
                if name in {*self._waiting, *self._ready} and name not in blocked]
