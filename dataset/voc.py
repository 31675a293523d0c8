"""PASCAL VOC 2012 with the augmented masks (SBD): where the files lie."""

import os
from pathlib import Path

from dataset.files import Sample, Tree
from dataset.spec import DatasetSpec
from utils.errors import UserError

FOLDER = "PascalVOC12"
LISTS = {"train": "train_aug.txt", "val": "val.txt"}
CURE = "fetch the data with `sh data/download_voc.sh` inside the data root"

_NAMES = """background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog
    horse motorbike person pottedplant sheep sofa train tvmonitor"""
CLASS_NAMES = tuple(_NAMES.split())


def find_samples(data_root: Path, split: str) -> list[Sample]:
    """Samples in the order of the split's list ("train" or "val").

    A line is `/JPEGImages/x.jpg /SegmentationClassAug/x.png`, relative to the data set's folder, or
    a bare id `x`. Raises UserError naming list, line and file for anything else.
    """
    tree = Tree(data_root, FOLDER, CURE)
    list_path = os.path.join(data_root, FOLDER, "splits", LISTS[split])
    try:
        with open(tree.find(f"splits/{LISTS[split]}", f"{split} list"), encoding="utf-8") as file:
            lines = list(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{list_path} cannot be read as text ({error}); {CURE}") from error
    samples = [
        _sample(tree, line, f"{list_path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not samples:
        raise UserError(f"{list_path} lists no image; {CURE}")
    return samples


def _sample(tree: Tree, line: str, where: str) -> Sample:
    names = line.split()
    if len(names) == 1 and "/" not in line:
        names = [f"JPEGImages/{names[0]}.jpg", f"SegmentationClassAug/{names[0]}.png"]
    if len(names) != 2:
        raise UserError(f"{where}: {line[:200]!r} is neither 'IMAGE MASK' nor a bare id")
    sample = Sample(*(tree.find(name, where) for name in names))
    if _stem(sample.image) != _stem(sample.mask):
        raise UserError(f"{where}: image and mask have different names: {line[:200]!r}")
    return sample


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


VOC = DatasetSpec(
    name="voc",
    class_names=CLASS_NAMES,
    background_is_class=True,
    void=255,
    find_samples=find_samples,
)
