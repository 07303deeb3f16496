"""The token store: write it, open it, check it, split it into shards, keep arrays beside it.

A store is named by a prefix `P`: `P.bin` (uint16 ids, nothing between them), `P.idx` (Megatron-Core
indexed-dataset index, version 1), `P.json` (counts, options, hashes; written last, so its presence
means whole) and `P.tokenizer/`. A sharded store is `P-00003-of-00008.{bin,idx,json}` and a `P.json`
that lists the shards. No other file of ours opens a `.bin`.

Everything is checked against file sizes before it is mapped, so a broken header allocates nothing.
Opening maps the index too: memory does not grow with the store.

What is checked when: every JSON carries its own sha256; opening a store checks that, the sizes, the
sha256 of the tokenizer and of the index; opening an array checks its whole content (nothing else
would notice a moved mask). Index and arrays are hashed once: `P.memo.json` keeps size, times and
inode of what was found right, and a file that has changed since is hashed again. The ids, of which
there are too many to hash, are compared with the vocabulary as they are read. `verify` hashes every
byte. A file that is cut short while it is mapped ends the process (SIGBUS): no reader of mapped
files can turn that into an error.

Letters: `T` tokens, `N` sequences, `D` documents, `M` masked positions.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.errors import ConfigError, DataError, writing
from preprocess.files import (
    WriterLock,
    atomic_write_json,
    file_sha256,
    fingerprint_text,
    json_bytes,
    read_json,
    remove_leftovers,
    seal,
    sync,
    temporary_path,
    write_all,
    write_whole,
)

FORMAT_VERSION = 2
MAX_VOCAB = 1 << 16  # ids are uint16
MAX_SHARD_TOKENS = (1 << 32) - 1  # mask indices are uint32
ARRAYS: dict[str, np.dtype[Any]] = {
    "scores": np.dtype("<f2"),
    "importance": np.dtype("u1"),
    "mask": np.dtype("<u4"),
}
SETTLED_NS = 60 * 10**9  # age from which a file's times tell whether it has changed since
# To wait for others that join the same shards. Each takes milliseconds, but they may be thousands.
JOIN_SECONDS = 60.0
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
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NPY_MAGIC = b"\x93NUMPY\x01\x00"
_BLOCK_ENTRIES = 1 << 18  # of an index, at a time
_NPY_HEADER_BYTES = 128  # what numpy itself takes for one axis


# --------------------------------------------------------------------------- what is known already


def _read_sealed(path: str | Path, again: str) -> dict[str, Any]:
    """Read a JSON that `seal` made; one that was changed since is a `DataError`."""
    info = read_json(path)
    if info.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{path}: format version {info.get('format_version')!r}; this program reads "
            f"{FORMAT_VERSION}; {again}"
        )
    if seal(info) != info:
        raise DataError(f"{path}: its content is not what was written (json_sha256); {again}")
    return info


def recall(prefix: str, key: str) -> Any:
    """Return what `remember` kept under `key`, or None."""
    try:
        return _read_sealed(f"{prefix}.memo.json", "").get(key)
    except (OSError, DataError):
        return None


def remember(prefix: str, key: str, value: Any) -> None:
    """Keep in `P.memo.json` what took time to work out.

    A cache: a disk that may only be read, or another process that writes at the same moment, loses
    it. Nothing is brought to the disk by force, or opening many shards would wait for it.
    """
    path = Path(f"{prefix}.memo.json")
    temporary = temporary_path(path)
    try:
        known = _read_sealed(path, "") if path.exists() else {}
    except DataError:
        known = {}
    try:
        entry = {**known, key: value, "format_version": FORMAT_VERSION}
        temporary.write_bytes(json_bytes(seal(entry)))
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _check_content(
    prefix: str, path: Path, start: int, sha256: str, verify: bool,
    check: Callable[[], None] = lambda: None, again: str = "make it again",
) -> None:
    """Hash a file from byte `start` on, unless that was done since it changed last.

    Args:
        prefix: of the store or shard that remembers it.
        verify: hash it in any case.
        check: what else is to be looked at before the content may be trusted.
    Raises:
        DataError: the content is not what was written.
    """
    status = os.stat(path)
    identity = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, sha256]
    if not verify and recall(prefix, path.name) == identity:
        return
    if file_sha256(path, start) != sha256:
        raise DataError(f"{path}: its content is not what {path.stem}.json says (sha256); {again}")
    check()
    # What was written just now may change once more without a later time stamp; and the clock of
    # a file server may be another one.
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED_NS:
        remember(prefix, path.name, identity)


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
    # Nobody reads an old one, so this needs no lock.
    remove_leftovers(folder, mark="old")
    for _ in range(3):
        if _same_files(folder, files):
            shutil.rmtree(temporary, ignore_errors=True)
            return
        old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
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


def _same_files(folder: Path, files: Any) -> bool:
    try:
        return {p.name: file_sha256(p) for p in folder.iterdir() if p.is_file()} == files
    except OSError:
        return False


# --------------------------------------------------------------------------- one writer a prefix


class StoreWriter:
    """Write one store, or one shard of a store, atomically.

    Args:
        prefix: of the whole store, also when `shard` is given.
        tokenizer: a transformers fast tokenizer; saved beside the store.
        options: what made the ids; kept in the JSON, compared on a rerun.
        shard: `(index, count)`, or None for a store of one piece.
        overwrite: replace what is there. The old store stays whole until `close` has written and
            synced everything and only renames.
        lock: of what is written, if the caller holds it already and goes on holding it.
    Raises:
        DataError: a vocabulary above 65,536, or a store that is there already.
        ConfigError: another writer.
        DiskFullError: from any method; nothing is left behind.

    Used as a context manager, an exception inside leaves nothing behind.
    """

    def __init__(
        self,
        prefix: str,
        tokenizer: Any,
        options: dict[str, Any],
        shard: tuple[int, int] | None = None,
        overwrite: bool = False,
        lock: WriterLock | None = None,
    ) -> None:
        if shard is not None and not 0 <= shard[0] < shard[1] <= 99999:
            raise DataError(f"shard {shard[0]} of {shard[1]}: the index counts from 0")
        self._vocab_size = check_vocabulary(tokenizer)
        self.store_prefix, self.options, self.shard = str(prefix), options, shard
        self.prefix = shard_prefix(self.store_prefix, *shard) if shard else self.store_prefix
        self._bin, self._idx, self._json = (
            Path(f"{self.prefix}.{ending}") for ending in ("bin", "idx", "json")
        )
        self._tokenizer_tmp = temporary_path(Path(self.prefix + ".tokenizer"))
        self._arrays: list[tuple[str, str, np.ndarray, dict[str, Any]]] = []
        self._stream: Any = None
        self._done = False
        self._index: _IndexWriter | None = None
        self.num_tokens = 0
        self._hash = hashlib.sha256()
        if not overwrite:
            _refuse_other_counts(self.store_prefix, shard[1] if shard else 1)
        # A store of one piece under this prefix would be a second writer. Nothing is locked for
        # this look unless somebody is there: a thousand shards may start at once.
        if shard is not None and os.path.exists(f"{self.store_prefix}.lock"):
            WriterLock(self.store_prefix, wait_seconds=1.0).release()
        self._lock = WriterLock(self.prefix) if lock is None else lock
        self._owns_lock = lock is None
        try:
            remove_store_leftovers(self.prefix)
            if not overwrite and not self._lock.interrupted:
                self._refuse_existing()
            with writing(self.store_prefix + ".tokenizer"):
                self._tokenizer = describe_tokenizer(tokenizer, self._tokenizer_tmp)
            with writing(self._bin):
                self._stream = open(temporary_path(self._bin), "wb", buffering=1 << 20)
            self._index = _IndexWriter(self._idx)
        except BaseException:
            self.abort()
            raise

    def _refuse_existing(self) -> None:
        if self._json.exists():
            raise DataError(
                f"{self.prefix}.json: a token store is there already; "
                f"give another --output, or --overwrite"
            )
        if self._bin.exists() and self.shard is None:  # a shard is ours, and was not finished
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
        with writing(self._bin, len(data)):
            self._stream.write(data)
        self._hash.update(data)
        assert self._index is not None
        self._index.add(lengths, documents)
        self.num_tokens += len(tokens)

    def add_array(self, name: str, kind: str, array: np.ndarray, info: dict[str, Any]) -> None:
        """Put an array beside the store, in the moment in which that becomes whole.

        Args:
            array: as for `write_array`, of the tokens that are there when the writer is closed.
        """
        path = _array_path(self.prefix, name, kind)
        remove_leftovers(path, _json_of(path))
        self._arrays.append((name, kind, array, info))

    def close(self, extra_counts: dict[str, int] | None = None) -> None:
        """Put the store in place; the JSON comes last. The last shard writes `P.json` too."""
        try:
            with writing(self._bin, self.num_tokens * 2):
                self._stream.flush()
                os.fsync(self._stream.fileno())
                self._stream.close()
            assert self._index is not None
            info = self._describe(self._index.close(), extra_counts or {})
            write_whole(temporary_path(self._json), json_bytes(seal(info)), self._json)
            arrays: list[Path] = []
            for name, kind, array, made_by in self._arrays:
                path = _array_path(self.prefix, name, kind)
                arrays.append(path)
                _stage_array(path, self.num_tokens, info["fingerprint"], name, kind, array, made_by)
            self._publish(arrays)
            if self.shard is not None:
                join_shards(self.store_prefix, self.shard[1], (self.prefix, info["fingerprint"]))
        except BaseException:
            self.abort()
            raise
        self._end()

    def _describe(self, idx_sha256: str, extra_counts: dict[str, int]) -> dict[str, Any]:
        bin_sha256 = self._hash.hexdigest()
        assert self._index is not None
        return {
            "format_version": FORMAT_VERSION,
            "tokenizer": {**self._tokenizer, "folder": f"{Path(self.store_prefix).name}.tokenizer"},
            "counts": {
                **extra_counts,
                "tokens": self.num_tokens,
                "sequences": self._index.num_sequences,
                "documents": self._index.num_documents,
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
                sorted(self._tokenizer["files"].items()),
            ),
        }

    def _publish(self, arrays: list[Path]) -> None:
        # Everything is written; from here there are only renames. Until the JSON is in place,
        # neither the shard nor the store counts as whole.
        for path in (self._json, Path(self.store_prefix + ".json")):
            path.unlink(missing_ok=True)
        folder = Path(self.store_prefix + ".tokenizer")
        _install_folder(self._tokenizer_tmp, folder, self._tokenizer["files"])
        for path in (self._bin, self._idx):
            os.replace(temporary_path(path), path)
        for path in arrays:
            _publish_array(path)
        sync(self._json.parent)
        os.replace(temporary_path(self._json), self._json)
        sync(self._json.parent)

    def abort(self) -> None:
        """Remove what was written and give up the prefix; what was there before stays."""
        if self._done:
            return
        if self._stream is not None:
            with suppress(OSError):  # on a full disk closing tries to write once more
                self._stream.close()
        if self._index is not None:
            self._index.abort()
        arrays = [_array_path(self.prefix, name, kind) for name, kind, _, _ in self._arrays]
        for path in (self._bin, self._idx, self._json, *arrays, *map(_json_of, arrays)):
            temporary_path(path).unlink(missing_ok=True)
        shutil.rmtree(self._tokenizer_tmp, ignore_errors=True)
        self._end()

    def _end(self) -> None:
        self._done = True
        if self._owns_lock:
            self._lock.release()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type | None, *rest: object) -> None:
        if kind is not None:
            self.abort()
        elif not self._done:
            self.close()


def _refuse_other_counts(prefix: str, count: int) -> None:
    """Refuse to begin a store of `count` shards where there are some of another number.

    `P.json` says how many there are; before it is written, any shard does.
    """
    if os.path.exists(prefix + ".json"):
        return  # and what is refused then is the caller's to say
    folder, name = Path(prefix).parent, re.escape(Path(prefix).name)
    shard = re.compile(name + r"-\d{5}-of-(\d{5})\.json")
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        found = shard.fullmatch(path.name)
        if found and int(found[1]) != count:
            raise ConfigError(
                f"{path}: one of {int(found[1])} shards, and this is to be one of {count}; type "
                f"--num_shards {int(found[1])}, give another --output, or remove the old shards"
            )


def tidy_store(prefix: str) -> None:
    """Remove what killed writers left beside a whole store or shard, unless one is at work."""
    with suppress(ConfigError, OSError):  # such as a disk that may only be read
        with WriterLock(prefix):
            remove_store_leftovers(prefix)


def remove_store_leftovers(prefix: str) -> None:
    """Remove what killed writers of a store or shard left behind; for the holder of its lock."""
    endings = ("bin", "idx", "json", "tokenizer", "memo.json")
    remove_leftovers(*(f"{prefix}.{ending}" for ending in endings))
    remove_leftovers(f"{prefix}.tokenizer", mark="old")


class _IndexWriter:
    """Write `P.idx` under its temporary name, in little memory: a long text has 10^8 sequences.

    Lengths go straight to their place behind the header, documents to a file beside it until the
    number of sequences is known. Both begin with the name that `remove_leftovers` knows.
    """

    def __init__(self, path: Path) -> None:
        self._path, self.temporary = path, temporary_path(path)
        self._side = self.temporary.with_name(f"{self.temporary.name}-documents")
        self.num_sequences = self.num_documents = 0
        self._streams: list[Any] = []
        with writing(path):
            for name in (self.temporary, self._side):
                self._streams.append(open(name, "w+b", buffering=1 << 20))
        self._lengths, self._documents = self._streams
        self._lengths.write(bytes(_HEADER.size))
        self._documents.write(bytes(8))

    def add(self, lengths: np.ndarray, documents: np.ndarray) -> None:
        """Append tokens of each sequence, `(N,)` int64, and sequences of each document, `(D,)`."""
        ends = self.num_sequences + np.cumsum(documents)
        with writing(self._path, 4 * len(lengths) + 8 * len(ends)):
            self._lengths.write(lengths.astype("<i4").tobytes())
            self._documents.write(ends.astype("<i8").tobytes())
        self.num_sequences += len(lengths)
        self.num_documents += len(documents)

    def close(self) -> str:
        """Write what is missing and sync the file; return its sha256."""
        with writing(self._path, 8 * (self.num_sequences + self.num_documents + 1)):
            start = 0
            for number in range(0, self.num_sequences, _BLOCK_ENTRIES):
                count = min(_BLOCK_ENTRIES, self.num_sequences - number)
                self._lengths.seek(_HEADER.size + 4 * number)
                lengths = np.frombuffer(self._lengths.read(4 * count), "<i4").astype(np.int64)
                ends = start + np.cumsum(lengths)
                self._lengths.seek(_HEADER.size + 4 * self.num_sequences + 8 * number)
                self._lengths.write((2 * (ends - lengths)).astype("<i8").tobytes())
                start = int(ends[-1])
            self._lengths.seek(_HEADER.size + 12 * self.num_sequences)
            self._documents.seek(0)
            shutil.copyfileobj(self._documents, self._lengths, 1 << 20)
            self._lengths.seek(0)
            counts = (self.num_sequences, self.num_documents + 1)
            self._lengths.write(_HEADER.pack(_MAGIC, 1, _OURS, *counts))
            self._lengths.flush()
            os.fsync(self._lengths.fileno())
        self.abort(keep=True)
        return file_sha256(self.temporary)

    def abort(self, keep: bool = False) -> None:
        """Close the files, and remove them but for one that is to be kept."""
        for stream in self._streams:
            with suppress(OSError):  # on a full disk closing tries to write once more
                stream.close()
        self._side.unlink(missing_ok=True)
        if not keep:
            self.temporary.unlink(missing_ok=True)


def join_shards(prefix: str, count: int, made: tuple[str, str] | None = None) -> str:
    """Write `P.json` if all `count` shards are whole and alike; else return what it waits for.

    No shard is read beyond its JSON. Any number of processes may do this at once: each comes after
    its own shard is whole, so the last of them finds all. While a store is replaced shard by shard,
    old and new shards stand side by side for a while: that is no error here.

    Args:
        made: prefix and fingerprint of the shard that the caller has just made, whose part in a
            `P.json` of another process is all that it must see to.
    Raises:
        ConfigError: another process has been writing a store of one piece here all the while.
    """
    waiting, joined = _describe_shards(prefix, count)
    if waiting or _has_content(prefix, joined):
        return waiting  # most of them only look, and lock nothing
    with WriterLock(prefix, JOIN_SECONDS):
        if made is not None and _is_joined(prefix, *made):
            return ""
        remove_leftovers(prefix + ".json")
        waiting, joined = _describe_shards(prefix, count)
        if not waiting:
            atomic_write_json(prefix + ".json", joined)
        return waiting


def _has_content(prefix: str, info: dict[str, Any]) -> bool:
    with suppress(DataError, FileNotFoundError):
        return _read_store_json(prefix) == info
    return False


def _is_joined(prefix: str, shard: str, fingerprint: str) -> bool:
    with suppress(DataError, FileNotFoundError):
        shards = _read_store_json(prefix).get("shards", [])
        return {"name": Path(shard).name, "fingerprint": fingerprint} in shards
    return False


def _describe_shards(prefix: str, count: int) -> tuple[str, dict[str, Any]]:
    """Return what a store of shards waits for, or "" and what its `P.json` is to hold."""
    prefixes = [shard_prefix(prefix, i, count) for i in range(count)]
    missing = [p for p in prefixes if not os.path.exists(p + ".json")]
    infos = []
    for path in prefixes if not missing else ():
        try:
            infos.append(_read_store_json(path))
        except (DataError, FileNotFoundError):
            if os.path.exists(path + ".json"):
                raise
            missing = [path]  # another process has just begun to replace it
            break
    if missing:
        return f"{len(missing)} of {count} shards are to be made, the first is {missing[0]}", {}
    for path, info in zip(prefixes, infos, strict=True):
        for key in ("tokenizer", "options"):
            if info.get(key) != infos[0].get(key):
                return f"{path} was made with other {key} than {prefixes[0]}", {}
    counts: dict[str, int] = {}
    for info in infos:
        for key, value in info["counts"].items():
            counts[key] = counts.get(key, 0) + value
    prints = [info["fingerprint"] for info in infos]
    return "", seal({
        "format_version": FORMAT_VERSION,
        "tokenizer": infos[0]["tokenizer"],
        "options": infos[0]["options"],
        "counts": counts,
        "shards": [
            {"name": Path(p).name, "fingerprint": f} for p, f in zip(prefixes, prints, strict=True)
        ],
        "fingerprint": fingerprint_text(*prints),
    })


# --------------------------------------------------------------------------- reading


@dataclass(frozen=True, eq=False)
class Shard:
    """One mapped shard.

    tokens: `(T,)` uint16, read-only. sequence_offsets: `(N+1,)`, first token of each sequence, and
    the end. document_offsets: `(D+1,)`, first sequence of each document, and the end; both are
    `Offsets` or arrays. token_start: tokens of the store before this shard.
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

    A damaged `.bin` of the right size would otherwise hand ids to an embedding that has fewer
    rows, or rows that mean nothing (a GPU reads past the end, a padded embedding says nothing).
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


def _map(path: str, dtype: np.dtype, count: int, offset: int = 0, kind: Any = np.memmap) -> Any:
    if count == 0:  # an empty file cannot be mapped
        empty = np.empty(0, dtype)
        empty.flags.writeable = False
        return empty
    return kind(path, dtype=dtype, mode="r", offset=offset, shape=(count,))


def _read_header(prefix: str) -> tuple[np.dtype, int, int]:
    """Check the header of `P.idx` against the file's size; allocates nothing.

    Returns:
        dtype of the ids, number of sequences, number of entries in the list of documents.
    """
    path, bin_path = prefix + ".idx", prefix + ".bin"
    for needed in (path, bin_path):
        if not os.path.isfile(needed):
            raise DataError(f"{needed}: no such file; the token store is not whole, make it again")
    with open(path, "rb") as stream:
        header = stream.read(_HEADER.size)
        actual = os.fstat(stream.fileno()).st_size
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise DataError(f"{path}: not a Megatron-Core index (wrong header); make it again")
    _, version, code, num_sequences, num_indices = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise DataError(
            f"{path}: index version {version}, dtype code {code}; "
            f"allowed are version 1, codes {sorted(_DTYPES)}"
        )
    expected = _HEADER.size + 12 * num_sequences + 8 * num_indices
    # A multimodal index has one more byte a sequence; nobody here has such a store.
    if actual != expected or num_indices < 1:
        raise DataError(
            f"{path}: {actual:,} bytes, but its header says {expected:,}; "
            f"cut short or damaged, make it again"
        )
    return _DTYPES[code], num_sequences, num_indices


def _map_index(
    prefix: str, num_sequences: int, num_indices: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Map `P.idx`: lengths `(N,)` int32, first bytes `(N,)` int64, documents `(D+1,)` int64."""
    path, start = prefix + ".idx", _HEADER.size
    return (
        _map(path, np.dtype("<i4"), num_sequences, start),
        _map(path, np.dtype("<i8"), num_sequences, start + 4 * num_sequences),
        _map(path, np.dtype("<i8"), num_indices, start + 12 * num_sequences),
    )


def _read_index(prefix: str) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """Read and check the index of any Megatron-Core store against the size of `P.bin`.

    Returns:
        dtype of the ids; lengths `(N,)` int32; first tokens `(N,)` int64; documents `(D+1,)` int64.
    """
    path, bin_path = prefix + ".idx", prefix + ".bin"
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
            f"{bin_path}: {num_bytes:,} bytes do not hold the sequences that {path} lists; "
            f"cut short or damaged, make it again"
        )
    if documents[0] != 0 or documents[-1] != num_sequences or (np.diff(documents) < 0).any():
        raise DataError(f"{path}: the documents do not cover the sequences; make it again")
    return dtype, lengths, starts, documents


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate `arange(start, start + length)`.

    # starts 5 0, lengths 2 3 -> 5 6 0 1 2
    """
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


class Offsets:
    """Where each sequence or document begins, and where the last one ends: left on the disk.

    Slices, numbers and arrays of numbers give int64; numpy's functions read all of it, but for
    `np.searchsorted`.

    Args:
        starts: mapped, `(n,)` int64, `unit` times what is given out.
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
        """What `np.searchsorted` calls: that of numpy would read all of it."""
        values = np.asarray(values)
        low, high = np.zeros(values.shape, np.int64), np.full(values.shape, len(self), np.int64)
        for _ in range(len(self).bit_length()):
            middle = (low + high) // 2
            found = self[np.minimum(middle, len(self) - 1)]
            before = (found <= values if side == "right" else found < values) & (low < high)
            low, high = np.where(before, middle + 1, low), np.where(before, high, middle)
        return low if low.ndim else low[()]


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
    dtype, num_sequences, num_indices = _read_header(prefix)
    if dtype != _DTYPES[_OURS]:
        raise DataError(f"{prefix}.idx: not an index of ours; take it in with --adopt")
    counts = info["counts"]
    for key, value in (("sequences", num_sequences), ("documents", num_indices - 1)):
        if counts.get(key) != value:
            raise DataError(
                f"{prefix}.idx: {value} {key}, but {path} says {counts.get(key)}; make it again"
            )
    num_tokens, num_bytes = counts.get("tokens"), os.path.getsize(prefix + ".bin")
    if type(num_tokens) is not int or num_bytes != 2 * num_tokens:
        raise DataError(
            f"{prefix}.bin: {num_bytes:,} bytes, but {path} says {num_tokens} tokens of two bytes; "
            f"cut short or damaged, make it again"
        )
    lengths, pointers, documents = _map_index(prefix, num_sequences, num_indices)

    def check_index() -> None:
        _check_offsets(prefix, lengths, pointers, documents, num_tokens)

    _check_content(prefix, Path(prefix + ".idx"), 0, info["idx_sha256"], verify, check_index)
    if verify and file_sha256(f"{prefix}.bin") != info["bin_sha256"]:
        raise DataError(f"{prefix}.bin: its content is not what {path} says (sha256)")
    tokens = _map(prefix + ".bin", _DTYPES[_OURS], num_tokens, kind=_Ids)
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
    for first in range(0, len(lengths), _BLOCK_ENTRIES):
        block = np.array(lengths[first : first + _BLOCK_ENTRIES], dtype=np.int64)
        ends = end + np.cumsum(block)
        gaps = pointers[first : first + _BLOCK_ENTRIES] != 2 * (ends - block)
        if (block < 0).any() or gaps.any():
            raise DataError(f"{prefix}.idx: not an index of ours; take it in with --adopt")
        end = int(ends[-1])
    if end != num_tokens:
        raise DataError(
            f"{prefix}.idx: {end} tokens, but {prefix}.json says {num_tokens}; make it again"
        )
    wrong = documents[0] != 0 or documents[-1] != len(lengths)
    for first in range(0, len(documents), _BLOCK_ENTRIES):
        wrong |= bool((np.diff(documents[first : first + _BLOCK_ENTRIES + 1]) < 0).any())
    if wrong:
        raise DataError(f"{prefix}.idx: the documents do not cover the sequences; make it again")


def _read_store_json(prefix: str) -> dict[str, Any]:
    path = prefix + ".json"
    if not os.path.isfile(path):
        if os.path.exists(prefix + ".bin"):
            remedy = f"take the .bin and .idx in with tokenize_corpus.py --adopt --output {prefix}"
        else:
            remedy = f"make one with tokenize_corpus.py --output {prefix}"
        raise DataError(f"{path}: no whole token store here; {remedy}")
    info = _read_sealed(path, "make the store again")
    if not _is_store_json(info):
        raise DataError(f"{path}: entries are missing or of the wrong type; make the store again")
    return info


def _is_store_json(info: dict[str, Any]) -> bool:
    """Whether every entry that is read later is there, of its type, and in its range."""
    tokenizer, shards = info.get("tokenizer"), info.get("shards")
    if not isinstance(tokenizer, dict) or not isinstance(info.get("counts"), dict):
        return False
    size, special = tokenizer.get("vocab_size"), tokenizer.get("special_ids")
    everything = tokenizer.get("all_special_ids")
    if type(size) is not int or not 0 < size <= MAX_VOCAB or not isinstance(special, dict):
        return False
    if not isinstance(everything, list) or not isinstance(tokenizer.get("files"), dict):
        return False
    if not all(type(i) is int and 0 <= i < size for i in (*special.values(), *everything)):
        return False
    if not isinstance(info.get("fingerprint"), str) or not _is_name(tokenizer.get("folder")):
        return False
    if "shards" not in info:
        hashes = (info.get("bin_sha256"), info.get("idx_sha256"))
        return all(isinstance(h, str) and _SHA256.fullmatch(h) for h in hashes)
    return isinstance(shards, list) and bool(shards) and all(
        isinstance(s, dict) and _is_name(s.get("name")) and isinstance(s.get("fingerprint"), str)
        for s in shards
    )


def _is_name(name: Any) -> bool:
    """Whether a name stays in its folder."""
    return isinstance(name, str) and "\0" not in name and name not in ("", ".", "..") and (
        os.path.basename(name) == name
    )


def _beside(prefix: str, name: str, *endings: str) -> str:
    """Return the path of `name`, listed in `P.json`, after a look at where links lead."""
    folder, real = Path(prefix).parent, Path(prefix + ".json").resolve().parent
    for ending in endings:
        path = folder / f"{name}{ending}"
        if path.resolve().parent != real:
            raise DataError(
                f"{path}: a link out of {real}, where {prefix}.json is; copy it there instead"
            )
    return str(folder / name)


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
        """Open the store `prefix`; `verify` hashes the ids too.

        Raises:
            DataError: naming the file that is absent, cut short, damaged, or of another version.
        """
        prefix = str(prefix)
        info = _read_store_json(prefix)
        shards: list[Shard] = []
        start = 0
        for entry in info.get("shards") or [None]:
            if entry is None:
                shard_info, path = info, prefix
            else:
                path = _beside(prefix, entry["name"], ".json", ".bin", ".idx")
                shard_info = _read_store_json(path)
                if "shards" in shard_info or shard_info["fingerprint"] != entry["fingerprint"]:
                    raise DataError(
                        f"{path}.json: fingerprint {shard_info['fingerprint']}, but {prefix}.json "
                        f"lists {entry['fingerprint']}; make the shards again"
                    )
            shards.append(_open_shard(path, shard_info, start, verify))
            start += shards[-1].num_tokens
        tokenizer = info["tokenizer"]
        tokenizer_dir = _beside(prefix, tokenizer["folder"], "")
        if not _same_files(Path(tokenizer_dir), tokenizer["files"]):
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
            info=info,
        )

    def choose_shards(self, index: int | None, count: int | None) -> list[Shard]:
        """The shards to work on: all, or the one that `--shard_index` names.

        Raises:
            ConfigError: the store has another number of shards than `--num_shards` says.
        """
        if index is None:
            return self.shards
        if count != len(self.shards):
            raise ConfigError(
                f"--num_shards {count}: {self.prefix} has {len(self.shards)} shards; give "
                f"--num_shards {len(self.shards)}, or neither flag to make all"
            )
        return [self.shards[index]]

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
        # Plain arrays, compared with the vocabulary at once: run by run is several times slower.
        plain = {s: self.shards[s].tokens.view(np.ndarray) for s in set(shard_of.tolist())}
        parts = [plain[s][a:b] for s, a, b in spans]
        ids = np.concatenate(parts) if parts else np.empty(0, np.uint16)
        if ids.size and int(ids.max()) >= self.vocab_size:
            for s, a, b in spans:  # the one that holds it says so
                self.shards[s].tokens[a:b]
        return ids

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
    return _array_path(shard.prefix, name, kind)


def _array_path(prefix: str, name: str, kind: str) -> Path:
    if kind not in ARRAYS:
        raise DataError(f"array kind {kind!r}: known are {', '.join(ARRAYS)}")
    if kind == "importance" and not name:  # a store of annotated texts has one annotation
        return Path(f"{prefix}.{kind}.npy")
    if not _NAME.fullmatch(name):
        raise DataError(f"array name {name!r}: letters, digits, - and _ are allowed")
    return Path(f"{prefix}.{name}.{kind}.npy")


def _json_of(path: Path) -> Path:
    return path.with_suffix(".json")


def lock_array(
    store: TokenStore, name: str, kind: str, shard_index: int | None = None
) -> ExitStack:
    """Take the sole right to write an array beside one shard of a store, and clean up for it.

    Args:
        shard_index: which shard, from 0, so that processes may work at several of them at once;
            None takes all of them.
    Returns:
        The locks, as a context manager.
    Raises:
        ConfigError: another process writes it, or there are more shards than files may be open.
    """
    shards = store.shards if shard_index is None else [store.shards[shard_index]]
    with ExitStack() as locks:
        for path in (array_path(shard, name, kind) for shard in shards):
            try:
                locks.enter_context(WriterLock(path.with_suffix("")))
            except OSError as error:
                if error.errno != errno.EMFILE:
                    raise
                raise ConfigError(
                    f"{store.prefix}: {len(shards):,} shards are too many to lock at once "
                    f"({error.strerror}); give --shard_index, or raise `ulimit -n`"
                ) from None
            remove_leftovers(path, _json_of(path))
        return locks.pop_all()


def write_array(
    shard: Shard,
    name: str,
    kind: str,
    array: np.ndarray | Iterable[np.ndarray],
    info: dict[str, Any],
) -> Path:
    """Write an array beside a shard, atomically; its JSON comes last. See `lock_array`.

    Args:
        array: `(T,)` for scores and importance, `(M,)` for mask, of the dtype in `ARRAYS`; or
            blocks of it in order, so that a large one never sits in memory.
        info: what made it; kept in the JSON with the store's fingerprint and the count.
    Raises:
        DataError: wrong dtype or length; mask positions that do not ascend or leave the shard.
        DiskFullError: there is no room; an old array stays.
    """
    path = array_path(shard, name, kind)
    try:
        _stage_array(path, shard.num_tokens, shard.fingerprint, name, kind, array, info)
        _publish_array(path)
    except BaseException:
        for staged in (path, _json_of(path)):
            temporary_path(staged).unlink(missing_ok=True)
        raise
    sync(path.parent)
    return path


def _stage_array(
    path: Path,
    num_tokens: int,
    fingerprint: str,
    name: str,
    kind: str,
    array: np.ndarray | Iterable[np.ndarray],
    info: dict[str, Any],
) -> None:
    """Write and sync an array and its JSON under temporary names."""
    dtype = ARRAYS[kind]
    count, last, digest = 0, -1, hashlib.sha256()
    blocks = [array] if isinstance(array, np.ndarray) else array
    with open(temporary_path(path), "wb", buffering=0) as stream:
        if kind != "mask":  # its size is known: a full disk is said before the work is done
            num_bytes = _NPY_HEADER_BYTES + num_tokens * dtype.itemsize
            with writing(path, num_bytes):
                _reserve(stream, num_bytes)
        stream.seek(_NPY_HEADER_BYTES)
        for block in blocks:
            last = _check_block(path, num_tokens, kind, block, last)
            data = np.ascontiguousarray(block, dtype).tobytes()
            with writing(path, len(data)):
                write_all(stream, data)
            digest.update(data)
            count += len(block)
        if kind != "mask" and count != num_tokens:
            raise DataError(
                f"{path}: {count:,} values for the {num_tokens:,} tokens of its store; one a "
                f"token is needed"
            )
        stream.seek(0)
        with writing(path, _NPY_HEADER_BYTES):
            write_all(stream, _npy_header(dtype, count))
            os.fsync(stream.fileno())
    entry = {
        **info,
        "format_version": FORMAT_VERSION,
        "name": name,
        "kind": kind,
        "count": count,
        "sha256": digest.hexdigest(),
        "store_fingerprint": fingerprint,
    }
    write_whole(temporary_path(_json_of(path)), json_bytes(seal(entry)), _json_of(path))


def _reserve(stream: Any, num_bytes: int) -> None:
    """Take the room for a file now, where the system can."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(stream.fileno(), 0, num_bytes)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise


def _publish_array(path: Path) -> None:
    _json_of(path).unlink(missing_ok=True)
    os.replace(temporary_path(path), path)
    os.replace(temporary_path(_json_of(path)), _json_of(path))


def _npy_header(dtype: np.dtype, count: int) -> bytes:
    """Return the header of a `.npy` file, version 1.0: the only bytes that are accepted.

    numpy writes the same ones. Since they follow from dtype and count, nothing of a file is ever
    parsed, and no pickle can hide in one.
    """
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({count},), }}"
    size = _NPY_HEADER_BYTES - len(_NPY_MAGIC) - 2
    return _NPY_MAGIC + struct.pack("<H", size) + text.ljust(size - 1).encode() + b"\n"


def _check_block(path: Path, num_tokens: int, kind: str, block: np.ndarray, last: int) -> int:
    if block.ndim != 1 or block.dtype != ARRAYS[kind]:
        raise DataError(f"{path}: {block.dtype} {block.shape}; one row of {ARRAYS[kind]} is needed")
    if kind != "mask" or not len(block):
        return last
    wide = block.astype(np.int64)
    if wide[0] <= last or (np.diff(wide) <= 0).any():
        raise DataError(f"{path}: mask positions must ascend strictly")
    if wide[-1] >= num_tokens:
        raise DataError(f"{path}: position {wide[-1]} of {num_tokens} tokens")
    return int(wide[-1])


def open_array(
    shard: Shard, name: str, kind: str, verify: bool = False
) -> tuple[np.ndarray, dict[str, Any]]:
    """Map an array beside a shard, read-only, and return it with its JSON.

    Its content is hashed when it is opened first, and again only if the file has changed; with
    `verify` in any case.

    Raises:
        DataError: absent (says which command makes it), made for another store, or damaged.
    """
    path = array_path(shard, name, kind)
    json_path = _json_of(path)
    if not json_path.is_file() or not path.is_file():
        missing = path if json_path.is_file() else json_path
        raise DataError(f"{missing}: no whole array here; {ARRAY_MAKERS[kind]} makes it")
    again = f"make it again with {ARRAY_MAKERS[kind]}"
    info = _read_sealed(json_path, again)
    if info.get("store_fingerprint") != shard.fingerprint:
        raise DataError(
            f"{path}: made for the store {info.get('store_fingerprint')}, but {shard.prefix} is "
            f"{shard.fingerprint}; {again}"
        )
    count, dtype = info.get("count"), ARRAYS[kind]
    if type(count) is not int or count < 0 or not isinstance(info.get("sha256"), str):
        raise DataError(f"{json_path}: entries are missing or of the wrong type; {again}")
    with open(path, "rb") as stream:
        header = stream.read(_NPY_HEADER_BYTES)
        status = os.fstat(stream.fileno())
    size = _NPY_HEADER_BYTES + count * dtype.itemsize
    if header != _npy_header(dtype, count) or status.st_size != size:
        raise DataError(
            f"{path}: {status.st_size:,} bytes, or their header, are not those of {count:,} values "
            f"of {dtype} that {json_path} says; {again}"
        )
    if count != shard.num_tokens and (kind != "mask" or count > shard.num_tokens):
        raise DataError(f"{path}: {count} values for {shard.num_tokens} tokens; {again}")
    _check_content(shard.prefix, path, _NPY_HEADER_BYTES, info["sha256"], verify, again=again)
    return _map(str(path), dtype, count, _NPY_HEADER_BYTES), info


def _array_names(shard: Shard, kind: str) -> set[str]:
    prefix, suffix = Path(shard.prefix).name + ".", f".{kind}.json"
    names = set()
    for path in Path(shard.prefix).parent.iterdir():
        name = path.name[len(prefix) : -len(suffix)]
        if path.name.startswith(prefix) and path.name.endswith(suffix):
            if _NAME.fullmatch(name) and path.with_suffix(".npy").is_file():
                names.add(name)
    return names


def list_arrays(store: TokenStore, kind: str) -> list[str]:
    """Return the sorted names of the arrays of a kind that every shard has whole."""
    names = [_array_names(shard, kind) for shard in store.shards]
    return sorted(set.intersection(*names))


def missing_arrays(store: TokenStore, name: str, kind: str) -> list[Path]:
    """Return the paths of array `name` of the shards that do not have it yet."""
    paths = [array_path(shard, name, kind) for shard in store.shards]
    return [path for path in paths if not _json_of(path).is_file()]


def verify_store(prefix: str) -> tuple[TokenStore, int]:
    """Hash every byte of a store and of the arrays beside it.

    Returns:
        The store, and how many arrays it has.
    Raises:
        DataError: naming the first file that is not as it was written.
    """
    store, num_arrays = TokenStore.open(prefix, verify=True), 0
    for shard in store.shards:
        arrays = [(name, kind) for kind in ARRAYS for name in sorted(_array_names(shard, kind))]
        if _json_of(array_path(shard, "", "importance")).is_file():
            arrays.append(("", "importance"))
        for name, kind in arrays:
            open_array(shard, name, kind, verify=True)
        num_arrays += len(arrays)
    return store, num_arrays


# --------------------------------------------------------------------------- tables beside a store


class TableWriter:
    """Write several columns that are made block by block: `P.COLUMN.npy`, and `P.json` last.

    A cache of what follows from a store: `open_table` gives None for anything odd. As a context
    manager it closes, or leaves nothing behind after an exception.

    Args:
        prefix: of the table; the caller holds its lock.
        columns: dtype of each column.
        key: all that the table follows from.
    """

    def __init__(self, prefix: str, columns: dict[str, np.dtype], key: str) -> None:
        self._json, self._key, self._columns = Path(prefix + ".json"), key, columns
        self._paths = {name: Path(f"{prefix}.{name}.npy") for name in columns}
        self._counts = dict.fromkeys(columns, 0)
        self._hashes = {name: hashlib.sha256() for name in columns}
        self._streams: dict[str, Any] = {}
        try:
            remove_leftovers(self._json, *self._paths.values())
            for name, path in self._paths.items():
                with writing(path):
                    self._streams[name] = open(temporary_path(path), "wb", buffering=0)
                self._streams[name].seek(_NPY_HEADER_BYTES)
        except BaseException:
            self._abort()
            raise

    def add(self, name: str, block: np.ndarray) -> None:
        """Append to a column."""
        data = np.ascontiguousarray(block, self._columns[name]).tobytes()
        with writing(self._paths[name], len(data)):
            write_all(self._streams[name], data)
        self._hashes[name].update(data)
        self._counts[name] += len(block)

    def _close(self) -> None:
        for name, path in self._paths.items():
            with writing(path, _NPY_HEADER_BYTES), self._streams[name] as stream:
                stream.seek(0)
                write_all(stream, _npy_header(self._columns[name], self._counts[name]))
                os.fsync(stream.fileno())
        columns = {
            name: {"count": self._counts[name], "sha256": self._hashes[name].hexdigest()}
            for name in self._columns
        }
        entry = {"format_version": FORMAT_VERSION, "key": self._key, "columns": columns}
        write_whole(temporary_path(self._json), json_bytes(seal(entry)), self._json)
        self._json.unlink(missing_ok=True)
        for path in (*self._paths.values(), self._json):
            os.replace(temporary_path(path), path)
        sync(self._json.parent)

    def _abort(self) -> None:
        for stream in self._streams.values():
            stream.close()
        for path in (*self._paths.values(), self._json):
            temporary_path(path).unlink(missing_ok=True)

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, kind: type | None, *rest: object) -> None:
        try:
            if kind is None:
                self._close()
        finally:
            self._abort()


def open_table(
    store: TokenStore, prefix: str, columns: dict[str, np.dtype], key: str
) -> dict[str, np.ndarray] | None:
    """Map the columns that a `TableWriter` wrote, or give None if they are not as it wrote them."""
    try:
        info = _read_sealed(prefix + ".json", "")
        if info["key"] != key:
            return None
        found = {}
        for name, dtype in columns.items():
            path, count = Path(f"{prefix}.{name}.npy"), info["columns"][name]["count"]
            with open(path, "rb") as stream:
                header, size = stream.read(_NPY_HEADER_BYTES), os.fstat(stream.fileno()).st_size
            if header != _npy_header(dtype, count) or (
                size != _NPY_HEADER_BYTES + count * dtype.itemsize
            ):
                return None
            sha256 = info["columns"][name]["sha256"]
            _check_content(store.prefix, path, _NPY_HEADER_BYTES, sha256, verify=False)
            found[name] = np.asarray(_map(str(path), dtype, count, _NPY_HEADER_BYTES))
        return found
    except (OSError, DataError, KeyError, TypeError):
        return None
