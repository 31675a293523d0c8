"""Batch norm in torch's own operations, of maps of any float type, on any device.

They compute in at least float32 and return the type of their input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.norm_sync import Count, sum_over_ranks


def wide(x: Tensor) -> torch.dtype:
    """The type to compute in: float32 for half types, else that of x."""
    return torch.promote_types(x.dtype, torch.float32)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of x (B, C, H, W), in the wide type."""
    # The CPU kernel accumulates in the type of the running statistics it is given to update.
    scratch = torch.zeros(2, x.shape[1], dtype=wide(x), device=x.device)
    return torch.batch_norm_update_stats(x, scratch[0], scratch[1], 0.0)


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
        x_hat_dz, mean_dz = sum_over_ranks(torch.stack([d_scale, d_shift]), count) / count
        d_input = torch.empty_like(u)
        normalise(u, center, spread.square(), -gain * x_hat_dz, -gain * mean_dz, out=d_input)
        torch.addcmul(d_input, dz, gain.view(-1, 1, 1), out=d_input)
    return d_input if needs_input else None, d_scale, d_shift
