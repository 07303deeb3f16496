"""Predict the labels of new texts with a fine-tuned classifier.

Reads texts from a file, in its order, and writes a row for each: the text, the name of its label
and the probability of every label. Inputs are encoded as in fine-tuning, and cut where it cut them.
A text without a token gets a row without a label. The file that is written is whole or absent.

    python train/predict.py --model_name_or_path R3/seed_13/hf --input texts.csv \
        --output predictions.csv --explain

`--explain` shows the important tokens of the first texts: what `annotate.py --measure buffer` would
mark if the predicted label were the right one. It asks about sentences one by one, so a sentence
that alone is classified otherwise than its text is not annotated.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from preprocess.corpus import Example, as_text
from preprocess.corpus.sources import read_rows
from preprocess.errors import ConfigError, DataError, run_command, visible
from preprocess.files import atomic_stream, atomic_write_bytes
from preprocess.progress import Progress, print_line, say
from preprocess.text.encode import BLOCK_CHARACTERS
from preprocess.view.page import format_texts
from preprocess.view.pieces import read_sequence
from preprocess.view.terminal import mark_sequence, wants_colour
from train.config import PredictConfig, parse
from train.engine import ranks
from train.model import (
    FAMILIES,
    check_agreement,
    check_row_length,
    first_slot_only,
    load_classifier,
    load_config,
    load_tokenizer,
)
from train.run_dir.hf_folder import open_weights
from train.stages.annotation import (
    IMPORTANT,
    NOT_ANNOTATED,
    drop,
    find_punctuation,
    unite,
)
from train.stages.examples import encode_inputs, make_examples
from train.stages.importance import BUFFER, IMPORTANCE
from train.stages.inference import (
    BATCH_TOKENS,
    HALF,
    Runner,
    check_trained,
    choose_dtype,
    special_template,
    warn_of_pairs,
)
from train.stages.queries import encode_texts, plan_queries
from train.stages.scores import softmax
from train.stages.supervised import attention_without_plans, predict

# Texts in memory at a time: enough to sort them by length, and of the tokenizer's memory (170 times
# that of a text) not too much.
CHUNK_TEXTS, CHUNK_CHARACTERS = 8192, 1 << 20
ALONE = "not annotated: alone, this sentence gets another label"
BEYOND = "not annotated beyond --max_seq_length"


class InputText(NamedTuple):
    """A text as the file has it, and its aspect; both are encoded without outer white space."""

    text: str
    aspect: str | None


@dataclass(frozen=True)
class Explained:
    """The sequences of a text, and the marks of their tokens, as annotate.py would write them.

    sequences: `(n,)` uint16 each. marks: `(n,)` uint8 each, IMPORTANT and so on.
    """

    sequences: list[np.ndarray]
    marks: list[np.ndarray]


@dataclass(frozen=True)
class PredictInputs:
    """What is read and checked before the first text is classified."""

    config: PredictConfig
    hf_config: Any
    tokenizer: Any
    labels: tuple[str, ...]
    max_seq_length: int

    def encode(self, texts: list[InputText]) -> tuple[list[list[int]], list[list[int]]]:
        """Return ids and segments of each text, cut to `max_seq_length`."""
        # No input has so many tokens, and tokenizing a whole book takes the memory of a machine.
        plain = [one.text.strip()[:BLOCK_CHARACTERS] for one in texts]
        aspects = [(one.aspect or "").strip()[:BLOCK_CHARACTERS] for one in texts]
        return encode_inputs(
            self.tokenizer, plain, aspects if self.config.pair_column else None,
            self.max_seq_length)


def read_labels(hf_config: Any, name: str) -> tuple[str, ...]:
    """Return the names of a classifier's labels.

    Raises:
        ConfigError: it has no trained head, or one that does not choose one of several labels; or
            the names of these are not one for each.
    """
    check_trained(hf_config, "ForSequenceClassification", name,
                  "give a fine-tuned classifier, as seed_N/hf of train/finetune.py")
    names = hf_config.id2label
    if set(names) != set(range(len(names))):
        raise ConfigError(f"--model_name_or_path {name}: id2label in its config.json has the keys "
                          f"{', '.join(map(str, names))}; they must be 0 to {len(names) - 1}")
    labels = tuple(str(names[i]) for i in range(len(names)))
    if len(set(labels)) < len(labels):
        raise ConfigError(f"--model_name_or_path {name}: two of its labels have the same name in "
                          "its config.json; rename one there")
    return labels


def read_inputs(config: PredictConfig) -> PredictInputs:
    """Check the classifier, and find out where its inputs are cut."""
    name = config.model_name_or_path
    if ranks().world_size > 1:
        raise ConfigError(f"predict.py runs in one process, not in {ranks().world_size}; start it "
                          "with python, without a launcher")
    hf_config = load_config(name, config.trust_remote_code)
    labels = read_labels(hf_config, name)
    tokenizer = load_tokenizer(name, config.trust_remote_code)
    check_agreement(hf_config, tokenizer, name, pair=bool(config.pair_column))
    stages = open_weights(name).stages
    warn_of_pairs(stages, bool(config.pair_column))
    tuned = [stage["identity"]["train"]["max_seq_length"] for stage in stages
             if stage["stage"] == "finetune"]
    limit = FAMILIES[hf_config.model_type].num_positions(hf_config)
    length = config.max_seq_length or (tuned or [min(limit, tokenizer.model_max_length)])[-1]
    check_row_length(hf_config, length)
    return PredictInputs(config, hf_config, tokenizer, labels, length)


# --------------------------------------------------------------------------- texts


def read_texts(config: PredictConfig) -> Iterator[InputText]:
    """Yield the texts of `--input`; None is an empty one."""
    columns = [config.text_column, *([config.pair_column] if config.pair_column else [])]
    for row in read_rows(config.input, columns, config.split, texts=columns):
        aspect = as_text(row[config.pair_column]) if config.pair_column else None
        yield InputText(as_text(row[config.text_column]), aspect)


def in_chunks(texts: Iterator[InputText]) -> Iterator[list[InputText]]:
    """Yield the texts in lists that fit the memory."""
    chunk: list[InputText] = []
    characters = 0
    for one in texts:
        chunk.append(one)
        characters += len(one.text)
        if len(chunk) >= CHUNK_TEXTS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def count_texts(config: PredictConfig) -> tuple[int, int]:
    """Read all texts once, so that a broken row is found first; return how many, and empty ones.

    Raises:
        DataError: there is none, or a row cannot be read.
    """
    count = empty = 0
    for one in read_texts(config):
        count += 1
        empty += not one.text.strip()
    if count == empty:
        raise DataError(f"{config.input}: no text in it" if not count else
                        f"{config.input}: all {count:,} texts are empty; --text_column chooses "
                        "another column")
    return count, empty


# --------------------------------------------------------------------------- predictions


def classify(
    inputs: PredictInputs, model: Any, texts: list[InputText], device: torch.device
) -> tuple[np.ndarray, int]:
    """Return the probabilities of the labels of texts.

    Returns:
        `(N, C)` float64, not a number where a text has no token; and how many texts were cut.
    Raises:
        DataError: the classifier's answers are not numbers.
    """
    ids, types = inputs.encode(texts)
    template = special_template(inputs.tokenizer, pair=bool(inputs.config.pair_column))
    there = [i for i, one in enumerate(texts)
             if one.text.strip() and len(ids[i]) > template.num_special]
    found = np.full((len(texts), len(inputs.labels)), np.nan)
    if there:
        segments = getattr(inputs.hf_config, "type_vocab_size", 0) > 1
        examples = make_examples(
            [ids[i] for i in there], [types[i] for i in there] if segments else None,
            [0] * len(there), [1.0])
        with attention_without_plans(device):
            logits = np.stack(predict(
                model, examples, inputs.tokenizer.pad_token_id,
                inputs.config.per_device_eval_batch_size, device, label="classify"))
        if not np.isfinite(logits).all():
            raise DataError(f"{inputs.config.model_name_or_path}: its logits are not numbers; "
                            "fine-tune it again")
        found[there] = softmax(logits.astype(np.float64))
    return found, sum(len(one) == inputs.max_seq_length for one in ids)


def make_row(
    inputs: PredictInputs, one: InputText, probabilities: np.ndarray, explained: Explained | None
) -> dict[str, Any]:
    """Return the row of a text; a text without a token has no prediction, and says so by null."""
    config, known = inputs.config, not np.isnan(probabilities).any()
    row: dict[str, Any] = {config.text_column: one.text}
    if config.pair_column:
        row[config.pair_column] = one.aspect
    row["prediction"] = inputs.labels[int(probabilities.argmax())] if known else None
    row["probabilities"] = dict(zip(inputs.labels, [
        round(float(p), 6) if known else None for p in probabilities], strict=True))
    if explained is not None:
        flat = [i for ids in explained.sequences for i in ids.tolist()]
        row["tokens"] = inputs.tokenizer.convert_ids_to_tokens(flat)
        row["importance"] = [None if mark == NOT_ANNOTATED else mark
                             for marks in explained.marks for mark in marks.tolist()]
    return row


def line_writer(inputs: PredictInputs) -> tuple[bytes, Callable[[dict[str, Any]], bytes]]:
    """Return the first line of the file, and what turns a row into a line of it."""
    config = inputs.config
    if config.output.endswith(".jsonl"):
        return b"", lambda row: (json.dumps(row, ensure_ascii=False) + "\n").encode()

    def line(values: list[Any]) -> bytes:
        out = io.StringIO()
        # A line end inside a text must be quoted, whichever it is.
        csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC).writerow(values)
        return out.getvalue().encode()

    first = [config.text_column, *([config.pair_column] if config.pair_column else []),
             "prediction", *(f"probability_{label}" for label in inputs.labels)]

    def write(row: dict[str, Any]) -> bytes:
        plain = [value for key, value in row.items()
                 if key not in ("probabilities", "tokens", "importance")]
        return line([*plain, *row["probabilities"].values()])

    return line(first), write


# --------------------------------------------------------------------------- explanations


def explain(
    inputs: PredictInputs, model: Any, texts: list[InputText], labels: list[int],
    device: torch.device,
) -> list[Explained]:
    """Find the tokens of texts that are important for a label, by annotate.py's own steps.

    Args:
        model: a classifier that nobody else uses: its last layer is changed.
        labels: the class of each text.
    """
    config, tokenizer, measure = inputs.config, inputs.tokenizer, IMPORTANCE[BUFFER]
    pair = bool(config.pair_column)
    groups = [[Example(one.text.strip()[:BLOCK_CHARACTERS], label,
                       (one.aspect or "").strip() or None if pair else None)]
              for one, label in zip(texts, labels, strict=True)]
    documents = encode_texts(tokenizer, [group[0].text for group in groups],
                             None if pair else config.language)
    template = special_template(tokenizer, pair=pair)
    queries = plan_queries(groups, documents, list(range(len(inputs.labels))), tokenizer,
                           inputs.max_seq_length - template.num_special)
    first_slot_only(model)
    runner = Runner(model, template, tokenizer, device, BATCH_TOKENS[device.type],
                    half=HALF[choose_dtype("auto")])
    found = measure.decide(measure.measure(runner, queries, **measure.options), **measure.options)
    assert measure.filtered is not None  # of the buffer
    found = [None if marks is None else measure.filtered(marks) for marks in found]
    importance = unite(documents, queries, found)
    drop(importance, find_punctuation([ids for part in documents for ids in part], tokenizer))
    return [Explained(*both) for both in zip(documents, importance, strict=True)]


def remark(marks: np.ndarray) -> str:
    """Say why tokens of a sequence are not annotated; nothing where all are."""
    unknown = marks == NOT_ANNOTATED
    return ALONE if unknown.all() else BEYOND if unknown.any() else ""


class Shown(NamedTuple):
    """An explained text as people see it: a heading, and its sequences with a remark each."""

    heading: str
    sequences: list[tuple[list[Any], str]]


def show(inputs: PredictInputs, number: int, row: dict[str, Any], one: Explained) -> Shown:
    """Return the heading and the pieces of an explained text."""
    sequences = [
        (read_sequence(ids, inputs.tokenizer.backend_tokenizer, marks == IMPORTANT,
                       np.zeros(len(ids), bool), None), remark(marks))
        for ids, marks in zip(one.sequences, one.marks, strict=True)
    ]
    label = row["prediction"]
    heading = f"text {number}: no token in it"
    if label is not None:
        heading = f"text {number}: {visible(label)} ({row['probabilities'][label]:.3f})"
    if inputs.config.pair_column:
        heading += f", about {visible(row[inputs.config.pair_column])}"
    return Shown(heading, sequences)


# --------------------------------------------------------------------------- the command


def predict_all(
    inputs: PredictInputs, model: Any, count: int, device: torch.device
) -> tuple[list[Shown], int]:
    """Write the predictions of all texts; return what is explained, and how many were cut."""
    config, shown, num_cut, done = inputs.config, list[Shown](), 0, 0
    first, line = line_writer(inputs)
    with (atomic_stream(config.output) as write,
          Progress(count, "text", label="predict") as progress):
        write(first)
        for texts in in_chunks(read_texts(config)):
            probabilities, cut = classify(inputs, model, texts, device)
            num_cut += cut
            explained: list[Explained] = []
            wanted = min(max((config.explain or 0) - done, 0), len(texts))
            if wanted:
                labels = [int(p.argmax()) for p in probabilities[:wanted]]
                explained = explain(inputs, copy.deepcopy(model), texts[:wanted], labels, device)
            lines = []
            for i, (one, values) in enumerate(zip(texts, probabilities, strict=True)):
                reasons = explained[i] if i < wanted else None
                row = make_row(inputs, one, values, reasons)
                lines.append(line(row))
                if reasons is not None:
                    shown.append(show(inputs, done + i + 1, row, reasons))
            write(b"".join(lines))
            done += len(texts)
            progress.update(len(texts))
    return shown, num_cut


def show_all(inputs: PredictInputs, shown: list[Shown], count: int) -> None:
    """Write what is explained as a page, or to the terminal."""
    config = inputs.config
    notes = ["In brackets: the tokens that are important for the predicted label, each a token "
             "that brings the classifier's confidence in it to within 0.01 of that in the sentence "
             "(annotate.py --measure buffer)."]
    if len(shown) < count:
        notes.append(f"The first {len(shown):,} of {count:,} texts; --explain {count} shows all.")
    if config.html:
        notes[0] = notes[0].replace("In brackets", "Boxed")
        notes.append(f"Classifier: {visible(config.model_name_or_path)}; labels "
                     f"{', '.join(map(visible, inputs.labels))}; the number behind a prediction is "
                     "its probability.")
        title = f"Predictions for {Path(config.input).name}"
        page = format_texts(title, notes, [(one.heading, one.sequences) for one in shown])
        atomic_write_bytes(config.html, page.encode(errors="replace"))
        say(f"wrote {config.html}")
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows ASCII alone
    colour = wants_colour()
    for note in notes:
        say(note)
    for one in shown:
        print_line(one.heading)
        for pieces, why in one.sequences:
            print_line(f"  {mark_sequence(pieces, colour)}{f'  ({why})' if why else ''}")


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    config = parse(PredictConfig, argv)
    for flag, path in (("output", config.output), ("html", config.html)):
        if path and os.path.isdir(path):
            raise ConfigError(f"--{flag} {path}: is a folder; give a file")
    inputs = read_inputs(config)
    count, empty = count_texts(config)
    say(f"{config.input}: {count:,} texts, {empty:,} of them empty (their rows get no label)")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    say(f"labels {', '.join(map(visible, inputs.labels))}; inputs of at most "
        f"{inputs.max_seq_length} tokens, on {device.type}")
    if config.dry_run:
        return
    model = load_classifier(config.model_name_or_path, inputs.labels, 0, config.trust_remote_code,
                            trained=True).to(device).eval()
    shown, num_cut = predict_all(inputs, model, count, device)
    say(f"wrote {config.output}" + (
        f"; {num_cut:,} texts fill --max_seq_length {inputs.max_seq_length} or were cut to it"
        if num_cut else ""))
    if config.explain:
        show_all(inputs, shown, count)


if __name__ == "__main__":
    run_command(main)
