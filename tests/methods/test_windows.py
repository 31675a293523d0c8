"""Windows cover an image, their weights sum to one, and where they agree nothing else is said."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from methods.averaging import average_probabilities, versions
from methods.windows import blend, windows_along


def looking(network: Callable[[Tensor], Tensor], image: Tensor, window: tuple[int, int], **view):
    """`look` for blend: the versions of windows that are cut out of an image 3 H W."""

    def look(corners):
        cut = [image[:, top : top + window[0], left : left + window[1]] for top, left in corners]
        return versions(network, torch.stack(cut), **view)

    return look


def blended(look, size, window, binary=False) -> Tensor:
    """All rows together, C H W; they come in order and without gaps."""
    parts, end = [], 0
    for rows, probabilities in blend(look, size, window, binary):
        assert (rows.start, len(probabilities)) == (end, rows.stop - rows.start)
        end = rows.stop
        parts.append(probabilities)
    assert end == size[0]
    return torch.cat(parts).transpose(0, 1)


@pytest.mark.parametrize("side", [1, 2, 31, 64, 65, 100, 106, 107, 129, 1000, 4001])
@pytest.mark.parametrize("window", [1, 3, 64, 65, 512])
def test_weights_sum_to_one_everywhere(side, window):
    axis = windows_along(side, window)
    total = torch.zeros(side, dtype=torch.float64)
    for start, weights in zip(axis.starts, axis.weights, strict=True):
        assert (weights > 0).all()
        total[start : start + axis.length] += weights
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-12, rtol=0)
    assert axis.starts[0] == 0
    assert axis.starts[-1] + axis.length == side
    assert axis.length == min(side, window)


def test_windows_share_a_third_and_are_as_few_as_can_be():
    axis = windows_along(4000, 512)
    steps = [b - a for a, b in zip(axis.starts, axis.starts[1:], strict=False)]
    assert max(steps) <= 512 - 512 // 3
    assert max(steps) - min(steps) <= 1
    assert len(steps) == 11  # ten steps of 342 would leave 68 pixels
    assert windows_along(512, 512).starts == (0,)
    assert windows_along(513, 512).starts == (0, 1)


def test_weights_have_no_steps():
    """At a window's edge its weight is next to nothing, and it never jumps."""
    axis = windows_along(4000, 512)
    spread = torch.zeros(len(axis.starts), 4000, dtype=torch.float64)
    for row, start, weights in zip(spread, axis.starts, axis.weights, strict=True):
        row[start : start + 512] = weights
    assert (spread[:, 1:] - spread[:, :-1]).abs().max() < 0.02  # a ramp over 170 pixels
    assert max(row[start] for row, start in zip(spread[1:], axis.starts[1:], strict=True)) < 1e-4


def pixelwise(images: Tensor) -> Tensor:
    """A network of output stride 1 that sees a pixel at a time: cut or whole is one to it."""
    weight = torch.randn(6, 3, 1, 1, generator=torch.Generator().manual_seed(2))
    return F.conv2d(images, 3 * weight)


@pytest.mark.parametrize("view", [{}, {"flip": True}])
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("size", [(50, 70), (33, 90), (20, 24), (7, 100)])
def test_what_windows_agree_on_is_what_the_whole_is(size, binary, view):
    image = torch.randn(3, *size)
    window = (min(24, size[0]), min(24, size[1]))
    found = blended(looking(pixelwise, image, window, **view), size, window, binary)
    maps = versions(pixelwise, image[None], **view)
    expected = average_probabilities(maps, size, binary)[0].float()
    torch.testing.assert_close(found, expected, atol=6e-4, rtol=0)  # of float16


def strided(images: Tensor) -> Tensor:
    """A network of output stride 4 that sees left from right and the edges of its input."""
    weight = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    return F.conv2d(images, weight / 4, stride=4, padding=2)


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("view", [{}, {"flip": True}, {"scales": (0.5, 1, 1.25), "flip": True}])
def test_a_window_that_covers_the_image_changes_nothing(view, binary):
    size = (37, 53)
    image = torch.randn(3, *size)
    found = blended(looking(strided, image, size, **view), size, (64, 64), binary)
    expected = average_probabilities(versions(strided, image[None], **view), size, binary)[0]
    torch.testing.assert_close(found, expected.float(), atol=6e-4, rtol=0)


def test_blending_is_the_weighted_mean_of_full_size_probabilities():
    """Against the plain form: every window's probabilities, weighted, on a canvas."""
    size, window = (61, 83), (32, 40)
    image = torch.randn(3, *size)
    down, across = (windows_along(*pair) for pair in zip(size, window, strict=True))
    assert (len(down.starts), len(across.starts)) == (3, 3)
    canvas = torch.zeros(6, *size)
    for i, top in enumerate(down.starts):
        for k, left in enumerate(across.starts):
            cut = image[None, :, top : top + 32, left : left + 40]
            full = F.interpolate(strided(cut), window, mode="bilinear")[0].softmax(0)
            weights = down.weights[i][:, None] * across.weights[k]
            canvas[:, top : top + 32, left : left + 40] += weights * full
    found = blended(looking(strided, image, window), size, window)
    torch.testing.assert_close(found, canvas, atol=2e-6, rtol=0)
    torch.testing.assert_close(found.sum(0), torch.ones(size), atol=2e-6, rtol=0)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returned."""

    bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, Tensor):
            self.bytes = max(self.bytes, result.numel() * result.element_size())
        return result


def test_memory_is_of_windows_and_bands_whatever_the_height():
    def heaviest(height: int) -> int:
        logits = torch.randn(7, 60, 16, 16)
        with Largest() as largest:
            for rows, probabilities in blend(lambda corners: [logits], (height, 1200), (256, 256)):
                assert probabilities.shape == (rows.stop - rows.start, 60, 1200)
        return largest.bytes

    assert heaviest(1200) == heaviest(600)
    assert heaviest(600) < 10 * 2**20  # C H W would be 165


def test_rows_of_windows_are_asked_for_when_they_are_needed():
    asked = []

    def look(corners):
        asked.append(corners[0][0])
        return [torch.zeros(len(corners), 3, 4, 4)]

    down = windows_along(400, 64)
    for rows, _ in blend(look, (400, 64), (64, 64)):
        assert asked == [start for start in down.starts if start <= rows.start]
