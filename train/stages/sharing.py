"""What a fine-tuned model's card tells of its task and its scores, and pushing it to the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preprocess.corpus import Example
from preprocess.progress import say
from train.config import FinetuneConfig
from train.run_dir import hub
from train.run_dir.hf_folder import write_card
from train.run_dir.model_card import ACCURACY, Score, public_name

# The entries of a row of results.jsonl that a card shows.
METRICS = {"test_accuracy": ACCURACY, "test_macro_f1": "macro F1"}


def describe_task(
    name: str, splits: Mapping[str, Sequence[Example]], model_name: str, licence: str
) -> dict[str, Any]:
    """Return `about` of a fine-tuning stage: names and numbers for its card."""
    return {
        "base_model": public_name(model_name), "data": name, "license": licence or None,
        "counts": {f"{split} examples": len(examples) for split, examples in splits.items()},
        "pair": any(example.aspect for examples in splits.values() for example in examples),
    }


def read_scores(rows: Sequence[Mapping[str, Any]]) -> list[Score]:
    """Return the test scores of finished seeds; a metric that a row lacks is left out."""
    found = []
    for key, metric in METRICS.items():
        values = [row.get(key) for row in rows]
        numbers = tuple(float(value) for value in values if isinstance(value, int | float))
        if numbers and len(numbers) == len(values):
            found.append(Score(metric, numbers, int(rows[0].get("num_test") or 0)))
    return found


def write_cards(config: FinetuneConfig, rows: Mapping[int, Mapping[str, Any]]) -> None:
    """Write the scores of all seeds of a run into the card of each model."""
    scores = read_scores(list(rows.values()))
    for seed in rows:
        folder = Path(config.output_dir) / f"seed_{seed}" / "hf"
        if folder.is_dir():
            write_card(folder, scores, licence=config.license)


def push_best(config: FinetuneConfig, rows: Mapping[int, Mapping[str, Any]]) -> None:
    """Push the model of the seed that is best on the validation split, the first of equals.

    By macro F1 where that chose the epochs, else by accuracy. The test split chooses nothing, nor
    does validation where the last epoch is kept, as under a label budget: then it is the first.
    """
    seeds = config.seed_list()
    best, why = seeds[0], "the first one"
    if config.settled_epoch() == "best":
        key, metric = (("validation_macro_f1", "macro F1") if config.metric == "macro_f1"
                       else ("validation_accuracy", "accuracy"))
        best = max(seeds, key=lambda seed: rows[seed][key])
        why = f"its validation {metric} is the best"
    if len(seeds) > 1:
        say(f"of {len(seeds)} seeds, {best} is pushed: {why}")
    folder, scores = Path(config.output_dir) / f"seed_{best}" / "hf", read_scores([*rows.values()])
    hub.push(folder, config.push_to_hub, config.hub_private,
             lambda repo: write_card(folder, scores, repo, config.license))
