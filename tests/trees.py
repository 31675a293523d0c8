"""Tiny data sets on disk, and where the big ones of the project lie."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SHARED = Path(__file__).parents[2] / "shared"
PHOTOGRAPHS = SHARED / "data" / "ccp"
GOLDEN = Path(__file__).parent / "golden"

needs_photographs = pytest.mark.skipif(
    not PHOTOGRAPHS.is_dir(), reason=f"no photographs in {PHOTOGRAPHS}"
)


def mask_of(*labels: int, width: int = 12, height: int = 10) -> np.ndarray:
    """uint8 (H W): vertical bands of the given labels."""
    row = np.repeat(np.array(labels, dtype=np.uint8), -(-width // len(labels)))[:width]
    return np.tile(row, (height, 1))


def make_voc(root: Path, train: Sequence[np.ndarray], val: Sequence[np.ndarray] = ()) -> Path:
    """A VOC tree with these masks and seeded noise for images; returns `root`."""
    base = root / "PascalVOC12"
    (base / "splits").mkdir(parents=True)
    for name, masks in (("train_aug", train), ("val", val or train[:1])):
        stems = [f"{name}{i}" for i in range(len(masks))]
        for stem, mask in zip(stems, masks, strict=True):
            write_pair(
                base / f"JPEGImages/{stem}.jpg", base / f"SegmentationClassAug/{stem}.png", mask
            )
        lines = [f"/JPEGImages/{stem}.jpg /SegmentationClassAug/{stem}.png\n" for stem in stems]
        (base / f"splits/{name}.txt").write_text("".join(lines))
    return root


def make_ade(root: Path, train: Sequence[np.ndarray], val: Sequence[np.ndarray] = ()) -> Path:
    """The same in the layout of ADE."""
    base = root / "ADEChallengeData2016"
    for name, masks in (("training", train), ("validation", val or train[:1])):
        for i, mask in enumerate(masks):
            image = base / f"images/{name}/ADE_{i:08}.jpg"
            write_pair(image, base / f"annotations/{name}/ADE_{i:08}.png", mask)
    return root


def write_pair(image_path: Path, mask_path: Path, mask: np.ndarray) -> None:
    """Write a mask as a palette PNG and an image of its size."""
    for path in (image_path, mask_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(mask.size).integers(0, 256, (*mask.shape, 3), dtype=np.uint8)
    Image.fromarray(noise).save(image_path)
    picture = Image.fromarray(mask)
    picture.putpalette(bytes(range(256)) * 3)
    picture.save(mask_path)
