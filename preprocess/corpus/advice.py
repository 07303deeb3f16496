"""What a refused file seems to be, by its bytes, and the command that converts it.

Only for messages: nothing is read otherwise because of what is guessed here.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

SAMPLE_BYTES = 1 << 16  # around the first byte that cannot be read
HEAD_BYTES = 1 << 12

_TABLE = "python -c \"import pandas; pandas.{read}({name!r}).to_csv({made!r}, index=False)\""
_FEATHER = ("python -c \"import pyarrow.feather as f, pyarrow.parquet as p; "
            "p.write_table(f.read_table({name!r}), {made!r})\"")
_PICKLE = "it can run code when it is read; where it was made, write {stem}.csv instead"
# First bytes -> what they are, and the command; `{q}` is the quoted path, `{stem}` it without its
# suffix.
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "gzip", "mv {q} {q}.gz"),
    (b"\x28\xb5\x2f\xfd", "zstandard", "mv {q} {q}.zst"),
    (b"BZh", "bzip2", "bunzip2 -k -c {q} > {q}.txt, with the right ending"),
    (b"\xfd7zXZ", "xz", "xz -d -k -c {q} > {q}.txt, with the right ending"),
    (b"PAR1", "parquet", "mv {q} {stem}.parquet"),
    (b"ARROW1", "Arrow (feather)", _FEATHER),
    (b"\xff\xff\xff\xff", "an Arrow stream", "python -c \"import datasets; datasets.Dataset."
     "from_file({name!r}).to_parquet({made_parquet!r})\""),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook", _TABLE.replace("{read}", "read_excel")),
    (b"%PDF", "PDF", "pdftotext {q} {stem}.txt"),
    (b"SQLite format 3", "an SQLite database",
     "sqlite3 -header -csv {q} 'SELECT * FROM TABLE' > {stem}.csv"),
    (b"\x80\x04", "a Python pickle", _PICKLE),
    (b"\x80\x05", "a Python pickle", _PICKLE),
)
_JSON_ROWS = ("python -c \"import json, sys; [print(json.dumps(row)) for row in "
              "json.load(sys.stdin)]\" < {q} > {stem}.jsonl")
_SEPARATOR = ("python -c \"import csv, sys; csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, "
              "delimiter={separator!r}))\" < {q} > {stem}.csv")
# Scripts by the encodings that write them, in the order in which they are tried.
_ENCODINGS: tuple[tuple[str, str, str], ...] = (
    ("cp1252", "Western European", "[\u00a0-\u024f\u2013-\u203a\u20ac\u2122]"),
    ("cp1251", "Cyrillic", "[\u0410-\u044f\u0401\u0451\u00ab\u00bb\u2013-\u201d\u2116]"),
    ("euc_kr", "Korean", "[\uac00-\ud7a3]"),
    ("shift_jis", "Japanese", "[\u3000-\u30ff\u4e00-\u9fff\uff01-\uff5e]"),
    ("euc_jp", "Japanese", "[\u3000-\u30ff\u4e00-\u9fff\uff01-\uff5e]"),
    ("gb18030", "Chinese", "[\u3000-\u303f\u4e00-\u9fff\uff01-\uff5e\u2014\u2018-\u201d\u2026]"),
    ("big5", "Chinese", "[\u3000-\u303f\u4e00-\u9fff\uff01-\uff5e\u2014\u2018-\u201d\u2026]"),
)


def _fill(command: str, path: Path, **more: str) -> str:
    text = str(path)
    stem = re.sub(r"(\.(gz|zst))?$", "", text)
    stem = re.sub(r"\.[A-Za-z0-9]+$", "", stem)
    makes_csv = "> {stem}.csv" in command or "to_csv" in command
    again = stem + ("_converted" if makes_csv and text == stem + ".csv" else "")
    return command.format(q=shlex.quote(text), stem=shlex.quote(again), name=text,
                          made=again + ".csv" if "to_csv" in command else again + ".parquet",
                          made_parquet=again + ".parquet", **more)


def advise_magic(path: Path, data: bytes | None = None) -> str:
    """Return which binary format a file is in by its first bytes, and the command for it.

    Args:
        data: these bytes, where they are not those of the file itself.
    Returns:
        "" if they say nothing.
    """
    if data is None:
        with open(path, "rb") as stream:
            data = stream.read(HEAD_BYTES)
    for magic, kind, command in _MAGIC:
        if data.startswith(magic):
            return f"these bytes are {kind}: {_fill(command, path)}"
    if data.startswith(b"PK\x03\x04"):
        if b"xl/" in data or b"[Content_Types].xml" in data:
            command = _TABLE.replace("{read}", "read_excel")
            return f"these bytes are an Excel workbook: {_fill(command, path)}"
        return f"these bytes are a zip archive: {_fill('unzip {q}', path)}"
    return ""


def advise_packing(path: Path) -> str:
    """Return what a `.gz` or `.zst` is that cannot be unpacked; "" where it is what it says."""
    with open(path, "rb") as stream:
        data = stream.read(HEAD_BYTES)
    if data.startswith({".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}[path.suffix]):
        return ""
    if data.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd")):
        right = ".gz" if data[0] == 0x1F else ".zst"
        command = f"mv {shlex.quote(str(path))} {shlex.quote(str(path.with_suffix(right)))}"
        return f"these bytes are {right[1:]}: {command}"
    if advice := advise_magic(path, data):
        return advice
    command = f"mv {shlex.quote(str(path))} {shlex.quote(str(path.with_suffix('')))}"
    return f"these bytes are not compressed: {command}"


def advise_format(path: Path, data: bytes | None = None) -> str:
    """Return what a file is by its first bytes, text or not; arguments as `advise_magic`."""
    if advice := advise_magic(path, data):
        return advice
    if data is None:
        with open(path, "rb") as stream:
            data = stream.read(HEAD_BYTES)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text = data[: error.start].decode() if error.start > len(data) - 4 else ""
    return _advise_text(text, path)


def _advise_text(text: str, path: Path) -> str:
    first = text.lstrip().partition("\n")[0].rstrip("\r")
    if re.match(r"\s*\[\s*\{", text):
        return f"these bytes are one JSON array, not an object per line: {_fill(_JSON_ROWS, path)}"
    if first.startswith("{") and not first.rstrip().endswith("}"):
        command = _fill("jq -c . {q} > {stem}_lines.jsonl", path)
        return f"these bytes are JSON over several lines: {command}"
    for mark, ending in (("{", "jsonl"), ("\t", "tsv"), (",", "csv")):
        if mark not in first or mark == "{" and not first.startswith(mark):
            continue
        if str(path).endswith(f".{ending}"):
            return ""
        command = _fill(f"mv {{q}} {{stem}}.{ending}", path)
        return f"these bytes look like .{ending}: {command}"
    return ""


def advise_separator(path: Path, names: list[str], columns: list[str]) -> str:
    """Return what to do about a table whose first line has the columns asked for, but cut
    elsewhere; "" if it has not.
    """
    line = names[0] if len(names) == 1 else "\t".join(names)
    if "\0" in line:
        encoding = "utf-16le" if line[1:2] == "\0" else "utf-16be"
        return f"these bytes fit {encoding}: {_iconv(path, encoding)}"
    for separator in (";", "\t", "|", ","):
        parts = [part.strip(' "') for part in line.split(separator)]
        if len(names) == 1 and len(parts) > 1 and set(columns) <= set(parts):
            if separator == "," and path.suffix == ".tsv":
                return f"these bytes look like .csv: {_fill('mv {q} {stem}.csv', path)}"
            command = _fill(_SEPARATOR, path, separator=separator)
            return f"its columns are separated by {separator!r}: {command}"
    return ""


def advise_encoding(path: Path, error: UnicodeDecodeError) -> str:
    """Return the encoding that fits the bytes that are not UTF-8, and the command that converts."""
    data = bytes(error.object)
    encoding = guess_encoding(data, error.start)
    if encoding == "utf-8":
        return ("the text around it is UTF-8, so these bytes are damaged: "
                + _iconv(path, encoding, "-c ") + " leaves them out")
    return f"these bytes fit {encoding}: {_iconv(path, encoding)}"


def _iconv(path: Path, encoding: str, more: str = "") -> str:
    unpack = {".gz": "gzip -dc {} | ", ".zst": "zstd -dc {} | "}.get(path.suffix, "")
    inner = path.with_suffix("") if unpack else path
    made = shlex.quote(str(inner.with_name(f"{inner.stem}_utf8{inner.suffix}")))
    name = shlex.quote(str(path))
    command = f"iconv {more}-f {encoding} -t utf-8"
    return unpack.format(name) + command + (" > " if unpack else f" {name} > ") + made


def guess_encoding(data: bytes, at: int = 0) -> str:
    """Return the encoding, as iconv spells it, that fits bytes which are not UTF-8.

    Args:
        at: the first byte that is wrong.
    """
    for mark, name in ((b"\xff\xfe\x00\x00", "utf-32"), (b"\x00\x00\xfe\xff", "utf-32"),
                       (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if data.startswith(mark):
            return name
    data = data[max(0, at - SAMPLE_BYTES // 2) : at + SAMPLE_BYTES // 2]
    if data.count(0) > len(data) // 4:
        return "utf-16le" if data[1::2].count(0) > data[::2].count(0) else "utf-16be"
    high = re.sub(rb"[\x00-\x7f]+", b"", data)
    whole = re.sub(r"[\x00-\x7f]+", "", data.decode("utf-8", "ignore")).encode()
    if len(whole) > 0.8 * len(high):
        return "utf-8"
    letters = len(re.findall(rb"[A-Za-z\x80-\xff]", data))
    best, best_share = "latin1", 0.0
    for name, language, script in _ENCODINGS:
        if name == "cp1252" and len(high) > 0.4 * letters:
            continue  # in these languages most letters are ASCII
        try:
            text = data.decode(name, "ignore" if len(data) == SAMPLE_BYTES else "strict")
        except UnicodeDecodeError:
            continue
        foreign = re.findall(r"[^\x00-\x7f]", text)
        if language == "Japanese" and len(re.findall("[\u3040-\u30ff]", text)) < len(foreign) / 6:
            continue  # Chinese characters alone fit it too
        share = len(re.findall(script, text)) / max(1, len(foreign))
        if share > best_share + 0.02:
            best, best_share = name, share
    if best == "cp1252" and not re.search(rb"[\x80-\x9f]", high):
        return "latin1"  # the two are the same here
    return best
