"""What precision a run computes in, and that a run may go on in another."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from engine import build
from engine.build import build_learner, tune_convolutions
from engine.plans import parse
from engine.resume import restore
from engine.session import use_true_float32
from modules.norm import get_norm
from utils import distributed
from utils.precision import Precision


def learner_of(dtype: torch.dtype | None):
    student = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("body", "head", "cls")})
    student.body, student.head, student.cls = student.values()
    ((opts, _),) = parse([])
    precision = Precision(torch.device("cpu"), dtype)
    return build_learner(SimpleNamespace(opts=opts, precision=precision), student, None, {}, 10)


def content_of(learner) -> dict:
    return {
        "model_state": learner.model.state_dict(), "epoch": 0, "iteration": 0, "best_score": 0.0,
        "optimizer_state": learner.optimizer.state_dict(), "total_iterations": 0,
        "scheduler_state": learner.scheduler.state_dict(), "random_state": torch.get_rng_state(),
        "scaler_state": learner.precision.scaler.state_dict(), "iterations_per_epoch": 10,
        "options": parse([])[0].opts.record(),
    }  # fmt: skip


@pytest.mark.parametrize("before", [torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize("after", [torch.bfloat16, torch.float16, None])
def test_a_run_goes_on_in_another_precision(before, after):
    written, read = learner_of(before), learner_of(after)
    if before is torch.float16:
        written.precision.scaler.load_state_dict(
            written.precision.scaler.state_dict() | {"scale": 512.0}
        )
    restore(content_of(written), read, {"iterations_per_epoch": 10}, parse([])[0].opts)
    kept = before is after is torch.float16
    fresh = 2.0**16 if after is torch.float16 else 1.0
    assert read.precision.scaler.get_scale() == (512.0 if kept else fresh)


def test_float32_is_no_tf32_in_products_and_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        use_true_float32()
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("deterministic", [False, True])
def test_convolutions_are_tuned_in_training_alone(deterministic, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    context = SimpleNamespace(opts=SimpleNamespace(deterministic=deterministic, crop_val=True))
    tune_convolutions(context, training=True)
    assert torch.backends.cudnn.benchmark is not deterministic
    tune_convolutions(context, training=False)
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize(
    ("world", "norm", "warned"), [(1, "iabn_sync", 0), (2, "iabn_sync", 1), (2, "iabn", 0)]
)
def test_compiling_norms_that_synchronise_is_warned_of(world, norm, warned, monkeypatch, caplog):
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    opts = SimpleNamespace(compile=True, norm_act=norm)
    with caplog.at_level(logging.WARNING):
        build.warn_of_broken_graphs(opts, nn.Sequential(get_norm(norm)(3)))
    assert len(caplog.records) == warned
