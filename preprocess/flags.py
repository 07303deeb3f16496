"""The command line of every command: how flags are listed by `--help`, and how mistakes are said.

Commands fill a `Parser` in groups: first the few flags that people need, the others by subject.
`--help` lists each flag once, under its group, although argparse accepts more spellings of some.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from preprocess.errors import ConfigError
from preprocess.progress import LEVELS, set_level

USUAL = "required and usual"  # the title of each parser's first group
OTHER = "other"  # of its last one, which holds `--help` and flags without a group


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Show one spelling per flag, a short placeholder for its value, and defaults that matter."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{"max_help_position": 32, **options})

    def _format_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any) -> str:
        needed = [action for action in actions if action.required]
        return super()._format_usage(usage, needed, [], prefix).rstrip() + " [flags]\n\n"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = [name for name in action.option_strings if name.startswith("--")]
        if action.nargs == 0:
            # Of a pair --x, --no-x the one that changes something.
            return names[-1] if action.default is True else names[0]
        if action.const is True:  # a boolean, whose value may be left out
            return names[0]
        return f"{names[0]} {self._format_args(action, self._placeholder(action))}"

    def _placeholder(self, action: argparse.Action) -> str:
        return {int: "N", float: "X"}.get(action.type, "TEXT")  # type: ignore[call-overload]

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if "default" in text or isinstance(default, bool) or default in (
            None, "", [], argparse.SUPPRESS
        ):
            return text
        shown = " ".join(default) if isinstance(default, list) else default
        return f"{text} (default: {shown})"


class _SetLevel(argparse.Action):
    """Sets the level of messages as soon as it is read; nothing else of a command depends on it."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        set_level(values)


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose `--help` fits a reader and whose mistakes are one sentence."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options = {"formatter_class": HelpFormatter, "allow_abbrev": False, **options}
        super().__init__(*args, **options)
        self._optionals.title = OTHER
        self.add_argument(
            "--log_level", action=_SetLevel, choices=LEVELS, default=argparse.SUPPRESS,
            metavar="LEVEL", help=f"what is printed: {', '.join(LEVELS)}; given, DeepSpeed and "
            "transformers print as much (default: info, and their errors)",
        )

    def format_help(self) -> str:
        """Return the text of `--help`: required flags first, the group of `--help` itself last."""
        self._action_groups.sort(key=lambda group: group is self._optionals)
        for group in self._action_groups:
            group._group_actions.sort(key=lambda action: not action.required)
        return super().format_help()

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None, **least: int
    ) -> Any:
        """Parse the command line.

        Args:
            least: smallest allowed value of each of these flags, if it is given.
        Raises:
            ConfigError: an unknown flag, a missing one, a value of the wrong type or too small.
        """
        needed = [action for action in self._actions if action.required]
        for action in needed:  # a mistyped flag would be reported as a missing one
            action.required = False
        _, unknown = self.parse_known_args(args, copy.copy(namespace))
        if unknown:
            self.refuse(unknown[0])
        for action in needed:
            action.required = True
        values = self.parse_known_args(args, namespace)[0]
        for name, smallest in least.items():
            value = getattr(values, name)
            if value is not None and value < smallest:
                raise ConfigError(f"--{name} {value}: must be at least {smallest}")
        return values

    def refuse(self, unknown: str) -> NoReturn:
        """Raise a `ConfigError` about an argument that this command does not have."""
        flags = [name for name in self._option_string_actions if name.startswith("--")]
        near = difflib.get_close_matches(unknown.split("=")[0], flags, n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
        raise ConfigError(f"unknown argument {unknown}; {hint}")

    def error(self, message: str) -> NoReturn:
        """Raise argparse's complaint as a `ConfigError`, with one spelling of the flag."""
        message = re.sub("^(argument [^/:]+)/[^:]+", r"\1", message)
        raise ConfigError(f"{message}; --help lists the flags")
