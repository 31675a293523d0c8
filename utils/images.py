"""Image files of any kind as RGB. Imports no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from utils.errors import UserError

# Pillow reads more, some of it by starting other programs.
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "JPEG2000")
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".ppm",
            ".pgm", ".pbm", ".pnm", ".jp2")  # fmt: skip
ORIENTATION = 0x0112  # EXIF tag; from 5 on, width and height change places


def read_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image as it is meant to be seen; reads its header only.

    Raises UserError naming a file that cannot be read.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            turned = image.getexif().get(ORIENTATION, 1) >= 5
            return (image.height, image.width) if turned else image.size
    except Exception as error:  # a decoder raises nearly anything when a file is damaged
        raise _unreadable(path, error) from error


def read_rgb(path: Path) -> Image.Image:
    """Any image as RGB, upright, as `to_rgb` does it.

    Raises UserError naming a file that cannot be read.
    """
    try:
        with Image.open(path, formats=FORMATS) as opened:
            opened.load()
            ImageOps.exif_transpose(opened, in_place=True)
            return to_rgb(opened)
    except Exception as error:
        raise _unreadable(path, error) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any mode as RGB: transparent parts white, deep grey values scaled to 8 bit."""
    if image.mode.startswith(("I", "F")):
        image = _to_8_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Grey values of more than 8 bit: 16 bit by its range, others by their own."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64)).clip(0)
    highest = values.max(initial=0)
    limit = 255 if highest <= 255 and not image.mode.startswith("I;16") else 65535
    return Image.fromarray((values * (255 / max(limit, highest))).round().astype(np.uint8))


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = str(error) or type(error).__name__
    if "cannot identify" in reason:
        reason = f"no {', '.join(FORMATS)} image"
    return UserError(f"{path} cannot be read ({reason})")
