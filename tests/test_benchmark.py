"""The loop's benchmark: figures follow from the counts, and it is the real loop it measures."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from preprocess.errors import ConfigError, DataError
from preprocess.store import StoreWriter, TokenStore, write_array
from train import benchmark, data, mlm
from train.config import BenchmarkConfig

RATE = 0.3


@pytest.fixture(scope="module")
def prefix(tmp_path_factory, tiny_tokenizer) -> str:
    """A store of 60 documents with the mask index `fifth`: every fifth token."""
    path = str(tmp_path_factory.mktemp("store") / "text")
    generator = np.random.default_rng(0)
    with StoreWriter(path, tiny_tokenizer, {}) as writer:
        for length in generator.integers(10, 90, size=60):
            writer.add_document([generator.integers(5, len(tiny_tokenizer), size=length)])
    shard = TokenStore.open(path).shards[0]
    positions = np.arange(0, shard.num_tokens, 5, dtype=np.uint32)
    write_array(shard, "fifth", "mask", positions, {"strategy": "selective"})
    return path


@pytest.fixture
def config(prefix, tiny_encoder, tmp_path) -> BenchmarkConfig:
    return BenchmarkConfig(
        tokens=prefix, model_name_or_path=tiny_encoder, output_dir=str(tmp_path / "out"),
        max_seq_length=32, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        mlm_probability=RATE, mask_indices=["fifth"], warmup_steps=1, timed_steps=2, rounds=2,
    )


def flags(config: BenchmarkConfig) -> list[str]:
    """The command line of `config`."""
    names = (
        "tokens", "model_name_or_path", "output_dir", "max_seq_length", "mlm_probability",
        "per_device_train_batch_size", "gradient_accumulation_steps", "warmup_steps",
        "timed_steps", "rounds",
    )
    line = [part for name in names for part in (f"--{name}", str(getattr(config, name)))]
    return [*line, "--strategies", *config.strategies, "--mask_indices", *config.mask_indices]


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_run_measures_every_row_and_ends_with_json(config, run_command_line, tmp_path, ranks):
    done = run_command_line("train/benchmark.py", *flags(config), ranks=ranks)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("{", "loop / bare"))]
    saved = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert json.loads(lines[-1]) == saved
    assert lines[-2].startswith("loop / bare")
    assert {"command", "commit", "versions", "platform", "cpus", "gpu", "options", "ds_config",
            "rows", "loop_over_bare"} <= saved.keys()
    assert saved["world_size"] == max(ranks, 1)
    rows = {row["strategy"]: row for row in saved["rows"]}
    assert list(rows) == ["bare", "random", "whole_word", "fifth"]
    for name, rate in (("random", RATE), ("whole_word", RATE), ("fifth", 0.2)):
        assert rows[name]["masked_rate"] == pytest.approx(rate, abs=0.03)
    for row in rows.values():
        assert row["counted_steps"] == config.rounds * config.timed_steps
        assert row["step_ms"]["p20"] <= row["step_ms"]["median"] <= row["step_ms"]["p80"]
        assert 0 <= row["data_wait_percent"] < 100 and row["peak_memory_gib"] > 0
        assert row["masked_tokens_per_second"] < row["tokens_per_second"]
        batch_rows = 4 * 2 * max(ranks, 1)
        assert row["rows_per_second"] == pytest.approx(1000 * batch_rows / row["step_ms"]["median"])
    assert rows["random"]["over_random"] == 1


def test_dry_run_writes_nothing(config, tmp_path, capsys):
    benchmark.main([*flags(config), "--dry_run"])
    out = capsys.readouterr().out
    assert "4 rows x 2 micro batches x 1 ranks = 8 rows" in out
    assert "dropped: 1 warm-up steps" in out
    assert not (tmp_path / "out").exists()


def test_baseline_is_added_and_comes_first(config):
    inputs = benchmark.read_inputs(dataclasses.replace(config, strategies=["whole_word"]))
    assert list(inputs.maskings) == ["random", "whole_word", "fifth"]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"strategies": ["spans"]}, ConfigError, "spans.*random, whole_word"),
        ({"strategies": ["selective"]}, ConfigError, "selective.*--mask_indices"),
        ({"mask_indices": ["fifth", "fifth"]}, ConfigError, "fifth.*twice"),
        ({"mask_indices": ["bare"]}, ConfigError, "bare"),
        ({"mask_indices": ["absent"]}, DataError, "absent"),
        ({"max_seq_length": 512}, ConfigError, "512.*64 positions"),
        ({"deepspeed_config": "no.json"}, ConfigError, "no.json"),
        ({"model_name_or_path": None, "model_config": "bert-huge"}, ConfigError, "bert-tiny"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(config, change, error, words):
    with pytest.raises(error, match=words):
        benchmark.read_inputs(dataclasses.replace(config, **change))


def test_unknown_strategy_exits_with_2(config, run_command_line):
    line = flags(dataclasses.replace(config, strategies=["spans"]))
    done = run_command_line("train/benchmark.py", *line, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "spans" in done.stderr


def test_figures_follow_from_the_counts():
    # Steps of 1, 1, 1, 5 s: the median holds against the slow one.
    loop = benchmark.Measured([1.0, 1.0, 1.0, 5.0], [0.1, 0.1, 0.1, 0.5], [90, 110, 100, 100],
                              [15, 15, 10, 20], [75, 85, 80, 80], 2.0)
    fast = benchmark.Measured([0.5] * 4, [0.0] * 4, [100] * 4, [15] * 4, [80] * 4, 1.0)
    row = benchmark.summarise("x", fast, batch_rows=8, baseline=loop)
    assert row["tokens_per_second"] == 200 and row["rows_per_second"] == 16
    assert row["over_random"] == 2 and row["masked_tokens_per_second"] == 30
    row = benchmark.summarise("random", loop, batch_rows=8, baseline=loop)
    assert row["tokens_per_second"] == 100 and row["step_ms"]["median"] == 1000
    assert row["masked_rate"] == 60 / 320
    assert row["data_wait_percent"] == pytest.approx(10)
    # Two rounds: bare 0.5 s of 1 s, and 0.5 s of 3 s.
    ratio = benchmark.loop_over_bare({"bare": fast, "random": loop}, rounds=2)
    assert ratio["median"] == pytest.approx((0.5 + 0.5 / 3) / 2)


def loader(inputs: benchmark.Inputs) -> data.PackedData:
    return data.PackedData(
        inputs.store, inputs.rows, inputs.maskings["random"], seed=0, micro_batch_size=4,
        accumulation_steps=2,
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bare_step_trains(config, precision):
    inputs = benchmark.read_inputs(config)
    resolved = dataclasses.replace(inputs.resolved, precision=precision)
    resolved.config["optimizer"]["params"]["lr"] = 1e-2
    inputs = dataclasses.replace(inputs, resolved=resolved)
    module, batch = mlm.build_model(inputs.config, inputs.store), loader(inputs).step(0)
    step = benchmark.make_bare_step(inputs, module, batch, torch.device("cpu"))
    micro_batch = batch.micro_batches[0].inputs(torch.device("cpu"))
    before = module(**micro_batch)[0].item()
    for _ in range(5):
        step()
    assert module(**micro_batch)[0].item() < 0.8 * before
    assert {p.dtype for p in module.parameters()} == {benchmark.DTYPES[precision]}


# ------------------------------------------------------------------------------ whole step


def test_whole_step_compares_ways_to_the_same_loss(config, prefix):
    config = dataclasses.replace(config, whole_step=True, max_seq_length=64)
    inputs = benchmark.read_inputs(config)
    module = mlm.build_model(config, inputs.store).eval()
    loader = data.PackedData(inputs.store, inputs.rows, inputs.maskings["random"], seed=1,
                             micro_batch_size=1)
    numbers = range(inputs.rows.num_rows)
    alone = next(
        batch for batch in (loader.step(n).micro_batches[0] for n in numbers)
        if batch.document_ids.max() == 0 and batch.num_masked > 3  # nothing to keep apart
    )
    losses, gradients = {}, {}
    passes = benchmark.whole_step_passes(module, alone, torch.device("cpu"))
    for name, call in passes.items():
        module.zero_grad()
        loss = call()
        loss.backward()
        losses[name] = loss.item()
        gradients[name] = {key: p.grad for key, p in module.named_parameters()}
    assert list(losses) == ["transformers", "gather", "head", "head + subset"]
    assert list(losses.values()) == pytest.approx([losses["transformers"]] * 4, rel=1e-5)
    for found in gradients.values():
        torch.testing.assert_close(found, gradients["transformers"], rtol=1e-4, atol=1e-6)


def test_whole_step_writes_its_table(config, run_here, tmp_path, capsys):
    run_here("train/benchmark.py", *flags(config), "--whole_step")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert [row["variant"] for row in result["rows"]][0] == "transformers"
    assert result["rows"][0]["speedup"] == {"median": 1.0, "p20": 1.0, "p80": 1.0}
    assert all(row["counted_steps"] == 4 for row in result["rows"])


def test_whole_step_runs_on_one_rank(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--whole_step on 2 ranks"):
        benchmark.read_inputs(dataclasses.replace(config, whole_step=True))
