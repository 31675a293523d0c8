"""`metrics.jsonl`: what a step measured, a line of JSON per epoch and one for the test."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from train import LogPoint
from utils.files import atomic_write

Line = dict[str, Any]
NAME = "metrics.jsonl"


@dataclass
class Epoch:
    """What training measured in an epoch so far. Interrupted and gone on with, it is one epoch."""

    epoch: int  # from 1
    iterations: int = 0  # done in it, which the rest is about
    terms: dict[str, float] = field(default_factory=dict)  # weighted, means
    lr: float | None = None  # after the last iteration, as train/lr
    seconds: float = 0.0
    images_per_second: float | None = None  # all processes together
    waiting: float | None = None  # share of the time that rank 0 waited for its data, 0 to 1

    def add(self, point: LogPoint) -> None:
        """Take in the iterations since the last point."""
        seconds = self.seconds + point.seconds
        before, now = self.iterations / point.iteration, self.seconds / seconds

        def mean(earlier: float | None, new: float, weight: float) -> float:
            return new if earlier is None else weight * earlier + (1 - weight) * new

        self.terms = {
            name: mean(self.terms.get(name), value, before) for name, value in point.terms.items()
        }
        speed = mean(self.images_per_second, point.images_per_second, now)
        self.waiting, self.images_per_second = mean(self.waiting, point.waiting, now), speed
        self.iterations, self.seconds, self.lr = point.iteration, seconds, point.lr

    @property
    def loss(self) -> float:
        """The sum of the terms."""
        return sum(self.terms.values())

    def line(self) -> Line:
        """Its line of the journal."""
        return asdict(self) | {"loss": self.loss if self.terms else None}

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Epoch | None:
        """The epoch of a line, None for one that an editor damaged."""
        names = cls.__dataclass_fields__
        values = {name: line[name] for name in names if name in line}
        numbers = [v for name, v in values.items() if name != "terms"]
        terms = values.get("terms")
        if len(values) < len(names) or not isinstance(terms, dict):
            return None
        return cls(**values) if all(map(_is_number, [*numbers, *terms.values()])) else None


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


class Journal:
    """The file of one step. It is replaced as a whole, so no kill leaves half a line.

    A line that is no JSON (a copy cut short, an editor) is dropped at the next writing. Does
    nothing unless `enabled` (rank 0). Raises UserError where the file cannot be written.
    """

    def __init__(self, path: Path, enabled: bool = True) -> None:
        self.path, self._enabled = path, enabled

    def go_on(self, epochs: int, iterations: int) -> Epoch | None:
        """Forget what comes after so many epochs and iterations of the next, the test included.

        Returns what was measured in those iterations, if there are any and it is known.
        """
        if not self._enabled:
            return None
        current = None
        for line in _read(self.path):
            if _place(line) == (False, epochs + 1) and line.get("iterations") == iterations:
                current = Epoch.of(line)
        kept = [] if current is None or not iterations else [current.line()]
        self._write((False, epochs + 1), kept)
        return current if iterations else None

    def put(self, line: Line) -> None:
        """Add an epoch's or the test's line, in the place of an earlier one and what follows it.

        Numbers that are not finite become null.
        """
        if self._enabled:
            self._write(_place(line), [line])

    def _write(self, place: tuple[bool, int], lines: list[Line]) -> None:
        # Another process may write here too: reading happens under the lock of atomic_write.
        with atomic_write(self.path) as file:
            kept = [line for line in _read(self.path) if _place(line) < place]
            for line in [*kept, *lines]:
                file.write(f"{json.dumps(_finite(line), allow_nan=False)}\n".encode())


def _place(line: Mapping[str, Any]) -> tuple[bool, int]:
    """Where a line belongs: epochs by their number, then the test."""
    return (True, 0) if "test" in line else (False, line["epoch"])


def _read(path: Path) -> list[Line]:
    """The lines that are some."""
    if not path.exists():
        return []
    found = []
    for text in path.read_bytes().splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and ("test" in line or type(line.get("epoch")) is int):
            found.append(line)
    return found


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not know."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
