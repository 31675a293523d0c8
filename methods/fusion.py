"""EWF: the weights of two consecutive steps blended into one model.

Xiao et al., Endpoints Weight Fusion for Class Incremental Semantic Segmentation, CVPR 2023. The
method also keeps the old classifiers frozen while a step is trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def fusion_rate(new_classes: int, old_classes: int) -> float:
    """The share of the new weights, sqrt(N / (N + C_old)).

    `old_classes` counts the background, `new_classes` the classes of this step alone.
    """
    return math.sqrt(new_classes / (new_classes + old_classes))


@torch.no_grad()
def fuse(
    old_state: Mapping[str, Tensor], new_state: Mapping[str, Tensor], rate: float
) -> dict[str, Tensor]:
    """(1 - rate) * old + rate * new for every float tensor that both states have.

    Running statistics are blended like weights. New classifiers and integer buffers (the released
    code blends these, too) keep their new values. A tensor that is the same in both, as that of a
    frozen classifier, stays the same to the last bit. Raises ValueError where the new state lacks
    a tensor of the old one.
    """
    if missing := old_state.keys() - new_state.keys():
        raise ValueError(f"the new state lacks {len(missing)} keys of the old: {min(missing)}")
    return {
        # lerp adds a multiple of the difference, so equal tensors stay what they are.
        key: torch.lerp(old_state[key], new, rate)
        if key in old_state and new.is_floating_point()
        else new
        for key, new in new_state.items()
    }
