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
    plain     torch's operations (`modules/norm_plain.py`), wherever else

`use` forces one of them. Under torch.compile, within one rank, the formulas above are traced
instead and the compiler fuses them; across ranks the graph breaks (`traceable`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules import norm_plain
from modules.norm_functions import InPlace, SyncedBatchNorm
from modules.norm_plain import activate_, wide
from modules.norm_sync import Running, Statistics
from modules.structures import NORMS
from utils import distributed
from utils.errors import UserError

logger = logging.getLogger(__name__)

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
        return activate_(super().forward(x), self.slope)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, activation={self.activation}, slope={self.slope}, "
            f"eps={self.eps}, momentum={self.momentum}, sync={self.sync}"
        )

    def _over_ranks_forward(self, x: Tensor) -> Tensor:
        statistics = self._statistics(x, _who_computes(x))
        y = SyncedBatchNorm.apply(x, self.weight, self.bias, statistics, self.eps)
        return activate_(y, self.slope)

    def _over_ranks(self) -> bool:
        """Whether this forward pass takes its statistics over several ranks."""
        return distributed.world_size() > 1 and self.sync and self.training

    def _check_count(self, x: Tensor) -> None:
        if self.training and not self._over_ranks() and x.numel() == self.num_features:
            raise UserError(
                "batch norm cannot train on one value per channel: use --batch_size 2 or more, "
                "several processes with --norm_act iabn_sync or abn_sync, or --fix_bn"
            )

    @torch.no_grad()
    def _statistics(self, x: Tensor, computes: ModuleType) -> Statistics:
        """What to normalise x with. Training updates the running statistics on the way."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        if not self.training:
            return Statistics(self.running_mean.to(wide(x)), self.running_var.to(wide(x)), None)
        buffers = self.running_mean, self.running_var, self.num_batches_tracked
        running = Running(*buffers, self.momentum)
        return computes.batch_statistics(x, running, self._over_ranks())


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
        return activate_(F.batch_norm(x, *state, self.momentum, self.eps), self.slope)

    def _eager_forward(self, x: Tensor) -> Tensor:
        if self._fits_package(x):
            return self._package_forward(x)
        computes = _who_computes(x)
        statistics = self._statistics(x, computes)
        options = (self.eps, self.slope, computes)
        return InPlace.apply(x, self.weight, self.bias, statistics, *options)

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
            return package.inplace_abn_sync(x, *state, *options, group=distributed.norm_group())
        return package.inplace_abn(x, *state, *options)


def get_norm(name: str) -> Callable[..., ABN]:
    """The norm layer called `name`: `norm(channels)` or `norm(channels, activation="identity")`.

    For In-Place ABN a log line says, once, who computes: our Triton kernels on CUDA, the package
    inplace-abn where Triton is missing, plain operations elsewhere. Raises UserError if `name` is
    not one of `modules.structures.NORMS`.
    """
    if name not in NORMS:
        raise UserError(f"unknown norm {name}: --norm_act takes {', '.join(NORMS)}")
    if name.startswith("iabn"):
        _announce()
    layer = InPlaceABN if name.startswith("iabn") else ABN
    return partial(layer, sync=True) if name.endswith("_sync") else layer


def traceable(model: nn.Module) -> bool:
    """Whether torch.compile makes one graph of the model, in the mode (train, eval) it is in.

    A norm that synchronises over several ranks breaks it: its collectives stay outside. A network
    then falls into as many graphs as it has norms, and little is left to fuse.
    """
    return not any(isinstance(m, ABN) and m._over_ranks() for m in model.modules())


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
    if _triton() is None:
        return False
    from modules.norm_check import works  # it imports Triton

    return works(x.device, x.dtype)


def _triton_for(x: Tensor) -> ModuleType | None:
    """The module of our kernels if they are to serve the map x."""
    if not (x.is_cuda if _kernels == "auto" else _kernels == "triton"):
        return None
    module = _triton()
    return module if module and module.fits(x) and _triton_works(x) else None


def _who_computes(x: Tensor) -> ModuleType:
    return _triton_for(x) or norm_plain


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
