"""Own data from a COCO annotation file: dataset.json and masks.

    python -m dataset.from_coco instances.json --images DIR --out DIR

makes the folder that `--dataset folder --data_root OUT` reads: masks of positions in the list of
classes, a link to the images, and lists. Needs pycocotools (requirements-extras.txt).
"""

from __future__ import annotations

import utils.uncaught  # noqa: F401  before any library

# isort: split
import contextlib
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataset.draws import draw_share
from dataset.layout import FILE, MAX_CLASSES, read_layout
from utils.constants import IGNORE_INDEX
from utils.errors import UserError
from utils.flags import Parser
from utils.progress import bar


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = Parser(
        "-m dataset.from_coco", words="ANNOTATIONS.json --images DIR --out DIR [flags]",
        description=__doc__,
    )  # fmt: skip
    add = parser.add_argument
    add("annotations", type=Path, metavar="ANNOTATIONS.json", help="an instances file of COCO")
    add("--images", type=Path, required=True, metavar="DIR", help="where its file names start")
    add("--out", type=Path, required=True, metavar="DIR", help="new folder for dataset.json")
    add("--val_share", type=float, default=0.2, help="share of images to validate")
    try:
        options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
        classes, images = convert(options.annotations, options.images, options.out,
                                  options.val_share)  # fmt: skip
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: {classes} classes, {images} images; next: python -m dataset.check "
          f"{options.out}")  # fmt: skip
    return 0


def convert(annotations: Path, images: Path, out: Path, val_share: float) -> tuple[int, int]:
    """Write `out`/dataset.json, masks, lists and a link to `images`; returns (classes, images).

    Pixels of no instance are background, those of a crowd are ignored; where instances overlap, the
    smaller one is on top. Images are cut by `val_share` into train.txt and val.txt.

    Raises UserError for a missing pycocotools, files that do not fit, or an `out` that exists.
    """
    coco = _load(annotations)
    if out.exists():
        raise UserError(f"{out} exists: choose another --out, or move it away")
    if not images.is_dir():
        raise UserError(f"no folder {images}: set --images")
    if not 0 < val_share < 1:
        raise UserError(f"--val_share is {val_share}: use a share between 0 and 1")
    categories = sorted(coco.cats)
    names = ["background", *(coco.cats[key]["name"] for key in categories)]
    if not 2 <= len(names) <= MAX_CLASSES:
        raise UserError(f"{annotations} has {len(categories)} categories: 1 to 253 are possible")
    positions = {key: position for position, key in enumerate(categories, start=1)}
    stems = _plan(coco, images, annotations)
    (out / "masks").mkdir(parents=True)
    for key, stem in bar(stems.items(), desc="masks", total=len(stems), unit="mask"):
        path = out / "masks" / f"{stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        _mask(coco, key, positions, annotations).save(path)
    (out / "images").symlink_to(os.path.realpath(images), target_is_directory=True)
    _describe(out, names, sorted(coco.imgs[key]["file_name"] for key in stems), val_share)
    return len(categories), len(stems)


def _load(annotations: Path) -> Any:
    try:
        from pycocotools.coco import COCO
    except ImportError as error:
        raise UserError(
            "pycocotools is missing: pip install -r requirements-extras.txt"
        ) from error
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how long it takes
            coco = COCO(str(annotations))
        if not coco.imgs or not coco.cats:
            raise ValueError("no 'images' or no 'categories'")
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{annotations} is no annotation file of COCO ({error})") from error
    return coco


def _plan(coco: Any, images: Path, annotations: Path) -> dict[int, str]:
    """Id of each image → its path below `images`, without suffix."""
    stems: dict[int, str] = {}
    for key in sorted(coco.imgs):
        name = coco.imgs[key]["file_name"]
        if os.path.isabs(name) or ".." in name.split("/"):
            raise UserError(f"{annotations}: file name {name[:200]!r} leads out of {images}")
        if not (images / name).is_file():
            raise UserError(f"no image {images / name} of {annotations}: correct --images")
        stems[key] = os.path.splitext(name)[0]
    if len(stems) < 2 or len(set(stems.values())) < len(stems):
        raise UserError(f"{annotations} names fewer than two images, or one of them twice")
    return stems


def _mask(coco: Any, key: int, positions: dict[int, int], annotations: Path) -> Image.Image:
    """The mask of an image: larger instances first, so that smaller ones lie on top."""
    picture = coco.imgs[key]
    mask = np.zeros((picture["height"], picture["width"]), dtype=np.uint8)
    for instance in sorted(coco.imgToAnns[key], key=lambda a: -a.get("area", 0)):
        try:
            inside = coco.annToMask(instance).astype(bool)
            mask[inside] = IGNORE_INDEX if instance.get("iscrowd") else (
                positions[instance["category_id"]])
        except Exception as error:  # pycocotools raises the bare class
            raise UserError(
                f"{annotations}: annotation {instance.get('id')} of {picture['file_name']} cannot "
                f"be drawn ({type(error).__name__}: {error})"
            ) from error
    return Image.fromarray(mask)


def _describe(out: Path, names: list[str], files: list[str], val_share: float) -> None:
    """Write lists and dataset.json. Raises UserError for names that dataset.json cannot hold."""
    for split, lines in zip(("train", "val"), draw_share(files, val_share, seed=0), strict=True):
        (out / f"{split}.txt").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    text = {"classes": names, "train": "train.txt", "val": "val.txt"}
    (out / FILE).write_text(json.dumps(text, indent=2, ensure_ascii=False) + "\n", "utf-8")
    layout, problems = read_layout(out)
    if layout is None:
        raise UserError(problems[0])


if __name__ == "__main__":
    sys.exit(main())
