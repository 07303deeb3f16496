"""Plan what chooses the masks: classifier, annotation, scorer, scores and mask indices.

Each is planned once, for whatever it depends on: the length of stage 1, and the labelled examples
that it may read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train.recipes.arms import (
    GENERAL_STORE,
    TASK_SCORES,
    NamedScores,
    PlannedArm,
    used_scores,
    with_matched,
)
from train.recipes.commands import CommandList, Start, Tuned, seeds_of
from train.recipes.labels import Labels, reads_labels
from train.recipes.steps import array_files, inside, store_files


class MaskPlan(CommandList):
    """Adds the steps up to the mask indices."""

    def __init__(self, recipe: dict[str, Any], root: Path) -> None:
        super().__init__(recipe, root)
        self.text = root / "domain" / "text"
        # What the arms are trained on: all of it, or what is left without the task's test texts.
        drop = bool(recipe["domain_text"].get("drop_leaked"))
        self.domain = root / "domain_kept" / "text" if drop else self.text
        self.ready = "leakage" if drop else "tokenize-domain"

    def all_masks(self, start: Start, labels: Labels) -> None:
        """Plan the scores and masks of all arms, for the labels that they may read."""
        built = with_matched(self.recipe["arms"])
        for name in used_scores(built, self.recipe["scores"]):
            self.scores(self.recipe["scores"][name], start, labels)
        for policy in built:
            self.masks(policy, start, labels)

    def scores(self, scores: NamedScores, start: Start, labels: Labels) -> None:
        """Plan one entry of `scores`, with all that it needs and that is not planned yet."""
        name = self.array(scores.name, start, labels)
        step = self.score_step(scores.name, start, labels)
        if self.has(step):
            return
        needs = [self.ready]
        if scores.combine:
            needs += [self.score_step(part, start, labels) for part in scores.parts]
            self.array_step(step, "preprocess/score_words.py", {
                "tokens": self.domain, "combine": scores.combine,
                "scores": [self.array(part, start, labels) for part in scores.parts],
                "name": name}, needs)
            return
        options = dict(scores.options)
        if scores.is_counted:
            if options.get("against") == GENERAL_STORE:
                options["against"] = self.root / "general" / "text"
                needs.append("tokenize-general")
            self.array_step(step, "preprocess/score_words.py", {
                "tokens": self.domain, "measure": scores.measure, **options, "name": name}, needs)
            return
        model, measure = start.model, {"measure": scores.measure}
        if "scorer" in scores.needs:  # the command's default
            measure = {}
            model = self.scorer(start, labels)
            needs.append(f"scorer{labels.ending}{start.tag}")
        elif "classifier" in scores.needs:
            model = self.classifier(start, labels)
            needs.append(f"classifier{labels.ending}{start.tag}")
        else:
            needs += start.needs
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

    def array(self, name: str, start: Start, labels: Labels) -> str:
        """Name the array of an entry of `scores`."""
        ending = labels.ending if self.recipe["scores"][name].reads_labels else ""
        return f"{name}{ending}{start.tag if self.follows_stage_1(name) else ''}"

    def score_step(self, name: str, start: Start, labels: Labels) -> str:
        """Name the step that makes an entry of `scores`."""
        array = self.array(name, start, labels)
        return f"score{array.removeprefix(name)}" if name == TASK_SCORES else f"score-{array}"

    def classifier(self, start: Start, labels: Labels) -> Path:
        """Plan the classifier of the task; return its folder."""
        run = start.root / f"classifier{labels.ending}"
        seed = seeds_of(self.recipe["classifier"]).split(",")[0]
        step = f"classifier{labels.ending}{start.tag}"
        if not self.has(step):
            self.finetune(step, "classifier", [Tuned(run, start.model, labels)], start.needs,
                          judged=inside(run, "results.jsonl"))
        return run / f"seed_{seed}" / "hf"

    def scorer(self, start: Start, labels: Labels) -> Path:
        """Plan the classifier, the annotation and the token scorer; return its folder."""
        recipe, ending = self.recipe, f"{labels.ending}{start.tag}"
        annotations = start.root / f"annotations{labels.ending}" / "text"
        run = start.root / f"scorer{labels.ending}"
        if not self.has(f"scorer{ending}"):
            model = self.classifier(start, labels)
            marks = inside(annotations.parent, "text*.importance.*")
            self.add(
                f"annotate{ending}", "train/annotate.py",
                {**recipe["annotate"], **recipe["task"], **labels.flags,
                 "model_name_or_path": model, "output": annotations},
                outputs=inside(annotations.parent, ""), launched=True,
                needs=[f"classifier{ending}"], records=[*store_files(annotations), *marks],
                judged=inside(annotations.parent, "text*.importance.json"),
            )
            self.train(
                f"scorer{ending}", "train/fit_scorer.py", "scorer", run,
                {"annotations": annotations, "model_name_or_path": start.model},
                [f"annotate{ending}", *start.needs], judged=inside(run, "results.json"),
            )
        return run / "hf"

    # ------------------------------------------------------------------------------- masks

    def labels_of(self, policy: PlannedArm, labels: Labels) -> Labels:
        """Return the labels that have gone into the masks of an arm."""
        follows = reads_labels(policy, self.recipe["arms"], self.recipe["scores"])
        return labels if follows else Labels()

    def index(self, policy: PlannedArm, start: Start, labels: Labels) -> str:
        """Name the mask index of an arm."""
        return f"{policy.name}{self.labels_of(policy, labels).ending}{start.tag}"

    def masks(self, policy: PlannedArm, start: Start, labels: Labels) -> None:
        """Plan the mask index of an arm, or one for each of its epochs."""
        name, source, needs = self.index(policy, start, labels), {}, []
        if self.has(f"masks-{name}"):
            return
        if policy.scores:
            source["scores"] = self.array(policy.scores, start, labels)
            needs.append(self.score_step(policy.scores, start, labels))
        if policy.match:
            matched = next(one for one in with_matched(self.recipe["arms"])
                           if one.name == policy.match)
            source["match"] = self.index(matched, start, labels)
            needs.append(f"masks-{source['match']}")
        options = {**self.recipe["masks"], **policy.rules}
        if policy.rate is not None:
            options["mlm_probability"] = policy.rate
        if policy.units:
            options["units"] = self.array(policy.units, start, labels)
            needs.append(self.score_step(policy.units, start, labels))
        indices = [name, *(f"{name}-epoch{n}" for n in range(1, policy.rules.get("epochs", 1)))]
        made = [found for index in indices for found in array_files(self.domain, f"{index}.mask")]
        self.add(
            f"masks-{name}", "preprocess/build_masks.py",
            {"tokens": self.domain, "strategy": policy.strategy, **source, **options, "name": name},
            outputs=made, records=made, needs=list(dict.fromkeys(needs)) or [self.ready],
        )

    def behind_masks(self, name: str) -> list[str]:
        """Name the step and all that it needs, up to general pre-training and the text."""
        for step in self.steps:
            if step.name == name:
                needs = [need for need in step.needs
                         if need not in ("stage1", "leakage") and not need.startswith("tokenize-")]
                earlier = [found for need in needs for found in self.behind_masks(need)]
                return list(dict.fromkeys([*earlier, name]))
        return []  # masks that are drawn on the fly
