"""Images in memory of any kind as an array of RGB."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.errors import UserError
from utils.images import to_rgb

Picture: TypeAlias = "np.ndarray | Image.Image | Tensor"

EXPECTED = ("expected a PIL image, an array H W 3 of uint8, or a tensor 3 H W of uint8 or of "
            "floats in 0..1")  # fmt: skip


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
