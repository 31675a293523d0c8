"""Pictures: the right colours in the right places, every name in full, nothing cut off."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from matplotlib import colors as mpl_colors
from matplotlib import font_manager
from PIL import Image

from methods.table import METHODS
from tests.conftest import ROOT
from utils import pictures
from utils.errors import UserError
from utils.pictures import (
    Curves,
    colorize,
    confusion_figure,
    overlay,
    palette,
    sample_panel,
    save_charts,
    stacked,
)

pytestmark = pytest.mark.filterwarnings("error")  # such as that of a glyph no font has
NAMES = ["background", *(f"class number {i}" for i in range(1, 151))]
INK = (32, 32, 32)
PALE = (236, 236, 236)
ORANGE = "#b34700"
LEAST, MOST = (247, 251, 255), (8, 48, 107)  # ends of matplotlib's Blues
UNKNOWN = "\U0010fffd"  # no font has it
NAN = float("nan")


def label_map(size: int, labels: list[int]) -> np.ndarray:
    """Blocks of 8 x 8 pixels, each label at least once."""
    side = size // 8
    blocks = np.resize(np.array(labels), side * side).reshape(side, side)
    return np.kron(blocks, np.ones((8, 8), dtype=int))


def pair(truth: np.ndarray, prediction: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The usual two maps of a panel; the prediction is right unless given."""
    return {"truth": truth, "prediction": truth if prediction is None else prediction}


def photo(size: int) -> np.ndarray:
    # Red only, so that no colour of a class is mistaken for it.
    ramp = np.linspace(200, 250, size, dtype=np.uint8)
    return np.stack([np.tile(ramp, (size, 1)), *np.zeros((2, size, size), np.uint8)], axis=-1)


def columns_with(picture: np.ndarray, color: tuple[int, ...]) -> np.ndarray:
    """Columns of a swatch; edges of letters and frames are grey in single pixels."""
    return np.flatnonzero((picture == color).all(axis=-1).sum(axis=0) > 8)


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
    panel = sample_panel(photo(size), pair(truth, prediction), NAMES)
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
    panel = sample_panel(photo(256), pair(truth, np.zeros_like(truth)), NAMES)
    top = int(np.flatnonzero((panel[:, 8] != 255).any(axis=-1))[0])
    np.testing.assert_array_equal(panel[top : top + 256, 8:264], photo(256))
    np.testing.assert_array_equal(panel[top : top + 256, 272:528], colorize(truth))


def legend_of(panel: np.ndarray, tile: int) -> np.ndarray:
    top = int(np.flatnonzero((panel[:, 8] != 255).any(axis=-1))[0])
    return panel[top + tile :]


def test_legend_names_the_classes_that_occur_and_no_other():
    truth, prediction = label_map(256, [0, 7, 255]), label_map(256, [0, 9])
    legend = legend_of(sample_panel(photo(256), pair(truth, prediction), NAMES), 256)
    areas = [(legend == color).all(axis=-1).sum() for color in palette()]
    shown = [i for i in range(256) if areas[i] > 100]  # edges of letters are grey, too
    assert shown == [0, 7, 9, 255]
    places = [columns_with(legend, tuple(palette()[i]))[0] for i in shown]
    assert places == sorted(places)
    assert INK in colors_in(legend)


@pytest.mark.parametrize("size", [32, 96])
def test_legend_wraps_and_the_panel_grows_instead_of_cutting(size):
    few = sample_panel(photo(size), pair(label_map(size, [1])), NAMES)
    labels = label_map(size, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 255])
    names = ["x" * 100, "", UNKNOWN, *NAMES[3:12]]  # long, nameless, not drawable, too few
    many = sample_panel(photo(size), pair(labels), names)
    assert many.shape[0] > few.shape[0] + 40
    assert_frame_is_white(many)
    tile = 224 if size == 32 else 288
    legend = legend_of(many, tile)
    assert {tuple(palette()[i].tolist()) for i in np.unique(labels)} <= colors_in(legend)
    assert many.shape[1] > few.shape[1] + 40 if size == 32 else many.shape[1] == few.shape[1]
    # As long as the very same name in a panel that is wide enough.
    wide = sample_panel(photo(800), pair(label_map(800, [0])), names)
    ends = [np.flatnonzero((part[:26] != 255).any(axis=(0, 2)))[-1]
            for part in (legend, legend_of(wide, 640))]  # fmt: skip
    assert ends[0] == ends[1]


def drawn_name(name: str) -> np.ndarray:
    labels = label_map(64, [1])
    return sample_panel(photo(64), pair(labels), ["background", name])


def test_a_name_that_no_font_has_becomes_a_number():
    plain = drawn_name("class 1")
    for name in ("", "  ", UNKNOWN, f"half {UNKNOWN}"):
        np.testing.assert_array_equal(drawn_name(name), plain)


@pytest.mark.parametrize("name", ["clàss 1", "κλάση", "класс", "صنف", "$a$ b_c^2", "_hidden"])
def test_names_of_many_scripts_stand_as_they_are(name):
    figure = pictures._figure(400, 400)
    pictures._class_legend(figure, [np.array([1])], ["", name], None, None)
    (text,) = figure.legends[0].get_texts()
    assert text.get_text() == name
    assert not text.get_parse_math()
    figure.canvas.draw()
    assert not np.array_equal(drawn_name(name), drawn_name(""))


def test_endless_names_keep_both_their_ends():
    name = pictures._class_name(0, ["begin" + "x" * 300 + "end"])
    assert len(name) == 120
    assert name.startswith("beginx")
    assert name.endswith("xend")
    assert pictures._class_name(0, ["x" * 120]) == "x" * 120


def test_a_font_of_the_system_is_used_for_what_the_usual_one_lacks(tmp_path):
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    for move, point in (("moveTo", (0, 0)), ("lineTo", (0, 900)), ("lineTo", (900, 0))):
        getattr(pen, move)(point)
    pen.closePath()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "one"])
    builder.setupCharacterMap({ord(UNKNOWN): "one"})
    builder.setupGlyf({".notdef": pen.glyph(), "one": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "one": (1000, 0)})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "One-Sign: 2", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "one.ttf")
    before = list(font_manager.fontManager.ttflist)
    without = drawn_name(f"a {UNKNOWN}")
    try:
        font_manager.fontManager.addfont(tmp_path / "one.ttf")
        pictures._family.cache_clear()
        assert pictures._class_name(1, ["", f"a {UNKNOWN}"]) == f"a {UNKNOWN}"
        assert not np.array_equal(drawn_name(f"a {UNKNOWN}"), without)
    finally:
        font_manager.fontManager.ttflist[:] = before
        pictures._family.cache_clear()


def test_old_and_new_classes_are_told_apart_in_the_legend():
    labels = label_map(256, [0, 2, 3, 255])
    figure = pictures._figure(800, 400)
    pictures._class_legend(figure, [labels], NAMES, None, 3)
    texts = figure.legends[0].get_texts()
    assert [text.get_text() for text in texts] == [
        "background", "class number 2", "class number 3 (new)", "ignored"
    ]  # fmt: skip
    assert [text.get_color() == ORANGE for text in texts] == [False, False, True, False]
    divided = sample_panel(photo(256), pair(labels), NAMES, old=3)
    assert not np.array_equal(divided, sample_panel(photo(256), pair(labels), NAMES))


@pytest.mark.parametrize("title", ["MIB, voc 15-5, step 1", "a long title " * 8])
def test_panel_title_stands_above_all_in_full(title):
    labels = label_map(256, [1])
    arguments = (photo(256)[:, :40], pair(labels[:, :40]), NAMES)
    plain, titled = sample_panel(*arguments), sample_panel(*arguments, title=title)
    rows = len(titled) - len(plain)
    assert rows > 15
    np.testing.assert_array_equal(titled[rows:, : plain.shape[1]], plain)
    assert (titled[:rows] < 128).any()
    assert_frame_is_white(titled)
    longer = sample_panel(*arguments, title=title + "xxxx")  # the end is there to be seen
    inks = [np.flatnonzero((p[:rows] < 200).any(axis=(0, 2)))[-1] for p in (titled, longer)]
    assert inks[1] > inks[0] + 15


def test_panel_before_and_after_and_own_colours():
    maps = [label_map(256, [label]) for label in (1, 2, 3)]
    colors = palette([0, 10, 11, 12])
    named = dict(zip(("truth", "before", "after"), maps, strict=True))
    panel = sample_panel(photo(256), named, NAMES, colors=colors)
    order = [panel[150, 8 + i * 264 + 100].tolist() for i in (1, 2, 3)]
    assert order == palette()[[10, 11, 12]].tolist()


def test_panel_of_a_narrow_picture_keeps_its_titles_apart():
    labels = label_map(256, [1])[:, :40]
    panel = sample_panel(photo(256)[:, :40], pair(labels), NAMES)
    assert panel.shape[1] == 3 * 130 + 4 * 8
    assert_frame_is_white(panel)


def matrix_of(confusion: np.ndarray, **more: Any) -> tuple[np.ndarray, int]:
    """The pixels of the matrix, without all around it, and the size of a cell."""
    figure = pictures._confusion(confusion, NAMES, "", more.get("old"))
    figure.canvas.draw()
    inner = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    assert inner.shape[0] == inner.shape[1]
    assert inner.shape[0] % len(confusion) == 0
    return inner, inner.shape[0] // len(confusion)


@pytest.mark.parametrize("count", [1, 2, 7, 21, 31, 151])
def test_confusion_cells_show_shares_of_the_truth(count):
    confusion = np.diag(np.arange(count) + 1)  # class 0 rare, the last one frequent
    confusion[count - 1] = 0
    inner, cell = matrix_of(confusion)
    corners = inner[3::cell, 3::cell]  # clear of grid lines and numbers
    expected = np.full((count, count, 3), LEAST)
    expected[range(count - 1), range(count - 1)] = MOST
    expected[-1] = PALE
    np.testing.assert_array_equal(corners, expected)


def test_confusion_figures_know_no_counts():
    confusion = np.diag(np.arange(7))
    figure = confusion_figure(confusion, NAMES)
    assert figure.dtype == np.uint8
    assert_frame_is_white(figure)
    assert (confusion_figure(confusion * 7, NAMES) == figure).all()


def test_confusion_rows_are_the_truth():
    inner, cell = matrix_of(np.array([[3, 1], [0, 4]]))
    shares = inner[3::cell, 3::cell, 0]
    assert shares[0, 0] < shares[0, 1] < shares[1, 0] == LEAST[0]
    assert shares[1, 1] == MOST[0]
    figure = pictures._confusion(np.array([[3, 1], [0, 4]]), NAMES, "", None)
    at = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    assert at == {(0, 0): "75", (1, 0): "25", (1, 1): "100"}  # x = prediction; no zeros
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("prediction", "truth")


@pytest.mark.parametrize(("count", "numbers"), [(2, True), (30, True), (31, False)])
def test_confusion_numbers_up_to_30_classes_and_a_scale_beyond(count, numbers):
    inner, cell = matrix_of(np.eye(count, dtype=int))
    assert (inner[2 : cell - 2, 2 : cell - 2].min(axis=-1).max() > 150) == numbers
    off_diagonal = inner[2 : cell - 2, cell + 2 : 2 * cell - 2]
    assert colors_in(off_diagonal) == {LEAST}  # no zeros
    figure = pictures._confusion(np.eye(count, dtype=int), NAMES, "", None)
    assert len(figure.axes) == (1 if numbers else 2)


def test_old_and_new_classes_are_told_apart_in_the_confusion_matrix():
    orange = np.array(mpl_colors.to_rgb(ORANGE)) * 255
    inner, cell = matrix_of(np.eye(5, dtype=int), old=3)
    line = slice(3 * cell - 1, 3 * cell + 1)
    for edge in (inner[line, 5::cell], inner[5::cell, line]):
        assert np.allclose(edge.reshape(-1, 3), orange, atol=2)
    figure = pictures._confusion(np.eye(5, dtype=int), NAMES, "MIB, step 1", 3)
    axes = figure.axes[0]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_color() == ORANGE for label in labels] == [False] * 3 + [True] * 2
    assert axes.get_title("left").startswith("MIB, step 1\n")
    assert "new classes orange" in axes.get_title("left")
    plain = pictures._confusion(np.eye(5, dtype=int), NAMES, "", None).axes[0]
    assert "new" not in plain.get_title("left")
    assert not any(label.get_color() == ORANGE for label in plain.get_xticklabels())


@pytest.mark.parametrize("count", [2, 21, 151])
def test_confusion_names_stand_beside_their_rows_and_columns_in_full(count):
    short, long = NAMES[:count], [*NAMES[: count - 1], "a long name, " * 8]
    confusion = np.eye(count, dtype=int)
    shown = confusion_figure(confusion, long)
    assert_frame_is_white(shown)
    grown = np.subtract(shown.shape, confusion_figure(confusion, short).shape)[:2]
    assert (grown > 300).all()
    figure = pictures._confusion(confusion, long, "", None)
    figure.canvas.draw()
    axes, cell = figure.axes[0], figure.bbox.width / count
    box = figure.get_tightbbox()
    assert np.allclose(shown.shape[:2], (box.height * 72 + 16, box.width * 72 + 16), atol=2)
    for labels, side in ((axes.get_yticklabels(), 1), (axes.get_xticklabels(), 0)):
        assert [label.get_text() for label in labels] == [*long[:-1], long[-1].strip()]
        boxes = [label.get_window_extent().get_points() for label in labels]
        for i, (low, high) in enumerate(boxes):
            place = figure.bbox.width - (i + 0.5) * cell if side else (i + 0.5) * cell
            assert abs((low + high)[side] / 2 - place) < 2  # beside its own row or column
            assert high[1 - side] <= 0  # outside the matrix
            assert low[1 - side] >= (box.x0, box.y0)[1 - side] * 72 - 1
        for one, other in pairwise(boxes):
            assert min(abs(one - other[::-1])[:, side]) >= -1
            assert one[0, side] >= other[1, side] - 1 or other[0, side] >= one[1, side] - 1
        assert min(label.get_fontsize() for label in labels) >= 11


def test_confusion_without_any_ground_truth_is_grey():
    inner, cell = matrix_of(np.zeros((4, 4), dtype=int))
    assert (inner[5::cell, 5::cell] == PALE).all()


def test_pictures_are_png_ready():
    figure = confusion_figure(np.eye(3, dtype=np.int64), NAMES)
    assert figure.flags.writeable
    assert Image.fromarray(figure).mode == "RGB"


def test_an_overlay_grows_with_its_legend_and_keeps_the_image():
    image = photo(96)[:, :30]
    shown = overlay(np.kron(image, np.ones((8, 8, 1), np.uint8)), np.zeros((768, 240)), ["x" * 100])
    assert shown.shape[1] > 600
    left = (shown.shape[1] - 240) // 2
    np.testing.assert_array_equal(
        shown[:768, left : left + 240], np.kron(image, np.ones((8, 8, 1), np.uint8))
    )
    assert_frame_is_white(shown[768:])


def test_stacked_pictures_keep_their_pixels():
    one, two = photo(16), photo(24)
    sheet = stacked([one, two])
    assert sheet.shape == (16 + 24 + 16, 24, 3)
    np.testing.assert_array_equal(sheet[:16, :16], one)
    np.testing.assert_array_equal(sheet[24:48], two)
    assert (sheet[:24, 16:] == 255).all()


# --- curves ---


def curves(label: str, method: str = "MIB", spread: float = NAN) -> Curves:
    old, new = [(0, 80.0, spread), (1, 60.0, spread)], [(0, NAN, NAN), (1, 30.0, spread)]
    return Curves(label, method, {"old": old, "new": new})


def bars_of(axes: Any) -> list[Any]:
    """Line, caps and bars of every run."""
    return [container.lines for container in axes.containers]


def test_charts_have_a_row_per_setting_and_a_line_per_run():
    other = curves("b", "FT")
    settings = {"voc 15-5": [curves("a", spread=2.0), other], "ade 50": [other]}
    figure = pictures._charts(settings, "mean IoU, %")
    first, second = figure.axes[:2], figure.axes[2:]
    assert [axes.get_title("left") for axes in first] == ["voc 15-5\nold", "new"]
    assert [axes.get_title("left") for axes in second] == ["ade 50\nold", "new"]
    assert first[0].get_ylabel() == "mean IoU, %"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert [len(axes.containers) for axes in figure.axes] == [2, 2, 1, 1]
    (line, _, (bars,)), (beside, _, _) = bars_of(first[0])
    assert line.get_ydata().tolist() == beside.get_ydata().tolist() == [80, 60]
    np.testing.assert_allclose(line.get_xdata(), [-0.1, 0.9])
    np.testing.assert_allclose(beside.get_xdata(), [0.1, 1.1])
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[78, 82], [58, 62]]
    ((new, _, _), _) = bars_of(first[1])
    assert new.get_ydata()[1] == 30
    assert np.isnan(new.get_ydata()[0])
    for axes in first:
        assert axes.get_ylim()[0] == 0
        assert axes.get_ylim() == first[0].get_ylim()
        assert axes.get_xticks().tolist() == [0, 1]
    assert first[0].get_ylim()[1] > 82


def test_a_method_keeps_its_colour_and_its_runs_differ():
    settings = {
        "one": [curves("x", "FT"), curves("y", "MIB"), curves("z", "MIB")],
        "two": [curves("z", "MIB"), curves("own", "OWN")],
    }
    figure = pictures._charts(settings, "")
    styles: dict[str, set[tuple[str, str, str]]] = {}
    for i, runs in enumerate(settings.values()):
        for axes in figure.axes[2 * i : 2 * i + 2]:
            for run, (line, *_) in zip(runs, bars_of(axes), strict=True):
                look = (line.get_color(), line.get_linestyle(), line.get_marker())
                styles.setdefault(run.label, set()).add(look)
    assert all(len(looks) == 1 for looks in styles.values())
    looks = {label: next(iter(found)) for label, found in styles.items()}
    assert looks["y"][0] == looks["z"][0] == "#0072b2"
    assert looks["y"][1] != looks["z"][1]
    assert looks["y"][2] != looks["z"][2]
    assert looks["x"][0] == "#000000"
    methods = ("A", "B", "OWN")  # unknown, and the same in every process, whoever is beside them
    found = [pictures._styles([("other", method)])["other", method]["color"] for method in methods]
    assert found == ["#1b7837", "#bf812d", "#e7298a"]
    assert looks["own"][0] == found[2]


def test_every_method_has_a_colour_of_its_own():
    colors = [pictures.METHOD_COLORS[name] for name in (*METHODS, "none")]
    assert len({*colors, *pictures.OTHER_COLORS}) == len(colors) + len(pictures.OTHER_COLORS)


def test_a_method_has_one_colour_whoever_is_beside_it(tmp_path):
    """Seen in the files: MIB's blue is in both, FT's and PLOP's colours in one each."""
    found = {}
    for pair in (("FT", "MIB"), ("MIB", "PLOP")):
        file = tmp_path / f"{'-'.join(pair)}.svg"
        save_charts(file, {"voc 15-5": [curves(method, method) for method in pair]}, "")
        text = file.read_text()
        found[pair] = {name for name, color in pictures.METHOD_COLORS.items() if color in text}
    assert found["FT", "MIB"] >= {"FT", "MIB"}
    assert "PLOP" not in found["FT", "MIB"]
    assert found["MIB", "PLOP"] == {"MIB", "PLOP"} | found["MIB", "PLOP"] & {"FT"}  # text is black


KINDS = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml", ".PNG": b"\x89PNG"}


@pytest.mark.parametrize("suffix", KINDS)
def test_charts_are_written_as_their_suffix_says_and_alike(tmp_path, suffix):
    labels = ["plain", "μ $x$ класс", f"_{UNKNOWN}", "name " * 40]
    runs = [curves(label, spread=1.0) for label in labels]
    nothing = [Curves("none", "FT", {"old": [(0, NAN, NAN)], "new": [(0, NAN, NAN)]})]
    files = [tmp_path / f"plots/{i}{suffix}" for i in range(2)]
    for file in files:
        save_charts(file, {"own " * 40: runs, "nothing": nothing}, "mean IoU, %")
    first, second = (file.read_bytes() for file in files)
    assert first.startswith(KINDS[suffix])
    assert first == second
    assert sorted(file.name for file in files) == sorted(os.listdir(tmp_path / "plots"))
    if KINDS[suffix] == KINDS[".png"]:
        assert_frame_is_white(np.asarray(Image.open(files[0]).convert("RGB")))  # nothing cut off


@pytest.mark.parametrize("name", ["a.jpg", "a", "a.png.txt"])
def test_another_kind_of_file_is_refused_by_name(tmp_path, name):
    with pytest.raises(UserError, match=rf"{name}: its name must end in .png, .pdf, .svg"):
        save_charts(tmp_path / name, {"voc 15-5": [curves("a")]}, "")
    assert not list(tmp_path.iterdir())


# --- matplotlib ---


def test_figures_are_the_same_in_every_thread():
    confusion = np.arange(49).reshape(7, 7)
    expected = confusion_figure(confusion, NAMES, title="t", old=4)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(confusion_figure, confusion, NAMES, title="t", old=4) for _ in range(8)]
    assert all(np.array_equal(job.result(), expected) for job in jobs)


@pytest.mark.parametrize(
    "backend", ["qtagg", "module://matplotlib_inline.backend_inline", "no such thing"]
)
def test_matplotlib_comes_late_without_pyplot_and_without_a_word(backend):
    code = """
import logging, sys
import numpy as np
logging.basicConfig(level=logging.INFO)
import run
from utils.pictures import confusion_figure
assert not any(name.startswith("matplotlib") for name in sys.modules)
confusion_figure(np.eye(2), ["a", "b"])
assert "matplotlib.pyplot" not in sys.modules
"""
    env = {"HOME": "/dev/null", "PATH": os.environ["PATH"], "MPLBACKEND": backend}
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
