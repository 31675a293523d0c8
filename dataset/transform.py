"""Augmentation and normalisation. Every draw comes from the generator that is handed in."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from utils.constants import IMAGENET_MEAN, IMAGENET_STD

AREA = (0.5, 2.0)  # of the crop, as a fraction of the image
ASPECT = (3 / 4, 4 / 3)  # width / height of the crop
TRIES = 10
FLIP_PROBABILITY = 0.5


class Transform(Protocol):
    """Image and mask of one size → pixels uint8 (3 H W) and labels uint8 (H W), changed alike."""

    def __call__(
        self, image: Image.Image, mask: Image.Image, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop to `size`², then a horizontal flip in half of the cases."""

    size: int

    def __call__(
        self, image: Image.Image, mask: Image.Image, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        left, top, width, height = random_crop(rng, *image.size)
        box = (left, top, left + width, top + height)
        # Cut before resizing: a filter that reached over the edge would see what was cropped away.
        pixels, labels = _resize(image.crop(box), mask.crop(box), (self.size, self.size))
        if rng.random() < FLIP_PROBABILITY:
            pixels, labels = pixels.flip(-1), labels.flip(-1)
        return pixels, labels


@dataclass(frozen=True)
class EvalTransform:
    """Shorter side to `size` and centre crop to `size`²; with size None nothing at all."""

    size: int | None

    def __call__(
        self, image: Image.Image, mask: Image.Image, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        if self.size is None:
            return to_tensor(image), torch.from_numpy(np.array(mask))
        width, height = image.size
        shorter = min(width, height)
        # Longer side rounded down, crop offset rounded half to even: as torchvision does.
        scaled = (self.size * width // shorter, self.size * height // shorter)
        pixels, labels = _resize(image, mask, scaled)
        left, top = (round((side - self.size) / 2) for side in scaled)
        rows, columns = slice(top, top + self.size), slice(left, left + self.size)
        return pixels[:, rows, columns], labels[rows, columns]


def random_crop(rng: np.random.Generator, width: int, height: int) -> tuple[int, int, int, int]:
    """(left, top, width, height) in pixels of a random crop of an image of `width` × `height`.

    Area uniform in AREA times the image's, aspect log-uniform in ASPECT. A crop that does not fit
    is drawn again, TRIES times; then the largest centred one whose aspect lies within ASPECT, as
    torchvision's RandomResizedCrop does.
    """
    for _ in range(TRIES):
        area = width * height * rng.uniform(*AREA)
        aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    w = min(width, round(height * ASPECT[1]))
    h = min(height, round(width / ASPECT[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def _resize(image: Image.Image, mask: Image.Image, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Both to `size` (width, height): bilinear for the image, nearest for the labels."""
    labels = mask.resize(size, Image.Resampling.NEAREST)
    return resize(image, size), torch.from_numpy(np.array(labels))


def resize(image: Image.Image | np.ndarray, size: tuple[int, int]) -> Tensor:
    """RGB image, of PIL or uint8 (H W 3) → uint8 (3 H W) of `size` (width, height).

    Bilinear, antialiased where it shrinks; channels last in memory. Pixels differ from those of
    `Image.resize` by at most 1; on a CPU with AVX2 it takes a quarter of the time.
    """
    width, height = size
    # Were the image permuted before it becomes a batch, its strides would not show torch that the
    # channels are last, and the result would be transposed at twice the cost.
    batch = torch.from_numpy(np.array(image))[None].permute(0, 3, 1, 2)
    return F.interpolate(batch, (height, width), mode="bilinear", antialias=True)[0]


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image → uint8 (3 H W), channels last in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalize(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 RGB images (B 3 H W) → `dtype`, scaled to [0, 1], ImageNet mean and deviation removed.

    Computed in at least float32 and on the device of `images`, so that a quarter of the bytes
    travels to it. The memory format is kept.
    """
    compute = torch.promote_types(dtype, torch.float32)
    mean, std = _statistics(compute, images.device)
    return images.to(compute).div_(255).sub_(mean).div_(std).to(dtype)


@cache  # a copy to the GPU in every iteration would make the host wait
def _statistics(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = torch.tensor((IMAGENET_MEAN, IMAGENET_STD), dtype=dtype, device=device)
    return mean.view(3, 1, 1), std.view(3, 1, 1)
