"""Choose the documents to show: by number, at random, or by a word that they contain."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from preprocess.errors import ConfigError, DataError
from preprocess.masking import STREAM_SHOWN, counter_uniform
from preprocess.store import Shard, TokenStore, iterate_blocks
from preprocess.text.continuations import WordTable, find_continuations, word_table

BLOCK_DOCUMENTS = 1 << 20


def choose_documents(args: argparse.Namespace, store: TokenStore, tokenizer: Any) -> list[int]:
    """Return the numbers of the requested documents.

    Raises:
        ConfigError: a number outside the store, or a word that no document has.
        DataError: a store without documents.
    """
    if not store.num_documents:
        raise DataError(f"{store.prefix} has no documents; tokenize some text into a store")
    if args.documents is not None:
        return _parse_documents(args.documents, store)
    if args.containing is None:
        blocks: Iterable[np.ndarray] = (
            np.arange(start, min(start + BLOCK_DOCUMENTS, store.num_documents))
            for start in range(0, store.num_documents, BLOCK_DOCUMENTS)
        )
    else:
        blocks = find_word(store, args.containing.strip(), tokenizer)
    numbers = (draw_documents(blocks, args.num_documents, args.seed) if args.random
               else take_documents(blocks, args.num_documents))
    if not numbers:
        raise ConfigError(
            f"--containing {args.containing}: no document of {store.prefix} has it as a separate "
            "word; give another"
        )
    return numbers


def _parse_documents(text: str, store: TokenStore) -> list[int]:
    numbers: dict[int, None] = {}  # in the order given, each once
    last = store.num_documents - 1
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,18})(?:-(\d{1,18}))?\s*", part)
        bounds = [int(number) for number in found.groups() if number] if found else []
        if not bounds or bounds[-1] > last or bounds[0] > bounds[-1]:
            raise ConfigError(
                f"--documents {text}: {store.prefix} has documents 0 to {last}; give numbers or "
                f"ranges, such as 0,5,10-12"
            )
        numbers.update(dict.fromkeys(range(bounds[0], bounds[-1] + 1)))
    return list(numbers)


def take_documents(blocks: Iterable[np.ndarray], count: int) -> list[int]:
    """Take the first `count` numbers of ascending blocks, `(n,)` int64 each, and read no more."""
    numbers = itertools.chain.from_iterable(block[: count + 1].tolist() for block in blocks)
    distinct = (number for number, _ in itertools.groupby(numbers))  # one may lie in two blocks
    return list(itertools.islice(distinct, count))


def draw_documents(blocks: Iterable[np.ndarray], count: int, seed: int) -> list[int]:
    """Draw `count` numbers from blocks of them, `(n,)` int64 each.

    Each document has a draw of its own, so blocks do not change the result, and a document drawn
    from a store is also drawn from fewer documents of it.
    """
    best = np.empty(0, dtype=np.int64)
    for block in blocks:
        best = np.union1d(best, block)
        draws = counter_uniform(seed, 0, best, STREAM_SHOWN)
        best = best[np.argsort(draws, kind="stable")[:count]]
    return np.sort(best).tolist()


def find_word(store: TokenStore, word: str, tokenizer: Any) -> Iterator[np.ndarray]:
    """Yield the numbers of the documents that have a word, block by block, `(n,)` int64.

    Search for its tokens, as given, in lower case and in capitals; where the tokenizer tells words
    apart, it must be a separate word.
    """
    cases = {word, word.lower(), word.capitalize(), word.upper()}
    # Byte-level vocabularies write a word behind a space with other tokens.
    texts = [space + case for case in sorted(cases) for space in ("", " ")]
    unknown = store.special_ids.get("unk")
    tokenizer.no_padding()  # published tokenizers may come with both switched on
    tokenizer.no_truncation()
    patterns = {tuple(e.ids) for e in tokenizer.encode_batch(texts, add_special_tokens=False)}
    patterns = {ids for ids in patterns if ids and unknown not in ids}
    table = word_table(tokenizer)
    start = 0
    for shard in store.shards:
        for block in iterate_blocks(shard.sequence_offsets):
            yield start + _find_in_block(shard, block, sorted(patterns), table)
        start += shard.num_documents


def _find_in_block(
    shard: Shard, block: slice, patterns: list[tuple[int, ...]], table: WordTable | None
) -> np.ndarray:
    offsets = shard.sequence_offsets[block.start : block.stop + 1]
    tokens = shard.tokens[offsets[0] : offsets[-1]]
    local = offsets - offsets[0]
    begins = np.ones(len(tokens) + 1, dtype=bool)  # whether a word begins at a token
    if table is not None:
        begins[:-1] = ~find_continuations(tokens, local, table)
    found: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
    for pattern in patterns:
        places = np.flatnonzero(tokens[: max(len(tokens) - len(pattern) + 1, 0)] == pattern[0])
        for i, token in enumerate(pattern[1:], 1):
            places = places[tokens[places + i] == token]
        ends = places + len(pattern)
        sequence = np.searchsorted(local, places, side="right") - 1
        whole = (ends <= local[sequence + 1]) & begins[places] & begins[ends]
        found.append(sequence[whole])
    sequences = np.unique(np.concatenate(found)) + block.start
    # An empty document shares its start with the next one; the last of them has the sequence.
    return np.unique(np.searchsorted(shard.document_offsets, sequences, side="right") - 1)
