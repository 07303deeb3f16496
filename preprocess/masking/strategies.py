"""The strategies: the only file that names one.

Masking is four visible steps over a ragged batch (`Sequences`: flat arrays and offsets):

1. candidates   `find_candidates`: every token that is not special
2. budget       `draw_counts`, `selective_limit`: how many candidates of each sequence
3. choice       `STRATEGIES`: which ones; strategies differ in this step alone
4. corruption   `corrupt`: 80 % [MASK], 10 % a random id, 10 % unchanged

Every draw is a hash of (seed, epoch, global token position, stream), so a mask does not depend on
how the tokens were cut into batches, nor on the rank or worker that drew it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from preprocess.masking import controls, drawn, scored
from preprocess.masking.candidates import Sequences


class Strategy(NamedTuple):
    """A rule and everything that the rest of the house needs to know about it.

    choose: return the ascending unique flat indices of the masked tokens, `(M,)` int64.
    needs: its inputs besides the tokens. Arrays that the user names (`ARRAY_NEEDS`): "scores",
        "match". Made from the store and these: "words" (`continues_word`), "documents", "frequency"
        (`octaves`), "policy" (the rule and the scores by which the matched index was chosen),
        "means" (scores replaced by the mean of their type). "boundary" demands scores whose 0 parts
        important tokens from others.
    drawn: True if masks are drawn anew each epoch (`pretrain.py --masking`); False if they are
        built once (`build_masks.py`).
    budget: "rate": rate x candidates in expectation; "at_most": `selective_limit`; "match": as many
        as the index that `--match` names, in each sequence or document; "policy": its.
    control: True if it exists to be compared with another strategy.
    rule: the sentence that explains it in `--help` and beside an index.
    options: the fields of `Sequences` that only it reads, of "centre" and "temperature".
    spans: True if masked words that are neighbours belong together.
    blocks: True if its result belongs to a block of the shard (of `BLOCK_TOKENS`), not to a window.
    """

    choose: Callable[[Sequences], np.ndarray]
    needs: frozenset[str]
    drawn: bool
    budget: str
    control: bool
    rule: str
    options: tuple[str, ...] = ()
    spans: bool = False
    blocks: bool = False

    @property
    def takes_units(self) -> bool:
        """Whether it can mask whole words or other units in place of tokens."""
        return not self.needs.isdisjoint({"words", "scores"})


# The needs that are arrays beside the store, and their kind there.
ARRAY_NEEDS = {"scores": "scores", "match": "mask"}

STRATEGIES: dict[str, Strategy] = {
    "random": Strategy(
        drawn.choose_random, frozenset(), drawn=True, budget="rate", control=False,
        rule="Draw tokens at random, up to the mask rate in every sequence.",
    ),
    "whole_word": Strategy(
        drawn.choose_whole_words, frozenset({"words"}), drawn=True, budget="rate", control=False,
        rule="Draw whole words at random, up to the mask rate, words of every length alike.",
    ),
    "span": Strategy(
        drawn.choose_spans, frozenset({"words"}), drawn=True, budget="rate", control=False,
        spans=True,
        rule="Draw spans of 1 to 10 whole words, 3.8 on average, up to the mask rate.",
    ),
    "selective": Strategy(
        scored.choose_selective, frozenset({"scores", "boundary"}), drawn=False, budget="at_most",
        control=False,
        rule="Take the tokens with a score above 0, best first, up to the mask rate of each "
        "sequence, rounded down but at least one; a sequence without such a token has no mask.",
    ),
    "selective_fill": Strategy(
        scored.choose_selective_fill, frozenset({"scores", "boundary"}), drawn=False, budget="rate",
        control=False,
        rule="Take the tokens with a score above 0, best first, then others at random, up to the "
        "mask rate.",
    ),
    "top": Strategy(
        scored.choose_top, frozenset({"scores"}), drawn=False, budget="rate", control=False,
        rule="Take the tokens with the largest scores, whatever their sign, up to the mask rate.",
    ),
    "sampled": Strategy(
        scored.choose_sampled, frozenset({"scores"}), drawn=False, budget="rate", control=False,
        options=("temperature",),
        rule="Draw tokens one after the other in proportion to exp(score / temperature), up to the "
        "mask rate.",
    ),
    "band": Strategy(
        scored.choose_band, frozenset({"scores"}), drawn=False, budget="rate", control=False,
        options=("centre",),
        rule="Take the tokens whose rank by score in the sequence is nearest to a centre, up to "
        "the mask rate.",
    ),
    "random_matched": Strategy(
        controls.choose_random_matched, frozenset({"match"}), drawn=False, budget="match",
        control=True,
        rule="Draw at random as many tokens of each sequence as another index masks: the control "
        "that knows nothing of importance.",
    ),
    "frequency_matched": Strategy(
        controls.choose_frequency_matched, frozenset({"match", "frequency"}), drawn=False,
        budget="match", control=True, blocks=True,
        rule="Draw as many tokens of each sequence as another index masks, over the shard equally "
        "often of each frequency and inside words: the control that knows only how rare a token "
        "is.",
    ),
    "typemean": Strategy(
        controls.choose_by_policy, frozenset({"match", "policy", "means"}), drawn=False,
        budget="policy", control=True,
        rule="Choose as another index was chosen, with each score replaced by the mean of its "
        "type: the control that knows a list of words and no context.",
    ),
    "inverse": Strategy(
        controls.choose_inverse, frozenset({"match", "policy"}), drawn=False, budget="match",
        control=True,
        rule="Take the tokens with the smallest scores, as many of each sequence as another index "
        "masks: the control that masks what matters least.",
    ),
    "shuffled": Strategy(
        controls.choose_shuffled, frozenset({"match", "documents"}), drawn=False, budget="match",
        control=True,
        rule="Permute the scores within each document and take its best, as many of each document "
        "as another index masks: the control that knows which documents matter, not which tokens.",
    ),
}
BASELINE = "random"  # the default of training, the masks of evaluation, a benchmark's first row
MATCHED = "selective"  # whose counts a control takes unless told otherwise
