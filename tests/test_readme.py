"""The README: its commands run as shown on small data, and what it lists is what there is."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from preprocess import errors
from preprocess.corpus import SOURCES, TASKS
from preprocess.masking import STRATEGIES
from preprocess.store import TokenStore, open_array
from train import engine, model, pipeline
from train.recipes.recipe import load_recipe
from train.run_dir import metrics

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"(<!-- runnable -->\n)?```bash\n(.*?)```", README, re.DOTALL)
# Flags of the launchers themselves, before the name of a script of ours.
LAUNCHERS = ("--hostfile", "--no_ssh", "--node_rank", "--master_addr", "--master_port",
             "--num_gpus", "--nnodes", "--nproc_per_node", "--logdir", "--nodes",
             "--ntasks-per-node", "--gpus-per-node", "--array", "--cpus-per-task", "--parsable",
             "--dependency", "--gpus", "--jobs", "--halt", "--sshloginfile", "--workdir",
             "--launcher", "--env")
# What makes a command small; everything else runs as the README shows it.
SMALL = {
    "--max_steps": "3", "--train_batch_size": "8", "--save_steps": "2", "--vocab_size": "90",
    "--model_config": "bert-tiny", "--deepspeed_config": "ds_configs/cpu.json",
}
ALSO = {
    "pretrain": "--max_seq_length 32 --eval_fraction 0.1 --eval_max_rows 8",
    "finetune": "--max_seq_length 32 --num_train_epochs 6 --learning_rate 3e-3",
    "fit_scorer": "--max_seq_length 32 --num_train_epochs 3 --learning_rate 3e-3",
    "annotate": "--max_seq_length 32", "score_tokens": "--max_seq_length 32",
    "benchmark": "--max_seq_lengths 32 --warmup_steps 1 --timed_steps 1 --rounds 1",
    "tokenize_corpus": "--num_workers 1",
}


def commands(text: str) -> list[list[str]]:
    """The commands of a block as words; a shell would make the same of it."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def parts(words: list[str]) -> tuple[str, list[str]]:
    """The script of ours in a command and its flags; `("", [])` if there is none."""
    for at, word in enumerate(words):
        if " train/" in word:  # a command inside quotes
            return parts(shlex.split(word))
        if re.fullmatch(r"(preprocess|train|csrc)/\w+\.py", word):
            return word, words[at + 1 :]
    return "", []


def section(title: str) -> str:
    """The text below a heading."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(title: str, columns: int) -> list[list[str]]:
    """Rows of the tables in a section with so many columns, without their heads."""
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")]
             for line in section(title).splitlines() if line.startswith("| ")]
    found = [row for row in cells if len(row) == columns]
    return found[1:]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


# --------------------------------------------------------------------------- the commands


@pytest.fixture(scope="session")
def known_flags() -> dict[str, set[str]]:
    """The flags of every command, from its own `--help`."""
    import contextlib
    import importlib
    import io

    scripts = [path for room in ("preprocess", "train", "csrc") for path in
               (ROOT / room).glob("*.py") if "\ndef main(" in path.read_text()]
    flags = {}
    for path in scripts:
        name = f"{path.parent.name}/{path.name}"
        out = io.StringIO()
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
            importlib.import_module(name[:-3].replace("/", ".")).main(["--help"])
        flags[name] = set(re.findall(r"--[\w-]+", out.getvalue()))
    return flags


def test_every_flag_of_every_command_exists(known_flags):
    found = [parts(words) for _, text in BLOCKS for words in commands(text)]
    assert {script for script, _ in found if script} >= set(known_flags) - {"csrc/benchmark.py"}
    for script, flags in found:
        for flag in (word for word in flags if word.startswith("--")):
            assert flag in known_flags[script], f"{script} has no {flag}"


def test_every_flag_named_anywhere_exists(known_flags):
    everything = set().union(*known_flags.values(), LAUNCHERS)
    prose = re.sub(r"<!--.*?-->", "", README)
    assert set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]+", prose)) <= everything


def run_as_shown(text: str, run_here, inputs: dict[str, str], runs: Path) -> None:
    """Run the commands of a block, on the files in `inputs` and below `runs`."""
    for words in commands(text):
        script, flags = parts(words)
        assert words[0] == ("python" if script.startswith("preprocess") else words[0])
        for at, word in enumerate(flags):
            if at and flags[at - 1] in SMALL:
                flags[at] = SMALL[flags[at - 1]]
            key, equals, value = word.partition("=")
            value = inputs.get(value, value) if equals else inputs.get(word, word)
            if not (at and flags[at - 1] in SMALL):
                flags[at] = f"{key}={value}" if equals else value
            if flags[at].startswith("runs/"):
                flags[at] = str(runs / flags[at].removeprefix("runs/"))
        run_here(ROOT / script, *flags, *ALSO.get(Path(script).stem, "").split())


@pytest.mark.slow
def test_the_commands_run_as_shown(
    run_here, tmp_path, tiny_encoder, reviews_file, labelled_files, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(model, "BERT_SIZES", {**model.BERT_SIZES, "bert-tiny": (2, 32, 2)})
    inputs = {
        "general.txt": reviews_file, "reviews.txt": reviews_file,
        "train.csv": labelled_files["train"], "test.csv": labelled_files["test"],
        "bert-base-uncased": tiny_encoder,
    }
    runnable = [text for mark, text in BLOCKS if mark]
    assert len(runnable) == 4
    for text in runnable:
        run_as_shown(text, run_here, inputs, tmp_path)
    said = capsys.readouterr().out
    assert "Differences" in said
    store = TokenStore.open(str(tmp_path / "tokens" / "reviews"))
    for name in ("selective", "control"):
        assert len(open_array(store.shards[0], name, "mask")[0])
        assert (tmp_path / "tuned" / name / "seed_13" / "predictions.jsonl").is_file()
    assert (tmp_path / "report" / "table.csv").is_file()
    assert (tmp_path / "vocabulary" / "tokenizer.json").is_file()
    assert not (tmp_path / "mine").exists()  # --dry_run
    logged = {tag for path in tmp_path.rglob("metrics.jsonl") for line in path.open()
              for tag in json.loads(line)}
    assert logged - {"step", "time"} == set(metrics.TAGS) - {metrics.LOSS_SCALE}
    # Whatever the README says about where things lie is true of these runs.
    made = {path.name for path in tmp_path.rglob("*")}
    for name in ("config.resolved.yaml", "ds_config.resolved.json", "env.json", "metrics.jsonl",
                 "tb", "latest", "hf", "lineage.json", "results.jsonl", "results.json",
                 "manifest.json"):
        assert f"`{name}" in README and name in made, name


# --------------------------------------------------------------------------- the lists


def test_every_file_has_its_line():
    listed = [name for row in rows("Files", 2) for name in quoted(row[0])]
    there = [path.relative_to(ROOT).as_posix() for pattern in
             ("preprocess/*.py", "train/*.py", "csrc/*.py", "csrc/*.cu", "train/recipes/*.yaml")
             for path in ROOT.glob(pattern)]
    empty = {"preprocess/__init__.py", "train/__init__.py"}
    assert sorted(listed) == sorted(set(there) - empty)
    configs = [name for row in rows("DeepSpeed JSON", 2) for name in quoted(row[0])
               if name.startswith("ds_configs/")]
    assert sorted(configs) == sorted(
        path.relative_to(ROOT).as_posix() for path in ROOT.glob("ds_configs/*"))


def test_every_path_that_is_named_exists():
    names = re.findall(r"`((?:preprocess|train|csrc|ds_configs)/[\w/]*(?:\.\w+)?)`", README)
    for name in set(names) - set(metrics.TAGS):
        assert (ROOT / name).exists(), name


def test_every_tag_has_its_line():
    assert [quoted(row[0])[0] for row in rows("TensorBoard", 3)] == list(metrics.TAGS)


def test_strategies_tasks_and_sources_are_those_of_the_code():
    assert [quoted(row[0])[0] for row in rows("Masking strategies", 3)] == list(STRATEGIES)
    text = section("Your own data and checkpoint")
    assert all(f"`{name}`" in text or f"`--task {name}`" in text for name in TASKS)
    for name in SOURCES:
        assert f".{name}" in text or f"`{name}:" in text or name == "text", name
    for family in model.FAMILIES:
        assert family in text.lower()


def test_exit_codes_are_those_of_the_code():
    ours = {error.exit_code for error in vars(errors).values() if hasattr(error, "exit_code")}
    assert {int(row[0]) for row in rows("Exit codes", 2)} == {0, *ours}


def test_auto_values_are_those_of_the_configurations():
    listed = {name for row in rows("DeepSpeed JSON", 2)[1:] for name in quoted(row[0])
              if not name.startswith("ds_configs/")} - {'"auto"'}

    def autos(value, where=""):
        if value == "auto":
            return {where}
        inner = value.items() if isinstance(value, dict) else ()
        return {name for key, entry in inner for name in autos(entry, f"{where}.{key}".strip("."))}

    there = set()
    for path in ROOT.glob("ds_configs/*.json"):
        there |= autos(engine.read_ds_config(str(path)))
    assert listed == there


def test_registries_are_where_it_says():
    for row in rows("Where a new thing goes", 3):
        files = [ROOT / name for name in quoted(row[1]) if name.endswith(".py")]
        for name in (name for name in quoted(row[2]) if name.isupper()):
            assert re.search(rf"^{name}\b.* = ", files[0].read_text(), re.MULTILINE), name


def test_settings_of_the_recipe_exist():
    """Unknown keys of `--set` are refused by the recipe itself."""
    found = 0
    for _, text in BLOCKS:
        for words in commands(text):
            script, flags = parts(words)
            if script == "train/pipeline.py":
                settings = flags[flags.index("--set") + 1 :]
                recipe = load_recipe(ROOT / flags[flags.index("--recipe") + 1], settings)
                assert pipeline.plan(recipe, "R")[0]
                found += 1
    assert found == 2


def test_the_table_of_the_demo_has_its_place():
    assert README.count("<!-- demo table -->") == README.count("<!-- end -->") == 1
    assert README.index("<!-- demo table -->") < README.index("<!-- end -->")
    for target in re.findall(r"^\| `make ([\w-]+)`", README, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_plain_text():
    assert README.isascii()
    for line in README.splitlines():
        assert len(line) <= 100 or line.startswith("|"), line
