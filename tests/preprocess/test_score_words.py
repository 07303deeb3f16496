"""Scores by counting words, and combined scores: against plain Python and scikit-learn."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from preprocess.errors import ConfigError, DataError
from preprocess.masking import combine, counts, ngrams
from preprocess.masking.counts import Counting
from preprocess.masking.measures import COUNTED
from preprocess.masking.words import WordFinder, hash_words, to_half
from preprocess.score_words import main
from preprocess.store import TokenStore, array_path, open_array, write_array
from preprocess.text.lexicon import read_lexicon
from tests.support.stores import write

UNKNOWN = 1
PHRASES = [["w1", "w2"], ["w3", "w4", "w5"], ["w6", "##x1", "w7"], ["w1", "w2", "w8", "w9", "w2"],
           ["the", "w6", "##x1"]]
NAMES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "of", ".", ",",
         *(f"w{i}" for i in range(40)), *(f"##x{i}" for i in range(10))]
ID = {name: i for i, name in enumerate(NAMES)}


def make_tokenizer(names: list[str]):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)},
                                       unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(NAMES)


def make_documents(seed: int, number: int = 80) -> list[list[np.ndarray]]:
    """Documents of 0 to 6 sequences of words, phrases that recur, and some [UNK]."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, len(NAMES) - 4)
    weights /= weights.sum()

    def sequence() -> np.ndarray:
        found: list[int] = []
        for _ in range(rng.integers(0, 9)):
            if rng.random() < 0.5:
                found += [ID[name] for name in PHRASES[rng.integers(len(PHRASES))]]
            elif rng.random() < 0.1:
                found.append(UNKNOWN)
            else:
                found.append(int(rng.choice(np.arange(5, len(NAMES)), p=weights)))
        return np.array(found, np.uint16)

    return [[sequence() for _ in range(rng.integers(0, 7))] for _ in range(number)]


@pytest.fixture(scope="module")
def stores(tmp_path_factory, tokenizer) -> dict[str, str]:
    """The same documents in one shard and in four, one of them empty; and another text."""
    folder = tmp_path_factory.mktemp("stores")
    documents, cuts = make_documents(0), [0, 20, 20, 55, 80]
    write(folder / "one", documents, None, tokenizer)
    for i, (first, end) in enumerate(itertools.pairwise(cuts)):
        write(folder / "many", documents[first:end], (i, 4), tokenizer)
    write(folder / "other", make_documents(1, 60), None, tokenizer)
    return {name: str(folder / name) for name in ("one", "many", "other")}


@pytest.fixture
def lexicon_file(tmp_path) -> str:
    path = tmp_path / "words.csv"
    path.write_text("word,weight\nw1,0.5\nW2,2\nw6x1,1.5\nstrange,1\nw3.w4,1\nw39x9,4\nw2,1\n")
    return str(path)


def counting(prefix: str, **more) -> Counting:
    store = TokenStore.open(prefix)
    return Counting(store, WordFinder.of(store, "this"), **more)


def plain_words(prefix: str) -> list[list[list[tuple[tuple[int, ...], int]]]]:
    """By document and sequence, the words: piece ids, and the place of the first in the store."""
    found = []
    for shard in TokenStore.open(prefix).shards:
        for first, end in itertools.pairwise(np.asarray(shard.document_offsets).tolist()):
            document = []
            offsets = np.asarray(shard.sequence_offsets)[first : end + 1].tolist()
            for a, b in itertools.pairwise(offsets):
                words: list[tuple[tuple[int, ...], int]] = []
                for place in range(a, b):
                    i = int(shard.tokens[place])
                    if words and NAMES[i].startswith("##") and place > a:
                        words[-1] = (*words[-1][:1][0], i), words[-1][1]
                    else:
                        words.append(((i,), shard.token_start + place))
                document.append(words)
            found.append(document)
    return found


def flat(prefix: str) -> list[tuple[tuple[int, ...], int]]:
    return [word for document in plain_words(prefix) for words in document for word in words]


def known(pieces: tuple[int, ...]) -> bool:
    return UNKNOWN not in pieces


def read(prefix: str, name: str, kind: str = "scores") -> np.ndarray:
    return np.concatenate([open_array(s, name, kind)[0] for s in TokenStore.open(prefix).shards])


def info(prefix: str, name: str, kind: str = "scores") -> dict:
    return json.loads(array_path(TokenStore.open(prefix).shards[0], name, kind).with_suffix(
        ".json").read_text())


def score(prefix: str, name: str, *more: str) -> np.ndarray:
    main(["--tokens", prefix, "--name", name, *more])
    return read(prefix, name)


def by_word(prefix: str, value) -> np.ndarray:
    """A score per token from one per word: `value(pieces)`, 0 where a piece is [UNK]."""
    return np.concatenate([
        np.full(len(pieces), value(pieces) if known(pieces) else 0.0)
        for pieces, _ in flat(prefix)]).astype(np.float16)


# -------------------------------------------------------------------------------------- words


def test_words_have_one_hash_each(stores):
    found = counting(stores["one"])
    [block] = list(found.blocks(found.store.shards[0]))
    words = flat(stores["one"])
    assert block.words.starts.tolist() == [place for _, place in words]
    assert block.words.known.tolist() == [known(pieces) for pieces, _ in words]
    keys, slots = {}, {}
    for (pieces, _), key, slot in zip(words, block.words.keys.tolist(), block.words.slots.tolist(),
                                      strict=True):
        assert keys.setdefault(pieces, key) == key
        assert slots.setdefault(pieces, slot) == slot
    assert len(set(keys.values())) == len(keys) == len(set(slots.values()))
    # The order of pieces counts.
    pieces = np.array([5, 6, 6, 5, 5, 5, 5], np.uint16)
    first, second, third = hash_words(pieces, np.array([0, 2, 4]), np.array([2, 2, 3]))
    assert len({int(first), int(second), int(third)}) == 3


def test_scores_stay_finite_and_keep_their_sign():
    values = np.array([1e9, -1e9, 1e-12, -1e-12, 0.0, 2.5])
    half = to_half(values)
    assert np.isfinite(half).all()
    assert np.sign(half).tolist() == np.sign(values).tolist()
    assert half[5] == 2.5


# -------------------------------------------------------------------------------------- tf-idf


def test_idf_of_the_worked_example():
    """good film / bad film film / good plot."""
    idf = counts.inverse_frequency(np.array([2, 2, 1, 1]), 3)
    assert idf.round(4).tolist() == [1.2877, 1.2877, 1.6931, 1.6931]
    assert (2 * idf[1]).round(4) == 2.5754


@pytest.mark.parametrize("name", ["one", "many"])
def test_tfidf_is_that_of_scikit_learn(stores, name):
    from sklearn.feature_extraction.text import TfidfVectorizer

    documents = [[pieces for words in document for pieces, _ in words]
                 for document in plain_words(stores[name])]
    vectorizer = TfidfVectorizer(norm=None, analyzer=lambda words: [w for w in words if known(w)])
    matrix = vectorizer.fit_transform(documents)
    column = vectorizer.vocabulary_
    wanted = np.concatenate([
        np.full(len(pieces), matrix[row, column[pieces]] if known(pieces) else 0.0)
        for row, document in enumerate(documents) for pieces in document])
    assert (score(stores[name], "tfidf", "--measure", "tfidf") == wanted.astype(np.float16)).all()


def test_blocks_change_no_score(stores):
    for name in ("tfidf", "pmi"):
        found = []
        for size in (1, 50, 1 << 20):
            here = counting(stores["one"], block_tokens=size)
            scored = (ngrams.score_pmi(here, 5, 12) if name == "pmi"
                      else COUNTED[name].score(here))
            found.append(np.concatenate(list(scored.scores(here.store.shards[0]))))
        assert (found[0] == found[1]).all() and (found[0] == found[2]).all()


# ---------------------------------------------------------------------------------- difference


def test_difference_of_the_worked_example():
    here, there = np.array([50, 30, 8, 1]), np.array([6000, 50, 600, 0])
    z = counts.difference_z(here, there, 1000, 100_000)
    assert z.round(2).tolist() == [-1.11, 16.19, 0.67, 0.67]


def test_difference_has_no_infinite_value():
    one_word = counts.difference_z(np.array([5]), np.array([9]), 5, 9)
    absent = counts.difference_z(np.array([0]), np.array([0]), 5, 9)
    large = counts.difference_z(np.array([8 * 10**11]), np.array([2 * 10**11]), 10**12, 10**12)
    assert one_word == absent == 0 and large == counts.Z_LIMIT


@pytest.mark.parametrize("name", ["one", "many"])
def test_difference_is_that_of_plain_counts(stores, name):
    here = Counter(pieces for pieces, _ in flat(stores[name]) if known(pieces))
    there = Counter(pieces for pieces, _ in flat(stores["other"]) if known(pieces))
    n1, n2 = here.total(), there.total()

    def z(pieces):
        y1, y2 = here[pieces], there[pieces]
        a = 500 * (y1 + y2) / (n1 + n2)
        d = (math.log((y1 + a) / (n1 + 500 - y1 - a)) - math.log((y2 + a) / (n2 + 500 - y2 - a)))
        return d / math.sqrt(1 / (y1 + a) + 1 / (y2 + a))

    found = score(stores[name], "difference", "--measure", "difference", "--against",
                  stores["other"])
    assert np.allclose(found, by_word(stores[name], z), rtol=1e-3, atol=1e-6)


# -------------------------------------------------------------------------- lexicon and content


def test_lexicon_matches_whole_words(stores, lexicon_file, capsys):
    listed = {("w1",): 0.5, ("w2",): 2.0, ("w6", "##x1"): 1.5, ("w39", "##x9"): 4.0}
    weights = {tuple(ID[name] for name in names): weight for names, weight in listed.items()}
    found = score(stores["one"], "lexicon", "--measure", "lexicon", "--lexicon", lexicon_file)
    assert (found == by_word(stores["one"], lambda pieces: weights.get(pieces, 0.0))).all()
    assert len(set(found.tolist())) == 4
    kept = info(stores["one"], "lexicon")["counts"]
    share = kept.pop("share_of_tokens")
    assert share == pytest.approx((found > 0).mean())
    assert kept == {"listed": 7, "unknown": 1, "several_words": 1, "occur": 3, "never_occur": 1}
    line = next(line for line in capsys.readouterr().out.splitlines() if "occur" in line)
    for text in ("of 7 words 3 occur", "1 never do (w39x9)", "1 become [UNK] (strange)",
                 "1 are several words to the tokenizer (w3.w4)"):
        assert text in line


@pytest.mark.parametrize(("name", "text", "message"), [
    ("a.csv", "good\nbad\n", "line 1: 'good' is one column"),
    ("a.txt", "good 1\n\nbad\n", "line 3: 'bad' is one column"),
    ("a.tsv", "good\t1\nbad\tx\n", "line 2: the weight 'x' is not a number"),
    ("a.tsv", "good\t-1\n", "the weight of 'good' is -1.0"),
    ("a.tsv", "good\tnan\n", "the weight of 'good' is nan"),
    ("a.csv", 'good,1\n"bad,2\n', "line 2: cannot be read"),
    ("a.csv", "", "lists no word"),
    ("a.csv", "good,0\n", "lists no word"),
    ("a.json", "{}", r"must end in \.csv, \.tsv, \.txt"),
    ("a.csv", "strange,1\nodd.odd,1\n", "knows none of its 2 words"),
    ("a.csv", "w39x9,1\n", "every score would be 0"),
])
def test_lexicons_that_are_refused(stores, tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises((ConfigError, DataError), match=message):
        score(stores["one"], "refused", "--measure", "lexicon", "--lexicon", str(path))
    assert not array_path(TokenStore.open(stores["one"]).shards[0], "refused", "scores").exists()


def test_lexicon_formats(tmp_path):
    for name, text in (("a.csv", 'word,w\n"a, b",1\n'), ("a.tsv", "a, b\t1\tmore\n"),
                       ("a.txt", "x  1\n")):
        (tmp_path / name).write_text(text)
        assert list(read_lexicon(str(tmp_path / name)).items()) == [
            ("x" if name == "a.txt" else "a, b", 1.0)]


def test_byte_level_words_are_found_after_a_space_and_at_the_start(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = ["good films are good", "Good plots, good films", "a film that is goodish"] * 3
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<unk>", "<s>", "</s>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", cls_token="<s>",
        sep_token="</s>", mask_token="<mask>")
    ids = [inner.encode(text).ids for text in texts]
    write(tmp_path / "store", [[np.array(i, np.uint16)] for i in ids], None, tokenizer)
    (tmp_path / "list.txt").write_text("good 1\nfilms 2\n")
    found = score(str(tmp_path / "store"), "list", "--measure", "lexicon", "--lexicon",
                  str(tmp_path / "list.txt"))
    wanted = []
    for text in texts:
        encoding = inner.encode(text)
        for a, b in encoding.offsets:
            word = next(w for w in re.finditer(r"\w+|\W", text)
                        if w.start() <= max(a, b - 1) < w.end())[0]
            wanted.append({"good": 1.0, "Good": 1.0, "films": 2.0}.get(word, 0.0))
    assert found.tolist() == wanted and set(wanted) == {0.0, 1.0, 2.0}


def test_content_leaves_out_stop_words_and_punctuation(stores):
    found = score(stores["one"], "content", "--measure", "content", "--language", "en")
    others = {(ID["the"],), (ID["of"],), (ID["."],), (ID[","],)}

    def content(pieces):
        return float(pieces not in others)

    wanted = np.concatenate([
        [float(i not in (ID["."], ID[","])) * (known(pieces) and content(pieces)) for i in pieces]
        for pieces, _ in flat(stores["one"])])
    assert (found == wanted).all() and 0 < found.mean() < 1


# ----------------------------------------------------------------------------------------- PMI


def test_pmi_of_the_worked_example():
    """`new york city` of POLICIES: its best cut is `new york | city`."""
    new, york, city = (np.uint64(n) for n in (11, 22, 33))

    def frequent(times: dict[tuple, int], total: int) -> ngrams.Frequent:
        rows = np.array(list(times), np.uint64)
        keys = ngrams._part_key(rows, 0, rows.shape[1])
        order = np.argsort(keys)
        return ngrams.Frequent(keys[order], np.array(list(times.values()))[order], rows[order],
                               total)

    found = {1: frequent({(new,): 10, (york,): 8, (city,): 12}, 100),
             2: frequent({(new, york): 8, (york, city): 4}, 99),
             3: frequent({(new, york, city): 4}, 98)}
    pairs = ngrams.pmi(found, 2)
    place = int(np.searchsorted(found[2].keys, ngrams._part_key(
        np.array([[new, york]], np.uint64), 0, 2))[0])
    assert pairs[place] == pytest.approx(2.3126, abs=1e-4)
    assert ngrams.pmi(found, 3) == pytest.approx([1.4373], abs=1e-4)


def plain_ngrams(prefix: str) -> dict[int, Counter]:
    times: dict[int, Counter] = {n: Counter() for n in range(1, 6)}
    for document in plain_words(prefix):
        for words in document:
            for n in times:
                for i in range(len(words) - n + 1):
                    gram = tuple(pieces for pieces, _ in words[i : i + n])
                    if all(map(known, gram)):
                        times[n][gram] += 1
    return times


def plain_pmi(gram: tuple, times: dict[int, Counter]) -> float:
    def log_share(part):
        return math.log(times[len(part)][part] / times[len(part)].total())

    best = math.inf
    for cuts in range(1, len(gram)):
        for where in itertools.combinations(range(1, len(gram)), cuts):
            edges = (0, *where, len(gram))
            parts = sum(log_share(gram[a:b]) for a, b in itertools.pairwise(edges))
            best = min(best, log_share(gram) - parts)
    return best


def key_of(gram: tuple) -> int:
    lengths = np.array([len(pieces) for pieces in gram])
    pieces = np.array([i for word in gram for i in word], np.uint16)
    rows = hash_words(pieces, np.cumsum(lengths) - lengths, lengths)[None]
    return int(ngrams._part_key(rows, 0, len(gram))[0])


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("name", ["one", "many"])
def test_ngrams_are_those_of_plain_counts(stores, name, bits):
    """With few counters nearly all n-grams collide: what is counted exactly stays the same."""
    times = plain_ngrams(stores[name])
    found = ngrams.count_ngrams(counting(stores[name], block_tokens=300), 1.0, 5, bits)
    for n in range(1, 6):
        wanted = {key_of(gram): count for gram, count in times[n].items() if count >= 5}
        assert dict(zip(found[n].keys.tolist(), found[n].counts.tolist(), strict=True)) == wanted
        assert found[n].total == times[n].total()
        assert len(wanted) > 3
        if n > 1:
            values = dict(zip(found[n].keys.tolist(), ngrams.pmi(found, n).tolist(), strict=True))
            for gram, count in times[n].items():
                if count >= 5:
                    assert values[key_of(gram)] == pytest.approx(plain_pmi(gram, times))


def plain_units(prefix: str, listed: dict[tuple, float]) -> tuple[np.ndarray, np.ndarray]:
    """Cut a store into units one entry at a time."""
    from preprocess.masking.draws import counter_bits

    scores, units = [], []
    for document in plain_words(prefix):
        for words in document:
            gram = [pieces for pieces, _ in words]
            spans = [(i, i + n) for n in range(2, 6) for i in range(len(words) - n + 1)
                     if tuple(gram[i : i + n]) in listed]
            spans = [(a, b) for a, b in spans
                     if not any(c <= a and b <= d and d - c > b - a for c, d in spans)]
            place = {a: words[a][1] for a, _ in spans}
            spans.sort(key=lambda span: (int(counter_bits(
                0, 0, np.array([place[span[0]]]), ngrams.STREAM_OVERLAPS)[0]), place[span[0]]))
            taken: list[tuple[int, int]] = []
            for a, b in spans:
                if all(b <= c or d <= a for c, d in taken):
                    taken.append((a, b))
            value, inside = [0.0] * len(words), [False] * len(words)
            for a, b in taken:
                value[a:b] = [listed[tuple(gram[a:b])]] * (b - a)
                inside[a + 1 : b] = [True] * (b - a - 1)
            for i, pieces in enumerate(gram):
                scores += [value[i]] * len(pieces)
                units += [int(inside[i])] + [1] * (len(pieces) - 1)
    return np.array(scores).astype(np.float16), np.array(units, np.uint8)


@pytest.mark.parametrize("name", ["one", "many"])
def test_pmi_is_that_of_plain_python(stores, name):
    times = plain_ngrams(stores[name])
    here = counting(stores[name], block_tokens=300)
    scored = ngrams.score_pmi(here, 5, 12)
    values = {gram: plain_pmi(gram, times) for n in range(2, 6)
              for gram, count in times[n].items() if count >= 5}
    sizes = {}
    for n, each in {2: 2, 3: 4, 4: 8, 5: 8}.items():
        ranked = sorted((gram for gram in values if len(gram) == n and values[gram] > 0),
                        key=lambda gram: (-round(values[gram], 9), key_of(gram)))
        sizes |= {gram: each * rank for rank, gram in enumerate(ranked, 1)}

    def covered(size: int) -> float:
        inside = total = 0
        for document in plain_words(stores[name]):
            for words in document:
                at = set()
                for n in range(2, 6):
                    for i in range(len(words) - n + 1):
                        gram = tuple(pieces for pieces, _ in words[i : i + n])
                        if sizes.get(gram, size + 1) <= size:
                            at |= set(range(i, i + n))
                inside += sum(len(words[i][0]) for i in at)
                total += sum(len(pieces) for pieces, _ in words)
        return inside / total

    size = next(size for size in sorted(sizes.values()) if covered(size) >= 0.5)
    listed = {gram: values[gram] for gram in values if sizes.get(gram, size + 1) <= size}
    assert scored.counts["covered"] == pytest.approx(covered(size))
    assert scored.counts["entries"] == {
        str(n): sum(len(gram) == n for gram in listed) for n in range(2, 6)}
    scores, units = plain_units(stores[name], listed)
    shards = here.store.shards
    assert (np.concatenate([u for s in shards for u in scored.units(s)]) == units).all()
    found = np.concatenate([x for s in shards for x in scored.scores(s)])
    assert np.allclose(found, scores, rtol=1e-3) and ((found > 0) == (scores > 0)).all()


def test_listed_ngrams_are_found_by_their_hash():
    """Also where many begin with the same bits, at the end of the table too."""
    rng = np.random.default_rng(0)
    inverse = np.uint64(pow(int(ngrams._SPREAD), -1, 1 << 64))
    keys = np.concatenate([
        rng.integers(0, 1 << 63, 500, np.uint64),
        (np.uint64(0) - np.arange(1, 4, dtype=np.uint64)) * inverse,  # the largest hashes
        np.arange(40, dtype=np.uint64) * inverse])
    listed = np.sort(np.concatenate([keys[:257], keys[-43:]]))
    found = ngrams.NgramList(listed, np.arange(300))
    there = rng.random(len(keys)) < 0.9
    places, values = found.find(keys, there)
    number = {key: i for i, key in enumerate(listed.tolist())}
    wanted = [(i, number[key]) for i, key in enumerate(keys.tolist()) if there[i] and key in number]
    assert list(zip(places.tolist(), values.tolist(), strict=True)) == wanted
    places, _ = ngrams.NgramList(listed[:0], np.arange(0)).find(keys, there)
    assert len(places) == 0


def test_overlapping_entries_are_taken_by_priority():
    """Long chains of overlaps, against one entry at a time."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        longest = rng.choice([0, 2, 3, 4, 5], 40, p=[0.3, 0.25, 0.2, 0.15, 0.1])
        longest[-5:] = 0
        priorities = rng.permutation(40)
        spans = [(i, i + n) for i, n in enumerate(longest.tolist()) if n]
        spans = [(a, b) for a, b in spans
                 if not any(c <= a and b <= d and d - c > b - a for c, d in spans)]
        taken: list[tuple[int, int]] = []
        for a, b in sorted(spans, key=lambda span: priorities[span[0]]):
            if all(b <= c or d <= a for c, d in taken):
                taken.append((a, b))
        found = ngrams.choose_entries(longest, priorities)
        assert found.tolist() == sorted(a for a, _ in taken)


def test_a_large_store_is_sampled(stores, monkeypatch):
    monkeypatch.setattr(ngrams, "MAX_COUNTED", TokenStore.open(stores["one"]).num_tokens // 2)
    one = ngrams.score_pmi(counting(stores["one"]), 3, 12)
    many = ngrams.score_pmi(counting(stores["many"], block_tokens=90), 3, 12)
    assert one.counts == many.counts and one.counts["counted_share"] < 0.51
    assert "of the sequences, since the store has more than" in one.note


def test_a_store_without_ngrams_is_refused(tmp_path, tokenizer):
    write(tmp_path / "small", [[np.array([9, 10, 11], np.uint16)]], None, tokenizer)
    with pytest.raises(DataError, match="none of its n-grams occurs 11 times"):
        score(str(tmp_path / "small"), "pmi", "--measure", "pmi")


# ------------------------------------------------------------------------------------ combining


RECORD = {"name": "scorer", "boundary": True, "unit": "log-odds", "reads_labels": True}


@pytest.fixture
def scored(tmp_path, tokenizer) -> str:
    """A store of two shards with scores a and b (log-odds, with ties) and t (no boundary)."""
    documents = make_documents(5, 40)
    for i, part in enumerate((documents[:25], documents[25:])):
        write(tmp_path / "store", part, (i, 2), tokenizer)
    prefix = str(tmp_path / "store")
    rng = np.random.default_rng(2)
    for shard in TokenStore.open(prefix).shards:
        for name in ("a", "b", "t"):
            values = rng.normal(-0.5, 1, shard.num_tokens).round(1).astype(np.float16)
            measure = RECORD if name != "t" else {
                "name": "tfidf", "boundary": False, "unit": "tf x nats", "reads_labels": False}
            write_array(shard, name, "scores", np.abs(values) if name == "t" else values,
                        {"measure": measure})
    return prefix


def test_max_and_mean(scored):
    a, b = (read(scored, name).astype(np.float64) for name in "ab")
    assert (score(scored, "m", "--combine", "max", "--scores", "a", "b") == np.maximum(a, b)).all()
    found = score(scored, "n", "--combine", "mean", "--scores", "a", "b")
    assert (found == ((a + b) / 2).astype(np.float16)).all()
    assert info(scored, "m")["measure"] == {**RECORD, "name": "combine"}


def test_rank_is_the_mean_percentile_in_the_store(scored):
    from scipy.stats import rankdata

    parts = [read(scored, name) for name in "at"]
    shares = np.mean([(rankdata(part) - 0.5) / len(part) for part in parts], axis=0)
    found = score(scored, "r", "--combine", "rank", "--scores", "a", "t")
    assert np.allclose(found, -np.log2(1 - shares), rtol=1e-3)
    assert info(scored, "r")["measure"] == {
        "name": "combine", "boundary": False, "unit": "log2 of rarity",
        "reads_labels": True}


@pytest.mark.parametrize("names", ["ab", "at"])
def test_union_is_the_largest_percentile_in_the_sequence(scored, names):
    wanted = []
    for shard in TokenStore.open(scored).shards:
        parts = [open_array(shard, name, "scores")[0] for name in names]
        for a, b in itertools.pairwise(np.asarray(shard.sequence_offsets).tolist()):
            for i in range(a, b):
                best = 0.0
                for name, part in zip(names, parts, strict=True):
                    here = part[a:b].tolist()
                    below, equal = (sum(x < part[i] for x in here), here.count(part[i]))
                    if name == "t" or part[i] > 0:
                        best = max(best, (below + equal / 2) / len(here))
                wanted.append(-math.log2(1 - best))
    found = score(scored, "u", "--combine", "union", "--scores", *names)
    assert np.allclose(found, wanted, rtol=1e-3)
    boundary = names == "ab"
    assert info(scored, "u")["measure"]["boundary"] is boundary
    if boundary:
        positive = (read(scored, "a") > 0) | (read(scored, "b") > 0)
        assert ((found > 0) == positive).all()


def test_scores_are_ordered_as_numbers():
    values = np.array([-np.inf, -65504, -1, -6e-8, -0.0, 0.0, 6e-8, 1, 65504], np.float16)
    found = combine.ordered(values).tolist()
    assert found == sorted(found) and found[4] == found[5] and len(set(found)) == 8


@pytest.mark.parametrize(("words", "message"), [
    (["--combine", "max", "--scores", "a"], "needs two or more"),
    (["--combine", "max", "--scores", "a", "a"], "needs two or more"),
    (["--combine", "max", "--scores", "a", "t"], r"a \(log-odds, parted at 0\) and t \(tf x nats"),
    (["--combine", "max"], "--combine max needs --scores"),
    (["--combine", "rank", "--scores", "a", "new"], "is one of the --scores"),
    (["--combine", "rank", "--scores", "a", "zzz"], r"--scores zzz: .* \(known: a, b, t\)"),
    (["--combine", "rank", "--measure", "tfidf"], "both is given"),
    ([], "neither is given"),
    (["--measure", "rare"], "invalid choice"),
    (["--measure", "difference"], "needs --against"),
    (["--measure", "lexicon"], "needs --lexicon"),
    (["--measure", "tfidf", "--against", "Q"], "--against has no use with --measure tfidf"),
    (["--measure", "tfidf", "--scores", "a", "b"], "--scores has no use"),
    (["--measure", "tfidf", "--language", "en"], "--language has no use"),
    (["--measure", "content", "--language", "xx"], "invalid choice"),
    (["--measure", "tfidf", "--shard_index", "0", "--num_shards", "3"], "has 2 shards"),
])
def test_wrong_options(scored, words, message):
    with pytest.raises((ConfigError, DataError), match=message):
        score(scored, "new", *words)


def test_scores_of_another_store_and_of_an_older_version_are_refused(scored, stores):
    for kind in ("npy", "json"):
        for i in range(2):
            source = Path(f"{stores['one']}.foreign.scores.{kind}")
            score(stores["one"], "foreign", "--measure", "content")
            Path(f"{scored}-{i:05}-of-00002.f.scores.{kind}").write_bytes(source.read_bytes())
    with pytest.raises(DataError, match="made for the store"):
        score(scored, "new", "--combine", "rank", "--scores", "a", "f")
    for shard in TokenStore.open(scored).shards:
        write_array(shard, "old", "scores", np.zeros(shard.num_tokens, np.float16), {})
    with pytest.raises(DataError, match="made by an older version"):
        score(scored, "new", "--combine", "rank", "--scores", "a", "old")


def test_scores_that_are_not_finite_are_refused(scored):
    for shard in TokenStore.open(scored).shards:
        values = np.full(shard.num_tokens, np.nan, np.float16)
        write_array(shard, "broken", "scores", values, {"measure": RECORD})
    with pytest.raises(DataError, match="scores broken are not all finite"):
        score(scored, "new", "--combine", "max", "--scores", "a", "broken")


def test_stores_that_cannot_be_compared(stores, tmp_path):
    names = [*NAMES, "extra"]
    write(tmp_path / "foreign", make_documents(3, 5), None, make_tokenizer(names))
    write(tmp_path / "empty", [], None, make_tokenizer(NAMES))
    for other, message in ((tmp_path / "foreign", "made with another tokenizer"),
                           (stores["one"], "so nothing differs"),
                           (tmp_path / "empty", "has no words to count")):
        with pytest.raises((ConfigError, DataError), match=message):
            score(stores["one"], "new", "--measure", "difference", "--against", str(other))


def test_a_tokenizer_without_words_is_refused(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.Unigram([("[UNK]", 0.0), ("a", -1.0)], 0))
    unigram = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]")
    write(tmp_path / "store", [[np.array([1, 1], np.uint16)]], None, unigram)
    with pytest.raises(ConfigError, match="--measure tfidf counts words, and .* has none"):
        score(str(tmp_path / "store"), "new", "--measure", "tfidf")


# ---------------------------------------------------------------------------------- the command


@pytest.fixture
def frequent(monkeypatch):
    """Small stores have n-grams too."""
    record = COUNTED["pmi"]
    monkeypatch.setitem(COUNTED, "pmi", record._replace(
        score=lambda counting: ngrams.score_pmi(counting, 5, 12)))


def options(name: str, stores: dict[str, str], lexicon: str) -> list[str]:
    more = {"difference": ["--against", stores["other"]], "lexicon": ["--lexicon", lexicon]}
    return ["--measure", name, *more.get(name, [])]


@pytest.mark.parametrize("name", list(COUNTED))
def test_shards_change_no_score_and_say_what_made_them(stores, lexicon_file, name, frequent):
    words = options(name, stores, lexicon_file)
    whole = score(stores["one"], f"whole-{name}", *words)
    assert np.isfinite(whole).all() and len(set(whole.tolist())) > 1
    for i in (2, 0, 3, 1):
        main(["--tokens", stores["many"], "--name", f"parts-{name}", *words, "--shard_index",
              str(i), "--num_shards", "4"])
    assert (read(stores["many"], f"parts-{name}") == whole).all()
    kept = info(stores["one"], f"whole-{name}")
    assert kept["measure"] == COUNTED[name].record(name)
    assert kept["seconds"] >= 0 and kept["identity"]["options"]["measure"] == name
    assert kept["options"]["measure"] == name
    if COUNTED[name].has_units:
        units = read(stores["one"], f"whole-{name}", "units")
        assert (units == read(stores["many"], f"parts-{name}", "units")).all()
        assert set(units.tolist()) == {0, 1}


def test_complete_scores_are_kept_and_others_refused(stores, lexicon_file, capsys):
    prefix = stores["many"]
    words = ["--measure", "lexicon", "--lexicon", lexicon_file]
    score(prefix, "again", *words)
    before = {path: path.stat().st_mtime_ns for path in Path(prefix).parent.glob("*again*.npy")}
    assert len(before) == 4
    score(prefix, "again", *words)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert "4 of 4 shards are scored already, 0 tokens" in capsys.readouterr().out
    Path(lexicon_file).write_text("w1,3\n")
    with pytest.raises(ConfigError, match="made with --lexicon .*; give another --name"):
        score(prefix, "again", *words)
    with pytest.raises(ConfigError, match="made with --measure lexicon, and this run has tfidf"):
        score(prefix, "again", "--measure", "tfidf")
    for path in Path(prefix).parent.glob("many-00001*again*"):
        path.unlink()
    with pytest.raises(ConfigError, match="00000-of-00004.again.*--overwrite for every shard"):
        score(prefix, "again", *words, "--shard_index", "1", "--num_shards", "4")
    assert set(score(prefix, "again", *words, "--overwrite").tolist()) == {0, 3}


def test_units_go_with_the_scores_that_they_belong_to(stores, frequent):
    score(stores["one"], "mine", "--measure", "pmi")
    path = array_path(TokenStore.open(stores["one"]).shards[0], "mine", "units")
    assert path.exists()
    score(stores["one"], "mine", "--measure", "content", "--overwrite")
    assert not path.exists() and not path.with_suffix(".json").exists()


def test_changed_parts_are_noticed(scored):
    words = ["--combine", "max", "--scores", "a", "b"]
    score(scored, "both", *words)
    for shard in TokenStore.open(scored).shards:
        write_array(shard, "b", "scores", np.ones(shard.num_tokens, np.float16),
                    {"measure": RECORD})
    with pytest.raises(ConfigError, match=r"made with --scores \(content\)"):
        score(scored, "both", *words)


def test_help_explains_each_measure(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for name, measure in COUNTED.items():
        assert f"{name}: {measure.rule}" in text
