"""Write a token store, or one shard of it, by one process."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.errors import ConfigError, DataError, writing
from preprocess.files import (
    WriterLock,
    create_temporary,
    file_sha256,
    fingerprint_text,
    finish,
    json_bytes,
    remove_leftovers,
    seal,
    sync,
    temporary_path,
    write_all,
    write_temporary,
)
from preprocess.store.arrays import json_of, prefix_array_path, publish_array, stage_array
from preprocess.store.join import join_shards
from preprocess.store.layout import (
    BLOCK_ENTRIES,
    FORMAT_VERSION,
    HEADER,
    MAGIC,
    MAX_SHARD_TOKENS,
    MAX_VOCAB,
    OUR_DTYPE,
    SPECIAL_NAMES,
    same_files,
    shard_prefix,
)


def check_vocabulary(tokenizer: Any, name: str = "") -> int:
    """Return the number of ids of a tokenizer; more than 65,536 is a `DataError`."""
    size = max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)
    if size > MAX_VOCAB:
        raise DataError(
            f"{name or tokenizer.name_or_path}: its tokenizer has {size:,} ids, and a token store "
            f"keeps 16-bit ids: at most {MAX_VOCAB:,}; choose one with a smaller vocabulary"
        )
    return size


def describe_tokenizer(tokenizer: Any, folder: str | Path) -> dict[str, Any]:
    """Save a tokenizer in `folder`, which must not exist; return its entry in `P.json`."""
    vocab_size = check_vocabulary(tokenizer)
    with writing(folder):
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
    # Nobody reads old ones, so this needs no lock.
    remove_leftovers(folder, mark="old")
    for _ in range(3):
        if same_files(folder, files):
            shutil.rmtree(temporary, ignore_errors=True)
            return
        old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
        try:
            if folder.exists():
                os.rename(folder, old)
            os.rename(temporary, folder)
        except OSError:  # another shard was faster: look again
            continue
        finally:
            shutil.rmtree(old, ignore_errors=True)
        return
    raise DataError(f"{folder}: cannot be replaced; remove it and run again")


class StoreWriter(AbstractContextManager["StoreWriter"]):
    """Write one store, or one shard of a store, atomically.

    Args:
        prefix: of the whole store, also when `shard` is given.
        tokenizer: a transformers fast tokenizer; saved beside the store.
        options: that made the ids; kept in the JSON and compared on a rerun.
        shard: `(index, count)`, or None for a store of one piece.
        overwrite: replace an existing store. It stays complete until `close` has written and
            synced everything and only renames.
        lock: of the prefix, if the caller holds it and keeps it.
    Raises:
        DataError: a vocabulary above 65,536, or an existing store.
        ConfigError: another writer.
        DiskFullError: from any method; nothing is left behind.

    As a context manager it leaves nothing behind after an exception.
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
        self._arrays: dict[Path, tuple[str, str, np.ndarray, dict[str, Any]]] = {}
        self._done = False
        self.num_tokens = self.num_documents = 0
        self._hash = hashlib.sha256()
        if not overwrite:
            _refuse_other_counts(self.store_prefix, shard[1] if shard else 1)
        # A store of one piece under this prefix would be a second writer. The prefix is locked only
        # if somebody seems to be there: a thousand shards may start at once.
        if shard is not None and os.path.exists(f"{self.store_prefix}.lock"):
            WriterLock(self.store_prefix, wait_seconds=1.0).release()
        with ExitStack() as at_end:
            lock = lock or at_end.enter_context(WriterLock(self.prefix))
            remove_store_leftovers(self.prefix)
            if not overwrite and not lock.interrupted:
                self._refuse_existing()
            at_end.callback(shutil.rmtree, self._tokenizer_tmp, ignore_errors=True)
            for path in (self._bin, self._idx, self._json):
                at_end.callback(temporary_path(path).unlink, missing_ok=True)
            self._tokenizer = describe_tokenizer(tokenizer, self._tokenizer_tmp)
            self._stream = create_temporary(self._bin, 1 << 20)
            at_end.callback(_close, self._stream)
            self._index = _IndexWriter(self._idx)
            at_end.callback(self._index.abort)
            self._at_end = at_end.pop_all()

    def _refuse_existing(self) -> None:
        if self._json.exists():
            raise DataError(
                f"{self.prefix}.json: a token store exists already; "
                f"give another --output, or --overwrite"
            )
        if self._bin.exists() and self.shard is None:  # a shard is ours, and is not finished
            raise DataError(
                f"{self.prefix}.bin: a store without {self.prefix}.json; take it in with "
                f"tokenize_corpus.py --adopt, or replace it with --overwrite"
            )

    def add_document(self, sequences: Iterable[Sequence[int] | np.ndarray]) -> None:
        """Append one document: its sequences, each array-like of ids."""
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
        write_all(self._stream, data, self._bin)
        self._hash.update(data)
        self._index.add(lengths, documents)
        self.num_tokens += len(tokens)
        self.num_documents += len(documents)

    def add_array(self, name: str, kind: str, array: np.ndarray, info: dict[str, Any]) -> None:
        """Publish an array together with the store.

        Args:
            array: as for `write_array`, of the tokens that the writer has when it is closed.
        """
        path = prefix_array_path(self.prefix, name, kind)
        remove_leftovers(path, json_of(path))
        for staged in (path, json_of(path)):
            self._at_end.callback(temporary_path(staged).unlink, missing_ok=True)
        self._arrays[path] = (name, kind, array, info)

    def close(
        self, extra_counts: dict[str, int] | None = None, notes: dict[str, Any] | None = None
    ) -> None:
        """Put the store in place; the JSON comes last. The last shard writes `P.json` too.

        Args:
            extra_counts: counts of the shard, added up over all shards in `P.json`.
            notes: what else is worth knowing of the shard; kept in its own JSON only.
        """
        self._done = True
        with self._at_end:
            finish(self._stream, self._bin)
            info = self._describe(self._index.close(), extra_counts or {})
            if notes:
                info["notes"] = notes
            write_temporary(self._json, json_bytes(seal(info)))
            for path, (name, kind, array, made_by) in self._arrays.items():
                stage_array(path, self.num_tokens, info["fingerprint"], name, kind, array, made_by)
            self._publish()
            if self.shard is not None:
                join_shards(self.store_prefix, self.shard[1], (self.prefix, info["fingerprint"]))

    def _describe(self, idx_sha256: str, extra_counts: dict[str, int]) -> dict[str, Any]:
        bin_sha256 = self._hash.hexdigest()
        return {
            "format_version": FORMAT_VERSION,
            "tokenizer": {**self._tokenizer, "folder": f"{Path(self.store_prefix).name}.tokenizer"},
            "counts": {
                **extra_counts,
                "tokens": self.num_tokens,
                "sequences": self._index.num_sequences,
                "documents": self.num_documents,
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

    def _publish(self) -> None:
        # Everything is written; only renames follow. Until the JSON is in place, neither the shard
        # nor the store counts as complete.
        for path in (self._json, Path(self.store_prefix + ".json")):
            path.unlink(missing_ok=True)
        folder = Path(self.store_prefix + ".tokenizer")
        _install_folder(self._tokenizer_tmp, folder, self._tokenizer["files"])
        for path in (self._bin, self._idx):
            os.replace(temporary_path(path), path)
        for path in self._arrays:
            publish_array(path)
        sync(self._json.parent)
        os.replace(temporary_path(self._json), self._json)
        sync(self._json.parent)

    def abort(self) -> None:
        """Remove what was written and release the prefix; an older store stays."""
        self._done = True
        self._at_end.close()

    def __exit__(self, kind: type | None, *rest: object) -> None:
        if kind is None and not self._done:
            self.close()
        self.abort()


def _close(stream: Any) -> None:
    with suppress(OSError):  # on a full disk closing tries to write once more
        stream.close()


def _refuse_other_counts(prefix: str, count: int) -> None:
    """Refuse to begin a store of `count` shards beside shards of another number.

    Only before `P.json` is written, which says how many there are: the caller compares that.
    """
    if os.path.exists(prefix + ".json"):
        return
    folder, name = Path(prefix).parent, re.escape(Path(prefix).name)
    shard = re.compile(name + r"-\d{5}-of-(\d{5})\.json")
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        found = shard.fullmatch(path.name)
        if found and int(found[1]) != count:
            raise ConfigError(
                f"{path}: one of {int(found[1])} shards, but {count} are asked for; type "
                f"--num_shards {int(found[1])}, give another --output, or remove the old shards"
            )


def tidy_store(prefix: str) -> None:
    """Remove what killed writers left beside a complete store, unless one is at work."""
    with suppress(ConfigError, OSError):  # such as a read-only disk
        with WriterLock(prefix):
            remove_store_leftovers(prefix)


def remove_store_leftovers(prefix: str) -> None:
    """Remove what killed writers of a store or shard left behind; the caller holds its lock."""
    endings = ("bin", "idx", "idx-documents", "json", "tokenizer", "memo.json")
    remove_leftovers(*(f"{prefix}.{ending}" for ending in endings))
    remove_leftovers(f"{prefix}.tokenizer", mark="old")


class _IndexWriter:
    """Write `P.idx` under its temporary name, in little memory: a long text has 10^8 sequences.

    Lengths go straight to their place behind the header, documents to a second file until the
    number of sequences is known.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._side = path, Path(f"{path}-documents")
        self.num_sequences = self.num_documents = 0
        self._lengths, self._documents = (
            create_temporary(name, 1 << 20) for name in (self._path, self._side)
        )
        self._lengths.write(bytes(HEADER.size))
        self._documents.write(bytes(8))

    def add(self, lengths: np.ndarray, documents: np.ndarray) -> None:
        """Append tokens of each sequence, `(N,)` int64, and sequences of each document, `(D,)`."""
        ends = self.num_sequences + np.cumsum(documents)
        write_all(self._lengths, lengths.astype("<i4").tobytes(), self._path)
        write_all(self._documents, ends.astype("<i8").tobytes(), self._path)
        self.num_sequences += len(lengths)
        self.num_documents += len(documents)

    def close(self) -> str:
        """Write the pointers, the documents and the header; sync; return the sha256."""
        with writing(self._path):  # seeking and reading write what is in the buffers
            start = 0
            for number in range(0, self.num_sequences, BLOCK_ENTRIES):
                count = min(BLOCK_ENTRIES, self.num_sequences - number)
                self._lengths.seek(HEADER.size + 4 * number)
                lengths = np.frombuffer(self._lengths.read(4 * count), "<i4").astype(np.int64)
                ends = start + np.cumsum(lengths)
                self._lengths.seek(HEADER.size + 4 * self.num_sequences + 8 * number)
                self._lengths.write((2 * (ends - lengths)).astype("<i8").tobytes())
                start = int(ends[-1])
            self._lengths.seek(HEADER.size + 12 * self.num_sequences)
            self._documents.seek(0)
            shutil.copyfileobj(self._documents, self._lengths, 1 << 20)
            self._lengths.seek(0)
            counts = (self.num_sequences, self.num_documents + 1)
            self._lengths.write(HEADER.pack(MAGIC, 1, OUR_DTYPE, *counts))
            finish(self._lengths, self._path)
        self.abort(keep=True)
        return file_sha256(temporary_path(self._path))

    def abort(self, keep: bool = False) -> None:
        """Close and remove the files; `keep` leaves the index."""
        for stream in (self._lengths, self._documents):
            _close(stream)
        temporary_path(self._side).unlink(missing_ok=True)
        if not keep:
            temporary_path(self._path).unlink(missing_ok=True)
