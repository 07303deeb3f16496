"""The token store: write it, open it, check it, split it into shards, keep arrays beside it.

A store is named by a prefix `P`: `P.bin` (uint16 ids, nothing between them), `P.idx` (Megatron-Core
indexed-dataset index, version 1), `P.json` (counts, options, hashes; written last, so its presence
means whole) and `P.tokenizer/`. A sharded store is `P-00003-of-00008.{bin,idx,json}` and a `P.json`
that lists the shards. No other file of ours opens a `.bin`.

Everything is checked against file sizes before it is mapped, so a broken header allocates nothing.
The trade-off: opening reads the index once (about 12 bytes a sequence) to hand out plain arrays.

Letters: `T` tokens, `N` sequences, `D` documents, `M` masked positions.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import struct
from array import array as compact_list
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.errors import DataError

FORMAT_VERSION = 1
MAX_VOCAB = 1 << 16  # ids are uint16
MAX_SHARD_TOKENS = (1 << 32) - 1  # mask indices are uint32
ARRAYS: dict[str, np.dtype[Any]] = {
    "scores": np.dtype("<f2"),
    "importance": np.dtype("u1"),
    "mask": np.dtype("<u4"),
}
ARRAY_MAKERS = {
    "scores": "train/score_tokens.py",
    "importance": "train/annotate.py",
    "mask": "preprocess/build_masks.py",
}
SPECIAL_NAMES = ("cls", "sep", "pad", "mask", "unk")

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document indices
_DTYPES: dict[int, np.dtype[Any]] = {8: np.dtype("<u2"), 4: np.dtype("<i4"), 5: np.dtype("<i8")}
_OURS = 8
_NAME = re.compile(r"[A-Za-z0-9_-]+")


# --------------------------------------------------------------------------- small atomic writes


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def atomic_write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as JSON with sorted keys, atomically."""
    text = json.dumps(obj, indent=1, sort_keys=True, allow_nan=False)
    atomic_write_bytes(path, text.encode() + b"\n")


def file_sha256(path: str | Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint_text(*parts: object) -> str:
    """Return 16 hexadecimal digits that change when any part changes."""
    return hashlib.sha256(json.dumps([str(p) for p in parts]).encode()).hexdigest()[:16]


def read_json(path: str | Path) -> dict[str, Any]:
    """Read one of our JSON files; a broken one is a `DataError` that names it."""
    try:
        obj = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); make it again") from None
    if not isinstance(obj, dict):
        raise DataError(f"{path}: holds a {type(obj).__name__}, not an object; make it again")
    return obj


# --------------------------------------------------------------------------- the tokenizer


def shard_prefix(prefix: str, index: int, count: int) -> str:
    """Return the prefix of shard `index` of `count`."""
    return f"{prefix}-{index:05d}-of-{count:05d}"


def check_vocabulary(tokenizer: Any) -> int:
    """Return the number of ids of a tokenizer; more than 65,536 is a `DataError`."""
    size = max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)
    if size > MAX_VOCAB:
        raise DataError(
            f"tokenizer {tokenizer.name_or_path!r} has {size:,} ids, but a token store keeps "
            f"16-bit ids: at most {MAX_VOCAB:,}; choose one with a smaller vocabulary"
        )
    return size


def describe_tokenizer(tokenizer: Any, folder: str | Path) -> dict[str, Any]:
    """Save a tokenizer in `folder` (must not exist) and return what `P.json` says about it."""
    vocab_size = check_vocabulary(tokenizer)
    tokenizer.save_pretrained(str(folder))
    files = {p.name: file_sha256(p) for p in sorted(Path(folder).iterdir()) if p.is_file()}
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in SPECIAL_NAMES}
    return {
        "name": str(tokenizer.name_or_path),
        "vocab_size": vocab_size,
        "files": files,
        "special_ids": {name: int(i) for name, i in ids.items() if i is not None},
        "all_special_ids": sorted({int(i) for i in tokenizer.all_special_ids}),
    }


def _install_folder(temporary: Path, folder: Path, files: dict[str, str]) -> None:
    """Move a saved tokenizer into place unless the same one is there (several shards share it)."""
    for _ in range(3):
        if _same_files(folder, files):
            shutil.rmtree(temporary, ignore_errors=True)
            return
        old = folder.with_name(f"{folder.name}.old-{os.getpid()}")
        try:
            if folder.exists():
                os.rename(folder, old)
            os.rename(temporary, folder)
        except OSError:  # another shard was faster; look again at what it put there
            continue
        finally:
            shutil.rmtree(old, ignore_errors=True)
        return
    raise DataError(f"{folder}: cannot be replaced; remove it and run again")


def _same_files(folder: Path, files: dict[str, str]) -> bool:
    try:
        return {p.name: file_sha256(p) for p in folder.iterdir() if p.is_file()} == files
    except OSError:
        return False


# --------------------------------------------------------------------------- one writer a prefix


def _process_start(pid: int) -> str:
    """Return when a process started, in kernel ticks, so that a reused pid is told apart."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return "?"


def _is_alive(pid: int, start: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _process_start(pid) == start


def _acquire(lock: Path) -> bool:
    """Create the lock file; return True if it was taken over from a dead process of this host."""
    mine = f"{os.getpid()} {socket.gethostname()} {_process_start(os.getpid())}\n"
    took_over = False
    while True:
        try:
            descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            with os.fdopen(descriptor, "w") as stream:
                stream.write(mine)
            return took_over
        except FileExistsError:
            pass
        try:
            owner = lock.read_text()
        except FileNotFoundError:
            continue
        pid, _, rest = owner.partition(" ")
        host, _, start = rest.strip().rpartition(" ")
        if not pid.isdigit() or host != socket.gethostname() or _is_alive(int(pid), start):
            raise DataError(
                f"{lock}: another process writes here (pid {pid or '?'} on {host or '?'}); wait "
                f"for it, or remove this file if that process is gone"
            )
        stale = lock.with_name(f"{lock.name}.stale-{os.getpid()}")
        try:
            os.rename(lock, stale)
        except FileNotFoundError:
            continue
        if stale.read_text() != owner:  # someone else took over in between: give it back
            os.rename(stale, lock)
            raise DataError(f"{lock}: another process has just started to write here; wait for it")
        stale.unlink()
        took_over = True


class StoreWriter:
    """Write one store, or one shard of a store, atomically.

    Args:
        prefix: of the whole store, also when `shard` is given.
        tokenizer: a transformers fast tokenizer; saved beside the store.
        options: what made the ids; kept in the JSON, compared on a rerun.
        shard: `(index, count)`, or None for a store of one piece.
        overwrite: replace what is there. The old store stays whole until `close`.
    Raises:
        DataError: a vocabulary above 65,536, another writer, or a store that is there already.

    Used as a context manager, an exception inside leaves nothing behind.
    """

    def __init__(
        self,
        prefix: str,
        tokenizer: Any,
        options: dict[str, Any],
        shard: tuple[int, int] | None = None,
        overwrite: bool = False,
    ) -> None:
        if shard is not None and not 0 <= shard[0] < shard[1] <= 99999:
            raise DataError(f"shard {shard[0]} of {shard[1]}: the index counts from 0")
        self._vocab_size = check_vocabulary(tokenizer)
        self.store_prefix, self.options, self.shard = str(prefix), options, shard
        self.prefix = shard_prefix(self.store_prefix, *shard) if shard else self.store_prefix
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self._lock = Path(self.prefix + ".lock")
        interrupted = _acquire(self._lock)
        self._bin_tmp = Path(self.prefix + ".bin.tmp")
        self._idx_tmp = Path(self.prefix + ".idx.tmp")
        self._tokenizer_tmp = Path(self.prefix + ".tokenizer.tmp")
        self._stream: Any = None
        self._done = False
        self._lengths = compact_list("i")
        self._documents = compact_list("q", [0])
        self.num_tokens = 0
        self._hash = hashlib.sha256()
        try:
            if not overwrite and not interrupted:
                self._refuse_existing()
            shutil.rmtree(self._tokenizer_tmp, ignore_errors=True)
            self._tokenizer = describe_tokenizer(tokenizer, self._tokenizer_tmp)
            self._stream = open(self._bin_tmp, "wb", buffering=1 << 20)
        except BaseException:
            self.abort()
            raise

    def _refuse_existing(self) -> None:
        if os.path.exists(self.prefix + ".json"):
            raise DataError(
                f"{self.prefix}.json: a token store is there already; "
                f"give another --output, or --overwrite"
            )
        if os.path.exists(self.prefix + ".bin"):
            raise DataError(
                f"{self.prefix}.bin: a store without {self.prefix}.json is there; take it in with "
                f"tokenize_corpus.py --adopt, or replace it with --overwrite"
            )

    def add_document(self, sequences: Iterable[Sequence[int] | np.ndarray]) -> None:
        """Append one document: its sequences, each one array-like of ids."""
        arrays = [np.asarray(s) for s in sequences]
        lengths = [len(a) for a in arrays]
        arrays = [a for a in arrays if len(a)]  # an empty list would turn the ids into floats
        flat = np.concatenate(arrays) if arrays else np.empty(0, np.uint16)
        self.add_flat(flat, lengths, [len(lengths)])

    def add_flat(
        self,
        tokens: np.ndarray,
        sequence_lengths: Sequence[int] | np.ndarray,
        document_lengths: Sequence[int] | np.ndarray,
    ) -> None:
        """Append several documents at once.

        Args:
            tokens: ids of all of them, `(T,)`, any integer dtype.
            sequence_lengths: tokens in each sequence, `(N,)`; they add up to `T`.
            document_lengths: sequences in each document, `(D,)`; they add up to `N`.
        Raises:
            DataError: an id outside the vocabulary, or a shard of 2^32 tokens.
        """
        tokens = np.asarray(tokens)
        lengths = np.asarray(sequence_lengths, dtype=np.int64)
        documents = np.asarray(document_lengths, dtype=np.int64)
        assert tokens.ndim == 1 and np.issubdtype(tokens.dtype, np.integer), tokens.dtype
        assert lengths.sum() == len(tokens) and documents.sum() == len(lengths)
        assert (lengths >= 0).all() and (lengths < 1 << 31).all() and (documents >= 0).all()
        # Checked before the cast: numpy wraps silently.
        if len(tokens) and (int(tokens.min()) < 0 or int(tokens.max()) >= self._vocab_size):
            wrong = tokens[(tokens < 0) | (tokens >= self._vocab_size)][0]
            raise DataError(
                f"{self.prefix}.bin: token id {wrong} is not in the vocabulary "
                f"(0 to {self._vocab_size - 1}); the ids are of another tokenizer"
            )
        if self.num_tokens + len(tokens) > MAX_SHARD_TOKENS:
            raise DataError(
                f"{self.prefix}.bin: a shard holds fewer than 2^32 tokens; give more --num_shards"
            )
        data = tokens.astype("<u2").tobytes()
        self._stream.write(data)
        self._hash.update(data)
        self._lengths.extend(lengths.tolist())
        self._documents.extend((self._documents[-1] + np.cumsum(documents)).tolist())
        self.num_tokens += len(tokens)

    def close(self, extra_counts: dict[str, int] | None = None) -> None:
        """Put the store in place; the JSON comes last. The last shard writes `P.json` too."""
        try:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            index = _pack_index(np.array(self._lengths), np.array(self._documents))
            with open(self._idx_tmp, "wb") as stream:
                stream.write(index)
                stream.flush()
                os.fsync(stream.fileno())
            self._publish(hashlib.sha256(index).hexdigest(), extra_counts or {})
        except BaseException:
            self.abort()
            raise
        self._done = True
        self._lock.unlink(missing_ok=True)
        if self.shard is not None:
            join_shards(self.store_prefix, self.shard[1])

    def _publish(self, idx_sha256: str, extra_counts: dict[str, int]) -> None:
        # From here until the JSON is written, neither the shard nor the store counts as whole.
        for path in {self.prefix + ".json", self.store_prefix + ".json"}:
            Path(path).unlink(missing_ok=True)
        folder = Path(self.store_prefix + ".tokenizer")
        _install_folder(self._tokenizer_tmp, folder, self._tokenizer["files"])
        os.replace(self._bin_tmp, self.prefix + ".bin")
        os.replace(self._idx_tmp, self.prefix + ".idx")
        bin_sha256 = self._hash.hexdigest()
        info = {
            "format_version": FORMAT_VERSION,
            "tokenizer": {**self._tokenizer, "folder": folder.name},
            "counts": {
                **extra_counts,
                "tokens": self.num_tokens,
                "sequences": len(self._lengths),
                "documents": len(self._documents) - 1,
            },
            "options": self.options,
            "bin_sha256": bin_sha256,
            "idx_sha256": idx_sha256,
            "fingerprint": fingerprint_text(
                FORMAT_VERSION,
                bin_sha256,
                idx_sha256,
                self._tokenizer["vocab_size"],
                self._tokenizer["all_special_ids"],
            ),
        }
        atomic_write_json(self.prefix + ".json", info)

    def abort(self) -> None:
        """Remove what was written and give up the prefix; what was there before stays."""
        if self._done:
            return
        self._done = True
        if self._stream is not None:
            self._stream.close()
        for path in (self._bin_tmp, self._idx_tmp, self._lock):
            path.unlink(missing_ok=True)
        shutil.rmtree(self._tokenizer_tmp, ignore_errors=True)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type | None, *rest: object) -> None:
        if kind is not None:
            self.abort()
        elif not self._done:
            self.close()


def _pack_index(lengths: np.ndarray, documents: np.ndarray) -> bytes:
    pointers = np.zeros(len(lengths), np.int64)
    if len(lengths):
        np.cumsum(lengths[:-1], out=pointers[1:], dtype=np.int64)
    header = _HEADER.pack(_MAGIC, 1, _OURS, len(lengths), len(documents))
    return b"".join(
        (
            header,
            lengths.astype("<i4").tobytes(),
            (pointers * 2).astype("<i8").tobytes(),
            documents.astype("<i8").tobytes(),
        )
    )


def join_shards(prefix: str, count: int) -> str:
    """Write `P.json` if all `count` shards are whole and alike; else return what it waits for.

    While a store is replaced shard by shard, old and new shards stand side by side for a while:
    that is no error here.
    """
    prefixes = [shard_prefix(prefix, i, count) for i in range(count)]
    missing = [p for p in prefixes if not os.path.exists(p + ".json")]
    if missing:
        return f"{len(missing)} of {count} shards are to be made, the first is {missing[0]}"
    infos = [read_json(p + ".json") for p in prefixes]
    for path, info in zip(prefixes, infos, strict=True):
        for key in ("tokenizer", "options"):
            if info.get(key) != infos[0].get(key):
                return f"{path} was made with other {key} than {prefixes[0]}"
    counts: dict[str, int] = {}
    for info in infos:
        for key, value in info["counts"].items():
            counts[key] = counts.get(key, 0) + value
    prints = [info["fingerprint"] for info in infos]
    joined = {
        "format_version": FORMAT_VERSION,
        "tokenizer": infos[0]["tokenizer"],
        "options": infos[0]["options"],
        "counts": counts,
        "shards": [
            {"name": Path(p).name, "fingerprint": f} for p, f in zip(prefixes, prints, strict=True)
        ],
        "fingerprint": fingerprint_text(*prints),
    }
    atomic_write_json(prefix + ".json", joined)
    return ""


# --------------------------------------------------------------------------- reading


@dataclass(frozen=True, eq=False)
class Shard:
    """One mapped shard.

    tokens: `(T,)` uint16, read-only. sequence_offsets: `(N+1,)` int64, first token of each
    sequence, and the end. document_offsets: `(D+1,)` int64, first sequence of each document, and
    the end. token_start: tokens of the store before this shard.
    """

    prefix: str
    tokens: np.ndarray
    sequence_offsets: np.ndarray
    document_offsets: np.ndarray
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


def _map(path: str, dtype: np.dtype, count: int, offset: int = 0) -> np.ndarray:
    if count == 0:  # an empty file cannot be mapped
        empty = np.empty(0, dtype)
        empty.flags.writeable = False
        return empty
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))


def _read_index(prefix: str) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """Read and check `P.idx` against its own size and the size of `P.bin`.

    Returns:
        dtype of the ids; lengths `(N,)` int32; first tokens `(N,)` int64; documents `(D+1,)` int64.
    """
    path, bin_path = prefix + ".idx", prefix + ".bin"
    for needed in (path, bin_path):
        if not os.path.isfile(needed):
            raise DataError(f"{needed}: no such file; the token store is not whole, make it again")
    with open(path, "rb") as stream:
        header = stream.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise DataError(f"{path}: not a Megatron-Core index (wrong header); make it again")
        _, version, code, num_sequences, num_indices = _HEADER.unpack(header)
        if version != 1 or code not in _DTYPES:
            raise DataError(
                f"{path}: index version {version}, dtype code {code}; "
                f"allowed are version 1, codes {sorted(_DTYPES)}"
            )
        expected = _HEADER.size + 12 * num_sequences + 8 * num_indices
        actual = os.fstat(stream.fileno()).st_size
        # A multimodal index has one more byte a sequence; nobody here has such a store.
        if actual != expected or num_indices < 1:
            raise DataError(
                f"{path}: {actual:,} bytes, but its header says {expected:,}; "
                f"cut short or damaged, make it again"
            )
        lengths = np.fromfile(stream, "<i4", num_sequences)
        pointers = np.fromfile(stream, "<i8", num_sequences)
        documents = np.fromfile(stream, "<i8", num_indices)
    dtype, num_bytes = _DTYPES[code], os.path.getsize(bin_path)
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
            f"{bin_path}: {num_bytes:,} bytes do not hold the sequences that {path} lists; "
            f"cut short or damaged, make it again"
        )
    if documents[0] != 0 or documents[-1] != num_sequences or (np.diff(documents) < 0).any():
        raise DataError(f"{path}: the documents do not cover the sequences; make it again")
    return dtype, lengths, starts, documents


def read_foreign(prefix: str) -> Iterator[list[np.ndarray]]:
    """Yield the documents of any Megatron-Core store: the ids of each sequence, int64."""
    dtype, lengths, starts, documents = _read_index(prefix)
    bin_path = prefix + ".bin"
    tokens = _map(bin_path, dtype, os.path.getsize(bin_path) // dtype.itemsize)
    for first, last in zip(documents[:-1].tolist(), documents[1:].tolist(), strict=True):
        spans = zip(starts[first:last].tolist(), lengths[first:last].tolist(), strict=True)
        yield [tokens[a : a + n].astype(np.int64) for a, n in spans]


def _open_shard(prefix: str, info: dict[str, Any], token_start: int, verify: bool) -> Shard:
    path = prefix + ".json"
    dtype, lengths, starts, documents = _read_index(prefix)
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:], dtype=np.int64)
    counts = info["counts"]
    found = {
        "tokens": int(offsets[-1]),
        "sequences": len(lengths),
        "documents": len(documents) - 1,
    }
    if dtype != _DTYPES[_OURS] or (starts != offsets[:-1]).any():
        raise DataError(f"{prefix}.idx: not an index of ours; take it in with --adopt")
    for key, value in found.items():
        if counts.get(key) != value:
            raise DataError(
                f"{prefix}.idx: {value} {key}, but {path} says {counts.get(key)}; make it again"
            )
    if os.path.getsize(prefix + ".bin") != 2 * found["tokens"]:
        raise DataError(
            f"{prefix}.bin: {os.path.getsize(prefix + '.bin'):,} bytes, but {prefix}.idx says "
            f"{2 * found['tokens']:,}; cut short or damaged, make it again"
        )
    if verify:
        for kind in ("bin", "idx"):
            if file_sha256(f"{prefix}.{kind}") != info[f"{kind}_sha256"]:
                raise DataError(f"{prefix}.{kind}: its content is not what {path} says (sha256)")
    tokens = _map(prefix + ".bin", _DTYPES[_OURS], found["tokens"])
    return Shard(prefix, tokens, offsets, documents, token_start, info["fingerprint"])


def _read_store_json(prefix: str) -> dict[str, Any]:
    path = prefix + ".json"
    if not os.path.isfile(path):
        if os.path.exists(prefix + ".bin"):
            remedy = f"take the .bin and .idx in with tokenize_corpus.py --adopt --output {prefix}"
        else:
            remedy = f"make one with tokenize_corpus.py --output {prefix}"
        raise DataError(f"{path}: no whole token store here; {remedy}")
    info = read_json(path)
    if info.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{path}: format version {info.get('format_version')!r}; this program reads "
            f"{FORMAT_VERSION}; make the store again"
        )
    tokenizer, shards = info.get("tokenizer"), info.get("shards")
    whole = (
        isinstance(info.get("fingerprint"), str)
        and isinstance(info.get("counts"), dict)
        and isinstance(tokenizer, dict)
        and isinstance(tokenizer.get("vocab_size"), int)
        and isinstance(tokenizer.get("special_ids"), dict)
        and isinstance(tokenizer.get("all_special_ids"), list)
        and isinstance(tokenizer.get("folder"), str)
    )
    if whole and shards is None:
        whole = isinstance(info.get("bin_sha256"), str) and isinstance(info.get("idx_sha256"), str)
    elif whole:
        whole = isinstance(shards, list) and all(
            isinstance(s, dict) and isinstance(s.get("name"), str) and Path(s["name"]).name
            for s in shards
        )
    if not whole:
        raise DataError(f"{path}: entries are missing or of the wrong type; make the store again")
    return info


@dataclass(frozen=True, eq=False)
class TokenStore:
    """A whole store, of one piece or of shards; open it with `TokenStore.open`.

    special_ids: of `cls`, `sep`, `pad`, `mask`, `unk`, those that exist. tokenizer_dir: the
    tokenizer saved beside the store. fingerprint: changes with any id or boundary.
    """

    prefix: str
    shards: list[Shard]
    fingerprint: str
    vocab_size: int
    special_ids: dict[str, int]
    all_special_ids: tuple[int, ...]
    tokenizer_dir: str
    info: dict[str, Any]

    @classmethod
    def open(cls, prefix: str | Path, verify: bool = False) -> TokenStore:
        """Open the store `prefix`; `verify` re-hashes every file.

        Raises:
            DataError: naming the file that is absent, cut short, damaged, or of another version.
        """
        prefix = str(prefix)
        info = _read_store_json(prefix)
        shards: list[Shard] = []
        start = 0
        folder = Path(prefix).parent
        for entry in info.get("shards") or [None]:
            if entry is None:
                shard_info, path = info, prefix
            else:
                path = str(folder / Path(entry["name"]).name)
                shard_info = _read_store_json(path)
                if shard_info["fingerprint"] != entry.get("fingerprint"):
                    raise DataError(
                        f"{path}.json: fingerprint {shard_info['fingerprint']}, but {prefix}.json "
                        f"lists {entry.get('fingerprint')}; make the shards again"
                    )
            shards.append(_open_shard(path, shard_info, start, verify))
            start += shards[-1].num_tokens
        tokenizer = info["tokenizer"]
        tokenizer_dir = folder / Path(tokenizer["folder"]).name
        if verify and not _same_files(tokenizer_dir, tokenizer.get("files", {})):
            raise DataError(f"{tokenizer_dir}: not the tokenizer that {prefix}.json names")
        return cls(
            prefix=prefix,
            shards=shards,
            fingerprint=info["fingerprint"],
            vocab_size=tokenizer["vocab_size"],
            special_ids=dict(tokenizer["special_ids"]),
            all_special_ids=tuple(tokenizer["all_special_ids"]),
            tokenizer_dir=str(tokenizer_dir),
            info=info,
        )

    @property
    def num_tokens(self) -> int:
        return sum(s.num_tokens for s in self.shards)

    @property
    def num_sequences(self) -> int:
        return sum(s.num_sequences for s in self.shards)

    @property
    def num_documents(self) -> int:
        return sum(s.num_documents for s in self.shards)


# --------------------------------------------------------------------------- arrays beside a shard


def array_path(shard: Shard, name: str, kind: str) -> Path:
    """Return where the array is: `P.NAME.KIND.npy`, or `P.importance.npy` (name "")."""
    if kind not in ARRAYS:
        raise DataError(f"array kind {kind!r}: known are {', '.join(ARRAYS)}")
    if kind == "importance" and not name:  # a store of annotated texts has one annotation
        return Path(f"{shard.prefix}.{kind}.npy")
    if not _NAME.fullmatch(name):
        raise DataError(f"array name {name!r}: letters, digits, - and _ are allowed")
    return Path(f"{shard.prefix}.{name}.{kind}.npy")


def write_array(
    shard: Shard,
    name: str,
    kind: str,
    array: np.ndarray | Iterable[np.ndarray],
    info: dict[str, Any],
) -> Path:
    """Write an array beside a shard, atomically; its JSON comes last.

    Args:
        array: `(T,)` for scores and importance, `(M,)` for mask, of the dtype in `ARRAYS`; or
            blocks of it in order, so that a large one never sits in memory.
        info: what made it; kept in the JSON with the store's fingerprint and the count.
    Raises:
        DataError: wrong dtype or length; mask positions that do not ascend or leave the shard.
    """
    path = array_path(shard, name, kind)
    dtype = ARRAYS[kind]
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    count, last, digest = 0, -1, hashlib.sha256()
    blocks = [array] if isinstance(array, np.ndarray) else array
    try:
        with open(temporary, "wb") as stream:
            _write_npy_header(stream, dtype, shard.num_tokens)
            start = stream.tell()
            for block in blocks:
                last = _check_block(path, shard, kind, block, last)
                data = np.ascontiguousarray(block, dtype).tobytes()
                stream.write(data)
                digest.update(data)
                count += len(block)
            if kind != "mask" and count != shard.num_tokens:
                raise DataError(
                    f"{path}: {count:,} values for the {shard.num_tokens:,} tokens of "
                    f"{shard.prefix}; one a token is needed"
                )
            stream.seek(0)
            _write_npy_header(stream, dtype, count)  # numpy leaves room for any other length
            assert stream.tell() == start
            stream.flush()
            os.fsync(stream.fileno())
        path.with_suffix(".json").unlink(missing_ok=True)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    entry = {
        **info,
        "format_version": FORMAT_VERSION,
        "name": name,
        "kind": kind,
        "count": count,
        "sha256": digest.hexdigest(),
        "store_fingerprint": shard.fingerprint,
    }
    atomic_write_json(path.with_suffix(".json"), entry)
    return path


def _write_npy_header(stream: Any, dtype: np.dtype, count: int) -> None:
    header = {"descr": dtype.str, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(stream, header)


def _check_block(path: Path, shard: Shard, kind: str, block: np.ndarray, last: int) -> int:
    if block.ndim != 1 or block.dtype != ARRAYS[kind]:
        raise DataError(f"{path}: {block.dtype} {block.shape}; one row of {ARRAYS[kind]} is needed")
    if kind != "mask" or not len(block):
        return last
    wide = block.astype(np.int64)
    if wide[0] <= last or (np.diff(wide) <= 0).any():
        raise DataError(f"{path}: mask positions must ascend strictly")
    if wide[-1] >= shard.num_tokens:
        raise DataError(f"{path}: position {wide[-1]} of {shard.num_tokens} tokens")
    return int(wide[-1])


def open_array(shard: Shard, name: str, kind: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Map an array beside a shard, read-only, and return it with its JSON.

    Raises:
        DataError: absent (says which command makes it), made for another store, or damaged.
    """
    path = array_path(shard, name, kind)
    json_path = path.with_suffix(".json")
    if not json_path.is_file() or not path.is_file():
        missing = path if json_path.is_file() else json_path
        raise DataError(f"{missing}: no whole array here; {ARRAY_MAKERS[kind]} makes it")
    info = read_json(json_path)
    again = f"make it again with {ARRAY_MAKERS[kind]}"
    if info.get("store_fingerprint") != shard.fingerprint:
        raise DataError(
            f"{path}: made for the store {info.get('store_fingerprint')}, but {shard.prefix} is "
            f"{shard.fingerprint}; {again}"
        )
    count, dtype = info.get("count"), ARRAYS[kind]
    if info.get("format_version") != FORMAT_VERSION or type(count) is not int:
        raise DataError(f"{json_path}: of another format version or damaged; {again}")
    try:
        with open(path, "rb") as stream:
            np.lib.format.read_magic(stream)
            shape, fortran, found = np.lib.format.read_array_header_1_0(stream)
            offset, size = stream.tell(), os.fstat(stream.fileno()).st_size
    except ValueError as error:
        raise DataError(f"{path}: not a numpy file ({error}); {again}") from None
    if found != dtype or shape != (count,) or size != offset + count * dtype.itemsize:
        raise DataError(
            f"{path}: {found} {shape}, {size:,} bytes; {json_path} says {count} of {dtype}; {again}"
        )
    if count != shard.num_tokens and (kind != "mask" or count > shard.num_tokens):
        raise DataError(f"{path}: {count} values for {shard.num_tokens} tokens; {again}")
    return _map(str(path), dtype, count, offset), info


def list_arrays(store: TokenStore, kind: str) -> list[str]:
    """Return the sorted names of the arrays of a kind that every shard has whole."""
    names: set[str] | None = None
    for shard in store.shards:
        prefix, suffix = Path(shard.prefix).name + ".", f".{kind}.json"
        here = set()
        for path in Path(shard.prefix).parent.iterdir():
            name = path.name[len(prefix) : -len(suffix)]
            if path.name.startswith(prefix) and path.name.endswith(suffix):
                if _NAME.fullmatch(name) and path.with_suffix(".npy").is_file():
                    here.add(name)
        names = here if names is None else names & here
    return sorted(names or ())
