"""predict.py: any image in, masks in the data set's own labels out, one line for what is broken."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from dataset.transform import normalize, to_tensor
from dataset.voc import VOC
from engine.checkpoint import load
from engine.plans import parse as parse_run
from modules.norm import get_norm
from predict import main
from segmentation_module import make_model
from tests.checkpoints import FLAGS, SEEN, picture, write_checkpoint
from tests.reliability.test_hostile import no_hang
from utils.pictures import overlay, palette


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("ckpt") / "MIB_1.pth")


def run(ckpt: Path, out: Path, *arguments: object) -> int:
    return main(["--ckpt", str(ckpt), "--out", str(out), "--device", "cpu", *map(str, arguments)])


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def one_line(error: str) -> str:
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


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


def test_what_never_ends_is_no_image(ckpt, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    os.mkfifo(tmp_path / "in/pipe.png")
    (tmp_path / "in/zero.png").symlink_to("/dev/zero")
    (tmp_path / "in/gone.png").symlink_to("nowhere")
    picture(64, 64).save(tmp_path / "in/x.png")
    with no_hang():
        assert run(ckpt, tmp_path / "out", tmp_path / "in") == 1
        assert "gone.png cannot be read" in one_line(capsys.readouterr().err)
        assert run(ckpt, tmp_path / "out", tmp_path / "in/pipe.png") == 1
    assert "pipe.png is no file" in one_line(capsys.readouterr().err)
    assert files(tmp_path / "out/masks") == ["x.png"]


def test_a_name_too_long_for_results_is_named_and_the_others_done(ckpt, tmp_path, capsys):
    for name in ("a", "x" * 250, "z"):
        picture(64, 64).save(tmp_path / f"{name}.png")
    assert run(ckpt, tmp_path / "out", tmp_path) == 1
    captured = capsys.readouterr()
    assert "xx.png: File name too long for its results: rename it" in one_line(captured.err)
    assert "2 of 3 images segmented" in captured.out
    made = ["masks/a.png", "masks/z.png", "overlays/a.jpg", "overlays/z.jpg"]
    assert files(tmp_path / "out") == made


def test_its_own_results_are_no_input_and_inputs_stay(ckpt, tmp_path, capsys):
    picture(64, 64).save(tmp_path / "x.png")
    for _ in range(2):  # the second time the results lie in the input folder
        assert run(ckpt, tmp_path, tmp_path) == 0
    assert files(tmp_path) == ["masks/x.png", "overlays/x.jpg", "x.png"]
    before = (tmp_path / "masks/x.png").read_bytes()
    assert run(ckpt, tmp_path, tmp_path / "masks/x.png") == 1
    assert "is an input: choose another --out" in capsys.readouterr().err
    assert (tmp_path / "masks/x.png").read_bytes() == before


@pytest.mark.parametrize(
    ("given", "described"),
    [("images", True), ("x.png", True), ("images", False), ("images/x.png", False)],
)
def test_true_masks_of_a_data_set_stay(ckpt, tmp_path, given, described, capsys, monkeypatch):
    monkeypatch.setattr(predict, "load_predictor", None)  # refused before anything is computed
    for name in ("images/x.png", "masks/x.png", "x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(64, 64).save(tmp_path / name)
    before = (tmp_path / "masks/x.png").read_bytes()
    if described:
        (tmp_path / "dataset.json").write_text("{}")
    assert run(ckpt, tmp_path, tmp_path / given) == 1
    error = one_line(capsys.readouterr().err)
    assert "holds a data set, whose masks could be lost: choose another --out" in error
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
        (["loop.png"], "no image or folder loop.png: check the name"),
        (["links"], "links/loop.png cannot be read ("),
        (["x" * 300], "the system refuses, " + "x" * 300 + ": File name too long"),
        (["x.png", "--ckpt", "x" * 300], "File name too long"),
        (["x.png", "--out", "loop.png"], "cannot write loop.png/masks/x.png: "),
        (["."], "no picture in ."),
        (["x.png", "--scales", "0"], "--scales: 0 is out of range (at least 0.1, at most 10)"),
        (["x.png", "--batch_size", "0"], "--batch_size: 0 is out of range (at least 1)"),
        (["x.png", "--window", "5"], "window 5: give at least 32 pixels, 0 for none"),
        (["x.png", "--flop"], "unknown flag --flop (did you mean --flip?); `python predict.py --"),
        (["x.png", "--step", "1"], "knows what it is: drop --step"),
        (["x.png", "--ckpt", "gone.pth"], "no checkpoint at gone.pth: check the path"),
    ],
)
def test_what_cannot_work_is_one_line(ckpt, tmp_path, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if arguments[0] != ".":
        picture(64, 64).save("x.png")
        Path("links").mkdir()
        for place in ("loop.png", "links/loop.png"):
            Path(place).symlink_to("loop.png")
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


# --- large images; the crop is 64 ---


def test_windows_are_chosen_by_themselves_and_said_once(ckpt, tmp_path, capsys):
    for name, size in {"a": (200, 140), "b": (200, 140), "c": (70, 200), "d": (128, 128)}.items():
        picture(*size).save(tmp_path / f"{name}.png")
    inputs = [tmp_path / f"{name}.png" for name in "abcd"]
    assert run(ckpt, tmp_path / "auto", *inputs, "--scores") == 0
    (line,) = capsys.readouterr().out.splitlines()[1:-1]
    assert line.startswith("windows of 64 pixels for 2 images, more than twice as large; --window")
    assert run(ckpt, tmp_path / "off", *inputs, "--window", 0) == 0
    assert capsys.readouterr().out.splitlines()[1:-1] == []
    assert run(ckpt, tmp_path / "on", *inputs, "--window", 64) == 0
    assert capsys.readouterr().out.splitlines()[1:-1] == ["windows of 64 pixels for 4 images"]

    def mask(folder: str, name: str) -> np.ndarray:
        return np.asarray(Image.open(tmp_path / folder / "masks" / f"{name}.png"))

    same = {name: np.array_equal(mask("auto", name), mask("off", name)) for name in "abcd"}
    assert same == {"a": False, "b": False, "c": True, "d": True}
    assert np.array_equal(mask("auto", "a"), mask("on", "a"))
    assert not np.array_equal(mask("auto", "c"), mask("on", "c"))
    stored = np.load(tmp_path / "auto/scores/a.npz")["probabilities"]
    assert (stored.shape, stored.dtype) == ((5, 140, 200), np.float16)
    assert (np.array(SEEN)[stored.argmax(0)] == mask("auto", "a")).mean() > 0.99


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


def test_batches_are_filled_with_images_of_one_size():
    jobs = [predict.Job(Path(f"{i}.png"), Path(str(i))) for i in range(5)]
    sizes = dict(zip(jobs, [(8, 8), (9, 9), (8, 8), (9, 9), (8, 8)], strict=True))
    batches = [[job.name.name for job in batch] for batch in predict.batches(sizes, 2)]
    assert batches == [["0", "2"], ["4"], ["1", "3"]]
    batches = [[job.name.name for job in b] for b in predict.batches(sizes, 2, jobs[1:2])]
    assert batches == [["0", "2"], ["4"], ["1"], ["3"]]
