"""Objective and prediction at image size without full-size logits.

The network gives logits at body resolution (B C h w); losses and predictions are defined on their
bilinear upsampling to image size. Both look at one pixel at a time, so the upsampling is done for a
piece at a time, a band of rows of one image, and a B C H W tensor never exists:

    piece (rows C W)  =  vertical (rows span)  @  source (span C w)  @  horizontal (w W)

where `source` are the few rows of the small map that the band lies between. The gradient of a piece
with respect to its source is autograd's own, through these two products and the plain terms of
`methods/loss.py`; what is added here is the sum over pieces.

Memory is a few pieces, whatever the batch, and nothing waits for the device. The products must be
true float32, which is torch's default: TF32 would round the interpolation to three digits.

Values and gradient of a piece are one function, `_sums`, which CUDA gets compiled: its operations
are short, and what limits them is the memory they pass their results through.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from methods.loss import WeightedTerm
from utils.compiled import CompiledOrPlain
from utils.constants import IGNORE_INDEX
from utils.precision import at_least_float32

Result = TypeVar("Result")

# Logits in a piece: on a CPU few enough for its cache, elsewhere enough to outweigh the launches:
# a DEVICE_SHARE-th of all, if that is more than DEVICE_PIECE. Maps take some 5 x 4 bytes for each
# logit of a piece at once, full-size logits take them for each logit of the batch.
CPU_PIECE, DEVICE_PIECE, DEVICE_SHARE = 2**20, 2**24, 16
# A size is compiled for an evaluation, which may see images of any, when it comes for the OFTEN-th
# time, and for no more than MOST_SIZES of them.
OFTEN, MOST_SIZES = 3, 3

Operands: TypeAlias = tuple[Tensor, Tensor, Tensor]  # source (span C w), vertical, horizontal


def pixel_losses(
    terms: Mapping[str, WeightedTerm],
    logits: Tensor,
    old_logits: Tensor | None,
    labels: Tensor,
    piece_size: int | None = None,
    compiled: bool | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The pixel terms of an objective on logits upsampled to the size of the labels.

    `logits` B C h w and the teacher's `old_logits` B C_old h w (None without a teacher) may be of
    any float type; half types are computed in float32. `labels` B H W are uint8 or int64.
    `piece_size` is the number of logits in a piece, by default one that suits the device.
    `compiled` says whether pieces with a gradient go through torch.compile, by default on CUDA.
    `weights` B, any float type, multiply the first term, each in all pixels of its image.

    Returns the sum over terms of weight * mean over all B H W pixels, differentiable once and with
    respect to `logits` alone, and the summands by name, detached. The gradient is computed here
    beside the values, unless grad is off; `backward` only scales it. Raises ValueError where the
    batches differ.
    """
    if any(len(x) != len(logits) for x in (old_logits, labels, weights) if x is not None):
        raise ValueError("student, teacher, labels and weights are batches of different length")
    with torch.autocast(logits.device.type, enabled=False):
        values, gradient = _evaluate(
            tuple(terms.values()), logits, old_logits, labels, piece_size,
            logits.is_cuda if compiled is None else compiled, weights,
        )  # fmt: skip
        total = values.sum()
    if gradient is not None:
        total = _WithGradient.apply(logits, total, gradient)
    return total, dict(zip(terms, values, strict=True))


@torch.no_grad()
def predict(logits: Tensor, size: tuple[int, int], piece_size: int | None = None) -> Tensor:
    """The class of every pixel: argmax of the logits B C h w upsampled to `size` = (H, W).

    Returns B H W on the device of the logits: uint8, or int64 where a class index would not fit
    below IGNORE_INDEX. Of equal logits the lowest index wins.
    """
    dtype = torch.uint8 if logits.shape[1] <= IGNORE_INDEX else torch.int64
    labels = torch.empty((len(logits), *size), dtype=dtype, device=logits.device)
    with torch.autocast(logits.device.type, enabled=False):
        upsampled = Upsampled(logits, size)

        @torch.no_grad()  # the mode is a thread's own
        def classes(piece: Piece) -> Tensor:
            return interpolate(*upsampled.operands(piece)).argmax(1)[:, 0]

        for piece, result in upsampled.each_piece(classes, piece_size):
            labels[piece.image, piece.rows] = result
    return labels


class Piece(NamedTuple):
    """A band of rows of one upsampled image, and the rows of the small map that it needs."""

    image: int
    rows: slice
    span: slice


class Upsampled:
    """Maps B C h w as seen at H x W, a piece at a time, in at least float32."""

    def __init__(self, maps: Tensor, size: tuple[int, int]) -> None:
        # B h C w, so that the source rows of a band lie together.
        self.maps = at_least_float32(maps.detach()).permute(0, 2, 1, 3).contiguous()
        self.size = size
        width = self.maps.shape[3]
        self.horizontal = _interpolation(width, size[1], self.maps.dtype, self.maps.device).T

    def operands(self, piece: Piece) -> Operands:
        """What `interpolate` makes a piece from."""
        height = self.maps.shape[1]
        rows, span = range(self.size[0])[piece.rows], range(height)[piece.span]
        part = (rows.start, rows.stop, span.start, span.stop)
        vertical = _band_of(height, self.size[0], self.maps.dtype, self.maps.device, *part)
        return self.maps[piece.image, piece.span], vertical, self.horizontal

    def of_rows(self, image: int, rows: slice) -> Operands:
        """The operands of some rows of an image, with no more source rows than they lie between."""
        height = self.maps.shape[1]
        scale = height / self.size[0]
        low, high = (int((row + 0.5) * scale - 0.5) for row in (rows.start, rows.stop - 1))
        return self.operands(Piece(image, rows, slice(max(0, low), min(high + 2, height))))

    def each_piece(
        self, work: Callable[[Piece], Result], piece_size: int | None, threads: bool = True
    ) -> Iterator[tuple[Piece, Result]]:
        """All pieces, of about `piece_size` values, in order, each with work(piece).

        On a CPU every core takes whole pieces: threads inside the many short operations of a piece
        would mostly wait for each other, unless they are fused (then `threads` is False). The
        results do not depend on the number of threads.
        """
        on_cpu = self.maps.device.type == "cpu"
        images, height, channels, _ = self.maps.shape
        row = channels * self.size[1]
        share = images * self.size[0] * row // DEVICE_SHARE
        usual = CPU_PIECE if on_cpu else max(DEVICE_PIECE, share)
        bands = _bands(height, self.size[0], max(1, (piece_size or usual) // row))
        pieces = [Piece(image, *band) for image in range(images) for band in bands]
        cores = torch.get_num_threads()
        if not (threads and on_cpu) or cores == 1:
            yield from ((piece, work(piece)) for piece in pieces)
            return
        torch.set_num_threads(1)  # also for threads yet to start
        try:
            with ThreadPoolExecutor(cores) as pool:
                yield from zip(pieces, pool.map(work, pieces), strict=True)
        finally:
            torch.set_num_threads(cores)


def interpolate(source: Tensor, vertical: Tensor, horizontal: Tensor) -> Tensor:
    """A piece from its operands: rows C 1 W, each row of pixels an image of its own."""
    rows = vertical @ (source @ horizontal).flatten(1)
    return rows.view(len(rows), -1, 1, horizontal.shape[1])


def _evaluate(
    terms: tuple[WeightedTerm, ...],
    logits: Tensor,
    old_logits: Tensor | None,
    labels: Tensor,
    piece_size: int | None,
    compiled: bool,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Weight * mean of each term and, where grad is on, the gradient of their sum, B C h w."""
    size = (labels.shape[1], labels.shape[2])
    student = Upsampled(logits, size)
    teacher = None if old_logits is None else Upsampled(old_logits, size)
    with_gradient = logits.requires_grad and torch.is_grad_enabled()
    function = _compiled_sums if with_gradient else _compiled_values
    if compiled and not with_gradient:
        compiled = _sizes.recurs(terms, (logits.shape[1:], labels.shape))
    compiled = compiled and not function.failed
    sums = function if compiled else _sums
    if weights is not None:  # 16 bytes apart: compiled code copies what is not aligned
        weights = weights.detach().to(student.maps.dtype)[:, None].repeat(1, 4)

    def work(piece: Piece) -> tuple[Tensor, Tensor | None]:
        old = teacher.operands(piece) if teacher else None
        y = labels[piece.image, piece.rows, None]
        # A tensor, not a number: a compiled piece is traced once for each number.
        weight = None if weights is None else weights[piece.image, 0]
        return sums(terms, student.operands(piece), old, y, with_gradient, weight)

    total = torch.zeros(len(terms), dtype=torch.float64, device=logits.device)
    total_gradient = torch.zeros_like(student.maps)
    for piece, (values, gradient) in student.each_piece(work, piece_size, not compiled):
        total += values
        if gradient is not None:
            total_gradient[piece.image, piece.span] += gradient
    # Divided last: the share of a single pixel, 1 / (B H W) of this, could be a denormal number.
    means = (total / labels.numel()).to(student.maps.dtype)
    if not with_gradient:
        return means, None
    return means, total_gradient.div_(labels.numel()).permute(0, 2, 1, 3)


def _sums(
    terms: tuple[WeightedTerm, ...],
    student: Operands,
    teacher: Operands | None,
    labels: Tensor,
    with_gradient: bool,
    image_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Over the pixels of a piece, labels rows 1 W: the sum of each term, weighted, in float64, and
    `with_gradient` that of their total with respect to the student's source (span C w). The first
    term is multiplied by `image_weight`, a scalar.
    """
    source, *matrices = student
    labels = labels.long()
    with torch.no_grad():
        x_old = interpolate(*teacher) if teacher else None

    def sums(source: Tensor) -> tuple[Tensor, Tensor]:
        x = interpolate(source, *matrices)
        losses = [weight * term(x, x_old, labels) for term, weight in terms]
        if image_weight is not None:
            losses[0] = image_weight * losses[0]
        values = torch.stack([loss.sum(dtype=torch.float64) for loss in losses])
        return values.sum(), values.detach()

    with torch.set_grad_enabled(with_gradient):
        if not with_gradient:
            return sums(source)[1], None
        if torch.compiler.is_compiling():  # which traces torch.func only
            gradient, values = torch.func.grad(sums, has_aux=True)(source)
            return values, gradient
        total, values = sums(source.requires_grad_())
        return values, torch.autograd.grad(total, source)[0]


# A shape is compiled once, at its first piece. An evaluation may meet more shapes than can be
# compiled, which must not end the compiled path of training.
_compiled_sums, _compiled_values = CompiledOrPlain(_sums), CompiledOrPlain(_sums)


class _Sizes:
    """The sizes that evaluations met."""

    def __init__(self) -> None:
        self.terms: object = None
        self.met: Counter[object] = Counter()

    def recurs(self, terms: tuple[WeightedTerm, ...], size: object) -> bool:
        """Take note of a batch; says whether its size came often enough to be compiled."""
        if terms != self.terms:  # another step
            self.terms, self.met = terms, Counter()
        self.met[size] += 1
        return size in [known for known, times in self.met.items() if times >= OFTEN][:MOST_SIZES]


_sizes = _Sizes()


class _WithGradient(torch.autograd.Function):
    """`total`, tied to `logits` by a gradient that is known already."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, total: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        # Scaled before it is rounded to a half type: that is what a loss scaler is for.
        return (gradient * grad_output).to(ctx.dtype), None, None


@lru_cache(maxsize=64)
def _interpolation(size_in: int, size_out: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Linear interpolation (align_corners=False) along one axis as a matrix, size_out size_in."""
    with torch.inference_mode(False):  # the cache outlives the mode it was filled in
        unit = torch.eye(size_in, dtype=torch.float64, device=device)
        rows = F.interpolate(unit[None], size=size_out, mode="linear", align_corners=False)
        return rows[0].T.to(dtype)


@lru_cache(maxsize=1024)
def _band_of(
    size_in: int, size_out: int, dtype: torch.dtype, device: torch.device,
    first: int, end: int, low: int, high: int,
) -> Tensor:  # fmt: skip
    """Rows first to end and columns low to high of `_interpolation`.

    On a device in a tensor of their own: that is aligned, so compiled code takes it as it is. On a
    CPU a part of the whole, with which the product holds 30 MiB less.
    """
    with torch.inference_mode(False):
        band = _interpolation(size_in, size_out, dtype, device)[first:end, low:high]
        return band if device.type == "cpu" else band.contiguous()


@lru_cache(maxsize=64)
def _bands(size_in: int, size_out: int, most: int) -> tuple[tuple[slice, slice], ...]:
    """Cut `size_out` rows into bands of at most `most`: (its rows, the source rows they need).

    Bands have equal height where a divisor of `size_out` allows it at no more than twice their
    number, and spans of equal length always: shapes that a compiler has to see once.
    """
    least = -(-size_out // most)
    count = next((n for n in range(least, 2 * least) if size_out % n == 0), least)
    starts = range(0, size_out, -(-size_out // count))
    weights = _interpolation(size_in, size_out, torch.float64, torch.device("cpu"))
    used = [band.any(0).nonzero() for band in weights.split(starts.step)]
    span = max(int(rows[-1] - rows[0]) for rows in used) + 1
    first = [min(int(rows[0]), size_in - span) for rows in used]
    return tuple(
        (slice(start, min(start + starts.step, size_out)), slice(low, low + span))
        for start, low in zip(starts, first, strict=True)
    )
