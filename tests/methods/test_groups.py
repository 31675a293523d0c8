"""Term groups: what they ask of the networks, and one added from outside."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

import run
from methods import groups
from methods.groups import GROUPS, Terms
from methods.objective import Objective, make_objective
from methods.table import METHODS, Method
from segmentation_module import Output
from tests.conftest import ROOT
from tests.test_run import SMALL, make_toy
from utils.precision import Precision

CPU = Precision(torch.device("cpu"))


class Network(torch.nn.Module):
    """Counts its calls and the maps that were asked of it."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(classes))
        self.asked: list[tuple[str, ...]] = []

    def forward(self, images, maps=()):
        self.asked.append(maps)
        logits = self.weight.view(1, -1, 1, 1) * images.mean(1, keepdim=True)
        return Output(logits, dict.fromkeys(maps, images))


@pytest.mark.parametrize("name", METHODS)
def test_teacher_and_maps_only_where_a_term_asks(name: str):
    method = replace(METHODS[name], pseudo=False)  # which needs a pass over the data first
    student, teacher = Network(5), Network(3)
    objective = make_objective(method, student, teacher, [3, 2], CPU)
    labels = torch.zeros(1, 4, 4, dtype=torch.uint8)
    losses = objective(torch.rand(1, 3, 4, 4), labels)
    assert tuple(losses.terms) == objective.names
    asks = any((method.loss_kd, method.loss_de, method.icarl, method.pod, method.lgkd_old))
    assert len(teacher.asked) == asks
    pod = ("mod2", "mod3", "mod4", "mod5", "pre_logits")
    assert student.asked == [pod if method.pod else ("mod5",) if method.loss_de else ()]


def test_no_teacher_at_step_0():
    for method in METHODS.values():
        objective = make_objective(method, Network(3), None, [3], CPU)
        assert objective.names in {("ce",), ("bce",)}


def inner_maps():
    """The class that docs/new_method.md shows."""
    page = (ROOT / "docs" / "new_method.md").read_text()
    (block,) = re.findall(r"```python\n(class InnerMaps.*?)```", page, re.S)
    names = {"TermGroup": groups.TermGroup, "Terms": Terms}
    exec(block, names)
    return names["InnerMaps"]()


def test_a_group_from_outside_trains_a_step(tmp_path, monkeypatch, capsys):
    def make(setup):
        wanted = setup.method.name == "INNER" and setup.old_classes is not None
        return inner_maps() if wanted else None

    monkeypatch.setattr(groups, "GROUPS", (*GROUPS, make))
    monkeypatch.setitem(METHODS, "INNER", Method("INNER", "a test"))
    monkeypatch.setattr("engine.plans.METHODS", METHODS)
    toy = make_toy(tmp_path / "toy")
    monkeypatch.chdir(tmp_path)
    argv = ["--data_root", str(toy), *SMALL, "--step", "all"]
    assert run.main([*argv, "--method", "FT,INNER"]) == 0
    assert re.search(r"epoch 1/1: loss \S+ \(ce \S+, inner \d", capsys.readouterr().out)
    tensors = [
        torch.load(tmp_path / f"checkpoints/step/voc-15-5-ov/{name}_1.pth")["model_state"][
            "body.mod2.block1.convs.conv1.weight"
        ]
        for name in ("FT", "INNER")
    ]
    assert not torch.equal(*tensors)


def test_an_objective_without_groups_only_predicts():
    losses = Objective([], Network(3), Network(3), CPU)(torch.rand(1, 3, 4, 4), torch.zeros(1))
    assert losses.terms == {}
