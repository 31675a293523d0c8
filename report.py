"""The paper's table out of the result files that run.py writes, and curves over the steps.

    python report.py                                    logs/results
    python report.py logs/results/voc-15-5.csv more/    files, or folders of them
    python report.py --plot steps.pdf

old, new and all are mean IoU in percent over the classes of step 0, of the later steps, and of
both. Forgetting is old after step 0 less old now; average is the mean of all over the steps so far.
Seeds of a run share a row, as mean ± standard deviation; below a row stand the paper's numbers,
where it has any.
"""

from __future__ import annotations

import utils.uncaught  # noqa: F401  before any library

# isort: split
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine.comparison import (
    Row,
    Setting,
    collect,
    deviation,
    find_files,
    mean_iou,
)
from engine.tables import as_csv, as_markdown, as_text, title_of
from utils import streams
from utils.errors import UserError, in_a_line
from utils.flags import Parser
from utils.pictures import Curves, Point, chart_kind, save_charts


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    streams.make_steady()
    parser = Parser("report.py", words="[flags] [PATH ...]", description=__doc__)
    add = parser.add_argument
    add("paths", nargs="*", type=Path, default=[Path("logs/results")], metavar="PATH",
        help="result files or folders of them")  # fmt: skip
    add("--format", default="text", choices=("text", "markdown", "csv"), help="of the table")
    add("--plot", type=Path, metavar="FILE",
        help="draw mean IoU of old, new and all classes per step: .png, .pdf or .svg")  # fmt: skip
    try:
        opts = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
        if opts.plot:
            chart_kind(opts.plot)  # a name that cannot be is told before the work, not after it
        table = collect(find_files(opts.paths))
        if opts.plot:
            draw(table, opts.plot)
            print(f"plot: {opts.plot}", file=sys.stderr)  # the table may go into a file
    except (UserError, OSError) as error:
        print(f"error: {in_a_line(error)}", file=sys.stderr)
        return 1
    print({"text": as_text, "markdown": as_markdown, "csv": as_csv}[opts.format](table), end="")
    return 0


def draw(table: dict[Setting, list[Row]], path: Path) -> None:
    """Mean IoU of old, new and all classes seen so far against the step, a row per setting."""
    charts = {title_of(setting): curves_of(setting, rows) for setting, rows in table.items()}
    save_charts(path, charts, "mean IoU, %")


def curves_of(setting: Setting, rows: Sequence[Row]) -> list[Curves]:
    """The curves of each row; labels get method and seeds where rows share one."""
    new = slice(setting.old.stop, sum(setting.sizes))
    groups = {"old": setting.old, "new": new, "all": slice(setting.first, None)}
    labels = [row.label for row in rows]
    curves = []
    for row in rows:
        method, seeds = row.runs[0].method, " ".join(str(run.seed) for run in row.runs)
        more = f" ({method}, {seeds})" if labels.count(row.label) > 1 else ""
        points = {f"{name} classes": points_of(row, cut) for name, cut in groups.items()}
        curves.append(Curves(row.label + more, method, points))
    return curves


def points_of(row: Row, channels: slice) -> list[Point]:
    """Mean and deviation over the seeds at every step that all of them were tested at."""
    points = []
    for step in sorted(set.intersection(*(set(run.iou) for run in row.runs))):
        values = np.array([mean_iou(run.iou[step][channels]) for run in row.runs])
        points.append((step, float(values.mean()), deviation(values)))
    return points


if __name__ == "__main__":
    sys.exit(main())
