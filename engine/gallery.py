"""A picture of what checkpoints of one task say of the same images.

    python -m engine.gallery --out gallery.png CHECKPOINT CHECKPOINT ...

Columns: the image, the truth, then a checkpoint each, such as step 0, FT and MIB after step 1. The
images are chosen by a rule, not by eye. A tenth of the validation images is looked at: those with
the most classes, and before them those that hold old and new ones. These are put in the order of
the last checkpoint's accuracy on them; shown is the one in the middle, with `--count N` those that
divide the order into N + 1 equal parts.
"""

from __future__ import annotations

import utils.uncaught  # noqa: F401  before any library

# isort: split
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from argparser import Options
from dataset.incremental import IncrementalSegmentation
from engine.build import build_data, new_model
from engine.checkpoint import check_complete, check_fits, load
from engine.context import Context
from segmentation_module import IncrementalSegmentationModule, load_state
from train import predict_samples
from utils.constants import IGNORE_INDEX
from utils.errors import UserError
from utils.flags import Parser
from utils.pictures import palette, sample_panel, save_png, stacked

CURE = "name checkpoints that run.py wrote"
SHARE = 10  # a tenth of the images are looked at


class Column(NamedTuple):
    """A checkpoint's network and the step that it is of."""

    title: str
    context: Context
    model: IncrementalSegmentationModule


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    parser = Parser(
        "-m engine.gallery", words="--out FILE [flags] CHECKPOINT ...", description=__doc__
    )
    add = parser.add_argument
    add("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="of one task, in any order")
    add("--out", type=Path, required=True, metavar="FILE", help="the picture, a PNG")
    add("--count", type=int, default=1, help="images, one below the other")
    add("--data_root", help="where the data are now, if not where they were")
    try:
        opts = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
        if opts.count < 1:
            raise UserError(f"--count {opts.count} is no number of images: give 1 or more")
        columns = [read(path, opts.data_root) for path in opts.checkpoints]
        save_png(opts.out, stacked(draw(columns, opts.count)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"picture: {opts.out}")
    return 0


def read(path: Path, data_root: str | None) -> Column:
    """The network of a checkpoint, on the CPU. Raises UserError where it is none of ours."""
    content = load(path, CURE)
    check_complete(content, path, CURE)
    opts = Options.from_record(content["options"])
    opts = replace(opts, amp="off", num_workers=0, data_root=data_root or opts.data_root)
    context = Context.of(opts, torch.device("cpu"))
    names = context.spec.class_names
    check_fits(content, path, opts, context.task.steps[: opts.step + 1], names)
    model = new_model(context, context.classes_per_step)
    load_state(model, content["model_state"], f"checkpoint {path}", CURE)
    step = f"step {opts.step}"
    return Column(step if opts.step == 0 else f"{opts.method.name}, {step}", context, model)


def draw(columns: Sequence[Column], count: int) -> list[np.ndarray]:
    """A panel for each of the chosen images. Raises UserError for checkpoints of several tasks."""
    last = max((column.context for column in columns), key=lambda context: context.opts.step)
    for column in columns:
        if column.context.task != last.task:
            raise UserError("the checkpoints are of several tasks: name those of one")
    data = build_data(last).test
    chosen = choose(data, columns[-1], count)
    samples = [data[index] for index in chosen]
    said = [
        [labels for *_, labels in predict_samples(c.model, c.context.precision, samples)]
        for c in columns
    ]
    titles = [column.title for column in columns]
    panels = []
    for (image, truth), *predictions in zip(samples, *said, strict=True):
        maps = {"truth": truth.numpy(), **dict(zip(titles, predictions, strict=True))}
        panels.append(
            sample_panel(
                image.permute(1, 2, 0).numpy(), maps, last.class_names,
                colors=palette(last.task.seen(last.opts.step)), old=last.old_classes,
            )
        )  # fmt: skip
    return panels


def choose(data: IncrementalSegmentation, column: Column, count: int) -> list[int]:
    """Which images are shown: see the top of this file."""

    def variety(index: int) -> tuple[bool, int]:
        classes = np.setdiff1d(data[index][1].numpy(), [0, IGNORE_INDEX])
        new = classes >= (column.context.old_classes or 0)
        return bool(new.any() and not new.all()), len(classes)

    rich = sorted(range(len(data)), key=variety, reverse=True)[: max(count, len(data) // SHARE)]
    found = predict_samples(column.model, column.context.precision, (data[i] for i in rich))
    right = [float((truth == labels)[truth != IGNORE_INDEX].mean()) for _, truth, labels in found]
    order = [rich[i] for i in np.argsort(right, kind="stable")]
    return [order[(i + 1) * len(order) // (count + 1)] for i in range(count)]


if __name__ == "__main__":
    sys.exit(main())
