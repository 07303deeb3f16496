"""Sources and tasks: what is read, and how a broken file is named."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tarfile
import zipfile

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess import corpus
from preprocess.corpus import load_task, packages, read_documents, resolve_path, source_kind
from preprocess.errors import ConfigError, DataError

TEXTS = ["first one", 'with "quotes", commas', "two\nlines", "caf\u00e9 \u65e5\u672c"]


def documents(*args, **kwargs) -> list[str]:
    return list(read_documents(*args, **kwargs))


def write_rows(folder, kind) -> str:
    """The same four rows, columns text and kind, in each format."""
    path = folder / f"rows.{kind}"
    rows = [{"text": t, "kind": "ab"[i % 2]} for i, t in enumerate(TEXTS)]
    if kind == "csv":
        with open(path, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, ["text", "kind"])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_rows_of_each_format(tmp_path, kind):
    path = write_rows(tmp_path, kind)
    assert documents([path]) == TEXTS
    assert documents([path], where={"kind": "b"}) == TEXTS[1::2]
    assert documents([path], "text+kind")[0] == "first one. a"
    assert documents([path], max_documents=3) == TEXTS[:3]
    with pytest.raises(DataError, match=r"rows\..*no column 'body'; columns are 'text', 'kind'"):
        documents([path], "body")
    with pytest.raises(DataError, match="no column 'source'"):
        documents([path], where={"source": "x"})


@pytest.mark.parametrize("packing", ["gz", "zst"])
def test_packed_files(tmp_path, packing):
    data = open(write_rows(tmp_path, "csv"), "rb").read()
    path = tmp_path / f"packed.csv.{packing}"
    with pyarrow.CompressedOutputStream(str(path), {"gz": "gzip", "zst": "zstd"}[packing]) as out:
        out.write(data)
    assert documents([str(path)]) == TEXTS
    assert documents([str(path)], part=(0, 2)) == TEXTS[::2]  # not cut into byte ranges
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"packed\.csv"):
        documents([str(path)])


def test_line_ends_written_as_text_become_line_ends(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('5,"Great.\\nSaid ""wow"".\\n\\nAgain"\n')
    assert documents([str(path)], "1") == ['Great.\\nSaid "wow".\\n\\nAgain']
    assert documents([str(path)], "1", unescape_newlines=True) == [
        'Great.\nSaid "wow".\n\nAgain'
    ]


def test_tsv_takes_quotes_as_they_are_and_columns_by_number(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('1\tsay "hi\n0\tbye\n')
    assert documents([str(path)], "1") == ['say "hi', "bye"]


def test_hub_reads_a_local_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder, "jsonl")
    (folder / "rows.jsonl").rename(folder / "train.jsonl")
    assert documents([f"hub:{folder}"]) == TEXTS
    assert documents([f"hub:{folder}"], part=(1, 2)) == TEXTS[1::2]
    with pytest.raises(DataError, match="split test"):
        documents([f"hub:{folder}"], split="test")
    with pytest.raises(DataError, match="no column 'body'"):
        documents([f"hub:{folder}"], "body")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.txt", "text"),
        ("a", "text"),
        ("A.CSV.GZ", "csv"),
        ("b.jsonl.zst", "jsonl"),
        ("hub:x/y.csv", "hub"),
        ("pypi:a==1/b/c.csv#sha256=" + "0" * 64, "csv"),
    ],
)
def test_source_kind(name, kind):
    assert source_kind(name) == kind


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("a.txt", b"fine\ncaf\xe9\n", r"a\.txt, line 2: not UTF-8 \(byte 0xe9 at byte 4"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", r"a\.jsonl, line 1: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', r"a\.jsonl, line 2: not a JSON object"),
        ("a.jsonl", b'{"text": "a"}\n{"b": 1}\n', r"a\.jsonl, line 2: no column 'text'"),
        ("a.txt.gz", b"not gzip", r"a\.txt\.gz"),
        ("a.txt.zst", b"not zstd", r"a\.txt\.zst"),
    ],
)
def test_broken_file_is_named_with_its_line(tmp_path, name, data, match):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=match):
        documents([str(tmp_path / name)])


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.binary(max_size=40).map(lambda b: b.replace(b"\r", b"")), min_size=1, max_size=3),
    st.integers(1, 7),
    st.booleans(),
    st.sampled_from([None, 4]),
)
def test_parts_together_are_the_whole(tmp_path_factory, contents, count, blocks, most):
    folder = tmp_path_factory.mktemp("parts")
    specs = []
    for i, content in enumerate(contents):
        (folder / f"{i}.txt").write_bytes(bytes(c & 127 for c in content).replace(b"d", b"\n"))
        specs.append(str(folder / f"{i}.txt"))
    options = {"blank_line_documents": blocks, "max_documents": most}
    whole = documents(specs, **options)
    parts = [documents(specs, part=(i, count), **options) for i in range(count)]
    assert sorted(d for part in parts for d in part) == sorted(whole)
    if most is None and not blocks and len(specs) < count:  # byte ranges keep the order
        assert [d for part in parts for d in part] == whole


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_part_is_cut_into_smaller_ones(tmp_path, monkeypatch, count):
    """Whole files, some of them empty, or byte ranges over all of them; order is kept."""
    monkeypatch.setattr(corpus.documents, "RANGE_BYTES", 7)
    specs = []
    for i in range(4):
        path = tmp_path / f"{i}.txt"
        path.write_text("".join(f"line {i}{j} {'x' * (j % 9)}\n" for j in range(9 * (i != 2))))
        specs.append(str(path))
    for index in range(count):
        pieces = corpus.cut_part(specs, False, (index, count), None)
        assert len(pieces) > 1
        found = [text for files, part in pieces for text in documents(files, part=part)]
        assert found == documents(specs, part=(index, count))
    assert corpus.cut_part(specs, True, (0, count), None) is None
    assert corpus.cut_part(specs, False, (0, count), 5) is None
    assert corpus.cut_part([*specs, "a.csv"], False, (0, count), None) is None


# --------------------------------------------------------------------------- inside packages


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A wheel with a file and a folder, in place of what pip would download."""
    archive = tmp_path / "thing-1.0.whl"
    files = {"thing/a.csv": b"text\nhello\n", "thing/model/x/y.json": b"{}", "thing/b": b"b"}
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, data in files.items():
            opened.writestr(name, data)
        opened.writestr("bad/../../escape", b"")
        opened.writestr("big/zeros", bytes(5 << 20))
        for i in range(30):
            opened.writestr(f"many/{i}", b"")
        opened.writestr("both", b"")
        opened.writestr("both/inside", b"")
    downloads = []

    def download(name, version, sha256, scratch):
        downloads.append(name)
        return archive

    monkeypatch.setattr(packages, "_download", download)
    monkeypatch.setenv("SELMASK_CACHE", str(tmp_path / "cache"))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return lambda inside: f"pypi:thing==1.0/{inside}#sha256={digest}", downloads


def test_file_and_folder_inside_a_package(package, tmp_path):
    spec, downloads = package
    assert documents([spec("thing/a.csv")]) == ["hello"]
    folder = resolve_path(spec("thing"))
    assert (folder / "model/x/y.json").read_bytes() == b"{}" and (folder / "b").exists()
    assert resolve_path(spec("thing/a.csv")).read_bytes() == b"text\nhello\n"
    assert len(downloads) == 2  # the third was in the cache
    with pytest.raises(DataError, match=r"nothing is not in .*'thing'"):
        resolve_path(spec("nothing"))
    with pytest.raises(DataError, match="not safe"):
        resolve_path(spec("bad"))
    assert not list(tmp_path.rglob("escape"))
    with pytest.raises(DataError, match="not a readable wheel"):
        resolve_path(spec("both"))


def test_a_wheel_is_unpacked_within_bounds(package, tmp_path, monkeypatch):
    spec, _ = package
    monkeypatch.setattr(packages, "MAX_BYTES", 4 << 20)
    monkeypatch.setattr(packages, "MAX_FILES", 20)
    for inside, complaint in (("big", "more than 4,194,304 bytes"), ("many", "30 files, more")):
        with pytest.raises(DataError, match=complaint):
            resolve_path(spec(inside))
    assert not list((tmp_path / "cache").rglob("*[z0]*/zeros"))  # nothing is left of it
    assert resolve_path(spec("many/3")).read_bytes() == b""


@pytest.mark.slow
def test_pip_runs_no_code_of_a_package(tmp_path, monkeypatch):
    """A source distribution is refused unopened, and a folder named pip is not taken for pip."""
    canary, links = tmp_path / "canary", tmp_path / "links"
    files = {
        "x-1.0/pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "b"\n'
                                'backend-path = ["."]\n[project]\nname = "x"\nversion = "1.0"\n',
        "x-1.0/b.py": f"import os\nos.mkdir({str(canary)!r})\n", "x-1.0/t.txt": "text\n",
        "x-1.0/setup.py": f"import os\nos.mkdir({str(canary)!r})\n",
        "x-1.0/PKG-INFO": "Metadata-Version: 2.1\nName: x\nVersion: 1.0\n",
    }
    links.mkdir()
    with tarfile.open(links / "x-1.0.tar.gz", "w:gz") as opened:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            opened.addfile(member, io.BytesIO(text.encode()))
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__main__.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    monkeypatch.chdir(tmp_path)
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(links)),
                        ("SELMASK_CACHE", str(tmp_path / "cache"))):
        monkeypatch.setenv(name, value)
    digest = hashlib.sha256((links / "x-1.0.tar.gz").read_bytes()).hexdigest()
    with pytest.raises(DataError, match="that the hash is that of a wheel"):
        resolve_path(f"pypi:x==1.0/x-1.0/t.txt#sha256={digest}")
    assert not canary.exists()


@pytest.mark.parametrize(
    "spec",
    [
        "pypi:thing",
        "pypi:thing==1.0/a.csv",
        "pypi:thing==1.0/a.csv#sha256=12",
        "pypi:thing==1.0/../a#sha256=" + "0" * 64,
        "pypi:--index-url==1.0/a#sha256=" + "0" * 64,
    ],
)
def test_wrong_package_name(spec):
    with pytest.raises(ConfigError, match="write pypi:NAME==VERSION"):
        resolve_path(spec)


# --------------------------------------------------------------------------- tasks


def test_mr_release_and_csv(tmp_path):
    release = tmp_path / "mr"
    release.mkdir()
    for suffix, word in (("pos", "caf\u00e9"), ("neg", "dull")):
        lines = "".join(f"{word} number {i} . \n" for i in range(100))
        (release / f"rt-polarity.{suffix}").write_bytes(lines.encode("latin-1"))
    task = load_task("mr", data_dir=str(release))
    assert task.labels == ("negative", "positive")
    sizes = {split: len(examples) for split, examples in task.splits.items()}
    assert sum(sizes.values()) == 200 and sizes["train"] > 140 and min(sizes.values()) > 8
    table = tmp_path / "all.csv"
    rows = [(e.text, e.label) for examples in task.splits.values() for e in examples]
    table.write_text(
        "text,label,source\nother,1,imdb\n" + "".join(f"{t},{n},rotten_tomatoes\n" for t, n in rows)
    )
    again = load_task("mr", data_dir=str(table))  # the split is the content's, not the order's
    for split in sizes:
        assert set(again.splits[split]) == set(task.splits[split])
    items = [e.item for examples in task.splits.values() for e in examples]
    assert len(set(items)) == 200
    assert all(e.label == ("caf\u00e9" in e.text) for e in task.splits["train"])


SEMEVAL = """<?xml version="1.0" encoding="UTF-8"?>
<sentences>{}</sentences>"""
SENTENCE = """<sentence id="{0}"><text>Sentence {0} &amp; more</text>
<aspectTerms><aspectTerm term="soup" polarity="positive" from="0" to="1"/>
<aspectTerm term="bread" polarity="conflict" from="0" to="1"/></aspectTerms>
<aspectCategories><aspectCategory category="food" polarity="negative"/>
<aspectCategory category="service" polarity="neutral"/></aspectCategories></sentence>"""


def test_semeval(tmp_path):
    for name, numbers in (("Restaurants_Train_v2", range(100)), ("Restaurants_Test_Gold", [900])):
        body = "".join(SENTENCE.format(i) for i in numbers)
        (tmp_path / f"{name}.xml").write_text(SEMEVAL.format(body))
    task = load_task("semeval14_restaurant", data_dir=str(tmp_path))
    assert task.labels == ("positive", "negative", "neutral")
    assert [(e.text, e.aspect, e.label) for e in task.splits["test"]] == [
        ("Sentence 900 & more", "food", 1),
        ("Sentence 900 & more", "service", 2),
    ]
    train, validation = ({e.text for e in task.splits[s]} for s in ("train", "validation"))
    assert not train & validation and len(train | validation) == 100 and 2 < len(validation) < 25
    terms = load_task("semeval14_restaurant_term", data_dir=str(tmp_path))
    assert [(e.aspect, e.label) for e in terms.splits["test"]] == [("soup", 0)]
    with pytest.raises(DataError, match="Laptop_Train_v2.xml"):
        load_task("semeval14_laptop", data_dir=str(tmp_path))
    (tmp_path / "Restaurants_Test_Gold.xml").write_text("<sentences>")
    with pytest.raises(DataError, match="Gold.xml: not valid XML"):
        load_task("semeval14_restaurant", data_dir=str(tmp_path))


def test_sst2_without_and_with_test_labels(tmp_path):
    rows = "".join(f"sentence {i} \t{i % 2}\n" for i in range(100))
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + rows)
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\ndev\t1\n")
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\tblind\n")
    task = load_task("sst2", data_dir=str(tmp_path))
    assert [e.text for e in task.splits["test"]] == ["dev"]
    assert len(task.splits["train"]) + len(task.splits["validation"]) == 100
    (tmp_path / "test.tsv").write_text("sentence\tlabel\nseen\t0\n")
    task = load_task("sst2", data_dir=str(tmp_path))
    assert [e.text for e in task.splits["test"]] == ["seen"]
    assert [e.text for e in task.splits["validation"]] == ["dev"]
    assert len(task.splits["train"]) == 100


def test_custom(tmp_path):
    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    rows = "".join(f"text {i},{i % 11},of {i}\n" for i in range(200))
    train.write_text("body,class,aspect\n" + rows)
    test.write_text("body,class,aspect\nunseen,10,new\n")
    columns = {"text_column": "body", "label_column": "class"}
    files = {"train_file": str(train), "test_file": str(test), **columns}
    task = load_task("custom", **files)
    assert task.labels == tuple(map(str, range(11)))
    assert task.splits["test"][0].label == 10
    assert len(task.splits["train"]) + len(task.splits["validation"]) == 200
    pairs = load_task("custom", **files, pair_column="aspect")
    assert pairs.splits["test"][0].aspect == "new"
    test.write_text("body,class\nunseen,zebra\n")
    with pytest.raises(DataError, match="test.csv, line 2: label 'zebra'"):
        load_task("custom", **files)
    with pytest.raises(ConfigError, match="--test_file"):
        load_task("custom", train_file=str(train), **columns)
    with pytest.raises(DataError, match="no column 'text'"):
        load_task("custom", train_file=str(train), test_file=str(test))


def test_unknown_task_and_missing_folder(tmp_path):
    with pytest.raises(ConfigError, match="known are mr, sst2"):
        load_task("imdb")
    with pytest.raises(ConfigError, match="--data_dir"):
        load_task("mr")
    with pytest.raises(DataError, match="rt-polarity.pos"):
        load_task("mr", data_dir=str(tmp_path))
    (tmp_path / "rt-polarity.pos").write_text("fine\n")
    (tmp_path / "rt-polarity.neg").write_text("")
    with pytest.raises(DataError, match="no .* example"):
        load_task("mr", data_dir=str(tmp_path))
