"""Run the steps of a plan: processes, logs, and which steps are finished or stale."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import math
import multiprocessing
import os
import re
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from preprocess import launchers
from preprocess.errors import ConfigError, DataError, StopRequested, visible
from preprocess.files import atomic_write_json, file_sha256, read_json, tell_stopping
from preprocess.identity import digest
from preprocess.progress import print_line, print_news
from train.config import PipelineConfig
from train.recipes.nodes import FirstNode, OtherNode, first_address
from train.recipes.steps import Step
from train.shipped import INSTALLED

HEARTBEAT_SECONDS = 10
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
# What a launcher tells its ranks. Steps of one machine get it from their own launcher or not at
# all: of a shell where it is set, two steps side by side would share one port.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
                  "MASTER_PORT")
# What the runs of one fine-tuning process differ in.
RUN_FLAGS = ("--model_name_or_path", "--label_budget", "--label_seed", "--output_dir")
URGENT = (signal.SIGTERM, signal.SIGINT)
# Imported once under `--launcher python`. Not deepspeed: it looks for a CUDA device, and a process
# that has done so cannot be forked.
PRELOADED = ["train.pretrain", "train.finetune", "train.annotate", "train.fit_scorer",
             "preprocess.tokenize_corpus", "transformers.models.bert.modeling_bert",
             "transformers.models.bert.tokenization_bert", "torch.utils.tensorboard"]


class Journal:
    """`steps.json`: per step its command, a digest of its outputs, and its seconds.

    A step is finished if its outputs still have the digest that they had when it ended, and stale
    if a step that it reads has ended with another digest since.
    Seconds are those of the whole process, its start included, summed over attempts that continued
    each other; an attempt that died with the pipeline itself is not in them.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.path = root, root / "steps.json"
        self.steps: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            again = "delete it and run again with --rerun, or take another --output_dir"
            self.steps = read_json(self.path, again)
            for name, entry in self.steps.items():
                if not _is_entry(entry):
                    raise DataError(f"{self.path}: step {name!r} is not as it was written; {again}")

    def command(self, step: Step) -> list[str]:
        """Return the words that must not change; the output folder may be moved."""
        words = list(step.command if step.compute else step.command[1:])
        words = [word for word in words if word != "--fit_positions"]  # lengths are in identities
        if "--deepspeed_config" in words:  # its content counts, not its path
            at = words.index("--deepspeed_config") + 1
            words[at] = file_sha256(words[at]) if os.path.isfile(words[at]) else words[at]
        root = re.escape(str(self.root))  # at the start of a word, or of a value of --also
        return [re.sub(f"^{root}(?=/|$)|(?<==){root}(?=/)", "OUTPUT_DIR", word) for word in words]

    def digest(self, step: Step) -> str | None:
        """Return the sha256 of the outputs' records; None if one is missing."""
        found = [sorted(glob.glob(pattern)) for pattern in step.records]
        if not all(found):
            return None
        told = {os.path.relpath(path, self.root): _record(path) for paths in found
                for path in paths}
        return digest(told)

    def is_finished(self, step: Step) -> bool:
        ended = self.steps.get(step.name, {}).get("finished")
        return bool(step.records) and ended is not None and ended == self.digest(step)

    def objection(self, step: Step) -> str | None:
        """Return why the outputs that exist cannot be used; None if they can, or do not exist."""
        there, entry = _existing(step), self.steps.get(step.name)
        if not there:
            return None
        if entry is None:
            return f"step {step.name}: {there[0]} exists, but this pipeline did not make it"
        was, now = _by_flag(entry.get("command", [])), _by_flag(self.command(step))
        if step.grows:
            with contextlib.suppress(ValueError, IndexError):  # written by another hand
                was, now = _without_new_runs(*_without_new_seeds(was, now))
        if was != now:
            changes = "; ".join(
                f"was `{was.get(flag, '')}`, is `{now.get(flag, '')}`"
                for flag in {**was, **now} if was.get(flag) != now.get(flag)
            )
            return f"step {step.name} was run with another command ({changes})"
        for need, then in entry["inputs"].items():
            if self.steps.get(need, {}).get("finished") not in (None, then):
                return f"step {step.name} is older than step {need}, which it reads"
        return None

    def start(self, step: Step) -> None:
        """Note the command and the inputs of a step that runs now."""
        earlier = self.steps.get(step.name, {}).get("seconds", 0.0) if _existing(step) else 0.0
        inputs = {need: self.steps.get(need, {}).get("finished") for need in step.needs}
        self.steps[step.name] = {"command": self.command(step), "inputs": inputs,
                                 "finished": None, "seconds": earlier}
        atomic_write_json(self.path, self.steps)

    def end(self, step: Step, seconds: float, success: bool) -> None:
        """Add the seconds of an attempt and, after a success, the digest of the outputs."""
        entry = self.steps[step.name]
        entry["seconds"] = round(entry["seconds"] + seconds, 1)
        entry["finished"] = self.digest(step) if success else None
        atomic_write_json(self.path, self.steps)


def _is_entry(entry: Any) -> bool:
    """Return whether an entry of `steps.json` is complete, so that it can be used without a look.
    """
    if not isinstance(entry, dict) or {"command", "inputs", "finished", "seconds"} - entry.keys():
        return False
    command, inputs, seconds = entry["command"], entry["inputs"], entry["seconds"]
    return (
        isinstance(command, list) and all(isinstance(word, str) for word in command)
        and isinstance(inputs, dict)
        and all(isinstance(told, str | None) for told in (entry["finished"], *inputs.values()))
        and type(seconds) in (int, float) and 0 <= seconds < math.inf
    )


def _record(path: str) -> Any:
    """Return what a JSON file says of its result; the size of any other file."""
    name = os.path.basename(path)
    if not name.endswith(".json") and name != "results.jsonl":
        return os.path.getsize(path)
    content = Path(path).read_bytes()
    try:
        lines = content.splitlines() if name == "results.jsonl" else [content]
        return [json.loads(line, object_hook=_identity) for line in lines]
    except (ValueError, RecursionError):
        return hashlib.sha256(content).hexdigest()


def _identity(obj: dict[str, Any]) -> Any:
    """Return the identity that a record names, or all of it but times, places and seals."""
    if "identity_digest" in obj:
        return obj["identity_digest"]
    return {key: value for key, value in obj.items()
            if "seconds" not in key and key != "json_sha256"
            and not (isinstance(value, str) and os.path.isabs(value))}


def _by_flag(words: list[str]) -> dict[str, str]:
    """Split a command into its flags, each with its values as typed."""
    typed = shlex.join(words)
    return {part.split(" ")[0]: part for part in re.split(r" (?=--)", typed)}


def _without_new_seeds(was: dict[str, str], now: dict[str, str]) -> list[dict[str, str]]:
    """Leave out the seeds where only more are asked for now; finished ones are kept."""
    seeds = [set(re.findall(r"\d+", flags.get("--seeds", ""))) for flags in (was, now)]
    if not seeds[0] <= seeds[1]:
        return [was, now]
    return [{flag: text for flag, text in flags.items() if flag != "--seeds"}
            for flags in (was, now)]


def _without_new_runs(*commands: dict[str, str]) -> list[dict[str, str]]:
    """Replace the flags of single runs by one entry for each folder that both commands fill."""
    found = []
    for flags in commands:
        words = {flag: shlex.split(text)[1:] for flag, text in flags.items()}
        first = shlex.join(f"{flag[2:]}={words[flag][0]}" for flag in RUN_FLAGS if flag in words)
        runs = {}
        for run in map(shlex.split, (first, *words.get("--also", []))):
            runs[dict(word.split("=", 1) for word in run).get("output_dir", "")] = " ".join(run)
        common = {flag: text for flag, text in flags.items()
                  if flag not in (*RUN_FLAGS, "--also", "--labels")}
        found.append((common, runs))
    both = set.intersection(*(set(runs) for _, runs in found))
    return [{**common, **{folder: runs[folder] for folder in both}} for common, runs in found]


def _existing(step: Step) -> list[str]:
    return [path for pattern in step.outputs for path in glob.glob(pattern)]


def run_steps(
    steps: list[Step], journal: Journal, options: PipelineConfig, first: FirstNode | None = None
) -> None:
    """Run the steps that are not finished, in order, on many nodes; the first failure ends it.

    Args:
        first: tells the other nodes what to launch, if they were started by hand.
    Raises:
        ConfigError: outputs were made otherwise, and `--rerun` is not given.
        DataError: a step left out an output, or says that its result is too weak to build masks
            on, and `--go_on` is not given.
        StopRequested: a command stopped on request, or the time was up (exit 75).
        SystemExit: a command failed; with its exit code.
    """
    begin = time.monotonic()
    until = begin + 60 * (options.max_minutes or math.inf)
    left: list[str] = []
    refuse_all(steps, journal, options)
    for number, step in enumerate(steps, start=1):
        title = f"[{number}/{len(steps)}] {step.name}"
        if is_fresh(step, title, journal, options):
            continue
        if step.records and time.monotonic() >= until:
            left.append(step.name)
            continue
        if left and not has_results(journal.root):
            break
        started, success = begin_step(step, title, journal, options), False
        try:
            log = log_path(journal, step, number)
            if step.compute is not None:
                step.compute()
            elif first is not None and step.launched:
                port = options.master_port or free_port()
                first.launch(number, port, journal.steps[step.name]["inputs"])
                command = started_as(step, options, port)
                code = run_process(command, log, stop=lambda: first.failed() is not None)
                if code in (0, StopRequested.exit_code):  # which another node may have caused
                    first.check()
                _check_exit(code, step, log, options)
                first.wait_for_others()
            else:
                _check_exit(run_process(started_as(step, options), log), step, log, options)
            success = True
        finally:
            journal.end(step, time.monotonic() - started, success)
        check_outputs(step, journal, log)
        now = time.monotonic()
        print_news(f"  {step.name}: {now - started:.0f} s, {now - begin:.0f} s in total")
        clean(step, options)
        judge(step, options)
    if left:
        raise StopRequested(what_is_left(left, options, journal.root))


def refuse_all(steps: list[Step], journal: Journal, options: PipelineConfig) -> None:
    """Refuse outputs that were made otherwise: before hours of work rather than after them."""
    for step in steps if not options.rerun else ():
        _refuse(journal.objection(step))


def is_fresh(step: Step, title: str, journal: Journal, options: PipelineConfig) -> bool:
    """Return whether a step is finished and need not run, and say so; what it reads is finished.

    Raises:
        ConfigError: its outputs were made otherwise, and `--rerun` is not given.
        DataError: its result is too weak, and `--go_on` is not given.
    """
    objection = journal.objection(step)
    if objection and not options.rerun:  # an input that was lost came out different
        _refuse(objection)
    if objection or not journal.is_finished(step):
        return False
    print_news(f"{title}: finished, skipped")
    clean(step, options)
    judge(step, options)
    return True


def begin_step(
    step: Step, title: str, journal: Journal, options: PipelineConfig, lead: str = "  ",
    gpu: str = "",
) -> float:
    """Delete what cannot be used, say what runs, and note it; return the time of the start.

    Args:
        lead: of each line below the title. gpu: as of `started_as`.
    """
    objection = journal.objection(step)
    print_news(f"{title}: {visible(objection)}" if objection else title)
    for path in _existing(step) if objection or not step.resumes else ():
        print_news(f"{lead}deleting {visible(path)}")
        shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
    print_news(f"{lead}{shown(step, options, gpu)}")
    started = time.monotonic()
    journal.start(step)
    return started


def check_outputs(step: Step, journal: Journal, log: Path) -> None:
    """Raise DataError if a step that has ended without an error left out an output."""
    if step.records and not journal.steps[step.name]["finished"]:
        raise DataError(f"step {step.name} ended without an error, but its outputs are not "
                        f"complete: {', '.join(step.records)}; see {log}")


def judge(step: Step, options: PipelineConfig) -> None:
    """Stop before masks are built on a result that its own step calls weak."""
    weak = step.weaknesses()
    if weak and not options.go_on:
        raise DataError(f"step {step.name}: {'; '.join(weak)}; what is finished is kept: type the "
                        "command again with other settings, or with --go_on to go on with this")
    for sentence in weak:
        print(f"  warning: step {step.name}: {sentence} (--go_on)", flush=True)


def clean(step: Step, options: PipelineConfig) -> None:
    """Remove the checkpoints of a finished training step, if asked to; its models stay."""
    if options.clean != "checkpoints" or not step.launched:
        return
    for folder in (Path(path) for path in _existing(step) if os.path.isdir(path)):
        for run in (folder, *folder.glob("seed_*")):
            if (run / "checkpoints").is_dir():
                shutil.rmtree(run / "checkpoints")
                (run / "latest").unlink(missing_ok=True)


def has_results(root: Path) -> bool:
    """Return whether there is anything to report yet."""
    return any(root.rglob("results.jsonl"))


def what_is_left(left: list[str], options: PipelineConfig, root: Path) -> str:
    """Return the sentence of a pipeline that ends for want of time."""
    report = f"; {root}/report has what is there" if has_results(root) else ""
    return (f"--max_minutes {options.max_minutes:g} are over, and {len(left)} steps are left: "
            f"{listed(left)}{report}; the same command goes on")


def listed(names: Collection[str]) -> str:
    """Return names for a sentence, and only the number of those behind the first twelve."""
    shown_first, more = list(names)[:12], len(names) - 12
    return ", ".join(shown_first) + (f" and {more} more" if more > 0 else "")


def tell_others_of_a_stop() -> None:
    """Turn a request to stop between two commands into an exception, which other nodes hear of."""
    def stop(number: int, frame: Any) -> None:
        raise StopRequested("stopped on request between two steps; the same command on every node "
                            "continues")

    for request in STOPPING:
        if signal.getsignal(request) is not signal.SIG_IGN:
            signal.signal(request, stop)


def follow(
    steps: list[Step], journal: Journal, options: PipelineConfig, node: OtherNode
) -> None:
    """Launch what the first node says, until it ends; exit with its code."""
    with node:
        while "end" not in (told := node.next_turn()):
            number = told["step"]
            step = steps[number - 1]
            print(f"[{number}/{len(steps)}] {step.name}\n  {shown(step, options)}", flush=True)
            node.wait_for_inputs(journal, steps, told["inputs"])
            code = run_process(
                started_as(step, options, told["port"]),
                log_path(journal, step, number, f".node{node.rank}"), stop=node.is_over)
            node.ended(told["turn"], code)
        if told["end"]:
            print(f"pipeline.py: the first node ended with exit code {told['end']}; see its output",
                  file=sys.stderr, flush=True)
            sys.exit(told["end"])


def log_path(journal: Journal, step: Step, number: int, node: str = "") -> Path:
    """Return the file for the output of a step, on a node."""
    return journal.root / "logs" / f"{number:02d}-{step.name}{node}.log"


def _refuse(objection: str | None) -> None:
    if objection:
        raise ConfigError(f"{objection}: give another --output_dir, or add --rerun to delete "
                          "it and make it again")


def _check_exit(code: int, step: Step, log: Path, options: PipelineConfig) -> None:
    if code == StopRequested.exit_code:
        raise StopRequested(f"step {step.name} stopped on request; the same command continues "
                            "from its checkpoint")
    if code:
        print(f"pipeline.py: {failure(code, step, log, options)}", file=sys.stderr, flush=True)
        sys.exit(exit_code(code))


def failure(code: int, step: Step, log: Path, options: PipelineConfig) -> str:
    """Return the sentence about a command that failed."""
    return (f"step {step.name} failed with exit code {code}: {shown(step, options)}; its output "
            f"is in {log}")


def exit_code(code: int) -> int:
    """Return the exit code of a process as a shell shows it: 128 + N after signal N."""
    return code if code > 0 else 128 - code


def shown(step: Step, options: PipelineConfig, gpu: str = "") -> str:
    """Return the step as a user would type it; `gpu` as of `started_as`."""
    if step.compute is not None:
        return f"# {step.name}: computed by the pipeline itself"
    typed = shlex.join(_words(step, options, options.master_port, gpu))
    return f"{VISIBLE_GPUS}={gpu} {typed}" if gpu else typed


def plainly(command: list[str]) -> list[str]:
    """Return a script and its flags as they are typed without a launcher."""
    script, *flags = command
    return ["selmask", Path(script).stem, *flags] if INSTALLED else ["python", script, *flags]


def as_process(typed: list[str]) -> list[str]:
    """Return the process behind what is typed: the same interpreter for any program."""
    program, *words = typed
    module = {"deepspeed": "deepspeed.launcher.runner", "selmask": "selmask"}.get(program)
    return [sys.executable, *(["-m", module] if module else []), *words]


def _words(step: Step, options: PipelineConfig, port: int, gpu: str = "") -> list[str]:
    if not step.launched or options.launcher == "python":
        return plainly(step.command)
    script, *flags = step.command
    typed = ["selmask", Path(script).stem] if INSTALLED else [script]
    # DeepSpeed's launcher ignores the variable beside --num_gpus, and would take the first GPU.
    where = [] if gpu else ["--num_gpus", str(options.num_gpus)]
    if options.hostfile:
        where = ["--hostfile", options.hostfile]
        address = options.master_addr
        if options.no_ssh:  # otherwise DeepSpeed asks the first node, by ssh
            where += ["--no_ssh", "--node_rank", str(options.node_rank)]
            address = first_address(options)
        where += ["--master_addr", address] if address else []
    chosen = ["--master_port", str(port)] if port else []
    return ["deepspeed", *where, *chosen, *["--module"] * INSTALLED, *typed, *flags]


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def started_as(
    step: Step, options: PipelineConfig, port: int = 0, gpu: str = ""
) -> list[str]:
    """Return the step's process: the same interpreter, and the launcher at a port (0: a free one).

    Args:
        gpu: the only GPU of the step, which its environment names; empty: the first `--num_gpus`.
    """
    return as_process(_words(step, options, port or options.master_port or free_port(), gpu))


def run_process(
    command: list[str], log_path: Path, stop: Callable[[], bool] = lambda: False
) -> int:
    """Run a command, echo its lines and log them; print a line at least every ten seconds.

    The signals of `STOPPING` are passed on to all its processes as SIGTERM (the launcher itself
    would die), so that a training command can write its checkpoint; SIGHUP is not where it was
    ignored (`nohup`). A second SIGTERM or Ctrl-C kills. If somebody else ends the launcher by such
    a signal, its workers are stopped the same way. If this process is killed, all of them notice.

    Args:
        command: a Python interpreter, a script (or `-m` and a module) and its flags.
        log_path: file to which the output is appended.
        stop: asked about once per second; whether to stop the command as SIGTERM does.
    Returns:
        The exit code; 75 if a signal asked for the stop, whatever the launcher made of it.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    output, process, poll = spawn(command)
    requests: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        tell_stopping()
        requests.append(number)
        signal_all(process, wanted_signal(requests))

    def look_after() -> None:
        if not requests and (-(poll() or 0) in STOPPING or stop()):
            pass_on(signal.SIGTERM, None)

    with requests_to(pass_on):
        with open(log_path, "a", encoding="utf-8") as log:  # after an earlier attempt
            log.write(shlex.join(command) + "\n")
            for line in _lines_and_heartbeats(output, look_after):
                log.write(line)
                log.flush()
                if not is_chatter(line):
                    print_line("  " + visible(line.rstrip(), kept="\t"))
        while (code := poll()) is None:
            time.sleep(0.01)
    return StopRequested.exit_code if requests or -code in STOPPING else code


@contextlib.contextmanager
def requests_to(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Give the requests to stop to a handler; SIGHUP only where it is not ignored (`nohup`)."""
    before = {number: signal.signal(number, handler) for number in STOPPING
              if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handled in before.items():
            signal.signal(number, handled)


def wanted_signal(requests: list[int]) -> int:
    """Return what to pass on after the last of some requests: a second urgent one kills."""
    # The end of a terminal may come as several signals.
    urgent = requests[-1] in URGENT and sum(one in URGENT for one in requests) > 1
    return signal.SIGKILL if urgent else signal.SIGTERM


def signal_all(process: int, number: int) -> None:
    """Send a signal to a process of `spawn` or `fork`, and to all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        try:
            os.killpg(process, number)
        except ProcessLookupError:  # a fork that has not got its own group yet
            os.kill(process, number)


def without_ranks() -> dict[str, str | None]:
    """Return the changes to the environment of a step that take a launcher's words out of it."""
    return dict.fromkeys(RANK_VARIABLES)


def spawn(
    command: list[str], changes: dict[str, str | None] | None = None
) -> tuple[Any, int, Callable[[], int | None]]:
    """Start a process in its own group; return its output, its id and its exit code so far.

    Args:
        changes: of the environment of this process; None takes a variable out.
    """
    told = {**os.environ, "PYTHONUNBUFFERED": "1", **launchers.environment(), **(changes or {})}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env={name: value for name, value in told.items() if value is not None},
    )
    return process.stdout, process.pid, process.poll


def fork(
    command: list[str], changes: dict[str, str | None] | None = None
) -> tuple[Any, int, Callable[[], int | None]]:
    """Start a script as `spawn` does, but from a fork server that has done the slow imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    output, writer = context.Pipe(duplex=False)
    words = (command[1:], writer, {**launchers.environment(), **(changes or {})})
    process = context.Process(target=_run_script, args=words)
    process.start()
    writer.close()
    assert process.pid is not None
    return output, process.pid, lambda: process.exitcode


def _run_script(words: list[str], output: Any, changes: dict[str, str | None]) -> None:
    """Become a script's process: its group, its output, its arguments."""
    os.setsid()
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    for number in (1, 2):
        os.dup2(output.fileno(), number)
    output.close()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)  # type: ignore[union-attr]
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__")
    else:
        sys.argv = list(words)
        sys.path[0] = os.path.dirname(os.path.abspath(words[0]))
        runpy.run_path(words[0], run_name="__main__")


_LAUNCHER_CHATTER = re.compile(
    r"\[(INFO|WARNING)\] \[(launch|runner|real_accelerator)\.py|real_accelerator\.py:"
    r"|^Detected VISIBLE_DEVICES="
)


def is_chatter(line: str) -> bool:
    """Return whether a line says something about DeepSpeed's launcher alone."""
    return bool(_LAUNCHER_CHATTER.search(line))


def _lines_and_heartbeats(output: Any, look_after: Callable[[], None]) -> Iterator[str]:
    """Yield the lines of a pipe until its end, and a line of our own while it is silent.

    Args:
        look_after: called at least once per second.
    """
    started = spoke = time.monotonic()
    rest = b""
    while True:
        look_after()
        ready, _, _ = select.select([output], [], [], min(1, HEARTBEAT_SECONDS))
        now = time.monotonic()
        if ready:
            chunk = os.read(output.fileno(), 1 << 16)
            *lines, rest = (rest + (chunk or b"\n")).split(b"\n")
            for line in lines if chunk or lines[0] else ():
                yield line.decode(errors="replace") + "\n"
                spoke = now
            if not chunk:
                return
        elif now - spoke >= HEARTBEAT_SECONDS:
            yield f"... running for {now - started:.0f} s\n"
            spoke = now
