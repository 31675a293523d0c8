"""Random numbers by address: a draw depends on purpose, seed, epoch and sample, on nothing else."""

import numpy as np

# First word of every address, so that no two purposes share random numbers.
SHUFFLE, AUGMENT, HOLD_OUT, VAL_SHARE = 1, 2, 3, 4


def generator(*address: int) -> np.random.Generator:
    """The random numbers of one place in a run: purpose, seed, epoch, sample …, all ≥ 0."""
    return np.random.default_rng(address)
