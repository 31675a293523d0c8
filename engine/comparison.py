"""Runs side by side: from the result files to the columns of the paper's table.

Old, new and all are mean IoU in percent without background, as in the paper: old = classes of step
0, new = those of all later steps, computed from the IoU of every class. ADE has a column per step.
Forgetting is old after step 0 minus old now; average is the mean of all over the steps so far.
Several seeds of a run are shown as mean ± standard deviation.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dataset.catalog import DATASETS
from methods.table import METHODS
from metrics.paper import LISTS, paper_scores
from tasks import Family, get_task, parse_task
from utils import results
from utils.errors import UserError

MAX_STEPS = 10_000  # as on the command line
EXTRAS = ("with background", "forgetting", "average")


@dataclass(frozen=True)
class Setting:
    """What a result file is about; `sizes` = classes per step with background, () if unknown."""

    dataset: str
    task: str
    overlap: bool
    sizes: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.task}{'-ov' if self.overlap else ''}"

    def groups(self) -> dict[str, slice]:
        """Columns of the table: title -> channels of the head."""
        ends = np.cumsum(self.sizes).tolist()
        if self.dataset == "ade":
            steps = get_task("ade", self.task).steps
            titles = [_range([label for label in step if label], t) for t, step in enumerate(steps)]
            return dict(zip(titles, (slice(*cut) for cut in pairwise([1, *ends])), strict=True))
        first, last = (ends[0], ends[-1]) if ends else (1, 1)
        return {"old": slice(1, first), "new": slice(first, last)}


@dataclass
class Run:
    """The tested steps of one name, method and seed in one file."""

    source: Path
    name: str
    method: str
    seed: int
    lists: tuple[Any, ...] = ()  # lengths of the train and val list; None where not recorded
    iou: dict[int, np.ndarray] = field(default_factory=dict)  # step -> (C,), nan: no ground truth
    base: str = ""  # the run whose step 0 this one is taken to have started from

    @property
    def last(self) -> int:
        return max(self.iou)


@dataclass(frozen=True)
class Row:
    """Seeds of a run side by side; scores in percent, a value per seed, nan where unknown."""

    setting: Setting
    label: str
    runs: tuple[Run, ...]

    @property
    def scores(self) -> dict[str, np.ndarray]:
        each = [scores_of(self.setting, run) for run in self.runs]
        return {title: np.array([scores[title] for scores in each]) for title in each[0]}

    @property
    def paper(self) -> dict[str, float]:
        """The paper's scores, where this is the paper's data and the task was learnt to its end."""
        setting, run = self.setting, self.runs[0]
        real = all(run.lists == LISTS.get(setting.dataset) for run in self.runs)
        if not real or run.last != len(setting.sizes) - 1:
            return {}
        return paper_scores(setting.dataset, setting.task, setting.overlap, run.method)


# ------------------------------------------------------------------------------- reading


def find_files(paths: Iterable[Path]) -> list[Path]:
    """Per-class result files among the paths and in the folders. UserError if there is none."""
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"no result file or folder {path}: test a step first, or correct it")
        files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
        found += [file for file in files if not file.stem.endswith("-agg")]
    if not found:
        where = ", ".join(map(str, paths))
        raise UserError(f"no per-class result file in {where}: test a step first (-agg: means)")
    return list(dict.fromkeys(found))


def collect(files: Sequence[Path]) -> dict[Setting, list[Row]]:
    """The rows of the table by setting, in the order of the method table, then by name."""
    runs: dict[Setting, list[Run]] = defaultdict(list)
    for file in files:
        setting, found = read_runs(file)
        runs[setting] += found
    return {setting: _rows(setting, found) for setting, found in runs.items()}


def read_runs(path: Path) -> tuple[Setting, list[Run]]:
    """A result file's setting and runs. Raises UserError for what is no result file."""
    match = re.fullmatch(r"([^-]+)-(.+?)(-ov)?", path.stem)
    if match is None:
        raise UserError(f"{path} is not called <dataset>-<task>.csv: name a per-class result file")
    runs: dict[tuple[str, str, int], Run] = {}
    most = 0
    for row in results.read_results(path):
        if not 0 <= int(row["step"]) < MAX_STEPS:  # type: ignore[arg-type]
            raise UserError(f"{path} has a row of step {row['step']}: mend it")
        key = (str(row["name"]), str(row["method"]), int(row["seed"]))  # type: ignore[arg-type]
        columns = {name: value for name, value in row.items() if re.match(r"\d+:", name)}
        most = max(most, len(columns))
        seen = [value for value in columns.values() if value is not None]
        run = runs.setdefault(key, Run(path, *key))
        run.iou[int(row["step"])] = np.array(seen, dtype=np.float64)  # type: ignore[arg-type]
        run.lists = tuple(row.get(name) for name in results.LISTS)
    if not most:
        raise UserError(f"{path} has no class columns: name a per-class file, not one of means")
    _adopt_bases(list(runs.values()))
    dataset, task, overlap = match.groups()
    sizes = _sizes(dataset, task, most, runs.values())
    return Setting(dataset, task, bool(overlap), sizes), list(runs.values())


def _sizes(dataset: str, task: str, classes: int, runs: Iterable[Run]) -> tuple[int, ...]:
    """Classes per step: as the task's name says, else as the rows of the file show."""
    try:
        if dataset in DATASETS:
            found = DATASETS[dataset].task(task)
        else:
            found = parse_task(dataset, task, Family(classes - 1))
        return tuple(map(len, found.steps))
    except UserError:  # a task listed in dataset.json
        seen = {step: len(iou) for run in runs for step, iou in run.iou.items()}
        ends = [0]
        while len(ends) - 1 in seen:
            ends.append(seen[len(ends) - 1])
        if len(ends) == 1:
            return ()
        if ends[-1] < classes:
            ends.append(classes)
        return tuple(end - start for start, end in pairwise(ends))


def _adopt_bases(runs: Sequence[Run]) -> None:
    """Give runs without a step 0 of their own that of their name, or the only one of their seed.

    A run that has later steps as well (of a method whose step 0 differs) is no such base.
    """
    later = {(run.name, run.seed) for run in runs if run.last}
    for run in runs:
        if 0 in run.iou:
            continue
        bases = [other for other in runs if 0 in other.iou and other.seed == run.seed]
        shared = [other for other in bases if (other.name, other.seed) not in later]
        bases = [other for other in bases if other.name == run.name] or shared
        if bases and all(np.array_equal(b.iou[0], bases[0].iou[0], equal_nan=True) for b in bases):
            run.iou[0] = bases[0].iou[0]
            run.base = bases[0].name if bases[0].name != run.name else ""


def _rows(setting: Setting, runs: Sequence[Run]) -> list[Row]:
    """Runs that differ in their seed alone become one row; equal seeds are told apart by folder.

    `MIB-seed7`, the name that run.py gives a run of seed 7, is `MIB` here.
    """
    together: dict[tuple[str, str, int], list[Run]] = defaultdict(list)
    for run in runs:
        name = run.name.removesuffix(f"-seed{run.seed}")
        together[name, run.method, run.last].append(run)
    rows = []
    for (name, _, _), found in together.items():
        if len({run.seed for run in found}) == len(found):
            rows.append(Row(setting, name, tuple(found)))
        else:
            rows += [Row(setting, f"{name} ({run.source.parent})", (run,)) for run in found]
    order = list(METHODS)

    def place(row: Row) -> tuple[int, str]:
        method = row.runs[0].method
        return order.index(method) if method in order else len(order), row.label

    return sorted(rows, key=place)


# ------------------------------------------------------------------------------- scoring


def scores_of(setting: Setting, run: Run) -> dict[str, float]:
    """Column -> percent after the run's last step; nan where there is nothing to measure."""
    now = run.iou[run.last]
    scores = {title: mean_iou(now[channels]) for title, channels in setting.groups().items()}
    old = slice(1, setting.sizes[0] if setting.sizes else 1)
    steps = [run.iou.get(step) for step in range(run.last + 1)]
    everything = [math.nan if iou is None else mean_iou(iou[1:]) for iou in steps]
    forgetting = math.nan
    if steps[0] is not None and run.last:
        forgetting = mean_iou(steps[0][old]) - mean_iou(now[old])
    extras = (mean_iou(now), forgetting, sum(everything) / len(everything))
    return scores | {"all": mean_iou(now[1:])} | dict(zip(EXTRAS, extras, strict=True))


def mean_iou(iou: np.ndarray) -> float:
    """Mean over the classes with ground truth, in percent; nan if there is none."""
    known = iou[~np.isnan(iou)]
    return 100 * float(known.mean()) if known.size else math.nan


def _range(labels: Sequence[int], step: int) -> str:
    """`101-150`, or `step 1` where the labels are not in their natural order."""
    first, last = labels[0], labels[-1]
    if last - first + 1 != len(labels):
        return f"step {step}"
    return f"{first}-{last}" if len(labels) > 1 else str(first)


def deviation(values: np.ndarray) -> float:
    """Standard deviation of a sample of seeds; nan for one."""
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


# ------------------------------------------------------------------------------- showing


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


def _value(mean: float, spread: float) -> str:
    if math.isnan(mean):
        return "-"
    return f"{mean:.1f}" if math.isnan(spread) else f"{mean:.1f} ± {spread:.1f}"


def title_of(setting: Setting) -> str:
    kind = "" if setting.dataset == "ade" else ", overlapped" if setting.overlap else ", disjoint"
    return f"{setting.dataset} {setting.task}{kind}"


def _notes(rows: Sequence[Row]) -> list[str]:
    """What the stars mean."""
    bases = sorted({run.base for row in rows for run in row.runs if run.base})
    text = "* without a step 0 of its own, compared with that of "
    return [text + ", ".join(bases)] if bases else []


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
                     "difference"])  # fmt: skip
    for setting, rows in table.items():
        for row in rows:
            first, paper = row.runs[0], row.paper
            key = [inert(setting.name), inert(row.label), inert(first.method), len(row.runs),
                   first.last]  # fmt: skip
            for title, values in row.scores.items():
                theirs = paper.get(title, math.nan)
                numbers = (values.mean(), deviation(values), theirs, values.mean() - theirs)
                shown = ["" if math.isnan(number) else repr(float(number)) for number in numbers]
                writer.writerow([*key, inert(title), *shown])
    return text.getvalue()
