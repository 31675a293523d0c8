"""Residual blocks in the parameter layout of the In-Place ABN project."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[..., nn.Module]

SLOPE = 0.01  # of the leaky ReLU after the sum


class ResidualBlock(nn.Module):
    """He et al., CVPR 2016, post-activation, with leaky ReLU.

    Args:
        in_channels: D of the input B D h w.
        channels: two numbers make a basic block (3x3, 3x3), three a bottleneck (1x1, 3x3, 1x1).
        norm: `norm(channels, activation=...)` builds a normalisation with its activation.
        stride: sits on the 3x3 of a bottleneck, on the first convolution of a basic block.
        dilation: of every 3x3.

    Returns B channels[-1] h/stride w/stride.
    """

    def __init__(
        self, in_channels: int, channels: tuple[int, ...], norm: Norm, stride: int, dilation: int
    ) -> None:
        super().__init__()
        kernels = (3, 3) if len(channels) == 2 else (1, 3, 1)
        strided = kernels.index(3)
        layers: list[tuple[str, nn.Module]] = []
        inputs = in_channels
        for i, (kernel, outputs) in enumerate(zip(kernels, channels, strict=True)):
            rate = dilation if kernel == 3 else 1
            conv = nn.Conv2d(
                inputs, outputs, kernel, stride if i == strided else 1,
                padding=rate * (kernel // 2), dilation=rate, bias=False,
            )  # fmt: skip
            last = i == len(kernels) - 1
            bn = norm(outputs, activation="identity") if last else norm(outputs)
            layers += [(f"conv{i + 1}", conv), (f"bn{i + 1}", bn)]
            inputs = outputs
        self.convs = nn.Sequential(OrderedDict(layers))
        self.project = stride != 1 or in_channels != channels[-1]
        if self.project:
            self.proj_conv = nn.Conv2d(in_channels, channels[-1], 1, stride, bias=False)
            self.proj_bn = norm(channels[-1], activation="identity")

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.proj_bn(self.proj_conv(x)) if self.project else x
        # The sum is a new tensor: an in-place norm keeps its output for the backward pass.
        return F.leaky_relu(self.convs(x) + shortcut, SLOPE, inplace=True)


def conv_before(body: nn.Module, name: str) -> tuple[str, nn.Conv2d]:
    """Name of the convolution before the norm `name` of a body, and the convolution.

    `conv1` stands before the `bn1` beside it, `proj_conv` before `proj_bn`.
    """
    parent, dot, own = name.rpartition(".")
    conv_name = parent + dot + own.replace("bn", "conv")
    conv = body.get_submodule(conv_name)
    assert isinstance(conv, nn.Conv2d)
    return conv_name, conv
