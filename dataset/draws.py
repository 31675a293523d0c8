"""Random numbers by address: a draw depends on purpose, seed, epoch and sample, on nothing else."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

# First word of every address, so that no two purposes share random numbers.
SHUFFLE, AUGMENT, HOLD_OUT, VAL_SHARE = 1, 2, 3, 4


def generator(*address: int) -> np.random.Generator:
    """The random numbers of one place in a run: purpose, seed, epoch, sample …, all ≥ 0."""
    return np.random.default_rng(address)


def draw_share(items: Sequence[T], share: float, seed: int) -> tuple[list[T], list[T]]:
    """(the others, a `share` of the items drawn by `seed`), both in the order of `items`.

    Each has at least one item where there are two.
    """
    number = min(max(1, round(share * len(items))), len(items) - 1)
    drawn = set(generator(VAL_SHARE, seed).permutation(len(items))[:number].tolist())
    kept = [item for i, item in enumerate(items) if i not in drawn]
    return kept, [item for i, item in enumerate(items) if i in drawn]
