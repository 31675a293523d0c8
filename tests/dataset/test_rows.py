"""Cityscapes, COCO and CamVid: small trees in their exact layouts, through to a two-step run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import run
from dataset.build import build_datasets
from dataset.catalog import DATASETS, get_spec
from dataset.incremental import IncrementalSegmentation, label_map
from dataset.transform import EvalTransform
from tests.trees import mask_of, write_pair
from utils.errors import UserError

CITIES = {"train": ("aachen", "zurich"), "val": ("frankfurt",)}


def grey(image: Path, mask: Path, *ids: int) -> None:
    """An image and its mask as 8-bit grey, as all three data sets have it."""
    write_pair(image, mask, mask_of(*ids, width=272, height=8))
    Image.fromarray(mask_of(*ids, width=272, height=8)).save(mask)


def make_cityscapes(root: Path, *ids: int) -> Path:
    """Two frames per city, with everything else that the zips hold beside an image's mask."""
    for split, cities in CITIES.items():
        for city in cities:
            for frame in range(2):
                stem = f"{split}/{city}/{city}_00000{frame}_000019"
                base = root / f"cityscapes/gtFine/{stem}_gtFine"
                image = root / f"cityscapes/leftImg8bit/{stem}_leftImg8bit.png"
                grey(image, Path(f"{base}_labelIds.png"), *ids)
                for other in ("color", "instanceIds"):
                    Image.new("RGBA", (272, 8)).save(f"{base}_{other}.png")
                Path(f"{base}_polygons.json").write_text("{}")
    return root


def make_coco(root: Path, *ids: int) -> Path:
    for split, numbers in (("train", (9, 30, 25)), ("val", (139, 285))):
        for number in numbers:
            grey(
                root / f"COCO2017/images/{split}2017/{number:012}.jpg",
                root / f"COCO2017/stuffthingmaps/{split}2017/{number:012}.png",
                *ids,
            )
    return root


def make_camvid(root: Path, *ids: int) -> Path:
    lists = {"train": ("0001TP_006690", "Seq05VD_f00030"), "val": ("0001TP_008550",)}
    for split, stems in lists.items():
        for stem in stems:
            grey(root / f"camvid/images/{stem}.png", root / f"camvid/masks/{stem}.png", *ids)
        (root / f"camvid/{split}.txt").write_text("".join(f"{stem}.png\n" for stem in stems))
    return root


MAKE = {"cityscapes": make_cityscapes, "coco": make_coco, "camvid": make_camvid}
# By data set: raw id → name, None where the pixel is ignored. From the official tables.
MEANT = {
    "cityscapes": {
        0: None, 3: None, 7: "road", 8: "sidewalk", 9: None, 11: "building", 17: "pole", 18: None,
        19: "traffic light", 23: "sky", 26: "car", 29: None, 31: "train", 33: "bicycle",
    },
    "coco": {
        0: "person", 10: "fire hydrant", 12: "stop sign", 23: "zebra", 24: "giraffe",
        25: "background", 26: "backpack", 45: "wine glass", 66: "dining table", 69: "toilet",
        71: "tv", 72: "laptop", 83: "book", 89: "toothbrush", 91: "background",
        181: "background", 255: None,
    },
    "camvid": {
        0: "sky", 1: "building", 2: "pole", 3: "road", 4: "pavement", 5: "tree", 6: "sign",
        7: "fence", 8: "car", 9: "pedestrian", 10: "bicyclist", 11: None,
    },
}  # fmt: skip
SIZES = {"cityscapes": (4, 2, 19), "coco": (3, 2, 80), "camvid": (2, 1, 11)}


@pytest.mark.parametrize("name", MAKE)
def test_every_id_is_read_as_its_class(name, tmp_path):
    spec, ids = DATASETS[name], list(MEANT[name])
    root = MAKE[name](tmp_path, *ids)
    train, val = (spec.find_samples(root, split) for split in ("train", "val"))
    assert (len(train), len(val), spec.num_classes) == SIZES[name]
    assert train == sorted(train)
    labels = np.asarray(spec.read_mask(train[0].mask))
    columns = labels[0, np.arange(len(ids)) * -(-272 // len(ids))]
    read = [None if label == 255 else spec.class_names[label] for label in columns]
    assert read == list(MEANT[name].values())


def test_pixel_maps_of_coco_hold_ids_less_one_and_255_for_unlabelled(tmp_path):
    """As COCO-Stuff's README says of stuffthingmaps: 0 to 181, and 255 is unlabelled, not 0 or 183.

    The 80 things have the category ids of instances_*2017.json, which leave out eleven.
    """
    spec, path = DATASETS["coco"], tmp_path / "map.png"
    values = np.array([[*range(182), 255]], np.uint8)
    image = Image.fromarray(values)
    image.putpalette(bytes(range(256)) * 3)  # indexed images, as that README has it
    image.save(path)
    labels = np.asarray(spec.read_mask(str(path)))[0]
    kept = [*range(1, 12), *range(13, 26), 27, 28, *range(31, 45), *range(46, 66), 67, 70,
            *range(72, 83), *range(84, 91)]  # fmt: skip
    assert labels[np.array(kept) - 1].tolist() == list(range(1, 81))
    others = np.setdiff1d(np.arange(182), np.array(kept) - 1)
    assert set(labels[others]) == {0}
    assert labels[-1] == 255
    grey(tmp_path / "x.jpg", path, 182)
    with pytest.raises(UserError, match="holds the id 182"):
        spec.read_mask(str(path))


def test_label_ids_of_cityscapes_become_train_ids_in_order(tmp_path):
    """Of ids 0 to 33, the 19 that the benchmark scores are classes 1 to 19: train id + 1."""
    spec, path = DATASETS["cityscapes"], tmp_path / "labelIds.png"
    Image.fromarray(np.arange(34, dtype=np.uint8)[None]).save(path)
    labels = np.asarray(spec.read_mask(str(path)))[0]
    scored = [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]
    assert labels[scored].tolist() == list(range(1, 20))
    assert set(np.delete(labels, scored)) == {255}


@pytest.mark.parametrize("name", MAKE)
def test_what_is_ignored_trains_as_background_and_is_not_scored(name, tmp_path):
    """The same as for VOC's void and ADE's label 0; only COCO has a background to score."""
    spec, void = DATASETS[name], [raw for raw, meant in MEANT[name].items() if meant is None][-1]
    root = MAKE[name](tmp_path, void, 7)
    samples, task = spec.find_samples(root, "train"), spec.task("offline")
    found = {}
    for train in (True, False):
        mapped = label_map(spec, task, 0, train=train)
        data = IncrementalSegmentation(
            spec, samples, np.arange(len(samples)), mapped, EvalTransform(None), 0
        )
        found[train] = [int(data[0][1][0, column]) for column in (0, -1)]
    known = spec.class_names.index({"cityscapes": "road", "coco": "truck"}.get(name, "fence"))
    assert found == {True: [0, known], False: [255, known]}
    assert label_map(spec, task, 0, train=False)[0] == (0 if name == "coco" else 255)


@pytest.mark.parametrize(
    ("name", "task", "sizes"),
    [
        ("cityscapes", "14-1", [15, 1, 1, 1, 1, 1]), ("cityscapes", "14-5", [15, 5]),
        ("cityscapes", "10-1", [11] + [1] * 9), ("cityscapes", "15-3", [16, 3, 1]),
        ("coco", "60-20", [61, 20]), ("coco", "40-40", [41, 40]), ("coco", "15-5", [16] + [5] * 13),
        ("camvid", "6-5", [7, 5]), ("camvid", "7-1", [8, 1, 1, 1, 1]),
    ],
)  # fmt: skip
def test_tasks_by_the_grammar(name, task, sizes):
    found = get_spec(name).task(task)
    assert (found.dataset, found.name, [len(step) for step in found.steps]) == (name, task, sizes)
    with pytest.raises(UserError, match=f"unknown task '80-1' for {name}: choose one of offline"):
        get_spec(name).task("80-1")


def test_the_steps_of_camvid_are_those_of_its_tables():
    spec = DATASETS["camvid"]
    steps = [[spec.class_names[label] for label in step] for step in spec.task("7-1").steps]
    assert steps == [
        ["unlabelled", "sky", "building", "road", "pavement", "tree", "fence", "pole"],
        ["car"], ["pedestrian"], ["sign"], ["bicyclist"],
    ]  # fmt: skip
    assert set(spec.task("6-5").steps[1]) == {7, 8, 9, 10, 11}


@pytest.mark.parametrize("name", MAKE)
def test_an_id_that_the_table_does_not_have(name, tmp_path):
    root = MAKE[name](tmp_path, 7, 200)
    spec = DATASETS[name]
    with pytest.raises(UserError, match=r"holds the id 200 \(1088 pixels\)"):
        spec.read_mask(spec.find_samples(root, "train")[0].mask)


@pytest.mark.parametrize("name", MAKE)
def test_no_data_says_how_to_get_it(name, tmp_path):
    cure = "data/README.md" if name == "cityscapes" else f"download_{name}.sh"
    with pytest.raises(UserError, match=rf"no (folder|data root) .*{cure}"):
        DATASETS[name].find_samples(tmp_path, "train")


@pytest.mark.parametrize("name", MAKE)
def test_pairs_must_be_complete(name, tmp_path):
    root, spec = MAKE[name](tmp_path, 7), DATASETS[name]
    image, mask = map(Path, spec.find_samples(root, "train")[-1])
    mask.rename(tmp_path / "away.png")
    with pytest.raises(UserError, match=f"{mask.name}|{image.name} has no mask"):
        spec.find_samples(root, "train")
    (tmp_path / "away.png").rename(mask)
    image.unlink()
    with pytest.raises(UserError, match=f"{mask.name} has no image|no image '{image.name}'"):
        spec.find_samples(root, "train")


def test_a_step_of_cityscapes_sees_its_images(tmp_path):
    root, spec = make_cityscapes(tmp_path, 7, 33, 0), DATASETS["cityscapes"]
    data = build_datasets(
        spec, root, spec.task("14-5"), 1, overlap=True, crop_size=32, seed=0, crop_val=False,
        workdir=tmp_path,
    )  # fmt: skip
    assert data.list_lengths == (4, 2)
    assert data.train.indices.tolist() == [0, 1, 2, 3]
    assert np.unique(data.test[0][1]).tolist() == [1, 19, 255]
    assert set(np.unique(data.train[0][1])) <= {0, 19}  # the road was learned at step 0


@pytest.mark.parametrize(("name", "task"), [("cityscapes", "14-5"), ("camvid", "6-5")])
def test_two_steps_of_training(name, task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = MAKE[name](tmp_path / "data", *[raw for raw in MEANT[name] if raw < 34])
    flags = "--overlap --method MIB --name m --step all --epochs 1 --backbone resnet18 --no_mask"
    small = "--no-pretrained --crop_size 32 --batch_size 2 --num_workers 0 --no-visualize"
    data = ["--dataset", name, "--data_root", str(root), "--task", task]
    assert run.main([*data, *flags.split(), *small.split()]) == 0
    scores = Path(f"logs/results/{name}-{task}-ov.csv")
    assert len(scores.read_text().splitlines()) == 3
