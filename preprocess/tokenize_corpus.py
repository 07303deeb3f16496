"""Tokenize text into a token store.

    python preprocess/tokenize_corpus.py --input reviews.csv --text_column text \\
        --tokenizer bert-base-uncased --output data/reviews

Documents are tokenized as a whole and then cut into sentences by character offsets, so the ids do
not depend on the cutting. Documents of nothing but spaces are dropped, NUL characters are removed,
and both are counted. You choose the number of shards; the number of workers only changes the speed,
not a byte of the store. A rerun with the same options hashes the shards that exist and the text
that they were made of, and makes the others. `--verify --output P` only hashes a store. HTML in a
text is reported, and removed with `--strip_html`.

With several shards, one process makes each of them from beginning to end. A single shard of
uncompressed lines is encoded by all workers, each of which reads byte ranges, and their results (2
bytes per token) are written in order. Any other single shard is read by one process, which hands
out the texts: for a large CSV or compressed file, give more shards. No process holds more than a
few batches.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import signal
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from preprocess.corpus import (
    check_file,
    cut_part,
    describe_first,
    find_html,
    hash_part,
    num_bytes,
    read_documents,
    resolve_path,
    source_kind,
    strip_html,
)
from preprocess.errors import ConfigError, DataError, check_shard, run_command
from preprocess.files import read_json
from preprocess.flags import USUAL, Parser
from preprocess.launchers import end_with_parent
from preprocess.machine import num_cores
from preprocess.progress import Progress, say
from preprocess.store import (
    StoreWriter,
    TokenStore,
    check_vocabulary,
    describe_tokenizer,
    join_shards,
    read_foreign,
    shard_prefix,
    tidy_store,
    verify_store,
)
from preprocess.text.checks import check_tokenizer, describe_tokenizing
from preprocess.text.encode import (
    Encoded,
    batch_texts,
    join_encoded,
    prepare_backend,
    user_tokens,
)
from preprocess.text.word_cache import WordCache

# What decides the content of a store, beside the files and the tokenizer.
OPTIONS = ("input", "text_column", "where", "split", "split_sentences", "language",
           "blank_line_documents", "unescape_newlines", "strip_html", "max_documents", "num_shards")
MAX_SHOWN = 60  # characters of a tag
MAX_ADOPTED_LENGTH = 1 << 16  # tokens in a sequence taken in from elsewhere; longer ones are cut


def build_parser() -> Parser:
    """Return the parser of this command."""
    parser = Parser(description=__doc__)
    add = parser.add_argument_group(USUAL).add_argument
    add("--input", nargs="+", metavar="F", help="files, hub:NAME[:CONFIG] or pypi:... "
        "(.txt, .csv, .tsv, .jsonl, .parquet, each also .gz or .zst)")
    add("--output", required=True, metavar="P", help="prefix of the token store")
    add("--tokenizer", metavar="T", help="folder, hub name or pypi:... folder")
    add("--text_column", default="text", metavar="C", help="column with the text (default: text); "
        "a number counts from 0 in a file without a header; A+B joins two columns with '. '")
    add("--num_workers", type=int, metavar="W", help="processes (default: one per core)")
    add("--overwrite", action="store_true", help="replace a store made with other options")
    add = parser.add_argument_group("documents and sequences").add_argument
    add("--where", nargs="+", default=[], metavar="COL=VALUE", help="keep only rows that match")
    add("--split", default="train", metavar="NAME", help="split of a hub: source")
    add("--split_sentences", action=argparse.BooleanOptionalAction, default=True,
        help="make one sequence per document (default: --split_sentences, one per sentence)")
    add("--language", default="en", metavar="CODE", help="language, for sentence boundaries")
    add("--blank_line_documents", action="store_true",
        help="in plain text, take the blocks between blank lines as documents, not the lines")
    add("--unescape_newlines", action="store_true",
        help="read the two characters \\n as a line end, as in the Yelp and Amazon CSVs")
    add("--strip_html", action="store_true", help="remove HTML: tags such as <br />, which end a "
        "line where HTML does, and entities such as &amp;, which become characters")
    add("--max_documents", type=int, metavar="N", help="read only the first N documents")
    add = parser.add_argument_group("shards").add_argument
    add("--num_shards", type=int, default=1, metavar="N", help="number of shards of the store")
    add("--shard_index", type=int, metavar="I", help="make only shard I, counted from 0")
    add = parser.add_argument_group("existing stores").add_argument
    add("--adopt", action="store_true", help="take --input (default: --output) as the prefix of a "
        ".bin and .idx made elsewhere, or several, one per shard: check them, strip special ids, "
        f"cut sequences longer than {MAX_ADOPTED_LENGTH:,} tokens, and write a complete store")
    add("--verify", action="store_true", help="only hash every byte of --output and of the arrays "
        "beside it")
    parser.add_argument("--dry_run", action="store_true",
                        help="check everything, print the plan, and exit")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and make the store."""
    args = build_parser().parse_args(argv, num_workers=1, num_shards=1, max_documents=1)
    _check_arguments(args)
    if args.verify:
        store, num_arrays = verify_store(args.output)
        print(f"{args.output}: complete; {store.num_tokens:,} tokens, {num_arrays} arrays")
        return
    for spec in [] if args.adopt else args.input:
        _describe_input(spec)  # report a wrong name before anything slow
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # our workers are processes
    tokenizer = load_fast_tokenizer(args.tokenizer)
    check_tokenizer(tokenizer, f"--tokenizer {args.tokenizer}")
    if args.adopt:
        adopt(args, tokenizer)
    else:
        tokenize(args, tokenizer)


def _check_arguments(args: argparse.Namespace) -> None:
    if not args.verify and not args.tokenizer:
        raise ConfigError("--tokenizer is missing: a folder, a hub name or pypi:...")
    if not args.adopt and not args.verify and not args.input:
        raise ConfigError("--input is missing: files, hub:NAME or pypi:...")
    if args.adopt:
        # `*.bin` in a shell names the stores of a folder.
        args.input = [re.sub(r"\.(bin|idx)$", "", name) for name in args.input or [args.output]]
        if args.num_shards not in (1, len(args.input)):
            raise ConfigError(
                f"--num_shards {args.num_shards}: --adopt makes one shard per --input, and "
                f"there are {len(args.input)}"
            )
        args.num_shards = len(args.input)
    if args.num_workers is None:
        args.num_workers = num_cores()
    if args.shard_index is not None:
        check_shard(args.shard_index, args.num_shards)
    if args.output.endswith(("/", ".bin", ".idx", ".json")):
        raise ConfigError(f"--output {args.output}: give a prefix, without an ending")
    pairs = [pair.partition("=") for pair in args.where]
    if not all(column and equals for column, equals, _ in pairs):
        raise ConfigError(f"--where {' '.join(args.where)}: write COLUMN=VALUE")
    args.where = {column: value for column, _, value in pairs}


def load_fast_tokenizer(spec: str) -> Any:
    """Load a transformers fast tokenizer from a folder, a hub name or `pypi:...`."""
    from transformers import AutoTokenizer

    path = resolve_path(spec)
    if path.is_file():
        raise DataError(f"--tokenizer {spec}: a file; give the folder that it is in")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # OSError, ValueError and more, with pages of advice
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"--tokenizer {spec}: cannot be loaded ({first}); give a folder with tokenizer.json "
            f"and tokenizer_config.json, or a hub name"
        ) from error
    if not tokenizer.is_fast:
        raise DataError(f"--tokenizer {spec}: has no fast version, so no character offsets")
    return tokenizer


# --------------------------------------------------------------------------- progress


class _Count:
    """Documents, tokens and bytes so far, on a bar of bytes if their number is known."""

    def __init__(self, args: argparse.Namespace, parts: list[tuple[int, int]]) -> None:
        sizes = [num_bytes(args.input, args.blank_line_documents, part) for part in parts
                 if args.max_documents is None]
        self._in_bytes = bool(sizes) and None not in sizes
        self._totals = [0, 0, 0]
        self.bar = Progress(
            sum(filter(None, sizes)) if self._in_bytes else args.max_documents,
            "B" if self._in_bytes else "document", label="tokenize",
        )

    def add(self, documents: int, tokens: int, num_bytes_read: int = 0) -> None:
        """Count this many more."""
        more = num_bytes_read if self._in_bytes else documents
        for i, number in enumerate((documents, tokens, num_bytes_read)):
            self._totals[i] += number
        self.bar.update(more, f"{self._totals[0]:,} documents, {self._totals[1]:,} tokens")

    def show(self, totals: list[int]) -> None:
        """Take the totals of the workers so far."""
        self.add(*(now - before for now, before in zip(totals, self._totals, strict=True)))


# --------------------------------------------------------------------------- shards and workers


def tokenize(args: argparse.Namespace, tokenizer: Any) -> None:
    """Make those of the requested shards that are not complete."""
    options = {name: getattr(args, name) for name in OPTIONS}
    options["input"] = [_describe_input(spec) for spec in args.input]
    with tempfile.TemporaryDirectory() as scratch:
        files = describe_tokenizer(tokenizer, Path(scratch) / "tokenizer")["files"]
    shards: list[tuple[int, int] | None] = [None]
    if args.num_shards > 1:
        shards = [(i, args.num_shards) for i in range(args.num_shards)
                  if args.shard_index in (None, i)]
    to_make = [s for s in shards if not _is_made(args, s, options, files, tokenizer)]
    if args.dry_run:
        for line in describe_first(args.input, args.text_column, where=args.where,
                                   split=args.split,
                                   blank_line_documents=args.blank_line_documents):
            say(line)
        say(f"{args.output}: {len(to_make)} of {args.num_shards} shards to be made, by "
            f"{args.num_workers} processes")
        return
    if to_make:
        seconds = _make_all(args, tokenizer, options, to_make)
    missing = join_shards(args.output, args.num_shards) if args.num_shards > 1 else ""
    if missing and args.shard_index is None:
        raise DataError(f"{args.output}.json: not written; {missing}")
    if missing:
        say(f"{args.output}.json: not written yet; {missing}")
    elif not to_make:
        tidy_store(args.output)  # after a run that was killed when it had just joined the shards
    else:
        counts = read_json(f"{args.output}.json")["counts"]  # opening the store reads the index
        rate = counts["tokens"] / seconds
        say(
            f"{args.output}: {counts['documents']:,} documents, {counts['sequences']:,} sequences, "
            f"{counts['tokens']:,} tokens; {seconds:.1f} s, {rate:,.0f} tokens/s"
        )
    made = [shard_prefix(args.output, *s) if s else args.output for s in shards]
    if html := _describe_html(args, made):
        say(html)
    say(_describe_tokenizing(args, tokenizer, made))


def _describe_html(args: argparse.Namespace, prefixes: list[str]) -> str:
    """Return a line about HTML in the documents of the shards of this call; "" if there is none."""
    with_html = documents = 0
    example = ""
    for prefix in prefixes:
        info = read_json(f"{prefix}.json")
        with_html += info["counts"].get("documents_with_html", 0)
        documents += info["counts"]["documents"] + info["counts"]["documents_dropped"]
        example = example or (info.get("notes") or {}).get("html", "")
    if not with_html:
        return ""
    share = f"{with_html:,} of {documents:,} documents ({with_html / documents:.1%})"
    if args.strip_html:
        return f"HTML removed from {share}, such as {example}"
    return (f"warning: HTML in {share}, such as {example}; type the command again with "
            f"--strip_html --overwrite to remove it")


def _describe_tokenizing(args: argparse.Namespace, tokenizer: Any, prefixes: list[str]) -> str:
    """Return the last line: what the tokenizer did to the shards of this call."""
    counts: Counter[str] = Counter()
    for prefix in prefixes:
        info = read_json(f"{prefix}.json")["counts"]
        if "unknown_tokens" not in info:  # made before they were counted
            tokens = TokenStore.open(prefix).shards[0].tokens
            info["unknown_tokens"] = int((tokens == tokenizer.unk_token_id).sum())
        counts.update(info)
    return describe_tokenizing(
        tokenizer, args.tokenizer, counts["tokens"], counts["unknown_tokens"])


def _describe_input(spec: str) -> dict[str, Any]:
    if source_kind(spec) == "hub":
        return {"name": spec}
    path = resolve_path(spec)
    check_file(path)
    return {"name": spec, "bytes": path.stat().st_size}


def _is_made(
    args: argparse.Namespace,
    shard: tuple[int, int] | None,
    options: dict[str, Any],
    files: dict[str, str],
    tokenizer: Any,
) -> bool:
    prefix = shard_prefix(args.output, *shard) if shard else args.output
    if args.overwrite:
        return False
    for path in filter(os.path.exists, dict.fromkeys((f"{args.output}.json", f"{prefix}.json"))):
        info = read_json(path)
        old = info.get("options") or {}
        differs = [
            f"{key} was {old.get(key)!r}, is {value!r}"
            for key, value in options.items()
            # A store of an earlier version lacks a switch that it did not have.
            if old.get(key) != value and (key in old or value is not False)
        ]
        if path == f"{prefix}.json" and not differs:
            differs += _changed_input(args, shard or (0, 1), info.get("notes") or {})
        if (info.get("tokenizer") or {}).get("files") != files:
            differs.append(f"the tokenizer was {(info.get('tokenizer') or {}).get('name')!r}")
        if user_tokens(tokenizer) and "unknown_tokens" not in info.get("counts", {}):
            differs.append("its added tokens were cut to pieces, and are now kept whole")
        if differs:
            raise ConfigError(
                f"{path}: made with other options ({'; '.join(differs)}); "
                f"give another --output, or --overwrite"
            )
    if not os.path.exists(f"{prefix}.json"):
        return False
    TokenStore.open(prefix, verify=True)  # report damage here, not later
    if not args.dry_run:
        tidy_store(prefix)
    say(f"{prefix}: complete already, skipped")
    return True


def _changed_input(
    args: argparse.Namespace, part: tuple[int, int], notes: dict[str, Any]
) -> list[str]:
    """Return a phrase per file that is not what a shard was made of; none if it does not say."""
    if not (known := notes.get("input_sha256")):
        return []
    now = _hash_input(args, part)
    return [f"{name} holds other text now" for name in now if now[name] != known.get(name)]


def _hash_input(args: argparse.Namespace, part: tuple[int, int]) -> dict[str, str]:
    return hash_part(args.input, args.blank_line_documents, part, args.max_documents)


def _make_all(
    args: argparse.Namespace,
    tokenizer: Any,
    options: dict[str, Any],
    shards: list[tuple[int, int] | None],
) -> float:
    """Make shards, several at once where there are several; return the seconds it took."""
    progress = _Count(args, [shard or (0, 1) for shard in shards])
    num_workers = args.num_workers if len(shards) == 1 else min(args.num_workers, len(shards))
    started = time.monotonic()
    with progress.bar:
        if num_workers == 1:
            _start_worker(tokenizer, args, options, None)
            for shard in shards:
                say(_make_shard(shard, _encode_part(args.input, shard or (0, 1)), progress.add))
        else:
            _make_in_pool(num_workers, args, tokenizer, options, shards, progress)
    return time.monotonic() - started


def _make_in_pool(
    num_workers: int,
    args: argparse.Namespace,
    tokenizer: Any,
    options: dict[str, Any],
    shards: list[Any],
    progress: _Count,
) -> None:
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
    totals = context.Array("q", 4)  # documents, tokens, bytes, and 1 to stop
    pool = ProcessPoolExecutor(
        num_workers, context, _start_worker, (tokenizer, args, options, totals)
    )
    try:
        pool.submit(int).result()  # fork now, before a reader starts threads
        if len(shards) == 1:
            _worker.update(tokenizer=tokenizer, args=args, options=options)
            blocks = _encode_in_pool(pool, args, shards[0] or (0, 1), 3 * num_workers)
            say(_make_shard(shards[0], blocks, progress.add))
            return
        left: set[Future] = {pool.submit(_make_shard_in_worker, shard) for shard in shards}
        while left:
            done, left = wait(left, timeout=0.5, return_when=FIRST_COMPLETED)
            progress.show(totals[:3])
            for future in done:
                say(future.result())
    except BrokenProcessPool:
        raise DataError(
            f"a worker was killed, perhaps because memory ran out; give the same command again, "
            f"with fewer than --num_workers {num_workers}"
        ) from None
    except BaseException:
        totals[3] = 1  # the workers end after their current batch, and clean up
        raise
    finally:
        pool.shutdown(cancel_futures=True)


class _Block(NamedTuple):
    """Some encoded documents, and what was met in them.

    with_nul, with_html: how many of them had NUL characters, and HTML.
    html: the first tag or entity, or "".
    num_read: bytes read for them.
    """

    encoded: Encoded
    with_nul: int
    with_html: int
    html: str
    num_read: int


def _make_shard(
    shard: tuple[int, int] | None,
    blocks: Iterable[_Block],
    report: Callable[[int, int, int], None],
) -> str:
    """Write one shard, or the complete store; return a sentence about it.

    Args:
        report: called with the documents, tokens and bytes of each block.
    """
    args, tokenizer, options = (_worker[name] for name in ("args", "tokenizer", "options"))
    counts = {"documents_dropped": 0, "documents_with_nul": 0, "documents_with_html": 0,
              "unknown_tokens": 0}
    notes: dict[str, Any] = {"html": "", "input_sha256": _hash_input(args, shard or (0, 1))}
    with StoreWriter(args.output, tokenizer, options, shard, args.overwrite) as writer:
        for block in blocks:
            ids, lengths, sequences, dropped = block.encoded
            writer.add_flat(ids, lengths, sequences)
            counts["documents_dropped"] += dropped
            counts["documents_with_nul"] += block.with_nul
            counts["documents_with_html"] += block.with_html
            notes["html"] = notes["html"] or block.html
            if tokenizer.unk_token_id is not None:
                counts["unknown_tokens"] += int((ids == tokenizer.unk_token_id).sum())
            report(len(sequences), len(ids), block.num_read)
        writer.close(counts, notes)
    sentence = (
        f"{writer.prefix}: {writer.num_documents:,} documents, {writer.num_tokens:,} tokens, "
        f"{counts['documents_dropped']:,} empty documents dropped"
    )
    if counts["documents_with_nul"]:
        sentence += f", NUL characters removed from {counts['documents_with_nul']:,}"
    return sentence


# --------------------------------------------------------------------------- encoding

_worker: dict[str, Any] = {}


def _start_worker(tokenizer: Any, args: argparse.Namespace, options: Any, totals: Any) -> None:
    _worker.update(tokenizer=tokenizer, args=args, options=options, totals=totals)
    _worker["cache"] = WordCache(prepare_backend(tokenizer))
    if totals is not None:  # a process of its own: its parent handles interrupts
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        end_with_parent()


def _batches(
    args: argparse.Namespace, specs: list[str], part: tuple[int, int]
) -> Iterator[tuple[list[str], int]]:
    """Yield the documents of a part in lists, with the bytes read since the list before."""
    num_read = 0

    def passed(num_bytes: int) -> None:
        nonlocal num_read
        num_read += num_bytes

    documents = read_documents(
        specs, args.text_column, args.where, args.split, args.blank_line_documents, part,
        args.max_documents, args.unescape_newlines, passed,
    )
    for batch in batch_texts(documents):
        yield batch, num_read
        num_read = 0
    yield [], num_read  # what was read behind the last document


def _encode(job: tuple[list[str], int]) -> _Block:
    texts, num_read = job
    args = _worker["args"]
    with_nul = sum("\0" in text for text in texts)
    if with_nul:
        texts = [text.replace("\0", "") for text in texts]
    found = [find_html(text) for text in texts]
    with_html = sum(map(bool, found))
    if with_html and args.strip_html:
        texts = [strip_html(text) if html else text
                 for text, html in zip(texts, found, strict=True)]
    language = args.language if args.split_sentences else None
    encoded = _worker["cache"].encode(texts, language)
    return _Block(encoded, with_nul, with_html, next(filter(None, found), "")[:MAX_SHOWN], num_read)


def _encode_part(specs: list[str], part: tuple[int, int]) -> Iterator[_Block]:
    totals = _worker["totals"]
    for job in _batches(_worker["args"], specs, part):
        if totals is not None and totals[3]:
            raise InterruptedError("another process has failed")
        yield _encode(job)


def _encode_range(job: tuple[list[str], tuple[int, int]]) -> _Block:
    encoded, with_nul, with_html, found, num_read = zip(*_encode_part(*job), strict=True)
    return _Block(join_encoded(list(encoded)), sum(with_nul), sum(with_html),
                  next(filter(None, found), ""), sum(num_read))


def _encode_in_pool(
    pool: ProcessPoolExecutor, args: argparse.Namespace, part: tuple[int, int], ahead: int
) -> Iterator[_Block]:
    """Encode a part in order, by byte ranges where there are any, and only a little ahead."""
    function: Callable[[Any], _Block] = _encode_range
    jobs: Any = cut_part(args.input, args.blank_line_documents, part, args.max_documents)
    if jobs is None:
        function, jobs = _encode, _batches(args, args.input, part)
    jobs = iter(jobs)
    waiting = deque(pool.submit(function, job) for job in itertools.islice(jobs, ahead))
    while waiting:
        yield waiting.popleft().result()
        waiting.extend(pool.submit(function, job) for job in itertools.islice(jobs, 1))


def _make_shard_in_worker(shard: tuple[int, int]) -> str:
    totals = _worker["totals"]

    def report(*more: int) -> None:
        with totals.get_lock():
            for i, number in enumerate(more):
                totals[i] += number

    return _make_shard(shard, _encode_part(_worker["args"].input, shard), report)


# --------------------------------------------------------------------------- adoption


def adopt(args: argparse.Namespace, tokenizer: Any) -> None:
    """Take in each `.bin` and `.idx` made elsewhere; a single one may stay where it is."""
    sources = args.input
    if os.path.exists(args.output + ".json") and not args.overwrite:
        raise ConfigError(f"{args.output}.json: a complete store; replace it with --overwrite")
    in_place = sources == [args.output]
    if not in_place and os.path.exists(args.output + ".bin") and not args.overwrite:
        raise ConfigError(f"{args.output}.bin: exists; give another --output or --overwrite")
    if args.dry_run:
        for source in sources:
            check_file(Path(f"{source}.bin"))
            check_file(Path(f"{source}.idx"))
        say(f"{args.output}: to be made of {', '.join(sources)}")
        return
    options = {
        "adopted": sources if len(sources) > 1 else sources[0],
        "max_sequence_length": MAX_ADOPTED_LENGTH,
    }
    for i, source in enumerate(sources):
        if args.shard_index in (None, i):
            shard = (i, len(sources)) if len(sources) > 1 else None
            _adopt_one(args, tokenizer, source, shard, options)


def _adopt_one(
    args: argparse.Namespace,
    tokenizer: Any,
    source: str,
    shard: tuple[int, int] | None,
    options: dict[str, Any],
) -> None:
    vocab_size = check_vocabulary(tokenizer)
    kept_ids = {tokenizer.unk_token_id, *tokenizer.convert_tokens_to_ids(user_tokens(tokenizer))}
    special = np.array(sorted(set(tokenizer.all_special_ids) - kept_ids), np.int64)
    counts = {"special_ids_stripped": 0, "sequences_cut": 0, "documents_dropped": 0,
              "unknown_tokens": 0}
    progress = _Count(args, [])
    # In place, the writer works beside the old files and replaces them at its end.
    with progress.bar, StoreWriter(args.output, tokenizer, options, shard, True) as writer:
        for sequences in read_foreign(source):
            kept = []
            for ids in sequences:
                if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
                    wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
                    raise DataError(
                        f"{source}.bin: token id {wrong} is not in the vocabulary of --tokenizer "
                        f"{args.tokenizer} (0 to {vocab_size - 1}); name the one that made it"
                    )
                clean = ids[~np.isin(ids, special)]
                counts["special_ids_stripped"] += len(ids) - len(clean)
                if tokenizer.unk_token_id is not None:
                    counts["unknown_tokens"] += int((clean == tokenizer.unk_token_id).sum())
                counts["sequences_cut"] += len(clean) > MAX_ADOPTED_LENGTH
                starts = range(0, len(clean), MAX_ADOPTED_LENGTH)
                kept += [clean[i : i + MAX_ADOPTED_LENGTH] for i in starts]
            counts["documents_dropped"] += not kept
            if kept:
                writer.add_document(kept)
                progress.add(1, sum(map(len, kept)))
        writer.close(counts)
    said = ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in counts.items())
    say(f"{writer.prefix}: {writer.num_documents:,} documents, {writer.num_tokens:,} tokens, "
        f"{said}")
    say(describe_tokenizing(
        tokenizer, args.tokenizer, writer.num_tokens, counts["unknown_tokens"]))


if __name__ == "__main__":
    run_command(main)
