"""What a reader sees of a mask: brackets, joined word pieces, escaped pages, refusals."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from preprocess import show_masks
from preprocess.errors import ConfigError, DataError
from preprocess.show_masks import Piece, format_html_piece, format_piece, main, split_text
from preprocess.store import StoreWriter, TokenStore, write_array

ROOT = Path(show_masks.__file__).parents[1]
WORDS = "the film is un ##believ ##able , and I ' m glad ( very ) <b> & don t . \x1b".split(" ")
SENTENCES = ["the film is un ##believ ##able , and", "I ' m glad ( very ) .", "<b> & don ' t \x1b"]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    inner = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
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
        with StoreWriter(prefix, tokenizer, {}, shard=(i, 3)) as writer:
            for document in documents:
                writer.add_document(document)
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
        write_array(shard, "mr", "scores", scores, {})
    return prefix


def show(prefix: str, *options: str) -> None:
    main(["--tokens", prefix, "--mask_index", "sel", *options])


# ------------------------------------------------------------------------------------- terminal


def test_terminal_marks_masked_tokens_and_joins_word_pieces(store, capsys):
    show(store)
    assert capsys.readouterr().out.splitlines() == [
        "document 0: 16 tokens, [4] masked (25.0 %)",
        "  the [film] is un[believable], and",
        "  [I]'m glad (very).",
        "",
        "document 1: 0 tokens, [0] masked (-)",
        "",
        "document 2: 6 tokens, [2] masked (33.3 %)",
        "  [<b>] & don't [ ]",  # an escape character never reaches the terminal
        "",
    ]


def test_terminal_compares_two_indices(store, capsys):
    show(store, "--compare", "ctl", "--num_documents", "1")
    assert capsys.readouterr().out.splitlines()[:3] == [
        "document 0: 16 tokens, [4] masked (25.0 %), {3} in ctl, 1 in both",
        "  the [{film}] {is} un[believable], and",
        "  [I]'m glad (very){.}",
    ]


@pytest.mark.parametrize(
    ("options", "shown"),
    [(["--documents", "2,0"], [2, 0]), (["--num_documents", "2"], [0, 1]), ([], [0, 1, 2])],
)
def test_documents_are_chosen_by_number_across_shards(options, shown, store, capsys):
    show(store, *options)
    numbers = re.findall(r"^document (\d+)", capsys.readouterr().out, flags=re.M)
    assert [int(n) for n in numbers] == shown


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_colours_only_on_a_terminal_that_wants_them(no_color, coloured, store, monkeypatch, capsys):
    monkeypatch.setenv("NO_COLOR", no_color)
    show(store, "--scores", "mr")
    assert "\x1b" not in capsys.readouterr().out
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    show(store, "--scores", "mr")
    assert ("\x1b[1;7" in terminal.getvalue()) == coloured
    assert "[film]" in terminal.getvalue() and "[I]" in terminal.getvalue()


def test_colour_grows_with_the_score():
    def colour_of(score):
        found = re.search(r"38;5;(\d+)", format_piece(Piece("x", False, score=score), True))
        return found and int(found.group(1))

    scores = [None, float("nan"), -1.0, 0.0, 0.1, 1.0, 2.9, 3.0, 50.0, float("inf")]
    expected = [None, None, None, None, 229, 222, 202, 202, 202, 202]
    assert [colour_of(score) for score in scores] == expected


def test_byte_level_text_keeps_spaces_and_whole_characters(byte_level):
    text = "caf\u00e9 \U0001f600\tok"
    ids = byte_level(text)["input_ids"]
    pieces = split_text(ids, byte_level.backend_tokenizer)
    assert sum(count for count, _, _ in pieces) == len(ids)
    assert "".join((" " if space else "") + piece for _, piece, space in pieces) == (
        "caf\u00e9 \U0001f600 ok"
    )
    assert (2, "\u00e9", False) in pieces and (4, "\U0001f600", False) in pieces
    # A sequence that ends inside a character is shown, with the mark for half a one.
    assert split_text(ids[:4], byte_level.backend_tokenizer)[-1] == (1, "\ufffd", False)


# ----------------------------------------------------------------------------------------- page


class Reader(HTMLParser):
    """Collect tags, the text in masked spans, and check that every tag is closed."""

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.masked, self.text = [], [], [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append((tag, dict(attributes).get("class") or ""))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1][0] == "span" and "m" in self.open[-1][1].split():
            self.masked.append(data)


def test_page_is_escaped_whole_and_without_scripts(store, tmp_path, capsys):
    page = tmp_path / "new" / "page.html"
    show(store, "--html", str(page), "--scores", "mr", "--compare", "ctl")
    assert capsys.readouterr().out.strip() == str(page)
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    assert reader.masked == ["masked", "film", "believable", "I", "<b>", " "]
    kinds = {tag for tag, _ in reader.tags}
    assert "b" not in kinds and not kinds & {"script", "link", "img", "iframe"}
    assert not any(set(a) & {"src", "href", "onclick"} for _, a in reader.tags)
    assert "selective" in reader.text and "Document 2" in reader.text
    assert "27.3 %" in reader.text  # 6 of the 22 tokens of the store
    style = page.read_text()
    assert "border: 2px solid" in style and "text-decoration: underline" in style


def test_html_piece_by_hand():
    assert format_html_piece(Piece('a"<', True)) == " a&quot;&lt;"
    piece = Piece("x", False, masked=True, compared=True, score=3.0)
    assert format_html_piece(piece) == (
        '<span class="m c" title="log-odds 3.00" style="background: rgba(255, 140, 0, 0.70)">x'
        "</span>"
    )
    assert "style" not in format_html_piece(Piece("x", False, score=-1.0))


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--documents", "3"], "documents 0 to 2"),
        (["--documents", "-1"], "documents 0 to 2"),
        (["--documents", "0,x"], "such as 0,5"),
        (["--documents", ""], "such as 0,5"),
        (["--num_documents", "0"], "at least 1"),
    ],
)
def test_documents_that_do_not_exist_are_refused(options, message, store):
    with pytest.raises(ConfigError, match=message):
        show(store, *options)


@pytest.mark.parametrize(
    ("flag", "known"), [("--mask_index", "ctl, sel"), ("--compare", "ctl, sel"), ("--scores", "mr")]
)
def test_unknown_names_list_the_known_ones(flag, known, store):
    with pytest.raises(DataError, match=rf"{flag} nope: .*\(there are: {known}\)"):
        show(store, flag, "nope")


@pytest.mark.parametrize("how", [["preprocess/show_masks.py"], ["-m", "preprocess.show_masks"]])
def test_command_by_path_and_by_module(how, store):
    command = [sys.executable, *how]
    shown = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and "--mask_index" in shown.stdout
    options = ["--tokens", store, "--mask_index", "nope"]
    failed = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 3 and len(failed.stderr.splitlines()) == 1
