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
from preprocess.progress import level_of_libraries, say
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
# What only a classifier of texts or tokens has: the head that knows the labels.
_LABEL_HEAD = ("classifier.", "pre_classifier.")
_LABELLED = ("ForSequenceClassification", "ForTokenClassification")
SCORER_LABELS = ("other", "important")


def _quiet_transformers() -> None:
    """Keep transformers' loading reports and bars off the terminal, but for `--log_level`."""
    from transformers.utils import logging

    logging.set_verbosity(logging.log_levels[(level_of_libraries() or "error").lower()])
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
    reads = "" if not _is_decoder(config) else (
        "a decoder, which predicts the next token and not a masked one; ")
    if reads or config.model_type not in FAMILIES:
        raise ConfigError(
            f"{name}: {reads}model type {config.model_type!r} is not supported"
            f"{' as a decoder' if config.model_type in FAMILIES else ''}; known: "
            f"{', '.join(FAMILIES)}"
        )
    return config


def _is_decoder(config: Any) -> bool:
    if getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False):
        return True
    return _kind(config).endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))


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


def fit_row_length(config: Any, options: Any) -> Any:
    """Return the options with rows that the model has positions for.

    Args:
        options: of a command, with `max_seq_length`; where that is too long, a default is
            shortened, and so is a length that was given with `fit_positions`.
    Raises:
        ConfigError: the user has typed a length that is too long.
    """
    limit = FAMILIES[config.model_type].num_positions(config)
    typed = "max_seq_length" in options.typed
    if options.max_seq_length <= limit or typed and not options.fit_positions:
        check_row_length(config, options.max_seq_length)
        return options
    say(f"max_seq_length: {limit}, all positions of this model "
        f"({'instead of' if typed else 'default:'} {options.max_seq_length})")
    return options.replaced(max_seq_length=limit)


def build_masked_lm(config: Any, seed: int) -> PackedMaskedLM:
    """Build a model with fresh weights drawn from `seed`."""
    from transformers import AutoModelForMaskedLM

    _quiet_transformers()
    torch.manual_seed(seed)
    with loading(getattr(config, "name_or_path", ""), "its configuration makes no model"):
        # It may be that of a checkpoint in 16 bit.
        model = AutoModelForMaskedLM.from_config(config, dtype=torch.float32)
    return PackedMaskedLM(model, {}, fresh_head=True)


def _load_with_top(
    auto_class: Any, name: str, seed: int, top: tuple[str, ...], trust_remote_code: bool,
    head: tuple[str, ...] = (), **options: Any,
) -> tuple[Any, bool]:
    """Load a checkpoint in fp32; draw parameters of its top from `seed` if they are absent.

    Args:
        top: parts of the names of these parameters.
        head: beginnings of the names of parameters that are drawn from `seed` in any case.
    Returns:
        The model, and whether any parameter was absent.
    """
    torch.manual_seed(seed)
    check_weights(Path(local_checkpoint(name)))
    with loading(name):
        model, info = auto_class.from_pretrained(
            local_checkpoint(name), output_loading_info=True, dtype=torch.float32,
            trust_remote_code=trust_remote_code, ignore_mismatched_sizes=True, **options,
        )
        # Without that, transformers points at a report that is not shown.
        other = [key for key, *_ in info["mismatched_keys"] if not key.startswith(head)]
        if other:
            raise ValueError(f"{other[0]} has another shape than config.json says")
    lost = [key for key in info["missing_keys"] if not any(part in key for part in top)]
    if lost:
        raise ConfigError(
            f"--model_name_or_path {name}: {len(lost)} encoder weights are missing, as "
            f"{sorted(lost)[0]}; it is not such a checkpoint"
        )
    found = [key for key, _ in model.named_parameters()
             if key.startswith(head) and key not in info["missing_keys"]] if head else []
    if found:
        _draw(model, head, seed)
    return model, bool(found or info["missing_keys"])


def _draw(model: Any, head: tuple[str, ...], seed: int) -> None:
    """Draw modules as transformers does where a checkpoint lacks them."""
    torch.manual_seed(seed)
    for name, module in model.named_modules():
        if f"{name}.".startswith(head):
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = False
            model._init_weights(module)


def load_masked_lm(name: str, seed: int, trust_remote_code: bool = False) -> PackedMaskedLM:
    """Load an encoder with its MLM head; draw the head from `seed` if it is absent.

    Raises:
        ConfigError: not a checkpoint of a known family, or one without its encoder's weights.
    """
    from transformers import AutoModelForMaskedLM

    config = load_config(name, trust_remote_code)
    top = FAMILIES[config.model_type].head_prefixes
    # ModernBERT's classifiers have a part of the same name as its MLM head.
    head = ("head.",) if _kind(config).endswith(_LABELLED) else ()
    hf, fresh_head = _load_with_top(AutoModelForMaskedLM, name, seed, top, trust_remote_code, head)
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


def _kind(config: Any) -> str:
    """Return the class that a checkpoint is of, or nothing."""
    return str((config.architectures or [""])[0])


def _labels(config: Any) -> tuple[str, ...]:
    return tuple(str(config.id2label[i]) for i in sorted(config.id2label))


def keeps_head(config: Any, suffix: str, labels: tuple[str, ...]) -> bool:
    """Return whether a checkpoint has the head that is asked for.

    Args:
        config: of the checkpoint.
        suffix: of its class: "ForSequenceClassification" or "ForTokenClassification".
        labels: names of all labels; those of the checkpoint must be the same, in the same order.
    """
    return (_kind(config).endswith(suffix) and _labels(config) == tuple(map(str, labels))
            and not other_outputs(config))


def other_outputs(config: Any) -> str:
    """Return what a classifier's outputs are if not the probabilities of classes; else nothing.

    One output is a number: of a regression, or of a cross-encoder that ranks pairs of texts.
    """
    if not _kind(config).endswith("ForSequenceClassification"):
        return ""
    problem = str(getattr(config, "problem_type", None) or "")
    if problem.startswith("multi_label"):
        return "several labels for one text (multi-label)"
    if problem == "regression" or config.num_labels < 2:
        return "a number and no classes (regression, or a cross-encoder)"
    return ""


def describe_head(config: Any, suffix: str, labels: tuple[str, ...]) -> str:
    """Say in a sentence whether the head of a checkpoint is kept, and why not."""
    if keeps_head(config, suffix, labels):
        return f"head: kept, the checkpoint has one for the labels {', '.join(labels)}"
    kind = _kind(config)
    if other_outputs(config):
        return f"head: fresh from the seed; that of the checkpoint gives {other_outputs(config)}"
    if kind.endswith(suffix):
        return (f"head: fresh from the seed; that of the checkpoint is for the labels "
                f"{', '.join(_labels(config))}")
    return f"head: fresh from the seed; the checkpoint is a {kind or 'model of unknown kind'}"


def _load_labelled(
    auto_class: Any, suffix: str, name: str, labels: tuple[str, ...], seed: int,
    trust_remote_code: bool, top: tuple[str, ...], trained: bool,
) -> Any:
    config = load_config(name, trust_remote_code)
    keeps = keeps_head(config, suffix, labels)
    unnamed = tuple(f"LABEL_{i}" for i in range(len(labels)))  # transformers' own for no names
    if trained and keeps_head(config, suffix, unnamed):
        keeps = True
    if trained and not keeps:
        raise ConfigError(
            f"--model_name_or_path {name}: a {_kind(config) or 'model of unknown kind'} for the "
            f"labels {', '.join(_labels(config))}; give one for {', '.join(labels)}, in this order"
        )
    # Which loss transformers takes for these labels, if the checkpoint's were of another kind.
    kind = {"problem_type": None} if getattr(config, "problem_type", None) else {}
    model, drawn = _load_with_top(
        auto_class, name, seed, top, trust_remote_code, () if keeps else _LABEL_HEAD, **kind,
        num_labels=len(labels), id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    if keeps and drawn:
        raise ConfigError(
            f"--model_name_or_path {name}: its config.json names a {_kind(config)}, and its "
            "weights lack the head; give a whole checkpoint"
        )
    return model


def load_classifier(
    name: str, label_names: tuple[str, ...], seed: int, trust_remote_code: bool = False,
    trained: bool = False,
) -> Any:
    """Load a sequence classifier; its head is drawn from `seed` unless it is for these labels.

    Args:
        trained: refuse a checkpoint whose head would be drawn; one without names for its labels
            is taken as it is.
    """
    from transformers import AutoModelForSequenceClassification

    return _load_labelled(
        AutoModelForSequenceClassification, "ForSequenceClassification", name, label_names, seed,
        trust_remote_code, ("pooler.", "head.", *_LABEL_HEAD), trained,
    )


def load_scorer(
    name: str, seed: int, trust_remote_code: bool = False, trained: bool = False,
    labels: tuple[str, ...] = SCORER_LABELS,
) -> Any:
    """Load a token classifier (1: important); its head is drawn as `load_classifier` does."""
    from transformers import AutoModelForTokenClassification

    return _load_labelled(
        AutoModelForTokenClassification, "ForTokenClassification", name, labels, seed,
        trust_remote_code, ("head.", *_LABEL_HEAD), trained,
    )
