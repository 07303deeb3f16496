"""No command reads a label beyond the budget."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from preprocess.corpus import load_task
from preprocess.errors import ConfigError
from preprocess.identity import compare
from tests.support.runs import words
from train.config import FinetuneConfig
from train.stages.finetuning import read_inputs

BUDGET = 20


@pytest.fixture()
def tasks(tmp_path, labelled_files) -> dict[str, dict[str, str]]:
    """Flags of a task with a budget; and of one whose other labels are gone, or wrong."""
    with open(labelled_files["train"], newline="") as file:
        rows = list(csv.DictReader(file))
    train, validation = rows[:48], rows[48:]
    turned = [{**row, "label": {"pos": "neg", "neg": "pos"}[row["label"]]} for row in validation]

    def write(name: str, rows: list[dict[str, str]]) -> str:
        with open(tmp_path / name, "w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(rows)
        return str(tmp_path / name)

    flags = {"train_file": write("train.csv", train), "test_file": labelled_files["test"],
             "validation_file": write("validation.csv", validation)}
    chosen = load_task("custom", **flags, label_budget=BUDGET).splits["train"]
    few = [{"text": e.text, "label": ("neg", "pos")[e.label]} for e in chosen]
    return {
        "limited": {"task": "custom", **flags, "label_budget": BUDGET},
        "alone": {"task": "custom", **flags, "train_file": write("few.csv", few),
                  "validation_file": write("turned.csv", turned)},
    }


def test_the_classifier_sees_the_budget_and_no_validation_label(
    tasks, tmp_path, tiny_encoder, run_here
):
    def run(name: str, **more) -> Path:
        run_here("train/finetune.py", *words({
            **tasks[name], **more, "model_name_or_path": tiny_encoder, "max_seq_length": 32,
            "num_train_epochs": 4, "learning_rate": 1e-2, "train_batch_size": 8,
            "output_dir": tmp_path / name}))
        return tmp_path / name

    limited, alone = run("limited"), run("alone", epoch="last")
    assert model_of(limited) == model_of(alone)
    predictions = "seed_13/predictions.jsonl"
    assert (limited / predictions).read_text() == (alone / predictions).read_text()
    (row,), (other,) = (
        [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
        for folder in (limited, alone))
    assert (row["label_budget"], row["label_seed"], row["num_train"]) == (BUDGET, 42, BUDGET)
    assert (other["label_budget"], other["label_seed"]) == (None, None)
    assert row["epoch"] == "last" and row["best_epoch"] == row["num_epochs"] == 4
    # It is still measured: with turned labels the other way round.
    assert row["validation_accuracy"] == pytest.approx(1 - other["validation_accuracy"])


def model_of(run_dir: Path) -> bytes:
    return (run_dir / "seed_13" / "hf" / "model.safetensors").read_bytes()


def test_the_annotation_and_the_scorer_see_the_budget(tasks, tmp_path, tiny_encoder, run_here):
    from train import model

    classifier = tmp_path / "classifier"
    model.load_classifier(tiny_encoder, ("neg", "pos"), 1).save_pretrained(classifier)
    model.load_tokenizer(tiny_encoder).save_pretrained(classifier)
    for name, task in tasks.items():
        prefix = tmp_path / f"{name}-annotations"
        run_here("train/annotate.py", *words({
            **task, "model_name_or_path": classifier, "max_seq_length": 32, "delta": 0.2,
            "output": prefix}))
        run_here("train/fit_scorer.py", *words({
            "annotations": prefix, "model_name_or_path": tiny_encoder, "max_seq_length": 32,
            "num_train_epochs": 2, "output_dir": tmp_path / f"{name}-scorer"}))
    for end in ("-annotations.bin", "-annotations.idx", "-annotations.importance.npy",
                "-scorer/hf/model.safetensors"):
        limited, alone = ((tmp_path / f"{name}{end}").read_bytes() for name in tasks)
        assert limited == alone, end


def test_best_epochs_of_a_budget_are_warned_of(tasks, tmp_path, tiny_encoder, run_here, capsys):
    for epoch in ("best", "last"):
        run_here("train/finetune.py", *words({
            **tasks["limited"], "model_name_or_path": tiny_encoder, "max_seq_length": 32,
            "epoch": epoch, "output_dir": tmp_path / "run", "dry_run": True}))
        told = capsys.readouterr().out
        assert ("best reads the labels of 12 validation examples" in told) == (epoch == "best")


def test_another_share_of_test_texts_is_another_run(tmp_path, tiny_encoder):
    rows = "".join(f"the film is {('good', 'bad')[i % 2]} {i},{i % 2},rotten_tomatoes\n"
                   for i in range(200))
    (tmp_path / "mr.csv").write_text("text,label,source\n" + rows)
    identities = {}
    for share in (None, 0.1, 0.3):
        (inputs,) = read_inputs([FinetuneConfig(
            task="mr", data_dir=str(tmp_path / "mr.csv"), max_seq_length=32, test_fraction=share,
            model_name_or_path=tiny_encoder, output_dir=str(tmp_path / "run"),
        )])
        (identities[share],) = inputs.identities.values()
    assert identities[None] == identities[0.1]
    with pytest.raises(ConfigError, match="made with --test_fraction 0.1, and this run has 0.3"):
        compare(identities[None], identities[0.3], "--output_dir a", "give another")
