"""Packed batches of a token store: rows, order, masks."""

from train.data.batches import (
    EVAL_RATE,
    EVAL_SEED,
    ORDER_VERSION,
    PackedBatch,
    PackedData,
    StepBatch,
)
from train.data.masking import Masking, Schedule, drawn_masking, prebuilt_masking
from train.data.order import permute
from train.data.rows import (
    BLOCK_TOKENS,
    COLUMNS,
    OPEN_ROWS,
    RowTable,
    hold_out,
    make_tables,
    pack_rows,
    row_tables,
)
from train.data.transfer import BatchSizes, Transfer

__all__ = [
    "BLOCK_TOKENS",
    "BatchSizes",
    "COLUMNS",
    "EVAL_RATE",
    "EVAL_SEED",
    "Masking",
    "OPEN_ROWS",
    "ORDER_VERSION",
    "PackedBatch",
    "PackedData",
    "RowTable",
    "Schedule",
    "StepBatch",
    "Transfer",
    "drawn_masking",
    "hold_out",
    "make_tables",
    "pack_rows",
    "permute",
    "prebuilt_masking",
    "row_tables",
]
