"""The methods: one `Method` each, which says everything that a method may set.

A field of `Method` is a command-line flag of the same name, made from the default, help and choices
that stand here. A method that recombines what exists is one more row of METHODS; a new loss term is
one class in `methods/groups.py` (or a pixel term in `methods/loss.py`) and one field here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from utils.errors import UserError
from utils.flags import flag, flags_of, number, several

REGULARIZERS = ("ewc", "rw", "pi")
_weight = number(float, 0)


def _identity(default: Any, help: str, **settings: Any) -> Any:
    """A field of a method: with another value a run is another run."""
    return flag(default, help, resume="identity", **settings)


@dataclass(frozen=True)
class Case:
    """What a method sets otherwise on one data set, or on one task of it."""

    values: Mapping[str, Any]
    dataset: str
    task: str | None = None  # canonical name; None: every task of the data set

    def covers(self, dataset: str, task: str) -> bool:
        return self.dataset == dataset and self.task in (None, task)


@dataclass(frozen=True)
class Method:
    """A method: the loss terms, the student's start and what is frozen, the regulariser.

    `at` gives the values for a data set and task; what runs has no `cases` left. `teacher=True`
    marks a field that does nothing at step 0, where there is no teacher.
    """

    name: str = "none"
    paper: str = ""
    bce: bool = _identity(False, "binary instead of softmax cross-entropy", negatable=True)
    unce: bool = _identity(False, "unbiased cross-entropy (MiB)", negatable=True)
    loss_kd: float = _identity(
        0.0, "weight of the output distillation", parse=_weight, teacher=True
    )
    unkd: bool = _identity(False, "output distillation is unbiased (MiB)", negatable=True)
    alpha: float = _identity(
        1.0, "factor on the teacher's logits in the distillation",
        parse=number(float, 0, open_low=True),
    )  # fmt: skip
    loss_de: float = _identity(
        0.0, "weight of the feature distillation (ILT)", parse=_weight, teacher=True
    )
    pod: float = _identity(
        0.0, "factor of local POD on five feature maps (PLOP)", parse=_weight, teacher=True
    )
    pod_logits: float = _identity(
        0.0, "factor of local POD on the logits (PLOP)", parse=_weight, teacher=True
    )
    pseudo: bool = _identity(
        False, "background takes the teacher's class where that is sure of it (PLOP)",
        negatable=True, teacher=True,
    )  # fmt: skip
    pseudo_floor: float = _identity(
        0.001, "least uncertainty of a class that --pseudo accepts", parse=_weight
    )
    lgkd_old: float = _identity(
        0.0, "weight of label-guided distillation where no new class is labelled (LGKD)",
        parse=_weight, teacher=True,
    )  # fmt: skip
    lgkd_new: float = _identity(
        0.0, "weight of label-guided distillation on new classes (LGKD)", parse=_weight,
        teacher=True,
    )  # fmt: skip
    ewf: bool = _identity(
        False, "freeze the old classifiers; after the step blend its weights with those of the "
        "step before (EWF)", negatable=True, teacher=True,
    )  # fmt: skip
    init_balanced: bool = _identity(
        False, "classifier initialisation of MiB", negatable=True, teacher=True
    )
    icarl: bool = _identity(False, "distillation of iCaRL beside BCE", negatable=True, teacher=True)
    icarl_importance: float = _identity(1.0, "weight of --icarl", parse=_weight)
    icarl_disjoint: bool = _identity(False, "iCaRL as one BCE with the teacher's targets")
    icarl_bkg: bool = _identity(False, "--icarl_disjoint, background keeps its label")
    regularizer: str | None = _identity(
        None, "penalty on changed weights: ewc, rw or pi; at step 0 also several, "
        "comma-separated, whose importances are collected", parse=several(REGULARIZERS),
    )  # fmt: skip
    reg_importance: float = _identity(1.0, "weight of the penalty", parse=_weight)
    reg_alpha: float = _identity(0.9, "update rate of the Fisher", parse=number(float, 0, 1))
    reg_iterations: int = _identity(10, "iterations between RW scores", parse=number(int, 1))
    reg_no_normalize: bool = _identity(False, "use importances as they are stored")
    fix_bn: bool = flag(False, "freeze statistics, weights and biases of all norms")
    freeze: bool = flag(False, "freeze the body")
    cases: tuple[Case, ...] = field(default=(), compare=False)

    def at(self, dataset: str, task: str) -> Method:
        """The method on a data set and task (canonical name): the values of its cases put in."""
        values = [case.values for case in self.cases if case.covers(dataset, task)]
        return replace(self, cases=(), **{k: v for each in values for k, v in each.items()})

    def flags(self) -> dict[str, Any]:
        """Every flag of a method with its value here."""
        return {name: getattr(self, name) for name in FLAGS}

    def completed(self) -> tuple[Method, list[str]]:
        """With what some fields imply, and a remark for each that was implied.

        iCaRL's variants build on each other and on binary cross-entropy.
        """
        method, notes = self, []
        for name, needed in pairwise(("icarl_bkg", "icarl_disjoint", "icarl", "bce")):
            if getattr(method, name) and not getattr(method, needed):
                implied: dict[str, Any] = {needed: True}
                method = replace(method, **implied)
                notes.append(f"--{name} implies --{needed}")
        return method, notes

    def check(self, step: int) -> None:
        """Raises UserError for values that contradict each other, or cannot be used at `step`."""
        conflicts = (
            (self.unce and self.bce,
             "--unce is a softmax loss, --bce (or --icarl) is not: drop one"),
            (self.pseudo and self.bce,
             "--pseudo needs softmax cross-entropy: drop --bce (or --icarl)"),
            (self.unkd and not self.loss_kd,
             "--unkd needs a weight: add --loss_kd W with W > 0"),
            (self.icarl_disjoint and self.icarl_importance != 1 and self.name == NO_METHOD.name,
             "--icarl_disjoint is one loss without a weight: drop --icarl_importance"),
            (step > 0 and "," in (self.regularizer or ""),
             "several --regularizer can only collect at step 0: name one"),
        )  # fmt: skip
        for wrong, message in conflicts:
            if wrong:
                raise UserError(message)

    def idle_at_step_0(self) -> list[str]:
        """The fields in use that do nothing without a teacher."""
        needing = (entry for entry in flags_of(self) if entry.metadata.get("teacher"))
        return [entry.name for entry in needing if getattr(self, entry.name)]

    def at_step_0(self) -> Method:
        """What is left of the method at step 0, without its name and its regulariser.

        Methods for which this is equal can start from one and the same step 0: distillation needs
        a teacher, unbiased cross-entropy without old classes is cross-entropy, and a regulariser
        then only collects importances.
        """
        kept = ("bce", "fix_bn", "freeze")
        return Method(**{name: getattr(self, name) for name in kept})


FLAGS = tuple(f.name for f in flags_of(Method))
NO_METHOD = Method()  # without --method: the flags alone say what is computed

_PLOP: dict[str, Any] = {
    "pod": 0.01, "pod_logits": 0.0005, "pseudo": True, "init_balanced": True,
}  # fmt: skip
_PLOP_CASES = (Case({"pod": 0.001, "pod_logits": 0.00001}, "ade"),)

_ROWS = (
    Method("FT", "fine-tuning, the lower bound"),
    Method("LWF", "Li & Hoiem, Learning without Forgetting, ECCV 2016", loss_kd=100),
    Method(
        "LWF-MC", "Rebuffi et al., iCaRL, CVPR 2017 (its multi-class LwF)",
        bce=True, icarl=True, icarl_importance=10,
    ),
    Method(
        "ILT", "Michieli & Zanuttigh, Incremental Learning Techniques, ICCV workshops 2019",
        loss_kd=100, loss_de=100,
    ),
    Method(
        "EWC", "Kirkpatrick et al., Elastic Weight Consolidation, PNAS 2017",
        regularizer="ewc", reg_importance=500,
    ),
    Method(
        "RW", "Chaudhry et al., Riemannian Walk, ECCV 2018",
        regularizer="rw", reg_importance=100,
    ),
    Method(
        "PI", "Zenke et al., Path Integral / Synaptic Intelligence, ICML 2017",
        regularizer="pi", reg_importance=500,
    ),
    Method(
        "MIB", "Cermelli et al., Modeling the Background, CVPR 2020",
        unce=True, unkd=True, loss_kd=10, init_balanced=True,
        cases=(Case({"loss_kd": 100}, "voc", "15-5s"),),
    ),
    Method(
        "PLOP", "Douillard et al., Learning without Forgetting for Continual Semantic "
        "Segmentation, CVPR 2021", **_PLOP, cases=_PLOP_CASES,
    ),
    Method(
        "MIB+EWF", "Xiao et al., Endpoints Weight Fusion, CVPR 2023, on MiB",
        unce=True, unkd=True, loss_kd=10, init_balanced=True, ewf=True,
        cases=(
            Case({"loss_kd": 100}, "ade", "100-10"), Case({"loss_kd": 100}, "ade", "100-5"),
        ),
    ),
    Method(
        "PLOP+EWF", "Xiao et al., Endpoints Weight Fusion, CVPR 2023, on PLOP",
        **_PLOP, ewf=True, cases=_PLOP_CASES,
    ),
    Method(
        "PLOP+LGKD", "Yang et al., Label-guided Knowledge Distillation, ICCV 2023, on PLOP",
        **_PLOP, lgkd_old=5, lgkd_new=1,
        cases=(
            *_PLOP_CASES,
            Case({"lgkd_old": 1, "lgkd_new": 0}, "voc", "15-5s"),
            Case({"lgkd_old": 5, "lgkd_new": 0.5}, "voc", "19-1"),
            Case({"lgkd_old": 1, "lgkd_new": 1}, "ade", "100-10"),
            Case({"lgkd_old": 1, "lgkd_new": 20}, "ade", "100-50"),
            Case({"lgkd_old": 2, "lgkd_new": 10}, "ade", "50"),
        ),
    ),
)  # fmt: skip
METHODS: dict[str, Method] = {method.name: method for method in _ROWS}
