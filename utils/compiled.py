"""torch.compile, and the plain function where the machine cannot compile."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

from utils.errors import UserError

log = logging.getLogger(__name__)

# Inductor recommends TF32 for products of float32, which are float32 here for a reason.
warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")


class CompiledOrPlain:
    """A function without side effects, compiled for every shape of its arguments.

    Compiling starts with the first call and needs what may be missing (a C compiler, Triton). Where
    it fails, a line in the log says so, and from then on the function runs as it is written.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.compiled: Callable[..., Any] | None = None
        self.failed = False

    def __call__(self, *arguments: Any) -> Any:
        if self.failed:
            return self.function(*arguments)
        try:
            if self.compiled is None:  # not earlier: torch.compile takes a second to import
                self.compiled = torch.compile(self.function, fullgraph=True, dynamic=False)
            return self.compiled(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # as many kinds as there are compilers involved
            log.warning("the loss is not compiled (%s): slower, same numbers", _first_line(error))
            self.failed = True
            return self.function(*arguments)


def check_compiler(device: torch.device) -> None:
    """Compile next to nothing; UserError where that fails."""
    try:
        torch.compile(torch.exp)(torch.ones(2, device=device))
    except RuntimeError as error:
        raise UserError(
            f"--compile does not work on this machine ({_first_line(error)}): drop it, or install "
            "what is missing (a C++ compiler, Triton)"
        ) from error


def reset_compiler() -> None:
    """Forget what was compiled: another step has other shapes, and torch allows eight in all."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
