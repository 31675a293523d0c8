"""Masks of every kind that PNG knows, read through a table of ids or of colours."""

from __future__ import annotations

import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.files import read_mask
from dataset.labels import LabelTable
from tests.conftest import ROOT
from utils.errors import UserError

CLASSES = ["background", "road", "building"]
IDS = {"0": "background", "7": "road", "11": "building", "12": "building"}
COLOURS = {"#000000": "background", "#804080": "road", "#464646": "building"}
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # colour types of PNG
SAMPLES = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(path: Path, pixels: object, kind: int, bits: int = 8, extra: bytes = b"") -> str:
    """Encode raw samples, (H W) or (H W samples), as the PNG specification lays them out.

    Independent of Pillow, which writes neither grey of 2 or 4 bits nor colours of 16.
    """
    samples = np.array(pixels).reshape(len(pixels), -1)
    width = samples.shape[1] // SAMPLES[kind]
    wide = (samples[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    rows = np.packbits(wide.reshape(len(samples), -1).astype(np.uint8), axis=1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, len(samples), bits, kind, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(data))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b""))
    return str(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mask.png"


def read(table: LabelTable, path: str) -> list[list[int]]:
    labels = table.read(path)
    assert labels.dtype == np.uint8
    return labels.tolist()


def fails(table: LabelTable, path: str, *words: str) -> None:
    with pytest.raises(UserError) as error:
        table.read(path)
    for word in (path, *words):
        assert word in str(error.value)


class TestIds:
    table = LabelTable(IDS, CLASSES, ignore=[3, "255", 65535])

    def test_grey_of_8_bits(self, path):
        pixels = [[0, 7, 11], [12, 3, 255]]
        assert read(self.table, write_png(path, pixels, GREY)) == [[0, 1, 2], [2, 255, 255]]

    @pytest.mark.parametrize("bits", [1, 2, 4])
    def test_grey_of_fewer_bits_as_it_is_stored(self, path, bits: int):
        names = [f"class {i}" for i in range(2**bits)]
        table = LabelTable({str(i): names[-1 - i] for i in range(2**bits)}, names)
        pixels = np.arange(2**bits).reshape(2, -1)
        assert read(table, write_png(path, pixels, GREY, bits)) == pixels[::-1, ::-1].tolist()

    def test_grey_of_16_bits(self, path):
        table = LabelTable({"0": "background", "256": "road", "65535": "building"}, CLASSES)
        pixels = [[0, 256, 65535]]
        assert read(table, write_png(path, pixels, GREY, 16)) == [[0, 1, 2]]

    @pytest.mark.parametrize("bits", [4, 8])
    def test_palette_by_index(self, path, bits: int):
        palette = chunk(b"PLTE", bytes(range(100, 145)))
        pixels = [[0, 7], [11, 12]]
        assert read(self.table, write_png(path, pixels, PALETTE, bits, palette)) == [[0, 1], [2, 2]]

    @pytest.mark.parametrize(
        ("kind", "pixels"),
        [
            (RGB, [[(0, 0, 0), (7, 7, 7), (255, 255, 255)]]),
            (RGBA, [[(0, 0, 0, 255), (7, 7, 7, 255), (255, 255, 255, 255)]]),
            (GREY_ALPHA, [[(0, 255), (7, 255), (255, 255)]]),
        ],
    )
    def test_grey_in_colour(self, path, kind: int, pixels: object):
        assert read(self.table, write_png(path, pixels, kind)) == [[0, 1, 255]]

    @pytest.mark.parametrize(
        ("kind", "pixels"),
        [
            (RGB, [[(7, 7, 7), (7, 7, 0)]]),
            (RGB, [[(7, 0, 7), (7, 7, 7)]]),
            (RGBA, [[(7, 7, 7, 255), (7, 7, 7, 254)]]),
            (GREY_ALPHA, [[(7, 0), (7, 255)]]),
        ],
    )
    def test_colours_are_no_ids(self, path, kind: int, pixels: object):
        fails(self.table, write_png(path, pixels, kind), "'#rrggbb'", "grey or palette PNG")

    @pytest.mark.parametrize("kind", [RGB, GREY_ALPHA])
    def test_16_bits_per_colour_are_none(self, path, kind: int):
        fails(self.table, write_png(path, [[7] * SAMPLES[kind]], kind, 16), "16 bits", "8 bits")

    def test_an_unknown_id_names_itself_and_the_cure(self, path):
        written = write_png(path, [[7, 13, 13], [0, 13, 200]], GREY)
        fails(self.table, written, "the id 13 (3 pixels) and 1 others", "'13'", "'ignore'")
        fails(self.table, write_png(path, [[1, 1]], GREY, 1), "the id 1 (2 pixels),")
        fails(self.table, write_png(path, [[65534]], GREY, 16), "the id 65534 (1 pixels),")


class TestColours:
    table = LabelTable(COLOURS | {"#0a0B0c": "road"}, CLASSES, ignore=["#FFFFFF", "#00000000"])

    def test_rgb(self, path):
        pixels = [[(0, 0, 0), (128, 64, 128)], [(70, 70, 70), (255, 255, 255)], [(10, 11, 12)] * 2]
        expected = [[0, 1], [2, 255], [1, 1]]
        assert read(self.table, write_png(path, pixels, RGB)) == expected

    def test_rgba(self, path):
        pixels = [[(0, 0, 0, 255), (128, 64, 128, 255), (0, 0, 0, 0), (128, 64, 128, 0)]]
        assert read(self.table, write_png(path, pixels, RGBA)) == [[0, 1, 255, 255]]
        table = LabelTable({"#00000000": "background", "#80408080": "road"}, CLASSES[:2])
        assert read(table, write_png(path, [[(9, 9, 9, 0), (128, 64, 128, 128)]], RGBA)) == [[0, 1]]
        fails(table, write_png(path, [[(128, 64, 128, 129)]], RGBA), "#80408081")
        fails(table, write_png(path, [[(128, 64, 128, 255)]], RGBA), "colour #804080 ")

    @pytest.mark.parametrize("bits", [1, 2, 4, 8])
    def test_palette_by_colour(self, path, bits: int):
        """Two entries of one colour are one; those that no pixel has may be any."""
        palette = [(128, 64, 128), (70, 70, 70), (128, 64, 128), (1, 2, 3)][: 2**bits]
        extra = chunk(b"PLTE", bytes(np.array(palette, np.uint8)))
        pixels = [[0, 1, 1]] if bits == 1 else [[0, 1, 2]]
        expected = [[1, 2, 2]] if bits == 1 else [[1, 2, 1]]
        assert read(self.table, write_png(path, pixels, PALETTE, bits, extra)) == expected

    @pytest.mark.parametrize("kind", [RGB, PALETTE])
    def test_a_colour_declared_transparent_is_transparent(self, path, kind: int):
        if kind == RGB:
            extra = chunk(b"tRNS", struct.pack(">HHH", 128, 64, 128))
            pixels: object = [[(128, 64, 128), (70, 70, 70)]]
        else:
            extra = chunk(b"PLTE", bytes([128, 64, 128, 70, 70, 70])) + chunk(b"tRNS", b"\0")
            pixels = [[0, 1]]
        assert read(self.table, write_png(path, pixels, kind, 8, extra)) == [[255, 2]]

    @pytest.mark.parametrize(("bits", "white", "grey"), [(8, 255, 70), (1, 1, 0)])
    def test_grey(self, path, bits: int, white: int, grey: int):
        """A mask without colours may have been saved as grey."""
        expected = [[255, 2 if bits == 8 else 0]]
        assert read(self.table, write_png(path, [[white, grey]], GREY, bits)) == expected

    @pytest.mark.parametrize("kind", [GREY, RGB, RGBA])
    def test_16_bits_per_channel_are_no_colours(self, path, kind: int):
        fails(self.table, write_png(path, [[0] * SAMPLES[kind]], kind, 16), "16 bits", "8 bits")

    def test_an_unknown_colour_names_itself_and_the_cure(self, path):
        written = write_png(path, [[(0, 0, 0), (128, 64, 129), (128, 64, 129), (9, 9, 9)]], RGB)
        fails(self.table, written, "#804081 (2 pixels) and 1 others", "'#804081'", "'ignore'")
        fails(LabelTable(COLOURS, CLASSES), write_png(path, [[(255, 255, 255)]], RGB), "#ffffff (")


class TestAnyMask:
    def test_real_masks_by_index_and_by_colour(self, photographs, path):
        """Palette PNGs of clothes; as RGB their colours mean the same."""
        masks = sorted((photographs / "PascalVOC12" / "SegmentationClassAug").glob("*.png"))[:20]
        names = [f"class {i}" for i in range(21)]
        palette = read_mask(str(masks[0])).getpalette()
        colours = ["#" + bytes(palette[3 * i : 3 * i + 3]).hex() for i in range(21)]
        by_id = LabelTable({str(i): name for i, name in enumerate(names)}, names, ["255"])
        by_colour = LabelTable(dict(zip(colours, names, strict=True)), names, ["#e0e0c0"])
        for mask in masks:
            expected = np.asarray(read_mask(str(mask)))
            Image.open(mask).convert("RGB").save(path)
            assert np.array_equal(by_id.read(str(mask)), expected)
            assert np.array_equal(by_colour.read(str(mask)), expected)
            assert np.array_equal(by_colour.read(str(path)), expected)

    @pytest.mark.parametrize("seed", range(5))
    def test_every_pixel_is_looked_up(self, path, seed: int):
        """Random tables of random size against a dict, pixel by pixel; also in another process."""
        rng = np.random.default_rng(seed)
        number = int(rng.integers(2, 255))
        names = [f"class {i}" for i in range(number)]
        colours = rng.choice(2**24, 300, replace=False)
        keys = [f"#{colour:06x}" for colour in colours]
        meant = [*range(number), *rng.integers(0, number, 280 - number).tolist()] + [255] * 20
        labels = {key: names[i] for key, i in zip(keys[:280], meant, strict=False)}
        table = LabelTable(labels, names, ignore=keys[280:])
        chosen = rng.integers(0, 300, (40, 50))
        rgb = np.stack([colours >> 16, colours >> 8, colours], 1).astype(np.uint8)[chosen]
        Image.fromarray(rgb).save(path)
        expected = [[meant[i] for i in row] for row in chosen]
        assert read(table, str(path)) == expected
        assert read(pickle.loads(pickle.dumps(table)), str(path)) == expected

    @pytest.mark.parametrize(
        "kind", ["cut", "flipped", "short", "JPEG", "empty", "missing", "folder"]
    )
    def test_a_damaged_file_is_told_as_other_masks_are(self, path, kind: str):
        rng = np.random.default_rng(0)
        Image.fromarray(rng.integers(0, 2, (40, 50), np.uint8) * 7).save(path)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        if kind == "short":  # sound checksums around too few pixels
            write_png(path, [[0]], GREY, extra=chunk(b"IDAT", b""))
            content = path.read_bytes().replace(chunk(b"IDAT", zlib.compress(b"\0\0")), b"")
            path.write_bytes(content)
        elif kind == "JPEG":
            Image.new("L", (8, 8)).save(path, "JPEG")
        elif kind in ("missing", "folder"):
            path.unlink()
            if kind == "folder":
                path.mkdir()
        else:
            path.write_bytes({"cut": data[:60], "flipped": data, "empty": b""}[kind])
        with pytest.raises(UserError) as wanted:
            read_mask(str(path))
        with pytest.raises(UserError) as found:
            LabelTable(IDS, CLASSES).read(str(path))
        assert str(path) in str(found.value)
        # An address in memory differs from call to call.
        assert str(found.value).split("<")[0] == str(wanted.value).split("<")[0]


@pytest.mark.parametrize(
    ("labels", "ignore", "words"),
    [
        ({"07": "road"}, [], "'07'"),
        ({"65536": "road"}, [], "'65536'"),
        ({"-1": "road"}, [], "'-1'"),
        ({"٣": "road"}, [], "'0' to '65535'"),
        ({"road": "7"}, [], "'0' to '65535'"),
        ({"#80408": "road"}, [], "'#80408'"),
        ({"#80408g": "road"}, [], "'#80408g'"),
        ({"#804080f": "road"}, [], "'#804080f'"),
        (IDS | {"#804080": "road"}, [], "ids or colours throughout"),
        (IDS, ["#804080"], "'#804080'"),
        (COLOURS, [0], "'0'"),
        (IDS, [True], "'True'"),
        (IDS, [7], "'7' stands twice"),
        (IDS, [3, "3"], "'3' stands twice"),
        ({"#AABBCC": "road", "#aabbccFF": "building"}, [], "'#aabbccFF' stands twice"),
        ({"#aabbcc00": "road", "#00000000": "building"}, [], "'#00000000' stands twice"),
        (IDS | {"13": "rode"}, [], "'13' to 'rode'"),
        ({"0": "background", "1": "road"}, [], "class 'building'"),
        ({}, [], "class 'road'"),
    ],
)
def test_a_wrong_table_names_its_first_fault(labels, ignore, words: str):
    with pytest.raises(UserError) as error:
        LabelTable(labels, CLASSES, ignore)
    assert words in str(error.value)


def test_it_needs_no_torch():
    """`dataset.json` is checked by programs that parse and nothing more."""
    code = "import runpy, sys; runpy.run_path('dataset/labels.py'); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "False\n"


def test_the_first_class_needs_no_id(path):
    table = LabelTable({"1": "road", "2": "building"}, CLASSES)
    assert read(table, write_png(path, [[2, 1]], GREY)) == [[2, 1]]


def test_254_classes_are_the_most(path):
    """254 marks what is unknown, 255 what is ignored."""
    names = [f"class {i}" for i in range(255)]
    table = LabelTable({str(i): names[i] for i in range(254)}, names[:254], ignore=[254])
    assert read(table, write_png(path, [[253, 254]], GREY)) == [[253, 255]]
    with pytest.raises(UserError, match="at most 254"):
        LabelTable({str(i): names[i] for i in range(255)}, names)
