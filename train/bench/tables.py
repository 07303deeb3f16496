"""What a benchmark shows: tables, a picture, and two results side by side.

A result is the dictionary that `benchmark.json` holds; nothing here measures.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.errors import ConfigError, DataError
from preprocess.files import read_json
from preprocess.identity import by_path
from preprocess.view.tables import Table

KINDS = {  # colour (Okabe and Ito 2008) and hatching of each kind of row: print needs the second
    "strategy": ("#0072B2", ""), "bare": ("#999999", ""), "baseline": ("#E69F00", "//"),
}
SHARE_COLOURS = {"head": ("#D55E00", ""), "optimizer": ("#F0E442", "//"),
                 "loader": ("#CC79A7", "xx"), "rest": ("#BBBBBB", "")}
SHARES = tuple(SHARE_COLOURS)


def _between(values: dict[str, float], digits: int) -> str:
    """Write `median (p20-p80)`."""
    return "{median:.{n}f} ({p20:.{n}f}-{p80:.{n}f})".format(n=digits, **values)


# The columns of the tables, by heading: how each is read from a row of a result.
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "masked": lambda row: f"{100 * row['masked_rate']:.2f} %",
    "masked/step": lambda row: f"{row['masked_per_step']:.1f}",
    "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
    "rows/s": lambda row: f"{row['rows_per_second']:.1f}",
    "masked/s": lambda row: f"{row['masked_tokens_per_second']:,.0f}",
    "step ms (p20-p80)": lambda row: _between(row["step_ms"], 1),
    "MFU": lambda row: f"{row['mfu_percent']:.1f} %",
    "/random (p20-p80)": lambda row: _between(row["over_random"], 2),
    "/grouped (p20-p80)": lambda row: _between(row["over_grouped"], 2),
    "/pass-transformers (p20-p80)": lambda row: _between(row["over_full"], 2),
    "filled": lambda row: f"{row['filled_percent']:.1f} %",
    **{share: lambda row, share=share: _percent_or_dash(row["share_percent"][share])  # type: ignore
       for share in SHARES},
    "peak GiB": lambda row: f"{row['peak_memory_gib']:.2f}",
    "when": lambda row: row["when"],
    "seconds": lambda row: _or_dash(row["seconds"]),
    "s / million tokens": lambda row: _or_dash(row["seconds_per_million_tokens"]),
    "its scores": lambda row: _or_dash(row.get("score_seconds_per_million_tokens")),
    "masked tokens": lambda row: f"{row['masked_tokens']:,}",
    "bytes on disk": lambda row: f"{row['bytes_on_disk']:,}",
}


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent_or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"


def make_table(rows: list[dict[str, Any]], *columns: str) -> str:
    """Return a table of some of `COLUMNS` as text, one line per row."""
    cells = [[row["name"].removesuffix(" ="), *(COLUMNS[column](row) for column in columns)]
             for row in rows]
    return Table("", ["", *columns], cells).as_text()


def training_rows(length: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows that train with their own masks."""
    return [row for row in length["rows"] if row["kind"] not in ("equal", "pass")]


def format_result(result: dict[str, Any]) -> str:
    """Return all tables, and notes on how to read them."""
    peak = result["peak"]
    parts = []
    for length in result["lengths"]:
        rows = training_rows(length)
        equal, passes = ([row for row in length["rows"] if row["kind"] == kind]
                         for kind in ("equal", "pass"))
        count, ratio = length["flops"], length["loop_over_bare"]
        parts += [
            f"Rows of {length['max_seq_length']} slots",
            make_table(
                rows, "masked", "tokens/s", "rows/s", "masked/s", "step ms (p20-p80)", "MFU",
                "/random (p20-p80)", *["/grouped (p20-p80)"] * ("over_grouped" in rows[0])),
            f"loop / bare: {_between(ratio, 3)}, random masks, over rounds",
            f"MFU: {count['per_token'] / 1e6:.1f} MFLOP per real token and "
            f"{count['per_masked_token'] / 1e6:.1f} per masked token in every row "
            f"(train/model/flops.py), of {peak['flops_per_second'] / 1e12:,.3f} TFLOP/s per device "
            f"({peak['source']})",
            "",
            f"Where the time goes, rows of {length['max_seq_length']} slots",
            make_table(rows, "filled", *SHARES, "peak GiB"),
            "",
        ]
        kinds = length.get("kinds")
        if kinds:
            parts += [f"A step of {kinds['row']} by kind of work, ms",
                      Table("", list(kinds["ms"]), [
                          [f"{value:.2f}" for value in kinds["ms"].values()]]).as_text(),
                      "From a profile; the MLM head without its products, which count as such.", ""]
        if equal:
            parts += [
                f"Equally many masked tokens, rows of {length['max_seq_length']} slots: "
                f"{result['equal_masked_tokens']:,} of the store's {result['store_tokens']:,} "
                "tokens",
                make_table(equal, "masked", "masked/step", "masked/s", "tokens/s",
                           "step ms (p20-p80)", "/random (p20-p80)"),
                "Equal are the rows and the number of masked tokens in the whole store, that of "
                "the most sparing strategy:",
                "indices lose positions at random, to exactly that number; strategies drawn anew "
                "each epoch draw at a lower rate, and meet it in expectation.", "",
            ]
        if passes:
            parts += [f"One batch alone, rows of {length['max_seq_length']} slots",
                      make_table(passes, "step ms (p20-p80)", "/pass-transformers (p20-p80)"), ""]
    parts += [
        "Choosing the masks (\"each epoch\" is in the loader); its scores, in s / million tokens, "
        "are made once for all",
        make_table(result["mask_costs"], "when", "seconds", "s / million tokens", "its scores",
                   "masked tokens", "bytes on disk"), "", *reading_aids(result),
    ]
    return "\n".join(parts)


def reading_aids(result: dict[str, Any]) -> list[str]:
    """Return notes on how the figures were measured."""
    options = result["options"]
    memory = ("peak of the GPU's allocator" if result["gpu"] else "peak of resident memory")
    note = (
        f"{memory} in a row's turns, without the states of the other rows' models"
        if result["memory_of_each_row"] else
        "that of the whole process so far; this machine cannot reset it per row"
    )
    return [
        f"Not counted: {options['warmup_steps']} warm-up steps per row, each turn's first step "
        "(its batch was ready) and the last.",
        "The last step is profiled: optimizer is clipping, reduction and update; head is the MLM "
        "head and loss, forward and",
        "backward, measured again alone on the same rows (-: took longer than what contains it, so "
        "it is in rest).",
        "loader is the wait in counted steps; rest is the encoder and the loop.",
        "tokens: without padding; filled: share of all slots. transformers counts special "
        "tokens, as selmask does.",
        f"peak GiB: {note}.",
    ]


def in_short(result: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return what the last line says to a program: tokens per second, and where the rest is."""
    speeds = {str(length["max_seq_length"]): {
        row["name"]: round(row["tokens_per_second"]) for row in training_rows(length)
    } for length in result["lengths"]}
    return {"benchmark": result["benchmark"], "file": str(file), "gpu": result["gpu"],
            "tokens_per_second": speeds}


# ------------------------------------------------------------------------------------- picture


def draw(result: dict[str, Any], path: Path) -> str:
    """Write the picture; return a line for the user."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "No picture: matplotlib is not installed (pip install 'selmask[plot]')."
    lengths = result["lengths"]
    tallest = max(len(training_rows(one)) for one in lengths)
    figure = Figure(
        figsize=(11, 1.5 + (0.9 + 0.27 * tallest) * len(lengths)), layout="constrained")
    axes = figure.subplots(len(lengths), 2, squeeze=False, sharey="row")
    for (left, right), length in zip(axes, lengths, strict=True):
        rows = training_rows(length)
        _draw_speed(left, rows)
        _draw_shares(right, rows)
        left.set_title(f"Rows of {length['max_seq_length']} slots", loc="left", fontsize=10)
        for axis in (left, right):
            axis.tick_params(axis="x", labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 1].legend(
        *axes[0, 1].get_legend_handles_labels(), ncols=len(SHARES), fontsize=8, frameon=False,
        loc="lower center", bbox_to_anchor=(0.5, 1.0),
    )
    machine = result["gpu"] or f"CPU, {result['threads']} threads"
    figure.suptitle(
        f"{result['options']['model_config'] or result['options']['model_name_or_path']}, "
        f"{result['precision']}, ranks: {result['world_size']} ({machine}); bars: median, "
        "whiskers: 20th to 80th percentile", fontsize=10,
    )
    figure.savefig(path, dpi=100)
    return f"wrote {path}"


def _draw_speed(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Draw tokens per second, with the number at the end of each bar."""
    low, values, high = ([row[f"tokens_per_second{end}"] for row in rows]
                         for end in ("_p20", "", "_p80"))
    bars = axis.barh(
        range(len(rows)), values, edgecolor="white", linewidth=0,
        color=[KINDS[row["kind"]][0] for row in rows],
        hatch=[KINDS[row["kind"]][1] for row in rows],
        xerr=np.abs(np.subtract([low, high], values)), error_kw={"linewidth": 1, "capsize": 2})
    axis.bar_label(bars, [f"{value:,.0f}" for value in values], padding=4, fontsize=8)
    names = [f"{row['name']}, {100 * row['masked_rate']:.1f} % masked" for row in rows]
    axis.set_yticks(range(len(rows)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.18 * max(high))
    axis.set_xlabel("tokens/s (without padding)", fontsize=9)


def _draw_shares(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Draw where the time of a step goes."""
    starts = np.zeros(len(rows))
    for name, (colour, hatch) in SHARE_COLOURS.items():
        values = [row["share_percent"][name] or 0.0 for row in rows]
        axis.barh(range(len(rows)), values, left=starts, color=colour, hatch=hatch,
                  edgecolor="white", linewidth=0.5, label=name)
        starts += values
    axis.set_xlim(0, 100)
    axis.set_xlabel("share of a step's time, %", fontsize=9)
    axis.tick_params(axis="y", length=0)


# ------------------------------------------------------------------------------------- compare


def read_result(path: str) -> dict[str, Any]:
    """Read a `benchmark.json` of the pre-training loop.

    Raises:
        ConfigError, DataError: no such file; not a result of this command.
    """
    file = Path(path, "benchmark.json") if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ConfigError(f"--compare {path}: no such file; give two benchmark.json")
    result = read_json(file)
    needed = {"lengths", "mask_costs", "options", "versions", "platform", "cpus", "commit"}
    if result.get("benchmark") != "pretrain" or not needed <= result.keys():
        raise DataError(f"{file}: not a result of this train/benchmark.py; measure again")
    return result


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Return the differences between two results besides their figures, one line each."""
    names = ("platform", "cpus", "threads", "gpu", "python", "world_size", "precision",
             "store", "commit", "versions", "options", "ds_config")
    one, other = (by_path({name: result.get(name) for name in names}) for result in (first, second))
    return [f"  {key}: {one.get(key)} | {other.get(key)}" for key in sorted(one.keys() | other)
            if one.get(key) != other.get(key) and key != "options.output_dir"]


def compare(first_path: str, second_path: str) -> str:
    """Return two results side by side.

    Raises:
        ConfigError, DataError: see `read_result`; or no row is in both.
    """
    first, second = read_result(first_path), read_result(second_path)
    lines = [f"A {first_path}", f"B {second_path}"]
    try:
        there = {(length["max_seq_length"], row["name"]): row
                 for length in second["lengths"] for row in length["rows"]}
        for length in first["lengths"]:
            slots = length["max_seq_length"]
            pairs = [(row, there[slots, row["name"]]) for row in length["rows"]
                     if (slots, row["name"]) in there]
            if pairs:
                lines += [f"Rows of {slots} slots", _compare_table(pairs), ""]
    except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
        raise DataError(f"{first_path}, {second_path}: a figure is missing ({error}); "
                        "measure again") from None
    if len(lines) == 2:
        raise DataError(f"{first_path} and {second_path} have no row of one length in common; "
                        "compare runs with the same --max_seq_lengths and strategies")
    different = differences(first, second)
    lines += ["Different besides the figures (A | B):" if different
              else "Machine, versions, commit and options are the same.", *different,
              "*: the 20th to 80th percentiles of the step time overlap; not told apart by these "
              "two runs."]
    return "\n".join(lines)


def _compare_table(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    shown = ("tokens/s", "masked/s", "MFU", "peak GiB", "masked")
    cells = []
    for one, other in pairs:
        steps = (one["step_ms"], other["step_ms"])
        overlap = max(step["p20"] for step in steps) <= min(step["p80"] for step in steps)
        ratio = other["tokens_per_second"] / one["tokens_per_second"]
        values = [[COLUMNS[column](row) for row in (one, other)] for column in shown]
        values[0].append(f"{ratio:.3f}{'*' if overlap else ' '}")
        cells.append([one["name"], *(value for column in values for value in column)])
    heads = [[f"{column} A", "B"] for column in shown]
    heads[0].append("B / A")
    return Table("", ["", *(head for column in heads for head in column)], cells).as_text()
