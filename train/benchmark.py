"""Measure the throughput of pre-training per strategy, and of baselines.

    deepspeed train/benchmark.py --deepspeed_config ds_configs/zero1_fp16.json --tokens P2 \
        --model_config bert-base --scores mr --max_seq_lengths 128 512

Every strategy trains the same model on the same rows of the same store, with the loader and the
DeepSpeed step of `pretrain.py`. The baselines are `bare` (forward, backward and AdamW of one
prepared batch in plain PyTorch: what the loop costs) and the loops of `train/bench/baselines.py`.
The rows of the table are interleaved (`train/bench/throughput.py`). A second table holds the
strategies with equally many masked tokens, a third the cost of building their masks and of the
scores before them (`train/bench/maskings.py`). Controls are matched to the first strategy that can
use the scores.

Not counted: `--warmup_steps` at the start of each row, and the first and last step of each turn.

With `--passes`, rows of forward and backward alone as well. With `--compare`, two results side by
side.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preprocess.errors import ConfigError, run_command
from preprocess.files import atomic_write_json
from preprocess.progress import say, show
from preprocess.store import TokenStore
from train import data, model
from train import engine as ds
from train.bench import baselines, maskings, tables
from train.bench import throughput as speed
from train.bench.events import folder_of, write_events
from train.bench.kinds import profile
from train.config import BenchmarkConfig, as_dict, parse
from train.data import RowTable, row_tables
from train.model import flops
from train.run_dir.folder import environment
from train.stages import masked_lm as mlm

BARE = "bare"
PROFILED_STEPS = 4
EQUAL = " ="  # ends the names of the rows with equally many masked tokens
GROUPED = "transformers-grouped"


@dataclass(frozen=True)
class Inputs:
    """Everything read and checked before a process group starts.

    Attributes:
        tables: the row table of each length.
        strategies: to build, the baseline first. baselines: names of baselines and passes.
    """

    config: BenchmarkConfig
    store: TokenStore
    tables: dict[int, RowTable]
    strategies: list[str]
    baselines: list[str]
    scores: maskings.Scores | None
    resolved: ds.Resolved
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Maskings:
    """Masks of each strategy: its own, thinned to `equal_tokens` (0: none), and their costs."""

    plain: dict[str, data.Masking]
    equal: dict[str, data.Masking]
    equal_tokens: int
    costs: list[dict[str, Any]]


# -------------------------------------------------------------------------------------- inputs


def read_inputs(config: BenchmarkConfig) -> Inputs:
    """Open and check the store, the scores, the model's configuration and the DeepSpeed JSON."""
    store = TokenStore.open(config.tokens)
    scores = maskings.open_scores(store, config.scores)
    strategies = maskings.choose_strategies(config.strategies, scores)
    loops, notes = choose_baselines(config)
    names = [*strategies, *config.mask_indices]
    twice = {name for name in names if names.count(name) > 1 or name in (BARE, *loops)}
    if twice:
        raise ConfigError(f"--mask_indices {' '.join(sorted(twice))}: a name is used twice or "
                          "taken by another row of the table; give each row another name")
    for name in config.mask_indices:
        maskings.read_index(store, name)
    hf_config = mlm.model_config(config, store)
    mlm.check_agreement(store, hf_config, config)
    for length in config.lengths():
        model.check_row_length(hf_config, length)
    tables = {length: row_tables(store, length, eval_fraction=0.0)[0]
              for length in config.lengths()}
    steps = steps_of_a_row(config) * len(tables)
    resolved = ds.resolve_ds_config(
        ds.read_ds_config(config.deepspeed_config), config,
        total_steps=steps * len(names) * (1 + config.equal_masks),
        world_size=ds.ranks().world_size,
    )
    return Inputs(config, store, tables, strategies, loops, scores, resolved,
                  (*resolved.notes, *notes))


def choose_baselines(config: BenchmarkConfig) -> tuple[list[str], list[str]]:
    """Return the baselines and passes to measure, and lines to say about them."""
    known, given = baselines.BASELINES, config.baselines
    for name in given:
        if name not in known and given not in (["all"], ["none"]):
            raise ConfigError(f"--baselines {name}: known are {', '.join(known)}; or all or none "
                              "alone")
    chosen = [name for name in known if given == ["all"] or name in given]
    chosen += baselines.PASSES if config.passes else ()
    if chosen and ds.ranks().world_size > 1:
        return [], [f"baselines and passes are measured on one rank: left out on "
                    f"{ds.ranks().world_size}"]
    return chosen, []


def steps_of_a_row(config: BenchmarkConfig) -> int:
    """Return the number of steps that one row takes at one length, counted or not."""
    return config.warmup_steps + config.rounds * (config.timed_steps + 2)


def build_maskings(inputs: Inputs) -> Maskings:
    """Build the masks of every strategy in memory, read the prebuilt ones.

    A strategy that masks nothing with these scores is left out, unless it was asked for.
    """
    config, built = inputs.config, {}
    builder = maskings.Builder(inputs.store, inputs.scores, config.mlm_probability, config.seed)
    for name in inputs.strategies:
        try:
            built[name] = builder.build(name)
        except maskings.MasksNothing as error:
            if config.strategies:
                raise
            say(f"left out: {error}")
    built |= {name: maskings.read_index(inputs.store, name) for name in config.mask_indices}
    plain = {name: masking for name, (masking, _) in built.items()}
    costs = [cost for _, cost in built.values()]
    if not config.equal_masks or len(plain) < 2:
        return Maskings(plain, {}, 0, costs)
    return Maskings(plain, *maskings.equal_maskings(plain, costs, config.seed), costs)


# ---------------------------------------------------------------------------------------- plan


def plan(inputs: Inputs) -> list[str]:
    """Describe the measurement, in words and numbers."""
    config, resolved = inputs.config, inputs.resolved
    ours = [*inputs.strategies, *config.mask_indices]
    names = [*ours, BARE, *inputs.baselines]
    lines = [
        f"tokens {inputs.store.prefix}: {table.num_tokens:,} tokens in {table.num_rows:,} rows of "
        f"{length}, {100 * table.efficiency:.1f} % filled"
        for length, table in inputs.tables.items()
    ] + [
        f"batch: {resolved.micro_batch_size} rows x {resolved.accumulation_steps} micro batches x "
        f"{ds.ranks().world_size} ranks = {resolved.train_batch_size} rows per step; precision "
        f"{resolved.precision}, ZeRO {resolved.zero_stage}",
        f"{', '.join(names)}: {config.rounds} rounds of {config.timed_steps} counted steps each; "
        f"dropped: {config.warmup_steps} warm-up steps, and the first and last step of each turn",
    ]
    if config.equal_masks and len(ours) > 1:
        lines.append(f"once more with equally many masked tokens: {', '.join(ours)}")
    return [*lines, estimate(inputs, len(ours))]


def estimate(inputs: Inputs, num_strategies: int) -> str:
    """Estimate the number of steps and the minutes at half of the device's speed."""
    config, resolved = inputs.config, inputs.resolved
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = flops.peak_flops(device, resolved.precision).flops_per_second * ds.ranks().world_size
    with torch.device("meta"):
        module = model.build_masked_lm(mlm.model_config(config, inputs.store), config.seed)
    again = num_strategies > 1 and config.equal_masks
    sparing = 1 + num_strategies * (1 + again) + sum(
        name.startswith("gather") for name in inputs.baselines)
    full = len(inputs.baselines) - sum(name.startswith("gather") for name in inputs.baselines)
    steps, seconds = steps_of_a_row(config), 0.0
    for length in inputs.tables:
        count, slots = flops.count_flops(module, length), resolved.train_batch_size * length
        work = sparing * count.of(slots, config.mlm_probability * slots)
        seconds += steps * (work + full * count.of(slots, slots)) / (0.5 * peak)
    total = steps * (sparing + full) * len(inputs.tables)
    minutes = max(1, round(seconds / 60))
    return (f"{total:,} steps of {resolved.train_batch_size} rows in all; about {minutes:,} min at "
            "half of this device's speed in matrix products")


# --------------------------------------------------------------------------------------- loops


@dataclass(frozen=True)
class Loops:
    """The models in training: DeepSpeed's engine, `bare`, and that of transformers, if any.

    `standing_gib` is the memory of each, by the name in `Row.standing`: weights, gradients and
    optimizer states. `sizes` are those of the batches of each masking at each row length, where
    they are fixed as in `pretrain.py`.
    """

    inputs: Inputs
    device: torch.device
    engine: Any
    bare: baselines.BareLoop
    trainer: baselines.TrainerLoop | None
    standing_gib: dict[str, float]
    sizes: dict[tuple[str, int], data.BatchSizes]

    def strategy_row(self, name: str, masking: data.Masking, table: RowTable) -> speed.Row:
        """Return the row of a masking, trained by DeepSpeed."""
        equal = name.endswith(EQUAL)
        steps = steps_of_a_row(self.inputs.config) + 2 * PROFILED_STEPS
        return speed.Row(
            name, "equal" if equal else "strategy",
            batches=self.loader(name, masking, table).steps(0, steps, ds.all_reduce_sum),
            step=lambda batch, lap: mlm.train_step(
                self.engine, batch, self.device, want_norm=False, lap=lap),
            count=partial(count_packed, table), head_seconds=self.bare.head_seconds,
            standing="engine",
        )

    def loader(self, name: str, masking: data.Masking, table: RowTable) -> data.PackedData:
        """Return the loader of `pretrain.py`."""
        batches = make_loader(self.inputs, masking, table)
        sizes = self.sizes.get((name, table.max_seq_length))
        if sizes:
            batches.pack_for(self.device, sizes)
        return batches

    def prepared_row(self, name: str, masking: data.Masking, table: RowTable) -> speed.Row:
        """Return the row of one prepared batch: trained by `bare`, or a pass with its weights."""
        batch = next(self.loader(maskings.BASELINE, masking, table).steps(0, 1, ds.all_reduce_sum))
        if name == BARE:
            step: Callable[..., None] = partial(self.bare.step, self.bare.prepare(batch))
        else:
            step = partial(self.bare.run_passes, [
                baselines.make_passes(self.bare.module, micro_batch, self.device)[name]
                for micro_batch in batch.micro_batches])
        return speed.Row(
            name, "bare" if name == BARE else "pass", batches=itertools.repeat(batch),
            step=lambda _, lap: step(lap),
            count=partial(count_packed, table), head_seconds=self.bare.head_seconds,
            standing="bare",
        )

    def baseline_row(self, name: str, max_seq_length: int) -> speed.Row:
        """Return the row of a loop of transformers."""
        config, resolved, trainer = self.inputs.config, self.inputs.resolved, self.trainer
        assert trainer is not None
        head, cut = name.split("-")
        make_rows = baselines.grouped_rows if cut == "grouped" else baselines.line_rows
        rows = make_rows(self.inputs.store, max_seq_length,
                         steps_of_a_row(config) * resolved.train_batch_size, config.seed)
        batches: Iterator[Any] = baselines.make_batches(
            self.inputs.store, rows, micro_batch_size=resolved.micro_batch_size,
            accumulation_steps=resolved.accumulation_steps, seed=config.seed,
            mlm_probability=config.mlm_probability, corruption=config.corruption_percent(),
            pin_memory=torch.cuda.is_available(),
        )
        return speed.Row(
            name, "baseline", batches=batches,
            step=lambda batch, lap: trainer.step(batch, baselines.LOSSES[head], lap),
            count=partial(count_texts, self.inputs.store),
            head_seconds=lambda batch: trainer.head_seconds(batch, head),
            standing="transformers",
        )


def make_loader(inputs: Inputs, masking: data.Masking, table: RowTable) -> data.PackedData:
    """Return the batches of one masking, as this rank reads them."""
    resolved, ranks = inputs.resolved, ds.ranks()
    return data.PackedData(
        inputs.store, table, masking, seed=inputs.config.seed,
        micro_batch_size=resolved.micro_batch_size,
        accumulation_steps=resolved.accumulation_steps,
        world_size=ranks.world_size, rank=ranks.rank,
        corruption=inputs.config.corruption_percent(),
    )


def count_packed(table: RowTable, batch: data.StepBatch) -> speed.Counts:
    """Count a packed batch, over all ranks."""
    return speed.Counts(
        tokens=batch.step_tokens, masked=batch.step_masked_tokens,
        text_tokens=batch.step_tokens - 2 * batch.step_pieces,
        slots=batch.step_rows * table.max_seq_length, rows=batch.step_rows,
    )


def count_texts(store: TokenStore, batch: list[baselines.Batch]) -> speed.Counts:
    """Count a batch of transformers' loops."""
    ids, attended, labels = (torch.cat([micro_batch[key].flatten() for micro_batch in batch])
                             for key in ("input_ids", "attention_mask", "labels"))
    special, masked = torch.isin(ids, torch.tensor(store.all_special_ids)), labels != -100
    return speed.Counts(
        tokens=int(attended.sum()), masked=int(masked.sum()),
        text_tokens=int((masked | ~special).sum()), slots=len(ids),
        rows=sum(len(micro_batch["input_ids"]) for micro_batch in batch),
    )


def build_loops(inputs: Inputs, built: Maskings) -> Loops:
    """Start the process group and build each model; collective."""
    device, levels = ds.start(), [speed.resident_gib()]
    # As in a run that is long enough for it.
    compiles, why = model.choose_compiling(
        inputs.config.torch_compile, device, inputs.resolved.zero_stage, model.WORTH_SLOTS)
    say(why)
    sizes = {}
    if device.type == "cuda" or compiles:
        named = {**built.plain, **{name + EQUAL: one for name, one in built.equal.items()}}
        sizes = {
            (name, length): make_loader(inputs, masking, table).measure_sizes(
                steps_of_a_row(inputs.config))
            for length, table in inputs.tables.items() for name, masking in named.items()
        }

    def build_model() -> model.PackedMaskedLM:
        module = mlm.build_model(inputs.config, inputs.store)
        if compiles:
            model.compile_layers(module, *{(one.masked, one.per_row) for one in sizes.values()})
        return module

    if compiles:
        model.forget_compiled()
    module = build_model()
    decay = inputs.resolved.config["optimizer"]["params"]["weight_decay"]
    groups = ds.parameter_groups(module, decay, module.head_prefixes)
    torch.manual_seed(inputs.config.seed + ds.ranks().rank)
    engine = ds.build_engine(module, groups, inputs.resolved)
    engine.train()
    levels.append(speed.resident_gib())
    bare = baselines.BareLoop(build_model(), inputs.resolved, device)
    levels.append(speed.resident_gib())
    trainer = None
    if set(inputs.baselines) - set(baselines.PASSES):
        steps = steps_of_a_row(inputs.config) * len(inputs.baselines) * len(inputs.tables)
        trainer = baselines.TrainerLoop(
            mlm.build_model(inputs.config, inputs.store), inputs.resolved, device, steps)
    levels.append(speed.resident_gib())
    standing = dict(zip(("engine", "bare", "transformers"), np.diff(levels).tolist(), strict=True))
    return Loops(inputs, device, engine, bare, trainer, standing, sizes)


# ----------------------------------------------------------------------------------- measuring


def measure_length(
    loops: Loops, built: Maskings, max_seq_length: int, peak: flops.Peak
) -> dict[str, Any]:
    """Measure every row at one length; collective."""
    inputs = loops.inputs
    config, table = inputs.config, inputs.tables[max_seq_length]
    rows = [loops.strategy_row(name, masking, table) for name, masking in built.plain.items()]
    rows += [loops.strategy_row(name + EQUAL, masking, table)
             for name, masking in built.equal.items()]
    rows += [loops.prepared_row(name, built.plain[maskings.BASELINE], table)
             if name in (BARE, *baselines.PASSES) else loops.baseline_row(name, max_seq_length)
             for name in (BARE, *inputs.baselines)]
    cold = set(loops.standing_gib) if max_seq_length == config.lengths()[0] else set()
    for row in rows:
        grown = speed.warm_up(row, config.warmup_steps)
        if row.standing in cold:  # gradients and optimizer states exist from now on
            loops.standing_gib[row.standing] += grown
            cold.remove(row.standing)
    found = speed.measure(rows, config.rounds, config.timed_steps, loops.standing_gib)
    count = flops.count_flops(loops.bare.module, max_seq_length)
    everyone = peak.flops_per_second * ds.ranks().world_size
    result = []
    for row in rows:
        if ds.is_main():
            write_events(folder_of(config.output_dir, max_seq_length, row.name), found[row.name],
                         count, everyone)
        others = {"over_random": maskings.BASELINE + EQUAL * (row.kind == "equal"),
                  "over_grouped": GROUPED, "over_full": baselines.PASSES[0]}
        result.append(speed.summarise(row, found[row.name], count, everyone) | {
            key: speed.speed_over(found[row.name], found[other], config.rounds)
            for key, other in others.items() if other in found})
    kinds = None
    if config.profile:
        profiled = next((row for row in rows if row.name == maskings.BASELINE), rows[0])
        kinds = {"row": profiled.name, "ms": profile(
            lambda: profiled.step(next(profiled.batches), speed.no_laps), PROFILED_STEPS)}
    return {
        "max_seq_length": max_seq_length,
        "kinds": kinds,
        "flops": {"per_token": count.per_token, "per_masked_token": count.per_masked_token},
        "rows": result,
        "loop_over_bare": speed.speed_over(found[maskings.BASELINE], found[BARE], config.rounds),
    }


def measure(inputs: Inputs) -> dict[str, Any]:
    """Measure all lengths; collective. Return the speed part of `benchmark.json`."""
    built = build_maskings(inputs)
    loops = build_loops(inputs, built)
    peak = flops.peak_flops(loops.device, inputs.resolved.precision)
    lengths = [measure_length(loops, built, length, peak) for length in inputs.tables]
    ds.finish()
    return {
        "benchmark": "pretrain", "lengths": lengths, "mask_costs": built.costs,
        "equal_masked_tokens": built.equal_tokens, "store_tokens": inputs.store.num_tokens,
        "peak": {"flops_per_second": peak.flops_per_second, "source": peak.source},
        "memory_of_each_row": speed.reset_peak(),
    }


def main(argv: list[str] | None = None) -> None:
    """The command."""
    config = parse(BenchmarkConfig, argv)
    if config.compare:
        show(tables.compare(*config.compare))
        return
    # The model's options take one length at a time.
    config = replace(config, max_seq_length=max(config.lengths()))
    inputs = read_inputs(config)
    for line in (*inputs.notes, *plan(inputs)):
        say(line)
    if config.dry_run:
        return
    result = {"options": as_dict(config), "ds_config": inputs.resolved.config,
              "precision": inputs.resolved.precision, "store": inputs.store.fingerprint,
              **environment()}
    result |= measure(inputs)
    if not ds.is_main():
        return
    file = Path(config.output_dir) / "benchmark.json"
    atomic_write_json(file, result)
    show(tables.format_result(result))
    say(tables.draw(result, file.with_suffix(".png")))
    say(f"wrote {file}")
    show(json.dumps(tables.in_short(result, file)))


if __name__ == "__main__":
    run_command(main)
