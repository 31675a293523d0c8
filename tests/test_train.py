"""One iteration: order of the parts, what is left out, what is refused."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from engine.build import build_learner
from engine.plans import parse
from methods.groups import FeatureDistillation, PixelTerms
from methods.loss import UnbiasedCrossEntropy, UnbiasedKnowledgeDistillation, WeightedTerm
from methods.objective import Losses, Objective
from methods.regularizer import make_regularizers
from methods.table import Method
from modules.norm import get_norm
from segmentation_module import make_model
from train import Learner, TermLog, to_device
from utils.checkpoint import load_optimizer
from utils.errors import UserError
from utils.precision import Precision
from utils.scheduler import poly


class Quadratic:
    """An objective without images: total = sum of (w - 1)^2 / 2, so that its gradient is w - 1."""

    def __init__(self, model: nn.Module, factor: float = 1.0) -> None:
        self.model, self.factor = model, factor

    def __call__(self, images, labels) -> Losses:
        total = self.factor * (self.model.weight - 1).square().sum() / 2
        return Losses(total, {"ce": total.detach()}, images)


def learner_of(student: nn.Module, teacher: nn.Module, stored: dict) -> Learner:
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    method = Method(regularizer="ewc", reg_no_normalize=True, reg_importance=3.0)
    regularizers = make_regularizers(method, student, teacher, {"ewc": stored})
    precision = Precision(torch.device("cpu"))
    return Learner(student, optimizer, poly(optimizer, 10), precision, regularizers)


@pytest.fixture
def parts():
    """Student, teacher and the Fisher stored with the teacher; the student has moved since."""
    teacher = nn.Linear(3, 1, bias=False).double()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        teacher.weight.copy_(torch.tensor([[0.0, 2.0, -1.0]]))
        student.weight.copy_(torch.tensor([[0.5, 2.5, -1.0]]))
    fisher = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    return student, teacher, {"fisher": {"weight": fisher}}


def test_the_fisher_sees_the_gradient_of_the_data_alone(parts):
    """First the update, then the penalty's gradient, then the optimizer."""
    student, teacher, stored = parts
    before = student.weight.detach().clone()
    learner = learner_of(student, teacher, stored)
    terms = learner.step(Quadratic(student), torch.zeros(1), torch.zeros(1))
    data = before - 1
    fisher = stored["fisher"]["weight"]
    exported = learner.regularizer.export()["ewc"]["fisher"]["weight"]
    assert torch.allclose(exported, 0.9 * data**2 + 0.1 * fisher)
    penalty = 3.0 * (fisher * (before - teacher.weight) ** 2).sum()
    assert torch.allclose(terms["reg"], penalty)
    gradient = data + 3.0 * 2 * fisher * (before - teacher.weight)
    assert torch.allclose(student.weight, before - 0.1 * (gradient + 0.9 * gradient))


def test_an_overflow_is_left_out_of_the_update(parts):
    student, teacher, stored = parts
    learner = learner_of(student, teacher, stored)
    learner.precision = Precision(torch.device("cpu"), torch.float16)
    learner.step(Quadratic(student, float("inf")), torch.zeros(1), torch.zeros(1))
    exported = learner.regularizer.export()["ewc"]["fisher"]["weight"]
    assert torch.equal(exported, stored["fisher"]["weight"])


def test_terms_are_averaged_and_a_bad_one_is_named():
    log = TermLog(epoch=2, first=10)
    for value in (1.0, 3.0):
        log.add({"ce": torch.tensor(value), "kd": torch.tensor(2 * value)})
    assert log.drain() == {"ce": 2.0, "kd": 4.0}
    log.add({"ce": torch.tensor(1.0), "kd": torch.tensor(1.0)})
    log.add({"ce": torch.tensor(1.0), "kd": torch.tensor(float("nan"))})
    with pytest.raises(UserError, match=r"'kd' is nan in epoch 3, iteration 14"):
        log.drain()


def test_an_overflow_in_the_first_iteration_leaves_no_trace(monkeypatch):
    """A fused optimizer makes room for the momentum then, and writes nothing into it."""
    student = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("body", "head", "cls")})
    expected = copy.deepcopy(student)
    student.body, student.head, student.cls = student.values()
    ((opts, _),) = parse(["--lr", "0.1"])
    precision = Precision(torch.device("cpu"), torch.float16)
    context = SimpleNamespace(opts=opts, precision=precision)
    learner = build_learner(context, student, None, {}, 10)
    reference = torch.optim.SGD(
        expected.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    monkeypatch.setattr(torch, "empty_like", lambda t, **_: torch.full_like(t, 12345.0))
    for factor in (float("inf"), 1.0):
        for model in (student, expected):
            model.zero_grad()
            loss = factor * sum(p.square().sum() for p in model.parameters())
            (precision.scaler.scale(loss) if model is student else loss).backward()
        precision.scaler.step(learner.optimizer)
        precision.scaler.update()
    reference.step()
    torch.testing.assert_close(list(student.parameters()), list(expected.parameters()))


def test_an_optimizer_of_another_implementation_goes_on():
    model = nn.Linear(2, 2)
    optimizers = [
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=f) for f in (None, True)
    ]
    load_optimizer(optimizers[1], optimizers[0].state_dict())
    assert optimizers[1].param_groups[0]["fused"]


def test_a_momentum_in_another_memory_format_is_laid_out_as_its_weight():
    """A run on CUDA, where weights are channels_last, may go on on a CPU, where they are not."""
    there = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    here = copy.deepcopy(there).to(memory_format=torch.contiguous_format)
    optimizers = [
        torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, fused=True) for m in (there, here)
    ]
    image = torch.randn(1, 3, 3, 3)
    for _ in range(2):
        there(image).square().sum().backward()
        optimizers[0].step()
    here.load_state_dict(there.state_dict())
    load_optimizer(optimizers[1], optimizers[0].state_dict())
    for model, optimizer in zip((there, here), optimizers, strict=True):
        optimizer.zero_grad()
        model(image).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(here.weight, there.weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_an_iteration_on_cuda_waits_for_nothing(dtype):
    """From the images in pinned memory to the optimizer, but for what the first one prepares."""
    device = torch.device("cuda")
    student, teacher = (
        make_model("resnet18", get_norm("iabn"), classes, pooling=2)
        .to(device)
        .to(memory_format=torch.channels_last)
        for classes in ([16, 5], [16])
    )
    teacher.requires_grad_(False).eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, fused=True)
    precision = Precision(device, dtype)
    learner = Learner(student, optimizer, poly(optimizer, 10), precision)
    terms = {
        "unce": WeightedTerm(UnbiasedCrossEntropy(16), 1.0),
        "unkd": WeightedTerm(UnbiasedKnowledgeDistillation(), 10.0),
    }
    groups = [PixelTerms(terms, asks_teacher=True), FeatureDistillation(1.0)]
    objective = Objective(groups, student, teacher, precision)
    images = torch.zeros(2, 64, 64, 3, dtype=torch.uint8).permute(0, 3, 1, 2).pin_memory()
    labels = torch.zeros(2, 64, 64, dtype=torch.uint8).pin_memory()
    for i in range(3):
        torch.cuda.set_sync_debug_mode("error" if i == 2 else "default")
        try:
            ((x, y),) = to_device([(images, labels)], device)
            learner.step(objective, x, y)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(p.isfinite().all() for p in student.parameters())
