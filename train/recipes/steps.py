"""A step of the pipeline: its command, the files that it makes, and what it says of them."""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preprocess.errors import ConfigError, visible
from preprocess.files import parse_json
from train.recipes.recipe import NEGATED, SWITCHED_OFF


@dataclass(frozen=True)
class Step:
    """One process of the pipeline.

    Attributes:
        name: as in the logs and in `steps.json`.
        command: script and flags.
        outputs: patterns of the files and folders that belong to this step alone; `--rerun`
            deletes them.
        records: patterns of the files by which the step is judged: each must match a file, and
            none may change afterwards. Without any the step runs every time.
        needs: names of the steps whose outputs it reads.
        launched: whether the deepspeed launcher starts the command.
        resumes: whether the command continues or keeps what an interrupted attempt left.
        grows: whether the command fills several folders, each of which says itself what made it:
            then a folder or a seed may be added later, and the others stay.
        judged: patterns of the JSON files whose `weak` lists say what is wrong with the result,
            where masks would be built on it.
        compute: called instead of the command, which then only says what it depends on.
    """

    name: str
    command: list[str]
    outputs: list[str]
    records: list[str]
    needs: list[str] = field(default_factory=list)
    launched: bool = False
    resumes: bool = True
    grows: bool = False
    compute: Callable[[], None] | None = None
    judged: list[str] = field(default_factory=list)

    def weaknesses(self) -> list[str]:
        """Return what the finished step itself finds too weak in its result, as sentences."""
        found: dict[str, None] = {}
        for path in (path for pattern in self.judged for path in sorted(glob.glob(pattern))):
            lines = Path(path).read_bytes().splitlines()
            texts = lines if path.endswith(".jsonl") else [b"\n".join(lines)]
            for text in texts:
                with suppress(ValueError):
                    told = parse_json(text)
                    weak = told.get("weak") if isinstance(told, dict) else None
                    found |= dict.fromkeys(map(visible, weak if isinstance(weak, list) else ()))
        return list(found)


def up_to(steps: list[Step], until: str) -> list[Step]:
    """Return the steps of a name, or those whose names begin with it and a hyphen, and their needs.

    A step without records, as the report, looks at all that is there: it needs every other one.

    Raises:
        ConfigError: there is no such step.
    """
    wanted = {step.name for step in steps
              if step.name == until or step.name.startswith(f"{until}-")}
    if not wanted:
        names = [step.name for step in steps]
        near = difflib.get_close_matches(until, names, n=3, cutoff=0.5)
        near += [name for name in names if until in name and name not in near][:3 - len(near)]
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ConfigError(f"--until {until}: no step of this recipe; {hint}--dry_run lists all "
                          f"{len(names)}")
    for step in reversed(steps):
        if step.name in wanted:
            wanted |= {other.name for other in steps} if not step.records else set(step.needs)
    return [step for step in steps if step.name in wanted]


def flag_words(flags: dict[str, Any]) -> list[str]:
    """Turn flags into words of a command line.

    Args:
        flags: name -> value; None and False leave a flag out, True is the flag alone, a list
            becomes several words and a dictionary `key=value` words.
    Raises:
        ConfigError: a value that a command would take for another flag.
    """
    words: list[str] = []
    for name, value in flags.items():
        if value is False and name in (*NEGATED, *SWITCHED_OFF):
            words.append(f"--no{'-' if name in NEGATED else '_'}{name}")
        if value is None or value is False or value == []:
            continue
        words.append(f"--{name}")
        given: list[Any] = [value]
        if isinstance(value, dict):
            given = [f"{key}={entry}" for key, entry in value.items()]
        elif isinstance(value, bool):
            given = []
        elif isinstance(value, list):
            given = value
        for word in given:
            if str(word).startswith("-") and not isinstance(word, int | float):
                raise ConfigError(f"--{name} {word}: would be taken for another flag; give a name "
                                  f"that does not begin with -, as ./{word}")
            words.append(str(word))
    return words


def inside(folder: Path, *patterns: str) -> list[str]:
    """Patterns of files in a folder whose own name may hold any character."""
    return [os.path.join(glob.escape(str(folder)), pattern) for pattern in patterns]


def model_files(folder: Path) -> list[str]:
    """Patterns of an exported model."""
    return inside(folder, "lineage.json", "*.safetensors")


def store_files(prefix: Path) -> list[str]:
    """Patterns of a token store, sharded or not."""
    name = prefix.name
    return inside(prefix.parent, f"{name}.json", f"{name}*.bin", f"{name}*.idx")


def array_files(prefix: Path, name: str) -> list[str]:
    """Patterns of an array `NAME.KIND` beside a store, sharded or not."""
    return inside(prefix.parent, *(f"{prefix.name}*.{name}.{end}" for end in ("npy", "json")))
