"""No command outlives what has started it: launchers that are killed, pipes that nobody reads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from preprocess import launchers
from tests.support.launch import ROOT, fresh_environment

# A command of ours that leaves a checkpoint when it is asked to stop.
RANK = """
import pathlib, signal, sys, time
from preprocess.errors import StopRequested, run_command
from preprocess.progress import say
folder = pathlib.Path({folder!r})
(folder / "imports").write_text("")
while not (folder / "go").exists():
    time.sleep(0.01)
def stop(number, frame):
    raise StopRequested("stopped on request")
def main():
    signal.signal(signal.SIGTERM, stop)
    (folder / "trains").write_text("")
    try:
        for step in range(3000):
            say(f"step {{step}}") if {talks} else None
            time.sleep(0.01)
    except StopRequested:
        (folder / "checkpoint").write_text("saved")
        raise
run_command(main)
"""
# Starts the next words, and knows nothing of signals.
LAUNCHER = "import subprocess, sys\nsys.exit(subprocess.run(sys.argv[1:]).returncode)\n"


def wait_for(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)
    return found


@pytest.fixture
def chain(tmp_path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start a launcher, its child `deepspeed.launcher.launch` and a rank; return the launcher."""
    package = tmp_path / "deepspeed" / "launcher"
    package.mkdir(parents=True)
    for file in (package.parent / "__init__.py", package / "__init__.py"):
        file.write_text("")
    (package / "launch.py").write_text(LAUNCHER)
    started: list[subprocess.Popen] = []

    def start(program: str = "bin/deepspeed", middle: bool = True, talks: bool = False,
              **environment: str) -> subprocess.Popen:
        runner, rank = tmp_path / program, tmp_path / "rank.py"
        runner.parent.mkdir(exist_ok=True)
        runner.write_text(LAUNCHER)
        rank.write_text(RANK.format(folder=str(tmp_path), talks=talks))
        launch = [sys.executable, "-u", "-m", "deepspeed.launcher.launch"] if middle else []
        path = f"{tmp_path}{os.pathsep}{ROOT}"
        started.append(subprocess.Popen(
            [sys.executable, str(runner), *launch, sys.executable, str(rank)],
            env={**fresh_environment(), "PYTHONPATH": path, **environment},
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # not as below nohup
        ))
        wait_for((tmp_path / "imports").exists)
        return started[0]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
    for folder in Path("/proc").glob("[0-9]*"):  # whoever is left, of this test alone
        try:
            if str(tmp_path / "rank.py") in (folder / "cmdline").read_text():
                os.kill(int(folder.name), signal.SIGKILL)
        except OSError:
            continue


def children(pid: int) -> list[int]:
    return [int(word) for word in
            Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_over(tmp_path: Path) -> bool:
    return not any(str(tmp_path / "rank.py") in words for words in command_lines())


def command_lines() -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_text()
        except OSError:
            continue


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("killed", ["runner", "launch"])
def test_a_rank_stops_when_a_launcher_above_it_is_gone(chain, tmp_path, killed, number):
    """Also when its own parent lives on, as below a killed `deepspeed`."""
    runner = chain()
    (tmp_path / "go").touch()
    wait_for((tmp_path / "trains").exists)
    os.kill(runner.pid if killed == "runner" else children(runner.pid)[0], number)
    wait_for(lambda: is_over(tmp_path))
    assert (tmp_path / "checkpoint").read_text() == "saved"


def test_a_launcher_that_died_during_the_imports_is_missed(chain, tmp_path):
    runner = chain()
    runner.kill()
    runner.wait()
    (tmp_path / "go").touch()
    wait_for(lambda: is_over(tmp_path))
    assert not (tmp_path / "trains").exists()


def test_a_shell_may_end_before_what_it_started(chain, tmp_path):
    """`nohup ... &`, and then the terminal is closed."""
    shell = chain("run.py", middle=False)
    (tmp_path / "go").touch()
    wait_for((tmp_path / "trains").exists)
    shell.kill()
    time.sleep(1)
    assert not (tmp_path / "checkpoint").exists() and not is_over(tmp_path)


def test_a_command_stops_with_the_pipeline_that_started_it(chain, tmp_path):
    with subprocess.Popen(["sleep", "100"]) as started_by:
        chain("run.py", middle=False,
              **{launchers.STARTED_BY: launchers.describe(started_by.pid)})
        (tmp_path / "go").touch()
        wait_for((tmp_path / "trains").exists)
        started_by.kill()
    wait_for(lambda: is_over(tmp_path))
    assert (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize(("value", "trains"), [
    ("{pid} 1 {host}", False),  # the number belongs to another process by now
    ("999999999 1 {host}", False), ("999999999 1 elsewhere", True), ("", True),
])
def test_a_pipeline_that_is_gone_already(chain, tmp_path, value, trains):
    value = value.format(pid=os.getpid(), host=os.uname().nodename)
    chain("run.py", middle=False, **{launchers.STARTED_BY: value})
    (tmp_path / "go").touch()
    if trains:
        wait_for((tmp_path / "trains").exists)
    else:
        wait_for(lambda: is_over(tmp_path))
    assert (tmp_path / "trains").exists() is trains


def test_output_that_nobody_reads_is_a_request_to_stop(chain, tmp_path):
    """`| head`, or a killed `tee`: the work ends with its checkpoint, not with an error."""
    process = chain("run.py", middle=False, talks=True)
    (tmp_path / "go").touch()
    wait_for((tmp_path / "trains").exists)
    process.stdout.close()
    wait_for(lambda: is_over(tmp_path))
    assert (tmp_path / "checkpoint").read_text() == "saved" and process.wait() == 75


def test_workers_end_with_a_parent_that_is_killed():
    """A sleeping worker of a pool has no other way to know: its siblings keep the pipes open."""
    script = (
        "import multiprocessing, os\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from preprocess.launchers import end_with_parent\n"
        "context = multiprocessing.get_context('fork')\n"
        "pool = ProcessPoolExecutor(2, context, end_with_parent)\n"
        "print(pool.submit(os.getpid).result(), *pool._processes, flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        workers = {int(word) for word in process.stdout.readline().split()}
        assert len(workers) == 2 and all(map(launchers._look, workers))
        process.kill()
    wait_for(lambda: not any(map(launchers._look, workers)))
