"""A run that is killed again and again ends, bit by bit, like one that never was."""

from __future__ import annotations

import json
import math
import random
import time
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.reliability.harness import (
    SETTING,
    Fault,
    Run,
    checkpoint_path,
    difference,
    launch,
    read,
    rows,
)

EPOCHS = 3
METHODS = {
    "MIB": ["--method", "MIB"],
    "RW": ["--method", "RW", "--reg_iterations", 2, "--reg_importance", 0.1],
    "EWC": ["--method", "EWC", "--reg_importance", 1e-3],
    "PI": ["--method", "PI", "--reg_importance", 1e-3],
    # Local POD cuts the smallest map into 4 x 4 squares; EWF adds the blend after the last epoch.
    "PLOP+EWF": ["--method", "PLOP+EWF", "--crop_size", 64],
}


def kill(place: str, count: int, **more: int) -> Fault:
    return {"at": place, "count": count, "signal": "KILL", **more}


# One after the other in one run; places count from each restart. An epoch has 7 iterations and 4
# evaluation batches in the first process.
KILLS = [
    kill("iteration", 3),  # before the first checkpoint
    kill("journal", 2, bytes=40),  # in the first epoch's line of metrics.jsonl
    kill("checkpoint", 1, bytes=20_000),  # in the middle of the first checkpoint
    kill("evaluation", 2),  # in the first validation
    kill("iteration", 10),  # in the middle of the second epoch
    kill("checkpoint", 1, bytes=0),  # at the first byte of the second checkpoint
    kill("rename", 1),  # the second checkpoint just took its place
    kill("journal", 1, bytes=40),  # while its lines are written again, on going on
    kill("evaluation", 6),  # in the final test
    kill("results", 2, bytes=10),  # one result file is there, the other half written
]


# More of them where there is a pass before the first epoch and a blend after the last. An epoch
# has 7 iterations; the checkpoint after the pass is the first.
LATER_KILLS = [
    kill("survey", 4),  # in the pass
    kill("save", 1),  # after the pass, before its checkpoint
    kill("iteration", 3),
    kill("evaluation", 2),
    kill("save", 3),  # between the blend and the final checkpoint
    kill("checkpoint", 1, bytes=20_000),  # in the middle of that one
    kill("rename", 1),  # it just took its place
    kill("evaluation", 2),  # in the final test
]


def learn(folder: Path, toy: Path, method: str, world: int, *flags: object, **settings) -> Run:
    return launch(
        folder, "--data_root", toy, "--step", 1, *METHODS[method], "--epochs", EPOCHS,
        "--batch_size", max(1, 2 // world), *flags, world=world, **settings,
    )  # fmt: skip


def check_same(folder: Path, reference: Path) -> None:
    assert not difference(read(folder, 1), read(reference, 1))
    assert rows(folder) == rows(reference)


def check_journal(folder: Path, reference: Path) -> None:
    """metrics.jsonl has each epoch and the test once, with the numbers of a run never stopped."""
    expected, found = journal(reference), journal(folder)
    assert list(expected) == [*range(1, EPOCHS + 1), "test"]
    assert list(found) == list(expected)
    for key, line in expected.items():
        assert found[key] == pytest.approx(line, rel=1e-12, nan_ok=True), key


def journal(folder: Path) -> dict[int | str, dict[str, float]]:
    """The lines of metrics.jsonl by epoch, flat, without what the clock said."""

    def flat(line: dict[str, Any], name: str = "") -> Iterator[tuple[str, float]]:
        for key, value in line.items():
            if isinstance(value, dict):
                yield from flat(value, f"{name}{key}/")
            elif key not in ("seconds", "images_per_second", "waiting"):
                yield f"{name}{key}", math.nan if value is None else value

    file = folder / "logs" / SETTING / "r" / "step-1" / "metrics.jsonl"
    lines = [dict(flat(json.loads(text))) for text in file.read_text().splitlines()]
    keys = [line.get("epoch", "test") for line in lines]
    assert len(set(keys)) == len(keys), keys
    return dict(zip(keys, lines, strict=True))


def check_curves(folder: Path, reference: Path) -> None:
    """No point is missing and none is there twice; every stop may add one of its own."""
    assert set(points(folder)) >= set(points(reference))
    assert max(points(folder).values()) == 1


def points(folder: Path) -> Counter[tuple[str, int]]:
    """How often TensorBoard shows each point (tag, iteration) of training and validation."""
    logs = EventAccumulator(str(folder / "logs" / SETTING / "r" / "step-1")).Reload()
    tags = [tag for tag in logs.Tags()["scalars"] if not tag.startswith("test")]
    return Counter((tag, point.step) for tag in tags for point in logs.Scalars(tag))


USUAL = (("MIB", 1), ("RW", 2), ("PLOP+EWF", 1))


@pytest.mark.parametrize(
    ("method", "world"),
    [*USUAL, *(pytest.param(*case, marks=pytest.mark.long) for case in product(METHODS, (1, 2))
               if case not in USUAL)],
)  # fmt: skip
def test_killed_everywhere(fresh, toy, method, world):
    """Each life of the run ends with SIGKILL somewhere else; worker counts differ, too."""
    reference, folder = fresh("reference"), fresh("killed")
    assert learn(reference, toy, method, world).wait().status == [0] * world
    for life, fault in enumerate(LATER_KILLS if method == "PLOP+EWF" else KILLS):
        # With several processes now one, now the other is hit; writes happen in the first.
        writes = fault["at"] in ("save", "checkpoint", "rename", "results", "journal")
        fault = fault if writes or world == 1 else {**fault, "rank": life % world}
        workers = {3: 1, 6: 2}.get(life, 0)
        running = learn(folder, toy, method, world, "--continue_ckpt", "--num_workers", workers,
                        faults=[fault])  # fmt: skip
        first = min(fault.get("rank", 0), world - 1)
        running.processes[first].join(100)
        running.kill()  # what a launcher does with the others
        assert running.wait().status[first] == -9, (fault, running.output)
    done = learn(folder, toy, method, world, "--continue_ckpt").wait()
    assert done.status == [0] * world, done.output
    check_same(folder, reference)
    check_curves(folder, reference)
    check_journal(folder, reference)


def test_three_processes(fresh, toy):
    """Three gradients have another sum in another order, and DDP likes to change it on the way."""
    reference, folder = fresh("reference"), fresh("killed")
    flags = ["--batch_size", 1, "--epochs", 2]
    assert learn(reference, toy, "MIB", 3, *flags).wait().status == [0] * 3
    running = learn(folder, toy, "MIB", 3, *flags, faults=[kill("iteration", 6, rank=2)])
    running.processes[2].join(100)
    running.kill()
    running.wait()
    done = learn(folder, toy, "MIB", 3, *flags, "--continue_ckpt").wait()
    assert done.status == [0] * 3, done.output
    assert "going on from" in done.output
    check_same(folder, reference)


@pytest.mark.long
@pytest.mark.parametrize(("method", "world"), [("MIB", 2), ("RW", 1)])
def test_killed_at_random_moments(fresh, toy, method, world):
    """Whatever the program is doing: twenty kills at random times, each of a run that lives."""
    reference, folder, length = fresh("reference"), fresh("killed"), ("--epochs", 30)
    assert learn(reference, toy, method, world, *length).wait().status == [0] * world
    rng = random.Random(world)
    kills = 0
    while kills < 20:
        running = learn(folder, toy, method, world, *length, "--continue_ckpt", "--num_workers",
                        kills % 3)  # fmt: skip
        running.wait_for(" I ")
        time.sleep(rng.uniform(0, 3) * world)
        running.kill()
        if running.wait().status == [-9] * world:
            kills += 1
        else:  # it was finished before: once more from the beginning
            checkpoint_path(folder, 1).unlink()
    done = learn(folder, toy, method, world, *length, "--continue_ckpt").wait()
    assert done.status == [0] * world, done.output
    check_same(folder, reference)
