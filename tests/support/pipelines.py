"""Run a pipeline whose processes are calls in this one, which saves their imports."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from train.recipes import jobs, run
from train.recipes.steps import Step


@contextmanager
def steps_as_calls(call: Callable[..., Any]) -> Iterator[list[str]]:
    """Let `--launcher python` call instead of fork; yield the names of the steps that ran.

    Args:
        call: runs a script with its flags, as the fixture `run_here` does.
    """
    ran: list[str] = []

    def fork(command: list[str], changes: dict[str, str | None]) -> tuple[Any, int, Any]:
        assert command[0] == sys.executable
        call(*command[1:])
        reader, writer = os.pipe()
        os.close(writer)
        return os.fdopen(reader, "rb", 0), 0, lambda: 0

    class Job(jobs.Job):
        def __init__(self, step: Step, *rest: Any) -> None:
            if step.compute is None:
                ran.append(step.name)
            super().__init__(step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "fork", fork)
        patch.setattr(jobs, "Job", Job)
        yield ran
