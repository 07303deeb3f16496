"""All stages end to end: `train/pipeline.py` with the recipe for one's own data."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from preprocess.errors import ConfigError, DataError
from preprocess.files import WriterLock
from preprocess.store import TokenStore, open_array
from tests.support.launch import launch_environment
from tests.support.pipelines import steps_as_calls
from tests.support.runs import read_csv
from train import data, pipeline
from train.data import row_tables
from train.recipes.recipe import REPOSITORY, load_recipe
from train.reports.compare import DIFFERENCE_COLUMNS, TABLE_COLUMNS
from train.run_dir import metrics

RECIPE = REPOSITORY / "train" / "recipes" / "custom.yaml"
ARMS = {"none": "none", "random_matched": "random_matched-seed42", "selective": "selective-seed42"}
SEEDS = (13, 43)
STEPS = 4
EVAL_FRACTION = 0.2
SLOTS = 32  # of a row of stage 2
MOOD_WORDS = "good great fine warm funny bad dull weak slow boring".split()
LEARN = "learning_rate=3e-3"


def settings(encoder: str, text: str, files: dict[str, str]) -> list[str]:
    """`--set` of a run in seconds; no YAML is written."""
    short = [f"{stage}.max_seq_length=32" for stage in ("classifier", "annotate", "scorer", "score",
                                                       "finetune")]
    fast = [f"{stage}.{LEARN}" for stage in ("classifier", "scorer", "finetune", "task_guided")]
    return [
        f"train_file={files['train']}", f"test_file={files['test']}", f"text={text}",
        f"validation_file={files['test']}",
        f"encoder={encoder}", "deepspeed_config=ds_configs/cpu.json", *short, *fast,
        f"general_text.input={text}", "general_text.num_workers=1", "domain_text.num_workers=1",
        f"general={{max_steps: 2, head_only_steps: 1, max_seq_length: 48, train_batch_size: 4, "
        f"eval_fraction: {EVAL_FRACTION}, learning_rate: 5e-3}}",
        "classifier.num_train_epochs=12", "classifier.train_batch_size=8",
        "annotate.drop_stop_words=false", "scorer.num_train_epochs=10", "scorer.train_batch_size=8",
        "score.dtype=fp32",  # bf16 rounds by the number of threads, of which each rank has fewer
        f"task_guided.max_steps={STEPS}", f"task_guided.max_seq_length={SLOTS}",
        "task_guided.train_batch_size=8", f"task_guided.eval_fraction={EVAL_FRACTION}",
        "task_guided.logging_steps=1", "finetune.num_train_epochs=12",
        "finetune.train_batch_size=8", f"finetune.seeds={','.join(map(str, SEEDS))}",
        "floors={naive_bayes: true, untrained: true}",
    ]


pytestmark = pytest.mark.slow  # all of them look at one run of all stages


@pytest.fixture(scope="session")
def run_pipeline(run_here, still_encoder, reviews_file, labelled_files):
    """Run the recipe into a folder; its processes are calls here, which saves their imports.

    Returns the names of the steps that ran.
    """

    def run(root: Path, *flags: str) -> list[str]:
        with steps_as_calls(run_here) as ran:
            pipeline.main([
                "--recipe", str(RECIPE), "--output_dir", str(root), "--launcher", "python",
                "--go_on", *flags, "--set", *settings(still_encoder, reviews_file, labelled_files),
            ])
        return ran

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory, run_pipeline) -> tuple[Path, list[str]]:
    """A finished run, and the steps that it took."""
    root = tmp_path_factory.mktemp("pipeline") / "run"
    return root, run_pipeline(root)


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A copy of the finished run, to spoil; an output folder may be moved."""
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def stages(folder: Path) -> list[dict]:
    return json.loads((folder / "lineage.json").read_text())["stages"]


def domain(root: Path) -> TokenStore:
    return TokenStore.open(str(root / "domain" / "text"), verify=True)


def counts_of(store: TokenStore, name: str) -> np.ndarray:
    """Masked tokens of each sequence."""
    (shard,) = store.shards
    index, _ = open_array(shard, name, "mask")
    return np.diff(np.searchsorted(index, shard.sequence_offsets))


def test_the_table_compares_the_arms_and_the_floors(finished, labelled_files):
    rows = read_csv(finished[0] / "report" / "table.csv")
    assert tuple(rows[0]) == TABLE_COLUMNS
    assert [row["arm"] for row in rows] == [
        arm for _ in ("accuracy", "macro_f1") for arm in (*ARMS, "naive_bayes", "untrained")
    ]
    by_arm = {row["arm"]: row for row in rows if row["metric"] == "accuracy"}
    for arm in ARMS:
        row = by_arm[arm]
        results = [json.loads(line) for line in
                   (finished[0] / "finetune" / ARMS[arm] / "results.jsonl").open()]
        mean = np.mean([result["test_accuracy"] for result in results])
        assert row["task"] == Path(labelled_files["train"]).parent.name
        assert row["seeds"] == str(len(SEEDS))
        assert float(row["mean"]) == pytest.approx(mean, abs=1e-4)
        assert int(row["steps"]) == (0 if arm == "none" else STEPS)
        assert float(row["low"]) < mean < float(row["high"])
    guided = {row["arm"]: row for row in read_csv(finished[0] / "report" / "stage2_runs.csv")}
    assert guided["selective"]["masked_tokens"] == guided["random_matched"]["masked_tokens"]
    assert float(guided["selective"]["epochs"]) > 0
    differences = read_csv(finished[0] / "report" / "differences.csv")
    assert tuple(differences[0]) == DIFFERENCE_COLUMNS
    assert {(row["arm"], row["against"]) for row in differences} == {
        ("random_matched", "none"), ("selective", "none"), ("selective", "random_matched")}


def test_what_an_arm_cost_is_recorded(finished):
    root, _ = finished
    listed = {arm["name"]: arm["masking"] for arm in json.loads((root / "arms.json").read_text())}
    chain = ["classifier", "annotate", "scorer", "score", "masks-selective"]
    assert listed["none"] == listed["naive_bayes"] == []
    assert listed["selective"] == chain
    assert listed["random_matched"] == [*chain, "masks-random_matched"]
    steps = json.loads((root / "steps.json").read_text())
    costs = {row["arm"]: row for row in read_csv(root / "report" / "costs.csv")}
    assert float(costs["selective"]["masking"]) == pytest.approx(
        sum(steps[name]["seconds"] for name in chain), abs=0.51)
    assert costs["none"]["masking"] == "0" and float(costs["selective"]["total"]) > 0


def test_arms_of_shared_scores_are_added_to_a_finished_run(copy, run_pipeline, capsys):
    """Scores are made once; the control and the arm that it matches may come in any order."""
    ran = run_pipeline(
        copy, "--set", "scores={words: {measure: tfidf}, both: {combine: rank, of: [task, words]}}",
        "arms=[none, {name: control, strategy: inverse, match: best}, "
        "{name: best, strategy: top, scores: words, units: words}, "
        "{name: mixed, strategy: sampled, scores: both, epochs: 2}]")
    assert [name for name in ran if name.startswith(("score", "masks"))] == [
        "score-words", "score-both", "masks-best", "masks-control", "masks-mixed"]
    store = domain(copy)
    assert (counts_of(store, "best") == counts_of(store, "control")).all()
    first, second = (open_array(store.shards[0], name, "mask")[0]
                     for name in ("mixed", "mixed-epoch1"))
    assert not np.array_equal(first, second)
    rows = {row["arm"]: row for row in read_csv(copy / "report" / "table.csv")}
    assert [rows["best"][key] for key in ("strategy", "scores")] == ["top", "words"]
    told = {row["arm"]: row for row in read_csv(copy / "report" / "arms.csv")}
    assert told["best"]["units"] == "words"
    shared = {row["step"]: row["arms"] for row in read_csv(copy / "report" / "masking.csv")}
    assert shared["score-words"] == "control, best, mixed"
    assert "leakage: of " in capsys.readouterr().out


def test_every_arm_answered_the_same_test_sentences(finished, labelled_files):
    with open(labelled_files["test"], newline="") as file:
        expected = Counter(row["label"] for row in csv.DictReader(file))
    for arm in ARMS.values():
        for seed in SEEDS:
            path = finished[0] / "finetune" / arm / f"seed_{seed}" / "predictions.jsonl"
            rows = [json.loads(line) for line in path.open()]
            items = [(row["item"], row["label"]) for row in rows]
            assert Counter(("neg", "pos")[label] for _, label in items) == expected
            if (arm, seed) == ("none", SEEDS[0]):
                first = items
            assert items == first
            probabilities = np.array([row["probabilities"] for row in rows])
            assert (probabilities.argmax(1) == [row["prediction"] for row in rows]).all()


def test_every_step_left_something_whole(finished):
    root, ran = finished
    steps, _ = pipeline.plan(load_recipe(RECIPE, [
        "train_file=a", "test_file=b", "text=c", "encoder=d", "floors.untrained=true",
        "general={max_steps: 1}", "general_text.input=e",
        f"finetune.seeds={','.join(map(str, SEEDS))}",
    ]), root)
    assert ran == [step.name for step in steps if not step.compute]
    journal = pipeline.Journal(root)
    assert [step.name for step in steps if not journal.is_finished(step)] == ["report"]
    for folder in (root / "stage1", root / "scorer", root / "task_guided" / ARMS["selective"]):
        for name in ("config.resolved.yaml", "ds_config.resolved.json", "env.json",
                     "metrics.jsonl", "hf/config.json", "hf/README.md", "hf/tokenizer.json"):
            assert (folder / name).is_file(), folder / name
    left = [path for path in root.rglob("*") if path.name.endswith(".tmp") or ".tmp." in path.name]
    assert not left
    logged = (root / "steps.json").read_text()
    assert set(json.loads(logged)) == {step.name for step in steps}


def test_lineage_tells_the_stages_in_order(finished):
    root = finished[0]
    told = {arm: stages(root / "finetune" / ARMS[arm] / "seed_13" / "hf") for arm in ARMS}
    assert [stage["stage"] for stage in told["none"]] == ["pretrain", "finetune"]
    for arm in ("random_matched", "selective"):
        general, guided, finetuned = told[arm]
        assert general == told["none"][0]
        assert general["identity"]["choice"]["masking"] == "random"
        assert guided["identity"]["choice"]["masking"] == guided["masks"]["strategy"] == arm
        assert guided["masks"]["index"] == arm
        assert str(guided["masks"]["scores"]).startswith("task ") == (arm == "selective")
        assert guided["identity"]["inputs"]["store"] == domain(root).fingerprint
        assert guided["totals"]["steps"] == STEPS and guided["totals"]["masked_tokens"] > 0
        assert finetuned["stage"] == "finetune"
    assert [stage["stage"] for stage in stages(root / "scorer" / "hf")] == [
        "pretrain", "fit_scorer"]


def test_selective_masks_what_matters_and_the_control_as_many_tokens(
    finished, tiny_tokenizer, reviews_file
):
    mood_ids = tiny_tokenizer.convert_tokens_to_ids(MOOD_WORDS)
    root = finished[0]
    store = domain(root)
    assert store.num_documents == len(Path(reviews_file).read_text().splitlines())
    selective, control = (counts_of(store, name) for name in ("selective", "random_matched"))
    assert selective.sum() > 0
    assert (selective == control).all()
    lengths = np.diff(store.shards[0].sequence_offsets)
    assert (selective <= np.maximum(1, np.floor(0.15 * lengths))).all()
    first, second = (open_array(store.shards[0], name, "mask")[0]
                     for name in ("selective", "random_matched"))
    assert not np.array_equal(first, second)
    moods = np.isin(store.shards[0].tokens, mood_ids)
    # The labels of this task hang on ten words. They are what selective masking is for.
    assert moods[first].mean() > 2 * max(moods[second].mean(), moods.mean())
    scores, _ = open_array(store.shards[0], "task", "scores")
    assert (scores[first] > 0).all()
    seen = [stages(root / "task_guided" / ARMS[arm] / "hf")[-1]
            for arm in ("selective", "random_matched")]
    for key in ("masked_tokens", "tokens", "steps"):
        assert seen[0]["totals"][key] == seen[1]["totals"][key], key
    assert seen[0]["identity"]["train"] == seen[1]["identity"]["train"]


def test_the_held_out_loss_is_that_of_held_out_documents(finished):
    """The published code evaluated on its last training batch instead."""
    from transformers import AutoModelForMaskedLM

    root = finished[0]
    run = root / "task_guided" / ARMS["selective"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [line[metrics.EVAL_LOSS] for line in lines if metrics.EVAL_LOSS in line]
    assert len(logged) == 2 and logged[0] != logged[1]
    store = domain(root)
    _, held = row_tables(store, SLOTS, EVAL_FRACTION)
    masking = data.drawn_masking(store, "random", data.EVAL_RATE)
    batches = data.PackedData(store, held, masking, seed=data.EVAL_SEED, micro_batch_size=1)
    for folder, expected in ((root / "stage1", logged[0]), (run, logged[1])):
        model = AutoModelForMaskedLM.from_pretrained(folder / "hf").eval()
        losses = []
        for batch in batches.in_order(held.num_rows):
            owner, ids = batch.document_ids.flatten(), batch.input_ids.flatten()
            labels = torch.full_like(ids, -100)
            valid = batch.masked_positions >= 0
            labels[batch.masked_positions[valid]] = batch.masked_labels[valid]
            for piece in (owner == number for number in owner.unique() if number >= 0):
                with torch.no_grad():  # each piece alone, by transformers' own forward pass
                    logits = model(ids[piece][None]).logits[0]
                keep = labels[piece] >= 0
                losses.append(torch.nn.functional.cross_entropy(
                    logits[keep], labels[piece][keep], reduction="none"))
        assert torch.cat(losses).mean().item() == pytest.approx(expected, rel=1e-4)


def test_a_second_run_only_reports(finished, run_pipeline, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished[0].rglob("*.safetensors")}
    assert run_pipeline(finished[0]) == ["report"]
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert "where to look next" in capsys.readouterr().out.lower()


def test_one_pipeline_a_folder(copy, run_pipeline, monkeypatch):
    monkeypatch.setattr(pipeline, "WAIT_SECONDS", 0.0)
    with WriterLock(f"{copy}/"), pytest.raises(ConfigError, match="another process writes here"):
        run_pipeline(copy)
    run_pipeline(copy, "--dry_run", "--no_measure")


def test_a_lost_artefact_is_made_again(copy, run_pipeline):
    """What reads it stays, since it comes out the same; what then differs is refused."""
    weights = load_file(copy / "task_guided" / ARMS["selective"] / "hf" / "model.safetensors")
    lost = copy / "finetune" / ARMS["selective"] / "seed_43" / "predictions.jsonl"
    lost.unlink()
    assert run_pipeline(copy) == ["finetune-selective-seed42", "report"]
    assert lost.is_file()
    shutil.rmtree(copy / "finetune" / "none" / "seed_13")
    assert run_pipeline(copy) == ["finetune-none", "report"]
    shutil.rmtree(copy / "task_guided" / ARMS["selective"] / "hf")
    (copy / "domain" / "text.selective.mask.json").unlink()
    assert run_pipeline(copy) == ["masks-selective", "task_guided-selective-seed42", "report"]
    again = load_file(copy / "task_guided" / ARMS["selective"] / "hf" / "model.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    with pytest.raises(ConfigError, match="finetune-none was run with another command"):
        run_pipeline(copy, "--set", "finetune.weight_decay=0.02")
    (copy / "domain" / "text.task.scores.json").write_text("{}")
    with pytest.raises(DataError, match="text.task.scores"):
        run_pipeline(copy)


@pytest.mark.slow
def test_real_processes_under_the_launcher(
    tmp_path, run_command_line, still_encoder, reviews_file, labelled_files
):
    """The same driver with its processes, on two ranks, through the launcher."""
    done = run_command_line(
        "train/pipeline.py", "--recipe", RECIPE, "--output_dir", tmp_path / "run",
        "--num_gpus", "2", "--set", *settings(still_encoder, reviews_file, labelled_files),
        "arms=[none]", "general=null", "floors={naive_bayes: true}", "finetune.seeds='13'",
    )
    assert "[2/3] finetune-none" in done.stdout and "deepspeed --num_gpus 2" in done.stdout
    rows = read_csv(tmp_path / "run" / "report" / "table.csv")
    assert {row["arm"] for row in rows} == {"none", "naive_bayes"}
    log = (tmp_path / "run" / "logs" / "02-finetune-none.log").read_text()
    assert "seed 13: test accuracy" in log


@pytest.mark.slow
def test_a_recipe_on_two_nodes_started_by_hand(
    tmp_path, still_encoder, reviews_file, labelled_files
):
    """The same command on two addresses of this machine, one rank on each; then once more."""
    root, hosts = tmp_path / "run", tmp_path / "hosts"
    hosts.write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    command = [
        sys.executable, "train/pipeline.py", "--recipe", RECIPE, "--output_dir", root,
        "--hostfile", hosts, "--no_ssh", "--go_on", "--set",
        *settings(still_encoder, reviews_file, labelled_files), "arms=[selective]", "general=null",
        "floors={naive_bayes: true}", "finetune.seeds='13'", "--node_rank",
    ]

    def on_both_nodes() -> list[str]:
        processes = [subprocess.Popen(
            [*map(str, command), rank], cwd=REPOSITORY, env=launch_environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for rank in "01"]
        said = [process.communicate(timeout=500)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], said
        return said

    first, second = on_both_nodes()
    launched = ["classifier", "annotate", "scorer", "score", "task_guided-selective-seed42",
                "finetune-selective-seed42"]
    alone = ["tokenize-domain", "leakage", "masks-selective", "naive_bayes", "report"]
    for name in launched:
        assert f"] {name}\n" in first and f"] {name}\n" in second
        assert list(root.glob(f"logs/*-{name}.node1.log"))
    assert not any(f"] {name}\n" in second for name in alone)
    for run in ("classifier", "scorer", "task_guided/selective-seed42"):
        assert json.loads((root / run / "env.json").read_text())["world_size"] == 2
    assert {row["arm"] for row in read_csv(root / "report" / "table.csv")} == {
        "selective", "naive_bayes"}
    first, second = on_both_nodes()
    assert first.count("finished, skipped") == len(launched) + len(alone) - 1
    assert not any(f"] {name}" in second for name in [*launched, *alone])


RANKS = """
import importlib, json, sys
import train.engine, train.finetune, train.fit_scorer
for module in (train.engine, train.finetune, train.fit_scorer):
    module.finish, last = (lambda: None), module.finish
for script, *flags in json.load(open(sys.argv[-1])):
    importlib.import_module(script).main(flags)
last()
"""


@pytest.mark.slow
def test_two_ranks_do_what_one_does(
    finished, tmp_path, run_command_line, reviews_file, labelled_files
):
    """Fine-tuning, annotation, the scorer and the scores, in one launch."""
    root, ranks = finished[0], tmp_path / "ranks"
    ranks.mkdir()
    shutil.copytree(root / "domain", ranks / "domain")
    commands = []
    for step in ("classifier", "annotate", "scorer", "score"):
        made_with = json.loads((root / "steps.json").read_text())[step]["command"]
        words = [word.replace("OUTPUT_DIR", str(ranks)) for word in made_with]
        if words[0] == "--deepspeed_config":
            words = words[2:]  # the digest of its content
        for name in ("model_name_or_path", "annotations"):  # what they read is that of one rank
            if f"--{name}" in words:
                at = words.index(f"--{name}") + 1
                words[at] = words[at].replace(str(ranks), str(root))
        if step == "score":
            words[words.index("--name") + 1] = "ranks"
        script = {"classifier": "finetune", "annotate": "annotate", "scorer": "fit_scorer",
                  "score": "score_tokens"}[step]
        commands.append([f"train.{script}", *words])
    (tmp_path / "driver.py").write_text(RANKS)
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    run_command_line(tmp_path / "driver.py", tmp_path / "commands.json", ranks=2)

    stores = [TokenStore.open(str(folder / "annotations" / "text")) for folder in (root, ranks)]
    marks = [open_array(store.shards[0], "", "importance")[0] for store in stores]
    np.testing.assert_array_equal(*marks)
    scores = [open_array(domain(ranks).shards[0], name, "scores")[0].astype(np.float64)
              for name in ("task", "ranks")]
    np.testing.assert_allclose(*scores, rtol=2e-3, atol=2e-3)  # stored in fp16
    rows = [json.loads((folder / "classifier" / "results.jsonl").read_text().splitlines()[0])
            for folder in (root, ranks)]
    results = [json.loads((folder / "scorer" / "results.json").read_text())
               for folder in (root, ranks)]
    for one, two in (rows, results):
        for key in one.keys() - {"seconds", "annotations", "numerics"}:
            assert one[key] == (pytest.approx(two[key]) if isinstance(two[key], float)
                                else two[key]), key
    for folder in ("classifier/seed_42/hf", "scorer/hf"):
        one, two = (load_file(place / folder / "model.safetensors") for place in (root, ranks))
        for name in one:
            # Adam turns rounding of the smallest gradients into a share of the rate.
            torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=5e-5)
