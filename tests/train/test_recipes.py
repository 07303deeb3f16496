"""Recipes, the commands they become, and how `train/pipeline.py` runs them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from preprocess.errors import ConfigError, DataError, StopRequested
from train import pipeline
from train.config import (
    AnnotateConfig,
    FinetuneConfig,
    FitScorerConfig,
    PipelineConfig,
    PretrainConfig,
    ScoreConfig,
    parse,
)
from train.recipes import run as run_room
from train.recipes.recipe import MASK_FLAGS, REPOSITORY, TOKENIZE_FLAGS, load_recipe

RECIPES = sorted((REPOSITORY / "train" / "recipes").glob("*.yaml"))
CONFIGS = {
    "pretrain.py": PretrainConfig, "finetune.py": FinetuneConfig, "annotate.py": AnnotateConfig,
    "fit_scorer.py": FitScorerConfig, "score_tokens.py": ScoreConfig,
}
# What a user must say: a value for every variable without one.
SETTINGS = {
    "custom": ["train_file=a.csv", "test_file=b.csv", "text=c.txt", "encoder=bert-base-uncased"],
    "restaurant_yelp": ["task_data=D"], "restaurant_amazon": ["task_data=D"],
    "laptop_yelp": ["task_data=D"], "laptop_amazon": ["task_data=D"],
}
MINIMAL = """
encoder: bert-base-uncased
task: {task: mr, data_dir: D}
domain_text: {input: [domain.txt]}
finetune: {seeds: "1,2"}
"""


def write_recipe(folder: Path, text: str = MINIMAL, name: str = "r.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def commands(recipe: dict, root: Path | str = "R") -> dict[str, list[str]]:
    steps, _ = pipeline.plan(recipe, root)
    return {step.name: step.command for step in steps}


def flag_value(command: list[str], flag: str) -> str:
    return command[command.index(f"--{flag}") + 1]


# --------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_becomes_commands_that_their_parsers_accept(path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    if path.stem == "paper":
        with pytest.raises(ConfigError, match="task.task is missing"):
            load_recipe(path, [])
        return
    recipe = load_recipe(path, SETTINGS.get(path.stem, []))
    for name, words in commands(recipe).items():
        if not words:
            assert name == "naive_bayes"
            continue
        script, *flags = words
        assert (REPOSITORY / script).is_file(), script
        if Path(script).name in CONFIGS:
            parse(CONFIGS[Path(script).name], flags)
        elif script.endswith("tokenize_corpus.py"):
            from preprocess.tokenize_corpus import build_parser

            build_parser().parse_args(flags)
        elif script.endswith("build_masks.py"):
            from preprocess.build_masks import parse_arguments

            parse_arguments(flags)
        else:
            from train.report import parse_arguments

            assert script.endswith("report.py") and parse_arguments(flags).runs == ["R"]


@pytest.mark.parametrize("name", ["mr_yelp", "mr_amazon", "restaurant_yelp", "restaurant_amazon",
                                  "laptop_yelp", "laptop_amazon"])
def test_recipes_of_the_paper_have_the_published_settings(name):
    path = REPOSITORY / "train" / "recipes" / f"{name}.yaml"
    words = commands(load_recipe(path, ["task_data=D"]))
    classifier, scorer = words["classifier"], words["scorer"]
    assert flag_value(classifier, "num_train_epochs") == "10"
    assert float(flag_value(classifier, "learning_rate")) == 2e-5
    assert flag_value(classifier, "max_seq_length") == "256"
    assert float(flag_value(scorer, "learning_rate")) == 1e-5
    assert float(flag_value(words["annotate"], "delta")) == 0.01
    guided = words["task_guided-selective-seed88"]
    assert flag_value(guided, "train_batch_size") == "112"
    assert 140_000 <= int(flag_value(guided, "max_steps")) <= 190_000
    assert len(flag_value(words["finetune-none"], "seeds").split(",")) == 10


def test_flags_of_preprocess_sections_exist():
    from preprocess.build_masks import parse_arguments
    from preprocess.tokenize_corpus import build_parser

    known = {action.dest for action in build_parser()._actions}
    assert set(TOKENIZE_FLAGS) <= known
    args = parse_arguments(["--tokens", "P", "--name", "n", "--strategy", "random"])
    assert set(MASK_FLAGS) <= set(vars(args))


def test_set_replaces_variables_and_settings(tmp_path):
    base = write_recipe(tmp_path, MINIMAL + "variables: {rate: 0.15}\nmasks: "
                        "{mlm_probability: '${rate}'}\n", "base.yaml")
    child = write_recipe(tmp_path, f"extends: {base.name}\ntask: {{data_dir: E}}\n")
    recipe = load_recipe(child, ["rate=0.2", "task_guided.max_steps=7",
                                          "arms=[none]", "tokenizer=T"])
    assert recipe["task"] == {"task": "mr", "data_dir": "E"}
    assert recipe["masks"] == {"mlm_probability": 0.2}
    assert recipe["task_guided"] == {"max_steps": 7}
    assert recipe["arms"] == ["none"] and recipe["tokenizer"] == "T"


@pytest.mark.parametrize(("text", "settings", "message"), [
    ("fintune: {}", [], "did you mean 'finetune'"),
    ("finetune: {lerning_rate: 1}", [], "did you mean 'learning_rate'"),
    ("finetune: {output_dir: x}", [], "finetune has an unknown flag 'output_dir'"),
    ("arms: [selektive]", [], "did you mean 'selective'"),
    ("floors: {naive: true}", [], "did you mean 'naive_bayes'"),
    ("arms: []", [], "at least one entry"),
    ("pretrain_seeds: [1, 1]", [], "without repeats"),
    ("pretrain_seeds: [x]", [], "whole numbers"),
    ("export_steps: [10]", [], "export_steps are lengths of stage 1"),
    ("encoder: null", [], "give either encoder"),
    ("general: {max_steps: 1}", [], "general needs general_text.input"),
    ("task: 3", [], "task must hold flags"),
    ("domain_text: {input: []}", [], "domain_text.input is missing"),
    ("task: {data_dir: '${there}'}", [], "unknown variable 'there'"),
    ("variables: {data: '???', more: '???'}", [], "--set data=... more=..."),
    ("", ["arm=[none]"], "did you mean 'arms'"),
    ("", ["task_guided.max_step=1"], "did you mean 'max_steps'"),
    ("", ["taskguided.max_steps=1"], "did you mean 'task_guided.max_steps'"),
    ("", ["arms"], "write key=value"),
    ("a: [", [], "not valid YAML"),
    ("extends: r.yaml", [], "extends itself"),
    ("extends: other.yaml", [], "no such file; train/recipes has"),
])
def test_mistakes_in_a_recipe_are_named(tmp_path, text, settings, message):
    key = text.partition(":")[0]
    kept = [line for line in MINIMAL.split("\n") if line.partition(":")[0] != key]
    path = write_recipe(tmp_path, "\n".join(kept) + "\n" + text + "\n")
    with pytest.raises(ConfigError) as error:
        load_recipe(path, settings)
    assert message in str(error.value)


# --------------------------------------------------------------------------- the plan


def test_every_stage_1_length_and_pretraining_seed_has_its_own_arms(tmp_path):
    text = MINIMAL + """
general: {max_steps: 30}
general_text: {input: [general.txt]}
export_steps: [10, 20]
pretrain_seeds: [1, 2]
arms: [none, random, random_matched]
floors: {untrained: true, naive_bayes: true}
"""
    recipe = load_recipe(write_recipe(tmp_path, text), [])
    steps, arms = pipeline.plan(recipe, "R")
    words = {step.name: step.command for step in steps}
    assert words["stage1"][words["stage1"].index("--export_steps") + 1 :][:2] == ["10", "20"]
    assert len(words) == len(steps), "step names must be unique"
    assert flag_value(words["task_guided-random_matched-seed2-step_20"], "mask_index") == \
        "random_matched-step_20"
    assert flag_value(words["task_guided-random-seed1-step_10"], "masking") == "random"
    assert flag_value(words["classifier-step_10"], "model_name_or_path") == "R/stage1/hf_step_10"
    # The control needs the index that it is matched to, though that is no arm here.
    assert flag_value(words["masks-random_matched-step_10"], "match") == "selective-step_10"
    assert "task_guided-selective-seed1-step_10" not in words
    assert "--from_scratch" in words["untrained"]
    assert [(arm["name"], len(arm["runs"]), arm["floor"]) for arm in arms] == [
        ("none@10", 1, False), ("random@10", 2, False), ("random_matched@10", 2, False),
        ("none@20", 1, False), ("random@20", 2, False), ("random_matched@20", 2, False),
        ("naive_bayes", 1, True), ("untrained", 1, True),
    ]
    seen: set[str] = set()
    for step in steps:
        assert set(step.needs) <= seen, step.name  # what it reads was made before
        seen.add(step.name)


def test_models_and_stores_between_steps_are_those_that_steps_write(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path), [])
    words = commands(recipe)
    written = {flag_value(c, flag) for c in words.values() for flag in ("output", "output_dir")
               if f"--{flag}" in c}
    for name, command in words.items():
        for flag in ("model_name_or_path", "tokens", "annotations"):
            if f"--{flag}" in command and (value := flag_value(command, flag)).startswith("R/"):
                assert any(value == w or value.startswith(w + "/") for w in written), (name, value)


def test_dry_run_prints_commands_that_a_shell_reads_back(tmp_path, capsys):
    path = write_recipe(tmp_path, MINIMAL.replace("data_dir: D", "data_dir: 'D #1'"))
    output = tmp_path / "R"
    pipeline.main(["--recipe", str(path), "--output_dir", str(output), "--dry_run",
                   "--num_gpus", "2"])
    lines = capsys.readouterr().out.strip().split("\n")
    assert not output.exists()
    assert lines[0].startswith("python ") and "tokenize_corpus.py" in lines[0]
    finetune = shlex.split(lines[-2])
    assert finetune[:3] == ["deepspeed", "--num_gpus", "2"]
    assert flag_value(finetune, "data_dir") == "D #1"
    assert "report.py" in lines[-1]


# --------------------------------------------------------------------------- running


SCRIPT = """
import pathlib, sys
name, text, code = sys.argv[1:4]
print("hello from", name)
if code == "0":
    pathlib.Path(name).write_text(text)
sys.exit(int(code))
"""


@pytest.fixture
def chain(tmp_path):
    """Two steps, each a real process that writes a file; the second reads the first's."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = tmp_path / "R"

    def run(first="1", second="2", codes=("0", "0"), *flags):
        options = parse(PipelineConfig, ["--recipe", "x", "--output_dir", str(root), *flags])
        root.mkdir(exist_ok=True)
        steps = [
            pipeline.Step(
                name, [str(script), str(root / name), text, code],
                is_whole=(root / name).is_file, outputs=[str(root / name)], needs=needs,
            )
            for name, text, code, needs in (
                ("one", first, codes[0], []), ("two", second, codes[1], ["one"]))
        ]
        pipeline.run_steps(steps, pipeline.Journal(root), options)

    run.root = root
    return run


def test_whole_steps_are_skipped_and_logs_kept(chain, capsys):
    chain()
    out = capsys.readouterr().out
    assert f"hello from {chain.root}/one" in out and "whole, skipped" not in out
    assert "hello from" in (chain.root / "logs" / "02-two.log").read_text()
    chain()
    out = capsys.readouterr().out
    assert "hello from" not in out and out.count("whole, skipped") == 2


def test_output_folder_may_be_moved(chain):
    chain()
    moved = chain.root.parent / "moved"
    os.rename(chain.root, moved)
    steps = [pipeline.Step("one", ["s.py", f"{moved}/one", "1", "0"], is_whole=lambda: True,
                           outputs=[f"{moved}/one"])]
    assert pipeline.Journal(moved).objection(steps[0], True) is None


def test_b14_another_command_is_refused_until_rerun(chain, capsys):
    chain()
    with pytest.raises(ConfigError, match="step one was run with another command .*was .*--rerun"):
        chain("other")
    assert (chain.root / "one").read_text() == "1"
    chain("other", "2", ("0", "0"), "--rerun")
    assert (chain.root / "one").read_text() == "other"
    out = capsys.readouterr().out
    assert "step two is older than step one" in out  # and was made again as well
    chain("other")


def test_only_what_changed_in_a_command_is_shown():
    was = ["s.py", "--lr", "1", "--steps", "6", "--flag", "--out", "x"]
    now = ["s.py", "--lr", "1", "--steps", "7", "--out", "x", "--more", "y"]
    assert run_room._changed_words(was, now) == (
        "was `--steps 6 --flag`, is `--steps 7`; was ``, is `--more y`")


def test_b14_older_than_its_input_is_refused(chain):
    chain()
    (chain.root / "one").unlink()
    with pytest.raises(ConfigError, match="step two is older than step one, which it reads"):
        chain()
    assert not (chain.root / "one").exists()  # refused before hours of work, not after


def test_b14_edited_deepspeed_json_is_refused(tmp_path):
    config = tmp_path / "ds.json"
    config.write_text("{}")
    (tmp_path / "made").write_text("")
    step = pipeline.Step("s", ["s.py", "--deepspeed_config", str(config), "--x", "1"],
                         is_whole=lambda: True, outputs=[str(tmp_path / "made")])
    journal = pipeline.Journal(tmp_path)
    journal.start(step)
    journal.finish(step)
    assert pipeline.Journal(tmp_path).objection(step, True) is None
    config.write_text('{"zero_optimization": {}}')
    assert "other content" in pipeline.Journal(tmp_path).objection(step, True)


def test_what_the_pipeline_did_not_make_is_refused(chain):
    chain.root.mkdir()
    (chain.root / "one").write_text("mine")
    with pytest.raises(ConfigError, match="this pipeline did not make it"):
        chain()
    assert (chain.root / "one").read_text() == "mine"


def test_failures_stop_the_pipeline_with_their_code(chain, capsys):
    with pytest.raises(SystemExit) as stopped:
        chain("1", "2", ("3", "0"))
    assert stopped.value.code == 3
    error = capsys.readouterr().err
    assert "step one failed with exit code 3" in error and "logs/01-one.log" in error
    assert not (chain.root / "two").exists()
    with pytest.raises(StopRequested, match="step one stopped on request"):
        chain("1", "2", ("75", "0"), "--rerun")


def test_a_step_that_writes_nothing_whole_is_noticed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("")
    step = pipeline.Step("lazy", [str(script)], is_whole=lambda: False, outputs=["x"])
    options = parse(PipelineConfig, ["--recipe", "x", "--output_dir", str(tmp_path)])
    with pytest.raises(DataError, match="step lazy ended without an error, but"):
        pipeline.run_steps([step], pipeline.Journal(tmp_path), options)


def test_silent_commands_show_that_they_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_room, "HEARTBEAT_SECONDS", 0.2)
    code = run_room.run_process(
        [sys.executable, "-c", "import time; time.sleep(0.9); print('done')"], tmp_path / "log")
    out = capsys.readouterr().out
    assert code == 0 and "... running for" in out and "done" in out


def test_a_stop_reaches_the_workers_of_a_launcher_that_dies_first(tmp_path):
    # As DeepSpeed's: its runner does not handle SIGTERM. The worker still stops in its own way,
    # and the pipeline reports the request, not the launcher's death.
    worker, launcher = tmp_path / "worker.py", tmp_path / "launcher.py"
    worker.write_text(
        "import pathlib, signal, sys, time\n"
        "def stop(number, frame):\n"
        f"    pathlib.Path({str(tmp_path / 'checkpoint')!r}).write_text('saved')\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "print('ready', flush=True)\ntime.sleep(30)\n")
    launcher.write_text(
        f"import subprocess, sys\nsubprocess.run([sys.executable, {str(worker)!r}])\n")
    driver = (
        "import sys; from pathlib import Path; from train import pipeline\n"
        f"sys.exit(run_room.run_process([sys.executable, {str(launcher)!r}], "
        f"Path({str(tmp_path / 'log')!r})))"
    )
    process = subprocess.Popen([sys.executable, "-c", driver], stdout=subprocess.PIPE, text=True)
    assert "ready" in process.stdout.readline()
    process.terminate()
    assert process.wait(timeout=20) == 75
    assert (tmp_path / "checkpoint").read_text() == "saved"


def test_broken_journal_is_named(tmp_path):
    (tmp_path / "steps.json").write_text("{")
    with pytest.raises(DataError, match="steps.json: not valid JSON"):
        pipeline.Journal(tmp_path)
    (tmp_path / "steps.json").write_text(json.dumps({}))
    assert pipeline.Journal(tmp_path).steps == {}


def test_naive_bayes_floor_takes_the_sentences_of_finetuning(tmp_path):
    rows = ["text,label"] + [f"{'good' if i % 2 else 'bad'} film {i},{i % 2}" for i in range(40)]
    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").write_text("\n".join(rows) + "\n")
    text = f"""
encoder: bert-base-uncased
arms: [none]
task: {{task: custom, train_file: {tmp_path}/train.csv, test_file: {tmp_path}/test.csv}}
finetune: {{max_eval_samples: 7}}
floors: {{naive_bayes: true}}
"""
    recipe = load_recipe(write_recipe(tmp_path, text), [])
    steps, _ = pipeline.plan(recipe, tmp_path / "R")
    assert not steps[0].is_whole()
    steps[0].compute()
    assert steps[0].is_whole()
    answers = tmp_path / "R" / "floors" / "naive_bayes" / "seed_0" / "predictions.jsonl"
    assert len(answers.read_text().splitlines()) == 7
