"""The statistics of mask indices as tables, for the terminal and the page alike."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from preprocess.view.kinds import KINDS
from preprocess.view.statistics import (
    RATE_EDGES,
    SCORE_EDGES,
    IndexCounts,
    Statistics,
    Vocabulary,
    rank_types,
)

NUM_TYPES = 15
Row = tuple[str | tuple[str, float], ...]


@dataclass(frozen=True)
class Table:
    """A table to show. A cell is its text, or (text, length of a bar from 0 to 1).

    subject: name of the index that the table is about, if it is about one.
    """

    title: str
    head: tuple[str, ...]
    rows: list[Row]
    note: str = ""
    subject: str | None = None


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def share_of(log_odds: float) -> str:
    """Write log-odds as the probability that they stand for."""
    # 1 / (1 + exp(-x)) would overflow where the scores are far below 0.
    return f"{50 * (1 + math.tanh(log_odds / 2)):.0f} %"


def make_tables(
    statistics: Statistics, names: list[str], vocabulary: Vocabulary, with_scores: bool
) -> list[Table]:
    """Make every table; `names` are those of the indices, the shown one first."""
    tables = [overall_table(statistics, names), kinds_table(statistics, names)]
    if with_scores:
        tables.append(scores_table(statistics, names))
    tables.append(rates_table(statistics, names))
    for name, index in zip(names, statistics.indices, strict=True):
        tables += type_tables(statistics, name, index, vocabulary)
    return tables


def overall_table(statistics: Statistics, names: list[str]) -> Table:
    """How much is masked, and how much two indices share."""
    indices = statistics.indices
    without = [int(index.rates[0]) for index in indices]
    rows: list[Row] = [
        ("masked tokens", *(f"{index.masked:,}" for index in indices)),
        ("of those that may be", *(percent(i.masked, statistics.candidates) for i in indices)),
        ("sequences without a mask", *(f"{count:,}" for count in without)),
        ("of all sequences", *(percent(count, statistics.sequences) for count in without)),
        ("hit by chance", *(percent(index.by_chance, index.masked) for index in indices)),
    ]
    note = (
        f"{statistics.tokens:,} tokens in {statistics.sequences:,} sequences, "
        f"{statistics.candidates:,} of which may be masked"
    )
    if statistics.tokens < statistics.store_tokens:
        part = percent(statistics.tokens, statistics.store_tokens)
        note += f" ({part} of the store, in blocks spaced evenly)"
    note += (
        ". Hit by chance: the share of the masked tokens that a random choice of as many in each "
        "sequence is expected to hit."
    )
    if len(names) > 1:
        shared = statistics.shared
        rows.insert(4, ("in the other index too", *(percent(shared, i.masked) for i in indices)))
        low, high = (statistics.expected + sign * 2 * math.sqrt(statistics.variance)
                     for sign in (-1, 1))
        note += (
            f" The two indices share {shared:,} tokens. If one of them had drawn as many of each "
            f"sequence at random, they would share {statistics.expected:,.0f} (between "
            f"{max(low, 0):,.0f} and {high:,.0f} in 95 of 100 draws)."
        )
    return Table("Overall", ("", *names), rows, note)


def kinds_table(statistics: Statistics, names: list[str]) -> Table:
    """Shares of stop words and punctuation, in the text and among what is masked."""
    columns = [statistics.kind_tokens, *(index.kind_masked for index in statistics.indices)]
    rows: list[Row] = []
    for kind, title in enumerate(KINDS):
        counts = [(int(column[kind]), int(column.sum())) for column in columns]
        rows.append((title, *((percent(*c), c[0] / max(c[1], 1)) for c in counts)))
    return Table(
        "Kinds of words", ("share of", "all tokens", *(f"masked in {n}" for n in names)), rows,
        "Stop words are English words that carry no opinion by themselves; negations are not "
        "among them.",
    )


def scores_table(statistics: Statistics, names: list[str]) -> Table:
    """How the share of masked tokens grows with the score."""
    rows: list[Row] = []
    edges = [-math.inf, *SCORE_EDGES, math.inf]
    for i, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        tokens = int(statistics.score_tokens[i])
        if low == -math.inf:
            bounds = (f"to {high:g}", f"to {share_of(high)}")
        elif high == math.inf:
            bounds = (f"above {low:g}", f"above {share_of(low)}")
        else:
            bounds = (f"above {low:g} to {high:g}", f"{share_of(low)} to {share_of(high)}")
        masked = [int(index.score_masked[i]) for index in statistics.indices]
        cells = ((percent(count, tokens), count / max(tokens, 1)) for count in masked)
        rows.append((*bounds, f"{tokens:,}", *cells))
    return Table(
        "Masked by importance",
        ("log-odds", "important with", "tokens", *(f"masked in {n}" for n in names)), rows,
        "The scorer's log-odds that a token is important, the probability that they stand for, "
        "and the share of such tokens that is masked.",
    )


def rates_table(statistics: Statistics, names: list[str]) -> Table:
    """How many sequences have how large a share masked."""
    titles = ["no mask"]
    titles += [f"above {low} to {high} %" for low, high in
               zip((0, *RATE_EDGES[:-1]), RATE_EDGES, strict=True)]
    rows: list[Row] = []
    for i, title in enumerate(titles):
        counts = [int(index.rates[i]) for index in statistics.indices]
        cells = ((percent(c, statistics.sequences), c / max(statistics.sequences, 1))
                 for c in counts)
        rows.append((title, *cells))
    return Table(
        "Mask rate of each sequence",
        ("share of it masked", *(f"sequences, {name}" for name in names)), rows,
        "How many of all sequences have so large a share of their tokens masked.",
    )


def type_tables(
    statistics: Statistics, name: str, index: IndexCounts, vocabulary: Vocabulary
) -> list[Table]:
    """Which tokens an index masks most often, above their share, and below it."""
    often, most, fewest, least = rank_types(index, statistics.type_tokens, NUM_TYPES)
    overall = index.masked / max(statistics.tokens, 1)

    def table(title: str, ids: np.ndarray, note: str) -> Table:
        rows: list[Row] = []
        for i in ids.tolist():
            masked, occurs = int(index.type_masked[i]), int(statistics.type_tokens[i])
            share = (percent(masked, occurs), masked / occurs)
            rows.append((vocabulary.names[i], f"{occurs:,}", f"{masked:,}", share,
                         f"{masked / occurs / overall:.1f} x"))
        head = ("token", "occurs", "masked", "of them", "lift")
        return Table(f"{name}: {title}", head, rows, note, name)

    lift = f"Lift is its rate over that of all tokens, {percent(overall, 1)}."
    at_least = f"Of tokens that occur {least:,} times or more."
    if least:
        # Four standard deviations of the number of masks of the rarest token that is listed: among
        # thousands of tokens, few go beyond.
        chance = 1 + 4 * math.sqrt((1 - overall) / (least * overall))
        at_least += f" The rarest of them may reach a lift of {chance:.1f} by chance."
    return [
        table("masked most often", often, lift),
        table("masked above their share", most, at_least),
        table("passed over", fewest, f"Of tokens that occur {least:,} times or more."),
    ]
