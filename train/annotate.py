"""Annotate which tokens of the task texts matter to the classifier.

What "matter" means is a record of `IMPORTANCE` (`--measure`, train/stages/importance.py). A
sequence is a sentence; for aspect tasks a whole text with its aspect. Only sequences that the
classifier gets right count; the tokens of the others are marked 255, "not annotated", as are tokens
beyond the length limit.

Not everything that is found is worth learning. Punctuation is dropped, and with `buffer` the last
token of a sequence from which nothing was taken out: its buffer is the sequence, so that it is
important by construction. `--keep_punctuation` and `--keep_last` keep them, `--drop_stop_words`
drops stop words too.

    deepspeed train/annotate.py --task mr --data_dir D --model_name_or_path RC/seed_13/hf \
        --delta 0.01 --criterion signed --output A

writes the token store `A` (one document per text) and `A.importance.npy`.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.corpus import load_task, take_fixed
from preprocess.errors import ConfigError, DataError, run_command
from preprocess.files import WriterLock, read_json
from preprocess.identity import build, compare, digest, sealed
from preprocess.progress import say
from preprocess.store import StoreWriter, TokenStore, open_array
from train import engine
from train.config import AnnotateConfig, parse
from train.model import (
    check_agreement,
    first_slot_only,
    fit_row_length,
    load_classifier,
    load_config,
    load_tokenizer,
)
from train.run_dir.hf_folder import open_weights
from train.run_dir.identity import architecture, numerics
from train.stages.annotation import (
    IMPORTANT,
    NOT_ANNOTATED,
    drop,
    find_punctuation,
    find_stop_words,
    unite,
)
from train.stages.importance import (
    BUFFER,
    HALF_DELTA,
    IMPORTANCE,
    Importance,
    Values,
    check_half,
    choose_options,
)
from train.stages.inference import (
    BATCH_TOKENS,
    HALF,
    Runner,
    check_trained,
    choose_dtype,
    special_template,
    warn_of_pairs,
)
from train.stages.queries import (
    Query,
    encode_texts,
    group_by_text,
    match_labels,
    plan_queries,
)

LEAST, MOST = 0.005, 0.5
"""Shares of important tokens beyond which a scorer learns little from an annotation."""

# --------------------------------------------------------------------------- all queries


def measure_on_all_ranks(
    runner: Runner, queries: list[Query], config: AnnotateConfig, options: dict[str, Any]
) -> Values:
    """Share the queries among the ranks, longest first, round-robin, and gather the answers."""
    where, measure = engine.ranks(), IMPORTANCE[config.measure]
    order = sorted(range(len(queries)), key=lambda i: -len(queries[i].tokens))
    mine = order[where.rank :: where.world_size]
    who = "" if where.world_size == 1 else f" (1 of {where.world_size} ranks)"
    answers = measure.measure(
        runner, [queries[i] for i in mine], **options, who=who,
        every=config.logging_steps * max(1, runner.batch_tokens // config.max_seq_length),
    )
    found: Values = [None] * len(queries)
    for share in engine.gather_objects(list(zip(mine, answers, strict=True))):
        for i, values in share:
            found[i] = values
    return measure.decide(found, **options)


# --------------------------------------------------------------------------- the command

def is_made(output: str, identity: dict[str, Any], overwrite: bool) -> bool:
    """Return whether this very annotation is complete; refuse to replace another one.

    Raises:
        ConfigError: an annotation of another identity, or some other token store.
    """
    path = Path(output + ".json")
    if not path.exists():
        return False
    try:
        infos = [open_array(shard, "", "importance")[1] for shard in TokenStore.open(output).shards]
    except DataError:
        options = read_json(path).get("options")
        if overwrite or isinstance(options, dict) and options.get("command") == "annotate":
            return False
        raise ConfigError(
            f"--output {output}: another token store is there; give another name, or --overwrite"
        ) from None
    if overwrite:
        return all(info.get("identity") == identity for info in infos)
    for info in infos:
        compare(info.get("identity", {}), identity, f"--output {output}",
                "give another name, or --overwrite")
    return True


def write_annotations(
    output: str,
    tokenizer: Any,
    documents: list[list[np.ndarray]],
    importance: list[list[np.ndarray]],
    made_by: dict[str, Any],
    lock: WriterLock | None = None,
) -> None:
    """Write the token store and its importance together; an old annotation stays until then.

    Args:
        made_by: kept in the JSON of the importance.
        lock: of `output`, if it is held already.
    """
    flat = [array for sequences in importance for array in sequences]
    options = {"command": "annotate"}
    with StoreWriter(output, tokenizer, options, overwrite=True, lock=lock) as writer:
        for sequences in documents:
            writer.add_document(sequences)
        writer.add_array(
            "", "importance", np.concatenate([np.empty(0, np.uint8), *flat]), made_by
        )


def count_tokens(importance: list[list[np.ndarray]]) -> tuple[int, int, int]:
    """Return the numbers of important, annotated and all tokens."""
    flat = np.concatenate([np.empty(0, np.uint8), *(a for doc in importance for a in doc)])
    return int((flat == IMPORTANT).sum()), int((flat != NOT_ANNOTATED).sum()), len(flat)


def describe(
    importance: list[list[np.ndarray]], queries: list[Query], found: Values,
    dropped: dict[str, int],
) -> str:
    """Summarise the annotation in words."""
    num_right = sum(marks is not None for marks in found)
    num_important, num_known, num_tokens = count_tokens(importance)
    without = ", ".join(
        f"{count:,} {name.replace('_', ' ')}" for name, count in dropped.items()) or "none"
    return (
        f"{num_right:,} of {len(queries):,} sequences classified correctly "
        f"({num_right / max(len(queries), 1):.1%}); {num_known:,} of {num_tokens:,} tokens "
        f"annotated, {num_important:,} of them important "
        f"({num_important / max(num_known, 1):.1%}); dropped: {without}"
    )


def find_weak(importance: list[list[np.ndarray]], measure: Importance) -> list[str]:
    """Say what a scorer would learn little from, with the number and what to do."""
    num_important, num_known, _ = count_tokens(importance)
    if not num_known:
        return ["no token is annotated, since the classifier got every sequence wrong; fine-tune "
                "it longer or on more labels"]
    share = num_important / num_known
    if LEAST <= share <= MOST:
        return []
    few = share < LEAST
    return [f"{share:.2%} of the annotated tokens are important, {'less' if few else 'more'} than "
            f"{LEAST if few else MOST:.1%}, and a scorer learns little from that; "
            f"{measure.more if few else measure.fewer}, or annotate with a better classifier"]


def settle(config: AnnotateConfig) -> tuple[dict[str, Any], str]:
    """Return the options of the measure, and fp16 or fp32.

    Raises:
        ConfigError: options that contradict each other.
    """
    measure = IMPORTANCE[config.measure]
    criterion = config.criterion if config.criterion != AnnotateConfig.criterion else None
    options = choose_options(config.measure, {
        "delta": config.delta, "criterion": criterion, "share": config.share})
    if config.keep_last and not measure.filtered:
        raise ConfigError(f"--keep_last goes with --measure {BUFFER}, and --measure is "
                          f"{config.measure}; leave one of them out")
    if config.dtype == "bf16":
        raise ConfigError("--dtype bf16: too coarse to decide what is important; give fp16, which "
                          "asks close decisions again in fp32, or leave --dtype out")
    if config.dtype == "fp16" and not measure.half:
        raise ConfigError(f"--dtype fp16: --measure {config.measure} needs fp32; leave --dtype out")
    if config.dtype == "fp16":
        check_half(options["delta"])
    half = measure.half and options["delta"] >= HALF_DELTA
    return options, choose_dtype(config.dtype) if half else "fp32"


def main(argv: list[str] | None = None) -> None:
    """Annotate the training texts of a task."""
    config = parse(AnnotateConfig, argv).settled()
    measure, (options, dtype) = IMPORTANCE[config.measure], settle(config)
    task = load_task(config.task, **config.task_files())
    hf_config = load_config(config.model_name_or_path, config.trust_remote_code)
    check_trained(hf_config, "ForSequenceClassification", config.model_name_or_path,
                  "give seed_N/hf of train/finetune.py")
    classes = match_labels(task, hf_config, config.model_name_or_path)
    tokenizer = load_tokenizer(config.model_name_or_path, config.trust_remote_code)
    examples = take_fixed(task.splits["train"], config.max_train_samples)
    groups = group_by_text(examples)
    has_aspects = any(e.aspect for group in groups.values() for e in group)
    check_agreement(hf_config, tokenizer, config.model_name_or_path, pair=has_aspects)
    config = fit_row_length(hf_config, config)
    documents = encode_texts(tokenizer, list(groups), None if has_aspects else config.language)
    template = special_template(tokenizer, pair=has_aspects)
    limit = config.max_seq_length - template.num_special
    queries = plan_queries(list(groups.values()), documents, classes, tokenizer, limit)
    say(f"task {task.name}: {len(groups):,} training texts, {len(queries):,} "
        f"{'pairs of text and aspect' if has_aspects else 'sentences'}, at most "
        f"{sum(len(query.tokens) for query in queries):,} buffers to classify")
    weights = open_weights(config.model_name_or_path)
    warn_of_pairs(weights.stages, has_aspects)
    # Before any work: not every tokenizer marks its words.
    flat = [s for part in documents for s in part]
    to_drop = {}
    if not config.keep_punctuation:
        to_drop["punctuation"] = find_punctuation(flat, tokenizer)
    if config.drop_stop_words:
        to_drop["stop_words"] = find_stop_words(flat, tokenizer)
    identity = build(
        "annotate",
        inputs={
            "task": digest([
                task.labels,
                [[text, [[e.aspect, e.label] for e in group]] for text, group in groups.items()],
                [[ids.tolist() for ids in sequences] for sequences in documents],
            ]),
            "weights": weights.hf_digest,
        },
        train={"max_seq_length": config.max_seq_length},
        split={"labels": len(examples)},
        options={
            "measure": config.measure, "delta": None, "criterion": None, "share": None, **options,
            **config.choice_of_labels(),
            "language": None if has_aspects else config.language,
            "drop_stop_words": config.drop_stop_words,
            "keep_punctuation": config.keep_punctuation,
            "keep_last": config.keep_last if measure.filtered else None,
            "model_config": architecture(hf_config),
        },
    )
    if is_made(config.output, identity, config.overwrite):
        say(f"{config.output}: finished already")
        return
    if config.dry_run:
        return
    with WriterLock(config.output) if engine.is_main() else nullcontext() as lock:
        is_made(config.output, identity, config.overwrite)  # another one may have ended meanwhile
        device = engine.start()
        names = tuple(hf_config.id2label[i] for i in range(hf_config.num_labels))
        model = load_classifier(config.model_name_or_path, names, 0, config.trust_remote_code,
                                trained=True)
        first_slot_only(model)
        runner = Runner(model, template, tokenizer, device,
                        config.batch_tokens or BATCH_TOKENS[device.type], half=HALF[dtype])
        started = time.monotonic()
        found = measure_on_all_ranks(runner, queries, config, options)
        dropped = {}
        if measure.filtered and not config.keep_last:
            kept = [None if marks is None else measure.filtered(marks) for marks in found]
            dropped["last_tokens"] = sum(
                int(np.sum(a != b)) for a, b in zip(found, kept, strict=True))
            found = kept
        importance = unite(documents, queries, found)
        for name, marks in to_drop.items():
            dropped[name] = drop(importance, marks)
        weak = find_weak(importance, measure)
        flops, = engine.all_reduce_sum(runner.counts["flops"])
        if engine.is_main():
            write_annotations(config.output, tokenizer, documents, importance, {
                **sealed(identity), "numerics": {**numerics(config), "dtype": dtype},
                "seconds": round(time.monotonic() - started, 1), "flops": flops or None,
                "dropped": dropped, "weak": weak,
            }, lock)
        passes, inputs, tokens, slots, exact, alone, turned = engine.all_reduce_sum(*(
            runner.counts[name]
            for name in ("passes", "inputs", "tokens", "slots", "fp32", "alone", "turned")
        ))  # and no rank goes on before the annotations are there
        again = f"{exact:,.0f} of the inputs asked again in fp32 and " if dtype == "fp16" else ""
        say(describe(importance, queries, found, dropped))
        say(f"{inputs:,.0f} inputs of {tokens:,.0f} tokens in {passes:,.0f} forward passes, "
            f"{1 - tokens / max(slots, 1):.1%} padding, {again}{alone:,.0f} repeated alone to be "
            f"sure, {turned:,.0f} decisions turned; {time.monotonic() - started:.1f} s on "
            f"{engine.ranks().world_size} ranks ({device.type}, {dtype}): "
            f"{config.output}.importance.npy")
        for sentence in weak:
            say(f"warning: {sentence}")
        engine.finish()


if __name__ == "__main__":
    run_command(main)
