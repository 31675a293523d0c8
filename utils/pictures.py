"""Pictures for people: panels of samples, overlays, confusion matrices, curves over the steps.

matplotlib draws text, legends and axes, at 72 dots per inch: points of fonts and lines are pixels.
"""

from __future__ import annotations

import functools
import io
import logging
import os
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils.constants import BACKGROUND, IGNORE_INDEX
from utils.errors import UserError
from utils.files import atomic_write

INK, PALE, ORANGE = "#202020", "#ececec", "#b34700"  # text; rows without pixels; new classes
GAP, LINE = 8, 25  # pixels between neighbouring things; of a line of text
TEXT = {"transform": None, "va": "top", "size": 15, "color": INK}  # placed by pixels
# Tiles of a panel: small images are enlarged until text beside them reads well, huge ones shrunk.
TILE_MIN, TILE_MAX = 224, 640
TITLE_MIN = 130  # pixels for the title over a narrow tile
OVERLAY_MIN, OVERLAY_MAX = 360, 1280  # pixels of the longer side of an overlay
STRENGTH = 0.55  # of a class colour over the image
USUAL = "DejaVu Sans"  # comes with matplotlib

# Up to PI the colours of Okabe & Ito (2008), which colour-blind people tell apart, yellow darker.
METHOD_COLORS = {
    "MIB": "#0072b2", "FT": "#000000", "LWF": "#d55e00", "LWF-MC": "#e69f00", "ILT": "#009e73",
    "EWC": "#cc79a7", "RW": "#56b4e9", "PI": "#b5a800", "PLOP": "#7b3294", "MIB+EWF": "#8c510a",
    "PLOP+EWF": "#b58fd0", "PLOP+LGKD": "#c51b1b", "none": "#7f7f7f",
}  # fmt: skip
OTHER_COLORS = ("#1b7837", "#40004b", "#5ab4ac", "#bf812d", "#e7298a")
DASHES, MARKERS = ("-", "--", ":", "-."), "os^Dv"  # runs of one colour differ in these

# Kinds of files for charts -> the field to leave out, or else equal charts give different files.
UNDATED: dict[str, Any] = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}

Figure = Any  # matplotlib.figure.Figure, which is imported late
Point = tuple[int, float, float]  # step, mean, standard deviation (nan for one seed)


@dataclass(frozen=True)
class Curves:
    """A run's scores over the steps, in percent, by the title of their chart.

    The charts of a run have the same steps; nan is a score that does not exist.
    """

    label: str
    method: str
    points: Mapping[str, Sequence[Point]]


def palette(order: Sequence[int] | None = None) -> np.ndarray:
    """(256, 3) uint8 colours by label: the map of PASCAL VOC, where void (255) is (224, 224, 192).

    With `order`, entry i is the colour of label order[i], so a map of head channels gets the
    colours of the dataset; entries beyond it are those of void.
    """
    labels, channel = np.arange(256)[:, None], np.arange(3)
    # Bit 3k+c of a label becomes bit 7-k of colour channel c: near labels get far colours.
    bits = [(labels >> (3 * k + channel) & 1) << (7 - k) for k in range(3)]
    colors = np.sum(bits, axis=0).astype(np.uint8)
    order = range(256) if order is None else order
    return colors[[*order, *[IGNORE_INDEX] * (256 - len(order))]]


def colorize(labels: np.ndarray, colors: np.ndarray | None = None) -> np.ndarray:
    """Labels H W in 0..255 -> uint8 H W 3. `colors`: (256, 3), the VOC map by default."""
    return (palette() if colors is None else colors)[labels]


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


def sample_panel(
    image: np.ndarray, maps: Mapping[str, np.ndarray], class_names: Sequence[str], *,
    colors: np.ndarray | None = None, title: str = "", old: int | None = None,
) -> np.ndarray:  # fmt: skip
    """An image, then label maps of it, above a legend of the classes that occur: uint8 H' W' 3.

    Args:
        image: uint8 H W 3.
        maps: what stands above a map -> H W, labels 0..255, 255 = ignored.
        class_names: by label. colors: (256, 3) by label, the VOC map by default.
        title: a line above all, such as the run and its step.
        old: labels from this one on are new classes, marked as such. None: no such division.
    """
    tiles = {"image": _tile(image, Image.Resampling.BICUBIC)}
    for name, labels in maps.items():
        tiles[name] = _tile(colorize(labels, colors), Image.Resampling.NEAREST)
    height, width = tiles["image"].shape[:2]
    column = max(width, TITLE_MIN) + GAP
    figure = _figure(len(tiles) * column + GAP, 1)
    bottom = _class_legend(figure, list(maps.values()), class_names, colors, old)
    total = bottom + height + LINE
    for i, name in enumerate(tiles):
        figure.text((i + 0.5) * column + GAP / 2, total - GAP / 2, name, ha="center", **TEXT)
    if title:
        total += LINE
        figure.text(GAP, total - GAP / 2, _shown(title), **TEXT, **_font([title]))
    picture = _pixels(figure, total)
    for i, tile in enumerate(tiles.values()):
        left = GAP + i * column + (column - GAP - width) // 2
        picture[total - bottom - height : total - bottom, left : left + width] = tile
    return picture


def overlay(
    image: np.ndarray, labels: np.ndarray, class_names: Sequence[str],
    colors: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """The image tinted and outlined by its labels, above a legend of them, as uint8 H' W' 3.

    Label 0 keeps the image's own colours. Small images grow and large ones shrink until the legend
    reads well beside them.

    Args:
        image: uint8 H W 3. labels: H W, 0..255. class_names: by label.
        colors: (256, 3) by label, the VOC map by default.
    """
    side = max(image.shape[:2])
    factor = min(max(side, OVERLAY_MIN), OVERLAY_MAX) / side
    size = (max(1, round(factor * image.shape[1])), max(1, round(factor * image.shape[0])))
    pixels = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    labels = np.asarray(Image.fromarray(labels.astype(np.uint8)).resize(size, 0))  # nearest
    tint = STRENGTH * (labels != BACKGROUND)[..., None]
    pixels = np.rint((1 - tint) * pixels + tint * colorize(labels, colors)).astype(np.uint8)
    pixels[:, :-1][labels[:, :-1] != labels[:, 1:]] = 255
    pixels[:-1][labels[:-1] != labels[1:]] = 255
    shown = labels[labels != BACKGROUND]
    figure = _figure(max(size[0], OVERLAY_MIN), 1)
    bottom = _class_legend(figure, [shown if shown.size else labels], class_names, colors, None)
    picture = _pixels(figure, size[1] + bottom)
    left = (picture.shape[1] - size[0]) // 2
    picture[: size[1], left : left + size[0]] = pixels
    return picture


def confusion_figure(
    confusion: np.ndarray, class_names: Sequence[str], *, title: str = "", old: int | None = None
) -> np.ndarray:
    """Heat map of a (C, C) matrix of counts, each row divided by its sum, as uint8 H W 3.

    Up to 30 classes every cell above half a percent carries its percentage, beyond that a scale
    explains the colours; a row without ground truth is grey. Margins grow with the longest of
    the first C `class_names`, of which 120 characters are shown. C = 151 takes 2,200 pixels.

    Args:
        confusion: (C, C) counts, rows = truth. class_names: by channel.
        title: a line above all, such as the run and its step.
        old: channels from this one on are new classes: their names and the lines before them are
            orange. None: no such division.
    """
    buffer = io.BytesIO()
    _confusion(confusion, class_names, title, old).savefig(
        buffer, bbox_inches="tight", pad_inches=GAP / 72, pil_kwargs={"compress_level": 1}
    )
    return np.array(Image.open(buffer).convert("RGB"))


def chart_kind(path: Path) -> str:
    """The kind of file that a chart's name asks for, such as .pdf. Raises UserError for others."""
    kind = path.suffix.lower()
    if kind not in UNDATED:
        raise UserError(f"cannot draw {path}: its name must end in {', '.join(UNDATED)}")
    return kind


def save_charts(path: Path, charts: Mapping[str, Sequence[Curves]], ylabel: str) -> None:
    """Write rows of charts as what the suffix of `path` says: .png, .pdf or .svg.

    Equal curves give equal files. A method has one colour everywhere; several runs of a method
    differ in dashes and markers. Standard deviations are drawn as error bars.

    `charts`: title of a row -> its runs, all with the same charts; `ylabel`: what is drawn.
    Raises UserError for another suffix, or a disk that does not take the file.
    """
    kind = chart_kind(path)
    figure = _charts(charts, ylabel)
    # Ids in an SVG are random without a salt; fonts of type 42 keep the text of a PDF searchable.
    settings = {"svg.hashsalt": "charts", "pdf.fonttype": 42}
    with _matplotlib().rc_context(settings), atomic_write(path) as file:
        figure.savefig(file, format=kind[1:], dpi=144, bbox_inches="tight", metadata=UNDATED[kind])


def _confusion(
    confusion: np.ndarray, class_names: Sequence[str], title: str, old: int | None
) -> Figure:
    """The matrix fills the figure; what belongs around it stands out."""
    count = len(confusion)
    cell = min(max(840 // count, 13), 64)
    figure = _figure(count * cell, count * cell)
    axes = figure.add_axes((0, 0, 1, 1))
    totals = confusion.sum(axis=1, keepdims=True)
    shares = np.where(totals > 0, 100 * confusion / np.maximum(totals, 1), np.nan)
    blues = _matplotlib().colormaps["Blues"].with_extremes(bad=PALE)
    heat = axes.imshow(shares, blues, vmin=0, vmax=100, interpolation="nearest")
    axes.hlines(np.arange(1, count) - 0.5, -0.5, count - 0.5, PALE, linewidth=1)
    axes.vlines(np.arange(1, count) - 0.5, -0.5, count - 0.5, PALE, linewidth=1)
    names = [_class_name(i, class_names) for i in range(count)]
    axes.set_xticks(range(count), names, rotation=90)
    axes.set_yticks(range(count), names)
    axes.tick_params(length=0, pad=GAP / 2)
    font = {"size": min(cell - 2, 14), **_font(names)}
    for i, label in enumerate(axes.get_xticklabels() + axes.get_yticklabels()):
        label.set(color=INK if old is None or i % count < old else ORANGE, **font)
    header = [_shown(title), "share of the true class, %"][not title :]
    if old is not None:
        header[-1] += "; new classes orange"
        axes.axhline(old - 0.5, color=ORANGE, linewidth=2)
        axes.axvline(old - 0.5, color=ORANGE, linewidth=2)
    axes.set_title("\n".join(header), loc="left", size=16, pad=GAP, **_font(header))
    axes.set_xlabel("prediction", size=16)
    axes.set_ylabel("truth", size=16)
    if count > 30:
        scale = figure.add_axes((1 + 2 / count, 0.2, 1.5 / count, 0.6))
        figure.colorbar(heat, scale).ax.tick_params(labelsize=14)
        return figure
    for row, column in np.argwhere(shares >= 0.5):
        share, at = shares[row, column], {"ha": "center", "va": "center"}
        color = "white" if share > 50 else INK
        axes.text(column, row, f"{share:.0f}", color=color, size=max(int(cell * 0.36), 10), **at)
    return figure


def _charts(charts: Mapping[str, Sequence[Curves]], ylabel: str) -> Figure:
    runs = {(run.label, run.method): run for some in charts.values() for run in some}
    titles = list(next(iter(runs.values())).points)
    names = [_shown(label) for label, _ in runs]
    columns = min(4, max(1, 120 // (10 + max(map(len, names)))))
    height = 300 * len(charts) + LINE * -(-len(names) // columns)
    figure = _figure(960, height, layout="constrained")
    grid = figure.subplots(len(charts), len(titles), sharex="row", sharey="row", squeeze=False)
    styles, lines = _styles(list(runs)), {}
    for row, (setting, some) in zip(grid, charts.items(), strict=True):
        for axes, title in zip(row, titles, strict=True):
            for i, run in enumerate(some):
                key, (at, *y) = (run.label, run.method), np.transpose(run.points[title])
                at = at + 0.4 * (i + 0.5) / len(some) - 0.2  # equal values beside each other
                lines[key] = axes.errorbar(at, *y, capsize=4, clip_on=False, **styles[key])
            axes.set_title(title, size=14, loc="left")
            axes.set_xlabel("step", size=13)
            axes.grid(color=PALE)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_title(f"{_shown(setting)}\n{titles[0]}", size=14, loc="left", **_font([setting]))
        row[0].set_ylabel(ylabel, size=13)
        steps = sorted({step for run in some for step, *_ in run.points[titles[0]]})
        row[0].set_xticks(steps[:: -(-len(steps) // 12)])
        row[0].set(xlim=(steps[0] - 0.3, steps[-1] + 0.3), ylim=(0, 1.05 * row[0].get_ylim()[1]))
    _legend(figure, list(lines.values()), names, columns, loc="outside lower left", fontsize=13,
            handlelength=3)  # fmt: skip
    return figure


def _styles(runs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], dict[str, Any]]:
    """How to draw the run of each label and method."""
    styles, drawn = {}, Counter[str]()
    for label, method in runs:
        color = METHOD_COLORS.get(method) or OTHER_COLORS[zlib.crc32(method.encode()) % 5]
        dashes, marker = DASHES[drawn[color] % 4], MARKERS[drawn[color] % 5]
        styles[label, method] = {"color": color, "linestyle": dashes, "marker": marker}
        drawn[color] += 1
    return styles


# ------------------------------------------------------------------- text, legends, pixels


@functools.cache
def _matplotlib() -> Any:
    """matplotlib, imported here because that takes half a second and most runs draw nothing."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of where it keeps caches
    os.environ["MPLBACKEND"] = "agg"  # a notebook's backend may be missing here: no import then
    import matplotlib.backends.backend_agg
    import matplotlib.figure
    import matplotlib.font_manager
    import matplotlib.patches

    return matplotlib


def _figure(width: float, height: float, **more: Any) -> Figure:
    """An empty white figure of so many pixels, apart from pyplot and its global state."""
    figure = _matplotlib().figure.Figure((width / 72, height / 72), 72, facecolor="white", **more)
    _matplotlib().backends.backend_agg.FigureCanvasAgg(figure)
    return figure


def _pixels(figure: Figure, height: int) -> np.ndarray:
    """A figure at so many pixels of height, wider where texts need it, as uint8 H W 3."""
    right = max(item.get_window_extent().x1 for item in (*figure.texts, *figure.legends))
    figure.set_size_inches(max(figure.bbox.width, np.ceil(right) + GAP) / 72, height / 72)
    figure.canvas.draw()
    return np.array(figure.canvas.buffer_rgba())[..., :3]


def _class_legend(
    figure: Figure, maps: Sequence[np.ndarray], class_names: Sequence[str],
    colors: np.ndarray | None, old: int | None,
) -> int:  # fmt: skip
    """Swatch and name of every label in `maps` at the foot of a figure; returns their height."""
    labels = sorted({int(label) for part in maps for label in np.unique(part)})
    new = [old is not None and old <= label < IGNORE_INDEX for label in labels]
    names = [_class_name(label, class_names) for label in labels]
    names = [f"{name} (new)" if its else name for name, its in zip(names, new, strict=True)]
    columns = int(figure.bbox.width / (8.5 * max(map(len, names)) + 5 * GAP))
    shades = colorize(np.array(labels), colors) / 255
    patches = [_matplotlib().patches.Patch(fc=shade, ec="#787878") for shade in shades]
    legend = _legend(
        figure, patches, names, columns, fontsize=14, loc="lower left", bbox_to_anchor=(GAP, GAP),
        bbox_transform=_matplotlib().transforms.IdentityTransform(), borderpad=0, borderaxespad=0,
        labelspacing=0.4, columnspacing=1.2, handlelength=1, handleheight=1, handletextpad=0.5,
    )  # fmt: skip
    for text, its in zip(legend.get_texts(), new, strict=True):
        text.set_color(ORANGE if its else INK)
    return round(legend.get_window_extent().height) + 2 * GAP


def _legend(
    figure: Figure, handles: Sequence[Any], names: Sequence[str], columns: int, **style: Any
) -> Any:
    """A legend of names as they are: matplotlib would hide `_name` and take `$` for formulas."""
    columns = max(1, min(columns, len(names)))
    legend = figure.legend(handles, ["x"] * len(names), ncols=columns, frameon=False, **style)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=name, **_font([name]))
    return legend


def _class_name(label: int, class_names: Sequence[str]) -> str:
    name = class_names[label] if label < len(class_names) else ""
    return "ignored" if label == IGNORE_INDEX else _shown(name, f"class {label}")


def _shown(text: str, otherwise: str = "") -> str:
    """The text as one line of at most 120 characters; `otherwise` if no font can show it.

    Without `otherwise`, a replacement character stands for each that no font has.
    """
    text = " ".join(unicodedata.normalize("NFC", text).split())
    if otherwise and not (text and all(map(_family, text))):
        return otherwise
    text = "".join(character if _family(character) else "\ufffd" for character in text)
    return text if len(text) <= 120 else f"{text[:60]}…{text[-59:]}"  # names differ at their ends


def _font(texts: Iterable[str]) -> dict[str, Any]:
    """Options of text as it is, `$` included: the usual font, then others for what it lacks."""
    others = {_family(character) or "" for text in texts for character in text} - {"", USUAL}
    return {"family": [USUAL, *sorted(others)], "parse_math": False}


@functools.cache
def _family(character: str) -> str | None:
    """The first font that has a character: matplotlib's own, then those of the system."""
    own = _matplotlib().get_data_path()  # holds symbol fonts, too, with signs in place of letters
    fonts = _matplotlib().font_manager.fontManager.ttflist
    names = [USUAL, *sorted({font.name for font in fonts if not font.fname.startswith(own)})]
    return next((name for name in names if ord(character) in _characters(name)), None)


@functools.cache
def _characters(family: str) -> frozenset[int]:
    manager = _matplotlib().font_manager
    path = manager.findfont(manager.FontProperties(family=[family]))
    return frozenset(manager.get_font(path).get_charmap())


def _tile(pixels: np.ndarray, resampling: Image.Resampling) -> np.ndarray:
    """The picture at the size of a panel's tile; label maps grow by whole factors: even edges."""
    tile = Image.fromarray(pixels)
    side = max(tile.size)
    factor = -(-TILE_MIN // side) if side < TILE_MIN else min(1, TILE_MAX / side)
    size = (max(1, round(tile.width * factor)), max(1, round(tile.height * factor)))
    return np.asarray(tile if factor == 1 else tile.resize(size, resampling))
