"""dataset.json with a table of ids or colours, VOC's lists, and what the check prints of it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import splits
from dataset.build import build_datasets
from dataset.catalog import get_spec
from dataset.check import check, main
from dataset.layout import read_layout
from dataset.voc import VOC
from tests.dataset.test_folder import CLASSES, describe, own
from tests.trees import make_voc, mask_of, write_pair
from utils.errors import UserError

__all__ = ["own"]  # the fixture


RAW = {"0": "ground", "7": "road", "8": "road", "300": "car", "11": "tree", "12": "sign"}
HUES = {"#000000": "ground", "#804080": "road", "#f423e8": "road", "#00008e": "car",
        "#6b8e23": "tree", "#dcdc00": "sign"}  # fmt: skip


def recode(own: Path, kind: str) -> dict:
    """Rewrite the masks of `own` as another format; returns what dataset.json says of it."""
    codes = [[0], [7, 8], [300], [11], [12]]
    hues = [bytes.fromhex(key[1:]) for key in HUES]
    for path in (own / "masks").rglob("*.png"):
        labels = np.array(Image.open(path))
        if kind == "16-bit":
            table = np.zeros(256, np.uint16)
            table[[0, 1, 2, 3, 4, 255]] = [code[-1] for code in codes] + [65535]
            Image.fromarray(table[labels]).save(path)
            continue
        table = np.zeros((256, 4), np.uint8)
        order = [0, 1, 3, 4, 5]
        table[:5] = [[*hues[i], 255] for i in order]
        table[255] = [255, 255, 255, 255] if kind == "RGB" else [0, 0, 0, 0]
        Image.fromarray(table[labels]).convert(kind).save(path)
    if kind == "16-bit":
        return {"labels": RAW, "ignore": [65535, 9]}
    return {"colors": HUES, "ignore": ["#ffffff"] if kind == "RGB" else "#00000000"}


@pytest.mark.parametrize("kind", ["16-bit", "RGB", "RGBA"])
def test_masks_of_any_numbering_are_the_same_data(own, tmp_path_factory, kind):
    """Presence, lists, labels and the report do not tell from the masks that were rewritten."""
    (own / "train.txt").write_text("a\nb\ndeep/c\ndeep/d\ne\n")

    def everything():
        spec = get_spec("folder", own)
        data = build_datasets(
            spec, own, spec.task("2-1"), 1, overlap=True, crop_size=32, seed=0, crop_val=False,
            workdir=tmp_path_factory.mktemp("work"),
        )  # fmt: skip
        (own / "val.txt").write_text("e\n")
        pixels = [labels.tolist() for split in (data.train, data.test) for _, labels in split]
        return spec.void, data.train.indices.tolist(), pixels, check(own, ["2-1"])

    expected = everything()
    assert expected[:2] == (255, [2, 4])
    describe(own, **recode(own, kind))
    assert everything() == expected


def test_one_bit_masks(own):
    for path in (own / "masks").rglob("*.png"):
        Image.fromarray(np.array(Image.open(path)) > 0).save(path)
        assert Image.open(path).mode == "1"
    describe(own, classes=["ground", "thing"])
    with pytest.raises(UserError, match="has mode 1: save it .* or name its ids or colours in"):
        get_spec("folder", own).read_mask(str(own / "masks/a.png"))
    describe(own, classes=["ground", "thing"], labels={"0": "ground", "1": "thing"})
    spec = get_spec("folder", own)
    assert np.unique(spec.read_mask(str(own / "masks/a.png"))).tolist() == [0, 1]


def test_several_labels_may_be_ignored(own):
    write_pair(own / "images/a.jpg", own / "masks/a.png", mask_of(0, 1, 200, 255))
    describe(own, ignore=[200, 255])
    spec = get_spec("folder", own)
    assert np.unique(spec.read_mask(str(own / "masks/a.png"))).tolist() == [0, 1, 255]
    assert check(own)[1] == []
    describe(own)
    assert any("holds foreign labels 200" in problem for problem in check(own)[1])


@pytest.mark.parametrize(
    ("changes", "void"),
    [
        ({"labels": RAW}, 255), ({"labels": RAW | {"255": "tree"}}, None), ({"colors": HUES}, None),
        ({"labels": RAW, "ignore": None}, None), ({"labels": RAW, "ignore": []}, None),
        ({"labels": RAW, "ignore": 9}, 255), ({"colors": HUES, "ignore": "#ffffff"}, 255),
        ({"ignore": []}, None), ({"ignore": [255]}, 255),
    ],
)  # fmt: skip
def test_what_is_ignored_beside_a_table(own, changes, void):
    """255 by default, where ids give it no other meaning; with colours nothing."""
    describe(own, **changes)
    assert get_spec("folder", own).void == void


def test_another_table_is_another_scan(own, tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    labels = {str(i): name for i, name in enumerate(CLASSES)}
    found = []
    for table in (labels, labels | {"3": "sign", "4": "tree"}):
        describe(own, labels=table)
        spec = get_spec("folder", own)
        args = spec, own, spec.task("3-1"), 1, True, work
        found.append(splits.training_indices(*args).tolist())
    assert found == [[3], [2]]


BROKEN_TABLES = [
    ({"labels": RAW, "colors": HUES}, "give either 'labels' .ids. or 'colors'"),
    ({"labels": HUES}, "'labels' has the key '#000000': use ids as '7'"),
    ({"colors": RAW}, "'colors' has the key '0': use colours as '#rrggbb'"),
    ({"labels": {"0": "ground"}}, "class 'road' has no entry in 'labels'"),
    ({"labels": RAW | {"9": "rode"}}, "'labels' maps '9' to 'rode'"),
    ({"labels": RAW, "ignore": [7]}, "'7' stands twice in 'labels' and 'ignore'"),
    ({"colors": HUES, "ignore": 255}, "'255' in 'colors' or 'ignore' is wrong"),
    ({"labels": {"0": 3}}, "'labels.0' is 3: input should be a valid string"),
    ({"ignore": [255, 3]}, "'ignore' is 3: use a label from 5"),
    ({"ignore": "#ffffff"}, "'ignore' is \"#ffffff\": input should be a valid integer"),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN_TABLES)
def test_every_mistake_in_a_table_is_named(own, changes, message):
    describe(own, **changes)
    layout, problems = read_layout(own)
    assert layout is None
    assert len(problems) == 1
    assert re.search(message, problems[0]), problems


@pytest.mark.parametrize("inside", [True, False])
def test_data_in_the_layout_of_voc_with_other_names(tmp_path, inside):
    """dataset.json lies in PascalVOC12 or beside it; lists are those of VOC."""
    make_voc(tmp_path, [mask_of(0, 1), mask_of(2, 255)], [mask_of(1)])
    below = "" if inside else "PascalVOC12/"
    root = tmp_path / "PascalVOC12" if inside else tmp_path
    keys = {"images": "JPEGImages", "masks": "SegmentationClassAug",
            "train": "splits/train_aug.txt", "val": "splits/val.txt"}  # fmt: skip
    describe(root, classes=["street", "tram", "bus"], **{k: below + v for k, v in keys.items()})
    assert get_spec("folder", root).class_names == ("street", "tram", "bus")
    for split in ("train", "val"):
        assert get_spec("folder", root).find_samples(root, split) == VOC.find_samples(
            tmp_path, split
        )
    path = tmp_path / "PascalVOC12/splits/val.txt"
    for line in ("/JPEGImages/val0.jpg /SegmentationClassAug/val1.png", "/x/val0.jpg /y/val0.png"):
        path.write_text(line)
        with pytest.raises(UserError, match="line 1: no image"):
            get_spec("folder", root).find_samples(root, "val")


def test_repeated_problems_are_counted(own, capsys):
    for i in range(40):
        write_pair(own / f"images/x {i}.jpg", own / f"masks/x {i}.png", mask_of(i % 2, 9 + i % 2))
    (own / "train.txt").write_text("".join(f"x {i}\n" for i in range(40)) + "b\nd1\nd2\nd3\nd4\n")
    labels = {str(i): name for i, name in enumerate(CLASSES)}
    describe(own, labels=labels)
    assert main([str(own)]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem")]
    assert [line.split("x ")[1].split(".")[0] for line in lines if "the id 9 " in line] == list(
        "024"
    )
    assert [line.split("x ")[1].split(".")[0] for line in lines if "the id 10 " in line] == list(
        "135"
    )
    assert lines.count("problem: and 17 more of this kind") == 2
    missing = [line.split("'")[1] for line in lines if "no image" in line]
    assert missing == ["d1", "d2", "d3", "d4"]


@pytest.mark.parametrize("table", [True, False])
def test_problems_of_many_numbers_are_counted_too(own, table, capsys):
    """A hundred masks with a hundred ids that nobody named fill no more than a screen."""
    for i in range(100):
        write_pair(own / f"images/x{i}.jpg", own / f"masks/x{i}.png", mask_of(i % 2, 100 + i))
    (own / "train.txt").write_text("".join(f"x{i}\n" for i in range(100)) + "b\n")
    describe(own, labels={str(i): name for i, name in enumerate(CLASSES)} if table else None)
    assert main([str(own)]) == 1
    out = capsys.readouterr().out
    assert sum("holds" in line for line in out.splitlines()) == 10
    assert "problem: and 90 more like these, of other numbers\n" in out
    assert "\n102 problems\n" in out  # and two classes that no mask holds
