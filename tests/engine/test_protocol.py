"""The flags of the later papers' protocol reach the data and the scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.build import build_data
from engine.context import Context
from engine.plans import parse
from metrics.stream_metrics import StreamSegMetrics
from tests.trees import make_ade, make_voc, mask_of


def context_of(root: Path, *argv: str) -> Context:
    (plan,) = parse(["--data_root", str(root), "--crop_size", "32", *argv])
    return Context.of(plan.opts, torch.device("cpu"))


def labels_in(data) -> set[int]:
    return {label for i in range(len(data)) for label in data[i][1].unique().tolist()}


def test_flags_change_the_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = make_voc(tmp_path, [mask_of(0, 1, 255)], [mask_of(0, 1, 16, 255), mask_of(16)])
    ours = build_data(context_of(root, "--task", "15-5"))
    theirs = build_data(
        context_of(root, "--task", "15-5", "--recipe", "plop", "--crop_size", "32", "--overlap")
    )
    assert (255 in labels_in(ours.train), 255 in labels_in(theirs.train)) == (False, True)
    assert (len(ours.test), len(theirs.test)) == (2, 1)
    shown = [data.test[0][1].flatten() for data in (ours, theirs)]
    counts = [np.bincount(labels, minlength=256)[[0, 1, 255]].tolist() for labels in shown]
    # Background, aeroplane, ignored: 288 pixels of a potted plant are on either side.
    assert counts == [[192, 320, 512], [480, 320, 224]]


@pytest.mark.parametrize(
    ("argv", "split", "images"),
    [
        (["--overlap"], "partition", [0]),
        (["--overlap", "--recipe", "plop"], "overlapped", [0, 1]),
        (["--recipe", "plop"], "partition", [0]),
        (["--no_partition"], "disjoint", [0]),
        (["--no_partition", "--overlap"], "overlapped", [0, 1]),
    ],
)
def test_flags_change_the_lists_of_ade(tmp_path, monkeypatch, argv, split, images):
    monkeypatch.chdir(tmp_path)
    root = make_ade(tmp_path, [mask_of(1), mask_of(1, 1, 120), mask_of(120, 130)])
    context = context_of(root, "--dataset", "ade", "--task", "100-50", *argv)
    assert context.split == split
    assert build_data(context).train.indices.tolist() == images


@pytest.mark.parametrize(("protocol", "score"), [("mib", 2 / 3), ("plop", (1 / 2 + 2 / 3) / 2)])
def test_scores_are_of_the_protocol(tmp_path, protocol, score):
    """All without background, whose IoU is 1/2, or with it."""
    metrics = StreamSegMetrics(2)
    metrics.update(torch.tensor([[[0, 1, 1, 255]]]), torch.tensor([[[0, 0, 1, 0]]]))
    metrics.update(torch.tensor([[[1, 255]]]), torch.tensor([[[1, 0]]]))
    found = context_of(tmp_path, "--protocol", protocol).scores(metrics).all
    assert found == pytest.approx(score, abs=1e-6)
