"""Supervised training, shared by the task classifier and the token scorer.

The loss is a mean over the global batch; the best epoch is kept. Examples are few (a task, not a
corpus), so all of them stay in memory on every rank, and every rank takes every decision from the
same gathered numbers.

Letters: `N` examples, `B` examples of a micro batch, `L` padded length, `C` classes, `T` tokens.
"""

from __future__ import annotations

import gc
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preprocess.errors import NonFiniteError, StopRequested
from preprocess.files import tell_stopping
from preprocess.identity import build
from preprocess.progress import Progress, say
from train.config import FinetuneConfig, FitScorerConfig
from train.engine import (
    Resolved,
    StopSignal,
    barrier,
    build_engine,
    full_state_dict,
    gather_objects,
    is_main,
    parameter_groups,
    ranks,
    read_ds_config,
    resolve_ds_config,
    take_step,
)
from train.model import checkpoint_activations, forward_flops
from train.run_dir.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from train.run_dir.hf_folder import Weights, make_stage, save_hf
from train.run_dir.identity import architecture, loss_scaling, report_changes, training
from train.run_dir.metrics import (
    EPOCH,
    EVAL_BEST,
    GRAD_NORM,
    LEARNING_RATE,
    TOKENS_PER_SECOND,
    TRAIN_LOSS,
    MetricsWriter,
    engine_scalars,
)
from train.stages.examples import (
    IGNORED,
    Examples,
    collate,
    global_batches,
    rank_share,
    weighted_loss,
)

Config = FinetuneConfig | FitScorerConfig


def mean_loss(logits: list[np.ndarray], examples: Examples, class_weights: np.ndarray) -> float:
    """Return the training loss over a complete split, from gathered logits (float64)."""
    from scipy.special import log_softmax

    flat = np.concatenate([one.reshape(-1, len(class_weights)) for one in logits]).astype(float)
    targets = np.concatenate([one.reshape(-1) for one in examples.targets])
    keep = targets != IGNORED
    targets = targets[keep]
    log_likelihood = log_softmax(flat[keep], axis=1)[np.arange(len(targets)), targets]
    return float(-np.sum(class_weights[targets] * log_likelihood) / examples.mass.sum())


@torch.no_grad()
def predict(
    forward: Callable[..., Any],
    examples: Examples,
    pad_id: int,
    batch_size: int,
    device: torch.device | str,
    label: str = "evaluate",
    part: bool = True,
) -> list[np.ndarray]:
    """Compute the logits of every example once; each rank does a share and gets all of them.

    Args:
        forward: a model or an engine in evaluation mode; returns an object with `.logits`.
        batch_size: examples of one forward pass of one rank.
        label, part: of the bar.
    Returns:
        N arrays float32, in the order of `examples`: `(C,)` or `(L_i, C)`.
    """
    where = ranks()
    lengths = examples.lengths
    order = np.argsort(-lengths, kind="stable")  # longest first: memory runs out at once
    mine: list[tuple[int, np.ndarray]] = []
    with Progress(len(examples), "example", label=label, part=part) as progress:
        for start in range(0, len(examples), batch_size * where.world_size):
            batch = order[start : start + batch_size * where.world_size]
            (indices,), (weights,) = rank_share(batch, batch_size, 1, where.rank, where.world_size)
            inputs, targets, _ = collate(examples, indices, pad_id, device)
            logits = forward(**inputs).logits.float().cpu().numpy()
            for index, weight, row in zip(indices.tolist(), weights, logits, strict=True):
                if weight:
                    mine.append((index, row[: lengths[index]] if targets.ndim == 2 else row))
            progress.update(len(batch))
    found = dict(pair for share in gather_objects(mine) for pair in share)
    assert len(found) == len(examples)
    return [found[index] for index in range(len(examples))]


def train_step(
    engine: Any,
    resolved: Resolved,
    examples: Examples,
    batch: np.ndarray,
    pad_id: int,
    class_weights: torch.Tensor,
    asked: Callable[[], bool],
) -> tuple[float, Any, bool]:
    """Take one optimizer step on a global batch.

    The loss is the sum over the global batch divided by the batch's mass. DeepSpeed averages over
    ranks and divides by the accumulation steps; both factors are undone here, so that the step is
    the same at any number of ranks and micro batches.

    Args:
        batch: indices, `(n,)` int64.
        asked: whether this rank was asked to stop.
    Returns:
        The loss of the global batch per unit of its mass, the norm of its gradient as `take_step`
        gives it, and whether any rank was asked to stop.
    Raises:
        NonFiniteError: the loss or the gradient is not a number, on any rank; nothing has been
            updated.
    """
    where = ranks()
    micro, accumulation = resolved.micro_batch_size, resolved.accumulation_steps
    indices, weights = rank_share(batch, micro, accumulation, where.rank, where.world_size)
    factor = where.world_size * accumulation
    mass = float(examples.mass[batch].sum())
    total = torch.zeros((), device=class_weights.device)
    for micro_indices, micro_weights in zip(indices, weights, strict=True):
        inputs, targets, kept = collate(
            examples, micro_indices, pad_id, class_weights.device, micro_weights
        )
        logits = engine(**inputs).logits
        loss = weighted_loss(logits, targets, kept, class_weights) / mass
        engine.backward(loss * factor)
        total += loss.detach()
        if not engine.is_gradient_accumulation_boundary():
            engine.step()
    (mean, num_asked), norm = take_step(engine, total, asked())
    return mean, norm, num_asked > 0


def attention_without_plans(device: torch.device) -> AbstractContextManager[None]:
    """Keep cuDNN's attention out: it makes a plan for each new length, and batches have many."""
    if device.type != "cuda":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )


def seed_dropout(seed: int, step: int) -> None:
    """Seed dropout by (seed, step, rank), so that a resumed step draws the same numbers."""
    state = np.random.SeedSequence([seed, step, ranks().rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]) % 2**63)


@dataclass
class Progressed:
    """Training so far; all but `best_state` is the same on every rank.

    history: the dev metrics of each finished epoch; of the last one alone where that is kept.
    best_epoch: the one to keep so far, counted from 1; 0 before the first. best_state: the weights
    after that epoch, float32 on the CPU; None on other ranks than the first.
    seconds: of training, over all processes that took part. log: open after training. window: sums
    over the steps since the last point of the log. epochs: of the training once it has ended.
    flops: operations of the encoder in it, as of `forward_flops`; None for an unknown family.
    """

    log: MetricsWriter
    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    best_state: dict[str, torch.Tensor] | None = None
    seconds: float = 0.0
    steps: int = 0
    window: Any = field(default_factory=Counter)
    epochs: int = 0
    flops: float | None = None

    @property
    def best(self) -> dict[str, float]:
        """Return the dev metrics of the best epoch."""
        return self.history[min(self.best_epoch, len(self.history)) - 1]


def num_steps(num_examples: int, batch_size: int, num_epochs: int) -> int:
    """Count the optimizer steps of a run; a small last batch of an epoch is one step too."""
    return num_epochs * -(-num_examples // batch_size)


def epochs_seen(step: int, num_examples: int, batch_size: int) -> float:
    """Return the passes over the examples after `step` steps; the last batch may be smaller."""
    epochs, more = divmod(step, num_steps(num_examples, batch_size, 1))
    return epochs + more * batch_size / num_examples


def resolve(
    config: FinetuneConfig | FitScorerConfig, train: Examples, default_learning_rate: float
) -> Resolved:
    """Fill the DeepSpeed JSON for a run over `train`."""
    return resolve_ds_config(
        read_ds_config(config.deepspeed_config), config, world_size=ranks().world_size,
        total_steps=lambda batch: num_steps(len(train), batch, config.num_train_epochs),
        default_learning_rate=default_learning_rate,
    )


def make_identity(
    command: str,
    config: Config,
    resolved: Resolved,
    hf_config: Any,
    train: Examples,
    *,
    seed: int,
    inputs: dict[str, Any],
    options: dict[str, Any],
    split: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Build the identity of a run over `train`.

    Args:
        hf_config: of the model that it starts from.
        inputs, split: as of `preprocess.identity.build`.
        options: of this command alone.
    """
    return build(
        command, inputs=inputs, choice={"seed": seed}, train=training(resolved, config),
        split=split,
        options={
            "model_config": architecture(hf_config),
            "num_train_epochs": config.num_train_epochs,
            "loss_scaling": loss_scaling(resolved),
            **options,
        },
        max_steps=num_steps(len(train), resolved.train_batch_size, config.num_train_epochs),
    )


def describe_plan(
    config: Config, resolved: Resolved, train: Examples, runs: int = 1
) -> list[str]:
    """Describe the batch arithmetic, one line each."""
    total = num_steps(len(train), resolved.train_batch_size, config.num_train_epochs)
    schedule = resolved.config["scheduler"].get("params", {})
    longest = int(train.lengths.max())
    return [
        *resolved.notes,
        f"batch: {resolved.micro_batch_size} examples x {resolved.accumulation_steps} micro "
        f"batches x {ranks().world_size} ranks = {resolved.train_batch_size} per step, "
        f"{resolved.precision}",
        f"steps: {total // config.num_train_epochs} per epoch x {config.num_train_epochs} epochs = "
        f"{total}" + (f", {runs} times" if runs > 1 else "")
        + f"; warm-up {schedule.get('warmup_num_steps', 0)}, "
        f"learning rate {resolved.config['optimizer']['params']['lr']:g}",
        f"tokens: {train.lengths.mean():.1f} per example, {longest} at most",
    ]


def fit(
    model: Any,
    resolved: Resolved,
    train: Examples,
    dev: Examples,
    assess: Callable[[list[np.ndarray]], dict[str, float]],
    *,
    config: Config,
    run_dir: Path,
    records: dict[str, dict[str, Any]],
    tokenizer: Any,
    parent: Weights,
    about: dict[str, Any] | None = None,
    **options: Any,
) -> Progressed:
    """Train a fresh model with a fresh optimizer and write the best epoch to `run_dir/hf`.

    The engine and its memory are released, so that one process can train many seeds.

    Args:
        parent: the weights that the model starts from.
        about: as of `make_stage`.
        options: as of `train_and_select`.
    """
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    weight_decay = resolved.config["optimizer"]["params"]["weight_decay"]
    engine = build_engine(model, parameter_groups(model, weight_decay), resolved)
    try:
        with StopSignal() as stop, attention_without_plans(options["device"]):
            found = train_and_select(
                engine, resolved, train, dev, assess, config=config, run_dir=run_dir,
                records=records, pad_id=tokenizer.pad_token_id, stop=stop.asked, **options,
            )
    finally:
        engine.destroy()
        del engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    tokens = int(train.lengths.sum())
    reading = forward_flops(model, tokens, int((train.lengths**2).sum()))
    found.flops = None if reading is None else 3 * reading * found.epochs
    if is_main():
        stage = make_stage(
            records, parent, steps=found.steps, seconds=found.seconds,
            tokens=tokens * found.epochs, flops=found.flops, about=about,
        )
        assert found.best_state is not None  # the first rank holds it
        save_hf(model, found.best_state, tokenizer, run_dir / "hf", [*parent.stages, stage])
    barrier()
    return found


def train_and_select(
    engine: Any,
    resolved: Resolved,
    train: Examples,
    dev: Examples,
    assess: Callable[[list[np.ndarray]], dict[str, float]],
    *,
    config: Config,
    seed: int,
    select: str,
    tags: dict[str, str],
    epoch: str = "best",
    patience: int | None = None,
    class_weights: np.ndarray,
    pad_id: int,
    run_dir: Path,
    device: torch.device,
    records: dict[str, dict[str, Any]],
    hyperparameters: dict[str, Any],
    stop: Callable[[], bool],
) -> Progressed:
    """Train for `config.num_train_epochs` and keep the weights of the best epoch, or the last.

    Resumes from the newest complete checkpoint in `run_dir` unless `--resume never`.

    Args:
        engine: a fresh DeepSpeed engine.
        assess: turns the logits of `dev` into metrics.
        select: the metric whose first strictly largest value picks the best epoch; of the loss the
            first strictly smallest.
        epoch: best, or last: then no metric picks anything.
        patience: epochs in a row without a better one, after which training ends; None: never.
        tags: TensorBoard tag of each metric; those without one are not logged.
        class_weights: `(C,)` float64.
        run_dir: folder of this seed.
        records: the `identity` and the `numerics` of this seed, kept in its checkpoints.
        hyperparameters: the row on TensorBoard's HParams page.
        stop: whether this rank was asked to stop.
    Returns:
        The result, with a log that the caller closes.
    Raises:
        NonFiniteError: a loss or a gradient is not a number, on every rank at once.
        StopRequested: after a checkpoint.
    """
    total_steps = num_steps(len(train), resolved.train_batch_size, config.num_train_epochs)
    per_epoch = total_steps // config.num_train_epochs
    found = _restore(engine, run_dir, config, records)
    step, first_step = found.steps, found.steps
    started = time.monotonic() - found.seconds
    found.log.hyperparameters(hyperparameters)
    progress = Progress(
        total_steps, every=config.logging_steps, initial=step, label=f"seed {seed}"
    )
    batches = global_batches(train, resolved.train_batch_size, seed, step, total_steps)
    weights = torch.tensor(class_weights, dtype=torch.float32, device=device)
    window = found.window
    text, stopping = "", False
    engine.train()
    with progress:
        while True:
            # An epoch that is not going to be kept is not measured: it may cost more than training.
            measured = per_epoch * (len(found.history) + 1) if epoch == "best" else total_steps
            if step == measured and (epoch == "best" or not found.history):
                engine.eval()
                logits = predict(engine, dev, pad_id, config.per_device_eval_batch_size, device)
                engine.train()
                scores = {"loss": mean_loss(logits, dev, class_weights), **assess(logits)}
                _refuse_non_finite(scores["loss"], "validation loss", step)
                sign = -1 if select == "loss" else 1
                is_better = not found.best_epoch or (
                    sign * scores[select] > sign * found.best[select])
                found.history.append(scores)
                if is_better:
                    found.best_epoch = step // per_epoch
                    found.best_state = full_state_dict(engine)
                scalars = {tag: scores[name] for name, tag in tags.items()}
                found.log.scalars(step, {**scalars, EVAL_BEST: found.best[select]})
            due = config.save_steps and step > first_step and step % config.save_steps == 0
            if stopping or due:
                found.steps, found.seconds = step, time.monotonic() - started
                _save(engine, run_dir, found, config.save_total_limit, records)
            if stopping:
                raise StopRequested(
                    f"stopped at step {step} of {total_steps} of seed {seed}, with a checkpoint; "
                    "the same command goes on from there"
                )
            idle = len(found.history) - found.best_epoch  # epochs in a row
            if step == total_steps or patience and step % per_epoch == 0 and idle >= patience:
                break
            learning_rate, begun = engine.get_lr()[0], time.monotonic()
            seed_dropout(seed, step)
            batch = next(batches)
            loss, norm, stopping = train_step(
                engine, resolved, train, batch, pad_id, weights, stop
            )
            if stopping:
                tell_stopping()
            mass = float(train.mass[batch].sum())
            window.update(loss=loss * mass, mass=mass, tokens=int(train.lengths[batch].sum()),
                          seconds=time.monotonic() - begun)
            step += 1
            if step % config.logging_steps == 0 or step % per_epoch == 0:
                scalars = {LEARNING_RATE: learning_rate,
                           EPOCH: epochs_seen(step, len(train), resolved.train_batch_size),
                           TRAIN_LOSS: window["loss"] / window["mass"],
                           TOKENS_PER_SECOND: window["tokens"] / max(window["seconds"], 1e-9),
                           **engine_scalars(engine)}
                if norm is not None:
                    scalars[GRAD_NORM] = float(norm)
                found.log.scalars(step, scalars)
                text = f"loss {scalars[TRAIN_LOSS]:.4f}"
                window.clear()
            best = ""
            if found.history:
                best = f"  {epoch} {select} {found.best[select]:.4f} (epoch {found.best_epoch})"
            progress.update(1, text + best)
    found.steps, found.seconds = step, time.monotonic() - started
    found.epochs = step // per_epoch
    return found


def _refuse_non_finite(value: float, name: str, step: int) -> None:
    if not math.isfinite(value):
        raise NonFiniteError(
            f"{name} {value} at step {step}: lower --learning_rate, or train in fp32 or bf16"
        )


BEST = "best.safetensors"
"""File of a checkpoint: the weights of the best epoch so far."""


def _save(
    engine: Any, run_dir: Path, found: Progressed, limit: int, records: dict[str, Any]
) -> None:
    """Write a checkpoint, with the best weights so far."""
    from safetensors.torch import save

    notes = {
        "history": found.history, "best_epoch": found.best_epoch, "seconds": found.seconds,
        "steps": found.steps, "window": dict(found.window), **records,
    }
    extras = {} if found.best_state is None else {BEST: save(found.best_state)}
    save_checkpoint(engine, run_dir, found.steps, notes, limit, extras)


def remove_resume_state(run_dir: Path) -> None:
    """Remove the checkpoints of a run that is finished: they are several models large."""
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    (run_dir / "latest").unlink(missing_ok=True)


def _restore(
    engine: Any, run_dir: Path, config: Config, records: dict[str, Any]
) -> Progressed:
    """Load the newest complete checkpoint, if `--resume` allows it; open the log at its step."""
    from safetensors.torch import load_file

    command = records["identity"]["command"]
    # One seed of several may well have none: `must` is for the command to check.
    path = find_checkpoint(run_dir, "never" if config.resume == "never" else "auto")
    if path is None:
        return Progressed(MetricsWriter(run_dir, 0, command, config.report_to))
    notes = load_checkpoint(engine, path, records["identity"], config.allow_world_size_change)
    report_changes(notes["numerics"], records["numerics"])
    say(f"resumed from {path}")
    best_state = load_file(path / BEST) if is_main() and (path / BEST).is_file() else None
    return Progressed(
        MetricsWriter(run_dir, notes["steps"], command, config.report_to),
        notes["history"], notes["best_epoch"], best_state,
        notes["seconds"], notes["steps"], Counter(notes.get("window", {})),
    )
