"""One rank of the multi-process tests of the norm layers: `python -m tests.modules.norm_worker`.

Arguments: rank, world size, rendezvous file, and the file that the results go to.
"""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modules import norm
from modules.norm import ABN, get_norm

CHANNELS = 5
# name → shares of the ranks in the batch, height and width, type
CASES = {
    "even": ((2, 2), 4, torch.float64),
    "uneven": ((3, 1), 4, torch.float64),
    "one value per rank": ((1, 1), 1, torch.float64),
    "float32": ((3, 1), 4, torch.float32),
    "bfloat16": ((3, 1), 8, torch.bfloat16),
}
RUNS = [(case, "plain") for case in CASES] + [("uneven", "compiled"), ("float32", "triton")]


def make_case(case: str) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """The whole batch, the gradient of its output, and the shares of the ranks."""
    shares, size, dtype = CASES[case]
    generator = torch.Generator().manual_seed(1)
    shape = (2, sum(shares), CHANNELS, size, size)
    x, dy = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (x * 2 + 3).to(dtype), dy.to(dtype), shares


def make_layer(name: str, case: str) -> ABN:
    layer = get_norm(name)(CHANNELS)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, -0.5, 0.3, 2.0, -1.5]))
        layer.bias.copy_(torch.tensor([0.0, 0.2, -0.4, 1.0, -0.1]))
    return layer.double() if CASES[case][2] == torch.float64 else layer


def run_layer(layer: ABN, x: Tensor, dy: Tensor, needs_input: bool = True) -> dict[str, Any]:
    """Output, gradients (None where not wanted) and buffers after a forward and backward pass."""
    leaf = x.clone().requires_grad_(needs_input)
    y = layer(leaf.clone())
    y.backward(dy)
    result = {"y": y.detach(), "dx": leaf.grad, "dw": layer.weight.grad, "db": layer.bias.grad}
    return result | dict(layer.named_buffers())


def run_share(name: str, case: str, rank: int, how: str) -> dict[str, Any]:
    """The share of `rank`: as is, in a graph of torch.compile, or through our Triton kernels."""
    x, dy, shares = make_case(case)
    layer, x, dy = make_layer(name, case), x.split(shares)[rank], dy.split(shares)[rank]
    if how == "compiled":
        layer.compile(backend="aot_eager")
    if how == "triton":
        norm.use("triton")
        assert norm._triton_for(x), "plain operations would compute this case"
    result = run_layer(layer, x, dy)
    norm.use("auto")
    return result


def make_net(name: str) -> nn.Sequential:
    torch.manual_seed(2)
    layer = get_norm(name)
    layers = (nn.Conv2d(CHANNELS, 4, 3), layer(4), nn.Conv2d(4, 3, 1), layer(3))
    return nn.Sequential(*layers).double()


def net_gradients(net: nn.Module, x: Tensor) -> list[Tensor | None]:
    net(x).square().sum().backward()
    return [parameter.grad for parameter in net.parameters()]


def count_collectives(name: str) -> tuple[int, int]:
    """Collectives per forward and backward pass together, in training and in eval."""
    calls: list[str] = []

    def counted(kind: str) -> Callable[..., None]:
        real = getattr(dist, kind)

        def call(*args: Any) -> None:
            calls.append(kind)
            real(*args)

        return call

    for kind in ("all_gather", "all_reduce"):
        setattr(dist, kind, counted(kind))
    x, dy, _ = make_case("even")
    layer = make_layer(name, "even")
    run_layer(layer, x, dy)
    training = len(calls)
    run_layer(layer.eval(), x, dy)
    return training, len(calls) - training


def main(rank: int, world: int, rendezvous: str, output: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=world)
    results: dict[str, Any] = {}
    for name in ("abn_sync", "iabn_sync"):
        for case, how in RUNS:
            if how != "triton" or find_spec("triton"):
                results[f"{name} {case} {how}"] = run_share(name, case, rank, how)
        x, _, shares = make_case("uneven")
        net = nn.parallel.DistributedDataParallel(make_net(name))
        results[f"{name} ddp"] = net_gradients(net, x.split(shares)[rank])
    results["collectives"] = {n: count_collectives(n) for n in ("abn_sync", "iabn_sync", "iabn")}
    torch.save(results, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
