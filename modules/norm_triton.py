"""In-Place ABN in Triton, and the statistics of batch norm; when they serve: `modules/norm.py`.

    batch_statistics  reads x           mean and biased variance; moves the running statistics
    abn_              reads, writes x   y = leaky_relu(x̂ · (|w| + eps) + b) over x
    abn_gradients     reads y, dy       Σ x̂ dz and Σ dz, z and x̂ recovered from y
                      reads y, dy,      dx
                      writes dx

Maps (B, C, H, W) are float32, float16 or bfloat16, contiguous or channels_last (`fits`); arithmetic
is float32. Everything else is a vector over channels of any float type. Nothing waits for the
device. Sources: Rota Bulò et al., CVPR 2018 (arXiv 1712.02616); for the combination of means and
variances Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
variances", 1979.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from modules import norm_triton_kernels as kernels
from modules.norm_sync import Count, Running, Statistics, gather_rows, sum_over_ranks_

# Values a program handles at a time: with the 128 threads of Triton's default, four loads of 16
# bytes per thread and map in half types, eight in float32. Compiled for an H100 that takes 32 to
# 120 registers, so 4 to 16 programs share a multiprocessor and have 64 KiB or more on their way,
# about twice what hides the latency of its memory (4.8 TB/s · 700 ns / 132).
TILE = 4096
# Channels of a channels_last tile: 128 bytes in half types, a line of the cache.
CHANNELS = 64
# Programs of a reduction where its registers are not known: eight for each of the 108 to 132
# multiprocessors of an A100 or H100, about.
PROGRAMS = 1024
# Rows that the second stage of a reduction takes at a time, and the columns of each.
ROWS, COLUMNS = 512, 4


class _Layout(NamedTuple):
    """How the kernels walk a map: images × channels × pixels, in tiles BLOCK_C × BLOCK_P.

    What lies channels_last is one long image of B·H·W pixels.
    """

    channels: int
    images: int
    pixels: int
    image_stride: int
    channel_stride: int
    pixel_stride: int
    block_c: int
    block_p: int

    @classmethod
    def of(cls, x: Tensor) -> _Layout:
        b, c, h, w = x.shape
        if x.is_contiguous(memory_format=torch.channels_last):
            block_c = min(CHANNELS, triton.next_power_of_2(c))
            return cls(c, 1, b * h * w, 0, 1, c, block_c, TILE // block_c)
        block_p = min(TILE, triton.next_power_of_2(h * w))
        block_c = min(TILE // block_p, triton.next_power_of_2(c))
        return cls(c, b, h * w, c * h * w, h * w, 1, block_c, block_p)

    def tiles(self) -> tuple[int, int]:
        """Tiles side by side over the channels, and per channel over images and pixels."""
        per_image = triton.cdiv(self.pixels, self.block_p)
        return triton.cdiv(self.channels, self.block_c), self.images * per_image

    def splits(self, programs: int) -> tuple[int, int]:
        """Tiles over the channels, and programs that share the tiles of each in a reduction."""
        over_channels, tiles = self.tiles()
        return over_channels, min(tiles, max(1, programs // over_channels))


def resident_programs(registers: int, warps: int, multiprocessors: int, threads: int) -> int:
    """How many programs of a kernel are on the device at once, at least one per multiprocessor.

    A reduction has as many: they start together, have equal shares and so end nearly together.
    Since compute capability 8.0 a multiprocessor has 65,536 registers and gives a warp of 32
    threads multiples of 256.

    Args:
        registers: of a thread.
        warps: of a program.
        multiprocessors: of the device.
        threads: that a multiprocessor holds at most.
    """
    per_warp = max(1, triton.cdiv(32 * registers, 256)) * 256
    at_once = min(65536 // (per_warp * warps), threads // (32 * warps))
    return multiprocessors * max(1, at_once)


_known: dict[tuple[Any, ...], int] = {}


def _programs(kernel: Any, x: Tensor, layout: _Layout, arguments: Sequence[Any]) -> int:
    """Programs of a reduction over x, the same for any batch size; compiles it at the first use.

    They decide in which order numbers are added, so they must not change from one call to another.
    """
    if not x.is_cuda:
        return PROGRAMS
    key = (kernel, x.device, x.dtype, layout._replace(images=0, pixels=0))
    if key not in _known:
        device = torch.cuda.get_device_properties(x.device)
        try:
            compiled = kernel.warmup(*arguments, *layout, grid=(1,))
            compiled._init_handles()  # loads it; before, the registers are not known
            _known[key] = resident_programs(
                compiled.n_regs, compiled.metadata.num_warps,
                device.multi_processor_count, device.max_threads_per_multi_processor,
            )  # fmt: skip
        except AttributeError:  # Triton's interpreter, or a version that calls these otherwise
            _known[key] = PROGRAMS
    return _known[key]


def fits(x: Tensor) -> bool:
    """Whether the kernels take the map x. Positions in an image are counted in 32 bits."""
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    half_or_single = x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    return dense and half_or_single and 0 < pixels < 2**31 - TILE and x.shape[1] > 0


def batch_statistics(x: Tensor, running: Running, over_ranks: bool) -> Statistics:
    """Statistics of x (B, C, H, W), or of all ranks' x, in float32; moves the running ones.

    Across ranks one collective.
    """
    rows = statistics(x)
    if over_ranks:
        return combine(gather_rows(one_row(rows, None)), running)
    count = x.numel() // x.shape[1]
    return combine(rows, running)._replace(values=count)


def statistics(x: Tensor, programs: int | None = None) -> Tensor:
    """Rows (n, 3, C) of count, mean and biased variance of n parts of x, float32.

    `programs` share the work, by default as many as the device holds at once.
    """
    layout = _Layout.of(x)
    with torch.cuda.device_of(x):
        spare = torch.empty(0, device=x.device)
        programs = programs or _programs(kernels.statistics, x, layout, (x, spare))
        over_channels, splits = layout.splits(programs)
        rows = torch.empty(splits, 3, layout.channels, device=x.device)
        kernels.statistics[(over_channels * splits,)](x, rows, *layout)
    return rows


def combine(rows: Tensor, running: Running) -> Statistics:
    """Statistics of all rows (n, 3, C) together, count (C,); moves the running ones."""
    count, mean, var = one_row(rows, running)
    return Statistics(mean, var, count)


def one_row(rows: Tensor, running: Running | None) -> Tensor:
    """Count, mean and biased variance (3, C) of all rows (n, 3, C) together; moves `running`."""
    n, _, channels = rows.shape
    out = rows.new_empty(3, channels)
    state = running or (None, None, None, 0.0)
    with torch.cuda.device_of(rows):
        grid = (triton.cdiv(channels, COLUMNS),)
        kernels.combine[grid](rows, out, *state, channels, n, COLUMNS, ROWS)
    if running:  # autograd has to hear of what Triton writes
        for buffer in running[:3]:
            torch.autograd.graph.increment_version(buffer)
    return out


def abn_(
    x: Tensor, statistics: Statistics, weight: Tensor, bias: Tensor, eps: float, slope: float
) -> None:
    """y = leaky_relu((x - mean) / sqrt(var + eps) · (|weight| + eps) + bias) over x."""
    layout = _Layout.of(x)
    over_channels, tiles = layout.tiles()
    mean, var, _ = statistics
    with torch.cuda.device_of(x):
        grid = (over_channels * tiles,)
        kernels.normalise[grid](x, mean, var, weight, bias, eps, slope, *layout)


def abn_gradients(
    y: Tensor, dy: Tensor, var: Tensor, count: Count, weight: Tensor, bias: Tensor,
    eps: float, slope: float, wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of `abn_` for x, weight and bias; `wanted` says which. Across ranks one collective.

    Those of weight and bias are of this rank's values alone.
    """
    dx = means = d_weight = d_bias = None
    if any(wanted[1:]) or count is not None:
        (d_weight, d_bias), means = gradient_sums(y, dy, count, weight, bias, eps, slope)
    if wanted[0]:
        if isinstance(count, Tensor):
            assert means is not None
            sum_over_ranks_(means)
        dx = input_gradient(y, dy, var, means, weight, bias, eps, slope)
    return dx, d_weight, d_bias


def gradient_sums(
    y: Tensor, dy: Tensor, count: Count, weight: Tensor, bias: Tensor, eps: float, slope: float,
    programs: int | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The gradients (2, C) for weight and bias, from y and its gradient (B, C, H, W); float32.

    They are ± Σ x̂·dz, with the sign of the weight, and Σ dz. That of |w| at 0 is taken as 1. The
    second result (2, C) is Σ x̂·dz and Σ dz of y divided by the count, which is that of all ranks;
    None where the count is. `programs` share the work, by default as many as the device holds.
    """
    layout = _Layout.of(y)
    arguments = (y, _laid_out_as(y, dy), weight, bias)
    with torch.cuda.device_of(y):
        spare = (torch.empty(0, device=y.device), eps, slope)
        programs = programs or _programs(kernels.gradient_sums, y, layout, (*arguments, *spare))
        over_channels, splits = layout.splits(programs)
        rows = torch.empty(splits, 2, layout.channels, device=y.device)
        kernels.gradient_sums[(over_channels * splits,)](*arguments, rows, eps, slope, *layout)
        sums, means = torch.empty(2, 2, layout.channels, device=y.device)
        counts, number = (count, 0.0) if isinstance(count, Tensor) else (None, float(count or 0))
        kernels.add_up[(triton.cdiv(2 * layout.channels, COLUMNS),)](
            rows, sums, None if count is None else means, weight, counts, number,
            layout.channels, splits, COLUMNS, ROWS,
        )  # fmt: skip
    return sums, None if count is None else means


def input_gradient(
    y: Tensor, dy: Tensor, var: Tensor, means: Tensor | None, weight: Tensor, bias: Tensor,
    eps: float, slope: float,
) -> Tensor:  # fmt: skip
    """dx (B, C, H, W), laid out as y.

    `means` (2, C) of x̂·dz and dz are those over all ranks, None where y came from running
    statistics, which do not depend on x.
    """
    layout = _Layout.of(y)
    over_channels, tiles = layout.tiles()
    dx = torch.empty_like(y)
    with torch.cuda.device_of(y):
        kernels.input_gradient[(over_channels * tiles,)](
            y, _laid_out_as(y, dy), dx, var, means, weight, bias, eps, slope, *layout
        )
    return dx


def _laid_out_as(y: Tensor, dy: Tensor) -> Tensor:
    """dy in the memory format of y; copied where it has another, which is rare."""
    last = y.is_contiguous(memory_format=torch.channels_last)
    return dy.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
