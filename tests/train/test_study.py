"""A made-up study: its page, and the same page from the file of `--export`."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from preprocess.errors import ConfigError, DataError
from preprocess.store import TokenStore, write_array
from tests.support.runs import read_csv
from tests.support.stores import MEASURED
from tests.support.studies import NUM_LABELS, write_study
from train import report
from train.reports import groups as arms_of_folders
from train.reports import steps_to, study, words
from train.reports.compare import arms_of, compare, pairs_of
from train.reports.costs import flops_rows
from train.reports.masked import index_of
from train.reports.results import Arm

# Tables that come from the answers and rows alone.
SHARED = ("table", "differences", "power", "steps_to", "stage2_runs", "classes")
PARTS = ("classifier", "annotate", "scorer", "masks", "scores")  # a file knows only their sum


@pytest.fixture(scope="module")
def made_up(tmp_path_factory) -> Path:
    return write_study(tmp_path_factory.mktemp("made_up") / "study", items=120)


@pytest.fixture(scope="module")
def exported(made_up, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "study.csv"
    found, notes = arms_of_folders.read_groups([made_up])
    assert notes == []
    path.write_text(study.study_csv(found, "study"))
    return path


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(report, "draw", lambda *_: ({}, []))


def test_folders_and_their_file_give_the_same_tables(made_up, tmp_path, no_figures, capsys):
    file = tmp_path / "results" / "study.csv"
    report.main([str(made_up), "--output_dir", str(tmp_path / "a"), "--export", str(file)])
    first = capsys.readouterr().out
    report.main(["--from", str(file), "--output_dir", str(tmp_path / "b")])
    second = capsys.readouterr().out
    for name in SHARED:
        one, two = (read_csv(tmp_path / folder / f"{name}.csv") for folder in "ab")
        assert one == two and len(one) >= 6, name
    for name in ("costs", "flops"):
        one, two = ([{key: value for key, value in row.items() if key not in PARTS}
                     for row in read_csv(tmp_path / folder / f"{name}.csv")] for folder in "ab")
        assert one == two and all(row["total"] for row in one), name
    notes = [[line for line in out.splitlines() if line.startswith("Note: ")]
             for out in (first, second)]
    assert notes[0] == notes[1] and len(notes[0]) > 1


def test_the_columns_and_what_they_hold(made_up, exported):
    rows = read_csv(exported)
    assert tuple(rows[0]) == study.COLUMNS and len(set(study.COLUMNS)) == len(study.COLUMNS)
    assert study.COLUMNS[:28] == tuple(
        "study task arm strategy score match stage1_seed pretrain_seed stage1_steps stage2_steps "
        "labels finetune_seed validation_accuracy test_accuracy test_macro_f1 num_items "
        "items_digest correct masked_tokens tokens mask_seconds stage2_seconds finetune_seconds "
        "flops hf_digest identity_digest commit device".split())
    # (1 + 3 arms x 3 lengths) x 2 budgets x 3 x 3 seeds, and the baseline.
    assert len(rows) == 10 * 2 * 9 + 1
    (row,) = [row for row in rows if (row["arm"], row["labels"], row["stage2_steps"],
                                      row["pretrain_seed"], row["finetune_seed"])
              == ("selective", "100", "50", "42", "43")]
    folder = made_up / "finetune" / "selective-seed42-labels100-steps50" / "seed_43"
    answers = sorted((json.loads(line) for line in
                      (folder / "predictions.jsonl").read_text().splitlines()),
                     key=lambda answer: answer["item"])
    bits = "".join(str(int(a["label"] == a["prediction"])) for a in answers)
    assert row["correct"] == f"{int(bits, 2):030x}"
    pairs = "".join(f"{a['label']}{a['prediction']}" for a in answers)
    assert row["answers"] == f"{int(pairs, 2):060x}"
    # The shared steps of no budget, and those of the seed: 10 + 20 + 30 + 5 + 2.
    assert (row["mask_seconds"], row["stage2_seconds"], row["tokens"]) == ("67.0", "25.0", "50000")
    assert (row["mask_flops"], row["stage1_flops"]) == (str(15e12), str(5e12))
    assert row["class_names"] == '["negative", "positive"]'
    assert row["hf_digest"] == "selective-42-100-50" and row["mid_schedule"] == "1"
    (floor,) = [row for row in rows if row["strategy"] == "baseline"]
    assert floor["arm"] == "naive_bayes" and floor["labels"] == ""


def test_operations_of_each_part(made_up):
    found, _ = arms_of_folders.read_groups([made_up])
    (row,) = [row for row in flops_rows(arms_of(found)) if (row["arm"], row["labels"])
              == ("selective", 100) and row["task_guided"] == f"{200 * 1e10:.3g}"]
    assert row == {
        "arm": "selective", "labels": 100, "general": "5e+12", "classifier": "1e+12",
        "annotate": "2e+12", "scorer": "4e+12", "scores": "8e+12", "masking": "1.5e+13",
        "task_guided": "2e+12", "total": "2.2e+13", "finetune": "3e+12"}


def test_a_step_that_does_not_tell_its_operations_leaves_the_sum_open(made_up, tmp_path):
    folder = shutil.copytree(made_up, tmp_path / "s")
    for path in folder.glob("annotate-*/text.importance.json"):
        path.write_text('{"identity": {"command": "annotate"}}')
    found, _ = arms_of_folders.read_groups([folder])
    rows = {row["arm"]: row for row in flops_rows(arms_of(found))}
    assert rows["selective"]["scorer"] == "4e+12"
    assert rows["selective"]["annotate"] == rows["selective"]["masking"] == ""
    assert rows["selective"]["total"] == "" and rows["random"]["total"] == "7e+12"


def test_arms_are_compared_at_equal_labels_and_lengths(exported):
    found = study.read_studies([exported])
    pairs = list(pairs_of(found))
    assert len(found) == 6 and len(pairs) == 6 * 6
    assert all(one.labels == two.labels and two.stage2_steps in (0, one.stage2_steps)
               for one, two in pairs)
    controls = {(one.line, two.line) for one, two in pairs}
    assert ("selective", "random_matched") in controls and ("random", "none") in controls
    assert {arm.name for arm in arms_of(found) if arm.line == "none"} == {
        f"none/{count} labels" for count in NUM_LABELS.values()}


def test_a_known_difference_is_found(tmp_path):
    """Of many seeds and items: what selective gains over random, 3 points, and half of it."""
    write_study(tmp_path / "s", items=1500, lengths=(100, 200), budgets=("all",),
                pretrain_seeds=(1, 2, 3, 4, 5))
    found, _ = arms_of_folders.read_groups([tmp_path / "s"])
    comparisons, _ = compare(pairs_of(found))
    told = {(one.first.line, one.second.line, one.steps): one for one in comparisons}
    for steps, true in ((100, 0.015), (200, 0.03)):
        one = told["selective", "random", steps]
        assert one.found.low < true < one.found.high
    assert told["selective", "none", 200].verdict == "better"
    assert told["random_matched", "random", 200].verdict == "no difference seen"


def test_seeds_that_one_arm_lacks_are_left_out_of_the_other(made_up, tmp_path, no_figures, capsys):
    shutil.copytree(made_up, tmp_path / "study")
    shutil.rmtree(tmp_path / "study" / "finetune" / "selective-seed41-labelsall")
    report.main([str(tmp_path / "study"), "--output_dir", str(tmp_path / "out")])
    rows = {(row["arm"], row["against"], row["labels"], row["steps"]): row
            for row in read_csv(tmp_path / "out" / "differences.csv")}
    assert rows["selective", "random", "2000", "200"]["seeds"] == "2x3"
    assert rows["selective", "random", "100", "200"]["seeds"] == "3x3"
    assert "Compared on the pre-training seeds that both have: selective/2000 labels/200" in (
        capsys.readouterr().out)


# ------------------------------------------------------------------------------ a bad file


def changed(path: Path, target: Path, line: int, **cells: str) -> str:
    """Copy a file with cells of a line changed; return the name of the copy."""
    rows = list(csv.reader(io.StringIO(path.read_text())))
    for name, value in cells.items():
        rows[line - 1][rows[0].index(name)] = value
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    target.write_text(out.getvalue())
    return str(target)


@pytest.mark.parametrize("cells, reason", [
    ({"correct": "ff"}, "correct has 1 bytes for 120 bits"),
    ({"correct": "zz"}, "non-hexadecimal"),
    ({"correct": "ff" * 15}, "test_accuracy is .*, and correct gives 1.0"),
    ({"test_accuracy": "1.2"}, "test_accuracy is 1.2, above 1"),
    ({"test_accuracy": "nan"}, "test_accuracy is 'nan'"),
    ({"test_accuracy": ""}, "test_accuracy is empty"),
    ({"labels": "-3"}, "labels is '-3'"),
    ({"finetune_seed": "x"}, "finetune_seed is 'x'"),
    ({"answers": "00" * 30}, "answers do not agree with correct"),
    ({"num_items": ""}, "correct has 15 bytes for None bits"),
    ({"masked_tokens": "9" * 400}, "masked_tokens is '999"),
])
def test_a_damaged_row_is_one_sentence(exported, tmp_path, cells, reason):
    path = changed(exported, tmp_path / "bad.csv", 7, **cells)
    with pytest.raises(DataError, match=rf"bad.csv, line 7: .*{reason}") as caught:
        report.main(["--from", path, "--output_dir", str(tmp_path / "out")])
    assert "write it again with python train/report.py R --export" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_files_that_are_none(exported, tmp_path):
    lines = exported.read_text().splitlines(keepends=True)
    for content, reason in (
        ("", "no column 'study'"), ("a,b\n1,2\n", "no column 'study'"),
        (lines[0], "no row in it"), (lines[0] + lines[1] + lines[1], "line 3: a model that an"),
        (lines[0] + lines[1][:200], "line 2: .* cells for 36"),
        (lines[0] + '"', "not a CSV file"),
    ):
        (tmp_path / "bad.csv").write_text(content)
        with pytest.raises(DataError, match=reason):
            study.read_studies([tmp_path / "bad.csv"])
    with pytest.raises(DataError, match="cannot be read"):
        study.read_studies([tmp_path / "absent.csv"])


def test_what_to_report_is_said_once(exported, tmp_path):
    with pytest.raises(ConfigError, match="give either run directories"):
        report.main([])
    with pytest.raises(ConfigError, match="give either run directories"):
        report.main([str(tmp_path), "--from", str(exported)])
    with pytest.raises(ConfigError, match="copies what --from reads"):
        report.main(["--from", str(exported), "--export", "x.csv"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--export .*cannot be written"):
        report.export(tmp_path / "file" / "x.csv", study.read_studies([exported]))


def test_two_studies_are_kept_apart(exported, tmp_path, no_figures):
    other = tmp_path / "other.csv"
    other.write_text(exported.read_text().replace("\nstudy,", "\nother,"))
    report.main(["--from", str(exported), str(other), "--output_dir", str(tmp_path / "out")])
    rows = read_csv(tmp_path / "out" / "differences.csv")
    assert {row["arm"].partition("/")[0] for row in rows} == {"study", "other"}
    assert all(row["arm"].partition("/")[0] == row["against"].partition("/")[0] for row in rows)


def test_studies_of_one_name_in_two_folders_are_not_mixed(exported, tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        shutil.copy(exported, tmp_path / folder / "study.csv")
    files = [tmp_path / folder / "study.csv" for folder in "ab"]
    arms = arms_of(study.read_studies(files))
    assert len(arms) == 2 * len(arms_of(study.read_studies([exported])))
    assert {tuple(run.seeds) for arm in arms for run in arm.runs} == {(13, 43, 83)}
    assert len({arm.name for arm in arms}) == len(arms)
    assert {arm.name.split("/study/")[0] for arm in arms} == {
        str(file.parent) for file in files}
    # The same file twice is one study.
    again = arms_of(study.read_studies([exported, exported]))
    assert [arm.name for arm in again] == [
        arm.name for arm in arms_of(study.read_studies([exported]))]


def test_the_order_of_the_rows_of_seeds_does_not_matter(made_up, exported, tmp_path):
    """A seed that was trained again stands last; a file may have been sorted."""
    shutil.copytree(made_up, tmp_path / "study")
    path = tmp_path / "study" / "finetune" / "selective-seed41-labelsall" / "results.jsonl"
    first, *others = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*others, first]))
    assert study.study_csv(arms_of_folders.read_groups([tmp_path / "study"])[0], "study") == (
        exported.read_text())
    head, *lines = exported.read_text().splitlines(keepends=True)
    (tmp_path / "turned.csv").write_text("".join([head, *reversed(lines)]))
    differences = [
        {(one.first.name, one.second.name): one.found
         for one in compare(pairs_of(study.read_studies([file])))[0]}
        for file in (exported, tmp_path / "turned.csv")]
    both = set(differences[0]) & set(differences[1])
    assert len(both) >= 12
    assert all(differences[0][pair].low == pytest.approx(differences[1][pair].low)
               for pair in both)


def test_answers_that_are_not_those_of_the_row_are_not_exported(made_up, tmp_path, no_figures):
    """--from would refuse the file. Tables are written all the same."""
    shutil.copytree(made_up, tmp_path / "study")
    path = tmp_path / "study" / "finetune" / "selective-seed41-labelsall" / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["test_accuracy"] = 0.25
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(DataError, match="--export: .*selective-seed41-labelsall, seed 43: .* 0.25"):
        report.main([str(tmp_path / "study"), "--output_dir", str(tmp_path / "out"),
                     "--export", str(tmp_path / "study.csv")])
    assert (tmp_path / "out" / "differences.csv").exists()
    assert not (tmp_path / "study.csv").exists()


@pytest.mark.parametrize("answer", [-1, 2, 7])
def test_a_class_that_the_task_has_not_is_a_note(made_up, tmp_path, no_figures, capsys, answer):
    shutil.copytree(made_up, tmp_path / "study")
    folder = tmp_path / "study" / "finetune" / "selective-seed41-labelsall" / "seed_13"
    file = folder / "predictions.jsonl"
    text = file.read_text()
    file.write_text(re.sub(r'"prediction": \d', f'"prediction": {answer}', text, count=1))
    report.main([str(tmp_path / "study"), "--output_dir", str(tmp_path / "out")])
    assert "a class that the task has not, so this run is not compared" in capsys.readouterr().out
    for path in folder.parent.glob("seed_*/predictions.jsonl"):
        path.write_text("")
    report.main([str(tmp_path / "study"), "--output_dir", str(tmp_path / "out")])
    assert "cut off or broken, so this run is not compared" in capsys.readouterr().out


def test_seeds_of_stage_1_are_runs_of_their_own(exported, tmp_path):
    """With one seed of stage 2: they share its number, and it names no run."""
    lines = list(csv.DictReader(io.StringIO(exported.read_text())))
    kept = [{**row, "stage1_seed": row["pretrain_seed"], "pretrain_seed": "41"}
            for row in lines if row["stage2_steps"] == "50"]
    out = io.StringIO()
    writer = csv.DictWriter(out, study.COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(kept)
    (tmp_path / "s.csv").write_text(out.getvalue())
    found = study.read_studies([tmp_path / "s.csv"])
    assert {len(arm.runs) for arm in arms_of(found)} == {3}
    assert {one.shape for one in compare(pairs_of(found))[0]} == {(3, 3, 120)}


@pytest.mark.parametrize("plain, steps, index", [
    ("top", ["masks-top-words-labels100-seed1", "masks-top-labels100-seed1"],
     "top-labels100-seed1"),
    ("top", ["masks-top-words", "masks-top-step_20"], "top-step_20"),
    ("top", ["masks-top-words-labelsall"], None),
    ("top-words", ["masks-top", "masks-top-words-labelsall"], "top-words-labelsall"),
])
def test_the_masks_of_an_arm_are_its_own(plain, steps, index):
    """Not those of the arm that it matches, whose name may begin as its own."""
    arm = Arm("x", [], line=f"study/{plain}", masking_steps=dict.fromkeys(steps, 1.0))
    assert index_of(arm) == index


def test_seconds_of_the_masks_of_a_seed():
    steps = {"score-words": 8.0, "scorer-labels100-seed1": 4.0, "masks-a-labels100-seed1": 1.0,
             "scorer-labels100-seed2-step_40": 6.0}
    assert [arms_of_folders.cost_at(steps, seed) for seed in (1, 2, None)] == [13, 14, 13.5]
    assert arms_of_folders.cost_at({}, None) == 0


# --------------------------------------------------------------------------- steps to a target


def test_steps_to_a_target_by_hand():
    # The difference goes from -4 through 0 at a third of the way from 100 to 400; the upper end
    # crosses 0 half way from 0 to 100, the lower end never.
    points = [(0, -4, -6, -2), (100, -1, -3, 2), (400, 2, -1, 4)]
    found = steps_to.steps_to(points)
    assert (found.steps, found.low, found.high) == pytest.approx((200, 50, None), nan_ok=True)
    assert steps_to.first_crossing([0, 10], [0, -5]) == 0
    assert steps_to.first_crossing([5, 10], [-1, -1]) is None
    assert steps_to.first_crossing([0, 10, 20], [-1, 1, -1]) == 5


def test_the_interval_of_steps_covers_the_truth():
    """Straight lines with noise: the true crossing is inside in 93 % of 400 studies or more."""
    generator = np.random.default_rng(3)
    lengths, slope, error = np.array([0, 100, 200, 300, 400]), 0.01, 0.6
    true, hits = 250, 0
    for _ in range(400):
        means = slope * (lengths - true) + generator.normal(0, error, len(lengths))
        found = steps_to.steps_to([(x, m, m - 1.96 * error, m + 1.96 * error)
                                   for x, m in zip(lengths, means, strict=True)])
        low = math.inf if found.low is None else found.low
        hits += low <= true <= (math.inf if found.high is None else found.high)
    assert hits / 400 > 0.93


def test_steps_that_a_study_needs(tmp_path, no_figures):
    write_study(tmp_path / "s", items=2000, lengths=(50, 100, 150, 200), budgets=("all",),
                pretrain_seeds=(1, 2, 3, 4))
    report.main([str(tmp_path / "s"), "--output_dir", str(tmp_path / "out")])
    rows = {row["arm"]: row for row in read_csv(tmp_path / "out" / "steps_to.csv")}
    assert rows["random"]["high"] == "200" and rows["random"]["target_steps"] == "200"
    # It gains 5 points in 200 steps where random gains 2: true steps are 80.
    assert 40 < float(rows["selective"]["steps"]) < 130
    low, high = rows["selective"]["low"], rows["selective"]["high"]
    assert low == "from the start" or float(low) < 80
    assert high.startswith("not reached") or float(high) > 80
    share = float(rows["selective"]["steps"]) / 200
    assert float(rows["selective"]["share"]) == pytest.approx(share, abs=0.006)
    # 67 s for its masks and half a second a step.
    assert float(rows["selective"]["seconds"]) == pytest.approx(67 + 100 * share, abs=1)


# ------------------------------------------------------------------------------------ the page


def test_the_page_of_a_study(made_up, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    report.main([str(made_up), "--output_dir", str(tmp_path / "out")])
    page = (tmp_path / "out" / "report.html").read_text()
    heads = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    assert heads == ["Where this comes from", "Results", "Differences", "Lengths and labels",
                     "Cost", "Commands"]
    # A note stands before the table that it limits.
    assert page.index("start from one stage-1 checkpoint") < page.index("Differences in accuracy")
    assert page.index("middle of its schedule") < page.index("Steps of stage 2 to the accuracy")
    assert "nothing is resampled" in page
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {"accuracy.png", "differences.png", "stage2.png", "labels.png"}
    text = (tmp_path / "out" / "report.md").read_text()
    assert re.findall(r"^## (.*)", text, re.MULTILINE) == heads
    assert set(re.findall(r"\]\((\w+\.png)\)", text)) == pictures
    told = {row[""]: row["value"] for row in read_csv(tmp_path / "out" / "provenance.csv")}
    assert told["labelled examples"] == "100, 2,000" and told["models tested"] == "180"
    assert told["pre-training seeds"] == "41, 42, 43" and told["classes"] == "negative, positive"
    assert told["commit"] == "0123456789ab" and "2 CPUs" in told["machine"]
    classes = read_csv(tmp_path / "out" / "classes.csv")
    recalls = [float(row["recall"]) for row in classes if row["arm"] == "none"]
    assert len(recalls) == 4 and all(
        row["taken for negative"] == f"{100 * float(row['recall']):.1f} %"
        for row in classes if row["class"] == "negative")
    costs = {(row["arm"], row["labels"]): row for row in read_csv(tmp_path / "out" / "costs.csv")}
    # Steps of each seed count once, shared ones whole.
    for labels in ("100", "2000"):
        row = costs["random_matched", labels]
        assert (row["classifier"], row["annotate"], row["scorer"], row["scores"], row["masks"],
                row["masking"], row["total"]) == ("10", "20", "30", "5", "5", "70", "270")


def test_files_with_words_for_numbers_still_make_a_page(tmp_path, no_figures):
    write_study(tmp_path / "s", items=20, lengths=(50,), budgets=("all",))
    for path in (tmp_path / "s").rglob("env.json"):
        path.write_text(path.read_text().replace(str(2**34), '"16 GiB"'))
    (tmp_path / "s" / "domain").mkdir(exist_ok=True)
    (tmp_path / "s" / "domain" / "text.json").write_text(
        '{"counts": {"tokens": 1000, "documents": []}}')
    report.main([str(tmp_path / "s"), "--output_dir", str(tmp_path / "out")])
    told = (tmp_path / "out" / "report.md").read_text()
    assert "0 GiB" in told and "1,000 tokens in 0 documents" in told


def test_one_pretraining_seed_is_named_with_its_setting(tmp_path, no_figures, capsys):
    write_study(tmp_path / "s", items=60, lengths=(50,), budgets=("all",), pretrain_seeds=(1,))
    report.main([str(tmp_path / "s"), "--output_dir", str(tmp_path / "out")])
    assert "give pretrain_seeds: [41, 42, 43] in the recipe" in capsys.readouterr().out


def test_costs_of_an_encoder_that_is_not_ours(tmp_path, no_figures):
    """The custom recipe has no stage 1: it costs nothing there, and totals are complete."""
    write_study(tmp_path / "s", items=60, lengths=(50,), budgets=("all",))
    for path in (tmp_path / "s").rglob("lineage.json"):
        lineage = json.loads(path.read_text())
        path.write_text(json.dumps({**lineage, "stages": lineage["stages"][1:]}))
    for path in (tmp_path / "s").rglob("results.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row["pretraining"]["steps"] -= 500 * bool(row["pretraining"]["steps"])
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.main([str(tmp_path / "s"), "--output_dir", str(tmp_path / "out")])
    costs = {row["arm"]: row for row in read_csv(tmp_path / "out" / "costs.csv")}
    assert {arm: (row["general"], row["masking"], row["task_guided"], row["total"])
            for arm, row in costs.items()} == {
        "none": ("0", "0", "0", "0"), "random": ("0", "0", "25", "25"),
        "random_matched": ("0", "70", "25", "95"), "selective": ("0", "67", "25", "92")}


def test_words_with_most_and_fewest_masks_beyond_their_share():
    """2 of 10 are masked: `bad` five times as often, `the` never, `film` at its share."""
    masked, occurrences = np.array([0, 20, 20, 0]), np.array([80, 100, 20, 0])
    most, fewest = words.most_and_fewest(masked, occurrences)
    assert (most.tolist(), fewest.tolist()) == ([2], [0])
    every = words.most_and_fewest(np.arange(200), np.full(200, 200))
    assert every[0].tolist() == list(range(199, 199 - words.MOST_MASKED, -1))
    assert every[1].tolist() == list(range(words.LEAST_MASKED - 1, -1, -1))


def test_what_was_masked_is_shown_from_the_store(tmp_path, reviews_store):
    write_study(tmp_path / "s", items=60, lengths=(50,), budgets=("all",))
    shutil.copytree(Path(reviews_store).parent, tmp_path / "s" / "domain", dirs_exist_ok=True)
    name = Path(reviews_store).name
    for path in sorted((tmp_path / "s" / "domain").glob(f"{name}.*")):
        if path.is_file():
            path.rename(path.with_name(path.name.replace(name, "text", 1)))
    store = TokenStore.open(tmp_path / "s" / "domain" / "text")
    for shard in store.shards:
        words, counts = np.unique(shard.tokens[:], return_counts=True)
        chosen = np.flatnonzero(np.isin(shard.tokens[:], words[counts.argsort()[-2:]]))
        for name in ("selective-labelsall", "random_matched-labelsall"):
            write_array(shard, name, "mask", chosen.astype(np.uint32), MEASURED)
    scorer = {"precision": 0.5, "recall": 0.5, "f1": 0.5, "average_precision": 0.6,
              "num_train_sentences": 40, "num_dev_tokens": 200, "num_dev_important": 20,
              "baselines": {"frequency": {"f1": 0.25}, "always": {"f1": 0.125}}}
    (tmp_path / "s" / "scorer").mkdir()
    (tmp_path / "s" / "scorer" / "results.json").write_text(json.dumps(scorer))
    report.main([str(tmp_path / "s"), "--output_dir", str(tmp_path / "out")])
    masked = {row["arm"]: row for row in read_csv(tmp_path / "out" / "masked.csv")}
    assert set(masked) == {"selective", "random_matched"}
    assert len(masked["selective"]["most often"].split()) == 2
    assert (tmp_path / "out" / "words.png").read_bytes().startswith(b"\x89PNG")
    (row,) = read_csv(tmp_path / "out" / "scorers.csv")
    assert row == {"scorer": "scorer", "sentences": "40", "important": "10.0 %", "F1": "0.500",
                   "average_precision": "0.600", "F1 of frequency": "0.250",
                   "F1 of always": "0.125"}
    runs = read_csv(tmp_path / "out" / "stage2_runs.csv")
    assert float(runs[0]["epochs"]) == pytest.approx(50_000 / store.num_tokens, abs=0.01)
