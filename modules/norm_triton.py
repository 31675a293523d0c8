"""The passes of In-Place ABN over feature maps, in Triton; when they serve: `modules/norm.py`.

    statistics      reads x           mean and biased variance
    normalise_      reads, writes x   y = leaky_relu(x̂ · (|w| + eps) + b) over x
    gradient_sums   reads y, dy       Σ x̂ dz and Σ dz, z and x̂ recovered from y
    input_gradient  reads y, dy,      dx
                    writes dx

Maps (B, C, H, W) are float32, float16 or bfloat16, contiguous or channels_last (`fits`); arithmetic
is float32. Everything else is a vector over channels of any float type. Nothing waits for the
device. Sources: Rota Bulò et al., CVPR 2018 (arXiv 1712.02616); for the combination of means and
variances Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
variances", 1979.
"""

# What Triton reads, it reads from annotations: only constants have one in the kernels.
# mypy: allow-untyped-defs

import logging
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

logger = logging.getLogger(__name__)

# Values a program handles at a time: with the 128 threads of Triton's default, four loads of 16
# bytes per thread and map in half types, eight in float32. Compiled for an H100 that takes 32 to
# 120 registers, so 4 to 16 programs share a multiprocessor and have 64 KiB or more on their way,
# about twice what hides the latency of its memory (4.8 TB/s · 700 ns / 132).
TILE = 4096
# Channels of a channels_last tile: 128 bytes in half types, a line of the cache.
CHANNELS = 64
# Programs of a reduction, about: eight for each of the 108 to 132 multiprocessors of an A100 or
# H100, so that they end nearly together.
PROGRAMS = 1024


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
    def of(cls, x: Tensor) -> "_Layout":
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

    def splits(self) -> tuple[int, int]:
        """Tiles over the channels, and programs that share the tiles of each in a reduction."""
        over_channels, tiles = self.tiles()
        return over_channels, min(tiles, triton.cdiv(PROGRAMS, over_channels))


def fits(x: Tensor) -> bool:
    """Whether the kernels take the map x. Positions in an image are counted in 32 bits."""
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    half_or_single = x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    return dense and half_or_single and 0 < pixels < 2**31 - TILE and x.shape[1] > 0


@cache
def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton compiles and runs the kernels there, tried once in a process on a tiny map.

    Where it does not, one log line says why.
    """
    try:
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            raise RuntimeError("Triton wants compute capability 8.0")
        y = torch.arange(16, device=device, dtype=dtype).view(2, 2, 2, 2)
        ones = torch.ones(2, device=device)
        mean, var = statistics(y)
        normalise_(y, mean, var, ones, ones, 1e-5, 0.01)
        sums = gradient_sums(y, y, ones, ones, 1e-5, 0.01)
        input_gradient(y, y, var, sums, ones, ones, 1e-5, 0.01)
    except Exception as error:  # of Triton's compiler, the C compiler, the driver
        reason = (str(error) or type(error).__name__).splitlines()[0]
        logger.warning(
            "In-Place ABN: inplace-abn or plain operations serve, as our Triton kernels do not run "
            "on %s in %s (%s)", device, str(dtype).removeprefix("torch."), reason,
        )  # fmt: skip
        return False
    return True


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of x (B, C, H, W), float32."""
    layout = _Layout.of(x)
    over_channels, splits = layout.splits()
    partials = torch.empty(splits, 3, layout.channels, device=x.device)
    mean, var = torch.empty(2, layout.channels, device=x.device)
    block_s, block_c = triton.next_power_of_2(PROGRAMS), 4  # all splits at once, no loop
    with torch.cuda.device_of(x):
        _statistics[(over_channels * splits,)](x, partials, *layout)
        grid = (triton.cdiv(layout.channels, block_c),)
        _combine[grid](partials, mean, var, layout.channels, splits, block_c, block_s)
    return mean, var


def normalise_(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float
) -> None:
    """y = leaky_relu((x - mean) / sqrt(var + eps) · (|weight| + eps) + bias) over x."""
    layout = _Layout.of(x)
    over_channels, tiles = layout.tiles()
    with torch.cuda.device_of(x):
        _normalise[(over_channels * tiles,)](x, mean, var, weight, bias, eps, slope, *layout)


def gradient_sums(
    y: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float
) -> Tensor:
    """The gradients (2, C) for weight and bias in float32, from y and its gradient (B, C, H, W).

    They are Σ x̂·dz, with the sign of the weight, and Σ dz. That of |w| at 0 is taken as 1.
    """
    layout = _Layout.of(y)
    over_channels, splits = layout.splits()
    partials = torch.empty(splits, 2, layout.channels, device=y.device)
    with torch.cuda.device_of(y):
        _gradient_sums[(over_channels * splits,)](
            y, _laid_out_as(y, dy), weight, bias, partials, eps, slope, *layout
        )
    return partials.sum(0)


def input_gradient(
    y: Tensor, dy: Tensor, var: Tensor, means: Tensor | None, weight: Tensor, bias: Tensor,
    eps: float, slope: float,
) -> Tensor:  # fmt: skip
    """dx (B, C, H, W), laid out as y.

    `means` (2, C) are the `gradient_sums` divided by the number of values per channel, None where y
    came from running statistics, which do not depend on x.
    """
    layout = _Layout.of(y)
    over_channels, tiles = layout.tiles()
    dx = torch.empty_like(y)
    with torch.cuda.device_of(y):
        _input_gradient[(over_channels * tiles,)](
            y, _laid_out_as(y, dy), dx, var, means, weight, bias, eps, slope, *layout
        )
    return dx


def _laid_out_as(y: Tensor, dy: Tensor) -> Tensor:
    """dy in the memory format of y; copied where it has another, which is rare."""
    last = y.is_contiguous(memory_format=torch.channels_last)
    return dy.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


# Kernels -------------------------------------------------------------------------------------
#
# All programs lie on one axis, which has room for 2^31, with the tiles over the channels next to
# each other. Offsets of tiles are 64 bits wide, those within a tile 32. Batch sizes are not to be
# specialised on, or the last batch of an evaluation would compile anew.


@triton.jit
def _tile(
    tile, c, channels, pixels, image_stride, channel_stride, pixel_stride, BLOCK_P: tl.constexpr
):
    """Offsets and mask (BLOCK_C, BLOCK_P) of a tile in the channels c, and how many pixels it has.

    The offset of its corner is added to the rest last, so that Triton sees what is contiguous.
    """
    per_image = tl.cdiv(pixels, BLOCK_P)
    first = tile % per_image * BLOCK_P
    p = tl.arange(0, BLOCK_P)
    corner = (tile // per_image).to(tl.int64) * image_stride + first.to(tl.int64) * pixel_stride
    within = c.to(tl.int64)[:, None] * channel_stride + (p * pixel_stride)[None, :]
    mask = (c < channels)[:, None] & (first + p < pixels)[None, :]
    return corner + within, mask, tl.minimum(pixels - first, BLOCK_P)


@triton.jit
def _channels(channels, BLOCK_C: tl.constexpr):
    """The channels (BLOCK_C,) of this program, and its number among those that have the same."""
    tiles = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    return program % tiles * BLOCK_C + tl.arange(0, BLOCK_C), program // tiles


@triton.jit
def _vector(ptr, c, channels, other: tl.constexpr):
    """The values (BLOCK_C,) of the channels c in float32, `other` beyond the last channel."""
    return tl.load(ptr + c, c < channels, other).to(tl.float32)


@triton.jit
def _undo(y, dy, weight, bias, eps, slope):
    """dz and x̂, this with the sign of the weight, from a tile of y and dy."""
    positive = y > 0
    z = tl.where(positive, y, y * (1 / slope))
    dz = tl.where(positive, dy, dy * slope)
    scale = tl.where(weight < 0, weight - eps, weight + eps)
    return dz, (z - bias[:, None]) * (1 / scale)[:, None]


@triton.jit(do_not_specialize=["images", "pixels"])
def _statistics(
    x_ptr, partials_ptr, channels, images, pixels, image_stride, channel_stride, pixel_stride,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Count, mean and sum of squared deviations of every splits-th tile: partials (splits, 3, C).

    Deviations are taken from the mean of the tile, which is at hand: no difference of large sums.
    """
    c, split = _channels(channels, BLOCK_C)
    splits = tl.num_programs(0) // tl.cdiv(channels, BLOCK_C)
    count = 0.0
    mean = tl.zeros([BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_C], tl.float32)
    for tile in range(split, images * tl.cdiv(pixels, BLOCK_P), splits):
        offsets, mask, size = _tile(
            tile, c, channels, pixels, image_stride, channel_stride, pixel_stride, BLOCK_P
        )
        x = tl.load(x_ptr + offsets, mask, 0).to(tl.float32)
        tile_mean = tl.sum(x, 1) / size
        deviation = tl.where(mask, x - tile_mean[:, None], 0)
        delta = tile_mean - mean
        share = size / (count + size)
        mean += delta * share
        squares += tl.sum(deviation * deviation, 1) + delta * delta * (count * share)
        count += size
    row = partials_ptr + split * 3 * channels + c
    tl.store(row, count, c < channels)
    tl.store(row + channels, mean, c < channels)
    tl.store(row + 2 * channels, squares, c < channels)


@triton.jit(do_not_specialize=["splits"])
def _combine(
    partials_ptr, mean_ptr, var_ptr, channels, splits,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance (C,) from the partials (splits, 3, C) of `_statistics`."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    s = tl.arange(0, BLOCK_S)
    mask = (s < splits)[:, None] & (c < channels)[None, :]
    rows = partials_ptr + (s * 3 * channels)[:, None] + c[None, :]
    count = tl.load(rows, mask, 0)
    means = tl.load(rows + channels, mask, 0)
    squares = tl.load(rows + 2 * channels, mask, 0)
    share = count / tl.sum(count, 0)[None, :]
    mean = tl.sum(share * means, 0)
    delta = means - mean[None, :]
    total = tl.sum(squares, 0) / tl.sum(count, 0)
    tl.store(mean_ptr + c, mean, c < channels)
    tl.store(var_ptr + c, total + tl.sum(share * delta * delta, 0), c < channels)


@triton.jit(do_not_specialize=["images", "pixels"])
def _normalise(
    x_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, slope,
    channels, images, pixels, image_stride, channel_stride, pixel_stride,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One tile of x becomes y."""
    c, tile = _channels(channels, BLOCK_C)
    offsets, mask, _ = _tile(
        tile, c, channels, pixels, image_stride, channel_stride, pixel_stride, BLOCK_P
    )
    mean = _vector(mean_ptr, c, channels, 0)
    var = _vector(var_ptr, c, channels, 1)
    weight = _vector(weight_ptr, c, channels, 0)
    bias = _vector(bias_ptr, c, channels, 0)
    gain = (tl.abs(weight) + eps) * tl.rsqrt(var + eps)
    x = tl.load(x_ptr + offsets, mask, 0).to(tl.float32)
    z = (x - mean[:, None]) * gain[:, None] + bias[:, None]
    tl.store(x_ptr + offsets, tl.where(z > 0, z, z * slope), mask)


@triton.jit(do_not_specialize=["images", "pixels"])
def _gradient_sums(
    y_ptr, dy_ptr, weight_ptr, bias_ptr, partials_ptr, eps, slope,
    channels, images, pixels, image_stride, channel_stride, pixel_stride,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Σ x̂ dz, with the sign of the weight, and Σ dz of every splits-th tile: (splits, 2, C)."""
    c, split = _channels(channels, BLOCK_C)
    splits = tl.num_programs(0) // tl.cdiv(channels, BLOCK_C)
    weight = _vector(weight_ptr, c, channels, 1)
    bias = _vector(bias_ptr, c, channels, 0)
    sum_x_hat_dz = tl.zeros([BLOCK_C], tl.float32)
    sum_dz = tl.zeros([BLOCK_C], tl.float32)
    for tile in range(split, images * tl.cdiv(pixels, BLOCK_P), splits):
        offsets, mask, _ = _tile(
            tile, c, channels, pixels, image_stride, channel_stride, pixel_stride, BLOCK_P
        )
        y = tl.load(y_ptr + offsets, mask, 0).to(tl.float32)
        dy = tl.load(dy_ptr + offsets, mask, 0).to(tl.float32)
        dz, x_hat = _undo(y, dy, weight, bias, eps, slope)
        sum_x_hat_dz += tl.sum(x_hat * dz, 1)
        sum_dz += tl.sum(dz, 1)
    row = partials_ptr + split * 2 * channels + c
    tl.store(row, sum_x_hat_dz, c < channels)
    tl.store(row + channels, sum_dz, c < channels)


@triton.jit(do_not_specialize=["images", "pixels"])
def _input_gradient(
    y_ptr, dy_ptr, dx_ptr, var_ptr, means_ptr, weight_ptr, bias_ptr, eps, slope,
    channels, images, pixels, image_stride, channel_stride, pixel_stride,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One tile of dx = (|w| + eps) / sqrt(var + eps) · (dz - mean of dz - x̂ · mean of x̂ dz)."""
    c, tile = _channels(channels, BLOCK_C)
    offsets, mask, _ = _tile(
        tile, c, channels, pixels, image_stride, channel_stride, pixel_stride, BLOCK_P
    )
    var = _vector(var_ptr, c, channels, 1)
    weight = _vector(weight_ptr, c, channels, 1)
    bias = _vector(bias_ptr, c, channels, 0)
    y = tl.load(y_ptr + offsets, mask, 0).to(tl.float32)
    dy = tl.load(dy_ptr + offsets, mask, 0).to(tl.float32)
    d, x_hat = _undo(y, dy, weight, bias, eps, slope)
    if means_ptr is not None:
        # The sign of the weight in x̂ and in the mean of x̂ dz cancels.
        mean_x_hat_dz = _vector(means_ptr, c, channels, 0)
        mean_dz = _vector(means_ptr + channels, c, channels, 0)
        d -= mean_dz[:, None] + x_hat * mean_x_hat_dz[:, None]
    gain = (tl.abs(weight) + eps) * tl.rsqrt(var + eps)
    tl.store(dx_ptr + offsets, d * gain[:, None], mask)
