"""One rank of the multi-process tests of the norm layers: `python -m tests.modules.norm_worker`.

Arguments: rank, world size, rendezvous file, and the file that the results go to.
"""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from modules import norm
from modules.norm import ABN, get_norm
from utils import distributed

CHANNELS = 5
# name → shares of the ranks in the batch, height and width, type
CASES = {
    "even": ((2, 2), 4, torch.float64),
    "uneven": ((3, 1), 4, torch.float64),
    "one value per rank": ((1, 1), 1, torch.float64),
    "float32": ((3, 1), 4, torch.float32),
    "bfloat16": ((3, 1), 8, torch.bfloat16),
}
RUNS = [(case, "plain") for case in CASES]
RUNS += [("uneven", "compiled"), ("float32", "triton"), ("float32", "mixed")]


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
    """The share of `rank`: as is, in a graph of torch.compile, or through our Triton kernels.

    "mixed" is Triton on rank 0 and plain operations on the others.
    """
    x, dy, shares = make_case(case)
    layer, x, dy = make_layer(name, case), x.split(shares)[rank], dy.split(shares)[rank]
    if how == "compiled":
        layer.compile(backend="aot_eager")
    if how == "triton" or (how == "mixed" and rank == 0):
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
    """Collectives per forward and backward pass together, in training and in eval.

    None of them is in the group that DistributedDataParallel uses.
    """
    calls: list[str] = []

    def counted(kind: str) -> Callable[..., None]:
        real = getattr(dist, kind)

        def call(*args: Any, **options: Any) -> None:
            calls.append(kind)
            assert options["group"] is distributed.norm_group() is not dist.group.WORLD
            real(*args, **options)

        return call

    x, dy, _ = make_case("even")
    layer = make_layer(name, "even")
    kinds = ("all_gather", "all_gather_into_tensor", "all_reduce")
    with patch.multiple(dist, **{kind: counted(kind) for kind in kinds}):
        run_layer(layer, x, dy)
        training = len(calls)
        run_layer(layer.eval(), x, dy)
    return training, len(calls) - training


class Operations(TorchDispatchMode):
    """Writes down torch's operations, but for allocations and views, which do nothing."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        name = function.overloadpacket.__name__
        if not (function.is_view or "empty" in name or function.namespace == "c10d"):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


class Launches:
    """Stands for a kernel and writes down its launches; what the interpreter does, it hides."""

    def __init__(self, kernel: Any, names: list[str]) -> None:
        self.kernel, self.names = kernel, names

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any) -> None:
            self.names.append(self.kernel.fn.__name__)
            with _disable_current_modes():
                self.kernel[grid](*args)

        return launch


def list_launches(name: str, rank: int) -> dict[str, list[str]]:
    """What a forward and what a backward pass starts with our Triton kernels, in order."""
    norm.use("triton")
    from modules import norm_triton_kernels as kernels

    x, dy, shares = make_case("float32")
    layer, x, dy = make_layer(name, "float32"), x.split(shares)[rank], dy.split(shares)[rank]
    x.requires_grad_()
    leaf, forward, backward = x.clone(), [], []
    names = ("statistics", "combine", "normalise", "gradient_sums", "add_up", "input_gradient")

    def recorded(names_of: list[str]) -> Any:
        replaced = {n: Launches(getattr(kernels, n), names_of) for n in names}
        return patch.multiple(kernels, **replaced)

    with recorded(forward), Operations(forward):
        y = layer(leaf)
    with recorded(backward), Operations(backward):
        torch.autograd.grad(y, (leaf, layer.weight, layer.bias), dy)
    norm.use("auto")
    return {"forward": forward, "backward": backward}


def can_trace(name: str) -> dict[str, tuple[bool, bool]]:
    """In training and in eval: what `traceable` says, and whether a single graph came about."""
    answers = {}
    for mode, training in (("train", True), ("eval", False)):
        net = make_net(name).train(training)
        torch._dynamo.reset()
        whole = torch.compile(net, backend="aot_eager", fullgraph=True)
        try:
            whole(make_case("even")[0])
            traced = True
        except torch._dynamo.exc.Unsupported:
            traced = False
        answers[mode] = (norm.traceable(net), traced)
    return answers


def main(rank: int, world: int, rendezvous: str, output: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=world)
    results: dict[str, Any] = {}
    for name in ("abn_sync", "iabn_sync"):
        for case, how in RUNS:
            if how not in ("triton", "mixed") or find_spec("triton"):
                results[f"{name} {case} {how}"] = run_share(name, case, rank, how)
        x, _, shares = make_case("uneven")
        net = nn.parallel.DistributedDataParallel(make_net(name))
        results[f"{name} ddp"] = net_gradients(net, x.split(shares)[rank])
    results["collectives"] = {n: count_collectives(n) for n in ("abn_sync", "iabn_sync", "iabn")}
    results["traceable"] = {n: can_trace(n) for n in ("abn_sync", "iabn_sync", "iabn")}
    if find_spec("triton"):
        results["launches"] = {n: list_launches(n, rank) for n in ("iabn_sync", "iabn")}
    torch.save(results, output)
    distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
