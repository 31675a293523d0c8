"""Every loss against values and gradients of the official code (tests/golden/losses.npz)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from methods import loss
from methods.loss import PixelTerm, WeightedTerm
from methods.pieces import pixel_losses
from tests.conftest import GOLDEN
from utils.constants import IGNORE_INDEX

TOLERANCE = {"bce": 1e-5, "icarl_disjoint": 1e-5, "icarl_disjoint_bkg": 1e-5}  # others 1e-6


def term(name: str, old_classes: int) -> PixelTerm:
    terms: dict[str, PixelTerm] = {
        "ce": loss.cross_entropy,
        "unce": loss.UnbiasedCrossEntropy(old_classes),
        "kd_alpha1": loss.KnowledgeDistillation(),
        "kd_alpha2": loss.KnowledgeDistillation(alpha=2),
        "unkd_alpha1": loss.UnbiasedKnowledgeDistillation(),
        "unkd_alpha2": loss.UnbiasedKnowledgeDistillation(alpha=2),
        "bce": loss.binary_cross_entropy,
        "icarl_combined_unit": loss.icarl_combined,
        "icarl_disjoint": loss.IcarlDisjoint(),
        "icarl_disjoint_bkg": loss.IcarlDisjoint(keep_background=True),
    }
    return terms[name]


NAMES = [
    "ce", "unce", "kd_alpha1", "kd_alpha2", "unkd_alpha1", "unkd_alpha2", "bce",
    "icarl_combined_unit", "icarl_disjoint", "icarl_disjoint_bkg",
]  # fmt: skip


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "losses.npz"))


@pytest.fixture(scope="module")
def deviations() -> Iterator[dict[str, float]]:
    """Collects deviation / tolerance of each comparison and prints the largest at the end."""
    found: dict[str, float] = {}
    yield found
    worst = max(found, key=lambda key: found[key])
    print(f"\nlosses.npz: largest deviation {found[worst]:.2g} of its tolerance, {worst}")


def inputs(golden: dict[str, np.ndarray], case: str) -> tuple[Tensor, Tensor, Tensor]:
    logits, old_logits, labels = (
        torch.from_numpy(golden[f"{case}_{key}"]) for key in ("logits", "old_logits", "labels")
    )
    return logits.clone().requires_grad_(), old_logits, labels


@pytest.mark.parametrize("form", ["plain", "pieces"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_golden(golden, deviations, case, name, form):
    logits, old_logits, labels = inputs(golden, case)
    function = term(name, old_logits.shape[1])
    if form == "plain":
        value = function(logits, old_logits, labels).mean()
    else:
        terms = {name: WeightedTerm(function, 1.0)}
        value, _ = pixel_losses(terms, logits, old_logits, labels, piece_size=100)
    (gradient,) = torch.autograd.grad(value, logits)

    expected, expected_grad = golden[f"{case}_{name}"], golden[f"{case}_{name}_grad"]
    value_error = abs(value.item() - expected) / abs(expected)
    grad_error = np.abs(gradient.numpy() - expected_grad).max() / np.abs(expected_grad).max()
    tolerance = TOLERANCE.get(name, 1e-6)
    deviations[f"{case}_{name} ({form})"] = max(value_error, grad_error) / tolerance
    assert value_error <= tolerance
    assert grad_error <= tolerance


def test_golden_has_no_other_losses(golden):
    given = {"logits", "old_logits", "labels"}
    assert {key.partition("_")[2].removesuffix("_grad") for key in golden} == given | set(NAMES)


@pytest.mark.parametrize("name", ["ce", "unce", "bce"])
def test_classification_ignores_unlabelled_pixels(golden, name):
    logits, old_logits, labels = inputs(golden, "a")
    ignored = labels == IGNORE_INDEX
    losses = term(name, old_logits.shape[1])(logits, old_logits, labels)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert ignored.any()
    assert not losses[ignored].any()
    assert not gradient.movedim(1, -1)[ignored].any()


@pytest.mark.parametrize("name", ["kd_alpha1", "unkd_alpha1", "icarl_combined_unit"])
def test_distillation_looks_at_every_pixel(golden, name):
    logits, old_logits, labels = inputs(golden, "a")
    function = term(name, old_logits.shape[1])
    nothing = torch.full_like(labels, IGNORE_INDEX)
    assert torch.equal(function(logits, old_logits, labels), function(logits, old_logits, nothing))
    with pytest.raises(ValueError, match="teacher"):
        function(logits, None, labels)


@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits_stay_finite(name):
    logits = torch.tensor([[[[1e4]], [[-1e4]], [[3e4]]]]).requires_grad_()
    old_logits = torch.tensor([[[[-1e4]], [[1e4]]]])
    value = term(name, 2)(logits, old_logits, torch.ones(1, 1, 1, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
