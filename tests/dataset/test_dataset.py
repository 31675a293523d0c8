"""Label maps, reading, batches, and what a bad file gets."""

import json
import os
import random
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, default_collate

from dataset.ade import ADE
from dataset.build import build_datasets, hold_out
from dataset.catalog import DATASETS, get_spec
from dataset.draws import AUGMENT, generator
from dataset.files import read_image
from dataset.incremental import IncrementalSegmentation, collate, label_map
from dataset.sampler import EvalBatchSampler, TrainBatchSampler
from dataset.transform import EvalTransform
from dataset.voc import VOC
from tasks import get_task
from tests.checkpoints import picture
from tests.trees import (
    GOLDEN,
    PHOTOGRAPHS,
    make_ade,
    make_voc,
    mask_of,
    needs_photographs,
    write_pair,
)
from utils.errors import UserError
from utils.images import read_rgb

LABEL_MAPS = json.loads((GOLDEN / "label_maps.json").read_text())
TASK = get_task("voc", "15-5")


def build(root: Path, step: int = 0, **changes):
    options: dict[str, Any] = {
        "overlap": True,
        "crop_size": 8,
        "seed": 3,
        "workdir": root / "work",
    } | changes
    return build_datasets(VOC, root, TASK, step, **options)


def read_all(root: Path, split: str = "train", spec=VOC) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every sample of a tree as the test sees it at the last step of offline."""
    samples = spec.find_samples(root, split)
    labels = label_map(spec, get_task(spec.name, "offline"), 0, train=False)
    data = IncrementalSegmentation(
        spec, samples, np.arange(len(samples)), labels, EvalTransform(None), 0
    )
    return [data[i] for i in range(len(data))]


def paths(root: Path, i: int = 0) -> tuple[Path, Path]:
    base = root / "PascalVOC12"
    return base / f"JPEGImages/train_aug{i}.jpg", base / f"SegmentationClassAug/train_aug{i}.png"


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Ten training images, five of the base classes, five with a new one, and seven for val."""
    train = [mask_of(0, 1 + i, 255) for i in range(5)] + [mask_of(0, 3, 16 + i) for i in range(5)]
    return make_voc(tmp_path, train, [mask_of(0, i, 255, 20) for i in range(1, 8)])


# --- what is known about the data sets ---


def test_class_names():
    assert len(VOC.class_names) == 21
    assert len(set(ADE.class_names)) == len(ADE.class_names) == 151
    assert [VOC.class_names[i] for i in (0, 1, 15, 20)] == [
        "background", "aeroplane", "person", "tvmonitor"
    ]  # fmt: skip
    assert [ADE.class_names[i] for i in (1, 13, 101, 150)] == ["wall", "person", "poster", "flag"]
    assert list(DATASETS) == ["voc", "ade", "cityscapes", "coco", "camvid"]
    with pytest.raises(UserError, match="unknown dataset 'x': choose one of voc, ade, cityscapes"):
        get_spec("x")


@pytest.mark.parametrize("key", LABEL_MAPS)
def test_label_maps(key):
    dataset, name, step = key.split("/")
    spec, task = get_spec(dataset), get_task(dataset, name)
    for kind, options in {
        "train": {"train": True},
        "train_no_mask": {"train": True, "masking": False},
        "test": {"train": False},
    }.items():
        lut = label_map(spec, task, int(step), **options)
        assert lut.dtype == np.uint8
        assert lut.tolist() == LABEL_MAPS[key][kind]


def test_labels_of_the_later_protocol():
    """Classes to come and ADE's label 0 are background in tests; void is ignored everywhere."""
    lut = label_map(VOC, TASK, 0, train=False, rest_is_background=True)
    assert lut[:21].tolist() == [*range(16), 0, 0, 0, 0, 0]
    assert lut[255] == 255
    ade = label_map(ADE, get_task("ade", "100-50"), 0, train=False, rest_is_background=True)
    assert ade[:151].tolist() == [*range(101), *[0] * 50]
    trained = label_map(VOC, TASK, 1, train=True, ignore_void=True)
    assert trained[:21].tolist() == [*[0] * 16, *range(16, 21)]
    assert trained[255] == 255
    assert label_map(VOC, TASK, 1, train=True)[255] == 0


# --- finding and reading files ---


def test_both_forms_of_list_lines_and_blank_lines(voc):
    expected = VOC.find_samples(voc, "train")
    lines = [f"train_aug{i}" for i in range(10)]
    (voc / "PascalVOC12/splits/train_aug.txt").write_text("\r\n".join(lines) + "\n\n")
    assert VOC.find_samples(voc, "train") == expected
    assert [Path(sample.mask).stem for sample in expected] == lines


def test_voc_labels_and_images(voc):
    for i, (image, labels) in enumerate(read_all(voc, "val"), start=1):
        assert image.dtype == labels.dtype == torch.uint8
        assert image.shape == (3, 10, 12)
        assert labels.shape == (10, 12)
        assert labels[0].tolist() == [0] * 3 + [i] * 3 + [255] * 3 + [20] * 3
    picture = Image.open(voc / "PascalVOC12/JPEGImages/val6.jpg")
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(picture))


def test_ade_is_sorted_by_name_and_ignores_label_zero(tmp_path):
    root = make_ade(tmp_path, [mask_of(0, 5), mask_of(150, 2), mask_of(7)])
    samples = ADE.find_samples(root, "train")
    assert [Path(sample.image).stem for sample in samples] == [f"ADE_{i:08}" for i in range(3)]
    rows = [sorted(set(labels.flatten().tolist())) for _, labels in read_all(root, spec=ADE)]
    assert rows == [[5, 255], [2, 150], [7]]
    assert len(ADE.find_samples(root, "val")) == 1


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("L", "PNG"), ("P", "PNG"),
     ("1", "PNG"), ("RGBA", "PNG"), ("I;16", "PNG"), ("clear", "PNG")],
)  # fmt: skip
def test_training_and_prediction_see_the_same_pixels(tmp_path, mode, kind):
    image = picture(24, 16)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode == "clear":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    else:
        image = image.convert(mode)
    image.save(tmp_path / "x", kind)
    read = np.asarray(read_image(str(tmp_path / "x")))
    assert np.array_equal(read, np.asarray(read_rgb(tmp_path / "x")))
    plain = np.asarray(Image.open(tmp_path / "x").convert("RGB"))
    assert np.array_equal(read, plain) == (mode not in ("I;16", "clear"))


@pytest.mark.parametrize(
    ("mode", "form"),
    [("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("L", "PNG"), ("RGBA", "PNG"), ("1", "PNG")],
)
def test_images_of_other_modes_become_rgb(voc, mode, form):
    image, _ = paths(voc)
    Image.open(image).convert(mode).save(image, form)
    expected = np.asarray(Image.open(image).convert("RGB"))
    assert np.array_equal(read_all(voc)[0][0].permute(1, 2, 0), expected)


def test_pixels_are_read_as_they_lie(voc):
    """Masks carry no orientation, so that of a camera must not turn the image alone."""
    image, _ = paths(voc)
    picture, exif = Image.open(image).convert("RGB"), Image.Exif()
    picture.save(image)
    expected = read_all(voc)[0][0]
    exif[0x0112] = 3  # upside down
    picture.save(image, exif=exif)
    assert torch.equal(read_all(voc)[0][0], expected)


def test_the_folder_of_the_data_set_may_be_a_link(voc, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "PascalVOC12").symlink_to(voc / "PascalVOC12")
    assert VOC.find_samples(other, "train") == VOC.find_samples(voc, "train")


# --- bad input ---


def refuse(root: Path, *fragments: object, spec=VOC) -> None:
    """Reading the whole train list ends in one line that holds these texts."""
    with pytest.raises(UserError) as caught:
        read_all(root, spec=spec)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert str(fragment) in message


@pytest.mark.parametrize("spec", [VOC, ADE])
def test_no_data(tmp_path, spec):
    refuse(tmp_path / "x", f"no data root {tmp_path}/x", f"download_{spec.name}.sh", spec=spec)
    refuse(tmp_path, "no folder", "--data_root", f"download_{spec.name}.sh", spec=spec)


def test_missing_list(voc):
    (voc / "PascalVOC12/splits/train_aug.txt").unlink()
    refuse(voc, "splits/train_aug.txt", "download_voc.sh")


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_empty_list(voc, content):
    (voc / "PascalVOC12/splits/train_aug.txt").write_bytes(content)
    refuse(voc, "train_aug.txt lists no image")


def test_list_that_is_no_text(voc):
    (voc / "PascalVOC12/splits/train_aug.txt").write_bytes(b"\xff\xfe\x00")
    refuse(voc, "train_aug.txt cannot be read as text")


@pytest.mark.parametrize("which", [0, 1])
def test_missing_file_of_a_list_line(voc, which):
    missing = paths(voc, 4)[which]
    missing.unlink()
    refuse(voc, "train_aug.txt, line 5", missing, "restore it")


IMAGE, MASK = "/JPEGImages/train_aug0.jpg", "/SegmentationClassAug/train_aug0.png"


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("/JPEGImages/../../secret/train_aug0.jpg " + MASK, "'..'"),
        (IMAGE + " ../secret/train_aug0.png", "'..'"),
        ("../secret/train_aug0", "neither"),
        ("/etc/passwd /etc/passwd", "no file"),
        ("{secret}/train_aug0.jpg {secret}/train_aug0.png", "no file"),
        ("/JPEGImages/../linked/link.jpg /SegmentationClassAug/link.png", "'..'"),
        ("/linked/../train_aug0.jpg /linked/train_aug0.png", "'..'"),
        ("/JPEGImages/loop.jpg " + MASK, "no file"),
        ("/JPEGImages/broken.jpg " + MASK, "no file"),
        ("/JPEGImages/pipe.jpg " + MASK, "no file"),
        ("/JPEGImages " + MASK, "no file"),
        ("/ /", "no file"),
        ("/JPEGImages/a\0b.jpg " + MASK, "no file"),
        ("/JPEG\0Images/b.jpg " + MASK, "no file"),
        (IMAGE + " " + MASK + " more", "neither"),
        (IMAGE, "neither"),
        (IMAGE + " /SegmentationClassAug/train_aug1.png", "different names"),
    ],
)
def test_tricks_and_slips_in_list_lines(voc, line, fragment):
    base, secret = voc / "PascalVOC12", voc / "secret"
    write_pair(secret / "train_aug0.jpg", secret / "train_aug0.png", mask_of(1))
    (base / "linked").symlink_to(secret)
    (base / "JPEGImages/broken.jpg").symlink_to(secret / "missing.jpg")
    (base / "JPEGImages/loop.jpg").symlink_to(base / "JPEGImages/loop.jpg")
    os.mkfifo(base / "JPEGImages/pipe.jpg")
    list_path = base / "splits/train_aug.txt"
    list_path.write_text(f"{IMAGE} {MASK}\n{line.format(secret=secret)}\n")
    refuse(voc, f"{list_path}, line 2", fragment)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("kind", ["files", "folders"])
def test_links_are_followed(voc, tmp_path_factory, kind, inside):
    """On clusters images and masks lie on other disks."""
    expected, base = read_all(voc), voc / "PascalVOC12"
    disk = base / "disk" if inside else tmp_path_factory.mktemp("disk")
    disk.mkdir(exist_ok=True)
    for path in (*paths(voc), base / "splits/train_aug.txt"):
        place = path.parent if kind == "folders" else path
        place.rename(disk / place.name)
        place.symlink_to(disk / place.name)
    assert [p.is_symlink() for p in paths(voc)] == [kind == "files"] * 2
    for (image, labels), (same, same_labels) in zip(read_all(voc), expected, strict=True):
        assert torch.equal(image, same)
        assert torch.equal(labels, same_labels)


def test_links_of_ade_are_followed_and_a_circle_ends(tmp_path, tmp_path_factory):
    root = make_ade(tmp_path, [mask_of(1), mask_of(2)])
    images, disk = root / "ADEChallengeData2016/images", tmp_path_factory.mktemp("disk")
    (images / "training").rename(disk / "training")
    (images / "training").symlink_to(disk / "training")
    (disk / "training/again").symlink_to(disk / "training")
    assert len(read_all(root, spec=ADE)) == 2


def test_ade_pairs_must_be_complete(tmp_path):
    root = make_ade(tmp_path, [mask_of(1), mask_of(2)])
    base = root / "ADEChallengeData2016"
    image, mask = (
        base / f"{kind}/training/ADE_00000001.{end}"
        for kind, end in (("images", "jpg"), ("annotations", "png"))
    )
    shutil.move(image, tmp_path)
    refuse(root, "mask annotations/training/ADE_00000001.png has no image", spec=ADE)
    shutil.move(tmp_path / image.name, image)
    mask.unlink()
    refuse(root, mask, "no file", spec=ADE)
    shutil.rmtree(base / "images/training")
    refuse(root, "images/training holds no .jpg", spec=ADE)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("damage", ["empty", "text", "truncated"])
def test_corrupt_image_or_mask(voc, which, damage):
    path = paths(voc, 2)[which]
    content = path.read_bytes()
    damaged = {"empty": b"", "text": b"hello", "truncated": content[: len(content) // 2]}[damage]
    path.write_bytes(damaged)
    refuse(voc, path, "cannot be read as", "restore the file")


def test_different_sizes(voc):
    image, mask = paths(voc, 1)
    Image.new("RGB", (13, 10)).save(image)
    refuse(voc, image, "13x10", mask, "12x10")


@pytest.mark.parametrize(("label", "spec"), [(21, VOC), (254, VOC), (151, ADE), (255, ADE)])
def test_label_that_the_data_set_does_not_have(tmp_path, label, spec):
    masks = [mask_of(1), mask_of(1, label)]
    root = (make_voc if spec is VOC else make_ade)(tmp_path, masks)
    mask = spec.find_samples(root, "train")[1].mask
    refuse(root, mask, f"label {label}", f"{spec.name} has 0 to {spec.num_classes}", spec=spec)


@pytest.mark.parametrize("mode", ["RGB", "I;16", "1", "LA"])
def test_mask_that_is_no_index_map(voc, mode):
    _, mask = paths(voc, 3)
    Image.new(mode, (12, 10)).save(mask)
    refuse(voc, mask, "mode", "palette")


def test_mask_saved_as_jpeg(voc):
    _, mask = paths(voc, 3)
    Image.new("L", (12, 10)).save(mask, format="JPEG")
    refuse(voc, mask, "cannot be read as PNG")


def mutate(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    kind, at = rng.randrange(4), rng.randrange(len(data))
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[at] = rng.randrange(256)
    elif kind == 2:
        del data[at:]
    else:
        data[at : at + 4] = rng.randbytes(rng.randrange(8))
    return bytes(data)


@pytest.mark.parametrize("which", [0, 1])
def test_damaged_bytes_end_in_one_line_or_the_right_labels(voc, which):
    """A PNG carries checksums, so a damaged mask never passes for another one."""
    rng = random.Random(which)
    expected = [labels for _, labels in read_all(voc)]
    path = paths(voc)[which]
    content = path.read_bytes()
    refusals = []
    for _ in range(80):
        path.write_bytes(mutate(content, rng))
        try:
            labels = [labels for _, labels in read_all(voc)]
        except UserError as error:
            refusals.append(str(error))
        else:
            assert all(map(torch.equal, labels, expected))
    assert all(path.name in refusal for refusal in refusals)
    assert len(refusals) > (50 if which else 20)


def test_flipped_pixels_of_a_mask_are_noticed(voc):
    """The decoder alone would return other labels for one flip in ten."""
    image, mask = paths(voc)
    blocks = np.random.default_rng(0).integers(0, 21, (15, 15), dtype=np.uint8)
    write_pair(image, mask, blocks.repeat(16, axis=0).repeat(13, axis=1))
    content = mask.read_bytes()
    start = content.index(b"IDAT") + 4
    for at in range(start, content.index(b"IEND") - 8, 3):
        mask.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        refuse(voc, mask, "cannot be read as PNG")


def test_damaged_lists_never_name_other_pairs(voc):
    rng = random.Random(0)
    known = set(VOC.find_samples(voc, "train")) | set(VOC.find_samples(voc, "val"))
    path = voc / "PascalVOC12/splits/train_aug.txt"
    content = path.read_bytes()
    refusals = []
    for _ in range(150):
        path.write_bytes(mutate(content, rng))
        try:
            assert set(VOC.find_samples(voc, "train")) <= known
        except UserError as error:
            refusals.append(str(error))
    assert all("train_aug.txt" in refusal for refusal in refusals)
    assert len(refusals) > 80


def test_a_worker_hands_over_one_line(voc):
    paths(voc, 2)[1].write_bytes(b"")
    samples, labels = VOC.find_samples(voc, "train"), label_map(VOC, TASK, 0, train=True)
    data = IncrementalSegmentation(VOC, samples, np.arange(10), labels, EvalTransform(8), 0)
    message = ""
    try:
        list(DataLoader(data, batch_size=5, num_workers=1))
    except UserError as error:
        # A traceback kept alive would hold the loader, and ending its worker then takes 5 s.
        message = str(error.with_traceback(None))
    assert message.startswith(f"{paths(voc, 2)[1]} cannot be read as PNG")
    assert "\n" not in message


# --- the data of a step ---


def test_training_sees_its_step_and_evaluation_all_so_far(voc):
    first, second = build(voc, 0), build(voc, 1)
    assert first.train.indices.tolist() == list(range(10))
    assert second.train.indices.tolist() == [5, 6, 7, 8, 9]
    assert build(voc, 0, overlap=False).train.indices.tolist() == [0, 1, 2, 3, 4]
    assert {label for i in range(5) for label in second.train[i][1].unique().tolist()} <= {
        0, *range(16, 21)
    }  # fmt: skip
    unmasked = build(voc, 1, masking=False).train
    assert 3 in torch.stack([unmasked[i][1] for i in range(5)])
    assert second.val is second.test
    assert len(second.test) == 7
    assert {20, 255} <= set(second.test[0][1].unique().tolist())
    assert 20 not in first.test[0][1]
    assert first.test[0][0].shape == (3, 8, 8)
    assert build(voc, 0, crop_val=False).test[0][0].shape == (3, 10, 12)


def test_the_later_protocol_tests_images_with_a_class_seen_so_far(tmp_path):
    masks = [mask_of(0, 16), mask_of(0), mask_of(3, 255), mask_of(16, 255)]
    root = make_voc(tmp_path, [mask_of(0, 1), mask_of(0, 16)], masks)
    options = {"rest_is_background": True, "ignore_void": True}
    first, second = build(root, 0, **options), build(root, 1, **options)
    assert first.test.indices.tolist() == first.val.indices.tolist() == [2]
    assert second.test.indices.tolist() == [0, 2, 3]
    assert first.list_lengths == (2, 4)
    assert set(second.test[1][1].unique().tolist()) == {3, 255}
    assert build(root, 0).test.indices.tolist() == [0, 1, 2, 3]
    poor = make_voc(tmp_path / "poor", [mask_of(0, 1)], [mask_of(0, 16)])
    with pytest.raises(UserError, match="no image to test holds a class of the steps up to 0"):
        build(poor, 0, **options)


def test_validation_on_the_train_list(voc):
    data = build(voc, 1, val_on_trainset=True)
    assert data.val.indices.tolist() == data.test.indices.tolist() == list(range(10))
    assert 1 in data.val[0][1]  # an old class, with the label that evaluation gives it


def test_held_out_images_leave_training(voc):
    data = build(voc, 0, cross_val=True)
    assert len(data.val) == 2
    assert sorted([*data.val.indices, *data.train.indices]) == list(range(10))
    assert np.array_equal(data.val.indices, build(voc, 0, cross_val=True).val.indices)
    splits = {tuple(build(voc, 0, cross_val=True, seed=s).val.indices) for s in range(8)}
    assert len(splits) > 1
    assert 255 in data.val[0][1]
    assert len(data.test) == 7
    with pytest.raises(UserError, match="--cross_val needs at least two"):
        hold_out(np.arange(1), 0)


def test_the_step_is_checked(voc):
    with pytest.raises(UserError, match="no step 2"):
        build(voc, 2)


# --- every random draw has an address ---


def test_draws_are_those_of_earlier_versions():
    """Else an interrupted run would go on with other images."""
    shuffled = list(TrainBatchSampler(8, 4, seed=42))
    assert [[i for _, i in batch] for batch in shuffled] == [[1, 6, 5, 4], [2, 0, 3, 7]]
    assert hold_out(np.arange(10), 0)[1].tolist() == [6, 9]
    assert generator(AUGMENT, 0, 1, 2).integers(1000, size=3).tolist() == [205, 985, 18]


def batches(data: IncrementalSegmentation, workers: int, epoch: int = 1, start: int = 0):
    sampler = TrainBatchSampler(len(data), 3, seed=3)
    loader = DataLoader(
        data, batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0
    )
    sampler.set_epoch(0)
    next(iter(loader))  # workers that persist must follow the change of epoch
    sampler.set_epoch(epoch, start)
    return list(loader)


def test_worker_count_and_resuming_change_nothing(voc):
    data = build(voc).train
    expected = batches(data, 0)
    assert len(expected) == 3
    for other in (batches(data, 2), batches(data, 0, start=2), batches(data, 1, start=2)):
        for (images, labels), (a, b) in zip(expected[-len(other) :], other, strict=True):
            assert torch.equal(images, a)
            assert torch.equal(labels, b)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_keep_the_memory_of_their_images(voc, workers):
    data = build(voc).train
    loader = DataLoader(data, batch_size=5, num_workers=workers, collate_fn=collate)
    expected = default_collate([data[i] for i in range(5)])
    images, labels = next(iter(loader))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, expected[0])
    assert torch.equal(labels, expected[1])


def test_augmentation_depends_on_seed_epoch_and_sample_alone(voc):
    data = build(voc).train
    assert torch.equal(data[2, 7][0], data[2, 7][0])
    assert not torch.equal(data[2, 7][0], data[3, 7][0])
    assert not torch.equal(data[2, 7][0], build(voc, seed=4).train[2, 7][0])
    assert torch.equal(data[7][0], data[0, 7][0])
    # Image 7 of the train list is the third of step 1; at either step it is augmented alike.
    assert torch.equal(data[2, 7][0], build(voc, step=1).train[2, 2][0])


def keys(num_samples: int, batch_size: int, world: int, epoch: int = 0, start: int = 0):
    """[iteration][rank] → keys."""
    ranks = []
    for rank in range(world):
        sampler = TrainBatchSampler(num_samples, batch_size, seed=1, rank=rank, world=world)
        sampler.set_epoch(epoch, start)
        ranks.append(list(sampler))
        assert len(sampler) == len(ranks[-1])
    return list(zip(*ranks, strict=True))


def test_process_count_does_not_change_the_global_batches():
    alone = [list(chain(*iteration)) for iteration in keys(50, 12, 1, epoch=4)]
    assert [len(batch) for batch in alone] == [12] * 4
    assert len({key for batch in alone for key in batch}) == 48
    assert {epoch for batch in alone for epoch, _ in batch} == {4}
    for world in (2, 3):
        split = keys(50, 12 // world, world, epoch=4)
        assert [list(chain(*iteration)) for iteration in split] == alone


def test_a_resumed_epoch_is_the_tail_of_the_whole_one():
    whole = keys(50, 4, 2, epoch=3)
    assert len(whole) == 6
    for start in (0, 1, 5, 6):
        assert keys(50, 4, 2, epoch=3, start=start) == whole[start:]


def test_epochs_and_seeds_shuffle_differently():
    orders = {str(keys(50, 5, 1, epoch=epoch)).replace(f"({epoch},", "(") for epoch in range(5)}
    assert len(orders) == 5
    assert list(TrainBatchSampler(50, 5, seed=2)) != list(TrainBatchSampler(50, 5, seed=1))


def test_a_pass_under_way_keeps_its_epoch():
    sampler = TrainBatchSampler(4, 2, seed=0)
    under_way = iter(sampler)
    sampler.set_epoch(1)
    assert {epoch for batch in under_way for epoch, _ in batch} == {0}


def test_fewer_images_than_one_batch():
    TrainBatchSampler(8, 4, seed=0, rank=1, world=2)
    with pytest.raises(UserError, match=r"7 training images .* \(2 x 4\): lower --batch_size"):
        TrainBatchSampler(7, 4, seed=0, rank=1, world=2)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_evaluation_visits_every_image_once_in_the_same_batches(world):
    samplers = [EvalBatchSampler(11, 3, rank=rank, world=world) for rank in range(world)]
    assert sorted(batch for sampler in samplers for batch in sampler) == [
        [0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]
    ]  # fmt: skip
    assert sum(map(len, samplers)) == 4
    assert list(samplers[0])[0] == [0, 1, 2]


@needs_photographs
def test_photographs_load_in_workers(tmp_path):
    data = build_datasets(
        VOC, PHOTOGRAPHS, TASK, 1, overlap=True, crop_size=64, seed=0, workdir=tmp_path
    )
    assert (len(data.train), len(data.test)) == (515, 200)
    sampler = TrainBatchSampler(len(data.train), 8, seed=0)
    loader = DataLoader(data.train, batch_sampler=sampler, num_workers=2)
    images, labels = next(iter(loader))
    assert images.shape == (8, 3, 64, 64)
    assert set(labels.unique().tolist()) <= {0, *range(16, 21)}
    assert labels.max() >= 16
    seen = {label for i in range(5) for label in data.test[i][1].unique().tolist()}
    assert {0, 1, 16} <= seen <= {*range(21), 255}
