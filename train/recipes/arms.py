"""Scores and arms of a recipe: what they are called, what makes them, and what fits together.

    scores:
      task: {measure: scorer}
      words: {measure: tfidf}
      both: {combine: rank, of: [task, words]}
    arms: [none, {name: keywords, strategy: top, scores: words, rate: 0.2}]

Scores are made once and shared by all arms that name them; those that no arm needs are not made.
The score `task` is there without being written, and is what an arm takes that names none. The name
of a strategy alone is an arm of that name. A control takes the masks of the arm that it matches for
its measure, whichever of the two comes first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from preprocess.errors import ConfigError
from preprocess.masking import MATCHED, STRATEGIES, read_corruption
from preprocess.masking.combine import COMBINED, RANKED, check_scale
from preprocess.masking.measures import COUNTED
from train.config import Bounds, ScoreConfig
from train.recipes.values import (
    TEXT,
    Option,
    check_known,
    check_value,
    options_of,
    shown_value,
)

NONE = "none"  # the arm without task-guided pre-training; also "no units"
TASK_SCORES = "task"  # of the token scorer, unless the recipe says otherwise
GENERAL_STORE = "general"  # what `against` may name: the recipe's own general text
RESERVED = (NONE, "naive_bayes", "untrained")  # the last two are baselines of a report
# What decides the scores of a measure, by what makes them: a network, or counting.
NETWORK_FLAGS = {name: option for name, option in options_of(ScoreConfig).items()
                 if name in ("num_passes", "whole_words", "reference", "max_seq_length", "dtype",
                             "batch_tokens")}
WORD_FLAGS = {"against": TEXT, "lexicon": TEXT, "language": TEXT}
NEEDED_FLAGS = {"reference": "reference", "store": "against", "lexicon": "lexicon"}  # by need
# Flags of build_masks.py, the first of single strategies. It would refuse other values itself, but
# only after the training before it; and each epoch is an index that is planned.
RULE_OPTIONS = {
    "centre": Option(float, Bounds(lambda value: 0 <= value <= 1, "from 0 to 1")),
    "temperature": Option(float, Bounds(lambda value: value > 0, "above 0")),
}
EPOCHS = Option(int, Bounds(lambda value: 1 <= value <= 1000, "between 1 and 1000"))
RULE_FLAGS = {"units": TEXT, "epochs": EPOCHS, **RULE_OPTIONS}
ARM_KEYS = ("name", "strategy", "scores", "match", "rate", "corruption", *RULE_FLAGS)
WITH_UNITS = [name for name, measure in COUNTED.items() if measure.has_units]
_NAME = re.compile(r"[a-z0-9_][a-z0-9_-]{0,39}")
# What the pipeline itself appends.
_OWN_ENDING = re.compile(r"(^|-)((seed|step_|epoch|labels|steps)\d+|labelsall)$")
_SCHEDULE = re.compile(r"([\d.]+):([\d.]+)")


@dataclass(frozen=True)
class NamedScores:
    """One entry of `scores`.

    Attributes:
        name: of the entry, and of the array beside the store.
        measure: entry of `MEASURES`; "" where others are combined.
        needs: what that needs beside the store.
        boundary: whether 0 parts important tokens from others.
        reads_labels: whether labels of the task have gone into it.
        combine, parts: how, and which other entries.
        options: flags of the command that makes them.
    """

    name: str
    measure: str
    needs: tuple[str, ...] = ()
    boundary: bool = True
    reads_labels: bool = False
    combine: str = ""
    parts: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_counted(self) -> bool:
        """Whether no network makes them, so that they are the same after any stage 1."""
        return self.measure in COUNTED

    @property
    def has_units(self) -> bool:
        """Whether they come with units that can be masked as a whole."""
        return self.measure in WITH_UNITS


DEFAULT_SCORES = NamedScores(TASK_SCORES, "scorer", ("scorer",), reads_labels=True)


@dataclass(frozen=True)
class PlannedArm:
    """One entry of `arms`: a strategy and all that it works with.

    Attributes:
        name: of the arm; also of its mask index, if it has one.
        strategy: entry of `STRATEGIES`; "" for the arm without task-guided pre-training.
        scores: entry of `scores`, or "".
        match: the arm whose masks a control measures itself by, or "".
        rate: mask rate as typed: a number, or "FIRST:LAST" for a strategy that is drawn.
        corruption: three percentages, as "80,10,10".
        rules: further flags of build_masks.py.
    """

    name: str
    strategy: str = ""
    scores: str = ""
    match: str = ""
    rate: float | str | None = None
    corruption: str | None = None
    rules: dict[str, Any] = field(default_factory=dict)

    @property
    def drawn(self) -> bool:
        """Whether masks are drawn anew in each epoch rather than built once."""
        return bool(self.strategy) and STRATEGIES[self.strategy].drawn

    @property
    def units(self) -> str:
        """Entry of `scores` whose units are masked as a whole, or ""."""
        units = self.rules.get("units") or NONE
        return "" if units in (NONE, "words") else units


def default_policy(name: str) -> PlannedArm:
    """Return what a strategy alone stands for, as an entry of `arms`."""
    needs = STRATEGIES[name].needs
    control = "match" in needs
    return PlannedArm(name, name, scores=TASK_SCORES if "scores" in needs and not control else "",
                  match=MATCHED if control else "")


# ------------------------------------------------------------------------------------- scores


def read_scores(content: Any, recipe: str, general_text: bool,
                defaults: dict[str, Any]) -> dict[str, NamedScores]:
    """Read the section `scores`.

    Args:
        recipe: how messages begin.
        general_text: whether the recipe has a general text to compare counts with.
        defaults: the section `score`: flags of all scores by a network.
    Raises:
        ConfigError: a name, measure or option that does not exist, one that is missing, or scores
            that are combined of themselves.
    """
    if not isinstance(content, dict):
        raise ConfigError(f"{recipe}: scores must hold names, as `words: {{measure: tfidf}}`; got "
                          f"{shown_value(content)}")
    named = {_named(name, recipe, "scores"): entry for name, entry in content.items()}
    found = {name: _one_score(name, entry, f"{recipe}: scores.{name}", general_text, defaults)
             for name, entry in named.items()}
    found.setdefault(TASK_SCORES, DEFAULT_SCORES)
    for scores in found.values():
        for part in scores.parts:
            check_known(part, found, f"{recipe}: scores.{scores.name} combines unknown scores")
    for scores in found.values():
        _refuse_circle(scores.name, lambda name: found[name].parts,
                       f"{recipe}: scores.{scores.name} is combined of itself")

    def parted(scores: NamedScores) -> bool:
        return scores.boundary and all(parted(found[part]) for part in scores.parts)

    def labelled(scores: NamedScores) -> bool:
        return scores.reads_labels or any(labelled(found[part]) for part in scores.parts)

    found = {name: replace(scores, boundary=parted(scores), reads_labels=labelled(scores))
             for name, scores in found.items()}
    _check_scales(found, recipe)
    return found


def _check_scales(found: Mapping[str, NamedScores], recipe: str) -> None:
    """Refuse to combine scores of different scales: score_words.py would, after all training."""
    def unit(scores: NamedScores) -> str:
        if not scores.combine:
            from train.stages.measures import MEASURES

            return MEASURES[scores.measure].unit
        return unit(found[scores.parts[0]]) if COMBINED[scores.combine].same_scale else RANKED

    for scores in found.values():
        if scores.combine and COMBINED[scores.combine].same_scale:
            measures = [{"unit": unit(found[part]), "boundary": found[part].boundary}
                        for part in scores.parts]
            try:
                check_scale(scores.parts, measures, scores.combine)
            except ConfigError as error:
                raise ConfigError(f"{recipe}: scores.{scores.name}: {error}") from None


def _one_score(name: str, entry: Any, where: str, general_text: bool,
               defaults: dict[str, Any]) -> NamedScores:
    if not isinstance(entry, dict) or ("measure" in entry) == ("combine" in entry):
        raise ConfigError(f"{where} {shown_value(entry)}: must have a measure, as {{measure: "
                          "tfidf}, or combine others, as {combine: rank, of: [a, b]}")
    if "combine" in entry:
        for key in entry:
            check_known(key, ("combine", "of"), f"{where} has an unknown key")
        check_known(entry["combine"], COMBINED, f"{where} has an unknown way to combine")
        parts = entry.get("of")
        if not isinstance(parts, list) or len(parts) < 2 or len(set(map(str, parts))) < len(parts):
            raise ConfigError(f"{where} {shown_value(entry)}: `of` must list two or more scores, "
                              "as {combine: rank, of: [a, b]}")
        boundary = COMBINED[entry["combine"]].boundary  # if all its parts have one
        return NamedScores(name, "", boundary=boundary, combine=entry["combine"],
                           parts=tuple(parts))
    from train.stages.measures import MEASURES  # brings torch, which most recipes do without

    measure = entry["measure"]
    check_known(measure, MEASURES, f"{where} has an unknown measure")
    if measure in WITH_UNITS and name in (NONE, "words"):
        raise ConfigError(f"{where}: `units: {name}` has a meaning of its own; give scores that "
                          "have units another name")
    flags = WORD_FLAGS if measure in COUNTED else NETWORK_FLAGS
    options = {}
    for key, value in entry.items():
        if key != "measure":
            check_known(key, flags, f"{where} has an option that {measure} does not take:")
            options[key] = check_value(value, flags[key], f"{where}.{key}")
    needs = MEASURES[measure].needs
    if "store" in needs and general_text:
        options.setdefault(NEEDED_FLAGS["store"], GENERAL_STORE)
    for need, flag in NEEDED_FLAGS.items():
        if need in needs and not options.get(flag):
            raise ConfigError(f"{where}: {measure} needs {flag}, as {{measure: {measure}, {flag}: "
                              "...}" + (", or a general_text" if need == "store" else ""))
        if need not in needs and options.get(flag):
            raise ConfigError(f"{where}.{flag}: {measure} does not read it; leave it out")
    if measure not in COUNTED:
        try:
            ScoreConfig(measure=measure, model_name_or_path="M", tokens="P", name=name,
                        **{**defaults, **options})
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    if options.get("against") == GENERAL_STORE and not general_text:
        raise ConfigError(f"{where}.against: there is no general_text; give general_text.input, or "
                          "the prefix of a token store")
    return NamedScores(name, measure, tuple(needs), MEASURES[measure].boundary,
                       MEASURES[measure].reads_labels, options=options)


# --------------------------------------------------------------------------------------- arms


def read_arms(content: Sequence[Any], scores: Mapping[str, NamedScores],
              recipe: str) -> list[PlannedArm]:
    """Read the list `arms`.

    Raises:
        ConfigError: a name or value that does not exist or does not fit, or arms that match each
            other in a circle.
    """
    arms: dict[str, PlannedArm] = {}
    matched = set()  # arms that were named to be matched; the default needs no arm
    for entry in content:
        if isinstance(entry, str):
            check_known(entry, (NONE, *STRATEGIES), f"{recipe}: unknown arm")
            arm = PlannedArm(NONE) if entry == NONE else default_policy(entry)
        else:
            arm = _one_arm(entry, scores, recipe)
            matched |= {arm.name} if isinstance(entry, dict) and entry.get("match") else set()
        if arm.name in arms:
            raise ConfigError(f"{recipe}: two arms are called {arm.name}; give one another name")
        arms[arm.name] = arm
    for arm in arms.values():
        where = f"{recipe}: arm {arm.name} matches"
        if arm.name in matched and arm.match not in arms:
            raise ConfigError(f"{where} {shown_value(arm.match)}, which is no arm of this recipe; "
                              f"there are {', '.join(arms)}")
        other = arms.get(arm.match)
        if other and (not other.strategy or other.drawn):
            raise ConfigError(f"{where} {other.name}, which has no mask index to match; name an "
                              "arm whose masks are built once")
        if other and "policy" in STRATEGIES[arm.strategy].needs and not other.scores:
            raise ConfigError(f"{where} {other.name}, which has no scores that {arm.strategy} "
                              "could read; name an arm that has")
        _refuse_circle(arm.name, lambda name: [
            one for one in (arms[name].match,) if one in arms],
            f"{recipe}: arm {arm.name} is matched to itself, through others or directly")
    for policy in with_matched(list(arms.values())):
        default = "" if policy.name in arms else ", which a control matches by default"
        _check_scores(policy, scores, f"{recipe}: arm {policy.name}{default}")
    return list(arms.values())


def _check_scores(policy: PlannedArm, scores: Mapping[str, NamedScores], where: str) -> None:
    """Refuse scores that a strategy cannot use: nothing but its own step would, after training."""
    if policy.scores and "boundary" in STRATEGIES[policy.strategy].needs \
            and not scores[policy.scores].boundary:
        others = [key for key, one in STRATEGIES.items()
                  if "scores" in one.needs and "boundary" not in one.needs]
        raise ConfigError(f"{where}: {policy.strategy} takes scores above 0, and 0 means nothing "
                          f"in {policy.scores}; for these scores take strategy "
                          f"{', '.join(others)}")
    if policy.units and not scores[policy.units].has_units:
        raise ConfigError(f"{where}: units {policy.units}: these scores have no units; give words, "
                          f"none, or scores of measure {' or '.join(WITH_UNITS)}")


def _one_arm(entry: Any, scores: Mapping[str, NamedScores], recipe: str) -> PlannedArm:
    """Read an arm that is written out."""
    if not isinstance(entry, dict) or not {"name", "strategy"} <= entry.keys():
        raise ConfigError(f"{recipe}: arms: {shown_value(entry)}: must be the name of a strategy, "
                          "or have a name and a strategy, as {name: words, strategy: "
                          f"{next(iter(STRATEGIES))}}}")
    name = _named(entry["name"], recipe, "arms")
    where = f"{recipe}: arm {name}"
    if name in RESERVED:
        raise ConfigError(f"{where}: the names {', '.join(RESERVED)} are taken; give another one")
    for key in entry:
        check_known(key, ARM_KEYS, f"{where} has an unknown key")
    strategy = entry["strategy"]
    check_known(strategy, STRATEGIES, f"{where} has an unknown strategy")
    given = {key for key, value in entry.items() if value is not None}
    record, useless = STRATEGIES[strategy], []
    control = "match" in record.needs
    if control:  # all of these are those of the arm that it matches
        useless = ["scores", "rate", "units", *RULE_OPTIONS]
    elif record.drawn:
        useless = ["scores", "match", *RULE_FLAGS]
    else:
        useless = ["match", *(one for one in RULE_OPTIONS if one not in record.options),
                   *([] if "scores" in record.needs else ["scores"])]
    for key in useless:
        if key in given:
            raise ConfigError(f"{where}: {key} has no use with {strategy}"
                              + (", which takes that of the arm that it matches" if control else "")
                              + "; leave it out")
    default = default_policy(strategy)
    named = entry.get("scores") or default.scores
    if named:
        check_known(named, scores, f"{where} has unknown scores")
    rules = {key: check_value(entry[key], RULE_FLAGS[key], f"{where}: {key}")
             for key in RULE_FLAGS if key in given}
    if "units" in rules:
        check_known(rules["units"], (NONE, "words", *scores), f"{where} has unknown units")
    match = entry.get("match")
    return PlannedArm(
        name, strategy, named,
        default.match if match is None else check_value(match, TEXT, f"{where}: match"),
        _rate(entry.get("rate"), record.drawn, f"{where}: rate"),
        _corruption(entry.get("corruption"), f"{where}: corruption"), rules,
    )


def _rate(value: Any, drawn: bool, name: str) -> float | str | None:
    """Return a mask rate as its command takes it: a number, or a schedule `FIRST:LAST`."""
    if value is None:
        return None
    schedule = _SCHEDULE.fullmatch(value) if isinstance(value, str) else None
    if schedule and not drawn:
        raise ConfigError(f"{name} {shown_value(value)}: a schedule needs a strategy that draws in "
                          "each epoch; give one number")
    rates = [check_value(part, Option(float), name)
             for part in (schedule.groups() if schedule else [value])]
    if not all(0 < rate < 1 or rate == 1 and not drawn for rate in rates):
        raise ConfigError(f"{name} {shown_value(value)}: must be above 0 and "
                          + ("below 1, as 0.15 or, from the first step to the last, 0.30:0.15"
                             if drawn else "at most 1, as 0.15"))
    return value if schedule else rates[0]


def _corruption(value: Any, name: str) -> str | None:
    """Return percentages of [MASK], random and unchanged tokens as one word."""
    if value is None:
        return None
    word = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    try:
        shares = read_corruption(word)
    except ValueError:
        raise ConfigError(f"{name} {shown_value(value)}: must be three percentages of together "
                          "100, as [80, 10, 10]") from None
    return ",".join(f"{share:.12g}" for share in shares)


# --------------------------------------------------------------------------------- what is used


def used_scores(policies: Sequence[PlannedArm], scores: Mapping[str, NamedScores]) -> list[str]:
    """Return the scores that some arms need, each after those that it is combined of."""
    found: dict[str, None] = {}

    def add(name: str) -> None:
        for part in scores[name].parts:
            add(part)
        found.setdefault(name)

    for policy in policies:
        for name in (policy.scores, policy.units):
            if name:
                add(name)
    return list(found)


def with_matched(policies: Sequence[PlannedArm]) -> list[PlannedArm]:
    """Return the arms whose masks are built, each after the one that it matches.

    A control's default is matched even if it is no arm: then only its masks are built.
    """
    known = {policy.name: policy for policy in policies}
    found: dict[str, PlannedArm] = {}

    def add(policy: PlannedArm) -> None:
        if policy.match:
            add(known.get(policy.match) or default_policy(policy.match))
        found.setdefault(policy.name, policy)

    for policy in policies:
        if policy.strategy and not policy.drawn:
            add(policy)
    return list(found.values())


def _named(name: Any, recipe: str, section: str) -> str:
    """Return a name that may become part of a file's."""
    text = str(name)
    if not _NAME.fullmatch(text) or _OWN_ENDING.search(text):
        raise ConfigError(f"{recipe}: {section}: the name {shown_value(name)} must have 1 to 40 of "
                          "the characters a-z, 0-9, _ and -, not begin with -, and not end as "
                          "-seed1, -step_1, -steps1, -epoch1 or -labels1 do")
    return text


def _refuse_circle(start: str, follow: Any, message: str) -> None:
    """Raise an error if names that follow each other lead back to the first one."""
    left, seen = list(follow(start)), set()
    while left:
        name = left.pop()
        if name == start:
            raise ConfigError(f"{message}; take one of the names out")
        if name not in seen:
            seen.add(name)
            left += follow(name)
