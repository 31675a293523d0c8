"""The files of a data set: found below its folder only, and read whole or refused."""

import io
import os
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from utils.errors import UserError


class Sample(NamedTuple):
    """Paths of an image and of its mask."""

    image: str
    mask: str


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


def read_image(path: str) -> Image.Image:
    """The decoded JPEG or PNG as RGB. Raises UserError naming a file that cannot be decoded."""
    image = _decode(path, ("JPEG", "PNG"))
    return image if image.mode == "RGB" else image.convert("RGB")


def read_mask(path: str) -> Image.Image:
    """The decoded PNG mask; its pixels are labels.

    Raises UserError naming a file that cannot be decoded or is neither palette nor 8-bit grey.
    """
    mask = _decode(path, ("PNG",))
    if mask.mode not in ("P", "L"):
        raise UserError(
            f"mask {path} has mode {mask.mode}: save it as a palette or 8-bit grey PNG of labels"
        )
    return mask


def _decode(path: str, formats: tuple[str, ...]) -> Image.Image:
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
    return image
