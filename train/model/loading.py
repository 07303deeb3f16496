"""Load checkpoints, tokenizers and configurations from a folder, the hub, or a size's name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open

from preprocess.corpus import resolve_path
from preprocess.errors import ConfigError
from preprocess.progress import say
from train.model.families import FAMILIES
from train.model.folder import (
    check_config,
    check_loaded,
    check_tokenizer,
    check_weights,
    list_weights,
    loading,
)
from train.model.packed import PackedMaskedLM

# Layers, hidden size and heads of the published BERT sizes (Turc et al. 2019; Devlin et al. 2019).
BERT_SIZES = {
    "bert-tiny": (2, 128, 2),
    "bert-mini": (4, 256, 4),
    "bert-small": (4, 512, 8),
    "bert-medium": (8, 512, 8),
    "bert-base": (12, 768, 12),
    "bert-large": (24, 1024, 16),
}


def _quiet_transformers() -> None:
    """Keep transformers' loading reports and bars off the terminal."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def local_checkpoint(name: str) -> str:
    """Turn a pypi: spec into the folder it names; leave folders and hub names alone."""
    if name.startswith("pypi:"):
        return str(resolve_path(name))
    if os.path.sep in name and not os.path.isdir(name) and (
        name.startswith((".", os.path.sep)) or name.count("/") > 1
    ):
        raise ConfigError(f"--model_name_or_path {name}: no such folder")
    return name


def _load_with(auto_class: Any, name: str, trust_remote_code: bool) -> Any:
    """Load a checkpoint folder, hub name or pypi: spec with `auto_class`."""
    _quiet_transformers()
    with loading(name):
        return auto_class.from_pretrained(
            local_checkpoint(name), trust_remote_code=trust_remote_code)


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """Load the fast tokenizer of a checkpoint folder, hub name or pypi: spec."""
    from transformers import AutoTokenizer

    check_tokenizer(Path(local_checkpoint(name)))
    tokenizer = _load_with(AutoTokenizer, name, trust_remote_code)
    if not tokenizer.is_fast:
        raise ConfigError(f"{name}: needs a fast tokenizer (tokenizer.json)")
    return tokenizer


def load_config(name: str, trust_remote_code: bool = False) -> Any:
    """Load a checkpoint's configuration and check that its family is known."""
    from transformers import AutoConfig

    check_config(Path(local_checkpoint(name)))
    config = _load_with(AutoConfig, name, trust_remote_code)
    check_loaded(name, config)
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"{name}: model type {config.model_type!r} is not supported; known: "
            f"{', '.join(FAMILIES)}"
        )
    return config


def named_config(name: str, vocab_size: int, pad_token_id: int) -> Any:
    """Make the configuration of a published BERT size, or of a folder with a config.json."""
    from transformers import BertConfig

    if name in BERT_SIZES:
        layers, hidden, heads = BERT_SIZES[name]
        return BertConfig(
            vocab_size=vocab_size, hidden_size=hidden, num_hidden_layers=layers,
            num_attention_heads=heads, intermediate_size=4 * hidden, pad_token_id=pad_token_id,
        )
    if os.path.isdir(name):
        config = load_config(name)
        config.vocab_size, config.pad_token_id = vocab_size, pad_token_id
        return config
    raise ConfigError(
        f"--model_config {name}: not a folder with config.json, and the names are "
        f"{', '.join(BERT_SIZES)}"
    )


def check_row_length(config: Any, max_seq_length: int) -> None:
    """Refuse rows longer than the model has positions for."""
    limit = FAMILIES[config.model_type].num_positions(config)
    if max_seq_length > limit:
        raise ConfigError(
            f"--max_seq_length {max_seq_length}: this model has {limit} positions; give at most "
            f"{limit}"
        )


def build_masked_lm(config: Any, seed: int) -> PackedMaskedLM:
    """Build a model with fresh weights drawn from `seed`."""
    from transformers import AutoModelForMaskedLM

    _quiet_transformers()
    torch.manual_seed(seed)
    with loading(getattr(config, "name_or_path", ""), "its configuration makes no model"):
        return PackedMaskedLM(AutoModelForMaskedLM.from_config(config), {}, fresh_head=True)


def _load_with_top(
    auto_class: Any, name: str, seed: int, top: tuple[str, ...], trust_remote_code: bool,
    **options: Any,
) -> tuple[Any, bool]:
    """Load a checkpoint in fp32; draw parameters of its top from `seed` if they are absent.

    Args:
        top: parts of the names of these parameters.
    Returns:
        The model, and whether any parameter was absent.
    """
    torch.manual_seed(seed)
    check_weights(Path(local_checkpoint(name)))
    with loading(name):
        model, info = auto_class.from_pretrained(
            local_checkpoint(name), output_loading_info=True, dtype=torch.float32,
            trust_remote_code=trust_remote_code, **options,
        )
    lost = [key for key in info["missing_keys"] if not any(part in key for part in top)]
    if lost:
        raise ConfigError(
            f"--model_name_or_path {name}: {len(lost)} encoder weights are missing, as "
            f"{sorted(lost)[0]}; it is not such a checkpoint"
        )
    return model, bool(info["missing_keys"])


def load_masked_lm(name: str, seed: int, trust_remote_code: bool = False) -> PackedMaskedLM:
    """Load an encoder with its MLM head; draw the head from `seed` if it is absent.

    Raises:
        ConfigError: not a checkpoint of a known family, or one without its encoder's weights.
    """
    from transformers import AutoModelForMaskedLM

    top = FAMILIES[load_config(name, trust_remote_code).model_type].head_prefixes
    hf, fresh_head = _load_with_top(AutoModelForMaskedLM, name, seed, top, trust_remote_code)
    if fresh_head:
        say(
            f"{name} has no MLM head: a fresh one is drawn from seed {seed}, its bias set to the "
            "log-frequencies of the tokens"
        )
    with loading(name):
        carried = _read_pooler(local_checkpoint(name), f"{hf.base_model_prefix}.")
    return PackedMaskedLM(hf, carried, fresh_head)


def _read_pooler(path: str, prefix: str) -> dict[str, torch.Tensor]:
    """Read the pooler of a checkpoint, fp32, by full names; MLM models have none to load it into.

    Args:
        path: a folder, or a hub name that has been loaded.
        prefix: of the encoder's parameters; a checkpoint of the encoder alone has none.
    """
    cached = try_to_load_from_cache(path, "config.json") if not os.path.isdir(path) else None
    folder = Path(cached).parent if isinstance(cached, str) else Path(path)
    found: dict[str, torch.Tensor] = {}
    for file in list_weights(folder):
        if file.suffix == ".bin":
            read = torch.load(file, map_location="cpu", weights_only=True)
            found |= {key: read[key] for key in read if "pooler." in key}
        else:
            with safe_open(file, "pt") as weights:
                found |= {key: weights.get_tensor(key) for key in weights.keys()
                          if "pooler." in key}
    return {
        f"{prefix}{key.removeprefix(prefix)}": value.float() for key, value in found.items()
        if key.removeprefix(prefix).startswith("pooler.")
    }


def load_classifier(
    name: str, label_names: tuple[str, ...], seed: int, trust_remote_code: bool = False
) -> Any:
    """Load a sequence classifier; its top is drawn from `seed` if absent."""
    from transformers import AutoModelForSequenceClassification

    load_config(name, trust_remote_code)
    return _load_with_top(
        AutoModelForSequenceClassification, name, seed,
        ("pooler.", "classifier.", "pre_classifier.", "head."), trust_remote_code,
        num_labels=len(label_names),
        id2label=dict(enumerate(label_names)),
        label2id={label: index for index, label in enumerate(label_names)},
    )[0]


def load_scorer(name: str, seed: int, trust_remote_code: bool = False) -> Any:
    """Load a token classifier (1: important); its top is drawn from `seed` if absent."""
    from transformers import AutoModelForTokenClassification

    load_config(name, trust_remote_code)
    return _load_with_top(
        AutoModelForTokenClassification, name, seed, ("classifier.", "head."), trust_remote_code,
        num_labels=2, id2label={0: "other", 1: "important"}, label2id={"other": 0, "important": 1},
    )[0]
