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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preprocess.errors import ConfigError, NonFiniteError, StopRequested, run_command
from preprocess.files import read_json
from preprocess.masking import BASELINE
from preprocess.progress import Progress, say
from preprocess.store import TokenStore
from train import data, model
from train import engine as ds
from train.config import PretrainConfig, parse
from train.data import RowTable, row_tables
from train.model import flops
from train.run_dir import checkpoint, folder, hf_folder, metrics
from train.stages import masked_lm as mlm
from train.stages.example import Example


@dataclass
class Totals:
    """What the run has done so far; saved with each checkpoint."""

    step: int = 0
    tokens: int = 0
    masked_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Inputs:
    """Everything read and checked before a process group starts."""

    config: PretrainConfig
    store: TokenStore
    train_rows: RowTable
    eval_rows: RowTable
    masking: data.Masking
    eval_maskings: dict[str, data.Masking]
    resolved: ds.Resolved
    identity: dict[str, Any]


def read_inputs(config: PretrainConfig) -> Inputs:
    """Open and check the store, the masks and the DeepSpeed JSON."""
    store = TokenStore.open(config.tokens)
    weights = str(config.model_config)
    if config.model_name_or_path:
        hf_config = model.load_config(config.model_name_or_path, config.trust_remote_code)
        model.check_row_length(hf_config, config.max_seq_length)
        mlm.check_vocabulary(store, hf_config, config)
        weights = "fresh"
        if not config.from_scratch:
            folder = model.local_checkpoint(config.model_name_or_path)
            weights = model.weights_fingerprint(folder, hf_config)
    if config.mask_index:
        masking = data.prebuilt_masking(store, config.mask_index)
    else:
        masking = data.drawn_masking(store, config.masking or BASELINE, config.mlm_probability)
    eval_maskings = {"": data.drawn_masking(store, BASELINE, data.EVAL_RATE)}
    for name in config.eval_mask_index:
        eval_maskings[name] = data.prebuilt_masking(store, name)
    train_rows, eval_rows = row_tables(store, config.max_seq_length, config.eval_fraction)
    world_size = ds.ranks().world_size
    resolved = ds.resolve_ds_config(
        ds.read_ds_config(config.deepspeed_config), config,
        total_steps=max(1, config.max_steps), world_size=world_size,
    )
    identity = {
        "order": data.ORDER_VERSION,
        "store": store.fingerprint,
        "masking": masking.name,
        "mask_index": masking.fingerprint,
        "mask_rate": masking.rate,
        "seed": config.seed,
        "max_seq_length": config.max_seq_length,
        "eval_fraction": config.eval_fraction,
        "train_batch_size": resolved.train_batch_size,
        "max_steps": config.max_steps,
        "weights": weights,
    }
    return Inputs(
        config, store, train_rows, eval_rows, masking, eval_maskings, resolved, identity
    )


def unigram_loss(inputs: Inputs, rows: int) -> float:
    """Mean loss of the unigram model on the held-out masked tokens: what knowing no context gives.

    A model that stays above it has learnt nothing from context.
    """
    log_frequency = mlm.token_frequencies(inputs.store)
    held = data.PackedData(
        inputs.store, inputs.eval_rows, inputs.eval_maskings[""], seed=data.EVAL_SEED,
        micro_batch_size=inputs.resolved.micro_batch_size,
    )
    labels = [batch.masked_labels.numpy() for batch in held.in_order(rows)]
    return float(-log_frequency[np.concatenate(labels)].mean())


def plan(inputs: Inputs) -> list[str]:
    """What will be done, in words and numbers."""
    config, resolved, rows = inputs.config, inputs.resolved, inputs.train_rows
    world_size = ds.ranks().world_size
    epochs = config.max_steps * resolved.train_batch_size / rows.num_rows
    return [
        f"tokens {inputs.store.prefix}: {rows.num_tokens:,} tokens in {rows.num_rows:,} rows of "
        f"{config.max_seq_length}, {100 * rows.efficiency:.1f} % filled; "
        f"{inputs.eval_rows.num_rows:,} rows held out",
        f"batch: {resolved.micro_batch_size} rows x {resolved.accumulation_steps} micro batches x "
        f"{world_size} ranks = {resolved.train_batch_size} rows a step; {config.max_steps} steps = "
        f"{epochs:.2f} epochs",
        f"masking: {inputs.masking.name}, precision {resolved.precision}, ZeRO "
        f"{resolved.config.get('zero_optimization', {}).get('stage', 0)}",
    ]


def memory_line(module: model.PackedMaskedLM, inputs: Inputs) -> str:
    """Estimate what one rank needs."""
    masking, resolved = inputs.masking, inputs.resolved
    masked = masking.index and sum(map(len, masking.index)) / inputs.store.num_tokens
    return flops.memory_line(
        module, stage=resolved.config.get("zero_optimization", {}).get("stage", 0),
        world_size=ds.ranks().world_size, precision=resolved.precision,
        micro_batch_slots=resolved.micro_batch_size * inputs.config.max_seq_length,
        mask_rate=masked or masking.rate,
        gradient_checkpointing=inputs.config.gradient_checkpointing,
    )


@torch.no_grad()
def evaluate(engine: Any, inputs: Inputs, device: torch.device, masking: data.Masking,
             ) -> tuple[float, float]:
    """Mean loss (nats a masked token) and accuracy on the held-out rows."""
    ranks = ds.ranks()
    held = data.PackedData(
        inputs.store, inputs.eval_rows, masking, seed=data.EVAL_SEED,
        micro_batch_size=inputs.resolved.micro_batch_size,
        world_size=ranks.world_size, rank=ranks.rank,
    )
    engine.eval()
    loss_sum, hits, count = 0.0, 0.0, 0
    rows = min(inputs.config.eval_max_rows, inputs.eval_rows.num_rows)
    num_batches = -(-rows // held.global_batch)
    with Progress(num_batches, "batch", label="evaluate", part=True) as progress:
        for batch in held.in_order(rows):
            loss, right = engine(**batch.inputs(device))
            loss_sum, hits = loss_sum + loss.item(), hits + right.item()
            count += batch.num_masked
            progress.update()
    engine.train()
    loss_sum, hits, total = ds.all_reduce_sum(loss_sum, hits, count)
    return loss_sum / max(total, 1), hits / max(total, 1)


def evaluate_all(
    engine: Any, inputs: Inputs, device: torch.device, step: int
) -> dict[str, float]:
    """Evaluation scalars under the fixed random masks, and under each `--eval_mask_index`.

    Raises:
        NonFiniteError: a loss is not a number, on every rank; such a model is not written.
    """
    if inputs.eval_rows.num_rows == 0:
        return {}
    scalars = {}
    for name, masking in inputs.eval_maskings.items():
        loss, accuracy = evaluate(engine, inputs, device, masking)
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
    return scalars


def freeze_encoder(engine: Any) -> None:
    """Let only the head learn in the next step.

    The encoder's rate is 0 rather than its gradients absent, so that Adam's moments are those of
    real gradients when it starts to learn: zero moments would make its first steps several
    times too long.
    """
    for group in engine.optimizer.param_groups:
        if group["name"].startswith("encoder"):
            group["lr"] = 0.0


def export(engine: Any, module: model.PackedMaskedLM, inputs: Inputs, totals: Totals,
           out_dir: Path) -> None:
    """Write the present weights as a folder that transformers loads; collective."""
    state = ds.full_state_dict(engine)
    if state is None:
        return
    config = inputs.config
    source = config.model_name_or_path
    stage = {
        "stage": "pretrain",
        "masking": inputs.masking.name,
        "mask_strategy": inputs.masking.options.get("strategy", inputs.masking.name),
        "steps": totals.step,
        "tokens": totals.tokens,
        "masked_tokens": totals.masked_tokens,
        "seconds": round(totals.seconds, 1),
        "seed": config.seed,
        "store": inputs.store.fingerprint,
        "mask_index": inputs.identity["mask_index"],
        "started_from": source or config.model_config,
        "weights": inputs.identity["weights"],
        "mask_rate": inputs.masking.rate,
        "train_batch_size": inputs.resolved.train_batch_size,
        "max_seq_length": config.max_seq_length,
    }
    lineage = hf_folder.read_lineage(source) if source and not config.from_scratch else []
    prefix = "hf."
    hf_folder.save_hf(
        module.hf,
        {name.removeprefix(prefix): value for name, value in state.items()},
        model.load_tokenizer(inputs.store.tokenizer_dir),
        out_dir,
        [*lineage, stage],
        module.carried,
    )


def start_engine(inputs: Inputs) -> tuple[Any, model.PackedMaskedLM]:
    """The model, and the DeepSpeed engine around it."""
    config, resolved = inputs.config, inputs.resolved
    module = mlm.build_model(config, inputs.store, config.from_scratch)
    if module.fresh_head and not (config.from_scratch or config.model_config):
        if config.max_steps and not config.head_only_steps:
            say("a fresh head hurts the encoder at first: consider --head_only_steps 100")
    say(memory_line(module, inputs))
    head_scale = 1.0
    if config.head_learning_rate:
        head_scale = config.head_learning_rate / resolved.config["optimizer"]["params"]["lr"]
    groups = ds.parameter_groups(
        module, resolved.config["optimizer"]["params"]["weight_decay"], module.head_prefixes,
        head_scale,
    )
    torch.manual_seed(config.seed + ds.ranks().rank)  # dropout differs from rank to rank
    return ds.build_engine(module, groups, resolved), module


def train(inputs: Inputs, run_dir: Path) -> None:
    """Train, evaluate, save and export; reads downwards.

    Raises:
        StopRequested: SIGTERM, SIGUSR1 or Ctrl-C; a checkpoint of the last step has been committed.
    """
    config, resolved = inputs.config, inputs.resolved
    device = ds.start()
    resume_from = checkpoint.find_checkpoint(run_dir, config.resume)
    ranks = ds.ranks()
    peak = flops.peak_flops(device, resolved.precision)
    engine, module = start_engine(inputs)
    totals = Totals()
    if resume_from:
        state = checkpoint.load_checkpoint(
            engine, resume_from, inputs.identity, config.allow_world_size_change
        )
        totals = Totals(**state["totals"])
        say(f"resumed from {resume_from}")

    batches = data.PackedData(
        inputs.store, inputs.train_rows, inputs.masking, seed=config.seed,
        micro_batch_size=resolved.micro_batch_size,
        accumulation_steps=resolved.accumulation_steps,
        world_size=ranks.world_size, rank=ranks.rank,
    )
    log = _Log(inputs, run_dir, engine, module, device, peak, totals)
    results = log.evaluate(0) if totals.step == 0 else {}
    engine.train()
    progress = Progress(
        config.max_steps, every=config.logging_steps, initial=totals.step, label="pretrain"
    )
    clock = time.monotonic()
    with progress, ds.StopSignal() as stop:
        for batch in batches.steps(totals.step, config.max_steps, ds.all_reduce_sum):
            waited = time.monotonic() - clock
            if totals.step < config.head_only_steps:
                freeze_encoder(engine)
            rate = float(engine.get_lr()[0])
            ending = totals.step + 1 == config.max_steps
            logs = ending or (totals.step + 1) % config.logging_steps == 0
            loss, accuracy, norm, stopping = mlm.train_step(
                engine, batch, device, want_norm=logs, asked=stop.asked
            )
            totals.step += 1
            totals.tokens += batch.step_tokens
            totals.masked_tokens += batch.step_masked_tokens
            now = time.monotonic()
            totals.seconds += now - clock
            log.add(loss, accuracy, waited)
            if logs:
                log.window(totals, rate, norm)
            progress.update(1, f"loss {loss:.3f}")
            if ending or (config.eval_steps and totals.step % config.eval_steps == 0):
                results = log.evaluate(totals.step)
            if totals.step in config.export_steps:
                export(engine, module, inputs, totals, run_dir / f"hf_step_{totals.step}")
            due = config.save_steps and totals.step % config.save_steps == 0
            if ending or stopping or due:
                checkpoint.save_checkpoint(
                    engine, run_dir, totals.step,
                    {"totals": vars(totals).copy(), "identity": inputs.identity},
                    config.save_total_limit,
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
    if results and ds.is_main():
        loss = results[metrics.EVAL_LOSS]
        floor = unigram_loss(inputs, min(config.eval_max_rows, inputs.eval_rows.num_rows))
        say(
            f"held-out loss {loss:.4f} nats a masked token, perplexity "
            f"{results[metrics.EVAL_PERPLEXITY]:.1f}; "
            f"without context (token frequencies) it would be {floor:.4f}"
        )
    say(f"wrote {run_dir / 'hf'}")


class _Log:
    """What the run tells: means and speeds of the steps since the last point, and evaluations."""

    def __init__(
        self, inputs: Inputs, run_dir: Path, engine: Any, module: model.PackedMaskedLM,
        device: torch.device, peak: flops.Peak, totals: Totals,
    ) -> None:
        self._inputs, self._engine, self._device = inputs, engine, device
        world_size = ds.ranks().world_size
        self._flops = flops.count_flops(module, inputs.config.max_seq_length)
        self._peak = peak.flops_per_second * world_size
        self._example = None
        if inputs.eval_rows.num_rows:
            held = data.PackedData(
                inputs.store, inputs.eval_rows, inputs.eval_maskings[""], seed=data.EVAL_SEED,
                micro_batch_size=inputs.resolved.micro_batch_size,
            )
            self._example = Example(held, model.load_tokenizer(inputs.store.tokenizer_dir))
        self.writer = metrics.MetricsWriter(run_dir, totals.step)
        self.writer.hyperparameters(hyperparameters(inputs))
        say(f"peak for MFU: {world_size} x {peak.flops_per_second / 1e12:.3g} TFLOP/s "
            f"({peak.source})")
        self._restart(totals)

    def _restart(self, totals: Totals) -> None:
        self._before = replace(totals)
        self._loss = self._accuracy = self._waited = 0.0
        self._steps = 0

    def add(self, loss: float, accuracy: float, waited: float) -> None:
        """Count one step; `waited` are its seconds of waiting for the loader."""
        self._loss += loss
        self._accuracy += accuracy
        self._waited += waited
        self._steps += 1

    def window(self, totals: Totals, rate: float, norm: float | None) -> None:
        """Log the steps since the last time, the last one's learning rate and gradient norm."""
        before, rows = self._before, self._inputs.train_rows.num_rows
        seconds = max(totals.seconds - before.seconds, 1e-9)
        tokens, masked = totals.tokens - before.tokens, totals.masked_tokens - before.masked_tokens
        scalars = {
            metrics.TRAIN_LOSS: self._loss / self._steps,
            metrics.LEARNING_RATE: rate,
            metrics.EPOCH: totals.step * self._inputs.resolved.train_batch_size / rows,
            metrics.MASKED_ACCURACY: self._accuracy / self._steps,
            metrics.MASKED_FRACTION: masked / max(tokens, 1),
            metrics.TOKENS_PER_SECOND: tokens / seconds,
            metrics.MASKED_TOKENS_PER_SECOND: masked / seconds,
            metrics.MFU: self._flops.of(tokens, masked) / seconds / self._peak,
            metrics.DATA_WAIT_FRACTION: self._waited / seconds,
            **metrics.engine_scalars(self._engine),
        }
        if norm is not None:
            scalars[metrics.GRAD_NORM] = norm
        self.writer.scalars(totals.step, scalars)
        self._restart(totals)

    def evaluate(self, step: int) -> dict[str, float]:
        """Evaluate, log it with the example, and return the scalars; collective."""
        results = evaluate_all(self._engine, self._inputs, self._device, step)
        self.writer.scalars(step, results)
        if self._example is not None:
            guesses = self._example.predict(self._engine, self._device)
            self.writer.text(step, metrics.EXAMPLE, self._example.table(guesses))
        return results


def hyperparameters(inputs: Inputs) -> dict[str, Any]:
    """The run's row on TensorBoard's HParams page."""
    config, masking = inputs.config, inputs.masking
    return {
        "command": "pretrain",
        "model": config.model_name_or_path or config.model_config,
        "data": metrics.short_path(config.tokens),
        "masking": masking.name,
        "mlm_probability": masking.rate or masking.options.get("mlm_probability"),
        "seed": config.seed,
        "max_seq_length": config.max_seq_length,
        "max_steps": config.max_steps,
        "num_train_epochs":
            config.max_steps * inputs.resolved.train_batch_size / inputs.train_rows.num_rows,
        **metrics.resolved_hyperparameters(inputs.resolved),
    }


def is_finished(run_dir: Path, inputs: Inputs) -> bool:
    """Whether the run in this directory reached its last step with these inputs."""
    last = run_dir / "hf" / "lineage.json"
    if not last.is_file() or inputs.config.resume == "never":
        return False
    stage = read_json(last)["stages"][-1]
    return stage.get("steps") == inputs.config.max_steps and all(
        stage.get(key) == inputs.identity[key]
        for key in ("store", "weights", "mask_index", "masking", "mask_rate", "seed",
                    "train_batch_size", "max_seq_length")
    )


def run(config: PretrainConfig) -> None:
    """Check, then train; several runs may follow each other in one process."""
    if config.max_steps == 0 and config.head_only_steps:
        raise ConfigError("--head_only_steps goes with --max_steps above 0")
    run_dir = folder.check_run_dir(config)
    inputs = read_inputs(config)
    for line in (*inputs.resolved.notes, *plan(inputs)):
        say(line)
    if config.dry_run:
        say(memory_line(mlm.build_model(config, inputs.store, config.from_scratch), inputs))
        return
    if is_finished(run_dir, inputs):
        say(f"{run_dir}: finished already")
        return
    folder.prepare_run_dir(config, inputs.resolved)
    train(inputs, run_dir)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    run(parse(PretrainConfig, argv))
    ds.finish()


if __name__ == "__main__":
    run_command(main)
