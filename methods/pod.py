"""Local POD, the feature distillation of PLOP.

Douillard et al., PLOP: Learning without Forgetting for Continual Semantic Segmentation, CVPR 2021,
as the released code computes it, which made the published numbers. It differs from the paper in
that maps are squared first and the distance of two embeddings is not.

Maps of student and teacher, B D h w, are compared by what `pooled` makes of them. Pooling is linear
in the squares, so a teacher is remembered by its pooled vectors, a quarter of the size or less. The
maps are

    mod2 … mod5    outputs of the body's modules before their activation: `before_activation`
    pre_logits     output of the head, as it is
    logits         at body resolution, the student's brought to the teacher's channels:
                   `fold_new_classes`
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.precision import at_least_float32


def before_activation(x: Tensor, slope: float = 0.01) -> Tensor:
    """What a leaky ReLU of this slope made x from, same shape and type.

    The gradient is that with respect to the input of the activation: the factor 1 / slope cancels
    against its own.
    """
    return F.leaky_relu(x, 1 / slope)


def fold_new_classes(logits: Tensor, old_classes: int) -> Tensor:
    """Logits B C h w -> B C_old h w: the new classes' are added to the background's.

    Logits, not probabilities, are summed. A teacher's logits stay as they are.
    """
    background = logits[:, :1] + logits[:, old_classes:].sum(1, keepdim=True)
    return torch.cat([background, logits[:, 1:old_classes]], 1)


def pooled(x: Tensor, scales: Sequence[int] = (1, 2, 4)) -> Tensor:
    """Means over rows and over columns of squares cut from x * x, B D h w -> B K.

    At scale s the map is cut into s by s squares of side floor(w / s). The width decides for both
    axes: what remains at the right and at the bottom is dropped, and of a map that is less high
    than wide the lowest squares are cut short. Each square gives the mean of each of its rows and
    of each of its columns; K = 14 D w for a square map whose width is divisible by 4. Computed in
    at least float32, because squares of float16 overflow. Raises ValueError where a square would
    be empty.
    """
    squares = at_least_float32(x).square()
    height, width = x.shape[2:]
    parts = []
    for scale in scales:
        side = width // scale
        if height <= (scale - 1) * side or side == 0:
            raise ValueError(f"a map of {height} x {width} has no {scale} x {scale} squares")
        seen = squares[:, :, : scale * side, : scale * side]
        parts.append(seen.unflatten(3, (scale, side)).mean(4))
        parts += [squares_of_a_row.mean(2) for squares_of_a_row in seen.split(side, 2)]
    return torch.cat([part.flatten(1) for part in parts], 1)


def local_pod(
    student: Sequence[Tensor],
    teacher_pooled: Sequence[Tensor],
    factors: Sequence[float],
    old_classes: int,
    new_classes: int,
) -> Tensor:
    """The weighted distance of student and teacher over all maps, a scalar in at least float32.

        sqrt((C_old + N) / N) * mean over maps of factor * mean over images of |P(B) - P(A)|

    with P = `pooled` and the Euclidean norm, whose gradient is 0 where both are equal.

    Args:
        student: maps B D h w, see the top of the file.
        teacher_pooled: `pooled` of the teacher's map in each place, B K, without gradient.
        factors: one for each map.
        old_classes: C_old, background included.
        new_classes: N, classes of this step.
    """
    distances = [
        factor * torch.linalg.vector_norm(pooled(new) - old, dim=1).mean()
        for new, old, factor in zip(student, teacher_pooled, factors, strict=True)
    ]
    schedule = math.sqrt((old_classes + new_classes) / new_classes)
    return schedule * torch.stack(distances).mean()
