"""Where the numbers of a report come from: model, data, arms, seeds, versions, machine, commands.

All of it is read from files that the commands themselves wrote: `config.resolved.yaml` and
`env.json` of each run, `results.jsonl`, the JSON of the token stores, `arms.json` and `steps.json`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from preprocess.errors import DataError, visible
from preprocess.files import read_json, read_yaml
from preprocess.masking import STRATEGIES
from preprocess.view.tables import Table
from train.reports.compare import NO_STAGE_2, Group, arms_of
from train.reports.costs import domain_prefix, store_counts
from train.reports.groups import pipelines_in
from train.reports.results import Arm, number

_KIND = re.compile(r"(-step_\d+|-seed\d+|-labels\w+|-epoch\d+)+(?=-|$)")
_LONG = 12  # characters of a commit that are shown


def provenance(folders: Sequence[Path], groups: Sequence[Group]) -> list[Table]:
    """Return the tables at the top of a page: what was studied, with what, and by which arms."""
    arms = arms_of(groups)
    lines = [*_about_arms(arms), *_about_folders(folders)]
    about = Table("What this page is about", ("", "value"), lines, file="provenance")
    return [table for table in (about, _arms_table(arms)) if table and table.rows]


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value not in (None, "")))


def _about_arms(arms: Sequence[Arm]) -> list[tuple[str, str]]:
    """Return what the results themselves tell."""
    runs = [run for arm in arms for run in arm.runs]
    items = {run.items_digest: run.correct.shape[1] for run in runs if run.correct is not None}
    lines = {
        "task": _listed(run.task for run in runs),
        "test items": _listed(f"{size:,} (digest {digest[:_LONG]})"
                              for digest, size in items.items()),
        "labelled examples": _listed(f"{arm.labels:,}" for arm in arms if arm.labels is not None),
        "steps of stage 2": _listed(sorted({arm.stage2_steps for arm in arms
                                            if arm.stage2_steps})),
        "pre-training seeds": _listed(seed for arm in arms for seed in arm.seeds),
        "fine-tuning seeds": _listed(seed for run in runs for seed in run.seeds),
        "models tested": f"{sum(len(run.rows) for run in runs):,}" if runs else "",
        "commit": _listed(run.commit[:_LONG] + ("+ (with changes)" if run.commit.endswith("+")
                                                else "") for run in runs if run.commit),
        "device": _listed(run.device for run in runs),
    }
    return [(key, value) for key, value in lines.items() if value]


def _about_folders(folders: Sequence[Path]) -> list[tuple[str, str]]:
    """Return what the folders tell beside the results."""
    environments = [_read(path) for path in _environments(folders)]
    versions = [env.get("versions") for env in environments]
    machines = [f"{env.get('platform')}, {env.get('cpus')} CPUs, {env.get('threads')} threads, "
                f"{(number(env.get('memory_bytes')) or 0) / 2**30:.0f} GiB, "
                f"{env.get('world_size')} processes" for env in environments if "platform" in env]
    days = sorted({str(env.get("started")) for env in environments if env.get("started")})
    lines = {
        "encoder": _listed(_encoders(folders)),
        "classes": _listed(_first_rows(folders, "labels")),
        "splits": _listed(_splits(folders)),
        "in-domain text": _listed(_stores(folders, "domain")),
        "general text": _listed(_stores(folders, "general")),
        "versions": _listed(
            ", ".join(f"{name} {version}" for name, version in told.items())
            for told in versions if isinstance(told, dict)),
        "python": _listed(env.get("python") for env in environments),
        "machine": _listed(machines),
        "started": days[0] if days else "",
        "last run started": days[-1] if len(days) > 1 else "",
    }
    return [(key, visible(value)) for key, value in lines.items() if value]


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path) if path.suffix == ".json" else read_yaml(path, "")
    except (OSError, ValueError):
        return {}


def _environments(folders: Sequence[Path]) -> list[Path]:
    return sorted({path for folder in folders for path in folder.rglob("env.json")})


def _encoders(folders: Sequence[Path]) -> list[str]:
    """Return the checkpoints that nothing in the folders made, or the sizes of fresh ones."""
    found: dict[str, None] = {}
    roots = [folder.resolve() for folder in folders]
    for path in sorted({path for folder in folders
                        for path in folder.rglob("config.resolved.yaml")}):
        config = _read(path)
        name = str(config.get("model_name_or_path") or "")
        # A folder of an earlier step lies in the output; one that was moved has its usual name.
        if name and not any(Path(name).resolve().is_relative_to(root) for root in roots) and \
                not re.search(r"/hf(_step_\d+)?/?$", name):
            found[name] = None
        elif config.get("model_config"):
            found[f"{config['model_config']} with fresh weights"] = None
    return list(found)


def _rows(folders: Sequence[Path]) -> list[dict[str, Any]]:
    from train.reports.results import read_json_lines

    rows = []
    for path in sorted({path for folder in folders for path in folder.rglob("results.jsonl")}):
        try:
            rows += read_json_lines(path, [])[:1]
        except (OSError, DataError):
            continue
    return rows


def _first_rows(folders: Sequence[Path], key: str) -> list[str]:
    return [", ".join(map(str, row[key])) for row in _rows(folders)
            if isinstance(row.get(key), list)]


def _splits(folders: Sequence[Path]) -> list[str]:
    """Return the sizes of the splits that are the same for all label budgets."""
    return [f"{row['num_validation']:,} validation, {row['num_test']:,} test"
            for row in _rows(folders)
            if all(type(row.get(f"num_{name}")) is int for name in ("validation", "test"))]


def _stores(folders: Sequence[Path], which: str) -> list[str]:
    found = []
    for pipeline in pipelines_in(folders):
        prefix = domain_prefix(pipeline) if which == "domain" else pipeline / which / "text"
        counts = store_counts(prefix)
        tokens, documents = (number(counts.get(key)) for key in ("tokens", "documents"))
        if tokens is not None:
            names = _input_names(_read(prefix.with_name("text.json")))
            found.append(f"{tokens:,.0f} tokens in {documents or 0:,.0f} documents"
                         + (f" of {names}" if names else ""))
    return found


def _input_names(told: dict[str, Any]) -> str:
    try:
        names = [Path(entry["name"]).name for entry in told["options"]["input"]]
    except (KeyError, TypeError):
        return ""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _arms_table(arms: Sequence[Arm]) -> Table | None:
    """Return what each arm is: its rule in words, and what it reads."""
    found: dict[str, tuple[str, ...]] = {}
    for arm in arms:
        options = ", ".join(f"{key} {value}" for key, value in arm.options.items())
        found.setdefault(arm.line or arm.name, (
            arm.line or arm.name, arm.strategy, arm.scores, arm.match, arm.units, options,
            "no stage 2" if arm.strategy == NO_STAGE_2
            else STRATEGIES[arm.strategy].rule if arm.strategy in STRATEGIES else ""))
    if not found:
        return None
    columns = ("arm", "strategy", "scores", "matches", "units", "options", "rule")
    return Table("The arms", columns, list(found.values()), file="arms")


def command_table(folders: Sequence[Path]) -> Table | None:
    """Return one command of each kind of step, as it was run."""
    found: dict[str, tuple[str, str]] = {}
    for pipeline in pipelines_in(folders):
        for name, step in _read(pipeline / "steps.json").items():
            words = step.get("command") if isinstance(step, dict) else None
            kind = _KIND.sub("", str(name))
            if isinstance(words, list):
                found.setdefault(kind, (kind, visible(" ".join(map(str, words)))))
    if not found:
        for path in _environments(folders):
            command = str(_read(path).get("command") or "")
            script = command.partition(".py")[0].rpartition("/")[2]
            if command:
                found.setdefault(script, (visible(script), visible(command)))
    if not found:
        return None
    return Table("Commands", ("step", "flags"), list(found.values()),
                 "One of each kind; the others differ in seeds, labels and names.",
                 file="commands")
