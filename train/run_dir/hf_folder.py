"""The `hf/` folder of a run: weights, tokenizer, model card and lineage."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from preprocess.errors import DataError, writing
from preprocess.files import sync
from train.model.loading import local_checkpoint


def read_lineage(name: str) -> list[dict[str, Any]]:
    """The stages behind an `hf/` folder, oldest first; empty for a checkpoint that is not ours."""
    file = Path(local_checkpoint(name)) / "lineage.json"
    if not file.is_file():
        return []
    try:
        stages = json.loads(file.read_text())["stages"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not a lineage ({error}); export the model again") from None
    return stages


def _model_card(stages: list[dict[str, Any]], out_name: str) -> str:
    """A README for an `hf/` folder."""
    lines = ["---", "library_name: transformers", "tags:", "- selmask", "---", "", f"# {out_name}"]
    lines += ["", "Trained with selmask. Stages, oldest first:", ""]
    lines += ["| stage | masking | steps | masked tokens | seconds |", "|---|---|---|---|---|"]
    for stage in stages:
        cells = (stage.get(key, "") for key in
                 ("stage", "masking", "steps", "masked_tokens", "seconds"))
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
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
            (temporary / "README.md").write_text(_model_card(stages, out.name))
            lineage = json.dumps({"stages": stages}, indent=2) + "\n"
            (temporary / "lineage.json").write_text(lineage)
            for path in (*temporary.iterdir(), temporary):
                sync(path)
            temporary.chmod(0o755)
            if out.exists():
                shutil.rmtree(out)
            os.rename(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync(out.parent)
