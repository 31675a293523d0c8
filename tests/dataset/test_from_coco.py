"""Own data from a COCO annotation file: polygons, run lengths, crowds, overlaps, bad files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import check
from dataset.catalog import get_spec
from dataset.from_coco import main
from tests.conftest import ROOT


def square(key: int, image: int, category: int, left: int, side: int, **more) -> dict:
    """A square instance whose upper left corner is (left, 0)."""
    right = left + side
    return {
        "id": key, "image_id": image, "category_id": category, "area": side * side, "iscrowd": 0,
        "segmentation": [[left, 0, right, 0, right, side, left, side]],
    } | more  # fmt: skip


@pytest.fixture
def content(tmp_path: Path) -> dict:
    """Three images with instances of the categories 18 (dog) and 3 (car)."""
    (tmp_path / "pictures/b").mkdir(parents=True)
    names = ["a.jpg", "b/c.jpg", "d.png"]
    for name in names:
        Image.new("RGB", (12, 10)).save(tmp_path / "pictures" / name)
    # Column-wise: 20 pixels of nothing, two columns of 10, the rest nothing.
    crowd = {"size": [10, 12], "counts": [20, 20, 80]}
    return {
        "images": [
            {"id": 7 + i, "file_name": name, "width": 12, "height": 10}
            for i, name in enumerate(names)
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
        "annotations": [
            square(1, 7, 18, 0, 2),
            square(2, 7, 3, 0, 6),  # larger, so below the dog, though it comes later
            square(3, 8, 3, 4, 4),
            square(4, 9, 18, 0, 1),
            square(5, 9, 18, 2, 2, iscrowd=1, segmentation=crowd, area=20),
        ],
    }


def convert(tmp_path: Path, content: object, *more: str) -> int:
    pytest.importorskip("pycocotools", reason="needs pycocotools (requirements-extras.txt)")
    (tmp_path / "instances.json").write_text(json.dumps(content))
    images, out = str(tmp_path / "pictures"), str(tmp_path / "own")
    return main([str(tmp_path / "instances.json"), "--images", images, "--out", out, *more])


def test_it_becomes_own_data(tmp_path, content, capsys):
    assert convert(tmp_path, content) == 0
    out = tmp_path / "own"
    assert capsys.readouterr().out.startswith(f"{out}: 2 classes, 3 images; next: python -m")
    spec = get_spec("folder", out)
    assert spec.class_names == ("background", "car", "dog")  # by id
    first = np.array(spec.read_mask(str(out / "masks/a.png")))
    expected = np.zeros((10, 12), np.uint8)
    expected[:6, :6], expected[:2, :2] = 1, 2
    assert np.array_equal(first, expected)
    crowd = np.array(spec.read_mask(str(out / "masks/d.png")))
    assert (crowd[:, 2:4] == 255).all()
    assert crowd[0, 0] == 2
    assert np.count_nonzero(crowd) == 21
    samples = [spec.find_samples(out, split) for split in ("train", "val")]
    assert [len(split) for split in samples] == [2, 1]
    assert check.check(out, ["1-1"])[1] in ([], [f"{out}: class 2 (dog) is in no mask of the train "
                                                 "list"])  # fmt: skip


def broken(content: dict, key: str, value: object) -> dict:
    content[key][0] |= value if isinstance(value, dict) else {}
    return content


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("images", {"file_name": "../x.jpg"}, "'../x.jpg' leads out"),
        ("images", {"file_name": "/x.jpg"}, "'/x.jpg' leads out"),
        ("images", {"file_name": "no.jpg"}, "no.jpg"),
        ("images", {"file_name": "b/c.jpg"}, "one of them twice"),
        ("annotations", {"category_id": 5}, "annotation 1 of a.jpg cannot be drawn (KeyError: 5)"),
        ("annotations", {"segmentation": [[1, 2]]}, "annotation 1 of a.jpg cannot be drawn"),
        ("categories", {"name": "car"}, "two classes are called 'car'"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, content, capsys, key, value, words):
    assert convert(tmp_path, broken(content, key, value)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert words in error


@pytest.mark.parametrize("content", [{}, [], {"images": [], "categories": []}])
def test_other_files_are_refused(tmp_path, content, capsys):
    assert convert(tmp_path, content) == 1
    assert "is no annotation file of COCO" in capsys.readouterr().err


def test_nothing_is_overwritten(tmp_path, content, capsys):
    (tmp_path / "own").mkdir()
    assert convert(tmp_path, content) == 1
    assert "choose another --out" in capsys.readouterr().err
    assert list((tmp_path / "own").iterdir()) == []


@pytest.mark.parametrize("share", ["0", "1", "nan"])
def test_the_share_is_between_0_and_1(tmp_path, content, capsys, share):
    assert convert(tmp_path, content, "--val_share", share) == 1
    assert "--val_share is" in capsys.readouterr().err


def test_without_pycocotools_it_says_what_to_install(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    code = (
        "import sys; sys.modules['pycocotools'] = None; from dataset.from_coco import main; "
        f"sys.exit(main(['{tmp_path}/a.json', '--images', '.', '--out', '{tmp_path}/out']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == (
        "error: pycocotools is missing: pip install -r requirements-extras.txt\n"
    )
