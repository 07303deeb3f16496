"""What a tokenizer must have before anything is made with it, and what it did to a text."""

from __future__ import annotations

import json
from typing import Any

from preprocess.errors import ConfigError, DataError
from preprocess.text.continuations import byte_level_alphabet, check_words
from preprocess.text.encode import prepare_backend, user_tokens

NEEDED = ("cls", "sep", "pad", "mask")  # and `unk`, where the model has a name for it
_USUAL = {"cls": ("[CLS]", "<s>"), "sep": ("[SEP]", "</s>"), "pad": ("[PAD]", "<pad>"),
          "mask": ("[MASK]", "<mask>"), "unk": ("[UNK]", "<unk>")}
MAX_UNKNOWN = 0.01  # share of [UNK] from which it is a warning
MIN_CASED = 0.01  # share of a vocabulary with capital letters from which it is cased
FEW_WORDS = 20  # entries with letters, below which a vocabulary says nothing about case


def check_tokenizer(tokenizer: Any, name: str, pair: bool = False) -> None:
    """Refuse a tokenizer without words or special tokens, or that does not put these around a text.

    A store holds bare texts, and training puts `[CLS]` and `[SEP]` around them; fine-tuning,
    annotation and whoever uses the model leave that to the tokenizer. Both must be the same.

    Args:
        tokenizer: a fast tokenizer of transformers.
        name: of its folder or on the hub, for the message.
        pair: also check two texts, as of an aspect and a text.
    Raises:
        DataError: says what is missing, and what to write where.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary = tokenizer.get_vocab()
    if vocabulary.keys() <= {str(token) for token in tokenizer.all_special_tokens}:
        # transformers makes one of special tokens alone where a folder has no tokenizer: each word
        # would be unknown.
        raise DataError(
            f"{name}: its tokenizer has special tokens and no words, as where tokenizer.json is "
            "missing; copy the tokenizer of the model into that folder"
        )
    ids = {role: getattr(tokenizer, f"{role}_token_id") for role in (*NEEDED, "unk")}
    missing = [role for role in NEEDED if ids[role] is None]
    unknown = model.get("unk_token")
    if unknown is not None and (ids["unk"] is None or unknown not in vocabulary):
        missing.append("unk")
    if missing:
        lines = []
        for role in missing:
            found = [token for token in _USUAL[role] if token in vocabulary] or [_USUAL[role][0]]
            lines.append(f'"{role}_token": "{unknown if role == "unk" else found[0]}"')
        raise DataError(
            f"{name}: its tokenizer names no {' or '.join(missing)} token, and training needs "
            f"{', '.join(NEEDED)} and the one for unknown words; write {', '.join(lines)} into its "
            f"tokenizer_config.json, with tokens of its vocabulary"
        )
    for role in ("mask", "pad"):
        same = [other for other in ids if other != role and ids[other] == ids[role]]
        if same:
            raise DataError(
                f"{name}: its {role} token {tokenizer.convert_ids_to_tokens(ids[role])!r} is its "
                f"{same[0]} token too; write another \"{role}_token\" into tokenizer_config.json"
            )
    _check_template(tokenizer, name, ids["cls"], ids["sep"], pair)


def _check_template(tokenizer: Any, name: str, cls: int, sep: int, pair: bool) -> None:
    """Refuse a tokenizer that makes anything but `[CLS] text [SEP]` of a text."""
    backend = prepare_backend(tokenizer)
    plain = backend.encode("a", add_special_tokens=False).ids
    made = backend.encode("a").ids
    fits = made == [cls, *plain, sep]
    if fits and pair:
        made = backend.encode("a", "a").ids
        between = made[len(plain) + 1 : len(made) - len(plain) - 1]
        fits = len(between) > 0 and set(between) <= {sep} and (
            made == [cls, *plain, *between, *plain, sep]
        )
    if not fits:
        first, last = tokenizer.convert_ids_to_tokens([cls, sep])
        what = "two texts" if pair else "a text"
        shown = " ".join(map(str, tokenizer.convert_ids_to_tokens(made)))
        raise DataError(
            f"{name}: its tokenizer makes {shown!r} of {what}, and training puts {first} and "
            f"{last} around each; set tokenizer.backend_tokenizer.post_processor = tokenizers."
            f"processors.TemplateProcessing(single='{first} $A {last}', pair='{first} $A {last} "
            f"$B:1 {last}:1', special_tokens=[('{first}', {cls}), ('{last}', {sep})]) and save it"
        )


def lowers_case(tokenizer: Any) -> bool:
    """Return whether a tokenizer turns capital letters into small ones."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer is not None and "ABC" not in normalizer.normalize_str("ABC")


def cased_share(tokenizer: Any) -> float | None:
    """Return the share of a vocabulary's entries with letters that have capitals; None if too few.

    Letters without case, as in Chinese, do not count.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    names = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    special = {str(token) for token in tokenizer.all_special_tokens}
    words = [name for name in names if name not in special and not name.startswith("[unused")]
    to_byte = byte_level_alphabet()
    if model["type"] == "BPE" and all(c in to_byte for name in words for c in name):
        words = [bytes(to_byte[c] for c in name).decode(errors="ignore") for name in words]
    cased = [word for word in words if word.lower() != word or word.upper() != word]
    if len(cased) < FEW_WORDS:
        return None
    return sum(word.lower() != word for word in cased) / len(cased)


def describe_tokenizing(tokenizer: Any, name: str, num_tokens: int, num_unknown: int) -> str:
    """Return one line about what a tokenizer did to a corpus; it begins with `warning` if needed.

    Args:
        num_tokens, num_unknown: of the store, and how many of them are `[UNK]`.
    """
    share = num_unknown / max(1, num_tokens)
    lowers, cased = lowers_case(tokenizer), cased_share(tokenizer)
    facts = [f"{share:.1%} [UNK]" if 0.0005 <= share or not share else "below 0.1% [UNK]"]
    doubts = []
    facts.append("lower-cased" if lowers else "case kept")
    if lowers and cased is not None and cased >= MIN_CASED:
        doubts.append(f"it lower-cases, but {cased:.0%} of its vocabulary has capital letters: "
                      'write "do_lower_case": false into its tokenizer_config.json')
    if not lowers and cased == 0:
        doubts.append("it keeps capital letters, but its vocabulary has none: write "
                      '"do_lower_case": true into its tokenizer_config.json')
    if share > MAX_UNKNOWN and not doubts:
        doubts.append("many words are not in its vocabulary: choose another --tokenizer, or learn "
                      "one with train_tokenizer.py")
    mine = user_tokens(tokenizer)
    if mine:
        shown = " ".join(mine[:5]) + (" ..." if len(mine) > 5 else "")
        facts.append(f"{len(mine):,} added tokens kept whole ({shown})")
    try:
        how = check_words(tokenizer)
        facts.append(f"words told apart ({how})")
    except ConfigError:
        facts.append("words not told apart, so no masking by words")
    line = f"tokenizer {name}: {', '.join(facts)}"
    return f"warning: {line}; {'; '.join(doubts)}" if doubts else line
