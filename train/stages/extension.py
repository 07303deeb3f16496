"""Extending a pre-training run: which part of what its directory holds a longer run takes over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from preprocess.errors import ConfigError, DataError
from train import engine as ds
from train.config import PretrainConfig
from train.run_dir import checkpoint, hf_folder, parts
from train.run_dir.parts import Identity, Parts


def _record(run_dir: Path) -> Identity | None:
    """Return the identity of the longest run of which something is there, or None."""
    found = [identity for _, identity in checkpoint.identities(run_dir)]
    try:
        found += [stage["identity"] for stage in hf_folder.read_stages(run_dir / "hf")[-1:]]
    except DataError:  # `is_finished` says what is wrong
        pass
    lengths = [identity for identity in found
               if isinstance((identity.get("length") or {}).get("max_steps"), int)]
    return max(lengths, key=lambda identity: identity["length"]["max_steps"], default=None)


def find_parts(
    config: PretrainConfig, identity_of: Callable[[Parts], Identity]
) -> Parts:
    """Return the earlier parts of a run, by what its directory holds.

    Args:
        identity_of: the identity of the run as typed, if it had these earlier parts.
    Returns:
        As in an identity; none for a new run, and for one that cannot be extended as typed, which
        the comparison of identities then refuses.
    Raises:
        ConfigError: there is no checkpoint to extend the run from, or no run.
    """
    run_dir = Path(config.output_dir)
    old = _record(run_dir)
    if old is None:
        if config.extend:
            raise ConfigError(f"--extend: --output_dir {run_dir} holds no run to extend; leave "
                              "--extend out, or give the folder of the run")
        return []
    before, steps = parts.of(old), old["length"]["max_steps"]
    if config.max_steps <= steps:
        return before if config.max_steps == steps else []
    longer: Parts = [*before, {"max_steps": steps}]
    if not parts.can_extend(old, identity_of(longer)):
        return []
    if config.extend:
        path = checkpoint.find_checkpoint(run_dir, "auto", lambda step, found: found == old)
        if path is not None:
            longer[-1] |= {"to_step": int(path.name.removeprefix("step_")),
                           "schedule": old["train"]["schedule"]}
            return longer
        missing, add = "no complete checkpoint of it is left", ""
    else:
        begin, _ = parts.schedule_span(longer, config.max_steps)
        if not ds.same_steps(old["train"]["schedule"], identity_of(longer)["train"]["schedule"]):
            return []
        if checkpoint.find_checkpoint(run_dir, "auto", wanted(identity_of(longer))) is not None:
            return longer
        missing = "no complete checkpoint of the steps before its decay is left"
        add = "add --extend to go on from its newest checkpoint, or "
    raise ConfigError(
        f"--output_dir {run_dir}: made with --max_steps {steps}, and {missing} to extend it from; "
        f"{add}start a new run from its weights: --model_name_or_path {run_dir / 'hf'} "
        "--output_dir ANOTHER"
    )


def wanted(identity: Identity) -> Callable[[int, Identity], bool] | None:
    """Return which checkpoints a run may go on from, for `find_checkpoint`; None: it checks all."""
    if not parts.of(identity):
        return None
    return lambda step, found: parts.how_to_go_on(found, step, identity) is not None


def restart_or_refuse(
    engine: Any, resumed_from: Path | None, step: int, identity: Identity
) -> None:
    """Begin the schedule of a new part at its first step.

    Args:
        resumed_from: the checkpoint that was loaded, if any; it was taken at `step`.
    Raises:
        DataError: the steps of an earlier schedule are lost, and this command cannot repeat them.
    """
    if resumed_from is None:
        if any("to_step" in part for part in parts.of(identity)):
            raise DataError("no complete checkpoint is left of the run that this one extends; "
                            "start a new run from the weights of its hf/ (--model_name_or_path), "
                            "in another --output_dir")
    elif parts.how_to_go_on(checkpoint.identity_of(resumed_from), step, identity) == "restart":
        ds.restart_schedule(engine)


def stable_step(identity: Identity) -> int | None:
    """Return the last step before the decay of a wsd schedule: what an extension starts from."""
    length, schedule = identity["length"], identity["train"]["schedule"]
    begin, _ = parts.schedule_span(parts.of(identity), length["max_steps"])
    stable = ds.stable_steps(schedule)
    return begin + int(stable) if 0 < stable < length["max_steps"] - begin else None


def describe(identity: Identity) -> list[str]:
    """Say in one line what is extended, and by what; nothing for other runs."""
    earlier, steps = parts.of(identity), identity["length"]["max_steps"]
    if not earlier:
        return []
    last = earlier[-1]
    how = (f"a schedule of its own from step {last['to_step'] + 1}" if "to_step" in last
           else "its schedule goes on")
    return [f"extends a run of {last['max_steps']} steps to {steps}: {how}"]
