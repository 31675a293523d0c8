"""The Triton kernels of In-Place ABN: in Triton's interpreter, on CUDA, and compiled without it."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from modules import norm
from tests.modules import norm_triton_worker as worker
from tests.modules.norm_triton_worker import CASES, Case
from tests.modules.norm_worker import run_layer

triton = pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)
host = pytest.importorskip("modules.norm_triton")
kernels = pytest.importorskip("modules.norm_triton_kernels")
check = pytest.importorskip("modules.norm_check")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor | None]]:
    file = tmp_path_factory.mktemp("triton") / "results.pt"
    subprocess.run(
        [sys.executable, "-m", "tests.modules.norm_triton_worker", str(file)],
        env=os.environ | {"TRITON_INTERPRET": "1"},  # read when Triton is imported
        cwd=Path(__file__).parents[2],
        check=True,
        timeout=120,
    )
    return torch.load(file, weights_only=True)


@pytest.fixture(params=["interpreter", "cuda"])
def results(request: pytest.FixtureRequest) -> list[dict[str, Tensor | None]]:
    if request.param == "interpreter":
        return request.getfixturevalue("interpreted")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return [worker.compute(case, "cuda") for case in CASES]


def exact(case: Case) -> dict[str, Tensor]:
    """The formula in float64, differentiated by autograd."""
    layer, (x, dy) = worker.make_layer(case).double(), worker.inputs(case)
    leaf = x.double().requires_grad_()
    layer.requires_grad_()
    running = layer.get_buffer("running_mean"), layer.get_buffer("running_var")
    mean, var = running
    if case.training:
        mean, var = leaf.mean((0, 2, 3)), leaf.var((0, 2, 3), correction=0)
        batch = leaf.detach().mean((0, 2, 3)), leaf.detach().var((0, 2, 3))
        running = tuple(0.9 * old + 0.1 * new for old, new in zip(running, batch, strict=True))
    w, b, mean, var = (t.view(-1, 1, 1) for t in (layer.weight, layer.bias, mean, var))
    z = (leaf - mean) / (var + 1e-5).sqrt() * (torch.where(w < 0, -w, w) + 1e-5) + b
    y = torch.where(z > 0, z, z * case.slope)
    y.backward(dy.double())
    gradients = {"dx": leaf.grad, "dw": layer.weight.grad, "db": layer.bias.grad}
    return {"y": y.detach(), **gradients, "running_mean": running[0], "running_var": running[1]}


def deviation(case: Case, key: str, result: Tensor, expected: Tensor) -> float:
    """Relative to what is expected, or to what bounds a sum that may cancel (Cauchy-Schwarz)."""
    _, dy = worker.inputs(case)
    bound = dy.double().norm() * (dy.numel() / dy.shape[1]) ** 0.5
    scale = bound if key in ("dw", "db") else expected.double().norm()
    return float((result.double() - expected.double()).norm() / scale)


def name(case: Case) -> str:
    training = "train" if case.training else "eval"
    return " ".join(map(str, (*case[:3], training, *case[4:]))).replace("torch.", "")


@pytest.mark.parametrize("i", range(len(CASES)), ids=map(name, CASES))
def test_kernels_equal_the_formula_and_the_plain_path(
    i: int, results: list[dict[str, Tensor | None]]
) -> None:
    case, result = CASES[i], results[i]
    plain = run_layer(worker.make_layer(case), *worker.inputs(case), case.trained != "parameters")
    assert result.keys() - {"layout kept", "autograd knows"} == plain.keys()
    # A mean of 1e3 costs three of the seven digits of float32, but not in the statistics.
    accuracy = torch.finfo(case.dtype).eps * (1e3 if case.mean == 1e3 else 1)
    wanted = {"all": {"dx", "dw", "db"}, "input": {"dx"}, "parameters": {"dw", "db"}}
    for key, expected in exact(case).items():
        value, plain_value = result[key], plain[key]
        if key in {"dx", "dw", "db"} - wanted[case.trained]:
            assert value is plain_value is None
            continue
        assert value is not None
        assert value.dtype == plain_value.dtype
        bound = 1e-5 if key.startswith("running") else 4 * accuracy
        assert deviation(case, key, value, expected) < bound, key
        assert deviation(case, key, value, plain_value) < bound, key
    assert result["num_batches_tracked"] == plain["num_batches_tracked"] == int(case.training)
    assert result["layout kept"].all()
    assert result["autograd knows"].tolist() == [case.training] * 3


@pytest.mark.parametrize(
    ("x", "fits"),
    [
        (torch.ones(2, 3, 4, 5), True),
        (torch.ones(2, 3, 4, 5)[1:], True),
        (torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), True),
        (torch.ones(2, 3, 4, 5).transpose(2, 3), False),
        (torch.ones(2, 3, 4, 5)[:, 1:], False),
        (torch.ones(1).expand(2, 3, 4, 5), False),
        (torch.ones(2, 3, 4, 5).double(), False),
        (torch.ones(0, 3, 4, 5), False),
        (torch.ones(1, device="meta").expand(2**15, 3, 2**8, 2**8).contiguous(), False),
    ],
)
def test_maps_that_fit(x: Tensor, fits: bool) -> None:
    assert host.fits(x) == fits


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(norm, "_kernels", "auto")  # restores it afterwards
    norm.use("triton")
    check.works.cache_clear()
    yield kernels
    check.works.cache_clear()


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes CPU tensors"
)
def test_failing_kernels_leave_one_log_line_and_the_plain_path(
    forced: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    case = Case("many tiles")  # on a CPU, which Triton does not launch on
    expected = run_layer(worker.make_layer(case), *worker.inputs(case))
    with caplog.at_level(logging.WARNING, logger="modules.norm_check"):
        results = [run_layer(worker.make_layer(case), *worker.inputs(case)) for _ in range(2)]
    for key, value in expected.items():
        assert torch.equal(results[0][key], value)
    (record,) = caplog.records
    assert "our Triton kernels do not run on cpu in float32 (" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_old_devices_are_not_tried(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    check.works.cache_clear()
    assert not check.works(torch.device("cuda"), torch.float16)
    check.works.cache_clear()
    assert "compute capability 8.0" in caplog.text


@pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3),
    reason="triton.compile wants another description of the arguments before Triton 3.3",
)
@pytest.mark.parametrize("absent", [False, True])
def test_kernels_compile_for_cuda_without_a_device(absent: bool) -> None:
    """The interpreter forgives what the compiler does not, such as a variable of changing type."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    maps, sizes = ("x_ptr", "y_ptr", "dy_ptr", "dx_ptr"), {"BLOCK_C": 64, "BLOCK_P": 64}
    sizes |= {"BLOCK_R": 64, "pixel_stride": 1}
    if absent:  # what is not passed to every launch
        buffers = ("running_mean_ptr", "running_var_ptr", "batches_ptr")
        sizes |= dict.fromkeys((*buffers, "means_ptr", "count_ptr"))
    for kernel in (
        kernels.statistics, kernels.combine, kernels.normalise, kernels.gradient_sums,
        kernels.add_up, kernels.input_gradient,
    ):  # fmt: skip
        signature = {}
        for argument in kernel.arg_names:
            pointer = "*bf16" if argument in maps else "*fp32"
            pointer = "*i64" if argument == "batches_ptr" else pointer
            real = argument in ("eps", "slope", "momentum", "count")
            number = "fp32" if real else "i32"
            signature[argument] = pointer if argument.endswith("_ptr") else number
            if argument in sizes:
                signature[argument] = "constexpr"
        constants = {(kernel.arg_names.index(k),): v for k, v in sizes.items() if k in signature}
        source = ASTSource(kernel, signature, constants)
        assert "cubin" in triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm


@pytest.mark.parametrize(
    ("registers", "warps", "multiprocessors", "threads", "programs"),
    [
        (32, 4, 132, 2048, 16 * 132),  # registers and threads end together
        (33, 4, 1, 2048, 12),  # a warp gets 1280, not 1056
        (120, 4, 132, 2048, 4 * 132),
        (120, 8, 132, 2048, 2 * 132),
        (16, 4, 84, 1536, 12 * 84),  # threads
        (255, 16, 108, 2048, 108),  # not even one fits by the estimate
    ],
)
def test_as_many_programs_as_fit(
    registers: int, warps: int, multiprocessors: int, threads: int, programs: int
) -> None:
    assert host.resident_programs(registers, warps, multiprocessors, threads) == programs


class Kernel:
    """Has the registers that it is told, or none, as in the interpreter; counts compilations."""

    def __init__(self, registers: int | None) -> None:
        self.registers, self.compilations = registers, 0

    def warmup(self, *arguments: object, grid: tuple[int]) -> object:
        self.compilations += 1
        loaded = SimpleNamespace(metadata=SimpleNamespace(num_warps=4))
        if self.registers:  # known only once the program is loaded
            loaded._init_handles = lambda: setattr(loaded, "n_regs", self.registers)
        return loaded


def test_the_programs_of_a_reduction_come_from_its_registers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = SimpleNamespace(multi_processor_count=100, max_threads_per_multi_processor=2048)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    monkeypatch.setattr(host, "_known", {})

    def programs(kernel: Kernel, batch: int, side: int, cuda: bool = True) -> int:
        layout = host._Layout.of(torch.empty(batch, 64, side, side, device="meta"))
        x = SimpleNamespace(is_cuda=cuda, device="cuda:0" if cuda else "cpu", dtype=torch.float16)
        return host._programs(kernel, x, layout, ())

    kernel = Kernel(120)
    assert programs(kernel, 2, 8, cuda=False) == host.PROGRAMS
    assert kernel.compilations == 0
    assert [programs(kernel, batch, 8) for batch in (2, 2, 7)] == [400] * 3
    assert kernel.compilations == 1  # the batch size changes nothing, so the order of sums neither
    assert programs(kernel, 2, 16) == 400
    assert kernel.compilations == 2
    assert programs(Kernel(None), 2, 8) == host.PROGRAMS


@pytest.mark.parametrize(("programs", "splits"), [(1, 1), (7, 3), (2, 1), (10**6, 4)])
def test_programs_share_the_tiles_of_a_reduction(programs: int, splits: int) -> None:
    layout = host._Layout.of(torch.empty(2, 2, 65, 65))  # per channel and image two tiles
    assert layout.splits(programs) == (2, splits)


def test_compiles_no_more_for_another_batch(forced: ModuleType) -> None:
    """The kernels do not specialise on batch sizes, or the last batch of an evaluation would."""
    for kernel in (
        kernels.statistics, kernels.normalise, kernels.gradient_sums, kernels.input_gradient
    ):  # fmt: skip
        sizes = [p for p in kernel.params if p.name in ("images", "pixels")]  # B·H·W in one of them
        assert len(sizes) == 2
        assert all(p.do_not_specialize for p in sizes)


def test_layers_on_a_cpu_do_not_import_triton() -> None:
    program = (
        "import sys, torch\n"
        "from modules.norm import get_norm\n"
        "layer = get_norm('iabn')(3)\n"
        "layer(torch.randn(2, 3, 4, 4)).sum().backward()\n"
        "assert not {'triton', 'torch._dynamo', 'modules.norm_triton'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
