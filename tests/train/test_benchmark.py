"""The loop's benchmark: figures follow from counts, rivals are what they claim to be."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from preprocess import masking as masks
from preprocess.errors import ConfigError, DataError
from preprocess.store import StoreWriter, TokenStore, write_array
from tests.support.runs import words
from tests.support.stores import read
from train import benchmark, data, engine, model
from train.bench import baselines, events, kinds, maskings, tables, throughput
from train.config import BenchmarkConfig
from train.model import flops
from train.run_dir import metrics
from train.stages import masked_lm as mlm

RATE = 0.3


@pytest.fixture(scope="module")
def prefix(tmp_path_factory, tiny_tokenizer) -> str:
    """60 documents with the mask index `fifth`, every fifth token, and scores.

    The scores `some` have a boundary at 0 and tell their seconds, `rare` have neither.
    """
    path = str(tmp_path_factory.mktemp("store") / "text")
    generator = np.random.default_rng(0)
    with StoreWriter(path, tiny_tokenizer, {}) as writer:
        for length in generator.integers(10, 90, size=60):
            writer.add_document([generator.integers(5, len(tiny_tokenizer), size=length)])
    shard = TokenStore.open(path).shards[0]
    positions = np.arange(0, shard.num_tokens, 5, dtype=np.uint32)
    write_array(shard, "fifth", "mask", positions, {"strategy": "selective"})
    # Some types are important wherever they occur, as in text.
    means = generator.normal(-1, 1, size=len(tiny_tokenizer))[shard.tokens]
    scores = (means + generator.normal(0, 0.5, size=shard.num_tokens)).astype(np.float16)
    measure = {"name": "drawn", "unit": "log-odds", "reads_labels": True}
    write_array(shard, "some", "scores", scores,
                {"measure": {**measure, "boundary": True}, "seconds": 3.0})
    write_array(shard, "rare", "scores", np.exp(scores),
                {"measure": {**measure, "boundary": False}})
    write_array(shard, "old", "scores", scores, {})
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
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return words({name: value for name, value in vars(config).items()
                  if value not in ([], defaults[name])})


ROW_KEYS = {
    "name", "kind", "masked_rate", "masked_per_step", "tokens_per_second", "rows_per_second",
    "masked_tokens_per_second", "step_ms", "filled_percent", "mfu_percent", "share_percent",
    "peak_memory_gib", "over_random", "counted_steps",
}


# ------------------------------------------------------------------------------ whole command


def check_result(saved: dict, config: BenchmarkConfig, ranks: int = 1) -> None:
    """Whatever holds of every result of `config`."""
    assert {"command", "commit", "versions", "platform", "cpus", "gpu", "options", "ds_config",
            "lengths", "mask_costs", "peak"} <= saved.keys()
    assert saved["world_size"] == ranks
    for length in saved["lengths"]:
        for row in length["rows"]:
            assert row.keys() >= ROW_KEYS
            assert row["counted_steps"] == config.rounds * config.timed_steps
            assert row["step_ms"]["p20"] <= row["step_ms"]["median"] <= row["step_ms"]["p80"]
            assert row["peak_memory_gib"] > 0 and row["mfu_percent"] > 0
            assert row["masked_tokens_per_second"] < row["tokens_per_second"]
            batch_rows = 4 * 2 * ranks
            assert row["rows_per_second"] == pytest.approx(
                1000 * batch_rows / row["step_ms"]["median"])
            shares = {name: share or 0.0 for name, share in row["share_percent"].items()}
            assert sum(shares.values()) == pytest.approx(100) and min(shares.values()) >= 0
            assert row["share_percent"]["head"] != 0 and shares["optimizer"] > 0


@pytest.mark.slow
def test_run_measures_every_strategy_and_baseline(config, run_here, tmp_path, capsys):
    config = dataclasses.replace(
        config, scores="some", max_seq_lengths=[32, 48], rounds=1, timed_steps=2)
    run_here("train/benchmark.py", *flags(config))
    out = capsys.readouterr().out
    saved = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    last = out.splitlines()[-1]
    assert len(last) < 1000 and json.loads(last)["file"] == str(tmp_path / "out/benchmark.json")
    assert json.loads(last)["tokens_per_second"]["48"]["bare"] == pytest.approx(
        next(row["tokens_per_second"] for row in saved["lengths"][1]["rows"]
             if row["name"] == "bare"), abs=0.5)
    check_result(saved, config)
    assert [length["max_seq_length"] for length in saved["lengths"]] == [32, 48]
    for length in saved["lengths"]:
        rows = {row["name"]: row for row in length["rows"]}
        ours = [*masks.STRATEGIES, "fifth"]
        assert list(rows) == [*ours, *(f"{name} =" for name in ours), "bare", *baselines.BASELINES]
        assert rows["random"]["masked_rate"] == pytest.approx(RATE, abs=0.05)
        assert rows["fifth"]["masked_rate"] == pytest.approx(0.2, abs=0.03)
        assert rows["random"]["over_random"]["median"] == 1
        assert rows["random ="]["over_random"]["median"] == 1
        assert rows["transformers-grouped"]["over_grouped"]["median"] == 1
        assert rows["transformers-grouped"]["filled_percent"] == 100
        assert rows["transformers-lines"]["filled_percent"] < 100
    costs = {cost["name"]: cost for cost in saved["mask_costs"]}
    assert list(costs) == ours
    assert costs["selective"]["bytes_on_disk"] == 4 * costs["selective"]["masked_tokens"] + 128
    assert costs["fifth"]["seconds"] is None and costs["random"]["bytes_on_disk"] == 0
    matched = [name for name, one in masks.STRATEGIES.items() if one.budget == "match"]
    assert {costs[name]["masked_tokens"] for name in matched} == {
        costs["selective"]["masked_tokens"]}
    tokens = saved["store_tokens"]
    for name, found in costs.items():
        reads = name in masks.STRATEGIES and maskings.reads_scores(name)
        assert found["score_seconds_per_million_tokens"] == (3e6 / tokens if reads else None)
    assert saved["equal_masked_tokens"] == min(cost["masked_tokens"] for cost in costs.values())
    assert (tmp_path / "out" / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    for name in rows:
        assert name.removesuffix(" =") in out
    for length in saved["lengths"]:
        for row in length["rows"]:
            check_events(tmp_path / "out", length["max_seq_length"], row)


def check_events(output_dir: Path, max_seq_length: int, row: dict) -> None:
    """TensorBoard has the counted steps of a row, and they give its figures."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = output_dir / "tb" / str(max_seq_length) / row["name"].replace(" =", "-equal")
    found = EventAccumulator(str(folder)).Reload()
    values = {}
    for tag in found.Tags()["scalars"]:
        points = found.Scalars(tag)
        assert [point.step for point in points] == list(range(1, row["counted_steps"] + 1))
        values[tag] = np.array([point.value for point in points])
    seconds = values["throughput/step_seconds"]
    assert 1000 * np.median(seconds) == pytest.approx(row["step_ms"]["median"], rel=1e-5)
    tokens = values[metrics.TOKENS_PER_SECOND] * seconds
    assert tokens.mean() / np.median(seconds) == pytest.approx(row["tokens_per_second"], rel=1e-4)
    masked = values[metrics.MASKED_TOKENS_PER_SECOND] * seconds
    assert masked.mean() == pytest.approx(row["masked_per_step"], rel=1e-4)
    share = (values[metrics.MFU] * seconds).mean() / np.median(seconds)
    assert 100 * share == pytest.approx(row["mfu_percent"], rel=1e-4)


def test_a_second_benchmark_replaces_the_events_of_the_first(tmp_path):
    for seconds in ([1.0, 2.0, 4.0], [3.0]):
        counts = [throughput.Counts(8, 2, 8, 8, 1)] * len(seconds)
        measured = throughput.Measured(seconds, seconds, counts)
        folder = events.folder_of(tmp_path, 32, "random =")
        events.write_events(folder, measured, flops.StepFlops(1.0, 3.0), peak=7.0)
    check_events(tmp_path, 32, {
        "name": "random =", "counted_steps": 1, "step_ms": {"median": 3000.0},
        "tokens_per_second": 8 / 3, "masked_per_step": 2, "mfu_percent": 100 * 14 / 3 / 7,
    })


@pytest.mark.slow
def test_two_ranks_leave_the_baselines_out(config, run_command_line, tmp_path):
    done = run_command_line("train/benchmark.py", *flags(config), ranks=2)
    saved = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    check_result(saved, config, ranks=2)
    kinds = {row["kind"] for row in saved["lengths"][0]["rows"]}
    assert kinds == {"strategy", "equal", "bare"} and "left out on 2" in done.stdout


def test_dry_run_prints_the_plan_and_writes_nothing(config, tmp_path, capsys):
    benchmark.main([*flags(config), "--dry_run"])
    out = capsys.readouterr().out
    assert "4 rows x 2 micro batches x 1 ranks = 8 rows" in out
    assert "dropped: 1 warm-up steps" in out
    # Drawn strategies and an index, once more equal, bare, 4 loops; each 1 + 2 x (2 + 2) steps.
    ours = sum(one.drawn for one in masks.STRATEGIES.values()) + 1
    assert f"{(ours * 2 + 1 + 4) * 9} steps of 8 rows" in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "error", "fragment"),
    [
        ({"strategies": ["spans"]}, ConfigError, "spans.*random, whole_word"),
        ({"strategies": ["selective"]}, ConfigError, "selective.*--scores.*--mask_indices"),
        ({"strategies": ["whole_word"] * 2}, ConfigError, "whole_word.*twice"),
        ({"scores": "absent"}, DataError, "absent"),
        ({"scores": "old"}, DataError, "old: their JSON names no measure.*make them again"),
        ({"scores": "rare", "strategies": ["selective"]}, ConfigError, "0 parts.*rare.*take top"),
        ({"corruption": "80,10"}, ConfigError, "three percentages"),
        ({"mask_indices": ["fifth", "fifth"]}, ConfigError, "fifth.*twice"),
        ({"mask_indices": ["bare"]}, ConfigError, "bare"),
        ({"mask_indices": ["gather-lines"]}, ConfigError, "gather-lines"),
        ({"mask_indices": ["absent"]}, DataError, "absent"),
        ({"baselines": ["trainer"]}, ConfigError, "trainer.*transformers-grouped"),
        ({"max_seq_lengths": [32, 512]}, ConfigError, "512.*64 positions"),
        ({"deepspeed_config": "no.json"}, ConfigError, "no.json"),
        ({"model_name_or_path": None, "model_config": "bert-huge"}, ConfigError, "bert-tiny"),
        ({"max_seq_lengths": [32, 32]}, ConfigError, "max_seq_lengths"),
        ({"max_seq_lengths": [4]}, ConfigError, "max_seq_lengths"),
        ({"mlm_probability": 1.0}, ConfigError, "mlm_probability"),
        ({"compare": ["a.json"]}, ConfigError, "two files"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(config, change, error, fragment):
    with pytest.raises(error, match=fragment):
        benchmark.read_inputs(dataclasses.replace(config, **change))


# ------------------------------------------------------------------------------------ figures


def made_row(name: str, kind: str = "strategy") -> throughput.Row:
    """A row that nothing runs."""
    return throughput.Row(name, kind, itertools.repeat(None), lambda *_: None, lambda _: None,
                          lambda _: 0.0, "engine")


def test_figures_follow_from_the_counts():
    counts = [throughput.Counts(tokens, masked, text, 128, 8) for tokens, masked, text in
              zip([90, 110, 100, 100], [15, 15, 10, 20], [75, 85, 80, 80], strict=True)]
    # Steps of 1, 1, 1, 5 s: the median holds against the slow one.
    slow = throughput.Measured([1.0, 1.0, 1.0, 5.0], [0.1, 0.1, 0.1, 0.5], counts,
                               [{"loader": 9.0, "forward": 2.0, "backward": 4.0, "optimizer": 2.0,
                                 "head": 1.0}], 2.0)
    row = throughput.summarise(made_row("random"), slow, flops.StepFlops(3.0, 20.0), 6000.0)
    assert row["tokens_per_second"] == 100 and row["rows_per_second"] == 8
    assert row["masked_tokens_per_second"] == 15 and row["masked_rate"] == 60 / 320
    assert row["filled_percent"] == pytest.approx(100 * 400 / 512)
    assert row["mfu_percent"] == pytest.approx(100 * (3 * 100 + 20 * 15) / 6000)
    # The loader's share is that of counted steps; the parts divide what is left.
    assert row["share_percent"] == pytest.approx(
        {"loader": 10, "optimizer": 22.5, "head": 11.25, "rest": 56.25})
    # One step whose head was slow does not count, as the first call on a GPU; a head that is
    # slower alone than forward and backward together was not measured.
    (step,) = slow.apart
    odd = dataclasses.replace(slow, apart=[step, {**step, "head": 900.0}, step])
    assert throughput.shares(odd) == pytest.approx(row["share_percent"])
    wrong = throughput.shares(dataclasses.replace(slow, apart=[{**step, "head": 6.1}]))
    assert wrong == {"loader": 10, "optimizer": 22.5, "head": None, "rest": 67.5}
    assert tables.make_table([row | {"share_percent": wrong}], "head", "rest").split()[-3:] == [
        "-", "67.5", "%"]
    fast = dataclasses.replace(slow, seconds=[0.5] * 4)
    # Two rounds: 200 tokens in 2 s and in 6 s, against 1 s.
    assert throughput.round_rates(slow, 2) == pytest.approx([100, 200 / 6])
    assert throughput.speed_over(fast, slow, 2)["median"] == pytest.approx((2 + 6) / 2)


def test_a_turn_drops_its_first_step_and_takes_its_last_apart(monkeypatch):
    monkeypatch.setattr(throughput, "reset_peak", lambda: False)
    seen = []

    def step(batch, lap):
        seen.append((batch, lap is not throughput.no_laps))
        lap("optimizer")

    row = dataclasses.replace(made_row("x"), batches=iter(range(9)), step=step,
                              count=lambda batch: batch, head_seconds=lambda batch: float(batch))
    measured = throughput.Measured()
    throughput.take_turn(row, measured, timed_steps=3, foreign_gib=0.0)
    assert seen == [(0, False), (1, False), (2, False), (3, False), (4, True)]
    assert measured.counts == [1, 2, 3] and measured.apart[0]["head"] == 4.0


def test_peak_memory_is_that_of_the_turn():
    throughput.reset_peak()
    before = throughput.peak_gib()
    block = torch.ones(2**26)  # 256 MiB
    with_block = throughput.peak_gib()
    del block
    throughput.reset_peak()
    assert with_block - before > 0.2
    assert throughput.peak_gib() < with_block - 0.2


# ----------------------------------------------------------------------------------- maskings


def test_equal_maskings_hold_equally_many_positions(config):
    inputs = benchmark.read_inputs(dataclasses.replace(config, scores="some"))
    built = benchmark.build_maskings(inputs)
    count = built.equal_tokens
    for name, masking in built.equal.items():
        plain = built.plain[name]
        if masking.index is None:
            assert 0 < masking.rate <= plain.rate
            continue
        (kept,), (all_of_them,) = masking.index, plain.index
        assert len(kept) == count and (np.diff(kept.astype(np.int64)) > 0).all()
        assert np.isin(kept, all_of_them).all()
    # Expected draws: the rate of the whole store, as the exact ones have it.
    drawn = {cost["name"]: cost["masked_tokens"] for cost in built.costs}["random"]
    assert built.equal["random"].rate == pytest.approx(RATE * count / drawn)


def test_every_strategy_that_the_scores_allow_has_its_masks(config, capsys):
    """Controls are matched to the policy: the first strategy that can use the scores."""
    for name, policy in (("some", "selective"), ("rare", "top")):
        inputs = benchmark.read_inputs(dataclasses.replace(config, scores=name))
        built = benchmark.build_maskings(inputs)
        allowed = [key for key, one in masks.STRATEGIES.items()
                   if name == "some" or "boundary" not in one.needs]
        assert list(built.plain) == [*allowed, "fifth"]
        (followed,) = built.plain[policy].index
        for key, one in masks.STRATEGIES.items():
            if one.budget == "match":
                (index,) = built.plain[key].index
                assert len(index) == len(followed) and not np.array_equal(index, followed), key
        assert not np.array_equal(built.plain["typemean"].index[0], followed)
    shard = TokenStore.open(config.tokens).shards[0]
    low = np.where(np.arange(shard.num_tokens) % 9, -9, 1).astype(np.float16)
    write_array(shard, "low", "scores", low, {"measure": {"boundary": True}})
    inputs = benchmark.read_inputs(dataclasses.replace(config, scores="low"))
    assert "typemean" not in benchmark.build_maskings(inputs).plain  # no mean is above 0
    assert "left out: " in capsys.readouterr().out
    asked = dataclasses.replace(config, scores="low", strategies=["typemean"])
    with pytest.raises(DataError, match="typemean masks no token"):
        benchmark.build_maskings(benchmark.read_inputs(asked))
    without = benchmark.read_inputs(dataclasses.replace(config, scores=""))
    assert without.strategies == [
        key for key, one in masks.STRATEGIES.items() if not {"scores", "match"} & one.needs]


def test_thinning_keeps_positions_in_their_shards():
    index = [np.array([3, 5, 9], np.uint32), np.zeros(0, np.uint32), np.array([0, 2], np.uint32)]
    assert [part.tolist() for part in maskings._thin(index, 5, seed=1)] == [[3, 5, 9], [], [0, 2]]
    thin = maskings._thin(index, 3, seed=1)
    assert sum(map(len, thin)) == 3
    assert all(set(part) <= set(whole) for part, whole in zip(thin, index, strict=True))


def test_a_built_index_is_that_of_the_command(config, prefix, run_here):
    run_here("preprocess/build_masks.py", "--tokens", prefix, "--strategy", "selective",
             "--scores", "some", "--mlm_probability", str(RATE), "--name", "made")
    store = TokenStore.open(prefix)
    builder = maskings.Builder(store, maskings.open_scores(store, "some"), RATE, config.seed)
    masking, _ = builder.build("selective")
    (expected,) = data.prebuilt_masking(store, "made").index
    np.testing.assert_array_equal(masking.index[0], expected)
    for control in (name for name, one in masks.STRATEGIES.items() if one.control):
        run_here("preprocess/build_masks.py", "--tokens", prefix, "--strategy", control,
                 "--match", "made", "--name", control)
        (expected,) = data.prebuilt_masking(store, control).index
        np.testing.assert_array_equal(builder.build(control)[0].index[0], expected, control)


# ----------------------------------------------------------------------------------- baselines


def documents(store: TokenStore) -> list[list[int]]:
    return [list(itertools.chain(*document)) for document in read(store.shards[0])]


@pytest.mark.parametrize("texts_a_map", [2, baselines.TEXTS_A_MAP])
def test_grouped_rows_are_all_texts_end_to_end_in_full_blocks(prefix, texts_a_map, monkeypatch):
    """The remainder of a map is dropped."""
    monkeypatch.setattr(baselines, "TEXTS_A_MAP", texts_a_map)
    store = TokenStore.open(prefix)
    texts = [text.tolist() for text in baselines.draw_texts(store, seed=3)]
    assert sorted(texts) == sorted(documents(store))
    expected = []
    for start in range(0, len(texts), texts_a_map):
        joined = [token for text in texts[start:start + texts_a_map] for token in (2, *text, 3)]
        expected += [joined[at:at + 32] for at in range(0, len(joined) - 31, 32)]
    assert baselines.grouped_rows(store, 32, 10_000, seed=3) == expected


def test_line_rows_are_texts_cut_off(prefix):
    store = TokenStore.open(prefix)
    rows = baselines.line_rows(store, 32, 10_000, seed=3)
    assert sorted(rows) == sorted([2, *text[:30], 3] for text in documents(store))
    assert len(baselines.line_rows(store, 32, 7, seed=3)) == 7


@pytest.mark.parametrize("cut", ["grouped", "lines"])
def test_counts_of_a_batch(prefix, cut):
    store = TokenStore.open(prefix)
    make = baselines.grouped_rows if cut == "grouped" else baselines.line_rows
    rows = make(store, 32, 40, seed=3)
    batches = baselines.make_batches(store, rows, micro_batch_size=40, accumulation_steps=1,
                                     mlm_probability=RATE, seed=0)
    counts = benchmark.count_texts(store, next(batches))
    # All rows are in it, whatever was masked and replaced.
    assert counts.rows == 40 and counts.tokens == sum(map(len, rows))
    assert counts.text_tokens == sum(token > 4 for row in rows for token in row)
    assert counts.slots == 40 * max(map(len, rows))
    # The corruption of the strategies is that of the loops of transformers.
    for percent in ((100, 0, 0), (0, 0, 100), (0, 100, 0)):
        (batch,) = next(baselines.make_batches(
            store, rows, micro_batch_size=40, accumulation_steps=1, mlm_probability=RATE, seed=0,
            corruption=masks.Corruption(*percent)))
        ids, labels = (batch[key][batch["labels"] >= 0] for key in ("input_ids", "labels"))
        assert (ids == store.special_ids["mask"]).float().mean() == pytest.approx(
            percent[0] / 100, abs=0.05)
        assert (ids == labels).float().mean() == pytest.approx(percent[2] / 100, abs=0.1)
    assert counts.masked == pytest.approx(RATE * counts.text_tokens, rel=0.2)


@pytest.fixture
def still_batch(prefix, still_encoder):
    """A model without dropout and a batch of padded lines."""
    store = TokenStore.open(prefix)
    rows = baselines.line_rows(store, 32, 8, seed=0)
    batches = baselines.make_batches(store, rows, micro_batch_size=4, accumulation_steps=2,
                                     mlm_probability=RATE, seed=0)
    return model.load_masked_lm(still_encoder, 0), next(batches)


def test_losses_are_those_of_transformers(still_batch, still_encoder):
    from transformers import BertForMaskedLM

    module, batch = still_batch
    theirs = BertForMaskedLM.from_pretrained(still_encoder)
    for micro_batch in batch:
        expected = theirs(**micro_batch).loss
        expected.backward()
        for loss_of in baselines.LOSSES.values():
            module.zero_grad()
            loss = loss_of(module, micro_batch)
            loss.backward()
            torch.testing.assert_close(loss, expected)
            ours = {name: p.grad for name, p in module.hf.named_parameters()}
            for name, parameter in theirs.named_parameters():
                torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-7)
        theirs.zero_grad()


def test_the_loop_takes_the_step_of_a_plain_trainer(config, still_batch):
    """Mean over micro batches, clipped, AdamW, linear schedule: two steps by hand."""
    module, batch = still_batch
    resolved = benchmark.read_inputs(config).resolved
    resolved.config["gradient_clipping"] = 0.05
    resolved.config["optimizer"]["params"]["lr"] = 1e-2
    twin = model.load_masked_lm(config.model_name_or_path, 0)
    twin.load_state_dict(module.state_dict())
    loop = baselines.TrainerLoop(module, resolved, torch.device("cpu"), total_steps=4)
    twin.eval()
    module.eval()
    decayed = [p for p in twin.parameters() if p.ndim > 1]
    plain = [p for p in twin.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.01},
                                   {"params": plain, "weight_decay": 0.0}], lr=1e-2, eps=1e-8)
    for rate in (1e-2, 0.75e-2):
        loop.step(batch, baselines.gather_loss)
        for group in optimizer.param_groups:
            group["lr"] = rate
        sum(twin.hf(**part).loss / 2 for part in batch).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    for (name, ours), theirs in zip(module.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_time_of_the_heads_alone_leaves_no_gradients(config, still_batch):
    module, batch = still_batch
    inputs = benchmark.read_inputs(config)
    loop = baselines.TrainerLoop(module, inputs.resolved, torch.device("cpu"), 1)
    for name in baselines.LOSSES:
        assert loop.head_seconds(batch, name) > 0
    bare = baselines.BareLoop(mlm.build_model(config, inputs.store), inputs.resolved,
                              torch.device("cpu"))
    assert bare.head_seconds(loader(inputs).step(0)) > 0
    assert all(p.grad is None for m in (module, bare.module) for p in m.parameters())


# ------------------------------------------------------------------------------ bare, and ours


def loader(inputs: benchmark.Inputs) -> data.PackedData:
    (table,) = inputs.tables.values()
    masking = data.drawn_masking(inputs.store, "random", RATE)
    return data.PackedData(inputs.store, table, masking, seed=0, micro_batch_size=4,
                           accumulation_steps=2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bare_step_trains(config, precision):
    inputs = benchmark.read_inputs(config)
    resolved = dataclasses.replace(inputs.resolved, precision=precision)
    resolved.config["optimizer"]["params"]["lr"] = 1e-2
    module, batch = mlm.build_model(inputs.config, inputs.store), loader(inputs).step(0)
    bare = baselines.BareLoop(module, resolved, torch.device("cpu"))
    micro_batch = batch.micro_batches[0].inputs(torch.device("cpu"))
    before = module(**micro_batch)[0].item()
    for _ in range(5):
        bare.step(bare.prepare(batch))
    assert module(**micro_batch)[0].item() < 0.8 * before
    assert {p.dtype for p in module.parameters()} == {baselines.DTYPES[precision]}


def test_one_rank_trains_alike_without_reduction_and_with_fused_adam(config, still_encoder):
    inputs = benchmark.read_inputs(dataclasses.replace(config, model_name_or_path=still_encoder))
    device, batches = engine.start(), loader(inputs)
    fused = inputs.resolved
    assert fused.config["optimizer"]["params"]["fused"] is True
    plain = json.loads(json.dumps(fused.config))
    del plain["optimizer"]["params"]["fused"]

    def train(config: dict, reduces: bool) -> list[torch.Tensor]:
        module = mlm.build_model(inputs.config, inputs.store)
        groups = engine.parameter_groups(module, 0.01)
        built = engine.build_engine(module, groups, dataclasses.replace(fused, config=config))
        assert not built.enable_backward_allreduce
        built.enable_backward_allreduce = reduces
        for number in range(3):
            mlm.train_step(built, batches.step(number), device, want_norm=False)
        return [p.detach().clone() for p in module.parameters()]

    expected = train(fused.config, reduces=True)
    for ours, theirs in zip(train(fused.config, reduces=False), expected, strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(train(plain, reduces=False), expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------ compare


def made_result(tmp_path, name: str, tokens: float, **changes) -> str:
    """A result of one row, as `benchmark.json` holds it."""
    row = {"name": "random", "kind": "strategy", "tokens_per_second": tokens, "mfu_percent": 10.0,
           "masked_tokens_per_second": tokens / 10, "peak_memory_gib": 1.0, "masked_rate": 0.1,
           "step_ms": {"median": 1e5 / tokens, "p20": 0.9e5 / tokens, "p80": 1.1e5 / tokens}}
    result = {"benchmark": "pretrain", "lengths": [{"max_seq_length": 128, "rows": [row]}],
              "mask_costs": [], "options": {"seed": 1, "output_dir": name}, "platform": "x",
              "versions": {"torch": "2"}, "cpus": 2, "commit": None, **changes}
    path = tmp_path / name
    path.write_text(json.dumps(result))
    return str(path)


def test_compare_shows_ratios_and_what_differs(tmp_path, capsys):
    first = made_result(tmp_path, "a.json", 1000)
    second = made_result(tmp_path, "b.json", 1500, versions={"torch": "3"})
    benchmark.main(["--compare", first, second])
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if line.startswith("random"))
    assert line.split()[1:4] == ["1,000", "1,500", "1.500"]
    assert "versions.torch: 2 | 3" in out and "output_dir" not in out
    third = made_result(tmp_path, "c.json", 1050)
    benchmark.main(["--compare", first, third])
    out = capsys.readouterr().out
    assert "1.050*" in out and "are the same" in out


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (None, "no such file"),
        ("[1", "second"),
        ("[]", "second"),
        ('{"rows": []}', "measure again"),
        ({"lengths": []}, "in common"),
        ({"lengths": [{"max_seq_length": 128, "rows": [{"name": "random"}]}]}, "is missing"),
        ({"lengths": 3}, "is missing"),
    ],
)
def test_compare_refuses_what_is_no_result(tmp_path, content, fragment):
    first = made_result(tmp_path, "first.json", 1000)
    second = str(tmp_path / "second.json")
    if isinstance(content, dict):
        second = made_result(tmp_path, "second.json", 1000, **content)
    elif content is not None:
        (tmp_path / "second.json").write_text(content)
    with pytest.raises((ConfigError, DataError), match=fragment):
        tables.compare(first, second)


# ------------------------------------------------------------------------------------- passes


def test_passes_are_ways_to_the_same_loss(config, prefix):
    inputs = benchmark.read_inputs(dataclasses.replace(config, max_seq_length=64))
    module = mlm.build_model(config, inputs.store).eval()
    (table,) = inputs.tables.values()
    loader = data.PackedData(inputs.store, table, data.drawn_masking(inputs.store, "random", RATE),
                             seed=1, micro_batch_size=1)
    numbers = range(table.num_rows)
    alone = next(
        batch for batch in (loader.step(n).micro_batches[0] for n in numbers)
        if batch.document_ids.max() == 0 and batch.num_masked > 3  # nothing to keep apart
    )
    losses, gradients = {}, {}
    passes = baselines.make_passes(module, alone, torch.device("cpu"))
    for name, call in passes.items():
        module.zero_grad()
        loss = call()
        loss.backward()
        losses[name] = loss.item()
        gradients[name] = {key: p.grad for key, p in module.named_parameters()}
    assert tuple(losses) == baselines.PASSES
    assert list(losses.values()) == pytest.approx([losses[baselines.PASSES[0]]] * 4, rel=1e-5)
    for found in gradients.values():
        torch.testing.assert_close(found, gradients[baselines.PASSES[0]], rtol=1e-4, atol=1e-6)


def test_passes_and_fewer_rows_on_request(config, run_here, tmp_path, capsys):
    config = dataclasses.replace(
        config, strategies=["whole_word"], mask_indices=[], baselines=["none"], equal_masks=False,
        rounds=1, passes=True, profile=True)
    run_here("train/benchmark.py", *flags(config))
    out = capsys.readouterr().out
    saved = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    rows = {row["name"]: row for row in saved["lengths"][0]["rows"]}
    assert list(rows) == ["random", "whole_word", "bare", *baselines.PASSES]
    assert rows["pass-transformers"]["over_full"] == {"median": 1.0, "p20": 1.0, "p80": 1.0}
    assert all(rows[name]["counted_steps"] == 2 and name in out for name in baselines.PASSES)


# ------------------------------------------------------------------------------- kinds of work


@pytest.mark.parametrize(("name", "kind"), [
    ("sm90_xmma_gemm_f16f16_f16f32_f32", "products"), ("nvjet_hsh_256x128_64x4", "products"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
    ("triton_per_fused_add_native_dropout_native_layer_norm_2", "norms"),
    ("_cross_entropy_kernel", "head"), ("Memcpy HtoD (Pinned -> Device)", "copies"),
    ("void multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>", "optimizer"),
    ("void vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>", "elementwise"),
    ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
])
def test_kernels_are_told_apart_by_name(name, kind):
    assert kinds.kind_of(name) == kind


def test_what_is_left_of_a_step_are_gaps():
    found = kinds.sum_up({"aten::mm": 0.2, "aten::gelu": 0.1}, wall=0.4, num_steps=2)
    assert found["step"] == pytest.approx(200) and found["gaps"] == pytest.approx(50)
    assert found["products"] == pytest.approx(100) and found["elementwise"] == pytest.approx(50)
    assert set(found) == {*kinds.KINDS, "gaps", "step"}


def test_a_profile_sees_the_work():
    one = torch.randn(300, 300)
    found = kinds.profile(lambda: (one @ one).clone(), 3)
    assert found["products"] > 0 and found["copies"] > 0 and found["step"] > 0
