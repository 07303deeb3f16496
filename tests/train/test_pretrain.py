"""The pre-training command: one loss everywhere, resume, exports, refusals."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

import csrc
from preprocess.errors import ConfigError, DataError, NonFiniteError
from preprocess.store import TokenStore, write_array
from tests.support.launch import free_port, launch_environment
from tests.support.runs import STEPS, arguments, logged, pretrained, weights, write_ds_config
from train import data, pretrain
from train import engine as ds
from train.model import PackedMaskedLM
from train.run_dir import metrics
from train.run_dir.hf_folder import open_weights, read_stages


@pytest.fixture(scope="session")
def plain_run(tmp_path_factory, reviews_store, still_encoder) -> Path:
    """Without dropout, ZeRO 0, one rank, one micro batch: what the other set-ups must equal."""
    return pretrained(
        reviews_store, still_encoder, tmp_path_factory.mktemp("plain") / "run",
        save_steps=2, export_steps=[2], eval_steps=2,
    )


def test_the_terminal_shows_the_logged_mean(tmp_path, reviews_store, still_encoder, capsys):
    run = pretrained(reviews_store, still_encoder, tmp_path / "run", logging_steps=2)
    lines = re.findall(r"pretrain: step (\d)/4  loss ([\d.]+) ", capsys.readouterr().out)
    assert lines == [(str(2 * i), f"{loss:.3f}") for i, loss in
                     enumerate(logged(run, metrics.TRAIN_LOSS), start=1)] and len(lines) == 2


def test_loss_falls_and_is_written(plain_run):
    losses = logged(plain_run, metrics.TRAIN_LOSS)
    assert len(losses) == STEPS
    held_out = logged(plain_run, metrics.EVAL_LOSS)
    assert len(held_out) == 3 and held_out[-1] < held_out[0]  # steps 0, 2, 4
    assert all(0 < mfu < 1 for mfu in logged(plain_run, metrics.MFU))
    assert "[MASK" not in logged(plain_run, metrics.EXAMPLE)[0]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(plain_run)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"pretrain_{tag}" for tag in (
        metrics.TRAIN_LOSS, metrics.GRAD_NORM, metrics.TOKENS_PER_SECOND)} <= tags
    shown = [(event.step, event.value) for event in events.Scalars("pretrain_train/loss")]
    np.testing.assert_allclose(shown, list(enumerate(losses, start=1)), rtol=1e-6)
    texts = events.Tensors("pretrain_eval/example/text_summary")
    assert [event.step for event in texts] == [0, 2, 4]
    for name in ("config.resolved.yaml", "ds_config.resolved.json", "env.json", "latest"):
        assert (plain_run / name).is_file()
    assert yaml.safe_load((plain_run / "config.resolved.yaml").read_text())["max_steps"] == STEPS


def test_logged_means_are_over_masked_tokens(tmp_path, reviews_store, still_encoder):
    """Steps have none, one or a few masked tokens; a window counts each token once."""
    options = {"train_batch_size": 2, "mlm_probability": 0.01, "max_steps": 14,
               "learning_rate": 1e-9, "eval_fraction": 0}
    tags = (metrics.TRAIN_LOSS, metrics.MASKED_ACCURACY, metrics.MASKED_FRACTION, metrics.EPOCH)
    runs = {every: pretrained(reviews_store, still_encoder, tmp_path / str(every),
                              logging_steps=every, **options) for every in (1, 7)}
    lines = {every: [json.loads(line) for line in open(run / "metrics.jsonl")]
             for every, run in runs.items()}
    each, windows = ([line for line in lines[every] if tags[2] in line] for every in (1, 7))
    # An independent count of the masks, of this very order.
    store = TokenStore.open(reviews_store)
    rows, _ = data.row_tables(store, 32, 0)
    batches = data.PackedData(store, rows, data.drawn_masking(store, "random", 0.01), seed=42,
                              micro_batch_size=2)
    steps = [batches.step(i) for i in range(14)]
    masked = [step.micro_batches[0].num_masked for step in steps]
    assert 0 in masked and len(set(masked)) > 2
    assert [tags[0] in line and tags[1] in line for line in each] == [n > 0 for n in masked]
    assert len(windows) == 2
    model = AutoModelForMaskedLM.from_pretrained(still_encoder).eval()
    for number, window in enumerate(windows):
        here = slice(7 * number, 7 * number + 7)
        losses, hits = [], 0
        for step in steps[here]:
            batch = step.micro_batches[0]
            with torch.no_grad():
                loss, right = PackedMaskedLM(model, {}, False)(**batch.inputs(torch.device("cpu")))
            losses.append(float(loss))
            hits += int(right)
        total = sum(masked[here])
        assert window[tags[0]] == pytest.approx(sum(losses) / total, rel=1e-4)
        assert window[tags[1]] == pytest.approx(hits / total)
        assert window[tags[2]] == pytest.approx(total / sum(s.step_tokens for s in steps[here]))
        assert window[tags[3]] == pytest.approx(2 * here.stop / rows.num_rows)
        for tag in tags[:2]:
            assert window[tag] == pytest.approx(sum(
                n * line[tag] for n, line in zip(masked[here], each[here], strict=True) if n
            ) / total, rel=1e-4, abs=1e-9)


def test_logged_figures_by_hand():
    """Two seconds over 1000 tokens, 100 of them masked, of which 25 are guessed right."""
    logged_at, log = {}, object.__new__(pretrain._Log)
    log._inputs = SimpleNamespace(batches=SimpleNamespace(table=SimpleNamespace(num_rows=50)),
                                  resolved=SimpleNamespace(train_batch_size=5))
    log._flops = SimpleNamespace(of=lambda tokens, masked: 10 * tokens + 30 * masked)
    log._peak, log.sums = 26_000, Counter(
        loss=230.0, right=25, tokens=1000, masked=100, seconds=2.0, waited=0.5)
    log._engine = SimpleNamespace(skipped_steps=3, optimizer=SimpleNamespace(cur_scale=8.0))
    log.writer = SimpleNamespace(scalars=lambda step, values: logged_at.update({step: values}))
    log.window(pretrain.Totals(step=4), 1e-3, 0.7)
    log.sums.update(tokens=10, seconds=1.0)
    log.window(pretrain.Totals(step=5), 1e-3, None)
    assert logged_at[4].pop(metrics.MEMORY) > 0
    assert logged_at[4] == pytest.approx({
        metrics.TRAIN_LOSS: 2.3, metrics.MASKED_ACCURACY: 0.25, metrics.MASKED_FRACTION: 0.1,
        metrics.LEARNING_RATE: 1e-3, metrics.GRAD_NORM: 0.7, metrics.EPOCH: 0.4,
        metrics.TOKENS_PER_SECOND: 500, metrics.MASKED_TOKENS_PER_SECOND: 50, metrics.MFU: 0.25,
        metrics.DATA_WAIT_FRACTION: 0.25, metrics.SKIPPED_STEPS: 3, metrics.LOSS_SCALE: 8.0})
    assert not {metrics.TRAIN_LOSS, metrics.MASKED_ACCURACY, metrics.GRAD_NORM} & set(logged_at[5])
    assert logged_at[5][metrics.MASKED_FRACTION] == 0


DAMAGES = {
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "missing": lambda file: file.unlink(),
    "changed": lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\1"),
}


@pytest.mark.parametrize("name, damage", [
    *(("model.safetensors", damage) for damage in DAMAGES), ("config.json", "missing"),
    ("config.json", "cut"), ("lineage.json", "empty"), ("lineage.json", "missing"),
    ("tokenizer.json", "missing"),
])
def test_finished_means_there(name, damage, plain_run, tmp_path, reviews_store, still_encoder,
                              capsys):
    options = {"save_steps": 2, "export_steps": [2], "eval_steps": 2}
    shutil.copytree(plain_run, tmp_path / "run")
    file = tmp_path / "run" / "hf" / name
    before = weights(plain_run)
    DAMAGES[damage](file)
    capsys.readouterr()
    pretrained(reviews_store, still_encoder, tmp_path / "run", **options)
    out = capsys.readouterr().out
    assert name in out and "goes on from the checkpoint" in out and "finished already" not in out
    torch.testing.assert_close(weights(tmp_path / "run"), before, atol=0, rtol=0)
    pretrained(reviews_store, still_encoder, tmp_path / "run", **options)
    assert "finished already" in capsys.readouterr().out
    DAMAGES[damage](file)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(DataError, match=rf"{name}.* no checkpoint .*; give another --output_dir"):
        pretrained(reviews_store, still_encoder, tmp_path / "run", **options)


def test_a_damaged_export_in_passing_is_not_finished(plain_run, tmp_path, reviews_store,
                                                     still_encoder):
    shutil.copytree(plain_run, tmp_path / "run")
    DAMAGES["cut"](tmp_path / "run" / "hf_step_2" / "model.safetensors")
    with pytest.raises(DataError, match="hf_step_2/model.safetensors.* give another --output_dir"):
        pretrained(reviews_store, still_encoder, tmp_path / "run", save_steps=2,
                   export_steps=[2], eval_steps=2)


def test_warm_up_is_linear_and_decays(plain_run):
    rates = logged(plain_run, metrics.LEARNING_RATE)
    # Two steps up, then down towards 0 at step 5, which is not taken.
    np.testing.assert_allclose(rates, np.array([1 / 2, 1, 2 / 3, 1 / 3]) * 5e-3, rtol=1e-6)


def test_export_loads_with_pooler_and_lineage(plain_run, still_encoder, reviews_store):
    model = AutoModelForMaskedLM.from_pretrained(plain_run / "hf")
    assert model.config.vocab_size == TokenStore.open(reviews_store).vocab_size
    before = load_file(Path(still_encoder) / "model.safetensors")
    after = weights(plain_run)
    pooler = "bert.pooler.dense.weight"
    assert torch.equal(before[pooler], after[pooler])
    classifier = AutoModelForSequenceClassification.from_pretrained(plain_run / "hf")
    assert torch.equal(classifier.bert.pooler.dense.weight, before[pooler])
    (stage,) = read_stages(plain_run / "hf")
    totals = stage["totals"]
    assert totals["steps"] == STEPS and totals["masked_tokens"] > 0 and totals["flops"] > 0
    assert stage["parent"]["hf_digest"] == open_weights(still_encoder).hf_digest
    assert stage["identity"]["inputs"]["weights"] == stage["parent"]["hf_digest"]
    assert read_stages(plain_run / "hf_step_2")[0]["totals"]["steps"] == 2
    halfway = load_file(plain_run / "hf_step_2" / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(halfway[name], after[name])
    assert not torch.equal(before[name], after[name])


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"gradient_checkpointing": True},
        {"deepspeed_config": "ds_configs/zero2_fp16_offload.json"},
        pytest.param({"torch_compile": True}, marks=pytest.mark.slow),
    ],
    ids=lambda options: next(iter(options)),
)
def test_same_loss_another_way(options, plain_run, tmp_path, reviews_store, still_encoder, capsys):
    if "deepspeed_config" in options:
        options = {"deepspeed_config": ds.DS_CONFIGS / "zero2_fp16_offload.json"}
    run_dir = pretrained(reviews_store, still_encoder, tmp_path / "run", **options)
    np.testing.assert_allclose(
        logged(run_dir, metrics.TRAIN_LOSS), logged(plain_run, metrics.TRAIN_LOSS), rtol=1e-5
    )
    if "deepspeed_config" in options:
        assert "running in fp32" in capsys.readouterr().out


@pytest.mark.parametrize("stage", [0, 1])
def test_clipping_reaches_the_update(stage, tmp_path, reviews_store, still_encoder):
    """Published bug B10: the half-precision copies were clipped, not what the optimizer steps."""
    run_dir = pretrained(
        reviews_store, still_encoder, tmp_path / "run", max_steps=1, max_grad_norm=1e-12,
        weight_decay=0.0, deepspeed_config=write_ds_config(tmp_path, stage),
    )
    before, after = load_file(Path(still_encoder) / "model.safetensors"), weights(run_dir)
    # Adam would hide a smaller gradient, but for its epsilon of 1e-6, which now is the larger.
    moved = max(float((after[n] - before[n]).abs().max()) for n in after if n in before)
    assert moved < 1e-5
    assert logged(run_dir, metrics.GRAD_NORM)[0] > 0.01  # the norm before clipping is logged


def test_checkpointing_recomputes(tmp_path, reviews_store, still_encoder, monkeypatch):
    """Published bug B11: the flag never reached the encoder."""
    from transformers.models.bert.modeling_bert import BertIntermediate

    calls = []
    plain = BertIntermediate.forward

    def counted(self, *words, **names):
        calls.append(self.training)
        return plain(self, *words, **names)

    monkeypatch.setattr(BertIntermediate, "forward", counted)
    seen = []
    for checkpointing in (None, True):
        calls.clear()
        pretrained(
            reviews_store, still_encoder, tmp_path / f"run{checkpointing}", max_steps=1,
            gradient_checkpointing=checkpointing,
        )
        seen.append(sum(calls))
    # The first of two layers once more in the backward pass. The last one, which keeps the rows of
    # masked positions only, is not computed again, but by older transformers (5.17).
    assert seen in ([2, 3], [2, 4])


def test_a_run_goes_on_with_the_same_weights_elsewhere(
    plain_run, tmp_path, reviews_store, still_encoder
):
    """The weights count, not their folder. Published bug B14: caches were keyed by folder."""
    run_dir, moved = tmp_path / "run", tmp_path / "encoder"
    shutil.copytree(plain_run, run_dir, ignore=shutil.ignore_patterns("hf"))
    shutil.copytree(still_encoder, moved)
    pretrained(reviews_store, str(moved), run_dir, save_steps=2, export_steps=[2], eval_steps=2)
    before, after = weights(plain_run), weights(run_dir)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_head_only_steps_leave_the_encoder(tmp_path, reviews_store, still_encoder):
    run_dir = pretrained(
        reviews_store, still_encoder, tmp_path / "run", max_steps=3, head_only_steps=3,
        head_learning_rate=1e-2,
    )
    before, after = load_file(Path(still_encoder) / "model.safetensors"), weights(run_dir)
    moved = {
        name for name in after if name in before and not torch.equal(before[name], after[name])
    }
    assert moved and all(name.startswith("cls.") for name in moved)


def test_headless_checkpoint_gets_a_fresh_head(tmp_path, reviews_store, still_encoder, capsys):
    from transformers import AutoModel

    folder = tmp_path / "headless"
    shutil.copytree(still_encoder, folder)
    AutoModel.from_pretrained(still_encoder).save_pretrained(folder)
    run_dir = pretrained(
        reviews_store, str(folder), tmp_path / "run", max_steps=2, head_only_steps=2
    )
    said = capsys.readouterr().out
    assert "has no MLM head: a fresh one is drawn from seed 42" in said
    # The output bias starts at the log-frequencies, so the loss starts near the unigram entropy.
    start = logged(run_dir, metrics.EVAL_LOSS)[0]
    floor = float(said.split("(token frequencies) it would be ")[1].split()[0])
    assert abs(start - floor) < 0.3


def test_prebuilt_index_and_the_same_evaluation(tmp_path, reviews_store, still_encoder, plain_run):
    folder = tmp_path / "store"
    shutil.copytree(Path(reviews_store).parent, folder)
    prefix = str(folder / Path(reviews_store).name)
    store = TokenStore.open(prefix)
    positions = np.arange(0, store.num_tokens, 9, dtype=np.uint32)
    options = {"strategy": "selective"}
    write_array(store.shards[0], "every9", "mask", positions, {"options": options})
    run_dir = pretrained(
        prefix, still_encoder, tmp_path / "run", mask_index="every9", eval_mask_index=["every9"]
    )
    fractions = logged(run_dir, metrics.MASKED_FRACTION)
    assert all(0.05 < fraction < 0.12 for fraction in fractions)
    # Before the first step every arm has the same held-out loss: same masks, same corruption.
    assert logged(run_dir, metrics.EVAL_LOSS)[0] == logged(plain_run, metrics.EVAL_LOSS)[0]
    assert logged(run_dir, f"{metrics.EVAL_LOSS}/every9")
    identity = read_stages(run_dir / "hf")[-1]["identity"]
    assert identity["choice"]["masking"] == "selective" and identity["inputs"]["mask_index"]


def test_a_schedule_and_a_corruption_are_recorded_and_change_no_evaluation(
    tmp_path, reviews_store, still_encoder, plain_run, capsys
):
    options = {"mlm_probability": "0.60:0.1", "corruption": "100,0,0"}
    run_dir = pretrained(reviews_store, still_encoder, tmp_path / "run", **options)
    said = capsys.readouterr().out
    assert "random, at 0.6:0.1 of the tokens, corrupted 100/0/0 (held-out text, as in every run, " \
        "80/10/10)" in said
    fractions = logged(run_dir, metrics.MASKED_FRACTION)
    whole = 0.6 / fractions[0]  # of the tokens, [CLS] and [SEP] are no candidates
    assert 1 < whole < 1.3
    np.testing.assert_allclose(np.array(fractions) * whole, np.linspace(0.6, 0.1, STEPS), atol=0.03)
    assert logged(run_dir, metrics.EVAL_LOSS)[0] == logged(plain_run, metrics.EVAL_LOSS)[0]
    choice = read_stages(run_dir / "hf")[-1]["identity"]["choice"]
    assert choice["rate"] == "0.6:0.1" and choice["corruption"] == [1.0, 0.0, 0.0]
    # The same, typed otherwise; and a longer run, whose steps have other rates.
    pretrained(reviews_store, still_encoder, tmp_path / "run",
               **{**options, "mlm_probability": "0.6:0.10"})
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=f"--max_steps {STEPS}, and this run has 9"):
        pretrained(reviews_store, still_encoder, tmp_path / "run", **options, max_steps=9)


def test_a_fixed_index_that_is_repeated_often_is_warned_of(
    tmp_path, reviews_store, still_encoder, capsys
):
    prefix = str(shutil.copytree(Path(reviews_store).parent, tmp_path / "store")
                 / Path(reviews_store).name)
    store = TokenStore.open(prefix)
    positions = np.arange(0, store.num_tokens, 9, dtype=np.uint32)
    for name, epochs, epoch in (("fixed", 1, 0), ("many", 2, 0), ("many-epoch1", 2, 1)):
        write_array(store.shards[0], name, "mask", positions + epoch,
                    {"options": {}, "epochs": epochs, "epoch": epoch})
    rows = data.row_tables(store, 32, 0.2)[0].num_rows

    def warned(name: str, epochs: float, **options: str) -> str:
        source = options or {"mask_index": name}
        pretrained(prefix, still_encoder, tmp_path / "run", dry_run=True,
                   max_steps=int(epochs * rows / 8), **source)
        lines = [line for line in capsys.readouterr().out.splitlines() if "same masks" in line]
        return lines[0] if lines else ""

    assert not warned("fixed", 2.9) and not warned("many", 5.9)
    assert not warned("", 9, masking="random")
    found = warned("fixed", 7.3)
    assert "mask index fixed has the same masks 7.3 times" in found
    assert "build_masks.py --epochs 8" in found and "--max_steps" in found
    assert "index many of 2 epochs has the same masks 3.6 times" in warned("many", 7.3)


def test_from_scratch_and_no_steps_only_export(tmp_path, reviews_store, still_encoder):
    run_dir = pretrained(
        reviews_store, still_encoder, tmp_path / "run", max_steps=0, from_scratch=True
    )
    before, after = load_file(Path(still_encoder) / "model.safetensors"), weights(run_dir)
    name = "bert.encoder.layer.0.output.dense.weight"
    assert before[name].shape == after[name].shape and not torch.equal(before[name], after[name])
    assert "bert.pooler.dense.weight" not in after


@pytest.mark.parametrize(
    ("max_steps", "message"),
    [(0, "after step 0; .* give another checkpoint"), (2, "after step 2; lower --learning_rate")],
)
def test_non_finite_held_out_loss_is_not_exported(
    tmp_path, reviews_store, still_encoder, monkeypatch, max_steps, message
):
    plain = csrc.masked_lm_loss

    def broken_in_the_end(hidden, *arguments):
        loss, hits = plain(hidden, *arguments)
        ending = not hidden.requires_grad and engines[-1].global_steps == max_steps
        return loss * (float("inf") if ending else 1.0), hits

    engines, build = [], ds.build_engine
    monkeypatch.setattr(
        ds, "build_engine", lambda *words: engines.append(build(*words)) or engines[-1]
    )
    monkeypatch.setattr(csrc, "masked_lm_loss", broken_in_the_end)
    with pytest.raises(NonFiniteError, match=f"held-out loss is inf {message}"):
        pretrained(reviews_store, still_encoder, tmp_path / "run", max_steps=max_steps)
    assert not (tmp_path / "run" / "hf").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masking": "selective"}, "build_masks.py"),
        ({"masking": "randm"}, "known: random, whole_word"),
        ({"mask_index": "absent"}, "absent"),
        ({"masking": "random", "mask_index": "x"}, "exclude each other"),
        ({"mlm_probability": 1.5}, "in \\(0, 1\\)"),
        ({"mlm_probability": "0.3:1.5"}, "a first and a last one, as 0.30:0.15"),
        ({"mlm_probability": "0.3:0.2:0.1"}, "a first and a last one, as 0.30:0.15"),
        ({"mlm_probability": "much"}, "--mlm_probability much: must be in \\(0, 1\\)"),
        ({"mlm_probability": "0.3:0.1", "mask_index": "x"}, "x, whose rate was fixed when build_"),
        ({"corruption": "80,10"}, "three percentages with the sum 100, as 80,10,10"),
        ({"corruption": "80,30,-10"}, "three percentages with the sum 100"),
        ({"corruption": "0.8,0.1,0.1"}, "three percentages with the sum 100"),
        ({"max_seq_length": 128}, "at most 64"),
        ({"tokens": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"model_name_or_path": "./nowhere"}, "no such folder"),
        ({"model_config": "bert-tiny"}, "exactly one"),
        ({"learning_rate": -1.0}, "positive"),
        ({"deepspeed_config": "nowhere.json"}, "no such file"),
        ({"gradient_accumulation_steps": 3}, "batch sizes do not fit"),
        ({"export_steps": [9]}, "between 1 and"),
        ({"head_only_steps": 1, "max_steps": 0}, "--head_only_steps"),
        ({"eval_fraction": 0.7}, "eval_fraction"),
        ({"output_dir": "tests"}, "not a run of ours"),
    ],
)
def test_bad_input_is_said_in_a_sentence(options, message, tmp_path, reviews_store, still_encoder):
    with pytest.raises((ConfigError, DataError), match=message) as error:
        pretrained(reviews_store, still_encoder, options.pop("output_dir", tmp_path / "run"),
                   **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_dry_run_writes_nothing(tmp_path, reviews_store, still_encoder, capsys):
    pretrained(reviews_store, still_encoder, tmp_path / "run", dry_run=True)
    said = capsys.readouterr().out
    assert "rows per step" in said and "memory per rank" in said
    assert not (tmp_path / "run").exists()


DRIVER = """
import json, sys
from train import engine, pretrain
from train.config import PretrainConfig, parse
for words in json.load(open(sys.argv[-1])):
    pretrain.run(parse(PretrainConfig, words))
engine.finish()
"""


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory, reviews_store, still_encoder, run_command_line) -> list[Path]:
    """Run directories of ZeRO 0 to 3 on two ranks of one node, in one launch."""
    folder = tmp_path_factory.mktemp("ranks")
    runs = [
        arguments(
            reviews_store, still_encoder, folder / f"zero{stage}",
            # Nothing is small enough to stay whole: borrowed parameters must be gathered.
            deepspeed_config=write_ds_config(
                folder, stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
            ),
            per_device_train_batch_size=2 if stage % 2 else 4,
        )
        for stage in range(4)
    ]
    (folder / "driver.py").write_text(DRIVER)
    (folder / "runs.json").write_text(json.dumps(runs))
    run_command_line(folder / "driver.py", folder / "runs.json", ranks=2)
    return [folder / f"zero{stage}" for stage in range(4)]


@pytest.mark.slow
def test_two_ranks_give_the_same_loss(plain_run, two_ranks):
    """ZeRO 0 to 3: the global mean does not depend on the number of ranks."""
    expected = weights(plain_run)
    for run_dir in two_ranks:
        losses = logged(run_dir, metrics.TRAIN_LOSS)
        np.testing.assert_allclose(losses[0], logged(plain_run, metrics.TRAIN_LOSS)[0], rtol=1e-6)
        np.testing.assert_allclose(losses, logged(plain_run, metrics.TRAIN_LOSS), rtol=1e-5)
        np.testing.assert_allclose(
            logged(run_dir, metrics.GRAD_NORM), logged(plain_run, metrics.GRAD_NORM), rtol=1e-4
        )
        np.testing.assert_allclose(
            logged(run_dir, metrics.EVAL_LOSS)[-1], logged(plain_run, metrics.EVAL_LOSS)[-1],
            rtol=1e-5,
        )
        for name, value in weights(run_dir).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)


# --------------------------------------------------------------------------- two nodes


# `srun` and `scontrol` of a job on two nodes of one task each.
SRUN = """#!/bin/bash
for node in 0 1; do SLURM_NODEID=$node "$@" & tasks="$tasks $!"; done
code=0
for task in $tasks; do wait $task || code=$?; done
exit $code
"""
SCONTROL = """#!/bin/sh
printf '127.0.0.1\\n127.0.0.2\\n'
"""


def readme_block(*parts: str) -> str:
    """Return the one block of commands in train/README.md that has all these parts."""
    readme = Path(__file__).resolve().parents[2] / "train" / "README.md"
    blocks = re.findall(r"```bash\n(.*?)```", readme.read_text(), re.DOTALL)
    (found,) = [block for block in blocks if all(part in block for part in parts)]
    return found


def on_two_nodes(recipe: str, flags: list[str], folder: Path) -> subprocess.CompletedProcess:
    """Type a recipe of train/README.md on two nodes, one rank on each, with these flags."""
    port = str(free_port())
    hostfile = folder / "hostfile"
    hostfile.write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    block = readme_block(recipe, "train/pretrain.py")
    for shown, here in (
        (r"train/pretrain\.py [^']*", f"train/pretrain.py {shlex.join(flags)}\n"),
        (r"--hostfile hostfile", f"--hostfile {hostfile}"), (r"\bnode1\b", "127.0.0.1"),
        (r"\b29500\b", port), (r"nproc_per_node 8", "nproc_per_node 1"),
    ):
        block = re.sub(shown, lambda _, here=here: here, block)
    if "--no_ssh" in block:  # to be typed on every node, with its own number
        block = f"({block.replace('--node_rank 0', '--node_rank 1')}) &\n{block}\nwait $!\n"
    programs = {
        "deepspeed": f'#!/bin/sh\nexec {sys.executable} -m deepspeed.launcher.runner "$@"\n',
        "torchrun": f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n',
        "srun": SRUN, "scontrol": SCONTROL,
    }
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = launch_environment()
    environment |= {"PATH": f"{folder}{os.pathsep}{environment['PATH']}", "SLURM_NNODES": "2",
                    "SLURM_JOB_NODELIST": "127.0.0.[1-2]"}
    return subprocess.run(
        ["bash", "-e", "-c", block], cwd=Path(__file__).resolve().parents[2], env=environment,
        text=True, capture_output=True, timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    # The second launch, for `torchrun`, is left to the long campaign.
    "recipe", ["--no_ssh", pytest.param("srun bash", marks=pytest.mark.faults)]
)
def test_two_nodes_give_the_losses_of_one(recipe, tmp_path, two_ranks, reviews_store,
                                          still_encoder):
    """Two launchers, each with one rank and an address of its own."""
    flags = arguments(
        reviews_store, still_encoder, tmp_path / "run", per_device_train_batch_size=2,
        deepspeed_config=write_ds_config(tmp_path, 1),
    )
    done = on_two_nodes(recipe, flags, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "env.json").read_text())["world_size"] == 2
    for tag in (metrics.TRAIN_LOSS, metrics.EVAL_LOSS):
        assert logged(tmp_path / "run", tag) == logged(two_ranks[1], tag)
    assert all(torch.equal(value, weights(two_ranks[1])[name])
               for name, value in weights(tmp_path / "run").items())
