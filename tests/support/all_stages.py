"""All stages of a tiny model in one process, in one precision and one stage of ZeRO.

Run as a script, on a GPU if there is one. Training starts at a loss scale that is too high, so
that fp16 has steps to skip. The last line is a summary in JSON: per training command its steps,
how many were skipped, the first and the last loss, and the loss scale; then the machine.

Without a GPU `--precision fp16` runs DeepSpeed's fp16 optimizers on the CPU, where it refuses them
as slow; they are the same code.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

FIRST_SCALE_POWER = 20
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": FIRST_SCALE_POWER, "hysteresis": 1,
                      "loss_scale_window": 100}},
}


def allow_fp16_on_a_cpu() -> None:
    """Let fp16 through where DeepSpeed and our own check refuse it."""
    from deepspeed.accelerator import get_accelerator

    from train.engine import ds_json

    def as_written(config: dict[str, Any], options: Any) -> tuple[str, list[str]]:
        names = [name for name in ("fp16", "bf16") if config.get(name, {}).get("enabled")]
        return (names or ["fp32"])[0], []

    type(get_accelerator()).is_fp16_supported = lambda self: True
    ds_json._settle_precision = as_written


def logged(run_dir: Path) -> dict[str, Any]:
    """What a training command logged."""
    from train.run_dir import metrics

    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if metrics.TRAIN_LOSS in line]
    last = lines[-1]
    return {
        "steps": last["step"], "skipped": int(last[metrics.SKIPPED_STEPS]),
        "loss": [round(line[metrics.TRAIN_LOSS], 4) for line in (lines[0], last)],
        **({"scale": last[metrics.LOSS_SCALE]} if metrics.LOSS_SCALE in last else {}),
    }


def run_stages(options: argparse.Namespace) -> dict[str, Any]:
    """Run every command of the three stages; return the summary."""
    from preprocess import build_masks
    from preprocess.store import TokenStore, open_array
    from train import annotate, finetune, fit_scorer, pretrain, score_tokens
    from train.engine import DS_CONFIGS

    folder = Path(options.folder)
    # The JSON that a GPU takes by default, with another stage of ZeRO and precision.
    config = json.loads((DS_CONFIGS / "zero1_fp16.json").read_text())
    config.pop("fp16")
    config["zero_optimization"]["stage"] = options.zero
    path = folder / "ds.json"
    path.write_text(json.dumps({**config, **PRECISIONS[options.precision]}))
    json_flag = ["--deepspeed_config", str(path)]
    fast = ["--learning_rate", "3e-3", "--max_seq_length", "32", "--train_batch_size", "8"]
    task = ["--task", "custom", "--train_file", options.train_file, "--test_file",
            options.test_file]
    run = {name: str(folder / name) for name in (
        "general", "classifier", "annotated", "scorer", "selective", "tuned")}

    def pretraining(name: str, model: str, *flags: str) -> None:
        pretrain.main([*json_flag, *fast, "--tokens", options.tokens, "--model_name_or_path", model,
                       "--output_dir", run[name], "--max_steps", str(options.max_steps),
                       "--logging_steps", "4", "--eval_fraction", "0.2", *flags])

    def tuning(name: str, model: str) -> None:
        finetune.main([*json_flag, *fast, *task, "--model_name_or_path", model, "--output_dir",
                       run[name], "--seeds", "13", "--num_train_epochs", "8", "--logging_steps",
                       "4"])

    pretraining("general", options.encoder)
    tuning("classifier", f"{run['general']}/hf")
    annotate.main([*task, "--model_name_or_path", f"{run['classifier']}/seed_13/hf", "--output",
                   run["annotated"], "--max_seq_length", "32"])
    fit_scorer.main([*json_flag, *fast, "--annotations", run["annotated"], "--model_name_or_path",
                     f"{run['general']}/hf", "--output_dir", run["scorer"], "--num_train_epochs",
                     "8", "--logging_steps", "4"])
    name = f"scores_{Path(options.folder).name}"
    score_tokens.main(["--model_name_or_path", f"{run['scorer']}/hf", "--tokens", options.tokens,
                       "--name", name, "--max_seq_length", "32"])
    build_masks.main(["--tokens", options.tokens, "--strategy", "selective_fill", "--scores", name,
                      "--name", name])
    pretraining("selective", f"{run['general']}/hf", "--mask_index", name)
    tuning("tuned", f"{run['selective']}/hf")

    shard = TokenStore.open(options.tokens).shards[0]
    results = json.loads((folder / "tuned" / "results.jsonl").read_text().splitlines()[0])
    trained = {"general": "general", "classifier": "classifier/seed_13", "scorer": "scorer",
               "selective": "selective", "tuned": "tuned/seed_13"}
    return {
        "stages": {stage: logged(folder / place) for stage, place in trained.items()},
        "scores": open_array(shard, name, "scores")[0].astype("float64").round(4).tolist(),
        "accuracy": results["test_accuracy"],
    }


def main(argv: list[str] | None = None) -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("folder", "tokens", "encoder", "train_file", "test_file"):
        parser.add_argument(f"--{flag}", required=True)
    parser.add_argument("--zero", type=int, default=1)
    parser.add_argument("--precision", choices=list(PRECISIONS), default="fp16")
    parser.add_argument("--max_steps", type=int, default=16)
    options = parser.parse_args(argv)
    Path(options.folder).mkdir(parents=True)

    import torch

    import train.engine
    import train.finetune
    import train.fit_scorer
    from train.run_dir.folder import environment

    modules: tuple[Any, ...] = (train.engine, train.finetune, train.fit_scorer)
    for module in modules:  # a second process group in one process is beyond DeepSpeed
        module.finish = lambda: None
    if not torch.cuda.is_available():
        train.engine.supported_precisions()  # imports deepspeed for the CPU
        allow_fp16_on_a_cpu()
    found = run_stages(options)
    machine = environment()
    print(json.dumps({
        "zero": options.zero, "precision": options.precision, **found,
        "gpu": machine["gpu"], "versions": machine["versions"], "commit": machine["commit"],
        "rank": os.environ["RANK"],
    }), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from preprocess.errors import run_command

    run_command(main)
