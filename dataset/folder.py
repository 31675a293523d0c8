"""Own data: a folder of images and masks that describes itself in `dataset.json`.

    {"classes": ["background", "road", "car", "tree"],
     "images": "images", "masks": "masks",
     "train": "train.txt", "val": "val.txt"}

docs/own_data.md explains every key; `python -m dataset.check DIR` reads all of it. The mask of
`<images>/a/b.jpg` is `<masks>/a/b.png`, its pixels are positions in `classes`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dataset.sampler import generator
from dataset.spec import DatasetSpec, Sample, Tree
from tasks import Family
from utils.constants import IGNORE_INDEX
from utils.errors import UserError

FILE = "dataset.json"
SUFFIXES = (".jpg", ".jpeg", ".png")
CURE = f"correct {FILE} or the files (python -m dataset.check lists every problem)"
MAX_CLASSES = 253  # beside label 0; on reading, 254 marks foreign labels and 255 ignored pixels
VAL_SHARE = 4  # a purpose of random numbers, beside those of dataset.sampler
KEYS = {
    *("classes", "background", "ignore", "images", "masks"),
    *("train", "val", "val_share", "seed", "tasks"),
}


@dataclass(frozen=True)
class Layout:
    """What dataset.json says; paths are relative to its folder.

    Attributes:
        classes: Names by label.
        background: Label 0 is a class that is scored, not "unlabelled".
        ignore: Label of pixels that belong to no class; None if masks have none.
        lists: Train and val list; None where `val_share` of all images are drawn by `seed`.
        tasks: Steps of labels by name, label 0 left out.
    """

    classes: tuple[str, ...]
    background: bool
    ignore: int | None
    images: str
    masks: str
    lists: tuple[str, str] | None
    val_share: float
    seed: int
    tasks: dict[str, tuple[tuple[int, ...], ...]]


def folder_spec(root: Path) -> DatasetSpec:
    """The data set that `root`/dataset.json describes.

    Raises UserError if the file is missing or wrong, naming the first problem.
    """
    layout, problems = read_layout(root)
    if layout is None:
        raise UserError(f"{problems[0]}; {CURE}")
    return DatasetSpec(
        name="folder",
        class_names=layout.classes,
        background_is_class=layout.background,
        void=layout.ignore,
        find_samples=partial(find_samples, layout),
        family=Family(len(layout.classes) - 1, names=tuple(layout.tasks), listed=layout.tasks),
    )


def find_samples(layout: Layout, root: Path, split: str) -> list[Sample]:
    """Samples of a split ("train" or "val"), in the order of its list or by name.

    Raises UserError naming the first problem.
    """
    samples, problems = collect_samples(layout, root, split)
    if problems:
        raise UserError(f"{problems[0]}; {CURE}")
    return samples


# --- dataset.json ---


def read_layout(root: Path) -> tuple[Layout | None, list[str]]:
    """`root`/dataset.json and all that is wrong with it, a line each; None if anything is."""
    path = root / FILE
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        return None, [f"{path} cannot be read ({error.strerror or error})"]
    except (ValueError, RecursionError) as error:
        return None, [f"{path} is not JSON ({error})"]
    problems = _problems(raw)
    if problems:
        return None, [f"{path}: {problem}" for problem in problems]
    numbers = {name: label for label, name in enumerate(raw["classes"])}
    tasks = {
        name: tuple(tuple(numbers.get(c, c) for c in step) for step in steps)
        for name, steps in raw.get("tasks", {}).items()
    }
    return Layout(
        classes=tuple(raw["classes"]),
        background=raw.get("background", True),
        ignore=raw.get("ignore", IGNORE_INDEX),
        images=raw.get("images", "images"),
        masks=raw.get("masks", "masks"),
        lists=(raw["train"], raw["val"]) if "train" in raw else None,
        val_share=raw.get("val_share", 0.0),
        seed=raw.get("seed", 0),
        tasks=tasks,
    ), []


def _problems(raw: Any) -> list[str]:
    if not isinstance(raw, dict):
        return ["is no object {...}"]
    unknown = [f"unknown key {key!r}, use {', '.join(sorted(KEYS))}" for key in raw.keys() - KEYS]
    classes: Any = raw.get("classes")
    found = _class_problems(classes)
    if not found:
        found = _label_problems(raw, classes) + _task_problems(raw.get("tasks", {}), classes)
    return sorted(unknown) + found + _file_problems(raw)


def _class_problems(classes: Any) -> list[str]:
    if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        return ["'classes' must list the names, that of label 0 (background) first"]
    if not 2 <= len(classes) <= MAX_CLASSES + 1:
        return [f"{len(classes)} classes: 2 to {MAX_CLASSES + 1} are possible, background included"]
    found = [
        f"class {label} has the name {name!r}: it must be printable and not blank"
        for label, name in enumerate(classes)
        if not name.strip() or not name.isprintable()
    ]
    twice = sorted({name for name in classes if classes.count(name) > 1})
    return found + [f"two classes are called {name!r}" for name in twice]


def _label_problems(raw: dict[str, Any], classes: list[str]) -> list[str]:
    found = []
    ignore = raw.get("ignore", IGNORE_INDEX)
    if ignore is not None and not (_is_int(ignore) and len(classes) <= ignore <= 255):
        found.append(f"'ignore' is {ignore!r}: use a label from {len(classes)} to 255, or null")
    if not isinstance(raw.get("background", True), bool):
        found.append("'background' must be true (label 0 is scored) or false (unlabelled)")
    return found


def _file_problems(raw: dict[str, Any]) -> list[str]:
    found = []
    for key, default in (("images", "images"), ("masks", "masks"), ("train", ""), ("val", "")):
        value = raw.get(key, default)
        parts = value.split("/") if isinstance(value, str) else [".."]
        if ".." in parts or os.path.isabs(str(value)) or (key in raw and not value):
            found.append(f"{key!r} must be a path below the folder of {FILE}, without '..'")
    if ("train" in raw) != ("val" in raw) or ("train" in raw) == ("val_share" in raw):
        found.append("give either 'train' and 'val' (lists) or 'val_share' (0 to 1)")
    share = raw.get("val_share", 0.5)
    if not (isinstance(share, (int, float)) and 0 < share < 1):
        found.append(f"'val_share' is {share!r}: use a number above 0 and below 1")
    if not (_is_int(raw.get("seed", 0)) and raw.get("seed", 0) >= 0):
        found.append("'seed' must be a whole number, 0 or more")
    return found


def _task_problems(tasks: Any, classes: list[str]) -> list[str]:
    if not isinstance(tasks, dict):
        return ["'tasks' must be an object {name: [[class, ...], ...]}"]
    found = []
    for name, steps in tasks.items():
        if not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", name) or name == "offline":
            found.append(f"task {name!r}: use letters, digits and _, a letter first, not 'offline'")
        if not (isinstance(steps, list) and steps and all(isinstance(s, list) for s in steps)):
            found.append(f"task {name!r} must be a list of steps, each a list of classes")
        else:
            found += [f"task {name!r}: {problem}" for problem in _step_problems(steps, classes)]
    return found


def _step_problems(steps: list[list[Any]], classes: list[str]) -> list[str]:
    """Every class but label 0 must occur in exactly one step, by name or by label."""
    found = [f"step {t} is empty" for t, step in enumerate(steps) if not step]
    labels = []
    for entry in (entry for step in steps for entry in step):
        label = classes.index(entry) if isinstance(entry, str) and entry in classes else entry
        if not (_is_int(label) and 1 <= label < len(classes)):
            found.append(f"{entry!r} is neither a class name nor a label 1 to {len(classes) - 1}")
        elif label in labels:
            found.append(f"class {classes[label]!r} occurs twice")
        else:
            labels.append(label)
    missing = [classes[label] for label in range(1, len(classes)) if label not in labels]
    return found + ([f"no step learns {', '.join(missing)}"] if missing else [])


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# --- images and masks ---


def collect_samples(layout: Layout, root: Path, split: str) -> tuple[list[Sample], list[str]]:
    """The samples of a split ("train" or "val") and all that is wrong with it, a line each.

    Raises UserError if one of the folders is missing.
    """
    images, masks = (Tree(root, folder, CURE) for folder in (layout.images, layout.masks))
    index = index_files(images, SUFFIXES)
    which = ("train", "val").index(split)
    if layout.lists is not None:
        names, problems = _read_list(root / layout.lists[which], index)
    else:
        names, problems = _draw(sorted(index), layout.val_share, layout.seed)[which], []
    samples = []
    for name in names:
        try:
            samples.append(_pair(images, masks, index, name))
        except UserError as error:
            problems.append(str(error).removesuffix(f"; restore it, or {CURE}"))
    if not names and not problems:
        problems.append(f"{images.root}: no image for {split}, two are the least for both splits")
    return samples, problems


def index_files(tree: Tree, suffixes: Sequence[str]) -> dict[str, list[str]]:
    """Files of a tree with one of the suffixes (any case): path without suffix → paths, relative.

    Hidden files and folders are left out.
    """
    index: dict[str, list[str]] = {}
    for folder, subfolders, _ in os.walk(tree.root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(tree.files(folder)):
            stem, suffix = os.path.splitext(os.path.relpath(os.path.join(folder, name), tree.root))
            if suffix.lower() in suffixes and not name.startswith("."):
                index.setdefault(stem, []).append(stem + suffix)
    return index


def _draw(stems: list[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """(train, val) of sorted stems: at least one each where there are two, order kept."""
    number = min(max(1, round(share * len(stems))), len(stems) - 1)
    order = generator(VAL_SHARE, seed).permutation(len(stems))
    val = {stems[i] for i in order[:number]}
    return [stem for stem in stems if stem not in val], sorted(val)


def _read_list(path: Path, index: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    """Names in a list file (an image per line, with or without suffix), and what is wrong."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        return [], [f"{path} cannot be read as text ({error})"]
    names: dict[str, int] = {}
    problems = []
    for number, line in enumerate(lines, start=1):
        name = line.strip().removeprefix("./")
        if not name:
            continue
        stem, suffix = os.path.splitext(name)
        known = name in index if suffix.lower() not in SUFFIXES else name in index.get(stem, [])
        if not known:
            problems.append(f"{path}, line {number}: no image {name[:200]!r}")
        elif name in names:
            problems.append(f"{path}, line {number}: {name!r} stands in line {names[name]} too")
        else:
            names[name] = number
    return list(names), problems


def _pair(images: Tree, masks: Tree, index: dict[str, list[str]], name: str) -> Sample:
    """The sample of an image named with or without suffix. Raises UserError without the cure."""
    candidates = index.get(name, [name])
    if len(candidates) > 1:
        raise UserError(f"{images.root}: {' and '.join(candidates)} would share a mask")
    stem = name if name in index else os.path.splitext(name)[0]
    image = images.find(candidates[0], "image")
    return Sample(image, masks.find(f"{stem}.png", f"image {image} has no mask"))
