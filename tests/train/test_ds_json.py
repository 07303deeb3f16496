"""The DeepSpeed JSON: filled, checked, refused; the optimizer's parameter groups; the ranks."""

from __future__ import annotations

import copy
import inspect
import json
import os

import pytest
import torch

from preprocess.errors import ConfigError
from tests.support.states import leaves
from train import engine
from train.config import TrainingConfig
from train.engine import schema as ds_schema

SHIPPED = sorted(path.name for path in engine.DS_CONFIGS.glob("*.json"))


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """These tests are about a machine without a GPU, wherever they run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def options(**flags) -> TrainingConfig:
    return TrainingConfig(output_dir="run", **flags)


def resolve(raw: dict, *, world_size: int = 1, total_steps=100, defaults=None, **flags):
    return engine.resolve_ds_config(
        raw, options(**flags), total_steps=total_steps, world_size=world_size, **(defaults or {})
    )


def flat(config: dict) -> dict[str, object]:
    """Every plain value of a nested configuration, by its path."""
    return {path[1:]: leaf for path, leaf in leaves(config)}


# ---------------------------------------------------------------------------- shipped set-ups


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_resolve_on_a_cpu(name, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    raw = engine.read_ds_config(str(engine.DS_CONFIGS / name))
    before = copy.deepcopy(raw)
    resolved = resolve(raw, world_size=2, learning_rate=2e-4, weight_decay=0.02, max_grad_norm=0.5)
    assert raw == before
    values = flat(resolved.config)
    assert "auto" not in values.values()
    assert (resolved.micro_batch_size, resolved.accumulation_steps) == (16, 1)
    assert resolved.train_batch_size == values["train_batch_size"] == 32
    assert values["train_micro_batch_size_per_gpu"] == 16
    assert values["gradient_accumulation_steps"] == 1
    assert values["optimizer.params.lr"] == values["scheduler.params.warmup_max_lr"] == 2e-4
    assert values["optimizer.params.weight_decay"] == 0.02
    assert values["gradient_clipping"] == 0.5
    assert values["scheduler.params.warmup_type"] == "linear"
    assert values["scheduler.params.warmup_num_steps"] == 10
    assert values["scheduler.params.total_num_steps"] == 101
    # What a CPU cannot do is left out and said.
    assert resolved.precision == "fp32"
    assert not any(key.startswith(("fp16", "bf16")) for key in values)
    assert values["optimizer.params.torch_adam"] is True
    assert not any(values.get(key) for key in values if key.endswith("pin_memory"))
    half = next((kind for kind in ("fp16", "bf16") if kind in raw), None)
    assert resolved.notes == (
        (f"no {'fast ' * (half == 'bf16')}{half} on this CPU: running in fp32 (--precision auto)",)
        if half else ()
    )
    if half == "fp16":
        with pytest.raises(ConfigError, match="fp16, which this CPU lacks; type --precision auto"):
            resolve(raw, precision="config")
    else:
        as_written = resolve(raw, precision="config")
        assert (as_written.precision, as_written.notes) == (half or "fp32", ())
    if "offload" in name:
        assert values["zero_force_ds_cpu_optimizer"] is False
    # What was written stays.
    for key, value in flat(before).items():
        if value != "auto" and not key.startswith(("fp16", "bf16")) and "pin_memory" not in key:
            assert values[key] == value


@pytest.mark.parametrize("having", ["avx512_bf16", "amx_bf16"])
def test_a_cpu_with_bf16_products_takes_them(having, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {having: True}, raising=False)
    resolved = resolve(engine.read_ds_config("zero1_bf16"))
    assert resolved.precision == "bf16" and resolved.config["bf16"]["enabled"]
    assert resolved.notes == ()
    # fp16 products are another matter, and fp32 stays what it is.
    assert resolve(engine.read_ds_config("zero1_fp16")).precision == "fp32"
    assert resolve(engine.read_ds_config("cpu")).precision == "fp32"


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_on_a_gpu(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    raw = engine.read_ds_config(str(engine.DS_CONFIGS / name))
    resolved = resolve(raw)
    values = flat(resolved.config)
    assert "auto" not in values.values() and resolved.notes == ()
    # torch's fused Adam, but for states that lie on the CPU: there DeepSpeed's own is faster.
    assert values["optimizer.params.torch_adam"] is ("offload" not in name)
    assert values.get("optimizer.params.fused", False) is ("offload" not in name)
    half = next((kind for kind in ("fp16", "bf16") if kind in raw), "fp32")
    assert resolved.precision == half and resolved.config.get(half) == raw.get(half)
    assert resolved.config["zero_optimization"] == raw["zero_optimization"]
    if half == "bf16":
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
        with pytest.raises(ConfigError, match="bf16, which this GPU lacks; use fp16"):
            resolve(raw)


def test_default_configuration(monkeypatch):
    assert engine.read_ds_config(None) == json.loads((engine.DS_CONFIGS / "cpu.json").read_text())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert engine.read_ds_config(None)["fp16"]["enabled"] is True


# ------------------------------------------------------------------------------- filling "auto"


@pytest.mark.parametrize(
    "micro, accumulation, train, world, expected",
    [
        (None, None, None, 1, (32, 1, 32)),  # the default batch, shared out
        (None, None, None, 4, (8, 1, 32)),
        (None, None, None, 3, (10, 1, 30)),
        (None, None, None, 64, (1, 1, 64)),
        (None, 4, None, 2, (4, 4, 32)),
        (8, None, None, 2, (8, 1, 16)),
        (8, 4, None, 2, (8, 4, 64)),
        (None, None, 64, 4, (16, 1, 64)),
        (None, 2, 64, 4, (8, 2, 64)),
        (4, None, 64, 4, (4, 4, 64)),
        (4, 4, 64, 4, (4, 4, 64)),
    ],
)
@pytest.mark.parametrize("how", ["flags", "json", "auto"])
def test_batch_arithmetic(micro, accumulation, train, world, expected, how):
    in_json = {
        "train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation,
        "train_batch_size": train,
    }
    flags = {
        "per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation,
        "train_batch_size": train,
    }
    raw = {"json": {key: value for key, value in in_json.items() if value},
           "auto": dict.fromkeys(in_json, "auto"), "flags": {}}[how]
    resolved = resolve(raw, world_size=world, **({} if how == "json" else flags))
    found = (resolved.micro_batch_size, resolved.accumulation_steps, resolved.train_batch_size)
    assert found == expected
    assert tuple(resolved.config[key] for key in in_json) == expected


def test_nothing_said_means_the_defaults_of_the_command():
    resolved = resolve({}, defaults={
        "default_learning_rate": 3e-5, "default_warmup_ratio": 0.2, "default_batch": 6,
    })
    values = flat(resolved.config)
    assert values["optimizer.params.lr"] == values["scheduler.params.warmup_max_lr"] == 3e-5
    assert values["optimizer.params.weight_decay"] == 0.01 and values["gradient_clipping"] == 1.0
    assert values["scheduler.params.warmup_num_steps"] == 20
    assert resolved.train_batch_size == 6
    assert values["optimizer.type"] == "AdamW" and values["scheduler.type"] == "WarmupDecayLR"


@pytest.mark.parametrize(
    "kind, total_steps, ratio, expected",
    [
        ("WarmupDecayLR", 100, None, {"warmup_num_steps": 10, "total_num_steps": 101}),
        ("WarmupDecayLR", 100, 0.25, {"warmup_num_steps": 25, "total_num_steps": 101}),
        ("WarmupDecayLR", 100, 0.0, {"warmup_num_steps": 2, "total_num_steps": 101}),
        ("WarmupDecayLR", 1, None, {"warmup_num_steps": 2, "total_num_steps": 3}),
        ("WarmupLR", 100, None, {"warmup_num_steps": 10}),
        ("WarmupCosineLR", 100, None, {"warmup_num_steps": 10, "total_num_steps": 102}),
        ("WarmupStableDecayLR", 100, None, {
            "warmup_num_steps": 10, "total_num_steps": 101, "decay_num_steps": 10}),
        ("WarmupStableDecayLR", 3, None, {
            "warmup_num_steps": 2, "total_num_steps": 4, "decay_num_steps": 1}),
    ],
)
@pytest.mark.parametrize("how", ["auto", "absent"])
def test_schedule(kind, total_steps, ratio, expected, how):
    params = dict.fromkeys(expected, "auto") if how == "auto" else {}
    raw = {"scheduler": {"type": kind, "params": params}}
    resolved = resolve(raw, total_steps=total_steps, learning_rate=1e-3, warmup_ratio=ratio)
    schedule = resolved.config["scheduler"]["params"]
    assert schedule.pop("warmup_type") == "linear"  # DeepSpeed's default is logarithmic
    if kind != "WarmupCosineLR":
        assert (schedule.pop("warmup_min_lr"), schedule.pop("warmup_max_lr")) == (0, 1e-3)
    assert schedule == expected


@pytest.mark.parametrize("name, kind", [
    (None, "WarmupDecayLR"), ("linear", "WarmupDecayLR"), ("cosine", "WarmupCosineLR"),
    ("constant", "WarmupLR"), ("wsd", "WarmupStableDecayLR"),
])
def test_a_flag_names_the_schedule_and_a_written_one_that_agrees_is_the_same(name, kind):
    """One JSON with "auto" everywhere serves all types: what a type does not have is left out."""
    keys = ("warmup_max_lr", "warmup_num_steps", "total_num_steps", "decay_num_steps")
    auto = {"scheduler": {"type": "auto", "params": dict.fromkeys(keys, "auto")}}
    found = resolve(auto, lr_scheduler_type=name).config["scheduler"]
    assert found["type"] == kind and found["params"].keys() <= ds_schema.SCHEDULERS[kind]
    assert ("decay_num_steps" in found["params"]) == (name == "wsd")
    for raw in ({}, {"scheduler": {"type": "auto"}}, {"scheduler": {"type": kind}}):
        assert resolve(raw, lr_scheduler_type=name).config["scheduler"] == found
    assert resolve({"scheduler": {"type": kind}}).config["scheduler"] == found


def test_the_number_of_steps_may_depend_on_the_batch():
    resolved = resolve({"train_batch_size": 16}, total_steps=lambda batch: 800 // batch)
    assert resolved.config["scheduler"]["params"]["total_num_steps"] == 51


def test_what_the_json_says_stays():
    raw = {
        "optimizer": {"type": "Adam", "params": {"lr": 5e-5, "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupDecayLR", "params": {
            "warmup_num_steps": 7, "total_num_steps": 500, "warmup_max_lr": 5e-5,
            "warmup_type": "log",
        }},
        "gradient_clipping": 0.25, "train_batch_size": 12, "steps_per_print": 5,
    }
    resolved = resolve(raw, world_size=3)
    values = flat(resolved.config)
    for key, value in flat(raw).items():
        assert values[key] == value
    assert resolved.micro_batch_size == 4
    # A flag that agrees with what is written is no contradiction.
    again = resolve(raw, world_size=3, learning_rate=5e-5, train_batch_size=12, max_grad_norm=0.25)
    assert again == resolved


# ------------------------------------------------------------------------------------- refusals


def optimizer(**params) -> dict:
    return {"optimizer": {"type": "AdamW", "params": params}}


def scheduler(**params) -> dict:
    return {"scheduler": {"type": "WarmupDecayLR", "params": params}}


REFUSED = {
    # A flag against what is written: both are shown.
    "micro": ({"train_micro_batch_size_per_gpu": 4}, {"per_device_train_batch_size": 8},
              "--per_device_train_batch_size 8 contradicts train_micro_batch_size_per_gpu 4"),
    "accumulation": ({"gradient_accumulation_steps": 2}, {"gradient_accumulation_steps": 3},
                     "--gradient_accumulation_steps 3 contradicts gradient_accumulation_steps 2"),
    "train": ({"train_batch_size": 32}, {"train_batch_size": 64},
              "--train_batch_size 64 contradicts train_batch_size 32"),
    "clip": ({"gradient_clipping": 1.0}, {"max_grad_norm": 0.5},
             "--max_grad_norm 0.5 contradicts gradient_clipping 1.0"),
    "clip-zero": ({"gradient_clipping": 0}, {"max_grad_norm": 0.5}, "contradicts"),
    "lr": (optimizer(lr=1e-3), {"learning_rate": 1e-4}, "--learning_rate 0.0001 contradicts lr"),
    "decay": (optimizer(weight_decay=0.1), {"weight_decay": 0.0},
              "--weight_decay 0.0 contradicts weight_decay 0.1"),
    "lr-of-the-schedule": ({**optimizer(lr="auto"), **scheduler(warmup_max_lr=5e-5)}, {
                           "learning_rate": 1e-3},
                           "--learning_rate 0.001 contradicts warmup_max_lr 5e-05"),
    "warmup": (scheduler(warmup_num_steps=50), {"warmup_ratio": 0.1},
               "--warmup_ratio 0.1 contradicts warmup_num_steps 50"),
    "schedule": ({"scheduler": {"type": "WarmupDecayLR"}}, {"lr_scheduler_type": "cosine"},
                 "--lr_scheduler_type cosine contradicts scheduler.type WarmupDecayLR"),
    "decay-steps": ({"scheduler": {"type": "auto", "params": {"decay_num_steps": 5}}}, {
                    "lr_scheduler_type": "wsd", "decay_ratio": 0.2},
                    "--decay_ratio 0.2 contradicts decay_num_steps 5"),
    "no-decay": ({}, {"decay_ratio": 0.2}, "--decay_ratio 0.2: has no use .* WarmupDecayLR; leave"),
    "no-peak": ({"scheduler": {"type": "auto", "params": {"warmup_max_lr": 1e-3}}}, {
                "lr_scheduler_type": "cosine"}, "warmup_max_lr in .* has no use in WarmupCosineLR"),
    "no-stable-steps": ({}, {"lr_scheduler_type": "wsd", "warmup_ratio": 0.5, "decay_ratio": 0.6},
                        "--warmup_ratio 0.5 and --decay_ratio 0.6 are more than all steps"),
    "no-stable-steps-by-default": ({}, {"lr_scheduler_type": "wsd", "decay_ratio": 0.95},
                                   "--warmup_ratio 0.1 .the default. and --decay_ratio 0.95 are"),
    # Batches that do not work out.
    "odd-train": ({"train_batch_size": 64}, {"per_device_train_batch_size": 5},
                  "micro 5 x accumulation None x 1 ranks must equal train_batch_size 64"),
    "too-small-train": ({"train_batch_size": 1}, {"gradient_accumulation_steps": 2},
                        "batch sizes do not fit"),
    "all-three": ({"train_batch_size": 64, "gradient_accumulation_steps": 3}, {
                  "per_device_train_batch_size": 8}, "micro 8 x accumulation 3 x 1 ranks"),
    "zero-batch": ({"train_batch_size": 0}, {}, "train_batch_size 0: must be a whole number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_configurations(name):
    raw, flags, fragment = REFUSED[name]
    with pytest.raises(ConfigError, match=fragment) as refused:
        resolve(raw, **flags)
    assert "\n" not in str(refused.value)


# ----------------------------------------------------------------- parameter groups, ranks


def tiny_classifier() -> torch.nn.Module:
    module = torch.nn.Module()
    module.body = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    module.body.table = torch.nn.Embedding(5, 4)
    module.head = torch.nn.Linear(4, 2)
    return module


def named_groups(module, **arguments) -> dict[str, dict]:
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {
        group["name"]: {**group, "params": {names[p] for p in group["params"]}}
        for group in engine.parameter_groups(module, **arguments)
    }


@pytest.mark.parametrize("head, expected", [
    ({}, {
        "encoder": ({"body.0.weight", "body.table.weight", "head.weight"}, 0.1, 1.0),
        "encoder_no_decay": (
            {"body.0.bias", "body.1.weight", "body.1.bias", "head.bias"}, 0.0, 1.0),
    }),
    ({"head_prefixes": ("head.",), "head_scale": 10.0}, {
        "encoder": ({"body.0.weight", "body.table.weight"}, 0.1, 1.0),
        "encoder_no_decay": ({"body.0.bias", "body.1.weight", "body.1.bias"}, 0.0, 1.0),
        "head": ({"head.weight"}, 0.1, 10.0),
        "head_no_decay": ({"head.bias"}, 0.0, 10.0),
    }),
])
def test_groups_of_biases_and_norms_and_of_the_head(head, expected):
    groups = named_groups(tiny_classifier(), weight_decay=0.1, **head)
    assert all(group.keys() == {"name", "params", "weight_decay", "lr_scale"}
               for group in groups.values())
    assert {name: (group["params"], group["weight_decay"], group["lr_scale"])
            for name, group in groups.items()} == expected


def test_frozen_and_tied_parameters():
    module = tiny_classifier()
    module.head.weight.requires_grad = False
    module.body.again = torch.nn.Embedding(5, 4)
    module.body.again.weight = module.body.table.weight
    parameters = [
        parameter
        for group in engine.parameter_groups(module, 0.1, ("head.",))
        for parameter in group["params"]
    ]
    assert len(parameters) == len({id(parameter) for parameter in parameters})
    assert {id(p) for p in parameters} == {
        id(p) for p in module.parameters() if p is not module.head.weight
    }
    module.requires_grad_(False)
    assert engine.parameter_groups(module, 0.1) == []


def test_every_parameter_of_a_masked_lm_is_in_one_group(tiny_encoder):
    from train import model

    module = model.load_masked_lm(tiny_encoder, seed=0)
    groups = named_groups(module, weight_decay=0.1, head_prefixes=module.head_prefixes)
    assert list(groups) == ["encoder_no_decay", "encoder", "head_no_decay", "head"]
    names = [name for group in groups.values() for name in group["params"]]
    assert sorted(names) == sorted(name for name, _ in module.named_parameters())
    undecayed = groups["encoder_no_decay"]["params"] | groups["head_no_decay"]["params"]
    assert undecayed == {
        name for name in names if name.endswith("bias") or "LayerNorm" in name
    }
    # The projection is tied to the embeddings: it learns at the encoder's rate.
    assert "hf.bert.embeddings.word_embeddings.weight" in groups["encoder"]["params"]


def test_ranks_come_from_the_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    # Another test may have joined a group in this process: it must outlive this one.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    assert engine.ranks() == engine.Ranks(0, 1, 0) and engine.is_main()
    assert engine.all_reduce_sum(1, 2.5) == [1.0, 2.5]
    assert engine.gather_objects({"a": 1}) == [{"a": 1}]
    engine.barrier()
    engine.finish()  # no group to leave
    monkeypatch.setattr(os, "environ", {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    assert engine.ranks() == engine.Ranks(5, 8, 1) and not engine.is_main()


def test_what_is_replaced_in_deepspeed_is_still_there():
    """The list in `train/engine/__init__.py`; a new version that changes one makes this fail."""
    import deepspeed
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import DeepSpeedEngine

    for name, used in (
        ("_save_checkpoint", "self.checkpoint_engine.save(state_dict=state, path=save_path)"),
        ("_save_zero_checkpoint", "self.checkpoint_engine.save("),
        ("load_universal_checkpoint", "self._config.load_universal_checkpoint"),
        ("__init__", "self.enable_backward_allreduce = True"),
    ):
        assert used in inspect.getsource(getattr(DeepSpeedEngine, name)), name
    assert "if self.enable_backward_allreduce and" in inspect.getsource(DeepSpeedEngine)
    assert "self.load_universal_checkpoint =" in inspect.getsource(DeepSpeedConfig)
    assert "torch.load(" in inspect.getsource(TorchCheckpointEngine.load)
    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__


def test_ranks_that_do_not_find_each_other_say_where_they_looked(monkeypatch):
    import deepspeed

    def alone(*words, **options) -> None:
        raise torch.distributed.DistStoreError("Timed out; 1/2 clients joined.\nframe #0: a trace")

    monkeypatch.setattr(deepspeed, "init_distributed", alone)
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    wanted = r"rank 0 of 2 .* node1:29500 \(Timed out; 1/2 .*\)"
    with pytest.raises(ConfigError, match=wanted) as error:
        engine.start()
    assert "\n" not in str(error.value)
