"""export.py: what other runtimes compute is what the model computes, at any size."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor

from dataset.transform import normalize
from dataset.voc import VOC
from engine.predictor import Predictor, load_predictor
from export import Deployed, check, main
from tests.checkpoints import SEEN, picture, write_checkpoint
from tests.conftest import ROOT
from utils.errors import UserError

SIZES = [(320, 213), (200, 304), (97, 65)]  # (width, height)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("ckpt") / "MIB_1.pth")


@pytest.fixture(scope="module")
def predictor(ckpt) -> Predictor:
    return load_predictor(ckpt, "cpu")


@pytest.fixture(scope="module")
def exported(ckpt, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("out") / "new" / "model.onnx"  # the folder is made
    assert run(ckpt, path) == 0
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    return path


def run(ckpt: Path, out: Path, *more: str) -> int:
    return main(["--ckpt", str(ckpt), "--out", str(out), *more])


def as_batch(*images: Image.Image) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images])


@torch.no_grad()
def assert_agree(predictor: Predictor, images: Tensor, labels: Tensor, logits: Tensor) -> None:
    """Labels equal on 99.9 % of the pixels, the rest within 1e-3 of a tie."""
    expected = predictor.model(normalize(images)).logits
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    full = torch.nn.functional.interpolate(expected, images.shape[2:], mode="bilinear")
    other = labels != torch.tensor(predictor.labels)[full.argmax(1)]
    assert (labels.dtype, labels.shape) == (torch.uint8, images[:, 0].shape)
    assert other.float().mean() <= 1e-3
    first, second = full.topk(2, 1).values.unbind(1)
    assert (first - second)[other].le(1e-3).all()
    assert len(labels.unique()) > 1


def test_onnx_on_photographs_of_three_sizes(exported, predictor, photographs):
    session = onnxruntime.InferenceSession(exported)
    paths = sorted((photographs / "PascalVOC12" / "JPEGImages").iterdir())
    for number, size in enumerate(SIZES, 1):
        opened = [Image.open(path).convert("RGB").resize(size) for path in paths[:number]]
        images = as_batch(*opened)
        labels, logits = session.run(["labels", "logits"], {"images": images.numpy()})
        assert_agree(predictor, images, torch.from_numpy(labels), torch.from_numpy(logits))


def test_onnx_of_a_few_pixels(exported, predictor):
    """The window of the pooling branch is larger than the map."""
    session = onnxruntime.InferenceSession(exported)
    for size in [(1, 1), (16, 17), (200, 3)]:
        images = as_batch(picture(*size))
        _, logits = session.run(["labels", "logits"], {"images": images.numpy()})
        with torch.no_grad():
            expected = predictor.model(normalize(images)).logits.numpy()
        assert abs(logits - expected).max() <= 1e-5 * abs(expected).max()


def test_onnx_says_what_it_is(exported):
    model = onnx.load(exported)
    onnx.checker.check_model(model, full_check=True)
    assert {node.op_type for node in model.graph.node}.isdisjoint({"BatchNormalization"})
    dims = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert dims["images"] == ["batch", 3, "height", "width"]
    assert dims["labels"] == ["batch", "height", "width"]
    about = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert_metadata(about)
    page = (ROOT / "docs" / "export.md").read_text().rpartition("## Metadata")[2]
    rows = re.findall(r"^\| (`.*?) \|", page, re.M)
    assert {key for row in rows for key in re.findall(r"`(\w+)`", row)} == set(about)


def assert_metadata(about: dict) -> None:
    assert about["labels"] == SEEN
    assert about["class_names"] == [VOC.class_names[label] for label in SEEN]
    assert (about["shorter_side"], about["probabilities"]) == (64, "softmax")
    assert about["mean"] == [0.485, 0.456, 0.406]
    assert about["std"] == [0.229, 0.224, 0.225]


def test_the_example_of_the_page_runs(exported, tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "export.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    shutil.copy(exported, tmp_path / "model.onnx")
    picture(120, 90).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(example, found)
    assert found["labels"].shape == (1, 64, 85)
    assert found["logits"].shape == (1, 5, 4, 6)
    assert VOC.class_names[found["labels"].flat[0]] in capsys.readouterr().out


def test_pt2_replaces_a_file_and_an_unfinished_run_is_said(tmp_path, predictor, caplog):
    source = write_checkpoint(tmp_path / "MIB_1.pth", finished=False, epoch=3)
    (tmp_path / "model.pt2").write_text("before")
    assert run(source, tmp_path / "model.pt2") == 0
    assert "unfinished run, epoch 3" in caplog.text
    about = {"metadata.json": ""}
    model = torch.export.load(tmp_path / "model.pt2", extra_files=about).module()
    assert_metadata(json.loads(about["metadata.json"]))
    for number, size in enumerate(SIZES, 1):
        images = as_batch(*(picture(*size, seed=i) for i in range(number)))
        assert_agree(predictor, images, *model(images))


def test_a_checkpoint_of_the_reference_is_told_what_it_is(tmp_path, capsys):
    source, out = write_checkpoint(tmp_path / "r.pth", knows_itself=False), tmp_path / "m.pt2"
    assert run(source, out) == 1
    assert "add --dataset, --task, --step, --backbone" in capsys.readouterr().err
    told = ("--dataset", "voc", "--task", "15-5", "--step", "0", "--backbone", "resnet18")
    assert run(source, out, *told) == 0  # with norms in place, as the reference's are
    assert out.exists()


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("model.pb", "its suffix chooses the format, .onnx or .pt2"),
        ("model", "its suffix"),
        ("folder.onnx", "is a folder"),
        ("file/model.onnx", "cannot write to"),
        ("same.pt2", "is the checkpoint"),
        ("x" * 300 + ".pt2", "File name too long"),
    ],
)
def test_what_cannot_be_written_ends_in_a_line(ckpt, tmp_path, capsys, out: str, words: str):
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "file").write_text("")
    shutil.copy(ckpt, tmp_path / "same.pt2")
    assert run(tmp_path / "same.pt2", tmp_path / out) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert (tmp_path / "same.pt2").read_bytes() == ckpt.read_bytes()


def test_what_is_no_checkpoint_ends_in_a_line(tmp_path, capsys):
    (tmp_path / "junk.pth").write_bytes(b"junk")
    for name in ("junk.pth", "none.pth"):
        assert run(tmp_path / name, tmp_path / "model.onnx") == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert name in line
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("name", ["gone.pth", "x" * 300])
def test_checkpoints_that_cannot_be_end_in_a_line(tmp_path, capsys, name: str):
    (tmp_path / "loop.pt2").symlink_to("loop.pt2")  # no reason to refuse: it is replaced
    assert run(tmp_path / name, tmp_path / "loop.pt2") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert name in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_extras_are_named(ckpt, tmp_path, monkeypatch, capsys, name: str):
    monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    assert run(ckpt, tmp_path / "model.onnx") == 1
    expected = f"error: {name} is missing, which .onnx needs: pip install -r {extras()}\n"
    assert capsys.readouterr().err == expected


def extras() -> str:
    names = (ROOT / "requirements-extras.txt").read_text()
    assert all(f"\n{name}>=" in names for name in ("onnx", "onnxscript", "onnxruntime"))
    return "requirements-extras.txt"


@torch.no_grad()
def test_a_wrong_result_is_not_written(predictor):
    network = Deployed(predictor).eval()
    assert check(predictor, network) < 1e-5
    for change in (lambda a, b: (a, 1.001 * b), lambda a, b: (a * 0 + 99, b),
                   lambda a, b: (a, b * torch.nan), lambda a, b: (a[:, 1:], b)):  # fmt: skip
        with pytest.raises(UserError, match="nothing was written"):
            check(predictor, lambda images, change=change: change(*network(images)))
