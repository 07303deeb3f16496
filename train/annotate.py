"""Annotate the tokens of the task's texts that matter to the classifier.

A sequence (a sentence; for aspect tasks a whole text with its aspect) is read from left to right.
A *buffer* holds the tokens seen so far that were not found important. The token that brings the
classifier's confidence in the right label to within `delta` of its confidence in the whole
sequence is important, and leaves the buffer again. Only sequences that the classifier gets right
say anything; the tokens of the others are marked 255, "not annotated", and so are tokens beyond
the length limit.

`train/importance.py` finds the tokens; here are the task, the texts and what is written.

    deepspeed train/annotate.py --task mr --data_dir D --model_name_or_path RC/seed_13/hf \
        --delta 0.01 --criterion signed --output A

writes the token store `A` (one document a text) and `A.importance.npy`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.corpus import load_task, take_fixed
from preprocess.errors import ConfigError, DataError, run_command
from preprocess.files import WriterLock, read_json
from preprocess.progress import say
from preprocess.store import StoreWriter, TokenStore, open_array
from preprocess.text.continuations import continuation_table, find_continuations
from preprocess.text.stop_words import is_stop_word
from train import engine
from train.config import AnnotateConfig, parse
from train.model import (
    check_row_length,
    first_slot_only,
    load_classifier,
    load_config,
    load_tokenizer,
    local_checkpoint,
    weights_fingerprint,
)
from train.stages.importance import (
    CRITERIA,
    MEASURES,
    Query,
    encode_texts,
    explain,
    group_by_text,
    match_labels,
    plan_queries,
)
from train.stages.inference import Runner, check_trained, special_template

NOT_IMPORTANT, IMPORTANT, NOT_ANNOTATED = 0, 1, 255

# --------------------------------------------------------------------------- stop words

def find_stop_words(sequences: Sequence[np.ndarray], tokenizer: Any) -> list[np.ndarray]:
    """Mark the tokens that are stop words, whole ones: one bool array a sequence."""
    lengths = [len(sequence) for sequence in sequences]
    offsets = np.cumsum([0, *lengths])
    tokens = np.concatenate([np.empty(0, np.int64), *sequences]).astype(np.int64)
    continues = find_continuations(tokens, offsets, continuation_table(tokenizer))
    starts = np.append(np.flatnonzero(~continues), len(tokens))
    known: dict[tuple[int, ...], bool] = {}
    marks = np.zeros(len(tokens), dtype=bool)
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        word = tuple(tokens[start:end].tolist())
        if word not in known:
            known[word] = is_stop_word(tokenizer.decode(list(word)))
        marks[start:end] = known[word]
    return np.split(marks, offsets[1:-1]) if lengths else []


def unite(
    documents: list[list[np.ndarray]], queries: list[Query], found: list[np.ndarray | None]
) -> list[list[np.ndarray]]:
    """Lay the answers over the texts: a token is important if it is for any aspect.

    Returns:
        For each sequence of each document, `(n,)` uint8: `IMPORTANT`, `NOT_IMPORTANT`, or
        `NOT_ANNOTATED` where no right answer reaches.
    """
    importance = [
        [np.full(len(sequence), NOT_ANNOTATED, np.uint8) for sequence in sequences]
        for sequences in documents
    ]
    for query, marks in zip(queries, found, strict=True):
        if marks is not None:
            seen = importance[query.document][query.sequence][: len(marks)]
            seen[seen == NOT_ANNOTATED] = NOT_IMPORTANT
            seen[marks] = IMPORTANT
    return importance


def explain_on_all_ranks(
    runner: Runner, queries: list[Query], config: AnnotateConfig
) -> tuple[list[np.ndarray | None], int]:
    """Share the queries among the ranks, longest first in turns, and gather the answers."""
    where = engine.ranks()
    order = sorted(range(len(queries)), key=lambda i: -len(queries[i].tokens))
    mine = order[where.rank :: where.world_size]
    who = "" if where.world_size == 1 else f" (1 of {where.world_size} ranks)"
    answers, num_alone = explain(
        runner, [queries[i] for i in mine], config.delta, config.criterion, config.measure,
        who=who, every=config.logging_steps * max(1, config.batch_tokens // config.max_seq_length),
    )
    found: list[np.ndarray | None] = [None] * len(queries)
    for share in engine.gather_objects(list(zip(mine, answers, strict=True))):
        for i, marks in share:
            found[i] = marks
    return found, int(engine.all_reduce_sum(num_alone)[0])


# --------------------------------------------------------------------------- the command

RECORDED = (
    "task", "model_name_or_path", "measure", "criterion", "delta", "drop_stop_words", "language",
    "max_seq_length", "max_train_samples",
)
"""The options that decide what comes out; kept with it."""


def check_output(output: str, overwrite: bool) -> None:
    """Refuse to replace what is not an unfinished annotation, unless asked to.

    Raises:
        ConfigError: a whole annotation, or some other token store.
    """
    path = Path(output + ".json")
    if overwrite or not path.exists():
        return
    options = read_json(path).get("options")
    made_by = options if isinstance(options, dict) else {}
    try:
        for shard in TokenStore.open(output).shards:
            open_array(shard, "", "importance")
    except DataError:
        if made_by.get("command") == "annotate":
            return
        raise ConfigError(
            f"--output {output}: another token store is there; give another name, or --overwrite"
        ) from None
    raise ConfigError(
        f"--output {output}: an annotation is there already (delta {made_by.get('delta')}, "
        f"criterion {made_by.get('criterion')}); give another name, or --overwrite"
    )


def write_annotations(
    output: str,
    tokenizer: Any,
    documents: list[list[np.ndarray]],
    importance: list[list[np.ndarray]],
    made_by: dict[str, Any],
    lock: WriterLock | None = None,
    seconds: float = 0.0,
) -> None:
    """Write the token store and its importance, both at once; an old annotation stays till then.

    Args:
        lock: of `output`, if it is held already.
        seconds: that finding the importance took, to be kept with it.
    """
    flat = [array for sequences in importance for array in sequences]
    with StoreWriter(output, tokenizer, made_by, overwrite=True, lock=lock) as writer:
        for sequences in documents:
            writer.add_document(sequences)
        writer.add_array(
            "", "importance", np.concatenate([np.empty(0, np.uint8), *flat]),
            {**made_by, "seconds": round(seconds, 1)},
        )


def describe(
    importance: list[list[np.ndarray]], queries: list[Query], found: list[np.ndarray | None]
) -> str:
    """What came out, in words."""
    num_right = sum(marks is not None for marks in found)
    flat = np.concatenate([np.empty(0, np.uint8), *(a for doc in importance for a in doc)])
    num_important, num_known = int((flat == IMPORTANT).sum()), int((flat != NOT_ANNOTATED).sum())
    return (
        f"{num_right:,} of {len(queries):,} sequences classified correctly "
        f"({num_right / max(len(queries), 1):.1%}); {num_known:,} of {len(flat):,} tokens "
        f"annotated, {num_important:,} of them important "
        f"({num_important / max(num_known, 1):.1%})"
    )


def main(argv: list[str] | None = None) -> None:
    """Annotate the training texts of a task."""
    config = parse(AnnotateConfig, argv)
    for name, known in (("criterion", CRITERIA), ("measure", MEASURES)):
        if getattr(config, name) not in known:
            raise ConfigError(
                f"--{name} {getattr(config, name)}: must be one of {', '.join(known)}"
            )
    check_output(config.output, config.overwrite)
    task = load_task(
        config.task, data_dir=config.data_dir, train_file=config.train_file,
        validation_file=config.validation_file, test_file=config.test_file,
        text_column=config.text_column, label_column=config.label_column,
        pair_column=config.pair_column,
    )
    hf_config = load_config(config.model_name_or_path, config.trust_remote_code)
    check_trained(hf_config, "ForSequenceClassification", config.model_name_or_path,
                  "give seed_N/hf of train/finetune.py")
    check_row_length(hf_config, config.max_seq_length)
    classes = match_labels(task, hf_config, config.model_name_or_path)
    tokenizer = load_tokenizer(config.model_name_or_path, config.trust_remote_code)
    groups = group_by_text(take_fixed(task.splits["train"], config.max_train_samples))
    has_aspects = any(e.aspect for group in groups.values() for e in group)
    documents = encode_texts(tokenizer, list(groups), None if has_aspects else config.language)
    template = special_template(tokenizer, pair=has_aspects)
    limit = config.max_seq_length - template.num_special
    queries = plan_queries(list(groups.values()), documents, classes, tokenizer, limit)
    say(f"task {task.name}: {len(groups):,} training texts, {len(queries):,} "
        f"{'pairs of text and aspect' if has_aspects else 'sentences'}, at most "
        f"{sum(len(query.tokens) for query in queries):,} buffers to classify")
    # Before any work: not every tokenizer tells its words apart.
    stop_words = (
        find_stop_words([s for part in documents for s in part], tokenizer)
        if config.drop_stop_words else []
    )
    if config.dry_run:
        return
    made_by = {
        "command": "annotate",
        **{name: getattr(config, name) for name in RECORDED},
        "model_fingerprint": weights_fingerprint(
            local_checkpoint(config.model_name_or_path), hf_config
        ),
    }
    with WriterLock(config.output) if engine.is_main() else nullcontext() as lock:
        check_output(config.output, config.overwrite)  # another one may have ended meanwhile
        device = engine.start()
        names = tuple(hf_config.id2label[i] for i in range(hf_config.num_labels))
        model = load_classifier(config.model_name_or_path, names, 0, config.trust_remote_code)
        first_slot_only(model)
        runner = Runner(model, template, tokenizer, device, config.batch_tokens)
        started = time.monotonic()
        found, num_alone = explain_on_all_ranks(runner, queries, config)
        importance = unite(documents, queries, found)
        if config.drop_stop_words:
            flat = [array for part in importance for array in part]
            for array, stop in zip(flat, stop_words, strict=True):
                array[stop & (array == IMPORTANT)] = NOT_IMPORTANT
        if engine.is_main():
            write_annotations(config.output, tokenizer, documents, importance, made_by, lock,
                              time.monotonic() - started)
        counts = runner.counts
        passes, inputs, tokens, slots = engine.all_reduce_sum(
            counts.passes, counts.inputs, counts.tokens, counts.slots
        )
        say(describe(importance, queries, found))
        say(f"{inputs:,.0f} inputs of {tokens:,.0f} tokens in {passes:,.0f} forward passes, "
            f"{1 - tokens / max(slots, 1):.1%} padding, {num_alone:,} of them asked alone to be "
            f"sure; {time.monotonic() - started:.1f} s on {engine.ranks().world_size} ranks "
            f"({device.type}): {config.output}.importance.npy")
        engine.finish()


if __name__ == "__main__":
    run_command(main)
