"""data/make_toy.py: what the toy data must hold for the demo and the tests that use it."""

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[2] / "data" / "make_toy.py"
NEW = range(16, 21)  # of a 15-5 task


@pytest.fixture(scope="module")
def toy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_toy", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default tree, made by the command itself."""
    out = tmp_path_factory.mktemp("toy")
    subprocess.run([sys.executable, str(SCRIPT), "--out", str(out)], check=True)
    return out / "PascalVOC12"


def samples(tree: Path, split: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Image (H W 3) and mask (H W) of every line of a list."""
    pairs = [line.split() for line in (tree / f"splits/{split}.txt").read_text().splitlines()]
    return [
        (np.asarray(Image.open(tree / image[1:])), np.asarray(Image.open(tree / mask[1:])))
        for image, mask in pairs
    ]


@pytest.fixture(scope="module")
def train(voc: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    return samples(voc, "train_aug")


def fingerprint(tree: Path) -> dict[str, str]:
    return {
        str(path.relative_to(tree)): hashlib.md5(path.read_bytes()).hexdigest()
        for path in sorted(tree.rglob("*"))
        if path.is_file()
    }


def labels_of(mask: np.ndarray) -> set[int]:
    return {int(label) for label in np.unique(mask)}


def test_voc_layout(voc: Path, train: list[tuple[np.ndarray, np.ndarray]]) -> None:
    val = samples(voc, "val")
    assert (len(train), len(val)) == (300, 60)
    assert len(list((voc / "JPEGImages").iterdir())) == 360
    assert len(list((voc / "SegmentationClassAug").iterdir())) == 360
    for image, mask in train + val:
        assert image.shape == (96, 96, 3)
        assert mask.shape == (96, 96)
        labels = labels_of(mask)
        assert {0, 255} <= labels <= {*range(21), 255}
        assert 1 <= len(labels - {0, 255}) <= 2
    for split in (train, val):
        seen = [sum(k in labels_of(mask) for _, mask in split) for k in range(1, 21)]
        assert min(seen) >= len(split) / 20


def test_masks_have_the_palette_of_voc(voc: Path) -> None:
    mask = Image.open(next((voc / "SegmentationClassAug").iterdir()))
    assert mask.mode == "P"
    palette = mask.getpalette()
    assert palette is not None
    known = {0: [0, 0, 0], 1: [128, 0, 0], 15: [192, 128, 128], 20: [0, 64, 128]}
    known[255] = [224, 224, 192]
    assert {label: palette[3 * label : 3 * label + 3] for label in known} == known


def test_void_is_a_thin_border(train: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """No object pixel touches background; void is a small share."""
    for _, mask in train:
        for a, b in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])):
            touching = (a != b) & (a != 255) & (b != 255)
            assert not touching.any()
    assert np.mean([mask == 255 for _, mask in train]) < 0.08
    assert 0.15 < np.mean([(mask > 0) & (mask < 255) for _, mask in train]) < 0.45


def test_every_object_is_large(toy: ModuleType) -> None:
    """At stride 16 an image has only 6 x 6 features."""
    for index in range(60):
        classes = toy.voc_classes(index, 0, 0)
        _, mask = toy.voc_sample(classes, 96, np.random.default_rng(index))
        for label in classes:
            assert (np.asarray(mask) == label).sum() > 0.05 * 96 * 96


def test_both_steps_of_15_5_are_fed(train: list[tuple[np.ndarray, np.ndarray]]) -> None:
    held = [labels_of(mask) - {0, 255} for _, mask in train]
    new = [labels for labels in held if labels & set(NEW)]
    assert 80 <= len(new) <= 150
    assert sum(bool(labels - set(NEW)) for labels in new) > 0.7 * len(new)  # background shift
    old = [labels for labels in held if labels - set(NEW)]
    assert len(old) > 200
    assert sum(not labels & set(NEW) for labels in held) > 150  # step 0 of the disjoint setting


def hue_histogram(samples: list[tuple[np.ndarray, np.ndarray]], label: int) -> np.ndarray:
    pixels = np.concatenate([image[mask == label] for image, mask in samples])
    hue = np.asarray(Image.fromarray(pixels[None]).convert("HSV"))[0, :, 0]
    histogram = np.bincount(hue // 8, minlength=32)
    return histogram / histogram.sum()


def test_colour_alone_does_not_decide(
    toy: ModuleType, train: list[tuple[np.ndarray, np.ndarray]]
) -> None:
    """Classes of one hue overlap in hue and brightness, and differ in shape and texture."""
    histograms = {k: hue_histogram(train, k) for k in range(1, 21)}
    brightness = {
        k: np.mean([image[mask == k].max(-1).mean() for image, mask in train if k in mask])
        for k in range(1, 21)
    }
    pairs = [
        (a, b)
        for a in range(1, 21)
        for b in range(a + 1, 21)
        if toy.CLASSES[a - 1][0] == toy.CLASSES[b - 1][0]
    ]
    assert len(pairs) == 8
    for a, b in pairs:
        assert np.minimum(histograms[a], histograms[b]).sum() > 0.5
        assert abs(brightness[a] - brightness[b]) < 25  # of 255
        assert toy.CLASSES[a - 1][1] != toy.CLASSES[b - 1][1]
        assert toy.CLASSES[a - 1][2] != toy.CLASSES[b - 1][2]
    assert np.minimum(histograms[1], histograms[9]).sum() < 0.1  # red and blue


def test_same_seed_same_bytes(tmp_path: Path, toy: ModuleType, voc: Path) -> None:
    """A second run, smaller, overwrites the first and repeats the images that both have."""
    for train, val in ((12, 3), (8, 2)):
        toy.main(["--out", str(tmp_path), "--train", str(train), "--val", str(val)])
    small, large = fingerprint(tmp_path / "PascalVOC12"), fingerprint(voc)
    images = [name for name in small if name.endswith((".jpg", ".png"))]
    assert len(images) == 20
    assert {name: small[name] for name in images} == {name: large[name] for name in images}
    toy.main(["--out", str(tmp_path), "--train", "8", "--val", "2", "--seed", "1"])
    other = fingerprint(tmp_path / "PascalVOC12")
    assert all(other[name] != small[name] for name in images)


def test_ade_layout(tmp_path: Path, toy: ModuleType) -> None:
    toy.main(["--out", str(tmp_path), "--dataset", "ade", "--train", "30", "--size", "64"])
    tree = tmp_path / "ADEChallengeData2016"
    seen: set[int] = set()
    for split, count in (("training", 30), ("validation", 30)):
        images = sorted((tree / "images" / split).iterdir())
        masks = sorted((tree / "annotations" / split).iterdir())
        assert len(images) == len(masks) == count
        assert [path.stem for path in images] == [path.stem for path in masks]
        for image_path, mask_path in zip(images, masks, strict=True):
            mask = Image.open(mask_path)
            assert mask.mode == "L"
            assert Image.open(image_path).size == mask.size == (64, 64)
            labels = np.asarray(mask)
            assert 0 < (labels == 0).mean() < 0.3
            seen |= labels_of(labels)
    assert seen == set(range(151))
    before = fingerprint(tree)
    toy.main(["--out", str(tmp_path), "--dataset", "ade", "--train", "30", "--size", "64"])
    assert fingerprint(tree) == before


def test_what_is_not_toy_data_stays(tmp_path: Path, toy: ModuleType) -> None:
    kept = tmp_path / "PascalVOC12" / "splits" / "val.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("real")
    with pytest.raises(SystemExit, match="PascalVOC12 exists and is no toy data.*--out"):
        toy.main(["--out", str(tmp_path)])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [kept]


def test_bad_flags(tmp_path: Path, toy: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--train", "0"], ["--size", "31"], ["--val", "-1"], ["--seed", "-1"]):
        with pytest.raises(SystemExit):
            toy.main(["--out", str(tmp_path), *flags])
        assert f"{flags[0]} must be at least" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="check --out"):
        toy.main(["--out", str(tmp_path / "file")])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
