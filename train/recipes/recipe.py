"""Read a recipe: its sections, variables and checks.

A recipe is YAML: variables, the task, the texts, flags for each stage, the scores and the arms to
compare (`train/recipes/arms.py`). It may extend another one of its folder. It is data: every key is
checked before anything runs, with "did you mean", and every value against the type of the option
that it sets, so that none can become another flag. What lets code run (`TYPED`) is not taken from a
file, only from the command line. Lengths of a recipe of ours are wishes (`fit_positions`): they are
shortened to the encoder that a user gives; those that the user wrote are refused.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from preprocess.errors import ConfigError
from preprocess.files import parse_yaml, read_yaml
from train.config import (
    SEED,
    AnnotateConfig,
    Bounds,
    FinetuneConfig,
    FitScorerConfig,
    PretrainConfig,
    ScoreConfig,
    TaskOptions,
)
from train.recipes.arms import (
    GENERAL_STORE,
    NONE,
    read_arms,
    read_scores,
    used_scores,
    with_matched,
)
from train.recipes.labels import LIMITED_OTHERWISE, read_budgets
from train.recipes.values import (
    SWITCH,
    TEXT,
    WHOLE,
    Option,
    check_known,
    check_value,
    options_of,
    shown_value,
)
from train.shipped import RECIPES, REPOSITORY, find_shipped

TYPED = ("trust_remote_code",)  # flags that no file may set
LENGTH, FITS = "max_seq_length", "fit_positions"
TOKENIZE_FLAGS = {
    "input": Option(list[str]), "text_column": TEXT, "where": Option(dict[str, str]),
    "split": TEXT, "split_sentences": SWITCH, "language": TEXT,
    "blank_line_documents": SWITCH, "strip_html": SWITCH, "max_documents": WHOLE,
    "num_workers": WHOLE, "num_shards": WHOLE,
}
VOCABULARY_FLAGS = {
    "input": Option(list[str]), "text_column": TEXT, "max_documents": WHOLE,
    "vocab_size": WHOLE, "kind": TEXT, "lowercase": SWITCH,
}
NEGATED = ("split_sentences", "lowercase")  # argparse flags whose negation is --no-NAME
MASK_FLAGS = {
    "mlm_probability": Option(float, Bounds(lambda rate: 0 < rate <= 1, "above 0 and at most 1")),
    "seed": WHOLE,
}
_BUDGET_FLAGS = ("label_budget", "label_seed")
_TASK_FLAGS = {name: option for name, option in options_of(TaskOptions).items()
               if name not in _BUDGET_FLAGS}
_OURS = {"output_dir", "tokens", "model_name_or_path", "deepspeed_config", "mask_index",
         "annotations", "name", "output", "local_rank", "dry_run", "resume", "overwrite",
         "also", *_TASK_FLAGS, *_BUDGET_FLAGS,
         "push_to_hub", "hub_private", "report_to"}  # no file may send anything elsewhere


def _flags_of(config_class: type) -> dict[str, Option]:
    """Return the flags of a training command, without those that the pipeline sets itself."""
    return {name: option for name, option in options_of(config_class).items()
            if name not in _OURS}


# The sections of a recipe, most of them flags of a command, and the keys each may hold.
SECTIONS: dict[str, dict[str, Option]] = {
    "task": _TASK_FLAGS,
    "vocabulary": VOCABULARY_FLAGS,
    "general_text": TOKENIZE_FLAGS,
    "domain_text": {**TOKENIZE_FLAGS, "drop_leaked": SWITCH},
    "general": _flags_of(PretrainConfig),
    "classifier": _flags_of(FinetuneConfig),
    "annotate": _flags_of(AnnotateConfig),
    "scorer": _flags_of(FitScorerConfig),
    "score": {flag: option for flag, option in _flags_of(ScoreConfig).items()
              if flag not in ("measure", "reference", "num_passes", "whole_words")},
    "masks": MASK_FLAGS,
    "task_guided": {
        flag: option for flag, option in _flags_of(PretrainConfig).items()
        if flag not in ("model_config", "from_scratch", "masking", "seed")
    },
    "finetune": _flags_of(FinetuneConfig),
    "floors": {"naive_bayes": SWITCH, "untrained": SWITCH},  # trivial baselines
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
    "scores": {},
    "arms": ["none", "random_matched", "selective"],
    "pretrain_seeds": [42],
    "export_steps": [],
    "label_budgets": [],
    **{section: {} for section in SECTIONS},
    **{section: None for section in OPTIONAL},
}
REQUIRED = "???"


def load_recipe(path: str | Path, settings: list[str]) -> dict[str, Any]:
    """Read a recipe, what it extends, and `--set`; check every key; fill in the variables.

    Args:
        path: YAML file, or the name of one of ours.
        settings: `key=value`: a variable of the recipe, or a setting as `task_guided.max_steps`.
    Returns:
        A dictionary with every key of `DEFAULTS`; `scores` and `arms` are what `read_scores` and
        `read_arms` make of them.
    Raises:
        ConfigError: unknown key or variable, a variable without a value, or a wrong type.
    """
    path = find_shipped(path, RECIPES, "--recipe")
    recipe = {**DEFAULTS, **_read_yaml(path, (), path.parent.resolve())}
    recipe["variables"] = dict(recipe["variables"] or {})
    _check_sections(recipe, path)
    for setting in settings:
        _apply_setting(recipe, setting)
    for key in recipe:
        check_known(key, DEFAULTS, f"recipe {path}: unknown key")
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
    content = read_yaml(path, "write keys such as task and finetune", name=f"recipe {path}")
    _check_content(content, path)
    if path.resolve().parent == RECIPES.resolve():
        for section in content.values():
            if isinstance(section, dict) and LENGTH in section:
                section[FITS] = True
    base = content.pop("extends", None)
    if base is None:
        return content
    extended = path.parent / check_value(base, TEXT, f"recipe {path}: extends")
    if not extended.exists() and "/" not in str(base):
        extended = find_shipped(base, RECIPES, f"recipe {path}: extends")
    inside = (home, REPOSITORY / "train/recipes")
    if not any(extended.resolve().is_relative_to(folder) for folder in inside):
        raise ConfigError(f"recipe {path}: extends {shown_value(base)} outside its folder and "
                          "train/recipes; copy that file beside it")
    if not extended.is_file():
        raise ConfigError(f"recipe {path}: extends {base}: no such file; give one beside it")
    return _merge(_read_yaml(extended, (*seen, path.resolve()), home), content)


def _check_content(content: dict[str, Any], path: Path) -> None:
    """Refuse permission to run a checkpoint's code, which only the command line may give."""
    if not isinstance(content.get("variables"), dict | None):
        raise ConfigError(f"recipe {path}: variables must hold names and values, as `text: a.txt`; "
                          f"got {shown_value(content['variables'])}")
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
    merged = without_wish(base) if LENGTH in over else dict(base)
    for key, value in over.items():
        both = isinstance(merged.get(key), dict) and isinstance(value, dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def without_wish(section: dict[str, Any]) -> dict[str, Any]:
    """Return a section that gets another length, without what was said of the one before."""
    return {flag: value for flag, value in section.items() if flag != FITS}


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
    elif flag and section in (*SECTIONS, "scores"):
        content = recipe[section] or {}
        if not isinstance(content, dict):
            raise ConfigError(f"--set {setting}: {section} is {shown_value(content)} and not names "
                              "with values; leave that out")
        recipe[section] = {**(without_wish(content) if flag == LENGTH else content), flag: value}
    else:
        flags = [f"{name}.{f}" for name in SECTIONS for f in SECTIONS[name]]
        known = [*recipe["variables"], *(name for name in DEFAULTS if name != "variables")]
        check_known(key, known, f"--set {setting}: unknown variable or setting", also=flags)
        recipe[key] = value


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
        check_known(name, variables, f"recipe {path}: unknown variable")
    if len(names) == 1 and value == f"${{{names[0]}}}":
        return variables[names[0]]
    return re.sub(r"\$\{(\w*)\}", lambda match: str(variables[match[1]]), value)


def _check_sections(recipe: dict[str, Any], path: str | Path) -> None:
    for section in SECTIONS:
        content = recipe[section]
        if not isinstance(content, dict) and not (content is None and section in OPTIONAL):
            raise ConfigError(f"recipe {path}: {section} must hold flags, as `max_steps: 100`; "
                              f"got {shown_value(content)}")


def _check_recipe(recipe: dict[str, Any], path: str | Path) -> None:
    """Check all keys and values, and put the values in as their commands take them."""
    _check_sections(recipe, path)
    for section, flags in SECTIONS.items():
        for flag in recipe[section] or ():
            check_known(flag, flags, f"recipe {path}: {section} has an unknown flag")
        if recipe[section] is not None:
            recipe[section] = {
                flag: check_value(value, flags[flag], f"recipe {path}: {section}.{flag}")
                for flag, value in recipe[section].items()
            }
    for key in PATHS:
        recipe[key] = check_value(recipe[key], TEXT, f"recipe {path}: {key}")
    for key in ("arms", "pretrain_seeds", "export_steps"):
        value = recipe[key]
        if not isinstance(value, list) or len(set(map(str, value))) != len(value):
            raise ConfigError(f"recipe {path}: {key} must be a list without repeats, as [1, 2]; "
                              f"got {value!r}")
        if key != "arms" and not all(type(n) is int and SEED.holds(n) for n in value):
            raise ConfigError(f"recipe {path}: {key} must hold whole numbers {SEED.words}; got "
                              f"{shown_value(value)}")
    recipe["label_budgets"] = read_budgets(recipe["label_budgets"], f"recipe {path}")
    general_text = bool(recipe["general_text"].get("input"))
    recipe["scores"] = read_scores(recipe["scores"], f"recipe {path}", general_text,
                                   recipe["score"])
    recipe["arms"] = read_arms(recipe["arms"], recipe["scores"], f"recipe {path}")
    _check_lengths(recipe["task_guided"], f"recipe {path}: task_guided.export_steps")
    for section in LIMITED_OTHERWISE if recipe["label_budgets"] else ():
        if recipe[section].get("max_train_samples") is not None:
            raise ConfigError(f"recipe {path}: label_budgets and {section}.max_train_samples both "
                              "limit the labelled examples; drop the latter, as with --set "
                              f"{section}.max_train_samples=null")
    general, vocabulary = recipe["general"], recipe["vocabulary"]
    end = (general or {}).get("max_steps")
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
        (end is not None and not all(0 < n <= end for n in recipe["export_steps"]),
         f"export_steps {shown_value(recipe['export_steps'])}: must be lengths of stage 1, from 1 "
         f"to general.max_steps {end}"),
    ):
        if wrong:
            raise ConfigError(f"recipe {path}: {message}")


def _check_lengths(stage2: dict[str, Any], name: str) -> None:
    """Refuse lengths of stage 2 that are not before its end, or not different."""
    lengths, end = stage2.get("export_steps") or [], stage2.get("max_steps")
    if lengths and end is None:
        raise ConfigError(f"{name} {shown_value(lengths)}: must be below task_guided.max_steps, "
                          "which is missing; give it")
    if len(set(lengths)) < len(lengths) or not all(0 < length < (end or 0) for length in lengths):
        raise ConfigError(f"{name} {shown_value(lengths)}: must be different numbers above 0 and "
                          f"below task_guided.max_steps {end}, whose model is fine-tuned anyway")


def needs_domain(recipe: dict[str, Any]) -> bool:
    """Tell whether any arm trains on the in-domain text."""
    return any(arm.name != NONE for arm in recipe["arms"])


def needs_general(recipe: dict[str, Any]) -> bool:
    """Tell whether anything reads the general text: stage 1, or scores that compare with it."""
    used = used_scores(with_matched(recipe["arms"]), recipe["scores"])
    compared = (recipe["scores"][name].options.get("against") for name in used)
    return recipe["general"] is not None or GENERAL_STORE in compared


def origin_of(path: str | Path, key: str) -> str:
    """Return the variable from which a recipe takes a setting, else the setting itself.

    Args:
        key: `SECTION.FLAG`, or a key outside of a section.
    """
    path = find_shipped(path, RECIPES, "--recipe")
    raw: Any = _read_yaml(path, (), path.parent.resolve())
    for part in key.split("."):
        raw = raw.get(part) if isinstance(raw, dict) else None
    found = re.fullmatch(r"\$\{(\w+)\}", raw) if isinstance(raw, str) else None
    return found[1] if found else key
