"""The READMEs: their commands run as shown on small data, and what they list is what there is."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
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
# In the order in which a reader meets them: the commands of a page use what earlier ones made.
FOLDERS = ("", "preprocess", "train", "train/bench", "csrc", "ds_configs", "tests",
           "preprocess/masking")
NAMES = (*FOLDERS, "train/API.md", "train/FILES.md", "train/STUDY.md", "RESULTS.md")


def file_of(page: str) -> Path:
    """Return the file of a page, which is named by itself or by its folder."""
    path = ROOT / page
    return path if path.is_file() else path / "README.md"


PAGES = {page: file_of(page).read_text() for page in NAMES}
FRONT, PREPROCESS, TRAIN = (PAGES[folder] for folder in FOLDERS[:3])
BLOCKS = [block for page in PAGES.values()
          for block in re.findall(r"(<!-- runnable -->\n)?```bash\n(.*?)```", page, re.DOTALL)]
# Flags of the launchers themselves, before the name of a script of ours.
LAUNCHERS = ("--hostfile", "--no_ssh", "--node_rank", "--master_addr", "--master_port",
             "--num_gpus", "--nnodes", "--nproc_per_node", "--logdir", "--nodes",
             "--ntasks-per-node", "--gpus-per-node", "--array", "--cpus-per-task", "--parsable",
             "--dependency", "--gpus", "--jobs", "--halt", "--sshloginfile", "--workdir",
             "--launcher", "--env", "--module")
# What makes a command small; everything else runs as the page shows it.
SMALL = {
    "--max_steps": "3", "--train_batch_size": "8", "--save_steps": "2", "--vocab_size": "90",
    "--model_config": "bert-tiny", "--deepspeed_config": "ds_configs/cpu.json",
}
CPU = "--deepspeed_config ds_configs/cpu.json "
ALSO = {
    "pretrain": CPU + "--max_seq_length 32 --eval_fraction 0.1 --eval_max_rows 8",
    "finetune": CPU + "--max_seq_length 32 --num_train_epochs 6 --learning_rate 3e-3",
    "fit_scorer": CPU + "--max_seq_length 32 --num_train_epochs 3 --learning_rate 3e-3",
    "annotate": "--max_seq_length 32", "score_tokens": "--max_seq_length 32",
    "benchmark": "--max_seq_lengths 32 --warmup_steps 1 --timed_steps 1 --rounds 1",
    "tokenize_corpus": "--num_workers 1",
    "pipeline": "--no_measure --set task_guided.max_seq_length=64 "
                "deepspeed_config=ds_configs/cpu.json",
}


def commands(text: str) -> list[list[str]]:
    """Return the commands of a block as the words that a shell would make of them."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def parts(words: list[str]) -> tuple[str, list[str]]:
    """Return the script of ours in a command and its flags; `("", [])` if there is none."""
    for at, word in enumerate(words):
        if " train/" in word:  # a command inside quotes
            return parts(shlex.split(word))
        if re.fullmatch(r"(preprocess|train|csrc)/\w+\.py", word):
            return word, words[at + 1 :]
    return "", []


def rows(page: str, title: str, columns: int) -> list[list[str]]:
    """Return the rows with so many columns of the tables in a section, without their heads."""
    section = page.split(f"\n## {title}\n")[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")]
             for line in section.splitlines() if line.startswith("| ")]
    found = [row for row in cells if len(row) == columns]
    return found[1:]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


# --------------------------------------------------------------------------- the commands


@pytest.fixture(scope="session")
def known_flags() -> dict[str, set[str]]:
    """Return the flags of every command, from its own `--help`."""
    scripts = [path for room in ("preprocess", "train", "csrc") for path in
               (ROOT / room).glob("*.py")
               if "\ndef main(" in path.read_text() and path.name != "cli.py"]
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
    assert {script for script, _ in found if script} >= set(known_flags)
    for script, flags in found:
        for flag in (word for word in flags if word.startswith("--")):
            assert flag in known_flags[script], f"{script} has no {flag}"


@pytest.mark.parametrize("page", NAMES)
def test_every_flag_and_command_named_anywhere_exists(page, known_flags):
    everything = set().union(*known_flags.values(), LAUNCHERS)
    prose = re.sub(r"<!--.*?-->", "", PAGES[page])
    assert set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]+", prose)) <= everything
    stems = {Path(script).stem for script in known_flags}
    assert set(re.findall(r"\bselmask ([a-z]\w+)`", prose)) <= stems
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([\w-]+)", prose)) <= targets


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
    assert len(runnable) == 8
    for text in runnable:
        run_as_shown(text, run_here, inputs, tmp_path)
    said = capsys.readouterr().out
    assert "Differences" in said
    store = TokenStore.open(str(tmp_path / "tokens" / "reviews"))
    for name in ("selective", "control"):
        assert len(open_array(store.shards[0], name, "mask")[0])
        assert (tmp_path / "tuned" / name / "seed_13" / "predictions.jsonl").is_file()
    assert (tmp_path / "report" / "table.csv").is_file()
    assert (tmp_path / "predictions.csv").is_file() and (tmp_path / "predictions.html").is_file()
    assert (tmp_path / "vocabulary" / "tokenizer.json").is_file()
    assert not (tmp_path / "mine").exists()  # --dry_run
    logged = {tag for path in tmp_path.rglob("metrics.jsonl") for line in path.open()
              for tag in json.loads(line)}
    assert logged - {"step", "time"} == set(metrics.TAGS) - {metrics.LOSS_SCALE}
    # The pages' lists of files are true of these runs.
    made = {path.name for path in tmp_path.rglob("*")}
    for name in ("config.resolved.yaml", "ds_config.resolved.json", "env.json", "metrics.jsonl",
                 "latest", "hf", "lineage.json", "results.jsonl", "results.json",
                 "manifest.json"):
        assert name in made and re.search(rf"`{re.escape(name)}/?`", TRAIN), name


# --------------------------------------------------------------------------- the lists


@pytest.mark.parametrize("folder", FOLDERS[1:])
def test_each_page_lists_the_files_of_its_folder(folder):
    """Faces of rooms (`__init__.py`) are left out, but for that of csrc, which holds code."""
    text = PAGES[folder] + PAGES.get(f"{folder}/FILES.md", "")
    listed = [name for line in text.splitlines() if line.startswith("| `")
              for name in quoted(line.split(" | ")[0])
              if re.fullmatch(rf"{folder}/[\w/]+\.(py|yaml|json|cu)", name)]
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*")
             if path.suffix in (".py", ".yaml", ".json", ".cu")}
    there -= {name for name in there if name.endswith("__init__.py") and folder != "csrc"}
    inner = tuple(f"{other}/" for other in FOLDERS if other.startswith(f"{folder}/"))
    assert set(listed) == {name for name in there if not name.startswith(inner)}


def test_the_list_of_files_says_what_their_docstrings_say():
    for name, subject in re.findall(r"^\| `(train/\S+)` \| (.*) \|$", PAGES["train/FILES.md"],
                                    re.MULTILINE):
        docstring = ast.get_docstring(ast.parse((ROOT / name).read_text())) or ""
        assert docstring.splitlines()[0] == subject


@pytest.mark.parametrize("page", NAMES)
def test_every_path_and_link_leads_somewhere(page):
    file, text = file_of(page), PAGES[page]
    names = re.findall(
        r"[`\s]((?:preprocess|train|csrc|ds_configs|tests)/[\w/]*(?:\.\w+)?)[`\s]", text)
    for name in set(names) - set(metrics.TAGS):
        assert (ROOT / name).exists(), name
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
        path = file.parent / target if target else file
        assert path.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads]
            assert anchor in slugs, f"{target}#{anchor}"


def test_every_tag_has_its_line():
    assert [quoted(row[0])[0] for row in rows(TRAIN, "TensorBoard", 3)] == list(metrics.TAGS)


def test_strategies_tasks_sources_and_families_are_those_of_the_code():
    assert [quoted(row[0])[0] for row in rows(PAGES["preprocess/masking"], "Rules", 3)] == list(
        STRATEGIES)
    assert all(f"`{name}`" in PREPROCESS for name in TASKS)
    for name in SOURCES:
        named = f"`.{name}`" in PREPROCESS or f"`{name}:" in PREPROCESS
        assert named or (name == "text" and "`.txt`" in PREPROCESS), name
    for family in model.FAMILIES:
        assert family in TRAIN.lower()


def test_exit_codes_are_those_of_the_code():
    ours = {error.exit_code for error in vars(errors).values() if hasattr(error, "exit_code")}
    assert {int(row[0]) for row in rows(TRAIN, "Exit codes", 2)} == {0, *ours}


def test_auto_values_are_those_of_the_configurations():
    lines = [line for line in PAGES["ds_configs"].splitlines() if line.startswith("| `")]
    listed = {name for line in lines for name in quoted(line.split(" | ")[0])
              if not name.startswith(("ds_configs/", '"'))}

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
    for row in rows(FRONT, "Adding something", 3):
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
                settings = flags[flags.index("--set") + 1 :] if "--set" in flags else []
                recipe = load_recipe(ROOT / flags[flags.index("--recipe") + 1], settings)
                assert pipeline.plan(recipe, "R")[0]
                found += 1
    assert found == 11


def test_the_table_of_the_demo_has_its_place():
    assert FRONT.count("<!-- demo table -->") == FRONT.count("<!-- end -->") == 1
    assert FRONT.index("<!-- demo table -->") < FRONT.index("<!-- end -->")


@pytest.mark.parametrize("page", NAMES)
def test_pages_are_short_and_plain(page):
    text = PAGES[page]
    assert text.isascii()
    # The page of all policies is read by the section; that of results has the tables of reports.
    limits = {"": 220, "preprocess/masking": 400, "RESULTS.md": 550, "train/API.md": 200}
    assert len(text.splitlines()) <= limits.get(page, 300)
    for line in text.splitlines():
        # Tables of a report are shown as it prints them.
        is_table = line.startswith("|") or page == "RESULTS.md" and line.startswith("  ")
        assert len(line) <= 100 or is_table, line
