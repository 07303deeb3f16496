"""Scoring a store: every token once, alone in its sentence, whatever the batches and ranks."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from preprocess import build_masks
from preprocess.errors import ConfigError, DataError
from preprocess.files import seal
from preprocess.masking import STRATEGIES, Sequences, open_arrays
from preprocess.progress import Progress
from preprocess.store import (
    TokenStore,
    array_path,
    lock_array,
    open_array,
)
from tests.support.stores import write
from train import engine, score_tokens
from train.run_dir.hf_folder import open_weights
from train.stages import scoring
from train.stages.inference import Runner, one_by_one, special_template
from train.stages.measures import MEASURES


def tiny_config(tokenizer):
    return BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, initializer_range=0.5, num_labels=2,
    )


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SECOND = ("--shard_index", "1", "--num_shards", "2")


@pytest.fixture(scope="module")
def scorer(tmp_path_factory, tiny_tokenizer):
    """An untrained token classifier in an hf folder: its path and its tokenizer."""
    torch.manual_seed(0)
    model = BertForTokenClassification(tiny_config(tiny_tokenizer))
    return save(tmp_path_factory.mktemp("scorer"), model, tiny_tokenizer), tiny_tokenizer


@pytest.fixture
def store(tmp_path, scorer):
    """Two shards; sentences of no, one and many tokens, some beyond the 14 that fit."""
    rng = np.random.default_rng(1)
    lengths = [[[3, 1, 0], [30]], [[14, 15], [], [7, 2, 2, 5, 11]]]
    for index, documents in enumerate(lengths):
        sentences = [[rng.integers(5, 35, n) for n in document] for document in documents]
        write(tmp_path / "P", sentences, (index, 2), scorer[1])
    return TokenStore.open(tmp_path / "P")


def run(store, scorer, *options, name="mr"):
    score_tokens.main([
        "--model_name_or_path", str(scorer[0]), "--tokens", store.prefix, "--name", name,
        "--max_seq_length", "16", "--dtype", "fp32", *options,
    ])


def score_alone(model, tokens, offsets, limit):
    """The twin: one window at a time, its slots counted by hand."""
    scores = []
    for start, end in zip(offsets[:-1], offsets[1:], strict=True):
        count = max(1, -(-(end - start) // limit))
        bounds = [start + (end - start) * k // count for k in range(count + 1)]
        for a, b in zip(bounds[:-1], bounds[1:], strict=True):
            ids = torch.tensor([[2, *tokens[a:b].tolist(), 3]])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, 1:-1]
            scores += (logits[:, 1] - logits[:, 0]).tolist()
    return np.array(scores)


@pytest.mark.parametrize("batch_tokens", [16, 40, 8192])
def test_equals_one_sentence_at_a_time(store, scorer, no_process_group, batch_tokens, monkeypatch):
    monkeypatch.setattr(scoring, "BLOCK_TOKENS", {"cpu": 20})
    run(store, scorer, "--batch_tokens", str(batch_tokens))
    model = BertForTokenClassification.from_pretrained(scorer[0]).eval()
    for shard in store.shards:
        scores, info = open_array(shard, "mr", "scores")
        alone = score_alone(model, shard.tokens, shard.sequence_offsets, 14)
        np.testing.assert_allclose(scores.astype(float), alone, rtol=1e-3, atol=1e-3)
        assert scores.std() > 0.1, "an untrained scorer that answers the same to all tests nothing"
        assert info["identity"]["inputs"]["weights"] == open_weights(str(scorer[0])).hf_digest


def test_ranks_share_the_work(store, scorer, monkeypatch):
    shard = store.shards[1]
    model = BertForTokenClassification.from_pretrained(scorer[0])

    def score(rank, world_size, gather):
        monkeypatch.setattr(engine, "ranks", lambda: engine.Ranks(rank, world_size, rank))
        monkeypatch.setattr(engine, "gather_objects", gather)
        template = special_template(scorer[1], pair=False)
        runner = Runner(model, template, scorer[1], torch.device("cpu"), 32)
        blocks = scoring.score_shard(shard, runner, 14, Progress(99), 1000)
        return np.concatenate(list(blocks)), runner.counts["passes"]

    whole, num_passes = score(0, 1, lambda mine: [mine])
    parts = []
    share_passes = [
        score(rank, 3, lambda mine: parts.append(mine) or [mine])[1] for rank in range(3)
    ]
    assert sum(share_passes) == num_passes and min(share_passes) > 0
    together, _ = score(0, 3, lambda mine: parts)
    assert np.array_equal(together, whole), "the same batches, so the same bits"


def test_whole_shards_are_skipped_and_others_refused(store, scorer, no_process_group, capsys):
    run(store, scorer)
    paths = [array_path(shard, "mr", "scores") for shard in store.shards]
    before = [path.stat().st_mtime_ns for path in paths]
    paths[1].with_suffix(".json").unlink()
    run(store, scorer)
    after = [path.stat().st_mtime_ns for path in paths]
    assert after[0] == before[0] and after[1] != before[1]
    assert "1 of 2 shards are scored already" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--max_seq_length 16, .* has 12; .*--overwrite"):
        run(store, scorer, "--max_seq_length", "12")
    run(store, scorer, "--max_seq_length", "12", "--overwrite")
    info = json.loads(paths[0].with_suffix(".json").read_text())
    assert info["identity"]["train"]["max_seq_length"] == 12


def test_one_writer_of_scores(store, scorer, no_process_group):
    with lock_array(store, "mr", "scores"):
        with pytest.raises(ConfigError, match=r"P\S*\.mr\.scores\.lock: another process"):
            run(store, scorer)
        run(store, scorer, "--dry_run")  # writes nothing
        with pytest.raises(DataError, match="score_tokens.py or .* makes it"):
            open_array(store.shards[0], "mr", "scores")
        run(store, scorer, name="other")
    with lock_array(store, "mr", "scores", 1):
        for options in (SECOND, ()):
            with pytest.raises(ConfigError, match=r"00001-of-00002\.mr\.scores\.lock: another"):
                run(store, scorer, *options)
    run(store, scorer)
    assert not list(Path(store.prefix).parent.glob("*.lock"))


def test_scores_of_another_store_are_refused(store, scorer, no_process_group):
    run(store, scorer)
    path = array_path(store.shards[0], "mr", "scores").with_suffix(".json")
    info = json.loads(path.read_text())
    path.write_text(json.dumps(seal({**info, "store_fingerprint": "0123"})))
    with pytest.raises(DataError, match="0123"):
        run(store, scorer)
    run(store, scorer, "--overwrite")
    open_array(store.shards[0], "mr", "scores")


def test_models_that_cannot_score_the_store_are_refused(
    store, scorer, no_process_group, tmp_path
):
    tokenizer = scorer[1]
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["another"])
    broken = BertForTokenClassification.from_pretrained(scorer[0])
    broken.classifier.bias.data[0] = float("nan")
    classifier = BertForSequenceClassification(tiny_config(tokenizer))
    for number, (model, its_tokenizer, error, message) in enumerate([
        (BertForTokenClassification(tiny_config(other)), other, DataError,
         "tokenizer.*is not the one of"),
        (classifier, tokenizer, ConfigError,
         "TokenClassification; give the hf/ folder of .*fit_sco"),
        (broken, tokenizer, DataError, "not numbers"),
    ]):
        folder = save(tmp_path / str(number), model, its_tokenizer)
        with pytest.raises(error, match=message):
            run(store, (folder, its_tokenizer))
    assert not list(tmp_path.glob("P*scores*"))


def test_windows_longer_than_the_model_are_refused(store, scorer, no_process_group):
    with pytest.raises(ConfigError, match="--max_seq_length 17.*16"):
        run(store, scorer, "--max_seq_length", "17")


def test_log_odds_stay_finite_in_float16(scorer):
    model = BertForTokenClassification.from_pretrained(scorer[0])
    tokens, offsets = np.arange(5, 9, dtype=np.uint16), np.array([0, 4])
    found = []
    for bias in ([0, 1.5], [1e30, 0], [0, 1e30]):
        model.classifier.weight.data.zero_()
        model.classifier.bias.data = torch.tensor(bias)
        runner = Runner(model, special_template(scorer[1], pair=False), scorer[1],
                        torch.device("cpu"), 32)
        odds = scoring.score_block(tokens, offsets, runner, 14, Progress(4))
        assert odds.dtype == np.float16
        found.append(set(odds.tolist()))
    assert found == [{1.5}, {-65504.0}, {65504.0}]


def test_windows_by_hand():
    starts, ends = scoring.cut_windows(np.array([0, 10, 10, 13]), 4)
    assert starts.tolist() == [0, 3, 6, 10] and ends.tolist() == [3, 6, 10, 13]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 9))
def test_windows_cover_every_token_once(lengths, limit):
    offsets = np.cumsum([0, *lengths])
    starts, ends = scoring.cut_windows(offsets, limit)
    assert [*starts, offsets[-1]] == [0, *ends]
    assert (ends > starts).all() and (ends - starts <= limit).all()
    assert set(offsets.tolist()) <= {0, *ends.tolist()}, "no window crosses a sentence"


def test_template_is_the_tokenizers_own(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    assert special_template(tokenizer, pair=False) == ((2,), (), (3,), 0)
    assert special_template(tokenizer, pair=True) == ((2,), (3,), (3,), 1)
    tokenizer.backend_tokenizer.post_processor = processors.RobertaProcessing(
        ("[SEP]", 3), ("[CLS]", 2)
    )
    assert special_template(tokenizer, pair=True) == ((2,), (3, 3), (3,), 0)


def test_inputs_equal_the_tokenizers(scorer):
    """What the model sees for ids and a template is what the tokenizer makes of the texts."""
    tokenizer = scorer[1]
    seen = {}

    class Recorder(torch.nn.Module):
        config = tiny_config(tokenizer)

        def forward(self, **inputs):
            seen.update(inputs)
            rows = inputs["input_ids"].shape[0]
            return type("Output", (), {"logits": torch.zeros(rows, 2)})

    pair = special_template(tokenizer, pair=True)
    runner = Runner(Recorder(), pair, tokenizer, torch.device("cpu"), 1000)
    aspects, texts = ["good film", "a"], ["one of the two", "films"]
    firsts, seconds = (
        [tokenizer(text, add_special_tokens=False)["input_ids"] for text in part]
        for part in (aspects, texts)
    )
    runner._family = None  # the model sees the mask of the padding itself
    ((batch, _, starts),) = runner.run(seconds, firsts)
    expected = tokenizer(
        aspects, texts, padding=True, return_tensors="pt", return_token_type_ids=True)
    assert batch.tolist() == [0, 1] and starts.tolist() == [4, 3]
    assert seen.keys() == expected.keys()
    for key in seen:
        assert torch.equal(seen[key], expected[key]), key
    assert runner.counts == {"passes": 1, "inputs": 2, "tokens": 15, "slots": 18, "flops": 0}


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(DataError, match="no .safetensors"):
        open_weights(str(tmp_path))


# ------------------------------------------------------------------ one shard of many


def test_one_shard_at_a_time_gives_the_same_scores(store, scorer, no_process_group, capsys):
    run(store, scorer, name="whole")
    paths = [array_path(shard, "mr", "scores") for shard in store.shards]
    with lock_array(store, "mr", "scores", 0):  # another process is at the first shard
        run(store, scorer, *SECOND)
    said = capsys.readouterr().out
    assert f"1 of 2 shards are to be scored, the first: {paths[0]}" in said
    assert not paths[0].exists() and paths[1].with_suffix(".json").exists()
    with pytest.raises(DataError, match="P-00000-of-00002.mr.scores.*score_tokens.py.* makes it"):
        open_array(store.shards[0], "mr", "scores")
    before = paths[1].stat().st_mtime_ns
    run(store, scorer)
    assert paths[1].stat().st_mtime_ns == before, "what is whole is skipped"
    assert "1 of 2 shards are scored already" in capsys.readouterr().out
    for shard in store.shards:
        whole, mine = (open_array(shard, name, "scores")[0] for name in ("whole", "mr"))
        assert np.array_equal(whole, mine)


def test_another_number_of_shards_is_refused(store, scorer, no_process_group):
    with pytest.raises(ConfigError, match="--num_shards 3: .*has 2 shards; give --num_shards 2"):
        run(store, scorer, "--shard_index", "1", "--num_shards", "3")
    with pytest.raises(ConfigError, match="shard_index 2.*0 to 1"):
        run(store, scorer, "--shard_index", "2", "--num_shards", "2")
    with pytest.raises(ConfigError, match="go together"):
        run(store, scorer, "--shard_index", "0")


@pytest.fixture(scope="module")
def trained(tiny_tokenizer):
    """A scorer that was trained to find words important, each word at a rate of its own."""
    torch.manual_seed(0)
    model = BertForTokenClassification(BertConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, num_hidden_layers=3,
        num_attention_heads=2, intermediate_size=64, pad_token_id=0, num_labels=2))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        ids = torch.randint(5, len(tiny_tokenizer), (32, 12))
        labels = (torch.rand(ids.shape) < 0.8 * ids / len(tiny_tokenizer)).long()
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize(("options", "tolerance", "share"), [
    ({"cut": one_by_one}, 1e-3, 0.999), ({"half": torch.float16}, 2e-2, 0.995),
    ({"half": torch.bfloat16}, 1e-1, 0.97),
])
def test_masks_do_not_depend_on_batches_or_precision(
    trained, tiny_tokenizer, options, tolerance, share
):
    """Beside large batches in fp32: one sentence a pass, fp16 and bf16."""
    rng = np.random.default_rng(3)
    offsets = np.cumsum([0, *rng.integers(1, 30, 700)])
    tokens = rng.integers(5, len(tiny_tokenizer), offsets[-1]).astype(np.uint16)
    masks, scores = [], []
    for choice in (options, {}):
        runner = Runner(trained, special_template(tiny_tokenizer, pair=False), tiny_tokenizer,
                        torch.device("cpu"), 8192, **choice)
        scores.append(scoring.score_block(tokens, offsets, runner, 14, Progress(len(tokens))))
        chosen = STRATEGIES["selective"].choose(Sequences(
            offsets=offsets, positions=np.arange(len(tokens)),
            candidates=np.ones(len(tokens), bool), rate=0.15, seed=0, epoch=0, scores=scores[-1]))
        masks.append(np.isin(np.arange(len(tokens)), chosen))
    found, exact = (s.astype(float) for s in scores)
    difference = (np.abs(found - exact) / np.maximum(1, np.abs(exact))).max()
    assert difference <= tolerance
    assert difference > 0 or "half" not in options  # it was another precision
    assert 0.01 < masks[0].mean() < 0.15
    assert (masks[0] == masks[1]).mean() >= share
    assert (masks[0] & masks[1]).sum() >= share * (masks[0] | masks[1]).sum()


@pytest.mark.parametrize("low", ["fp16", "bf16"])
def test_scores_of_two_precisions_are_not_mixed(low, store, scorer, no_process_group, capsys,
                                                monkeypatch):
    monkeypatch.setattr("train.stages.inference.has_fast_bf16", lambda: False)
    run(store, scorer, "--dtype", low)
    assert f"tokens/s, 1 ranks, cpu, {low}): " in capsys.readouterr().out
    half = [open_array(shard, "mr", "scores")[0] for shard in store.shards]
    array_path(store.shards[1], "mr", "scores").with_suffix(".json").unlink()  # to be made again
    for dtype in ("fp32", "auto"):
        with pytest.raises(ConfigError, match=f"made with --dtype {low}, .* fp32; .*--over"):
            run(store, scorer, "--dtype", dtype)
    run(store, scorer, "--dtype", low)
    run(store, scorer, "--dtype", "fp32", "--overwrite")
    exact = [open_array(shard, "mr", "scores")[0] for shard in store.shards]
    assert not np.array_equal(np.concatenate(half), np.concatenate(exact))


# ------------------------------------------------------------------ the other measures


@pytest.fixture(scope="module")
def networks(tmp_path_factory, tiny_tokenizer, scorer):
    """A folder for each kind of network, by the first word of its class."""
    made = {"scorer": scorer[0]}
    for number, (name, kind) in enumerate([
        ("classifier", BertForSequenceClassification), ("mlm", BertForMaskedLM),
        ("reference", BertForMaskedLM),
    ]):
        torch.manual_seed(number)
        made[name] = save(tmp_path_factory.mktemp(name), kind(tiny_config(tiny_tokenizer)),
                          tiny_tokenizer)
    return made


def measured(store, networks, tokenizer, measure, *options, name=None, **models):
    kind = {"gradient": "classifier", "excess": "mlm", "surprise": "mlm"}.get(measure, measure)
    if measure == "excess":
        options = ("--reference", str(models.get("reference", networks["reference"])), *options)
    run(store, (models.get("model", networks[kind]), tokenizer), "--measure", measure, *options,
        name=name or measure)


def test_every_measure_keeps_what_made_it(
    store, networks, tiny_tokenizer, no_process_group, capsys
):
    found, work = {}, {}
    for measure in ("gradient", "surprise", "excess"):
        measured(store, networks, tiny_tokenizer, measure, "--dtype", "auto")
        said = capsys.readouterr().out
        unit = {"gradient": r"mean [\d.]+ log2", "surprise": r"mean [\d.]+ nats",
                "excess": r"nats above 0 for [\d.]+% of"}[measure]
        assert re.search(rf"90 tokens in .* cpu, fp32\): .* padding; {unit}", said)
        arrays = [open_array(shard, measure, "scores") for shard in store.shards]
        found[measure] = np.concatenate([array for array, _ in arrays]).astype(float)
        for _, info in arrays:
            assert info["measure"] == MEASURES[measure].record(measure)
            assert info["seconds"] > 0
        work[measure] = sum(info["flops"] for _, info in arrays)
        options = arrays[0][1]["identity"]["options"]
        passes = None if measure == "gradient" else 7
        assert (options["measure"], options["num_passes"]) == (measure, passes)
    # Two models; and seven passes over the text, not one there and back.
    assert work["excess"] == 2 * work["surprise"] and 3 < work["surprise"] / work["gradient"] < 4
    assert found["gradient"].min() >= 0 and found["surprise"].min() >= 0
    assert found["excess"].min() < 0 < found["excess"].max()
    measured(store, networks, tiny_tokenizer, "surprise", name="other",
             model=networks["reference"])
    other = np.concatenate([open_array(s, "other", "scores")[0] for s in store.shards])
    np.testing.assert_allclose(found["excess"], found["surprise"] - other, atol=2e-2)


def test_options_of_a_measure_are_its_identity(store, networks, tiny_tokenizer, no_process_group):
    def again(measure, *options, **models):
        measured(store, networks, tiny_tokenizer, measure, *options, name="x", **models)

    again("excess")
    with pytest.raises(ConfigError, match="--measure excess, and this run has surprise; .*--over"):
        again("surprise")
    with pytest.raises(ConfigError, match="--num_passes 7, and this run has 3"):
        again("excess", "--num_passes", "3")
    with pytest.raises(ConfigError, match="--whole_words False, and this run has True"):
        again("excess", "--whole_words")
    other = BertForMaskedLM(tiny_config(tiny_tokenizer))
    folder = save(Path(store.prefix).parent / "other", other, tiny_tokenizer)
    with pytest.raises(ConfigError, match=r"--reference \(weights\) [0-9a-f]{16}, and this run "):
        again("excess", reference=folder)
    again("excess", "--num_passes", "7", "--batch_tokens", "16")


def test_checkpoints_of_another_kind_are_refused(
    store, networks, tiny_tokenizer, no_process_group, tmp_path
):
    for measure, kind, message in [
        ("gradient", "mlm", "BertForMaskedLM, not one for SequenceClassification; give seed_N/hf"),
        ("surprise", "scorer", "not one for MaskedLM; give the hf/ folder of train/pretrain.py"),
        ("scorer", "classifier", "not one for TokenClassification; give the hf/ folder of train/f"),
    ]:
        with pytest.raises(ConfigError, match=f"--model_name_or_path .*{message}"):
            measured(store, networks, tiny_tokenizer, measure, model=networks[kind])
    with pytest.raises(ConfigError, match="--reference .*not one for MaskedLM"):
        measured(store, networks, tiny_tokenizer, "excess", reference=networks["classifier"])
    with pytest.raises(ConfigError, match="--reference .*has the weights of --model_name"):
        measured(store, networks, tiny_tokenizer, "excess", reference=networks["mlm"])
    short = tiny_config(tiny_tokenizer)
    short.max_position_embeddings = 15
    folder = save(tmp_path / "short", BertForMaskedLM(short), tiny_tokenizer)
    with pytest.raises(ConfigError, match="--reference .*short: --max_seq_length 16.*15 positions"):
        measured(store, networks, tiny_tokenizer, "excess", reference=folder)
    single = tiny_config(tiny_tokenizer)
    single.num_labels = 1
    folder = save(tmp_path / "single", BertForSequenceClassification(single), tiny_tokenizer)
    with pytest.raises(ConfigError, match="gives a number and no classes.*one class of two"):
        measured(store, networks, tiny_tokenizer, "gradient", model=folder)
    other = copy.deepcopy(tiny_tokenizer)
    other.add_tokens(["another"])
    for measure, flag, kind in (("gradient", "model", BertForSequenceClassification),
                                ("excess", "reference", BertForMaskedLM)):
        folder = save(tmp_path / measure, kind(tiny_config(other)), other)
        with pytest.raises(DataError, match=rf"--{flag}.*tokenizer.*is not the one of"):
            measured(store, networks, tiny_tokenizer, measure, **{flag: folder})
    headless = save(tmp_path / "headless", BertForMaskedLM(tiny_config(tiny_tokenizer)),
                    tiny_tokenizer)
    weights = load_file(headless / "model.safetensors")
    save_file({key: value for key, value in weights.items() if not key.startswith("cls.")},
              headless / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="no masked-language-model head.*train/pretrain.py"):
        measured(store, networks, tiny_tokenizer, "surprise", model=headless)
    assert not list(tmp_path.glob("P*scores*"))


# ------------------------------------------------------------------ shards of one origin


def test_a_shard_is_not_scored_otherwise_than_another(
    store, scorer, networks, tiny_tokenizer, no_process_group
):
    torch.manual_seed(5)
    model = BertForTokenClassification(tiny_config(tiny_tokenizer))
    folder = save(Path(store.prefix).parent / "another", model, tiny_tokenizer)
    first = ("--shard_index", "0", "--num_shards", "2")
    run(store, scorer, *first)
    for dry in ((), ("--dry_run",)):
        with pytest.raises(ConfigError, match=(
                r"P-00000-of-00002\.mr\.scores\.npy: made with --model_name_or_path \(weights\) "
                r"[0-9a-f]{16}, and this run has [0-9a-f]{16}; .*--overwrite for every shard")):
            run(store, (folder, tiny_tokenizer), *SECOND, *dry)
    with pytest.raises(ConfigError, match="--measure scorer, and this run has gradient"):
        measured(store, networks, tiny_tokenizer, "gradient", *SECOND, name="mr")
    assert not array_path(store.shards[1], "mr", "scores").exists()
    # One after the other they may be replaced; nothing reads the mixture in between.
    run(store, (folder, tiny_tokenizer), *SECOND, "--overwrite")
    mixed = (r"--scores mr: \S*P-00001-of-00002\.mr\.scores\.npy: made with --model_name_or_path "
             r"\(weights\) .*, and \S*P-00000-of-00002\.mr\.scores\.npy has .*--overwrite")
    for options in (SECOND, ()):
        with pytest.raises(DataError, match=mixed):
            build_masks.main(["--tokens", store.prefix, "--strategy", "selective", "--scores", "mr",
                              "--name", "m", *options])
    with pytest.raises(DataError, match=mixed):
        open_arrays(store, store.shards[:1], "scores", "mr", "scores")
    run(store, (folder, tiny_tokenizer), *first, "--overwrite")
    build_masks.main(["--tokens", store.prefix, "--strategy", "selective", "--scores", "mr",
                      "--name", "m"])
