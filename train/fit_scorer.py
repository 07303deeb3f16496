"""Fit the token scorer on annotated task texts.

Each annotated sentence is one example, `[CLS] sentence [SEP]`; a token is important (1) or not
(0), and an important one counts `--positive_weight` times. Tokens that were not annotated and
special tokens are left out of the loss and the metrics. A share of the texts is held out by a hash
of their content; the epoch with the best F1 of "important" on them (the first of equals) is kept.

    deepspeed train/fit_scorer.py --deepspeed_config ds_configs/cpu.json --annotations A \
        --model_name_or_path R1/hf --output_dir RS

writes `RS/hf/` and `RS/results.json`: precision, recall, F1 and average precision beside two
baselines without context.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.errors import DataError, run_command
from preprocess.files import atomic_write_json, read_json
from preprocess.identity import compare, digest, sealed
from preprocess.progress import say
from preprocess.store import TokenStore, open_array
from train.config import FitScorerConfig, parse
from train.engine import barrier, finish, gather_objects, is_main, start
from train.model import (
    SCORER_LABELS,
    check_agreement,
    describe_head,
    fit_row_length,
    load_config,
    load_scorer,
    load_tokenizer,
)
from train.run_dir.checkpoint import check_identity, find_checkpoint
from train.run_dir.folder import check_run_dir, prepare_run_dir, sole_writer
from train.run_dir.hf_folder import is_whole, open_weights
from train.run_dir.identity import (
    hyperparameters,
    numerics,
)
from train.run_dir.metrics import EVAL_F1, EVAL_LOSS, short_path
from train.run_dir.model_card import public_name
from train.stages.examples import IGNORED, Examples, make_examples
from train.stages.inference import Template, special_template
from train.stages.scores import average_precision, best_threshold, precision_recall_f1
from train.stages.supervised import (
    describe_plan,
    fit,
    make_identity,
    remove_resume_state,
    resolve,
)

NOT_ANNOTATED = 255
DEFAULT_LEARNING_RATE = 1e-5
TAGS = {"loss": EVAL_LOSS, "f1": EVAL_F1}


@dataclass(frozen=True)
class Annotated:
    """Sentences with at least one annotated token.

    tokens, importance: one array per sentence, `(n,)` uint16 and uint8 (0, 1 or `NOT_ANNOTATED`).
    text_keys: hash of the text that each sentence is from, `(N,)` uint64.
    """

    tokens: list[np.ndarray]
    importance: list[np.ndarray]
    text_keys: np.ndarray

    def choose(self, keep: np.ndarray) -> Annotated:
        """Return the sentences where `keep`, `(N,)` bool, is true."""
        chosen = np.flatnonzero(keep)
        return Annotated(
            [self.tokens[i] for i in chosen], [self.importance[i] for i in chosen],
            self.text_keys[chosen],
        )

    def counted(self) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and importance (bool) of all annotated tokens, one after the other."""
        tokens = np.concatenate(self.tokens)
        importance = np.concatenate(self.importance)
        keep = importance != NOT_ANNOTATED
        return tokens[keep], importance[keep] == 1


def read_annotations(store: TokenStore, limit: int) -> Annotated:
    """Read the annotated sentences of a store, each cut to `limit` tokens.

    Raises:
        DataError: no importance array, no annotated token, or no important one.
    """
    tokens, importance, keys = [], [], []
    for shard in store.shards:
        array, _ = open_array(shard, "", "importance")
        for document in range(shard.num_documents):
            first, last = shard.document_offsets[document : document + 2]
            bounds = shard.sequence_offsets[first : last + 1]
            text = shard.tokens[bounds[0] : bounds[-1]].tobytes()
            key = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
            for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
                end = min(end, begin + limit)
                if (array[begin:end] != NOT_ANNOTATED).any():
                    tokens.append(np.array(shard.tokens[begin:end]))
                    importance.append(np.array(array[begin:end]))
                    keys.append(key)
    if not tokens:
        raise DataError(
            f"--annotations {store.prefix}: no token is annotated (the classifier got every text "
            "wrong); annotate with a better classifier"
        )
    if not any((values == 1).any() for values in importance):
        raise DataError(
            f"--annotations {store.prefix}: no token is important; annotate again with a larger "
            "--delta"
        )
    return Annotated(tokens, importance, np.array(keys, dtype=np.uint64))


def annotation_digest(store: TokenStore) -> str:
    """Digest the annotations: the store with its tokenizer, and each shard's importance array."""
    arrays = [open_array(shard, "", "importance")[1]["sha256"] for shard in store.shards]
    return digest([store.fingerprint, *arrays])


def choose_dev(text_keys: np.ndarray, fraction: float) -> np.ndarray:
    """Choose the texts to hold out: those with the smallest hashes, whatever their order.

    All sentences of a text and of its copies fall on one side.

    Args:
        text_keys: `(N,)` uint64.
        fraction: share of the distinct texts; at least one is chosen and one is left.
    Returns:
        `(N,)` bool.
    Raises:
        DataError: fewer than two distinct texts.
    """
    different = np.unique(text_keys)
    if len(different) < 2:
        raise DataError("one annotated text only; annotate two or more, so that one is held out")
    count = min(max(1, round(fraction * len(different))), len(different) - 1)
    return text_keys < different[count]


def encode(sentences: Annotated, template: Template, positive_weight: float) -> Examples:
    """Put special tokens around the sentences; only annotated tokens have a target."""
    ids, targets = [], []
    for tokens, importance in zip(sentences.tokens, sentences.importance, strict=True):
        ids.append([*template.before, *tokens.tolist(), *template.after])
        target = np.full(len(ids[-1]), IGNORED)
        known = np.where(importance == NOT_ANNOTATED, IGNORED, importance.astype(np.int64))
        target[len(template.before) : len(template.before) + len(tokens)] = known
        targets.append(target)
    return make_examples(ids, None, targets, [1.0, positive_weight])


def score_decisions(
    labels: np.ndarray, decisions: np.ndarray, scores: np.ndarray
) -> dict[str, float]:
    """Return precision, recall, F1 and average precision of the important tokens, `(T,)` each."""
    precision, recall, f1 = precision_recall_f1(labels, decisions)
    return {
        "precision": precision, "recall": recall, "f1": f1,
        "average_precision": average_precision(labels, scores),
    }


def token_type_rates(tokens: np.ndarray, labels: np.ndarray, vocab_size: int) -> np.ndarray:
    """Estimate how often each token type is important, `(V,)` float64.

    One pseudo-occurrence at the overall rate is added to each type, so rare types stay near it.
    """
    overall = labels.mean()
    hits = np.bincount(tokens[labels], minlength=vocab_size)
    return (hits + overall) / (np.bincount(tokens, minlength=vocab_size) + 1)


def baselines(train: Annotated, dev: Annotated, vocab_size: int) -> dict[str, dict[str, float]]:
    """Return metrics on `dev` of calling all tokens important, and of one rate per token type."""
    tokens, labels = train.counted()
    rates = token_type_rates(tokens, labels, vocab_size)
    threshold = best_threshold(labels, rates[tokens])
    dev_tokens, dev_labels = dev.counted()
    ones = np.ones(len(dev_labels))
    return {
        "all_ones": score_decisions(dev_labels, ones > 0, ones),
        "token_type": score_decisions(
            dev_labels, rates[dev_tokens] >= threshold, rates[dev_tokens]
        ),
    }


def find_weak(results: dict[str, Any]) -> list[str]:
    """Say whether a scorer is not above its baselines, or calls no token important.

    It is measured by average precision, since ranks are its use; but some rules take only scores
    above 0, and they would mask next to nothing.
    """
    if not results["num_dev_important"]:
        return ["no important token is held out, so nothing tells how good the scorer is; annotate "
                "more text or raise --dev_fraction"]
    name, best = max(((name, one["average_precision"])
                      for name, one in results["baselines"].items()), key=lambda pair: pair[1])
    if results["average_precision"] > best:
        return [] if results["recall"] else [
            f"none of the {results['num_dev_important']:,} important held-out tokens has a score "
            "above 0, so masks of such tokens will be almost empty; annotate more text, or fit "
            "longer or with another --learning_rate"]
    return [f"average precision {results['average_precision']:.4f} on "
            f"{results['num_dev_tokens']:,} held-out tokens is not above the {best:.4f} of the "
            f"baseline {name}, which reads no context; annotate more text, or fit longer or with "
            "another --learning_rate"]


def is_finished(run_dir: Path, identity: dict[str, Any]) -> bool:
    """Return whether the scorer in `run_dir` is complete.

    Raises:
        ConfigError: what is there, finished or stopped, has another identity; says what differs.
        DataError: its model is damaged, and there is no checkpoint to export it from again.
    """
    if not (run_dir / "results.json").is_file():
        check_identity(run_dir, identity)
        return False
    compare(read_json(run_dir / "results.json").get("identity", {}), identity,
            f"--output_dir {run_dir}, a finished scorer", "give another --output_dir")
    return is_whole(run_dir, f"delete {run_dir} to fit it again")


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    config = parse(FitScorerConfig, argv)
    store = TokenStore.open(config.annotations)
    hf_config = load_config(config.model_name_or_path, config.trust_remote_code)
    tokenizer = load_tokenizer(config.model_name_or_path, config.trust_remote_code)
    check_agreement(
        hf_config, tokenizer, config.model_name_or_path, store=store,
        remedy="annotate with a classifier that was trained from this model",
    )
    config = fit_row_length(hf_config, config)
    template = special_template(tokenizer, pair=False)
    sentences = read_annotations(store, config.max_seq_length - template.num_special)
    is_dev = choose_dev(sentences.text_keys, config.dev_fraction)
    train, dev = sentences.choose(~is_dev), sentences.choose(is_dev)
    if not train.counted()[1].any():
        raise DataError(
            f"--annotations {config.annotations}: no important token is left to learn from; "
            "annotate more text"
        )
    encoded = {
        "train": encode(train, template, config.positive_weight),
        "dev": encode(dev, template, config.positive_weight),
    }
    resolved = resolve(config, encoded["train"], DEFAULT_LEARNING_RATE)
    say_sizes(train, dev)
    for line in describe_plan(config, resolved, encoded["train"]):
        say(line)
    say(describe_head(hf_config, "ForTokenClassification", SCORER_LABELS))
    run_dir = check_run_dir(config)
    if config.dry_run:
        return
    parent = open_weights(config.model_name_or_path)
    identity = make_identity(
        "fit_scorer", config, resolved, hf_config, encoded["train"], seed=config.seed,
        inputs={"store": annotation_digest(store), "weights": parent.hf_digest},
        options={"positive_weight": config.positive_weight, "dev_fraction": config.dev_fraction},
    )
    records = {"identity": identity, "numerics": numerics(config, resolved)}
    if is_finished(run_dir, identity):
        say(f"{run_dir}: finished already")
        if is_main():
            remove_resume_state(run_dir)  # a kill may have come in between
        return
    if config.resume == "must":
        find_checkpoint(run_dir, "must")
    with sole_writer(run_dir):
        # Another process may have ended there since.
        if gather_objects(is_finished(run_dir, identity))[0]:
            say(f"{run_dir}: finished already")
            return
        prepare_run_dir(config, resolved)
        device = start()
        dev_labels = dev.counted()[1]

        def assess(logits: list[np.ndarray]) -> dict[str, float]:
            targets = np.concatenate(encoded["dev"].targets)
            flat = np.concatenate(logits)[targets != IGNORED]
            odds = flat[:, 1] - flat[:, 0]
            return score_decisions(dev_labels, odds > 0, odds)

        model = load_scorer(config.model_name_or_path, config.seed, config.trust_remote_code)
        found = fit(
            model, resolved, encoded["train"], encoded["dev"], assess, config=config,
            seed=config.seed, select="f1", tags=TAGS,
            class_weights=np.array([1.0, config.positive_weight]),
            tokenizer=tokenizer, parent=parent, run_dir=run_dir, device=device, records=records,
            about={"base_model": public_name(config.model_name_or_path),
                   "data": Path(config.annotations).name, "license": parent.licence or None,
                   "counts": {"training_sentences": len(train.tokens)}},
            hyperparameters=hyperparameters(
                **records, model=config.model_name_or_path, data=short_path(config.annotations)
            ),
        )
        results = {
            **found.best,
            "baselines": baselines(train, dev, store.vocab_size),
            "best_epoch": found.best_epoch, "num_epochs": config.num_train_epochs,
            "steps": found.steps, "seconds": round(found.seconds, 2),
            "num_train_sentences": len(train.tokens), "num_dev_sentences": len(dev.tokens),
            "num_dev_tokens": len(dev_labels), "num_dev_important": int(dev_labels.sum()),
            "annotations": config.annotations, "model_name_or_path": config.model_name_or_path,
            "seed": config.seed, **sealed(identity), "numerics": records["numerics"],
        }
        results["weak"] = find_weak(results)
        if is_main():
            atomic_write_json(run_dir / "results.json", results)
            remove_resume_state(run_dir)
        found.log.close(finished=True)
        barrier()
    say_results(results)
    finish()


def say_sizes(train: Annotated, dev: Annotated) -> None:
    """Print how many sentences and tokens there are on both sides."""
    for name, part in (("train", train), ("dev", dev)):
        labels = part.counted()[1]
        say(f"{name}: {len(part.tokens)} sentences of {len(np.unique(part.text_keys))} texts, "
            f"{len(labels)} annotated tokens, {labels.mean():.1%} important")
    if not dev.counted()[1].any():
        say("warning: no important token is held out, so every epoch has F1 0 and the first is "
            "taken; annotate more text or raise --dev_fraction")


def say_results(results: dict[str, Any]) -> None:
    """Print the metrics of the scorer and of the baselines."""
    rows = {"scorer": results, **results["baselines"]}
    for name, row in rows.items():
        say(f"{name:10}  precision {row['precision']:.3f}  recall {row['recall']:.3f}  "
            f"F1 {row['f1']:.3f}  average precision {row['average_precision']:.3f}")
    say(f"best epoch {results['best_epoch']} of {results['num_epochs']}")
    for sentence in results["weak"]:
        say(f"warning: {sentence}")


if __name__ == "__main__":
    run_command(main)
