"""Predictions for new texts: transformers' own numbers, in the order of the file, and annotate's
marks for the predicted label.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from preprocess.errors import ConfigError, DataError
from preprocess.store import TokenStore, open_array
from preprocess.view import terminal
from tests.support.runs import words
from train import annotate, predict

SIZES = {"max_seq_length": 32, "train_batch_size": 8, "learning_rate": 3e-3,
         "deepspeed_config": "ds_configs/cpu.json"}
EMPTY = ["", " \t", "\u200b"]  # the last one is nothing to a BERT tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_encoder, labelled_files, run_here) -> Path:
    """The run directory of a classifier that knows its task."""
    out = tmp_path_factory.mktemp("predict") / "run"
    run_here("train/finetune.py", *words({
        **SIZES, "task": "custom", "train_file": labelled_files["train"], "validation_file":
        labelled_files["test"], "test_file": labelled_files["test"], "model_name_or_path":
        tiny_encoder, "output_dir": out, "num_train_epochs": 10, "seeds": 1}))
    return out


@pytest.fixture(scope="module")
def model(run) -> str:
    return str(run / "seed_1" / "hf")


@pytest.fixture(scope="module")
def texts(labelled_files) -> list[str]:
    """Texts of several lengths, one of them too long, some of them empty."""
    with open(labelled_files["test"], newline="") as file:
        found = [row["text"] for row in csv.DictReader(file)]
    found[3:3] = EMPTY
    return [*found[:10], " ".join(found[3:20]), '"Good" film,\r\nbut\n bad .', *found[10:14]]


def written(path: Path) -> list[dict]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def run_predict(model: str, source: Path | str, output: Path, **flags) -> list[dict]:
    predict.main(words({"model_name_or_path": model, "input": source, "output": output, **flags}))
    return written(output) if output.exists() else []


def write_texts(path: Path, texts: list[str], column: str = "text") -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", column])
        writer.writerows(enumerate(texts))
    return path


def test_each_text_alone_through_transformers(tmp_path, model, texts):
    found = run_predict(model, write_texts(tmp_path / "t.csv", texts), tmp_path / "p.jsonl",
                        per_device_eval_batch_size=5)
    table = run_predict(model, tmp_path / "t.csv", tmp_path / "p.csv")
    network = AutoModelForSequenceClassification.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    labels = [network.config.id2label[i] for i in range(2)]
    assert [row["text"] for row in found] == [row["text"] for row in table] == texts
    assert list(table[0]) == ["text", "prediction", "probability_neg", "probability_pos"]
    assert {row["prediction"] for row in found} == {"neg", "pos", None}
    for text, row, line in zip(texts, found, table, strict=True):
        if text in EMPTY:
            assert row["prediction"] is None and line["prediction"] == ""
            assert row["probabilities"] == {"neg": None, "pos": None}
            assert line["probability_neg"] == line["probability_pos"] == ""
            continue
        with torch.no_grad():
            inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=32)
            expected = network(**inputs).logits[0].softmax(-1)
        assert list(row["probabilities"]) == labels
        assert list(row["probabilities"].values()) == pytest.approx(expected.tolist(), abs=2e-6)
        assert row["prediction"] == line["prediction"] == labels[int(expected.argmax())]
        assert float(line["probability_pos"]) == pytest.approx(float(expected[1]), abs=2e-6)


def test_predictions_are_those_of_the_test_in_fine_tuning(tmp_path, run, model, labelled_files):
    found = run_predict(model, labelled_files["test"], tmp_path / "p.jsonl")
    tested = written(run / "seed_1" / "predictions.jsonl")
    assert [list(row["probabilities"].values()) for row in found] == [
        pytest.approx(row["probabilities"], abs=2e-6) for row in tested]
    assert [row["prediction"] for row in found] == [
        ("neg", "pos")[row["prediction"]] for row in tested]


def test_every_kind_of_file_gives_the_same_predictions(tmp_path, model, texts):
    plain = [" ".join(text.split()) for text in texts]
    (tmp_path / "t.txt").write_text("\n".join(plain) + "\n")
    (tmp_path / "t.tsv").write_text("\n".join(["said\tid", *(f"{text}\t1" for text in plain)]))
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"said": text or None}) + "\n" for text in plain))
    pyarrow.parquet.write_table(pyarrow.table({"said": plain}), tmp_path / "t.parquet")
    write_texts(tmp_path / "t.csv", plain, "said")
    made = []
    for suffix in ("txt", "tsv", "jsonl", "parquet", "csv"):
        column = {} if suffix == "txt" else {"text_column": "said"}
        found = run_predict(model, tmp_path / f"t.{suffix}", tmp_path / f"{suffix}.jsonl", **column)
        made.append([row["probabilities"] for row in found])
        assert list(found[0])[0] == column.get("text_column", "text")
    assert made[0] == made[1] == made[2] == made[3] == made[4] and len(made[0]) == len(texts)


def test_texts_that_come_in_several_parts(tmp_path, model, texts, monkeypatch):
    source = write_texts(tmp_path / "t.csv", texts)
    whole = run_predict(model, source, tmp_path / "a.jsonl", explain=8)
    monkeypatch.setattr(predict, "CHUNK_TEXTS", 3)
    parts = run_predict(model, source, tmp_path / "b.jsonl", explain=8)
    assert [row["prediction"] for row in whole] == [row["prediction"] for row in parts]
    assert [row.get("importance") for row in whole] == [row.get("importance") for row in parts]
    assert ["importance" in row for row in whole] == [i < 8 for i in range(len(texts))]


def test_pairs_are_read_as_in_fine_tuning(tmp_path, model):
    rows = [{"text": "the plot was good", "aspect": "plot"}, {"text": "bad .", "aspect": ""}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = run_predict(model, tmp_path / "t.jsonl", tmp_path / "p.csv", pair_column="aspect",
                        explain=2)
    network = AutoModelForSequenceClassification.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    for row, line in zip(rows, found, strict=True):
        with torch.no_grad():
            logits = network(**tokenizer(row["aspect"], row["text"], return_tensors="pt")).logits
        assert float(line["probability_neg"]) == pytest.approx(float(logits.softmax(-1)[0, 0]),
                                                               abs=2e-6)
        assert (line["text"], line["aspect"]) == (row["text"], row["aspect"])


# ------------------------------------------------------------------------------- explanations


def test_the_marks_are_those_of_annotate(tmp_path, model, texts, run_here):
    """Of the same texts as training texts, each labelled as it is predicted."""
    mixed = ["good film . bad acting .", "the plot was bad . great cast !"]
    distinct = list(dict.fromkeys([*texts, *mixed]))
    found = run_predict(model, write_texts(tmp_path / "t.csv", distinct), tmp_path / "p.jsonl",
                        explain=1000)
    labelled = [row for row in found if row["prediction"]]
    with open(tmp_path / "train.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["text", "label"], *([row["text"], row["prediction"]]
                                               for row in labelled)])
    annotate_flags = {"task": "custom", "train_file": tmp_path / "train.csv", "test_file":
                      tmp_path / "train.csv", "validation_file": tmp_path / "train.csv",
                      "model_name_or_path": model, "output": tmp_path / "A", "max_seq_length": 32}
    run_here("train/annotate.py", *words(annotate_flags))
    (shard,) = TokenStore.open(str(tmp_path / "A")).shards
    marks = open_array(shard, "", "importance")[0]
    names = AutoTokenizer.from_pretrained(model).convert_ids_to_tokens(shard.tokens.tolist())
    expected = [None if mark == annotate.NOT_ANNOTATED else int(mark) for mark in marks]
    assert [token for row in labelled for token in row["tokens"]] == names
    assert [mark for row in labelled for mark in row["importance"]] == expected
    assert {0, 1, None} == set(expected)
    assert all(row["tokens"] == row["importance"] == [] for row in found if not row["prediction"])


def test_terminal_and_page_show_the_important_tokens(tmp_path, model, monkeypatch, capsys):
    source = write_texts(tmp_path / "t.csv", ["a good film , <b>", "", "bad film", "good ."])
    rows = run_predict(model, source, tmp_path / "p.jsonl", explain=3)
    said = capsys.readouterr().out
    boxed = [t for row in rows[:3] for t, mark in zip(row["tokens"], row["importance"],
                                                      strict=True) if mark]
    assert boxed and re.findall(r"\[(?!UNK)(\w+)\]", said) == boxed
    assert "text 2: no token in it" in said and "\x1b" not in said
    assert "The first 3 of 4 texts; --explain 4 shows all." in said and "text 4" not in said
    monkeypatch.setattr(predict, "wants_colour", lambda: True)
    run_predict(model, source, tmp_path / "p.jsonl", explain=3)
    assert f"\x1b[1;4m[{boxed[0]}]\x1b[0m" in capsys.readouterr().out
    run_predict(model, source, tmp_path / "p.jsonl", explain=3, html=tmp_path / "p.html")
    page = (tmp_path / "p.html").read_text()
    assert re.findall(r'<mark class="m">(\w+)</mark>', page)[1:] == boxed  # the first: the legend
    assert f"Classifier: {model}; labels " in page  # a page says whose predictions it shows
    assert "<b>" not in page.split("<h3>")[1] and "<script" not in page
    assert not [line for line in capsys.readouterr().out.splitlines() if "[" in line]


def test_colours_are_for_terminals_alone(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert terminal.wants_colour()
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as other:
            other.setenv(name, value)
            assert not terminal.wants_colour()
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    assert not terminal.wants_colour()


# ------------------------------------------------------------------------------- refusals


def test_a_dry_run_reads_everything_and_writes_nothing(tmp_path, model, texts, capsys):
    source = write_texts(tmp_path / "t.csv", texts)
    assert run_predict(model, source, tmp_path / "p.csv", dry_run=True) == []
    said = capsys.readouterr().out
    assert f"{len(texts)} texts, 2 of them empty" in said and "at most 32 tokens" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.csv"]
    run_predict(model, source, tmp_path / "p.csv", dry_run=True, max_seq_length=16)
    assert "at most 16 tokens" in capsys.readouterr().out


def test_a_broken_row_is_found_before_anything_is_written(tmp_path, model):
    (tmp_path / "t.jsonl").write_text('{"text": "good"}\n' * 30 + '{"text": 3}\n')
    (tmp_path / "p.csv").write_text("older\n")
    with pytest.raises(DataError, match="line 31: column 'text' holds a JSON number"):
        run_predict(model, tmp_path / "t.jsonl", tmp_path / "p.csv")
    assert (tmp_path / "p.csv").read_text() == "older\n"
    for content, message in (("", "empty"), ("text\n", "no text in it"),
                             ('text\n""\n" "\n', "all 2 texts are empty")):
        (tmp_path / "t.csv").write_text(content)
        with pytest.raises(DataError, match=message):
            run_predict(model, tmp_path / "t.csv", tmp_path / "p.csv")


def test_an_error_on_the_way_leaves_the_older_file(tmp_path, model, texts, monkeypatch):
    source = write_texts(tmp_path / "t.csv", texts)
    (tmp_path / "p.csv").write_text("older\n")
    monkeypatch.setattr(predict, "CHUNK_TEXTS", 3)
    steps = iter(range(10))

    def fail(*args):
        if next(steps) == 2:
            raise DataError("gone")
        return np.full((3, 2), 0.5), 0

    monkeypatch.setattr(predict, "classify", fail)
    with pytest.raises(DataError, match="gone"):
        run_predict(model, source, tmp_path / "p.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.csv", "t.csv"]
    assert (tmp_path / "p.csv").read_text() == "older\n"


def changed(model: str, folder: Path, **values) -> str:
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    return str(folder)


def test_a_model_that_would_predict_noise_is_refused(tmp_path, model, tiny_encoder):
    source = write_texts(tmp_path / "t.csv", ["good"])
    several = changed(model, tmp_path / "a", problem_type="multi_label_classification")
    number = changed(model, tmp_path / "b", id2label={"0": "x"}, label2id={"x": 0})
    twice = changed(model, tmp_path / "c", id2label={"0": "x", "1": "x"}, label2id={"x": 0})
    gap = changed(model, tmp_path / "d", id2label={"0": "x", "2": "y"}, label2id={})
    more = changed(model, tmp_path / "e", id2label={"0": "x", "1": "y", "2": "z"}, label2id={})
    for name, message in (
        (tiny_encoder, "holds BertForPreTraining, not one for SequenceClassification; give a fine"),
        (several, "gives several labels for one text .multi-label."),
        (number, "gives a number and no classes"),
        (twice, "two of its labels have the same name"),
        (more, "cannot be loaded .classifier.* has another shape than config.json says"),
        (gap, "id2label in its config.json has the keys 0, 2; they must be 0 to 1"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            run_predict(name, source, tmp_path / "p.csv")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "p.csv").exists()


def test_a_folder_without_its_tokenizer_is_refused(tmp_path, model):
    """transformers makes one of its own, for which all words are one: all texts looked alike."""
    bare = Path(shutil.copytree(model, tmp_path / "bare"))
    for path in bare.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(DataError, match="has special tokens and no words.*copy the tokenizer"):
        run_predict(str(bare), write_texts(tmp_path / "t.csv", ["good"]), tmp_path / "p.csv")


def test_a_model_of_pairs_says_that_it_gets_single_texts(tmp_path, model, labelled_files, capsys):
    (tmp_path / "t.csv").write_text("text,aspect\ngood,plot\n")
    pairs = Path(shutil.copytree(model, tmp_path / "pairs"))
    lineage = json.loads((pairs / "lineage.json").read_text())
    assert lineage["stages"][-1]["about"]["pair"] is False
    lineage["stages"][-1]["about"]["pair"] = True
    (pairs / "lineage.json").write_text(json.dumps(lineage))
    for name, flags, said in ((model, {}, ""), (pairs, {"pair_column": "aspect"}, ""),
                              (pairs, {}, "fine-tuned on texts with an aspect each"),
                              (model, {"pair_column": "aspect"}, "fine-tuned on single texts")):
        run_predict(str(name), tmp_path / "t.csv", tmp_path / "p.csv", dry_run=True, **flags)
        out = capsys.readouterr().out
        assert said in out and ("warning" in out) == bool(said)
    annotate.main(words({
        "task": "custom", "train_file": labelled_files["train"], "test_file":
        labelled_files["test"], "model_name_or_path": pairs, "output": tmp_path / "A",
        "max_seq_length": 32, "dry_run": True}))
    assert "fine-tuned on texts with an aspect each" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"output": "p.txt"}, "--output p.txt: must end in .csv or .jsonl"),
        ({"html": "p.html"}, "--html p.html shows what --explain finds"),
        ({"input": "p.csv"}, "--output p.csv is the --input itself"),
        ({"output": "p.csv", "html": "./p.csv", "explain": 1}, "--html ./p.csv is the --output"),
        ({"pair_column": "text"}, "--pair_column text is the --text_column itself"),
        ({"text_column": "prediction"}, "--text_column prediction: the file of predictions has"),
        ({"text_column": "tokens"}, "--text_column tokens: the file of predictions has"),
        ({"pair_column": "probability_pos"}, "--pair_column probability_pos: the file of pred"),
        ({"explain": 0}, "--explain 0: must be 1 or more"),
        ({"input": None}, "--input is missing"),
        ({"model_name_or_path": None}, "--model_name_or_path is missing: give a fine-tuned"),
    ],
)
def test_contradictions_are_refused(flags, message):
    typed = {"model_name_or_path": "m", "input": "t.csv", "output": "p.csv", **flags}
    with pytest.raises(ConfigError, match=re.escape(message)):
        predict.main(words(typed))


def test_limits_of_the_model(tmp_path, model, monkeypatch):
    source = write_texts(tmp_path / "t.csv", ["good"])
    with pytest.raises(ConfigError, match="--max_seq_length 65: this model has 64 positions"):
        run_predict(model, source, tmp_path / "p.csv", max_seq_length=65)
    plain = shutil.copytree(model, tmp_path / "plain")
    (plain / "lineage.json").unlink()
    assert predict.read_inputs(predict.parse(predict.PredictConfig, words({
        "model_name_or_path": plain, "input": source, "output": "p.csv"}))).max_seq_length == 64
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="runs in one process, not in 2"):
        run_predict(model, source, tmp_path / "p.csv")
