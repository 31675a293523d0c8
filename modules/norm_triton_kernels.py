"""What runs on the device for In-Place ABN; who launches it: `modules/norm_triton.py`.

All programs lie on one axis, which has room for 2^31, with the tiles over the channels next to each
other. Offsets of tiles are 64 bits wide, those within a tile 32. Batch sizes are not to be
specialised on, or the last batch of an evaluation would compile anew.

Statistics travel in rows (3, C): count, mean and biased variance of a part of the values.
"""

# What Triton reads, it reads from annotations: only constants have one in the kernels.
# mypy: allow-untyped-defs

import triton
import triton.language as tl


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
    """dz and x̂ from a tile of y and dy."""
    positive = y > 0
    z = tl.where(positive, y, y * (1 / slope))
    dz = tl.where(positive, dy, dy * slope)
    return dz, (z - bias[:, None]) * (1 / (tl.abs(weight) + eps))[:, None]


@triton.jit(do_not_specialize=["images", "pixels"])
def statistics(
    x_ptr, rows_ptr, channels, images, pixels, image_stride, channel_stride, pixel_stride,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A row of every splits-th tile: rows (splits, 3, C).

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
    row = rows_ptr + split * 3 * channels + c
    tl.store(row, count, c < channels)
    tl.store(row + channels, mean, c < channels)
    tl.store(row + 2 * channels, squares / count, c < channels)


@triton.jit(do_not_specialize=["rows"])
def combine(
    rows_ptr, out_ptr, running_mean_ptr, running_var_ptr, batches_ptr, momentum, channels, rows,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One row (3, C) from many (rows, 3, C); moves the running statistics, where there are any."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    count = tl.zeros([BLOCK_C], tl.float32)
    mean = tl.zeros([BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, rows, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        mask = (r < rows)[:, None] & inside[None, :]
        at = rows_ptr + (r * 3 * channels)[:, None] + c[None, :]
        counts = tl.load(at, mask, 0)
        means = tl.load(at + channels, mask, 0)
        variances = tl.load(at + 2 * channels, mask, 0)
        size = tl.maximum(tl.sum(counts, 0), 1)  # 1 beyond the last channel, where nothing is
        block_mean = tl.sum(counts * means, 0) / size
        deviation = means - block_mean[None, :]
        delta = block_mean - mean
        share = size / (count + size)
        mean += delta * share
        squares += tl.sum(counts * (variances + deviation * deviation), 0)
        squares += delta * delta * (count * share)
        count += size
    var = squares / count
    tl.store(out_ptr + c, count, inside)
    tl.store(out_ptr + channels + c, mean, inside)
    tl.store(out_ptr + 2 * channels + c, var, inside)
    if running_mean_ptr is not None:
        running_mean = _vector(running_mean_ptr, c, channels, 0)
        running_var = _vector(running_var_ptr, c, channels, 0)
        unbiased = squares / tl.maximum(count - 1, 1)
        running_mean += momentum * (mean - running_mean)
        running_var += momentum * (unbiased - running_var)
        tl.store(running_mean_ptr + c, running_mean, inside)
        tl.store(running_var_ptr + c, running_var, inside)
        if tl.program_id(0) == 0:
            tl.store(batches_ptr, tl.load(batches_ptr) + 1)


@triton.jit(do_not_specialize=["images", "pixels"])
def normalise(
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
def gradient_sums(
    y_ptr, dy_ptr, weight_ptr, bias_ptr, rows_ptr, eps, slope,
    channels, images, pixels, image_stride, channel_stride, pixel_stride,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Σ x̂ dz and Σ dz of every splits-th tile: rows (splits, 2, C)."""
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
    row = rows_ptr + split * 2 * channels + c
    tl.store(row, sum_x_hat_dz, c < channels)
    tl.store(row + channels, sum_dz, c < channels)


@triton.jit(do_not_specialize=["rows"])
def add_up(
    rows_ptr, sums_ptr, means_ptr, weight_ptr, count_ptr, count, channels, rows,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """From the rows (rows, 2, C) of `gradient_sums` the gradients (2, C) for weight and bias, with
    the sign of the weight, and the means (2, C) of x̂ dz and dz over all ranks' values.

    Their count is the number `count`, or lies in count_ptr (C,).
    """
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < 2 * channels
    sums = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, rows, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        mask = (r < rows)[:, None] & inside[None, :]
        at = rows_ptr + (r * 2 * channels)[:, None] + column[None, :]
        sums += tl.sum(tl.load(at, mask, 0), 0)
    weight = _vector(weight_ptr, column, channels, 1)  # 1 for Σ dz
    tl.store(sums_ptr + column, tl.where(weight < 0, -sums, sums), inside)
    if means_ptr is not None:
        if count_ptr is not None:
            count = tl.load(count_ptr + column % channels, inside, 1)
        tl.store(means_ptr + column, sums / count, inside)


@triton.jit(do_not_specialize=["images", "pixels"])
def input_gradient(
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
        mean_x_hat_dz = _vector(means_ptr, c, channels, 0)
        mean_dz = _vector(means_ptr + channels, c, channels, 0)
        d -= mean_dz[:, None] + x_hat * mean_x_hat_dz[:, None]
    gain = (tl.abs(weight) + eps) * tl.rsqrt(var + eps)
    tl.store(dx_ptr + offsets, d * gain[:, None], mask)
