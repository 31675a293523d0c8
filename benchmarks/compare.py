"""Methods side by side on one task: a shared step 0, then every later step with each method.

    python -m benchmarks.compare --data_root DIR --methods FT MIB --out compare [flags of run.py]

Everything lands under `--out` (checkpoints, logs, split lists); a second start goes on where the
first stopped. Flags that this script does not know go to every run.py as they are. EWC, RW and PI
collect their importances during step 0, which changes nothing in its weights: step 0 is run once
for each of them, the weights are checked to be equal, and every other method starts from the same.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tasks import get_task
from utils.checkpoint import checkpoint_path, setting
from utils.methods import METHODS
from utils.results import read_results, result_files

ROOT = Path(__file__).resolve().parent.parent
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
    kinds = {method: METHODS[method].regularizer for method in opts.methods}
    starts = {kind: f"base-{kind}" if kind else "base" for kind in kinds.values()}
    if len(starts) > 1:  # a step 0 that collects importances has the same weights
        starts[None] = next(start for kind, start in starts.items() if kind)
    for kind, start in starts.items():
        extra = ["--regularizer", kind] if kind else []
        learn(opts, passed_on, start, 0, extra)
    check_equal([checkpoint_of(opts, start, 0) for start in starts.values()])
    for method, kind in kinds.items():
        for step in range(1, task.num_steps):
            extra = ["--method", method]
            if step == 1:
                extra += ["--step_ckpt", str(checkpoint_of(opts, starts[kind], 0).resolve())]
            learn(opts, passed_on, method, step, extra)
    return collect(opts, starts[None] if None in starts else next(iter(starts.values())))


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


def check_equal(paths: Sequence[Path]) -> None:
    """SystemExit unless all checkpoints hold the same weights."""
    first, *others = [torch.load(p, weights_only=True)["model_state"] for p in paths]
    for path, state in zip(paths[1:], others, strict=True):
        if any(not torch.equal(value, state[key]) for key, value in first.items()):
            raise SystemExit(f"{path} differs from {paths[0]}: the methods would start unequal")


def results(opts: argparse.Namespace) -> dict[tuple[str, int], dict[str, float]]:
    """(name, step) -> the row of means."""
    task = get_task(opts.dataset, opts.task).name
    _, means = result_files(opts.out / "logs", setting(opts.dataset, task, opts.overlap))
    if not means.exists():
        return {}
    return {(str(r["name"]), int(r["step"])): r for r in read_results(means)}  # type: ignore[arg-type,misc]


def collect(opts: argparse.Namespace, start: str) -> dict[str, dict[str, float]]:
    """The table: step 0, whose classes are all old afterwards, then each method's last step."""
    rows, last = results(opts), get_task(opts.dataset, opts.task).num_steps - 1
    first = rows[start, 0]
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
