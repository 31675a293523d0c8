"""What `dataset.json` may say, and what is wrong with one."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import ErrorDetails

from dataset.labels import LabelTable
from utils.constants import IGNORE_INDEX
from utils.errors import UserError, guess

FILE = "dataset.json"
MAX_CLASSES = 254  # with label 0; on reading, 254 marks foreign labels and 255 ignored pixels

# No names for tasks: files of a task end in its name, and in -agg or -ov; offline is all at once.
TAKEN = ("agg", "offline", "ov")


def _refusing(problems_of: Callable[[Any, ValidationInfo], list[str]]) -> AfterValidator:
    """A validator of one key; the function may look at the valid keys above it in `info.data`."""

    def validate(value: Any, info: ValidationInfo) -> Any:
        if problems := problems_of(value, info):
            raise ValueError("\n".join(problems))
        return value

    return AfterValidator(validate)


def _path_problems(path: str, info: ValidationInfo) -> list[str]:
    if path and not os.path.isabs(path) and ".." not in path.split("/"):
        return []
    return [f"{info.field_name!r} must be a path below the folder of {FILE}, without '..'"]


def _name_problems(classes: list[str], _: ValidationInfo) -> list[str]:
    twice = sorted(name for name, count in Counter(classes).items() if count > 1)
    return [
        f"class {label} has the name {name!r}: it must be printable and not blank"
        for label, name in enumerate(classes)
        if not name.strip() or not name.isprintable()
    ] + [f"two classes are called {name!r}" for name in twice]


def _key_problems(table: dict[str, str] | None, info: ValidationInfo) -> list[str]:
    """Ids belong under 'labels', colours under 'colors'; one of the two is enough."""
    if info.field_name == "colors" and table is not None and info.data.get("labels") is not None:
        return ["give either 'labels' (ids) or 'colors'"]
    wanted = info.field_name == "colors"
    wrong = [key for key in table or () if key.startswith("#") != wanted]
    form = "colours as '#rrggbb', ids belong to 'labels'"
    if not wanted:
        form = "ids as '7', colours belong to 'colors'"
    return [f"{info.field_name!r} has the key {wrong[0]!r}: use {form}"] if wrong else []


def _ignore_problems(ignore: Any, info: ValidationInfo) -> list[str]:
    entries = ignore if isinstance(ignore, list) else [ignore]
    if ignore is None or info.data.get("labels") or info.data.get("colors"):
        return []  # a table checks its own
    if any(type(entry) is not int for entry in entries):
        text = json.dumps(ignore)[:60]
        return [f"'ignore' is {text}: input should be a valid integer, a list of them, or null"]
    first = len(info.data.get("classes", ()))
    wrong = [entry for entry in entries if not first <= entry <= 255]
    return [f"'ignore' is {entry}: use a label from {first} to 255, or null" for entry in wrong]


def _share_problems(share: float | None, info: ValidationInfo) -> list[str]:
    listed = [info.data.get(key, "") is not None for key in ("train", "val")]
    if listed == [share is None] * 2:
        return []
    return ["give either 'train' and 'val' (lists) or 'val_share' (0 to 1)"]


def _task_problems(tasks: dict[str, list[list[Any]]], info: ValidationInfo) -> list[str]:
    found = []
    for name, steps in tasks.items():
        if not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", name) or name in TAKEN:
            taken = ", ".join(map(repr, TAKEN))
            found.append(f"task {name!r}: use letters, digits and _, a letter first, not {taken}")
        if "classes" in info.data:
            problems = _step_problems(steps, info.data["classes"])
            found += [f"task {name!r}: {problem}" for problem in problems]
    return found


def _step_problems(steps: list[list[Any]], classes: list[str]) -> list[str]:
    """Every class but label 0 must occur in exactly one step, by name or by label."""
    found = [f"step {t} is empty" for t, step in enumerate(steps) if not step]
    labels = []
    for entry in (entry for step in steps for entry in step):
        label = classes.index(entry) if entry in classes else entry
        if type(label) is not int or not 1 <= label < len(classes):  # true is an int, too
            found.append(f"{entry!r} is neither a class name nor a label 1 to {len(classes) - 1}")
        elif label in labels:
            found.append(f"class {classes[label]!r} occurs twice")
        else:
            labels.append(label)
    missing = [name for label, name in enumerate(classes) if label and label not in labels]
    return found + ([f"no step learns {', '.join(missing)}"] if missing else [])


Below = Annotated[str, _refusing(_path_problems)]


class Layout(BaseModel, frozen=True, strict=True, extra="forbid"):
    """What dataset.json says; paths are relative to its folder.

    Attributes:
        classes: Names by label.
        background: Label 0 is a class that is scored, not "unlabelled".
        labels, colors: What the ids or the colours of masks mean, as names in `classes`.
        ignore: What pixels that belong to no class have: a label, an id or a colour, or a list of
            them; None if masks have none.
        train, val: The two lists; None where `val_share` of all images are drawn by `seed`.
        tasks: Steps of classes by name, each class a name or a label.
    """

    classes: Annotated[
        list[str], Field(min_length=2, max_length=MAX_CLASSES), _refusing(_name_problems)
    ]
    background: bool = True
    labels: Annotated[dict[str, str] | None, _refusing(_key_problems)] = None
    colors: Annotated[dict[str, str] | None, _refusing(_key_problems)] = None
    ignore: Annotated[Any, _refusing(_ignore_problems)] = IGNORE_INDEX
    images: Below = "images"
    masks: Below = "masks"
    train: Below | None = None
    val: Below | None = None
    val_share: Annotated[
        float | None, Field(gt=0, lt=1, validate_default=True), _refusing(_share_problems)
    ] = None
    seed: Annotated[int, Field(ge=0)] = 0
    tasks: Annotated[dict[str, list[list[Any]]], _refusing(_task_problems)] = {}

    @model_validator(mode="after")
    def _check_table(self) -> Layout:
        try:
            self.table()
        except UserError as error:
            raise ValueError(str(error)) from error
        return self

    def table(self) -> LabelTable | None:
        """What ids or colours mean; None where a pixel of a mask is the label itself.

        Raises UserError, naming the first entry that is wrong.
        """
        named = self.colors if self.labels is None else self.labels
        if named is None and not isinstance(self.ignore, list):
            return None
        if named is None:
            named = {str(label): name for label, name in enumerate(self.classes)}
        ignore = self.ignore if isinstance(self.ignore, list) else [self.ignore]
        if "ignore" not in self.model_fields_set and (self.labels is None or "255" in named):
            ignore = []  # 255 has its meaning by default only where nothing else gives it one
        return LabelTable(named, self.classes, [key for key in ignore if key is not None])


def read_layout(root: Path) -> tuple[Layout | None, list[str]]:
    """`root`/dataset.json and all that is wrong with it, a line each; None if anything is."""
    path = root / FILE
    try:
        if path.exists() and not path.is_file():  # a pipe or a device may never end
            return None, [f"{path} is no file"]
        return Layout.model_validate(json.loads(path.read_bytes())), []
    except FileNotFoundError:
        return None, [f"no file {path} (is this the folder? docs/own_data.md describes it)"]
    except OSError as error:
        return None, [f"{path} cannot be read ({error.strerror or error})"]
    except ValidationError as error:
        # Unknown keys first: a slip in a key is why another one is missing.
        found = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        return None, [f"{path}: {line}" for details in found for line in _lines(details)]
    except (ValueError, RecursionError) as error:
        return None, [f"{path} is not JSON ({error})"]


def _lines(error: ErrorDetails) -> list[str]:
    """An error of pydantic as a user is told of it."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"]).splitlines()
    key, value = ".".join(map(str, error["loc"])), json.dumps(error["input"])[:60]
    if not key:
        return ["is no object {...}"]
    if error["type"] == "extra_forbidden":
        known = sorted(Layout.model_fields)
        return [f"unknown key {key!r}{guess(key, known)}, use {', '.join(known)}"]
    if error["type"] == "missing":
        return [f"no key {key!r}, which is needed"]
    return [f"{key!r} is {value}: {error['msg'][0].lower()}{error['msg'][1:]}"]
