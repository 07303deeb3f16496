"""Labelled tasks: their files, labels and splits, and the registry `TASKS`."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from preprocess.corpus.budgets import choose_budget, choose_validation, content_fraction
from preprocess.corpus.packages import resolve_path
from preprocess.corpus.sources import Row, Span, place_of, read_lines, read_numbered
from preprocess.errors import ConfigError, DataError, visible
from preprocess.progress import say

MANY_LABELS = 50  # more classes than this are probably numbers, or texts
LABEL_SEED = 42

TEST_FRACTIONS = {"mr": 0.1}
"""Tasks without an official split -> share of their texts that are for testing."""


@dataclass(frozen=True)
class Example:
    """One labelled text; `item` is a hash of its content: same text and aspect, same item."""

    text: str
    label: int
    aspect: str | None = None
    item: str = ""


@dataclass(frozen=True)
class Task:
    """A task: its label names, and the examples of `train`, `validation` and `test`.

    `left_out` counts the rows that are no example, by the file that they are in, then by what they
    lack: `{"test": {"text": 2, "label": 1}}`.
    """

    name: str
    labels: tuple[str, ...]
    splits: dict[str, list[Example]]
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskFiles:
    """The user's options for the files of a task; every reader in `TASKS` takes one."""

    name: str
    data_dir: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    pair_column: str | None = None
    where: dict[str, str] | None = None
    test_fraction: float | None = None


def _example(text: str, label: int, aspect: str | None = None) -> Example:
    content = json.dumps([text, aspect]).encode()
    return Example(text, label, aspect, hashlib.sha256(content).hexdigest()[:16])


LeftOut = dict[str, dict[str, int]]


def _read_labelled(
    spec: str, split: str, left_out: LeftOut, text_column: str, label_column: str,
    pair_column: str | None = None, where: dict[str, str] | None = None,
) -> Iterator[tuple[str, str, str, str | None]]:
    """Yield place, text, label and aspect of the labelled rows of a file; count the others."""
    texts = [text_column] + ([pair_column] if pair_column else [])
    columns = [*texts, label_column]
    for number, row in read_numbered(spec, columns, split, where, texts=texts):
        place = place_of(spec, number)
        if all(isinstance(row[c], str) and row[c].strip() == c for c in columns):
            raise DataError(
                f"{place}: every column holds its own name, as a first line in the middle of "
                f"joined files does; remove this row"
            )
        text, aspect = ((row[c] or "").strip() if c else None for c in (text_column, pair_column))
        label = read_label(row, label_column, place)
        lacks = "text" if not text else "label" if label is None else ""
        if lacks:
            counts = left_out.setdefault(split, {"text": 0, "label": 0})
            counts[lacks] += 1
        else:
            assert text and label is not None
            yield place, text, label, aspect


def read_label(row: Row, column: str, place: str) -> str | None:
    """Return the name of the label of a row; None where there is none.

    A label is a string, a whole number (4 and 4.0 are the same one) or a boolean.

    Raises:
        DataError: anything else, with the place and the value.
    """
    value = row[column]
    if value is None or isinstance(value, str):
        return (value or "").strip() or None
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, (int, float, Decimal)) and math.isfinite(value) and value == int(value):
        return str(int(value))
    why = ""
    if isinstance(value, list | tuple | dict):
        why = "several labels for one text, multi-label, are not supported; "
    elif isinstance(value, float | Decimal) and math.isfinite(value):
        why = "learning numbers, regression, is not supported; "
    raise DataError(
        f"{place}: column {column!r} holds {str(value)[:60]!r} "
        f"({type(value).__name__}), and a label is a string, a whole number, true or false; "
        f"{why}--label_column chooses another column"
    )


def _cut_validation(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Split off a fixed tenth for validation by a hash of the text; no text is on both sides."""
    train = [e for e in examples if content_fraction(e.text) >= 0.1]
    return train, [e for e in examples if content_fraction(e.text) < 0.1]


def _data_dir(files: TaskFiles) -> str:
    if not files.data_dir:
        raise ConfigError(f"--task {files.name} needs --data_dir, the folder that holds its files")
    return files.data_dir


def _choose_file(folder: Path, names: Iterable[str], task: str) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder}: --task {task} looks for {' or '.join(names)} here")


_POLARITY = ("negative", "positive")


def _task_mr(files: TaskFiles) -> Task:
    """Read MR, which has no official split: it is cut by content.

    The test part is `test_fraction` of the texts, validation another tenth, and the rest train.
    """
    path = resolve_path(_data_dir(files))
    left_out: LeftOut = {}
    examples = []
    if path.is_dir() and (path / "rt-polarity.pos").is_file():
        for label, suffix in enumerate(("neg", "pos")):
            # The release is Latin-1.
            source = _choose_file(path, [f"rt-polarity.{suffix}"], "mr")
            for _, line in read_lines(source, Span(), "latin-1"):
                if line.strip():
                    examples.append(_example(line.strip(), label))
    else:
        found = sorted(path.glob("*.csv")) if path.is_dir() else [path]
        if len(found) != 1:
            raise DataError(
                f"{path}: --task mr looks for rt-polarity.pos and rt-polarity.neg here, "
                f"or for one .csv with the columns text, label and source"
            )
        where = files.where or {"source": "rotten_tomatoes"}
        values = {"0": 0, "1": 1, "neg": 0, "pos": 1, "negative": 0, "positive": 1}
        for place, text, name, _ in _read_labelled(
            str(found[0]), "all", left_out, "text", "label", where=where
        ):
            number = values.get(name.lower())
            if number is None:
                raise DataError(f"{place}: label {name!r}; allowed are {list(values)}")
            examples.append(_example(text, number))
    splits: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    end = 1 - (files.test_fraction or TEST_FRACTIONS["mr"])
    for example in examples:
        fraction = content_fraction(example.text)
        part = "train" if fraction < end - 0.1 else "validation" if fraction < end else "test"
        splits[part].append(example)
    return Task("mr", _POLARITY, splits, left_out)


def _task_sst2(files: TaskFiles) -> Task:
    """Read GLUE's SST-2; without its test labels, which are not public, dev is the test set."""
    data_dir = _data_dir(files)
    splits: dict[str, list[Example]] = {}
    left_out: LeftOut = {}
    for split, stem in (("train", "train"), ("validation", "dev"), ("test", "test")):
        splits[split] = []
        on_hub = data_dir.startswith("hub:")
        spec = data_dir if on_hub else str(resolve_path(data_dir) / f"{stem}.tsv")
        if split == "test" and not on_hub and not Path(spec).is_file():
            continue
        for place, text, label, _ in _read_sst2(spec, split, left_out):
            if split == "test" and label == "-1":
                break
            if label not in ("0", "1"):
                raise DataError(f"{place}: label {label!r}; allowed are 0 and 1")
            splits[split].append(_example(text, int(label)))
    if not splits["test"]:
        splits["test"] = splits["validation"]
        splits["train"], splits["validation"] = _cut_validation(splits["train"])
    return Task("sst2", _POLARITY, splits, left_out)


def _read_sst2(
    spec: str, split: str, left_out: LeftOut
) -> Iterator[tuple[str, str, str, str | None]]:
    """Yield the labelled rows; nothing of a test file without labels."""
    try:
        yield from _read_labelled(spec, split, left_out, "sentence", "label")
    except DataError as error:
        if split != "test" or "no column 'label'" not in str(error):
            raise


_SEMEVAL_LABELS = ("positive", "negative", "neutral")
_SEMEVAL_FILES = {
    "restaurant": (
        ("Restaurants_Train_v2.xml", "Restaurants_Train.xml", "train.xml"),
        ("Restaurants_Test_Gold.xml", "test.xml"),
    ),
    "laptop": (
        ("Laptop_Train_v2.xml", "Laptops_Train.xml", "Laptop_Train.xml", "train.xml"),
        ("Laptops_Test_Gold.xml", "test.xml"),
    ),
}


def _read_semeval(path: Path, element: str, attribute: str) -> list[Example]:
    import xml.etree.ElementTree as ElementTree

    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise DataError(f"{path}: not valid XML ({error})") from None
    examples = []
    for sentence in root.iter("sentence"):
        text = (sentence.findtext("text") or "").strip()
        for aspect in sentence.iter(element):
            polarity, name = aspect.get("polarity"), aspect.get(attribute)
            if polarity == "conflict":  # both at once: dropped, as is common
                continue
            if polarity not in _SEMEVAL_LABELS or not name or not text:
                raise DataError(
                    f"{path}: sentence {sentence.get('id')}: polarity {polarity!r} of {name!r}; "
                    f"allowed are {', '.join(_SEMEVAL_LABELS)} and conflict"
                )
            examples.append(_example(text, _SEMEVAL_LABELS.index(polarity), name))
    if not examples:
        raise DataError(f"{path}: no <{element} {attribute}= polarity=> in it")
    return examples


def _task_semeval(files: TaskFiles) -> Task:
    """Read SemEval; validation is a fixed tenth of the training sentences, aspects together."""
    domain = "laptop" if files.name == "semeval14_laptop" else "restaurant"
    by_category = files.name == "semeval14_restaurant"
    wanted = ("aspectCategory", "category") if by_category else ("aspectTerm", "term")
    folder = resolve_path(_data_dir(files))
    train, test = (_read_semeval(_choose_file(folder, names, files.name), *wanted)
                   for names in _SEMEVAL_FILES[domain])
    train, validation = _cut_validation(train)
    splits = {"train": train, "validation": validation, "test": test}
    return Task(files.name, _SEMEVAL_LABELS, splits)


def _check_columns(files: TaskFiles) -> None:
    """Refuse a column that has two parts: a label that is read as text, too, is learnt by heart."""
    part_of: dict[str, str] = {}
    for flag in ("text_column", "label_column", "pair_column"):
        column = getattr(files, flag)
        if column in part_of:
            raise ConfigError(f"--{flag} {column} is the --{part_of[column]} too; give each a "
                              "column of its own")
        if column:
            part_of[column] = flag


def _task_custom(files: TaskFiles) -> Task:
    """Read the user's own files; labels are the values seen in train, sorted."""
    for flag in ("train_file", "test_file"):
        if not getattr(files, flag):
            raise ConfigError(
                f"--task custom needs --{flag} (.csv, .tsv, .jsonl or .parquet with the columns "
                f"--text_column {files.text_column} --label_column {files.label_column})"
            )
    _check_columns(files)
    names = {split: getattr(files, f"{split}_file") for split in ("train", "validation", "test")}
    columns = files.text_column, files.label_column, files.pair_column, files.where
    left_out: LeftOut = {}
    raw = {split: list(_read_labelled(name, split, left_out, *columns))
           for split, name in names.items() if name}
    if files.pair_column:
        _check_aspects(files, {split: [aspect for *_, aspect in rows]
                               for split, rows in raw.items()})
    values = sorted({label for _, _, label, _ in raw["train"]}, key=_label_order)
    if len(values) < 2:
        raise DataError(
            f"{files.train_file}: --label_column {files.label_column} holds {values}; "
            f"at least two labels are needed"
        )
    _check_numbers(values, files)
    splits: dict[str, list[Example]] = {}
    for split in names:
        splits[split] = []
        for place, text, label, aspect in raw.get(split, ()):
            if label not in values:
                raise DataError(
                    f"{place}: label {label!r} is not in {files.train_file}: "
                    f"{', '.join(values)[:200]}"
                )
            splits[split].append(_example(text, values.index(label), aspect))
    if not files.validation_file:
        given = splits["train"]
        held = set(choose_validation([e.text for e in given], [e.label for e in given]))
        splits["train"] = [e for i, e in enumerate(given) if i not in held]
        splits["validation"] = [e for i, e in enumerate(given) if i in held]
        say(f"no --validation_file: {len(held):,} of the {len(given):,} examples of "
            f"{files.train_file} are for validation, a tenth of each class")
    return Task("custom", tuple(values), splits, left_out)


def _check_aspects(files: TaskFiles, aspects: dict[str, list[str | None]]) -> None:
    """Refuse a file whose rows are all single texts, in a task of pairs.

    Args:
        aspects: of the examples of each split that has a file.
    """
    filled = {split: sum(map(bool, of_split)) for split, of_split in aspects.items()}
    for split, of_split in aspects.items():
        if of_split and not filled[split]:
            others = ", ".join(f"{filled[other]:,} of {len(aspects[other]):,} of {other}"
                               for other in aspects if other != split)
            raise DataError(
                f"{getattr(files, f'{split}_file')}: --pair_column {files.pair_column} is empty in "
                f"all {len(of_split):,} examples of {split} (and filled in {others}); fill it in, "
                f"or leave --pair_column out for a task of single texts"
            )


def _check_numbers(values: list[str], files: TaskFiles) -> None:
    """Refuse labels that are the same number, as 1 and 1.0, and those that are no classes."""
    column = f"{files.train_file}: --label_column {files.label_column} holds"
    some = [value for value in values if re.fullmatch(r"\[.*\]|\{.*\}", value)]
    if some:
        raise DataError(f"{column} {some[0][:60]!r}; several labels for one text, multi-label, are "
                        f"not supported: give a column with one label")
    numbers = [value for value in values if re.fullmatch(r"[-+]?\d*\.?\d+([eE][-+]?\d+)?", value)]
    some = [value for value in numbers if not float(value).is_integer()]
    if some and len(numbers) == len(values):
        raise DataError(f"{column} numbers with fractions, as {some[0]!r}; learning numbers, "
                        f"regression, is not supported: give a column with classes")
    seen: dict[float, str] = {}
    for value in values:
        if re.fullmatch(r"[-+]?\d+(\.\d*)?", value):
            other = seen.setdefault(float(value), value)
            if other != value:
                raise DataError(
                    f"{files.train_file}: --label_column {files.label_column} holds {other!r} and "
                    f"{value!r}, the same number; write it in one way"
                )


def _label_order(value: str) -> tuple[int, float, str]:
    """Return a sort key that orders numbers as numbers: 10 comes after 9."""
    return (0, float(value), value) if re.fullmatch(r"-?\d+", value) else (1, 0.0, value)


TASKS: dict[str, Callable[[TaskFiles], Task]] = {
    "mr": _task_mr,
    "sst2": _task_sst2,
    "semeval14_restaurant": _task_semeval,
    "semeval14_restaurant_term": _task_semeval,
    "semeval14_laptop": _task_semeval,
    "custom": _task_custom,
}


def load_task(
    name: str, *, task_name: str | None = None, label_budget: int | None = None,
    label_seed: int | None = None, **files: Any
) -> Task:
    """Read a labelled task.

    Args:
        name: a key of `TASKS`.
        task_name: what to call it; None is `default_name`.
        label_budget, label_seed: as of `limit_labels`.
        files: the fields of `TaskFiles`: data_dir, or for `custom` train_file, test_file, ...
    Raises:
        ConfigError: an unknown task, a missing option, or one that the task has no use for.
        DataError: names the file that is absent, broken or empty.
    """
    if name not in TASKS:
        raise ConfigError(f"--task {name!r}: known are {', '.join(TASKS)}")
    _check_fraction(name, files.get("test_fraction"))
    task = TASKS[name](TaskFiles(name, **files))
    task = replace(task, name=task_name or default_name(name, files.get("train_file")))
    place = files.get("data_dir") or files.get("train_file")
    for split, examples in task.splits.items():
        if not examples:
            raise DataError(f"{place}: --task {name} has no {split} example; give more text")
    for line in describe_doubts(task):
        say(line)
    return limit_labels(task, label_budget, label_seed)


def default_name(name: str, train_file: str | None) -> str:
    """Return what a task is called where nobody says: a custom one after its training file.

    A file that is called train, as most are, takes the name of its folder:
    data/trec/train.csv.gz is "trec", and data/trec.csv too.
    """
    if name != "custom" or not train_file:
        return name
    path = train_file.partition("#")[0].removeprefix("hub:")
    *above, file = [part for part in re.split(r"[/:\\]", path) if part not in ("", ".", "..")]
    stem = re.sub(r"(\.(csv|tsv|jsonl|json|parquet|txt))?(\.(gz|zst))?$", "", file)
    if re.fullmatch(r"train(ing)?([-_.]?(set|data|split))?", stem, re.IGNORECASE) and above:
        stem = above[-1]
    return visible(stem) or name


def _check_fraction(name: str, fraction: float | None) -> None:
    if fraction is not None and name not in TEST_FRACTIONS:
        raise ConfigError(
            f"--test_fraction {fraction} is for --task {' or '.join(TEST_FRACTIONS)}, and --task "
            f"{name} has a test part of its own; leave it out"
        )
    if fraction is not None and not 0 < fraction <= 0.8:
        raise ConfigError(f"--test_fraction {fraction}: must be above 0 and at most 0.8, since a "
                          "tenth is for validation; give another value")


def limit_labels(task: Task, budget: int | None, seed: int | None = None) -> Task:
    """Return the task with `budget` training examples, as `choose_budget` takes them.

    Args:
        budget: None leaves all of them.
        seed: None is `LABEL_SEED`.
    Raises:
        ConfigError: there are fewer examples, or more classes.
    """
    if budget is None:
        return task
    train = task.splits["train"]
    classes = len({example.label for example in train})
    for wrong, reason in (
        (budget > len(train), f"there are {len(train):,} training examples"),
        (budget < classes, f"there are {classes:,} classes, and each needs an example"),
    ):
        if wrong:
            raise ConfigError(f"--label_budget {budget}: task {task.name}: {reason}; give "
                              f"{classes:,} to {len(train):,}, or leave it out for all of them")
    chosen = choose_budget([example.item for example in train],
                           [example.label for example in train], budget,
                           LABEL_SEED if seed is None else seed)
    return replace(task, splits={**task.splits, "train": [train[i] for i in chosen]})


def describe_doubts(task: Task) -> list[str]:
    """Return a line for whatever in a task is probably not meant, and for rows left out."""
    lines = []
    for split, counts in task.left_out.items():
        number = sum(counts.values())
        lines.append(
            f"task {task.name}: {number:,} row{'s' * (number > 1)} of {split} left out "
            f"({counts['text']:,} without a text, {counts['label']:,} without a label)"
        )
    if len(task.labels) > MANY_LABELS:
        lines.append(
            f"warning: task {task.name}: {len(task.labels):,} classes; numbers or texts as labels? "
            f"--label_column chooses the column"
        )
    found = Counter(example.label for example in task.splits["train"])
    rare = [name for i, name in enumerate(task.labels) if found[i] < 2]
    if rare:
        shown = ", ".join(rare[:5]) + (", ..." if len(rare) > 5 else "")
        lines.append(
            f"warning: task {task.name}: {len(rare):,} of {len(task.labels):,} classes have fewer "
            f"than 2 training examples: {shown}"
        )
    held = {example.label for example in task.splits["validation"]}
    missing = [name for i, name in enumerate(task.labels) if found[i] and i not in held]
    if missing:
        lines.append(
            f"warning: task {task.name}: {len(missing):,} of {len(task.labels):,} classes have no "
            f"validation example: {', '.join(missing[:5])}" + ", ..." * (len(missing) > 5)
        )
    test = task.splits["test"]
    seen = {e.item for split in ("train", "validation") for e in task.splits[split]
            if task.splits[split] is not test}
    both = sum(example.item in seen for example in test)
    if both:
        lines.append(
            f"warning: task {task.name}: {both:,} of {len(test):,} test examples are training or "
            f"validation examples too, so a test score says little about new texts"
        )
    return lines


def limit_splits(
    splits: dict[str, list[Example]], max_train_samples: int | None, max_eval_samples: int | None
) -> dict[str, list[Example]]:
    """Cut the training split to one size, and all others to another one, by `take_fixed`."""
    return {name: take_fixed(examples, max_train_samples if name == "train" else max_eval_samples)
            for name, examples in splits.items()}


def take_fixed(examples: list[Example], limit: int | None) -> list[Example]:
    """Return `limit` examples chosen by the hash in their id: the same in every run, in order."""
    if limit is None or limit >= len(examples):
        return examples
    chosen = sorted(range(len(examples)), key=lambda i: (examples[i].item, i))[:limit]
    return [examples[i] for i in sorted(chosen)]
