"""Figures that are logged and reported, counted again from what lies on disk by other means."""

from __future__ import annotations

import csv
import json
import math
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from preprocess.store import TokenStore
from tests.support.runs import pretrained
from train import data
from train.bench.maskings import cost
from train.model import flops
from train.reports import compare, results
from train.run_dir import metrics
from train.run_dir.hf_folder import read_stages

HERE = Path(__file__).parent
# The test that counts each tag again.
RECOUNTED = {
    metrics.TRAIN_LOSS: "test_pretrain.py::test_logged_means_are_over_masked_tokens",
    metrics.MASKED_ACCURACY: "test_pretrain.py::test_logged_means_are_over_masked_tokens",
    metrics.MASKED_FRACTION: "test_pretrain.py::test_logged_means_are_over_masked_tokens",
    metrics.EPOCH: "test_pretrain.py::test_logged_means_are_over_masked_tokens",
    metrics.LEARNING_RATE: "test_pretrain.py::test_warm_up_is_linear_and_decays",
    metrics.SKIPPED_STEPS: "test_pretrain.py::test_logged_figures_by_hand",
    metrics.LOSS_SCALE: "test_pretrain.py::test_logged_figures_by_hand",
    metrics.DATA_WAIT_FRACTION: "test_pretrain.py::test_logged_figures_by_hand",
    metrics.EXAMPLE: "test_example.py::test_original_masked_and_prediction",
    metrics.EVAL_F1: "test_scores.py::test_precision_recall_f1_by_hand_and_where_undefined",
    **dict.fromkeys(
        (metrics.GRAD_NORM, metrics.TOKENS_PER_SECOND, metrics.MASKED_TOKENS_PER_SECOND,
         metrics.MFU, metrics.MEMORY, metrics.EVAL_LOSS, metrics.EVAL_PERPLEXITY,
         metrics.EVAL_ACCURACY), "test_recount.py::test_figures_of_pretraining"),
    **dict.fromkeys(
        (metrics.EVAL_MACRO_F1, metrics.EVAL_BEST, metrics.TEST_ACCURACY, metrics.TEST_MACRO_F1),
        "test_recount.py::test_figures_of_a_classifier"),
}


def test_every_tag_is_counted_again_somewhere():
    assert set(RECOUNTED) == set(metrics.TAGS)
    for place in RECOUNTED.values():
        file, _, name = place.partition("::")
        assert re.search(rf"^def {name}\(", (HERE / file).read_text(), re.MULTILINE), place


def masked_loss(model, batch) -> tuple[torch.Tensor, int, int]:
    """Sum of losses, right guesses and number of masked tokens, one text at a time, unpacked."""
    slots = batch.input_ids.shape[1]
    label_of = dict(zip(batch.masked_positions.tolist(), batch.masked_labels.tolist(), strict=True))
    total, right = torch.zeros(()), 0
    for document in range(int(batch.document_ids.max()) + 1):
        row, column = torch.nonzero(batch.document_ids == document, as_tuple=True)
        logits = model(input_ids=batch.input_ids[row, column][None]).logits[0]
        for place, flat in enumerate((row * slots + column).tolist()):
            if flat in label_of:
                total = total - torch.log_softmax(logits[place], -1)[label_of[flat]]
                right += int(logits[place].argmax()) == label_of[flat]
    return total, right, len(label_of)


def test_figures_of_pretraining(tmp_path, reviews_store, still_encoder):
    """One text at a time through transformers, counts from the batches, operations by hand."""
    run = pretrained(reviews_store, still_encoder, tmp_path / "run", max_steps=2,
                     train_batch_size=4, learning_rate=1e-9, eval_fraction=0.2)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if metrics.MFU in line]
    evaluations = [line for line in lines if metrics.EVAL_LOSS in line]
    store = TokenStore.open(reviews_store)
    rows, held_rows = data.row_tables(store, 32, 0.2)
    model = AutoModelForMaskedLM.from_pretrained(still_encoder).eval()

    held = data.PackedData(store, held_rows, data.drawn_masking(store, "random", data.EVAL_RATE),
                           seed=data.EVAL_SEED, micro_batch_size=4)
    with torch.no_grad():
        counted = [masked_loss(model, batch) for batch in held.in_order(held_rows.num_rows)]
    loss, right, masked = (sum(float(part[i]) for part in counted) for i in range(3))
    assert len(evaluations) == 2 and masked > 20
    for line in evaluations:  # the learning rate changes nothing
        assert line[metrics.EVAL_LOSS] == pytest.approx(loss / masked, rel=1e-4)
        assert line[metrics.EVAL_PERPLEXITY] == pytest.approx(math.exp(loss / masked), rel=1e-3)
        assert line[metrics.EVAL_ACCURACY] == pytest.approx(right / masked)

    batches = data.PackedData(store, rows, data.drawn_masking(store, "random", 0.15), seed=42,
                              micro_batch_size=4)
    per_token = 6 * (2 * (4 * 32 * 32 + 2 * 32 * 64) + 2 * 2 * 32 * 32)
    per_masked = 6 * (32 * 32 + 32 * store.vocab_size)
    peak = flops.peak_flops(torch.device("cpu"), "fp32").flops_per_second
    seconds = 0.0
    for number, line in enumerate(steps):
        (batch,) = batches.step(number).micro_batches
        tokens, masked = int((batch.document_ids >= 0).sum()), len(batch.masked_labels)
        seconds += tokens / line[metrics.TOKENS_PER_SECOND]
        rate = line[metrics.TOKENS_PER_SECOND] / tokens  # steps a second
        assert line[metrics.MASKED_TOKENS_PER_SECOND] == pytest.approx(masked * rate)
        work = per_token * tokens + per_masked * masked
        assert line[metrics.MFU] == pytest.approx(work * rate / peak, rel=1e-3)
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        assert 0.1 < line[metrics.MEMORY] <= largest
        model.zero_grad()
        loss, _, masked = masked_loss(model, batch)
        (loss / masked).backward()
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        assert line[metrics.GRAD_NORM] == pytest.approx(float(torch.stack(norms).norm()), rel=1e-3)
    totals = read_stages(run / "hf")[-1]["totals"]
    assert totals["seconds"] == pytest.approx(seconds, abs=0.011)


def macro_f1(labels: list[int], predictions: list[int], num_classes: int) -> float:
    """Mean of 2PR / (P + R), from the definition."""
    found = []
    for i in range(num_classes):
        hits = sum(a == b == i for a, b in zip(labels, predictions, strict=True))
        precision = hits / predictions.count(i) if i in predictions else 0
        recall = hits / labels.count(i) if i in labels else 0
        found.append(2 * precision * recall / (precision + recall) if hits else 0)
    return sum(found) / num_classes


def test_figures_of_a_classifier(tmp_path, tiny_encoder, labelled_files, run_here):
    """The exported model on each test text alone; the texts are validated on too."""
    run = tmp_path / "run"
    run_here(HERE.parents[1] / "train" / "finetune.py", "--task", "custom", "--train_file",
             labelled_files["train"], "--validation_file", labelled_files["test"], "--test_file",
             labelled_files["test"], "--model_name_or_path", tiny_encoder, "--output_dir",
             str(run), "--num_train_epochs", "3", "--max_seq_length", "32", "--train_batch_size",
             "16", "--learning_rate", "3e-4", "--seeds", "1", "--deepspeed_config",
             "ds_configs/cpu.json")
    (row,) = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    model = AutoModelForSequenceClassification.from_pretrained(run / "seed_1" / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "seed_1" / "hf")
    labels, predictions = [], []
    with open(labelled_files["test"], newline="") as file, torch.no_grad():
        for example in csv.DictReader(file):
            logits = model(**tokenizer(example["text"], return_tensors="pt")).logits[0]
            labels.append(row["labels"].index(example["label"]))
            predictions.append(int(logits.argmax()))
    accuracy = float(np.mean(np.array(labels) == predictions))
    f1 = macro_f1(labels, predictions, len(row["labels"]))
    assert (row["test_accuracy"], row["test_macro_f1"]) == pytest.approx((accuracy, f1))
    lines = [json.loads(line) for line in
             (run / "seed_1" / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if metrics.EVAL_BEST in line]
    best = epochs[row["best_epoch"] - 1]
    assert best[metrics.EVAL_ACCURACY] == best[metrics.EVAL_BEST] == pytest.approx(accuracy)
    assert best[metrics.EVAL_MACRO_F1] == pytest.approx(f1)
    assert [line[metrics.EVAL_BEST] for line in epochs] == np.maximum.accumulate(
        [line[metrics.EVAL_ACCURACY] for line in epochs]).tolist()
    (tested,) = [line for line in lines if metrics.TEST_ACCURACY in line]
    assert tested[metrics.TEST_ACCURACY] == pytest.approx(accuracy)
    assert tested[metrics.TEST_MACRO_F1] == pytest.approx(f1)
    # The report counts both again from the predictions, and agrees.
    found = results.read_finetune_run(run)
    assert found.notes == []
    table = compare.table_rows([results.Arm("a", [found])])
    shown = {line["metric"]: line["mean"] for line in table}
    assert shown == {"accuracy": f"{accuracy:.4f}", "macro_f1": f"{f1:.4f}"}


def test_macro_f1_is_that_of_the_definition():
    generator = np.random.default_rng(4)
    for _ in range(50):
        labels, predictions = generator.integers(0, 4, size=(2, 12)).tolist()
        right = [a == b for a, b in zip(labels, predictions, strict=True)]
        answers = results.Answers(tuple(map(str, range(12))), right, labels, predictions)
        assert answers.macro_f1(5) == pytest.approx(macro_f1(labels, predictions, 5))


def test_a_macro_f1_that_the_predictions_contradict_is_named(tmp_path):
    folder = tmp_path / "seed_1"
    folder.mkdir()
    answers = [{"item": str(n), "label": n % 2, "prediction": 1} for n in range(4)]
    (folder / "predictions.jsonl").write_text("\n".join(map(json.dumps, answers)))
    row = {"seed": 1, "test_accuracy": 0.5, "test_macro_f1": 1 / 3, "labels": ["no", "yes"]}
    (tmp_path / "results.jsonl").write_text(json.dumps(row))
    assert not [note for note in results.read_finetune_run(tmp_path).notes if "F1" in note]
    (tmp_path / "results.jsonl").write_text(json.dumps({**row, "test_macro_f1": 0.5}))
    (note,) = [note for note in results.read_finetune_run(tmp_path).notes if "F1" in note]
    assert "seed 1: results.jsonl says macro F1 0.5000, and the predictions give 0.3333" in note


def test_costs_of_masks_are_per_million_tokens():
    row = cost("policy", "once", 3.0, num_tokens=1_500_000, num_masked=7, num_bytes=28,
               score_seconds=12.0)
    assert row["seconds_per_million_tokens"] == pytest.approx(2)
    assert row["score_seconds_per_million_tokens"] == pytest.approx(8)
    assert cost("policy", "once", None, 10, 1, 4)["seconds_per_million_tokens"] is None
