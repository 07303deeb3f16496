"""Steps side by side: `--jobs`, `--threads_per_job`, `--max_minutes`, `--clean`."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from preprocess.errors import ConfigError, DataError, StopRequested
from preprocess.files import file_sha256
from tests.support.launch import fresh_environment
from train import pipeline
from train.config import PipelineConfig, parse
from train.recipes import jobs as jobs_room
from train.recipes import run as run_room
from train.recipes.recipe import REPOSITORY, load_recipe
from train.recipes.schedule import StepSchedule

# ----------------------------------------------------------------------------- the schedule alone


def simulate(schedule: StepSchedule, seconds: dict[str, float], codes: dict[str, int],
             fresh: set[str]) -> dict[str, tuple[float, float]]:
    """Drive a schedule as the pipeline does, with a clock of our own; return starts and ends."""
    now, running, ran = 0.0, {}, {}
    while True:
        while names := schedule.arrivals(now):
            for name in names:
                if name in fresh:
                    schedule.end(name)
        while (name := schedule.start(now)) is not None:
            running[name] = now + seconds[name]
            ran[name] = (now, running[name])
        if not running:
            assert schedule.is_over(now)
            return ran
        assert not schedule.is_over(now)
        name = min(running, key=lambda one: (running[one], one))
        now = running.pop(name)
        schedule.end(name, codes.get(name, 0))


def plain_twin(needs: dict[str, list[str]], jobs: int, until: float, last: str,
               seconds: dict[str, float], codes: dict[str, int],
               fresh: set[str]) -> dict[str, tuple[float, float]]:
    """The same said plainly: at every event, look at every step in plan order."""
    ran: dict[str, tuple[float, float]] = {}
    now, ended = 0.0, set()
    while True:
        good = {name for name in ended if not codes.get(name)}
        for _ in needs:  # what is finished already may make others ready
            good |= {name for name in fresh if good.issuperset(needs[name])}
        for name in needs:
            running = [one for one in ran if one not in ended]
            if (name != last and name not in ran and name not in good and now < until
                    and len(running) < jobs and good.issuperset(needs[name])):
                ran[name] = (now, now + seconds[name])
        running = [one for one in ran if one not in ended]
        if not running:
            if last not in ran:
                ran[last] = (now, now + seconds[last])
                continue
            return ran
        first = min(running, key=lambda one: (ran[one][1], one))
        now = ran[first][1]
        ended.add(first)


def test_random_graphs_run_as_a_plain_twin_runs_them():
    for seed in range(300):
        check_random_graph(random.Random(seed))


def check_random_graph(draw: random.Random) -> None:
    names = [f"s{number:02d}" for number in range(draw.randint(1, 12))]
    needs = {name: draw.sample(names[:at], min(at, draw.choice((0, 1, 1, 2, 3))))
             for at, name in enumerate(names)}
    needs["report"] = []
    seconds = {name: draw.choice((1.0, 2.0, 5.0)) for name in needs}
    codes = {name: draw.choice((1, 3, 75)) for name in names if draw.random() < 0.15}
    fresh = {name for name in names if draw.random() < 0.2} - codes.keys()
    workers, until = draw.randint(1, 4), draw.choice((math.inf, math.inf, 0.0, 4.0, 10.0))
    schedule = StepSchedule(needs, workers, until, last=["report"])
    ran = simulate(schedule, seconds, codes, fresh)
    assert ran == plain_twin(needs, workers, until, "report", seconds, codes, fresh)
    # And what must hold of any run.
    done = {name for name in ran if name not in codes}
    for name, (start, _) in ran.items():
        assert sum(begin <= start < end for begin, end in ran.values()) <= workers
        assert all(ran[need][1] <= start for need in needs[name] if need in ran)
        assert name == "report" or start < until
    assert ran["report"][0] == max((end for name, (_, end) in ran.items() if name != "report"),
                                   default=0.0)
    assert set(schedule.failed) == ran.keys() & codes.keys()
    assert list(schedule.failed) == sorted(schedule.failed, key=lambda name: (ran[name][1], name))
    missing = {*names} - done - set(schedule.failed) - {
        name for name in fresh if name not in ran}
    assert missing <= {*schedule.blocked(), *schedule.left()}
    assert not {*schedule.blocked()} & {*schedule.left()}
    if until == math.inf:
        assert schedule.left() == []
        if not codes:
            assert ran.keys() == needs.keys() - fresh  # nothing is ever stuck
    if workers == 1:
        assert list(ran) == [name for name in needs if name in ran]


def test_a_plan_in_the_wrong_order_is_a_bug():
    with pytest.raises(ValueError, match="step a needs"):
        StepSchedule({"a": ["b"], "b": []}, 2)


READ_BY_NAME = ("scores", "units", "mask_index", "match")


@pytest.mark.parametrize(("name", "settings"), [
    ("demo", ["floors={naive_bayes: true, untrained: true}"]), ("policies_demo", []),
    ("early_stopped", []), ("demo_quick", ["domain_text.drop_leaked=true"]),
])
def test_a_step_needs_all_whose_outputs_it_reads(name, settings):
    """In plan order nobody notices a need that is not named; side by side it would be a race."""
    recipe = load_recipe(REPOSITORY / "train" / "recipes" / f"{name}.yaml", settings)
    steps = [step for step in pipeline.plan(recipe, "/R")[0] if step.records and not step.compute]
    StepSchedule({step.name: step.needs for step in steps}, 2)
    before: dict[str, set[str]] = {}
    found = set()
    for step in steps:
        before[step.name] = {*step.needs}.union(*(before[need] for need in step.needs))
        flag = ""
        for word in step.command[1:]:
            flag = word.removeprefix("--") if word.startswith("--") else flag
            for other in steps:
                makes = any(word.startswith(path) for path in other.outputs if path.endswith("/"))
                makes |= flag in READ_BY_NAME and any(
                    f".{word}." in Path(path).name for path in other.outputs)
                if makes and other is not step:
                    assert other.name in before[step.name], f"{step.name} reads {other.name}"
                    found.add(flag)
    assert found >= {"tokens", "model_name_or_path", "mask_index"}


# ------------------------------------------------------------------------------------- fake steps

# `OUTPUT TEXT CODE [WAIT...]`: says hello, waits until the files WAIT are there, and writes OUTPUT.
SCRIPT = """
import json, os, sys, time
output, text, code, *wait = sys.argv[1:]
open(output + ".here", "w").close()
print("hello from", os.path.basename(output), flush=True)
end = time.monotonic() + 20
while not all(map(os.path.exists, wait)):
    assert time.monotonic() < end
    time.sleep(0.005)
if text.startswith("say"):
    print(text[4:], flush=True)
if code == "kill":
    os.kill(os.getpid(), 9)
if code == "0":
    told = {"text": text, "threads": os.environ.get("OMP_NUM_THREADS"),
            "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "end_seconds": time.monotonic()}
    open(output, "w").write(json.dumps(told))
sys.exit(int(code))
"""


class Fake:
    """A pipeline of fake steps in a folder."""

    def __init__(self, folder: Path) -> None:
        self.root, self.script = folder / "R", folder / "script.py"
        self.script.write_text(SCRIPT)
        self.root.mkdir()

    def step(self, name: str, needs: str = "", code: str = "0", text: str = "", wait: str = "",
             **options) -> pipeline.Step:
        made = str(self.root / f"{name}.json")
        waits = [str(self.root / f"{other}.json.here") for other in wait.split()]
        options = {"outputs": [made], "records": [made], **options}
        return pipeline.Step(name, [str(self.script), made, text or name, code, *waits],
                             needs=needs.split(), **options)

    def options(self, *flags: str) -> PipelineConfig:
        return parse(PipelineConfig, ["--recipe", "x", "--output_dir", str(self.root), *flags])

    def run(self, steps: list[pipeline.Step], *flags: str, gpus: tuple[str, ...] = ()) -> None:
        options = self.options(*(flags if "--jobs" in flags else ("--jobs", "2", *flags)))
        jobs_room.run_side_by_side(steps, pipeline.Journal(self.root), options, list(gpus))

    def told(self, name: str) -> dict:
        return json.loads((self.root / f"{name}.json").read_text())

    def finished(self) -> set[str]:
        entries = json.loads((self.root / "steps.json").read_text())
        return {name for name, entry in entries.items() if entry["finished"]}


@pytest.fixture
def fake(tmp_path) -> Fake:
    return Fake(tmp_path)


def report(fake: Fake, **options) -> pipeline.Step:
    return fake.step("report", outputs=[], records=[], **options)


def test_until_takes_steps_of_a_name_or_a_prefix_and_what_they_need(fake):
    steps = [fake.step("vocabulary"), fake.step("tokenize-general", "vocabulary"),
             fake.step("tokenize-domain", "vocabulary"), fake.step("tokenizer"),
             fake.step("stage1", "tokenize-general"), report(fake)]

    def names(until: str) -> list[str]:
        return [step.name for step in pipeline.up_to(steps, until)]

    assert names("tokenize") == ["vocabulary", "tokenize-general", "tokenize-domain"]
    assert names("stage1") == ["vocabulary", "tokenize-general", "stage1"]
    assert names("tokenizer") == ["tokenizer"]
    assert names("report") == [step.name for step in steps]
    for until, hint in (("tokenise", "did you mean tokenizer or tokenize-"),
                        ("domain", "did you mean tokenize-domain?"), ("token", "tokenizer"),
                        ("x-1", "--dry_run lists all 6"), ("", "--dry_run lists")):
        with pytest.raises(ConfigError, match=f"--until {until}: no step of this recipe.*{hint}"):
            names(until)


def test_steps_run_side_by_side_in_the_order_of_their_needs(fake, capsys):
    """Each of two waits for the other one to have begun; the third step comes after its needs."""
    steps = [fake.step("one", wait="two"), fake.step("two", wait="one"),
             fake.step("three", "one two"), report(fake)]
    fake.run(steps)
    out = capsys.readouterr().out
    assert "[1/4] one\n" in out and "  one: hello from one.json\n" in out
    assert "  two: hello from two.json\n" in out
    assert out.index("[1/4] one\n") < out.index("[2/4] two\n") < out.index("[3/4] three\n")
    assert out.rindex("[4/4] report\n") > out.index("  three: 0 s")
    ends = [fake.told(name)["end_seconds"] for name in ("one", "two", "three", "report")]
    assert max(ends[:2]) < ends[2] < ends[3]
    log = (fake.root / "logs" / "02-two.log").read_text()
    assert log.startswith(sys.executable) and log.endswith("hello from two.json\n")
    for jobs in ("3", "1"):  # one journal for both ways
        fake.run(steps, "--jobs", jobs)
        assert capsys.readouterr().out.count("finished, skipped") == 3


@pytest.mark.parametrize(("launcher", "jobs"), [
    ("deepspeed", "2"), ("python", "2"), ("python", "1")])
def test_a_failure_stops_what_needs_it_and_nothing_else(fake, capsys, launcher, jobs):
    def steps(code: str) -> list[pipeline.Step]:
        return [fake.step("one"), fake.step("bad", code=code, wait="one"), fake.step("two", "one"),
                fake.step("after", "bad"), fake.step("later", "after two"),
                fake.step("three", "two"), report(fake)]

    with pytest.raises(SystemExit) as ended:
        fake.run(steps("4"), "--launcher", launcher, "--jobs", jobs)
    assert ended.value.code == 4
    assert fake.finished() == {"one", "two", "three"}
    told = capsys.readouterr()
    assert "step bad failed with exit code 4: python " in told.err and "02-bad.log" in told.err
    assert ("failed: bad (exit code 4); not run, since they need what failed: after, later; the "
            "same command goes on") in told.err
    assert "[7/7] report" not in told.out  # nothing to report yet
    fake.run(steps("0"), "--rerun")
    out = capsys.readouterr().out
    assert out.count("finished, skipped") == 3 and "[7/7] report" in out
    assert fake.finished() >= {"one", "two", "three", "bad", "after", "later"}


def test_the_first_failure_gives_the_exit_code_and_what_is_there_is_reported(fake, capsys):
    (fake.root / "finetune").mkdir()
    (fake.root / "finetune" / "results.jsonl").write_text("{}")
    with pytest.raises(SystemExit) as ended:
        fake.run([fake.step("one", code="3"), fake.step("two", code="kill", wait="one"),
                  fake.step("three", text="say torch.OutOfMemoryError: CUDA out of memory. Tried",
                            code="1"), report(fake)])
    told = capsys.readouterr()
    assert "[4/4] report" in told.out
    codes = dict(part.removesuffix(")").split(" (exit code ") for part in
                 told.err.split("failed: ", 1)[1].split("; the same")[0].split("; failed: "))
    assert codes == {"one": "3", "two": "137", "three": "1"}
    assert ended.value.code == int(next(iter(codes.values())))
    assert "step two was killed, as the system does for want of memory (exit code 137)" in told.err
    assert "step three ran out of memory (exit code 1); type the command again with fewer" in (
        told.err)


def test_one_step_at_a_time_out_of_memory_stops_what_needs_it_alone(fake, capsys):
    with pytest.raises(SystemExit) as ended:
        fake.run([fake.step("one", text="say MemoryError", code="1"), fake.step("two"),
                  fake.step("three", "one")], "--jobs", "1")
    assert ended.value.code == 1 and fake.finished() == {"two"}
    told = capsys.readouterr()
    assert "step one ran out of memory (exit code 1); give it smaller batches" in told.err
    assert "--jobs" not in told.err and "  hello from two.json\n" in told.out


@pytest.mark.parametrize("launcher", ["deepspeed", "python"])
def test_steps_inherit_no_rank_from_the_shell(fake, monkeypatch, launcher):
    """Of a shell that a launcher has left, two side by side would listen on one port."""
    fake.script.write_text(SCRIPT.replace('"threads": ', '"rank": {name: os.environ.get(name) for '
                                          f'name in {run_room.RANK_VARIABLES}}}, "threads": '))
    for name in run_room.RANK_VARIABLES:
        monkeypatch.setenv(name, "1")
    fake.run([fake.step("one")], "--launcher", launcher, "--jobs", "1")
    assert set(fake.told("one")["rank"].values()) == {None}
    # On many nodes they are left alone: a cluster may say there where the first node is.
    run_room.run_steps([fake.step("two")], pipeline.Journal(fake.root), fake.options())
    assert set(fake.told("two")["rank"].values()) == {"1"}


def test_what_is_missing_weak_or_made_otherwise_fails_that_step_alone(fake, capsys):
    weak = fake.root / "weak.json"
    steps = [fake.step("lazy", records=[str(fake.root / "never")]), fake.step("one"),
             fake.step("weak", judged=[str(weak)]), fake.step("two", "one"),
             fake.step("masks", "weak")]
    fake.script.write_text(SCRIPT.replace('{"text"', '{"weak": ["too weak"], "text"'))
    with pytest.raises(SystemExit) as ended:
        fake.run(steps)
    assert ended.value.code == 3
    told = capsys.readouterr()
    assert "step lazy ended without an error, but its outputs are not complete" in told.err
    assert "step weak: too weak; what is finished is kept" in told.err
    assert "need what failed: masks;" in told.err
    assert fake.finished() == {"one", "weak", "two"}
    fake.run(steps[1:], "--go_on")
    assert "warning: step weak: too weak (--go_on)" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="step two was run with another command"):
        fake.run([steps[1], fake.step("two", "one", text="other")])
    # An input that comes out different makes what reads it old, and only that.
    (fake.root / "one.json").unlink()
    fake.script.write_text(SCRIPT)
    with pytest.raises(SystemExit) as ended:
        fake.run(steps[1:], "--go_on")
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert "step two is older than step one, which it reads: give another" in told.err
    assert "masks: finished, skipped" in told.out


def test_a_step_that_cannot_be_started_fails_alone(fake, monkeypatch, capsys):
    def start(command: list[str], changes: dict[str, str | None]):
        if "bad" in command:
            raise OSError(12, "Cannot allocate memory")
        return spawn(command, changes)

    spawn = run_room.spawn
    monkeypatch.setattr(run_room, "spawn", start)
    (fake.root / "results.jsonl").write_text("{}")
    with pytest.raises(SystemExit) as ended:
        fake.run([fake.step("bad"), fake.step("one"), fake.step("two", "bad"), report(fake)])
    assert ended.value.code == 3 and fake.finished() == {"one", "report"}
    told = capsys.readouterr()
    assert "step bad cannot be started ([Errno 12] Cannot allocate memory); type" in told.err
    assert "[4/4] report" in told.out


def test_what_the_pipeline_computes_itself_runs_beside_the_others(fake, capsys):
    """Both wait for each other; its errors are sentences, and a bug leaves its traceback."""
    def compute() -> None:
        end = time.monotonic() + 20
        while not (fake.root / "one.json.here").exists():
            assert time.monotonic() < end
            time.sleep(0.005)
        (fake.root / "self.json.here").touch()
        (fake.root / "self.json").write_text("{}")

    def wrong() -> None:
        raise DataError("reviews.csv: no such file; give another")

    def bug() -> None:
        raise KeyError("why")

    fake.run([fake.step("self", compute=compute), fake.step("one", wait="self")])
    assert fake.finished() == {"self", "one"}
    with pytest.raises(SystemExit) as ended:
        fake.run([fake.step("wrong", compute=wrong), fake.step("two"),
                  fake.step("bug", "two", compute=bug)])
    assert ended.value.code == 3 and "two" in fake.finished()
    told = capsys.readouterr()
    assert "  wrong: reviews.csv: no such file; give another\n" in told.out
    assert "failed: wrong (exit code 3); failed: bug (exit code 1)" in told.err
    assert "KeyError: 'why'" in (fake.root / "logs" / "03-bug.log").read_text()


def test_silent_steps_show_that_they_run(fake, capsys, monkeypatch):
    monkeypatch.setattr(run_room, "HEARTBEAT_SECONDS", 0.05)
    fake.script.write_text("import time\ntime.sleep(0.4)\n" + SCRIPT)
    fake.run([fake.step("one"), fake.step("two")])
    assert "  ... running: one 0 s, two 0 s\n" in capsys.readouterr().out


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_time_that_is_up_starts_nothing_new(fake, capsys, jobs):
    steps = [fake.step("one"), fake.step("two", "one"), fake.step("three"), report(fake)]
    fake.run(steps[:1])
    for results in (False, True):
        capsys.readouterr()
        with pytest.raises(StopRequested, match="--max_minutes 1e-09 are over, and 2 steps are "
                           "left: two, three; .*the same command goes on") as ended:
            fake.run(steps, "--jobs", jobs, "--max_minutes", "1e-9")
        assert ("/report has what is there" in str(ended.value)) == results
        out = capsys.readouterr().out
        assert "one: finished, skipped" in out and ("[4/4] report" in out) == results
        (fake.root / "results.jsonl").write_text("{}")
    fake.run(steps, "--jobs", jobs, "--max_minutes", "5")
    assert fake.finished() >= {"one", "two", "three"}


def test_what_runs_when_the_time_is_up_comes_to_its_end(fake, monkeypatch):
    clock = time.monotonic
    begin = clock()

    def late() -> float:  # an hour has passed once the first step has begun
        return clock() + (3600 if (fake.root / "one.json.here").exists() else 0)

    monkeypatch.setattr(time, "monotonic", late)
    with pytest.raises(StopRequested, match="1 steps are left: two"):
        fake.run([fake.step("one"), fake.step("two", "one")], "--max_minutes", "30")
    assert fake.finished() == {"one"} and clock() - begin < 60


def test_checkpoints_go_once_a_training_step_is_finished(fake, capsys):
    run = fake.root / "stage1"
    made = [str(run / "hf" / "lineage.json")]
    step = fake.step("stage1", outputs=[f"{run}/"], records=made, launched=True)
    script = (f"import os; os.makedirs('{run}/hf', exist_ok=True)\n"
              f"os.makedirs('{run}/checkpoints/step_4'); open('{run}/latest', 'w').close()\n"
              f"open('{made[0]}', 'w').write('1')\nopen('{run}/metrics.jsonl', 'w').close()\n")
    fake.script.write_text(script)
    for jobs, clean in (("2", "nothing"), ("2", "checkpoints"), ("1", "checkpoints")):
        fake.run([step], "--launcher", "python", "--jobs", jobs, "--clean", clean)
        names = {path.name for path in run.iterdir()}
        kept = {"checkpoints", "latest"} if clean == "nothing" else set()
        assert names == {"hf", "metrics.jsonl", *kept}
    assert capsys.readouterr().out.count("stage1: finished, skipped") == 2


# ----------------------------------------------------------------------------- stops, and the end

WORKER = """
import os, pathlib, signal, sys, time
from preprocess.errors import run_command
output = sys.argv[1]
def stop(number, frame):
    time.sleep(0.1)
    pathlib.Path(output + ".checkpoint").write_text("saved")
    sys.exit(75)
def main():
    signal.signal(signal.SIGTERM, signal.SIG_IGN if os.environ.get("DEAF") else stop)
    pathlib.Path(output + ".pid").write_text(str(os.getpid()))
    print("ready", flush=True)
    time.sleep(60)
run_command(main)
"""
DRIVER = """
import sys
from preprocess.errors import run_command
from train import pipeline
from train.config import PipelineConfig, parse
from train.recipes.jobs import run_side_by_side
root = sys.argv[1]
def step(name, script, needs=()):
    made = f"{root}/{name}.json"
    return pipeline.Step(name, [f"{root}/../{script}.py", made, name, "0"], outputs=[made],
                         records=[made], needs=list(needs))
steps = [step("one", "script"), step("two", "worker", ["one"]), step("three", "worker", ["one"]),
         step("four", "script", ["two"])]
options = parse(PipelineConfig, ["--recipe", "x", "--output_dir", root, "--jobs", "2"])
run_command(lambda: run_side_by_side(steps, pipeline.Journal(pipeline.Path(root)), options, []))
"""
STOPS = {
    "SIGTERM": [signal.SIGTERM], "SIGINT": [signal.SIGINT], "SIGUSR1": [signal.SIGUSR1],
    "terminal": [signal.SIGHUP, signal.SIGTERM, signal.SIGHUP],
    "twice": [signal.SIGTERM, signal.SIGTERM], "killed": [signal.SIGKILL],
}


@pytest.mark.parametrize("stop", STOPS)
def test_a_stop_reaches_all_steps_that_run(fake, stop):
    (fake.root.parent / "worker.py").write_text(WORKER)
    driver = fake.root.parent / "driver.py"
    driver.write_text(DRIVER)
    environment = {**fresh_environment(), "PYTHONPATH": str(REPOSITORY)}
    if stop == "twice":
        environment["DEAF"] = "1"
    process = subprocess.Popen([sys.executable, driver, str(fake.root)], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    seen = 0
    for line in process.stdout:
        seen += line.endswith(": ready\n")
        if seen == 2:
            break
    assert seen == 2
    workers = [int((fake.root / f"{name}.json.pid").read_text()) for name in ("two", "three")]
    for number in STOPS[stop]:
        process.send_signal(number)
        time.sleep(0.05 if len(STOPS[stop]) > 1 else 0)
    _, error = process.communicate(timeout=60)
    assert process.returncode == (-9 if stop == "killed" else 75), error
    end = time.monotonic() + 60
    while any(map(is_alive, workers)):  # without the pipeline they notice it themselves
        assert time.monotonic() < end
        time.sleep(0.02)
    saved = {path.name for path in fake.root.glob("*.checkpoint")}
    assert saved == (set() if stop == "twice" else
                     {"two.json.checkpoint", "three.json.checkpoint"})
    assert fake.finished() == {"one"}
    if stop != "killed":
        assert error.endswith("stopped on request; the same command goes on with what is missing\n")
    assert not (fake.root / "four.json").exists()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# ------------------------------------------------------------------------ GPUs, cores and refusals


def test_each_job_has_a_gpu_a_port_and_threads(fake, monkeypatch):
    """Jobs spread over the GPUs; the launcher is not told a number, or it would take the first."""
    seen = []

    def start(command: list[str], changes: dict[str, str | None]):
        seen.append((command, changes.get("CUDA_VISIBLE_DEVICES")))
        at = command.index(str(fake.script))
        return spawn([sys.executable, *command[at:]], changes)

    spawn = run_room.spawn
    monkeypatch.setattr(run_room, "spawn", start)
    names = ["a", "b", "c", "d"]
    steps = [fake.step(name, wait=" ".join(names), launched=True) for name in names]
    fake.run([fake.step("text"), *steps], "--jobs", "5", gpus=("2", "7"))
    assert [fake.told(name)["gpu"] for name in names] == ["2", "7", "2", "7"]
    ports = set()
    for command, gpu in seen:
        assert ("deepspeed.launcher.runner" in command) == bool(gpu)
        assert "--num_gpus" not in command
        if gpu:
            ports.add(command[command.index("--master_port") + 1])
    assert len(ports) == 4 and len(seen) == 5
    step, options = steps[0], fake.options("--jobs", "2")
    assert run_room.shown(step, options, "7").startswith("CUDA_VISIBLE_DEVICES=7 deepspeed /")
    assert "deepspeed --num_gpus 1 /" in run_room.shown(step, options)


def test_the_machine_is_shared_out(fake, monkeypatch):
    monkeypatch.setattr(jobs_room, "num_cores", lambda: 8)
    monkeypatch.setattr(jobs_room, "visible_gpus", list)
    for flags, threads in (
        (("--jobs", "3"), "2"), (("--jobs", "8"), "1"), (("--threads_per_job", "4"), "4"),
        (("--jobs", "4", "--threads_per_job", "3"), "3"), ((), "7"),
    ):
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
        assert jobs_room.share_machine(fake.options(*flags)) == []
        assert os.environ["OMP_NUM_THREADS"] == threads
    with pytest.raises(ConfigError, match="--jobs 9: this machine has 8 cores and no GPU; give 1"):
        jobs_room.share_machine(fake.options("--jobs", "9"))
    monkeypatch.setattr(jobs_room, "visible_gpus", lambda: ["0", "1"])
    assert jobs_room.share_machine(fake.options("--jobs", "9")) == ["0", "1"]
    monkeypatch.setattr(jobs_room, "visible_gpus", lambda: ["GPU-8f"])
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES names GPU-8f, and .*numbers only"):
        jobs_room.share_machine(fake.options("--jobs", "2"))
    assert jobs_room.share_machine(fake.options("--jobs", "2", "--launcher", "python"))


@pytest.mark.parametrize(("count", "named", "accelerator", "expected"), [
    ("2", None, None, ["0", "1"]), ("2", "4,6", None, ["4", "6"]), ("1", "3,nonsense", None, ["3"]),
    ("0", "", None, []), ("2", None, "cpu", []), ("oops", None, None, []),
])
def test_gpus_are_named_as_the_driver_takes_them(monkeypatch, tmp_path, count, named, accelerator,
                                                 expected):
    class Device(type(tmp_path)):
        def glob(self, pattern):
            return iter([self] if pattern.startswith("nvidia") else [])

    for name, value in (("CUDA_VISIBLE_DEVICES", named), ("DS_ACCELERATOR", accelerator)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(jobs_room, "Path", Device)
    monkeypatch.setattr(jobs_room.subprocess, "run", lambda *args, **options:
                        subprocess.CompletedProcess(args, 0, f"a warning\n{count}\n"))
    assert jobs_room.visible_gpus() == expected


def test_the_pipeline_itself_stays_small():
    """It may run for hours beside jobs that need the memory."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from train import pipeline\n"
         "from train.config import PipelineConfig\n"
         "pipeline.share_machine(PipelineConfig(recipe='x', output_dir='y', jobs=2, "
         "launcher='python'))\n"
         "print(sorted({'torch', 'deepspeed', 'transformers'} & sys.modules.keys()))"],
        cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout == "[]\n" or "--jobs 2: this machine has 1 cores" in done.stderr


@pytest.mark.parametrize(("flags", "message"), [
    (("--jobs", "0"), "--jobs 0: must be 1 or more"),
    (("--threads_per_job", "0"), "--threads_per_job 0: must be 1 or more"),
    (("--max_minutes", "0"), "--max_minutes 0.0: must be a positive number"),
    (("--jobs", "2", "--hostfile", "h"), "side by side on one machine only; leave --jobs out"),
    (("--threads_per_job", "2", "--hostfile", "h"), "OMP_NUM_THREADS into .deepspeed_env"),
    (("--jobs", "2", "--num_gpus", "2"), "each job is one rank on one GPU"),
    (("--jobs", "2", "--master_port", "29500"), "each job takes a free port of its own"),
])
def test_flags_that_do_not_go_together(fake, flags, message):
    with pytest.raises(ConfigError, match=message):
        fake.options(*flags)


# ------------------------------------------------------------------------------------ a real recipe


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_jobs(
    tmp_path, monkeypatch, still_encoder, reviews_file, labelled_files, capsys
):
    """To the bit, at an equal number of threads; then what `--clean checkpoints` leaves is used."""
    monkeypatch.setattr(jobs_room, "num_cores", lambda: 3)
    # The steps inherit the environment, where earlier tests may have left one port for all.
    for name in os.environ.keys() - fresh_environment().keys():
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    settings = [
        f"train_file={labelled_files['train']}", f"test_file={labelled_files['test']}",
        f"validation_file={labelled_files['test']}", f"text={reviews_file}",
        f"encoder={still_encoder}", "deepspeed_config=ds_configs/cpu.json", "general=null",
        "arms=[none,random]", "floors={naive_bayes: true}", "domain_text.num_workers=1",
        "task_guided.max_steps=2", "task_guided.max_seq_length=32",
        "task_guided.train_batch_size=8", "finetune.max_seq_length=32",
        "finetune.num_train_epochs=1", "finetune.train_batch_size=8", "finetune.seeds='13'",
    ]

    def run(root: Path, *flags: str) -> None:
        pipeline.main(["--recipe", str(REPOSITORY / "train" / "recipes" / "custom.yaml"),
                       "--output_dir", str(root), "--launcher", "python", "--threads_per_job", "1",
                       *flags, "--set", *settings])

    one, three = tmp_path / "one", tmp_path / "three"
    run(one, "--jobs", "1")
    run(three, "--jobs", "3", "--clean", "checkpoints")
    weights = sorted(path.relative_to(one) for path in one.rglob("*.safetensors")
                     if "checkpoints" not in path.parts)
    assert len(weights) == 3
    assert all(file_sha256(one / name) == file_sha256(three / name) for name in weights)
    results = sorted(path.relative_to(one) for path in one.rglob("results.jsonl"))
    assert len(results) == 3
    for name in results:
        rows = [json.loads((root / name).read_text()) for root in (one, three)]
        for row in rows:
            (row.get("pretraining") or {}).pop("seconds", None)
            row.pop("seconds", None)
            row.pop("model_name_or_path", None)
        assert rows[0] == rows[1]
        assert rows[0].get("numerics", {"threads": 1})["threads"] == 1
    digests = [{name: entry["finished"] for name, entry in
                json.loads((root / "steps.json").read_text()).items()} for root in (one, three)]
    assert digests[0] == digests[1]

    run_dir = three / "task_guided" / "random-seed42"
    assert (one / "task_guided" / "random-seed42" / "checkpoints").is_dir()
    assert not (run_dir / "checkpoints").exists()
    assert not (run_dir / "latest").exists()
    capsys.readouterr()
    run(three, "--jobs", "3", "--clean", "checkpoints")
    assert capsys.readouterr().out.count("finished, skipped") == 6
    # Nothing is left to export from: the step says so, and what does not need it is kept.
    (run_dir / "hf" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(SystemExit) as ended:
        run(three, "--jobs", "3")
    assert ended.value.code == 3
    told = capsys.readouterr()
    assert f"or delete {run_dir}, to train it again" in told.out
    assert "failed: task_guided-random-seed42 (exit code 3); not run, since they need" in told.err
