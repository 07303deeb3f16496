"""Check whether this machine can train, and what to do if not.

    python train/doctor.py --output_dir runs

Exit code 0 if everything necessary is there, 2 otherwise; a warning costs speed or a feature, not
the run. The doctor itself needs only Python, and each check imports what it looks at, so that one
broken package does not hide the others. It writes nothing and needs no network. `ds_report` of
DeepSpeed lists which of its compiled operations fit the machine.
"""

from __future__ import annotations

import contextlib
import importlib.util
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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from preprocess.errors import ConfigError, run_command
from preprocess.flags import USUAL, Parser
from preprocess.progress import show

ROOT = Path(__file__).resolve().parents[1]
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
DEEPSPEED_PORT = 29500  # the default of DeepSpeed's launcher
GIB = 2**30
IS_CLONE = (ROOT / "constraints.txt").is_file()
INSTALL = ("pip install -c constraints.txt -e ." if IS_CLONE
           else "install selmask again, from the wheel or folder that it came from")


@dataclass(frozen=True)
class Finding:
    """One line of the table. `status` is ok, warn or fail; `remedy` is what to type or change."""

    name: str
    status: str
    found: str
    remedy: str = ""


def judge(ok: object, name: str, found: str, remedy: str, otherwise: str = "fail") -> Finding:
    """Return a finding that is ok, or has the status `otherwise` and a remedy."""
    return Finding(name, "ok", found) if ok else Finding(name, otherwise, found, remedy)


@dataclass(frozen=True)
class Asked:
    """What the checks are about: the folder for runs, and whether torch sees a GPU."""

    output_dir: Path
    has_gpu: bool

    @property
    def if_missing(self) -> str:
        """The status where something is missing that only DeepSpeed's compiled operations need.

        On a GPU its Adam is compiled at first use; on a CPU that of torch is used.
        """
        return "fail" if self.has_gpu else "warn"


# ------------------------------------------------------------------------------------- software


def check_imports(asked: Asked) -> Iterator[Finding]:
    """Compare where our packages are imported from: their names are generic."""
    specs = {name: importlib.util.find_spec(name) for name in ("preprocess", "train", "csrc")}
    found = {name: Path(spec.origin).resolve().parents[1] if spec and spec.origin else None
             for name, spec in specs.items()}
    places = ", ".join(f"{name} from {place}" for name, place in found.items())
    if len(set(found.values())) == 1:
        places = f"{', '.join(found)} from {found['train']}"
    yield judge(set(found.values()) == {ROOT}, "imports", places, f"set PYTHONPATH={ROOT}")


def check_packages(asked: Asked) -> Iterator[Finding]:
    """Compare the versions of Python and of each package with those that selmask requires."""
    version = platform.python_version()
    try:
        from packaging.requirements import Requirement
        from packaging.specifiers import SpecifierSet

        limits = metadata.metadata("selmask")["Requires-Python"]
        lines = metadata.requires("selmask") or []
    except ImportError as error:  # of packaging, or selmask is not installed
        yield Finding("python", "ok", version)
        yield Finding("packages", "fail", f"{error.name} is not installed", INSTALL)
        return
    yield judge(SpecifierSet(limits).contains(version), "python", f"{version}, needs {limits}",
                "install another Python")
    for package in map(Requirement, lines):
        if package.marker and not package.marker.evaluate({"extra": ""}):
            continue
        remedy = INSTALL if IS_CLONE else f"pip install '{package.name}{package.specifier}'"
        try:
            version = metadata.version(package.name)
        except metadata.PackageNotFoundError:
            yield Finding(package.name, "fail", "not installed", remedy)
            continue
        needed = f", needs {package.specifier}" if package.specifier else ""
        yield judge(package.specifier.contains(version, prereleases=True), package.name,
                    f"{version}{needed}", remedy)


def check_torch(asked: Asked) -> Iterator[Finding]:
    import torch

    build = torch.version.cuda or torch.version.hip
    found = f"for {f'CUDA {build}' if build else 'CPUs'}"
    unused = NVIDIA_DRIVER.exists() and not asked.has_gpu
    yield judge(not unused, "torch build", found + ", with an NVIDIA driver" * unused,
                "compare nvidia-smi with the build" if build else "install a torch built for CUDA",
                "warn")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield Finding(
            f"GPU {index}", "ok",
            f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, compute {gpu.major}.{gpu.minor}",
        )
    if not asked.has_gpu:
        yield Finding("GPU", "ok", f"none: training on {os.cpu_count()} CPU cores")


def check_precision(asked: Asked) -> Iterator[Finding]:
    from train.engine import has_fast_bf16, supported_precisions

    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints what it finds
        supported = supported_precisions()
    found = ", ".join(["fp32", *(name for name, there in supported.items() if there)])
    if not asked.has_gpu:
        found += ("; bf16 is the faster one: --deepspeed_config zero1_bf16" if has_fast_bf16()
                  else "; --precision auto trains in fp32, which is faster on this CPU")
    yield Finding("precision", "ok", found)


# ------------------------------------------------------------------------------------- compilers


def printed(*command: str) -> str:
    """Return what a command prints; nothing if it is absent or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def check_compiler(asked: Asked) -> Iterator[Finding]:
    for name, command, users, remedy in (
        ("C++ compiler", os.environ.get("CXX", "c++"), "--torch_compile and DeepSpeed's operations",
         "apt install g++, or set CXX"),
        ("ninja", "ninja", "DeepSpeed's operations", "pip install ninja"),
    ):
        version = printed(command, "--version").partition("\n")[0].strip()
        missing = f"{command} does not run; {users} need it"
        yield judge(version, name, version or missing, remedy, asked.if_missing)


def check_nvcc(asked: Asked) -> Iterator[Finding]:
    if not asked.has_gpu:
        return
    import torch

    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home, "bin", "nvcc")) if home else "nvcc"
    release = re.search(r"release (\d+)(\.\d+)", printed(nvcc, "--version"))
    built = str(torch.version.cuda)
    if release is None:
        yield Finding(
            "nvcc", "warn", f"{nvcc} does not run; DeepSpeed's own Adam is compiled with it, which "
            'offloading and "torch_adam": false use',
            f"install the CUDA {built} toolkit, or leave both out of the DeepSpeed JSON",
        )
    else:
        major = built.split(".")[0]
        yield judge(release[1] == major, "nvcc", f"CUDA {release[1]}{release[2]}, torch is built "
                    f"for {built}", f"set CUDA_HOME to a CUDA {major} toolkit", "warn")


def check_triton(asked: Asked) -> Iterator[Finding]:
    try:
        yield Finding("triton", "ok", metadata.version("triton"))
    except metadata.PackageNotFoundError:
        yield judge(not asked.has_gpu, "triton", "not installed; on a GPU the slow MLM head is "
                    "used without it", "pip install triton", "warn")


# -------------------------------------------------------------------------------------- machine


def check_port(asked: Asked) -> Iterator[Finding]:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", 0))
        except OSError as error:
            yield Finding("free port", "fail", f"none on 127.0.0.1: {error.strerror}",
                          "allow this user to listen there: ranks meet at a port")
            return
        free = probe.getsockname()[1]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", DEEPSPEED_PORT))
            yield Finding("free port", "ok", f"DeepSpeed's {DEEPSPEED_PORT} is free")
        except OSError:
            yield Finding("free port", "warn", f"DeepSpeed's {DEEPSPEED_PORT} is in use",
                          f"type deepspeed --master_port {free} ...")


def room(name: str, folder: Path, needed: float, wanted: float, what: str) -> Finding:
    """Judge the free space on the disk of a folder that exists or is still to be made.

    Args:
        needed, wanted: bytes; below `needed` it fails, below `wanted` it warns.
        what: what needs the space.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return Finding(name, "fail", f"{place} cannot be written", "give another folder")
    free = shutil.disk_usage(place).free
    return judge(free >= wanted, name, f"{place}: {free / GIB:.1f} GiB free",
                 f"free some space: {what}", "fail" if free < needed else "warn")


def check_disk(asked: Asked) -> Iterator[Finding]:
    yield room("output_dir", asked.output_dir, GIB, 20 * GIB,
               "a checkpoint of BERT-base takes 1.4 GiB, and --save_total_limit + 1 exist at once")
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        yield Finding("temporary files", "fail", str(error.strerror), "set TMPDIR")
    else:
        yield room("temporary files", folder, GIB / 16, GIB, "or set TMPDIR to another disk")


def check_limits(asked: Asked) -> Iterator[Finding]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = "unlimited" if hard == resource.RLIM_INFINITY else str(min(hard, 65536))
    yield judge(soft == resource.RLIM_INFINITY or soft >= 4096, "open files",
                f"at most {soft}; a store of many shards needs 4096", f"ulimit -n {most}",
                "fail" if soft < 256 else "warn")


CHECKS: tuple[Callable[[Asked], Iterator[Finding]], ...] = (
    check_imports, check_packages, check_torch, check_precision, check_compiler, check_nvcc,
    check_triton, check_port, check_disk, check_limits,
)


# ------------------------------------------------------------------------------------- the command


def sees_gpu() -> bool:
    """Return whether torch sees a GPU; no, if it cannot be imported."""
    try:
        import torch

        return torch.cuda.is_available()
    except Exception:
        return False  # `check_torch` reports what is wrong


def examine(output_dir: Path) -> list[Finding]:
    """Return all findings, in the order of `CHECKS`; a check that breaks is a finding too."""
    asked = Asked(output_dir, sees_gpu())
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings += check(asked)
        except Exception as error:
            failed = {finding.name for finding in findings if finding.status == "fail"}
            if isinstance(error, ModuleNotFoundError) and error.name in failed:
                continue  # that it is missing is listed already
            name = check.__name__.removeprefix("check_")
            text = " ".join(f"{type(error).__name__}: {error}".split())
            findings.append(Finding(name, "fail", text, INSTALL))
    return findings


def main(argv: list[str] | None = None) -> None:
    """Print the findings.

    Raises:
        ConfigError: something necessary is missing; the table says what to do.
    """
    parser = Parser(description=__doc__)
    add = parser.add_argument_group(USUAL).add_argument
    add("--output_dir", default="runs", metavar="DIR",
        help="folder for runs, to check the free space of its disk")
    add("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # ASCII terminals
    findings = examine(Path(options.output_dir))
    failed = [finding.name for finding in findings if finding.status == "fail"]
    if options.json:
        checks = [asdict(finding) for finding in findings]
        show(json.dumps({"ok": not failed, "checks": checks}, indent=1))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            remedy = f"  ->  {finding.remedy}" if finding.remedy else ""
            show(f"{finding.status:4}  {finding.name:{width}}  {finding.found}{remedy}")
    if failed:
        raise ConfigError(f"not ready to train: {', '.join(failed)}; do what the table says")


if __name__ == "__main__":
    run_command(main)
