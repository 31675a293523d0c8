"""The pass before the first epoch (PLOP) and the blend after the last one (EWF), interrupted."""

from __future__ import annotations

import pytest
import torch

from tests.reliability.harness import checkpoint_path, difference, read
from tests.reliability.test_resume import check_same, kill, learn
from utils.signals import INTERRUPTED

METHOD = "PLOP+EWF"


@pytest.mark.parametrize("world", [1, 2])
def test_the_pass_stops_and_starts_over(fresh, toy, world):
    reference, folder = fresh("reference"), fresh("stopped")
    assert learn(reference, toy, METHOD, world).wait().status == [0] * world
    fault = {"at": "survey", "count": 3, "signal": "TERM", "rank": world - 1}
    stopped = learn(folder, toy, METHOD, world, faults=[fault]).wait()
    assert stopped.status == [INTERRUPTED] * world, stopped.output
    assert "interrupted: in the pass before epoch 1" in stopped.output
    content = read(folder, 1)
    assert (content["epoch"], content["iteration"], content["objective_state"]) == (0, 0, {})
    done = learn(folder, toy, METHOD, world, "--continue_ckpt").wait()
    assert done.status == [0] * world, done.output
    check_same(folder, reference)


def test_the_pass_is_not_repeated(fresh, toy):
    """Killed in its first epoch, a run goes on with the thresholds that it has."""
    folder = fresh("killed")
    assert learn(folder, toy, METHOD, 1, faults=[kill("iteration", 2)]).wait().status == [-9]
    content = read(folder, 1)
    assert (content["epoch"], content["iteration"]) == (0, 0)
    assert content["objective_state"]["pseudo_thresholds"].shape == (21,)
    done = learn(folder, toy, METHOD, 1, "--continue_ckpt", faults=[kill("survey", 1)]).wait()
    assert done.status == [0], done.output
    assert not difference(read(folder, 1)["objective_state"], content["objective_state"])


def test_a_blended_checkpoint_is_not_trained_on(fresh, toy):
    """Nor is it blended again where it is tested once more."""
    folder = fresh("folder")
    assert learn(folder, toy, METHOD, 1).wait().status == [0]
    before = read(folder, 1)
    assert learn(folder, toy, METHOD, 1, "--continue_ckpt").wait().status == [0]
    assert not difference(read(folder, 1), before)
    more = learn(folder, toy, METHOD, 1, "--continue_ckpt", "--epochs", 4).wait()
    assert more.status == [1]
    assert "is of a finished run with --epochs 3" in more.output
    assert "Traceback" not in more.output


@pytest.mark.parametrize("method", ["MIB", METHOD])
def test_a_checkpoint_of_an_older_program_is_resumed(fresh, toy, method):
    """It has no field of the objective; where one is needed, the pass is done again."""
    reference, folder = fresh("reference"), fresh("older")
    assert learn(reference, toy, method, 1).wait().status == [0]
    assert learn(folder, toy, method, 1, faults=[kill("iteration", 9)]).wait().status == [-9]
    path = checkpoint_path(folder, 1)
    content = torch.load(path, weights_only=True)
    assert content["epoch"] == 1
    del content["objective_state"]
    torch.save(content, path)
    done = learn(folder, toy, method, 1, "--continue_ckpt").wait()
    assert done.status == [0], done.output
    check_same(folder, reference)


def test_damaged_thresholds_are_refused(fresh, toy):
    folder = fresh("folder")
    assert learn(folder, toy, METHOD, 1, faults=[kill("iteration", 2)]).wait().status == [-9]
    path = checkpoint_path(folder, 1)
    content = torch.load(path, weights_only=True)
    for state, message in (
        ({"pseudo_thresholds": torch.zeros(3)}, "for each of 21 classes"),
        ({"pseudo_thresholds": "abc"}, "cannot be resumed"),
        (7, "damaged"),
    ):
        torch.save(content | {"objective_state": state}, path)
        refused = learn(folder, toy, METHOD, 1, "--continue_ckpt").wait()
        assert refused.status == [1]
        assert message in refused.output
        assert "Traceback" not in refused.output
