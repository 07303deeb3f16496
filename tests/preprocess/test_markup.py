"""HTML in texts: what counts as HTML, what becomes of it, and that it takes linear time."""

from __future__ import annotations

import html
import html.parser
import time

import pytest

from preprocess.corpus import find_html, strip_html


@pytest.mark.parametrize(("text", "found", "stripped"), [
    ("good<br /><br />film", "<br />", "good\n\nfilm"),
    ("a <b>very</b> good film", "<b>", "a very good film"),
    ("un<i>believ</i>able", "<i>", "unbelievable"),
    ("<td>a</td><td>b</td>", "<td>", " a  b "),
    ("<a href='x.html'\n>it</a> &amp; me", "<a href='x.html'\n>", "it & me"),
    ("it&#39;s caf&eacute;&nbsp;now", "&#39;", "it's caf\u00e9\u00a0now"),
    ("&lt;br /&gt; &amp;lt;", "&lt;", "<br /> &lt;"),
    ("x<script>if (a < b) { c() }</script>y", "<script>", "x\ny"),
    ("x<script>never closed", "<script>", "x\nnever closed"),
    ("x<script>a <b>bold</b> word", "<script>", "x\na bold word"),
    ("x<!-- gone --><!DOCTYPE html>y", "<!-- gone -->", "xy"),
    ("<BR><P Class=x>Up", "<BR>", "\n\nUp"),
])
def test_html_is_found_and_removed(text, found, stripped):
    assert find_html(text) == found
    assert strip_html(text) == stripped


@pytest.mark.parametrize("text", [
    "a < b and c > d", "<unk> one <s> two </s> [MASK] <3", "AT&T, R&D; &nothing; & so", "<br", "",
    "x<y>z", "<bright>", "<!--", "&#; &#x;", "if a<b then",
])
def test_other_text_is_left_alone(text):
    assert find_html(text) == "" and strip_html(text) == text


def test_what_is_left_is_what_the_parser_of_the_standard_library_calls_text():
    text = ("<div class='a'>It&#39;s <em>fine</em>,<br/>he said &mdash; <span>twice</span>.<hr>"
            "<p>New &lt;line&gt;</p><ul><li>one</li><li>two</li></ul></div>")
    kept: list[str] = []
    parser = html.parser.HTMLParser()
    parser.handle_data = kept.append
    parser.feed(text)
    parser.close()
    assert strip_html(text).replace("\n", "") == "".join(kept)


@pytest.mark.parametrize("part", ["<a ", "<", "<!--", "<script>", "&#", "&a", "</", "<br", "<!--<"])
def test_hostile_text_takes_linear_time(part):
    def seconds(count: int) -> float:
        text = part * count
        begin = time.process_time()
        strip_html(text)
        find_html(text)
        return time.process_time() - begin

    assert seconds(200_000) < 2.0


def test_long_names_take_linear_time():
    begin = time.process_time()
    strip_html("<" + "a" * 1_000_000 + " " + "&" + "a" * 1_000_000)
    assert time.process_time() - begin < 2.0
