"""The installed package: a wheel in an environment of its own, used from a hostile folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from preprocess.errors import ConfigError
from tests.support.launch import ROOT, free_port, launch_environment
from train.engine import read_ds_config
from train.recipes.plan import plan
from train.recipes.recipe import load_recipe
from train.shipped import DS_CONFIGS, RECIPES, find_shipped

# Modules of ours, and folders with a face, that a user's own folder may well hold.
OTHERS = ("train.py", "preprocess.py", "csrc/__init__.py", "ds_configs/__init__.py")

# ------------------------------------------------------------------------------- found by name


@pytest.mark.parametrize("given", [
    "cpu", "cpu.json", "ds_configs/cpu.json", str(DS_CONFIGS / "cpu.json")])
def test_a_json_is_found_from_any_folder(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = json.loads((ROOT / "ds_configs" / "cpu.json").read_text())
    assert read_ds_config(given) == ours


def test_a_path_is_the_users_and_a_name_is_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("cpu", "cpu.json", "ds_configs/cpu.json", "mine.json"):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text('{"gradient_clipping": 7}')
    for given in ("./cpu", "cpu.json", "ds_configs/cpu.json", "mine.json"):
        assert read_ds_config(given) == {"gradient_clipping": 7}
    assert read_ds_config("cpu") != {"gradient_clipping": 7}


def test_a_recipe_is_found_by_name_and_extended_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = load_recipe("demo_quick", [])
    assert one == load_recipe(ROOT / "train" / "recipes" / "demo_quick.yaml", [])
    Path("mine.yaml").write_text("extends: demo_quick\npretrain_seeds: [1]\n")
    assert load_recipe("mine.yaml", []) == {**one, "pretrain_seeds": [1]}
    steps, _ = plan({**one, "deepspeed_config": "zero1_bf16"}, "R")
    given = {step.command[step.command.index("--deepspeed_config") + 1] for step in steps
             if "--deepspeed_config" in step.command}
    assert given == {str(ROOT / "ds_configs" / "zero1_bf16.json")}


@pytest.mark.parametrize(("given", "folder", "message"), [
    ("zero1_fp17", DS_CONFIGS, "zero1_fp17: no such file; give a path, or one of the names cpu, "
     "zero1_bf16, zero1_fp16, zero2_fp16, zero2_fp16_offload, zero3_fp16"),
    ("../ds_configs/cpu", DS_CONFIGS, "no such file"),
    ("README", DS_CONFIGS, "no such file"),
    ("", RECIPES, "no such file"),
    ("costom", RECIPES, "costom: no such file; give a path, or one of the names custom, demo, "),
])
def test_an_unknown_name_is_answered_by_those_there_are(given, folder, message):
    with pytest.raises(ConfigError) as error:
        find_shipped(given, folder, "--flag")
    assert message in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------ the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of a copy of these sources: the build leaves files beside them."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("preprocess", "train", "csrc", "ds_configs"):
        shutil.copytree(ROOT / name, source / name,
                        ignore=shutil.ignore_patterns("__pycache__", "runs"))
    for name in ("selmask.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation",
         "--no-index", "--quiet", "--wheel-dir", str(folder)], check=True)
    (made,) = folder.glob("selmask-*.whl")
    return made


@pytest.mark.slow
def test_the_wheel_holds_all_sources_and_nothing_else(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        path.relative_to(ROOT).as_posix() for wing in ("preprocess", "train", "csrc", "ds_configs")
        for path in (ROOT / wing).rglob("*")
        if path.suffix in (".py", ".yaml", ".json") or path.name == "py.typed"
    }
    assert held == expected | {"selmask.py"}
    assert {f"{wing}/py.typed" for wing in ("preprocess", "train", "csrc")} <= held


@pytest.fixture(scope="module")
def scripts(wheel, tmp_path_factory) -> Path:
    """The folder of the commands of an environment with the wheel and the packages of this one."""
    venv = tmp_path_factory.mktemp("venv") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    (packages / "these.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python"), "install",
         "--no-deps", "--no-index", "--quiet", str(wheel)], check=True)
    return venv / "bin"


@pytest.fixture
def hostile(tmp_path) -> Path:
    """A working folder with files of the names of our packages, which fail where they are run."""
    folder = tmp_path / "work"
    for name in OTHERS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"raise SystemExit('{name} of the working folder was run')\n")
    return folder


def start(words: list[str | Path], folder: Path, **environment: str) -> str:
    """Run a command in a folder; return its output."""
    inherited = {key: value for key, value in launch_environment().items() if key != "PYTHONPATH"}
    done = subprocess.run(list(map(str, words)), cwd=folder, env={**inherited, **environment},
                          text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_nothing_in_the_working_folder_is_taken_for_the_installed_package(
    scripts, hostile, reviews_file, tiny_encoder
):
    selmask, python = scripts / "selmask", scripts / "python"
    packages = str(next(scripts.parent.glob("lib/python*/site-packages")))
    # An empty entry in PYTHONPATH is the working folder.
    found = start([selmask, "doctor"], hostile, PYTHONPATH=os.pathsep)
    assert f"preprocess, train, csrc from {packages}\n" in found
    start([selmask, "tokenize_corpus", "--input", reviews_file, "--tokenizer", tiny_encoder,
           "--output", "tokens/reviews", "--num_workers", "2"], hostile)
    training = ["--tokens", "tokens/reviews", "--model_name_or_path", tiny_encoder, "--max_steps",
                "5", "--train_batch_size", "8", "--max_seq_length", "32", "--eval_fraction", "0",
                "--deepspeed_config", "zero1_fp16", "--output_dir"]
    start([selmask, "pretrain", *training, "one"], hostile)
    launcher = [python, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port",
                free_port(), "--module"]
    # DeepSpeed puts the working folder into the PYTHONPATH of the ranks of several nodes.
    start([*launcher, "selmask", "pretrain", *training, "two"], hostile, PYTHONPATH=str(hostile))
    (hostile / "train.py").unlink()  # `python -m train.pretrain` would find it before anything
    start([python, "-m", "train.pretrain", *training, "three"], hostile)
    for run in ("one", "two", "three"):
        env = json.loads((hostile / run / "env.json").read_text())
        assert env["versions"]["selmask"] and env["commit"] is None
        assert (hostile / run / "hf" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "python"])
def test_an_installed_pipeline_runs_its_steps(
    launcher, scripts, hostile, reviews_file, labelled_files, tiny_encoder
):
    settings = [
        f"train_file={labelled_files['train']}", f"test_file={labelled_files['test']}",
        f"text={reviews_file}", f"encoder={tiny_encoder}", "deepspeed_config=cpu", "arms=[random]",
        "task_guided.max_steps=2", "task_guided.train_batch_size=8", "task_guided.warmup_ratio=0",
        "task_guided.max_seq_length=32", "finetune.num_train_epochs=1", "finetune.seeds='13'",
        "finetune.max_seq_length=32",
    ]
    out = start([scripts / "selmask", "pipeline", "--recipe", "custom", "--output_dir", "run",
                 "--launcher", launcher, "--go_on", "--set", *settings], hostile)
    assert "  selmask tokenize_corpus --input " in out
    typed = "deepspeed --num_gpus 1 --module selmask" if launcher == "deepspeed" else "selmask"
    assert f"  {typed} pretrain --deepspeed_config " in out
    assert (hostile / "run" / "report" / "table.csv").is_file()
