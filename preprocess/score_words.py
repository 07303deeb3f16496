"""Score the tokens of a store by counting words, or combine its scores.

    python preprocess/score_words.py --tokens P --measure tfidf --name tfidf
    python preprocess/score_words.py --tokens P --combine union --scores mr sst2 --name both

writes `P.NAME.scores.npy` beside each shard, and `P.NAME.units.npy` for a measure that finds units
of several words. Counts are those of all shards; `--shard_index I --num_shards N` writes the
scores of one of them, after counting in all. Complete shards are skipped.

The store is read in blocks, and words and n-grams are counted in tables of fixed size; of n-grams
only those that may be frequent are kept.
"""

from __future__ import annotations

import argparse
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np

from preprocess.corpus import resolve_path
from preprocess.errors import ConfigError, DataError, check_shard, run_command
from preprocess.files import file_sha256
from preprocess.flags import USUAL, Parser
from preprocess.identity import build as build_identity
from preprocess.identity import digest, sealed
from preprocess.masking import open_arrays
from preprocess.masking.combine import COMBINED, Parts, check_scale
from preprocess.masking.counts import Counting, Scored
from preprocess.masking.measures import COUNTED
from preprocess.masking.words import WordFinder
from preprocess.progress import Progress, say
from preprocess.store import (
    Shard,
    TokenStore,
    array_path,
    check_other_shards,
    has_array,
    lock_array,
    missing_arrays,
    write_array,
)
from preprocess.text.continuations import open_tokenizer
from preprocess.text.kinds import type_kinds
from preprocess.text.lexicon import open_lexicon
from preprocess.text.stop_words import LANGUAGES
from preprocess.view.statistics import type_names

INPUTS = {"store": "against", "lexicon": "lexicon"}  # the flag of what a measure needs


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line and check it."""
    rules = {name: one.rule for name, one in COUNTED.items()}
    rules |= {f"--combine {name}": one.rule for name, one in COMBINED.items()}
    parser = Parser(description=__doc__, epilog="measures:\n" + "\n".join(
        textwrap.fill(f"{name}: {rule}", 98, initial_indent="  ", subsequent_indent="    ")
        for name, rule in rules.items()))
    add = parser.add_argument_group(USUAL).add_argument
    add("--tokens", required=True, metavar="P", help="prefix of the token store")
    add("--name", required=True, metavar="NAME", help="name of the scores to write")
    add("--measure", choices=list(COUNTED), metavar="NAME",
        help=f"what to score words by: {', '.join(COUNTED)}")
    add("--combine", choices=list(COMBINED), metavar="HOW",
        help=f"combine --scores instead: {', '.join(COMBINED)}")
    add = parser.add_argument_group("inputs").add_argument
    add("--against", metavar="Q",
        help="store of general text, of the same tokenizer; for --measure difference")
    add("--lexicon", metavar="FILE",
        help="words and weights in two columns, .csv, .tsv or .txt; for --measure lexicon")
    add("--language", choices=list(LANGUAGES), metavar="CODE",
        help=f"of the stop words, for --measure content: {', '.join(LANGUAGES)} (default: en)")
    add("--scores", nargs="+", default=[], metavar="NAME",
        help="two or more scores of this store, for --combine")
    add = parser.add_argument_group("shards").add_argument
    add("--shard_index", type=int, metavar="I",
        help="write only the scores of this shard, counted from 0; goes with --num_shards")
    add("--num_shards", type=int, help="number of shards of the store; goes with --shard_index")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace scores made with other options")
    parser.add_argument("--dry_run", action="store_true",
                        help="check everything, print the plan, and exit")
    args = parser.parse_args(argv)
    check_inputs(args)
    check_shard(args.shard_index, args.num_shards)
    return args


def check_inputs(args: argparse.Namespace) -> None:
    """Refuse a missing input, and one that has no use.

    Raises:
        ConfigError: says which flag to add or leave out.
    """
    if bool(args.measure) == bool(args.combine):
        given = "both" if args.measure else "neither"
        raise ConfigError(f"give --measure or --combine, one of the two; {given} is given")
    needs = {INPUTS[need] for need in COUNTED[args.measure].needs} if args.measure else {"scores"}
    allowed = needs | ({"language"} if args.measure == "content" else set())
    what = f"--measure {args.measure}" if args.measure else f"--combine {args.combine}"
    for flag in ("against", "lexicon", "language", "scores"):
        if flag in needs and not getattr(args, flag):
            raise ConfigError(f"{what} needs --{flag}")
        if getattr(args, flag) and flag not in allowed:
            raise ConfigError(f"--{flag} has no use with {what}; leave it out")
    if args.combine and len(set(args.scores)) < 2:
        raise ConfigError(
            f"--scores {' '.join(args.scores)}: {what} needs two or more different ones")
    if args.name in args.scores:
        raise ConfigError(f"--name {args.name} is one of the --scores; give another name")


# ----------------------------------------------------------------------------------- command


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    store = TokenStore.open(args.tokens)
    shards = store.choose_shards(args.shard_index, args.num_shards)
    has_units = args.measure and COUNTED[args.measure].has_units
    kinds = ["units", "scores"] if has_units else ["scores"]
    identity, made_by, count = (plan_combination if args.combine else plan_measure)(args, store)
    if not args.overwrite:
        check_other_shards(store, shards, args.name, "scores", identity)
    with ExitStack() as locks:
        for kind in kinds if not args.dry_run else ():
            locks.enter_context(lock_array(store, args.name, kind, args.shard_index))
        todo = [shard for shard in shards
                if not all([has_array(shard, args.name, kind, identity, args.overwrite)
                            for kind in kinds])]
        say(f"{args.tokens}: {len(shards) - len(todo)} of {len(shards)} shards are scored already,"
            f" {sum(shard.num_tokens for shard in todo):,} tokens to score")
        if todo and not args.dry_run:
            write(args.name, todo, count, {**made_by, **sealed(identity)})
    missing = missing_arrays(store, args.name, "scores")
    if missing:
        say(f"{len(missing)} of {len(store.shards)} shards are to be scored, the first: "
            f"{missing[0]}")


Plan = tuple[dict[str, Any], dict[str, Any], Callable[[], Scored]]


def plan_measure(args: argparse.Namespace, store: TokenStore) -> Plan:
    """Return the identity of scores by counting, what their JSON keeps, and how to count."""
    measure = COUNTED[args.measure]
    finder = WordFinder.of(store, f"--measure {args.measure}")
    tokenizer = open_tokenizer(store.tokenizer_dir)
    against = TokenStore.open(args.against) if args.against else None
    lexicon = (open_lexicon(args.lexicon, tokenizer, store.all_special_ids) if args.lexicon
               else None)
    language = (args.language or "en") if args.measure == "content" else None
    kinds = type_kinds(type_names(tokenizer, store.vocab_size), language) if language else None
    options = {
        "measure": args.measure,
        "against": against.fingerprint if against else None,
        "lexicon": file_sha256(resolve_path(args.lexicon)) if lexicon else None,
        "language": language,
    }
    identity = build_identity("score_words", inputs={"store": store.fingerprint}, options=options)
    shown = {"measure": args.measure, "against": args.against, "lexicon": args.lexicon,
             "language": language}
    made_by = {"measure": measure.record(args.measure),
               "options": {key: value for key, value in shown.items() if value}}
    counting = Counting(store, finder, against, lexicon, kinds)
    return identity, made_by, lambda: measure.score(counting)


def plan_combination(args: argparse.Namespace, store: TokenStore) -> Plan:
    """Return the identity of combined scores, what their JSON keeps, and how to combine.

    Raises:
        DataError: scores of another store, or of an older version.
        ConfigError: scores that this combination cannot compare.
    """
    opened = [open_arrays(store, store.shards, "scores", name, "scores") for name in args.scores]
    for name, shards in zip(args.scores, opened, strict=True):
        if any("measure" not in info for _, info in shards):
            raise DataError(
                f"--scores {name}: made by an older version, which did not keep the measure; make "
                f"it again with train/score_tokens.py --overwrite"
            )
    parts = Parts(store, args.scores, [[array for array, _ in shards] for shards in opened],
                  [shards[0][1]["measure"] for shards in opened])
    check_scale(parts.names, parts.measures, args.combine)
    combination = COMBINED[args.combine]
    identity = build_identity(
        "score_words",
        inputs={"store": store.fingerprint,
                "scores": [digest([info["sha256"] for _, info in shards]) for shards in opened]},
        options={"combine": args.combine},
    )
    made_by = {"measure": combination.record(parts),
               "options": {"combine": args.combine, "scores": ", ".join(args.scores)}}
    return identity, made_by, lambda: Scored(combination.combine(parts), {}, "")


def write(
    name: str, todo: list[Shard], count: Callable[[], Scored], made_by: dict[str, Any]
) -> None:
    """Count, then write the scores of each shard and, before them, its units."""
    started = time.monotonic()
    scored = count()
    counting = time.monotonic() - started
    if scored.note:
        say(scored.note)
    num_tokens = sum(shard.num_tokens for shard in todo)
    num_above = 0
    with Progress(num_tokens, "token", label="score") as progress:
        for shard in todo:
            begun = time.monotonic()
            units = array_path(shard, name, "units")
            if scored.units:
                write_array(shard, name, "units", scored.units(shard), made_by)
            else:  # those of scores that are replaced
                for path in (units.with_suffix(".json"), units):
                    path.unlink(missing_ok=True)
            info = {**made_by, "counts": scored.counts}

            def blocks(shard: Shard, info: dict[str, Any], begun: float) -> Iterator[np.ndarray]:
                nonlocal num_above
                for block in scored.scores(shard):
                    num_above += int((block > 0).sum())
                    yield block
                    progress.update(len(block))
                # Counting is for all shards of this run, so each has its part of it.
                share = shard.num_tokens / max(1, num_tokens)
                info["seconds"] = round(counting * share + time.monotonic() - begun, 3)

            write_array(shard, name, "scores", blocks(shard, info, begun), info)
            say(str(array_path(shard, name, "scores")))
    seconds = time.monotonic() - started
    say(f"scored {num_tokens:,} tokens in {seconds:.1f} s ({num_tokens / seconds:,.0f} tokens/s); "
        f"above 0: {num_above / max(1, num_tokens):.1%} of the tokens")


if __name__ == "__main__":
    run_command(main)
