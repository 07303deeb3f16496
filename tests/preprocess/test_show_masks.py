"""The viewer: marks, joined word pieces, recorded options, escaped pages, refusals."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from preprocess import build_masks, show_masks
from preprocess.errors import ConfigError, DataError
from preprocess.masking import STRATEGIES
from preprocess.show_masks import main
from preprocess.store import TokenStore, write_array
from preprocess.view import page as mask_page
from preprocess.view.choice import draw_documents, find_word, take_documents
from preprocess.view.origins import source_scores
from preprocess.view.pieces import Piece, boxes, printable, read_sequence, split_text
from preprocess.view.scale import Scale
from preprocess.view.terminal import mark_piece, mark_sequence
from tests.support.stores import MEASURED, write

ROOT = Path(show_masks.__file__).parents[1]
WORDS = "the film is un ##believ ##able , and I ' m glad ( very ) <b> & don t . \x1b".split(" ")
SENTENCES = ["the film is un ##believ ##able , and", "I ' m glad ( very ) .", "<b> & don ' t \x1b"]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    inner = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    )


@pytest.fixture(scope="module")
def byte_level():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(["<pad>", "<mask>", *alphabet])}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", mask_token="<mask>"
    )


@pytest.fixture
def store(tmp_path, tokenizer):
    """Documents 0 (two sentences) and 1 (empty) in shard 0, none in 1, document 2 in shard 2."""
    ids = [tokenizer.convert_tokens_to_ids(sentence.split(" ")) for sentence in SENTENCES]
    prefix = str(tmp_path / "s")
    for i, documents in enumerate([[ids[:2], []], [], [ids[2:]]]):
        write(prefix, documents, (i, 3), tokenizer)
    for shard, positions, other in zip(
        TokenStore.open(prefix).shards,
        ([1, 4, 5, 8], [], [0, 5]),
        ([1, 2, 15], [], [0]),
        strict=True,
    ):
        options = {"options": {"strategy": "selective"}}
        write_array(shard, "sel", "mask", np.array(positions, dtype=np.uint32), options)
        write_array(shard, "ctl", "mask", np.array(other, dtype=np.uint32), options)
        scores = np.linspace(-1, 4, shard.num_tokens).astype(np.float16)
        write_array(shard, "mr", "scores", scores, MEASURED)
    return prefix


def show(prefix: str, *options: str) -> None:
    main(["--tokens", prefix, "--mask_index", "sel", *options])


def documents_of(text: str) -> list[str]:
    """The lines of the documents in what a terminal got."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("document "))
    last = next((i for i, line in enumerate(lines) if line.startswith("counted ")), len(lines))
    return lines[first:last]


# ---------------------------------------------------------------------------- tokens to text


def test_word_pieces_are_spaced_by_the_decoder(tokenizer):
    names = "un ##believ ##able , and I ' m glad".split()
    inner = tokenizer.backend_tokenizer
    ids = [inner.token_to_id(name) for name in names]
    pieces = split_text(ids, inner)
    assert [count for count, _, _ in pieces] == [1] * len(names)
    read = "".join((" " if space else "") + text for _, text, space in pieces)
    assert read.strip() == inner.decode(ids) == "unbelievable, and I ' m glad"


def test_byte_level_text_keeps_spaces_and_whole_characters(byte_level):
    text = "caf\u00e9 \U0001f600\tok"
    ids = byte_level(text)["input_ids"]
    pieces = split_text(ids, byte_level.backend_tokenizer)
    assert sum(count for count, _, _ in pieces) == len(ids)
    assert (2, "\u00e9", False) in pieces and (4, "\U0001f600", False) in pieces
    # A sequence that ends inside a character is shown, with the mark for half a one.
    assert split_text(ids[:4], byte_level.backend_tokenizer)[-1] == (1, "\ufffd", False)


def read(tokenizer, text, marked=()):
    ids = np.array(tokenizer(text)["input_ids"], dtype=np.uint16)
    masked = np.isin(np.arange(len(ids)), marked)
    pieces = read_sequence(ids, tokenizer.backend_tokenizer, masked, np.zeros_like(masked), None)
    return "".join((" " if piece.space else "") + mark_piece(piece) for piece in pieces)


def test_a_token_of_a_space_alone_is_shown_only_where_it_is_masked(byte_level):
    assert read(byte_level, "a  b") == "a b"
    assert read(byte_level, "a  b", [1]) == "a [\u2423] b"
    assert read(byte_level, "caf\u00e9s\n", [3, 4]) == "caf[\u00e9]s\u21b5"


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\x1b[31m", "\u241b[31m"), ("a\nb", "a\u21b5b"), ("\u202eevil\u202c", "evil"),
        ("\u200b", "\u2423"), ("\u0645\u06cc\u200c\u062e", "\u0645\u06cc\u200c\u062e"),
        ("\x7f\x9b", "\u2423"), ("<b>", "<b>"),
    ],
)
def test_control_characters_are_pictures_or_gone(raw, shown):
    assert printable(raw) == shown


def test_tokens_of_a_word_join_only_where_they_are_marked_alike(tokenizer):
    ids = np.array(tokenizer.convert_tokens_to_ids("un ##believ ##able".split()), dtype=np.uint16)
    none = np.zeros(3, dtype=bool)

    def pieces(masked, scores):
        scores = np.array(scores, dtype=np.float16)
        found = read_sequence(ids, tokenizer.backend_tokenizer, np.array(masked), none, scores)
        return [(piece.text, piece.level) for piece in found]

    assert pieces([True] * 3, [1, 1.5, 0.5]) == [("unbelievable", 2)]
    assert pieces([False, True, True], [1, 1, 1]) == [("un", 2), ("believable", 2)]
    assert pieces([True] * 3, [1, 3, 3]) == [("un", 2), ("believable", 3)]


def test_masked_tokens_of_one_unit_share_a_box(tokenizer):
    names = "un ##believ ##able film is very".split()
    ids = np.array(tokenizer.convert_tokens_to_ids(names), dtype=np.uint16)
    masked = np.array([0, 1, 1, 1, 0, 1], dtype=bool)
    scores = np.array([0, 3, 1, 1, 0, 0], dtype=np.float16)

    def text(continues, compared=0 * masked):
        continues = None if continues is None else np.array(continues, dtype=bool)
        pieces = read_sequence(ids, tokenizer.backend_tokenizer, masked, compared.astype(bool),
                               scores, Scale(), continues)
        html = "".join(mask_page.format_box(box, ["sel", "ctl"], Scale()) for box in boxes(pieces))
        marked = re.sub(r"</?mark[^>]*>", "|", html)
        assert html.count("<mark") == html.count("</mark>") == marked.count("|") / 2
        plain = re.sub("<[^>]*>", "", marked)
        terminal = mark_sequence(pieces).replace("+", "")
        assert re.sub(r"[\[\]{}]+", "|", terminal) == re.sub(r"\|+", "|", plain).strip()
        return mark_sequence(pieces)

    assert text(None) == "un[believ++][able+] [film+] is [very]"
    assert text([0, 1, 1, 0, 0, 0]) == "un[believ++able+] [film+] is [very]"
    assert text([0, 1, 1, 1, 0, 0]) == "un[believ++able+ film+] is [very]"
    # Another mark ends a box; a token that is not masked never shares one.
    assert text([0, 1, 1, 1, 1, 1]) == "un[believ++able+ film+] is [very]"
    other = np.array([0, 0, 0, 1, 0, 0])
    assert text([0, 1, 1, 1, 0, 0], other) == "un[believ++able+] [{film+}] is [very]"


# ------------------------------------------------------------------------------------- terminal


def test_terminal_marks_masked_tokens_and_joins_word_pieces(store, capsys):
    show(store)
    assert documents_of(capsys.readouterr().out) == [
        "document 0: 16 tokens, [4] masked (25.0 %)",
        "the [film] is un[believable], and",
        "[I] ' m glad ( very ).",
        "",
        "document 1: 0 tokens, [0] masked (-)",
        "",
        "document 2: 6 tokens, [2] masked (33.3 %)",
        "[<b>] & don ' t [\u241b]",  # an escape character never reaches the terminal
        "",
    ]


def test_terminal_compares_two_indices(store, capsys):
    show(store, "--compare", "ctl", "--num_documents", "1")
    assert documents_of(capsys.readouterr().out)[:3] == [
        "document 0: 16 tokens, [4] masked (25.0 %), {3} in ctl, 1 in both",
        "the [{film}] {is} un[believable], and",
        "[I] ' m glad ( very ){.}",
    ]


@pytest.mark.parametrize(
    ("variable", "value", "coloured"),
    [("NO_COLOR", "", True), ("NO_COLOR", "1", False), ("TERM", "dumb", False)],
)
def test_colours_only_on_a_terminal_that_wants_them(
    variable, value, coloured, store, monkeypatch, capsys
):
    for name, text in (("TERM", "xterm"), ("COLUMNS", "80"), (variable, value)):
        monkeypatch.setenv(name, text)
    show(store, "--scores", "mr")
    assert "\x1b" not in capsys.readouterr().out
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    show(store, "--scores", "mr")
    text = terminal.getvalue()
    assert ("\x1b[38;5;16;48;5;222;1;4m[I+]" in text) == coloured
    assert "[film]" in text and ("\x1b" in text) == coloured


def test_marks_grow_with_the_score():
    scores = [None, float("nan"), -3.0, -1.0, 0.0, 0.1, 2.0, 2.1, 50.0, float("inf")]
    levels = [Scale().level(score) for score in scores]
    assert levels == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3]
    marks = [mark_piece(Piece("x", False, level=level)) for level in levels]
    assert marks == ["x"] * 5 + ["x+"] * 2 + ["x++"] * 3
    assert mark_piece(Piece("x", True, True, True, 1.0, 2)) == "[{x+}]"


def test_statistics_can_be_left_out_and_follow_the_documents(store, capsys):
    show(store, "--max_statistics_tokens", "0")
    assert "Overall" not in capsys.readouterr().out
    show(store, "--compare", "ctl", "--scores", "mr")
    lines = capsys.readouterr().out.splitlines()
    table = {line[2:26].strip(): line[26:].split() for line in lines if line.startswith("  ")}
    assert table["masked tokens"] == ["6", "4"]
    assert table["in the other index too"] == ["33.3", "%", "50.0", "%"]
    assert "sel: masked most often" in lines and "ctl: masked most often" not in lines


# ------------------------------------------------------------------ scores of other measures


def test_scores_without_a_boundary_are_high_by_quantile(store, capsys, tmp_path):
    measure = {"name": "tfidf", "boundary": False, "unit": "weight", "reads_labels": False}
    for shard in TokenStore.open(store).shards:
        scores = np.arange(shard.num_tokens).astype(np.float16)
        write_array(shard, "idf", "scores", scores, {
            "options": {"measure": "tfidf", "counts": "0f" * 32}, "measure": measure})
    show(store, "--scores", "idf", "--html", str(tmp_path / "p.html"))
    capsys.readouterr()
    page = (tmp_path / "p.html").read_text()
    assert "important" not in page and "log-odds" not in page
    assert "weight, by idf" in page and "15 weight" in page
    show(store, "--scores", "idf")
    out = capsys.readouterr().out
    assert "important" not in out and "measure: tfidf, in weight; no boundary at 0" in out
    assert out.count("measure: ") == 1 and not re.search(r"[0-9a-f]{17}", out)
    # 0 to 15 and 0 to 5: three quarters are at most 10, nine tenths at most 13.
    assert "in weight: high+ (above 10), very++ (above 13)" in out
    assert documents_of(out)[2] == "[I] ' m glad+ (+ very+ )++.++"


def test_scores_with_a_boundary_are_important_above_it(store, capsys):
    measure = {"name": "difference", "boundary": True, "unit": "z", "reads_labels": False}
    for shard in TokenStore.open(store).shards:
        scores = (np.arange(shard.num_tokens) - 12.0).astype(np.float16)
        write_array(shard, "dif", "scores", scores, {"measure": measure})
    show(store, "--scores", "dif")
    out = capsys.readouterr().out
    assert "in z: important+ (above 0), very++ (above 2)" in out
    assert documents_of(out)[2] == "[I] ' m glad ( very+ )+.++"
    assert "Masked by score" in out and "Tokens above 0 are important." in out


# ------------------------------------------------------------------------ masks and their units


def test_masks_of_training_are_shown_without_an_index(store, capsys):
    files = sorted(Path(store).parent.iterdir())
    main(["--tokens", store, "--masking", "whole_word", "--mlm_probability", "0.5"])
    out = capsys.readouterr().out
    assert "masks of whole_word (drawn)\n  drawn as in the first epoch of training" in out
    assert "--mlm_probability 0.5 and --seed 42\n" in out
    assert sorted(Path(store).parent.iterdir()) == files
    build_masks.main(["--tokens", store, "--strategy", "whole_word", "--name", "built",
                      "--mlm_probability", "0.5"])
    capsys.readouterr()
    main(["--tokens", store, "--mask_index", "built"])
    assert documents_of(out) == documents_of(capsys.readouterr().out)
    main(["--tokens", store, "--masking", "random", "--compare", "built"])
    assert "in both" in capsys.readouterr().out


def test_units_are_those_that_the_index_was_built_with(store, capsys):
    shown = []
    for name, options in (("plain", {}), ("units", {"units": "uni"})):
        for shard in TokenStore.open(store).shards:
            continues = (np.arange(shard.num_tokens) % 2 == 1).astype(np.uint8)
            write_array(shard, "uni", "units", continues, {})
            masked = np.arange(min(shard.num_tokens, 4), dtype=np.uint32)
            write_array(shard, name, "mask", masked, {"options": options})
        capsys.readouterr()
        main(["--tokens", store, "--mask_index", name, "--documents", "0"])
        shown.append(documents_of(capsys.readouterr().out)[1])
    assert shown == ["[the] [film] [is] [un]believable, and",
                     "[the film] [is un]believable, and"]


# ----------------------------------------------------------------------------- which documents


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (["--documents", "2,0"], [2, 0]), (["--documents", "0,1-2,0"], [0, 1, 2]),
        (["--num_documents", "2"], [0, 1]), ([], [0, 1, 2]), (["--containing", "DON"], [2]),
        (["--containing", "unbelievable", "--random"], [0]), (["--containing", "believable"], None),
        (["--containing", "I ' m"], [0]), (["--containing", "and I"], None),
    ],
)
def test_documents_are_chosen_by_number_and_word_across_shards(options, shown, store, capsys):
    if shown is None:
        with pytest.raises(ConfigError, match="no document of .* has it"):
            show(store, *options)
        return
    show(store, *options)
    numbers = re.findall(r"^document (\d+)", capsys.readouterr().out, flags=re.M)
    assert [int(n) for n in numbers] == shown


def test_drawn_documents_depend_on_the_seed_alone():
    everything = np.arange(1000)
    blocks = [everything[:7], everything[7:500], everything[499:]]
    drawn = draw_documents([everything], 20, seed=1)
    assert draw_documents(blocks, 20, seed=1) == drawn == sorted(set(drawn))
    assert draw_documents(blocks, 20, seed=2) != drawn
    assert draw_documents([everything[:5]], 20, seed=1) == [0, 1, 2, 3, 4]
    counts = np.bincount(np.concatenate([
        draw_documents([np.arange(10)], 3, seed) for seed in range(2000)
    ]), minlength=10)
    assert np.all(np.abs(counts - 600) < 5 * np.sqrt(600 * 0.7))  # five standard deviations


def test_first_documents_read_no_more_blocks_than_needed():
    def blocks():
        yield np.array([3, 5])
        yield np.array([5, 8])  # a document that lies in two blocks
        raise AssertionError("read on")

    assert take_documents(blocks(), 3) == [3, 5, 8]


def test_words_are_found_in_byte_level_text(tmp_path, byte_level):
    texts = ("a caf\u00e9 here", "Caf\u00e9", "caf\u00e9s", "no")
    documents = [[byte_level(text)["input_ids"]] for text in texts]
    write(tmp_path / "b", documents, tokenizer=byte_level)
    store = TokenStore.open(str(tmp_path / "b"))
    inner = byte_level.backend_tokenizer
    inner.enable_padding(length=30)  # as some published tokenizers come
    assert np.concatenate(list(find_word(store, "caf\u00e9", inner))).tolist() == [0, 1]


def test_long_documents_are_cut_between_sequences(store, capsys):
    show(store, "--documents", "0", "--max_document_tokens", "8")
    lines = documents_of(capsys.readouterr().out)
    assert lines[1] == "the [film] is un[believable], and" and lines[2] == "... 1 more sequences"
    assert "16 tokens, [4] masked" in lines[0]  # of the whole document


# -------------------------------------------------------------------------------------- origin


@pytest.fixture
def made(store):
    """A store with indices made by the command from scores of a known scorer."""
    for shard in TokenStore.open(store).shards:
        scores = np.linspace(-1, 4, shard.num_tokens).astype(np.float16)
        made_by = {"model": "run/hf", "model_fingerprint": "f0", **MEASURED}
        write_array(shard, "mr", "scores", scores, made_by)
    for strategy, name, *more in (
        ("selective", "chosen", "--scores", "mr", "--mlm_probability", "0.25"),
        ("random_matched", "control", "--match", "chosen"),
        ("selective", "mr", "--scores", "mr"),  # an index may have the name of its scores
    ):
        build_masks.main(["--tokens", store, "--strategy", strategy, "--name", name, *more])
    return store


def test_options_rule_and_scorer_are_printed(made, capsys):
    options = ["--max_statistics_tokens", "0", "--documents", "1"]
    capsys.readouterr()
    main(["--tokens", made, "--mask_index", "chosen", "--compare", "control", *options])
    out = capsys.readouterr().out
    blocks = {text.partition("\n")[0]: text for text in out.split("\n\n")}
    assert list(blocks)[:3] == ["mask index chosen", "mask index control", "scores mr"]
    chosen, control, scores = list(blocks.values())[:3]
    assert "  strategy: selective\n" in chosen and "  mlm_probability: 0.25\n" in chosen
    assert "  scores: mr (sha256 " in chosen and "  masked: 5 of 22 tokens" in chosen
    assert f"  rule: {STRATEGIES['random_matched'].rule}" in control
    assert "  match: chosen (sha256 " in control and "  seed: 42\n" in control
    assert "  model: run/hf\n" in scores and "json_sha256" not in out


def test_colours_come_from_the_scores_of_the_index_if_they_are_the_same(made, capsys):
    store = TokenStore.open(made)
    assert [source_scores(store, name) for name in ("control", "mr")] == ["mr", "mr"]
    capsys.readouterr()
    main(["--tokens", made, "--mask_index", "control", "--max_statistics_tokens", "0"])
    assert "by mr: important+" in capsys.readouterr().out
    for shard in store.shards:
        write_array(shard, "mr", "scores", np.zeros(shard.num_tokens, dtype=np.float16), {})
    assert source_scores(store, "control") is None
    main(["--tokens", made, "--mask_index", "control"])
    assert "important+" not in capsys.readouterr().out
    main(["--tokens", made, "--mask_index", "control", "--scores", "mr"])
    assert "important+" in capsys.readouterr().out


def test_an_index_made_again_is_not_taken_for_the_matched_one(made):
    build_masks.main(["--tokens", made, "--strategy", "random", "--name", "chosen", "--overwrite"])
    assert source_scores(TokenStore.open(made), "control") is None


# ----------------------------------------------------------------------------------------- page


class Reader(HTMLParser):
    """Collect tags, the text in masked marks, and check that every tag is closed."""

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.masked, self.text = [], [], [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br"):
            self.open.append((tag, dict(attributes).get("class") or ""))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1][0] == "mark":
            self.masked.append(data)


def test_page_is_escaped_whole_and_without_scripts(store, tmp_path, capsys):
    page = tmp_path / "new" / "page.html"
    show(store, "--html", str(page), "--scores", "mr", "--compare", "ctl")
    assert capsys.readouterr().out.splitlines()[-1] == str(page)
    reader = Reader()
    text = page.read_text(encoding="utf-8")
    reader.feed(text)
    reader.close()
    assert reader.open == []
    # The rule of each index at once, what else is recorded folded, so that documents come soon.
    shown = re.sub("<details.*?</details>", "", text, flags=re.DOTALL)
    assert text.count("strategy: selective") == 2 and "strategy: selective" not in shown
    assert shown.count("rule: ") == text.count("rule: ") == 2
    # The legend, then the masked tokens of either index.
    assert reader.masked == [
        "masked in sel", "in ctl", "in both", "film", "is", "believable", "I", ".", "<b>",
        "\u241b",
    ]
    kinds = {tag for tag, _ in reader.tags}
    assert not kinds & {"script", "link", "img", "iframe", "svg"}
    for _, attributes in reader.tags:
        assert not any(name == "src" or name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith("#")
    assert {"documents", "statistics"} <= {a.get("id") for _, a in reader.tags}
    assert "selective" in reader.text and "Document 2" in reader.text
    assert "27.3 %" in reader.text  # 6 of the 22 tokens of the store
    assert "ctl: passed over" in reader.text
    assert sum(a.get("dir") == "auto" for _, a in reader.tags) == 3  # Arabic begins on the right
    raw = page.read_text()
    assert "default-src 'none'" in raw and "url(" not in raw and "@import" not in raw


def test_marks_differ_without_colour():
    """Borders and underlines tell them apart; backgrounds only repeat them."""
    rules = dict(re.findall(r"^\.(m|c|b|l\d) {([^}]*)}", mask_page._STYLE, flags=re.MULTILINE))
    plain = {re.sub("background: [^;]*;", "", rule) for rule in rules.values()}
    assert len(plain) == len(rules) == 6
    assert all("border" in rules[mark] for mark in "mcb")


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--documents", "3"], "documents 0 to 2"),
        (["--documents", "-1"], "documents 0 to 2"),
        (["--documents", "1-9"], "documents 0 to 2"),
        (["--documents", "2-1"], "documents 0 to 2"),
        (["--documents", "0,x"], "such as 0,5"),
        (["--documents", ""], "such as 0,5"),
        (["--documents", "9" * 30], "documents 0 to 2"),
        (["--num_documents", "0"], "at least 1"),
        (["--max_document_tokens", "0"], "at least 1"),
        (["--max_statistics_tokens", "-1"], "at least 0"),
        (["--documents", "0", "--random"], "give only one"),
        (["--documents", "0", "--num_documents", "1"], "give only one"),
        (["--containing", " "], "give a word"),
        (["--containing", "zebra"], "give another"),
        (["--compare", "sel"], "give another"),
        (["--masking", "random"], "either --mask_index NAME, or --masking NAME"),
        (["--mlm_probability", "0.3"], "no use without --masking"),
        (["--types", "3"], "no use without --overlaps"),
        (["--output", "x"], "no use without --overlaps"),
    ],
)
def test_documents_that_do_not_exist_are_refused(options, message, store):
    with pytest.raises(ConfigError, match=message):
        show(store, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --mask_index NAME, or --masking NAME"),
        (["--masking", "nope"], "known: random"),
        (["--masking", "selective"], "build an index"),
        (["--masking", "random", "--mlm_probability", "0"], "above 0 and at most 1"),
        (["--overlaps", "sel"], "names one index"),
        (["--overlaps", "sel", "ctl", "sel"], "names sel twice"),
        (["--overlaps", "sel", "ctl", "--html", "f"], "--html has no use"),
        (["--overlaps", "sel", "ctl", "--max_statistics_tokens", "0"], "nothing to count"),
        (["--overlaps", "sel", "ctl", "--types", "0"], "at least 1"),
    ],
)
def test_what_is_asked_for_must_be_one_thing(options, message, store):
    with pytest.raises(ConfigError, match=message):
        main(["--tokens", store, *options])


@pytest.mark.parametrize(
    ("flag", "known"), [("--mask_index", "ctl, sel"), ("--compare", "ctl, sel"), ("--scores", "mr")]
)
def test_unknown_names_list_the_known_ones(flag, known, store):
    with pytest.raises(DataError, match=rf"{flag} nope: .*\(known: {known}\)"):
        show(store, flag, "nope")


def test_an_empty_store_is_refused(tmp_path, tokenizer):
    write(tmp_path / "e", [], tokenizer=tokenizer)
    shard = TokenStore.open(str(tmp_path / "e")).shards[0]
    write_array(shard, "sel", "mask", np.empty(0, np.uint32), {})
    with pytest.raises(DataError, match="has no documents"):
        show(str(tmp_path / "e"))


def test_a_page_that_cannot_be_written_is_refused_first(store, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(show_masks.TokenStore, "open", None)
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "file" / "x" / "p.html",
                                                      "nothing can be written in")):
        with pytest.raises(ConfigError, match=message):
            show(store, "--html", str(path))


def test_a_reader_that_has_seen_enough_and_a_terminal_of_ascii(store):
    command = [sys.executable, "preprocess/show_masks.py", "--tokens", store, "--mask_index", "sel"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, env=environment)
    assert shown.returncode == 0 and b"don ' t [?]" in shown.stdout
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert ended.returncode == 0 and ended.stderr == b""
