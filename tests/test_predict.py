"""predict.py: any image in, masks in the data set's own labels out, one line for what is broken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import predict
from dataset.transform import EvalTransform, normalize, to_tensor
from dataset.voc import VOC
from engine.checkpoint import load
from engine.plans import parse as parse_run
from methods.averaging import average_probabilities, predict_average, versions
from modules.norm import get_norm
from predict import main, network_size, read_rgb, read_size
from segmentation_module import make_model
from tasks import get_task
from utils import checkpoint
from utils.errors import UserError
from utils.pictures import overlay, palette

STEPS = [[0, 3, 7], [1, 12]]  # head order is not label order
SEEN = [0, 3, 7, 1, 12]
FLAGS = ["--backbone", "resnet18", "--crop_size", "64", "--norm_act", "abn"]


def write_checkpoint(path: Path, knows_itself: bool = True, **changes) -> Path:
    """A ResNet-18 with random weights and a balanced guess, with options as run.py stores them."""
    opts = parse_run(FLAGS)[0].opts
    steps = STEPS if knows_itself else get_task("voc", "15-5").steps[:1]
    torch.manual_seed(0)
    pooling = opts.pooling if knows_itself else 32
    model = make_model(
        "resnet18", get_norm("abn"), [len(labels) for labels in steps], pooling=pooling
    )
    for classifier in model.cls:
        torch.nn.init.normal_(classifier.weight, std=1.0)
    content = {"model_state": model.state_dict()}
    if knows_itself:
        options = opts.record() | {"step": len(steps) - 1}
        content |= {"options": options, "steps": steps, **changes}
    checkpoint.save(path, content)
    return path


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("ckpt") / "MIB_1.pth")


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def run(ckpt: Path, out: Path, *arguments: object) -> int:
    return main(["--ckpt", str(ckpt), "--out", str(out), "--device", "cpu", *map(str, arguments)])


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# --- the whole program ---


def test_masks_are_what_the_model_says_in_original_labels(ckpt, tmp_path):
    picture(80, 64).save(tmp_path / "x.png")
    assert run(ckpt, tmp_path / "out", tmp_path / "x.png", "--scores") == 0
    mask = Image.open(tmp_path / "out/masks/x.png")
    assert mask.mode == "P"
    assert mask.getpalette() == palette().flatten().tolist()

    content = load(ckpt, "")
    model = make_model("resnet18", get_norm("abn"), [3, 2], pooling=4)
    model.load_state_dict(content["model_state"])
    with torch.no_grad():
        logits = model.eval()(normalize(to_tensor(picture(80, 64))[None])).logits
        logits = torch.nn.functional.interpolate(logits, (64, 80), mode="bilinear")
    expected = np.array(SEEN)[logits[0].argmax(0).numpy()]
    labels = np.asarray(mask)
    assert (labels == expected).mean() > 0.999
    assert len(np.unique(labels)) > 1

    stored = np.load(tmp_path / "out/scores/x.npz")
    assert stored["labels"].tolist() == SEEN
    assert stored["class_names"].tolist() == [VOC.class_names[label] for label in SEEN]
    assert stored["probabilities"].dtype == np.float16
    np.testing.assert_allclose(stored["probabilities"], logits[0].softmax(0), atol=2e-3)


def test_names_and_folders_are_kept_and_sizes_are(ckpt, tmp_path):
    sizes = {"a.jpg": (50, 70), "a.png": (33, 20), "deep/er/b.v2.jpg": (70, 50), "c.PNG": (1, 1),
             "wide.png": (300, 2), "d.jpg": (50, 70), "e.jpg": (50, 70)}  # fmt: skip
    for i, (name, size) in enumerate(sizes.items()):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        picture(*size, seed=i).save(tmp_path / "in" / name)
    (tmp_path / "in/notes.txt").write_text("no picture")
    (tmp_path / "in/.hidden.png").write_bytes(b"")
    assert run(ckpt, tmp_path / "out", tmp_path / "in", "--batch_size", 2) == 0
    masks = {"a.jpg.png": (50, 70), "a.png.png": (33, 20), "deep/er/b.v2.png": (70, 50)}
    masks |= {"c.png": (1, 1), "wide.png": (300, 2), "d.png": (50, 70), "e.png": (50, 70)}
    assert files(tmp_path / "out/masks") == sorted(masks)
    for name, size in masks.items():
        assert Image.open(tmp_path / "out/masks" / name).size == size
    assert files(tmp_path / "out/overlays") == sorted(n[:-3] + "jpg" for n in masks)
    assert not (tmp_path / "out/scores").exists()


def test_batches_change_nothing(ckpt, tmp_path):
    for i in range(3):
        picture(60, 60, seed=i).save(tmp_path / f"{i}.png")
    inputs = [tmp_path / f"{i}.png" for i in range(3)]
    assert run(ckpt, tmp_path / "one", *inputs, "--batch_size", 1, "--flip") == 0
    assert run(ckpt, tmp_path / "all", *inputs, "--batch_size", 3, "--flip") == 0
    for i in range(3):
        masks = [tmp_path / folder / f"masks/{i}.png" for folder in ("one", "all")]
        one, together = (np.asarray(Image.open(mask)) for mask in masks)
        assert (one == together).mean() > 0.999


def test_broken_files_are_named_and_the_others_done(ckpt, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(3):
        picture(64, 64, seed=i).save(folder / f"good{i}.png")
    (folder / "junk.jpg").write_bytes(b"junk")
    (folder / "empty.png").write_bytes(b"")
    picture(64, 64).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-300])
    assert run(ckpt, tmp_path / "out", folder) == 1
    assert files(tmp_path / "out/masks") == ["good0.png", "good1.png", "good2.png"]
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert sorted(line.split()[1] for line in lines) == sorted(
        str(folder / name) for name in ("cut.jpg", "empty.png", "junk.jpg")
    )
    assert all(line.startswith("error: ") and "cannot be read (" in line for line in lines)
    assert "3 of 6 images segmented" in captured.out


def test_its_own_results_are_no_input_and_inputs_stay(ckpt, tmp_path, capsys):
    picture(64, 64).save(tmp_path / "x.png")
    for _ in range(2):  # the second time the results lie in the input folder
        assert run(ckpt, tmp_path, tmp_path) == 0
    assert files(tmp_path) == ["masks/x.png", "overlays/x.jpg", "x.png"]
    before = (tmp_path / "masks/x.png").read_bytes()
    assert run(ckpt, tmp_path, tmp_path / "masks/x.png") == 1
    assert "is an input: choose another --out" in capsys.readouterr().err
    assert (tmp_path / "masks/x.png").read_bytes() == before


def test_several_folders_keep_their_names_and_clashes_are_refused(ckpt, tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        picture(64, 64).save(tmp_path / name / "x.png")
    assert run(ckpt, tmp_path / "out", tmp_path / "one", tmp_path / "two") == 0
    assert files(tmp_path / "out/masks") == ["one/x.png", "two/x.png"]
    clash = run(ckpt, tmp_path / "out", tmp_path / "one/x.png", tmp_path / "two/x.png")
    assert clash == 1
    assert "have one name: use two --out folders" in capsys.readouterr().err
    twice = run(ckpt, tmp_path / "once", tmp_path / "one/x.png", tmp_path / "one/../one/x.png")
    assert twice == 0
    assert files(tmp_path / "once/masks") == ["x.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.png"], "no image or folder gone.png: check the name"),
        (["."], "no picture in ."),
        (["x.png", "--scales", "0"], "--scales must lie between 0.1 and 10"),
        (["x.png", "--batch_size", "0"], "--batch_size must be at least 1"),
        (["x.png", "--step", "1"], "knows what it is: drop --step"),
        (["x.png", "--ckpt", "gone.pth"], "no checkpoint at gone.pth: check --ckpt"),
    ],
)
def test_what_cannot_work_is_one_line(ckpt, tmp_path, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if arguments[0] != ".":
        picture(64, 64).save("x.png")
    assert run(ckpt, Path("out"), *arguments) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_checkpoints_of_the_reference_need_to_be_told(tmp_path, capsys):
    theirs = write_checkpoint(tmp_path / "theirs.pth", knows_itself=False)
    picture(64, 64).save(tmp_path / "x.png")
    flags = ["--dataset", "voc", "--task", "15-5"]
    assert run(theirs, tmp_path / "out", tmp_path / "x.png", *flags) == 1
    assert "does not say what it is" in (error := capsys.readouterr().err)
    assert error.endswith("add --step, --backbone\n")
    flags += ["--step", "0", "--backbone", "resnet18"]
    assert run(theirs, tmp_path / "out", tmp_path / "x.png", *flags, "--size", 64) == 0
    assert np.asarray(Image.open(tmp_path / "out/masks/x.png")).max() <= 15


def test_names_of_own_data_come_out_of_the_checkpoint(tmp_path):
    names = [f"thing {i}" for i in range(13)]
    opts = parse_run(FLAGS)[0].opts
    options = {**opts.record(), "step": 1, "dataset": "folder", "task": "own", "data_root": "/gone"}
    own = write_checkpoint(tmp_path / "own.pth", options=options, class_names=names)
    picture(64, 64).save(tmp_path / "x.png")
    assert run(own, tmp_path / "out", tmp_path / "x.png", "--scores") == 0
    stored = np.load(tmp_path / "out/scores/x.npz")
    assert stored["class_names"].tolist() == [names[label] for label in SEEN]


# --- images ---


def test_every_mode_is_read_as_it_looks(tmp_path):
    ramp = np.linspace(0, 255, 48).round().astype(np.uint8).reshape(6, 8)
    grey = np.repeat(ramp[..., None], 3, 2)
    forms = {
        "L.png": Image.fromarray(ramp),
        "16.png": Image.fromarray(ramp.astype(np.uint16) * 257),
        "16.tif": Image.fromarray(ramp.astype(np.uint16) * 257),
        "I.tif": Image.fromarray(ramp.astype(np.int32)),
        "F.tif": Image.fromarray(ramp.astype(np.float32)),
        "P.png": Image.fromarray(grey).quantize(64),
        "LA.png": Image.fromarray(ramp).convert("LA"),
        "RGBA.png": Image.fromarray(grey).convert("RGBA"),
        "CMYK.tif": Image.fromarray(grey).convert("CMYK"),
        "gif.gif": Image.fromarray(ramp),
        "webp.webp": Image.fromarray(grey),
    }
    for name, image in forms.items():
        image.save(tmp_path / name, **({"lossless": True} if name == "webp.webp" else {}))
        read = read_rgb(tmp_path / name)
        assert (read.mode, read.size) == ("RGB", (8, 6)), name
        assert abs(np.asarray(read).astype(int) - grey).max() <= 4, name
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "dark.png")  # by range, not content
    assert np.asarray(read_rgb(tmp_path / "dark.png")).max() == 1
    Image.fromarray(ramp > 127).save(tmp_path / "1.png")
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "1.png"))[..., 0], (ramp > 127) * 255)


def test_transparent_pixels_are_white(tmp_path):
    pixels = np.zeros((2, 2, 4), dtype=np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    read = np.asarray(read_rgb(tmp_path / "x.png"))
    assert read[0, 0].tolist() == [10, 20, 30]
    assert (read[1] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_image(tmp_path, orientation):
    upright = picture(24, 16)
    undo = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if undo is None else upright.transpose(undo)
    stored.save(tmp_path / "x.png", exif=exif)
    assert read_size(tmp_path / "x.png") == (24, 16)
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "x.png")), np.asarray(upright))


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


# --- averaging ---


class Edge(torch.nn.Module):
    """A network of output stride 4 that sees left from right."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = torch.nn.Conv2d(3, 6, 5, stride=4, padding=2)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images)


def test_averaging_is_the_mean_of_full_size_probabilities():
    network, images = Edge().eval(), torch.randn(2, 3, 40, 56)
    maps = versions(network, images, scales=(1, 0.5, 1.25), flip=True)
    size = (37, 53)

    def full(logits: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(logits, size, mode="bilinear")

    total, sigmoids = [], []
    with torch.no_grad():
        for scale in (1, 0.5, 1.25):
            scaled = torch.nn.functional.interpolate(
                images, (round(40 * scale), round(56 * scale)), mode="bilinear", antialias=True
            )
            for logits in (network(scaled), network(scaled.flip(3)).flip(3)):
                total.append(full(logits).softmax(1))
                sigmoids.append(full(logits).sigmoid())
    mean = torch.stack(total).mean(0)
    got = average_probabilities(maps, size)
    assert (got.shape, got.dtype) == ((2, 6, 37, 53), torch.float16)
    torch.testing.assert_close(got.float(), mean, atol=1e-3, rtol=0)
    torch.testing.assert_close(
        average_probabilities(maps, size, binary=True).float(), torch.stack(sigmoids).mean(0),
        atol=1e-3, rtol=0,
    )  # fmt: skip
    assert (predict_average(maps, size) == mean.argmax(1)).float().mean() > 0.999


def test_flip_averaging_does_not_know_left_from_right():
    network, images = Edge().eval(), torch.randn(1, 3, 32, 32)
    straight = predict_average(versions(network, images, flip=True), (32, 32))
    mirrored = predict_average(versions(network, images.flip(3), flip=True), (32, 32))
    assert torch.equal(straight, mirrored.flip(2))
    alone = predict_average(versions(network, images), (32, 32))
    assert not torch.equal(alone, straight)


# --- overlay ---


def test_overlay_tints_all_but_background_and_keeps_small_images_legible():
    image = np.full((100, 400, 3), 200, dtype=np.uint8)
    labels = np.zeros((100, 400), dtype=np.uint8)
    labels[20:60, 100:200] = 3
    shown = overlay(image, labels, VOC.class_names)
    assert shown.shape[1] == 400
    assert shown.shape[0] > 110  # room for the legend
    assert (shown[5:15, 5:90] == 200).all()
    tint = np.rint(0.45 * 200 + 0.55 * palette()[3])
    assert np.array_equal(shown[40, 150], tint)
    swatches = (shown[100:] == palette()[3]).all(-1)
    assert swatches.sum() > 100  # the legend shows the class, and background does not crowd it
    assert not (shown[100:] == 0).all(-1).any()
    assert overlay(image[:9, :7], labels[:9, :7], VOC.class_names).shape[1] >= 360
    large = np.zeros((3000, 1000), dtype=np.uint8)
    assert overlay(np.zeros((3000, 1000, 3), np.uint8), large, VOC.class_names).shape[0] < 1400


def test_output_that_cannot_be_written_stops_with_one_line(ckpt, tmp_path, capsys):
    picture(64, 64).save(tmp_path / "x.png")
    (tmp_path / "out").write_text("a file")
    assert run(ckpt, tmp_path / "out", tmp_path / "x.png") == 1
    assert "cannot write" in capsys.readouterr().err


def test_formats_that_start_other_programs_are_not_read(tmp_path):
    assert "EPS" not in predict.FORMATS
    picture(8, 8).save(tmp_path / "x.png", format="PCX")  # stands for all that is not listed
    for read in (read_rgb, read_size):
        with pytest.raises(UserError, match="x.png cannot be read .no JPEG, PNG"):
            read(tmp_path / "x.png")


def test_the_size_is_that_of_the_test_unless_told(ckpt, tmp_path, monkeypatch):
    picture(80, 64).save(tmp_path / "x.png")
    seen = []

    def spy(width: int, height: int, shorter: int) -> tuple[int, int]:
        seen.append(shorter)
        return network_size(width, height, shorter)

    monkeypatch.setattr(predict, "network_size", spy)
    options = {**parse_run(FLAGS)[0].opts.record(), "step": 1, "crop_val": False}
    whole = write_checkpoint(tmp_path / "whole.pth", options=options)
    for path, flags in ((ckpt, []), (ckpt, ["--size", 32]), (ckpt, ["--size", 0]), (whole, [])):
        assert run(path, tmp_path / "out", tmp_path / "x.png", *flags) == 0
    assert seen == [64, 32, 0, 0]


def test_batches_are_filled_with_images_of_one_size():
    jobs = [predict.Job(Path(f"{i}.png"), Path(str(i))) for i in range(5)]
    sizes = dict(zip(jobs, [(8, 8), (9, 9), (8, 8), (9, 9), (8, 8)], strict=True))
    batches = [[job.name.name for job in batch] for batch in predict.batches(sizes, 2)]
    assert batches == [["0", "2"], ["4"], ["1", "3"]]
