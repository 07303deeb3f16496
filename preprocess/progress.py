"""Progress of long work: a bar on a terminal, plain lines elsewhere, and messages beside both.

The bar goes to stderr when that is a terminal; it shows the rate and the time left. Otherwise (a
pipe, a log file) plain lines go to stdout, without carriage returns. Only the first rank prints.

`--log_level` chooses what is printed, in this process and in all that it starts: `info` (the
default) is everything, `warning` only lines that begin with that word, and `error` only the
sentence with which a command fails. What was asked for, as a table, is printed at every level.
`debug` adds what DeepSpeed and transformers say, and the traceback of an error.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from contextlib import AbstractContextManager
from typing import Any

from preprocess.errors import LOG_LEVEL, visible
from preprocess.launchers import silence_unread

LINE_SECONDS = 10.0  # longest pause between two plain lines
LEVELS = ("debug", "info", "warning", "error")


def is_first_rank() -> bool:
    """Return whether this process prints for all ranks."""
    return os.environ.get("RANK", "0") == "0"


def _has_terminal() -> bool:
    """Return whether stderr is a terminal with a width, so that it can show a bar."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0


def set_level(level: str) -> None:
    """Choose what is printed, one of `LEVELS`."""
    os.environ[LOG_LEVEL] = level


def level_of_libraries() -> str | None:
    """Return the level for the loggers of libraries, as `logging` names it; None if not chosen."""
    level = os.environ.get(LOG_LEVEL, "")
    return level.upper() if level in LEVELS else None


def _is_printed(level: str) -> bool:
    chosen = (level_of_libraries() or "info").lower()
    return LEVELS.index(level) >= LEVELS.index(chosen)


def say(text: str) -> None:
    """Print lines about the work, or a warning, which begins with that word; see `show`."""
    if _is_printed("warning" if text.lstrip().startswith("warning") else "info"):
        show(text)


def print_news(text: str) -> None:
    """Print a line about the work of a pipeline, which has no ranks itself, as `say` does."""
    if _is_printed("info"):
        print_line(text)


def show(text: str) -> None:
    """Print what was asked for: lines on rank 0, above the bar, control characters escaped."""
    text = visible(text, kept="\n")
    if is_first_rank() and _has_terminal():
        from tqdm import tqdm

        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    elif is_first_rank():
        print_line(text)


def print_line(text: str) -> None:
    """Print a line; where nobody can read it any more, end the work as it may be ended.

    A terminal that was closed changes nothing: SIGHUP says whether the work is to end. A pipe that
    has lost its reader is a request to stop for those who take requests, and an error for others.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        takes_requests = callable(signal.getsignal(signal.SIGTERM))
        if error.errno != errno.EIO and not (error.errno == errno.EPIPE and takes_requests):
            raise
        silence_unread()
        if error.errno == errno.EPIPE:
            signal.raise_signal(signal.SIGTERM)


class Progress(AbstractContextManager["Progress"]):
    """A bar, or plain lines; a context manager, so that errors are printed below the bar.

    Args:
        total: number of units of the work; None if unknown.
        unit: name of a unit, such as "step"; "B" for bytes.
        every: number of units between two plain lines; None: only `LINE_SECONDS` apart.
        initial: number of units done by an earlier process.
        label: name of the work.
        part: whether the work is part of other work with its own bar; it leaves no trace then.
    """

    def __init__(
        self, total: int | None, unit: str = "step", every: int | None = None, initial: int = 0,
        label: str = "", part: bool = False,
    ) -> None:
        self._total, self._unit, self._every, self._label = total, unit, every, label
        self._done = self._printed = self._initial = initial
        self._start = self._printed_at = time.monotonic()
        self._bar: Any = None
        self._quiet = not is_first_rank() or not _is_printed("info")
        if not self._quiet and _has_terminal():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=initial, desc=label or None, dynamic_ncols=True,
                unit=unit if unit == "B" else f" {unit}", unit_scale=unit == "B", leave=not part,
            )

    def update(self, amount: int = 1, text: str = "") -> None:
        """Count `amount` more units, and show `text` beside the count."""
        self._done += amount
        if self._quiet:
            return
        if self._bar is not None:
            if text:
                self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(amount)
            return
        now, every = time.monotonic(), self._every
        due = every is not None and (
            self._done // every > self._printed // every or self._done == self._total
        )
        if due or now - self._printed_at >= LINE_SECONDS:
            print_line(self._line(now - self._start, text))
            self._printed, self._printed_at = self._done, now

    def _line(self, seconds: float, text: str) -> str:
        from tqdm import tqdm

        rate = (self._done - self._initial) / max(seconds, 1e-9)
        if self._unit == "B":
            done, total = (tqdm.format_sizeof(n or 0, "B") for n in (self._done, self._total))
            parts = [f"{done}/{total}", text, f"{tqdm.format_sizeof(rate, 'B')}/s"]
        else:
            total = "" if self._total is None else f"/{self._total:,}"
            parts = [f"{self._unit} {self._done:,}{total}", text, f"{rate:,.3g} {self._unit}/s"]
        if self._total is not None and rate > 0:
            left = tqdm.format_interval(max(0.0, (self._total - self._done) / rate))
            parts.append(f"{left} left")
        label = f"{self._label}: " if self._label else ""
        return label + "  ".join(part for part in parts if part)

    def close(self) -> None:
        """End the bar at its current position."""
        if self._bar is not None:
            self._bar.close()

    def __exit__(self, *rest: object) -> None:
        self.close()
