"""Term groups: the parts that an objective is a list of.

A group looks at a batch as student and teacher saw it and returns named, weighted scalars. Three
steps make a new one: a class here (or in a file of its own) that derives from `TermGroup`, a
function from `Setup` to the group or None in GROUPS, and a field of `methods.table.Method` for each
value that it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from methods import loss
from methods.features import feature_distillation
from methods.loss import WeightedTerm
from methods.pieces import pixel_losses
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
    """

    names: tuple[str, ...] = ()
    maps: tuple[str, ...] = ()
    asks_teacher: bool = False

    def remember(self, teacher: Output, labels: Tensor) -> Any:
        """What to keep of the teacher's output until the student has run, without gradient.

        Called before the student runs, so whatever is not kept makes room. What the teacher gave
        out cannot take part in a gradient, results of operations on it (or clones) can.
        """
        raise AssertionError("a group that asks the teacher says what it keeps")

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
    return PixelTerms(terms, distils, setup.compiled)


def make_feature_distillation(setup: Setup) -> TermGroup | None:
    if setup.old_classes is None or setup.method.loss_de <= 0:
        return None
    return FeatureDistillation(setup.method.loss_de)


# In the order in which their terms are added up.
GROUPS: tuple[Callable[[Setup], TermGroup | None], ...] = (
    make_pixel_terms,
    make_feature_distillation,
)
