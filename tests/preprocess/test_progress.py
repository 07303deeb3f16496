"""Bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import datasets
import pytest

from preprocess import progress
from preprocess.corpus import num_bytes, read_documents
from preprocess.errors import ConfigError
from preprocess.flags import Parser
from preprocess.progress import Progress
from tests.support.launch import ROOT

WORK = """
from preprocess.progress import Progress, say
with Progress(40, "row", every=20, label="work") as bar:
    for number in range(40):
        if number == 10:
            with Progress(3, "batch", label="inner", part=True) as part:
                part.update(3)
        if number == 20:
            say("a line of news")
        bar.update(1, f"loss {number}")
say("the end")
"""


def run_in_terminal(code: str, **environment: str) -> str:
    """What a person sees: stdout and stderr of a script on one pseudo-terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT,
        env={**os.environ, "RANK": "0", **environment},
    )
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 1 << 16):
            shown += block
    except OSError:  # how a pseudo-terminal says that the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0, shown.decode()
    return shown.decode()


def test_a_terminal_gets_a_bar_with_rate_and_time_left():
    shown = run_in_terminal(WORK)
    last = [part for part in shown.split("\r") if part.startswith("work: 100%")][-1]
    assert "40/40" in last and " row/s" in last and "<00:00" in last and "loss 39" in last
    assert "inner" in shown
    # A line beside the bar has a line for itself, and so has what follows the bar.
    lines = [line.split("\r")[-1].replace("\x1b[A", "") for line in shown.split("\r\n")]
    assert "a line of news" in lines and "the end" in lines


def test_a_pipe_gets_plain_lines():
    done = subprocess.run(
        [sys.executable, "-c", WORK], cwd=ROOT, env={**os.environ, "RANK": "0"}, text=True,
        capture_output=True, check=True,
    )
    assert done.stderr == "" and "\r" not in done.stdout and "\x1b" not in done.stdout
    first, news, second, end = done.stdout.splitlines()
    assert first.startswith("work: row 20/40  loss 19  ") and first.endswith(" left")
    assert "row/s" in first and second.startswith("work: row 40/40")
    assert news == "a line of news" and end == "the end"


def test_other_ranks_are_silent():
    assert run_in_terminal(WORK, RANK="1") == ""


def test_slow_work_gets_a_line_every_few_seconds(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = Progress(1000, "token", initial=400)
    for _ in range(4):
        now[0] += 4.0
        bar.update(20)
    # At 12 seconds, 60 tokens later: 5 a second, and 540 to go.
    assert capsys.readouterr().out == "token 460/1,000  5 token/s  01:48 left\n"
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    Progress(None, "document").update(3)  # no total, no time left
    line = capsys.readouterr().out
    assert line.startswith("document 3  ") and "left" not in line


def test_an_error_ends_the_bar():
    shown = run_in_terminal(
        "import sys\n"
        "from preprocess.errors import DataError, run_command\n"
        "from preprocess.progress import Progress\n"
        "def main():\n"
        "    with Progress(9, label='work') as bar:\n"
        "        bar.update()\n"
        "        raise DataError('a broken file')\n"
        "try:\n"
        "    run_command(main)\n"
        "except SystemExit as end:\n"
        "    print(end.code)\n"
    )
    assert "-c: a broken file\r\n" in shown.split("\n", 1)[1].lstrip("\r")
    assert shown.rstrip().endswith("3")


def test_a_reader_that_leaves_is_no_error():
    program = (
        "from preprocess.errors import run_command\n"
        "def main():\n"
        "    while True:\n"
        "        print('a line', flush=True)\n"
        "run_command(main)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout.readline() == "a line\n"
        writer.stdout.close()
        assert writer.wait(timeout=60) == 141 and writer.stderr.read() == ""


@pytest.mark.parametrize("kind", ["txt", "gz", "csv", "parquet"])
@pytest.mark.parametrize("count", [1, 3])
def test_every_byte_of_an_input_is_counted_once(tmp_path, reviews_file, kind, count):
    text = Path(reviews_file).read_text()
    path = tmp_path / f"text.{'txt.gz' if kind == 'gz' else kind}"
    if kind == "gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif kind == "parquet":
        datasets.Dataset.from_dict({"text": text.splitlines()}).to_parquet(path)
    else:
        path.write_text(("text\n" if kind == "csv" else "") + text)
    for index in range(count):
        passed: list[int] = []
        documents = list(read_documents([str(path)], part=(index, count), passed=passed.append))
        expected = num_bytes([str(path)], False, (index, count))
        assert len(documents) == pytest.approx(120 / count, abs=20)
        assert sum(passed) == expected


def test_tokenizing_shows_how_much_is_left(tmp_path, reviews_file, tiny_encoder):
    shown = run_in_terminal(
        "from preprocess.tokenize_corpus import main\n"
        f"main(['--input', {reviews_file!r}, '--tokenizer', {tiny_encoder!r}, '--num_shards', '2',"
        f" '--num_workers', '2', '--output', {str(tmp_path / 'store')!r}])"
    )
    assert re.search(r"tokenize: 100%.*B/s, 120 documents, [\d,]+ tokens\]", shown)
    lines = [line.split("\r")[-1] for line in shown.split("\r\n")]
    assert sum("empty documents dropped" in line for line in lines) == 2


# --------------------------------------------------------------------------------- --log_level

LINES = """
from preprocess.flags import Parser
from preprocess.progress import Progress, say, show
Parser().parse_args()
say("a line of news")
say("warning: a doubt")
show("a table that was asked for")
with Progress(4, "row", every=4) as bar:
    bar.update(4)
"""


@pytest.mark.parametrize(("level", "printed"), [
    ("", "news doubt table row"), ("debug", "news doubt table row"),
    ("info", "news doubt table row"), ("warning", "doubt table"), ("error", "table"),
])
def test_the_level_chooses_what_is_printed(level, printed):
    flag = ["--log_level", level] if level else []
    out = subprocess.run([sys.executable, "-c", LINES, *flag], cwd=ROOT, check=True, text=True,
                         capture_output=True).stdout
    assert [word for word in ("news", "doubt", "table", "row") if word in out] == printed.split()


def test_what_is_started_and_libraries_follow_the_level(monkeypatch):
    from transformers.utils import logging

    from train.engine.group import load_deepspeed
    from train.model import load_tokenizer

    def levels() -> tuple[int, int]:
        with pytest.raises(OSError, match="no such"):
            load_tokenizer("no such")
        return logging.get_verbosity(), load_deepspeed().logger.level

    monkeypatch.setattr("train.model.loading.local_checkpoint", lambda name: name)
    monkeypatch.setattr(
        "transformers.AutoTokenizer.from_pretrained",
        lambda *_, **__: (_ for _ in ()).throw(OSError("no such")))
    monkeypatch.setattr("train.model.loading.loading", lambda name: contextlib.nullcontext())
    assert levels() == (40, 40)  # errors alone, where nothing is chosen
    for level, number in (("debug", 10), ("info", 20), ("warning", 30), ("error", 40)):
        Parser().parse_args(["--log_level", level])
        assert os.environ["SELMASK_LOG_LEVEL"] == level and levels() == (number, number)


def test_debugging_shows_where_an_error_comes_from():
    script = ("from preprocess.errors import ConfigError, run_command\n"
              "def main(): raise ConfigError('--x 3: must be 2')\nrun_command(main)")
    for level, traced in (("info", False), ("debug", True)):
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, text=True, capture_output=True,
            env={**os.environ, "SELMASK_LOG_LEVEL": level})
        assert done.returncode == 2 and done.stderr.endswith("-c: --x 3: must be 2\n")
        assert ("Traceback" in done.stderr) is traced
    with pytest.raises(ConfigError, match="--log_level: invalid choice: 'loud'"):
        Parser().parse_args(["--log_level", "loud"])
