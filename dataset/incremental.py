"""Samples of a data set with their labels mapped for one step."""

import os
import zlib
from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from dataset.draws import AUGMENT, generator
from dataset.files import Sample, read_image
from dataset.spec import DatasetSpec
from dataset.transform import Transform
from tasks import Task
from utils.constants import BACKGROUND, IGNORE_INDEX
from utils.errors import UserError

FOREIGN = 254  # what a label that the data set does not have becomes on reading


def label_map(
    spec: DatasetSpec, task: Task, step: int, *, train: bool, masking: bool = True,
    ignore_void: bool = False, rest_is_background: bool = False,
) -> np.ndarray:  # fmt: skip
    """(256,) uint8: original label → training index (its channel) at `step`.

    Training keeps the new classes (and VOC's background); all else, void included, becomes
    background: the shift that MiB's paper is about. Without `masking` old classes stay too, with
    `ignore_void` void becomes IGNORE_INDEX.
    Validation and test (`train` False) keep every class seen so far; future classes, void and
    ADE's label 0 become IGNORE_INDEX. With `rest_is_background` all of these but void become
    background, as in the tests of PLOP (Douillard et al., CVPR 2021).
    """
    seen = task.seen(step)
    kept = task.new(step) if train and masking else seen
    has_rest = train or rest_is_background
    lut = np.full(256, BACKGROUND if has_rest else IGNORE_INDEX, dtype=np.uint8)
    for label in kept:
        lut[label] = seen.index(label)
    if not has_rest and not spec.background_is_class:
        lut[BACKGROUND] = IGNORE_INDEX
    if spec.void is not None and (ignore_void or not train):
        lut[spec.void] = IGNORE_INDEX
    return lut


class IncrementalSegmentation(Dataset[tuple[Tensor, Tensor]]):
    """Some samples of a data set, their labels mapped for one step.

    `dataset[epoch, i]` (or `dataset[i]`, epoch 0) is the i-th of `indices`: its image, uint8
    (3 H W) and not yet normalised (see `transform.normalize`), and its labels, uint8 (H W),
    training indices or IGNORE_INDEX. What `transform` draws depends on seed, epoch and the sample's
    position in the data set's list alone, not on workers, processes or restarts.

    Raises on reading:
        UserError: an unreadable or damaged file, a mask of an unfitting kind, a mask of
            another size than its image, a label that the data set does not have.
    """

    def __init__(
        self, spec: DatasetSpec, samples: Sequence[Sample], indices: np.ndarray, labels: np.ndarray,
        transform: Transform, seed: int,
    ) -> None:  # fmt: skip
        """`indices`: (N,) positions in `samples`; `labels`: (256,) from `label_map`."""
        self.spec = spec
        self.indices = np.asarray(indices, dtype=np.int64)
        # One array instead of many strings: workers share its memory with their parent for good.
        self._paths = np.array([list(map(os.fsencode, samples[i])) for i in self.indices])
        self._labels = np.where(spec.known_labels, labels, FOREIGN).tolist()
        self._transform = transform
        self._seed = seed

    def __len__(self) -> int:
        return len(self.indices)

    def checksum(self) -> int:
        """CRC-32 of positions in the list and names of the images, without folders and endings."""
        stems = [os.path.splitext(os.path.basename(image))[0] for image, _ in self._paths]
        return zlib.crc32(self.indices.tobytes() + b"/".join(stems))

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, i = key if isinstance(key, tuple) else (0, key)
        image_path, mask_path = map(os.fsdecode, self._paths[i])
        image, mask = read_image(image_path), self.spec.read_mask(mask_path)
        if image.size != mask.size:
            raise UserError(
                f"image {image_path} is {image.width}x{image.height} but its mask {mask_path} is "
                f"{mask.width}x{mask.height} pixels: restore the pair"
            )
        rng = generator(AUGMENT, self._seed, epoch, int(self.indices[i]))
        pixels, labels = self._transform(image, mask.point(self._labels), rng)
        if FOREIGN in labels.numpy():  # torch takes ten times as long to look
            self.spec.check_labels(mask_path, mask.histogram())
        return pixels, labels


def collate(samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Images uint8 (B 3 H W), channels last in memory as they come, and labels uint8 (B H W).

    For a loader whose network computes in channels_last; torch's own transposes the images.
    """
    images, labels = default_collate([(image.permute(1, 2, 0), mask) for image, mask in samples])
    return images.permute(0, 3, 1, 2), labels
