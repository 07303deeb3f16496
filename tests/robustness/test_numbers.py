"""A loss or gradient that is not finite, and the loss scale of fp16."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from preprocess.errors import NonFiniteError
from tests.support.runs import arguments, words, write_ds_config
from train import engine as ds
from train.run_dir import metrics
from train.run_dir.checkpoint import check_checkpoint

STEPS = 4
FAULTY_STEP = 3
MAX_SKIPPED = 6

# Runs one scenario after the other in one process group, with a fault on the last rank only.
DRIVER = '''
import json, sys, types
import torch
import csrc
from safetensors.torch import load_file
from deepspeed.accelerator import get_accelerator
from preprocess.errors import NonFiniteError, run_command
from pathlib import Path
from train import engine as ds
from train import finetune, pretrain
from train.config import PretrainConfig, parse
from train.engine import ds_json, steps
from train.run_dir import folder as run_folder
from train.stages import supervised

# DeepSpeed refuses fp16 on a CPU because it is slow there; its optimizers are the same code.
type(get_accelerator()).is_fp16_supported = lambda self: True


def as_written(config, options):
    names = [name for name in ("fp16", "bf16") if config.get(name, {}).get("enabled")]
    return (names or ["fp32"])[0], []


ds_json._settle_precision = as_written
plain_loss, plain_build = csrc.masked_lm_loss, ds.build_engine
plain_supervised = supervised.weighted_loss
scenario, built, calls = {}, [], [0]


def remember(*words):
    built[:] = [plain_build(*words)]
    return built[0]


def spoil(hidden, loss):
    """Break the loss or its gradient, on one rank, from a step on."""
    first, last = scenario["steps"]
    step = built[0].global_steps + 1
    if ds.ranks().rank != 1 or not first <= step <= last:
        return loss
    if scenario["fault"] == "loss":
        return loss * float("nan")
    hidden.register_hook(lambda gradient: gradient * float(scenario["fault"]))
    return loss


def spoilt_loss(hidden, *words):
    loss, hits = plain_loss(hidden, *words)
    return (spoil(hidden, loss) if hidden.requires_grad else loss), hits


def spoilt_supervised(logits, *words):
    return spoil(logits, plain_supervised(logits, *words))


if not ds.is_main():
    # These ranks come from an earlier run of this process, and may look while rank 0 writes.
    run_folder.check_run_dir = finetune.check_run_dir = lambda config: Path(config.output_dir)
ds.build_engine = supervised.build_engine = remember
finetune.finish = lambda: None
csrc.masked_lm_loss = spoilt_loss
supervised.weighted_loss = spoilt_supervised


def moved_since(folder):
    """Return the names of the parameters that differ from those of an export."""
    state = ds.full_state_dict(built[0])
    if state is None:
        return None
    state = {name.removeprefix("hf."): value for name, value in state.items()}
    before = load_file(folder + "/model.safetensors")
    assert len(before.keys() & state.keys()) > 20
    return [name for name in before if name in state
            and not torch.equal(before[name], state[name])]


def run():
    if scenario["command"] == "finetune":
        finetune.main(scenario["words"])
    else:
        pretrain.run(parse(PretrainConfig, scenario["words"]))


def main():
    out = open(sys.argv[-1] + f".rank{ds.ranks().rank}", "w")
    for told in json.load(open(sys.argv[-1])):
        scenario.clear()
        scenario.update(told)
        found = {"name": scenario["name"]}
        steps.MAX_SKIPPED_IN_A_ROW = scenario.get("limit")
        if scenario.get("uncaught"):
            run()
        try:
            run()
        except NonFiniteError as error:
            found |= {"code": error.exit_code, "message": str(error)}
            if "untouched" in scenario:
                found["moved"] = moved_since(scenario["untouched"])
        optimizer = getattr(built[0], "optimizer", None)
        found |= {"skipped": built[0].skipped_steps, "optimizer": type(optimizer).__name__}
        out.write(json.dumps(found) + "\\n")
        out.flush()


run_command(main)
'''


def fp16(**values: float) -> dict:
    return {"fp16": {"enabled": True, **values}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, reviews_store, still_encoder, labelled_files, run_command_line):
    """Run every scenario; return the folder, the process, and what each rank found."""
    folder = tmp_path_factory.mktemp("numbers")
    scenarios = []

    def pretrain(name, stage, fault, steps=(FAULTY_STEP, FAULTY_STEP), *, config=None,
                 max_steps=STEPS, save_steps=FAULTY_STEP - 1, uncaught=False, limit=50):
        scenarios.append({
            "name": name, "command": "pretrain", "fault": fault, "steps": steps,
            "uncaught": uncaught, "limit": limit,
            "untouched": str(folder / name / f"hf_step_{FAULTY_STEP - 1}"),
            "words": arguments(
                reviews_store, still_encoder, folder / name, max_steps=max_steps,
                deepspeed_config=write_ds_config(folder, stage, config, name), eval_fraction=0,
                per_device_train_batch_size=2, learning_rate=1e-3, save_steps=save_steps,
                export_steps=FAULTY_STEP - 1,
            ),
        })

    for stage in range(4):
        for precision, config in (("fp32", {}), ("bf16", {"bf16": {"enabled": True}})):
            for fault in ("loss", "nan" if stage % 2 else "inf"):
                pretrain(f"{precision}-zero{stage}-{fault}", stage, fault, config=config)
        if stage % 2 == 0:
            continue  # 0 is refused, see test_bad_configs.py; 1 and 2 are the same class
        # 256 times too large: the scale must fall from 2^16 before a step can be taken.
        pretrain(f"fp16-zero{stage}-recovers", stage, "256", (1, 99), max_steps=8,
                 config=fp16(hysteresis=1))
        pretrain(f"fp16-zero{stage}-floor", stage, "inf", (FAULTY_STEP, 99), max_steps=12,
                 config=fp16(hysteresis=1, initial_scale_power=4, min_loss_scale=2))
    pretrain("fp16-zero1-loss", 1, "loss", config=fp16())
    pretrain("fp32-zero2-offload-inf", 2, "inf", config={
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": False,
    })
    pretrain("fp32-unclipped-inf", 0, "inf", config={"gradient_clipping": 0})
    pretrain("fp16-static", 2, "inf", (FAULTY_STEP, 99), max_steps=99, save_steps=99,
             limit=MAX_SKIPPED, config=fp16(loss_scale=128))
    for fault in ("loss", "nan"):
        name = f"finetune-{fault}"
        scenarios.append({
            "name": name, "command": "finetune", "fault": fault, "steps": (3, 3),
            "words": words({
                "task": "custom", "train_file": labelled_files["train"],
                "test_file": labelled_files["test"], "model_name_or_path": still_encoder,
                "output_dir": folder / name, "max_seq_length": 32, "num_train_epochs": 2,
                "per_device_train_batch_size": 4, "save_steps": 1, "logging_steps": 1,
                "deepspeed_config": write_ds_config(folder, 0 if fault == "nan" else 2, name=name),
            }),
        })
    pretrain("uncaught", 1, "nan", uncaught=True)
    (folder / "driver.py").write_text(DRIVER)
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    done = run_command_line(folder / "driver.py", folder / "scenarios.json", ranks=2, check=False)
    found = [
        [json.loads(line) for line in
         (folder / f"scenarios.json.rank{rank}").read_text().splitlines()]
        for rank in (0, 1)
    ]
    return folder, done, {one["name"]: (one, two) for one, two in zip(*found, strict=True)}


GRADIENT = [f"{precision}-zero{stage}-{'nan' if stage % 2 else 'inf'}"
            for precision in ("fp32", "bf16") for stage in range(4)]
LOSS = [f"{precision}-zero{stage}-loss" for precision in ("fp32", "bf16") for stage in range(4)]


def logged(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [*LOSS, *GRADIENT, "fp16-zero1-loss", "fp32-zero2-offload-inf", "fp32-unclipped-inf"],
)
def test_a_bad_number_on_one_rank_stops_all_before_the_update(name, runs):
    folder, _, found = runs
    first, second = found[name]
    assert first["code"] == second["code"] == 4
    assert first["message"] == second["message"]
    assert f"step {FAULTY_STEP}" in first["message"] and "--learning_rate" in first["message"]
    assert first["moved"] == []  # every parameter is what it was after the step before
    run_dir = folder / name
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_2"]
    assert check_checkpoint(run_dir / "checkpoints" / "step_2") is None
    assert (run_dir / "latest").read_text().strip() == "step_2"
    assert not (run_dir / "hf").exists()
    assert [line["step"] for line in logged(run_dir)][-1] == FAULTY_STEP - 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_fp16_skips_until_the_scale_fits(stage, runs):
    folder, _, found = runs
    first, second = found[f"fp16-zero{stage}-recovers"]
    assert "code" not in first and 2 <= first["skipped"] == second["skipped"] < 8
    lines = logged(folder / f"fp16-zero{stage}-recovers")
    skipped = [line[metrics.SKIPPED_STEPS] for line in lines if metrics.SKIPPED_STEPS in line]
    scales = [line[metrics.LOSS_SCALE] for line in lines if metrics.LOSS_SCALE in line]
    count = first["skipped"]
    assert skipped[:2] == [1, 2] and skipped == sorted(skipped) and skipped[-1] == count
    assert scales == [2.0 ** (16 - so_far) for so_far in skipped]
    # What a skipped step has no norm of is not logged, so every line is plain JSON.
    norms = [line[metrics.GRAD_NORM] for line in lines if metrics.GRAD_NORM in line]
    assert len(norms) == 8 - count and all(map(math.isfinite, norms))
    assert (folder / f"fp16-zero{stage}-recovers" / "hf").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_fp16_stops_at_the_floor_with_the_history_and_three_remedies(stage, runs):
    folder, _, found = runs
    first, second = found[f"fp16-zero{stage}-floor"]
    assert first["code"] == second["code"] == 4 and first["moved"] == []
    assert first["message"] == second["message"]
    assert first["message"].startswith("step 6: the gradients overflow in fp16 at the smallest "
                                       "loss scale, 2 (skipped in a row: 4)")
    assert "16 from step 1, 8 from step 4, 4 from step 5, 2 from step 6;" in first["message"]
    assert "use bf16" in first["message"] and "--learning_rate" in first["message"]
    assert "lower min_loss_scale (now 2)" in first["message"]
    assert not (folder / f"fp16-zero{stage}-floor" / "hf").exists()


@pytest.mark.slow
def test_a_fixed_loss_scale_is_bounded_too(runs):
    first, second = runs[2]["fp16-static"]
    assert first["code"] == second["code"] == 4 and first["moved"] == []
    assert first["skipped"] == MAX_SKIPPED < ds.MAX_SKIPPED_IN_A_ROW
    assert f"(skipped in a row: {MAX_SKIPPED})" in first["message"]
    assert "set loss_scale in the DeepSpeed JSON to 0" in first["message"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["loss", "nan"])
def test_fine_tuning_stops_on_all_ranks_too(fault, runs):
    folder, _, found = runs
    first, second = found[f"finetune-{fault}"]
    assert first["code"] == second["code"] == 4
    assert first["message"] == second["message"] and "step 3" in first["message"]
    names = {path.name for path in (folder / f"finetune-{fault}").rglob("step_*")}
    assert names == {"step_1", "step_2"}
    assert not (folder / f"finetune-{fault}" / "seed_13" / "hf").exists()


@pytest.mark.slow
def test_the_command_ends_in_one_line_and_exit_code_4(runs):
    _, done, _ = runs
    assert done.returncode == 4, done.stdout + done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("driver.py: ")]
    assert len(said) == 1 and "the gradient is not a finite number at step 3" in said[0]
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------ without a launch


class Overflowing:
    """The part of an fp16 engine that `take_step` uses; overflows in the steps `bad`."""

    global_steps = skipped_steps = 0
    applied = False

    def __init__(self, scale: float, bad: set[int], floor: float = 1.0, hysteresis: int = 1):
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

        self.bad = bad
        self.optimizer = DynamicLossScaler(
            init_scale=scale, scale_window=2, min_scale=floor, delayed_shift=hysteresis,
            consecutive_hysteresis=False, raise_error_at_min_scale=True,
        )
        self.fp16_enabled = lambda: True
        self.dynamic_loss_scale = lambda: True
        self.dynamic_loss_scale_args = lambda: {"min_scale": floor}
        self.was_step_applied = lambda: self.applied
        self.get_global_grad_norm = lambda: 1.5

    def step(self):
        overflow = self.global_steps + 1 in self.bad
        self.optimizer.update_scale(overflow)
        self.applied = not overflow
        self.global_steps += 1


@pytest.fixture
def one_rank(monkeypatch):
    """DeepSpeed's scaler asks for the rank when it lowers the scale."""
    from deepspeed import comm

    monkeypatch.setattr(comm, "get_rank", lambda group=None: 0)


def test_the_history_holds_the_last_changes_up_and_down(one_rank):
    engine = Overflowing(4.0, bad={2, 7, *range(9, 40)})
    for step in range(1, 10):
        assert ds.take_step(engine, 2.0) == ([2.0], None if step in engine.bad else 1.5)
    with pytest.raises(NonFiniteError) as stopped:
        ds.take_step(engine, 2.0)
    assert str(stopped.value).startswith(
        "step 10: the gradients overflow in fp16 at the smallest loss scale, 1 (skipped in a row: "
        "2); loss scale: 4 from step 1, 2 from step 3, 4 from step 6, 2 from step 8, 1 from step "
        "10; use bf16;"
    )
    assert "leave fp16 out" in str(stopped.value)  # DeepSpeed knows no scale below 1


def test_the_history_is_short(one_rank):
    engine = Overflowing(2.0**30, bad=set(range(1, 99)))
    with pytest.raises(NonFiniteError) as stopped:
        for _ in range(99):
            ds.take_step(engine, 2.0)
    assert str(stopped.value).count(" from step ") == 8
    assert "1 from step 31;" in str(stopped.value)


def test_hysteresis_does_not_hide_the_floor(one_rank):
    engine = Overflowing(1.0, bad={3}, hysteresis=5)
    assert [ds.take_step(engine, 2.0) for _ in range(2)] == [([2.0], 1.5)] * 2
    with pytest.raises(NonFiniteError, match=r"step 3: .* loss scale, 1 \(skipped in a row: 1\)"):
        ds.take_step(engine, 2.0)


def test_other_errors_of_deepspeed_pass_through(one_rank):
    engine = Overflowing(1.0, bad=set())
    engine.step = lambda: (_ for _ in ()).throw(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        ds.take_step(engine, 2.0)
