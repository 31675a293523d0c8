"""Regularisers: resume, what they refuse, and the order that the trajectories rely on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from methods.regularizer import EWC, PI, RW, Regularizers, make_regularizers
from methods.table import Method
from utils.errors import UserError


def model(seed: int, outputs: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.ModuleDict({"body": nn.Linear(4, 5), "cls": nn.Linear(5, outputs)}).double()


def build(kind: str, student: nn.Module, teacher: nn.Module | None, earlier=None, interval=2):
    method = Method(regularizer=kind, reg_iterations=interval)
    return make_regularizers(method, student, teacher, {kind: earlier}).parts[kind]


def iterate(student: nn.Module, regularizer, seed: int) -> None:
    """One iteration with random data: backward, update, move the weights."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 4, generator=g, dtype=torch.float64)
    student.zero_grad()
    student["cls"](student["body"](x).tanh()).square().mean().backward()
    regularizer.update()
    with torch.no_grad():
        for p in student.parameters():
            p -= 0.05 * p.grad


def trained(kind: str, iterations: int = 5):
    student = model(0)
    regularizer = build(kind, student, None)
    for i in range(iterations):
        iterate(student, regularizer, i)
    return student, regularizer.export()


@pytest.mark.parametrize("kind", ["ewc", "pi", "rw"])
def test_no_penalty_at_step_0(kind: str):
    assert build(kind, model(0), None).add_penalty_gradient(1.0) is None


@pytest.mark.parametrize("kind", ["ewc", "pi", "rw"])
def test_resume_within_a_step_changes_nothing(kind: str):
    teacher, earlier = trained(kind)
    whole_model = copy.deepcopy(teacher)
    whole = build(kind, whole_model, teacher, earlier)
    for i in range(7):
        iterate(whole_model, whole, 10 + i)

    part_model = copy.deepcopy(teacher)
    part = build(kind, part_model, teacher, earlier)
    for i in range(3):
        iterate(part_model, part, 10 + i)
    state = copy.deepcopy(part.state_dict())
    resumed_model = model(9)
    resumed = build(kind, resumed_model, teacher, earlier)
    resumed_model.load_state_dict(part_model.state_dict())
    resumed.load_state_dict(state)
    for i in range(3, 7):
        iterate(resumed_model, resumed, 10 + i)

    for name, tensors in whole.export().items():
        for key, tensor in tensors.items():
            assert torch.equal(resumed.export()[name][key], tensor), (name, key)


@pytest.mark.parametrize("kind", ["ewc", "pi", "rw"])
def test_penalty_gradient_is_added_to_the_data_gradient(kind: str):
    teacher, earlier = trained(kind)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for p in student.parameters():
            p += torch.rand_like(p)
    regularizer = build(kind, student, teacher, earlier)
    iterate(student, regularizer, 3)
    data = [p.grad.clone() for p in student.parameters()]
    value = regularizer.add_penalty_gradient(7.0)
    now, old = dict(student.named_parameters()), dict(teacher.named_parameters())
    weights = regularizer.importance
    penalty = 7.0 * sum((w * (now[k] - old[k].detach()) ** 2).sum() for k, w in weights.items())
    expected = torch.autograd.grad(penalty, list(student.parameters()))
    for p, d, e in zip(student.parameters(), data, expected, strict=True):
        assert torch.allclose(p.grad, d + e, rtol=1e-12)
    assert value.item() == pytest.approx(penalty.item(), rel=1e-12)
    assert value > 0


def test_ewc_penalty_by_hand():
    """F = 0.9 g^2 + 0.1, scaled to [0, 1], times the squared distance."""
    teacher = nn.Linear(2, 1, bias=False).double()
    first = EWC(teacher, None)
    teacher.weight.grad = torch.tensor([[1.0, 3.0]], dtype=torch.float64)
    first.update()
    stored = first.export()
    assert torch.allclose(stored["fisher"]["weight"], torch.tensor([[1.0, 8.2]]).double())
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.weight += torch.tensor([[5.0, 2.0]])
    scaled = EWC(student, teacher, stored).add_penalty_gradient(1.0)
    assert scaled.item() == pytest.approx(4.0, rel=1e-7)
    raw = EWC(student, teacher, stored, normalize=False).add_penalty_gradient(1.0)
    assert raw.item() == pytest.approx(25 * 1.0 + 4 * 8.2)


def test_pi_score_by_hand():
    """Delta = g (theta_prev - theta), over the squared way from the start, never negative."""
    model = nn.Linear(2, 1, bias=False).double()
    pi = PI(model, None)
    for gradient, move in (([1.0, 1.0], [-1.0, 1.0]), ([2.0, 2.0], [-1.0, 1.0])):
        model.weight.grad = torch.tensor([gradient], dtype=torch.float64)
        pi.update()
        with torch.no_grad():
            model.weight += torch.tensor([move])
    # The second update sees moves of -1 and +1 with gradient 2; the third never comes.
    assert torch.allclose(pi.export()["score"]["weight"], torch.tensor([[2 / 4, 0.0]]).double())


def test_rw_scores_every_interval_before_the_fisher_moves():
    model = nn.Linear(1, 1, bias=False).double()
    rw = RW(model, None, interval=2)
    for gradient in (1.0, 5.0, 2.0):
        model.weight.grad = torch.tensor([[gradient]], dtype=torch.float64)
        rw.update()
        with torch.no_grad():
            model.weight -= 1.0
    fisher = 0.9 * 25 + 0.1 * (0.9 * 1 + 0.1)  # as it was before the third call
    expected = 2.0 * 2.0 / (0.5 * fisher * 4.0 + 1e-8)
    assert rw.export()["score"]["weight"].item() == pytest.approx(expected, rel=1e-12)


def test_rw_averages_with_the_earlier_score():
    teacher, earlier = trained("rw")
    student = copy.deepcopy(teacher)
    exported = build("rw", student, teacher, earlier).export()
    for key, score in earlier["score"].items():
        assert torch.equal(exported["score"][key], 0.5 * score)


def test_frozen_parameters_keep_their_importance():
    teacher, earlier = trained("ewc")
    student = copy.deepcopy(teacher)
    student["body"].requires_grad_(False)
    regularizer = build("ewc", student, teacher, earlier)
    iterate_frozen = torch.ones(1, 4, dtype=torch.float64)
    student["cls"](student["body"](iterate_frozen)).sum().backward()
    regularizer.update()
    assert regularizer.add_penalty_gradient(1.0) is not None
    exported = regularizer.export()["fisher"]
    assert torch.equal(exported["body.weight"], earlier["fisher"]["body.weight"])
    assert not torch.equal(exported["cls.weight"], earlier["fisher"]["cls.weight"])


@pytest.mark.parametrize("kind", ["ewc", "pi", "rw"])
def test_importances_that_do_not_fit_are_refused(kind: str):
    teacher, earlier = trained(kind)
    with pytest.raises(UserError, match="--regularizer"):
        build(kind, model(1), teacher, None)
    broken = {name: dict(tensors) for name, tensors in earlier.items()}
    for tensors in broken.values():
        del tensors["body.weight"]
    with pytest.raises(UserError, match=r"body\.weight"):
        build(kind, model(1), teacher, broken)


@pytest.mark.parametrize("kind", ["ewc", "pi", "rw"])
def test_an_overflow_leaves_the_state_and_its_absence_changes_nothing(kind: str):
    states = []
    for overflow in (None, torch.zeros(()), torch.ones(())):
        student = model(0)
        student["body"].weight.data = student["body"].weight.data.T.contiguous().T  # another layout
        part = build(kind, student, None, interval=1)
        group = Regularizers({kind: part}, 1.0)
        for i in range(3):
            iterate(student, group, i)
        before = copy.deepcopy(part.state_dict())
        for p in student.parameters():
            p.grad.fill_(float("inf") if overflow else 2.0)
        group.update(overflow)
        states.append(part.state_dict())
    for name in part.tensors:
        for key in before[name]:
            assert torch.equal(states[0][name][key], states[1][name][key])
            assert torch.equal(states[2][name][key], before[name][key])


def test_one_step_0_collects_for_all_what_each_would_alone():
    student = model(0)
    method = Method(regularizer="ewc,pi,rw", reg_iterations=2, reg_importance=500)
    together = make_regularizers(method, student, None, None)
    for i in range(5):
        iterate(student, together, i)
        assert together.add_penalty_gradient() == {}
    for kind, exported in together.export().items():
        _, alone = trained(kind)
        for name, tensors in alone.items():
            assert all(torch.equal(v, exported[name][k]) for k, v in tensors.items())
