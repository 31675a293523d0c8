"""The lists of a step: which images, when they are computed, when a given list is used."""

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dataset import spec as spec_module
from dataset import splits as splits_module
from dataset.ade import ADE
from dataset.catalog import get_spec
from dataset.spec import DatasetSpec
from dataset.splits import main, presence_table, step_indices, training_indices
from dataset.voc import VOC
from tasks import Task, get_task
from tests.trees import (
    PHOTOGRAPHS,
    SHARED,
    make_ade,
    make_voc,
    mask_of,
    needs_photographs,
    write_pair,
)
from utils.errors import UserError

TASK = get_task("voc", "15-5")
OFFICIAL = SHARED / "data" / "splits"
FOLDERS = sorted(path.relative_to(OFFICIAL / "official") for path in OFFICIAL.glob("official/*/*"))


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Images with classes {1}, {1, 16}, {17}, {} and {2, 255}."""
    masks = [mask_of(0, 1), mask_of(1, 16), mask_of(17), mask_of(0), mask_of(2, 255)]
    return make_voc(tmp_path / "voc", masks)


def indices(root: Path, work: Path, step: int = 0, overlap: bool = True, task: Task = TASK):
    return training_indices(VOC, root, task, step, overlap, work).tolist()


def no_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, opening a mask is a failure."""
    monkeypatch.setattr(spec_module, "read_mask", lambda path: pytest.fail(f"opened {path}"))


# --- from class presence to lists ---


@pytest.mark.skipif(not FOLDERS, reason=f"no official lists in {OFFICIAL}")
def test_every_official_list_comes_out():
    checked = 0
    for folder in FOLDERS:
        spec = get_spec(folder.parent.name)
        packed = np.load(OFFICIAL / f"{spec.name}_presence.npz")["presence"]
        presence = np.unpackbits(packed, axis=1, count=spec.num_classes).astype(bool)
        task = get_task(spec.name, folder.name.removesuffix("-ov"))
        lists = step_indices(spec, presence, task, overlap=folder.name.endswith("-ov"))
        for step, ours in enumerate(lists):
            official = np.load(OFFICIAL / "official" / folder / f"train-{step}.npy")
            assert np.array_equal(ours, official), f"{folder} step {step}"
            checked += 1
    assert (len(FOLDERS), checked) == (12, 42)


def plain_partition(presence: np.ndarray, steps: list[list[int]]) -> list[list[int]]:
    """The rule of the reference, word by word; classes count from 1."""
    images, classes = presence.shape
    holds = [[c + 1 for c in range(classes) if presence[i, c]] for i in range(images)]
    n = {c: sum(c in h for h in holds) for c in range(1, classes + 1)}
    added = dict.fromkeys(n, 0)
    lists: list[list[int]] = [[] for _ in steps]
    visited = set()
    for c in range(1, classes + 1):
        for i in range(images):
            if c in holds[i] and i not in visited:
                visited.add(i)
                total = sum(n[j] for j in holds[i])
                scores = [120 * (1 - added[k] / n[k]) + total / n[k] for k in holds[i]]
                winner = holds[i][scores.index(max(scores))]
                step = next(t for t, labels in enumerate(steps) if winner in labels)
                lists[step].append(i)
                for k in set(holds[i]) & set(steps[step]):
                    added[k] += 1
    return [sorted(chosen) for chosen in lists]


@pytest.mark.parametrize("name", ["50", "100-10b", "100-5", "offline"])
def test_partition_follows_the_rule(name):
    rng = np.random.default_rng(0)
    presence = rng.random((400, 150)) < rng.uniform(0, 0.12, 150)
    presence[::50] = False
    task = get_task("ade", name)
    lists = step_indices(ADE, presence, task, overlap=False)
    assert [list_.tolist() for list_ in lists] == plain_partition(
        presence, [list(labels) for labels in task.steps]
    )
    assert sum(map(len, lists)) == presence.any(axis=1).sum()
    overlapped = step_indices(ADE, presence, task, overlap=True)
    assert all(map(np.array_equal, overlapped, lists))


@pytest.mark.parametrize("order", ["", "b", "c"])
def test_100_50_is_100_10_joined(order):
    presence = np.random.default_rng(1).random((300, 150)) < 0.05
    finer = step_indices(ADE, presence, get_task("ade", f"100-10{order}"), overlap=False)
    joined = step_indices(ADE, presence, get_task("ade", f"100-50{order}"), overlap=False)
    assert len(joined) == 2
    assert joined[0].tolist() == finer[0].tolist()
    assert joined[1].tolist() == sorted(np.concatenate(finer[1:]).tolist())


def test_overlapped_and_disjoint(voc, tmp_path):
    expected = {(0, True): [0, 1, 4], (1, True): [1, 2], (0, False): [0, 4], (1, False): [1, 2]}
    for (step, overlap), images in expected.items():
        assert indices(voc, tmp_path, step, overlap) == images
    assert [path.suffix for path in (tmp_path / "data/voc").iterdir()] == [".npz"]


def test_another_order_of_classes(voc, tmp_path):
    """In order b class 5 comes last: an image with 5 and 20 is future at step 0 if disjoint."""
    root = make_voc(tmp_path / "b", [mask_of(5, 20), mask_of(20), mask_of(5)])
    task = get_task("voc", "19-1b")
    assert indices(root, tmp_path, 0, False, task) == [1]
    assert indices(root, tmp_path, 1, False, task) == [0, 2]


@needs_photographs
@pytest.mark.parametrize(
    ("name", "overlapped", "disjoint"),
    [
        ("15-5", [803, 515], [288, 515]),
        ("15-5s", [803, 212, 143, 92, 85, 47], [288, 187, 124, 76, 81, 47]),
        ("19-1", [803, 47], [756, 47]),
    ],
)
def test_sizes_on_the_photographs(photograph_presence, name, overlapped, disjoint):
    task = get_task("voc", name)
    for overlap, sizes in ((True, overlapped), (False, disjoint)):
        assert [len(x) for x in step_indices(VOC, photograph_presence, task, overlap)] == sizes


@pytest.fixture(scope="module")
def photograph_presence(tmp_path_factory) -> np.ndarray:
    samples = VOC.find_samples(PHOTOGRAPHS, "train")
    return presence_table(VOC, samples, tmp_path_factory.mktemp("cache") / "presence.npz")


# --- the cached scan ---


def test_masks_are_scanned_once_for_all_tasks_and_settings(voc, tmp_path, monkeypatch):
    indices(voc, tmp_path)
    no_scan(monkeypatch)
    for name in ("15-5", "15-5s", "19-1", "offline"):
        for overlap in (True, False):
            assert indices(voc, tmp_path, 0, overlap, get_task("voc", name))


def test_presence_marks_the_classes_and_nothing_else(voc, tmp_path):
    table = presence_table(VOC, VOC.find_samples(voc, "train"), tmp_path / "presence.npz")
    assert table.shape == (5, 20)
    assert [np.flatnonzero(row).tolist() for row in table] == [[0], [0, 15], [16], [], [1]]


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_a_damaged_cache_is_computed_again(voc, tmp_path, content):
    samples, cache = VOC.find_samples(voc, "train"), tmp_path / "presence.npz"
    expected = presence_table(VOC, samples, cache)
    stored = cache.read_bytes()
    cache.write_bytes(stored[:-40] + bytes(40) if content is None else content)
    assert np.array_equal(presence_table(VOC, samples, cache), expected)
    assert cache.read_bytes() == stored


def test_a_cache_of_other_size_is_computed_again(voc, tmp_path):
    samples, cache = VOC.find_samples(voc, "train"), tmp_path / "presence.npz"
    presence_table(VOC, samples[:2], cache)
    assert presence_table(VOC, samples, cache).shape == (5, 20)


@pytest.mark.parametrize(("spec", "label"), [(VOC, 21), (VOC, 254), (ADE, 151), (ADE, 255)])
def test_the_scan_refuses_foreign_labels(tmp_path, spec, label):
    make = make_voc if spec is VOC else make_ade
    root = make(tmp_path, [mask_of(1), mask_of(2, label)])
    mask = spec.find_samples(root, "train")[1].mask
    task = get_task(spec.name, "offline")
    with pytest.raises(UserError, match=f"mask {mask} holds label {label}, but {spec.name} has 0"):
        training_indices(spec, root, task, 0, True, tmp_path)
    assert not (tmp_path / "data").exists()


def test_every_flipped_bit_of_the_cache_is_noticed_or_harmless(voc, tmp_path):
    samples, cache = VOC.find_samples(voc, "train"), tmp_path / "presence.npz"
    expected = presence_table(VOC, samples, cache)
    content = cache.read_bytes()
    for at in range(len(content)):
        cache.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        assert np.array_equal(presence_table(VOC, samples, cache), expected)


def test_other_data_gets_its_own_lists(voc, tmp_path):
    work = tmp_path / "work"
    other = make_voc(tmp_path / "other", [mask_of(16), mask_of(1), mask_of(2)])
    for _ in range(2):  # computed, then cached
        assert indices(voc, work) == [0, 1, 4]
        assert indices(other, work) == [1, 2]
        assert indices(other, work, 1) == [0]
        assert indices(voc, work, 1) == [1, 2]


def test_a_changed_mask_is_noticed(voc, tmp_path):
    assert indices(voc, tmp_path) == [0, 1, 4]
    mask = Path(VOC.find_samples(voc, "train")[3].mask)
    write_pair(tmp_path / "any.jpg", mask, mask_of(7))
    assert indices(voc, tmp_path) == [0, 1, 3, 4]


def test_the_fingerprint_sees_name_size_and_time(voc):
    def current() -> str:
        return splits_module.fingerprint(VOC, VOC.find_samples(voc, "train"))

    seen = [current()]
    assert current() == seen[0]
    mask = Path(VOC.find_samples(voc, "train")[1].mask)
    os.utime(mask, ns=(0, 12345))
    seen.append(current())
    mask.write_bytes(mask.read_bytes() + b" ")
    os.utime(mask, ns=(0, 12345))
    seen.append(current())
    list_path = voc / "PascalVOC12/splits/train_aug.txt"
    list_path.write_text("".join(reversed(list_path.read_text().splitlines(keepends=True))))
    seen.append(current())
    assert len(set(seen)) == 4


# --- given lists ---


def store(work: Path, step: int, content: np.ndarray, folder: str = "15-5-ov") -> Path:
    path = work / "data" / "voc" / folder / f"train-{step}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, content)
    return path


def test_a_given_list_is_used_as_it_is_and_never_overwritten(voc, tmp_path, caplog):
    path = store(tmp_path, 1, np.array([3, 0], dtype=np.int32))
    content = path.read_bytes()
    with caplog.at_level(logging.INFO):
        assert indices(voc, tmp_path, 1) == [3, 0]
    assert [record.getMessage() for record in caplog.records] == [
        f"split list {path} is used as it is"
    ]
    assert indices(voc, tmp_path, 0) == [0, 1, 4]
    os.utime(VOC.find_samples(voc, "train")[0].mask, (1, 1))
    assert indices(voc, tmp_path, 0) == [0, 1, 4]
    assert indices(voc, tmp_path, 1) == [3, 0]
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_a_given_list_needs_no_scan(voc, tmp_path, monkeypatch):
    store(tmp_path, 1, np.array([3, 0]))
    no_scan(monkeypatch)
    monkeypatch.setattr(splits_module, "presence_table", lambda *_: pytest.fail("computed"))
    assert indices(voc, tmp_path, 1) == [3, 0]


def test_lists_that_an_earlier_version_computed_are_not_used(voc, tmp_path, caplog):
    """It named in lists.json those that it computed; another one beside them was given."""
    path = store(tmp_path, 0, np.array([2]))
    store(tmp_path, 1, np.array([3, 0]))
    record = path.with_name("lists.json")
    record.write_text('{"data": "0123456789abcdef", "sha256": {\n  "train-0.npy": "…"}}')
    with caplog.at_level(logging.INFO):
        assert indices(voc, tmp_path, 0) == [0, 1, 4]
    said, _ = caplog.messages  # then the scan is announced
    assert f"{path} of an earlier version is computed again; delete {record} to use it" in said
    assert np.load(path).tolist() == [2]
    assert indices(voc, tmp_path, 1) == [3, 0]
    record.unlink()
    assert indices(voc, tmp_path, 0) == [2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.array([0, 5]), "reaches outside of the 5 training images"),
        (np.array([-1, 2]), "reaches outside"),
        (np.array([2**63], dtype=np.uint64), "reaches outside"),
        (np.array([0.0, 1.0]), "is no one-dimensional array of integers"),
        (np.array([True, False]), "is no one-dimensional array of integers"),
        (np.array([[0, 1]]), "is no one-dimensional array of integers"),
        (np.array(3), "is no one-dimensional array of integers"),
        (np.array(["0"]), "is no one-dimensional array of integers"),
        (np.array([1, 2, 1]), "names an image twice"),
        (np.array([{}], dtype=object), "cannot be read .*allow_pickle=False"),
    ],
)
def test_a_given_list_that_does_not_fit(voc, tmp_path, content, message):
    path = store(tmp_path, 0, content)
    with pytest.raises(UserError, match=f"split list {path} {message}"):
        indices(voc, tmp_path)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04", b"\x80\x04N."])
def test_a_given_list_that_is_none(voc, tmp_path, content):
    path = store(tmp_path, 0, np.arange(3))
    for damaged in (content, path.read_bytes()[:-4], path.read_bytes()[:20]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"split list {path} cannot be read .*delete it"):
            indices(voc, tmp_path)


def test_an_archive_of_arrays_is_no_list(voc, tmp_path):
    path = store(tmp_path, 0, np.arange(3))
    with path.open("wb") as file:
        np.savez(file, np.arange(3))
    with pytest.raises(UserError, match="no one-dimensional array"):
        indices(voc, tmp_path)


def test_a_step_without_images(voc, tmp_path):
    task = get_task("voc", "15-5s")
    assert indices(voc, tmp_path, 1, True, task) == [1]
    for _ in range(2):  # computed, then from the cache
        with pytest.raises(UserError, match=f"step 5 of task 15-5s has no training image in {voc}"):
            indices(voc, tmp_path, 5, True, task)
    with pytest.raises(UserError, match="disjoint setting, try --overlap"):
        indices(voc, tmp_path, 5, False, task)


def test_ade_has_one_place_for_both_settings(tmp_path):
    root = make_ade(tmp_path, [mask_of(1, 120), mask_of(150), mask_of(0)])
    task = get_task("ade", "100-50")
    for overlap in (True, False):
        lists = [training_indices(ADE, root, task, t, overlap, tmp_path).tolist() for t in (0, 1)]
        assert lists == [[0], [1]]
    given = tmp_path / "data/ade/100-50/train-0.npy"
    given.parent.mkdir()
    np.save(given, np.array([2]))
    for overlap in (True, False):
        assert training_indices(ADE, root, task, 0, overlap, tmp_path).tolist() == [2]


def test_ade_without_its_partition_is_split_like_other_data(tmp_path):
    """Every image with a class of the step, as PLOP has it, or those without later classes."""
    root = make_ade(tmp_path, [mask_of(1, 120), mask_of(150), mask_of(0), mask_of(3, 7)])
    free, task = replace(ADE, partition=False), get_task("ade", "100-50")
    for overlap, expected in ((True, [[0, 3], [0, 1]]), (False, [[3], [0, 1]])):
        lists = [training_indices(free, root, task, t, overlap, tmp_path).tolist() for t in (0, 1)]
        assert lists == expected
    given = tmp_path / "data/ade/100-50-ov/train-0.npy"
    given.parent.mkdir()
    np.save(given, np.array([2]))
    assert training_indices(free, root, task, 0, True, tmp_path).tolist() == [2]
    assert training_indices(ADE, root, task, 0, True, tmp_path).tolist() == [0, 3]
    ade = ("--dataset", "ade", "--data_root", root, "--task", "100-50", "--overlap")
    counts = [["step 0: 2 images", "step 1: 1 images"], ["step 0: 2 images", "step 1: 2 images"]]
    for more, lines in zip(([], ["--no-partition"]), counts, strict=True):
        assert command(tmp_path, *ade, *more).stdout.splitlines() == lines


# --- the command ---


def command(work: Path, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "dataset.splits", *map(str, arguments)],
        cwd=work,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )


def test_command_counts_and_stores_every_step_where_told_to(voc, tmp_path):
    task = ("--dataset", "voc", "--data_root", voc, "--task", "15-1", "--overlapped")
    counts = [f"step {step}: {n} images" for step, n in enumerate([3, 1, 1, 0, 0, 0])]
    result = command(tmp_path, *task)
    assert result.returncode == 0
    assert result.stdout.splitlines() == counts
    assert result.stderr == ""  # the bar of the scan is for terminals
    assert not list(tmp_path.rglob("*.npy"))

    result = command(tmp_path, *task, "--out", "lists")
    assert result.stdout.splitlines() == [
        f"{line}, lists/train-{step}.npy" for step, line in enumerate(counts)
    ]
    assert np.load(tmp_path / "lists/train-0.npy").tolist() == [0, 1, 4]
    (tmp_path / "lists/train-0.npy").write_bytes(b"mine")
    result = command(tmp_path, *task, "--out", "lists")
    assert result.returncode == 1
    assert "error: split list lists/train-0.npy exists" in result.stderr
    assert (tmp_path / "lists/train-0.npy").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--data_root", "/nowhere"], "no data root /nowhere"),
        (["--task", "100-50"], "belongs to dataset ade"),
        (["--task", "7"], "unknown task '7'"),
    ],
)
def test_command_fails_with_one_line(tmp_path, monkeypatch, arguments, fragment):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    message = str(caught.value.code)
    assert fragment in message
    assert "\n" not in message
    assert not list(tmp_path.iterdir())


def test_a_spec_without_void_has_none():
    spec = DatasetSpec("x", ("rest", "a"), False, None, lambda root, split: [])
    assert np.flatnonzero(spec.known_labels).tolist() == [0, 1]
    assert np.flatnonzero(VOC.known_labels).tolist() == [*range(21), 255]
