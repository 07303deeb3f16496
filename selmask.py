"""Start a command of selmask, from any folder: `python -m selmask pretrain ...`.

The names of our packages are generic. A `train.py` or a `preprocess.py` in the working folder would
be imported instead of ours wherever Python looks there first: under `python -m`, and so under
`deepspeed --module`; with an empty entry in PYTHONPATH; and on the nodes of DeepSpeed's launcher,
which puts that folder there. Nobody has a file of the name `selmask`, so this one can look first.
"""

from __future__ import annotations

import os
import sys

ROOT = os.path.dirname(os.path.realpath(__file__))  # site-packages, or a clone


def leave_working_folder() -> None:
    """Import nothing from the working folder, here and in every process that this one starts."""
    try:
        here = os.path.realpath(os.getcwd())
    except FileNotFoundError:  # it was deleted
        return
    if here in (ROOT, os.path.dirname(os.path.realpath(os.__file__))):
        return

    def stays(entry: str) -> bool:
        return os.path.realpath(entry or here) != here

    sys.path[:] = filter(stays, sys.path)
    os.environ["PYTHONSAFEPATH"] = "1"
    if "PYTHONPATH" in os.environ:
        entries = os.environ["PYTHONPATH"].split(os.pathsep)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(stays, entries))


def main() -> None:
    """Start the command that is named on the command line, and exit."""
    leave_working_folder()
    from train import cli

    cli.main()


if __name__ == "__main__":
    main()
