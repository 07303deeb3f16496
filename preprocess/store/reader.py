"""The token store as it is read.

A store is named by a prefix `P`: `P.bin` (uint16 ids, nothing between them), `P.idx` (Megatron-Core
indexed-dataset index, version 1), `P.json` (counts, options, hashes; written last, so that its
presence means complete) and `P.tokenizer/`. A sharded store is `P-00003-of-00008.{bin,idx,json}`
and a `P.json` that lists the shards. Plain numpy reads a shard as well:

    tokens = np.memmap("P.bin", "<u2", "r")
    lengths = np.fromfile("P.idx", "<i4", num_sequences, offset=34)  # tokens per sequence

No other room opens a `.bin`. Sizes are checked before anything is mapped, so a broken header
allocates nothing. Opening maps the index too: memory does not grow with the store.

Every JSON carries its own sha256. Opening a store checks that, the sizes, and the sha256 of the
tokenizer and of the index; opening an array checks its whole content (nothing else would notice a
moved mask). Index and arrays are hashed once: `P.memo.json` keeps the size, times and inode of each
file that passed, and a file that has changed since is hashed again. The ids are too many to hash;
they are compared with the vocabulary as they are read. `verify` hashes every byte. A file that is
truncated while it is mapped ends the process (SIGBUS): no reader of mapped files can turn that into
an error.

Letters: `T` tokens, `N` sequences, `D` documents, `M` masked positions.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.errors import ConfigError, DataError, check_shard
from preprocess.files import file_sha256
from preprocess.store.layout import (
    BLOCK_ENTRIES,
    DTYPES,
    HEADER,
    MAGIC,
    MAX_VOCAB,
    OUR_DTYPE,
    check_content,
    map_file,
    read_sealed,
    same_files,
)

BLOCK_TOKENS = 1 << 20  # a strategy makes at most about 100 MB of keys and flags for these


@dataclass(frozen=True, eq=False)
class Shard:
    """One mapped shard.

    Attributes:
        tokens: `(T,)` uint16, read-only.
        sequence_offsets: first token of each sequence, and the end, `(N+1,)` int64.
        document_offsets: first sequence of each document, and the end, `(D+1,)` int64.
        token_start: number of tokens in the shards before this one.
    """

    prefix: str
    tokens: np.ndarray
    sequence_offsets: Any
    document_offsets: Any
    token_start: int
    fingerprint: str

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_sequences(self) -> int:
        return len(self.sequence_offsets) - 1

    @property
    def num_documents(self) -> int:
        return len(self.document_offsets) - 1


class _Ids(np.memmap):
    """Mapped ids that are compared with the vocabulary as they are read.

    Otherwise a damaged `.bin` of the right size would hand out ids for which an embedding has no
    row, or a meaningless one (a GPU reads past the end, a padded embedding notices nothing).
    """

    vocab_size = MAX_VOCAB
    path = ""

    def __getitem__(self, where: Any) -> Any:
        found = super().__getitem__(where)
        if isinstance(found, np.ndarray):
            found = found.view(np.ndarray)  # checked here, once
        if found.size and int(found.max()) >= self.vocab_size:
            raise DataError(
                f"{self.path}: token id {int(found.max())} is not in the vocabulary "
                f"(0 to {self.vocab_size - 1}); damaged, make it again"
            )
        return found


def _read_header(prefix: str) -> tuple[np.dtype, int, int]:
    """Check the header of `P.idx` against the file's size; allocates nothing.

    Returns:
        dtype of the ids, number of sequences, number of entries in the list of documents.
    """
    path, bin_path = prefix + ".idx", prefix + ".bin"
    for needed in (path, bin_path):
        if not os.path.isfile(needed):
            raise DataError(f"{needed}: no such file; the token store is incomplete, make it again")
    with open(path, "rb") as stream:
        header = stream.read(HEADER.size)
        actual = os.fstat(stream.fileno()).st_size
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise DataError(f"{path}: not a Megatron-Core index (wrong header); make it again")
    _, version, code, num_sequences, num_indices = HEADER.unpack(header)
    if version != 1 or code not in DTYPES:
        raise DataError(
            f"{path}: index version {version}, dtype code {code}; "
            f"allowed are version 1, codes {sorted(DTYPES)}"
        )
    expected = HEADER.size + 12 * num_sequences + 8 * num_indices
    # A multimodal index has one more byte per sequence; nobody here has such a store.
    if actual != expected or num_indices < 1:
        raise DataError(
            f"{path}: {actual:,} bytes, but its header says {expected:,}; "
            f"truncated or damaged, make it again"
        )
    return DTYPES[code], num_sequences, num_indices


def _map_index(
    prefix: str, num_sequences: int, num_indices: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Map `P.idx`: lengths `(N,)` int32, first bytes `(N,)` int64, documents `(D+1,)` int64."""
    path, start = prefix + ".idx", HEADER.size
    return (
        map_file(path, np.dtype("<i4"), num_sequences, start),
        map_file(path, np.dtype("<i8"), num_sequences, start + 4 * num_sequences),
        map_file(path, np.dtype("<i8"), num_indices, start + 12 * num_sequences),
    )


class Offsets:
    """The start of each sequence or document, and the end of the last one, left on the disk.

    Slices, numbers and arrays of numbers give int64. numpy's functions read all of the file,
    except `np.searchsorted`.

    Args:
        starts: mapped, `(n,)` int64, `unit` times the values.
        end: the last value.
    """

    def __init__(self, starts: np.ndarray, unit: int, end: int) -> None:
        self._starts, self._unit, self._end = starts, unit, end

    def __len__(self) -> int:
        return len(self._starts) + 1

    def __getitem__(self, where: Any) -> Any:
        if not isinstance(where, slice):
            numbers = np.asarray(where)
            numbers = np.where(numbers < 0, numbers + len(self), numbers)
            found = np.full(np.shape(numbers), self._end, dtype=np.int64)
            inside = numbers < len(self._starts)
            found[inside] = self._starts[numbers[inside]] // self._unit
            return found if found.ndim else found[()]
        first, last, step = where.indices(len(self))
        if step != 1:
            return np.asarray(self)[where]
        found = np.array(self._starts[first:last]) // self._unit
        return np.append(found, self._end) if first < last == len(self) else found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or np.int64, copy=False)

    def searchsorted(self, values: Any, side: str = "left", sorter: None = None) -> Any:
        """Search by bisection, a few entries at a time; `np.searchsorted` calls this.

        numpy's own search would copy the whole array: behind the 34-byte header of `P.idx` its
        values are not aligned to 8 bytes.
        """
        values = np.asarray(values)
        low, high = np.zeros(values.shape, np.int64), np.full(values.shape, len(self), np.int64)
        for _ in range(len(self).bit_length()):
            middle = (low + high) // 2
            found = self[np.minimum(middle, len(self) - 1)]
            before = (found <= values if side == "right" else found < values) & (low < high)
            low, high = np.where(before, middle + 1, low), np.where(before, high, middle)
        return low if low.ndim else low[()]


def read_foreign(prefix: str) -> Iterator[list[np.ndarray]]:
    """Yield the documents of any Megatron-Core store: the ids of each sequence, int64.

    Raises:
        DataError: an index that does not fit the size of `P.bin`.
    """
    bin_path = prefix + ".bin"
    dtype, num_sequences, num_indices = _read_header(prefix)
    lengths, pointers, documents = map(np.array, _map_index(prefix, num_sequences, num_indices))
    num_bytes = os.path.getsize(bin_path)
    starts = pointers // dtype.itemsize
    ends = starts + lengths
    if (
        (num_sequences and (lengths.min() < 0 or starts.min() < 0))
        or (ends < starts).any()  # wrapped around
        or (pointers % dtype.itemsize).any()
        or (num_sequences and int(ends.max()) * dtype.itemsize > num_bytes)
        or num_bytes % dtype.itemsize
    ):
        raise DataError(
            f"{bin_path}: {num_bytes:,} bytes do not hold the sequences that {prefix}.idx lists; "
            f"truncated or damaged, make it again"
        )
    _check_documents(prefix, documents, num_sequences)
    tokens = map_file(bin_path, dtype, num_bytes // dtype.itemsize)
    for first, last in zip(documents[:-1].tolist(), documents[1:].tolist(), strict=True):
        spans = zip(starts[first:last].tolist(), lengths[first:last].tolist(), strict=True)
        yield [tokens[a : a + n].astype(np.int64) for a, n in spans]


def _open_shard(prefix: str, info: dict[str, Any], token_start: int, verify: bool) -> Shard:
    path = prefix + ".json"
    dtype, num_sequences, num_indices = _read_header(prefix)
    if dtype != DTYPES[OUR_DTYPE]:
        raise DataError(f"{prefix}.idx: {dtype} ids, not uint16; take it in with --adopt")
    counts = info["counts"]
    for key, value in (("sequences", num_sequences), ("documents", num_indices - 1)):
        if counts.get(key) != value:
            raise DataError(
                f"{prefix}.idx: {value} {key}, but {path} says {counts.get(key)}; make it again"
            )
    num_tokens, num_bytes = counts["tokens"], os.path.getsize(prefix + ".bin")
    if num_bytes != 2 * num_tokens:
        raise DataError(
            f"{prefix}.bin: {num_bytes:,} bytes, but {path} says {num_tokens} tokens of two bytes; "
            f"truncated or damaged, make it again"
        )
    lengths, pointers, documents = _map_index(prefix, num_sequences, num_indices)
    check_index = partial(_check_offsets, prefix, lengths, pointers, documents, num_tokens)
    check_content(prefix, Path(prefix + ".idx"), 0, info["idx_sha256"], verify, check_index)
    if verify and file_sha256(f"{prefix}.bin") != info["bin_sha256"]:
        raise DataError(f"{prefix}.bin: its content is not what {path} says (sha256)")
    tokens = map_file(prefix + ".bin", DTYPES[OUR_DTYPE], num_tokens, kind=_Ids)
    if isinstance(tokens, _Ids):
        tokens.vocab_size, tokens.path = info["tokenizer"]["vocab_size"], f"{prefix}.bin"
    return Shard(
        prefix, tokens, Offsets(pointers, 2, num_tokens), Offsets(documents[:-1], 1, num_sequences),
        token_start, info["fingerprint"],
    )


def _check_offsets(
    prefix: str, lengths: np.ndarray, pointers: np.ndarray, documents: np.ndarray, num_tokens: int
) -> None:
    """Check that sequences follow each other without gaps, and documents cover them, in blocks."""
    end = 0
    for first in range(0, len(lengths), BLOCK_ENTRIES):
        block = np.array(lengths[first : first + BLOCK_ENTRIES], dtype=np.int64)
        ends = end + np.cumsum(block)
        gaps = pointers[first : first + BLOCK_ENTRIES] != 2 * (ends - block)
        if (block < 0).any() or gaps.any():
            raise DataError(
                f"{prefix}.idx: its sequences do not follow each other; take it in with --adopt"
            )
        end = int(ends[-1])
    if end != num_tokens:
        raise DataError(
            f"{prefix}.idx: {end} tokens, but {prefix}.json says {num_tokens}; make it again"
        )
    _check_documents(prefix, documents, len(lengths))


def _check_documents(prefix: str, documents: np.ndarray, num_sequences: int) -> None:
    """Check that documents cover the sequences, in blocks."""
    wrong = documents[0] != 0 or documents[-1] != num_sequences
    for first in range(0, len(documents), BLOCK_ENTRIES):
        wrong |= bool((np.diff(documents[first : first + BLOCK_ENTRIES + 1]) < 0).any())
    if wrong:
        raise DataError(f"{prefix}.idx: the documents do not cover the sequences; make it again")


def read_store_json(prefix: str) -> dict[str, Any]:
    """Read the JSON of a store or of a shard."""
    path = prefix + ".json"
    if not os.path.isfile(path):
        remedy = ("take the .bin and .idx in with tokenize_corpus.py --adopt"
                  if os.path.exists(prefix + ".bin") else "make one with tokenize_corpus.py")
        raise DataError(f"{path}: no complete token store here; {remedy} --output {prefix}")
    info = read_sealed(path, "make the store again")
    if not {"tokenizer", "counts", "fingerprint"} <= info.keys():
        raise DataError(f"{path}: not the JSON of a token store; give the prefix of a store")
    return info


def _beside(prefix: str, name: Any) -> str:
    """Return the path of a file that `P.json` names; the file may be a link to another disk."""
    inside = isinstance(name, str) and "\0" not in name and os.path.basename(name) == name
    if not inside or name in ("", ".", ".."):
        raise DataError(
            f"{prefix}.json: names {name!r}, outside its folder; make the store again"
        )
    return str(Path(prefix).parent / name)


@dataclass(frozen=True, eq=False)
class TokenStore:
    """A complete store, of one piece or of shards; open it with `TokenStore.open`.

    Attributes:
        fingerprint: changes with any id or boundary.
        special_ids: those of `cls`, `sep`, `pad`, `mask` and `unk` that exist.
        tokenizer_dir: the tokenizer saved beside the store.
        info: the content of `P.json`.
    """

    prefix: str
    shards: list[Shard]
    fingerprint: str
    vocab_size: int
    special_ids: dict[str, int]
    all_special_ids: tuple[int, ...]
    tokenizer_dir: str
    num_tokens: int
    num_sequences: int
    num_documents: int
    info: dict[str, Any]

    @classmethod
    def open(cls, prefix: str | Path, verify: bool = False) -> TokenStore:
        """Open the store `prefix`; `verify` hashes the ids too.

        Raises:
            DataError: names the file that is absent, truncated, damaged, or of another version.
        """
        prefix = str(prefix)
        info = read_store_json(prefix)
        shards: list[Shard] = []
        start = 0
        for entry in info.get("shards") or [None]:
            if entry is None:
                shard_info, path = info, prefix
            else:
                path = _beside(prefix, entry["name"])
                shard_info = read_store_json(path)
                if "shards" in shard_info or shard_info["fingerprint"] != entry["fingerprint"]:
                    raise DataError(
                        f"{path}.json: fingerprint {shard_info['fingerprint']}, but {prefix}.json "
                        f"lists {entry['fingerprint']}; make the shards again"
                    )
            shards.append(_open_shard(path, shard_info, start, verify))
            start += shards[-1].num_tokens
        tokenizer = info["tokenizer"]
        tokenizer_dir = _beside(prefix, tokenizer["folder"])
        if not same_files(Path(tokenizer_dir), tokenizer["files"]):
            raise DataError(
                f"{tokenizer_dir}: not the tokenizer that {prefix}.json names (sha256 of its "
                f"files); make the store again"
            )
        return cls(
            prefix=prefix,
            shards=shards,
            fingerprint=info["fingerprint"],
            vocab_size=tokenizer["vocab_size"],
            special_ids=dict(tokenizer["special_ids"]),
            all_special_ids=tuple(tokenizer["all_special_ids"]),
            tokenizer_dir=tokenizer_dir,
            num_tokens=start,
            num_sequences=sum(shard.num_sequences for shard in shards),
            num_documents=sum(shard.num_documents for shard in shards),
            info=info,
        )

    def choose_shards(self, index: int | None, count: int | None) -> list[Shard]:
        """Return all shards, or the one that `--shard_index` names.

        Raises:
            ConfigError: one of the two flags alone, an index out of range, or another number of
                shards than the store has.
        """
        check_shard(index, count)
        if count not in (None, len(self.shards)):
            raise ConfigError(
                f"--num_shards {count}: {self.prefix} has {len(self.shards)} shards; give "
                f"--num_shards {len(self.shards)}, or neither flag to make all"
            )
        return self.shards if index is None else [self.shards[index]]

    def read_pieces(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Read runs of tokens, each inside one shard.

        Args:
            starts, lengths: of each run, in tokens of the whole store, `(P,)` integers.
        Returns:
            Their ids, one run after the other, uint16.
        Raises:
            DataError: an id that is not in the vocabulary.
        """
        begins = np.array([shard.token_start for shard in self.shards])
        shard_of = np.searchsorted(begins, starts, side="right") - 1
        local = starts - begins[shard_of]
        spans = list(zip(
            shard_of.tolist(), local.tolist(), (local + lengths).tolist(), strict=True
        ))
        # Plain arrays, compared with the vocabulary at once: several times faster than by run.
        plain = {s: self.shards[s].tokens.view(np.ndarray) for s in set(shard_of.tolist())}
        parts = [plain[s][a:b] for s, a, b in spans]
        ids = np.concatenate(parts) if parts else np.empty(0, np.uint16)
        if ids.size and int(ids.max()) >= self.vocab_size:
            for s, a, b in spans:  # the run that holds it raises the error
                self.shards[s].tokens[a:b]
        return ids


def iterate_blocks(
    offsets: Offsets | np.ndarray, max_tokens: int = BLOCK_TOKENS
) -> Iterator[slice]:
    """Cut a shard into runs of sequences of at most `max_tokens` tokens, or of one sequence.

    Args:
        offsets: token offset of each sequence, and the end, `(N+1,)`.
    Yields:
        Slices of sequences that cover all of them in order.
    """
    first = 0
    while first < len(offsets) - 1:
        # The last offset within reach ends the block: offsets 0 4 9 12 and at most 10 tokens give
        # sequences 0:2 (9 tokens), then 2:3.
        last = int(np.searchsorted(offsets, offsets[first] + max_tokens, side="right")) - 1
        last = max(last, first + 1)
        yield slice(first, last)
        first = last
