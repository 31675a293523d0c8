"""In-Place ABN against batch norm and leaky ReLU as they are usually written.

    python -m benchmarks.norm [--device cuda --batch 24 --dtype bfloat16 --channels_last]

Forward and backward over the maps of a ResNet-101 at crop 512 and output stride 16, in training.
The plain side is nn.BatchNorm2d, then F.leaky_relu. --kernels chooses who computes our side.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from benchmarks.harness import Work, compare, parser, report, start
from modules import norm
from modules.norm import InPlaceABN

# Channels x height and width: of the stem, and of what mod2 to mod5 have most of
MAPS = ["64x256", "256x128", "512x64", "256x32", "1024x32", "2048x32"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Plain(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(x), 0.01)


class Convolution(Function):
    """Stands for the layer before the norm: its output is there already, its gradient is unused."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, output: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def prepare(
    layer: Callable[[int], nn.Module], kernels: norm.Kernels, shape: tuple[int, int, int, int],
    dtype: torch.dtype, channels_last: bool, device: str,
) -> Callable[[], object]:  # fmt: skip
    """The measured call: y and the gradients of x, weight and bias, given x and dy."""
    norm.use(kernels)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, dy = (torch.randn(shape, device=device).to(dtype, memory_format=layout) for _ in range(2))
    module, weight = layer(shape[1]).to(device), torch.ones((), requires_grad=True)

    def step() -> None:
        module.zero_grad(set_to_none=True)
        module(Convolution.apply(weight, x.detach())).backward(dy)

    return step


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--dtype", choices=DTYPES, default="float32")
    p.add_argument("--channels_last", action="store_true")
    p.add_argument("--kernels", choices=get_args(norm.Kernels), default="auto")
    p.add_argument("--maps", nargs="+", default=MAPS, metavar="CxS", help="channels x side")
    args = p.parse_args()
    norm.use(args.kernels)
    cases: dict[str, tuple[Work, Work]] = {}
    for channels, side in (map(int, m.split("x")) for m in args.maps):
        options = ((args.batch, channels, side, side), DTYPES[args.dtype], args.channels_last)
        ours, plain = (
            partial(prepare, layer, args.kernels, *options, args.device)
            for layer in (InPlaceABN, Plain)
        )
        cases[f"{args.batch} x {channels} x {side} x {side}"] = ours, plain
    report(cases, compare(cases, args), args.json)


if __name__ == "__main__":
    start(main)
