"""Pre-train by masked language modelling: stages 1 and 2.

    deepspeed train/pretrain.py --deepspeed_config ds_configs/zero1_fp16.json \
        --tokens data/wiki --model_config bert-base --masking random --output_dir runs/stage1
    deepspeed train/pretrain.py --deepspeed_config ds_configs/zero1_fp16.json \
        --tokens data/reviews --mask_index mr-sel --model_name_or_path runs/stage1/hf \
        --output_dir runs/stage2

The loss is the mean over the masked tokens of the global batch, whatever the number of ranks and
micro batches. Held-out documents are evaluated under the same fixed masks in every run.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preprocess import identity as identities
from preprocess.errors import DataError, NonFiniteError, StopRequested, run_command
from preprocess.files import tell_stopping
from preprocess.masking import BASELINE, STANDARD
from preprocess.progress import Progress, say
from preprocess.store import TokenStore
from train import data, model
from train import engine as ds
from train.config import AUTO, PretrainConfig, parse
from train.data import row_tables
from train.model import flops
from train.run_dir import checkpoint, folder, hf_folder, hub, metrics, parts
from train.run_dir import identity as records
from train.run_dir.model_card import public_name
from train.stages import execution as fitting
from train.stages import extension
from train.stages import masked_lm as mlm
from train.stages.example import HeldOutExample
from train.stages.startup import Startup

MOST_REPEATS = 3  # epochs of one fixed mask index; a run of more is warned


@dataclass
class Totals:
    """Work done so far; saved with each checkpoint."""

    step: int = 0
    tokens: int = 0
    masked_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class PretrainInputs:
    """Everything read and checked before a process group starts.

    Attributes:
        tokenizer: of the store.
        batches: the training rows under their masks, as this rank reads them.
        held: the held-out rows of this rank, under the fixed random masks ("") and under each
            `--eval_mask_index`.
        parent: the weights that the run starts from; None for fresh ones.
        execution: what the run does on this machine, and whatever it resumes on.
        records: the `identity` and the `numerics` of the run, kept with all that it writes.
    """

    config: PretrainConfig
    store: TokenStore
    tokenizer: Any
    batches: data.PackedData
    held: dict[str, data.PackedData]
    resolved: ds.Resolved
    parent: hf_folder.Weights | None
    execution: fitting.Execution
    records: dict[str, dict[str, Any]]

    @property
    def held_rows(self) -> int:
        """Held-out rows of all ranks."""
        return self.held[""].table.num_rows

    def held_alone(self) -> data.PackedData:
        """Return the held-out rows under the random masks as an only rank reads them."""
        held = self.held[""]
        return data.PackedData(held.store, held.table, held.masking, seed=held.seed,
                               micro_batch_size=held.micro_batch_size)


def read_inputs(config: PretrainConfig) -> PretrainInputs:
    """Open and check the store, the masks, the weights and the DeepSpeed JSON."""
    store = TokenStore.open(config.tokens)
    tokenizer = model.load_tokenizer(store.tokenizer_dir)
    hf_config, parent = mlm.model_config(config, store), None
    mlm.check_agreement(store, hf_config, config)
    if config.model_name_or_path and not config.from_scratch:
        parent = hf_folder.open_weights(config.model_name_or_path)
    config = model.fit_row_length(hf_config, config)
    if config.mask_index:
        masking = data.prebuilt_masking(store, config.mask_index)
    else:
        rate = data.Schedule(*config.mask_rates(), num_steps=config.max_steps)
        masking = data.drawn_masking(store, config.masking or BASELINE, rate)
    eval_maskings = {"": data.drawn_masking(store, BASELINE, data.EVAL_RATE)}
    for name in config.eval_mask_index:
        eval_maskings[name] = data.prebuilt_masking(store, name)
    train_rows, eval_rows = row_tables(store, config.max_seq_length, config.eval_fraction)
    ranks, ds_config = ds.ranks(), ds.read_ds_config(config.deepspeed_config)

    def resolve(earlier: parts.Parts) -> ds.Resolved:
        begin, first = parts.schedule_span(earlier, config.max_steps)
        return ds.resolve_ds_config(
            ds_config, config, total_steps=max(1, config.max_steps - begin),
            warmup_of=max(1, first - begin), world_size=ranks.world_size,
        )

    resolved = resolve([])  # as if it were no extension of what is there
    held = {
        name: data.PackedData(
            store, eval_rows, eval_masking, seed=data.EVAL_SEED,
            micro_batch_size=resolved.micro_batch_size,
            world_size=ranks.world_size, rank=ranks.rank,
        )
        for name, eval_masking in eval_maskings.items()
    }
    identity = identities.build(
        "pretrain",
        inputs={
            "store": store.fingerprint, "weights": parent.hf_digest if parent else "fresh",
            "mask_index": masking.fingerprint,
        },
        choice={
            "masking": masking.options.get("strategy", masking.name),
            "rate": masking.rate_text() or masking.options.get("mlm_probability"),
            "corruption": config.corruption_percent().shares(),
            "seed": config.seed,
        },
        train=records.training(
            resolved, config, head_only_steps=config.head_only_steps,
            head_learning_rate=config.head_learning_rate,
        ),
        split={"eval_fraction": config.eval_fraction},
        options={
            "model_config": config.model_config if config.model_config in model.BERT_SIZES
            else records.architecture(hf_config),
            "order": data.ORDER_VERSION,
            "eval_max_rows": config.eval_max_rows,
            "eval_mask_index": [eval_maskings[name].fingerprint
                                for name in config.eval_mask_index],
            "export_steps": sorted(config.export_steps),
            "loss_scaling": records.loss_scaling(resolved),
        },
        max_steps=config.max_steps,
    )
    earlier = extension.find_parts(config, lambda earlier: parts.extend(
        identity, earlier, records.training(resolve(earlier), config)["schedule"]))
    resolved = resolve(earlier)
    identity = parts.extend(identity, earlier, records.training(resolved, config)["schedule"])
    batches = data.PackedData(
        store, train_rows, masking, seed=config.seed, micro_batch_size=resolved.micro_batch_size,
        accumulation_steps=resolved.accumulation_steps,
        world_size=ranks.world_size, rank=ranks.rank, corruption=config.corruption_percent(),
    )
    execution = fitting.settle(config, resolved, batches)
    numerics = records.numerics(config, resolved, execution.record())
    return PretrainInputs(
        config, store, tokenizer, batches, held, resolved, parent, execution,
        {"identity": identity, "numerics": numerics},
    )


def trial(config: PretrainConfig) -> fitting.Trial:
    """Build the model, and what runs it on more and more rows of this run; joins the group."""
    device, inputs = ds.start(), read_inputs(config)
    resolved = inputs.resolved
    module = mlm.build_model(config, inputs.store, config.from_scratch)
    module.to(device, model.DTYPES[resolved.precision]).train()

    def run(size: int) -> None:
        # At the largest rate of a schedule.
        masking = replace(inputs.batches.masking, schedule=None)
        packed = data.PackedData(inputs.store, inputs.batches.table, masking, seed=config.seed,
                                 micro_batch_size=size)
        loss, _ = module(**packed.step(0).micro_batches[0].inputs(device))
        loss.backward()
        module.zero_grad(set_to_none=True)

    return fitting.Trial(run, device, flops.state_bytes(
        module, stage=resolved.zero_stage, world_size=ds.ranks().world_size,
        precision=resolved.precision,
    ))


def unigram_loss(inputs: PretrainInputs, rows: int) -> float:
    """Return the mean loss of the unigram model on the held-out masked tokens.

    A model that stays above it has learnt nothing from context.
    """
    log_frequency = mlm.token_frequencies(inputs.store)
    labels = [batch.masked_labels.numpy() for batch in inputs.held_alone().in_order(rows)]
    return float(-log_frequency[np.concatenate(labels)].mean())


def plan(inputs: PretrainInputs) -> list[str]:
    """Describe the run in words and numbers."""
    config, resolved, rows = inputs.config, inputs.resolved, inputs.batches.table
    world_size = ds.ranks().world_size
    epochs = config.max_steps * resolved.train_batch_size / rows.num_rows
    return [
        f"tokens {inputs.store.prefix}: {rows.num_tokens:,} tokens in {rows.num_rows:,} rows of "
        f"{config.max_seq_length}, {100 * rows.efficiency:.1f} % filled; "
        f"{inputs.held_rows:,} rows held out",
        f"batch: {resolved.micro_batch_size} rows x {resolved.accumulation_steps} micro batches x "
        f"{world_size} ranks = {resolved.train_batch_size} rows per step; {config.max_steps} steps "
        f"= {epochs:.2f} epochs",
        f"masking: {describe_masking(inputs)}, precision {resolved.precision}, ZeRO "
        f"{resolved.zero_stage}",
        *extension.describe(inputs.records["identity"]),
        *repeated_masks(inputs.batches.masking, config.max_steps, epochs),
        *([inputs.execution.why] if torch.cuda.is_available() or config.torch_compile != AUTO
          else []),
    ]


def describe_masking(inputs: PretrainInputs) -> str:
    """Name the masks of a run, with what is not as usual about them."""
    masking, corruption = inputs.batches.masking, inputs.config.corruption_percent()
    parts = [masking.name]
    if masking.schedule:
        parts.append(f"at {masking.rate_text()} of the tokens")
    if masking.later:
        parts.append(f"an index for each of {len(masking.indices)} epochs")
    if corruption != STANDARD:
        percent, usual = ("/".join(f"{part:g}" for part in one) for one in (corruption, STANDARD))
        parts.append(f"corrupted {percent} (held-out text, as in every run, {usual})")
    return ", ".join(parts)


def repeated_masks(masking: data.Masking, max_steps: int, epochs: float) -> list[str]:
    """Warn where a run shows each row under the same masks again and again.

    Args:
        epochs: passes over the rows.
    """
    indices = len(masking.indices)
    if not indices or epochs / indices <= MOST_REPEATS:
        return []
    return [
        f"warning: {max_steps} steps are {epochs:.1f} epochs, and mask index {masking.name} "
        f"{'has' if indices == 1 else f'of {indices} epochs has'} the same masks "
        f"{epochs / indices:.1f} times: build one for each epoch (build_masks.py --epochs "
        f"{math.ceil(epochs)}) if its strategy draws, or take fewer --max_steps"
    ]


def memory_line(module: model.PackedMaskedLM, inputs: PretrainInputs) -> str:
    """Estimate what one rank needs."""
    masking, resolved = inputs.batches.masking, inputs.resolved
    masked = masking.index and sum(map(len, masking.index)) / inputs.store.num_tokens
    return flops.memory_line(
        module, stage=resolved.zero_stage,
        world_size=ds.ranks().world_size, precision=resolved.precision,
        micro_batch_slots=resolved.micro_batch_size * inputs.config.max_seq_length,
        mask_rate=masked or masking.rate,
        gradient_checkpointing=inputs.config.gradient_checkpointing,
    )


@torch.no_grad()
def evaluate(
    engine: Any, held: data.PackedData, max_rows: int, device: torch.device
) -> tuple[float, float] | None:
    """Return mean loss (nats per masked token) and accuracy on the held-out rows; collective.

    None where nothing is masked: a mean over no token is no number.
    """
    engine.eval()
    sums, count = torch.zeros(2, dtype=torch.float64, device=device), 0
    rows = min(max_rows, held.table.num_rows)
    bar = Progress(-(-rows // held.global_batch), "batch", label="evaluate", part=True)
    with bar as progress, model.uncompiled():
        for batch in held.in_order(rows):
            loss, right = engine(**batch.inputs(device))
            sums[0] += loss
            sums[1] += right
            count += batch.num_masked
            progress.update()
    engine.train()
    loss_sum, hits, total = ds.all_reduce_sum(*sums, count)
    return (loss_sum / total, hits / total) if total else None


def freeze_encoder(engine: Any) -> None:
    """Let only the head learn in the next step.

    The encoder's rate is 0 rather than its gradients absent, so that Adam's moments are those of
    real gradients when it starts to learn: zero moments would make its first steps several
    times too long.
    """
    for group in engine.optimizer.param_groups:
        if group["name"].startswith("encoder"):
            group["lr"] = 0.0


def export(engine: Any, module: model.PackedMaskedLM, inputs: PretrainInputs, totals: Totals,
           out_dir: Path) -> None:
    """Write the current weights as a folder that transformers loads; collective."""
    state = ds.full_state_dict(engine)
    if state is None:
        return
    counted = flops.count_flops(module, inputs.config.max_seq_length)
    masking = inputs.batches.masking
    names = {key: masking.options.get(key) for key in ("strategy", "scores", "match", "units")}
    stage = hf_folder.make_stage(
        inputs.records, inputs.parent, steps=totals.step, tokens=totals.tokens,
        masked_tokens=totals.masked_tokens, seconds=totals.seconds,
        flops=counted.of(totals.tokens, totals.masked_tokens),
        masks={"index": masking.name, **names, "rate": masking.built_rate} if masking.indices
        else None,
        about=describe_data(inputs),
    )
    hf_folder.save_hf(
        module.hf,
        {name.removeprefix("hf."): value for name, value in state.items()},
        inputs.tokenizer,
        out_dir,
        [*(inputs.parent.stages if inputs.parent else []), stage],
        module.carried,
    )


def describe_data(inputs: PretrainInputs) -> dict[str, Any]:
    """Return what a model card tells of a run: `about` of `make_stage`."""
    config, store = inputs.config, inputs.store
    name = "" if config.from_scratch else config.model_name_or_path
    licence = config.license or inputs.parent and inputs.parent.licence
    language = (store.info.get("options") or {}).get("language")
    return {"base_model": public_name(name) if name else None, "data": Path(config.tokens).name,
            "language": language, "license": licence or None,
            "counts": {"documents": store.num_documents, "tokens": store.num_tokens}}


def start_engine(inputs: PretrainInputs) -> tuple[Any, model.PackedMaskedLM]:
    """Build the model and the DeepSpeed engine around it."""
    config, resolved = inputs.config, inputs.resolved
    module = mlm.build_model(config, inputs.store, config.from_scratch)
    if module.fresh_head and not (config.from_scratch or config.model_config):
        if config.max_steps and not config.head_only_steps:
            say("a fresh head hurts the encoder at first: consider --head_only_steps 100")
    say(memory_line(module, inputs))
    sizes = inputs.execution.sizes
    if inputs.execution.torch_compile and sizes:
        model.forget_compiled()  # of another run of this process
        model.compile_layers(module, (sizes.masked, sizes.per_row))
    head_scale = 1.0
    if config.head_learning_rate:
        head_scale = config.head_learning_rate / resolved.config["optimizer"]["params"]["lr"]
    groups = ds.parameter_groups(
        module, resolved.config["optimizer"]["params"]["weight_decay"], module.head_prefixes,
        head_scale,
    )
    torch.manual_seed(config.seed + ds.ranks().rank)  # dropout differs from rank to rank
    return ds.build_engine(module, groups, resolved), module


def train(inputs: PretrainInputs, run_dir: Path, startup: Startup) -> None:
    """Train, evaluate, save and export.

    Raises:
        StopRequested: see `ds.StopSignal`; a checkpoint of the last step was committed.
    """
    config, resolved = inputs.config, inputs.resolved
    device = ds.start()
    startup.lap("process group")
    identity = inputs.records["identity"]
    resume_from = checkpoint.find_checkpoint(run_dir, config.resume, extension.wanted(identity))
    peak = flops.peak_flops(device, resolved.precision)
    engine, module = start_engine(inputs)
    totals, window = Totals(), {}
    if resume_from:
        state = checkpoint.load_checkpoint(
            engine, resume_from, identity, config.allow_world_size_change
        )
        totals, window = Totals(**state["totals"]), state.get("window", {})
        records.report_changes(state["numerics"], inputs.records["numerics"])
        say(f"resumed from {resume_from}")
    extension.restart_or_refuse(engine, resume_from, totals.step, identity)

    if inputs.execution.sizes:
        inputs.batches.pack_for(device, inputs.execution.sizes)
    startup.lap("engine")
    log = _Log(inputs, run_dir, engine, module, device, peak, totals.step)
    log.sums.update(window)
    results = log.evaluate(0) if totals.step == 0 else {}
    engine.train()
    progress = Progress(
        config.max_steps, every=config.logging_steps, initial=totals.step, label="pretrain"
    )
    startup.lap("evaluation")
    stable = extension.stable_step(identity)
    clock, shown = time.monotonic(), ""
    limits = fitting.memory_is_enough(resolved.micro_batch_size, device)
    with progress, ds.StopSignal() as stop, limits, fitting.garbage_frozen():
        for batch in inputs.batches.steps(totals.step, config.max_steps, ds.all_reduce_sum):
            waited = time.monotonic() - clock
            if totals.step < config.head_only_steps:
                freeze_encoder(engine)
            rate = float(engine.get_lr()[0])
            ending = totals.step + 1 == config.max_steps
            logs = ending or (totals.step + 1) % config.logging_steps == 0
            loss, accuracy, norm, stopping = mlm.train_step(
                engine, batch, device, want_norm=logs, asked=stop.asked
            )
            if log.first_step == totals.step:
                startup.lap("first step")
                say(str(startup))
            totals.step += 1
            totals.tokens += batch.step_tokens
            totals.masked_tokens += batch.step_masked_tokens
            now = time.monotonic()
            totals.seconds += now - clock
            masked = batch.step_masked_tokens
            log.sums.update(
                loss=loss * masked, right=accuracy * masked, waited=waited, seconds=now - clock,
                tokens=batch.step_tokens, masked=masked,
            )
            if stopping:
                tell_stopping()
            if logs:
                shown = log.window(totals, rate, norm)
            progress.update(1, shown)
            if ending or (config.eval_steps and totals.step % config.eval_steps == 0):
                results = log.evaluate(totals.step)
            if totals.step in config.export_steps:
                export(engine, module, inputs, totals, run_dir / f"hf_step_{totals.step}")
            due = config.save_steps and totals.step % config.save_steps == 0
            if ending or stopping or due or totals.step == stable:
                checkpoint.save_checkpoint(
                    engine, run_dir, totals.step,
                    {"totals": vars(totals).copy(), "window": dict(log.sums), **inputs.records},
                    config.save_total_limit, spared=stable,
                )
            if stopping and not ending:
                raise StopRequested(
                    f"stopped on request after step {totals.step} of {config.max_steps}; the same "
                    "command goes on from there"
                )
            clock = time.monotonic()
    export(engine, module, inputs, totals, run_dir / "hf")
    log.writer.close(finished=True)
    ds.barrier()
    if metrics.EVAL_LOSS in results and ds.is_main():
        loss = results[metrics.EVAL_LOSS]
        baseline = unigram_loss(inputs, min(config.eval_max_rows, inputs.held_rows))
        say(
            f"held-out loss {loss:.4f} nats per masked token, perplexity "
            f"{results[metrics.EVAL_PERPLEXITY]:.1f}; "
            f"without context (token frequencies) it would be {baseline:.4f}"
        )
    say(f"wrote {run_dir / 'hf'}")


class _Log:
    """Log means and speeds of the steps since the last point, and evaluations."""

    def __init__(
        self, inputs: PretrainInputs, run_dir: Path, engine: Any, module: model.PackedMaskedLM,
        device: torch.device, peak: flops.Peak, first_step: int,
    ) -> None:
        self._inputs, self._engine, self._device = inputs, engine, device
        self.first_step = first_step
        world_size = ds.ranks().world_size
        self._flops = flops.count_flops(module, inputs.config.max_seq_length)
        self._peak = peak.flops_per_second * world_size
        self._example = None
        if inputs.held_rows:
            self._example = HeldOutExample(inputs.held_alone(), inputs.tokenizer)
        self.writer = metrics.MetricsWriter(run_dir, first_step, "pretrain",
                                            inputs.config.report_to)
        self.writer.hyperparameters(records.hyperparameters(
            **inputs.records,
            model=inputs.config.model_name_or_path or inputs.config.model_config,
            data=metrics.short_path(inputs.config.tokens),
            mlm_probability=inputs.batches.masking.number(),
            num_train_epochs=inputs.config.max_steps * inputs.resolved.train_batch_size
            / inputs.batches.table.num_rows,
        ))
        say(f"peak for MFU: {world_size} x {peak.flops_per_second / 1e12:.3g} TFLOP/s "
            f"({peak.source})")
        self.sums: Any = Counter()  # over the steps since the last point

    def window(self, totals: Totals, rate: float, norm: float | None) -> str:
        """Log the steps since the last time, the last one's learning rate and gradient norm.

        Returns:
            The logged loss, for the terminal.
        """
        sums, rows = self.sums, self._inputs.batches.table.num_rows
        seconds, tokens, masked = max(sums["seconds"], 1e-9), sums["tokens"], sums["masked"]
        scalars = {
            metrics.LEARNING_RATE: rate,
            metrics.EPOCH: totals.step * self._inputs.resolved.train_batch_size / rows,
            metrics.MASKED_FRACTION: masked / max(tokens, 1),
            metrics.TOKENS_PER_SECOND: tokens / seconds,
            metrics.MASKED_TOKENS_PER_SECOND: masked / seconds,
            metrics.MFU: self._flops.of(tokens, masked) / seconds / self._peak,
            metrics.DATA_WAIT_FRACTION: sums["waited"] / seconds,
            **metrics.engine_scalars(self._engine),
        }
        if masked:  # a mean over no token is no number
            scalars[metrics.TRAIN_LOSS] = sums["loss"] / masked
            scalars[metrics.MASKED_ACCURACY] = sums["right"] / masked
        if norm is not None:
            scalars[metrics.GRAD_NORM] = norm
        self.writer.scalars(totals.step, scalars)
        sums.clear()
        return f"loss {scalars[metrics.TRAIN_LOSS]:.3f}" if masked else "nothing masked"

    def evaluate(self, step: int) -> dict[str, float]:
        """Evaluate under the fixed random masks and each `--eval_mask_index`; collective.

        The scalars are logged with the example, and returned.

        Raises:
            NonFiniteError: a loss is not a number, on every rank; such a model is not written.
        """
        inputs, scalars = self._inputs, {}
        for name, held in inputs.held.items() if inputs.held_rows else ():
            found = evaluate(self._engine, held, inputs.config.eval_max_rows, self._device)
            if found is None:
                continue
            loss, accuracy = found
            if not math.isfinite(loss):
                remedy = (
                    "lower --learning_rate, lengthen --warmup_ratio, or use bf16" if step
                    else "the weights that it starts from are broken; give another checkpoint"
                )
                raise NonFiniteError(f"the held-out loss is {loss} after step {step}; {remedy}")
            suffix = f"/{name}" if name else ""
            scalars[metrics.EVAL_LOSS + suffix] = loss
            scalars[metrics.EVAL_PERPLEXITY + suffix] = math.exp(min(loss, 700.0))
            scalars[metrics.EVAL_ACCURACY + suffix] = accuracy
        self.writer.scalars(step, scalars)
        if self._example is not None:
            with model.uncompiled():
                guesses = self._example.predict(self._engine, self._device)
            self.writer.text(step, metrics.EXAMPLE, self._example.table(guesses))
        return scalars


def is_finished(run_dir: Path, identity: dict[str, Any]) -> bool:
    """Return whether the run in this directory reached its last step.

    A run that is being extended keeps the `hf/` of its earlier part until its own end.

    Raises:
        ConfigError: what is there, finished or stopped, has another identity.
        DataError: what it wrote is damaged, and there is no checkpoint to export it from again.
    """
    hf = run_dir / "hf"
    if not hf.exists():
        checkpoint.check_identity(run_dir, identity)
        return False
    try:
        stages = hf_folder.read_stages(hf)
    except DataError:  # `is_whole` says what is wrong
        stages = []
    if stages:
        found = stages[-1]["identity"]
        parts.check(found, identity, f"--output_dir {run_dir}, a finished run")
        if found["length"] != identity["length"]:
            checkpoint.check_identity(run_dir, identity)
            return False
    else:
        checkpoint.check_identity(run_dir, identity)
    if not hf_folder.is_whole(
            run_dir, f"give another --output_dir, or delete {run_dir}, to train it again"):
        return False
    for step in identity["options"]["export_steps"]:
        problem = hf_folder.folder_problem(run_dir / f"hf_step_{step}")
        if problem:
            raise DataError(f"{problem}, and the last checkpoint cannot export it; give another "
                            f"--output_dir, or delete {run_dir}, to train it again")
    return True


def run(config: PretrainConfig) -> None:
    """Check, then train; several runs may follow each other in one process."""
    startup = Startup()
    startup.lap("imports")
    run_dir = folder.check_run_dir(config)
    config = fitting.settle_micro_batch(config, run_dir, trial)
    inputs = read_inputs(config)
    config = inputs.config
    startup.lap("inputs")
    for line in (*inputs.resolved.notes, *plan(inputs)):
        say(line)
    hub.announce(config.push_to_hub)
    identity = inputs.records["identity"]
    finished = is_finished(run_dir, identity)
    if config.dry_run:
        if torch.cuda.is_available():
            ds.start()
            startup.lap("process group")
            start_engine(inputs)
        else:  # an engine takes long there, and tells nothing
            say(memory_line(mlm.build_model(config, inputs.store, config.from_scratch), inputs))
        startup.lap("engine" if torch.cuda.is_available() else "model")
        say(str(startup))
        return
    if finished:
        say(f"{run_dir}: finished already")
        if config.license and ds.is_main():
            hf_folder.write_card(run_dir / "hf", licence=config.license)
        return
    with folder.sole_writer(run_dir):
        # Another process may have ended there since.
        if ds.gather_objects(is_finished(run_dir, identity))[0]:
            say(f"{run_dir}: finished already")
            return
        folder.prepare_run_dir(config, inputs.resolved, identity, inputs.execution.record())
        train(inputs, run_dir, startup)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    config = parse(PretrainConfig, argv)
    run(config)
    ds.finish()
    if config.push_to_hub and ds.is_main() and not config.dry_run:
        folder = Path(config.output_dir) / "hf"
        hub.push(folder, config.push_to_hub, config.hub_private,
                 lambda repo: hf_folder.write_card(folder, repo=repo, licence=config.license))


if __name__ == "__main__":
    run_command(main)
