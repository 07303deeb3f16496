"""Values of a recipe: each checked against the type of the option that it sets.

A recipe is data that may come from a stranger. No value may become another flag of a command, and
none is looked at by a command before it has the type that the command's own option has.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from preprocess.errors import ConfigError, visible
from train.config import Bounds


class Option(NamedTuple):
    """What a flag takes: its type, and the bounds of its value."""

    kind: Any
    bounds: Bounds | None = None


class _Seeds:
    """The kind of `seeds`: numbers separated by commas; YAML may hold a list or one number."""


TEXT, WHOLE, SWITCH = Option(str), Option(int), Option(bool)


def options_of(config_class: type) -> dict[str, Option]:
    """Return the flags of a training command, as its dataclass has them."""
    kinds = get_type_hints(config_class)
    return {option.name: Option(_Seeds if option.name == "seeds" else kinds[option.name],
                                option.metadata["bounds"])
            for option in dataclasses.fields(config_class)}


def check_known(name: Any, known: Any, complaint: str, also: Any = ()) -> None:
    """Refuse a name that is not known, with the nearest one that is.

    Args:
        also: further names that may be meant.
    Raises:
        ConfigError: `complaint`, the name, and "did you mean".
    """
    if isinstance(name, str) and name in known:
        return
    near = difflib.get_close_matches(str(name), [*known, *also], n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    raise ConfigError(f"{complaint} {shown_value(name)}; {hint}")


def shown_value(value: Any) -> str:
    """Return a value for a message: on one line, cut where it is long."""
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
    seeds = [_whole(part) for part in parts]
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError
    return ",".join(map(str, seeds))


READERS: dict[Any, tuple[Callable[[Any], Any], str]] = {
    str: (_text, "a text without control characters that does not begin with -"),
    int: (_whole, "a whole number"),
    float: (_number, "a number"),
    bool: (_switch, "true or false"),
    _Seeds: (_seeds, "different whole numbers separated by commas, as 13,43,83"),
}


def check_value(value: Any, option: Option, name: str) -> Any:
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
        return [check_value(entry, Option(kinds[0]), name) for entry in entries if entry != []]
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{name} {shown_value(value)}: must be names and values, as {{a: b}}")
        return {check_value(key, TEXT, name): check_value(entry, TEXT, name)
                for key, entry in value.items()}
    if origin is Literal:
        choices = [str(choice) for choice in kinds]
        if isinstance(value, bool):  # YAML reads `yes` and `no` as that
            value = "yes" if value else "no"
        if value not in choices:
            raise ConfigError(f"{name} {shown_value(value)}: must be {' or '.join(choices)}")
        return value
    if origin is not None and len(kinds) == 1:  # X | None
        return check_value(value, Option(kinds[0], option.bounds), name)
    if origin is not None:  # a number | "auto"
        kind = kinds[0]
        if str in kinds and option.bounds and isinstance(value, str):
            return _check_bounds(_text_or_number(value), option, name)
    read, words = READERS[kind]
    try:
        found = read(value)
    except (ValueError, TypeError, OverflowError):
        raise ConfigError(f"{name} {shown_value(value)}: must be {words}") from None
    return _check_bounds(found, option, name)


def _text_or_number(value: str) -> Any:
    return int(value) if value.isdecimal() else value


def _check_bounds(value: Any, option: Option, name: str) -> Any:
    try:
        good = option.bounds is None or option.bounds.holds(value)
    except TypeError:  # a text where a number may stand
        good = False
    if not good and option.bounds:
        raise ConfigError(f"{name} {shown_value(value)}: must be {option.bounds.words}")
    return value
