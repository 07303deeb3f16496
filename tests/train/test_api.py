"""The Python API: the page's snippets run as shown; scores of texts; the difference of two arms."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from preprocess import tokenize_corpus
from preprocess.errors import ConfigError, DataError
from preprocess.store import TokenStore, open_array, write_array
from tests.support.stores import MEASURED
from train import api, score_tokens

PAGE = (Path(api.__file__).parent / "API.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
SMALL = {"1000": "3"}  # steps; everything else runs as the page shows it
SEEDS, ITEMS = (13, 43, 83), 40


def write_results(folder: Path, right: np.ndarray, seeds=SEEDS, first_item: int = 0) -> Path:
    """A fine-tuning directory whose answers are right where `right`, `(S, N)`, says so."""
    folder.mkdir(parents=True)
    rows = [{"seed": seed, "task": "mr", "test_accuracy": float(one.mean()),
             "num_test": len(one)} for seed, one in zip(seeds, right, strict=True)]
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed, one in zip(seeds, right, strict=True):
        (folder / f"seed_{seed}").mkdir()
        answers = [{"item": f"item{first_item + n}", "label": 1, "prediction": int(ok)}
                   for n, ok in enumerate(one)]
        (folder / f"seed_{seed}" / "predictions.jsonl").write_text(
            "".join(json.dumps(answer) + "\n" for answer in answers))
    return folder


@pytest.fixture(scope="session")
def token_scorer(tmp_path_factory, tiny_encoder) -> str:
    """An `hf/` folder of a token scorer that nobody trained."""
    from train.model import load_scorer, load_tokenizer

    folder = tmp_path_factory.mktemp("scorer") / "hf"
    model = load_scorer(tiny_encoder, seed=0)
    model.save_pretrained(folder)
    load_tokenizer(tiny_encoder).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def workplace(tmp_path, monkeypatch, reviews_store, reviews_file, tiny_encoder, token_scorer):
    """A folder with what the pipeline of the front page leaves behind."""
    runs = tmp_path / "runs"
    shutil.copytree(Path(reviews_store).parent, runs / "tokens")
    shutil.copytree(tiny_encoder, runs / "general" / "hf")
    shutil.copytree(token_scorer, runs / "scorer" / "hf")
    shutil.copy(reviews_file, tmp_path / "reviews.txt")
    store = TokenStore.open(runs / "tokens" / "reviews")
    write_array(store.shards[0], "selective", "mask", np.arange(1, 90, 3, np.uint32), MEASURED)
    draw = np.random.default_rng(0).random((2, len(SEEDS), ITEMS))
    for arm, values, share in zip(("selective", "control"), draw, (0.8, 0.6), strict=True):
        write_results(runs / "tuned" / arm, values < share)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_snippets_run_in_order_as_shown(workplace, capsys):
    assert len(SNIPPETS) == 8
    names: dict = {}
    for text in SNIPPETS:
        assert len([line for line in text.splitlines() if line.strip()]) <= 12
        needed = re.findall(r"# needs: (\w+)", text)
        if not all(map(importlib.util.find_spec, needed)):
            continue
        for shown, small in SMALL.items():
            text = text.replace(shown, small)
        exec(compile(text, "API.md", "exec"), names)
    said = capsys.readouterr().out
    # 1. The ids of the first sequence, and the index that was written.
    shard = names["shard"]
    assert names["ids"].tolist() == shard.tokens[: shard.sequence_offsets[1]].tolist()
    assert len(names["masked"]) == 30
    # 2. Each token of the text is printed with its score.
    assert re.search(r"[+-]\d\.\d\d  moving\n", said) and re.search(r"  film\n", said)
    # 3. Only masked positions changed, and the control has as many of them per row.
    ids, whole = names["input_ids"], names["masker"](names["input_ids"], step=0)
    assert ((whole.input_ids == ids) | (whole.labels != -100)).all()
    rows = [(one.labels != -100).sum(1).tolist() for one in (names["selective"], names["control"])]
    assert rows[0] == rows[1]
    positive = (names["scores"] > 0) & (ids > 4)
    assert positive[names["selective"].labels != -100].all()
    # 4. The model was trained, and is a plain checkpoint.
    from transformers import AutoModelForMaskedLM, BertForMaskedLM

    assert torch.isfinite(names["loss_sum"])
    saved = AutoModelForMaskedLM.from_pretrained("runs/own").state_dict()
    before = AutoModelForMaskedLM.from_pretrained("runs/general/hf").state_dict()
    assert any(not torch.equal(saved[name], before[name]) for name in before)
    # 5. and 6. The patched model.
    assert names["output"].logits is None and torch.isfinite(names["output"].loss)
    if importlib.util.find_spec("accelerate"):
        last = AutoModelForMaskedLM.from_pretrained("runs/trainer/last")
        assert type(last) is BertForMaskedLM
        assert names["trainer"].state.global_step == 3
    # 7. The difference is that of the means.
    accuracy = [np.mean([json.loads(line)["test_accuracy"] for line in
                         open(f"runs/tuned/{arm}/results.jsonl")]) for arm in
                ("selective", "control")]
    assert names["found"].mean == pytest.approx(accuracy[0] - accuracy[1])
    assert f"{names['found'].mean:+.4f} [" in said
    assert "One pre-training seed lies behind" in said


def test_every_name_of_the_api_is_there_and_documented():
    shown = set(re.findall(r"`(\w+)`", PAGE.split("\n## ")[0]))
    imported = {name.strip() for names in re.findall(r"from train\.api import (.+)", PAGE)
                for name in names.split(",")}
    assert imported <= shown - {"ValueError"} <= set(api.__all__)
    for name in api.__all__:
        thing = getattr(api, name)
        assert thing.__doc__ and (name == "STRATEGIES" or thing.__name__ == name)


# ------------------------------------------------------------------------- scores of texts


TEXTS = ["The film was good. The plot was bad and dull!", "", "good", "A [SEP] in a text. Bad."]


def test_texts_are_scored_as_in_a_store(tmp_path, token_scorer, no_process_group):
    """The same ids, sentences and scores as the two commands give."""
    (tmp_path / "texts.txt").write_text("\n".join(text for text in TEXTS if text) + "\n")
    prefix = str(tmp_path / "store")
    tokenize_corpus.main(["--input", str(tmp_path / "texts.txt"), "--tokenizer", token_scorer,
                          "--output", prefix])
    score_tokens.main(["--model_name_or_path", token_scorer, "--tokens", prefix, "--name", "s",
                       "--max_seq_length", "64", "--dtype", "fp32"])
    shard = TokenStore.open(prefix).shards[0]
    expected = np.asarray(open_array(shard, "s", "scores")[0], np.float32)
    found = api.TextScorer(token_scorer, max_seq_length=64, device="cpu")(TEXTS)
    assert len(found) == len(TEXTS) and len(found[1].ids) == len(found[1].spans) == 0
    assert np.concatenate([one.ids for one in found]).tolist() == shard.tokens.tolist()
    scores = np.concatenate([one.scores for one in found])
    assert scores.dtype == np.float16
    np.testing.assert_allclose(scores.astype(np.float32), expected, rtol=1e-2, atol=1e-3)
    for text, one in zip(TEXTS, found, strict=True):
        words = [text[start:end] for start, end in one.spans]
        assert "".join(words) == text.replace(" ", "")
    whole = api.TextScorer(token_scorer, max_seq_length=64, language=None, device="cpu")(TEXTS)
    assert not np.allclose(whole[0].scores, found[0].scores, rtol=1e-2)  # one sentence, not two
    np.testing.assert_allclose(whole[2].scores, found[2].scores, rtol=1e-2)


def test_other_measures(tiny_encoder):
    """The encoder has an MLM head; more surprising is what it finds less likely."""
    (found,) = api.TextScorer(tiny_encoder, measure="surprise", max_seq_length=32, device="cpu")(
        ["good film"])
    assert (found.scores > 0).all() and len(found.scores) == 2
    assert api.TextScorer(tiny_encoder, measure="surprise", max_seq_length=32)([]) == []


def test_text_scorer_refuses(tiny_encoder, token_scorer, monkeypatch):
    for message, name, options in (
        ("measure 'tfidf': known are scorer", token_scorer, {"measure": "tfidf"}),
        ("excess: needs a reference", tiny_encoder, {"measure": "excess"}),
        ("scorer: reads no reference", token_scorer, {"reference": tiny_encoder}),
        ("not one for TokenClassification", tiny_encoder, {}),
        ("this model has 64 positions", token_scorer, {"max_seq_length": 65}),
        ("max_seq_length 2: must be between 8 and", token_scorer, {"max_seq_length": 2}),
        ("max_seq_length 0: must be between 8 and", token_scorer, {"max_seq_length": 0}),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            api.TextScorer(name, **{"max_seq_length": 32, **options})
    scorer = api.TextScorer(token_scorer, max_seq_length=32)
    with pytest.raises(DataError, match="a text of 524,289 characters: at most 524,288"):
        scorer(["a" * 524_289])


def test_packed_batches_of_impossible_sizes(reviews_store):
    store = api.TokenStore.open(reviews_store)
    rows, _ = api.row_tables(store, max_seq_length=32, eval_fraction=0.1)
    masking = api.drawn_masking(store, "random", 0.15)
    for options in ({"micro_batch_size": 0}, {"micro_batch_size": 4, "accumulation_steps": 0}):
        with pytest.raises(ConfigError, match=r"_(size|steps) 0: must be 1 or more"):
            api.PackedData(store, rows, masking, seed=1, **options)
    for length, fraction, message in ((2, 0.1, "max_seq_length 2: must be 3 or more"),
                                      (32, 1.0, r"eval_fraction 1.0: must be in \[0, 1\)"),
                                      (32, -1, "eval_fraction -1")):
        with pytest.raises(ConfigError, match=message):
            api.row_tables(store, max_seq_length=length, eval_fraction=fraction)


# ------------------------------------------------------------------------- two arms


def test_compare_runs_by_hand(tmp_path):
    """One seed, eight items, of which two differ: mean 1/4, variance 3/14 over 8."""
    first = np.array([[1, 1, 1, 1, 0, 0, 1, 0]], bool)
    second = np.array([[1, 1, 0, 0, 0, 0, 1, 0]], bool)
    paths = [write_results(tmp_path / name, right, seeds=[13])
             for name, right in (("a", first), ("b", second))]
    found = api.compare_runs(*paths)
    from scipy import stats

    error = (3 / 14 / 8) ** 0.5
    reach = stats.t.ppf(0.975, 7) * error
    assert found.mean == pytest.approx(0.25)
    assert (found.low, found.high) == pytest.approx((0.25 - reach, 0.25 + reach))
    assert found.detectable == pytest.approx((stats.t.ppf(0.975, 7) + stats.t.ppf(0.8, 7)) * error)
    assert any("One pre-training seed" in note for note in found.notes)
    several = api.compare_runs([str(paths[0])] * 2, [paths[1]] * 2)
    assert several.mean == pytest.approx(0.25)


def test_arms_that_cannot_be_compared(tmp_path):
    right = np.ones((1, 4), bool)
    a = write_results(tmp_path / "a", right, seeds=[13])
    b = write_results(tmp_path / "b", right, seeds=[13], first_item=9)
    with pytest.raises(DataError, match="are not compared: they were tested on different items"):
        api.compare_runs(a, b)
    with pytest.raises(DataError, match="holds no finished seed"):
        api.compare_runs(a, tmp_path / "absent")
    with pytest.raises(DataError, match="a side without a folder"):
        api.compare_runs(a, [])
