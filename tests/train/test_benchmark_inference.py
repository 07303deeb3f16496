"""The benchmark of annotating and scoring: its tables, and that all ways find the same."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

from preprocess.errors import ConfigError, DataError
from preprocess.store import StoreWriter, TokenStore
from tests.support.language import BAD, GOOD, review
from train import benchmark_inference


@pytest.fixture
def inputs(tmp_path, tiny_tokenizer):
    """Flags: a classifier and a scorer with fresh weights, a task of 20 sentences, two shards."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=16, num_hidden_layers=2, pad_token_id=0,
        num_attention_heads=2, intermediate_size=32, max_position_embeddings=32,
        initializer_range=0.5, id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
    )
    for name, make in (("classifier", BertForSequenceClassification),
                       ("scorer", BertForTokenClassification)):
        make(config).save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    rng = np.random.default_rng(0)
    (tmp_path / "mr").mkdir()
    for name, mood in (("pos", GOOD), ("neg", BAD)):
        lines = [review(rng, mood) for _ in range(20)]
        (tmp_path / "mr" / f"rt-polarity.{name}").write_text("\n".join(lines) + "\n")
    for index in range(2):
        with StoreWriter(str(tmp_path / "P"), tiny_tokenizer, {}, (index, 2)) as writer:
            writer.add_document([rng.integers(5, 40, n) for n in (3, 40, 0, 7)])
    return tmp_path, [
        "--classifier", str(tmp_path / "classifier"), "--task", "mr",
        "--data_dir", str(tmp_path / "mr"), "--scorer", str(tmp_path / "scorer"),
        "--tokens", str(tmp_path / "P"), "--annotate_length", "16", "--score_length", "32",
        "--rounds", "1", "--output_dir", str(tmp_path / "out"),
    ]


def test_all_ways_find_the_same(inputs, capsys):
    folder, flags = inputs
    benchmark_inference.main([*flags, "--max_samples", "12", "--max_tokens", "60"])
    result = json.loads((folder / "out" / "benchmark_inference.json").read_text())
    annotating, (scoring,) = result["annotating"], result["scoring"]
    assert annotating["differ"] == {"published": 0, "selmask fp32": 0, "selmask fp16": 0}
    for dtype, largest, share in (("fp32", 1e-3, 1), ("fp16", 2e-2, 0.9)):  # of 53 positions
        agree = scoring["agree"][f"selmask {dtype}"]
        assert agree["difference"] <= largest
        assert share * agree["masked_by_either"] <= agree["masked_by_both"] + 2
        assert agree["equal_positions"] >= share
    assert scoring["tokens"] == 53, "the first shard, and what fits of the second"
    for rows in (annotating["rows"], scoring["rows"]):
        published, ours = rows[0], rows[-2]
        assert published["padding_percent"] > ours["padding_percent"]
        assert len({row["tokens"] for row in rows[:-1]}) == 1, "the same work"
    passes = {row["way"]: (row["passes"], row["inputs"]) for row in annotating["rows"]}
    assert passes["one per pass"][0] == passes["one per pass"][1] > passes["selmask fp32"][0]
    assert annotating["rows"][-1]["again_fp32"] > 0 == annotating["rows"][0]["again_fp32"]
    said = capsys.readouterr().out
    assert "0 by published, 0 by selmask fp32, 0 by selmask fp16" in said
    assert re.search(r"selmask fp16: log-odds differ by at most .* equal at 9[\d.]+% of", said)


def test_measures_are_compared_with_the_buffer(inputs, capsys):
    """The average precision against a twin that ranks one sentence after the other."""
    folder, flags = inputs
    at = flags.index("--scorer")
    flags = [*flags[:at], *flags[at + 4 :], "--importance", "--delta", "0.1"]
    with pytest.MonkeyPatch.context() as patch:
        found = []
        plain = benchmark_inference.mean_precision
        patch.setattr(benchmark_inference, "mean_precision",
                      lambda *pair: found.append(pair) or plain(*pair))
        benchmark_inference.main(flags)
    result = json.loads((folder / "out" / "benchmark_inference.json").read_text())["importance"]
    rows = {row["measure"]: row for row in result["rows"]}
    assert list(rows) == ["buffer", "gradient", "leave_one_out"]
    assert not any(row["turned"] for row in rows.values())
    assert rows["gradient"]["passes"] < rows["leave_one_out"]["inputs"]
    for (target, values), row in zip(found, rows.values(), strict=True):
        each, shares = [], []
        for marks, numbers in zip(target, values, strict=True):
            if marks is None or not marks.any():
                continue
            at = [(numbers >= numbers[i]) for i in np.flatnonzero(marks)]
            each.append(np.mean([marks[ahead].mean() for ahead in at]))
            shares.append(marks.mean())
        assert len(each) > 2 and row["average_precision"] == f"{np.mean(each):.3f}"
        assert result["chance"] == pytest.approx(np.mean(shares))
    assert f"other marks: average precision {result['chance']:.3f}" in capsys.readouterr().out
    with pytest.raises(DataError, match="buffer finds no important token"):
        benchmark_inference.main([*flags, "--delta", "1e-9", "--criterion", "absolute"])


def test_sentences_are_whole(inputs):
    store = TokenStore.open(inputs[0] / "P")
    for most, expected in ((1, [3]), (42, [3]), (43, [3, 40, 0]), (10**6, [3, 40, 0, 7] * 2)):
        tokens, offsets = benchmark_inference.first_sentences(store, most)
        assert np.diff(offsets).tolist() == expected and len(tokens) == sum(expected)


def test_wrong_options_are_one_sentence(inputs, monkeypatch):
    _, flags = inputs
    for wrong, text in ((["--rounds", "0"], "rounds 0"), (["--scorer", ""], "go together"),
                        (["--annotate_length", "64"], "64.*32"),
                        (["--batch_tokens", "0"], "batch_tokens 0"),
                        (["--importance"], "--importance goes with --classifier"),
                        (["--delta", "0.001"], "fp16 with --delta 0.001")):
        with pytest.raises(ConfigError, match=text):
            benchmark_inference.main([*flags, *wrong])
    with pytest.raises(ConfigError, match="nothing to measure"):
        benchmark_inference.main(["--output_dir", "x"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 ranks"):
        benchmark_inference.main(flags)
