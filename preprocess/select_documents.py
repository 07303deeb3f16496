"""Choose documents like a task's texts, or those without its test texts.

    python preprocess/select_documents.py --tokens data/web --like train.csv --number 50000 \\
        --output data/web-like-train
    python preprocess/select_documents.py --tokens data/web --task mr --data_dir data/mr

`--like` takes the N documents that are most probably of the kind of some texts, by the words and
pairs of words in them, and compares only documents of about equal length. A task counts how many of
its test texts the store holds, kept in `P.leakage.json`; `--drop_leaked` leaves out the documents
that hold one. Both read the store in order, in memory that grows with N and the test texts only.
The new store has the shards of the old one, and its documents in their order.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from preprocess.corpus import (
    LEAKAGE_VERSION,
    TASKS,
    LeakIndex,
    check_file,
    describe_leakage,
    leakage_path,
    load_task,
    read_documents,
    read_leakage,
    resolve_path,
    source_kind,
    split_words,
    write_leakage,
)
from preprocess.corpus.resampling import (
    BUCKETS,
    CANDIDATE,
    OCTAVES,
    SMALL_TARGET,
    Best,
    choose,
    count_buckets,
    digest_ids,
    hash_grams,
    log_ratios,
    octaves_of,
    share_out,
    weigh,
)
from preprocess.errors import ConfigError, DataError, run_command, visible
from preprocess.files import read_json
from preprocess.flags import USUAL, Parser
from preprocess.identity import build as build_identity
from preprocess.identity import compare, digest, sealed
from preprocess.progress import Progress, say, show
from preprocess.store import (
    Shard,
    StoreWriter,
    TokenStore,
    iterate_blocks,
    ranges,
    shard_prefix,
)
from preprocess.text.decode import Decoder
from preprocess.text.encode import batch_texts, encode_batch, prepare_backend
from preprocess.view.tables import Table

BLOCK_DOCUMENTS = 4096
BLOCK_TOKENS = 1 << 18  # decoded at a time: about 100 MB of texts and words
SELECTION_VERSION = 1  # of the rule; part of the identity
TASK_FLAGS = ("data_dir", "train_file", "validation_file", "test_file", "pair_column",
              "test_fraction", "task_name")


def build_parser() -> Parser:
    """Return the parser of this command."""
    parser = Parser(description=__doc__)
    add = parser.add_argument_group(USUAL).add_argument
    add("--tokens", required=True, metavar="P", help="prefix of the token store to choose from")
    add("--like", nargs="+", metavar="F", help="texts to resemble: files or hub:NAME[:CONFIG], as "
        "for tokenize_corpus.py; never test texts")
    add("--text_column", default="text", metavar="C",
        help="column with the text, of --like and of --task custom (default: text)")
    add("--number", type=int, metavar="N", help="number of documents to take, for --like")
    add("--output", metavar="Q", help="prefix of the new token store")
    add("--overwrite", action="store_true", help="replace a store, or a count, made before")
    add = parser.add_argument_group("leakage: test texts in the store").add_argument
    add("--task", choices=list(TASKS), metavar="TASK",
        help=f"task whose test texts to look for: {', '.join(TASKS)}")
    add("--drop_leaked", action="store_true", help="leave out the documents that hold a test text, "
        "or whose 8-grams cover half of one")
    add("--data_dir", metavar="DIR", help="folder (or file) with the published data of the task")
    add("--train_file", metavar="FILE", help="labelled training file, for --task custom")
    add("--validation_file", metavar="FILE", help="labelled validation file")
    add("--test_file", metavar="FILE", help="labelled test file, for --task custom")
    add("--label_column", default="label", metavar="NAME", help="column with the label")
    add("--pair_column", metavar="NAME", help="column with the aspect")
    add("--task_name", metavar="NAME", help="what to call the task (default: of custom the name of "
        "--train_file, or of its folder where that is train; else --task)")
    add("--test_fraction", type=float, metavar="F",
        help="of a task without an official split: share of the texts that are for testing")
    parser.add_argument("--seed", type=int, default=42, help="seed of the draw of --like")
    parser.add_argument("--dry_run", action="store_true",
                        help="check everything, print the plan, and exit")
    return parser


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line and check it."""
    args = build_parser().parse_args(argv, number=1)
    if not args.like and not args.task:
        raise ConfigError("nothing to do: give --like F --number N --output Q, or --task TASK")
    if args.like and not (args.number and args.output):
        raise ConfigError("--like needs --number N, the documents to take, and --output Q")
    if args.number and not args.like:
        raise ConfigError(f"--number {args.number} needs --like F, the texts to resemble")
    if args.drop_leaked and not (args.task and args.output):
        raise ConfigError("--drop_leaked needs --task TASK and --output Q")
    if args.output and not (args.like or args.drop_leaked):
        raise ConfigError(
            f"--output {args.output}: nothing says which documents to take; give --drop_leaked, "
            f"or --like F --number N"
        )
    for name in TASK_FLAGS:
        if getattr(args, name) and not args.task:
            raise ConfigError(f"--{name} {getattr(args, name)} needs --task TASK")
    if args.output:
        if args.output.endswith(("/", ".bin", ".idx", ".json")):
            raise ConfigError(f"--output {args.output}: give a prefix, without an ending")
        if os.path.realpath(args.output) == os.path.realpath(args.tokens):
            raise ConfigError(
                f"--output {args.output} is the store of --tokens; give another prefix")
    return args


# --------------------------------------------------------------------------- texts and documents


@dataclass(frozen=True)
class _Block:
    """Some documents of a shard, decoded.

    first: number of the first one in the store.
    ids: of all of them, `(T,)` uint16.
    starts: first token of each in `ids`, and the end, `(D+1,)` int64.
    """

    first: int
    ids: np.ndarray
    starts: np.ndarray
    texts: list[str]

    def digests(self, seed: int) -> np.ndarray:
        """Return a digest of each document, `(D,)` uint64."""
        return np.array([digest_ids(self.ids[a:b], seed)
                         for a, b in itertools.pairwise(self.starts.tolist())], np.uint64)


def document_blocks(shard: Shard) -> Iterator[tuple[int, np.ndarray]]:
    """Yield runs of documents: number of the first one, and the first token of each and the end."""
    for first in range(0, shard.num_documents, BLOCK_DOCUMENTS):
        starts = shard.sequence_offsets[shard.document_offsets[first : first + BLOCK_DOCUMENTS + 1]]
        for block in iterate_blocks(starts, BLOCK_TOKENS):
            yield first + block.start, starts[block.start : block.stop + 1]


class Reader:
    """The documents of a store as texts, and other texts as they would be in it."""

    def __init__(self, store: TokenStore) -> None:
        from transformers import AutoTokenizer

        self.store = store
        self.tokenizer: Any = AutoTokenizer.from_pretrained(store.tokenizer_dir)
        self.tokenizer.name_or_path = store.info["tokenizer"]["name"]
        self._backend = prepare_backend(self.tokenizer)
        self._decoder = Decoder(self._backend)

    def through(self, texts: Iterable[str]) -> Iterator[list[str]]:
        """Yield texts as the tokenizer leaves them, in lists; what is empty then is left out."""
        for batch in batch_texts(texts):
            ids, lengths, _, _ = encode_batch(self._backend, batch, None)
            yield self._decoder.decode(ids, np.concatenate([[0], np.cumsum(lengths)]))

    def blocks(self, progress: Progress) -> Iterator[_Block]:
        """Yield all documents of the store, decoded."""
        before = 0
        for shard in self.store.shards:
            for first, starts in document_blocks(shard):
                ids = shard.tokens[starts[0] : starts[-1]]
                starts = starts - starts[0]
                yield _Block(before + first, ids, starts, self._decoder.decode(ids, starts))
                progress.update(len(ids))
            before += shard.num_documents


# --------------------------------------------------------------------------- leakage


@dataclass
class _Test:
    """The test texts of a task: their index, the task's name and a digest of the texts."""

    index: LeakIndex
    name: str
    digest: str


def read_test(args: argparse.Namespace, reader: Reader) -> _Test | None:
    """Read the test texts of the task, if there is one."""
    if not args.task:
        return None
    columns = {name: getattr(args, name) for name in ("text_column", "label_column")}
    task = load_task(
        args.task, **columns, **{name: getattr(args, name) for name in TASK_FLAGS})
    texts = sorted({example.text for example in task.splits["test"]})
    read = [split_words(text) for some in reader.through(texts) for text in some]
    # Texts that the tokenizer leaves empty are in no store.
    read += [[]] * (len(texts) - len(read))
    unknown = "".join(split_words(reader.tokenizer.unk_token or ""))
    return _Test(LeakIndex(read, unknown), task.name, digest(texts))


def count_leakage(reader: Reader, test: _Test, dropped: int) -> list[int]:
    """Count the test texts in a store and keep the result; return the documents that leak."""
    store, leaked = reader.store, []
    test.index.forget()
    with Progress(store.num_tokens, "token", label="leakage") as progress:
        for block in reader.blocks(progress):
            found = test.index.scan([split_words(text) for text in block.texts])
            leaked += (block.first + np.flatnonzero(found)).tolist()
    write_leakage(store.prefix, {
        **test.index.counts(), "task": test.name, "test_digest": test.digest,
        "store": store.fingerprint, "documents_leaked": len(leaked), "documents_dropped": dropped,
    })
    return leaked


def find_leaked(args: argparse.Namespace, reader: Reader, test: _Test) -> list[int]:
    """Say what the store holds of the test texts; return the documents that leak.

    The list is empty if a count made before answers the question and nothing is to be dropped.
    """
    prefix = reader.store.prefix
    known = None
    try:
        known = read_leakage(prefix)
    except DataError:
        if not args.overwrite:
            raise
    same = known and known["test_digest"] == test.digest and known["version"] == LEAKAGE_VERSION
    leaked: list[int] = []
    if args.drop_leaked or args.overwrite or not same:
        # A store that was made without leaking documents keeps that number.
        dropped = known["documents_dropped"] if known and same else 0
        leaked = count_leakage(reader, test, dropped)
    say(describe_leakage(prefix))
    record = read_leakage(prefix)
    if record and record["documents_leaked"] and not args.drop_leaked:
        say(f"{record['documents_leaked']:,} of {reader.store.num_documents:,} documents hold them "
            f"complete or by half; --drop_leaked --output Q leaves these documents out")
    return leaked


# --------------------------------------------------------------------------- texts to resemble


@dataclass
class _Target:
    """N-grams of the texts to resemble in each bucket, and a digest of them."""

    counts: np.ndarray
    digest: str


def read_target(args: argparse.Namespace, reader: Reader, test: _Test | None) -> _Target:
    """Read the texts of `--like`, without test texts of the task.

    Raises:
        DataError: no text, or nothing but test texts.
    """
    counts = np.zeros(BUCKETS, np.int64)
    content = hashlib.sha256()
    num_texts, equal = 0, []
    for texts in reader.through(read_documents(args.like, args.text_column)):
        num_texts += len(texts)
        if test is not None:
            leaks = test.index.scan([split_words(text) for text in texts]).tolist()
            equal += [text for text, is_test in zip(texts, leaks, strict=True) if is_test]
            texts = [text for text, is_test in zip(texts, leaks, strict=True) if not is_test]
        counts += count_buckets(hash_grams(texts)[0])
        for text in texts:
            content.update(text.encode() + b"\0")
    shown, named = " ".join(args.like), test.name if test else ""
    if equal:
        say(f"warning: --like {shown}: {len(equal):,} of {num_texts:,} texts hold a test text of "
            f"{named} and are left out, such as {visible(equal[0][:80])!r}")
    if not counts.sum():
        raise DataError(f"--like {shown}: no text but test texts of {named}; give training or "
                        f"unlabelled texts" if equal else f"--like {shown}: no text in it")
    smooth = counts.sum() < SMALL_TARGET
    say(f"--like {shown}: {num_texts - len(equal):,} texts, {counts.sum():,} words and pairs of "
        f"words{' (few, so smoothed)' if smooth else ''}")
    return _Target(counts, content.hexdigest())


@dataclass
class _Octaves:
    """Documents, and their summed weights per n-gram, of the corpus in each octave of length."""

    documents: np.ndarray
    means: np.ndarray


def select(
    args: argparse.Namespace, reader: Reader, target: _Target, out: np.ndarray
) -> np.ndarray:
    """Return the numbers of the documents to take, ascending; print what they are.

    Args:
        out: numbers of documents that are not to be taken.
    """
    store = reader.store
    raw = np.zeros(BUCKETS, np.int64)
    corpus = _Octaves(np.zeros(OCTAVES, np.int64), np.zeros(OCTAVES))
    with Progress(2 * store.num_tokens, "token", label="select") as progress:
        for block in reader.blocks(progress):
            buckets, owners, lengths = hash_grams(block.texts)
            free = ~np.isin(block.first + np.arange(len(lengths)), out)
            raw += count_buckets(buckets[free[owners]])
            corpus.documents += np.bincount(octaves_of(lengths)[free], minlength=OCTAVES)
        if not raw.sum():
            raise DataError(f"{store.prefix}: holds no words to compare with --like")
        smoothing = 1.0 if target.counts.sum() < SMALL_TARGET else 0.0
        ratios = log_ratios(target.counts, raw, smoothing)
        # Twice as many as are wanted, so that duplicates leave enough of each length.
        room = share_out(2 * args.number, corpus.documents, corpus.documents)
        best = [Best(number) for number in room.tolist()]
        for block in reader.blocks(progress):
            candidates = np.empty(len(block.texts), CANDIDATE)
            candidates["digest"] = block.digests(args.seed)
            candidates["document"] = block.first + np.arange(len(candidates))
            candidates["tokens"] = np.diff(block.starts)
            candidates["key"], candidates["mean"], octaves = weigh(
                block.texts, candidates["digest"], ratios)
            free = ~np.isin(candidates["document"], out)
            corpus.means += np.bincount(
                octaves[free], candidates["mean"][free], minlength=OCTAVES)
            for octave in np.unique(octaves[free]).tolist():
                best[octave].add(candidates[free & (octaves == octave)])
    taken = choose(best, args.number, corpus.documents)
    _describe_selection(args, corpus, taken)
    return np.sort(np.concatenate(taken)["document"])


def _describe_selection(
    args: argparse.Namespace, corpus: _Octaves, taken: list[np.ndarray]
) -> None:
    rows = []
    for octave, some in enumerate(taken):
        if count := int(corpus.documents[octave]):
            rows.append({
                "words": f"{1 << octave if octave else 0:,} to {(2 << octave) - 1:,}",
                "documents": f"{count:,}", "taken": f"{len(some):,}",
                "tokens taken": f"{int(some['tokens'].sum()):,}",
                "log weight, all": f"{corpus.means[octave] / count:.3f}",
                "taken only": f"{some['mean'].mean():.3f}" if len(some) else "-",
            })
    every = np.concatenate(taken)
    num_documents = int(corpus.documents.sum())
    show(Table.of("Documents by length", rows, "The log weight is ln p(texts of --like) - ln "
                 "p(corpus) per word and pair of words; above 0 is more like the texts.").as_text())
    say(f"log weight {corpus.means.sum() / num_documents:.3f} in {num_documents:,} documents, "
        f"{every['mean'].mean():.3f} in the {len(every):,} taken")
    if len(every) < min(args.number, num_documents):
        say(f"{len(every):,} documents taken where {args.number:,} were asked for: others are "
            f"exact duplicates, and no length gives more than twice its share")
    elif args.number >= num_documents:
        say(f"--number {args.number:,}: the store has no more than {num_documents:,} documents, so "
            f"all are taken, duplicates once")


# --------------------------------------------------------------------------- the new store


def is_made(prefix: str, identity: dict[str, Any], overwrite: bool) -> bool:
    """Return whether a store or shard was made with the same options.

    Raises:
        ConfigError: it was made with others, or by another command.
    """
    if overwrite or not os.path.exists(f"{prefix}.json"):
        return False
    remedy = "give another --output, or --overwrite"
    old = (read_json(f"{prefix}.json").get("options") or {}).get("identity")
    if not old:
        raise ConfigError(f"{prefix}.json: a token store of another command; {remedy}")
    compare(old, identity, f"--output {prefix}", remedy)
    TokenStore.open(prefix, verify=True)
    return True


def write_store(
    reader: Reader, output: str, choose_of: Callable[[int, int], np.ndarray],
    identity: dict[str, Any], overwrite: bool,
) -> None:
    """Write the chosen documents, shard by shard.

    Args:
        choose_of: returns the documents to take from a number on and before another, ascending.
    """
    store, before = reader.store, 0
    options = {**sealed(identity), "from": store.info.get("options")}
    with Progress(store.num_documents, "document", label="write") as progress:
        for number, shard in enumerate(store.shards):
            here = choose_of(before, before + shard.num_documents) - before
            before += shard.num_documents
            place = (number, len(store.shards)) if len(store.shards) > 1 else None
            if place and is_made(shard_prefix(output, *place), identity, overwrite):
                continue
            with StoreWriter(output, reader.tokenizer, options, place, overwrite) as writer:
                for first in range(0, len(here), BLOCK_DOCUMENTS):
                    _copy(shard, here[first : first + BLOCK_DOCUMENTS], writer)
            progress.update(shard.num_documents)


def _copy(shard: Shard, documents: np.ndarray, writer: StoreWriter) -> None:
    """Append documents of a shard, `(D,)` int64, a few at a time where they are long."""
    begins, ends = shard.document_offsets[documents], shard.document_offsets[documents + 1]
    offsets = shard.sequence_offsets
    sizes = np.concatenate([[0], np.cumsum(offsets[ends] - offsets[begins])])
    for block in iterate_blocks(sizes, BLOCK_TOKENS):
        first, last = begins[block], ends[block]
        tokens = [shard.tokens[a:b] for a, b in zip(offsets[first], offsets[last], strict=True)]
        sequences = ranges(first, last - first)
        writer.add_flat(
            np.concatenate(tokens), offsets[sequences + 1] - offsets[sequences], last - first)


def main(argv: list[str] | None = None) -> None:
    """Count, choose and write."""
    args = parse_arguments(argv)
    for spec in args.like or ():
        if source_kind(spec) != "hub":
            check_file(resolve_path(spec))
    store = TokenStore.open(args.tokens)
    reader = Reader(store)
    test = read_test(args, reader)
    target = read_target(args, reader, test) if args.like else None
    identity = build_identity(
        "select_documents",
        inputs={"store": store.fingerprint, "task": test and test.digest},
        choice={"seed": args.seed if args.like else None},
        options={"like": target and target.digest, "number": args.number,
                 "drop_leaked": args.drop_leaked, "version": SELECTION_VERSION},
    )
    made = bool(args.output) and is_made(args.output, identity, args.overwrite)
    if made:
        say(f"{args.output}: complete, made with the same options")
    if args.dry_run:
        if not made:
            say(f"{args.tokens}: {store.num_documents:,} documents to look through"
                + (f", for {args.output}" if args.output else ""))
        return
    if made:
        if test is not None:
            known = read_leakage(args.output)
            # The command was killed between the store and its count, or another task was counted.
            if known is None or known["test_digest"] != test.digest:
                dropped = len(find_leaked(args, reader, test)) if args.drop_leaked else 0
                count_leakage(Reader(TokenStore.open(args.output)), test, dropped)
            say(describe_leakage(args.output))
        return
    leaked = find_leaked(args, reader, test) if test is not None else []
    if not args.output:
        return
    out = np.array(leaked if args.drop_leaked else [], np.int64)
    chosen = select(args, reader, target, out) if target is not None else None

    def choose_of(first: int, last: int) -> np.ndarray:
        if chosen is not None:
            return chosen[slice(*np.searchsorted(chosen, [first, last]))]
        return np.setdiff1d(np.arange(first, last), out, assume_unique=True)

    with suppress(FileNotFoundError):  # of a store that is replaced
        os.unlink(leakage_path(args.output))
    write_store(reader, args.output, choose_of, identity, args.overwrite)
    new = TokenStore.open(args.output)
    say(f"{args.output}: {new.num_documents:,} of {store.num_documents:,} documents, "
        f"{new.num_sequences:,} sequences, {new.num_tokens:,} of {store.num_tokens:,} tokens"
        + (f"; {len(out):,} documents with test texts of {test.name} dropped"
           if args.drop_leaked and test else ""))
    if test is not None:
        count_leakage(Reader(new), test, len(out))
        say(describe_leakage(args.output))


if __name__ == "__main__":
    run_command(main)
