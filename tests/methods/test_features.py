"""Distillation of maps: LGKD against the official code (tests/golden2/lgkd.npz), ILT's by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from methods.features import feature_distillation, label_guided_distillation
from tests.conftest import GOLDEN2
from utils.constants import IGNORE_INDEX

GOLDEN = dict(np.load(GOLDEN2 / "lgkd.npz"))
CASES = sorted(key.removesuffix("_value") for key in GOLDEN if key.endswith("_value"))


def test_feature_distillation():
    new = torch.tensor([1.0, 2.0, 4.0]).half().view(1, 3, 1, 1)
    old = torch.tensor([1.0, 0.0, 1.0]).half().view(1, 3, 1, 1)
    value = feature_distillation(new, old)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx((4 + 9) / 3)


def inputs(case: str, dtype: torch.dtype = torch.float64):
    logits, old_logits, labels = (
        torch.from_numpy(GOLDEN[f"{case}_{name}"]) for name in ("logits", "old_logits", "labels")
    )
    return logits.to(dtype).requires_grad_(), old_logits.to(dtype), labels


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", CASES)
def test_label_guided_distillation(case, dtype, rtol):
    logits, old_logits, labels = inputs(case, dtype)
    weights = GOLDEN[f"{case}_weights"].tolist()
    value = label_guided_distillation(logits, old_logits, labels, *weights)
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.dtype == dtype
    assert value.item() == pytest.approx(GOLDEN[f"{case}_value"].item(), rel=rtol)
    expected = GOLDEN[f"{case}_grad"]
    assert np.abs(gradient.numpy() - expected).max() <= rtol * np.abs(expected).max()


def test_labels_of_any_size_are_taken_at_the_nearest_index():
    logits, old_logits, labels = inputs("100-50")  # 3 x 5 logits, 48 x 80 labels
    expected = label_guided_distillation(logits, old_logits, labels[:, ::16, ::16], 1, 20)
    stretched = torch.full((2, 7, 13), IGNORE_INDEX, dtype=torch.uint8)
    stretched[:, [[0], [2], [4]], [0, 2, 5, 7, 10]] = labels[:, ::16, ::16]
    actual = label_guided_distillation(logits, old_logits, stretched, 1, 20)
    assert torch.equal(actual, expected)


def test_a_batch_without_labels_costs_nothing():
    logits, old_logits, labels = inputs("15-5")
    nothing = torch.full_like(labels, IGNORE_INDEX)
    value = label_guided_distillation(logits, old_logits, nothing, 5, 1)
    (gradient,) = torch.autograd.grad(value, logits)
    assert value == 0
    assert not gradient.any()


def test_half_types_are_raised():
    logits, old_logits, labels = inputs("15-5", torch.bfloat16)
    value = label_guided_distillation(logits, old_logits, labels, 5, 1)
    assert value.dtype == torch.float32
    assert value == label_guided_distillation(logits.float(), old_logits.float(), labels, 5, 1)
