"""What a tokenizer must have before anything is made with it, and what is said about its work."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from preprocess import tokenize_corpus
from preprocess.corpus import Example
from preprocess.errors import ConfigError, DataError
from preprocess.store import TokenStore
from preprocess.text.checks import cased_share, check_tokenizer, describe_tokenizing, lowers_case
from preprocess.text.continuations import check_words, continuation_table, find_continuations
from preprocess.text.encode import prepare_backend, user_tokens
from tests.support.language import WORDS
from train.stages.finetuning import encode

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
NAMES = {f"{name.strip('[]').lower()}_token": name for name in SPECIAL}


def make(words=WORDS, lowercase=True, single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
         **names):
    """A WordPiece tokenizer; a name that is None is left out."""
    vocabulary = {name: i for i, name in enumerate([*SPECIAL, *words])}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if single:
        inner.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {key: name for key, name in {**NAMES, **names}.items() if name}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def byte_level(**options):
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, **options)
    from tokenizers import trainers
    inner.train_from_iterator(["a film"], trainers.BpeTrainer(
        special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return inner


# --------------------------------------------------------------------------- what it must have


def test_a_tokenizer_that_has_everything():
    check_tokenizer(make(), "t", pair=True)


@pytest.mark.parametrize("role", ["pad", "mask", "cls", "sep", "unk"])
def test_a_token_without_a_name(role):
    with pytest.raises(DataError, match=rf't: its tokenizer names no {role} token.*"{role}_token":'
                                        rf' "\[{role.upper()}\]"'):
        check_tokenizer(make(**{f"{role}_token": None}), "t")


@pytest.mark.parametrize(("names", "match"), [
    ({"pad_token": "[SEP]"}, r"pad token '\[SEP\]' is its sep token too"),
    ({"mask_token": "[UNK]"}, r"mask token '\[UNK\]' is its unk token too"),
    ({"mask_token": "[PAD]"}, r"mask token '\[PAD\]' is its pad token too"),
])
def test_two_roles_for_one_token(names, match):
    with pytest.raises(DataError, match=match):
        check_tokenizer(make(**names), "t")


@pytest.mark.parametrize(("single", "made"), [
    (None, "a"), ("[CLS] $A", r"\[CLS\] a"), ("$A [SEP]", r"a \[SEP\]"),
    ("[SEP] $A [CLS]", r"\[SEP\] a \[CLS\]"), ("[CLS] $A [SEP] [SEP]", r"\[CLS\] a \[SEP\] \[SEP"),
])
def test_a_text_without_its_special_tokens(single, made):
    with pytest.raises(DataError, match=f"makes '{made}.*' of a text, .*TemplateProcessing"):
        check_tokenizer(make(single=single), "t")


@pytest.mark.parametrize("pair", ["$A $B", "[CLS] $A $B [SEP]", "[CLS] $A [SEP] $B"])
def test_a_pair_without_its_special_tokens(pair):
    tokenizer = make(pair=pair)
    check_tokenizer(tokenizer, "t")  # single texts are right
    with pytest.raises(DataError, match="of two texts"):
        check_tokenizer(tokenizer, "t", pair=True)


def test_the_check_leaves_the_tokenizer_as_it_was():
    tokenizer = make()
    tokenizer.backend_tokenizer.enable_truncation(7)
    before = tokenizer.backend_tokenizer.to_str()
    check_tokenizer(tokenizer, "t", pair=True)
    assert tokenizer.backend_tokenizer.to_str() == before


@pytest.mark.parametrize("adopt", [False, True])
def test_nothing_is_written_with_such_a_tokenizer(tmp_path, reviews_file, reviews_store, adopt):
    make(mask_token=None).save_pretrained(tmp_path / "t")
    command = ["--adopt", "--input", reviews_store] if adopt else ["--input", reviews_file]
    with pytest.raises(DataError, match="no mask token"):
        tokenize_corpus.main(
            [*command, "--tokenizer", str(tmp_path / "t"), "--output", str(tmp_path / "s" / "s")])
    assert not (tmp_path / "s").exists()


# --------------------------------------------------------------------------- added tokens


def marked(tmp_path):
    tokenizer = make()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>"]})
    tokenizer.add_tokens(["<url>"], special_tokens=True)
    tokenizer.add_tokens(["gastropub"])
    tokenizer.save_pretrained(tmp_path / "marked")
    return AutoTokenizer.from_pretrained(tmp_path / "marked")


def test_what_the_user_added_is_kept_whole_and_what_the_model_reserves_is_text(tmp_path):
    tokenizer = marked(tmp_path)
    assert user_tokens(tokenizer) == ["<user>", "<url>", "gastropub"]
    assert user_tokens(make()) == []
    text = "a <user> film [SEP] <url> [MASK] gastropub"
    tokens = prepare_backend(tokenizer).encode(text, add_special_tokens=False).tokens
    assert [t for t in tokens if t != "[UNK]"] == ["a", "<user>", "film", "<url>", "gastropub"]
    made = encode(tokenizer, [Example(text, 0, None)], 30, True).input_ids[0].tolist()
    ids = tokenizer.convert_tokens_to_ids(tokens)
    assert made == [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]


def test_tokens_that_a_model_reserves_without_a_role():
    """Special tokens among those with a role are not the user's, as `<|padding|>` of ModernBERT."""
    vocabulary = {name: i for i, name in enumerate(["<|padding|>", *SPECIAL, "a"])}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.add_special_tokens(["<|padding|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **NAMES)
    assert user_tokens(tokenizer) == []
    assert "<|padding|>" not in prepare_backend(tokenizer).encode("a <|padding|>").tokens


def test_a_store_keeps_added_tokens_and_adopting_does_not_strip_them(tmp_path):
    tokenizer = marked(tmp_path)
    (tmp_path / "a.txt").write_text("<user> a good film <url>\nthe plot <user>\n" * 3)
    command = ["--tokenizer", str(tmp_path / "marked"), "--num_workers", "1"]
    prefixes = [str(tmp_path / "s"), str(tmp_path / "t")]
    tokenize_corpus.main([*command, "--input", str(tmp_path / "a.txt"), "--output", prefixes[0]])
    tokenize_corpus.main([*command, "--adopt", "--input", prefixes[0], "--output", prefixes[1]])
    first, second = (TokenStore.open(prefix).shards[0].tokens for prefix in prefixes)
    assert first.tolist() == second.tolist()
    assert (np.array(first) == tokenizer.convert_tokens_to_ids("<user>")).sum() == 6


# --------------------------------------------------------------------------- what is said


CASED = [*WORDS, *(word.title() for word in WORDS if word.isalpha())]


@pytest.mark.parametrize(("words", "lowercase", "says"), [
    (WORDS, True, ""), (CASED, False, ""),
    (CASED, True, "it lower-cases, but"), (WORDS, False, "it keeps capital letters, but"),
    (["\u4e2d", "\u6587"], False, ""),  # no case at all
])
def test_case_of_vocabulary_and_tokenizer(words, lowercase, says):
    tokenizer = make(words, lowercase)
    assert lowers_case(tokenizer) == lowercase
    line = describe_tokenizing(tokenizer, "t", 100, 0)
    assert line.startswith("warning: ") == bool(says) and says in line


def test_case_of_a_byte_level_vocabulary():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), **NAMES)
    assert not lowers_case(tokenizer) and cased_share(tokenizer) > 0.3
    assert not describe_tokenizing(tokenizer, "t", 100, 0).startswith("warning")


@pytest.mark.parametrize(("unknown", "warns"), [(0, False), (10, False), (11, True)])
def test_share_of_unknown_tokens(unknown, warns):
    line = describe_tokenizing(make(), "t", 1000, unknown)
    assert line.startswith("warning") == warns and f"{unknown / 1000:.1%} [UNK]" in line


def test_the_last_line_counts_the_store(tmp_path, capsys, tiny_encoder):
    (tmp_path / "a.txt").write_text("a good film zzz\n" * 8 + "the plot\n" * 2)
    command = ["--input", str(tmp_path / "a.txt"), "--tokenizer", tiny_encoder,
               "--num_workers", "1", "--num_shards", "2", "--output", str(tmp_path / "s")]
    tokenize_corpus.main(command)
    last = capsys.readouterr().out.splitlines()[-1]
    store = TokenStore.open(str(tmp_path / "s"))
    unknown = sum(int((np.array(shard.tokens) == 1).sum()) for shard in store.shards)
    assert unknown == store.info["counts"]["unknown_tokens"] == 8
    assert last.startswith("warning: tokenizer") and f"{8 / store.num_tokens:.1%} [UNK]" in last
    tokenize_corpus.main(command)  # complete already: said again
    assert capsys.readouterr().out.splitlines()[-1] == last


# --------------------------------------------------------------------------- words


def test_where_words_cannot_be_told_apart():
    for inner in (Tokenizer(models.Unigram()), Tokenizer(models.BPE()), Tokenizer(models.WordLevel(
            {"a": 0}, unk_token="a"))):
        with pytest.raises(ConfigError, match="word boundaries are known for"):
            check_words(inner)
    for one in (byte_level(use_regex=False),):
        with pytest.raises(ConfigError, match="does not split a text at its spaces"):
            continuation_table(one)
    whole = make(["a", "film"])
    with pytest.raises(ConfigError, match="no token of this tokenizer continues a word"):
        check_words(whole)
    assert "no masking by words" in describe_tokenizing(whole, "t", 10, 0)


def test_a_chinese_character_is_a_word():
    tokenizer = make(["\u4e2d", "\u6587", "##\u6587", "a"])
    assert check_words(tokenizer) == "by ##; a Chinese character is a word"
    assert check_words(make(["\u4e2d", "\u6587"])).startswith("each Chinese character is a word")
    inner = byte_level()
    ids = inner.encode("\u4e2d\u6587ab \u4e2d1").ids
    table = continuation_table(inner)
    found = find_continuations(np.array(ids, np.uint16), np.array([0, len(ids)]), table)
    starts = [inner.id_to_token(i) for i, c in zip(ids, found, strict=True) if not c]
    # Two characters, the word "ab", the space, the character behind it (three bytes), the digit.
    assert len(ids) == 13 and len(starts) in (5, 6) and not found[[0, 3, 6]].any()
    assert found[[1, 2, 4, 5, 7]].all()


def test_an_encoded_pair_is_that_of_transformers(tiny_tokenizer):
    examples = [Example("a good film with a plot", 0, "the plot"), Example("bad", 1, "war")]
    for length in (30, 8):
        made = encode(tiny_tokenizer, examples, length, True)
        theirs = tiny_tokenizer(
            [e.aspect for e in examples], [e.text for e in examples],
            truncation="longest_first", max_length=length, return_token_type_ids=True)
        assert [ids.tolist() for ids in made.input_ids] == theirs["input_ids"]
        assert [ids.tolist() for ids in made.token_type_ids] == theirs["token_type_ids"]


def test_an_edited_file_says_so(tmp_path, tiny_encoder):
    """A post-processor removed from tokenizer.json, as by a conversion."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    tokenizer.save_pretrained(tmp_path / "t")
    path = tmp_path / "t" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    with pytest.raises(DataError, match="training puts"):
        check_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "t"), "t")
