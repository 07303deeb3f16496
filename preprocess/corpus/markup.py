"""HTML in texts: seen, and removed.

Only tags that HTML has and entities that end in `;` count, so that `a < b`, `<unk>` and `AT&T` stay
text. Every pass over a text is linear in its length, whatever is in it.
"""

from __future__ import annotations

import html
import html.entities
import re

# Tags that end a line, that part cells, and that are inside a line. `<s>` is left alone: it is a
# special token of many tokenizers, and people write about it.
_BLOCKS = frozenset(
    "address article aside blockquote body br caption center dd details dialog div dl dt fieldset "
    "figcaption figure footer form h1 h2 h3 h4 h5 h6 head header hr html legend li main menu nav "
    "noscript ol optgroup option p pre script section select style summary table tbody textarea "
    "tfoot thead title tr ul video".split())
_CELLS = frozenset("td th".split())
_INLINE = frozenset(
    "a abbr acronym audio b base bdi bdo big button canvas cite code col colgroup data datalist "
    "del dfn em embed font frame i iframe img input ins kbd label link map mark meta meter nobr "
    "object output param picture progress q rp rt ruby samp small source span strike strong sub "
    "sup svg template time track tt u var wbr".split())
_HIDDEN = ("script", "style")  # what is between their tags is no text
_TAG = re.compile(r"<(/?)([A-Za-z][A-Za-z0-9]*)(?=[\s/>])[^<>]*>|<!--[^<>]*-->|<![Dd][Oo][^<>]*>")
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9A-Fa-f]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")


def _space_of(tag: re.Match[str]) -> str | None:
    """Return what a tag becomes; None if HTML has no such tag."""
    name = (tag[2] or "").lower()
    if name in _BLOCKS:
        return "\n"
    if name in _CELLS:
        return " "
    return "" if name in _INLINE or not name else None


def _is_known(entity: str) -> bool:
    return entity[1] == "#" or entity[1:] in html.entities.html5


def find_html(text: str) -> str:
    """Return the first tag of a text, or else its first entity, as written; "" if it has none."""
    if "<" in text:
        for tag in _TAG.finditer(text):
            if _space_of(tag) is not None:
                return tag[0]
    if "&" in text:
        for entity in _ENTITY.finditer(text):
            if _is_known(entity[0]):
                return entity[0]
    return ""


def strip_html(text: str) -> str:
    """Return a text without tags and comments, and with characters in place of entities.

    A tag that ends a line becomes a line end, a cell of a table a space, others nothing. Scripts
    and styles go with their content, if they end. Entities are replaced once: `&amp;lt;` is `&lt;`
    then.
    """
    if "<" in text:
        kept, at, hidden = [], 0, ""
        tags = list(_TAG.finditer(text))
        last_end = {tag[2].lower(): tag.start() for tag in tags if tag[1]}
        for tag in tags:
            name = (tag[2] or "").lower()
            if hidden:
                if tag[1] and name == hidden:
                    at, hidden = tag.end(), ""
                continue
            space = _space_of(tag)
            if space is None:
                continue
            kept += [text[at : tag.start()], space]
            at = tag.end()
            if name in _HIDDEN and not tag[1] and tag.start() < last_end.get(name, 0):
                hidden = name
        text = "".join([*kept, text[at:]])
    if "&" in text:
        text = _ENTITY.sub(
            lambda found: html.unescape(found[0]) if _is_known(found[0]) else found[0], text)
    return text
