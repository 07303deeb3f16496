"""The `selmask` command, and `--help` of every command."""

from __future__ import annotations

import configparser
import contextlib
import importlib
import io
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import selmask
from preprocess import build_masks
from preprocess.errors import ConfigError
from preprocess.flags import OTHER, USUAL
from train import cli, config, report

ROOT = Path(__file__).resolve().parents[2]
WITH_GROUPS = [name for name, module in cli.MODULES.items() if not module.startswith("csrc")]


def exit_of(monkeypatch, *words: str) -> int:
    """Return the exit code of `selmask WORDS`."""
    monkeypatch.setattr(sys, "argv", ["/bin/selmask", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


# ---------------------------------------------------------------------------------- the command


def test_every_command_has_its_name():
    there = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for room in ("preprocess", "train", "csrc") for path in (ROOT / room).glob("*.py")
        if '\nif __name__ == "__main__":' in path.read_text()
    }
    assert sorted(cli.MODULES.values()) == sorted(there - {"train.cli"})


def test_the_list_has_a_line_for_each_command(monkeypatch, capsys):
    assert exit_of(monkeypatch, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    listed = dict(re.findall(r"^  (\w+) +(\S.*)$", "\n".join(lines), re.MULTILINE))
    assert list(listed) == list(cli.MODULES)
    for name, text in listed.items():
        assert importlib.import_module(cli.MODULES[name]).__doc__.startswith(text + "\n")
    assert all(len(line) <= 100 for line in lines)


def test_the_list_imports_nothing_and_takes_no_time():
    script = ("import sys\nfrom train import cli\nsys.argv = ['selmask', '--help']\n"
              "try: cli.main()\nexcept SystemExit: pass\n"
              "loaded = {name.partition('.')[0] for name in sys.modules}\n"
              "sys.exit(bool(loaded & {'torch', 'numpy', 'transformers', 'deepspeed'}))")
    before = os.times()
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    seconds = sum(after[2:4]) - sum(before[2:4])  # of the processor, whatever else is running
    assert seconds < 0.3


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["pretrian"], 2, "selmask: unknown command pretrian; did you mean pretrain?"),
        (["xyzzy"], 2, "selmask: unknown command xyzzy; selmask --help lists the commands"),
        (["report", "nowhere"], 3, "selmask report: nowhere: no such folder; give run directories"),
        (["build_masks", "--seed", "x"], 2, "selmask build_masks: argument --seed: invalid int "
                                            "value: 'x'; --help lists the flags"),
        (["doctor", "--output"], 2, "selmask doctor: unknown argument --output; did you mean "
                                    "--output_dir?"),
    ],
)
def test_mistakes_end_as_those_of_the_command(words, code, message, monkeypatch, capsys):
    assert exit_of(monkeypatch, *words) == code
    assert capsys.readouterr().err == message + "\n"


def test_the_main_of_the_command_is_started(monkeypatch):
    module = importlib.import_module("train.pretrain")
    monkeypatch.setattr(module, "main", lambda: started.append(config.command_line()))
    started: list[str] = []
    assert exit_of(monkeypatch, "pretrain", "--tokens", "P") == 0
    assert started == ["selmask pretrain --tokens P"]


def test_the_entry_point_and_the_version(monkeypatch, capsys):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    scripts = setup["options.entry_points"]["console_scripts"].split("\n")
    assert scripts == ["", "selmask = selmask:main"]
    assert exit_of(monkeypatch, "--version") == 0
    said = f"selmask {setup['metadata']['version']}\n"
    assert capsys.readouterr().out == said

    def absent(name: str) -> str:  # a clone on the path
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert exit_of(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == said


def test_a_rank_of_deepspeed_finds_its_command(monkeypatch):
    """Its launcher puts --local_rank before what is typed."""
    module = importlib.import_module("train.pretrain")
    monkeypatch.setattr(module, "main", lambda: started.append(sys.argv))
    started: list[list[str]] = []
    assert exit_of(monkeypatch, "--local_rank=3", "pretrain", "--tokens", "P") == 0
    assert started == [["selmask pretrain", "--local_rank=3", "--tokens", "P"]]


def test_the_working_folder_is_left_but_for_a_clone(tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    kept = [str(other), os.path.join(os.path.dirname(os.__file__), "x")]
    monkeypatch.setattr(sys, "path", ["", *kept, str(tmp_path), f"{other}/.."])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", str(other), str(tmp_path)]))
    monkeypatch.setenv("PYTHONSAFEPATH", "")  # so that it is put back even where it was not set
    monkeypatch.delenv("PYTHONSAFEPATH")
    before = list(sys.path)
    monkeypatch.chdir(ROOT)
    selmask.leave_working_folder()
    assert sys.path == before and "PYTHONSAFEPATH" not in os.environ
    monkeypatch.chdir(tmp_path)
    selmask.leave_working_folder()
    assert sys.path == kept and os.environ["PYTHONPATH"] == str(other)
    assert os.environ["PYTHONSAFEPATH"] == "1"
    monkeypatch.chdir(other)
    other.rmdir()
    selmask.leave_working_folder()  # a folder that is gone holds nothing


# ------------------------------------------------------------------------------- --help of each


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What `--help` of each command prints on a terminal of 100 columns."""
    texts = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "100")
        for name in WITH_GROUPS:
            out = io.StringIO()
            patch.setattr(sys, "argv", [f"selmask {name}"])
            with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
                importlib.import_module(cli.MODULES[name]).main(["--help"])
            texts[name] = out.getvalue()
    return texts


@pytest.fixture
def groups(helps, request) -> dict[str, list[tuple[str, str]]]:
    """The flags and their texts, by heading."""
    found: dict[str, list[tuple[str, str]]] = {}
    before, heading, last = helps[request.param].partition(f"\n{OTHER}:\n")
    before = before[before.index(f"\n{USUAL}:\n"):]
    for line in (before + heading + last.partition("\n\n")[0]).strip().splitlines():
        if line.endswith(":") and not line.startswith(" "):
            entries = found[line[:-1]] = []
        elif line.startswith("  ") and line[2] != " ":
            flag, _, text = line.strip().partition("  ")
            entries.append((flag.split()[0], text.strip()))
        elif line:
            entries[-1] = entries[-1][0], f"{entries[-1][1]} {line.strip()}".strip()
    return found


@pytest.mark.parametrize(("name", "groups"), [(n, n) for n in WITH_GROUPS], indirect=["groups"])
def test_help_fits_the_terminal_and_explains_each_flag_once(name, helps, groups):
    usage = helps[name].split("\n\n")[0]
    assert usage.startswith(f"usage: selmask {name} ") and usage.endswith(" [flags]")
    assert all(len(line) <= 100 for line in helps[name].splitlines())
    flags = [flag for entries in groups.values() for flag, _ in entries]
    meanings = [re.sub("^--(no[-_])?", "", flag).replace("-", "_") for flag in flags]
    assert len(set(meanings)) == len(meanings) and "local_rank" not in meanings
    for flag, text in (entry for entries in groups.values() for entry in entries):
        assert len(text) > 5, flag
        assert not re.search(r"default: *(None|True|False|-1)?\)", text), (flag, text)
    first, *others = groups  # the flags that people need come first
    assert first == USUAL and others[-1] == OTHER
    assert 1 <= len(groups[USUAL]) <= 8
    assert len(groups[OTHER]) <= 6


@pytest.mark.parametrize(
    "words", [["--dry-run"], ["--dry_run", "True"], ["--dry_run"], ["--dry_run", "--save-steps=3"]]
)
def test_spellings_that_are_not_shown_still_parse(words):
    needed = ["--tokens", "P", "--model-config", "bert-tiny", "--output_dir", "R"]
    parsed = config.parse(config.PretrainConfig, [*needed, *words])
    assert parsed.dry_run and parsed.last_layer_subset
    for flag in ("--no_last_layer_subset", "--no-last-layer-subset"):
        assert not config.parse(config.PretrainConfig, [*needed, flag]).last_layer_subset
    assert config.parse(config.PretrainConfig, [*needed, "--last_layer_subset"]).last_layer_subset


def test_an_unknown_flag_is_named_before_a_missing_one():
    """Of the commands with a parser of their own."""
    for command, words in ((build_masks, ["--tokenz", "P"]), (report, ["--outptu_dir", "x"])):
        with pytest.raises(ConfigError, match=f"^unknown argument {words[0]}; did you mean --"):
            command.parse_arguments(words)
    with pytest.raises(ConfigError, match="the following arguments are required: .*--tokens"):
        build_masks.parse_arguments([])


# What a command without --dry_run does instead, so that it needs none.
WITHOUT_DRY_RUN = {
    "show_masks": "only shows", "report": "only reads, in seconds", "doctor": "only looks",
    "benchmark_data": "reads nothing of the user's: it makes up its stores",
    "benchmark_tokenizing": "checks its two inputs first, and keeps nothing that it makes",
    "benchmark_head": "reads nothing of the user's: it makes up its numbers",
}


@pytest.mark.parametrize("name", cli.MODULES)
def test_every_command_can_be_tried_or_need_not_be(name, helps, capsys):
    text = helps.get(name)
    if text is None:
        with pytest.raises(SystemExit):
            importlib.import_module(cli.MODULES[name]).main(["--help"])
        text = capsys.readouterr().out
    assert ("--dry_run" in text) != (name in WITHOUT_DRY_RUN)
    # `csrc` imports nothing of ours, and says nothing but its results.
    assert ("--log_level LEVEL" in text) == (name != "benchmark_head")
