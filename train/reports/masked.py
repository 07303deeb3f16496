"""What the arms of a pipeline masked, how good their scorer was, and which classes they get right.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.errors import DataError, visible
from preprocess.files import read_json
from preprocess.store import TokenStore
from preprocess.text.continuations import open_tokenizer
from preprocess.view.statistics import IndexCounts, count_masks, rank_types, type_names
from preprocess.view.tables import percent
from train.reports.compare import shown
from train.reports.costs import domain_prefix
from train.reports.results import Arm, number

NUM_WORDS = 12
COUNTED_TOKENS = 2_000_000  # of a large store: enough for the most frequent words
MASKED_COLUMNS = ("arm", "labels", "index", "masked", "most often", "most above their share")
SCORER_COLUMNS = ("scorer", "sentences", "important", "F1", "average_precision")
CLASS_COLUMNS = ("arm", "labels", "steps", "class", "examples", "precision", "recall", "F1")
MAX_CLASSES = 8  # of a confusion matrix in a table
PREFIX = "masks-"
# What a pipeline appends to an arm for its index; `masks-top-words` is of another arm than `top`.
_ENDING = r"(-labels\w+)?(-seed\d+)?(-step_\d+)?"


def index_of(arm: Arm) -> str | None:
    """Return the mask index of an arm, the first one where its seeds have their own; or None."""
    plain = arm.line.rpartition("/")[2]
    steps = [step.rpartition("/")[2] for step in arm.masking_steps or {}]
    names = [step.removeprefix(PREFIX) for step in steps if step.startswith(PREFIX)]
    own = [name for name in names if re.fullmatch(re.escape(plain) + _ENDING, name)]
    return own[0] if own else None


@dataclass(frozen=True)
class MaskedWords:
    """The mask indices of the arms of a pipeline, counted.

    types: the token of each id, `(V,)`. occurrences: of each id in the text, `(V,)` int64.
    indices: of each arm and number of labels one index: the arm, its name, and its counts.
    """

    types: Sequence[str]
    occurrences: np.ndarray
    indices: list[tuple[Arm, str, IndexCounts]]


def count_masked(pipeline: Path, arms: Sequence[Arm]) -> tuple[MaskedWords | None, list[str]]:
    """Count the mask indices of the arms.

    Returns:
        `(counts, notes)`; None where there is no store, or not its indices.
    """
    named: dict[tuple, tuple[Arm, str]] = {}
    for arm in arms:
        name = index_of(arm)
        if name:
            named.setdefault((arm.shown, arm.labels, name), (arm, name))
    prefix = domain_prefix(pipeline)
    if not named or not prefix.with_name("text.json").is_file():
        return None, []
    names = list(dict.fromkeys(name for _, name in named.values()))
    try:
        store = TokenStore.open(prefix)
        types = type_names(open_tokenizer(store.tokenizer_dir), store.vocab_size)
        counts = count_masks(store, names, max_tokens=COUNTED_TOKENS)
    except (DataError, OSError) as error:
        return None, [f"What was masked is not shown: {error}."]
    return MaskedWords(types, counts.type_tokens, [
        (arm, name, counts.indices[names.index(name)]) for arm, name in named.values()]), []


def masked_rows(found: MaskedWords) -> list[dict[str, Any]]:
    """Tell of each index what it masks, with the keys of `MASKED_COLUMNS`."""
    rows = []
    for arm, name, counts in found.indices:
        often, above, *_ = rank_types(counts, found.occurrences, NUM_WORDS)
        rows.append({
            "arm": arm.shown, "labels": shown(arm.labels), "index": name,
            "masked": percent(counts.masked, int(found.occurrences.sum())),
            "most often": " ".join(found.types[i] for i in often.tolist()),
            "most above their share": " ".join(found.types[i] for i in above.tolist()),
        })
    return rows


def scorer_rows(pipeline: Path) -> list[dict[str, Any]]:
    """Return how well each token scorer found important tokens, beside its baselines."""
    rows, baselines = [], dict[str, None]()
    for path in sorted(pipeline.rglob("results.json")):
        try:
            told = read_json(path, keys=["baselines", "f1"])
            others = {visible(name): number(row["f1"]) for name, row in told["baselines"].items()}
        except (DataError, OSError, KeyError, TypeError, AttributeError):
            continue
        tokens, important = (number(told.get(f"num_dev_{key}")) for key in ("tokens", "important"))
        baselines |= dict.fromkeys(others)
        rows.append({
            "scorer": visible(path.parent.relative_to(pipeline)),
            "sentences": shown(told.get("num_train_sentences")),
            "important": percent(important, tokens) if tokens and important is not None else "",
            "F1": _share(number(told["f1"])),
            "average_precision": _share(number(told.get("average_precision"))),
            "others": others,
        })
    return [{**{key: row[key] for key in SCORER_COLUMNS},
             **{f"F1 of {name}": _share(row["others"].get(name)) for name in baselines}}
            for row in rows]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def class_rows(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Return precision, recall and F1 of each class, and what its items were taken for.

    All seeds of an arm are counted together; `examples` are those of the test split.
    """
    rows = []
    for arm in arms:
        names = arm.runs[0].rows[0].get("labels")
        known = [run for run in arm.runs if run.truth is not None and run.predictions is not None]
        if not isinstance(names, list) or not known or not 1 < len(names) <= MAX_CLASSES:
            continue
        size = len(names)
        matrix = np.zeros((size, size), dtype=np.int64)  # class, answer
        for run in known:
            assert run.truth is not None and run.predictions is not None
            pairs = run.truth[None, :] * size + run.predictions
            matrix += np.bincount(pairs.ravel(), minlength=size * size).reshape(size, size)
        models = sum(len(run.seeds) for run in known)
        for i, name in enumerate(names):
            hits, there, said = matrix[i, i], matrix[i].sum(), matrix[:, i].sum()
            rows.append({
                "arm": arm.shown, "labels": shown(arm.labels), "steps": shown(arm.stage2_steps),
                "class": visible(name), "examples": f"{there / models:.0f}",
                "precision": f"{hits / said:.4f}" if said else "",
                "recall": f"{hits / there:.4f}" if there else "",
                "F1": f"{2 * hits / (there + said):.4f}" if there + said else "",
                **{f"taken for {visible(other)}": percent(int(matrix[i, j]), int(there))
                   for j, other in enumerate(names)},
            })
    same = rows and all(row.keys() == rows[0].keys() for row in rows)
    return rows if same else []  # one table cannot show tasks of different classes
