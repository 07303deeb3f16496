"""Give a masked language model of transformers a loss that computes its head on masked rows only.

`patch` swaps the class of one model for a subclass of the same name with another `forward`; the
encoder, the parameters and everything else stay those of transformers. Not an attribute of the
instance, because replicas of a model (`DataParallel`) and accelerate's wrappers bind `forward`
anew. Copies and pickles of a patched model are patched; what `save_pretrained` writes is a plain
checkpoint.

Letters: `B` rows, `S` slots of a row, `D` hidden size, `V` vocabulary.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch.nn import functional

import csrc
from csrc import reference
from preprocess.errors import ConfigError
from train.model.families import FAMILIES
from train.model.packed import masked_lm_head

Model = TypeVar("Model")

IGNORED = -100  # transformers' label of a position without a loss


def patch(model: Model) -> Model:
    """Let a `...ForMaskedLM` model compute head and loss on masked rows only, in place.

    With `labels`, `(B, S)` int64 with -100 where nothing is asked, `forward` returns the same loss
    as before, to rounding, as do the gradients: the mean over the labels, or their sum divided by
    `num_items_in_batch` where that is given, as transformers' Trainer does. A batch without a label
    has the loss 0. `logits` are None while the model is in training mode, and those of all
    positions, `(B, S, V)`, in evaluation mode; `skip_logits` decides otherwise. Without `labels`,
    `forward` is unchanged. The loss has one backward pass.

    Args:
        model: a masked language model of a family in `FAMILIES`, of transformers' own class, before
            Trainer, accelerate or peft wraps it. A model that is patched stays as it is.
    Returns:
        The model.
    Raises:
        ConfigError: another model, or a head with an unknown activation.
    """
    plain = type(model)
    if hasattr(plain, "_unpatched"):
        return model
    family = getattr(getattr(model, "config", None), "model_type", None)
    own = f"transformers.models.{family}.modeling_{family}"
    if family not in FAMILIES or plain.__module__ != own or not plain.__name__.endswith(
            "ForMaskedLM"):
        raise ConfigError(
            f"patch: {plain.__module__}.{plain.__name__} is not a ...ForMaskedLM of transformers "
            f"for {', '.join(FAMILIES)}; load one with AutoModelForMaskedLM"
        )
    if "forward" in vars(model):
        raise ConfigError(
            f"patch: the forward of this {plain.__name__} has been replaced already; patch the "
            "model before Trainer, accelerate or a hook wraps it"
        )
    masked_lm_head(model)
    model.__class__ = _patched(plain)  # type: ignore[arg-type]
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch`, in place; other models stay as they are."""
    model.__class__ = getattr(type(model), "_unpatched", type(model))
    return model


@functools.cache
def _patched(plain: type) -> type:
    """Make the subclass of a class of transformers that a patched model has."""
    whole: Any = plain.forward  # type: ignore[attr-defined]
    signature = inspect.signature(whole)

    def forward(self: Any, *given: Any, skip_logits: bool | None = None, **options: Any) -> Any:
        bound = signature.bind(self, *given, **options).arguments
        inputs = {name: value for name, value in bound.items() if name not in ("self", "kwargs")}
        inputs |= bound.get("kwargs", {})
        labels = inputs.pop("labels", None)
        if labels is None:
            return whole(self, *given, **options)
        return _masked_rows_only(self, labels, inputs, skip_logits)

    # Trainer reads the arguments of a model from it. `functools.wraps` would leave a way around
    # this function, which accelerate takes where it removes its own wrappers.
    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.__doc__ = whole.__doc__
    return type(plain.__name__, (plain,), {
        "forward": forward, "_unpatched": plain, "__reduce_ex__": _reduce,
        "__module__": plain.__module__, "__qualname__": plain.__qualname__,
    })


def _reduce(self: Any, protocol: Any) -> Any:
    """Copy and pickle a patched model by its class of transformers, which pickle can find."""
    state = object.__reduce_ex__(self, protocol)[2:]
    return _empty, (type(self)._unpatched,), *state


def _empty(plain: type) -> Any:
    return object.__new__(_patched(plain))


def _masked_rows_only(
    model: Any, labels: torch.Tensor, inputs: dict[str, Any], skip_logits: bool | None
) -> Any:
    """Compute what the `forward` of a patched model returns for labels.

    Args:
        inputs: the other arguments of `forward`, by name.
    """
    from transformers.modeling_outputs import MaskedLMOutput

    as_object = inputs.pop("return_dict", None)
    divisor = inputs.pop("num_items_in_batch", None)
    encoded = FAMILIES[model.config.model_type].encoder(model)(**inputs, return_dict=True)
    hidden = encoded.last_hidden_state
    head, labels = masked_lm_head(model), labels.to(hidden.device)
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels have shape {tuple(labels.shape)}: must be "
                         f"{tuple(hidden.shape[:-1])}, one per token")
    positions = (labels.flatten() != IGNORED).nonzero().squeeze(1)
    targets = labels.flatten()[positions]
    vocab = len(head.decoder_weight)
    # csrc takes -1 for padding, and on a GPU it does not look at values.
    if len(targets) and (targets.min() < 0 or targets.max() >= vocab):
        wrong = targets[(targets < 0) | (targets >= vocab)][0]
        raise ValueError(f"labels hold {int(wrong)}: must be in [0, {vocab - 1}], or {IGNORED} "
                         "where nothing is asked")
    if divisor is None:
        divisor = len(targets)
    logits = None
    if model.training if skip_logits is None else skip_logits:
        loss = _loss_sum(hidden, positions, targets, head)
    else:
        logits = reference.logits(hidden, head)
        rows = logits.flatten(0, 1)[positions].float()
        loss = functional.cross_entropy(rows, targets, reduction="sum")
    loss = loss / torch.as_tensor(divisor, device=loss.device).clamp(min=1)
    found = MaskedLMOutput(
        loss=loss, logits=logits, hidden_states=encoded.get("hidden_states"),
        attentions=encoded.get("attentions"),
    )
    as_object = model.config.return_dict if as_object is None else as_object
    return found if as_object else found.to_tuple()


def _loss_sum(
    hidden: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor, head: csrc.MaskedLMHead
) -> torch.Tensor:
    """Sum the cross entropies, in the dtype of autocast where it is on."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        tensors: dict[str, Any] = {name: t.to(dtype) for name, t in head.tensors().items()}
        hidden, head = hidden.to(dtype), replace(head, **tensors)
    if not len(positions):  # so that every parameter gets its gradient on every rank
        positions = targets = torch.full((1,), csrc.PADDING, device=hidden.device)
    with torch.autocast(kind, enabled=False):
        return csrc.masked_lm_loss(hidden, positions, targets, head)[0]
