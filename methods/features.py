"""Distillation terms at body resolution: they look at maps B D h w as the network returns them.

Each returns a scalar in at least float32, differentiable with respect to the student's map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.constants import IGNORE_INDEX
from utils.precision import at_least_float32


def feature_distillation(features: Tensor, old_features: Tensor) -> Tensor:
    """Mean squared difference of two feature maps B D h w, in at least float32 (ILT).

    Michieli & Zanuttigh, ICCV workshops 2019.
    """
    return F.mse_loss(at_least_float32(features), at_least_float32(old_features))


def label_guided_distillation(
    logits: Tensor, old_logits: Tensor, labels: Tensor, weight_old: float, weight_new: float
) -> Tensor:
    """LGKD: distillation in which a labelled new class takes the teacher's background.

    Yang et al., Label-guided Knowledge Distillation, ICCV 2023, as their code computes it. With
    q the teacher's softmax over C_old and p the student's over all C channels, a pixel costs

        labelled below C_old    weight_old * -(sum over c < C_old of q[c] log p[c])
        labelled y >= C_old     weight_new * the same, with log p[y] instead of log p[0]

    and the term is the sum over pixels divided by the number of those that are not IGNORE_INDEX.
    A batch without any is 0 here; the released code gives NaN.

    Args:
        logits: the student's, B C h w, any float type.
        old_logits: the teacher's, B C_old h w.
        labels: B H W at image size, in head order; those of the data set, not pseudo-labels. Cell
            (i, j) of the logits sees the label at (floor(i H / h), floor(j W / w)).
    """
    rows, columns = (
        torch.arange(small, device=labels.device) * large // small
        for small, large in zip(logits.shape[2:], labels.shape[1:], strict=True)
    )
    y = labels[:, rows[:, None], columns].long()
    old_classes = old_logits.shape[1]
    is_ignored = y == IGNORE_INDEX
    is_new = (y >= old_classes) & ~is_ignored
    log_p = at_least_float32(logits).log_softmax(1)
    q = at_least_float32(old_logits).softmax(1)
    background = log_p.gather(1, y.where(is_new, 0)[:, None])
    agreement = (q * torch.cat([background, log_p[:, 1:old_classes]], 1)).sum(1)
    weights = torch.full_like(agreement, weight_old).masked_fill(is_new, weight_new)
    total = (weights.masked_fill(is_ignored, 0) * -agreement).sum()
    return total / (~is_ignored).sum().clamp(min=1)
