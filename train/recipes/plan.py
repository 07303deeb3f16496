"""Turn a recipe into steps: their commands, inputs and outputs."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from preprocess.errors import ConfigError
from train.config import FinetuneConfig
from train.recipes.arms import (
    GENERAL_STORE,
    NONE,
    TASK_SCORES,
    NamedScores,
    PlannedArm,
    used_scores,
    with_matched,
)
from train.recipes.recipe import REPOSITORY, needs_domain, needs_general
from train.recipes.steps import (
    Step,
    array_files,
    flag_words,
    inside,
    model_files,
    store_files,
)
from train.shipped import DS_CONFIGS, find_shipped
from train.stages.floors import write_naive_bayes

MASK_RATE = 0.15  # the default of build_masks.py and of pretrain.py alike


def _seeds(flags: dict[str, Any]) -> str:
    """Return the seeds of a section as the command takes them."""
    return flags.get("seeds") or FinetuneConfig.seeds


def plan(recipe: dict[str, Any], output_dir: str | Path) -> tuple[list[Step], list[dict]]:
    """Turn a recipe into steps, in the order in which they run.

    Returns:
        `(steps, arms)`; `arms` is what `train/report.py` reads from `arms.json`: name, runs (one
        folder per pre-training seed, relative to the output folder), whether it is a trivial
        baseline (`floor`), the steps that made its masks, whose seconds are in `steps.json`, and
        its policy: strategy, scores, units, rate, and the arm that it matches.
    """
    planner = _Planner(recipe, Path(output_dir))
    planner.build()
    return planner.steps, planner.arms


class _Planner:
    """Collects the steps and the arms."""

    def __init__(self, recipe: dict[str, Any], root: Path) -> None:
        self.recipe, self.root = recipe, root
        self.text = root / "domain" / "text"
        # What the arms are trained on: all of it, or what is left without the task's test texts.
        drop = bool(recipe["domain_text"].get("drop_leaked"))
        self.domain = root / "domain_kept" / "text" if drop else self.text
        self.ready = "leakage" if drop else "tokenize-domain"
        self.steps: list[Step] = []
        self.arms: list[dict[str, Any]] = []
        chosen = recipe["deepspeed_config"]
        self.deepspeed_config = chosen and str(
            find_shipped(chosen, DS_CONFIGS, "recipe: deepspeed_config"))
        self.tokenizer = recipe["tokenizer"] or recipe["encoder"]

    def build(self) -> None:
        """Plan all steps; those that read the user's files come first, so mistakes show early."""
        recipe = self.recipe
        baselines = [self.naive_bayes()] if recipe["floors"].get("naive_bayes") else []
        if recipe["vocabulary"] is not None:
            self.vocabulary()
        if needs_general(recipe):
            self.tokenize("general")
        if needs_domain(recipe):
            self.tokenize("domain")
            self.leakage()
        if recipe["general"] is not None:
            self.stage1()
        for length in recipe["export_steps"] or [None]:
            self.one_length(length)
        if recipe["floors"].get("untrained"):
            baselines.append(self.untrained())
        for run in baselines:
            self.arm(run.name, [run], [])
        self.add("report", "train/report.py", {}, outputs=[], records=[])
        self.steps[-1].command.extend([str(self.root), "--output_dir", str(self.root / "report")])

    def add(self, name: str, script: str, flags: dict[str, Any], **options: Any) -> str:
        """Add a step that runs one of our scripts, as typed from the current folder."""
        full = REPOSITORY / script
        typed = os.path.relpath(full) if Path.cwd().is_relative_to(REPOSITORY) else str(full)
        self.steps.append(Step(name, [typed, *flag_words(flags)], **options))
        return name

    def train(self, name: str, script: str, section: str, run: Path, flags: dict[str, Any],
              needs: list[str], records: list[str] | None = None,
              judged: list[str] | None = None) -> str:
        """Add a training command: the section's flags, then the pipeline's own."""
        settings = {"deepspeed_config": self.deepspeed_config, **(self.recipe[section] or {}),
                    **flags, "output_dir": run}
        return self.add(name, script, settings, outputs=inside(run, ""), needs=needs,
                        records=records or model_files(run / "hf"), launched=True,
                        judged=judged or [])

    def vocabulary(self) -> None:
        self.tokenizer = self.root / "vocabulary"
        self.add("vocabulary", "preprocess/train_tokenizer.py",
                 {**self.recipe["vocabulary"], "output": self.tokenizer},
                 outputs=inside(self.tokenizer, ""), resumes=False,
                 records=inside(self.tokenizer, "tokenizer.json"))

    def tokenize(self, which: str) -> None:
        prefix = self.root / which / "text"
        flags = {**self.recipe[f"{which}_text"], "tokenizer": self.tokenizer, "output": prefix}
        flags.pop("drop_leaked", None)
        self.add(f"tokenize-{which}", "preprocess/tokenize_corpus.py", flags,
                 outputs=inside(prefix.parent, ""), records=store_files(prefix),
                 needs=[step.name for step in self.steps if step.name == "vocabulary"])

    def leakage(self) -> None:
        """Count the test texts that are in the in-domain text, and leave them out if asked to."""
        outputs = inside(self.text.parent, f"{self.text.name}.leakage.json")
        records, flags = list(outputs), {"tokens": self.text, **self.recipe["task"]}
        if self.domain != self.text:
            flags |= {"drop_leaked": True, "output": self.domain}
            outputs += inside(self.domain.parent, "")
            records += store_files(self.domain)
        self.add("leakage", "preprocess/select_documents.py", flags, outputs=outputs,
                 records=records, needs=["tokenize-domain"])

    def stage1(self) -> None:
        run, exports = self.root / "stage1", self.recipe["export_steps"]
        folders = [run / "hf", *(run / f"hf_step_{n}" for n in exports)]
        self.train(
            "stage1", "train/pretrain.py", "general", run,
            {"tokens": self.root / "general" / "text", "export_steps": exports,
             "model_name_or_path": self.recipe["encoder"]}, ["tokenize-general"],
            [pattern for folder in folders for pattern in model_files(folder)],
        )

    def finetune(self, name: str, section: str, run: Path, model: str | Path,
                 needs: list[str], seeds: str = "", judged: list[str] | None = None) -> str:
        return self.train(
            name, "train/finetune.py", section, run,
            {**self.recipe["task"], "model_name_or_path": model,
             "seeds": seeds or _seeds(self.recipe[section])},
            needs, inside(run, "results.jsonl", "seed_*/predictions.jsonl",
                           "seed_*/hf/lineage.json", "seed_*/hf/*.safetensors"), judged,
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
        built = with_matched(recipe["arms"])
        for name in used_scores(built, recipe["scores"]):
            self.scores(recipe["scores"][name], root, tag, base, after)
        for policy in built:
            self.masks(policy, tag)
        for policy in recipe["arms"]:
            label = policy.name if length is None else f"{policy.name}@{length}"
            if policy.name == NONE:
                run = root / "finetune" / NONE
                self.finetune(f"finetune-{NONE}{tag}", "finetune", run, base, after)
                self.arm(label, [run], [], policy)
                continue
            runs = [self.one_arm(policy, seed, root, tag, base, after)
                    for seed in recipe["pretrain_seeds"]]
            self.arm(label, runs, self.behind_masks(f"masks-{policy.name}{tag}"), policy)

    # ------------------------------------------------------------------------------ scores

    def scores(self, scores: NamedScores, root: Path, tag: str, base: str | Path,
               after: list[str]) -> None:
        """Plan one entry of `scores`, with all that it needs and that is not planned yet."""
        name, step = self.array(scores.name, tag), self.score_step(scores.name, tag)
        if self.has(step):
            return
        needs = [self.ready]
        if scores.combine:
            needs += [self.score_step(part, tag) for part in scores.parts]
            self.array_step(step, "preprocess/score_words.py", {
                "tokens": self.domain, "combine": scores.combine,
                "scores": [self.array(part, tag) for part in scores.parts], "name": name}, needs)
            return
        options = dict(scores.options)
        if scores.is_counted:
            if options.get("against") == GENERAL_STORE:
                options["against"] = self.root / "general" / "text"
                needs.append("tokenize-general")
            self.array_step(step, "preprocess/score_words.py", {
                "tokens": self.domain, "measure": scores.measure, **options, "name": name}, needs)
            return
        model, measure = base, {"measure": scores.measure}
        if "scorer" in scores.needs:  # the command's default
            measure = {}
            model = self.scorer(root, tag, base, after)
            needs.append(f"scorer{tag}")
        elif "classifier" in scores.needs:
            model = self.classifier(root, tag, base, after)
            needs.append(f"classifier{tag}")
        else:
            needs += after
        self.array_step(step, "train/score_tokens.py", {
            **self.recipe["score"], **measure, **options, "model_name_or_path": model,
            "tokens": self.domain, "name": name}, needs, launched=True)

    def array_step(self, step: str, script: str, flags: dict[str, Any], needs: list[str],
                   launched: bool = False) -> None:
        """Add a step that writes scores, and units where its measure finds them."""
        made = array_files(self.domain, f"{flags['name']}.scores")
        self.add(step, script, flags, outputs=[*made, *array_files(self.domain,
                                                             f"{flags['name']}.units")],
                 records=made, needs=needs, launched=launched)

    def follows_stage_1(self, name: str) -> bool:
        """Tell whether scores are others after another stage 1."""
        scores = self.recipe["scores"][name]
        return any(map(self.follows_stage_1, scores.parts)) if scores.combine \
            else not scores.is_counted

    def array(self, name: str, tag: str) -> str:
        """Name the array of an entry of `scores`."""
        return f"{name}{tag if self.follows_stage_1(name) else ''}"

    def score_step(self, name: str, tag: str) -> str:
        """Name the step that makes an entry of `scores`."""
        array = self.array(name, tag)
        return f"score{array.removeprefix(name)}" if name == TASK_SCORES else f"score-{array}"

    def has(self, name: str) -> bool:
        return any(step.name == name for step in self.steps)

    def classifier(self, root: Path, tag: str, base: str | Path, after: list[str]) -> Path:
        """Plan the classifier of the task; return its folder."""
        run = root / "classifier"
        seed = _seeds(self.recipe["classifier"]).split(",")[0]
        if not self.has(f"classifier{tag}"):
            self.finetune(f"classifier{tag}", "classifier", run, base, after,
                          judged=inside(run, "results.jsonl"))
        return run / f"seed_{seed}" / "hf"

    def scorer(self, root: Path, tag: str, base: str | Path, after: list[str]) -> Path:
        """Plan the classifier, the annotation and the token scorer; return its folder."""
        recipe, annotations = self.recipe, root / "annotations" / "text"
        if not self.has(f"scorer{tag}"):
            model = self.classifier(root, tag, base, after)
            marks = inside(annotations.parent, "text*.importance.*")
            self.add(
                f"annotate{tag}", "train/annotate.py",
                {**recipe["annotate"], **recipe["task"], "model_name_or_path": model,
                 "output": annotations},
                outputs=inside(annotations.parent, ""), launched=True, needs=[f"classifier{tag}"],
                records=[*store_files(annotations), *marks],
                judged=inside(annotations.parent, "text*.importance.json"),
            )
            self.train(
                f"scorer{tag}", "train/fit_scorer.py", "scorer", root / "scorer",
                {"annotations": annotations, "model_name_or_path": base},
                [f"annotate{tag}", *after], judged=inside(root / "scorer", "results.json"),
            )
        return root / "scorer" / "hf"

    # -------------------------------------------------------------------------------- arms

    def masks(self, policy: PlannedArm, tag: str) -> None:
        """Plan the mask index of an arm, or one for each of its epochs."""
        name, source, needs = f"{policy.name}{tag}", {}, []
        if policy.scores:
            source["scores"] = self.array(policy.scores, tag)
            needs.append(self.score_step(policy.scores, tag))
        if policy.match:
            source["match"] = f"{policy.match}{tag}"
            needs.append(f"masks-{policy.match}{tag}")
        options = {**self.recipe["masks"], **policy.rules}
        if policy.rate is not None:
            options["mlm_probability"] = policy.rate
        if policy.units:
            options["units"] = self.array(policy.units, tag)
            needs.append(self.score_step(policy.units, tag))
        indices = [name, *(f"{name}-epoch{n}" for n in range(1, policy.rules.get("epochs", 1)))]
        made = [found for index in indices for found in array_files(self.domain, f"{index}.mask")]
        self.add(
            f"masks-{name}", "preprocess/build_masks.py",
            {"tokens": self.domain, "strategy": policy.strategy, **source, **options, "name": name},
            outputs=made, records=made, needs=list(dict.fromkeys(needs)) or [self.ready],
        )

    def one_arm(self, policy: PlannedArm, seed: int, root: Path, tag: str, base: str | Path,
                after: list[str]) -> Path:
        """Plan stage 2 with one seed, and the fine-tuning of its model."""
        arm = f"{policy.name}-seed{seed}"
        run, target = root / "task_guided" / arm, root / "finetune" / arm
        flags: dict[str, Any] = {"tokens": self.domain}
        if policy.drawn:
            flags |= {"masking": policy.strategy, "mlm_probability": self.drawn_rate(policy)}
        else:  # the index has its rate already
            flags |= {"mask_index": f"{policy.name}{tag}", "mlm_probability": None}
        if policy.corruption:
            flags["corruption"] = policy.corruption
        name = self.train(
            f"task_guided-{arm}{tag}", "train/pretrain.py", "task_guided", run,
            {**flags, "model_name_or_path": base, "seed": seed},
            [self.ready if policy.drawn else f"masks-{policy.name}{tag}", *after],
        )
        self.finetune(f"finetune-{arm}{tag}", "finetune", target, run / "hf", [name])
        return target

    def drawn_rate(self, policy: PlannedArm) -> float | str | None:
        """Return the rate of masks drawn in training; None for the command's own."""
        stage, masks = (self.recipe[section].get("mlm_probability")
                        for section in ("task_guided", "masks"))
        if policy.rate is not None or stage is not None:
            return stage if policy.rate is None else policy.rate
        return None if masks == MASK_RATE else masks

    def behind_masks(self, name: str) -> list[str]:
        """Name the step and all that it needs, up to general pre-training and the text."""
        for step in self.steps:
            if step.name == name:
                needs = [need for need in step.needs
                         if need not in ("stage1", "leakage") and not need.startswith("tokenize-")]
                earlier = [found for need in needs for found in self.behind_masks(need)]
                return list(dict.fromkeys([*earlier, name]))
        return []  # masks that are drawn on the fly

    def arm(self, name: str, runs: list[Path], masking: list[str],
            policy: PlannedArm | None = None) -> None:
        """Note an arm for the report; a baseline has no policy."""
        relative = [str(run.relative_to(self.root)) for run in runs]
        told = {} if policy is None else {
            "strategy": policy.strategy or NONE, "scores": policy.scores, "match": policy.match,
            "units": policy.rules.get("units", ""),
            "rate": policy.rate, "corruption": policy.corruption}
        self.arms.append({"name": name, "runs": relative, "floor": policy is None,
                          "masking": masking, **told})

    def naive_bayes(self) -> Path:
        """Plan a trivial baseline: word counts."""
        run = self.root / "floors" / "naive_bayes"
        limits = {name: self.recipe["finetune"].get(name)
                  for name in ("max_train_samples", "max_eval_samples")}
        self.steps.append(Step(
            "naive_bayes", flag_words({**self.recipe["task"], **limits}), inside(run, ""),
            inside(run, "results.jsonl", "seed_0/predictions.jsonl"),
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
            outputs=inside(model, ""), records=model_files(model / "hf"), launched=True,
            needs=[f"tokenize-{which}"],
        )
        run = self.root / "floors" / "untrained"
        first = _seeds(recipe["finetune"]).split(",")[0]  # a baseline needs no interval
        self.finetune("finetune-untrained", "finetune", run, model / "hf", [name], seeds=first)
        return run


def _naive_bayes(task: dict[str, Any], limits: dict[str, int | None], run: Path) -> None:
    """Run naive Bayes on the sentences that fine-tuning uses."""
    from preprocess.corpus import load_task, take_fixed

    loaded = load_task(task["task"], **{key: task[key] for key in task if key != "task"})
    splits = {
        name: take_fixed(examples, limits[f"max_{'train' if name == 'train' else 'eval'}_samples"])
        for name, examples in loaded.splits.items()
    }
    write_naive_bayes(dataclasses.replace(loaded, splits=splits), run)
