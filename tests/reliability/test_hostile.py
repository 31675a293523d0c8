"""Damaged and hostile files: refused with one line, or read as what they were."""

from __future__ import annotations

import io
import os
import pickle
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import run
import segmentation_module
from dataset.build import build_datasets
from dataset.files import read_image, read_mask
from dataset.splits import training_indices
from dataset.voc import VOC, find_samples
from engine import checkpoint
from tasks import get_task
from tests.reliability import child
from tests.reliability.harness import FLAGS, SETTING, checkpoint_path, difference, go
from utils.errors import UserError

COUNTS = [25, pytest.param(500, marks=pytest.mark.long)]
TASK = get_task("voc", "15-5")


def mutations(data: bytes, count: int) -> Iterator[bytes]:
    """`count` damaged forms of a file, from a seed."""
    rng = random.Random(0)
    kinds: list[Callable[[bytearray, int, int], object]] = [
        lambda d, a, b: d.__setitem__(a, d[a] ^ 1 << rng.randrange(8)),
        lambda d, a, b: d.__setitem__(slice(a, b), rng.randbytes(b - a)),
        lambda d, a, b: d.__setitem__(slice(a, b), bytes(b - a)),
        lambda d, a, b: d.__delitem__(slice(a, b)),
        lambda d, a, b: d.__delitem__(slice(a, None)),
        lambda d, a, b: d.__setitem__(slice(a, a), d[a:b]),
        lambda d, a, b: d.__setitem__(slice(a, a), rng.randbytes(b - a)),
        lambda d, a, b: d.extend(rng.randbytes(b - a)),
    ]
    yield b""
    for i in range(count - 1):
        mutated = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 3))):
            # Half of the places are near an end: headers and directories are there.
            reach = len(mutated) if rng.random() < 0.5 else min(len(mutated), 400)
            at = rng.randrange(reach)
            at = at if rng.random() < 0.5 else len(mutated) - 1 - at
            kinds[i % len(kinds)](mutated, at, min(len(mutated), at + rng.choice((1, 4, 64, 2000))))
            if not mutated:
                break
        yield bytes(mutated)


@contextmanager
def no_hang(seconds: int = 20) -> Iterator[None]:
    def late(number: int, frame: Any) -> None:
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(path: Path, count: int, reads: Callable[[], Any], same: Callable[[Any], bool]) -> int:
    """Damage the file again and again; returns how often that was refused.

    Anything but a UserError of one line, or content that is `same`, fails the test.
    """
    original = path.read_bytes()
    refused = 0
    for number, mutated in enumerate(mutations(original, count)):
        path.write_bytes(mutated)
        with no_hang():
            try:
                content = reads()
            except UserError as error:
                lines, refused = str(error).splitlines(), refused + 1
            else:
                lines = []
                assert same(content), f"mutation {number} passed"
        assert len(lines) <= 1
    path.write_bytes(original)
    assert same(reads())
    return refused


@pytest.mark.parametrize("count", COUNTS)
def test_checkpoint(step0, tmp_path, count):
    path = tmp_path / "r.pth"
    shutil.copy(checkpoint_path(step0), path)
    right = checkpoint.load(path, "cure")
    refused = fuzz(path, count, lambda: checkpoint.load(path, "cure"),
                   lambda content: not difference(content, right))  # fmt: skip
    assert refused > 0.5 * count


@pytest.fixture
def tree(toy, tmp_path) -> Path:
    """A copy of the data to damage."""
    return Path(shutil.copytree(toy, tmp_path / "toy"))


@pytest.mark.parametrize("count", COUNTS)
def test_presence_cache(tree, tmp_path, count):
    """A damaged one is not an error: the masks are scanned again."""

    def reads() -> np.ndarray:
        return training_indices(VOC, tree, TASK, 0, True, tmp_path)

    right = reads()
    (cache,) = (tmp_path / "data" / "voc").iterdir()
    assert fuzz(cache, count, reads, lambda content: np.array_equal(content, right)) == 0


@pytest.mark.parametrize("count", COUNTS)
def test_given_split_list(tree, tmp_path, count):
    """It has no checksum: another list of different images of the data set can pass."""
    path = tmp_path / "data" / "voc" / "15-5-ov" / "train-0.npy"
    path.parent.mkdir(parents=True)
    np.save(path, np.arange(0, 48, 2))

    def is_list(content: np.ndarray) -> bool:
        return len(set(content)) == len(content) and set(content) <= set(range(48))

    def reads() -> np.ndarray:
        return training_indices(VOC, tree, TASK, 0, True, tmp_path)

    assert fuzz(path, count, reads, is_list) > 0.5 * count


@pytest.mark.parametrize("count", COUNTS)
def test_mask(tree, count):
    path = Path(find_samples(tree, "train")[0].mask)
    right = np.array(read_mask(str(path)))
    refused = fuzz(path, count, lambda: np.array(read_mask(str(path))),
                   lambda content: np.array_equal(content, right))  # fmt: skip
    assert refused > 0.5 * count


@pytest.mark.parametrize("count", COUNTS)
def test_jpeg(tree, count):
    """The format has no checksums, so other pixels can pass; another size cannot."""
    path = Path(find_samples(tree, "train")[0].image)
    sets = build_datasets(VOC, tree, TASK, 0, overlap=True, crop_size=32, seed=0, workdir=tree)
    data = sets.train
    position = int(np.flatnonzero(data.indices == 0)[0])
    refused = fuzz(path, count, lambda: data[position][0], lambda image: image.shape == (3, 32, 32))
    assert refused > 0.2 * count
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(UserError, match="cannot be read"):
        read_image(str(path))


@pytest.mark.parametrize("count", COUNTS)
def test_list_file(tree, count):
    """It has no checksum either: a shorter list can pass, one that leads elsewhere cannot."""
    path = tree / "PascalVOC12" / "splits" / "train_aug.txt"
    right = set(find_samples(tree, "train"))
    refused = fuzz(path, count, lambda: find_samples(tree, "train"), lambda s: set(s) <= right)
    assert refused > 0.4 * count


@pytest.mark.parametrize(
    "line",
    [
        "/JPEGImages/../../secret.jpg /SegmentationClassAug/../../secret.png",
        "{outside}/secret.jpg {outside}/secret.png",
        "/linked/../../outside/secret.jpg /linked/../../outside/secret.png",
        "/linked/./../secret.jpg /linked/./../secret.png",
    ],
)
def test_lists_do_not_lead_out(tree, tmp_path, line):
    base, outside = tree / "PascalVOC12", tmp_path / "outside"
    outside.mkdir()
    for folder, suffix in (("JPEGImages", "jpg"), ("SegmentationClassAug", "png")):
        inside = next((base / folder).glob(f"*.{suffix}"))
        shutil.copy(inside, outside / f"secret.{suffix}")
    (base / "linked").symlink_to(outside)
    (base / "splits" / "val.txt").write_text(line.format(outside=outside) + "\n")
    with pytest.raises(UserError, match=r"'\.\.'|no file"):
        find_samples(tree, "val")


# --- a checkpoint that torch reads without complaint, but that nobody should believe ---


def put(*way: Any) -> Callable[[dict[str, Any]], None]:
    """Sets content[way[0]][way[1]]... = way[-1]."""

    def change(content: dict[str, Any]) -> None:
        *inner, last, value = way
        for key in inner:
            content = content[key]
        content[last] = value

    return change


def change_first(content: dict[str, Any], name: str, value: Callable[[Any], Any]) -> None:
    """Replaces the first tensor of `name`."""
    inside = content[name]
    key = next(iter(inside))
    inside[key] = value(inside[key])


LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "version": put("version", 2),
    "version that is a tensor": put("version", torch.ones(2)),
    "nan weight": lambda c: change_first(c, "model_state", lambda t: t * float("nan")),
    "weight of another shape": lambda c: change_first(c, "model_state", lambda t: t[:1]),
    "weight that is none": lambda c: change_first(c, "model_state", lambda t: "weight"),
    "missing weight": lambda c: c["model_state"].popitem(),
    "model_state": put("model_state", [1, 2]),
    "epoch": put("epoch", "three"),
    "negative epoch": put("epoch", -1),
    "epoch that does not fit": put("epoch", 0),
    "iteration": put("iteration", 2.5),
    "steps": put("steps", [1, 2]),
    "options": put("options", "none"),
    "option": put("options", "task", 7),
    "missing field": lambda c: c.pop("scheduler_state"),
    "optimizer": put("optimizer_state", {}),
    "learning rate": put("optimizer_state", "param_groups", 0, "lr", "fast"),
    "momentum": put("optimizer_state", "state", 0, "momentum_buffer", torch.ones(3)),
    "infinite momentum": put("optimizer_state", "state", 0, "momentum_buffer",
                             torch.full((8, 3, 3, 3), float("inf"))),
    "momentum that is none": put("optimizer_state", "state", 0, {"momentum_buffer": 1}),
    "schedule": put("scheduler_state", "last_epoch", "soon"),
    "random state": put("random_state", torch.zeros(4)),
    "regularizer": put("regularizer_state", "rw", {"fisher": {"x": torch.ones(1)}}),
    "regularizer of another shape": lambda c: change_first(
        c["regularizer_state"]["rw"], "fisher", lambda t: torch.ones(1)),
}  # fmt: skip


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def as_bytes(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


RUBBISH = {
    "empty": b"",
    "text": b"hello\n" * 100,
    "a list": as_bytes([1, 2]),
    "code": as_bytes({"version": 1, "model_state": {}, "epoch": Bomb()}),
    "code in a bare pickle": pickle.dumps(Bomb(), protocol=2),
}


@pytest.fixture
def interrupted(step0, toy, tmp_path, monkeypatch) -> Path:
    """A folder with a running step 0, and a program with the small network, to be run in here."""
    shutil.copytree(step0, tmp_path, dirs_exist_ok=True)
    path = checkpoint_path(tmp_path)
    content = torch.load(path, weights_only=True)
    content["finished"] = False
    torch.save(content, path)
    monkeypatch.chdir(tmp_path)
    for name in ("ResNet", "DeeplabV3", "HEAD_CHANNELS"):
        monkeypatch.setattr(segmentation_module, name, getattr(segmentation_module, name))
    child.shrink()
    return tmp_path


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"}


def base(toy: Path) -> list[str]:
    """The flags of the run that wrote the checkpoint."""
    return ["--data_root", str(toy), *FLAGS, "--batch_size", "4", "--regularizer", "ewc,pi,rw"]


def refuses(capsys, folder: Path, toy: Path, *flags: str) -> str:
    """The one line of a run that must fail and change nothing."""
    before = snapshot(folder)
    with no_hang(60):
        assert run.main([*base(toy), *flags]) == 1
    assert snapshot(folder) == before
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    return error


def test_the_same_checkpoint_without_a_lie(interrupted, toy):
    assert run.main([*base(toy), "--continue_ckpt", "--epochs", "3"]) == 0


@pytest.mark.parametrize("lie", LIES)
def test_a_checkpoint_that_lies(interrupted, toy, capsys, lie):
    path = checkpoint_path(interrupted)
    content = torch.load(path, weights_only=True)
    LIES[lie](content)
    torch.save(content, path)
    refuses(capsys, interrupted, toy, "--continue_ckpt", "--epochs", "3")


@pytest.mark.parametrize("content", RUBBISH)
def test_a_checkpoint_that_is_none(interrupted, toy, capsys, content):
    checkpoint_path(interrupted).write_bytes(RUBBISH[content])
    refuses(capsys, interrupted, toy, "--continue_ckpt", "--epochs", "3")
    refuses(capsys, interrupted, toy, "--test")
    refuses(capsys, interrupted, toy, "--step", "1")
    assert not (interrupted / "exploded").exists()


def test_a_flipped_bit_in_a_weight_is_noticed(interrupted, toy, capsys):
    """`torch.load` does not look at the checksums."""
    path = checkpoint_path(interrupted)
    data = bytearray(path.read_bytes())
    weight = torch.load(path, weights_only=True)["model_state"]["head.red_conv.weight"]
    data[data.index(weight.numpy().tobytes())] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)
    assert "damaged" in refuses(capsys, interrupted, toy, "--test")


def test_another_number_of_images_per_iteration(interrupted, toy, capsys):
    flags = ["--continue_ckpt", "--epochs", "3", "--batch_size", "3"]
    line = refuses(capsys, interrupted, toy, *flags)
    assert "4 images per iteration, this run has 3" in line


def test_going_on_with_other_images_of_the_same_number(interrupted, tree, capsys):
    """The place in the epoch would mean other images."""
    path = tree / "PascalVOC12" / "splits" / "train_aug.txt"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    before = checkpoint_path(interrupted).read_bytes()
    assert run.main([*base(tree), "--continue_ckpt", "--epochs", "3"]) == 1
    assert "images checksum" in capsys.readouterr().err
    assert checkpoint_path(interrupted).read_bytes() == before


# --- as a user sees it ---


@pytest.mark.parametrize(
    "victim",
    [
        "JPEGImages/*train*.jpg", "SegmentationClassAug/*val*.png", "splits/val.txt",
        "data/voc/15-5-ov/train-0.npy",
    ],
)  # fmt: skip
def test_a_damaged_file_ends_the_run_with_a_line(fresh, tree, victim):
    folder = fresh("folder")
    given = folder / "data/voc/15-5-ov/train-0.npy"
    given.parent.mkdir(parents=True, exist_ok=True)
    np.save(given, np.arange(48))
    inside = folder if victim.startswith("data/") else tree / "PascalVOC12"
    for path in inside.glob(victim):
        path.write_bytes(path.read_bytes()[:-25])
    done = go(folder, "--data_root", tree, "--batch_size", 4, "--num_workers", 2, "--epochs", 1,
              "--restart")  # fmt: skip
    assert done.status == [1]
    assert "Traceback" not in done.output
    assert done.output.count("error: ") == 1


def test_settings_of_the_harness_are_those_of_the_program(step0):
    """Else the files above would not be the ones that the program reads."""
    assert checkpoint_path(step0).is_file()
    assert (step0 / "logs" / "results" / f"{SETTING}.csv").is_file()
