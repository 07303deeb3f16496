"""Masks: budgets, choices against plain twins, 80/10/10, words, and who depends on what."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess import masking as masks
from preprocess.errors import ConfigError
from preprocess.masking import (
    STRATEGIES,
    Sequences,
    corrupt,
    counter_uniform,
    draw_counts,
    draws,
    find_candidates,
    selective_limit,
)
from preprocess.text.continuations import continuation_table, find_continuations

ALL = sorted(STRATEGIES)
DRAWN = [name for name in ALL if STRATEGIES[name].drawn]
SPECIAL = (0, 3, 4)


def make_batch(num_tokens: int = 100_000, seed: int = 1, epoch: int = 0, **changes) -> Sequences:
    """Sequences of 0 to 60 tokens, 2 % special, scores with many ties, words of 1.3 tokens."""
    rng = np.random.default_rng(7)
    ends = np.cumsum(rng.integers(0, 61, size=num_tokens // 20))
    offsets = np.concatenate([[0], ends[ends < num_tokens], [num_tokens]])
    candidates = rng.random(num_tokens) > 0.02
    possible = np.array([candidates[a:b].sum() for a, b in zip(offsets, offsets[1:], strict=False)])
    batch = Sequences(
        offsets=offsets,
        positions=np.arange(num_tokens) + 5_000_000_000,
        candidates=candidates,
        rate=0.15,
        seed=seed,
        epoch=epoch,
        scores=(rng.normal(-1, 1, num_tokens).round(1)).astype(np.float16),
        continues_word=rng.random(num_tokens) < 0.23,
        matched_counts=rng.binomial(possible, 0.1),
    )
    return dataclasses.replace(batch, **changes)


def test_every_record_is_filled_in():
    for name, strategy in STRATEGIES.items():
        assert strategy.needs <= {"scores", "match", "words"}
        assert strategy.budget in ("rate", "at_most", "match")
        # What reads an array is built beside it; a count is matched from an index.
        assert not (strategy.drawn and strategy.needs & masks.ARRAY_NEEDS.keys()), name
        assert (strategy.budget == "match") == ("match" in strategy.needs)
        assert strategy.rule.endswith(".") and strategy.rule[0].isupper()
    assert STRATEGIES[masks.BASELINE].drawn
    assert not STRATEGIES[masks.MATCHED].drawn and "match" not in STRATEGIES[masks.MATCHED].needs


# ------------------------------------------------------------------------------ every strategy


@pytest.mark.parametrize("name", ALL)
def test_positions_ascend_are_unique_and_never_special(name):
    batch = make_batch(20_000)
    chosen = STRATEGIES[name].choose(batch)
    assert chosen.dtype == np.int64 and len(chosen) > 500
    assert (np.diff(chosen) > 0).all()
    assert batch.candidates[chosen].all()


@pytest.mark.parametrize("name", ALL)
def test_same_seed_same_positions_other_seed_or_epoch_others(name):
    def choose(**changes):
        return STRATEGIES[name].choose(make_batch(20_000, **changes)).tolist()

    assert choose() == choose()
    assert choose() != choose(seed=2)
    assert choose() != choose(epoch=1)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("cut", "rate"), [(1, 0.15), (3, 1.0), (100, 0.15)])
def test_positions_do_not_depend_on_how_the_batch_is_cut(name, cut, rate):
    whole = make_batch(3_000, rate=rate)
    parts = []
    for first in range(0, len(whole.offsets) - 1, cut):
        offsets = whole.offsets[first : first + cut + 1]
        tokens = slice(offsets[0], offsets[-1])
        part = Sequences(
            offsets=offsets - offsets[0],
            positions=whole.positions[tokens],
            candidates=whole.candidates[tokens],
            rate=whole.rate,
            seed=whole.seed,
            epoch=whole.epoch,
            scores=whole.scores[tokens],
            continues_word=whole.continues_word[tokens],
            matched_counts=whole.matched_counts[first : first + cut],
        )
        parts.append(STRATEGIES[name].choose(part) + offsets[0])
    assert np.concatenate(parts).tolist() == twin(name, whole)
    assert STRATEGIES[name].choose(whole).tolist() == twin(name, whole)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("offsets", [[0], [0, 0], [0, 0, 2, 2, 2]])
def test_empty_batches_sequences_and_candidates(name, offsets):
    num_tokens, num_sequences = offsets[-1], len(offsets) - 1
    batch = Sequences(
        offsets=np.array(offsets),
        positions=np.arange(num_tokens),
        candidates=np.zeros(num_tokens, dtype=bool),
        rate=1.0,
        seed=0,
        epoch=0,
        scores=np.ones(num_tokens, dtype=np.float16),
        continues_word=np.ones(num_tokens, dtype=bool),
        matched_counts=np.zeros(num_sequences, dtype=np.int64),
    )
    assert STRATEGIES[name].choose(batch).tolist() == []


@pytest.mark.parametrize("name", [n for n in ALL if STRATEGIES[n].budget != "at_most"])
def test_every_candidate_is_equally_likely_where_scores_do_not_decide(name):
    hits = np.zeros(20)
    for epoch in range(3_000):
        batch = Sequences(
            offsets=np.array([0, 20]),
            positions=np.arange(20),
            candidates=np.arange(20) != 4,
            rate=0.2,
            seed=5,
            epoch=epoch,
            scores=np.full(20, -1, dtype=np.float16),
            continues_word=np.zeros(20, dtype=bool),
            matched_counts=np.array([4]),
        )
        hits[STRATEGIES[name].choose(batch)] += 1
    share = hits / 3_000
    expected = 4 / 19 if STRATEGIES[name].budget == "match" else 0.2
    assert share[4] == 0
    # one standard deviation is 0.0073
    assert np.abs(np.delete(share, 4) - expected).max() < 0.03


# ------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("name", DRAWN)
def test_drawn_budget_is_met_over_100_000_tokens(name):
    rows = np.append(np.arange(0, 100_000, 128), 100_000)  # as long as the loader's
    everything = np.ones(100_000, dtype=bool)
    for seed in range(10):
        batch = make_batch(seed=seed, offsets=rows, matched_counts=None, candidates=everything)
        assert abs(len(STRATEGIES[name].choose(batch)) - 15_000) <= 0.001 * 15_000


@pytest.mark.parametrize("name", DRAWN)
def test_drawn_budget_is_met_in_expectation_by_short_sequences_too(name):
    masked, budget = 0, 0.0
    for epoch in range(40):
        batch = make_batch(epoch=epoch)
        masked += len(STRATEGIES[name].choose(batch))
        budget += 0.15 * batch.candidates.sum()
    assert abs(masked - budget) <= 0.001 * budget  # one sd is 0.03 %


def test_random_meets_its_budget_in_every_draw():
    # 5,000 sequences of about 20 tokens: independent rounding would miss by 0.2 % (one sd).
    ends = np.cumsum(np.random.default_rng(0).integers(1, 40, size=5_100))
    offsets = np.concatenate([[0], ends[ends < 100_000], [100_000]])
    for epoch in range(50):
        batch = Sequences(
            offsets=offsets, positions=np.arange(100_000) + 123_456_789_012,
            candidates=np.ones(100_000, dtype=bool), rate=0.15, seed=epoch // 7, epoch=epoch,
        )
        assert abs(int(draw_counts(batch).sum()) - 15_000) <= 15


def test_whole_word_budget_is_exact_in_expectation_for_one_sequence():
    # Words of 3, 2, 2 and 1 tokens; the budget is 0.4 * 8 = 3.2 tokens.
    batch = Sequences(
        offsets=np.array([0, 8]),
        positions=np.arange(8),
        candidates=np.ones(8, dtype=bool),
        rate=0.4,
        seed=3,
        epoch=0,
        continues_word=np.array([0, 1, 1, 0, 1, 0, 1, 0], dtype=bool),
    )
    total = 0
    for epoch in range(4_000):
        chosen = STRATEGIES["whole_word"].choose(dataclasses.replace(batch, epoch=epoch)).tolist()
        for word in ([0, 1, 2], [3, 4], [5, 6], [7]):
            assert len(set(word) & set(chosen)) in (0, len(word))
        total += len(chosen)
    assert abs(total / 4_000 - 3.2) < 0.06  # one sd is 0.015


def test_selective_limit_by_hand():
    counts = np.array([0, 1, 5, 6, 7, 13, 14, 20, 100])
    assert selective_limit(counts, 0.15).tolist() == [0, 1, 1, 1, 1, 1, 2, 3, 15]
    assert selective_limit(counts, 1.0).tolist() == counts.tolist()


def test_selective_by_hand():
    nan, inf = np.nan, np.inf
    #          0    1    2     3     4   | 5     6    | 7   8    9    10    11    12   13   14   15
    scores = [0.5, 2.0, 3.0, -1.0, nan, 0.0, -4.0, 9.0, 1, inf, 0.1, 6e-8, -inf, 0.2, 0.3, 0.4]
    batch = Sequences(
        offsets=np.array([0, 5, 7, 7, 16]),
        positions=np.arange(16),
        candidates=np.arange(16) != 7,  # the special token has the best score but one
        rate=0.5,
        seed=0,
        epoch=0,
        scores=np.array(scores, dtype=np.float16),
    )
    # 5 candidates allow 2: the best are 2 and 1. Nothing above 0 in the second. 8 allow 4.
    assert STRATEGIES["selective"].choose(batch).tolist() == [1, 2, 8, 9, 14, 15]
    # A subnormal score is above 0; 0 itself is not.
    everything = dataclasses.replace(batch, rate=1.0)
    assert 11 in STRATEGIES["selective"].choose(everything)
    assert 5 not in STRATEGIES["selective"].choose(everything)


def test_random_matched_refuses_more_than_the_candidates():
    batch = make_batch(100)
    wrong = batch.matched_counts.copy()
    wrong[1] = 1_000
    with pytest.raises(ValueError, match="sequence 1: 1000 tokens to match"):
        STRATEGIES["random_matched"].choose(dataclasses.replace(batch, matched_counts=wrong))


FIELDS = {"scores": "scores", "words": "continues_word", "match": "matched_counts"}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("need", "missing"), FIELDS.items())
def test_a_strategy_needs_exactly_what_its_record_names(name, need, missing):
    if need not in STRATEGIES[name].needs:
        STRATEGIES[name].choose(make_batch(100, **{missing: None}))
        return
    with pytest.raises(ValueError, match=missing):
        STRATEGIES[name].choose(make_batch(100, **{missing: None}))


@pytest.mark.parametrize(
    "changes",
    [
        {"rate": 0.0},
        {"rate": 1.01},
        {"rate": math.nan},
        {"offsets": np.array([0, 50])},
        {"offsets": np.array([1, 100])},
        {"offsets": np.array([0, 60, 40, 100])},
        {"offsets": np.array([], dtype=np.int64)},
        {"positions": np.arange(99)},
        {"scores": np.zeros(101, dtype=np.float16)},
        {"continues_word": np.zeros((100, 2), dtype=bool)},
        {"matched_counts": np.zeros(1, dtype=np.int64)},
    ],
)
def test_a_batch_that_does_not_fit_together_is_refused(changes):
    with pytest.raises(ValueError):
        make_batch(100, **changes)


# -------------------------------------------------------------------------------- plain twins


def twin(name: str, batch: Sequences) -> list[int]:
    """Every strategy as a loop over sequences and Python's sorted."""

    def draw(stream, i):
        at = batch.positions[i : i + 1]
        return float(counter_uniform(batch.seed, batch.epoch, at, stream)[0])

    def drawn_count(places):
        if not places:
            return 0
        first = int(batch.positions[places[0]])
        window = np.array([first // masks.ROUNDING_WINDOW])
        shift = float(counter_uniform(batch.seed, batch.epoch, window, masks.STREAM_BUDGET)[0])
        before = batch.rate * first + shift
        return math.floor(before + batch.rate * len(places)) - math.floor(before)

    def lowest(places, stream, count):
        return sorted(places, key=lambda i: (draw(stream, i), i))[:count]

    result = []
    for b in range(len(batch.offsets) - 1):
        places = [
            i for i in range(batch.offsets[b], batch.offsets[b + 1]) if batch.candidates[i]
        ]
        above = [i for i in places if batch.scores[i] > 0]
        above.sort(key=lambda i: (-float(batch.scores[i]), draw(masks.STREAM_TIES, i), i))
        best = above[: max(1, math.floor(batch.rate * len(places)))]
        if name == "random":
            result += lowest(places, masks.STREAM_CHOICE, drawn_count(places))
        elif name == "random_matched":
            result += lowest(places, masks.STREAM_MATCHED, batch.matched_counts[b])
        elif name == "selective":
            result += best
        elif name == "selective_fill":
            rest = [i for i in places if i not in best]
            missing = max(0, drawn_count(places) - len(best))
            result += best + lowest(rest, masks.STREAM_FILL, missing)
        else:
            words = []
            for i in places:
                if words and batch.continues_word[i] and words[-1][-1] == i - 1:
                    words[-1].append(i)
                else:
                    words.append([i])
            left = drawn_count(places)
            by_start = {word[0]: word for word in words}
            too_long = []
            for start in lowest(by_start, masks.STREAM_CHOICE, None):
                if len(by_start[start]) <= left:
                    result += by_start[start]
                    left -= len(by_start[start])
                else:
                    too_long.append(start)
            if left and too_long:
                word = by_start[too_long[0]]
                if draw(masks.STREAM_WORD, too_long[0]) * len(word) < left:
                    result += word
    return sorted(int(i) for i in result)


@st.composite
def batches(draw):
    lengths = draw(st.lists(st.integers(0, 12), max_size=6))
    num_tokens = sum(lengths)
    each = {"min_size": num_tokens, "max_size": num_tokens}
    candidates = draw(st.lists(st.booleans(), **each))
    offsets = np.cumsum([0, *lengths])
    possible = [sum(candidates[a:b]) for a, b in zip(offsets, offsets[1:], strict=False)]
    scores = st.sampled_from([-2.0, -0.0, 0.0, 0.5, 1.0, 1.0, 3.0, float("inf")])
    return Sequences(
        offsets=offsets,
        positions=np.arange(num_tokens) + draw(st.integers(0, 10**12)),
        candidates=np.array(candidates, dtype=bool),
        rate=draw(st.sampled_from([0.05, 0.15, 0.3, 0.5, 0.99, 1.0])),
        seed=draw(st.integers(-5, 2**64 - 1)),
        epoch=draw(st.integers(0, 100)),
        scores=np.array(draw(st.lists(scores, **each)), dtype=np.float16),
        continues_word=np.array(draw(st.lists(st.booleans(), **each)), dtype=bool),
        matched_counts=np.array([draw(st.integers(0, n)) for n in possible], dtype=np.int64),
    )


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=60, deadline=None)
@given(batch=batches())
def test_strategy_equals_its_plain_twin(name, batch):
    assert STRATEGIES[name].choose(batch).tolist() == twin(name, batch)


# ---------------------------------------------------------------------------------- randomness


def test_counter_uniform_equals_splitmix64_by_hand():
    assert draws._mix(0) == 0xE220A8397B1DCDAF  # the published first number of seed 0
    start = draws._mix(draws._mix(draws._mix(11) ^ 2) ^ 3)
    positions = np.array([[0, 1], [7, 2**40]])
    expected = [
        # `_mix` adds the increment itself: number p of the generator that starts at `start`
        (draws._mix((start + p * 0x9E3779B97F4A7C15) % 2**64) >> 40) / 2**24
        for p in positions.ravel().tolist()
    ]
    drawn = counter_uniform(11, 2, positions, 3)
    assert drawn.dtype == np.float32 and drawn.shape == (2, 2)
    assert drawn.ravel().tolist() == expected


def test_counter_uniform_is_uniform_below_one():
    drawn = counter_uniform(0, 0, np.arange(400_000), 0)
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = np.histogram(drawn, bins=100, range=(0, 1))[0]
    chi_square = ((counts - 4_000) ** 2 / 4_000).sum()
    assert 50 < chi_square < 160  # 99 degrees of freedom: mean 99, sd 14
    assert np.float32(0xFFFFFF) * np.float32(2.0**-24) < 1  # the largest there is


def test_streams_seeds_epochs_and_neighbours_are_independent():
    positions = np.arange(100_000)
    base = counter_uniform(0, 0, positions, 0)
    others = [
        counter_uniform(0, 0, positions, 1),
        counter_uniform(0, 1, positions, 0),
        counter_uniform(1, 0, positions, 0),
        counter_uniform(1, 1, positions, 0),
        counter_uniform(0, 0, positions + 1, 0),
    ]
    for other in others:
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.015  # one sd is 0.003
    assert (others[1] != others[2]).any()


def test_streams_have_different_numbers():
    streams = [value for key, value in vars(masks).items() if key.startswith("STREAM_")]
    assert len(streams) == len(set(streams)) >= 7


# ------------------------------------------------------------------- candidates and corruption


def test_find_candidates_by_hand():
    tokens = np.array([0, 1, 2, 3, 65535, 4], dtype=np.uint16)
    assert find_candidates(tokens, SPECIAL).tolist() == [False, True, True, False, True, False]
    assert find_candidates(tokens[:0], SPECIAL).shape == (0,)


def corrupt_here(original, positions=None, **changes):
    options = {"seed": 1, "epoch": 0, "mask_id": 4, "vocab_size": 500, "all_special_ids": SPECIAL}
    if positions is None:
        positions = np.arange(len(original))
    return corrupt(original, positions, **{**options, **changes})


def test_corruption_is_80_10_10():
    original = np.full(100_000, 9, dtype=np.uint16)
    new = corrupt_here(original)
    assert new.dtype == np.uint16
    shares = [(new == 4).mean(), ((new != 4) & (new != 9)).mean(), (new == 9).mean()]
    # one sd is 0.0013 and 0.0009; a random id is the original once in 497 times
    assert np.abs(np.array(shares) - [0.8, 0.1, 0.1]).max() < 0.005
    assert (original == 9).all()


def test_random_replacement_is_uniform_and_never_special():
    original = np.full(500_000, 9, dtype=np.int64)
    new = corrupt_here(original, vocab_size=12)
    randomised = new[(new != 4) & (new != 9)]
    counts = np.bincount(randomised, minlength=12)
    assert counts[list(SPECIAL)].tolist() == [0, 0, 0]
    ordinary = counts[[1, 2, 5, 6, 7, 8, 10, 11]]
    expected = 500_000 * 0.1 / 9  # 9 ordinary ids, one of them the original
    assert np.abs(ordinary - expected).max() < 0.06 * expected  # one sd is 1.3 %
    assert len(counts) == 12


def test_every_ordinary_id_can_come_however_the_special_ones_lie():
    for special in [(), (0,), (4,), (3, 4), (0, 1, 2), (2, 4, 2), (0, 2, 4, 9)]:
        new = corrupt_here(
            np.full(2_000, 77), all_special_ids=special, vocab_size=5, mask_id=88
        )
        assert set(new.tolist()) == ({0, 1, 2, 3, 4} - set(special)) | {77, 88}


def test_corruption_is_redrawn_each_epoch_and_belongs_to_the_position():
    original = np.arange(5, 405)
    positions = np.arange(400) * 3
    whole = corrupt_here(original, positions)
    parts = [corrupt_here(original[s], positions[s]) for s in (slice(0, 7), slice(7, 400))]
    assert np.concatenate(parts).tolist() == whole.tolist()
    assert corrupt_here(original, positions, epoch=1).tolist() != whole.tolist()
    assert corrupt_here(original, positions, seed=2).tolist() != whole.tolist()
    assert corrupt_here(original[:0]).shape == (0,)


# --------------------------------------------------------------------------------------- words

TEXTS = [
    "Don't you think they've said it's hers? We'll see; I'm sure he'd know.",
    "In 1999, 3,000.50 dollars (or $5.00) bought 12ab of abc123 at 100%!",
    "a well-known, state-of-the-art film... wasn't it? \"Yes!!\" x_y http://a.b/c?d=1",
    "caf\u00e9 na\u00efve \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u2014 \u201cquoted\u201d "
    "\u00a35 \U0001f600",
    "unbelievable antidisestablishmentarianism internationalisation",
    "two  spaces and\ta tab",
]


def train_tokenizer(kind: str):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    names |= {"sep_token": "[SEP]", "mask_token": "[MASK]"}
    if kind == "wordpiece":
        inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        inner.normalizer = normalizers.BertNormalizer()
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=170, special_tokens=special, show_progress=False
        )
    else:
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    inner.train_from_iterator(TEXTS[:3] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def compare_words(tokenizer, texts):
    """Tokens on which `find_continuations` and the tokenizer's own word ids disagree; tokens."""
    flat, truth, offsets = [], [], [0]
    for text in texts:
        encoded = tokenizer(text, add_special_tokens=False)
        words = encoded.word_ids()
        flat += encoded["input_ids"]
        truth += [i > 0 and words[i] == words[i - 1] for i in range(len(words))]
        offsets.append(len(flat))
    table = continuation_table(tokenizer)
    found = find_continuations(np.array(flat, dtype=np.uint16), np.array(offsets), table)
    assert not found[[o for o in offsets[:-1] if o < len(found)]].any()
    assert any(truth) and not all(truth)
    return int((found != np.array(truth)).sum()), len(flat)


@pytest.mark.parametrize(("kind", "texts", "wrong_share"), [
    ("wordpiece", [*TEXTS, "", *TEXTS], 0),
    ("bpe", [*TEXTS[:3], "", TEXTS[4]], 0),
    # This vocabulary spells every character outside ASCII in bytes: the hardest case.
    ("bpe", TEXTS, 0.03),
])
def test_words_are_those_of_the_tokenizer(kind, texts, wrong_share):
    wrong, num_tokens = compare_words(train_tokenizer(kind), texts)
    assert wrong <= wrong_share * num_tokens and num_tokens > 120


def test_an_added_token_is_a_word_of_its_own():
    for kind in ("bpe", "wordpiece"):
        tokenizer = train_tokenizer(kind)
        tokenizer.add_tokens(["film"])
        wrong, _ = compare_words(tokenizer, ["afilmb unfilmable films film!"])
        assert wrong == 0


def test_words_of_other_tokenizers_are_refused():
    from tokenizers import Tokenizer, models

    with pytest.raises(ConfigError, match="Unigram"):
        continuation_table(Tokenizer(models.Unigram()))


def test_importing_masks_is_light():
    code = "import preprocess.masking, sys; sys.exit(int('torch' in sys.modules))"
    root = Path(masks.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
