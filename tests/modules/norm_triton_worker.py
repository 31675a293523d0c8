"""In-Place ABN through our Triton kernels, for `tests/modules/test_norm_triton.py`.

    TRITON_INTERPRET=1 python -m tests.modules.norm_triton_worker FILE

Computes every case on the CPU, in Triton's interpreter, and saves the results to FILE.
"""

import sys
from itertools import product
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from modules import norm
from modules.norm import InPlaceABN
from tests.modules.norm_worker import run_layer

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Shape, and the limits TILE, CHANNELS and ROWS of the kernels and the programs of a reduction.
SHAPES = {
    "as delivered": ((2, 65, 3, 5), (4096, 64, 512, 1024)),
    "one pixel": ((4, 3, 1, 1), (4096, 64, 512, 1024)),
    "many tiles": ((2, 2, 7, 5), (32, 2, 2, 6)),
    "a split per tile": ((2, 2, 5, 5), (16, 2, 4, 64)),
}


class Case(NamedTuple):
    size: str
    dtype: torch.dtype = torch.float32
    layout: str = "nchw"
    training: bool = True
    slope: float = 0.01
    gradient_layout: str = "nchw"
    mean: float = 1.0
    trained: str = "all"  # whose gradients are wanted: all, input, parameters


CASES = [
    *(
        Case(size, dtype, layout, gradient_layout=layout)
        for size, dtype, layout in product(["as delivered", "many tiles"], DTYPES, LAYOUTS)
    ),
    *(
        Case("one pixel", dtype, layout, training, slope, layout)
        for dtype, layout, training, slope in product(DTYPES, LAYOUTS, [True, False], [0.3, 1.0])
    ),
    *(
        Case("many tiles", torch.float32, layout, training, slope, layout)
        for layout, training, slope in product(LAYOUTS, [True, False], [0.3, 1.0])
    ),
    Case("a split per tile"),
    Case("a split per tile", layout="nhwc"),
    Case("many tiles", gradient_layout="nhwc"),
    Case("many tiles", layout="nhwc", gradient_layout="nchw"),
    Case("many tiles", mean=1e3),
    Case("many tiles", layout="nhwc", mean=1e3),
    Case("many tiles", trained="input"),
    Case("many tiles", trained="input", training=False),
    Case("many tiles", trained="parameters"),
]


def inputs(case: Case) -> tuple[Tensor, Tensor]:
    """x and the gradient of y, laid out as the case says."""
    generator = torch.Generator().manual_seed(1)
    x, dy = torch.randn(2, *SHAPES[case.size][0], generator=generator, dtype=torch.float64)
    x, dy = (x * 2 + case.mean).to(case.dtype), (dy + 0.5).to(case.dtype)
    return (
        x.contiguous(memory_format=LAYOUTS[case.layout]),
        dy.contiguous(memory_format=LAYOUTS[case.gradient_layout]),
    )


def make_layer(case: Case) -> InPlaceABN:
    """Weights of both signs and, except in float16 (|w| + eps is too small for it), a zero."""
    channels = SHAPES[case.size][0][1]
    torch.manual_seed(0)
    layer = InPlaceABN(channels, slope=case.slope).train(case.training)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.8, -1.5, 1.2]).repeat(channels)[:channels])
        layer.bias.normal_()
        if channels > 2 and case.dtype != torch.float16:
            layer.weight[2] = layer.bias[2] = 0
        layer.get_buffer("running_mean").normal_()
        layer.get_buffer("running_var").uniform_(0.5, 2)
    layer.requires_grad_(case.trained != "input")
    return layer


def compute(case: Case, device: str) -> dict[str, Tensor | None]:
    """Output, gradients and buffers, and checks of what else a layer promises.

    They are whether y and dx are laid out as x, and which buffers autograd saw written.
    """
    norm.use("triton")
    kernels = norm._triton()
    assert kernels is not None
    x, dy = (t.to(device) for t in inputs(case))
    assert norm._triton_for(x) is kernels, "plain operations would compute this case"
    *limits, programs = SHAPES[case.size][1]
    patches = dict(zip(("TILE", "CHANNELS", "ROWS"), limits, strict=True))
    with patch.multiple(kernels, **patches, _programs=lambda *_: programs):
        layer = make_layer(case).to(device)
        versions = [buffer._version for buffer in layer.buffers()]
        result = run_layer(layer, x, dy, case.trained != "parameters")
    norm.use("auto")
    kept = [t.stride() == x.stride() for t in (result["y"], result["dx"]) if t is not None]
    result["layout kept"] = torch.tensor(kept)
    written = [b._version > v for b, v in zip(layer.buffers(), versions, strict=True)]
    result["autograd knows"] = torch.tensor(written)
    return {key: t if t is None else t.cpu() for key, t in result.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save([compute(case, "cpu") for case in CASES], sys.argv[1])
