"""From the launch of the program to the end of its first iteration.

    python -m benchmarks.startup [--images 100 1000 4000] [--json FILE] [flags of run.py]

On toy data of so many images, step 0 of 15-5. Ours is run.py, once with the lists of the step's
images still to be found and once with those that an earlier run has cached. The plain side does
what a program without lists does at every start: it imports the same packages, opens every mask to
see what is in it, builds the same network, reads a batch and takes a step. Memory is that of
the main process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import run
import train
from benchmarks.harness import Sample, Work, compare, parser, report, start
from dataset.catalog import get_spec
from engine.plans import parse
from modules.norm import get_norm
from segmentation_module import make_model

ROOT = Path(__file__).resolve().parent.parent
# Small crops: the first iteration belongs to it, but is not what takes long before it.
FLAGS = ("--task", "15-5", "--overlap", "--no-pretrained", "--crop_size", "64")
LISTS = Path("data", "voc")  # in the working directory


def run_until_first_iteration(argv: list[str]) -> None:
    """run.py, which ends with the end of its first iteration."""
    step = train.Learner.step

    def last(*args: object) -> None:
        step(*args)  # type: ignore[arg-type]
        os._exit(0)

    train.Learner.step = last  # type: ignore[method-assign, assignment]
    sys.exit(run.main(argv))


def plain_until_first_iteration(argv: list[str]) -> None:
    """A start without lists, from scratch."""
    ((opts, _),) = parse(argv)
    spec = get_spec(opts.dataset, opts.data_root)
    task = spec.task(opts.task)
    samples = spec.find_samples(Path(opts.data_root), "train")
    new = task.new(opts.step)
    found = [s for s in samples if np.isin(np.unique(np.array(Image.open(s.mask))), new).any()]
    classes = task.classes_per_step(opts.step)
    model = make_model(opts.backbone, get_norm(opts.norm_act), classes).train()
    size = (opts.crop_size, opts.crop_size)
    images = [
        np.array(Image.open(s.image).convert("RGB").resize(size))
        for s in found[: opts.batch_size]
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=opts.lr, momentum=opts.momentum)
    logits = model(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255).logits
    F.interpolate(logits, size, mode="bilinear").logsumexp(1).mean().backward()
    optimizer.step()
    os._exit(0)


def launch(side: str, cached: bool, argv: tuple[str, ...], work: Path) -> Callable[[], float]:
    """The call that starts one side in `work` and waits for its end; it returns its peak, MiB."""
    code = f"import sys; from benchmarks import startup; startup.{side}(sys.argv[1:])"
    command = [sys.executable, "-c", code, *argv]

    def call() -> float:
        if not cached:
            shutil.rmtree(work / LISTS, ignore_errors=True)
        # The plain side knows no GPU.
        environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        with tempfile.TemporaryFile("w+") as log:
            child = subprocess.Popen(command, cwd=work, env=environment, stdout=log, stderr=log)
            _, status, usage = os.wait4(child.pid, 0)
            log.seek(0)
            if status:
                raise RuntimeError(f"{side} failed:\n{log.read()}")
        return usage.ru_maxrss / 1024

    return call


def measure(work: Work, calls: int, device: str) -> Sample:
    """The fastest of `calls` launches."""
    call = work()
    call()  # the files are in the page cache from here on, and the lists where they may stay
    samples = []
    for _ in range(calls):
        start = time.perf_counter()
        peak = float(str(call()))
        samples.append((time.perf_counter() - start, peak, peak))
    return Sample(*min(samples))


def make_data(root: Path, images: int, size: int) -> Path:
    out = root / f"toy-{images}"
    script = [sys.executable, str(ROOT / "data" / "make_toy.py"), "--out", str(out)]
    script += ["--train", str(images), "--val", "10", "--size", str(size)]
    subprocess.run(script, check=True, stdout=subprocess.DEVNULL)
    return out


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--images", type=int, nargs="+", default=[100, 1000, 4000])
    p.add_argument("--size", type=int, default=128, help="side of the images")
    args, rest = p.parse_known_args()
    cases: dict[str, tuple[Work, Work]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for images in args.images:
            data = make_data(work, images, args.size)
            argv = ("--data_root", str(data), *FLAGS, *rest)
            plain = partial(launch, "plain_until_first_iteration", True, argv, work)
            for cached in (False, True):
                ours = partial(launch, "run_until_first_iteration", cached, argv, work)
                what = "lists cached" if cached else "no lists"
                cases[f"{images} images, {what}"] = (ours, plain)
        report(cases, compare(cases, args, measure), args.json)


if __name__ == "__main__":
    start(main)
