"""A made-up study: the output folder of a pipeline whose answers are drawn from known chances."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.support.runs import made_up_stage, write_lineage

ARMS = {"none": 0.0, "random": 0.02, "random_matched": 0.02, "selective": 0.05}
"""Share of right answers that each arm gains by its whole stage 2."""
STRATEGIES = {"none": "none", "random": "random", "random_matched": "random_matched",
              "selective": "selective"}
LENGTHS, BUDGETS = (50, 100, 200), (100, "all")
PRETRAIN_SEEDS, FINETUNE_SEEDS = (41, 42, 43), (13, 43, 83)
NUM_LABELS = {100: 100, "all": 2000}
ITEMS = 300
START = {100: 0.66, "all": 0.76}


def write_study(root: Path, items: int = ITEMS, seed: int = 1, lengths=LENGTHS, budgets=BUDGETS,
                pretrain_seeds=PRETRAIN_SEEDS, finetune_seeds=FINETUNE_SEEDS) -> Path:
    """Write it with all files that a report reads, but without stores, weights and logs.

    Every model is right about an item with a chance that its arm, its seeds and the item decide;
    an arm gains half of its whole gain in the first half of its stage 2.
    """
    generator = np.random.default_rng(seed)
    ease = generator.normal(0, 0.25, items)  # of an item, shared by all models
    truth = (generator.random(items) < 0.4).astype(int)
    names = [f"{number:04x}" for number in generator.permutation(items)]
    arms, seconds = [], {}
    for budget in budgets:
        luck = {p: generator.normal(0, 0.01) for p in pretrain_seeds}
        for arm, gain in ARMS.items():
            own = {p: generator.normal(0, 0.006) for p in pretrain_seeds}
            for length in lengths if gain else (0,):
                runs = []
                for p in pretrain_seeds:
                    tail = f"-steps{length}" if gain and length < lengths[-1] else ""
                    run = f"finetune/{arm}-seed{p}-labels{budget}{tail}"
                    chance = (START[budget] + gain * length / lengths[-1] + luck[p]
                              + own[p] * bool(gain))
                    _write_run(root / run, generator, chance + ease, truth, names, arm, p, length,
                               NUM_LABELS[budget], finetune_seeds)
                    runs.append(run)
                masking = _masking(arm, budget, pretrain_seeds, seconds)
                arms.append({
                    "name": f"{arm}/{budget} labels" + (f"/{length} steps" if gain else ""),
                    "arm": arm, "runs": runs, "floor": False, "masking": masking,
                    "strategy": STRATEGIES[arm], "scores": "task" if arm == "selective" else "",
                    "match": "selective" if arm == "random_matched" else "", "units": "",
                    "rate": 0.15 if gain else None, "corruption": None, "labels": budget,
                    "stage1_steps": None, "stage2_steps": length,
                    "mid_schedule": 0 < length < lengths[-1],
                    "pretrain_seeds": list(pretrain_seeds),
                    "run_masking": [[step for step in masking if "-seed" not in step
                                     or step.endswith(f"-seed{p}")] for p in pretrain_seeds]})
    _write_run(root / "floors" / "naive_bayes", generator, 0.6 + ease, truth, names, "", None, 0,
               None, (0,))
    arms.append({"name": "naive_bayes", "arm": "naive_bayes", "runs": ["floors/naive_bayes"],
                 "floor": True, "masking": []})
    (root / "arms.json").write_text(json.dumps(arms))
    (root / "steps.json").write_text(json.dumps(
        {name: {"command": _work(root, name), "inputs": {}, "finished": "1", "seconds": spent}
         for name, spent in seconds.items()}))
    return root


FLOPS = {"classifier": 1e12, "annotate": 2e12, "scorer": 4e12, "score": 8e12}


def _work(root: Path, step: str) -> list[str]:
    """Write the operations of a step where its command does; return the command."""
    part = step.partition("-")[0]
    if part == "masks":
        return ["--tokens", "OUTPUT_DIR/domain/text", "--strategy", "selective", "--name", step]
    if part == "score":
        path, flags = root / "domain" / f"text.{step}.scores.json", [
            "--tokens", "OUTPUT_DIR/domain/text", "--name", step]
    elif part == "annotate":
        path, flags = root / step / "text.importance.json", ["--output", f"OUTPUT_DIR/{step}/text"]
    else:
        seed = "seed_13" if part == "classifier" else "."
        path, flags = root / step / seed / "hf" / "lineage.json", [
            "--output_dir", f"OUTPUT_DIR/{step}"]
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {"flops": FLOPS[part]}
    path.write_text(json.dumps({"stages": [{"totals": told}]} if "hf" in path.parts
                               else {"identity": {"command": step}, **told}))
    return flags


def _masking(arm: str, budget, pretrain_seeds, seconds: dict[str, float]) -> list[str]:
    """Return the steps that chose an arm's masks, and note their seconds."""
    if arm not in ("random_matched", "selective"):
        return []
    tails = [f"-labels{budget}"] if budget == "all" else [
        f"-labels{budget}-seed{p}" for p in pretrain_seeds]
    spent = {"classifier": 10.0, "annotate": 20.0, "scorer": 30.0, "score": 5.0,
             "masks-selective": 2.0, **({"masks-random_matched": 3.0}
                                        if arm == "random_matched" else {})}
    seconds.update({f"{step}{tail}": value for tail in tails for step, value in spent.items()})
    return [f"{step}{tail}" for tail in tails for step in spent]


def _write_run(path: Path, generator, chance: np.ndarray, truth: np.ndarray, names: list[str],
               arm: str, pretrain_seed, length: int, labels, finetune_seeds) -> None:
    """Write one fine-tuning directory."""
    from train.stages.scores import macro_f1

    path.mkdir(parents=True)
    stages = [made_up_stage(masking="random", steps=500, seconds=100.0, tokens=500_000,
                            masked_tokens=75_000, flops=5e12, weights="fresh")] if arm else []
    if length:
        stages.append(made_up_stage(
            masking=STRATEGIES[arm], seed=pretrain_seed, steps=length, seconds=0.5 * length,
            tokens=1000 * length, masked_tokens=150 * length, flops=1e10 * length))
    rows = []
    for seed in finetune_seeds:
        right = generator.random(len(truth)) < chance + generator.normal(0, 0.005)
        predictions = np.where(right, truth, 1 - truth)
        if stages:
            write_lineage(path / f"seed_{seed}" / "hf", *stages,
                          made_up_stage("finetune", seed=seed))
        folder = path / f"seed_{seed}"
        folder.mkdir(exist_ok=True)
        (folder / "predictions.jsonl").write_text("".join(
            json.dumps({"item": item, "label": int(label), "prediction": int(guess)}) + "\n"
            for item, label, guess in zip(names, truth, predictions, strict=True)))
        rows.append({
            "seed": seed, "task": "mr", "test_accuracy": float(right.mean()),
            "test_macro_f1": macro_f1(truth, predictions, 2), "num_test": len(truth),
            "validation_accuracy": float(right.mean()), "seconds": 4.0, "flops": 3e12,
            "labels": ["negative", "positive"], "num_validation": 100,
            "pretraining": {"steps": sum(stage["totals"]["steps"] for stage in stages),
                            "masked_tokens": 1, "seconds": 1},
            "identity": {"inputs": {"weights": f"{arm}-{pretrain_seed}-{labels}-{length}"}},
            "identity_digest": f"{path.name}-{seed}",
            **({} if labels is None else {"num_train": labels})})
    (path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "env.json").write_text(json.dumps({
        "command": "python train/finetune.py", "commit": "0123456789abcdef", "cpus": 2,
        "gpu": None, "processor": "A Processor", "memory_bytes": 2**34, "python": "3.11.7",
        "platform": "Linux", "threads": 1, "world_size": 1,
        "started": "2026-11-27T02:00:00+0000", "versions": {"torch": "2.13.0"}}))
