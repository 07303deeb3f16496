"""All stages of a recipe, each as the command a user would type, and a table at the end.

    python train/pipeline.py --recipe train/recipes/demo.yaml --output_dir runs/demo [--dry_run]

It owns the recipe's meaning and the layout of the output folder; it trains nothing itself. A
recipe becomes a flat list of steps. A step is one process; what is whole is skipped, and what was
made by another command, or before something that it reads, is never taken silently: `steps.json`
remembers the command of every step and the order in which they ran.

In the output folder: `general/` and `domain/` (token stores with their arrays), `stage1/`,
`classifier/`, `annotations/`, `scorer/`, `task_guided/ARM-seedN/`, `finetune/ARM-seedN/`,
`floors/`, `report/`, `logs/`. With `export_steps` everything that depends on the length of stage 1
lies under `step_N/`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import glob
import json
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preprocess.errors import ConfigError, DataError, StopRequested, run_command
from preprocess.files import atomic_write_json, file_sha256
from preprocess.store import TokenStore, array_path
from train.config import FinetuneConfig, PipelineConfig, parse
from train.recipe import BUILT_ARMS, NEGATED, REPOSITORY, load_recipe, needs_domain
from train.results import finished_seeds, write_naive_bayes

HEARTBEAT_SECONDS = 10
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Signals that ask for a stop: what they ended is no failure."""


# --------------------------------------------------------------------------- the steps


@dataclass(frozen=True)
class Step:
    """One process of the pipeline.

    Attributes:
        name: as in the logs and in `steps.json`.
        command: script and flags; empty for the one floor that is computed here.
        is_whole: whether everything the step writes is there and complete.
        outputs: files (patterns) and folders that are this step's alone; `--rerun` deletes them.
        needs: names of the steps whose output it reads.
        launched: whether the command is started by the deepspeed launcher.
        compute: what to do where there is no command, and
        settings: what it depends on.
    """

    name: str
    command: list[str]
    is_whole: Callable[[], bool]
    outputs: list[str]
    needs: list[str] = field(default_factory=list)
    launched: bool = False
    compute: Callable[[], None] | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def flag_words(flags: dict[str, Any]) -> list[str]:
    """Flags as words of a command line; None and False leave a flag out, True is the flag alone.

    Args:
        flags: name -> value; a list becomes several words, a dictionary `key=value` words.
    """
    words: list[str] = []
    for name, value in flags.items():
        if value is False and name in NEGATED:
            words.append(f"--no-{name}")
        if value is None or value is False or value == []:
            continue
        words.append(f"--{name}")
        if isinstance(value, dict):
            words += [f"{key}={entry}" for key, entry in value.items()]
        elif isinstance(value, list):
            words += [str(entry) for entry in value]
        elif not isinstance(value, bool):
            words.append(str(value))
    return words


def _seeds(flags: dict[str, Any]) -> str:
    """`seeds` of a section, `13,43` or a YAML list or one number, as the command wants it."""
    value = flags.get("seeds", FinetuneConfig.seeds)
    return ",".join(str(seed) for seed in value) if isinstance(value, list) else str(value)


def _holds_model(folder: Path) -> bool:
    return (
        (folder / "config.json").is_file() and (folder / "lineage.json").is_file()
        and any(folder.glob("*.safetensors"))
    )


def _holds_store(prefix: Path, kind: str = "", name: str = "") -> bool:
    """Whether there is a whole store, with the array `name` of `kind` if one is asked for."""
    try:
        store = TokenStore.open(prefix)
    except (DataError, OSError):
        return False
    arrays = [array_path(shard, name, kind) for shard in store.shards] if kind else []
    return all(a.is_file() and a.with_suffix(".json").is_file() for a in arrays)


def _holds_seeds(folder: Path, seeds: str) -> bool:
    try:
        return {int(seed) for seed in seeds.split(",")} <= set(finished_seeds(folder))
    except (DataError, ValueError):
        return False


def plan(recipe: dict[str, Any], output_dir: str | Path) -> tuple[list[Step], list[dict]]:
    """Turn a recipe into steps, in the order in which they run.

    Returns:
        `(steps, arms)`; `arms` is what `train/report.py` reads from `arms.json`: name, runs (one
        folder a pre-training seed, relative to the output folder), whether it is a floor, and the
        steps that made its masks, whose seconds are in `steps.json`.
    """
    return _Planner(recipe, Path(output_dir)).build()


class _Planner:
    """The list of steps in the making."""

    def __init__(self, recipe: dict[str, Any], root: Path) -> None:
        self.recipe, self.root = recipe, root
        self.steps: list[Step] = []
        self.arms: list[dict[str, Any]] = []
        self.deepspeed_config = _find_config(recipe["deepspeed_config"])
        self.tokenizer = recipe["tokenizer"] or recipe["encoder"]

    def build(self) -> tuple[list[Step], list[dict]]:
        """All steps: first what reads the user's files, so that a mistake there shows early."""
        recipe = self.recipe
        floors = [self.naive_bayes()] if recipe["floors"].get("naive_bayes") else []
        if recipe["general"] is not None:
            self.tokenize("general")
        if needs_domain(recipe):
            self.tokenize("domain")
        if recipe["general"] is not None:
            self.stage1()
        for length in recipe["export_steps"] or [None]:
            self.one_length(length)
        if recipe["floors"].get("untrained"):
            floors.append(self.untrained())
        for run in floors:
            self.arm(run.name, [run], [], floor=True)
        self.report()
        return self.steps, self.arms

    def script(self, path: str) -> str:
        """A script of ours as typed from where the user is."""
        full = REPOSITORY / path
        return os.path.relpath(full) if Path.cwd().is_relative_to(REPOSITORY) else str(full)

    def add(self, name: str, script: str, flags: dict[str, Any], **options: Any) -> str:
        self.steps.append(Step(name, [self.script(script), *flag_words(flags)], **options))
        return name

    def tokenize(self, which: str) -> None:
        prefix = self.root / which / "text"
        flags = {**self.recipe[f"{which}_text"], "tokenizer": self.tokenizer, "output": prefix}
        self.add(f"tokenize-{which}", "preprocess/tokenize_corpus.py", flags,
                 is_whole=lambda: _holds_store(prefix), outputs=[str(prefix.parent)])

    def train(self, name: str, script: str, section: str, run: Path, flags: dict[str, Any],
              is_whole: Callable[[], bool], needs: list[str]) -> str:
        """A training command: the section's flags, then the pipeline's own."""
        settings = {"deepspeed_config": self.deepspeed_config, **(self.recipe[section] or {}),
                    **flags, "output_dir": run}
        return self.add(name, script, settings, is_whole=is_whole, outputs=[str(run)],
                        needs=needs, launched=True)

    def stage1(self) -> None:
        run, exports = self.root / "stage1", self.recipe["export_steps"]
        folders = [run / "hf", *(run / f"hf_step_{n}" for n in exports)]
        self.train(
            "stage1", "train/pretrain.py", "general", run,
            {"tokens": self.root / "general" / "text", "export_steps": exports,
             "model_name_or_path": self.recipe["encoder"]},
            lambda: all(map(_holds_model, folders)), ["tokenize-general"],
        )

    def finetune(self, name: str, section: str, run: Path, model: str | Path,
                 needs: list[str], seeds: str = "") -> str:
        seeds = seeds or _seeds(self.recipe[section])
        return self.train(
            name, "train/finetune.py", section, run,
            {**self.recipe["task"], "model_name_or_path": model, "seeds": seeds},
            lambda: _holds_seeds(run, seeds) and all(
                _holds_model(run / f"seed_{seed}" / "hf") for seed in seeds.split(",")),
            needs,
        )

    def one_length(self, length: int | None) -> None:
        """All arms behind one stage-1 model."""
        recipe = self.recipe
        root = self.root if length is None else self.root / f"step_{length}"
        tag = "" if length is None else f"-step_{length}"
        after = [] if recipe["general"] is None else ["stage1"]
        base: str | Path = recipe["encoder"]
        if recipe["general"] is not None:
            base = self.root / "stage1" / ("hf" if length is None else f"hf_step_{length}")
        if any(arm in BUILT_ARMS for arm in recipe["arms"]):
            self.choose_masks(root, tag, base, after)
        for arm in recipe["arms"]:
            label = arm if length is None else f"{arm}@{length}"
            if arm == "none":
                run = root / "finetune" / "none"
                self.finetune(f"finetune-none{tag}", "finetune", run, base, after)
                self.arm(label, [run], [])
                continue
            runs = [self.one_arm(arm, seed, root, tag, base, after)
                    for seed in recipe["pretrain_seeds"]]
            self.arm(label, runs, self.behind_masks(f"masks-{arm}{tag}"))

    def choose_masks(self, root: Path, tag: str, base: str | Path, after: list[str]) -> None:
        """Classifier, annotation, scorer, scores, and the mask indices of the arms."""
        recipe, domain = self.recipe, self.root / "domain" / "text"
        classifier, annotations = root / "classifier", root / "annotations" / "text"
        seed = _seeds(recipe["classifier"]).split(",")[0]
        self.finetune(f"classifier{tag}", "classifier", classifier, base, after)
        self.add(
            f"annotate{tag}", "train/annotate.py",
            {**recipe["annotate"], **recipe["task"],
             "model_name_or_path": classifier / f"seed_{seed}" / "hf", "output": annotations},
            is_whole=lambda: _holds_store(annotations, "importance"), launched=True,
            outputs=[str(annotations.parent)], needs=[f"classifier{tag}"],
        )
        self.train(
            f"scorer{tag}", "train/fit_scorer.py", "scorer", root / "scorer",
            {"annotations": annotations, "model_name_or_path": base},
            lambda: _holds_model(root / "scorer" / "hf"), [f"annotate{tag}", *after],
        )
        scores = f"task{tag}"
        self.add(
            f"score{tag}", "train/score_tokens.py",
            {**recipe["score"], "model_name_or_path": root / "scorer" / "hf", "tokens": domain,
             "name": scores},
            is_whole=lambda: _holds_store(domain, "scores", scores), launched=True,
            outputs=_array_files(domain, scores, "scores"),
            needs=["tokenize-domain", f"scorer{tag}"],
        )
        for arm in BUILT_ARMS:
            if arm in recipe["arms"]:
                self.masks(arm, tag, domain)

    def masks(self, arm: str, tag: str, domain: Path) -> None:
        if any(step.name == f"masks-{arm}{tag}" for step in self.steps):
            return
        source, needs = {"scores": f"task{tag}"}, [f"score{tag}"]
        if arm == "random_matched":
            self.masks("selective", tag, domain)  # the control's counts, even without that arm
            source, needs = {"match": f"selective{tag}"}, [f"masks-selective{tag}"]
        name = f"{arm}{tag}"
        self.add(
            f"masks-{name}", "preprocess/build_masks.py",
            {"tokens": domain, "strategy": arm, **source, **self.recipe["masks"], "name": name},
            is_whole=lambda: _holds_store(domain, "mask", name),
            outputs=_array_files(domain, name, "mask"), needs=needs,
        )

    def one_arm(self, arm: str, seed: int, root: Path, tag: str, base: str | Path,
                after: list[str]) -> Path:
        """Stage 2 with one seed, and fine-tuning of what it made."""
        built = arm in BUILT_ARMS
        run = root / "task_guided" / f"{arm}-seed{seed}"
        name = self.train(
            f"task_guided-{arm}-seed{seed}{tag}", "train/pretrain.py", "task_guided", run,
            {"tokens": self.root / "domain" / "text",
             ("mask_index" if built else "masking"): f"{arm}{tag}" if built else arm,
             "model_name_or_path": base, "seed": seed},
            lambda: _holds_model(run / "hf"),
            [f"masks-{arm}{tag}" if built else "tokenize-domain", *after],
        )
        target = root / "finetune" / f"{arm}-seed{seed}"
        self.finetune(f"finetune-{arm}-seed{seed}{tag}", "finetune", target, run / "hf", [name])
        return target

    def behind_masks(self, name: str) -> list[str]:
        """The step `name` and what it reads, and so on, up to general pre-training and the text."""
        for step in self.steps:
            if step.name == name:
                needs = [need for need in step.needs
                         if need != "stage1" and not need.startswith("tokenize-")]
                earlier = [found for need in needs for found in self.behind_masks(need)]
                return list(dict.fromkeys([*earlier, name]))
        return []  # masks that are drawn on the fly

    def arm(self, name: str, runs: list[Path], masking: list[str], floor: bool = False) -> None:
        relative = [str(run.relative_to(self.root)) for run in runs]
        self.arms.append({"name": name, "runs": relative, "floor": floor, "masking": masking})

    def naive_bayes(self) -> Path:
        """A floor: word counts."""
        run = self.root / "floors" / "naive_bayes"
        settings = dict(self.recipe["task"])
        for limit in ("max_train_samples", "max_eval_samples"):
            settings[limit] = self.recipe["finetune"].get(limit)
        self.steps.append(Step(
            "naive_bayes", [], is_whole=lambda: _holds_seeds(run, "0"), outputs=[str(run)],
            compute=lambda: _naive_bayes(self.recipe, run), settings=settings,
        ))
        return run

    def untrained(self) -> Path:
        """A floor: the same network with fresh weights, fine-tuned the same way."""
        recipe, model = self.recipe, self.root / "floors" / "untrained_model"
        which = "general" if recipe["general"] is not None else "domain"
        if which == "domain" and not needs_domain(recipe):
            raise ConfigError("floors.untrained needs a token store: give general, or an arm "
                              "other than none")
        trained = recipe["general" if which == "general" else "task_guided"]
        start = {"model_name_or_path": recipe["encoder"], "from_scratch": True}
        if not recipe["encoder"]:
            start = {"model_config": recipe["general"]["model_config"]}
        name = self.add(
            "untrained", "train/pretrain.py",
            {"deepspeed_config": self.deepspeed_config, **start,
             "tokens": self.root / which / "text", "max_steps": 0,
             "max_seq_length": trained.get("max_seq_length"), "output_dir": model},
            is_whole=lambda: _holds_model(model / "hf"), launched=True, outputs=[str(model)],
            needs=[f"tokenize-{which}"],
        )
        run = self.root / "floors" / "untrained"
        first = _seeds(recipe["finetune"]).split(",")[0]  # a floor needs no interval
        self.finetune("finetune-untrained", "finetune", run, model / "hf", [name], seeds=first)
        return run

    def report(self) -> None:
        """Always made again: cheap, and it shows what is there."""
        self.add("report", "train/report.py", {}, is_whole=lambda: False, outputs=[])
        self.steps[-1].command.extend([str(self.root), "--output_dir", str(self.root / "report")])


def _array_files(prefix: Path, name: str, kind: str) -> list[str]:
    """Patterns of an array's files beside a store of one piece or of shards."""
    stem = glob.escape(str(prefix))
    return [f"{stem}{shard}.{name}.{kind}.{ending}"
            for shard in ("", "-[0-9]*-of-[0-9]*") for ending in ("npy", "json")]


def _find_config(path: str | None) -> str | None:
    """A DeepSpeed JSON as given, or the repository's one of that name."""
    if path and not Path(path).exists() and (REPOSITORY / path).exists():
        return str(REPOSITORY / path)
    return path


def _naive_bayes(recipe: dict[str, Any], run: Path) -> None:
    """Naive Bayes on the sentences that fine-tuning uses."""
    from preprocess.corpus import load_task, take_fixed

    options = {key: value for key, value in recipe["task"].items() if key != "task"}
    task = load_task(recipe["task"]["task"], **options)
    limits = {"train": recipe["finetune"].get("max_train_samples")}
    eval_limit = recipe["finetune"].get("max_eval_samples")
    splits = {
        name: take_fixed(examples, limits.get(name, eval_limit))
        for name, examples in task.splits.items()
    }
    write_naive_bayes(dataclasses.replace(task, splits=splits), run)


# --------------------------------------------------------------------------- running them


class Journal:
    """`steps.json`: what each step was run with, its seconds, and the order of finishing.

    Seconds are those of the whole process, its start included, summed over attempts that went on
    from each other; an attempt that died with the pipeline itself is not in them.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.path = root, root / "steps.json"
        self.steps: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            try:
                self.steps = json.loads(self.path.read_text(encoding="utf-8"))
            except json.JSONDecodeError:
                raise DataError(f"{self.path}: not JSON; delete it and run again with --rerun, "
                                "or take another --output_dir") from None

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


def where_to_look(root: Path, steps: list[Step]) -> str:
    """The last lines: what to open next."""
    lines = [f"table and figures: {root}/report", f"curves: tensorboard --logdir {root}"]
    for step in steps:
        if step.name.startswith("masks-selective"):
            name = step.name.removeprefix("masks-")
            lines.append("what was masked: python preprocess/show_masks.py "
                         f"--tokens {root}/domain/text --mask_index {name}")
            break
    return "\n".join(["Where to look next", *(f"  {line}" for line in lines)])


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command."""
    options = parse(PipelineConfig, argv)
    recipe = load_recipe(options.recipe, options.set)
    root = Path(options.output_dir)
    steps, arms = plan(recipe, root)
    if options.dry_run:
        for step in steps:
            print(shown(step, options))
        return
    root.mkdir(parents=True, exist_ok=True)
    journal = Journal(root)
    atomic_write_json(root / "arms.json", arms)
    run_steps(steps, journal, options)
    print(where_to_look(root, steps), flush=True)


if __name__ == "__main__":
    run_command(main)
