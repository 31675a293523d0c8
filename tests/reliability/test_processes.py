"""What is computed does not depend on the number of processes."""

from __future__ import annotations

import pytest
import torch

from tests.reliability import child
from tests.reliability.harness import go, rows


def test_evaluation_with_one_two_and_three_processes(fresh, toy):
    """Seven images in batches of two: nobody divides them, and the last batch is short."""
    folder = fresh("folder")
    flags = ["--data_root", toy, "--step", 1, "--method", "MIB", "--batch_size", 2]
    done = go(folder, *flags, "--epochs", 2, "--lr", 0.1)
    assert done.status == [0], done.output
    confusion, results = torch.load(folder / "confusion.pt"), rows(folder)
    assert confusion.sum() > 0
    assert (confusion.sum(0) > 0).sum() > 1  # a network that says the same everywhere proves little
    for world in (1, 2, 3):
        (folder / "confusion.pt").unlink()
        for file in (folder / "logs" / "results").iterdir():
            file.unlink()
        tested = go(folder, *flags, "--test", "--num_workers", world % 2, world=world)
        assert tested.status == [0] * world, tested.output
        assert torch.equal(torch.load(folder / "confusion.pt"), confusion)
        assert {name: text.splitlines()[-1] for name, text in rows(folder).items()} == {
            name: text.splitlines()[-1] for name, text in results.items()
        }


@pytest.mark.parametrize("step", [["--step", 0], ["--step", 1, "--method", "MIB"]], ids=str)
def test_training_with_one_and_two_processes(fresh, toy, step):
    """In float64, where the order of summation leaves the first digits alone."""
    seen = {}
    for world in (1, 2):
        folder = fresh(f"world-{world}")
        done = go(folder, "--data_root", toy, *step, "--batch_size", 2 // world, "--epochs", 2,
                  "--num_workers", 0, "--restart", world=world,
                  entry=child.main_in_float64)  # fmt: skip
        assert done.status == [0] * world, done.output
        seen[world] = [torch.load(folder / f"seen-{rank}.pt") for rank in range(world)]
    (alone, images), (first, left), (second, right) = seen[1][0], *seen[2]
    assert len(alone) >= 10
    assert first == second
    assert alone[:10] == pytest.approx(first[:10], abs=1e-9, rel=0)
    assert images[0::2] == left
    assert images[1::2] == right
