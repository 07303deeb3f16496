"""Recipes, the commands they become, and how `train/pipeline.py` runs them."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from preprocess import (
    build_masks,
    score_words,
    select_documents,
    tokenize_corpus,
    train_tokenizer,
)
from preprocess.errors import ConfigError, DataError, StopRequested
from train import pipeline, report
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
from train.recipes.arms import WORD_FLAGS
from train.recipes.recipe import (
    MASK_FLAGS,
    REPOSITORY,
    SECTIONS,
    TOKENIZE_FLAGS,
    VOCABULARY_FLAGS,
    load_recipe,
)
from train.recipes.values import check_value

RECIPES = sorted((REPOSITORY / "train" / "recipes").glob("*.yaml"))
CONFIGS = {
    "pretrain.py": PretrainConfig, "finetune.py": FinetuneConfig, "annotate.py": AnnotateConfig,
    "fit_scorer.py": FitScorerConfig, "score_tokens.py": ScoreConfig,
}
PARSERS = {
    **{name: partial(parse, config) for name, config in CONFIGS.items()},
    "tokenize_corpus.py": tokenize_corpus.build_parser().parse_args,
    "train_tokenizer.py": train_tokenizer.build_parser().parse_args,
    "select_documents.py": select_documents.parse_arguments,
    "score_words.py": score_words.parse_arguments,
    "build_masks.py": build_masks.parse_arguments, "report.py": report.parse_arguments,
}
# What a user must say: a value for every variable without one.
OWN = ["train_file=a.csv", "test_file=b.csv", "text=c.txt", "encoder=bert-base-uncased"]
SETTINGS = {
    "custom": OWN, "study_custom": OWN,
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
    for step in pipeline.plan(recipe, "R")[0]:
        if step.compute:
            assert step.name == "naive_bayes"
            continue
        script, *flags = step.command
        assert (REPOSITORY / script).is_file(), script
        parsed = PARSERS[Path(script).name](flags)
        assert step.name != "report" or parsed.runs == ["R"]


@pytest.mark.parametrize("name", ["mr_yelp", "mr_amazon", "restaurant_yelp",
                                  "restaurant_amazon", "laptop_yelp", "laptop_amazon"])
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
    for command, flags in ((tokenize_corpus, TOKENIZE_FLAGS), (train_tokenizer, VOCABULARY_FLAGS)):
        assert set(flags) <= {action.dest for action in command.build_parser()._actions}
    given = ["--tokens", "P", "--name", "n"]
    args = build_masks.parse_arguments([*given, "--strategy", "random"])
    assert set(MASK_FLAGS) <= set(vars(args))
    args = score_words.parse_arguments([*given, "--measure", "tfidf"])
    assert set(WORD_FLAGS) <= set(vars(args))


@pytest.mark.parametrize("value", ["word", 7, True, [1], {"a": 1}])
def test_every_flag_of_a_recipe_can_be_checked(value):
    """Whatever the kind of an option, a value is taken or refused in words."""
    for section, options in SECTIONS.items():
        for name, option in options.items():
            try:
                check_value(value, option, f"{section}.{name}")
            except ConfigError as error:
                assert str(error).startswith(f"{section}.{name} ")
    assert check_value("last", SECTIONS["finetune"]["epoch"], "finetune.epoch") == "last"
    with pytest.raises(ConfigError, match="finetune.epoch 'first': must be best or last"):
        check_value("first", SECTIONS["finetune"]["epoch"], "finetune.epoch")


def test_set_replaces_variables_and_settings(tmp_path):
    base = write_recipe(tmp_path, MINIMAL + "variables: {rate: 0.15}\nmasks: "
                        "{mlm_probability: '${rate}'}\n", "base.yaml")
    child = write_recipe(tmp_path, f"extends: {base.name}\ntask: {{data_dir: E}}\n")
    recipe = load_recipe(child, ["rate=0.2", "task_guided.max_steps=7",
                                          "arms=[none]", "tokenizer=T"])
    assert recipe["task"] == {"task": "mr", "data_dir": "E"}
    assert recipe["masks"] == {"mlm_probability": 0.2}
    assert recipe["task_guided"] == {"max_steps": 7}
    assert [arm.name for arm in recipe["arms"]] == ["none"] and recipe["tokenizer"] == "T"


def test_a_length_is_a_wish_where_a_recipe_of_ours_has_it(tmp_path):
    """Each section on its own; a length of the user's own takes it back."""
    wish, paper = {"max_seq_length": 256, "fit_positions": True}, write_recipe(
        tmp_path, "extends: paper.yaml\ntask_guided: {max_steps: 5}\n"
        "classifier: {max_seq_length: 100}\nannotate: {}\n")
    options = SETTINGS["custom"]
    for path, settings, section, expected in (
        ("custom", options, "task_guided", wish),
        ("custom", [*options, "task_guided.max_steps=7"], "task_guided", wish),
        ("custom", [*options, "task_guided.max_seq_length=64"], "task_guided",
         {"max_seq_length": 64}),
        ("custom", [*options, "task_guided={max_seq_length: 64}"], "task_guided",
         {"max_seq_length": 64}),
        ("custom", options, "finetune", {}),
        (paper, ["task={task: mr, data_dir: D}", "domain_text={input: [d.txt]}"], "task_guided",
         wish),
        (paper, ["task={task: mr, data_dir: D}", "domain_text={input: [d.txt]}"], "classifier",
         {"max_seq_length": 100}),
    ):
        found = load_recipe(path, settings)[section]
        assert {key: value for key, value in found.items()
                if key in ("max_seq_length", "fit_positions")} == expected, (path, settings)
    # A folder that was begun without the wish goes on: it is no other command.
    plain = pipeline.Step("s", ["x.py", "--max_seq_length", "256"], [], [])
    wished = pipeline.Step("s", [*plain.command, "--fit_positions"], [], [])
    journal = run_room.Journal(tmp_path)
    assert journal.command(plain) == journal.command(wished)
    words = commands(load_recipe("custom", options))["task_guided-selective-seed42"]
    assert " ".join(words).count("--max_seq_length 256 --save_steps 1000 --fit_positions") == 1


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
    ("vocabulary: {vocab_size: 9}", [], "vocabulary needs input and vocab_size"),
    ("vocabulary: {vocab_size: 9, input: a}", [], "an encoder brings its vocabulary"),
    ("encoder: null", ["general={model_config: bert-tiny}"], "either tokenizer"),
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
    ("extends: other.yaml", [], "extends other.yaml: no such file; give a path, or one of the "
     "names custom, demo, "),
    ("extends: ./other.yaml", [], "extends ./other.yaml: no such file; give one beside it"),
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


def test_the_quick_demo_learns_a_vocabulary_and_three_arms_from_scratch():
    target = (REPOSITORY / "Makefile").read_text().split("\ndemo-quick:")[1].split("\n\n")[0]
    assert "--recipe train/recipes/demo_quick.yaml" in target and "--launcher python" in target
    steps, arms = pipeline.plan(load_recipe(REPOSITORY / "train/recipes/demo_quick.yaml", []), "R")
    words = {step.name: step.command for step in steps}
    assert [step.name for step in steps if "vocabulary" in step.needs] == [
        "tokenize-general", "tokenize-domain"]
    for name in ("tokenize-general", "tokenize-domain"):
        assert flag_value(words[name], "tokenizer") == flag_value(words["vocabulary"], "output")
    assert flag_value(words["stage1"], "model_config") == "bert-tiny"
    assert "--model_name_or_path" not in words["stage1"]
    assert len(flag_value(words["finetune-selective-seed42"], "seeds").split(",")) == 2
    assert [arm["name"] for arm in arms if not arm["floor"]] == [
        "none", "random_matched", "selective"]


@pytest.mark.parametrize("path", ["demo_quick.yaml", ""])
def test_models_and_stores_between_steps_are_those_that_steps_write(tmp_path, path):
    recipe = load_recipe(
        REPOSITORY / "train/recipes" / path if path else write_recipe(tmp_path), [])
    words = commands(recipe)
    written = {flag_value(c, flag) for c in words.values() for flag in ("output", "output_dir")
               if f"--{flag}" in c}
    for name, command in words.items():
        for flag in ("model_name_or_path", "tokens", "annotations", "tokenizer"):
            if f"--{flag}" in command and (value := flag_value(command, flag)).startswith("R/"):
                assert any(value == w or value.startswith(w + "/") for w in written), (name, value)


def test_dry_run_prints_commands_that_a_shell_reads_back(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "dry_run", lambda *rest: None)  # the files are not there
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
import json, pathlib, sys, time
path, text, code = sys.argv[1:4]
print("hello from", path, flush=True)
if code == "0":
    pathlib.Path(path).write_text(json.dumps({"text": text[:1], "seconds": time.time()}))
sys.exit(int(code))
"""


@pytest.fixture
def chain(tmp_path):
    """Two steps, each a real process that writes a file; the second reads the first's.

    Only the first letter of its text goes into a file, as only some flags change a result.
    """
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def run(first="1", second="2", codes=("0", "0"), *flags, root=tmp_path / "R"):
        options = parse(PipelineConfig, ["--recipe", "x", "--output_dir", str(root), *flags])
        root.mkdir(exist_ok=True)
        files = {name: str(root / f"{name}.json") for name in ("one", "two")}
        steps = [
            pipeline.Step(name, [str(script), files[name], text, code], outputs=[files[name]],
                          records=[files[name]], needs=needs)
            for name, text, code, needs in (
                ("one", first, codes[0], []), ("two", second, codes[1], ["one"]))
        ]
        pipeline.run_side_by_side(steps, pipeline.Journal(root), options, [])

    run.root = tmp_path / "R"
    return run


@pytest.mark.parametrize("launcher", ["deepspeed", "python"])
def test_finished_steps_are_skipped_and_logs_kept(chain, capsys, launcher):
    """Also after the folder has moved; `--launcher python` forks instead of starting Python."""
    chain("1", "2", ("0", "0"), "--launcher", launcher)
    out = capsys.readouterr().out
    assert f"hello from {chain.root}/one" in out and "finished, skipped" not in out
    assert "hello from" in (chain.root / "logs" / "02-two.log").read_text()
    moved = chain.root.parent / "moved"
    os.rename(chain.root, moved)
    chain(root=moved)
    out = capsys.readouterr().out
    assert "hello from" not in out and out.count("finished, skipped") == 2


def test_another_command_is_refused_until_rerun(chain, capsys):
    """The published code reused its caches whatever the options were."""
    chain()
    with pytest.raises(ConfigError, match="step one was run with another command .*was .*--rerun"):
        chain("other")
    assert '"1"' in (chain.root / "one.json").read_text()
    chain("other", "2", ("0", "0"), "--rerun")
    assert '"o"' in (chain.root / "one.json").read_text()
    assert "step two is older than step one" in capsys.readouterr().out  # and was made again too
    chain("other")


def test_a_lost_output_is_made_again_and_its_readers_only_if_it_differs(chain, capsys):
    chain("1a")
    (chain.root / "one.json").unlink()
    chain("1a")  # the same but for the seconds
    assert capsys.readouterr().out.count("hello from") == 3
    journal = pipeline.Journal(chain.root)
    journal.steps["two"]["inputs"]["one"] = "another"
    (chain.root / "steps.json").write_text(json.dumps(journal.steps))
    with pytest.raises(ConfigError, match="step two is older than step one, which it reads"):
        chain("1a")
    # Found out before hours of work, not after.
    (chain.root / "one.json").unlink()
    with pytest.raises(ConfigError, match="step two is older"):
        chain("1a")
    assert not (chain.root / "one.json").exists()


def test_a_changed_record_or_deepspeed_json_is_noticed(tmp_path):
    config, made = tmp_path / "ds.json", tmp_path / "made.json"
    config.write_text("{}")
    made.write_text('{"a": 1, "seconds": 2}')
    step = pipeline.Step("s", ["s.py", "--deepspeed_config", str(config), "--x", "1"],
                         outputs=[str(made)], records=[str(made)])
    journal = pipeline.Journal(tmp_path)
    journal.start(step)
    journal.end(step, 1.0, success=True)
    journal = pipeline.Journal(tmp_path)
    made.write_text('{"a": 1, "seconds": 3}')
    assert journal.is_finished(step) and journal.objection(step) is None
    made.write_text('{"a": 2, "seconds": 2}')
    assert not journal.is_finished(step)
    config.write_text('{"zero_optimization": {}}')
    assert "was `--deepspeed_config" in journal.objection(step)
    for words in ("--lr 1 --steps 6 --flag --out x", "--lr 1 --steps 7 --out x --more y"):
        again = dataclasses.replace(step, command=["s.py", *words.split()])
        complaint = journal.objection(again)
        journal.start(again)
    assert complaint == (  # only what changed
        "step s was run with another command (was `--steps 6`, is `--steps 7`; was `--flag`, "
        "is ``; was ``, is `--more y`)")


def test_what_the_pipeline_did_not_make_is_refused(chain):
    chain.root.mkdir()
    (chain.root / "one.json").write_text("mine")
    with pytest.raises(ConfigError, match="this pipeline did not make it"):
        chain()
    assert (chain.root / "one.json").read_text() == "mine"


def test_failures_stop_the_pipeline_with_their_code(chain, capsys):
    with pytest.raises(SystemExit) as stopped:
        chain("1", "2", ("3", "0"))
    assert stopped.value.code == 3
    error = capsys.readouterr().err
    assert "step one failed with exit code 3" in error and "logs/01-one.log" in error
    assert not (chain.root / "two.json").exists()
    with pytest.raises(StopRequested, match="stopped on request: one; the same command"):
        chain("1", "2", ("75", "0"), "--rerun")


def test_a_step_that_writes_nothing_whole_is_noticed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("")
    step = pipeline.Step("lazy", [str(script)], outputs=["x"], records=["x"])
    options = parse(PipelineConfig, ["--recipe", "x", "--output_dir", str(tmp_path)])
    with pytest.raises(DataError, match="step lazy ended without an error, but"):
        pipeline.run_steps([step], pipeline.Journal(tmp_path), options)


@pytest.mark.parametrize("warm", [False, True])
def test_silent_commands_show_that_they_run(tmp_path, capsys, monkeypatch, warm):
    monkeypatch.setattr(run_room, "HEARTBEAT_SECONDS", 0.2)
    if warm:
        monkeypatch.setattr(run_room, "spawn", run_room.fork)
    script = tmp_path / "script.py"
    script.write_text("import sys, time; time.sleep(0.9); print('done'); sys.exit('why')")
    assert run_room.run_process([sys.executable, str(script)], tmp_path / "log") == 1
    out = capsys.readouterr().out
    assert "... running for" in out and "done" in out and "why" in out
    assert (tmp_path / "log").read_text().count("why") == 1


STOPS = {
    "SIGTERM": [signal.SIGTERM], "SIGUSR1": [signal.SIGUSR1],
    # A terminal that is closed may send both, and more than once.
    "terminal": [signal.SIGHUP, signal.SIGTERM, signal.SIGHUP],
    "killed": [signal.SIGKILL],
}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("stop", STOPS)
def test_a_stop_reaches_the_workers_of_a_launcher_that_dies_first(tmp_path, stop, warm):
    # As DeepSpeed's: its runner does not handle SIGTERM. The worker still stops in its own way,
    # and the pipeline reports the request, not the launcher's death.
    worker, launcher = tmp_path / "worker.py", tmp_path / "launcher.py"
    worker.write_text(
        "import pathlib, signal, sys, time\n"
        "from preprocess.errors import run_command\n"
        "def stop(number, frame):\n"
        "    time.sleep(0.2)\n"  # a checkpoint takes its time
        f"    pathlib.Path({str(tmp_path / 'checkpoint')!r}).write_text('saved')\n"
        "    sys.exit(75)\n"
        "def main():\n"
        "    signal.signal(signal.SIGTERM, stop)\n"
        "    print('ready', flush=True)\n    time.sleep(30)\n"
        "run_command(main)\n")
    launcher.write_text(
        f"import subprocess, sys\nsubprocess.run([sys.executable, {str(worker)!r}])\n")
    driver = (
        "import sys; from pathlib import Path; from train.recipes import run\n"
        f"run.spawn = run.fork if {warm} else run.spawn\n"
        f"sys.exit(run.run_process([sys.executable, {str(launcher)!r}], "
        f"Path({str(tmp_path / 'log')!r})))"
    )
    process = subprocess.Popen([sys.executable, "-c", driver], stdout=subprocess.PIPE, text=True)
    assert any("ready" in line for line in process.stdout)
    for number in STOPS[stop]:
        process.send_signal(number)
    assert process.wait(timeout=60) == (-9 if stop == "killed" else 75)
    end = time.monotonic() + 60
    while not (tmp_path / "checkpoint").exists():  # the worker notices that the pipeline is gone
        assert time.monotonic() < end
        time.sleep(0.05)


def test_broken_journal_is_named(tmp_path):
    (tmp_path / "steps.json").write_text("{")
    with pytest.raises(DataError, match="steps.json: not valid JSON"):
        pipeline.Journal(tmp_path)


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
    steps[0].compute()
    assert pipeline.Journal(tmp_path / "R").digest(steps[0])
    answers = tmp_path / "R" / "floors" / "naive_bayes" / "seed_0" / "predictions.jsonl"
    assert len(answers.read_text().splitlines()) == 7
