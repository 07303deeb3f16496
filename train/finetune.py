"""Fine-tune a classifier: stage 3, and the task classifier of stage 2.

Each seed trains one model. The epoch with the best validation accuracy (the first of equals) is
kept; with a label budget the last one, since validation labels would be labels beyond the budget.
Only that model is tested, once, after it was read back from its `hf/` folder. All arms of a
comparison share seeds: the seed alone determines the head, the order and the dropout.

    deepspeed train/finetune.py --deepspeed_config ds_configs/cpu.json --task mr --data_dir D \
        --model_name_or_path R2/hf --seeds 13,43,83 --output_dir R3

writes `R3/results.jsonl` (one row per seed) and `R3/seed_N/{hf/, predictions.jsonl}`. A seed
that has both its row and its folder is finished and is not trained again.

Each value of `--also` is one more run of the same process, with another model, folder or label
budget: `--also 'model_name_or_path=R2/hf_step_50 output_dir=R4'`. What runs share is read once.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preprocess.errors import DataError, run_command, visible
from preprocess.files import write_json_lines
from preprocess.identity import compare, sealed
from preprocess.progress import say
from train.config import FinetuneConfig, parse
from train.engine import barrier, finish, gather_objects, is_main, start
from train.model import load_classifier
from train.reports.results import number, read_json_lines, read_predictions
from train.run_dir.checkpoint import check_identity, find_checkpoint
from train.run_dir.folder import check_run_dir, prepare_run_dir, sole_writer
from train.run_dir.hf_folder import is_whole
from train.run_dir.hub import announce
from train.run_dir.identity import hyperparameters
from train.run_dir.metrics import (
    EVAL_ACCURACY,
    EVAL_LOSS,
    EVAL_MACRO_F1,
    TEST_ACCURACY,
    TEST_MACRO_F1,
    MetricsWriter,
)
from train.stages.answers import find_weak, make_answers, score_answers
from train.stages.finetuning import FinetuneInputs, read_inputs
from train.stages.scores import accuracy, macro_f1, softmax
from train.stages.sharing import describe_task, push_best, write_cards
from train.stages.startup import Startup
from train.stages.supervised import describe_plan, fit, predict, remove_resume_state

TAGS = {"loss": EVAL_LOSS, "accuracy": EVAL_ACCURACY, "macro_f1": EVAL_MACRO_F1}


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
        write_json_lines(seed_dir / "predictions.jsonl", make_answers(
            inputs.splits["test"], task.labels, softmax(logits)))
    return {**score_answers(task, labels, predictions), "weak": find_weak(labels, predictions)}


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
        seed=seed, select=config.metric or "accuracy", epoch=config.settled_epoch(), tags=TAGS,
        patience=config.early_stopping, class_weights=inputs.class_weights,
        tokenizer=inputs.tokenizer,
        parent=inputs.parent, run_dir=seed_dir, device=device, records=records,
        about=describe_task(task.name, inputs.splits, config.model_name_or_path,
                            config.license or inputs.parent.licence),
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
        **config.choice_of_epoch(),
        "best_epoch": found.best_epoch,
        "num_epochs": found.epochs,
        **config.choice_of_labels(),
        **{f"num_{name}": len(examples) for name, examples in inputs.splits.items()},
        "left_out": task.left_out,
        "labels": list(task.labels),
        "model_name_or_path": config.model_name_or_path,
        "steps": found.steps,
        "seconds": round(found.seconds, 2),
        "flops": found.flops,
        "pretraining": {key: sum(stage["totals"][key] for stage in inputs.pretraining)
                        for key in ("masked_tokens", "steps", "seconds")},
        **sealed(inputs.identities[seed]),
        "numerics": inputs.numerics,
    }
    return row, found.log


def check_resume(inputs: FinetuneInputs, rows: dict[int, dict[str, Any]]) -> None:
    """Check that the finished and stopped seeds of a run directory belong to this run.

    Raises:
        ConfigError: they have another identity, but for the seed; says what differs.
        DataError: a row without its result.
    """
    run_dir = Path(inputs.config.output_dir)
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


def check_begun(configs: list[FinetuneConfig]) -> None:
    """Raise DataError unless a seed of some run is finished, or has a complete checkpoint."""
    for config in configs:
        run_dir = Path(config.output_dir)
        if read_rows(run_dir) or any(
                find_checkpoint(run_dir / f"seed_{seed}", "auto") for seed in config.seed_list()):
            return
    raise DataError(
        f"--resume must: {configs[0].output_dir} holds no finished seed and no complete "
        "checkpoint; type --resume auto to begin"
    )


def say_plan(inputs: FinetuneInputs) -> None:
    """Print what a run is about to do."""
    config, task = inputs.config, inputs.task
    sizes = (f"{len(part)} {name}" for name, part in inputs.splits.items())
    say(f"task {task.name}: labels {', '.join(map(visible, task.labels))}; {', '.join(sizes)}")
    train, num_seeds = inputs.encoded["train"], len(config.seed_list())
    for line in describe_plan(config, inputs.resolved, train, num_seeds):
        say(line)
    say(inputs.head)
    if config.label_budget and config.settled_epoch() == "best":
        held_out = len(inputs.splits["validation"])
        say(f"warning: --epoch best reads the labels of {held_out:,} validation examples, beyond "
            f"the --label_budget of {config.label_budget:,}; leave it out to keep the last epoch")


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    config = parse(FinetuneConfig, argv)
    startup = Startup()
    startup.lap("imports")
    configs = config.runs()
    # All folders before the process group starts: later the first rank may have locked one.
    for one in configs:
        check_run_dir(one)
    runs = read_inputs(configs)
    startup.lap("inputs")
    titles = [f"run {i} of {len(runs)}: {one.output_dir}" for i, one in enumerate(configs, 1)]
    for title, inputs in zip(titles, runs, strict=True):
        if len(runs) > 1:
            say(f"{title}, from {inputs.config.model_name_or_path}")
        say_plan(inputs)
    announce(config.push_to_hub)
    for inputs in runs:
        check_resume(inputs, read_rows(Path(inputs.config.output_dir)))
    if config.resume == "must":
        check_begun(configs)
    if config.dry_run:
        say(str(startup))
        return
    for title, inputs in zip(titles, runs, strict=True):
        run_dir = Path(inputs.config.output_dir)
        with sole_writer(run_dir):
            if len(runs) > 1:
                say(title)
            # Another process may have ended there since.
            rows = gather_objects(read_rows(run_dir))[0]
            check_resume(inputs, rows)
            prepare_run_dir(inputs.config, inputs.resolved)
            run_seeds(inputs, rows)
        if is_main():
            write_cards(inputs.config, rows)
    finish()
    if config.push_to_hub and is_main():  # of one run
        push_best(config, rows)


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
                    log_test(MetricsWriter(seed_dir, rows[seed]["steps"], "finetune",
                                           config.report_to), rows[seed])
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
        epoch = f"{row['epoch']} epoch {row['best_epoch']} of {row['num_epochs']}"
        say(f"seed {seed}: test accuracy {row['test_accuracy']:.4f}{left_out}, macro F1 "
            f"{row['test_macro_f1']:.4f}, {epoch} "
            f"(validation {row['validation_accuracy']:.4f}), {row['seconds']:.0f} s")
        for sentence in row["weak"]:
            say(f"warning: seed {seed}: {sentence}")


if __name__ == "__main__":
    run_command(main)
