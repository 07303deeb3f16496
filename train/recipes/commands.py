"""How the steps of a plan are typed: one command for each, with the files that it makes."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.config import FinetuneConfig
from train.recipes.labels import Labels
from train.recipes.recipe import REPOSITORY
from train.recipes.steps import Step, flag_words, inside, model_files
from train.shipped import DS_CONFIGS, find_shipped


@dataclass(frozen=True)
class Start:
    """What arms start from: a model after one length of stage 1, or a checkpoint.

    root: folder of all that depends on it. tag: ends the names of steps and arrays that do.
    needs: steps that make the model. steps: its length; None without stage 1.
    """

    root: Path
    tag: str
    model: str | Path
    needs: list[str]
    steps: int | None


@dataclass(frozen=True)
class Tuned:
    """One folder of a fine-tuning command, which may fill several."""

    run: Path
    model: str | Path
    labels: Labels = Labels()

    @property
    def flags(self) -> dict[str, Any]:
        return {"model_name_or_path": self.model, **self.labels.flags, "output_dir": self.run}


class CommandList:
    """The steps of a plan, in the order in which they run."""

    def __init__(self, recipe: dict[str, Any], root: Path) -> None:
        self.recipe, self.root = recipe, root
        self.steps: list[Step] = []
        chosen = recipe["deepspeed_config"]
        self.deepspeed_config = chosen and str(
            find_shipped(chosen, DS_CONFIGS, "recipe: deepspeed_config"))

    def has(self, name: str) -> bool:
        return any(step.name == name for step in self.steps)

    def add(self, name: str, script: str, flags: dict[str, Any], **options: Any) -> str:
        """Add a step that runs one of our scripts, as typed from the current folder."""
        full = REPOSITORY / script
        typed = os.path.relpath(full) if Path.cwd().is_relative_to(REPOSITORY) else str(full)
        self.steps.append(Step(name, [typed, *flag_words(flags)], **options))
        return name

    def train(self, name: str, script: str, section: str, run: Path, flags: dict[str, Any],
              needs: list[str], records: list[str] | None = None,
              judged: list[str] | None = None, more_runs: Sequence[Path] = (),
              grows: bool = False) -> str:
        """Add a training command: the section's flags, then the pipeline's own."""
        settings = {"deepspeed_config": self.deepspeed_config, **(self.recipe[section] or {}),
                    **flags, "output_dir": run}
        outputs = [pattern for folder in (run, *more_runs) for pattern in inside(folder, "")]
        return self.add(name, script, settings, outputs=outputs, needs=needs,
                        records=records or model_files(run / "hf"), launched=True,
                        judged=judged or [], grows=grows)

    def finetune(self, name: str, section: str, runs: Sequence[Tuned], needs: list[str],
                 seeds: str = "", judged: list[str] | None = None) -> str:
        """Plan one process of fine-tuning: the first run is typed in full, the others as changes.

        A run without a budget comes first, since a change can only add one.
        """
        first, *others = sorted(runs, key=lambda one: bool(one.labels.flags))
        seeds = seeds or seeds_of(self.recipe[section])
        also = [shlex.join(f"{flag}={value}" for flag, value in one.flags.items())
                for one in others]
        return self.train(
            name, "train/finetune.py", section, first.run,
            {**self.recipe["task"], "model_name_or_path": first.model, **first.labels.flags,
             "seeds": seeds, "also": also}, needs,
            [pattern for one in runs for pattern in inside(
                one.run, "results.jsonl",
                *(f"seed_{seed.strip()}/{file}" for seed in seeds.split(",")
                  for file in ("predictions.jsonl", "hf/lineage.json", "hf/*.safetensors")))],
            judged, [one.run for one in others], grows=True,
        )


def seeds_of(flags: dict[str, Any]) -> str:
    """Return the seeds of a section as the command takes them."""
    return flags.get("seeds") or FinetuneConfig.seeds


def exported(run: Path, steps: Sequence[int]) -> list[str]:
    """Patterns of the models that pre-training leaves: the last one, and those at some steps."""
    folders = [run / "hf", *(run / f"hf_step_{step}" for step in steps)]
    return [pattern for folder in folders for pattern in model_files(folder)]
