"""Scores by a network: the token scorer, a classifier's gradient, a language model's surprise.

- `scorer`: log-odds of "important" by the fitted token classifier (`train/stages/scoring.py`).
- `gradient`: |sum over d of (dz/de)_d e_d| of a token's word embedding e, where z is by how much
  the logit of the predicted class is above the runner-up's. The logit, not its probability or the
  loss: those multiply all gradients of a confident text by almost 0.
- `surprise`: -ln P(token | the rest of its sentence) of a masked-language model. One pass per
  token (Salazar 2020) masks much less than the model was trained on and costs too much; here pass
  j masks every k-th word from the j-th on, and predicts masked rows only. Of a split word the
  pieces from the target to its end are masked, since later pieces give the word away (PLL-word-l2r,
  Kauf and Ivanova 2023). A sentence of at most k words gets its exact pseudo-likelihood.
- `excess`: surprise minus that of a reference model, after Rho-1 (Lin 2024).

Letters: `T` tokens, `N` windows, `R` masked inputs, `B` rows of a pass, `L` slots of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from preprocess.errors import ConfigError
from preprocess.masking.draws import counter_bits
from preprocess.masking.measures import COUNTED, Measure
from preprocess.store import ranges
from preprocess.text.continuations import WordTable, find_continuations
from train.model import (
    first_slot_only,
    load_classifier,
    load_config,
    load_masked_lm,
    load_scorer,
)
from train.stages.gradient import margin_gradient
from train.stages.inference import BATCH_TOKENS, IdLists, Runner, Template
from train.stages.scoring import Answers, WindowScore, each_token

FLOOR = 2.0**-16
"""Least gradient that is told from none; fp32 sums of a margin of 1 are not much better."""

NUM_PASSES = 7  # masks 14 % of a sentence, about what a model was trained with
STREAM_PASSES = 100  # of `counter_bits`: apart from those of masking


# --------------------------------------------------------------------------- gradient


def gradient_size(runner: Runner, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Return the gradient score of each slot of a batch: a `Compute` of a `Runner`.

    Returns:
        log2 of the absolute value in units of `FLOOR`, at least 0, `(B, L)` float16.
    """
    value = margin_gradient(runner, model, inputs).abs()
    return (value / FLOOR).clamp(min=1).log2().half()


# --------------------------------------------------------------------------- surprise


class WordPasses(NamedTuple):
    """How surprise masks: its passes, whole words or pieces from left to right, and word starts."""

    num_passes: int
    whole_words: bool
    words: WordTable


class MaskedInputs(NamedTuple):
    """Windows with masked words, one after the other.

    inputs: ids, `[MASK]` at masked tokens, R inputs of `S` slots together.
    targets: the id to predict at each slot, -1 where nothing is asked, `(S,)` int64.
    places: the token of the windows that each slot is, `(S,)` int64.
    """

    inputs: IdLists
    targets: np.ndarray
    places: np.ndarray


def hash_windows(windows: IdLists) -> np.ndarray:
    """Return a number per window from its ids alone, `(N,)` int64: the same in any store."""
    if not len(windows):
        return np.empty(0, np.int64)
    starts = np.cumsum(windows.lengths) - windows.lengths
    ids = windows.tokens().astype(np.uint64) + np.uint64(1)
    place = ranges(np.zeros_like(starts), windows.lengths).astype(np.uint64) + np.uint64(1)
    return counter_bits(0, 0, np.add.reduceat(ids * place, starts), STREAM_PASSES).astype(np.int64)


def mask_words(
    windows: IdLists, continues: np.ndarray, first: np.ndarray, num_passes: int,
    whole_words: bool, mask_id: int,
) -> MaskedInputs:
    """Make the inputs that ask for every token of every window once.

    Word i of a window is masked in pass j where (i + first) mod `num_passes` = j. The pass has one
    input for each number p of a piece that these words have: it masks their pieces from p on and
    asks for piece p; with `whole_words` it masks and asks for all pieces at once.
    Worked example: five words of one piece, 3 passes, first 0: masked are {0, 3}, {1, 4}, {2}.

    Args:
        windows: none of them empty.
        continues: which of their tokens continue a word; a first one never does, `(T,)` bool.
        first: shifts the words of each window, `(N,)` int64.
    """
    lengths = windows.lengths
    tokens, token_places = windows.tokens(), ranges(windows.starts, lengths)
    starts = np.cumsum(lengths) - lengths
    owner = np.repeat(np.arange(len(lengths)), lengths)
    begins = np.flatnonzero(~continues)
    word = np.cumsum(~continues) - 1
    piece = np.arange(len(tokens)) - begins[word]
    residue = (word - word[starts][owner] + first[owner]) % num_passes
    asked = np.zeros_like(piece) if whole_words else piece
    most = int(asked.max(initial=0)) + 1
    inputs = np.unique((owner * num_passes + residue) * most + asked)  # what some token needs
    window = inputs // (num_passes * most)
    row = np.repeat(np.arange(len(inputs)), lengths[window])
    source = ranges(starts[window], lengths[window])
    from_piece = (inputs % most)[row]
    masked = (residue[source] == (inputs // most % num_passes)[row]) & (piece[source] >= from_piece)
    ids = tokens[source].astype(np.int64)
    targets = np.where(masked & (asked[source] == from_piece), ids, -1)
    ids[masked] = mask_id
    ends = np.cumsum(lengths[window])
    return MaskedInputs(
        IdLists(ids, ends - lengths[window], lengths[window]), targets, token_places[source])


def surprise(
    runner: Runner, windows: IdLists, share: tuple[int, int], passes: WordPasses
) -> Answers:
    """Yield what a runner of `masked_loss` answers about each token; see `WindowScore`."""
    bounds = np.append(0, np.cumsum(windows.lengths))
    continues = find_continuations(windows.tokens(), bounds, passes.words)
    made = mask_words(
        windows, continues, hash_windows(windows), passes.num_passes, passes.whole_words,
        runner.tokenizer.mask_token_id)
    for batch, found, _ in runner.run(made.inputs, share=share, targets=made.targets):
        slots = ranges(made.inputs.starts[batch], made.inputs.lengths[batch])
        yield made.places[slots[made.targets[slots] >= 0]], found


def masked_loss(runner: Runner, models: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Return the cross entropy at the targets of a batch: a `Compute` of a `Runner`.

    Args:
        models: one or two masked-language models; the loss of the second is subtracted.
    Returns:
        Nats, `(C,)` float32, of its targets in order.
    """
    ids, filled = inputs["input_ids"], inputs.get("attention_mask")
    pieces = torch.zeros_like(ids) if filled is None else 1 - filled
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    with torch.inference_mode():
        first, *others = (
            model.cross_entropies(ids, positions, pieces, inputs["masked_positions"],
                                  inputs["masked_labels"], inputs["most_masked"])
            for model in models)
        return first - others[0] if others else first


# --------------------------------------------------------------------------- the models


class Network(NamedTuple):
    """What a measure needs beside its score: a kind of checkpoint, and how it is run.

    suffixes: of the class that its checkpoint must name.
    remedy: what to give instead of another one.
    load: (names of the model and its reference, trust_remote_code) -> the model of a `Runner`.
    run: further arguments of the `Runner`.
    slots: share of `BATCH_TOKENS` that a pass takes by default.
    block: share of `scoring.BLOCK_TOKENS` that is scored between two writes.
    """

    suffixes: tuple[str, ...]
    remedy: str
    load: Callable[[list[str], bool], Any]
    run: dict[str, Any] = {}
    slots: float = 1
    block: float = 1


def _load_scorer(names: list[str], trust_remote_code: bool) -> Any:
    return load_scorer(names[0], 0, trust_remote_code, trained=True)


def _load_classifier(names: list[str], trust_remote_code: bool) -> Any:
    config = load_config(names[0], trust_remote_code)
    labels = tuple(config.id2label[i] for i in range(config.num_labels))
    model = load_classifier(names[0], labels, 0, trust_remote_code, trained=True)
    first_slot_only(model)
    return model.requires_grad_(False)  # but the embeddings' output


def _load_masked_lms(names: list[str], trust_remote_code: bool) -> nn.ModuleList:
    models = []
    for flag, name in zip(("model_name_or_path", "reference"), names, strict=False):
        models.append(load_masked_lm(name, 0, trust_remote_code))
        if models[-1].fresh_head:
            raise ConfigError(
                f"--{flag} {name}: its weights have no masked-language-model head, and one that "
                "was drawn knows nothing; give the hf/ folder of train/pretrain.py"
            )
    return nn.ModuleList(models)


_MASKED_LM = Network(
    ("ForMaskedLM", "ForPreTraining"), "give the hf/ folder of train/pretrain.py",
    _load_masked_lms,
    {"compute": masked_loss,
     "to_half": lambda models, dtype: nn.ModuleList([model.in_half(dtype) for model in models])},
    block=1 / 16,  # a token is read in every pass
)

NETWORKS: dict[str, Network] = {
    "scorer": Network(
        ("ForTokenClassification",), "give the hf/ folder of train/fit_scorer.py", _load_scorer),
    "classifier": Network(
        ("ForSequenceClassification",), "give seed_N/hf of train/finetune.py", _load_classifier,
        {"compute": gradient_size, "work": 2},
        slots=1 / 4,  # the states of all layers stay until the backward pass
    ),
    "mlm": _MASKED_LM,
}

MEASURES: dict[str, Measure] = {
    **COUNTED,
    "scorer": Measure(
        each_token, ("scorer",), reads_labels=True, boundary=True, unit="log-odds",
        rule="log-odds of the token scorer that a token is important"),
    "gradient": Measure(
        each_token, ("classifier",), reads_labels=True, boundary=False, unit="log2",
        rule="log2 of |gradient x word embedding| of the classifier's margin between its two best "
        "logits, in units of 2^-16; 0 is that or less"),
    "surprise": Measure(
        surprise, ("mlm",), reads_labels=False, boundary=False, unit="nats",
        rule="-ln P(token) of a masked-language model that sees the rest of the sentence but every "
        "k-th word"),
    "excess": Measure(
        surprise, ("mlm", "reference"), reads_labels=False, boundary=True, unit="nats",
        rule="surprise of the model minus that of the reference"),
}
"""Every measure; a network's `score` is a `WindowScore`, for surprise with its passes bound."""


def open_runner(
    measure: str, names: list[str], template: Template, tokenizer: Any, device: torch.device,
    batch_tokens: int | None, half: torch.dtype | None, trust_remote_code: bool = False,
) -> Runner:
    """Load what a measure needs, ready to run.

    Args:
        names: of the model, and of its reference if there is one.
    Raises:
        ConfigError: not a whole checkpoint of its kind.
    """
    network = NETWORKS[MEASURES[measure].needs[0]]
    slots = batch_tokens or int(BATCH_TOKENS[device.type] * network.slots)
    return Runner(network.load(names, trust_remote_code), template, tokenizer, device, slots,
                  half=half, **network.run)


def bind(measure: str, passes: WordPasses | None) -> WindowScore:
    """Return what `score_block` computes for a measure.

    Args:
        passes: for those that mask words.
    """
    score = MEASURES[measure].score
    return score if passes is None else partial(score, passes=passes)
