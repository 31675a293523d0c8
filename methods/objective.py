"""The objective of a step: student and frozen teacher in, one scalar and its named terms out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from methods import groups
from methods.groups import Seen, Setup, TermGroup
from methods.table import Method
from segmentation_module import Output
from utils.precision import Precision

Network = Callable[[Tensor, tuple[str, ...]], Output]  # images B 3 H W, normalised; wanted maps


class Losses(NamedTuple):
    """One evaluation of an objective."""

    total: Tensor  # scalar, differentiable; 0 without terms
    terms: dict[str, Tensor]  # name -> weighted scalar, detached
    logits: Tensor  # B C h w, the student's


class Objective:
    """Student + teacher -> one scalar to minimise and its named, weighted terms.

    The teacher runs where a group asks it, and first, while nothing is kept for a backward pass.

    Args:
        term_groups: whose terms are added up.
        student: the model, as trained (wrapped for distribution) or bare for validation.
        teacher: the model of the step before, frozen and in eval mode; None at step 0.
        compiled: run both networks through torch.compile.
    """

    def __init__(
        self, term_groups: Sequence[TermGroup], student: nn.Module, teacher: nn.Module | None,
        precision: Precision, compiled: bool = False,
    ) -> None:  # fmt: skip
        run: Callable[[nn.Module], Network] = torch.compile if compiled else lambda module: module
        self.groups = tuple(term_groups)
        self.names = tuple(name for group in self.groups for name in group.names)
        self.maps = tuple(sorted({name for group in self.groups for name in group.maps}))
        self.student = student
        self.precision = precision
        asked = teacher is not None and any(group.asks_teacher for group in self.groups)
        self._run_student = run(student)
        self._run_teacher = run(teacher) if teacher is not None and asked else None
        self._surveyors = {group.surveys: group for group in self.groups if group.surveys}

    def __call__(self, images: Tensor, labels: Tensor) -> Losses:
        """Images B 3 H W (normalised), labels B H W (head order, IGNORE_INDEX ignored)."""
        with self.precision.autocast():
            remembered = self._ask_teacher(images, labels)
            output = self._run_student(images, self.maps)
        parts = [
            group(Seen(images, labels, output, memory))
            for group, memory in zip(self.groups, remembered, strict=True)
        ]
        total = sum((p.total for p in parts[1:]), parts[0].total) if parts else torch.zeros(())
        terms = {name: value for part in parts for name, value in part.values.items()}
        return Losses(total, terms, output.logits)

    @property
    def needs_survey(self) -> bool:
        """Whether a group has to see all training data once before the first iteration."""
        return any(group.learned is None for group in self._surveyors.values())

    def survey(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What to sum over all batches of that pass, in all processes, by the group's `surveys`."""
        assert self._run_teacher is not None
        with self.precision.autocast(), torch.inference_mode():
            output = self._run_teacher(images, ())
        with torch.no_grad():
            return {name: group.survey(output, labels) for name, group in self._surveyors.items()}

    def learn(self, totals: Mapping[str, Tensor]) -> None:
        """End the pass: `totals` are the sums of all that `survey` returned."""
        for name, group in self._surveyors.items():
            group.learn(totals[name])

    def state_dict(self) -> dict[str, Tensor]:
        """What was learned in that pass, to be stored; empty before, and where nothing is."""
        return {k: g.learned for k, g in self._surveyors.items() if g.learned is not None}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` gave. Raises ValueError where it does not fit."""
        for name, group in self._surveyors.items():
            if name in state:
                group.restore(state[name].to(self.precision.device))

    def _ask_teacher(self, images: Tensor, labels: Tensor) -> list[Any]:
        """What each group keeps of the teacher's output."""
        if self._run_teacher is None:
            return [None] * len(self.groups)
        with torch.inference_mode():
            output = self._run_teacher(images, self.maps)
        with torch.no_grad():
            return [
                group.remember(output, labels) if group.asks_teacher else None
                for group in self.groups
            ]


def make_objective(
    method: Method, student: nn.Module, teacher: nn.Module | None, classes_per_step: Sequence[int],
    precision: Precision, *, training: bool = True, compiled: bool = False,
) -> Objective:  # fmt: skip
    """The objective of a method at the step whose classifiers have `classes_per_step` channels.

    With `training` False it is the loss that a validation shows, and nothing is compiled.
    """
    old = sum(classes_per_step[:-1]) or None
    compiled = compiled and training
    setup = Setup(method, old, classes_per_step[-1], training, compiled or None)
    made = [make(setup) for make in groups.GROUPS]
    return Objective(
        [group for group in made if group is not None], student, teacher, precision, compiled
    )
