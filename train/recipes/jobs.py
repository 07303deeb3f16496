"""Run the steps of a plan on one machine, up to `--jobs N` at a time: one journal, one screen.

`schedule.py` says which step may start; here it gets a process, a log, a port of its own and, where
there are GPUs, one of them. One thread does all of it: it waits for the output of all processes,
passes requests to stop on to them, and is the only one that writes the journal. Steps that this
process computes itself get a thread. On many nodes, `run.py` runs the steps one by one.
"""

from __future__ import annotations

import math
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from preprocess.errors import ConfigError, DataError, StopRequested, visible
from preprocess.files import tell_stopping
from preprocess.machine import num_cores
from preprocess.progress import print_line, print_news
from train.config import PipelineConfig
from train.recipes import run
from train.recipes.schedule import StepSchedule
from train.recipes.steps import Step

_NO_MEMORY = re.compile(r"OutOfMemoryError|MemoryError|out of memory|[Cc]annot allocate memory")
# Of a process that the system has killed, as it does for want of memory; behind DeepSpeed's
# launcher too, which exits with -9 modulo 256.
_KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL, 256 - signal.SIGKILL)
# What a driver leaves there: of NVIDIA, of AMD, of Windows' Linux.
_GPU_FILES = ("nvidia[0-9]*", "kfd", "dxg")


def visible_gpus() -> list[str]:
    """Return the GPUs that the steps may use, as their names in CUDA_VISIBLE_DEVICES.

    A process of its own asks torch, since this one is to stay small and without a CUDA context.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not any(
            any(Path("/dev").glob(name)) for name in _GPU_FILES):
        return []
    asked = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"],
        capture_output=True, text=True)
    last = (asked.stdout.split() or ["0"])[-1]
    count = int(last) if last.isdecimal() else 0
    named = os.environ.get(run.VISIBLE_GPUS)
    return named.split(",")[:count] if named else [str(index) for index in range(count)]


def share_machine(options: PipelineConfig) -> list[str]:
    """Give each job its share of the cores, and return the GPUs to share out.

    The number of threads is set for this process, which the others inherit, since it must be known
    before torch is imported.

    Raises:
        ConfigError: more jobs than cores and no GPU; or GPUs whose names the launcher cannot read.
    """
    threads, gpus = options.threads_per_job, []
    if options.jobs > 1:
        gpus, cores = visible_gpus(), num_cores()
        if options.jobs > cores and not gpus:
            raise ConfigError(f"--jobs {options.jobs}: this machine has {cores} cores and no GPU; "
                              f"give 1 to {cores}")
        odd = [gpu for gpu in gpus if not gpu.isdecimal()]
        if odd and options.launcher != "python":
            raise ConfigError(f"{run.VISIBLE_GPUS} names {odd[0]}, and DeepSpeed's launcher reads "
                              "numbers only: give numbers, or add --launcher python")
        threads = threads or max(1, cores // options.jobs)
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    return gpus


class Job:
    """A step that runs: its process, or the thread in which this process computes it.

    Attributes:
        asked: whether it was asked to stop. out_of_memory: whether it said that memory is short.
    """

    def __init__(self, step: Step, log: Path, options: PipelineConfig, port: int, gpu: str) -> None:
        self.step, self.log, self.port, self.gpu = step, log, port, gpu
        self.asked = self.out_of_memory = False
        self._rest, self._closed = b"", False
        log.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(log, "a", encoding="utf-8")  # after an earlier attempt
        self._process: int | None = None
        if step.compute is not None:
            self.output, self._poll = _compute(step)
        else:
            command = run.started_as(step, options, port, gpu)
            self._file.write(f"{shlex.join(command)}\n")
            start = run.fork if options.launcher == "python" else run.spawn
            changes = run.without_ranks() | ({run.VISIBLE_GPUS: gpu} if gpu else {})
            self.output, self._process, self._poll = start(command, changes)
        self.started = time.monotonic()

    def lines(self) -> Iterator[str]:
        """Read what there is, log it, and yield the complete lines; call it when it can be read."""
        chunk = os.read(self.output.fileno(), 1 << 16)
        self._closed = not chunk
        *lines, self._rest = (self._rest + (chunk or b"\n")).split(b"\n")
        for line in lines if chunk or lines[0] else ():
            text = line.decode(errors="replace")
            self._file.write(f"{text}\n")
            self._file.flush()
            self.out_of_memory = self.out_of_memory or bool(_NO_MEMORY.search(text))
            yield text

    def look_after(self) -> None:
        """Stop the workers of a launcher that somebody else has ended."""
        if not self.asked and -(self._poll() or 0) in run.STOPPING:
            self.ask_to_stop()

    def ask_to_stop(self, number: int = signal.SIGTERM) -> None:
        """Pass a request on to all processes of the step; a thread is left to itself."""
        self.asked = True
        if self._process is None:
            self._closed = True
        else:
            run.signal_all(self._process, number)

    @property
    def waits_for_output(self) -> bool:
        return not self._closed

    def code(self) -> int | None:
        """Return the exit code once all is over: 75 after a request, None until then."""
        code = self._poll() if self._closed else None
        if self.asked and self._process is None:
            code = StopRequested.exit_code
        if code is not None and (self.asked or -code in run.STOPPING):
            code = StopRequested.exit_code
        return code

    def close(self) -> None:
        self._file.close()
        self.output.close()


def _compute(step: Step) -> tuple[Any, Any]:
    """Compute a step in a thread; return what it says, as a pipe, and its exit code so far."""
    reader, writer = os.pipe()
    codes: list[int] = []

    def work() -> None:
        said = ""
        try:
            assert step.compute is not None
            step.compute()
            codes.append(0)
        except Exception as error:
            ours = hasattr(error, "exit_code")
            codes.append(error.exit_code if ours else 1)  # type: ignore[attr-defined]
            said = f"{error}\n" if ours else traceback.format_exc()
        with suppress(OSError):
            os.write(writer, said.encode())
        os.close(writer)

    threading.Thread(target=work, daemon=True).start()
    return os.fdopen(reader, "rb", 0), lambda: codes[0] if codes else None


class _Crew:
    """The jobs that run now; a context manager that takes the requests to stop."""

    def __init__(self, gpus: list[str], lead: Callable[[Step], str]) -> None:
        self.jobs: list[Job] = []
        self.requests: list[int] = []
        self._gpus, self._lead, self._spoke = gpus, lead, time.monotonic()

    def __enter__(self) -> _Crew:
        self._requests = run.requests_to(self._pass_on)
        self._requests.__enter__()
        return self

    def __exit__(self, *rest: object) -> None:
        for job in self.jobs:  # after an error of this process
            job.ask_to_stop()
        self._requests.__exit__(None, None, None)

    def _pass_on(self, number: int, frame: Any) -> None:
        tell_stopping()
        self.requests.append(number)
        for job in self.jobs:
            job.ask_to_stop(run.wanted_signal(self.requests))

    def add(self, job: Job) -> None:
        self.jobs.append(job)
        if self.requests:  # one that came while it was started
            job.ask_to_stop(run.wanted_signal(self.requests))

    def gpu(self, step: Step) -> str:
        """Return the GPU with the fewest jobs, the first of them; empty where none is needed."""
        used = [job.gpu for job in self.jobs]
        return min(self._gpus, key=used.count) if step.launched and self._gpus else ""

    def port(self) -> int:
        """Return a port that no job has: one that has just started may not listen yet."""
        taken = {job.port for job in self.jobs}
        while (port := run.free_port()) in taken:
            pass
        return port

    def wait(self) -> list[tuple[Job, int]]:
        """Show what the jobs say until some have ended; return these, with their exit codes."""
        while True:
            talking = [job for job in self.jobs if job.waits_for_output]
            seconds = 1.0 if len(talking) == len(self.jobs) else 0.01
            ready, _, _ = select.select([job.output for job in talking], [], [],
                                        min(seconds, run.HEARTBEAT_SECONDS))
            for job in talking:
                for line in job.lines() if job.output in ready else ():
                    if not run.is_chatter(line):
                        self.say(self._lead(job.step) + visible(line.rstrip(), kept="\t"))
                job.look_after()
            now = time.monotonic()
            if now - self._spoke >= run.HEARTBEAT_SECONDS:
                running = ", ".join(f"{job.step.name} {now - job.started:.0f} s"
                                    for job in self.jobs)
                self.say(f"  ... running: {running}")
            ended = [(job, code) for job in self.jobs if (code := job.code()) is not None]
            if ended:
                self.jobs = [job for job in self.jobs if job not in [one for one, _ in ended]]
                return ended

    def say(self, line: str) -> None:
        self._spoke = time.monotonic()
        print_line(line)


def run_side_by_side(
    steps: list[Step], journal: run.Journal, options: PipelineConfig, gpus: list[str]
) -> None:
    """Run the steps that are not finished, each as soon as what it needs is finished.

    A step that fails stops those that need it; all others go on to their end.

    Args:
        gpus: as of `share_machine`.
    Raises:
        ConfigError: outputs were made otherwise, and `--rerun` is not given.
        StopRequested: stopped on request, or the time was up (exit 75).
        SystemExit: steps failed; with the exit code of the first.
    """
    begin = time.monotonic()
    run.refuse_all(steps, journal, options)
    by_name = {step.name: step for step in steps}
    places = {step.name: f"[{number}/{len(steps)}] {step.name}"
              for number, step in enumerate(steps, start=1)}
    logs = {step.name: run.log_path(journal, step, number)
            for number, step in enumerate(steps, start=1)}
    until = begin + 60 * (options.max_minutes or math.inf)
    schedule = StepSchedule({step.name: step.needs for step in steps}, options.jobs, until,
                        last=[step.name for step in steps if not step.records])

    def lead(step: Step) -> str:
        """Return what begins its lines; the report runs alone, and its tables are wide."""
        return f"  {step.name}: " if step.records and options.jobs > 1 else "  "

    def fail(name: str, code: int, why: str) -> None:
        print(f"pipeline.py: {why}", file=sys.stderr, flush=True)
        schedule.end(name, code)

    def skip_finished(now: float) -> None:
        while names := schedule.arrivals(now):
            for name in names:
                try:
                    if run.is_fresh(by_name[name], places[name], journal, options):
                        schedule.end(name)
                except (ConfigError, DataError) as error:
                    fail(name, error.exit_code, str(error))

    def start_ready(now: float) -> None:
        while not crew.requests and (name := schedule.start(now)) is not None:
            step, partial = by_name[name], schedule.failed or schedule.left()
            if not step.records and partial and not run.has_results(journal.root):
                schedule.end(name)  # nothing to report
                continue
            gpu = crew.gpu(step)
            run.begin_step(step, places[name], journal, options, lead(step), gpu)
            try:
                crew.add(Job(step, logs[name], options, crew.port() if step.launched else 0, gpu))
            except OSError as error:  # no memory or no process number left
                journal.end(step, 0.0, success=False)
                fail(name, DataError.exit_code,
                     f"step {name} cannot be started ({error}); {_with_less(options)}")

    def end(job: Job, code: int) -> None:
        now, step = time.monotonic(), job.step
        job.close()
        journal.end(step, now - job.started, success=code == 0)
        try:
            if code == StopRequested.exit_code:
                fail(step.name, code, f"step {step.name} stopped on request; the same command "
                                      "continues from its checkpoint")
            elif code:
                fail(step.name, run.exit_code(code), _why(job, code, options))
            else:
                run.check_outputs(step, journal, job.log)
                print_news(
                    f"  {step.name}: {now - job.started:.0f} s, {now - begin:.0f} s in total")
                run.clean(step, options)
                run.judge(step, options)
                schedule.end(step.name)
        except DataError as error:
            fail(step.name, error.exit_code, str(error))

    if options.jobs > 1:
        shared = f", on {len(gpus)} GPUs" if gpus else ""
        print(f"up to {options.jobs} steps side by side{shared}; threads per step: "
              f"{os.environ.get('OMP_NUM_THREADS')}", flush=True)
    with _Crew(gpus, lead) as crew:
        try:
            while not crew.requests or crew.jobs:
                now = time.monotonic()
                skip_finished(now)
                start_ready(now)
                if not crew.jobs and schedule.is_over(now):
                    break
                for job, code in crew.wait() if crew.jobs else ():
                    end(job, code)
        finally:
            for job in crew.jobs:  # after an error of this process
                journal.end(job.step, time.monotonic() - job.started, success=False)
    _conclude(schedule, bool(crew.requests), options, journal.root)


def _why(job: Job, code: int, options: PipelineConfig) -> str:
    """Return the sentence about a job that failed."""
    if not job.out_of_memory and code not in _KILLED:
        return run.failure(code, job.step, job.log, options)
    said = "ran out of memory" if job.out_of_memory else \
        "was killed, as the system does for want of memory"
    return (f"step {job.step.name} {said} (exit code {run.exit_code(code)}); "
            f"{_with_less(options)}; its output is in {job.log}")


def _with_less(options: PipelineConfig) -> str:
    """Return what to type where the memory was too small."""
    if options.jobs > 1:
        return f"type the command again with fewer --jobs than {options.jobs}"
    return "give it smaller batches (per_device_train_batch_size, batch_tokens) or more memory"


def _conclude(schedule: StepSchedule, stopped: bool, options: PipelineConfig, root: Path) -> None:
    """End with the reason why steps are missing, if some are."""
    if stopped:
        raise StopRequested("stopped on request; the same command goes on with what is missing")
    left, blocked = schedule.left(), schedule.blocked()
    stops = [name for name, code in schedule.failed.items() if code == StopRequested.exit_code]
    if stops and len(stops) == len(schedule.failed):
        raise StopRequested(f"stopped on request: {run.listed(stops)}; the same command goes on "
                            "with what is missing")
    if schedule.failed:
        told = [f"failed: {name} (exit code {code})" for name, code in schedule.failed.items()]
        if blocked:
            told.append(f"not run, since they need what failed: {run.listed(blocked)}")
        if left:
            told.append(f"not run for want of time: {run.listed(left)}")
        print(f"pipeline.py: {'; '.join(told)}; the same command goes on with what is missing",
              file=sys.stderr, flush=True)
        sys.exit(next(iter(schedule.failed.values())))
    if left:
        raise StopRequested(run.what_is_left(left, options, root))
