"""Learning-rate schedules, stepped once per iteration."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, StepLR


def poly(optimizer: Optimizer, max_iters: int, power: float = 0.9) -> LRScheduler:
    """lr * (1 - it / max_iters) ** power for it = 0 .. max_iters; 0 from there on.

    The "poly" policy of DeepLab (Chen et al., arXiv 1606.00915).
    """
    return LambdaLR(optimizer, lambda it: max(0.0, 1 - it / max_iters) ** power)


def make_scheduler(
    optimizer: Optimizer, policy: str, max_iters: int, *, power: float, decay_step: int,
    decay_factor: float,
) -> LRScheduler:  # fmt: skip
    """`poly`, or `step`: lr multiplied by `decay_factor` every `decay_step` iterations."""
    if policy == "poly":
        return poly(optimizer, max_iters, power)
    return StepLR(optimizer, decay_step, decay_factor)
