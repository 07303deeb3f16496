"""Read a recipe: its sections, variables and checks.

A recipe is YAML: variables, the task, the texts, flags for each stage, the arms to compare. It may
extend another one. Every key is checked before anything runs, with "did you mean".
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any

from preprocess.errors import ConfigError
from preprocess.files import parse_yaml, read_yaml
from preprocess.masking import STRATEGIES
from train.config import (
    AnnotateConfig,
    FinetuneConfig,
    FitScorerConfig,
    PretrainConfig,
    ScoreConfig,
    TaskOptions,
)

REPOSITORY = Path(__file__).resolve().parents[2]
TOKENIZE_FLAGS = (
    "input", "text_column", "where", "split", "split_sentences", "language",
    "blank_line_documents", "max_documents", "num_workers", "num_shards",
)
VOCABULARY_FLAGS = ("input", "text_column", "max_documents", "vocab_size", "kind", "lowercase")
NEGATED = ("split_sentences", "lowercase")  # argparse flags whose negation is --no-NAME
MASK_FLAGS = ("mlm_probability", "seed")


def _flags_of(config_class: type) -> tuple[str, ...]:
    """Return the flags of a training command, without those that the pipeline sets itself."""
    ours = {"output_dir", "tokens", "model_name_or_path", "deepspeed_config", "mask_index",
            "annotations", "name", "output", "local_rank", "dry_run", "resume", "overwrite"}
    ours |= {f.name for f in dataclasses.fields(TaskOptions)}
    return tuple(f.name for f in dataclasses.fields(config_class) if f.name not in ours)


# The sections of a recipe, most of them flags of a command, and the keys each may hold.
SECTIONS: dict[str, tuple[str, ...]] = {
    "task": tuple(f.name for f in dataclasses.fields(TaskOptions)),
    "vocabulary": VOCABULARY_FLAGS,
    "general_text": TOKENIZE_FLAGS,
    "domain_text": TOKENIZE_FLAGS,
    "general": _flags_of(PretrainConfig),
    "classifier": _flags_of(FinetuneConfig),
    "annotate": _flags_of(AnnotateConfig),
    "scorer": _flags_of(FitScorerConfig),
    "score": _flags_of(ScoreConfig),
    "masks": MASK_FLAGS,
    "task_guided": tuple(
        flag for flag in _flags_of(PretrainConfig)
        if flag not in ("model_config", "from_scratch", "masking", "seed", "export_steps")
    ),
    "finetune": _flags_of(FinetuneConfig),
    "floors": ("naive_bayes", "untrained"),  # trivial baselines, on or off
}
OPTIONAL = ("vocabulary", "general")  # sections whose absence leaves a step out
DEFAULTS: dict[str, Any] = {
    "variables": {},
    "deepspeed_config": None,
    "encoder": None,
    "tokenizer": None,
    "arms": ["none", "random_matched", "selective"],
    "pretrain_seeds": [42],
    "export_steps": [],
    **{section: {} for section in SECTIONS},
    **{section: None for section in OPTIONAL},
}
REQUIRED = "???"


def load_recipe(path: str | Path, settings: list[str]) -> dict[str, Any]:
    """Read a recipe, what it extends, and `--set`; check every key; fill in the variables.

    Args:
        path: YAML file.
        settings: `key=value`: a variable of the recipe, or a setting as `task_guided.max_steps`.
    Returns:
        A dictionary with every key of `DEFAULTS`.
    Raises:
        ConfigError: unknown key or variable, a variable without a value, or a wrong type.
    """
    recipe = {**DEFAULTS, **_read_yaml(Path(path), ())}
    recipe["variables"] = dict(recipe["variables"] or {})
    for setting in settings:
        _apply_setting(recipe, setting)
    for key in recipe:
        _check_known(key, DEFAULTS, f"recipe {path}: unknown key")
    variables = recipe["variables"]
    missing = [name for name, value in variables.items() if value == REQUIRED]
    if missing:
        wanted = " ".join(f"{name}=..." for name in missing)
        raise ConfigError(f"recipe {path} needs a value for {', '.join(missing)}: type --set "
                          f"{wanted}")
    recipe = {
        key: value if key == "variables" else _fill_in(value, variables, path)
        for key, value in recipe.items()
    }
    _check_recipe(recipe, path)
    return recipe


def _read_yaml(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """Read one YAML file and merge it over the one that it extends, if any."""
    if path.resolve() in seen:
        raise ConfigError(f"recipe {path} extends itself: remove `extends` somewhere")
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in (REPOSITORY / "train/recipes").glob("*.yaml")))
        raise ConfigError(f"--recipe {path}: no such file; train/recipes has {known}")
    content = read_yaml(path, "write keys such as task and finetune", name=f"recipe {path}")
    _check_content(content, path)
    base = content.pop("extends", None)
    if base is None:
        return content
    return _merge(_read_yaml(path.parent / str(base), (*seen, path.resolve())), content)


def _check_content(content: dict[str, Any], path: Path) -> None:
    """Refuse permission to run a checkpoint's code, which only the command line may give."""
    entries: list[Any] = [content]
    while entries:
        entry = entries.pop()
        if isinstance(entry, dict):
            if entry.get("trust_remote_code", False) is not False:
                raise ConfigError(
                    f"recipe {path}: trust_remote_code cannot be given in a file; if you trust the "
                    "checkpoint, type --set finetune.trust_remote_code=true for each stage"
                )
            entries += entry.values()
        elif isinstance(entry, list):
            entries += entry


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge sections key by key; `over` replaces everything else."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(merged.get(key), dict) and isinstance(value, dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply_setting(recipe: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {setting}: write key=value, as --set task_guided.max_steps=500")
    try:
        value = parse_yaml(text)
    except ValueError:
        value = text
    section, _, flag = key.partition(".")
    if key in recipe["variables"]:
        recipe["variables"][key] = value
    elif flag and section in DEFAULTS:
        recipe[section] = {**(recipe[section] or {}), flag: value}
    else:
        flags = [f"{name}.{f}" for name in SECTIONS for f in SECTIONS[name]]
        known = [*recipe["variables"], *(name for name in DEFAULTS if name != "variables")]
        _check_known(key, known, f"--set {setting}: unknown variable or setting", also=flags)
        recipe[key] = value


def _check_known(name: str, known: Any, complaint: str, also: Any = ()) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(str(name), [*known, *also], n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    raise ConfigError(f"{complaint} {name!r}; {hint}")


def _fill_in(value: Any, variables: dict[str, Any], path: str | Path) -> Any:
    """Replace `${name}` in all strings below `value`; a variable alone keeps its type."""
    if isinstance(value, dict):
        return {key: _fill_in(entry, variables, path) for key, entry in value.items()}
    if isinstance(value, list):
        return [_fill_in(entry, variables, path) for entry in value]
    if not isinstance(value, str):
        return value
    names = re.findall(r"\$\{(\w*)\}", value)
    for name in names:
        _check_known(name, variables, f"recipe {path}: unknown variable")
    if len(names) == 1 and value == f"${{{names[0]}}}":
        return variables[names[0]]
    return re.sub(r"\$\{(\w*)\}", lambda match: str(variables[match[1]]), value)


def _check_recipe(recipe: dict[str, Any], path: str | Path) -> None:
    for section, flags in SECTIONS.items():
        content = recipe[section]
        if content is None and section in OPTIONAL:
            continue
        if not isinstance(content, dict):
            raise ConfigError(f"recipe {path}: {section} must hold flags, as `max_steps: 100`; "
                              f"got {content!r}")
        for flag in content:
            _check_known(flag, flags, f"recipe {path}: {section} has an unknown flag")
    for key in ("arms", "pretrain_seeds", "export_steps"):
        value = recipe[key]
        if not isinstance(value, list) or len(set(map(str, value))) != len(value):
            raise ConfigError(f"recipe {path}: {key} must be a list without repeats, as [1, 2]; "
                              f"got {value!r}")
        if key != "arms" and not all(type(n) is int and n >= 0 for n in value):
            raise ConfigError(f"recipe {path}: {key} must hold whole numbers; got {value}")
    for arm in recipe["arms"]:
        _check_known(arm, ("none", *STRATEGIES), f"recipe {path}: unknown arm")
    general, vocabulary = recipe["general"], recipe["vocabulary"]
    scratch, learnt = bool(general and general.get("model_config")), vocabulary is not None
    for wrong, message in (
        (not recipe["arms"] or not recipe["pretrain_seeds"],
         "arms and pretrain_seeds need at least one entry"),
        (not recipe["task"].get("task"), "task.task is missing; --set task.task=..."),
        (needs_domain(recipe) and not recipe["domain_text"].get("input"),
         "domain_text.input is missing; --set domain_text.input=..."),
        (bool(recipe["encoder"]) == scratch,
         "give either encoder (a checkpoint to start from) or general.model_config (fresh "
         "weights)"),
        (learnt and not (vocabulary.get("input") and vocabulary.get("vocab_size")),
         "vocabulary needs input and vocab_size"),
        (learnt and not scratch,
         "an encoder brings its vocabulary; remove vocabulary, or give general.model_config (fresh "
         "weights) instead of encoder"),
        (scratch and learnt == bool(recipe["tokenizer"]),
         "fresh weights need either tokenizer (one that exists) or vocabulary (one to learn)"),
        (general is not None and not recipe["general_text"].get("input"),
         "general needs general_text.input"),
        (recipe["export_steps"] and general is None,
         "export_steps are lengths of stage 1: give general, or leave export_steps out"),
    ):
        if wrong:
            raise ConfigError(f"recipe {path}: {message}")


def needs_domain(recipe: dict[str, Any]) -> bool:
    """Tell whether any arm trains on the in-domain text."""
    return any(arm != "none" for arm in recipe["arms"])
