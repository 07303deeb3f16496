"""Importance: the buffer heuristic against a one-at-a-time twin, and annotation of real texts."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import re
import typing

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from preprocess.corpus import load_task
from preprocess.errors import ConfigError
from preprocess.files import WriterLock
from preprocess.store import TokenStore, open_array
from preprocess.text.continuations import WordTable
from preprocess.text.stop_words import STOP_WORDS, is_punctuation
from tests.support.stores import write
from train import annotate, engine
from train.config import AnnotateConfig
from train.stages.importance import (
    CRITERIA,
    IMPORTANCE,
    choose_options,
    drop_unremoved,
    find_important,
    measure_gradient,
    measure_left_out,
    take_above,
    take_share,
)
from train.stages.inference import Runner, Template
from train.stages.queries import Query, cut_to_fit


def brute_force(confidence_of, sequence, full, delta, criterion):
    """METHOD in its plainest form: one sequence, one buffer, one token at a time."""

    def close(buffer):
        part = confidence_of(tuple(buffer))
        return abs(full - part) < delta if criterion == "absolute" else full - part < delta

    marks = [False] * len(sequence)
    if criterion == "strict" and len(sequence) and close([]):
        return marks
    buffer = []
    for position, token in enumerate(sequence):
        buffer.append(token)
        if close(buffer):
            marks[position] = True
            buffer.pop()
    return marks


def hashed(salt, owner, buffer, levels):
    """A table-driven confidence: any buffer has its own, drawn from few values to make ties."""
    key = repr((salt, owner, tuple(buffer))).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big") % levels / levels


@settings(max_examples=300, deadline=None)
@example(sequences=[[], [4], []], salt=0, levels=50, delta=0.1, criterion="signed")
@example(sequences=[[]], salt=0, levels=50, delta=0.1, criterion="strict")
@given(
    sequences=st.lists(st.lists(st.integers(0, 5), max_size=9), max_size=6),
    salt=st.integers(0, 2**32),
    levels=st.sampled_from([2, 3, 7, 50, 1000]),
    delta=st.sampled_from([0.01, 0.1, 0.25, 0.5]),
    criterion=st.sampled_from(sorted(CRITERIA)),
)
def test_equals_brute_force(sequences, salt, levels, delta, criterion):
    """Published bug B20: a sentence without word pieces ended the program."""
    full = [hashed(salt, i, ("full", *s), levels) for i, s in enumerate(sequences)]
    calls = []

    def confidence(buffers, owners):
        calls.append(len(buffers))
        return [hashed(salt, o, b, levels) for b, o in zip(buffers, owners, strict=True)]

    found = find_important(confidence, sequences, full, delta, criterion)
    assert [marks.tolist() for marks in found] == [
        brute_force(lambda b, i=i: hashed(salt, i, b, levels), s, full[i], delta, criterion)
        for i, s in enumerate(sequences)
    ]
    longest = max(map(len, sequences), default=0)
    assert len(calls) <= longest + (criterion == "strict"), "one call a step"
    assert all(calls), "never asks about nothing"


ALIKE = dict.fromkeys([(), (1,), (2,)], 0.95)


@pytest.mark.parametrize(("criteria", "table", "full", "delta", "expected"), [
    # 3 is judged beside 1 alone: 2 was important and left the buffer.
    ("signed", {(1,): 0.5, (1, 2): 0.9, (1, 3): 0.6}, 0.9, 0.01, [False, True, False]),
    # An important first token leaves an empty buffer.
    ("signed", {(1,): 0.9, (2,): 0.2, (2, 3): 0.895}, 0.9, 0.01, [True, False, True]),
    # The criteria differ above the full confidence, and where the empty buffer is close to it.
    ("signed strict", {(): 0.5, (1,): 0.99}, 0.9, 0.01, [True]),
    ("absolute", {(): 0.5, (1,): 0.99}, 0.9, 0.01, [False]),
    ("signed", ALIKE, 0.95, 0.01, [True, True]),
    ("strict", ALIKE, 0.95, 0.01, [False, False]),
    # Quarters are exact in binary: the difference is delta itself, or just less.
    ("signed absolute strict", {(): 0.0, (1,): 0.5}, 0.75, 0.25, [False]),
    ("signed absolute strict", {(): 0.0, (1,): np.nextafter(0.5, 1)}, 0.75, 0.25, [True]),
])
def test_importance_by_hand(criteria, table, full, delta, expected):
    def confidence(buffers, owners):
        return [table[tuple(buffer)] for buffer in buffers]

    for criterion in criteria.split():
        sequence = list(range(1, len(expected) + 1))
        (found,) = find_important(confidence, [sequence], [full], delta, criterion)
        assert found.dtype == bool and found.tolist() == expected


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="signed, absolute, strict"):
        find_important(None, [[1]], [0.5], 0.01, "abs")
    with pytest.raises(ValueError, match="2 full confidences for 1 sequences"):
        find_important(None, [[1]], [0.5, 0.5], 0.01)


# ------------------------------------------------------------------ the command, on a tiny task

LIMIT = 16
TEXTS = [
    ("The film is good. The plot was dull and slow!", "neg"),
    ("A great hero.", "pos"),
    ("It was never boring, but it has a weak ending.", "pos"),
    ("Bad music in this film. Too slow. Not funny.", "neg"),
    ("\u200b", "pos"),  # the tokenizer leaves nothing of it
    ("One two.", "neg"),
    ("The actor feels great and warm in this love story of the war and the hero and love.", "pos"),
    ("This one seems unlike that.", "neg"),
    ("A film.", "pos"),
    ("A film.", "neg"),
]


def classifier_config(tokenizer, labels, **options):
    return BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=LIMIT, initializer_range=0.5,
        id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)},
        **options,
    )


@pytest.fixture(scope="module")
def make_classifier(tmp_path_factory, tiny_tokenizer):
    """Write an untrained classifier with the given labels; right about half of the time."""

    def make(labels, seed=0):
        folder = tmp_path_factory.mktemp("classifier")
        torch.manual_seed(seed)
        config = classifier_config(tiny_tokenizer, labels)
        BertForSequenceClassification(config).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def task_files(tmp_path):
    """The flags of a custom task over `TEXTS`."""
    path = tmp_path / "train.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *TEXTS])
    flags = ["--task", "custom"]
    for split in ("train", "validation", "test"):
        flags += [f"--{split}_file", str(path)]
    return flags


RAW = ("--keep_punctuation", "--keep_last")


def run(task_files, folder, output, *options):
    """Annotate with the buffer, without any filter."""
    run_plain(task_files, folder, output, "--delta", "0.1", *RAW, *options)


def run_plain(task_files, folder, output, *options):
    annotate.main([
        *task_files, "--model_name_or_path", str(folder), "--output", str(output),
        "--max_seq_length", str(LIMIT), "--dtype", "fp32", *options,
    ])


def read(output):
    """Each sequence's ids and importance, by document."""
    store = TokenStore.open(output)
    (shard,) = store.shards
    importance, info = open_array(shard, "", "importance")
    documents = []
    for first, last in zip(shard.document_offsets[:-1], shard.document_offsets[1:], strict=True):
        bounds = shard.sequence_offsets[first : last + 1].tolist()
        documents.append([
            (shard.tokens[a:b].tolist(), importance[a:b].tolist())
            for a, b in zip(bounds[:-1], bounds[1:], strict=True)
        ])
    return documents, info


def ask_alone(model, label, tokens, aspect=None):
    """(P(label), whether label is the answer), one input without a batch."""
    ids = [2, *tokens, 3] if aspect is None else [2, *aspect, 3, *tokens, 3]
    types = [0] * len(ids) if aspect is None else [0] * (len(aspect) + 2) + [1] * (len(tokens) + 1)
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([types])
        ).logits[0].double()
    return logits.softmax(0)[label].item(), logits.argmax().item() == label


def annotate_alone(model, label, tokens, criterion="signed", aspect=None, delta=0.1):
    """The twin of the command for one sequence: 0, 1 or 255 for each token."""
    space = LIMIT - 2 if aspect is None else LIMIT - 3 - len(aspect)
    seen = tokens[:space]
    full, is_right = ask_alone(model, label, seen, aspect)
    if not is_right:
        return [255] * len(tokens)

    def confidence_of(buffer):
        return ask_alone(model, label, buffer, aspect)[0]

    found = brute_force(confidence_of, seen, full, delta, criterion)
    return [int(mark) for mark in found] + [255] * (len(tokens) - len(seen))


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize("batch_tokens", ["16", "8192"])
def test_command_equals_one_at_a_time(
    task_files, make_classifier, no_process_group, tmp_path, criterion, batch_tokens, capsys
):
    folder = make_classifier(["neg", "pos"])
    options = ("--criterion", criterion, "--batch_tokens", batch_tokens)
    run(task_files, folder, tmp_path / "A", *options)
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    documents, info = read(tmp_path / "A")
    texts = list(dict.fromkeys(text for text, _ in TEXTS))
    assert len(documents) == len(texts)
    for text, sequences in zip(texts, documents, strict=True):
        labels = [("neg", "pos").index(label) for other, label in TEXTS if other == text]
        for tokens, importance in sequences:
            expected = np.array([annotate_alone(model, y, tokens, criterion) for y in labels])
            # A text with both labels is annotated for the one that the classifier gives.
            assert importance == expected.min(0).tolist()
    flat = [mark for sequences in documents for _, marks in sequences for mark in marks]
    assert set(flat) == {0, 1, 255}
    assert [len(sequences) for sequences in documents][:5] == [2, 1, 1, 3, 0]
    options = info["identity"]["options"]
    assert (options["delta"], options["criterion"]) == (0.1, criterion)
    assert "classified correctly" in capsys.readouterr().out


def test_fp16_gives_the_same_annotation(
    task_files, make_classifier, no_process_group, tmp_path, capsys
):
    folder = make_classifier(["neg", "pos"])
    run(task_files, folder, tmp_path / "A")
    assert "asked again in fp32" not in capsys.readouterr().out
    run(task_files, folder, tmp_path / "B", "--dtype", "fp16")
    assert re.search(r"\d of the inputs asked again in fp32 and \d+ repeated alone .*\(cpu, fp16\)",
                     capsys.readouterr().out)
    (exact, as_fp32), (found, as_fp16) = read(tmp_path / "A"), read(tmp_path / "B")
    assert found == exact
    assert as_fp32["identity_digest"] == as_fp16["identity_digest"], "it is no other annotation"
    assert as_fp32["numerics"]["dtype"] == "fp32" and as_fp16["numerics"]["dtype"] == "fp16"


def test_small_differences_are_asked_for_in_fp32(
    task_files, make_classifier, no_process_group, tmp_path, monkeypatch, capsys
):
    folder = make_classifier(["neg", "pos"])
    small = ("--delta", "0.004")
    with pytest.raises(ConfigError, match="fp16 with --delta 0.004: .*; give fp32, or a larger"):
        run(task_files, folder, tmp_path / "A", "--dtype", "fp16", *small)
    monkeypatch.setattr(annotate, "choose_dtype", lambda dtype: "fp16")  # as on a GPU
    run(task_files, folder, tmp_path / "A", "--dtype", "auto", *small)
    assert "(cpu, fp32)" in capsys.readouterr().out


XML = """<sentences>
<sentence id="1"><text>The film is good but the script was bad.</text><aspectCategories>
<aspectCategory category="film" polarity="positive"/>
<aspectCategory category="music" polarity="negative"/>
<aspectCategory category="story" polarity="conflict"/></aspectCategories></sentence>
<sentence id="2"><text>A warm hero. Never dull.</text><aspectCategories>
<aspectCategory category="hero actor" polarity="positive"/>
<aspectCategory category="plot" polarity="positive"/></aspectCategories></sentence>
<sentence id="3"><text>It is one great film and story and script and plot and love.</text>
<aspectCategories><aspectCategory category="director of the film and of the music and the script"
polarity="negative"/></aspectCategories></sentence>
<sentence id="4"><text>The film is good but the music was bad.</text><aspectCategories>
<aspectCategory category="film" polarity="positive"/></aspectCategories></sentence>
</sentences>"""  # the hash of its text makes the last one validation


def test_aspects_of_a_text_are_united(make_classifier, no_process_group, tmp_path, tiny_tokenizer):
    for name in ("train.xml", "test.xml"):
        (tmp_path / name).write_text(XML)
    flags = ["--task", "semeval14_restaurant", "--data_dir", str(tmp_path)]
    examples = load_task("semeval14_restaurant", data_dir=str(tmp_path)).splits["train"]
    assert len(examples) >= 4
    labels = ["neutral", "negative", "positive"]  # the classifier's own order
    annotated = mixed = 0
    for seed in range(4):
        folder = make_classifier(labels, seed)
        run(flags, folder, tmp_path / f"A{seed}")
        model = BertForSequenceClassification.from_pretrained(folder).eval()
        documents, _ = read(tmp_path / f"A{seed}")
        texts = list(dict.fromkeys(example.text for example in examples))
        assert len(documents) == len(texts) and all(len(s) == 1 for s in documents)
        for text, ((tokens, importance),) in zip(texts, documents, strict=True):
            marks = []
            for one in examples:
                if one.text == text:
                    aspect = tiny_tokenizer(one.aspect, add_special_tokens=False)["input_ids"]
                    aspect = aspect[: max(LIMIT - 3 - len(tokens), (LIMIT - 3) // 2)]
                    label = labels.index(("positive", "negative", "neutral")[one.label])
                    marks.append(annotate_alone(model, label, tokens, aspect=aspect))
            marks = np.array(marks)
            known = (marks == 1).any(0).astype(int)
            known[(marks == 255).all(0)] = 255
            assert importance == known.tolist()
            annotated += (known != 255).any()
            mixed += len(marks) > 1 and (marks != 255).any(1).all()
    assert annotated >= 2 and mixed, "some text is annotated for two aspects"


def test_annotation_is_made_again_where_unfinished_or_asked_for(
    task_files, make_classifier, no_process_group, tmp_path
):
    folder = make_classifier(["neg", "pos"])
    run(task_files, folder, tmp_path / "A")
    before, _ = read(tmp_path / "A")
    (tmp_path / "A.importance.json").unlink()
    run(task_files, folder, tmp_path / "A")
    assert read(tmp_path / "A")[0] == before
    run(task_files, folder, tmp_path / "A", "--delta", "0.4", "--overwrite")
    after, info = read(tmp_path / "A")
    assert after != before and info["identity"]["options"]["delta"] == 0.4


def test_one_writer_an_annotation(task_files, make_classifier, no_process_group, tmp_path):
    folder = make_classifier(["neg", "pos"])
    with WriterLock(tmp_path / "A"):
        with pytest.raises(ConfigError, match=r"A\.lock: another process writes here"):
            run(task_files, folder, tmp_path / "A")
        run(task_files, folder, tmp_path / "A", "--dry_run")
    run(task_files, folder, tmp_path / "A")
    assert not list(tmp_path.glob("*.lock"))


def test_other_stores_are_not_replaced(
    task_files, make_classifier, no_process_group, tmp_path, tiny_tokenizer
):
    write(tmp_path / "A", [[[7, 8]]], tokenizer=tiny_tokenizer)
    with pytest.raises(ConfigError, match="another token store is there"):
        run(task_files, make_classifier(["neg", "pos"]), tmp_path / "A")


@pytest.mark.parametrize("num_aspect", [0, 3, 7, 40])
@pytest.mark.parametrize("num_tokens", [1, 7, 8, 40])
def test_long_aspect_and_long_text_fit(num_aspect, num_tokens):
    """Published bug B21: the aspect came on top of a text cut to the limit."""
    aspect, tokens = cut_to_fit([1] * num_aspect, [2] * num_tokens, 13)
    assert len(aspect) + len(tokens) == min(13, num_aspect + num_tokens)
    assert len(tokens) >= min(num_tokens, 7)


def test_labels_are_matched_by_name(task_files, make_classifier, no_process_group, tmp_path):
    """Published bug B22: two readers of one task gave the labels different numbers."""
    config = classifier_config("x" * 9, ["pos", "neg"])
    files = dict(zip(task_files[::2], task_files[1::2], strict=True))
    task = load_task("custom", **{k[2:]: v for k, v in files.items() if k != "--task"})
    assert task.labels == ("neg", "pos")
    assert annotate.match_labels(task, config, "M") == [1, 0]
    for labels in (["LABEL_0", "LABEL_1"], ["neg", "neutral", "pos"]):
        with pytest.raises(ConfigError, match=f"task {tmp_path.name} has neg, pos; give"):
            run(task_files, make_classifier(labels), tmp_path / "A")
    assert not (tmp_path / "A.json").exists()


def test_ranks_share_the_work(task_files, make_classifier, no_process_group, tmp_path, monkeypatch):
    folder = make_classifier(["neg", "pos"])
    run(task_files, folder, tmp_path / "A")
    whole, _ = read(tmp_path / "A")
    shares = []
    monkeypatch.setattr(engine, "all_reduce_sum", lambda *values: list(values))
    for rank in (2, 1, 0):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 3)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(
            engine, "gather_objects", lambda mine: shares.insert(0, mine) or list(shares)
        )
        run(task_files, folder, tmp_path / f"A{rank}")
    assert all(0 < len(share) < 9 for share in shares)
    assert not (tmp_path / "A1.json").exists(), "only the first rank writes"
    assert read(tmp_path / "A0")[0] == whole


def test_stop_words_are_whole_words_and_no_negators(tiny_tokenizer):
    texts = ["the film is not good", "thes film was never it", ""]
    ids = [np.array(tiny_tokenizer(t, add_special_tokens=False)["input_ids"], int) for t in texts]
    assert [m.tolist() for m in annotate.find_stop_words(ids, tiny_tokenizer)] == [
        [True, False, True, False, False],
        [False, False, False, True, False, True],  # the ##s film was never it
        [],
    ]
    negators = "no not nor never none nothing nobody neither nowhere cannot without t n't but"
    assert not STOP_WORDS & set(negators.split())


def test_punctuation_is_signs_alone_and_no_emoji():
    assert all(map(is_punctuation, (".", "...", "$", "\u201c", "\u2014", "'")))
    assert not any(map(is_punctuation, ("", "a", "n't", "1", ":d", "\u2665", "\U0001f600")))


def test_only_what_is_said_is_dropped(
    task_files, make_classifier, no_process_group, tmp_path, tiny_tokenizer, capsys
):
    """Each filter against a look at every token; and its count in the record and the summary."""
    folder = make_classifier(["neg", "pos"])
    name = tiny_tokenizer.convert_ids_to_tokens
    for kind, options, delta in (("punctuation", RAW[1:], "0.1"), ("last_tokens", RAW[:1], "1e-6"),
                                 ("stop_words", (*RAW, "--drop_stop_words"), "0.1")):
        run(task_files, folder, tmp_path / "A", "--delta", delta, "--overwrite")
        run_plain(task_files, folder, tmp_path / kind, "--delta", delta, *options)
        expected, count = [], 0
        for tokens, marks in sum(read(tmp_path / "A")[0], []):
            words, known = name(tokens), [mark for mark in marks if mark != 255]
            is_dropped = {
                "punctuation": lambda i, words=words: words[i] in (".", ",", "!"),
                "stop_words": lambda i, words=words: (
                    words[i] in STOP_WORDS and not "".join(words[i + 1 : i + 2]).startswith("##")),
                # A sequence that is longer than the limit ends where the classifier's input ends.
                "last_tokens": lambda i, known=known: i == len(known) - 1 and sum(known) == 1,
            }[kind]
            gone = [mark == 1 and is_dropped(i) for i, mark in enumerate(marks)]
            count += sum(gone)
            expected.append((tokens, [mark * (not one)
                                      for one, mark in zip(gone, marks, strict=True)]))
        documents, info = read(tmp_path / kind)
        assert sum(documents, []) == expected
        assert count and info["dropped"] == {kind: count}
        assert f"dropped: {count} {kind.replace('_', ' ')}" in capsys.readouterr().out


@settings(max_examples=200, deadline=None)
@given(
    sequence=st.lists(st.integers(0, 5), max_size=8), salt=st.integers(0, 2**32),
    levels=st.sampled_from([2, 7, 1000]), criterion=st.sampled_from(sorted(CRITERIA)),
)
def test_a_mark_by_construction_is_one_whose_buffer_is_the_sequence(
    sequence, salt, levels, criterion
):
    """It holds whatever the classifier says; all others compare another text."""
    full = hashed(salt, 0, sequence, levels)
    buffers = []

    def confidence(asked, _):
        buffers.append(list(asked[0]))
        return [hashed(salt, 0, asked[0], levels)]

    (marks,) = find_important(confidence, [sequence], [full], 0.01, criterion)
    asked = buffers[len(buffers) - len(sequence):] if buffers else []
    whole = [buffer == sequence for buffer in asked] or [False] * len(sequence)
    if len(asked) == len(sequence):
        assert all(marks[np.array(whole, bool)]), "by construction"
        assert drop_unremoved(marks).tolist() == (marks & ~np.array(whole, bool)).tolist()
    else:
        assert criterion == "strict" and not marks.any()


def test_parity_is_the_published_behaviour(task_files, make_classifier, no_process_group, tmp_path):
    folder = make_classifier(["neg", "pos"])
    run_plain(task_files, folder, tmp_path / "A", "--delta", "0.1", "--parity")
    run(task_files, folder, tmp_path / "B", "--drop_stop_words", "--criterion", "signed")
    (one, published), (other, info) = read(tmp_path / "A"), read(tmp_path / "B")
    assert one == other and published["identity_digest"] == info["identity_digest"]
    assert "last_tokens" not in published["dropped"]
    for wrong in (("--criterion", "strict"), ("--measure", "gradient")):
        sentence = f"--parity is {wrong[0]} .* contradicts {' '.join(wrong)};"
        with pytest.raises(ConfigError, match=sentence):
            run_plain(task_files, folder, tmp_path / "C", "--parity", *wrong)


@pytest.mark.parametrize(("marks", "sentence"), [
    ([255, 255], "no token is annotated"),
    ([0] * 250 + [1], "0.40% of the annotated tokens .* less than 0.5%.* give a larger --delta"),
    ([0] * 99 + [1] * 101, "50.50% of .* more than 50.0%.* give a smaller --delta"),
    ([0] * 199 + [1], None), ([0, 1], None),
])
def test_weak_annotations_are_named_with_the_number(marks, sentence):
    found = annotate.find_weak([[np.array(marks, np.uint8)]], IMPORTANCE["buffer"])
    assert len(found) == (sentence is not None)
    assert sentence is None or re.search(sentence, found[0])


def test_a_weak_annotation_is_recorded(
    task_files, make_classifier, no_process_group, tmp_path, capsys
):
    folder = make_classifier(["neg", "pos"])
    run(task_files, folder, tmp_path / "A", "--delta", "0.9")
    (sentence,) = read(tmp_path / "A")[1]["weak"]
    assert f"warning: {sentence}" in capsys.readouterr().out


# ------------------------------------------------------------------ the other measures

TABLE = {"not": [-1.0, 0.0], "good": [2.0, 1.0], "film": [0.0, 1.0]}


class Words:
    """A tokenizer in which every id is a word, for a `MeanClassifier`."""

    pad_token_id = 9


@pytest.fixture
def toy(monkeypatch, tiny_tokenizer):
    """The worked example: `not good film`, of the positive class, without special tokens."""
    from tests.support.models import MeanClassifier

    words = WordTable(np.zeros(10, np.uint8), np.zeros(10, np.uint8), np.zeros((1, 1), bool))
    monkeypatch.setattr("train.stages.importance.continuation_table", lambda _: words)
    model = MeanClassifier(list(TABLE.values()), [1.0, 0.5])
    return Runner(model, Template((), (), (), 0), Words(), torch.device("cpu"), 100)


def test_worked_example_of_leaving_out(toy):
    """Without `good` the logit falls from .6667 to -.25; a text of one word becomes empty."""
    found = measure_left_out(toy, [Query(0, 0, 1, [], [0, 1, 2]), Query(1, 0, 0, [], [1]),
                                   Query(2, 0, 1, [], [1])], 0.5)
    assert found[0].tolist() == pytest.approx([-5 / 6, 11 / 12, -1 / 12], abs=1e-6)
    assert found[1] is None, "the classifier is wrong"
    assert found[2].tolist() == pytest.approx([2.5])
    assert [m if m is None else m.tolist() for m in take_above(found, 0.5)] == [
        [False, True, False], None, [True]]


def test_worked_example_of_the_gradient(toy):
    found = measure_gradient(toy, [Query(0, 0, 1, [], [0, 1, 2]), Query(1, 0, 0, [], [1])])
    assert found[0].tolist() == pytest.approx([1 / 3, 5 / 6, 1 / 6]) and found[1] is None


def test_a_share_is_of_all_tokens_with_ties():
    values = [np.array([1.0, 5.0]), None, np.array([3.0, 3.0, 0.5]), np.array([])]

    def taken(share):
        return [None if m is None else m.tolist() for m in take_share(values, share)]

    assert taken(0.2) == [[False, True], None, [False] * 3, []]
    assert taken(0.4) == [[False, True], None, [True, True, False], []], "ties go together"
    assert taken(0.01) == taken(0.2), "one at least"
    assert take_share([None], 0.2) == [None]


def margin_of(model, label, tokens, aspect=None):
    """Log-odds of the label, one input without a batch."""
    ids = [2, *tokens, 3] if aspect is None else [2, *aspect, 3, *tokens, 3]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    others = torch.cat([logits[:label], logits[label + 1 :]])
    return (logits[label] - others.logsumexp(0)).item()


@pytest.mark.parametrize("batch_tokens", ["16", "8192"])
def test_leaving_out_equals_one_word_at_a_time(
    task_files, make_classifier, no_process_group, tmp_path, tiny_tokenizer, batch_tokens
):
    folder = make_classifier(["neg", "pos"])
    run_plain(task_files, folder, tmp_path / "A", "--measure", "leave_one_out", "--delta", "0.01",
              "--keep_punctuation", "--batch_tokens", batch_tokens)
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    documents, info = read(tmp_path / "A")
    texts = list(dict.fromkeys(text for text, _ in TEXTS))
    joined = 0
    for text, sequences in zip(texts, documents, strict=True):
        for tokens, importance in sequences:
            expected = []
            for label in [("neg", "pos").index(y) for other, y in TEXTS if other == text]:
                seen = tokens[: LIMIT - 2]
                marks = [255] * len(tokens)
                whole, right = margin_of(model, label, seen), ask_alone(model, label, seen)[1]
                words, pieces = [], tiny_tokenizer.convert_ids_to_tokens(seen)
                for i, piece in enumerate(pieces):
                    if piece.startswith("##") and words:
                        words[-1].append(i)
                        joined += 1
                    else:
                        words.append([i])
                for word in words if right else []:
                    rest = [token for i, token in enumerate(seen) if i not in word]
                    for i in word:
                        marks[i] = int(whole - margin_of(model, label, rest) > 0.01)
                expected.append(marks)
            assert importance == np.array(expected).min(0).tolist()
    flat = [mark for sequences in documents for _, marks in sequences for mark in marks]
    assert joined and set(flat) == {0, 1, 255}
    assert info["identity"]["options"]["measure"] == "leave_one_out"


def test_gradients_of_aspects_equal_one_sequence_at_a_time(
    make_classifier, no_process_group, tmp_path
):
    """With gradients of the word rows in float64, by small steps; the largest become important."""
    for name in ("train.xml", "test.xml"):
        (tmp_path / name).write_text(XML)
    flags = ["--task", "semeval14_restaurant", "--data_dir", str(tmp_path)]
    folder = make_classifier(["neutral", "negative", "positive"], 1)
    values = []

    def note(runner, queries, **options):
        values.extend(zip(queries, measure_gradient(runner, queries, **options), strict=True))
        return [one for _, one in values]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(IMPORTANCE, "gradient", IMPORTANCE["gradient"]._replace(measure=note))
        run_plain(flags, folder, tmp_path / "A", "--measure", "gradient", "--share", "0.3",
                  "--keep_punctuation")
    model = BertForSequenceClassification.from_pretrained(folder).eval().double()
    rows = model.get_input_embeddings()
    checked = 0
    for query, found in values:
        ids = [2, *query.aspect, 3, *query.tokens, 3]
        types = [0] * (len(query.aspect) + 2) + [1] * (len(query.tokens) + 1)
        inputs = {"input_ids": torch.tensor([ids]), "token_type_ids": torch.tensor([types])}
        with torch.no_grad():
            assert (found is not None) == (model(**inputs).logits[0].argmax() == query.label)
        for i in range(len(query.tokens)) if found is not None else ():
            ends = []
            for factor in (1.001, 0.999):
                scale = torch.ones(1, len(ids), 1, dtype=torch.float64)
                scale[0, len(query.aspect) + 2 + i] = factor
                hook = rows.register_forward_hook(lambda *words, by=scale: words[-1] * by)
                with torch.no_grad():
                    best = model(**inputs).logits[0].topk(2).values
                hook.remove()
                ends.append((best[0] - best[1]).item())
            assert found[i] == pytest.approx(abs(ends[0] - ends[1]) / 0.002, rel=1e-3, abs=1e-5)
            checked += 1
    assert checked > 20
    flat = np.concatenate([one for _, one in values if one is not None])
    marks = [mark for part in read(tmp_path / "A")[0] for _, one in part for mark in one]
    assert 0 < marks.count(1) <= round(0.3 * len(flat))


def test_the_options_of_a_measure_are_its_own(
    task_files, make_classifier, no_process_group, tmp_path
):
    folder = make_classifier(["neg", "pos"])
    for wrong, sentence in (
        (("gradient", "--delta", "0.2"), "--measure gradient takes --share; leave --delta out"),
        (("buffer", "--share", "0.2"), "takes --delta and --criterion; leave --share out"),
        (("leave_one_out", "--criterion", "strict"), "takes --delta; leave --criterion out"),
        (("leave_one_out", "--keep_last"), "--keep_last goes with --measure buffer"),
        (("gradient", "--dtype", "fp16"), "--measure gradient needs fp32"),
        (("buffer", "--dtype", "bf16"), "--dtype bf16: too coarse .* give fp16"),
        (("buffer", "--delta", "1.5"), r"must be in \(0, 1\)"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            run_plain(task_files, folder, tmp_path / "A", "--measure", *wrong)
    assert choose_options("leave_one_out", {"delta": 1.5})["delta"] == 1.5


def test_help_knows_the_measures_and_their_defaults():
    fields = {field.name: field for field in dataclasses.fields(AnnotateConfig)}
    measures = typing.get_args(typing.get_type_hints(AnnotateConfig)["measure"])
    assert list(measures) == list(IMPORTANCE)
    for name, record in IMPORTANCE.items():
        for option, value in record.options.items():
            said = re.findall(rf"{name}:[^;]*\(default: ([^)]*)\)", fields[option].metadata["help"])
            assert said == [str(value)] or fields[option].default == value, option


def test_wrong_options_are_refused(task_files, make_classifier, no_process_group, tmp_path):
    folder = make_classifier(["neg", "pos"])
    with pytest.raises(ConfigError, match="--criterion: invalid choice: 'close' .*signed"):
        run(task_files, folder, tmp_path / "A", "--criterion", "close")
    with pytest.raises(ConfigError, match="--max_seq_length 99"):
        run(task_files, folder, tmp_path / "A", "--max_seq_length", "99")
    BertForMaskedLM(classifier_config("x" * 60, ["neg", "pos"])).save_pretrained(tmp_path / "mlm")
    with pytest.raises(ConfigError, match="BertForMaskedLM, not one for SequenceClassification"):
        run(task_files, tmp_path / "mlm", tmp_path / "A")


def test_dry_run_and_fixed_choice(task_files, make_classifier, no_process_group, tmp_path, capsys):
    folder = make_classifier(["neg", "pos"])
    run(task_files, folder, tmp_path / "A", "--dry_run", "--max_train_samples", "4")
    assert f"task {tmp_path.name}: 4 training texts" in capsys.readouterr().out
    assert not (tmp_path / "A.json").exists()
    run(task_files, folder, tmp_path / "A", "--max_train_samples", "4")
    _, info = read(tmp_path / "A")
    assert info["identity"]["split"]["labels"] == 4
    assert TokenStore.open(tmp_path / "A").num_documents == 4
