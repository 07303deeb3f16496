"""A full disk at every writer: exit code 3 and a sentence, what was whole stays, nothing is left.

Each test is run on a real disk of a few megabytes that is filled up to the last pages, once for
every number of pages that may be left; where such a disk cannot be mounted, and beside it, the
largest file that a process may write stands in for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preprocess import build_masks, tokenize_corpus
from preprocess.errors import DiskFullError, run_command, writing
from preprocess.files import append_bytes, atomic_write_json, write_json_lines
from preprocess.store import StoreWriter, TokenStore, open_array, write_array
from tests.support.launch import ROOT, launch_environment
from tests.support.stores import FakeTokenizer, write

PAGE = 4096
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000


def mount(folder: Path, num_bytes: int) -> bool:
    """Mount a disk that only this process sees and that goes when it ends; False if forbidden."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWNS):
        if libc.unshare(CLONE_NEWNS | CLONE_NEWUSER):
            return False
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    private = 1 << 18 | 1 << 14  # MS_PRIVATE | MS_REC: nothing of this reaches other processes
    libc.mount(b"none", b"/", None, private, None)
    options = f"size={num_bytes}".encode()
    return libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, options) == 0


class Disk:
    """A folder on a small disk, and the means to fill it.

    Args:
        how: "disk", or "limit": nothing is mounted, and files may not grow beyond what is left.
    """

    def __init__(self, folder: Path, how: str, num_bytes: int = 4 << 20) -> None:
        self.folder, self.how = folder / "disk", how
        self.folder.mkdir(exist_ok=True)
        self._ballast, self._num_bytes = self.folder / "ballast", num_bytes

    def begin(self) -> None:
        """Mount it for this process, which ends with it."""
        tempfile.tempdir = str(self.folder)
        if self.how == "disk" and not mount(self.folder, self._num_bytes):
            self.how = "limit"

    def fill(self, left: int) -> None:
        """Leave `left` bytes free."""
        if self.how == "limit":
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (left, hard))
            return
        state = os.statvfs(self.folder)
        with open(self._ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, state.f_bavail * state.f_frsize - left)

    def free(self) -> None:
        """Take the ballast away."""
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        self._ballast.unlink(missing_ok=True)

    def tree(self) -> dict[str, bytes | None]:
        """Every folder, and every file with its bytes."""
        return {
            str(path.relative_to(self.folder)): path.read_bytes() if path.is_file() else None
            for path in self.folder.rglob("*") if path != self._ballast
        }

    def fails_cleanly(self, action: Callable[[], None], complete: Container[str] = ()) -> int:
        """Try with 0, 1, 2 ... pages until there is room: each failure is said and leaves nothing.

        Args:
            complete: names of files that may be complete already and stay.
        Returns:
            How often it failed.
        """
        before = self.tree()
        for pages in range(60):
            self.fill(pages * PAGE)
            try:
                action()
            except DiskFullError as error:
                check_sentence(str(error), self.folder)
            else:
                self.free()
                return pages
            self.free()
            after = {name: data for name, data in self.tree().items() if name not in complete}
            assert after == before, f"{pages} pages left"
        raise AssertionError("there was never room")


def check_sentence(text: str, folder: Path) -> None:
    """The path, what was wanted, what is free, and what to do."""
    assert f"{folder}/" in text and ".tmp-" not in text
    assert "cannot be written" in text and "wanted" in text and "bytes are free" in text
    assert "make room and give the same command again" in text and "\n" not in text


@pytest.fixture(params=["disk", "limit"])
def disk(request, tmp_path):
    return Disk(tmp_path, request.param)


def on_a_small_disk(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in a process of its own, which alone sees its `disk`."""

    @functools.wraps(test)
    def forked(disk: Disk, **fixtures: Any) -> None:
        told, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 1)
                os.dup2(null, 2)
                disk.begin()
                test(disk, **fixtures)
            except BaseException:
                os.write(tell, traceback.format_exc()[-8000:].encode())
            finally:
                os._exit(0)
        os.close(tell)
        with open(told) as file:
            failure = file.read()
        os.waitpid(pid, 0)
        assert not failure, failure

    return forked


def ends(main: Callable[[], None]) -> tuple[int, str]:
    """Run a command's `main` as the command line does; its exit code and what it says."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            run_command(main)
        except SystemExit as stop:
            return int(stop.code or 0), said.getvalue()
    raise AssertionError


def as_command(main: Callable[[], None]) -> Callable[[], None]:
    """`main` through `run_command`; exit code 3 becomes the error again, with its sentence."""

    def action() -> None:
        code, said = ends(main)
        if code:
            assert code == 3 and said.count("\n") == 1 and "Traceback" not in said, said
            raise DiskFullError(28, said.strip().partition(": ")[2])

    return action


# --------------------------------------------------------------------------- stores and arrays


@pytest.mark.parametrize("old", [False, True], ids=["new", "overwrite"])
@on_a_small_disk
def test_store(disk, old):
    prefix = disk.folder / "s"
    if old:
        write(prefix, [[[1, 2]]])

    def action() -> None:
        with StoreWriter(str(prefix), FakeTokenizer(), {}, overwrite=True) as writer:
            for _ in range(20):
                writer.add_document([[7] * 700, [8] * 300])

    failures = disk.fails_cleanly(action)
    assert failures >= 9  # 40 kB of ids
    assert TokenStore.open(prefix, verify=True).num_tokens == 20_000


@on_a_small_disk
def test_a_store_that_outgrows_its_buffer(disk):
    """The failure of a write while documents are added, not only at the end."""
    disk.fill(100 * PAGE)
    with pytest.raises(DiskFullError, match=r"s\.bin: .* 600,000 more bytes were wanted"):
        with StoreWriter(str(disk.folder / "s"), FakeTokenizer(), {}) as writer:
            for _ in range(20):
                writer.add_document([[7] * 300_000])
    disk.free()
    assert disk.tree() == {}


@on_a_small_disk
def test_last_shard_and_list_of_shards(disk):
    prefix = disk.folder / "s"
    write(prefix, [[[1, 2]]], (0, 2))

    def action() -> None:
        if (disk.folder / "s-00001-of-00002.json").exists():  # only the list is missing
            from preprocess.store import join_shards

            join_shards(str(prefix), 2)
        else:
            write(prefix, [[[7] * 4000]], (1, 2))

    # The last shard may be complete while the list that completes the store is not.
    shard = [f"s-00001-of-00002.{ending}" for ending in ("bin", "idx", "json")]
    disk.fails_cleanly(action, complete=shard)
    assert TokenStore.open(prefix, verify=True).num_tokens == 4002


@pytest.mark.parametrize("kind", ["scores", "importance", "mask"])
@pytest.mark.parametrize("old", [False, True], ids=["new", "overwrite"])
@on_a_small_disk
def test_array(disk, kind, old):
    dtype = {"scores": np.float16, "importance": np.uint8, "mask": np.uint32}[kind]

    write(disk.folder / "s", [[[7] * 20_000]])
    (shard,) = TokenStore.open(disk.folder / "s").shards
    values = np.arange(20_000).astype(dtype)
    if old:
        write_array(shard, "n", kind, values, {"made": "before"})
    blocks = range(0, 20_000, 1000)

    def action() -> None:
        parts = (values[start : start + 1000] for start in blocks)
        write_array(shard, "n", kind, parts, {"made": "now"})

    assert disk.fails_cleanly(action) >= 5
    found, info = open_array(shard, "n", kind)
    assert info["made"] == "now" and (found == values).all()


@on_a_small_disk
def test_room_for_scores_is_taken_before_they_are_computed(disk):
    write(disk.folder / "s", [[[7] * 20_000]])
    (shard,) = TokenStore.open(disk.folder / "s").shards
    disk.fill(4 * PAGE)

    def compute() -> Iterator[np.ndarray]:
        raise AssertionError("an hour of work")
        yield np.zeros(1)

    with pytest.raises(DiskFullError, match=r"s\.n\.scores\.npy: .* 40,128 more bytes"):
        write_array(shard, "n", "scores", compute(), {})
    disk.free()


@on_a_small_disk
def test_annotation_with_its_store(disk):
    """The old annotation stays whole until the new one is."""
    from train.annotate import write_annotations

    prefix = str(disk.folder / "A")

    def action(size: int = 3000, delta: float = 0.1) -> None:
        ids = np.full(size, 7, np.uint16)
        write_annotations(
            prefix, FakeTokenizer(), [[ids], [ids]], [[np.ones(size, np.uint8)]] * 2,
            {"command": "annotate", "delta": delta},
        )

    action(10, 0.2)
    assert disk.fails_cleanly(action) >= 3
    (shard,) = TokenStore.open(prefix, verify=True).shards
    array, info = open_array(shard, "", "importance")
    assert len(array) == 6000 and info["delta"] == 0.1


@on_a_small_disk
def test_tokenize_corpus(disk, reviews_file, tiny_encoder):
    prefix = str(disk.folder / "s")
    command = ["--input", reviews_file, "--tokenizer", tiny_encoder, "--output", prefix]
    action = as_command(lambda: tokenize_corpus.main([*command, "--num_workers", "1"]))
    assert disk.fails_cleanly(action) >= 2
    assert TokenStore.open(prefix, verify=True).num_documents == 120


@on_a_small_disk
def test_tokenize_corpus_in_workers(disk, reviews_file, tiny_encoder):
    """The error of a worker comes through whole."""
    command = ["--input", reviews_file, "--tokenizer", tiny_encoder, "--num_shards", "2"]
    disk.fill(0)
    code, said = ends(lambda: tokenize_corpus.main(
        [*command, "--num_workers", "2", "--output", str(disk.folder / "s")]
    ))
    disk.free()
    assert code == 3
    check_sentence(said.strip(), disk.folder)
    assert disk.tree() == {}


@on_a_small_disk
def test_build_masks(disk, tiny_tokenizer):
    prefix = str(disk.folder / "s")
    with StoreWriter(prefix, tiny_tokenizer, {}) as writer:
        writer.add_document([np.arange(20_000) % 40 + 5])
    flags = ["--tokens", prefix, "--strategy", "random", "--name", "r"]
    action = as_command(lambda: build_masks.main([*flags, "--mlm_probability", "0.5"]))
    assert disk.fails_cleanly(action) >= 10
    (shard,) = TokenStore.open(prefix).shards
    assert abs(len(open_array(shard, "r", "mask")[0]) - 10_000) < 200


# --------------------------------------------------------------------------- logs and results


@on_a_small_disk
def test_metrics_and_tensorboard(disk):
    """Both logs stay readable up to the step before, and the run that goes on completes them."""
    from train.report import read_curves
    from train.run_dir.metrics import GRAD_NORM, TRAIN_LOSS, MetricsWriter

    run = disk.folder / "run"
    run.mkdir()
    for name in ("new", "half-way"):
        disk.fill(3 * PAGE if name == "half-way" else 0)
        step = 0
        with pytest.raises(DiskFullError) as caught:
            writer = MetricsWriter(run)
            for step in range(1, 10_000):
                writer.scalars(step, {TRAIN_LOSS: float(step), GRAD_NORM: 1.0})
        check_sentence(str(caught.value), disk.folder)
        disk.free()
    assert step > 20
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # The line of the step is written before its point, so the disk may be full in between.
    assert [line["step"] for line in lines] in (list(range(1, step)), list(range(1, step + 1)))
    writer = MetricsWriter(run, step - 1)
    for later in range(step, step + 5):
        writer.scalars(later, {TRAIN_LOSS: float(later)})
    writer.hyperparameters({"seed": 1})
    writer.close()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, step + 5))
    (curves,), _ = read_curves([disk.folder])
    steps, values = curves.scalars[TRAIN_LOSS]
    assert steps == list(range(1, step + 5)) and values == [float(s) for s in steps]


@on_a_small_disk
def test_logs_and_results(disk):
    """They are written, and appended to, completely or not at all."""
    from preprocess.corpus import Example, Task
    from train.reports.results import read_finetune_run
    from train.stages.floors import write_naive_bayes

    examples = [Example(f"word{i % 7} " * 20, i % 2, None, str(i)) for i in range(60)]
    task = Task("t", ("a", "b"), {"train": examples, "test": examples})

    path = disk.folder / "log"
    append_bytes(path, b"x" * 5000)
    assert disk.fails_cleanly(lambda: append_bytes(path, b"y" * 9000)) >= 2
    assert path.read_bytes() == b"x" * 5000 + b"y" * 9000
    path = disk.folder / "results.jsonl"
    rows = [{"seed": i, "text": "x" * 500} for i in range(20)]
    write_json_lines(path, rows[:3])
    assert disk.fails_cleanly(lambda: write_json_lines(path, rows)) >= 2
    assert len(path.read_text().splitlines()) == 20
    path = disk.folder / "results.json"
    assert disk.fails_cleanly(lambda: atomic_write_json(path, {"rows": rows})) >= 2
    disk.fill(PAGE)
    with pytest.raises(DiskFullError, match=r"predictions\.jsonl"):
        write_naive_bayes(task, disk.folder / "floor")
    disk.free()
    assert not (disk.folder / "floor" / "results.jsonl").exists()
    write_naive_bayes(task, disk.folder / "floor")
    run = read_finetune_run(disk.folder / "floor")
    assert run.seeds == [0] and run.correct is not None


# --------------------------------------------------------------------------- training commands


def wrap(owner: Any, name: str, call: int, disk: Disk, left: int) -> Callable[[], None]:
    """Fill the disk just before the call number `call` of a function; returns how to undo it."""
    plain, calls = getattr(owner, name), [0]

    def filled(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            disk.fill(left)
        return plain(*arguments, **options)

    setattr(owner, name, filled)
    return lambda: setattr(owner, name, plain)


def train_on_a_full_disk(folder: str, how: str, store: str, encoder: str, task: str) -> None:
    """What `test_training_commands` starts: one process, many runs, each meets a full disk."""
    import torch

    from preprocess import errors
    from tests.support.runs import arguments, weights
    from train import finetune, pretrain
    from train.config import PretrainConfig, parse
    from train.run_dir import checkpoint, metrics
    from train.run_dir import folder as run_folder
    from train.stages import supervised

    errors._leave_group = lambda together: None  # more runs follow in this process
    disk = Disk(Path(folder), how, 24 << 20)
    disk.begin()
    shutil.copytree(Path(store).parent, disk.folder / "store",
                    ignore=shutil.ignore_patterns("*.rows-*"))  # tables that other tests made
    prefix = str(disk.folder / "store" / Path(store).name)
    run_dir = disk.folder / "run"
    flags = arguments(prefix, encoder, run_dir, save_steps=1, save_total_limit=9, eval_fraction=0.1)

    def train() -> None:
        pretrain.run(parse(PretrainConfig, flags))

    def tested(name: str, main: Callable[[], None], undo: Callable[[], None], where: str) -> None:
        before = disk.tree()
        code, said = ends(main)
        undo()
        disk.free()
        assert code == 3 and said.count("\n") == 1 and where in said, (name, code, said)
        check_sentence(said.strip(), disk.folder)
        after = disk.tree()
        changed = {path for path, data in before.items() if after.get(path, b"") != data}
        # The time of the last start, the log of steps that are made again, and seconds of training.
        again = {"env.json", "metrics.jsonl", "lineage.json", "README.md"}
        assert {Path(path).name for path in changed} <= again, (name, changed)
        odd = [path for path in after if ".tmp" in path or "/." in path]
        assert not odd, f"{name} leaves {odd}"
        for path in run_dir.glob("checkpoints/*"):
            assert checkpoint.check_checkpoint(path) is None, f"{name}: {path}"

    disk.fill(PAGE if how == "disk" else PAGE // 4)  # no file of the table is larger than a page
    tested("row table", train, lambda: None, ".rows-")
    train()
    expected = weights(run_dir)
    shutil.rmtree(run_dir)
    cases: list[tuple[str, Any, str, int, int, str]] = [
        ("options of the run", run_folder, "prepare_run_dir", 1, 0, "/run"),
        ("first scalars", metrics.MetricsWriter, "scalars", 1, 0, "/run/"),
        ("later scalars", metrics.MetricsWriter, "scalars", 3, 0, "/run/"),
        *((f"checkpoint, {left} bytes left", checkpoint, "save_checkpoint", 2, left, "step_2")
          for left in (0, 20 * PAGE, 50 * PAGE)),
        ("pointer", checkpoint, "_commit", 2, 0, "step_2"),
        ("export", pretrain, "export", 1, 0, "/run/hf: "),
        ("export, nearly", pretrain, "export", 1, 20 * PAGE, "/run/hf: "),
    ]
    for name, owner, function, call, left, where in cases:
        tested(name, train, wrap(owner, function, call, disk, left), where)
        train()  # the same command again
        found = weights(run_dir)
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        assert sorted(set(steps)) == [0, 1, 2, 3, 4], name
        shutil.rmtree(run_dir)

    run_dir = disk.folder / "tuned"
    finetune_flags = [
        "--task", "custom", "--train_file", f"{task}/train.csv", "--test_file", f"{task}/test.csv",
        "--model_name_or_path", encoder, "--seeds", "1,2", "--num_train_epochs", "1",
        "--max_seq_length", "32", "--output_dir", str(run_dir),
    ]

    def tune() -> None:
        finetune.main(finetune_flags)

    finetune.finish = lambda: None  # more runs follow in this process
    for name, owner, function, call, where in (
        ("model of the second seed", supervised, "save_hf", 1, "/seed_2/hf: "),
        ("predictions", finetune, "write_json_lines", 1, "predictions.jsonl"),
        ("results", finetune, "write_json_lines", 2, "results.jsonl"),
        ("scalars", supervised.MetricsWriter, "scalars", 1, "/tuned/seed_2/"),
    ):
        if not run_dir.exists():
            undo = wrap(finetune, "run_seed", 2, disk, 0)
            ends(tune)  # the first seed is whole
            undo()
            disk.free()
        tested(name, tune, wrap(owner, function, call, disk, 0), where)
        rows = (run_dir / "results.jsonl").read_text().splitlines()
        assert [json.loads(row)["seed"] for row in rows] == [1], name
    tune()
    rows = (run_dir / "results.jsonl").read_text().splitlines()
    assert [json.loads(row)["seed"] for row in rows] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["disk", pytest.param("limit", marks=pytest.mark.faults)])
def test_training_commands(tmp_path, how, reviews_store, still_encoder, labelled_files):
    """Pre-training and fine-tuning: the same command goes on, and ends with the same weights."""
    task = str(Path(labelled_files["train"]).parent)
    code = (
        "from tests.robustness import test_disk_full\n"
        f"test_disk_full.train_on_a_full_disk({str(tmp_path)!r}, {how!r}, {reviews_store!r}, "
        f"{still_encoder!r}, {task!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=600,
        env=launch_environment() | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]

# --------------------------------------------------------------------------- how it is said


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(122, "Disk quota exceeded"),
        OSError(27, "File too large"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        Exception("No space left on device (os error 28)"),
    ],
)
def test_every_way_to_say_it_becomes_one_sentence(tmp_path, error):
    """The last two kinds are torch's and those of the libraries in Rust."""
    path = tmp_path / "deep" / "er" / "file"
    with pytest.raises(DiskFullError, match=r"1,234 more bytes were wanted, [\d,]+ bytes are free"):
        with writing(path, 1234):
            raise error

    def main() -> None:
        raise error

    code, said = ends(main)  # one that no writer of ours has seen
    assert code == 3 and said.count("\n") == 1


def test_other_errors_keep_their_kind_and_get_a_name(tmp_path):
    with pytest.raises(PermissionError) as caught:
        with writing(tmp_path / "file"):
            raise PermissionError(13, "Permission denied")
    assert caught.value.filename == str(tmp_path / "file")
    with pytest.raises(KeyError), writing(tmp_path / "file"):
        raise KeyError("a bug")


def test_an_error_after_the_start_is_said_by_the_rank_that_meets_it(monkeypatch):
    from preprocess import errors

    def main() -> None:
        raise DiskFullError(28, "x.bin: cannot be written")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(errors.time, "sleep", lambda _: None)
    monkeypatch.setattr(errors.signal, "signal", lambda *_: None)
    monkeypatch.setattr(errors, "_is_alone", lambda: False)
    assert ends(main) == (3, "")
    monkeypatch.setattr(errors, "_is_alone", lambda: True)
    code, said = ends(main)
    assert code == 3 and ", rank 1: x.bin: cannot be written" in said
