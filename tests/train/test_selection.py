"""Fine-tuning: the metric that tells the best epoch, early stopping, weights of the classes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from preprocess.errors import ConfigError
from tests.support.runs import logged, words
from train.config import FinetuneConfig
from train.run_dir import metrics
from train.stages.examples import make_examples
from train.stages.finetuning import weigh_classes

STILL = 1e-9  # a learning rate at which no weight moves


@pytest.fixture(scope="module")
def uneven(tmp_path_factory, labelled_files) -> str:
    """A file with 30 examples of one label and 10 of the other."""
    with open(labelled_files["train"], newline="") as file:
        rows = list(csv.DictReader(file))
    kept = [[row for row in rows if row["label"] == label][:count]
            for label, count in (("pos", 30), ("neg", 10))]
    path = tmp_path_factory.mktemp("uneven") / "all.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows([row for part in kept for row in part])
    return str(path)


@pytest.fixture(scope="module")
def tune(tmp_path_factory, uneven, still_encoder, run_here):
    def tuned(**options: Any) -> tuple[dict[str, Any], Path]:
        """Fine-tune; return the row and the folder of the seed."""
        out = tmp_path_factory.mktemp("tuned") / "run"
        run_here("train/finetune.py", *words({
            "task": "custom", "train_file": uneven, "validation_file": uneven,
            "test_file": uneven, "model_name_or_path": still_encoder, "max_seq_length": 32,
            "train_batch_size": 8, "logging_steps": 1000, "output_dir": out, **options,
        }))
        return json.loads((out / "results.jsonl").read_text()), out / "seed_13"

    return tuned


@pytest.mark.parametrize("metric", ["macro_f1", "loss"])
def test_the_best_epoch_is_that_of_the_metric(metric, tune):
    row, run_dir = tune(metric=metric, num_train_epochs=6, learning_rate=1e-2,
                        class_weights="balanced")
    scores = np.array(logged(run_dir, {"macro_f1": metrics.EVAL_MACRO_F1,
                                       "loss": metrics.EVAL_LOSS}[metric]))
    best = scores.argmin() if metric == "loss" else scores.argmax()  # the first of equals
    assert len(scores) == 6 and len(set(scores)) > 1
    assert (row["best_epoch"], row["metric"]) == (best + 1, metric)
    expected = np.minimum.accumulate(scores) if metric == "loss" else np.maximum.accumulate(scores)
    assert logged(run_dir, metrics.EVAL_BEST) == expected.tolist()
    # It is the model of that epoch that is kept: validation and test are one file here.
    assert row["test_macro_f1"] == pytest.approx(logged(run_dir, metrics.EVAL_MACRO_F1)[best])


def test_training_stops_after_epochs_without_a_better_one(tune, uneven, capsys):
    """Where nothing is learnt, the first epoch stays the best."""
    row, run_dir = tune(early_stopping=2, num_train_epochs=9, learning_rate=STILL)
    assert "no better accuracy in 2 epochs, stopped after epoch 3 of 9" in capsys.readouterr().out
    assert (row["best_epoch"], row["steps"], row["num_epochs"]) == (1, 15, 9)
    (stage,) = json.loads((run_dir / "hf" / "lineage.json").read_text())["stages"]
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "hf")
    with open(uneven, newline="") as file:
        texts = [line["text"] for line in csv.DictReader(file)]
    assert stage["totals"]["tokens"] == 3 * sum(map(len, tokenizer(texts)["input_ids"]))


def test_balanced_classes_weigh_the_same(tune, uneven):
    def examples(labels):
        return make_examples([[2, 3]] * len(labels), None, labels, [1.0] * 3)

    assert weigh_classes(examples([0, 0, 0, 1]), 2, "balanced").tolist() == [2 / 3, 2.0]
    assert weigh_classes(examples([0, 0, 2, 2]), 3, "balanced").tolist() == [1.0, 1.0, 1.0]
    assert weigh_classes(examples([0, 0, 0, 1]), 2, "none").tolist() == [1.0, 1.0]
    row, run_dir = tune(class_weights="balanced", num_train_epochs=1, learning_rate=STILL)
    model = AutoModelForSequenceClassification.from_pretrained(run_dir / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "hf")
    with open(uneven, newline="") as file:
        rows = list(csv.DictReader(file))
    labels = torch.tensor([row["labels"].index(one["label"]) for one in rows])
    with torch.no_grad():
        logits = model(**tokenizer([one["text"] for one in rows], padding=True,
                                   return_tensors="pt")).logits
    weights = torch.tensor([40 / (2 * 10), 40 / (2 * 30)])  # neg, pos
    assert row["labels"] == ["neg", "pos"]
    expected = float(F.cross_entropy(logits, labels, weight=weights))
    assert expected != pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-3)
    assert logged(run_dir, metrics.EVAL_LOSS) == [pytest.approx(expected, rel=1e-4)]
    # The steps of an epoch, each by its share of the weights, see every example once.
    assert logged(run_dir, metrics.TRAIN_LOSS) == [pytest.approx(expected, rel=1e-4)]


@pytest.mark.parametrize("options", [{"epoch": "last"}, {"label_budget": 9}])
@pytest.mark.parametrize("choice", [{"metric": "loss"}, {"early_stopping": 2}])
def test_what_reads_validation_labels_has_no_use_with_the_last_epoch(options, choice):
    (name, value), = choice.items()
    with pytest.raises(ConfigError, match=f"--{name} {value}: has no use with --epoch last.*; "
                                          "leave it out, or give --epoch best"):
        FinetuneConfig(output_dir="r", task="mr", model_name_or_path="m", **options, **choice)
