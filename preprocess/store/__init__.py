"""The token store: the only room that opens a `.bin`."""

from preprocess.store.arrays import (
    ARRAYS,
    array_path,
    array_records,
    check_other_shards,
    has_array,
    list_arrays,
    lock_array,
    missing_arrays,
    open_array,
    verify_store,
    write_array,
)
from preprocess.store.join import join_shards
from preprocess.store.layout import (
    DTYPES,
    MAX_SHARD_TOKENS,
    MAX_VOCAB,
    SETTLED_NS,
    ranges,
    recall,
    remember,
    shard_prefix,
)
from preprocess.store.reader import (
    BLOCK_TOKENS,
    Offsets,
    Shard,
    TokenStore,
    iterate_blocks,
    read_foreign,
)
from preprocess.store.tables import open_table, write_table
from preprocess.store.writer import (
    StoreWriter,
    check_vocabulary,
    describe_tokenizer,
    tidy_store,
)

__all__ = [
    "ARRAYS",
    "BLOCK_TOKENS",
    "DTYPES",
    "MAX_SHARD_TOKENS",
    "MAX_VOCAB",
    "Offsets",
    "SETTLED_NS",
    "Shard",
    "StoreWriter",
    "TokenStore",
    "array_path",
    "array_records",
    "check_other_shards",
    "check_vocabulary",
    "describe_tokenizer",
    "has_array",
    "iterate_blocks",
    "join_shards",
    "list_arrays",
    "lock_array",
    "missing_arrays",
    "open_array",
    "open_table",
    "ranges",
    "read_foreign",
    "recall",
    "remember",
    "shard_prefix",
    "tidy_store",
    "verify_store",
    "write_array",
    "write_table",
]
