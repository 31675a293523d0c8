from __future__ import annotations

import json

import pytest
import torch

from tests.conftest import GOLDEN
from utils.scheduler import make_scheduler


def rates(policy: str, iterations: int, lr: float, **settings) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    options = {"power": 0.9, "decay_step": 3, "decay_factor": 0.1} | settings
    scheduler = make_scheduler(optimizer, policy, iterations, **options)
    seen = []
    for _ in range(iterations):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return [*seen, optimizer.param_groups[0]["lr"]]


def test_poly_agrees_with_the_official_code():
    golden = json.loads((GOLDEN / "poly_lr.json").read_text())
    found = rates("poly", golden["max_iters"], golden["base_lr"], power=golden["power"])
    assert found[:-1] == pytest.approx(golden["lr_at_iteration"], rel=1e-12, abs=1e-15)
    assert found[-1] == 0


def test_step_policy_decays_every_few_iterations():
    assert rates("step", 7, 1.0) == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01])
