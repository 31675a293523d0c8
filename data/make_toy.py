"""Make a toy data set in the layout of VOC or ADE20K, from a seed, with numpy and PIL alone.

    python data/make_toy.py --out data/toy                 # then: run.py --data_root data/toy
    python data/make_toy.py --out data/toy --dataset ade

voc: one or two large objects on grey clutter, 20 classes, a void border around each object. A
class is a hue, a shape and a texture; most classes share their hue with another, and every texture
mixes a light and a dark tone of it half and half, so that colour alone does not tell such a pair
apart.
Images of the classes 16-20 nearly always hold a class of 1-15 as well: in a 15-5 task those turn
into background, the shift that the MiB paper is about.
ade: five patches that cover the image, 150 classes, a thin unlabelled line between patches.

An image depends on its split, its index, the size and the seed alone.
"""

import argparse
import colorsys
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Array = NDArray[np.float64]
Sample = tuple[Image.Image, Image.Image]

VOID = 255
STAMP = "toy.json"  # marks a tree as ours: only such a tree is ever replaced
DEFAULT_COUNTS = {"voc": (300, 60), "ade": (100, 30)}
FIRST_NEW = 16  # the first class of step 1 in a 15-5 task
PATCHES = 5  # of an ADE image

# Inside a shape is where its value is below 1; u to the right and v down, in units of the radius.
SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "disc": lambda u, v: np.hypot(u, v),
    "square": lambda u, v: np.maximum(abs(u), abs(v)) / 0.86,
    "diamond": lambda u, v: (abs(u) + abs(v)) / 1.2,
    "triangle": lambda u, v: np.maximum(v / 0.8, (2 * abs(u) - v) / 1.1),
    "cross": lambda u, v: np.maximum(np.minimum(abs(u), abs(v)) / 0.42, np.maximum(abs(u), abs(v))),
}

# Share of the light tone, 0 to 1, one half on average. All look the same in a mirror, because
# training flips images.
TEXTURES: dict[str, Callable[[Array, Array], Array]] = {
    "rows": lambda u, v: _wave(v),
    "columns": lambda u, v: _wave(u),
    "checker": lambda u, v: (_wave(u * 0.8) - 0.5) * (_wave(v * 0.8) - 0.5) * 2 + 0.5,
    "lozenges": lambda u, v: (np.cos(11 * u) + np.cos(11 * v) > 0).astype(float),
    "rings": lambda u, v: _wave(np.hypot(u, v)),
    "ramp": lambda u, v: np.clip(0.5 + 0.6 * v, 0, 1),
}

# Class k is row k - 1: hue in degrees, shape, texture.
CLASSES = [
    (0, "disc", "rows"),
    (0, "square", "ramp"),
    (60, "triangle", "checker"),
    (60, "disc", "ramp"),
    (120, "square", "columns"),
    (120, "diamond", "rings"),
    (180, "disc", "lozenges"),
    (180, "square", "rows"),
    (240, "diamond", "ramp"),
    (240, "cross", "checker"),
    (300, "square", "rings"),
    (300, "disc", "columns"),
    (30, "triangle", "lozenges"),
    (90, "cross", "ramp"),
    (210, "square", "checker"),
    (150, "disc", "rings"),
    (270, "square", "lozenges"),
    (330, "diamond", "rows"),
    (30, "square", "ramp"),
    (210, "disc", "columns"),
]


def _wave(x: Array) -> Array:
    """Bands of 0 and 1, about two to the radius."""
    return (np.sin(12 * x) > 0).astype(float)


def _tones(hue: float, saturation: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """A light and a dark tone (3) of a hue in degrees, RGB in 0 to 1."""
    hue = (hue + rng.uniform(-8, 8)) / 360 % 1
    light = colorsys.hsv_to_rgb(hue, saturation, rng.uniform(0.85, 1))
    dark = colorsys.hsv_to_rgb(hue, saturation, rng.uniform(0.3, 0.45))
    return np.array(light), np.array(dark)


def _paint(texture: Array, tones: tuple[Array, Array]) -> Array:
    """Mix the tones by a texture (H W) in 0 to 1: RGB (H W 3)."""
    return texture[..., None] * tones[0] + (1 - texture[..., None]) * tones[1]


def _photograph(rgb: Array, rng: np.random.Generator) -> Image.Image:
    """Light a scene (H W 3) in 0 to 1 unevenly and add noise."""
    height, width, _ = rgb.shape
    slope = rng.uniform(-0.15, 0.15, 2)
    rows, columns = np.linspace(-1, 1, height), np.linspace(-1, 1, width)
    light = rng.uniform(0.85, 1.05) + slope[0] * rows[:, None] + slope[1] * columns[None]
    noisy = rgb * light[..., None] + rng.normal(0, 0.02, rgb.shape)
    return Image.fromarray((noisy.clip(0, 1) * 255).astype(np.uint8))


def voc_palette() -> list[int]:
    """The 256 x 3 numbers of VOC's colour map: label bit 3k + c is bit 7 - k of channel c."""
    labels = np.arange(256)
    palette = np.zeros((256, 3), dtype=int)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= (labels >> (3 * bit + channel) & 1) << (7 - bit)
    return [int(value) for value in palette.ravel()]


def _clutter(size: int, rng: np.random.Generator) -> Array:
    """A background (H W 3) of dull tones: waves under rectangles of other dull waves."""
    rgb = np.empty((size, size, 3))
    for patch in range(10):
        low = rng.uniform(-0.2, 0.9, 2) if patch else np.zeros(2)
        high = low + (rng.uniform(0.1, 0.4, 2) if patch else 1)
        (top, left), (bottom, right) = (np.stack([low, high]).clip(0, 1) * size).astype(int)
        rows, columns = np.mgrid[top:bottom, left:right] / size
        slope = rng.uniform(-25, 25, 2)
        texture = 0.5 + 0.5 * np.sin(slope[0] * rows + slope[1] * columns + rng.uniform(0, 6))
        hsv = rng.uniform((0, 0, 0.2), (1, 0.25, 0.9), (2, 3))
        light, dark = (np.array(colorsys.hsv_to_rgb(*tone)) for tone in hsv)
        rgb[top:bottom, left:right] = _paint(texture, (light, dark))
    return rgb


def _neighbours(values: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The least and the greatest of each pixel's 3 x 3 neighbourhood, for values 0-255 (H W)."""
    image = Image.fromarray(values.astype(np.uint8))
    least, greatest = image.filter(ImageFilter.MinFilter(3)), image.filter(ImageFilter.MaxFilter(3))
    return np.asarray(least), np.asarray(greatest)


def _place(count: int, size: int, rng: np.random.Generator) -> list[tuple[Array, float]]:
    """Centres (row, column) and radii in pixels of one or two objects that do not overlap much."""
    if count == 1:
        return [(rng.uniform(0.4, 0.6, 2) * size, rng.uniform(0.28, 0.4) * size)]
    along, sides = rng.integers(2), rng.permutation([0.27, 0.73])
    places = []
    for side in sides:
        centre = rng.uniform(0.35, 0.65, 2)
        centre[along] = side + rng.uniform(-0.03, 0.03)
        places.append((centre * size, rng.uniform(0.21, 0.27) * size))
    return places


def voc_sample(classes: list[int], size: int, rng: np.random.Generator) -> Sample:
    """One image with an object of each of one or two classes (1-20), and its mask (H W)."""
    rgb, mask = _clutter(size, rng), np.zeros((size, size), np.uint8)
    rows, columns = np.mgrid[0:size, 0:size] + 0.5
    for label, (centre, radius) in zip(classes, _place(len(classes), size, rng), strict=True):
        hue, shape, texture = CLASSES[label - 1]
        u, v = (columns - centre[1]) / radius, (rows - centre[0]) / radius
        inside = SHAPES[shape](u, v) < 1
        shrunk, grown = _neighbours(inside)
        phase = rng.uniform(-0.1, 0.1, 2)
        paint = _paint(TEXTURES[texture](u + phase[0], v + phase[1]), _tones(hue, 0.8, rng))
        rgb[inside] = paint[inside]
        mask[grown > 0] = VOID
        mask[shrunk > 0] = label
    labels = Image.fromarray(mask)
    labels.putpalette(voc_palette())
    return _photograph(rgb, rng), labels


def voc_classes(index: int, seed: int, split: int) -> list[int]:
    """The classes of image `index`: the first from a shuffled cycle of all 20, so none is rare."""
    cycle = np.random.default_rng([seed, split, index // 20]).permutation(20) + 1
    first = int(cycle[index % 20])
    rng = np.random.default_rng([seed, split, index, 1])
    if first >= FIRST_NEW:
        second = int(rng.integers(1, FIRST_NEW))
        return [first, second] if rng.uniform() < 0.9 else [first]
    second = int(rng.integers(1, 21))
    return [first, second] if second != first and rng.uniform() < 0.6 else [first]


def ade_sample(classes: list[int], size: int, rng: np.random.Generator) -> Sample:
    """One image split into a patch for each class (1-150), and its mask (H W), 0 between them."""
    rows, columns = np.mgrid[0:size, 0:size] / size
    # Seeds of the patches, each in a cell of its own of 3 x 2, so that no patch is tiny.
    cells = np.stack(np.divmod(rng.permutation(6)[: len(classes)], 2), axis=1)
    seeds = (cells + rng.uniform(0.1, 0.9, cells.shape)) / [3, 2]
    phase = rng.uniform(0, 6, (len(classes), 1, 1))
    wobble = 0.02 * np.sin(20 * rows + phase) * np.sin(20 * columns + phase)
    distance = np.hypot(rows - seeds[:, :1, None], columns - seeds[:, 1:, None]) + wobble
    nearest = distance.argmin(0)
    textures = list(TEXTURES.values())
    rgb = np.zeros((size, size, 3))
    for patch, label in enumerate(classes):
        # The golden angle spreads 150 hues; texture and saturation tell neighbours apart.
        tones = _tones(label * 137.5, 0.4 + 0.15 * (label % 4), rng)
        texture = textures[label % len(textures)](columns * 4 - 2, rows * 4 - 2)
        rgb[nearest == patch] = _paint(texture, tones)[nearest == patch]
    mask = np.array(classes, dtype=np.uint8)[nearest]
    least, greatest = _neighbours(nearest)
    mask[least != greatest] = 0
    return _photograph(rgb, rng), Image.fromarray(mask)


def ade_classes(index: int, seed: int, split: int) -> list[int]:
    """The classes of image `index`: the next five of a shuffled cycle of all 150."""
    per_cycle = 150 // PATCHES
    cycle = np.random.default_rng([seed, split, index // per_cycle]).permutation(150) + 1
    start = index % per_cycle * PATCHES
    return [int(label) for label in cycle[start : start + PATCHES]]


def _save(sample: Sample, image_path: Path, mask_path: Path) -> None:
    image, mask = sample
    for path in (image_path, mask_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    image.save(image_path, quality=92)
    mask.save(mask_path)


def write_voc(tree: Path, counts: tuple[int, int], size: int, seed: int) -> None:
    """Write JPEGImages, SegmentationClassAug and splits into a tree."""
    (tree / "splits").mkdir(parents=True)
    for split, (name, count) in enumerate(zip(("train_aug", "val"), counts, strict=True)):
        lines = []
        for index in range(count):
            classes = voc_classes(index, seed, split)
            sample = voc_sample(classes, size, np.random.default_rng([seed, split, index, 2]))
            stem = f"toy_{('train', 'val')[split]}_{index:05d}"
            image, mask = f"JPEGImages/{stem}.jpg", f"SegmentationClassAug/{stem}.png"
            _save(sample, tree / image, tree / mask)
            lines.append(f"/{image} /{mask}\n")
        (tree / "splits" / f"{name}.txt").write_text("".join(lines))


def write_ade(tree: Path, counts: tuple[int, int], size: int, seed: int) -> None:
    """Write images and annotations, training and validation, into a tree."""
    for split, (name, count) in enumerate(zip(("training", "validation"), counts, strict=True)):
        for index in range(count):
            classes = ade_classes(index, seed, split)
            sample = ade_sample(classes, size, np.random.default_rng([seed, split, index, 2]))
            stem = f"ADE_{('train', 'val')[split]}_{index + 1:08d}"
            _save(
                sample,
                tree / "images" / name / f"{stem}.jpg",
                tree / "annotations" / name / f"{stem}.png",
            )


WRITERS = {"voc": ("PascalVOC12", write_voc), "ade": ("ADEChallengeData2016", write_ade)}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the flags; a value that cannot work ends the program with one line and status 2."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s --out DIR [flags]",
        description="Make a toy data set in VOC's or ADE's layout.",
    )
    parser.add_argument("--out", type=Path, required=True, help="what becomes --data_root")
    parser.add_argument(
        "--dataset", choices=DEFAULT_COUNTS, default="voc", help="whose layout (%(default)s)"
    )
    parser.add_argument("--train", type=int, help="training images (voc 300, ade 100)")
    parser.add_argument("--val", type=int, help="validation images (voc 60, ade 30)")
    parser.add_argument(
        "--size", type=int, default=96, help="side of an image, at least 32 (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (%(default)s)")
    opts = parser.parse_args(argv)
    train, val = DEFAULT_COUNTS[opts.dataset]
    opts.train = train if opts.train is None else opts.train
    opts.val = val if opts.val is None else opts.val
    for flag, least in (("train", 1), ("val", 1), ("size", 32), ("seed", 0)):
        if getattr(opts, flag) < least:
            parser.error(f"--{flag} must be at least {least}, not {getattr(opts, flag)}")
    return opts


def make(opts: argparse.Namespace) -> Path:
    """Write the tree beside its place, then put it there, so that no half a tree is ever read.

    Raises SystemExit where something that this program did not make is in the way.
    """
    name, write = WRITERS[opts.dataset]
    tree, part = opts.out / name, opts.out / f"{name}.part"
    if tree.exists() and not (tree / STAMP).is_file():
        raise SystemExit(f"{tree} exists and is no toy data: give another folder with --out")
    shutil.rmtree(part, ignore_errors=True)
    write(part, (opts.train, opts.val), opts.size, opts.seed)
    stamp = {flag: getattr(opts, flag) for flag in ("dataset", "train", "val", "size", "seed")}
    (part / STAMP).write_text(json.dumps(stamp) + "\n")
    shutil.rmtree(tree, ignore_errors=True)
    part.rename(tree)
    return tree


def main(argv: list[str] | None = None) -> None:
    """Make the tree that the flags describe, or end with one line and status 1."""
    opts = parse(argv)
    try:
        tree = make(opts)
    except OSError as error:
        raise SystemExit(f"{error}: check --out {opts.out} and the space left there") from None
    print(f"{tree}: {opts.train} training and {opts.val} validation images")


if __name__ == "__main__":
    main()
