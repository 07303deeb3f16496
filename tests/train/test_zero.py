"""The step of ZeRO 1 and 2 against DeepSpeed's own loops, and what it costs the host."""

from __future__ import annotations

import gc
import hashlib
import inspect
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from preprocess.errors import NonFiniteError
from tests.support.forked_ranks import Server
from train import engine as ds
from train.engine import steps

STEPS = 6
LAYERS = 8


class Tower(torch.nn.Module):
    """Many small parameters, one that is never used, and a loss of one number per row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(LAYERS))
        self.unused = torch.nn.Parameter(torch.ones(5))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            rows = torch.tanh(layer(rows))
        return rows.float().square().sum()


def resolved(stage: int, precision: str, accumulation: int = 1, world_size: int = 1,
             clip: float = 0.5, adam: dict[str, Any] | None = None,
             fp16: dict[str, Any] | None = None) -> ds.Resolved:
    config = {
        "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": accumulation,
        "train_batch_size": 4 * accumulation * world_size, "gradient_clipping": clip,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {
            "lr": 1e-2, "weight_decay": 0.1, "torch_adam": True, **(adam or {"fused": True})}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2, "warmup_max_lr": 1e-2}},
        "steps_per_print": 10**9,
    }
    if precision != "fp32":
        config[precision] = {"enabled": True, **(fp16 or {})}
    return ds.Resolved(config, 4, accumulation, 4 * accumulation * world_size, precision, ())


def allow_fp16() -> None:
    """DeepSpeed refuses fp16 on a CPU because it is slow there; its optimizers are the same."""
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True


def build(config: ds.Resolved, upstream: bool = False) -> Any:
    ds.start()
    allow_fp16()
    module = Tower()
    return ds.build_engine(module, ds.parameter_groups(module, 0.1), config, upstream)


def masters(engine: Any) -> list[list[float]]:
    return [part.tolist() for part in engine.optimizer.single_partition_of_fp32_groups]


def take(engine: Any, step: int, spoil: dict[int, float] | None = None,
         spoil_rank: int = 0) -> tuple[list[float], Any]:
    """Take one step on rows that depend on step, micro batch and rank."""
    rank, loss_sum = ds.ranks().rank, torch.zeros((), dtype=torch.float64)
    for micro in range(engine.gradient_accumulation_steps()):
        generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
        rows = torch.randn(4, 8, generator=generator).to(next(engine.module.parameters()).dtype)
        loss = engine(rows)
        if spoil and step in spoil and rank == spoil_rank:
            loss = loss * spoil[step]
        engine.backward(loss)
        loss_sum += loss.detach()
        if not engine.is_gradient_accumulation_boundary():
            engine.step()
    return ds.take_step(engine, loss_sum, rank + 1, 0.25)


def follow(config: dict[str, Any], out: str, upstream: bool, spoil: dict[str, float] | None = None,
           spoil_rank: int = 0) -> None:
    """Take all steps and write what happened; runs on every rank."""
    world_size = ds.ranks().world_size
    engine = build(resolved(world_size=world_size, **config), upstream)
    bad = {int(step): value for step, value in (spoil or {}).items()}
    found: dict[str, Any] = {"norms": [], "sums": [], "scales": []}
    for step in range(STEPS):
        sums, norm = take(engine, step, bad, spoil_rank)
        found["norms"].append(None if norm is None else float(norm))
        found["sums"].append(sums)
        if hasattr(engine.optimizer, "loss_scale"):
            found["scales"].append(engine.optimizer.loss_scale)
    found |= {"skipped": engine.skipped_steps, "masters": masters(engine),
              "weights": [p.detach().float().tolist() for p in engine.module.parameters()],
              "ours": hasattr(engine.optimizer, "one_pass")}
    Path(f"{out}.rank{ds.ranks().rank}").write_text(json.dumps(found))
    ds.finish()


@pytest.fixture(scope="module")
def server():
    with Server("train.engine", "tests.train.test_zero") as running:
        yield running


def both(server: Server, folder: Path, ranks: int, config: dict[str, Any],
         **options: Any) -> list[list[dict[str, Any]]]:
    """Return what each rank found, with our step and with DeepSpeed's."""
    found = []
    for upstream in (False, True):
        out = folder / f"upstream-{upstream}"
        done = server.run("tests.train.test_zero:follow", Path(f"{out}.log"), ranks, config=config,
                          out=str(out), upstream=upstream, **options)
        assert not any(done["codes"]), Path(f"{out}.log").read_text()[-3000:]
        found.append([json.loads(Path(f"{out}.rank{rank}").read_text()) for rank in range(ranks)])
    assert all(one["ours"] for one in found[0]) and not any(one["ours"] for one in found[1])
    return found


CASES = [
    (1, 2, "bf16", 3), (1, 1, "fp16", 3), (2, 2, "fp16", 3),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (1, 1, "fp32", 1), (1, 2, "fp16", 1), (1, 1, "bf16", 1), (2, 1, "bf16", 1),
        (2, 2, "fp32", 1), (3, 1, "fp16", 1), (3, 2, "bf16", 3))),
]


@pytest.mark.parametrize(("ranks", "stage", "precision", "accumulation"), CASES)
@pytest.mark.parametrize("adam", [{"fused": True}, {"foreach": True}], ids=["fused", "foreach"])
def test_norms_and_weights_are_those_of_deepspeed(server, tmp_path, ranks, stage, precision,
                                                  accumulation, adam):
    config = {"stage": stage, "precision": precision, "accumulation": accumulation, "adam": adam}
    if precision == "fp16":
        config["fp16"] = {"loss_scale_window": 1000, "initial_scale_power": 8}
    ours, theirs = both(server, tmp_path, ranks, config)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["norms"] == pytest.approx(other["norms"], rel=1e-6)
        assert max(mine["norms"]) > 0.5  # it is clipped
        for one, two in zip(mine["sums"], other["sums"], strict=True):
            assert one == pytest.approx(two, rel=1e-6)
        # Rounding of the factor that unscales and clips: one or two units in the last place.
        for one, two in zip(mine["masters"], other["masters"], strict=True):
            assert one == pytest.approx(two, rel=1e-5, abs=1e-6)
        assert mine["weights"] == ours[0]["weights"]
    assert ours[0]["sums"][0][1:] == [ranks * (ranks + 1) / 2, 0.25 * ranks]


@pytest.mark.parametrize("largest", [1e-6, 1.0, 1e25], ids=str)
@pytest.mark.parametrize("sizes", [[7], [4096], [300_000, 5000, 3]], ids=str)
def test_the_norm_on_a_cpu_is_that_in_fp64(sizes, largest):
    torch.manual_seed(5)
    flat = [torch.randn(size) * largest for size in sizes]
    parts = [list(group.split([1, group.numel() - 1])) for group in flat]
    plain = torch.cat(flat).double().square().sum()
    torch.testing.assert_close(steps.zero._sum_of_squares(flat, parts), plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_norm_on_a_cpu_shows_a_gradient_that_is_not_finite(bad):
    flat = [torch.ones(5000), torch.ones(5000)]
    flat[1][4321] = bad
    assert not torch.isfinite(steps.zero._sum_of_squares(flat, [[group] for group in flat]))


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("adam", [{"fused": True}, {"foreach": True}], ids=["fused", "foreach"])
def test_overflows_are_skipped_as_deepspeed_skips_them(server, tmp_path, ranks, stage, adam):
    config = {"stage": stage, "precision": "fp16", "adam": adam,
              "fp16": {"initial_scale_power": 8, "hysteresis": 1, "loss_scale_window": 1000}}
    # Finite as a loss in fp32, infinite as a gradient in fp16, on the last rank only.
    ours, theirs = both(server, tmp_path, ranks, config, spoil={"1": 1e6, "3": 1e6},
                        spoil_rank=ranks - 1)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["skipped"] == other["skipped"] == 2
        assert mine["scales"] == other["scales"] == [256, 128, 128, 64, 64, 64]
        assert [norm is None for norm in mine["norms"]] == [False, True, False, True, False, False]
        for one, two in zip(mine["masters"], other["masters"], strict=True):
            assert one == pytest.approx(two, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("adam", [{"fused": True}, {"foreach": True}], ids=["fused", "foreach"])
@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_a_bad_loss_changes_nothing(adam, fault):
    engine = build(resolved(1, "bf16", adam=adam))
    take(engine, 0)
    before = masters(engine)
    moments = [{key: value.tolist() for key, value in state.items()}
               for state in engine.basic_optimizer.state.values()]
    with pytest.raises(NonFiniteError, match=f"the loss became {fault} at step 2; nothing was upd"):
        take(engine, 1, {1: fault})
    assert masters(engine) == before
    assert [{key: value.tolist() for key, value in state.items()}
            for state in engine.basic_optimizer.state.values()] == moments


@pytest.mark.parametrize("adam", [{"fused": True}, {"foreach": True}], ids=["fused", "foreach"])
def test_a_gradient_is_divided_by_the_scale_that_it_was_made_with(adam):
    """DeepSpeed's own step divides by the scale after its update, twice as large here."""
    settings = {"initial_scale_power": 8, "loss_scale_window": 1, "hysteresis": 1}
    grows = build(resolved(1, "fp16", clip=0.0, adam={**adam, "eps": 1.0}, fp16=settings))
    fixed = build(resolved(1, "fp16", clip=0.0, adam={**adam, "eps": 1.0},
                           fp16={**settings, "loss_scale_window": 1000}))
    norms = []
    for engine in (grows, fixed):
        norms.append([take(engine, step)[1] for step in range(3)])
    assert grows.optimizer.loss_scale == 4 * fixed.optimizer.loss_scale
    assert norms[0] == pytest.approx(norms[1], rel=2e-3)
    # Adam's moments tell a gradient half too small from a right one; its update hardly does.
    for one, two in zip(*(masters(engine) for engine in (grows, fixed)), strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-4)
    firsts = [torch.cat([state["exp_avg"] for state in engine.basic_optimizer.state.values()])
              for engine in (grows, fixed)]
    torch.testing.assert_close(firsts[0], firsts[1], rtol=2e-2, atol=1e-5)


class Count(TorchDispatchMode):
    """Count the operations that are launched, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def counted(engine: Any, steps_taken: int = 2) -> Counter[str]:
    take(engine, 0)  # buffers are made
    with Count() as count:
        for step in range(1, 1 + steps_taken):
            take(engine, step)
    return count.found


@pytest.fixture
def norm_of_a_gpu(monkeypatch):
    monkeypatch.setattr(steps.zero, "_sum_of_squares",
                        lambda flat, parts: steps.zero._square_in_fp64(parts))


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_launches_few_operations_per_parameter(norm_of_a_gpu, stage):
    parameters = 2 * LAYERS
    ours = counted(build(resolved(stage, "bf16", accumulation=2)), 1)
    theirs = counted(build(resolved(stage, "bf16", accumulation=2), upstream=True), 1)
    model = Count()
    tower = Tower().bfloat16()
    with model:
        for _ in range(2):
            tower(torch.randn(4, 8).bfloat16()).backward()
    beyond = sum(ours.values()) - sum(model.found.values())
    assert beyond <= 2 * parameters + 80
    assert beyond < 0.25 * (sum(theirs.values()) - sum(model.found.values()))
    assert ours["_foreach_norm"] == 1 and ours["_fused_adamw_"] == 2  # decayed and not


def test_the_host_reads_once_per_step(norm_of_a_gpu, monkeypatch):
    engine = build(resolved(1, "fp16", accumulation=3, fp16={"initial_scale_power": 4}))
    take(engine, 0)
    reads: list[str] = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        plain = getattr(torch.Tensor, name)

        def noted(tensor: torch.Tensor, *words: Any, _plain: Any = plain, _name: str = name,
                  **named: Any) -> Any:
            reads.append(_name)
            return _plain(tensor, *words, **named)

        monkeypatch.setattr(torch.Tensor, name, noted)
    with Count() as count:
        take(engine, 1)
    assert reads == ["tolist"]
    assert count.found["_local_scalar_dense"] == 0  # what every other read ends in


def test_no_device_wide_wait(monkeypatch):
    from deepspeed.accelerator import get_accelerator

    gc.collect()  # engines of earlier tests wait when they are collected
    waits: list[int] = []
    monkeypatch.setattr(type(get_accelerator()), "synchronize",
                        lambda self, *words: waits.append(1))
    engine = build(resolved(2, "bf16", accumulation=2))
    take(engine, 0)
    assert not waits


def test_where_deepspeeds_own_step_stays():
    assert not hasattr(build(resolved(3, "bf16")).optimizer, "one_pass")
    plain = resolved(1, "bf16")
    plain.config["data_types"] = {"grad_accum_dtype": "fp32"}
    assert not hasattr(build(plain).optimizer, "one_pass")


def test_another_deepspeed_keeps_its_own_step(monkeypatch, capsys):
    monkeypatch.setitem(steps.zero.SIGNATURES, "step", "(self)")
    assert not hasattr(build(resolved(1, "bf16")).optimizer, "one_pass")
    assert capsys.readouterr().out.count("its own loops over the parameters stay") == 1


def test_deepspeeds_own_loops_are_those_that_were_replaced():
    """A new DeepSpeed may put something into them that ours lacks: compare, then change this."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Zero

    names = ("step", "reduce_gradients", "overlapping_partition_gradients_reduce_epilogue",
             "independent_gradient_partition_epilogue", "has_overflow", "scaled_global_norm",
             "unscale_and_clip_grads", "_optimizer_step", "_update_model_bit16_weights")
    text = "".join(inspect.getsource(getattr(Zero, name)) for name in names)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "a92e69ca4fc73aac"
