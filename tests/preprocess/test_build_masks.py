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
    store_facts,
)
from preprocess.masking import index as index_room
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
from train.data import prebuilt_masking

ALL = sorted(STRATEGIES)
ARRAYS = {"scores": "mr", "match": "sel"}  # by need: what the fixtures put beside their stores
OPTIONS = {name: [word for need in sorted(one.needs & ARRAYS.keys())
                  for word in (f"--{need}", ARRAYS[need])] for name, one in STRATEGIES.items()}
READERS = [name for name in ALL if OPTIONS[name]]
MEASURE = {"name": "scorer", "boundary": True, "unit": "log-odds", "reads_labels": True}
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


def add_scores(prefix: str, name: str = "mr", seed: int = 0, **changes) -> np.ndarray:
    """Write scores that depend on the type and, more, on chance."""
    store = TokenStore.open(prefix)
    scores = np.random.default_rng(seed).normal(-0.5, 1, store.num_tokens)
    scores = (scores + all_tokens(store) % 5 * 0.3).astype(np.float16)
    add_array(store, name, "scores", scores, {"measure": {**MEASURE, **changes}})
    return scores


def add_array(store: TokenStore, name: str, kind: str, values: np.ndarray, info: dict) -> None:
    for shard in store.shards:
        part = values[shard.token_start : shard.token_start + shard.num_tokens]
        write_array(shard, name, kind, part, info)


def all_tokens(store: TokenStore) -> np.ndarray:
    return np.concatenate([np.array(shard.tokens) for shard in store.shards]).astype(np.int64)


def whole_store(prefix: str, tokenizer, **changes) -> Sequences:
    """A store of one shard as one batch, with all that a strategy may need; `changes` of it."""
    shard = TokenStore.open(prefix).shards[0]
    tokens, offsets = np.array(shard.tokens), np.array(shard.sequence_offsets)
    matched = np.array(open_array(shard, "sel", "mask")[0]).astype(np.int64)
    owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    documents, windows = plain_windows(shard)
    octaves = [int(np.log2(max(1, (tokens == i).sum()))) for i in range(len(tokenizer))]
    return Sequences(**{
        "offsets": offsets,
        "positions": np.arange(len(tokens)),
        "candidates": find_candidates(tokens, tokenizer.all_special_ids),
        "rate": 0.2,
        "seed": 5,
        "epoch": 0,
        "scores": np.array(open_array(shard, "mr", "scores")[0]),
        "continues_word": find_continuations(tokens, offsets, continuation_table(tokenizer)),
        "matched_counts": np.bincount(owner[matched], minlength=len(offsets) - 1),
        "windows": windows,
        "documents": documents,
        "matched": matched,
        "octaves": np.array(octaves, dtype=np.uint8)[tokens],
        "policy": STRATEGIES["selective"].choose,
        **changes,
    })


def plain_windows(shard) -> tuple[np.ndarray, np.ndarray]:
    """Number of the segment and the window of each sequence, document by document."""
    found, first = ([], []), [0, 0]
    for low, high in zip(shard.document_offsets[:-1], shard.document_offsets[1:], strict=True):
        start, end = shard.sequence_offsets[low], shard.sequence_offsets[high]
        for k, size in enumerate((index_room.SEGMENT_TOKENS, index_room.WINDOW_TOKENS)):
            parts = max(1, (end - start) // size)
            for b in range(low, high):
                part = min((shard.sequence_offsets[b] - start) // size, parts - 1)
                found[k].append(first[k] + part)
            first[k] += parts
    return np.array(found[0], dtype=np.int64), np.array(found[1], dtype=np.int64)


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
    changes, needs = {}, STRATEGIES[name].needs
    if "words" not in needs and "frequency" not in needs:
        changes["continues_word"] = None
    if "means" in needs:
        batch = whole_store(single, tokenizer)
        tokens = all_tokens(TokenStore.open(single))
        means = np.array([batch.scores[tokens == i].astype(float).mean() if i in tokens else 0
                          for i in range(len(tokenizer))]).astype(np.float16)
        changes |= {"scores": means[tokens], "rate": 0.15}  # the rate of the index to match
    expected = STRATEGIES[name].choose(whole_store(single, tokenizer, **changes))
    found, info = open_array(TokenStore.open(single).shards[0], "out", "mask")
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
    # A histogram is kept in each shard.
    same = read_index(sharded, "out").tolist() == read_index(single, "out").tolist()
    assert same != STRATEGIES[name].blocks
    for shard in store.shards:
        index = open_array(shard, "out", "mask")[0]
        assert (len(index) > 0) == (shard.num_tokens > 0)
        ids = shard.tokens[index.astype(np.int64)]
        assert find_candidates(ids, store.all_special_ids).all()


def blocks_of(store: TokenStore, number: int, name: str, size: int, tokenizer) -> list[list[int]]:
    shard = store.shards[number]
    inputs = StrategyInputs(
        scores=open_array(shard, "mr", "scores")[0],
        match=open_array(shard, "sel", "mask")[0],
        words=continuation_table(tokenizer),
        policy="selective" if "policy" in STRATEGIES[name].needs else None,
        **store_facts(store, name, lambda: [open_array(one, "mr", "scores")[0]
                                            for one in store.shards]),
    )
    blocks = choose_positions(shard, name, inputs, rate=0.15, seed=1, block_tokens=size,
                              all_special_ids=store.all_special_ids)
    return [block.tolist() for block in blocks]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("block_tokens", [1, 40, 333])
def test_blocks_do_not_change_the_result(name, block_tokens, sharded, tokenizer):
    store = TokenStore.open(sharded)
    results = [sum(blocks_of(store, 2, name, size, tokenizer), [])
               for size in (block_tokens, 1 << 20)]
    assert results[0] == results[1] and len(results[0]) > 20


@pytest.mark.parametrize("name", ["shuffled", "whole_word", "top"])
def test_long_documents_are_cut_in_the_same_places_whatever_the_blocks(
    name, tmp_path, tokenizer, monkeypatch
):
    monkeypatch.setattr(index_room, "SEGMENT_TOKENS", 128)
    monkeypatch.setattr(index_room, "WINDOW_TOKENS", 64)
    rng = np.random.default_rng(1)
    documents = [[rng.integers(5, 85, rng.integers(0, 40)).astype(np.uint16)
                  for _ in range(count)] for count in (0, 40, 3, 0, 0, 60, 1, 9)]
    write(tmp_path / "long", [*documents], tokenizer=tokenizer)
    prefix = str(tmp_path / "long")
    add_scores(prefix)
    build(prefix, "selective", "sel", "--scores", "mr")
    store = TokenStore.open(prefix)
    shard = store.shards[0]
    whole = [np.array(one) for one in index_room._documents(shard, 0, shard.num_sequences)]
    for found, plain in zip(whole, plain_windows(shard), strict=True):
        assert (np.diff(found) >= 0).all()
        # The same groups, by other numbers.
        assert (np.diff(found) != 0).tolist() == (np.diff(plain) != 0).tolist()
    assert len(np.unique(whole[0])) > 10
    results = []
    for size in (1, 50, 200, 1_000, 1 << 20):
        slices = list(index_room.iterate_segments(shard, size))
        assert [i for one in slices for i in range(one.start, one.stop)] == list(
            range(shard.num_sequences))
        for one in slices[1:]:  # no segment is cut
            assert whole[0][one.start] != whole[0][one.start - 1]
        results.append(sum(blocks_of(store, 0, name, size, tokenizer), []))
    assert all(result == results[0] for result in results)


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


def test_shards_of_one_index_are_made_alike(sharded):
    add_scores(sharded, "other", seed=9)
    command = ["new", "--scores", "mr", "--centre", "0.5"]
    build(sharded, "band", *command, *SHARDS, "0")
    for changes, difference in ((["--scores", "other"], "--scores mr, and this run has other"),
                                (["--centre", "0.9"], "--centre 0.5, and this run has 0.9"),
                                (["--units", "words"], "--units none, and this run has words")):
        with pytest.raises(ConfigError, match=difference):
            build(sharded, "band", *command, *changes, *SHARDS, "2")
    for index in (1, 2, 3):
        build(sharded, "band", *command, "--scores", "other", "--overwrite", *SHARDS, str(index))
    with pytest.raises(DataError, match="--match new: .*made with --scores other, and .* has mr"):
        build(sharded, "typemean", "ctl", "--match", "new")
    with pytest.raises(DataError, match="index new was made with different options"):
        prebuilt_masking(TokenStore.open(sharded), "new")


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
        (["--strategy", "random", "--units", "words"], "a strategy of units: whole_word, span, se"),
        (["--strategy", "random_matched", "--match", "m", "--units", "words"], "--units words has"),
        (["--strategy", "whole_word", "--units", "none"], "masks units; leave it out"),
        (["--strategy", "top", "--scores", "s", "--centre", "0.1"], "that reads it: band"),
        (["--strategy", "band", "--scores", "s", "--centre", "1.1"], "--centre 1.1: must be from"),
        (["--strategy", "band", "--scores", "s", "--temperature", "1"], "that reads it: sampled"),
        (["--strategy", "sampled", "--scores", "s", "--temperature", "0"],
         "--temperature 0.0: must be above 0; .* use --strategy top$"),
        (["--strategy", "sampled", "--scores", "s", "--temperature", "inf"], "--temperature inf"),
        (["--strategy", "sampled", "--scores", "s", "--epochs", "0"], "--epochs 0: from 1"),
        (["--strategy", "random", "--epochs", "2"], "pretrain.py --masking random draws other"),
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


# ------------------------------------------------------------ scores, units, policies, epochs


def test_a_rule_of_important_tokens_refuses_scores_without_a_boundary(single):
    add_scores(single, "grad", boundary=False)
    for name in ("selective", "selective_fill"):
        with pytest.raises(ConfigError, match=r"scores grad \(measure scorer\) 0 does not part "
                                              r".*; use --strategy top, sampled, band"):
            build(single, name, "out", "--scores", "grad")
    for name in ("top", "sampled", "band"):
        build(single, name, name, "--scores", "grad")
        assert len(read_index(single, name)) > 100


def test_scores_of_an_older_version_are_refused(single):
    store = TokenStore.open(single)
    add_array(store, "old", "scores", np.ones(store.num_tokens, dtype=np.float16), {})
    with pytest.raises(DataError, match="--scores old: .*older version.*make them again"):
        build(single, "top", "out", "--scores", "old")


@pytest.mark.parametrize("name", [n for n in ALL if {"scores", "policy"} & STRATEGIES[n].needs])
def test_scores_that_are_no_numbers_are_refused(name, single):
    store = TokenStore.open(single)
    scores = add_scores(single).copy()
    build(single, "selective", "sel", "--scores", "mr", "--overwrite")
    scores[np.flatnonzero(all_tokens(store) > 5)[7]] = np.nan
    add_array(store, "nan", "scores", scores, {"measure": MEASURE})
    options = ["--scores", "nan"]
    if "match" in STRATEGIES[name].needs:  # scores that changed behind the index are found first
        add_array(store, "mr", "scores", scores, {"measure": MEASURE})
        options = ["--match", "sel"]
    with pytest.raises(DataError, match="NaN|made by other scores than mr now are"):
        build(single, name, "out", *options)


def test_words_are_masked_as_a_whole(single, tokenizer):
    batch = whole_store(single, tokenizer)
    starts = np.flatnonzero(~batch.continues_word | ~batch.candidates
                            | np.append(True, ~batch.candidates[:-1]))
    word = np.searchsorted(starts, np.arange(len(batch.candidates)), side="right")
    for name in ("selective", "selective_fill", "top", "sampled", "band", "whole_word", "span"):
        more = OPTIONS[name] + (["--units", "words"] if OPTIONS[name] else [])
        build(single, name, name, *more, "--mlm_probability", "0.3")
        masked = np.zeros(len(word), dtype=bool)
        masked[read_index(single, name)] = True
        counts = np.bincount(word, masked)
        assert set(counts / np.maximum(np.bincount(word), 1)) == {0, 1}
        assert open_array(TokenStore.open(single).shards[0], name, "mask")[1]["options"][
            "units"] == "words"


def test_units_of_a_score_are_masked_as_a_whole(single):
    store = TokenStore.open(single)
    units = (np.arange(store.num_tokens) % 3 != 0).astype(np.uint8)
    add_array(store, "pmi", "units", units, {})
    offsets = np.array(store.shards[0].sequence_offsets)
    starts = np.zeros(store.num_tokens, dtype=bool)
    starts[offsets[:-1][np.diff(offsets) > 0]] = True
    special = all_tokens(store) == 1
    starts |= (units == 0) | special | np.append(False, special[:-1])
    unit = np.cumsum(starts)
    for name in ("top", "whole_word"):
        build(single, name, name, *OPTIONS[name], "--units", "pmi")
        masked = np.zeros(store.num_tokens, dtype=bool)
        masked[read_index(single, name)] = True
        counts = np.bincount(unit, masked)
        assert set(counts / np.maximum(np.bincount(unit), 1)) == {0, 1}
    with pytest.raises(DataError, match=r"--units nope: .*\(known: pmi\)"):
        build(single, "top", "out", "--scores", "mr", "--units", "nope")
    units[3] = 1
    add_array(store, "pmi", "units", units, {})
    with pytest.raises(ConfigError, match="made with --units .*--overwrite"):
        build(single, "top", "top", *OPTIONS["top"], "--units", "pmi")


def test_options_of_a_rule_reach_it(single):
    names = []
    for more in (["--centre", "0"], ["--centre", "1"], []):
        names.append("band" + "".join(more[1:]))
        build(single, "band", names[-1], "--scores", "mr", *more)
    for more in (["--temperature", "0.01"], ["--temperature", "100"]):
        names.append("t" + more[1].replace(".", ""))
        build(single, "sampled", names[-1], "--scores", "mr", *more)
    build(single, "top", "top", "--scores", "mr")
    scores = open_array(TokenStore.open(single).shards[0], "mr", "scores")[0].astype(float)
    low, high, middle, cold, hot, top = (
        scores[read_index(single, name)].mean() for name in (*names, "top"))
    assert low < middle < high == top and hot < cold <= top
    with pytest.raises(ConfigError, match="made with --centre 0.0, and this run has 0.5"):
        build(single, "band", names[0], "--scores", "mr")


def test_controls_find_rule_rate_scores_and_units_of_the_policy(single, tokenizer):
    add_scores(single, "grad", seed=3, boundary=False)
    build(single, "band", "policy", "--scores", "grad", "--units", "words", "--centre", "0.9",
          "--mlm_probability", "0.3")
    store = TokenStore.open(single)
    tokens, scores = all_tokens(store), open_array(store.shards[0], "grad", "scores")[0]
    build(single, "typemean", "mean", "--match", "policy", "--mlm_probability", "0.9")
    means = np.array([scores[tokens == i].astype(float).mean() if i in tokens else 0
                      for i in range(len(tokenizer))]).astype(np.float16)
    batch = whole_store(single, tokenizer, scores=means[tokens], rate=0.3, seed=42, centre=0.9)
    assert read_index(single, "mean").tolist() == STRATEGIES["band"].choose(batch).tolist()
    info = open_array(store.shards[0], "mean", "mask")[1]
    assert info["options"]["mlm_probability"] == 0.3 and info["options"]["centre"] == 0.9
    assert info["options"]["match"].startswith("policy (sha256 ")

    build(single, "inverse", "inverse", "--match", "policy")
    counts = [np.diff(np.searchsorted(read_index(single, name), batch.offsets))
              for name in ("inverse", "policy")]
    assert counts[0].tolist() == counts[1].tolist()
    lowest = scores[read_index(single, "inverse")].astype(float).mean()
    assert lowest < scores.astype(float).mean() < scores[read_index(single, "policy")].mean()


@pytest.mark.parametrize("name", [n for n in ALL if "policy" in STRATEGIES[n].needs])
def test_controls_of_a_policy_that_changed_or_has_no_scores_are_refused(name, single):
    build(single, "random", "rand")
    with pytest.raises(ConfigError, match="--match rand: made by random, which reads no scores"):
        build(single, name, "out", "--match", "rand")
    build(single, "random_matched", "control", "--match", "sel")
    with pytest.raises(ConfigError, match="made by random_matched, which reads no scores"):
        build(single, name, "out", "--match", "control")
    add_scores(single, seed=9)
    again = r"again with --strategy selective --scores mr --name sel --overwrite"
    with pytest.raises(DataError, match="--match sel: made by other scores than mr .*" + again):
        build(single, name, "out", "--match", "sel")
    build(single, "sampled", "drawn", "--scores", "mr", "--units", "words", "--temperature", "2",
          "--mlm_probability", "0.3", "--epochs", "2", "--seed", "7")
    path = array_path(TokenStore.open(single).shards[0], "mr", "scores")
    path.with_suffix(".json").unlink()
    with pytest.raises(DataError, match="--match sel: --scores mr: .*" + again):
        build(single, name, "out", "--match", "sel")
    with pytest.raises(DataError, match="--scores mr --units words --mlm_probability 0.3 --seed 7 "
                                        "--epochs 2 --temperature 2.0 --name drawn --overwrite"):
        build(single, name, "out", "--match", "drawn")


def test_a_match_that_runs_in_a_circle_is_refused(single):
    build(single, "random_matched", "b", "--match", "sel")
    build(single, "random_matched", "c", "--match", "b")
    with pytest.raises(ConfigError, match=r"--match c: it was matched to b and that to sel, the "
                                          r"index to be made, so the match runs in a circle"):
        build(single, "random_matched", "sel", "--match", "c", "--overwrite")


def test_an_epoch_is_not_matched_to_itself(single):
    build(single, "sampled", "x", "--scores", "mr", "--epochs", "2")
    with pytest.raises(ConfigError, match="--name x makes the index to match, x-epoch1"):
        build(single, "random_matched", "x", "--match", "x-epoch1", "--epochs", "2", "--overwrite")


def test_typemean_reads_the_scores_of_all_shards(sharded):
    build(sharded, "typemean", "out", "--match", "sel", *SHARDS, "0")
    store = TokenStore.open(sharded)
    add_array(store, "mr", "scores", np.ones(store.num_tokens, dtype=np.float16),
              {"measure": MEASURE})
    build(sharded, "selective", "sel", "--scores", "mr", "--overwrite")
    with pytest.raises(ConfigError, match="made with .*--overwrite"):
        build(sharded, "typemean", "out", "--match", "sel", *SHARDS, "0")


def test_an_index_for_each_epoch(single, capsys):
    build(single, "sampled", "s", "--scores", "mr", "--epochs", "3")
    shard = TokenStore.open(single).shards[0]
    indices = []
    for epoch, name in enumerate(("s", "s-epoch1", "s-epoch2")):
        index, info = open_array(shard, name, "mask")
        assert (info["epochs"], info["epoch"]) == (3, epoch)
        indices.append(index.tolist())
    assert indices[0] != indices[1] != indices[2] != indices[0]
    # Of a control, each epoch keeps the counts of that of its policy.
    build(single, "random_matched", "c", "--match", "s", "--epochs", "4")
    offsets = np.array(shard.sequence_offsets)
    for epoch in range(4):
        own, of_policy = (read_index(single, name + (f"-epoch{e}" if e else "")) for name, e in
                          (("c", epoch), ("s", epoch % 3)))
        assert (np.searchsorted(own, offsets) == np.searchsorted(of_policy, offsets)).all()
    capsys.readouterr()
    build(single, "sampled", "s", "--scores", "mr", "--epochs", "3")
    assert capsys.readouterr().out.count("complete, made with the same options") == 3
    with pytest.raises(ConfigError, match="made with --epochs 3, and this run has 1"):
        build(single, "sampled", "s", "--scores", "mr")


def test_how_much_a_control_shares_with_its_policy_is_said(single, capsys):
    capsys.readouterr()
    build(single, "frequency_matched", "out", "--match", "sel")
    printed = " ".join(capsys.readouterr().out.split())
    mine, theirs = read_index(single, "out"), read_index(single, "sel")
    share = len(np.intersect1d(mine, theirs)) / len(mine)
    assert f"{share:.1%} of the masks are also masks of sel; by chance" in printed
    assert "bins hold as many masks as in the index to match; of those with 100" in printed


def test_masks_that_no_score_allows_are_counted(single, capsys):
    store = TokenStore.open(single)
    scores = np.full(store.num_tokens, -np.inf, dtype=np.float16)
    scores[::20] = 1
    add_array(store, "few", "scores", scores, {"measure": MEASURE})
    build(single, "top", "out", "--scores", "few")
    assert "masks are missing, since scores of minus infinity" in capsys.readouterr().out
    assert (read_index(single, "out") % 20 == 0).all()


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
