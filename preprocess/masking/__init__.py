"""Masking in four steps: candidates, budget, choice, corruption."""

from preprocess.masking.candidates import (
    ROUNDING_WINDOW,
    Sequences,
    draw_counts,
    find_candidates,
    selective_limit,
)
from preprocess.masking.corruption import STANDARD, Corruption, corrupt, read_corruption
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
from preprocess.masking.index import (
    NUM_BINS,
    StrategyInputs,
    choose_positions,
    index_bounds,
    open_arrays,
    store_facts,
)
from preprocess.masking.strategies import ARRAY_NEEDS, BASELINE, MATCHED, STRATEGIES, Strategy

__all__ = [
    "ARRAY_NEEDS",
    "BASELINE",
    "Corruption",
    "MATCHED",
    "NUM_BINS",
    "ROUNDING_WINDOW",
    "STANDARD",
    "STRATEGIES",
    "STREAM_BUDGET",
    "STREAM_CHOICE",
    "STREAM_FILL",
    "STREAM_MATCHED",
    "STREAM_SHOWN",
    "STREAM_TIES",
    "STREAM_WORD",
    "Sequences",
    "Strategy",
    "StrategyInputs",
    "choose_positions",
    "corrupt",
    "counter_uniform",
    "draw_counts",
    "find_candidates",
    "index_bounds",
    "open_arrays",
    "read_corruption",
    "selective_limit",
    "store_facts",
]
