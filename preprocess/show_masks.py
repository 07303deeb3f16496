"""Show which tokens a mask index holds, and how several indices overlap.

    python preprocess/show_masks.py --tokens P --mask_index mr-sel --compare mr-ctl
    python preprocess/show_masks.py --tokens P --masking whole_word --random --containing waiter \\
        --num_documents 50 --html F
    python preprocess/show_masks.py --tokens P --overlaps mr-sel mr-ctl tfidf --output runs/overlaps

In the terminal masked tokens are in [brackets] and those of `--compare` in {braces}, so the text
is readable without colours too (`NO_COLOR`, a pipe); masked tokens of one word or unit share them.
Tokens are coloured by the scores that the index was chosen by, or by `--scores`. The page that
`--html` writes is a single file.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.errors import ConfigError, run_command
from preprocess.files import atomic_write_bytes, temporary_path
from preprocess.flags import USUAL, Parser
from preprocess.masking import STRATEGIES, StrategyInputs, choose_positions, open_arrays
from preprocess.progress import Progress, say
from preprocess.store import ARRAYS, TokenStore
from preprocess.store.layout import ColumnWriter
from preprocess.text.continuations import continuation_table, open_tokenizer, word_table
from preprocess.view.choice import choose_documents
from preprocess.view.origins import describe, open_units, source_scores
from preprocess.view.overlaps import draw_overlaps, overlap_rows, overlap_tables, types_table
from preprocess.view.page import format_page
from preprocess.view.pieces import Marks, read_documents
from preprocess.view.scale import Scale, read_scale
from preprocess.view.statistics import (
    Statistics,
    Vocabulary,
    count_masks,
    make_tables,
    type_names,
)
from preprocess.view.tables import Table
from preprocess.view.terminal import format_document, format_legend, wants_colour


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line and check it."""
    parser = Parser(description=__doc__)
    add = parser.add_argument_group(USUAL).add_argument
    add("--tokens", required=True, metavar="P", help="prefix of the token store")
    add("--mask_index", metavar="NAME", help="name of the mask index to show")
    add("--masking", metavar="NAME",
        help="instead: show the masks that training draws by this rule in its first epoch: "
        f"{', '.join(name for name, one in STRATEGIES.items() if one.drawn)}")
    add("--mlm_probability", type=float,
        help="mask rate of --masking, above 0 and at most 1 (default: 0.15)")
    add("--compare", metavar="NAME", help="name of a second mask index, to show beside it")
    add("--html", metavar="FILE", help="write a page to this file instead of the terminal")
    add = parser.add_argument_group("several indices").add_argument
    add("--overlaps", nargs="+", metavar="NAME",
        help="instead of documents: which tokens each pair of these indices (and --masking) shares")
    add("--types", type=int, metavar="N",
        help="with --overlaps: list the N tokens that each index masks most often (default: 20)")
    add("--output", metavar="FOLDER",
        help="with --overlaps: write overlaps.csv, overlaps.png and tables.md there")
    add = parser.add_argument_group("which documents").add_argument
    add("--documents", metavar="N,N-N", help="numbers of documents to show, such as 0,5,10-12")
    add("--num_documents", type=int, help="instead: number of documents to show (default: 3)")
    add("--random", action="store_true", help="draw them from the store, not the first ones")
    add("--seed", type=int, default=42, help="seed of --random and --masking")
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
        argv, num_documents=1, max_document_tokens=1, max_statistics_tokens=0, types=1)
    _check_names(args)
    for name in ("num_documents", "random", "containing"):
        if args.documents is not None and getattr(args, name):
            raise ConfigError(f"--documents and --{name} exclude each other; give only one")
    if args.containing is not None and not args.containing.strip():
        raise ConfigError("--containing is empty; give a word")
    args.num_documents = args.num_documents or 3
    return args


def _check_names(args: argparse.Namespace) -> None:
    """Check which indices are asked for, and that the other flags go with them."""
    if args.overlaps:
        names = [*args.overlaps, *([args.masking] if args.masking else [])]
        double = next((name for name in args.overlaps if args.overlaps.count(name) > 1), None)
        if len(names) < 2 or double:
            what = f"names {double} twice" if double else "names one index"
            raise ConfigError(f"--overlaps {what}; give two or more different ones, such as "
                              "--overlaps policy control")
        for name in ("mask_index", "compare", "html", "documents", "num_documents", "random",
                     "containing", "scores"):
            if getattr(args, name):
                raise ConfigError(f"--overlaps shows no documents, so --{name} has no use; leave "
                                  "it out")
        if args.max_statistics_tokens == 0:
            raise ConfigError("--max_statistics_tokens 0 leaves nothing to count for --overlaps; "
                              "give a larger number, or leave it out")
    else:
        if bool(args.mask_index) == bool(args.masking):
            raise ConfigError("give either --mask_index NAME, or --masking NAME for masks drawn in "
                              "training; --overlaps A B compares several indices")
        for name in ("types", "output"):
            if getattr(args, name):
                raise ConfigError(f"--{name} has no use without --overlaps; leave it out")
        if args.compare and args.compare == args.mask_index:
            raise ConfigError(
                f"--compare {args.compare} is the shown index itself; give another one")
    if args.mlm_probability is not None and not args.masking:
        raise ConfigError("--mlm_probability has no use without --masking: an index has its own "
                          "mask rate; leave it out")
    rate = args.mlm_probability = 0.15 if args.mlm_probability is None else args.mlm_probability
    if not 0 < rate <= 1:
        raise ConfigError(
            f"--mlm_probability {rate}: must be above 0 and at most 1, such as 0.15")
    if args.masking:
        strategy = STRATEGIES.get(args.masking)
        if strategy is None or not strategy.drawn:
            drawn = ", ".join(key for key, one in STRATEGIES.items() if one.drawn)
            hint = ("build an index with preprocess/build_masks.py and give --mask_index"
                    if strategy else f"known: {drawn}")
            raise ConfigError(f"--masking {args.masking}: not drawn anew each epoch; {hint}")


# ---------------------------------------------------------------------------- the command


def draw_masks(
    store: TokenStore, strategy: str, rate: float, seed: int, tokenizer: Any
) -> list[np.ndarray]:
    """Draw the masks of the first epoch of training, in mapped files that have no name any more.

    Returns:
        Masked positions of each shard, `(M,)` uint32.
    """
    words = continuation_table(tokenizer) if "words" in STRATEGIES[strategy].needs else None
    arrays = []
    with (tempfile.TemporaryDirectory(prefix="selmask-") as folder,
          Progress(store.num_tokens, "token", label="draw") as progress):
        for number, shard in enumerate(store.shards):
            path = Path(folder, f"{number}.npy")
            column = ColumnWriter(path, ARRAYS["mask"])
            with column.stream:
                for block in choose_positions(
                    shard, strategy, StrategyInputs(words=words), rate=rate, seed=seed,
                    all_special_ids=store.all_special_ids,
                ):
                    column.add(block)
                column.close()
            arrays.append(np.load(temporary_path(path), mmap_mode="r"))
            progress.update(shard.num_tokens)
    return arrays


def check_output(flag: str, path: Path) -> None:
    """Refuse a page or a folder that cannot be written, before any work."""
    if flag == "html" and path.is_dir():
        raise ConfigError(f"--html {path} is a folder; give a file, such as {path / 'masks.html'}")
    below = path / "tables.md" if flag == "output" else path
    folder = next(folder for folder in below.absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"--{flag} {path}: nothing can be written in {folder}; give another")


def timed_count(store: TokenStore, *args: Any, **options: Any) -> Statistics:
    """Do what `count_masks` does, and print its speed."""
    started = time.monotonic()
    statistics = count_masks(store, *args, **options)
    seconds = time.monotonic() - started
    say(f"counted {statistics.tokens:,} tokens in {seconds:.1f} s "
        f"({statistics.tokens / max(seconds, 1e-9):,.0f} tokens/s)\n")
    return statistics


def show_overlaps(
    args: argparse.Namespace, store: TokenStore, tokenizer: Any,
    drawn: dict[str, list[np.ndarray]],
) -> None:
    """Print which tokens the indices share and mask most often; write `--output`."""
    for name in args.overlaps:
        open_arrays(store, store.shards, "overlaps", name, "mask")
    names = [*args.overlaps, *drawn]
    statistics = timed_count(store, names, max_tokens=args.max_statistics_tokens, drawn=drawn)
    types = types_table(
        [index.type_masked for index in statistics.indices],
        type_names(tokenizer, store.vocab_size), names, args.types or 20)
    overlaps = statistics.overlaps
    for table in (*overlap_tables(overlaps, names, width=_width()), types):
        print(table.as_text(_width()) + "\n")
    if not args.output:
        return
    folder = Path(args.output)
    files = {
        "overlaps.csv": overlap_rows(overlaps, names).as_csv().encode(),
        "tables.md": "\n".join(table.as_markdown() for table in (
            *overlap_tables(overlaps, names), types)).encode(errors="replace"),
    }
    try:
        files["overlaps.png"] = draw_overlaps(overlaps, names)
    except ImportError:
        print("no overlaps.png: matplotlib is not installed (pip install 'selmask[plot]')")
    for name, content in files.items():
        atomic_write_bytes(folder / name, content)
        print(folder / name)


def _width() -> int:
    return min(shutil.get_terminal_size().columns, 100) if sys.stdout.isatty() else 100


def show_documents(
    args: argparse.Namespace, store: TokenStore, tokenizer: Any,
    drawn: dict[str, list[np.ndarray]],
) -> None:
    """Print documents and statistics, or write them as a page."""
    def read(flag: str, name: str | None, kind: str) -> list[Any]:
        if not name:
            return [None] * len(store.shards)
        return [array for array, _ in open_arrays(store, store.shards, flag, name, kind)]

    masks = next(iter(drawn.values()), None) or read("mask_index", args.mask_index, "mask")
    compared = read("compare", args.compare, "mask")
    stored = [name for name in (args.mask_index, args.compare) if name]
    names = [*drawn, *stored]
    scores = args.scores or next(
        filter(None, (source_scores(store, name) for name in stored)), None)
    scored = read("scores", scores, "scores")
    scale = read_scale(store, scores) if scores else Scale()
    units = open_units(store, args.mask_index, args.masking, word_table(tokenizer))
    marks = [Marks(*arrays, **unit)
             for *arrays, unit in zip(masks, compared, scored, units, strict=True)]
    numbers = choose_documents(args, store, tokenizer)
    documents = read_documents(
        store.shards, marks, numbers, tokenizer, args.max_document_tokens, scale)
    origins = {f"masks of {name}": [
        "drawn as in the first epoch of training, over windows of documents in place of rows, with "
        f"--mlm_probability {args.mlm_probability:g} and --seed {args.seed}",
        f"rule: {STRATEGIES[args.masking].rule}"] for name in drawn}
    origins |= {f"mask index {name}": describe(store, name, "mask") for name in stored}
    if scores:
        origins[f"scores {scores}"] = describe(store, scores, "scores")

    def count() -> list[Table]:
        if args.max_statistics_tokens == 0:
            return []
        vocabulary = Vocabulary.read(tokenizer, store.vocab_size)
        statistics = timed_count(
            store, names, vocabulary, scores, args.max_statistics_tokens, scale, drawn)
        return make_tables(statistics, names, vocabulary, bool(scores))

    if args.html:
        tables = count()
        title = f"Masks of {Path(store.prefix).name}: {' beside '.join(names)}"
        page = format_page(title, origins, list(documents), tables, names, scores, scale)
        # A character that is no character (half a surrogate pair) has no bytes.
        atomic_write_bytes(args.html, page.encode(errors="replace"))
        print(args.html)
        return
    colour = wants_colour()
    for subject, lines in origins.items():
        print("\n  ".join([subject, *lines]) + "\n")
    print(format_legend(names, scores, scale) + "\n")
    for document in documents:
        print(format_document(document, names, colour))
    sys.stdout.flush()  # something to read while the store is counted
    for table in count():
        if table.subject in (None, names[0]):  # a terminal shows the tokens of one index
            print(table.as_text(_width()) + "\n")


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    for flag in ("html", "output"):
        if getattr(args, flag):
            check_output(flag, Path(getattr(args, flag)))
    store = TokenStore.open(args.tokens)
    tokenizer = open_tokenizer(store.tokenizer_dir)
    drawn = {}
    if args.masking:
        drawn[f"{args.masking} (drawn)"] = draw_masks(
            store, args.masking, args.mlm_probability, args.seed, tokenizer)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows ASCII alone
    try:
        (show_overlaps if args.overlaps else show_documents)(args, store, tokenizer, drawn)
    except BrokenPipeError:
        # `| head` has closed the pipe. Buffered output must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    run_command(main)
