"""Short pre-training runs, and what they left behind."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from train import engine as ds
from train import pretrain
from train.config import PretrainConfig, parse

STEPS = 4
def write_ds_config(folder: Path, stage: int, **zero) -> str:
    """A CPU configuration with this ZeRO stage."""
    config = json.loads((ds.DS_CONFIGS / "cpu.json").read_text())
    config["zero_optimization"] = {"stage": stage, **zero}
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps(config))
    return str(path)


def arguments(store: str, model: str, out: Path, **options) -> list[str]:
    """Flags of a short run."""
    flags = {
        "tokens": store, "model_name_or_path": model, "output_dir": out, "max_steps": STEPS,
        "max_seq_length": 32, "train_batch_size": 8, "learning_rate": 5e-3, "eval_fraction": 0.2,
        "logging_steps": 1, "warmup_ratio": 0.5, **options,
    }
    words = []
    for name, value in flags.items():
        if value is True:
            words.append(f"--{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words += [f"--{name}", str(value)]
    return words


def pretrained(store: str, model: str, out: Path, **options) -> Path:
    """Train in this process; return the run directory."""
    pretrain.run(parse(PretrainConfig, arguments(store, model, out, **options)))
    return out


def logged(run_dir: Path, tag: str) -> list[float]:
    """The values of a tag, by step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line[tag] for line in lines if tag in line]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "hf" / "model.safetensors")
