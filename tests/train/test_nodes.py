"""Many nodes: the hostfile, and nodes that were started by hand and keep step."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from preprocess import errors
from preprocess.errors import ConfigError, run_command
from tests.support.launch import launch_environment
from train import pipeline
from train.config import PipelineConfig, parse
from train.recipes import nodes
from train.recipes import run as run_room

RECIPE = """
encoder: bert-base-uncased
task: {task: mr, data_dir: D}
domain_text: {input: [domain.txt]}
"""


@pytest.fixture
def recipe(tmp_path) -> str:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    return str(path)


@pytest.mark.parametrize(("text", "flags", "message"), [
    (None, "", "--hostfile .*no such file; write one line per node, as `node1 slots=8`"),
    ("", "", "names no node"),
    ("# node1 slots=8\n\n", "", "names no node"),
    ("node1 slots=8\nnode2 slots=x\n", "", "line 2: 'node2 slots=x'"),
    ("node1:8\n", "", "line 1: 'node1:8'; write one line per node"),
    ("node1 slots=0\n", "", "line 1: 'node1 slots=0'"),
    ("node1 slots=8\nnode1 slots=8\n", "", "line 2: node1 is there twice"),
    ("node1 slots=8\nnode2 slots=4\n", "", r"different numbers of slots \(node1 8, node2 4\)"),
    ("127.0.0.1 slots=1\n", "--no_ssh --node_rank 1", "--node_rank 1: .*has 1 nodes; give 0 to 0"),
    ("no.such.host.invalid slots=1\n", "--no_ssh --node_rank 0", "no.such.host.invalid: no host"),
    ("dead slots=1\nnode2 slots=1\n", "", "dead cannot be reached by ssh.*`ssh dead hostname`"),
    ("node1 slots=1\nnode2 slots=1\n", "--set task.data_dir=a$HOME", r"a\$HOME' passes through"),
    ("node1 slots=1\n", "--num_gpus 2", "--num_gpus 2 and --hostfile .*leave --num_gpus out"),
    ("node1 slots=1\n", "--launcher python", "leave --launcher out"),
    ("node1 slots=1\n", "--no_ssh", "--no_ssh and --node_rank go together"),
    ("node1 slots=1\n", "--node_rank 0", "--no_ssh and --node_rank go together"),
])
def test_nodes_that_cannot_work_together_are_named(
    tmp_path, recipe, monkeypatch, text, flags, message
):
    for program, answer in (("pdsh", "exit 0"), ("ssh", 'case "$*" in *dead*) exit 255; esac')):
        (tmp_path / program).write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError, match=message):
        pipeline.main(["--recipe", recipe, "--output_dir", str(tmp_path / "R"), "--hostfile",
                       str(tmp_path / "hosts"), *flags.split()])
    assert not (tmp_path / "R").exists()


def test_a_hostfile_is_read_as_by_deepspeed(tmp_path):
    from deepspeed.launcher.runner import fetch_hostfile

    path = tmp_path / "hosts"
    path.write_text("# first\nnode1  slots=8\n\n  10.0.0.2\tslots=8  \n")
    assert nodes.read_hostfile(str(path)) == dict(fetch_hostfile(str(path)))


def test_launched_steps_name_the_nodes(tmp_path, recipe, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "dry_run", lambda *rest: None)  # the files are not there
    (tmp_path / "hosts").write_text("node1 slots=8\nnode2 slots=8\n")
    flags = ["--recipe", recipe, "--output_dir", str(tmp_path / "R"),
             "--hostfile", f"{tmp_path}/hosts", "--dry_run"]
    by_hand = ["--no_ssh", "--node_rank", "1"]
    for more, expected in (
        ([], []), (["--master_addr", "a", "--master_port", "7"],
                   ["--master_addr", "a", "--master_port", "7"]),
        (by_hand, [*by_hand, "--master_addr", "node1"]),
    ):
        pipeline.main([*flags, *more])
        for line in capsys.readouterr().out.strip().split("\n"):
            command = shlex.split(line)
            if command[0] == "deepspeed":
                assert command[:-len(command)+3+len(expected)] == [
                    "deepspeed", "--hostfile", f"{tmp_path}/hosts", *expected]
                assert "train/" in command[3 + len(expected)]
            else:
                assert "--hostfile" not in command and "preprocess/" in line or "report" in line


PDSH = """#!/bin/bash
while [ "$1" != -w ]; do shift; done
hosts=$2; shift 2; number=0
for host in ${hosts//,/ }; do
    words="$*"; sh -c "${words//%n/$number}" & number=$((number + 1))
done
wait
"""


@pytest.mark.slow
def test_over_ssh_a_launched_step_runs_on_every_node_and_others_on_the_first(
    tmp_path, monkeypatch
):
    """With stand-ins for ssh and pdsh that stay on this machine."""
    programs = {"pdsh": PDSH, "ssh": "#!/bin/sh\ncase \"$*\" in *-I*) echo 127.0.0.1;; esac\n"}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name, value in launch_environment().items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "hosts").write_text("node1 slots=2\nnode2 slots=2\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, sys\nrank = os.environ.get('RANK', 'none')\n"
        "pathlib.Path(sys.argv[-1], rank).write_text(os.environ.get('CROSS_RANK', ''))\n")
    steps = []
    for name in ("alone", "launched"):
        (tmp_path / name).mkdir()
        steps.append(pipeline.Step(name, [str(script), str(tmp_path / name)], outputs=[],
                                   records=[], launched=name == "launched"))
    options = parse(PipelineConfig, ["--recipe", "x", "--output_dir", str(tmp_path / "R"),
                                     "--hostfile", str(tmp_path / "hosts")])
    nodes.check_nodes(options, nodes.read_hostfile(options.hostfile), steps)
    (tmp_path / "R").mkdir()
    pipeline.run_steps(steps, pipeline.Journal(tmp_path / "R"), options)
    assert [path.name for path in (tmp_path / "alone").iterdir()] == ["none"]
    ranks = {path.name: path.read_text() for path in (tmp_path / "launched").iterdir()}
    assert ranks == {"0": "0", "1": "0", "2": "1", "3": "1"}


LAUNCHED = """
import os, pathlib, sys, time
path, what, rank = sys.argv[1], sys.argv[2], os.environ["NODE"]
pathlib.Path(f"{path}.{rank}").write_text(os.environ["PORT"])
end = time.monotonic() + 30
while not all(pathlib.Path(f"{path}.{other}").exists() for other in range(3)):
    assert time.monotonic() < end  # as ranks wait for each other
    time.sleep(0.02)
if f"fail{rank}" == what:
    sys.exit(3)
if what != "good":
    time.sleep(2 if what == "die" else 30)  # in a collective with the one that failed
if rank == "0":
    pathlib.Path(f"{path}.json").write_text("1")
"""


def act_as_node(rank: int, root: Path, script: Path, kind: str) -> None:
    """The pipeline on one of three nodes: a plain step, a launched one, another plain one."""
    os.setsid()
    descriptor = os.open(f"{root}.out{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
    texts = {"one": "plain", "two": kind, "three": "plain"}
    if kind == "odd" and rank == 2:
        texts["two"] = "even"
    steps = [
        pipeline.Step(name, [str(script), f"{root}/{name}", text], needs=needs, outputs=[],
                      records=[f"{root}/{name}.json"], launched=name == "two")
        for (name, text), needs in zip(texts.items(), ([], ["one"], ["two"]), strict=True)
    ]
    if kind == "blind" and rank == 2:  # a disk of its own: what the others wrote is not there
        nodes.SHARED_DISK_SECONDS = 0.5
        steps = [dataclasses.replace(step, records=["/elsewhere"]) for step in steps]
    pipeline.plan = lambda recipe, root: (steps, [])
    pipeline.load_recipe = lambda path, settings: {"label_budgets": []}

    def started_as(step, options, port=0):
        os.environ.update(NODE=str(rank), PORT=str(port))
        alone = f"import pathlib; pathlib.Path('{root}/{step.name}.json').write_text('1')"
        return [sys.executable, *(step.command if step.launched else ["-c", alone])]

    run_room.started_as = started_as
    errors._leave_group = lambda together: None  # of tests before this one: a fork has none
    sys.argv = ["pipeline.py"]
    run_command(lambda: pipeline.main([
        "--recipe", "x", "--output_dir", str(root), "--hostfile", f"{root}.hosts", "--no_ssh",
        "--node_rank", str(rank)]))


@pytest.fixture
def three_nodes(tmp_path):
    """Run the pipeline on three nodes by hand; return exit codes and outputs."""
    (tmp_path / "launched.py").write_text(LAUNCHED)
    (tmp_path / "R.hosts").write_text("".join(f"127.0.0.{n} slots=1\n" for n in (1, 2, 3)))
    context, root = multiprocessing.get_context("fork"), tmp_path / "R"

    def run(kind="good", numbers=(2, 0, 1), meanwhile=lambda processes: None):
        processes = {
            number: context.Process(target=act_as_node, args=(
                number, root, tmp_path / "launched.py", kind)) for number in numbers}
        for process in processes.values():
            process.start()
            time.sleep(0.2)
        meanwhile(processes)
        for process in processes.values():
            process.join(60)
            if process.exitcode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.join()
        texts = [Path(f"{root}.out{number}") for number in range(3)]
        return ([processes[number].exitcode for number in sorted(numbers)],
                [path.read_text() if path.exists() else "" for path in texts])

    run.root = root
    return run


def test_nodes_started_by_hand_keep_step(three_nodes):
    """In any order, the first node not first; and again, when everything is finished."""
    root = three_nodes.root
    codes, texts = three_nodes()
    assert codes == [0, 0, 0], texts
    assert len({(root / f"two.{number}").read_text() for number in range(3)}) == 1  # one port
    assert sorted(path.name for path in root.glob("[ot]*")) == [
        "one.json", "three.json", "two.0", "two.1", "two.2", "two.json"]
    assert (root / "logs" / "02-two.node1.log").is_file()
    assert "[2/3] two" in texts[1] and "[1/3]" not in texts[1]
    assert three_nodes(numbers=(0, 1, 2))[0] == [0, 0, 0]


@pytest.mark.parametrize(("kind", "codes", "said"), [
    ("fail0", [3, 3, 3], "step two failed with exit code 3"),
    ("fail2", [3, 3, 3], "node 2 has stopped with exit code 3"),
    ("blind", [3, 3, 3], "node 2 has stopped with exit code 3"),
    ("odd", [2, 2, 2], "--node_rank 2 was given another recipe or other settings"),
])
def test_a_node_that_fails_ends_all(three_nodes, kind, codes, said):
    began = time.monotonic()
    found, texts = three_nodes(kind)
    assert found == codes and said in texts[0] and time.monotonic() - began < 25
    assert "the first node ended with exit code" in texts[1]
    assert kind != "blind" or "does not see what step one has written" in texts[2]


def test_a_stop_of_one_node_stops_all(three_nodes):
    def stop(processes):
        while not (three_nodes.root / "two.2").exists():
            time.sleep(0.05)
        os.kill(processes[1].pid, signal.SIGTERM)

    codes, texts = three_nodes("hang", meanwhile=stop)
    assert codes == [75, 75, 75], texts

    def stop_while_it_waits(processes):
        while not (three_nodes.root / "nodes" / "node-1.json").exists():
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(processes[0].pid, signal.SIGTERM)

    shutil.rmtree(three_nodes.root)
    codes, texts = three_nodes(numbers=(0, 1), meanwhile=stop_while_it_waits)
    assert codes == [75, 75] and "stopped on request" in texts[0]


def test_a_node_alone_gives_up(three_nodes, monkeypatch):
    monkeypatch.setattr(nodes, "JOIN_SECONDS", 1.0)
    codes, texts = three_nodes(numbers=(0, 1))
    assert codes == [2, 2] and "--node_rank 2 was not started within" in texts[0]
    codes, texts = three_nodes(numbers=(2,))  # which the end of the earlier run does not deceive
    assert codes == [2] and "--node_rank 0 has not answered in" in texts[2]
    assert "type the same command on every node" in texts[2]


def test_a_first_node_that_dies_is_noticed(three_nodes, monkeypatch):
    monkeypatch.setattr(nodes, "LOST_SECONDS", 2.0)

    def kill(processes):
        while not (three_nodes.root / "two.2").exists():
            time.sleep(0.05)
        os.killpg(processes[0].pid, signal.SIGKILL)

    codes, texts = three_nodes("die", meanwhile=kill)
    assert codes[1:] == [3, 3] and "the first node has not written" in texts[1]
