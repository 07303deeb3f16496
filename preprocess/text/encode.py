"""Text to ids: tokenize complete documents, then cut them into sentences by character offsets.

So the ids do not depend on the cutting, and byte-level BPE keeps its leading spaces. The same
functions make the token store of a corpus and the annotated texts of a task.

A document of more than `BLOCK_CHARACTERS` is processed in blocks, cut before a single space, where
the usual tokenizers split it anyway: they take 170 times the size of a text in memory, and finding
sentences takes time that grows with its square. A sentence ends with its block.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np

BLOCK_CHARACTERS = 1 << 19
BATCH_TEXTS = 4096
BATCH_CHARACTERS = 1 << 19  # of which a tokenizer makes 90 MB
BORDER = re.compile(r"(?<=\S)(?= \S)")  # before a single space between two words
# (ids uint16 (T,), tokens of each sequence int64 (N,), sequences of each document int64 (D,),
# documents dropped)
Encoded = tuple[np.ndarray, np.ndarray, np.ndarray, int]


def batch_texts(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield texts in lists that are large enough to encode at once, and small enough for memory."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) >= BATCH_TEXTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def encode_batch(backend: Any, texts: list[str], language: str | None) -> Encoded:
    """Tokenize complete documents and cut each at its sentence boundaries.

    Args:
        backend: a `tokenizers.Tokenizer` from `prepare_backend`.
        language: of the sentences; None keeps each document in one sequence.
    """
    return encode_in_blocks(texts, language, partial(_encode_whole, backend))


Encoder = Callable[[list[str], str | None], Encoded]


def encode_in_blocks(texts: list[str], language: str | None, encode: Encoder) -> Encoded:
    """Encode texts with a function for short texts; long texts go through it block by block."""
    made: list[Encoded] = []
    for long, run in itertools.groupby(texts, lambda text: len(text) > BLOCK_CHARACTERS):
        if not long:
            made.append(encode(list(run), language))
            continue
        for text in run:
            blocks = [encode([block], language) for block in cut_blocks(text)]
            ids, lengths, _, _ = join_encoded(blocks)
            if language is None and len(ids):
                lengths = np.array([len(ids)])
            documents = np.array([len(lengths)] if len(ids) else [], np.int64)
            made.append((ids, lengths, documents, 1 - len(documents)))
    return join_encoded(made)


def _encode_whole(backend: Any, texts: list[str], language: str | None) -> Encoded:
    ids: list[int] = []
    lengths: list[int] = []
    documents: list[int] = []
    for text, encoding in zip(
        texts, backend.encode_batch(texts, add_special_tokens=False), strict=True
    ):
        if not encoding.ids or text.isspace():  # byte-level BPE has tokens for spaces
            continue
        ids += encoding.ids
        here = [len(encoding.ids)]
        if language is not None:
            here = cut_sentences(text, encoding.offsets, language)
        lengths += here
        documents.append(len(here))
    flat = np.array(ids, np.int64)
    assert not len(flat) or (flat.min() >= 0 and flat.max() < 1 << 16)  # see check_vocabulary
    return (
        flat.astype(np.uint16),
        np.array(lengths, np.int64),
        np.array(documents, np.int64),
        len(texts) - len(documents),
    )


def cut_blocks(text: str) -> Iterator[str]:
    """Cut a text into blocks of at most `BLOCK_CHARACTERS`: at a border if there is one."""
    start = 0
    while len(text) - start > BLOCK_CHARACTERS:
        end = start + BLOCK_CHARACTERS
        # The last border of the last tenth, which is long enough for a word.
        borders = BORDER.finditer(text, end - BLOCK_CHARACTERS // 10, end)
        end = max((border.start() for border in borders), default=end)
        yield text[start:end]
        start = end
    yield text[start:]


def join_encoded(parts: list[Encoded]) -> Encoded:
    """Concatenate the results of several calls."""
    empty = np.empty(0, np.int64)
    ids, lengths, documents, dropped = zip(*parts, strict=True) if parts else ((), (), (), ())
    return (
        np.concatenate([np.empty(0, np.uint16), *ids]),
        np.concatenate([empty, *lengths]),
        np.concatenate([empty, *documents]),
        sum(dropped),
    )


def cut_sentences(text: str, offsets: list[tuple[int, int]], language: str) -> list[int]:
    """Return the number of tokens of each sentence of a document, all above 0.

    Args:
        offsets: first character and end of each token.
    """
    ends = np.cumsum([len(piece) for piece in split_sentences(text, language)])
    counts = np.bincount(sentence_of(offsets, ends))
    return counts[counts > 0].tolist()


def split_sentences(text: str, language: str) -> list[str]:
    """Cut a text into sentences that cover it.

    White space between sentences belongs to the one before it, at the start to the one after it.
    """
    import sentencex

    sentences: list[str] = []
    for piece in sentencex.segment(language, text):
        if sentences and (piece.isspace() or sentences[-1].isspace()):
            sentences[-1] += piece
        else:
            sentences.append(piece)
    assert sum(map(len, sentences)) == len(text), "sentences must cover the text"
    return sentences


def sentence_of(offsets: list[tuple[int, int]], ends: np.ndarray) -> np.ndarray:
    """Return the sentence of each token, `(T,)` int64, ascending.

    The last character of a token decides: a byte-level token may begin with the space before its
    sentence.

    Args:
        offsets: first character and end of each token.
        ends: of the sentences, in characters, `(N,)` int64.
    """
    spans = np.array(offsets, np.int64).reshape(-1, 2)
    last = np.maximum(spans[:, 1] - 1, spans[:, 0])
    return np.maximum.accumulate(
        np.minimum(np.searchsorted(ends, last, side="right"), len(ends) - 1)
    )


def prepare_backend(tokenizer: Any) -> Any:
    """Return a copy of the Rust tokenizer without padding or truncation, for text.

    `[SEP]` and whatever else the model reserves is plain text; tokens that the user registered
    (`user_tokens`) are kept whole.
    """
    from tokenizers import Tokenizer

    made = tokenizer.backend_tokenizer.to_str()
    if mine := set(user_tokens(tokenizer)):
        parts = json.loads(made)
        for token in parts["added_tokens"]:
            token["special"] &= token["content"] not in mine
        made = json.dumps(parts)
    backend = Tokenizer.from_str(made)
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    return backend


def user_tokens(tokenizer: Any) -> list[str]:
    """Return the tokens that a user added to a tokenizer, and that a text may hold.

    Those are all added tokens that are not special; of the special ones, those listed as
    `additional_special_tokens` (`extra_special_tokens` since transformers 5), and those added
    behind the vocabulary and the tokens with a role (`add_tokens(..., special_tokens=True)`). A
    model reserves the tokens with a role, and what lies among them.
    """
    backend = tokenizer.backend_tokenizer
    roles = {str(name) for role in _ROLES if (name := getattr(tokenizer, f"{role}_token", None))}
    listed = {
        str(name) for attribute in ("extra_special_tokens", "additional_special_tokens")
        for name in getattr(tokenizer, attribute, None) or ()
    }
    own = backend.get_vocab(with_added_tokens=False)
    last = max((i for role in roles if (i := backend.token_to_id(role)) is not None), default=-1)
    found = []
    for i, token in sorted(backend.get_added_tokens_decoder().items()):
        name = token.content
        behind = name not in own and i > last
        if name not in roles and (not token.special or name in listed or behind):
            found.append(name)
    return found


_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
