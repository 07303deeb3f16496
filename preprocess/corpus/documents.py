"""Documents of text: whole sources, or the part of them that one process reads."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from preprocess.corpus.packages import resolve_path
from preprocess.corpus.sources import (
    COMPRESSED,
    MAX_LINE_BYTES,
    Span,
    as_text,
    check_file,
    read_rows,
    source_kind,
)
from preprocess.errors import ConfigError, DataError

SPLITTABLE = ("text", "jsonl")  # a line is a document, so any byte range can be read by itself
HASH_BYTES = 1 << 20  # read at a time
RANGE_BYTES = 1 << 22  # of one big file, for one process at a time


def read_documents(
    specs: list[str],
    text_column: str = "text",
    where: dict[str, str] | None = None,
    split: str = "train",
    blank_line_documents: bool = False,
    part: tuple[int, int] = (0, 1),
    max_documents: int | None = None,
    unescape_newlines: bool = False,
    passed: Callable[[int], None] | None = None,
) -> Iterator[str]:
    """Yield the documents of some sources, in order, in bounded memory.

    Args:
        text_column: `A+B` joins two columns with ". " (the Amazon reviews' title and text).
        blank_line_documents: in plain text, a document is a block between blank lines.
        part: `(i, n)`, part i of n. With at least n files, file f is in part f mod n; with fewer
            uncompressed files of lines, a part is a byte range of all files end to end; otherwise
            document d is in part d mod n.
        max_documents: number of documents to read of all parts together.
        unescape_newlines: read a written `\\n` as a line end, as in the Yelp and Amazon CSVs.
        passed: called now and then with the number of bytes read since its last call.
    Raises:
        DataError: names the file, and the line if it is known.
    """
    chosen, interleaved = _choose(specs, blank_line_documents, part, max_documents)
    documents = _all_documents(chosen, text_column, where, split, blank_line_documents, passed)
    if interleaved:
        documents = itertools.islice(documents, part[0], max_documents, part[1])
    if unescape_newlines:
        documents = (text.replace("\\n", "\n") for text in documents)
    yield from documents


def describe_first(specs: list[str], text_column: str = "text", **options: Any) -> Iterator[str]:
    """Yield a line about the first document of each source, which shows that it can be read.

    Args:
        options: of `read_documents`.
    Raises:
        DataError: as there.
    """
    for spec in specs:
        first = next(read_documents([spec], text_column, **options), None)
        yield f"{spec}: " + ("no document" if first is None else f"begins with {first[:60]!r}")


def num_bytes(
    specs: list[str], blank_line_documents: bool, part: tuple[int, int]
) -> int | None:
    """Return how many bytes `read_documents` reads for a part; None if that is unknown."""
    if any(source_kind(spec) == "hub" for spec in specs):
        return None
    total = 0
    for spec, span in _choose(specs, blank_line_documents, part, None)[0]:
        end = span.end if span and span.end is not None else resolve_path(spec).stat().st_size
        total += end - (span.start if span else 0)
    return total


def hash_part(
    specs: list[str], blank_line_documents: bool, part: tuple[int, int], max_documents: int | None
) -> dict[str, str]:
    """Return the sha256 of what `read_documents` reads of each file for a part, by its name.

    So that a file that was edited since, to the same size, is noticed. Of a byte range, the line
    that its last byte is in belongs to it.

    Raises:
        DataError: a folder, a pipe, or no such file.
    """
    made: dict[str, str] = {}
    for spec, span in _choose(specs, blank_line_documents, part, max_documents)[0]:
        if source_kind(spec) == "hub":
            continue
        path = resolve_path(spec)
        check_file(path)
        digest = hashlib.sha256()
        with open(path, "rb") as stream:
            start, end = (span.start, span.end) if span else (0, None)
            left = (path.stat().st_size if end is None else end) - start
            stream.seek(start)
            while left > 0 and (block := stream.read(min(left, HASH_BYTES))):
                digest.update(block)
                left -= len(block)
            digest.update(stream.readline(MAX_LINE_BYTES))
        made[spec] = made.get(spec, "") + digest.hexdigest()
    return made


def _choose(
    specs: list[str], blank_line_documents: bool, part: tuple[int, int], max_documents: int | None
) -> tuple[list[tuple[str, Span | None]], bool]:
    """Return what a part reads, and whether it keeps only every n-th document of that."""
    index, count = part
    if count > 1 and max_documents is None and len(specs) >= count:
        return [(spec, None) for spec in specs[index::count]], False
    if count > 1 and _by_line(specs, blank_line_documents, max_documents):
        return list(_byte_ranges(specs, index, count)), False
    return [(spec, None) for spec in specs], True


def cut_part(
    specs: list[str], blank_line_documents: bool, part: tuple[int, int], max_documents: int | None
) -> list[tuple[list[str], tuple[int, int]]] | None:
    """Cut a part into smaller ones of about `RANGE_BYTES`, for `read_documents`.

    Returns:
        Sources and part of each; their documents, in order, are those of the part. None if byte
        ranges cannot be read by themselves.
    """
    index, count = part
    if not _by_line(specs, blank_line_documents, max_documents):
        return None
    if len(specs) >= count > 1:
        specs, index, count = specs[index::count], 0, 1
    num_bytes = sum(resolve_path(spec).stat().st_size for spec in specs) // count
    # More pieces than files altogether, or a part would be taken as some of the files.
    pieces = max(-(-num_bytes // RANGE_BYTES), len(specs) // count + 1)
    return [(specs, (index * pieces + i, count * pieces)) for i in range(pieces)]


def _by_line(specs: list[str], blank_line_documents: bool, max_documents: int | None) -> bool:
    """Return whether any byte range of these sources can be read by itself."""
    return not blank_line_documents and max_documents is None and all(
        source_kind(spec) in SPLITTABLE and resolve_path(spec).suffix not in COMPRESSED
        for spec in specs
    )


def _byte_ranges(specs: list[str], index: int, count: int) -> Iterator[tuple[str, Span]]:
    paths = [resolve_path(spec) for spec in specs]
    for path in paths:
        check_file(path)
    sizes = [path.stat().st_size for path in paths]
    total = sum(sizes)
    start, end = total * index // count, total * (index + 1) // count
    before = 0
    for spec, size in zip(specs, sizes, strict=True):
        first, last = max(start - before, 0), min(end - before, size)
        if first < last:
            yield spec, Span(first, last)
        before += size


def _all_documents(
    chosen: list[tuple[str, Span | None]],
    text_column: str,
    where: dict[str, str] | None,
    split: str,
    blank_line_documents: bool,
    passed: Callable[[int], None] | None,
) -> Iterator[str]:
    for spec, span in chosen:
        if passed is not None:
            span = replace(span or Span(), passed=passed)
        if blank_line_documents:
            if source_kind(spec) != "text":
                raise ConfigError(f"--blank_line_documents: {spec} is not plain text")
            lines = (row["text"] for row in read_rows(spec, ["text"], where=where, span=span))
            for blank, block in itertools.groupby(lines, key=lambda line: not line.strip()):
                if not blank:
                    yield _join_block(spec, block)
            continue
        columns = text_column.split("+")
        for row in read_rows(spec, columns, split, where, span, columns):
            yield ". ".join(as_text(row[c]) for c in columns)


def _join_block(spec: str, lines: Iterable[str]) -> str:
    kept, size = [], 0
    for line in lines:
        kept.append(line)
        size += len(line)
        if size > MAX_LINE_BYTES:
            raise DataError(
                f"{spec}: more than {MAX_LINE_BYTES:,} characters without a blank line, from "
                f"{kept[0][:40]!r} on; leave --blank_line_documents out, or add blank lines"
            )
    return "\n".join(kept)
