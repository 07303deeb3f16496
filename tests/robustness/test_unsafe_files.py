"""Files from strangers: none runs code, leaves its folder, or takes the memory of the machine.

Each trap is first sprung on purpose where that is possible: a test whose trap cannot catch
anything proves nothing.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from preprocess import corpus, tokenize_corpus
from preprocess.corpus import Span, load_task, read_documents, sources
from preprocess.errors import ConfigError, DataError
from preprocess.files import atomic_write_json, seal
from preprocess.store import TokenStore, open_array, write_array
from tests.support.states import Trap
from tests.support.stores import write
from train import model
from train.data import row_tables
from train.recipes import recipe
from train.reports import results

SNOOP = """
import os
os.makedirs({canary!r}, exist_ok=True)
from transformers import {base} as Base
class Snoop(Base):
    pass
"""


@pytest.fixture
def canary(tmp_path):
    """A folder that code in a file would make; must be absent at the end of the test."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code from a file has run"


def sprung(canary: Path) -> bool:
    """Whether the trap has caught; sets it again."""
    caught = canary.exists()
    shutil.rmtree(canary, ignore_errors=True)
    return caught


# --------------------------------------------------------------------------- arrays


def pickled_array(canary: Path, header: str | None = None) -> bytes:
    """A `.npy` file of objects; `header` takes the place of its own."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([Trap(canary)], dtype=object), allow_pickle=True)
    if header is None:
        return buffer.getvalue()
    return header.encode("latin-1") + buffer.getvalue()[128:]


@pytest.mark.parametrize("kind", ["mask", "scores", "importance"])
def test_arrays_are_never_unpickled(tmp_path, canary, kind):
    write(tmp_path / "s", [[[1, 2, 3]]])
    (shard,) = TokenStore.open(tmp_path / "s").shards
    dtype = {"mask": np.uint32, "scores": np.float16, "importance": np.uint8}[kind]
    path = write_array(shard, "n", kind, np.arange(3).astype(dtype), {})
    info = json.loads(path.with_suffix(".json").read_text())
    np.load(io.BytesIO(pickled_array(canary)), allow_pickle=True)
    assert sprung(canary)
    honest = path.read_bytes()[:128].decode("latin-1")
    for evil in (pickled_array(canary), pickled_array(canary, honest)):
        path.write_bytes(evil)
        lie = {**info, "sha256": hashlib.sha256(evil[128:]).hexdigest(), "count": 1}
        for said in (info, lie):
            atomic_write_json(path.with_suffix(".json"), seal(said))
            with pytest.raises(DataError, match=rf"s\.n\.{kind}\.npy"):
                open_array(shard, "n", kind)


def test_a_table_of_rows_is_never_unpickled(canary, reviews_store, tmp_path):
    # Other tests have left tables beside the shared store.
    shutil.copytree(Path(reviews_store).parent, tmp_path / "store",
                    ignore=shutil.ignore_patterns("*.rows-*"))
    store = TokenStore.open(tmp_path / "store" / "reviews")
    expected = np.array(row_tables(store, 32, 0.1)[0].piece_starts)
    (path,) = (tmp_path / "store").glob("*.train_starts.npy")
    (said,) = (tmp_path / "store").glob("*.rows-*.json")
    honest, info = path.read_bytes()[:128].decode("latin-1"), json.loads(said.read_text())
    np.load(io.BytesIO(pickled_array(canary)), allow_pickle=True)
    assert sprung(canary)
    for evil in (pickled_array(canary), pickled_array(canary, honest)):
        path.write_bytes(evil)
        info["columns"]["train_starts"] = {
            "count": 1, "sha256": hashlib.sha256(evil[128:]).hexdigest()
        }
        atomic_write_json(said, seal(info))
        found, _ = row_tables(store, 32, 0.1)  # built again
        assert (found.piece_starts == expected).all()


# --------------------------------------------------------------------------- names in lists


EVIL_NAMES = (
    "../x", "..", ".", "", "/etc/passwd", "a/b", "x\0", "\0", "s/../../x", "//x", None, 7, ["s"],
)


@pytest.mark.parametrize("name", EVIL_NAMES)
@pytest.mark.parametrize("what", ["shard", "tokenizer"])
def test_names_in_a_store_stay_in_its_folder(tmp_path, name, what):
    folder = tmp_path / "in" / "side"
    for i in range(2):
        write(folder / "s", [[[i]]], (i, 2))
    for place in (tmp_path / "x", folder / "a" / "b"):  # where such a name would lead
        place.parent.mkdir(exist_ok=True)
        for ending in ("json", "bin", "idx"):
            shutil.copy(folder / f"s-00001-of-00002.{ending}", f"{place}.{ending}")
        shutil.copytree(folder / "s.tokenizer", place)
    info = json.loads((folder / "s.json").read_text())
    if what == "shard":
        info["shards"][1]["name"] = name
    else:
        info["tokenizer"]["folder"] = name
    atomic_write_json(folder / "s.json", seal(info))
    with pytest.raises(DataError, match=r"s\.json: names .* outside its folder"):
        TokenStore.open(folder / "s")


def test_shards_may_be_links_to_another_disk(tmp_path):
    """Some files or all, in the folder or through it."""
    for i in range(2):
        write(tmp_path / "real" / "s", [[[i]]], (i, 2))
    (tmp_path / "folder").symlink_to(tmp_path / "real")
    (tmp_path / "links").mkdir()
    for path in (tmp_path / "real").iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    shutil.copytree(tmp_path / "real", tmp_path / "some")
    (tmp_path / "disk").mkdir()
    for name in ("s-00001-of-00002.bin", "s-00001-of-00002.idx", "s.tokenizer"):
        os.rename(tmp_path / "some" / name, tmp_path / "disk" / name)
        (tmp_path / "some" / name).symlink_to(tmp_path / "disk" / name)
    for place in ("real", "folder", "links", "some"):
        assert TokenStore.open(tmp_path / place / "s", verify=True).num_tokens == 2


@pytest.mark.parametrize("seed", ["../../x", "1/../..", 1.5, True, None, "1"])
def test_seeds_of_results_are_numbers(tmp_path, seed):
    """A seed names a folder."""
    row = {"seed": seed, "task": "t", "test_accuracy": 1.0}
    (tmp_path / "results.jsonl").write_text(json.dumps(row) + "\n")
    for read, path in ((results.read_finetune_run, tmp_path),
                       (results.read_json_lines, tmp_path / "results.jsonl")):
        with pytest.raises(DataError, match=r"results\.jsonl, line 1"):
            read(path)


# --------------------------------------------------------------------------- recipes


TAGS = (
    "!!python/object/apply:os.mkdir [{canary}]",
    "!!python/object/new:os.mkdir [{canary}]",
    "!!python/object/apply:subprocess.check_call [[mkdir, {canary}]]",
    "!!python/object:pathlib.Path {{}}",
    "!!python/name:os.mkdir",
    "!!python/module:antigravity",
)
TASK = "task: {task: mr, data_dir: d}\nencoder: e\narms: [none]\n"


@pytest.mark.parametrize("tag", TAGS)
def test_recipes_make_no_objects(tmp_path, canary, tag):
    import yaml

    tag = tag.format(canary=canary)
    if "apply:os" in tag:
        yaml.unsafe_load(tag)
        assert sprung(canary)
    (tmp_path / "evil.yaml").write_text(f"{TASK}variables: {{x: {tag}}}\n")
    (tmp_path / "heir.yaml").write_text("extends: evil.yaml\n")
    for name in ("evil.yaml", "heir.yaml"):
        with pytest.raises(ConfigError, match=r"evil\.yaml: not valid YAML"):
            recipe.load_recipe(tmp_path / name, [])
    (tmp_path / "good.yaml").write_text(TASK)
    found = recipe.load_recipe(tmp_path / "good.yaml", [f"finetune.seeds={tag}"])
    assert found["finetune"]["seeds"] == tag  # a text like any other


def test_recipes_do_not_grow_without_end(tmp_path):
    names = [f"n{i}" for i in range(12)]
    laughs = "".join(
        f"  {name}: &{name} [{', '.join([f'*{before}'] * 9) if before else 'ha'}]\n"
        for before, name in zip([None, *names], names, strict=False)
    )
    for text in (f"{TASK}variables:\n{laughs}", f"{TASK}variables: &v {{again: *v}}\n",
                 f"{TASK}variables: &v [*v]\n", f"{TASK}arms: {'[' * 5000}\n"):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"r\.yaml.*(without aliases|not valid YAML)"):
            recipe.load_recipe(tmp_path / "r.yaml", [])


@pytest.mark.parametrize("value", ["true", "1", "yes", "'${x}'", "'no'"])
def test_a_recipe_file_cannot_ask_for_a_checkpoints_code(tmp_path, value):
    (tmp_path / "r.yaml").write_text(
        f"{TASK}variables: {{x: true}}\nfinetune: {{trust_remote_code: {value}}}\n"
    )
    (tmp_path / "heir.yaml").write_text("extends: r.yaml\n")
    for name in ("r.yaml", "heir.yaml"):
        with pytest.raises(ConfigError, match="type --set finetune.trust_remote_code=true"):
            recipe.load_recipe(tmp_path / name, [])
    (tmp_path / "r.yaml").write_text(f"{TASK}finetune: {{trust_remote_code: false}}\n")
    found = recipe.load_recipe(tmp_path / "r.yaml", ["finetune.trust_remote_code=true"])
    assert found["finetune"]["trust_remote_code"] is True


# --------------------------------------------------------------------------- checkpoints' code


@pytest.fixture
def spied(tmp_path, canary, tiny_encoder, monkeypatch):
    """A checkpoint folder whose config and tokenizer ask for code beside them."""
    folder = tmp_path / "spied"
    shutil.copytree(tiny_encoder, folder)
    for base, file, classes in (
        ("PreTrainedTokenizerFast", "tokenizer_config.json",
         {"AutoTokenizer": [None, "tok.Snoop"]}),
        ("BertConfig", "config.json", {"AutoConfig": "con.Snoop"}),
        ("BertForMaskedLM", "config.json", {"AutoModelForMaskedLM": "mod.Snoop",
                                            "AutoModel": "mod.Snoop"}),
        ("BertForSequenceClassification", "config.json",
         {"AutoModelForSequenceClassification": "cls.Snoop",
          "AutoModelForTokenClassification": "cls.Snoop"}),
    ):
        name = [entry for value in classes.values() for entry in np.atleast_1d(value) if entry][0]
        code = SNOOP.format(canary=str(canary), base=base)
        (folder / f"{name.partition('.')[0]}.py").write_text(code)
        config = json.loads((folder / file).read_text())
        config["auto_map"] = {**config.get("auto_map", {}), **classes}
        (folder / file).write_text(json.dumps(config))
    # Where transformers would copy such code to.
    import transformers.dynamic_module_utils as modules

    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return folder


def test_a_checkpoints_code_runs_only_when_asked_for(spied, canary, reviews_file, tmp_path):
    name = str(spied)
    model.load_config(name, trust_remote_code=True)
    assert sprung(canary)
    tries = (
        lambda: model.load_config(name),
        lambda: model.load_tokenizer(name),
        lambda: model.load_masked_lm(name, 0),
        lambda: model.load_classifier(name, ("a", "b"), 0),
        lambda: model.load_scorer(name, 0),
        lambda: tokenize_corpus.main([
            "--input", reviews_file, "--tokenizer", name, "--output", str(tmp_path / "s"),
            "--num_workers", "1",
        ]),
    )
    for attempt in tries:
        try:
            attempt()
        except (ConfigError, DataError) as error:
            assert "\n" not in str(error)
        assert not canary.exists()
    # An unknown architecture is no reason to run it.
    config = json.loads((spied / "config.json").read_text())
    (spied / "config.json").write_text(json.dumps({**config, "model_type": "mystery"}))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        model.load_config(name)


def test_pickled_weights_run_nothing(tmp_path, canary, tiny_encoder):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_encoder, folder)
    (folder / "model.safetensors").unlink()
    with open(folder / "pytorch_model.bin", "wb") as file:
        pickle.dump({"bert.pooler.dense.bias": Trap(canary)}, file, protocol=2)
    with open(folder / "pytorch_model.bin", "rb") as file:
        pickle.load(file)
    assert sprung(canary)
    for load in (lambda: model.load_masked_lm(str(folder), 0),
                 lambda: model.load_classifier(str(folder), ("a", "b"), 0)):
        with pytest.raises(Exception):  # noqa: B017
            load()


def test_a_data_sets_script_is_not_run(tmp_path, canary):
    folder = tmp_path / "reviews"
    folder.mkdir()
    (folder / "reviews.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    with pytest.raises(DataError, match="hub:.*reviews"):
        list(read_documents([f"hub:{folder}"]))


# --------------------------------------------------------------------------- bombs


def compress(path: Path, content: bytes) -> Path:
    import pyarrow

    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    else:
        path.write_bytes(pyarrow.compress(content, codec="zstd", asbytes=True))
    return path


@pytest.mark.parametrize("ending", ["txt.gz", "txt.zst", "jsonl.gz", "csv.gz", "tsv.zst"])
@pytest.mark.parametrize(
    ("content", "line"), [(b"\0" * 10_000_000, "line [12]: "), ((b" " * 9999 + b"\n") * 800, "")]
)
def test_a_bomb_is_refused_before_it_fills_the_memory(tmp_path, ending, content, line):
    first = b'{"text": "x"}\n' if "jsonl" in ending else b"text\n"
    path = compress(tmp_path / f"bomb.{ending}", first + content)
    assert path.stat().st_size < 11_000
    with pytest.raises(DataError, match=rf"bomb\..*{line}more than 500 times as long"):
        list(read_documents([str(path)]))


def test_text_that_compresses_well_is_read(tmp_path):
    text = "".join(f"{i} the film is good and the plot is not, {i % 7}\n" for i in range(60_000))
    for ending in ("gz", "zst"):
        path = compress(tmp_path / f"a.txt.{ending}", text.encode())
        assert sum(1 for _ in read_documents([str(path)])) == 60_000


def test_a_line_has_an_end(tmp_path, monkeypatch):
    """Read up to the limit and no further, whatever the file holds."""
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 1 << 20)
    generator = np.random.default_rng(0)
    content = generator.integers(97, 122, 20 << 20, dtype=np.uint8).tobytes()
    plain = tmp_path / "a.txt"
    plain.write_bytes(b"fine\n" + content)
    packed = compress(tmp_path / "b.txt.gz", b"fine\n" + content[: 6 << 20])
    table = tmp_path / "c.csv"
    table.write_bytes(b'text\nfine\n"never closed\n' + b"a line\n" * 400_000)
    tracemalloc.start()
    for path, complaint in (
        (plain, "a.txt, line 2: longer than 1,048,576 bytes"),
        (packed, "b.txt.gz, line 2: longer than"),
        (table, "c.csv, line .*field larger than field limit"),
    ):
        tracemalloc.reset_peak()
        with pytest.raises(DataError, match=complaint):
            list(read_documents([str(path)]))
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
    assert list(sources.read_lines(plain, Span(0, 3))) == [(1, "fine\n")]
    with pytest.raises(DataError, match="longer than"):
        list(sources.read_lines(plain, Span(3, 9)))


def test_a_block_has_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.documents, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "a.txt"
    path.write_text("short\nblock\n\n" + "no blank line\n" * 200)
    documents = read_documents([str(path)], blank_line_documents=True)
    assert next(documents) == "short\nblock"
    with pytest.raises(DataError, match="more than 1,000 characters without a blank line"):
        next(documents)


LAUGHS = "".join(f'<!ENTITY x{i} "{f"&x{i - 1};" * 10 if i else "ha" * 50}">' for i in range(9))


@pytest.mark.parametrize(
    ("entities", "used"), [(LAUGHS, "x8"), ('<!ENTITY x SYSTEM "file://{}/secret">', "x")]
)
def test_xml_entities_neither_grow_nor_read_files(tmp_path, entities, used):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "train.xml").write_text(
        f"<!DOCTYPE s [{entities.replace('{}', str(tmp_path))}]><sentences><sentence>"
        f"<text>&{used};</text></sentence></sentences>"
    )
    with pytest.raises(DataError, match=r"train\.xml: not valid XML"):
        load_task("semeval14_laptop", data_dir=str(tmp_path))
