"""Crops are drawn and cut as torchvision does it, from numbers that are handed in."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import (
    CenterCrop,
    InterpolationMode,
    Normalize,
    RandomResizedCrop,
    Resize,
)
from torchvision.transforms import functional as F

from dataset.transform import (
    EvalTransform,
    TrainTransform,
    normalize,
    random_crop,
    resize,
    to_tensor,
)
from utils.constants import IMAGENET_MEAN, IMAGENET_STD


def picture(width: int, height: int) -> tuple[Image.Image, Image.Image]:
    rng = np.random.default_rng(width * height)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(image), Image.fromarray(image[..., 0] // 13)


def array(image: Image.Image | torch.Tensor) -> np.ndarray:
    """H W or H W 3."""
    if isinstance(image, torch.Tensor) and image.ndim == 3:
        image = image.permute(1, 2, 0)
    return np.asarray(image)


def same(first: Image.Image | torch.Tensor, second: Image.Image | torch.Tensor) -> bool:
    return np.array_equal(array(first), array(second))


def assert_equal_but_for_rounding(result: torch.Tensor, expected: Image.Image) -> None:
    """Pillow and torch round their weights to different precision: one level, and no bias."""
    assert result.dtype == torch.uint8
    assert result.shape == (3, expected.height, expected.width)
    difference = array(result).astype(int) - array(expected)
    assert np.abs(difference).max() <= 1
    assert abs(difference.mean()) <= 0.02


@pytest.mark.parametrize("size", [(320, 486), (500, 300)])
def test_crops_are_distributed_as_torchvisions(size):
    """Means and deviations agree within four standard errors of the draws."""
    draws = 12_000
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    blank = Image.new("L", size)
    ours = np.array([random_crop(rng, *size) for _ in range(draws)], dtype=float)
    theirs = np.array(
        [
            RandomResizedCrop.get_params(blank, scale=[0.5, 2.0], ratio=[3 / 4, 4 / 3])
            for _ in range(draws)
        ],
        dtype=float,
    )[:, [1, 0, 3, 2]]  # top, left, height, width → left, top, width, height
    # The logarithm of the aspect tells log-uniform from uniform.
    ours, theirs = (np.c_[boxes, np.log(boxes[:, 2] / boxes[:, 3])] for boxes in (ours, theirs))
    error = np.sqrt(2 / draws) * theirs.std(axis=0)
    assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) <= 4 * error).all()
    assert (np.abs(ours.std(axis=0) - theirs.std(axis=0)) <= 4 * error).all()


def test_crops_lie_inside_and_start_anywhere():
    boxes = np.array([random_crop(np.random.default_rng(i), 40, 30) for i in range(3000)])
    left, top, width, height = boxes.T
    assert (boxes >= 0).all()
    assert (width >= 1).all()
    assert (left + width)[width < 40].max() == 40
    assert (top + height)[height < 30].max() == 30
    assert left[width < 40].min() == top[height < 30].min() == 0


@pytest.mark.parametrize(
    ("size", "box"),
    [((100, 10), (43, 0, 13, 10)), ((10, 100), (0, 43, 10, 13)), ((1, 1), (0, 0, 1, 1))],
)
def test_what_never_fits_is_cropped_in_the_centre(size, box):
    assert {random_crop(np.random.default_rng(i), *size) for i in range(50)} == {box}


@pytest.mark.parametrize("seed", range(6))
def test_training_crop_equals_torchvisions_resized_crop(seed):
    """For the box and the flip that the same numbers give; labels to the last bit."""
    image, mask = picture(93, 70)
    left, top, width, height = random_crop(rng := np.random.default_rng(seed), *image.size)
    box = (top, left, height, width, [48, 48])
    expected = (
        F.resized_crop(image, *box, InterpolationMode.BILINEAR),
        F.resized_crop(mask, *box, InterpolationMode.NEAREST),
    )
    if rng.random() < 0.5:
        expected = F.hflip(expected[0]), F.hflip(expected[1])
    result = TrainTransform(48)(image, mask, np.random.default_rng(seed))
    assert_equal_but_for_rounding(result[0], expected[0])
    assert same(result[1], expected[1])


def test_half_of_the_images_are_flipped():
    image, mask = picture(400, 30)  # always the same crop, so that only the flip differs
    crops = [TrainTransform(30)(image, mask, np.random.default_rng(i))[1] for i in range(300)]
    unflipped = sum(same(crop, crops[0]) for crop in crops)
    flipped = sum(same(crop.flip(1), crops[0]) for crop in crops)
    assert unflipped + flipped == 300
    assert 110 <= flipped <= 190


@pytest.mark.parametrize("size", [(93, 70), (70, 93), (33, 33), (31, 200), (64, 64), (20, 27)])
def test_evaluation_equals_torchvisions_resize_and_centre_crop(size):
    image, mask = picture(*size)
    result = EvalTransform(33)(image, mask, np.random.default_rng(0))
    assert_equal_but_for_rounding(result[0], CenterCrop(33)(Resize(33)(image)))
    assert same(result[1], CenterCrop(33)(Resize(33, InterpolationMode.NEAREST)(mask)))


def test_evaluation_without_crop_changes_nothing():
    image, mask = picture(31, 20)
    result = EvalTransform(None)(image, mask, np.random.default_rng(0))
    assert same(result[0], image)
    assert same(result[1], mask)


@pytest.mark.parametrize("size", [(93, 70), (512, 512), (1, 1), (7, 200), (40, 9), (300, 35)])
def test_resizing_equals_pillows(size):
    """Larger, smaller, and one of each; the memory is what `collate` can copy as it lies."""
    image, _ = picture(93, 70)
    result = resize(image, size)
    assert_equal_but_for_rounding(result, image.resize(size, Image.Resampling.BILINEAR))
    assert result.permute(1, 2, 0).is_contiguous()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 0), (torch.float64, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_normalize_gives_the_numbers_of_torchvision(dtype, tolerance):
    image, _ = picture(31, 20)
    expected = Normalize(IMAGENET_MEAN, IMAGENET_STD)(F.to_tensor(image))
    images = to_tensor(image)[None].contiguous(memory_format=torch.channels_last)
    result = normalize(images, dtype)
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result[0].float(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(images[0], to_tensor(image))
