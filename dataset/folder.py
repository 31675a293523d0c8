"""Own data: a folder of images and masks that describes itself in `dataset.json`.

    {"classes": ["background", "road", "car", "tree"],
     "images": "images", "masks": "masks",
     "train": "train.txt", "val": "val.txt"}

docs/own_data.md explains every key; `python -m dataset.check DIR` reads all of it. The mask of
`<images>/a/b.jpg` is `<masks>/a/b.png`, its pixels are positions in `classes` unless `labels` or
`colors` says what they mean.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from dataset.draws import draw_share
from dataset.files import Sample, Tree
from dataset.layout import FILE, Layout, read_layout
from dataset.spec import DatasetSpec
from tasks import Family
from utils.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png")
CURE = f"correct {FILE} or the files (python -m dataset.check lists every problem)"


def folder_spec(root: Path) -> DatasetSpec:
    """The data set that `root`/dataset.json describes.

    Raises UserError if the file is missing or wrong, naming the first problem.
    """
    layout, problems = read_layout(root)
    if layout is None:
        raise UserError(f"{problems[0]}; {CURE}")
    return spec_of(layout, "folder", partial(find_samples, layout), tuple(layout.tasks))


def spec_of(
    layout: Layout,
    name: str,
    find: Callable[[Path, str], list[Sample]],
    task_names: tuple[str, ...],
) -> DatasetSpec:
    """The data set called `name` that `layout` describes.

    `task_names` stand in messages; `find` is `DatasetSpec.find_samples`.
    """
    numbers = {name: label for label, name in enumerate(layout.classes)}
    listed = {
        task: [[numbers.get(c, c) for c in step] for step in steps]
        for task, steps in layout.tasks.items()
    }
    table = layout.table()
    return DatasetSpec(
        name=name,
        class_names=tuple(layout.classes),
        background_is_class=layout.background,
        void=layout.ignore if table is None else table.void,
        find_samples=find,
        family=Family(len(layout.classes) - 1, names=task_names, listed=listed),
        table=table,
    )


def find_samples(layout: Layout, root: Path, split: str, cure: str = CURE) -> list[Sample]:
    """Samples of a split ("train" or "val"), in the order of its list or by name.

    Raises UserError naming the first problem, ending in `cure`.
    """
    samples, problems = collect_samples(layout, root, split, cure)
    if problems:
        raise UserError(f"{problems[0]}; {cure}")
    return samples


# --- images and masks ---


def collect_samples(
    layout: Layout, root: Path, split: str, cure: str = CURE
) -> tuple[list[Sample], list[str]]:
    """The samples of a split ("train" or "val") and all that is wrong with it, a line each.

    Raises UserError if one of the folders is missing.
    """
    images, masks = (Tree(root, folder, cure) for folder in (layout.images, layout.masks))
    index = index_files(images, SUFFIXES)
    problems: list[str] = []
    if layout.val_share is not None:
        names = draw_share(sorted(index), layout.val_share, layout.seed)[split == "val"]
    else:
        names, problems = _read_list(root / getattr(layout, split), index, layout)
    samples = []
    for name in names:
        try:
            samples.append(_pair(images, masks, index, name))
        except UserError as error:
            problems.append(str(error).removesuffix(f"; restore it, or {cure}"))
    if not names and not problems:
        problems.append(f"{images.root}: no image for {split}, two are the least for both splits")
    return samples, problems


def index_files(tree: Tree, suffixes: Sequence[str]) -> dict[str, list[str]]:
    """Files of a tree with one of the suffixes (any case): path without suffix → paths, relative.

    Hidden files and folders are left out.
    """
    index: dict[str, list[str]] = {}
    for path in tree.walk():
        stem, suffix = os.path.splitext(path)
        if suffix.lower() in suffixes:
            index.setdefault(stem, []).append(path)
    return index


def _read_list(
    path: Path, index: dict[str, list[str]], layout: Layout
) -> tuple[list[str], list[str]]:
    """Names in a list file (an image per line, with or without suffix), and what is wrong."""
    try:
        if path.exists() and not path.is_file():
            return [], [f"{path} is no file"]
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        return [], [f"{path} cannot be read as text ({error})"]
    names: dict[str, int] = {}
    problems = []
    for number, line in enumerate(lines, start=1):
        name = _image_of(line, layout)
        if not name:
            continue
        stem, suffix = os.path.splitext(name)
        known = name in index if suffix.lower() not in SUFFIXES else name in index.get(stem, [])
        if not known:
            problems.append(
                f"{path}, line {number}: no image {name[:200]!r} below {layout.images}: name it as "
                "seen from there, without '..'"
            )
        elif name in names:
            problems.append(f"{path}, line {number}: {name!r} stands in line {names[name]} too")
        else:
            names[name] = number
    return list(names), problems


def _image_of(line: str, layout: Layout) -> str:
    """The image that a line of a list names, relative to the folder of images.

    A line in VOC's form, `/JPEGImages/x.jpg /SegmentationClassAug/x.png`, names x.jpg if these are
    the two folders: its paths are relative to what the folders lie in.
    """
    words = line.split()
    if len(words) == 2:
        folders = [os.path.basename(os.path.normpath(f)) for f in (layout.images, layout.masks)]
        image, mask = (word.removeprefix("/") for word in words)
        name = image.removeprefix(f"{folders[0]}/")
        if name != image and mask == f"{folders[1]}/{os.path.splitext(name)[0]}.png":
            return name
    return line.strip().removeprefix("./")


def _pair(images: Tree, masks: Tree, index: dict[str, list[str]], name: str) -> Sample:
    """The sample of an image named with or without suffix. Raises UserError without the cure."""
    candidates = index.get(name, [name])
    if len(candidates) > 1:
        raise UserError(f"{images.root}: {' and '.join(candidates)} would share a mask")
    stem = name if name in index else os.path.splitext(name)[0]
    image = images.find(candidates[0], "image")
    return Sample(image, masks.find(f"{stem}.png", f"image {image} has no mask"))
