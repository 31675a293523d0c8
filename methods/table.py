"""The methods: a row of loss weights each (SPEC section 7).

A ninth method that recombines existing terms is one more row. A new term is one class in
`methods/loss.py`, one field here and one line in `pixel_terms`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from methods import loss
from methods.loss import WeightedTerm


@dataclass(frozen=True)
class Method:
    """What a method sets; each field bears the name of the flag it stands for."""

    paper: str
    bce: bool = False
    unce: bool = False
    loss_kd: float = 0.0
    unkd: bool = False
    loss_de: float = 0.0
    icarl: bool = False
    icarl_importance: float = 1.0
    regularizer: str | None = None
    reg_importance: float = 1.0
    init_balanced: bool = False
    per_task: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def flags(self, task: str) -> dict[str, Any]:
        """Flag -> value of this row on a task (canonical name), the task's own values included."""
        row = {name: getattr(self, name) for name in FLAGS}
        return row | dict(self.per_task.get(task, {}))


FLAGS = tuple(f.name for f in fields(Method) if f.name not in ("paper", "per_task"))

METHODS: dict[str, Method] = {
    "FT": Method("fine-tuning, the lower bound"),
    "LWF": Method("Li & Hoiem, Learning without Forgetting, ECCV 2016", loss_kd=100),
    "LWF-MC": Method(
        "Rebuffi et al., iCaRL, CVPR 2017 (its multi-class LwF)",
        bce=True, icarl=True, icarl_importance=10,
    ),
    "ILT": Method(
        "Michieli & Zanuttigh, Incremental Learning Techniques, ICCV workshops 2019",
        loss_kd=100, loss_de=100,
    ),
    "EWC": Method(
        "Kirkpatrick et al., Elastic Weight Consolidation, PNAS 2017",
        regularizer="ewc", reg_importance=500,
    ),
    "RW": Method(
        "Chaudhry et al., Riemannian Walk, ECCV 2018", regularizer="rw", reg_importance=100
    ),
    "PI": Method(
        "Zenke et al., Path Integral / Synaptic Intelligence, ICML 2017",
        regularizer="pi", reg_importance=500,
    ),
    "MIB": Method(
        "Cermelli et al., Modeling the Background, CVPR 2020",
        unce=True, unkd=True, loss_kd=10, init_balanced=True,
        per_task={"15-5s": {"loss_kd": 100}},
    ),
}  # fmt: skip


def pixel_terms(opts: Any, old_classes: int | None) -> dict[str, WeightedTerm]:
    """Flags -> the named pixel terms of a step's objective, each with its weight.

    `old_classes` is the number of channels of the teacher, background included, or None at step 0,
    where distillation does not exist and unbiased CE is CE. The first term classifies.
    """
    incremental = old_classes is not None
    terms: dict[str, WeightedTerm] = {}
    if opts.icarl_disjoint and incremental:
        terms["icarl"] = WeightedTerm(loss.IcarlDisjoint(opts.icarl_bkg), 1.0)
    elif opts.bce:
        terms["bce"] = WeightedTerm(loss.binary_cross_entropy, 1.0)
    elif opts.unce and old_classes is not None:
        terms["unce"] = WeightedTerm(loss.UnbiasedCrossEntropy(old_classes), 1.0)
    else:
        terms["ce"] = WeightedTerm(loss.cross_entropy, 1.0)
    if opts.loss_kd > 0 and incremental:
        name, kind = (
            ("unkd", loss.UnbiasedKnowledgeDistillation)
            if opts.unkd
            else ("kd", loss.KnowledgeDistillation)
        )
        terms[name] = WeightedTerm(kind(opts.alpha), opts.loss_kd)
    if opts.icarl and not opts.icarl_disjoint and incremental:
        terms["icarl"] = WeightedTerm(loss.icarl_combined, opts.icarl_importance)
    return terms
