"""Read a recipe: its sections, variables and checks.

A recipe is YAML: variables, the task, the texts, flags for each stage, the arms to compare. It may
extend another one of its folder. It is data: every key is checked before anything runs, with "did
you mean", and every value against the type of the option that it sets, so that none can become
another flag. What lets code run (`TYPED`) is not taken from a file, only from the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from preprocess.errors import ConfigError, visible
from preprocess.files import parse_yaml, read_yaml
from preprocess.masking import STRATEGIES
from train.config import (
    AnnotateConfig,
    Bounds,
    FinetuneConfig,
    FitScorerConfig,
    PretrainConfig,
    ScoreConfig,
    TaskOptions,
)

REPOSITORY = Path(__file__).resolve().parents[2]
TYPED = ("trust_remote_code",)  # flags that no file may set


class Option(NamedTuple):
    """What a flag takes: its type, and the bounds of its value."""

    kind: Any
    bounds: Bounds | None = None


class _Seeds:
    """The kind of `seeds`: numbers separated by commas; YAML may hold a list or one number."""


_TEXT, _WHOLE, _SWITCH = Option(str), Option(int), Option(bool)
TOKENIZE_FLAGS = {
    "input": Option(list[str]), "text_column": _TEXT, "where": Option(dict[str, str]),
    "split": _TEXT, "split_sentences": _SWITCH, "language": _TEXT,
    "blank_line_documents": _SWITCH, "max_documents": _WHOLE, "num_workers": _WHOLE,
    "num_shards": _WHOLE,
}
VOCABULARY_FLAGS = {
    "input": Option(list[str]), "text_column": _TEXT, "max_documents": _WHOLE,
    "vocab_size": _WHOLE, "kind": _TEXT, "lowercase": _SWITCH,
}
NEGATED = ("split_sentences", "lowercase")  # argparse flags whose negation is --no-NAME
MASK_FLAGS = {"mlm_probability": Option(float), "seed": _WHOLE}


def _options_of(config_class: type) -> dict[str, Option]:
    """Return the flags of a training command, as its dataclass has them."""
    kinds = get_type_hints(config_class)
    return {option.name: Option(_Seeds if option.name == "seeds" else kinds[option.name],
                                option.metadata["bounds"])
            for option in dataclasses.fields(config_class)}


_TASK_FLAGS = _options_of(TaskOptions)
_OURS = {"output_dir", "tokens", "model_name_or_path", "deepspeed_config", "mask_index",
         "annotations", "name", "output", "local_rank", "dry_run", "resume", "overwrite",
         *_TASK_FLAGS}


def _flags_of(config_class: type) -> dict[str, Option]:
    """Return the flags of a training command, without those that the pipeline sets itself."""
    return {name: option for name, option in _options_of(config_class).items()
            if name not in _OURS}


# The sections of a recipe, most of them flags of a command, and the keys each may hold.
SECTIONS: dict[str, dict[str, Option]] = {
    "task": _TASK_FLAGS,
    "vocabulary": VOCABULARY_FLAGS,
    "general_text": TOKENIZE_FLAGS,
    "domain_text": TOKENIZE_FLAGS,
    "general": _flags_of(PretrainConfig),
    "classifier": _flags_of(FinetuneConfig),
    "annotate": _flags_of(AnnotateConfig),
    "scorer": _flags_of(FitScorerConfig),
    "score": _flags_of(ScoreConfig),
    "masks": MASK_FLAGS,
    "task_guided": {
        flag: option for flag, option in _flags_of(PretrainConfig).items()
        if flag not in ("model_config", "from_scratch", "masking", "seed", "export_steps")
    },
    "finetune": _flags_of(FinetuneConfig),
    "floors": {"naive_bayes": _SWITCH, "untrained": _SWITCH},  # trivial baselines
}
PATHS = ("deepspeed_config", "encoder", "tokenizer")  # keys outside of a section that are texts
# Flags that are on by default, whose negation is --no_NAME.
SWITCHED_OFF = {option.name for option in dataclasses.fields(PretrainConfig)
                if option.default is True}
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
    recipe = {**DEFAULTS, **_read_yaml(Path(path), (), Path(path).parent.resolve())}
    recipe["variables"] = dict(recipe["variables"] or {})
    _check_sections(recipe, path)
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


def _read_yaml(path: Path, seen: tuple[Path, ...], home: Path) -> dict[str, Any]:
    """Read one YAML file and merge it over the one that it extends, if any.

    Args:
        seen: files on the way to this one. home: folder of the recipe that the user named.
    """
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
    extended = path.parent / _check_value(base, _TEXT, f"recipe {path}: extends")
    inside = (home, REPOSITORY / "train/recipes")
    if not any(extended.resolve().is_relative_to(folder) for folder in inside):
        raise ConfigError(f"recipe {path}: extends {_shown(base)} outside its folder and "
                          "train/recipes; copy that file beside it")
    return _merge(_read_yaml(extended, (*seen, path.resolve()), home), content)


def _check_content(content: dict[str, Any], path: Path) -> None:
    """Refuse permission to run a checkpoint's code, which only the command line may give."""
    if not isinstance(content.get("variables"), dict | None):
        raise ConfigError(f"recipe {path}: variables must hold names and values, as `text: a.txt`; "
                          f"got {_shown(content['variables'])}")
    entries: list[Any] = [content]
    while entries:
        entry = entries.pop()
        if isinstance(entry, dict):
            for flag in TYPED:
                if entry.get(flag, False) is not False:
                    raise ConfigError(
                        f"recipe {path}: {flag} cannot be given in a file; if you trust the "
                        f"checkpoint, type --set finetune.{flag}=true for each stage"
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
    elif flag and section in SECTIONS:
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


def _shown(value: Any) -> str:
    text = visible(repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


# Each returns the value as the command takes it, or raises ValueError or TypeError.


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError
    text = str(value)
    if text.startswith("-") or visible(text, kept="\u00ad") != text:
        raise ValueError
    return text


def _number(value: Any) -> float:
    found = value if type(value) in (int, float) else float(_text(value))  # 1e-5 is text in YAML
    if not math.isfinite(found):
        raise ValueError
    return found


def _whole(value: Any) -> int:
    found = _number(value)
    if found != int(found):
        raise ValueError
    return int(found)


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _seeds(value: Any) -> str:
    parts = value if isinstance(value, list) else str(value).split(",")
    return ",".join(str(_whole(part)) for part in parts)


READERS: dict[Any, tuple[Callable[[Any], Any], str]] = {
    str: (_text, "a text without control characters that does not begin with -"),
    int: (_whole, "a whole number"),
    float: (_number, "a number"),
    bool: (_switch, "true or false"),
    _Seeds: (_seeds, "whole numbers separated by commas, as 13,43,83"),
}


def _check_value(value: Any, option: Option, name: str) -> Any:
    """Return a value as the option takes it.

    Args:
        name: of the option, with the recipe, for the message.
    Raises:
        ConfigError: of another type, out of bounds, or a text that a command would take for a flag.
    """
    kinds = [kind for kind in get_args(option.kind) if kind is not NoneType]
    origin, kind = get_origin(option.kind), option.kind
    if value is None:
        return None
    if origin is list:
        entries = value if isinstance(value, list) else [value]
        return [_check_value(entry, Option(kinds[0]), name) for entry in entries if entry != []]
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{name} {_shown(value)}: must be names and values, as {{a: b}}")
        return {_check_value(key, _TEXT, name): _check_value(entry, _TEXT, name)
                for key, entry in value.items()}
    if origin is Literal:
        choices = [str(choice) for choice in kinds]
        if isinstance(value, bool):  # YAML reads `yes` and `no` as that
            value = "yes" if value else "no"
        if value not in choices:
            raise ConfigError(f"{name} {_shown(value)}: must be {' or '.join(choices)}")
        return value
    if origin is not None:  # X | None, or a number | "auto"
        kind = kinds[0]
        if str in kinds and option.bounds and isinstance(value, str):
            return _check_bounds(_text_or_number(value), option, name)
    read, words = READERS[kind]
    try:
        found = read(value)
    except (ValueError, TypeError, OverflowError):
        raise ConfigError(f"{name} {_shown(value)}: must be {words}") from None
    return _check_bounds(found, option, name)


def _text_or_number(value: str) -> Any:
    return int(value) if value.isdecimal() else value


def _check_bounds(value: Any, option: Option, name: str) -> Any:
    try:
        good = option.bounds is None or option.bounds.holds(value)
    except TypeError:  # a text where a number may stand
        good = False
    if not good and option.bounds:
        raise ConfigError(f"{name} {_shown(value)}: must be {option.bounds.words}")
    return value


def _check_sections(recipe: dict[str, Any], path: str | Path) -> None:
    for section in SECTIONS:
        content = recipe[section]
        if not isinstance(content, dict) and not (content is None and section in OPTIONAL):
            raise ConfigError(f"recipe {path}: {section} must hold flags, as `max_steps: 100`; "
                              f"got {_shown(content)}")


def _check_recipe(recipe: dict[str, Any], path: str | Path) -> None:
    """Check all keys and values, and put the values in as their commands take them."""
    _check_sections(recipe, path)
    for section, flags in SECTIONS.items():
        for flag in recipe[section] or ():
            _check_known(flag, flags, f"recipe {path}: {section} has an unknown flag")
        if recipe[section] is not None:
            recipe[section] = {
                flag: _check_value(value, flags[flag], f"recipe {path}: {section}.{flag}")
                for flag, value in recipe[section].items()
            }
    for key in PATHS:
        recipe[key] = _check_value(recipe[key], _TEXT, f"recipe {path}: {key}")
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
