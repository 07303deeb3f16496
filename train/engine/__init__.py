"""The layer over DeepSpeed; no other room imports it.

DeepSpeed is imported inside functions (the import takes seconds), so that `--help` and every check
of the user's flags come first. It has no option for the following, so they are replaced here:

- `engine.checkpoint_engine` (states.py), while saving: a synchronous writer that notes which files
  are this rank's.
- `torch.load` (states.py), while loading: DeepSpeed reads its files with `weights_only=False`, and
  a pickle can run any code.
- `engine._config.load_universal_checkpoint` (states.py), while loading at another number of ranks.
- `step`, and on one rank the gathering of gradients, of `engine.optimizer` (zero.py), for ZeRO 1
  and 2: loops over the parameters, whose small kernels a GPU waits for.
- `engine.enable_backward_allreduce` (steps.py), on one rank without ZeRO: there is nothing to
  reduce, and DeepSpeed would copy all gradients there and back.
- `deepspeed.ops.__compatible_ops__` (group.py), without a GPU: DeepSpeed would compile an
  all-reduce that only its inference engine uses.

`test_what_is_replaced_in_deepspeed_is_still_there` fails when a new version changes one of them.
"""

from train.engine.ds_json import (
    DEFAULT_LEARNING_RATE,
    Resolved,
    has_fast_bf16,
    read_ds_config,
    resolve_ds_config,
    rows_per_rank,
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
from train.engine.schedules import TYPES, same_steps, stable_steps
from train.engine.states import CONVERTIBLE, GENERATORS, describe, load_state, save_state
from train.engine.steps import (
    MAX_SKIPPED_IN_A_ROW,
    build_engine,
    full_state_dict,
    parameter_groups,
    restart_schedule,
    take_step,
)
from train.engine.stop import StopSignal
from train.shipped import DS_CONFIGS

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
    "TYPES",
    "all_reduce_sum",
    "barrier",
    "build_engine",
    "describe",
    "finish",
    "full_state_dict",
    "gather_objects",
    "has_fast_bf16",
    "is_main",
    "is_started",
    "load_state",
    "nodes_without",
    "parameter_groups",
    "ranks",
    "read_ds_config",
    "resolve_ds_config",
    "restart_schedule",
    "rows_per_rank",
    "same_steps",
    "save_state",
    "stable_steps",
    "start",
    "supported_precisions",
    "take_step",
]
