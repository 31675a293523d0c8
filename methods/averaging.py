"""Predictions averaged over mirrored and resized versions of an image (test-time augmentation).

    maps = versions(lambda x: model(x).logits, images, scales=(0.75, 1, 1.25), flip=True)
    classes = predict_average(maps, size)

What is averaged are probabilities at image size, by the mechanism of methods/pieces.py: a B C H W
tensor exists only where it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.pieces import Operands, Piece, Upsampled, interpolate, predict
from utils.constants import IGNORE_INDEX


@torch.no_grad()
def versions(
    network: Callable[[Tensor], Tensor],
    images: Tensor,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> list[Tensor]:
    """Logits of every version of the images, B C h w each, turned back but not resized back.

    Args:
        network: images B 3 H W -> logits B C h w.
        images: B 3 H W, normalised.
        scales: factors on H and W; 1 is the image itself.
        flip: each scale mirrored as well.
    """
    maps = []
    for scale in scales:
        scaled = images
        if scale != 1:
            size = [max(1, round(scale * side)) for side in images.shape[2:]]
            scaled = F.interpolate(images, size, mode="bilinear", antialias=True)
        maps.append(network(scaled))
        if flip:
            maps.append(network(scaled.flip(3)).flip(3))
    return maps


def predict_average(maps: Sequence[Tensor], size: tuple[int, int], binary: bool = False) -> Tensor:
    """The most probable class of every pixel, B H W (uint8, or int64 beyond 255 classes).

    `maps` as from `versions`, `size` = (H, W), `binary` as in `average_probabilities`. Of one map
    it is exactly `predict`.
    """
    if len(maps) == 1:
        return predict(maps[0], size)
    dtype = torch.uint8 if maps[0].shape[1] <= IGNORE_INDEX else torch.int64
    labels = torch.empty((len(maps[0]), *size), dtype=dtype, device=maps[0].device)
    for piece, probabilities in _averaged(maps, size, binary):
        labels[piece.image, piece.rows] = probabilities.argmax(1)
    return labels


def average_probabilities(
    maps: Sequence[Tensor], size: tuple[int, int], binary: bool = False
) -> Tensor:
    """Mean probabilities B C H W, as float16 to halve their memory.

    Softmax over the classes; with `binary` (models trained with --bce) a sigmoid for each.
    """
    shape = (*maps[0].shape[:2], *size)
    result = torch.empty(shape, dtype=torch.float16, device=maps[0].device)
    for piece, probabilities in _averaged(maps, size, binary):
        result[piece.image, :, piece.rows] = probabilities.transpose(0, 1).half()
    return result


def mean_probabilities(versions: Sequence[Operands], binary: bool) -> Tensor:
    """Mean over versions of the probabilities of some rows of an image, rows C W.

    Each version is what `interpolate` makes those rows from.
    """
    total = torch.zeros((), device=versions[0][0].device)
    for operands in versions:
        logits = interpolate(*operands)[:, :, 0]
        total = total + (logits.sigmoid() if binary else logits.softmax(1))
    return total / len(versions)


def _averaged(
    maps: Sequence[Tensor], size: tuple[int, int], binary: bool
) -> Iterator[tuple[Piece, Tensor]]:
    """Every piece with its probabilities, rows C W."""
    upsampled = [Upsampled(logits, size) for logits in maps]

    @torch.no_grad()
    def mean(piece: Piece) -> Tensor:
        # Versions differ in height, so the source rows of one are not those of another: take all.
        piece = piece._replace(span=slice(None))
        return mean_probabilities([version.operands(piece) for version in upsampled], binary)

    with torch.autocast(maps[0].device.type, enabled=False):
        yield from upsampled[0].each_piece(mean, None)
