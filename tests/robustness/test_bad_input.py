"""Broken or unusual input: one rule for each, as the table in preprocess/README.md has it.

Kept, skipped and counted, or refused with the file and the line.
"""

from __future__ import annotations

import builtins
import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from preprocess import corpus, tokenize_corpus
from preprocess.corpus import read_documents
from preprocess.errors import DataError, run_command
from preprocess.store import TokenStore


def documents(path, **options) -> list[str]:
    return list(read_documents([str(path)], **options))


def refusal(path, **options) -> str:
    with pytest.raises(DataError) as caught:
        documents(path, **options)
    return str(caught.value)


@pytest.fixture
def tokenize(tmp_path, tiny_encoder):
    """Run the command on a file and open what it made."""

    def run(path, *more) -> TokenStore:
        prefix = str(tmp_path / "store" / "s")
        tokenize_corpus.main([
            "--input", str(path), "--tokenizer", tiny_encoder, "--output", prefix,
            "--overwrite", "--num_workers", "1", *more,
        ])
        return TokenStore.open(prefix, verify=True)

    return run


def words(store: TokenStore) -> list[str]:
    """The text of each document as the tokenizer spells it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(store.tokenizer_dir)
    found = []
    for shard in store.shards:
        ends = shard.sequence_offsets[shard.document_offsets]
        pieces = np.split(shard.tokens, ends[1:-1])
        found += [tokenizer.decode(piece.tolist()) for piece in pieces]
    return found


# --------------------------------------------------------------------------- bytes and lines


@pytest.mark.parametrize("count", [1, 3, 20])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_ends_and_marks(tmp_path, count, end):
    """A byte range may begin inside a line, a character or a Windows line end."""
    path = tmp_path / "a.txt"
    kept = ["caf\u00e9 \u65e5\u672c", "", "", "old\rMac", "one\u2028line\u2029still\x0b\x0c\x85",
            "end"]
    path.write_bytes(b"\xef\xbb\xbf" + end.join(kept).encode())
    found = [documents(path, part=(i, count)) for i in range(count)]
    assert sum(found, []) == kept
    assert documents(path, blank_line_documents=True) == [kept[0], "\n".join(kept[3:])]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_marks_and_windows_line_ends_in_tables(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    rows = {
        "csv": 'text,b\r\n"one\r\ntwo",1\r\nthree,2\r\n',
        "tsv": "text\tb\r\none\u2028two\t1\r\nthree\t2",
        "jsonl": '{"text": "one\u2028two"}\r\n\r\n{"text": "three"}\r\n',
    }
    path.write_bytes(b"\xef\xbb\xbf" + rows[ending].encode())
    assert documents(path) == [{"csv": "one\r\ntwo"}.get(ending, "one\u2028two"), "three"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_invalid_utf8_names_the_line_in_every_part(tmp_path, count):
    path = tmp_path / "a.txt"
    for data, line in (
        (b"fine\n" * 30 + b"caf\xe9\n" + b"fine\n" * 9, 31),
        (b"fine\n" * 39 + "\u65e5".encode()[:2], 40),  # ends inside a character
        ("\ufefffine\nno\n".encode("utf-16"), 1),
    ):
        path.write_bytes(data)
        said = []
        for index in range(count):
            try:
                documents(path, part=(index, count))
            except DataError as error:
                said.append(str(error))
        assert len(said) == 1 and f"a.txt, line {line}: not UTF-8" in said[0] and "iconv" in said[0]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.bak", "a"])
def test_json_lines_are_no_plain_text(tmp_path, name):
    """Or every key would be learnt as a word."""
    path = tmp_path / name
    lines = [json.dumps({"text": f"film {number}", "label": 1}) for number in range(3)]
    path.write_text("\n".join(lines) + "\n")
    said = refusal(path)
    assert said.startswith(f"{path}, line 1: a JSON object, and this file is read as plain text; ")
    assert f"mv {path} {tmp_path / 'a'}" in said and ".jsonl" in said
    assert refusal(path, blank_line_documents=True) == said
    # The other parts cannot know; the first one ends the command.
    assert refusal(path, part=(0, 2)) == said and documents(path, part=(1, 2))
    path.write_text("\n" + "\n".join(lines) + "\n")
    assert documents(path) == ["", *lines]
    for kept in ('{"a": 1', "{a}", '["a"]', "5", '"a"'):
        path.write_text(f"{kept}\nmore\n")
        assert documents(path) == [kept, "more"]
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write(lines[0] + "\n")
    assert "let its name end in .jsonl" in refusal(tmp_path / "b.txt.gz")


def test_nul_characters_are_taken_out_and_counted(tmp_path, tokenize, capsys):
    path = tmp_path / "a.jsonl"
    rows = ["a go\0od film", "\0", "a bad one", "\0dull\0"]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in rows))
    store = tokenize(path)
    assert words(store) == ["a good film", "a bad one", "dull"]
    assert store.info["counts"]["documents_with_nul"] == 3
    assert store.info["counts"]["documents_dropped"] == 1
    assert "1 empty documents dropped, NUL characters removed from 3" in capsys.readouterr().out
    text = tmp_path / "a.txt"
    text.write_bytes("\n".join(rows).encode())
    assert words(tokenize(text)) == ["a good film", "a bad one", "dull"]


def test_a_hundred_megabytes_in_a_line(tmp_path):
    path = tmp_path / "a.txt"
    with open(path, "wb") as stream:
        stream.write(b"fine\n")
        for _ in range(100):
            stream.write(b"word " * 200_000)
    assert "a.txt, line 2: longer than 16,777,216 bytes" in refusal(path)
    assert len(corpus.cut_part([str(path)], False, (0, 1), None)) == 24


@pytest.mark.parametrize("ending", ["txt", "jsonl", "txt.gz", "jsonl.zst"])
def test_an_empty_file_has_no_documents(tmp_path, ending, tokenize):
    path = tmp_path / f"a.{ending}"
    path.write_bytes({
        "gz": gzip.compress(b""), "zst": pyarrow.compress(b"", codec="zstd", asbytes=True),
    }.get(ending.rpartition(".")[2], b""))
    assert documents(path) == []
    if ending == "txt":
        assert tokenize(path).num_documents == 0


@pytest.mark.parametrize(("ending", "complaint"), [
    ("csv", "empty; a first line"), ("tsv", "empty; a first line"),
    ("parquet", "not a readable parquet file"),
])
def test_an_empty_table_is_refused(tmp_path, ending, complaint):
    (tmp_path / f"a.{ending}").touch()
    assert f"a.{ending}: {complaint}" in refusal(tmp_path / f"a.{ending}")


# --------------------------------------------------------------------------- tables


@pytest.mark.parametrize("count", [2, 3, 7])
def test_quoted_line_ends_survive_any_number_of_shards(tmp_path, tokenize, count):
    """A CSV is never cut into byte ranges: a quoted field may hold what looks like a row."""
    path = tmp_path / "a.csv"
    texts = [f'a good film {"," * i}\n"the plot",1\nwas number {i}' for i in range(9)]
    quoted = [text.replace('"', '""') for text in texts]
    path.write_text("text,b\n" + "".join(f'"{text}",{i}\n' for i, text in enumerate(quoted)))
    assert corpus.cut_part([str(path)], False, (0, count), None) is None
    parts = [documents(path, part=(i, count)) for i in range(count)]
    assert parts == [texts[i::count] for i in range(count)]
    store = tokenize(path, "--num_shards", str(count))
    assert store.num_documents == 9 and len(store.shards) == count


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b'text,b\n"one\ntwo",1\n"open,2\nfine,3\n', 4),
        (b'text,b\nfine,1\n"one"two,2\n', 3),
        (b'text,b\n"two\nlines",1,2\nfine,3\n', 2),
        (b'text,b\nfine,1\n"two\nlines"\n', 3),
        (b"text,b\rone,1\r", 1),  # line ends of old Macs
    ],
)
def test_a_broken_row_is_named_by_its_first_line(tmp_path, data, line):
    path = tmp_path / "a.csv"
    path.write_bytes(data)
    assert refusal(path).startswith(f"{path}, line {line}: ")


JSON_VALUES = [("5", "number"), ("1.5", "number"), ("true", "true or false"), ('["a"]', "array"),
               ('{"a": 1}', "object")]


@pytest.mark.parametrize(("value", "kind"), JSON_VALUES)
def test_a_json_column_that_is_not_text(tmp_path, value, kind):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine", "n": 1}\n\n' + f'{{"text": {value}, "n": 2}}\n')
    said = refusal(path)
    assert f"a.jsonl, line 3: column 'text' holds a JSON {kind}, not text" in said
    assert "--text_column" in said
    assert f"line 3: column 'text' holds a JSON {kind}" in refusal(path, part=(1, 2))
    assert documents(path, where={"n": "1"}, text_column="text", max_documents=1) == ["fine"]


def test_null_is_an_empty_document(tmp_path, tokenize):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": null}\n{"text": "a good film"}\n{"text": ""}\n{"text": " "}\n')
    store = tokenize(path)
    assert words(store) == ["a good film"] and store.info["counts"]["documents_dropped"] == 3
    for name, kind in (("a", pyarrow.string()), ("b", pyarrow.large_string())):
        table = pyarrow.table({"text": pyarrow.array([None, "fine"], kind)})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
        assert documents(tmp_path / f"{name}.parquet") == ["", "fine"]


def test_a_parquet_column_that_is_not_text(tmp_path):
    path = tmp_path / "a.parquet"
    columns = {"text": pyarrow.array(["a", "b", "a"]).dictionary_encode(), "number": [1, 2, 3],
               "list": [["a"], [], ["b"]], "bytes": [b"a", b"b", b"c"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    assert documents(path) == ["a", "b", "a"]
    assert documents(path, where={"number": "2"}) == ["b"]
    for column, kind in (("number", "int64"), ("list", "list<"), ("bytes", "binary")):
        said = refusal(path, text_column=column)
        assert f"a.parquet: column {column!r} holds {kind}" in said and "not text" in said


def test_invalid_utf8_in_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [b"fine"] * 200 + [b"caf\xe9"]
    text = pyarrow.Array.from_buffers(
        pyarrow.string(), len(texts), pyarrow.array(texts, pyarrow.binary()).buffers()
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), path)
    assert re.search(r"a\.parquet: not UTF-8 in rows 129 to 256", refusal(path))


# --------------------------------------------------------------------------- sizes in parquet


def write_parquet(path, texts, **options) -> str:
    text = texts if isinstance(texts, pyarrow.Array) else pyarrow.array(texts)
    pyarrow.parquet.write_table(pyarrow.table({"text": text, "n": range(len(text))}), path,
                                **options)
    return str(path)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_pages_of_a_column_are_known_from_their_headers(tmp_path, version, compression):
    texts = [f"text {i} " * (i % 50) for i in range(5000)] + [None]
    path = write_parquet(tmp_path / "a.parquet", texts, compression=compression,
                         data_page_version=version, data_page_size=10_000, use_dictionary=["n"])
    assert documents(path) == [text or "" for text in texts]
    opened = pyarrow.parquet.ParquetFile(path)
    chunk = opened.metadata.row_group(0).column(0)
    pages = list(corpus.sources.read_pages(tmp_path / "a.parquet", chunk))
    assert len(pages) > 3 and all(page.is_data and not page.is_indices for page in pages)
    headers = chunk.total_uncompressed_size - sum(page.size for page in pages)
    assert 0 < headers < 1000 * len(pages)
    numbers = list(corpus.sources.read_pages(
        tmp_path / "a.parquet", opened.metadata.row_group(0).column(1)))
    assert [page.is_data for page in numbers][:2] == [False, True] and numbers[1].is_indices


def test_few_bytes_that_unpack_to_many(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["b" * (4 << 20)], compression="zstd")
    assert re.search(r"a\.parquet, row group 1: column 'text' unpacks from .* more than 500 times",
                     refusal(path))
    assert "holds int64" in refusal(path, text_column="n")


def test_a_value_above_the_limit_in_every_format(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.sources, "MAX_LINE_BYTES", 1000)
    texts = ["fine"] * 300 + ["\u00e9" * 501] + ["fine"]  # 1,002 bytes, 501 characters
    again = pyarrow.array(texts).dictionary_encode()
    for name, made in (("a", texts), ("b", again)):
        path = write_parquet(tmp_path / f"{name}.parquet", made, use_dictionary=name == "b")
        said = refusal(path)
        assert "column 'text' holds a value of 1,002 bytes; at most 1,000" in said
        assert re.search(rf"{name}\.parquet, rows \d+ to \d+", said)
    path = write_parquet(tmp_path / "c.parquet", ["x" * 1100], compression="none")
    assert "row group 1" in refusal(path)
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": texts[300]}, ensure_ascii=False) + "\n")
    assert "longer than 1,000 bytes" in refusal(tmp_path / "d.jsonl")
    (tmp_path / "e.csv").write_text('text\n"' + "x\n" * 550 + '"\n')
    assert "field limit (1000)" in refusal(tmp_path / "e.csv")


def test_a_page_that_does_not_fit_into_memory(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", [f"{i}" * 40 for i in range(3000)],
                         compression="none", use_dictionary=False)
    monkeypatch.setattr(corpus.sources, "BATCH_BYTES", 1 << 15)
    assert "has a page of" in refusal(path) and "write_batch_size" in refusal(path)
    monkeypatch.setattr(corpus.sources, "BATCH_BYTES", 1 << 20)
    assert len(documents(path)) == 3000  # a row or two at a time


def test_a_dictionary_is_held_once(tmp_path):
    """3 GB of text from 1 MB: every value is the same string."""
    values = pyarrow.array([os.urandom(1 << 19).hex(), "b"])
    indices = pyarrow.array([0] * 3000 + [1], pyarrow.int32())
    path = write_parquet(tmp_path / "a.parquet",
                         pyarrow.DictionaryArray.from_arrays(indices, values), compression="none")
    code = (
        "import resource, sys; from preprocess.corpus import read_documents as read\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\n"
        "import pyarrow.parquet, pyarrow.compute; before = peak()\n"
        "print(sum(map(len, read([sys.argv[1]]))), peak() - before)"
    )
    made = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True,
                          check=True, cwd=Path(corpus.__file__).parents[2])
    characters, mib = map(int, made.stdout.split())
    assert characters == 3000 * (1 << 20) + 1 and mib < 64


# --------------------------------------------------------------------------- what is no file


def exit_of(main, capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        run_command(main)
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize("workers", ["1", "2"])
def test_no_permission(tmp_path, tiny_encoder, monkeypatch, capsys, workers):
    """Whoever runs the tests may be allowed to read anything, so opening itself is replaced."""
    path = tmp_path / "secret.txt"
    path.write_text("a good film\n")
    real = builtins.open

    def refuse(name, *arguments, **options):
        if str(name) == str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "open", refuse)
    code, said = exit_of(
        lambda: tokenize_corpus.main([
            "--input", str(path), "--tokenizer", tiny_encoder, "--output", str(tmp_path / "s"),
            "--num_workers", workers,
        ]), capsys,
    )
    assert code == 3 and said.endswith("secret.txt: Permission denied\n") and said.count("\n") == 1
    assert not list(tmp_path.glob("*s.*"))


def test_a_folder_a_pipe_and_a_device(tmp_path, tiny_encoder, capsys):
    os.mkfifo(tmp_path / "pipe")
    for name, complaint in ((tmp_path, "a folder; name the files in it"),
                            (tmp_path / "pipe", "a pipe or device"),
                            ("/dev/zero", "a pipe or device"),
                            (tmp_path / "absent", "no such file")):
        code, said = exit_of(
            lambda name=name: tokenize_corpus.main([
                "--input", str(name), "--tokenizer", tiny_encoder, "--output",
                str(tmp_path / "s"),
            ]), capsys,
        )
        assert code == 3 and f"{name}: {complaint}" in said and said.count("\n") == 1
