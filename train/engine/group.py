"""Ranks and the process group: start, finish, collectives, and whether nodes share a disk."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from preprocess.errors import ConfigError
from preprocess.progress import level_of_libraries

# DeepSpeed's launcher shows GPUs to its ranks even where DS_ACCELERATOR asks for the CPU.
if os.environ.get("DS_ACCELERATOR") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# A node sees the files of another one within this time: NFS caches a folder for up to 60 s.
SHARED_DISK_SECONDS = 90.0


@dataclass(frozen=True)
class Ranks:
    """The place of this process: `rank` of `world_size`, `local_rank` on its machine."""

    rank: int
    world_size: int
    local_rank: int


def ranks() -> Ranks:
    """Read rank and world size from the launcher's environment; one process without it."""
    return Ranks(
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
    )


def is_main() -> bool:
    """Return whether this is the first rank."""
    return ranks().rank == 0


def load_deepspeed() -> Any:
    """Import deepspeed (seconds, the first time) for this machine's device, without its chatter."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.device_count() else "cpu")
    import deepspeed

    deepspeed.logger.setLevel(level_of_libraries() or "ERROR")
    return deepspeed


def supported_precisions() -> dict[str, bool]:
    """Return whether DeepSpeed takes fp16 and bf16 on this machine."""
    load_deepspeed()
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    return {"fp16": bool(device.is_fp16_supported()), "bf16": bool(device.is_bf16_supported())}


def start() -> torch.device:
    """Join the process group (idempotent) and pick this rank's device.

    Raises:
        ConfigError: other ranks did not join within DeepSpeed's 10 minutes, or the port is taken.
    """
    deepspeed = load_deepspeed()
    if "RANK" not in os.environ:  # plain `python`: a group of one
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    device, backend = torch.device("cpu"), None
    if torch.cuda.is_available():
        device = torch.device("cuda", ranks().local_rank)
        torch.cuda.set_device(device)
        if ranks().world_size == 1:
            # DeepSpeed binds the group to its device, but for one rank, where NCCL's communicators
            # may then fail (DeepSpeed issue 8248); unbound, torch warns at each barrier, and NCCL
            # guesses a device. With gloo beside NCCL, barriers and objects stay on the host.
            backend = "cpu:gloo,cuda:nccl"
    else:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(backend, verbose=False)
    except torch.distributed.DistError as error:
        here, first = ranks(), (str(error).splitlines() or [type(error).__name__])[0]
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConfigError(
            f"rank {here.rank} of {here.world_size} found no process group at {where} ({first}); "
            f"look at the output of the other nodes, and give a --master_addr that they reach and "
            f"a free --master_port"
        ) from None
    return device


def finish() -> None:
    """Leave the process group; `run_command` does it for a command that ends otherwise."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def all_reduce_sum(*values: float | torch.Tensor) -> list[float]:
    """Sum each number over all ranks (float64), in one collective and one copy to the host.

    Args:
        values: numbers, or tensors `()`, which stay on their device until they are summed.
    """
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    stacked = torch.stack([
        value.to(torch.float64) if isinstance(value, torch.Tensor)
        else torch.full((), value, dtype=torch.float64, device=device) for value in values
    ])
    if ranks().world_size > 1:
        torch.distributed.all_reduce(stacked)
    return stacked.tolist()


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's `value`, in the order of ranks, on every rank."""
    if ranks().world_size == 1:
        return [value]
    gathered: list[Any] = [None] * ranks().world_size
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def nodes_without(folder: Path) -> list[str]:
    """Return the hosts that do not see what rank 0 writes to `folder`; collective.

    A network disk may show a new file late, so a host that misses it keeps looking for a while.
    """
    if ranks().world_size == 1:
        return []
    # A new name: a network disk also remembers for a while that there was no such file.
    name = gather_objects(f".seen-{time.time_ns()}.tmp-{os.getpid()}")[0]
    path = folder / name
    if is_main():
        path.touch()
    barrier()
    end = time.monotonic() + SHARED_DISK_SECONDS
    first_here = ranks().local_rank == 0
    while first_here and not path.exists() and time.monotonic() < end:
        time.sleep(0.5)
    found = gather_objects((socket.gethostname(), path.exists() or not first_here))
    if is_main():
        path.unlink()
    return sorted({host for host, seen in found if not seen})


def is_started() -> bool:
    """Return whether this process has joined the process group."""
    return torch.distributed.is_initialized()


def barrier() -> None:
    """Wait for all ranks."""
    if ranks().world_size > 1:
        torch.distributed.barrier()
