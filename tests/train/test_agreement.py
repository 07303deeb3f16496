"""Tokenizer, configuration, store and weights: what does not fit together is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tokenizers import normalizers
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast

from preprocess import tokenize_corpus
from preprocess.errors import ConfigError, DataError
from preprocess.store import TokenStore
from tests.support.models import tiny_config
from train import annotate, benchmark, finetune, fit_scorer, model, pretrain, score_tokens
from train.model import FAMILIES, check_agreement, load_config
from train.model.agreement import check_room, check_sizes, read_shapes
from train.model.loading import named_config


def copy(tmp_path, folder, **config) -> str:
    """A copy of a checkpoint with other entries in config.json."""
    made = tmp_path / "copy"
    shutil.copytree(folder, made)
    path = made / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return str(made)


def agree(folder, **options) -> None:
    check_agreement(load_config(folder), AutoTokenizer.from_pretrained(folder), folder, **options)


def test_a_whole_checkpoint_fits(tiny_encoder, reviews_store):
    agree(tiny_encoder, store=TokenStore.open(reviews_store), pair=True)


# --------------------------------------------------------------------------- padding


@pytest.mark.parametrize("pad", [1, None])
def test_padding_where_positions_depend_on_it(tiny_tokenizer, pad):
    config = tiny_config("roberta")
    config.vocab_size, config.pad_token_id = 100, pad
    with pytest.raises(DataError, match=rf"pad_token_id {pad}, but its tokenizer pads with "
                                        r"'\[PAD\]', id 0, and a roberta model"):
        check_agreement(config, tiny_tokenizer, "m", weights=False)
    config.pad_token_id = 0
    check_agreement(config, tiny_tokenizer, "m", weights=False)


def test_positions_depend_on_padding_where_the_record_says_so():
    for name, family in FAMILIES.items():
        config = tiny_config(name)
        before = family.first_position(config)
        config.pad_token_id += 1
        assert (family.first_position(config) != before) == family.positions_from_padding


def test_padding_elsewhere_is_a_warning(tiny_tokenizer, capsys):
    config = tiny_config("bert")
    config.vocab_size, config.pad_token_id = 100, 2
    check_agreement(config, tiny_tokenizer, "m", weights=False)
    assert "pad_token_id 2, which is '[CLS]' in its tokenizer" in capsys.readouterr().out


# --------------------------------------------------------------------------- sizes


def test_an_embedding_without_a_row_for_the_largest_id(tmp_path, tiny_encoder):
    folder = copy(tmp_path, tiny_encoder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = len(tokenizer)
    tokenizer.add_tokens(["gastropub", "foodie"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(DataError, match=f"has {before} rows, fewer than the {before + 2} ids"):
        agree(folder)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_sizes_of_each_family(tmp_path, family):
    config = tiny_config(family)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "m")
    check_sizes(config, str(tmp_path / "m"))
    assert len(read_shapes(str(tmp_path / "m"))) > 20
    config.intermediate_size = config.hidden_dim = 48
    with pytest.raises(ConfigError, match="by config.json .* is .*(48|96).*, and in the"):
        check_sizes(config, str(tmp_path / "m"))


@pytest.mark.parametrize(("key", "value"), [
    ("num_hidden_layers", 10**9), ("hidden_size", 10**9), ("vocab_size", 10**12),
    ("max_position_embeddings", 10**12), ("num_hidden_layers", 0), ("hidden_size", 64),
    ("vocab_size", 70), ("max_position_embeddings", 65), ("intermediate_size", 128),
    ("type_vocab_size", 5), ("num_attention_heads", 7),
])
def test_sizes_are_refused_before_a_model_is_built(tmp_path, tiny_encoder, monkeypatch, key, value):
    folder = copy(tmp_path, tiny_encoder)
    config = load_config(folder)
    setattr(config, key, value)
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda self: pytest.fail("memory")
                        if self.weight.device.type != "meta" else None)
    with pytest.raises(ConfigError, match="config.json (has|describes)|by config.json"):
        check_sizes(config, folder)


def test_weights_of_the_old_format(tmp_path, tiny_encoder):
    folder = copy(tmp_path, tiny_encoder)
    loaded = AutoModelForMaskedLM.from_pretrained(folder)
    torch.save(loaded.state_dict(), tmp_path / "copy" / "pytorch_model.bin")
    (tmp_path / "copy" / "model.safetensors").unlink()
    config = load_config(folder)
    check_sizes(config, folder)
    config.intermediate_size = 128
    with pytest.raises(ConfigError, match="intermediate"):
        check_sizes(config, folder)


# --------------------------------------------------------------------------- store


def test_a_store_that_was_read_otherwise(tmp_path, tiny_encoder, reviews_file):
    """The same vocabulary, but another case, or other special tokens."""
    other = AutoTokenizer.from_pretrained(tiny_encoder)
    other.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    other = PreTrainedTokenizerFast(
        tokenizer_object=other.backend_tokenizer, **other.special_tokens_map)
    other.save_pretrained(tmp_path / "t")
    prefix = str(tmp_path / "s")
    tokenize_corpus.main(["--input", reviews_file, "--tokenizer", str(tmp_path / "t"),
                          "--output", prefix])
    store = TokenStore.open(prefix)
    with pytest.raises(DataError, match="reads 'A.*' as .*, and that of .*; tokenize again"):
        agree(tiny_encoder, store=store, remedy="tokenize again")
    with pytest.raises(DataError, match="reads 'A"):
        pretrain.main(["--tokens", prefix, "--model_name_or_path", tiny_encoder, "--max_steps", "1",
                       "--dry_run", "--output_dir", str(tmp_path / "r")])


def test_other_special_ids_than_the_store_has(tiny_encoder, reviews_store):
    store = TokenStore.open(reviews_store)
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    tokenizer.mask_token = "love"
    config = load_config(tiny_encoder)
    with pytest.raises(DataError, match=r"the mask token of its tokenizer has id \d+, and that of"):
        check_agreement(config, tokenizer, "m", store=store)


# --------------------------------------------------------------------------- every command


def commands(tmp_path, labelled_files, store):
    """Each command that reads a model, with its options but for the model."""
    task = ["--task", "custom", "--train_file", labelled_files["train"],
            "--test_file", labelled_files["test"]]
    out = str(tmp_path / "out")
    return {
        finetune: [*task, "--seeds", "1", "--output_dir", out],
        annotate: [*task, "--output", out],
        fit_scorer: ["--annotations", store, "--output_dir", out],
        score_tokens: ["--tokens", store, "--name", "x"],
        pretrain: ["--tokens", store, "--max_steps", "1", "--output_dir", out],
        benchmark: ["--tokens", store, "--strategies", "random", "--output_dir", out],
    }


@pytest.mark.parametrize("damage", ["no_mask", "no_template", "embedding", "sizes"])
def test_every_command_refuses_before_it_writes(
    tmp_path, tiny_encoder, labelled_files, reviews_store, monkeypatch, damage
):
    folder = copy(tmp_path, tiny_encoder,
                  **({"num_hidden_layers": 10**9} if damage == "sizes" else {}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = dict(tokenizer.special_tokens_map)
    if damage == "no_mask":
        del names["mask_token"]
    if damage == "no_template":
        path = tmp_path / "copy" / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **names)
    if damage == "embedding":
        tokenizer.add_tokens(["gastropub"])
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(annotate, "check_trained", lambda *_: None)
    monkeypatch.setattr(score_tokens, "check_trained", lambda *_: None)
    monkeypatch.setattr(annotate, "match_labels", lambda *_: [0, 1])
    for command, options in commands(tmp_path, labelled_files, reviews_store).items():
        for more in (["--dry_run"], []):
            with pytest.raises((ConfigError, DataError), match="no mask|puts|fewer than|has num_h"):
                command.main([*options, *more, "--model_name_or_path", folder])
            assert not (tmp_path / "out").exists(), command.__name__


def test_a_fresh_model_needs_the_same_of_the_store(tmp_path, reviews_store, monkeypatch):
    without = AutoTokenizer.from_pretrained(TokenStore.open(reviews_store).tokenizer_dir)
    without = PreTrainedTokenizerFast(
        tokenizer_object=without.backend_tokenizer, unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]")
    monkeypatch.setattr(model, "load_tokenizer", lambda *_: without)
    with pytest.raises(DataError, match="no pad token"):
        pretrain.main(["--tokens", reviews_store, "--model_config", "bert-tiny", "--max_steps", "1",
                       "--dry_run", "--output_dir", str(tmp_path / "r")])
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("how", ["from_scratch", "from_scratch without weights", "model_config"])
@pytest.mark.parametrize("key, value, message", [
    ("hidden_size", 10**9, "hidden_size 1000000000"),
    ("num_hidden_layers", 10**9, "num_hidden_layers 1000000000"),
    ("max_position_embeddings", 2 * 10**9, "max_position_embeddings 2000000000"),
    ("intermediate_size", 10**30, "a whole number from 1 to"),
    ("num_attention_heads", 0, "num_attention_heads 0"),
    ("hidden_size", "big", "hidden_size"),
])
def test_fresh_weights_of_impossible_sizes_are_refused_before_a_model_is_built(
    how, key, value, message, tmp_path, tiny_encoder, reviews_store, monkeypatch
):
    folder = copy(tmp_path, tiny_encoder, **{key: value})
    monkeypatch.setattr(model, "build_masked_lm", None)
    flags = ["--model_name_or_path", folder, "--from_scratch"]
    if how != "from_scratch":
        (tmp_path / "copy" / "model.safetensors").unlink()
    if how == "model_config":
        flags = ["--model_config", folder]
    with pytest.raises(ConfigError, match=message):
        pretrain.main(["--tokens", reviews_store, *flags, "--max_steps", "1",
                       "--max_seq_length", "32", "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_every_published_size_has_room_to_be_named():
    for name in model.BERT_SIZES:
        if name != "bert-large":  # 1.3 GiB
            check_room(named_config(name, 30522, 0), name)
