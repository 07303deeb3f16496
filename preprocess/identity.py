"""The identity of a result: one record of everything that decides it, and its comparison.

A checkpoint, a row of `results.jsonl`, an array and a lineage each keep the record of the command
that made them. Typed again with the same record a command resumes or skips; with another one it is
refused, with the option, the old value and the new one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from preprocess.errors import ConfigError

VERSION = 1
KEYS: dict[str, tuple[str, ...]] = {
    "inputs": ("store", "task", "weights", "mask_index", "scores"),
    "choice": ("masking", "rate", "corruption", "units", "seed"),
    "train": ("optimizer", "schedule", "clipping", "precision", "train_batch_size",
              "max_seq_length", "head_only_steps", "head_learning_rate"),
    "split": ("eval_fraction", "labels", "test_items"),
    "options": (),  # the command's own
    "length": ("max_steps",),
}
# What a user types to change an entry; `--NAME` of its last part where nothing else is said.
FLAGS = {
    "inputs.store": "--tokens (fingerprint)",
    "inputs.task": "--task (content)",
    "inputs.weights": "--model_name_or_path (weights)",
    "inputs.mask_index": "--mask_index (content)",
    "inputs.scores": "--scores (content)",
    "choice.masking": "--masking or --mask_index",
    "choice.rate": "--mlm_probability",
    "split.labels": "--max_train_samples (examples)",
    "split.test_items": "--task (test items)",
    "train.optimizer.lr": "--learning_rate",
    "train.optimizer.weight_decay": "--weight_decay",
    "train.schedule.type": "--lr_scheduler_type (class)",
    "train.schedule.warmup_num_steps": "--warmup_ratio (steps)",
    "train.schedule.decay_num_steps": "--decay_ratio (steps)",
    "train.schedule.warmup_max_lr": "--learning_rate",
    "train.clipping": "--max_grad_norm",
    "options.order": "order of rows (version)",
    "options.loss_scaling": "--deepspeed_config (fp16)",
}
_OF_COMMAND = {
    "build_masks": {"choice.masking": "--strategy", "inputs.mask_index": "--match (content)",
                    "options.scores_of_all_shards": "--scores (content)"},
    "fit_scorer": {"inputs.store": "--annotations (content)"},
    "score_tokens": {"options.reference": "--reference (weights)"},
}
# Of several differences the first is shown: what was typed before what follows from it.
_ORDER = ("version", "command", "options", "choice", "split", "train", "length", "train.schedule",
          "inputs")


def build(
    command: str,
    *,
    inputs: Mapping[str, Any] | None = None,
    choice: Mapping[str, Any] | None = None,
    train: Mapping[str, Any] | None = None,
    split: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    max_steps: int | None = None,
) -> dict[str, Any]:
    """Build the record of a command; keys that it does not use are null.

    Args:
        inputs: digests, never names; "fresh" for weights that are drawn.
        options: everything of the command's own that decides its result.
    """
    given: dict[str, Mapping[str, Any]] = {
        "inputs": inputs or {}, "choice": choice or {}, "train": train or {}, "split": split or {},
        "options": options or {}, "length": {"max_steps": max_steps},
    }
    record: dict[str, Any] = {"version": VERSION, "command": command}
    for section, keys in KEYS.items():
        values = given[section]
        unknown = values.keys() - set(keys) if keys else ()
        assert not unknown, f"identity.{section} has no {unknown}"
        record[section] = {**dict.fromkeys(keys), **values}
    return json.loads(json.dumps(record))  # as it will be read: tuples are lists


def digest(values: Any) -> str:
    """Return the sha256 of plain values, in hexadecimal."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(identity: dict[str, Any]) -> dict[str, Any]:
    """Return the record and its digest, as a row, an array's JSON and a stage carry them."""
    return {"identity": identity, "identity_digest": digest(identity)}


def flatten(identity: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of all sections as one dictionary: `masking`, `rate`, `optimizer`, ..."""
    return {key: value for section in KEYS for key, value in identity[section].items()}


def by_path(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values as `a.b` -> value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (by_path(value, f"{prefix}{key}.") if isinstance(value, dict)
                 else {f"{prefix}{key}": value})
    return flat


def compare(
    old: Mapping[str, Any], new: Mapping[str, Any], where: str, remedy: str, whose: str = "this run"
) -> None:
    """Refuse a result that was made with another identity.

    Args:
        where: what is there, as the user knows it: "--output_dir runs/a".
        remedy: what to type instead.
        whose: what has the new identity.
    Raises:
        ConfigError: names the first entry that differs, its old and its new value; or the entry
            that a record of an older version lacks.
    """
    differences = sorted(_differences(old, new, ""), key=lambda found: _place(found[0]))
    for path, was, now in differences[:1]:
        if was is _ABSENT:
            raise ConfigError(
                f"{where}: its record has no {path}, so an older version made it; {remedy}"
            )
        name = {**FLAGS, **_OF_COMMAND.get(new.get("command", ""), {})}.get(path) or _flag(path)
        raise ConfigError(
            f"{where}: made with {name} {_show(was)}, and {whose} has {_show(now)}; {remedy}"
        )


_ABSENT = object()


def _differences(old: Any, new: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield path, old and new value of every entry that differs."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        if old != new:
            yield path, old, new
        return
    for key in new:
        # The entries of an optimizer or a schedule depend on its type; the others are fixed.
        absent = None if path.count(".") else _ABSENT
        yield from _differences(old.get(key, absent), new[key], f"{path}.{key}" if path else key)
    for key in old.keys() - new.keys():
        yield f"{path}.{key}" if path else key, old[key], None


def _place(path: str) -> int:
    places = (place for place, start in enumerate(_ORDER) if path.startswith(start))
    return max(places, default=len(_ORDER))


def _flag(path: str) -> str:
    parts = path.split(".")
    if parts[:2] in (["train", "optimizer"], ["train", "schedule"]):
        return f"--deepspeed_config ({'.'.join(parts[1:])})"
    return f"--{parts[-1]}"


def shorten_digests(text: str) -> str:
    """Return a text with as much of each SHA-256 in it as tells it apart."""
    return re.sub(r"\b([0-9a-f]{16})[0-9a-f]{48}\b", r"\1", text)


def _show(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, str):
        return shorten_digests(value)
    if isinstance(value, list):
        return " ".join(map(_show, value)) or "none"
    return str(value)
