"""SIGTERM and Ctrl-C: the run stops where it can go on from, in all its processes at once."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.reliability.harness import (
    checkpoint_path,
    difference,
    launch,
    read,
    rows,
    torchrun,
)
from tests.reliability.test_resume import METHODS, check_curves, check_journal, check_same, learn
from utils.signals import INTERRUPTED


def stop(place: str, count: int, name: str = "TERM", **more: object) -> dict:
    return {"at": place, "count": count, "signal": name, **more}


# (fault, epoch and iteration of the checkpoint afterwards); epochs have 7 iterations.
STOPS = [
    (stop("iteration", 3), (0, 3)),
    (stop("iteration", 2, "INT"), (0, 5)),
    (stop("iteration", 2), (0, 7)),  # with the epoch's last iteration
    (stop("evaluation", 1), (0, 7)),  # its validation is stopped, too
    (stop("checkpoint", 1, "INT", bytes=9_000), (1, 0)),  # asked while writing: at once
    (stop("evaluation", 10), (3, 0)),  # in the final test
]


@pytest.mark.parametrize(("method", "world"), [("MIB", 1), ("RW", 2)])
def test_stops_and_goes_on(fresh, toy, method, world):
    reference, folder = fresh("reference"), fresh("stopped")
    assert learn(reference, toy, method, world).wait().status == [0] * world
    for life, (fault, place) in enumerate(STOPS):
        # One process hears of it and all stop. The last one never writes.
        heard = life % world if fault["at"] != "checkpoint" else 0
        if place == (3, 0) and heard:
            fault = {**fault, "count": 8}  # it has one evaluation batch less
        workers = 1 if life == 0 else 0
        stopped = learn(folder, toy, method, world, "--continue_ckpt", "--num_workers", workers,
                        faults=[{**fault, "rank": heard}]).wait()  # fmt: skip
        assert stopped.status == [INTERRUPTED] * world, stopped.output
        assert "Traceback" not in stopped.output
        content = read(folder, 1)
        assert (content["epoch"], content["iteration"]) == place
    done = learn(folder, toy, method, world, "--continue_ckpt").wait()
    assert done.status == [0] * world, done.output
    check_same(folder, reference)
    check_curves(folder, reference)
    check_journal(folder, reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(fresh, toy, number):
    folder = fresh("impatient")
    running = learn(folder, toy, "MIB", 1, faults=[stop("iteration", 2, "WAIT")])
    running.wait_for("fault at iteration")
    running.kill(number)
    running.wait_for("again ends the program")
    running.kill(number)  # a launcher's and a scheduler's signal are one wish
    time.sleep(1.5)
    assert running.processes[0].exitcode is None
    before = time.monotonic()
    running.kill(number)
    assert running.wait().status == [-number]
    assert time.monotonic() - before < 30  # the fault sleeps for a minute
    assert not checkpoint_path(folder, 1).exists()


def test_ctrl_c_before_the_training(fresh, toy):
    ended = learn(fresh("early"), toy, "MIB", 1, faults=[stop("data", 1, "INT")]).wait()
    assert ended.status == [130]
    assert ended.output.endswith("interrupted\n")
    assert "Traceback" not in ended.output


@pytest.mark.parametrize(
    ("fault", "status", "words"),
    [
        (stop("results", 1, "INT", bytes=0), INTERRUPTED, "interrupted: after step 0"),
        (stop("between", 1, "INT"), 130, "interrupted\n"),
        (stop("data", 2, "INT"), 130, "interrupted\n"),  # in the scan of the second
    ],
)
def test_ctrl_c_between_steps(never_stopped, toy, tmp_path, fault, status, words):
    stopped = learn_both(tmp_path, toy, faults=[fault]).wait()
    assert stopped.status == [status], stopped.output
    assert words in stopped.output
    assert "Traceback" not in stopped.output
    assert read(tmp_path, 0)["finished"]
    assert not checkpoint_path(tmp_path, 1).exists()
    done = learn_both(tmp_path, toy).wait()
    assert done.status == [0], done.output
    assert "step 0 of r is finished: skipped" in done.output
    check_same(tmp_path, never_stopped)


@pytest.fixture(scope="module")
def never_stopped(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("never")
    assert learn_both(folder, toy).wait().status == [0]
    return folder


def learn_both(folder, toy, **settings):
    flags = ["--method", "FT", "--step", "0-1", "--epochs", 1, "--batch_size", 4]
    return launch(folder, "--data_root", toy, *flags, **settings)


def test_a_signal_to_the_whole_group_spares_the_data_workers(fresh, toy):
    """What Ctrl-C in a terminal and batch systems do."""
    folder = fresh("group")
    running = learn(folder, toy, "MIB", 1, "--num_workers", 2, "--epochs", 400)
    running.wait_for("epoch 2/400")
    pid = running.processes[0].pid
    for process in [*workers_of(pid), pid]:
        os.kill(process, signal.SIGTERM)
    stopped = running.wait()
    assert stopped.status == [INTERRUPTED], stopped.output
    assert not read(folder, 1)["finished"]


def test_a_killed_data_worker_ends_the_run_with_a_line(fresh, toy):
    """What a machine short of memory does."""
    running = learn(fresh("worker"), toy, "MIB", 1, "--num_workers", 1, "--epochs", 400)
    running.wait_for("epoch 1/400")
    workers = [w for server in workers_of(running.processes[0].pid) for w in workers_of(server)]
    assert workers
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    ended = running.wait()
    assert ended.status == [1], ended.output
    assert "error: a data worker was killed" in ended.output
    assert "Traceback" not in ended.output


def workers_of(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as children:
        return [int(number) for number in children.read().split()]


def test_torchrun_passes_sigterm_on(fresh, toy):
    reference, folder = fresh("reference"), fresh("stopped")
    flags = ["--data_root", toy, "--step", 1, *METHODS["MIB"], "--epochs", 2, "--batch_size", 1,
             "--continue_ckpt"]  # fmt: skip
    assert learn(reference, toy, "MIB", 2, "--epochs", 2).wait().status == [0, 0]
    fault = stop("iteration", 3, launcher=True, rank=1)
    stopped = torchrun(folder, *flags, "--num_workers", 1, world=2, faults=[fault])
    assert stopped.returncode != 0
    assert "interrupted: after iteration" in stopped.stdout
    assert 0 < read(folder, 1)["iteration"] < 7
    done = torchrun(folder, *flags, world=2)
    assert done.returncode == 0, done.stdout
    check_same(folder, reference)


def test_torchrun_restarts_after_a_kill(fresh, toy):
    reference, folder = fresh("reference"), fresh("killed")
    flags = ["--data_root", toy, "--step", 1, *METHODS["RW"], "--epochs", 2, "--batch_size", 1,
             "--continue_ckpt"]  # fmt: skip
    assert learn(reference, toy, "RW", 2, "--epochs", 2).wait().status == [0, 0]
    fault = stop("iteration", 9, "KILL", rank=1)
    done = torchrun(folder, *flags, world=2, restarts=1, faults=[fault])
    assert done.returncode == 0, done.stdout
    assert "going on from" in done.stdout
    assert not difference(read(folder, 1), read(reference, 1))
    assert rows(folder) == rows(reference)
