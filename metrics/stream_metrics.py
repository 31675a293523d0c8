"""Confusion matrix over a stream of batches, and the scores read from it.

Conventions of the reference (and with it of the paper's tables): rows of the matrix are the truth,
pixels whose label is not a class do not count, a class without ground truth takes part in no mean
over classes but that of precision, and is shown as X.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

EPS = 1e-6

_MEANS = {
    "old": "mean IoU, old classes",
    "new": "mean IoU, new classes",
    "all": "mean IoU, all classes",
    "with_background": "mean IoU with background",
    "mean_acc": "mean accuracy",
    "overall_acc": "overall accuracy",
    "fw_iou": "frequency-weighted IoU",
    "mean_prec": "mean precision",
}


# What the means are called in curves and metrics.jsonl, where a name stands alone.
_NAMES = {
    "old": "mean_iou_old",
    "new": "mean_iou_new",
    "all": "mean_iou",
    "with_background": "mean_iou_with_background",
    "mean_acc": "mean_accuracy",
    "overall_acc": "overall_accuracy",
    "fw_iou": "frequency_weighted_iou",
    "mean_prec": "mean_precision",
}


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of one evaluation, in [0, 1], float64; nan where there is nothing to measure.

    `iou`, `accuracy` and `precision` have shape (C,) and nan for a class without ground truth.
    `old`, `new` and `all` are the columns of the paper: mean IoU without background (index 0),
    unless `scores` was asked to count it.
    """

    iou: np.ndarray
    accuracy: np.ndarray
    precision: np.ndarray
    old: float
    new: float
    all: float
    with_background: float
    mean_acc: float
    overall_acc: float
    fw_iou: float
    mean_prec: float

    def means(self) -> dict[str, float]:
        """The single numbers by name, in the order in which tables show them."""
        return {name: getattr(self, name) for name in _MEANS}

    def named(self) -> dict[str, float]:
        """The single numbers by names that say what they are without a table around them."""
        return {_NAMES[name]: value for name, value in self.means().items()}


class StreamSegMetrics:
    """Adds up a (C, C) confusion matrix, int64, rows = truth, on `device` (None: CPU).

    `update` never waits for the device, so an evaluation runs as fast as its forward passes.
    """

    def __init__(self, num_classes: int, device: torch.device | str | None = None) -> None:
        self.num_classes = num_classes
        # One slot beyond the matrix takes the pixels that do not count: selecting the others, or
        # bincount, would need their number on the host.
        self._counts = torch.zeros(num_classes**2 + 1, dtype=torch.int64, device=device)

    @property
    def confusion(self) -> Tensor:
        """(C, C) int64 view: what is written into it, such as a sum over ranks, stays."""
        return self._counts[:-1].view(self.num_classes, self.num_classes)

    def update(self, labels: Tensor, predictions: Tensor) -> None:
        """Counts the pixels of `labels` and `predictions`, both B H W of any integer type on
        the device of the matrix.

        Labels outside 0..C-1 (IGNORE_INDEX among them) do not count. Predictions must lie in
        0..C-1, as an argmax over C channels does; checking it would wait for the device.

        Raises:
            ValueError: the shapes differ.
        """
        if labels.shape != predictions.shape:
            raise ValueError(f"labels {labels.shape} and predictions {predictions.shape} differ")
        truth = labels.long().flatten()
        predicted = predictions.long().flatten()
        valid = (truth >= 0) & (truth < self.num_classes)
        cell = torch.where(valid, truth * self.num_classes + predicted, self.num_classes**2)
        self._counts.scatter_add_(0, cell, torch.ones_like(cell))

    def scores(self, old: int | None = None, background: bool = False) -> Scores:
        """Scores of all pixels so far.

        Args:
            old: C_old, number of old classes with background: indices 1..old-1 are the old
                classes, old..C-1 the new ones. None or 0 (step 0): no division, both are nan.
            background: count it (index 0) in `old` and `all`, as PLOP's tables do (Douillard et
                al., CVPR 2021).
        """
        first = 0 if background else 1
        confusion = self.confusion.cpu().numpy().astype(np.float64)
        hits, truth, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
        total = truth.sum() or math.nan
        missing = truth == 0
        iou = hits / (truth + predicted - hits + EPS)
        accuracy = hits / (truth + EPS)
        precision = hits / (predicted + EPS)
        fw_iou = float((truth / total * iou).sum())
        mean_prec = float(precision.mean())  # over all classes, as the reference has it
        for values in (iou, accuracy, precision):
            values[missing] = math.nan
        return Scores(
            iou=iou,
            accuracy=accuracy,
            precision=precision,
            old=_mean(iou[first:old]) if old else math.nan,
            new=_mean(iou[old:]) if old else math.nan,
            all=_mean(iou[first:]),
            with_background=_mean(iou),
            mean_acc=_mean(accuracy),
            overall_acc=float(hits.sum() / total),
            fw_iou=fw_iou,
            mean_prec=mean_prec,
        )


def _mean(values: np.ndarray) -> float:
    """Mean of the values that are not nan; nan if none is left."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def score_rows(
    class_names: Sequence[str], scores: Scores
) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """Scores as text: (header, a row per class, a row [label, value] per mean); X for nan.

    `class_names` are in head order; names of classes not yet seen may follow, they are not used.
    """
    per_class = zip(class_names, scores.iou, scores.accuracy, scores.precision, strict=False)
    rows = [[str(i), name, *map(_text, values)] for i, (name, *values) in enumerate(per_class)]
    means = [[_MEANS[name], _text(value)] for name, value in scores.means().items()]
    return ["#", "class", "IoU", "Acc", "Prec"], rows, means


def to_table(class_names: Sequence[str], scores: Scores) -> str:
    """The console table: a line per class, then the means. Names as in `score_rows`."""
    header, rows, means = score_rows(class_names, scores)
    width = max(len(text) for text in ["class", *(row[1] for row in rows)])
    lines = [
        f"{number:>3}  {name:<{width}}  " + "  ".join(f"{value:>6}" for value in values)
        for number, name, *values in [header, *rows]
    ]
    rule = "-" * len(lines[0])
    width = max(len(label) for label, _ in means)
    lines += [rule, *(f"{label:<{width}}  {value:>6}" for label, value in means)]
    return "\n".join([lines[0], rule, *lines[1:]])


def _text(value: float) -> str:
    return "X" if math.isnan(value) else f"{value:.4f}"
