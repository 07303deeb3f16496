"""Show which tokens a mask index holds: documents, statistics, options.

    python preprocess/show_masks.py --tokens P --mask_index mr-sel --compare mr-ctl
    python preprocess/show_masks.py --tokens P --mask_index mr-sel --random --containing waiter \\
        --num_documents 50 --html F

In the terminal masked tokens are in [brackets] and those of `--compare` in {braces}, so the text
is readable without colours too (`NO_COLOR`, a pipe). Tokens are coloured by the scores that the
index was chosen by, or by `--scores`. The page that `--html` writes is a single file.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.errors import ConfigError, DataError, run_command
from preprocess.files import atomic_write_bytes
from preprocess.flags import USUAL, Parser
from preprocess.masking import (
    ARRAY_NEEDS,
    STRATEGIES,
    STREAM_SHOWN,
    counter_uniform,
    open_arrays,
)
from preprocess.store import Shard, TokenStore, iterate_blocks, open_array
from preprocess.text.continuations import WordTable, find_continuations, open_tokenizer
from preprocess.view.page import format_page
from preprocess.view.pieces import printable, read_documents
from preprocess.view.statistics import Vocabulary, count_masks, make_tables, word_table
from preprocess.view.tables import Table
from preprocess.view.terminal import format_document, format_legend

BLOCK_DOCUMENTS = 1 << 20
# Of an array's JSON, what tells nothing about how it was made.
FORMAT_KEYS = {"format_version", "name", "kind", "count", "sha256", "store_fingerprint",
               "json_sha256"}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line and check it."""
    parser = Parser(description=__doc__)
    add = parser.add_argument_group(USUAL).add_argument
    add("--tokens", required=True, metavar="P", help="prefix of the token store")
    add("--mask_index", required=True, metavar="NAME", help="name of the mask index to show")
    add("--compare", metavar="NAME", help="name of a second mask index, to show beside it")
    add("--html", metavar="FILE", help="write a page to this file instead of the terminal")
    add = parser.add_argument_group("which documents").add_argument
    add("--documents", metavar="N,N-N", help="numbers of documents to show, such as 0,5,10-12")
    add("--num_documents", type=int, help="instead: number of documents to show (default: 3)")
    add("--random", action="store_true", help="draw them from the store, not the first ones")
    add("--seed", type=int, default=42, help="seed of --random")
    add("--containing", metavar="WORD", help="only documents that contain this word")
    add("--max_document_tokens", type=int, default=2000,
        help="largest number of tokens to show per document")
    add = parser.add_argument_group("scores and statistics").add_argument
    add("--scores", metavar="NAME",
        help="scores to colour by (default: those that the index was chosen by)")
    add("--max_statistics_tokens", type=int,
        help="number of tokens to count, in blocks spaced evenly over the store; 0: no statistics "
        "(default: all)")
    args = parser.parse_args(
        argv, num_documents=1, max_document_tokens=1, max_statistics_tokens=0)
    for name in ("num_documents", "random", "containing"):
        if args.documents is not None and getattr(args, name):
            raise ConfigError(f"--documents and --{name} exclude each other; give only one")
    if args.containing is not None and not args.containing.strip():
        raise ConfigError("--containing is empty; give a word")
    if args.compare == args.mask_index:
        raise ConfigError(f"--compare {args.compare} is the shown index itself; give another one")
    args.num_documents = args.num_documents or 3
    return args


# ------------------------------------------------------------------------ which documents


def choose_documents(args: argparse.Namespace, store: TokenStore, tokenizer: Any) -> list[int]:
    """Return the numbers of the requested documents.

    Raises:
        ConfigError: a number outside the store, or a word that no document has.
        DataError: a store without documents.
    """
    if not store.num_documents:
        raise DataError(f"{store.prefix} has no documents; tokenize some text into a store")
    if args.documents is not None:
        return _parse_documents(args.documents, store)
    if args.containing is None:
        blocks: Iterable[np.ndarray] = (
            np.arange(start, min(start + BLOCK_DOCUMENTS, store.num_documents))
            for start in range(0, store.num_documents, BLOCK_DOCUMENTS)
        )
    else:
        blocks = find_word(store, args.containing.strip(), tokenizer)
    numbers = (draw_documents(blocks, args.num_documents, args.seed) if args.random
               else take_documents(blocks, args.num_documents))
    if not numbers:
        raise ConfigError(
            f"--containing {args.containing}: no document of {store.prefix} has it as a separate "
            "word; give another"
        )
    return numbers


def _parse_documents(text: str, store: TokenStore) -> list[int]:
    numbers: dict[int, None] = {}  # in the order given, each once
    last = store.num_documents - 1
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,18})(?:-(\d{1,18}))?\s*", part)
        bounds = [int(number) for number in found.groups() if number] if found else []
        if not bounds or bounds[-1] > last or bounds[0] > bounds[-1]:
            raise ConfigError(
                f"--documents {text}: {store.prefix} has documents 0 to {last}; give numbers or "
                f"ranges, such as 0,5,10-12"
            )
        numbers.update(dict.fromkeys(range(bounds[0], bounds[-1] + 1)))
    return list(numbers)


def take_documents(blocks: Iterable[np.ndarray], count: int) -> list[int]:
    """Take the first `count` numbers of ascending blocks, `(n,)` int64 each, and read no more."""
    numbers = itertools.chain.from_iterable(block[: count + 1].tolist() for block in blocks)
    distinct = (number for number, _ in itertools.groupby(numbers))  # one may lie in two blocks
    return list(itertools.islice(distinct, count))


def draw_documents(blocks: Iterable[np.ndarray], count: int, seed: int) -> list[int]:
    """Draw `count` numbers from blocks of them, `(n,)` int64 each.

    Each document has a draw of its own, so blocks do not change the result, and a document drawn
    from a store is also drawn from fewer documents of it.
    """
    best = np.empty(0, dtype=np.int64)
    for block in blocks:
        best = np.union1d(best, block)
        draws = counter_uniform(seed, 0, best, STREAM_SHOWN)
        best = best[np.argsort(draws, kind="stable")[:count]]
    return np.sort(best).tolist()


def find_word(store: TokenStore, word: str, tokenizer: Any) -> Iterator[np.ndarray]:
    """Yield the numbers of the documents that have a word, block by block, `(n,)` int64.

    Search for its tokens, as given, in lower case and in capitals; where the tokenizer tells words
    apart, it must be a separate word.
    """
    cases = {word, word.lower(), word.capitalize(), word.upper()}
    # Byte-level vocabularies write a word behind a space with other tokens.
    texts = [space + case for case in sorted(cases) for space in ("", " ")]
    unknown = store.special_ids.get("unk")
    tokenizer.no_padding()  # published tokenizers may come with both switched on
    tokenizer.no_truncation()
    patterns = {tuple(e.ids) for e in tokenizer.encode_batch(texts, add_special_tokens=False)}
    patterns = {ids for ids in patterns if ids and unknown not in ids}
    table = word_table(tokenizer)
    start = 0
    for shard in store.shards:
        for block in iterate_blocks(shard.sequence_offsets):
            yield start + _find_in_block(shard, block, sorted(patterns), table)
        start += shard.num_documents


def _find_in_block(
    shard: Shard, block: slice, patterns: list[tuple[int, ...]], table: WordTable | None
) -> np.ndarray:
    offsets = shard.sequence_offsets[block.start : block.stop + 1]
    tokens = shard.tokens[offsets[0] : offsets[-1]]
    local = offsets - offsets[0]
    begins = np.ones(len(tokens) + 1, dtype=bool)  # whether a word begins at a token
    if table is not None:
        begins[:-1] = ~find_continuations(tokens, local, table)
    found: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
    for pattern in patterns:
        places = np.flatnonzero(tokens[: max(len(tokens) - len(pattern) + 1, 0)] == pattern[0])
        for i, token in enumerate(pattern[1:], 1):
            places = places[tokens[places + i] == token]
        ends = places + len(pattern)
        sequence = np.searchsorted(local, places, side="right") - 1
        whole = (ends <= local[sequence + 1]) & begins[places] & begins[ends]
        found.append(sequence[whole])
    sequences = np.unique(np.concatenate(found)) + block.start
    # An empty document shares its start with the next one; the last of them has the sequence.
    return np.unique(np.searchsorted(shard.document_offsets, sequences, side="right") - 1)


# ---------------------------------------------------------------------------- the command


def describe(store: TokenStore, name: str, kind: str) -> list[str]:
    """Write what the JSON beside an array records, one line per key."""
    infos = [open_array(shard, name, kind)[1] for shard in store.shards]
    lines: list[str] = []

    def add(entries: dict[str, Any]) -> None:
        for key, value in entries.items():
            if isinstance(value, dict):
                add(value)
            elif key not in FORMAT_KEYS:
                lines.append(printable(f"{key}: {value}"))

    add(infos[0])  # shards differ only in the content of their sources
    options = infos[0].get("options")
    if isinstance(options, dict) and options.get("strategy") in STRATEGIES:
        lines.append(f"rule: {STRATEGIES[options['strategy']].rule}")
    if kind == "mask":
        count = sum(info["count"] for info in infos)
        lines.append(f"masked: {count:,} of {store.num_tokens:,} tokens")
    return lines


def source_scores(store: TokenStore, index: str) -> str | None:
    """Return the name of the scores that an index was chosen by, also through a matched index.

    None if there are none, or if an array on the way was removed or replaced since.
    """
    seen: set[str] = set()
    while index not in seen:
        seen.add(index)
        infos = [open_array(shard, index, "mask")[1] for shard in store.shards]
        options = [info.get("options") or {} for info in infos]
        need = next((need for need in ARRAY_NEEDS if options[0].get(need)), None)
        if need is None:
            return None
        # build_masks.py records `NAME (sha256 0123456789abcdef)`.
        index = str(options[0][need]).partition(" ")[0]
        try:
            found = [open_array(shard, index, ARRAY_NEEDS[need])[1] for shard in store.shards]
        except DataError:
            return None
        if not all(f"sha256 {info['sha256'][:16]}" in str(option.get(need))
                   for info, option in zip(found, options, strict=True)):
            return None
        if need == "scores":
            return index
    return None


def check_page(path: Path) -> None:
    """Refuse a page that cannot be written, before any work."""
    if path.is_dir():
        raise ConfigError(f"--html {path} is a folder; give a file, such as {path / 'masks.html'}")
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"--html {path}: nothing can be written in {folder}; give another file")


def count(
    args: argparse.Namespace, store: TokenStore, names: list[str], scores: str | None,
    tokenizer: Any,
) -> list[Table]:
    """Count over the store, or over `--max_statistics_tokens` of it, and make the tables."""
    if args.max_statistics_tokens == 0:
        return []
    vocabulary = Vocabulary.read(tokenizer, store.vocab_size)
    started = time.monotonic()
    statistics = count_masks(store, names, vocabulary, scores, args.max_statistics_tokens)
    seconds = time.monotonic() - started
    print(f"counted {statistics.tokens:,} tokens in {seconds:.1f} s "
          f"({statistics.tokens / max(seconds, 1e-9):,.0f} tokens/s)\n")
    return make_tables(statistics, names, vocabulary, bool(scores))


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.html:
        check_page(Path(args.html))
    store = TokenStore.open(args.tokens)
    tokenizer = open_tokenizer(store.tokenizer_dir)

    def read(flag: str, name: str | None, kind: str) -> list[Any]:
        if not name:
            return [None] * len(store.shards)
        return [array for array, _ in open_arrays(store, store.shards, flag, name, kind)]

    masks = read("mask_index", args.mask_index, "mask")
    compared = read("compare", args.compare, "mask")
    names = [name for name in (args.mask_index, args.compare) if name]
    scores = args.scores or next(filter(None, [source_scores(store, name) for name in names]), None)
    arrays = list(zip(masks, compared, read("scores", scores, "scores"), strict=True))
    numbers = choose_documents(args, store, tokenizer)
    documents = read_documents(
        store.shards, arrays, numbers, tokenizer, args.max_document_tokens)
    origins = {f"mask index {name}": describe(store, name, "mask") for name in names}
    if scores:
        origins[f"scores {scores}"] = describe(store, scores, "scores")
    if args.html:
        tables = count(args, store, names, scores, tokenizer)
        title = f"Masks of {Path(store.prefix).name}: {' beside '.join(names)}"
        page = format_page(title, origins, list(documents), tables, names, scores)
        # A character that is no character (half a surrogate pair) has no bytes.
        atomic_write_bytes(args.html, page.encode(errors="replace"))
        print(args.html)
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows ASCII alone
    terminal = sys.stdout.isatty()
    colour = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    try:
        for subject, lines in origins.items():
            print("\n  ".join([subject, *lines]) + "\n")
        print(format_legend(names, scores) + "\n")
        for document in documents:
            print(format_document(document, names, colour))
        sys.stdout.flush()  # something to read while the store is counted
        width = min(shutil.get_terminal_size().columns, 100) if terminal else 100
        for table in count(args, store, names, scores, tokenizer):
            if table.subject in (None, names[0]):  # a terminal shows the tokens of one index
                print(table.as_text(width) + "\n")
    except BrokenPipeError:
        # `| head` has closed the pipe. Buffered output must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    run_command(main)
