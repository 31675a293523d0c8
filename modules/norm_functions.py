"""The two batch norms with a backward pass of their own.

`triton` is the module of our kernels where they serve the map x, else None (plain operations).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from modules import norm_plain as plain
from modules.norm_sync import Statistics, sum_over_ranks


class InPlace(Function):
    """y = act(x̂ · (|w| + eps) + b) over the storage of x; of the feature maps only y is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        statistics: Statistics,
        eps: float,
        slope: float,
        triton: ModuleType | None,
    ) -> Tensor:
        mean, var, ctx.count = statistics
        ctx.eps, ctx.slope, ctx.triton = eps, slope, triton
        if triton:
            triton.normalise_(x, mean, var, weight, bias, eps, slope)
        else:
            scale, shift = weight.abs().to(mean.dtype) + eps, bias.to(mean.dtype)
            plain.activate_(plain.normalise(x, mean, var + eps, scale, shift, out=x), slope)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x, weight, bias, var)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _triton_gradients if ctx.triton else _plain_gradients
        return *gradients(ctx, dy), None, None, None, None


def _triton_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Of `InPlace`, for x, weight and bias."""
    y, weight, bias, var = ctx.saved_tensors
    needs_input, *needs_parameters = ctx.needs_input_grad[:3]
    constants = (weight, bias, ctx.eps, ctx.slope)
    dx = means = d_weight = d_bias = None
    if any(needs_parameters) or ctx.count is not None:
        sums = d_weight, d_bias = ctx.triton.gradient_sums(y, dy, *constants)
    if needs_input:
        if ctx.count is not None:
            means = sum_over_ranks(sums, ctx.count) / ctx.count
        dx = ctx.triton.input_gradient(y, dy, var, means, *constants)
    return dx, d_weight, d_bias


def _plain_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Of `InPlace`, for x, weight and bias."""
    y, weight, bias, var = ctx.saved_tensors
    scale, shift = weight.abs().to(var.dtype) + ctx.eps, bias.to(var.dtype)
    z, dz = plain.undo_activation(y, dy, ctx.slope)
    # z = x̂ · scale + shift stands in for the overwritten x.
    dx, d_scale, d_shift = plain.gradients(
        dz, z, shift, scale, scale * (var + ctx.eps).rsqrt(), ctx.count, ctx.needs_input_grad[0]
    )
    # The derivative of |w| at 0 is taken as 1, as in the inplace-abn package.
    return dx, torch.where(weight < 0, -d_scale, d_scale), d_shift


class SyncedBatchNorm(Function):
    """y = x̂ · w + b with statistics over all ranks; keeps x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, statistics: Statistics, eps: float
    ) -> Tensor:
        mean, var, ctx.count = statistics
        scale, shift = weight.to(mean.dtype), bias.to(mean.dtype)
        std = (var + eps).sqrt()
        ctx.save_for_backward(x, mean, std, scale / std)
        return plain.normalise(x, mean, var + eps, scale, shift, out=torch.empty_like(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, std, gain = ctx.saved_tensors
        grads = plain.gradients(dy, x, mean, std, gain, ctx.count, ctx.needs_input_grad[0])
        return *grads, None, None
