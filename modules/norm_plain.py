"""Batch norm in torch's own operations, of maps of any float type, on any device.

They compute in at least float32 and return the type of their input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.norm_sync import Count, Running, Statistics, gather_rows, sum_over_ranks_


def wide(x: Tensor) -> torch.dtype:
    """The type to compute in: float32 for half types, else that of x."""
    return torch.promote_types(x.dtype, torch.float32)


def batch_statistics(x: Tensor, running: Running, over_ranks: bool) -> Statistics:
    """Statistics of x (B, C, H, W), or of all ranks' x, in the wide type; moves the running ones.

    Across ranks one collective.
    """
    # The CPU kernel accumulates in the type of the running statistics it is given to update.
    scratch = torch.zeros(2, x.shape[1], dtype=wide(x), device=x.device)
    mean, var = torch.batch_norm_update_stats(x, scratch[0], scratch[1], 0.0)
    count = x.numel() // x.shape[1]
    if over_ranks:
        row = torch.stack([torch.full_like(mean, count), mean, var])
        return combine(gather_rows(row), running)
    _move(running, mean, var * (count / (count - 1)))
    return Statistics(mean, var, count)


def combine(rows: Tensor, running: Running) -> Statistics:
    """Statistics of n parts together; moves the running ones.

    rows (n, 3, C): count, mean and biased variance of each. The count that is returned is (C,).
    """
    counts, means, variances = rows.unbind(1)
    count = counts.sum(0)
    share = counts / count
    mean = (share * means).sum(0)
    # Variance within the parts plus variance between them: no difference of large sums.
    var = (share * (variances + (means - mean).square())).sum(0)
    _move(running, mean, var * (count / (count - 1)))
    return Statistics(mean, var, count)


def _move(running: Running, mean: Tensor, unbiased: Tensor) -> None:
    running.batches.add_(1)
    running.mean.lerp_(mean.to(running.mean.dtype), running.momentum)
    running.var.lerp_(unbiased.to(running.var.dtype), running.momentum)


def abn_(
    x: Tensor, statistics: Statistics, weight: Tensor, bias: Tensor, eps: float, slope: float
) -> None:
    """y = leaky_relu((x - mean) / sqrt(var + eps) · (|weight| + eps) + bias) over x."""
    mean, var, _ = statistics
    scale, shift = weight.abs().to(mean.dtype) + eps, bias.to(mean.dtype)
    activate_(normalise(x, mean, var + eps, scale, shift, out=x), slope)


def abn_gradients(
    y: Tensor, dy: Tensor, var: Tensor, count: Count, weight: Tensor, bias: Tensor,
    eps: float, slope: float, wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Gradients of `abn_` for x, weight and bias; for x if wanted[0]. Across ranks one collective.

    Those of weight and bias are of this rank's values alone.
    """
    scale, shift = weight.abs().to(var.dtype) + eps, bias.to(var.dtype)
    z, dz = undo_activation(y, dy, slope)
    # z = x̂ · scale + shift stands in for the overwritten x.
    gain = scale * (var + eps).rsqrt()
    dx, d_scale, d_shift = gradients(dz, z, shift, scale, gain, count, wanted[0])
    # The derivative of |w| at 0 is taken as 1, as in the inplace-abn package.
    return dx, torch.where(weight < 0, -d_scale, d_scale), d_shift


def normalise(
    x: Tensor, mean: Tensor, var: Tensor, scale: Tensor, shift: Tensor, out: Tensor
) -> Tensor:
    """(x - mean) / sqrt(var) · scale + shift in one pass into `out`, which may be x itself.

    Maps (B, C, H, W), vectors (C,) in the wide type.
    """
    unused = mean.new_empty(0), mean.new_empty(0)
    torch.native_batch_norm(x, scale, shift, mean, var, False, 0.0, 0.0, out=(out, *unused))
    return out


def activate_(z: Tensor, slope: float) -> Tensor:
    """leaky_relu(z) over z; nothing for slope 1."""
    return z if slope == 1 else F.leaky_relu_(z, slope)


def undo_activation(y: Tensor, dy: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """z and its gradient from y = leaky_relu(z) and its gradient."""
    if slope == 1:
        return y, dy
    dz = torch.ops.aten.leaky_relu_backward(dy, y, slope, True)
    return F.leaky_relu(y, 1 / slope), dz


def gradients(
    dz: Tensor,
    u: Tensor,
    center: Tensor,
    spread: Tensor,
    gain: Tensor,
    count: Count,
    needs_input: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients for input, scale and shift of a batch norm with output gradient dz (B, C, H, W).

    u (B, C, H, W) and center, spread (C,) give x̂ = (u - center) / spread; gain (C,) is
    scale / sqrt(var + eps). Scale and shift get Σ x̂·dz and Σ dz of this rank alone, the input

        gain · (dz - Σ dz / count - x̂ · Σ x̂·dz / count)    with batch statistics,
        gain · dz                                          with running ones.
    """
    # The kernel takes u for the input of a batch norm of mean `center` and deviation `spread`, and
    # multiplies by weight / spread. It knows the sums of this rank only; for those of several, the
    # gradient of the input is the affair of the lines below.
    d_input, d_scale, d_shift = torch.ops.aten.native_batch_norm_backward(
        dz,
        u,
        gain * spread,
        *(center, spread.square()),  # running statistics, for eval
        *(center, spread.reciprocal()),  # batch statistics, for training
        count is not None,
        0.0,
        [needs_input and not isinstance(count, Tensor), True, True],
    )
    if isinstance(count, Tensor) and needs_input:
        x_hat_dz, mean_dz = sum_over_ranks_(torch.stack([d_scale, d_shift]).div_(count))
        d_input = torch.empty_like(u)
        normalise(u, center, spread.square(), -gain * x_hat_dz, -gain * mean_dz, out=d_input)
        torch.addcmul(d_input, dz, gain.view(-1, 1, 1), out=d_input)
    return d_input if needs_input else None, d_scale, d_shift
