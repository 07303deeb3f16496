"""The README.md of an `hf/` folder: the card that the hub shows, made from what the folder holds.

A card is a function of the lineage, of the configuration and of the scores of the finished run, so
it can be written again at any time, unless somebody has edited it. Lineages and names may be a
stranger's: every value is escaped, and one that is not what it should be is left out. No card names
a path of this machine.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preprocess.errors import visible
from preprocess.files import parse_yaml
from train.config import LICENCE

FILL_MASK, TEXTS, TOKENS = "fill-mask", "text-classification", "token-classification"
KINDS = {"ForMaskedLM": FILL_MASK, "ForSequenceClassification": TEXTS,
         "ForTokenClassification": TOKENS}
ACCURACY = "accuracy"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_TERMS = "The weights come from the base model and from the data named above, whose terms apply"
_NO_LICENCE = ("Not stated. " + _TERMS + "; write `license: NAME` at the top of this file before "
               "you share the model.")
_CITATION = """\
```bibtex
@inproceedings{gu-etal-2020-train,
  title = {Train No Evil: Selective Masking for Task-Guided Pre-Training},
  author = {Gu, Yuxian and Zhang, Zhengyan and Wang, Xiaozhi and Liu, Zhiyuan and Sun, Maosong},
  booktitle = {Proceedings of the 2020 Conference on Empirical Methods in Natural Language
               Processing (EMNLP)},
  year = {2020}
}
```"""


@dataclass(frozen=True)
class Score:
    """A metric of the test split, by the models of one or several fine-tuning seeds.

    metric: accuracy or macro F1. values: one per seed. count: test examples.
    """

    metric: str
    values: tuple[float, ...]
    count: int

    def interval(self) -> tuple[float, float] | None:
        """Return the 95 % interval of a mean accuracy; None for one seed, or another metric.

        Two variances are added up: that of the seeds' mean, and that of a share of so many test
        examples (Agresti and Coull's, which is not 0 where all are right: seeds that happen to
        agree prove little). Each has its own quantile, Student's t and the normal one, weighted by
        its variance (Cochran), as in reports.
        """
        from scipy.stats import norm, t

        n, mean = len(self.values), self.mean
        if n < 2 or self.metric != ACCURACY or not self.count:
            return None
        seeds = sum((value - mean) ** 2 for value in self.values) / (n - 1) / n
        share = (mean * self.count + 2) / (self.count + 4)
        items = share * (1 - share) / self.count
        weighted = float(t.ppf(0.975, n - 1) * seeds + norm.ppf(0.975) * items)
        half = weighted / math.sqrt(seeds + items)
        return max(mean - half, 0.0), min(mean + half, 1.0)

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)


@dataclass(frozen=True)
class Model:
    """What a folder holds, as far as a card tells it.

    kind: a value of `KINDS`, or empty. labels: of a classifier. mask_token: of its tokenizer.
    location: what `from_pretrained` is given: the folder, or the name of a repository.
    """

    kind: str = ""
    labels: tuple[str, ...] = ()
    mask_token: str = "[MASK]"
    location: str = "."


def public_name(name: str) -> str:
    """Return the name of a checkpoint for a card: as on the hub, or of a folder its last part."""
    if os.path.exists(name) or name.startswith((os.sep, ".")):
        return f"{Path(name).resolve().name} (a local folder)"
    return name.partition("#")[0]


def plain(cell: Any) -> str:
    """Write a value so that Markdown shows it as it is."""
    return "" if cell is None else re.sub(r"([\\`*\[\]<>#|~&$])", r"\\\1", visible(cell))


def _part(stage: dict[str, Any], key: str) -> dict[str, Any]:
    """Return a part of a stage that nobody has checked; nothing if it is no object."""
    found = stage.get(key)
    return found if isinstance(found, dict) else {}


def _text(values: dict[str, Any], key: str) -> str:
    value = values.get(key)
    return value if isinstance(value, str) else ""


def _about(stages: Sequence[dict[str, Any]], key: str) -> str:
    """Return the newest text of that name in the stages."""
    return next(filter(None, (_text(_part(one, "about"), key) for one in reversed(stages))), "")


def _origin(stages: Sequence[dict[str, Any]]) -> str:
    """Return the model that the first stage began with; empty for fresh weights or unknown ones."""
    return _text(_part(stages[0], "about"), "base_model") if stages else ""


def _licence(name: Any) -> str:
    """Return an identifier of a licence; empty for anything else, and for `other`, which is none.
    """
    return name if isinstance(name, str) and LICENCE.holds(name) and name != "other" else ""


def licence_of(card: Path) -> str:
    """Return the licence that the card of a checkpoint states; empty where it states none."""
    try:
        with card.open(encoding="utf-8") as file:
            start, front, *_ = file.read(1 << 20).split("---\n", 2)
        found = parse_yaml(front) if not start else None
    except (OSError, ValueError):
        return ""
    return _licence(found.get("license")) if isinstance(found, dict) else ""


def _counts(stage: dict[str, Any]) -> str:
    """Return the data of a stage in words."""
    about = _part(stage, "about")
    found = [f"{value:,} {key.replace('_', ' ')}" for key, value in _part(about, "counts").items()
             if type(value) is int]
    return ": ".join(filter(None, (_text(about, "data"), ", ".join(found))))


def describe_masks(stage: dict[str, Any]) -> str:
    """Return how the masks of a stage were chosen, in words; empty where there are none."""
    choice, masks = stage["identity"]["choice"], _part(stage, "masks")
    if not choice["masking"]:
        return ""
    rate = choice["rate"] if choice["rate"] is not None else masks.get("rate")
    parts = [str(choice["masking"])]
    if rate is not None:
        parts.append(f"mask rate {rate}")
    for key, word in (("scores", "scores"), ("match", "matched to"), ("units", "units")):
        if _text(masks, key):
            parts.append(f"{word} {_text(masks, key).partition(' ')[0]}")
    parts.append("the same positions in each epoch" if masks else "drawn anew in each epoch")
    if isinstance(choice["corruption"], list):
        shares = "/".join(f"{100 * share:g}" for share in choice["corruption"]
                          if isinstance(share, int | float))
        parts.append(f"{shares} % [MASK]/random/kept")
    return ", ".join(parts)


def title_of(stages: Sequence[dict[str, Any]], model: Model, name: str) -> str:
    """Return a title that tells the model from others."""
    base, data = _origin(stages), _about(stages, "data")
    start = f"{base}, " if base else ""
    if model.kind == TEXTS and data:
        return f"{start}fine-tuned on {data}"
    if model.kind == TOKENS and data:
        return f"{start}token scorer for {data}"
    return f"{start}pre-trained on {data}" if data else name


def front_matter(
    stages: Sequence[dict[str, Any]], model: Model, title: str, scores: Sequence[Score],
    licence: str,
) -> str:
    """Return the YAML that the hub reads, between its lines of dashes."""
    from huggingface_hub import EvalResult, ModelCardData

    base, language, task = _origin(stages), _about(stages, "language"), _about(stages, "data")
    results = [
        EvalResult(
            task_type=TEXTS, dataset_type=visible(task), dataset_name=visible(task),
            dataset_split="test", metric_type=ACCURACY if score.metric == ACCURACY else "f1",
            metric_name=f"{score.metric}, mean over {len(score.values)} seed"
            + "s" * (len(score.values) > 1), metric_value=round(score.mean, 4))
        for score in scores
    ] if task else []
    data = ModelCardData(
        library_name="transformers", license=licence or None, tags=["selmask"],
        language=language if re.fullmatch("[a-z]{2,3}", language) else None,
        base_model=base if _HUB_NAME.fullmatch(base) else None,
        pipeline_tag=model.kind or None,
        model_name=visible(title) if results else None, eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def usage(stages: Sequence[dict[str, Any]], model: Model) -> str:
    """Return a snippet that runs in the folder, or anywhere once it is on the hub."""
    location, lines = json.dumps(model.location), ["from transformers import pipeline", ""]
    if model.kind == TEXTS:
        length = stages[-1]["identity"]["train"]["max_seq_length"] if stages else None
        cut = f", truncation=True, max_length={length}" if isinstance(length, int) else ""
        pair = _part(stages[-1], "about").get("pair") is True if stages else False
        text = '{"text": "the aspect", "text_pair": "A text."}' if pair else '"A text."'
        lines += [f'classify = pipeline("{TEXTS}", model={location})',
                  f"print(classify({text}{cut}))"]
    elif model.kind == TOKENS:
        lines += [f'score = pipeline("{TOKENS}", model={location})', 'print(score("A text."))']
    else:
        text = json.dumps(f"This is {model.mask_token} .")
        lines += [f'fill = pipeline("{FILL_MASK}", model={location})', f"print(fill({text}))"]
    return "\n".join(["```python", *lines, "```"])


def _limits(stages: Sequence[dict[str, Any]], model: Model,
            scores: Sequence[Score]) -> Iterator[str]:
    length = stages[-1]["identity"]["train"]["max_seq_length"] if stages else None
    if isinstance(length, int):
        yield f"Trained on inputs of at most {length} tokens; what is longer should be cut."
    if model.kind == TEXTS:
        yield ("It gives each text one of its labels, whatever the text is about; its "
               "probabilities are not calibrated.")
        if scores and len(scores[0].values) == 1:
            yield ("The scores are of one fine-tuning seed: another seed gives other numbers, and "
                   "how much they differ is not known.")
        yield "Scores on texts of another kind than the test split may be lower."
    elif model.kind == TOKENS:
        yield "Its scores rank tokens by importance for one task; they are no probabilities."
    else:
        yield "It predicts masked tokens and is meant to be fine-tuned; it answers no questions."
    yield "It has the biases of its base model and of its training data."


def model_card(
    stages: Sequence[dict[str, Any]], name: str, model: Model | None = None,
    scores: Sequence[Score] = (), licence: str | None = None,
) -> str:
    """Return the card of a model.

    Args:
        stages: its lineage, oldest first.
        name: its title where the lineage tells no better one.
        scores: of a classifier.
        licence: None is the one that the lineage tells, if any.
    """
    licence = licence or _licence(_about(stages, "license"))
    model, scores = model or Model(), [one for one in scores if all(map(math.isfinite, one.values))]
    title = title_of(stages, model, name)
    facts = [
        ("Task", model.kind), ("Labels", ", ".join(model.labels) if model.kind == TEXTS else ""),
        ("Base model", _origin(stages) or "none: the first stage began with fresh weights, or with "
         "a checkpoint whose name was not recorded"),
        ("Language", _about(stages, "language") or "not recorded"),
        *((f"Data of stage {number}", text) for number, stage in enumerate(stages, 1)
          if (text := _counts(stage))),
        *((f"Masks of stage {number}", text) for number, stage in enumerate(stages, 1)
          if (text := describe_masks(stage))),
        ("Licence", licence or "not stated, see below"),
    ]
    lines = [front_matter(stages, model, title, scores, licence), "", f"# {plain(title)}", "",
             "Trained with selmask: masked language modelling that masks the tokens that matter "
             "to a task, then fine-tuning.", "", "| | |", "|---|---|",
             *(f"| {key} | {plain(value)} |" for key, value in facts if value)]
    if scores:
        lines += ["", "## Scores", "", "On the test split, which chose nothing; means over "
                  "fine-tuning seeds. The interval of the accuracy covers seeds and test examples.",
                  "",
                  "| metric | score | 95 % interval | seeds | test examples |",
                  "|---|---|---|---|---|"]
        for score in scores:
            ends = score.interval()
            shown = f"{ends[0]:.4f} to {ends[1]:.4f}" if ends else "-"
            lines.append(f"| {score.metric} | {score.mean:.4f} | {shown} | {len(score.values)} | "
                         f"{score.count:,} |")
    lines += ["", "## Use", "", usage(stages, model), "",
              "## Training", "", "Stages, oldest first; `lineage.json` has every option of them:",
              "", "| stage | masking | steps | masked tokens | seconds |", "|---|---|---|---|---|"]
    for stage in stages:
        totals = [stage["totals"][key] for key in ("steps", "masked_tokens", "seconds")]
        cells = [stage["stage"], stage["identity"]["choice"]["masking"], *totals]
        lines.append(f"| {' | '.join(map(plain, cells))} |")
    lines += ["", "## Limits", "", *(f"- {one}" for one in _limits(stages, model, scores)),
              "", "## Licence", "", f"{plain(licence)}. {_TERMS} too." if licence else _NO_LICENCE,
              "", "## Citation", "", _CITATION]
    return _sealed("\n".join(lines) + "\n")


def _sealed(text: str) -> str:
    """Return a card with a last line by which `is_unedited` knows it; no reader shows it."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{text}\n<!-- made by selmask, {digest}; an edited card is not written again -->\n"


def is_unedited(card: bytes) -> bool:
    """Return whether a card is as `model_card` made it, whatever has happened to its line ends."""
    text = card.decode(errors="replace").replace("\r\n", "\n")
    return text == _sealed(text.rpartition("\n<!--")[0])
