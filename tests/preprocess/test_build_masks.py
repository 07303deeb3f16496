"""The command that stores mask indices: shards, blocks, reruns, refusals, statistics."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocess import build_masks
from preprocess.build_masks import main
from preprocess.errors import ConfigError, DataError
from preprocess.masking import (
    ARRAY_NEEDS,
    STRATEGIES,
    Sequences,
    StrategyInputs,
    choose_positions,
    find_candidates,
)
from preprocess.store import (
    TokenStore,
    array_path,
    iterate_blocks,
    lock_array,
    open_array,
    write_array,
)
from preprocess.text.continuations import continuation_table, find_continuations
from tests.support.stores import write

ALL = sorted(STRATEGIES)
ARRAYS = {"scores": "mr", "match": "sel"}  # by need: what the fixtures put beside their stores
OPTIONS = {name: [word for need in sorted(one.needs & ARRAYS.keys())
                  for word in (f"--{need}", ARRAYS[need])] for name, one in STRATEGIES.items()}
READERS = [name for name in ALL if OPTIONS[name]]
ROOT = Path(build_masks.__file__).parents[1]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *(f"w{i}" for i in range(60)), *(f"##x{i}" for i in range(20))]
    inner = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def make_documents() -> list[list[np.ndarray]]:
    """60 documents of 0 to 5 sequences of 0 to 30 tokens; id 1 is [UNK], a special token."""
    rng = np.random.default_rng(3)
    return [
        [
            rng.choice([1, *range(5, 85)], size=rng.integers(0, 31)).astype(np.uint16)
            for _ in range(rng.integers(0, 6))
        ]
        for _ in range(60)
    ]


def write_store(prefix: Path, tokenizer, *cuts: int) -> str:
    """Write the documents, cut into shards before the documents `cuts`, with scores and an index.
    """
    documents = make_documents()
    edges = [0, *cuts, len(documents)]
    for i, (first, end) in enumerate(zip(edges, edges[1:], strict=False)):
        shard = (i, len(edges) - 1) if cuts else None
        write(prefix, documents[first:end], shard, tokenizer)
    add_scores(str(prefix))
    build(str(prefix), "selective", "sel", "--scores", "mr")
    return str(prefix)


def add_scores(prefix: str, name: str = "mr", seed: int = 0) -> np.ndarray:
    store = TokenStore.open(prefix)
    scores = np.random.default_rng(seed).normal(-0.5, 1, store.num_tokens).astype(np.float16)
    for shard in store.shards:
        part = scores[shard.token_start : shard.token_start + shard.num_tokens]
        write_array(shard, name, "scores", part, {})
    return scores


def build(prefix: str, strategy: str, name: str, *more: str) -> None:
    main(["--tokens", prefix, "--strategy", strategy, "--name", name, *more])


def read_index(prefix: str, name: str) -> np.ndarray:
    """All positions of an index, in the token stream of the whole store."""
    shards = TokenStore.open(prefix).shards
    return np.concatenate(
        [open_array(s, name, "mask")[0].astype(np.int64) + s.token_start for s in shards]
    )


@pytest.fixture
def single(tmp_path, tokenizer):
    return write_store(tmp_path / "one", tokenizer)


@pytest.fixture
def sharded(tmp_path, tokenizer):
    return write_store(tmp_path / "many", tokenizer, 10, 10, 45)  # the second shard is empty


# ------------------------------------------------------------------------------------ results


@pytest.mark.parametrize("name", ALL)
def test_index_equals_the_strategy_on_the_whole_store(name, single, tokenizer):
    build(single, name, "out", *OPTIONS[name], "--seed", "5", "--mlm_probability", "0.2")
    shard = TokenStore.open(single).shards[0]
    tokens, offsets = np.array(shard.tokens), shard.sequence_offsets
    matched = np.array(open_array(shard, "sel", "mask")[0])
    owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    matched_counts = np.bincount(owner[matched], minlength=len(offsets) - 1)
    expected = STRATEGIES[name].choose(
        Sequences(
            offsets=offsets,
            positions=np.arange(len(tokens)),
            candidates=find_candidates(tokens, tokenizer.all_special_ids),
            rate=0.2,
            seed=5,
            epoch=0,
            scores=np.array(open_array(shard, "mr", "scores")[0]),
            continues_word=find_continuations(tokens, offsets, continuation_table(tokenizer)),
            matched_counts=matched_counts,
        )
    )
    found, info = open_array(shard, "out", "mask")
    assert found.dtype == np.uint32
    assert len(found) > 50 and found.tolist() == expected.tolist()
    assert info["options"]["strategy"] == name


@pytest.mark.parametrize("name", ALL)
def test_mask_of_a_shard_is_its_own_and_none_is_empty(name, single, sharded):
    """Published bugs B1, B2: merged shards held copies of one row, and rows without a mask."""
    for prefix in (single, sharded):
        build(prefix, name, "out", *OPTIONS[name])
    store = TokenStore.open(sharded)
    assert [s.num_tokens > 0 for s in store.shards] == [True, False, True, True]
    # The same documents in one piece and in four shards: the same tokens of the same documents.
    assert read_index(sharded, "out").tolist() == read_index(single, "out").tolist()
    for shard in store.shards:
        index = open_array(shard, "out", "mask")[0]
        assert (len(index) > 0) == (shard.num_tokens > 0)
        ids = shard.tokens[index.astype(np.int64)]
        assert find_candidates(ids, store.all_special_ids).all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("block_tokens", [1, 40, 333])
def test_blocks_do_not_change_the_result(name, block_tokens, sharded, tokenizer):
    store = TokenStore.open(sharded)
    shard = store.shards[2]
    inputs = StrategyInputs(
        scores=open_array(shard, "mr", "scores")[0],
        match=open_array(shard, "sel", "mask")[0],
        words=continuation_table(tokenizer),
    )
    results = []
    for size in (block_tokens, 1 << 20):
        blocks = choose_positions(
            shard,
            name,
            inputs,
            rate=0.15,
            seed=1,
            all_special_ids=store.all_special_ids,
            block_tokens=size,
        )
        results.append(np.concatenate(list(blocks)).tolist())
    assert results[0] == results[1] and len(results[0]) > 20


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 25))
def test_blocks_cover_every_sequence_once_within_the_limit(lengths, limit):
    offsets = np.cumsum([0, *lengths])
    blocks = list(iterate_blocks(offsets, limit))
    assert [i for b in blocks for i in range(b.start, b.stop)] == list(range(len(lengths)))
    for block in blocks:
        size = offsets[block.stop] - offsets[block.start]
        assert size <= limit or block.stop == block.start + 1
    for block, after in zip(blocks, blocks[1:], strict=False):  # one more would not fit
        assert offsets[after.start + 1] - offsets[block.start] > limit


# ------------------------------------------------------------------------------------- reruns


def stamp(prefix: str, name: str) -> list[int]:
    shards = TokenStore.open(prefix).shards
    return [array_path(s, name, "mask").stat().st_mtime_ns for s in shards]


def test_one_missing_shard_is_made_and_the_others_are_kept(sharded):
    before, expected = stamp(sharded, "sel"), read_index(sharded, "sel").tolist()
    path = array_path(TokenStore.open(sharded).shards[2], "sel", "mask")
    path.with_suffix(".json").unlink()
    build(sharded, "selective", "sel", "--scores", "mr")
    after = stamp(sharded, "sel")
    assert [a == b for a, b in zip(after, before, strict=True)] == [True, True, False, True]
    assert read_index(sharded, "sel").tolist() == expected


SHARDS = ["--num_shards", "4", "--shard_index"]


def test_shards_are_made_one_by_one(sharded, capsys):
    expected = read_index(sharded, "sel").tolist()
    store, command = TokenStore.open(sharded), ["selective", "new", "--scores", "mr"]
    paths = [array_path(shard, "new", "mask") for shard in store.shards]
    # While another process makes shard 3, all others can be made, in any order.
    with lock_array(store, "new", "mask", 3):
        for done, index in enumerate((2, 0, 1), 1):
            capsys.readouterr()
            build(sharded, *command, *SHARDS, str(index))
            assert sum(path.exists() for path in paths) == done and paths[index].exists()
            printed = capsys.readouterr().out
            assert f"{4 - done} of 4 shards are missing" in printed
            assert "by chance" not in printed
        for more in ([*SHARDS, "3"], []):
            with pytest.raises(ConfigError, match=r"00003-of-00004\.new\.mask\.lock: another"):
                build(sharded, *command, *more)
    before = [path.stat().st_mtime_ns for path in paths[:3]]
    capsys.readouterr()
    build(sharded, *command)  # without flags: the rest
    assert [path.stat().st_mtime_ns for path in paths[:3]] == before
    printed = capsys.readouterr().out
    assert printed.count("complete, made with the same options") == 3 and "by chance" in printed
    assert read_index(sharded, "new").tolist() == expected
    build(sharded, *command, *SHARDS, "1")
    assert "complete, made with" in (printed := capsys.readouterr().out) and "by chance" in printed
    with pytest.raises(ConfigError, match="made with --mlm_probability 0.15, and .* 0.3; "):
        build(sharded, *command, *SHARDS, "2", "--mlm_probability", "0.3")


def test_only_the_shard_that_is_made_needs_scores(sharded):
    shards = TokenStore.open(sharded).shards
    for index in (0, 1, 3):
        array_path(shards[index], "mr", "scores").with_suffix(".json").unlink()
    build(sharded, "selective", "new", "--scores", "mr", *SHARDS, "2")
    assert array_path(shards[2], "new", "mask").exists()
    with pytest.raises(DataError, match="--scores mr"):
        build(sharded, "selective", "new", "--scores", "mr", *SHARDS, "3")


def test_another_number_of_shards_is_refused(sharded, single):
    with pytest.raises(ConfigError, match="--num_shards 3: .* has 4 shards; give --num_shards 4"):
        build(sharded, "random", "new", "--num_shards", "3", "--shard_index", "0")
    with pytest.raises(ConfigError, match="--num_shards 2: .* has 1 shards; give --num_shards 1"):
        build(single, "random", "new", "--num_shards", "2", "--shard_index", "0")
    build(single, "random", "new", "--num_shards", "1", "--shard_index", "0")


def test_large_stores_are_counted_in_part(sharded, monkeypatch, capsys):
    monkeypatch.setattr(build_masks, "MAX_COUNTED", 200)
    build(sharded, "selective", "sel", "--scores", "mr")
    assert "of the store, in blocks spaced evenly" in " ".join(capsys.readouterr().out.split())


def test_an_index_of_other_scores_of_the_same_name_is_refused_or_overwritten(sharded):
    """Published bug B14: caches were named by a folder, whatever was in it."""
    before, was = stamp(sharded, "sel"), read_index(sharded, "sel").tolist()
    add_scores(sharded, "mr", seed=4)
    command = ["selective", "sel", "--scores", "mr"]
    with pytest.raises(ConfigError, match=r"made with --scores \(content\) .* has .*--overwrite"):
        build(sharded, *command)
    assert stamp(sharded, "sel") == before
    build(sharded, *command, "--overwrite")
    assert read_index(sharded, "sel").tolist() != was


# ----------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("strategy", READERS)
def test_unknown_names_list_the_known_ones(strategy, single):
    flag, known = OPTIONS[strategy]
    with pytest.raises(DataError, match=rf"{flag} nope: .*\(known: {known}\)"):
        build(single, strategy, "out", flag, "nope")


@pytest.mark.parametrize("strategy", READERS)
def test_arrays_of_another_store_are_refused(strategy, single, sharded):
    flag, name = OPTIONS[strategy]
    kind = ARRAY_NEEDS[flag.removeprefix("--")]
    source = array_path(TokenStore.open(single).shards[0], name, kind)
    target = array_path(TokenStore.open(sharded).shards[0], name, kind)
    for suffix in (".npy", ".json"):
        target.with_suffix(suffix).write_bytes(source.with_suffix(suffix).read_bytes())
    with pytest.raises(DataError, match="made for the store"):
        build(sharded, strategy, "out", *OPTIONS[strategy])


def test_scores_shorter_than_the_store_are_refused(single):
    shard = TokenStore.open(single).shards[0]
    path = array_path(shard, "mr", "scores")
    np.save(path, np.load(path)[:-1])
    with pytest.raises(DataError, match="mr.scores"):
        build(single, "selective", "out", "--scores", "mr")
    info = json.loads(path.with_suffix(".json").read_text())
    info["count"] -= 1
    path.with_suffix(".json").write_text(json.dumps(info))
    with pytest.raises(DataError, match="mr.scores"):
        build(single, "selective", "out", "--scores", "mr")
    assert not array_path(shard, "out", "mask").exists()


def test_a_match_with_special_tokens_is_refused(single):
    shard = TokenStore.open(single).shards[0]
    everything = np.arange(shard.num_tokens, dtype=np.uint32)
    write_array(shard, "all", "mask", everything, {})
    with pytest.raises(DataError, match="to match"):
        build(single, "random_matched", "out", "--match", "all")
    assert not array_path(shard, "out", "mask").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strategy", "selective"], "needs --scores"),
        (["--strategy", "selective_fill", "--match", "sel"], "needs --scores"),
        (["--strategy", "random_matched"], "needs --match"),
        (["--strategy", "random", "--scores", "mr"], "no use with --strategy random"),
        (["--strategy", "whole_word", "--match", "sel"], "no use with --strategy whole_word"),
        (["--strategy", "random", "--mlm_probability", "0"], "--mlm_probability 0.0"),
        (["--strategy", "random", "--mlm_probability", "1.5"], "--mlm_probability 1.5"),
        (["--strategy", "random", "--mlm_probability", "nan"], "--mlm_probability nan"),
        (["--strategy", "random_matched", "--match", "out"], "--name out"),
        (["--strategy", "random", "--shard_index", "0"], "go together"),
        (["--strategy", "random", "--num_shards", "2"], "go together"),
        (["--strategy", "random", "--num_shards", "2", "--shard_index", "2"], "from 0 to 1"),
        (["--strategy", "random", "--num_shards", "2", "--shard_index", "-1"], "from 0 to 1"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ConfigError, match=message):
        main(["--tokens", "nowhere", "--name", "out", *options])


def test_a_name_that_is_no_name_is_refused(single):
    with pytest.raises((ConfigError, DataError), match="a/b"):
        build(single, "random", "a/b")


def test_an_empty_store_gets_an_empty_index(tmp_path, tokenizer, capsys):
    write(tmp_path / "e", [], tokenizer=tokenizer)
    build(str(tmp_path / "e"), "whole_word", "out")
    assert read_index(str(tmp_path / "e"), "out").tolist() == []
    assert "masked" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ command


@pytest.mark.parametrize("how", [["preprocess/build_masks.py"], ["-m", "preprocess.build_masks"]])
def test_command_by_path_and_by_module(how, single):
    command = [sys.executable, *how]
    shown = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and all(name in shown.stdout for name in ALL)
    options = ["--tokens", single + "-no", "--strategy", "random", "--name", "x"]
    failed = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 3 and failed.stdout == ""
    assert len(failed.stderr.splitlines()) == 1 and single + "-no" in failed.stderr
