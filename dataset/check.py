"""Read all of one's own data and report what is in it and what is wrong with it.

    python -m dataset.check DIR [--task 8-4 ...]

prints a line per class, the number of training images of every step, and every kind of problem with
the first files that have it. The exit status is 1 if there is any problem.
"""

from __future__ import annotations

import utils.uncaught  # noqa: F401  before any library

# isort: split
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.files import Sample, Tree, read_image
from dataset.folder import SUFFIXES, collect_samples, folder_spec, index_files
from dataset.layout import FILE, Layout, read_layout
from dataset.spec import DatasetSpec
from dataset.splits import step_indices
from tasks import Task
from utils.errors import UserError
from utils.flags import Parser
from utils.progress import bar

ORIENTATION = 0x0112  # EXIF tag; 1 = as stored
SHOWN = 3  # problems of one kind that are printed
KINDS = 10  # kinds that differ in an id, a colour or a label only, of which problems are printed
# A quoted name (but no id and no colour), a path, a line number, a size, a count.
VARYING = re.compile(
    r"'(?!\d+'|#)[^']*'|\S*[/.]\S*|\bline \d+|\d+x\d+|\d+ pixels| and \d+ others"
)
NUMBERS = re.compile(r"'[^']*'|#\w+|\d+(, \d+)*")
PICTURES = (".bmp", ".gif", ".jfif", ".jp2", ".tif", ".tiff", ".webp")  # which training ignores


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = Parser("-m dataset.check", words="DIR [flags]", description=__doc__)
    parser.add_argument("root", type=Path, metavar="DIR", help="folder with dataset.json")
    parser.add_argument("--task", nargs="+", default=[], help="tasks to count, beside listed ones")
    try:
        options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        lines, problems = check(options.root, options.task)
    except UserError as error:
        lines, problems = [], [str(error)]
    print("\n".join(lines))
    for problem in summary(problems, str(options.root)):
        print(f"problem: {problem}")
    print(f"{len(problems) or 'no'} problem{'s' * (len(problems) != 1)}")
    return 1 if problems else 0


def summary(problems: Sequence[str], root: str) -> list[str]:
    """The problems, of each kind the first SHOWN and how many more there are.

    Problems are of one kind if they differ in files, lines, sizes and counts of pixels only. Of
    kinds that differ in ids, colours or labels only, the first KINDS are shown.
    """
    families: dict[str, dict[str, list[str]]] = {}
    for problem in problems:
        kind = VARYING.sub("_", problem.replace(root, ""))
        family = families.setdefault(NUMBERS.sub("_", kind), {})
        family.setdefault(kind, []).append(problem)
    lines = []
    for family in families.values():
        kinds = list(family.values())
        for same in kinds[:KINDS]:
            more = len(same) - SHOWN
            lines += same if more <= 1 else [*same[:SHOWN], f"and {more} more of this kind"]
        if rest := sum(map(len, kinds[KINDS:])):
            lines.append(f"and {rest} more like these, of other numbers")
    return lines


def check(root: Path, tasks: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """(report, problems), both as lines. Raises UserError for a missing folder."""
    layout, problems = read_layout(root)
    if layout is None:
        return [], problems
    spec = folder_spec(root)
    splits = {}
    for split in ("train", "val"):
        splits[split], found = collect_samples(layout, root, split)
        problems += found
    problems += _unused_files(layout, root) + _used_twice(splits)
    counts = {}
    for split, samples in splits.items():
        counts[split], found = _scan(spec, samples, split)
        problems += found
    present = counts["train"][:, 1 : spec.num_classes + 1] > 0
    problems += [
        f"{root}: class {label} ({spec.class_names[label]}) is in no mask of the train list"
        for label in 1 + np.flatnonzero(~present.any(axis=0))
    ]
    sizes = " and ".join(f"{len(samples)} {split}" for split, samples in splits.items())
    lines = [f"{root}: {spec.num_classes} classes, {sizes} images", ""]
    lines += [*_class_table(spec, counts), ""]
    for name in [*layout.tasks, *tasks] or ["offline"]:
        lines += _step_table(spec, present, spec.task(name))
    return lines, list(dict.fromkeys(problems))  # a pair in both lists is read twice


def _unused_files(layout: Layout, root: Path) -> list[str]:
    """Masks without image, and pictures in a format that training does not read."""
    images, masks = (Tree(root, folder, "") for folder in (layout.images, layout.masks))
    known, found = index_files(images, SUFFIXES), index_files(masks, (".png",))
    lines = [
        f"mask {os.path.join(masks.root, name)} has no image"
        for stem in sorted(found.keys() - known.keys())
        for name in found[stem]
    ]
    return lines + [
        f"{os.path.join(images.root, name)} is not read: save it as JPEG or PNG"
        for names in index_files(images, PICTURES).values()
        for name in names
    ]


def _used_twice(splits: dict[str, list[Sample]]) -> list[str]:
    uses = Counter(sample.image for samples in splits.values() for sample in samples)
    return [f"{image} stands in the lists {n} times" for image, n in uses.items() if n > 1]


def _scan(
    spec: DatasetSpec, samples: Sequence[Sample], split: str
) -> tuple[np.ndarray, list[str]]:
    """Pixels of every label in every mask, (N, 256) int64, and the problems of all files."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        rows = pool.map(lambda sample: _inspect(spec, sample), samples)
        found = list(bar(rows, desc=f"{split} images", total=len(samples), unit="image"))
    counts = np.array([row for row, _ in found], dtype=np.int64).reshape(-1, 256)
    return counts, [problem for _, problems in found for problem in problems]


def _inspect(spec: DatasetSpec, sample: Sample) -> tuple[list[int], list[str]]:
    """Pixels of every label in the mask (zeros if unreadable), and what is wrong with the pair."""
    problems, sizes, counts = [], [], [0] * 256
    try:
        sizes.append(read_image(sample.image).size)
        with Image.open(sample.image) as picture:
            if picture.getexif().get(ORIENTATION, 1) != 1:
                problems.append(f"{sample.image} is turned by an EXIF tag: turn its pixels")
    except UserError as error:
        problems.append(str(error))
    try:
        mask = spec.read_mask(sample.mask)
        sizes.append(mask.size)
        counts = mask.histogram()
    except UserError as error:
        problems.append(str(error))
    if len(set(sizes)) > 1:
        (w, h), (mask_w, mask_h) = sizes
        problems.append(f"{sample.image} is {w}x{h} but {sample.mask} is {mask_w}x{mask_h} pixels")
    if foreign := spec.foreign_labels(counts):
        problems.append(
            f"{sample.mask} holds foreign labels {', '.join(map(str, foreign))}: correct the mask, "
            f"or name them in {FILE} (docs/own_data.md)"
        )
    return counts, problems


def _class_table(spec: DatasetSpec, counts: dict[str, np.ndarray]) -> list[str]:
    """A line per class: images and share of all pixels in both splits."""
    width = max(len(name) for name in (*spec.class_names, "(ignored)"))
    head = f"{'#':>3}  {'class':<{width}}"
    for split in counts:
        head += f"  {split + ' images':>12}  {split + ' pixels':>12}"
    names = dict(enumerate(spec.class_names))
    if spec.void is not None:
        names[spec.void] = "(ignored)"
    lines = [head, "-" * len(head)]
    for label, name in names.items():
        line = f"{label:>3}  {name:<{width}}"
        for table in counts.values():
            share = 100 * table[:, label].sum() / max(1, table.sum())
            line += f"  {np.count_nonzero(table[:, label]):>12}  {share:>10.2f} %"
        lines.append(line)
    return lines


def _step_table(spec: DatasetSpec, present: np.ndarray, task: Task) -> list[str]:
    """Training images of every step in both settings."""
    lines = [f"task {task.name}: training images per step (overlapped / disjoint)"]
    settings = [step_indices(spec, present, task, overlap) for overlap in (True, False)]
    for step, (overlapped, disjoint) in enumerate(zip(*settings, strict=True)):
        names = ", ".join(spec.class_names[label] for label in task.new(step) if label)
        lines.append(f"  step {step}: {len(overlapped):>6} / {len(disjoint):<6}  {names}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
