"""Studies: label budgets, lengths of stage 2 and pre-training seeds in one recipe."""

from __future__ import annotations

import re
import shlex
import shutil
from collections import Counter
from pathlib import Path

import pytest

from preprocess.corpus import load_task
from preprocess.errors import ConfigError
from train import pipeline
from train.config import PipelineConfig, parse
from train.recipes import plan as plan_room
from train.recipes import run as run_room
from train.recipes.recipe import REPOSITORY, load_recipe

BASE = """
encoder: E
task: {task: mr, data_dir: D}
domain_text: {input: [d.txt]}
task_guided: {max_steps: 20}
pretrain_seeds: [1, 2]
finetune: {seeds: "13,43"}
"""
BUDGETS = "label_budgets: [100, all]\n"
LENGTHS = "task_guided: {max_steps: 20, export_steps: [5]}\n"
GENERAL = "general_text: {input: [g.txt]}\ngeneral: {max_steps: 30}\n"


def load(folder: Path, text: str, *settings: str) -> dict:
    keys = {line.partition(":")[0] for line in text.splitlines() if line[:1].strip()}
    kept = [line for line in BASE.splitlines() if line.partition(":")[0] not in keys]
    (folder / "r.yaml").write_text("\n".join(kept) + "\n" + text)
    return load_recipe(folder / "r.yaml", list(settings))


def planned(recipe: dict) -> tuple[dict[str, pipeline.Step], dict[str, dict]]:
    """The steps and the arms by name; every name is used once, and what is read is made before."""
    steps, arms = pipeline.plan(recipe, "R")
    seen: set[str] = set()
    for step in steps:
        assert set(step.needs) <= seen, step.name
        assert step.name not in seen
        seen.add(step.name)
    assert len({arm["name"] for arm in arms}) == len(arms)
    return {step.name: step for step in steps}, {arm["name"]: arm for arm in arms}


def flags(words: list[str]) -> dict[str, str]:
    """The flags of a command that take one value."""
    return {word.removeprefix("--"): value for word, value in zip(words, words[1:], strict=False)
            if word.startswith("--")}


def tuned(step: pipeline.Step) -> dict[str, tuple[str, str | None, str | None]]:
    """Model, label budget and label seed of each folder that a fine-tuning step fills."""
    words = step.command
    first, changes = flags(words), []
    if "--also" in words:
        listed = words[words.index("--also") + 1:]
        end = next((i for i, word in enumerate(listed) if word.startswith("--")), len(listed))
        changes = [dict(part.split("=", 1) for part in shlex.split(one)) for one in listed[:end]]
    typed = ("model_name_or_path", "label_budget", "label_seed", "output_dir")
    runs = [{key: first.get(key) for key in typed}, *changes]
    return {run["output_dir"]: (run["model_name_or_path"], run.get("label_budget"),
                                run.get("label_seed")) for run in runs}


def test_a_budget_limits_whatever_reads_labels_and_nothing_else(tmp_path):
    text = BUDGETS + """
scores: {words: {measure: tfidf}}
arms: [none, random, random_matched, selective, {name: keywords, strategy: top, scores: words}]
"""
    steps, arms = planned(load(tmp_path, text))
    chain = ("classifier", "annotate", "scorer", "score", "masks-selective", "masks-random_matched")
    for part in chain:
        assert [name for name in steps if name.startswith(f"{part}-labels")] == [
            f"{part}-labelsall", f"{part}-labels100-seed1", f"{part}-labels100-seed2"]
    assert "score-words" in steps and "masks-keywords" in steps
    drawn = {"label_budget": "100", "label_seed": "2"}
    for name, place in (("classifier", "R/classifier-labels100-seed2"),
                        ("annotate", "R/annotations-labels100-seed2/text")):
        typed = flags(steps[f"{name}-labels100-seed2"].command)
        assert typed.items() >= drawn.items() and place in typed.values()
        assert not drawn.keys() & flags(steps[f"{name}-labelsall"].command).keys()
    read = flags(steps["annotate-labels100-seed2"].command)["model_name_or_path"]
    assert read == "R/classifier-labels100-seed2/seed_13/hf"
    # These read what the chain made, and no labels.
    scorer = flags(steps["scorer-labels100-seed2"].command)
    assert scorer["annotations"] == "R/annotations-labels100-seed2/text"
    assert scorer["output_dir"] == "R/scorer-labels100-seed2"
    assert flags(steps["score-labels100-seed2"].command)["name"] == "task-labels100-seed2"
    masks = flags(steps["masks-random_matched-labels100-seed2"].command)
    assert masks["match"] == "selective-labels100-seed2"
    assert masks["name"] == "random_matched-labels100-seed2"
    for name in ("leakage", "scorer-labelsall", "score-labelsall", "masks-selective-labelsall",
                 "masks-selective-labels100-seed2", "scorer-labels100-seed2"):
        assert "--label_budget" not in steps[name].command

    # Stage 2: once per seed, and once more per budget where the masks follow from labels.
    stage2 = {name.removeprefix("task_guided-"): flags(step.command)
              for name, step in steps.items() if name.startswith("task_guided-")}
    assert set(stage2) == {
        *(f"{arm}-seed{seed}" for arm in ("random", "keywords") for seed in (1, 2)),
        *(f"{arm}-seed{seed}-labels{budget}" for arm in ("random_matched", "selective")
          for seed in (1, 2) for budget in (100, "all"))}
    assert stage2["selective-seed2-labels100"]["mask_index"] == "selective-labels100-seed2"
    assert stage2["selective-seed2-labelsall"]["mask_index"] == "selective-labelsall"
    assert all(typed["seed"] == name.split("seed")[1][0] for name, typed in stage2.items())
    assert all(typed["output_dir"] == f"R/task_guided/{name}" for name, typed in stage2.items())

    # Fine-tuning: one process per arm and seed, and the examples of the seed for every arm.
    assert tuned(steps["finetune-random-seed2"]) == {
        "R/finetune/random-seed2-labels100": ("R/task_guided/random-seed2/hf", "100", "2"),
        "R/finetune/random-seed2-labelsall": ("R/task_guided/random-seed2/hf", None, None)}
    model = "R/task_guided/selective-seed2-labels{}/hf"
    assert tuned(steps["finetune-selective-seed2"]) == {
        "R/finetune/selective-seed2-labels100": (model.format(100), "100", "2"),
        "R/finetune/selective-seed2-labelsall": (model.format("all"), None, None)}
    assert steps["finetune-selective-seed2"].needs == [
        "task_guided-selective-seed2-labels100", "task_guided-selective-seed2-labelsall"]
    assert tuned(steps["finetune-none"]) == {
        "R/finetune/none-labelsall": ("E", None, None),
        "R/finetune/none-seed1-labels100": ("E", "100", "1"),
        "R/finetune/none-seed2-labels100": ("E", "100", "2")}
    assert [name for name in steps if name.startswith("finetune-none")] == ["finetune-none"]

    assert arms["none/100 labels"]["runs"] == [
        "finetune/none-seed1-labels100", "finetune/none-seed2-labels100"]
    assert arms["none/100 labels"]["pretrain_seeds"] == [1, 2]
    assert arms["none/all labels"]["pretrain_seeds"] == [None]
    arm = arms["random_matched/100 labels"]
    assert {key: arm[key] for key in ("arm", "labels", "match", "stage1_steps", "stage2_steps",
                                      "mid_schedule", "pretrain_seeds", "floor")} == {
        "arm": "random_matched", "labels": 100, "match": "selective", "stage1_steps": None,
        "stage2_steps": 20, "mid_schedule": False, "pretrain_seeds": [1, 2], "floor": False}
    assert arm["run_masking"] == [[f"{part}-labels100-seed{seed}" for part in chain]
                                  for seed in (1, 2)]
    assert arm["masking"] == [step for steps in arm["run_masking"] for step in steps]
    assert arms["random_matched/all labels"]["masking"] == [f"{part}-labelsall" for part in chain]
    assert arms["keywords/100 labels"]["masking"] == ["score-words", "masks-keywords"]


@pytest.mark.parametrize(("arm", "follows"), [
    ("{name: a, strategy: top, scores: words}", False),
    ("{name: a, strategy: sampled, scores: surprise}", False),
    ("{name: a, strategy: top, scores: words, units: phrases}", False),
    ("whole_word", False),
    ("{name: a, strategy: top, scores: gradient}", True),
    ("{name: a, strategy: top, scores: both}", True),
    ("{name: a, strategy: top, scores: nested}", True),
    ("{name: a, strategy: random_matched, match: b}, {name: b, strategy: top, scores: words}",
     False),
    ("{name: a, strategy: random_matched, match: b}, {name: b, strategy: top, scores: both}", True),
    ("frequency_matched", True),  # matches the paper's policy, which is no arm here
])
def test_which_arms_follow_a_budget(tmp_path, arm, follows):
    scores = """
scores:
  words: {measure: tfidf}
  phrases: {measure: pmi}
  surprise: {measure: surprise}
  gradient: {measure: gradient}
  both: {combine: rank, of: [words, task]}
  nested: {combine: rank, of: [phrases, both]}
"""
    steps, _ = planned(load(tmp_path, f"{BUDGETS}{scores}arms: [{arm}]\n"))
    name = arm.partition(",")[0].removeprefix("{name: ")
    ran = [step for step in steps if step.startswith(f"task_guided-{name}-seed1")]
    assert ran == [f"task_guided-{name}-seed1{ending}"
                   for ending in (("-labels100", "-labelsall") if follows else ("",))]
    # Scores that read no labels are made once, whoever combines them.
    assert len([step for step in steps if step.startswith("score-words")]) <= 1
    if follows:
        assert f"masks-{name}-labels100-seed1" in steps
        assert f"masks-{name}-labels100-seed2" in steps


def test_lengths_of_stage_2_are_exports_of_one_run(tmp_path):
    text = LENGTHS + "arms: [none, random]\n"
    steps, arms = planned(load(tmp_path, text))
    run = steps["task_guided-random-seed1"]
    assert flags(run.command)["export_steps"] == "5"
    assert {Path(pattern).parent.name for pattern in run.records} == {"hf", "hf_step_5"}
    assert tuned(steps["finetune-random-seed1"]) == {
        "R/finetune/random-seed1-steps5": ("R/task_guided/random-seed1/hf_step_5", None, None),
        "R/finetune/random-seed1-steps20": ("R/task_guided/random-seed1/hf", None, None)}
    assert list(arms) == ["none", "random/5 steps", "random/20 steps"]
    assert [(arm["stage2_steps"], arm["mid_schedule"], arm["labels"]) for arm in arms.values()] == [
        (0, False, None), (5, True, None), (20, False, None)]
    assert arms["random/5 steps"]["runs"] == [f"finetune/random-seed{n}-steps5" for n in (1, 2)]
    _, arms = planned(load(tmp_path, text, "task_guided.lr_scheduler_type=constant"))
    assert not any(arm["mid_schedule"] for arm in arms.values())


def test_lengths_of_both_stages_and_budgets_go_together(tmp_path):
    text = GENERAL + BUDGETS + LENGTHS + """
export_steps: [10, 30]
arms: [none, random, selective]
floors: {naive_bayes: true, untrained: true}
"""
    steps, arms = planned(load(tmp_path, text))
    assert list(arms) == [
        *(f"{arm}@{length}/{budget} labels{steps}" for length in (10, 30)
          for arm, lengths in (("none", [""]), ("random", ["/5 steps", "/20 steps"]),
                               ("selective", ["/5 steps", "/20 steps"]))
          for budget in (100, "all") for steps in lengths),
        *(f"{floor}/{budget} labels" for floor in ("naive_bayes", "untrained")
          for budget in (100, "all"))]
    assert arms["selective@10/100 labels/5 steps"]["stage1_steps"] == 10
    for step in steps.values():  # every fine-tuned folder is one that the report is told of
        if step.name.startswith("finetune"):
            assert {f"R/{run}" for arm in arms.values() for run in arm["runs"]} >= set(tuned(step))
    told = Counter(run for arm in arms.values() for run in arm["runs"])
    assert set(told.values()) == {1}
    made = {pattern.removeprefix("R/").removesuffix("/") for step in steps.values()
            for pattern in step.outputs}
    assert set(told) <= made
    assert tuned(steps["finetune-selective-seed2-step_10"])[
        "R/step_10/finetune/selective-seed2-labels100-steps5"] == (
        "R/step_10/task_guided/selective-seed2-labels100/hf_step_5", "100", "2")
    guided = flags(steps["task_guided-selective-seed2-labels100-step_10"].command)
    assert guided["mask_index"] == "selective-labels100-seed2-step_10"
    assert guided["model_name_or_path"] == "R/stage1/hf_step_10"
    assert flags(steps["classifier-labels100-seed2-step_10"].command)["output_dir"] == \
        "R/step_10/classifier-labels100-seed2"
    # Baselines depend on neither length; their examples are those of the seeds.
    assert arms["naive_bayes/100 labels"]["runs"] == [
        f"floors/naive_bayes-labels100-seed{n}" for n in (1, 2)]
    assert arms["untrained/all labels"]["runs"] == ["floors/untrained-labelsall"]
    assert tuned(steps["finetune-untrained"])["R/floors/untrained-labels100-seed2"] == (
        "R/floors/untrained_model/hf", "100", "2")
    assert [arms["naive_bayes/100 labels"][key] for key in ("floor", "stage2_steps", "labels")] == [
        True, None, 100]


def test_naive_bayes_reads_the_labels_of_each_draw(tmp_path, labelled_files, monkeypatch):
    files = {f"{split}_file": labelled_files[split] for split in ("train", "test")}
    recipe = load(tmp_path, "label_budgets: [8, all]\narms: [none]\nfloors: {naive_bayes: true}\n")
    recipe["task"] = {"task": "custom", **files}
    seen = {}
    monkeypatch.setattr(plan_room, "write_naive_bayes", lambda task, run: seen.update(
        {run.name: [example.item for example in task.splits["train"]]}))
    pipeline.plan(recipe, tmp_path)[0][0].compute()
    assert seen == {
        f"naive_bayes-labels{'all' if budget is None else f'8-seed{seed}'}": [
            example.item for example in load_task(
                "custom", **files, label_budget=budget, label_seed=seed).splits["train"]]
        for budget, seed in ((None, None), (8, 1), (8, 2))}
    assert len(seen["naive_bayes-labels8-seed1"]) == 8
    assert seen["naive_bayes-labels8-seed1"] != seen["naive_bayes-labels8-seed2"]


def test_all_labels_alone_are_drawn_by_no_seed(tmp_path):
    steps, arms = planned(load(tmp_path, "label_budgets: [all]\narms: [none, selective]\n"))
    assert list(steps) == [
        "tokenize-domain", "leakage", "classifier-labelsall", "annotate-labelsall",
        "scorer-labelsall", "score-labelsall", "masks-selective-labelsall", "finetune-none",
        *(f"{step}-selective-seed{seed}{ending}" for seed in (1, 2)
          for step, ending in (("task_guided", "-labelsall"), ("finetune", ""))),
        "report"]
    assert not any("--label" in word or word == "--also" for step in steps.values()
                   for word in step.command)
    assert arms["selective/all labels"]["runs"] == [
        f"finetune/selective-seed{n}-labelsall" for n in (1, 2)]
    assert arms["none/all labels"]["runs"] == ["finetune/none-labelsall"]


def test_one_seed_is_complete_before_the_next(tmp_path):
    """A study that is cut short has whole comparisons."""
    steps, _ = planned(load(tmp_path, BUDGETS + "arms: [none, random, selective]\n"))
    names = list(steps)
    of_first = [i for i, name in enumerate(names) if "-seed1" in name]
    of_second = [i for i, name in enumerate(names) if "-seed2" in name]
    assert max(of_first) < min(of_second)


def test_a_folder_with_a_space_in_its_name_is_one_word(tmp_path):
    steps, _ = pipeline.plan(load(tmp_path, BUDGETS + "arms: [random]\n"), "my run's")
    step = next(step for step in steps if step.name == "finetune-random-seed1")
    assert set(tuned(step)) == {f"my run's/finetune/random-seed1-labels{b}" for b in (100, "all")}


@pytest.mark.parametrize("name", ["R", "my run"])
def test_a_study_may_be_moved(tmp_path, name):
    """The journal compares commands; those of many runs name the output folder inside words."""
    recipe = load(tmp_path, BUDGETS + "arms: [none, random]\n")
    journals = []
    for root in (tmp_path / "a" / name, tmp_path / "b c" / name):
        steps, _ = pipeline.plan(recipe, root)
        journal = pipeline.Journal(root)
        journals.append([journal.command(step) for step in steps])
        assert not any(str(tmp_path) in word for words in journals[-1] for word in words
                       if "r.yaml" not in word)
    assert [len(words) for words in journals[0]] == [len(words) for words in journals[1]]
    assert [[shlex.split(word) for word in words] for words in journals[0]] == [
        [shlex.split(word) for word in words] for words in journals[1]]


def end_all(steps: list[pipeline.Step], journal: pipeline.Journal) -> None:
    """Make the records of all steps, and note them as finished."""
    journal.root.mkdir(exist_ok=True)
    for step in steps:
        for pattern in step.records:
            path = Path(pattern.replace("*", "1"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
        if step.records:
            journal.start(step)
            journal.end(step, 1.0, success=True)
            assert journal.is_finished(step)


OF_NO_SEED = {"naive_bayes", "finetune-none", "finetune-untrained"}


@pytest.mark.parametrize(("before", "after", "new"), [
    ("label_budgets: [100]", "label_budgets: [50, 100, all]",
     {*OF_NO_SEED, "finetune-random-seed1", "finetune-random-seed2"}),
    ("pretrain_seeds: [1]\nlabel_budgets: [100]", "label_budgets: [100]", OF_NO_SEED),
    ("label_budgets: [all, 100]", "label_budgets: [100, all]", set()),
    ("finetune: {seeds: '13'}", "finetune: {seeds: '13,7'}",
     {"finetune-none", "finetune-random-seed1", "finetune-random-seed2"}),
    ("finetune: {seeds: '13'}\nlabel_budgets: [100]",
     "finetune: {seeds: '13,7'}\nlabel_budgets: [100, all]",
     {*OF_NO_SEED, "finetune-random-seed1", "finetune-random-seed2"}),
])
def test_budgets_and_seeds_may_be_added_to_a_finished_study(tmp_path, before, after, new):
    """What is there stays, and what is missing is made."""
    journal = pipeline.Journal(tmp_path / "R")
    more = "arms: [none, random]\nfloors: {naive_bayes: true, untrained: true}\n"
    steps, _ = pipeline.plan(load(tmp_path, f"{before}\n{more}"), tmp_path / "R")
    end_all(steps, journal)
    made = {step.name for step in steps if step.records}
    steps, _ = pipeline.plan(load(tmp_path, f"{after}\n{more}"), tmp_path / "R")
    assert [journal.objection(step) for step in steps] == [None] * len(steps)
    again = {step.name for step in steps if step.name in made and not journal.is_finished(step)}
    assert again == new


@pytest.mark.parametrize(("after", "complaint"), [
    ("finetune: {seeds: '13,43', weight_decay: 0.5}", "was ``, is `--weight_decay 0.5`"),
    ("finetune: {seeds: '13,7'}", "was `--seeds 13,43`, is `--seeds 13,7`"),
    ("finetune: {seeds: '13'}", "was `--seeds 13,43`, is `--seeds 13`"),
    ("encoder: F", "was `model_name_or_path=E .*none-seed1-labels100`, is `model_name_or_path=F"),
])
def test_a_run_that_would_come_out_otherwise_is_refused(tmp_path, after, complaint):
    journal = pipeline.Journal(tmp_path / "R")
    text = "label_budgets: [{}]\narms: [none]\n"
    steps, _ = pipeline.plan(load(tmp_path, text.format("100, all")), tmp_path / "R")
    end_all(steps, journal)
    steps, _ = pipeline.plan(load(tmp_path, f"{text.format(100)}{after}\n"), tmp_path / "R")
    said = journal.objection(next(step for step in steps if step.name == "finetune-none"))
    assert re.search(complaint, said), said
    # One that is not as it was written is another command, too.
    journal.steps["finetune-none"]["command"] += ["--also", "'"]
    assert "was run with another command" in journal.objection(steps[-2])


def test_cleaning_keeps_the_models_of_all_lengths(tmp_path):
    recipe = load(tmp_path, LENGTHS + "arms: [random]\n")
    steps, _ = pipeline.plan(recipe, tmp_path / "R")
    step = next(step for step in steps if step.name == "task_guided-random-seed1")
    run = tmp_path / "R" / "task_guided" / "random-seed1"
    for folder in ("hf", "hf_step_5", "checkpoints/step_20"):
        (run / folder).mkdir(parents=True)
        (run / folder / "model.safetensors").write_text("x")
        (run / folder / "lineage.json").write_text("{}")
    options = parse(PipelineConfig, ["--recipe", "x", "--output_dir", str(tmp_path / "R"),
                                     "--clean", "checkpoints"])
    journal = pipeline.Journal(tmp_path / "R")
    before = journal.digest(step)
    run_room.clean(step, options)
    assert {path.name for path in run.iterdir()} == {"hf", "hf_step_5"}
    assert journal.digest(step) == before
    shutil.rmtree(run / "hf_step_5")  # fine-tuning reads it, so the step is not finished without
    assert journal.digest(step) is None


@pytest.mark.parametrize(("text", "message"), [
    ("label_budgets: 100", "label_budgets must be a list of whole numbers and all"),
    ("label_budgets: [none]", "'none' is neither 1 or more nor all"),
    ("label_budgets: [1.5]", "1.5 is neither 1 or more nor all"),
    ("label_budgets: ['100']", "'100' is neither 1 or more nor all"),
    ("label_budgets: [true]", "True is neither 1 or more nor all"),
    ("label_budgets: [[100]]", r"\[100\] is neither 1 or more nor all"),
    ("label_budgets: [100, 0]", "0 is neither 1 or more nor all"),
    ("label_budgets: [-5]", "-5 is neither 1 or more nor all"),
    ("label_budgets: [100, all, 100]", "without repeats; got"),
    ("label_budgets: [all, all]", "without repeats; got"),
    ("label_budgets: [100]\nfinetune: {max_train_samples: 50}",
     "label_budgets and finetune.max_train_samples both limit the labelled examples; drop the "
     "latter, as with --set finetune.max_train_samples=null"),
    ("label_budgets: [100]\nclassifier: {max_train_samples: 50}", "classifier.max_train_samples"),
    ("label_budgets: [all]\nannotate: {max_train_samples: 50}", "annotate.max_train_samples"),
    ("task: {task: mr, data_dir: D, label_budget: 5}", "task has an unknown flag 'label_budget'"),
    ("finetune: {also: [x]}", "finetune has an unknown flag 'also'"),
    ("finetune: {label_seed: 3}", "finetune has an unknown flag 'label_seed'"),
    ("task_guided: {max_steps: 20, export_steps: [20]}",
     r"task_guided.export_steps \[20\]: must be different numbers above 0 and below "
     "task_guided.max_steps 20, whose model is fine-tuned anyway"),
    (GENERAL + "export_steps: [30, 31]", r"export_steps \[30, 31\]: .* 1 to general.max_steps 30"),
    (GENERAL + "export_steps: [0]", r"export_steps \[0\]: .* 1 to general.max_steps 30"),
    ("task_guided: {max_steps: 20, export_steps: [5, 30]}", r"\[5, 30\]: must be different"),
    ("task_guided: {max_steps: 20, export_steps: [5, 5]}", r"\[5, 5\]: must be different"),
    ("task_guided: {max_steps: 20, export_steps: [0]}", r"\[0\]: must be different"),
    ("task_guided: {max_steps: 20, export_steps: [half]}", "export_steps 'half': must be a whole"),
    ("task_guided: {export_steps: [5]}", "below task_guided.max_steps, which is missing; give it"),
    ("pretrain_seeds: [1, 2, 1]", "pretrain_seeds must be a list without repeats"),
    ("pretrain_seeds: [4294967296]", "whole numbers between 0 and"),
    ("finetune: {seeds: '13,13'}", "finetune.seeds '13,13': must be different whole numbers"),
    ("finetune: {seeds: [13, 43, 13]}", "must be different whole numbers separated by commas"),
    ("classifier: {seeds: '7,07'}", "classifier.seeds '7,07': must be different whole numbers"),
    ("arms: [{name: control, strategy: random_matched, match: gone}]",
     "arm control matches 'gone', which is no arm of this recipe"),
    *((f"arms: [{{name: {name}, strategy: random}}]", f"the name '{name}' must have .* not end as")
      for name in ("a-labels500", "a-labelsall", "a-steps50", "labels100", "a-seed1")),
    ("scores: {words-labels5: {measure: tfidf}}", "the name 'words-labels5' must have"),
])
def test_studies_that_cannot_be_are_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        load(tmp_path, f"{text}\n")
    assert "\n" not in str(error.value)


def test_names_that_only_look_like_an_ending_are_fine(tmp_path):
    text = "arms: [{name: labels500x, strategy: random}, {name: steps-more, strategy: span}]\n"
    assert [arm.name for arm in load(tmp_path, text)["arms"]] == ["labels500x", "steps-more"]


# --------------------------------------------------------------------------- our studies


def study(name: str, *settings: str) -> dict:
    return load_recipe(REPOSITORY / "train" / "recipes" / f"{name}.yaml", list(settings))


def test_the_study_for_a_gpu_compares_five_arms_from_fresh_weights():
    recipe = study("study_gpu")
    steps, arms = planned(recipe)
    assert {arm["arm"] for arm in arms.values() if not arm["floor"]} == {
        "none", "random", "random_matched", "frequency_matched", "selective"}
    assert {arm["labels"] for arm in arms.values()} == {500, "all"}
    assert all(len(arm["runs"]) == 3 for arm in arms.values() if arm["labels"] == 500)
    assert all(len(arm["runs"]) == 3 for arm in arms.values()
               if arm["labels"] == "all" and arm["stage2_steps"])
    assert flags(steps["stage1"].command)["model_config"] == "bert-small"
    for name in ("finetune-none", "finetune-selective-seed43"):
        typed = flags(steps[name].command)
        assert len(typed["seeds"].split(",")) == 5
        assert (typed["num_train_epochs"], typed["train_batch_size"]) == ("3", "64")
    # The text is what a user may replace, and the task is not found by it.
    recipe = study("study_gpu", "general_text=g.txt", "domain_text=d.txt", "domain_where=null")
    steps, _ = planned(recipe)
    assert flags(steps["tokenize-general"].command)["input"] == "g.txt"
    assert flags(steps["tokenize-domain"].command)["input"] == "d.txt"
    assert "--where" not in steps["tokenize-domain"].command
    assert steps["vocabulary"].command[2:4] == ["g.txt", "d.txt"]


@pytest.mark.parametrize("name", ["study_gpu", "study_cpu"])
def test_all_that_reads_the_task_has_the_same_test_part(name):
    """More than 2,000 of the 8,530 sentences, and every label but those of the budget unread."""
    recipe = study(name)
    assert recipe["task"]["test_fraction"] * 8530 > 2000
    steps, _ = planned(recipe)
    readers = [step for step in steps.values() if "--task" in step.command]
    assert {step.name.split("-")[0] for step in readers} >= {
        "leakage", "classifier", "annotate", "finetune"}
    for step in readers:
        assert flags(step.command)["test_fraction"] == "0.25", step.name
        assert "--max_train_samples" not in step.command
        assert "--max_eval_samples" not in step.command


def test_the_study_for_two_cores_starts_from_an_encoder_that_knows_english():
    steps, arms = planned(study("study_cpu"))
    assert "minilm" in flags(steps["stage1"].command)["model_name_or_path"]
    assert int(flags(steps["stage1"].command)["head_only_steps"]) > 0
    assert {(arm["arm"], arm["labels"]) for arm in arms.values() if not arm["floor"]} == {
        (arm, labels) for arm in ("none", "random", "random_matched", "selective")
        for labels in (100, 500)}
    assert all(len(arm["runs"]) >= 3 for arm in arms.values())
