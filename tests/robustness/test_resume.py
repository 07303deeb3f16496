"""Exact resume: 2N steps in one go end in the same bits as N, a stop, and N more."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from preprocess.errors import StopRequested
from tests.support.forked_ranks import Server
from tests.support.runs import arguments, logged, pretrained, write_ds_config
from tests.support.states import assert_same_bits, leaves, states
from train import data
from train import engine as ds
from train.engine import ds_json
from train.run_dir import metrics
from train.stages import masked_lm as mlm

STEPS = 6
HALF = 3
BLOCKS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    # The scale starts too high and moves both ways.
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 2,
                      "hysteresis": 1}},
}
# fp16 without ZeRO is refused: DeepSpeed 0.19 forgets the loss scale there.
SETTINGS = [(p, s) for p in BLOCKS for s in range(4) if (p, s) != ("fp16", 0)]


def allow_all_precisions(patch: pytest.MonkeyPatch) -> None:
    """Let DeepSpeed's fp16 optimizers run on a CPU, where it refuses them as slow."""
    from deepspeed.accelerator import get_accelerator

    patch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    patch.setattr(ds_json, "_settle_precision", lambda config, options: (
        next((name for name in ("fp16", "bf16") if config.get(name, {}).get("enabled")), "fp32"), []
    ))


@pytest.fixture
def batches_seen(monkeypatch) -> list[list[np.ndarray]]:
    """Record ids, positions and labels of every step, in order."""
    seen: list[list[np.ndarray]] = []
    plain = mlm.train_step

    def noted(engine: Any, batch: data.StepBatch, *words: Any, **names: Any) -> Any:
        seen.append([
            value.numpy().copy() for micro in batch.micro_batches
            for value in vars(micro).values() if isinstance(value, torch.Tensor)
        ])
        return plain(engine, batch, *words, **names)

    monkeypatch.setattr(mlm, "train_step", noted)
    return seen


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask every run to stop when it has taken `step` steps."""
    plain = mlm.train_step

    def noted(engine: Any, *words: Any, **names: Any) -> Any:
        *found, _ = plain(engine, *words, **names)
        return (*found, engine.global_steps == step)

    monkeypatch.setattr(mlm, "train_step", noted)


@pytest.mark.parametrize(
    ("precision", "stage", "changes"),
    [pytest.param(*one, {}, marks=() if one[0] == "fp32" else pytest.mark.slow)
     for one in SETTINGS] + [("fp32", 0, {"mlm_probability": "0.6:0.1", "corruption": "50,40,10"})],
)
def test_stopped_and_resumed_equals_straight(
    precision, stage, changes, tmp_path, reviews_store, tiny_encoder, batches_seen, monkeypatch
):
    """Dropout is on; a step has two micro batches."""
    allow_all_precisions(monkeypatch)
    options = {
        **changes, "max_steps": STEPS, "gradient_accumulation_steps": 2, "eval_fraction": 0,
        "deepspeed_config": write_ds_config(tmp_path, stage, BLOCKS[precision]),
    }
    pretrained(reviews_store, tiny_encoder, tmp_path / "straight", **options)
    straight, batches_seen[:] = list(batches_seen), []
    with monkeypatch.context() as patch:
        stop_after(HALF, patch)
        with pytest.raises(StopRequested, match=f"after step {HALF} of {STEPS}"):
            pretrained(reviews_store, tiny_encoder, tmp_path / "broken", **options)
    torch.manual_seed(0)  # a new process has other numbers to come
    pretrained(reviews_store, tiny_encoder, tmp_path / "broken", resume="must", **options)
    last = f"checkpoints/step_{STEPS}"
    one, other = (states(tmp_path / name / last) for name in ("straight", "broken"))
    assert_same_bits(one, other)
    assert len(straight) == len(batches_seen) == STEPS
    for arrays, others in zip(straight, batches_seen, strict=True):
        assert all(map(np.array_equal, arrays, others))
    rates = [logged(tmp_path / name, metrics.MASKED_FRACTION) for name in ("straight", "broken")]
    assert rates[0] == rates[1] and (not changes or sorted(rates[0], reverse=True) == rates[0])
    text = " ".join(one)
    assert all(name in text for name in ("exp_avg", "exp_avg_sq", "lr_scheduler", "generators"))
    if precision == "fp16":
        # Not the scale of the beginning: its history was needed.
        scales = {value for key, value in one.items() if key.endswith("cur_scale")}
        assert scales and not scales & {2**16, 2**20}
        skipped = [value for key, value in one.items() if key.endswith("skipped_steps")]
        assert skipped[0] > 0


# ------------------------------------------------------------------- another number of ranks

LONG = 20
"""Steps of the runs whose loss is compared at 1, 2 and 4 ranks."""
SHORT = 8
"""Steps of the others. The number of ranks changes half-way."""


def full_states(engine: Any) -> dict[str, torch.Tensor]:
    """Return fp32 weights and both moments of every parameter, unsharded, by name; collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = {}
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        if engine.zero_optimization_stage():
            found[f"{name}.fp32"] = safe_get_full_fp32_param(parameter)
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{name}.{key}"] = safe_get_full_optimizer_state(parameter, key)
        else:
            found[f"{name}.fp32"] = parameter
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{name}.{key}"] = engine.optimizer.state[parameter][key]
    settings = [{key: value for key, value in group.items() if key != "params"}
                for group in engine.optimizer.param_groups]
    found = {name: value.detach().clone() for name, value in found.items()}
    counters = {int(state["step"]) for state in engine.basic_optimizer.state.values()}
    return {**found, "settings": settings, "scale": getattr(engine.optimizer, "cur_scale", None),
            "schedule": engine.lr_scheduler.state_dict(), "steps": engine.global_steps,
            "counters": sorted(counters)}


def run_all(runs: list[list[str]]) -> None:
    """Do each run, and keep its unsharded states where it is saved or loaded half-way."""
    from train import pretrain
    from train.config import PretrainConfig, parse

    allow_all_precisions(pytest.MonkeyPatch())
    save, load = ds.save_state, ds.load_state

    def keep(engine: Any, folder: Path, name: str) -> None:
        found = full_states(engine)
        run_dir = Path(folder).parent.parent
        if ds.is_main() and not (run_dir / name).exists():  # the first save is that half-way
            torch.save(found, run_dir / name)

    def save_and_keep(engine: Any, folder: Path, *words: Any) -> Any:
        keep(engine, folder, "saved.pt")
        return save(engine, folder, *words)

    def load_and_keep(engine: Any, folder: Path, *words: Any) -> Any:
        result = load(engine, folder, *words)
        keep(engine, folder, "loaded.pt")
        return result

    ds.save_state, ds.load_state = save_and_keep, load_and_keep
    for words in runs:
        pretrain.run(parse(PretrainConfig, words))


@pytest.fixture(scope="module")
def world(tmp_path_factory, reviews_store, still_encoder) -> Path:
    """Runs at 1, 2 and 4 ranks, and runs that changed their number half-way.

    `ranksR-CONFIG` are uninterrupted; `FROM-TO-CONFIG` resumed at another number of ranks.
    """
    folder = tmp_path_factory.mktemp("world")
    configs = {}
    for precision, stage in SETTINGS:
        name = f"{precision}-zero{stage}"
        configs[name] = write_ds_config(folder, stage, BLOCKS[precision], name)

    def flags(run: str, config: str, micro: int = 2, **options: Any) -> list[str]:
        steps = LONG if config.startswith("fp32") else SHORT
        return arguments(
            reviews_store, still_encoder, folder / run, max_steps=steps, save_steps=steps // 2,
            save_total_limit=9, eval_fraction=0, deepspeed_config=configs[config],
            per_device_train_batch_size=micro, allow_world_size_change=True, **options,
        )

    def resumed(before: int, after: int, name: str) -> list[str]:
        source, target = folder / f"ranks{before}-{name}", folder / f"{before}-{after}-{name}"
        shutil.copytree(source, target)
        shutil.rmtree(target / "hf")
        shutil.rmtree(max((target / "checkpoints").iterdir(), key=lambda path: int(path.name[5:])))
        return flags(target.name, name, resume="must")

    plain = [f"fp32-zero{stage}" for stage in range(4)]
    half = [f"{precision}-zero{stage}" for precision, stage in SETTINGS
            if stage and precision != "fp32"]
    with Server() as server:
        def run_job(ranks: int, runs: list[list[str]]) -> None:
            log = folder / f"log{ranks}"
            done = server.run("tests.robustness.test_resume:run_all", log, ranks, runs=runs)
            print(ranks, done)
            assert done["codes"] == [0] * ranks, log.read_text()[-4000:]

        run_job(1, [flags(f"ranks1-{name}", name, micro=4) for name in plain] + [
            flags(f"ranks1-micro{micro}", "fp32-zero0", micro=micro) for micro in (1, 2, 8)
        ])
        run_job(2, [flags(f"ranks2-{name}", name) for name in plain + half] + [
            flags(f"ranks2-micro{micro}", "fp32-zero2", micro=micro) for micro in (1, 4)
        ] + [resumed(1, 2, name) for name in plain])
        run_job(1, [resumed(2, 1, name) for name in plain + half])
        run_job(4, [flags("ranks4-micro1", "fp32-zero0", micro=1)] +
                [resumed(2, 4, name) for name in plain])
    return folder


WHOLE = ["ranks1-micro1", "ranks1-micro2", "ranks1-micro8", "ranks2-micro1", "ranks2-micro4",
         "ranks4-micro1",
         *(f"ranks{ranks}-fp32-zero{stage}" for ranks in (1, 2) for stage in range(4))]


@pytest.mark.slow
def test_the_loss_does_not_depend_on_ranks_and_micro_batches(world):
    expected = logged(world / "ranks1-fp32-zero0", metrics.TRAIN_LOSS)
    assert len(expected) == LONG and expected[-1] < expected[0]
    for name in WHOLE:
        found = logged(world / name, metrics.TRAIN_LOSS)
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["1-2", "2-1", "2-4"])
def test_a_run_goes_on_at_another_number_of_ranks(world, change):
    expected = logged(world / "ranks1-fp32-zero0", metrics.TRAIN_LOSS)
    for stage in range(4):
        name = f"{change}-fp32-zero{stage}"
        found = logged(world / name, metrics.TRAIN_LOSS)
        assert len(found) == LONG
        np.testing.assert_allclose(found[LONG // 2], expected[LONG // 2], rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=name)
        assert not list((world / name / "checkpoints").glob("*.tmp"))


@pytest.mark.slow
def test_a_scheduled_rate_does_not_depend_on_ranks(tmp_path, reviews_store, still_encoder):
    """The same masks in every step, and the same loss."""
    options = {"max_steps": STEPS, "mlm_probability": "0.6:0.1", "corruption": "50,40,10",
               "deepspeed_config": write_ds_config(tmp_path, 0), "eval_fraction": 0,
               "per_device_train_batch_size": 2}
    runs = [arguments(reviews_store, still_encoder, tmp_path / f"ranks{n}", **options)
            for n in (1, 2)]
    with Server() as server:
        for n, run in enumerate(runs, start=1):
            log = tmp_path / f"log{n}"
            done = server.run("tests.robustness.test_resume:run_all", log, n, runs=[run])
            assert done["codes"] == [0] * n, log.read_text()[-4000:]
    one, two = (tmp_path / f"ranks{n}" for n in (1, 2))
    fractions = logged(one, metrics.MASKED_FRACTION)
    assert fractions == logged(two, metrics.MASKED_FRACTION)
    assert fractions[0] > 0.4 and fractions[-1] < 0.15
    np.testing.assert_allclose(logged(two, metrics.TRAIN_LOSS), logged(one, metrics.TRAIN_LOSS),
                               rtol=1e-5)


CONVERTED = [
    *(f"{change}-fp32-zero{stage}" for change in ("1-2", "2-1", "2-4") for stage in range(4)),
    *(f"2-1-{precision}-zero{stage}" for precision in ("bf16", "fp16") for stage in (1, 2, 3)),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVERTED)
def test_every_state_is_the_same_at_another_number_of_ranks(world, name):
    before, _, config = name.split("-", 2)
    saved = torch.load(world / f"ranks{before}-{config}" / "saved.pt", weights_only=True)
    loaded = torch.load(world / name / "loaded.pt", weights_only=True)
    assert_same_bits(dict(leaves(saved)), dict(leaves(loaded)))
    decays = {group["name"]: group["weight_decay"] for group in loaded["settings"]}
    assert decays["encoder"] > 0 and decays["encoder_no_decay"] == 0
    assert loaded["steps"] == (LONG if "fp32" in name else SHORT) // 2
