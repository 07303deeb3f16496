"""How a mask index was made, in sentences: read off the JSON beside it and those behind it.

index -> the scores or index that it was chosen by -> the scorer's run -> its annotation. What is
not there any more, or was made anew since, is said; nothing here is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preprocess.errors import DataError
from preprocess.store import TokenStore, array_path, file_sha256, open_array, read_json

# How each strategy of `STRATEGIES` chooses, with the options that an index records.
RULES = {
    "random": "{rate} of the tokens of each sequence, drawn at random once (seed {seed}).",
    "whole_word": "Whole words, drawn at random once (seed {seed}), up to {rate} of the tokens of "
    "each sequence.",
    "selective": "In each sequence the tokens that {scores} calls important (log-odds above 0: "
    "important rather than not), best first: at most {rate} of the sequence, rounded down, but one "
    "is always allowed. A sequence without such a token gets no mask.",
    "selective_fill": "In each sequence the tokens that {scores} calls important (log-odds above "
    "0), best first, at most {rate} of the sequence; then others drawn at random (seed {seed}) up "
    "to {rate}.",
    "random_matched": "As many tokens of each sequence as {match} masks, drawn at random once "
    "(seed {seed}): the control that knows nothing of importance.",
}


@dataclass(frozen=True)
class Origin:
    """sentences: how the index was made. scores: name of the scores it was chosen by, if whole."""

    sentences: list[str]
    scores: str | None


def explain(store: TokenStore, name: str) -> Origin:
    """Say how an index was made; through `random_matched`, how the matched one was."""
    sentences: list[str] = []
    scores, seen = None, set()
    current: str | None = name
    while current is not None and current not in seen:
        seen.add(current)
        options = _options(store, current)
        strategy = str(options.get("strategy"))
        rate = options.get("mlm_probability")
        texts = {
            "rate": f"{100 * rate:g} %" if isinstance(rate, (int, float)) else "a share",
            "seed": options.get("seed"),
            "scores": _name_of(options.get("scores")),
            "match": _name_of(options.get("match")),
        }
        rule = RULES.get(strategy, "Not recorded how.").format(**texts)
        sentences.append(f"{current} ({strategy}): {rule}")
        scores = texts["scores"] if options.get("scores") else None
        current = texts["match"] if options.get("match") else None
        for kind, behind in (("scores", scores), ("mask", current)):
            if behind and not _is_same(store, behind, kind, options):
                sentences.append(f"{behind} is gone, or was made anew since.")
                return Origin(sentences, None)
    if scores:
        sentences += _explain_scores(store, scores)
    return Origin(sentences, scores)


def _options(store: TokenStore, name: str) -> dict[str, Any]:
    """The options of an index: those of its first shard, which all of them share."""
    info = open_array(store.shards[0], name, "mask")[1]
    options = info.get("options")
    return options if isinstance(options, dict) else {}


def _name_of(recorded: Any) -> str:
    """The name in `NAME (sha256 0123456789abcdef)`, as build_masks.py records it."""
    return str(recorded).partition(" ")[0]


def _is_same(store: TokenStore, name: str, kind: str, options: dict[str, Any]) -> bool:
    """Whether an array that was read is still there, with the content that it had."""
    recorded = str(options.get("scores" if kind == "scores" else "match"))
    try:
        infos = [open_array(shard, name, kind)[1] for shard in store.shards]
    except DataError:
        return False
    return f"sha256 {infos[0]['sha256'][:16]}" in recorded


def _explain_scores(store: TokenStore, name: str) -> list[str]:
    info = open_array(store.shards[0], name, "scores")[1]
    made_by = str(info.get("model") or "")
    fingerprint = str(info.get("model_fingerprint") or "not recorded")
    file = array_path(store.shards[0], name, "scores").name
    if not made_by:
        return [f"{name}: scores of an unknown scorer, in {file}."]
    sentences = [
        f"{name}: log-odds that a token is important, given by the scorer {made_by} (fingerprint "
        f"{fingerprint[:16]})."
    ]
    run = Path(made_by).parent
    results = _read(run / "results.json")
    weights = sorted(Path(made_by).glob("*.safetensors")) if Path(made_by).is_dir() else []
    if len(weights) != 1 or not results:
        return [*sentences, "What it learned from is not known here: that folder is gone."]
    if file_sha256(weights[0]) != fingerprint:
        return [*sentences, "The scorer in that folder was fitted anew since."]
    found = [results.get(key) for key in ("precision", "recall")]
    if all(isinstance(value, float) for value in found):
        precision, recall = found
        sentences.append(
            f"On annotated texts kept aside, {100 * precision:.0f} % of what it calls important "
            f"is, and it finds {100 * recall:.0f} % of what is."
        )
    return sentences + _explain_annotation(str(results.get("annotations")))


def _explain_annotation(prefix: str) -> list[str]:
    options = _read(Path(f"{prefix}.importance.json"))
    if not options:
        return [f"It learned from the annotation {prefix}, which is not there any more."]
    text = (
        f"It learned from the annotation {prefix}: a token of a training text of the task "
        f"{options.get('task')} is important if reading up to it brings the classifier's "
        f"confidence in the label to within delta {options.get('delta')} of that in the whole "
        f"sentence (measure {options.get('measure')}, criterion {options.get('criterion')}"
    )
    text += "; stop words never are)." if options.get("drop_stop_words") else ")."
    return [text]


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, or nothing."""
    try:
        return read_json(path)
    except (DataError, OSError):
        return {}
