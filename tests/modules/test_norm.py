"""The norm layers against plain batch norm, the inplace-abn package, finite differences, peers."""

import copy
import functools
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness
from benchmarks import norm as benchmark
from modules import norm
from modules.norm import ABN, InPlaceABN, get_norm
from segmentation_module import make_model
from tests.modules import norm_worker
from utils import distributed
from utils.errors import UserError

NAMES = ["abn", "abn_sync", "iabn", "iabn_sync"]
CHANNELS = norm_worker.CHANNELS
LAYOUTS = [torch.contiguous_format, torch.channels_last]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def make(name: str, weight: float | list[float] | None = None, **options: Any) -> ABN:
    """A layer in float64 with random state; weights of both signs unless given."""
    torch.manual_seed(0)
    layer = get_norm(name)(CHANNELS, **options).double()
    values = torch.tensor([1.0, -0.5, 0.3, 2.0, -1.5] if weight is None else weight)
    with torch.no_grad():
        layer.weight.copy_(values)
        layer.bias.normal_()
        layer.get_buffer("running_mean").normal_()
        layer.get_buffer("running_var").uniform_(0.5, 2)
    return layer


def batch(dtype: torch.dtype = torch.float64, *, size: int = 4, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, CHANNELS, size, size + 1, generator=generator, dtype=torch.float64)
    return (x * 2 + 1).to(device, dtype)


def run(layer: nn.Module, x: Tensor, dy: Tensor | None = None) -> dict[str, Tensor]:
    """Output, gradients and buffers after one forward and backward pass."""
    leaf = x.clone().requires_grad_()
    y = layer(leaf.clone())
    y.backward(
        torch.linspace(-1, 2, y.numel(), device=y.device).view_as(y).to(y) if dy is None else dy
    )
    grads = {key: value.grad for key, value in layer.named_parameters()}
    assert leaf.grad is not None
    return {"y": y.detach(), "dx": leaf.grad, **grads, **dict(layer.named_buffers())}


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> None:
    assert left.keys() == right.keys()
    for key, value in left.items():
        torch.testing.assert_close(
            value, right[key], rtol=tolerance, atol=tolerance, msg=f"{key}\n{value}\n{right[key]}"
        )


class BatchNormLeakyReLU(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(x), 0.01)


def plain(layer: ABN, activation: str = "leaky_relu") -> nn.Module:
    """torch's batch norm (+ leaky ReLU) in the state of `layer`."""
    kind = BatchNormLeakyReLU if activation == "leaky_relu" else nn.BatchNorm2d
    other = kind(CHANNELS).to(layer.weight)
    other.load_state_dict(layer.state_dict())
    return other.train(layer.training)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["leaky_relu", "identity"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str, training: bool, activation: str, layout: torch.memory_format) -> None:
    layer = make(name, activation=activation).train(training)
    x = batch().to(memory_format=layout).requires_grad_()

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        parameters = {"weight": weight, "bias": bias}
        return torch.func.functional_call(layer, parameters, (x.clone(),))

    assert torch.autograd.gradcheck(forward, (x, layer.weight, layer.bias))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ["leaky_relu", "identity"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_equals_batch_norm_and_leaky_relu(
    name: str, training: bool, activation: str, device: str
) -> None:
    layer = make(name, weight=0.8, activation=activation).train(training).to(device)
    reference = plain(layer, activation)
    if "iabn" in name:
        with torch.no_grad():
            reference.get_parameter("weight").add_(layer.eps)
    x = batch(device=device)
    assert_close(run(layer, x), run(reference, x), 1e-10)
    assert layer.num_batches_tracked == int(training)


def test_negative_weight_acts_by_its_magnitude_in_place_only() -> None:
    x = batch()
    positive, negative = run(make("iabn", weight=0.7), x), run(make("iabn", weight=-0.7), x)
    negative["weight"] = -negative["weight"]
    assert_close(positive, negative, 0)
    signed = make("abn", weight=-0.7)
    reference = plain(signed)
    assert_close(run(signed, x), run(reference, x), 1e-10)


def test_weight_zero_has_a_gradient_in_place() -> None:
    x = batch()
    at_zero, near_zero = run(make("iabn", weight=0.0), x), run(make("iabn", weight=1e-9), x)
    assert at_zero["weight"].abs().min() > 0
    torch.testing.assert_close(at_zero["weight"], near_zero["weight"], rtol=1e-3, atol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_writes_over_its_input_in_place_only(
    name: str, layout: torch.memory_format, dtype: torch.dtype, training: bool
) -> None:
    layer = make(name).float() if dtype.itemsize == 2 else make(name).to(dtype)
    x = batch(dtype).to(memory_format=layout)
    before = x.clone()
    with torch.no_grad():
        y = layer.train(training)(x)
    assert (x.data_ptr() == y.data_ptr()) == ("iabn" in name)
    assert torch.equal(x, y if "iabn" in name else before)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("name", NAMES)
def test_layout_of_the_gradient_does_not_matter(name: str) -> None:
    x, dy = batch(), torch.rand(batch().shape, dtype=torch.float64)
    expected = run(make(name), x, dy)
    last = torch.channels_last
    for left, right in [(x, dy.to(memory_format=last)), (x.to(memory_format=last), dy)]:
        assert_close(run(make(name), left, right), expected, 1e-12)
    ones = run(make(name, activation="identity"), x, torch.ones_like(dy))
    expanded = run(make(name, activation="identity"), x, torch.ones(()).double().expand_as(dy))
    assert_close(expanded, ones, 1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_half_types_are_close_to_float32(
    name: str, training: bool, dtype: torch.dtype, device: str
) -> None:
    layer = make(name).float().train(training).to(device)
    x = batch(dtype, size=16, device=device)
    half, full = run(copy.deepcopy(layer), x), run(layer, x.float())
    assert half["y"].dtype == half["dx"].dtype == dtype
    assert half.pop("num_batches_tracked") == full.pop("num_batches_tracked")
    error = {key: (half[key].float() - full[key]).norm() / full[key].norm() for key in half}
    # Statistics are accumulated in float32; everything else went through two roundings or three.
    eps = torch.finfo(dtype).eps
    assert error["running_mean"] < 1e-6
    assert error["running_var"] < 1e-6
    assert max(error.values()) < 2 * eps, error


def test_whole_module_in_bfloat16() -> None:
    layer = make("iabn").bfloat16()
    result = run(layer, batch(torch.bfloat16))
    assert {value.dtype for key, value in result.items() if key != "num_batches_tracked"} == {
        torch.bfloat16
    }


@pytest.mark.parametrize("name", NAMES)
def test_under_autocast(name: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(CHANNELS, 8, 3), get_norm(name)(8))
    x = batch(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert net[1].weight.grad is not None
    assert net[1].weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), net(x), rtol=0.05, atol=0.05)


def kept_feature_maps(name: str, blocks: int = 4) -> tuple[int, int]:
    """(feature maps, bytes) that a chain of conv + norm keeps for the backward pass."""
    net = nn.Sequential(
        *(m for _ in range(blocks) for m in (nn.Conv2d(8, 8, 3, padding=1), get_norm(name)(8)))
    )
    x = torch.randn(2, 8, 16, 16)
    kept: dict[int, Tensor] = {}  # by storage, which stays alive with the tensor

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(x).sum().backward()
    sizes = [tensor.untyped_storage().nbytes() for tensor in kept.values()]
    return sum(tensor.shape == x.shape for tensor in kept.values()), sum(sizes)


def test_in_place_keeps_one_feature_map_per_block() -> None:
    (maps, size), (in_place_maps, in_place_size) = (
        kept_feature_maps("abn"),
        kept_feature_maps("iabn"),
    )
    assert (maps, in_place_maps) == (1 + 2 * 4, 1 + 4)  # the input of the chain included
    assert in_place_size < 0.7 * size


def test_output_changed_before_the_backward_pass_is_an_error() -> None:
    x = batch().requires_grad_()
    y = make("iabn")(x.clone())
    y += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_state_dicts_are_interchangeable() -> None:
    states = [make(name).state_dict() for name in NAMES]
    keys = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert all(list(state) == keys for state in states)
    fresh = get_norm("iabn_sync")(CHANNELS)
    assert torch.equal(fresh.weight, torch.ones(CHANNELS))
    assert torch.equal(fresh.bias, torch.zeros(CHANNELS))
    without_counter = {key: states[0][key] for key in keys[:-1]}  # as old checkpoints have it
    fresh.load_state_dict(without_counter)
    assert torch.equal(fresh.weight, states[0]["weight"].float())


def test_slope_and_eps_reach_the_formula() -> None:
    factory = functools.partial(get_norm("iabn"), eps=0.5, slope=0.25, momentum=0.3)
    layer = factory(CHANNELS).double()
    x = batch()
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    z = (x - mean) / (var + 0.5).sqrt() * 1.5
    torch.testing.assert_close(layer(x.clone()), torch.where(z < 0, z * 0.25, z))
    torch.testing.assert_close(layer.running_mean, 0.3 * mean.flatten())
    unbiased = x.var((0, 2, 3))
    torch.testing.assert_close(layer.running_var, 0.7 + 0.3 * unbiased)


@pytest.mark.parametrize("name", NAMES)
def test_one_value_per_channel(name: str) -> None:
    x = torch.ones(1, CHANNELS, 1, 1, dtype=torch.float64)
    layer = make(name)
    with pytest.raises(UserError, match="batch_size"):
        layer(x)
    assert layer.num_batches_tracked == 0
    assert layer.eval()(x).isfinite().all()


def test_bad_arguments() -> None:
    with pytest.raises(UserError, match="unknown norm bn: --norm_act takes iabn_sync, iabn, abn"):
        get_norm("bn")
    with pytest.raises(ValueError, match="relu6"):
        ABN(3, activation="relu6")
    with pytest.raises(ValueError, match="slope"):
        InPlaceABN(3, slope=0.0)
    assert type(get_norm("std")(3)) is ABN


# The inplace-abn package ---------------------------------------------------------------------


def package() -> ModuleType:
    reason = "inplace-abn is not installed (make iabn)"
    return pytest.importorskip("inplace_abn.functions", reason=reason, exc_type=ImportError)


FLOAT32_CONSTANTS = {"eps": 9.99999974737875e-06, "slope": 0.009999999776482582}  # as it holds them


def through_package(monkeypatch: pytest.MonkeyPatch, functions: Any) -> None:
    monkeypatch.setattr(norm, "_package", lambda: functions)
    monkeypatch.setattr(InPlaceABN, "_fits_package", lambda self, x: True)


@pytest.mark.parametrize("activation", ["leaky_relu", "identity"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["iabn", "iabn_sync"])
def test_equals_the_package(
    name: str, training: bool, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = package()
    weight = [1.0, -0.5, 0.0, 2.0, -1.5]
    layer = make(name, weight, activation=activation, **FLOAT32_CONSTANTS).train(training)
    other = copy.deepcopy(layer)
    x = batch()
    ours = run(layer, x)
    through_package(monkeypatch, functions)
    theirs = run(other, x)
    assert_close(ours, theirs, 1e-8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_the_package_on_cuda(
    dtype: torch.dtype, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    package()
    layer = make("iabn").float().cuda().train(training)
    x = batch(dtype, size=16, device="cuda")
    monkeypatch.setattr(norm, "_kernels", "package")
    assert isinstance(layer, InPlaceABN)
    assert layer._fits_package(x)
    theirs = run(copy.deepcopy(layer), x)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    for kernels in ("triton", "plain"):
        monkeypatch.setattr(norm, "_kernels", kernels)
        assert not layer._fits_package(x)
        assert_close(run(copy.deepcopy(layer), x), theirs, tolerance)


def test_package_gets_the_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def record(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append((*args, kwargs))
        return x

    through_package(monkeypatch, SimpleNamespace(inplace_abn=record, inplace_abn_sync=record))
    layer, x, group = make("iabn_sync"), batch(), object()
    layer(x)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "norm_group", lambda: group)
    layer(x)
    layer.eval()(x)
    state = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
    options = (0.1, 1e-5, "leaky_relu", 0.01)
    assert calls[0] == (*state, True, *options, {})
    assert calls[1] == (*state, True, *options, {"group": group})
    assert calls[2] == (*state, False, *options, {})
    assert layer.num_batches_tracked == 2


@pytest.mark.parametrize(
    ("changed", "fits"),
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"dtype": torch.bfloat16}, False),
        ({"dtype": torch.float64}, False),
        ({"is_cuda": False}, False),
        ({"numel": lambda: CHANNELS}, False),
    ],
)
def test_package_gets_what_it_can_do(
    changed: dict[str, Any], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm, "_package", lambda: ModuleType("functions"))
    monkeypatch.setattr(norm, "_triton_works", lambda x: False)
    x: Any = SimpleNamespace(is_cuda=True, dtype=torch.float32, numel=lambda: 2 * CHANNELS)
    vars(x).update(changed)
    assert InPlaceABN(CHANNELS)._fits_package(x) == fits
    assert not InPlaceABN(CHANNELS).half()._fits_package(x)
    monkeypatch.setattr(norm, "_triton_works", lambda x: True)
    for kernels in get_args(norm.Kernels):
        monkeypatch.setattr(norm, "_kernels", kernels)
        assert InPlaceABN(CHANNELS)._fits_package(x) == (fits and kernels == "package")
    monkeypatch.setattr(norm, "_package", lambda: None)
    assert not InPlaceABN(CHANNELS)._fits_package(x)


@pytest.mark.parametrize(
    ("cuda", "triton", "backend", "lines"),
    [
        (True, True, {"reduce_statistics": None}, ["our Triton kernels"]),
        (
            True,
            False,
            {"reduce_statistics": None},
            ["Triton does not import (", "kernels of inplace-abn for float32 and float16, plain"],
        ),
        (
            True,
            False,
            {},
            ["Triton does not import (", "inplace-abn was built without CUDA", "plain operations"],
        ),
        (
            True,
            False,
            None,
            ["Triton does not import (", "inplace-abn does not import (", "plain operations"],
        ),
        (False, True, {"reduce_statistics": None}, ["plain operations (no CUDA device)"]),
    ],
)
def test_the_log_says_once_whose_kernels_run(
    cuda: bool,
    triton: bool,
    backend: dict[str, None] | None,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    functions = ModuleType("functions")
    present = SimpleNamespace(**backend) if backend is not None else None
    monkeypatch.setitem(sys.modules, "inplace_abn", ModuleType("inplace_abn"))
    monkeypatch.setitem(sys.modules, "inplace_abn._backend", present)  # None makes the import fail
    monkeypatch.setitem(sys.modules, "inplace_abn.functions", functions)
    monkeypatch.setitem(sys.modules, "modules.norm_triton", ModuleType("") if triton else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    clear_caches()
    with caplog.at_level(logging.INFO, logger="modules.norm"):
        for name in ("abn_sync", "iabn", "iabn_sync"):
            get_norm(name)
    for record, line in zip(caplog.records, lines, strict=True):
        assert line in record.getMessage()
    assert (norm._package() is functions) == bool(backend)
    clear_caches()


def clear_caches() -> None:
    for function in (norm._announce, norm._package, norm._triton):
        function.cache_clear()


@pytest.mark.parametrize("kernels", ["triton", "package"])
def test_forced_kernels_that_are_missing_are_named(
    kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm, "_kernels", "auto")
    monkeypatch.setattr(norm, "_triton", lambda: None)
    monkeypatch.setattr(norm, "_package", lambda: None)
    with pytest.raises(UserError, match=f"cannot use {kernels} here: (pip install|make iabn)"):
        norm.use(kernels)
    assert norm._kernels == "auto"
    norm.use("plain")
    assert norm._kernels == "plain"
    with pytest.raises(ValueError, match="'cuda' is not one of auto, triton, package, plain"):
        norm.use("cuda")  # type: ignore[arg-type]


# torch.compile -------------------------------------------------------------------------------


def compiled(layer: nn.Module) -> nn.Module:
    """Raises where the graph would break."""
    torch._dynamo.reset()
    return torch.compile(layer, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_graph_breaks(name: str, training: bool) -> None:
    layer = make(name, weight=[1.0, -0.5, 0.0, 2.0, -1.5]).train(training)
    traced = compiled(copy.deepcopy(layer))
    result = {key.removeprefix("_orig_mod."): value for key, value in run(traced, batch()).items()}
    assert_close(result, run(layer, batch()), 1e-10)


def test_a_network_compiles_without_graph_breaks() -> None:
    torch.manual_seed(0)
    net = make_model("resnet18", get_norm("iabn_sync"), [2, 1], pooling=4).double()
    other, images = copy.deepcopy(net), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for forward in (net, compiled(other)):
        forward(images).logits.square().sum().backward()
    for (key, mine), theirs in zip(net.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-8, atol=1e-10, msg=key)
    for (key, mine), theirs in zip(net.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=key)


# The benchmark -------------------------------------------------------------------------------


def test_the_plain_side_of_the_benchmark_computes_the_same() -> None:
    layers = InPlaceABN(CHANNELS), benchmark.Plain(CHANNELS)
    assert_close(*(run(layer, batch(torch.float32)) for layer in layers), 1e-4)


@pytest.mark.parametrize("options", ["", "--dtype bfloat16 --channels_last --kernels plain"])
def test_the_benchmark_runs(
    options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "norm.json"
    arguments = "--batch 1 --maps 3x4 2x3 --repeats 1 --calls 1 --json"
    monkeypatch.setattr(norm, "_kernels", "auto")
    monkeypatch.setattr(harness, "in_fresh_process", harness._measure)
    monkeypatch.setattr(sys, "argv", ["norm", *arguments.split(), str(file), *options.split()])
    benchmark.main()
    cases, table = json.loads(file.read_text())["cases"], capsys.readouterr().out
    assert [case["name"] for case in cases] == ["1 x 3 x 4 x 4", "1 x 2 x 3 x 3"]
    for case in cases:
        assert len(case["ours"]) == len(case["plain"]) == 1
        assert case["summary"]["time ratio"] > 0
        assert case["name"] in table


# Several processes ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two gloo processes computed on its share of each batch.

    Triton is there for its interpreter, which serves where they force it.
    """
    folder = tmp_path_factory.mktemp("norm")
    command = [sys.executable, "-m", "tests.modules.norm_worker"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), "2", str(folder / "rendezvous"), str(folder / f"{rank}.pt")],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"TRITON_INTERPRET": "1"},
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(("case", "how"), norm_worker.RUNS)
@pytest.mark.parametrize("name", ["abn_sync", "iabn_sync"])
def test_two_processes_equal_one(
    name: str, case: str, how: str, ranks: list[dict[str, Any]]
) -> None:
    if how in ("triton", "mixed"):
        pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)
    x, dy, _ = norm_worker.make_case(case)
    whole = norm_worker.run_layer(norm_worker.make_layer(name, case), x, dy)
    first, second = (results[f"{name} {case} {how}"] for results in ranks)
    joined = {key: torch.cat([first[key], second[key]]) for key in ("y", "dx")}
    joined |= {key: first[key] + second[key] for key in ("dw", "db")}
    joined |= {key: first[key] for key in ("running_mean", "running_var", "num_batches_tracked")}
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 0.02}[x.dtype]
    assert_close(joined, whole, tolerance)
    for key in ("running_mean", "running_var") if how != "mixed" else ():  # that rounds in two ways
        assert torch.equal(first[key], second[key])


@pytest.mark.parametrize("name", ["abn_sync", "iabn_sync"])
def test_inside_distributed_data_parallel(name: str, ranks: list[dict[str, Any]]) -> None:
    x, _, _ = norm_worker.make_case("uneven")
    whole = norm_worker.net_gradients(norm_worker.make_net(name), x)
    for results in ranks:  # the wrapper averages over ranks what one process sums
        for mine, expected in zip(results[f"{name} ddp"], whole, strict=True):
            torch.testing.assert_close(mine * 2, expected, rtol=1e-9, atol=1e-9)


def test_one_collective_each_way(ranks: list[dict[str, Any]]) -> None:
    expected = {"abn_sync": (2, 0), "iabn_sync": (2, 0), "iabn": (0, 0)}
    assert [results["collectives"] for results in ranks] == [expected, expected]


def test_triton_does_with_a_kernel_before_and_after_each_collective(
    ranks: list[dict[str, Any]],
) -> None:
    """Running statistics and the division by the count are part of the kernels."""
    pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)
    backward = ["gradient_sums", "add_up", "input_gradient"]
    for results in ranks:
        assert results["launches"] == {
            "iabn": {"forward": ["statistics", "combine", "normalise"], "backward": backward},
            "iabn_sync": {
                "forward": ["statistics", "combine", "combine", "normalise"],
                "backward": backward,
            },
        }


def test_what_traceable_says_is_what_torch_compile_does(ranks: list[dict[str, Any]]) -> None:
    broken, whole = (False, False), (True, True)
    expected = {n: {"train": broken, "eval": whole} for n in ("abn_sync", "iabn_sync")}
    expected["iabn"] = {"train": whole, "eval": whole}
    assert [results["traceable"] for results in ranks] == [expected, expected]
    assert norm.traceable(norm_worker.make_net("iabn_sync"))  # a single process
