"""A dry run of the pipeline: the table of its steps, and what they take altogether."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from preprocess.errors import ConfigError, DataError
from train.config import PipelineConfig
from train.recipes import run
from train.recipes.checks import Checked, Checker, check_all
from train.recipes.estimate import (
    EncoderSize,
    Estimator,
    Measurement,
    StepEstimate,
    measure,
    network_of,
)
from train.recipes.schedule import StepSchedule


def total_seconds(found: Sequence[Checked], estimates: Sequence[StepEstimate], jobs: int) -> float:
    """Return how long the plan takes with so many steps side by side."""
    seconds = {one.step.name: estimate.seconds or 0.0
               for one, estimate in zip(found, estimates, strict=True)}
    schedule = StepSchedule({one.step.name: one.step.needs for one in found}, jobs,
                            last=[one.step.name for one in found if not one.step.records])
    now, running = 0.0, dict[str, float]()
    while True:
        schedule.arrivals(now)
        while (name := schedule.start(now)) is not None:
            running[name] = now + seconds[name]
        if not running:
            return now
        name = min(running, key=lambda one: running[one])
        now = running.pop(name)
        schedule.end(name)


def check_disk(wanted: float, options: PipelineConfig) -> str:
    """Say how much disk is wanted and free.

    Raises:
        ConfigError: clearly more is wanted than is free.
    """
    root = Path(options.output_dir).absolute()
    there = next(folder for folder in (root, *root.parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    said = f"{gib(wanted)} of disk, {gib(free)} are free"
    if 0.8 * wanted > free:
        hint = "" if options.clean == "checkpoints" else ", or add --clean checkpoints"
        raise ConfigError(f"--output_dir {options.output_dir}: about {gib(wanted)} will be needed, "
                          f"and {gib(free)} are free there; make room, or give a folder on "
                          f"another disk{hint}")
    return said


def check_memory(found: Sequence[Checked], options: PipelineConfig) -> str:
    """Say how much memory the largest pre-training takes, and how much there is; "" if unknown.

    Raises:
        ConfigError: clearly more is wanted, by all jobs that share it, than there is.
    """
    import torch

    wanted = {one.step.name: sum(float(part) * 2**30 for part in re.findall(
        r"([\d.]+) GiB", one.memory)) for one in found if one.memory}
    if not wanted:
        return ""
    name = max(wanted, key=lambda one: wanted[one])
    sharing, room = options.jobs, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if torch.cuda.is_available():
        sharing = -(-options.jobs // torch.cuda.device_count())
        room = torch.cuda.get_device_properties(0).total_memory
    if 0.8 * wanted[name] * sharing > room:
        many = f" for each of {sharing} jobs" if sharing > 1 else ""
        raise ConfigError(
            f"step {name}: about {gib(wanted[name])} of memory will be needed{many}, and there are "
            f"{gib(room)}; give it a smaller per_device_train_batch_size"
            + (", or fewer --jobs" if many else ""))
    return f"about {gib(wanted[name])} of memory for {name}, {gib(room)} are there"


def gib(size: float) -> str:
    """Return a size for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def table(found: Sequence[Checked], estimates: Sequence[StepEstimate]) -> list[str]:
    """Return the lines of the table: step, seconds, disk, what was checked."""
    rows = [("step", "seconds", "disk", "checked")]
    for one, estimate in zip(found, estimates, strict=True):
        seconds = "?" if estimate.seconds is None else f"{estimate.seconds:.0f}"
        rows.append((one.step.name, seconds, gib(estimate.kept) if estimate.kept else "",
                     f"FAILS: {one.problem}" if one.problem else one.what))
    widths = [max(len(row[at]) for row in rows) for at in range(3)]
    return [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  "
            f"{row[3]}".rstrip() for row in rows]


def dry_run(recipe: dict[str, Any], steps: Sequence[Any], options: PipelineConfig,
            ranks: int) -> None:
    """Check all steps and estimate what they take; print a table.

    Args:
        ranks: of a training command.
    Raises:
        ConfigError, DataError: a step would fail, or the disk is too small.
    """
    begin = time.monotonic()
    import_all()
    imports = time.monotonic() - begin
    with tempfile.TemporaryDirectory(prefix="selmask-dry-run-") as folder:
        checker = Checker(recipe, options, list(steps), run.Journal(Path(options.output_dir)),
                          Path(folder), ranks)
        found = list(check_all(checker))
        network = network_of(recipe)
        failed = [one for one in found if one.problem]
        measured: Measurement | str = "not estimated (--no_measure)"
        if options.measure and not failed:
            print("measuring a few training steps (--no_measure leaves that out)", flush=True)
            try:
                measured = measure(checker, found, network, imports)
            except (OSError, ValueError) as error:  # the plan is good without it
                measured = f"unknown, since the measurement has failed: {error}"
        speed = measured if isinstance(measured, Measurement) else None
        estimates = [StepEstimate() for _ in found]
        if not failed:
            estimator = Estimator(checker, found, network, speed)
            estimates = [estimator.of(one) for one in found]
    if speed is None:
        estimates = [replace(one, seconds=None) for one in estimates]
    print("\n".join(["", *table(found, estimates)]))
    if failed:
        kind = ConfigError if failed[0].code == ConfigError.exit_code else DataError
        more = f" (and {len(failed) - 1} more steps fail: see above)" if len(failed) > 1 else ""
        raise kind(f"step {failed[0].step.name}: {failed[0].problem}{more}")
    for note in dict.fromkeys(one.note for one in found if one.note):
        print(f"{note}: {run.listed([one.step.name for one in found if one.note == note])}")
    for line in in_total(found, estimates, measured, network, options, ranks):
        print(line)


def in_total(found: Sequence[Checked], estimates: Sequence[StepEstimate],
             measured: Measurement | str, network: EncoderSize | None, options: PipelineConfig,
             ranks: int) -> list[str]:
    """Return the last lines: disk, minutes, and how both were found."""
    disk = check_disk(sum(one.kept for one in estimates), options)
    if network is None:
        disk += "; models are not counted, since the encoder is not here yet"
    lines = [f"about {disk}", *filter(None, [check_memory(found, options)])]
    if isinstance(measured, str):
        return [*lines, f"time: {measured}"]
    unknown = [one.step.name for one, guess in zip(found, estimates, strict=True)
               if guess.seconds is None]
    seconds = total_seconds(found, estimates, options.jobs)
    lines.append(
        f"about {seconds / 60:.1f} minutes with --jobs {options.jobs}, from {measured.steps} "
        f"measured steps of {' and '.join(map(str, measured.rows))} x {measured.slots} slots: "
        f"other steps by tokens x parameters ({measured.rate / 1e9:.1f} G per second), "
        f"{measured.update:.2f} s per update, starts of {measured.start:.1f} s; text and masks by "
        "constants")
    if ranks > 1:
        lines.append(f"it is the time of one rank, and {ranks} will share the work of training")
    if unknown:
        lines.append(f"not in it, since their input is not known yet: {run.listed(unknown)}")
    return lines


def import_all() -> None:
    """Import what a training command does, which takes it as long."""
    import train.engine
    import train.model
    import train.stages.supervised  # noqa: F401
