"""The file of a study: a row per fine-tuned model, from which tables and figures can be redrawn.

    python train/report.py runs/study --export results/study.csv
    python train/report.py --from results/study.csv

What a column holds beside its name; what is unknown is empty:

- `study`: the file's name without ending, or the folder where there are several.
- `strategy`: of the arm's masks; `none` without stage 2, `baseline` for a trivial baseline.
- `score`, `match`: the scores that it reads, and the arm whose masks a control matches.
- `stage1_seed`, `pretrain_seed`: seeds of stage 1 and of stage 2. The second also chooses the
  examples of a label budget; it is empty where an arm has neither.
- `stage1_steps`, `stage2_steps`: lengths; 0 without stage 2. Arms are compared where the first
  agrees; it is written only where a study has several.
- `labels`: labelled examples that the model was trained on.
- `num_items`, `items_digest`: of the test split; the digest is that of the sorted list of item ids.
- `correct`: whether each answer is right: a bit per item in the order of the sorted ids, the first
  item the highest bit of the first byte, the last byte filled up with zeros, in hexadecimal.
- `masked_tokens`, `tokens`, `stage2_seconds`, `flops`: of stage 2; seconds are of training steps.
- `stage1_seconds`, `stage1_flops`: of all pre-training before stage 2; 0 where a published encoder
  was taken as it is.
- `mask_seconds`, `mask_flops`: of all processes that chose the masks, as if no other arm had shared
  them.
- `finetune_seconds`, `finetune_flops`: of fine-tuning this model.
- `hf_digest`: of the weights that were fine-tuned. `identity_digest`: of the fine-tuning.
- `num_classes`, `answers`: for macro F1, whose interval needs more than right or wrong: class and
  answer of each item in the order of `correct`, each in the bits that `num_classes` needs.
- `class_names`: names of the classes, a JSON list.
- `mid_schedule`: 1 if stage 2 was exported before the end of its schedule, else 0.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.errors import DataError, visible
from preprocess.files import parse_json
from preprocess.view.tables import Table
from train.reports.compare import NO_STAGE_2, Group, arms_of, floors_of
from train.reports.costs import before
from train.reports.groups import BASELINE_STRATEGY, group_arms, named
from train.reports.results import Arm, FinetuneRun, number

COLUMNS = (
    "study", "task", "arm", "strategy", "score", "match", "stage1_seed", "pretrain_seed",
    "stage1_steps", "stage2_steps", "labels", "finetune_seed", "validation_accuracy",
    "test_accuracy", "test_macro_f1", "num_items", "items_digest", "correct", "masked_tokens",
    "tokens", "mask_seconds", "stage2_seconds", "finetune_seconds", "flops", "hf_digest",
    "identity_digest", "commit", "device",
    # For macro F1, for the note on lengths and for costs; the rest is complete without them.
    "num_classes", "answers", "class_names", "mid_schedule", "stage1_seconds", "stage1_flops",
    "mask_flops", "finetune_flops",
)
_COUNTS = ("stage1_seed", "pretrain_seed", "stage1_steps", "stage2_steps", "labels",
           "finetune_seed", "num_items", "masked_tokens", "tokens", "num_classes")
_NUMBERS = ("validation_accuracy", "test_accuracy", "test_macro_f1", "mask_seconds",
            "stage2_seconds", "finetune_seconds", "flops", "stage1_seconds", "stage1_flops",
            "mask_flops", "finetune_flops")
_NEEDED = ("arm", "finetune_seed", "test_accuracy")
_GUARDED = ("'=", "'+", "'-", "'@")  # how `Table.as_csv` begins what a spreadsheet would compute


# ------------------------------------------------------------------------------------- writing


def study_csv(groups: Sequence[Group], study: str) -> str:
    """Write all models of a report as one CSV, with the columns of `COLUMNS`.

    Arms come in the order of the recipe, which decides their order and colours in a report.

    Raises:
        DataError: the answers of a model are not those of its row.
    """
    rows = [row for arm in [*arms_of(groups), *floors_of(groups)] for row in _rows(arm, study)]
    return Table.of("", rows, columns=COLUMNS).as_csv()


def _rows(arm: Arm, study: str) -> list[dict[str, Any]]:
    # Runs outside a pipeline have a line that others may share.
    prefix, _, plain = (arm.line if arm.seeds else arm.name).rpartition("/")
    rows = []
    for place, run in enumerate(arm.runs):
        last = run.stages[-1] if run.stages and arm.strategy != NO_STAGE_2 else {}
        first = run.stages[0] if len(run.stages) > bool(last) else {}
        for number_, row in enumerate(run.rows):
            known: dict[str, Any] = {
                "study": prefix or study, "task": run.task, "arm": plain,
                "strategy": arm.strategy, "score": arm.scores,
                "match": arm.match.rpartition("/")[2],
                "stage1_seed": first.get("seed"),
                "pretrain_seed": arm.seeds[place] if arm.seeds else last.get("seed"),
                "stage1_steps": arm.stage1_steps, "stage2_steps": arm.stage2_steps,
                "labels": arm.labels, "finetune_seed": row["seed"],
                "validation_accuracy": row.get("validation_accuracy"),
                "test_accuracy": row["test_accuracy"], "test_macro_f1": row.get("test_macro_f1"),
                "masked_tokens": last.get("masked_tokens"), "tokens": last.get("tokens"),
                "mask_seconds": run.mask_seconds, "stage2_seconds": last.get("seconds"),
                "finetune_seconds": row.get("seconds"), "flops": last.get("flops"),
                "hf_digest": run.weights, "identity_digest": row.get("identity_digest"),
                "commit": run.commit, "device": run.device,
                "stage1_seconds": before(arm, run, "seconds"),
                "stage1_flops": before(arm, run, "flops"),
                "mask_flops": run.mask_flops, "finetune_flops": row.get("flops"),
                "class_names": json.dumps(row["labels"], ensure_ascii=False)
                if isinstance(row.get("labels"), list) else None,
                "mid_schedule": int(arm.mid_schedule), **_answers(run, number_),
            }
            rows.append({key: "" if known.get(key) is None else known[key] for key in COLUMNS})
    return rows


def _answers(run: FinetuneRun, seed: int) -> dict[str, Any]:
    if run.correct is None:
        return {}
    row, share = run.rows[seed], float(run.correct[seed].mean())
    if not math.isclose(share, row["test_accuracy"], abs_tol=1e-6):
        raise DataError(
            f"--export: {run.path}, seed {row['seed']}: results.jsonl says accuracy "
            f"{row['test_accuracy']:.4f}, and the predictions give {share:.4f}; type the "
            "finetune.py command again, it tests that seed again")
    found = {"num_items": run.correct.shape[1], "items_digest": run.items_digest,
             "correct": np.packbits(run.correct[seed]).tobytes().hex()}
    if run.classes and run.truth is not None and run.predictions is not None:
        values = np.stack([run.truth, run.predictions[seed]], axis=1)
        places = np.arange(_bits(run.classes))[::-1]
        bits = (values[:, :, None] >> places & 1).astype(np.uint8)
        found |= {"num_classes": run.classes,
                  "answers": np.packbits(bits.ravel()).tobytes().hex()}
    return found


def _bits(classes: int) -> int:
    return max(math.ceil(math.log2(classes)), 1)


# ------------------------------------------------------------------------------------- reading


def read_studies(paths: Sequence[Path]) -> list[Group]:
    """Read the arms of some files, grouped as those of pipeline folders are.

    Raises:
        DataError: no such file, or a row that is not as it was written.
    """
    studies: dict[tuple[Path, str], dict[tuple, list[dict[str, Any]]]] = {}
    for path in {path.resolve(): path for path in paths}.values():
        for row in _read_rows(path):
            study = studies.setdefault((path, row["study"]), {})
            study.setdefault((
                row["task"], row["arm"], row["stage1_steps"], row["labels"],
                row["stage2_steps"]), []).append(row)
    names = [name for _, name in studies]
    files = [(path.stem, name) for path, name in studies]
    groups = []
    for (path, name), arms in studies.items():
        # Two files may hold studies of one name, and have one name in two folders.
        if files.count((path.stem, name)) > 1:
            full = f"{path.with_suffix('')}/{name}"
        else:
            full = f"{path.stem}/{name}" if names.count(name) > 1 else name
        prefix = "" if len(studies) == 1 else f"{full}/"
        made = [_arm(rows, prefix) for rows in arms.values()]
        groups += group_arms(named(made, prefix), prefix)
    return groups


def _read_rows(path: Path) -> list[dict[str, Any]]:
    again = "write it again with python train/report.py R --export"
    try:
        text = path.read_text(encoding="utf-8")
        content = list(csv.reader(io.StringIO(text), strict=True))
    except OSError as error:
        raise DataError(f"--from {path}: cannot be read ({error.strerror}); give a file of "
                        "--export") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"--from {path}: not a CSV file ({error}); {again}") from None
    head = content[0] if content else []
    missing = [name for name in COLUMNS if name not in head]
    if missing:
        raise DataError(f"--from {path}: no column {missing[0]!r}; expected are {COLUMNS[0]}, "
                        f"{COLUMNS[1]}, ... as written by --export: {again}")
    rows, seen = [], set()
    for line, cells in enumerate(content[1:], start=2):
        try:
            if len(cells) != len(head):
                raise ValueError(f"{len(cells)} cells for {len(head)} columns")
            row = _read_row(dict(zip(head, cells, strict=True)))
            key = tuple(row[name] for name in (
                "study", "task", "arm", "stage1_steps", "stage2_steps", "labels", "stage1_seed",
                "pretrain_seed", "finetune_seed"))
            if key in seen:
                raise ValueError("a model that an earlier row has already")
        except ValueError as error:
            raise DataError(f"--from {path}, line {line}: {error}; {again}") from None
        seen.add(key)
        rows.append(row)
    if not rows:
        raise DataError(f"--from {path}: no row in it; {again}")
    return rows


def _read_row(cells: dict[str, str]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, cell in cells.items():
        text = cell[1:] if cell.startswith(_GUARDED) else cell
        row[key] = text if key not in (*_COUNTS, *_NUMBERS) else None
        if not text and key in _NEEDED:
            raise ValueError(f"{key} is empty")
        if text and row[key] is None:
            kind = int if key in _COUNTS else float
            try:
                row[key] = kind(text)
                finite = math.isfinite(row[key])
            except (ValueError, OverflowError):
                finite = False
            if not finite or row[key] < 0 and "seed" not in key:
                raise ValueError(f"{key} is {visible(text)!r}")
    for key in ("validation_accuracy", "test_accuracy", "test_macro_f1"):
        if row[key] is not None and row[key] > 1:
            raise ValueError(f"{key} is {row[key]}, above 1")
    row["class_names"] = parse_json(row["class_names"]) if row["class_names"] else None
    if not isinstance(row["class_names"], list | None):
        raise ValueError("class_names is no list")
    row["right"] = row["given"] = None
    if row["correct"]:
        row["right"] = _unpack(row["correct"], row["num_items"], "correct").astype(bool)
        if not math.isclose(row["right"].mean(), row["test_accuracy"], abs_tol=1e-6):
            raise ValueError(f"test_accuracy is {row['test_accuracy']}, and correct gives "
                             f"{row['right'].mean():.6f}")
    if row["answers"] and row["num_classes"] and row["right"] is not None:
        width, items = _bits(row["num_classes"]), row["num_items"]
        bits = _unpack(row["answers"], 2 * width * items, "answers")
        row["given"] = bits.reshape(items, 2, width) @ (1 << np.arange(width)[::-1])
        if (row["given"] >= row["num_classes"]).any() or (
                (row["given"][:, 0] == row["given"][:, 1]) != row["right"]).any():
            raise ValueError("answers do not agree with correct")
    return row


def _unpack(text: str, count: int | None, name: str) -> np.ndarray:
    """Return `(count,)` uint8 bits."""
    data = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
    if not count or len(data) != -(-count // 8):
        raise ValueError(f"{name} has {len(data)} bytes for {count} bits")
    bits = np.unpackbits(data)
    if bits[count:].any():
        raise ValueError(f"{name} has bits behind its end")
    return bits[:count]


def _arm(rows: list[dict[str, Any]], prefix: str) -> Arm:
    by_seed: dict[tuple[int | None, int | None], list[dict[str, Any]]] = {}
    for row in rows:
        by_seed.setdefault((row["stage1_seed"], row["pretrain_seed"]), []).append(row)
    seeds = tuple(seed for _, seed in by_seed)
    if len(set(seeds)) < len(seeds):  # then they name no run
        seeds = ()
    first = rows[0]
    strategy, is_floor = first["strategy"], first["strategy"] == BASELINE_STRATEGY
    return Arm(
        "", [_run(sorted(one, key=lambda row: row["finetune_seed"]), strategy)
             for one in by_seed.values()], line=prefix + visible(first["arm"]),
        strategy=visible(strategy), scores=visible(first["score"]),
        match=prefix + visible(first["match"]) if first["match"] else "",
        labels=first["labels"], stage1_steps=first["stage1_steps"],
        stage2_steps=first["stage2_steps"], mid_schedule=first["mid_schedule"] == "1",
        seeds=seeds, floor=is_floor,
    )


def _run(rows: list[dict[str, Any]], strategy: str) -> FinetuneRun:
    first = rows[0]
    whole = all(row["right"] is not None and row["items_digest"] == first["items_digest"]
                and row["num_items"] == first["num_items"] for row in rows)
    given = [row["given"] for row in rows if row["given"] is not None]
    told = whole and len(given) == len(rows)
    stages: list[dict[str, Any]] = []
    if first["stage1_seed"] is not None:
        stages.append({"stage": "pretrain", "seed": first["stage1_seed"],
                       "steps": first["stage1_steps"], "seconds": first["stage1_seconds"],
                       "flops": first["stage1_flops"]})
    if first["tokens"] is not None or first["stage2_seconds"] is not None:
        stages.append({"stage": "pretrain", "masking": strategy, "seed": first["pretrain_seed"],
                       "steps": first["stage2_steps"], "tokens": first["tokens"],
                       "masked_tokens": first["masked_tokens"],
                       "seconds": first["stage2_seconds"], "flops": first["flops"]})
    return FinetuneRun(
        path=Path(first["study"]),
        rows=[{"seed": row["finetune_seed"], "task": row["task"], "num_train": row["labels"],
               "test_accuracy": row["test_accuracy"], "test_macro_f1": row["test_macro_f1"],
               "validation_accuracy": row["validation_accuracy"], "labels": row["class_names"],
               "seconds": row["finetune_seconds"], "flops": row["finetune_flops"],
               "identity_digest": row["identity_digest"],
               "identity": {"inputs": {"weights": first["hf_digest"]}}} for row in rows],
        items_digest=first["items_digest"] if whole else "",
        correct=np.stack([row["right"] for row in rows]) if whole else None,
        cost={"steps": 0} if not stages and first["stage1_seconds"] == 0 else {},
        stages=stages, notes=[],
        truth=given[0][:, 0] if told else None,
        predictions=np.stack([one[:, 1] for one in given]) if told else None,
        classes=first["num_classes"], mask_seconds=number(first["mask_seconds"]),
        mask_flops=number(first["mask_flops"]),
        commit=visible(first["commit"]), device=visible(first["device"]),
    )
