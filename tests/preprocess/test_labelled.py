"""Labelled files: what is an example, what is left out and counted, what is refused, and doubts."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from decimal import Decimal

import pyarrow
import pyarrow.parquet
import pytest

from preprocess.corpus import load_task, read_documents
from preprocess.corpus.advice import guess_encoding
from preprocess.corpus.tasks import default_name
from preprocess.errors import ConfigError, DataError

GOOD = [{"text": f"text {i}", "label": i % 2} for i in range(60)]


def write(path, rows) -> str:
    """Write rows as JSON lines, or as parquet, by the ending."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(tmp_path, rows, ending="jsonl", **options):
    train = write(tmp_path / f"train.{ending}", rows)
    test = write(tmp_path / "test.jsonl", [{"text": "unseen", "label": "0"}])
    return load_task("custom", **{"train_file": train, "test_file": test, **options})


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize(("value", "kind"), [
    (["a", "list"], "list"), ({"a": 1}, "dict"), (0.5, "float"), (float("nan"), "float"),
    (float("inf"), "float"),
])
def test_a_label_that_is_none(tmp_path, ending, value, kind):
    rows = [{"text": "a", "label": value}, {"text": "b", "label": value}]
    place = "train.jsonl, line 1" if ending == "jsonl" else "train.parquet, row 1"
    with pytest.raises(DataError, match=rf"{place}: column 'label' holds .*\({kind}[;)]") as caught:
        load(tmp_path, rows, ending)
    assert str(value)[:5] in str(caught.value)


def test_labels_of_several_kinds(tmp_path):
    """Whole numbers, whole floats and their strings are one; booleans are names."""
    values = [4, 4.0, "4", True, False, None, " x "]
    rows = [{"text": f"{i} {v}", "label": v} for i in range(20) for v in values]
    task = load(tmp_path, rows, test_file=write(tmp_path / "t.jsonl", rows[:7]))
    assert task.labels == ("4", "False", "True", "x")
    assert task.left_out == {"train": {"text": 0, "label": 20}, "test": {"text": 0, "label": 1}}
    table = [{"text": f"text {i}", "label": Decimal(i % 2)} for i in range(60)]
    assert load(tmp_path, table, "parquet").labels == ("0", "1")


def test_labels_that_are_the_same_number(tmp_path):
    rows = [{"text": f"{i}", "label": ("1", "1.0", "2")[i % 3]} for i in range(9)]
    with pytest.raises(DataError, match="'1' and '1.0', the same number"):
        load(tmp_path, rows)


@pytest.mark.parametrize(("columns", "message"), [
    ({"pair_column": "label"}, "--pair_column label is the --label_column too; give each a column"),
    ({"pair_column": "text"}, "--pair_column text is the --text_column too"),
    ({"text_column": "label"}, "--label_column label is the --text_column too"),
])
def test_no_column_has_two_parts(tmp_path, columns, message):
    rows = [{"text": "a", "label": "b"}, {"text": "c", "label": "d"}]
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, rows, **columns)


@pytest.mark.parametrize(("empty", "message"), [
    ("test", "test.jsonl: --pair_column aspect is empty in all 2 examples of test (and filled in 1 "
     "of 60 of train, 2 of 2 of validation); fill it in, or leave --pair_column out"),
    ("validation", "all 2 examples of validation (and filled in 1 of 60 of train, 2 of 2 of test)"),
    ("train", "train.jsonl: --pair_column aspect is empty in all 60 examples of train"),
])
def test_a_split_without_any_aspect_is_no_split_of_pairs(tmp_path, empty, message):
    rows = {"train": GOOD, "validation": GOOD[:2], "test": GOOD[2:4]}
    files = {}
    for split, some in rows.items():
        aspects = [" "] * len(some) if split == empty else ["food"] + [None] * (len(some) - 1) \
            if split == "train" else ["food"] * len(some)
        files[f"{split}_file"] = write(tmp_path / f"{split}.jsonl", [
            {**row, "aspect": aspect} for row, aspect in zip(some, aspects, strict=True)])
    with pytest.raises(DataError) as caught:
        load_task("custom", **files, pair_column="aspect")
    assert message in str(caught.value)
    assert load_task("custom", **files).splits["test"][0].aspect is None


@pytest.mark.parametrize("column", ["text", "aspect"])
@pytest.mark.parametrize("value", [["a", "b"], 3, 2.5, True, {"a": 1}])
def test_a_text_that_is_none(tmp_path, column, value):
    rows = [{"text": "a", "label": 0, "aspect": "b", column: value}] * 2
    with pytest.raises(DataError, match=f"train.jsonl, line 1: column '{column}' holds a JSON"):
        load(tmp_path, rows, pair_column="aspect")


def test_rows_left_out_are_counted_and_said(tmp_path, capsys):
    holes = [{"text": None, "label": 1}, {"text": " ", "label": 0}, {"text": "c", "label": None},
             {"text": "d", "label": "1"}]
    test = write(tmp_path / "holes.jsonl", holes)
    task = load(tmp_path, GOOD, test_file=test)
    assert len(task.splits["test"]) == 1 and "train" not in task.left_out
    assert task.left_out == {"test": {"text": 2, "label": 1}}
    assert (f"task {tmp_path.name}: 3 rows of test left out (2 without a text, 1 without a label)"
            in capsys.readouterr().out)


@pytest.mark.parametrize(("name", "content", "match"), [
    ("a.csv", "text,label\nx,1\ntext,label\ny,0\n", "line 3: the first line again"),
    ("a.csv", "text,label\nx,1\n\ufefftext,label\ny,0\n", "line 3: the first line again"),
    ("a.csv", "text,label\nx,1\nlabel,text\n0,y\n", "line 3: the first line again"),
    ("a.csv", "id,text,label\n1,x,1\n7,text,label\n", "line 3: the first line again"),
    ("a.tsv", "text\tlabel\n\"x\t1\n text \tlabel\n", "line 3: the first line again"),
    ("a.jsonl", '{"text": "x", "label": "1"}\n{"text": "text", "label": "label"}\n',
     "line 2: every column holds its own name"),
    ("a.csv", "text,label,label\nx,1,2\n", "line 1: column 'label' occurs twice"),
    ("a.csv", "text,text,label\nx,y,2\n", "line 1: column 'text' occurs twice"),
    ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "x", "label": 1, "text": "y"}\n',
     "line 2: the key 'text' occurs twice"),
    ("a.jsonl", '{"text": "x", "label": 1, "meta": {"a": 1, "a": 2}}\n', "the key 'a' occurs"),
])
def test_a_header_or_a_column_twice(tmp_path, name, content, match):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"{name}, {match}|{match}"):
        load_task("custom", train_file=str(tmp_path / name), test_file=str(tmp_path / name))


def test_a_column_twice_that_nobody_asked_for(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,worker,worker\nx,1,2\ntext,1,2\n")
    assert list(read_documents([str(path)])) == ["x", "text"]
    path.write_text("text\nx\ntext\n")
    with pytest.raises(DataError, match="line 3: the first line again"):
        list(read_documents([str(path)]))


def test_parquet_columns_twice(tmp_path):
    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column 'text' occurs twice"):
        list(read_documents([str(tmp_path / "a.parquet")]))


def test_half_a_surrogate_pair_in_a_labelled_file(tmp_path):
    path = tmp_path / "half.jsonl"
    rows = [{"text": f"a \ud83d b{i}", "label": f"\ude00{i % 2}"} for i in range(60)]
    write(path, rows)
    task = load_task("custom", train_file=str(path), test_file=str(path))
    assert task.labels == ("\ufffd0", "\ufffd1")
    assert task.splits["test"][3].text == "a \ufffd b3"
    assert list(read_documents([str(path)]))[3] == "a \ufffd b3"
    path.write_text('{"text": "\\ud83d\\ude00"}\n')  # a whole pair
    assert list(read_documents([str(path)])) == ["\U0001f600"]


def test_doubts_are_said_with_their_counts(tmp_path, capsys):
    rows = [{"text": f"text {i}", "label": f"{i % 60}"} for i in range(600)]
    rows.append({"text": "rare", "label": "zebra"})
    test = write(tmp_path / "test2.jsonl", rows[:30] + [{"text": "new", "label": "1"}])
    load(tmp_path, rows, test_file=test)
    said = capsys.readouterr().out
    assert f"warning: task {tmp_path.name}: 61 classes" in said
    assert "1 of 61 classes have fewer than 2 training examples: zebra" in said
    assert "30 of 31 test examples are training or validation examples too" in said
    load(tmp_path, GOOD)
    assert "warning" not in capsys.readouterr().out


# --------------------------------------------------------------------------- other formats


@pytest.mark.parametrize(("encoding", "text"), [
    ("latin1", "a caf\u00e9 near here"),
    ("cp1252", "it\u2019s fine"),
    ("cp1251", "\u041f\u0440\u0438\u0432\u0435\u0442, \u0445\u043e\u0440\u043e\u0448\u0438\u0439"),
    ("gb18030", "\u8fd9\u5bb6\u9910\u9986\u7684\u5473\u9053\u5f88\u597d\u3002"),
    ("shift_jis", "\u3053\u3093\u306b\u3061\u306f\u3001\u4e16\u754c\u3002"),
    ("euc_kr", "\uc548\ub155\ud558\uc138\uc694 \uc88b\uc740 \uc601\ud654"),
    ("utf-16", "plain and caf\u00e9"),
])
def test_the_encoding_of_these_bytes_is_named(tmp_path, encoding, text):
    data = text.encode(encoding)
    assert guess_encoding(data) == encoding
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"fit {encoding}: iconv -f {encoding} -t utf-8"):
        list(read_documents([str(path)]))


def test_damaged_utf8_is_not_taken_for_another_encoding():
    assert guess_encoding("caf\u00e9 na\u00efve \u4e2d".encode() + b"\xff end") == "utf-8"


@pytest.mark.parametrize(("name", "content", "match"), [
    ("a.csv", b"text;label\nx;1\n", "separated by ';': python -c"),
    ("a.csv", b"text\tlabel\nx\t1\n", r"separated by '\\t': python -c"),
    ("a.tsv", b"text,label\nx,1\n", "look like .csv: mv .*a.tsv .*a.csv"),
    ("a.txt", b"text\tlabel\nx\t1\n", "look like .tsv: mv .*a.txt .*a.tsv"),
    ("a.json", b'[{"text": "x", "label": 1}]\n', "one JSON array, .*: python -c"),
    ("a.json", b'{\n "text": "x",\n "label": 1\n}\n', "JSON over several lines: jq -c"),
    ("a.jsonl", b"text,label\nx,1\n", "look like .csv: mv"),
    ("a.csv", b"PAR1\xff\xff", "these bytes are parquet: mv .*a.csv .*a.parquet"),
    ("a.csv", b"PK\x03\x04\xff [Content_Types].xml", "an Excel workbook: python -c"),
    ("a.csv", b"\x1f\x8b\x08\x00", "these bytes are gzip: mv .*a.csv .*a.csv.gz"),
    ("a.csv.gz", b"text,label\nx,1\n", "not compressed: mv .*a.csv.gz .*a.csv"),
    ("a.parquet", b"text,label\nx,1\n", "look like .csv: mv"),
])
def test_the_format_of_these_bytes_is_named(tmp_path, name, content, match):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=match):
        load_task("custom", train_file=str(path), test_file=str(path))


@pytest.mark.parametrize(("encoding", "ending"), [
    ("latin1", ""), ("gb18030", ""), ("utf-16", ""), ("latin1", ".gz"),
])
def test_the_command_that_is_named_converts(tmp_path, encoding, ending):
    text = "text,label\n" + "\u8fd9\u5bb6\u9910\u9986,1\nx,0\n" if encoding == "gb18030" else (
        "text,label\na caf\u00e9 near here,1\nx,0\n")
    path = tmp_path / f"a.csv{ending}"
    data = text.encode(encoding)
    path.write_bytes(gzip.compress(data) if ending else data)
    with pytest.raises(DataError) as caught:
        list(read_documents([str(path)]))
    command = str(caught.value).partition(f"fit {encoding}: ")[2]
    subprocess.run(command, shell=True, check=True)
    assert list(read_documents([str(tmp_path / "a_utf8.csv")])) == [
        line.partition(",")[0] for line in text.splitlines()[1:]]


@pytest.mark.parametrize(("name", "content"), [
    ("a.csv", 'text;label\n"x, y";1\n'), ("a.json", '[{"text": "x, y", "label": 1}]'),
])
def test_the_command_that_is_named_makes_a_table(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        list(read_documents([str(tmp_path / name)]))
    command = str(caught.value).partition(": python ")[2]
    subprocess.run(f"{sys.executable} {command}", shell=True, check=True)
    (made,) = set(tmp_path.iterdir()) - {tmp_path / name}
    assert list(read_documents([str(made)])) == ["x, y"]


@pytest.mark.parametrize(("file", "expected"), [
    ("data/trec.csv", "trec"),
    ("data/trec/train.csv.gz", "trec"),
    ("data/trec/Training_set.tsv", "trec"),
    ("train.csv", "train"),
    ("../train.csv", "train"),
    ("data/my.data.v2.jsonl.zst", "my.data.v2"),
    ("pypi:some-package==1.0/data/trec/train.parquet#sha256=ab/cd", "trec"),
    ("hub:ag_news", "ag_news"),
    ("hub:glue:sst2", "sst2"),
    ("data/a\x1b[2Jb.csv", "a\\x1b[2Jb"),
])
def test_a_custom_task_is_called_after_its_file(file, expected):
    assert default_name("custom", file) == expected
    assert default_name("mr", file) == "mr"


def test_a_task_is_called_as_it_was_said(tmp_path):
    (tmp_path / "trec.csv").write_text("text,label\n" + "".join(
        f"a text {i},{i % 2}\n" for i in range(30)))
    files = {"train_file": str(tmp_path / "trec.csv"), "test_file": str(tmp_path / "trec.csv")}
    assert load_task("custom", **files).name == "trec"
    assert load_task("custom", **files, task_name="questions").name == "questions"
