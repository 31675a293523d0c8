"""Two steps of four iterations with every method, against the official code, in float64.

Each case runs twice. With the losses on full-size logits, as the reference has them, all figures
agree to the tolerances of the reference numbers, LWF-MC's to the last bit. As the program
computes them, in pieces, sums are taken in another order, 1e-15 apart, which this chaotic problem
blows up: all eight losses still keep the tolerances, the weights after the last step need not.
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
from tests.reference import batch, fill
from train import Learner
from utils.precision import Precision
from utils.scheduler import poly

TRAJECTORIES = json.loads((GOLDEN / "trajectories.json").read_text())
# The inplace-abn package holds these two as float32.
PACKAGE_CONSTANTS = {"slope": float(np.float32(0.01)), "eps": float(np.float32(1e-5))}
CLASSIFICATION = ("ce", "unce", "bce")
RTOL = [1e-6] * 6 + [1e-4, 5e-3]


def norm_of(name: str):
    return partial(get_norm(name), **PACKAGE_CONSTANTS) if name == "iabn" else get_norm(name)


def run_step(flags, norm, classes, labels, first_batch, previous=None):
    """Four iterations of one step; returns the student, [classification, rest] rows, its export."""
    step = len(classes) - 1
    argv = ["--task", "19-1", "--step", str(step), "--reg_iterations", "1", *flags]
    ((opts, _),) = parse(argv)
    build = partial(make_model, "resnet18", norm_of(norm), pooling=4)
    student = build(classes)
    fill(student)
    student.double()
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


@lru_cache
def first_step(classification: str, norm: str, logits: str, threads: int):
    """Step 0, which depends on the method in nothing but its classification loss."""
    return run_step([classification, "--regularizer", "ewc,rw,pi"], norm, [4], [0, 1, 2, 3], 0)


@pytest.fixture
def threads(logits: str):
    """The weights at the end agree on two threads alone, on which the reference ran."""
    before = torch.get_num_threads()
    torch.set_num_threads(2 if logits == "full size" else 1)
    yield torch.get_num_threads()
    torch.set_num_threads(before)


@pytest.mark.xdist_group("trajectories")
@pytest.mark.parametrize("logits", ["full size", "in pieces"])
@pytest.mark.parametrize("case", sorted(TRAJECTORIES))
def test_trajectory(case: str, logits: str, monkeypatch, threads: int):
    if logits == "full size":
        monkeypatch.setattr(groups, "pixel_losses", full_size_losses)
    golden, (method, norm) = TRAJECTORIES[case], case.split("/")
    classification = "--bce" if METHODS[method].bce else "--no_bce"
    first = first_step(classification, norm, logits, threads)
    check_stored(case, golden, first.exported.get(METHODS[method].regularizer))
    second = run_step(["--method", method], norm, [4, 3], [0, 4, 5, 6], 100, first)

    expected = np.array(golden["step0"] + golden["step1"])
    actual = np.array(first.rows + second.rows)
    deviation = np.abs(actual - expected) / np.maximum(np.abs(expected), 1e-12)
    deviation[(np.abs(actual) < 1e-9) & (np.abs(expected) < 1e-9)] = 0
    print(f"trajectories.json {case}, {logits}: relative deviation {deviation.max(1)}")
    assert (deviation.max(1) <= RTOL).all()

    if logits == "full size":
        check_final(golden, second.student)


def check_final(golden: dict, student) -> None:
    """Biases, a running mean and the norm of all parameters at the end of step 1."""
    state = student.state_dict()
    for key in ("cls.0.bias", "cls.1.bias"):
        np.testing.assert_allclose(state[key].numpy(), golden[key], rtol=1e-4)
    np.testing.assert_allclose(
        state["head.red_bn.running_mean"][:8].numpy(), golden["head.red_bn.running_mean[:8]"],
        rtol=1e-2,
    )  # fmt: skip
    squares = sum(float(p.detach().square().sum()) for p in student.parameters())
    np.testing.assert_allclose(squares**0.5, golden["param_l2_norm"], rtol=1e-4)


def check_stored(case: str, golden: dict, exported: dict | None) -> None:
    """Figures of the Fisher and the scores that step 0 stores."""
    named = [key for key in golden if key.startswith("step0_")]
    assert bool(named) == (exported is not None)
    for name in named:
        kind, key = name.removeprefix("step0_").rstrip("]").split("[")
        key = key if key.startswith(("body.", "head.", "cls.")) else f"body.{key}"
        tensor = exported[kind.removesuffix("_sum")][key]
        actual = tensor.sum() if kind.endswith("_sum") else tensor
        deviation = np.abs(actual.numpy() / np.array(golden[name]) - 1)
        print(f"trajectories.json {case} {name}: relative deviation {np.nanmax(deviation):.1e}")
        np.testing.assert_allclose(actual.numpy(), golden[name], rtol=1e-5)
