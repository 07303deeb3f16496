"""A study from end to end: budgets, seeds and lengths of stage 2, on tiny models."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path

import pytest

from preprocess.errors import ConfigError
from preprocess.store import TokenStore
from tests.support.pipelines import steps_as_calls
from train import pipeline
from train.recipes.recipe import REPOSITORY
from train.run_dir.hf_folder import open_weights

RECIPE = REPOSITORY / "train" / "recipes" / "custom.yaml"
BUDGETS, SEEDS, LENGTHS, TUNED_SEEDS = (8, 16), (1, 2), (2, 4), (13, 43)
ARMS = ("none", "random", "random_matched", "selective")

pytestmark = pytest.mark.slow  # all of them look at one study


def settings(encoder: str, text: str, files: dict[str, str]) -> list[str]:
    """`--set` of a study in seconds."""
    stages = ("classifier", "annotate", "scorer", "score", "finetune")
    return [
        f"train_file={files['train']}", f"test_file={files['test']}", f"text={text}",
        f"validation_file={files['test']}", f"encoder={encoder}",
        "deepspeed_config=ds_configs/cpu.json", "domain_text.num_workers=1",
        *(f"{stage}.max_seq_length=32" for stage in (*stages, "task_guided")),
        *(f"{stage}.learning_rate=3e-3" for stage in ("classifier", "scorer", "finetune")),
        *(f"{stage}.train_batch_size=8" for stage in ("classifier", "scorer", "task_guided",
                                                     "finetune")),
        "classifier.num_train_epochs=4", "annotate.drop_stop_words=false",
        "scorer.num_train_epochs=2", "finetune.num_train_epochs=1",
        f"finetune.seeds={','.join(map(str, TUNED_SEEDS))}",
        f"task_guided.max_steps={LENGTHS[-1]}", f"task_guided.export_steps={LENGTHS[0]}",
        f"arms=[{', '.join(ARMS)}]", f"pretrain_seeds={list(SEEDS)}",
        f"label_budgets={list(BUDGETS)}",
    ]


@pytest.fixture(scope="session")
def run_study(run_here, still_encoder, reviews_file, labelled_files):
    """Run the study into a folder; its processes are calls here. Returns the steps that ran."""

    def run(root: Path, *changes: str) -> list[str]:
        with steps_as_calls(run_here) as ran:
            pipeline.main([
                "--recipe", str(RECIPE), "--output_dir", str(root), "--launcher", "python",
                "--go_on", "--clean", "checkpoints", "--set",
                *settings(still_encoder, reviews_file, labelled_files), *changes])
        return ran

    return run


@pytest.fixture(scope="session")
def study(tmp_path_factory, run_study) -> tuple[Path, list[str]]:
    root = tmp_path_factory.mktemp("study") / "run"
    return root, run_study(root)


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]


def listed(root: Path) -> list[dict]:
    return json.loads((root / "arms.json").read_text())


def test_every_row_of_the_table_was_run(study):
    root, _ = study
    arms = listed(root)
    assert {(arm["arm"], arm["labels"], arm["stage2_steps"]) for arm in arms} == {
        *(("none", budget, 0) for budget in BUDGETS),
        *((arm, budget, steps) for arm in ARMS[1:] for budget in BUDGETS for steps in LENGTHS),
        *(("naive_bayes", budget, None) for budget in BUDGETS)}
    for arm in arms:
        assert arm["pretrain_seeds"] == list(SEEDS)
        for run in arm["runs"]:
            seeds = [row["seed"] for row in rows_of(root / run)]
            assert seeds == ([0] if arm["floor"] else list(TUNED_SEEDS)), run


def test_runs_of_a_seed_and_budget_saw_the_same_labels(study):
    """And those of another seed saw others: the identity holds a digest of all items."""
    root, _ = study
    seen, limits = defaultdict(set), defaultdict(set)
    for arm in listed(root):
        for run, seed in zip(arm["runs"], arm["pretrain_seeds"], strict=True):
            for row in rows_of(root / run) if not arm["floor"] else ():
                identity = row["identity"]
                seen[arm["labels"], seed].add(identity["inputs"]["task"])
                limits[arm["labels"], seed].add(identity["split"]["labels"])
    assert all(len(digests) == 1 for digests in seen.values())
    assert len({digest for digests in seen.values() for digest in digests}) == len(seen) == 4
    assert limits == {(budget, seed): {budget} for budget in BUDGETS for seed in SEEDS}
    for (budget, seed), digests in seen.items():
        (row,) = rows_of(root / f"classifier-labels{budget}-seed{seed}")
        assert {row["identity"]["inputs"]["task"]} == digests


def test_masks_come_from_no_more_labels_than_the_budget(study):
    root, _ = study
    for budget in BUDGETS:
        texts = []
        for seed in SEEDS:
            name = f"labels{budget}-seed{seed}"
            (row,) = rows_of(root / f"classifier-{name}")
            assert row["identity"]["split"]["labels"] == budget
            store = TokenStore.open(str(root / f"annotations-{name}" / "text"))
            assert store.num_documents <= budget  # equal texts are one
            texts.append(store.shards[0].tokens.tobytes())
            told = json.loads((root / "domain" / f"text.task-{name}.scores.json").read_text())
            assert told["name"] == f"task-{name}" if "name" in told else True
            for arm in ("selective", "random_matched"):
                assert (root / "domain" / f"text.{arm}-{name}.mask.npy").is_file()
        assert texts[0] != texts[1]


def test_stage_2_is_run_once_for_whatever_it_depends_on(study):
    root, ran = study
    stage2 = [name.removeprefix("task_guided-") for name in ran if name.startswith("task_guided")]
    assert sorted(stage2) == sorted([
        *(f"random-seed{seed}" for seed in SEEDS),
        *(f"{arm}-seed{seed}-labels{budget}" for arm in ARMS[2:] for seed in SEEDS
          for budget in BUDGETS)])
    assert len([name for name in ran if name.startswith("finetune")]) == 1 + 3 * len(SEEDS)

    def start(run: str) -> set[str]:
        return {row["identity"]["inputs"]["weights"] for row in rows_of(root / "finetune" / run)}

    for steps, folder in zip(LENGTHS, ("hf_step_2", "hf"), strict=True):
        for budget in BUDGETS:
            shared = open_weights(str(root / "task_guided" / "random-seed1" / folder))
            assert start(f"random-seed1-labels{budget}-steps{steps}") == {shared.hf_digest}
            own = open_weights(str(
                root / "task_guided" / f"selective-seed2-labels{budget}" / folder))
            assert start(f"selective-seed2-labels{budget}-steps{steps}") == {own.hf_digest}
    assert not list(root.rglob("checkpoints"))
    assert start("none-seed1-labels8") == start("none-seed2-labels16")
    told = [stage["totals"]["steps"] for stage in own.stages]
    assert told == [LENGTHS[-1]]


def test_a_finished_study_only_reports(study, run_study):
    assert run_study(study[0]) == ["report"]
    assert run_study(study[0], "finetune.seeds='13, 43'") == ["report"]


def test_more_fine_tuning_seeds_train_only_what_is_missing(study, run_study, tmp_path):
    root = tmp_path / "grown"
    shutil.copytree(study[0], root)
    trained = sorted(root.rglob("finetune/*/seed_*/hf/*.safetensors"))
    before = {path: path.stat().st_mtime_ns for path in trained}
    ran = run_study(root, "finetune.seeds=13,43,83")
    assert {name.partition("-")[0] for name in ran} == {"finetune", "report"}
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    tables = [arm for arm in listed(root) if not arm["floor"]]
    for run in (run for arm in tables for run in arm["runs"]):
        assert [row["seed"] for row in rows_of(root / run)] == [*TUNED_SEEDS, 83]
    with pytest.raises(ConfigError, match="was `--seeds 13,43,83`, is `--seeds 13,43`"):
        run_study(root)


@pytest.mark.parametrize(("budget", "message"), [
    (10_000, "label_budgets: --label_budget 10000: .*60 training examples"),
    (1, "label_budgets: --label_budget 1: .*2 classes"),
    (60, "label_budgets: 60 and all are the same examples of task .*; leave one of them out"),
])
def test_budgets_that_the_task_cannot_fill_are_refused_at_once(
    run_study, tmp_path, budget, message
):
    with pytest.raises(ConfigError, match=message):
        run_study(tmp_path / "run", f"label_budgets=[8, {budget}, all]")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting, message", [
    ("finetune.metric=macro_f1", "step finetune-none: --metric macro_f1 is of --epoch best"),
    ("classifier.early_stopping=2", "step classifier-labels8-seed1: --early_stopping 2 is of"),
])
def test_options_that_contradict_each_other_are_refused_at_once(
    run_study, tmp_path, setting, message
):
    with pytest.raises(ConfigError, match=message):
        run_study(tmp_path / "run", setting)
    assert not (tmp_path / "run").exists()
