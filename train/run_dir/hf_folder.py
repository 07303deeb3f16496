"""The `hf/` folder of a run: weights, tokenizer, model card, and the lineage behind the weights."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from preprocess.errors import DataError, writing
from preprocess.files import atomic_write_bytes, atomic_write_json, file_sha256, read_json, sync
from preprocess.identity import KEYS, digest, sealed
from preprocess.progress import say
from train.model.folder import check_weights, list_weights
from train.model.loading import local_checkpoint
from train.run_dir.checkpoint import find_checkpoint
from train.run_dir.model_card import KINDS, Model, Score, is_unedited, licence_of, model_card

VERSION = 2
_HUB_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
              "pytorch_model.bin.index.json")

_PARTS = ("identity", "numerics", "parent", "totals")  # of a stage, each an object
# Beside the weights: without one of these no reader loads the folder.
_NEEDED = ("config.json", "tokenizer.json", "tokenizer_config.json")
# What transformers notes of a tokenizer's use: cuts and padding belong to a run, not to its model.
_USES = ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "is_local",
         "local_files_only")

Files = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Weights:
    """The weights that a stage starts from.

    hf_digest: names the weight files by their content. stages: those behind them, oldest first;
    empty for a checkpoint that is not ours. licence: that its card states; empty for none.
    """

    hf_digest: str
    stages: list[dict[str, Any]]
    licence: str = ""


@functools.lru_cache
def _sha256(file: Path, size: int, changed: int) -> str:
    return file_sha256(file)


def _hash(file: Path) -> str:
    """Return the sha256 of a file; one that has not changed is read once in a process."""
    status = file.stat()
    return _sha256(file.resolve(), status.st_size, status.st_mtime_ns)


def _describe(files: Iterable[Path]) -> Files:
    return {file.name: {"bytes": file.stat().st_size, "sha256": _hash(file)}
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
        DataError: no weights, or others than those that the lineage was written for; or a lineage
            that is broken or of an older version.
    """
    folder = local_checkpoint(name)
    lineage = _read_lineage(Path(folder) / "lineage.json")
    problem = _weights_problem(Path(folder), lineage) if lineage else None
    if problem:
        raise DataError(problem)
    return Weights(_digest(_describe(weight_files(folder))), lineage.get("stages", []),
                   licence_of(_card(folder)))


def _card(name: str) -> Path:
    """Return the card of a checkpoint folder or hub name, whether or not it has one."""
    from transformers.utils.hub import cached_file

    path = Path(name) / "README.md"
    if not path.parent.is_dir():
        with suppress(OSError):
            path = Path(cached_file(name, path.name, _raise_exceptions_for_missing_entries=False)
                        or path)
    return path


def _weights_problem(folder: Path, lineage: dict[str, Any]) -> str | None:
    """Return how the weights differ from those of the lineage, sizes first, with a remedy."""
    again = ("type the command that wrote this folder again: it exports the weights from its "
             "checkpoint")
    files = lineage["files"]
    for name in files:
        if not (folder / name).is_file():
            return f"{folder / name}: missing; {again}"
    changed = next((name for name, entry in files.items()
                    if (folder / name).stat().st_size != entry["bytes"]), None)
    changed = changed or next((name for name, entry in files.items()
                               if _hash(folder / name) != entry["sha256"]), None)
    if not changed and files:
        changed = next((file.name for file in list_weights(folder) if file.name not in files), None)
    if not changed:
        return None
    return (f"{folder / changed}: the lineage.json beside it was written for other weights; "
            f"{again}, or delete lineage.json if you changed the model yourself")


def weights_problem(folder: Path) -> str | None:
    """Return what is wrong with the weights of an `hf/` folder that has a lineage, or None.

    Raises:
        DataError: a lineage that is broken or of an older version.
    """
    lineage = _read_lineage(folder / "lineage.json")
    return _weights_problem(folder, lineage) if lineage else None


def is_whole(run_dir: Path, remedy: str) -> bool:
    """Return whether `run_dir/hf` is there as it was written; collective in a process group.

    Args:
        remedy: what to do without a checkpoint, as the end of a sentence.
    Returns:
        False where a checkpoint is left to export it from again, which is said.
    Raises:
        DataError: it is not whole, and there is no such checkpoint.
    """
    problem = folder_problem(run_dir / "hf")
    if problem is None:
        return True
    if find_checkpoint(run_dir, "auto") is None:
        raise DataError(f"{problem}, and {run_dir} has no checkpoint to export it from; {remedy}")
    say(f"{problem}: goes on from the checkpoint and writes it again")
    return False


def folder_problem(folder: Path) -> str | None:
    """Return which file of an `hf/` folder is not as it was written, or None."""
    for name in ("lineage.json", *_NEEDED):
        if not (folder / name).is_file():
            return f"{folder / name} is missing"
    try:
        for name in _NEEDED:
            read_json(folder / name)
        problem = weights_problem(folder)
    except DataError as error:
        problem = str(error)
    return problem and problem.split(";")[0]


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
    masks: dict[str, Any] | None = None, about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Make the stage that a command adds to the lineage.

    Args:
        records: its `identity` and its `numerics`.
        parent: the weights that it started from; None for fresh ones.
        masks, about: names and numbers behind its masks and its data, for people (base_model, data,
            language, counts, pair, license): the identity holds digests of them. No paths: it is
            shared.
    """
    return {
        "stage": records["identity"]["command"], **sealed(records["identity"]),
        "numerics": records["numerics"],
        "parent": {"hf_digest": parent and parent.hf_digest},
        "totals": {"steps": steps, "tokens": tokens, "masked_tokens": masked_tokens,
                   "seconds": round(seconds, 2), "flops": flops},
        **({"masks": masks} if masks else {}),
        **({"about": about} if about else {}),
    }


def write_card(folder: Path, scores: Sequence[Score] = (), repo: str = "",
               licence: str | None = None) -> None:
    """Write the card of an `hf/` folder again, once its scores are known; an edited one stays.

    Args:
        repo: repository of the hub that the card is for.
        licence: as of `model_card`.
    """
    path = folder / "README.md"
    if path.is_file() and not is_unedited(path.read_bytes()):
        say(f"{path}: stays as it was edited")
        return
    config = read_json(folder / "config.json")
    tokens = read_json(folder / "tokenizer_config.json")
    card = model_card(read_stages(folder), folder.name, _describe_model(config, tokens, repo),
                      scores, licence)
    atomic_write_bytes(path, card.encode())


def _describe_model(config: dict[str, Any], tokens: dict[str, Any], repo: str = "") -> Model:
    """Return what a card tells of a configuration and that of its tokenizer."""
    kind = str((config.get("architectures") or [""])[0])
    labels = tuple(map(str, (config.get("id2label") or {}).values()))
    return Model(next((KINDS[suffix] for suffix in KINDS if kind.endswith(suffix)), ""), labels,
                 str(tokens.get("mask_token") or "[MASK]"), repo or ".")


def _set_dtype(file: Path) -> None:
    """Name the dtype of the weights; transformers names that of the model in memory."""
    config = read_json(file)
    config.pop("torch_dtype", None)
    atomic_write_json(file, {**config, "dtype": "float32"})


def _save_tokenizer(tokenizer: Any, folder: Path, segments: bool) -> None:
    """Write a tokenizer without the cuts and the padding of its last use.

    Args:
        segments: whether the model takes the types of two texts: transformers' plain class for a
            tokenizer.json leaves them out, and that of BERT hands them to any model.
    """
    tokenizer.save_pretrained(folder)
    inputs = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    inputs[1:1] = ["token_type_ids"] * segments
    for name, plain in (("tokenizer.json", {"truncation": None, "padding": None}),
                        ("tokenizer_config.json", {"model_input_names": inputs})):
        content = read_json(folder / name)
        kept = {key: value for key, value in content.items() if key not in _USES}
        (folder / name).write_text(
            json.dumps({**kept, **plain}, indent=2, ensure_ascii=False) + "\n")


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
    # In 16 bit training the buffers are in 16 bit.
    weights = {name: value.float() if value.is_floating_point() else value
               for name, value in {**state, **(carried or {})}.items()}
    with writing(out, sum(tensor.nbytes for tensor in weights.values())):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            hf_model.save_pretrained(temporary, state_dict=weights)
            _set_dtype(temporary / "config.json")
            _save_tokenizer(
                tokenizer, temporary, getattr(hf_model.config, "type_vocab_size", 0) > 1)
            described = _describe_model(read_json(temporary / "config.json"),
                                        read_json(temporary / "tokenizer_config.json"))
            (temporary / "README.md").write_text(model_card(stages, out.name, described))
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
