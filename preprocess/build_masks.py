"""Choose the masked positions of a token store: write a mask index.

    python preprocess/build_masks.py --tokens P --strategy selective --scores mr --name mr-sel
    python preprocess/build_masks.py --tokens P --strategy random_matched --match mr-sel \\
        --name mr-ctl

The index is `P.NAME.mask.npy` beside each shard. Shards are independent: `--shard_index i
--num_shards N` makes one of them, so that machines can share the work; later runs keep what is
complete, with or without these flags.

Memory does not grow with the store, which is read in blocks of sequences. Each draw depends on the
position of a token in the store, so neither blocks nor shards change the result.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator

import numpy as np

from preprocess.errors import ConfigError, check_shard, run_command
from preprocess.flags import USUAL, Parser
from preprocess.identity import build as build_identity
from preprocess.identity import sealed
from preprocess.masking import (
    ARRAY_NEEDS,
    STRATEGIES,
    StrategyInputs,
    choose_positions,
    open_arrays,
)
from preprocess.progress import Progress, say
from preprocess.store import (
    Shard,
    TokenStore,
    array_path,
    has_array,
    iterate_blocks,
    lock_array,
    missing_arrays,
    write_array,
)
from preprocess.text.continuations import WordTable, continuation_table, open_tokenizer
from preprocess.view.statistics import count_masks, overall_table, type_names, type_tables

MAX_COUNTED = 10**9  # tokens counted for the statistics; half a minute
ARRAY_OF = {"scores": "scores", "match": "mask_index"}  # what a strategy reads, in an identity


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line and check it."""
    parser = Parser(description=__doc__, epilog="strategies:\n" + "\n".join(
        textwrap.fill(f"{name}: {strategy.rule}", 98, initial_indent="  ", subsequent_indent="    ")
        for name, strategy in STRATEGIES.items()
    ))
    add = parser.add_argument_group(USUAL).add_argument
    add("--tokens", required=True, metavar="P", help="prefix of the token store")
    add("--strategy", required=True, choices=list(STRATEGIES), metavar="NAME",
        help=f"rule that chooses the positions: {', '.join(STRATEGIES)}")
    add("--name", required=True, metavar="NAME", help="name of the mask-index array to write")
    add("--scores", metavar="NAME", help="scores to choose by, for a strategy that needs them")
    add("--match", metavar="NAME", help="mask index to match, for a strategy that needs one")
    add("--mlm_probability", type=float, default=0.15,
        help="fraction of the tokens of a sequence to mask, above 0 and at most 1; no use with "
        "--match (default: 0.15)")
    add = parser.add_argument_group("shards").add_argument
    add("--shard_index", type=int, metavar="I",
        help="build only the index of this shard, counted from 0; goes with --num_shards")
    add("--num_shards", type=int,
        help="number of shards of the store; goes with --shard_index")
    parser.add_argument("--seed", type=int, default=42, help="seed of the draws")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace an index made with other options")
    args = parser.parse_args(argv)
    for flag in ARRAY_NEEDS:
        given, needed = getattr(args, flag), flag in STRATEGIES[args.strategy].needs
        if needed and not given:
            raise ConfigError(f"--strategy {args.strategy} needs --{flag} NAME")
        if given and not needed:
            readers = [name for name, strategy in STRATEGIES.items() if flag in strategy.needs]
            raise ConfigError(
                f"--{flag} {given} has no use with --strategy {args.strategy}; leave it out, or "
                f"choose a strategy that reads it: {', '.join(readers)}"
            )
    if not 0 < args.mlm_probability <= 1:
        raise ConfigError(
            f"--mlm_probability {args.mlm_probability}: must be above 0 and at most 1, such as 0.15"
        )
    check_shard(args.shard_index, args.num_shards)
    if args.match == args.name:
        raise ConfigError(f"--name {args.name} is the index to match; give another name")
    return args


# ----------------------------------------------------------------------------------- command


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    store = TokenStore.open(args.tokens)
    shards = store.choose_shards(args.shard_index, args.num_shards)
    tokenizer = open_tokenizer(store.tokenizer_dir)
    needs = STRATEGIES[args.strategy].needs
    words = continuation_table(tokenizer) if "words" in needs else None
    sources = {need: open_arrays(store, shards, need, getattr(args, need), kind)
               for need, kind in ARRAY_NEEDS.items() if need in needs}
    with lock_array(store, args.name, "mask", args.shard_index):
        build(args, store, shards, sources, words)
    missing = missing_arrays(store, args.name, "mask")
    if missing:
        print(f"{len(missing)} of {len(store.shards)} shards are missing, the first: {missing[0]}")
        return
    counted = [name for name in (args.name, args.match) if name]
    statistics = count_masks(store, counted, max_tokens=MAX_COUNTED)
    names = type_names(tokenizer, store.vocab_size)
    often = type_tables(statistics, args.name, statistics.indices[0], names)[0]
    print("\n" + "\n\n".join(t.as_text() for t in (overall_table(statistics, counted), often)))


def build(
    args: argparse.Namespace, store: TokenStore, shards: list[Shard],
    sources: dict[str, list[tuple]], words: WordTable | None,
) -> None:
    """Write the index of every shard that is not complete.

    Args:
        sources: the arrays that the strategy needs, by need; of each shard, the array and its JSON.
    """
    by_rate = STRATEGIES[args.strategy].budget != "match"
    rate = args.mlm_probability if by_rate else None
    work = []
    for number, shard in enumerate(shards):
        options = {"strategy": args.strategy, "mlm_probability": rate, "seed": args.seed}
        arrays = {}
        for need, opened in sources.items():
            arrays[need], info = opened[number]
            # The content too, so that scores made again under the same name are noticed.
            options[need] = f"{getattr(args, need)} (sha256 {info['sha256'][:16]})"
        identity = build_identity(
            "build_masks",
            inputs={"store": store.fingerprint,
                    **{ARRAY_OF[need]: opened[number][1]["sha256"]
                       for need, opened in sources.items()}},
            choice={"masking": args.strategy, "rate": rate, "seed": args.seed},
        )
        if has_array(shard, args.name, "mask", identity, args.overwrite):
            print(f"{array_path(shard, args.name, 'mask')}: complete, made with the same options")
        else:
            work.append((shard, arrays, {"options": options, **sealed(identity)}))
    total = sum(shard.num_tokens for shard, _, _ in work)
    with Progress(total, "token", label="mask") as progress:
        for shard, arrays, made_by in work:
            inputs = StrategyInputs(words=words, **arrays)
            positions = choose_positions(
                shard,
                args.strategy,
                inputs,
                rate=args.mlm_probability,
                seed=args.seed,
                all_special_ids=store.all_special_ids,
            )
            counted = _count(positions, shard, progress)
            say(str(write_array(shard, args.name, "mask", counted, made_by)))


def _count(
    positions: Iterator[np.ndarray], shard: Shard, progress: Progress
) -> Iterator[np.ndarray]:
    """Pass on the positions of each block, and count its tokens."""
    offsets = shard.sequence_offsets
    for block, chosen in zip(iterate_blocks(offsets), positions, strict=True):
        yield chosen
        progress.update(int(offsets[block.stop] - offsets[block.start]))


if __name__ == "__main__":
    run_command(main)
