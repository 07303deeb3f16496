"""Compiling the encoder layer by layer, without ever compiling again.

All layers but the last share one graph (two or three in ModernBERT, whose layers differ). The last
one computes masked slots only; its function is compiled for one number of them, to which batches
are padded. A batch that does not fit takes the same function uncompiled. What has other shapes -
evaluation, examples - runs under `uncompiled`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from preprocess.errors import ConfigError
from train.model.packed import PackedMaskedLM

# Slots of a run, of one rank, above which the warm-up is paid back: about 10 s, against 5.3 ms
# saved in each 32,768 slots of BERT-base on an H100.
WORTH_SLOTS = 60_000_000
RECOMPILE_LIMIT = 64  # a benchmark has two models, and sizes by strategy and row length


def compile_layers(
    module: PackedMaskedLM, *sizes: tuple[int, int], backend: Any = "inductor"
) -> None:
    """Compile the layers of the encoder, each when it is first called.

    Inductor times variants of its sums on a GPU and keeps the choice in its cache folder; without
    that folder a resumed run may differ in the last digits, unless TORCHINDUCTOR_DETERMINISTIC=1 is
    in the environment, which leaves the timing out.

    Args:
        sizes: lengths of `masked_positions` and values of `most_masked` for which the last layer
            is compiled; with others it runs as it is.
        backend: of `torch.compile`.
    """
    import torch._dynamo

    how: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": backend}
    layers = list(module.layers())
    if module.last_layer_subset:
        layers.pop()
        module.last_layers = dict.fromkeys(sizes, torch.compile(module.last_layer, **how))
    for layer in layers:
        layer.register_forward_pre_hook(_drop_masked, with_kwargs=True)
        layer.compile(**how)
    # Each size, row length and model has a graph of the same code, of which torch keeps 8 before
    # it gives up.
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT


def _drop_masked(layer: Any, given: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Keep the last layer's argument from the others, whose graphs would depend on its size."""
    return given, {name: value for name, value in options.items() if name != "masked"}


def uncompiled() -> AbstractContextManager[Any]:
    """Run compiled functions as they are written, in a `with` block: nothing is compiled."""
    return torch.compiler.set_stance("force_eager")


def forget_compiled() -> None:
    """Drop everything compiled in this process; torch keeps few graphs of one piece of code."""
    torch.compiler.reset()


def missing_for_compiling(device: torch.device) -> str | None:
    """Name what a machine lacks for `torch.compile`, None if nothing."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "the package triton"
        compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    else:
        compilers = [os.environ.get("CXX") or "g++"]
    if not any(map(shutil.which, compilers)):
        return f"a compiler ({' or '.join(compilers)})"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "the headers of Python (Python.h)"
    return None


def choose_compiling(
    choice: str, device: torch.device, zero_stage: int, slots: int
) -> tuple[bool, str]:
    """Decide whether to compile.

    Args:
        choice: "yes", "no" or "auto".
        slots: rows times row length that one rank computes in the whole run, not in what is left
            of it: a resumed run must decide as it did before.
    Returns:
        The decision, and one line that says why.
    Raises:
        ConfigError: "yes", and it cannot be.
    """
    if choice == "no":
        return False, "layers are not compiled: --torch_compile no"
    missing = missing_for_compiling(device)
    reason = None
    if zero_stage == 3:
        reason = "ZeRO-3 fetches the weights of each module while it runs, which no graph can hold"
    elif missing:
        reason = f"this machine lacks {missing}"
    if choice == "yes":
        if reason:
            raise ConfigError(f"--torch_compile yes: {reason}; give --torch_compile no"
                              + (", or ZeRO stage 1 or 2" if zero_stage == 3 else ""))
        return True, "layers are compiled: --torch_compile yes"
    if reason is None and device.type != "cuda":
        reason = "it was never measured to pay on a CPU"
    if reason is None and slots < WORTH_SLOTS:
        reason = (f"{slots:,} slots a rank are fewer than the {WORTH_SLOTS:,} that pay the "
                  "warm-up back")
    if reason:
        return False, f"layers are not compiled: {reason} (--torch_compile yes|no to decide)"
    return True, f"layers are compiled: {slots:,} slots a rank pay the warm-up back"
