"""What the program has to know about a data set, and how its files are found safely."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tasks import Family, Task, get_task, parse_task
from utils.errors import UserError


class Sample(NamedTuple):
    """Paths of an image and of its mask."""

    image: str
    mask: str


@dataclass(frozen=True)
class DatasetSpec:
    """One data set.

    Attributes:
        class_names: Names by original label; entry 0 is the background or the unlabelled pixels.
        background_is_class: Label 0 is a class that is scored (VOC), not "unlabelled" (ADE).
        void: Label of pixels that belong to no class, beside label 0; None if masks have none.
        find_samples: `(data_root, split)` → samples in the order that split lists count in; split
            is "train" or "val". Raises UserError for what is missing.
        partition: Every training image belongs to one step, overlapped or not (ADE).
        joined: Tasks whose steps are, by definition, those of a finer task joined: name → finer.
        family: Its tasks, where `tasks.py` does not know them by the data set's name.
    """

    name: str
    class_names: tuple[str, ...]
    background_is_class: bool
    void: int | None
    find_samples: Callable[[Path, str], list[Sample]]
    partition: bool = False
    joined: Mapping[str, str] | None = None
    family: Family | None = None

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


class Tree:
    """The files of one data set, none of them outside its folder.

    `<data_root>/<folder>` may itself be a link, the user made it; below it, a link is followed only
    to a file inside. Each folder is listed once, so looking up 20,000 files costs no 20,000 stats.
    """

    def __init__(self, data_root: Path, folder: str, cure: str) -> None:
        """Raises UserError, ending in `cure`, if there is no such folder."""
        if not data_root.is_dir():
            raise UserError(f"no data root {data_root}: set --data_root, or {cure}")
        if not (data_root / folder).is_dir():
            raise UserError(f"no folder {data_root / folder}: set --data_root, or {cure}")
        self.root = os.path.realpath(data_root / folder)
        self._cure = cure
        self._folders: dict[str, dict[str, str]] = {}

    def find(self, name: str, where: str) -> str:
        """Path of the regular file `name`, which is relative to the folder, `/` first or not.

        Raises UserError, beginning with `where`, if it is missing or leads out of the folder.
        """
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise UserError(f"{where}: {name[:200]!r} holds '..'; paths start at {self.root}")
        folder = os.path.join(self.root, *parts[:-1])
        path = self.files(folder).get(parts[-1] if parts else "")
        if path is None:
            missing = os.path.join(self.root, *parts)[:300]
            raise UserError(f"{where}: no file {missing!r}; restore it, or {self._cure}")
        if path == "":
            raise UserError(f"{where}: {name[:200]!r} leads out of {self.root}; put a copy there")
        return path

    def files(self, folder: str) -> dict[str, str]:
        """Name → path of the regular files in `folder`; an empty path where a link leads out."""
        if folder not in self._folders:
            try:
                self._folders[folder] = self._scan(folder)
            except (OSError, ValueError):  # no such folder, or a name that no folder can have
                self._folders[folder] = {}
        return self._folders[folder]

    def _scan(self, folder: str) -> dict[str, str]:
        inside = self._contains(folder)
        found = {}
        with os.scandir(folder) as entries:
            for entry in entries:
                link = entry.is_symlink()
                # Devices and pipes are no files; a link counts as what it leads to.
                if os.path.isfile(entry.path) if link else entry.is_file():
                    safe = inside and (not link or self._contains(entry.path))
                    found[entry.name] = entry.path if safe else ""
        return found

    def _contains(self, path: str) -> bool:
        return os.path.commonpath([os.path.realpath(path), self.root]) == self.root
