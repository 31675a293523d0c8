"""The pixel terms of every objective.

A term maps `(logits, old_logits, labels)` to one loss per pixel:

    logits      B C H W      the student's, C = old + new classes, float32 or float64
    old_logits  B C_old H W  the teacher's; None where there is no teacher
    labels      B H W        int64; IGNORE_INDEX marks pixels without a label
    returns     B H W        loss of each pixel; 0 where the term ignores it

The loss of an image batch is the mean of that map over *all* its pixels, ignored ones included,
so it can be summed piece by piece (`methods/pieces.py`). Nothing here knows options or methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.constants import IGNORE_INDEX

PixelTerm = Callable[[Tensor, "Tensor | None", Tensor], Tensor]


class WeightedTerm(NamedTuple):
    """A pixel term and the factor it enters the objective with."""

    term: PixelTerm
    weight: float


def cross_entropy(logits: Tensor, old_logits: Tensor | None, labels: Tensor) -> Tensor:
    """CE: -(x[y] - lse(x)). Ignored pixels give 0."""
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")


@dataclass(frozen=True)
class UnbiasedCrossEntropy:
    """Cross-entropy in which "background" means "background or any old class".

    Cermelli et al., CVPR 2020, eq. 5-6. Every label below `old_classes` counts as background, whose
    probability is the sum over the old channels: -(lse(x[old]) - lse(x)); a new label is plain CE.
    Ignored pixels give 0.
    """

    old_classes: int

    def __call__(self, logits: Tensor, old_logits: Tensor | None, labels: Tensor) -> Tensor:
        old, new = logits.split([self.old_classes, logits.shape[1] - self.old_classes], 1)
        background = old.logsumexp(1)
        normalizer = torch.logaddexp(background, new.logsumexp(1))
        ignored = labels == IGNORE_INDEX
        is_new = (labels >= self.old_classes) & ~ignored
        own = _of_class(new, (labels - self.old_classes).where(is_new, 0))
        return (normalizer - own.where(is_new, background)).masked_fill(ignored, 0)


def binary_cross_entropy(logits: Tensor, old_logits: Tensor | None, labels: Tensor) -> Tensor:
    """BCE of iCaRL: sum over channels against the one-hot label. Ignored pixels give 0."""
    targets = _one_hot(labels, logits)
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)
    return loss.masked_fill(labels == IGNORE_INDEX, 0)


@dataclass(frozen=True)
class KnowledgeDistillation:
    """KD over the old channels alone (Li & Hoiem, LwF, arXiv 1606.09282).

    -(1/C_old) sum_c softmax(alpha x_old)[c] log_softmax(x[:C_old])[c]; looks at every pixel.
    """

    alpha: float = 1.0

    def __call__(self, logits: Tensor, old_logits: Tensor | None, labels: Tensor) -> Tensor:
        old_logits = _required(old_logits)
        old_classes = old_logits.shape[1]
        log_p = logits[:, :old_classes].log_softmax(1)
        return -((self.alpha * old_logits).softmax(1) * log_p).sum(1) / old_classes


@dataclass(frozen=True)
class UnbiasedKnowledgeDistillation:
    """KD in which the teacher's background stands for "background or any new class".

    Cermelli et al., CVPR 2020, eq. 8-9; looks at every pixel.
    """

    alpha: float = 1.0

    def __call__(self, logits: Tensor, old_logits: Tensor | None, labels: Tensor) -> Tensor:
        old_logits = _required(old_logits)
        old_classes = old_logits.shape[1]
        background, old, new = logits.split([1, old_classes - 1, logits.shape[1] - old_classes], 1)
        new_or_background = torch.logaddexp(background[:, 0], new.logsumexp(1))
        normalizer = torch.logaddexp(new_or_background, old.logsumexp(1))
        q = (self.alpha * old_logits).softmax(1)
        # The q sum to one, so the normalizer can be taken out of the sum over classes.
        agreement = q[:, 0] * new_or_background + (q[:, 1:] * old).sum(1)
        return (normalizer - agreement) / old_classes


def icarl_combined(logits: Tensor, old_logits: Tensor | None, labels: Tensor) -> Tensor:
    """iCaRL's distillation beside BCE: sum over old channels of BCE(x[c], sigmoid(x_old[c])).

    Rebuffi et al., CVPR 2017, as the mean over old classes times C_old; looks at every pixel.
    """
    old_logits = _required(old_logits)
    return F.binary_cross_entropy_with_logits(
        logits[:, : old_logits.shape[1]], old_logits.sigmoid(), reduction="none"
    ).sum(1)


@dataclass(frozen=True)
class IcarlDisjoint:
    """iCaRL as one BCE: one-hot label, old channels replaced by sigmoid(x_old).

    With `keep_background` the background channel keeps its label. An ignored pixel has an empty
    one-hot row and counts like any other.
    """

    keep_background: bool = False

    def __call__(self, logits: Tensor, old_logits: Tensor | None, labels: Tensor) -> Tensor:
        old_logits = _required(old_logits)
        first = 1 if self.keep_background else 0
        targets = _one_hot(labels, logits)
        targets[:, first : old_logits.shape[1]] = old_logits[:, first:].sigmoid()
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)


def _of_class(logits: Tensor, index: Tensor) -> Tensor:
    """The channel `index` B H W of each pixel: B C H W -> B H W."""
    if not torch.compiler.is_compiling():
        return logits.gather(1, index[:, None])[:, 0]
    # The same values. It fuses with what is around it; the backward of `gather` adds atomically.
    classes = torch.arange(logits.shape[1], device=logits.device).view(1, -1, 1, 1)
    return logits.where(classes == index[:, None], 0).sum(1)


def _one_hot(labels: Tensor, like: Tensor) -> Tensor:
    """B H W labels -> B C H W zeros and ones in `like`'s dtype; ignored pixels have empty rows."""
    ignored = labels == IGNORE_INDEX
    targets = torch.zeros_like(like)
    index = labels.masked_fill(ignored, 0)[:, None]
    return targets.scatter_(1, index, (~ignored)[:, None].to(like.dtype))


def _required(old_logits: Tensor | None) -> Tensor:
    if old_logits is None:
        raise ValueError("a distillation term needs the teacher's logits")
    return old_logits
