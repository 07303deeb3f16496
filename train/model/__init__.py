"""Models over packed batches; knows transformers' classes."""

from train.model.agreement import check_agreement, check_room
from train.model.compiled import (
    WORTH_SLOTS,
    choose_compiling,
    compile_layers,
    forget_compiled,
    missing_for_compiling,
    uncompiled,
)
from train.model.families import (
    FAMILIES,
    attention_mask,
    checkpoint_activations,
    find_queries,
    first_slot_only,
    token_rows,
)
from train.model.flops import DTYPES, Peak, StepFlops, count_flops, forward_flops, peak_flops
from train.model.loading import (
    BERT_SIZES,
    SCORER_LABELS,
    build_masked_lm,
    check_row_length,
    describe_head,
    fit_row_length,
    load_classifier,
    load_config,
    load_masked_lm,
    load_scorer,
    load_tokenizer,
    local_checkpoint,
    named_config,
    other_outputs,
)
from train.model.packed import PackedMaskedLM, masked_lm_head
from train.model.patching import patch, unpatch

__all__ = [
    "BERT_SIZES",
    "DTYPES",
    "FAMILIES",
    "PackedMaskedLM",
    "Peak",
    "SCORER_LABELS",
    "StepFlops",
    "WORTH_SLOTS",
    "attention_mask",
    "build_masked_lm",
    "check_agreement",
    "check_room",
    "check_row_length",
    "checkpoint_activations",
    "choose_compiling",
    "compile_layers",
    "count_flops",
    "describe_head",
    "find_queries",
    "fit_row_length",
    "first_slot_only",
    "forget_compiled",
    "forward_flops",
    "load_classifier",
    "load_config",
    "load_masked_lm",
    "load_scorer",
    "load_tokenizer",
    "local_checkpoint",
    "masked_lm_head",
    "missing_for_compiling",
    "named_config",
    "other_outputs",
    "patch",
    "peak_flops",
    "token_rows",
    "uncompiled",
    "unpatch",
]
