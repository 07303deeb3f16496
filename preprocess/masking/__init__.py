"""Masking in four steps: candidates, budget, choice, corruption."""

from preprocess.masking.candidates import (
    ROUNDING_WINDOW,
    Sequences,
    draw_counts,
    find_candidates,
    selective_limit,
)
from preprocess.masking.corruption import corrupt
from preprocess.masking.draws import (
    STREAM_BUDGET,
    STREAM_CHOICE,
    STREAM_FILL,
    STREAM_MATCHED,
    STREAM_SHOWN,
    STREAM_TIES,
    STREAM_WORD,
    counter_uniform,
)
from preprocess.masking.index import NEEDS, Inputs, choose_positions, index_bounds
from preprocess.masking.strategies import DRAWN, PREBUILT, STRATEGIES, choose_selective

__all__ = [
    "DRAWN",
    "Inputs",
    "NEEDS",
    "PREBUILT",
    "ROUNDING_WINDOW",
    "STRATEGIES",
    "STREAM_BUDGET",
    "STREAM_CHOICE",
    "STREAM_FILL",
    "STREAM_MATCHED",
    "STREAM_SHOWN",
    "STREAM_TIES",
    "STREAM_WORD",
    "Sequences",
    "choose_positions",
    "choose_selective",
    "corrupt",
    "counter_uniform",
    "draw_counts",
    "find_candidates",
    "index_bounds",
    "selective_limit",
]
