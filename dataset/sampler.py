"""Which samples meet in which batch, independent of workers, processes and restarts."""

from collections.abc import Iterator

from torch.utils.data import Sampler

from dataset.draws import SHUFFLE, generator
from utils.errors import UserError


class TrainBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of keys (epoch, i) for one process of several.

    The samples are shuffled by (seed, epoch) and cut into global batches of `batch_size` × `world`;
    process `rank` takes its share of each, and the last incomplete one is dropped. The epoch is
    part of the keys, so that persistent workers know it.
    """

    def __init__(
        self, num_samples: int, batch_size: int, *, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        """Raises UserError if the samples do not fill one batch over all processes."""
        self.iterations_per_epoch = num_samples // (batch_size * world)
        if self.iterations_per_epoch == 0:
            raise UserError(
                f"{num_samples} training images are fewer than one batch over all processes "
                f"({world} x {batch_size}): lower --batch_size or the number of processes"
            )
        self._num_samples, self._batch_size = num_samples, batch_size
        self._seed, self._rank, self._world = seed, rank, world
        self._epoch, self._start = 0, 0

    def set_epoch(self, epoch: int, start_iteration: int = 0) -> None:
        """The next pass yields `epoch` without its first `start_iteration` batches."""
        self._epoch, self._start = epoch, start_iteration

    def __len__(self) -> int:
        return max(0, self.iterations_per_epoch - self._start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = generator(SHUFFLE, self._seed, self._epoch).permutation(self._num_samples)
        used = self.iterations_per_epoch * self._world * self._batch_size
        mine = order[:used].reshape(-1, self._world, self._batch_size)[self._start :, self._rank]
        # A list, not a generator: `set_epoch` for the next pass must not reach into this one.
        return iter([[(self._epoch, i) for i in batch] for batch in mine.tolist()])


class EvalBatchSampler(Sampler[list[int]]):
    """Batches of indices in list order, every sample once; the last batch may be short.

    Batches are cut before they are dealt out (process r takes batches r, r + world, …), so what
    meets in a batch does not depend on the number of processes. Each process has `rounds` batches
    or one more.
    """

    def __init__(self, num_samples: int, batch_size: int, *, rank: int = 0, world: int = 1) -> None:
        starts = range(rank * batch_size, num_samples, world * batch_size)
        self._batches = [list(range(s, min(s + batch_size, num_samples))) for s in starts]
        self.rounds = -(-num_samples // batch_size) // world

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)
