"""Term groups: the parts that an objective is a list of.

A group looks at a batch as student and teacher saw it and returns named, weighted scalars. Three
steps make a new one: a class here (or in a file of its own) that derives from `TermGroup`, a
function from `Setup` to the group or None in GROUPS, and a field of `methods.table.Method` for each
value that it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from methods import loss, pseudo_labels
from methods.features import feature_distillation, label_guided_distillation
from methods.loss import WeightedTerm
from methods.pieces import pixel_losses
from methods.pod import before_activation, fold_new_classes, local_pod, pooled
from methods.table import Method
from segmentation_module import Output


class Setup(NamedTuple):
    """What the groups of an objective are made from."""

    method: Method
    old_classes: int | None  # channels of the teacher, background included; None at step 0
    new_classes: int  # channels that this step adds
    training: bool  # False: the loss that a validation shows
    compiled: bool | None  # run through torch.compile; None: where it pays


class Seen(NamedTuple):
    """A batch as a group sees it."""

    images: Tensor  # B 3 H W, normalised
    labels: Tensor  # B H W, head order; IGNORE_INDEX is ignored
    student: Output
    remembered: Any  # what the group kept of the teacher's output; None without a teacher


class Terms(NamedTuple):
    """What a group returns."""

    total: Tensor  # scalar, differentiable: the sum of the values
    values: dict[str, Tensor]  # name -> weighted scalar, detached


class TermGroup:
    """Base of all groups.

    Attributes:
        names: of its terms, in the order in which logs show them.
        maps: the feature maps it wants of both networks, see `segmentation_module.MAPS`.
        asks_teacher: the teacher has to run for it.
        surveys: what it learns from one pass over the training data before the first epoch; empty
            where it needs none. `survey` and `learn` do it.
        learned: what it knows from that pass, stored in the checkpoint; None before.
    """

    names: tuple[str, ...] = ()
    maps: tuple[str, ...] = ()
    asks_teacher: bool = False
    surveys: str = ""
    learned: Tensor | None = None

    def remember(self, teacher: Output, labels: Tensor) -> Any:
        """What to keep of the teacher's output until the student has run, without gradient.

        Called before the student runs, so whatever is not kept makes room. What the teacher gave
        out cannot take part in a gradient, results of operations on it (or clones) can.
        """
        raise AssertionError("a group that asks the teacher says what it keeps")

    def survey(self, teacher: Output, labels: Tensor) -> Tensor:
        """What the teacher shows of a batch, to be summed over batches and processes.

        The teacher gives out logits only. Integers have the same sum in any order, and so make
        what is learned independent of the number of processes.
        """
        raise AssertionError("a group that surveys says what it sums")

    def learn(self, total: Tensor) -> None:
        """Set `learned` from the sum of all that `survey` returned."""
        raise AssertionError("a group that surveys learns from it")

    def restore(self, learned: Tensor) -> None:
        """Set `learned` as a checkpoint has it. Raises ValueError where that does not fit."""
        raise AssertionError("a group that surveys restores what it learned")

    def __call__(self, seen: Seen) -> Terms:
        raise AssertionError("a group computes its terms")


class PixelTerms(TermGroup):
    """Losses of single pixels at image size, evaluated a piece at a time (`methods/pieces.py`).

    Args:
        terms: name -> pixel term and weight; the first one classifies.
        asks_teacher: whether one of them distils.
        compiled: as in `Setup`.
    """

    def __init__(
        self, terms: dict[str, WeightedTerm], asks_teacher: bool, compiled: bool | None = None
    ) -> None:
        self.terms = terms
        self.names = tuple(terms)
        self.asks_teacher = asks_teacher
        self.compiled = compiled

    def remember(self, teacher: Output, labels: Tensor) -> Tensor:
        return teacher.logits.clone()

    def __call__(self, seen: Seen) -> Terms:
        total, values = pixel_losses(
            self.terms, seen.student.logits, seen.remembered, seen.labels, compiled=self.compiled
        )
        return Terms(total, values)


class PseudoLabelled(PixelTerms):
    """Pixel terms on labels that the teacher completes (PLOP, `methods/pseudo_labels.py`).

    The first term of each image is weighted by the share of its background that was labelled.

    Args:
        terms: name -> pixel term and weight; the first one classifies.
        distils: whether one of them looks at the teacher's logits.
        setup: for the numbers of classes, the floor of the thresholds and `compiled`.
    """

    asks_teacher = True
    surveys = "pseudo_thresholds"

    def __init__(self, terms: dict[str, WeightedTerm], distils: bool, setup: Setup) -> None:
        assert setup.old_classes is not None
        super().__init__(terms, True, setup.compiled)
        self.distils = distils
        self.old_classes = setup.old_classes
        self.classes = setup.old_classes + setup.new_classes
        self.floor = setup.method.pseudo_floor

    def survey(self, teacher: Output, labels: Tensor) -> Tensor:
        return pseudo_labels.histogram(teacher.logits, labels, self.classes)

    def learn(self, total: Tensor) -> None:
        self.learned = pseudo_labels.thresholds(total, self.floor)

    def restore(self, learned: Tensor) -> None:
        if learned.shape != (self.classes,) or learned.dtype is not torch.float32:
            raise ValueError(f"not one {self.surveys} for each of {self.classes} classes")
        self.learned = learned

    def remember(  # type: ignore[override]
        self, teacher: Output, labels: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        assert self.learned is not None, "the pass before the first epoch was left out"
        completed, shares = pseudo_labels.relabel(
            teacher.logits, labels, self.learned, self.classes, self.old_classes
        )
        return teacher.logits.clone() if self.distils else None, completed, shares

    def __call__(self, seen: Seen) -> Terms:
        old_logits, labels, shares = seen.remembered
        total, values = pixel_losses(
            self.terms, seen.student.logits, old_logits, labels,
            compiled=self.compiled, weights=shares,
        )  # fmt: skip
        return Terms(total, values)


class LocalPod(TermGroup):
    """PLOP's distillation of five feature maps and the logits (`methods/pod.py`).

    Args:
        factor: of the feature maps.
        logits_factor: of the logits.
        old_classes: C_old, background included.
        new_classes: N, classes of this step.
    """

    names = ("pod",)
    bodies = ("mod2", "mod3", "mod4", "mod5")
    maps = (*bodies, "pre_logits")
    asks_teacher = True

    def __init__(
        self, factor: float, logits_factor: float, old_classes: int, new_classes: int
    ) -> None:
        self.factors = [factor] * len(self.maps) + [logits_factor]
        self.old_classes, self.new_classes = old_classes, new_classes

    def remember(self, teacher: Output, labels: Tensor) -> list[Tensor]:
        # One at a time: each map's squares make room for the next one's.
        return [*map(pooled, self._features(teacher)), pooled(teacher.logits)]

    def __call__(self, seen: Seen) -> Terms:
        logits = fold_new_classes(seen.student.logits, self.old_classes)
        value = local_pod(
            [*self._features(seen.student), logits], seen.remembered, self.factors,
            self.old_classes, self.new_classes,
        )  # fmt: skip
        return Terms(value, {"pod": value.detach()})

    def _features(self, output: Output) -> Iterator[Tensor]:
        yield from (before_activation(output.maps[name]) for name in self.bodies)
        yield output.maps["pre_logits"]


class LabelGuidedDistillation(TermGroup):
    """LGKD's distillation at body resolution, on the data set's labels (`methods/features.py`)."""

    names = ("lgkd",)
    asks_teacher = True

    def __init__(self, weight_old: float, weight_new: float) -> None:
        self.weight_old, self.weight_new = weight_old, weight_new

    def remember(self, teacher: Output, labels: Tensor) -> Tensor:
        return teacher.logits.clone()

    def __call__(self, seen: Seen) -> Terms:
        value = label_guided_distillation(
            seen.student.logits, seen.remembered, seen.labels, self.weight_old, self.weight_new
        )
        return Terms(value, {"lgkd": value.detach()})


class FeatureDistillation(TermGroup):
    """ILT's distillation of the body's output (Michieli & Zanuttigh, ICCV workshops 2019)."""

    names = ("de",)
    maps = ("mod5",)
    asks_teacher = True

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def remember(self, teacher: Output, labels: Tensor) -> Tensor:
        return teacher.maps["mod5"].clone()

    def __call__(self, seen: Seen) -> Terms:
        value = self.weight * feature_distillation(seen.student.maps["mod5"], seen.remembered)
        return Terms(value, {"de": value.detach()})


def pixel_terms(method: Method, old_classes: int | None) -> dict[str, WeightedTerm]:
    """The named pixel terms of a method, each with its weight.

    `old_classes` is the number of channels of the teacher, background included, or None at step 0,
    where distillation does not exist and unbiased CE is CE. The first term classifies.
    """
    incremental = old_classes is not None
    terms: dict[str, WeightedTerm] = {}
    if method.icarl_disjoint and incremental:
        terms["icarl"] = WeightedTerm(loss.IcarlDisjoint(method.icarl_bkg), 1.0)
    elif method.bce:
        terms["bce"] = WeightedTerm(loss.binary_cross_entropy, 1.0)
    elif method.unce and old_classes is not None:
        terms["unce"] = WeightedTerm(loss.UnbiasedCrossEntropy(old_classes), 1.0)
    else:
        terms["ce"] = WeightedTerm(loss.cross_entropy, 1.0)
    if method.loss_kd > 0 and incremental:
        name, kind = (
            ("unkd", loss.UnbiasedKnowledgeDistillation)
            if method.unkd
            else ("kd", loss.KnowledgeDistillation)
        )
        terms[name] = WeightedTerm(kind(method.alpha), method.loss_kd)
    if method.icarl and not method.icarl_disjoint and incremental:
        terms["icarl"] = WeightedTerm(loss.icarl_combined, method.icarl_importance)
    return terms


def make_pixel_terms(setup: Setup) -> TermGroup:
    """The group that every method has."""
    terms = pixel_terms(setup.method, setup.old_classes)
    distils = bool({"kd", "unkd", "icarl"} & terms.keys())
    if setup.method.pseudo and setup.old_classes is not None and setup.training:
        return PseudoLabelled(terms, distils, setup)
    return PixelTerms(terms, distils, setup.compiled)


def make_feature_distillation(setup: Setup) -> TermGroup | None:
    if setup.old_classes is None or setup.method.loss_de <= 0:
        return None
    return FeatureDistillation(setup.method.loss_de)


def make_local_pod(setup: Setup) -> TermGroup | None:
    """Not in validations: those show plain losses on plain labels."""
    method, old = setup.method, setup.old_classes
    if old is None or not setup.training or not (method.pod or method.pod_logits):
        return None
    return LocalPod(method.pod, method.pod_logits, old, setup.new_classes)


def make_label_guided_distillation(setup: Setup) -> TermGroup | None:
    method = setup.method
    if setup.old_classes is None or not setup.training or not (method.lgkd_old or method.lgkd_new):
        return None
    return LabelGuidedDistillation(method.lgkd_old, method.lgkd_new)


# In the order in which their terms are added up.
GROUPS: tuple[Callable[[Setup], TermGroup | None], ...] = (
    make_pixel_terms,
    make_feature_distillation,
    make_local_pod,
    make_label_guided_distillation,
)
