"""Methods side by side on one task: a shared step 0, then every later step with each method.

    python -m benchmarks.compare --data_root DIR --methods FT MIB --out compare [flags of run.py]

Everything lands under `--out` (checkpoints, logs, split lists); a second start goes on where the
first stopped. Flags that this script does not know go to every run.py as they are. Step 0 is plain
cross-entropy for all; the importances of EWC, RW and PI are collected in the same run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from methods.table import METHODS
from tasks import get_task
from utils.checkpoint import checkpoint_path, setting
from utils.results import read_results, result_files

ROOT = Path(__file__).resolve().parent.parent
BASE = "base"  # the run that learns step 0
COLUMNS = ("old", "new", "all", "with_background")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--data_root", type=Path, required=True)
    add("--dataset", default="voc")
    add("--task", default="15-5")
    add("--overlap", action="store_true")
    add("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    add("--out", type=Path, default=Path("compare"))
    add("--epochs", nargs=2, default=["30", "30"], metavar=("FIRST", "LATER"))
    add("--lr", nargs=2, default=["0.01", "0.001"], metavar=("FIRST", "LATER"))
    add("--nproc", type=int, default=1, help="processes per run; above 1 under torchrun")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    opts, passed_on = get_parser().parse_known_args(argv)
    table = compare(opts, passed_on)
    print(format_table(table))
    return 0


def compare(opts: argparse.Namespace, passed_on: Sequence[str]) -> dict[str, dict[str, float]]:
    """Run what is missing; returns row name -> column -> mean IoU, "step 0" first."""
    task = get_task(opts.dataset, opts.task)
    opts.out.mkdir(parents=True, exist_ok=True)
    kinds = [kind for m in opts.methods if (kind := METHODS[m].regularizer)]
    learn(opts, passed_on, BASE, 0, ["--regularizer", ",".join(kinds)] if kinds else [])
    start = checkpoint_of(opts, BASE, 0).resolve()
    for method in opts.methods:
        for step in range(1, task.num_steps):
            extra = ["--step_ckpt", str(start)] if step == 1 else []
            learn(opts, passed_on, method, step, ["--method", method, *extra])
    return collect(opts)


def learn(
    opts: argparse.Namespace, passed_on: Sequence[str], name: str, step: int, extra: Sequence[str]
) -> None:
    """One run.py, unless its result is there; CalledProcessError if it fails."""
    if (name, step) in results(opts):
        return
    later = min(step, 1)
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={opts.nproc}"]
    command = [
        sys.executable, *(launcher if opts.nproc > 1 else []), str(ROOT / "run.py"),
        "--data_root", str(opts.data_root.resolve()), "--dataset", opts.dataset,
        "--task", opts.task, *(["--overlap"] if opts.overlap else []),
        "--name", name, "--step", str(step), "--continue_ckpt",
        "--epochs", opts.epochs[later], "--lr", opts.lr[later], *extra, *passed_on,
    ]  # fmt: skip
    print("$", *command, flush=True)
    subprocess.run(command, cwd=opts.out, check=True)


def checkpoint_of(opts: argparse.Namespace, name: str, step: int) -> Path:
    task = get_task(opts.dataset, opts.task).name
    return checkpoint_path(opts.out, opts.dataset, task, opts.overlap, name, step)


def results(opts: argparse.Namespace) -> dict[tuple[str, int], dict[str, float]]:
    """(name, step) -> the row of means."""
    task = get_task(opts.dataset, opts.task).name
    _, means = result_files(opts.out / "logs", setting(opts.dataset, task, opts.overlap))
    if not means.exists():
        return {}
    return {(str(r["name"]), int(r["step"])): r for r in read_results(means)}  # type: ignore[arg-type,misc]


def collect(opts: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The table: step 0, whose classes are all old afterwards, then each method's last step."""
    rows, last = results(opts), get_task(opts.dataset, opts.task).num_steps - 1
    first = rows[BASE, 0]
    table = {"step 0": {**first, "old": first["all"]}}
    return table | {method: rows[method, last] for method in opts.methods}


def format_table(table: dict[str, dict[str, float]]) -> str:
    """Mean IoU in percent; old, new and all without background, as in the paper."""
    lines = ["", f"{'mean IoU, %':<12}" + "".join(f"{c:>17}" for c in COLUMNS)]
    for name, row in table.items():
        cells = [f"{100 * row[c]:17.1f}" if row[c] == row[c] else f"{'-':>17}" for c in COLUMNS]
        lines.append(f"{name:<12}" + "".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
