"""Measure annotating and scoring, beside the published way.

    python train/benchmark_inference.py --classifier RC/seed_42/hf --task mr --data_dir D \\
        --scorer RS/hf --tokens P2 --output_dir runs/benchmark_inference
    python train/benchmark_inference.py --importance --classifier RC/seed_42/hf --task mr \\
        --data_dir D --max_samples 2000 --output_dir runs/importance

The published way pads every input to one width (128 for buffers, 256 for sentences to score) and
takes 32 at a time in their order, in fp32, without the overhead of the published code's lists.
Annotation is also compared with one buffer per pass without padding, the reference of correctness.
The ways are interleaved over rounds, on the same queries and sentences, in one process; the table
shows medians. The results of all ways are compared in the same run and must agree: annotations to
the token, log-odds in fp16 to 2e-2 (relative, above 1), masks at 99.5 % of the positions.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preprocess import corpus
from preprocess.errors import ConfigError, DataError, run_command
from preprocess.files import atomic_write_json
from preprocess.flags import USUAL, Parser
from preprocess.masking import MATCHED, STRATEGIES, Sequences, find_candidates
from preprocess.progress import Progress, say, show
from preprocess.store import TokenStore
from preprocess.view.tables import Table
from train import engine, model
from train.bench.throughput import spread, synchronize, turns
from train.run_dir.folder import environment
from train.stages import importance, scoring
from train.stages.inference import (
    BATCH_TOKENS,
    HALF,
    Runner,
    check_trained,
    one_by_one,
    special_template,
)
from train.stages.queries import (
    EDGE,
    Query,
    encode_texts,
    group_by_text,
    match_labels,
    plan_queries,
)
from train.stages.scores import average_precision

PUBLISHED, ALONE, OURS = "published", "one per pass", "selmask {}"
PUBLISHED_ROWS = 32
WARMUP_INPUTS = 64

Way = Callable[[], tuple[Any, Counter[str]]]


def in_order(lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Return batches of `PUBLISHED_ROWS` inputs in their order."""
    return np.split(np.arange(len(lengths)), range(PUBLISHED_ROWS, len(lengths), PUBLISHED_ROWS))


def interleave(ways: dict[str, Way], rounds: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure the interleaved ways.

    Returns:
        The last result of each way, and a table row per way.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, Any] = {}
    counts: dict[str, Counter[str]] = {}
    for name in turns(list(ways), rounds):
        synchronize()
        started = time.perf_counter()
        with redirect_stdout(io.StringIO()):  # lines of progress within a turn
            found[name], counts[name] = ways[name]()
        synchronize()
        seconds[name].append(time.perf_counter() - started)
    rows = []
    for name, count in counts.items():
        one = spread(seconds[name])
        ratio = spread(np.divide(seconds[PUBLISHED], seconds[name]))
        rows.append({
            "way": name,
            "seconds": f"{one['median']:.2f}",
            "p20-p80": f"{one['p20']:.2f}-{one['p80']:.2f}",
            "over_published": f"{ratio['median']:.2f}",
            "passes": count["passes"],
            "inputs": count["inputs"],
            "again_fp32": count["fp32"] + count["repeated"],
            "again_alone": count["alone"],
            "tokens": count["tokens"],
            "inputs_per_second": round(count["inputs"] / one["median"]),
            "tokens_per_second": round(count["tokens"] / one["median"]),
            "padding_percent": f"{100 * (1 - count['tokens'] / max(count['slots'], 1)):.1f}",
        })
    return found, rows


# --------------------------------------------------------------------------- annotating


@dataclass(frozen=True)
class Annotating:
    """A classifier and its queries. plain, subset: whole, and with a last layer for [CLS] alone.

    make: a model and further options of `Runner` -> a runner.
    """

    queries: list[Query]
    plain: Any
    subset: Any
    make: Callable[..., Runner]

    @property
    def title(self) -> str:
        num_tokens = sum(len(query.tokens) for query in self.queries)
        return f"Annotating {len(self.queries):,} sequences of {num_tokens:,} tokens"


def read_queries(args: argparse.Namespace, device: torch.device) -> Annotating:
    """Read the classifier and the training texts of a task."""
    name = args.classifier
    config = model.load_config(name)
    check_trained(config, "ForSequenceClassification", name, "give seed_N/hf of train/finetune.py")
    tokenizer = model.load_tokenizer(name)
    task = corpus.load_task(args.task, data_dir=args.data_dir)
    classes = match_labels(task, config, name)
    groups = group_by_text(corpus.take_fixed(task.splits["train"], args.max_samples))
    has_aspects = any(example.aspect for group in groups.values() for example in group)
    model.check_agreement(config, tokenizer, name, pair=has_aspects)
    model.check_row_length(config, args.annotate_length)
    template = special_template(tokenizer, pair=has_aspects)
    documents = encode_texts(tokenizer, list(groups), None if has_aspects else "en")
    queries = plan_queries(
        list(groups.values()), documents, classes, tokenizer,
        args.annotate_length - template.num_special)
    labels = tuple(config.id2label[i] for i in range(config.num_labels))
    plain = model.load_classifier(name, labels, 0)
    subset = deepcopy(plain)
    model.first_slot_only(subset)
    make = partial(Runner, template=template, tokenizer=tokenizer, device=device,
                   batch_tokens=args.batch_tokens or BATCH_TOKENS[device.type])
    return Annotating(queries, plain, subset, make)


def annotate(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Annotate training texts of a task in each way."""
    given = read_queries(args, device)

    def way(module: Any, edge: float, **options: Any) -> Way:
        def work(last: int | None = None) -> tuple[Any, Counter[str]]:
            runner = given.make(module, **options)
            marks = importance.explain(
                runner, given.queries[:last], args.delta, args.criterion, edge=edge)
            return marks, runner.counts

        with redirect_stdout(io.StringIO()):
            work(WARMUP_INPUTS)
        return work

    ours = {OURS.format(dtype): way(given.subset, EDGE, half=HALF[dtype])
            for dtype in args.dtypes}
    found, rows = interleave({
        PUBLISHED: way(given.plain, 0.0, cut=in_order, min_width=args.annotate_length),
        ALONE: way(given.plain, 0.0, cut=one_by_one),
        **ours,
    }, args.rounds)
    differ = {name: count_differences(found[name], found[ALONE]) for name in (PUBLISHED, *ours)}
    table = Table.of(given.title, rows)
    show(f"\n{table.as_text()}\ntokens annotated otherwise than one per pass: "
        + ", ".join(f"{count} by {name}" for name, count in differ.items()))
    return {"rows": rows, "sequences": len(given.queries), "differ": differ}


def count_differences(one: list[np.ndarray | None], other: list[np.ndarray | None]) -> int:
    """Count the tokens that are annotated differently, or by one of the two only."""
    # Every element of an array differs from None.
    return sum(int(np.sum(a != b)) for a, b in zip(one, other, strict=True))


# --------------------------------------------------------------------------- importance


def compare_measures(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Compare the measures of importance: their cost, and how well they rank what `buffer` finds.

    Average precision is that of the values against the marks of `buffer` in a sentence, a mean over
    the sentences with a mark; marks by construction are dropped first. Chance is the mean share of
    marks in these sentences. `turned` counts the decisions that asking again has changed.
    """
    given = read_queries(args, device)
    typed = {"delta": args.delta, "criterion": args.criterion}
    ways = {
        name: (record, importance.choose_options(name, typed if name == importance.BUFFER else {}))
        for name, record in importance.IMPORTANCE.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    of_cpu: dict[str, list[float]] = {name: [] for name in ways}
    values, counts = {}, {}
    with redirect_stdout(io.StringIO()):  # lines of progress
        for record, options in ways.values():
            record.measure(given.make(given.subset), given.queries[:WARMUP_INPUTS], **options)
        for name in turns(list(ways), args.rounds):
            record, options = ways[name]
            runner = given.make(given.subset)
            synchronize()
            started, on_cpu = time.perf_counter(), time.process_time()
            values[name], counts[name] = record.measure(
                runner, given.queries, **options), runner.counts
            synchronize()
            seconds[name].append(time.perf_counter() - started)
            of_cpu[name].append(time.process_time() - on_cpu)
    marks = {name: record.decide(values[name], **options)
             for name, (record, options) in ways.items()}
    found = marks[importance.BUFFER]
    target = [one if one is None else importance.drop_unremoved(one) for one in found]
    some = [one for one in only_right(target) if one.any()]
    if not some:
        raise DataError(
            f"--classifier {args.classifier}: {importance.BUFFER} finds no important token, so "
            "there is nothing to rank; give a better classifier, or more --max_samples"
        )
    rows = [
        {"measure": name,
         "important_percent": f"{100 * np.mean(np.concatenate(only_right(marks[name]))):.1f}",
         "average_precision": f"{mean_precision(target, values[name]):.3f}",
         "passes": count["passes"], "inputs": count["inputs"], "tokens": count["tokens"],
         "again_alone": count["alone"], "turned": count["turned"],
         "seconds": f"{spread(seconds[name])['median']:.1f}",
         "cpu_seconds": f"{spread(of_cpu[name])['median']:.1f}"}
        for name, count in counts.items()
    ]
    chance = float(np.mean([one.mean() for one in some]))
    by_construction = count_differences(target, found)
    table = Table.of(given.title, rows)
    show(f"\n{table.as_text()}\n{len(only_right(found)):,} sequences are classified correctly; "
        f"{by_construction:,} last tokens are important to {importance.BUFFER} by construction; "
        f"chance in the {len(some):,} sequences with other marks: average precision {chance:.3f}")
    return {"rows": rows, "sequences": len(given.queries), "right": len(only_right(found)),
            "with_marks": len(some), "chance": chance, "by_construction": by_construction}


def only_right(values: importance.Values) -> list[np.ndarray]:
    """Return the values of the sequences that the classifier gets right."""
    return [one for one in values if one is not None]


def mean_precision(target: importance.Values, values: importance.Values) -> float:
    """Return the mean average precision over the sentences with a mark in `target`."""
    return float(np.mean([average_precision(one, of.astype(np.float64))
                          for one, of in zip(target, values, strict=True)
                          if one is not None and of is not None and one.any()]))


# --------------------------------------------------------------------------- scoring


def first_sentences(store: TokenStore, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return whole sentences from the start of a store, at least one.

    Returns:
        Their ids, `(T,)` uint16, and offsets, `(N+1,)` int64.
    """
    tokens: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    room = max_tokens
    for shard in store.shards:
        offsets = shard.sequence_offsets
        count = max(int(np.searchsorted(offsets, room, side="right")) - 1, not tokens)
        count = min(count, shard.num_sequences)
        tokens.append(np.asarray(shard.tokens[: offsets[count]]))
        lengths.append(np.diff(offsets[: count + 1]))
        room -= len(tokens[-1])
        if count < shard.num_sequences:
            break
    return np.concatenate(tokens), np.cumsum(np.concatenate([[0], *lengths]))


def read_scorer(args: argparse.Namespace, prefix: str) -> tuple[TokenStore, Any, Any]:
    """Open a store to score, the scorer's configuration and its tokenizer; check that they fit."""
    name, length = args.scorer, args.score_length
    config = model.load_config(name)
    check_trained(config, "ForTokenClassification", name, "give the hf/ of train/fit_scorer.py")
    store, tokenizer = TokenStore.open(prefix), model.load_tokenizer(name)
    model.check_agreement(config, tokenizer, name, store=store,
                          remedy=f"tokenize with --tokenizer {name}")
    model.check_row_length(config, length)
    return store, config, tokenizer


def score(args: argparse.Namespace, prefix: str, device: torch.device) -> dict[str, Any]:
    """Score the first sentences of a store in each way."""
    name, length = args.scorer, args.score_length
    store, config, tokenizer = read_scorer(args, prefix)
    tokens, offsets = first_sentences(store, args.max_tokens)
    template = special_template(tokenizer, pair=False)
    labels = tuple(config.id2label[i] for i in range(config.num_labels))
    scorer = model.load_scorer(name, 0, labels=labels)  # whatever they are: only time counts
    make = partial(Runner, scorer, template, tokenizer, device,
                   args.batch_tokens or BATCH_TOKENS[device.type])

    def way(**options: Any) -> Way:
        def work(last: int = len(offsets) - 1) -> tuple[Any, Counter[str]]:
            runner, end = make(**options), int(offsets[last])
            with Progress(end, "token", label="score") as progress:
                found = scoring.score_block(
                    tokens[:end], offsets[: last + 1], runner, length - template.num_special,
                    progress)
            return found, runner.counts

        with redirect_stdout(io.StringIO()):
            work(min(WARMUP_INPUTS, len(offsets) - 1))
        return work

    ours = {OURS.format(dtype): way(half=HALF[dtype]) for dtype in args.dtypes}
    found, rows = interleave(
        {PUBLISHED: way(cut=in_order, min_width=length), **ours}, args.rounds)
    table = Table.of(
        f"Scoring {len(offsets) - 1:,} sentences of {len(tokens):,} tokens of {prefix}", rows)
    show(f"\n{table.as_text()}")
    agree = {}
    for name in ours:
        one, published = (found[each].astype(np.float64) for each in (name, PUBLISHED))
        # Half a step of float16 is 5e-4 of a number.
        difference = float((np.abs(one - published) / np.maximum(1, np.abs(published))).max())
        same, either = compare_masks(store, tokens, offsets, found[name], found[PUBLISHED])
        agree[name] = {
            "difference": difference, "masked_by_both": same, "masked_by_either": either,
            "equal_positions": 1 - (either - same) / len(tokens),
        }
        say(f"{name}: log-odds differ by at most {difference:.1e} (relative, above 1) from the "
            f"published way; {same:,} of {either:,} tokens that either would mask (selective, "
            f"15 %) are masked by both: equal at {agree[name]['equal_positions']:.2%} of the "
            "positions")
    return {"rows": rows, "store": prefix, "tokens": len(tokens), "sentences": len(offsets) - 1,
            "agree": agree}


def compare_masks(
    store: TokenStore, tokens: np.ndarray, offsets: np.ndarray, *scores: np.ndarray
) -> tuple[int, int]:
    """Count the tokens that `selective` masks by both scores, and by either."""
    masks = [
        set(STRATEGIES[MATCHED].choose(Sequences(
            offsets=offsets, positions=np.arange(len(tokens)),
            candidates=find_candidates(tokens, store.all_special_ids),
            rate=0.15, seed=0, epoch=0, scores=one)).tolist())
        for one in scores
    ]
    return len(masks[0] & masks[1]), len(masks[0] | masks[1])


# --------------------------------------------------------------------------- the command


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument_group(USUAL).add_argument
    add("--output_dir", required=True, metavar="DIR", help="folder for benchmark_inference.json")
    add("--classifier", default="", metavar="MODEL",
        help="fine-tuned classifier, to measure annotation")
    add("--task", default="mr", metavar="TASK", help="task whose training texts are annotated")
    add("--data_dir", metavar="DIR", help="folder with the files of the task")
    add("--importance", action="store_true",
        help="instead: compare the measures of importance, in cost and in what they find")
    add("--scorer", default="", metavar="MODEL", help="token scorer, to measure scoring")
    add("--tokens", nargs="+", default=[], metavar="P",
        help="token stores to score, one table per store")
    add = parser.add_argument_group("measuring").add_argument
    add("--criterion", default="signed", choices=[*importance.CRITERIA], help="as of annotate.py")
    add("--delta", type=float, default=0.01, help="as of annotate.py")
    add("--dtypes", nargs="+", default=["fp32", "fp16"], choices=[*HALF],
        help="precisions of selmask's own ways")
    add("--batch_tokens", type=int, metavar="N", help="token slots per forward pass, except for "
        "the published way (default: 8192 on a CPU, 65536 on a GPU)")
    numbers = (
        ("max_samples", 500, "training examples to annotate"),
        ("max_tokens", 200_000, "tokens to score: whole sentences from the start of a store"),
        ("annotate_length", 128, "largest buffer in tokens, to which the published way pads"),
        ("score_length", 256, "largest sentence to score in tokens, to which the published way "
         "pads"),
        ("rounds", 3, "rounds, over which all ways are interleaved"),
    )
    for name, default, text in numbers:
        add(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--dry_run", action="store_true",
                        help="check everything, print the plan, and exit")
    args = parser.parse_args(
        argv, max_samples=1, max_tokens=1, annotate_length=8, score_length=8, batch_tokens=1,
        rounds=1)
    if bool(args.scorer) != bool(args.tokens):
        raise ConfigError("--scorer and --tokens go together: give both or neither")
    if not args.classifier and not args.scorer:
        raise ConfigError("nothing to measure: give --classifier (with --task and --data_dir), or "
                          "--scorer and --tokens, or all")
    if args.importance and (not args.classifier or args.scorer):
        raise ConfigError("--importance goes with --classifier, --task and --data_dir, and without "
                          "--scorer")
    if args.classifier and "bf16" in args.dtypes:
        raise ConfigError("--dtypes bf16 is for scoring; leave --classifier or bf16 out")
    if args.classifier and not args.importance and "fp16" in args.dtypes:
        importance.check_half(args.delta)
    if engine.ranks().world_size > 1:
        raise ConfigError(f"{engine.ranks().world_size} ranks: measure on one; start one "
                          "process")
    return args


def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse_arguments(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.dry_run:
        if args.classifier:
            say(read_queries(args, device).title)
        for prefix in args.tokens:
            tokens, offsets = first_sentences(read_scorer(args, prefix)[0], args.max_tokens)
            say(f"Scoring {len(offsets) - 1:,} sentences of {len(tokens):,} tokens of {prefix}")
        return
    result: dict[str, Any] = {"benchmark": "inference", **environment(), "options": vars(args)}
    if args.importance:
        result["importance"] = compare_measures(args, device)
    elif args.classifier:
        result["annotating"] = annotate(args, device)
    result["scoring"] = [score(args, prefix, device) for prefix in args.tokens]
    file = Path(args.output_dir) / "benchmark_inference.json"
    atomic_write_json(file, result)
    show("\n" + json.dumps({"benchmark": "inference", "file": str(file)}))


if __name__ == "__main__":
    run_command(main)
