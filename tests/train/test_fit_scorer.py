"""The token scorer: annotations to examples, the split, the baselines, the whole command."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from preprocess.errors import DataError
from preprocess.store import TokenStore, open_array, write_array
from tests.support.stores import write
from train import fit_scorer
from train.fit_scorer import NOT_ANNOTATED, Annotated
from train.stages.examples import IGNORED
from train.stages.inference import Template

TEMPLATE = Template((2,), (), (3,), 0)


def write_annotations(prefix, tokenizer, documents, importance) -> TokenStore:
    """A store of `documents` (lists of sentences of ids) and one importance value a token."""
    write(prefix, documents, tokenizer=tokenizer)
    store = TokenStore.open(str(prefix))
    write_array(
        store.shards[0], "", "importance", np.array(importance, dtype=np.uint8), {"made_by": "test"}
    )
    return store


def test_other_tokens_or_importance_are_other_annotations(tmp_path, tiny_tokenizer):
    found = {
        fit_scorer.annotation_digest(
            write_annotations(tmp_path / str(number), tiny_tokenizer, documents, importance)
        )
        for number, (documents, importance) in enumerate([
            ([[[10, 11]]], [0, 1]), ([[[10, 12]]], [0, 1]), ([[[10, 11]]], [1, 0]),
            ([[[10], [11]]], [0, 1]), ([[[10, 11]]], [0, 1]),
        ])
    }
    assert len(found) == 4


def test_only_annotated_sentences_become_examples_cut_to_the_limit(tmp_path, tiny_tokenizer):
    store = write_annotations(
        tmp_path / "a", tiny_tokenizer,
        [[[10, 11, 12], [13]], [], [[14, 15], []]],
        [0, 1, 255, 255, 0, 0],
    )
    found = fit_scorer.read_annotations(store, limit=10)
    assert [t.tolist() for t in found.tokens] == [[10, 11, 12], [14, 15]]
    assert [i.tolist() for i in found.importance] == [[0, 1, 255], [0, 0]]
    tokens, labels = found.counted()
    assert tokens.tolist() == [10, 11, 14, 15] and labels.tolist() == [False, True, False, False]
    late = write_annotations(  # nothing annotated is left of the second sentence
        tmp_path / "b", tiny_tokenizer, [[[10, 11, 12]], [[13, 14, 15]]], [1, 0, 0, 255, 255, 1])
    assert [t.tolist() for t in fit_scorer.read_annotations(late, limit=2).tokens] == [[10, 11]]


@pytest.mark.parametrize(
    ("importance", "message"),
    [([255, 255], "no token is annotated"), ([0, 255], "no token is important")],
)
def test_annotations_that_teach_nothing_are_refused(tmp_path, tiny_tokenizer, importance, message):
    store = write_annotations(tmp_path / "a", tiny_tokenizer, [[[10, 11]]], importance)
    with pytest.raises(DataError, match=message):
        fit_scorer.read_annotations(store, limit=10)


def test_special_tokens_and_not_annotated_ones_have_no_target():
    sentences = Annotated(
        [np.array([10, 11, 12], np.uint16)], [np.array([1, NOT_ANNOTATED, 0], np.uint8)],
        np.zeros(1, np.uint64),
    )
    examples = fit_scorer.encode(sentences, TEMPLATE, positive_weight=3.0)
    assert examples.input_ids[0].tolist() == [2, 10, 11, 12, 3]
    assert examples.targets[0].tolist() == [IGNORED, 1, IGNORED, 0, IGNORED]
    assert examples.mass.tolist() == [4.0]


def test_the_split_is_by_text_and_does_not_depend_on_order():
    generator = np.random.default_rng(0)
    keys = np.repeat(generator.integers(0, 2**63, 40, dtype=np.uint64), 3)
    is_dev = fit_scorer.choose_dev(keys, 0.1)
    assert is_dev.sum() == 4 * 3
    assert not set(keys[is_dev]) & set(keys[~is_dev])
    shuffled = generator.permutation(len(keys))
    assert (fit_scorer.choose_dev(keys[shuffled], 0.1) == is_dev[shuffled]).all()
    two = np.array([5, 9], dtype=np.uint64)
    for fraction in (0.01, 0.99):  # something is left on both sides
        assert fit_scorer.choose_dev(two, fraction).tolist() == [True, False]
    with pytest.raises(DataError, match="one annotated text"):
        fit_scorer.choose_dev(two[:1], 0.1)


def test_baselines_by_hand():
    """Type 10 is important twice of two, 11 never; the overall rate is a half."""
    train = Annotated(
        [np.array([10, 11, 10, 11])], [np.array([1, 0, 1, 0])], np.zeros(1, np.uint64)
    )
    tokens, labels = train.counted()
    rates = fit_scorer.token_type_rates(tokens, labels, 13)
    assert rates[[10, 11, 12]].tolist() == pytest.approx([2.5 / 3, 0.5 / 3, 0.5])
    dev = Annotated([np.array([10, 11, 12, 10])], [np.array([1, 0, 0, 0])], np.zeros(1, np.uint64))
    found = fit_scorer.baselines(train, dev, 13)
    assert found["all_ones"] == pytest.approx(
        {"precision": 0.25, "recall": 1.0, "f1": 0.4, "average_precision": 0.25}
    )
    assert found["token_type"] == pytest.approx(
        {"precision": 0.5, "recall": 1.0, "f1": 2 / 3, "average_precision": 0.5}
    )


@pytest.mark.parametrize(("found", "important", "sentence"), [
    (0.31, 5, None), (0.31, 7, "none of the 7 important held-out tokens has a score above 0"),
    (0.30, 5, "0.3000 on 40 held-out .* not above the 0.3000 of .* token_type"),
    (0.0, 0, "no important token is held out"),
])
def test_a_scorer_that_is_not_above_its_baselines_is_named(found, important, sentence):
    weak = fit_scorer.find_weak({
        "average_precision": found, "num_dev_important": important, "num_dev_tokens": 40,
        "recall": 0.2 if important == 5 else 0.0,
        "baselines": {"all_ones": {"average_precision": 0.1},
                      "token_type": {"average_precision": 0.3}}})
    assert len(weak) == (sentence is not None)
    assert sentence is None or re.search(sentence, weak[0])


@pytest.mark.slow
def test_the_command_learns_which_words_matter(
    tmp_path, tiny_tokenizer, tiny_encoder, run_command_line
):
    """Published bug B19: without training, what to save was undefined. Good words matter here."""
    generator = np.random.default_rng(0)
    good = set(tiny_tokenizer.convert_tokens_to_ids(["good", "bad"]))
    documents = [
        [generator.integers(5, 40, size=8).tolist() for _ in range(2)] for _ in range(40)
    ]
    flat = [i for document in documents for sentence in document for i in sentence]
    store = write_annotations(
        tmp_path / "a", tiny_tokenizer, documents, [int(i in good) for i in flat]
    )
    assert open_array(store.shards[0], "", "importance")[0].any()
    command = [
        "train/fit_scorer.py", "--annotations", store.prefix, "--model_name_or_path", tiny_encoder,
        "--output_dir", str(tmp_path / "run"), "--learning_rate", "1e-2", "--max_seq_length", "16",
        "--train_batch_size", "8", "--num_train_epochs", "4",
    ]
    planned = run_command_line(*command, "--dry_run")
    assert "steps: 9 per epoch x 4 epochs = 36" in planned.stdout
    assert not (tmp_path / "run").exists()
    done = run_command_line(*command)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["f1"] > results["baselines"]["all_ones"]["f1"]
    assert results["baselines"]["token_type"]["f1"] > 0.9  # the type decides everything here
    assert "token_type" in done.stdout
    assert [line for line in done.stdout.splitlines() if "warning: average" in line] == [
        f"warning: {sentence}" for sentence in results["weak"]]
    from transformers import AutoModelForTokenClassification

    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "run/hf")
    assert model.config.id2label == {0: "other", 1: "important"}
    lineage = json.loads((tmp_path / "run/hf/lineage.json").read_text())["stages"]
    assert lineage[-1]["stage"] == "fit_scorer"
    assert "finished already" in run_command_line(*command).stdout
