"""The `hf/` folder of a run: weights, tokenizer, model card, and the lineage behind the weights."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from preprocess.errors import DataError, visible, writing
from preprocess.files import file_sha256, read_json, sync
from preprocess.identity import KEYS, digest, sealed
from train.model.folder import check_weights, list_weights
from train.model.loading import local_checkpoint

VERSION = 2
_HUB_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
              "pytorch_model.bin.index.json")

_PARTS = ("identity", "numerics", "parent", "totals")  # of a stage, each an object

Files = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Weights:
    """The weights that a stage starts from.

    hf_digest: names the weight files by their content. stages: those behind them, oldest first;
    empty for a checkpoint that is not ours.
    """

    hf_digest: str
    stages: list[dict[str, Any]]


def _describe(files: Iterable[Path]) -> Files:
    return {file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
            for file in sorted(files)}


def _digest(files: Files) -> str:
    lines = [f"{name} {entry['bytes']} {entry['sha256']}\n" for name, entry in files.items()]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def weight_files(name: str) -> list[Path]:
    """List the weight files of a checkpoint folder, hub name or pypi: spec.

    Raises:
        DataError: there are none.
    """
    folder = Path(local_checkpoint(name))
    if not folder.is_dir():
        return _hub_files(name)
    check_weights(folder)
    files = list_weights(folder)
    if not files:
        raise DataError(f"{folder}: no .safetensors and no pytorch_model.bin; give the hf/ folder "
                        "of a finished run, or another checkpoint with weights")
    return files


def _hub_files(name: str) -> list[Path]:
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    for file in _HUB_FILES:
        found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            parts = get_checkpoint_shard_files(name, found)[0] if "index" in file else [found]
            return list(map(Path, parts))
    raise DataError(f"{name}: the hub has no weights of it; give another checkpoint")


def open_weights(name: str) -> Weights:
    """Hash the weights of a checkpoint and read the lineage beside them.

    Raises:
        DataError: no weights; or a lineage that is broken, of an older version, or of others.
    """
    folder = local_checkpoint(name)
    files, file = _describe(weight_files(folder)), Path(folder) / "lineage.json"
    lineage = _read_lineage(file)
    if lineage and lineage["files"] != files:
        raise DataError(
            f"{file}: written for other weights than those beside it; delete lineage.json if you "
            "changed the model yourself"
        )
    return Weights(_digest(files), lineage.get("stages", []))


def read_stages(folder: Path) -> list[dict[str, Any]]:
    """Return the stages behind an `hf/` folder, oldest first, without a look at its weights.

    Raises:
        DataError: a lineage that is broken or of an older version.
    """
    return _read_lineage(folder / "lineage.json").get("stages", [])


def _read_lineage(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    again = "run the command that wrote this folder again in another --output_dir"
    lineage = read_json(file, again, keys=["stages"])
    version = lineage.get("version", 1)
    if version == VERSION:
        wrong = next(_faults(lineage), None)
        if wrong:
            raise DataError(f"{file}: not a lineage ({wrong}); {again}")
    else:
        raise DataError(
            f"{file}: lineage of version {version}, and this program reads {VERSION}; {again}, or "
            "delete lineage.json to use its weights as a plain checkpoint"
        )
    return lineage


def _faults(lineage: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a lineage, so that everything in it can be used without a look."""
    files, stages = lineage.get("files"), lineage.get("stages")
    if not isinstance(files, dict) or not isinstance(stages, list):
        yield "files or stages are missing"
        return
    for name, entry in files.items():
        if not isinstance(entry, dict) or type(entry.get("bytes")) is not int or not isinstance(
                entry.get("sha256"), str):
            yield f"no size and sha256 of {name!r}"
    for number, stage in enumerate(stages, start=1):
        parts: list[Any] = [stage.get(key) for key in _PARTS] if isinstance(stage, dict) else []
        if not parts or not all(isinstance(part, dict) for part in parts):
            yield f"stage {number} has no {', '.join(_PARTS)}"
            return
        identity, _, parent, totals = parts
        if not isinstance(stage.get("stage"), str) or "hf_digest" not in parent:
            yield f"stage {number} has no name or no parent"
        if not all(isinstance(identity.get(section), dict) and identity[section].keys() >= set(keys)
                   for section, keys in KEYS.items()):
            yield f"stage {number} has no complete identity"
        elif stage.get("identity_digest") != digest(identity):
            yield f"the identity of stage {number} is not what was written"
        # Only pre-training counts its masked tokens.
        needed = ["steps", "seconds"] + ["masked_tokens"] * (stage["stage"] == "pretrain")
        for key in ("steps", "seconds", "masked_tokens", "tokens", "flops"):
            value = totals.get(key)
            if key not in totals or not _is_amount(value) and (key in needed or value is not None):
                yield f"{key} of stage {number} is {value!r}"


def _is_amount(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def make_stage(
    records: dict[str, dict[str, Any]], parent: Weights | None, *, steps: int, seconds: float,
    tokens: int | None = None, masked_tokens: int | None = None, flops: float | None = None,
) -> dict[str, Any]:
    """Make the stage that a command adds to the lineage.

    Args:
        records: its `identity` and its `numerics`.
        parent: the weights that it started from; None for fresh ones.
    """
    return {
        "stage": records["identity"]["command"], **sealed(records["identity"]),
        "numerics": records["numerics"],
        "parent": {"hf_digest": parent and parent.hf_digest},
        "totals": {"steps": steps, "tokens": tokens, "masked_tokens": masked_tokens,
                   "seconds": round(seconds, 2), "flops": flops},
    }


def model_card(stages: list[dict[str, Any]], out_name: str) -> str:
    """Return the README of a folder: a table of the stages behind it."""

    def plain(cell: Any) -> str:
        """Write a cell so that Markdown shows it as it is: a lineage may be a stranger's."""
        marked = re.sub(r"([\\`*\[\]<>#|~&$])", r"\\\1", visible(cell))
        return "" if cell is None else marked

    lines = ["---", "library_name: transformers", "tags:", "- selmask", "---", "",
             f"# {plain(out_name)}",
             "", "Trained with selmask. Stages, oldest first:", "",
             "| stage | masking | steps | masked tokens | seconds |", "|---|---|---|---|---|"]
    for stage in stages:
        totals = [stage["totals"][key] for key in ("steps", "masked_tokens", "seconds")]
        cells = [stage["stage"], stage["identity"]["choice"]["masking"], *totals]
        lines.append(f"| {' | '.join(map(plain, cells))} |")
    return "\n".join(lines) + "\n"


def save_hf(
    hf_model: Any,
    state: dict[str, torch.Tensor],
    tokenizer: Any,
    out_dir: str | Path,
    stages: list[dict[str, Any]],
    carried: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a folder that `AutoModelFor...from_pretrained` loads; all of it or nothing.

    Args:
        hf_model: the transformers model, for its class and configuration; its weights are not
            read.
        state: its parameters by name, fp32 on the CPU; tied ones once.
        stages: the whole lineage, this stage last.
        carried: tensors added to the weights.
    """
    out = Path(out_dir)
    weights = {**state, **(carried or {})}
    with writing(out, sum(tensor.nbytes for tensor in weights.values())):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            hf_model.save_pretrained(temporary, state_dict=weights)
            tokenizer.save_pretrained(temporary)
            (temporary / "README.md").write_text(model_card(stages, out.name))
            files = _describe(weight_files(str(temporary)))
            lineage = {"version": VERSION, "files": files, "stages": stages}
            (temporary / "lineage.json").write_text(json.dumps(lineage, indent=2) + "\n")
            for path in (*temporary.iterdir(), temporary):
                sync(path)
            temporary.chmod(0o755)
            if out.exists():
                shutil.rmtree(out)
            os.rename(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync(out.parent)
