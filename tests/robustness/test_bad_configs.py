"""Bad options and DeepSpeed configurations: exit 2, one line, before any process group starts."""

from __future__ import annotations

import json

import pytest
import torch

from preprocess.errors import ConfigError, run_command
from train import engine as ds
from train import finetune, fit_scorer, pretrain
from train.config import AnnotateConfig, ScoreConfig, TrainingConfig
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
    "optimizer-beta": (adam(beta=[0.9, 0.99]), "did you mean 'betas'?"),
    "scheduler-typo": (warmup(warmup_steps=10), "did you mean 'warmup_num_steps'?"),
    "wrong-block": ({"stage": 2}, "did you mean 'zero_optimization.stage'?"),
    "profiler-typo": ({"flops_profiler": {"enable": True}}, "did you mean 'enabled'?"),
    "torch-optimizer-typo": ({"optimizer": {"type": "SGD", "params": {"momentun": 0.9}}},
                             "did you mean 'momentum'?"),
    # Wrong types: DeepSpeed takes most of them, some with another meaning.
    "lr-text": (adam(lr="1e-4"), "optimizer.params.lr '1e-4': must be a number in [0, 1000]; "
                                 "write it without quotes"),
    "decay-text": (adam(weight_decay="0.01"), "write it without quotes"),
    "lr-list": (adam(lr=[1e-4]), "optimizer.params.lr [0.0001]: must be a number"),
    "lr-null": (adam(lr=None), "optimizer.params.lr None: must be a number"),
    "stage-text": (zero(stage="2"), "stage '2': must be 0, 1, 2 or 3; write it without quotes"),
    "stage-true": (zero(stage=True), "stage True: must be 0, 1, 2 or 3"),
    "stage-float": (zero(stage=2.0), "stage 2.0: must be 0, 1, 2 or 3"),
    "enabled-text": ({"fp16": {"enabled": "true"}}, "fp16.enabled 'true': must be true or false"),
    "enabled-number": ({"bf16": {"enabled": 1}}, "bf16.enabled 1: must be true or false"),
    "block-true": ({"fp16": True}, "fp16 True: must be an object in braces"),
    "block-number": ({"zero_optimization": 2}, "zero_optimization 2: must be an object in braces"),
    "block-text": ({"optimizer": "AdamW"}, "optimizer 'AdamW': must be an object in braces"),
    "offload-null": (zero(offload_optimizer=None), "offload_optimizer None: must be an object"),
    "bucket-text": (zero(reduce_bucket_size="5e8"), "must be a whole number of 1 or more; write"),
    "bucket-half": (zero(reduce_bucket_size=0.5), "0.5: must be a whole number"),
    "clip-text": ({"gradient_clipping": "1.0"}, "gradient_clipping '1.0': must be a number"),
    "batch-half": ({"train_batch_size": 8.5}, "8.5: must be a whole number of 1 or more"),
    "betas-one": (adam(betas=0.9), "betas 0.9: must be two numbers in [0, 1)"),
    "names-text": (zero(leaf_module={"classes": "Bert"}), "must be a list of names in quotes"),
    "long-value": ({"steps_per_print": ["x" * 1000]}, "xxx...: must be a whole number"),
    # Out of range.
    "clip-negative": ({"gradient_clipping": -1.0}, "gradient_clipping -1.0: must be a number in"),
    "lr-negative": (adam(lr=-1e-4), "optimizer.params.lr -0.0001: must be a number in [0, 1000]"),
    "decay-two": (adam(weight_decay=2), "optimizer.params.weight_decay 2: must be a number"),
    "beta-one": (adam(betas=[0.9, 1.0]), "betas [0.9, 1.0]: must be two numbers in [0, 1)"),
    "eps-negative": (adam(eps=-1e-8), "optimizer.params.eps -1e-08"),
    "stage-4": (zero(stage=4), "zero_optimization.stage 4: must be 0, 1, 2 or 3"),
    "bucket-zero": (zero(reduce_bucket_size=0), "must be a whole number of 1 or more"),
    "scale-power": (fp16(initial_scale_power=64), "initial_scale_power 64: must be a whole number"),
    "scale-window": (fp16(loss_scale_window=0), "loss_scale_window 0: must be a whole number"),
    "scale-floor": (fp16(min_loss_scale=0), "min_loss_scale 0: must be a whole number"),
    "scale-negative": (fp16(loss_scale=-1), "fp16.loss_scale -1: must be a number"),
    "predivide-zero": ({"gradient_predivide_factor": 0}, "gradient_predivide_factor 0: must be"),
    "infinite": ('{"gradient_clipping": 1e999}', "gradient_clipping inf: must be a number"),
    "huge": ('{"steps_per_print": 1' + "0" * 400 + "}", "steps_per_print 1000"),
    "device": (offload("offload_optimizer", 2, device="gpu"), "must be none, cpu or nvme"),
    "dtype": ({"communication_data_type": "fp8"}, "'fp8': must be fp32, fp16 or bf16"),
    "warmup-type": (warmup(warmup_type="cosine"), "warmup_type 'cosine': must be linear or log"),
    "autocast": ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "must be bfloat16"),
    # "auto" that nothing fills.
    "auto-bucket": (zero(reduce_bucket_size="auto"), '"auto" at zero_optimization.reduce_bucket'),
    "auto-nested": (offload("offload_optimizer", 2, device="auto"), "offload_optimizer.device"),
    "auto-betas": (adam(betas=["auto", 0.9]), '"auto" at optimizer.params.betas'),
    "auto-enabled": ({"fp16": {"enabled": "auto"}}, '"auto" at fp16.enabled'),
    "auto-block": ({"zero_optimization": "auto"}, '"auto" at zero_optimization'),
    "auto-type": ({"optimizer": {"type": "auto"}}, "optimizer.type 'auto': must be adam, adamw"),
    "tensorboard": ({"tensorboard": {"enabled": True}}, "leave the tensorboard block out"),
    # Removed from DeepSpeed, or without effect here.
    "elasticity": ({"elasticity": {"enabled": True}}, "elasticity: DeepSpeed has removed this"),
    "amp": ({"amp": {"enabled": True}}, "amp: DeepSpeed has removed Apex AMP; write fp16 or bf16"),
    "compression": ({"compression_training": {}}, "DeepSpeed has removed this"),
    "mics": (zero(mics_shard_size=2), "mics_shard_size: DeepSpeed has removed this"),
    "old-bf16": ({"bfloat16": {"enabled": True}}, "bfloat16: write bf16"),
    "old-offload": (zero(cpu_offload=True), 'write "offload_optimizer": {"device": "cpu"}'),
    "unused-recompute": ({"activation_checkpointing": {}}, "give --gradient_checkpointing"),
    "unused-loader": ({"dataloader_drop_last": True}, "our loader reads the data"),
    "unused-compile": ({"compile": {"deepcompile": True}}, "give --torch_compile"),
    "sum": ({"gradient_allreduce_op": "sum"}, "gradients are always averaged"),
    "own-accumulation": ({"managed_gradient_accumulation": False}, "must count the micro batches"),
    "unchecked-bf16": ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "must be true"),
    "unchecked-norm": (zero(compute_grad_norm=False), "compute_grad_norm False: must be true"),
    "clip-in-optimizer": (adam(max_grad_norm=1.0), "write gradient_clipping at the top level"),
    "universal": ({"checkpoint": {"load_universal": True}}, "set by us on resuming"),
    # Types of optimizer and schedule.
    "optimizer-type": ({"optimizer": {"type": "AdamX"}}, "did you mean adam?"),
    "optimizer-no-type": ({"optimizer": {"params": {}}}, "optimizer.type None: must be adam"),
    "optimizer-removed": ({"optimizer": {"type": "OneBitAdam"}}, "optimizer.type 'OneBitAdam'"),
    "optimizer-other": ({"optimizer": {"type": "LBFGS"}}, "torch.optim with lr and weight_decay"),
    "optimizer-not-one": ({"optimizer": {"type": "lr_scheduler"}}, "optimizer.type 'lr_scheduler'"),
    "optimizer-muon": ({"optimizer": {"type": "Muon"}}, "optimizer.type 'Muon': must be"),
    "scheduler-type": ({"scheduler": {"type": "WarmupDecay"}}, "did you mean warmupdecaylr?"),
    "scheduler-call": ({"scheduler": {"type": "LambdaLR", "params": {}}}, "lr_lambda"),
    "torch-value": ({"optimizer": {"type": "SGD", "params": {"momentum": -1}}}, "Invalid momentum"),
    # Contradictions.
    "both-halves": ({**fp16(), "bf16": {"enabled": True}}, "enables fp16 and bf16; keep one"),
    "fp16-on-cpu": (fp16(), "fp16, which this CPU lacks; type --precision auto"),
    "autocast-bf16": ({"torch_autocast": {"enabled": True, "dtype": "bf16"},
                       "bf16": {"enabled": True}}, "enables torch_autocast and bf16; keep one"),
    "offload-stage-0": (offload("offload_optimizer", 0), "needs stage 1 or more"),
    "offload-param": (offload("offload_param", 2), "offload_param with stage 2: needs stage 3"),
    "offload-part": (offload("offload_optimizer", 2, ratio=0.5), "ratio below 1: needs stage 3"),
    "nvme-nowhere": (offload("offload_param", 3, device="nvme"), "needs stage 3 and nvme_path"),
    "warmup-long": (warmup(warmup_num_steps=90, total_num_steps=9), "warmup_num_steps 90 is more "
                                                                    "than total_num_steps 9"),
    "total-short": (warmup(warmup_num_steps=2, total_num_steps=3), "total_num_steps 3 in the "
                    "DeepSpeed JSON ends the schedule before the 4 steps of this run"),
    "warmup-upside": (warmup(warmup_min_lr=1, warmup_max_lr=1e-3), "warmup_min_lr 1 is more than"),
    "accumulate-dtype": ({"data_types": {"grad_accum_dtype": "bf16"}}, "it must be 'fp32'"),
    "param-dtype": ({"data_types": {"param_dtype": "bf16"}}, "the run is in fp32"),
    "lamb-cpu": ({"optimizer": {"type": "Lamb"}}, "optimizer.type 'Lamb': needs a GPU"),
    "untested": ({**zero(), "optimizer": {"type": "SGD"}}, "DeepSpeed has not tested them"),
    "adagrad-zero": ({**zero(), "optimizer": {"type": "Adagrad"}}, "write stage 0, or AdamW"),
    "torch-adam": (adam(torch_adam=False, amsgrad=True), "only the Adam of torch has it"),
    "own-adam": (adam(torch_adam=True, bias_correction=False), "only the Adam of DeepSpeed has it"),
    "quantized": (zero(zero_quantized_gradients=True), "needs stage 3 and a GPU"),
    "one-cycle": ({"scheduler": {"type": "OneCycle", "params": {}}}, "cycle_min_lr is missing"),
    "comet": ({"comet": {"enabled": True}}, "comet_ml is not installed"),
    # Batch arithmetic (the flag --train_batch_size is 8).
    "batch-flag": ({"train_batch_size": 16}, "--train_batch_size 8 contradicts train_batch_size"),
    "batch-odd": ({"train_micro_batch_size_per_gpu": 3}, "batch sizes do not fit: micro 3"),
    "batch-large": ({"train_micro_batch_size_per_gpu": 16}, "must equal train_batch_size 8"),
    "batch-product": ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3},
                      "micro 2 x accumulation 3 x 1 ranks must equal train_batch_size 8"),
    # The file.
    "file-empty": ("", "not valid JSON"),
    "file-cut": ('{"fp16": {', "not valid JSON"),
    "file-comment": ('{"steps_per_print": 8} // eight', "not valid JSON"),
    "file-list": ("[]", "must hold one JSON object"),
    "file-twice": ('{"steps_per_print": 8, "steps_per_print": 9}', "appears twice"),
    "file-twice-inside": ('{"fp16": {"enabled": true, "enabled": false}}', "'enabled' appears"),
    "file-nan": ('{"gradient_clipping": NaN}', "NaN is no number of JSON"),
    "file-infinity": ('{"gradient_clipping": -Infinity}', "-Infinity is no number of JSON"),
    "file-deep": ("[" * 100_000, "too deep"),
    "file-binary": (b"\xff\xfe\x00{", "not valid JSON"),
}

# Flags after the good ones (the last of equals counts), and what the one line must say.
FLAGS = {
    "absent-file": (["--deepspeed_config", "nowhere.json"], "no such file; ds_configs/ has cpu"),
    "no-file": (["--deepspeed_config", ""], "no such file"),
    "folder": (["--deepspeed_config", "ds_configs"], "no such file"),
    "unknown": (["--max_step", "3"], "did you mean --max_steps?"),
    "type": (["--max_steps", "ten"], "--max_steps: invalid int value: 'ten'"),
    "choice": (["--precision", "half"], "--precision: invalid choice: 'half'"),
    "no-value": (["--max_steps"], "--max_steps: expected one argument"),
    "nan": (["--learning_rate", "nan"], "--learning_rate nan: must be a positive number"),
    "infinite": (["--max_grad_norm", "inf"], "--max_grad_norm inf: must be a positive number"),
    "negative": (["--warmup_ratio", "-0.1"], "--warmup_ratio -0.1: must be in [0, 1]"),
    "head-rate": (["--head_learning_rate", "inf"], "--head_learning_rate inf: must be a positive"),
    "head-steps": (["--head_only_steps", "9"], "--head_only_steps 9: must be between 0 and --max"),
    "seed": (["--seed", "-1"], "--seed -1: must be between 0 and 2^32 - 1"),
    "rows": (["--max_seq_length", "4"], "--max_seq_length 4: must be between 8 and 65535"),
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


@pytest.mark.parametrize(
    ("command", "flags", "fragment"),
    [
        (finetune, ["--task", "mr", "--seeds", "13,x"], "--seeds '13,x': must be whole numbers"),
        (finetune, ["--task", "mr", "--num_train_epochs", "0"], "--num_train_epochs 0"),
        (finetune, ["--task", "mr", "--num_train_epochs", "1.5"], "invalid int value: '1.5'"),
        (fit_scorer, ["--annotations", "a", "--positive_weight", "inf"], "--positive_weight inf"),
        (fit_scorer, ["--annotations", "a", "--per_device_eval_batch_size", "0"], "1 or more"),
        (fit_scorer, ["--annotations", "a", "--dev_fraction", "1"], "--dev_fraction 1.0"),
    ],
)
def test_the_other_commands_refuse_as_well(command, flags, fragment, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_command(
            lambda: command.main(["--output_dir", "run", "--model_name_or_path", "m", *flags])
        )
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and fragment in said


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (AnnotateConfig, {"logging_steps": 0}), (AnnotateConfig, {"max_train_samples": 0}),
        (AnnotateConfig, {"delta": 1.0}), (ScoreConfig, {"logging_steps": 0}),
        (ScoreConfig, {"batch_tokens": 1}),
    ],
)
def test_commands_without_training_check_their_ranges(config, values):
    good: dict = {"model_name_or_path": "m"}
    good |= {"tokens": "p", "name": "n"} if config is ScoreConfig else {"task": "mr", "output": "o"}
    config(**good)
    with pytest.raises(ConfigError, match=f"--{next(iter(values))} "):
        config(**{**good, **values})


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
        {"optimizer": {"type": "SGD", "params": {"momentum": 0.9, "nesterov": True}}},
        {"optimizer": {"type": "adamW", "params": {"lr": "auto", "betas": [0.9, 0.95]}}},
        {"scheduler": {"type": "CosineAnnealingLR", "params": {"T_max": 10}}},
        {"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 0, "cycle_max_lr": 1e-3}}},
        {"tensorboard": {"enabled": False, "output_path": "x"}, "wall_clock_breakdown": True},
        {"gradient_clipping": 0, "steps_per_print": 10**9},
    ):
        ds_schema.check(config)
        settled = {"optimizer": ADAM, "scheduler": {"type": "WarmupLR"}, **config}
        ds_schema.check_together(settled, "fp32", has_gpu=False)


def test_the_keys_are_those_of_deepspeed():
    """A new version of DeepSpeed that knows other keys makes this fail."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor import config as monitor
    from deepspeed.runtime import config as top
    from deepspeed.runtime import precision_config
    from deepspeed.runtime.zero import config as zero_config
    from deepspeed.runtime.zero import leaf_module_config, offload_config

    models = {
        "zero_optimization": zero_config.DeepSpeedZeroConfig,
        "zero_optimization.offload_param": offload_config.DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.offload_optimizer": offload_config.DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.leaf_module": leaf_module_config.DeepSpeedZeroLeafModuleConfig,
        "fp16": precision_config.DeepSpeedFP16Config, "bf16": precision_config.DeepSpeedBF16Config,
        "tensorboard": monitor.TensorBoardConfig, "wandb": monitor.WandbConfig,
        "csv_monitor": monitor.CSVConfig, "comet": monitor.CometConfig,
        "comms_logger": CommsLoggerConfig,
    }
    for path, model in models.items():
        block = ds_schema.SCHEMA
        for part in path.split("."):
            block = block[part]
        theirs = set(model.model_fields)
        theirs |= {field.alias for field in model.model_fields.values() if field.alias}
        refused = {
            key.removeprefix(f"{path}.") for key in ds_schema.REFUSED if key.startswith(f"{path}.")
        }
        assert block.keys() <= theirs, path
        assert theirs <= block.keys() | refused, path
    removed = {*top._REMOVED_TOP_LEVEL_CONFIG_KEYS}
    removed |= {f"zero_optimization.{key}" for key in top._REMOVED_ZERO_CONFIG_KEYS}
    assert removed <= ds_schema.REFUSED.keys()


def test_the_parameters_of_schedules_are_those_of_deepspeed():
    import inspect

    from deepspeed.runtime import lr_schedules

    assert set(ds_schema.SCHEDULERS) == set(lr_schedules.VALID_LR_SCHEDULES)
    for name, rules in ds_schema.SCHEDULERS.items():
        theirs = set(inspect.signature(getattr(lr_schedules, name)).parameters)
        assert theirs - {"optimizer", "last_batch_iteration"} == set(rules), name


def test_a_schema_knows_every_key_that_is_filled_or_refused():
    paths = set(ds_schema._paths(ds_schema.SCHEMA))
    assert not paths & ds_schema.REFUSED.keys()
    for path in ds_schema.FILLED:
        assert path in paths or path.startswith(("optimizer.params.", "scheduler.params."))
