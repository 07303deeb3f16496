"""Bad options and DeepSpeed configurations: exit 2, one line, before any process group starts."""

from __future__ import annotations

import inspect
import json

import pytest
import torch

from preprocess.errors import ConfigError, run_command
from train import engine as ds
from train import pretrain
from train.config import TrainingConfig
from train.engine import schema as ds_schema

ZERO3 = {"stage": 3}
ADAM = {"type": "AdamW"}


def zero(**values) -> dict:
    return {"zero_optimization": {"stage": 2, **values}}


def offload(name: str, stage: int, **values) -> dict:
    return {"zero_optimization": {"stage": stage, name: {"device": "cpu", **values}}}


def adam(**values) -> dict:
    return {"optimizer": {"type": "AdamW", "params": values}}


def warmup(**values) -> dict:
    return {"scheduler": {"type": "WarmupDecayLR", "params": values}}


def fp16(**values) -> dict:
    return {"fp16": {"enabled": True, **values}}


# What the DeepSpeed JSON holds (text: as it is), and what the one line must say.
JSONS = {
    # Unknown keys, with "did you mean".
    "top-typo": ({"zero_optimizaton": {"stage": 3}}, "did you mean 'zero_optimization'?"),
    "top-case": ({"FP16": {"enabled": True}}, "unknown key 'FP16'; did you mean 'fp16'?"),
    "top-unknown": ({"xyzzy": 1}, "unknown key 'xyzzy'; remove it"),
    "zero-typo": (zero(reduce_bucketsize=5e8), "'zero_optimization.reduce_bucketsize'; did you "
                                               "mean 'reduce_bucket_size'?"),
    "offload-typo": (offload("offload_optimizer", 2, pin_mem=True), "did you mean 'pin_memory'?"),
    "fp16-typo": (fp16(initial_scale=16), "did you mean 'initial_scale_power'?"),
    "optimizer-typo": (adam(learning_rate=1e-4), "unknown key 'optimizer.params.learning_rate'"),
    "scheduler-typo": (warmup(warmup_steps=10), "did you mean 'warmup_num_steps'?"),
    "wrong-block": ({"stage": 2}, "did you mean 'zero_optimization.stage'?"),
    # Wrong types: DeepSpeed takes most of them, some with another meaning.
    "lr-text": (adam(lr="1e-4"), "optimizer.params.lr '1e-4': must be a number in [0, 1000]; "
                                 "write it without quotes"),
    "lr-null": (adam(lr=None), "optimizer.params.lr None: must be a number"),
    "stage-text": (zero(stage="2"), "stage '2': must be 0, 1, 2 or 3; write it without quotes"),
    "stage-true": (zero(stage=True), "stage True: must be 0, 1, 2 or 3"),
    "enabled-text": ({"fp16": {"enabled": "true"}}, "'true': DeepSpeed would take it as true"),
    "enabled-number": ({"bf16": {"enabled": 1}}, "bf16.enabled 1: DeepSpeed would take it as true"),
    "block-true": ({"fp16": True}, "fp16 True: must be an object in braces"),
    "block-text": ({"optimizer": "AdamW"}, "optimizer 'AdamW': must be an object in braces"),
    "offload-null": (zero(offload_optimizer=None), "offload_optimizer None: must be an object"),
    "bucket-half": (zero(reduce_bucket_size=0.5), "0.5: must be a valid integer"),
    "batch-half": ({"train_batch_size": 8.5}, "8.5: must be a whole number of 1 or more"),
    "names-text": (zero(leaf_module={"classes": "Bert"}), "would take it as [\"Bert\"]"),
    "long-value": ({"steps_per_print": ["x" * 1000]}, "xxx...: must be a whole number"),
    # Out of range.
    "clip-negative": ({"gradient_clipping": -1.0}, "gradient_clipping -1.0: must be a number in"),
    "lr-negative": (adam(lr=-1e-4), "optimizer.params.lr -0.0001: must be a number in [0, 1000]"),
    "beta-one": (adam(betas=[0.9, 1.0]), "betas [0.9, 1.0]: must be two numbers in [0, 1)"),
    "stage-4": (zero(stage=4), "zero_optimization.stage 4: must be 0, 1, 2 or 3"),
    "bucket-zero": (zero(reduce_bucket_size=0), "reduce_bucket_size 0: must be greater than 0"),
    "scale-power": (fp16(initial_scale_power=64), "initial_scale_power 64: must be a whole number"),
    "scale-negative": (fp16(loss_scale=-1), "fp16.loss_scale -1: fp16.loss_scale must be >= 0"),
    "infinite": ('{"gradient_clipping": 1e999}', "gradient_clipping inf: must be a number"),
    "huge": ('{"steps_per_print": 1' + "0" * 400 + "}", "steps_per_print 1000"),
    "device": (offload("offload_optimizer", 2, device="gpu"), "must be 'none', 'cpu' or 'nvme'"),
    "warmup-type": (warmup(warmup_type="cosine"), "warmup_type 'cosine': must be linear or log"),
    "autocast": ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "must be bfloat16"),
    # "auto" that nothing fills.
    "auto-bucket": (zero(reduce_bucket_size="auto"), '"auto" at zero_optimization.reduce_bucket'),
    "auto-nested": (offload("offload_optimizer", 2, device="auto"), "offload_optimizer.device"),
    "auto-betas": (adam(betas=["auto", 0.9]), '"auto" at optimizer.params.betas'),
    "auto-warmup-type": (warmup(warmup_type="auto"), '"auto" at scheduler.params.warmup_type'),
    "auto-enabled": ({"fp16": {"enabled": "auto"}}, '"auto" at fp16.enabled'),
    "auto-block": ({"zero_optimization": "auto"}, '"auto" at zero_optimization'),
    "tensorboard": ({"tensorboard": {"enabled": True}}, "writes its own event files already"),
    # Removed from DeepSpeed, or without effect here.
    "elasticity": ({"elasticity": {"enabled": True}}, "elasticity: DeepSpeed has removed this"),
    "mics": (zero(mics_shard_size=2), "mics_shard_size: DeepSpeed has removed this"),
    "old-bf16": ({"bfloat16": {"enabled": True}}, "bfloat16: write bf16"),
    "old-offload": (zero(cpu_offload=True), 'write "offload_optimizer": {"device": "cpu"}'),
    "unused-recompute": ({"activation_checkpointing": {}}, "give --gradient_checkpointing"),
    "sum": ({"gradient_allreduce_op": "sum"}, "gradients are always averaged"),
    "unchecked-bf16": ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "must be true"),
    "unchecked-norm": (zero(compute_grad_norm=False), "compute_grad_norm False: must be true"),
    "clip-in-optimizer": (adam(max_grad_norm=1.0), "write gradient_clipping at the top level"),
    "universal": ({"checkpoint": {"load_universal": True}}, "set by us on resuming"),
    # Types of optimizer and schedule.
    "optimizer-type": ({"optimizer": {"type": "AdamX"}}, "'AdamX': must be Adam or AdamW"),
    "optimizer-no-type": ({"optimizer": {"params": {}}}, "optimizer.type is missing: must be Adam"),
    "optimizer-muon": ({"optimizer": {"type": "Muon"}}, "optimizer.type 'Muon': must be"),
    "scheduler-type": ({"scheduler": {"type": "WarmupDecay"}}, "must be WarmupLR, WarmupDecayLR"),
    "scheduler-key": ({"scheduler": {"type": "WarmupLR", "params": {"total_num_steps": 9}}},
                      "unknown key 'scheduler.params.total_num_steps' of WarmupLR"),
    "scheduler-auto-key": ({"scheduler": {"type": "auto", "params": {"cycle": 9}}},
                           "unknown key 'scheduler.params.cycle'"),
    # Contradictions.
    "both-halves": ({**fp16(), "bf16": {"enabled": True}}, "enables fp16 and bf16; keep one"),
    "fp16-on-cpu": (fp16(), "fp16, which this CPU lacks; type --precision auto"),
    "autocast-bf16": ({"torch_autocast": {"enabled": True, "dtype": "bf16"},
                       "bf16": {"enabled": True}}, "enables torch_autocast and bf16; keep one"),
    "offload-stage-0": (offload("offload_optimizer", 0), "needs stage 1 or more"),
    "offload-param": (offload("offload_param", 2), "offload_param with stage 2: needs stage 3"),
    "offload-part": (offload("offload_optimizer", 2, ratio=0.5), "only supported for ZeRO Stage 3"),
    "nvme": (offload("offload_param", 3, device="nvme"), "'nvme': not supported here; write cpu"),
    "warmup-long": (warmup(warmup_num_steps=90, total_num_steps=9), "warmup_num_steps 90 is more "
                                                                    "than total_num_steps 9"),
    "decay-long": ({"scheduler": {"type": "WarmupStableDecayLR",
                                  "params": {"decay_num_steps": 90}}},
                   "decay_num_steps 90 is more than total_num_steps 5"),
    "total-short": (warmup(warmup_num_steps=2, total_num_steps=3), "total_num_steps 3 in the "
                    "DeepSpeed JSON ends the schedule before the 4 steps of this run"),
    "warmup-upside": (warmup(warmup_min_lr=1, warmup_max_lr=1e-3), "warmup_min_lr 1 is more than"),
    "accumulate-dtype": ({"data_types": {"grad_accum_dtype": "bf16"}}, "it must be 'fp32'"),
    "param-dtype": ({"data_types": {"param_dtype": "bf16"}}, "the run is in fp32"),
    "torch-adam": (adam(torch_adam=False, amsgrad=True), "only the Adam of torch has it"),
    "own-adam": (adam(torch_adam=True, bias_correction=False), "only the Adam of DeepSpeed has it"),
    "quantized": (zero(zero_quantized_gradients=True), "needs stage 3 and a GPU"),
    "comet": ({"comet": {"enabled": True}}, "comet: not supported here; leave it out"),
    # Batch arithmetic (the flag --train_batch_size is 8).
    "batch-odd": ({"train_micro_batch_size_per_gpu": 3}, "batch sizes do not fit: micro 3"),
    # The file.
    "file-empty": ("", "not valid JSON"),
    "file-comment": ('{"steps_per_print": 8} // eight', "not valid JSON"),
    "file-list": ("[]", "must hold one JSON object"),
    "file-twice-inside": ('{"fp16": {"enabled": true, "enabled": false}}', "'enabled' appears"),
    "file-nan": ('{"gradient_clipping": NaN}', "NaN is not a JSON number"),
    "file-deep": ("[" * 100_000, "too deep"),
    "file-binary": (b"\xff\xfe\x00{", "not valid JSON"),
}

# Flags after the good ones (the last of equals counts), and what the one line must say.
FLAGS = {
    "absent-file": (["--deepspeed_config", "nowhere.json"],
                    "--deepspeed_config nowhere.json: no such file; give a path, or one of the "
                    "names cpu, zero1_bf16, zero1_fp16, "),
    "unknown": (["--max_step", "3"], "did you mean --max_steps?"),
    "type": (["--max_steps", "ten"], "--max_steps: invalid int value: 'ten'"),
    "choice": (["--precision", "half"], "--precision: invalid choice: 'half'"),
    "nan": (["--learning_rate", "nan"], "--learning_rate nan: must be a positive number"),
    "both-models": (["--model_config", "bert-tiny"], "give exactly one of --model_config"),
    "both-masks": (["--masking", "random", "--mask_index", "x"], "exclude each other"),
}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """These tests are about a machine without a GPU, wherever they run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys, reviews_store, still_encoder):
    """Run the pre-training command on a mistake; return its one line."""
    for module in (ds, pretrain.ds):
        monkeypatch.setattr(module, "start", lambda: pytest.fail("a process group was started"))

    def run(flags: list[str]) -> str:
        words = ["--tokens", reviews_store, "--model_name_or_path", still_encoder,
                 "--output_dir", str(tmp_path / "run"), "--max_steps", "4",
                 "--max_seq_length", "32", "--train_batch_size", "8", "--precision", "config"]
        with pytest.raises(SystemExit) as stopped:
            run_command(lambda: pretrain.main([*words, *flags]))
        said = capsys.readouterr().err
        assert stopped.value.code == 2
        assert said.count("\n") == 1 and said.endswith("\n") and len(said) < 500
        assert not (tmp_path / "run").exists()
        return said

    return run


@pytest.mark.parametrize("name", JSONS)
def test_a_bad_deepspeed_json_is_one_line_and_exit_2(name, refused, tmp_path):
    content, fragment = JSONS[name]
    path = tmp_path / "ds.json"
    if isinstance(content, dict):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert fragment in refused(["--deepspeed_config", str(path)])


@pytest.mark.parametrize("name", FLAGS)
def test_a_bad_flag_is_one_line_and_exit_2(name, refused):
    flags, fragment = FLAGS[name]
    assert fragment in refused(flags)


def test_fp16_without_zero_is_refused(monkeypatch):
    """DeepSpeed 0.19 unscales gradients there whose loss it has not scaled."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = TrainingConfig(output_dir="run")
    for stage in range(4):
        raw = {**fp16(), "zero_optimization": {"stage": stage}}
        if stage:
            ds.resolve_ds_config(raw, options, total_steps=9, world_size=1)
            continue
        with pytest.raises(ConfigError, match="fp16 with zero_optimization.stage 0: .* stage 1"):
            ds.resolve_ds_config(raw, options, total_steps=9, world_size=1)


@pytest.mark.slow
def test_two_ranks_say_it_once(tmp_path, run_command_line, reviews_store, still_encoder):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(zero(reduce_bucketsize=5e8)))
    done = run_command_line(
        "train/pretrain.py", "--tokens", reviews_store, "--model_name_or_path", still_encoder,
        "--output_dir", tmp_path / "run", "--max_seq_length", 32, "--deepspeed_config", path,
        ranks=2, check=False,
    )
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if "reduce_bucketsize" in line]
    assert len(said) == 1 and said[0].startswith("pretrain.py: --deepspeed_config")
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


def test_each_node_says_it_once_and_first(monkeypatch, capsys):
    """A launcher ends all ranks when one ends: a faster rank must not take the sentence away."""
    waited: list[float] = []
    monkeypatch.setattr("preprocess.errors.time.sleep", waited.append)
    monkeypatch.setattr("preprocess.errors.signal.signal", lambda *_: None)
    # An earlier test may have left a process group behind.
    monkeypatch.setattr("preprocess.errors._is_alone", lambda: False)

    def main():
        raise ConfigError("--tokens x: not here")

    for rank, local_rank, said in ((0, 0, True), (1, 1, False), (2, 0, True), (3, 1, False)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        waited.clear()
        with pytest.raises(SystemExit):
            run_command(main)
        assert ("--tokens x: not here" in capsys.readouterr().err) == said
        assert bool(waited) != said


# ----------------------------------------------------------- what is right passes, and stays right


def test_good_configurations_pass():
    for config in (
        {**fp16(loss_scale=0, min_loss_scale=1, hysteresis=2), "zero_optimization": ZERO3},
        {"zero_optimization": {**ZERO3, "reduce_bucket_size": 5e8, "stage3_max_reuse_distance": 1e9,
                               "max_live_parameters": 10, "offload_param": {"device": "none"}}},
        {"optimizer": {"type": "adamW", "params": {"lr": "auto", "betas": [0.9, 0.95]}}},
        {"timers": {"throughput": {"enabled": False}}, "wall_clock_breakdown": True},
        {"gradient_clipping": 0, "steps_per_print": 10**9},
    ):
        ds_schema.check(config)
        settled = {"optimizer": ADAM, "scheduler": {"type": "WarmupLR"}, **config}
        ds_schema.check_together(settled, "fp32", has_gpu=False)


def test_what_deepspeed_has_removed_is_refused():
    """A new version of DeepSpeed that removes more makes this fail."""
    from deepspeed.runtime import config as top

    removed = {*top._REMOVED_TOP_LEVEL_CONFIG_KEYS}
    removed |= {f"zero_optimization.{key}" for key in top._REMOVED_ZERO_CONFIG_KEYS}
    assert removed <= ds_schema.REFUSED.keys()


def test_the_parameters_of_schedules_are_those_of_deepspeed():
    from deepspeed.runtime import lr_schedules

    for name, keys in ds_schema.SCHEDULERS.items():
        if name == "WarmupStableDecayLR":  # ours, on top of one of theirs
            assert keys == ds_schema.SCHEDULERS["WarmupDecayLR"] | {"decay_num_steps"}
            continue
        theirs = set(inspect.signature(getattr(lr_schedules, name)).parameters)
        assert theirs - {"optimizer", "last_batch_iteration"} == keys, name


def test_every_key_that_is_filled_is_known_and_none_that_is_refused():
    blocks = ds_schema.known_paths()
    paths = {f"{block}.{key}".lstrip(".") for block, keys in blocks.items() for key in keys}
    assert paths >= ds_schema.FILLED and not paths & ds_schema.REFUSED.keys()
