"""`--archive`: one file with all results of a pipeline and nothing that is large."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pytest

from preprocess.errors import ConfigError, DiskFullError
from tests.support.runs import read_csv
from train import pipeline, report
from train.config import PipelineConfig, parse
from train.recipes import archive as archive_room
from train.recipes.archive import check_archive, pack
from train.recipes.jobs import Job

KEPT = {
    "steps.json": b"{}", "finetune/none/seed_13/hf/lineage.json": b"{}",
    "finetune/none/seed_13/hf/tokenizer.json": b"t" * 5000,
    "finetune/none/seed_43/hf/tokenizer.json": b"t" * 5000,
    "finetune/none/seed_13/tb/events.out.tfevents.17.host.1.0": b"e" * 100,
    "domain/text.json": b"{}", "logs/01-one.log": b"hello\n",
}
LEFT = {
    "finetune/none/seed_13/hf/model.safetensors": "weights",
    "finetune/none/seed_13/hf/pytorch_model.bin": "weights",
    "stage1/checkpoints/step_4/manifest.json": "checkpoints", "stage1/latest": "checkpoints",
    "domain/text.bin": "stores and arrays", "domain/text.idx": "stores and arrays",
    "domain/text.task.scores.npy": "stores and arrays",
    ".lock": "locks and half-written files", "stage1/.a.json.tmp-7": "locks and half-written files",
}


@pytest.fixture
def root(tmp_path) -> Path:
    for name, content in {**KEPT, **dict.fromkeys(LEFT, b"large")}.items():
        path = tmp_path / "study" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "study"


def unpacked(file: Path, into: Path) -> dict[str, bytes]:
    """Unpack as a stranger should: with the filter that refuses what leaves the folder."""
    with tarfile.open(file) as archive:
        archive.extractall(into, filter="data")
    return {path.relative_to(into).as_posix(): path.read_bytes()
            for path in into.rglob("*") if path.is_file()}


def test_all_but_what_is_large_is_packed(root, tmp_path, capsys):
    file = root / "new" / "study.tar.gz"
    said = pack(root, file)
    assert said == f"{file}: {len(KEPT)} files, 0.0 MiB"
    found = unpacked(file, tmp_path / "there")
    told = json.loads(found.pop("study/archive.json"))["left_out"]
    assert found == {f"study/{name}": content for name, content in KEPT.items()}
    assert {kind: entry["files"] for kind, entry in told.items()} == {
        kind: list(LEFT.values()).count(kind) for kind in LEFT.values()}
    assert told["weights"]["bytes"] == 2 * len(b"large")
    # Once more, over itself: neither the old archive nor a part of the new one is in it.
    assert pack(root, file) == said
    assert [path.name for path in file.parent.iterdir()] == ["study.tar.gz"]


def test_equal_files_are_packed_once(root, tmp_path):
    noise = os.urandom(200_000)
    for number in range(20):
        (root / f"copy{number}.json").write_bytes(noise)
    file = tmp_path / "a.tar.gz"
    pack(root, file)
    assert file.stat().st_size < 250_000
    found = unpacked(file, tmp_path / "there")
    assert all(found[f"study/copy{number}.json"] == noise for number in range(20))


def test_large_events_stay_and_a_large_archive_is_explained(root, tmp_path, monkeypatch):
    monkeypatch.setattr(archive_room, "EVENT_BYTES", 99)
    monkeypatch.setattr(archive_room, "LARGE_BYTES", 1 << 20)
    for number in range(2):
        (root / f"seed_{number}").mkdir()
        (root / f"seed_{number}" / "predictions.jsonl").write_bytes(os.urandom(1 << 20))
    said = pack(root, tmp_path / "a.tar.gz")
    assert "2.0 MiB, above 1 MiB; the largest: 2 x predictions.jsonl 2.0 MiB" in said
    found = unpacked(tmp_path / "a.tar.gz", tmp_path / "there")
    assert not any("tfevents" in name for name in found)
    assert json.loads(found["study/archive.json"])["left_out"]["TensorBoard events"] == {
        "files": 1, "bytes": 100}


def test_a_full_disk_leaves_the_old_archive(root, tmp_path, monkeypatch):
    file = tmp_path / "a.tar.gz"
    file.write_bytes(b"old")

    def full(*arguments) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archive_room, "_add", full)
    with pytest.raises(DiskFullError, match="a.tar.gz: cannot be written"):
        pack(root, file)
    assert file.read_bytes() == b"old" and not list(tmp_path.glob(".a.tar.gz*"))


def test_a_wrong_name_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "folder.tar.gz").mkdir()
    (tmp_path / "file").touch()
    for name, message in (("a.zip", "must end in .tar.gz"), (".tar.gz", "must end in .tar.gz"),
                          ("folder.tar.gz", "is a folder"),
                          ("file/a.tar.gz", "nothing can be written into"),
                          ("file/new/a.tar.gz", "nothing can be written into .*/file;")):
        with pytest.raises(ConfigError, match=message):
            check_archive(str(tmp_path / name))
    check_archive(str(tmp_path / "new" / "a.tar.gz"))


RECIPE = """
encoder: {encoder}
deepspeed_config: ds_configs/cpu.json
arms: [none, random]
task: {{task: custom, train_file: {train}, validation_file: {test}, test_file: {test}}}
domain_text: {{input: {text}, num_workers: 1}}
task_guided: {{max_steps: 3, max_seq_length: 32, train_batch_size: 8, logging_steps: 1}}
finetune: {{seeds: "13,43", max_seq_length: 32, train_batch_size: 8, num_train_epochs: 1}}
floors: {{naive_bayes: true}}
"""


@pytest.mark.slow
def test_the_report_of_an_archive_is_that_of_the_run(
    tmp_path, monkeypatch, run_here, still_encoder, reviews_file, labelled_files, capsys
):
    """Also with the event files left out, and after a run that has failed."""
    recipe, root = tmp_path / "study.yaml", tmp_path / "R"
    recipe.write_text(RECIPE.format(encoder=still_encoder, text=reviews_file, **labelled_files))

    def start(self, step, log, options, port, gpu) -> None:
        self.step, self.log, self.started = step, log, 0.0
        self.port, self.gpu, self.asked, self.out_of_memory = port, gpu, False, False
        self.code = lambda: 0
        self.close = self.look_after = lambda: None
        self._closed, self._process = True, None
        step.compute() if step.compute else run_here(*step.command)

    monkeypatch.setattr(Job, "__init__", start)
    monkeypatch.setattr(Job, "output", None, raising=False)
    typed = ["--recipe", str(recipe), "--output_dir", str(root), "--launcher", "python"]
    pipeline.main([*typed, "--until", "tokenize"])
    assert set(json.loads((root / "steps.json").read_text())) == {"tokenize-domain"}
    assert "ended after tokenize-domain (--until tokenize)" in capsys.readouterr().out
    assert not (root / "report").exists()
    monkeypatch.setattr(archive_room, "EVENT_BYTES", 0)
    pipeline.main([*typed, "--archive", str(tmp_path / "a.tar.gz")])
    assert f"archive: {tmp_path}/a.tar.gz: " in capsys.readouterr().out
    found = unpacked(tmp_path / "a.tar.gz", tmp_path / "there")
    assert not any(name.endswith((".safetensors", ".bin", ".npy")) or "tfevents" in name
                   for name in found)
    report.main([str(tmp_path / "there" / "R"), "--output_dir", str(tmp_path / "again")])
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Note:")]
    assert not any("missing" in note or "no event files" in note for note in notes)
    for name in ("table", "differences", "costs", "masking", "pretraining"):
        assert (root / "report" / f"{name}.csv").exists() == (
            tmp_path / "again" / f"{name}.csv").exists()
        if (root / "report" / f"{name}.csv").exists():
            assert read_csv(root / "report" / f"{name}.csv") == read_csv(
                tmp_path / "again" / f"{name}.csv"), name
    assert (tmp_path / "again" / "loss.png").exists()

    other = tmp_path / "other.yaml"
    recipe.rename(other)
    with pytest.raises(ConfigError, match=f"{root} holds a run of {recipe}, and --recipe is "
                       f"{other}: give another --output_dir, or add --rerun"):
        pipeline.main(["--recipe", str(other), *typed[2:]])


def test_until_and_archive_are_empty_by_default():
    options = parse(PipelineConfig, ["--recipe", "x", "--output_dir", "y"])
    assert options.until == options.archive == ""
