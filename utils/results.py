"""The result files of a task: `<setting>.csv` with the IoU of every class, `<setting>-agg.csv` with
the means; a row per tested step of a run. Rows hold nothing that a second run would not reproduce.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from utils.errors import UserError, printable
from utils.files import atomic_write, followed

NO_GROUND_TRUTH = "X"
LENGTHS = ("train_list", "val_list")
KINDS = ("protocol", "split")
WEIGHTS = "weights"
CLASS_COLUMN = re.compile("([0-9]+):")  # the channel, before the name of the class
Result = dict[str, str | int | float | None]


@dataclass(frozen=True)
class ResultKey:
    """What a row is about; a later row with the same key takes the place of the earlier one."""

    name: str
    method: str
    step: int
    seed: int


_KEYS = tuple(ResultKey.__dataclass_fields__)


def result_files(logdir: Path, setting: str) -> tuple[Path, Path]:
    """Paths of the per-class file and of the file of means; setting = <dataset>-<task>[-ov]."""
    folder = logdir / "results"
    return folder / f"{setting}.csv", folder / f"{setting}-agg.csv"


def write_results(
    logdir: Path, setting: str, key: ResultKey, iou: Sequence[float], means: Mapping[str, float],
    class_names: Sequence[str], list_lengths: tuple[int, int] | None = None,
    kinds: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Adds a tested step to both files, or replaces its row.

    Args:
        iou: of the classes seen so far; nan where there is no ground truth.
        means: the single numbers, by column.
        class_names: all classes of the task in head order, background first. Each gets a column
            `<index>:<name>`, empty where the step does not know the class yet.
        list_lengths: of the data set's train and val list, columns LENGTHS of the per-class file:
            they tell the real data from a toy set in its layout.
        kinds: of the numbers, by the names in KINDS and WEIGHTS, in columns of both files: how
            they were measured, how training images were chosen, and the checksum of the network
            that was tested. Of rows without them nothing is known.

    Raises:
        UserError: the disk is full, the folder not writable, or a file there is no result file.
    """
    per_class, mean_file = result_files(logdir, setting)
    columns = [f"{index}:{printable(name)}" for index, name in enumerate(class_names)]
    unseen = [""] * (len(columns) - len(iou))
    row = dict(zip(LENGTHS, map(str, list_lengths or ()), strict=False)) | dict(kinds or {})
    row["mean_iou"] = _text(means["with_background"])
    row |= dict(zip(columns, [_text(value) for value in iou] + unseen, strict=True))
    _put(per_class, key, row)
    _put(mean_file, key, dict(kinds or {}) | {name: _text(v) for name, v in means.items()})


def read_results(path: Path) -> list[Result]:
    """Rows of a result file, column name -> value, in the order of the file.

    name, method and KINDS: str; step, seed: int; else float, nan = no ground truth, None = not
    seen yet.
    Raises UserError if the file is missing or damaged, or has two rows of one key.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a result file: move it away, or name another")
    if not path.is_file():
        raise UserError(f"no result file {path}: test a step first, or name another file")
    rows = [{column: _value(path, row, column) for column in row} for row in _rows(path)]
    for name, count in Counter(map(row_name, rows)).most_common(1):
        if count > 1:  # pasted together: a run replaces its row
            raise UserError(f"{path} has two rows {name}: keep one, or put them into two files")
    return rows


def row_name(row: Mapping[str, object]) -> str:
    """A row as a message names it: `MIB, MIB, step 1, seed 42`."""
    return "{name}, {method}, step {step}, seed {seed}".format(**{k: row[k] for k in _KEYS})


def _put(path: Path, key: ResultKey, values: Mapping[str, str]) -> None:
    """Writes the row at its place among the rows of `path`, whose columns stay and may grow."""
    new = {name: str(value) for name, value in asdict(key).items()} | dict(values)
    path = followed(path)  # a link to shared storage stays one
    # Other runs write here too: reading happens under the lock that atomic_write holds.
    with atomic_write(path) as file:
        rows = _rows(path) if path.exists() else []
        place = [[row[column] for column in _KEYS] for row in rows]
        wanted = [new[column] for column in _KEYS]
        at = place.index(wanted) if wanted in place else len(rows)
        rows[at : at + 1] = [new]
        columns = dict.fromkeys(column for row in rows for column in row)
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        file.write(text.getvalue().encode())


def _rows(path: Path) -> list[dict[str, str]]:
    """The rows as text. Raises UserError unless it is a table with the columns of the key."""
    try:
        # utf-8-sig: a spreadsheet program may have put a byte-order mark in front.
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, list(_KEYS))
            _check_header(path, header)
            rows = []
            for row in filter(None, reader):  # an editor may have left a blank line
                if len(row) != len(header):
                    counts = f"{len(row)} fields, the header {len(header)}"
                    raise ValueError(f"line {reader.line_num} has {counts}")
                rows.append(dict(zip(header, row, strict=True)))
            return rows
    except UnicodeDecodeError as error:
        raise _damaged(path, "no UTF-8 text in it", "save it as UTF-8, or move it away") from error
    except (ValueError, csv.Error) as error:
        raise _damaged(path, error) from error


def _check_header(path: Path, header: Sequence[str]) -> None:
    if len(header) == 1 and ";" in header[0]:
        cure = "save it with commas, or move it away"
        raise _damaged(path, "semicolons between its fields", cure)
    if list(header[: len(_KEYS)]) != list(_KEYS):
        raise ValueError(f"the first columns are not {', '.join(_KEYS)}")
    for name, count in Counter(filter(None, header)).most_common(1):
        if count > 1:
            raise ValueError(f"two columns are called {name!r}")


def _damaged(path: Path, error: object, cure: str = "move it away or mend it") -> UserError:
    return UserError(f"{path} is not a result file ({error}): {cure}")


def _text(value: float) -> str:
    """Shortest text that reads back as the same number."""
    return NO_GROUND_TRUTH if math.isnan(value) else repr(float(value))


def _value(path: Path, row: Mapping[str, str], column: str) -> str | int | float | None:
    text = row[column]
    if column in ("name", "method", *KINDS):
        return text
    try:
        if column in ("step", "seed"):
            return int(text)
        if text in ("", NO_GROUND_TRUTH):
            return math.nan if text else None
        value = float(text)
    except ValueError:
        raise _wrong_cell(path, row, column) from None
    if CLASS_COLUMN.match(column) and not (math.isnan(value) or 0 <= value <= 1):
        raise _wrong_cell(path, row, column, ", an IoU is from 0 to 1")
    return value


def _wrong_cell(path: Path, row: Mapping[str, str], column: str, why: str = "") -> UserError:
    return _damaged(path, f"{column} is {row[column]!r} in the row {row_name(row)}{why}")
