"""Many machines: one store made by processes that know nothing of each other, and all stages.

The commands of the first part are those of the README, run as separate processes by stand-ins for
Slurm and by GNU parallel; only file names and the number of shards are made small.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from preprocess import files, tokenize_corpus
from preprocess.errors import ConfigError
from preprocess.store import StoreWriter, TokenStore, join, join_shards, list_arrays, shard_prefix
from tests.support.launch import ROOT, free_port, launch_environment
from tests.support.runs import write_ds_config
from tests.support.stores import FakeTokenizer, write

NUM_SHARDS = 3
# A job array: every task at once, as a process of its own, whose output goes elsewhere.
SBATCH = """#!{python}
import os, re, subprocess, sys
words = sys.argv[1:]
options = [words.pop(0) for word in list(words) if word.startswith("--") and words[0] == word]
array = re.findall("--array=(.*)", "\\n".join([open(words[0]).read(), *options]))[-1]
numbers = []
for part in array.split(","):
    first, _, last = part.partition("-")
    numbers += range(int(first), int(last or first) + 1)
tasks = [
    subprocess.Popen(["bash", *words], env={{**os.environ, "SLURM_ARRAY_TASK_ID": str(number)}},
                     stdout=subprocess.DEVNULL)
    for number in numbers
]
codes = [task.wait() for task in tasks]
print(4711)
sys.exit(max(codes))
"""


def readme_block(*parts: str) -> str:
    """Return the one block of commands in the READMEs that has all these parts."""
    pages = [path.read_text() for path in (ROOT / "README.md", *ROOT.glob("*/README.md"))]
    blocks = re.findall(r"```bash\n(.*?)```", "\n".join(pages), re.DOTALL)
    (found,) = [block for block in blocks if all(part in block for part in parts)]
    return found


def contents(prefix: str | Path) -> dict[str, bytes]:
    folder, name = Path(prefix).parent, Path(prefix).name
    return {p.name: p.read_bytes() for p in folder.iterdir()
            if p.name.startswith(name) and p.is_file()}


def stamps(prefix: str | Path, endings: tuple[str, ...] = (".bin", ".idx", ".npy")) -> dict:
    """What tells a file from one that was written again."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in
            Path(prefix).parent.iterdir() if p.name.endswith(endings)}


# --------------------------------------------------------------------------- joining


def make_shard(prefix: str, index: int, count: int, start, end) -> None:
    start.wait()
    with StoreWriter(prefix, FakeTokenizer(), {}, (index, count)) as writer:
        writer.add_document([[index]])
        end.wait()


def test_shards_that_begin_and_end_at_the_same_moment(tmp_path):
    context, count = multiprocessing.get_context("fork"), 24
    for turn in range(3):
        prefix = str(tmp_path / str(turn) / "s")
        gates = context.Barrier(count), context.Barrier(count)
        tasks = [context.Process(target=make_shard, args=(prefix, i, count, *gates))
                 for i in range(count)]
        for task in tasks:
            task.start()
        for task in tasks:
            task.join()
        assert [task.exitcode for task in tasks] == [0] * count
        store = TokenStore.open(prefix, verify=True)
        assert [shard.tokens.tolist() for shard in store.shards] == [[i] for i in range(count)]
        odd = [name for name in os.listdir(tmp_path / str(turn)) if "lock" in name or "tmp" in name]
        assert odd == []


def test_joining_writes_no_data(tmp_path):
    for i in (2, 0):
        write(tmp_path / "s", [[[i]]], (i, 3))
    before = stamps(tmp_path / "s")
    assert "1 of 3 shards are missing" in join_shards(str(tmp_path / "s"), 3)
    write(tmp_path / "s", [[[1]]], (1, 3))
    after, listed = stamps(tmp_path / "s"), stamps(tmp_path / "s", ("s.json",))
    assert {name: after[name] for name in before} == before and len(after) == 6
    assert join_shards(str(tmp_path / "s"), 3) == ""
    assert stamps(tmp_path / "s") == after and stamps(tmp_path / "s", ("s.json",)) == listed
    (tmp_path / "s.json").unlink()
    assert join_shards(str(tmp_path / "s"), 3) == ""
    assert stamps(tmp_path / "s") == after and TokenStore.open(tmp_path / "s").num_tokens == 3


def test_joining_waits_for_a_host_whose_locks_are_not_seen(tmp_path, monkeypatch):
    for i in range(2):
        write(tmp_path / "s", [[[i]]], (i, 2))
    (tmp_path / "s.json").unlink()
    lock, waited = tmp_path / "s.lock", []

    def other_host_ends(seconds: float) -> None:
        waited.append(seconds)
        lock.unlink(missing_ok=True)

    lock.write_text("1@elsewhere")
    monkeypatch.setattr(files.time, "sleep", other_host_ends)
    assert join_shards(str(tmp_path / "s"), 2) == ""
    assert len(waited) == 1 and TokenStore.open(tmp_path / "s").num_tokens == 2


def test_a_shard_that_is_being_replaced_is_waited_for(tmp_path, monkeypatch):
    for i in range(2):
        write(tmp_path / "s", [[[i]]], (i, 2))
    (tmp_path / "s.json").unlink()
    second = Path(shard_prefix(str(tmp_path / "s"), 1, 2) + ".json")
    plain = join.read_store_json

    def another_process_is_faster(prefix: str) -> dict:
        second.unlink(missing_ok=True)
        return plain(prefix)

    monkeypatch.setattr(join, "read_store_json", another_process_is_faster)
    assert "s-00001-of-00002" in join_shards(str(tmp_path / "s"), 2)
    assert not (tmp_path / "s.json").exists()


@pytest.mark.parametrize("shard", [None, (0, 2), (3, 4)])
def test_another_number_of_shards_is_refused(tmp_path, shard):
    write(tmp_path / "s", [[[1]]], (1, 3))
    write(tmp_path / "s-more", [[[1]]])  # a neighbour whose name begins alike
    before = contents(tmp_path / "s")
    with pytest.raises(ConfigError, match=r"s-00001-of-00003\.json: one of 3 .*--num_shards 3"):
        write(tmp_path / "s", [[[1]]], shard)
    assert contents(tmp_path / "s") == before


# --------------------------------------------------------------------------- whole commands


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> dict[str, str]:
    """An environment with `python` as it is here, and a stand-in for `sbatch`."""
    folder = tmp_path_factory.mktemp("programs")
    (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "sbatch").write_text(SBATCH.format(python=sys.executable))
    for path in folder.iterdir():
        path.chmod(0o755)
    environment = launch_environment()
    return environment | {"PATH": f"{folder}{os.pathsep}{environment['PATH']}"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory, reviews_file) -> list[str]:
    """The reviews as five files: two shards of two, one of one."""
    folder = tmp_path_factory.mktemp("texts")
    lines = Path(reviews_file).read_text().splitlines(keepends=True)
    for i in range(5):
        (folder / f"web-{i}.txt").write_text("".join(lines[24 * i : 24 * (i + 1)]))
    return sorted(map(str, folder.iterdir()))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, texts, tiny_encoder) -> str:
    """Prefix of the store that one process makes of `texts`."""
    prefix = str(tmp_path_factory.mktemp("one") / "web")
    tokenize_corpus.main(tokenizing(texts, tiny_encoder, prefix))
    return prefix


def tokenizing(texts: list[str], tokenizer: str, prefix: str) -> list[str]:
    return ["--input", *texts, "--tokenizer", tokenizer, "--num_workers", "1", "--output", prefix,
            "--num_shards", str(NUM_SHARDS)]


def rendered(block: str, folder: Path, texts: list[str], tokenizer: str) -> str:
    """A block of the README on small files, with three shards."""
    for shown, here in (
        (r"web-\*\.jsonl\.gz", f"{Path(texts[0]).parent}/web-*.txt"),
        ("bert-base-uncased", tokenizer), ("runs/tokens/", f"{folder}/"), (r"\b0-63\b", "0-2"),
        (r"\bseq 0 63\b", "seq 0 2"), (r"\b64\b", str(NUM_SHARDS)),
    ):
        block = re.sub(shown, here, block)
    return block


def shell(text: str, environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess:
    """Run a block as a user would, from the folder of the repository."""
    (folder / "block.sh").write_text(text)
    return subprocess.run(
        ["bash", "-e", str(folder / "block.sh")], cwd=ROOT, env=environment, text=True,
        capture_output=True, timeout=300,
    )


@pytest.mark.slow
def test_gnu_parallel(tmp_path, programs, texts, one_process, tiny_encoder):
    block = rendered(
        readme_block("parallel --jobs", "preprocess/tokenize_corpus.py"), tmp_path, texts,
        tiny_encoder,
    )
    if not shutil.which("parallel"):  # then as it would: three at once
        every, command = block.replace("\\\n", " ").split("|", 1)
        assert every.split() == ["seq", "0", "2"]
        command = command[command.index("python") :].strip()
        block = "".join(f"{command.replace('{}', str(i))} & p{i}=$!\n" for i in range(NUM_SHARDS))
        block += "wait $p0; wait $p1; wait $p2\n"
    done = shell(block, programs, tmp_path)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "web") == contents(one_process)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory, programs, texts, tiny_encoder) -> dict[str, str]:
    """`shard.sh` as the README has it, and the commands of its jobs, one a step."""
    folder = tmp_path_factory.mktemp("slurm")
    script = folder / "shard.sh"
    script.write_text(rendered(readme_block("SLURM_ARRAY_TASK_ID"), folder, texts, tiny_encoder))
    jobs = rendered(readme_block("sbatch", "shard.sh"), folder, texts, tiny_encoder)
    jobs = jobs.replace("shard.sh", str(script)).replace("runs/scorer/hf", f"{folder}/scorer")
    jobs = jobs.replace("--name task", "--name task --max_seq_length 32")
    lines = jobs.replace("\\\n", " ").splitlines()
    found = {word: line for line in lines for word in line.split() if word.endswith(".py")}
    assert len(found) == 3
    return found | {"folder": str(folder), "script": str(script)}


@pytest.fixture(scope="module")
def slurm_store(slurm, programs, tiny_encoder) -> str:
    """Prefix of the store that the first job makes."""
    folder = Path(slurm["folder"])
    job = slurm["preprocess/tokenize_corpus.py"]
    done = shell(f'{job}\ntest "$tokens" = 4711', programs, folder)
    assert done.returncode == 0, done.stderr
    return str(folder / "web")


@pytest.mark.slow
def test_slurm_tokenizes(slurm, slurm_store, programs, one_process):
    assert contents(slurm_store) == contents(one_process)
    # One shard is lost: its task is submitted again, and makes it alone.
    before = stamps(slurm_store)
    for prefix in (slurm_store, shard_prefix(slurm_store, 1, NUM_SHARDS)):
        Path(f"{prefix}.json").unlink()
    again = slurm["preprocess/tokenize_corpus.py"].replace("sbatch", "sbatch --array=1")
    done = shell(again, programs, Path(slurm["folder"]))
    assert done.returncode == 0, done.stderr
    after = stamps(slurm_store)
    assert {name for name in after if after[name] != before[name]} == {
        "web-00001-of-00003.bin", "web-00001-of-00003.idx",
    }
    assert contents(slurm_store) == contents(one_process)


@pytest.fixture(scope="module")
def scorer(slurm, tiny_encoder) -> str:
    """A scorer with fresh weights, where the README's job looks for it."""
    import torch
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    torch.manual_seed(0)
    folder = f"{slurm['folder']}/scorer"
    model = AutoModelForTokenClassification.from_pretrained(tiny_encoder, num_labels=2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_slurm_scores_and_builds_masks(slurm, slurm_store, scorer, programs, tmp_path, run_here):
    """Shard by shard, in processes of their own: the arrays that one process makes."""
    data = stamps(slurm_store, (".bin", ".idx"))
    shutil.copytree(slurm["folder"], tmp_path / "one")
    steps = (("train/score_tokens.py", "scores", "task"),
             ("preprocess/build_masks.py", "mask", "selective"))
    for script, kind, name in steps:
        done = shell(slurm[script], programs, tmp_path)
        assert done.returncode == 0, done.stderr
        assert list_arrays(TokenStore.open(slurm_store), kind) == [name]
        words = slurm[script].rstrip(")").split()
        flags = words[words.index(script) + 1 :]
        run_here(ROOT / script, *[f.replace(slurm["folder"], str(tmp_path / "one")) for f in flags])
        for i in range(NUM_SHARDS):
            ending = f"-0000{i}-of-00003.{name}.{kind}.npy"
            made, expected = (Path(f"{prefix}{ending}").read_bytes()
                              for prefix in (slurm_store, tmp_path / "one" / "web"))
            assert made == expected
        # Another number of shards than the store has; then one array is lost, and made alone.
        wrong = ["--shard_index", "0", "--num_shards", "2"]
        with pytest.raises(ConfigError, match=r"\b2\b.*\b3\b|\b3\b.*\b2\b"):
            run_here(ROOT / script, *flags, *wrong)
        arrays = stamps(slurm_store, (f"{kind}.npy",))
        lost = f"web-00001-of-00003.{name}.{kind}"
        Path(slurm["folder"], f"{lost}.json").unlink()
        run_here(ROOT / script, *flags, "--shard_index", "1", "--num_shards", str(NUM_SHARDS))
        again = stamps(slurm_store, (f"{kind}.npy",))
        assert {n for n in again if again[n] != arrays[n]} == {f"{lost}.npy"}
    assert stamps(slurm_store, (".bin", ".idx")) == data


# --------------------------------------------------------------------------- training

# The stages in one launch; each reads what the one before has written.
STAGES = """
import json, sys
from pathlib import Path
from preprocess.errors import run_command

def main():
    from train import annotate, finetune, fit_scorer, pretrain, score_tokens
    import train.engine
    from train.run_dir import folder
    for module in (train.engine, finetune, fit_scorer):
        module.finish = lambda: None  # one process group for all
    if not train.engine.is_main():
        # These ranks come from the command before, and may look when rank 0 writes already.
        for module in (folder, finetune, fit_scorer):
            module.check_run_dir = lambda config: Path(config.output_dir)
    commands = {"pretrain": pretrain, "finetune": finetune, "annotate": annotate,
                "fit_scorer": fit_scorer, "score_tokens": score_tokens}
    for name, *flags in json.loads(Path(sys.argv[-1]).read_text()):
        commands[name].main(flags)

run_command(main)
"""


def stage_commands(folder: Path, store: str, encoder: str, files: dict[str, str]) -> list[list]:
    """Every command that trains or infers under a launcher, on small data, into `folder`."""
    config = write_ds_config(folder, 1)
    fast = ["--deepspeed_config", config, "--max_seq_length", "32", "--learning_rate", "3e-3",
            "--train_batch_size", "8"]
    task = ["--task", "custom", "--train_file", files["train"], "--test_file", files["test"]]
    return [
        ["pretrain", *fast, "--tokens", store, "--model_name_or_path", encoder, "--max_steps", "4",
         "--output_dir", f"{folder}/general", "--eval_fraction", "0.2"],
        ["finetune", *fast, *task, "--model_name_or_path", f"{folder}/general/hf", "--seeds", "13",
         "--num_train_epochs", "6", "--output_dir", f"{folder}/classifier"],
        ["annotate", *task, "--model_name_or_path", f"{folder}/classifier/seed_13/hf", "--output",
         f"{folder}/annotated/text", "--max_seq_length", "32"],
        ["fit_scorer", *fast, "--annotations", f"{folder}/annotated/text", "--model_name_or_path",
         f"{folder}/general/hf", "--num_train_epochs", "2", "--output_dir", f"{folder}/scorer"],
        ["score_tokens", "--model_name_or_path", f"{folder}/scorer/hf", "--tokens", store,
         "--name", "task", "--max_seq_length", "32"],
    ]


@pytest.mark.slow
def test_two_nodes_do_what_one_does_in_every_stage(
    tmp_path, reviews_store, tiny_encoder, labelled_files
):
    """Two launchers of two ranks each, started by hand, against one of four ranks: equal bits."""
    (tmp_path / "driver.py").write_text(STAGES)
    (tmp_path / "hostfile").write_text("127.0.0.1 slots=2\n127.0.0.2 slots=2\n")
    by_hand = [["--hostfile", str(tmp_path / "hostfile"), "--no_ssh", "--node_rank", str(rank),
                "--master_addr", "127.0.0.1"] for rank in range(2)]
    made = []
    for name, launches in (("one", [["--num_gpus", "4"]]), ("two", by_hand)):
        folder, port = tmp_path / name, str(free_port())
        shutil.copytree(Path(reviews_store).parent, folder / "store")
        store = str(folder / "store" / Path(reviews_store).name)
        commands = folder / "commands.json"
        commands.write_text(json.dumps(stage_commands(folder, store, tiny_encoder,
                                                      labelled_files)))
        processes = [subprocess.Popen(
            [sys.executable, "-m", "deepspeed.launcher.runner", *flags, "--master_port", port,
             str(tmp_path / "driver.py"), str(commands)],
            cwd=ROOT, env=launch_environment(), text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT) for flags in launches]
        said = [process.communicate(timeout=400)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * len(launches), said
        assert json.loads((folder / "scorer" / "env.json").read_text())["world_size"] == 4
        made.append({
            **{path: load_file(folder / path / "model.safetensors")
               for path in ("general/hf", "classifier/seed_13/hf", "scorer/hf")},
            "marks": (folder / "annotated" / "text.importance.npy").read_bytes(),
            "scores": Path(f"{store}.task.scores.npy").read_bytes(),
            "tested": [json.loads(line)["probabilities"] for line in
                       (folder / "classifier/seed_13/predictions.jsonl").open()],
        })
    one, two = made
    for name, value in one.items():
        if name.endswith("hf"):
            assert all(torch.equal(weight, two[name][key]) for key, weight in value.items()), name
        else:
            assert value == two[name], name
