"""Check that tokenizer, configuration, store and weights belong together, before any is used.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from preprocess.errors import ConfigError, DataError
from preprocess.progress import say
from preprocess.store import TokenStore, check_vocabulary
from preprocess.text.checks import NEEDED, check_tokenizer
from preprocess.text.encode import prepare_backend, user_tokens
from train.model.families import FAMILIES
from train.model.loading import list_weights, load_tokenizer, local_checkpoint

LAYER_BYTES = 1 << 17  # of the Python objects of a layer, at least
# Two tokenizers of one vocabulary may still read a text differently: case, accents, Chinese.
_PROBES = ("ABC", "Abc def", "caf\u00e9", "na\u00efve \u00dcber", "don't", "\u4e2d\u6587", "3.14",
           "a  b", " x", "\u00a0a\u200b", "e\u0301", "[MASK]", "<mask>", "[SEP]", "</s>", "\uff21")


def check_agreement(
    config: Any, tokenizer: Any, name: str, *, store: TokenStore | None = None, remedy: str = "",
    pair: bool = False, weights: bool = True,
) -> None:
    """Refuse a tokenizer, a configuration, a store and weights that do not belong together.

    Args:
        config: of the model, from `load_config` or `named_config`.
        tokenizer: that the model is used and exported with.
        name: of the model, as the user gave it.
        store: whose ids the model reads.
        remedy: what to type if the store is another tokenizer's, as the end of the sentence.
        pair: whether the model reads two texts, an aspect and a text.
        weights: whether the weights of `name` are used.
    Raises:
        DataError: the tokenizer lacks special tokens, does not put them around a text, or has
            more ids than 16 bits hold; its padding is not the configuration's where positions
            depend on it; the embedding is too small; the store has another tokenizer or other
            special ids.
        ConfigError: the sizes of the configuration are not those of the weights.
    """
    check_tokenizer(tokenizer, name, pair)
    _check_padding(config, tokenizer, name)
    size = check_vocabulary(tokenizer, name)
    if store is not None:
        size = max(size, store.vocab_size)
    if size > config.vocab_size:
        raise DataError(
            f"{name}: its embedding has {config.vocab_size} rows, fewer than the {size} ids of its "
            f"tokenizer; enlarge it with model.resize_token_embeddings({size}) and save both, or "
            f"give the tokenizer that it was trained with"
        )
    if store is not None:
        _check_store(store, tokenizer, name, remedy)
    if weights:
        check_sizes(config, name)


def _check_padding(config: Any, tokenizer: Any, name: str) -> None:
    theirs, ours = config.pad_token_id, tokenizer.pad_token_id
    if theirs == ours:
        return
    if FAMILIES[config.model_type].positions_from_padding:
        raise DataError(
            f"{name}: its config.json has pad_token_id {theirs}, but its tokenizer pads with "
            f"{tokenizer.pad_token!r}, id {ours}, and a {config.model_type} model counts positions "
            f"from that id on; write \"pad_token_id\": {ours} into config.json if the model was "
            f"trained so, or give the tokenizer that belongs to it"
        )
    if theirs is not None and 0 <= theirs < len(tokenizer):
        say(f"warning: {name}: its config.json has pad_token_id {theirs}, which is "
            f"{tokenizer.convert_ids_to_tokens(theirs)!r} in its tokenizer (padding is {ours}); "
            f"the embedding of {theirs} is never trained")


def _check_store(store: TokenStore, tokenizer: Any, name: str, remedy: str) -> None:
    theirs = load_tokenizer(store.tokenizer_dir)
    made_by = store.info["tokenizer"]["name"]
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise DataError(
            f"--model_name_or_path {name}: its tokenizer ({len(tokenizer)} ids) is not the one "
            f"of {store.prefix} ({len(theirs)} ids, {made_by}); {remedy}"
        )
    for role in NEEDED:
        mine, stored = getattr(tokenizer, f"{role}_token_id"), store.special_ids.get(role)
        if mine != stored:
            raise DataError(
                f"--model_name_or_path {name}: the {role} token of its tokenizer has id {mine}, "
                f"and that of {store.prefix} ({made_by}) has {stored}; {remedy}"
            )
    one, other = prepare_backend(tokenizer), prepare_backend(theirs)
    for probe in (*_PROBES, *user_tokens(tokenizer), *user_tokens(theirs)):
        for read in (_normal, _pieces):
            ours, other_made = read(one, probe), read(other, probe)
            if ours != other_made:
                raise DataError(
                    f"--model_name_or_path {name}: its tokenizer reads {probe!r} as {ours!r}, and "
                    f"that of {store.prefix} ({made_by}) as {other_made!r}; {remedy}"
                )


def _normal(backend: Any, text: str) -> str:
    normalizer = backend.normalizer
    return "".join((normalizer.normalize_str(text) if normalizer else text).split())


def _pieces(backend: Any, text: str) -> str:
    return " ".join(backend.encode(text, add_special_tokens=False).tokens)


# --------------------------------------------------------------------------- sizes


def check_sizes(config: Any, name: str) -> None:
    """Refuse a configuration whose sizes are not those of the checkpoint's tensors.

    Only names and shapes are read, and the encoder is laid out without memory. Nothing is said
    about weights that are absent or unreadable; loading them does.

    Raises:
        ConfigError: with the first tensor of another shape.
    """
    from transformers import AutoModel

    shapes = read_shapes(local_checkpoint(name))
    if not shapes:
        return
    sizes = {key: getattr(config, key, None) for key in ("num_hidden_layers", "hidden_size",
                                                         "vocab_size", "max_position_embeddings")}
    for key, value in sizes.items():
        # A layer is at least one tensor, and a size at least one row of one: no loop and no number
        # is larger than the checkpoint's own.
        most = len(shapes) if key == "num_hidden_layers" else _largest(shapes)
        if key == "max_position_embeddings" and config.model_type == "modernbert":
            most = 1 << 24  # computed, not stored
        if not isinstance(value, int) or not 0 < value <= most:
            raise ConfigError(
                f"--model_name_or_path {name}: config.json has {key} {value!r}, and the weights "
                f"have room for at most {most:,}; give the config.json that belongs to them"
            )
    try:
        with torch.device("meta"):
            encoder = AutoModel.from_config(config)
    except Exception as error:  # whatever a family's layers say to impossible sizes
        raise ConfigError(
            f"--model_name_or_path {name}: config.json describes no model "
            f"({str(error).splitlines()[0]}); give the config.json that belongs to its weights"
        ) from None
    prefix = f"{encoder.base_model_prefix}."
    wanted = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    for key, shape in shapes.items():
        ours = wanted.get(key.removeprefix(prefix))
        if ours is not None and ours != shape:
            raise ConfigError(
                f"--model_name_or_path {name}: by config.json {key} is {_of(ours)}, and in the "
                f"weights it is {_of(shape)}; give the config.json that belongs to them"
            )


def check_room(config: Any, name: str) -> None:
    """Refuse a model whose fresh weights alone are larger than this machine's memory.

    A lower bound by the sizes of the configuration, before any layer is made: four square matrices
    and two of the inner size per layer, the embeddings, and the objects that a layer is.

    Raises:
        ConfigError: with what is needed and what is there.
    """
    layers, hidden = config.num_hidden_layers, config.hidden_size
    inner = getattr(config, "intermediate_size", 0)
    rows = config.vocab_size
    if config.model_type != "modernbert":  # which computes its positions
        rows += config.max_position_embeddings
    needed = 4 * (layers * hidden * (4 * hidden + 2 * inner) + rows * hidden) + layers * LAYER_BYTES
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ConfigError(
            f"{name}: a model with num_hidden_layers {layers}, hidden_size {hidden}, vocab_size "
            f"{config.vocab_size} and max_position_embeddings {config.max_position_embeddings} "
            f"needs {needed // 2**30:,} GiB or more for its weights, and this machine has "
            f"{there // 2**30:,}; give a smaller one"
        )


def _largest(shapes: dict[str, tuple[int, ...]]) -> int:
    return max(math.prod(shape) for shape in shapes.values())


def _of(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def read_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a checkpoint: a folder, or a hub name that was loaded."""
    cached = try_to_load_from_cache(path, "config.json") if not Path(path).is_dir() else None
    folder = Path(cached).parent if isinstance(cached, str) else Path(path)
    found: dict[str, tuple[int, ...]] = {}
    try:
        for file in list_weights(folder):
            if file.suffix == ".bin":
                read = torch.load(file, map_location="meta", weights_only=True)
                found |= {key: tuple(value.shape) for key, value in read.items()}
            else:
                with safe_open(file, "pt") as weights:
                    found |= {key: tuple(weights.get_slice(key).get_shape())
                              for key in weights.keys()}  # noqa: SIM118, not a dictionary
    except (OSError, ValueError, RuntimeError, SafetensorError):
        return {}
    return found
