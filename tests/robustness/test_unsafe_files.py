"""Files from strangers: none runs code, leaves its folder, or takes the memory of the machine.

Each trap is first sprung on purpose where that is possible: a test whose trap cannot catch
anything proves nothing.
"""

from __future__ import annotations

import csv
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
from safetensors import safe_open

from preprocess import corpus, progress, tokenize_corpus
from preprocess.corpus import Span, load_task, read_documents, sources
from preprocess.errors import ConfigError, DataError, run_command
from preprocess.files import atomic_write_json, seal
from preprocess.store import TokenStore, open_array, write_array
from preprocess.view.tables import Table
from tests.support.runs import made_up_stage
from tests.support.states import Trap
from tests.support.stores import write
from train import model, report
from train.data import row_tables
from train.engine import schema
from train.recipes import plan, recipe
from train.reports import results
from train.run_dir.hf_folder import model_card, open_weights

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
    found = recipe.load_recipe(tmp_path / "good.yaml", [f"tokenizer={tag}"])
    assert found["tokenizer"] == tag  # a text like any other


@pytest.mark.parametrize("value", ["!!bool x", "!!timestamp x", '!!int ""', "!!float x"])
def test_tags_fit_their_values(tmp_path, value):
    (tmp_path / "r.yaml").write_text(f"{TASK}variables: {{x: {value}}}\n")
    with pytest.raises(ConfigError, match=r"r\.yaml: not valid YAML"):
        recipe.load_recipe(tmp_path / "r.yaml", [])


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


# A section, and a value that its option does not take or that would become another flag.
VALUES = {
    'finetune: {logging_steps: ["10", "--trust_remote_code"]}': "must be a whole number",
    'finetune: {gradient_checkpointing: "--trust_remote_code"}': "must be true or false",
    'finetune: {learning_rate: "1 --trust_remote_code"}': "must be a number",
    'finetune: {learning_rate: .inf}': "must be a number",
    'finetune: {train_batch_size: 0}': "must be 1 or more",
    'finetune: {precision: --trust_remote_code}': "must be auto or config",
    'finetune: {seeds: "1/../../x"}': "must be different whole numbers",
    'finetune: {seeds: [1, --trust_remote_code]}': "must be different whole numbers",
    'finetune: {push_to_hub: true}': "unknown flag 'push_to_hub'",
    'finetune: {report_to: wandb}': "unknown flag 'report_to'",
    'finetune: {output_dir: /x}': "unknown flag 'output_dir'",
    'task_guided: {eval_mask_index: [a, --trust_remote_code]}': "does not begin with -",
    'task_guided: {per_device_train_batch_size: --trust_remote_code}': "does not begin|or auto",
    'general: {model_config: --trust_remote_code}': "does not begin with -",
    'annotate: {language: --trust_remote_code}': "does not begin with -",
    'domain_text: {input: [d.txt, --output, x]}': "does not begin with -",
    'domain_text: {where: {--output: x}}': "does not begin with -",
    'domain_text: {where: {a: "\\e[31m"}}': "without control characters",
    'domain_text: {text_column: "a\\0b"}': "without control characters",
    'domain_text: {text_column: [a, b]}': "must be a text",
    'domain_text: {num_workers: 1.5}': "must be a whole number",
    'masks: {seed: [1, 2]}': "must be a whole number",
    'floors: {untrained: "no"}': "must be true or false",
    'tokenizer: --trust_remote_code': "does not begin with -",
    'deepspeed_config: [a, --trust_remote_code]': "must be a text",
    'variables: [1]': "variables must hold names and values",
    'finetune: [1]': "must hold flags",
}


@pytest.mark.parametrize("text", VALUES)
def test_a_value_of_a_recipe_is_only_a_value(tmp_path, text):
    (tmp_path / "r.yaml").write_text(f"{TASK}{text}\n")
    with pytest.raises(ConfigError, match=VALUES[text]) as error:
        recipe.load_recipe(tmp_path / "r.yaml", ["finetune.num_train_epochs=1"])
    assert str(error.value).isprintable()


def test_values_reach_the_commands_as_their_types(tmp_path):
    (tmp_path / "r.yaml").write_text(
        TASK.replace("[none]", "[random]") + "domain_text: {input: d.txt, text_column: 0}\n"
        "finetune: {learning_rate: 1e-5, seeds: [1, 2], max_train_samples: null}\n"
        "task_guided: {torch_compile: no, last_layer_subset: false, max_steps: 2.0e+3,"
        " per_device_train_batch_size: auto}\n")
    steps, _ = plan.plan(recipe.load_recipe(tmp_path / "r.yaml", []), "R")
    words = {step.name: " ".join(step.command) for step in steps}
    assert "--input d.txt --text_column 0 " in words["tokenize-domain"]
    tuned = words["finetune-random-seed42"]
    assert "--learning_rate 1e-05 " in tuned and "--seeds 1,2 " in tuned + " "
    guided = words["task_guided-random-seed42"]
    for part in ("--torch_compile no ", "--no_last_layer_subset ", "--max_steps 2000 ",
                 "--per_device_train_batch_size auto "):
        assert part in guided
    with pytest.raises(ConfigError, match="taken for another flag"):
        plan.flag_words({"output_dir": "-x"})


def test_a_recipe_extends_only_files_beside_it(tmp_path):
    home = tmp_path / "home"
    (home / "sub").mkdir(parents=True)
    (tmp_path / "secret.yaml").write_text(TASK)
    (home / "base.yaml").write_text(TASK)
    (home / "sub" / "base.yaml").write_text("extends: ../base.yaml\n")
    (home / "link.yaml").symlink_to(tmp_path / "secret.yaml")
    for name in ("../secret.yaml", str(tmp_path / "secret.yaml"), "/dev/stdin", "link.yaml",
                 "sub/../../secret.yaml"):
        (home / "r.yaml").write_text(f"extends: {name}\n")
        with pytest.raises(ConfigError, match="outside its folder"):
            recipe.load_recipe(home / "r.yaml", [])
    for name in ("base.yaml", "./sub/base.yaml", recipe.REPOSITORY / "train/recipes/mr_yelp.yaml"):
        (home / "r.yaml").write_text(f"extends: {name}\n")
        assert recipe.load_recipe(home / "r.yaml", [])["task"]["task"] == "mr"


@pytest.mark.parametrize(("block", "message"), [
    ({"torch_autocast": {"lower_precision_safe_modules": ["evil.Code"]}}, "classes of torch.nn"),
    ({"torch_autocast": {"lower_precision_safe_modules": ["torch.nn.no"]}}, "classes of torch.nn"),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "nvme_path": "/x"}}},
     "offloading to a disk"),
    ({"csv_monitor": {"enabled": True, "output_path": "/x"}}, "not supported here"),
    ({"flops_profiler": {"enabled": True, "output_file": "/x"}}, "not supported here"),
    ({"tensorboard": {"enabled": True, "output_path": "/x"}}, "its own event files"),
    ({"wandb": {"enabled": True}}, "not supported here"),
])
def test_a_deepspeed_json_names_no_code_and_no_path(block, message):
    with pytest.raises(ConfigError, match=message):
        schema.check(block)
    schema.check({"torch_autocast": {"enabled": True, "dtype": "bf16",
                                     "lower_precision_safe_modules": ["torch.nn.Linear"]}})


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


def test_an_index_of_weights_stays_inside_its_folder(tmp_path, tiny_encoder):
    folder, other = tmp_path / "in" / "model", tmp_path / "other"
    shutil.copytree(tiny_encoder, folder)
    shutil.copytree(tiny_encoder, other)
    os.rename(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    with safe_open(other / "model.safetensors", "pt") as weights:
        names = list(weights.keys())

    def index(part: object) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(
            {"metadata": {}, "weight_map": dict.fromkeys(names, part)}))

    index("model-00001-of-00001.safetensors")
    assert len(open_weights(str(folder)).hf_digest) == 64
    model.load_masked_lm(str(folder), 0)
    for name in (*EVIL_NAMES, "../../other/model.safetensors", str(other / "model.safetensors"),
                 "model-00002-of-00002.safetensors"):
        index(name)
        for load in (open_weights, lambda name: model.load_masked_lm(name, 0)):
            with pytest.raises(DataError, match="no weight file of its folder"):
                load(str(folder))


@pytest.mark.parametrize(("change", "message"), [
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized weights"),
    ({"attn_implementation": "somebody/kernel"}, "may name code on the hub"),
    ({"use_cache": 1.5}, "cannot be loaded"),
    ({"hidden_act": "nothing"}, "cannot be loaded"),
    ([], "must hold one JSON object"),
])
def test_a_configuration_leads_nowhere_else(tmp_path, change, message, tiny_encoder):
    shutil.copytree(tiny_encoder, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    changed = {**config, **change} if isinstance(change, dict) else change
    (tmp_path / "m" / "config.json").write_text(json.dumps(changed))
    with pytest.raises((ConfigError, DataError), match=message):
        model.load_masked_lm(str(tmp_path / "m"), 0)
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "m" / "adapter_config.json").write_text('{"base_model_name_or_path": "x/y"}')
    with pytest.raises(ConfigError, match="an adapter of another checkpoint"):
        model.load_config(str(tmp_path / "m"))


# --------------------------------------------------------------------------- names on a screen


EVIL_NAME = "=a\x1b]0;pwned\x07\u202e\n|<b>$\\frac{"


def test_names_from_files_reach_no_terminal_raw(tmp_path, capsys, monkeypatch):
    """Labels, arms and files: in a terminal, a page, a CSV and a model card."""
    monkeypatch.setattr(progress, "_has_terminal", lambda: False)
    progress.say(f"labels {EVIL_NAME}")
    with pytest.raises(SystemExit):
        run_command(lambda: load_task("custom", train_file=f"{EVIL_NAME}.csv", test_file="t.csv"))
    run = tmp_path / "R" / "=1+1\x1b]0;t\x07 $x_{"
    (run / "seed_1").mkdir(parents=True)
    row = {"seed": 1, "task": EVIL_NAME, "test_accuracy": 0.5, "test_macro_f1": 0.5}
    (run / "results.jsonl").write_text(json.dumps(row))
    (run / "seed_1" / "predictions.jsonl").write_text('{"item": "a", "label": 1, "prediction": 1}')
    report.main([str(tmp_path / "R"), "--output_dir", str(tmp_path / "out")])
    shown = "".join(capsys.readouterr())
    page = (tmp_path / "out" / "report.html").read_text()
    table = (tmp_path / "out" / "table.csv").read_text()
    card = model_card([made_up_stage(masking=EVIL_NAME, masked_tokens=1)], EVIL_NAME)
    for text in (shown, page, table, card):
        assert all(line.isprintable() for line in text.split("\n")), text
        assert "\\x1b" in text
    assert "<b>" not in page and "\\|\\<b\\>" in card
    assert table.splitlines()[1].startswith("'=1+1")


def test_csv_cells_are_no_formulas():
    numbers = ["-1", "+0.25", "-1e-05", "-", "12.5 %", "-3 %", "1,234", ".5", -0.5, None, ""]
    formulas = ["=1+1", "+a", "-cmd|' /C calc'!A0", "@SUM(A1)", "-1+1", " =1", "\t=1", "--1", "+"]
    cells = Table("t", ["=x"], [[cell] for cell in (*numbers, *formulas)]).as_csv().splitlines()
    read = [row[0] if row else "" for row in csv.reader(cells)]
    assert read[1 : 1 + len(numbers)] == ["" if n is None else str(n) for n in numbers]
    assert all(cell[0] in "'\\" for cell in [read[0], *read[1 + len(numbers) :]]), read


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
