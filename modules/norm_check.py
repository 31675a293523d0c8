"""Whether the Triton kernels run on a device and compute there what plain operations do."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from modules import norm_plain as plain
from modules import norm_triton as ours
from modules.norm_sync import Running

logger = logging.getLogger(__name__)

# Layout -> a small map whose tiles are as those of large ones; some are not full.
MAPS = {torch.contiguous_format: (2, 4, 64, 66), torch.channels_last: (2, 80, 9, 9)}
EPS, SLOPE = 1e-5, 0.01


@cache
def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels may serve maps of this type there, tried once in a process.

    Compares every kernel with plain operations, in both memory layouts. Where one does not run or
    differs, one log line says so, and plain operations (or inplace-abn) serve.
    """
    try:
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            raise RuntimeError("Triton wants compute capability 8.0")
        with torch.inference_mode(False), torch.no_grad():
            verb, reason = "differ from plain operations", _difference(device, dtype)
    except Exception as error:  # of Triton's compiler, the C compiler, the driver
        verb, reason = "do not run", (str(error) or type(error).__name__).splitlines()[0]
    if reason:
        logger.warning(
            "In-Place ABN: inplace-abn or plain operations serve, as our Triton kernels %s on %s "
            "in %s (%s)", verb, device, str(dtype).removeprefix("torch."), reason,
        )  # fmt: skip
    return not reason


def _difference(device: torch.device, dtype: torch.dtype) -> str:
    """Which kernels differ by more than rounding, and by how much; empty where none does."""
    for layout, shape in MAPS.items():
        generator = torch.Generator().manual_seed(0)
        x, noise = torch.randn(2, *shape, generator=generator) + 0.5
        maps = (m.to(device, dtype, memory_format=layout) for m in (x, (x + noise) / 2))
        for kernels, mine, expected in _pairs(*maps):
            tolerance = max(1e-5, 2 * torch.finfo(dtype).eps if mine.ndim == 4 else 0)
            error = float((mine.double() - expected.double()).norm() / expected.double().norm())
            if not error < tolerance:  # a NaN is not, either
                name = str(layout).removeprefix("torch.")
                return f"{kernels} of {name} maps: relative error {error:.1g}"
    return ""


def _pairs(x: Tensor, dy: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Kernels, what they computed and what is expected, each from plain results before them."""
    channels = x.shape[1]
    weight = torch.tensor([0.8, -1.5, 1.2], device=x.device).repeat(channels)[:channels]
    constants = (weight, torch.linspace(-1, 1, channels, device=x.device), EPS, SLOPE)

    known = plain.batch_statistics(x, moved := _running(x), False)
    for programs in (None, 1):  # a tile for each, and all tiles for one
        found = ours.combine(ours.statistics(x, programs), running := _running(x))
        yield from _each("statistics", found[:2] + running[:3], known[:2] + moved[:3])
    rows = torch.arange((ours.ROWS + 3) * 3 * channels, device=x.device) % 7 + 1.0
    rows = rows.view(-1, 3, channels)
    found = ours.combine(rows, running := _running(x))
    expected = plain.combine(rows, moved := _running(x))
    yield from _each("combine", found + running[:3], expected + moved[:3])
    unmoved = ours.one_row(rows, None)[1:]
    yield from _each("combine", unmoved, expected[:2])

    ours.abn_(over_x := x.clone(), known, *constants)
    plain.abn_(y := x.clone(), known, *constants)
    yield "normalise", over_x, y

    dx, d_weight, d_bias = plain.abn_gradients(y, dy, known.var, known.values, *constants, (True,))
    count = torch.full_like(weight, x.numel() // channels)
    means = torch.stack([d_weight * weight.sign(), d_bias]) / count
    for programs, given in ((None, known.values), (1, count)):
        pair = ours.gradient_sums(y, dy, given, *constants, programs)
        yield from _each("gradient_sums", pair, (torch.stack([d_weight, d_bias]), means))
    in_eval = plain.abn_gradients(y, dy, known.var, None, *constants, (True,))
    mine = [ours.input_gradient(y, dy, known.var, m, *constants) for m in (means, None)]
    yield from _each("input_gradient", mine, (dx, in_eval[0]))


def _each(kernels: str, mine: Iterable[Any], expected: Iterable[Any]) -> Iterator[Any]:
    yield from ((kernels, *pair) for pair in zip(mine, expected, strict=True))


def _running(x: Tensor) -> Running:
    """Fresh buffers."""
    mean, var = x.new_zeros((2, x.shape[1]), dtype=torch.float32)
    return Running(mean, var.fill_(1), torch.zeros((), dtype=torch.int64, device=x.device), 0.1)
