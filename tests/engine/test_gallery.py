"""A real toy run of two methods, and the picture of its checkpoints."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import run
from engine import gallery
from tests.test_run import SMALL, make_toy


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """The folder of the checkpoints of step 0, FT and MIB."""
    folder = tmp_path_factory.mktemp("gallery")
    toy = make_toy(folder / "toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        argv = ["--data_root", str(toy), *SMALL, "--step", "all", "--method", "FT,MIB"]
        assert run.main(argv) == 0
    return folder / "checkpoints" / "step" / "voc-15-5-ov"


def test_columns_are_the_checkpoints(checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(checkpoints.parents[2])
    paths = [str(checkpoints / name) for name in ("base_0.pth", "FT_1.pth", "MIB_1.pth")]
    drawn = []
    monkeypatch.setattr(
        gallery, "sample_panel", lambda image, maps, names, **_: drawn.append(maps) or image
    )
    assert gallery.main([*paths, "--out", str(tmp_path / "a.png"), "--count", "2"]) == 0
    assert capsys.readouterr().out == f"picture: {tmp_path / 'a.png'}\n"
    assert [list(maps) for maps in drawn] == [["truth", "step 0", "FT, step 1", "MIB, step 1"]] * 2
    assert drawn[0]["step 0"].max() <= 15


def test_the_picture_is_written(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(checkpoints.parents[2])
    out = tmp_path / "picture.png"
    assert gallery.main([str(checkpoints / "FT_1.pth"), "--out", str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.width > 3 * picture.height / 2


def test_the_image_in_the_middle_is_chosen(monkeypatch):
    """Of twenty images two hold old and new classes; their shares of right pixels part them."""
    labels = [torch.full((4, 4), 1, dtype=torch.uint8) for _ in range(20)]
    for i in (3, 7, 11, 15):
        labels[i][0] = 5
    labels[11][1, :2] = 2
    data = [(torch.zeros(3, 4, 4, dtype=torch.uint8), y) for y in labels]
    right = {3: 8, 7: 2, 11: 6, 15: 4}

    def predict(model, precision, samples):
        for _, truth in samples:
            index = next(i for i, y in enumerate(labels) if y is truth)
            said = truth.numpy().copy().ravel()
            said[right[index] :] = 9
            yield None, truth.numpy(), said.reshape(4, 4)

    monkeypatch.setattr(gallery, "predict_samples", predict)
    monkeypatch.setattr(gallery, "SHARE", 5)
    context = SimpleNamespace(old_classes=5, precision=None)
    column = gallery.Column("", context, None)
    assert gallery.choose(data, column, 1) == [11]  # 7 2, 15 4, 11 6, 3 8: the third of four
    assert gallery.choose(data, column, 3) == [15, 11, 3]


def test_checkpoints_of_several_tasks_are_refused(checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(checkpoints.parents[2])
    path = checkpoints / "FT_1.pth"
    content = torch.load(path)
    content["options"]["task"] = "10-5"
    other = tmp_path / "other.pth"
    torch.save(content, other)
    assert gallery.main([str(path), str(other), "--out", str(tmp_path / "x.png")]) == 1
    assert gallery.main([str(path), "--out", str(tmp_path / "x.png"), "--count", "0"]) == 1
    assert "--count 0 is no number of images" in capsys.readouterr().err
    assert not np.any([(tmp_path / "x.png").exists()])
