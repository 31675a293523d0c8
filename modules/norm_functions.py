"""The two batch norms with a backward pass of their own."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from modules import norm_plain as plain
from modules.norm_sync import Statistics


class InPlace(Function):
    """y = act(x̂ · (|w| + eps) + b) over the storage of x; of the feature maps only y is kept.

    `computes` is the module that computes: `norm_triton` or `norm_plain`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        statistics: Statistics,
        eps: float,
        slope: float,
        computes: ModuleType,
    ) -> Tensor:
        ctx.count, ctx.constants, ctx.computes = statistics.values, (eps, slope), computes
        computes.abn_(x, statistics, weight, bias, eps, slope)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x, weight, bias, statistics.var)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, bias, var = ctx.saved_tensors
        known = (var, ctx.count, weight, bias, *ctx.constants)
        gradients = ctx.computes.abn_gradients(y, dy, *known, ctx.needs_input_grad[:3])
        return *gradients, None, None, None, None


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
