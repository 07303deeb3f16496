"""Turn a recipe into steps: their commands, inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from preprocess.corpus import limit_labels, limit_splits
from preprocess.errors import ConfigError
from train.config import PretrainConfig
from train.recipes.arms import NONE, PlannedArm
from train.recipes.commands import Start, Tuned, exported, seeds_of
from train.recipes.labels import Labels, draws, read_task
from train.recipes.masks import MaskPlan
from train.recipes.recipe import needs_domain, needs_general
from train.recipes.steps import Step, flag_words, inside, model_files, store_files
from train.stages.floors import write_naive_bayes

MASK_RATE = 0.15  # the default of build_masks.py and of pretrain.py alike


def plan(recipe: dict[str, Any], output_dir: str | Path) -> tuple[list[Step], list[dict]]:
    """Turn a recipe into steps, in the order in which they run.

    All that one pre-training seed needs comes before the next seed: a study that is cut short then
    has whole comparisons.

    Returns:
        `(steps, arms)`; `arms` is what `train/report.py` reads from `arms.json`: for every arm,
        length of stage 1, label budget and length of stage 2 a unique `name` and

        - `runs`: folders relative to the output folder, one for each of `pretrain_seeds` (null
          where a run is the same for all seeds);
        - `floor`: whether it is a trivial baseline;
        - `masking`: the steps that made its masks, whose seconds are in `steps.json`, and
          `run_masking`: those of each run;
        - `arm`, `labels` (a number, "all", or null without budgets), `stage1_steps` (null without
          stage 1), `stage2_steps` (0 for the arm without stage 2, null for baselines) and
          `mid_schedule`, whether the run went on, at a learning rate that a run of that length
          alone would not have had any more;
        - of an arm its policy: `strategy`, `scores`, `units`, `rate`, `corruption`, and `match`,
          the arm that it matches.
    """
    planner = _Planner(recipe, Path(output_dir))
    planner.build()
    return planner.steps, planner.arms


class _Planner(MaskPlan):
    """Collects the steps and the arms."""

    def __init__(self, recipe: dict[str, Any], root: Path) -> None:
        super().__init__(recipe, root)
        self.arms: list[dict[str, Any]] = []
        self.tokenizer = recipe["tokenizer"] or recipe["encoder"]
        self.budgets, self.seeds = recipe["label_budgets"], recipe["pretrain_seeds"]
        stage2 = recipe["task_guided"]
        self.end = PretrainConfig.max_steps if stage2.get("max_steps") is None \
            else stage2["max_steps"]
        self.exports = stage2.get("export_steps") or []
        self.decays = stage2.get("lr_scheduler_type") != "constant"

    def build(self) -> None:
        """Plan all steps; those that read the user's files come first, so mistakes show early."""
        recipe = self.recipe
        if recipe["floors"].get("naive_bayes"):
            self.naive_bayes()
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
            self.untrained()
        for floor in ("naive_bayes", "untrained"):
            if recipe["floors"].get(floor):
                self.note_floor(floor)
        self.add("report", "train/report.py", {}, outputs=[], records=[])
        self.steps[-1].command.extend([str(self.root), "--output_dir", str(self.root / "report")])

    # ------------------------------------------------------------------- texts and stage 1

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
        self.train(
            "stage1", "train/pretrain.py", "general", run,
            {"tokens": self.root / "general" / "text", "export_steps": exports,
             "model_name_or_path": self.recipe["encoder"]}, ["tokenize-general"],
            exported(run, exports),
        )

    def all_draws(self, budgets: Sequence[int | str] | None = None) -> list[Labels]:
        """Return all that runs of the recipe, or of some of its budgets, may read."""
        budgets = self.budgets if budgets is None else budgets
        return list(dict.fromkeys(labels for seed in self.seeds for labels in draws(budgets, seed)))

    def one_length(self, length: int | None) -> None:
        """Plan all arms behind one stage-1 model."""
        general = self.recipe["general"]
        if general is None:
            start = Start(self.root, "", self.recipe["encoder"], [], None)
        elif length is None:
            steps = general.get("max_steps")
            start = Start(self.root, "", self.root / "stage1" / "hf", ["stage1"],
                          PretrainConfig.max_steps if steps is None else steps)
        else:
            start = Start(self.root / f"step_{length}", f"-step_{length}",
                          self.root / "stage1" / f"hf_step_{length}", ["stage1"], length)
        for labels in draws(self.budgets, None):
            self.all_masks(start, labels)
        for seed in self.seeds:
            for labels in draws(self.budgets, seed):
                self.all_masks(start, labels)
            for policy in self.recipe["arms"]:
                if policy.name != NONE:
                    self.one_arm(policy, seed, start)
                elif seed == self.seeds[0]:
                    self.finetune(f"finetune-{NONE}{start.tag}", "finetune", [
                        Tuned(self.tuned(start, NONE, labels), start.model, labels)
                        for labels in self.all_draws()], start.needs)
        for policy in self.recipe["arms"]:
            self.note_arm(policy, start)

    def one_arm(self, policy: PlannedArm, seed: int, start: Start) -> None:
        """Plan stage 2 with one seed, for each budget that it depends on, and one fine-tuning."""
        stage2: dict[Labels, str] = {}
        runs = []
        for labels in draws(self.budgets, seed):
            read = self.labels_of(policy, labels)
            arm = f"{policy.name}-seed{seed}{read.word}"
            run = start.root / "task_guided" / arm
            if read not in stage2:
                stage2[read] = self.stage2(f"task_guided-{arm}{start.tag}", policy, seed, start,
                                           run, self.index(policy, start, labels))
            runs += [Tuned(self.tuned(start, policy.name, labels, seed, steps),
                           run / ("hf" if steps == self.end else f"hf_step_{steps}"), labels)
                     for steps in (*self.exports, self.end)]
        self.finetune(f"finetune-{policy.name}-seed{seed}{start.tag}", "finetune", runs,
                      list(stage2.values()))

    def stage2(self, name: str, policy: PlannedArm, seed: int, start: Start, run: Path,
               index: str) -> str:
        """Plan task-guided pre-training of an arm."""
        flags: dict[str, Any] = {"tokens": self.domain}
        if policy.drawn:
            flags |= {"masking": policy.strategy, "mlm_probability": self.drawn_rate(policy)}
        else:  # the index has its rate already
            flags |= {"mask_index": index, "mlm_probability": None}
        if policy.corruption:
            flags["corruption"] = policy.corruption
        return self.train(
            name, "train/pretrain.py", "task_guided", run,
            {**flags, "model_name_or_path": start.model, "seed": seed},
            [self.ready if policy.drawn else f"masks-{index}", *start.needs],
            exported(run, self.exports),
        )

    def tuned(self, start: Start, arm: str, labels: Labels, seed: int | None = None,
              steps: int = 0) -> Path:
        """Return the folder of a fine-tuning run.

        Args:
            seed: of stage 2; where there is none, that of the labels stands there. steps: of it.
        """
        seed = labels.seed if seed is None else seed
        name = arm if seed is None else f"{arm}-seed{seed}"
        length = f"-steps{steps}" if steps and self.exports else ""
        return start.root / "finetune" / f"{name}{labels.word}{length}"

    def drawn_rate(self, policy: PlannedArm) -> float | str | None:
        """Return the rate of masks drawn in training; None for the command's own."""
        stage, masks = (self.recipe[section].get("mlm_probability")
                        for section in ("task_guided", "masks"))
        if policy.rate is not None or stage is not None:
            return stage if policy.rate is None else policy.rate
        return None if masks == MASK_RATE else masks

    # ------------------------------------------------------------------------- for the report

    def note_arm(self, policy: PlannedArm, start: Start) -> None:
        """Note an arm after one length of stage 1, for each budget and length of stage 2."""
        length = f"@{start.steps}" if start.tag else ""
        policy_told = {
            "strategy": policy.strategy or NONE, "scores": policy.scores, "match": policy.match,
            "units": policy.rules.get("units", ""), "rate": policy.rate,
            "corruption": policy.corruption}
        for budget in self.budgets or [None]:
            budgets = [] if budget is None else [budget]
            read = self.all_draws(budgets)
            if policy.name == NONE:
                self.note(NONE, length, budget, [(self.tuned(start, NONE, one), one.seed, [])
                                                 for one in read], start.steps, 0, policy_told)
                continue
            for steps in (*self.exports, self.end):
                runs = []
                for seed in self.seeds:
                    labels = draws(budgets, seed)[0]
                    masks = self.behind_masks(f"masks-{self.index(policy, start, labels)}")
                    folder = self.tuned(start, policy.name, labels, seed, steps)
                    runs.append((folder, seed, masks))
                self.note(policy.name, length, budget, runs, start.steps, steps, policy_told)

    def note_floor(self, name: str) -> None:
        """Note a trivial baseline for each budget."""
        for budget in self.budgets or [None]:
            read = self.all_draws([] if budget is None else [budget])
            self.note(name, "", budget, [(self.floor(name, one), one.seed, []) for one in read],
                      None, None, None)

    def note(self, arm: str, length: str, budget: int | str | None,
             runs: list[tuple[Path, int | None, list[str]]], stage1: int | None,
             stage2: int | None, policy: dict[str, Any] | None) -> None:
        """Note one row of the table; a baseline has no policy."""
        name = f"{arm}{length}" + (f"/{budget} labels" if budget is not None else "") \
            + (f"/{stage2} steps" if stage2 and self.exports else "")
        self.arms.append({
            "name": name, "runs": [str(run.relative_to(self.root)) for run, _, _ in runs],
            "floor": policy is None,
            "masking": list(dict.fromkeys(step for _, _, steps in runs for step in steps)),
            **(policy or {}), "arm": arm, "labels": budget, "stage1_steps": stage1,
            "stage2_steps": stage2,
            "mid_schedule": bool(self.decays and stage2 and stage2 < self.end),
            "pretrain_seeds": [seed for _, seed, _ in runs],
            "run_masking": [steps for _, _, steps in runs],
        })

    # ------------------------------------------------------------------------------ baselines

    def floor(self, name: str, labels: Labels) -> Path:
        return self.root / "floors" / f"{name}{labels.ending}"

    def naive_bayes(self) -> None:
        """Plan a trivial baseline: word counts."""
        task = self.recipe["task"]
        limits = {name: self.recipe["finetune"].get(name)
                  for name in ("max_train_samples", "max_eval_samples")}
        runs = {self.floor("naive_bayes", labels): labels for labels in self.all_draws()}
        read = [labels.ending.removeprefix("-") for labels in runs.values() if labels.ending]
        self.steps.append(Step(
            "naive_bayes", flag_words({**task, **limits, "labels": read}),
            [pattern for run in runs for pattern in inside(run, "")],
            [pattern for run in runs
             for pattern in inside(run, "results.jsonl", "seed_0/predictions.jsonl")],
            grows=True, compute=lambda: _naive_bayes(task, limits, runs),
        ))

    def untrained(self) -> None:
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
             "max_seq_length": trained.get("max_seq_length"),
             "fit_positions": trained.get("fit_positions"), "output_dir": model},
            outputs=inside(model, ""), records=model_files(model / "hf"), launched=True,
            needs=[f"tokenize-{which}"],
        )
        first = seeds_of(recipe["finetune"]).split(",")[0]  # a baseline needs no interval
        self.finetune("finetune-untrained", "finetune", [
            Tuned(self.floor("untrained", labels), model / "hf", labels)
            for labels in self.all_draws()], [name], seeds=first)


def _naive_bayes(
    task: dict[str, Any], limits: dict[str, int | None], runs: dict[Path, Labels]
) -> None:
    """Run naive Bayes on the sentences that fine-tuning uses, for each folder of `runs`."""
    loaded = read_task(task)
    for run, labels in runs.items():
        limited = limit_labels(loaded, labels.flags.get("label_budget"), labels.seed)
        write_naive_bayes(replace(limited, splits=limit_splits(limited.splits, **limits)), run)
