"""What batch norm knows of its values, and the two collectives that spread it over the ranks."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch.distributed as dist
from torch import Tensor

from utils import distributed

# How many values per channel the statistics come from: an int where those are all in x, a tensor
# (C,) where they lie on several ranks, None for running statistics, which do not depend on x.
Count: TypeAlias = int | Tensor | None


class Statistics(NamedTuple):
    """What a map is normalised with."""

    mean: Tensor  # (C,)
    var: Tensor  # (C,), biased
    values: Count  # per channel


class Running(NamedTuple):
    """The buffers that a batch in training moves, and by what share."""

    mean: Tensor  # (C,)
    var: Tensor  # (C,), unbiased
    batches: Tensor  # (), int64
    momentum: float


def gather_rows(row: Tensor) -> Tensor:
    """The rows (ranks, 3, C) of all ranks, in one collective; this one's is `row` (3, C)."""
    ranks = distributed.world_size()
    rows = row.new_empty(ranks * len(row), *row.shape[1:])  # gloo takes them one below the other
    dist.all_gather_into_tensor(rows, row, group=distributed.norm_group())
    return rows.view(ranks, *row.shape)


def sum_over_ranks_(means: Tensor) -> Tensor:
    """The sum over all ranks, in place and returned, in one collective."""
    dist.all_reduce(means, group=distributed.norm_group())
    return means
