"""Image files, and images in memory of any kind, as RGB."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from utils.errors import UserError

# Pillow reads more, some of it by starting other programs.
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "JPEG2000")
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".ppm",
            ".pgm", ".pbm", ".pnm", ".jp2")  # fmt: skip
Picture: TypeAlias = "np.ndarray | Image.Image | Tensor"

EXPECTED = ("expected a PIL image, an array H W 3 of uint8, or a tensor 3 H W of uint8 or of "
            "floats in 0..1")  # fmt: skip
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
            return to_rgb(ImageOps.exif_transpose(opened))
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
    return image.convert("RGB")


def as_pixels(image: Picture) -> np.ndarray:
    """An image, as `Predictor.__call__` takes it, as uint8 H W 3. Raises UserError."""
    if isinstance(image, Image.Image):
        pixels = np.asarray(to_rgb(image))
    elif isinstance(image, Tensor):
        pixels = _of_tensor(image.detach())
    elif not isinstance(image, np.ndarray):
        raise UserError(f"{EXPECTED}; this is of type {type(image).__name__}")
    elif image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"{EXPECTED}; this is an array {_shape(image)} of {image.dtype}")
    else:
        pixels = np.ascontiguousarray(image)
    if pixels.size == 0:
        raise UserError(f"{EXPECTED}; this one is empty, {_shape(pixels)}")
    return pixels


def _of_tensor(image: Tensor) -> np.ndarray:
    kind = str(image.dtype).removeprefix("torch.")
    known = image.dtype == torch.uint8 or image.is_floating_point()
    if not known or image.ndim != 3 or image.shape[0] != 3:
        raise UserError(f"{EXPECTED}; this is a tensor {_shape(image)} of {kind}")
    if image.is_floating_point() and image.numel():
        low, high = (value.item() for value in image.aminmax())
        if not 0 <= low <= high <= 1:  # nor is it where one is nan
            raise UserError(f"{EXPECTED}; this is a tensor with values from {low:g} to {high:g}")
        image = (image.float() * 255).round().to(torch.uint8)
    return image.permute(1, 2, 0).contiguous().cpu().numpy()


def _shape(array: np.ndarray | Tensor) -> str:
    return " x ".join(map(str, array.shape)) or "without shape"


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
