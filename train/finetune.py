"""Fine-tune a classifier: stage 3, and the task classifier of stage 2.

Each seed trains one model. The epoch with the best validation accuracy (the first of equals) is
kept, and only that one meets the test split, once, after it was read back from its `hf/` folder.
All arms of a comparison share seeds: the seed alone draws the head, the order and the dropout.

    deepspeed train/finetune.py --deepspeed_config ds_configs/cpu.json --task mr --data_dir D \
        --model_name_or_path R2/hf --seeds 13,43,83 --output_dir R3

writes `R3/results.jsonl` (one row a seed) and `R3/seed_N/{hf/, predictions.jsonl, tb/}`. A seed
that has both its row and its folder is finished, and is not trained again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preprocess.corpus import Example, Task, load_task, take_fixed
from preprocess.errors import ConfigError, DataError, run_command
from preprocess.files import atomic_write_bytes
from preprocess.progress import say
from train.config import FinetuneConfig, parse
from train.engine import Resolved, barrier, finish, is_main, start
from train.model import (
    check_row_length,
    load_classifier,
    load_config,
    load_tokenizer,
    local_checkpoint,
    weights_fingerprint,
)
from train.run_dir.checkpoint import find_checkpoint
from train.run_dir.folder import check_run_dir, identity_digest, prepare_run_dir
from train.run_dir.hf_folder import read_lineage, save_hf
from train.run_dir.metrics import (
    EVAL_ACCURACY,
    EVAL_LOSS,
    EVAL_MACRO_F1,
    TEST_ACCURACY,
    TEST_MACRO_F1,
    MetricsWriter,
)
from train.stages.examples import Examples, make_examples
from train.stages.scores import accuracy, macro_f1, softmax
from train.stages.supervised import (
    Progressed,
    describe_plan,
    fit,
    hyperparameters,
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

    The whole input is cut to `max_seq_length`, always from its longer part, so an aspect never
    pushes the input over the limit. A special token written in a text is text.

    Args:
        segments: whether the model tells the two parts apart by token types.
    """
    texts = [example.text for example in examples]
    aspects = [example.aspect or "" for example in examples]
    parts = (aspects, texts) if any(aspects) else (texts,)
    encoded = tokenizer(
        *parts, truncation="longest_first", max_length=max_seq_length,
        return_token_type_ids=segments, return_attention_mask=False, split_special_tokens=True,
    )
    labels = [example.label for example in examples]
    return make_examples(
        encoded["input_ids"], encoded["token_type_ids"] if segments else None, labels,
        [1.0] * (max(labels) + 1),
    )


@dataclass(frozen=True)
class Inputs:
    """Everything read and checked before a process group starts.

    splits, encoded: by the names in `SPLITS`. identity: what all rows of one results file share.
    """

    config: FinetuneConfig
    task: Task
    splits: dict[str, list[Example]]
    encoded: dict[str, Examples]
    tokenizer: Any
    resolved: Resolved
    identity: dict[str, Any]


def read_inputs(config: FinetuneConfig) -> Inputs:
    """Read the task and the tokenizer, encode the splits, settle the DeepSpeed JSON."""
    task = load_task(
        config.task, data_dir=config.data_dir, train_file=config.train_file,
        validation_file=config.validation_file, test_file=config.test_file,
        text_column=config.text_column, label_column=config.label_column,
        pair_column=config.pair_column,
    )
    limits = {"train": config.max_train_samples}
    splits = {
        name: take_fixed(task.splits[name], limits.get(name, config.max_eval_samples))
        for name in SPLITS
    }
    hf_config = load_config(config.model_name_or_path, config.trust_remote_code)
    check_row_length(hf_config, config.max_seq_length)
    tokenizer = load_tokenizer(config.model_name_or_path, config.trust_remote_code)
    segments = getattr(hf_config, "type_vocab_size", 0) > 1
    encoded = {
        name: encode(tokenizer, examples, config.max_seq_length, segments)
        for name, examples in splits.items()
    }
    resolved = resolve(config, encoded["train"], DEFAULT_LEARNING_RATE)
    identity = {
        "task": task.name,
        "examples": identity_digest([[e.item, e.label] for name in SPLITS for e in splits[name]]),
        # Of the texts and of the tokenizer that read them.
        "tokens": identity_digest(
            [ids.tolist() for name in SPLITS for ids in encoded[name].input_ids]
        ),
        "weights": weights_fingerprint(local_checkpoint(config.model_name_or_path), hf_config),
        "max_seq_length": config.max_seq_length,
        "num_train_epochs": config.num_train_epochs,
        "train_batch_size": resolved.train_batch_size,
        "optimizer": identity_digest(resolved.config["optimizer"]),
    }
    return Inputs(config, task, splits, encoded, tokenizer, resolved, identity)


def read_results(path: Path) -> dict[int, dict[str, Any]]:
    """The rows of `results.jsonl` by seed; empty if there is none."""
    if not path.is_file():
        return {}
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        return {int(row["seed"]): row for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not a results file ({error}); delete it to train these seeds again"
        ) from None


def is_whole(seed_dir: Path, row: dict[str, Any] | None) -> bool:
    """Whether a seed is finished: its row, its model and its predictions."""
    needed = ("hf/config.json", "hf/model.safetensors", "predictions.jsonl")
    return row is not None and all((seed_dir / name).is_file() for name in needed)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object a line; the whole file or nothing."""
    atomic_write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def pretraining_cost(stages: list[dict[str, Any]]) -> dict[str, float]:
    """Masked tokens, steps and seconds of all pre-training behind a model."""
    behind = [stage for stage in stages if stage.get("stage") == "pretrain"]
    return {
        key: sum(stage.get(key, 0) for stage in behind)
        for key in ("masked_tokens", "steps", "seconds")
    }


def train_seed(inputs: Inputs, seed: int, device: torch.device) -> Progressed:
    """Train one seed and write the best epoch's model to `seed_N/hf/`; collective."""
    config, task, encoded = inputs.config, inputs.task, inputs.encoded
    seed_dir = Path(config.output_dir) / f"seed_{seed}"
    dev_labels = np.stack(encoded["validation"].targets)

    def assess(logits: list[np.ndarray]) -> dict[str, float]:
        predictions = np.stack(logits).argmax(1)
        return {
            "accuracy": accuracy(dev_labels, predictions),
            "macro_f1": macro_f1(dev_labels, predictions, len(task.labels)),
        }

    model = load_classifier(
        config.model_name_or_path, task.labels, seed, config.trust_remote_code
    )
    found = fit(
        model, inputs.resolved, encoded["train"], encoded["validation"], assess, config=config,
        seed=seed, select="accuracy", tags=TAGS, class_weights=np.ones(len(task.labels)),
        pad_id=inputs.tokenizer.pad_token_id, run_dir=seed_dir, device=device,
        identity=inputs.identity,
        hyperparameters=hyperparameters(
            "finetune", task.name, config, inputs.resolved, encoded["train"], seed
        ),
    )
    if is_main():
        stage = {
            "stage": "finetune", "task": task.name, "seed": seed, "best_epoch": found.best_epoch,
            "steps": found.steps, "seconds": round(found.seconds, 2),
            "validation_accuracy": found.best["accuracy"],
        }
        stages = [*read_lineage(config.model_name_or_path), stage]
        assert found.best_state is not None  # the first rank holds it
        save_hf(model, found.best_state, inputs.tokenizer, seed_dir / "hf", stages)
    barrier()
    return found


def test_seed(inputs: Inputs, seed: int, device: torch.device) -> dict[str, float]:
    """Read a seed's model back from disk, predict the test split and write the predictions."""
    config, task, test = inputs.config, inputs.task, inputs.encoded["test"]
    seed_dir = Path(config.output_dir) / f"seed_{seed}"
    model = load_classifier(str(seed_dir / "hf"), task.labels, seed).to(device).eval()
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
        write_lines(seed_dir / "predictions.jsonl", rows)
    return {
        "test_accuracy": accuracy(labels, predictions),
        "test_macro_f1": macro_f1(labels, predictions, len(task.labels)),
    }


def run_seed(
    inputs: Inputs, seed: int, device: torch.device
) -> tuple[dict[str, Any], MetricsWriter]:
    """Train and test one seed; return its row of `results.jsonl`, and its open log."""
    found = train_seed(inputs, seed, device)
    assert found.log is not None
    row = {
        "seed": seed,
        "task": inputs.task.name,
        **test_seed(inputs, seed, device),
        "validation_accuracy": found.best["accuracy"],
        "validation_macro_f1": found.best["macro_f1"],
        "best_epoch": found.best_epoch,
        "num_epochs": inputs.config.num_train_epochs,
        **{f"num_{name}": len(examples) for name, examples in inputs.splits.items()},
        "labels": list(inputs.task.labels),
        "model_name_or_path": inputs.config.model_name_or_path,
        "steps": found.steps,
        "seconds": round(found.seconds, 2),
        "pretraining": pretraining_cost(read_lineage(inputs.config.model_name_or_path)),
        "identity": inputs.identity,
    }
    return row, found.log


def check_resume(inputs: Inputs, run_dir: Path, rows: dict[int, dict[str, Any]]) -> None:
    """Check that the seeds that are there already may stand beside those to come.

    Raises:
        ConfigError: they are of other data, weights or options; says what differs.
        DataError: `--resume must`, and there is nothing to go on from.
    """
    for row in rows.values():
        before = row.get("identity", {})
        for key, value in inputs.identity.items():
            if before.get(key) != value:
                raise ConfigError(
                    f"--output_dir {run_dir}: seed {row['seed']} was made with {key} "
                    f"{before.get(key)}, and this run has {value}; give another folder, or delete "
                    "this one"
                )
    if inputs.config.resume == "must" and not rows:
        seeds = inputs.config.seed_list()
        if not any(find_checkpoint(run_dir / f"seed_{seed}", "auto") for seed in seeds):
            raise DataError(
                f"--resume must: {run_dir} holds no finished seed and no whole checkpoint; "
                "type --resume auto to begin"
            )


def say_plan(inputs: Inputs) -> None:
    """Say the sizes of the splits and the batch arithmetic."""
    sizes = ", ".join(f"{len(inputs.splits[name])} {name}" for name in SPLITS)
    say(f"task {inputs.task.name}: labels {', '.join(inputs.task.labels)}; {sizes}")
    num_seeds = len(inputs.config.seed_list())
    for line in describe_plan(inputs.config, inputs.resolved, inputs.encoded["train"], num_seeds):
        say(line)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    config = parse(FinetuneConfig, argv)
    run_dir = check_run_dir(config)
    inputs = read_inputs(config)
    say_plan(inputs)
    if config.dry_run:
        return
    rows = read_results(run_dir / "results.jsonl")
    check_resume(inputs, run_dir, rows)
    prepare_run_dir(config, inputs.resolved)
    device = start()
    for seed in config.seed_list():
        seed_dir = run_dir / f"seed_{seed}"
        if is_whole(seed_dir, rows.get(seed)):
            say(f"seed {seed}: finished already, test accuracy {rows[seed]['test_accuracy']:.4f}")
            if is_main():
                remove_resume_state(seed_dir)  # a kill may have come between
            continue
        rows[seed], log = run_seed(inputs, seed, device)
        row = rows[seed]
        if is_main():
            write_lines(run_dir / "results.jsonl", list(rows.values()))
            remove_resume_state(seed_dir)
        # After the row: a seed that is tested again must not have two points.
        log.scalars(row["steps"], {TEST_ACCURACY: row["test_accuracy"],
                                   TEST_MACRO_F1: row["test_macro_f1"]})
        log.close(finished=True)
        barrier()
        say(f"seed {seed}: test accuracy {row['test_accuracy']:.4f}, macro F1 "
            f"{row['test_macro_f1']:.4f}, best epoch {row['best_epoch']} of {row['num_epochs']} "
            f"(validation {row['validation_accuracy']:.4f}), {row['seconds']:.0f} s")
    finish()


if __name__ == "__main__":
    run_command(main)
