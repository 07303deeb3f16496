"""The doctor: its findings on a machine where something is missing."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from preprocess.errors import run_command
from train import doctor

CPU = doctor.Asked(Path("runs"), has_gpu=False)
GPU = doctor.Asked(Path("runs"), has_gpu=True)
ROOT = Path(__file__).resolve().parents[2]


def found(check, asked=CPU) -> dict[str, doctor.Finding]:
    """The findings of one check by name; each that is not ok says what to do."""
    findings = {finding.name: finding for finding in check(asked)}
    for finding in findings.values():
        assert finding.status in ("ok", "warn", "fail")
        assert bool(finding.remedy) == (finding.status != "ok")
        assert "\n" not in finding.found + finding.remedy
    return findings


def statuses(check, asked=CPU) -> dict[str, str]:
    return {name: finding.status for name, finding in found(check, asked).items()}


def not_installed(name: str) -> str:
    """Stand in for what asks `importlib.metadata` about a package."""
    raise metadata.PackageNotFoundError(name)


def script(folder: Path, name: str, text: str) -> None:
    """An executable of that name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


# ------------------------------------------------------------------------------------- versions


def test_packages_are_held_against_the_requirements_of_selmask(monkeypatch):
    versions = {"deepspeed": "0.15.0", "torch": "2.13.0+cpu", "numpy": "2.0.0rc1", "extra": "0.1"}

    monkeypatch.setattr(
        metadata, "version", lambda name: versions.get(name) or not_installed(name))
    monkeypatch.setattr(metadata, "metadata", lambda name: {"Requires-Python": ">=9.1"})
    monkeypatch.setattr(metadata, "requires", lambda name: [
        "deepspeed<0.20,>=0.19.8", "torch>=2.10", "numpy>=1.26", "absent", 'extra>1; extra == "dev"'
    ])
    findings = found(doctor.check_packages)
    assert {name: finding.status for name, finding in findings.items()} == {
        "python": "fail", "deepspeed": "fail", "torch": "ok", "numpy": "ok", "absent": "fail"}
    assert "needs >=9.1" in findings["python"].found
    assert findings["torch"].found == "2.13.0+cpu, needs >=2.10"
    assert findings["deepspeed"].found == "0.15.0, needs <0.20,>=0.19.8"
    assert "constraints.txt" in findings["deepspeed"].remedy
    monkeypatch.setattr(doctor, "IS_CLONE", False)
    assert found(doctor.check_packages)["deepspeed"].remedy == (
        "pip install 'deepspeed<0.20,>=0.19.8'")


@pytest.mark.parametrize("absent", ["packaging", "selmask"])
def test_before_anything_is_installed(absent, monkeypatch):
    if absent == "packaging":
        for module in ("packaging", "packaging.requirements"):
            monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(metadata, "metadata", not_installed)
    findings = found(doctor.check_packages)
    assert findings["python"].status == "ok" and findings["packages"].remedy == doctor.INSTALL
    assert findings["packages"].found.startswith(absent)


def test_the_doctor_needs_the_standard_library_alone():
    script = ("import sys, train.doctor\n"
              "print(*{name.partition('.')[0] for name in sys.modules})")
    done = subprocess.run([sys.executable, "-S", "-c", script], cwd=ROOT, capture_output=True,
                          text=True, check=True)
    # multiprocessing gives the main module a second name.
    others = set(done.stdout.split()) - set(sys.stdlib_module_names) - {"__mp_main__"}
    assert others == {"__main__", "preprocess", "train"}


def test_packages_of_another_clone(tmp_path, monkeypatch):
    assert str(ROOT) in found(doctor.check_imports)["imports"].found
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "csrc", raising=False)
    finding = found(doctor.check_imports)["imports"]
    assert finding.status == "fail" and f"csrc from {tmp_path}" in finding.found
    assert finding.remedy == f"set PYTHONPATH={ROOT}"


# ---------------------------------------------------------------------------------- torch, device


def test_a_driver_that_torch_does_not_use(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor, "NVIDIA_DRIVER", tmp_path / "absent")
    assert statuses(doctor.check_torch) == {"torch build": "ok", "GPU": "ok"}
    monkeypatch.setattr(doctor, "NVIDIA_DRIVER", tmp_path)
    assert "install a torch built for CUDA" in found(doctor.check_torch)["torch build"].remedy


def test_precision_is_what_deepspeed_says(monkeypatch):
    monkeypatch.setattr("train.engine.supported_precisions", lambda: {"fp16": False, "bf16": True})
    for is_fast, end in ((False, "; --precision auto trains in fp32, which is faster on this CPU"),
                         (True, "; bf16 is the faster one: --deepspeed_config zero1_bf16")):
        monkeypatch.setattr("train.engine.has_fast_bf16", lambda value=is_fast: value)
        assert found(doctor.check_precision)["precision"].found == "fp32, bf16" + end
    assert found(doctor.check_precision, GPU)["precision"].found == "fp32, bf16"


# ---------------------------------------------------------------------------------- compilers


def test_missing_compilers(tmp_path, monkeypatch):
    """On a CPU only some options need them; on a GPU DeepSpeed's Adam does."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert statuses(doctor.check_compiler) == {"C++ compiler": "warn", "ninja": "warn"}
    assert statuses(doctor.check_compiler, GPU) == {"C++ compiler": "fail", "ninja": "fail"}
    assert statuses(doctor.check_nvcc) == {}
    assert statuses(doctor.check_nvcc, GPU) == {"nvcc": "warn"}
    script(tmp_path, "c++", "exit 1")  # there, and broken
    script(tmp_path, "ninja", "echo 1.13")
    assert statuses(doctor.check_compiler, GPU) == {"C++ compiler": "fail", "ninja": "ok"}
    script(tmp_path / "own", "mycc", "echo my compiler 3")
    monkeypatch.setenv("CXX", str(tmp_path / "own" / "mycc"))
    assert found(doctor.check_compiler)["C++ compiler"].found == "my compiler 3"


def test_nvcc_of_another_cuda(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    script(tmp_path / "bin", "nvcc", "echo Cuda compilation tools, release 12.4, V12.4.131")
    assert statuses(doctor.check_nvcc, GPU) == {"nvcc": "ok"}
    script(tmp_path / "bin", "nvcc", "echo Cuda compilation tools, release 11.8, V11.8.89")
    nvcc = found(doctor.check_nvcc, GPU)["nvcc"]
    assert nvcc.status == "warn" and "11.8" in nvcc.found and "CUDA 12" in nvcc.remedy


def test_triton_is_for_a_gpu(monkeypatch):
    monkeypatch.setattr(metadata, "version", not_installed)
    assert statuses(doctor.check_triton) == {"triton": "ok"}
    assert statuses(doctor.check_triton, GPU) == {"triton": "warn"}


# ---------------------------------------------------------------------------------- machine


def test_a_port_in_use(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setattr(doctor, "DEEPSPEED_PORT", taken.getsockname()[1])
        finding = found(doctor.check_port)["free port"]
    assert finding.status == "warn" and "--master_port" in finding.remedy
    assert statuses(doctor.check_port) == {"free port": "ok"}

    def refused(self, address):
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refused)
    assert statuses(doctor.check_port) == {"free port": "fail"}


def test_full_disks(tmp_path, monkeypatch):
    def disk(free: float):
        usage = SimpleNamespace(free=free * doctor.GIB, total=free * doctor.GIB)
        monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)

    asked = doctor.Asked(tmp_path / "not" / "yet" / "made", has_gpu=True)
    for free, expected in ((100, ["ok", "ok"]), (10, ["warn", "ok"]), (0.5, ["fail", "warn"]),
                           (0.01, ["fail", "fail"])):
        disk(free)
        assert list(statuses(doctor.check_disk, asked).values()) == expected
    assert "100.0 GiB" not in found(doctor.check_disk, asked)["output_dir"].found
    assert f"{tmp_path}:" in found(doctor.check_disk, asked)["output_dir"].found
    assert not (tmp_path / "not").exists()
    disk(100)
    (tmp_path / "file").touch()
    blocked = doctor.Asked(tmp_path / "file" / "runs", has_gpu=False)
    assert found(doctor.check_disk, blocked)["output_dir"].remedy == "give another folder"
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert statuses(doctor.check_disk, asked)["output_dir"] == "fail"


def test_a_low_limit_of_open_files(monkeypatch):
    import resource

    for soft, expected in ((64, "fail"), (1024, "warn"), (4096, "ok"),
                           (resource.RLIM_INFINITY, "ok")):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, soft=soft: (soft, 8192))
        assert statuses(doctor.check_limits) == {"open files": expected}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (64, 8192))
    assert found(doctor.check_limits)["open files"].remedy == "ulimit -n 8192"


# ---------------------------------------------------------------------------------- the command


def test_a_package_that_cannot_be_imported_hides_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # `import torch` raises
    findings = {finding.name: finding for finding in doctor.examine(Path("runs"))}
    assert findings["torch"].status == "fail" and "ModuleNotFoundError" in findings["torch"].found
    # It is not a second finding that a package is absent which is listed as such.
    monkeypatch.setattr(doctor, "check_packages", lambda asked: iter([
        doctor.Finding("torch", "fail", "not installed", "install it")]))
    monkeypatch.setattr(doctor, "CHECKS", (doctor.check_packages, doctor.check_torch))
    assert [one.found for one in doctor.examine(Path("runs"))] == ["not installed"]
    assert {"python", "ninja", "free port", "output_dir", "open files"} <= findings.keys()


@pytest.mark.parametrize("status", ["ok", "warn", "fail"])
@pytest.mark.parametrize("as_json", [False, True])
def test_table_and_exit_code(status, as_json, monkeypatch, capsys):
    def check(asked):
        assert asked.output_dir == Path("there")
        yield doctor.Finding("disk", "ok", "enough")
        yield doctor.Finding("compiler", status, "does not run", "" if status == "ok" else "get it")

    monkeypatch.setattr(doctor, "CHECKS", (check,))
    words = ["--output_dir", "there", *(["--json"] if as_json else [])]
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: doctor.main(words))
    out, err = capsys.readouterr()
    assert stopped.value.code == (2 if status == "fail" else 0)
    if as_json:
        told = json.loads(out)
        assert told["ok"] == (status != "fail")
        assert [one["status"] for one in told["checks"]] == ["ok", status]
    else:
        first, second = out.splitlines()
        assert first == "ok    disk      enough"
        assert second.startswith(f"{status:4}  compiler  does not run")
        assert ("->  get it" in second) == (status != "ok")
    assert err.count("\n") == (status == "fail")
    if status == "fail":
        assert "not ready to train: compiler" in err


@pytest.mark.slow
def test_the_command_on_this_machine(run_command_line, tmp_path):
    done = run_command_line("-m", "train.doctor", "--json", "--output_dir", tmp_path, check=False)
    told = json.loads(done.stdout)
    assert done.returncode == (0 if told["ok"] else 2), done.stderr
    names, texts = ([one[key] for one in told["checks"]] for key in ("name", "found"))
    assert len(set(names)) == len(names)
    long = [text for text in texts if len(text) > 10]  # versions may be equal
    assert len(set(long)) == len(long)
    assert {"python", "deepspeed", "precision", "C++ compiler", "imports", "open files"} <= set(
        names)
    assert all(one["remedy"] for one in told["checks"] if one["status"] != "ok")
    assert not list(tmp_path.iterdir())
