"""What two runs of the program left behind, compared value by value; for benchmarks.same_bits."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PARTS = {  # fields of a checkpoint that share a line; all others but the options share one more
    "model": ("model_state",),
    "optimizer": ("optimizer_state", "scheduler_state", "scaler_state"),
    "regulariser": ("regularizer", "regularizer_state"),
    "random state": ("random_state",),
}


class Comparisons:
    """Prints a line per comparison and counts them."""

    def __init__(self) -> None:
        self.count = self.differ = 0

    def add(self, what: str, differences: Sequence[str]) -> None:
        """One comparison and what it found, of which the first two are printed."""
        self.count += 1
        self.differ += bool(differences)
        found = "; ".join(differences[:2])
        if len(differences) > 2:
            found += f"; and {len(differences) - 2} more"
        print(f"DIFFERS {what}: {found}" if differences else f"same    {what}", flush=True)


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """What lies in nested dicts, lists and tuples, by the way to it; of these, the types."""
    if not isinstance(value, (dict, list, tuple)):
        return {name: value}
    found: dict[str, Any] = {f"type of {name}": type(value)}
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        found |= leaves(inner, f"{name}.{key}" if name else str(key))
    return found


def differences(old: Any, new: Any) -> list[str]:
    """A line for every tensor or value that is not the same in both, or not in both.

    Tensors are the same with equal types, shapes and elements. Two empty containers are not the
    same, because nothing was compared. Differences of numbers come last, the largest first.
    """
    if old in ({}, []):
        return ["there is nothing to compare"]
    olds, news = leaves(old), leaves(new)
    lines = [(f"{name} is missing", math.inf) for name in olds.keys() - news.keys()]
    lines += [(f"{name} is new", math.inf) for name in news.keys() - olds.keys()]
    for name in olds.keys() & news.keys():
        text, size = _unequal(olds[name], news[name])
        lines += [(f"{name} {text}", size)] if text else []
    return [line for line, _ in sorted(lines, key=lambda item: (-item[1], item[0]))]


def _unequal(old: Any, new: Any) -> tuple[str, float]:
    """What is not the same, and by which part of the largest number; "" where all is the same."""
    if isinstance(old, float) and isinstance(new, float):
        old, new = torch.tensor(old).double(), torch.tensor(new).double()
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        same = type(old) is type(new) and old == new
        return "" if same else f"was {old!r:.60}, is {new!r:.60}", math.inf
    kinds = [f"{t.dtype} {tuple(t.shape)}" for t in (old, new)]
    if kinds[0] != kinds[1]:
        return f"was {kinds[0]}, is {kinds[1]}", math.inf
    if torch.equal(old, new):
        return "", 0.0
    error = float((old.double() - new.double()).abs().max())
    part = error / max(float(old.double().abs().max()), 1e-300)
    return f"differs by up to {error:.2g}, {part:.1g} of its largest value", part


def compare_checkpoints(
    results: Comparisons, what: str, old_file: Path, new_file: Path, free: Sequence[str] = ()
) -> None:
    """Every field of the old checkpoint, against the same one of the new.

    The new one may have more fields and options; options named in `free` may differ.
    """
    if not new_file.exists():
        return results.add(what, [f"{new_file} was not written"])
    old, new = (torch.load(p, map_location="cpu", weights_only=True) for p in (old_file, new_file))
    grouped = {name for names in PARTS.values() for name in names} | {"options"}
    parts = PARTS | {"numbers and names": tuple(old.keys() - grouped)}
    for part, names in parts.items():
        mine, theirs = ({k: side[k] for k in names if k in old and k in side}
                        for side in (old, new))  # fmt: skip
        results.add(f"{what}, {part} ({len(leaves(mine))} values)", differences(mine, theirs))
    wanted = {name: value for name, value in old["options"].items() if name not in free}
    wrong = [
        f"{name} was {value!r}, is {new['options'].get(name, 'missing')!r}"
        for name, value in wanted.items()
        if name not in new["options"] or new["options"][name] != value
    ]
    results.add(f"{what}, options ({len(wanted)} values)", wrong)
    return None


def compare_results(results: Comparisons, what: str, old: Path, new: Path) -> None:
    """Every result file below `old` lies below `new`, too; rows and numbers of its columns."""
    names = sorted(path.relative_to(old) for path in old.glob("logs/results/*.csv"))
    wrong = [] if names else [f"no result file below {old}"]
    for name in names:
        before, after = _read_rows(old / name), _read_rows(new / name)
        columns = {column for row in before for column in row}
        kept = [{k: v for k, v in row.items() if k in columns} for row in after]
        wrong += [f"{name}, row {line}" for line in differences(before, kept)]
    results.add(f"{what} ({len(names)} files)", wrong)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file, its numbers as numbers; none where there is no file."""

    def value(text: str) -> Any:
        try:
            return float(text)
        except ValueError:
            return text

    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{k: value(v) for k, v in row.items()} for row in csv.DictReader(file)]


def tables(printed: str) -> list[str]:
    """The class tables that a run printed between its log lines."""
    log_line = re.compile(r"^(?:\[rank \d+\] )?\d\d:\d\d:\d\d .*\n", re.MULTILINE)
    return [part for part in log_line.sub("\0", printed).split("\0") if part.strip()]


def predictions(folder: Path) -> dict[str, Any]:
    """Masks and scores that predict.py wrote."""
    found: dict[str, Any] = {}
    for path in folder.glob("masks/*.png"):
        with Image.open(path) as mask:
            found[path.name] = (bytes(mask.getpalette() or ()), torch.from_numpy(np.array(mask)))
    for path in folder.glob("scores/*.npz"):
        with np.load(path) as file:
            scores = {name: file[name].tolist() for name in file if name != "probabilities"}
            found[path.name] = (scores, torch.from_numpy(file["probabilities"]))
    return found
