"""What fine-tuning reads and checks before a process group starts, for one run or for several."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from preprocess.corpus import Example, Task, limit_labels, limit_splits, load_task
from preprocess.identity import digest
from preprocess.text.encode import prepare_backend
from train.config import FinetuneConfig
from train.engine import Resolved
from train.model import (
    check_agreement,
    describe_head,
    fit_row_length,
    load_config,
    load_tokenizer,
)
from train.run_dir.hf_folder import Weights, open_weights
from train.run_dir.identity import numerics
from train.stages.examples import (
    Examples,
    balanced_weights,
    encode_inputs,
    make_examples,
    reweighted,
)
from train.stages.supervised import make_identity, resolve

SPLITS = ("train", "validation", "test")
DEFAULT_LEARNING_RATE = 2e-5


def encode(
    tokenizer: Any, examples: list[Example], max_seq_length: int, segments: bool
) -> Examples:
    """Turn a split into examples, by `encode_inputs`.

    Args:
        segments: whether the model distinguishes the two parts by token types.
    """
    texts = [example.text for example in examples]
    # One that is empty is an aspect too: a cut split may have no other, and is one of pairs still.
    pairs = any(example.aspect is not None for example in examples)
    aspects = [example.aspect or "" for example in examples] if pairs else None
    ids, types = encode_inputs(tokenizer, texts, aspects, max_seq_length)
    labels = [example.label for example in examples]
    return make_examples(ids, types if segments else None, labels, [1.0] * (max(labels) + 1))


@dataclass(frozen=True)
class FinetuneInputs:
    """Everything read and checked before a process group starts.

    splits, encoded: by the names in `SPLITS`. class_weights: `(C,)` float64, of the loss. parent:
    the weights that every seed starts from. identities: the record of each seed. numerics: that of
    all. head: a sentence about the head.
    """

    config: FinetuneConfig
    task: Task
    splits: dict[str, list[Example]]
    encoded: dict[str, Examples]
    class_weights: np.ndarray
    tokenizer: Any
    resolved: Resolved
    parent: Weights
    identities: dict[int, dict[str, Any]]
    numerics: dict[str, Any]
    head: str

    @property
    def pretraining(self) -> list[dict[str, Any]]:
        """Return the stages of pre-training behind the weights, oldest first."""
        return [stage for stage in self.parent.stages if stage["stage"] == "pretrain"]


class _Start(NamedTuple):
    """What a run starts from. `reads` says how its tokenizer reads a text."""

    hf_config: Any
    tokenizer: Any
    parent: Weights
    segments: bool
    reads: str


def _open_start(config: FinetuneConfig, task: Task) -> _Start:
    hf_config = load_config(config.model_name_or_path, config.trust_remote_code)
    tokenizer = load_tokenizer(config.model_name_or_path, config.trust_remote_code)
    check_agreement(
        hf_config, tokenizer, config.model_name_or_path,
        pair=any(example.aspect for split in SPLITS for example in task.splits[split]),
    )
    backend = prepare_backend(tokenizer).to_str()
    return _Start(
        hf_config, tokenizer, open_weights(config.model_name_or_path),
        getattr(hf_config, "type_vocab_size", 0) > 1,
        hashlib.sha256(backend.encode()).hexdigest(),
    )


def read_inputs(configs: Sequence[FinetuneConfig]) -> list[FinetuneInputs]:
    """Read the task, the tokenizer and the weights, encode the splits, settle the JSON.

    Args:
        configs: of one task. What several of them share is read and encoded once.
    """
    first = configs[0]
    files = {name: value for name, value in first.task_files().items()
             if name not in ("label_budget", "label_seed")}
    whole = load_task(first.task, **files)
    starts: dict[str, _Start] = {}
    encoded: dict[Any, Examples] = {}
    found = []
    for config in configs:
        task = limit_labels(whole, config.label_budget, config.label_seed)
        name = config.model_name_or_path
        if name not in starts:
            starts[name] = _open_start(config, task)
        start = starts[name]
        config = fit_row_length(start.hf_config, config)
        splits = limit_splits(task.splits, config.max_train_samples, config.max_eval_samples)
        keys = {split: (split, start.reads, start.segments, config.max_seq_length,
                        *(config.choice_of_labels().values() if split == "train" else ()))
                for split in SPLITS}
        for split, key in keys.items():
            if key not in encoded:
                encoded[key] = encode(
                    start.tokenizer, splits[split], config.max_seq_length, start.segments)
        found.append(_settle(
            config, task, splits, {split: encoded[key] for split, key in keys.items()}, start))
    return found


def _settle(
    config: FinetuneConfig, task: Task, splits: dict[str, list[Example]],
    encoded: dict[str, Examples], start: _Start,
) -> FinetuneInputs:
    """Settle the JSON, the weights of the classes, and the identity of each seed."""
    weights = np.ones(len(task.labels))
    if config.class_weights == "balanced":
        weights = balanced_weights([e.label for e in splits["train"]], len(task.labels))
        encoded = {name: reweighted(one, weights) for name, one in encoded.items()}
    resolved = resolve(config, encoded["train"], DEFAULT_LEARNING_RATE)
    content = digest([
        task.labels,
        [[[e.item, e.label] for e in splits[name]] for name in SPLITS],
        # Of the texts and of the tokenizer that read them.
        [[ids.tolist() for ids in encoded[name].input_ids] for name in SPLITS],
    ])
    identities = {
        seed: make_identity(
            "finetune", config, resolved, start.hf_config, encoded["train"], seed=seed,
            inputs={"task": content, "weights": start.parent.hf_digest},
            split={"labels": len(splits["train"]),
                   "test_items": digest([e.item for e in splits["test"]])},
            options={"max_eval_samples": config.max_eval_samples,
                     "class_weights": config.class_weights, **config.choice_of_epoch(),
                     **config.choice_of_labels()},
        )
        for seed in config.seed_list()
    }
    head = describe_head(start.hf_config, "ForSequenceClassification", task.labels)
    return FinetuneInputs(config, task, splits, encoded, weights, start.tokenizer, resolved,
                          start.parent, identities, numerics(config, resolved), head)
