"""Masks of padded batches: every strategy, against the strategy itself; refusals."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from preprocess.errors import ConfigError
from preprocess.masking import STRATEGIES, BatchMasker, Corruption, Sequences, find_candidates
from preprocess.text.continuations import continuation_table, find_continuations

STAY = Corruption(0, 0, 100)
RATE = 0.3


@pytest.fixture(scope="module")
def ids(tiny_tokenizer) -> np.ndarray:
    """Rows of 6 to 20 words, with special tokens and padding."""
    generator = np.random.default_rng(0)
    words = [name for name in tiny_tokenizer.get_vocab() if not name.startswith(("[", "##"))]
    texts = [" ".join(generator.choice(words, 6 + i % 15)) for i in range(40)]
    # A copy: the tokenizer of all tests would go on padding, and be saved so.
    return copy.deepcopy(tiny_tokenizer)(texts, padding=True, return_tensors="np")["input_ids"]


def arguments(name: str, ids: np.ndarray, tokenizer):
    """What a strategy reads beside the ids: of the masker, and of a call."""
    generator = np.random.default_rng(1)
    record = STRATEGIES[name]
    scores = generator.normal(0, 1, ids.shape).astype(np.float16)
    match = (generator.random(ids.shape) < 0.2) & find_candidates(
        ids.ravel(), tokenizer.all_special_ids).reshape(ids.shape)
    fixed = {"policy": "selective"} if "policy" in record.needs else {}
    call = {"scores": scores} if {"scores", "policy", "means"} & record.needs else {}
    if "match" in record.needs:
        call["match"] = match
    if "frequency" in record.needs:
        call["octaves"] = generator.integers(0, 5, len(tokenizer)).astype(np.uint8)
    return fixed, call


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_batch_is_masked_as_the_strategy_chooses(name, ids, tiny_tokenizer):
    fixed, call = arguments(name, ids, tiny_tokenizer)
    masker = BatchMasker(tiny_tokenizer, name, rate=RATE, seed=3, **fixed)
    found = masker(ids, step=5, **call)
    assert found.input_ids.dtype == found.labels.dtype == np.int64
    masked = found.labels != -100
    special = np.isin(ids, tiny_tokenizer.all_special_ids)
    assert masked.any() and not (masked & special).any()
    assert (found.labels[masked] == ids[masked]).all()
    assert (found.input_ids[~masked] == ids[~masked]).all()

    offsets = np.arange(len(ids) + 1) * ids.shape[1]
    rows = np.arange(len(ids))
    match = call.get("match")
    words = find_continuations(ids.ravel(), offsets, continuation_table(tiny_tokenizer))
    expected = STRATEGIES[name].choose(Sequences(
        offsets=offsets, positions=np.arange(ids.size), candidates=~special.ravel(), rate=RATE,
        seed=3, epoch=5, windows=rows, documents=rows,
        scores=call["scores"].ravel() if "scores" in call else None,
        continues_word=words if "words" in STRATEGIES[name].needs else None,
        matched=None if match is None else np.flatnonzero(match),
        matched_counts=None if match is None else match.sum(1),
        octaves=call["octaves"][ids.ravel()] if "octaves" in call else None,
        policy=STRATEGIES["selective"].choose if fixed else None,
    ))
    assert np.flatnonzero(masked).tolist() == expected.tolist()
    if STRATEGIES[name].budget == "match" and name != "shuffled":
        assert masked.sum(1).tolist() == match.sum(1).tolist()
    again = masker(ids, step=5, **call)
    assert (again.input_ids == found.input_ids).all() and (again.labels == found.labels).all()


def test_steps_draw_anew_and_the_rate_is_met(ids, tiny_tokenizer):
    masker = BatchMasker(tiny_tokenizer, rate=RATE, corruption=STAY)
    steps = [masker(ids, step=step) for step in range(50)]
    masked = np.stack([one.labels != -100 for one in steps])
    assert all((one.input_ids == ids).all() for one in steps)  # all of them kept
    assert len({one.tobytes() for one in masked}) == 50
    candidates = ~np.isin(ids, tiny_tokenizer.all_special_ids)
    # Each of 40 rows x 50 steps rounds to one of two neighbours: a standard deviation below 0.4 %.
    assert masked.sum() / (50 * candidates.sum()) == pytest.approx(RATE, rel=0.02)
    assert not masked[:, ~candidates].any()


def test_corruption_and_seeds(ids, tiny_tokenizer):
    all_masks = BatchMasker(tiny_tokenizer, rate=RATE, corruption=Corruption(100, 0, 0))
    found = all_masks(ids, step=0)
    assert (found.input_ids[found.labels != -100] == tiny_tokenizer.mask_token_id).all()
    other = BatchMasker(tiny_tokenizer, rate=RATE, seed=43)(ids, step=0)
    assert (other.labels != found.labels).any()


def test_whole_words_of_scores(tiny_tokenizer):
    """Pieces of one word have scores -1 and 3; the word is taken whole, by the 3."""
    vocab = tiny_tokenizer.get_vocab()
    piece = next((name for name in vocab if name.startswith("##")), None)
    if piece is None:
        pytest.skip("the tokenizer has no pieces")
    a, b = vocab["good"], vocab[piece]
    ids = np.array([[2, a, b, a, a, a, 3]])
    scores = np.array([[0, -1, 3, 1, -1, -1, 0]], np.float16)
    for whole, expected in ((False, [2]), (True, [1, 2])):
        masker = BatchMasker(tiny_tokenizer, "selective", rate=0.4, whole_words=whole)
        masked = np.flatnonzero(masker(ids, step=0, scores=scores).labels[0] != -100)
        assert set(expected) <= set(masked.tolist())


def test_tensors_and_empty_batches(ids, tiny_tokenizer):
    import torch

    masker = BatchMasker(tiny_tokenizer)
    found = masker(torch.from_numpy(ids), step=0)
    assert (found.labels == masker(ids, step=0).labels).all()
    assert masker(np.zeros((0, 4), np.int64), step=0).labels.shape == (0, 4)


@pytest.mark.parametrize("fixed, call, message", [
    ({"strategy": "nothing"}, {}, "strategy 'nothing': known are random"),
    ({"strategy": "inverse"}, {}, "strategy inverse: follows another one; name it with policy"),
    ({"strategy": "random", "policy": "top"}, {}, "strategy random: follows no policy"),
    ({"strategy": "inverse", "policy": "nothing"}, {}, "strategy 'nothing': known are"),
    ({"strategy": "selective"}, {}, "strategy selective: needs scores"),
    ({"strategy": "random"}, {"scores": 0}, "strategy random: reads no scores"),
    ({"strategy": "random_matched"}, {}, "strategy random_matched: needs match"),
    ({"strategy": "frequency_matched"}, {"match": 0}, "needs octaves"),
    ({"strategy": "top"}, {"scores": 1}, r"scores has shape \(40, 1\): must be \(40, \d+\)"),
    ({"rate": 0.0}, {}, "the mask rate is 0.0"),
    ({"temperature": 2.0}, {}, "strategy random: reads no temperature; leave it out"),
    ({"strategy": "band", "center": 0.2}, {}, "strategy band: reads no center; known are centre"),
])
def test_wrong_arguments_are_refused(fixed, call, message, ids, tiny_tokenizer):
    """0 stands for an array of the batch's shape, 1 for one of another."""
    arrays = {name: np.zeros((len(ids), 1) if other else ids.shape)
              for name, other in call.items()}
    with pytest.raises(ValueError, match=message):
        BatchMasker(tiny_tokenizer, **fixed)(ids, step=0, **arrays)


def test_scores_beyond_half_precision_are_refused(ids, tiny_tokenizer):
    """They would be infinite and tie, and below the least of them nothing would be masked."""
    masker, scores = BatchMasker(tiny_tokenizer, "top"), np.zeros(ids.shape)
    scores[0, 1], scores[1] = 65504, -np.inf
    assert (masker(ids, step=0, scores=scores).labels[1] == -100).all()
    scores[0, 2] = -1e6
    with pytest.raises(ValueError, match=r"scores reach 1e\+06: at most 65504, the largest"):
        masker(ids, step=0, scores=scores)


def test_ids_of_another_kind_are_refused(ids, tiny_tokenizer):
    masker = BatchMasker(tiny_tokenizer)
    for wrong, message in ((ids.astype(float), "must be integers"), (ids[0], r"must be integers"),
                           (ids + 1000, "must be in"), (-ids, "input_ids go from -")):
        with pytest.raises(ValueError, match=message):
            masker(wrong, step=0)
    tiny = type("Without", (), {"mask_token_id": None})()
    with pytest.raises(ConfigError, match="no mask token"):
        BatchMasker(tiny)
