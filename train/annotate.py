"""Which tokens of the task's training texts matter to the task classifier: stage 2 begins here.

A sequence (a sentence; for aspect tasks a whole text with its aspect) is read from left to right.
A *buffer* holds the tokens seen so far that were not found important. The token that brings the
classifier's confidence in the right label to within `delta` of its confidence in the whole
sequence is important, and leaves the buffer again. Only sequences that the classifier gets right
say anything; the tokens of the others are marked 255, "not annotated", and so are tokens beyond
the length limit.

One forward pass a token would be slow one sequence at a time, so all sequences advance together:
step t asks for the confidence of every buffer that holds its t-th token, sorted by length.

    deepspeed train/annotate.py --task mr --data_dir D --model_name_or_path RC/seed_13/hf \
        --delta 0.01 --criterion signed --output A

writes the token store `A` (one document a text) and `A.importance.npy`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from preprocess.corpus import Example, Task, load_task, take_fixed
from preprocess.encode import encode_batch, prepare_backend
from preprocess.errors import ConfigError, DataError, run_command
from preprocess.masks import continuation_table, find_continuations
from preprocess.progress import Progress, say
from preprocess.store import StoreWriter, TokenStore, WriterLock, open_array, read_json
from preprocess.words import is_stop_word
from train import engine
from train.config import AnnotateConfig, parse
from train.inference import Runner, check_trained, special_template
from train.model import (
    check_row_length,
    load_classifier,
    load_config,
    load_tokenizer,
    local_checkpoint,
    weights_fingerprint,
)

NOT_IMPORTANT, IMPORTANT, NOT_ANNOTATED = 0, 1, 255

Confidence = Callable[[list[list[int]], list[int]], np.ndarray]


class Criterion(NamedTuple):
    """When a buffer counts as close to its whole sequence.

    `close(full, part, delta)` compares confidences, `(B,)` float64 each, and returns `(B,)` bool.
    With `test_empty`, a sequence whose empty buffer is close already has no important token: the
    label is explained by nothing at all, as it happens with a majority class.
    """

    close: Callable[[np.ndarray, np.ndarray, float], np.ndarray]
    test_empty: bool


def _close_signed(full: np.ndarray, part: np.ndarray, delta: float) -> np.ndarray:
    """Also close where the part is more confident than the whole."""
    return full - part < delta


def _close_absolute(full: np.ndarray, part: np.ndarray, delta: float) -> np.ndarray:
    return np.abs(full - part) < delta


CRITERIA: dict[str, Criterion] = {
    "signed": Criterion(_close_signed, test_empty=False),
    "absolute": Criterion(_close_absolute, test_empty=False),
    "strict": Criterion(_close_signed, test_empty=True),
}


def find_important(
    confidence: Confidence,
    sequences: Sequence[Sequence[int]],
    full_confidence: Sequence[float] | np.ndarray,
    delta: float,
    criterion: str = "signed",
) -> list[np.ndarray]:
    """Find the important tokens of each sequence by the buffer heuristic.

    At token t the buffer holds the unimportant tokens before t. If the buffer with token t is
    close to the whole sequence, token t is important and is taken out again; else it stays.
    Worked example, delta 0.01, full confidence 0.9, P of a buffer by its contents:
    `[a]` 0.5, stays; `[a b]` 0.9, so b is important; `[a c]` 0.6, stays. Result: `[F, T, F]`.

    Args:
        confidence: `confidence(buffers, owners)` returns P(right label) of each buffer, one float
            each; `owners[i]` is the index in `sequences` that buffer i came from. Called once a
            step with the buffers of all unfinished sequences. Under `strict` the first call asks
            for the empty buffers.
        sequences: token ids; may be empty, then the result is empty.
        full_confidence: P(right label) of the whole sequences, one float each.
        delta: largest difference in probability, exclusive.
        criterion: a name in `CRITERIA`.
    Returns:
        One array a sequence, as long as it, bool: True where the token is important.
    Raises:
        ValueError: unknown criterion, or not one full confidence a sequence.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion {criterion!r}: must be one of {', '.join(CRITERIA)}")
    full = np.asarray(full_confidence, dtype=np.float64).reshape(-1)
    if len(full) != len(sequences):
        raise ValueError(f"{len(full)} full confidences for {len(sequences)} sequences")
    close, test_empty = CRITERIA[criterion]
    important = [np.zeros(len(sequence), dtype=bool) for sequence in sequences]
    kept: list[list[int]] = [[] for _ in sequences]

    def ask(buffers: list[list[int]], owners: list[int]) -> np.ndarray:
        part = np.asarray(confidence(buffers, owners), dtype=np.float64).reshape(-1)
        assert len(part) == len(buffers), "one confidence a buffer"
        return close(full[owners], part, delta)

    active = [i for i, sequence in enumerate(sequences) if len(sequence)]
    if test_empty and active:
        empty_is_close = ask([[] for _ in active], list(active))
        active = [i for i, is_close in zip(active, empty_is_close, strict=True) if not is_close]
    step = 0
    while active:
        buffers = [[*kept[i], int(sequences[i][step])] for i in active]
        for i, is_close in zip(active, ask(buffers, list(active)), strict=True):
            if is_close:
                important[i][step] = True
            else:
                kept[i].append(int(sequences[i][step]))
        step += 1
        active = [i for i in active if len(sequences[i]) > step]
    return important


MEASURES: dict[str, Callable[..., list[np.ndarray]]] = {"buffer": find_important}


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


# --------------------------------------------------------------------------- from texts to queries


@dataclass(frozen=True)
class Query:
    """One sequence to be explained.

    document, sequence: where it stands in the store. label: the classifier's class.
    aspect, tokens: ids as the classifier sees them, cut to the length limit.
    """

    document: int
    sequence: int
    label: int
    aspect: list[int]
    tokens: list[int]


def match_labels(task: Task, hf_config: Any, model_name: str) -> list[int]:
    """The classifier's class for each label of the task, by name.

    Raises:
        ConfigError: the classifier knows other labels.
    """
    classes = {str(name): int(number) for number, name in hf_config.id2label.items()}
    if set(classes) != set(task.labels) or len(classes) != hf_config.num_labels:
        raise ConfigError(
            f"--model_name_or_path {model_name} tells {', '.join(classes)} apart, but --task "
            f"{task.name} has {', '.join(task.labels)}; give a classifier fine-tuned on this task"
        )
    return [classes[label] for label in task.labels]


def group_by_text(examples: Iterable[Example]) -> dict[str, list[Example]]:
    """The different (aspect, label) examples of each text, in order of first appearance."""
    groups: dict[str, dict[Example, None]] = {}
    for example in examples:
        groups.setdefault(example.text, {})[example] = None
    return {text: list(group) for text, group in groups.items()}


def encode_texts(tokenizer: Any, texts: list[str], language: str | None) -> list[list[np.ndarray]]:
    """Ids of each text's sentences, uint16, cut as `tokenize_corpus.py` cuts them.

    Args:
        language: of the sentences; None keeps a text in one sequence.
    Returns:
        A list of sequences for each text, empty for a text without a token.
    """
    backend = prepare_backend(tokenizer)
    documents = []
    for text in texts:
        ids, lengths, _, _ = encode_batch(backend, [text], language)
        documents.append(np.split(ids, np.cumsum(lengths)[:-1]) if len(ids) else [])
    return documents


def cut_to_fit(aspect: list[int], tokens: list[int], limit: int) -> tuple[list[int], list[int]]:
    """Cut aspect and text so that both fit into `limit` tokens; the text keeps at least half."""
    aspect = aspect[: max(limit - len(tokens), limit // 2)]
    return aspect, tokens[: limit - len(aspect)]


def plan_queries(
    groups: list[list[Example]],
    documents: list[list[np.ndarray]],
    classes: list[int],
    tokenizer: Any,
    limit: int,
) -> list[Query]:
    """List what to ask the classifier: every sequence of every text, once for each aspect.

    Args:
        groups: the examples of each document's text.
        documents: ids of its sequences.
        classes: the classifier's class of each label.
        limit: tokens that an input holds beside its special tokens.
    """
    backend = prepare_backend(tokenizer)
    queries = []
    for number, (group, sequences) in enumerate(zip(groups, documents, strict=True)):
        for example in group:
            aspect = []
            if example.aspect:
                aspect = encode_batch(backend, [example.aspect], None)[0].tolist()
            for position, sequence in enumerate(sequences):
                if len(sequence):
                    parts = cut_to_fit(aspect, sequence.tolist(), limit)
                    queries.append(Query(number, position, classes[example.label], *parts))
    return queries


# --------------------------------------------------------------------------- asking


def predict(
    runner: Runner, queries: list[Query], buffers: list[list[int]], progress: Progress
) -> np.ndarray:
    """Probabilities of the classes, `(B, C)` float64, with each buffer in place of the text."""
    firsts = [query.aspect for query in queries] if runner.template.between else None
    found = np.zeros((len(queries), runner.model.config.num_labels))
    for batch, logits, _ in runner.run(buffers, firsts):
        powers = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
        found[batch] = powers / powers.sum(1, keepdims=True)
        progress.update(len(batch))
    return found


def explain(
    runner: Runner, queries: list[Query], config: AnnotateConfig, who: str = ""
) -> list[np.ndarray | None]:
    """Find the important tokens of this process's queries.

    Args:
        who: which process this is, for the lines of progress.
    Returns:
        One bool array a query, as long as its tokens; None where the classifier is wrong.
    Raises:
        DataError: the classifier's answers are not numbers.
    """
    every = config.logging_steps * max(1, config.batch_tokens // config.max_seq_length)
    with Progress(len(queries), "sequence", every, label=f"classify{who}") as progress:
        full = predict(runner, queries, [query.tokens for query in queries], progress)
    if np.isnan(full).any():
        raise DataError("the classifier's logits are not numbers; fine-tune it again")
    labels = np.array([query.label for query in queries], dtype=np.int64)
    right = np.flatnonzero(full.argmax(1) == labels)
    asked = [queries[i] for i in right]
    num_buffers = sum(len(query.tokens) for query in asked)
    num_buffers += len(asked) * CRITERIA[config.criterion].test_empty
    progress = Progress(num_buffers, "buffer", every, label=f"annotate{who}")

    def confidence(buffers: list[list[int]], owners: list[int]) -> np.ndarray:
        whose = [asked[i] for i in owners]
        answers = predict(runner, whose, buffers, progress)
        return answers[np.arange(len(whose)), [query.label for query in whose]]

    with progress:
        found = MEASURES[config.measure](
            confidence, [query.tokens for query in asked], full[right, labels[right]],
            config.delta, config.criterion,
        )
    result: list[np.ndarray | None] = [None] * len(queries)
    for i, marks in zip(right, found, strict=True):
        result[i] = marks
    return result


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
) -> list[np.ndarray | None]:
    """Share the queries among the ranks, longest first in turns, and gather the answers."""
    where = engine.ranks()
    order = sorted(range(len(queries)), key=lambda i: -len(queries[i].tokens))
    mine = order[where.rank :: where.world_size]
    who = "" if where.world_size == 1 else f" (1 of {where.world_size} ranks)"
    answers = explain(runner, [queries[i] for i in mine], config, who)
    found: list[np.ndarray | None] = [None] * len(queries)
    for share in engine.gather_objects(list(zip(mine, answers, strict=True))):
        for i, marks in share:
            found[i] = marks
    return found


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
) -> None:
    """Write the token store and its importance, both at once; an old annotation stays till then.

    Args:
        lock: of `output`, if it is held already.
    """
    flat = [array for sequences in importance for array in sequences]
    with StoreWriter(output, tokenizer, made_by, overwrite=True, lock=lock) as writer:
        for sequences in documents:
            writer.add_document(sequences)
        writer.add_array(
            "", "importance", np.concatenate([np.empty(0, np.uint8), *flat]), made_by
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
        runner = Runner(model, template, tokenizer, device, config.batch_tokens)
        started = time.monotonic()
        found = explain_on_all_ranks(runner, queries, config)
        importance = unite(documents, queries, found)
        if config.drop_stop_words:
            flat = [array for part in importance for array in part]
            for array, stop in zip(flat, stop_words, strict=True):
                array[stop & (array == IMPORTANT)] = NOT_IMPORTANT
        if engine.is_main():
            write_annotations(config.output, tokenizer, documents, importance, made_by, lock)
        passes, inputs, tokens = engine.all_reduce_sum(
            runner.counts.passes, runner.counts.inputs, runner.counts.tokens
        )
        say(describe(importance, queries, found))
        say(f"{inputs:,.0f} inputs of {tokens:,.0f} tokens in {passes:,.0f} forward passes, "
            f"{time.monotonic() - started:.1f} s on {engine.ranks().world_size} ranks "
            f"({device.type}): {config.output}.importance.npy")
        engine.finish()


if __name__ == "__main__":
    run_command(main)
