"""Show what a mask index masks: documents, statistics, how it was built.

    python preprocess/show_masks.py --tokens P --mask_index mr-sel --compare mr-ctl
    python preprocess/show_masks.py --tokens P --mask_index mr-sel --random --containing waiter \\
        --num_documents 50 --html F

In the terminal, masked tokens are in [brackets], those of `--compare` in {braces}, so the text can
be read without colours (`NO_COLOR`, a pipe). Tokens are coloured by the scores that the index was
chosen by, or by those of `--scores`. The page that `--html` writes is complete in one file.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.errors import ConfigError, DataError, DiskFullError, run_command
from preprocess.files import atomic_write_bytes
from preprocess.flags import USUAL, Parser
from preprocess.masking import STREAM_SHOWN, counter_uniform
from preprocess.store import Shard, TokenStore, iterate_blocks, list_arrays, open_array
from preprocess.text.continuations import WordTable, find_continuations, open_tokenizer
from preprocess.view.kinds import word_table
from preprocess.view.origin import explain, explain_scores
from preprocess.view.page import format_page
from preprocess.view.pieces import Document, Opened, printable, read_documents
from preprocess.view.statistics import Vocabulary, count_masks
from preprocess.view.tables import Table, make_tables
from preprocess.view.terminal import (
    Look,
    format_document,
    format_legend,
    format_paragraph,
    format_table,
)

BLOCK_DOCUMENTS = 1 << 20


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
    args = parser.parse_args(argv)
    for name, least in (
        ("num_documents", 1), ("max_document_tokens", 1), ("max_statistics_tokens", 0)
    ):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} {value}: at least {least}")
    for name in ("num_documents", "random", "containing"):
        if args.documents is not None and getattr(args, name):
            raise ConfigError(f"--documents and --{name} exclude each other; leave one out")
    if args.containing is not None and not args.containing.strip():
        raise ConfigError("--containing is empty; give a word")
    if args.compare == args.mask_index:
        raise ConfigError(f"--compare {args.compare} is the index itself; name another one")
    args.num_documents = args.num_documents or 3
    return args


# ------------------------------------------------------------------------ which documents


def choose_documents(args: argparse.Namespace, store: TokenStore, tokenizer: Any) -> list[int]:
    """Give the numbers of the documents that were asked for, all of them in the store.

    Raises:
        ConfigError: a number that is not in the store, or a word that no document holds.
        DataError: a store without documents.
    """
    if not store.num_documents:
        raise DataError(f"{store.prefix} has no documents; tokenize some text into a store")
    if args.documents is not None:
        return _parse_documents(args.documents, store)
    if args.containing is None:
        steps = range(0, store.num_documents, BLOCK_DOCUMENTS)
        blocks: Iterable[np.ndarray] = (
            np.arange(start, min(start + BLOCK_DOCUMENTS, store.num_documents)) for start in steps
        )
    else:
        blocks = find_word(store, args.containing.strip(), tokenizer)
    if args.random:
        numbers = draw_documents(blocks, args.num_documents, args.seed)
    else:
        numbers = take_documents(blocks, args.num_documents)
    if not numbers:
        raise ConfigError(
            f"--containing {args.containing}: no document of {store.prefix} holds it as a word by "
            "itself; give another"
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
                f"ranges of them, such as 0,5,10-12"
            )
        numbers.update(dict.fromkeys(range(bounds[0], bounds[-1] + 1)))
    return list(numbers)


def take_documents(blocks: Iterable[np.ndarray], count: int) -> list[int]:
    """Take the first `count` numbers of ascending blocks, `(n,)` int64 each; no more are read."""
    taken: dict[int, None] = {}  # a document may lie in two blocks
    for block in blocks:
        taken.update(dict.fromkeys(block[: count + 1].tolist()))
        if len(taken) >= count:
            break
    return list(taken)[:count]


def draw_documents(blocks: Iterable[np.ndarray], count: int, seed: int) -> list[int]:
    """Draw `count` numbers from blocks of them, `(n,)` int64 each; each document has its draw.

    So the draw does not depend on the blocks, and a document that is drawn from a store is also
    drawn from fewer documents of it.
    """
    best = np.empty(0, dtype=np.int64)
    for block in blocks:
        best = np.union1d(best, block)
        draws = counter_uniform(seed, 0, best, STREAM_SHOWN)
        best = best[np.argsort(draws, kind="stable")[:count]]
    return np.sort(best).tolist()


def find_word(store: TokenStore, word: str, tokenizer: Any) -> Iterator[np.ndarray]:
    """Yield the numbers of the documents that hold a word, block by block, `(n,)` int64.

    The word is looked for as its tokens, in lower case, capitals and as it is given; it must
    stand by itself where the tokenizer tells words apart.
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


def open_arrays(store: TokenStore, flag: str, name: str, kind: str) -> list[np.ndarray]:
    """Open an array of every shard; an unknown name is a `DataError` that lists the known."""
    try:
        return [open_array(shard, name, kind)[0] for shard in store.shards]
    except DataError as error:
        known = ", ".join(list_arrays(store, kind)) or "none yet"
        raise DataError(f"--{flag} {name}: {error} (there are: {known})") from None


def check_page(path: Path) -> None:
    """Refuse a page that cannot be written before any work is done for it."""
    if path.is_dir():
        raise ConfigError(f"--html {path} is a folder; give a file, such as {path / 'masks.html'}")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"--html {path}: nothing can be written in {folder}; give another file")


def write_page(path: Path, page: str) -> None:
    try:
        # A character that is no character (half a surrogate pair) has no bytes.
        atomic_write_bytes(path, page.encode(errors="replace"))
    except DiskFullError:
        raise
    except OSError as error:
        raise DataError(
            f"--html {path}: cannot be written ({error.strerror}); give another file"
        ) from None
    print(path)


def count(
    args: argparse.Namespace, store: TokenStore, names: list[str], scores: str | None,
    tokenizer: Any,
) -> list[Table]:
    """Count over the store, or as much of it as was asked for, and make the tables."""
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
    masks = open_arrays(store, "mask_index", args.mask_index, "mask")
    names = [args.mask_index, *([args.compare] if args.compare else [])]
    nothing: list[Any] = [None] * len(store.shards)
    compared = open_arrays(store, "compare", args.compare, "mask") if args.compare else nothing
    origins = [explain(store, name) for name in names]
    name_of_scores = args.scores or next((o.scores for o in origins if o.scores), None)
    scores = nothing
    if name_of_scores:
        scores = open_arrays(store, "scores", name_of_scores, "scores")
    shards = [
        Opened(shard.tokens, shard.sequence_offsets, shard.document_offsets, *arrays)
        for shard, *arrays in zip(store.shards, masks, compared, scores, strict=True)
    ]
    numbers = choose_documents(args, store, tokenizer)
    documents = read_documents(shards, numbers, tokenizer, args.max_document_tokens)
    # What several indices have in common is said once.
    said = {name: printable(text) for o in origins for name, text in o.paragraphs.items()}
    if name_of_scores:
        told = printable(explain_scores(store, name_of_scores))
        said.setdefault(f"scores {name_of_scores}", told)
    if args.html:
        tables = count(args, store, names, name_of_scores, tokenizer)
        title = f"Masks of {Path(store.prefix).name}: {' beside '.join(names)}"
        page = format_page(title, said, list(documents), tables, names, name_of_scores)
        write_page(Path(args.html), page)
        return
    try:
        print_all(args, store, tokenizer, said, documents, names, name_of_scores)
    except BrokenPipeError:
        # `| head` has seen enough. What Python still holds must not fail again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_all(
    args: argparse.Namespace,
    store: TokenStore,
    tokenizer: Any,
    said: dict[str, str],
    documents: Iterable[Document],
    names: list[str],
    scores: str | None,
) -> None:
    """Print how the tokens were chosen, the documents, and the statistics."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows ASCII alone
    terminal = sys.stdout.isatty()
    colour = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    look = Look(colour, shutil.get_terminal_size().columns if terminal else None)
    for subject, text in said.items():
        print(format_paragraph(f"{subject}: {text}", look) + "\n")
    print(format_paragraph(format_legend(names, scores), look) + "\n")
    for document in documents:
        print(format_document(document, names, look))
    sys.stdout.flush()  # read on, while the store is counted
    for table in count(args, store, names, scores, tokenizer):
        if table.subject in (None, names[0]):  # one index's tokens are enough for a terminal
            print(format_table(table, look))


if __name__ == "__main__":
    run_command(main)
