"""`--dry_run` of the commands that prepare data: they check, say what they would do, and end."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from preprocess.errors import ConfigError, DataError
from preprocess.store import TokenStore, write_array
from tests.support.stores import MEASURED


@pytest.fixture
def words(tmp_path, reviews_store, reviews_file, labelled_files, tiny_encoder) -> dict[str, str]:
    """What stands for P, F, T and so on in the commands below."""
    folder = shutil.copytree(Path(reviews_store).parent, tmp_path / "store")
    prefix = str(folder / Path(reviews_store).name)
    for shard in TokenStore.open(prefix).shards:
        scores = np.ones(shard.num_tokens, np.float16)
        write_array(shard, "mr", "scores", scores, MEASURED)
    return {"P": prefix, "F": reviews_file, "T": tiny_encoder, "O": str(tmp_path / "made"),
            "TRAIN": labelled_files["train"], "TEST": labelled_files["test"]}


COMMANDS = {
    "train_tokenizer --input F --vocab_size 90 --output O":
        "made: wordpiece of at most 90 ids, to be learnt",
    "tokenize_corpus --input F --tokenizer T --output O": "made: 1 of 1 shards to be made",
    "tokenize_corpus --input F --tokenizer T --output O --num_shards 3 --shard_index 1":
        "made: 1 of 3 shards to be made",
    "tokenize_corpus --adopt --input P --tokenizer T --output O": "made: to be made of ",
    "score_words --tokens P --measure tfidf --name new": "0 of 1 shards are scored already",
    "build_masks --tokens P --strategy selective --scores mr --name new":
        "1 of 1 indices to be made; selective: ",
    "build_masks --tokens P --strategy sampled --scores mr --name new --epochs 3":
        "3 of 3 indices to be made",
    "select_documents --tokens P --like F --number 5 --output O":
        "120 documents to look through, for ",
    "select_documents --tokens P --task custom --train_file TRAIN --test_file TEST":
        "120 documents to look through",
}


def start(command: str, words: dict[str, str], *more: str) -> None:
    name, *flags = command.split()
    module = importlib.import_module(f"preprocess.{name}")
    module.main([*(words.get(flag, flag) for flag in flags), *more])


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size)
            for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_dry_run_says_what_it_would_do_and_writes_nothing(command, words, tmp_path, capsys):
    before = files(tmp_path)
    start(command, words, "--dry_run")
    assert files(tmp_path) == before
    assert COMMANDS[command] in capsys.readouterr().out


def test_a_dry_run_says_what_is_finished(words, tmp_path, capsys):
    command = "build_masks --tokens P --strategy selective --scores mr --name new"
    start(command, words)
    before = files(tmp_path)
    start(command, words, "--dry_run")
    out = capsys.readouterr().out
    assert "complete, made with the same options" in out and "0 of 1 indices to be made" in out
    assert files(tmp_path) == before


@pytest.mark.parametrize(("command", "error", "message"), [
    ("train_tokenizer --input absent.txt --vocab_size 90 --output O", DataError, "absent.txt"),
    ("train_tokenizer --input TRAIN --text_column body --vocab_size 90 --output O", DataError,
     "no column 'body'"),
    ("tokenize_corpus --input TRAIN --text_column body --tokenizer T --output O", DataError,
     "no column 'body'"),
    ("tokenize_corpus --input F --tokenizer T --output P --no-split_sentences", ConfigError,
     "other options"),
    ("tokenize_corpus --adopt --input F --tokenizer T --output O", DataError, "no such file"),
    ("score_words --tokens P --measure lexicon --lexicon absent.csv --name new", DataError,
     "absent.csv"),
    ("build_masks --tokens P --strategy selective --scores other --name new", DataError, "other"),
    ("select_documents --tokens P --like absent.txt --number 5 --output O", DataError,
     "absent.txt"),
])
def test_a_dry_run_refuses_what_the_run_would(command, error, message, words):
    with pytest.raises(error, match=message):
        start(command, words, "--dry_run")
