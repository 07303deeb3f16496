"""The arrows of the house: which room may import which, and what only one room knows."""

from __future__ import annotations

import ast
import configparser
import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from preprocess.errors import ConfigError
from preprocess.masking import STRATEGIES, Sequences, Strategy
from preprocess.store import TokenStore, open_array, write_array
from tests.support.runs import logged, pretrained
from tests.support.stores import MEASURED
from train.run_dir.metrics import MASKED_FRACTION

ROOT = Path(__file__).resolve().parents[1]
WINGS = ("preprocess", "train", "csrc")
COMMANDS = {
    "preprocess": {"tokenize_corpus", "train_tokenizer", "select_documents", "score_words",
                   "build_masks", "show_masks", "benchmark"},
    "train": {"pretrain", "finetune", "predict", "annotate", "fit_scorer", "score_tokens",
              "benchmark", "benchmark_data", "benchmark_inference", "report", "pipeline", "doctor"},
    "csrc": {"benchmark"},
}
# Which rooms each room may import, beside itself and the ground floor; commands may import all.
GROUND = {"preprocess.errors", "preprocess.files", "preprocess.flags", "preprocess.identity",
          "preprocess.launchers", "preprocess.machine", "preprocess.progress"}
ROOMS: dict[str, set[str]] = {
    "preprocess.corpus": set(),
    "preprocess.store": set(),
    "preprocess.text": {"preprocess.corpus"},
    "preprocess.masking": {"preprocess.store", "preprocess.text"},
    "preprocess.view": {"preprocess.store", "preprocess.text", "preprocess.masking"},
    "csrc": set(),
    # Its help lists the strategies; a task knows the share of its test part.
    "train.config": {"preprocess.corpus", "preprocess.masking"},
    "train.shipped": set(),
    "train.engine": {"train.config", "train.shipped"},
    "train.model": {"csrc", "preprocess.corpus", "preprocess.store", "preprocess.text"},
    "train.data": {"preprocess.store", "preprocess.masking", "preprocess.text"},
    "train.run_dir": {"train.config", "train.engine", "train.model"},
    "train.stages": {"preprocess.corpus", "preprocess.store", "preprocess.masking",
                     "preprocess.text", "train.config", "train.engine", "train.model",
                     "train.data", "train.run_dir"},
    "train.bench": {"csrc", "preprocess.store", "preprocess.masking", "preprocess.text",
                    "preprocess.view", "train.config", "train.engine", "train.model",
                    "train.data", "train.run_dir"},
    "train.reports": {"preprocess.corpus", "preprocess.masking", "preprocess.store",
                      "preprocess.text", "preprocess.view", "train.run_dir"},
    "train.api": {"preprocess.store", "preprocess.masking", "train.data", "train.model",
                  "train.stages", "train.reports"},
    "train.recipes": {"preprocess.corpus", "preprocess.store", "preprocess.masking",
                      "train.config", "train.engine", "train.model", "train.reports",
                      "train.run_dir", "train.shipped", "train.stages"},
}
# Strings that are a strategy's name, by file, and why.
NAMED_STRATEGIES = {
    ("preprocess/show_masks.py", "random"): "its option --random",
    ("train/bench/tables.py", "top"): "a side of a picture",
    ("train/recipes/recipe.py", "random_matched"): "default arms of a recipe",
    ("train/recipes/recipe.py", "selective"): "default arms of a recipe",
}
# Slow to import, or not there on every machine: only inside the function that needs them.
HEAVY = {"deepspeed", "triton", "matplotlib", "datasets", "tensorboard", "transformers", "sklearn",
         "scipy"}
# Kernels are defined where they are imported, so this file is imported only where it is needed.
AT_THE_TOP = {("triton", "masked_lm_triton.py")}
TOP_LEVEL = {
    "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "setup.cfg", "pyproject.toml",
    "constraints.txt", "Makefile", ".ci", ".gitignore", "ds_configs", "preprocess", "train",
    "csrc", "tests", "selmask.py",
}
FILES = sorted(path for wing in WINGS for path in (ROOT / wing).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(module: str) -> str:
    """The room of a dotted name: `train.engine` of `train.engine.group`; a file is its own."""
    return "csrc" if module.split(".")[0] == "csrc" else ".".join(module.split(".")[:2])


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
                assert child.level == 0, f"{name_of(path)}: relative import"
                assert child.module
                if child.module in ("preprocess", "train"):
                    found.extend((f"{child.module}.{alias.name}", top) for alias in child.names)
                else:
                    found.append((child.module, top))
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            else:
                visit(child, top and not isinstance(child, (ast.FunctionDef, ast.ClassDef)))

    visit(tree, True)
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_arrows(path):
    wing, *rest = path.relative_to(ROOT).with_suffix("").parts
    own = room_of(".".join((wing, *rest)))
    is_command = len(rest) == 1 and rest[0] in COMMANDS[wing]
    for module, top in imports(path):
        root = module.split(".")[0]
        if root in WINGS:
            room = room_of(module)
            assert root in {"csrc": {"csrc"}, "preprocess": {"preprocess"}}.get(wing, WINGS), (
                f"{wing} must not import {module}")
            assert module.split(".")[-1] not in COMMANDS[root] or len(module.split(".")) > 2, (
                f"{module} is a command")
            if not is_command and wing != "csrc" and room not in GROUND and room != own:
                assert room in ROOMS[own], f"{name_of(path)} must not import {module}"
        if root in HEAVY and (root, path.name) not in AT_THE_TOP:
            assert not top, f"{module} is imported at the top of {name_of(path)}"
        if module == "csrc.masked_lm_triton":
            assert not top, f"{name_of(path)} needs triton as soon as it is imported"
        if wing == "csrc":
            known = {"torch", "triton", "csrc", "__future__"}
            assert root in known or root in sys.stdlib_module_names
        if root == "deepspeed":
            assert own == "train.engine", "only train/engine/ imports deepspeed"


def test_rooms_have_no_circle():
    done: set[str] = set()
    left = {room: set(below) for room, below in ROOMS.items()}
    while left:
        free = {room for room, below in left.items() if below <= done}
        assert free, f"these rooms import each other in a circle: {sorted(left)}"
        done |= free
        left = {room: below for room, below in left.items() if room not in free}


def test_every_room_has_a_face():
    for wing in WINGS:
        for folder in (ROOT / wing).rglob("*"):
            if folder.is_dir() and any(folder.glob("*.py")):
                face = folder / "__init__.py"
                assert face.is_file() and ast.get_docstring(ast.parse(face.read_text())), folder
                assert folder.name not in set().union(*COMMANDS.values()), f"{folder} is a command"


def test_files_of_a_room_hide_no_name_from_each_other():
    for path in [*FILES, *TESTS]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in WINGS:
                hidden = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not hidden, f"{name_of(path)} imports {hidden} of {node.module}"


def test_no_test_module_imports_another():
    for path in TESTS:
        for module, _ in imports(path):
            parts = module.split(".")
            assert parts[0] != "conftest" and not parts[-1].startswith("test_"), (
                f"{name_of(path)} imports {module}: move what they share to tests/support")
            assert parts[0] != "tests" or parts[1] == "support", f"{name_of(path)}: {module}"
    assert not [path for path in TESTS if path.name == "__init__.py"]


def test_only_the_model_room_names_model_classes():
    for path in FILES:
        if path.parent.name == "model":
            continue
        names = {
            node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)
        }
        classes = {name for name in names if name.startswith("AutoModel") or "ForMaskedLM" in name}
        assert not classes, f"{name_of(path)}: {classes}"


def test_only_the_store_room_opens_the_binary():
    for path in FILES:
        if path.parent.name != "store":
            assert "memmap" not in path.read_text(), f"{name_of(path)} maps a file itself"


def test_no_rooms_without_a_name():
    for path in FILES:
        assert path.stem not in ("utils", "common", "helpers")
        assert path.stem not in sys.stdlib_module_names or path.parent.name in (
            "view",), name_of(path)


def test_top_level_stays():
    ignored = {".git", ".venv", "runs", ".pytest_cache", ".mypy_cache", ".ruff_cache",
               ".hypothesis", "build", "selmask.egg-info", "__pycache__"}
    assert {path.name for path in ROOT.iterdir()} - ignored <= TOP_LEVEL | {"RESULTS.md", "results"}


def test_commands_end_through_run_command():
    for wing, names in COMMANDS.items():
        for name in names:
            text = (ROOT / wing / f"{name}.py").read_text()
            assert 'if __name__ == "__main__":' in text
            assert "run_command(main)" in text or wing == "csrc"


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


def test_everything_imported_is_declared_and_the_other_way_round():
    """The published code needs packages that its requirements do not name."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    required = setup["options"]["install_requires"]
    text = required + "".join(setup["options.extras_require"].values())
    declared = {line.split(">")[0].split("=")[0].strip() for line in text.splitlines() if line}
    named = {"yaml": "pyyaml", "sklearn": "scikit-learn"}
    # transformers brings tokenizers and huggingface_hub; datasets brings pyarrow.
    brought = {"tokenizers", "huggingface_hub", "pyarrow", "triton"}
    imported = {
        named.get(root, root) for path in FILES for module, _ in imports(path)
        if (root := module.split(".")[0]) not in {*sys.stdlib_module_names, *WINGS, "selmask"}
    }
    assert imported - brought <= declared
    always = {line.split(">")[0].strip() for line in required.splitlines() if line}
    assert always <= imported


def test_lines_are_short_and_ascii():
    for path in [*FILES, *TESTS]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 100, f"{name_of(path)}:{number} is longer than 100 columns"
            assert line.isascii(), f"{name_of(path)}:{number} is not ASCII"


def test_class_names_are_unique():
    names = Counter(node.name for path in FILES for node in ast.parse(path.read_text()).body
                    if isinstance(node, ast.ClassDef) and not node.name.startswith("_"))
    assert not [name for name, count in names.items() if count > 1]


# ------------------------------------------------------------------------------- strategies


def strings(path: Path) -> list[tuple[int, str]]:
    """Line and text of every string of a file, without docstrings."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.value) for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return [(node.lineno, node.value) for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
            and id(node) not in docstrings]


def test_only_the_records_name_a_strategy():
    used = set()
    for path in FILES:
        if name_of(path) == "preprocess/masking/strategies.py":
            continue
        for line, text in strings(path):
            for name in STRATEGIES:
                # "random" and "selective" are words too; the others are named by nothing else.
                if text == name or "_" in name and re.search(rf"\b{name}\b", text):
                    assert (name_of(path), name) in NAMED_STRATEGIES, f"{path}:{line}: {text!r}"
                    used.add((name_of(path), name))
    assert used == set(NAMED_STRATEGIES), "no longer needed"


def every_second(sequences: Sequences) -> np.ndarray:
    candidates = np.flatnonzero(sequences.candidates)
    return candidates[(sequences.positions[candidates] + sequences.epoch) % 2 == 0]


def above_one(sequences: Sequences) -> np.ndarray:
    assert sequences.scores is not None
    return np.flatnonzero(sequences.candidates & (sequences.scores > 1))


@pytest.fixture
def records(monkeypatch) -> tuple[str, str]:
    """Two more strategies: one is drawn, the other one is built from scores."""
    rule = "Take {} token."
    monkeypatch.setitem(STRATEGIES, "every_second", Strategy(
        every_second, frozenset(), drawn=True, budget="rate", control=False,
        rule=rule.format("every second")))
    monkeypatch.setitem(STRATEGIES, "above_one", Strategy(
        above_one, frozenset({"scores"}), drawn=False, budget="at_most", control=False,
        rule=rule.format("every surprising")))
    return "every_second", "above_one"


@pytest.fixture
def scored_store(tmp_path, reviews_store) -> str:
    """A copy of `reviews_store` with the scores `mr`."""
    folder = shutil.copytree(Path(reviews_store).parent, tmp_path / "store")
    prefix = str(folder / Path(reviews_store).name)
    for shard in TokenStore.open(prefix).shards:
        scores = np.random.default_rng(0).normal(0, 1, shard.num_tokens).astype(np.float16)
        write_array(shard, "mr", "scores", scores, MEASURED)
    return prefix


def test_a_strategy_is_one_record(records, scored_store, tiny_encoder, tmp_path, run_here, capsys):
    """Masking, build_masks, show_masks, pretrain, report, recipes and benchmark know it by that."""
    drawn, built = records
    from preprocess import build_masks, show_masks
    from train import report
    from train.recipes import plan, recipe

    index = ["--tokens", scored_store, "--strategy"]
    build_masks.main([*index, built, "--name", "new", "--scores", "mr"])
    with pytest.raises(ConfigError, match=f"--strategy {built} needs --scores"):
        build_masks.main([*index, built, "--name", "other"])
    with pytest.raises(ConfigError, match=f"that reads it: .*{built}"):
        build_masks.main([*index, drawn, "--name", "other", "--scores", "mr"])
    shard = TokenStore.open(scored_store).shards[0]
    masked, above = open_array(shard, "new", "mask")[0], open_array(shard, "mr", "scores")[0] > 1
    assert 0 < len(masked) <= above.sum() and above[masked].all()
    show_masks.main(["--tokens", scored_store, "--mask_index", "new"])
    assert f"rule: {STRATEGIES[built].rule}" in capsys.readouterr().out

    options = {"max_steps": 2, "eval_max_rows": 8}
    pretrained(scored_store, tiny_encoder, tmp_path / "a", masking=drawn, mlm_probability=0.5,
               **options)
    pretrained(scored_store, tiny_encoder, tmp_path / "b", mask_index="new", **options)
    with pytest.raises(ConfigError, match=f"--masking {built}: .*build_masks"):
        pretrained(scored_store, tiny_encoder, tmp_path / "c", masking=built, **options)
    # Of all tokens, [CLS] and [SEP] included.
    assert 0.3 < logged(tmp_path / "a", MASKED_FRACTION)[0] <= 0.5
    report.main([str(tmp_path / "a"), str(tmp_path / "b"), "--output_dir", str(tmp_path / "out")])
    table = (tmp_path / "out" / "pretraining.csv").read_text()
    assert drawn in table and built in table

    (tmp_path / "r.yaml").write_text(
        f"encoder: E\ntask: {{task: mr, data_dir: D}}\ndomain_text: {{input: [d.txt]}}\n"
        f"arms: [none, {drawn}, {built}]\n")
    steps, arms = plan.plan(recipe.load_recipe(tmp_path / "r.yaml", []), tmp_path / "R")
    commands = {step.name: " ".join(step.command) for step in steps}
    assert [arm["name"] for arm in arms] == ["none", drawn, built]
    assert f"--strategy {built} --scores task" in commands[f"masks-{built}"]
    assert f"--masking {drawn}" in commands[f"task_guided-{drawn}-seed42"]
    assert f"--mask_index {built}" in commands[f"task_guided-{built}-seed42"]
    assert f"masks-{drawn}" not in commands

    run_here(
        "train/benchmark.py", "--tokens", scored_store, "--model_name_or_path", tiny_encoder,
        "--output_dir", str(tmp_path / "speed"), "--strategies", drawn, built, "--scores", "mr",
        "--baselines", "none", "--no_equal_masks", "--max_seq_length", "32", "--warmup_steps", "1",
        "--timed_steps", "2", "--rounds", "1", "--per_device_train_batch_size", "4",
    )
    costs = json.loads((tmp_path / "speed" / "benchmark.json").read_text())["mask_costs"]
    assert [cost["when"] for cost in costs if cost["name"] in records] == ["each epoch", "once"]
