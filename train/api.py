"""The names that a program may rely on; `train/API.md` shows each at work.

They are defined in their rooms, whose other names may change from version to version.
"""

from preprocess.errors import ConfigError, DataError
from preprocess.masking import STRATEGIES, BatchMasker, Corruption, MaskedBatch
from preprocess.store import Shard, TokenStore, open_array
from train.data import (
    PackedBatch,
    PackedData,
    RowTable,
    StepBatch,
    drawn_masking,
    prebuilt_masking,
    row_tables,
)
from train.model import PackedMaskedLM, load_masked_lm, load_tokenizer, patch, unpatch
from train.reports.pairs import RunsCompared, compare_runs
from train.stages.text_scores import TextScorer, TextScores

__all__ = [
    "BatchMasker",
    "ConfigError",
    "Corruption",
    "DataError",
    "MaskedBatch",
    "PackedBatch",
    "PackedData",
    "PackedMaskedLM",
    "RowTable",
    "RunsCompared",
    "STRATEGIES",
    "Shard",
    "StepBatch",
    "TextScorer",
    "TextScores",
    "TokenStore",
    "compare_runs",
    "drawn_masking",
    "load_masked_lm",
    "load_tokenizer",
    "open_array",
    "patch",
    "prebuilt_masking",
    "row_tables",
    "unpatch",
]
