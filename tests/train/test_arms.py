"""Scores and arms of a recipe: what they may say, and the steps that they become."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from preprocess.errors import ConfigError, DataError
from preprocess.masking import read_corruption
from train import pipeline
from train.config import PipelineConfig, parse
from train.recipes.recipe import load_recipe

BASE = """
encoder: E
task: {task: mr, data_dir: D}
domain_text: {input: [d.txt]}
"""
GENERAL = "general_text: {input: [g.txt]}\n"


def load(folder: Path, text: str, *settings: str) -> dict:
    (folder / "r.yaml").write_text(BASE + text)
    return load_recipe(folder / "r.yaml", list(settings))


def planned(folder: Path, text: str, *settings: str) -> tuple[dict[str, str], dict[str, dict]]:
    """The command of every step, and every arm, by name."""
    steps, arms = pipeline.plan(load(folder, text, *settings), "R")
    seen: set[str] = set()
    for step in steps:
        assert set(step.needs) <= seen, step.name  # what it reads was made before
        assert step.name not in seen
        seen.add(step.name)
    return {step.name: " ".join(step.command) for step in steps}, {arm["name"]: arm for arm in arms}


def test_a_recipe_of_before_plans_the_same_steps(tmp_path):
    """Also where the control's own arm is not among the arms."""
    steps, arms = planned(tmp_path, "arms: [random, random_matched]\n")
    assert list(steps) == [
        "tokenize-domain", "leakage", "classifier", "annotate", "scorer", "score",
        "masks-selective", "masks-random_matched", "task_guided-random-seed42",
        "finetune-random-seed42", "task_guided-random_matched-seed42",
        "finetune-random_matched-seed42", "report"]
    assert steps["score"].endswith(
        "score_tokens.py --model_name_or_path R/scorer/hf --tokens R/domain/text --name task")
    assert steps["masks-selective"].endswith(
        "--tokens R/domain/text --strategy selective --scores task --name selective")
    assert steps["masks-random_matched"].endswith(
        "--strategy random_matched --match selective --name random_matched")
    assert steps["task_guided-random-seed42"].endswith(
        "pretrain.py --tokens R/domain/text --masking random --model_name_or_path E --seed 42 "
        "--output_dir R/task_guided/random-seed42")
    assert "--mask_index random_matched " in steps["task_guided-random_matched-seed42"]
    chain = ["classifier", "annotate", "scorer", "score", "masks-selective"]
    assert arms["random_matched"]["masking"] == [*chain, "masks-random_matched"]
    assert arms["random"]["masking"] == []
    assert arms["random_matched"]["match"] == "selective"


def test_scores_are_made_once_and_only_what_an_arm_needs(tmp_path):
    text = GENERAL + """
scores:
  words: {measure: tfidf}
  theirs: {measure: difference}
  listed: {measure: lexicon, lexicon: words.csv}
  phrases: {measure: pmi}
  gradient: {measure: gradient, max_seq_length: 64}
  surprise: {measure: surprise, num_passes: 5}
  more: {measure: excess, reference: base}
  both: {combine: rank, of: [words, surprise]}
  unused: {measure: tfidf}
arms:
  - none
  - {name: control, strategy: random_matched, match: a}
  - {name: a, strategy: top, scores: words, rate: 0.2}
  - {name: b, strategy: band, scores: words, units: words, centre: 0.7}
  - {name: c, strategy: selective, scores: theirs}
  - {name: d, strategy: top, scores: gradient}
  - {name: e, strategy: top, scores: both, units: phrases}
  - {name: g, strategy: top, scores: listed}
  - {name: f, strategy: sampled, scores: more, temperature: 2, epochs: 3}
score: {batch_tokens: 100}
masks: {seed: 7}
"""
    steps, arms = planned(tmp_path, text)
    made = {name: command.split("/")[-1] for name, command in steps.items()
            if name.startswith(("score", "annotate", "classifier"))}
    # No scorer: no arm reads its scores. The general text is tokenized for `theirs` alone.
    assert list(made) == ["score-words", "score-theirs", "classifier", "score-gradient",
                          "score-surprise", "score-both", "score-phrases", "score-listed",
                          "score-more"]
    assert "stage1" not in steps
    tokens = "--tokens R/domain/text"
    for name, command in {
        "score-words": f"score_words.py {tokens} --measure tfidf --name words",
        "score-theirs": f"score_words.py {tokens} --measure difference --against R/general/text "
                        "--name theirs",
        "score-listed": f"score_words.py {tokens} --measure lexicon --lexicon words.csv "
                        "--name listed",
        "score-gradient": "score_tokens.py --batch_tokens 100 --measure gradient "
                          "--max_seq_length 64 --model_name_or_path R/classifier/seed_13/hf "
                          f"{tokens} --name gradient",
        "score-surprise": "score_tokens.py --batch_tokens 100 --measure surprise --num_passes 5 "
                          f"--model_name_or_path E {tokens} --name surprise",
        "score-more": "score_tokens.py --batch_tokens 100 --measure excess --reference base "
                      f"--model_name_or_path E {tokens} --name more",
        "score-both": f"score_words.py {tokens} --combine rank --scores words surprise --name both",
        "masks-a": f"build_masks.py {tokens} --strategy top --scores words --seed 7 "
                   "--mlm_probability 0.2 --name a",
        "masks-b": f"build_masks.py {tokens} --strategy band --scores words --seed 7 "
                   "--units words --centre 0.7 --name b",
        "masks-e": f"build_masks.py {tokens} --strategy top --scores both --seed 7 "
                   "--units phrases --name e",
        "masks-f": f"build_masks.py {tokens} --strategy sampled --scores more --seed 7 "
                   "--epochs 3 --temperature 2 --name f",
        "masks-control": f"build_masks.py {tokens} --strategy random_matched --match a --seed 7 "
                         "--name control",
    }.items():
        assert steps[name].endswith(command), name
    assert list(steps).index("masks-a") < list(steps).index("masks-control")
    recorded = next(step for step in pipeline.plan(load(tmp_path, text), "R")[0]
                    if step.name == "masks-f").records
    assert [path.split("*.")[1] for path in recorded[::2]] == [
        "f.mask.npy", "f-epoch1.mask.npy", "f-epoch2.mask.npy"]
    assert arms["control"]["masking"] == ["score-words", "masks-a", "masks-control"]
    assert arms["e"]["masking"] == ["score-words", "score-surprise", "score-both", "score-phrases",
                                    "masks-e"]
    assert {key: arms["b"][key] for key in ("strategy", "scores", "units", "match")} == {
        "strategy": "band", "scores": "words", "units": "words", "match": ""}
    assert arms["none"]["strategy"] == "none"


def test_scores_may_have_a_number_for_a_name(tmp_path):
    steps, _ = planned(
        tmp_path, "scores: {7: {measure: tfidf}}\narms: [{name: 8, strategy: top, scores: '7'}]\n")
    assert "--scores 7 --name 8" in steps["masks-8"]


def test_rates_and_corruption_go_where_masks_are_made(tmp_path):
    text = """
arms:
  - {name: a, strategy: random, rate: "0.30:0.15", corruption: [80, 10, 10]}
  - {name: b, strategy: selective, rate: 0.4, corruption: "100,0,0"}
  - whole_word
masks: {mlm_probability: 0.3}
"""
    steps, _ = planned(tmp_path, text)
    stage2 = {name: steps[f"task_guided-{name}-seed42"] for name in ("a", "b", "whole_word")}
    assert "--masking random --mlm_probability 0.30:0.15 --corruption 80,10,10 " in stage2["a"]
    assert "--mask_index b --corruption 100,0,0 " in stage2["b"]
    assert "--mlm_probability 0.4 --name b" in steps["masks-b"]
    assert "--masking whole_word --mlm_probability 0.3 " in stage2["whole_word"]
    # What stage 2 says itself is for its drawn masks; an index has its rate already.
    steps, _ = planned(tmp_path, text, "task_guided.mlm_probability=0.25")
    assert "--mlm_probability 0.25" in steps["task_guided-whole_word-seed42"]
    assert "--mlm_probability" not in steps["task_guided-b-seed42"]
    with pytest.raises(ConfigError, match="masks.mlm_probability 2: must be above 0 and at most 1"):
        load(tmp_path, text, "masks.mlm_probability=2")


def test_shares_of_corruption_keep_their_digits(tmp_path):
    steps, _ = planned(tmp_path, "arms: [{name: a, strategy: random, corruption: [33.3333333, "
                                 "33.3333333, 33.3333334]}]\n")
    typed = steps["task_guided-a-seed42"].split("--corruption ")[1].split()[0]
    assert read_corruption(typed) == (33.3333333, 33.3333333, 33.3333334)


def test_counted_scores_serve_every_length_of_stage_1(tmp_path):
    text = GENERAL + """
general: {max_steps: 30}
export_steps: [10, 20]
scores:
  words: {measure: tfidf}
  surprise: {measure: surprise}
  both: {combine: rank, of: [words, surprise]}
arms: [{name: a, strategy: top, scores: words}, {name: b, strategy: top, scores: both}]
"""
    steps, _ = planned(tmp_path, text)
    assert [name for name in steps if name.startswith("score")] == [
        "score-words", "score-surprise-step_10", "score-both-step_10", "score-surprise-step_20",
        "score-both-step_20"]
    assert "--scores words surprise-step_20 --name both-step_20" in steps["score-both-step_20"]
    assert "--model_name_or_path R/stage1/hf_step_20" in steps["score-surprise-step_20"]
    assert "--scores words --name a-step_20" in steps["masks-a-step_20"]


def test_arms_can_use_the_text_without_what_leaked(tmp_path):
    steps, _ = planned(tmp_path, "arms: [random, selective]\n")
    assert steps["leakage"].endswith(
        "select_documents.py --tokens R/domain/text --task mr --data_dir D")
    steps, _ = planned(tmp_path, "arms: [random, selective]\n", "domain_text.drop_leaked=true")
    assert steps["leakage"].endswith("--drop_leaked --output R/domain_kept/text")
    assert "leaked" not in steps["tokenize-domain"]
    for name in ("score", "masks-selective", "task_guided-random-seed42"):
        assert "--tokens R/domain_kept/text" in steps[name]
    steps, _ = planned(tmp_path, "arms: [none]\n")
    assert "leakage" not in steps  # nothing is trained on the domain's text


@pytest.mark.parametrize(("scores", "message"), [
    ("[words]", "scores must hold names"),
    ("{words: tfidf}", "must have a measure"),
    ("{words: {measure: tfidf, combine: rank}}", "must have a measure"),
    ("{words: {measure: tfidff}}", "unknown measure 'tfidff'; did you mean 'tfidf'"),
    ("{words: {measure: [tfidf]}}", "unknown measure"),
    ("{words: {measure: tfidf, num_passes: 3}}", "option that tfidf does not take: 'num_pass"),
    ("{words: {measure: surprise, num_passes: many}}", "num_passes 'many': must be a whole"),
    ("{words: {measure: lexicon}}", "lexicon needs lexicon"),
    ("{words: {measure: gradient, num_passes: 3}}", "num_passes 3: has no use with --measure grad"),
    ("{words: {measure: lexicon, lexicon: --evil}}", "does not begin with -"),
    ("{words: {measure: tfidf, lexicon: a.csv}}", "tfidf does not read it"),
    ("{words: {measure: excess}}", "excess needs reference"),
    ("{words: {measure: difference}}", "difference needs against.*or a general_text"),
    ("{words: {measure: difference, against: general}}", "there is no general_text"),
    ("{both: {combine: rank, of: [task]}}", "two or more scores"),
    ("{both: {combine: rank, of: [task, task]}}", "two or more scores"),
    ("{both: {combine: rnk, of: [task, both]}}", "unknown way to combine 'rnk'; did you mean 'ran"),
    ("{both: {combine: rank, of: [task, wrds]}}", "combines unknown scores 'wrds'"),
    ("{a: {combine: max, of: [task, b]}, b: {combine: max, of: [task, a]}}", "combined of itself"),
    ("{idf: {measure: tfidf}, both: {combine: max, of: [task, idf]}}",
     r"scores.both: --combine max: task \(log-odds, parted at 0\) and idf \(tf x nats, not parted"),
    ("{a: {combine: rank, of: [task, b]}, b: {measure: tfidf}, c: {combine: max, of: [a, task]}}",
     r"c: --combine max: a \(log2 of rarity, not parted at 0\) and task \(log-odds, parted at 0\)"),
    ("{Words: {measure: tfidf}}", "the name 'Words' must have 1 to 40"),
    ("{words-step_3: {measure: tfidf}}", "not end as -seed1, -step_1"),
    ("{words: {measure: pmi}}", "`units: words` has a meaning of its own"),
    ("{7: {measure: tfidf}, both: {combine: rank, of: [task, 8]}}", "combines unknown scores 8"),
])
def test_scores_that_cannot_be_are_named(tmp_path, scores, message):
    with pytest.raises(ConfigError, match=message) as error:
        load(tmp_path, f"scores: {scores}\n")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("arms", "message"), [
    ("[selectiv]", "unknown arm 'selectiv'; did you mean 'selective'"),
    ("[{name: a}]", "must be the name of a strategy, or have a name and a strategy"),
    ("[[none]]", "must be the name of a strategy"),
    ("[{name: none, strategy: random}]", "the names none, .* are taken"),
    ("[{name: A b, strategy: random}]", "the name 'A b' must have 1 to 40"),
    ("[{name: -a, strategy: random}]", "not begin with -"),
    (f"[{{name: {'a' * 41}, strategy: random}}]", "must have 1 to 40"),
    ("[{name: a-seed1, strategy: random}]", "not end as -seed1"),
    ("[random, {name: random, strategy: whole_word}]", "two arms are called random"),
    ("[{name: a, strategy: rndom}]", "unknown strategy 'rndom'; did you mean 'random'"),
    ("[{name: a, strategy: random, sores: b}]", "unknown key 'sores'; did you mean 'scores'"),
    ("[{name: a, strategy: selective, scores: wrds}]", "unknown scores 'wrds'"),
    ("[{name: a, strategy: random, scores: task}]", "scores has no use with random; leave it out"),
    ("[{name: a, strategy: random, units: words}]", "units has no use with random"),
    ("[{name: a, strategy: top, temperature: 2}]", "temperature has no use with top; leave it out"),
    ("[{name: a, strategy: band, temperature: 2}]", "temperature has no use with band"),
    ("[{name: a, strategy: selective, scores: idf}]",
     "selective takes scores above 0, and 0 means nothing in idf; .* strategy top, sampled, band"),
    ("[{name: a, strategy: selective_fill, scores: both}]", "0 means nothing in both"),
    ("[{name: a, strategy: inverse, match: b}, {name: b, strategy: random_matched}, selective]",
     "arm a matches b, which has no scores that inverse could read"),
    ("[{name: a, strategy: selective, units: word}]", "unknown units 'word'; did you mean 'words"),
    ("[{name: a, strategy: top, scores: idf, units: idf}]",
     "units idf: these scores have no units; give words, none, or scores of measure pmi"),
    ("[{name: a, strategy: selective, match: b}]", "match has no use with selective"),
    ("[{name: a, strategy: selective, rate: '0.3:0.1'}]", "needs a strategy that draws"),
    ("[{name: a, strategy: selective, rate: 2}]", "rate 2: must be above 0 and at most 1"),
    ("[{name: a, strategy: random, rate: '0.3:1'}]", "must be above 0 and below 1"),
    ("[{name: a, strategy: random, rate: x}]", "rate 'x': must be a number"),
    ("[{name: a, strategy: random, corruption: [80, 20]}]", "three percentages"),
    ("[{name: a, strategy: random, corruption: [80, 10, 20]}]", "three percentages"),
    ("[{name: a, strategy: selective, epochs: 0}]", "epochs 0: must be between 1 and 1000"),
    ("[{name: a, strategy: sampled, epochs: 1000000000}]", "epochs 1000000000: must be between"),
    ("[{name: a, strategy: sampled, temperature: 0}]", "temperature 0: must be above 0"),
    ("[{name: a, strategy: band, centre: 1.1}]", "centre 1.1: must be from 0 to 1"),
    ("[{name: a, strategy: band, centre: high}]", "centre 'high': must be a number"),
    ("[{name: c, strategy: random_matched, match: b}, none]",
     "arm c matches 'b', which is no arm of this recipe; there are c, none"),
    ("[{name: c, strategy: random_matched, match: selective}]", "which is no arm of this recipe"),
    ("[{name: c, strategy: random_matched, match: random}, random]", "has no mask index to match"),
    ("[{name: c, strategy: random_matched, match: none}, none]", "has no mask index to match"),
    ("[{name: c, strategy: random_matched, match: c}]", "arm c is matched to itself"),
    ("[{name: c, strategy: random_matched, match: d}, {name: d, strategy: random_matched, "
     "match: c}]", "arm c is matched to itself, through others or directly"),
    ("[{name: c, strategy: random_matched, rate: 0.2}]", "takes that of the arm that it matches"),
])
def test_arms_that_cannot_be_are_named(tmp_path, arms, message):
    with pytest.raises(ConfigError, match=message) as error:
        load(tmp_path, "scores: {idf: {measure: tfidf}, both: {combine: union, of: [task, idf]}}\n"
             f"arms: {arms}\n")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("arms", "arm"), [
    ("[none, selective]", "arm selective: selective takes scores above 0"),
    ("[random_matched]", "arm selective, which a control matches by default: selective takes"),
])
def test_strategies_by_name_alone_refuse_scores_without_a_boundary_too(tmp_path, arms, arm):
    with pytest.raises(ConfigError, match=f"{arm}.*0 means nothing in task; .*strategy top"):
        load(tmp_path, f"scores: {{task: {{measure: surprise}}}}\narms: {arms}\n")


def test_flags_of_all_scores_must_suit_each(tmp_path):
    text = "scores: {slope: {measure: gradient}}\nscore: {dtype: fp16}\n"
    with pytest.raises(ConfigError, match=r"scores\.slope: --dtype fp16: --measure gradient"):
        load(tmp_path, text)
    load(tmp_path, text, "scores.slope={measure: gradient, dtype: auto}")


def test_set_gives_scores_and_arms(tmp_path):
    recipe = load(tmp_path, "scores: {words: {measure: tfidf}}\n",
                  "scores.more={measure: surprise, num_passes: 3}",
                  "arms=[none, {name: a, strategy: top, scores: more}]")
    assert set(recipe["scores"]) == {"task", "words", "more"}
    assert recipe["scores"]["more"].options == {"num_passes": 3}
    assert [arm.name for arm in recipe["arms"]] == ["none", "a"]
    with pytest.raises(ConfigError, match="--set scores.b=1: scores is 5 and not names with val"):
        load(tmp_path, "", "scores=5", "scores.b=1")


# --------------------------------------------------------------------------- weak inputs

WRITE = """
import pathlib, sys
path, text = sys.argv[1:]
print("ran", path)
pathlib.Path(path).write_text(text)
"""


def test_the_pipeline_stops_at_a_weak_input_until_told_to_go_on(tmp_path, capsys):
    script, root = tmp_path / "write.py", tmp_path / "R"
    script.write_text(WRITE)
    root.mkdir()
    contents = {
        "results.jsonl": '{"seed": 13, "weak": []}\n{"seed": 43, "weak": ["accuracy is low"]}\n',
        "results.json": json.dumps({"weak": ["not above its baselines"]}, indent=1),
        "odd.json": "[{", "last.json": '{"weak": "fine"}',
    }
    steps = [pipeline.Step(Path(name).stem + str(number), [str(script), str(root / name), text],
                           outputs=[str(root / name)], records=[str(root / name)],
                           judged=[str(root / name)])
             for number, (name, text) in enumerate(contents.items())]

    def run(*flags: str) -> str:
        options = parse(PipelineConfig, ["--recipe", "x", "--output_dir", str(root), *flags])
        pipeline.run_steps(steps, pipeline.Journal(root), options)
        return capsys.readouterr().out

    for _ in range(2):  # typed again, it stops at the same place, and what is finished is kept
        with pytest.raises(DataError, match="step results0: accuracy is low; .*--go_on"):
            run()
        assert not (root / "results.json").exists()
    assert capsys.readouterr().out.count("ran ") == 1
    said = run("--go_on")
    assert said.count("ran ") == 3 and "results0: finished, skipped" in said
    assert "warning: step results0: accuracy is low (--go_on)" in said
    assert "warning: step results1: not above its baselines" in said


def test_what_decides_masks_is_judged_and_nothing_else(tmp_path):
    steps, _ = pipeline.plan(load(tmp_path, "arms: [none, selective]\n"), tmp_path / "R")
    judged = {step.name: step.judged[0].removeprefix(f"{tmp_path}/R/")
              for step in steps if step.judged}
    assert judged == {
        "classifier": "classifier/results.jsonl",
        "annotate": "annotations/text*.importance.json", "scorer": "scorer/results.json"}
