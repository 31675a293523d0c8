"""Two steps of four iterations with every method, against the official code, in float64.

Each case runs twice: with the losses on full-size logits, as the reference has them, and as the
program computes them, in pieces. Sums are taken in another order there, 1e-15 apart, which this
chaotic problem blows up: the losses are compared, the weights after the last step are not.
"""

from __future__ import annotations

import json
from functools import lru_cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.plans import parse
from methods import groups
from methods.objective import make_objective
from methods.regularizer import make_regularizers
from methods.start import start_student
from methods.table import METHODS
from modules.norm import get_norm
from segmentation_module import load_state, make_model
from tests.conftest import GOLDEN
from tests.reference import batch, check_figures, fill, final_figures, jolt
from train import Learner
from utils.precision import Precision
from utils.scheduler import poly

TRAJECTORIES = json.loads((GOLDEN / "trajectories.json").read_text())
# The inplace-abn package holds these two as float32.
PACKAGE_CONSTANTS = {"slope": float(np.float32(0.01)), "eps": float(np.float32(1e-5))}
CLASSIFICATION = ("ce", "unce", "bce")
# Relative; `stored` is what a regulariser keeps after step 0, the rest is seen after step 1.
RTOL = {
    "step 0": 1e-6,
    "step 1": np.array([[1e-6], [1e-6], [1e-4], [5e-3]]),
    "stored": 1e-5,
    "cls.0.bias": 1e-4,
    "cls.1.bias": 1e-4,
    "head.red_bn.running_mean[:8]": 1e-2,
    "param_l2_norm": 1e-4,
}


def norm_of(name: str):
    return partial(get_norm(name), **PACKAGE_CONSTANTS) if name == "iabn" else get_norm(name)


def run_step(flags, norm, classes, labels, first_batch, previous=None, seed=None):
    """Four iterations of one step; returns the student, [classification, rest] rows, its export.

    `seed` jolts the weights at the start.
    """
    step = len(classes) - 1
    argv = ["--task", "19-1", "--step", str(step), "--reg_iterations", "1", *flags]
    ((opts, _),) = parse(argv)
    build = partial(make_model, "resnet18", norm_of(norm), pooling=4)
    student = build(classes)
    fill(student)
    student.double()
    jolt(student, seed)
    teacher = None
    if previous is not None:
        teacher = build(classes[:-1]).double()
        load_state(teacher, previous.student.state_dict(), "", "")
        load_state(student, previous.student.state_dict(), "", "", may_miss=(f"cls.{step}.",))
        teacher.requires_grad_(False).eval()
    start_student(opts.method, student, step)
    optimizer = torch.optim.SGD(
        student.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True
    )
    exported = previous.exported if previous else None
    regularizer = make_regularizers(opts.method, student, teacher, exported)
    precision = Precision(torch.device("cpu"))
    learner = Learner(student, optimizer, poly(optimizer, 6), precision, regularizer)
    objective = make_objective(opts.method, student.train(), teacher, classes, precision)
    rows = []
    for i in range(4):
        images, y = batch(first_batch + i, labels)
        values = learner.step(objective, images.double(), y)
        data = sum(float(v) for k, v in values.items() if k in CLASSIFICATION)
        rows.append([data, sum(float(v) for v in values.values()) - data])
    exported = regularizer.export() if regularizer else None
    return SimpleNamespace(student=student, rows=rows, exported=exported)


def full_size_losses(terms, logits, old_logits, labels, compiled):
    """What `pixel_losses` computes, on logits upsampled as a whole."""
    size = labels.shape[1:]
    logits = F.interpolate(logits, size, mode="bilinear")
    old = F.interpolate(old_logits, size, mode="bilinear") if old_logits is not None else None
    values = {k: w * term(logits, old, labels).mean() for k, (term, w) in terms.items()}
    return sum(values.values()), {k: v.detach() for k, v in values.items()}


@lru_cache(maxsize=2)  # each holds a gigabyte
def first_step(classification: str, norm: str, logits: str, seed: int | None):
    """Step 0, which depends on the method in nothing but its classification loss."""
    flags = [classification, "--regularizer", "ewc,rw,pi"]
    return run_step(flags, norm, [4], [0, 1, 2, 3], 0, seed=seed)


@pytest.fixture
def _threads(logits: str):
    """Those on which the reference ran."""
    before = torch.get_num_threads()
    torch.set_num_threads(2 if logits == "full size" else 1)
    yield
    torch.set_num_threads(before)


@pytest.mark.xdist_group("trajectories")
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("logits", ["full size", "in pieces"])
@pytest.mark.parametrize("case", sorted(TRAJECTORIES))
def test_trajectory(case: str, logits: str, monkeypatch):
    if logits == "full size":
        monkeypatch.setattr(groups, "pixel_losses", full_size_losses)
    golden, (method, norm) = TRAJECTORIES[case], case.split("/")
    stored = [key for key in golden if key.startswith("step0_")]
    expected = {"step 0": golden["step0"], "step 1": golden["step1"]}
    expected |= {key: golden[key] for key in stored}
    if logits == "full size":
        expected |= {key: golden[key] for key in RTOL if key in golden}

    def figures(seed: int | None = None) -> dict:
        classification = "--bce" if METHODS[method].bce else "--no_bce"
        first = first_step(classification, norm, logits, seed)
        second = run_step(["--method", method], norm, [4, 3], [0, 4, 5, 6], 100, first)
        kept = first.exported.get(METHODS[method].regularizer)
        assert bool(stored) == (kept is not None)
        return {
            "step 0": first.rows, "step 1": second.rows, **final_figures(second.student),
            **{key: stored_figure(kept, key) for key in stored},
        }  # fmt: skip

    rtol = RTOL | dict.fromkeys(stored, RTOL["stored"])
    check_figures(f"{case}, {logits}", figures(), expected, rtol, figures, strict=("step 0",))


def stored_figure(kept: dict, name: str) -> torch.Tensor:
    """The tensor, or the sum of one, that a key such as `step0_fisher_sum[mod1…]` means."""
    kind, key = name.removeprefix("step0_").rstrip("]").split("[")
    key = key if key.startswith(("body.", "head.", "cls.")) else f"body.{key}"
    tensor = kept[kind.removesuffix("_sum")][key]
    return tensor.sum() if kind.endswith("_sum") else tensor
