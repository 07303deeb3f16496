"""Run all stages of a recipe, and end with the table of results.

    python train/pipeline.py --recipe train/recipes/demo.yaml --output_dir runs/demo [--dry_run]

It owns the recipe's meaning and the layout of the output folder; it trains nothing itself. A
recipe becomes a flat list of steps. A step is one process; what is whole is skipped, and what was
made by another command, or before something that it reads, is never taken silently: `steps.json`
remembers the command of every step and the order in which they ran.

In the output folder: `general/` and `domain/` (token stores with their arrays), `stage1/`,
`classifier/`, `annotations/`, `scorer/`, `task_guided/ARM-seedN/`, `finetune/ARM-seedN/`,
`floors/`, `report/`, `logs/`. With `export_steps` everything that depends on the length of stage 1
lies under `step_N/`.
"""

from __future__ import annotations

from pathlib import Path

from preprocess.errors import run_command
from preprocess.files import atomic_write_json
from train.config import PipelineConfig, parse
from train.recipes.plan import Step, plan
from train.recipes.recipe import load_recipe
from train.recipes.run import Journal, run_steps, shown

"""Signals that ask for a stop: what they ended is no failure."""


def where_to_look(root: Path, steps: list[Step]) -> str:
    """The last lines: what to open next."""
    lines = [f"table and figures: {root}/report", f"curves: tensorboard --logdir {root}"]
    for step in steps:
        if step.name.startswith("masks-selective"):
            name = step.name.removeprefix("masks-")
            lines.append("what was masked: python preprocess/show_masks.py "
                         f"--tokens {root}/domain/text --mask_index {name}")
            break
    return "\n".join(["Where to look next", *(f"  {line}" for line in lines)])


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command."""
    options = parse(PipelineConfig, argv)
    recipe = load_recipe(options.recipe, options.set)
    root = Path(options.output_dir)
    steps, arms = plan(recipe, root)
    if options.dry_run:
        for step in steps:
            print(shown(step, options))
        return
    root.mkdir(parents=True, exist_ok=True)
    journal = Journal(root)
    atomic_write_json(root / "arms.json", arms)
    run_steps(steps, journal, options)
    print(where_to_look(root, steps), flush=True)


if __name__ == "__main__":
    run_command(main)
