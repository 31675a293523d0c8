"""benchmarks.same_bits sees every kind of difference, and none where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.same_flags import ask, compare_flags, read_flags, refusal
from benchmarks.same_runs import cached, copy_images
from benchmarks.same_values import (
    Comparisons,
    compare_checkpoints,
    compare_results,
    differences,
    predictions,
    tables,
)
from tests.conftest import ROOT
from tests.trees import make_voc, mask_of

WEIGHTS = {"a": torch.arange(3.0), "b": [torch.tensor(True), 2, None], "c": {}}


@pytest.mark.parametrize(
    ("new", "words"),
    [
        (WEIGHTS | {"a": torch.tensor([0.0, 1.0, 2.25])}, "a differs by up to 0.25"),
        (WEIGHTS | {"a": torch.arange(3.0).double()}, "a was torch.float32 (3,), is torch.float64"),
        (WEIGHTS | {"a": torch.arange(3.0)[None]}, "is torch.float32 (1, 3)"),
        (WEIGHTS | {"b": [torch.tensor(False), 2, None]}, "b.0 differs"),
        (WEIGHTS | {"b": [torch.tensor(True), 2.0, None]}, "b.1 was 2, is 2.0"),
        (WEIGHTS | {"a": torch.tensor([0.0, 1.0, 2.5])}, "0.5, 0.2 of its largest value"),
        (WEIGHTS | {"b": (torch.tensor(True), 2, None)}, "type of b"),
        (WEIGHTS | {"c": {"d": 1}}, "c.d is new"),
        ({"a": WEIGHTS["a"], "b": WEIGHTS["b"]}, "type of c is missing"),
    ],
)
def test_one_difference_is_one_line(new: dict, words: str):
    assert differences(WEIGHTS, {**WEIGHTS}) == []
    (line,) = differences(WEIGHTS, new)
    assert words in line


def test_the_largest_difference_comes_first():
    old = {"small": 1.0, "large": torch.tensor([4.0]), "gone": 1}
    lines = differences(old, {"small": 1.001, "large": torch.tensor([5.0])})
    assert [line.split()[0] for line in lines] == ["gone", "large", "small"]
    assert "by up to 0.001, 0.001 of" in lines[2]


def test_nothing_is_not_the_same_as_nothing():
    assert differences({}, {}) != []
    assert differences([], []) != []


def write_checkpoint(path: Path, options: dict, **fields) -> Path:
    content = {
        "model_state": {"w": torch.ones(2)}, "optimizer_state": {"state": {0: torch.zeros(2)}},
        "scheduler_state": {"last_epoch": 3}, "scaler_state": {}, "regularizer": None,
        "regularizer_state": None, "random_state": torch.zeros(4, dtype=torch.uint8), "epoch": 1,
        "options": options,
    }  # fmt: skip
    torch.save(content | fields, path)
    return path


@pytest.mark.parametrize(
    ("fields", "options", "part"),
    [
        ({}, {"lr": 1, "new": 2}, None),
        ({"model_state": {"w": torch.zeros(2)}}, {"lr": 1}, "model"),
        ({"optimizer_state": {"state": {}}}, {"lr": 1}, "optimizer"),
        ({"scheduler_state": {"last_epoch": 4}}, {"lr": 1}, "optimizer"),
        ({"regularizer": {"f": torch.ones(1)}}, {"lr": 1}, "regulariser"),
        ({"random_state": torch.ones(4, dtype=torch.uint8)}, {"lr": 1}, "random state"),
        ({"epoch": 2}, {"lr": 1}, "numbers and names"),
        ({"more": 2}, {"lr": 1}, None),
        ({}, {"lr": 2}, "options"),
        ({}, {}, "options"),
    ],
)
def test_the_part_of_a_checkpoint_that_differs(fields, options, part, tmp_path, capsys):
    old = write_checkpoint(tmp_path / "old.pth", {"lr": 1, "name": "x"})
    new = write_checkpoint(tmp_path / "new.pth", options, **fields)
    results = Comparisons()
    compare_checkpoints(results, "run", old, new, free=["name"])
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("DIFFERS")]
    assert results.count == 6
    assert results.differ == len(wrong) == (part is not None)
    assert all(f"run, {part} (" in line for line in wrong)


def test_a_checkpoint_that_was_not_written_differs(tmp_path):
    results = Comparisons()
    old = write_checkpoint(tmp_path / "old.pth", {})
    compare_checkpoints(results, "run", old, tmp_path / "none.pth")
    assert (results.count, results.differ) == (1, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name,step,iou\na,0,0.5\na,1,X\n", ""),
        ("name,step,protocol,iou\na,0,mib,0.50\na,1,mib,X\n", ""),
        ("name,step,iou\na,0,0.25\na,1,X\n", "0.iou differs by up to 0.25"),
        ("name,step,iou\na,0,0.5\na,1,0.5\n", "1.iou was 'X'"),
        ("name,step,iou\na,0,0.5\n", "row 1.iou is missing"),
        ("name,step\na,0\na,1\n", "0.iou is missing"),
        (None, "row 0.iou is missing"),
    ],
)
def test_result_files_are_compared_by_the_columns_of_the_old(tmp_path, capsys, text, words):
    for side, rows in (("old", "name,step,iou\na,0,0.5\na,1,X\n"), ("new", text)):
        (tmp_path / side / "logs/results").mkdir(parents=True)
        if rows is not None:
            (tmp_path / side / "logs/results/x.csv").write_text(rows)
    results = Comparisons()
    compare_results(results, "run", tmp_path / "old", tmp_path / "new")
    assert results.differ == bool(words)
    assert words in capsys.readouterr().out
    if text is None:
        compare_results(results, "run", tmp_path / "new", tmp_path / "new")
        assert results.differ == 2


def test_tables_are_what_is_printed_between_log_lines():
    printed = "12:00:00 I begins\n # class\n0 a\n12:00:01 I more\n12:00:02 I more\n # class\n1 b\n"
    assert tables(printed) == [" # class\n0 a\n", " # class\n1 b\n"]


def test_no_prediction_is_nothing_to_compare(tmp_path):
    assert predictions(tmp_path) == {}


def test_results_are_made_again_only_in_another_state(tmp_path):
    made: list[int] = []
    folder = tmp_path / "run"

    def make() -> None:
        folder.mkdir()
        made.append(1)

    for state, count in (("a", 1), ("a", 1), ("b", 2)):
        cached(folder, state, make)
        assert len(made) == count


def test_images_of_both_steps_are_copied(tmp_path):
    masks = [mask_of(0, label) for label in [3] * 30 + [17] * 14]
    source, small = make_voc(tmp_path / "big", masks, masks[:8] + masks[-8:]), tmp_path / "small"
    copy_images(source, small)
    folder = small / "PascalVOC12"
    assert len((folder / "splits/train_aug.txt").read_text().splitlines()) == 24
    assert len(list((folder / "SegmentationClassAug").iterdir())) == 24 + 6
    assert {path.stem for path in (folder / "JPEGImages").iterdir()} >= {
        "train_aug0", "train_aug30", "train_aug41", "val0", "val8",
    }  # fmt: skip


def test_a_checkout_accepts_its_own_flags(tmp_path, capsys):
    results, flags = Comparisons(), read_flags(ROOT)
    known = [flag._replace(choices=[*flag.choices, "none"]) if "--amp" in flag.strings else flag
             for flag in flags]  # fmt: skip
    gone = flags[0]._replace(strings=["--vanished"])
    compare_flags(results, ROOT, [*known, gone], tmp_path)
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("DIFFERS")]
    assert len(wrong) == results.differ == 2
    assert "--amp none gives" in wrong[0]
    assert "--help lacks --vanished" in wrong[1]


def test_a_crash_is_no_acceptance(tmp_path):
    (tmp_path / "run.py").write_text("raise KeyError('flag')\n")
    (answer,) = ask(tmp_path, [["--step", "99"]], tmp_path)
    assert "KeyError" in refusal(answer)
