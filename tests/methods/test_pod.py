"""Local POD against values and gradients of the official code (tests/golden2/plop_pod.npz)."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from methods.pod import before_activation, fold_new_classes, local_pod, pooled
from tests.conftest import GOLDEN2
from tests.reference import SEED

FACTORS = {"voc": [0.01] * 5 + [0.0005], "ade": [0.001] * 5 + [0.00001]}
CASES = ["w8", "w9", "w10", "h10w8", "h7w8", "half_equal"]


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN2 / "plop_pod.npz"))


def maps(golden, case: str, side: str) -> list[Tensor]:
    """The six maps of the recipe, float64."""
    h, w, old, new = golden[f"{case}_size"]
    classes = old + new if side == "student" else old
    shapes = [(2, 4 * h, 4 * w), (3, 2 * h, 2 * w), (4, h, w), (5, h, w), (6, h, w)]
    made = []
    for i, shape in enumerate([*shapes, (classes, h, w)], 1):
        address = f"{SEED}:pod/{case}/{side}/{i}".encode()
        g = torch.Generator().manual_seed(zlib.crc32(address))
        made.append(torch.randn(2, *shape, generator=g).double())
    if case == "half_equal" and side == "student":
        for student, teacher in zip(made, maps(golden, case, "teacher"), strict=True):
            student[0] = 0
            student[0, : teacher.shape[1]] = teacher[0]
    return made


def pod(golden, case: str, data: str, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """The term from raw maps: pooled teacher, student's new classes folded."""
    old, new = (int(n) for n in golden[f"{case}_size"][2:])
    remembered = [pooled(x) for x in teacher]
    student = [*student[:-1], fold_new_classes(student[-1], old)]
    return local_pod(student, remembered, FACTORS[data], old, new)


@pytest.mark.parametrize("case", CASES)
def test_the_recipe(golden, case):
    sums = [[x.sum().item() for x in maps(golden, case, side)] for side in ("teacher", "student")]
    np.testing.assert_allclose(sums, golden[f"{case}_input_sums"], rtol=1e-10)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("data", FACTORS)
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients(golden, case, data, dtype, rtol):
    student = [x.to(dtype).requires_grad_() for x in maps(golden, case, "student")]
    teacher = [x.to(dtype) for x in maps(golden, case, "teacher")]
    value = pod(golden, case, data, student, teacher)
    gradients = [g.double() for g in torch.autograd.grad(value, student)]

    assert value.dtype == dtype
    np.testing.assert_allclose(value.item(), golden[f"{case}_{data}_value"], rtol=rtol)
    norms = np.array([g.flatten(1).norm(dim=1).numpy() for g in gradients])
    np.testing.assert_allclose(norms, golden[f"{case}_{data}_grad_norms"], rtol=rtol)
    sums = np.array([g.flatten(1).sum(1).numpy() for g in gradients])
    atol = rtol * max(g.abs().max() * g[0].numel() for g in gradients)
    np.testing.assert_allclose(sums, golden[f"{case}_{data}_grad_sums"], rtol=0, atol=atol)
    for i, gradient in enumerate(gradients, 1):
        if f"{case}_{data}_grad{i}" in golden:
            expected = golden[f"{case}_{data}_grad{i}"]
            assert np.abs(gradient.numpy() - expected).max() <= rtol * np.abs(expected).max()
    if case == "half_equal":
        assert not any(g[0].any() for g in gradients)


@pytest.mark.parametrize("data", FACTORS)
@pytest.mark.parametrize("case", CASES)
def test_each_map_alone(golden, case, data):
    """Only one map differs from the teacher's, whose logits have no new classes: zeros."""
    student, teacher = (maps(golden, case, side) for side in ("student", "teacher"))
    padding = [0, 0, 0, 0, 0, student[-1].shape[1] - teacher[-1].shape[1]]
    for i, expected in enumerate(golden[f"{case}_{data}_terms"]):
        mixed = [*teacher[:-1], F.pad(teacher[-1], padding)]
        mixed[i] = student[i]
        value = pod(golden, case, data, mixed, teacher)
        assert value.item() == pytest.approx(expected, rel=1e-10)


def test_folding_leaves_a_teacher_alone(golden):
    logits = maps(golden, "w8", "teacher")[-1]
    assert torch.equal(fold_new_classes(logits, logits.shape[1]), logits)


def test_before_activation_inverts_value_and_gradient():
    u = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    u.requires_grad_()
    back = before_activation(F.leaky_relu(u, 0.01))
    torch.testing.assert_close(back, u, rtol=1e-14, atol=0)
    expected = torch.autograd.grad(pooled(u).square().sum(), u)[0]
    actual = torch.autograd.grad(pooled(back).square().sum(), u)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_squares_of_half_types_do_not_overflow(autocast):
    x = torch.full((1, 2, 4, 4), 300.0).half()
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        result = pooled(x)
        value = local_pod([x], [torch.zeros_like(result)], [1.0], 2, 1)
    assert result.shape == (1, 14 * 2 * 4)
    assert result.dtype == value.dtype == torch.float32
    assert torch.equal(result, torch.full_like(result, 9e4))
    assert value.item() == pytest.approx(3**0.5 * 9e4 * (14 * 2 * 4) ** 0.5)


@pytest.mark.parametrize(("size", "scale"), [((4, 3), 4), ((6, 8), 4), ((2, 4), 2)])
def test_maps_too_small_for_the_squares_are_refused(size, scale):
    message = f"a map of {size[0]} x {size[1]} has no {scale} x {scale} squares"
    with pytest.raises(ValueError, match=message):
        pooled(torch.zeros(1, 1, *size))


def test_a_list_of_another_length_is_refused(golden):
    student = maps(golden, "w8", "teacher")
    with pytest.raises(ValueError, match="shorter"):
        local_pod(student, [pooled(x) for x in student[:-1]], FACTORS["voc"], 4, 3)
