"""Check all steps of a plan before any of them runs (`--dry_run`).

Each step begins as it would, in a scratch folder: text is tokenized and searched for test texts in
its first documents, mask indices and counted scores are built on these, and training commands run
with `--dry_run`, with the recipe's encoder in place of a model that an earlier step makes. Of steps
that need more than that (a trained classifier, an annotation), options, lengths and the DeepSpeed
JSON are checked. Steps that are finished are not checked again; what they made is used.
"""

from __future__ import annotations

import math
import os
import re
import select
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from preprocess.corpus import load_task, read_documents
from preprocess.errors import ConfigError, DataError
from preprocess.masking import BASELINE
from train.config import (
    AnnotateConfig,
    FinetuneConfig,
    FitScorerConfig,
    PipelineConfig,
    PretrainConfig,
    ScoreConfig,
    TaskOptions,
    TrainingConfig,
    parse,
)
from train.recipes import run
from train.recipes.recipe import SECTIONS, origin_of
from train.recipes.steps import Step

SAMPLE = 200  # documents
STOP_SECONDS = 10.0  # for a command that was asked to stop
CONFIGS: dict[str, Any] = {
    "pretrain": PretrainConfig, "finetune": FinetuneConfig, "annotate": AnnotateConfig,
    "fit_scorer": FitScorerConfig, "score_tokens": ScoreConfig,
}
# Commands that run on a sample, and what that checks.
ON_SAMPLE = {
    "train_tokenizer": "files, columns", "tokenize_corpus": "files, columns, tokenizer",
    "select_documents": "task, test texts",
    "score_words": "options, arrays", "build_masks": "options, scores",
}
DRY = {"pretrain": "options, lengths, batches, DeepSpeed JSON, memory",
       "finetune": "task, labels, lengths, batches, DeepSpeed JSON"}
# The section of a recipe that a step's flags come from, by the beginning of its name.
_SECTION_OF = {
    "tokenize-general": "general_text", "tokenize-domain": "domain_text", "leakage": "task",
    "stage1": "general", "classifier": "classifier", "annotate": "annotate", "scorer": "scorer",
    "score": "score", "masks": "masks", "task_guided": "task_guided", "finetune": "finetune",
    "vocabulary": "vocabulary", "untrained": "task_guided",
}
_TOP = {"model_name_or_path": "encoder", "tokenizer": "encoder"}


@dataclass
class Checked:
    """What was found out about a step.

    what: was checked. problem: a sentence, with its exit code. config: options of a training
    command, and the precision that it trains in. memory: what the command says of it. note: that
    its rows are shorter than planned.
    """

    step: Step
    what: str = ""
    problem: str = ""
    code: int = 0
    config: Any = None
    precision: str = ""
    memory: str = ""
    note: str = ""


@dataclass
class Checker:
    """Checks steps in plan order.

    Args:
        scratch: a folder that is removed afterwards.
        journal: of the output folder, to know what is finished.
    """

    recipe: dict[str, Any]
    options: PipelineConfig
    steps: list[Step]
    journal: run.Journal
    scratch: Path
    ranks: int = 1
    sampled: set[str] = field(default_factory=set)
    finished: set[str] = field(default_factory=set)
    _tasks: set[str] = field(default_factory=set)
    _known: dict[str, tuple[int, str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.root = self.journal.root
        encoder = self.recipe["encoder"]
        self.encoder = encoder if encoder and is_here(encoder) else None

    def check(self, step: Step) -> Checked:
        """Check one step; those that it needs have been checked."""
        found = Checked(step)
        script = Path(step.command[0]).stem if step.compute is None else ""
        if self.journal.is_finished(step) and not self.options.rerun:
            self.finished.add(step.name)
            found.what = "finished"
        if script in CONFIGS:
            self._options(found, script)
        if found.what == "finished" or found.problem:
            return found
        if script in ON_SAMPLE and self._is_on_sample(step, script):
            self._on_sample(found, script)
        elif script == "tokenize_corpus":
            self._read_text(found)
        elif script in DRY and (words := self.stand_ins(step)):
            self._begin(found, [step.command[0], *words, "--dry_run"])
            found.what = DRY[script] + self._stand_in(step, words)
        elif script in CONFIGS:
            found.what = "options" + (", task, labels" if isinstance(found.config, TaskOptions)
                                      else "") + (", lengths" if self.encoder else "")
        else:
            found.what = "" if script in ("report", "") else "options"
        return found

    # ------------------------------------------------------------------ as far as options go

    def _options(self, found: Checked, script: str) -> None:
        from train.engine import read_ds_config, resolve_ds_config
        from train.model import fit_row_length, load_config

        said = StringIO()
        try:
            with redirect_stdout(said), redirect_stderr(said):
                config = found.config = parse(CONFIGS[script], found.step.command[1:])
                if isinstance(config, TaskOptions):
                    self._task(config)
                if self.encoder:
                    found.config = fit_row_length(load_config(self.encoder), config)
                    found.note = next((line for line in said.getvalue().splitlines()
                                       if line.startswith("max_seq_length: ")), "")
                if isinstance(config, TrainingConfig) and \
                        config.per_device_train_batch_size != "auto":
                    found.precision = resolve_ds_config(
                        read_ds_config(config.deepspeed_config), config, total_steps=1 << 30,
                        world_size=self.ranks).precision
        except (ConfigError, DataError, OSError) as error:
            self._fails(found, str(error), getattr(error, "exit_code", DataError.exit_code))

    def _task(self, config: TaskOptions) -> None:
        """Read a task, once for all steps that take the same labels of it."""
        files = {**config.task_files(), "label_seed": None}
        key = repr([config.task, files])
        if key not in self._tasks:
            load_task(config.task, **files)
            self._tasks.add(key)

    def _fails(self, found: Checked, sentence: str, code: int) -> None:
        text = sentence.replace(str(self.scratch), str(self.root))
        found.problem, found.code = self.in_words_of_the_recipe(text, found.step), code

    def _read_text(self, found: Checked) -> None:
        """Read the first documents, where the tokenizer is not here yet."""
        flags = flags_of(found.step.command[1:])
        found.what = "files, columns"
        if any(spec.startswith("hub:") for spec in flags["input"]):
            found.what = "options (its text is on the hub)"
            return
        try:
            if not any(text.strip() for text in documents_of(flags, SAMPLE)):
                raise DataError(f"--input {' '.join(flags['input'])}: no text in the first "
                                f"{SAMPLE} documents; give another file")
        except (ConfigError, DataError, OSError) as error:
            self._fails(found, str(error), getattr(error, "exit_code", DataError.exit_code))

    # -------------------------------------------------------------------- in a scratch folder

    def _is_on_sample(self, step: Step, script: str) -> bool:
        """Return whether a step can run on the sample, and writes nothing elsewhere."""
        flags = flags_of(step.command[1:])
        if any(spec.startswith("hub:") for spec in flags.get("input", [])):
            return False
        if script == "tokenize_corpus" and self.finished.issuperset(step.needs):
            return is_here(flags["tokenizer"][0])
        return self.sampled.issuperset(step.needs)

    def _on_sample(self, found: Checked, script: str) -> None:
        made = {f"{self.root}/vocabulary"} if "vocabulary" in self.finished else set()
        words = [word if word in made else self.moved(word) for word in found.step.command[1:]]
        if script in ("train_tokenizer", "tokenize_corpus"):
            flags = flags_of(words)
            most = min(int(flags.get("max_documents", [SAMPLE])[0]), SAMPLE)
            words = without(words, "max_documents", "num_shards", "num_workers")
            words += ["--max_documents", str(most)]
        found.what = f"{ON_SAMPLE[script]}: on the first {SAMPLE} documents"
        if self._begin(found, [found.step.command[0], *words]) == 0:
            self.sampled.add(found.step.name)

    def moved(self, word: str) -> str:
        """Return a path below the output folder as one of the scratch folder."""
        root = f"{self.root}/"
        return f"{self.scratch}/{word.removeprefix(root)}" if word.startswith(root) else word

    def stand_ins(self, step: Step) -> list[str]:
        """Return the flags of a training command with stand-ins; [] if there are none."""
        words, flags = list(step.command[1:]), flags_of(step.command[1:])
        if "tokens" in flags:
            owner = {"tokenize-general", "tokenize-domain", "leakage"} & {*step.needs} or {
                name for name in ("tokenize-domain", "leakage") if name in self.sampled}
            if not owner or not owner <= self.sampled | self.finished:
                return []
            if owner <= self.sampled:
                words = replaced(words, "tokens", self.moved(flags["tokens"][0]))
            if "mask_index" in flags and not self._has_index(step):
                words = [*without(words, "mask_index"), "--masking", BASELINE]
        model = flags.get("model_name_or_path", [""])[0]
        if self._is_made_later(model):
            fresh = (self.recipe["general"] or {}).get("model_config")
            if self.encoder:
                words = replaced(words, "model_name_or_path", self.encoder)
            elif fresh and "tokens" in flags:
                words = replaced(without(words, "model_name_or_path"), "model_config", fresh)
            else:
                return []
        elif model and not is_here(model):
            return []
        runs = flags.get("also", [])
        if not self.encoder and any(self._with_encoder(run) != run for run in runs):
            return []
        return [self._with_encoder(word) if word in runs else word for word in words]

    def _has_index(self, step: Step) -> bool:
        return any(need.startswith("masks-") and need in self.sampled | self.finished
                   for need in step.needs)

    def _is_made_later(self, model: str) -> bool:
        return model.startswith(f"{self.root}/") and not Path(model).is_dir()

    def _with_encoder(self, run: str) -> str:
        """Return a value of `--also` with the encoder for a model that an earlier step makes."""
        pairs = dict(word.split("=", 1) for word in shlex.split(run))
        if self._is_made_later(pairs.get("model_name_or_path", "")):
            pairs["model_name_or_path"] = str(self.encoder)
        return shlex.join("=".join(pair) for pair in pairs.items())

    def _stand_in(self, step: Step, words: list[str]) -> str:
        was, now = (flags_of(some).get("model_name_or_path") for some in
                    (step.command[1:], words))
        stand_in = "the encoder" if self.encoder else "fresh weights"
        return "" if was == now else f" (on {stand_in} for its model)"

    def _begin(self, found: Checked, command: list[str]) -> int:
        """Run a command to its end, once for all steps to which it is the same."""
        typed = " ".join(without(command, "output_dir", "seed", "seeds", "label_seed"))
        same = re.sub(r"(output_dir|label_seed)=\S+", "", typed)  # of --also
        if "--dry_run" not in command or same not in self._known:
            lines, code = outcome(command)
            memory = next((line for line in lines if "estimated memory" in line), "")
            self._known[same] = code, _sentence(lines), memory
        code, sentence, found.memory = self._known[same]
        if code:
            self._fails(found, sentence, code)
        return code

    # ---------------------------------------------------------------------------------- words

    def in_words_of_the_recipe(self, sentence: str, step: Step) -> str:
        """Return a sentence about flags of a step as one about what the user has typed."""
        section = next((there for name, there in _SECTION_OF.items()
                        if step.name == name or step.name.startswith(f"{name}-")), "")
        typed = {setting.partition("=")[0] for setting in self.options.set}
        values = flags_of(step.command[1:])

        def said(match: re.Match[str]) -> str:
            flag, rest = match[1], match[2] or ""
            key = _TOP.get(flag, flag)
            for there in ("task", section):
                if flag in SECTIONS.get(there, {}):
                    key = f"{there}.{flag}"
            if key == flag and key not in self.recipe:
                return match[0]
            key = origin_of(self.options.recipe, key)
            shown = f"--set {key}" if {key, key.partition(".")[0]} & typed else key
            value = " ".join(values.get(flag, []))
            return f"{shown}={rest[1:]}" if rest and rest[1:] == value else f"{shown}{rest}"

        flags = "|".join(sorted({*SECTIONS["task"], *SECTIONS.get(section, {}), *_TOP,
                                 "deepspeed_config"}, key=len, reverse=True))
        return re.sub(rf"--({flags})\b( (?!-)[^\s:;,)]+)?", said, sentence)


def is_here(name: str) -> bool:
    """Return whether a checkpoint is a folder, in a package, or in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    if os.path.isdir(name) or name.startswith("pypi:"):
        return True
    with suppress(ValueError):  # no name of the hub
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    return False


def documents_of(
    flags: dict[str, list[str]], most: int | None,
    passed: Callable[[int], None] | None = None,
) -> Iterator[str]:
    """Yield the first documents that a tokenizing command reads, from its flags."""
    return read_documents(
        flags["input"], text_column=flags.get("text_column", ["text"])[0],
        where=dict(pair.split("=", 1) for pair in flags.get("where", [])),
        blank_line_documents="blank_line_documents" in flags, max_documents=most, passed=passed)


def flags_of(words: list[str]) -> dict[str, list[str]]:
    """Return the values of each flag."""
    found: dict[str, list[str]] = {}
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag = word.removeprefix("--")
            found.setdefault(flag, [])
        elif flag:
            found[flag].append(word)
    return found


def without(words: list[str], *flags: str) -> list[str]:
    """Return a command without some flags and their values."""
    kept, keeps = [], True
    for word in words:
        if word.startswith("--"):
            keeps = word.removeprefix("--") not in flags
        if keeps:
            kept.append(word)
    return kept


def replaced(words: list[str], flag: str, value: str) -> list[str]:
    """Return a command with another value of a flag."""
    return [*without(words, flag), f"--{flag}", value]


def outcome(command: list[str], seconds: float = math.inf,
            enough: Callable[[], bool] = lambda: False) -> tuple[list[str], int]:
    """Run a script with its flags from the fork server; return its lines and its exit code.

    Args:
        seconds: after which it is asked to stop; `STOP_SECONDS` later it is killed.
        enough: whether it has done what it is run for; then it is killed.
    """
    begin = time.monotonic()
    output, process, poll = run.fork(run.as_process(run.plainly(command)), run.without_ranks())
    text, late = b"", False
    try:
        while True:
            ready, _, _ = select.select([output], [], [], 0.1)
            if ready:
                chunk = os.read(output.fileno(), 1 << 16)
                if not chunk:
                    break
                text += chunk
            spent = time.monotonic() - begin
            if enough() or spent > seconds + STOP_SECONDS:
                run.signal_all(process, signal.SIGKILL)
            elif spent > seconds and not late:
                late = True
                run.signal_all(process, signal.SIGTERM)
    except BaseException:  # it has a group of its own, which Ctrl-C does not reach
        run.signal_all(process, signal.SIGKILL)
        raise
    output.close()
    while (code := poll()) is None:
        time.sleep(0.01)
    return text.decode(errors="replace").splitlines(), run.exit_code(code) if code else 0


def _sentence(lines: list[str]) -> str:
    """Return what a command says of its end, in its last line."""
    last = next((line for line in reversed(lines) if line.strip()), "no reason given")
    return re.sub(r"^(selmask )?[\w.]+: ", "", last)


def check_options(steps: Sequence[Step]) -> None:
    """Refuse options that contradict each other, which a command would only when its turn comes.

    Raises:
        ConfigError: names the step.
    """
    for step in steps:
        config = CONFIGS.get(Path(step.command[0]).stem) if step.compute is None else None
        if config is not None:
            try:
                parse(config, step.command[1:])
            except ConfigError as error:
                raise ConfigError(f"step {step.name}: {error}") from None


def check_all(checker: Checker) -> Iterator[Checked]:
    """Check the steps in plan order."""
    for step in checker.steps:
        yield checker.check(step)
