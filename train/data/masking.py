"""Open the masks of a run: drawn anew each epoch, or a prebuilt index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from preprocess.errors import ConfigError, DataError
from preprocess.files import fingerprint_text
from preprocess.masking import STRATEGIES, array_origin
from preprocess.progress import say
from preprocess.store import TokenStore, open_array
from preprocess.text.continuations import (
    CHARACTERS_ONLY,
    WordTable,
    check_words,
    continuation_table,
    open_tokenizer,
)


@dataclass(frozen=True)
class Schedule:
    """A mask rate that changes linearly over a run: a function of the optimizer step alone.

    So neither ranks nor micro batches nor a resumed run can change it.

    Attributes:
        first, last: rates of the first and of the last step, in (0, 1].
        num_steps: of the whole run.
    """

    first: float
    last: float
    num_steps: int

    def at(self, step: int) -> float:
        """Return the rate of a step, counted from 0."""
        return self.first + (self.last - self.first) * step / max(self.num_steps - 1, 1)


@dataclass(frozen=True)
class Masking:
    """How positions are chosen: a strategy drawn on the fly, or a prebuilt mask index.

    Attributes:
        name: the strategy's name, or the index's.
        index: masked positions of each shard, `(m,)` uint32 ascending, or None to draw.
        later: the same for epochs 1, 2, ..., where an index was built for each of several epochs.
        rate: mask rate of a drawn strategy, in (0, 1]; the largest one of a schedule.
        schedule: of that rate, if it changes.
        words: word boundaries, for a drawn strategy that needs them.
        options: how the index was built: its strategy, rate and seed.
        built_rate: mask rate that the index was built with; of a control, that of the index that it
            was matched to; None for a drawn strategy, or where nothing tells.
        fingerprint: of the index, over all shards.
    """

    name: str
    index: list[np.ndarray] | None = None
    later: Sequence[list[np.ndarray]] = ()
    rate: float = 0.0
    schedule: Schedule | None = None
    words: WordTable | None = None
    options: dict[str, Any] = field(default_factory=dict)
    built_rate: float | None = None
    fingerprint: str | None = None

    @property
    def indices(self) -> list[list[np.ndarray]]:
        """The index of each epoch, by shard; epoch e of a run takes number e modulo their count."""
        return [] if self.index is None else [self.index, *self.later]

    def rate_at(self, step: int) -> float:
        """Return the rate of an optimizer step, counted from 0."""
        return self.schedule.at(step) if self.schedule else self.rate

    def rate_text(self) -> float | str:
        """Return the rate as it is typed; equal rates have equal texts."""
        if self.schedule is None or self.schedule.first == self.schedule.last:
            return self.rate
        return f"{self.schedule.first}:{self.schedule.last}"

    def number(self) -> float | None:
        """Return the mask rate as one number, drawn or built; None for a schedule."""
        rate = self.built_rate if self.indices else self.rate_text()
        return rate if isinstance(rate, float) else None


def drawn_masking(store: TokenStore, name: str, rate: float | Schedule) -> Masking:
    """Return a strategy that is drawn anew each epoch.

    Args:
        rate: mask rate in (0, 1], or one that changes from step to step.
    Raises:
        ConfigError: not a strategy, or one that needs a prebuilt index.
    """
    strategy = STRATEGIES.get(name)
    if strategy is None or not strategy.drawn:
        drawn = ", ".join(key for key, one in STRATEGIES.items() if one.drawn)
        hint = ("build an index with preprocess/build_masks.py and give --mask_index" if strategy
                else f"known: {drawn}")
        raise ConfigError(f"--masking {name}: not drawn anew each epoch; {hint}")
    words = None
    if "words" in strategy.needs:
        tokenizer = open_tokenizer(store.tokenizer_dir)
        words = continuation_table(tokenizer)
        how = check_words(tokenizer)
        if CHARACTERS_ONLY in how:
            say(f"warning: --masking {name}: {how}")
    schedule = rate if isinstance(rate, Schedule) else None
    largest = max(rate.first, rate.last) if isinstance(rate, Schedule) else rate
    return Masking(name, rate=largest, schedule=schedule, words=words)


def prebuilt_masking(store: TokenStore, name: str) -> Masking:
    """Open a mask index beside the store, and those of later epochs if it was built for several.

    Raises:
        DataError: absent, made for another store, with other options from shard to shard, or empty;
            or an index of a later epoch is.
    """
    opened = [open_array(shard, name, "mask") for shard in store.shards]
    first = opened[0][1]
    # The index of a later epoch, named by itself, is that of every epoch.
    epochs = int(first.get("epochs", 1)) if first.get("epoch", 0) == 0 else 1
    again = f"build it again with build_masks.py --name {name} --epochs {epochs} --overwrite"
    for epoch in range(1, epochs):
        try:
            opened += [open_array(shard, f"{name}-epoch{epoch}", "mask") for shard in store.shards]
        except DataError as error:
            raise DataError(f"mask index {name} has {epochs} epochs, and number {epoch} cannot be "
                            f"read: {error}; {again}") from None
    index, infos = [positions for positions, _ in opened], [info for _, info in opened]
    shards = len(store.shards)
    indices = [index[start:start + shards] for start in range(0, len(index), shards)]
    if not all(any(map(len, one)) for one in indices):
        raise DataError(f"{store.prefix}: mask index {name} masks no token; build another")
    choices = [array_origin(info) for info in infos if "identity" in info]
    for choice in choices:  # the epochs of a control are matched to those of its policy
        choice["options"] = {key: value for key, value in choice["options"].items()
                             if key not in ("epoch", "match")}
    numbers = [(info.get("epoch", 0), info.get("epochs", 1)) for info in infos]
    wanted = [(number // shards, epochs) for number in range(len(infos))]
    if any(choice != choices[0] for choice in choices) or epochs > 1 and numbers != wanted:
        raise DataError(f"{store.prefix}: mask index {name} was made with different options from "
                        f"{'epoch to epoch or ' if epochs > 1 else ''}shard to shard; "
                        + (again if epochs > 1 else "build it again with --overwrite"))
    options = first.get("options") or {}
    return Masking(
        name, index=indices[0], later=indices[1:], options=options,
        built_rate=_built_rate(store, options),
        fingerprint=fingerprint_text(*(info["sha256"] for info in infos)),
    )


def _built_rate(store: TokenStore, options: dict[str, Any]) -> float | None:
    """Return the mask rate of an index; a control has that of what it was matched to."""
    seen: set[str] = set()
    while (rate := options.get("mlm_probability")) is None:
        name = str(options.get("match") or "").partition(" ")[0]
        if not name or name in seen:
            return None
        seen.add(name)
        try:
            options = open_array(store.shards[0], name, "mask")[1].get("options") or {}
        except DataError:  # it was removed
            return None
    return float(rate)
