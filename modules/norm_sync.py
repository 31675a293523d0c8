"""Statistics of batch norm over several ranks, at one collective each way."""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

# How many values per channel the statistics come from: an int where those are all in x, a tensor
# (1,) where they lie on several ranks, None for running statistics, which do not depend on x.
Count: TypeAlias = int | Tensor | None
Statistics: TypeAlias = tuple[Tensor, Tensor, Count]  # mean (C,), biased variance (C,), count


def several_ranks() -> bool:
    """Whether there is a process group of more than this process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_statistics(mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count over all ranks from those of this one, in one collective."""
    local = torch.cat([mean, var, mean.new_full((1,), count)])
    ranks = local.new_empty(dist.get_world_size(), len(local))
    dist.all_gather(list(ranks.unbind()), local)
    means, variances, counts = ranks.split([len(mean), len(var), 1], dim=1)
    total = counts.sum(0)
    share = counts / total
    mean = (share * means).sum(0)
    # Variance within ranks plus variance between them: no difference of large sums.
    return mean, (share * (variances + (means - mean).square())).sum(0), total


def sum_over_ranks(sums: Tensor, count: Count) -> Tensor:
    """`sums` of this rank, or of all where the count is over all."""
    if isinstance(count, Tensor):
        sums = sums.clone()
        dist.all_reduce(sums)
    return sums
