"""The files that come with selmask, by name: DeepSpeed JSONs and recipes, installed or in a clone.
"""

from __future__ import annotations

from pathlib import Path

from preprocess.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[1]  # a clone, or site-packages
INSTALLED = not (REPOSITORY / "setup.cfg").is_file()
DS_CONFIGS = REPOSITORY / "ds_configs"
RECIPES = REPOSITORY / "train" / "recipes"
SUFFIXES = {DS_CONFIGS: ".json", RECIPES: ".yaml"}


def find_shipped(given: str | Path, folder: Path, flag: str) -> Path:
    """Return the file that a flag names.

    Args:
        given: the name of one of our files without its ending, as `cpu`, which no file of the
            working folder can take; a path; or the path of one of ours in a clone, from anywhere.
        folder: a key of `SUFFIXES`.
        flag: for the message.
    Raises:
        ConfigError: there is no such file.
    """
    text, suffix = str(given), SUFFIXES[folder]
    named = folder / f"{text}{suffix}"
    if "/" not in text and named.is_file():
        return named
    if Path(text).is_file():
        return Path(text)
    for ours in (REPOSITORY / text, folder / text):
        if ours.parent == folder and ours.suffix == suffix and ours.is_file():
            return ours
    known = ", ".join(sorted(path.stem for path in folder.glob(f"*{suffix}")))
    raise ConfigError(f"{flag} {given}: no such file; give a path, or one of the names {known}")
