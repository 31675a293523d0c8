"""Prediction of large images in overlapping windows, blended without seams.

    for rows, probabilities in blend(look, size, window):  # rows C W, from the top
        labels[rows] = probabilities.argmax(1)

The network sees a window at a time. Of its answers only the small logits are kept, and only of the
windows that the current rows lie in; these are brought to image size a band of rows at a time. So
memory is a few windows and a band, however large the image.

Along each axis a window's weight is sin² from edge to edge, divided by the sum over the windows
that a pixel lies in; in the image the two axes' weights multiply. So the weights are smooth, no
window's edge shows, and they sum to one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from methods.averaging import mean_probabilities
from methods.pieces import CPU_PIECE, DEVICE_PIECE, Upsampled

OVERLAP = 3  # neighbours share at least a third of a window

Corner: TypeAlias = tuple[int, int]  # top, left


class Axis(NamedTuple):
    """The windows along one axis of an image."""

    starts: tuple[int, ...]  # of each, ascending; the first is 0, the last window ends at the edge
    length: int  # of each
    weights: Tensor  # windows x length, float64; they sum to one in every pixel


def windows_along(side: int, window: int) -> Axis:
    """The fewest windows that cover `side` pixels, evenly spread; one, cut, if it is longer."""
    length = min(side, window)
    step = length - length // OVERLAP
    gaps = -(-(side - length) // step)
    starts = tuple(round(i * (side - length) / max(1, gaps)) for i in range(gaps + 1))
    pixels = torch.arange(length, dtype=torch.float64)
    weight = ((pixels + 0.5) * (torch.pi / length)).sin().square()
    total = torch.zeros(side, dtype=torch.float64)
    for start in starts:
        total[start : start + length] += weight
    shares = [weight / total[start : start + length] for start in starts]
    return Axis(starts, length, torch.stack(shares))


def blend(
    look: Callable[[Sequence[Corner]], Sequence[Tensor]],
    size: tuple[int, int],
    window: tuple[int, int],
    binary: bool = False,
) -> Iterator[tuple[slice, Tensor]]:
    """Probabilities of an image, a band of rows after the other, from the top.

    Args:
        look: corners of N windows -> logits of each version of them, N C h w each, as `versions`
            gives them. It is asked for a row of windows when their first pixel row comes.
        size: (H, W) of the image.
        window: (height, width) of a window in pixels of the image; cut to the image.
        binary: sigmoids instead of a softmax over the classes.

    Yields (rows, probabilities), rows C W float32 on the device of the logits.
    """
    down, across = (windows_along(*pair) for pair in zip(size, window, strict=True))
    ends = [start + down.length for start in down.starts]
    seen: dict[int, list[Upsampled]] = {}  # number of a row of windows -> its versions
    for top, end in pairwise(sorted({*down.starts, *ends})):
        covering = [i for i, start in enumerate(down.starts) if start <= top < ends[i]]
        seen = {i: seen[i] for i in covering if i in seen}  # before others come
        for i in covering:
            if i not in seen:
                maps = look([(down.starts[i], left) for left in across.starts])
                seen[i] = [Upsampled(logits, (down.length, across.length)) for logits in maps]
        kept = seen[covering[0]][0].maps  # N h C w
        piece = CPU_PIECE if kept.device.type == "cpu" else DEVICE_PIECE
        most = max(1, piece // (kept.shape[2] * size[1]))
        for first in range(top, end, most):
            rows = slice(first, min(first + most, end))
            yield rows, _band(rows, seen, down, across, size[1], binary)


def _band(
    rows: slice, seen: Mapping[int, Sequence[Upsampled]], down: Axis, across: Axis, width: int,
    binary: bool,
) -> Tensor:  # fmt: skip
    """Probabilities of some rows, rows C W, from the rows of windows that they all lie in."""
    kept = next(iter(seen.values()))[0].maps
    total = kept.new_zeros(rows.stop - rows.start, kept.shape[2], width)
    horizontal = across.weights.to(kept)
    for i, versions in seen.items():
        inside = slice(rows.start - down.starts[i], rows.stop - down.starts[i])
        vertical = down.weights[i, inside].to(kept)[:, None, None]
        for k, left in enumerate(across.starts):
            operands = [version.of_rows(k, inside) for version in versions]
            share = mean_probabilities(operands, binary).mul_(vertical).mul_(horizontal[k])
            total[:, :, left : left + across.length] += share
    return total
