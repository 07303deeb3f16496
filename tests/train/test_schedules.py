"""Learning rates: every step of each schedule against its formula, through the engine."""

from __future__ import annotations

import math

import pytest
import torch

from train import engine as ds
from train.config import TrainingConfig
from train.engine import ds_json, schedules

PEAK = 1e-2


def share(name: str, n: int, total: int, warmup: int, decay: int) -> float:
    """The plain twin: the share of the peak in step n = 1 ... total."""
    if n < warmup:
        return n / warmup
    if name == "linear":
        return (total + 1 - n) / (total + 1 - warmup)
    if name == "cosine":
        wave = (1 + math.cos(math.pi * (n - warmup + 1) / (total + 2 - warmup))) / 2
        return 1e-4 + (1 - 1e-4) * wave
    return min(1.0, (total + 1 - n) / (decay + 1)) if name == "wsd" else 1.0


class Tower(torch.nn.Module):
    """Two layers, the second of which is the head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(rows))).float().square().sum()


def take(engine, step: int, factor: float = 1.0) -> None:
    """Take a step, whose gradient overflows in fp16 by a large `factor`."""
    rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
    loss = engine(rows.to(next(engine.module.parameters()).dtype)) * factor
    engine.backward(loss)
    ds.take_step(engine, loss.detach())


def build(name: str, steps: int, stage: int = 1, head_scale: float = 1.0, **blocks):
    config = {
        "train_batch_size": 4, "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": PEAK, "torch_adam": True}}, **blocks,
    }
    options = TrainingConfig(output_dir="x", lr_scheduler_type=name, warmup_ratio=0.2,
                             decay_ratio=0.3 if name == "wsd" else None)
    resolved = ds.resolve_ds_config(config, options, total_steps=steps, world_size=1)
    ds.start()
    module = Tower()
    groups = ds.parameter_groups(module, 0.1, ("head",), head_scale)
    return ds.build_engine(module, groups, resolved)


def rates(engine) -> dict[str, float]:
    return {group["name"]: float(group["lr"]) for group in engine.optimizer.param_groups}


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("name", schedules.TYPES)
def test_every_step_has_the_rate_of_the_formula_after_a_resume_too(name, stage, tmp_path):
    steps = 20  # 4 of warm-up, 6 of decay
    engine = build(name, steps, stage, head_scale=3.0)
    found = []
    for step in range(steps):
        if step == 9:
            ds.save_state(engine, tmp_path / "step_9", {})
            engine.destroy()
            torch.manual_seed(9)
            engine = build(name, steps, stage, head_scale=3.0)
            ds.load_state(engine, tmp_path / "step_9", 1)
        found.append(rates(engine))
        take(engine, step)
    expected = [PEAK * share(name, n, steps, 4, 6) for n in range(1, steps + 1)]
    assert [one["encoder"] for one in found] == pytest.approx(expected, rel=1e-12)
    assert [one["head"] for one in found] == pytest.approx([3 * e for e in expected], rel=1e-12)
    assert all(one["encoder_no_decay"] == one["encoder"] for one in found)
    assert min(expected) > 0 and max(expected) <= PEAK
    stable = schedules.stable_steps({"type": schedules.TYPES[name], "total_num_steps": 21,
                                     "decay_num_steps": 6})
    if name in ("wsd", "constant"):
        assert stable == (14 if name == "wsd" else math.inf)
        assert expected[3:14] == [PEAK] * 11 and (expected[14] < PEAK) == (name == "wsd")
    else:
        assert stable == 0


@pytest.mark.parametrize("name", schedules.TYPES)
def test_a_skipped_fp16_step_does_not_count(name, monkeypatch):
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed refuses fp16 on a CPU because it is slow there; its optimizers are the same.
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    monkeypatch.setattr(ds_json, "_settle_precision", lambda config, options: ("fp16", []))
    engine = build(name, 20, fp16={"enabled": True, "initial_scale_power": 8, "hysteresis": 1})
    found = []
    for step in range(20):
        found.append(rates(engine)["encoder"])
        take(engine, step, 1e6 if step in (6, 15) else 1.0)
    assert engine.skipped_steps == 2
    numbers = [*range(1, 7), 7, *range(7, 15), 15, *range(15, 19)]  # steps 7 and 16 are repeated
    assert len(numbers) == 20
    expected = [PEAK * share(name, n, 20, 4, 6) for n in numbers]
    assert found == pytest.approx(expected, rel=1e-12)


def settled(name: str, steps: int, decay: float | None = None, warmup_of: int | None = None):
    options = TrainingConfig(output_dir="x", lr_scheduler_type=name, decay_ratio=decay)
    found = ds.resolve_ds_config({}, options, total_steps=steps, world_size=1, warmup_of=warmup_of)
    scheduler = found.config["scheduler"]
    return {"type": scheduler["type"], **scheduler["params"]}


def test_how_many_steps_two_schedules_share():
    shared = schedules.same_steps
    short, long = settled("constant", 100), settled("constant", 200, warmup_of=100)
    assert shared(short, long) == math.inf
    assert shared(short, settled("constant", 200)) == 0  # its warm-up is longer
    stable = settled("wsd", 100, 0.2)
    assert shared(stable, settled("wsd", 200, 0.2, warmup_of=100)) == 80
    assert shared(short, settled("wsd", 200, 0.7, warmup_of=100)) == 60
    assert shared(settled("linear", 100), settled("linear", 200, warmup_of=100)) == 0
    assert shared(settled("cosine", 100), settled("cosine", 100)) == math.inf
