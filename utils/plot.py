"""Pictures of results: a prediction over its image, curves over the steps of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from utils.constants import BACKGROUND
from utils.visual import GAP, INK, WHITE, class_legend, colorize, font_of, line_height, shortened

OVERLAY_MIN, OVERLAY_MAX = 360, 1280  # pixels of the longer side of an overlay
STRENGTH = 0.55  # of a class colour over the image

# Okabe & Ito's colours, told apart by all eyes; then the same, darker.
LINES = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0),
         (86, 180, 233), (0, 0, 0), (150, 130, 20))  # fmt: skip
GRID = (225, 225, 225)
FINE = 3  # curves are drawn at this factor and shrunk: Pillow's lines have hard edges
PLOT_WIDTH, PLOT_HEIGHT = 560, 300  # pixels of a chart's axes
LEGEND_MAX = 260  # pixels of the names beside it

Point = tuple[int, float, float]  # step, mean, standard deviation (nan for one seed)


def overlay(
    image: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    colors: np.ndarray | None = None,
) -> np.ndarray:
    """The image tinted with the colours of its labels and outlined, above a legend of them.

    Label 0 keeps the image's own colours. Small images grow and large ones shrink until the legend
    reads well beside them.

    Args:
        image: uint8 H W 3. labels: H W, 0..255. class_names: by label.
        colors: (256, 3) by label, the VOC map by default.

    Returns:
        uint8 H' W' 3.
    """
    side = max(image.shape[:2])
    factor = min(max(side, OVERLAY_MIN), OVERLAY_MAX) / side
    size = (max(1, round(factor * image.shape[1])), max(1, round(factor * image.shape[0])))
    picture = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    small = Image.fromarray(labels.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    labels = np.asarray(small)
    tint = STRENGTH * (labels != BACKGROUND)[..., None]
    blended = np.rint((1 - tint) * picture + tint * colorize(labels, colors)).astype(np.uint8)
    blended[_outline(labels)] = WHITE
    shown = labels[labels != BACKGROUND]
    width = max(size[0], OVERLAY_MIN)
    legend = class_legend([shown if shown.size else labels], class_names, colors, width - 2 * GAP)
    panel = Image.new("RGB", (width, size[1] + legend.height + 2 * GAP), WHITE)
    panel.paste(Image.fromarray(blended), ((width - size[0]) // 2, 0))
    panel.paste(legend, (GAP, size[1] + GAP))
    return np.array(panel)


def _outline(labels: np.ndarray) -> np.ndarray:
    """H W bool: the pixel on the right or below has another label."""
    edge = np.zeros(labels.shape, dtype=bool)
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edge[:-1] |= labels[:-1] != labels[1:]
    return edge


def line_charts(charts: Mapping[str, Mapping[str, Sequence[Point]]], ylabel: str) -> np.ndarray:
    """One chart per title, below each other; in it a line per name over the steps.

    A standard deviation is drawn as a bar through the point. Equal names have equal colours.

    Args:
        charts: title -> name -> points, values in percent.

    Returns:
        uint8 H W 3.
    """
    names = list(dict.fromkeys(name for lines in charts.values() for name in lines))
    colors = {name: LINES[i % len(LINES)] for i, name in enumerate(names)}
    panels = [_chart(title, lines, ylabel, colors) for title, lines in charts.items()]
    height = sum(panel.height for panel in panels)
    figure = Image.new("RGB", (max(panel.width for panel in panels), height), WHITE)
    top = 0
    for panel in panels:
        figure.paste(panel, (0, top))
        top += panel.height
    return np.array(figure.resize((figure.width // FINE, height // FINE), Image.Resampling.BOX))


def _chart(
    title: str,
    lines: Mapping[str, Sequence[Point]],
    ylabel: str,
    colors: Mapping[str, tuple[int, int, int]],
) -> Image.Image:
    """A chart with axes and legend, FINE times as large as it will be."""
    font, bold = font_of(13 * FINE), font_of(15 * FINE)
    left, top = 56 * FINE, line_height(bold) + line_height(font) + 3 * GAP * FINE
    width, height = PLOT_WIDTH * FINE, PLOT_HEIGHT * FINE
    rows = len(lines) * (line_height(font) + GAP * FINE)
    room = min(max(int(font.getlength(name)) + 2 for name in lines), LEGEND_MAX * FINE)
    size = (left + width + room + 60 * FINE, top + max(height, rows) + 60 * FINE)
    chart = Image.new("RGB", size, WHITE)
    draw = ImageDraw.Draw(chart)
    steps = sorted({step for points in lines.values() for step, _, _ in points})
    values = [mean + np.nan_to_num(std) for points in lines.values() for _, mean, std in points]
    ticks = _ticks(max([value for value in values if np.isfinite(value)], default=1.0))

    def x_of(step: float) -> float:
        inset = 24 * FINE
        share = (step - steps[0]) / (steps[-1] - steps[0]) if len(steps) > 1 else 0.5
        return left + inset + share * (width - 2 * inset)

    def y_of(value: float) -> float:
        return top + height - value / ticks[-1] * height

    draw.text((left, GAP * FINE), title, INK, bold)
    draw.text((left, top - GAP * FINE), ylabel, INK, font, anchor="lb")
    for tick in ticks:
        draw.line((left, y_of(tick), left + width, y_of(tick)), GRID, FINE)
        draw.text((left - GAP * FINE, y_of(tick)), f"{tick:g}", INK, font, anchor="rm")
    for step in steps:
        draw.text((x_of(step), top + height + GAP * FINE), str(step), INK, font, anchor="mt")
    bottom = top + height + (GAP + 22) * FINE
    draw.text((left + width / 2, bottom), "step", INK, font, anchor="mt")
    for row, (name, points) in enumerate(lines.items()):
        at = [(x_of(s), y_of(m), std / ticks[-1] * height) for s, m, std in points if m == m]
        _line(draw, at, colors[name])
        y = top + (row + 0.5) * (line_height(font) + GAP * FINE)
        swatch = left + width + 2 * GAP * FINE
        _line(draw, [(swatch, y, np.nan), (swatch + 22 * FINE, y, np.nan)], colors[name])
        text = (swatch + 32 * FINE, y)
        draw.text(text, shortened(name, room, font), INK, font, anchor="lm")
    return chart


def _line(
    draw: ImageDraw.ImageDraw,
    points: Sequence[tuple[float, float, float]],
    color: tuple[int, int, int],
) -> None:
    """Dots (x, y, half height of an error bar or nan), joined."""
    draw.line([(x, y) for x, y, _ in points], color, 2 * FINE, joint="curve")
    radius = 4 * FINE
    for x, y, bar in points:
        if np.isfinite(bar):
            draw.line((x, y - bar, x, y + bar), color, FINE)
            for end in (y - bar, y + bar):
                draw.line((x - radius, end, x + radius, end), color, FINE)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), color)


def _ticks(highest: float) -> list[float]:
    """0 and round numbers up to the first that is not below `highest`, five or so."""
    unit = next(u for u in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if highest <= 5 * u or u == 20)
    return [i * unit for i in range(max(1, int(np.ceil(highest / unit))) + 1)]
