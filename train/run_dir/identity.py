"""What training adds to an identity, and the numerics beside it.

`preprocess/identity.py` owns the record. The numerics are what changes the last digits of a result
and no more: machine, versions, ZeRO stage, micro batches. They are recorded; a change is reported.
"""

from __future__ import annotations

from typing import Any

import torch

from preprocess.identity import digest, flatten
from preprocess.machine import versions
from preprocess.progress import say
from train.config import MaskedLMOptions, TrainingConfig
from train.engine import Resolved, ranks

# The packages whose versions are recorded with a run.
PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "selmask")
# Which code runs the optimizer, and not what it computes.
_SAME_OPTIMIZER = ("torch_adam", "fused", "foreach")
# What torch and DeepSpeed take for Adam where the JSON says nothing.
_ADAM = {"betas": [0.9, 0.999], "eps": 1e-8}
# Keys of a model's configuration that do not change what it computes.
_NAMES = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype")


def training(resolved: Resolved, config: TrainingConfig, **head: Any) -> dict[str, Any]:
    """Return the `train` part of an identity: what the DeepSpeed JSON and the flags settled.

    Args:
        head: head_only_steps and head_learning_rate, of pre-training.
    """
    optimizer, schedule = resolved.config["optimizer"], resolved.config["scheduler"]
    params = {key: value for key, value in optimizer["params"].items()
              if key not in _SAME_OPTIMIZER}
    defaults = _ADAM if optimizer["type"].lower() in ("adam", "adamw") else {}
    return {
        "optimizer": {"type": optimizer["type"], **defaults, **params},
        "schedule": {"type": schedule["type"], **schedule.get("params", {})},
        "clipping": resolved.config["gradient_clipping"],
        "precision": resolved.precision,
        "train_batch_size": resolved.train_batch_size,
        "max_seq_length": config.max_seq_length,
        **head,
    }


def loss_scaling(resolved: Resolved) -> dict[str, Any] | None:
    """Return the fp16 block of the DeepSpeed JSON, which decides the steps that are skipped."""
    return resolved.config.get("fp16") if resolved.precision == "fp16" else None


def architecture(hf_config: Any) -> str:
    """Return a digest of a model's configuration without its names: sizes, dropout, positions."""
    values = hf_config.to_diff_dict()
    return digest({key: str(value) for key, value in values.items() if key not in _NAMES})


def numerics(
    config: Any, resolved: Resolved | None = None, execution: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return what may change the last digits of a result: machine, versions, layout.

    Args:
        execution: as of `folder.read_execution`.
    """
    zero = resolved.config.get("zero_optimization", {}) if resolved else {}
    head = None
    if isinstance(config, MaskedLMOptions):
        head = {"implementation": config.head_implementation,
                "last_layer_subset": config.last_layer_subset}
    return {
        "world_size": ranks().world_size,
        "micro_batch": resolved.micro_batch_size if resolved else None,
        "zero": zero.get("stage", 0) if resolved else None,
        "execution": execution,
        "head": head,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        # How a sum on a CPU is split.
        "threads": None if torch.cuda.is_available() else torch.get_num_threads(),
        "versions": {**dict.fromkeys(PACKAGES), **versions(PACKAGES)},
    }


def report_changes(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Report in one line how the numerics differ from those of the checkpoint."""
    changes = [f"{key} {old.get(key)}, now {value}" for key, value in new.items()
               if old.get(key) != value]
    if changes:
        say(f"resuming with other numerics than before: {'; '.join(changes)}")


def hyperparameters(
    identity: dict[str, Any], numerics: dict[str, Any], **names: Any
) -> dict[str, Any]:
    """Return the run's row of TensorBoard's HParams page, from its records.

    Args:
        names: what an identity does not hold: `model` and `data`, as typed.
    """
    flat = flatten(identity)
    optimizer, schedule = flat["optimizer"], flat["schedule"]
    same = ("seed", "masking", "max_seq_length", "max_steps", "precision", "train_batch_size",
            "num_train_epochs")
    return {
        "command": identity["command"],
        **{key: flat.get(key) for key in same},
        # A column of numbers: a schedule leaves it empty.
        "mlm_probability": None if isinstance(flat["rate"], str) else flat["rate"],
        "learning_rate": optimizer["lr"],
        "weight_decay": optimizer["weight_decay"],
        "optimizer": optimizer["type"],
        "warmup_num_steps": schedule.get("warmup_num_steps"),
        "zero_stage": numerics["zero"],
        "ranks": numerics["world_size"],
        **names,
    }
