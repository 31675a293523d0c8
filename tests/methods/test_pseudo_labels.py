"""Histograms, thresholds and labels against the official code (tests/golden2/plop_*.npz)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from methods.pseudo_labels import histogram, relabel, thresholds, uncertainty
from tests.conftest import GOLDEN2
from tests.methods.test_pieces import LargestTensor, upsample
from utils.constants import IGNORE_INDEX

THRESHOLDS = dict(np.load(GOLDEN2 / "plop_thresholds.npz"))
LABELS = dict(np.load(GOLDEN2 / "plop_labels.npz"))
CASES = sorted(key.removesuffix("_histogram") for key in THRESHOLDS if key.endswith("_histogram"))


def tensors(golden, case: str, *names: str):
    return [torch.from_numpy(golden[f"{case}_{name}"]) for name in names]


@pytest.mark.parametrize("piece_size", [500, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_histogram(case, dtype, piece_size):
    logits, labels, classes = tensors(THRESHOLDS, case, "logits", "labels", "classes")
    classes_total = int(classes.sum())
    batches = zip(logits.to(dtype), labels, strict=True)
    counts = sum(histogram(x, y, classes_total, piece_size) for x, y in batches)
    assert counts.dtype == torch.int64
    assert np.array_equal(counts.numpy(), THRESHOLDS[f"{case}_histogram"])


@pytest.mark.parametrize("case", CASES)
def test_thresholds(case):
    counts, expected = tensors(THRESHOLDS, case, "histogram", "thresholds")
    actual = thresholds(counts.long(), float(THRESHOLDS[f"{case}_floor"]))
    assert actual.dtype == torch.float32
    finite = expected.isfinite()
    torch.testing.assert_close(actual[finite], expected[finite], rtol=1e-6, atol=0)
    # What replaces the others passes the same pixels: all that occur for +inf, none for NaN.
    v = torch.linspace(0, 0.999, 1000)[:, None]
    assert torch.equal(v < actual[~finite], v < expected[~finite])
    assert actual.isfinite().all()


def test_golden_visits_every_branch():
    found = np.concatenate([THRESHOLDS[f"{case}_thresholds"] for case in CASES])
    assert np.isposinf(found).any()
    assert np.isnan(found).any()
    assert (found == np.float32(0.001)).any()


def test_a_class_in_the_bin_that_is_never_looked_at_is_missed():
    counts = torch.zeros(2, 100, dtype=torch.int64)
    counts[:, 20] = 49_000
    counts[0, 29] = counts[1, 30] = 51_000
    missed, found = thresholds(counts).tolist()
    assert missed == 1.0
    assert 0.30 < found < 0.31


def test_uncertainty_of_the_least_and_the_most_certain():
    for old, total in ((2, 3), (16, 21)):
        unsure, sure = torch.zeros(1, old, 1, 1), torch.zeros(1, old, 1, 1)
        sure[:, 1] = 1e4
        assert uncertainty(unsure, total).item() == pytest.approx(1 / (old * math.log(total)))
        for dtype in (torch.float32, torch.float64):
            assert uncertainty(sure.to(dtype), total).item() == 0


@pytest.mark.parametrize("piece_size", [500, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_relabelling(case, dtype, piece_size):
    logits, labels, limits, classes = tensors(
        LABELS, case, "logits", "labels", "thresholds", "classes"
    )
    before = labels.clone()
    old, total = int(classes[0]), int(classes.sum())
    actual, nu = relabel(logits.to(dtype), labels, limits, total, old, piece_size)
    assert torch.equal(labels, before)
    assert (actual.dtype, nu.dtype) == (torch.uint8, torch.float32)
    assert np.array_equal(actual.numpy(), LABELS[f"{case}_relabelled"])
    np.testing.assert_allclose(nu.numpy(), LABELS[f"{case}_nu"], rtol=1e-6)


@pytest.mark.parametrize("stored", [0.0, 1.0])
def test_what_is_stored_for_nan_and_infinity_accepts_none_and_all(stored):
    logits, labels, limits, classes = tensors(
        LABELS, "b", "logits", "labels", "thresholds", "classes"
    )
    odd = limits.isnan() if stored == 0 else limits.isposinf()
    assert odd.any()
    old, total = int(classes[0]), int(classes.sum())
    expected = relabel(logits, labels, limits, total, old)
    actual = relabel(logits, labels, limits.masked_fill(odd, stored), total, old)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def test_autocast_and_half_logits_are_computed_in_float32():
    logits, labels, limits, _ = tensors(LABELS, "a", "logits", "labels", "thresholds", "classes")
    half = logits.bfloat16()
    expected = relabel(half.float(), labels, limits, 7, 4), histogram(half.float(), labels, 7)
    with torch.autocast("cpu", torch.bfloat16):
        actual = relabel(half, labels, limits, 7, 4), histogram(half, labels, 7)
    assert torch.equal(actual[0][0], expected[0][0])
    assert torch.equal(actual[1], expected[1])


def test_threads_change_nothing():
    logits, labels, limits, _ = tensors(LABELS, "a", "logits", "labels", "thresholds", "classes")
    one = relabel(logits, labels, limits, 7, 4, 500), histogram(logits, labels, 7, 500)
    torch.set_num_threads(2)
    try:
        two = relabel(logits, labels, limits, 7, 4, 500), histogram(logits, labels, 7, 500)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one[0][0], two[0][0])
    assert torch.equal(one[0][1], two[0][1])
    assert torch.equal(one[1], two[1])


def test_no_tensor_is_larger_than_a_piece():
    logits = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(2, 64, 64, dtype=torch.uint8)
    with LargestTensor() as largest:
        relabel(logits, labels, torch.full((7,), 0.1), 7, 4, piece_size=2000)
        histogram(logits, labels, 7, piece_size=2000)
    assert largest.elements <= 2000


def test_an_unsure_pixel_is_ignored_and_void_is_no_background():
    logits = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(1, 16, 16, dtype=torch.uint8)
    labels[:, :4], labels[:, 4:8] = IGNORE_INDEX, 5
    x = upsample(logits, (16, 16))
    v = uncertainty(x, 7)
    middle = v[:, 8:].median()
    actual, nu = relabel(logits, labels, torch.full((7,), float(middle)), 7, 4)
    assert torch.equal(actual[:, :8], labels[:, :8])
    expected = x.argmax(1).where(v < middle, IGNORE_INDEX)[:, 8:]
    assert torch.equal(actual[:, 8:].long(), expected)
    assert nu.item() == pytest.approx((expected != IGNORE_INDEX).float().mean().item())
