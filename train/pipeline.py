"""Run all stages of a recipe, and end with the table of results.

    python train/pipeline.py --recipe train/recipes/demo.yaml --output_dir runs/demo [--dry_run]

A recipe becomes a flat list of steps; each step is one process that trains or prepares something.
Typed again, the pipeline skips the finished steps and continues the interrupted one. Outputs made
by another command, or older than their inputs, are refused until `--rerun`. Where the classifier,
the annotation or the scorer calls its own result weak, it stops with exit code 3 until `--go_on`.

The output folder holds `vocabulary/`, `general/` and `domain/` (token stores with their arrays),
`domain_kept/` (with `drop_leaked`: the store without test texts), `stage1/`, `classifier/`,
`annotations/`, `scorer/`, `task_guided/ARM-seedN/`, `finetune/ARM-seedN/`, `floors/` (trivial
baselines), `report/`, `logs/`, `recipe.json`, and `steps.json` (command, outputs and seconds of
each step).
With `--hostfile`, training commands run on many nodes, all other steps on the first one
(`train/recipes/nodes.py`). With `--jobs`, independent steps run side by side
(`train/recipes/jobs.py`). With `--archive`, all but what is large goes into one file at the end
(`train/recipes/archive.py`). With `export_steps`, everything that depends on the length of stage 1
lies under `step_N/`. With `label_budgets`, what follows from labels has their budget in its name,
and the seed that drew them (`train/recipes/labels.py`).
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from preprocess.corpus import describe_leakage
from preprocess.errors import ConfigError, DataError, StopRequested, run_command
from preprocess.files import WriterLock, atomic_write_json, read_json
from train.config import PipelineConfig, parse
from train.recipes.archive import check_archive, pack
from train.recipes.checks import check_options
from train.recipes.jobs import run_side_by_side, share_machine
from train.recipes.labels import check_budgets
from train.recipes.nodes import FirstNode, OtherNode, check_nodes, read_hostfile
from train.recipes.plan import plan
from train.recipes.recipe import load_recipe
from train.recipes.rehearsal import dry_run
from train.recipes.run import Journal, follow, run_steps, shown, tell_others_of_a_stop
from train.recipes.steps import Step, up_to

WAIT_SECONDS = 5.0  # for a pipeline of the same folder that may be about to say that it is stopping


def where_to_look(root: Path, steps: list[Step]) -> str:
    """Return the last lines: what leaked, and what to open next."""
    store = next((step.command[step.command.index("--tokens") + 1] for step in steps
                  if step.name.startswith("masks-")), f"{root}/domain/text")
    lines = [f"table and figures: {root}/report", f"curves: tensorboard --logdir {root}"]
    masks = [step.name for step in steps if step.name.startswith("masks-")]
    if (root / "report" / "words.png").is_file():
        lines.append(f"which words were masked: {root}/report/words.png")
    if masks:
        lines.append("the masks in the text: selmask show_masks --tokens "
                     f"{store} --mask_index {masks[0].removeprefix('masks-')}")
    leaked = describe_leakage(f"{root}/domain/text")
    return "\n".join([*([leaked] if leaked else []), "Where to look next",
                      *(f"  {line}" for line in lines)])


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    options = parse(PipelineConfig, argv)
    recipe = load_recipe(options.recipe, options.set)
    root = Path(options.output_dir)
    steps, arms = plan(recipe, root)
    if options.until:
        steps = up_to(steps, options.until)
    if options.archive:
        check_archive(options.archive)
    hosts = read_hostfile(options.hostfile) if options.hostfile else {}
    if options.dry_run:
        for step in steps:
            print(shown(step, options))
        check_budgets(recipe)
        share_machine(options)
        dry_run(recipe, steps, options, sum(hosts.values()) or options.num_gpus)
        return
    check_budgets(recipe)
    check_options(steps)
    check_nodes(options, hosts, steps)
    gpus = share_machine(options)
    root.mkdir(parents=True, exist_ok=True)
    if options.no_ssh:
        tell_others_of_a_stop()
    if options.node_rank:
        follow(steps, Journal(root), options, OtherNode(root, options.node_rank, steps))
        return
    others = len(hosts) - 1 if options.no_ssh else 0
    with (WriterLock(f"{root}/", WAIT_SECONDS, "another --output_dir"),
          FirstNode(root, others, steps) if others else nullcontext() as first):
        journal = Journal(root)
        note_recipe(root, journal, options)
        atomic_write_json(root / "arms.json", arms)
        try:
            if options.hostfile:
                run_steps(steps, journal, options, first)
            else:
                run_side_by_side(steps, journal, options, gpus)
        except (StopRequested, DataError, SystemExit):  # what is there is worth having
            archive(root, options)
            raise
        archive(root, options)
    if options.until and steps[-1].records:
        print(f"ended after {steps[-1].name} (--until {options.until}); the same command without "
              "--until goes on", flush=True)
    else:
        print(where_to_look(root, steps), flush=True)


def note_recipe(root: Path, journal: Journal, options: PipelineConfig) -> None:
    """Note whose run the folder holds, and refuse that of another recipe.

    Raises:
        ConfigError: it has steps of another recipe, and `--rerun` is not given.
    """
    file = root / "recipe.json"
    noted = read_json(file, "delete it") if file.is_file() else {}
    name = Path(options.recipe).stem  # a folder may be moved, and a recipe given by its name
    if journal.steps and noted.get("recipe", name) != name and not options.rerun:
        raise ConfigError(f"--output_dir {root} holds a run of {noted.get('file')}, and --recipe "
                          f"is {options.recipe}: give another --output_dir, or add --rerun to "
                          "delete and redo what differs")
    atomic_write_json(file, {"recipe": name, "file": options.recipe, "set": options.set})


def archive(root: Path, options: PipelineConfig) -> None:
    """Pack the output folder, if asked to, and say how large it came out."""
    if options.archive:
        print(f"archive: {pack(root, Path(options.archive))}", flush=True)


if __name__ == "__main__":
    run_command(main)
