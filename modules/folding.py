"""The network as it is deployed: no norms, their scale and shift are part of the convolutions.

In eval mode a norm is y = act(scale · x + shift) with fixed numbers for each channel, so

    norm(conv(x)) = act(conv'(x)),    weight' = scale · weight,    bias' = shift,

the same function to rounding. What is left are convolutions, activations, sums, one max-pool and
two matrix products, for images of any size: what exporters and other runtimes understand.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from modules.deeplab import DeeplabV3
from modules.norm import ABN, InPlaceABN
from modules.residual import conv_before
from modules.resnet import ResNet


def fold_body(body: ResNet) -> ResNet:
    """A copy of the body that computes what it computes in eval mode, without norms."""
    folded = copy.deepcopy(body).eval().requires_grad_(False)
    for name, norm in body.named_modules():
        if isinstance(norm, ABN):
            conv_name, conv = conv_before(body, name)
            _replace(folded, conv_name, _scaled(conv, *affine(norm)))
            _replace(folded, name, _activation(norm))
    return folded


class FoldedHead(nn.Module):
    """`DeeplabV3` in eval mode, without norms: features B D h w -> pre-logits B out_channels h w.

    Args:
        head: is copied; its window of the pooling branch is kept.
    """

    def __init__(self, head: DeeplabV3) -> None:
        super().__init__()
        norms = (head.map_bn, head.global_pooling_bn, head.red_bn)
        map_bn, pool_bn, red_bn = (norm for norm in norms if isinstance(norm, ABN))
        branches = [conv for conv in head.map_convs if isinstance(conv, nn.Conv2d)]
        parts = zip(*(x.chunk(len(branches)) for x in affine(map_bn)), strict=True)
        self.map_convs = nn.ModuleList(
            _scaled(conv, *part) for conv, part in zip(branches, parts, strict=True)
        )
        self.global_pooling_conv = _scaled(head.global_pooling_conv, *affine(pool_bn))
        # red_bn follows the sum of two convolutions: its scale is part of both, its shift of one.
        scale, shift = affine(red_bn)
        self.red_conv = _scaled(head.red_conv, scale, shift)
        self.pool_red_conv = _scaled(head.pool_red_conv, scale, None)
        self.map_act, self.pool_act, self.red_act = map(_activation, (map_bn, pool_bn, red_bn))
        self.pooling = head.pooling

    def forward(self, x: Tensor) -> Tensor:
        out = self.red_conv(self.map_act(torch.cat([conv(x) for conv in self.map_convs], 1)))
        # A mean commutes with a 1x1 convolution, and behind it there are fewer channels.
        pool = self.pool_act(sliding_mean(self.global_pooling_conv(x), self.pooling))
        return self.red_act(out + self.pool_red_conv(pool))


def sliding_mean(x: Tensor, window: int) -> Tensor:
    """The mean of x (B D h w) over a window of min(window, side) around each position, B D h w.

    That of `DeeplabV3` in eval mode: where the window would reach over a border, the nearest one
    within is taken. As one matrix product for each axis, the sides may be unknown to an exporter.
    """
    height, width = x.shape[2:]
    return _window_weights(height, window, x) @ x @ _window_weights(width, window, x).T


def affine(norm: ABN) -> tuple[Tensor, Tensor]:
    """Scale and shift (C, float64) of a norm in eval mode: norm(x) = act(scale · x + shift)."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight = norm.weight.detach().double()
    gain = weight.abs() + norm.eps if isinstance(norm, InPlaceABN) else weight
    scale = gain * (norm.running_var.double() + norm.eps).rsqrt()
    return scale, norm.bias.detach().double() - scale * norm.running_mean.double()


def _window_weights(side: int, window: int, like: Tensor) -> Tensor:
    """Row i (of side x side) has 1 / size where the window of position i lies, else 0."""
    # min() would fix a side that an exporter leaves open; what this returns is such a number.
    size: Any = torch.sym_min(window, side)
    positions = torch.arange(side, device=like.device)
    start = (positions - (size - 1) // 2).clamp(0, side - size)[:, None]
    inside = (positions >= start) & (positions < start + size)
    return inside.to(like.dtype) / size


def _scaled(conv: nn.Module, scale: Tensor, shift: Tensor | None) -> nn.Conv2d:
    """A copy of a convolution without bias whose output is multiplied by scale, plus shift."""
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is None
    folded = copy.deepcopy(conv).requires_grad_(False)
    weight = conv.weight.detach().double() * scale.view(-1, 1, 1, 1)
    folded.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
    if shift is not None:
        folded.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=False)
    return folded


def _activation(norm: ABN) -> nn.Module:
    return nn.Identity() if norm.slope == 1 else nn.LeakyReLU(norm.slope)


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, module)
