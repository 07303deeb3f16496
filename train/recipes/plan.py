"""What a recipe becomes: the steps, their flags and their outputs."""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preprocess.errors import ConfigError, DataError
from preprocess.masking import ARRAY_NEEDS, MATCHED, STRATEGIES
from preprocess.store import TokenStore, array_path
from train.config import FinetuneConfig
from train.recipes.recipe import NEGATED, REPOSITORY, needs_domain
from train.reports.results import finished_seeds
from train.stages.floors import write_naive_bayes


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
        built = [arm for arm in STRATEGIES
                 if arm in recipe["arms"] and not STRATEGIES[arm].drawn]
        if any(not STRATEGIES[arm].needs.isdisjoint(ARRAY_NEEDS) for arm in built):
            self.score(root, tag, base, after)
        for arm in built:
            self.masks(arm, tag, self.root / "domain" / "text")
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

    def score(self, root: Path, tag: str, base: str | Path, after: list[str]) -> None:
        """Add the classifier, the annotation, the scorer and the scores."""
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

    def masks(self, arm: str, tag: str, domain: Path) -> None:
        if any(step.name == f"masks-{arm}{tag}" for step in self.steps):
            return
        source, needs = {}, []
        if "scores" in STRATEGIES[arm].needs:
            source["scores"] = f"task{tag}"
            needs.append(f"score{tag}")
        if "match" in STRATEGIES[arm].needs:
            self.masks(MATCHED, tag, domain)  # the control's counts, even without that arm
            source["match"] = f"{MATCHED}{tag}"
            needs.append(f"masks-{MATCHED}{tag}")
        name = f"{arm}{tag}"
        self.add(
            f"masks-{name}", "preprocess/build_masks.py",
            {"tokens": domain, "strategy": arm, **source, **self.recipe["masks"], "name": name},
            is_whole=lambda: _holds_store(domain, "mask", name),
            outputs=_array_files(domain, name, "mask"),
            needs=needs or ["tokenize-domain"],
        )

    def one_arm(self, arm: str, seed: int, root: Path, tag: str, base: str | Path,
                after: list[str]) -> Path:
        """Stage 2 with one seed, and fine-tuning of what it made."""
        built = not STRATEGIES[arm].drawn
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
