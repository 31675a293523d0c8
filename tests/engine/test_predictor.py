"""From Python: a checkpoint, an image of any kind, labels of the data set."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.transform import EvalTransform
from dataset.voc import VOC
from engine.plans import parse
from engine.predictor import Layout, Predictor, Segmented, View, load_predictor, network_size
from methods.windows import windows_along
from tests.checkpoints import FLAGS, SEEN, picture, write_checkpoint
from utils.errors import UserError


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("ckpt") / "MIB_1.pth")


@pytest.fixture(scope="module")
def predictor(ckpt) -> Predictor:
    return load_predictor(ckpt, "cpu")


def test_a_checkpoint_becomes_a_predictor(predictor, ckpt):
    assert not predictor.model.training
    assert predictor.labels == tuple(SEEN)
    assert predictor.class_names == VOC.class_names
    assert (predictor.size, predictor.binary, predictor.device.type) == (64, False, "cpu")
    assert (predictor.options.backbone, predictor.options.crop_size) == ("resnet18", 64)
    assert predictor.summary == "MIB_1.pth: voc 19-1, step 1, resnet18, 5 classes"
    assert load_predictor(str(ckpt), "cpu").labels == predictor.labels


def test_every_kind_of_image_gives_the_same_labels(predictor):
    image = picture(90, 70)
    pixels = np.array(image)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    labels = predictor(image)
    assert (labels.shape, labels.dtype) == ((70, 90), np.uint8)
    assert set(np.unique(labels)) <= set(SEEN)
    assert len(np.unique(labels)) > 1
    backwards = np.ascontiguousarray(pixels[..., ::-1])
    tensors = (tensor, tensor / 255, (tensor / 255).double())
    for same in (pixels, backwards[..., ::-1], *tensors, image.convert("RGBA")):
        assert np.array_equal(predictor(same), labels)
    assert not np.array_equal(predictor(backwards), labels)
    image.putpixel((0, 0), (1, 2, 3))  # neither is anything kept, nor was it changed
    assert np.array_equal(predictor(pixels), labels)


def test_probabilities_are_those_of_the_labels(predictor):
    image = picture(90, 70)
    probabilities = predictor.probabilities(image)
    assert (probabilities.shape, probabilities.dtype) == ((5, 70, 90), np.float16)
    np.testing.assert_allclose(probabilities.astype(float).sum(0), 1, atol=3e-3)
    labels = np.array(predictor.labels)[probabilities.argmax(0)]
    assert (labels == predictor(image)).mean() > 0.995  # ties of rounding


def test_a_binary_model_answers_with_sigmoids(tmp_path):
    options = parse([*FLAGS, "--bce"])[0].opts.record() | {"step": 1}
    binary = load_predictor(write_checkpoint(tmp_path / "b.pth", options=options), "cpu")
    assert binary.binary
    assert abs(binary.probabilities(picture(64, 64)).astype(float).sum(0) - 1).max() > 0.1


def test_views_are_looked_at(predictor):
    image = picture(90, 70)
    labels = predictor(image)
    for view in ({"size": 32}, {"flip": True}, {"scales": (0.5, 1)}):
        assert not np.array_equal(predictor(image, **view), labels)
        assert not np.array_equal(
            predictor.probabilities(image, **view), predictor.probabilities(image)
        )
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    flipped = predictor(mirrored, flip=True)[:, ::-1]
    assert (flipped == predictor(image, flip=True)).mean() > 0.999


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 5, 3)), "this is an array 4 x 5 x 3 of float64"),
        (np.zeros((4, 5, 4), np.uint8), "this is an array 4 x 5 x 4 of uint8"),
        (np.zeros((4, 5), np.uint8), "this is an array 4 x 5 of uint8"),
        (np.zeros((), np.uint8), "this is an array without shape of uint8"),
        (np.zeros((0, 5, 3), np.uint8), "this one is empty, 0 x 5 x 3"),
        (Image.new("RGB", (0, 7)), "this one is empty, 7 x 0 x 3"),
        (torch.zeros(3, 0, 7), "this one is empty, 0 x 7 x 3"),
        (torch.zeros(4, 5, 3), "this is a tensor 4 x 5 x 3 of float32"),
        (torch.zeros(2, 3, 4, 5), "this is a tensor 2 x 3 x 4 x 5 of float32"),
        (torch.zeros(3, 4, 5, dtype=torch.int64), "this is a tensor 3 x 4 x 5 of int64"),
        (torch.full((3, 4, 5), 1.5), "with values from 1.5 to 1.5"),
        (torch.tensor([-0.1, 1]).repeat(3, 4, 1), "with values from -0.1 to 1"),
        (torch.full((3, 4, 5), torch.nan), "with values from nan to nan"),
        (torch.tensor([0, torch.nan, 1]).repeat(3, 4, 1), "with values from nan to nan"),
        ("photo.jpg", "this is of type str"),
        ([[1, 2], [3, 4]], "this is of type list"),
    ],
)
def test_what_is_no_image_is_named(predictor, image, words):
    with pytest.raises(UserError) as caught:
        predictor(image)
    expected = "expected a PIL image, an array H W 3 of uint8, or a tensor 3 H W of uint8 or of"
    assert str(caught.value).startswith(expected)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("view", "words"),
    [
        ({"size": -1}, "size -1"),
        ({"window": 31}, "window 31: give at least 32 pixels, 0 for none"),
        ({"window": -1}, "window -1"),
        ({"scales": (0.0,)}, "scales"),
        ({"scales": ()}, "scales"),
    ],
)
def test_views_out_of_range_are_named(predictor, view, words):
    with pytest.raises(UserError, match=words):
        predictor(picture(64, 64), **view)


def test_checkpoints_that_cannot_be_loaded_are_named(ckpt, tmp_path):
    with pytest.raises(UserError, match="no checkpoint at .*gone.pth: check the path"):
        load_predictor(tmp_path / "gone.pth")
    with pytest.raises(UserError, match="'tpu': choose from auto, cpu, cuda"):
        load_predictor(ckpt, "tpu")
    with pytest.raises(UserError, match="knows what it is: drop --task, --step"):
        load_predictor(ckpt, "cpu", task="15-5", step=0)
    theirs = write_checkpoint(tmp_path / "theirs.pth", knows_itself=False)
    with pytest.raises(UserError, match="add --step, --backbone"):
        load_predictor(theirs, "cpu", dataset="voc", task="15-5")
    told = load_predictor(theirs, "cpu", dataset="voc", task="15-5", step=0, backbone="resnet18")
    assert told.labels == tuple(range(16))


def test_an_unfinished_run_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        load_predictor(write_checkpoint(tmp_path / "x.pth", finished=False, epoch=3), "cpu")
    assert "x.pth is of an unfinished run, epoch 3" in caplog.text


def test_the_network_sees_the_size_of_the_evaluation():
    for width, height in [(320, 487), (500, 375), (101, 99), (96, 96)]:
        size = network_size(width, height, 96)
        image = Image.new("RGB", (width, height))
        crop, _ = EvalTransform(96)(image, image.convert("L"), np.random.default_rng(0))
        assert min(size) == 96
        assert crop.shape == (3, 96, 96)
    assert network_size(320, 487, 96) == (96, 96 * 487 // 320)
    assert network_size(500, 10, 0) == (500, 10)
    assert network_size(5000, 2, 64) == (256, 1)  # not 160,000 wide


def test_the_size_is_that_of_the_test_unless_told(predictor, tmp_path):
    assert predictor.layout(80, 64).size == (80, 64)
    assert predictor.layout(100, 80).size == (80, 64)
    assert predictor.layout(100, 80, View(size=32)).size == (40, 32)
    assert predictor.layout(100, 80, View(size=0)).size == (100, 80)
    options = {**parse(FLAGS)[0].opts.record(), "step": 1, "crop_val": False}
    whole = load_predictor(write_checkpoint(tmp_path / "whole.pth", options=options), "cpu")
    assert whole.layout(100, 80).size == (100, 80)


# --- large images; the crop is 64 ---


@pytest.mark.parametrize(
    ("width", "height", "view", "expected"),
    [
        (300, 128, View(), ((150, 64), 0)),  # not more than twice 64
        (300, 129, View(), ((300, 129), 64)),
        (300, 129, View(window=0), ((148, 64), 0)),
        (300, 129, View(size=100), ((232, 100), 0)),
        (300, 200, View(size=129), ((193, 129), 64)),  # what the network sees is what counts
        (80, 60, View(size=129), ((172, 129), 64)),
        (300, 129, View(size=0), ((300, 129), 64)),
        (300, 129, View(size=0, window=0), ((300, 129), 0)),
        (300, 129, View(window=299), ((300, 129), 299)),
        (300, 129, View(window=300), ((148, 64), 0)),  # the image is a window: as without
        (80, 60, View(window=64), ((80, 60), 64)),
        (300, 200, View(size=100, window=64), ((150, 100), 64)),
        (300, 200, View(size=100, window=150), ((150, 100), 0)),
    ],
)
def test_how_an_image_is_shown(predictor, width, height, view, expected):
    assert tuple(predictor.layout(width, height, view)) == expected


def in_windows(predictor: Predictor, pixels: np.ndarray, window: int, **view) -> Segmented:
    """An image that is seen in windows at its own size, even if it is one window."""
    height, width = pixels.shape[:2]
    layout = Layout((width, height), window)
    return predictor._in_windows(pixels, layout, View(**view), scores=True)


@pytest.mark.parametrize("view", [{}, {"flip": True}, {"scales": (0.75, 1)}])
def test_a_window_over_the_whole_image_is_the_plain_result(predictor, view):
    pixels = np.array(picture(90, 70))
    with torch.inference_mode():
        found = in_windows(predictor, pixels, 128, **view)
    view |= {"size": 0, "window": 0}
    assert (found.labels == predictor(pixels, **view)).mean() > 0.999
    plain = predictor.probabilities(pixels, **view)
    np.testing.assert_allclose(found.probabilities, plain, atol=1e-3)


def test_large_images_are_seen_in_windows_of_the_crop(predictor):
    """The middle of a window that lies alone there is what the network says of it alone."""
    image = picture(180, 140)
    labels, probabilities = predictor(image), predictor.probabilities(image)
    assert np.array_equal(labels, predictor(image, window=64, size=0))
    assert not np.array_equal(labels, predictor(image, window=0))
    alone = predictor.probabilities(image.crop((0, 0, 64, 64)), size=0)
    across = windows_along(180, 64).starts[1], windows_along(140, 64).starts[1]
    corner = np.s_[:, : across[1], : across[0]]
    np.testing.assert_allclose(probabilities[corner], alone[corner], atol=1e-3)
    told = np.array(predictor.labels)[probabilities.argmax(0)]
    assert (told == labels).mean() > 0.99


@pytest.mark.parametrize("view", [{"flip": True}, {"scales": (0.5, 1)}, {"size": 130}])
def test_windows_are_looked_at_in_every_way(predictor, view):
    image = picture(200, 150)
    labels = predictor(image, window=64, **view)
    assert labels.shape == (150, 200)
    assert not np.array_equal(labels, predictor(image, window=64))
    if "flip" in view:
        mirrored = predictor(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), window=64, flip=True)
        assert (mirrored[:, ::-1] == labels).mean() > 0.995


def test_batches_of_windows_change_nothing(predictor):
    pixels = np.array(picture(200, 150))
    one, many = (next(predictor.segment([pixels], View(batch=n))).labels for n in (1, 100))
    assert (one == many).mean() > 0.999
