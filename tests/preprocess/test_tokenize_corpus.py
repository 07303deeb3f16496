"""Tokenizing: ids do not depend on cutting, workers or shards; reruns; adoption; vocabularies."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from preprocess import tokenize_corpus, train_tokenizer
from preprocess.errors import ConfigError, DataError
from preprocess.files import seal
from preprocess.store import TokenStore
from preprocess.text.encode import cut_sentences, encode_batch, prepare_backend
from tests.support.stores import foreign, tree

LINES = [
    "The first film was good. Mr. Smith is not warm! Is he?",
    "[SEP] one  [MASK] plot <s> too.",
    "",
    "   ",
    "Caf\u00e9 ends.\u3000\u65e5\u672c\u3002 It is fine \u2026 and slow",
    "dull",
] * 40


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory, corpus_file) -> dict[str, str]:
    """A learnt vocabulary of each kind."""
    folder = tmp_path_factory.mktemp("vocabularies")
    made = {}
    for kind in train_tokenizer.KINDS:
        made[kind] = str(folder / kind)
        command = ["--input", corpus_file, "--vocab_size", "320", "--kind", kind]
        train_tokenizer.main([*command, "--output", made[kind]])
    return made


def tokenize(corpus_file, tokenizer, prefix, *more) -> TokenStore:
    command = ["--input", corpus_file, "--tokenizer", tokenizer, "--output", str(prefix)]
    tokenize_corpus.main([*command, "--num_workers", "1", *map(str, more)])
    return TokenStore.open(prefix, verify=True)


def stream(store: TokenStore) -> list[int]:
    return np.concatenate([shard.tokens for shard in store.shards]).tolist()


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_ids_do_not_depend_on_the_cutting(tmp_path, corpus_file, tokenizers, kind):
    cut = tokenize(corpus_file, tokenizers[kind], tmp_path / "cut")
    whole = tokenize(corpus_file, tokenizers[kind], tmp_path / "whole", "--no-split_sentences")
    assert stream(cut) == stream(whole)
    assert whole.num_sequences == whole.num_documents == cut.num_documents == 160
    assert cut.num_sequences == 40 * (3 + 1 + 3 + 1)
    assert cut.info["counts"]["documents_dropped"] == 80
    tokenizer = AutoTokenizer.from_pretrained(cut.tokenizer_dir)
    alone = tokenizer(LINES[0], add_special_tokens=False)["input_ids"]
    first = cut.shards[0]
    assert first.tokens[: first.sequence_offsets[first.document_offsets[1]]].tolist() == alone
    sentences = [
        tokenizer.decode(first.tokens[a:b].tolist()).strip().lower()
        for a, b in zip(first.sequence_offsets[:3], first.sequence_offsets[1:4], strict=True)
    ]
    assert [s.replace(" ", "") for s in sentences] == [
        "thefirstfilmwasgood.", "mr.smithisnotwarm!", "ishe?",
    ]


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_special_tokens_written_in_a_text_are_text(tmp_path, corpus_file, tokenizers, kind):
    store = tokenize(corpus_file, tokenizers[kind], tmp_path / "s")
    special = set(store.all_special_ids) - {store.special_ids["unk"]}
    assert len(special) == 4 and not special & set(stream(store))
    assert set(store.special_ids) == {"cls", "sep", "pad", "mask", "unk"}


@settings(max_examples=60, deadline=None)
@given(st.text("abc. !?\n\t\u3000\u3002\u00e9\u0130\U0001f600'\"", max_size=40))
def test_sentences_partition_the_tokens(backends, text):
    for backend in backends:
        whole = backend.encode(text, add_special_tokens=False)
        lengths = cut_sentences(text, whole.offsets, "en") if whole.ids else []
        assert sum(lengths) == len(whole.ids) and all(lengths)
        ids, sequences, documents, dropped = encode_batch(backend, [text, "a. b"], "en")
        assert sequences.sum() == len(ids) and documents.sum() == len(sequences)
        assert len(documents) + dropped == 2


@pytest.fixture(scope="module")
def backends(tokenizers):
    return [
        prepare_backend(tokenize_corpus.load_fast_tokenizer(path)) for path in tokenizers.values()
    ]


@pytest.mark.parametrize("num_shards", [1, 3])
def test_bytes_do_not_depend_on_the_workers(tmp_path, corpus_file, tokenizers, num_shards):
    made = []
    for workers in (1, 2, 4):
        prefix = tmp_path / str(workers) / "s"
        more = ["--num_workers", workers, "--num_shards", num_shards]
        tokenize(corpus_file, tokenizers["bpe"], prefix, *more)
        made.append(tree(prefix.parent))
    assert made[0] == made[1] == made[2]


def test_shards_made_one_by_one_and_all_together(tmp_path, corpus_file, tokenizers, capsys):
    whole = tokenize(corpus_file, tokenizers["bpe"], tmp_path / "whole" / "s")
    together = tokenize(corpus_file, tokenizers["bpe"], tmp_path / "a" / "s", "--num_shards", 3)
    command = ["--input", corpus_file, "--tokenizer", tokenizers["bpe"], "--num_shards", "3"]
    command += ["--output", str(tmp_path / "b" / "s"), "--num_workers", "1"]
    for index, workers in ((2, "1"), (0, "2")):
        tokenize_corpus.main([*command, "--shard_index", str(index), "--num_workers", workers])
        assert not (tmp_path / "b" / "s.json").exists()
    assert "not written yet" in capsys.readouterr().out
    tokenize_corpus.main([*command, "--shard_index", "1"])
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert stream(together) == stream(whole)
    assert together.num_documents == whole.num_documents


def test_empty_shards(tmp_path, tokenizers):
    (tmp_path / "one.txt").write_text("a single line\n")
    more = ["--num_shards", 4]
    store = tokenize(str(tmp_path / "one.txt"), tokenizers["bpe"], tmp_path / "s", *more)
    assert store.num_documents == 1 and [s.num_tokens for s in store.shards].count(0) == 3


def test_rerun_skips_refuses_and_replaces(tmp_path, corpus_file, tokenizers, capsys):
    prefix = tmp_path / "s"
    tokenize(corpus_file, tokenizers["bpe"], prefix, "--num_shards", 2)
    os.remove(f"{prefix}-00001-of-00002.json")
    before = Path(f"{prefix}-00000-of-00002.bin").stat().st_mtime_ns
    capsys.readouterr()
    tokenize(corpus_file, tokenizers["bpe"], prefix, "--num_shards", 2, "--overwrite")
    assert Path(f"{prefix}-00000-of-00002.bin").stat().st_mtime_ns != before
    tokenize(corpus_file, tokenizers["bpe"], prefix, "--num_shards", 2)
    assert capsys.readouterr().out.count("complete already, skipped") == 2
    for kind, more, match in (
        ("bpe", ["--no-split_sentences"], "split_sentences was True, is False.*--overwrite"),
        ("bpe", ["--num_shards", 4, "--shard_index", 3], "num_shards was 2, is 4"),
        ("wordpiece", [], "the tokenizer was"),
    ):
        with pytest.raises(ConfigError, match=match):
            tokenize(corpus_file, tokenizers[kind], prefix, "--num_shards", 2, *more)
    os.remove(f"{prefix}.json")  # a run that died between the last shard and the list
    tokenize(corpus_file, tokenizers["bpe"], prefix, "--num_shards", 2)


def test_only_unfinished_shards_are_made_again(tmp_path, corpus_file, tokenizers):
    """A killed run has left some shards complete, and of others anything but the JSON."""
    prefix = tmp_path / "s"
    tokenize(corpus_file, tokenizers["bpe"], prefix, "--num_shards", 3)
    before = tree(prefix.parent)

    def made() -> dict[str, int]:
        return {p.name: p.stat().st_ino for p in tmp_path.glob("s-*.bin")}

    first = made()
    os.remove(f"{prefix}.json")
    os.remove(f"{prefix}-00001-of-00003.json")
    os.truncate(f"{prefix}-00001-of-00003.bin", 10)
    Path(f"{prefix}-00001-of-00003.lock").write_text(f"1@{socket.gethostname()}")
    tokenize(corpus_file, tokenizers["bpe"], prefix, "--num_shards", 3, "--num_workers", 2)
    assert tree(prefix.parent) == before
    again = made()
    assert {name for name in first if first[name] != again[name]} == {"s-00001-of-00003.bin"}


def test_rows_of_a_table(tmp_path, tokenizers):
    path = tmp_path / "a.csv"
    path.write_text('body,source\n"two\nlines",x\nother,y\nthird,x\n')
    more = ["--text_column", "body", "--where", "source=x", "--max_documents", "1"]
    assert tokenize(str(path), tokenizers["bpe"], tmp_path / "s", *more).num_documents == 1


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("shards", ["1", "2"])
def test_broken_input_leaves_no_store(tmp_path, tokenizers, workers, shards):
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\n" * 300 + b"\xff\n")
    with pytest.raises(DataError, match=r"a\.txt, line 301"):
        more = ["--num_workers", workers, "--num_shards", shards]
        tokenize(str(path), tokenizers["bpe"], tmp_path / "s", *more)
    names = {p.name for p in tmp_path.glob("s*")}
    assert "s.json" not in names and not any(n.endswith((".lock", ".tmp")) for n in names)


@pytest.mark.parametrize(
    ("command", "more", "error", "match"),
    [
        (tokenize_corpus, ["--num_workers", "0"], ConfigError, "num_workers 0"),
        (tokenize_corpus, ["--shard_index", "2", "--num_shards", "2"], ConfigError,
         "shard_index 2"),
        (tokenize_corpus, ["--where", "nonsense"], ConfigError, "COLUMN=VALUE"),
        (tokenize_corpus, ["--output", "x.bin"], ConfigError, "prefix"),
        (tokenize_corpus, ["--tokenizer", "absent"], DataError, "absent: cannot be loaded"),
        (tokenize_corpus, ["--text_column", "body"], DataError, "no column 'body'"),
        (train_tokenizer, ["--vocab_size", "65537"], ConfigError, "65,536"),
        (train_tokenizer, ["--vocab_size", "100", "--kind", "bpe"], ConfigError, "alone need 261"),
        (train_tokenizer, ["--kind", "bpe", "--lowercase"], ConfigError, "--lowercase"),
        (train_tokenizer, ["--output", "."], DataError, "exists; give another"),
        (train_tokenizer, ["--input", "absent.txt"], DataError, "absent.txt"),
    ],
)
def test_wrong_options(tmp_path, corpus_file, tokenizers, monkeypatch, command, more, error, match):
    monkeypatch.chdir(tmp_path)
    flags = {
        tokenize_corpus: ["--tokenizer", tokenizers["bpe"], "--num_workers", "1"],
        train_tokenizer: ["--vocab_size", "320"],
    }[command]
    with pytest.raises(error, match=match):
        command.main(["--input", corpus_file, "--output", "s", *flags, *more])
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------- adoption


@pytest.mark.parametrize("code", [8, 4])
@pytest.mark.parametrize("in_place", [True, False])
def test_adoption(tmp_path, tokenizers, monkeypatch, code, in_place):
    monkeypatch.setattr(tokenize_corpus, "MAX_ADOPTED_LENGTH", 4)
    source = str(tmp_path / "made")
    # ids 0 to 4 are special; 3 is <unk>, which may occur
    foreign(source, [[0, 50, 51, 2], [60, 61, 62, 63, 3, 65], [0, 2]], [0, 2, 3], code)
    output = source if in_place else str(tmp_path / "ours")
    with pytest.raises(DataError, match="--adopt"):
        TokenStore.open(source)
    command = ["--adopt", "--tokenizer", tokenizers["bpe"], "--output", output]
    tokenize_corpus.main(command if in_place else [*command, "--input", source])
    store = TokenStore.open(output, verify=True)
    shard = store.shards[0]
    assert shard.tokens.tolist() == [50, 51, 60, 61, 62, 63, 3, 65]
    assert shard.sequence_offsets[:].tolist() == [0, 2, 6, 8]
    assert shard.document_offsets[:].tolist() == [0, 3]
    counts = store.info["counts"]
    assert counts["special_ids_stripped"] == 4 and counts["sequences_cut"] == 1
    assert counts["documents_dropped"] == 1


def test_adoption_refuses_what_it_cannot_read(tmp_path, tokenizers):
    prefix = str(tmp_path / "made")
    command = ["--adopt", "--tokenizer", tokenizers["bpe"], "--output", prefix]
    foreign(prefix, [[50, 60000]], [0, 1])
    for data, match in ((None, "token id 60000.*0 to 319"), (b"", "")):
        if data is not None:
            Path(prefix + ".bin").write_bytes(data)
        before = tree(tmp_path)
        with pytest.raises(DataError, match=f"made.bin.*{match}"):
            tokenize_corpus.main(command)
        assert tree(tmp_path) == before
    os.remove(prefix + ".idx")
    with pytest.raises(DataError, match="made.idx: no such file"):
        tokenize_corpus.main(command)


# --------------------------------------------------------------------------- vocabularies


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_learnt_vocabulary_loads_and_is_the_same_every_time(
    tmp_path, corpus_file, tokenizers, kind
):
    tokenizer = AutoTokenizer.from_pretrained(tokenizers[kind])
    assert tokenizer.is_fast and len(tokenizer) <= 320
    for name in ("cls", "sep", "pad", "mask", "unk"):
        assert getattr(tokenizer, f"{name}_token_id") in range(5)
    ids = tokenizer("good film")["input_ids"]
    assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id
    assert tokenizer.decode(ids[1:-1]).strip() == "good film"
    command = ["--input", corpus_file, "--vocab_size", "320", "--kind", kind]
    script = f"from preprocess import train_tokenizer as t; t.main({command!r} + ['--output', 'n'])"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)  # other hash seeds
    for path in Path(tokenizers[kind]).iterdir():
        assert (tmp_path / "n" / path.name).read_bytes() == path.read_bytes()


def test_lowercase_is_an_option_of_wordpiece(tmp_path, corpus_file):
    train_tokenizer.main(["--input", corpus_file, "--vocab_size", "320", "--no-lowercase",
                          "--output", str(tmp_path / "cased")])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "cased")
    assert "Smith" in tokenizer.decode(tokenizer("Mr. Smith")["input_ids"])


def test_a_vocabulary_of_the_first_documents(tmp_path):
    (tmp_path / "text").write_text("abba\nzebra\n")
    train_tokenizer.main(["--input", str(tmp_path / "text"), "--max_documents", "1",
                          "--vocab_size", "20", "--output", str(tmp_path / "v")])
    tokens = json.loads((tmp_path / "v" / "tokenizer.json").read_text())["model"]["vocab"]
    assert "abba" in tokens and "z" not in tokens




# --------------------------------------------------------------------------- as commands


def test_help_imports_nothing_heavy():
    for name in ("tokenize_corpus", "train_tokenizer"):
        script = (
            f"import sys\nfrom preprocess import {name} as command\n"
            "try: command.main(['--help'])\nexcept SystemExit: pass\n"
            "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'tokenizers'}\n"
            "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


# ------------------------------------------------------------------------------- HTML, inputs


def test_html_is_named_and_removed(tmp_path, tokenizers, capsys):
    pages = ["Good<br />film &amp; plot.", "no tags, a < b", "<p></p>", "it <b>ends</b>"] * 50
    plain = ["Good\\nfilm & plot.", "no tags, a < b", "", "it ends"] * 50
    for name, lines in (("pages", pages), ("plain", plain)):
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n")
    source = str(tmp_path / "pages.txt")
    tokenize(source, tokenizers["bpe"], tmp_path / "kept" / "s")
    said = capsys.readouterr().out
    assert "warning: HTML in 150 of 200 documents (75.0%), such as <br />; " in said
    assert "--strip_html --overwrite" in said
    with pytest.raises(ConfigError, match="strip_html was None, is True|was False, is True"):
        tokenize(source, tokenizers["bpe"], tmp_path / "kept" / "s", "--strip_html")
    made = []
    for workers, shards in ((1, 1), (3, 1), (1, 2), (3, 2)):
        prefix = tmp_path / f"{workers}-{shards}" / "s"
        store = tokenize(source, tokenizers["bpe"], prefix, "--strip_html", "--num_shards", shards,
                         "--num_workers", workers)
        assert store.info["counts"]["documents_with_html"] == 150
        assert store.info["counts"]["documents_dropped"] == 50
        made.append(tree(prefix.parent))
    assert made[0] == made[1] and made[2] == made[3]
    assert "HTML removed from 150 of 200 documents (75.0%), such as <br />" in (
        capsys.readouterr().out)
    want = tokenize(str(tmp_path / "plain.txt"), tokenizers["bpe"], tmp_path / "plain" / "s",
                    "--unescape_newlines")
    assert stream(want) == stream(store)
    assert "HTML" not in capsys.readouterr().out


def edit(path: Path, at: int) -> None:
    """Change one letter, and neither the size nor the time of the file."""
    data, status = bytearray(path.read_bytes()), path.stat()
    data[at] = ord("z") if data[at] != ord("z") else ord("y")
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("num_shards", [1, 3])
def test_an_input_edited_to_the_same_size_is_noticed(tmp_path, tokenizers, num_shards, capsys):
    source = tmp_path / "c.txt"
    source.write_text("\n".join(f"line {i} with words" for i in range(300)) + "\n")
    more = ["--num_shards", num_shards]
    tokenize(str(source), tokenizers["bpe"], tmp_path / "s", *more)
    tokenize(str(source), tokenizers["bpe"], tmp_path / "s", *more)
    assert capsys.readouterr().out.count("complete already") == num_shards
    for at in (0, 3001, source.stat().st_size - 2):
        edit(source, at)
        with pytest.raises(ConfigError, match=r"c\.txt holds other text now.*--overwrite"):
            tokenize(str(source), tokenizers["bpe"], tmp_path / "s", *more)
        before = source.read_bytes()
        tokenize(str(source), tokenizers["bpe"], tmp_path / "s", *more, "--overwrite")
        assert source.read_bytes() == before


def test_the_end_of_a_line_belongs_to_the_shard_of_its_beginning(tmp_path, tokenizers):
    source = tmp_path / "c.txt"
    source.write_text("a" + " word" * 100 + "\n" + "b\n")
    more = ["--num_shards", 2]
    store = tokenize(str(source), tokenizers["bpe"], tmp_path / "s", *more)
    assert [shard.num_documents for shard in store.shards] == [1, 1]
    edit(source, 499)  # in the second half of the bytes, in the line of the first shard
    with pytest.raises(ConfigError, match="00000-of-00002.*holds other text"):
        tokenize(str(source), tokenizers["bpe"], tmp_path / "s", *more, "--shard_index", 0)


def test_a_store_of_an_earlier_version_is_still_complete(tmp_path, corpus_file, tokenizers, capsys):
    """Its JSON knows neither `strip_html` nor what its input held."""
    prefix = tmp_path / "s"
    tokenize(corpus_file, tokenizers["bpe"], prefix)
    path = Path(f"{prefix}.json")
    info = json.loads(path.read_text())
    del info["options"]["strip_html"], info["notes"], info["counts"]["documents_with_html"]
    path.write_text(json.dumps(seal(info)))
    tokenize(corpus_file, tokenizers["bpe"], prefix)
    assert "complete already" in capsys.readouterr().out
