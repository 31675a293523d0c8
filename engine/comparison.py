"""Runs side by side: from the result files to the columns of the paper's table.

Old, new and all are mean IoU in percent, computed from the IoU of every class: old = classes of
step 0, new = those of all later steps. Forgetting is old after step 0 minus old now; average is the
mean of all over the steps so far. Several seeds of a run are shown as mean ± standard deviation.

Numbers of two protocols, or on differently chosen images, never share a table. In MiB's protocol no
column counts the background, and ADE has a column per step; in PLOP's, old (called 0-15, or as far
as its classes go) and all count it.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from argparser import PROTOCOLS
from dataset.catalog import DATASETS
from methods.table import METHODS
from metrics.paper import LISTS, paper_scores, plop_scores
from tasks import Family, get_task, parse_task
from utils import results
from utils.errors import UserError, printable

MAX_STEPS = 10_000  # as on the command line
SPLITS = ("partition", "overlapped", "disjoint")


@dataclass(frozen=True)
class Setting:
    """What a table is about; `sizes` = classes per step with background, () if unknown."""

    dataset: str
    task: str
    overlap: bool
    sizes: tuple[int, ...]
    protocol: str
    split: str  # how training images were chosen, one of SPLITS

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.task}{'-ov' if self.overlap else ''}"

    @property
    def first(self) -> int:
        """The first channel that counts in old and all."""
        return 0 if self.protocol == "plop" else 1

    @property
    def old(self) -> slice:
        """The channels of step 0."""
        return slice(self.first, self.sizes[0] if self.sizes else self.first)

    def groups(self) -> dict[str, slice]:
        """Columns of the table: title -> channels of the head."""
        ends = np.cumsum(self.sizes).tolist()
        if self.protocol == "plop" and ends:
            new = slice(ends[0], ends[-1])
            return {f"0-{ends[0] - 1}": self.old, _range(range(new.start, new.stop), 1): new}
        if self.protocol != "plop" and self.dataset == "ade":
            steps = get_task("ade", self.task).steps
            titles = [_range([label for label in step if label], t) for t, step in enumerate(steps)]
            return dict(zip(titles, (slice(*cut) for cut in pairwise([1, *ends])), strict=True))
        return {"old": self.old, "new": slice(self.old.stop, ends[-1] if ends else self.first)}


@dataclass
class Run:
    """The tested steps of one name, method and seed in one file."""

    source: Path
    name: str
    method: str
    seed: int
    list_lengths: tuple[Any, ...] = ()  # of train and val list; None where not recorded
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
        real = all(run.list_lengths == LISTS.get(setting.dataset) for run in self.runs)
        if not real or run.last != len(setting.sizes) - 1:
            return {}
        if setting.protocol == "plop":
            known = plop_scores(setting.dataset, setting.task, run.method)
            titles = dict(zip(("old", "new"), setting.groups(), strict=False))
            shown = {titles.get(name, name): value for name, value in known.items()}
            return shown if setting.split == "overlapped" else {}
        if setting.split != usual_split(setting.dataset, setting.overlap):
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
        where = ", ".join(f"the folder {path}" if path.is_dir() else str(path) for path in paths)
        raise UserError(f"no per-class result file in {where}: test a step first (-agg: means)")
    return list(dict.fromkeys(found))


def collect(files: Sequence[Path]) -> dict[Setting, list[Row]]:
    """The rows of the table by setting, in the order of the method table, then by name."""
    runs: dict[Setting, list[Run]] = defaultdict(list)
    for file in files:
        for setting, found in read_runs(file).items():
            runs[setting] += found
    return {setting: _rows(setting, found) for setting, found in runs.items()}


def usual_split(dataset: str, overlap: bool) -> str:
    """How training images were chosen for a row that does not record it, one of SPLITS."""
    if dataset in DATASETS and DATASETS[dataset].partition:
        return "partition"
    return "overlapped" if overlap else "disjoint"


def read_runs(path: Path) -> dict[Setting, list[Run]]:
    """The runs of a result file by setting. Raises UserError for what is no result file."""
    match = re.fullmatch(r"([^-]+)-(.+?)(-ov)?", path.stem)
    if match is None:
        raise UserError(f"{path} is not called <dataset>-<task>.csv: name a per-class result file")
    dataset, task = map(printable, match.groups()[:2])
    overlap = match[3]
    usual = ("mib", usual_split(dataset, bool(overlap)))
    runs: dict[tuple[str, ...], dict[tuple[str, str, int], Run]] = defaultdict(dict)
    table = results.read_results(path)
    channels = _channels(path, table[0] if table else ())
    for row in table:
        if not 0 <= int(row["step"]) < MAX_STEPS:  # type: ignore[arg-type]
            raise UserError(f"{path} has a row of step {row['step']}: mend it")
        name, method = (printable(str(row[column])) for column in ("name", "method"))
        key = (name, method, int(row["seed"]))  # type: ignore[arg-type]
        kind = tuple(str(row.get(k) or old) for k, old in zip(results.KINDS, usual, strict=True))
        if kind[0] not in PROTOCOLS or kind[1] not in SPLITS:
            raise UserError(f"{path} has a row of {', '.join(kind)}: mend it")
        run = runs[kind].setdefault(key, Run(path, *key))
        run.iou[int(row["step"])] = _iou(path, row, channels)  # type: ignore[arg-type]
        run.list_lengths = tuple(row.get(name) for name in results.LENGTHS)
    by_setting: dict[Setting, list[Run]] = {}
    for kind, found in runs.items():
        _adopt_bases(list(found.values()))
        sizes = _sizes(dataset, task, len(set(channels.values())), found.values())
        setting = Setting(dataset, task, bool(overlap), sizes, *kind)
        by_setting[setting] = list(found.values())
    return by_setting


def _channels(path: Path, columns: Iterable[str]) -> dict[str, int]:
    """Class column -> channel. A class that was renamed has a column for each of its names."""
    matches = {column: results.CLASS_COLUMN.match(column) for column in columns}
    found = {column: match[1] for column, match in matches.items() if match}
    if not found:
        raise UserError(f"{path} has no class columns: name a per-class file, not one of means")
    known = set(found.values())
    missing = next((t for t in range(len(known)) if str(t) not in known), None)
    if missing is not None:
        raise UserError(f"{path} has no class column {missing}:<name>, but a later one: mend it")
    return {column: int(channel) for column, channel in found.items()}


def _iou(path: Path, row: results.Result, channels: Mapping[str, int]) -> np.ndarray:
    """IoU by channel, (C,) up to the last with a value; nan: no ground truth, or left empty."""
    found: dict[int, float] = {}
    for column, channel in channels.items():
        value = row[column]
        if not isinstance(value, float):  # not seen yet, or under the class's other name
            continue
        known = found.setdefault(channel, value)
        if not np.array_equal(known, value, equal_nan=True):
            raise UserError(
                f"{path} has {known} and {value} for channel {channel} in the row "
                f"{results.row_name(row)}: keep one"
            )
    iou = np.full(max(found, default=-1) + 1, math.nan)
    iou[list(found)] = list(found.values())
    return iou


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
    """Give each run without a step 0 the scores of the step 0 that it started from.

    That is the one with its name and seed; else the one of its seed whose run has no later steps
    (a run with later steps may be of a method whose step 0 differs). Where several with different
    scores remain, none is taken.
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
    """Runs that differ in their seed alone become one row, equal seeds a row each.

    In a shared row `MIB-seed7`, the name that run.py gives a run of seed 7, is `MIB`.
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
            rows += [Row(setting, run.name, (run,)) for run in found]
    order = list(METHODS)

    def place(row: Row) -> tuple[int, str]:
        method = row.runs[0].method
        return order.index(method) if method in order else len(order), row.label

    return sorted(_told_apart(rows), key=place)


def _told_apart(rows: Sequence[Row]) -> list[Row]:
    """Where rows of several folders share a label, the folder stands behind it."""
    folders = [", ".join(sorted({str(run.source.parent) for run in row.runs})) for row in rows]
    places = defaultdict(set)
    for row, folder in zip(rows, folders, strict=True):
        places[row.label].add(folder)
    return [
        replace(row, label=f"{row.label} ({folder})") if len(places[row.label]) > 1 else row
        for row, folder in zip(rows, folders, strict=True)
    ]


# ------------------------------------------------------------------------------- scoring


def scores_of(setting: Setting, run: Run) -> dict[str, float]:
    """Column -> percent after the run's last step; nan where there is nothing to measure."""
    now = run.iou[run.last]
    scores = {title: mean_iou(now[channels]) for title, channels in setting.groups().items()}
    steps = [run.iou.get(step) for step in range(run.last + 1)]
    everything = [math.nan if iou is None else mean_iou(iou[setting.first :]) for iou in steps]
    scores["all"] = everything[-1]
    if setting.first:
        scores["with background"] = mean_iou(now)
    scores["forgetting"] = math.nan
    if steps[0] is not None and run.last:
        scores["forgetting"] = mean_iou(steps[0][setting.old]) - mean_iou(now[setting.old])
    return scores | {"average": sum(everything) / len(everything)}


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
