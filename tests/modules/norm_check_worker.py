"""Triton kernels that are broken on purpose, for `tests/modules/test_norm_check.py`.

TRITON_INTERPRET=1 python -m tests.modules.norm_check_worker FILE
"""

import logging
import sys
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from modules import norm
from modules import norm_triton_kernels as kernels
from modules.norm_check import works
from tests.modules.norm_triton_worker import Case, inputs, make_layer
from tests.modules.norm_worker import run_layer

SMALL = {torch.contiguous_format: (2, 4, 9, 9), torch.channels_last: (2, 4, 9, 9)}


class Fault(NamedTuple):
    """The argument of a kernel at `place` is another than it should be."""

    kernel: str
    place: int
    change: Callable[[Any], Any]
    only: Callable[[tuple[Any, ...]], bool] = lambda arguments: True


FAULTS = {
    "none": Fault("combine", 5, lambda momentum: momentum),
    "a pixel less": Fault("statistics", 4, lambda pixels: pixels - 1),
    "a program for all tiles": Fault(
        "statistics", 4, lambda pixels: pixels - 1, lambda a: a[1].shape[0] == 1
    ),
    "momentum": Fault("combine", 5, lambda momentum: momentum * 1.01),
    "a row less": Fault("combine", 7, lambda rows: rows - 1),
    "slope": Fault("normalise", 6, lambda slope: slope * 3),
    "slope of z": Fault("gradient_sums", 6, lambda slope: slope * 3),
    "a sum less": Fault("add_up", 7, lambda rows: rows - 1),
    "eps": Fault("input_gradient", 7, lambda eps: eps + 1),
    "channels_last": Fault("normalise", 6, lambda slope: slope * 3, lambda a: a[11] == 1),
    "bfloat16": Fault("normalise", 6, lambda slope: slope * 3, lambda a: a[0].dtype == DTYPE),
}
DTYPE = torch.bfloat16


class Broken:
    """Launches the kernel of a fault with the wrong argument."""

    def __init__(self, fault: Fault) -> None:
        self.fault, self.kernel = fault, getattr(kernels, fault.kernel)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            wrong = list(arguments)
            if self.fault.only(arguments):
                wrong[self.fault.place] = self.fault.change(wrong[self.fault.place])
            self.kernel[grid](*wrong)

        return launch


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def fall_back(fault: Fault, dtype: torch.dtype) -> dict[str, Any]:
    """Log lines of two layers' passes with a broken kernel, and whether plain operations served."""
    case = Case("many tiles", dtype)
    norm.use("plain")
    plain = run_layer(make_layer(case), *inputs(case))
    works.cache_clear()
    norm.use("triton")
    logging.getLogger("modules.norm_check").addHandler(handler := Lines())
    with (
        patch.object(kernels, fault.kernel, Broken(fault)),
        patch("modules.norm_check.MAPS", SMALL),
    ):
        results = [run_layer(make_layer(case), *inputs(case)) for _ in range(2)]
        served = norm._triton_for(inputs(case)[0]) is None
    logging.getLogger("modules.norm_check").removeHandler(handler)
    equal = all(torch.equal(result[key], plain[key]) for result in results for key in plain)
    return {"lines": handler.lines, "plain": served, "equal": equal}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {name: fall_back(fault, torch.float32) for name, fault in FAULTS.items()}
    found["bfloat16 in bfloat16"] = fall_back(FAULTS["bfloat16"], DTYPE)
    state = torch.get_rng_state()
    works.cache_clear()
    works(torch.device("cpu"), torch.float16)
    found["draws nothing"] = torch.equal(state, torch.get_rng_state())
    torch.save(found, sys.argv[1])
