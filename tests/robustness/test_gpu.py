"""All stages in 16 bit: on a GPU with `pytest -m gpu`, and one setting of them on a CPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from preprocess import errors
from preprocess.errors import DataError, StopRequested
from tests.support.launch import ROOT, fresh_environment
from train.engine import group

SCRIPT = ROOT / "tests" / "support" / "all_stages.py"
# What torch and NCCL say when the process group is not told its device, or not closed.
COMPLAINTS = ("barrier()", "device_id", "destroy_process_group", "ProcessGroup")


@pytest.fixture(scope="module")
def stages(tmp_path_factory, reviews_store, still_encoder, labelled_files):
    """Run all stages as one process; return its summary and all that it said."""
    folder = tmp_path_factory.mktemp("stages")

    def run(precision: str, zero: int) -> tuple[dict, str]:
        name = f"{precision}_zero{zero}"
        store = shutil.copytree(Path(reviews_store).parent, folder / f"store_{name}")
        done = subprocess.run(
            [sys.executable, SCRIPT, "--folder", folder / name, "--tokens",
             store / Path(reviews_store).name, "--encoder", still_encoder, "--train_file",
             labelled_files["train"], "--test_file", labelled_files["test"], "--precision",
             precision, "--zero", str(zero)],
            cwd=ROOT, env=fresh_environment(), text=True, capture_output=True, timeout=240,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr

    return run


def check(found: dict) -> None:
    """Every stage learnt, and fp16 skipped some steps until its scale fitted."""
    for stage, row in found["stages"].items():
        first, last = row["loss"]
        assert last < first, (stage, row)
        assert 0 < row["skipped"] < row["steps"] / 2, (stage, row)
        assert 1 < row["scale"] < 2**20, (stage, row)
    assert found["accuracy"] > 0.5 and np.isfinite(found["scores"]).all()


@pytest.mark.slow
def test_all_stages_in_fp16_on_a_cpu(stages):
    found, said = stages("fp16", 1)
    check(found)
    assert not [text for text in COMPLAINTS if text in said]


@pytest.mark.gpu
def test_all_stages_in_fp16_on_a_gpu(stages, capsys):
    """With a line for the README at the end."""
    lines = []
    for zero in (1, 2, 3):
        found, said = stages("fp16", zero)
        assert found["gpu"]
        check(found)
        assert not [text for text in COMPLAINTS if text in said], said
        rows = found["stages"].values()
        losses = ", ".join(f"{stage} {row['loss'][0]:.3f} to {row['loss'][1]:.3f}"
                           for stage, row in found["stages"].items())
        lines.append(f"ZeRO {zero}: {sum(row['steps'] for row in rows)} steps, "
                     f"{sum(row['skipped'] for row in rows)} skipped; {losses}")
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    with capsys.disabled():
        print("\n" + "\n".join([f"All stages in fp16 on {found['gpu']}, commit {found['commit']}; "
                               f"{versions}", *lines]))


class FakeGroup:
    """What `run_command` uses of `torch.distributed`."""

    def __init__(self, world_size: int, backend: str) -> None:
        self.world_size, self.backend, self.left = world_size, backend, []
        self.distributed_c10d = self

    def get_world_size(self) -> int:
        return self.world_size

    def get_backend(self) -> str:
        return self.backend

    def destroy_process_group(self) -> None:
        self.left.append("destroyed")

    def _abort_process_group(self) -> None:
        self.left.append("aborted")


@pytest.mark.parametrize(("error", "world_size", "backend", "left"), [
    (None, 2, "nccl", ["destroyed"]),
    (StopRequested("later"), 2, "nccl", ["destroyed"]),
    (errors.NonFiniteError("loss"), 2, "gloo", ["destroyed"]),
    # The others may be waiting for this rank: it does not wait for them.
    (DataError("broken"), 2, "nccl", ["aborted"]), (ZeroDivisionError(), 2, "nccl", ["aborted"]),
    (DataError("broken"), 2, "gloo", []), (DataError("broken"), 1, "nccl", ["destroyed"]),
    (OSError(5, "disk"), 1, "nccl", ["destroyed"]),
])
def test_every_exit_leaves_the_process_group(monkeypatch, error, world_size, backend, left):
    def main() -> None:
        if error:
            raise error

    joined = FakeGroup(world_size, backend)
    monkeypatch.setattr(errors, "_process_group", lambda: joined)
    with pytest.raises((SystemExit, ZeroDivisionError)):
        errors.run_command(main)
    assert joined.left == left


@pytest.mark.parametrize(("world_size", "backend"), [(1, "cpu:gloo,cuda:nccl"), (2, None)])
def test_a_gpu_is_chosen_before_the_group_starts(monkeypatch, world_size, backend):
    """With many ranks DeepSpeed tells NCCL the device itself."""
    seen: list = []
    for name, value in {"RANK": 0, "WORLD_SIZE": world_size, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(str(device)))
    deepspeed = types.SimpleNamespace(
        init_distributed=lambda backend, verbose: seen.append(backend))
    monkeypatch.setattr(group, "load_deepspeed", lambda: deepspeed)
    assert group.start() == torch.device("cuda", 0)
    assert seen == ["cuda:0", backend]


def test_deepspeed_tells_many_ranks_their_device():
    """What `start` relies on."""
    import inspect

    from deepspeed.comm.torch import TorchBackend

    text = inspect.getsource(TorchBackend.init_process_group)
    assert "known_world_size(world_size) != 1" in text and "kwargs.update(device_id=" in text


def test_a_cpu_that_was_asked_for_stays_one():
    """DeepSpeed's launcher shows GPUs to its ranks even then."""
    environment = fresh_environment() | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "0,1"}
    done = subprocess.run(
        [sys.executable, "-c", "import os, train.engine; print(os.environ['CUDA_VISIBLE_DEVICES'],"
         "'none')"], cwd=ROOT, env=environment, text=True, capture_output=True, check=True)
    assert done.stdout == " none\n"
