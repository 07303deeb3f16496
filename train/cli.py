"""The `selmask` command: start any command of the toolkit by its name.

    selmask pretrain --tokens P --model_config bert-base --output_dir R1

`selmask pretrain` runs the same `main` as `python train/pretrain.py`. To train on several GPUs
use the launcher: `deepspeed --module selmask pretrain`, in a clone `deepspeed train/pretrain.py`.
"""

from __future__ import annotations

import ast
import configparser
import difflib
import importlib
import sys
import tokenize
from pathlib import Path

from preprocess.errors import ConfigError, run_command

ROOT = Path(__file__).resolve().parents[1]
# What is typed and the module behind it, in the order of work.
COMMANDS = {
    "data": {
        "train_tokenizer": "preprocess.train_tokenizer",
        "tokenize_corpus": "preprocess.tokenize_corpus",
        "select_documents": "preprocess.select_documents",
        "score_words": "preprocess.score_words",
        "build_masks": "preprocess.build_masks",
        "show_masks": "preprocess.show_masks",
    },
    "training": {
        "pretrain": "train.pretrain",
        "finetune": "train.finetune",
        "predict": "train.predict",
        "annotate": "train.annotate",
        "fit_scorer": "train.fit_scorer",
        "score_tokens": "train.score_tokens",
    },
    "running and reporting": {
        "pipeline": "train.pipeline",
        "report": "train.report",
        "doctor": "train.doctor",
    },
    "measuring": {
        "benchmark": "train.benchmark",
        "benchmark_data": "train.benchmark_data",
        "benchmark_inference": "train.benchmark_inference",
        "benchmark_tokenizing": "preprocess.benchmark",
        "benchmark_head": "csrc.benchmark",
    },
}
MODULES = {name: module for group in COMMANDS.values() for name, module in group.items()}


def summary(module: str) -> str:
    """Return the first line of a module's docstring, without importing the module."""
    with open(ROOT / f"{module.replace('.', '/')}.py") as file:
        tokens = tokenize.generate_tokens(file.readline)
        docstring = next(token.string for token in tokens if token.type == tokenize.STRING)
    return ast.literal_eval(docstring).split("\n")[0]


def help_text() -> str:
    """Return the list of all commands, one line each."""
    width = max(map(len, MODULES))
    lines = ["usage: selmask COMMAND [flags]", "       selmask COMMAND --help", ""]
    for title, group in COMMANDS.items():
        lines.append(f"{title}:")
        lines += [f"  {name:{width}}  {summary(module)}" for name, module in group.items()]
        lines.append("")
    lines.append("To train on several GPUs, type deepspeed --module selmask pretrain instead of "
                 "selmask pretrain.")
    return "\n".join(lines)


def find_version() -> str:
    """Return the version of the package, or of a clone that is not installed."""
    from importlib import metadata

    try:
        return metadata.version("selmask")
    except metadata.PackageNotFoundError:
        found = configparser.ConfigParser()
        found.read(ROOT / "setup.cfg")
        return found.get("metadata", "version", fallback="of unknown version")


def _start() -> None:
    words = sys.argv[1:]
    if words and words[0].startswith("--local_rank="):  # DeepSpeed's launcher puts it first
        words = [*words[1:2], words[0], *words[2:]]
    if not words or words[0] in ("-h", "--help"):
        print(help_text())
        return
    if words[0] == "--version":
        print(f"selmask {find_version()}")
        return
    if words[0] not in MODULES:
        near = difflib.get_close_matches(words[0], MODULES, n=1)
        hint = f"did you mean {near[0]}?" if near else "selmask --help lists the commands"
        raise ConfigError(f"unknown command {words[0]}; {hint}")
    sys.argv = [f"selmask {words[0]}", *words[1:]]  # as `--help` and messages name the command
    importlib.import_module(MODULES[words[0]]).main()


def main() -> None:
    """Start the command that is named on the command line, and exit."""
    sys.argv[0] = "selmask"
    run_command(_start)


if __name__ == "__main__":
    main()
