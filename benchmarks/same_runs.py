"""How both checkouts are started and what they start from; for benchmarks.same_bits."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

INTERRUPTED = 75  # exit status of a run that SIGTERM stopped, with a checkpoint
STAMP = "made_of.txt"


@dataclass(frozen=True)
class Side:
    """A checkout and the folder for what it computes."""

    checkout: Path
    out: Path

    def run(self, program: str, argv: Sequence[str], folder: str, world: int = 1,
            stop: str = "") -> str:  # fmt: skip
        """Run a program in a subfolder and return what it printed.

        With `stop` it gets SIGTERM after the first line with that text, and must end with
        INTERRUPTED. Raises RuntimeError, in a line, if the exit status is another than wanted.
        """
        cwd = self.out / folder
        cwd.mkdir(parents=True, exist_ok=True)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
        command = [sys.executable, *(launcher if world > 1 else []),
                   str(self.checkout / program), *argv]  # fmt: skip
        wanted, lines, start = INTERRUPTED if stop else 0, [], time.monotonic()
        with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(
            command, cwd=cwd, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process:
            for line in process.stdout or ():
                lines.append(line)
                if stop and stop in line:
                    process.send_signal(signal.SIGTERM)
                    stop = ""
            status = process.wait()
            errors.seek(0)
            said = [*lines, *errors] or ["nothing"]
        took = time.monotonic() - start
        print(f"#       {self.out.name}/{folder}: {program} took {took:.1f} s", flush=True)
        if status != wanted:
            line = next((s for s in said if s.startswith("error: ")), said[-1]).strip()
            raise RuntimeError(f"{program} ended with status {status}, not {wanted}: {line}")
        return "".join(lines)


def cached(folder: Path, state: str, make: Callable[[], object]) -> None:
    """Make a folder's content anew unless it was made to its end in the same `state`."""
    stamp = folder / STAMP
    if not stamp.exists() or stamp.read_text() != state:
        shutil.rmtree(folder, ignore_errors=True)
        make()
        stamp.write_text(state)


def digest(*patterns: tuple[Path, str]) -> str:
    """Of the files that match, by name and content."""
    result = hashlib.sha256()
    for root, pattern in patterns:
        for path in sorted(root.glob(pattern)):
            result.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return result.hexdigest()


def copy_images(data_root: Path, to: Path) -> None:
    """A small data root: half of its images show a class of step 1, the others one of step 0.

    Images are cut to the rectangle around their objects. Otherwise a network that has learned from
    a few batches calls every pixel background, and all tables and masks look the same.
    """
    source, target = data_root / "PascalVOC12", to / "PascalVOC12"
    for split, count in (("train_aug", 24), ("val", 6)):
        lines = (source / "splits" / f"{split}.txt").read_text().splitlines()
        picked: list[str] = []
        for classes in (range(16, 21), range(1, 16)):
            fitting = (x for x in lines if x not in picked and _shows(source, x, classes))
            picked += islice(fitting, count // 2)
        for line in picked:
            _cut(*((source / name.lstrip("/"), target / name.lstrip("/")) for name in line.split()))
        (target / "splits").mkdir(exist_ok=True)
        (target / "splits" / f"{split}.txt").write_text("\n".join(picked) + "\n")


def _shows(source: Path, line: str, classes: range) -> bool:
    with Image.open(source / line.split()[1].lstrip("/")) as mask:
        return bool(np.isin(np.array(mask), classes).any())


def _cut(image: tuple[Path, Path], mask: tuple[Path, Path]) -> None:
    """Copy an image and its mask, both (from, to)."""
    with Image.open(mask[0]) as opened:
        labels = np.array(opened)
    rows, columns = np.nonzero((labels > 0) & (labels < 255))
    box = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    for source, target in (image, mask):
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(source) as opened:
            opened.crop(box).save(target)


def copy_run(folder: Path, to: Path) -> None:
    """A copy that shares the checkpoints, which the program replaces and never changes."""

    def copy(source: str, target: str) -> object:
        return (os.link if source.endswith(".pth") else shutil.copyfile)(source, target)

    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to, copy_function=copy)
    (to / STAMP).unlink(missing_ok=True)
