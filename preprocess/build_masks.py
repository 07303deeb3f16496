"""Choose the masked positions of a token store: write a mask index.

    python preprocess/build_masks.py --tokens P --strategy selective --scores mr --name mr-sel
    python preprocess/build_masks.py --tokens P --strategy random_matched --match mr-sel \\
        --name mr-ctl

The index is `P.NAME.mask.npy` beside each shard. Shards are independent: `--shard_index i
--num_shards N` makes one of them, so that machines can share the work; later runs keep what is
complete, with or without these flags.

Memory does not grow with the store, which is read in blocks of documents. Each draw depends on the
position of a token in the store, so neither blocks nor shards change the result.
"""

from __future__ import annotations

import argparse
import math
import textwrap
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from preprocess.errors import ConfigError, DataError, check_shard, run_command
from preprocess.flags import USUAL, Parser
from preprocess.identity import build as build_identity
from preprocess.identity import digest, sealed
from preprocess.masking import (
    ARRAY_NEEDS,
    NUM_BINS,
    STRATEGIES,
    StrategyInputs,
    check_one_origin,
    choose_positions,
    find_words,
    open_arrays,
    store_facts,
)
from preprocess.progress import Progress, say
from preprocess.store import (
    Shard,
    TokenStore,
    array_path,
    has_array,
    lock_array,
    missing_arrays,
    open_array,
    write_array,
)
from preprocess.text.continuations import open_tokenizer
from preprocess.view.statistics import (
    Statistics,
    count_masks,
    overall_table,
    type_names,
    type_tables,
)

MAX_COUNTED = 10**9  # tokens counted for the statistics; half a minute
ARRAY_OF = {"scores": "scores", "match": "mask_index"}  # what a strategy reads, in an identity
NONE, WORDS = "none", "words"  # of --units
OPTIONS = {"centre": 0.5, "temperature": 1.0}  # flags of single strategies, and their defaults
RATE, SEED = 0.15, 42  # of --mlm_probability and --seed
MOST_EPOCHS = 1000
FEW = 0.99  # of the masks that the rate asks for: below it the lack is said


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
    add("--match", metavar="NAME",
        help="mask index to match, for a control; its scores, units and rate are found in its JSON")
    add("--mlm_probability", type=float, default=RATE,
        help="fraction of the tokens of a sequence to mask, above 0 and at most 1; no use with "
        "--match (default: 0.15)")
    add = parser.add_argument_group("how").add_argument
    add("--units", metavar="NAME",
        help="what is masked as a whole: none (single tokens), words, or the units that "
        "score_words.py wrote with the scores NAME (default: words for a strategy of words, "
        "otherwise none)")
    add("--centre", type=float, metavar="C",
        help="of a band: the share of the tokens of a sequence with lower scores, 0 to 1 "
        "(default: 0.5)")
    add("--temperature", type=float, metavar="T",
        help="what scores are divided by before they are drawn by, in their own unit: near 0 only "
        "the largest are drawn, large ones make all tokens alike (default: 1)")
    add("--epochs", type=int, default=1, metavar="N",
        help="draw N indices, NAME for the first epoch, then NAME-epoch1 and so on; "
        "pretrain.py --mask_index NAME uses them in turn (default: 1)")
    add = parser.add_argument_group("shards").add_argument
    add("--shard_index", type=int, metavar="I",
        help="build only the index of this shard, counted from 0; goes with --num_shards")
    add("--num_shards", type=int,
        help="number of shards of the store; goes with --shard_index")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the draws")
    parser.add_argument("--dry_run", action="store_true",
                        help="check everything, print the plan, and exit")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace an index made with other options")
    args = parser.parse_args(argv)
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together; fill in --units."""
    record = STRATEGIES[args.strategy]

    def readers(reads: Any) -> str:
        return ", ".join(name for name, one in STRATEGIES.items() if reads(one))

    for flag in ARRAY_NEEDS:
        given, needed = getattr(args, flag), flag in record.needs
        if needed and not given:
            raise ConfigError(f"--strategy {args.strategy} needs --{flag} NAME")
        if given and not needed:
            raise ConfigError(
                f"--{flag} {given} has no use with --strategy {args.strategy}; leave it out, or "
                "choose a strategy that reads it: "
                + readers(lambda one, flag=flag: flag in one.needs)
            )
    for option in OPTIONS:
        if getattr(args, option) is not None and option not in record.options:
            raise ConfigError(
                f"--{option} {getattr(args, option)} has no use with --strategy {args.strategy}; "
                "leave it out, or choose a strategy that reads it: "
                + readers(lambda one, option=option: option in one.options)
            )
    if args.units and not record.takes_units:
        raise ConfigError(
            f"--units {args.units} has no use with --strategy {args.strategy}; leave it out, or "
            f"choose a strategy of units: {readers(lambda one: one.takes_units)}"
        )
    if args.units == NONE and "words" in record.needs:
        raise ConfigError(f"--units {NONE}: --strategy {args.strategy} masks units; leave it out")
    args.units = args.units or (WORDS if "words" in record.needs else NONE)
    if not 0 < args.mlm_probability <= 1:
        raise ConfigError(
            f"--mlm_probability {args.mlm_probability}: must be above 0 and at most 1, such as 0.15"
        )
    if args.centre is not None and not 0 <= args.centre <= 1:
        raise ConfigError(f"--centre {args.centre}: must be from 0 (the lowest scores) to 1")
    if args.temperature is not None and not 0 < args.temperature < math.inf:
        raise ConfigError(
            f"--temperature {args.temperature}: must be above 0; to take the largest scores without"
            " a draw, use --strategy "
            + readers(lambda one: one.needs == {"scores"} and not one.options)
        )
    if not 1 <= args.epochs <= MOST_EPOCHS:
        raise ConfigError(f"--epochs {args.epochs}: from 1 to {MOST_EPOCHS} indices can be drawn")
    if args.epochs > 1 and record.drawn:
        raise ConfigError(
            f"--epochs {args.epochs}: pretrain.py --masking {args.strategy} draws other masks in "
            "each epoch by itself; leave --epochs out"
        )
    check_shard(args.shard_index, args.num_shards)
    if args.match in [epoch_name(args.name, epoch) for epoch in range(args.epochs)]:
        raise ConfigError(
            f"--name {args.name} makes the index to match, {args.match}; give another name")


# ------------------------------------------------------------------------------------- inputs


@dataclass
class Source:
    """An array that a strategy reads: its name, and array and JSON of each shard."""

    name: str
    opened: list[tuple[np.ndarray, dict[str, Any]]]

    def sha256(self, number: int) -> str:
        return self.opened[number][1]["sha256"]

    def label(self, number: int) -> str:
        # The content too, so that scores made again under the same name are noticed.
        return f"{self.name} (sha256 {self.sha256(number)[:16]})"


@dataclass
class Policy:
    """How masks are chosen: by the flags, or by the JSON of the index to match.

    strategy: the rule of the matched index, for a control that applies it.
    sources: by field of `StrategyInputs`: "scores", "match", "units".
    all_scores: the scores of all shards, for a control that needs their means, and their digest.
    """

    units: str = NONE
    rate: float | None = None
    options: dict[str, float] = field(default_factory=dict)
    strategy: str | None = None
    sources: dict[str, Source] = field(default_factory=dict)
    all_scores: tuple[list[np.ndarray], str | None] = ([], None)


def read_policy(args: argparse.Namespace, store: TokenStore, shards: list[Shard],
                epoch: int) -> Policy:
    """Open the arrays that a strategy needs, and find its units, rate and options."""
    record = STRATEGIES[args.strategy]
    policy = Policy(args.units, None if record.control else args.mlm_probability)
    policy.options = {name: value if (value := getattr(args, name)) is not None else OPTIONS[name]
                      for name in record.options}
    if "scores" in record.needs:
        policy.sources["scores"] = _open_scores(store, shards, args.scores, args.strategy)
    if "match" in record.needs:
        match = Source(args.match, open_arrays(store, shards, "match", args.match, "mask"))
        _refuse_circle(args, shards[0])
        number = epoch % int(match.opened[0][1].get("epochs") or 1)
        if number:  # the same epoch of the policy
            name = epoch_name(args.match, number)
            match = Source(name, open_arrays(store, shards, "match", name, "mask"))
        policy.sources["match"] = match
        if "policy" in record.needs:
            _follow(args, store, shards, match, policy)
    if "means" in record.needs:
        opened = open_arrays(store, store.shards, "scores", policy.sources["scores"].name, "scores")
        policy.all_scores = ([array for array, _ in opened],
                             digest([info["sha256"] for _, info in opened]))
    if policy.units not in (NONE, WORDS):
        policy.sources["units"] = Source(
            policy.units, open_arrays(store, shards, "units", policy.units, "units"))
    return policy


def _open_scores(
    store: TokenStore, shards: list[Shard], name: str, strategy: str
) -> Source:
    """Open scores and refuse those that the strategy cannot use."""
    source = Source(name, open_arrays(store, shards, "scores", name, "scores"))
    for _, info in source.opened:
        measure = info.get("measure")
        if measure is None:
            raise DataError(
                f"--scores {name}: made by an older version, which did not record the measure; "
                "make them again with train/score_tokens.py or preprocess/score_words.py"
            )
        if "boundary" in STRATEGIES[strategy].needs and not measure["boundary"]:
            others = [key for key, one in STRATEGIES.items()
                      if "scores" in one.needs and "boundary" not in one.needs]
            raise ConfigError(
                f"--strategy {strategy}: of the scores {name} (measure {measure['name']}) 0 does "
                f"not part important tokens from others; use --strategy {', '.join(others)}"
            )
    return source


def _refuse_circle(args: argparse.Namespace, shard: Shard) -> None:
    """Refuse an index that was matched, by however many steps, to the one to be made."""
    way = [args.match]
    while True:
        try:
            options = open_array(shard, way[-1], "mask")[1].get("options") or {}
        except DataError:
            return
        found = str(options.get("match") or "").partition(" ")[0]
        if not found or found in way:
            return
        way.append(found)
        if found == args.name:
            raise ConfigError(
                f"--match {args.match}: it was matched to {' and that to '.join(way[1:])}, the "
                "index to be made, so the match runs in a circle; give another --name or --match"
            )


def _follow(args: argparse.Namespace, store: TokenStore, shards: list[Shard], match: Source,
            policy: Policy) -> None:
    """Take scores, rule, rate, units and options from the JSON of the matched index."""
    listed = [info.get("options") or {} for _, info in match.opened]
    policy.strategy = listed[0].get("strategy")
    record = STRATEGIES.get(str(policy.strategy))
    if record is None or "scores" not in record.needs:
        able = ", ".join(name for name, one in STRATEGIES.items() if "scores" in one.needs)
        raise ConfigError(
            f"--match {match.name}: made by {policy.strategy}, which reads no scores of its own; "
            f"--strategy {args.strategy} needs an index made by one of {able}"
        )
    policy.rate = listed[0]["mlm_probability"]
    policy.options = {name: float(listed[0].get(name, OPTIONS[name])) for name in record.options}
    policy.units = str(listed[0].get("units") or NONE).partition(" ")[0]
    names = {"scores": str(listed[0]["scores"]).partition(" ")[0]}
    if policy.units not in (NONE, WORDS):
        names["units"] = policy.units
    used = {"units": policy.units, "mlm_probability": policy.rate, "seed": listed[0].get("seed"),
            "epochs": match.opened[0][1].get("epochs"), **policy.options}
    usual = {"units": NONE, "mlm_probability": RATE, "seed": SEED, "epochs": 1, **OPTIONS}
    more = "".join(f" --{flag} {value}" for flag, value in used.items()
                   if value is not None and value != usual[flag])
    again = (f"make the index again with --strategy {policy.strategy} --scores {names['scores']}"
             f"{more} --name {args.match} --overwrite")
    for kind, name in names.items():
        try:
            source = Source(name, open_arrays(store, shards, kind, name, kind))
        except DataError as error:
            raise DataError(f"--match {match.name}: {error}; then {again}") from None
        for number, options in enumerate(listed):
            if options.get(kind) != source.label(number):
                raise DataError(f"--match {match.name}: made by other {kind} than {name} now are; "
                                f"{again}")
        policy.sources[kind] = source


# ----------------------------------------------------------------------------------- command


def epoch_name(name: str, epoch: int) -> str:
    """Return the name of the index of an epoch: NAME, NAME-epoch1, ..."""
    return f"{name}-epoch{epoch}" if epoch else name


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    store = TokenStore.open(args.tokens)
    shards = store.choose_shards(args.shard_index, args.num_shards)
    tokenizer = open_tokenizer(store.tokenizer_dir)
    names = [epoch_name(args.name, epoch) for epoch in range(args.epochs)]
    policies = [read_policy(args, store, shards, epoch) for epoch in range(args.epochs)]
    with ExitStack() as locks:
        for name in names if not args.dry_run else ():
            locks.enter_context(lock_array(store, name, "mask", args.shard_index))
        build(args, store, shards, policies, tokenizer)
    if args.dry_run:
        return
    missing = [path for name in names for path in missing_arrays(store, name, "mask")]
    if missing:
        say(f"{len(missing)} of {len(names) * len(store.shards)} shards are missing, the first: "
            f"{missing[0]}")
        return
    counted = [name for name in (args.name, args.match) if name]
    statistics = count_masks(store, counted, max_tokens=MAX_COUNTED)
    types = type_names(tokenizer, store.vocab_size)
    often = type_tables(statistics, args.name, statistics.indices[0], types)[0]
    print("\n" + "\n\n".join(t.as_text() for t in (overall_table(statistics, counted), often)))
    for note in _notes(args, statistics):
        print(f"\n{note}")


def _notes(args: argparse.Namespace, statistics: Statistics) -> list[str]:
    """Say what the tables do not: masks that are missing, and how much of a policy is left."""
    masked, notes = statistics.indices[0].masked, []
    asked = args.mlm_probability * statistics.candidates
    if STRATEGIES[args.strategy].budget == "rate" and masked < FEW * asked:
        notes.append(f"{asked - masked:,.0f} of {asked:,.0f} masks are missing, since scores of "
                     "minus infinity are never masked.")
    if args.match and masked:
        shared, expected = (found[0, 1] / masked for found in
                            (statistics.overlaps.shared, statistics.overlaps.expected))
        notes.append(f"{shared:.1%} of the masks are also masks of {args.match}; by chance "
                     f"{expected:.1%} would be.")
    return notes


def build(
    args: argparse.Namespace, store: TokenStore, shards: list[Shard], policies: list[Policy],
    tokenizer: Any,
) -> None:
    """Write the index of every epoch and shard that is not complete.

    Args:
        policies: of each epoch.
    Raises:
        ConfigError: other shards have the index with other options.
    """
    needs = STRATEGIES[args.strategy].needs
    work = []
    for epoch, policy in enumerate(policies):
        for number, shard in enumerate(shards):
            name = epoch_name(args.name, epoch)
            made_by = _made_by(args, store, policy, number, epoch)
            if not number and not args.overwrite:
                check_one_origin(
                    store, name, "mask", f"--name {name}", made_by=made_by, shards=shards)
            if has_array(shard, name, "mask", made_by["identity"], args.overwrite):
                say(f"{array_path(shard, name, 'mask')}: complete, made with the same options")
            else:
                work.append((name, epoch, policy, number, made_by))
    if args.dry_run:
        say(f"{args.tokens}: {len(work)} of {len(policies) * len(shards)} indices to be made; "
            f"{args.strategy}: {STRATEGIES[args.strategy].rule}")
    if args.dry_run or not work:
        return
    facts = store_facts(store, args.strategy, lambda: policies[0].all_scores[0])
    words = find_words(args.strategy, policies[0].units == WORDS, tokenizer)
    exact: list[np.ndarray] = []
    total = sum(shards[number].num_tokens for _, _, _, number, _ in work)
    with Progress(total, "token", label="mask") as progress:
        for name, epoch, policy, number, made_by in work:
            arrays = {key: source.opened[number][0] for key, source in policy.sources.items()}
            if "frequency" in needs:
                exact.append(np.zeros((2, NUM_BINS), dtype=np.int64))
            positions = choose_positions(
                shards[number],
                args.strategy,
                StrategyInputs(words=words, policy=policy.strategy, **arrays, **facts),
                rate=policy.rate or args.mlm_probability,
                seed=args.seed,
                all_special_ids=store.all_special_ids,
                epoch=epoch,
                options=policy.options,
                bins=exact[-1] if exact else None,
                done=progress.update,
            )
            say(str(write_array(shards[number], name, "mask", positions, made_by)))
    if exact:
        say(_exactness(exact))


def _made_by(
    args: argparse.Namespace, store: TokenStore, policy: Policy, number: int, epoch: int
) -> dict[str, Any]:
    """Return what the JSON of an index keeps: its options, epoch and identity."""
    options: dict[str, Any] = {
        "strategy": args.strategy, "mlm_probability": policy.rate, "seed": args.seed,
        **policy.options,
    }
    if policy.units != NONE:
        options["units"] = policy.units
    followed = "policy" in STRATEGIES[args.strategy].needs
    for key, source in policy.sources.items():
        if not (followed and key == "scores"):  # found through the index to match
            options[key] = source.label(number)
    units = policy.sources.get("units")
    own: dict[str, Any] = dict.fromkeys(OPTIONS) | policy.options
    own |= {"epochs": args.epochs, "epoch": epoch, "scores_of_all_shards": policy.all_scores[1]}
    identity = build_identity(
        "build_masks",
        inputs={"store": store.fingerprint,
                **{ARRAY_OF[key]: source.sha256(number)
                   for key, source in policy.sources.items() if key in ARRAY_OF}},
        choice={"masking": args.strategy, "rate": policy.rate, "seed": args.seed,
                "units": units.sha256(number) if units else policy.units},
        options=own,
    )
    return {"options": options, "epochs": args.epochs, "epoch": epoch, **sealed(identity)}


def _exactness(histograms: list[np.ndarray]) -> str:
    """Say how near the histograms of a control are to those of the index it is matched to."""
    of_match, own = np.concatenate(histograms, axis=1)
    used = (of_match > 0) | (own > 0)
    off = np.abs(own - of_match)
    large = of_match >= 100
    share = (off[large] / of_match[large]).max(initial=0)
    return (f"frequencies: {int((off[used] == 0).sum())} of {int(used.sum())} bins hold as many "
            f"masks as in the index to match; of those with 100 masks or more the worst is "
            f"{share:.2%} off, of the others {int(off[~large].max(initial=0))} masks")


if __name__ == "__main__":
    run_command(main)
