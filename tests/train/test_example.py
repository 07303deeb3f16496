"""The held-out text that a run shows: always the same, readable, and escaped."""

from __future__ import annotations

import re
import shutil
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch

from preprocess.store import TokenStore
from tests.support.stores import write
from train import data
from train.data import row_tables
from train.stages.example import NUM_TOKENS, HeldOutExample, escape, spell


def held_out(store: TokenStore, micro_batch_size: int = 4, max_seq_length: int = 32):
    _, table = row_tables(store, max_seq_length, 0.2)
    return data.PackedData(
        store, table, data.drawn_masking(store, "random", data.EVAL_RATE), seed=data.EVAL_SEED,
        micro_batch_size=micro_batch_size,
    )


class Oracle:
    """Guess the original ids, or always the same one."""

    def __init__(self, always: int | None = None) -> None:
        self.always = always

    def eval(self) -> None:
        pass

    train = eval

    def __call__(self, masked_labels, predict, **inputs):
        assert predict
        return masked_labels if self.always is None else masked_labels * 0 + self.always


def shown(example: HeldOutExample, engine: Oracle) -> dict[str, str]:
    """Return the rows of the table as the text page shows them, by first word."""
    from tensorboard.plugin_util import markdown_to_safe_html

    page = markdown_to_safe_html(example.table(example.predict(engine, torch.device("cpu"))))
    rows = re.findall(r"<tr>\s*<td>(\w+)(.*?)</td>\s*<td>(.*?)</td>\s*</tr>", page, re.DOTALL)
    return {"said": rows[2][1], **{name: unescape(text) for name, _, text in rows}}


def test_original_masked_and_prediction(reviews_store, tiny_tokenizer):
    store = TokenStore.open(reviews_store)
    example = HeldOutExample(held_out(store), tiny_tokenizer)
    right = shown(example, Oracle())
    marks = right["original"].count("<strong>")
    assert marks >= 1 and right["prediction"] == right["original"]
    assert f"{marks} of {marks} right" in right["said"]
    assert 1 <= right["masked"].count("[[MASK]]") <= marks == right["masked"].count("<strong>")
    plain = re.sub(r"</?strong>|[\[\]]", "", right["original"])
    documents = [
        tiny_tokenizer.decode(store.shards[0].tokens[a:b].tolist())
        for a, b in zip(*(store.shards[0].sequence_offsets[store.shards[0].document_offsets][part]
                          for part in (slice(-1), slice(1, None))), strict=True)
    ]
    assert any(plain in document for document in documents)
    good = tiny_tokenizer.convert_tokens_to_ids("good")
    wrong = shown(example, Oracle(always=good))
    assert wrong["original"] == right["original"] and wrong["masked"] == right["masked"]
    filled = wrong["prediction"]
    assert filled.count("[good \u2260]") + filled.count("[good]") == marks
    assert filled.count("[good]") == right["original"].count("[good]")


def test_the_same_text_whatever_the_batch_and_the_place(tmp_path, reviews_store, tiny_tokenizer):
    shutil.copytree(Path(reviews_store).parent, tmp_path / "copy")
    stores = (reviews_store, str(tmp_path / "copy" / Path(reviews_store).name))
    pages = {str(shown(HeldOutExample(held_out(TokenStore.open(store), size), tiny_tokenizer),
                       Oracle()))
             for store in stores for size in (1, 3, 64)}
    assert len(pages) == 1


def test_long_texts_are_cut(tmp_path, tiny_tokenizer):
    prefix = str(tmp_path / "long")
    documents = [[(np.arange(400) + start) % 40 + 5] for start in range(8)]
    write(prefix, documents, tokenizer=tiny_tokenizer)
    example = HeldOutExample(held_out(TokenStore.open(prefix), 1, 512), tiny_tokenizer)
    table = example.table(example.predict(Oracle(), torch.device("cpu")))
    assert len(spell(example._original, tiny_tokenizer)) == NUM_TOKENS
    assert 0 < table.count("**") / 6 < 40


def test_wordpieces_read_as_words(tiny_tokenizer):
    ids = tiny_tokenizer("an unlikely film .", add_special_tokens=False)["input_ids"]
    texts = spell(ids, tiny_tokenizer)
    assert "".join(texts) == tiny_tokenizer.decode(ids) and len(texts) == len(ids)


@pytest.mark.parametrize(
    "text",
    ["<script>alert(1)</script>", "![x](http://a.b/c.png)", "[x](javascript:alert(1))",
     "a | b", "**bold** _it_ `code`", "&lt;b&gt;", "# head", "two\nlines | x"],
)
def test_text_of_a_corpus_is_only_text(text):
    from tensorboard.plugin_util import markdown_to_safe_html

    page = markdown_to_safe_html(f"| |\n|---|\n| {escape(text)} |")
    (cell,) = re.findall(r"<td>(.*?)</td>", page, re.DOTALL)
    assert "<" not in cell and unescape(cell) == text.replace("\n", " ")
    assert page.count("<tr>") == 2 and "<img" not in page and "<a" not in page
