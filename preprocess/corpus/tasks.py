"""Labelled tasks: their files, labels and splits, and the registry `TASKS`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preprocess.corpus.packages import resolve_path
from preprocess.corpus.sources import Span, as_text, read_lines, read_rows
from preprocess.errors import ConfigError, DataError


@dataclass(frozen=True)
class Example:
    """One labelled text; `item` is a hash of its content: same text and aspect, same item."""

    text: str
    label: int
    aspect: str | None = None
    item: str = ""


@dataclass(frozen=True)
class Task:
    """A task: its label names, and the examples of `train`, `validation` and `test`."""

    name: str
    labels: tuple[str, ...]
    splits: dict[str, list[Example]]


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


def _content_fraction(text: str) -> float:
    """Return a number in [0, 1) that depends only on the text; equal texts stay together."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2.0**48


def _example(text: str, label: int, aspect: str | None = None) -> Example:
    content = json.dumps([text, aspect]).encode()
    return Example(text, label, aspect, hashlib.sha256(content).hexdigest()[:16])


def _cut_validation(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Split off a fixed tenth for validation by a hash of the text; no text is on both sides."""
    train = [e for e in examples if _content_fraction(e.text) >= 0.1]
    return train, [e for e in examples if _content_fraction(e.text) < 0.1]


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
    """Read MR, which has no official split: by content, 80 % train, 10 % validation, 10 % test."""
    path = resolve_path(_data_dir(files))
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
        for row in read_rows(str(found[0]), ["text", "label"], where=where):
            number = values.get(as_text(row["label"]).strip().lower())
            if number is None:
                raise DataError(f"{found[0]}: label {row['label']!r}; allowed are {list(values)}")
            if row["text"].strip():
                examples.append(_example(row["text"].strip(), number))
    splits: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    for example in examples:
        fraction = _content_fraction(example.text)
        part = "train" if fraction < 0.8 else "validation" if fraction < 0.9 else "test"
        splits[part].append(example)
    return Task("mr", _POLARITY, splits)


def _task_sst2(files: TaskFiles) -> Task:
    """Read GLUE's SST-2; without its test labels, which are not public, dev is the test set."""
    data_dir = _data_dir(files)
    splits: dict[str, list[Example]] = {}
    for split, stem in (("train", "train"), ("validation", "dev"), ("test", "test")):
        splits[split] = []
        on_hub = data_dir.startswith("hub:")
        spec = data_dir if on_hub else str(resolve_path(data_dir) / f"{stem}.tsv")
        if split == "test" and not on_hub and not Path(spec).is_file():
            continue
        for row in read_rows(spec, ["sentence"], split):
            label = as_text(row.get("label", "-1"))
            if split == "test" and label == "-1":
                break
            if label not in ("0", "1"):
                raise DataError(f"{spec}, split {split}: label {label!r}; allowed are 0 and 1")
            splits[split].append(_example(row["sentence"].strip(), int(label)))
    if not splits["test"]:
        splits["test"] = splits["validation"]
        splits["train"], splits["validation"] = _cut_validation(splits["train"])
    return Task("sst2", _POLARITY, splits)


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


def _task_custom(files: TaskFiles) -> Task:
    """Read the user's own files; labels are the values seen in train, sorted."""
    for flag in ("train_file", "test_file"):
        if not getattr(files, flag):
            raise ConfigError(
                f"--task custom needs --{flag} (.csv, .tsv, .jsonl or .parquet with the columns "
                f"--text_column {files.text_column} --label_column {files.label_column})"
            )
    names = {split: getattr(files, f"{split}_file") for split in ("train", "validation", "test")}
    raw = {split: list(_read_custom(files, name, split)) for split, name in names.items() if name}
    values = sorted({label for _, label, _ in raw["train"]}, key=_label_order)
    if len(values) < 2:
        raise DataError(
            f"{files.train_file}: --label_column {files.label_column} holds {values}; "
            f"at least two labels are needed"
        )
    splits: dict[str, list[Example]] = {}
    for split, name in names.items():
        splits[split] = []
        for text, label, aspect in raw.get(split, ()):
            if label not in values:
                raise DataError(f"{name}: label {label!r} is not in {files.train_file}: {values}")
            splits[split].append(_example(text, values.index(label), aspect))
    if not files.validation_file:
        splits["train"], splits["validation"] = _cut_validation(splits["train"])
    return Task("custom", tuple(values), splits)


def _label_order(value: str) -> tuple[int, float, str]:
    """Return a sort key that orders numbers as numbers: 10 comes after 9."""
    return (0, float(value), value) if re.fullmatch(r"-?\d+", value) else (1, 0.0, value)


def _read_custom(
    files: TaskFiles, name: str, split: str
) -> Iterator[tuple[str, str, str | None]]:
    columns = [files.text_column, files.label_column]
    columns += [files.pair_column] if files.pair_column else []
    for row in read_rows(name, columns, split, files.where):
        text = as_text(row[files.text_column]).strip()
        label = as_text(row[files.label_column]).strip()
        aspect = as_text(row[files.pair_column]).strip() if files.pair_column else None
        if not label:
            raise DataError(f"{name}: an empty {files.label_column!r} beside {text[:40]!r}")
        if text:
            yield text, label, aspect


TASKS: dict[str, Callable[[TaskFiles], Task]] = {
    "mr": _task_mr,
    "sst2": _task_sst2,
    "semeval14_restaurant": _task_semeval,
    "semeval14_restaurant_term": _task_semeval,
    "semeval14_laptop": _task_semeval,
    "custom": _task_custom,
}


def load_task(name: str, **files: Any) -> Task:
    """Read a labelled task.

    Args:
        name: a key of `TASKS`.
        files: the fields of `TaskFiles`: data_dir, or for `custom` train_file, test_file, ...
    Raises:
        ConfigError: an unknown task, or a missing option.
        DataError: names the file that is absent, broken or empty.
    """
    if name not in TASKS:
        raise ConfigError(f"--task {name!r}: known are {', '.join(TASKS)}")
    task = TASKS[name](TaskFiles(name, **files))
    place = files.get("data_dir") or files.get("train_file")
    for split, examples in task.splits.items():
        if not examples:
            raise DataError(f"{place}: --task {name} has no {split} example; give more text")
    return task


def take_fixed(examples: list[Example], limit: int | None) -> list[Example]:
    """Return `limit` examples chosen by the hash in their id: the same in every run, in order."""
    if limit is None or limit >= len(examples):
        return examples
    chosen = sorted(range(len(examples)), key=lambda i: (examples[i].item, i))[:limit]
    return [examples[i] for i in sorted(chosen)]
