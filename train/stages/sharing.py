"""What a fine-tuned model's card tells of its task and its scores, and pushing it to the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preprocess.corpus import Example
from preprocess.progress import say
from train.config import FinetuneConfig
from train.engine import is_main
from train.run_dir import hub
from train.run_dir.hf_folder import write_card
from train.run_dir.model_card import Score, public_name

# The entries of a row of results.jsonl that a card shows.
METRICS = {"test_accuracy": "accuracy", "test_macro_f1": "macro F1"}


def describe_task(
    name: str, splits: Mapping[str, Sequence[Example]], model_name: str
) -> dict[str, Any]:
    """Return `about` of a fine-tuning stage: names and numbers for its card."""
    return {
        "base_model": public_name(model_name), "data": name,
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


def share(config: FinetuneConfig, rows: Mapping[int, Mapping[str, Any]]) -> None:
    """Write the scores of all seeds into each model's card; push one model, if it is asked for.

    Of several seeds the one with the best validation accuracy is pushed (the first of equals): the
    test split chooses nothing.
    """
    if not is_main():
        return
    scores = read_scores(list(rows.values()))
    for seed in rows:
        folder = Path(config.output_dir) / f"seed_{seed}" / "hf"
        if folder.is_dir():
            write_card(folder, scores, config.push_to_hub)
    if config.push_to_hub:
        best = max(config.seed_list(), key=lambda seed: rows[seed]["validation_accuracy"])
        if len(config.seed_list()) > 1:
            say(f"of {len(config.seed_list())} seeds, {best} is pushed: its validation accuracy is "
                "the best")
        hub.push(Path(config.output_dir) / f"seed_{best}" / "hf", config.push_to_hub,
                 config.hub_private)
