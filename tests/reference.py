"""The recipe of the reference's toy problem: weights and batches by address, and comparison."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SEED = 7
TWINS = (1, 2)  # seeds of the runs that show what rounding does
MARGIN = 10  # the other machine may have rounded worse than the twins did
Figures = Mapping[str, Any]  # name -> numbers that can be compared


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


def jolt(model: nn.Module, seed: int | None) -> None:
    """Multiply every float64 weight by 1 + 1e-14 randn, as sums in another order do; None: by 1."""
    g = torch.Generator().manual_seed(seed or 0)
    for tensor in model.state_dict().values():
        if seed is not None and tensor.is_floating_point():
            tensor.mul_(1 + 1e-14 * torch.randn(tensor.shape, generator=g, dtype=torch.float64))


def final_figures(student: nn.Module) -> dict[str, Any]:
    """Biases, a running mean and the norm of all parameters."""
    state = student.state_dict()
    squares = sum(float(p.detach().square().sum()) for p in student.parameters())
    return {
        "cls.0.bias": state["cls.0.bias"],
        "cls.1.bias": state["cls.1.bias"],
        "head.red_bn.running_mean[:8]": state["head.red_bn.running_mean"][:8],
        "param_l2_norm": squares**0.5,
    }


def deviations(actual: Figures, expected: Figures) -> dict[str, np.ndarray]:
    """Relative deviation by figure; that of two numbers below 1e-9 is 0."""
    found = {}
    for name, value in expected.items():
        a, e = (np.asarray(x, dtype=np.float64) for x in (actual[name], value))
        both_zero = (np.abs(a) < 1e-9) & (np.abs(e) < 1e-9)
        found[name] = np.where(both_zero, 0, np.abs(a - e) / np.maximum(np.abs(e), 1e-12))
    return found


def check_figures(
    case: str,
    actual: Figures,
    expected: Figures,
    rtol: Figures,
    twin: Callable[[int], Figures],
    strict: tuple[str, ...] = (),
) -> None:
    """AssertionError where a figure is further from the expected one than `rtol` allows.

    A chaotic problem turns the last bits, in which processors differ, into visible digits. So a
    figure that misses its tolerance, unless it is one of `strict`, may still lie within MARGIN
    times what such bits do on this machine: `twin(seed)` computes the figures once more after
    `jolt`. A wrong formula moves the early figures, to which rounding does next to nothing.
    """
    found = deviations(actual, expected)
    missed = [name for name, value in found.items() if (value > rtol[name]).any()]
    for name, value in found.items():
        print(f"{case}: relative deviation of {name}\n{value}")
    assert not set(missed) & set(strict), (case, missed)
    if not missed:
        return
    twins = [deviations(twin(seed), actual) for seed in TWINS]
    for name in missed:
        noise = np.max([t[name] for t in twins], axis=0)
        # Which number of a row rounding hits hardest is chance.
        noise = noise.max(axis=-1, keepdims=True) if noise.ndim else noise
        print(f"{case}: rounding moves {name} by\n{noise}")
        assert (found[name] <= np.maximum(rtol[name], MARGIN * noise)).all(), (case, name)
