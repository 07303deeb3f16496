"""Statistics of mask indices: the fast counts against slow ones, and what the tables say."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from preprocess.store import TokenStore, write_array
from preprocess.text.continuations import open_tokenizer
from preprocess.text.stop_words import STOP_WORDS, is_stop_word
from preprocess.view import statistics as mask_statistics
from preprocess.view.scale import Scale, share_of
from preprocess.view.statistics import (
    KINDS,
    PLACES,
    RATE_EDGES,
    SIZES,
    IndexCounts,
    Vocabulary,
    count_masks,
    find_kinds,
    find_places,
    find_sizes,
    make_tables,
    octaves_table,
    rank_types,
    type_kinds,
)
from tests.support.stores import write

UNKNOWN = 1
SCORE_EDGES = Scale().edges


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_tokenizer):
    """Two shards of random words, with indices `a` and `b` and scores `mr`."""
    generator = np.random.default_rng(5)
    prefix = str(tmp_path_factory.mktemp("statistics") / "s")
    parts = [i for name, i in tiny_tokenizer.get_vocab().items() if name.startswith("##")]
    ids = [UNKNOWN, *range(5, len(tiny_tokenizer)), *parts * 8]  # enough for words of five tokens
    for i in range(2):
        documents = [
            [generator.choice(ids, size=n).astype(np.uint16)
             for n in generator.integers(0, 25, size=generator.integers(0, 4))]
            for _ in range(20)]
        write(prefix, documents, (i, 2), tiny_tokenizer)
    for shard in TokenStore.open(prefix).shards:
        allowed = np.flatnonzero(shard.tokens[:] != UNKNOWN)
        for name, share in (("a", 0.2), ("b", 0.4)):
            chosen = allowed[generator.random(len(allowed)) < share].astype(np.uint32)
            write_array(shard, name, "mask", chosen, {})
        odds = generator.choice([-9, -4, -3, -0.5, 0, 0.5, 1, 3, 4, 5], size=shard.num_tokens)
        write_array(shard, "mr", "scores", odds.astype(np.float16), {})
    return TokenStore.open(prefix)


@pytest.fixture(scope="module")
def vocabulary(store):
    return Vocabulary.read(open_tokenizer(store.tokenizer_dir), store.vocab_size)


def slow_counts(store, names, vocabulary):
    """The same counts with a loop over every sequence and token; totals and one dict an index."""
    num_bins = len(SCORE_EDGES) + 1
    total = {"kinds": [0] * 3, "bins": [0] * num_bins, "candidates": 0, "sequences": 0,
             "shared": 0, "expected": 0.0, "sizes": [0] * len(SIZES), "places": [0] * len(PLACES)}
    found = [{"kinds": [0] * 3, "bins": [0] * num_bins, "types": {}, "sizes": [0] * len(SIZES),
              "rates": [0] * (len(RATE_EDGES) + 1), "chance": 0.0, "places": [0] * len(PLACES),
              "runs": 0} for _ in names]
    for shard in store.shards:
        held = [set(mask_statistics.open_array(shard, n, "mask")[0].tolist()) for n in names]
        scores = mask_statistics.open_array(shard, "mr", "scores")[0]
        offsets = shard.sequence_offsets[:].tolist()
        for start, end in zip(offsets[:-1], offsets[1:], strict=True):
            words = [vocabulary.names[i] for i in shard.tokens[start:end].tolist()]
            possible = sum(word != "[UNK]" for word in words)
            total["sequences"] += 1
            total["candidates"] += possible
            counts = [sum(p in index for p in range(start, end)) for index in held]
            total["expected"] += counts[0] * counts[1] / max(possible, 1)
            for one, count in zip(found, counts, strict=True):
                percent = 100 * count / max(possible, 1)
                bins = [i for i, edge in enumerate(RATE_EDGES, 1) if percent <= edge]
                one["rates"][bins[0] if count else 0] += 1
                one["chance"] += count**2 / max(possible, 1)
            for i, word in enumerate(words):
                joined = word.startswith("##") or (words + [""])[i + 1].startswith("##")
                kind = 1 if word in STOP_WORDS and not joined else 2 if word in ".,!" else 0
                above = sum(float(scores[start + i]) > edge for edge in SCORE_EDGES)
                here = [start + i in index for index in held]
                first, last = i, i + 1  # of its word
                while first and words[first].startswith("##"):
                    first -= 1
                while last < len(words) and words[last].startswith("##"):
                    last += 1
                size = min(last - first, len(SIZES)) - 1
                place = 0 if i == 0 else 1 if i == len(words) - 1 else 2
                if word != "[UNK]":
                    total["sizes"][size] += 1
                    total["places"][place] += 1
                total["shared"] += all(here)
                total["kinds"][kind] += 1
                total["bins"][above] += 1
                for one, on in zip(found, here, strict=True):
                    one["kinds"][kind] += on
                    one["bins"][above] += on
                    one["sizes"][size] += on
                    one["places"][place] += on
                    one["types"][word] = one["types"].get(word, 0) + on
                for one, index in zip(found, held, strict=True):
                    one["runs"] += start + i in index and (i == 0 or start + i - 1 not in index)
    return total, found


@pytest.mark.parametrize("block_tokens", [1 << 20, 40, 1])
def test_counts_are_those_of_a_loop(block_tokens, store, vocabulary, monkeypatch):
    monkeypatch.setattr(mask_statistics, "BLOCK_TOKENS", block_tokens)
    counted = count_masks(store, ["a", "b"], vocabulary, "mr")
    total, found = slow_counts(store, ["a", "b"], vocabulary)
    assert counted.kind_tokens.tolist() == total["kinds"]
    assert counted.score_tokens.tolist() == total["bins"]
    assert (counted.candidates, counted.sequences) == (total["candidates"], total["sequences"])
    assert counted.overlaps.shared[0, 1] == total["shared"] > 0
    assert counted.overlaps.expected[0, 1] == pytest.approx(total["expected"])
    assert counted.size_tokens.tolist() == total["sizes"] and all(total["sizes"])
    assert counted.place_tokens.tolist() == total["places"]
    for i, (index, one) in enumerate(zip(counted.indices, found, strict=True)):
        assert index.size_masked.tolist() == one["sizes"]
        assert index.place_masked.tolist() == one["places"]
        assert index.runs == one["runs"]
        assert index.kind_masked.tolist() == one["kinds"]
        assert index.score_masked.tolist() == one["bins"]
        assert index.rates.tolist() == one["rates"]
        assert counted.overlaps.expected[i, i] == pytest.approx(one["chance"])
        types = zip(vocabulary.names, index.type_masked.tolist(), strict=True)
        assert {name: n for name, n in types if n} == {k: n for k, n in one["types"].items() if n}


def test_overlap_by_chance_is_that_of_all_draws(tmp_path, tiny_tokenizer):
    """Of 5 tokens, 2 and 3: mean and variance over every pair of draws."""
    write(tmp_path / "s", [[[5, 6, 7, 8, 9], [5]]], tokenizer=tiny_tokenizer)
    store = TokenStore.open(str(tmp_path / "s"))
    for name, chosen in (("a", [0, 1]), ("b", [1, 2, 3])):
        write_array(store.shards[0], name, "mask", np.array(chosen, dtype=np.uint32), {})
    shared = [len({*a} & {*b}) for a in itertools.combinations(range(5), 2)
              for b in itertools.combinations(range(5), 3)]
    counted = count_masks(store, ["a", "b"])
    assert counted.overlaps.shared[0, 1] == 1
    assert counted.overlaps.expected[0, 1] == pytest.approx(np.mean(shared))
    assert counted.overlaps.variance[0, 1] == pytest.approx(np.var(shared))


def test_rates_end_with_their_bin():
    """3 of 20 are 15 %, not above it: in whole numbers, 0.15 having no float of its own."""
    counts, possible = np.array([0, 1, 3, 4, 20, 0]), np.array([20, 20, 20, 20, 20, 0])
    binned = mask_statistics._bin_rates(counts, possible)
    named = dict(zip((0, *RATE_EDGES), binned.tolist(), strict=True))
    assert named == {0: 2, 5: 1, 10: 0, 15: 1, 20: 1, 25: 0, 30: 0, 50: 0, 100: 1}


def test_a_part_of_the_store_is_spread_over_it(store, vocabulary, monkeypatch):
    monkeypatch.setattr(mask_statistics, "BLOCK_TOKENS", 30)
    part = count_masks(store, ["a"], max_tokens=store.num_tokens // 4)
    assert 0.15 < part.tokens / store.num_tokens < 0.4
    share = f"counted were {100 * part.tokens / store.num_tokens:.1f} % of the store"
    assert share in make_tables(part, ["a"], vocabulary, False)[0].note
    firsts = []
    monkeypatch.setattr(mask_statistics, "_count_block",
                        lambda result, store, shard, block, *rest: firsts.append(
                            (shard.prefix, block.start)))
    count_masks(store, ["a"], max_tokens=store.num_tokens // 4)
    assert len({prefix for prefix, _ in firsts}) == 2
    assert max(start for _, start in firsts) > store.shards[1].num_sequences * 0.7
    firsts.clear()
    count_masks(store, ["a"], max_tokens=10 * store.num_tokens)
    assert [b for _, b in firsts] == [block.start for shard in store.shards for block in
                                      mask_statistics.iterate_blocks(shard.sequence_offsets, 30)]


def test_ranks_need_enough_occurrences():
    # A fifth of 1,000 tokens is masked: 25 occurrences make 5 masks on average.
    tokens = np.array([400, 300, 200, 60, 25, 15])
    masked = np.array([100, 30, 0, 50, 5, 15])
    often, most, fewest, least = rank_types(IndexCounts(masked, masked), tokens, 4)
    assert least == 25
    assert often.tolist() == [0, 3, 1, 5]
    assert most.tolist() == [3, 0]  # not 5, which is too rare, nor 4, which has its share
    assert fewest.tolist() == [2, 1]
    empty = rank_types(IndexCounts(0 * masked, masked), tokens, 4)
    assert [ids.tolist() for ids in empty[:3]] == [[], [], []]


# ------------------------------------------------------------------------------------- words


def test_kinds_of_tokens_by_hand(tiny_tokenizer):
    names = ["[UNK]", "the", "##s", ".", "film", "##the", "\u2423the", "'s", "\u00bf", "\ufffd"]
    kinds = type_kinds(names)
    assert [KINDS[k] for k in kinds] == [
        "other words", "stop words", "other words", "punctuation", "other words", "other words",
        "stop words", "stop words", "punctuation", "other words",
    ]
    assert is_stop_word(" The") and not is_stop_word("not")


def test_a_stop_word_that_is_part_of_a_word_is_none(tiny_tokenizer):
    vocabulary = Vocabulary.read(tiny_tokenizer.backend_tokenizer, len(tiny_tokenizer))
    words = "the the ##s film the ##s the".split()
    tokens = np.array(tiny_tokenizer.convert_tokens_to_ids(words), dtype=np.uint16)
    offsets = np.array([0, 4, 7])
    found = find_kinds(tokens, offsets, vocabulary.kinds, vocabulary.table)
    assert found.tolist() == [1, 0, 0, 0, 0, 0, 1]
    # Without a table every one counts; no tokens give no kinds.
    assert find_kinds(tokens, offsets, vocabulary.kinds, None).tolist() == [1, 1, 0, 0, 1, 0, 1]
    assert not len(find_kinds(tokens[:0], np.array([0]), vocabulary.kinds, vocabulary.table))


def test_lengths_of_words_and_places_by_hand():
    continues = np.array([0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 0], dtype=bool)
    assert find_sizes(continues).tolist() == [0, 2, 2, 2, 4, 4, 4, 4, 4, 4, 0]
    assert not len(find_sizes(continues[:0]))
    places = [PLACES[i] for i in find_places(np.array([0, 0, 1, 3, 6, 6]))]
    assert places == ["first", "first", "last", "first", "others", "last"]
    assert not len(find_places(np.array([0, 0])))


# ------------------------------------------------------------------------------------ tables


def test_tables_say_what_was_counted(store, vocabulary):
    counted = count_masks(store, ["a", "b"], vocabulary, "mr")
    tables = {table.title: table for table in make_tables(counted, ["a", "b"], vocabulary, True)}
    overall = {row[0]: row[1:] for row in tables["Overall"].rows}
    masked = [index.masked for index in counted.indices]
    assert overall["masked tokens"] == [f"{m:,}" for m in masked]
    of_candidates = [f"{100 * m / counted.candidates:.1f} %" for m in masked]
    assert overall["of the candidates"] == of_candidates
    unmasked = [f"{index.rates[0]:,}" for index in counted.indices]
    assert overall["sequences without a mask"] == unmasked
    chance, shared = counted.overlaps.expected, counted.overlaps.shared[0, 1]
    by_chance = [f"{100 * chance[i, i] / masked[i]:.1f} %" for i in range(2)]
    assert overall["hit by chance"] == by_chance
    assert overall["tokens in a run"] == [f"{i.masked / i.runs:.2f}" for i in counted.indices]
    assert overall["in the other index too"][1] == f"{100 * shared / masked[1]:.1f} %"
    assert f"share {shared:,} tokens" in tables["Overall"].note
    assert "of the store" not in tables["Overall"].note
    for title in ("Kinds of words", "Mask rate of each sequence"):
        for column in (1, 2):  # shares of a whole
            assert sum(row[column].length for row in tables[title].rows) == pytest.approx(1)
    for row, tokens, of_a in zip(tables["Masked by importance"].rows, counted.score_tokens,
                                 counted.indices[0].score_masked, strict=True):
        assert row[2] == f"{tokens:,}" and row[3].length == pytest.approx(of_a / max(tokens, 1))
    often = tables["a: masked most often"]
    assert often.subject == "a" and often.rows
    for token, occurs, of_it, share, lift in often.rows:
        i = vocabulary.names.index(token)
        assert occurs == f"{counted.type_tokens[i]:,}"
        assert of_it == f"{counted.indices[0].type_masked[i]:,}"
        rate = counted.indices[0].type_masked[i] / counted.type_tokens[i]
        assert share.length == pytest.approx(rate)
        assert float(lift[:-2]) == pytest.approx(rate / (masked[0] / counted.tokens), abs=0.051)


def test_octaves_of_frequency_by_hand(store, vocabulary):
    counted = count_masks(store, ["a"], vocabulary)
    table = octaves_table(counted, ["a"])
    types = [i for i in range(store.vocab_size) if i != UNKNOWN and counted.type_tokens[i]]
    assert {row[0] for row in table.rows} == {
        f"{1 << n:,} to {2 ** (n + 1) - 1:,}" if n else "1"
        for n in (int(counted.type_tokens[i]).bit_length() - 1 for i in types)}
    for title, tokens, share in table.rows:
        low, _, high = title.partition(" to ")
        inside = [i for i in types if int(low) <= counted.type_tokens[i] <= int(high or low)]
        assert int(tokens.replace(",", "")) == sum(counted.type_tokens[inside])
        assert share.part == sum(counted.indices[0].type_masked[inside])
    assert sum(row[2].part for row in table.rows) == counted.indices[0].masked


def test_log_odds_as_shares():
    odds = (-65504.0, -np.inf, -2.0, 0.0, np.log(3), 65504.0, np.inf)
    assert [share_of(x) for x in odds] == ["0 %", "0 %", "12 %", "50 %", "75 %", "100 %", "100 %"]


def test_tables_of_nothing(tmp_path, tiny_tokenizer):
    write(tmp_path / "e", [[]], tokenizer=tiny_tokenizer)
    store = TokenStore.open(str(tmp_path / "e"))
    write_array(store.shards[0], "a", "mask", np.empty(0, dtype=np.uint32), {})
    write_array(store.shards[0], "z", "scores", np.empty(0, dtype=np.float16), {})
    vocabulary = Vocabulary.read(tiny_tokenizer.backend_tokenizer, store.vocab_size)
    counted = count_masks(store, ["a", "a"], vocabulary, "z")
    tables = make_tables(counted, ["a", "a"], vocabulary, True)
    assert tables[0].rows[1] == ["of the candidates", "-", "-"]
