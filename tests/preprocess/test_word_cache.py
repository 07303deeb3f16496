"""Words that are looked up: the ids and boundaries of the tokenizer itself, in bounded memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess import train_tokenizer
from preprocess.text import encode, word_cache
from preprocess.text.encode import encode_batch, prepare_backend
from preprocess.text.word_cache import WordCache

TEXT = "The caf\u00e9, isn't it? \u65e5\u672c\u3002 \u201cQuite.\u201d It ends\u2026 3.14"
# What could tell a word's neighbours from each other: marks, accents, spaces of many kinds.
PIECES = st.sampled_from(
    "a b C word word. Mr. it's don't ... ? !\" (x) <br/> [MASK] \u3002 \u65e5\u672c e\u0301 \u0301 "
    "\u0130 \u03a3 \ufb01 \u00a8 \u2026 \U0001f600 \x1c \x0b \x00 \x85 \u00a0 \u3000 \n \r \t"
    .split(" ") + ["", " ", "  "]
)
TEXTS = st.lists(st.lists(PIECES, max_size=12).map(" ".join) | st.text(max_size=12), max_size=4)


def backend_of(normalizer=None, splitter=None, kind="wordpiece", **options):
    """A tokenizer that has learnt from `TEXT`; other parts may be put in."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(LEARNT[kind])
    if normalizer is not None:
        tokenizer.normalizer = getattr(tokenizers.normalizers, normalizer)(**options)
    if splitter is not None:
        tokenizer.pre_tokenizer = splitter
    return prepare_backend(type("Fast", (), {"backend_tokenizer": tokenizer}))


@pytest.fixture(scope="module", autouse=True)
def learn(tmp_path_factory):
    """Vocabularies of both kinds, as JSON."""
    folder = tmp_path_factory.mktemp("vocabularies")
    (folder / "text.txt").write_text(f"{TEXT}\n" * 9, encoding="utf-8")
    for kind in train_tokenizer.KINDS:
        train_tokenizer.main([
            "--input", str(folder / "text.txt"), "--vocab_size", "300", "--kind", kind,
            "--output", str(folder / kind),
        ])
        LEARNT[kind] = (folder / kind / "tokenizer.json").read_text()


LEARNT: dict[str, str] = {}


def caches() -> dict[str, WordCache]:
    """One of each kind of tokenizer whose words are looked up."""
    from tokenizers.pre_tokenizers import ByteLevel

    made = {
        "uncased": backend_of("BertNormalizer"),
        "cased": backend_of("BertNormalizer", lowercase=False, strip_accents=False),
        "pieces": backend_of("BertNormalizer", handle_chinese_chars=False, strip_accents=True),
        "bytes": backend_of(kind="bpe"),
        "nfc": backend_of("NFC", kind="bpe"),
        "prefix": backend_of(splitter=ByteLevel(add_prefix_space=True), kind="bpe"),
    }
    return {name: WordCache(backend) for name, backend in made.items()}


@pytest.fixture(scope="module")
def remembering(learn) -> dict[str, WordCache]:
    found = caches()
    assert all(cache._kind for cache in found.values())
    return found


def check_equal(found, expected) -> None:
    for ours, plain in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, plain)


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.sampled_from(["en", None]))
def test_the_ids_are_those_of_whole_texts(remembering, texts, language):
    for cache in remembering.values():
        check_equal(cache.encode(texts, language), encode_batch(cache.backend, texts, language))


def test_most_texts_are_looked_up(learn):
    """Else the test above would compare the slow way with itself."""
    for name, cache in caches().items():
        seen: list = []
        cache.backend = Spy(cache.backend, seen)
        for _ in range(2):
            cache.encode(["The end. It is good", "a word, again"], "en")
        first, second = seen  # no call for whole texts
        assert len(first) >= 8 and second == [], name
        assert not {"The end. It is good", "a word, again"} & set(first)


class Spy:
    """A backend that notes which of its methods are called, and with which words."""

    def __init__(self, real, seen: list) -> None:
        self.real, self.seen = real, seen

    def encode(self, words, **options):
        self.seen.append(words)
        return self.real.encode(words, **options)

    def encode_batch(self, texts, **options):
        self.seen.append(texts)
        return self.real.encode_batch(texts, **options)


@pytest.mark.parametrize("why", ["added", "dirty", "dropout", "splitter", "model"])
def test_other_tokenizers_see_whole_texts(learn, why):
    import tokenizers

    bert = why in ("added", "dirty", "splitter")
    backend = backend_of("BertNormalizer", clean_text=why != "dirty") if bert else backend_of(
        kind="bpe"
    )
    if why == "added":
        backend.add_tokens(["two words"])
    elif why == "splitter":
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    elif why == "dropout":
        backend.model.dropout = 0.1
    elif why == "model":
        backend.model = tokenizers.models.Unigram([("<unk>", 0.0), ("\u2581", -1.0)], 0)
    cache = WordCache(backend)
    assert not cache._kind
    if why != "dropout":
        texts = ["two words here. And there", ""]
        check_equal(cache.encode(texts, "en"), encode_batch(backend, texts, "en"))


def test_words_are_forgotten_before_they_fill_the_memory(remembering, monkeypatch):
    monkeypatch.setattr(word_cache, "MAX_CACHE_BYTES", 5000)
    generator = np.random.default_rng(0)
    for cache in remembering.values():
        for _ in range(20):
            texts = ["".join(map(chr, generator.integers(97, 122, 300))) + " the end. Is it"]
            check_equal(cache.encode(texts, "en"), encode_batch(cache.backend, texts, "en"))
            assert len(cache._ids) < 60


def test_a_long_document_is_worked_on_in_blocks(remembering, monkeypatch):
    text = " ".join(f"word{i}. It  is \u65e5\u672c" if i % 9 else "End" for i in range(400))
    whole = {name: encode_batch(c.backend, [text], None) for name, c in remembering.items()}
    monkeypatch.setattr(encode, "BLOCK_CHARACTERS", 300)
    blocks = list(encode.cut_blocks(text))
    assert "".join(blocks) == text and len(blocks) > 20
    assert all(len(block) <= 300 and block[0] == " " for block in blocks[1:])
    seen: list = []  # a tokenizer takes 170 times the size of each text that it is given
    encode_batch(Spy(remembering["uncased"].backend, seen), [text, "end"], "en")
    assert len(seen) == len(blocks) + 1 and max(len(t) for texts in seen for t in texts) <= 300
    hard = "x" * 1000
    assert [len(block) for block in encode.cut_blocks(hard)] == [300, 300, 300, 100]
    for name, cache in remembering.items():
        check_equal(encode_batch(cache.backend, [text], None), whole[name])
        texts = ["short one. Two", text, " " * 700, "end"]
        ids, lengths, documents, dropped = cache.encode(texts, "en")
        assert dropped == 1 and documents[0] == 2 and documents[2] == 1 and len(documents) == 3
        assert lengths.sum() == len(ids) and len(lengths) == documents.sum()
        first = len(encode_batch(cache.backend, texts[:1], None)[0])
        np.testing.assert_array_equal(ids[first : first + len(whole[name][0])], whole[name][0])
