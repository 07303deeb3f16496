"""Throughput of the pre-training loop for each masking strategy.

    deepspeed train/benchmark.py --deepspeed_config ds_configs/zero1_fp16.json --tokens P2 \
        --model_config bert-base --strategies random whole_word --mask_indices mr-sel mr-ctl

Every strategy trains the same model on the same rows of the same store, through the loader and the
DeepSpeed step of `pretrain.py`. They take turns over several rounds, each round in another order,
so that a machine whose speed drifts favours none. The row `bare` takes turns too: forward, backward
and optimizer of one prepared batch in plain PyTorch, without loader, DeepSpeed, clipping or
communication; `loop / bare` is the share of its speed that the loop keeps. `random` is always
measured: the others are compared with it, and the batch of `bare` is its first.

Not counted: `--warmup_steps` at the start of each strategy, and one step at the start of each turn,
whose batch the loader has made during the turn of another.

With `--whole_step`: what the MLM head and the last-layer subset are worth. Forward and backward of
one batch, without optimizer, loader and DeepSpeed, in four ways: `transformers` (logits of every
slot), `gather` (the head on masked rows, in plain PyTorch), `head` (ours) and `head + subset`. They
compute the same loss, `transformers` up to attention across documents: it has no packed attention.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preprocess import masks
from preprocess.errors import ConfigError, run_command
from preprocess.store import TokenStore, atomic_write_json
from train import checkpoint, data, metrics, mlm, model
from train import engine as ds
from train.config import BenchmarkConfig, as_dict, parse
from train.metrics import say

BASELINE = "random"
BARE = "bare"
TRANSFORMERS = "transformers"
WHOLE_STEP = (TRANSFORMERS, "gather", "head", "head + subset")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Inputs:
    """Everything read and checked before a process group starts; the baseline comes first."""

    config: BenchmarkConfig
    store: TokenStore
    rows: data.RowTable
    maskings: dict[str, data.Masking]
    resolved: ds.Resolved


@dataclass
class Measured:
    """Counted steps of one row of the table; counts are of the global batch.

    Attributes:
        seconds, waited: of each step, and of that for the loader.
        tokens, masked, text_tokens: real tokens; masked ones; tokens without special ones.
        peak_gib: largest memory of one rank.
    """

    seconds: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    masked: list[int] = field(default_factory=list)
    text_tokens: list[int] = field(default_factory=list)
    peak_gib: float = 0.0

    def add(self, table: data.RowTable, batch: data.StepBatch, seconds: float,
            waited: float) -> None:
        """Count one step."""
        pieces = int((table.row_offsets[batch.rows + 1] - table.row_offsets[batch.rows]).sum())
        self.seconds.append(seconds)
        self.waited.append(waited)
        self.tokens.append(batch.step_tokens)
        self.masked.append(batch.step_masked_tokens)
        self.text_tokens.append(batch.step_tokens - 2 * pieces)


def read_inputs(config: BenchmarkConfig) -> Inputs:
    """Open and check the store, the masks, the model's configuration and the DeepSpeed JSON."""
    for name in config.strategies:
        if name not in masks.DRAWN:
            raise ConfigError(
                f"--strategies {name}: must be drawn on the fly, one of {', '.join(masks.DRAWN)}; "
                "give a prebuilt index with --mask_indices"
            )
    drawn = [BASELINE, *(name for name in config.strategies if name != BASELINE)]
    names = [*drawn, *config.mask_indices]
    if config.whole_step and ds.ranks().world_size > 1:
        raise ConfigError(f"--whole_step on {ds.ranks().world_size} ranks: it is measured on one; "
                          "start one process")
    twice = {name for name in names if names.count(name) > 1 or name == BARE}
    if twice:
        raise ConfigError(f"--mask_indices {' '.join(sorted(twice))}: a name is used twice or "
                          f"taken ({BASELINE}, {BARE}); give each row another name")
    store = TokenStore.open(config.tokens)
    maskings = {name: data.drawn_masking(store, name, config.mlm_probability) for name in drawn}
    maskings |= {name: data.prebuilt_masking(store, name) for name in config.mask_indices}
    hf_config = model_config(config, store)
    model.check_row_length(hf_config, config.max_seq_length)
    if config.model_name_or_path:
        mlm.check_vocabulary(store, hf_config, config)
    rows, _ = data.row_tables(store, config.max_seq_length, eval_fraction=0.0)
    steps = config.warmup_steps + config.rounds * (1 + config.timed_steps)
    resolved = ds.resolve_ds_config(
        ds.read_ds_config(config.deepspeed_config), config,
        total_steps=steps * len(maskings), world_size=ds.ranks().world_size,
    )
    return Inputs(config, store, rows, maskings, resolved)


def model_config(config: BenchmarkConfig, store: TokenStore) -> Any:
    """The configuration of the model to train."""
    if config.model_config:
        return model.named_config(config.model_config, store.vocab_size, store.special_ids["pad"])
    return model.load_config(config.model_name_or_path, config.trust_remote_code)


def plan(inputs: Inputs) -> list[str]:
    """What will be measured, in words and numbers."""
    config, resolved = inputs.config, inputs.resolved
    names = WHOLE_STEP if config.whole_step else [BARE, *inputs.maskings]
    return [
        f"tokens {inputs.store.prefix}: {inputs.rows.num_tokens:,} tokens in "
        f"{inputs.rows.num_rows:,} rows of {config.max_seq_length}, "
        f"{100 * inputs.rows.efficiency:.1f} % filled",
        f"batch: {resolved.micro_batch_size} rows x {resolved.accumulation_steps} micro batches x "
        f"{ds.ranks().world_size} ranks = {resolved.train_batch_size} rows a step; precision "
        f"{resolved.precision}, ZeRO "
        f"{resolved.config.get('zero_optimization', {}).get('stage', 0)}",
        f"{', '.join(names)}: {config.rounds} rounds of {config.timed_steps} counted steps each; "
        f"dropped: {config.warmup_steps} warm-up steps"
        + ("" if config.whole_step else ", and the first step of each turn"),
    ]


def make_bare_step(
    inputs: Inputs, module: model.PackedMaskedLM, batch: data.StepBatch, device: torch.device
) -> Callable[[], None]:
    """The same arithmetic on one prepared batch: forward, backward, AdamW, nothing else.

    In 16 bit the optimizer works on fp32 masters, as DeepSpeed's does. The loss is read once a
    step, as in the loop, so that a GPU's clock means the same in both.
    """
    parameters = inputs.resolved.config["optimizer"]["params"]
    groups = ds.parameter_groups(module, parameters["weight_decay"], module.head_prefixes)
    module.to(device).train()
    weights = [weight for group in groups for weight in group["params"]]
    masters: list[torch.Tensor] = []  # none in fp32
    if inputs.resolved.precision != "fp32":
        for group in groups:
            group["params"] = [w.detach().clone().requires_grad_() for w in group["params"]]
            masters += group["params"]
        module.to(DTYPES[inputs.resolved.precision])
    optimizer = torch.optim.AdamW(
        groups, lr=parameters["lr"], betas=tuple(parameters.get("betas", (0.9, 0.999))),
        eps=parameters.get("eps", 1e-8), fused=True if device.type == "cuda" else None,
    )
    micro_batches = [micro_batch.inputs(device) for micro_batch in batch.micro_batches]
    scale = ds.ranks().world_size / max(batch.step_masked_tokens, 1)

    def step() -> None:
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        for micro_batch in micro_batches:
            loss, _ = module(**micro_batch)
            (loss * scale).backward()
            loss_sum += loss.detach()
        loss_sum.item()
        if masters:
            for master, weight in zip(masters, weights, strict=True):
                master.grad = weight.grad.float()
        optimizer.step()
        if masters:
            with torch.no_grad():
                torch._foreach_copy_(weights, masters)
        optimizer.zero_grad()
        module.zero_grad()

    return step


# ----------------------------------------------------------------------------------- measuring


def turns(names: list[str], rounds: int) -> Iterator[str]:
    """Whose turn it is: every name once a round, each round begun by another one."""
    progress = metrics.Progress(rounds * len(names), "turn", len(names), label="benchmark")
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            yield name
            progress.update(1, name)
    progress.close()


def _resident_gib() -> float:
    return torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def take_turn(
    inputs: Inputs, measured: Measured, batches: Iterator[data.StepBatch],
    step: Callable[[data.StepBatch], None], foreign_gib: float,
) -> None:
    """Take one step that is not counted, then the counted ones of a round.

    Args:
        foreign_gib: memory of the GPU that is not this row's: the other model's states.
    """
    step(next(batches))
    ds.barrier()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    for _ in range(inputs.config.timed_steps):
        start = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - start
        step(batch)
        measured.add(inputs.rows, batch, time.perf_counter() - start, waited)
    measured.peak_gib = max(measured.peak_gib, metrics.peak_memory_gib() - foreign_gib)


def measure(inputs: Inputs) -> dict[str, Measured]:
    """Warm every row up, then let them take turns; collective. The result is that of all ranks."""
    config, ranks = inputs.config, ds.ranks()
    device = ds.start()
    module = mlm.build_model(inputs.config, inputs.store)
    decay = inputs.resolved.config["optimizer"]["params"]["weight_decay"]
    groups = ds.parameter_groups(module, decay, module.head_prefixes)
    torch.manual_seed(config.seed + ranks.rank)
    engine = ds.build_engine(module, groups, inputs.resolved)
    engine.train()
    loaders = {
        name: data.PackedData(
            inputs.store, inputs.rows, masking, seed=config.seed,
            micro_batch_size=inputs.resolved.micro_batch_size,
            accumulation_steps=inputs.resolved.accumulation_steps,
            world_size=ranks.world_size, rank=ranks.rank,
        )
        for name, masking in inputs.maskings.items()
    }
    num_steps = config.warmup_steps + config.rounds * (1 + config.timed_steps)
    batches = {name: loader.steps(0, num_steps) for name, loader in loaders.items()}

    def loop_step(batch: data.StepBatch) -> None:
        mlm.train_step(engine, batch, device, want_norm=False)

    for name in inputs.maskings:
        for _ in range(config.warmup_steps):
            loop_step(next(batches[name]))
    engine_gib = _resident_gib()
    prepared = loaders[BASELINE].step(0)
    bare_model = mlm.build_model(config, inputs.store)
    bare_step = make_bare_step(inputs, bare_model, prepared, device)
    for _ in range(config.warmup_steps):
        bare_step()
    batches[BARE] = itertools.repeat(prepared)
    bare_gib = _resident_gib() - engine_gib

    names = [BARE, *inputs.maskings]
    measured = {name: Measured() for name in names}
    for name in turns(names, config.rounds):
        step, foreign = (
            (lambda _: bare_step(), engine_gib) if name == BARE else (loop_step, bare_gib)
        )
        take_turn(inputs, measured[name], batches[name], step, foreign)
    for name in names:
        everyone = ds.gather_objects(measured[name])
        # A step is over when the slowest rank has ended it.
        measured[name].seconds = np.max([one.seconds for one in everyone], axis=0).tolist()
        measured[name].waited = np.mean([one.waited for one in everyone], axis=0).tolist()
        measured[name].peak_gib = max(one.peak_gib for one in everyone)
    ds.finish()
    return measured


def whole_step_passes(
    module: model.PackedMaskedLM, batch: data.PackedBatch, device: torch.device
) -> dict[str, Callable[[], torch.Tensor]]:
    """Ways to compute the mean loss of a batch, the baseline first."""
    inputs = batch.inputs(device)
    labels = torch.full_like(batch.input_ids, -100).flatten()
    labels[batch.masked_positions[:batch.num_masked]] = batch.masked_labels[:batch.num_masked]
    labels = labels.view_as(batch.input_ids).to(device)
    filled = (batch.document_ids >= 0).long().to(device)

    def ours(subset: bool, implementation: str | None) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            module.last_layer_subset, module.head_implementation = subset, implementation
            return module(**inputs)[0] / max(batch.num_masked, 1)

        return call

    def transformers() -> torch.Tensor:
        return module.hf(
            input_ids=inputs["input_ids"], attention_mask=filled, labels=labels
        ).loss

    implementation = module.head_implementation
    calls = (transformers, ours(False, "reference"), ours(False, implementation),
             ours(True, implementation))
    return dict(zip(WHOLE_STEP, calls, strict=True))


def measure_whole_step(inputs: Inputs) -> dict[str, list[list[float]]]:
    """Seconds of forward and backward, by variant and round."""
    config = inputs.config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = mlm.build_model(config, inputs.store)
    module.to(device, DTYPES[inputs.resolved.precision]).train()
    loader = data.PackedData(
        inputs.store, inputs.rows, inputs.maskings[BASELINE], seed=config.seed,
        micro_batch_size=inputs.resolved.micro_batch_size,
    )
    passes = whole_step_passes(module, loader.step(0).micro_batches[0], device)

    def seconds(call: Callable[[], torch.Tensor]) -> float:
        module.zero_grad()
        wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
        wait()
        start = time.perf_counter()
        call().backward()
        wait()
        return time.perf_counter() - start

    for call in passes.values():
        for _ in range(config.warmup_steps):
            seconds(call)
    times: dict[str, list[list[float]]] = {name: [] for name in passes}
    for name in turns(list(passes), config.rounds):
        times[name].append([seconds(passes[name]) for _ in range(config.timed_steps)])
    return times


# ----------------------------------------------------------------------------------- reporting


def spread(values: Any) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    p20, median, p80 = np.percentile(values, [20, 50, 80])
    return {"median": float(median), "p20": float(p20), "p80": float(p80)}


def summarise(name: str, measured: Measured, batch_rows: int, baseline: Measured
              ) -> dict[str, Any]:
    """One row of the table; rates are mean counts of a step over the median step."""
    seconds = float(np.median(measured.seconds))
    tokens = np.mean(measured.tokens) / seconds
    baseline_tokens = np.mean(baseline.tokens) / np.median(baseline.seconds)
    return {
        "strategy": name,
        "masked_rate": sum(measured.masked) / max(sum(measured.text_tokens), 1),
        "tokens_per_second": float(tokens),
        "rows_per_second": batch_rows / seconds,
        "masked_tokens_per_second": float(np.mean(measured.masked)) / seconds,
        "step_ms": spread(1000 * np.array(measured.seconds)),
        "data_wait_percent": 100 * sum(measured.waited) / sum(measured.seconds),
        "peak_memory_gib": measured.peak_gib,
        "over_random": float(tokens / baseline_tokens),
        "counted_steps": len(measured.seconds),
    }


def loop_over_bare(measured: dict[str, Measured], rounds: int) -> dict[str, float]:
    """Speed of the loop over that of `bare`, both on rows masked at random, round by round."""
    bare, loop = (
        np.median(np.reshape(measured[name].seconds, (rounds, -1)), axis=1)
        for name in (BARE, BASELINE)
    )
    return spread(bare / loop)


def format_table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [
        f"{'strategy':<16}{'masked':>8}{'tokens/s':>11}{'rows/s':>9}{'masked/s':>10}"
        f"{'step ms (p20-p80)':>26}{'wait %':>8}{'GiB':>7}{'/random':>9}"
    ]
    for row in rows:
        step = row["step_ms"]
        timing = f"{step['median']:.1f} ({step['p20']:.1f}-{step['p80']:.1f})"
        lines.append(
            f"{row['strategy']:<16}{100 * row['masked_rate']:>6.2f} %"
            f"{row['tokens_per_second']:>11,.0f}{row['rows_per_second']:>9.1f}"
            f"{row['masked_tokens_per_second']:>10,.0f}{timing:>26}"
            f"{row['data_wait_percent']:>8.2f}{row['peak_memory_gib']:>7.2f}"
            f"{row['over_random']:>9.3f}"
        )
    return "\n".join(lines)


def summarise_whole_step(times: dict[str, list[list[float]]]) -> list[dict[str, Any]]:
    """One row a variant; the speed-up is that of each round's medians."""
    medians = {name: np.median(rounds, axis=1) for name, rounds in times.items()}
    return [
        {
            "variant": name,
            "step_ms": spread(1000 * np.array(rounds)),
            "speedup": spread(medians[TRANSFORMERS] / medians[name]),
            "counted_steps": int(np.size(rounds)),
        }
        for name, rounds in times.items()
    ]


def format_whole_step(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'forward + backward':<20}{'ms (p20-p80)':>26}{'times faster (p20-p80)':>28}"]
    for row in rows:
        step, speedup = row["step_ms"], row["speedup"]
        timing = f"{step['median']:.1f} ({step['p20']:.1f}-{step['p80']:.1f})"
        ratio = f"{speedup['median']:.2f} ({speedup['p20']:.2f}-{speedup['p80']:.2f})"
        lines.append(f"{row['variant']:<20}{timing:>26}{ratio:>28}")
    return "\n".join(lines)


def commit() -> str | None:
    """The checked-out commit of these sources, "+" if they differ from it, or None."""
    git = ["git", "-C", str(Path(__file__).resolve().parent.parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        status = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
        )
    except OSError:
        return None
    return name.stdout.strip() + "+" * bool(status.stdout) if name.returncode == 0 else None


def main(argv: list[str] | None = None) -> None:
    """The command."""
    config = parse(BenchmarkConfig, argv)
    inputs = read_inputs(config)
    for line in (*inputs.resolved.notes, *plan(inputs)):
        say(line)
    if config.dry_run:
        return
    result = {"options": as_dict(config), "ds_config": inputs.resolved.config,
              "precision": inputs.resolved.precision, "store": inputs.store.fingerprint,
              **checkpoint.environment(), "commit": commit()}
    if config.whole_step:
        rows = summarise_whole_step(measure_whole_step(inputs))
        say(format_whole_step(rows))
        result |= {"benchmark": "whole_step", "rows": rows}
    else:
        measured = measure(inputs)
        if not ds.is_main():
            return
        rows = [
            summarise(name, one, inputs.resolved.train_batch_size, measured[BASELINE])
            for name, one in measured.items()
        ]
        ratio = loop_over_bare(measured, config.rounds)
        say(format_table(rows))
        if not torch.cuda.is_available():
            say("GiB: the most the whole process had, the same for every row")
        say(f"loop / bare: {ratio['median']:.3f} (p20 {ratio['p20']:.3f}, p80 {ratio['p80']:.3f} "
            f"over {config.rounds} rounds)")
        result |= {"benchmark": "pretrain", "rows": rows, "loop_over_bare": ratio}
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_json(folder / "benchmark.json", result)
    say(f"wrote {folder / 'benchmark.json'}")
    say(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
