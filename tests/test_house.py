"""The arrows of the house: who may import whom, and which file alone knows what."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("preprocess", "train", "csrc")
ALLOWED = {"preprocess": {"preprocess"}, "train": {"train", "preprocess", "csrc"}, "csrc": {"csrc"}}
COMMANDS = {
    "preprocess": {"tokenize_corpus", "train_tokenizer", "build_masks", "show_masks", "benchmark"},
    "train": {"pretrain", "finetune", "annotate", "fit_scorer", "score_tokens", "benchmark",
              "benchmark_data", "benchmark_inference", "report", "pipeline", "doctor"},
    "csrc": {"benchmark"},
}
# Slow to import, or not there on every machine: only inside the function that needs them.
HEAVY = {"deepspeed", "triton", "matplotlib", "datasets", "tensorboard", "transformers"}
# Kernels are defined where they are imported, so this file is imported only where it is needed.
AT_THE_TOP = {("triton", "masked_lm_triton.py")}
TOP_LEVEL = {
    "README.md", "setup.cfg", "pyproject.toml", "constraints.txt", "Makefile", ".ci",
    ".gitignore", "ds_configs", "preprocess", "train", "csrc", "tests",
}
FILES = sorted(path for room in ROOMS for path in (ROOT / room).glob("*.py"))


def imports(path: Path) -> list[tuple[str, bool]]:
    """Every imported module of a file, and whether it is imported at the top level.

    Imports under `if TYPE_CHECKING:` do not run and do not count.
    """
    tree = ast.parse(path.read_text())
    found = []

    def visit(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path.name}: relative import"
                found.append((child.module, top))
                if child.module in ROOMS:
                    found.extend((f"{child.module}.{alias.name}", top) for alias in child.names)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            else:
                visit(child, top and not isinstance(child, (ast.FunctionDef, ast.ClassDef)))

    visit(tree, True)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_arrows(path):
    room = path.parent.name
    for module, top in imports(path):
        parts = module.split(".")
        if parts[0] in ROOMS:
            assert parts[0] in ALLOWED[room], f"{room} must not import {module}"
            if len(parts) > 1:
                assert parts[1] not in COMMANDS[parts[0]], f"{module} is a command"
        if parts[0] in HEAVY and (parts[0], path.name) not in AT_THE_TOP:
            assert not top, f"{module} is imported at the top of {path.name}"
        if module == "csrc.masked_lm_triton":
            assert not top, f"{path.name} needs triton as soon as it is imported"
        if room == "csrc":
            known = {"torch", "triton", "csrc", "__future__"}
            assert parts[0] in known or parts[0] in __import__("sys").stdlib_module_names
        if parts[0] == "deepspeed":
            assert path.name == "engine.py", "only train/engine.py imports deepspeed"


def test_only_model_names_model_classes():
    for path in FILES:
        if path.name == "model.py":
            continue
        names = {
            node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)
        }
        classes = {name for name in names if name.startswith("AutoModel") or "ForMaskedLM" in name}
        assert not classes, f"{path}: {classes}"


def test_only_store_opens_the_binary():
    for path in FILES:
        if path.name != "store.py":
            assert "memmap" not in path.read_text(), f"{path.name} maps a file itself"


def test_no_rooms_without_a_name():
    for path in FILES:
        assert path.stem not in ("utils", "common", "helpers")
        assert path.stem not in __import__("sys").stdlib_module_names, path


def test_top_level_stays():
    ignored = {".git", ".venv", "runs", ".pytest_cache", ".mypy_cache", ".ruff_cache",
               ".hypothesis", "build", "selmask.egg-info", "__pycache__"}
    assert {path.name for path in ROOT.iterdir()} - ignored == TOP_LEVEL


def test_commands_end_through_run_command():
    for room, names in COMMANDS.items():
        for name in names:
            text = (ROOT / room / f"{name}.py").read_text()
            assert 'if __name__ == "__main__":' in text
            assert "run_command(main)" in text or room == "csrc"


def test_nothing_loaded_can_run_code():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called == "torch.load":
                assert given.get("weights_only") == "True", path
            if called == "np.load":
                assert given.get("allow_pickle", "False") == "False", path
            assert called not in ("yaml.load", "pickle.load", "pickle.loads", "os.system"), path


def test_b18_everything_imported_is_declared():
    import configparser
    import sys

    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    text = setup["options"]["install_requires"] + "".join(setup["options.extras_require"].values())
    declared = {line.split(">")[0].split("=")[0].strip() for line in text.splitlines() if line}
    named = {"yaml": "pyyaml"}
    # transformers brings tokenizers and huggingface_hub; datasets brings pyarrow.
    brought = {"tokenizers", "huggingface_hub", "pyarrow", "triton"}
    for path in FILES:
        for module, _ in imports(path):
            root = module.split(".")[0]
            if root not in sys.stdlib_module_names and root not in (*ROOMS, *brought):
                assert named.get(root, root) in declared, f"{path.name} imports {root}"


def test_lines_are_short_and_ascii():
    for path in [*FILES, *sorted((ROOT / "tests").glob("*.py"))]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 100, f"{path.name}:{number} is longer than 100 columns"
