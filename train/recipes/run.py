"""Run the steps of a plan: processes, logs, and what is finished or stale."""

from __future__ import annotations

import contextlib
import difflib
import glob
import os
import queue
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from preprocess.errors import ConfigError, DataError, StopRequested
from preprocess.files import atomic_write_json, file_sha256, read_json
from train.config import PipelineConfig
from train.recipes.plan import Step, flag_words

HEARTBEAT_SECONDS = 10
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Journal:
    """`steps.json`: what each step was run with, its seconds, and the order of finishing.

    Seconds are those of the whole process, its start included, summed over attempts that went on
    from each other; an attempt that died with the pipeline itself is not in them.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.path = root, root / "steps.json"
        self.steps: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            self.steps = read_json(
                self.path, "delete it and run again with --rerun, or take another --output_dir"
            )

    def describe(self, step: Step) -> dict[str, Any]:
        """What must not change under a finished step; the output folder may be moved."""
        words = step.command[1:] or flag_words(step.settings)
        described: dict[str, Any] = {}
        if "--deepspeed_config" in words:  # its content counts, not where it lies
            i = words.index("--deepspeed_config")
            config = Path(words[i + 1])
            described["deepspeed_config"] = file_sha256(config) if config.is_file() else None
            words = words[:i] + words[i + 2 :]
        root = str(self.root)
        described["command"] = [
            "OUTPUT_DIR" + word[len(root) :] if word == root or word.startswith(root + "/")
            else word
            for word in words
        ]
        return described

    def objection(self, step: Step, whole: bool) -> str | None:
        """Why what is there cannot be used, as a sentence; None if it can, or nothing is."""
        there = whole or any(_files_of(step))
        record = self.steps.get(step.name)
        if not there:
            return None
        if record is None:
            return f"step {step.name}: {step.outputs[0]} exists, but this pipeline did not make it"
        was, now = record["made_with"], self.describe(step)
        if was != now:
            change = _changed_words(was["command"], now["command"])
            return f"step {step.name} was run with another command ({change})"
        for need in step.needs:
            finished = self.steps.get(need, {}).get("finished")
            if whole and record["finished"] and finished and finished > record["finished"]:
                return f"step {step.name} is older than step {need}, which it reads"
        return None

    def start(self, step: Step) -> None:
        earlier = self.steps.get(step.name, {}).get("seconds") if any(_files_of(step)) else None
        self.steps[step.name] = {"made_with": self.describe(step), "finished": None}
        if earlier is not None:
            self.steps[step.name]["seconds"] = earlier
        atomic_write_json(self.path, self.steps)

    def count(self, step: Step, seconds: float) -> None:
        record = self.steps[step.name]
        record["seconds"] = round(record.get("seconds", 0.0) + seconds, 1)
        atomic_write_json(self.path, self.steps)

    def finish(self, step: Step) -> None:
        last = max((record["finished"] or 0 for record in self.steps.values()), default=0)
        self.steps[step.name]["finished"] = last + 1
        atomic_write_json(self.path, self.steps)


def _changed_words(was: list[str], now: list[str]) -> str:
    """What differs between two commands, with the flag it belongs to."""
    changes = []
    matcher = difflib.SequenceMatcher(a=was, b=now, autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind != "equal":
            here = (*was[a:b], *now[c:d])[0]
            flag = [] if here.startswith("--") else was[max(a - 1, 0) : a]
            before, after = (shlex.join([*flag, *words]) for words in (was[a:b], now[c:d]))
            changes.append(f"was `{before}`, is `{after}`")
    return "; ".join(changes) or "the DeepSpeed JSON has other content"


def _files_of(step: Step) -> list[str]:
    return [path for pattern in step.outputs for path in
            ([pattern] if os.path.isdir(pattern) else glob.glob(pattern))]


def _delete(step: Step) -> None:
    for path in _files_of(step):
        print(f"  deleting {path}", flush=True)
        shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)


def run_steps(steps: list[Step], journal: Journal, options: PipelineConfig) -> None:
    """Run what is not whole, in order.

    Raises:
        ConfigError: something there was made otherwise, and `--rerun` is not given.
        StopRequested: a command stopped on request (exit 75).
        SystemExit: a command failed; with its exit code.
    """
    begin = time.monotonic()
    if not options.rerun:
        _refuse_stale(steps, journal)
    for number, step in enumerate(steps, start=1):
        title = f"[{number}/{len(steps)}] {step.name}"
        whole = step.is_whole()
        objection = journal.objection(step, whole)
        if objection:
            print(f"{title}: {objection}", flush=True)
            _delete(step)
        elif whole:
            print(f"{title}: whole, skipped", flush=True)
            if journal.steps[step.name]["finished"] is None:  # killed between the two writes
                journal.finish(step)
            continue
        print(f"{title}\n  {shown(step, options)}", flush=True)
        started = time.monotonic()
        journal.start(step)
        try:
            if step.compute is not None:
                step.compute()
            else:
                log = journal.root / "logs" / f"{number:02d}-{step.name}.log"
                _check_exit(run_process(started_as(step, options), log), step, log, options)
        finally:
            journal.count(step, time.monotonic() - started)
        journal.finish(step)
        now = time.monotonic()
        print(f"  {step.name}: {now - started:.0f} s, {now - begin:.0f} s in all", flush=True)


def _refuse_stale(steps: list[Step], journal: Journal) -> None:
    """Stop before anything runs if something there cannot be used, or could not afterwards."""
    to_run: set[str] = set()
    for step in steps:
        whole = step.is_whole()
        objection = journal.objection(step, whole)
        if whole and not objection:
            for need in to_run.intersection(step.needs):
                objection = f"step {step.name} is older than step {need}, which it reads"
        if objection:
            raise ConfigError(f"{objection}: take another --output_dir, or add --rerun to delete "
                              "it and make it again")
        if not whole:
            to_run.add(step.name)


def _check_exit(code: int, step: Step, log: Path, options: PipelineConfig) -> None:
    if code == StopRequested.exit_code:
        raise StopRequested(f"step {step.name} stopped on request; the same command goes on "
                            "from its checkpoint")
    if code:
        print(f"pipeline.py: step {step.name} failed with exit code {code}: "
              f"{shown(step, options)}; its output is in {log}", file=sys.stderr, flush=True)
        sys.exit(code if code > 0 else 128 - code)
    if step.name != "report" and not step.is_whole():
        raise DataError(f"step {step.name} ended without an error, but what it should have "
                        f"written is not whole: {', '.join(step.outputs)}; see {log}")


def shown(step: Step, options: PipelineConfig) -> str:
    """The step as a user would type it."""
    if not step.command:
        return f"# {step.name}: computed by the pipeline itself"
    start = ["python"]
    if step.launched and options.launcher == "deepspeed":
        start = ["deepspeed", "--num_gpus", str(options.num_gpus)]
        if options.master_port:
            start += ["--master_port", str(options.master_port)]
    return shlex.join([*start, *step.command])


def started_as(step: Step, options: PipelineConfig) -> list[str]:
    """The step's process: the same interpreter, and a free port for the launcher."""
    if step.launched and options.launcher == "deepspeed":
        port = options.master_port or _free_port()
        return [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus",
                str(options.num_gpus), "--master_port", str(port), *step.command]
    return [sys.executable, *step.command]


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run_process(command: list[str], log_path: Path) -> int:
    """Run a command, echo its lines and log them; a line at least every ten seconds.

    SIGTERM and SIGINT go on to all its processes as SIGTERM (the launcher itself would die and
    leave its workers), so that a training command can write its checkpoint; a second one kills.
    Where somebody else ends the launcher by such a signal, its workers are stopped the same way.

    Returns:
        The exit code; 75 if a signal asked for the stop, whatever the launcher made of it.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1"}, start_new_session=True,
    )
    requests: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        requests.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL if len(requests) > 1 else signal.SIGTERM)

    def look_after() -> None:
        if not requests and -(process.poll() or 0) in STOPPING:
            pass_on(signal.SIGTERM, None)

    handlers = {n: signal.signal(n, pass_on) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        with open(log_path, "a", encoding="utf-8") as log:  # after an earlier attempt
            log.write(shlex.join(command) + "\n")
            for line in _lines_and_heartbeats(process.stdout, look_after):
                log.write(line)
                log.flush()
                if not _LAUNCHER_CHATTER.search(line):
                    print(f"  {line.rstrip()}", flush=True)
        code = process.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return StopRequested.exit_code if requests or -code in STOPPING else code


_LAUNCHER_CHATTER = re.compile(
    r"\[(INFO|WARNING)\] \[(launch|runner|real_accelerator)\.py|real_accelerator\.py:"
)


def _lines_and_heartbeats(stream: Any, every_second: Callable[[], None]) -> Iterator[str]:
    """Lines of a stream until its end; a line that says so while it is silent for long."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    started = said = looked = time.monotonic()
    while True:
        line: str | None = ""
        with contextlib.suppress(queue.Empty):
            line = lines.get(timeout=min(1, HEARTBEAT_SECONDS))
        now = time.monotonic()
        if now - looked >= 1:
            looked = now
            every_second()
        if line is None:
            return
        if not line and now - said >= HEARTBEAT_SECONDS:
            line = f"... running for {now - started:.0f} s\n"
        if line:
            said = now
            yield line
