"""Two checkouts of the program, given the same command lines: do they compute the same bits?

    python -m benchmarks.same_bits --old CHECKOUT --new . --data_root DIR [--methods FT MIB]

DIR holds PascalVOC12, from which cuts of a few images are copied. Both checkouts learn two small
steps of VOC 15-5 overlapped with each method, in one process and in two; then all that the old one
wrote in checkpoints and result files, and the printed tables, are compared. The new one may write
more fields and columns. Where numbers differ a line says by how much at the most. After the runs in
one process the new program tests, predicts with and resumes checkpoints of the old one; at last it
is given the flags of the old one. Exit status: 0 all is the same, 1 something differs.

Results of the old checkout stay in --out and are used again until its code, DIR or the command
changes; those of the new one stay where they differ. Both sides use the interpreter that runs this
file, so that nothing but their code differs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.same_flags import Flag, compare_flags, read_flags
from benchmarks.same_runs import Side, cached, copy_images, copy_run, digest
from benchmarks.same_values import (
    Comparisons,
    compare_checkpoints,
    compare_results,
    differences,
    predictions,
    tables,
)

CHECKPOINTS = Path("checkpoints/step/voc-15-5-ov")
BATCH = 4  # images per iteration, over all processes
RUN = [
    "--task", "15-5", "--overlap", "--step", "0-1", "--epochs", "2", "--lr", "0.002,0.01",
    "--backbone", "resnet18", "--no_pretrained", "--crop_size", "64", "--num_workers", "0",
    "--ckpt_interval", "2", "--reg_iterations", "3", "--no_visualize",
]  # fmt: skip
# At 0.01 the penalty of these is unstable, and the rounding of its sums grows with every iteration.
PENALISED, STABLE_RATES = ("EWC", "PI", "RW"), ("--lr", "0.002,0.0005")


def main(argv: Sequence[str] | None = None) -> int:
    opts = get_parser().parse_args(argv)
    os.nice(10)
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    out, results = opts.out.resolve(), Comparisons()
    sides = Side(opts.old.resolve(), out / "old"), Side(opts.new.resolve(), out / "new")
    for needed in (*(side.checkout / "run.py" for side in sides), opts.data_root / "PascalVOC12"):
        if not needed.exists():
            sys.exit(f"error: there is no {needed}")
    data, flags = out / "data", read_flags(sides[0].checkout)
    cached(data, str(opts.data_root.resolve()), lambda: copy_images(opts.data_root, data))
    try:
        for method in opts.methods or next(f.choices for f in flags if f.strings == ["--method"]):
            for world in opts.world:
                compare_runs(results, sides, data, method, world)
            if 1 in opts.world:
                compare_reuse(results, sides, data, method)
        compare_typed(results, sides, data, flags)
    except RuntimeError as error:  # one of the new program does not come here
        sys.exit(f"error: the old checkout cannot be compared with: {error}")
    compare_flags(results, sides[1].checkout, flags, data)
    print(f"{results.count} comparisons, {results.differ} differ")
    return int(results.differ > 0)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--old", type=Path, required=True, help="checkout that is right")
    add("--new", type=Path, default=Path("."), help="checkout that must do the same")
    add("--data_root", type=Path, required=True, help="folder that holds PascalVOC12")
    add("--methods", nargs="+", help="default: all of the old checkout")
    add("--world", nargs="+", type=int, default=[1, 2], choices=(1, 2, 4), help="processes")
    add("--out", type=Path, default=Path(tempfile.gettempdir()) / "same_bits", help="results")
    return parser


def command(method: str, world: int, data: Path) -> list[str]:
    """The flags of a run of both steps."""
    return [*RUN, "--data_root", str(data), "--batch_size", str(BATCH // world),
            "--name", method, "--method", method,
            *(STABLE_RATES if method in PENALISED else ())]  # fmt: skip


def learn_old(old: Side, data: Path, method: str, world: int) -> Path:
    """The folder of the old program's run, made unless it is there.

    It holds what was printed; after a run in one process also predictions with the last checkpoint
    and, in the folder `<method>-stopped`, the same run stopped in its last step.
    """
    folder, argv = f"{method}-{world}", command(method, world, data)
    here, halted = old.out / folder, old.out / f"{method}-stopped"

    def learn() -> None:
        printed = old.run("run.py", argv, folder, world)
        (here / "printed.txt").write_text(printed)
        if world == 1:
            old.run("predict.py", predict_flags(data, method, "predicted"), folder)

    def stop() -> None:
        copy_run(here, halted)
        (halted / CHECKPOINTS / f"{method}_1.pth").unlink()
        for file in halted.glob("logs/results/*.csv"):
            rows = file.read_text().splitlines(keepends=True)
            file.write_text("".join(row for row in rows if row.split(",")[2] != "1"))
        old.run("run.py", argv, halted.name, stop=" validation: ")  # it is now in the next epoch

    made_of = digest((old.checkout, "*.py"), (old.checkout, "[a-z]*/*.py"), (data, "*/*/*"))
    cached(here, f"{made_of} {torch.__version__} {argv}", learn)
    if world == 1:
        cached(halted, f"{made_of} {torch.__version__} {argv}", stop)
    return here


def predict_flags(data: Path, method: str, out: str) -> list[str]:
    lines = (data / "PascalVOC12/splits/val.txt").read_text().split()[::2]
    images = [str(data / "PascalVOC12" / line.lstrip("/")) for line in lines]
    return [*images, "--ckpt", str(CHECKPOINTS / f"{method}_1.pth"), "--out", out, "--scores"]


@contextmanager
def attempt(results: Comparisons, what: str, folder: Path) -> Iterator[None]:
    """A program of the new checkout that fails is a difference; without one the folder goes."""
    before = results.differ
    try:
        yield
    except RuntimeError as error:
        results.add(what, [str(error)])
    if results.differ == before:
        shutil.rmtree(folder)


def compare_runs(results: Comparisons, sides: tuple[Side, Side], data: Path, method: str,
                 world: int) -> None:  # fmt: skip
    """The same run with both programs."""
    old, what = learn_old(sides[0], data, method, world), f"{method} by {world}"
    new = sides[1].out / old.name
    shutil.rmtree(new, ignore_errors=True)
    with attempt(results, f"{what}, run.py", new):
        printed = sides[1].run("run.py", command(method, world, data), new.name, world)
        for step in (0, 1):
            file = CHECKPOINTS / f"{method}_{step}.pth"
            compare_checkpoints(results, f"{what}, step {step}", old / file, new / file)
        compare_results(results, f"{what}, results", old, new)
        before = tables((old / "printed.txt").read_text())
        results.add(f"{what}, {len(before)} tables", differences(before, tables(printed)))


def compare_reuse(results: Comparisons, sides: tuple[Side, Side], data: Path, method: str) -> None:
    """The new program tests, predicts with and resumes what the old one wrote."""
    old, argv = learn_old(sides[0], data, method, 1), command(method, 1, data)
    copy_run(old, here := sides[1].out / f"{method}-tested")
    what = f"{method}, --test of old checkpoints"
    with attempt(results, what, here):
        before = tables((old / "printed.txt").read_text())
        printed = sides[1].run("run.py", [*argv, "--test"], here.name)
        results.add(f"{what} ({len(before)} tables)", differences(before, tables(printed)))
    copy_run(old, here := sides[1].out / f"{method}-predicted")
    what = f"{method}, predict.py with an old checkpoint"
    with attempt(results, what, here):
        whole = ["--window", "0"]  # as the old one saw images, however large
        sides[1].run("predict.py", [*predict_flags(data, method, "again"), *whole], here.name)
        found = predictions(old / "predicted")
        wrong = differences(found, predictions(here / "again"))
        results.add(f"{what} ({len(found)} files)", wrong)
    copy_run(sides[0].out / f"{method}-stopped", here := sides[1].out / f"{method}-resumed")
    what = f"{method}, resumed where the old one stopped"
    with attempt(results, what, here):
        sides[1].run("run.py", [*argv, "--continue_ckpt"], here.name)
        file = CHECKPOINTS / f"{method}_1.pth"
        compare_checkpoints(results, what, old / file, here / file, ["continue_ckpt"])
        compare_results(results, f"{what}, results", old, here)


def compare_typed(results: Comparisons, sides: tuple[Side, Side], data: Path,
                  flags: Sequence[Flag]) -> None:  # fmt: skip
    """A run of FT, whose row is the defaults, is the same with all other flags' defaults typed."""
    old, argv = learn_old(sides[0], data, "FT", 1), command("FT", 1, data)
    typed = [
        word for flag in flags if not set(flag.strings) & set(argv) for word in flag.typed_default()
    ]
    new, what = sides[1].out / "FT-typed", f"FT with {len(typed)} defaults typed"
    shutil.rmtree(new, ignore_errors=True)
    with attempt(results, what, new):
        sides[1].run("run.py", [*argv, *typed], new.name)
        for step in (0, 1):
            file = CHECKPOINTS / f"FT_{step}.pth"
            compare_checkpoints(results, f"{what}, step {step}", old / file, new / file)


if __name__ == "__main__":
    sys.exit(main())
