"""Runs that are extended: the same bits as at once, schedules of their own, and refusals."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from preprocess.errors import ConfigError, DataError, StopRequested
from tests.support.forked_ranks import Server
from tests.support.runs import arguments, logged, pretrained, weights, write_ds_config
from train import pretrain
from train.config import PretrainConfig, parse
from train.engine import TYPES
from train.run_dir import metrics, parts
from train.run_dir.hf_folder import read_stages
from train.stages import extension
from train.stages import masked_lm as mlm

PEAK = 5e-3


@pytest.fixture(scope="module")
def two_warm_up_steps(tmp_path_factory) -> dict[str, Any]:
    """Options of a run whose warm-up is no share of its length."""
    scheduler = {"type": "auto", "params": {"warmup_num_steps": 2}}
    path = write_ds_config(tmp_path_factory.mktemp("json"), 1, {"scheduler": scheduler})
    return {"deepspeed_config": path, "warmup_ratio": None, "save_total_limit": 1}


def stop_after(step: int, patch: pytest.MonkeyPatch) -> None:
    """Ask every run to stop when its engine has taken `step` steps."""
    plain = mlm.train_step

    def noted(engine: Any, *words: Any, **names: Any) -> Any:
        *found, _ = plain(engine, *words, **names)
        return (*found, engine.global_steps == step)

    patch.setattr(mlm, "train_step", noted)


def assert_same_bits(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    tags = (metrics.TRAIN_LOSS, metrics.LEARNING_RATE, metrics.MASKED_FRACTION)
    assert all(logged(one, tag) == logged(other, tag) for tag in tags)


def steps_kept(run_dir: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("name, kept", [("constant", [[6], [12]]), ("wsd", [[5, 6], [10, 12]])])
def test_six_steps_and_then_twelve_are_twelve_at_once(
    name, kept, two_warm_up_steps, tmp_path, reviews_store, tiny_encoder, monkeypatch, capsys
):
    """With dropout, and stopped once more on the way; the decay of the first six is given up."""
    options = {**two_warm_up_steps, "lr_scheduler_type": name,
               "decay_ratio": 0.2 if name == "wsd" else None}
    straight = pretrained(reviews_store, tiny_encoder, tmp_path / "straight", max_steps=12,
                          **options)
    run_dir = pretrained(reviews_store, tiny_encoder, tmp_path / "run", max_steps=6, **options)
    assert steps_kept(run_dir) == kept[0]
    before, rates = weights(run_dir), np.array(logged(run_dir, metrics.LEARNING_RATE)) / PEAK
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 0.5 if name == "wsd" else 1])
    capsys.readouterr()
    with monkeypatch.context() as patch:
        stop_after(8, patch)
        with pytest.raises(StopRequested, match="after step 8 of 12"):
            pretrained(reviews_store, tiny_encoder, run_dir, max_steps=12, **options)
    said = capsys.readouterr().out
    assert "extends a run of 6 steps to 12: its schedule goes on" in said
    assert f"resumed from {run_dir}/checkpoints/step_{kept[0][0]}" in said
    # What was finished stays so until the end of the longer run.
    assert all(torch.equal(before[key], value) for key, value in weights(run_dir).items())
    pretrained(reviews_store, tiny_encoder, run_dir, max_steps=6, **options)
    assert "finished already" in capsys.readouterr().out
    pretrained(reviews_store, tiny_encoder, run_dir, max_steps=12, **options)
    assert "step_8" in capsys.readouterr().out and steps_kept(run_dir) == kept[1]
    assert_same_bits(run_dir, straight)
    pretrained(reviews_store, tiny_encoder, run_dir, max_steps=12, **options)
    assert "finished already" in capsys.readouterr().out
    (stage,), (other,) = read_stages(run_dir / "hf"), read_stages(straight / "hf")
    assert stage["identity"]["length"] == {"max_steps": 12, "parts": [{"max_steps": 6}]}
    assert stage["totals"]["steps"] == 12
    assert stage["totals"]["masked_tokens"] == other["totals"]["masked_tokens"]
    assert stage["identity"]["train"] == other["identity"]["train"]
    with pytest.raises(ConfigError, match="made with --max_steps 12, and this run has 6; give an"):
        pretrained(reviews_store, tiny_encoder, run_dir, max_steps=6, **options)
    for dry_run in (True, None):
        with pytest.raises(ConfigError, match="made with --seed 42, and this run has 7; give an"):
            pretrained(reviews_store, tiny_encoder, run_dir, max_steps=18, seed=7,
                       dry_run=dry_run, **options)
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(ConfigError, match=f"no complete checkpoint .*: --model_name_or_path "
                                          f"{run_dir}/hf --output_dir ANOTHER"):
        pretrained(reviews_store, tiny_encoder, run_dir, max_steps=18, **options)


def test_a_constant_run_ends_in_a_decay(two_warm_up_steps, tmp_path, reviews_store, still_encoder):
    options = {**two_warm_up_steps, "eval_fraction": 0}
    decay = {**options, "lr_scheduler_type": "wsd", "decay_ratio": 0.5, "max_steps": 6}
    straight = pretrained(reviews_store, still_encoder, tmp_path / "straight", **decay)
    run_dir = pretrained(reviews_store, still_encoder, tmp_path / "run", max_steps=3,
                         lr_scheduler_type="constant", **options)
    pretrained(reviews_store, still_encoder, run_dir, **decay)
    assert_same_bits(run_dir, straight)


def test_extend_gives_the_new_steps_a_schedule_of_their_own(
    tmp_path, reviews_store, tiny_encoder, monkeypatch, capsys
):
    options = {"eval_fraction": 0, "warmup_ratio": 0.5}
    run_dir = pretrained(reviews_store, tiny_encoder, tmp_path / "run", **options)
    with pytest.raises(ConfigError, match="--max_steps 4, and this run has 10; give another "
                                          "--output_dir, or add --extend: the new steps then have"):
        pretrained(reviews_store, tiny_encoder, run_dir, max_steps=10, **options)
    shutil.copytree(run_dir, tmp_path / "copy")
    longer = {**options, "max_steps": 10, "extend": True}
    with monkeypatch.context() as patch:
        stop_after(6, patch)
        with pytest.raises(StopRequested, match="after step 6 of 10"):
            pretrained(reviews_store, tiny_encoder, run_dir, **longer)
    assert "to 10: a schedule of its own from step 5" in capsys.readouterr().out
    # The same command goes on, with or without --extend; and ends as if it had not been stopped.
    pretrained(reviews_store, tiny_encoder, run_dir, **{**longer, "extend": None})
    pretrained(reviews_store, tiny_encoder, tmp_path / "copy", **longer)
    assert_same_bits(run_dir, tmp_path / "copy")
    rates = np.array(logged(run_dir, metrics.LEARNING_RATE)) / PEAK
    # Half of each part is warm-up, the other half decays towards the step behind the last.
    assert rates == pytest.approx([1/2, 1, 2/3, 1/3, 1/3, 2/3, 1, 3/4, 2/4, 1/4])
    (stage,) = read_stages(run_dir / "hf")
    (part,) = stage["identity"]["length"]["parts"]
    assert (part["max_steps"], part["to_step"], stage["totals"]["steps"]) == (4, 4, 10)
    assert part["schedule"]["total_num_steps"] == 5
    assert stage["identity"]["train"]["schedule"]["total_num_steps"] == 7
    capsys.readouterr()
    pretrained(reviews_store, tiny_encoder, run_dir, **longer)
    assert "finished already" in capsys.readouterr().out
    # Its first steps cannot be repeated without the earlier schedule.
    shutil.rmtree(run_dir / "hf")
    for path in (run_dir / "checkpoints").glob("step_*/generators_rank0.pt"):
        path.unlink()
    with pytest.raises(DataError, match="no complete checkpoint is left of the run that this one"):
        pretrained(reviews_store, tiny_encoder, run_dir, **longer)


def test_runs_that_cannot_be_extended(tmp_path, reviews_store, still_encoder, two_warm_up_steps):
    with pytest.raises(ConfigError, match="--extend: .* holds no run to extend; leave --extend"):
        pretrained(reviews_store, still_encoder, tmp_path / "none", extend=True)
    options = {"eval_fraction": 0, "lr_scheduler_type": "constant", "max_steps": 2,
               "mlm_probability": "0.6:0.1"}
    run_dir = pretrained(reviews_store, still_encoder, tmp_path / "rates", **options)
    for extend in (None, True):
        with pytest.raises(ConfigError, match="--max_steps 2, and this run has 4; give another "
                                              "--output_dir$"):
            pretrained(reviews_store, still_encoder, run_dir, **{
                **options, "max_steps": 4, "extend": extend})
    options = {**two_warm_up_steps, "eval_fraction": 0, "lr_scheduler_type": "wsd",
               "decay_ratio": 0.5, "max_steps": 4}
    run_dir = pretrained(reviews_store, still_encoder, tmp_path / "wsd", **options)
    shutil.rmtree(run_dir / "checkpoints" / "step_2")
    with pytest.raises(ConfigError, match="made with --max_steps 4, and no complete checkpoint of "
                                          "the steps before its decay .* add --extend"):
        pretrained(reviews_store, still_encoder, run_dir, **{**options, "max_steps": 8})


# --------------------------------------------------------------------- ranks, and compiled layers


def run_all(runs: list[list[str]]) -> None:
    """Pre-train several runs in a process group; a job of `forked_ranks`."""
    for words in runs:
        pretrain.run(parse(PretrainConfig, words))


@pytest.mark.slow
def test_two_ranks_extend_a_run_as_one_does(
    two_warm_up_steps, tmp_path, reviews_store, tiny_encoder
):
    """With dropout, and ZeRO's states in two halves."""
    def flags(name: str, max_steps: int, **options: Any) -> list[str]:
        return arguments(reviews_store, tiny_encoder, tmp_path / name, max_steps=max_steps,
                         **{**two_warm_up_steps, "eval_fraction": 0, **options})

    schedules: dict[str, dict[str, Any]] = {
        "constant": {"lr_scheduler_type": "constant"},
        "wsd": {"lr_scheduler_type": "wsd", "decay_ratio": 0.25},
    }
    own = {"deepspeed_config": None, "warmup_ratio": 0.5}
    runs = [flags(folder, steps, **options) for name, options in schedules.items()
            for folder, steps in ((f"{name}-straight", 8), (name, 4), (name, 8))]
    runs += [flags("own", 4, **own), flags("own", 10, extend=True, **own)]
    log = tmp_path / "log"
    with Server() as server:
        done = server.run("tests.train.test_extension:run_all", log, 2, runs=runs)
    said = log.read_text()
    assert done["codes"] == [0, 0], said[-4000:]
    assert said.count("extends a run of 4 steps to 8: its schedule goes on") >= len(schedules)
    for name in schedules:
        assert_same_bits(tmp_path / name, tmp_path / f"{name}-straight")
        (stage,) = read_stages(tmp_path / name / "hf")
        assert stage["identity"]["length"] == {"max_steps": 8, "parts": [{"max_steps": 4}]}
    rates = np.array(logged(tmp_path / "own", metrics.LEARNING_RATE)) / PEAK
    assert rates == pytest.approx([1/2, 1, 2/3, 1/3, 1/3, 2/3, 1, 3/4, 2/4, 1/4])


@pytest.mark.slow
def test_a_run_with_compiled_layers_is_extended(
    two_warm_up_steps, tmp_path, reviews_store, still_encoder
):
    """Its batches keep the sizes of the shorter run; those that are larger are not compiled."""
    options = {**two_warm_up_steps, "eval_fraction": 0, "torch_compile": True,
               "lr_scheduler_type": "constant"}
    straight = pretrained(reviews_store, still_encoder, tmp_path / "straight", max_steps=8,
                          **options)
    run_dir = pretrained(reviews_store, still_encoder, tmp_path / "run", max_steps=4, **options)
    sizes = (run_dir / "execution.json").read_text()
    pretrained(reviews_store, still_encoder, run_dir, max_steps=8, **options)
    assert (run_dir / "execution.json").read_text() == sizes and '"torch_compile": true' in sizes
    np.testing.assert_allclose(logged(run_dir, metrics.TRAIN_LOSS),
                               logged(straight, metrics.TRAIN_LOSS), rtol=1e-4)


# ------------------------------------------------------------------------------ without training


def identity(max_steps: int, *earlier: dict[str, Any], name: str = "constant", warmup: int = 10,
             decay: int = 0) -> parts.Identity:
    schedule = {"type": TYPES[name], "warmup_num_steps": warmup}
    if decay:
        schedule |= {"total_num_steps": max_steps + 1, "decay_num_steps": decay}
    length = {"max_steps": max_steps, **({"parts": [*earlier]} if earlier else {})}
    return {"command": "pretrain", "choice": {"rate": 0.15}, "length": length,
            "train": {"schedule": schedule}}


def test_where_the_warm_up_is_a_share_of():
    plain, own = {"max_steps": 10}, {"max_steps": 30, "to_step": 25, "schedule": {}}
    span = parts.schedule_span
    assert span([], 10) == (0, 10)
    assert span([plain, {"max_steps": 20}], 40) == (0, 10)
    assert span([plain, own], 40) == (25, 40)
    assert span([plain, own, {"max_steps": 50}], 90) == (25, 50)


def test_from_which_checkpoints_a_run_goes_on():
    go_on = parts.how_to_go_on
    first = {"max_steps": 100}
    assert go_on(identity(100), 7, identity(100)) == "same"
    assert go_on(identity(100), 100, identity(200, first)) == "continue"
    assert go_on(identity(100, warmup=9), 100, identity(200, first)) is None
    assert go_on(identity(90), 90, identity(200, first)) is None  # it was another run
    twice = identity(300, first, {"max_steps": 200})
    assert go_on(identity(100), 50, twice) == go_on(identity(200, first), 150, twice) == "continue"
    stable, longer = (identity(*each, name="wsd", decay=decay)
                      for each, decay in (((100,), 10), ((200, first), 20)))
    assert go_on(stable, 90, longer) == "continue" and go_on(stable, 91, longer) is None
    assert extension.stable_step(stable) == 90 and extension.stable_step(longer) == 180
    old = identity(100, name="linear")
    own = {**first, "to_step": 80, "schedule": old["train"]["schedule"]}
    new = identity(200, own, name="linear", warmup=12)
    assert go_on(old, 80, new) == "restart" and go_on(old, 79, new) is None
    assert go_on(new, 150, new) == "same"
    assert go_on(old, 80, identity(300, own, {"max_steps": 200}, name="linear")) == "restart"
    assert go_on(new, 150, identity(300, own, {"max_steps": 200}, warmup=12)) is None
