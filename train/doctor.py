"""Whether this machine can train: what is fine, what is not, and what to do about it.

    python train/doctor.py --output_dir runs

Exit code 0 if everything necessary is there, 2 otherwise; a warning costs speed or a feature, not
the run. Every import that may be broken is made inside its check, so that one missing package
does not hide the others. Nothing is written, and nothing is asked of the network.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from preprocess.errors import ConfigError, run_command
from preprocess.progress import say
from train.config import OneLineMistakes

SETUP = Path(__file__).resolve().parent.parent / "setup.cfg"
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SHARED_MEMORY = Path("/dev/shm")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
DEEPSPEED_PORT = 29500  # what DeepSpeed's launcher takes unless told
STALE_SECONDS = 15 * 60  # no build of one of DeepSpeed's operations takes so long
GIB = 2**30
INSTALL = "pip install -c constraints.txt -e ."


@dataclass(frozen=True)
class Finding:
    """One line of the table. `status` is ok, warn or fail; `remedy` is what to type or change."""

    name: str
    status: str
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Asked:
    """What the checks are about: the folder for runs, and whether torch sees a GPU."""

    output_dir: Path
    has_gpu: bool

    @property
    def if_missing(self) -> str:
        """How bad it is to lack what only DeepSpeed's compiled operations need.

        On a GPU its Adam is compiled at first use; on a CPU we take the one of torch.
        """
        return "fail" if self.has_gpu else "warn"


# ------------------------------------------------------------------------------------- software


def numbers(version: str) -> tuple[int, ...]:
    """The numeric beginning of a version: (2, 13, 0) for 2.13.0+cpu."""
    return tuple(map(int, re.findall(r"\d+", re.split(r"[a-z+-]", version)[0])))


def satisfies(version: str, limits: str) -> bool:
    """Whether a version is within limits as ">=0.19.8,<0.20"."""
    have = numbers(version)
    for limit in filter(None, limits.split(",")):
        sign, bound = re.fullmatch(r"\s*(>=|<=|==|<|>)\s*(.+?)\s*", limit).groups()  # type: ignore
        want = numbers(bound)
        wide = max(len(have), len(want))
        left, right = (part + (0,) * (wide - len(part)) for part in (have, want))
        if not {">=": left >= right, "<=": left <= right, "==": left == right,
                "<": left < right, ">": left > right}[sign]:
            return False
    return True


def requirements() -> tuple[str, dict[str, str]]:
    """Limits of Python, and of each package, from setup.cfg."""
    import configparser

    setup = configparser.ConfigParser()
    setup.read(SETUP)
    options = setup["options"]
    packages = {}
    for line in options["install_requires"].split("\n"):
        name, limits = re.fullmatch(r"([\w.-]*)([^;]*).*", line.strip()).groups()  # type: ignore
        if name:
            packages[name] = limits.strip()
    return options["python_requires"], packages


def check_python(asked: Asked) -> Iterator[Finding]:
    limits, _ = requirements()
    version = platform.python_version()
    if satisfies(version, limits):
        yield Finding("python", "ok", f"{version} ({limits})")
    else:
        yield Finding("python", "fail", f"{version}, needs {limits}", "install another Python")


def check_packages(asked: Asked) -> Iterator[Finding]:
    for name, limits in requirements()[1].items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(name, "fail", "not installed", INSTALL)
            continue
        if satisfies(version, limits):
            yield Finding(name, "ok", f"{version} ({limits})" if limits else version)
        else:
            yield Finding(name, "fail", f"{version}, needs {limits}", INSTALL)


def check_torch(asked: Asked) -> Iterator[Finding]:
    import torch

    build = torch.version.cuda or torch.version.hip
    found = f"{torch.__version__}, built for {f'CUDA {build}' if build else 'CPUs'}"
    if asked.has_gpu or not NVIDIA_DRIVER.exists():
        yield Finding("torch build", "ok", found)
    else:
        yield Finding(
            "torch build", "warn", f"{found}, but there is an NVIDIA driver",
            "compare nvidia-smi with the build" if build else "install a torch built for CUDA",
        )
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield Finding(
            f"GPU {index}", "ok",
            f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, compute {gpu.major}.{gpu.minor}",
        )
    if not asked.has_gpu:
        yield Finding("GPU", "ok", f"none: training on {os.cpu_count()} CPU cores")


def check_precision(asked: Asked) -> Iterator[Finding]:
    from train.engine import supported_precisions

    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed says what it finds
        supported = supported_precisions()
    for name, there in supported.items():
        found = "yes" if there else "no"
        if not asked.has_gpu:
            found += "; --precision auto trains in fp32, which is faster on a CPU"
        yield Finding(name, "ok", found)


# ------------------------------------------------------------------------------------- compilers


def first_line(*command: str) -> str | None:
    """What a command says first, or None if there is none or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split("\n")
    return lines[0].strip() if done.returncode == 0 else None


def check_compiler(asked: Asked) -> Iterator[Finding]:
    compiler = os.environ.get("CXX", "c++")
    said = first_line(compiler, "--version")
    if said:
        yield Finding("C++ compiler", "ok", said)
    else:
        yield Finding(
            "C++ compiler", asked.if_missing,
            f"{compiler} does not run; --torch_compile and DeepSpeed's own operations need it",
            "apt install g++, or set CXX",
        )
    ninja = first_line("ninja", "--version")
    if ninja:
        yield Finding("ninja", "ok", ninja)
    else:
        yield Finding(
            "ninja", asked.if_missing, "does not run; DeepSpeed's own operations need it",
            "pip install ninja",
        )


def check_nvcc(asked: Asked) -> Iterator[Finding]:
    if not asked.has_gpu:
        return
    import torch

    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home, "bin", "nvcc")) if home else "nvcc"
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=10)
        release = re.search(r"release (\d+\.\d+)", said.stdout)
    except (OSError, subprocess.TimeoutExpired):
        release = None
    built = str(torch.version.cuda)
    if release is None:
        yield Finding(
            "nvcc", "fail", f"{nvcc} does not run; DeepSpeed's Adam is compiled with it",
            f'install the CUDA {built} toolkit, or write "torch_adam": true in the DeepSpeed JSON',
        )
    elif release[1].split(".")[0] != built.split(".")[0]:
        yield Finding(
            "nvcc", "fail", f"CUDA {release[1]}, and torch is built for {built}",
            f"set CUDA_HOME to a CUDA {built.split('.')[0]} toolkit",
        )
    else:
        yield Finding("nvcc", "ok", f"CUDA {release[1]}")


def check_triton(asked: Asked) -> Iterator[Finding]:
    try:
        yield Finding("triton", "ok", metadata.version("triton"))
    except metadata.PackageNotFoundError:
        if asked.has_gpu:
            yield Finding("triton", "warn", "not installed: the slow MLM head is used",
                          "pip install triton")
        else:
            yield Finding("triton", "ok", "not installed; only a GPU needs it")


def check_build_locks(asked: Asked) -> Iterator[Finding]:
    """A build that was killed leaves a lock, and every later one waits for it without a word."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cache, "torch_extensions"))
    locks = sorted(root.glob("**/lock")) if root.is_dir() else []
    for lock in locks:
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:
            continue  # the build has just ended
        if age > STALE_SECONDS:
            yield Finding("build lock", "fail", f"{lock} is {age / 60:.0f} minutes old: a build "
                          "was killed, and the next one would wait for ever", f"rm {lock}")
        else:
            yield Finding("build lock", "warn", f"{lock} is {age:.0f} s old",
                          "wait for the build; delete it if none is running")
    if not locks:
        yield Finding("build lock", "ok", f"none in {root}")


# -------------------------------------------------------------------------------------- machine


def check_numactl(asked: Asked) -> Iterator[Finding]:
    if shutil.which("numactl"):
        yield Finding("numactl", "ok", "found")
    elif asked.has_gpu:
        yield Finding("numactl", "ok", "not found; only CPU runs with --bind_cores_to_rank need it")
    else:
        yield Finding("numactl", "warn", "not found: deepspeed --bind_cores_to_rank needs it",
                      "apt install numactl")


def check_port(asked: Asked) -> Iterator[Finding]:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", 0))
        except OSError as error:
            yield Finding("free port", "fail", f"none on 127.0.0.1: {error.strerror}",
                          "allow this user to listen there; ranks meet on a port")
            return
        free = probe.getsockname()[1]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", DEEPSPEED_PORT))
            yield Finding("free port", "ok", f"{DEEPSPEED_PORT}, DeepSpeed's, is free")
        except OSError:
            yield Finding("free port", "warn", f"{DEEPSPEED_PORT}, DeepSpeed's, is in use",
                          f"type deepspeed --master_port {free} ...")


def room(name: str, folder: Path, needed: float, wanted: float, what: str) -> Finding:
    """Free room on the disk of a folder that exists or is to be made.

    Args:
        needed, wanted: bytes; below `needed` it fails, below `wanted` it warns.
        what: what the room is for.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return Finding(name, "fail", f"{place} cannot be written", "give another folder")
    free = shutil.disk_usage(place).free
    found = f"{place}: {free / GIB:.1f} GiB free"
    if free >= wanted:
        return Finding(name, "ok", found)
    remedy = f"make room: {what}"
    return Finding(name, "fail" if free < needed else "warn", found, remedy)


def check_disk(asked: Asked) -> Iterator[Finding]:
    yield room("output_dir", asked.output_dir, GIB, 20 * GIB,
               "a checkpoint of BERT-base takes 1.4 GiB, and --save_total_limit + 1 exist at once")
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        yield Finding("temporary files", "fail", str(error.strerror), "set TMPDIR")
    else:
        yield room("temporary files", folder, GIB / 16, GIB, "or set TMPDIR to another disk")
    if SHARED_MEMORY.is_dir():
        total = shutil.disk_usage(SHARED_MEMORY).total
        found = f"{SHARED_MEMORY}: {total / GIB:.2f} GiB"
        if total >= GIB / 4 or not asked.has_gpu:
            yield Finding("shared memory", "ok", found)
        else:
            yield Finding("shared memory", "warn", f"{found}; NCCL may need more",
                          "start the container with --shm-size=1g")


def check_limits(asked: Asked) -> Iterator[Finding]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= 4096:
        yield Finding("open files", "ok", f"at most {soft}")
    else:
        most = "unlimited" if hard == resource.RLIM_INFINITY else str(min(hard, 65536))
        yield Finding("open files", "fail" if soft < 256 else "warn",
                      f"at most {soft}; a store of many shards needs more", f"ulimit -n {most}")


def check_huge_pages(asked: Asked) -> Iterator[Finding]:
    if not HUGE_PAGES.is_file():
        return
    chosen = re.search(r"\[(\w+)\]", HUGE_PAGES.read_text())
    found = chosen[1] if chosen else "unknown"
    if found == "never" and not asked.has_gpu:
        yield Finding("huge pages", "warn", "never: large tensors are slower on CPUs",
                      f"echo madvise > {HUGE_PAGES}, as root")
    else:
        yield Finding("huge pages", "ok", found)


CHECKS: tuple[Callable[[Asked], Iterator[Finding]], ...] = (
    check_python, check_packages, check_torch, check_precision, check_compiler, check_nvcc,
    check_triton, check_build_locks, check_numactl, check_port, check_disk, check_limits,
    check_huge_pages,
)


# ------------------------------------------------------------------------------------- the command


def sees_gpu() -> bool:
    """Whether torch sees a GPU; no, if it cannot be imported."""
    try:
        import torch

        return torch.cuda.is_available()
    except Exception:
        return False  # `check_torch` says what is wrong


def examine(output_dir: Path) -> list[Finding]:
    """All findings, in the order of `CHECKS`; a check that breaks is a finding too."""
    asked = Asked(output_dir, sees_gpu())
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings += check(asked)
        except Exception as error:
            name = check.__name__.removeprefix("check_")
            text = " ".join(f"{type(error).__name__}: {error}".split())
            findings.append(Finding(name, "fail", text, INSTALL))
    return findings


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    class Parser(OneLineMistakes, argparse.ArgumentParser):
        pass

    parser = Parser(description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs",
                        help="folder for runs, whose disk is looked at (default runs)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command.

    Raises:
        ConfigError: something necessary is missing; the table says what to do.
    """
    options = parse_arguments(argv)
    findings = examine(Path(options.output_dir))
    failed = [finding.name for finding in findings if finding.status == "fail"]
    if options.json:
        checks = [asdict(finding) for finding in findings]
        say(json.dumps({"ok": not failed, "checks": checks}, indent=1))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            remedy = f"  ->  {finding.remedy}" if finding.remedy else ""
            say(f"{finding.status:4}  {finding.name:{width}}  {finding.found}{remedy}")
    if failed:
        raise ConfigError(f"not ready to train: {', '.join(failed)}; do what the table says")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    run_command(main)
