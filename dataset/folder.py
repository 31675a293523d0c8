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
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, ValidationError, ValidationInfo
from pydantic_core import ErrorDetails

from dataset.draws import VAL_SHARE, generator
from dataset.files import Sample, Tree
from dataset.spec import DatasetSpec
from tasks import Family
from utils.constants import IGNORE_INDEX
from utils.errors import UserError

FILE = "dataset.json"
SUFFIXES = (".jpg", ".jpeg", ".png")
CURE = f"correct {FILE} or the files (python -m dataset.check lists every problem)"
MAX_CLASSES = 254  # with label 0; on reading, 254 marks foreign labels and 255 ignored pixels


def _refusing(problems_of: Callable[[Any, ValidationInfo], list[str]]) -> AfterValidator:
    """A validator of one key; the function may look at the valid keys above it in `info.data`."""

    def validate(value: Any, info: ValidationInfo) -> Any:
        if problems := problems_of(value, info):
            raise ValueError("\n".join(problems))
        return value

    return AfterValidator(validate)


def _path_problems(path: str, info: ValidationInfo) -> list[str]:
    if path and not os.path.isabs(path) and ".." not in path.split("/"):
        return []
    return [f"{info.field_name!r} must be a path below the folder of {FILE}, without '..'"]


def _name_problems(classes: list[str], _: ValidationInfo) -> list[str]:
    twice = sorted(name for name, count in Counter(classes).items() if count > 1)
    return [
        f"class {label} has the name {name!r}: it must be printable and not blank"
        for label, name in enumerate(classes)
        if not name.strip() or not name.isprintable()
    ] + [f"two classes are called {name!r}" for name in twice]


def _ignore_problems(ignore: int | None, info: ValidationInfo) -> list[str]:
    first = len(info.data.get("classes", ()))
    if ignore is None or first <= ignore <= 255:
        return []
    return [f"'ignore' is {ignore}: use a label from {first} to 255, or null"]


def _share_problems(share: float | None, info: ValidationInfo) -> list[str]:
    listed = [info.data.get(key, "") is not None for key in ("train", "val")]
    if listed == [share is None] * 2:
        return []
    return ["give either 'train' and 'val' (lists) or 'val_share' (0 to 1)"]


def _task_problems(tasks: dict[str, list[list[Any]]], info: ValidationInfo) -> list[str]:
    found = []
    for name, steps in tasks.items():
        if not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", name) or name == "offline":
            found.append(f"task {name!r}: use letters, digits and _, a letter first, not 'offline'")
        if "classes" in info.data:
            problems = _step_problems(steps, info.data["classes"])
            found += [f"task {name!r}: {problem}" for problem in problems]
    return found


def _step_problems(steps: list[list[Any]], classes: list[str]) -> list[str]:
    """Every class but label 0 must occur in exactly one step, by name or by label."""
    found = [f"step {t} is empty" for t, step in enumerate(steps) if not step]
    labels = []
    for entry in (entry for step in steps for entry in step):
        label = classes.index(entry) if entry in classes else entry
        if type(label) is not int or not 1 <= label < len(classes):  # true is an int, too
            found.append(f"{entry!r} is neither a class name nor a label 1 to {len(classes) - 1}")
        elif label in labels:
            found.append(f"class {classes[label]!r} occurs twice")
        else:
            labels.append(label)
    missing = [name for label, name in enumerate(classes) if label and label not in labels]
    return found + ([f"no step learns {', '.join(missing)}"] if missing else [])


Below = Annotated[str, _refusing(_path_problems)]


class Layout(BaseModel, frozen=True, strict=True, extra="forbid"):
    """What dataset.json says; paths are relative to its folder.

    Attributes:
        classes: Names by label.
        background: Label 0 is a class that is scored, not "unlabelled".
        ignore: Label of pixels that belong to no class; None if masks have none.
        train, val: The two lists; None where `val_share` of all images are drawn by `seed`.
        tasks: Steps of classes by name, each class a name or a label.
    """

    classes: Annotated[
        list[str], Field(min_length=2, max_length=MAX_CLASSES), _refusing(_name_problems)
    ]
    background: bool = True
    ignore: Annotated[int | None, _refusing(_ignore_problems)] = IGNORE_INDEX
    images: Below = "images"
    masks: Below = "masks"
    train: Below | None = None
    val: Below | None = None
    val_share: Annotated[
        float | None, Field(gt=0, lt=1, validate_default=True), _refusing(_share_problems)
    ] = None
    seed: int = Field(0, ge=0)
    tasks: Annotated[dict[str, list[list[Any]]], _refusing(_task_problems)] = {}


def read_layout(root: Path) -> tuple[Layout | None, list[str]]:
    """`root`/dataset.json and all that is wrong with it, a line each; None if anything is."""
    path = root / FILE
    try:
        if path.exists() and not path.is_file():  # a pipe or a device may never end
            return None, [f"{path} is no file"]
        return Layout.model_validate(json.loads(path.read_bytes())), []
    except OSError as error:
        return None, [f"{path} cannot be read ({error.strerror or error})"]
    except ValidationError as error:
        # Unknown keys first: a slip in a key is why another one is missing.
        found = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        return None, [f"{path}: {line}" for details in found for line in _lines(details)]
    except (ValueError, RecursionError) as error:
        return None, [f"{path} is not JSON ({error})"]


def _lines(error: ErrorDetails) -> list[str]:
    """An error of pydantic as a user is told of it."""
    key, value = ".".join(map(str, error["loc"])), json.dumps(error["input"])[:60]
    if not key:
        return ["is no object {...}"]
    if error["type"] == "extra_forbidden":
        return [f"unknown key {key!r}, use {', '.join(sorted(Layout.model_fields))}"]
    if error["type"] == "missing":
        return [f"no key {key!r}, which is needed"]
    if error["type"] == "value_error":
        return str(error["ctx"]["error"]).splitlines()
    return [f"{key!r} is {value}: {error['msg'][0].lower()}{error['msg'][1:]}"]


def folder_spec(root: Path) -> DatasetSpec:
    """The data set that `root`/dataset.json describes.

    Raises UserError if the file is missing or wrong, naming the first problem.
    """
    layout, problems = read_layout(root)
    if layout is None:
        raise UserError(f"{problems[0]}; {CURE}")
    numbers = {name: label for label, name in enumerate(layout.classes)}
    tasks = {
        name: [[numbers.get(c, c) for c in step] for step in steps]
        for name, steps in layout.tasks.items()
    }
    return DatasetSpec(
        name="folder",
        class_names=tuple(layout.classes),
        background_is_class=layout.background,
        void=layout.ignore,
        find_samples=partial(find_samples, layout),
        family=Family(len(layout.classes) - 1, names=tuple(tasks), listed=tasks),
    )


def find_samples(layout: Layout, root: Path, split: str) -> list[Sample]:
    """Samples of a split ("train" or "val"), in the order of its list or by name.

    Raises UserError naming the first problem.
    """
    samples, problems = collect_samples(layout, root, split)
    if problems:
        raise UserError(f"{problems[0]}; {CURE}")
    return samples


# --- images and masks ---


def collect_samples(layout: Layout, root: Path, split: str) -> tuple[list[Sample], list[str]]:
    """The samples of a split ("train" or "val") and all that is wrong with it, a line each.

    Raises UserError if one of the folders is missing.
    """
    images, masks = (Tree(root, folder, CURE) for folder in (layout.images, layout.masks))
    index = index_files(images, SUFFIXES)
    problems: list[str] = []
    if layout.val_share is not None:
        names = _draw(sorted(index), layout.val_share, layout.seed)[split]
    else:
        names, problems = _read_list(root / getattr(layout, split), index)
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


def _draw(stems: list[str], share: float, seed: int) -> dict[str, list[str]]:
    """Train and val of sorted stems: at least one each where there are two, order kept."""
    number = min(max(1, round(share * len(stems))), len(stems) - 1)
    order = generator(VAL_SHARE, seed).permutation(len(stems))
    val = {stems[i] for i in order[:number]}
    return {"train": [stem for stem in stems if stem not in val], "val": sorted(val)}


def _read_list(path: Path, index: dict[str, list[str]]) -> tuple[list[str], list[str]]:
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
