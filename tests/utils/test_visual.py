"""Pictures: the right colours in the right places, nothing cut off at an edge."""

import numpy as np
import pytest
from PIL import Image

from utils.visual import HEAT, PALE, colorize, confusion_figure, palette, sample_panel

NAMES = ["background", *(f"class number {i}" for i in range(1, 151))]
INK = (32, 32, 32)


def label_map(size: int, labels: list[int]) -> np.ndarray:
    """Blocks of 8 x 8 pixels, each label at least once."""
    side = size // 8
    blocks = np.resize(np.array(labels), side * side).reshape(side, side)
    return np.kron(blocks, np.ones((8, 8), dtype=int))


def photo(size: int) -> np.ndarray:
    # Red only, so that no colour of a class is mistaken for it.
    ramp = np.linspace(200, 250, size, dtype=np.uint8)
    return np.stack([np.tile(ramp, (size, 1)), *np.zeros((2, size, size), np.uint8)], axis=-1)


def columns_with(picture: np.ndarray, color: tuple[int, ...]) -> np.ndarray:
    return np.flatnonzero((picture == color).all(axis=-1).any(axis=0))


def colors_in(picture: np.ndarray) -> set[tuple[int, ...]]:
    return set(map(tuple, picture.reshape(-1, 3).tolist()))


def assert_frame_is_white(picture: np.ndarray) -> None:
    frame = [picture[:2], picture[-2:], picture[:, :2], picture[:, -2:]]
    assert all((edge == 255).all() for edge in frame)


def test_palette_is_that_of_voc():
    known = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        2: (0, 128, 0),
        8: (64, 0, 0),
        15: (192, 128, 128),
        20: (0, 64, 128),
        255: (224, 224, 192),
    }
    assert {label: tuple(palette()[label]) for label in known} == known
    assert palette().dtype == np.uint8
    assert len(np.unique(palette(), axis=0)) == 256


def test_palette_by_head_channel():
    colors = palette([0, 3, 20])
    assert colors.shape == (256, 3)
    np.testing.assert_array_equal(colors[:3], palette()[[0, 3, 20]])
    np.testing.assert_array_equal(colors[3:], np.tile(palette()[255], (253, 1)))


def test_colorize():
    labels = np.array([[0, 15], [255, 1]], dtype=np.uint8)
    expected = [[(0, 0, 0), (192, 128, 128)], [(224, 224, 192), (128, 0, 0)]]
    np.testing.assert_array_equal(colorize(labels), expected)
    assert tuple(colorize(labels, palette([0, 2]))[1, 1]) == (0, 128, 0)


@pytest.mark.parametrize("size", [96, 256, 800])
def test_panel_shows_image_truth_and_prediction_in_this_order(size):
    truth, prediction = label_map(size, [3]), label_map(size, [4, 5])
    panel = sample_panel(photo(size), truth, prediction, NAMES)
    assert panel.dtype == np.uint8
    tile = {96: 288, 256: 256, 800: 640}[size]
    tops = [8 + i * (tile + 8) for i in range(3)]
    middle = panel[panel.shape[0] // 2]
    assert (middle[tops[0] : tops[0] + tile, 1:] == 0).all()
    assert (middle[tops[1] : tops[1] + tile] == palette()[3]).all()
    assert colors_in(middle[None, tops[2] : tops[2] + tile]) == {
        tuple(palette()[label].tolist()) for label in np.unique(prediction)
    }
    assert panel.shape[1] == 3 * tile + 4 * 8
    assert_frame_is_white(panel)


def test_a_tile_holds_the_very_pixels():
    truth = label_map(256, list(range(21)))
    panel = sample_panel(photo(256), truth, np.zeros_like(truth), NAMES)
    top = int(np.flatnonzero((panel[:, 8] != 255).any(axis=-1))[0])
    np.testing.assert_array_equal(panel[top : top + 256, 8:264], photo(256))
    np.testing.assert_array_equal(panel[top : top + 256, 272:528], colorize(truth))


def legend_of(panel: np.ndarray, tile: int) -> np.ndarray:
    top = int(np.flatnonzero((panel[:, 8] != 255).any(axis=-1))[0])
    return panel[top + tile :]


def test_legend_names_the_classes_that_occur_and_no_other():
    truth, prediction = label_map(256, [0, 7, 255]), label_map(256, [0, 9])
    legend = legend_of(sample_panel(photo(256), truth, prediction, NAMES), 256)
    areas = [(legend == color).all(axis=-1).sum() for color in palette()]
    shown = [i for i in range(256) if areas[i] > 100]  # edges of letters are grey, too
    assert shown == [0, 7, 9, 255]
    places = [columns_with(legend, tuple(palette()[i]))[0] for i in shown]
    assert places == sorted(places)
    assert INK in colors_in(legend)


@pytest.mark.parametrize("size", [32, 96])
def test_legend_wraps_and_shortens_instead_of_cutting(size):
    few = sample_panel(photo(size), label_map(size, [1]), label_map(size, [1]), NAMES)
    labels = label_map(size, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 255])
    names = ["x" * 300, "", "日本", *NAMES[3:12]]  # too long, nameless, not drawable, too few
    many = sample_panel(photo(size), labels, labels, names)
    assert many.shape[1] == few.shape[1]
    assert many.shape[0] > few.shape[0] + 40
    assert_frame_is_white(many)
    legend = legend_of(many, 224 if size == 32 else 288)
    assert {tuple(palette()[i].tolist()) for i in np.unique(labels)} <= colors_in(legend)
    assert (legend[:, -11:] == 255).all()  # the longest name ends before the legend does


def test_a_name_that_cannot_be_written_becomes_a_number():
    labels = label_map(64, [1])
    panels = [
        sample_panel(photo(64), labels, labels, ["background", name])
        for name in ("class 1", "", "日本", "clàss 1")
    ]
    assert all((panel == panels[0]).all() for panel in panels)


def test_panel_before_and_after_and_own_colours():
    maps = [label_map(256, [label]) for label in (1, 2, 3)]
    colors = palette([0, 10, 11, 12])
    panel = sample_panel(photo(256), maps[0], maps[2], NAMES, before=maps[1], colors=colors)
    order = [panel[150, 8 + i * 264 + 100].tolist() for i in (1, 2, 3)]
    assert order == palette()[[10, 11, 12]].tolist()


def test_panel_of_a_narrow_picture_keeps_its_titles_apart():
    labels = label_map(256, [1])[:, :40]
    panel = sample_panel(photo(256)[:, :40], labels, labels, NAMES)
    assert panel.shape[1] == 3 * 130 + 4 * 8
    assert_frame_is_white(panel)


def frame_lines(figure: np.ndarray, axis: int) -> np.ndarray:
    """First and last column (axis 0) or row (axis 1) of the grey frame around the matrix."""
    lengths = (figure == 150).all(axis=-1).sum(axis=axis)
    return np.flatnonzero(lengths > lengths.max() / 2)[[0, -1]]


def cells(figure: np.ndarray, count: int) -> tuple[np.ndarray, int]:
    """The matrix part of the figure and the size of a cell."""
    (left, right), (top, bottom) = frame_lines(figure, 0), frame_lines(figure, 1)
    inner = figure[top:bottom, left:right]
    assert inner.shape[0] == inner.shape[1]
    assert inner.shape[0] % count == 0
    return inner, inner.shape[0] // count


@pytest.mark.parametrize("count", [2, 7, 21, 31, 151])
def test_confusion_cells_show_shares_of_the_truth(count):
    confusion = np.diag(np.arange(count) + 1)  # class 0 rare, the last one frequent
    confusion[count - 1] = 0
    figure = confusion_figure(confusion, NAMES)
    inner, cell = cells(figure, count)
    corners = inner[2::cell, 2::cell]  # clear of grid lines and numbers
    expected = np.full((count, count, 3), HEAT[0])
    expected[range(count - 1), range(count - 1)] = HEAT[-1]
    expected[-1] = PALE
    np.testing.assert_array_equal(corners, expected)
    assert_frame_is_white(figure)
    assert (confusion_figure(confusion * 7, NAMES) == figure).all()


def test_confusion_rows_are_the_truth():
    inner, cell = cells(confusion_figure(np.array([[3, 1], [0, 4]]), NAMES), 2)
    shares = inner[2::cell, 2::cell, 0]
    assert shares[0, 0] < shares[0, 1] < shares[1, 0] == HEAT[0][0]
    assert shares[1, 1] == HEAT[-1][0]


@pytest.mark.parametrize(("count", "numbers"), [(2, True), (30, True), (31, False)])
def test_confusion_numbers_up_to_30_classes(count, numbers):
    inner, cell = cells(confusion_figure(np.eye(count, dtype=int), NAMES), count)
    assert (inner[1 : cell - 1, 1 : cell - 1].min(axis=-1).max() > 150) == numbers
    off_diagonal = inner[1 : cell - 1, cell + 1 : 2 * cell - 1]
    assert colors_in(off_diagonal) == {HEAT[0]}  # no zeros


@pytest.mark.parametrize("count", [2, 21, 151])
def test_confusion_names_stand_beside_their_rows_and_columns_in_full(count):
    short, long = NAMES[:count], [*NAMES[: count - 1], "a long name, " * 8]
    confusion = np.eye(count, dtype=int)
    figure = confusion_figure(confusion, long)
    assert_frame_is_white(figure)
    grown = figure.shape[1] - confusion_figure(confusion, short).shape[1]
    assert grown > 300
    # Ink of the last name reaches as far left of the matrix as below it.
    left, bottom = frame_lines(figure, 0)[0], frame_lines(figure, 1)[1]
    cell = cells(figure, count)[1]
    row_name = figure[bottom - cell + 1 : bottom, 30 : left - 1].min(axis=(0, 2)) < 128
    right = figure.shape[1] - 1
    last = left + (count - 1) * cell
    column_name = figure[bottom + 2 : -30, last : min(last + cell, right)].min(axis=(1, 2)) < 128
    extents = [np.ptp(np.flatnonzero(ink)) for ink in (row_name, column_name)]
    assert abs(extents[0] - extents[1]) <= 2
    assert extents[0] > 300


def test_pictures_are_png_ready():
    figure = confusion_figure(np.eye(3, dtype=np.int64), NAMES)
    assert figure.flags.writeable
    assert Image.fromarray(figure).mode == "RGB"
