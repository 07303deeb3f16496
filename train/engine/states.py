"""Save, load and convert the states of an engine."""

from __future__ import annotations

import argparse
import io
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preprocess.errors import ConfigError, DataError, writing
from train.engine.group import barrier, is_main, ranks

GENERATORS = "generators_rank{rank}.pt"
# Optimizers whose state is a first and a second moment, which is what DeepSpeed can convert.
CONVERTIBLE = ("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam")


def describe(engine: Any) -> dict[str, Any]:
    """Return the settings of the DeepSpeed JSON that decide which states exist."""
    precision = "fp16" if engine.fp16_enabled() else "bf16" if engine.bfloat16_enabled() else "fp32"
    return {
        "ZeRO stage": int(engine.zero_optimization_stage()), "precision": precision,
        "optimizer": type(engine.basic_optimizer).__name__,
    }


def save_state(engine: Any, folder: str | Path, client_state: dict[str, Any]) -> list[Path]:
    """Write what `load_state` needs to continue bit for bit; collective.

    DeepSpeed's own `latest` file is not written: it may name an incomplete checkpoint.

    Returns:
        The files that this rank wrote, but for DeepSpeed's conversion script.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    written: list[Path] = []

    class NotingEngine(TorchCheckpointEngine):
        """DeepSpeed's synchronous file writer, which notes what it has written."""

        def save(self, state_dict: Any, path: str) -> None:
            torch.save(state_dict, path)
            written.append(Path(path))

    engine.checkpoint_engine = NotingEngine()
    # The converter to other numbers of ranks asks for this entry.
    state = {**client_state, "universal_checkpoint_info": {}}
    engine.save_checkpoint(str(folder), tag="state", client_state=state, save_latest=False)
    generators = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators["cuda"] = torch.cuda.get_rng_state()
    path = Path(folder) / GENERATORS.format(rank=ranks().rank)
    torch.save(generators, path)
    return [*written, path]


def load_state(engine: Any, folder: str | Path, world_size: int) -> dict[str, Any]:
    """Load what `save_state` wrote, without running anything that is pickled in it; collective.

    At the same number of ranks the run continues bit for bit. At another one, parameters, moments,
    schedule and loss scaler are the saved ones, divided anew; batches do not depend on the ranks.
    Dropout differs: rank r draws from a generator seeded by the saved state of rank 0, the number
    of ranks and r, the same each time.

    Args:
        world_size: number of ranks that wrote the files.
    Returns:
        The `client_state`.
    Raises:
        ConfigError: an optimizer that cannot be converted to another number of ranks.
        DataError: a file holds something other than tensors and plain values.
    """
    here = ranks()
    folder = Path(folder)
    same = world_size == here.world_size
    with _safe_torch_load(engine):
        if same or not engine.zero_optimization():
            # Without ZeRO every rank has every state.
            loaded, client_state = engine.load_checkpoint(str(folder), tag="state")
            assert loaded is not None, f"{folder}: DeepSpeed loaded nothing"
        else:
            client_state = _load_converted(engine, folder)
        # The optimizer's rate is that of the next step of the schedule then, which may have been
        # extended since.
        engine.lr_scheduler.step(engine.lr_scheduler.last_batch_iteration)
        generators = torch.load(
            folder / GENERATORS.format(rank=here.rank if same else 0), weights_only=True
        )
    torch.set_rng_state(generators["cpu"])
    if torch.cuda.is_available() and "cuda" in generators:
        torch.cuda.set_rng_state(generators["cuda"])
    if not same:
        drawn = int(torch.randint(2**62, ()))
        seed = np.random.SeedSequence([drawn, here.world_size, here.rank]).generate_state(1)
        torch.manual_seed(int(seed[0]))
    return client_state


@contextmanager
def _safe_torch_load(engine: Any) -> Iterator[None]:
    """Let this process unpickle only tensors, plain values and four classes of DeepSpeed.

    DeepSpeed reads its own files, and those that its converter makes, with `weights_only=False`; a
    pickle can run any code. The converter makes paths of parameter names, so names that are not of
    this model are refused as well.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def member(kind: Any, name: str) -> Any:
        if kind is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
            raise pickle.UnpicklingError(f"getattr of {kind!r}")
        return ZeroStageEnum[name]

    # Python 3.11.0 to 3.11.3 write a member of an enumeration as a call of `getattr`.
    allowed: list[Any] = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address,
                          (member, "builtins.getattr")]
    known = {name for name, _ in engine.module.named_parameters()}
    known.update(name for name, _ in engine.module.named_buffers())
    known.update(engine.module.state_dict())
    plain = torch.load

    def safe(file: Any, *words: Any, **names: Any) -> Any:
        names["weights_only"] = True
        try:
            with torch.serialization.safe_globals(allowed):
                state = plain(file, *words, **names)
        except pickle.UnpicklingError:
            raise DataError(
                f"{file}: holds something other than tensors and plain values, which could run "
                "code and is never loaded; delete this checkpoint"
            ) from None
        strange = _parameter_names(state) - known
        if strange:
            raise DataError(f"{file}: names {min(strange)!r}, which is no parameter of this model")
        return state

    torch_module: Any = torch
    torch_module.load = safe
    try:
        yield
    finally:
        torch_module.load = plain


def _parameter_names(state: Any) -> set[str]:
    """Return every name of a parameter or buffer in a file of DeepSpeed."""
    if not isinstance(state, dict):
        return set()
    optimizer = state.get("optimizer_state_dict") or {}
    groups = [state.get("module") or {}, *(state.get("param_shapes") or []),
              *(optimizer.get("param_slice_mappings") or [])]
    return {name for group in groups for name in group}


def _load_converted(engine: Any, folder: Path) -> dict[str, Any]:
    """Load the ZeRO states of another number of ranks through DeepSpeed's universal format.

    Rank 0 writes it beside the checkpoint (12 bytes per parameter, for a while twice that) and
    removes it when all ranks have read it.
    """
    kind = type(engine.basic_optimizer).__name__
    amsgrad = any(group.get("amsgrad") for group in engine.basic_optimizer.param_groups)
    if kind not in CONVERTIBLE or amsgrad:
        raise ConfigError(
            f"{folder}: the states of the optimizer {kind} cannot be divided anew (those of "
            f"{', '.join(CONVERTIBLE)} without amsgrad can); start as many ranks as wrote it"
        )
    universal = folder.with_name(f"{folder.name}.universal.tmp")
    if is_main():
        shutil.rmtree(universal, ignore_errors=True)
        _convert(folder / "state", universal / "state")
    barrier()
    engine._config.load_universal_checkpoint = True
    try:
        loaded, client_state = engine.load_checkpoint(str(universal), tag="state")
        assert loaded is not None, f"{universal}: DeepSpeed loaded nothing"
        if engine.zero_optimization_stage() == 3:
            # DeepSpeed gives every group the settings of the first: no decay, the encoder's rate.
            saved = torch.load(universal / "state" / "zero" / "optimizer_state.pt",
                               map_location="cpu", weights_only=True)
            for group, values in zip(engine.optimizer.param_groups, saved["param_groups"],
                                     strict=True):
                group.update({key: value for key, value in values.items() if key != "params"})
            # And all parameters one tensor to count their steps, which each then adds to.
            for state in engine.basic_optimizer.state.values():
                if isinstance(state.get("step"), torch.Tensor):
                    state["step"] = state["step"].clone()
        _move_step_counts(engine.basic_optimizer)
    finally:
        engine._config.load_universal_checkpoint = False
    barrier()
    if is_main():
        shutil.rmtree(universal)
    return client_state


def _move_step_counts(optimizer: torch.optim.Optimizer) -> None:
    """Put the step counts of a fused Adam where its kernel wants them.

    DeepSpeed reads the converted files on the CPU and leaves the counts there.
    """
    for group in optimizer.param_groups:
        if group.get("fused"):
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                state["step"] = state["step"].to(parameter.device, torch.float32, copy=True)


def _convert(source: Path, target: Path) -> None:
    """Run DeepSpeed's converter in this process, where `_safe_torch_load` holds."""
    from deepspeed.checkpoint import ds_to_universal

    options = argparse.Namespace(
        input_folder=str(source), output_folder=str(target), num_extract_workers=1,
        num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=False,
    )
    chatter = io.StringIO()
    with writing(target), redirect_stdout(chatter), redirect_stderr(chatter):
        target.mkdir(parents=True)
        try:
            ds_to_universal.main(options)
        except KeyError as error:
            raise DataError(
                f"{source}: the optimizer has no state {error} yet, so it cannot be converted; "
                "start as many ranks as wrote it"
            ) from None
