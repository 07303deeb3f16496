"""Importance: the buffer heuristic against a one-at-a-time twin, and annotation of real texts."""

from __future__ import annotations

import csv
import hashlib
import re

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
from preprocess.text.stop_words import STOP_WORDS
from tests.support.stores import write
from train import annotate, engine
from train.stages.importance import CRITERIA, cut_to_fit, find_important


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


def run(task_files, folder, output, *options):
    annotate.main([
        *task_files, "--model_name_or_path", str(folder), "--output", str(output),
        "--max_seq_length", str(LIMIT), "--delta", "0.1", "--dtype", "fp32", *options,
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
        with pytest.raises(ConfigError, match="--task custom has neg, pos; give a classifier"):
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


def test_dropped_stop_words_are_not_important(
    task_files, make_classifier, no_process_group, tmp_path
):
    folder = make_classifier(["neg", "pos"])
    run(task_files, folder, tmp_path / "A")
    run(task_files, folder, tmp_path / "B", "--drop_stop_words")
    pairs = zip(sum(read(tmp_path / "A")[0], []), sum(read(tmp_path / "B")[0], []), strict=True)
    dropped = 0
    for (tokens, with_them), (same_tokens, without) in pairs:
        assert tokens == same_tokens
        for before, after in zip(with_them, without, strict=True):
            assert after == before or (before, after) == (1, 0)
            dropped += after != before
    assert dropped


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
    assert "task custom: 4 training texts" in capsys.readouterr().out
    assert not (tmp_path / "A.json").exists()
    run(task_files, folder, tmp_path / "A", "--max_train_samples", "4")
    _, info = read(tmp_path / "A")
    assert info["identity"]["split"]["labels"] == 4
    assert TokenStore.open(tmp_path / "A").num_documents == 4
