"""Scores by counting: what each measure is, and the records of those that need no network.

A score is one number per token of a store, kept as float16 in `P.NAME.scores.npy`: larger is more
important, and 0 is the measure's neutral point (log-odds) or its least value. A strategy
(`preprocess/masking/strategies.py`) turns scores into masked positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Measure(NamedTuple):
    """A score and what the rest of the house must know about it.

    score: yield the scores of a shard block by block, float16.
    needs: its inputs beside the store, of "classifier", "scorer", "mlm", "reference", "store"
        (a second one) and "lexicon".
    reads_labels: whether labels of the task have gone into it.
    boundary: whether 0 parts important tokens from others; `selective` refuses other scores.
    unit: "log-odds", "nats", "z", "weight" or "log2": the label of an axis.
    rule: the sentence that explains it in `--help` and beside the scores.
    """

    score: Callable
    needs: tuple[str, ...]
    reads_labels: bool
    boundary: bool
    unit: str
    rule: str

    def record(self, name: str) -> dict[str, object]:
        """Return what the JSON of the scores keeps under "measure"."""
        return {"name": name, "boundary": self.boundary, "unit": self.unit,
                "reads_labels": self.reads_labels}


COUNTED: dict[str, Measure] = {}
