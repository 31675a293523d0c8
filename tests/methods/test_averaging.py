"""Averages over versions of an image against their plain forms."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.averaging import average_probabilities, predict_average, versions


class Edge(torch.nn.Module):
    """A network of output stride 4 that sees left from right."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = torch.nn.Conv2d(3, 6, 5, stride=4, padding=2)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images)


def test_averaging_is_the_mean_of_full_size_probabilities():
    network, images = Edge().eval(), torch.randn(2, 3, 40, 56)
    maps = versions(network, images, scales=(1, 0.5, 1.25), flip=True)
    size = (37, 53)

    def full(logits: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(logits, size, mode="bilinear")

    total, sigmoids = [], []
    with torch.no_grad():
        for scale in (1, 0.5, 1.25):
            scaled = torch.nn.functional.interpolate(
                images, (round(40 * scale), round(56 * scale)), mode="bilinear", antialias=True
            )
            for logits in (network(scaled), network(scaled.flip(3)).flip(3)):
                total.append(full(logits).softmax(1))
                sigmoids.append(full(logits).sigmoid())
    mean = torch.stack(total).mean(0)
    got = average_probabilities(maps, size)
    assert (got.shape, got.dtype) == ((2, 6, 37, 53), torch.float16)
    torch.testing.assert_close(got.float(), mean, atol=1e-3, rtol=0)
    torch.testing.assert_close(
        average_probabilities(maps, size, binary=True).float(), torch.stack(sigmoids).mean(0),
        atol=1e-3, rtol=0,
    )  # fmt: skip
    assert (predict_average(maps, size) == mean.argmax(1)).float().mean() > 0.999


def test_flip_averaging_does_not_know_left_from_right():
    network, images = Edge().eval(), torch.randn(1, 3, 32, 32)
    straight = predict_average(versions(network, images, flip=True), (32, 32))
    mirrored = predict_average(versions(network, images.flip(3), flip=True), (32, 32))
    assert torch.equal(straight, mirrored.flip(2))
    alone = predict_average(versions(network, images), (32, 32))
    assert not torch.equal(alone, straight)
