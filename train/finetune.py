"""Fine-tune a classifier: stage 3, and the task classifier of stage 2.

Each seed trains one model. The epoch with the best validation accuracy (the first of equals) is
kept. Only that model is tested, once, after it was read back from its `hf/` folder. All arms of a
comparison share seeds: the seed alone determines the head, the order and the dropout.

    deepspeed train/finetune.py --deepspeed_config ds_configs/cpu.json --task mr --data_dir D \
        --model_name_or_path R2/hf --seeds 13,43,83 --output_dir R3

writes `R3/results.jsonl` (one row per seed) and `R3/seed_N/{hf/, predictions.jsonl, tb/}`. A seed
that has both its row and its folder is finished and is not trained again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preprocess.corpus import Example, Task, load_task, take_fixed
from preprocess.errors import DataError, run_command, visible
from preprocess.files import write_json_lines
from preprocess.identity import compare, digest, sealed
from preprocess.progress import say
from preprocess.text.encode import prepare_backend
from train.config import FinetuneConfig, parse
from train.engine import Resolved, barrier, finish, gather_objects, is_main, start
from train.model import (
    check_agreement,
    describe_head,
    fit_row_length,
    load_classifier,
    load_config,
    load_tokenizer,
)
from train.reports.results import number, read_json_lines, read_predictions
from train.run_dir.checkpoint import check_identity, find_checkpoint
from train.run_dir.folder import check_run_dir, prepare_run_dir, sole_writer
from train.run_dir.hf_folder import Weights, is_whole, open_weights
from train.run_dir.identity import (
    hyperparameters,
    numerics,
)
from train.run_dir.metrics import (
    EVAL_ACCURACY,
    EVAL_LOSS,
    EVAL_MACRO_F1,
    TEST_ACCURACY,
    TEST_MACRO_F1,
    MetricsWriter,
)
from train.stages.examples import Examples, make_examples
from train.stages.scores import accuracy, least_share, macro_f1, softmax
from train.stages.startup import Startup
from train.stages.supervised import (
    describe_plan,
    fit,
    make_identity,
    predict,
    remove_resume_state,
    resolve,
)

SPLITS = ("train", "validation", "test")
DEFAULT_LEARNING_RATE = 2e-5
TAGS = {"loss": EVAL_LOSS, "accuracy": EVAL_ACCURACY, "macro_f1": EVAL_MACRO_F1}


def encode(
    tokenizer: Any, examples: list[Example], max_seq_length: int, segments: bool
) -> Examples:
    """Turn a split into `[CLS] text [SEP]` or `[CLS] aspect [SEP] text [SEP]`.

    The input is cut to `max_seq_length`, always from its longer part, so that an aspect never
    exceeds the limit. A special token written in a text is text (`prepare_backend`).

    Args:
        segments: whether the model distinguishes the two parts by token types.
    """
    texts = [example.text for example in examples]
    aspects = [example.aspect or "" for example in examples]
    parts = (aspects, texts) if any(aspects) else (texts,)
    backend = prepare_backend(tokenizer)
    backend.enable_truncation(max_seq_length, strategy="longest_first")
    encoded = backend.encode_batch(texts if len(parts) == 1 else list(zip(*parts, strict=True)))
    labels = [example.label for example in examples]
    return make_examples(
        [one.ids for one in encoded], [one.type_ids for one in encoded] if segments else None,
        labels, [1.0] * (max(labels) + 1),
    )


@dataclass(frozen=True)
class FinetuneInputs:
    """Everything read and checked before a process group starts.

    splits, encoded: by the names in `SPLITS`. parent: the weights that every seed starts from.
    identities: the record of each seed. numerics: that of all. head: a sentence about the head.
    """

    config: FinetuneConfig
    task: Task
    splits: dict[str, list[Example]]
    encoded: dict[str, Examples]
    tokenizer: Any
    resolved: Resolved
    parent: Weights
    identities: dict[int, dict[str, Any]]
    numerics: dict[str, Any]
    head: str

    @property
    def pretraining(self) -> list[dict[str, Any]]:
        """Return the stages of pre-training behind the weights, oldest first."""
        return [stage for stage in self.parent.stages if stage["stage"] == "pretrain"]


def read_inputs(config: FinetuneConfig) -> FinetuneInputs:
    """Read the task, the tokenizer and the weights, encode the splits, settle the JSON."""
    task = load_task(config.task, **config.task_files())
    limits = {"train": config.max_train_samples}
    splits = {
        name: take_fixed(task.splits[name], limits.get(name, config.max_eval_samples))
        for name in SPLITS
    }
    hf_config = load_config(config.model_name_or_path, config.trust_remote_code)
    tokenizer = load_tokenizer(config.model_name_or_path, config.trust_remote_code)
    check_agreement(
        hf_config, tokenizer, config.model_name_or_path,
        pair=any(example.aspect for examples in splits.values() for example in examples),
    )
    config = fit_row_length(hf_config, config)
    segments = getattr(hf_config, "type_vocab_size", 0) > 1
    encoded = {
        name: encode(tokenizer, examples, config.max_seq_length, segments)
        for name, examples in splits.items()
    }
    resolved = resolve(config, encoded["train"], DEFAULT_LEARNING_RATE)
    parent = open_weights(config.model_name_or_path)
    content = digest([
        task.name, task.labels,
        [[[e.item, e.label] for e in splits[name]] for name in SPLITS],
        # Of the texts and of the tokenizer that read them.
        [[ids.tolist() for ids in encoded[name].input_ids] for name in SPLITS],
    ])
    identities = {
        seed: make_identity(
            "finetune", config, resolved, hf_config, encoded["train"], seed=seed,
            inputs={"task": content, "weights": parent.hf_digest},
            split={"labels": len(splits["train"]),
                   "test_items": digest([e.item for e in splits["test"]])},
            options={"max_eval_samples": config.max_eval_samples},
        )
        for seed in config.seed_list()
    }
    head = describe_head(hf_config, "ForSequenceClassification", task.labels)
    return FinetuneInputs(config, task, splits, encoded, tokenizer, resolved, parent, identities,
                          numerics(config, resolved), head)


def find_finished(run_dir: Path, seeds: list[int], rows: dict[int, dict[str, Any]]) -> set[int]:
    """Return the seeds that have their row and the model that it tells of.

    Raises:
        DataError: the model of a row is damaged, and there is no checkpoint to export it from.
    """
    finished = set()
    for seed in seeds:
        seed_dir = run_dir / f"seed_{seed}"
        if seed in rows and not seed_dir.exists():
            say(f"seed {seed}: has a row and no {seed_dir}; trained again")
        elif seed in rows and is_whole(seed_dir, f"delete {seed_dir} to train this seed again"):
            finished.add(seed)
    return finished


def has_predictions(seed_dir: Path, row: dict[str, Any]) -> bool:
    """Return whether the predictions of a seed are there, and give the accuracy of its row."""
    found = read_predictions(seed_dir / "predictions.jsonl", [])
    return (found is not None and len(found[1]) == row.get("num_test") != 0
            and math.isclose(np.mean(found[1]), row["test_accuracy"], abs_tol=1e-9))


def find_weak(labels: np.ndarray, predictions: np.ndarray) -> list[str]:
    """Say whether a classifier is not clearly above the majority class of the test split."""
    total, right = len(labels), int((labels == predictions).sum())
    majority = float(np.bincount(labels).max() / total)
    least = least_share(right, total)
    if least > majority:
        return []
    return [f"test accuracy {right / total:.4f} on {total:,} examples is not clearly above "
            f"{majority:.4f}, that of always giving the most frequent label (with 95 % confidence "
            f"it is {least:.4f} or more); train longer, with another --learning_rate or on more "
            "labels"]


def test_seed(inputs: FinetuneInputs, seed: int, device: torch.device) -> dict[str, Any]:
    """Read a seed's model back from disk, predict the test split and write the predictions."""
    config, task, test = inputs.config, inputs.task, inputs.encoded["test"]
    seed_dir = Path(config.output_dir) / f"seed_{seed}"
    model = load_classifier(str(seed_dir / "hf"), task.labels, seed, trained=True)
    model = model.to(device).eval()
    logits = np.stack(predict(
        model, test, inputs.tokenizer.pad_token_id, config.per_device_eval_batch_size, device,
        label="test", part=False,
    ))
    labels, predictions = np.stack(test.targets), logits.argmax(1)
    if is_main():
        rows = [
            {"item": example.item, "label": int(label), "prediction": int(prediction),
             "probabilities": [round(float(p), 6) for p in row]}
            for example, label, prediction, row in zip(
                inputs.splits["test"], labels, predictions, softmax(logits), strict=True
            )
        ]
        write_json_lines(seed_dir / "predictions.jsonl", rows)
    return {
        "test_accuracy": accuracy(labels, predictions),
        "test_macro_f1": macro_f1(labels, predictions, len(task.labels)),
        "weak": find_weak(labels, predictions),
    }


def run_seed(
    inputs: FinetuneInputs, seed: int, device: torch.device
) -> tuple[dict[str, Any], MetricsWriter]:
    """Train one seed, write the best epoch's model to `seed_N/hf/` and test that; collective.

    Returns:
        Its row of `results.jsonl`, and its open log.
    """
    config, task, encoded = inputs.config, inputs.task, inputs.encoded
    seed_dir = Path(config.output_dir) / f"seed_{seed}"
    records = {"identity": inputs.identities[seed], "numerics": inputs.numerics}
    dev_labels = np.stack(encoded["validation"].targets)

    def assess(logits: list[np.ndarray]) -> dict[str, float]:
        predictions = np.stack(logits).argmax(1)
        return {
            "accuracy": accuracy(dev_labels, predictions),
            "macro_f1": macro_f1(dev_labels, predictions, len(task.labels)),
        }

    found = fit(
        # Held by nobody else, so that its memory is free before the test.
        load_classifier(config.model_name_or_path, task.labels, seed, config.trust_remote_code),
        inputs.resolved, encoded["train"], encoded["validation"], assess, config=config,
        seed=seed, select="accuracy", tags=TAGS, class_weights=np.ones(len(task.labels)),
        tokenizer=inputs.tokenizer, parent=inputs.parent, run_dir=seed_dir, device=device,
        records=records,
        hyperparameters=hyperparameters(
            **records, model=config.model_name_or_path, data=task.name,
            masking=inputs.pretraining[-1]["identity"]["choice"]["masking"]
            if inputs.pretraining else None,
        ),
    )
    row = {
        "seed": seed,
        "task": task.name,
        **test_seed(inputs, seed, device),
        "validation_accuracy": found.best["accuracy"],
        "validation_macro_f1": found.best["macro_f1"],
        "best_epoch": found.best_epoch,
        "num_epochs": config.num_train_epochs,
        **{f"num_{name}": len(examples) for name, examples in inputs.splits.items()},
        "left_out": task.left_out,
        "labels": list(task.labels),
        "model_name_or_path": config.model_name_or_path,
        "steps": found.steps,
        "seconds": round(found.seconds, 2),
        "pretraining": {key: sum(stage["totals"][key] for stage in inputs.pretraining)
                        for key in ("masked_tokens", "steps", "seconds")},
        **sealed(inputs.identities[seed]),
        "numerics": inputs.numerics,
    }
    return row, found.log


def check_resume(
    inputs: FinetuneInputs, run_dir: Path, rows: dict[int, dict[str, Any]]
) -> None:
    """Check that the finished and stopped seeds belong to this run.

    Raises:
        ConfigError: they have another identity, but for the seed; says what differs.
        DataError: `--resume must`, and there is nothing to resume from.
    """
    first, *_ = inputs.identities.values()
    for seed, row in rows.items():
        expected = {**first, "choice": {**first["choice"], "seed": seed}}
        compare(row.get("identity", {}), expected, f"--output_dir {run_dir}, seed {seed}",
                "give another --output_dir")
        if number(row.get("test_accuracy")) is None:
            raise DataError(f"{run_dir}/results.jsonl: no test_accuracy of seed {seed}; delete its "
                            "line and run this command again")
    for seed, identity in inputs.identities.items():
        if seed not in rows:
            check_identity(run_dir / f"seed_{seed}", identity)
    if inputs.config.resume == "must" and not rows:
        seeds = inputs.config.seed_list()
        if not any(find_checkpoint(run_dir / f"seed_{seed}", "auto") for seed in seeds):
            raise DataError(
                f"--resume must: {run_dir} holds no finished seed and no complete checkpoint; "
                "type --resume auto to begin"
            )


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    config = parse(FinetuneConfig, argv)
    startup = Startup()
    startup.lap("imports")
    run_dir = check_run_dir(config)
    inputs = read_inputs(config)
    config = inputs.config
    startup.lap("inputs")
    task, sizes = inputs.task, (f"{len(part)} {name}" for name, part in inputs.splits.items())
    say(f"task {task.name}: labels {', '.join(map(visible, task.labels))}; {', '.join(sizes)}")
    train, num_seeds = inputs.encoded["train"], len(config.seed_list())
    for line in describe_plan(config, inputs.resolved, train, num_seeds):
        say(line)
    say(inputs.head)
    if config.dry_run:
        say(str(startup))
        return
    check_resume(inputs, run_dir, read_rows(run_dir))
    with sole_writer(run_dir):
        # Another process may have ended there since.
        rows = gather_objects(read_rows(run_dir))[0]
        check_resume(inputs, run_dir, rows)
        prepare_run_dir(config, inputs.resolved)
        run_seeds(inputs, rows)
    finish()


def log_test(log: MetricsWriter, row: dict[str, Any]) -> None:
    """Log the test of a seed and end its log; after its row, so that no test is logged twice."""
    log.scalars(row["steps"], {TEST_ACCURACY: row["test_accuracy"],
                               TEST_MACRO_F1: row["test_macro_f1"]})
    log.close(finished=True)


def has_test(seed_dir: Path) -> bool:
    """Return whether the log of a seed has its test: a kill may have come between row and log."""
    path = seed_dir / "metrics.jsonl"
    return path.is_file() and f'"{TEST_ACCURACY}"'.encode() in path.read_bytes()


def read_rows(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Return the row of each finished seed."""
    results = run_dir / "results.jsonl"
    found = read_json_lines(results) if results.is_file() else []
    return {row["seed"]: row for row in found if "seed" in row}


def run_seeds(inputs: FinetuneInputs, rows: dict[int, dict[str, Any]]) -> None:
    """Run the seeds that are not finished, and add their rows; collective."""
    config, task, device = inputs.config, inputs.task, start()
    run_dir = Path(config.output_dir)
    results = run_dir / "results.jsonl"
    finished = gather_objects(find_finished(run_dir, config.seed_list(), rows))[0]
    again = [seed for seed in config.seed_list() if seed in rows and seed not in finished]
    for seed in again:
        del rows[seed]
    if again and is_main():  # so that a kill leaves seeds to train, not damaged ones
        write_json_lines(results, rows.values())
    for seed in config.seed_list():
        seed_dir = run_dir / f"seed_{seed}"
        if seed in finished:
            if not gather_objects(has_predictions(seed_dir, rows[seed]))[0]:
                say(f"seed {seed}: its predictions are not those of its row; tested again")
                rows[seed].update(test_seed(inputs, seed, device))
                if is_main():
                    write_json_lines(results, rows.values())
                barrier()
            say(f"seed {seed}: finished already, test accuracy {rows[seed]['test_accuracy']:.4f}")
            if is_main():
                remove_resume_state(seed_dir)  # a kill may have come in between
                if not has_test(seed_dir):
                    log_test(MetricsWriter(seed_dir, rows[seed]["steps"]), rows[seed])
            continue
        rows[seed], log = run_seed(inputs, seed, device)
        row = rows[seed]
        if is_main():
            write_json_lines(results, rows.values())
            remove_resume_state(seed_dir)
        log_test(log, row)
        barrier()
        left = sum(task.left_out.get("test", {}).values())
        left_out = f" ({left} of {left + len(task.splits['test'])} rows left out)" if left else ""
        say(f"seed {seed}: test accuracy {row['test_accuracy']:.4f}{left_out}, macro F1 "
            f"{row['test_macro_f1']:.4f}, best epoch {row['best_epoch']} of {row['num_epochs']} "
            f"(validation {row['validation_accuracy']:.4f}), {row['seconds']:.0f} s")
        for sentence in row["weak"]:
            say(f"warning: seed {seed}: {sentence}")


if __name__ == "__main__":
    run_command(main)
