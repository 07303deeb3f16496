"""How a mask index was made, in words: read off the JSON beside it and those behind it.

index -> the scores or index that it was chosen by -> the scorer's run -> its annotation. What is
not there any more, or was made anew since, is said; nothing here is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preprocess.errors import DataError
from preprocess.files import file_sha256, read_json
from preprocess.store import TokenStore, array_path, open_array

# How each strategy of `STRATEGIES` chooses, with the options that an index records.
RULES = {
    "random": "{rate} of the tokens of each sequence, drawn at random once (seed {seed}).",
    "whole_word": "Whole words, drawn at random once (seed {seed}), up to {rate} of the tokens of "
    "each sequence.",
    "selective": "In each sequence the tokens that the scores {scores} call important (log-odds "
    "above 0: important rather than not), best first: at most {rate} of the sequence, rounded "
    "down, but one is always allowed. A sequence without such a token gets no mask.",
    "selective_fill": "In each sequence the tokens that the scores {scores} call important "
    "(log-odds above 0), best first, at most {rate} of the sequence; then others drawn at random "
    "(seed {seed}) up to {rate}.",
    "random_matched": "As many tokens of each sequence as {match} masks, drawn at random once "
    "(seed {seed}): the control that knows nothing of importance.",
}


@dataclass(frozen=True)
class Origin:
    """paragraphs: how each index was made, by name, then the scores behind it (`scores NAME`).
    scores: name of the scores that the index was chosen by, if they are whole.
    """

    paragraphs: dict[str, str]
    scores: str | None


def explain(store: TokenStore, name: str) -> Origin:
    """Say how an index was made; through `random_matched`, how the matched one was."""
    paragraphs: dict[str, str] = {}
    current: str | None = name
    while current is not None and current not in paragraphs:
        infos = [open_array(shard, current, "mask")[1] for shard in store.shards]
        options: list[dict[str, Any]] = [info.get("options") or {} for info in infos]
        masked = sum(info["count"] for info in infos)
        # All shards were made alike, but for the content of what they were made from.
        paragraphs[current] = (
            f"{_explain_rule(options[0])} It masks {masked:,} of {store.num_tokens:,} tokens."
        )
        index, current = current, None
        for kind, key, subject in (("scores", "scores", "scores {}"), ("mask", "match", "{}")):
            if not options[0].get(key):
                continue
            behind = _name_of(options[0][key])
            subject = subject.format(behind)  # scores may be named as the index is
            if not _is_same(store, behind, kind, [str(shard.get(key)) for shard in options]):
                paragraphs[index] += f" Since then {subject} was removed or made anew."
            elif kind == "mask":
                current = behind
            else:
                paragraphs[subject] = explain_scores(store, behind)
                return Origin(paragraphs, behind)
    return Origin(paragraphs, None)


def _explain_rule(options: dict[str, Any]) -> str:
    strategy = str(options.get("strategy"))
    if strategy not in RULES:
        return "Its file does not say how it was made."
    rate = options.get("mlm_probability")
    rule = RULES[strategy].format(
        rate=f"{100 * rate:g} %" if isinstance(rate, (int, float)) else "a share",
        seed=options.get("seed"),
        scores=_name_of(options.get("scores")),
        match=_name_of(options.get("match")),
    )
    return f"{strategy}. {rule}"


def _name_of(recorded: Any) -> str:
    """The name in `NAME (sha256 0123456789abcdef)`, as build_masks.py records it."""
    return str(recorded).partition(" ")[0] if recorded else "(not recorded)"


def _is_same(store: TokenStore, name: str, kind: str, recorded: list[str]) -> bool:
    """Whether an array that was read is still there, with the content that each shard had."""
    try:
        infos = [open_array(shard, name, kind)[1] for shard in store.shards]
    except DataError:
        return False
    return all(f"sha256 {info['sha256'][:16]}" in text
               for info, text in zip(infos, recorded, strict=True))


def explain_scores(store: TokenStore, name: str) -> str:
    """Say which scorer gave the scores `name`, and what it learned from."""
    return " ".join(_explain_scores(store, name))


def _explain_scores(store: TokenStore, name: str) -> list[str]:
    info = open_array(store.shards[0], name, "scores")[1]
    made_by = str(info.get("model") or "")
    fingerprint = str(info.get("model_fingerprint") or "not recorded")
    file = array_path(store.shards[0], name, "scores").name
    if not made_by:
        return [f"Scores of an unknown scorer, in {file}."]
    sentences = [
        f"Log-odds that a token is important, given by the scorer {made_by} (fingerprint "
        f"{fingerprint[:16]})."
    ]
    run = Path(made_by).parent
    results = _read(run / "results.json")
    weights = sorted(Path(made_by).glob("*.safetensors")) if Path(made_by).is_dir() else []
    if len(weights) != 1 or not results:
        return [*sentences, "What it learned from is not known here: that folder is gone."]
    if file_sha256(weights[0]) != fingerprint:
        return [*sentences, "The scorer in that folder was fitted anew since."]
    precision, recall = results.get("precision"), results.get("recall")
    if isinstance(precision, float) and isinstance(recall, float):
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
