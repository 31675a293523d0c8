"""Runs side by side as text, Markdown and CSV: what `engine/comparison.py` found, for the eye."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

from engine.comparison import Row, Setting, deviation
from metrics.paper import plop_source
from utils import results


def cells(setting: Setting, rows: Sequence[Row]) -> list[list[str]]:
    """Header, then per row its values and, where the paper has any, the paper's and the gap."""
    titles = list(rows[0].scores)
    table = [["run", "method", "seeds", "step", *titles]]
    for row in rows:
        first, scores, paper = row.runs[0], row.scores, row.paper
        step = f"{first.last}/{len(setting.sizes) - 1}" if setting.sizes else str(first.last)
        seeds = " ".join(str(run.seed) for run in row.runs)
        values = [_value(scores[title].mean(), deviation(scores[title])) for title in titles]
        label = row.label + ("*" if any(run.base for run in row.runs) else "")
        table.append([label, first.method, seeds, step, *values])
        if paper:
            gaps = {title: scores[title].mean() - value for title, value in paper.items()}
            for name, numbers, form in (("  paper", paper, ".1f"), ("  difference", gaps, "+.1f")):
                shown = [format(numbers[t], form) if t in numbers else "" for t in titles]
                table.append([name, "", "", "", *shown])
    return table


def _value(mean: float, std: float) -> str:
    if math.isnan(mean):
        return "-"
    return f"{mean:.1f}" if math.isnan(std) else f"{mean:.1f} ± {std:.1f}"


def title_of(setting: Setting) -> str:
    """What a table or chart shows."""
    kind = "" if setting.split == "partition" else f", {setting.split}"
    return f"{setting.dataset} {setting.task}{kind}, protocol {setting.protocol}"


def _notes(rows: Sequence[Row]) -> list[str]:
    """What the stars mean, and where PLOP's numbers were published."""
    bases = sorted({run.base for row in rows for run in row.runs if run.base})
    text = "* without a step 0 of its own, compared with that of "
    notes = [text + ", ".join(bases)] if bases else []
    if rows[0].setting.protocol == "plop" and any(row.paper for row in rows):
        notes.append(f"paper: {plop_source()}")
    return notes


def as_text(table: dict[Setting, list[Row]]) -> str:
    """A table per setting for the terminal."""
    lines = []
    for setting, rows in table.items():
        body = cells(setting, rows)
        widths = [max(map(len, column)) for column in zip(*body, strict=True)]
        lines += [f"{title_of(setting)}: mean IoU in %", ""]
        for i, row in enumerate(body):
            padded = [
                text.ljust(width) if at < 4 else text.rjust(width)
                for at, (text, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(padded).rstrip())
            if i == 0:
                lines.append("-" * (sum(widths) + 2 * len(widths) - 2))
        lines += [*_notes(rows), ""]
    return "\n".join(lines)


def as_markdown(table: dict[Setting, list[Row]]) -> str:
    """The same as Markdown."""
    lines = []
    for setting, rows in table.items():
        header, *body = [[text.strip().replace("|", r"\|") for text in row]
                         for row in cells(setting, rows)]  # fmt: skip
        rule = ["---"] * 4 + ["---:"] * (len(header) - 4)
        lines += [f"### {title_of(setting)}: mean IoU in %", ""]
        lines += [f"| {' | '.join(row)} |" for row in (header, rule, *body)]
        lines += ["", *_notes(rows), ""]
    return "\n".join(lines)


def inert(text: str) -> str:
    """Text that a spreadsheet program shows and does not compute."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def as_csv(table: dict[Setting, list[Row]]) -> str:
    """A line per score, in full precision: mean and deviation over the seeds, paper, difference."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["setting", "run", "method", "seeds", "step", "score", "mean", "std", "paper",
                     "difference", *results.KINDS])  # fmt: skip
    for setting, rows in table.items():
        for row in rows:
            first, paper = row.runs[0], row.paper
            key = [inert(setting.name), inert(row.label), inert(first.method), len(row.runs),
                   first.last]  # fmt: skip
            for title, values in row.scores.items():
                theirs = paper.get(title, math.nan)
                numbers = (values.mean(), deviation(values), theirs, values.mean() - theirs)
                shown = ["" if math.isnan(number) else repr(float(number)) for number in numbers]
                writer.writerow([*key, inert(title), *shown, setting.protocol, setting.split])
    return text.getvalue()
