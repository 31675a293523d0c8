"""Tasks: which classes are learned at which step (class orders and the grammar of names)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise

from utils.constants import BACKGROUND
from utils.errors import UserError


@dataclass(frozen=True)
class Task:
    """A data set's classes cut into steps.

    `name` is the canonical name, used in file names. `steps[t]` holds the original labels that
    step t learns, ascending; background (0) leads step 0. A label's training index is its position
    in `seen(last step)`, the channel order of the head. `increment` is the I of a name B-I.
    """

    dataset: str
    name: str
    steps: tuple[tuple[int, ...], ...]
    increment: int | None = field(default=None, compare=False)

    @property
    def num_steps(self) -> int:
        return len(self.steps)

    def new(self, step: int) -> tuple[int, ...]:
        """Labels learned at `step`."""
        return self.steps[step]

    def old(self, step: int) -> tuple[int, ...]:
        """Labels of all earlier steps, in head order; empty at step 0."""
        return tuple(chain.from_iterable(self.steps[:step]))

    def seen(self, step: int) -> tuple[int, ...]:
        """Labels of all steps up to `step`, in head order: old, then new."""
        return self.old(step) + self.new(step)

    def classes_per_step(self, step: int) -> list[int]:
        """Channels of the classifiers cls.0 … cls.`step`."""
        return [len(labels) for labels in self.steps[: step + 1]]


@dataclass(frozen=True)
class Family:
    """The tasks of one data set: its classes 1 … `num_classes` and what is special in its names.

    `listed` holds tasks given step by step, background left out: name → labels per step.
    """

    num_classes: int
    names: tuple[str, ...] = ()  # canonical names that people use, for messages
    orders: Mapping[str, Sequence[int]] = field(default_factory=dict)  # suffix → class order
    aliases: Mapping[str, str] = field(default_factory=dict)  # spelling → B-I
    canonical: Mapping[str, str] = field(default_factory=dict)  # B-I → name in file names
    listed: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)


# Drawn at random once by the authors of the reference.
_ADE_ORDER_B = """
1 9 14 18 22 24 25 27 28 29 32 38 42 45 46 47 48 49 54 56 58 61 62 63 69 74 75 76 77 81
82 84 90 93 96 100 103 104 109 117 119 121 123 128 129 130 134 135 136 144 3 5 6 8 10 12
13 19 21 23 26 31 33 34 36 39 40 43 44 53 55 57 60 70 71 80 86 87 91 95 99 101 105 106
107 113 116 120 125 126 131 132 133 140 142 143 147 148 149 150 11 16 50 64 66 73 89 92
145 146 30 37 51 52 72 85 98 114 115 138 2 35 65 97 110 111 112 118 124 141 4 7 15 41 67
78 79 88 108 139 17 20 59 68 83 94 102 122 127 137
"""
_ADE_ORDER_C = """
5 10 11 12 13 16 17 19 20 23 27 28 30 31 32 33 37 43 46 52 56 57 65 66 69 70 74 76 77 79
82 83 86 87 105 109 110 111 119 128 129 132 133 134 138 142 143 144 146 147 1 6 8 9 14
24 25 26 29 34 35 36 40 41 44 45 48 50 54 61 63 67 68 71 78 81 84 85 90 94 95 96 97 98
99 102 106 112 114 115 118 120 121 123 124 126 135 136 139 149 3 4 7 18 39 64 73 101 113
137 47 51 55 60 62 80 116 127 140 148 22 42 49 58 59 89 91 92 108 125 2 38 53 100 104
117 130 131 141 145 15 21 72 75 88 93 103 107 122 150
"""

FAMILIES: dict[str, Family] = {
    "voc": Family(
        num_classes=20,
        names=("offline", "19-1", "19-1b", "15-5", "15-5s", "10-5", "10-10", "10-1", "5-3"),
        orders={"b": (1, 2, 3, 4, *range(6, 21), 5)},
        aliases={"15-5s": "15-1", "10-5-5": "10-5"},
        canonical={"15-1": "15-5s"},
    ),
    "ade": Family(
        num_classes=150,
        names=(
            *("offline", "100-50", "100-50b", "100-50c", "100-10", "100-10b", "100-10c"),
            *("100-5", "50", "50b", "50c"),
        ),
        orders={
            "b": tuple(map(int, _ADE_ORDER_B.split())),
            "c": tuple(map(int, _ADE_ORDER_C.split())),
        },
        aliases={"50": "50-50"},
        canonical={"50-50": "50"},
    ),
}


def parse_task(dataset: str, name: str, family: Family) -> Task:
    """The task that `name` stands for among `family.num_classes` classes.

    Grammar: `B-I` = B base classes, then I at a time until none is left (the last step may be
    shorter); `offline` = all at once; an alias or a listed task of the family; a suffix of
    `family.orders` = the same cut of another class order.

    Raises:
        UserError: no such name; lists the names in use and the grammar.
    """
    if name in family.listed:
        given = [sorted(labels) for labels in family.listed[name]]
        given[0].insert(0, BACKGROUND)
        return Task(dataset, name, tuple(map(tuple, given)))
    suffix = name[-1:] if name[-1:] in family.orders else ""
    base = name.removesuffix(suffix)
    base = family.aliases.get(base, base)
    order = list(family.orders[suffix] if suffix else range(1, family.num_classes + 1))
    if name == "offline":
        return Task(dataset, name, ((BACKGROUND, *order),))
    match = re.fullmatch("([1-9][0-9]{0,3})-([1-9][0-9]{0,3})", base)
    if match is None or int(match[1]) >= family.num_classes:
        raise UserError(f"unknown task {name[:40]!r} for {dataset}: {_grammar(family)}")
    first, increment = int(match[1]), int(match[2])
    cuts = [0, *range(first, family.num_classes, increment), family.num_classes]
    steps = [sorted(order[start:end]) for start, end in pairwise(cuts)]
    steps[0].insert(0, BACKGROUND)
    name = family.canonical.get(base, base) + suffix
    return Task(dataset, name, tuple(map(tuple, steps)), increment)


def _grammar(family: Family) -> str:
    listed = f"choose one of {', '.join(family.names)}; or " if family.names else "use "
    suffixes = " or ".join(family.orders)
    return (
        f"{listed}B-I = B base classes (fewer than {family.num_classes}), then I at a time; "
        "or offline = all at once"
        + (f"; suffix {suffixes} = another class order" if suffixes else "")
    )


def get_task(dataset: str, name: str) -> Task:
    """The task called `name` (any spelling) of "voc" or "ade".

    A listed task of the other data set is refused even where the grammar would read it, because
    `--dataset ade --task 15-5` is a slip far more often than a wish.

    Raises:
        UserError: unknown data set, unknown name, or a task of the other data set.
    """
    if dataset not in FAMILIES:
        raise UserError(f"unknown dataset {dataset!r}: choose one of {', '.join(FAMILIES)}")
    own = _find(dataset, name)
    if own is None or own.name not in FAMILIES[dataset].names:
        for other in FAMILIES.keys() - {dataset}:
            found = _find(other, name)
            if found and found.name in FAMILIES[other].names:
                raise UserError(
                    f"task {name} belongs to dataset {other}, not to {dataset}: "
                    f"use --dataset {other}, or {_grammar(FAMILIES[dataset])}"
                )
    return own or parse_task(dataset, name, FAMILIES[dataset])


def _find(dataset: str, name: str) -> Task | None:
    try:
        return parse_task(dataset, name, FAMILIES[dataset])
    except UserError:
        return None


def check_step(task: Task, step: int) -> None:
    """Raises UserError unless `task` has a step of that number."""
    if not 0 <= step < task.num_steps:
        raise UserError(
            f"task {task.name} of {task.dataset} has no step {step}: "
            f"use --step 0 to {task.num_steps - 1}"
        )


def step_numbers(text: str, task: Task) -> list[int]:
    """`2`, `0-5`, `0,2` or `all` -> ascending step numbers. Raises UserError."""
    if text.lower() == "all":
        return list(range(task.num_steps))
    steps: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"--step {text!r} names no steps: use 2, 0-5, 0,2 or all")
        steps.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    for step in sorted(steps):
        check_step(task, step)
    return sorted(steps)
