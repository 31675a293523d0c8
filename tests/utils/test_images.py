"""Every kind of image becomes upright RGB, and what is none is named."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.checkpoints import picture
from utils.errors import UserError
from utils.images import FORMATS, read_rgb, read_size


def test_every_mode_is_read_as_it_looks(tmp_path):
    ramp = np.linspace(0, 255, 48).round().astype(np.uint8).reshape(6, 8)
    grey = np.repeat(ramp[..., None], 3, 2)
    forms = {
        "L.png": Image.fromarray(ramp),
        "16.png": Image.fromarray(ramp.astype(np.uint16) * 257),
        "16.tif": Image.fromarray(ramp.astype(np.uint16) * 257),
        "I.tif": Image.fromarray(ramp.astype(np.int32)),
        "F.tif": Image.fromarray(ramp.astype(np.float32)),
        "P.png": Image.fromarray(grey).quantize(64),
        "LA.png": Image.fromarray(ramp).convert("LA"),
        "RGBA.png": Image.fromarray(grey).convert("RGBA"),
        "CMYK.tif": Image.fromarray(grey).convert("CMYK"),
        "gif.gif": Image.fromarray(ramp),
        "webp.webp": Image.fromarray(grey),
    }
    for name, image in forms.items():
        image.save(tmp_path / name, **({"lossless": True} if name == "webp.webp" else {}))
        read = read_rgb(tmp_path / name)
        assert (read.mode, read.size) == ("RGB", (8, 6)), name
        assert abs(np.asarray(read).astype(int) - grey).max() <= 4, name
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "dark.png")  # by range, not content
    assert np.asarray(read_rgb(tmp_path / "dark.png")).max() == 1
    Image.fromarray(ramp > 127).save(tmp_path / "1.png")
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "1.png"))[..., 0], (ramp > 127) * 255)


def test_transparent_pixels_are_white(tmp_path):
    pixels = np.zeros((2, 2, 4), dtype=np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    read = np.asarray(read_rgb(tmp_path / "x.png"))
    assert read[0, 0].tolist() == [10, 20, 30]
    assert (read[1] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_image(tmp_path, orientation):
    upright = picture(24, 16)
    undo = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if undo is None else upright.transpose(undo)
    stored.save(tmp_path / "x.png", exif=exif)
    assert read_size(tmp_path / "x.png") == (24, 16)
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "x.png")), np.asarray(upright))


def test_formats_that_start_other_programs_are_not_read(tmp_path):
    assert "EPS" not in FORMATS
    picture(8, 8).save(tmp_path / "x.png", format="PCX")  # stands for all that is not listed
    for read in (read_rgb, read_size):
        with pytest.raises(UserError, match="x.png cannot be read .no JPEG, PNG"):
            read(tmp_path / "x.png")
