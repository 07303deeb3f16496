"""Find the arms of any run directories and pipeline folders, and group those to be compared."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from preprocess.corpus import describe_leakage
from preprocess.errors import DataError, visible
from preprocess.files import read_json
from preprocess.masking import MATCHED, STRATEGIES
from train.reports.compare import NO_STAGE_2, Group
from train.reports.curves import event_folders, short_name, without_events
from train.reports.results import Arm, FinetuneRun, number, read_finetune_run
from train.reports.work import finished_steps, step_flops, step_seconds

BASELINE_STRATEGY = "baseline"  # shown as the strategy of a trivial one
_POLICY = ("strategy", "scores", "units", "match")
_OPTIONS = ("rate", "corruption")
_SEED = re.compile(r"-seed(\d+)(?=-|$)")


def pipelines_in(folders: Sequence[Path]) -> list[Path]:
    """Return the output folders of train/pipeline.py, these or below them, each once."""
    return list({path.parent.resolve(): path.parent
                 for folder in folders for path in sorted(folder.rglob("arms.json"))}.values())


def read_groups(folders: Sequence[Path]) -> tuple[list[Group], list[str]]:
    """Read all fine-tuning results below the folders; return a note on each unreadable one."""
    groups: list[Group] = []
    notes: list[str] = []
    pipelines = {path.resolve(): path for path in pipelines_in(folders)}
    loose: dict[Path, Path] = {}
    for folder in folders:
        found = sorted(path.parent for path in folder.rglob("results.jsonl"))
        for path in found:
            if not any(path.resolve().is_relative_to(root) for root in pipelines):
                loose.setdefault(path.resolve(), path)
        trained = event_folders(folder) or without_events(folder)
        if not found and not trained and folder.resolve() not in pipelines:
            notes.append(f"{folder}: no run in it (no results.jsonl and no event files).")
    alone = len(pipelines) == 1 and not loose
    for path in pipelines.values():
        prefix = "" if alone else f"{short_name(path, folders)}/"
        groups += group_arms(_pipeline_arms(path, prefix, notes), prefix)
    arms = _loose_arms([(short_name(path, folders), path) for path in loose.values()], notes)
    for task in dict.fromkeys(arm.task for arm in arms):
        groups.append(Group(task, [arm for arm in arms if arm.task == task], []))
    return groups, notes


def group_arms(arms: Sequence[Arm], prefix: str = "") -> list[Group]:
    """Group the arms of one study by task, stage 1, labels and stage 2.

    Arms without stage 2 belong to all lengths of it; baselines that name no number of labels
    belong to all of these.
    """
    floors = [arm for arm in arms if arm.floor]
    known = [arm for arm in arms if not arm.floor]
    keys = [_key(arm) for arm in known]
    groups: dict[tuple, Group] = {}
    for arm, (*shared, steps) in zip(known, keys, strict=True):
        others = [key[-1] for key in keys if list(key[:-1]) == shared and key[-1] != 0]
        lengths = dict.fromkeys(others) if steps == 0 and others else {steps: None}
        for length in lengths:
            name = "/".join(str(part) for part in (*shared[1:], length) if part is not None)
            key = (*shared, length)
            fitting = [floor for floor in floors if floor.labels in (None, arm.labels)]
            groups.setdefault(key, Group(prefix + name, [], fitting)).arms.append(arm)
    return list(groups.values()) or ([Group(prefix, [], floors)] if floors else [])


def _key(arm: Arm) -> tuple[str, Any, Any, Any]:
    return arm.task, arm.stage1_steps, arm.labels, arm.stage2_steps


def named(arms: Sequence[Arm], prefix: str = "") -> list[Arm]:
    """Give the arms of one study their names: what differs between those of one line is in them."""
    def several(values: Iterable[Any]) -> bool:
        return len(set(values) - {None}) > 1

    known = [arm for arm in arms if not arm.floor]
    stage1 = several(arm.stage1_steps for arm in known)
    labels = several(arm.labels for arm in known)
    stage2 = several(arm.stage2_steps for arm in known if arm.stage2_steps)
    found = []
    for arm in arms:
        plain = arm.line.removeprefix(prefix)
        title = plain + (f"@{arm.stage1_steps}" if stage1 and arm.stage1_steps is not None else "")
        more = [f"{arm.labels} labels"] if labels and arm.labels is not None else []
        more += [f"{arm.stage2_steps} steps"] if stage2 and arm.stage2_steps else []
        found.append(replace(arm, title=prefix + title, name=prefix + "/".join([title, *more])))
    return found


# ------------------------------------------------------------------------------- a pipeline


def _pipeline_arms(folder: Path, prefix: str, notes: list[str]) -> list[Arm]:
    try:
        listed = read_json(folder / "arms.json", expected=list)
        entries = [(entry, visible(entry["name"]), [_inside(folder, run) for run in entry["runs"]],
                    bool(entry["floor"])) for entry in listed]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DataError(
            f"{folder}/arms.json: not a list of arms; run train/pipeline.py again"
        ) from None
    steps = finished_steps(folder)
    seconds, flops = step_seconds(steps), step_flops(folder, steps)
    whole: list[int] = []  # how many labels "all" are
    try:
        leaked = describe_leakage(str(folder / "domain" / "text"))
        notes += [f"{prefix.rstrip('/')}: {leaked}" if prefix else leaked] if leaked else []
    except (DataError, OSError) as error:
        notes.append(f"{error}.")
    arms: list[Arm] = []
    kept = []
    for entry, name, paths, is_floor in entries:
        seeds = entry.get("pretrain_seeds")
        if not isinstance(seeds, list) or len(seeds) != len(paths):
            seeds = [None] * len(paths)
        chosen = zip(_costs_of_runs(entry, seconds, len(paths)),
                     _costs_of_runs(entry, flops, len(paths)), strict=True)
        found = [(replace(run, mask_seconds=spent, mask_flops=worked),
                  seed if type(seed) is int else None)
                 for path, seed, (spent, worked) in zip(paths, seeds, chosen, strict=True)
                 for run in _read_runs(prefix + name, [path], notes)]
        found = _of_one_task(prefix + name, found, notes)
        if found:
            arms.append(_arm(entry, name, prefix, found, is_floor, seconds, flops))
            kept.append(entry)
            if entry.get("labels") == "all" and arms[-1].labels is not None:
                whole.append(arms[-1].labels)
    # A baseline's row may not tell how many it read.
    arms = [replace(arm, labels=whole[0]) if arm.floor and whole and arm.labels is None
            and entry.get("labels") == "all" else arm
            for arm, entry in zip(arms, kept, strict=True)]
    return named(arms, prefix) if all("arm" in entry for entry, *_ in entries) else arms


def _arm(entry: dict[str, Any], name: str, prefix: str,
         found: list[tuple[FinetuneRun, int | None]], is_floor: bool,
         seconds: dict[str, float], flops: dict[str, float]) -> Arm:
    runs, seeds = [run for run, _ in found], tuple(seed for _, seed in found)
    plain, _, stage1 = visible(entry.get("arm") or name).partition("@")
    told = {key: visible(entry.get(key) or "") for key in _POLICY}
    if "strategy" not in entry and not is_floor:  # an older list tells only its name, a strategy's
        record = STRATEGIES.get(plain)
        told["strategy"] = plain if record or plain == NO_STAGE_2 else ""
        told["match"] = MATCHED if record and "match" in record.needs else ""
    if is_floor:
        told["strategy"] = BASELINE_STRATEGY
    steps, used, worked = entry.get("masking"), None, dict[str, float]()
    if isinstance(steps, list) and all(str(step) in seconds for step in steps):
        used = {f"{prefix}{visible(step)}": seconds[str(step)] for step in steps}
        worked = {f"{prefix}{visible(step)}": flops[str(step)] for step in steps
                  if str(step) in flops}
        runs = [run if run.mask_seconds is not None
                else replace(run, mask_seconds=cost_at(used, seed),
                             mask_flops=cost_at(worked, seed) if worked.keys() == used.keys()
                             else None)
                for run, seed in zip(runs, seeds, strict=True)]
    lengths = [_count(entry.get(key)) for key in ("stage1_steps", "stage2_steps")]
    if "arm" not in entry:  # an older list
        lengths[0] = int(stage1) if stage1.isdigit() else None
    if lengths[1] is None and "arm" not in entry and told["strategy"] == NO_STAGE_2:
        lengths[1] = 0
    match = told.pop("match")
    return Arm(
        prefix + name, runs, line=prefix + plain, masking_steps=used,
        masking_flops=worked,
        match=prefix + match if match else "",
        labels=_first(runs[0].num_labels, _count(entry.get("labels"))),
        stage1_steps=lengths[0], stage2_steps=lengths[1],
        mid_schedule=entry.get("mid_schedule") is True, seeds=seeds, floor=is_floor,
        options={key: visible(_plain(entry[key])) for key in _OPTIONS if entry.get(key)
                 not in (None, "")}, **told)


def _costs_of_runs(entry: dict[str, Any], costs: dict[str, float], size: int
                   ) -> list[float | None]:
    """Return what the masks behind each run cost; None where nothing tells.

    Args:
        costs: seconds or operations of each step.
    """
    listed = entry.get("run_masking")
    if not isinstance(listed, list) or len(listed) != size:
        return [None] * size
    return [sum(costs[str(step)] for step in steps) if isinstance(steps, list)
            and all(str(step) in costs for step in steps) else None for steps in listed]


def _plain(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _first(*values: int | None) -> int | None:
    """Return the first that is known."""
    return next((value for value in values if value is not None), None)


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def cost_at(steps: dict[str, float], seed: int | None) -> float:
    """Return what masks cost at one pre-training seed: the shared steps and those of the seed.

    Args:
        steps: seconds or operations of the steps; `-seedN` in a name makes it one seed's own.
        seed: None for the mean over the seeds that are named.
    """
    shared, own = 0.0, dict[int, float]()
    for name, cost in steps.items():
        found = _SEED.search(name)
        if found:
            own[int(found[1])] = own.get(int(found[1]), 0.0) + cost
        else:
            shared += cost
    if seed is not None and seed in own:
        return shared + own[seed]
    return shared + (sum(own.values()) / len(own) if own else 0.0)


def _inside(folder: Path, run: Any) -> Path:
    if not isinstance(run, str) or Path(run).is_absolute() or ".." in Path(run).parts:
        raise ValueError
    return folder / run


def _read_runs(name: str, paths: Iterable[Path], notes: list[str]) -> Iterator[FinetuneRun]:
    """Yield the readable runs of an arm."""
    for path in paths:
        try:
            run = read_finetune_run(path)
        except (DataError, OSError) as error:
            notes.append(f"{name}: {error}.")
            continue
        notes += [f"{note}." for note in run.notes]
        yield run


def _of_one_task(name: str, found: list[tuple[FinetuneRun, int | None]],
                 notes: list[str]) -> list[tuple[FinetuneRun, int | None]]:
    """Leave out the runs that have another task than the first one."""
    kept = []
    for run, seed in found:
        if run.task != found[0][0].task:
            notes.append(f"{name}: {run.path} has task {run.task}, the runs before it "
                         f"{found[0][0].task}; it is left out.")
        else:
            kept.append((run, seed))
    return kept


# ------------------------------------------------------------------------------ loose runs


def _loose_arms(found: Sequence[tuple[str, Path]], notes: list[str]) -> list[Arm]:
    """Make arms of fine-tuning folders; join those that differ only in the pre-training seed."""
    alike: dict[str, list[tuple[str, FinetuneRun]]] = {}
    for name, path in found:
        for run in _read_runs(name, [path], notes):
            if run.strategy == NO_STAGE_2 or _is_drawn(run.strategy):
                run = replace(run, mask_seconds=0.0, mask_flops=0.0)
            alike.setdefault(_without_seeds(run), []).append((name, run))
    arms = []
    for members in alike.values():
        seeds = [tuple(str(stage.get("seed")) for stage in run.stages) for _, run in members]
        if len(set(seeds)) == len(seeds) > 1:
            names = [name for name, _ in members]
            arm = re.sub(r"[-_.]?seed[-_]?\d+$", "", names[0])
            notes.append(f"{', '.join(names)} are treated as pre-training seeds of one arm, "
                         f"{arm}: their lineages differ in nothing else.")
            runs = [run for _, run in members]
            members = [(arm, runs[0])]
        else:
            runs = []
        arms += [Arm(name, runs or [run], name, visible(run.strategy), _drawn_steps(run),
                     strategy=visible(run.strategy), labels=run.num_labels,
                     stage2_steps=_stage2_steps(run)) for name, run in members]
    return arms


def _without_seeds(run: FinetuneRun) -> str:
    """Serialize everything that the runs of one arm have in common."""
    varying = {"seed", "seconds", "tokens", "masked_tokens", "flops", "weights", "started_from"}
    stages = [{key: value for key, value in stage.items() if key not in varying}
              for stage in run.stages]
    return json.dumps([run.task, run.num_labels, run.seeds, stages], sort_keys=True)


def _is_drawn(name: str) -> bool:
    strategy = STRATEGIES.get(name)
    return bool(strategy and strategy.drawn)


def _drawn_steps(run: FinetuneRun) -> dict[str, float] | None:
    """Return no step for masks that cost nothing beforehand, None where the cost is unknown."""
    return {} if run.strategy == NO_STAGE_2 or _is_drawn(run.strategy) else None


def _stage2_steps(run: FinetuneRun) -> int | None:
    if run.strategy == NO_STAGE_2:
        return 0
    steps = number(run.stages[-1].get("steps")) if run.stages else None
    return None if steps is None else int(steps)
