"""Flags of the training commands: parsing under every launcher, bounds, and refusals."""

from __future__ import annotations

import dataclasses

import pytest
from transformers import BertConfig

from preprocess.errors import ConfigError
from train import config
from train.config import parse
from train.model import fit_row_length

# Each command and its required flags.
REQUIRED = {
    config.PretrainConfig: ["--output_dir", "r", "--tokens", "p", "--model_config", "bert-tiny"],
    config.FinetuneConfig: ["--output_dir", "r", "--task", "mr", "--model_name_or_path", "m"],
    config.FitScorerConfig: ["--output_dir", "r", "--annotations", "a", "--model_name_or_path",
                             "m"],
    config.AnnotateConfig: ["--output", "o", "--task", "mr", "--model_name_or_path", "m"],
    config.PredictConfig: ["--input", "t.csv", "--output", "p.csv", "--model_name_or_path", "m"],
    config.ScoreConfig: ["--tokens", "p", "--name", "n", "--model_name_or_path", "m"],
    config.BenchmarkConfig: ["--tokens", "p", "--model_config", "bert-tiny"],
    config.PipelineConfig: ["--output_dir", "r", "--recipe", "r.yaml"],
}
each_command = pytest.mark.parametrize("command", REQUIRED, ids=lambda c: c.__name__)


@each_command
def test_a_required_flag_that_is_missing_is_named(command):
    needed = {option.name for option in dataclasses.fields(command) if "missing" in option.metadata}
    words = REQUIRED[command]
    parse(command, words)
    for name in needed:
        at = words.index(f"--{name}")
        with pytest.raises(ConfigError, match=f"^--{name} is missing: "):
            parse(command, words[:at] + words[at + 2:])


@each_command
def test_every_number_has_bounds(command):
    """Two kinds have none of their own: those that another flag bounds, and those of a launcher."""
    free = {"head_only_steps", "shard_index", "local_rank"}
    for option in dataclasses.fields(command):
        value, bounds = option.default, option.metadata["bounds"]
        if type(value) in (int, float) and option.name not in free:
            assert bounds.holds(value), option.name
            assert not any(map(bounds.holds, (-2, float("nan")))), option.name


def test_launchers_spell_local_rank_in_two_ways():
    """DeepSpeed passes --local_rank=1, older launchers of torch --local-rank=1."""
    words = REQUIRED[config.PretrainConfig]
    assert parse(config.PretrainConfig, [*words, "--local_rank=1"]).local_rank == 1
    assert parse(config.PretrainConfig, ["--local-rank=1", *words]).local_rank == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "13,x"], "whole numbers"),
        (["--seeds", "13,13"], "different"),
        (["--num_train_epochs", "0"], "1 or more"),
        (["--max_train_samples", "0"], "1 or more"),
        (["--label_budget", "1"], "2 or more"),
        (["--label_budget", "few"], "invalid .*'few'"),
        (["--label_seed", "7"], "and there is none; leave it out"),
        (["--early_stopping", "0"], "1 or more"),
        (["--metric", "loss", "--epoch", "last"], "is of --epoch best, and the last epoch is kept"),
        (["--early_stopping", "2", "--label_budget", "9"], "as with every --label_budget; leave"),
        (["--weight_decay", "1.5"], "\\[0, 1\\)"),
        (["--warmup_ratio", "-0.1"], "\\[0, 1\\]"),
        (["--seed", "-1"], "2\\^32"),
        (["--max_seq_length", "3"], "between 8"),
        (["--save_total_limit", "0"], "1 or more"),
        (["--logging_steps", "0"], "1 or more"),
        (["--train_batch_size", "0"], "1 or more"),
    ],
)
def test_bad_values_are_refused_in_one_sentence(words, message):
    good = REQUIRED[config.FinetuneConfig]
    assert parse(config.FinetuneConfig, good).seed_list() == [13]
    with pytest.raises(ConfigError, match=message) as error:
        parse(config.FinetuneConfig, [*good, *words])
    assert words[0].lstrip("-") in str(error.value) and "\n" not in str(error.value)


@each_command
def test_an_unknown_flag_is_named_before_a_missing_one(command):
    for words in (["--outptu_dir", "r"], ["--learnign_rate=1"]):
        with pytest.raises(ConfigError, match=f"^unknown argument {words[0]}"):
            parse(command, words)


def test_a_length_that_is_typed_is_refused_and_a_default_is_shortened(capsys):
    """256 is the default of fine-tuning; the model has 128 positions."""
    model = BertConfig(max_position_embeddings=128)
    words = REQUIRED[config.FinetuneConfig]
    fitted = fit_row_length(model, parse(config.FinetuneConfig, words))
    assert fitted.max_seq_length == 128
    assert capsys.readouterr().out == (
        "max_seq_length: 128, all positions of this model (default: 256)\n")
    for typed in (["--max_seq_length", "256"], ["--max_seq_length=200"]):
        options = parse(config.FinetuneConfig, [*words, *typed]).replaced(seed=7)
        with pytest.raises(ConfigError, match=f"^--max_seq_length {typed[-1][-3:]}: this model "
                           "has 128 positions; give at most 128"):
            fit_row_length(model, options)
    options = parse(config.FinetuneConfig, [*words, "--max_seq_length", "64"])
    assert fit_row_length(model, options) is options
    assert capsys.readouterr().out == ""
    options = parse(config.FinetuneConfig, [*words, "--max_seq_length", "200", "--fit_positions"])
    assert fit_row_length(model, options).max_seq_length == 128
    assert "128, all positions of this model (instead of 200)" in capsys.readouterr().out
