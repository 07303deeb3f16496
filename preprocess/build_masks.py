"""Choose the masked positions of a token store once, and keep them as a mask-index array.

    python preprocess/build_masks.py --tokens P --strategy selective --scores mr --name mr-sel
    python preprocess/build_masks.py --tokens P --strategy random_matched --match mr-sel \\
        --name mr-ctl

Shards are independent: `--shard_index i --num_shards N` makes one of them, so that machines can
share the work; what is whole is kept by later runs, with or without these flags.

Writes `P.NAME.mask.npy` beside every shard, in blocks of whole sequences, so that memory does not
grow with the store. Every draw belongs to a token's place in the store, so neither the blocks nor
the shards change the result.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np

from preprocess.errors import ConfigError, DataError, run_command
from preprocess.identity import build as build_identity
from preprocess.identity import sealed
from preprocess.masking import NEEDS, STRATEGIES, Inputs, choose_positions
from preprocess.progress import Progress, say
from preprocess.store import (
    Shard,
    TokenStore,
    array_path,
    has_array,
    iterate_blocks,
    list_arrays,
    lock_array,
    missing_arrays,
    open_array,
    write_array,
)
from preprocess.text.continuations import WordTable, continuation_table, open_tokenizer
from preprocess.view.statistics import Statistics, count_masks

ARRAY_OF = {"scores": "scores", "match": "mask_index"}  # what a strategy reads, in an identity
NUM_TYPES = 15
MAX_COUNTED = 10**9  # tokens whose statistics are printed; half a minute


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", required=True, help="prefix of the token store")
    parser.add_argument(
        "--strategy", required=True, choices=list(STRATEGIES), help="how positions are chosen"
    )
    parser.add_argument("--name", required=True, help="name of the mask-index array to write")
    parser.add_argument("--scores", help="scores to choose by (selective, selective_fill)")
    parser.add_argument("--match", help="mask index whose count per sequence random_matched takes")
    parser.add_argument(
        "--mlm_probability",
        type=float,
        default=0.15,
        help="share of a sequence's tokens to mask, above 0 and at most 1; random_matched takes "
        "its counts from --match instead (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=42, help="(default: %(default)s)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an index made with other options"
    )
    parser.add_argument("--shard_index", type=int, help="make the index of one shard only, from 0")
    parser.add_argument("--num_shards", type=int, help="shards of the store; with --shard_index")
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    needed = NEEDS.get(args.strategy)
    for flag in ("scores", "match"):
        given = getattr(args, flag)
        if flag == needed and not given:
            raise ConfigError(f"--strategy {args.strategy} needs --{flag} NAME")
        if flag != needed and given:
            users = ", ".join(name for name, need in NEEDS.items() if need == flag)
            raise ConfigError(
                f"--{flag} {given} has no use with --strategy {args.strategy}; leave it out, or "
                f"take a strategy that reads it: {users}"
            )
    if not 0 < args.mlm_probability <= 1:
        raise ConfigError(
            f"--mlm_probability {args.mlm_probability}: above 0 and at most 1, such as 0.15"
        )
    if (args.shard_index is None) != (args.num_shards is None):
        raise ConfigError("--shard_index and --num_shards belong together; give both or neither")
    if args.num_shards is not None and not 0 <= args.shard_index < args.num_shards:
        raise ConfigError(
            f"--shard_index {args.shard_index} --num_shards {args.num_shards}: the index counts "
            f"from 0 to {args.num_shards - 1}"
        )
    if args.match == args.name:
        raise ConfigError(f"--name {args.name} is the index to match; the new one needs another")
    return args


# -------------------------------------------------------------------------------- statistics


def format_statistics(
    statistics: Statistics, names: dict[int, str], other: str | None = None
) -> list[str]:
    """Write the counts as lines to print; `names` gives each id's token.

    other: name of a second index that was counted with the first.
    """
    index, num_tokens = statistics.indices[0], statistics.tokens
    num_masked, unmasked = index.masked, int(index.rates[0])

    def percent(part: float, whole: float) -> str:
        return f"{100 * part / whole:.2f} %" if whole else "-"

    lines = [
        f"tokens     {num_tokens:>14,}",
        f"masked     {num_masked:>14,}  {percent(num_masked, statistics.candidates)} of the "
        f"{statistics.candidates:,} tokens that may be masked",
        f"sequences  {statistics.sequences:>14,}  {unmasked:,} "
        f"({percent(unmasked, statistics.sequences)}) without a mask",
        f"by chance  {percent(index.by_chance, num_masked):>14}  of the masked tokens would "
        "be hit by a random choice of as many in each sequence",
    ]
    if other is not None:
        lines.append(
            f"shared     {percent(statistics.shared, num_masked):>14}  of them are in {other} too"
        )
    if num_masked:
        head = f"{'token':<18} {'masked':>9} {'of its kind':>12} {'of masks':>9} {'of text':>9}"
        lines.append(head)
    ranked = np.argsort(-index.type_masked, kind="stable")[:NUM_TYPES]
    for i in ranked[index.type_masked[ranked] > 0].tolist():
        masked, tokens = int(index.type_masked[i]), int(statistics.type_tokens[i])
        lines.append(
            f"{names.get(i, f'#{i}'):<18} {masked:>9,} {percent(masked, tokens):>12} "
            f"{percent(masked, num_masked):>9} {percent(tokens, num_tokens):>9}"
        )
    return lines


# ----------------------------------------------------------------------------------- command


def open_inputs(
    store: TokenStore, shards: list[Shard], kind: str, flag: str, name: str
) -> list[tuple]:
    """Open array `name` of some shards; an unknown name is a `DataError` that lists the known."""
    try:
        return [open_array(shard, name, kind) for shard in shards]
    except DataError as error:
        known = ", ".join(list_arrays(store, kind)) or "none yet"
        raise DataError(f"--{flag} {name}: {error} (there are: {known})") from None


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    store = TokenStore.open(args.tokens)
    shards = store.choose_shards(args.shard_index, args.num_shards)
    tokenizer = open_tokenizer(store.tokenizer_dir)
    words = continuation_table(tokenizer) if args.strategy == "whole_word" else None
    need = NEEDS.get(args.strategy)
    sources: list[tuple] = [(None, {})] * len(shards)
    if need:
        kind = "mask" if need == "match" else "scores"
        sources = open_inputs(store, shards, kind, need, getattr(args, need))
    with lock_array(store, args.name, "mask", args.shard_index):
        build(args, store, words, list(zip(shards, sources, strict=True)))
    missing = missing_arrays(store, args.name, "mask")
    if missing:
        print(f"{len(missing)} of {len(store.shards)} shards are to be made, the first: "
              f"{missing[0]}")
        return
    counted = [name for name in (args.name, args.match) if name]
    statistics = count_masks(store, counted, max_tokens=MAX_COUNTED)
    if statistics.tokens < store.num_tokens:
        print(f"counted in blocks spaced evenly over the {store.num_tokens:,} tokens:")
    names = {i: token for token, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    print("\n".join(format_statistics(statistics, names, args.match)))


def build(
    args: argparse.Namespace, store: TokenStore, words: WordTable | None,
    shards: list[tuple[Shard, tuple]],
) -> None:
    """Write the index of every shard that is not whole; with each, what the strategy reads."""
    need = NEEDS.get(args.strategy)
    rate = None if args.strategy == "random_matched" else args.mlm_probability
    work = []
    for shard, (array, info) in shards:
        options = {"strategy": args.strategy, "mlm_probability": rate, "seed": args.seed}
        if need:  # the content, so that scores made anew under an old name are noticed
            options[need] = f"{getattr(args, need)} (sha256 {info['sha256'][:16]})"
        identity = build_identity(
            "build_masks",
            inputs={"store": store.fingerprint,
                    **({ARRAY_OF[need]: info["sha256"]} if need else {})},
            choice={"masking": args.strategy, "rate": rate, "seed": args.seed},
        )
        if has_array(shard, args.name, "mask", identity, args.overwrite):
            print(f"{array_path(shard, args.name, 'mask')}: whole, made with the same options")
        else:
            work.append((shard, array, {"options": options, **sealed(identity)}))
    total = sum(shard.num_tokens for shard, _, _ in work)
    with Progress(total, "token", label="mask") as progress:
        for shard, array, made_by in work:
            inputs = Inputs(words=words, **({need: array} if need else {}))
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
    """Pass the positions of each block on and count its tokens."""
    offsets = shard.sequence_offsets
    for block, chosen in zip(iterate_blocks(offsets), positions, strict=True):
        yield chosen
        progress.update(int(offsets[block.stop] - offsets[block.start]))


if __name__ == "__main__":
    run_command(main)
