"""What the program has to know about a data set."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.files import Sample, read_mask
from dataset.labels import LabelTable
from tasks import Family, Task, get_task, parse_task
from utils.errors import UserError


@dataclass(frozen=True)
class DatasetSpec:
    """One data set.

    Attributes:
        class_names: Names by original label; entry 0 is the background or the unlabelled pixels.
        background_is_class: Label 0 is a class that is scored (VOC), not "unlabelled" (ADE).
        void: Label of pixels that belong to no class, beside label 0; None if masks have none.
        find_samples: `(data_root, split)` → samples in the order that split lists count in; split
            is "train" or "val". Raises UserError for what is missing.
        partition: Every training image belongs to one step, overlapped or not (ADE, in MiB).
        joined: Tasks whose steps are, by definition, those of a finer task joined: name → finer.
        table: What the ids or colours of its masks mean; None where a pixel is the label itself.
        family: Its tasks, where `tasks.py` does not know them by the data set's name.
    """

    name: str
    class_names: tuple[str, ...]
    background_is_class: bool
    void: int | None
    find_samples: Callable[[Path, str], list[Sample]]
    partition: bool = False
    joined: Mapping[str, str] | None = None
    table: LabelTable | None = None
    family: Family | None = None

    def read_mask(self, path: str) -> Image.Image:
        """The mask at `path`; its pixels are labels of this data set, or foreign ones.

        Raises UserError for a mask that cannot be read or that the table does not fit.
        """
        if self.table is None:
            return read_mask(path)
        return Image.fromarray(self.table.read(path))

    def task(self, name: str) -> Task:
        """The task called `name`. Raises UserError if there is none."""
        if self.family is None:
            return get_task(self.name, name)
        return parse_task(self.name, name, self.family)

    @property
    def num_classes(self) -> int:
        """Classes without label 0."""
        return len(self.class_names) - 1

    @property
    def known_labels(self) -> np.ndarray:
        """(256,) bool: labels that a mask may hold."""
        known = np.arange(256) <= self.num_classes
        if self.void is not None:
            known[self.void] = True
        return known

    def foreign_labels(self, histogram: Sequence[int]) -> list[int]:
        """The labels of a mask with these 256 counts that are not known."""
        return np.flatnonzero((np.array(histogram) > 0) & ~self.known_labels).tolist()

    def check_labels(self, mask_path: str, histogram: Sequence[int]) -> None:
        """Raises UserError if the mask with these 256 counts holds a label that is not known."""
        if foreign := self.foreign_labels(histogram):
            void = "" if self.void is None else f" and {self.void} (void)"
            raise UserError(
                f"mask {mask_path} holds label {foreign[0]}, but {self.name} has 0 to "
                f"{self.num_classes}{void}: correct the mask or choose another --dataset"
            )
