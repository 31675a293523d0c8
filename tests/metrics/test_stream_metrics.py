"""Confusion matrix and scores against the reference and against a pixel-by-pixel count."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metrics.stream_metrics import StreamSegMetrics, score_rows, to_table

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "metrics.npz")


def golden_metrics(dtype: torch.dtype = torch.int64) -> StreamSegMetrics:
    metrics = StreamSegMetrics(int(GOLDEN["n_classes"]))
    for labels, predictions in zip(GOLDEN["labels"], GOLDEN["predictions"], strict=True):
        metrics.update(
            torch.from_numpy(labels)[None].to(dtype), torch.from_numpy(predictions)[None].to(dtype)
        )
    return metrics


def metrics_of(confusion: list[list[int]]) -> StreamSegMetrics:
    metrics = StreamSegMetrics(len(confusion))
    metrics.confusion.copy_(torch.tensor(confusion))
    return metrics


def test_the_reference_scores_are_reproduced():
    metrics = golden_metrics()
    assert metrics.confusion.dtype == torch.int64
    np.testing.assert_array_equal(metrics.confusion.numpy(), GOLDEN["confusion"])
    scores = metrics.scores()
    ours: dict[str, Any] = {
        "class_iou": scores.iou,
        "class_acc": scores.accuracy,
        "mean_iou": scores.with_background,
        "mean_acc": scores.mean_acc,
        "overall_acc": scores.overall_acc,
        "freqw_acc": scores.fw_iou,
    }
    deviation = max(float(np.nanmax(np.abs(ours[name] - GOLDEN[name]))) for name in ours)
    print(f"metrics.npz: largest deviation {deviation:.1e}")
    for name, value in ours.items():
        np.testing.assert_allclose(value, GOLDEN[name], rtol=0, atol=1e-9, err_msg=name)
    assert scores.iou.dtype == np.float64


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_any_integer_type_gives_the_same_counts(dtype):
    assert torch.equal(golden_metrics(dtype).confusion, golden_metrics().confusion)


def test_labels_that_are_no_class_do_not_count():
    metrics = StreamSegMetrics(3)
    metrics.update(torch.tensor([[[0, 2, 3, 255, -1]]]), torch.tensor([[[1, 2, 0, 2, 0]]]))
    assert metrics.confusion.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 1]]


def test_151_classes_against_a_plain_count():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 256, (2, 40, 50), generator=generator, dtype=torch.uint8)
    predictions = torch.randint(0, 151, (2, 40, 50), generator=generator)
    metrics = StreamSegMetrics(151, "cpu")
    metrics.update(labels, predictions)
    expected = np.zeros((151, 151), dtype=np.int64)
    pairs = zip(labels.flatten().tolist(), predictions.flatten().tolist(), strict=True)
    for truth, predicted in pairs:
        if truth < 151:
            expected[truth, predicted] += 1
    np.testing.assert_array_equal(metrics.confusion.numpy(), expected)


def test_ranks_add_up_in_the_matrix_itself():
    metrics, other = golden_metrics(), golden_metrics()
    metrics.confusion.add_(other.confusion)  # what an all-reduce does
    np.testing.assert_array_equal(metrics.confusion.numpy(), 2 * GOLDEN["confusion"])


def test_formulas_by_hand_old_new_and_background_apart():
    # Class 4 has no ground truth, but two pixels are taken for it.
    confusion = [
        [6, 0, 2, 0, 2],
        [0, 4, 0, 0, 0],
        [1, 0, 1, 2, 0],
        [0, 0, 0, 8, 0],
        [0, 0, 0, 0, 0],
    ]
    scores = metrics_of(confusion).scores(old=3)
    iou = [6 / 11, 4 / 4, 1 / 6, 8 / 10]
    precision = [6 / 7, 4 / 4, 1 / 3, 8 / 10, 0]
    assert scores.iou[:4] == pytest.approx(iou, rel=0, abs=1e-6)
    assert scores.precision[:4] == pytest.approx(precision[:4], rel=0, abs=1e-6)
    assert all(math.isnan(x[4]) for x in (scores.iou, scores.accuracy, scores.precision))
    assert scores.old == pytest.approx((iou[1] + iou[2]) / 2, rel=0, abs=1e-6)
    assert scores.new == pytest.approx(iou[3], rel=0, abs=1e-6)
    assert scores.all == pytest.approx(sum(iou[1:]) / 3, rel=0, abs=1e-6)
    assert scores.with_background == pytest.approx(sum(iou) / 4, rel=0, abs=1e-6)
    assert scores.mean_acc == pytest.approx((0.6 + 1 + 0.25 + 1) / 4, rel=0, abs=1e-6)
    assert scores.overall_acc == pytest.approx(19 / 26, rel=1e-12)
    assert scores.mean_prec == pytest.approx(sum(precision) / 5, rel=0, abs=1e-6)
    weights = [10 / 26, 4 / 26, 4 / 26, 8 / 26]
    assert scores.fw_iou == pytest.approx(np.dot(weights, iou), rel=0, abs=1e-6)


def test_old_and_all_with_background_by_hand():
    confusion = [[6, 2, 2], [0, 4, 0], [1, 0, 3]]
    scores = metrics_of(confusion).scores(old=2, background=True)
    iou = [6 / 11, 4 / 6, 3 / 6]
    assert scores.old == pytest.approx((iou[0] + iou[1]) / 2, rel=0, abs=1e-6)
    assert scores.new == pytest.approx(iou[2], rel=0, abs=1e-6)
    assert scores.all == scores.with_background == pytest.approx(sum(iou) / 3, rel=0, abs=1e-6)
    assert math.isnan(metrics_of(confusion).scores(background=True).old)


@pytest.mark.parametrize("old", [None, 0])
def test_step_0_has_no_old_and_new(old):
    scores = metrics_of([[5, 1], [1, 5]]).scores(old)
    assert math.isnan(scores.old)
    assert math.isnan(scores.new)
    assert scores.all == pytest.approx(5 / 7, abs=1e-6)


def test_nothing_counted_gives_nan_without_a_warning(recwarn):
    scores = StreamSegMetrics(3).scores(old=2)
    measured = {name for name, value in scores.means().items() if not math.isnan(value)}
    assert measured == {"mean_prec"}
    assert not recwarn.list


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="differ"):
        StreamSegMetrics(3).update(torch.zeros(1, 4, 4).long(), torch.zeros(1, 2, 2).long())


def test_table_shows_names_values_and_x():
    scores = metrics_of([[3, 1, 0], [0, 4, 0], [0, 0, 0]]).scores(old=2)
    names = ["background", "potted plant", "sofa", "not seen yet"]
    table = to_table(names, scores)
    lines = table.splitlines()
    assert lines[0].split() == ["#", "class", "IoU", "Acc", "Prec"]
    assert lines[2].split() == ["0", "background", "0.7500", "0.7500", "1.0000"]
    assert lines[3].split() == ["1", "potted", "plant", "0.8000", "1.0000", "0.8000"]
    assert lines[4].split() == ["2", "sofa", "X", "X", "X"]
    assert "not seen yet" not in table
    assert len({len(line) for line in lines[:5]}) == 1
    header, rows, means = score_rows(names, scores)
    assert [len(row) for row in rows] == [len(header)] * 3
    assert ["mean IoU, new classes", "X"] in means
    assert ["mean IoU, old classes", "0.8000"] in means


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_update_does_not_wait_for_the_device():
    metrics = StreamSegMetrics(7, "cuda")
    labels = torch.from_numpy(GOLDEN["labels"]).cuda()
    predictions = torch.from_numpy(GOLDEN["predictions"]).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics.update(labels, predictions)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    np.testing.assert_array_equal(metrics.confusion.cpu().numpy(), GOLDEN["confusion"])
