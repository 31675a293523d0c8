"""Batch norm with its activation: `abn`, `abn_sync`, `iabn`, `iabn_sync`.

With x̂ = (x - mean) / sqrt(var + eps), over batch and space in training, running in eval:

    ABN         y = act(x̂ · w + b)              keeps x and y for the backward pass
    InPlaceABN  y = act(x̂ · (|w| + eps) + b)    written over x; keeps y alone, x̂ recovered from it
                                                (Rota Bulò et al., CVPR 2018, arXiv 1712.02616)

act is leaky ReLU or nothing. `sync` takes the statistics over all ranks, at the price of one
collective forward and one backward. The state dict of either is that of `nn.BatchNorm2d`.

Who computes, of what runs over whole feature maps:

    Triton    our own kernels (`modules/norm_triton.py`), on CUDA: In-Place ABN, and the statistics
              of `abn_sync`, of maps in float32, float16 or bfloat16, contiguous or channels_last
    package   inplace-abn, where Triton does not run: In-Place ABN in float32 and float16
    plain     torch's operations, gathered at the end of the file, wherever else. They compute in at
              least float32 and return the type of their input

`use` forces one of them. Under torch.compile, within one rank, the formulas above are traced
instead and the compiler fuses them.
"""

import logging
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from utils.errors import UserError

logger = logging.getLogger(__name__)

# How many values per channel the statistics come from: an int where those are all in x, a tensor
# (1,) where they lie on several ranks, None for running statistics, which do not depend on x.
Count: TypeAlias = int | Tensor | None
Statistics: TypeAlias = tuple[Tensor, Tensor, Count]  # mean (C,), biased variance (C,), count

Kernels = Literal["auto", "triton", "package", "plain"]
_kernels: Kernels = "auto"


def use(kernels: Kernels) -> None:
    """Who computes in this process from now on, for benchmarks: see the top of the file.

    "triton" and "package" serve the maps they can, plain operations the others; with "triton" those
    on a CPU, too, for Triton's interpreter. Raises UserError if they do not import.
    """
    global _kernels
    if kernels not in get_args(Kernels):
        raise ValueError(f"{kernels!r} is not one of {', '.join(get_args(Kernels))}")
    sources = {"triton": (_triton, "pip install triton"), "package": (_package, "make iabn")}
    if kernels in sources and sources[kernels][0]() is None:
        raise UserError(f"In-Place ABN cannot use {kernels} here: {sources[kernels][1]}")
    _kernels = kernels


class ABN(nn.BatchNorm2d):
    """Batch norm, then its activation.

    Takes (B, C, H, W) of any float type and returns the same shape, type and memory format.
    Training needs more than one value per channel (over all ranks with `sync`), else UserError.

    Args:
        num_features: C.
        activation: "leaky_relu" or "identity".
        slope: of leaky ReLU below zero; positive.
        eps: added to the variance (by InPlaceABN to |w|, too).
        momentum: share of the batch in the running statistics; their variance is the unbiased one.
        sync: in training, statistics over all ranks of the default process group, if there is one.
    """

    def __init__(
        self,
        num_features: int,
        *,
        activation: str = "leaky_relu",
        slope: float = 0.01,
        eps: float = 1e-5,
        momentum: float = 0.1,
        sync: bool = False,
    ) -> None:
        if activation not in ("leaky_relu", "identity"):
            raise ValueError(f"activation {activation!r} is neither leaky_relu nor identity")
        if slope <= 0:
            raise ValueError(f"slope {slope} is not positive: leaky ReLU could not be inverted")
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.activation = activation
        self.slope = slope if activation == "leaky_relu" else 1.0
        self.sync = sync

    def forward(self, x: Tensor) -> Tensor:
        self._check_count(x)
        if self._over_ranks():
            return _eagerly(self._over_ranks_forward)(x)
        return _activate_(super().forward(x), self.slope)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, activation={self.activation}, slope={self.slope}, "
            f"eps={self.eps}, momentum={self.momentum}, sync={self.sync}"
        )

    def _over_ranks_forward(self, x: Tensor) -> Tensor:
        y = _SyncedBatchNorm.apply(x, self.weight, self.bias, self._statistics(x), self.eps)
        return _activate_(y, self.slope)

    def _over_ranks(self) -> bool:
        """Whether this forward pass takes its statistics over several ranks."""
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return several and self.sync and self.training

    def _check_count(self, x: Tensor) -> None:
        if self.training and not self._over_ranks() and x.numel() == self.num_features:
            raise UserError(
                "batch norm cannot train on one value per channel: use --batch_size 2 or more, "
                "several processes with --norm_act iabn_sync or abn_sync, or --fix_bn"
            )

    @torch.no_grad()
    def _statistics(self, x: Tensor) -> Statistics:
        """What to normalise x with. Training updates the running statistics on the way."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        if not self.training:
            return self.running_mean.to(_wide(x)), self.running_var.to(_wide(x)), None
        count: int | Tensor
        mean, var, count = _batch_statistics(x)
        if self._over_ranks():
            mean, var, count = _gather_statistics(mean, var, count)
        unbiased = var * (count / (count - 1))
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return mean, var, count


class InPlaceABN(ABN):
    """In-Place ABN: `ABN` with weight |w| + eps, in training and eval, written over its input.

    What comes out must not be changed in place while a gradient is wanted (autograd would raise).
    Under torch.compile, within one rank, it is a new tensor.
    """

    def forward(self, x: Tensor) -> Tensor:
        self._check_count(x)
        if torch.compiler.is_compiling() and not self._over_ranks():
            return self._traced_forward(x)
        return _eagerly(self._eager_forward)(x)

    def _traced_forward(self, x: Tensor) -> Tensor:
        """The formula in differentiable operations that the compiler fuses."""
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        if self.training:
            self.num_batches_tracked.add_(1)
        scale = torch.where(self.weight < 0, -self.weight, self.weight) + self.eps
        state = (self.running_mean, self.running_var, scale, self.bias, self.training)
        return _activate_(F.batch_norm(x, *state, self.momentum, self.eps), self.slope)

    def _eager_forward(self, x: Tensor) -> Tensor:
        if self._fits_package(x):
            return self._package_forward(x)
        statistics = self._statistics(x)
        return _InPlace.apply(x, self.weight, self.bias, statistics, self.eps, self.slope)

    def _fits_package(self, x: Tensor) -> bool:
        return (
            _kernels in ("auto", "package")
            and x.is_cuda
            and x.dtype in (torch.float32, torch.float16)
            and self.weight.dtype == torch.float32
            and x.numel() > self.num_features  # it refuses a rank with one value per channel
            and (_kernels == "package" or not _triton_works(x))
            and _package() is not None
        )

    def _package_forward(self, x: Tensor) -> Tensor:
        package = _package()
        assert package is not None
        assert self.num_batches_tracked is not None
        if self.training:
            self.num_batches_tracked.add_(1)
        state = (self.weight, self.bias, self.running_mean, self.running_var, self.training)
        options = (self.momentum, self.eps, self.activation, self.slope)
        if self._over_ranks():
            return package.inplace_abn_sync(x, *state, *options, group=dist.group.WORLD)
        return package.inplace_abn(x, *state, *options)


NORMS: dict[str, Callable[..., ABN]] = {
    "iabn_sync": partial(InPlaceABN, sync=True),
    "iabn": InPlaceABN,
    "abn_sync": partial(ABN, sync=True),
    "abn": ABN,
    "std": ABN,
}


def get_norm(name: str) -> Callable[..., ABN]:
    """The norm layer called `name`: `norm(channels)` or `norm(channels, activation="identity")`.

    For In-Place ABN a log line says, once, who computes: our Triton kernels on CUDA, the package
    inplace-abn where Triton is missing, plain operations elsewhere. Raises UserError if `name` is
    not one of NORMS.
    """
    if name not in NORMS:
        raise UserError(f"unknown norm {name}: --norm_act takes {', '.join(NORMS)}")
    if name.startswith("iabn"):
        _announce()
    return NORMS[name]


@cache
def _announce() -> None:
    if not torch.cuda.is_available():
        who = "plain operations (no CUDA device)"
    elif _triton() is not None:
        who = "our Triton kernels, where they run"
    elif _package() is not None:
        who = "kernels of inplace-abn for float32 and float16, plain operations otherwise"
    else:
        who = "plain operations"
    logger.info("In-Place ABN: %s", who)


@cache
def _triton() -> ModuleType | None:
    """The module of our kernels, None where Triton is of no use."""
    try:
        return import_module("modules.norm_triton")
    except Exception as error:  # not installed, or broken in a way of its own
        logger.info("In-Place ABN: Triton does not import (%s)", error)
        return None


def _triton_works(x: Tensor) -> bool:
    module = _triton()
    return module is not None and module.works(x.device, x.dtype)


def _triton_for(x: Tensor) -> ModuleType | None:
    """The module of our kernels if they are to serve the map x."""
    if not (x.is_cuda if _kernels == "auto" else _kernels == "triton"):
        return None
    module = _triton()
    return module if module and module.fits(x) and _triton_works(x) else None


def _eagerly(method: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Keeps `method` out of the graph while torch.compile traces.

    As a decorator it would import the compiler, for a second, in programs that never compile.
    """
    return torch.compiler.disable(method) if torch.compiler.is_compiling() else method


@cache
def _package() -> ModuleType | None:
    """The functions of the inplace-abn package, None where it is of no use."""
    try:
        backend = import_module("inplace_abn._backend")
        functions = import_module("inplace_abn.functions")
    except (ImportError, OSError) as error:  # not installed, or built for another torch
        logger.info("In-Place ABN: inplace-abn does not import (%s)", error)
        return None
    if not hasattr(backend, "reduce_statistics"):
        logger.info("In-Place ABN: inplace-abn was built without CUDA")
        return None
    return functions


class _InPlace(Function):
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
    ) -> Tensor:
        mean, var, ctx.count = statistics
        ctx.eps, ctx.slope, ctx.triton = eps, slope, _triton_for(x)
        if ctx.triton:
            ctx.triton.normalise_(x, mean, var, weight, bias, eps, slope)
        else:
            scale, shift = weight.abs().to(mean.dtype) + eps, bias.to(mean.dtype)
            _activate_(_normalise(x, mean, var + eps, scale, shift, out=x), slope)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x, weight, bias, var)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _triton_gradients if ctx.triton else _plain_gradients
        return *gradients(ctx, dy), None, None, None


def _triton_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Of `_InPlace`, for x, weight and bias."""
    y, weight, bias, var = ctx.saved_tensors
    needs_input, *needs_parameters = ctx.needs_input_grad[:3]
    constants = (weight, bias, ctx.eps, ctx.slope)
    dx = means = d_weight = d_bias = None
    if any(needs_parameters) or ctx.count is not None:
        sums = d_weight, d_bias = ctx.triton.gradient_sums(y, dy, *constants)
    if needs_input:
        if ctx.count is not None:
            means = _sum_over_ranks(sums, ctx.count) / ctx.count
        dx = ctx.triton.input_gradient(y, dy, var, means, *constants)
    return dx, d_weight, d_bias


def _plain_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Of `_InPlace`, for x, weight and bias."""
    y, weight, bias, var = ctx.saved_tensors
    scale, shift = weight.abs().to(var.dtype) + ctx.eps, bias.to(var.dtype)
    z, dz = _undo_activation(y, dy, ctx.slope)
    # z = x̂ · scale + shift stands in for the overwritten x.
    dx, d_scale, d_shift = _gradients(
        dz, z, shift, scale, scale * (var + ctx.eps).rsqrt(), ctx.count, ctx.needs_input_grad[0]
    )
    # The derivative of |w| at 0 is taken as 1, as in the inplace-abn package.
    return dx, torch.where(weight < 0, -d_scale, d_scale), d_shift


class _SyncedBatchNorm(Function):
    """y = x̂ · w + b with statistics over all ranks; keeps x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, statistics: Statistics, eps: float
    ) -> Tensor:
        mean, var, ctx.count = statistics
        scale, shift = weight.to(mean.dtype), bias.to(mean.dtype)
        std = (var + eps).sqrt()
        ctx.save_for_backward(x, mean, std, scale / std)
        return _normalise(x, mean, var + eps, scale, shift, out=torch.empty_like(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, std, gain = ctx.saved_tensors
        grads = _gradients(dy, x, mean, std, gain, ctx.count, ctx.needs_input_grad[0])
        return *grads, None, None


def _gather_statistics(mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count over all ranks from those of this one, in one collective."""
    local = torch.cat([mean, var, mean.new_full((1,), count)])
    ranks = local.new_empty(dist.get_world_size(), len(local))
    dist.all_gather(list(ranks.unbind()), local)
    means, variances, counts = ranks.split([len(mean), len(var), 1], dim=1)
    total = counts.sum(0)
    share = counts / total
    mean = (share * means).sum(0)
    # Variance within ranks plus variance between them: no difference of large sums.
    return mean, (share * (variances + (means - mean).square())).sum(0), total


def _sum_over_ranks(sums: Tensor, count: Count) -> Tensor:
    """`sums` of this rank, or of all where the count is over all."""
    if isinstance(count, Tensor):
        sums = sums.clone()
        dist.all_reduce(sums)
    return sums


def _wide(x: Tensor) -> torch.dtype:
    """The type to compute in: float32 for half types, else that of x."""
    return torch.promote_types(x.dtype, torch.float32)


def _batch_statistics(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance (C,) of x (B, C, H, W) in the wide type, and values per channel."""
    count = x.numel() // x.shape[1]
    if triton := _triton_for(x):
        return *triton.statistics(x), count
    # The CPU kernel accumulates in the type of the running statistics it is given to update.
    scratch = torch.zeros(2, x.shape[1], dtype=_wide(x), device=x.device)
    mean, var = torch.batch_norm_update_stats(x, scratch[0], scratch[1], 0.0)
    return mean, var, count


def _normalise(
    x: Tensor, mean: Tensor, var: Tensor, scale: Tensor, shift: Tensor, out: Tensor
) -> Tensor:
    """(x - mean) / sqrt(var) · scale + shift in one pass into `out`, which may be x itself."""
    unused = mean.new_empty(0), mean.new_empty(0)
    torch.native_batch_norm(x, scale, shift, mean, var, False, 0.0, 0.0, out=(out, *unused))
    return out


def _activate_(z: Tensor, slope: float) -> Tensor:
    return z if slope == 1 else F.leaky_relu_(z, slope)


def _undo_activation(y: Tensor, dy: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """z and its gradient from y = leaky_relu(z) and its gradient."""
    if slope == 1:
        return y, dy
    dz = torch.ops.aten.leaky_relu_backward(dy, y, slope, True)
    return F.leaky_relu(y, 1 / slope), dz


def _gradients(
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
        x_hat_dz, mean_dz = _sum_over_ranks(torch.stack([d_scale, d_shift]), count) / count
        d_input = torch.empty_like(u)
        _normalise(u, center, spread.square(), -gain * x_hat_dz, -gain * mean_dz, out=d_input)
        torch.addcmul(d_input, dz, gain.view(-1, 1, 1), out=d_input)
    return d_input if needs_input else None, d_scale, d_shift
