"""What two runs of the program left behind, compared value by value; for benchmarks.same_bits."""

from __future__ import annotations

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
    same, because nothing was compared.
    """
    if old in ({}, []):
        return ["there is nothing to compare"]
    olds, news = leaves(old), leaves(new)
    lines = [f"{name} is missing" for name in olds.keys() - news.keys()]
    lines += [f"{name} is new" for name in news.keys() - olds.keys()]
    shared = [name for name in olds if name in news]
    return sorted(lines) + [
        f"{name} {text}" for name in shared if (text := _unequal(olds[name], news[name]))
    ]


def _unequal(old: Any, new: Any) -> str:
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        kinds = [f"{t.dtype} {tuple(t.shape)}" for t in (old, new)]
        if kinds[0] != kinds[1]:
            return f"was {kinds[0]}, is {kinds[1]}"
        if torch.equal(old, new):
            return ""
        return f"differs by up to {(old.double() - new.double()).abs().max():.3g}"
    same = type(old) is type(new) and old == new
    return "" if same else f"was {old!r:.60}, is {new!r:.60}"


def compare_checkpoints(
    results: Comparisons, what: str, old_file: Path, new_file: Path, free: Sequence[str] = ()
) -> None:
    """Every field of two checkpoints. Options may be added; those named in `free` may differ."""
    if not new_file.exists():
        return results.add(what, [f"{new_file} was not written"])
    old, new = (torch.load(p, map_location="cpu", weights_only=True) for p in (old_file, new_file))
    grouped = {name for names in PARTS.values() for name in names} | {"options"}
    parts = PARTS | {"numbers and names": tuple((old.keys() | new.keys()) - grouped)}
    for part, names in parts.items():
        mine, theirs = ({k: side[k] for k in names if k in side} for side in (old, new))
        results.add(f"{what}, {part} ({len(leaves(mine))} values)", differences(mine, theirs))
    wanted = {name: value for name, value in old["options"].items() if name not in free}
    wrong = [
        f"{name} was {value!r}, is {new['options'].get(name, 'missing')!r}"
        for name, value in wanted.items()
        if name not in new["options"] or new["options"][name] != value
    ]
    results.add(f"{what}, options ({len(wanted)} values)", wrong)
    return None


def compare_files(results: Comparisons, what: str, old: Path, new: Path, pattern: str) -> None:
    """Every file of that pattern below `old` lies below `new`, too, with the same bytes."""
    names = sorted(path.relative_to(old) for path in old.glob(pattern))
    wrong = [
        str(name) for name in names
        if not (new / name).exists() or (old / name).read_bytes() != (new / name).read_bytes()
    ]  # fmt: skip
    results.add(f"{what} ({len(names)} files)", wrong if names else [f"no {pattern} in {old}"])


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
