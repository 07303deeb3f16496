"""Kill at any moment, stop on request, a rank that dies: what is left, and how the run resumes.

`make test` takes a sample of the kills; `make test-faults` takes them all.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from preprocess import launchers
from preprocess.errors import StopRequested, run_command
from preprocess.files import WriterLock, tell_stopping
from tests.support.forked_ranks import Server
from tests.support.kills import count_operations, die
from tests.support.launch import ROOT, free_port, launch_environment
from tests.support.runs import arguments, logged, write_ds_config
from tests.support.states import assert_same_bits, states
from train import pipeline
from train.config import PipelineConfig, parse
from train.run_dir import metrics
from train.run_dir.checkpoint import check_checkpoint, find_checkpoint

STEPS = 6
LIMIT = 2
SEED = int(os.environ.get("SELMASK_FAULT_SEED", "0"))
"""Seeds the random moments; another one gives another campaign."""


# --------------------------------------------------------------------------- inside a rank


def die_in_a_shard(fatal: int) -> None:
    """Write half of the `fatal`-th file of `torch.save`, then die."""
    plain, calls = torch.save, [0]

    def half(content: Any, path: Any, *words: Any, **names: Any) -> None:
        plain(content, path, *words, **names)
        calls[0] += 1
        if calls[0] == fatal:
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    torch.save = half


def disk_full() -> None:
    raise OSError(28, "No space left on device", "/somewhere/file")


def ask(number: int) -> None:
    os.kill(os.getpid(), number)


IN_STEP: dict[str, Callable[[], Any]] = {
    "killed": die,
    "error": disk_full,
    "sigterm": lambda: ask(signal.SIGTERM),
    "sigusr1": lambda: ask(signal.SIGUSR1),
    "ctrl-c": lambda: ask(signal.SIGINT),
    "sighup": lambda: ask(signal.SIGHUP),
    "nohup": lambda: ask(signal.SIGHUP),
    # Slurm signals all processes, and then the launcher its ranks.
    "again and again": lambda: [ask(signal.SIGTERM) for _ in range(5)],
    "launcher": lambda: os.kill(int(os.environ[launchers.STARTED_BY].split()[0]), signal.SIGKILL),
}
FAULTY_STEP = 3


def inject(kind: str, rank: int) -> None:
    """Inject a fault into the third step of one rank, or of every rank (-1)."""
    from train import engine as ds
    from train.stages import masked_lm as mlm

    plain = mlm.train_step

    def step(engine: Any, *words: Any, **names: Any) -> Any:
        if engine.global_steps == FAULTY_STEP - 1 and rank in (-1, ds.ranks().rank):
            IN_STEP[kind]()
        return plain(engine, *words, **names)

    mlm.train_step = step


def train(command: str, words: list[str], run_dir: str, fault: dict[str, Any],
          launcher: str = "") -> None:
    """Run a command on a rank with a fault; note each commit, and the operations of an intact run.

    Args:
        fault: `kind` (none, operation, shard or one of `IN_STEP`), `number` and `rank`.
        launcher: what the rank takes for the pipeline above it.
    """
    from train import engine as ds
    from train import finetune, pretrain
    from train.config import PretrainConfig, parse
    from train.run_dir import checkpoint

    counted: list[str] = []
    if fault["kind"] == "nohup":
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if launcher:
        os.environ[launchers.STARTED_BY] = launcher
    if fault["kind"] in IN_STEP:
        inject(fault["kind"], fault["rank"])
    elif fault["rank"] == ds.ranks().rank:
        if fault["kind"] == "shard":
            die_in_a_shard(fault["number"])
        else:
            counted = count_operations(run_dir, fault["number"])
    plain = checkpoint._commit

    def noted(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
        plain(temporary, final, manifest)
        with open(f"{run_dir}.committed", "a") as file:
            file.write(f"{final.name[5:]}\n")

    checkpoint._commit = noted
    sys.argv = [f"{command}.py"]
    main = {"finetune": lambda: finetune.main(words),
            "pretrain": lambda: pretrain.run(parse(PretrainConfig, words))}[command]
    if fault["kind"] != "none":
        run_command(main)
    main()
    if ds.is_main():
        Path(f"{run_dir}.operations").write_text("\n".join(counted))


# --------------------------------------------------------------------------- the campaign


class Campaign:
    """One command on a number of ranks: its unbroken run, and broken ones that must equal it."""

    def __init__(self, server: Server, folder: Path, command: str, ranks: int,
                 words: list[str]) -> None:
        self._server, self.folder, self._ranks = server, folder, ranks
        self._command, self._words = command, words
        folder.mkdir()
        self.whole = folder / "whole"
        done = self.attempt(self.whole)
        assert done["codes"] == [0] * ranks, (folder / "log").read_text()[-4000:]
        done = self.attempt(folder / "timed")  # the first one may have had to import
        self.seconds = done["seconds"]
        operations = (folder / "whole.operations").read_text().splitlines()
        self.operations = [line.split("tmp-")[0] for line in operations]
        self.steps_dir = "checkpoints" if command == "pretrain" else "seed_13/checkpoints"

    def attempt(self, run_dir: Path, kind: str = "none", number: int = 0, rank: int = 0,
                **options: Any) -> dict[str, Any]:
        """Run the command once; `kill_after` is one of the options."""
        log = self.folder / "log"
        log.write_text("")
        fault = {"kind": kind, "number": number, "rank": rank}
        return self._server.run(
            "tests.robustness.test_faults:train", log, self._ranks, command=self._command,
            fault=fault, words=[*self._words, "--output_dir", str(run_dir)],
            run_dir=str(run_dir), **options,
        )

    def survive(self, name: str, **fault: Any) -> bool:
        """Kill a run, check what is left, resume until the end; return whether the kill came."""
        run_dir = self.folder / name
        done = self.attempt(run_dir, **fault)
        killed = -9 in done["codes"]
        if not killed:
            assert done["codes"] == [0] * self._ranks, (self.folder / "log").read_text()[-4000:]
        self.check_what_is_left(run_dir)
        newest = find_checkpoint((run_dir / self.steps_dir).parent, "auto")
        done = self.attempt(run_dir)
        said = (self.folder / "log").read_text()
        assert done["codes"] == [0] * self._ranks, f"{name}: {said[-4000:]}"
        assert "passed over" not in said
        assert newest is None or f"resumed from {newest}" in said or "finished already" in said
        self.check_the_end(run_dir)
        shutil.rmtree(run_dir)
        Path(f"{run_dir}.committed").unlink()
        return killed

    def check_what_is_left(self, run_dir: Path) -> None:
        """Check that no committed checkpoint is lost or damaged."""
        log = Path(f"{run_dir}.committed")
        committed = [int(line) for line in log.read_text().split()] if log.exists() else []
        folder = run_dir / self.steps_dir
        if (run_dir / "results.jsonl").exists():
            return  # a seed that is finished has its checkpoints removed
        paths = [p for p in folder.glob("step_*") if p.name[5:].isdigit()]
        problems = [check_checkpoint(path) for path in paths]
        assert not any(problems), problems
        there = sorted(int(path.name[5:]) for path in paths)
        if committed and self._command == "pretrain":  # fine-tuning removes them at its end
            assert there[-1] >= committed[-1] and len(there) >= min(LIMIT, len(committed))
        losses = run_dir / "metrics.jsonl"
        whole_lines = losses.exists() and losses.read_bytes().endswith(b"\n")
        if whole_lines and self._command == "pretrain":  # it saves at every step
            steps = len(logged(run_dir, metrics.TRAIN_LOSS))
            assert steps <= 1 or there and there[-1] >= steps - 1

    def check_the_end(self, run_dir: Path) -> None:
        """Compare the bits and the files with those of the unbroken run."""
        if self._command == "pretrain":
            last = f"checkpoints/step_{STEPS}"
            assert_same_bits(states(run_dir / last), states(self.whole / last))
            assert logged(run_dir, metrics.TRAIN_LOSS) == logged(self.whole, metrics.TRAIN_LOSS)
            model = "hf/model.safetensors"
        else:
            for name in ("predictions.jsonl", "metrics.jsonl"):
                ours, theirs = (
                    [{k: v for k, v in json.loads(line).items()
                      if not k.startswith(("time", "throughput/", "memory/"))} for line in
                     (folder / "seed_13" / name).read_text().splitlines()]
                    for folder in (run_dir, self.whole)
                )
                assert ours == theirs, name
            model = "seed_13/hf/model.safetensors"
        assert (run_dir / model).read_bytes() == (self.whole / model).read_bytes()
        names = {path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*")}
        expected = {path.relative_to(self.whole).as_posix() for path in self.whole.rglob("*")}
        # After the last commit nothing may be left to save, and so nobody to remove one too many.
        extra = f"checkpoints/step_{STEPS - LIMIT}"
        # And a run that was killed after its last write is finished: nobody takes its lock over.
        anyhow = ("events.out.", "seed_13/events.out.", ".lock", extra)
        assert not {name for name in names ^ expected if not name.startswith(anyhow)}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as one:
        yield one


@pytest.fixture(scope="module")
def campaigns(server, tmp_path_factory, reviews_store, tiny_encoder, labelled_files) -> Any:
    """Return the campaigns by name; each starts when it is first asked for."""
    folder = tmp_path_factory.mktemp("faults")
    made: dict[str, Campaign] = {}

    def campaign(command: str, ranks: int = 1, stage: int = 0) -> Campaign:
        name = f"{command}-{ranks}-zero{stage}"
        if name not in made:
            (folder / f"{name}.ds").mkdir()
            config = write_ds_config(folder / f"{name}.ds", stage)
            if command == "pretrain":
                words = arguments(
                    reviews_store, tiny_encoder, folder, max_steps=STEPS, save_steps=1,
                    save_total_limit=LIMIT, eval_fraction=0, deepspeed_config=config,
                )
            else:
                words = [
                    "--task", "custom", "--train_file", labelled_files["train"], "--test_file",
                    labelled_files["test"], "--model_name_or_path", tiny_encoder,
                    "--num_train_epochs", "3", "--max_seq_length", "32", "--save_steps", "1",
                    "--per_device_train_batch_size", "16", "--deepspeed_config", config,
                    "--logging_steps", "1", "--save_total_limit", str(LIMIT),
                ]
            made[name] = Campaign(server, folder / name, command, ranks, words)
        return made[name]

    return campaign


# Moments of the save of step 4, and of the end, by the operation before which the kill comes.
MOMENTS = {
    "before anything": "os.mkdir ",
    "options not yet named": "os.rename /.config.resolved.yaml.",
    "folder made": "os.mkdir /checkpoints/step_4.tmp/state",
    "files not yet synced": "fsync /checkpoints/step_4.tmp/state/",
    "before the manifest": "open /checkpoints/step_4.tmp/.manifest.json.",
    "manifest not yet named": "os.rename /checkpoints/step_4.tmp/.manifest.json.",
    "before the commit": "os.rename /checkpoints/step_4.tmp",
    "after the commit": "fsync /checkpoints",
    "before the pointer": "os.rename /.latest.",
    "before the removal": "os.rename /checkpoints/step_2",
    "in the removal": "os.remove /checkpoints/step_2.tmp/manifest.json",
    "removal almost done": "os.rmdir /checkpoints/step_2.tmp",
    "in the export": "open /.hf.",
    "before the export is named": "os.rename /.hf.",
}


def number_of(campaign: Campaign, moment: str) -> int:
    """Return the operation at a moment; if every save does it, that of the third save."""
    wanted = MOMENTS[moment]
    found = [i for i, line in enumerate(campaign.operations, 1)
             if line == wanted or wanted[-1] in "/." and line.startswith(wanted)]
    return found[2] if moment in ("after the commit", "before the pointer") else found[0]


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_chosen_moment(moment, campaigns):
    campaign = campaigns("pretrain")
    assert campaign.survive(moment, kind="operation", number=number_of(campaign, moment))


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.3, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_killed_at_a_random_time(share, campaigns):
    campaign = campaigns("pretrain")
    moment = campaign.seconds * (share + 0.1 * random.Random(f"{SEED} {share}").random())
    campaign.survive(f"time {share}", kill_after=moment)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stage", "kind", "number", "rank"), [
    (1, 0, "shard", 1, 0), (1, 0, "shard", 2, 0), (1, 0, "shard", 5, 0), (2, 1, "shard", 5, 1),
    (2, 1, "operation", 12, 1), (2, 1, "operation", 150, 0),
])
def test_killed_inside_a_file_or_on_one_of_two_ranks(ranks, stage, kind, number, rank, campaigns):
    """The other rank ends too and commits nothing."""
    assert campaigns("pretrain", ranks, stage).survive("kill", kind=kind, number=number, rank=rank)


@pytest.mark.slow
def test_fine_tuning_is_killed(campaigns):
    campaign = campaigns("finetune")
    assert campaign.survive("best", kind="operation", number=len(campaign.operations) // 2)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("command, ranks, stage, every", [
    ("pretrain", 1, 0, 1), ("pretrain", 1, 3, 4), ("pretrain", 2, 1, 2), ("pretrain", 2, 2, 6),
    ("pretrain", 2, 3, 6), ("pretrain", 4, 1, 12), ("finetune", 1, 0, 3), ("finetune", 2, 1, 12),
])
def test_killed_at_every_moment(command, ranks, stage, every, campaigns):
    """Before the n-th operation on the disk, inside files, and at random times."""
    campaign = campaigns(command, ranks, stage)
    generator = random.Random(f"{SEED} {command} {ranks} {stage}")
    operations = range(1 + SEED % every, len(campaign.operations) + 1, every)
    faults: list[dict[str, Any]] = [{"kind": "operation", "number": n} for n in operations]
    faults += [{"kind": "shard", "number": n, "rank": generator.randrange(ranks)}
               for n in range(1, 9)]
    faults += [{"kill_after": campaign.seconds * generator.uniform(0.1, 1.0),
                "kill_rank": generator.choice([None, *range(ranks)])} for _ in range(12)]
    killed = sum(campaign.survive(f"{i}", **fault) for i, fault in enumerate(faults))
    assert killed > 0.6 * len(faults)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("number", range(8))
def test_killed_again_and_again(number, campaigns):
    """One run, killed at random until it gets through."""
    campaign = campaigns("pretrain", 1 + number % 2, number % 2)
    generator = random.Random(f"{SEED} again {number}")
    run_dir = campaign.folder / f"again{number}"
    for attempt in range(40):
        moment = campaign.seconds * generator.uniform(0.3, 0.5 + attempt / 8)
        done = campaign.attempt(run_dir, kill_after=moment)
        campaign.check_what_is_left(run_dir)
        if done["codes"] == [0] * len(done["codes"]):
            break
    campaign.check_the_end(run_dir)


# ------------------------------------------------------------------ stop requests, dead ranks


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, rank",
    [("sigterm", 1), ("sigusr1", 0), ("sighup", 1), ("ctrl-c", -1), ("again and again", -1)],
)
def test_a_request_to_any_rank_stops_all(kind, rank, campaigns):
    """They stop at a step boundary, with a checkpoint and exit code 75; the run then resumes."""
    campaign = campaigns("pretrain", ranks=2, stage=1)
    run_dir = campaign.folder / "stopped"
    done = campaign.attempt(run_dir, kind, rank=rank)
    said = (campaign.folder / "log").read_text()
    assert done["codes"] == [75, 75], said[-4000:]
    assert done["seconds"] < 30
    assert said.count("stopped on request after step 3 of 6; the same command goes on") == 1
    assert find_checkpoint(run_dir, "must") == run_dir / "checkpoints" / "step_3"
    assert not (run_dir / "hf").exists()
    done = campaign.attempt(run_dir)
    assert done["codes"] == [0, 0]
    campaign.check_the_end(run_dir)
    shutil.rmtree(run_dir)


@pytest.mark.slow
def test_ranks_stop_when_their_launcher_is_gone(campaigns):
    """A launcher that was killed has told them nothing, and they leave a checkpoint all the same.
    """
    campaign = campaigns("pretrain", ranks=2, stage=1)
    run_dir = campaign.folder / "orphaned"
    with subprocess.Popen(["sleep", "300"]) as launcher:
        done = campaign.attempt(run_dir, "launcher", launcher=launchers.describe(launcher.pid))
    said = (campaign.folder / "log").read_text()
    assert done["codes"] == [75, 75] and done["seconds"] < 30, said[-4000:]
    assert f"(process {launcher.pid}) is gone, which started this: stopping" in said
    step = find_checkpoint(run_dir, "must").name
    assert int(step.removeprefix("step_")) in range(3, STEPS)
    assert campaign.attempt(run_dir)["codes"] == [0, 0]
    campaign.check_the_end(run_dir)
    shutil.rmtree(run_dir)


@pytest.mark.slow
def test_a_run_under_nohup_outlives_its_terminal(campaigns):
    campaign = campaigns("pretrain")
    run_dir = campaign.folder / "nohup"
    assert campaign.attempt(run_dir, "nohup")["codes"] == [0]
    campaign.check_the_end(run_dir)
    shutil.rmtree(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_two_runs_of_one_folder(command, campaigns):
    """The second one is refused and touches nothing, or waits for a first one that is stopping."""
    campaign = campaigns(command)
    run_dir = campaign.folder / "two"
    assert campaign.attempt(run_dir, "operation", number=len(campaign.operations) // 2)[
        "codes"] == [-9]
    (run_dir / ".something.tmp-1").touch()  # which the first one is writing
    with WriterLock(f"{run_dir}/") as lock:
        assert lock.interrupted

        def files() -> dict[Path, int]:
            """Everything but the lock, of which this process shows that it lives."""
            return {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")
                    if path.name != ".lock"}

        before = files()
        done = campaign.attempt(run_dir, "sigterm", rank=1)
        said = (campaign.folder / "log").read_text()
        assert done["codes"] == [2], said[-4000:]
        assert f"{run_dir}/.lock: another process writes here ({os.getpid()}@" in said
        assert before == files()
        tell_stopping()
        timer = threading.Timer(6.0, lock.release)
        timer.start()
        done = campaign.attempt(run_dir)
        timer.join()
    said = (campaign.folder / "log").read_text()
    assert done["codes"] == [0] and "which is stopping" in said, said[-4000:]
    campaign.check_the_end(run_dir)
    shutil.rmtree(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, code, ranks", [("killed", -9, 2), ("killed", -9, 4), ("error", 3, 2)]
)
def test_a_dead_rank_ends_the_job(kind, code, ranks, campaigns):
    """Its error is shown, and nothing is committed without it."""
    campaign = campaigns("pretrain", ranks=ranks, stage=1)
    run_dir = campaign.folder / "dead"
    done = campaign.attempt(run_dir, kind, rank=1)
    said = (campaign.folder / "log").read_text()
    assert done["codes"][1] == code and all(done["codes"]), said[-4000:]
    assert done["seconds"] < 30
    if "error" in kind:
        assert re.search(r"pretrain\.py, rank 1: /somewhere/file: .*No space left on device", said)
    assert find_checkpoint(run_dir, "must") == run_dir / "checkpoints" / "step_2"
    done = campaign.attempt(run_dir)
    assert done["codes"] == [0] * ranks
    campaign.check_the_end(run_dir)
    shutil.rmtree(run_dir)


# ------------------------------------------------------------------------ DeepSpeed's launcher

FOREVER = 10**6


def wait_for(condition: Callable[[], Any], seconds: float = 240.0) -> Any:
    """Poll until a condition holds; a launch spends most of its time on imports."""
    last = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < last, "nothing happened"
        time.sleep(0.1)
    return found


def processes_of(run_dir: Path, script: str) -> list[int]:
    """Return the processes that run this script for this run directory."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if str(run_dir) in words and any(word.endswith(script) for word in words[1:4]):
            found.append(int(folder.name))
    return sorted(found)


@pytest.fixture
def launched(tmp_path, reviews_store, tiny_encoder) -> Iterator[Any]:
    """Start a run of two ranks as the pipeline does; return in its third step."""
    run_dir = tmp_path / "run"
    words = arguments(
        reviews_store, tiny_encoder, run_dir, max_steps=FOREVER, save_steps=FOREVER,
        eval_fraction=0, deepspeed_config=write_ds_config(tmp_path, 1), logging_steps=1,
    )
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2",
               "--master_port", str(free_port()), str(ROOT / "train" / "pretrain.py"), *words]
    driver = (
        "import sys; from pathlib import Path; from train.recipes.run import run_process\n"
        f"sys.exit(run_process({command!r}, Path({str(tmp_path / 'log')!r})))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", driver], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=launch_environment(), text=True,
    )
    losses = run_dir / "metrics.jsonl"
    try:
        wait_for(lambda: losses.exists() and losses.read_text().count("\n") > 2)
        yield process, run_dir
    finally:
        for script in ("launcher.runner", "launch", "pretrain.py"):
            for pid in processes_of(run_dir, script):
                os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()


def ends_in(process: Any, seconds: float) -> tuple[int, str]:
    """Return exit code and output of a process that must end within `seconds`."""
    begin = time.monotonic()
    output, _ = process.communicate(timeout=120)
    taken = time.monotonic() - begin
    assert taken < seconds, output[-4000:]
    return process.returncode, output


@pytest.mark.slow
def test_launched_a_dead_rank_ends_the_job(launched):
    process, run_dir = launched
    ranks = processes_of(run_dir, "pretrain.py")
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    code, output = ends_in(process, 30)
    assert code == 256 - 9, output[-5000:]
    assert not processes_of(run_dir, "pretrain.py")
    assert find_checkpoint(run_dir, "auto") is None


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_launched_the_runner_alone_is_stopped(launched, number):
    """By a scheduler, or by hand: it dies without a word, its ranks save and stop."""
    process, run_dir = launched
    (runner,) = processes_of(run_dir, "deepspeed.launcher.runner")
    os.kill(runner, number)
    code, output = ends_in(process, 30)
    assert code == (75 if number == signal.SIGTERM else 256 - 9)
    assert "the same command goes on from there" in output
    assert not processes_of(run_dir, "pretrain.py")
    assert find_checkpoint(run_dir, "must")


def test_a_stopped_stage_is_not_taken_for_a_finished_one(tmp_path):
    """The pipeline ends with 75 too, and the same command resumes that stage."""
    script = tmp_path / "stage.py"
    script.write_text(
        "import pathlib, sys\n"
        "started, made = pathlib.Path('started'), pathlib.Path('made')\n"
        "if started.exists():\n    made.touch()\n    sys.exit(0)\n"
        "started.touch()\nsys.exit(75)\n".replace("Path('", f"Path('{tmp_path}/")
    )
    stage = pipeline.Step(
        "stage", [str(script)], records=[str(tmp_path / "made")],
        outputs=[str(tmp_path / "started"), str(tmp_path / "made")],
    )
    options = parse(PipelineConfig, ["--recipe", "x", "--output_dir", str(tmp_path)])
    with pytest.raises(StopRequested, match="step stage stopped on request") as stopped:
        pipeline.run_steps([stage], pipeline.Journal(tmp_path), options)
    assert stopped.value.exit_code == 75
    assert pipeline.Journal(tmp_path).steps["stage"]["finished"] is None
    pipeline.run_steps([stage], pipeline.Journal(tmp_path), options)
    assert pipeline.Journal(tmp_path).steps["stage"]["finished"] and (tmp_path / "made").exists()
