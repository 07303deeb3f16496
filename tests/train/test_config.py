"""Options: parsing under every launcher, refusals, and help."""

from __future__ import annotations

import dataclasses

import pytest

from preprocess.errors import ConfigError
from train import config
from train.config import parse

CLASSES = [
    config.PretrainConfig, config.FinetuneConfig, config.FitScorerConfig, config.AnnotateConfig,
    config.ScoreConfig, config.BenchmarkConfig, config.PipelineConfig,
]
PRETRAIN = ["--output_dir", "r", "--tokens", "p", "--model_config", "bert-tiny"]


@pytest.mark.parametrize("config_class", CLASSES, ids=lambda c: c.__name__)
def test_every_option_says_what_it_is(config_class):
    for option in dataclasses.fields(config_class):
        assert len(option.metadata["help"]) > 5, option.name
    assert config_class.__doc__


def test_b17_launchers_spell_local_rank_in_two_ways():
    assert parse(config.PretrainConfig, [*PRETRAIN, "--local_rank=1"]).local_rank == 1
    assert parse(config.PretrainConfig, ["--local-rank=1", *PRETRAIN]).local_rank == 1


def test_unknown_flag_is_usage():
    with pytest.raises(ConfigError, match="--max_step.*did you mean --max_steps"):
        parse(config.PretrainConfig, [*PRETRAIN, "--max_step", "3"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "13,x"], "whole numbers"),
        (["--seeds", "13,13"], "different"),
        (["--num_train_epochs", "0"], "1 or more"),
        (["--max_train_samples", "0"], "1 or more"),
        (["--weight_decay", "1.5"], "\\[0, 1\\)"),
        (["--warmup_ratio", "-0.1"], "\\[0, 1\\]"),
        (["--seed", "-1"], "2\\^32"),
        (["--max_seq_length", "3"], "between 8"),
        (["--save_total_limit", "0"], "1 or more"),
        (["--logging_steps", "0"], "1 or more"),
        (["--train_batch_size", "0"], "1 or more"),
    ],
)
def test_bad_values_are_said_in_a_sentence(words, message):
    good = ["--output_dir", "r", "--task", "mr", "--model_name_or_path", "m"]
    assert parse(config.FinetuneConfig, good).seed_list() == [13]
    with pytest.raises(ConfigError, match=message) as error:
        parse(config.FinetuneConfig, [*good, *words])
    assert words[0].lstrip("-") in str(error.value) and "\n" not in str(error.value)
