"""How a user's mistake is said, and the exit code that goes with it.

Every command of the three rooms ends through `run_command`: one sentence on stderr that says
what was given, what is allowed and what to type, then the exit code. A traceback means a bug.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn


class ConfigError(ValueError):
    """A wrong option or DeepSpeed configuration."""

    exit_code = 2


class DataError(ValueError):
    """A file that is absent, broken, or made for something else."""

    exit_code = 3


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not a number, or a loss scale at its floor."""

    exit_code = 4


class StopRequested(Exception):
    """A stop that was asked for; the run has left a checkpoint to resume from."""

    exit_code = 75


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run `main`, turn our errors into one line and an exit code, and exit.

    Under a launcher every rank takes the same decision; only rank 0 says it.
    """
    code = 0
    try:
        main()
    except (ConfigError, DataError, NonFiniteError, StopRequested) as error:
        code = error.exit_code
        message = str(error)
    except OSError as error:
        code = DataError.exit_code
        where = f"{error.filename}: " if error.filename else ""
        message = f"{where}{error.strerror or error}"
    except KeyboardInterrupt:
        code = 130
        message = "interrupted"
    if code and os.environ.get("RANK", "0") == "0":
        print(f"{os.path.basename(sys.argv[0])}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
