"""The recipe of the reference's toy problem (golden/README.md): weights and batches by address."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

SEED = 7


def fill(model: nn.Module, seed: int = SEED) -> None:
    """Fill every float tensor of the state dict from a generator addressed by its key."""
    for key, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        g = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{key}".encode()))
        shape = tuple(tensor.shape)
        if key.endswith("running_mean"):
            value = torch.zeros(shape)
        elif key.endswith("running_var"):
            value = torch.ones(shape)
        elif len(shape) == 4:
            fan_in = shape[1] * shape[2] * shape[3]
            value = torch.randn(shape, generator=g) * (2 / fan_in) ** 0.5
        elif key.endswith("weight"):
            value = torch.rand(shape, generator=g) + 0.5
        else:
            value = torch.randn(shape, generator=g) * 0.1
        tensor.copy_(value)


def batch(i: int, labels: list[int], seed: int = SEED) -> tuple[Tensor, Tensor]:
    """Images 2 3 64 64 (float32, as normalised) and labels 2 64 64 with a corner of 255."""
    g = torch.Generator().manual_seed(seed * 1000 + i)
    images = torch.randn(2, 3, 64, 64, generator=g)
    coarse = torch.tensor(labels)[torch.randint(0, len(labels), (2, 8, 8), generator=g)]
    fine = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)
    fine[:, :2, :3] = 255
    return images, fine
