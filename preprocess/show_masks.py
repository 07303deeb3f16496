"""Read documents of a token store with their masked tokens marked: the quickest check of a mask.

    python preprocess/show_masks.py --tokens P --mask_index mr-sel --compare mr-ctl --scores mr
    python preprocess/show_masks.py --tokens P --mask_index mr-sel --num_documents 50 --html F

Masked tokens stand in [brackets], so the text reads without colours too (`NO_COLOR`, a pipe);
those of `--compare` in {braces}. With `--scores`, the more important a token, the stronger its
colour. The page that `--html` writes needs nothing else: no script, no other file.
"""

from __future__ import annotations

import argparse
import html
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from preprocess.errors import ConfigError, DataError, run_command
from preprocess.masks import open_tokenizer
from preprocess.store import Shard, TokenStore, atomic_write_bytes, list_arrays, open_array

NUM_WORDS = 15
STRONG_SCORE = 3.0  # log-odds (95 %) from which colours are at their strongest
_COLOURS = (229, 222, 215, 208, 202)  # of 256, pale yellow to orange


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", required=True, help="prefix of the token store")
    parser.add_argument("--mask_index", required=True, help="name of the mask index to show")
    parser.add_argument("--compare", help="name of a second mask index")
    parser.add_argument("--scores", help="name of scores to colour by")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--documents", help="documents to show, by number from 0, such as 0,5")
    which.add_argument(
        "--num_documents", type=int, default=3, help="show the first N (default: %(default)s)"
    )
    parser.add_argument("--html", help="write a page to this file instead of the terminal")
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.num_documents < 1:
        raise ConfigError(f"--num_documents {args.num_documents}: at least 1")
    return args


# ------------------------------------------------------------------------- tokens to pieces


@dataclass(frozen=True)
class Piece:
    """Some text that is marked as one: usually one token.

    text: what to print. space: whether a space stands before it. masked, compared: whether the
    shown index, and the compared one, hold it. score: log-odds, or None.
    """

    text: str
    space: bool
    masked: bool = False
    compared: bool = False
    score: float | None = None


def split_text(ids: list[int], tokenizer: Any) -> list[tuple[int, str, bool]]:
    """Turn ids into text as a reader sees it.

    Args:
        ids: of one sequence.
        tokenizer: a `tokenizers.Tokenizer`, WordPiece or byte-level BPE.
    Returns:
        One (number of tokens, text, whether a space stands before it) a piece. A piece has more
        than one token where a character was cut into bytes.
    """
    if type(tokenizer.model).__name__ == "WordPiece":
        return _split_wordpieces([tokenizer.id_to_token(i) or "?" for i in ids], tokenizer.model)
    pieces, start = [], 0
    while start < len(ids):
        end = start + 1
        text = tokenizer.decode(ids[start:end], skip_special_tokens=False)
        # U+FFFD is half a character; no character has more than 4 bytes.
        while "\ufffd" in text and end < min(start + 4, len(ids)):
            end += 1
            text = tokenizer.decode(ids[start:end], skip_special_tokens=False)
        pieces.append((end - start, _printable(text.strip()), text[:1].isspace()))
        start = end
    return pieces


def _split_wordpieces(names: list[str], model: Any) -> list[tuple[int, str, bool]]:
    prefix = model.continuing_subword_prefix
    pieces: list[tuple[int, str, bool]] = []
    for i, name in enumerate(names):
        previous = names[i - 1] if i else ""
        following = names[i + 1] if i + 1 < len(names) else ""
        if name.startswith(prefix) and i:
            pieces.append((1, _printable(name[len(prefix) :]), False))
            continue
        closing = name in {".", ",", ";", ":", "!", "?", ")", "%"} or previous == "("
        endings = {"s", "t", "re", "ve", "ll", "d", "m"}
        contracted = (name == "'" and following in endings) or (
            previous == "'" and name in endings and i > 1
        )
        pieces.append((1, _printable(name), bool(i) and not closing and not contracted))
    return pieces


def _printable(text: str) -> str:
    # Escape sequences in a corpus must not reach the terminal.
    return "".join(c if c.isprintable() else " " for c in text)


def read_sequence(
    ids: np.ndarray,
    tokenizer: Any,
    masked: np.ndarray,
    compared: np.ndarray,
    scores: np.ndarray | None,
) -> list[Piece]:
    """Make the pieces of one sequence; tokens of a word with equal marks become one piece.

    Args:
        ids: `(T,)` uint16. masked, compared: `(T,)` bool. scores: `(T,)` float16 or None.
    """
    pieces: list[Piece] = []
    start = 0
    for num_tokens, text, space in split_text(ids.tolist(), tokenizer):
        part = slice(start, start + num_tokens)
        start += num_tokens
        score = None if scores is None else float(scores[part].max())
        piece = Piece(text, space, bool(masked[part].any()), bool(compared[part].any()), score)
        if pieces and not space and _joins(pieces[-1], piece):
            last = pieces.pop()
            score = None if score is None or last.score is None else max(score, last.score)
            piece = Piece(last.text + text, last.space, piece.masked, piece.compared, score)
        pieces.append(piece)
    return pieces


def _joins(left: Piece, right: Piece) -> bool:
    same = (left.masked, left.compared) == (right.masked, right.compared)
    return same and left.text[-1:].isalnum() and right.text[:1].isalnum()


# ---------------------------------------------------------------------------- the documents


@dataclass(frozen=True)
class Document:
    """One document to show: its number in the store, counts of tokens, and pieces a sequence."""

    number: int
    num_tokens: int
    num_masked: int
    num_compared: int
    num_shared: int
    sequences: list[list[Piece]]


def choose_documents(args: argparse.Namespace, store: TokenStore) -> list[int]:
    """Give the numbers of the documents that were asked for, all of them in the store."""
    if args.documents is None:
        return list(range(min(args.num_documents, store.num_documents)))
    try:
        numbers = [int(part) for part in args.documents.split(",")]
    except ValueError:
        raise ConfigError(
            f"--documents {args.documents}: numbers with commas between, such as 0,5"
        ) from None
    for number in numbers:
        if not 0 <= number < store.num_documents:
            raise ConfigError(
                f"--documents {number}: {store.prefix} has documents 0 to {store.num_documents - 1}"
            )
    return numbers


def read_documents(
    store: TokenStore, numbers: list[int], args: argparse.Namespace, tokenizer: Any
) -> Iterator[Document]:
    """Read documents with the marks of the indices and scores that `args` names."""
    starts = np.append(0, np.cumsum([shard.num_documents for shard in store.shards]))
    for number in numbers:
        # Empty shards share their start with the next one; the last of them holds the document.
        i = int(np.searchsorted(starts, number, side="right")) - 1
        yield _read_document(store.shards[i], number, number - int(starts[i]), args, tokenizer)


def _read_document(
    shard: Shard, number: int, local: int, args: argparse.Namespace, tokenizer: Any
) -> Document:
    first, last = shard.document_offsets[local : local + 2]
    offsets = shard.sequence_offsets[first : last + 1]
    start, end = int(offsets[0]), int(offsets[-1])
    masked = _marks(shard, args.mask_index, start, end)
    compared = _marks(shard, args.compare, start, end)
    scores = None
    if args.scores:
        scores = open_array(shard, args.scores, "scores")[0][start:end]
    sequences = []
    for a, b in zip(offsets[:-1] - start, offsets[1:] - start, strict=True):
        of_sequence = None if scores is None else scores[a:b]
        ids = shard.tokens[start + a : start + b]
        sequences.append(read_sequence(ids, tokenizer, masked[a:b], compared[a:b], of_sequence))
    return Document(
        number=number,
        num_tokens=end - start,
        num_masked=int(masked.sum()),
        num_compared=int(compared.sum()),
        num_shared=int((masked & compared).sum()),
        sequences=sequences,
    )


def _marks(shard: Shard, name: str | None, start: int, end: int) -> np.ndarray:
    """True where the index holds a token of the shard's tokens `start` to `end`: bool."""
    marks = np.zeros(end - start, dtype=bool)
    if name:
        index, _ = open_array(shard, name, "mask")
        bounds = np.searchsorted(index, np.array([start, end], dtype=np.uint32))
        marks[index[bounds[0] : bounds[1]].astype(np.int64) - start] = True
    return marks


def _check_names(store: TokenStore, args: argparse.Namespace) -> None:
    for flag, kind in (("mask_index", "mask"), ("compare", "mask"), ("scores", "scores")):
        name = getattr(args, flag)
        try:
            for shard in store.shards if name else ():
                open_array(shard, name, kind)
        except DataError as error:
            known = ", ".join(list_arrays(store, kind)) or "none yet"
            raise DataError(f"--{flag} {name}: {error} (there are: {known})") from None


# -------------------------------------------------------------------------------- terminal


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _strength(score: float | None) -> float:
    """How strong a colour is, 0 (none) to 1: nothing at or below even odds."""
    if score is None or not score > 0:
        return 0.0
    return min(score / STRONG_SCORE, 1.0)


def format_piece(piece: Piece, colour: bool) -> str:
    """Write a piece for the terminal, its space included."""
    text = piece.text
    if piece.compared:
        text = "{" + text + "}"
    if piece.masked:
        text = "[" + text + "]"
    codes = []
    strength = _strength(piece.score)
    if colour and piece.masked:
        codes.append("1;7")
    if colour and strength:
        codes.append(f"38;5;{_COLOURS[min(int(strength * len(_COLOURS)), len(_COLOURS) - 1)]}")
    if codes:
        text = f"\x1b[{';'.join(codes)}m{text}\x1b[0m"
    return (" " if piece.space else "") + text


def format_document(document: Document, args: argparse.Namespace, colour: bool) -> str:
    """Write a document for the terminal: a line of counts, then a line a sequence."""
    head = (
        f"document {document.number}: {document.num_tokens} tokens, "
        f"[{document.num_masked}] masked ({percent(document.num_masked, document.num_tokens)})"
    )
    if args.compare:
        head += f", {{{document.num_compared}}} in {args.compare}, {document.num_shared} in both"
    lines = [head]
    for pieces in document.sequences:
        lines.append("  " + "".join(format_piece(piece, colour) for piece in pieces).strip())
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------ page

_STYLE = """
body { font: 16px/1.7 Georgia, serif; max-width: 46em; margin: 2em auto; padding: 0 1em;
       color: #000; background: #fff; print-color-adjust: exact; }
table { border-collapse: collapse; margin: 1em 0; } td, th { border: 1px solid #999;
       padding: 0 .6em; text-align: left; }
td.n { text-align: right; }
.m { border: 2px solid #000; border-radius: 3px; padding: 0 2px; text-decoration: underline; }
.c { border-bottom: 3px dashed #00639c; }
.m.c { border: 2px solid #000; outline: 2px dashed #00639c; outline-offset: 1px; }
"""


def format_html_piece(piece: Piece) -> str:
    """Write a piece for the page, escaped, its space included."""
    classes = " ".join(name for name, on in (("m", piece.masked), ("c", piece.compared)) if on)
    attributes = f' class="{classes}"' if classes else ""
    if piece.score is not None:
        attributes += f' title="log-odds {piece.score:.2f}"'
    if strength := _strength(piece.score):
        attributes += f' style="background: rgba(255, 140, 0, {0.7 * strength:.2f})"'
    text = html.escape(piece.text)
    if attributes:
        text = f"<span{attributes}>{text}</span>"
    return (" " if piece.space else "") + text


def _table(rows: list[tuple[str, ...]], head: tuple[str, ...]) -> str:
    lines = ["<table>", "<tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in head) + "</tr>"]
    for row in rows:
        cells = f"<td>{html.escape(row[0])}</td>"
        cells += "".join(f'<td class="n">{html.escape(cell)}</td>' for cell in row[1:])
        lines.append(f"<tr>{cells}</tr>")
    return "\n".join([*lines, "</table>"])


def _index_rows(store: TokenStore, names: list[str]) -> list[tuple[str, ...]]:
    """Whole-store counts of each index, as its files record them."""
    rows: list[tuple[str, ...]] = []
    for name in names:
        infos = [open_array(shard, name, "mask")[1] for shard in store.shards]
        count = sum(info["count"] for info in infos)
        strategy = str((infos[0].get("options") or {}).get("strategy", "?") if infos else "?")
        share = percent(count, store.num_tokens)
        rows.append((name, strategy, f"{store.num_tokens:,}", f"{count:,}", share))
    return rows


def format_page(store: TokenStore, documents: list[Document], args: argparse.Namespace) -> str:
    """Write the whole page: legend, counts, most masked words, then the documents."""
    masked: Counter[str] = Counter()
    all_words: Counter[str] = Counter()
    for document in documents:
        for pieces in document.sequences:
            all_words.update(piece.text for piece in pieces)
            masked.update(piece.text for piece in pieces if piece.masked)
    names = [args.mask_index] + ([args.compare] if args.compare else [])
    title = html.escape(f"{store.prefix}: masks {' and '.join(names)}")
    legend = f'<span class="m">masked</span> in {html.escape(args.mask_index)}'
    if args.compare:
        legend += f'; <span class="c">masked</span> in {html.escape(args.compare)}'
    if args.scores:
        legend += f"; the more important by {html.escape(args.scores)}, the stronger its background"
    head: tuple[str, ...] = ("document", "tokens", "masked", "share", "in the other", "in both")
    rows: list[tuple[str, ...]] = [
        (
            str(d.number),
            str(d.num_tokens),
            str(d.num_masked),
            percent(d.num_masked, d.num_tokens),
            str(d.num_compared),
            str(d.num_shared),
        )
        for d in documents
    ]
    words: list[tuple[str, ...]] = [
        (word, str(count), str(all_words[word])) for word, count in masked.most_common(NUM_WORDS)
    ]
    if not args.compare:
        head, rows = head[:4], [row[:4] for row in rows]
    parts = [
        f"<h1>{title}</h1>\n<p>{legend}</p>",
        _table(_index_rows(store, names), ("index", "strategy", "tokens", "masked", "share")),
        "<h2>Documents shown</h2>\n" + _table(rows, head),
        "<h2>Most masked in them</h2>\n" + _table(words, ("text", "masked", "occurs")),
    ]
    for document in documents:
        parts.append(f"<h2>Document {document.number}</h2>")
        for pieces in document.sequences:
            parts.append("<p>" + "".join(map(format_html_piece, pieces)).strip() + "</p>")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    store = TokenStore.open(args.tokens)
    _check_names(store, args)
    tokenizer = open_tokenizer(store.tokenizer_dir)
    numbers = choose_documents(args, store)
    documents = read_documents(store, numbers, args, tokenizer)
    if args.html:
        page = format_page(store, list(documents), args)
        atomic_write_bytes(args.html, page.encode())
        print(args.html)
        return
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for document in documents:
        print(format_document(document, args, colour))


if __name__ == "__main__":
    run_command(main)
