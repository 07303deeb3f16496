"""What is not supported, as the table of the front README has it: each is refused by its name."""

from __future__ import annotations

import csv
import json
from typing import Any

import pytest
import torch
import transformers

from preprocess import tokenize_corpus
from preprocess.corpus import load_task
from preprocess.errors import ConfigError, DataError
from train.model import FAMILIES, check_agreement, load_classifier, load_config, load_tokenizer
from train.stages.inference import check_trained

TINY: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 64,
}

# ---------------------------------------------------------------------------- model families


@pytest.mark.parametrize(("family", "options", "message"), [
    ("GPT2", {"architectures": ["GPT2LMHeadModel"]}, "a decoder, which predicts the next token"),
    ("T5", {"architectures": ["T5ForConditionalGeneration"]}, "a decoder, .* model type 't5'"),
    ("Bert", {"is_decoder": True}, "a decoder, .* model type 'bert' is not supported as a decoder"),
    ("Bert", {"architectures": ["BertLMHeadModel"]}, "a decoder, .* 'bert'"),
    ("ModernBertDecoder", {}, "'modernbert-decoder' is not supported"),
    ("Electra", {}, "model type 'electra' is not supported"),
    ("Albert", {}, "model type 'albert' is not supported"),
    ("DebertaV2", {}, "model type 'deberta-v2' is not supported"),
    ("XLMRoberta", {}, "model type 'xlm-roberta' is not supported"),
])
def test_other_families_are_refused(family, options, message, tmp_path):
    getattr(transformers, f"{family}Config")(**options).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"{message}.*; known: {', '.join(FAMILIES)}$"):
        load_config(str(tmp_path))


# ------------------------------------------------------------------------------ vocabularies


@pytest.fixture(scope="module")
def large(tmp_path_factory, tiny_tokenizer) -> str:
    """A classifier with a vocabulary of 65,537 entries."""
    tokenizer = load_tokenizer_copy(tiny_tokenizer, tmp_path_factory.mktemp("tokenizer"))
    tokenizer.add_tokens([f"more{number}" for number in range((1 << 16) + 1 - len(tokenizer))])
    folder = tmp_path_factory.mktemp("large") / "model"
    config = transformers.BertConfig(**TINY | {"vocab_size": len(tokenizer), "hidden_size": 2})
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def load_tokenizer_copy(tokenizer: Any, folder: Any) -> Any:
    tokenizer.save_pretrained(folder)
    return load_tokenizer(str(folder))


def test_a_vocabulary_beyond_16_bit_is_refused(large, reviews_file, tmp_path):
    message = "65,537 ids, and a token store keeps 16-bit ids: at most 65,536"
    with pytest.raises(DataError, match=message):
        check_agreement(load_config(large), load_tokenizer(large), large)
    for more in ([], ["--dry_run"]):
        with pytest.raises(DataError, match=message):
            tokenize_corpus.main(["--input", reviews_file, "--tokenizer", large, "--output",
                                  str(tmp_path / "s"), *more])
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------- labels


def written(path: Any, labels: list[Any]) -> str:
    """A labelled file with two rows of each label."""
    rows = [{"text": f"text {number}", "label": label} for number, label in enumerate(2 * labels)]
    with open(path, "w", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            table = csv.DictWriter(file, ["text", "label"])
            table.writeheader()
            table.writerows(rows)
    return str(path)


@pytest.mark.parametrize(("ending", "labels", "message"), [
    ("jsonl", [["joy", "anger"], ["joy"]], "several labels for one text, multi-label, are not"),
    ("jsonl", [{"joy": 1, "anger": 0}, {"joy": 0}], "multi-label, are not supported"),
    ("csv", ["[1, 0, 1]", "[0, 0, 1]"], "'\\[0, 0, 1\\]'.*multi-label, are not supported"),
    ("csv", ["['joy']", "['joy', 'anger']"], "multi-label, are not supported"),
    ("jsonl", [0.5, 3.8], "'0.5' .float.*; learning numbers, regression, is not"),
    ("csv", ["1.0", "3.8", "-2"], "as '3.8'; learning numbers, regression, is not supported"),
    ("csv", [".5", "1e-3"], "learning numbers, regression, is not supported"),
])
def test_labels_that_are_no_classes_are_refused(ending, labels, message, tmp_path):
    file = written(tmp_path / f"a.{ending}", labels)
    with pytest.raises(DataError, match=message):
        load_task("custom", train_file=file, test_file=file)


@pytest.mark.parametrize(("ending", "labels", "names"), [
    ("csv", ["1.0", "2.0"], ("1.0", "2.0")), ("jsonl", [1.0, 2], ("1", "2")),
    ("csv", ["4.5 stars", "5 stars"], ("4.5 stars", "5 stars")),
    ("csv", ["0.5", "no number"], ("0.5", "no number")), ("csv", ["[a", "b]"], ("[a", "b]")),
])
def test_labels_that_look_like_it_and_are_classes_are_read(ending, labels, names, tmp_path):
    train = written(tmp_path / f"a.{ending}", labels * 20)
    assert load_task("custom", train_file=train, test_file=train).labels == names


# ---------------------------------------------------------------------------------- checkpoints


def classifier(folder: Any, tokenizer: Any, **options: Any) -> str:
    """Save a classifier of another kind with its tokenizer."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**TINY | {"vocab_size": len(tokenizer)}, **options)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


OTHER_KINDS = {
    "cross-encoder": ({"num_labels": 1}, "gives a number and no classes .regression, or a cross-"),
    "regression": ({"num_labels": 2, "problem_type": "regression"}, "a number and no classes"),
    "multi-label": ({"num_labels": 2, "problem_type": "multi_label_classification"},
                    "gives several labels for one text .multi-label."),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a_classifier_of_another_kind_is_no_classifier_and_still_an_encoder(
    kind, tmp_path, tiny_tokenizer
):
    options, message = OTHER_KINDS[kind]
    name = classifier(tmp_path / "given", tiny_tokenizer, **options)
    config = load_config(name)
    with pytest.raises(ConfigError, match=f"{message}.*; give another$"):
        check_trained(config, "ForSequenceClassification", name, "give another")
    names = tuple(config.id2label[label] for label in range(config.num_labels))
    if len(names) > 1:
        with pytest.raises(ConfigError):
            load_classifier(name, names, 0, trained=True)
    # Its encoder is a place to start from; the head is drawn, and learns classes.
    model = load_classifier(name, ("LABEL_0", "LABEL_1"), 7)
    given = transformers.BertForSequenceClassification.from_pretrained(name)
    assert torch.equal(model.bert.pooler.dense.weight, given.bert.pooler.dense.weight)
    if given.config.num_labels == 2:
        assert not torch.equal(model.classifier.weight, given.classifier.weight)
    output = model(input_ids=torch.tensor([[2, 5, 3]]), labels=torch.tensor([1]))
    assert output.loss.item() == pytest.approx(-output.logits.log_softmax(-1)[0, 1].item())
    assert model.config.problem_type in (None, "single_label_classification")
