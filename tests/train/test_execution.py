"""What a run settles at its first start: the rows that fit, compiling, sizes; and its seconds."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preprocess.errors import ConfigError
from tests.support.runs import arguments, write_ds_config
from train import pretrain
from train.config import PretrainConfig, parse
from train.run_dir.folder import EXECUTION, read_execution
from train.stages import execution
from train.stages.execution import Trial, largest_fitting, settle_micro_batch
from train.stages.startup import Startup


@pytest.mark.parametrize(("rows", "room", "found"), [
    (512, 300, 256), (512, 512, 512), (96, 50, 32), (81, 50, 27), (81, 81, 81), (6, 5, 2),
    (7, 6, 1), (512, 0, 0), (1, 1, 1),
])
def test_the_largest_power_of_two_that_divides_and_fits(rows, room, found):
    assert largest_fitting(rows, lambda n: n <= room) == found


@given(st.integers(1, 2000), st.integers(0, 2000))
def test_what_is_found_divides_fits_and_nothing_is_tried_beyond_the_first_failure(rows, room):
    asked = []

    def fits(n):
        asked.append(n)
        return n <= room

    found = largest_fitting(rows, fits)
    assert (found == 0) == (room == 0) and (not found or rows % found == 0) and found <= room
    assert asked == sorted(asked) and sum(n > room for n in asked) <= 1
    powers = [2**k for k in range(1, 12) if rows % 2**k == 0 and 2**k <= room]
    assert found == max(powers) if powers else True


def config(tmp_path, *flags: str, store: str = "no-store", model: str = "m") -> PretrainConfig:
    words = arguments(store, model, tmp_path / "run")
    return parse(PretrainConfig, [*words, "--per_device_train_batch_size", "auto", *flags])


def never(_: PretrainConfig) -> Trial:
    raise AssertionError("nothing is to be tried")


def test_auto_needs_a_gpu(tmp_path):
    with pytest.raises(ConfigError, match="auto: measures the memory of a GPU, .* give a number"):
        settle_micro_batch(config(tmp_path), tmp_path, never)


@pytest.mark.parametrize(("flags", "blocks", "said"), [
    (["--gradient_accumulation_steps", "2"], {}, "auto with gradient_accumulation_steps 2"),
    ([], {"train_micro_batch_size_per_gpu": 4}, "auto contradicts train_micro_batch_size_per_gpu"),
    ([], {"train_batch_size": 16}, "--train_batch_size 8 contradicts train_batch_size 16"),
])
def test_what_contradicts_auto_is_one_sentence(tmp_path, flags, blocks, said):
    path = write_ds_config(tmp_path, 1, blocks)
    with pytest.raises(ConfigError, match=said):
        settle_micro_batch(config(tmp_path, *flags, "--deepspeed_config", path), tmp_path, never)


def test_rows_that_no_rank_gets_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="train_batch_size 8: must be a multiple of the 3 ranks"):
        settle_micro_batch(config(tmp_path), tmp_path, never)


def test_auto_is_measured_once_and_kept(tmp_path, monkeypatch):
    """On a made-up GPU of 1000 bytes, of which a row takes 200 and the states 100."""
    peak = [0]
    for name, value in {
        "is_available": lambda: True, "memory_allocated": lambda device: 50,
        "mem_get_info": lambda device: (950, 1000), "max_memory_allocated": lambda device: peak[0],
        "reset_peak_memory_stats": lambda device: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(execution.ds, "read_ds_config", lambda path: {})
    tried = []

    def run(n):
        tried.append(n)
        if n == 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        peak[0] = 50 + 200 * n

    def trial(given):
        assert given.per_device_train_batch_size == 1
        return Trial(run, torch.device("cuda"), 100.0)

    settled = settle_micro_batch(config(tmp_path), tmp_path, trial)
    assert settled.per_device_train_batch_size == 4 and tried == [1, 2, 4, 8]
    (tmp_path / EXECUTION).write_text(json.dumps({"micro_batch_size": 2}))
    assert settle_micro_batch(config(tmp_path), tmp_path, never).per_device_train_batch_size == 2


def test_memory_that_runs_out_is_one_sentence(monkeypatch):
    class Card:
        total_memory = 80 * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    for rows, remedy in ((512, "try --per_device_train_batch_size 256, or auto"),
                         (1, "use more ranks, --gradient_checkpointing")):
        with (pytest.raises(ConfigError, match=f"^{rows} rows .* 80.0 GiB .*; {remedy}"),
              execution.memory_is_enough(rows, torch.device("cuda"))):
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_choices_of_the_first_start_are_kept(tmp_path, reviews_store, still_encoder, monkeypatch):
    flags = arguments(reviews_store, still_encoder, tmp_path / "run", max_steps=1)
    pretrain.run(parse(PretrainConfig, flags))
    recorded = read_execution(tmp_path / "run")
    assert recorded == {"micro_batch_size": 8, "torch_compile": False, "sizes": None}
    # Another machine would decide otherwise, for a longer run too.
    monkeypatch.setattr(pretrain.model, "choose_compiling", lambda *words: (True, "compiled here"))
    kept = pretrain.read_inputs(parse(PretrainConfig, flags)).execution
    assert not kept.torch_compile and kept.why == "layers are not compiled, as before"
    asked = pretrain.read_inputs(parse(PretrainConfig, [*flags, "--torch_compile"])).execution
    assert asked.torch_compile and asked.sizes is not None
    record = {**recorded, "sizes": {"masked": 640, "per_row": 16}}
    (tmp_path / "run" / EXECUTION).write_text(json.dumps(record))
    assert pretrain.read_inputs(parse(PretrainConfig, flags)).execution.sizes.masked == 640


def test_a_dry_run_says_where_the_seconds_go(tmp_path, reviews_store, still_encoder, capsys):
    flags = arguments(reviews_store, still_encoder, tmp_path / "run")
    pretrain.run(parse(PretrainConfig, [*flags, "--dry_run"]))
    last = capsys.readouterr().out.splitlines()[-1]
    assert "start " in last and "imports " in last and "inputs " in last and "model " in last


def test_the_clock_starts_with_the_process():
    clock = Startup()
    clock.lap("imports")
    age = float(str(clock).split()[1])
    assert age > 0.1 and math.isclose(age, float(str(clock).split()[-1]), abs_tol=0.1)
