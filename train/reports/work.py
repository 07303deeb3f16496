"""What a pipeline's steps cost: seconds, and operations as their outputs tell them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from preprocess.errors import DataError
from preprocess.files import read_json
from train.reports.results import number


def finished_steps(pipeline: Path) -> dict[str, dict[str, Any]]:
    """Return the records of the finished steps; none where they cannot be read."""
    try:
        return {name: step for name, step in read_json(pipeline / "steps.json").items()
                if step["finished"]}
    except (DataError, OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def step_seconds(steps: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the seconds of steps, where they are recorded."""
    return {name: seconds for name, step in steps.items()
            if (seconds := number(step.get("seconds"))) is not None}


def step_flops(pipeline: Path, steps: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the operations of steps; 0 of those that run no network.

    A step is left out where its outputs do not tell, as those of an older version.
    """
    found = {}
    for name, step in steps.items():
        try:
            flops = _flops(pipeline, step["command"])
        except (DataError, OSError, ValueError, TypeError, LookupError, AttributeError):
            continue
        if flops is not None:
            found[name] = flops
    return found


def _flops(pipeline: Path, command: list[str]) -> float | None:
    """Return the operations of a step, from what its command wrote."""
    def paths(flag: str, pattern: str) -> list[Path]:
        for word, value in zip(command, command[1:], strict=False):
            if word == flag and value.startswith("OUTPUT_DIR/"):
                path = pipeline / value.removeprefix("OUTPUT_DIR/")
                return sorted(path.parent.glob(f"{path.name}{pattern}"))
        return []

    if "--output_dir" in command:
        if "--also" in command:  # several folders
            return None
        lineages = paths("--output_dir", "/hf/lineage.json") or paths(
            "--output_dir", "/seed_*/hf/lineage.json")
        return _sum([read_json(path)["stages"][-1]["totals"].get("flops") for path in lineages])
    files = paths("--output", "*.importance.json")  # of annotate.py
    if "--name" in command and "--strategy" not in command:  # scores, not masks
        name = command[command.index("--name") + 1]
        files = paths("--tokens", f"*.{name}.scores.json")
    told = [read_json(path) for path in files]
    if any(one.get("identity", {}).get("command") == "score_words" for one in told) or not told:
        return 0.0
    return _sum([one.get("flops") for one in told])


def _sum(values: list[Any]) -> float | None:
    known = [flops for value in values if (flops := number(value)) is not None]
    return sum(known) if known and len(known) == len(values) else None
