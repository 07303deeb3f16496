"""Turn a recipe into steps: their commands, inputs and outputs."""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preprocess.errors import ConfigError
from preprocess.masking import ARRAY_NEEDS, MATCHED, STRATEGIES
from train.config import FinetuneConfig
from train.recipes.recipe import NEGATED, REPOSITORY, SWITCHED_OFF, needs_domain
from train.stages.floors import write_naive_bayes


@dataclass(frozen=True)
class Step:
    """One process of the pipeline.

    Attributes:
        name: as in the logs and in `steps.json`.
        command: script and flags.
        outputs: patterns of the files and folders that belong to this step alone; `--rerun`
            deletes them.
        records: patterns of the files by which the step is judged: each must match a file, and
            none may change afterwards. Without any the step runs every time.
        needs: names of the steps whose outputs it reads.
        launched: whether the deepspeed launcher starts the command.
        resumes: whether the command continues or keeps what an interrupted attempt left.
        compute: called instead of the command, which then only says what it depends on.
    """

    name: str
    command: list[str]
    outputs: list[str]
    records: list[str]
    needs: list[str] = field(default_factory=list)
    launched: bool = False
    resumes: bool = True
    compute: Callable[[], None] | None = None


def flag_words(flags: dict[str, Any]) -> list[str]:
    """Turn flags into words of a command line.

    Args:
        flags: name -> value; None and False leave a flag out, True is the flag alone, a list
            becomes several words and a dictionary `key=value` words.
    Raises:
        ConfigError: a value that a command would take for another flag.
    """
    words: list[str] = []
    for name, value in flags.items():
        if value is False and name in (*NEGATED, *SWITCHED_OFF):
            words.append(f"--no{'-' if name in NEGATED else '_'}{name}")
        if value is None or value is False or value == []:
            continue
        words.append(f"--{name}")
        given: list[Any] = [value]
        if isinstance(value, dict):
            given = [f"{key}={entry}" for key, entry in value.items()]
        elif isinstance(value, bool):
            given = []
        elif isinstance(value, list):
            given = value
        for word in given:
            if str(word).startswith("-") and not isinstance(word, int | float):
                raise ConfigError(f"--{name} {word}: would be taken for another flag; give a name "
                                  f"that does not begin with -, as ./{word}")
            words.append(str(word))
    return words


def _seeds(flags: dict[str, Any]) -> str:
    """Return the seeds of a section as the command takes them."""
    return flags.get("seeds") or FinetuneConfig.seeds


def _inside(folder: Path, *patterns: str) -> list[str]:
    """Patterns of files in a folder whose own name may hold any character."""
    return [os.path.join(glob.escape(str(folder)), pattern) for pattern in patterns]


def _model(folder: Path) -> list[str]:
    """Patterns of an exported model."""
    return _inside(folder, "lineage.json", "*.safetensors")


def _store(prefix: Path) -> list[str]:
    """Patterns of a token store, sharded or not."""
    name = prefix.name
    return _inside(prefix.parent, f"{name}.json", f"{name}*.bin", f"{name}*.idx")


def _array(prefix: Path, name: str) -> list[str]:
    """Patterns of an array `NAME.KIND` beside a store, sharded or not."""
    return _inside(prefix.parent, *(f"{prefix.name}*.{name}.{end}" for end in ("npy", "json")))


def plan(recipe: dict[str, Any], output_dir: str | Path) -> tuple[list[Step], list[dict]]:
    """Turn a recipe into steps, in the order in which they run.

    Returns:
        `(steps, arms)`; `arms` is what `train/report.py` reads from `arms.json`: name, runs (one
        folder per pre-training seed, relative to the output folder), whether it is a trivial
        baseline (`floor`), and the steps that made its masks, whose seconds are in `steps.json`.
    """
    planner = _Planner(recipe, Path(output_dir))
    planner.build()
    return planner.steps, planner.arms


class _Planner:
    """Collects the steps and the arms."""

    def __init__(self, recipe: dict[str, Any], root: Path) -> None:
        self.recipe, self.root = recipe, root
        self.domain = root / "domain" / "text"
        self.steps: list[Step] = []
        self.arms: list[dict[str, Any]] = []
        self.deepspeed_config = _find_config(recipe["deepspeed_config"])
        self.tokenizer = recipe["tokenizer"] or recipe["encoder"]

    def build(self) -> None:
        """Plan all steps; those that read the user's files come first, so mistakes show early."""
        recipe = self.recipe
        baselines = [self.naive_bayes()] if recipe["floors"].get("naive_bayes") else []
        if recipe["vocabulary"] is not None:
            self.vocabulary()
        if recipe["general"] is not None:
            self.tokenize("general")
        if needs_domain(recipe):
            self.tokenize("domain")
        if recipe["general"] is not None:
            self.stage1()
        for length in recipe["export_steps"] or [None]:
            self.one_length(length)
        if recipe["floors"].get("untrained"):
            baselines.append(self.untrained())
        for run in baselines:
            self.arm(run.name, [run], [], floor=True)
        self.add("report", "train/report.py", {}, outputs=[], records=[])
        self.steps[-1].command.extend([str(self.root), "--output_dir", str(self.root / "report")])

    def add(self, name: str, script: str, flags: dict[str, Any], **options: Any) -> str:
        """Add a step that runs one of our scripts, as typed from the current folder."""
        full = REPOSITORY / script
        typed = os.path.relpath(full) if Path.cwd().is_relative_to(REPOSITORY) else str(full)
        self.steps.append(Step(name, [typed, *flag_words(flags)], **options))
        return name

    def train(self, name: str, script: str, section: str, run: Path, flags: dict[str, Any],
              needs: list[str], records: list[str] | None = None) -> str:
        """Add a training command: the section's flags, then the pipeline's own."""
        settings = {"deepspeed_config": self.deepspeed_config, **(self.recipe[section] or {}),
                    **flags, "output_dir": run}
        return self.add(name, script, settings, outputs=_inside(run, ""), needs=needs,
                        records=records or _model(run / "hf"), launched=True)

    def vocabulary(self) -> None:
        self.tokenizer = self.root / "vocabulary"
        self.add("vocabulary", "preprocess/train_tokenizer.py",
                 {**self.recipe["vocabulary"], "output": self.tokenizer},
                 outputs=_inside(self.tokenizer, ""), resumes=False,
                 records=_inside(self.tokenizer, "tokenizer.json"))

    def tokenize(self, which: str) -> None:
        prefix = self.root / which / "text"
        flags = {**self.recipe[f"{which}_text"], "tokenizer": self.tokenizer, "output": prefix}
        self.add(f"tokenize-{which}", "preprocess/tokenize_corpus.py", flags,
                 outputs=_inside(prefix.parent, ""), records=_store(prefix),
                 needs=[step.name for step in self.steps if step.name == "vocabulary"])

    def stage1(self) -> None:
        run, exports = self.root / "stage1", self.recipe["export_steps"]
        folders = [run / "hf", *(run / f"hf_step_{n}" for n in exports)]
        self.train(
            "stage1", "train/pretrain.py", "general", run,
            {"tokens": self.root / "general" / "text", "export_steps": exports,
             "model_name_or_path": self.recipe["encoder"]}, ["tokenize-general"],
            [pattern for folder in folders for pattern in _model(folder)],
        )

    def finetune(self, name: str, section: str, run: Path, model: str | Path,
                 needs: list[str], seeds: str = "") -> str:
        return self.train(
            name, "train/finetune.py", section, run,
            {**self.recipe["task"], "model_name_or_path": model,
             "seeds": seeds or _seeds(self.recipe[section])},
            needs, _inside(run, "results.jsonl", "seed_*/predictions.jsonl",
                           "seed_*/hf/lineage.json", "seed_*/hf/*.safetensors"),
        )

    def one_length(self, length: int | None) -> None:
        """Plan all arms behind one stage-1 model."""
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
            self.masks(arm, tag)
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
        """Plan the classifier, the annotation, the scorer and the scores."""
        recipe = self.recipe
        classifier, annotations = root / "classifier", root / "annotations" / "text"
        seed = _seeds(recipe["classifier"]).split(",")[0]
        self.finetune(f"classifier{tag}", "classifier", classifier, base, after)
        self.add(
            f"annotate{tag}", "train/annotate.py",
            {**recipe["annotate"], **recipe["task"],
             "model_name_or_path": classifier / f"seed_{seed}" / "hf", "output": annotations},
            outputs=_inside(annotations.parent, ""), launched=True, needs=[f"classifier{tag}"],
            records=[*_store(annotations), *_inside(annotations.parent, "text*.importance.*")],
        )
        self.train(
            f"scorer{tag}", "train/fit_scorer.py", "scorer", root / "scorer",
            {"annotations": annotations, "model_name_or_path": base}, [f"annotate{tag}", *after],
        )
        array = _array(self.domain, f"task{tag}.scores")
        self.add(
            f"score{tag}", "train/score_tokens.py",
            {**recipe["score"], "model_name_or_path": root / "scorer" / "hf",
             "tokens": self.domain, "name": f"task{tag}"},
            outputs=array, records=array, launched=True,
            needs=["tokenize-domain", f"scorer{tag}"],
        )

    def masks(self, arm: str, tag: str) -> None:
        name = f"{arm}{tag}"
        if any(step.name == f"masks-{name}" for step in self.steps):
            return
        source, needs = {}, []
        if "scores" in STRATEGIES[arm].needs:
            source["scores"] = f"task{tag}"
            needs.append(f"score{tag}")
        if "match" in STRATEGIES[arm].needs:
            self.masks(MATCHED, tag)  # the control's counts, even without that arm
            source["match"] = f"{MATCHED}{tag}"
            needs.append(f"masks-{MATCHED}{tag}")
        array = _array(self.domain, f"{name}.mask")
        self.add(
            f"masks-{name}", "preprocess/build_masks.py",
            {"tokens": self.domain, "strategy": arm, **source, **self.recipe["masks"],
             "name": name},
            outputs=array, records=array, needs=needs or ["tokenize-domain"],
        )

    def one_arm(self, arm: str, seed: int, root: Path, tag: str, base: str | Path,
                after: list[str]) -> Path:
        """Plan stage 2 with one seed, and the fine-tuning of its model."""
        built = not STRATEGIES[arm].drawn
        run = root / "task_guided" / f"{arm}-seed{seed}"
        name = self.train(
            f"task_guided-{arm}-seed{seed}{tag}", "train/pretrain.py", "task_guided", run,
            {"tokens": self.domain,
             ("mask_index" if built else "masking"): f"{arm}{tag}" if built else arm,
             "model_name_or_path": base, "seed": seed},
            [f"masks-{arm}{tag}" if built else "tokenize-domain", *after],
        )
        target = root / "finetune" / f"{arm}-seed{seed}"
        self.finetune(f"finetune-{arm}-seed{seed}{tag}", "finetune", target, run / "hf", [name])
        return target

    def behind_masks(self, name: str) -> list[str]:
        """Name the step and all that it needs, up to general pre-training and the text."""
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
        """Plan a trivial baseline: word counts."""
        run = self.root / "floors" / "naive_bayes"
        limits = {name: self.recipe["finetune"].get(name)
                  for name in ("max_train_samples", "max_eval_samples")}
        self.steps.append(Step(
            "naive_bayes", flag_words({**self.recipe["task"], **limits}), _inside(run, ""),
            _inside(run, "results.jsonl", "seed_0/predictions.jsonl"),
            compute=lambda: _naive_bayes(self.recipe["task"], limits, run),
        ))
        return run

    def untrained(self) -> Path:
        """Plan a trivial baseline: the same network with fresh weights, fine-tuned."""
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
            outputs=_inside(model, ""), records=_model(model / "hf"), launched=True,
            needs=[f"tokenize-{which}"],
        )
        run = self.root / "floors" / "untrained"
        first = _seeds(recipe["finetune"]).split(",")[0]  # a baseline needs no interval
        self.finetune("finetune-untrained", "finetune", run, model / "hf", [name], seeds=first)
        return run


def _find_config(path: str | None) -> str | None:
    """Return a DeepSpeed JSON as given, or the repository's one of that name."""
    if path and not Path(path).exists() and (REPOSITORY / path).exists():
        return str(REPOSITORY / path)
    return path


def _naive_bayes(task: dict[str, Any], limits: dict[str, int | None], run: Path) -> None:
    """Run naive Bayes on the sentences that fine-tuning uses."""
    from preprocess.corpus import load_task, take_fixed

    loaded = load_task(task["task"], **{key: task[key] for key in task if key != "task"})
    splits = {
        name: take_fixed(examples, limits[f"max_{'train' if name == 'train' else 'eval'}_samples"])
        for name, examples in loaded.splits.items()
    }
    write_naive_bayes(dataclasses.replace(loaded, splits=splits), run)
