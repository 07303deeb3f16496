"""The layer over DeepSpeed; nothing else imports it."""

from train.engine.ds_json import (
    DEFAULT_LEARNING_RATE,
    DS_CONFIGS,
    Resolved,
    read_ds_config,
    resolve_ds_config,
)
from train.engine.group import (
    SHARED_DISK_SECONDS,
    Ranks,
    all_reduce_sum,
    barrier,
    finish,
    gather_objects,
    is_main,
    is_started,
    nodes_without,
    ranks,
    start,
    supported_precisions,
)
from train.engine.states import CONVERTIBLE, GENERATORS, describe, load_state, save_state
from train.engine.steps import (
    MAX_SKIPPED_IN_A_ROW,
    build_engine,
    full_state_dict,
    parameter_groups,
    take_step,
)
from train.engine.stop import StopSignal

__all__ = [
    "CONVERTIBLE",
    "DEFAULT_LEARNING_RATE",
    "DS_CONFIGS",
    "GENERATORS",
    "MAX_SKIPPED_IN_A_ROW",
    "Ranks",
    "Resolved",
    "SHARED_DISK_SECONDS",
    "StopSignal",
    "all_reduce_sum",
    "barrier",
    "build_engine",
    "describe",
    "finish",
    "full_state_dict",
    "gather_objects",
    "is_main",
    "is_started",
    "load_state",
    "nodes_without",
    "parameter_groups",
    "ranks",
    "read_ds_config",
    "resolve_ds_config",
    "save_state",
    "start",
    "supported_precisions",
    "take_step",
]
