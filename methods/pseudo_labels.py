"""The pseudo-labels of PLOP: a teacher completes the background of a step's labels.

Douillard et al., PLOP: Learning without Forgetting for Continual Semantic Segmentation, CVPR 2021,
as the released code computes it, which made the published numbers:

    before a step    histogram    how uncertain the teacher is where it sees which class
                     thresholds   one number for each class from it
    each iteration   relabel      background pixels -> the teacher's class where it is sure enough

The teacher's logits B C_old h w are seen at image size a piece at a time (`methods/pieces.py`).
C = C_old + N counts the student's classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from methods.pieces import Piece, Result, Upsampled, interpolate
from utils.constants import BACKGROUND, IGNORE_INDEX

BINS = 100  # of the histogram, over [0, 1]


def uncertainty(logits: Tensor, classes_total: int) -> Tensor:
    """Entropy of the softmax over C_old channels, B C_old ... -> B ..., from 0 to below 1.

    The entropy is divided by ln C_old, by C_old (a mean stands where the definition has a sum) and
    by ln C (`classes_total`), so that the largest value is 1 / (C_old ln C).
    """
    old_classes = logits.shape[1]
    p = logits.softmax(1)
    entropy = -(p * (p + 1e-8).log()).mean(1) / math.log(old_classes + 1e-8)
    # A certain pixel has ln(1 + 1e-8) > 0 in float64.
    return (entropy / math.log(classes_total)).clamp(min=0)


def histogram(
    old_logits: Tensor, labels: Tensor, classes_total: int, piece_size: int | None = None
) -> Tensor:
    """Counts the background pixels of a batch by the teacher's class and its uncertainty.

    Args:
        old_logits: the teacher's, B C_old h w, any float type.
        labels: B H W in head order; pixels with another label than the background do not count.
        classes_total: C.

    Returns C 100, int64; bin b counts uncertainties in [b / 100, (b + 1) / 100). Sums over batches
    and processes are histograms as well.
    """
    counts = torch.zeros(classes_total * BINS, dtype=torch.int64, device=labels.device)

    def count(piece: Piece, chosen: Tensor, doubt: Tensor) -> Tensor:
        cells = chosen * BINS + (BINS * doubt).long().clamp(max=BINS - 1)
        counted = labels[piece.image, piece.rows] == BACKGROUND
        return torch.bincount(cells[counted], minlength=len(counts))

    for _, found in _look(old_logits, labels, classes_total, count, piece_size):
        counts += found
    return counts.view(classes_total, BINS)


def thresholds(histogram: Tensor, floor: float = 0.001) -> Tensor:
    """The uncertainty of each class below which its pixels are kept, C float32.

    Args:
        histogram: C 100, int64, over the whole training set.
        floor: the least threshold.

    Meant as the median of each class; what comes out instead is described in `_slipped_median`. A
    class that was never predicted gets the floor. Where the released code has an infinity, and so
    accepts every pixel, the threshold is 1, where it has NaN, and accepts none, 0.
    """
    medians = [_slipped_median(counts) for counts in histogram.tolist()]
    stored = torch.tensor(medians, dtype=torch.float32, device=histogram.device)
    return stored.clamp(min=floor).nan_to_num(nan=0.0, posinf=1.0)


def relabel(
    old_logits: Tensor,
    labels: Tensor,
    thresholds: Tensor,
    classes_total: int,
    old_classes: int,
    piece_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Replace the background by the teacher's classes where it is sure, by IGNORE_INDEX elsewhere.

    Args:
        old_logits: the teacher's, B C_old h w, any float type.
        labels: B H W in head order. Labels below `old_classes` are background; new classes and
            IGNORE_INDEX stay.
        thresholds: C; a pixel is sure if its uncertainty is below that of the class it shows.
        classes_total: C.
        old_classes: C_old.

    Returns the labels, B H W of the same type, and nu, B float32: the share of each image's
    background that is sure, with which PLOP weights its cross-entropy; 0 without background.
    """
    completed = torch.empty_like(labels)
    counts = torch.zeros(len(labels), 2, dtype=torch.int64, device=labels.device)

    def complete(piece: Piece, chosen: Tensor, doubt: Tensor) -> tuple[Tensor, Tensor]:
        y = labels[piece.image, piece.rows]
        background = y < old_classes
        sure = background & (doubt < thresholds[chosen])
        pseudo = chosen.to(y.dtype).where(sure, IGNORE_INDEX)
        return pseudo.where(background, y), torch.stack([sure.sum(), background.sum()])

    for piece, (result, found) in _look(old_logits, labels, classes_total, complete, piece_size):
        completed[piece.image, piece.rows] = result
        counts[piece.image] += found
    sure, background = counts.float().unbind(1)
    return completed, sure / (background + 1e-6)


def _look(
    old_logits: Tensor,
    labels: Tensor,
    classes_total: int,
    work: Callable[[Piece, Tensor, Tensor], Result],
    piece_size: int | None,
) -> Iterator[tuple[Piece, Result]]:
    """Every piece with work(piece, the teacher's classes rows W, their uncertainty rows W)."""
    upsampled = Upsampled(old_logits, (labels.shape[1], labels.shape[2]))

    @torch.no_grad()  # the mode is a thread's own
    def look(piece: Piece) -> Result:
        logits = interpolate(*upsampled.operands(piece))[:, :, 0]
        return work(piece, logits.argmax(1), uncertainty(logits, classes_total))

    with torch.autocast(old_logits.device.type, enabled=False):
        yield from upsampled.each_piece(look, piece_size)


def _slipped_median(counts: list[int]) -> float:
    """The threshold of one class from its counts in 100 bins, slips of the released code included.

    The loop looks for the bin in which half of the pixels are reached and interpolates within it.
    But what it adds up is the number of each bin passed, not its count, so it stops where a single
    bin holds about half of the class; and it takes bin floor(i / 100 * 100), which for i = 29, 57
    and 58 is rounded one down. The published numbers were made so.

    Returns infinity of either sign or NaN where the last bin looked at is empty.
    """
    if not any(counts):
        return 0.0
    half = sum(counts) / 2
    running = 0
    for i in range(BINS):
        count = counts[int(i / BINS * BINS)]
        if running <= half <= running + count:
            break
        running += i
    rest = half - running
    if count == 0:
        return math.copysign(math.inf, rest) if rest else math.nan
    return (i + rest / count) / BINS
