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
import itertools
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.errors import ConfigError, DataError, run_command
from preprocess.files import atomic_write_bytes, temporary_path
from preprocess.flags import USUAL, Parser
from preprocess.masking import (
    ARRAY_NEEDS,
    STRATEGIES,
    STREAM_SHOWN,
    StrategyInputs,
    choose_positions,
    counter_uniform,
    open_arrays,
)
from preprocess.progress import Progress
from preprocess.store import ARRAYS, Shard, TokenStore, iterate_blocks, open_array
from preprocess.store.layout import ColumnWriter
from preprocess.text.continuations import (
    WordTable,
    continuation_table,
    find_continuations,
    open_tokenizer,
)
from preprocess.view.overlaps import draw_overlaps, overlap_rows, overlap_tables, types_table
from preprocess.view.page import format_page
from preprocess.view.pieces import Marks, printable, read_documents
from preprocess.view.scale import Scale, read_scale
from preprocess.view.statistics import (
    Statistics,
    Vocabulary,
    count_masks,
    make_tables,
    type_names,
    word_table,
)
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


def describe(store: TokenStore, name: str, kind: str) -> list[str]:
    """Write what the JSON beside an array records, one line per key."""
    infos = [open_array(shard, name, kind)[1] for shard in store.shards]
    lines: list[str] = []

    def add(entries: dict[str, Any]) -> None:
        for key, value in entries.items():
            if key == "measure" and isinstance(value, dict):
                what = "above 0 is important" if value.get("boundary") else "no boundary at 0"
                lines.append(printable(
                    f"measure: {value.get('name')}, in {value.get('unit')}; {what}"))
            elif isinstance(value, dict):
                add(value)
            elif key not in FORMAT_KEYS and value is not None:
                lines.append(printable(f"{key}: {value}"))

    add(infos[0])  # shards differ only in the content of their sources
    strategy = _options(infos[0]).get("strategy")
    if strategy in STRATEGIES:
        lines.append(f"rule: {STRATEGIES[strategy].rule}")
    if kind == "mask":
        count = sum(info["count"] for info in infos)
        lines.append(f"masked: {count:,} of {store.num_tokens:,} tokens")
    return lines


def _options(info: dict[str, Any]) -> dict[str, Any]:
    """Return the options that an index was made with, as far as its JSON records them."""
    options = info.get("options")
    return options if isinstance(options, dict) else {}


def _recorded(store: TokenStore, index: str, key: str, kind: str) -> str | None:
    """Return the name of the array that an index was made from, recorded in its options as `key`.

    None if there is none, or if it was removed or replaced since.
    """
    options = [_options(open_array(shard, index, "mask")[1]) for shard in store.shards]
    # build_masks.py records `NAME (sha256 0123456789abcdef)`.
    name, _, digest = str(options[0].get(key) or "").partition(" ")
    if not name:
        return None
    try:
        found = [open_array(shard, name, kind)[1] for shard in store.shards]
    except DataError:
        return None
    unchanged = all(f"sha256 {info['sha256'][:16]}" in str(option.get(key))
                    for info, option in zip(found, options, strict=True))
    return name if unchanged or not digest else None


def source_scores(store: TokenStore, index: str) -> str | None:
    """Return the name of the scores that an index was chosen by, also through a matched index.

    None if there are none, or if an array on the way was removed or replaced since.
    """
    seen: set[str] = set()
    while index not in seen:
        seen.add(index)
        options = _options(open_array(store.shards[0], index, "mask")[1])
        if options.get("scores"):
            return _recorded(store, index, "scores", "scores")
        matched = _recorded(store, index, "match", ARRAY_NEEDS["match"])
        if matched is None:
            return None
        index = matched
    return None


def open_units(
    store: TokenStore, index: str | None, strategy: str | None, words: WordTable | None
) -> list[dict[str, Any]]:
    """Return, of each shard, what is one unit to an index, as `Marks` takes it.

    Args:
        index: or None for drawn masks. strategy: that chose the positions, if it is known.
        words: how words join; None where they cannot be told apart.
    """
    units = None
    if index is not None:
        options = _options(open_array(store.shards[0], index, "mask")[1])
        strategy = options.get("strategy")
        units = _recorded(store, index, "units", "units")
    if units is not None:
        return [{"units": open_array(shard, units, "units")[0]} for shard in store.shards]
    record = STRATEGIES.get(str(strategy))
    runs = record is not None and record.spans
    return [{"units": words, "runs": runs} for _ in store.shards]


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
    print(f"counted {statistics.tokens:,} tokens in {seconds:.1f} s "
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
    colour = (sys.stdout.isatty() and not os.environ.get("NO_COLOR")
              and os.environ.get("TERM") != "dumb")
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
