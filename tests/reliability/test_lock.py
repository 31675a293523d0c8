"""Two runs of one name and step: the second is refused while the first lives, and only then."""

from __future__ import annotations

import os

from tests.reliability.harness import checkpoint_path, go, launch


def test_only_one_at_a_time(fresh, toy):
    folder = fresh("folder")
    flags = ["--data_root", toy, "--step", 1, "--method", "FT", "--epochs", 1, "--batch_size", 2]
    wait = {"at": "iteration", "count": 2, "signal": "WAIT"}
    first = launch(folder, *flags, "--num_workers", 2, faults=[wait])
    first.wait_for("fault at iteration")
    pid = first.processes[0].pid
    (folder / "out-0").rename(folder / "first")

    second = go(folder, *flags)
    assert second.status == [1]
    assert second.output.splitlines()[-1].startswith(
        f"error: step 1 of 'r' (voc-15-5-ov) is already running (process {pid} on "
    )
    assert "Traceback" not in second.output
    assert not checkpoint_path(folder, 1).exists()
    # Others are not in its way: other steps, and tests.
    other = ["--data_root", toy, "--batch_size", 2, "--epochs", 1]
    assert go(folder, *other, "--test").status == [0]

    first.kill()
    first.wait()
    assert os.path.exists(checkpoint_path(folder, 1).with_name(".r_1.pth.lock"))
    # Data workers of the dead run are still there for a moment; that must not matter.
    assert go(folder, *flags).status == [0]


def test_with_two_processes_the_refusal_ends_both(fresh, toy):
    folder = fresh("folder")
    flags = ["--data_root", toy, "--step", 1, "--method", "FT", "--epochs", 1, "--batch_size", 1]
    wait = {"at": "iteration", "count": 2, "signal": "WAIT"}
    first = launch(folder, *flags, faults=[wait], world=2)
    first.wait_for("fault at iteration")
    second = go(folder, *flags, world=2)
    assert second.status == [1, 1]
    assert second.output.count("error: ") == 1
    first.kill()
    first.wait()
