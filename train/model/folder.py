"""The JSON files of a model folder, read before transformers reads them.

A folder may come from anybody. transformers reports damage in a dozen kinds of errors, loads what
an index of weights names wherever that lies, and can be led by a configuration to other
repositories and their code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from preprocess.errors import ConfigError, DataError
from preprocess.files import read_json

CONFIG, ADAPTER = "config.json", "adapter_config.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
             "added_tokens.json", "vocab.json")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
AGAIN = "copy the checkpoint again, or give another one"
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size",
         "vocab_size", "max_position_embeddings")
MAX_SIZE = 1 << 31  # of a tensor's side, and far above any model's


@contextmanager
def loading(name: str, what: str = "cannot be loaded") -> Iterator[None]:
    """Report whatever a library raises at a checkpoint in one sentence.

    Raises:
        ConfigError: with the first line of the library's own error.
    """
    try:
        yield
    except (ConfigError, DataError):
        raise
    except BaseException as error:
        # A library in Rust raises its own panics beside `Exception`.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        said = " ".join(lines[: 2 if lines[0].endswith(":") else 1]).strip()
        raise ConfigError(
            f"--model_name_or_path {name}: {what} ({said}); give a folder with config.json and "
            "model.safetensors, or a hub name that this machine reaches"
        ) from None


def list_weights(folder: Path) -> list[Path]:
    """List a checkpoint's weight files, safetensors where there are any."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def check_tokenizer(folder: Path) -> None:
    """Check that the tokenizer's JSON files are objects; without a folder, nothing."""
    for name in TOKENIZER:
        if (folder / name).is_file():
            _read(folder, name)


def _read(folder: Path, name: str, *keys: str) -> dict[str, Any]:
    return read_json(folder / name, AGAIN, keys=keys, error=ConfigError, strict=False,
                     name=f"--model_name_or_path {folder}: cannot be loaded, its {name}")


def check_config(folder: Path) -> None:
    """Check that a configuration is an object, and the checkpoint complete in itself.

    Raises:
        ConfigError: not JSON; or an adapter, which names its checkpoint itself.
    """
    if (folder / ADAPTER).is_file():
        raise ConfigError(f"{folder / ADAPTER}: an adapter of another checkpoint; merge it into "
                          "that one first, and give the result")
    if (folder / CONFIG).is_file():
        _read(folder, CONFIG)


def check_loaded(name: str, config: Any) -> None:
    """Refuse a configuration whose model is not trained here, or brings code from the hub.

    Raises:
        ConfigError: it says how the weights are quantized, names a kernel of attention, or has a
            size that is none.
    """
    for key in SIZES:
        value = getattr(config, key, 1)  # some families lack one of them
        if type(value) is not int or not 0 < value < MAX_SIZE:
            raise ConfigError(f"--model_name_or_path {name}: config.json has {key} "
                              f"{str(value)[:40]}; a whole number from 1 to {MAX_SIZE - 1:,} is "
                              "needed")
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"--model_name_or_path {name}: quantization_config in its config.json: "
                          "quantized weights cannot be trained; give it in full precision")
    attention = getattr(config, "_attn_implementation", None)
    if attention not in (None, "eager", "sdpa", "flash_attention_2", "flex_attention"):
        raise ConfigError(f"--model_name_or_path {name}: attn_implementation {attention!r} in its "
                          "config.json: may name code on the hub; remove it there")


def check_weights(folder: Path) -> None:
    """Check that an index of weights names files beside it.

    Raises:
        ConfigError: not JSON. DataError: it names another file.
    """
    for name in INDICES:
        index = folder / name
        if not index.is_file():
            continue
        names = _read(folder, name, "weight_map")["weight_map"]
        there = {path.name for path in list_weights(folder)}
        if not isinstance(names, dict):
            raise DataError(f"{index}: weight_map must hold names of files; {AGAIN}")
        for file in names.values():
            if not isinstance(file, str) or file not in there:
                raise DataError(f"{index}: names {file!r}, which is no weight file of its folder; "
                                f"{AGAIN}")
