"""Pictures for people: colour maps, sample panels, confusion matrices. Arrays in, arrays out."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.constants import IGNORE_INDEX
from utils.files import atomic_write

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

WHITE = (255, 255, 255)
INK = (32, 32, 32)
PALE = (236, 236, 236)  # a row of the confusion matrix that has no pixel
GAP = 8  # pixels between neighbouring things
# Tiles of a panel: small images are enlarged until text beside them reads well, huge ones shrunk.
TILE_MIN, TILE_MAX = 224, 640
TITLE_MIN = 130  # room for the title over a narrow tile
# Share of a row of the confusion matrix -> colour, straight lines in between.
HEAT = ((247, 251, 255), (158, 202, 225), (49, 130, 189), (8, 48, 107))


def palette(order: Sequence[int] | None = None) -> np.ndarray:
    """(256, 3) uint8 colours by label: the map of PASCAL VOC, where void (255) is (224, 224, 192).

    With `order`, entry i is the colour of label order[i], so a map of head channels gets the
    colours of the dataset; entries beyond it are those of void.
    """
    labels = np.arange(256)
    colors = np.zeros((256, 3), dtype=np.uint8)
    # Bit 3k+c of a label becomes bit 7-k of colour channel c: near labels get far colours.
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= ((labels >> (3 * bit + channel) & 1) << (7 - bit)).astype(
                np.uint8
            )
    if order is None:
        return colors
    return colors[[*order, *[IGNORE_INDEX] * (256 - len(order))]]


def colorize(labels: np.ndarray, colors: np.ndarray | None = None) -> np.ndarray:
    """Labels H W in 0..255 -> uint8 H W 3. `colors`: (256, 3), the VOC map by default."""
    return (palette() if colors is None else colors)[labels]


def sample_panel(
    image: np.ndarray,
    truth: np.ndarray,
    prediction: np.ndarray,
    class_names: Sequence[str],
    *,
    before: np.ndarray | None = None,
    colors: np.ndarray | None = None,
) -> np.ndarray:
    """image | truth | prediction under their titles, with a legend of the classes that occur.

    Args:
        image: uint8 H W 3. truth, prediction: H W, labels 0..255, 255 = ignored.
        class_names: by label. colors: (256, 3) by label, the VOC map by default.
        before: H W, an earlier prediction such as the teacher's, shown before the prediction.

    Returns:
        uint8 H' W' 3.
    """
    maps = {"truth": truth, "prediction": prediction}
    if before is not None:
        maps = {"truth": truth, "prediction before": before, "prediction after": prediction}
    tiles = {"image": _tile(image, Image.Resampling.BICUBIC)}
    for title, labels in maps.items():
        tiles[title] = _tile(colorize(labels, colors), Image.Resampling.NEAREST)
    row = _titled_row(tiles)
    legend = class_legend(list(maps.values()), class_names, colors, row.width - 2 * GAP)
    panel = Image.new("RGB", (row.width, row.height + legend.height + 2 * GAP), WHITE)
    panel.paste(row, (0, 0))
    panel.paste(legend, (GAP, row.height + GAP))
    return np.array(panel)


def stacked(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures, uint8 H W 3 of any widths, below each other on white."""
    width = max(picture.shape[1] for picture in pictures)
    padded = [
        np.pad(p, ((0, GAP), (0, width - p.shape[1]), (0, 0)), constant_values=255)
        for p in pictures
    ]
    return np.concatenate(padded)


def save_png(path: Path, picture: np.ndarray) -> None:
    """Write uint8 H W 3 atomically. Raises UserError where the disk does not take it."""
    with atomic_write(path) as file:
        Image.fromarray(picture).save(file, "PNG")


def confusion_figure(confusion: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """Heat map of a (C, C) matrix of counts, rows = truth, each row divided by its sum.

    Up to 30 classes every cell above half a percent carries its percentage, beyond that a scale
    explains the colours; a row without ground truth is grey. Margins grow with the longest of
    the first C `class_names`.

    Returns:
        uint8 H W 3; for C = 151 about 2,100 pixels wide.
    """
    count = len(confusion)
    names = [_drawable(class_names[i], i) for i in range(count)]
    cell = min(max(840 // count, 13), 64)
    font, axis_font = font_of(min(cell - 2, 14)), font_of(16)
    margin = max(int(font.getlength(name)) for name in names) + GAP
    axis = line_height(axis_font) + GAP
    left, top, side = axis + margin, axis + GAP, count * cell
    width = left + max(side, 170) + 2 * GAP
    figure = Image.new("RGB", (width, top + side + margin + axis), WHITE)
    draw = ImageDraw.Draw(figure)
    title = "share of the true class, %"
    draw.text((left, axis / 2), title, INK, axis_font, anchor="lm")
    bottom = (left + side / 2, figure.height - axis / 2)
    draw.text(bottom, "prediction", INK, axis_font, anchor="mm")
    _rotated(figure, "truth", (axis // 2, top + side // 2), axis_font, anchor="mm")
    totals = confusion.sum(axis=1, keepdims=True)
    shares = confusion / np.maximum(totals, 1)
    heat = _heat(shares)
    heat[totals[:, 0] == 0] = PALE
    cells = Image.fromarray(heat).resize((side, side), Image.Resampling.NEAREST)
    figure.paste(cells, (left, top))
    _grid(draw, (left, top), count, cell)
    _axis_names(figure, names, (left, top), cell, font)
    if count <= 30:
        _numbers(draw, shares, (left, top), cell)
    else:
        _scale(figure, (left + int(axis_font.getlength(title)) + 3 * GAP, axis // 2), axis_font)
    return np.array(figure)


def _titled_row(tiles: Mapping[str, Image.Image]) -> Image.Image:
    """Pictures of one size side by side, each below its title."""
    size = next(iter(tiles.values())).size
    font = font_of(15)
    width, top = max(size[0], TITLE_MIN), line_height(font) + GAP
    row = Image.new("RGB", (len(tiles) * (width + GAP) + GAP, top + size[1]), WHITE)
    draw = ImageDraw.Draw(row)
    for i, (title, tile) in enumerate(tiles.items()):
        left = GAP + i * (width + GAP)
        draw.text((left + width / 2, top / 2), title, INK, font, anchor="mm")
        row.paste(tile, (left + (width - size[0]) // 2, top))
    return row


def _heat(shares: np.ndarray) -> np.ndarray:
    """Shares in [0, 1] -> uint8 colours, one more axis of 3."""
    stops = np.linspace(0, 1, len(HEAT))
    channels = [np.interp(shares, stops, values) for values in zip(*HEAT, strict=True)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _grid(draw: ImageDraw.ImageDraw, corner: tuple[int, int], count: int, cell: int) -> None:
    """Lines between the cells, fainter the smaller these are, and a frame."""
    left, top = corner
    side = count * cell
    for i in range(1, count):
        draw.line((left + i * cell, top, left + i * cell, top + side), PALE)
        draw.line((left, top + i * cell, left + side, top + i * cell), PALE)
    draw.rectangle((left, top, left + side, top + side), outline=(150, 150, 150))


def _axis_names(
    figure: Image.Image, names: Sequence[str], corner: tuple[int, int], cell: int, font: Font
) -> None:
    """Names left of the rows and, upwards, below the columns."""
    draw = ImageDraw.Draw(figure)
    left, top = corner
    for i, name in enumerate(names):
        at = int((i + 0.5) * cell)
        draw.text((left - GAP / 2, top + at), name, INK, font, anchor="rm")
        below = (left + at, top + len(names) * cell + GAP // 2)
        _rotated(figure, name, below, font, anchor="rm")


def _numbers(
    draw: ImageDraw.ImageDraw, shares: np.ndarray, corner: tuple[int, int], cell: int
) -> None:
    """Percentages in the cells; nothing where it would be 0."""
    font = font_of(max(int(cell * 0.36), 10))
    for row, column in np.argwhere(shares >= 0.005):
        share = shares[row, column]
        at = (corner[0] + (column + 0.5) * cell, corner[1] + (row + 0.5) * cell)
        draw.text(at, f"{100 * share:.0f}", WHITE if share > 0.5 else INK, font, anchor="mm")


def _scale(figure: Image.Image, at: tuple[int, int], font: Font) -> None:
    """The colours from 0 to 100 percent, `at` being the middle of the left end."""
    bar = Image.fromarray(_heat(np.tile(np.linspace(0, 1, 160), (14, 1))))
    draw = ImageDraw.Draw(figure)
    left = at[0] + int(font.getlength("0")) + GAP
    draw.text(at, "0", INK, font, anchor="lm")
    figure.paste(bar, (left, at[1] - bar.height // 2))
    draw.text((left + bar.width + GAP, at[1]), "100", INK, font, anchor="lm")


def _rotated(
    figure: Image.Image, text: str, at: tuple[int, int], font: Font, *, anchor: str
) -> None:
    """Writes `text` upwards: "mm" puts its centre, "rm" the middle of its last letter, at `at`."""
    width, height = int(font.getlength(text)) + 2, line_height(font)
    line = Image.new("L", (width, height))
    ImageDraw.Draw(line).text((width / 2, height / 2), text, 255, font, anchor="mm")
    line = line.rotate(90, expand=True)
    top = at[1] - line.height // 2 if anchor == "mm" else at[1]
    figure.paste(INK, (at[0] - line.width // 2, top), line)


def class_legend(
    maps: Sequence[np.ndarray],
    class_names: Sequence[str],
    colors: np.ndarray | None,
    width: int,
) -> Image.Image:
    """Swatch and name of every label in `maps`, line after line within `width` pixels."""
    font = font_of(14)
    swatch, line = 14, line_height(font) + GAP // 2
    entries = []
    left = top = 0
    for label in sorted({int(label) for labels in maps for label in np.unique(labels)}):
        name = shortened(_label_name(label, class_names), width - swatch - GAP, font)
        step = swatch + GAP // 2 + int(font.getlength(name)) + 2 * GAP
        if left and left + step > width + 2 * GAP:
            left, top = 0, top + line
        entries.append((left, top, label, name))
        left += step
    legend = Image.new("RGB", (width, top + line), WHITE)
    draw = ImageDraw.Draw(legend)
    for left, top, label, name in entries:
        color = tuple(colorize(np.array(label), colors).tolist())
        box = (left, top + 1, left + swatch, top + 1 + swatch)
        draw.rectangle(box, fill=color, outline=(120, 120, 120))
        draw.text((left + swatch + GAP // 2, top + 1 + swatch / 2), name, INK, font, anchor="lm")
    return legend


def _label_name(label: int, class_names: Sequence[str]) -> str:
    if label == IGNORE_INDEX:
        return "ignored"
    return _drawable(class_names[label] if label < len(class_names) else "", label)


def _drawable(name: str, index: int) -> str:
    """The name in the letters that Pillow's own font has; `class <index>` if none is left."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().strip()
    return plain or f"class {index}"


def shortened(text: str, width: int, font: Font) -> str:
    """`text`, its end replaced by three dots if it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _tile(pixels: np.ndarray, resampling: Image.Resampling) -> Image.Image:
    """The picture at a size that suits a panel; small ones grow by a whole factor, which is kind
    to the edges of label maps."""
    tile = Image.fromarray(pixels)
    side = max(tile.size)
    factor = -(-TILE_MIN // side) if side < TILE_MIN else min(1, TILE_MAX / side)
    size = (max(1, round(tile.width * factor)), max(1, round(tile.height * factor)))
    return tile if factor == 1 else tile.resize(size, resampling)


def font_of(size: int) -> Font:
    return ImageFont.load_default(size)


def line_height(font: Font) -> int:
    left, top, right, bottom = font.getbbox("Ag")
    return int(bottom) + 2
