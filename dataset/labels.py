"""Masks as they come: ids or colours of any numbering, read as positions of classes.

    {"7": "road", "8": "road", "11": "building"}      ids of a mask's pixels, 0 to 65535
    {"#804080": "road", "#464646": "building"}        or their colours

Several may mean one class. What the table does not name is an error, unless it is to be ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image

from dataset.files import decode
from utils.constants import IGNORE_INDEX
from utils.errors import UserError

ID = re.compile("0|[1-9][0-9]{0,4}")
UNKNOWN = 254  # stands, while a mask is read, for what the table does not have
COLOUR = re.compile("#[0-9a-f]{6}([0-9a-f]{2})?", re.IGNORECASE)


class LabelTable:
    """What the ids or the colours of a data set's masks mean.

    `LabelTable({"7": "road", "11": "wall"}, ["road", "wall"], ignore=[0, 255])` reads 7 as 0 and 11
    as 1. Colours are `#rrggbb`, or `#rrggbbaa` where masks are partly transparent; all that is
    fully transparent is `#00000000`.

    Args:
        labels: Id or colour → name of its class; either ids or colours throughout.
        classes: Names by position, at most 254. Each needs an id or a colour, except the first,
            which may name pixels that no mask labels.
        ignore: Ids or colours of pixels that belong to no class.

    Raises UserError, naming the first entry that is wrong.
    """

    def __init__(
        self, labels: Mapping[str, str], classes: Sequence[str], ignore: Iterable[int | str] = ()
    ) -> None:
        positions = {name: position for position, name in enumerate(classes)}
        if len(classes) > UNKNOWN:
            raise UserError(f"{len(classes)} classes: at most {UNKNOWN} are possible")
        self.by_colour = any(key.startswith("#") for key in labels)
        self._name = "colors" if self.by_colour else "labels"  # the key of dataset.json
        table: dict[int, int] = {}
        ignored = [(str(key), None) for key in ignore]
        for key, name in [*labels.items(), *ignored]:
            code = self._parse(key)
            if code in table:
                raise UserError(
                    f"{key!r} stands twice in {self._name!r} and 'ignore': name it once"
                )
            if name is not None and name not in positions:
                raise UserError(
                    f"{self._name!r} maps {key!r} to {name!r}: use one of 'classes', "
                    f"or list {key!r} under 'ignore'"
                )
            table[code] = IGNORE_INDEX if name is None else positions[name]
        if unnamed := sorted({*positions.values()} - {0, *table.values()}):
            raise UserError(
                f"class {classes[unnamed[0]]!r} has no entry in {self._name!r}: add one, or leave "
                "the class out"
            )
        self.entries = tuple(sorted(table.items()))  # by which two tables are compared
        self._keys = np.array(sorted(table), dtype=np.uint32)
        self._positions = np.array([table[code] for code in sorted(table)], dtype=np.uint8)
        if not self.by_colour:  # few enough to have one entry for each that there may be
            every = np.full(2**16, UNKNOWN, dtype=np.uint8)
            every[self._keys] = self._positions
            self._positions = every

    @property
    def void(self) -> int | None:
        """255 if the table ignores anything, else None: the label that pixels of no class get."""
        return IGNORE_INDEX if IGNORE_INDEX in dict(self.entries).values() else None

    def read(self, path: str) -> np.ndarray:
        """The PNG mask at `path` as uint8 (H W): positions of classes, 255 where ignored.

        Ids are the grey values of 1 to 16 bits, also where grey is stored as opaque RGB or RGBA, or
        the indices of a palette. Colours are those of RGB, RGBA, grey up to 8 bits or a palette.

        Raises UserError for a file that cannot be decoded, a mask of the wrong kind, and an id or a
        colour that the table does not have.
        """
        image, data = decode(path, ("PNG",))
        bits = data[24]  # per channel: of the header, which is the first chunk
        if bits == 16 and (self.by_colour or not image.mode.startswith("I")):
            raise UserError(
                f"mask {path} has 16 bits per channel: save colours with 8 bits, ids as grey"
            )
        codes = _colours(image) if self.by_colour else _ids(image, bits, path)
        labels = self._look_up(codes)
        unknown = labels == UNKNOWN
        if unknown.any():
            raise self._unknown(path, codes[unknown])
        return labels

    def _look_up(self, codes: np.ndarray) -> np.ndarray:
        """Pixels (H W) → uint8 (H W): positions of classes, 255 or UNKNOWN."""
        if not self.by_colour:
            return self._positions[codes]
        nearest = self._keys.searchsorted(codes)
        known = self._keys.take(nearest, mode="clip") == codes
        return np.where(known, self._positions.take(nearest, mode="clip"), np.uint8(UNKNOWN))

    def _parse(self, key: str) -> int:
        """The number that stands for an id or a colour in arrays of pixels."""
        if self.by_colour and COLOUR.fullmatch(key):
            rgba = bytes.fromhex(key[1:].ljust(8, "f"))
            return int(np.frombuffer(rgba, np.uint32)[0]) if rgba[3] else 0
        if not self.by_colour and ID.fullmatch(key) and int(key) < 2**16:
            return int(key)
        wanted = "colours as '#rrggbb'" if self.by_colour else "ids from '0' to '65535'"
        raise UserError(
            f"{key!r} in {self._name!r} or 'ignore' is wrong: use {wanted}, either ids or colours "
            "throughout"
        )

    def _unknown(self, path: str, codes: np.ndarray) -> UserError:
        """The error for pixels (N,) that the table does not have; it names the most frequent."""
        values, counts = np.unique(codes, return_counts=True)
        most = int(counts.argmax())
        kind, name = "id", str(values[most])
        if self.by_colour:
            kind, name = "colour", "#" + values[most].tobytes().hex().removesuffix("ff")
        others = f" and {len(values) - 1} others" if len(values) > 1 else ""
        return UserError(
            f"mask {path} holds the {kind} {name} ({counts[most]} pixels){others}, unknown to the "
            f"table: add {name!r} with its class to {self._name!r}, or to 'ignore', or "
            "correct the mask"
        )


def _colours(image: Image.Image) -> np.ndarray:
    """(H W) uint32: the bytes red, green, blue and alpha of each pixel; 0 if transparent."""
    rgba = np.array(image.convert("RGBA"))
    codes = rgba.view(np.uint32)[..., 0]
    if image.has_transparency_data:
        codes[rgba[..., 3] == 0] = 0
    return codes


def _ids(image: Image.Image, bits: int, path: str) -> np.ndarray:
    """(H W) uint8 or uint16: grey values as they are stored, or palette indices."""
    if image.mode not in ("LA", "RGB", "RGBA"):
        values = np.asarray(image, np.uint16)
        stretched = image.mode == "L" and bits < 8  # the decoder makes 0 .. 255 of 2 and 4 bits
        return values // (255 // (2**bits - 1)) if stretched else values
    rgba = np.asarray(image.convert("RGBA"))
    grey = rgba[..., 0]
    if (rgba[..., 1:3] != grey[..., None]).any() or (rgba[..., 3] != 255).any():
        raise UserError(
            f"mask {path} has colours or is transparent, but 'labels' names ids: name colours as "
            "'#rrggbb' there, or save the mask as grey or palette PNG of ids"
        )
    return grey
