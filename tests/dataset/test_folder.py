"""Own data: dataset.json, lists, tasks, and `python -m dataset.check`, which misses nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import predict
import report
import run
from dataset import splits
from dataset.build import build_datasets
from dataset.catalog import get_spec
from dataset.check import check, main
from dataset.folder import collect_samples
from dataset.layout import read_layout
from engine.checkpoint import check_fits
from engine.plans import parse
from tests.conftest import ROOT
from tests.trees import PHOTOGRAPHS, mask_of, needs_photographs, write_pair
from utils.errors import UserError

CLASSES = ["ground", "road", "car", "tree", "sign"]
MASKS = {"a": (0, 1), "b": (0, 1, 2), "deep/c": (3, 255), "deep/d": (4, 0), "e": (1, 2, 3, 4)}


def describe(root: Path, **changes) -> None:
    """Write dataset.json; a value of ... leaves the key out."""
    content = {"classes": CLASSES, "train": "train.txt", "val": "val.txt"} | changes
    content = {key: value for key, value in content.items() if value is not ...}
    (root / "dataset.json").write_text(json.dumps(content))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    for stem, labels in MASKS.items():
        write_pair(
            tmp_path / f"images/{stem}.jpg", tmp_path / f"masks/{stem}.png", mask_of(*labels)
        )
    (tmp_path / "train.txt").write_text("a\n./b.jpg\n\ndeep/c\ndeep/d.jpg\n")
    (tmp_path / "val.txt").write_text("e.jpg\n")
    describe(tmp_path)
    return tmp_path


def stems(root: Path, split: str) -> list[str]:
    return [Path(s.mask).stem for s in get_spec("folder", root).find_samples(root, split)]


def test_lists_name_images_with_or_without_suffix(own):
    assert stems(own, "train") == ["a", "b", "c", "d"]
    assert stems(own, "val") == ["e"]


def test_what_the_file_says_becomes_the_data_set(own):
    spec = get_spec("folder", own)
    assert (spec.name, spec.class_names, spec.void) == ("folder", tuple(CLASSES), 255)
    assert spec.background_is_class
    describe(own, ignore=77, background=False)
    assert get_spec("folder", own).void == 77
    assert not get_spec("folder", own).background_is_class
    describe(own, ignore=None)
    assert not get_spec("folder", own).known_labels[5:].any()


def test_a_val_share_is_drawn_by_the_seed_alone(own):
    drawn = {}
    for seed in range(6):
        describe(own, train=..., val=..., val_share=0.4, seed=seed)
        drawn[seed] = stems(own, "train"), stems(own, "val")
        assert drawn[seed] == (stems(own, "train"), stems(own, "val"))
        assert sorted(drawn[seed][0] + drawn[seed][1]) == ["a", "b", "c", "d", "e"]
        assert len(drawn[seed][1]) == 2
    # As in earlier versions, else a run that goes on would validate on what it trained on.
    assert [drawn[seed][1] for seed in range(4)] == [list("ce"), list("bc"), list("ac"), list("ae")]
    assert len({str(split) for split in drawn.values()}) > 1


def test_tasks_by_grammar_and_by_list(own):
    describe(own, tasks={"traffic": [["car", 1], ["sign", "tree"]]})
    spec = get_spec("folder", own)
    assert spec.task("2-1").steps == ((0, 1, 2), (3,), (4,))
    assert spec.task("traffic").steps == ((0, 1, 2), (3, 4))
    assert spec.task("offline").num_steps == 1
    with pytest.raises(UserError, match=r"unknown task '15-5' for folder: choose one of traffic;"):
        spec.task("15-5")


def test_the_command_line_takes_it(own):
    opts = parse(["--dataset", "folder", "--data_root", str(own), "--task", "2-1"])[0].opts
    assert (opts.dataset, opts.task) == ("folder", "2-1")
    with pytest.raises(UserError, match="no file .*is this the folder.*check lists every problem"):
        parse(["--dataset", "folder", "--data_root", str(own / "images"), "--task", "2-1"])


def test_a_step_sees_its_images_and_labels(own, tmp_path_factory):
    spec = get_spec("folder", own)
    data = build_datasets(
        spec, own, spec.task("2-1"), 1, overlap=False, crop_size=32, seed=0, crop_val=False,
        workdir=tmp_path_factory.mktemp("work"),
    )  # fmt: skip
    assert data.list_lengths == (4, 1)
    assert data.train.indices.tolist() == [2]  # deep/c: tree and ignored
    assert set(np.unique(data.train[0][1])) <= {0, 3}
    assert np.unique(data.test[0][1]).tolist() == [1, 2, 3, 255]  # the sign is of a later step


def test_the_command_of_the_lists_takes_it(own, tmp_path_factory, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))
    describe(own, tasks={"traffic": [["road", "car"], ["tree", "sign"]]})
    splits.main(["--dataset", "folder", "--data_root", str(own), "--task", "traffic"])
    assert capsys.readouterr().out == "step 0: 2 images\nstep 1: 2 images\n"


BROKEN = [
    ({"classes": "road"}, "'classes' is \"road\": input should be a valid list"),
    ({"classes": ["ground"]}, "'classes' is .*: list should have at least 2 items .*not 1"),
    ({"classes": ["ground", "a", "a", " "]}, "class 3 has the name ' '.*two .* called 'a'"),
    ({"ignore": 4}, "'ignore' is 4: use a label from 5 to 255"),
    ({"ignore": True}, "'ignore' is true: input should be a valid integer"),
    ({"background": 1}, "'background' is 1: input should be a valid boolean"),
    ({"images": "../images"}, "'images' must be a path below"),
    ({"masks": "/masks"}, "'masks' must be a path below"),
    ({"val": ...}, "give either 'train' and 'val'"),
    ({"val_share": 0.1}, "give either 'train' and 'val'"),
    ({"train": ..., "val": ..., "val_share": 1.5},
     "'val_share' is 1.5: input should be less than 1"),
    ({"seed": -1}, "'seed' is -1: input should be greater than or equal to 0"),
    ({"seed": True}, "'seed' is true: input should be a valid integer"),
    ({"classes": ...}, "no key 'classes', which is needed"),
    ({"classes": [1, "a"]}, "'classes.0' is 1: input should be a valid string"),
    ({"classes": [str(i) for i in range(255)]}, "list should have at most 254 items"),
    ({"val_share": float("nan"), "train": ..., "val": ...}, "'val_share' is NaN"),
    ({"train": ..., "val": ...}, "give either 'train' and 'val'"),
    ({"clases": []}, "unknown key 'clases' .did you mean classes.., use background, classes"),
    ({"tasks": []}, r"'tasks' is \[\]: input should be a valid dictionary"),
    ({"tasks": {"a-b": [[1, 2, 3, 4]]}}, "task 'a-b': use letters"),
    ({"tasks": {"agg": [[1, 2, 3, 4]]}}, "task 'agg': .* not 'agg', 'offline', 'ov'"),
    ({"tasks": {"ov": [[1, 2, 3, 4]]}}, "task 'ov': use letters"),
    ({"tasks": {"t": [1]}}, "'tasks.t.0' is 1: input should be a valid list"),
    ({"tasks": {"t": [[True, 2, 3, 4]]}}, "task 't': True is neither a class name nor a label"),
    ({"tasks": {"t": [["road", 1, 9, "bus"], []]}},
     "'t': step 1 is empty.*'road' occurs twice.*9 is nei.*'bus' is nei.*no step learns car"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BROKEN)
def test_every_mistake_in_the_file_is_named(own, changes, message):
    describe(own, **changes)
    layout, problems = read_layout(own)
    assert layout is None
    assert re.search(message, " ".join(problems)), problems
    assert all(problem.startswith(str(own / "dataset.json")) for problem in problems)
    with pytest.raises(UserError):
        get_spec("folder", own)


def test_all_mistakes_are_named_at_once_and_an_unknown_key_first(own):
    describe(own, clases=[], ignore=4, masks="", seed=0.5, val=..., tasks={"t": [[1]], "-": [[7]]})
    problems = [problem.split("dataset.json: ")[1] for problem in read_layout(own)[1]]
    expected = [
        "unknown key", "'ignore' is 4", "'masks' must", "give either", "'seed' is 0.5",
        "task 't': no step", "task '-': use", "task '-': 7 is", "task '-': no step",
    ]  # fmt: skip
    assert len(problems) == len(expected), problems
    assert all(map(str.startswith, problems, expected)), problems
    describe(own, classes=[], ignore=4, tasks={"-": [[1]]})  # labels mean nothing without classes
    assert len(read_layout(own)[1]) == 2


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_file_may_be_in_any_unicode_encoding(own, encoding):
    text = (own / "dataset.json").read_text()
    (own / "dataset.json").write_bytes(text.replace("road", "Straße").encode(encoding))
    assert get_spec("folder", own).class_names[1] == "Straße"


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 10000])
def test_what_is_no_json_object_is_one_line(own, content):
    (own / "dataset.json").write_text(content)
    with pytest.raises(UserError, match="dataset.json"):
        get_spec("folder", own)


def test_links_may_lead_to_the_folders_and_out_of_them(own, tmp_path_factory):
    other = tmp_path_factory.mktemp("disk")
    (own / "images").rename(other / "pictures")
    (own / "images").symlink_to(other / "pictures")
    assert stems(own, "train") == ["a", "b", "c", "d"]
    (own / "masks/a.png").rename(other / "a.png")
    (own / "masks/a.png").symlink_to(other / "a.png")
    (other / "pictures/deep").rename(other / "deep")
    (other / "pictures/deep").symlink_to(other / "deep")
    assert stems(own, "train") == ["a", "b", "c", "d"]
    assert check(own)[1] == []
    for line in ("../masks/a", "deep/../a", str(own / "images/a.jpg")):
        (own / "train.txt").write_text(line)
        with pytest.raises(UserError, match="line 1: no image"):
            stems(own, "train")


def test_check_counts_images_pixels_and_steps(own):
    describe(own, tasks={"traffic": [["road", "car"], ["tree", "sign"]]})
    lines, problems = check(own, ["2-1"])
    assert problems == []
    text = "\n".join(lines)
    assert "4 classes, 4 train and 1 val images" in text
    assert [line.split() for line in lines if " road " in line][0] == [
        "1", "road", "2", "20.83", "%", "1", "25.00", "%"
    ]  # fmt: skip
    assert [line.split() for line in lines if "(ignored)" in line][0][2:5] == ["1", "12.50", "%"]
    steps = [line.split()[:5] for line in lines if line.startswith("  step")]
    assert steps == [
        ["step", "0:", "2", "/", "2"], ["step", "1:", "2", "/", "2"],
        ["step", "0:", "2", "/", "2"], ["step", "1:", "1", "/", "1"], ["step", "2:", "1", "/", "1"],
    ]  # fmt: skip


def test_check_tells_overlapped_from_disjoint(own):
    (own / "train.txt").write_text("a\nb\ndeep/c\ne\n")
    (own / "val.txt").write_text("deep/d\n")
    lines, problems = check(own, ["2-2"])
    assert problems == []
    steps = [line.split()[2:5] for line in lines if line.startswith("  step")]
    assert steps == [["3", "/", "2"], ["2", "/", "2"]]  # e holds classes of both steps


def test_check_finds_every_problem_and_not_only_the_first(own):
    def turn(path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.open(path).save(path, exif=exif)

    write_pair(own / "images/f.jpg", own / "masks/f.png", mask_of(1, 9, 77))
    write_pair(own / "images/g.png", own / "masks/g.png", mask_of(2))
    Image.fromarray(mask_of(2, width=7)).save(own / "masks/g.png")
    (own / "images/a.jpg").write_bytes(b"no image")
    (own / "masks/b.png").write_bytes((own / "masks/b.png").read_bytes()[:60])
    Image.new("RGB", (12, 10)).save(own / "masks/deep/c.png")
    (own / "masks/deep/d.png").unlink()
    Image.new("L", (5, 5)).save(own / "masks/lonely.png")
    Image.new("RGB", (5, 5)).save(own / "images/other.tif")
    turn(own / "images/e.jpg")
    (own / "train.txt").write_text("a\nb\ndeep/c\ndeep/d\nf\ng\na\nmissing\n../x\n")
    (own / "val.txt").write_text("e\nf\n")
    problems = check(own)[1]
    expected = [
        "train.txt, line 7: 'a' stands in line 1 too",
        "train.txt, line 8: no image 'missing'",
        "train.txt, line 9: no image '../x' below images: .* without '..'",
        "deep/d.jpg has no mask",
        "mask .*lonely.png has no image",
        "other.tif is not read: save it as JPEG or PNG",
        "f.jpg stands in the lists 2 times",
        "a.jpg cannot be read as JPEG or PNG",
        "b.png cannot be read as PNG",
        "c.png has mode RGB",
        "f.png holds foreign labels 9, 77: correct the mask, or name them in dataset.json",
        "g.png is 12x10 but .*g.png is 7x10 pixels",
        "e.jpg is turned by an EXIF tag",
        r"class 3 \(tree\) is in no mask of the train list",
        r"class 4 \(sign\) is in no mask",
    ]
    for line in expected:
        assert any(re.search(line, problem) for problem in problems), (line, problems)
    assert len(problems) == len(expected)


def test_check_as_a_command(own, capsys):
    assert main([str(own)]) == 0
    assert capsys.readouterr().out.endswith("\nno problems\n")
    (own / "masks/a.png").unlink()
    command = [sys.executable, "-m", "dataset.check", str(own)]
    bad = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode == 1
    assert "a.jpg has no mask" in bad.stdout
    assert bad.stdout.endswith("1 problem\n")


def test_check_of_a_folder_without_anything(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "problem: " in capsys.readouterr().out
    describe(tmp_path)
    assert main([str(tmp_path)]) == 1
    assert f"no folder {tmp_path / 'images'}" in capsys.readouterr().out


def test_two_images_of_one_stem_are_refused(own):
    Image.new("RGB", (12, 10)).save(own / "images/a.png")
    layout, _ = read_layout(own)
    assert layout is not None
    _, problems = collect_samples(layout, own, "train")
    assert len(problems) == 1
    assert "a.jpg and a.png would share a mask" in problems[0]


def test_the_example_of_the_docs_is_sound(tmp_path):
    text = (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")
    (tmp_path / "dataset.json").write_text(text.split("```json\n")[1].split("```")[0])
    layout, problems = read_layout(tmp_path)
    assert problems == []
    assert layout is not None
    (command,) = re.findall(r"python run\.py (--dataset (?:.*\\\n)*.*)", text)
    argv = command.replace("\\\n", " ").replace("garden", str(tmp_path)).split()
    assert [plan.opts.step for plan in parse(argv)] == [0, 1, 2]


def test_from_a_folder_to_a_table_and_masks(own, tmp_path_factory, monkeypatch, capsys):
    """The worked example of docs/own_data.md at toy size: three steps, table, prediction."""
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))
    (own / "train.txt").write_text("a\nb\ndeep/c\ndeep/d\ne\n")
    flags = "--task 2-1 --overlap --method MIB --name MIB --step all --lr 0.01,0.001 --epochs 1"
    small = "--backbone resnet18 --no-pretrained --crop_size 32 --batch_size 2 --num_workers 0"
    data = ["--dataset", "folder", "--data_root", str(own)]
    assert run.main([*data, *flags.split(), *small.split(), "--no-visualize"]) == 0
    assert report.main([]) == 0
    assert "folder 2-1, overlapped" in capsys.readouterr().out
    ckpt = "checkpoints/step/folder-2-1-ov/MIB_2.pth"
    (own / "dataset.json").unlink()  # the checkpoint knows the names
    assert predict.main(["--ckpt", ckpt, str(own / "images"), "--out", "out", "--scores"]) == 0
    assert Image.open("out/masks/deep/c.png").size == (12, 10)
    assert np.load("out/scores/e.npz")["class_names"].tolist() == CLASSES


@needs_photographs
def test_photographs_as_own_data(tmp_path):
    source = PHOTOGRAPHS / "PascalVOC12"
    (tmp_path / "images").symlink_to(source / "JPEGImages")
    (tmp_path / "masks").symlink_to(source / "SegmentationClassAug")
    names = [line.split(None, 1)[1] for line in (PHOTOGRAPHS / "classes.txt").open()]
    describe(tmp_path, classes=[name.strip() for name in names], train=..., val=..., val_share=0.2)
    lines, problems = check(tmp_path, ["15-5"])
    assert problems == []
    assert "20 classes, 803 train and 201 val images" in lines[0]


def test_a_checkpoint_of_a_task_whose_steps_were_changed_is_of_another(own):
    describe(own, tasks={"two": [["road", "car"], ["tree", "sign"]]})
    flags = ["--dataset", "folder", "--data_root", str(own), "--task", "two", "--name", "r"]
    (plan,) = parse(flags)
    steps, spec = get_spec("folder", own).task("two").steps, get_spec("folder", own)
    content = {
        "options": plan.opts.record(), "steps": [list(steps[0])], "class_names": spec.class_names
    }  # fmt: skip
    check_fits(content, Path("r_0.pth"), plan.opts, steps[:1], spec.class_names)
    describe(own, tasks={"two": [["road", "tree"], ["car", "sign"]]})
    changed = get_spec("folder", own).task("two").steps
    with pytest.raises(UserError, match="is of task two with other steps, but task two"):
        check_fits(content, Path("r_0.pth"), plan.opts, changed[:1], spec.class_names)
