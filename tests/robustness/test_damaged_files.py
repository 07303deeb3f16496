"""Damage to the JSON files that a command starts from: one sentence, never a traceback or a hang.

`make test` takes a sample of the damages; `make test-faults` takes many. What a command accepts
after all must carry it to its end.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from preprocess.errors import ConfigError, DataError, NonFiniteError
from tests.support.runs import made_up_stage, pretrained
from train import report
from train.config import PipelineConfig, parse
from train.recipes.run import Journal, run_steps
from train.recipes.steps import Step
from train.run_dir import hf_folder

SEED = int(os.environ.get("SELMASK_FAULT_SEED", "0"))
SECONDS = 120  # for one command
# What `run_command` reports in one sentence.
REPORTED = (ConfigError, DataError, NonFiniteError, OSError)
VALUES = (None, True, -1, 0, 7, 1.5, -1e308, 10**9, 10**30, "big", "", "x", "\x1b]0;t\x07",
          "../../x", "\ud800", [], {}, [1], [[]], [None], {"a": 1}, {"": None})
MANY = [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.faults])]


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in a block that takes longer."""
    def ring(number: int, frame: Any) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a JSON value."""
    inside = list(value.items()) if isinstance(value, dict) else list(
        enumerate(value)) if isinstance(value, list) else []
    return [place for key, entry in inside for place in [(value, key), *places(entry)]]


def damage(content: bytes, draw: random.Random, by_line: bool) -> bytes:
    """Flip a bit, cut, repeat; or give a JSON value another type, remove it, or rename it."""
    kind = draw.randrange(8)
    if kind == 0 or not content:
        return content[: draw.randrange(len(content) + 1)]
    if kind == 1:
        at = draw.randrange(len(content))
        return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
    if kind == 2:
        first, last = sorted(draw.randrange(len(content) + 1) for _ in range(2))
        return content[:first] + content[first:last] * draw.choice((0, 2)) + content[last:]
    lines = content.splitlines() if by_line else [content]
    at = draw.randrange(len(lines))
    try:
        value = [json.loads(lines[at])]
    except ValueError:  # not a JSON file: weights
        return content[:9] + draw.randbytes(8) + content[17:]
    container, key = draw.choice(places(value))
    if kind == 3 and container is not value:
        del container[key]
    elif kind == 4 and isinstance(container, dict):
        container[f"{key}x"] = container.pop(key)
    else:
        container[key] = draw.choice(VALUES)
    lines[at] = json.dumps(value[0]).encode()
    return b"\n".join(lines)


def campaign(
    folder: Path, names: list[str], act: Callable[[Path], None], count: int
) -> dict[str, int]:
    """Damage a file of a copy of `folder`, and act on the copy; `count` times for each file.

    Returns:
        How often the action reported the damage, and how often it got through.
    """
    whole, failed = folder.parent / "whole", []
    shutil.copytree(folder, whole)
    act(folder)
    ended = {"reported": 0, "accepted": 0}
    for name in names:
        for number in range(count):
            draw = random.Random(f"{SEED} {name} {number}")
            shutil.rmtree(folder)
            shutil.copytree(whole, folder)
            content = (whole / name).read_bytes()
            damaged = damage(content, draw, name.endswith(".jsonl"))
            (folder / name).write_bytes(damaged)
            try:
                with within(SECONDS):
                    act(folder)
                ended["accepted"] += 1
            except REPORTED as error:
                said = str(error)
                assert said.strip(), f"{name} {number}: an empty sentence"
                ended["reported"] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                failed.append(f"{name}, damage {number}: {type(error).__name__}: {error}")
    assert not failed, "\n".join(failed)
    return ended


@pytest.mark.slow
@pytest.mark.parametrize("many", MANY)
def test_model_folders(tmp_path, many, tiny_encoder, reviews_store):
    folder = tmp_path / "model"
    shutil.copytree(tiny_encoder, folder)
    names = [name for name in ("config.json", "tokenizer.json", "tokenizer_config.json",
                               "model.safetensors") if (folder / name).is_file()]
    index = {"metadata": {}, "weight_map": {"a": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def act(copy: Path) -> None:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        pretrained(reviews_store, str(copy), tmp_path / "run", max_steps=1, eval_max_rows=4)

    ended = campaign(folder, [*names, "model.safetensors.index.json"], act, 60 if many else 3)
    assert ended["reported"] and ended["accepted"]


@pytest.mark.parametrize("many", MANY)
def test_lineages(tmp_path, many, tiny_encoder):
    folder = tmp_path / "hf"
    shutil.copytree(tiny_encoder, folder)
    stages = [made_up_stage(masking="random", steps=5, masked_tokens=7, tokens=30, seconds=1.0),
              made_up_stage("finetune", steps=2, seconds=1.5)]
    files = hf_folder._describe(hf_folder.weight_files(str(folder)))
    (folder / "lineage.json").write_text(
        json.dumps({"version": hf_folder.VERSION, "files": files, "stages": stages}))

    def act(copy: Path) -> None:
        read = hf_folder.open_weights(str(copy)).stages
        trained = [stage for stage in read if stage["stage"] == "pretrain"]
        for key in ("masked_tokens", "steps", "seconds"):  # as a result row has them
            assert sum(stage["totals"][key] for stage in trained) >= 0
        hf_folder.model_card(read, "hf")
        from train.reports.results import read_summaries

        read_summaries(copy, [])
        json.dumps(read, allow_nan=False)

    ended = campaign(folder, ["lineage.json"], act, 2000 if many else 150)
    assert ended["reported"] > 2 * ended["accepted"]


@pytest.mark.parametrize("many", MANY)
def test_steps_of_a_pipeline(tmp_path, many):
    folder = tmp_path / "R"
    folder.mkdir()

    def step(name: str, *needs: str) -> Step:
        made = str(folder / f"{name}.txt")
        return Step(name, ["--name", name], [made], [made], list(needs),
                    compute=lambda: Path(made).write_text(name) and None)

    steps = [step("a"), step("b", "a"), step("c", "a", "b")]

    def act(copy: Path) -> None:
        options = parse(PipelineConfig, ["--recipe", "x", "--output_dir", str(copy)])
        run_steps(steps, Journal(copy), options)
        assert all((copy / f"{name}.txt").read_text() == name for name in "abc")

    act(folder)
    campaign(folder, ["steps.json"], act, 1000 if many else 60)


@pytest.mark.parametrize("many", MANY)
def test_results_of_a_report(tmp_path, many, monkeypatch):
    folder = tmp_path / "R"
    for name in ("one", "two"):
        for seed in (13, 43):
            place = folder / name / f"seed_{seed}"
            place.mkdir(parents=True)
            answers = [{"item": f"i{i}", "label": i % 2, "prediction": (i * seed) % 2,
                        "probabilities": [0.5, 0.5]} for i in range(8)]
            (place / "predictions.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
        rows = [{"seed": seed, "task": "t", "test_accuracy": 0.5, "test_macro_f1": 0.5,
                 "labels": ["a", "b"], "pretraining": {"steps": 3, "seconds": 1.0}}
                for seed in (13, 43)]
        (folder / name / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "arms.json").write_text(json.dumps([
        {"name": name, "runs": [name], "floor": False, "masking": ["a"]} for name in ("one", "two")
    ]))
    (folder / "steps.json").write_text(json.dumps(
        {"a": {"command": [], "inputs": {}, "finished": "x", "seconds": 3.5}}))
    monkeypatch.setattr(report, "draw", lambda *_: ({}, []))

    def act(copy: Path) -> None:
        report.main([str(copy), "--output_dir", str(tmp_path / "report")])

    campaign(folder, ["one/results.jsonl", "two/seed_43/predictions.jsonl", "arms.json",
                      "steps.json"], act, 300 if many else 25)
