"""Model families: packed equals alone, loading and export, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

import csrc
from preprocess.errors import ConfigError, DataError
from tests.support.models import LENGTHS, VOCAB, packed_rows, tiny_config
from tests.support.runs import made_up_stage
from train import model
from train.run_dir import hf_folder

FAMILIES = sorted(model.FAMILIES)


# ----------------------------------------------------------------------------- packed attention


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_alone(family, attention):
    module = model.build_masked_lm(tiny_config(family), seed=0).eval()
    module.hf.set_attn_implementation(attention)
    ids, positions, pieces = packed_rows(LENGTHS)
    with torch.no_grad():
        hidden = module.encode(ids, positions, pieces)
        logits = csrc.reference.logits(hidden.flatten(0, 1), module.head()).view(*ids.shape, VOCAB)
        assert torch.isfinite(hidden).all()  # padding and the empty row too
        for number in range(int(pieces.max()) + 1):
            mine = pieces == number
            # transformers' own positions and masks, for a sentence without padding
            alone = module.hf(input_ids=ids[mine][None]).logits[0]
            torch.testing.assert_close(logits[mine], alone, atol=1e-5, rtol=1e-5)


def test_mask_by_hand():
    config = tiny_config("modernbert")
    config.local_attention = 2
    pieces = torch.tensor([[0, 0, 0, 1, -1]])
    positions = torch.tensor([[0, 1, 2, 0, 0]])
    both = model.attention_mask(
        model.FAMILIES["modernbert"], config, pieces, positions, torch.float32
    )
    whole = [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    local = [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    assert (both["full_attention"][0, 0] == 0).int().tolist() == whole
    assert (both["sliding_attention"][0, 0] == 0).int().tolist() == local
    one = model.attention_mask(
        model.FAMILIES["bert"], tiny_config("bert"), pieces, positions, torch.bfloat16
    )
    assert one.shape == (1, 1, 5, 5) and one.dtype == torch.bfloat16
    assert (one[0, 0] == 0).int().tolist() == whole
    assert set(one.unique().tolist()) == {0.0, torch.finfo(torch.bfloat16).min}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_the_cross_entropy_of_masked_positions(family):
    module = model.build_masked_lm(tiny_config(family), seed=0).eval()
    ids, positions, pieces = packed_rows(LENGTHS)
    masked = torch.tensor([1, 7, 22, 64, 100, 130, -1, -1])
    labels = torch.tensor([9, 8, 7, 6, 5, 59, -1, -1])
    loss, hits = module(ids, positions, pieces, masked, labels)
    hidden = module.encode(ids, positions, pieces)
    logits = csrc.reference.logits(hidden.flatten(0, 1), module.head())
    full = torch.full((ids.numel(),), -100)
    full[masked[:6]] = labels[:6]
    expected = functional.cross_entropy(logits, full, reduction="sum")
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert int(hits) == int((logits.argmax(-1) == full).sum())
    best = logits[masked[:6]].argmax(-1)
    assert int(module(ids, positions, pieces, masked[:6], best)[1]) == 6


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_without_masks_reaches_every_parameter(family):
    module = model.build_masked_lm(tiny_config(family), seed=0)
    ids, positions, pieces = packed_rows([[]])
    nothing = torch.full((4,), -1)
    loss, hits = module(ids, positions, pieces, nothing, nothing)
    assert loss.item() == 0 and hits.item() == 0
    loss.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


# ------------------------------------------------------------------------- last-layer subset


def masked_at(*slots: int, padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions, and labels that go with them."""
    positions = torch.tensor([*slots, *[-1] * padding], dtype=torch.int64)
    return positions, torch.where(positions < 0, -1, (7 * positions + 11) % VOCAB)


SUBSETS = {
    "spread": masked_at(1, 7, 22, 64, 100, 130, padding=3),
    "one row": masked_at(*range(64, 128, 3)),
    "first and last slot": masked_at(0, 255),
    "every slot": masked_at(*range(256)),
    "none": masked_at(padding=4),
    "not even padding": masked_at(),
}


def loss_and_gradients(module, batch, masked, labels, **options):
    module.zero_grad()
    loss, hits = module(*batch, masked, labels, **options)
    loss.backward()
    return loss.detach(), hits, {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("family, how, tolerance", [
    *((family, "checkpointing", 1e-6) for family in FAMILIES),
    pytest.param("bert", "compiled", 1e-4, marks=[pytest.mark.slow, pytest.mark.skipif(
        not shutil.which("g++"), reason="torch.compile needs a C++ compiler")]),
])
def test_checkpointing_and_compiling_change_nothing(family, how, tolerance):
    results = []
    for changed in (False, True):
        module = model.build_masked_lm(tiny_config(family), seed=0).train(how == "checkpointing")
        if changed and how == "compiled":
            module.family.encoder(module.hf).compile()
        elif changed:
            model.checkpoint_activations(module.hf)
            assert module.hf.is_gradient_checkpointing
        torch.manual_seed(5)  # dropout is drawn, and drawn again alike in the backward pass
        batch = packed_rows(LENGTHS)
        results.append(loss_and_gradients(module, batch, *SUBSETS["spread"]))
    torch.testing.assert_close(*results, atol=min(tolerance, 1e-5), rtol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("where", SUBSETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_last_layer_subset_equals_the_whole_layer(family, where, dtype, tolerance):
    module = model.build_masked_lm(tiny_config(family), seed=0).to(dtype).eval()
    assert module.last_layer_subset  # the default
    batch, (masked, labels) = packed_rows(LENGTHS), SUBSETS[where]
    subset = loss_and_gradients(module, batch, masked, labels)
    known = loss_and_gradients(module, batch, masked, labels, most_masked=64)
    module.last_layer_subset = False
    whole = loss_and_gradients(module, batch, masked, labels)
    torch.testing.assert_close(subset, whole, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(known, whole, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_last_layer_subset_saves_work(family):
    """Every row is full, so that there is no padding mask, and 2 of its 64 slots are masked."""
    from torch.utils.flop_counter import FlopCounterMode

    module = model.build_masked_lm(tiny_config(family), seed=0).train()
    batch = packed_rows([[64]] * 4)
    masked, labels = masked_at(*(64 * row + slot for row in range(4) for slot in (3, 40)))
    work = {}
    for subset in (False, True):
        module.last_layer_subset = subset
        with FlopCounterMode(display=False) as counter:  # of matrix products, both passes
            loss_and_gradients(module, batch, masked, labels)
        work[subset] = counter.get_total_flops() // 2  # multiply-adds
    slots, queries, width, inner = 256, 8, 32, 64
    linears = 2 * width**2 + 2 * width * inner  # query and output; feed-forward
    if family == "modernbert":  # its feed-forward is gated, and 1152 wide by default
        inner = module.hf.config.intermediate_size
        linears = 2 * width**2 + 3 * width * inner
    saved = 3 * (slots - queries) * linears  # forward, and two products in the backward pass
    attention = 5 * (slots - queries) * 2 * 64 * width  # two products; the scores once more
    assert saved <= work[False] - work[True] <= saved + attention


@pytest.mark.parametrize("family", FAMILIES)
def test_subset_applies_the_dropout_of_its_layer(family):
    """Dropout draws differ from the complete layer, but there must be dropout."""
    config = tiny_config(family)
    names = [name for name in vars(config) if "drop" in name and "classifier" not in name
             and isinstance(getattr(config, name), float)]
    for name in names:
        setattr(config, name, 0.0)
    batch, (masked, labels) = packed_rows(LENGTHS), SUBSETS["spread"]
    for name in names:
        if "embedding" in name or name in ("seq_classif_dropout", "qa_dropout"):
            continue
        setattr(config, name, 0.5)
        module = model.build_masked_lm(config, seed=0)
        layers = module.family.layers(module.family.encoder(module.hf))
        module.eval()
        layers[-1].train()
        drawn = {module(*batch, masked, labels)[0].item() for _ in range(3)}
        assert len(drawn) == 3, f"{name} drops nothing in the last layer"
        layers[-1].eval()
        drawn = {module(*batch, masked, labels)[0].item() for _ in range(3)}
        assert len(drawn) == 1
        setattr(config, name, 0.0)


def test_queries_by_hand():
    queries = model.find_queries(torch.tensor([1, 6, 7, -1, -1]), num_rows=3, num_slots=4)
    assert queries.slots.tolist() == [1, 6, 7, 7, 7]  # padding repeats the last one
    assert queries.table.shape == (3, 2)  # row 1 has two
    assert queries.table[0, 0] == 0 and queries.table[1].tolist() == [1, 2]
    assert queries.places.tolist() == [0, 2, 3, 3, 3]
    wide = model.find_queries(torch.tensor([1, 6, 7, -1, -1]), 3, 4, most=8)
    assert wide.table.shape == (3, 8) and wide.places.tolist() == [0, 8, 9, 9, 9]


def test_an_activation_that_the_head_does_not_know_is_refused():
    config = tiny_config("bert")
    config.hidden_act = "relu"
    with pytest.raises(ConfigError, match="activation 'relu'; known are gelu, "):
        model.build_masked_lm(config, seed=0)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_head_is_the_one_of_transformers(activation):
    config = tiny_config("bert")
    config.hidden_act = activation
    module = model.build_masked_lm(config, seed=0)
    with torch.no_grad():
        module.hf.get_output_embeddings().bias.normal_()
    rows = torch.randn(5, 32)
    torch.testing.assert_close(csrc.reference.logits(rows, module.head()), module.hf.cls(rows))


# --------------------------------------------------------------------------------- fresh weights


def parameters(module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def test_fresh_weights_depend_on_the_seed_only():
    torch.manual_seed(123)
    first = parameters(model.build_masked_lm(tiny_config("bert"), seed=0))
    torch.rand(7)
    again = parameters(model.build_masked_lm(tiny_config("bert"), seed=0))
    other = parameters(model.build_masked_lm(tiny_config("bert"), seed=1))
    torch.testing.assert_close(first, again, atol=0, rtol=0)
    name = "hf.bert.embeddings.word_embeddings.weight"
    assert not torch.equal(first[name], other[name])


def test_named_sizes():
    from transformers import BertForMaskedLM

    sizes = {}
    for name, (layers, hidden, heads) in model.BERT_SIZES.items():
        config = model.named_config(name, vocab_size=30522, pad_token_id=0)
        assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads,
                config.intermediate_size) == (layers, hidden, heads, 4 * hidden)
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in BertForMaskedLM(config).parameters())
    assert sizes["bert-base"] == 109_514_298
    assert list(sizes.values()) == sorted(sizes.values())
    with pytest.raises(ConfigError, match="the names are bert-tiny, .*bert-large"):
        model.named_config("bert-huge", 100, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_configuration_of_a_folder_takes_the_vocabulary_of_the_store(family, tmp_path):
    config = tiny_config(family)
    config.vocab_size, config.pad_token_id = 50_000, 49_999
    config.save_pretrained(tmp_path)
    taken = model.named_config(str(tmp_path), vocab_size=70, pad_token_id=1)
    assert (taken.vocab_size, taken.pad_token_id) == (70, 1)
    module = model.build_masked_lm(taken, seed=0)
    assert module.hf.get_input_embeddings().weight.shape == (70, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_output_bias(family):
    config = tiny_config(family)
    module = model.build_masked_lm(config, seed=0)
    frequencies = np.log(np.full(50, 1 / 50))
    module.set_output_bias(frequencies)
    rows = torch.zeros(1, 32)
    logits = csrc.reference.logits(rows, module.head())[0].double()
    # Ids that the tokenizer lacks are no likelier than its rarest id.
    expected = torch.full((VOCAB,), float(np.log(1 / 50)), dtype=torch.float64)
    torch.testing.assert_close(logits.detach(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_row_length(family):
    config = tiny_config(family)
    model.check_row_length(config, 64)
    with pytest.raises(ConfigError, match="--max_seq_length 65: this model has 64 positions"):
        model.check_row_length(config, 65)


# --------------------------------------------------------------------------- folders in and out


def hf_state(module) -> dict[str, torch.Tensor]:
    """Return what training passes to `save_hf`: parameters by name, tied ones once."""
    return {name: p.detach().clone() for name, p in module.hf.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_round_trip(family, tmp_path, tiny_tokenizer, capsys):
    from transformers import AutoModelForMaskedLM

    module, twin = (model.build_masked_lm(tiny_config(family), seed=0).eval() for _ in range(2))
    folder, state = tmp_path / "hf", hf_state(module)
    with torch.no_grad():  # saving does not read the weights: under ZeRO-3 they are not there
        for parameter in module.parameters():
            parameter.zero_()
    hf_folder.save_hf(module.hf, state, tiny_tokenizer, folder, [])
    loaded, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = packed_rows([[30]], slots=30)[0]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, twin.hf(ids).logits)

    capsys.readouterr()
    again = model.load_masked_lm(str(folder), seed=9)
    assert capsys.readouterr() == ("", "")  # a complete checkpoint
    assert not again.fresh_head and again.carried == {}  # no pooler is made up
    torch.testing.assert_close(parameters(again), parameters(twin), atol=0, rtol=0)
    tokenizer = model.load_tokenizer(str(folder))
    assert tokenizer.backend_tokenizer.to_str() == tiny_tokenizer.backend_tokenizer.to_str()


@pytest.mark.parametrize("family, kind", [
    ("bert", "safetensors"), ("roberta", "safetensors"), ("bert", "shards"), ("bert", "bin"),
])
def test_a_pooler_is_loaded_and_exported(family, kind, tmp_path, tiny_tokenizer):
    from transformers import AutoModel, AutoModelForSequenceClassification

    torch.manual_seed(0)
    encoder = AutoModel.from_config(tiny_config(family))
    encoder.save_pretrained(tmp_path / "in",
                            max_shard_size="20KB" if kind == "shards" else "1GB")
    if kind == "bin":
        (tmp_path / "in" / "model.safetensors").unlink()
        torch.save(encoder.state_dict(), tmp_path / "in" / "pytorch_model.bin")
    pooler = {name: value for name, value in encoder.state_dict().items() if "pooler" in name}
    assert pooler
    module = model.load_masked_lm(str(tmp_path / "in"), seed=0)
    assert not any("pooler" in name for name, _ in module.named_parameters())
    assert module.carried.keys() == {f"{family}.{name}" for name in pooler}

    hf_folder.save_hf(
        module.hf, hf_state(module), tiny_tokenizer, tmp_path / "out", [], module.carried
    )
    again = model.load_masked_lm(str(tmp_path / "out"), seed=5)
    assert again.carried.keys() == module.carried.keys() and not again.fresh_head
    for name, value in pooler.items():
        assert torch.equal(again.carried[f"{family}.{name}"], value)
    if family == "bert":  # RoBERTa's classifiers have no pooler
        for classifier in (
            AutoModelForSequenceClassification.from_pretrained(tmp_path / "out"),
            model.load_classifier(str(tmp_path / "out"), ("no", "yes"), seed=1),
        ):
            for name, value in pooler.items():
                assert torch.equal(classifier.bert.state_dict()[name], value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_head_is_reported_and_drawn_from_the_seed(family, tmp_path, capsys):
    from transformers import AutoModel

    torch.manual_seed(0)
    encoder = AutoModel.from_config(tiny_config(family))
    encoder.save_pretrained(tmp_path)
    loaded = []
    for seed in (3, 3, 4):
        torch.rand(seed)  # the state that is found does not matter
        loaded.append(model.load_masked_lm(str(tmp_path), seed=seed))
        assert loaded[-1].fresh_head
    out, err = capsys.readouterr()
    lines = [line for line in (out + err).splitlines() if "no MLM head" in line]
    assert len(lines) == 3 and "seed 3" in lines[0]

    first, again, other = map(parameters, loaded)
    torch.testing.assert_close(first, again, atol=0, rtol=0)
    head = [n for n in first if n.startswith(loaded[0].head_prefixes)]
    assert head and any(not torch.equal(first[n], other[n]) for n in head)
    state = encoder.state_dict()
    shared = [n for n in first if n not in head]
    prefix = f"hf.{loaded[0].hf.base_model_prefix}."
    assert all(torch.equal(first[n], state[n.removeprefix(prefix)]) for n in shared)


def labelled(family: str, kind: str, labels: tuple[str, ...], folder) -> str:
    """Write a checkpoint of this kind with a head for these labels."""
    import transformers

    config = tiny_config(family)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    torch.manual_seed(0)
    getattr(transformers, f"AutoModelFor{kind}").from_config(config).save_pretrained(folder)
    return str(folder)


def head_of(module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in module.state_dict().items()
            if name.startswith(("classifier.", "pre_classifier."))}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_is_kept_for_the_same_labels_alone(family, tmp_path):
    """As many labels of other names, or in another order, are another task."""
    name = labelled(family, "SequenceClassification", ("neg", "pos"), tmp_path / "a")
    old = {key: value for key, value in load_file(f"{name}/model.safetensors").items()
           if key.startswith(("classifier.", "pre_classifier."))}
    kept = head_of(model.load_classifier(name, ("neg", "pos"), 5, trained=True))
    torch.testing.assert_close(kept, old, atol=0, rtol=0)
    for labels in (("fake", "real"), ("pos", "neg"), ("neg", "pos", "mixed")):
        first, again, other = (head_of(model.load_classifier(name, labels, seed))
                               for seed in (5, 5, 6))
        torch.testing.assert_close(first, again, atol=0, rtol=0)
        for key in (key for key in first if key.endswith("weight")):
            assert not torch.equal(first[key], other[key])
            assert first[key].shape != old[key].shape or not torch.equal(first[key], old[key])
        with pytest.raises(ConfigError, match="for the labels neg, pos; give one for"):
            model.load_classifier(name, labels, 5, trained=True)
    rest = model.load_classifier(name, ("fake", "real"), 5).state_dict()
    stored = load_file(f"{name}/model.safetensors")
    assert all(torch.equal(value, rest[key]) for key, value in stored.items() if key not in old)
    sentence = model.describe_head(model.load_config(name), "ForSequenceClassification",
                                   ("pos", "neg"))
    assert sentence == ("head: fresh from the seed; that of the checkpoint is for the labels "
                        "neg, pos")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_another_kind_gets_a_fresh_head(family, tmp_path):
    labels = model.SCORER_LABELS
    classifier, scorer = (labelled(family, f"{kind}Classification", labels, tmp_path / kind)
                          for kind in ("Sequence", "Token"))
    (loaded, other), old = (
        [load(name, seed) for name, seed in ((first, 5), (second, 5))]
        for load, first, second in (
            (lambda name, seed: head_of(model.load_scorer(name, seed)), classifier, scorer),
            (lambda name, seed: load_file(f"{name}/model.safetensors"), classifier, scorer)))
    torch.testing.assert_close(other, {key: old[1][key] for key in other}, atol=0, rtol=0)
    for key in (key for key in loaded if key.endswith("weight")):
        assert not torch.equal(loaded[key], old[0].get(key, loaded[key] + 1))
    fresh = head_of(model.load_classifier(scorer, labels, 5))
    for key in (key for key in fresh if key.endswith("weight")):
        assert not torch.equal(fresh[key], old[1].get(key, fresh[key] + 1))
    for name in (classifier, scorer):
        assert model.load_masked_lm(name, 5).fresh_head
    if family == "modernbert":  # part of its MLM head has the name of a part of its classifier
        drawn = model.load_masked_lm(classifier, 5).hf.head.dense.weight
        assert not torch.equal(drawn, old[0]["head.dense.weight"])
    for suffix, name in (("ForSequenceClassification", scorer), ("ForTokenClassification",
                                                                 classifier)):
        config = model.load_config(name)
        said = model.describe_head(config, suffix, labels)
        assert said == f"head: fresh from the seed; the checkpoint is a {config.architectures[0]}"


def test_a_checkpoint_without_the_head_that_it_names_is_refused(tmp_path):
    name = labelled("bert", "SequenceClassification", ("a", "b"), tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "classifier" not in key},
              file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="its weights lack the head"):
        model.load_classifier(name, ("a", "b"), 5)


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_weights_are_fp32_whatever_the_configuration_was_of(family):
    config = tiny_config(family)
    config.dtype = "bfloat16"
    module = model.build_masked_lm(config, seed=0)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["masked_lm", "classifier", "scorer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_reader_finds_the_same_in_an_export(kind, dtype, tiny_encoder, tmp_path):
    """In 16 bit training the model in memory is in 16 bit, and the state is not."""
    import transformers
    from tokenizers import Tokenizer

    loaded = LOADERS[kind](tiny_encoder)
    module = loaded.hf if kind == "masked_lm" else loaded
    state = {name: p.detach().clone() for name, p in module.named_parameters()}
    tokenizer = model.load_tokenizer(tiny_encoder)
    texts = ["the good film . " * 9, "bad"]
    plain = transformers.AutoTokenizer.from_pretrained(tiny_encoder)
    expected = plain(texts)["input_ids"]
    assert [len(ids) for ids in expected] == [38, 3]
    ids = torch.tensor(expected[:1])
    with torch.no_grad():
        logits = module.eval()(ids).logits
    # As a run may use it, and as its checkpoint may have come.
    tokenizer(texts, truncation="longest_first", max_length=5, padding="max_length",
              split_special_tokens=True)
    tokenizer.init_kwargs.update(max_length=5, stride=0, truncation_strategy="longest_first")
    hf_folder.save_hf(module.to(dtype), state, tokenizer, tmp_path / "hf", [])

    folder = str(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    stored = {value.dtype for value in load_file(f"{folder}/model.safetensors").values()}
    assert stored == {torch.float32} and config["dtype"] == "float32"
    assert "torch_dtype" not in config
    auto = getattr(transformers, {"masked_lm": "AutoModelForMaskedLM",
                                  "classifier": "AutoModelForSequenceClassification",
                                  "scorer": "AutoModelForTokenClassification"}[kind])
    read = transformers.AutoTokenizer.from_pretrained(folder)
    assert read(texts)["input_ids"] == expected and len(read) == len(plain)
    assert read("[SEP] good")["input_ids"] == plain("[SEP] good")["input_ids"]
    alone = Tokenizer.from_file(f"{folder}/tokenizer.json")
    assert [one.ids for one in alone.encode_batch(texts)] == expected
    assert alone.truncation is None and alone.padding is None
    assert not {"max_length", "stride", "truncation_strategy"} & set(
        json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text()))
    again = auto.from_pretrained(folder).eval()
    assert again.dtype == torch.float32
    with torch.no_grad():
        # Weights that lie elsewhere in memory may be multiplied in another order.
        torch.testing.assert_close(again(ids).logits, logits, rtol=1e-5, atol=1e-6)
    if kind != "masked_lm":
        names = ("no", "yes") if kind == "classifier" else model.SCORER_LABELS
        assert again.config.id2label == dict(enumerate(names))


def test_datatrove_reads_an_export(tiny_encoder, tmp_path):
    tokenization = pytest.importorskip("datatrove.utils.tokenization")
    module, tokenizer = model.load_masked_lm(tiny_encoder, 0), model.load_tokenizer(tiny_encoder)
    tokenizer("good film", truncation=True, max_length=3)
    hf_folder.save_hf(module.hf, hf_state(module), tokenizer, tmp_path / "hf", [])
    read = tokenization.load_tokenizer(str(tmp_path / "hf" / "tokenizer.json"))
    text = "the good film . " * 9
    assert read.encode(text).ids == tokenizer(text)["input_ids"]


def test_sentence_transformers_reads_an_export(tiny_encoder, tmp_path):
    reader = pytest.importorskip("sentence_transformers")
    module = model.load_masked_lm(tiny_encoder, 0)
    hf_folder.save_hf(module.hf, hf_state(module), model.load_tokenizer(tiny_encoder),
                      tmp_path / "hf", [])
    found = reader.SentenceTransformer(str(tmp_path / "hf"), device="cpu")
    tokenizer = model.load_tokenizer(tiny_encoder)
    text = "the good film ."
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert found.tokenize([text])["input_ids"].tolist() == ids.tolist()
    with torch.no_grad():
        states = module.hf.base_model(ids).last_hidden_state[0].mean(0)
    torch.testing.assert_close(torch.tensor(found.encode(text)), states)


LOADERS = {
    "masked_lm": lambda folder: model.load_masked_lm(folder, seed=0),
    "classifier": lambda folder: model.load_classifier(folder, ("no", "yes"), seed=0),
    "scorer": lambda folder: model.load_scorer(folder, seed=0),
}


def weights(change):
    """Return what applies `change` to the weights in a folder."""
    return lambda folder: save_file(
        change(load_file(folder / "model.safetensors")), folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def set_config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


MISSING = "encoder weights are missing, as .*bert"
BROKEN = {
    # The published loader looked for the wrong key, found nothing, and trained from noise.
    "wrapped": (weights(lambda old: {f"wrapped.{name}": old[name] for name in old}), MISSING),
    "encoder": (weights(lambda old: {f"model.encoder.{name}": old[name] for name in old}), MISSING),
    "no layer 1": (weights(lambda old: {name: old[name] for name in old
                                        if "layer.1.output.dense" not in name}), MISSING),
    "unrelated": (weights(lambda old: {"unrelated": torch.zeros(2)}), MISSING),
    "other shape": (weights(lambda old: {
        name: old[name][:-1] if "word_embeddings" in name else old[name] for name in old}),
                    "ckpt"),
    "absent": (shutil.rmtree, "ckpt: no such folder"),
    "cut": (lambda folder: os.truncate(folder / "model.safetensors", 1000), "cannot be loaded"),
    "empty": (lambda folder: os.truncate(folder / "model.safetensors", 0), "cannot be loaded"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "cannot be loaded"),
    "bad json": (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
    "gpt2": (set_config(model_type="gpt2"), "'gpt2' is not supported; known: bert, "),
    "berd": (set_config(model_type="berd"), "cannot be loaded"),
    "more layers": (set_config(num_hidden_layers=3), "encoder weights are missing"),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("broken", BROKEN)
def test_broken_checkpoints_are_refused(loader, broken, tiny_encoder, tmp_path):
    folder, (break_it, fragment) = tmp_path / "ckpt", BROKEN[broken]
    shutil.copytree(tiny_encoder, folder)
    break_it(folder)
    with pytest.raises(ConfigError, match=fragment) as refused:
        LOADERS[loader](str(folder))
    assert "ckpt" in str(refused.value) and "\n" not in str(refused.value)


def test_a_tokenizer_that_is_not_there(tmp_path):
    for folder, fragment in (("absent", "absent: no such folder"), ("", "cannot be loaded")):
        with pytest.raises(ConfigError, match=fragment):
            model.load_tokenizer(str(tmp_path / folder))


# ----------------------------------------------------------------------------- lineage, atomicity


def test_lineage(tmp_path, tiny_encoder, tiny_tokenizer):
    module = model.load_masked_lm(tiny_encoder, seed=0)
    stages = [made_up_stage(masking=masking, steps=steps, masked_tokens=99, seconds=2)
              for masking, steps in (("random", 10), ("selective", 20))]
    before = hf_folder.open_weights(tiny_encoder)
    assert before.stages == []  # a plain checkpoint is always welcome
    folder = tmp_path / "runs" / "hf"
    hf_folder.save_hf(module.hf, hf_state(module), tiny_tokenizer, folder, stages, module.carried)
    after = hf_folder.open_weights(str(folder))
    assert after.stages == stages == hf_folder.read_stages(folder)
    assert after.hf_digest != before.hf_digest and len(after.hf_digest) == 64
    file = folder / "model.safetensors"
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    line = f"model.safetensors {file.stat().st_size} {sha256}\n"
    assert after.hf_digest == hashlib.sha256(line.encode()).hexdigest()
    assert "| pretrain | selective | 20 | 99 | 2 |" in (folder / "README.md").read_text()
    content = (folder / "lineage.json").read_text()
    for broken, problem in (
        ("{", "not valid JSON"), ("[]", "must hold one JSON object"), ("{}", "no 'stages' in it"),
        (content.replace('"identity"', '"identiti"'), "not a lineage"),
    ):
        (folder / "lineage.json").write_text(broken)
        with pytest.raises(DataError, match=rf"lineage\.json: {problem}.*another --output_dir"):
            hf_folder.open_weights(str(folder))
    (folder / "lineage.json").write_text(json.dumps({"stages": [{"stage": "pretrain"}]}))
    with pytest.raises(DataError, match="lineage of version 1, .*--output_dir, or delete lineage"):
        hf_folder.open_weights(str(folder))
    (folder / "lineage.json").write_text(content)
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with pytest.raises(DataError, match="delete lineage.json if you changed the model yourself"):
        hf_folder.open_weights(str(folder))
    (folder / "lineage.json").unlink()
    assert hf_folder.open_weights(str(folder)).stages == []


def test_a_failed_export_leaves_the_old_one(tmp_path, tiny_encoder, tiny_tokenizer):
    module = model.load_masked_lm(tiny_encoder, seed=0)
    folder = tmp_path / "hf"
    state = hf_state(module)
    hf_folder.save_hf(module.hf, state, tiny_tokenizer, folder, [made_up_stage("one")])

    class NoSpace:
        def save_pretrained(self, folder):
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        hf_folder.save_hf(module.hf, state, NoSpace(), folder, [made_up_stage("two")])
    assert hf_folder.read_stages(folder) == [made_up_stage("one")]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    hf_folder.save_hf(module.hf, state, tiny_tokenizer, folder, [made_up_stage("three")])
    assert hf_folder.read_stages(folder) == [made_up_stage("three")]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert folder.stat().st_mode & 0o777 == 0o755
