"""Layers compiled one by one: nothing is compiled twice, and nothing changes but the speed.

The backend is "aot_eager" where nothing else is said: the graphs of `torch.compile`, without the
compiler of their code.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from preprocess.errors import ConfigError
from preprocess.store import TokenStore
from tests.support.models import LENGTHS, VOCAB, packed_rows, tiny_config
from train import data, model
from train.model import compiled

FAMILIES = sorted(model.FAMILIES)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SIZES = NUM_MASKED, MOST_MASKED = 24, 8
GRAPHS = dict.fromkeys(FAMILIES, 2) | {"modernbert": 3}  # its first layer has no norm


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Start each test, and leave each, without compiled code."""
    model.forget_compiled()
    counters.clear()
    yield
    model.forget_compiled()


def build(family: str, dropout: float = 0.0, checkpointing: bool = False):
    """A model of four layers."""
    config = tiny_config(family)
    config.num_hidden_layers = 4
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, dropout)
    module = model.build_masked_lm(config, seed=0).train()
    if checkpointing:
        model.checkpoint_activations(module.hf)
    return module


def inputs(count: int, seed: int = 0, padded: int = NUM_MASKED, most: int = MOST_MASKED) -> dict:
    """A batch with `count` masks, as it is packed: fewer labels than positions."""
    generator = np.random.default_rng(seed)
    per_row = [set() for _ in LENGTHS]
    for slot in generator.permutation(64 * len(LENGTHS)).tolist():
        if len(per_row[slot // 64]) < most and sum(map(len, per_row)) < count:
            per_row[slot // 64].add(slot)
    positions = torch.tensor(sorted(slot for row in per_row for slot in row), dtype=torch.int64)
    labels = functional.pad((7 * positions + 11) % VOCAB, (0, 2), value=-1)
    ids, position_ids, pieces = packed_rows(LENGTHS, seed=seed)
    return {
        "input_ids": ids, "position_ids": position_ids, "document_ids": pieces,
        "masked_positions": functional.pad(positions, (0, padded - len(positions)), value=-1),
        "masked_labels": labels, "most_masked": most,
    }


def step(module, batch: dict):
    """Loss, hits and gradients of a batch."""
    module.zero_grad()
    loss, hits = module(**batch)
    loss.backward()
    return loss.detach(), hits, {name: p.grad.clone() for name, p in module.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_compiled_after_the_first_step(family, checkpointing):
    module = build(family, dropout=0.1, checkpointing=checkpointing)
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_layers(module, SIZES, backend=counter)
    for number in range(3):
        step(module, inputs(5 + number, number))
    assert counter.frame_count == GRAPHS[family]
    with torch.compiler.set_stance("fail_on_recompile"):
        for number in range(50):
            step(module, inputs(number % 23, number))
        # Batches beyond the sizes: more masks, and more in one row.
        step(module, inputs(30, padded=40))
        step(module, inputs(38, padded=40, most=16))
        module.eval()
        with model.uncompiled(), torch.no_grad():  # an evaluation, in other shapes
            module(*packed_rows([[9, 5]], slots=20), torch.tensor([3]), torch.tensor([7]))
        step(module.train(), inputs(3))
    assert counter.frame_count == GRAPHS[family] and not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("dropout, checkpointing", [(0.0, False), (0.0, True), (0.1, False)])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiling_changes_nothing(family, dropout, checkpointing):
    batches = [inputs(5), inputs(22, seed=1), inputs(0, seed=2), inputs(30, padded=40, most=16)]
    results = []
    for backend in (None, "aot_eager"):
        module = build(family, dropout, checkpointing).double()
        if backend:
            model.compile_layers(module, SIZES, backend=backend)
        torch.manual_seed(5)
        results.append([step(module, batch) for batch in batches])
    torch.testing.assert_close(*results, atol=1e-12, rtol=1e-10)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="this backend needs a C++ compiler")
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_generated_code_changes_nothing(family):
    batches, results = [inputs(5), inputs(22, seed=1), inputs(30, padded=40)], []
    for changed in (False, True):
        module = build(family)
        if changed:
            model.compile_layers(module, SIZES)
        results.append([step(module, batch) for batch in batches])
    torch.testing.assert_close(*results, atol=5e-5, rtol=5e-4)


def test_without_the_subset_every_layer_is_compiled_whole():
    results = []
    for backend in (None, CompileCounterWithBackend("aot_eager")):
        module = build("bert").double()
        module.last_layer_subset = False
        if backend:
            model.compile_layers(module, SIZES, backend=backend)
        results.append([step(module, inputs(5)), step(module, inputs(30, padded=40))])
    assert backend.frame_count == 2 and not module.last_layers
    torch.testing.assert_close(*results, atol=1e-12, rtol=1e-10)


@pytest.mark.slow
def test_models_and_sizes_share_the_graphs():
    """As in a benchmark: two models, ten maskings with sizes of their own."""
    counter = CompileCounterWithBackend("aot_eager")
    sizes = [(8 * number, 8) for number in range(3, 13)]
    modules = [build("bert"), build("bert")]
    for module in modules:
        model.compile_layers(module, *sizes, backend=counter)
    for padded, _ in sizes:
        step(modules[0], inputs(5, padded=padded))
    assert counter.frame_count == 1 + len(sizes)
    step(modules[1], inputs(5))
    assert counter.frame_count <= 2 + len(sizes)


def test_padding_changes_nothing():
    """What the last layer computes beyond the labels reaches neither loss nor gradients."""
    module = build("bert").double()
    batch = inputs(11)
    positions = batch["masked_positions"]
    wide = {**batch, "masked_positions": functional.pad(positions, (0, 9), value=-1),
            "most_masked": 16}
    plain = {**batch, "masked_positions": positions[:11],
             "masked_labels": batch["masked_labels"][:11], "most_masked": None}
    for other in (wide, plain):
        torch.testing.assert_close(step(module, other), step(module, batch), atol=1e-12, rtol=1e-10)
    guesses = [module(**one, predict=True)[:11] for one in (batch, wide, plain)]
    assert torch.equal(guesses[0], guesses[1]) and torch.equal(guesses[0], guesses[2])


class NoWaiting(TorchDispatchMode):
    """Refuse what would make the host wait for a GPU: reading numbers, shapes that depend on them.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select",
                                                 "unique", "item", "is_nonzero")), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_micro_batch_does_not_wait_for_the_device(family, reviews_store):
    """From the transfer to the rows of the head, and back: the head is tested in its own room."""
    store = TokenStore.open(reviews_store)
    packed = data.PackedData(
        store, data.row_tables(store, 32, 0.2)[0], data.drawn_masking(store, "random", 0.15),
        seed=0, micro_batch_size=8,
    )
    packed.pack_for(CPU, packed.measure_sizes(1))
    (batch,) = packed.step(0).micro_batches
    config = tiny_config(family)
    config.vocab_size = store.vocab_size
    module = model.build_masked_lm(config, seed=0).train()
    with NoWaiting():
        hidden, positions = module.encode_masked(**batch.inputs(CPU))
        hidden.sum().backward()
    assert positions is None and len(hidden) >= batch.num_masked
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        module.encode_masked(**{**batch.inputs(CPU), "most_masked": None})


def test_a_run_of_packed_batches_is_compiled_once(reviews_store):
    """From the store to the loss: fixed sizes, packed batches, compiled layers."""
    store = TokenStore.open(reviews_store)
    table, held = data.row_tables(store, 32, 0.2)
    packed = data.PackedData(store, table, data.drawn_masking(store, "random", 0.15), seed=0,
                             micro_batch_size=8)
    counter = CompileCounterWithBackend("aot_eager")
    losses = []
    for fixed in (False, True):
        module = build("bert")
        if fixed:
            sizes = packed.measure_sizes(50)
            packed.pack_for(CPU, sizes)
            model.compile_layers(module, (sizes.masked, sizes.per_row), backend=counter)
        losses.append([
            step(module, batch.inputs(CPU))[0].item()
            for one in packed.steps(0, 50) for batch in one.micro_batches
        ])
    assert counter.frame_count == 2 and not counters["graph_break"]
    np.testing.assert_allclose(*losses, rtol=1e-5)


# ------------------------------------------------------------------------------- the decision


@pytest.fixture
def complete(monkeypatch):
    """A machine that lacks nothing."""
    monkeypatch.setattr(compiled, "missing_for_compiling", lambda device: None)


@pytest.mark.parametrize("choice, device, stage, slots, taken, fragment", [
    ("no", GPU, 1, 10**12, False, "--torch_compile no"),
    ("yes", CPU, 1, 1, True, "--torch_compile yes"),
    ("auto", GPU, 1, 60_000_000, True, "60,000,000 slots a rank pay"),
    ("auto", GPU, 1, 59_999_999, False, "59,999,999 slots a rank are fewer than the 60,000,000"),
    ("auto", GPU, 3, 10**12, False, "ZeRO-3 fetches"),
    ("auto", CPU, 1, 10**12, False, "CPU"),
])
def test_the_choice_is_made_by_the_whole_run(
    choice, device, stage, slots, taken, fragment, complete
):
    decided, line = model.choose_compiling(choice, device, stage, slots)
    assert decided is taken and fragment in line and "\n" not in line


def test_compiling_that_cannot_be_is_refused(complete, monkeypatch):
    with pytest.raises(ConfigError, match="yes: ZeRO-3 .* or ZeRO stage 1 or 2"):
        model.choose_compiling("yes", GPU, 3, 10**9)
    monkeypatch.setattr(compiled, "missing_for_compiling", lambda device: "a compiler (gcc)")
    with pytest.raises(ConfigError, match=r"lacks a compiler \(gcc\); give --torch_compile no"):
        model.choose_compiling("yes", GPU, 1, 10**9)
    assert model.choose_compiling("auto", GPU, 1, 10**9)[0] is False


def test_what_a_machine_lacks(tmp_path, monkeypatch):
    found = {"gcc", "g++", "mycc"}
    monkeypatch.setattr(compiled.shutil, "which", lambda name: name if name in found else None)
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: object())
    include = tmp_path / "include"
    monkeypatch.setattr(compiled.sysconfig, "get_paths", lambda: {"include": str(include)})
    assert "Python.h" in model.missing_for_compiling(GPU)
    include.mkdir()
    (include / "Python.h").touch()
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    assert model.missing_for_compiling(GPU) is None is model.missing_for_compiling(CPU)
    found.remove("gcc")
    assert model.missing_for_compiling(GPU) == "a compiler (gcc or clang)"
    monkeypatch.setenv("CC", "mycc")
    assert model.missing_for_compiling(GPU) is None
    found.remove("g++")
    assert model.missing_for_compiling(CPU) == "a compiler (g++)"
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    assert model.missing_for_compiling(GPU) == "the package triton"
