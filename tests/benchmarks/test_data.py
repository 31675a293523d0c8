"""benchmarks/data.py: both sides read the same samples, and its table is printed."""

import json
import sys

import pytest
import torch

from benchmarks import data as benchmark
from benchmarks import harness
from dataset.transform import normalize
from tests.trees import make_voc, mask_of
from utils.constants import IMAGENET_STD

ROUNDING = 1.01 / 255 / min(IMAGENET_STD)  # one level of uint8


@pytest.fixture
def tree(tmp_path):
    masks = [mask_of(0, 16 + i, 3, width=40, height=30) for i in range(4)]
    return make_voc(tmp_path / "voc", masks)


def test_both_sides_read_the_same_samples(tree):
    samples = benchmark.find(tree, 3, tree)
    (ours, collate), (plain, plain_collate) = (
        build(samples, 16) for build in (benchmark.ours, benchmark.plain)
    )
    keys = [(epoch, i) for epoch in range(4) for i in range(3)]
    images, labels = collate([ours[key] for key in keys])
    expected, expected_labels = plain_collate([plain[key] for key in keys])
    torch.testing.assert_close(normalize(images), expected, rtol=0, atol=ROUNDING)
    assert torch.equal(labels, expected_labels)
    assert set(labels.unique().tolist()) > {0, 16}


def run(monkeypatch, flags: str) -> None:
    shape = "--samples 4 --crop_size 8 --batch_size 2 --repeats 1 --calls 1"
    monkeypatch.setattr(harness, "in_fresh_process", harness._measure)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # this process goes on
    monkeypatch.setattr(sys, "argv", ["data", *shape.split(), *flags.split()])
    benchmark.main()


def test_the_table_of_single_samples(tree, tmp_path, monkeypatch, capsys):
    run(monkeypatch, f"--data_root {tree} --sides 20 --json {tmp_path / 'data.json'}")
    cases = json.loads((tmp_path / "data.json").read_text())["cases"]
    names = [f"{data}, {form}" for data in ("photographs", "20 pixels")
             for form in ("ready", "worker")]  # fmt: skip
    assert [case["name"] for case in cases] == names
    assert all(case["summary"]["time ratio"] > 0 for case in cases)
    printed = capsys.readouterr().out
    assert all(f"{name}: a sample takes" in printed for name in names)


def test_the_table_of_workers_on_toy_data(monkeypatch, capsys):
    run(monkeypatch, "--workers 0")
    assert "0 workers: a sample takes" in capsys.readouterr().out
