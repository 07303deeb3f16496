"""Scores by counting: what each measure is, and the records of those that need no network.

A score is one number per token of a store, kept as float16 in `P.NAME.scores.npy`: larger is more
important, and 0 is the measure's neutral point (log-odds) or its least value. A strategy
(`preprocess/masking/strategies.py`) turns scores into masked positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from preprocess.masking.counts import (
    score_content,
    score_difference,
    score_lexicon,
    score_tfidf,
)
from preprocess.masking.ngrams import score_pmi


class Measure(NamedTuple):
    """A score and what the rest of the house must know about it.

    score: by counting, a function from `Counting` to `Scored` (`preprocess/masking/counts.py`).
    needs: its inputs beside the store, of "classifier", "scorer", "mlm", "reference", "store"
        (a second one) and "lexicon".
    reads_labels: whether labels of the task have gone into it.
    boundary: whether 0 parts important tokens from others; `selective` refuses other scores.
    unit: "log-odds", "nats", "tf x nats", "z", "weight" or "log2": the label of an axis.
    rule: the sentence that explains it in `--help` and beside the scores.
    has_units: whether it also finds units of several words (`P.NAME.units.npy`).
    """

    score: Callable
    needs: tuple[str, ...]
    reads_labels: bool
    boundary: bool
    unit: str
    rule: str
    has_units: bool = False

    def record(self, name: str) -> dict[str, object]:
        """Return what the JSON of the scores keeps under "measure"."""
        return {"name": name, "boundary": self.boundary, "unit": self.unit,
                "reads_labels": self.reads_labels}


COUNTED: dict[str, Measure] = {
    "tfidf": Measure(
        score_tfidf, (), reads_labels=False, boundary=False, unit="tf x nats",
        rule="occurrences of a word in its document x how few documents have it (smooth idf)"),
    "difference": Measure(
        score_difference, ("store",), reads_labels=False, boundary=True, unit="z",
        rule="how surely a word is more frequent here than in another store (--against)"),
    "lexicon": Measure(
        score_lexicon, ("lexicon",), reads_labels=False, boundary=True, unit="weight",
        rule="the weight of a word in a list (--lexicon), 0 if it is not listed"),
    "content": Measure(
        score_content, (), reads_labels=False, boundary=True, unit="weight",
        rule="1 for words that are neither stop words nor punctuation"),
    "pmi": Measure(
        score_pmi, (), reads_labels=False, boundary=True, unit="nats",
        rule="the mutual information of the n-gram of 2 to 5 words around a token; units too",
        has_units=True),
}
