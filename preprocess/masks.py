"""Which tokens are masked, and what stands in their place: the only owner of both rules.

Masking is four visible steps over a ragged batch (`Sequences`: flat arrays and offsets):

1. candidates   `find_candidates`: every token that is not special
2. budget       `draw_counts`, `selective_limit`: how many of a sequence's candidates
3. choice       `STRATEGIES`: which ones; strategies differ in nothing else
4. corruption   `corrupt`: 80 % [MASK], 10 % a random id, 10 % unchanged

Every draw is a hash of (seed, epoch, global token position, stream), so a mask does not depend on
how the tokens were cut into batches, nor on the rank or worker that drew it. No function here loops
over sequences: choosing the best k of each is one sort of packed 64-bit keys (`_take_first`).

Letters: `B` sequences, `T` tokens in the batch, `C` candidates, `M` masked positions,
`V` vocabulary.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.errors import ConfigError, DataError

MASKED_SHARE = 0.8
RANDOM_SHARE = 0.1

ROUNDING_WINDOW = 4096  # tokens; with a single draw, rows of equal length could all round one way

# One stream for each decision, so that no two decisions about a token share a number.
STREAM_BUDGET = 0
STREAM_CHOICE = 1
STREAM_TIES = 2
STREAM_FILL = 3
STREAM_MATCHED = 4
STREAM_CORRUPTION = 5
STREAM_REPLACEMENT = 6
STREAM_WORD = 7
STREAM_SHOWN = 8  # documents that show_masks.py picks


# ------------------------------------------------------------------------------- randomness


def counter_uniform(seed: int, epoch: int, positions: np.ndarray, stream: int) -> np.ndarray:
    """Draw one uniform number for each global token position.

    It is number `position` of a SplitMix64 generator whose start is hashed from the other three.

    Args:
        seed: any integer; the run's seed.
        epoch: any integer; 0 for masks that are stored once.
        positions: token positions in the whole store, any shape, int64 or uint64.
        stream: one of the `STREAM_` constants.
    Returns:
        Numbers in [0, 1) with 24 bits, the shape of `positions`, float32.
    """
    return _counter_bits(seed, epoch, positions, stream).astype(np.float32) * np.float32(2.0**-24)


_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_WORD = (1 << 64) - 1


def _mix(word: int) -> int:
    word = (word + _GAMMA) & _WORD
    word = ((word ^ (word >> 30)) * _MIX_1) & _WORD
    word = ((word ^ (word >> 27)) * _MIX_2) & _WORD
    return word ^ (word >> 31)


def _counter_bits(seed: int, epoch: int, positions: np.ndarray, stream: int) -> np.ndarray:
    """The 24 random bits behind `counter_uniform`, uint64."""
    start = _mix(_mix(_mix(seed & _WORD) ^ (epoch & _WORD)) ^ stream)
    # A one-element array, not a scalar: numpy warns when a scalar overflows, and here it must.
    word = np.array(positions, dtype=np.uint64, ndmin=1)
    word += np.uint64(1)
    word *= np.uint64(_GAMMA)
    word += np.uint64(start)
    word ^= word >> np.uint64(30)
    word *= np.uint64(_MIX_1)
    word ^= word >> np.uint64(27)
    word *= np.uint64(_MIX_2)
    word ^= word >> np.uint64(31)
    word >>= np.uint64(40)
    return word.reshape(np.shape(positions))


# ------------------------------------------------------------------- the batch; 1. candidates


@dataclass(frozen=True)
class Sequences:
    """A ragged batch, everything that a strategy sees.

    offsets: start of each sequence in the flat arrays, and the end, `(B+1,)` int64, ascending.
    positions: token positions in the whole store, the key of every draw, `(T,)` int64; those of
        the candidates are unique.
    candidates: True where a token may be masked, `(T,)` bool.
    rate: share of a sequence's candidates to mask, in (0, 1].
    seed, epoch: integers; the epoch is 0 for masks that are stored once.
    scores: log-odds that a token is important, `(T,)` float16 (`selective`, `selective_fill`).
    continues_word: True where a token continues the word of the token before, `(T,)` bool
        (`whole_word`); from `find_continuations`.
    matched_counts: how many to choose from each sequence, `(B,)` int64 (`random_matched`).
    """

    offsets: np.ndarray
    positions: np.ndarray
    candidates: np.ndarray
    rate: float
    seed: int
    epoch: int
    scores: np.ndarray | None = None
    continues_word: np.ndarray | None = None
    matched_counts: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"the mask rate is {self.rate}; it must be in (0, 1]")
        num_tokens = len(self.candidates)
        if len(self.offsets) == 0 or self.offsets[0] != 0 or self.offsets[-1] != num_tokens:
            raise ValueError(f"offsets must run from 0 to the {num_tokens} tokens of the batch")
        if np.any(np.diff(self.offsets) < 0):
            raise ValueError("offsets must ascend")
        if len(self.offsets) - 1 > _MAX_SEQUENCES:
            raise ValueError(f"a batch holds at most {_MAX_SEQUENCES} sequences; cut it")
        num_sequences = len(self.offsets) - 1
        for name, length in (
            ("positions", num_tokens),
            ("scores", num_tokens),
            ("continues_word", num_tokens),
            ("matched_counts", num_sequences),
        ):
            array = getattr(self, name)
            if array is not None and array.shape != (length,):
                raise ValueError(f"{name} has shape {array.shape}; ({length},) is needed")


def find_candidates(tokens: np.ndarray, all_special_ids: Sequence[int]) -> np.ndarray:
    """Tell which tokens may be masked: all but special ones ([UNK] is one).

    Args:
        tokens: token ids, `(T,)` uint16.
        all_special_ids: special ids of the tokenizer.
    Returns:
        True for candidates, `(T,)` bool.
    """
    return np.isin(tokens, np.asarray(all_special_ids, dtype=tokens.dtype), invert=True)


@dataclass(frozen=True)
class _Candidates:
    """Candidates of a batch: flat index, sequence `(C,)`; count and first one of each `(B,)`."""

    index: np.ndarray
    sequence: np.ndarray
    counts: np.ndarray
    starts: np.ndarray


def _list_candidates(sequences: Sequences) -> _Candidates:
    # candidates 1 0 1 | 1 1 (offsets 0 3 5): index 0 2 3 4, before 0 1 1 2 3 4,
    # counts before[3]-before[0], before[5]-before[3] = 2 2, starts 0 2, sequence 0 0 1 1.
    before = np.zeros(len(sequences.candidates) + 1, dtype=np.int64)
    np.cumsum(sequences.candidates, out=before[1:])
    counts = before[sequences.offsets[1:]] - before[sequences.offsets[:-1]]
    return _Candidates(
        index=np.flatnonzero(sequences.candidates),
        sequence=np.repeat(np.arange(len(counts)), counts),
        counts=counts,
        starts=before[sequences.offsets[:-1]],
    )


# --------------------------------------------------------------------------------- 2. budget


def draw_counts(sequences: Sequences) -> np.ndarray:
    """Draw how many tokens of each sequence `random` masks.

    Stochastic rounding: 22 candidates at 15 % are 3.3, so 3 with probability 0.7 and 4 with 0.3.
    The rate is met in expectation by every sequence, however short. One number u is drawn for
    every `ROUNDING_WINDOW` tokens of the store, and a sequence of n candidates at position p gets
    floor(rate (p + n) + u) - floor(rate p + u): where one sequence is rounded up its neighbour is
    rounded down, so that a run of neighbours is within a token or two of its rate. Yet the count
    of a sequence depends on nothing but its position and its candidates.

    Returns:
        Counts, `(B,)` int64, at most the candidates of each sequence.
    """
    return _draw_counts(sequences, _list_candidates(sequences))


def _draw_counts(sequences: Sequences, found: _Candidates) -> np.ndarray:
    # The first candidate's position is the sequence's key: an inserted [CLS] has none of its own.
    filled = found.counts > 0
    first = sequences.positions[found.index[found.starts[filled]]]
    counts = np.zeros(len(found.counts), dtype=np.int64)
    windows = first // ROUNDING_WINDOW
    shift = counter_uniform(sequences.seed, sequences.epoch, windows, STREAM_BUDGET)
    before = sequences.rate * first + shift.astype(np.float64)
    after = before + sequences.rate * found.counts[filled]
    counts[filled] = np.floor(after) - np.floor(before)
    return np.minimum(counts, found.counts)


def selective_limit(num_candidates: np.ndarray, rate: float) -> np.ndarray:
    """Give the most tokens that `selective` masks: floor(rate x candidates), at least one.

    Args:
        num_candidates: candidates of each sequence, `(B,)` int64.
        rate: share to mask, in (0, 1].
    Returns:
        Limits, `(B,)` int64, at most the candidates.
    """
    limit = np.floor(rate * num_candidates).astype(np.int64)
    return np.minimum(np.maximum(limit, 1), num_candidates)


# --------------------------------------------------------------------------------- 3. choice

# A sort key is: sequence (24 bits), then importance (16 bits), then a draw (24 bits).
_MAX_SEQUENCES = 1 << 24
_SEQUENCE_SHIFT = np.uint64(40)
_IMPORTANCE_SHIFT = np.uint64(24)
_INFINITY = 0x7C00  # as float16; above it are the numbers that are none


def _draw_keys(
    sequences: Sequences,
    index: np.ndarray,
    sequence: np.ndarray,
    stream: int,
    importance: np.ndarray | None = None,
) -> np.ndarray:
    """Sort keys, lowest first, of tokens at flat `index` `(K,)`: uint64 `(K,)`."""
    positions = sequences.positions[index]
    keys = _counter_bits(sequences.seed, sequences.epoch, positions, stream)
    keys |= sequence.astype(np.uint64) << _SEQUENCE_SHIFT
    if importance is not None:
        keys |= importance.astype(np.uint64) << _IMPORTANCE_SHIFT
    return keys


def _take_first(keys: np.ndarray, sequence: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Take the `counts[b]` lowest keys of each sequence b.

    `sequence` `(K,)` ascends and leads the keys, so sorting moves tokens only inside their
    sequence: with sequence 0 0 0 1 1 and draws 5 2 9 7 1, the order is 1 0 2 4 3 and the rank
    inside the sequence 0 1 2 0 1; counts 2 1 take 1 0 4. The sort is stable: equal draws (one in
    16 million) go by position, however the batch was cut.

    Returns:
        Indices into `keys`, in the order taken, `(sum of counts,)` int64.
    """
    order = np.argsort(keys, kind="stable")
    ends = np.searchsorted(sequence, np.arange(len(counts) + 1))
    rank = np.arange(len(keys)) - ends[sequence]
    return order[rank < counts[sequence]]


def choose_random(sequences: Sequences) -> np.ndarray:
    """Choose uniformly among the candidates; the rate is met in expectation by each sequence.

    Returns:
        Ascending unique indices into the batch's flat arrays, `(M,)` int64 (every strategy).
    """
    found = _list_candidates(sequences)
    counts = _draw_counts(sequences, found)
    return _choose_uniformly(sequences, found, counts, STREAM_CHOICE)


def _choose_uniformly(
    sequences: Sequences, found: _Candidates, counts: np.ndarray, stream: int
) -> np.ndarray:
    keys = _draw_keys(sequences, found.index, found.sequence, stream)
    return np.sort(found.index[_take_first(keys, found.sequence, counts)])


def choose_whole_words(sequences: Sequences) -> np.ndarray:
    """Choose whole words in random order, passing over those that no longer fit into the budget.

    The budget is that of `random`. Where every word left is too long for what is left of it, the
    next one is kept with the probability that makes the expected number of tokens the budget:
    1 token left, a word of 3: 1/3.

    Raises:
        ValueError: if the batch has no `continues_word`.
    """
    continues = _need(sequences, "continues_word")
    found = _list_candidates(sequences)
    # A word starts at a token that does not continue one, at a sequence's first candidate, and
    # after a token that is no candidate.
    starts = ~continues[found.index]
    starts[found.starts[found.counts > 0]] = True
    starts[1:] |= np.diff(found.index) > 1
    word = np.cumsum(starts) - 1
    first = np.flatnonzero(starts)
    keys = _draw_keys(sequences, found.index[first], found.sequence[first], STREAM_CHOICE)
    order = np.argsort(keys, kind="stable")
    size = np.diff(np.append(first, len(found.index)))[order]
    sequence = found.sequence[first][order]

    kept, left = _take_what_fits(size, sequence, _draw_counts(sequences, found))
    rest = np.flatnonzero(~kept & (left[sequence] > 0))
    _, next_one = np.unique(sequence[rest], return_index=True)
    rest = rest[next_one]
    positions = sequences.positions[found.index[first][order[rest]]]
    draw = counter_uniform(sequences.seed, sequences.epoch, positions, STREAM_WORD)
    kept[rest] = draw * size[rest] < left[sequence[rest]]
    chosen = np.zeros(len(first), dtype=bool)
    chosen[order] = kept
    return found.index[chosen[word]]


def _take_what_fits(
    size: np.ndarray, sequence: np.ndarray, limits: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Take words in the order given while they fit, passing over those that do not.

    Sizes 2 3 1 1 and a limit of 4: takes 2, passes over 3, takes 1 and 1. Each turn of the loop
    takes words up to the first that does not fit; what does not fit now never will.

    Args:
        size, sequence: of each word, `(W,)` int64; the words of a sequence are neighbours.
        limits: tokens that each sequence may spend, `(B,)` int64.
    Returns:
        Which words were taken, `(W,)` bool, and what is left of each limit, `(B,)` int64.
    """
    kept, left = np.zeros(len(size), dtype=bool), limits.copy()
    open_words = np.arange(len(size))
    while True:
        open_words = open_words[size[open_words] <= left[sequence[open_words]]]
        if not len(open_words):
            return kept, left
        sizes, owners = size[open_words], sequence[open_words]
        spent = np.cumsum(sizes)
        begins = np.diff(owners, prepend=-1) != 0
        spent -= np.maximum.accumulate(np.where(begins, spent - sizes, 0))
        fits = spent <= left[owners]
        kept[open_words[fits]] = True
        left -= np.bincount(owners[fits], sizes[fits], minlength=len(left)).astype(np.int64)
        open_words = open_words[~fits]


def choose_selective(sequences: Sequences) -> np.ndarray:
    """Choose the most important tokens: log-odds above 0, best first, within `selective_limit`.

    A sequence without such a token gets no mask at all. Equal scores go by a draw.

    Raises:
        ValueError: if the batch has no `scores`.
    """
    return np.sort(_choose_selective(sequences, _list_candidates(sequences)))


def _choose_selective(sequences: Sequences, found: _Candidates) -> np.ndarray:
    scores = np.asarray(_need(sequences, "scores"), dtype=np.float16)[found.index].view(np.uint16)
    # Positive float16 numbers are ordered as their bits are, from 1 to those of infinity; numpy
    # compares whole numbers ten times as fast.
    important = (scores > 0) & (scores <= _INFINITY)
    index = found.index[important]
    sequence = found.sequence[important]
    worst_first = scores[important]
    keys = _draw_keys(sequences, index, sequence, STREAM_TIES, 0x7FFF - worst_first)
    limits = selective_limit(found.counts, sequences.rate)
    return index[_take_first(keys, sequence, limits)]


def choose_selective_fill(sequences: Sequences) -> np.ndarray:
    """Choose as `selective`, then top up at random to the number that `random` would mask.

    A sequence gets max(what `selective` chose, `draw_counts`) tokens; only sequences shorter than
    1 / rate can have more than their draw.
    """
    found = _list_candidates(sequences)
    chosen = _choose_selective(sequences, found)
    taken = np.zeros(len(sequences.candidates), dtype=bool)
    taken[chosen] = True
    taken_candidates = taken[found.index]
    num_taken = np.bincount(found.sequence[taken_candidates], minlength=len(found.counts))
    rest = found.index[~taken_candidates]
    rest_sequence = found.sequence[~taken_candidates]
    missing = np.maximum(_draw_counts(sequences, found) - num_taken, 0)
    keys = _draw_keys(sequences, rest, rest_sequence, STREAM_FILL)
    taken[rest[_take_first(keys, rest_sequence, missing)]] = True
    return np.flatnonzero(taken)


def choose_random_matched(sequences: Sequences) -> np.ndarray:
    """Choose uniformly as many tokens of each sequence as `matched_counts` says: the control.

    Raises:
        ValueError: if the batch has no `matched_counts`, or one exceeds the candidates.
    """
    counts = _need(sequences, "matched_counts")
    found = _list_candidates(sequences)
    if np.any(counts > found.counts):
        worst = int(np.argmax(counts - found.counts))
        raise ValueError(
            f"sequence {worst}: {counts[worst]} tokens to match, {found.counts[worst]} candidates"
        )
    return _choose_uniformly(sequences, found, counts, STREAM_MATCHED)


def _need(sequences: Sequences, name: str) -> np.ndarray:
    array = getattr(sequences, name)
    if array is None:
        raise ValueError(f"this masking strategy needs Sequences.{name}")
    return array


STRATEGIES: dict[str, Callable[[Sequences], np.ndarray]] = {
    "random": choose_random,
    "whole_word": choose_whole_words,
    "selective": choose_selective,
    "selective_fill": choose_selective_fill,
    "random_matched": choose_random_matched,
}
# Drawn anew in each epoch while training / stored once by build_masks.py.
DRAWN = ("random", "whole_word")
PREBUILT = ("selective", "selective_fill", "random_matched")


# ------------------------------------------------------------------------------ 4. corruption


def corrupt(
    original: np.ndarray,
    positions: np.ndarray,
    *,
    seed: int,
    epoch: int,
    mask_id: int,
    vocab_size: int,
    all_special_ids: Sequence[int],
) -> np.ndarray:
    """Give the ids that stand at the masked positions: 80 % [MASK], 10 % random, 10 % unchanged.

    Redrawn in each epoch, also for masks that are stored once. A random id comes uniformly from
    the vocabulary without special tokens; it may happen to be the original.

    Args:
        original: ids of the masked tokens, `(M,)` any integer dtype.
        positions: their positions in the whole store, `(M,)` int64.
    Returns:
        New ids, `(M,)`, the dtype of `original`.
    """
    draw = counter_uniform(seed, epoch, positions, STREAM_CORRUPTION)
    corrupted = np.where(draw < MASKED_SHARE, original.dtype.type(mask_id), original)
    randomised = (draw >= MASKED_SHARE) & (draw < MASKED_SHARE + RANDOM_SHARE)
    # Number r of the ids that are left when the special ones are taken out. Special 0 3 of 6: left
    # are 1 2 4 5; special id number i has (id - i) = 0 2 ordinary ids before it, so r = 0 1 2 3
    # have 1 1 2 2 special ids at or before them and become 1 2 4 5.
    special = np.unique([i for i in all_special_ids if 0 <= i < vocab_size]).astype(np.int64)
    draw = counter_uniform(seed, epoch, positions[randomised], STREAM_REPLACEMENT)
    replacement = (draw.astype(np.float64) * (vocab_size - len(special))).astype(np.int64)
    replacement += np.searchsorted(special - np.arange(len(special)), replacement, side="right")
    corrupted[randomised] = replacement
    return corrupted


# ---------------------------------------------------------------------------------- words

# How a token may begin (first line) and end (both), as far as words are concerned; each of these
# has a sample to put before the tokenizer's own pre-tokenizer. `_ENDING` is a whole token that
# makes a suffix with an apostrophe ("s" of "'s"), `_SUFFIX` one with the apostrophe ("'s").
_LETTER, _NUMBER, _OTHER, _ENDING = range(4)
_WHITE, _SPACE, _APOSTROPHE, _SUFFIX = range(4, 8)
_SAMPLES = ("a", "1", "!", "s", "\n", " ", "'", "'s")
# Three more: a token that continues nothing (as an end: that nothing continues); one that begins
# inside a character, and so continues whatever is before it; one that holds only the tail of a
# character, and so ends as the token with its head does.
_STARTS, _CONTINUES, _INHERITS = range(8, 11)


@dataclass(frozen=True)
class WordTable:
    """Which ids continue a word: how each id begins and ends, and which ends and begins join.

    first, last: kind of each id's beginning and end, `(V,)` uint8.
    joins: True where a token that begins with kind j continues one that ends with kind i,
        `(kinds, kinds)` bool, indexed `[i, j]`.
    """

    first: np.ndarray
    last: np.ndarray
    joins: np.ndarray


def find_continuations(
    tokens: np.ndarray, offsets: np.ndarray, table: WordTable
) -> np.ndarray:
    """Tell which tokens continue the word of the token before; a sequence's first never does.

    Args:
        tokens: token ids, `(T,)` uint16.
        offsets: start of each sequence in `tokens`, and the end, `(B+1,)` int64.
        table: from `continuation_table`.
    Returns:
        `(T,)` bool.
    """
    continues = np.zeros(len(tokens), dtype=bool)
    last = table.last[tokens]
    # A token that holds only the tail bytes of a character ends as the token with its head does.
    owner = np.where(last == _INHERITS, 0, np.arange(len(tokens)))
    last = last[np.maximum.accumulate(owner)]
    continues[1:] = table.joins[last[:-1], table.first[tokens[1:]]]
    starts = offsets[:-1]
    continues[starts[starts < len(tokens)]] = False
    return continues


def open_tokenizer(folder: str | Path) -> Any:
    """Open a saved tokenizer as a `tokenizers.Tokenizer`, which loads at once.

    Raises:
        DataError: no `tokenizer.json` in the folder, or a broken one.
    """
    from tokenizers import Tokenizer

    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"{path}: no such file; make the token store again")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more precise
        raise DataError(f"{path}: not a tokenizer ({error}); make the store again") from None


def continuation_table(tokenizer: Any) -> WordTable:
    """Read off a tokenizer which of its ids continue a word.

    WordPiece: the ids written with its prefix (`##`); exact. Byte-level BPE (RoBERTa, ModernBERT):
    a token continues a word when the tokenizer's own pre-tokenizer keeps the end of the token
    before and the beginning of this one in one piece, by kind of character: letters with letters,
    digits with digits, the rest with the rest, never across a leading space. Not exact where two
    ids cannot tell: runs of white space, and characters of which a token holds the first byte.

    Args:
        tokenizer: a fast tokenizer of transformers, or the `tokenizers.Tokenizer` inside one.
    Raises:
        ConfigError: for any other kind of tokenizer.
    """
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    backend = json.loads(tokenizer.to_str())
    model = backend["model"]
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    added = np.array([token["id"] for token in backend["added_tokens"]], dtype=np.int64)
    size = max(vocabulary.values()) + 1
    first = np.full(size, _STARTS, dtype=np.uint8)
    last = np.full(size, _OTHER, dtype=np.uint8)
    joins = np.zeros((_INHERITS + 1, _INHERITS + 1), dtype=bool)
    joins[:, _CONTINUES] = True
    if model["type"] == "WordPiece":
        prefix = model["continuing_subword_prefix"]
        first[[i for name, i in vocabulary.items() if name.startswith(prefix)]] = _CONTINUES
    elif model["type"] == "BPE" and "ByteLevel" in json.dumps(backend["pre_tokenizer"]):
        split = tokenizer.pre_tokenizer.pre_tokenize_str
        to_byte = _byte_level_alphabet()
        for name, i in vocabulary.items():
            if name and all(character in to_byte for character in name):
                first[i], last[i] = _token_kinds(bytes(to_byte[c] for c in name), split)
        for end, end_sample in enumerate(_SAMPLES):
            for begin in (_LETTER, _NUMBER, _OTHER, _ENDING):
                joins[end, begin] = len(split(end_sample + _SAMPLES[begin])) == 1
    else:
        raise ConfigError(
            f"whole words are known for WordPiece and byte-level BPE tokenizers, and this one is "
            f"{model['type']}; use another masking strategy, such as random"
        )
    # Added tokens are cut out of the text before words are looked for.
    first[added], last[added] = _STARTS, _STARTS
    return WordTable(first, last, joins)


def _token_kinds(raw: bytes, split: Callable[[str], list]) -> tuple[int, int]:
    """How a byte-level token begins and ends; `split` is the pre-tokenizer."""
    tail = 0
    while tail < len(raw) and raw[tail] & 0xC0 == 0x80:
        tail += 1
    if tail == len(raw):
        return _CONTINUES, _INHERITS
    text = raw[tail:].decode("utf-8", errors="ignore")
    head = raw[tail + len(text.encode()) :]
    if head:  # a character cut off: the kind of the one with A1 for each missing byte
        missing = (head[0] >= 0xC0) + (head[0] >= 0xE0) + (head[0] >= 0xF0) + 1 - len(head)
        text += (head + b"\xa1" * missing).decode("utf-8", errors="replace")
    if tail:
        first = _CONTINUES
    elif text[0].isspace():
        first = _STARTS
    elif text.isalpha() and len(split("'" + text)) == 1:
        first = _ENDING
    else:
        first = _character_kind(text[0])
    if text[-1] == " ":
        return first, _SPACE
    if text == "'":
        return first, _APOSTROPHE
    if text[0] == "'" and text[1:].isalpha() and len(split(text + "a")) > 1:
        return first, _SUFFIX  # nothing continues it: "'sa" is "'s" and "a"
    return first, _character_kind(text[-1])


def _character_kind(character: str) -> int:
    if character.isspace():
        return _WHITE
    category = unicodedata.category(character)[0]
    return {"L": _LETTER, "N": _NUMBER}.get(category, _OTHER)


def _byte_level_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary, and that byte.

    Printable Latin-1 bytes stand for themselves; the other 68 are the characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(hidden)})
    return alphabet
