"""Short pre-training runs, and what they left behind."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from preprocess.identity import build
from train import engine as ds
from train import pretrain
from train.config import PretrainConfig, parse
from train.run_dir.hf_folder import make_stage

STEPS = 4


def made_up_stage(
    command: str = "pretrain", masking: str | None = None, seed: int = 42, weights: str = "w",
    **totals: float,
) -> dict[str, Any]:
    """A stage of a lineage that nobody trained."""
    identity = build(command, inputs={"weights": weights},
                     choice={"masking": masking, "seed": seed})
    records = {"identity": identity, "numerics": {}}
    counted = {"steps": 0, "seconds": 0.0, "masked_tokens": 0}
    return make_stage(records, None, **{**counted, **totals})


def write_lineage(folder: Path, *stages: dict[str, Any]) -> None:
    """An `hf/` folder with a lineage and no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    lineage = {"version": 2, "files": {}, "stages": stages}
    (folder / "lineage.json").write_text(json.dumps(lineage))


def write_ds_config(folder: Path, stage: int, blocks: dict[str, Any] | None = None, name: str = "",
                    **zero: Any) -> str:
    """Write a CPU configuration with this ZeRO stage; `blocks` replace those of the same name."""
    config = json.loads((ds.DS_CONFIGS / "cpu.json").read_text())
    config["zero_optimization"] = {"stage": stage, **zero}
    path = folder / f"{name or f'zero{stage}'}.json"
    path.write_text(json.dumps({**config, **(blocks or {})}))
    return str(path)


def arguments(store: str, model: str, out: Path, **options) -> list[str]:
    """Flags of a short run."""
    return words({
        "tokens": store, "model_name_or_path": model, "output_dir": out, "max_steps": STEPS,
        "max_seq_length": 32, "train_batch_size": 8, "learning_rate": 5e-3, "eval_fraction": 0.2,
        "logging_steps": 1, "warmup_ratio": 0.5, **options,
    })


def words(flags: dict[str, Any]) -> list[str]:
    """Flags as they are typed; None leaves one out."""
    typed = []
    for name, value in flags.items():
        if isinstance(value, bool):
            typed.append(f"--{name}" if value else f"--no_{name}")
        elif isinstance(value, list):
            typed += [f"--{name}", *map(str, value)]
        elif value is not None:
            typed += [f"--{name}", str(value)]
    return typed


def pretrained(store: str, model: str, out: Path, **options) -> Path:
    """Train in this process; return the run directory."""
    pretrain.run(parse(PretrainConfig, arguments(store, model, out, **options)))
    return out


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def logged(run_dir: Path, tag: str) -> list[float]:
    """The values of a tag, by step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line[tag] for line in lines if tag in line]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "hf" / "model.safetensors")
