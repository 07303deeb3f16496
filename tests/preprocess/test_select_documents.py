"""Choosing documents: the command as a whole, its plain twin, leaks, reruns, and bad input."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from preprocess import select_documents, tokenize_corpus, train_tokenizer
from preprocess.corpus import describe_leakage, read_leakage, resampling, split_words
from preprocess.errors import ConfigError, DataError
from preprocess.store import TokenStore
from preprocess.text import encode
from preprocess.text.decode import Decoder
from preprocess.text.encode import prepare_backend
from tests.support.stores import read, tree

FILM = "film plot actor scene comedy drama director cast screen story".split()
TOOL = "drill battery charger handle motor warranty screw price garage blade".split()
PLAIN = "the a of is and it was with for this very not".split()
SECRET = "the most secret test text of all has these twelve words inside"


def sentence(random, words, length) -> str:
    return " ".join(random.choice(words if random.random() < 0.4 else PLAIN) for _ in range(length))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """corpus.txt: films and tools of all lengths, duplicates, leaks; like.csv, train/test.csv."""
    folder = tmp_path_factory.mktemp("select")
    random = np.random.default_rng(0)
    lines = []
    for i in range(400):
        lines.append(sentence(random, FILM if i % 4 == 0 else TOOL, int(2 ** random.uniform(2, 7))))
    lines[8] = lines[16] = lines[24] = lines[0]
    lines[50] = f"before. {SECRET.upper()}! after"
    lines[60] = " ".join(SECRET.split()[:8]) + " and so on"  # 8 of 12 words: half covered
    lines[70] = "x y " + " ".join(f"w{i}" for i in range(8))  # any 8-gram of a text of 20 words
    (folder / "corpus.txt").write_text("\n".join(lines) + "\n")
    tests = [SECRET, " ".join(f"w{i}" for i in range(20)), "good film", "never seen anywhere " * 4]
    trains = [sentence(random, FILM, 20) for _ in range(60)]
    for name, texts in (("train", trains), ("test", tests), ("like", [*trains, SECRET, ""])):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows([text, f"l{i % 2}"] for i, text in enumerate(texts))
    for kind in ("wordpiece", "bpe"):
        train_tokenizer.main(["--input", str(folder / "corpus.txt"), "--vocab_size", "400",
                              "--kind", kind, "--output", str(folder / kind)])
        for shards in (1, 3):
            tokenize_corpus.main([
                "--input", str(folder / "corpus.txt"), "--tokenizer", str(folder / kind),
                "--num_workers", "1", "--num_shards", str(shards),
                "--output", str(folder / f"{kind}-{shards}")])
    return folder


def select(files, store, *more) -> None:
    select_documents.main(["--tokens", str(files / store), *map(str, more)])


def like(files, number, output, *more) -> list:
    return ["--like", files / "like.csv", "--number", number, "--output", output, *more]


def task(files) -> list:
    return ["--task", "custom", "--train_file", files / "train.csv",
            "--test_file", files / "test.csv"]


def documents(prefix) -> list[list[list[int]]]:
    return [document for shard in TokenStore.open(prefix).shards for document in read(shard)]


def made_files(folder) -> dict[str, bytes]:
    """Without the memo of checks, which depends on the time."""
    return {name: data for name, data in tree(folder).items() if "memo" not in name}


def texts_of(prefix) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(TokenStore.open(prefix).tokenizer_dir)
    return [tokenizer.decode(sum(document, [])) for document in documents(prefix)]


@pytest.mark.parametrize("store", ["wordpiece-1", "bpe-3"])
def test_documents_like_the_texts_are_taken(files, tmp_path, store, capsys):
    select(files, store, *like(files, 60, tmp_path / "q"))
    said = capsys.readouterr().out
    before, after = documents(files / store), documents(tmp_path / "q")
    assert len(after) == 60 and "60 of 400 documents" in said
    numbers = [before.index(document) for document in after]  # of the first of equal ones
    assert numbers == sorted(set(numbers))
    assert sum(number % 4 == 0 for number in numbers) >= 54  # films are every fourth
    lengths = [[len(sum(document, [])) for document in some] for some in (before, after)]
    assert 0.7 < np.mean(lengths[1]) / np.mean(lengths[0]) < 1.4
    made, old = TokenStore.open(tmp_path / "q", verify=True), TokenStore.open(files / store)
    assert len(made.shards) == len(old.shards)
    assert "Documents by length" in said and "log weight" in said


def test_the_choice_is_that_of_a_plain_twin(files, tmp_path, monkeypatch):
    """Same weights, by dictionaries; the best of each octave, by sorting."""
    monkeypatch.setattr(select_documents, "BLOCK_DOCUMENTS", 37)
    monkeypatch.setattr(select_documents, "BLOCK_TOKENS", 500)
    select(files, "wordpiece-3", *like(files, 45, tmp_path / "q", "--seed", 5))
    before = documents(files / "wordpiece-3")
    reader = select_documents.Reader(TokenStore.open(files / "wordpiece-3"))

    def bags(texts):
        return [resampling.hash_grams([text])[0].tolist() for text in texts]

    with open(files / "like.csv") as file:
        rows = [row["text"] for row in csv.DictReader(file)]
    target, raw = np.zeros(resampling.BUCKETS), np.zeros(resampling.BUCKETS)
    for some in reader.through(rows):
        for bag in bags(some):
            for bucket in bag:
                target[bucket] += 1
    flat = [np.array(sum(document, []), np.uint16) for document in before]
    decoded = [reader._decoder.decode(ids, np.array([0, len(ids)]))[0] for ids in flat]
    for bag in bags(decoded):
        for bucket in bag:
            raw[bucket] += 1
    ratios = np.log((target + 1) / (target + 1).sum() + 1e-8) - np.log(raw / raw.sum() + 1e-8)
    octaves: dict[int, dict] = {}
    counts: dict[int, int] = {}
    for number, (ids, text, bag) in enumerate(zip(flat, decoded, bags(decoded), strict=True)):
        octave = int(np.log2(max(1, len(resampling._WORD.findall(text.lower())))))
        counts[octave] = counts.get(octave, 0) + 1
        digest = resampling.digest_ids(ids, 5)
        uniform = max(digest >> 11, 0.5) / 2**53
        key = sum(ratios[b] for b in bag) - np.log(-np.log(uniform))
        octaves.setdefault(octave, {}).setdefault(digest, (-key, number))
    keys = sorted(octaves)
    quotas = resampling.share_out(45, np.array([counts[k] for k in keys]),
                                  np.array([len(octaves[k]) for k in keys]))
    want = sorted(number for k, quota in zip(keys, quotas, strict=True)
                  for _, number in sorted(octaves[k].values())[:quota])
    assert documents(tmp_path / "q") == [before[number] for number in want]


def test_shards_and_blocks_do_not_change_the_choice(files, tmp_path, monkeypatch):
    select(files, "bpe-1", *like(files, 30, tmp_path / "a"))
    monkeypatch.setattr(select_documents, "BLOCK_DOCUMENTS", 7)
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 50)
    select(files, "bpe-3", *like(files, 30, tmp_path / "b"))
    select(files, "bpe-1", *like(files, 30, tmp_path / "c", "--seed", 1))
    assert documents(tmp_path / "a") == documents(tmp_path / "b") != documents(tmp_path / "c")


def test_more_than_there_are_takes_all_but_duplicates(files, tmp_path, capsys):
    select(files, "wordpiece-1", *like(files, 5000, tmp_path / "q"))
    before = documents(files / "wordpiece-1")
    assert documents(tmp_path / "q") == [
        document for i, document in enumerate(before) if document not in before[:i]]
    assert len(before) - len(documents(tmp_path / "q")) == 3
    assert "397 documents taken where 5,000" in capsys.readouterr().out


@pytest.mark.parametrize("store", ["wordpiece-3", "bpe-1"])
def test_test_texts_are_counted_and_dropped(files, tmp_path, store, capsys):
    prefix = str(files / store)
    select(files, store, *task(files))
    line = (f"leakage: of 4 test texts of {files.name}, the text holds 1 complete, 1 half covered "
            "by one document, 2 with any 8 words in order")
    said = capsys.readouterr().out
    assert line in said and "2 of 400 documents hold them" in said and "--drop_leaked" in said
    assert describe_leakage(prefix) == line
    select(files, store, *task(files))  # the count is kept
    assert line in capsys.readouterr().out

    select(files, store, *task(files), "--drop_leaked", "--output", tmp_path / "q")
    before = documents(prefix)
    assert documents(tmp_path / "q") == [d for i, d in enumerate(before) if i not in (50, 60)]
    assert describe_leakage(str(tmp_path / "q")) == (
        f"leakage: of 4 test texts of {files.name}, the text holds 0 complete, 0 half covered by "
        "one document, 1 with any 8 words in order; 2 documents were dropped")
    record = json.loads(Path(f"{prefix}.leakage.json").read_text())
    assert record["documents_dropped"] == 0 and record["documents_leaked"] == 2
    os.remove(f"{prefix}.leakage.json")


def test_test_texts_never_get_into_the_target(files, tmp_path, capsys):
    select(files, "bpe-1", *like(files, 100, tmp_path / "q"), *task(files), "--drop_leaked")
    said = capsys.readouterr().out
    assert f"1 of 61 texts hold a test text of {files.name} and are left out, such as" in said
    assert SECRET in said and "60 texts" in said
    assert not any(split_words(SECRET)[3:] == split_words(text)[-9:]
                   for text in texts_of(tmp_path / "q"))
    only = tmp_path / "only.txt"
    only.write_text(SECRET + "\n")
    with pytest.raises(DataError, match=f"no text but test texts of {files.name}"):
        select(files, "bpe-1", "--like", only, "--number", 5, "--output", tmp_path / "r",
               *task(files))


def test_a_rerun_is_skipped_and_other_options_are_refused(files, tmp_path, capsys):
    folder = tmp_path / "a"
    folder.mkdir()
    arguments = [*like(files, 20, folder / "q"), *task(files), "--drop_leaked"]
    select(files, "bpe-3", *arguments)
    before = made_files(folder)
    os.remove(f"{folder}/q.leakage.json")
    select(files, "bpe-3", *arguments)
    assert made_files(folder) == before and "complete, made with" in capsys.readouterr().out
    select(folder, "q", *task(files)[:-1], files / "like.csv")  # the count of another task
    select(files, "bpe-3", *arguments)
    assert made_files(folder) == before
    os.remove(f"{folder}/q-00001-of-00003.json")  # as if it had been killed
    os.remove(f"{folder}/q.json")
    select(files, "bpe-3", *arguments)
    assert made_files(folder) == before
    with pytest.raises(ConfigError, match="made with --number 20, and this run has 21"):
        select(files, "bpe-3", *like(files, 21, folder / "q"), *task(files), "--drop_leaked")
    with pytest.raises(ConfigError, match="a token store of another command"):
        select(files, "bpe-3", *like(files, 20, files / "bpe-1"))
    select(files, "bpe-3", *like(files, 21, folder / "q", "--overwrite"))
    assert read_leakage(f"{folder}/q") is None  # that of the store before
    assert TokenStore.open(folder / "q").num_documents == 21


@pytest.mark.parametrize(("arguments", "message"), [
    ("", "nothing to do"),
    ("--like {f}/like.csv --output q", "--like needs --number N"),
    ("--like {f}/like.csv --number 5", "and --output Q"),
    ("--like {f}/like.csv --number 0 --output q", "--number 0: must be at least 1"),
    ("--number 5 --task mr --data_dir d", "needs --like F"),
    ("--like {f}/like.csv --number 5 --output {f}/bpe-1", "is the store of --tokens"),
    ("--like {f}/like.csv --number 5 --output {f}/../{n}/bpe-1", "is the store of --tokens"),
    ("--like {f}/like.csv --number 5 --output q --drop_leaked", "--drop_leaked needs --task"),
    ("--task mr --data_dir d --output q", "nothing says which documents"),
    ("--like {f}/like.csv --number 5 --output q --test_file t.csv", "needs --task TASK"),
    ("--task custom --train_file t.csv", "needs --test_file"),
    ("--like {f}/like.csv --number 5 --output q/", "give a prefix"),
])
def test_bad_options_are_refused(files, arguments, message):
    words = arguments.format(f=files, n=files.name).split()
    with pytest.raises(ConfigError, match=message):
        select(files, "bpe-1", *words)


def test_bad_data_is_refused(files, tmp_path):
    out = ["--number", 5, "--output", tmp_path / "q"]
    with pytest.raises(DataError, match="no column 'review'; columns are 'text', 'label'"):
        select(files, "bpe-1", "--like", files / "like.csv", "--text_column", "review", *out)
    with pytest.raises(DataError, match="no such file"):
        select(files, "bpe-1", "--like", tmp_path / "absent.txt", *out)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="no text in it"):
        select(files, "bpe-1", "--like", tmp_path / "empty.txt", *out)
    with pytest.raises(DataError, match="no complete token store here"):
        select(files, "absent", "--like", files / "like.csv", *out)
    old = json.loads((files / "bpe-1.json").read_text())
    for ending in ("bin", "idx"):
        os.link(files / f"bpe-1.{ending}", tmp_path / f"old.{ending}")
    (tmp_path / "old.json").write_text(json.dumps({**old, "format_version": 1}))
    with pytest.raises(DataError, match="format version 1"):
        select_documents.main(["--tokens", str(tmp_path / "old"), "--like",
                               str(files / "like.csv"), *map(str, out)])
    assert not (tmp_path / "q.json").exists()


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_decoding_by_table_is_that_of_the_library(files, kind):
    """WordPiece's decoder also closes spaces before marks, which no comparison sees."""
    tokenizer = AutoTokenizer.from_pretrained(files / kind)
    backend = prepare_backend(tokenizer)
    texts = ["The film, isn't it? \u65e5\u672c caf\u00e9 \U0001f600 x", "a", "drill\n battery  2.5",
             "unaffable blades", "\u00e9"]
    runs = [backend.encode(text, add_special_tokens=False).ids for text in texts]
    starts = np.cumsum([0, *map(len, runs)])
    made = Decoder(backend).decode(np.array(sum(runs, []), np.uint16), starts)
    library = backend.decode_batch(runs, skip_special_tokens=False)
    if kind == "bpe":
        assert made == library
    assert [split_words(text) for text in made] == [split_words(text) for text in library]
