"""Ranks without their imports: a server that has imported everything once, and forks.

A launch costs 15 seconds of imports, a fork next to nothing, so that a test can kill a hundred
runs. Tests use `Server`; run as a script, this file is the server. It reads one JSON job per line
and answers one JSON line when all ranks of the job have ended. Before the next job it imports
whatever a rank has imported. Like DeepSpeed's launcher it sends SIGTERM to the other ranks when one
ends with an error.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tests.support.launch import ROOT

PRELOADED = ("torch", "deepspeed", "transformers")


class Server:
    """A running server; used as a context manager.

    Args:
        modules: further modules to import once.
    """

    def __init__(self, *modules: str) -> None:
        self._command = [sys.executable, "-m", "tests.support.forked_ranks", *modules]

    def __enter__(self) -> Server:
        environment = {
            key: value for key, value in os.environ.items()
            if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        } | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false",
             "PYTHONWARNINGS": "ignore"}
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment, cwd=ROOT,
        )
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def start(self, function: str, log: Path, ranks: int = 1, *, kill_after: float = 0.0,
              kill_rank: int | None = None, limit: float = 300.0, **arguments: Any) -> None:
        """Start a job; `finish` waits for it.

        Args:
            function: `module:name`, called as name(**arguments) on every rank.
            log: file for the output of all ranks.
            kill_after: seconds until SIGKILL; 0 for never.
            kill_rank: which rank is killed; None for all of them.
            limit: seconds until the job counts as hanging and is killed.
        """
        job = {
            "function": function, "log": str(log), "ranks": ranks, "kill_after": kill_after,
            "kill_rank": kill_rank, "limit": limit, "arguments": arguments,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()

    def finish(self) -> dict[str, Any]:
        """Wait for the job: `codes` (exit codes by rank, -9 for SIGKILL) and `seconds`."""
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def run(self, *words: Any, **options: Any) -> dict[str, Any]:
        """`start` and `finish`."""
        self.start(*words, **options)
        return self.finish()


def _become_rank(job: dict[str, Any], rank: int, port: int) -> None:
    """Run the job's function in a forked child; never returns."""
    code = 1
    try:
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(job["ranks"]), LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )
        descriptor = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(descriptor, stream.fileno())
        module, name = job["function"].split(":")
        function = getattr(importlib.import_module(module), name)
        function(**job["arguments"])
        code = 0
        if rank == 0:
            Path(job["log"] + ".modules").write_text("\n".join(sys.modules))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(job: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alive: dict[int, int] = {}
    for rank in range(job["ranks"]):
        child = os.fork()
        if not child:
            _become_rank(job, rank, port)
        alive[child] = rank
    codes: list[int | None] = [None] * job["ranks"]
    kill_at = started + job["kill_after"] if job["kill_after"] else None
    last = started + job["limit"]
    while alive:
        child, status = os.waitpid(-1, os.WNOHANG)
        now = time.monotonic()
        if child:
            codes[alive.pop(child)] = os.waitstatus_to_exitcode(status)
            if status:
                for other in alive:
                    os.kill(other, signal.SIGTERM)
        elif kill_at is not None and now >= kill_at:
            kill_at = None
            for other, rank in alive.items():
                if job["kill_rank"] in (None, rank):
                    os.kill(other, signal.SIGKILL)
        elif now >= last:
            last = float("inf")
            for other in alive:
                os.kill(other, signal.SIGKILL)
        else:
            time.sleep(0.005)
    seconds = time.monotonic() - started
    _learn(Path(job["log"] + ".modules"))
    return {"codes": codes, "seconds": seconds}


def _learn(modules: Path) -> None:
    """Import what the first rank had imported at its end."""
    if not modules.exists():
        return
    for name in modules.read_text().split():
        if name not in sys.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    modules.unlink()


def main() -> None:
    """Answer jobs until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed here is no answer
    for name in (*PRELOADED, *sys.argv[1:]):
        importlib.import_module(name)
    for line in sys.stdin:
        answers.write(json.dumps(_run(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
