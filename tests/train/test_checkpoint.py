"""Only complete checkpoints load, pruning keeps one, and no code in their files runs."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from preprocess.errors import ConfigError, DataError
from preprocess.files import WriterLock, file_sha256, seal
from tests.support.runs import arguments, pretrained, weights, write_ds_config
from tests.support.states import Trap
from train import engine as ds
from train import pretrain
from train.config import PretrainConfig, TrainingConfig, parse
from train.engine import group
from train.engine import states as states_room
from train.run_dir import checkpoint, folder
from train.run_dir.checkpoint import MANIFEST, check_checkpoint, find_checkpoint


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict[str, Any]:
    """A run with a checkpoint of several files every second step."""
    folder = tmp_path_factory.mktemp("zero")
    return {"save_steps": 2, "eval_fraction": 0, "deepspeed_config": write_ds_config(folder, 1)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, reviews_store, still_encoder, options) -> Path:
    return pretrained(
        reviews_store, still_encoder, tmp_path_factory.mktemp("finished") / "run", **options
    )


@pytest.fixture
def broken(finished, tmp_path) -> Path:
    """A run with checkpoints of steps 2 and 4 and without its export."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "hf")
    return tmp_path / "run"


def names_of(path: Path) -> list[str]:
    """Every file of a checkpoint, the manifest too."""
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


def newest(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "step_4"


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest and seal it again, as an attacker would."""
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(seal(manifest)))


def accept(path: Path) -> None:
    """Make the manifest agree with the files that are there."""
    files = {
        name: {"bytes": (path / name).stat().st_size, "sha256": file_sha256(path / name)}
        for name in names_of(path) if name != MANIFEST
    }
    rewrite(path, lambda manifest: manifest.update(files=files))


# ----------------------------------------------------------------------------- what is whole


def test_what_a_checkpoint_holds(finished):
    names = names_of(newest(finished))
    assert {"manifest.json", "generators_rank0.pt", "state/mp_rank_00_model_states.pt",
            "state/zero_pp_rank_0_mp_rank_00_optim_states.pt"} <= set(names)
    manifest = json.loads((newest(finished) / MANIFEST).read_text())
    assert sorted(manifest["files"]) == sorted(set(names) - {MANIFEST})
    assert check_checkpoint(newest(finished)) is None
    assert find_checkpoint(finished, "must") == newest(finished)
    assert (finished / "latest").read_text() == "step_4\n"
    assert find_checkpoint(finished, "never") is None


def flip(file: Path, generator: random.Random) -> None:
    """Flip one bit."""
    content = bytearray(file.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path, random.Random], Any]] = {
    "missing": lambda file, generator: file.unlink(),
    "empty": lambda file, generator: file.write_bytes(b""),
    "truncated": lambda file, generator: os.truncate(
        file, generator.randrange(file.stat().st_size)
    ),
    "longer": lambda file, generator: file.write_bytes(file.read_bytes() + b"\0"),
    "flipped": flip,
    "folder": lambda file, generator: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_an_older_checkpoint_taken(damage, broken, capsys):
    generator = random.Random(damage)
    path = newest(broken)
    shutil.copytree(path, broken / "copy")
    for name in names_of(path):
        for _ in range(12 if damage == "flipped" else 1):
            DAMAGES[damage](path / name, generator)
            assert find_checkpoint(broken, "must") == path.with_name("step_2"), name
            said = capsys.readouterr().out
            assert said.startswith("warning") and said.count("\n") == 1 and name in said
            shutil.rmtree(path)
            shutil.copytree(broken / "copy", path)
    assert find_checkpoint(broken, "must") == path


def test_no_byte_of_a_manifest_may_change(broken):
    generator = random.Random(0)
    path = newest(broken)
    content = (path / MANIFEST).read_bytes()
    for _ in range(400):
        changed = bytearray(content)
        for _ in range(generator.choice((1, 1, 1, 4))):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        (path / MANIFEST).write_bytes(changed)
        problem = check_checkpoint(path)
        try:
            same = json.loads(changed) == json.loads(content)
        except ValueError:
            same = False
        assert (problem is None) == same, changed


MANIFESTS: dict[str, tuple[Any, str]] = {
    "not JSON": (b"{", "damaged"),
    "binary": (b"\xff\xfe\x00", "damaged"),
    "nested": (b"[" * 100_000, "damaged"),
    "a list": (b"[]", "damaged"),
    "null": (b"null", "damaged"),
    "no version": (lambda m: m.pop("version"), "'version'"),
    "older version": (lambda m: m.update(version=1), "version 1, not 2"),
    "other step": (lambda m: m.update(step=2), "of step 2"),
    "no ranks": (lambda m: m.update(world_size=0), "of 0 ranks"),
    "ranks in words": (lambda m: m.update(world_size="two"), "damaged"),
    "many ranks": (lambda m: m.update(world_size=10**15), "without the files of rank 1"),
    "no files": (lambda m: m.update(files={}), "without the files of rank 0"),
    "files as a list": (lambda m: m.update(files=[]), "damaged"),
    "no identity": (lambda m: m.pop("identity"), "'identity'"),
    "identity in words": (lambda m: m.update(identity="x"), "damaged"),
    "entry without size": (lambda m: m["files"]["generators_rank0.pt"].pop("bytes"), "'bytes'"),
    "entry as text": (lambda m: m["files"].update({"generators_rank0.pt": "x"}), "damaged"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_damaged_manifests(name, broken, capsys):
    content, fragment = MANIFESTS[name]
    if isinstance(content, bytes):
        (newest(broken) / MANIFEST).write_bytes(content)
    else:
        rewrite(newest(broken), content)
    assert find_checkpoint(broken, "auto") == newest(broken).with_name("step_2")
    said = capsys.readouterr().out
    assert fragment in said and "step_4" in said


OUTSIDE = ["../secret.pt", "../../run/checkpoints/step_2/generators_rank0.pt", "/etc/passwd",
           "state/../../step_2/generators_rank0.pt", "..", "a\0b", "\0"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_cannot_leave_its_folder(name, broken, capsys):
    (broken / "checkpoints" / "secret.pt").write_bytes(b"x")
    entry = {"bytes": 1, "sha256": file_sha256(broken / "checkpoints" / "secret.pt")}
    rewrite(newest(broken), lambda manifest: manifest["files"].update({name: entry}))
    assert "outside the checkpoint" in str(check_checkpoint(newest(broken)))
    assert find_checkpoint(broken, "auto") == newest(broken).with_name("step_2")
    assert MANIFEST in capsys.readouterr().out


@pytest.mark.parametrize("what", ["generators_rank0.pt", "state"])
def test_links_are_refused(what, broken, tmp_path):
    path = newest(broken)
    shutil.move(path / what, tmp_path / "elsewhere")
    (path / what).symlink_to(tmp_path / "elsewhere")
    assert "is a link" in str(check_checkpoint(path))


def test_a_whole_checkpoint_may_lie_behind_a_link(broken, tmp_path):
    shutil.move(broken / "checkpoints", tmp_path / "big disk")
    (broken / "checkpoints").symlink_to(tmp_path / "big disk")
    assert find_checkpoint(broken, "must") == newest(broken)


def test_a_file_beside_the_others_is_refused(broken):
    path = newest(broken)
    (path / "notes.txt").write_text("ours to keep")
    assert check_checkpoint(path) is None
    planted = path / "state" / "mp_rank_01_model_states.pt"
    shutil.copy(path / "state" / "mp_rank_00_model_states.pt", planted)
    assert planted.name in str(check_checkpoint(path))


def test_none_is_whole(broken, capsys):
    for step in (2, 4):
        os.truncate(broken / "checkpoints" / f"step_{step}" / "generators_rank0.pt", 5)
    assert find_checkpoint(broken, "auto") is None
    assert capsys.readouterr().out.count("warning") == 2
    with pytest.raises(DataError, match="no complete checkpoint.*--resume auto") as refused:
        find_checkpoint(broken, "must")
    assert refused.value.exit_code == 3


def test_what_cannot_be_read_is_passed_over(broken, capsys, monkeypatch):
    plain = checkpoint.file_sha256

    def failing(file: Path) -> str:
        if "step_4" in str(file):
            raise OSError(5, "Input/output error", str(file))
        return plain(file)

    monkeypatch.setattr(checkpoint, "file_sha256", failing)
    assert find_checkpoint(broken, "auto") == newest(broken).with_name("step_2")
    assert "Input/output error" in capsys.readouterr().out


# ------------------------------------------------------------------------- saving and pruning


def whole_steps(run_dir: Path) -> list[int]:
    paths = (run_dir / "checkpoints").glob("step_*")
    return sorted(int(path.name[5:]) for path in paths
                  if path.name[5:].isdigit() and check_checkpoint(path) is None)


@pytest.mark.parametrize("limit", [1, 2])
def test_the_limit_never_takes_the_last_whole_checkpoint(
    limit, broken, reviews_store, still_encoder, options, monkeypatch, finished
):
    """Newer checkpoints are damaged: they neither count nor stay."""
    for step in (6, 8):
        shutil.copytree(newest(broken), newest(broken).with_name(f"step_{step}"))
    flip(newest(broken) / "generators_rank0.pt", random.Random(0))
    whole = []
    for name in ("rename", "replace"):
        plain = getattr(os, name)

        def looking(*words: Any, plain: Any = plain) -> None:
            plain(*words)
            whole.append(whole_steps(broken))

        monkeypatch.setattr(os, name, looking)
    run_dir = pretrained(reviews_store, still_encoder, broken, **options, save_total_limit=limit)
    assert all(whole) and len(whole) > 5
    assert whole_steps(run_dir) == [2, 4][-limit:]
    assert sorted(os.listdir(run_dir / "checkpoints")) == [f"step_{s}" for s in (2, 4)[-limit:]]
    first, second = weights(finished), weights(run_dir)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_nothing_is_removed_for_a_checkpoint_that_is_not_there(
    broken, reviews_store, still_encoder, options, monkeypatch, capsys
):
    shutil.rmtree(newest(broken))
    plain = checkpoint._commit

    def damaging(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
        plain(temporary, final, manifest)
        os.truncate(final / "generators_rank0.pt", 7)

    monkeypatch.setattr(checkpoint, "_commit", damaging)
    pretrained(reviews_store, still_encoder, broken, **options, save_total_limit=1)
    assert "older checkpoints are kept" in capsys.readouterr().out
    assert whole_steps(broken) == [2]


@pytest.mark.parametrize("name", ["rename", "replace", "fsync"])
def test_a_save_that_fails_leaves_what_was(
    name, broken, reviews_store, still_encoder, options, monkeypatch
):
    shutil.rmtree(newest(broken))
    (broken / "latest").write_text("step_2\n")
    before = {file: (broken / file).read_bytes() for file in names_of(broken / "checkpoints")
              for file in [f"checkpoints/{file}"]}

    failing, plain = Mock(side_effect=OSError(5, "Input/output error")), checkpoint.save_checkpoint

    def with_bad_disk(*words: Any, **names: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing)
            return plain(*words, **names)

    monkeypatch.setattr(checkpoint, "save_checkpoint", with_bad_disk)
    with pytest.raises(OSError, match="Input/output"):
        pretrained(reviews_store, still_encoder, broken, **options)
    assert (broken / "latest").read_text() == "step_2\n"
    assert {file: (broken / file).read_bytes() for file in before} == before
    assert sorted(os.listdir(broken / "checkpoints")) == ["step_2"]
    assert not list(broken.rglob("*.tmp*"))


def test_what_a_kill_left_is_removed_and_never_loaded(
    broken, reviews_store, still_encoder, options
):
    for name in ("step_6.tmp", "step_4.old.tmp", "step_2.universal.tmp"):
        shutil.copytree(newest(broken), broken / "checkpoints" / name)
    (broken / ".hf.abc123").mkdir()
    (broken / ".latest.tmp-99").write_text("step_9\n")
    assert find_checkpoint(broken, "must") == newest(broken)
    pretrained(reviews_store, still_encoder, broken, **options)
    assert sorted(os.listdir(broken / "checkpoints")) == ["step_2", "step_4"]
    assert not [name for name in os.listdir(broken) if name.startswith(".")]


def test_a_kill_before_the_options_were_written_is_no_other_run(tmp_path):
    (tmp_path / ".config.resolved.yaml.tmp-99").write_text("output_")
    config = TrainingConfig(output_dir=str(tmp_path), resume="never")
    assert folder.check_run_dir(config) == tmp_path
    (tmp_path / "thesis.txt").write_text("not ours")
    with pytest.raises(ConfigError, match="not a run of ours"):
        folder.check_run_dir(config)


# ------------------------------------------------------------------------------- several nodes


@pytest.fixture
def on_two_nodes(monkeypatch) -> Callable[..., list[Any]]:
    """Call a function on two ranks of two hosts (threads here); return or catch its results."""
    here, gate, shared = threading.local(), threading.Barrier(2, timeout=60), [None] * 2

    def gather(value: Any) -> list[Any]:
        gate.wait()
        shared[here.rank] = value
        gate.wait()
        return list(shared)

    for room in (ds, group):  # the face, and the file behind it
        monkeypatch.setattr(room, "start", lambda: torch.device("cpu"))
        monkeypatch.setattr(room, "barrier", gate.wait)
        monkeypatch.setattr(room, "gather_objects", gather)
        monkeypatch.setattr(room, "ranks", lambda: ds.Ranks(here.rank, 2, 0))
    monkeypatch.setattr(group.socket, "gethostname", lambda: f"node{here.rank + 1}")

    def call(function: Callable, *arguments: Any) -> list[Any]:
        def as_rank(rank: int) -> Any:
            here.rank = rank
            try:
                return function(arguments[rank])
            except ConfigError as error:
                return error

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(as_rank, range(2)))

    return call


def test_a_run_directory_that_not_all_nodes_see_is_refused(tmp_path, on_two_nodes, monkeypatch):
    def prepare(name: str) -> Path:
        return folder.prepare_run_dir(TrainingConfig(output_dir=str(tmp_path / name)), None)

    assert on_two_nodes(prepare, "shared", "shared") == [tmp_path / "shared"] * 2
    names = sorted(os.listdir(tmp_path / "shared"))
    assert names == ["config.resolved.yaml", "env.json"]
    monkeypatch.setattr(group, "SHARED_DISK_SECONDS", 0.0)
    found = on_two_nodes(prepare, "first", "second")  # as where each node has a disk of its own
    for error, name in zip(found, ("first", "second"), strict=True):
        assert f"{name}: node2 cannot see" in str(error) and "node1" not in str(error)
    assert not (tmp_path / "second").exists()
    assert sorted(os.listdir(tmp_path / "first")) == names


def test_a_run_directory_has_one_writer(tmp_path, on_two_nodes, monkeypatch):
    """Every rank hears of it; a folder that was refused is left as it was."""
    monkeypatch.setattr(folder, "_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(ds, "is_main", lambda: ds.ranks().rank == 0)
    monkeypatch.setattr(group.socket, "gethostname", lambda: "node")  # of this thread too

    def hold(name: str) -> list[str]:
        with folder.sole_writer(tmp_path / name):
            ds.barrier()
            found = os.listdir(tmp_path / name)
            ds.barrier()
            return found

    assert on_two_nodes(hold, "run", "run") == [[".lock"]] * 2
    assert os.listdir(tmp_path / "run") == []
    config = TrainingConfig(output_dir=str(tmp_path / "run"))
    with WriterLock(f"{tmp_path}/run/"):
        for error in on_two_nodes(hold, "run", "run"):
            assert f"{os.getpid()}@" in str(error) and "another --output_dir" in str(error)
        with pytest.raises(ConfigError, match="another process writes here"):
            folder.check_run_dir(config)
        folder.check_run_dir(replace(config, dry_run=True))
    assert folder.check_run_dir(config) == tmp_path / "run"


def test_a_slow_rank_looks_before_the_folder_is_locked(tmp_path, on_two_nodes, monkeypatch):
    """Joining the group is no meeting where all have joined it before, as in a second command."""
    monkeypatch.setattr(folder, "_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(ds, "is_main", lambda: ds.ranks().rank == 0)

    def command(name: str) -> list[str]:
        if not ds.is_main():
            time.sleep(0.3)
        run_dir = folder.check_run_dir(TrainingConfig(output_dir=str(tmp_path / name)))
        with folder.sole_writer(run_dir):
            ds.barrier()
            found = os.listdir(run_dir)
            ds.barrier()
            return found

    assert on_two_nodes(command, "run", "run") == [[".lock"]] * 2


def test_a_network_disk_may_show_a_file_late(tmp_path, on_two_nodes, monkeypatch):
    plain, looked = Path.exists, []

    def late(path: Path) -> bool:
        looked.append(path)
        return len(looked) > 4 and plain(path)

    monkeypatch.setattr(Path, "exists", late)
    monkeypatch.setattr(group.time, "sleep", lambda seconds: None)
    assert on_two_nodes(ds.nodes_without, tmp_path, tmp_path) == [[], []]
    assert len(looked) > 4 and os.listdir(tmp_path) == []


def test_tasks_of_srun_without_ranks_do_not_train_alone(tmp_path, monkeypatch):
    config = TrainingConfig(output_dir=str(tmp_path / "run"))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(ConfigError, match="8 tasks that have no RANK.*torchrun"):
        folder.check_run_dir(config)
    monkeypatch.setenv("RANK", "0")  # a launcher's child
    assert folder.check_run_dir(config) == tmp_path / "run"


# ------------------------------------------------------------------- what belongs to this run


def test_another_run_is_refused(broken, reviews_store, still_encoder, options):
    with pytest.raises(ConfigError, match="--resume is never"):
        pretrained(reviews_store, still_encoder, broken, **options, resume="never")
    with pytest.raises(ConfigError, match="made with --seed 42, and this run has 7"):
        pretrained(reviews_store, still_encoder, broken, **options, seed=7)
    shutil.rmtree(broken / "checkpoints")
    with pytest.raises(DataError, match="--resume is must"):
        pretrained(reviews_store, still_encoder, broken, **options, resume="must")


@pytest.mark.slow
def test_another_set_up_is_refused(broken, tmp_path, reviews_store, still_encoder, options):
    for stage in (0, 2):
        options = {**options, "deepspeed_config": write_ds_config(tmp_path, stage)}
        with pytest.raises(ConfigError, match=f"made with ZeRO stage 1, and this run has {stage}"):
            pretrained(reviews_store, still_encoder, broken, **options)
    path = Path(write_ds_config(tmp_path, 1))
    path.write_text(json.dumps({**json.loads(path.read_text()), "bf16": {"enabled": True}}))
    with pytest.raises(ConfigError, match="made with --precision fp32, and this run has bf16"):
        pretrained(reviews_store, still_encoder, broken, **{
            **options, "deepspeed_config": path, "precision": "config"})


def test_another_number_of_ranks_is_refused_without_the_flag(
    broken, reviews_store, still_encoder, options
):
    path = newest(broken)
    shutil.copy(path / "generators_rank0.pt", path / "generators_rank1.pt")
    rewrite(path, lambda manifest: manifest.update(world_size=2))
    accept(path)
    with pytest.raises(ConfigError, match="by 2 ranks, and there are 1; .*--allow_world_size_ch"):
        pretrained(reviews_store, still_encoder, broken, **options)


# -------------------------------------------------------------------- nothing in a file runs


def plant(file: Path, canary: Path) -> None:
    """Add an object to a file that DeepSpeed wrote."""
    content = torch.load(file, weights_only=False)
    content = content if isinstance(content, dict) else {"content": content}
    torch.save({**content, "planted": Trap(canary)}, file)


PARTS = ["generators_rank0.pt", "state/mp_rank_00_model_states.pt",
         "state/zero_pp_rank_0_mp_rank_00_optim_states.pt"]


@pytest.fixture
def engine(broken, reviews_store, still_encoder, options):
    """A fresh engine for the run."""
    words = arguments(reviews_store, still_encoder, broken, **options)
    inputs = pretrain.read_inputs(parse(PretrainConfig, words))
    ds.start()
    engine, _ = pretrain.start_engine(inputs)
    yield engine
    engine.destroy()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("world_size", [1, 2], ids=["as it is", "converted"])
def test_a_planted_object_never_runs(part, world_size, broken, engine, tmp_path):
    """Neither on a plain load nor in a conversion."""
    path, canary = newest(broken), tmp_path / "canary"
    plant(path / part, canary)
    accept(path)
    assert check_checkpoint(path) is None  # the digests agree
    with pytest.raises(DataError, match="which could run code and is never loaded") as refused:
        ds.load_state(engine, path, world_size)
    assert Path(part).name in str(refused.value)
    assert not canary.exists()
    torch.load(path / part, weights_only=False)
    assert canary.exists()  # it would have
    assert torch.load.__module__ == "torch.serialization"  # the guard is gone again


class Reached:
    """Pickled as the attribute of something."""

    def __init__(self, owner, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_a_stage_of_zero_is_read_however_python_has_written_it(tmp_path):
    """Python 3.11.0 to 3.11.3 write members of an enumeration as their attribute."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    engine = SimpleNamespace(module=torch.nn.Linear(1, 1))
    stage = ZeroStageEnum.optimizer_states
    for written, allowed in ((stage, True), (Reached(ZeroStageEnum, stage.name), True),
                             (Reached(ZeroStageEnum, "__init__"), False),
                             (Reached(torch.Tensor, "__init__"), False)):
        torch.save({"zero_stage": written}, tmp_path / "state.pt")
        with states_room._safe_torch_load(engine):
            if allowed:
                assert torch.load(tmp_path / "state.pt") == {"zero_stage": stage}
            else:
                with pytest.raises(DataError, match="never loaded"):
                    torch.load(tmp_path / "state.pt")


@pytest.mark.parametrize("file", ["mp_rank_00_model_states.pt", "zero/optimizer_state.pt",
                                  "zero/hf.bert.embeddings.LayerNorm.weight/exp_avg.pt"])
def test_an_object_planted_in_the_converted_files_never_runs(
    file, broken, engine, tmp_path, monkeypatch
):
    plain, canary = states_room._convert, tmp_path / "canary"

    def planting(source: Path, target: Path) -> None:
        plain(source, target)
        plant(target / file, canary)

    monkeypatch.setattr(states_room, "_convert", planting)
    with pytest.raises(DataError, match="never loaded"):
        ds.load_state(engine, newest(broken), 2)
    assert not canary.exists()


@pytest.mark.parametrize("where", ["module", "param_slice_mappings", "param_shapes"])
def test_names_of_parameters_cannot_leave_the_folder(where, broken, engine, tmp_path):
    """The converter makes paths of them."""
    path, name = newest(broken), "../../../../outside"
    file = path / PARTS[2 if where == "param_slice_mappings" else 1]
    content = torch.load(file, weights_only=False)
    groups = {"module": lambda: content["module"], "param_shapes": lambda:
              content["param_shapes"][0], "param_slice_mappings": lambda:
              content["optimizer_state_dict"]["param_slice_mappings"][0]}[where]()
    groups[name] = next(iter(groups.values()))
    torch.save(content, file)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(DataError, match="outside', which is no parameter of this model"):
        ds.load_state(engine, path, 2)
    assert not [made for made in set(tmp_path.rglob("*")) - before if "outside" in made.name]


def test_an_optimizer_that_cannot_be_converted_is_said(broken, engine, monkeypatch):
    monkeypatch.setattr(states_room, "CONVERTIBLE", ("Lion",))
    with pytest.raises(ConfigError, match="AdamW cannot be divided anew.*as many ranks"):
        ds.load_state(engine, newest(broken), 2)
