"""The files of a data set: found below its folder, and read whole or refused."""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from utils.errors import UserError
from utils.images import to_rgb


class Sample(NamedTuple):
    """Paths of an image and of its mask."""

    image: str
    mask: str


class Tree:
    """The files of one data set, below its folder.

    Links to files and folders are followed wherever they lead, since the user made them; a name
    from a list file cannot leave the folder by itself. Each folder is listed once, so looking up
    20,000 files costs no 20,000 stats.
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

        Raises UserError, beginning with `where`, if it is missing or holds `..`.
        """
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise UserError(f"{where}: {name[:200]!r} holds '..'; paths start at {self.root}")
        folder = os.path.join(self.root, *parts[:-1])
        path = self.files(folder).get(parts[-1] if parts else "")
        if path is None:
            missing = os.path.join(self.root, *parts)[:300]
            raise UserError(f"{where}: no file {missing!r}; restore it, or {self._cure}")
        return path

    def files(self, folder: str) -> dict[str, str]:
        """Name → path of the regular files in `folder`; empty where there is no such folder."""
        if folder not in self._folders:
            try:
                with os.scandir(folder) as entries:
                    found = {entry.name: entry.path for entry in entries if _is_file(entry)}
            except (OSError, ValueError):  # no such folder, or a name that no folder can have
                found = {}
            self._folders[folder] = found
        return self._folders[folder]

    def walk(self, folder: str = "") -> Iterator[str]:
        """Paths, relative to the root, of all files below `folder`, folder by folder, sorted.

        Hidden files and folders are left out, and links to a folder above them, which would never
        end.
        """
        yield from self._walk(os.path.join(self.root, folder) if folder else self.root, ())

    def _walk(self, folder: str, above: tuple[str, ...]) -> Iterator[str]:
        real = os.path.realpath(folder)
        if real in above or not os.path.isdir(folder):
            return
        for name, path in sorted(self.files(folder).items()):
            if not name.startswith("."):
                yield path[len(self.root) + 1 :]
        with os.scandir(folder) as entries:
            others = [e for e in entries if not e.is_file(follow_symlinks=False)]
        for entry in sorted(others, key=lambda e: e.name):
            if not entry.name.startswith("."):
                yield from self._walk(entry.path, (*above, real))


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Devices and pipes are no files; a link counts as what it leads to, one to itself as none."""
    return os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()


@dataclass(frozen=True)
class PairsByName:
    """Finds the samples of a data set whose masks have the names of their images.

    Attributes:
        folder: of the data set, below the data root.
        images, masks: (folder, end of the file names), with `{}` for the split. Folders below them
            count, too, and files with another end do not.
        cure: what to do if something is missing, for messages.
        splits: the folders of "train" and "val".
    """

    folder: str
    images: tuple[str, str]
    masks: tuple[str, str]
    cure: str
    splits: tuple[str, str] = ("train", "val")

    def __call__(self, data_root: Path, split: str) -> list[Sample]:
        """Samples of a split ("train" or "val") sorted by name.

        Raises UserError where an image has no mask or a mask no image: positions in the list would
        no longer be those that split lists mean.
        """
        tree = Tree(data_root, self.folder, self.cure)
        there = self.splits[split == "val"]
        (folder, end), (mask_folder, mask_end) = (
            (where.format(there), end) for where, end in (self.images, self.masks)
        )
        stems, mask_stems = _stems(tree, folder, end), _stems(tree, mask_folder, mask_end)
        if not stems:
            raise UserError(f"{tree.root}/{folder} holds no {end} image; {self.cure}")
        if orphans := sorted(mask_stems - stems):
            lonely = f"{mask_folder}/{orphans[0]}{mask_end}"
            raise UserError(f"{tree.root}: mask {lonely} has no image; {self.cure}")
        return [
            Sample(
                tree.find(f"{folder}/{stem}{end}", tree.root),
                tree.find(f"{mask_folder}/{stem}{mask_end}", tree.root),
            )
            for stem in sorted(stems)
        ]


def _stems(tree: Tree, folder: str, end: str) -> set[str]:
    names = (name[len(folder) + 1 :] for name in tree.walk(folder))
    return {name.removesuffix(end) for name in names if name.endswith(end)}


def read_image(path: str) -> Image.Image:
    """The decoded JPEG or PNG as RGB, as predict.py sees it, but as its pixels lie.

    Raises UserError naming a file that cannot be decoded.
    """
    return to_rgb(decode(path, ("JPEG", "PNG"))[0])


def read_mask(path: str) -> Image.Image:
    """The decoded PNG mask of a data set without a table: its pixels are labels.

    `DatasetSpec.read_mask` reads any mask of a data set.

    Raises UserError naming a file that cannot be decoded or is neither palette nor 8-bit grey.
    """
    mask, _ = decode(path, ("PNG",))
    if mask.mode not in ("P", "L"):
        raise UserError(
            f"mask {path} has mode {mask.mode}: save it as a palette or 8-bit grey PNG of labels, "
            "or name its ids or colours in dataset.json (docs/own_data.md)"
        )
    return mask


def decode(path: str, formats: tuple[str, ...]) -> tuple[Image.Image, bytes]:
    """The decoded image and the bytes of its file; PNG checksums are verified.

    Raises UserError naming a file that cannot be decoded.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
        image = Image.open(io.BytesIO(data), formats=formats)
        if image.format == "PNG":
            image.verify()  # the decoder skips the checksums of pixel data; this uses up the image
            image = Image.open(io.BytesIO(data), formats=formats)
        image.load()
    except Exception as error:  # a decoder raises nearly anything when a file is damaged
        raise UserError(
            f"{path} cannot be read as {' or '.join(formats)} ({error}): restore the file"
        ) from error
    return image, data
