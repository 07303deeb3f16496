"""`train/report.py` on small made-up runs: tables, figures, page, and what it says is missing."""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from preprocess.corpus import write_leakage
from preprocess.errors import ConfigError, DataError
from preprocess.files import WriterLock
from tests.support.runs import made_up_stage, read_csv, write_lineage
from train import report
from train.reports.compare import TABLE_COLUMNS
from train.reports.figures import format_axis
from train.reports.page import Picture, ReportPage, Section, as_html
from train.run_dir.metrics import EVAL_LOSS, MASKED_FRACTION, TRAIN_LOSS, MetricsWriter


def pretrain_stage(strategy: str, seed: int, steps: int, seconds: float) -> dict:
    """A pre-training stage in a lineage."""
    return made_up_stage(masking=strategy, seed=seed, steps=steps, seconds=seconds,
                         weights=f"before-{seconds}")


def write_finetune(path: Path, accuracy: float, *, steps: int = 0, seeds=(13, 43, 83),
                   items: int = 60, task: str = "mr", stages: tuple[dict, ...] = ()) -> None:
    """A fine-tuning directory with about that accuracy."""
    generator = np.random.default_rng([*path.name.encode(), steps])
    path.mkdir(parents=True)
    rows = []
    for seed in seeds:
        right = generator.random(items) < accuracy
        write_lineage(path / f"seed_{seed}" / "hf", *stages, made_up_stage("finetune"))
        answers = [{"item": str(n), "label": 1, "prediction": int(ok)}
                   for n, ok in enumerate(right)]
        (path / f"seed_{seed}" / "predictions.jsonl").write_text(
            "".join(json.dumps(answer) + "\n" for answer in answers))
        rows.append({"seed": seed, "task": task, "test_accuracy": float(right.mean()),
                     "test_macro_f1": float(right.mean()),
                     "pretraining": {"steps": steps, "masked_tokens": 19 * steps, "seconds": 1}})
    (path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_curve(path: Path, start: float, steps: int = 50, pretraining: bool = True) -> None:
    """A training run with a falling loss."""
    path.mkdir(parents=True, exist_ok=True)
    writer = MetricsWriter(path)
    for step in range(10, steps + 1, 10):
        values = {TRAIN_LOSS: start / (1 + step / 50)}
        if pretraining:
            values[MASKED_FRACTION] = 0.15
        writer.scalars(step, values)
    if pretraining:
        writer.scalars(steps, {EVAL_LOSS: start / 2})
        writer.hyperparameters({"seed": 1})
    writer.close()


def write_pipeline(root: Path, lengths=(None,), pretrain_seeds=(1, 2)) -> Path:
    """An output folder of train/pipeline.py."""
    arms = []
    for length in lengths:
        folder, tag = (f"step_{length}/", f"@{length}") if length else ("", "")
        base = length or 100
        for number, arm in enumerate(("none", "random_matched", "selective")):
            seeds = pretrain_seeds if number else (None,)
            runs = [f"{folder}finetune/{arm}" + (f"-seed{s}" if s else "") for s in seeds]
            for run in runs:
                accuracy = 0.5 + 0.15 * number + 0.0003 * base
                stages = [pretrain_stage("random", 42, base, 2.0 * base)]
                if number:
                    seed = int(run[-1])
                    stages.append(pretrain_stage(arm, seed, 50, 100.0 + 10 * seed))
                write_finetune(root / run, accuracy, steps=base + (50 if number else 0),
                               stages=stages)
            masking = ["scorer", f"masks-{arm}"] if number else []
            arms.append({"name": arm + tag, "runs": runs, "floor": False, "masking": masking})
    write_finetune(root / "floors" / "naive_bayes", 0.7, seeds=(0,))
    arms.append({"name": "naive_bayes", "runs": ["floors/naive_bayes"], "floor": True,
                 "masking": []})
    (root / "arms.json").write_text(json.dumps(arms))
    seconds = {"scorer": 30.0, "masks-selective": 5.0, "masks-random_matched": 7.0}
    (root / "steps.json").write_text(json.dumps(
        {name: {"finished": 1, "seconds": spent} for name, spent in seconds.items()}))
    write_curve(root / "stage1", 9.0, 100)
    for arm in ("random_matched", "selective"):
        write_curve(root / "task_guided" / f"{arm}-seed1", 5.0)
    write_curve(root / "scorer", 0.7, pretraining=False)
    return root


@pytest.fixture
def no_figures(monkeypatch):
    """Spare a test the seconds of figures that it does not look at."""
    monkeypatch.setattr(report, "draw", lambda *_: ({}, []))


def write_report(tmp_path: Path, *folders: Path) -> Path:
    """Report on these folders, or on `tmp_path / "R"`; return the folder of the report."""
    output = tmp_path / "out"
    report.main([*map(str, folders or [tmp_path / "R"]), "--output_dir", str(output)])
    return output


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_the_most_frequent_label_is_a_baseline_of_every_task(tmp_path, capsys):
    write_finetune(tmp_path / "R", 0.8, seeds=(13,))
    answers = [{"item": str(n), "label": int(n % 3 == 0), "prediction": 1} for n in range(60)]
    (tmp_path / "R" / "seed_13" / "predictions.jsonl").write_text(
        "".join(json.dumps(answer) + "\n" for answer in answers))
    write_report(tmp_path)
    assert "most frequent label of the 60 test items of mr would be right for 0.6667" in (
        capsys.readouterr().out)


def test_pipeline_folder_gives_table_differences_and_figures(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write_pipeline(tmp_path / "R")
    output = write_report(tmp_path)
    rows = read_csv(output / "table.csv")
    assert tuple(rows[0]) == TABLE_COLUMNS
    accuracy = {row["arm"]: row for row in rows if row["metric"] == "accuracy"}
    assert list(accuracy) == ["none", "random_matched", "selective", "naive_bayes"]
    assert accuracy["selective"]["seeds"] == "6" and accuracy["none"]["seeds"] == "3"
    assert accuracy["naive_bayes"]["sd"] == ""
    low, mean, high = (float(accuracy["selective"][key]) for key in ("low", "mean", "high"))
    assert 0 < low < mean < high <= 1
    costs = {row["arm"]: row for row in read_csv(output / "costs.csv")}
    nothing = dict.fromkeys(("classifier", "annotate", "scorer", "masks", "scores"), "0")
    rest = {"labels": "", "share_of_full": "", "finetune": ""}  # one length: there is no fuller one
    assert costs["none"] == {
        "arm": "none", "general": "200", "masking": "0", "task_guided": "0", "total": "200",
        "masking_share": "0.000", **nothing, **rest}
    assert costs["selective"] == {
        "arm": "selective", "general": "200", "masking": "35", "task_guided": "115",
        "total": "350", "masking_share": "0.100", **nothing, "scorer": "30", "masks": "5", **rest}
    differences = read_csv(output / "differences.csv")
    assert [(row["arm"], row["against"]) for row in differences] == [
        ("random_matched", "none"), ("selective", "none"), ("selective", "random_matched")]
    assert is_png(output / "loss.png") and is_png(output / "accuracy.png")
    assert not (output / "steps.png").exists()
    out = capsys.readouterr().out
    assert f"none ({accuracy['none']['mean']}) is not above the baseline naive_bayes" in out
    assert "95 % intervals" in out and "start from one stage-1 checkpoint" in out
    assert out.index("Pre-training runs") < out.index("Results") < out.index("Differences")
    page = (output / "report.html").read_text()
    links, places = re.findall('href="#([^"]*)"', page), re.findall('<h2 id="([^"]*)"', page)
    assert links == places and len(set(links)) > 4
    assert all(part in page for part in ("Results", "Differences", "Notes", "random_matched"))
    assert page.count("data:image/png") == 4 and "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(("top", "place", "text"), [
    (0.8, 0.2, "0.2"), (9000, 8000, "8000"), (32_000, 8000, "8k"), (32_000, 0, "0"),
    (1.6e6, 4e5, "0.4M"),
])
def test_the_ticks_of_an_axis_share_one_unit(top, place, text):
    axis = pytest.importorskip("matplotlib.figure").Figure().subplots().xaxis
    axis.axes.set_xlim(0, top)
    format_axis(axis)
    assert axis.get_major_formatter()(place, 0) == text


def write_policies(root: Path) -> Path:
    """An output folder whose arms have names of their own, and share scores."""
    arms = []
    for name, strategy, told, masking in (
        ("guess", "random_matched", {"match": "best"}, ["score-words", "masks-best",
                                                        "masks-guess"]),
        ("best", "selective", {"scores": "words", "units": "words"}, ["score-words", "masks-best"]),
        ("rest", "selective_fill", {"scores": "words"}, ["score-words", "masks-rest"]),
        ("draws", "random", {}, []), ("none", "none", {}, []),
    ):
        stages = [pretrain_stage("random", 42, 100, 200.0)]
        if name != "none":
            stages.append(pretrain_stage(strategy, 1, 50, 100.0))
        write_finetune(root / "finetune" / name, 0.7, stages=stages)
        arms.append({"name": name, "runs": [f"finetune/{name}"], "floor": False,
                     "masking": masking, "strategy": strategy, **told})
    (root / "arms.json").write_text(json.dumps(arms))
    seconds = {"score-words": 30.0, "masks-best": 5.0, "masks-guess": 7.0, "masks-rest": 1.0}
    (root / "steps.json").write_text(json.dumps(
        {name: {"finished": 1, "seconds": spent} for name, spent in seconds.items()}))
    return root


def test_arms_are_told_by_their_policy_and_compared_with_their_controls_first(
    tmp_path, capsys, no_figures
):
    write_policies(tmp_path / "R")
    output = write_report(tmp_path)
    rows = [row for row in read_csv(output / "table.csv") if row["metric"] == "accuracy"]
    assert [[row[key] for key in ("arm", "strategy", "scores")] for row in rows] == [
        ["guess", "random_matched", ""], ["best", "selective", "words"],
        ["rest", "selective_fill", "words"], ["draws", "random", ""], ["none", "none", ""]]
    told = {row["arm"]: row for row in read_csv(output / "arms.csv")}
    assert told["best"]["units"] == "words" and told["guess"]["matches"] == "best"
    assert "above 0, best first" in told["best"]["rule"]
    pairs = [(row["arm"], row["against"]) for row in read_csv(output / "differences.csv")]
    assert pairs[:8] == [
        ("guess", "none"), ("guess", "draws"), ("best", "none"), ("best", "draws"),
        ("best", "guess"), ("rest", "none"), ("rest", "draws"), ("draws", "none")]
    assert len(pairs) == 10 == len({frozenset(pair) for pair in pairs})
    # Each arm alone would have cost its scores; together they were made once.
    costs = {row["arm"]: row["masking"] for row in read_csv(output / "costs.csv")}
    assert costs == {"guess": "42", "best": "35", "rest": "31", "draws": "0", "none": "0"}
    assert [list(row.values()) for row in read_csv(output / "masking.csv")] == [
        ["score-words", "30", "guess, best, rest"], ["masks-best", "5", "guess, best"],
        ["masks-guess", "7", "guess"], ["masks-rest", "1", "rest"], ["all of them", "43", ""]]
    assert "macro_f1" in capsys.readouterr().out


def test_what_leaked_is_one_line_of_the_report(tmp_path, capsys, no_figures):
    root = write_pipeline(tmp_path / "R")
    (root / "domain").mkdir()
    write_leakage(str(root / "domain" / "text"), {
        "task": "mr", "store": "f", "test_texts": 1000, "equal_or_contained": 3, "half_covered": 5,
        "any_8gram": 40, "documents_dropped": 0, "documents_leaked": 6, "test_digest": "d"})
    output = write_report(tmp_path)
    line = "leakage: of 1,000 test texts of mr, the text holds 3 complete, 5 half covered"
    assert line in capsys.readouterr().out and line in (output / "report.html").read_text()
    path = root / "domain" / "text.leakage.json"
    path.write_text(path.read_text().replace("1000", "1001"))
    write_report(tmp_path)
    assert "its content is not what was written" in capsys.readouterr().out
    path.write_text(path.read_text().replace("1001", "1000"))
    write_pipeline(tmp_path / "S")  # of several pipelines, whose text it is
    write_report(tmp_path, root, tmp_path / "S")
    assert f"R: {line}" in " ".join(capsys.readouterr().out.split())


def test_several_stage_1_lengths_are_compared_each_for_itself(tmp_path):
    pytest.importorskip("matplotlib")
    write_pipeline(tmp_path / "R", lengths=(100, 200, 300))
    output = write_report(tmp_path)
    differences = read_csv(output / "differences.csv")
    assert len(differences) == 9
    assert all(row["arm"].split("@")[1] == row["against"].split("@")[1] for row in differences)
    assert is_png(output / "steps.png")
    costs = {row["arm"]: row["share_of_full"] for row in read_csv(output / "costs.csv")}
    assert costs["none@300"] == "1.000" and costs["none@100"] == "0.333"
    assert costs["selective@100"] == f"{350 / 600:.3f}"
    assert len([r for r in read_csv(output / "table.csv") if r["arm"] == "naive_bayes"]) == 2


def test_any_runs_without_a_pipeline(tmp_path, capsys):
    write_finetune(tmp_path / "a", 0.7)
    write_finetune(tmp_path / "b", 0.9)
    write_curve(tmp_path / "pretraining", 6.0)
    (tmp_path / "empty" / "tb").mkdir(parents=True)
    output = write_report(tmp_path, *(tmp_path / n for n in ("a", "b", "pretraining", "empty")))
    assert {row["arm"].rsplit("/")[-1] for row in read_csv(output / "table.csv")} == {"a", "b"}
    assert f"{tmp_path}/empty: no run in it" in capsys.readouterr().out
    assert not any(path.name == "steps.png" for path in output.iterdir())


def test_unfinished_arms_are_named_and_the_rest_is_shown(tmp_path, capsys, no_figures):
    root = write_pipeline(tmp_path / "R")
    (root / "finetune" / "selective-seed2" / "results.jsonl").unlink()
    (root / "finetune" / "none" / "results.jsonl").unlink()
    output = write_report(tmp_path)
    out = capsys.readouterr().out
    assert "Note: none: " in out and "finetune/none: holds no finished seed" in out
    rows = {row["arm"]: row["seeds"] for row in read_csv(output / "table.csv")}
    assert rows == {"random_matched": "6", "selective": "3", "naive_bayes": "1"}


def test_runs_that_still_train_give_curves_and_no_table(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write_curve(tmp_path / "run", 6.0)
    output = write_report(tmp_path, tmp_path / "run")
    assert "No table of results" in capsys.readouterr().out
    assert {path.name for path in output.iterdir()} == {
        "loss.png", "pretraining.csv", "report.html", "report.md"}


def test_no_run_at_all_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        report.main([str(tmp_path / "absent")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no run in"):
        write_report(tmp_path, tmp_path / "empty")
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_there_is_a_table_and_a_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    write_finetune(tmp_path / "a", 0.7)
    output = write_report(tmp_path, tmp_path / "a")
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert {path.name for path in output.iterdir()} == {
        "table.csv", "report.html", "report.md", "provenance.csv", "arms.csv"}


def test_arms_that_were_fine_tuned_differently_are_said_to_be(tmp_path, capsys, no_figures):
    """A CPU with bf16 takes it, another one fp32; and somebody may have changed the rate."""
    train = {"optimizer": {"type": "AdamW", "lr": 1e-4}, "precision": "bf16",
             "schedule": {"total_num_steps": 90}}
    for name, changes in (("a", {}), ("b", {"schedule": {"total_num_steps": 9}}),
                          ("c", {"precision": "fp32"}), ("d", {"optimizer": {"lr": 1e-5}})):
        write_finetune(tmp_path / name, 0.7)
        path = tmp_path / name / "results.jsonl"
        rows = [{**json.loads(line), "identity": {"train": {**train, **changes}}}
                for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def notes(*names: str) -> list[str]:
        write_report(tmp_path, *(tmp_path / name for name in names))
        return [line for line in capsys.readouterr().out.splitlines()
                if "Fine-tuned differently" in line]

    assert notes("a", "b") == []
    assert "(precision: bf16, fp32)" in notes("a", "c")[0]
    found = notes("a", "b", "d")
    assert len(found) == 1 and "(optimizer.lr: 0.0001, 1e-05)" in found[0]


def test_runs_of_different_tasks_are_kept_apart(tmp_path, capsys, no_figures):
    for name, task in (("a", "mr"), ("b", "sst2"), ("c", "mr"), ("d", "sst2")):
        write_finetune(tmp_path / "R" / name, 0.7, task=task)
    output = write_report(tmp_path)
    assert [(row["arm"], row["against"]) for row in read_csv(output / "differences.csv")] == [
        ("c", "a"), ("d", "b")]
    arms = [{"name": "mixed", "runs": ["a", "b"], "floor": False}]
    (tmp_path / "R" / "arms.json").write_text(json.dumps(arms))
    write_report(tmp_path)
    (row,) = [r for r in read_csv(output / "table.csv") if r["metric"] == "accuracy"]
    assert (row["arm"], row["task"], row["seeds"]) == ("mixed", "mr", "3")
    assert "R/b has task sst2, the runs before it mr; it is left out." in (
        capsys.readouterr().out)


def test_runs_that_differ_in_the_seed_alone_become_one_arm(tmp_path, capsys, no_figures):
    for seed in (1, 2):
        for arm in ("selective", "random"):
            write_finetune(tmp_path / "R" / f"{arm}-seed{seed}", 0.7,
                           stages=(pretrain_stage(arm, seed, 50, 60.0 + seed),))
    write_finetune(tmp_path / "R" / "again", 0.7,
                   stages=(pretrain_stage("selective", 1, 80, 60.0),))
    output = write_report(tmp_path)
    seeds = {row["arm"]: row["seeds"] for row in read_csv(output / "table.csv")}
    assert seeds == {"again": "3", "random": "6", "selective": "6"}
    assert "R/random-seed1" not in seeds and "treated as pre-training seeds of one arm, random" \
        in capsys.readouterr().out
    costs = {row["arm"]: row for row in read_csv(output / "costs.csv")}
    assert costs["random"]["masking"] == "0" and costs["selective"]["masking"] == ""


def test_runs_of_different_label_budgets_are_no_seeds_of_one_arm(tmp_path, no_figures):
    for seed, labels in ((1, 100), (2, 500)):
        run = tmp_path / "R" / f"random-seed{seed}"
        write_finetune(run, 0.7, stages=(pretrain_stage("random", seed, 50, 60.0),))
        rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
        (run / "results.jsonl").write_text("".join(
            json.dumps({**row, "num_train": labels}) + "\n" for row in rows))
    rows = {row["arm"]: row for row in read_csv(write_report(tmp_path) / "table.csv")}
    assert {arm: (row["seeds"], row["labels"]) for arm, row in rows.items()} == {
        "random-seed1": ("3", "100"), "random-seed2": ("3", "500")}


def test_runs_of_one_name_and_one_run_twice(tmp_path, no_figures):
    for name in ("x/tuned", "y/tuned"):
        write_finetune(tmp_path / name, 0.7)
    folders = [tmp_path / "x" / "tuned", tmp_path / "y" / "tuned", tmp_path / "x"]
    output = write_report(tmp_path, *folders)
    arms = [row["arm"] for row in read_csv(output / "table.csv") if row["metric"] == "accuracy"]
    assert arms == ["x/tuned", "y/tuned"]


def test_two_pipelines_of_one_name(tmp_path, no_figures):
    for name in ("x", "y"):
        write_pipeline(tmp_path / name / "demo")
    output = write_report(tmp_path, tmp_path / "x" / "demo", tmp_path / "y" / "demo")
    rows = read_csv(output / "table.csv")
    assert {row["arm"].rpartition("/")[0] for row in rows} == {"x/demo", "y/demo"}
    for row in read_csv(output / "differences.csv"):
        assert row["arm"].partition("/")[0] == row["against"].partition("/")[0]


def test_results_cut_in_the_middle(tmp_path, capsys, no_figures):
    write_finetune(tmp_path / "a", 0.7)
    path = tmp_path / "a" / "results.jsonl"
    path.write_text(path.read_text()[:-30])
    output = write_report(tmp_path, tmp_path / "a")
    assert read_csv(output / "table.csv")[0]["seeds"] == "2"
    assert f"{path}, line 3: not a JSON object of ours, left out." in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 1}', '[{"name": "x"}]', "3"])
def test_a_broken_list_of_arms_is_refused(tmp_path, content):
    write_pipeline(tmp_path / "R")
    (tmp_path / "R" / "arms.json").write_text(content)
    with pytest.raises(DataError, match="arms.json: not a list of arms; run train/pipeline.py"):
        write_report(tmp_path)


def test_costs_without_recorded_seconds_stay_empty(tmp_path, capsys, no_figures):
    root = write_pipeline(tmp_path / "R")
    for content in ("{", "[]", '{"scorer": {"finished": null, "seconds": 3}}'):
        (root / "steps.json").write_text(content)
        output = write_report(tmp_path)
        costs = {row["arm"]: row for row in read_csv(output / "costs.csv")}
        assert costs["selective"]["masking"] == costs["selective"]["total"] == ""
        assert costs["none"]["total"] == "200"
        assert "The cost of masking is known only" in capsys.readouterr().out


def test_an_output_folder_that_cannot_be_written(tmp_path, no_figures):
    write_finetune(tmp_path / "a", 0.7)
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="cannot be written .*; give another folder"):
            report.main([str(tmp_path / "a"), "--output_dir", str(output)])


def test_a_report_is_written_by_one_process(tmp_path, no_figures, monkeypatch):
    monkeypatch.setattr(report, "WAIT_SECONDS", 0.0)
    write_finetune(tmp_path / "a", 0.7)
    command = [str(tmp_path / "a"), "--output_dir", str(tmp_path / "out")]
    with WriterLock(f"{tmp_path}/out/"):
        with pytest.raises(ConfigError, match="another process writes here"):
            report.main(command)
    report.main(command)
    assert "report.html" in (names := os.listdir(tmp_path / "out")) and ".lock" not in names


def test_names_from_outside_are_text_in_the_page(tmp_path, no_figures):
    write_finetune(tmp_path / "R" / "<img src=x onerror=alert(1)>", 0.7)
    output = write_report(tmp_path)
    page = (output / "report.html").read_text()
    assert "<img src=x" not in page and "&lt;img src=x" in page
    png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 1200, 300)
    picture, evil = Picture("loss", '"><script>', png), "<script>alert(1)</script>"
    page = as_html(ReportPage("t", [Section(evil, [picture], [evil], evil)]))
    assert "<script" not in page and page.count("&lt;script&gt;") == 6
    assert '<img alt="&quot;&gt;' in page and 'src="data:image/png;base64,' in page
    assert 'width="768" height="192"' in page  # 8 and 2 inches: as large as it was drawn
