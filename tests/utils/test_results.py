"""Result files: rectangular, exact, replaced instead of doubled, safe beside other runs."""

import csv
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from metrics.stream_metrics import Scores, StreamSegMetrics
from utils.errors import UserError
from utils.results import ResultKey, read_results, result_files, write_results

ROOT = Path(__file__).parents[2]
NAMES = ["background", "person", "dining table, set", "sofa"]


def scores_of(classes: int, seed: int = 0, old: int | None = None) -> Scores:
    metrics = StreamSegMetrics(classes)
    generator = torch.Generator().manual_seed(seed)
    metrics.confusion.copy_(torch.randint(1, 1000, (classes, classes), generator=generator))
    metrics.confusion[-1] = 0  # no ground truth for the last class
    return metrics.scores(old)


def write(logdir: Path, setting: str, key: ResultKey, scores: Scores, names: list[str]) -> None:
    write_results(logdir, setting, key, scores.iou.tolist(), scores.means(), names)


def table(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_rows_of_all_steps_read_back_exactly(tmp_path):
    first, second = scores_of(2), scores_of(4, seed=1, old=2)
    write(tmp_path, "voc-15-5-ov", ResultKey("a", "MIB", 0, 42), first, NAMES)
    write(tmp_path, "voc-15-5-ov", ResultKey("a", "MIB", 1, 42), second, NAMES)
    per_class, means = result_files(tmp_path, "voc-15-5-ov")
    assert per_class == tmp_path / "results" / "voc-15-5-ov.csv"
    assert means == tmp_path / "results" / "voc-15-5-ov-agg.csv"
    for path in (per_class, means):
        header, *rows = table(path)
        assert [len(row) for row in rows] == [len(header)] * 2  # a header once, rectangular

    zero, one = read_results(per_class)
    columns = [f"{i}:{name}" for i, name in enumerate(NAMES)]
    assert list(zero) == ["name", "method", "step", "seed", "mean_iou", *columns]
    assert (zero["name"], zero["method"], zero["step"], zero["seed"]) == ("a", "MIB", 0, 42)
    assert zero["0:background"] == first.iou[0]
    assert math.isnan(zero["1:person"])  # type: ignore[arg-type]
    assert zero["3:sofa"] is None
    assert one["mean_iou"] == second.with_background
    np.testing.assert_array_equal([one[c] for c in columns], second.iou)
    assert table(per_class)[1][5:] == [repr(float(first.iou[0])), "X", "", ""]

    step_0, step_1 = read_results(means)
    assert {k: v for k, v in step_1.items() if k in second.means()} == second.means()
    assert math.isnan(step_0["old"])  # type: ignore[arg-type]


def test_the_same_run_again_replaces_its_row_and_gives_the_same_bytes(tmp_path):
    keys = [ResultKey("a", "FT", 1, 42), ResultKey("a", "FT", 1, 43), ResultKey("b", "FT", 1, 42)]
    for i, key in enumerate(keys):
        write(tmp_path, "voc-19-1", key, scores_of(4, seed=i), NAMES)
    paths = result_files(tmp_path, "voc-19-1")
    before = [path.read_bytes() for path in paths]
    write(tmp_path, "voc-19-1", keys[1], scores_of(4, seed=9), NAMES)
    rows = read_results(paths[0])
    assert [(row["name"], row["seed"]) for row in rows] == [("a", 42), ("a", 43), ("b", 42)]
    assert rows[1]["mean_iou"] == scores_of(4, seed=9).with_background
    write(tmp_path, "voc-19-1", keys[1], scores_of(4, seed=1), NAMES)
    assert [path.read_bytes() for path in paths] == before
    assert sorted(path.name for path in paths[0].parent.iterdir()) == [
        "voc-19-1-agg.csv",
        "voc-19-1.csv",
    ]


def test_columns_that_an_earlier_version_wrote_stay(tmp_path):
    path, _ = result_files(tmp_path, "voc-19-1")
    path.parent.mkdir()
    path.write_text("\ufeffname,method,step,seed,mean_iou,extra\na,FT,0,42,0.5,1.0\n")
    write(tmp_path, "voc-19-1", ResultKey("b", "FT", 0, 42), scores_of(2), NAMES)
    old, new = read_results(path)
    assert (old["mean_iou"], old["extra"], old["1:person"]) == (0.5, 1.0, None)
    assert new["extra"] is None


@pytest.mark.parametrize(
    "content",
    [
        b"step,name\n1,a\n",
        b"name,method,step,seed,mean_iou\na,FT,1\n",
        b"name,method,step,seed,mean_iou\na,FT,1,42,half\n",
        b'name,method,step,seed,mean_iou\na,"F"T,1,42,0.5\n',
        b"\xff\xfe\x00\x01",
    ],
)
def test_a_damaged_file_is_named_and_kept(tmp_path, content):
    path, _ = result_files(tmp_path, "voc-19-1")
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"voc-19-1\.csv is not a result file"):
        read_results(path)
    if b"half" not in content:  # a number that nobody can read does no harm beside a new row
        with pytest.raises(UserError, match=r"voc-19-1\.csv is not a result file"):
            write(tmp_path, "voc-19-1", ResultKey("a", "FT", 0, 1), scores_of(2), NAMES)
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("step,seed,mean_iou\na,FT,1,42,0.5\n\na,FT\n", "line 4 has 2 fields, the header 5"),
        ("step,seed\na,FT,1,42,0.5\n", "line 2 has 5 fields, the header 4"),
        ("step,seed,1:a,1:a\na,FT,1,42,0.5,0.6\n", "two columns are called '1:a'"),
        ("step,seed,,\na,FT,1,42,,\n", None),  # a spreadsheet program's empty columns
    ],
)
def test_rows_and_columns_that_do_not_fit_are_named(tmp_path, content, message):
    path = tmp_path / "voc-19-1.csv"
    path.write_text(f"name,method,{content}")
    if message is None:
        assert len(read_results(path)) == 1
    else:
        with pytest.raises(UserError, match=f"is not a result file .{message}.: move it away or"):
            read_results(path)


@pytest.mark.parametrize(
    ("encoding", "separator", "message"),
    [
        ("utf-16", ",", "no UTF-8 text in it): save it as UTF-8"),
        ("latin-1", ",", "no UTF-8 text in it): save it as UTF-8"),
        ("utf-8", ";", "semicolons between its fields): save it with commas"),
    ],
)
def test_how_a_spreadsheet_program_saved_it_is_told(tmp_path, encoding, separator, message):
    path = tmp_path / "voc-19-1.csv"
    lines = (["name", "method", "step", "seed", "0:ä"], ["a", "FT", "1", "42", "0,5"])
    path.write_text("".join(separator.join(line) + "\n" for line in lines), encoding=encoding)
    with pytest.raises(UserError) as caught:
        read_results(path)
    assert str(caught.value) == f"{path} is not a result file ({message}, or move it away"


def test_a_folder_in_the_place_of_a_file_is_called_one(tmp_path):
    path = tmp_path / "voc-19-1.csv"
    path.mkdir()
    with pytest.raises(UserError, match=r"voc-19-1\.csv is a folder, not a result file: "):
        read_results(path)


def test_two_rows_of_one_key_are_refused(tmp_path):
    """No run writes them: files were pasted together, and nobody knows which one counts."""
    path, _ = result_files(tmp_path, "voc-19-1")
    path.parent.mkdir()
    text = "name,method,step,seed,0:background\na,FT,1,42,0.5\na,FT,1,43,0.5\na,FT,01,42,0.6\n"
    path.write_text(text)
    with pytest.raises(UserError, match=r"voc-19-1\.csv has two rows a, FT, step 1, seed 42: "):
        read_results(path)
    write(tmp_path, "voc-19-1", ResultKey("b", "FT", 0, 1), scores_of(2), NAMES)
    assert len(table(path)) == 5  # what a run has computed is kept all the same


@pytest.mark.parametrize("value", ["78.5", "-0.1", "inf", "1.0000001", "half"])
def test_what_is_no_iou_is_named(tmp_path, value):
    path, _ = result_files(tmp_path, "voc-19-1")
    path.parent.mkdir()
    header = "name,method,step,seed,train_list,0:background,1:person,2:sofa"
    path.write_text(f"{header}\na,FT,0,42,10582,0.0,nan,\na,FT,1,42,10582,1.0,{value},X\n")
    found = rf"voc-19-1\.csv .*1:person is '{value}' in the row a, FT, step 1, seed 42"
    with pytest.raises(UserError, match=found):
        read_results(path)
    path.write_text(path.read_text().replace(value, "1"))
    assert [row["1:person"] for row in read_results(path)] == [
        pytest.approx(math.nan, nan_ok=True),
        1,
    ]


def test_an_empty_file_counts_as_none_and_a_missing_one_is_an_error(tmp_path):
    path, _ = result_files(tmp_path, "voc-19-1")
    with pytest.raises(UserError, match="no result file"):
        read_results(path)
    path.parent.mkdir()
    path.touch()
    assert read_results(path) == []
    write(tmp_path, "voc-19-1", ResultKey("a", "FT", 0, 1), scores_of(2), NAMES)
    assert len(read_results(path)) == 1


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "results").write_text("a file where the folder belongs")
    with pytest.raises(UserError, match="cannot write"):
        write(tmp_path, "voc-19-1", ResultKey("a", "FT", 0, 1), scores_of(2), NAMES)


WRITER = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.utils.test_results import NAMES, scores_of, write
from utils.results import ResultKey
for step in range(20):
    write(Path(sys.argv[1]), "voc-19-1", ResultKey(sys.argv[2], "FT", step, 1),
                  scores_of(4), NAMES)
"""


def test_runs_that_finish_together_lose_no_row(tmp_path):
    runs = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), name], cwd=ROOT)
        for name in ("a", "b")
    ]
    assert [run.wait() for run in runs] == [0, 0]
    for path in result_files(tmp_path, "voc-19-1"):
        rows = read_results(path)
        assert {(row["name"], row["step"]) for row in rows} == {
            (name, step) for name in ("a", "b") for step in range(20)
        }
        assert len(rows) == 40


@pytest.mark.parametrize("there", [True, False])
def test_a_file_behind_a_link_is_written_where_it_lies(tmp_path, there):
    """On storage that several machines share, for one."""
    shared = tmp_path / "shared.csv"
    per_class, _ = result_files(tmp_path, "voc-15-5")
    per_class.parent.mkdir()
    per_class.symlink_to("../shared.csv")
    for step in range(2 if there else 1):
        write(tmp_path, "voc-15-5", ResultKey("a", "MIB", step, 42), scores_of(4), NAMES)
    assert per_class.is_symlink()
    assert len(read_results(shared)) == (2 if there else 1)
