"""report.py: the paper's columns out of per-class files, seeds, the paper beside them, the plot."""

from __future__ import annotations

import csv
import errno
import io
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.catalog import DATASETS
from engine.comparison import collect, find_files, scores_of
from metrics.paper import LISTS, paper_scores, plop_scores
from metrics.stream_metrics import Scores
from report import curves_of, draw, main
from tasks import get_task
from utils.results import ResultKey, write_results

X = float("nan")  # a class without ground truth


def put(
    logdir: Path, setting: str, name: str, step: int, iou: list[float], *,
    classes: int | list[str] = 21, method: str = "MIB", seed: int = 42,
    lists: tuple[int, int] | None = (300, 60), kinds: dict[str, str] | None = None,
) -> None:  # fmt: skip
    values = np.array(iou)
    scores = Scores(values, values, values, X, X, X, float(np.nanmean(values)), X, X, X, X)
    names = [f"class {i}" for i in range(classes)] if isinstance(classes, int) else classes
    write_results(logdir, setting, ResultKey(name, method, step, seed), iou, scores.means(), names,
                  lists, kinds)  # fmt: skip


def put_15_5(logdir: Path, name: str = "MIB", shift: float = 0.0, **more) -> None:
    """Step 0: 0.8; then old 0.6, new 0.3, but class 20 without ground truth."""
    put(logdir, "voc-15-5", name, 0, [0.9] + [0.8 + shift] * 15, **more)
    put(logdir, "voc-15-5", name, 1, [0.9] + [0.6 + shift] * 15 + [0.3 + shift] * 4 + [X], **more)


def report(capsys, *arguments: object) -> str:
    assert main(list(map(str, arguments))) == 0
    return capsys.readouterr().out


def rows(text: str) -> list[list[str]]:
    """Cells of a Markdown table, its rule left out."""
    lines = [line[1:-1].split("|") for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in lines]
    return [line for line in cells if not line[0].startswith("---")]


def test_old_new_all_forgetting_and_average(tmp_path):
    put_15_5(tmp_path)
    ((setting, (row,)),) = collect(find_files([tmp_path / "results"])).items()
    assert (setting.dataset, setting.task, setting.overlap) == ("voc", "15-5", False)
    everything = (15 * 60 + 4 * 30) / 19  # class 20 has no ground truth, background no part
    expected = {
        "old": 60, "new": 30, "all": everything, "with background": (19 * everything + 90) / 20,
        "forgetting": 20, "average": (80 + everything) / 2,
    }  # fmt: skip
    assert scores_of(setting, row.runs[0]) == pytest.approx(expected)


def test_old_is_step_0_also_after_several_steps(tmp_path, capsys):
    for step in range(3):
        seen = [0.5] + [0.9 - 0.1 * step] * 15 + [0.4, 0.2, 0.1][:step]
        put(tmp_path, "voc-15-5s-ov", "a", step, seen)
    header, row = rows(report(capsys, tmp_path / "results", "--format", "markdown"))
    assert header[3:7] == ["step", "old", "new", "all"]
    assert row[3:7] == ["2/5", "70.0", "30.0", f"{100 * (15 * 0.7 + 0.6) / 17:.1f}"]


def test_ade_has_a_column_per_step(tmp_path, capsys):
    task = get_task("ade", "100-10")
    for step in range(6):
        iou = [X] + [0.5 - 0.05 * t for t in range(step + 1) for label in task.new(t) if label]
        put(tmp_path, "ade-100-10", "a", step, iou, classes=151, lists=(20210, 2000))
    text = report(capsys, tmp_path / "results", "--format", "markdown")
    assert "### ade 100-10, protocol mib: mean IoU in %" in text
    header, ours, paper, gap = rows(text)
    assert header[4:11] == ["1-100", "101-110", "111-120", "121-130", "131-140", "141-150", "all"]
    assert ours[4:11] == ["50.0", "45.0", "40.0", "35.0", "30.0", "25.0", "45.0"]
    assert paper[4:11] == ["31.8", "10.4", "14.8", "12.8", "13.6", "18.7", "25.9"]
    assert gap[4:11] == ["+18.2", "+34.6", "+25.2", "+22.2", "+16.4", "+6.3", "+19.1"]
    names = [DATASETS["ade"].class_names[label] for label in get_task("ade", "50b").seen(2)]
    put(tmp_path, "ade-50b", "a", 0, [X] + [0.5] * 50, classes=names)
    assert "step 1 " in report(capsys, tmp_path / "results/ade-50b.csv")


def test_the_paper_stands_beside_its_own_data_and_no_other(tmp_path, capsys):
    put_15_5(tmp_path, "real", lists=(10582, 1449))
    put_15_5(tmp_path, "toy")
    put_15_5(tmp_path, "old file", lists=None)
    put(tmp_path, "voc-15-5", "unfinished", 0, [0.5] * 16, lists=LISTS["voc"])
    put_15_5(tmp_path, "own", method="none", lists=LISTS["voc"])
    _, *table = rows(report(capsys, tmp_path / "results", "--format", "markdown"))
    names = [row[0] for row in table]
    assert names == ["old file", "real", "paper", "difference", "toy", "unfinished", "own"]
    assert table[2][4:7] == ["71.8", "43.3", "64.7"]
    assert table[3][4:7] == ["-11.8", "-13.3", "-11.0"]
    assert table[2][7:] == ["", "", ""]


PLOP = {"protocol": "plop", "split": "overlapped"}


def test_columns_of_the_later_protocol_count_the_background(tmp_path, capsys):
    put(tmp_path, "voc-15-5-ov", "a", 0, [0.9] + [0.8] * 15, kinds=PLOP)
    put(tmp_path, "voc-15-5-ov", "a", 1, [0.7] + [0.6] * 15 + [0.3] * 5, kinds=PLOP)
    text = report(capsys, tmp_path / "results", "--format", "markdown")
    assert "### voc 15-5, overlapped, protocol plop: mean IoU in %" in text
    header, row = rows(text)
    assert header[4:] == ["0-15", "16-20", "all", "forgetting", "average"]
    old, everything = (15 * 60 + 70) / 16, (15 * 60 + 5 * 30 + 70) / 21
    before = (15 * 80 + 90) / 16
    expected = [old, 30, everything, before - old, (before + everything) / 2]
    assert row[4:] == [f"{value:.1f}" for value in expected]
    assert "paper" not in text
    ((setting, found),) = collect(find_files([tmp_path / "results"])).items()
    (run,) = curves_of(setting, found)
    np.testing.assert_allclose(run.points["old classes"], [(0, before, X), (1, old, X)])
    np.testing.assert_allclose(run.points["all classes"], [(0, before, X), (1, everything, X)])


def test_protocols_and_splits_never_share_a_table(tmp_path, capsys):
    """Rows of one file; step 0 of one protocol is no base for the other; old rows are MiB's."""
    for name, kinds in (
        ("before", None), ("a", {"protocol": "mib", "split": "overlapped"}), ("a", PLOP),
        ("b", {"protocol": "plop", "split": "disjoint"}),
    ):  # fmt: skip
        step = 1 if kinds == PLOP else 0
        seen = [0.9] + [0.8] * 15 + [0.3] * 5 * step
        put(tmp_path, "voc-15-5-ov", name, step, seen, kinds=kinds)
    text = report(capsys, tmp_path / "results", "--format", "markdown")
    titles = [line for line in text.splitlines() if line.startswith("###")]
    found = ("overlapped, protocol mib", "overlapped, protocol plop", "disjoint, protocol plop")
    assert titles == [f"### voc 15-5, {kind}: mean IoU in %" for kind in found]
    first, second, third = text.split("###")[1:]
    assert [row[0] for row in rows(first)] == ["run", "a", "before"]
    assert [row[0] for row in rows(second)] == ["run", "a"]
    assert rows(second)[1][-2:] == ["-", "-"]
    assert [row[0] for row in rows(third)] == ["run", "b"]
    tidy = csv.DictReader(io.StringIO(report(capsys, tmp_path / "results", "--format", "csv")))
    assert {(row["run"], row["protocol"], row["split"]) for row in tidy} == {
        ("before", "mib", "overlapped"), ("a", "mib", "overlapped"), ("a", "plop", "overlapped"),
        ("b", "plop", "disjoint"),
    }  # fmt: skip
    draw(collect(find_files([tmp_path / "results"])), tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count("protocol plop") == 2
    put(tmp_path, "voc-15-5-ov", "c", 0, [0.5] * 16, kinds={"protocol": "x", "split": "disjoint"})
    assert main([str(tmp_path / "results")]) == 1
    assert "voc-15-5-ov.csv has a row of x, disjoint: mend it" in capsys.readouterr().err


def test_numbers_of_the_later_papers_stand_beside_their_protocol_alone(tmp_path, capsys):
    for name, setting, kinds in (
        ("plop", "voc-15-5s-ov", PLOP),
        ("mib", "voc-15-5s-ov", {"protocol": "mib", "split": "overlapped"}),
        ("disjoint", "voc-15-5s", PLOP | {"split": "disjoint"}),
    ):
        for step in range(6):
            iou = [0.9] + [0.7] * 15 + [0.2] * step
            put(tmp_path, setting, name, step, iou, method="PLOP", lists=LISTS["voc"], kinds=kinds)
    text = report(capsys, tmp_path / "results", "--format", "markdown")
    table = next(part for part in text.split("###") if "protocol plop" in part and "paper" in part)
    assert text.count("difference") == 1
    header, ours, paper, _ = rows(table)
    assert header[4:7] == ["0-15", "16-20", "all"]
    assert ours[4:7] == ["71.2", "20.0", "59.0"]
    assert paper[4:] == ["65.1", "21.1", "54.6", "", "67.2"]
    assert "paper: Douillard et al., PLOP, CVPR 2021" in table


def test_ade_has_a_paper_for_each_kind_of_list(tmp_path, capsys):
    """MiB's table for its partition in its protocol, PLOP's for the true overlapped lists."""
    for protocol, split in product(("mib", "plop"), ("partition", "overlapped")):
        for step in range(2):
            iou = [0.1] + [0.4] * 100 + [0.2] * 50 * step
            put(tmp_path, "ade-100-50-ov", f"{protocol} {split}", step, iou, classes=151,
                lists=LISTS["ade"], kinds={"protocol": protocol, "split": split})  # fmt: skip
    text = report(capsys, tmp_path / "results", "--format", "markdown")
    shown = [part.splitlines()[0].strip() for part in text.split("###")[1:] if "paper" in part]
    assert shown == [
        "ade 100-50, protocol mib: mean IoU in %",
        "ade 100-50, overlapped, protocol plop: mean IoU in %",
    ]
    later = next(part for part in text.split("###") if shown[1] in part)
    assert rows(later)[0][4:7] == ["0-100", "101-150", "all"]
    assert rows(later)[2][4:] == ["40.5", "17.2", "32.8", "", "37.3"]


def test_the_numbers_of_the_later_papers():
    assert plop_scores("voc", "15-5", "PLOP") == {
        "old": 75.73, "new": 51.71, "all": 70.09, "average": 75.19
    }  # fmt: skip
    assert plop_scores("voc", "10-1", "PLOP") == {"all": 30.45}
    assert plop_scores("voc", "15-5s", "PLOP+EWF") == {"all": 67.0}
    assert plop_scores("ade", "50", "MIB") == {
        "old": 45.57, "new": 21.01, "all": 29.31, "average": 38.98
    }  # fmt: skip
    assert plop_scores("voc", "15-5s", "MIB+EWF") == plop_scores("folder", "8-4", "PLOP") == {}


def test_seeds_become_mean_and_deviation(tmp_path, capsys):
    for seed, shift in ((1, 0.0), (2, 0.02), (3, 0.04)):
        put_15_5(tmp_path, seed=seed, shift=shift)
    text = report(capsys, tmp_path / "results")
    line = next(line for line in text.splitlines() if line.startswith("MIB"))
    assert "1 2 3" in line
    assert "62.0 ± 2.0" in line  # divided by n - 1
    assert "32.0 ± 2.0" in line
    assert "20.0 ± 0.0" in line
    text = report(capsys, tmp_path / "results", "--format", "csv")
    tidy = list(csv.DictReader(io.StringIO(text)))
    old = next(row for row in tidy if row["score"] == "old")
    assert (float(old["mean"]), float(old["std"])) == pytest.approx((62, 2))
    assert (old["seeds"], old["paper"], old["difference"]) == ("3", "", "")


def test_names_that_run_py_gives_to_seeds_are_one_row(tmp_path, capsys):
    for seed, name in ((42, "MIB"), (7, "MIB-seed7"), (8, "MIB-seed9")):
        put_15_5(tmp_path, name, seed=seed)
    text = report(capsys, tmp_path / "results", "--format", "markdown")
    assert [row[:3] for row in rows(text)[1:]] == [
        ["MIB", "MIB", "42 7"],
        ["MIB-seed9", "MIB", "8"],
    ]
    put_15_5(tmp_path, "MIB", seed=7)  # no longer seeds of one run, and each has its own name
    text = report(capsys, tmp_path / "results", "--format", "markdown")
    assert [row[0] for row in rows(text)[1:]] == ["MIB", "MIB", "MIB-seed7", "MIB-seed9"]


def test_one_seed_in_two_folders_is_two_rows(tmp_path, capsys):
    put_15_5(tmp_path / "a")
    put_15_5(tmp_path / "b", shift=0.1)
    text = report(capsys, tmp_path / "a/results", tmp_path / "b/results", "--format", "markdown")
    _, first, second = rows(text)
    assert (first[0], first[4]) == (f"MIB ({tmp_path / 'a/results'})", "60.0")
    assert (second[0], second[4]) == (f"MIB ({tmp_path / 'b/results'})", "70.0")


def test_rows_of_one_label_are_told_apart_by_folder(tmp_path, capsys):
    """Of another last step, or another method."""
    put_15_5(tmp_path / "a", "FT", method="FT")
    put(tmp_path / "b", "voc-15-5", "FT", 0, [0.9] + [0.8] * 15, method="FT")
    put(tmp_path / "c", "voc-15-5", "FT", 0, [0.9] + [0.7] * 15, method="none", seed=7)
    put_15_5(tmp_path / "c", "MIB")
    folders = [tmp_path / name / "results" for name in "abc"]
    _, *table = rows(report(capsys, *folders, "--format", "markdown"))
    labels = [f"FT ({folder})" for folder in folders]
    assert sorted(row[0] for row in table) == [*labels, "MIB"]
    ((setting, found),) = collect(find_files(folders)).items()
    assert sorted(run.label for run in curves_of(setting, found)) == [*labels, "MIB"]


def test_a_shared_step_0_is_found_and_named(tmp_path, capsys):
    put(tmp_path, "voc-15-5", "base", 0, [0.9] + [0.8] * 15, method="none")
    put(tmp_path, "voc-15-5", "FT", 1, [0.9] + [0.1] * 15 + [0.3] * 5, method="FT")
    text = report(capsys, tmp_path / "results", "--format", "markdown")
    row = next(row for row in rows(text) if row[0] == "FT*")
    assert row[-2] == "70.0"
    assert "* without a step 0 of its own, compared with that of base" in text
    put_15_5(tmp_path, "LWF-MC", method="LWF-MC", shift=0.1)  # its step 0 is nobody else's
    text = report(capsys, tmp_path / "results", "--format", "markdown")
    assert next(row for row in rows(text) if row[0] == "FT*")[-2] == "70.0"
    put(tmp_path, "voc-15-5", "FT", 1, [0.9] + [0.1] * 15 + [0.3] * 5, method="FT", seed=7)
    text = report(capsys, tmp_path / "results", "--format", "csv")
    # A step 0 of another seed is no base.
    assert "voc-15-5,FT,FT,2,1,forgetting,,,,,mib,disjoint\n" in text
    put(tmp_path, "voc-15-5", "other", 0, [0.9] + [0.7] * 15, method="none")  # now it is a guess
    text = report(capsys, tmp_path / "results", "--format", "markdown")
    assert next(row for row in rows(text) if row[0] == "FT")[-2:] == ["-", "-"]


def test_own_tasks_are_cut_as_their_rows_show(tmp_path, capsys):
    classes = ["ground", "road", "car", "tree", "sign", "post"]
    put(tmp_path, "folder-traffic", "a", 0, [0.5, 0.8, 0.6], classes=classes)
    put(tmp_path, "folder-traffic", "a", 1, [0.5, 0.4, 0.2, 0.1, 0.2], classes=classes)
    _, row = rows(report(capsys, tmp_path / "results", "--format", "markdown"))
    assert row[3:7] == ["1/2", "30.0", "15.0", "22.5"]
    put(tmp_path, "folder-3-2", "a", 1, [0.5, 0.4, 0.4, 0.4, 0.1, 0.1], classes=classes)
    _, row = rows(report(capsys, tmp_path / "results/folder-3-2.csv", "--format", "markdown"))
    assert row[3:6] == ["1/1", "40.0", "10.0"]


def shuffle_columns(path: Path, order: list[int]) -> None:
    """Puts the class columns of a result file in another order."""
    table = [row.split(",") for row in path.read_text().splitlines()]
    first = next(at for at, name in enumerate(table[0]) if name.startswith("0:"))
    table = [row[:first] + [row[first + at] for at in order] for row in table]
    path.write_text("".join(",".join(row) + "\n" for row in table))


def test_class_columns_are_taken_by_their_number(tmp_path, capsys):
    """Not by their place: a class was renamed between two runs, columns were moved by hand."""
    first = ["ground", "gras", "path", "tree", "pond"]
    for name, classes in (("before", first), ("after", ["ground", "grass", *first[2:]])):
        for step in range(2):
            iou = [0.5, 0.8, 0.6, 0.2, 0.1][: 3 + 2 * step]
            put(tmp_path, "folder-2-1", name, step, iou, classes=classes)
            put(tmp_path, "folder-traffic", name, step, iou, classes=classes)
    shuffle_columns(tmp_path / "results/folder-traffic.csv", [4, 2, 5, 0, 3, 1])
    for task, step in (("2-1", "1/2"), ("traffic", "1/1")):
        path = tmp_path / f"results/folder-{task}.csv"
        _, *table = rows(report(capsys, path, "--format", "markdown"))
        assert [row[0] for row in table] == ["after", "before"]
        assert [row[3:7] for row in table] == [[step, "70.0", "15.0", "42.5"]] * 2


def test_an_empty_field_is_a_class_without_ground_truth(tmp_path, capsys):
    """And moves none of the others."""
    path = tmp_path / "voc-15-5.csv"
    header = ",".join(f"{channel}:c" for channel in range(21))
    values = ["0.5", "", "nan", *["0.8"] * 13, *["0.2"] * 5]
    path.write_text(f"name,method,step,seed,{header}\na,FT,1,42,{','.join(values)}\n")
    _, row = rows(report(capsys, path, "--format", "markdown"))
    assert row[4:7] == ["80.0", "20.0", f"{100 * (13 * 0.8 + 5 * 0.2) / 18:.1f}"]


@pytest.mark.parametrize(
    ("columns", "values", "message"),
    [
        ("0:a,1:b,1:c", "0.5,0.4,0.3", "has 0.4 and 0.3 for channel 1 in the row a, FT, step 0, "),
        ("0:a,1:b,3:d", "0.5,0.4,0.3", "has no class column 2:"),
        ("0:a,99999999999:b", "0.5,0.4", "has no class column 1:"),
    ],
)
def test_class_columns_that_contradict_each_other_are_refused(
    tmp_path, capsys, columns, values, message
):
    path = tmp_path / "voc-15-5-ov.csv"
    path.write_text(f"name,method,step,seed,{columns}\na,FT,0,42,{values}\n")
    assert main([str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path} {message}")
    assert error.count("\n") == 1


def test_the_numbers_are_the_paper_s(shared):
    theirs = json.loads((shared / "paper_results.json").read_text())
    seen = 0
    for dataset in ("voc", "ade"):
        columns = theirs[dataset].pop("columns")
        for method, settings in theirs[dataset].items():
            for setting, values in settings.items():
                task = setting.removesuffix("-ov")
                titles = columns if dataset == "voc" else columns[task]
                found = paper_scores(dataset, task, setting != task, method)
                assert found == dict(zip(titles, values, strict=True))
                seen += 1
    assert seen == 9 * 6 + 6 * 3


def test_which_of_the_paper_s_numbers_belong_to_a_run():
    assert paper_scores("voc", "15-5s", True, "MIB") == {"old": 35.1, "new": 13.5, "all": 29.7}
    assert paper_scores("ade", "50", True, "MIB")["all"] == 27.0
    assert paper_scores("voc", "offline", False, "FT") == {"all": 77.4}
    assert paper_scores("ade", "offline", False, "FT") == {"all": 38.9}
    assert paper_scores("folder", "8-4", False, "FT") == {}
    assert paper_scores("voc", "10-1", False, "MIB") == {}


def test_the_plot_has_a_line_per_run(tmp_path, capsys):
    put_15_5(tmp_path, "FT", shift=-0.3, method="FT")
    put_15_5(tmp_path, "MIB")
    for seed in (1, 2):
        put_15_5(tmp_path, "LWF", method="LWF", seed=seed, shift=-0.1 * seed)
    assert main([str(tmp_path / "results"), "--plot", str(tmp_path / "plots/a.png")]) == 0
    captured = capsys.readouterr()
    assert captured.err == f"plot: {tmp_path / 'plots/a.png'}\n"
    assert "plot:" not in captured.out  # which may go into a file
    image = Image.open(tmp_path / "plots/a.png").convert("RGB")
    assert image.width > 600
    colors = {color for count, color in image.getcolors(2**24) if count > 150}  # type: ignore[union-attr]
    assert {(0, 114, 178), (213, 94, 0), (0, 0, 0)} <= colors
    report(capsys, tmp_path / "results/voc-15-5.csv", "--plot", tmp_path / "plots/a.pdf")
    assert (tmp_path / "plots/a.pdf").read_bytes().startswith(b"%PDF")
    assert main([str(tmp_path / "results"), "--plot", str(tmp_path / "a.jpg")]) == 1
    assert "a.jpg: its name must end in .png, .pdf, .svg" in capsys.readouterr().err


def test_curves_are_old_new_and_all_with_a_spread_over_seeds(tmp_path):
    for seed, shift in ((1, 0.0), (2, 0.02), (3, 0.04)):
        put_15_5(tmp_path, seed=seed, shift=shift)
    ((setting, found),) = collect(find_files([tmp_path / "results"])).items()
    (run,) = curves_of(setting, found)
    assert (run.label, run.method) == ("MIB", "MIB")
    expected = {
        "old classes": [(0, 82, 2), (1, 62, 2)],
        "new classes": [(0, X, X), (1, 32, 2)],  # class 20 has no ground truth
        "all classes": [(0, 82, 2), (1, (15 * 62 + 4 * 32) / 19, 2)],
    }
    assert list(run.points) == list(expected)
    for title, points in expected.items():
        np.testing.assert_allclose(run.points[title], points)


def test_curves_of_a_task_that_nobody_can_divide_show_all(tmp_path):
    put(tmp_path, "folder-traffic", "a", 1, [0.5, 0.4, 0.2], classes=["ground", "road", "car"])
    ((setting, found),) = collect(find_files([tmp_path / "results"])).items()
    assert setting.sizes == ()
    (run,) = curves_of(setting, found)
    points = [run.points[f"{name} classes"] for name in ("old", "new", "all")]
    np.testing.assert_allclose(points, [[(1, X, X)], [(1, X, X)], [(1, 30, X)]])


def test_curves_of_one_name_are_told_apart(tmp_path):
    put_15_5(tmp_path, "a", method="FT")
    put_15_5(tmp_path, "a", method="MIB", seed=7)
    put_15_5(tmp_path, "b")
    ((setting, found),) = collect(find_files([tmp_path / "results"])).items()
    labels = [run.label for run in curves_of(setting, found)]
    assert labels == ["a (FT, 42)", "a (MIB, 7)", "b"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gone", "no result file or folder"),
        ("x" * 300, "the system refuses, " + "x" * 300 + ": File name too long"),
        (".", "no per-class result file in the folder .:"),
        ("results/voc-15-5-agg.csv", "no per-class result file in results/voc-15-5-agg.csv"),
        ("voc-15-5-ov.csv", "no per-class result file in the folder voc-15-5-ov.csv:"),
        ("notes.csv", "notes.csv is not called <dataset>-<task>.csv"),
        ("a-b.csv", "is not a result file"),
    ],
)
def test_what_is_no_result_is_one_line(tmp_path, capsys, monkeypatch, path, message):
    put_15_5(tmp_path)
    monkeypatch.chdir(tmp_path)
    if path == "voc-15-5-ov.csv":
        Path(path).mkdir()
    elif path in ("notes.csv", "a-b.csv"):
        Path(path).write_text("a,b\n1,2\n")
    assert main([path]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_what_a_terminal_would_obey_is_shown_as_escapes(tmp_path, capsys):
    path = tmp_path / "voc-15-5-ov.csv"
    path.write_text("name,method,step,seed,0:background\n\x1b[2Jr,\tF,0,42,0.5\n")
    for kind in ("text", "markdown", "csv"):
        assert main([str(path), "--format", kind]) == 0
        printed = capsys.readouterr().out
        assert r"\x1b[2Jr" in printed
        assert r"\tF" in printed
        assert all(line.isprintable() for line in printed.splitlines())


def test_what_the_system_refuses_is_one_line(tmp_path, capsys, monkeypatch):
    def refuse(files):
        raise PermissionError(errno.EACCES, "Permission denied", "a\nb.csv")

    put_15_5(tmp_path)
    monkeypatch.setattr("report.collect", refuse)
    assert main([str(tmp_path / "results")]) == 1
    assert capsys.readouterr().err == "error: the system refuses, a b.csv: Permission denied\n"
