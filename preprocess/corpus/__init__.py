"""Text and labelled tasks from files, packages and the hub."""

from preprocess.corpus.documents import (
    RANGE_BYTES,
    cut_part,
    describe_first,
    hash_part,
    num_bytes,
    read_documents,
)
from preprocess.corpus.leakage import (
    LEAKAGE_VERSION,
    LeakIndex,
    describe_leakage,
    leakage_path,
    read_leakage,
    split_words,
    write_leakage,
)
from preprocess.corpus.markup import find_html, strip_html
from preprocess.corpus.packages import resolve_path
from preprocess.corpus.sources import (
    MAX_LINE_BYTES,
    SOURCES,
    Row,
    Span,
    as_text,
    check_file,
    read_csv,
    read_text,
    source_kind,
)
from preprocess.corpus.tasks import (
    LABEL_SEED,
    TASKS,
    TEST_FRACTIONS,
    Example,
    Task,
    limit_labels,
    load_task,
    take_fixed,
)

__all__ = [
    "Example",
    "LABEL_SEED",
    "LEAKAGE_VERSION",
    "LeakIndex",
    "MAX_LINE_BYTES",
    "RANGE_BYTES",
    "Row",
    "SOURCES",
    "Span",
    "TASKS",
    "TEST_FRACTIONS",
    "Task",
    "as_text",
    "check_file",
    "cut_part",
    "describe_first",
    "describe_leakage",
    "find_html",
    "hash_part",
    "leakage_path",
    "limit_labels",
    "load_task",
    "num_bytes",
    "read_csv",
    "read_documents",
    "read_leakage",
    "read_text",
    "resolve_path",
    "source_kind",
    "split_words",
    "strip_html",
    "take_fixed",
    "write_leakage",
]
